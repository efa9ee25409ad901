"""The HTTP contract, whole bodies, against the WSGI application with a real model in it."""

import base64
import gzip
import hashlib
import io
import json
import re
import subprocess
import threading
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import permutations

import falcon
import msgspec
import numpy as np
import pytest
from falcon.testing import create_environ
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from webtest import TestApp

import data
from conftest import LINE, TRANSACTION, client_of, config, wait_until
from fraud_api import PredictBatch, Predictor, Process, create_app
from model import Columns, Features, Floats, Model, PipelineScorer, Transaction, columns_of

PROBLEM = "application/problem+json"


def score(model: Model, body: dict[str, object]) -> float:
    return float(model.score([Transaction(**body)])[0])


def post(app: TestApp, path: str, body: object, content_type: str = "application/json") -> object:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return app.post(path, data, {"Content-Type": content_type}, expect_errors=True)


def timeless(prediction: dict[str, object]) -> dict[str, object]:
    """The prediction without its time, which is checked here: UTC, RFC 3339, now."""
    time = str(prediction.pop("prediction_time"))
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", time)
    assert abs(datetime.now(UTC) - datetime.fromisoformat(time)) < timedelta(seconds=10)
    return prediction


def test_predict(app: TestApp, model: Model) -> None:
    """A transaction in; probability, decision, confidence and version out."""
    answer = post(app, "/predict", TRANSACTION)
    probability = score(model, TRANSACTION)
    assert (answer.status_code, answer.content_type) == (200, "application/json")
    assert timeless(answer.json) == {
        "transaction_id": "tx_12345",
        "is_fraud": False,
        "fraud_probability": probability,
        "confidence": 1 - probability,
        "model_version": "v1.2.3",
    }


def test_threshold_is_inclusive(model: Model) -> None:
    """A probability equal to the threshold is fraud; just below is not."""
    probability = score(model, TRANSACTION)
    for threshold, is_fraud in ((probability, True), (probability + 1e-12, False)):
        app = client_of(create_app(config(), replace(model, fixed_threshold=threshold), Process()))
        assert post(app, "/predict", TRANSACTION).json["is_fraud"] is is_fraud


class Fixed(PipelineScorer):
    """Gives every row the same probability, or raises an error that quotes the rows."""

    name = "fixed"

    def __init__(self, probability: float | None = None) -> None:
        self.probability = probability

    def __call__(self, columns: Columns) -> Floats:
        if self.probability is None:
            raise RuntimeError(f"cannot score {columns}")
        return np.full(len(columns[0]), self.probability)


@pytest.mark.parametrize(
    ("probability", "is_fraud", "confidence"), [(0.9, True, 0.9), (0.25, False, 0.75), (1.0, True, 1.0)]
)
def test_decision_and_confidence(model: Model, probability: float, is_fraud: bool, confidence: float) -> None:
    """Confidence is that of the likelier answer, whatever the threshold."""
    certain = replace(model, fixed_threshold=0.5, scorer=Fixed(probability))
    answer = timeless(post(client_of(create_app(config(), certain, Process())), "/predict", TRANSACTION).json)
    assert answer == {
        "transaction_id": "tx_12345",
        "is_fraud": is_fraud,
        "fraud_probability": probability,
        "confidence": confidence,
        "model_version": "v1.2.3",
    }


def test_version_without_a_release(model: Model) -> None:
    """`v` and the registry's number stand in for a missing `release` tag."""
    snapshot = msgspec.structs.replace(model.snapshot, number="7", release=None)
    app = client_of(create_app(config(), replace(model, snapshot=snapshot), Process()))
    assert post(app, "/predict", TRANSACTION).json["model_version"] == "v7"


@pytest.mark.parametrize(
    "changes",
    [
        {"hour": 14.0, "amount": 150, "user_age": 35.0},
        {"unknown": "field", "nested": {"a": [1]}},
        {"merchant_category": "never seen"},
        {"amount": 0, "hour": 0, "day_of_week": 0, "user_age": 0, "account_balance": -1e308},
        {"amount": 1.7e308, "hour": 23, "day_of_week": 6, "user_age": 130},
        {"transaction_id": "x" * 128, "merchant_category": "ü" * 64},
    ],
)
def test_accepted(app: TestApp, changes: dict[str, object]) -> None:
    assert post(app, "/predict", TRANSACTION | changes).status_code == 200


RULES = {
    "transaction_id": ("a string of 1 to 128 characters", ["", "x" * 129, 1, None, True]),
    "amount": ("an amount of money, a number from 0", [-0.01, "1", True, None, [1]]),
    "merchant_category": ("a string of 1 to 64 characters", ["", "x" * 65, 5]),
    "hour": ("an hour, a whole number from 0 to 23", [-1, 24, 1.5, "1", True]),
    "day_of_week": ("a day, a whole number from 0 (Monday) to 6 (Sunday)", [-1, 7, 0.5, False]),
    "user_age": ("years, a whole number from 0 to 130", [-1, 131, 35.5]),
    "account_balance": ("an amount of money, a number, may be negative", ["0", None, {}]),
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, (_, bad) in RULES.items() for value in bad])
def test_bad_field(app: TestApp, field: str, value: object) -> None:
    """422 names the field and its rule, and says nothing else."""
    answer = post(app, "/predict", TRANSACTION | {field: value})
    assert (answer.status_code, answer.content_type) == (422, PROBLEM)
    assert answer.json == {
        "type": "about:blank",
        "request_id": "r-1",
        "title": "Unprocessable Entity",
        "status": 422,
        "detail": f"{field}: expected {RULES[field][0]}",
        "field": field,
    }


