"""The HTTP service: bytes → `Transaction` → probability → `Prediction` → bytes."""

import errno
import hmac
import json
import logging
import re
import sys
import threading
import time
import traceback
from base64 import b64encode
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from hashlib import sha256
from pathlib import Path
from random import getrandbits
from typing import Any, TypeVar, get_type_hints

import falcon
import msgspec
from msgspec import UNSET, UnsetType
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4

from config import Config
from model import COALITIONS, Explanation, Floats, Model, Snapshot, Transaction, TransactionId, load
from telemetry import RECORD, ROUTE, Drift, Metrics

log = logging.getLogger("gunicorn.error")

App = falcon.App[falcon.Request, falcon.Response]
Body = TypeVar("Body")

JSON = "application/json"
NDJSON = "application/x-ndjson"
PROBLEM = "application/problem+json"
HERE = Path(__file__).parent
INLINE = re.compile(rb"<(style|script)>(.*?)</", re.S)

# A stream is read in pieces that grow from the first size, so that the first answers come at once, to the last, about
# 6,000 rows: scikit-learn's overhead of 1.5 ms a call is then 0.25 µs a row, the memory of a stream some 5 MB.
FIRST_READ, LAST_READ = 2**10, 2**20

# Larger JSON batches are decoded and scored one at a time in a worker: a body can become 36 times as much in memory.
SMALL = 2**14

# Rows that are explained at a time: each is scored as 64 rows, which take memory.
EXPLAINED = 100

REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")

# What a body can do to a decoder: break JSON, break UTF-8, nest without end.
MALFORMED = (msgspec.DecodeError, ValueError, RecursionError)

# What `gunicorn.conf.py` sets in the master, for the workers forked from it: the snapshot to serve, a byte in shared
# memory that says whether the service is stopping, and the metrics of all of them.
snapshot: Snapshot | None = None
stopping: Sequence[int] = b"\0"
metrics: Metrics | None = None


class Prediction(msgspec.Struct, frozen=True, gc=False):
    """The answer to one transaction."""

    transaction_id: str
    is_fraud: bool
    fraud_probability: float
    confidence: float
    model_version: str
    prediction_time: datetime
    explanation: Explanation | UnsetType = UNSET


class Problem(msgspec.Struct, frozen=True, kw_only=True):
    """An error as RFC 9457 has it. `index` and `transaction_id` say which row of a batch it is about."""

    index: int | UnsetType = UNSET
    transaction_id: str | UnsetType = UNSET
    type: str = "about:blank"
    title: str
    status: int
    detail: str | UnsetType = UNSET
    field: str | UnsetType = UNSET
    request_id: str | UnsetType = UNSET


class Batch(msgspec.Struct, frozen=True):
    """The body of a batch. Rows stay raw here, so that each can fail on its own."""

    transactions: list[msgspec.Raw]


class Predictions(msgspec.Struct, frozen=True):
    """The answer to a batch: every row is in one of the two lists, in the order of the input."""

    predictions: list[Prediction]
    errors: list[Problem]


class Status(msgspec.Struct, frozen=True):
    """The answer of a probe."""

    status: str = "ok"


class Identified(msgspec.Struct, frozen=True):
    """As much of a bad row as it takes to say which one it was."""

    transaction_id: TransactionId | UnsetType = UNSET


class InvalidBody(falcon.HTTPError):
    """A body that is not what it should be: 400 if it is no JSON, else 422, with the field where there is one."""

    def __init__(self, status: int, detail: str, field: str | UnsetType = UNSET) -> None:
        super().__init__(status, description=detail)
        self.field = field


# A transaction with all its fields, each once and no other, has so many quotation marks; any other has more.
QUOTES = 2 * sum(1 if kind is float else 2 for kind in get_type_hints(Transaction).values())

encode = msgspec.json.encode
encode_lines = msgspec.json.Encoder().encode_lines
decode_transaction = msgspec.json.Decoder(Transaction).decode
decode_batch = msgspec.json.Decoder(Batch).decode
decode_fields = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode

