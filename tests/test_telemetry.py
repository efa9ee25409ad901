"""What the service says of itself: its log, metrics over workers and their restarts, drift, OpenAPI, the page."""

import ast
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

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
from conftest import BODY, HERE, LINE, NAME, TRANSACTION, Service, client_of, config, running, wait_until
from fraud_api import create_app
from model import Features, Model, Transaction
from telemetry import KEPT, Drift, Log, Metrics, Output

PLACES = (0, 1, "master")
KEY = "k3y-of-the-tests"
BAD = TRANSACTION | {"hour": 24}


@pytest.fixture(scope="module")
def keyed(champion: str) -> Iterator[Service]:
    """A service that asks for a key."""
    with running(champion, web_concurrency="2", api_keys=KEY, model_uri=f"models:/{NAME}@champion") as service:
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
    """Who asked what and what was answered, with the trace it belongs to; no field of the transaction."""
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    _, body = ask(keyed, "/predict?explain=true&x=secret", BODY, X_Request_ID="one", traceparent=trace)
    answer = json.loads(body)
    assert line_of(keyed, "one") == {
        "level": "info",
        "logger": "request",
        "request_id": "one",
        "trace_id": "0af7651916cd43dd8448eb211c80319c",
        "method": "POST",
        "path": "/predict",
        "status": 200,
        "model_version": "v1.2.3",
        "transaction_id": "tx_12345",
        "fraud_probability": answer["fraud_probability"],
        "is_fraud": answer["is_fraud"],
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
    } | ({"detail": problem["detail"]} if "detail" in problem else {})


def test_line_of_what_is_not_understood(keyed: Service) -> None:
    """What is no HTTP is refused with an id too, and a body that breaks off has a line, though no answer."""
    before = samples(keyed)
    with keyed.connect() as connection:
        connection.sendall(b"GET /\r\n\r\n")
        head, _, body = b"".join(iter(lambda: connection.recv(2**16), b"")).partition(b"\r\n\r\n")
    request_id = re.findall(r"X-Request-ID: (\w+)", head.decode())[0]
    problem = {"type": "about:blank", "title": "Bad Request", "status": 400, "request_id": request_id}
    assert (head[:24], json.loads(body)) == (b"HTTP/1.1 400 Bad Request", problem)
    with keyed.connect() as connection:
        head = f"POST /predict HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nX-Request-ID: broken\r\n"
        connection.sendall(
            head.encode() + b"Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"
        )
        assert connection.recv(1) == b""
    wait_until(lambda: any(line["request_id"] == "broken" for line in keyed.requests), "it is logged")
    lines = {line.pop("request_id"): line for line in keyed.requests}
    assert all(lines[name].pop("time") for name in (request_id, "broken"))
    line = {"level": "info", "logger": "request"}
    assert lines[request_id] == line | {"method": "-", "path": "-", "status": 400}
    broken = {"method": "POST", "path": "/predict", "status": 499, "model_version": "v1.2.3"}
    assert lines["broken"] == line | broken
    after = samples(keyed)
    grown = {name: value - before.get(name, 0) for name, value in after.items() if value != before.get(name, 0)}
    assert {name: value for name, value in grown.items() if name[0] == "requests_total"} == {
        ("requests_total", "-", "400"): 1,
        ("requests_total", "/predict", "499"): 1,
        ("requests_total", "/metrics", "200"): 1,
    }


def test_every_line_is_json_and_keeps_secrets(keyed: Service) -> None:
    """gunicorn's and MLflow's as well; no value of a field, no key."""
    text = "\n".join(keyed.output_lines)
    assert all(json.loads(line)["time"].endswith("Z") for line in keyed.output_lines)
    assert "Listening at" in text
    for secret in (KEY, "grocery_stores", "150.5", "2500", "secret"):
        assert secret not in text