@pytest.mark.parametrize("field", RULES)
def test_missing_field(app: TestApp, field: str) -> None:
    answer = post(app, "/predict", {name: value for name, value in TRANSACTION.items() if name != field})
    assert (answer.status_code, answer.json["detail"], answer.json["field"]) == (
        422,
        f"{field}: expected {RULES[field][0]}",
        field,
    )


@pytest.mark.parametrize("number", ["1e999", "-1e999", "1" * 400])
def test_infinite_numbers(app: TestApp, number: str) -> None:
    body = json.dumps(TRANSACTION).replace("2500.0", number).encode()
    assert post(app, "/predict", body).json["field"] == "account_balance"


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"nonsense", b'{"amount": NaN}', b'{"x": \xff}', b"{}{}", b'{"x":' + b"[" * 2000, b'{"x": "\\ud800"}'],
)
def test_malformed_json(app: TestApp, body: bytes) -> None:
    answer = post(app, "/predict", body)
    assert (answer.status_code, answer.content_type) == (400, PROBLEM)
    assert answer.json == {
        "type": "about:blank",
        "request_id": "r-1",
        "title": "Bad Request",
        "status": 400,
        "detail": "malformed JSON",
    }


@pytest.mark.parametrize("body", [b"[]", b"1", b'"x"', b"null"])
@pytest.mark.parametrize("path", ["/predict", "/predict/batch"])
def test_not_an_object(app: TestApp, path: str, body: bytes) -> None:
    answer = post(app, path, body)
    assert answer.json == {
        "type": "about:blank",
        "request_id": "r-1",
        "title": "Unprocessable Entity",
        "status": 422,
        "detail": "expected a JSON object",
    }


def test_field_given_twice(app: TestApp, model: Model) -> None:
    """The last one counts, as in every common JSON parser."""
    body = f'{json.dumps(TRANSACTION)[:-1]}, "amount": 900}}'.encode()
    assert post(app, "/predict", body).json["fraud_probability"] == score(model, TRANSACTION | {"amount": 900})


@pytest.mark.parametrize(
    "more", ['"x": {"amount": 1, "amount": 2}', '"x\\"": 1', '"x": "\\"", "y": [{"a": "b"}]', '"": ""']
)
def test_other_fields_are_ignored(app: TestApp, model: Model, more: str) -> None:
    body = f"{json.dumps(TRANSACTION)[:-1]}, {more}}}".encode()
    assert post(app, "/predict", body).json["fraud_probability"] == score(model, TRANSACTION)


def test_batch(app: TestApp, model: Model) -> None:
    """Every row is in exactly one list, in order; a bad row costs no other."""
    other = TRANSACTION | {"transaction_id": "tx_2", "amount": 9000}
    rows = [TRANSACTION, TRANSACTION | {"hour": 24}, {"transaction_id": ""}, "text", other]
    answer = post(app, "/predict/batch", {"transactions": rows})
    assert answer.status_code == 200
    assert [timeless(prediction) for prediction in answer.json["predictions"]] == [
        {
            "transaction_id": row["transaction_id"],
            "is_fraud": score(model, row) >= model.threshold,
            "fraud_probability": pytest.approx(score(model, row), abs=1e-12),
            "confidence": pytest.approx(max(score(model, row), 1 - score(model, row)), abs=1e-12),
            "model_version": "v1.2.3",
        }
        for row in (TRANSACTION, other)
    ]
    head = {"type": "about:blank", "title": "Unprocessable Entity", "status": 422}
    hour = {"detail": f"hour: expected {RULES['hour'][0]}", "field": "hour"}
    empty = {"detail": f"transaction_id: expected {RULES['transaction_id'][0]}", "field": "transaction_id"}
    assert answer.json["errors"] == [
        {"index": 1, "transaction_id": "tx_12345", **head, **hour},
        {"index": 2, **head, **empty},
        {"index": 3, **head, "detail": "expected a JSON object"},
    ]


def test_batch_row_with_broken_text(app: TestApp) -> None:
    """Broken UTF-8 inside one row is that row's error."""
    good = json.dumps(TRANSACTION).encode()
    body = b'{"transactions": [' + good.replace(b"grocery", b"\xff\xfe") + b", " + good + b"]}"
    answer = post(app, "/predict/batch", body)
    assert [prediction["transaction_id"] for prediction in answer.json["predictions"]] == ["tx_12345"]
    assert answer.json["errors"] == [
        {
            "index": 0,
            "transaction_id": "tx_12345",
            "type": "about:blank",
            "title": "Bad Request",
            "status": 400,
            "detail": "malformed JSON",
        }
    ]