# field: the rule in words, from the schema
_schema = msgspec.json.schema(Transaction)["$defs"]["Transaction"]["properties"]
RULES = {"transactions": "a list of transactions"} | {name: rule["description"] for name, rule in _schema.items()}


def create_app(config: Config, model: Model, stopping: Sequence[int] = b"\0", metrics: Metrics | None = None) -> App:
    """The WSGI application that serves `model`. It reads nothing but its arguments and the files beside it.

    It is not ready any longer when `stopping[0]` is true.
    """
    metrics = metrics or Metrics()
    predictor, health = Predictor(model, metrics), Health(model, stopping)
    page = HERE.joinpath("page.html").read_bytes()
    routes = {
        "/": Document(page, "text/html; charset=utf-8", {"Content-Security-Policy": policy(page)}),
        "/predict": Predict(config, predictor),
        "/predict/batch": PredictBatch(config, predictor),
        "/health": health,
        "/health/live": health,
        "/health/ready": health,
        "/metrics": Scrape(model, metrics),
        "/openapi.json": Document(openapi(config), JSON),
        "/version": Document(version(), JSON),
    }
    middleware: list[Any] = [Identification(model, {*routes})]
    if config.api_keys:
        middleware.append(Authorization(config.api_keys))
    app = falcon.App(media_type=JSON, middleware=middleware)
    for path, resource in routes.items():
        app.add_route(path, resource, suffix={"/health/live": "live", "/health/ready": "ready"}.get(path))
    app.add_error_handler(Exception, _unexpected)
    app.add_error_handler(falcon.HTTPError, _expected)
    app.add_error_handler(ConnectionResetError, partial(_hang_up, metrics))
    return app


def get_app() -> App:
    """What gunicorn calls in each worker: the application on the snapshot that the master acquired."""
    if snapshot is None:
        raise RuntimeError("start with gunicorn and gunicorn.conf.py, without --preload")
    config = Config.from_environ()
    return create_app(config, load(snapshot, config), stopping, metrics)


class Identification:
    """Gives every request an id: in the answer, in problems and in the log."""

    def __init__(self, model: Model, routes: Collection[str]) -> None:
        self.version, self.routes = model.snapshot.version, routes

    def process_request(self, req: falcon.Request, resp: falcon.Response) -> None:
        environ = req.env
        record = environ[RECORD] = {"request_id": request_id(environ.get("HTTP_X_REQUEST_ID"))}
        record["model_version"] = self.version
        environ[ROUTE] = req.path if req.path in self.routes else "-"
        resp.set_header("X-Request-ID", record["request_id"])


def request_id(given: str | None) -> str:
    """The client's own id if it is a sane one, else a new one."""
    if given is not None and REQUEST_ID.fullmatch(given):
        return given
    return f"{getrandbits(128):032x}"  # not os.urandom: it would hand the GIL over


class Authorization:
    """`/predict*` takes an API key as a bearer token (RFC 6750)."""

    def __init__(self, keys: Sequence[str]) -> None:
        self.digests = [sha256(key.encode()).digest() for key in keys]

    def process_request(self, req: falcon.Request, resp: falcon.Response) -> None:
        if req.path.startswith("/predict") and not self.known(req.auth or ""):
            error = ', error="invalid_token"' if req.auth else ""
            challenge = f'Bearer realm="fraud-api"{error}'
            raise falcon.HTTPUnauthorized(description="expected an API key as bearer token", challenges=[challenge])

    def known(self, auth: str) -> bool:
        """Compare with every key, in a time that says nothing about any."""
        scheme, _, token = auth.partition(" ")
        given = sha256(token.strip().encode()).digest()
        matches = [hmac.compare_digest(given, digest) for digest in self.digests]
        return any(matches) and scheme.lower() == "bearer"