@pytest.mark.parametrize("human", [False, True])
def test_what_others_log(human: bool) -> None:
    """Libraries' warnings and tracebacks in the same format, secrets masked; plain text where people look."""
    code = f"""
import logging, pty, sys, warnings
from gunicorn.config import Config
import telemetry
sys.stdout.isatty = lambda: {human}
telemetry.Log.mask = staticmethod(lambda text: text.replace("s3cret", "***"))
log = telemetry.Log(Config())
logging.getLogger("mlflow.x").warning("mlflow s3cret \\u2028")
logging.getLogger("urllib3").debug("too much")
warnings.warn("careful s3cret")
try:
    raise RuntimeError("s3cret")
except RuntimeError:
    log.exception("it failed \\udc80")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert "s3cret" not in done.stdout
    assert "too much" not in done.stdout
    if human:
        assert re.search(r"^\d\d:\d\d:\d\d \[\d+\] \[WARNING\] mlflow \*\*\* ", done.stdout)
        assert "[ERROR] it failed ?\nTraceback (most" in done.stdout
    else:
        first, second, third = (json.loads(line) for line in done.stdout.split("\n")[:-1])
        assert (first["logger"], first["level"], first["message"]) == ("mlflow.x", "warning", "mlflow *** \u2028")
        assert "UserWarning: careful ***" in second["message"]
        assert (third["message"], third["exception"][-17:]) == ("it failed ?", "RuntimeError: ***")


def test_a_log_that_nobody_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Writing waits for nobody: what does not go into the pipe stays, up to a limit, and goes later, whole lines."""
    reader, writer = os.pipe()
    log = Log.__new__(Log)
    log.lines, log.flushed, log.metrics, log.error_log = deque(maxlen=KEPT), 0.0, Metrics(), logging.getLogger()
    with os.fdopen(writer, "w") as output:
        monkeypatch.setattr(sys, "stdout", output)
        for number in range(20_000):
            log.lines.append(b"%0100d\n" % number)
        log.flush()
        kept = len(log.lines)
        assert 9000 < kept < KEPT
        read = os.read(reader, 2**20)
        log.flush()
        read += os.read(reader, 2**20)
        assert len(log.lines) < kept
    assert [int(line) for line in read.splitlines()] == [*range(10_000, 20_000 - len(log.lines))]
    os.close(reader)


def test_messages_that_nobody_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is logged about anything else holds up nobody either; when somebody reads again, it is there again."""
    reader, writer = os.pipe()
    with os.fdopen(writer, "w") as output:
        monkeypatch.setattr(sys, "stdout", output)
        lines = [f"{number:05}" + "x" * 5000 + "\n" for number in range(40)]
        for line in lines[:20]:
            Output().write(line)
        os.set_blocking(reader, False)
        with suppress(BlockingIOError):
            while os.read(reader, 2**16):
                pass
        Output().write(lines[20])
        read = os.read(reader, 2**16)
    assert read.decode() == lines[20]
    os.close(reader)


def test_counting_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory for the metrics may be full: the line of the request comes all the same, and others are counted."""
    metrics = Metrics()
    with monkeypatch.context() as context:
        context.setattr(metrics.requests, "labels", lambda *_: 1 / 0)
        metrics.answer({}, 200)
        with pytest.raises(ZeroDivisionError):
            metrics.settle()
    metrics.answer({}, 200)
    metrics.settle()
    assert len(metrics.counted) == 2
    assert metrics.requests.labels("-", 200)._value.get() == 1


# -- metrics -----------------------------------------------------------------------------------------------------------


