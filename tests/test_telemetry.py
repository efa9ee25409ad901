"""What can be seen of the service: log, metrics over workers and their restarts, drift, OpenAPI, the page."""

import ast
import fcntl
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from socketserver import ThreadingMixIn
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

import msgspec
import numpy as np
import pytest
import yaml
from openapi_spec_validator import OpenAPIV31SpecValidator
from prometheus_client.parser import text_string_to_metric_families
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

import data
from chaos import Relay
from conftest import BODY, HERE, LINE, NAME, TRANSACTION, Service, client_of, config, free_port, running, wait_until
from fraud_api import Batch, Prediction, Predictions, Problem, Process, create_app
from model import Features, Model, Transaction, columns_of
from telemetry import METRICS, Metrics, Output, ScoreCounter

KEY = "k3y-of-the-tests"
BAD = TRANSACTION | {"hour": 24}


@pytest.fixture(scope="module")
def keyed(champion: str) -> Iterator[Service]:
    """A service that asks for a key."""
    with running(
        champion, web_concurrency="2", api_keys=f"tests:{KEY}", model_uri=f"models:/{NAME}@champion"
    ) as service:
        yield service


def ask(service: Service, path: str, data: bytes | None = None, **headers: str) -> tuple[int, bytes]:
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"} | headers
    request = urllib.request.Request(service.url + path, data, headers)
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def line_of(service: Service, request_id: str) -> dict[str, object]:
    """The one line of the log about a request."""
    wait_until(lambda: any(line["request_id"] == request_id for line in service.requests), "it is logged")
    [line] = [line for line in service.requests if line["request_id"] == request_id]
    assert abs(datetime.now(UTC) - datetime.fromisoformat(line.pop("time"))) < timedelta(seconds=30)
    assert 0 < line.pop("duration_ms") < 20_000
    return line


# -- the log -----------------------------------------------------------------------------------------------------------


def test_line_of_a_prediction(keyed: Service) -> None:
    """Which client asked, what was decided, by which model at which threshold; no other field of the transaction."""
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    _, body = ask(keyed, "/predict?explain=true&x=secret", BODY, X_Request_ID="one", traceparent=trace)
    answer, health = json.loads(body), json.loads(ask(keyed, "/health")[1])
    assert line_of(keyed, "one") == {
        "level": "info",
        "logger": "request",
        "request_id": "one",
        "trace_id": "0af7651916cd43dd8448eb211c80319c",
        "client": "tests",
        "method": "POST",
        "path": "/predict",
        "status": 200,
        "model_version": "v1.2.3",
        "transaction_id": "tx_12345",
        "fraud_probability": answer["fraud_probability"],
        "is_fraud": answer["is_fraud"],
        "threshold": health["threshold"],
        "model_name": NAME,
        "registry_version": health["registry_version"],
        "sha256": health["sha256"][:12],
    }


@pytest.mark.parametrize("stream", [False, True])
def test_line_of_a_batch(keyed: Service, stream: bool) -> None:
    """Counts, also of a stream, when it has ended."""
    bad = json.dumps(BAD).encode()
    if stream:
        body, kind = LINE * 3000 + bad + b"\n", "application/x-ndjson"
    else:
        body, kind = b'{"transactions": [' + b", ".join([BODY] * 3000 + [bad]) + b"]}", "application/json"
    ask(keyed, "/predict/batch", body, X_Request_ID=kind, Content_Type=kind)
    is_fraud = json.loads(ask(keyed, "/predict", BODY)[1])["is_fraud"]
    assert line_of(keyed, kind) == {
        "level": "info",
        "logger": "request",
        "request_id": kind,
        "client": "tests",
        "method": "POST",
        "path": "/predict/batch",
        "status": 200,
        "model_version": "v1.2.3",
        "rows": 3001,
        "fraud": 3000 * is_fraud,
        "invalid": 1,
    }


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [("/predict", {}, 422), ("/predict", {"Authorization": "Bearer no"}, 401), ("/nothing", {}, 404)],
)
def test_line_of_a_refusal(keyed: Service, path: str, headers: dict[str, str], status: int) -> None:
    """The rule that was broken, not by what."""
    request_id = f"refused-{status}"
    found, body = ask(keyed, path, json.dumps(BAD).encode(), X_Request_ID=request_id, traceparent="x", **headers)
    problem = json.loads(body)
    assert (found, problem["request_id"]) == (status, request_id)
    assert line_of(keyed, request_id) == {
        "level": "info",
        "logger": "request",
        "request_id": request_id,
        "method": "POST",
        "path": path,
        "status": status,
        "model_version": "v1.2.3",
    } | ({"client": "tests"} if status == 422 else {}) | ({"detail": problem["detail"]} if "detail" in problem else {})