@pytest.mark.parametrize("half", ["\\ud800", "\\udc00", "\\ud800\\u0041", "\\\\\\ud800"])
def test_batch_row_with_half_a_surrogate_pair(app: TestApp, half: str) -> None:
    """It is that row's error; pairs, other escapes and what only looks like one stay as they are."""
    good = json.dumps(TRANSACTION)
    emoji, escaped = (good.replace("tx_12345", name) for name in ("\\ud83d\\ude00", "\\\\ud800"))
    body = f'{{"transactions": [{good.replace("grocery", half)}, {emoji}, {escaped}]}}'
    answer = post(app, "/predict/batch", body.encode()).json
    assert [prediction["transaction_id"] for prediction in answer["predictions"]] == ["\U0001f600", "\\ud800"]
    assert [(error["index"], error["status"], error["detail"]) for error in answer["errors"]] == [
        (0, 400, "malformed JSON")
    ]


def test_empty_batch(app: TestApp) -> None:
    assert post(app, "/predict/batch", {"transactions": []}).json == {"predictions": [], "errors": []}


@pytest.mark.parametrize("body", [{}, {"transactions": 1}, {"transactions": {}}, {"transactions": None}])
def test_batch_without_a_list(app: TestApp, body: object) -> None:
    assert post(app, "/predict/batch", body).json == {
        "type": "about:blank",
        "request_id": "r-1",
        "title": "Unprocessable Entity",
        "status": 422,
        "detail": "transactions: expected a list of transactions",
        "field": "transactions",
    }


def test_batch_too_long(app: TestApp) -> None:
    answer = post(app, "/predict/batch", {"transactions": [1] * 6})
    assert (answer.status_code, answer.content_type) == (413, PROBLEM)
    assert answer.json == {
        "type": "about:blank",
        "request_id": "r-1",
        "title": "Content Too Large",
        "status": 413,
        "detail": "more than 5 transactions",
    }


@pytest.mark.parametrize(("path", "most"), [("/predict", 65_536), ("/predict/batch", 4096)])
def test_body_too_large(app: TestApp, path: str, most: int) -> None:
    """One transaction may have MAX_LINE_BYTES, a batch MAX_BODY_BYTES."""
    assert post(app, path, b" " * most).status_code == 400
    answer = post(app, path, b" " * (most + 1))
    assert (answer.status_code, answer.content_type) == (413, PROBLEM)
    assert answer.json == {
        "type": "about:blank",
        "request_id": "r-1",
        "title": "Content Too Large",
        "status": 413,
        "detail": f"more than {most} bytes",
    }


class Counting:
    """A body without end that counts how much of it was read."""

    def __init__(self) -> None:
        self.read_bytes = 0

    def read(self, size: int = -1) -> bytes:
        assert size >= 0, "an unbounded read of an endless body"
        self.read_bytes += size
        return b" " * size


@pytest.mark.parametrize(("length", "read"), [(None, 65_537), ("1000000", 0)])
def test_body_is_not_read_past_the_limit(app: TestApp, length: str | None, read: int) -> None:
    """With a Content-Length over the limit nothing is read; without one, a byte more than the limit."""
    body = Counting()
    environ = create_environ(method="POST", path="/predict", headers={"Content-Type": "application/json"})
    environ |= {"wsgi.input": body, "wsgi.input_terminated": True}
    environ.pop("CONTENT_LENGTH", None)
    if length:
        environ["CONTENT_LENGTH"] = length
    statuses: list[str] = []
    b"".join(app.app(environ, lambda status, headers: statuses.append(status)))
    assert (statuses, body.read_bytes) == (["413 Content Too Large"], read)


def test_truncated_body(app: TestApp) -> None:
    """Good JSON that is less than was announced is not what the client meant to send."""
    body = json.dumps(TRANSACTION).encode()
    environ = create_environ(method="POST", path="/predict", headers={"Content-Type": "application/json"}, body=body)
    environ["CONTENT_LENGTH"] = "1000"
    statuses: list[str] = []
    answer = b"".join(app.app(environ, lambda status, headers: statuses.append(status)))
    assert statuses == ["400 Bad Request"]
    assert json.loads(answer)["detail"] == "the body is shorter than its Content-Length"


@pytest.mark.parametrize("content_type", ["text/plain", "", "application/jsonp", "application/x-www-form-urlencoded"])
def test_other_content_types(app: TestApp, content_type: str) -> None:
    answer = post(app, "/predict", TRANSACTION, content_type)
    assert (answer.status_code, answer.content_type) == (415, PROBLEM)
    assert answer.json == {
        "type": "about:blank",
        "request_id": "r-1",
        "title": "Unsupported Media Type",
        "status": 415,
        "detail": "expected application/json (or, for a stream of rows, application/x-ndjson)",
    }


@pytest.mark.parametrize("path", ["/predict", "/predict/batch"])
@pytest.mark.parametrize("content_type", ["application/json", "application/x-ndjson"])
def test_compressed_body(app: TestApp, path: str, content_type: str) -> None:
    """What a body unpacks to nobody can know before: it is to come as it is."""
    headers = {"Content-Type": content_type, "Content-Encoding": "gzip"}
    answer = app.post(path, gzip.compress(json.dumps(TRANSACTION).encode()), headers, expect_errors=True)
    assert (answer.status_code, answer.content_type) == (415, PROBLEM)
    assert answer.headers["Accept-Encoding"] == "identity"
    assert answer.json == {
        "type": "about:blank",
        "request_id": "r-1",
        "title": "Unsupported Media Type",
        "status": 415,
        "detail": "expected a body that is not compressed",
    }