class Predict:
    """`POST /predict`"""

    def __init__(self, config: Config, predictor: "Predictor") -> None:
        self.max_bytes, self.predictor = config.max_body_bytes, predictor

    def on_post(self, req: falcon.Request, resp: falcon.Response) -> None:
        explain = self.predictor.asked_to_explain(req)
        transaction = decode(decode_transaction, read_json(req, self.max_bytes))
        [prediction] = self.predictor([transaction], explain)
        record = req.env[RECORD]
        record["transaction_id"], record["is_fraud"] = prediction.transaction_id, prediction.is_fraud
        record["fraud_probability"] = prediction.fraud_probability
        resp.data = encode(prediction)


class PredictBatch:
    """`POST /predict/batch`: a JSON document, or a stream of JSON lines."""

    def __init__(self, config: Config, predictor: "Predictor") -> None:
        self.config, self.predictor, self.turn = config, predictor, threading.Lock()

    def on_post(self, req: falcon.Request, resp: falcon.Response) -> None:
        batch = Counted(self.predictor, self.predictor.asked_to_explain(req), req.env[RECORD])
        if media_type(req) == NDJSON:
            resp.content_type, resp.stream = NDJSON, score_stream(batch, req.stream, self.config.max_line_bytes)
            return
        body = read_json(req, self.config.max_body_bytes)
        if len(body) <= SMALL and not batch.explain:
            resp.data = self.score(batch, body)
        elif self.turn.acquire(timeout=self.config.max_wait_ms / 1000):
            try:
                resp.data = self.score(batch, body)
            finally:
                self.turn.release()
        else:
            raise falcon.HTTPServiceUnavailable(retry_after=1)

    def score(self, batch: "Counted", body: bytes) -> bytes:
        raws = decode(decode_batch, body).transactions
        most = self.config.max_batch_size // (len(COALITIONS) if batch.explain else 1)  # of rows to score
        if len(raws) > most:
            raise falcon.HTTPContentTooLarge(description=f"more than {most} transactions")
        rows = decode_rows(raws)
        predictions = batch.predict(rows)
        batch.end()
        return encode(Predictions(predictions, [row for row in rows if isinstance(row, Problem)]))


class Predictor:
    """Transactions → predictions, counted."""

    def __init__(self, model: Model, metrics: Metrics) -> None:
        self.model, self.metrics, reference = model, metrics, model.metadata.reference
        metrics.drift = Drift(reference, model.snapshot.version, metrics) if reference else None

    def asked_to_explain(self, req: falcon.Request) -> bool:
        asked = req.get_param("explain", default="false") if req.query_string else "false"
        if asked not in ("true", "false"):
            raise InvalidBody(422, "explain: expected true or false", "explain")
        if asked == "true" and self.model.metadata.reference is None:
            raise InvalidBody(422, "explain: this model has no reference transaction", "explain")
        return asked == "true"

    def __call__(self, rows: Sequence[Transaction], explain: bool = False) -> list[Prediction]:
        """Score transactions in one call, or to explain them in a few; predictions come in the same order."""
        if not rows:
            return []
        if explain:
            parts = [self.explain(rows[start : start + EXPLAINED]) for start in range(0, len(rows), EXPLAINED)]
            return [prediction for part in parts for prediction in part]
        return self.decide(rows, self.model.score(rows))

    def explain(self, rows: Sequence[Transaction]) -> list[Prediction]:
        scores, explanations = self.model.explain(rows)
        pairs = zip(self.decide(rows, scores), explanations, strict=True)
        return [msgspec.structs.replace(prediction, explanation=explanation) for prediction, explanation in pairs]

    def decide(self, rows: Sequence[Transaction], scores: Floats) -> list[Prediction]:
        now = datetime.now(UTC).replace(microsecond=0)
        version, threshold = self.model.snapshot.version, self.model.threshold
        predictions = [
            Prediction(row.transaction_id, p >= threshold, p, p if p > 0.5 else 1 - p, version, now)
            for row, p in zip(rows, scores.tolist(), strict=True)
        ]
        self.metrics.count(rows, scores, sum(prediction.is_fraud for prediction in predictions))
        return predictions