def test_line_of_what_is_not_understood(keyed: Service) -> None:
    """What is not HTTP, and a body with broken chunks, are answered 400 with an id that is in the log."""
    before = samples(keyed)
    [head, problem] = exchange(keyed, b"GET /\r\n\r\n")
    request_id = re.findall(r"X-Request-ID: (\w+)", head)[0]
    expected = {"type": "about:blank", "title": "Bad Request", "status": 400}
    assert (head[:24], problem) == ("HTTP/1.1 400 Bad Request", expected | {"request_id": request_id})
    asked = f"POST /predict HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nX-Request-ID: broken\r\n"
    asked += "Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"
    [head, problem] = exchange(keyed, asked.encode())
    detail = {"detail": "the body is broken or incomplete"}
    assert (head[:24], problem) == ("HTTP/1.1 400 Bad Request", expected | detail | {"request_id": "broken"})
    asked_for = {request_id, "broken"}  # maybe of two workers, each of which writes its own lines
    wait_until(lambda: asked_for <= {line["request_id"] for line in keyed.requests}, "both are logged")
    lines = {line.pop("request_id"): line for line in keyed.requests}
    assert all(lines[name].pop("time") for name in (request_id, "broken"))
    assert lines["broken"].pop("duration_ms") > 0
    line = {"level": "info", "logger": "request"}
    assert lines[request_id] == line | {"method": "-", "path": "-", "status": 400}
    broken = {"method": "POST", "path": "/predict", "status": 400, "model_version": "v1.2.3", "client": "tests"}
    assert lines["broken"] == line | broken | detail
    after = samples(keyed)
    grown = {name: value - before.get(name, 0) for name, value in after.items() if value != before.get(name, 0)}
    assert {name: value for name, value in grown.items() if name[0] == "requests_total"} == {
        ("requests_total", "-", "400"): 1,
        ("requests_total", "/predict", "400"): 1,
        ("requests_total", "/metrics", "200"): 1,
    }


def exchange(service: Service, request: bytes) -> tuple[str, object]:
    """Send bytes on a connection of their own, and read head and JSON body of the answer until it is closed."""
    with service.connect() as connection:
        connection.sendall(request)
        head, _, body = b"".join(iter(lambda: connection.recv(2**16), b"")).partition(b"\r\n\r\n")
    return head.decode(), json.loads(body)


def test_every_line_is_json_and_keeps_secrets(keyed: Service) -> None:
    """gunicorn's and MLflow's as well; no value of a field, no key."""
    lines = [json.loads(line) for line in keyed.output_lines]
    assert all(line.pop("time").endswith("Z") for line in lines)
    text = repr([{name: value for name, value in line.items() if name not in ("pid", "duration_ms")} for line in lines])
    assert "Listening at" in text
    for secret in (KEY, "grocery_stores", "150.5", "secret"):
        assert secret not in text
    assert not re.search(r"\b2500\b", text)  # alone, as ids and pids may contain it