def test_content_type_with_parameters(app: TestApp) -> None:
    assert post(app, "/predict", TRANSACTION, "Application/JSON; charset=utf-8").status_code == 200


# -- streams -----------------------------------------------------------------------------------------------------------

NDJSON = "application/x-ndjson"


def lines_of(answer: object) -> list[dict[str, object]]:
    assert answer.content_type == NDJSON
    assert answer.body.endswith(b"\n")
    return [json.loads(line) for line in answer.body.splitlines()]


def test_stream(app: TestApp, model: Model) -> None:
    """A line out for each line in, in order: predictions, and problems that name the line; the rest goes on."""
    other = json.dumps(TRANSACTION | {"transaction_id": "tx_2", "amount": 9000})
    bad = json.dumps(TRANSACTION | {"hour": 24})
    body = "\n".join([json.dumps(TRANSACTION), bad, "", "{", "x" * 70_000, other])  # no newline at the end
    first, *problems, last = lines_of(post(app, "/predict/batch", body.encode(), NDJSON))
    single = [post(app, "/predict", row.encode()).json for row in (json.dumps(TRANSACTION), other)]
    assert [timeless(first), timeless(last)] == [timeless(row) for row in single]
    head = {"type": "about:blank", "title": "Bad Request", "status": 400, "detail": "malformed JSON"}
    assert problems == [
        {
            "index": 1,
            "transaction_id": "tx_12345",
            "type": "about:blank",
            "title": "Unprocessable Entity",
            "status": 422,
            "detail": f"hour: expected {RULES['hour'][0]}",
            "field": "hour",
        },
        {"index": 2, **head},
        {"index": 3, **head},
        {
            "index": 4,
            "type": "about:blank",
            "title": "Content Too Large",
            "status": 413,
            "detail": "more than 65536 bytes",
        },
    ]