def samples(service: Service) -> dict[tuple[str, ...], float]:
    """Name, and values of the labels by their names: value."""
    families = text_string_to_metric_families(ask(service, "/metrics")[1].decode())
    return {
        (sample.name.removeprefix("fraud_api_"), *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in families
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
        found, files = samples(service), [path.name for path in (service.folder() / "metrics").iterdir()]
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
        ("batch_rows_sum",): 9,
        ("batch_rows_bucket", "1.0"): 0,
        ("batch_rows_bucket", "10.0"): 3,
        ("worker_restarts_total",): 2,
        ("failed_reloads_total",): 1,
        ("model_info", NAME, "v1.2.3", "treelite", model.snapshot.sha256): 1,
        ("unfamiliar_values_total", "amount"): 0,
    }
    assert {name: found[name] for name in expected} == expected
    assert sum(value for name, value in found.items() if name[0] == "score_decile_total") == 66
    assert 0 < found[("model_load_seconds",)] < 10
    assert 0 < found[("request_seconds_sum", "/predict")] < 10
    assert sorted(files) == sorted(f"{kind}_{place}.db" for kind in ("counter", "histogram") for place in PLACES)


def test_counting_from_two_sides() -> None:
    """The main loop and a scrape count what there is at the same time: all of it, once."""
    metrics, interval = Metrics(), sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor() as pool:
            for _ in range(10_000):
                metrics.answer({}, 200)
            for done in [pool.submit(metrics.settle) for _ in range(4)]:
                done.result()
    finally:
        sys.setswitchinterval(interval)
    assert metrics.requests.labels("-", 200)._value.get() == len(metrics.counted) == 10_000


def test_every_metric_is_explained(model: Model) -> None:
    """README's table has all metrics that there are and no other, each with its labels."""
    app = client_of(create_app(config(), model))
    app.post_json("/predict", TRANSACTION)
    families = text_string_to_metric_families(app.get("/metrics").text)
    names = {family.name: family.type for family in families if not family.name.endswith("_created")}
    readme = (HERE / "README.md").read_text()
    assert {*re.findall(r"^\| `(fraud_api_\w+?)(?:_total)?(?:\{[\w, ]+\})?` \|", readme, re.M)} == {*names}
    assert {name.partition("fraud_api_")[2] for name in names} == {
        *("requests", "request_seconds", "rows", "batch_rows", "score_decile", "unfamiliar_values"),
        *("score_decile_training_share", "worker_restarts", "failed_reloads", "model_info", "model_load_seconds"),
    }


def test_the_rules_are_about_what_there_is(model: Model) -> None:
    """Prometheus' rules use declared metrics and labels only, and README shows the expressions of the drift."""
    rules = (HERE / "k8s/components/monitoring/rules.yaml").read_text()
    app = client_of(create_app(config(), model))
    app.post_json("/predict", TRANSACTION)
    names = set(re.findall(r"^# TYPE (\w+)", app.get("/metrics").text, re.M))
    assert {*re.findall(r"fraud_api_\w+", rules)} <= names
    every = [rule for group in yaml.safe_load(rules)["spec"]["groups"] for rule in group["rules"]]
    recorded = {rule["record"]: " ".join(rule["expr"].split()) for rule in every if "record" in rule}
    assert {*re.findall(r"fraud_api:\w+:\w+", rules)} == {*recorded}
    readme = " ".join((HERE / "README.md").read_text().split())
    assert all(expression in readme for expression in recorded.values())


@pytest.mark.parametrize("size", [1, 700])
def test_drift(model: Model, size: int) -> None:
    """Scores by decile, unknown categories, numbers beyond those of training, one by one as many at a time."""
    metrics = Metrics()
    drift = Drift(model.metadata.reference, "v", metrics)
    sample = data.split(data.generate(20_000, 0), 0.2)[1].rows
    rows = [Features(**row) for row in sample.head(700).to_dict("records")]
    rows[5:8] = [msgspec.structs.replace(row, merchant_category="new", amount=1e9, user_age=3) for row in rows[5:8]]
    for start in range(0, 700, size):
        part = rows[start : start + size]
        drift.observe(part, model.score(part))
    found = {(s.name, *s.labels.values()): s.value for family in metrics.registry.collect() for s in family.samples}
    limits = [0, *model.metadata.reference.score_deciles, 1]
    expected, _ = np.histogram(model.score(rows), limits)
    assert [found[("fraud_api_score_decile_total", "v", str(decile))] for decile in range(1, 11)] == [*expected]
    assert np.abs(expected / 700 - model.metadata.reference.score_shares).max() < 0.06
    unfamiliar = {name[1]: value for name, value in found.items() if name[0] == "fraud_api_unfamiliar_values_total"}
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
    app = client_of(create_app(config(), served, metrics=metrics))
    metrics.drift.observe([Transaction(**TRANSACTION)] * 1000, scores)
    found = {
        (sample.name, sample.labels.get("decile")): sample.value
        for family in text_string_to_metric_families(app.get("/metrics").text)
        for sample in family.samples
    }
    for decile, share in enumerate(tied.score_shares, 1):
        assert found[("fraud_api_score_decile_training_share", str(decile))] == share
        assert found[("fraud_api_score_decile_total", str(decile))] == 1000 * share


# -- OpenAPI -----------------------------------------------------------------------------------------------------------


def test_openapi_is_valid(model: Model) -> None:
    """OpenAPI 3.1, with the rules of the schema in it, and the key only where one is asked for."""
    document = client_of(create_app(config(api_keys=KEY), model)).get("/openapi.json").json
    OpenAPIV31SpecValidator(document).validate()
    assert document["openapi"] == "3.1.0"
    hour = document["components"]["schemas"]["Transaction"]["properties"]["hour"]
    assert (hour["minimum"], hour["maximum"], hour["multipleOf"]) == (0, 23, 1)
    secured = {path for path, item in document["paths"].items() for method in item.values() if method.get("security")}
    assert secured == {"/predict", "/predict/batch"}
    free = client_of(create_app(config(), model)).get("/openapi.json").json
    assert free["paths"]["/predict"]["post"]["security"] == []
    app = create_app(config(), model)
    assert {*document["paths"]} == {path for path in document["paths"] if app._router.find(path)}


def test_the_examples_are_true(model: Model) -> None:
    """What is sent in them is answered with what is in them, but for figures and time."""
    app = client_of(create_app(config(), model))
    document = app.get("/openapi.json").json
    for path in ("/predict", "/predict?explain=true", "/predict/batch"):
        post = document["paths"][path.partition("?")[0]]["post"]
        for kind, content in post["requestBody"]["content"].items():
            [example] = content["examples"].values()
            body = example["value"] if kind.endswith("ndjson") else json.dumps(example["value"])
            answer = app.post(path, body, {"Content-Type": kind})
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

    def __init__(self, browser: webdriver.Chrome, service: Service) -> None:
        self.browser, self.service = browser, service
        browser.get(service.url)
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
    return Page(browser, keyed)


def test_page_scores(page: Page) -> None:
    """Filled in by keyboard, it shows what the API answers: decision, probability, threshold, six Shapley values."""
    page.fill("key", KEY)
    page.fill("amount", "900.5", Keys.TAB, "jewelry", Keys.TAB)
    page.fill("merchant_category", "jewelry")
    shown = page.score()
    body = json.dumps(TRANSACTION | {"amount": 900.5, "merchant_category": "jewelry"}).encode()
    answer = json.loads(ask(page.service, "/predict?explain=true", body)[1])
    percent = float(re.findall(r"raud: ([\d.e-]+) %", shown)[0])
    assert shown.startswith("Fraud: " if answer["is_fraud"] else "No fraud: ")
    assert percent == pytest.approx(100 * answer["fraud_probability"], rel=1e-3)
    rows = [row.text.split() for row in page.browser.find_elements(By.CSS_SELECTOR, "#result tr")]
    assert [row[0] for row in rows] == [each["field"].split("_")[0] for each in answer["explanation"]["contributions"]]
    assert [float(row[-1]) for row in rows] == [
        pytest.approx(each["value"], abs=6e-5) for each in answer["explanation"]["contributions"]
    ]
    health = json.loads(ask(page.service, "/health")[1])
    facts = page.text("facts")
    for fact in (health["model_name"], health["model_version"], health["sha256"], "average precision (hold-out)"):
        assert fact in facts


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