def test_what_others_log() -> None:
    """Libraries' warnings and tracebacks are lines of JSON as well, without secrets."""
    code = """
import logging, sys, warnings
from gunicorn.config import Config
import config, telemetry
telemetry.Log.mask, telemetry.Log.metrics = config.Config.from_environ().mask, telemetry.Metrics()
log = telemetry.Log(Config())
logging.getLogger("mlflow.x").warning("mlflow s3cret \\u2028")
logging.getLogger("urllib3").debug("too much")
warnings.warn("careful s3cret")
try:
    raise RuntimeError("s3cret")
except RuntimeError:
    log.exception("it failed \\udc80")
"""
    environ = os.environ | {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9", "MLFLOW_TRACKING_TOKEN": "s3cret"}
    program = [sys.executable, "-c", code]
    done = subprocess.run(program, cwd=HERE, env=environ, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert "s3cret" not in done.stdout
    assert "too much" not in done.stdout
    first, second, third = (json.loads(line) for line in done.stdout.split("\n")[:-1])
    assert (first["logger"], first["level"], first["message"]) == ("mlflow.x", "warning", "mlflow *** \u2028")
    assert "UserWarning: careful ***" in second["message"]
    assert (third["message"], third["exception"][-17:]) == ("it failed ?", "RuntimeError: ***")


SMALL_QUEUE = """
from pathlib import Path
exec(Path("gunicorn.conf.py").read_text())
telemetry.MOST_LINES = 20
"""


class Piped(Service):
    """The service with a pipe of 4 KB as standard output, and a queue of 20 lines in each process."""

    def __init__(self, registry: str, folder: Path) -> None:
        (folder / "small.py").write_text(SMALL_QUEUE)
        self.port, self.read, self.asked, (self.reader, writer) = free_port(), b"", 0, os.pipe()
        fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
        self.url = f"http://127.0.0.1:{self.port}"
        command = [str(Path(sys.executable).with_name("gunicorn")), "-c", str(folder / "small.py")]
        environ = os.environ | {"MLFLOW_TRACKING_URI": registry, "PORT": str(self.port), "DRAIN_SECONDS": "0"}
        self.popen = subprocess.Popen(command, cwd=HERE, env=environ, stdout=writer, stderr=writer)
        os.close(writer)

    def read_on(self, size: int = 2**16, pause: float = 0, until: Callable[[], bool] = lambda: False) -> None:
        """Read the log, so many bytes at a time, to its end or until something is true."""
        while not until() and (data := os.read(self.reader, size)):
            self.read += data
            time.sleep(pause)

    def ask(self, request_id: str) -> int:
        self.asked += 1
        return ask(self, "/predict", BODY, X_Request_ID=request_id)[0]

    def lines(self) -> list[dict[str, object]]:
        """Every line of the log; each has to be whole."""
        return [json.loads(line) for line in self.read.splitlines()]


@pytest.fixture
def piped(champion: str, tmp_path: Path) -> Iterator[Piped]:
    service = Piped(champion, tmp_path)
    try:
        service.read_on(until=lambda: service.read.count(b"Worker ready") == 2)
        yield service
    finally:
        service.popen.kill()
        os.close(service.reader)
        service.popen.wait()


def test_a_log_that_nobody_reads(piped: Piped) -> None:
    """Requests are answered all the same, and lost lines are counted. When it is read again, lines come again."""
    assert {piped.ask(f"unread-{number}") for number in range(200)} == {200}
    assert 100 < samples(piped)[("log_lines_lost_total",)] < 200
    reader = threading.Thread(target=piped.read_on)
    reader.start()
    wait_until(lambda: piped.ask("again") == 200 and b'"request_id":"again"' in piped.read, "lines come again")
    assert {piped.ask(f"{number}") for number in range(10)} == {200}
    lost = samples(piped)[("log_lines_lost_total",)]
    piped.popen.send_signal(signal.SIGTERM)
    assert piped.popen.wait(20) == 0
    reader.join()
    requests = [line for line in piped.lines() if line["logger"] == "request"]
    assert len(requests) + lost == piped.asked + 2  # and the two scrapes
    assert {"unread-0", "unread-1", "again", "9"} <= {line["request_id"] for line in requests}


def test_lines_are_whole(piped: Piped) -> None:
    """Lines that two workers write at the same time do not mix, however slowly they are read."""
    reader = threading.Thread(target=partial(piped.read_on, size=1000, pause=0.001))
    reader.start()
    with ThreadPoolExecutor(8) as pool:
        assert {*pool.map(piped.ask, ["x" * (1 + number % 128) for number in range(400)])} == {200}
    lost = samples(piped)[("log_lines_lost_total",)]
    piped.popen.send_signal(signal.SIGTERM)
    assert piped.popen.wait(20) == 0
    reader.join()
    found = len([line for line in piped.lines() if line["logger"] == "request"])
    assert found + lost in (piped.asked, piped.asked + 1)  # the line of the scrape may be lost after it has counted


def test_a_reader_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines are lost and counted; what is logged raises no error."""
    reader, writer = os.pipe()
    os.close(reader)
    lost: list[float] = []
    with os.fdopen(writer, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        output = Output(lambda by=1: lost.append(by), str)
        for _ in range(3):
            output.put({"a": 1})
    assert sum(lost) == 3


def test_a_stop_while_nobody_reads_the_log(piped: Piped) -> None:
    """It takes no longer than otherwise."""
    assert {piped.ask(f"unread-{number}") for number in range(100)} == {200}
    piped.popen.send_signal(signal.SIGTERM)
    assert piped.popen.wait(20) == 0


# -- metrics -----------------------------------------------------------------------------------------------------------


def samples(service: Service) -> dict[tuple[str, ...], float]:
    return parsed(ask(service, "/metrics")[1])


def parsed(text: bytes) -> dict[tuple[str, ...], float]:
    """Name, and values of the labels by their names: value."""
    return {
        (sample.name.removeprefix("fraud_api_"), *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }


def test_metrics(champion: str, model: Model) -> None:
    """Every request and row is counted once, over two workers, of which each is killed in between."""
    relay = Relay(champion)
    with running(relay.url, web_concurrency="2", mlflow_http_request_max_retries="0") as service:
        rows = b'{"transactions": [' + b", ".join([BODY, json.dumps(BAD).encode(), BODY]) + b"]}"

        def some() -> None:
            for _ in range(20):
                ask(service, "/predict", BODY)
            ask(service, "/predict", json.dumps(BAD).encode())
            ask(service, "/predict/batch", rows)
            ask(service, "/somewhere/else")
            nonlocal asked
            asked += 23
            mine = ("/predict", "/predict/batch", "/somewhere/else")  # a line comes when it has been counted
            wait_until(lambda: sum(line["path"] in mine for line in service.requests) == asked, "all are counted")

        asked = 0
        some()
        for number, pid in enumerate(service.workers(), 3):
            os.kill(pid, signal.SIGKILL)
            wait_until(lambda number=number: service.log.count("Worker ready") == number, "it is replaced")
            some()
        relay.cut()
        service.popen.send_signal(signal.SIGHUP)
        wait_until(lambda: "still serving" in service.log, "a reload has failed")
        found = samples(service)
    is_fraud = model.score([Transaction(**TRANSACTION)])[0] >= model.threshold
    expected = {
        ("requests_total", "/predict", "200"): 60,
        ("requests_total", "/predict", "422"): 3,
        ("requests_total", "/predict/batch", "200"): 3,
        ("requests_total", "-", "404"): 3,
        ("request_seconds_count", "/predict"): 63,
        ("request_seconds_bucket", "+Inf", "/predict"): 63,
        ("rows_total", "fraud" if is_fraud else "legitimate"): 66,
        ("rows_total", "legitimate" if is_fraud else "fraud"): 0,
        ("rows_total", "invalid"): 3,
        ("worker_restarts_total",): 2,
        ("failed_reloads_total",): 1,
        ("log_lines_lost_total",): 0,
        ("model_info", NAME, "v1.2.3", "leaf-masks", model.snapshot.sha256): 1,
        ("unfamiliar_values_total", "amount"): 0,
    }
    assert {name: found[name] for name in expected} == expected
    assert {name[2] for name in found if name[0] == "score_decile_total"} == {model.snapshot.number}
    assert sum(value for name, value in found.items() if name[0] == "score_decile_total") == 66
    assert 0 < found[("request_seconds_sum", "/predict")] < 10


def test_workers_of_several_versions(model: Model) -> None:
    """A worker goes on counting where one of its version has ended; the deciles of each version stay apart."""
    metrics, workers = Metrics(blocks=4), {}

    def start(name: str, version: int) -> int:
        workers[name] = metrics.free_block({0, *workers.values()}, version)
        metrics.use(workers[name], version)
        metrics.add("score_decile", version)
        metrics.add("rows", "fraud")
        return workers[name]

    assert [start("a", 1), start("b", 1), start("c", 2)] == [1, 2, 3]
    del workers["a"], workers["b"]
    assert start("d", 1) == 1
    del workers["c"]
    assert start("e", 2) == 3
    found = parsed(metrics.text(model))
    assert {name: value for name, value in found.items() if name[0] == "score_decile_total" and value} == {
        ("score_decile_total", "1", "1"): 3,
        ("score_decile_total", "2", "2"): 2,
    }
    assert found[("rows_total", "fraud")] == 5


def test_counting_in_several_threads(model: Model) -> None:
    """No request is lost between threads, nor while a scrape adds up."""
    metrics, interval = Metrics(), sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            for _ in range(4):
                pool.submit(lambda: [metrics.answered("/predict", 200, 0.003) for _ in range(1000)])
            while metrics.text(model).count(b'{route="/predict",status="200"} 4000.0') == 0:
                pass
    finally:
        sys.setswitchinterval(interval)
    found = parsed(metrics.text(model))
    buckets = {
        float(name[1]): value for name, value in found.items() if name[::2] == ("request_seconds_bucket", "/predict")
    }
    assert buckets == {limit: 4000 * (limit > 0.003) for limit in buckets}
    assert found[("request_seconds_count", "/predict")] == 4000
    assert found[("request_seconds_sum", "/predict")] == pytest.approx(12)


def test_every_metric_is_explained(model: Model) -> None:
    """`/metrics` has the declared metrics and no other, and the table in k8s/README.md has them with their labels."""
    families = [*text_string_to_metric_families(client_of(create_app(config(), model, Process())).get("/metrics").text)]
    assert {family.name.removeprefix("fraud_api_"): family.type for family in families} == {
        name: kind for name, (kind, _, _) in METRICS.items()
    }
    rows = re.findall(
        r"^\| `fraud_api_(\w+?)(?:_total)?(?:\{([\w, ]+)\})?` \|", (HERE / "k8s/README.md").read_text(), re.M
    )
    assert {name: tuple(filter(None, labels.split(", "))) for name, labels in rows} == {
        name: tuple(label for label in labels if label != "le") for name, (_, _, labels) in METRICS.items()
    }


def test_the_rules_are_about_what_there_is() -> None:
    """Prometheus' rules use declared metrics and labels only, and k8s/README.md shows the expressions of the drift."""
    rules = (HERE / "k8s/components/monitoring/rules.yaml").read_text()
    names = {f"fraud_api_{name}{'_total' * (kind == 'counter')}" for name, (kind, _, _) in METRICS.items()}
    assert {*re.findall(r"fraud_api_\w+", rules)} <= names
    labels = re.findall(r"(?:by|on|without|ignoring) \(([\w, ]*)\)", rules) + re.findall(r"\$labels\.(\w+)", rules)
    declared = {label for _, _, names in METRICS.values() for label in names}
    assert {label for found in labels for label in re.findall(r"\w+", found)} <= declared | {"instance"}
    every = [rule for group in yaml.safe_load(rules)["spec"]["groups"] for rule in group["rules"]]
    recorded = {rule["record"]: " ".join(rule["expr"].split()) for rule in every if "record" in rule}
    assert {*re.findall(r"fraud_api:\w+:\w+", rules)} == {*recorded}
    readme = " ".join((HERE / "k8s/README.md").read_text().split())
    assert all(expression in readme for expression in recorded.values())


@pytest.mark.parametrize("size", [1, 700])
def test_drift(model: Model, size: int) -> None:
    """Scores by decile, unknown categories, numbers beyond those of training, one by one as many at a time."""
    metrics = Metrics()
    metrics.use(0, 7)
    counter = ScoreCounter(model.metadata.reference, metrics)
    sample = data.split(data.generate(20_000, 0), 0.2)[1].rows
    rows = [Features(**row) for row in sample.head(700).to_dict("records")]
    rows[5:8] = [msgspec.structs.replace(row, merchant_category="new", amount=1e9, user_age=3) for row in rows[5:8]]
    for start in range(0, 700, size):
        columns = columns_of(rows[start : start + size])
        counter.count(columns, model.scorer(columns).tolist(), 0)
    found = parsed(metrics.text(model))
    limits = [0, *model.metadata.reference.score_deciles, 1]
    expected, _ = np.histogram(model.score(rows), limits)
    assert [found[("score_decile_total", str(decile), "7")] for decile in range(1, 11)] == [*expected]
    assert np.abs(expected / 700 - model.metadata.reference.score_shares).max() < 0.06
    unfamiliar = {name[1]: value for name, value in found.items() if name[0] == "unfamiliar_values_total"}
    outside = dict.fromkeys(model.metadata.reference.ranges, 0) | {"amount": 3, "user_age": 3, "merchant_category": 3}
    assert unfamiliar == outside


def test_drift_of_scores_that_tie(model: Model) -> None:
    """A model with three scores: what each decile had at training is not a tenth, and is told as it was."""
    scores = np.repeat([0.1, 0.2, 0.3], [700, 200, 100])
    tied = msgspec.structs.replace(
        data.reference(data.generate(1000, 0), scores), transaction=model.metadata.reference.transaction
    )
    assert tied.score_shares == [0.7, 0, 0, 0, 0, 0, 0, 0.2, 0, 0.1]
    served = replace(model, metadata=msgspec.structs.replace(model.metadata, reference=tied))
    metrics = Metrics()
    metrics.use(0, int(model.snapshot.number))
    ScoreCounter(tied, metrics).count(columns_of([Transaction(**TRANSACTION)] * 1000), scores.tolist(), 0)
    found = parsed(metrics.text(served))
    for decile, share in enumerate(tied.score_shares, 1):
        assert found[("score_decile_training_share", str(decile), model.snapshot.number)] == share
        assert found[("score_decile_total", str(decile), model.snapshot.number)] == 1000 * share


# -- OpenAPI -----------------------------------------------------------------------------------------------------------


def test_openapi(model: Model) -> None:
    """OpenAPI 3.1 with all paths, and the schemas that requests and answers are made with."""
    app = create_app(config(api_keys=KEY), model, Process())
    document = client_of(app).get("/openapi.json").json
    OpenAPIV31SpecValidator(document).validate()
    assert {*document["paths"]} == {path for path in document["paths"] if app._router.find(path)}
    secured = {path for path, item in document["paths"].items() for method in item.values() if method.get("security")}
    assert secured == {"/predict", "/predict/batch", "/health"}
    types = (Transaction, Batch, Prediction, Predictions, Problem)
    _, schemas = msgspec.json.schema_components(types, ref_template="#/components/schemas/{name}")
    written = document["components"]["schemas"]
    for name, schema in schemas.items():
        own = {key: value for key, value in schema.items() if key not in ("title", "description")}
        assert {key: value for key, value in written[name].items() if key != "description"} == own
    health = client_of(app).get("/health", headers={"Authorization": f"Bearer {KEY}"}).json
    assert {*written["Health"]["properties"]} == {*health}
    assert {*written["Health"]["required"]} == {*client_of(app).get("/health").json}


def test_the_examples_are_true(model: Model) -> None:
    """What is sent in them is answered with what is in them, but for figures and time."""
    app = client_of(create_app(config(api_keys=KEY), model, Process()))
    document = app.get("/openapi.json").json
    known = {"Authorization": f"Bearer {KEY}"}
    told = document["paths"]["/health"]["get"]["responses"]["200"]["content"]["application/json"]["examples"]
    assert {*app.get("/health", headers=known).json} == {*told["with a key"]["value"]}
    assert {*app.get("/health").json} == {*told["without a key"]["value"]}
    for path in ("/predict", "/predict?explain=true", "/predict/batch"):
        post = document["paths"][path.partition("?")[0]]["post"]
        for kind, content in post["requestBody"]["content"].items():
            [example] = content["examples"].values()
            body = example["value"] if kind.endswith("ndjson") else json.dumps(example["value"])
            answer = app.post(path, body, {"Content-Type": kind} | known)
            assert answer.status_code == 200
            if not kind.endswith("ndjson"):
                shown = post["responses"]["200"]["content"][kind]["examples"]
                name = {"/predict": "plain", "/predict?explain=true": "explained"}.get(path, "one")
                assert shapes(answer.json) == shapes(shown[name]["value"])


def shapes(value: object) -> object:
    """The names and kinds of what is in a document."""
    if isinstance(value, dict):
        return {name: shapes(inner) for name, inner in value.items()}
    return [shapes(inner) for inner in value] if isinstance(value, list) else type(value)


NDJSON = """
import schemathesis


@schemathesis.serializer("application/x-ndjson")
def lines(ctx, value):
    return value if isinstance(value, bytes) else str(value).encode(errors="replace")
"""


def test_schemathesis(keyed: Service, tmp_path: Path) -> None:
    """What OpenAPI promises is what happens, to requests that keep its rules and to those that break them."""
    (tmp_path / "ndjson.py").write_text(NDJSON)
    program = [Path(sys.executable).with_name("schemathesis"), "--no-color", "run", f"{keyed.url}/openapi.json"]
    options = ["--checks=all", "--max-examples=50", "--seed=1", "--phases=examples,coverage,fuzzing"]
    environ = os.environ | {"PYTHONPATH": str(tmp_path), "SCHEMATHESIS_HOOKS": "ndjson"}
    command = [*program, *options, f"--header=Authorization: Bearer {KEY}"]
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    assert int(re.findall(r"(\d+) generated", done.stdout)[0]) > 200


# -- the page ----------------------------------------------------------------------------------------------------------

CONTRAST = """
const light = color => {
  const parts = color.match(/[\\d.]+/g).slice(0, 3).map(part => part / 255);
  const [r, g, b] = parts.map(part => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
return [...document.querySelectorAll("p, a, dt, dd, span, th, td, button, input, h1, h2, caption")].map(element => {
  const style = getComputedStyle(element), own = style.backgroundColor;
  const back = own === "rgba(0, 0, 0, 0)" ? getComputedStyle(document.body).backgroundColor : own;
  const [dark, bright] = [light(style.color), light(back)].sort((a, b) => a - b);
  return (bright + 0.05) / (dark + 0.05);
});
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[webdriver.Chrome]:
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("no chromium and chromedriver here; on Debian: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1300,1000"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    started = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield started
    started.quit()


class Page:
    """The page in a browser, by what a person does on it."""

    def __init__(self, browser: webdriver.Chrome, url: str, service: Service | None = None) -> None:
        self.browser, self.service = browser, service
        browser.get(url)
        self.wait(lambda: browser.find_elements(By.ID, "transaction_id"))

    def wait(self, condition: Callable[[], object]) -> None:
        WebDriverWait(self.browser, 10, poll_frequency=0.02).until(lambda _: condition())

    def fill(self, name: str, text: str, *keys: str) -> None:
        field = self.browser.find_element(By.ID, name)
        field.clear()
        field.send_keys(text, *keys)

    def text(self, name: str) -> str:
        return self.browser.find_element(By.ID, name).get_property("textContent")

    def score(self) -> str:
        """Press Enter in the last field and read the answer."""
        self.browser.execute_script("document.getElementById('result').replaceChildren()")
        self.browser.find_element(By.ID, "key").send_keys(Keys.ENTER)
        self.wait(lambda: self.text("result"))
        return self.text("result")


@pytest.fixture
def page(browser: webdriver.Chrome, keyed: Service) -> Page:
    return Page(browser, keyed.url, keyed)


def test_page_scores(page: Page) -> None:
    """Filled in by keyboard, it shows what the API answers: decision, probability, and why, field by field."""
    page.fill("key", KEY)
    page.fill("amount", "900.5", Keys.TAB, "jewelry", Keys.TAB)
    page.fill("merchant_category", "jewelry")
    shown = page.score()
    body = json.dumps(TRANSACTION | {"amount": 900.5, "merchant_category": "jewelry"}).encode()
    answer = json.loads(ask(page.service, "/predict?explain=true", body)[1])
    percent = float(re.findall(r"raud: ([\d.e-]+) %", shown)[0])
    assert shown.startswith("Fraud: " if answer["is_fraud"] else "No fraud: ")
    assert percent == pytest.approx(100 * answer["fraud_probability"], rel=1e-3)
    found = [
        page.browser.execute_script(CELLS, row) for row in page.browser.find_elements(By.CSS_SELECTOR, "#result tr")
    ]
    expected = answer["explanation"]["contributions"]
    names = [each["field"].replace("_", " ") for each in expected]
    assert [name for name, *_ in found] == names
    assert [without.partition(" % ")[2] for _, _, without, _ in found] == [f"with a usual {name}" for name in names]
    assert [float(without.split()[2]) for _, _, without, _ in found] == [
        pytest.approx(100 * each["without"], rel=1e-3) for each in expected
    ]
    assert [float(value) for *_, value in found] == [pytest.approx(each["value"], abs=6e-5) for each in expected]


CELLS = "return [...arguments[0].children].map(cell => cell.textContent)"


def test_page_shows_what_is_served(page: Page) -> None:
    """Without a key its name and version; with one, as soon as it is entered, all that `/health` tells then."""
    page.wait(lambda: page.text("facts"))
    assert page.text("facts") == f"name{NAME}versionv1.2.3moreenter an API key"
    page.fill("key", KEY, Keys.TAB)
    page.wait(lambda: "scorer" in page.text("facts"))
    health = json.loads(ask(page.service, "/health")[1])
    facts = page.text("facts")
    for fact in (NAME, "v1.2.3", health["sha256"], "scorerleaf-masks", "average precision (hold-out)"):
        assert fact in facts
    assert f"decisionfixed threshold {health['threshold']:.4g}" in facts
    page.browser.find_element(By.ID, "key").send_keys("-wrong", Keys.TAB)
    page.wait(lambda: page.text("facts").endswith("enter an API key"))


class Threaded(ThreadingMixIn, WSGIServer):
    """Browsers open connections before they need them."""

    daemon_threads = True


def terminated(app: Callable[..., object]) -> Callable[..., object]:
    """The application behind a server whose input does not end with the body."""

    def call(environ: dict[str, object], start_response: object) -> object:
        body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        return app(environ | {"wsgi.input": io.BytesIO(body)}, start_response)

    return call


class Quiet(WSGIRequestHandler):
    def log_message(self, *_: object) -> None:
        """Nothing."""


def test_page_of_a_version_that_decides_by_expected_cost(browser: webdriver.Chrome, model: Model) -> None:
    """The review cost in place of a threshold, and the threshold that follows from it for the amount."""
    metadata = msgspec.structs.replace(model.metadata, threshold=None, review_cost=5.0)
    app = create_app(config(), replace(model, metadata=metadata), Process())
    with make_server("127.0.0.1", 0, terminated(app), Threaded, Quiet) as server:
        threading.Thread(target=server.serve_forever).start()
        try:
            page = Page(browser, f"http://127.0.0.1:{server.server_port}")
            shown = page.score()
        finally:
            server.shutdown()
    policy = "flagged by expected cost, review cost 5.00"
    assert f"decision{policy}scorer" in page.text("facts")
    assert f"Decision: {policy} (at this amount from 3.322 %, the mark), v1.2.3" in shown


def test_page_snippets(page: Page) -> None:
    """What is shown for curl and Python does the same, and has no key in it."""
    page.fill("key", KEY)
    page.fill("merchant_category", 'it\'s "quoted"')
    expected = json.loads(
        ask(page.service, "/predict", json.dumps(TRANSACTION | {"merchant_category": "x"}).encode())[1]
    )
    for name, program in (("curl", ["bash", "-c"]), ("python", [sys.executable, "-c"])):
        text = page.text(name)
        assert KEY not in text
        run = subprocess.run(
            [*program, text], capture_output=True, text=True, env=os.environ | {"API_KEY": KEY}, check=True
        )
        answer = json.loads(run.stdout) if name == "curl" else ast.literal_eval(run.stdout)
        assert answer["fraud_probability"] == pytest.approx(expected["fraud_probability"], abs=1e-9)
        assert answer["explanation"]


def test_page_problems(page: Page) -> None:
    """A refused key and a broken rule are said; the field at fault is marked and has the focus; the key stays."""
    assert page.score().startswith("401 Unauthorized: expected an API key")
    page.fill("key", KEY)
    page.fill("hour", "24")
    assert page.score() == "422 Unprocessable Entity: hour: expected an hour, a whole number from 0 to 23"
    active = page.browser.switch_to.active_element
    assert (active.get_attribute("id"), active.get_attribute("aria-invalid")) == ("hour", "true")
    page.fill("hour", "14")
    assert "raud: " in page.score()
    assert page.browser.find_element(By.ID, "hour").get_attribute("aria-invalid") is None
    storage = "return JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie, location.href])"
    assert KEY not in page.browser.execute_script(storage)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1300])
def test_page_is_for_everybody(page: Page, scheme: str, width: int) -> None:
    """Fields have labels, text has contrast (WCAG 2.2, 1.4.3), nothing is cut off, no error, nobody else is asked."""
    browser = page.browser
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )
    device = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", device)
    page.fill("key", KEY)
    page.score()
    assert min(browser.execute_script(CONTRAST)) >= 4.5
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert browser.execute_script("return [...document.querySelectorAll('input')].every(each => each.labels.length)")
    asked = browser.execute_script("return performance.getEntriesByType('resource').map(each => each.name)")
    assert {url.partition("?")[0] for url in asked} == {
        f"{page.service.url}/{path}" for path in ("health", "openapi.json", "predict")
    }
    assert [
        entry for entry in browser.get_log("browser") if "401" not in entry["message"] and "422" not in entry["message"]
    ] == []
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