def test_long_stream(app: TestApp, model: Model) -> None:
    """Ten thousand lines, over many reads, beyond any limit on bodies: each in its place with its own score."""
    amounts = [number * 0.37 for number in range(10_000)]
    body = "".join(
        json.dumps(TRANSACTION | {"transaction_id": f"tx_{number}", "amount": amount}) + "\n"
        for number, amount in enumerate(amounts)
    )
    found = lines_of(post(app, "/predict/batch", body.encode(), NDJSON))
    expected = model.score([Transaction(**(TRANSACTION | {"amount": amount})) for amount in amounts])
    assert [row["transaction_id"] for row in found] == [f"tx_{number}" for number in range(10_000)]
    np.testing.assert_allclose([row["fraud_probability"] for row in found], expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("length", [0, 1, 65_535, 65_536, 65_537, 200_000, 3_000_000])
def test_line_length(app: TestApp, length: int) -> None:
    """The limit is the same wherever a line happens to be cut by reads; what follows is not lost."""
    good = json.dumps(TRANSACTION).encode() + b"\n"
    body = good * 3 + b" " * length + b"\n" + good
    found = lines_of(post(app, "/predict/batch", body, NDJSON))
    assert [row.get("status", 200) for row in found] == [200, 200, 200, 413 if length > 65_536 else 400, 200]


def test_stream_that_fails_at_once(model: Model) -> None:
    """Before the first answer it is an error like any other; nothing has been sent yet."""
    answer = post(broken(model), "/predict/batch", json.dumps(TRANSACTION).encode(), NDJSON)
    assert (answer.status_code, answer.content_type) == (500, PROBLEM)


def test_empty_stream(app: TestApp) -> None:
    assert post(app, "/predict/batch", b"", NDJSON).body == b""


def test_not_found(app: TestApp) -> None:
    answer = app.get("/nowhere", expect_errors=True)
    assert (answer.status_code, answer.content_type) == (404, PROBLEM)
    assert answer.json == {"type": "about:blank", "title": "Not Found", "status": 404, "request_id": "r-1"}


def test_method_not_allowed(app: TestApp) -> None:
    answer = app.get("/predict", expect_errors=True)
    assert (answer.status_code, answer.content_type, answer.headers["Allow"]) == (405, PROBLEM, "POST, OPTIONS")
    assert answer.json == {"type": "about:blank", "title": "Method Not Allowed", "status": 405, "request_id": "r-1"}


def sha256sum(folder: str) -> str:
    """As README says to compute it."""
    files = "find . -type f ! -path ./registered_model_meta -printf '%P\\n' | LC_ALL=C sort | xargs -d '\\n' sha256sum"
    return subprocess.check_output(f"{files} | sha256sum", shell=True, cwd=folder, text=True)[:64]


def test_health(app: TestApp, model: Model) -> None:
    body = app.get("/health").json
    assert datetime.fromisoformat(body.pop("loaded_at")) == model.loaded_at
    assert body == {
        "status": "ok",
        "model_name": "fraud-detector",
        "model_version": "v1.2.3",
        "registry_version": "1",
        "registry_uri": model.snapshot.registry_uri,
        "sha256": sha256sum(model.snapshot.path),
        "unsafe": [],
        "threshold": model.threshold,
        "review_cost": None,
        "scorer": "leaf-masks",
        "metrics": model.metadata.metrics,
        "explains": True,
    }


def broken(model: Model) -> TestApp:
    return client_of(create_app(config(), replace(model, scorer=Fixed()), Process()))


def test_live_and_ready(app: TestApp, model: Model) -> None:
    """Readiness says whether this worker can score; liveness touches nothing."""
    assert app.get("/health/live").json == app.get("/health/ready").json == {"status": "ok"}
    assert broken(model).get("/health/live").json == {"status": "ok"}
    answer = broken(model).get("/health/ready", expect_errors=True)
    assert (answer.status_code, answer.content_type) == (500, PROBLEM)
    assert answer.json == {
        "type": "about:blank",
        "request_id": "r-1",
        "title": "Internal Server Error",
        "status": 500,
    }


def test_not_ready_when_stopping(model: Model) -> None:
    stopping = bytearray(1)
    app = client_of(create_app(config(), model, Process(stopping=stopping)))
    assert app.get("/health/ready").json == {"status": "ok"}
    stopping[0] = 1
    answer = app.get("/health/ready", expect_errors=True)
    assert (answer.status_code, answer.content_type) == (503, PROBLEM)
    assert answer.json == {
        "type": "about:blank",
        "request_id": "r-1",
        "title": "Service Unavailable",
        "status": 503,
        "detail": "the service is stopping",
    }
    assert app.get("/health/live").json == {"status": "ok"}
    assert post(app, "/predict", TRANSACTION).status_code == 200


# -- keys --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def locked(model: Model) -> TestApp:
    return client_of(create_app(config(api_keys="first-key,second-key"), model, Process()))


@pytest.mark.parametrize(
    "authorization", ["Bearer first-key", "Bearer second-key", "bearer first-key", "Bearer  second-key "]
)
def test_known_key(locked: TestApp, authorization: str) -> None:
    """Any of the keys, so that they can be rotated."""
    locked.authorization = None
    headers = {"Content-Type": "application/json", "Authorization": authorization}
    assert locked.post("/predict", json.dumps(TRANSACTION), headers).status_code == 200


@pytest.mark.parametrize("path", ["/predict", "/predict/batch"])
@pytest.mark.parametrize(
    "authorization",
    [
        "",
        "Bearer",
        "Bearer ",
        "Bearer third-key",
        "Bearer first-ke",
        "Bearer first-key,second-key",
        "Basic first-key",
        "first-key",
        "Bearer first-key second-key",
        "Bearer ÿ",
    ],
)
def test_unknown_key(locked: TestApp, path: str, authorization: str) -> None:
    """401 with a challenge (RFC 6750, section 3), before anything is read, and nothing of it in the answer."""
    headers = {"Content-Type": "application/json"} | ({"Authorization": authorization} if authorization else {})
    answer = locked.post(path, json.dumps(TRANSACTION), headers, expect_errors=True)
    assert (answer.status_code, answer.content_type) == (401, PROBLEM)
    error = ', error="invalid_token"' if authorization else ""
    assert answer.headers["WWW-Authenticate"] == f'Bearer realm="fraud-api"{error}'
    assert answer.json == {
        "type": "about:blank",
        "request_id": "r-1",
        "title": "Unauthorized",
        "status": 401,
        "detail": "expected an API key as bearer token",
    }


def spellings(path: str) -> list[str]:
    """Other ways to write a path in a request line."""
    return [
        path,
        f"/{path}",
        f"//{path}",
        f"/%2f{path[1:]}",
        f"/.{path}",
        f"{path}/",
        f"{path}//",
        path.upper(),
        f"{path};x",
    ]


def status_of(app: TestApp, environ: dict[str, object]) -> str:
    statuses: list[str] = []
    b"".join(app.app(environ, lambda status, headers: statuses.append(status)))
    return statuses[0]


METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"]
OPEN = {"/", "/health", "/health/live", "/health/ready", "/metrics", "/openapi.json", "/version"}


def test_only_declared_resources_are_open(locked: TestApp) -> None:
    """Every route, in every spelling and with every method: without a key, only the declared ones do anything."""
    routes = {*locked.get("/openapi.json").json["paths"], "/"}
    assert routes > OPEN
    for route in routes:
        for path in spellings(route):
            for method in METHODS:
                environ = create_environ(path=path, method=method, headers={"Content-Type": "application/json"})
                environ["PATH_INFO"] = path.replace("%2f", "/")
                status = int(status_of(locked, environ)[:3])
                assert status in (401, 404, 405) or route in OPEN, (method, path, status)
    assert post(locked, "/predict", TRANSACTION).status_code == 401


def test_what_health_tells_without_a_key(locked: TestApp, model: Model) -> None:
    """Status, name and version: a threshold would help whoever wants to stay below it."""
    assert locked.get("/health").json == {
        "status": "ok",
        "model_name": "fraud-detector",
        "model_version": "v1.2.3",
    }
    known = locked.get("/health", headers={"Authorization": "Bearer first-key"}).json
    assert known["threshold"] == model.threshold
    for path in ("/health/live", "/health/ready"):
        assert locked.get(path).json == {"status": "ok"}


def test_every_key_is_compared(locked: TestApp, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also after one has matched: how long it takes says nothing about which it was."""
    compared = []
    monkeypatch.setattr("fraud_api.hmac.compare_digest", lambda a, b: compared.append(b) or a == b)
    headers = {"Content-Type": "application/json", "Authorization": "Bearer first-key"}
    locked.post("/predict", json.dumps(TRANSACTION), headers)
    assert len(compared) == 2


def test_unexpected_error(model: Model, caplog: pytest.LogCaptureFixture) -> None:
    """The client gets a request id and nothing else; the log has the id and where it was, and quotes no error."""
    answer = post(broken(model), "/predict", TRANSACTION)
    assert (answer.status_code, answer.content_type) == (500, PROBLEM)
    assert answer.json == {
        "type": "about:blank",
        "request_id": "r-1",
        "title": "Internal Server Error",
        "status": 500,
    }
    assert "request r-1 failed: RuntimeError\n" in caplog.text
    assert ", in on_post\n" in caplog.text
    assert "grocery_stores" not in caplog.text


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=10,
)
fields = {
    "transaction_id": st.text(max_size=130),
    "amount": st.floats(),
    "merchant_category": st.sampled_from(["grocery_stores", "travel"]) | st.text(max_size=66),
    "hour": st.integers(-1, 24) | st.floats(),
    "day_of_week": st.integers(-1, 7),
    "user_age": st.integers(-1, 131),
    "account_balance": st.floats() | st.integers(),
}
near_transactions = st.fixed_dictionaries({name: values | json_values for name, values in fields.items()})
transactions = st.fixed_dictionaries(fields)
bodies = (
    st.one_of(transactions, near_transactions, json_values).map(lambda value: json.dumps(value).encode())
    | st.binary(max_size=200)
    | st.one_of(transactions, json_values).map(lambda row: json.dumps({"transactions": [row] * 3}).encode())
)
places = st.sampled_from(
    [("/predict", "application/json"), ("/predict/batch", "application/json"), ("/predict/batch", NDJSON)]
)


@settings(max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(body=bodies, place=places)
def test_every_body_gets_a_well_formed_answer(app: TestApp, body: bytes, place: tuple[str, str]) -> None:
    """2xx or 4xx, never 5xx, whatever the body; a stream gets as many lines as it has."""
    answer = post(app, place[0], body, place[1])
    if place[1] == NDJSON:
        count = body.count(b"\n") + (not body.endswith(b"\n") and body != b"")
        assert (answer.status_code, len(answer.body.splitlines())) == (200, count)
    elif answer.status_code == 200:
        found = answer.json["predictions"] if "batch" in place[0] else [answer.json]
        assert all(0 <= prediction["fraud_probability"] <= 1 for prediction in found)
    else:
        assert answer.status_code in {400, 413, 422}
        assert answer.content_type == PROBLEM
        assert answer.json["status"] == answer.status_code


# -- explanations ------------------------------------------------------------------------------------------------------


def explained(app: TestApp, body: dict[str, object], path: str = "/predict") -> dict[str, object]:
    return post(app, f"{path}?explain=true", body).json


def test_explanation(app: TestApp, model: Model) -> None:
    """The answer is as without, and what the fields add to the base value is the probability, the largest first."""
    plain, answer = timeless(post(app, "/predict", TRANSACTION).json), timeless(explained(app, TRANSACTION))
    explanation = answer.pop("explanation")
    close = {name: pytest.approx(plain[name], abs=1e-9) for name in ("fraud_probability", "confidence")}
    assert answer == plain | close
    assert explanation.keys() == {"base_value", "contributions"}
    reference = model.metadata.reference.transaction
    assert explanation["base_value"] == pytest.approx(float(model.score([reference])[0]), abs=1e-9)
    contributions = explanation["contributions"]
    assert {each["field"] for each in contributions} == {*TRANSACTION} - {"transaction_id"}
    sizes = [abs(each["value"]) for each in contributions]
    assert sizes == sorted(sizes, reverse=True)
    total = explanation["base_value"] + sum(each["value"] for each in contributions)
    assert total == pytest.approx(answer["fraud_probability"], abs=1e-9)


def test_without(app: TestApp, model: Model) -> None:
    """The probability had the field had the reference's value, and all others stayed."""
    reference = msgspec.structs.asdict(model.metadata.reference.transaction)
    contributions = explained(app, TRANSACTION | {"amount": 900})["explanation"]["contributions"]
    for each in contributions:
        other = TRANSACTION | {"amount": 900} | {each["field"]: reference[each["field"]]}
        assert each["without"] == score(model, other)
    assert len({each["without"] for each in contributions}) > 1


def test_every_road_gives_the_same_bits(model: Model) -> None:
    """`/predict`, JSON batches of any size, streams and explanations give a row the very same probability."""
    sample = data.generate(600, 5).rows.to_dict("records")
    rows = [row | {"transaction_id": f"tx_{number}"} for number, row in enumerate(sample)]
    app = client_of(create_app(config(), model, Process()))
    single = [post(app, "/predict", row).json["fraud_probability"] for row in rows]
    assert len({*single}) > 200
    lines = "\n".join(map(json.dumps, rows)).encode()
    for size in (1, 7, 300, 600):
        found = [
            prediction["fraud_probability"]
            for start in range(0, len(rows), size)
            for prediction in post(app, "/predict/batch", {"transactions": rows[start : start + size]}).json[
                "predictions"
            ]
        ]
        assert found == single
    for query in ("", "?explain=true"):
        assert [
            row["fraud_probability"] for row in lines_of(post(app, f"/predict/batch{query}", lines, NDJSON))
        ] == single
        assert [post(app, f"/predict{query}", row).json["fraud_probability"] for row in rows[:50]] == single[:50]


def test_decision_by_expected_cost(model: Model) -> None:
    """A version with a review cost flags where probability × amount is at least that; FRAUD_THRESHOLD overrides it."""
    metadata = msgspec.structs.replace(model.metadata, threshold=None, review_cost=5.0)
    by_cost = replace(model, metadata=metadata, fixed_threshold=None, scorer=Fixed(0.05))
    app = client_of(create_app(config(), by_cost, Process()))
    found = [
        post(app, "/predict", TRANSACTION | {"amount": amount}).json["is_fraud"] for amount in (0, 4, 99, 100, 5000)
    ]
    assert found == [False, False, False, True, True]
    health = app.get("/health").json
    assert (health["threshold"], health["review_cost"]) == (None, 5.0)
    fixed = client_of(create_app(config(), replace(by_cost, fixed_threshold=0.01), Process()))
    assert post(fixed, "/predict", TRANSACTION | {"amount": 4}).json["is_fraud"]
    assert fixed.get("/health").json["review_cost"] is None


def test_shapley_values_are_those_of_the_definition(model: Model) -> None:
    """The mean, over all 720 orders in which fields can come, of what a field changes when it comes."""
    row, reference = Features(900, "jewelry", 3, 6, 20, -50), model.metadata.reference.transaction
    known = {}

    def worth(fields: frozenset[str]) -> float:
        if fields not in known:
            mixed = msgspec.structs.replace(reference, **{name: getattr(row, name) for name in fields})
            known[fields] = float(model.score([mixed])[0])
        return known[fields]

    expected = dict.fromkeys(Features.__struct_fields__, 0.0)
    for order in permutations(expected):
        for place, name in enumerate(order):
            expected[name] += (worth(frozenset(order[: place + 1])) - worth(frozenset(order[:place]))) / 720
    _, [found] = model.explain(columns_of([row]))
    assert {each.field: each.value for each in found.contributions} == pytest.approx(expected, abs=1e-9)
    assert found.contributions[0].value > 0.01


def test_explained_batches(app: TestApp, model: Model) -> None:
    """Rows of a batch and of a stream are explained as one is, also more than are explained at a time."""
    rows = [TRANSACTION | {"transaction_id": f"tx_{number}", "amount": 7.0 * number} for number in range(1250)]
    single = [timeless(explained(app, row)) for row in (rows[0], rows[-1])]
    body = "\n".join(map(json.dumps, [rows[0], {"hour": 1}, *rows[1:]])).encode()
    first, bad, *rest = lines_of(post(app, "/predict/batch?explain=true", body, NDJSON))
    for row, alone in zip((first, rest[-1]), single, strict=True):
        assert row["fraud_probability"] == pytest.approx(alone["fraud_probability"], abs=1e-9)
        found, expected = (
            {each["field"]: each["value"] for each in answer["explanation"]["contributions"]} for answer in (row, alone)
        )
        assert found == pytest.approx(expected, abs=1e-9)
    assert (bad["index"], bad["status"]) == (1, 422)
    batch = explained(app, {"transactions": rows[:5]}, "/predict/batch")
    assert [row["transaction_id"] for row in batch["predictions"]] == [row["transaction_id"] for row in rows[:5]]
    assert all(row["explanation"]["base_value"] == first["explanation"]["base_value"] for row in batch["predictions"])
    assert explained(app, {"transactions": rows[:6]}, "/predict/batch")["detail"] == "more than 5 transactions"


@pytest.mark.parametrize("query", ["explain=yes", "explain=", "explain=True", "explain"])
def test_explain_is_true_or_false(app: TestApp, query: str) -> None:
    for path in ("/predict", "/predict/batch"):
        problem = post(app, f"{path}?{query}", TRANSACTION).json
        assert (problem["status"], problem["detail"]) == (422, "explain: expected true or false")
    assert "explanation" not in post(app, "/predict?explain=false&x=1", TRANSACTION).json


def test_a_model_without_a_reference(model: Model) -> None:
    """It is served, and says that it cannot explain."""
    bare = replace(model, metadata=msgspec.structs.replace(model.metadata, reference=None))
    app = client_of(create_app(config(), bare, Process()))
    assert post(app, "/predict", TRANSACTION).status_code == 200
    assert explained(app, TRANSACTION)["detail"] == "explain: this model has no reference transaction"


# -- ids, page, version ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["", "two words", "x" * 129, "ü", '"', "a\tb"])
def test_request_ids_that_are_not_taken(app: TestApp, given: str) -> None:
    """A new one is made, other each time."""
    environ = {"HTTP_X_REQUEST_ID": given}
    made = [app.get("/health/live", extra_environ=environ).headers["X-Request-ID"] for _ in range(2)]
    assert all(re.fullmatch("[0-9a-f]{32}", request_id) for request_id in made)
    assert made[0] != made[1]


def test_request_id_is_taken(app: TestApp) -> None:
    assert app.get("/nothing", expect_errors=True).headers["X-Request-ID"] == "r-1"


def test_page(app: TestApp) -> None:
    """One file that may only run what is in it, and asks nobody but the service (W3C CSP, level 3)."""
    answer = app.get("/")
    page = answer.text
    assert answer.content_type == "text/html"
    assert not re.search(r"https?://|@import|url\(| on\w+=|style=", page)
    parts = dict(re.findall(r"<(style|script)>(.*?)</", page, re.S))
    digests = {tag: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for tag, text in parts.items()}
    assert re.findall(r'http-equiv="Content-Security-Policy" content="(.*?)"', page.replace("\n", " ")) == [
        f"default-src 'none'; style-src 'sha256-{digests['style']}'; script-src 'sha256-{digests['script']}'; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'"
    ]
    safe = {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "X-Frame-Options": "DENY"}
    assert {name: answer.headers[name] for name in safe} == safe


@pytest.mark.parametrize("path", sorted(OPEN))
def test_head_and_options(app: TestApp, path: str) -> None:
    """HEAD answers like GET without a body; OPTIONS and 405 allow the same methods (RFC 9110)."""
    get, head = app.get(path), app.head(path)
    assert (head.status_code, head.body, head.content_type) == (200, b"", get.content_type)
    allowed = app.options(path).headers["Allow"]
    assert allowed == "GET, HEAD, OPTIONS"
    assert app.post(path, expect_errors=True).headers["Allow"] == allowed


@pytest.mark.parametrize("path", ["/predict", "/predict/batch"])
def test_options_of_predict(app: TestApp, path: str) -> None:
    assert app.options(path).headers["Allow"] == app.get(path, expect_errors=True).headers["Allow"] == "POST, OPTIONS"


def test_options_without_a_key(locked: TestApp) -> None:
    answer = locked.options("/predict", expect_errors=True)
    assert (answer.status_code, "Allow" in answer.headers) == (401, False)


def test_a_stream_waits_for_its_turn(model: Model) -> None:
    """Its first answers may be refused, as any request; a stream that has begun goes on when its turn comes."""
    patience, process = config(max_wait_ms="10"), Process()
    resource = PredictBatch(patience, Predictor(patience, model, process), process)
    answers = resource.answer_stream(io.BytesIO(LINE * 100), False, {})
    begun, rest = next(answers), list[bytes]()
    with resource.turns.take():
        with pytest.raises(falcon.HTTPServiceUnavailable):
            next(resource.answer_stream(io.BytesIO(LINE * 100), False, {}))
        thread = threading.Thread(target=lambda: rest.extend(answers))
        thread.start()
        wait_until(lambda: len(resource.turns.queue) == 2, "it waits")
        with pytest.raises(falcon.HTTPServiceUnavailable), resource.turns.take():  # longer than MAX_WAIT_MS
            pass
    thread.join()
    assert (begun + b"".join(rest)).count(b'"transaction_id":"tx_12345"') == 100


def test_decisions_are_written_as_they_come(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch of any size needs half of the room in the queue of the log, and loses no line."""
    monkeypatch.setattr("fraud_api.MOST_LINES", 2000)
    waiting, written = list[dict[str, object]](), list[int]()

    def write() -> None:
        written.append(len(waiting))
        waiting.clear()

    process = Process(log_line=waiting.append, write_log=write)
    app = client_of(create_app(config(log_decisions="true"), model, process))
    post(app, "/predict/batch", {"transactions": [TRANSACTION] * 4500})
    assert (sum(written), max(written)) == (4500, 1000)


def test_http_1_1_needs_a_host(app: TestApp) -> None:
    """RFC 9112, section 3.2; HTTP/1.0 does not."""
    for protocol, expected in (("HTTP/1.1", "400 Bad Request"), ("HTTP/1.0", "200 OK")):
        environ = create_environ(path="/health/live") | {"SERVER_PROTOCOL": protocol}
        environ.pop("HTTP_HOST")
        assert status_of(app, environ) == expected


def test_connections_that_cannot_be_kept(model: Model) -> None:
    """An answer to a body that was not read, and every answer of a stopping service, ends its connection."""
    closed: list[bool] = []
    stopping = bytearray(1)
    made = create_app(
        config(api_keys="key"), model, Process(stopping=stopping, close_connection=lambda: closed.append(True))
    )
    app = client_of(made)
    keyed = {"Authorization": "Bearer key", "Content-Type": "application/json"}

    def closes(path: str, body: bytes = b"", **headers: str) -> bool:
        closed.clear()
        app.post(path, body, headers, expect_errors=True) if body else app.get(path, expect_errors=True)
        return bool(closed)

    assert not closes("/predict", json.dumps(TRANSACTION).encode(), **keyed)
    assert not closes("/predict", b"{", **keyed)
    assert not closes("/health/live")
    assert not closes("/predict")
    assert closes("/predict", b"{}", **{"Content-Type": "application/json"})
    assert closes("/predict", b"{}", **(keyed | {"Content-Type": "text/plain"}))
    assert closes("/predict", b" " * 5_000_000, **keyed)
    assert closes("/nowhere", b"{}", **keyed)
    assert closes("/health/live", b"{}", **keyed)
    stopping[0] = 1
    assert closes("/health/live")
    assert closes("/predict", json.dumps(TRANSACTION).encode(), **keyed)


def test_version(app: TestApp) -> None:
    """As Dockerflow has it; empty where no image was built."""
    assert app.get("/version").json == {"source": "", "version": "", "commit": "", "build": ""}