class Counted:
    """A batch or a stream, with its counts for the log and the metrics."""

    def __init__(self, predictor: Predictor, explain: bool, record: dict[str, Any]) -> None:
        self.predictor, self.explain, self.record = predictor, explain, record

    def predict(self, rows: Sequence[Transaction | Problem]) -> list[Prediction]:
        """Predictions for what could be read, in order."""
        predictions = self.predictor([row for row in rows if isinstance(row, Transaction)], self.explain)
        fraud = sum(prediction.is_fraud for prediction in predictions)
        for name, count in (("rows", len(rows)), ("fraud", fraud), ("invalid", len(rows) - len(predictions))):
            self.record[name] = self.record.get(name, 0) + count
        return predictions

    def end(self) -> None:
        self.predictor.metrics.batch_rows.observe(self.record.get("rows", 0))
        self.predictor.metrics.rows.labels("invalid").inc(self.record.get("invalid", 0))


class Health:
    """`GET /health`: what is served. `/health/live` touches nothing; `/health/ready` scores a row."""

    def __init__(self, model: Model, stopping: Sequence[int]) -> None:
        self.model, self.stopping, self.started = model, stopping, time.monotonic()

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        uptime = round(time.monotonic() - self.started, 3)
        resp.data = encode({"status": "ok", **self.model.facts(), "uptime_seconds": uptime})

    def on_get_live(self, req: falcon.Request, resp: falcon.Response) -> None:
        resp.data = encode(Status())

    def on_get_ready(self, req: falcon.Request, resp: falcon.Response) -> None:
        if self.stopping[0]:
            raise falcon.HTTPServiceUnavailable(description="the service is stopping")
        try:
            self.model.score(self.model.metadata.golden[:1])
        except Exception:
            log.exception("the model does not score")
            raise falcon.HTTPServiceUnavailable(description="this worker cannot score") from None
        resp.data = encode(Status())


class Scrape:
    """`GET /metrics`"""

    def __init__(self, model: Model, metrics: Metrics) -> None:
        self.model, self.metrics = model, metrics

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        resp.content_type, resp.data = CONTENT_TYPE_PLAIN_0_0_4, self.metrics.text(self.model)


class Document:
    """`GET /`, `/openapi.json`, `/version`: what is the same as long as the worker lives."""

    def __init__(self, body: bytes, media_type: str, headers: Mapping[str, str] | None = None) -> None:
        self.body, self.media_type = body, media_type
        self.headers = {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"} | dict(headers or {})

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        resp.content_type, resp.data = self.media_type, self.body
        resp.set_headers(self.headers)


def policy(page: bytes) -> str:
    """Let a page run its own script, have its own style and ask this service, and nothing else (W3C CSP, level 3)."""
    digests = {tag: b64encode(sha256(text).digest()).decode() for tag, text in re.findall(INLINE, page)}
    own = "; ".join(f"{tag.decode()}-src 'sha256-{digest}'" for tag, digest in digests.items())
    rest = "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    return f"default-src 'none'; {own}; {rest}"


def openapi(config: Config) -> bytes:
    """OpenAPI 3.1: paths as openapi.json has them, and the schemas that requests and answers are made with."""
    document = json.loads(HERE.joinpath("openapi.json").read_bytes())
    types = (Transaction, Batch, Prediction, Predictions, Problem, Status)
    _, schemas = msgspec.json.schema_components(types, ref_template="#/components/schemas/{name}")
    document["components"]["schemas"] = schemas
    for path in ("/predict", "/predict/batch"):
        document["paths"][path]["post"]["security"] = [{"key": []}] if config.api_keys else []
    return encode(document)


def version() -> bytes:
    """What the image build has written (https://github.com/mozilla-services/Dockerflow)."""
    with suppress(FileNotFoundError):
        return HERE.joinpath("version.json").read_bytes()
    return encode(dict.fromkeys(("source", "version", "commit", "build"), ""))


def score_stream(batch: Counted, stream: Any, longest: int) -> Iterator[bytes]:
    """JSON lines in, as they come; for each a line out, a prediction or a problem, in order, in constant memory."""
    try:
        for lines in read_lines(stream, longest):
            while lines:  # whoever reads slowly keeps no more in memory than what he has to read
                some = EXPLAINED if batch.explain else len(lines)
                part, lines[:some] = lines[:some], []
                answers = score_lines(batch, part, longest)
                del part
                yield answers
    except OSError:
        raise
    except Exception as error:
        report(batch.record, error)
        raise ConnectionResetError(errno.ECONNRESET, "a stream that failed") from None  # gunicorn closes, quietly
    finally:
        batch.end()


def score_lines(batch: Counted, lines: Sequence[bytes], longest: int) -> bytes:
    rows = decode_rows(lines, batch.record.get("rows", 0), longest)
    predictions = iter(batch.predict(rows))
    return encode_lines([row if isinstance(row, Problem) else next(predictions) for row in rows])


def read_lines(stream: Any, longest: int) -> Iterator[list[bytes]]:
    """The lines of a stream, as many at a time as have come. Of a longer line than `longest` the middle is left out."""
    rest, size = b"", FIRST_READ
    while data := read(stream, size):
        *lines, rest = (rest + data).split(b"\n")
        del data
        yield lines
        rest = rest[: longest + 1]
        size = min(2 * size, LAST_READ)
    if rest:
        yield [rest]


def read(stream: Any, size: int) -> bytes:
    """Up to `size` bytes; less only at the end of the body, which gunicorn knows (`wsgi.input_terminated`).

    A body whose chunks are broken, or whose client has gone, ends the connection: what follows on it means nothing.
    """
    try:
        return bytes(stream.read(size))
    except Exception as error:  # what gunicorn's parsers raise has no common type
        raise ConnectionResetError(errno.ECONNRESET, f"broken body: {error}") from error  # gunicorn closes, quietly


def media_type(req: falcon.Request) -> str:
    """The media type of the body, which must be sent as it is (RFC 9110, sections 8.3 and 8.4)."""
    if req.env.get("HTTP_CONTENT_ENCODING", "identity").lower() != "identity":
        raise falcon.HTTPUnsupportedMediaType(
            description="expected a body that is not compressed", headers={"Accept-Encoding": "identity"}
        )
    return (req.content_type or "").partition(";")[0].strip().lower()


def read_json(req: falcon.Request, max_bytes: int) -> bytes:
    """The body, of which no more than `max_bytes` + 1 are read, whatever its length is said to be."""
    if media_type(req) != JSON:
        raise falcon.HTTPUnsupportedMediaType(description=f"expected {JSON}")
    if (req.content_length or 0) <= max_bytes:
        body = read(req.stream, max_bytes + 1)
        if req.content_length not in (None, len(body)):
            raise InvalidBody(400, "the body is shorter than its Content-Length")
        if len(body) <= max_bytes:
            return body
    raise falcon.HTTPContentTooLarge(description=f"more than {max_bytes} bytes")


def decode(decoder: Callable[[Any], Body], body: bytes | msgspec.Raw) -> Body:
    """Decode a whole body, or raise `InvalidBody`."""
    try:
        decoded = decoder(body)
        if decoder is not decode_transaction or bytes(body).count(b'"') != QUOTES:
            each_once(body)
        return decoded
    except MALFORMED as error:
        raise invalid(error, body) from None


def each_once(body: bytes | msgspec.Raw) -> None:
    """Refuse an object that has a field twice, of which another reader may take the other (RFC 8259, section 4).

    The decoder takes the last one. What it took has fewer quotation marks than what was sent.
    """
    fields = decode_fields(body)
    if bytes(body).count(b'"') != 2 * len(fields) + sum(bytes(value).count(b'"') for value in fields.values()):
        pairs = json.loads(bytes(body), object_pairs_hook=list)
        [(name, count)] = Counter(name for name, _ in pairs).most_common(1)
        if count > 1:  # else a name has a quotation mark in it
            field = name if name in RULES else UNSET
            raise InvalidBody(422, f"{field or 'a field'}: given more than once", field)


def decode_rows(
    rows: Sequence[bytes | msgspec.Raw], first: int = 0, longest: int = sys.maxsize
) -> Sequence[Transaction | Problem]:
    """The rows of a batch, numbered from `first`, each decoded or said what is wrong with it."""
    if max(map(len, rows), default=0) <= longest and b"".join(rows).count(b'"') == QUOTES * len(rows):
        with suppress(*MALFORMED):
            return list(map(decode_transaction, rows))
    return [decode_row(row, index, longest) for index, row in enumerate(rows, first)]


def decode_row(row: bytes | msgspec.Raw, index: int, longest: int) -> Transaction | Problem:
    """A row of a batch, or what is wrong with it."""
    try:
        if len(row) > longest:
            return problem(falcon.HTTPContentTooLarge(description=f"more than {longest} bytes"), index=index)
        return decode(decode_transaction, row)
    except InvalidBody as error:
        return problem(error, index=index, transaction_id=readable_id(row))


def readable_id(row: bytes | msgspec.Raw) -> str | UnsetType:
    """The `transaction_id` of a bad row, if that much of it is good."""
    try:
        return msgspec.json.decode(row, type=Identified).transaction_id
    except MALFORMED:
        return UNSET


def invalid(error: Exception, body: bytes | msgspec.Raw) -> InvalidBody:
    """What is wrong with a body, in our own words: msgspec names the field, the schema's description is the rule."""
    try:
        if not isinstance(error, msgspec.ValidationError):
            raise error
        msgspec.json.decode(body, type=msgspec.Raw)  # to its end: the typed decoder stops at the first thing wrong
    except MALFORMED:
        return InvalidBody(400, "malformed JSON")
    found = re.search(r"`(?:\$\.)?(\w+)`$", str(error))
    if not found or found[1] not in RULES:
        return InvalidBody(422, "expected a JSON object")
    return InvalidBody(422, f"{found[1]}: expected {RULES[found[1]]}", found[1])


def problem(error: falcon.HTTPError, **more: Any) -> Problem:
    """An error as a problem, with what else is known."""
    title = falcon.code_to_http_status(error.status_code).partition(" ")[2]
    field = getattr(error, "field", UNSET)
    return Problem(title=title, status=error.status_code, detail=error.description or UNSET, field=field, **more)


def send(req: falcon.Request, resp: falcon.Response, error: falcon.HTTPError) -> None:
    """Answer with a problem (RFC 9457)."""
    resp.status = error.status
    resp.set_headers(error.headers or {})
    resp.content_type = PROBLEM
    record = req.env[RECORD]
    resp.data = encode(problem(error, request_id=record["request_id"]))
    if error.description:
        record["detail"] = error.description  # a rule, never a value


def _expected(req: falcon.Request, resp: falcon.Response, error: falcon.HTTPError, params: Any) -> None:
    """What Falcon and the handlers raise on purpose."""
    send(req, resp, error)


def _hang_up(metrics: Metrics, req: falcon.Request, resp: Any, error: ConnectionResetError, params: Any) -> None:
    """There is nobody to answer: gunicorn closes the connection. 499 says so, as it does in nginx's log."""
    metrics.answer(req.env, 499)
    raise error


def _unexpected(req: falcon.Request, resp: falcon.Response, error: Exception, params: Any) -> None:
    """A mistake of ours: details in the log, the request's id to the client."""
    report(req.env[RECORD], error)
    send(req, resp, falcon.HTTPInternalServerError())


def report(record: Mapping[str, Any], error: Exception) -> None:
    """Log what failed and where, but not the error's own words, which may quote a transaction."""
    trace = "".join(traceback.format_tb(error.__traceback__))
    log.error("request %s failed: %s\n%s", record["request_id"], type(error).__name__, trace)
