"""The running service: real gunicorn processes, a real MLflow server, a real S3 server, all on loopback."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from http.client import HTTPConnection
from importlib.util import find_spec
from pathlib import Path

import boto3
import mlflow
import numpy as np
import pytest
from mlflow.models import ModelSignature
from mlflow.types import ColSpec, Schema
from sklearn.base import BaseEstimator, ClassifierMixin

import data
import versions
from config import LOOPBACK_ONLY
from conftest import (
    HERE,
    LINE,
    NAME,
    TRANSACTION,
    Process,
    Service,
    config,
    failure,
    free_port,
    get,
    running,
    wait_until,
)
from model import SIGNATURE, Model, ModelError, Transaction, acquire


def status_bytes(pid: int, key: str) -> int:
    """A figure from /proc/<pid>/io."""
    found = re.search(rf"^{key}: (\d+)$", Path(f"/proc/{pid}/io").read_text(), re.M)
    assert found
    return int(found[1])


def probability(model: Model, body: dict[str, object]) -> float:
    return float(model.score([Transaction(**body)])[0])


def test_predict(service: Service, model: Model) -> None:
    """The whole line: registry → gunicorn → JSON; the answer is the model's own."""
    answer = service.post("/predict", TRANSACTION)
    answer.pop("prediction_time")
    expected = probability(model, TRANSACTION)
    assert answer == {
        "transaction_id": "tx_12345",
        "is_fraud": False,
        "fraud_probability": expected,
        "confidence": 1 - expected,
        "model_version": "v1.2.3",
    }


def test_start_predict_stop(champion: str) -> None:
    """By number instead of alias; the folder in memory is there while it serves and gone after, the exit is clean.

    `gunicorn "fraud_api:get_app()"` is the same as `gunicorn`.
    """
    memory = Path(tempfile.mkdtemp(dir="/dev/shm"))
    try:
        options = {"memory_dir": str(memory), "host": "127.0.0.2", "log_level": "warning"}
        with running(champion, "fraud_api:get_app()", model_uri=f"models:/{NAME}/1", **options) as service:
            assert service.post("/predict", TRANSACTION)["model_version"] == "v1.2.3"
            assert [folder.name[:10] for folder in memory.iterdir()] == ["fraud-api-"]
            service.popen.send_signal(signal.SIGTERM)
            assert service.wait() == 0
            assert list(memory.iterdir()) == []
            assert service.log == ""
    finally:
        shutil.rmtree(memory)


def test_the_log_shows_the_configuration(service: Service) -> None:
    assert f"MODEL_URI='models:/{NAME}@champion'" in service.log
    with urllib.request.urlopen(f"{service.url}/health") as answer:
        assert f"] serving {NAME} v1.2.3, SHA-256 {json.load(answer)['sha256']}\n" in service.log
    assert "Using worker: Worker" in service.log


def test_credentials_in_the_address_stay_out_of_sight(champion: str, tmp_path: Path) -> None:
    """Nor API keys: not in the log at its most talkative, `/health`, an error, or the reason of a failed start."""
    address = champion.replace("http://", "http://user:s3cret@")
    with running(address, api_keys="s3cret-key", log_level="debug") as service:
        known = urllib.request.Request(f"{service.url}/health", headers={"Authorization": "Bearer s3cret-key"})
        with urllib.request.urlopen(known) as answer:
            health = answer.read().decode()
        assert json.loads(health)["registry_uri"] == champion
        headers = {"Content-Type": "application/json", "Authorization": "Bearer s3cret-guess"}
        wrong = urllib.request.Request(f"{service.url}/predict", json.dumps(TRANSACTION).encode(), headers)
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(wrong)
        assert refused.value.code == 401
        assert "s3cret" not in health + refused.value.read().decode() + str(refused.value.headers) + service.log
        assert "API_KEYS=['-:***']" in service.log
    options = config(mlflow_tracking_uri=address, model_uri=f"models:/{NAME}/99", mlflow_tracking_token="s3cret-too")
    with pytest.raises(ModelError) as raised:
        acquire(options, tmp_path)
    assert str(raised.value).startswith(f"models:/{NAME}/99 at {champion}: ")
    assert "s3cret" not in str(raised.value)


# -- streams -----------------------------------------------------------------------------------------------------------

STREAM = (
    b"POST /predict/batch HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/x-ndjson\r\n"
    b"Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
)


def chunk(data: bytes) -> bytes:
    return b"%X\r\n%s\r\n" % (len(data), data)


def receive(connection: socket.socket, until: bytes) -> bytes:
    """What comes, until it has that in it."""
    received = bytearray()
    while until not in received:
        data = connection.recv(2**16)
        assert data, f"closed after {bytes(received[-200:])!r}"
        received += data
    return bytes(received)


def test_first_answers_come_before_the_last_line_is_sent(service: Service) -> None:
    with service.connect() as connection:
        connection.sendall(STREAM + chunk(LINE * 10))
        first = receive(connection, b"tx_12345")
        assert first.startswith(b"HTTP/1.1 200 OK\r\n")
        connection.sendall(chunk(LINE.replace(b"tx_12345", b"the_last")) + chunk(b""))
        receive(connection, b"the_last")


def test_client_that_leaves(service: Service) -> None:
    """A stream that its client cuts off, in a chunk or between chunks, costs nobody else anything."""
    workers = service.workers()
    for cut in (STREAM + chunk(LINE * 100), STREAM + chunk(LINE * 100)[:-300], STREAM[:-4]):
        for _ in range(5):
            with service.connect() as connection:
                connection.sendall(cut)
    assert service.post("/predict", TRANSACTION)["transaction_id"] == "tx_12345"
    assert service.workers() == workers
    assert "Traceback" not in service.log


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/predict", "application/json"),
        ("/predict/batch", "application/json"),
        ("/predict/batch", "application/x-ndjson"),
        ("/predict", "application/x-ndjson"),
    ],
)
@pytest.mark.parametrize("body", [b"zz\r\n{}\r\n0\r\n\r\n", b"-1\r\n", b"5\r\n{}\r\n0\r\n\r\n"])
def test_broken_chunks(service: Service, path: str, kind: str, body: bytes) -> None:
    """A body that lies about its chunks ends its connection; what follows on it is never taken for a request."""
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: {kind}\r\nTransfer-Encoding: chunked\r\n\r\n"
    with service.connect() as connection:
        connection.sendall(head.encode() + body + b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n")
        connection.shutdown(socket.SHUT_WR)
        received = b"".join(iter(lambda: connection.recv(2**16), b""))
    assert b'"ok"' not in received
    assert b" 500 " not in received
    assert "failed" not in service.log


@pytest.fixture(scope="module")
def odd(champion: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Service, Path]]:
    """A service whose model fails for an amount of 666, and takes 5 s for one of 555; and a file that it makes then.

    A client is slow after 1 s.
    """
    begun = tmp_path_factory.mktemp("odd") / "begun"

    class Odd(ClassifierMixin, BaseEstimator):
        classes_ = np.array([0, 1])

        def predict(self, rows):
            return rows["hour"] > 12

        def predict_proba(self, rows):
            if (rows["amount"] == 666).any():
                raise RuntimeError(f"cannot score {rows}")
            if (rows["amount"] == 555).any():
                begun.touch()
                time.sleep(5)
            fraud = rows["hour"].to_numpy() / 100
            return np.column_stack([1 - fraud, fraud])

    row = data.generate(1, 0).rows.iloc[0].to_dict()
    with mlflow.start_run():
        mlflow.sklearn.log_model(
            Odd(),
            name="odd",
            registered_model_name="odd",
            signature=ModelSignature(Schema([ColSpec(kind, column) for column, kind in SIGNATURE])),
            metadata={"threshold": 0.5, "golden": [row | {"fraud_probability": row["hour"] / 100}]},
            serialization_format="cloudpickle",
            pip_requirements=[],
        )
    options = {"model_uri": "models:/odd/1", "model_allow_unsafe": "true", "web_concurrency": "1", "slow_seconds": "1"}
    with running(champion, **options) as service:
        yield service, begun


def test_error_amid_a_stream(odd: tuple[Service, Path]) -> None:
    """A model that fails when answers have gone out already: that stream is cut off, and the worker goes on."""
    service, _ = odd
    workers = service.workers()
    for _ in range(3):
        with service.connect() as connection:
            connection.sendall(STREAM + chunk(LINE * 10))
            receive(connection, b"tx_12345")
            connection.sendall(chunk(LINE.replace(b"150.5", b"666") * 90))
            rest = b"".join(iter(lambda: connection.recv(2**16), b""))
        assert b"cannot" not in rest
        assert not rest.endswith(b"0\r\n\r\n")
    assert service.post("/predict", TRANSACTION)["fraud_probability"] == 0.14
    assert service.workers() == workers
    failed = re.compile(r"request \w+ failed: RuntimeError\n  File ")
    wait_until(lambda: len(failed.findall(service.log)) == 3, "each is in the log")
    assert "grocery_stores" not in service.log


def test_a_long_computation(odd: tuple[Service, Path]) -> None:
    """A client is not slow while its batch is computed, nor while its stream waits for that."""
    service, begun = odd
    with service.connect() as stream, closing(HTTPConnection("127.0.0.1", service.port, timeout=20)) as batch:
        stream.sendall(STREAM + chunk(LINE * 10))
        receive(stream, b"tx_12345")
        body = json.dumps({"transactions": [TRANSACTION | {"amount": 555}]})
        batch.request("POST", "/predict/batch", body, {"Content-Type": "application/json"})
        wait_until(begun.exists, "it is computed")
        stream.sendall(chunk(LINE.replace(b"tx_12345", b"the_last")) + chunk(b""))
        receive(stream, b"the_last")
        answer = batch.getresponse()
        assert answer.status == 200
        assert json.load(answer)["errors"] == []


def test_memory_over_a_long_stream(champion: str) -> None:
    """300,000 lines, 45 MB: the worker needs no more memory than for the first 75,000."""
    with running(champion, web_concurrency="1") as service:

        def send(connection: socket.socket, rows: int) -> None:
            for _ in range(rows // 5000):
                connection.sendall(chunk(LINE * 5000))
            connection.sendall(chunk(b""))

        def score(rows: int) -> int:
            answers = 0
            with service.connect() as connection:
                connection.sendall(STREAM)
                sender = threading.Thread(target=send, args=(connection, rows))
                sender.start()
                while data := connection.recv(2**20):
                    answers += data.count(b"is_fraud")
                sender.join()
            return answers

        assert score(75_000) > 74_000  # an answer cut in two by a read is not counted
        before = service.memory("VmHWM")
        assert score(300_000) > 299_000
        assert service.memory("VmHWM") - before < 16 * 1024


def test_the_master_has_one_thread(service: Service) -> None:
    """What forks has nothing else running, whatever the libraries start at import."""
    assert len(list(Path(f"/proc/{service.pid}/task").iterdir())) == 1


# -- fail-fast ---------------------------------------------------------------------------------------------------------


def test_no_registry() -> None:
    """Nobody listens: one line, well before the deadline."""
    status, seconds, lines = failure("http://127.0.0.1:9", model_load_timeout="120")
    assert status == 1
    assert seconds < 60
    assert len(lines) == 1
    assert re.match(r"cannot serve models:/fraud-detector@champion at http://127.0.0.1:9: .*refused", lines[0])


@pytest.fixture
def silent_server() -> Iterator[str]:
    """Takes connections and says nothing."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def test_silent_registry(silent_server: str) -> None:
    """One deadline over everything that is asked of it."""
    status, seconds, lines = failure(silent_server, model_load_timeout="4")
    reason = "not loaded within 4 s (MODEL_LOAD_TIMEOUT)"
    assert (status, lines) == (1, [f"cannot serve models:/{NAME}@champion at {silent_server}: {reason}"])
    assert seconds < 30  # the default


def test_another_address(champion: str) -> None:
    """Without keys, gunicorn's own options do not open the service to others either."""
    status, _, lines = failure(champion, gunicorn_cmd_args="--bind 0.0.0.0:0 --reuse-port")
    assert (status, lines) == (1, [f"cannot listen on 0.0.0.0: expected {LOOPBACK_ONLY}"])


def test_missing_alias(champion: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=f"^models:/{NAME}@nobody at {champion}: .*alias nobody not found"):
        acquire(config(mlflow_tracking_uri=champion, model_uri=f"models:/{NAME}@nobody"), tmp_path)


def test_no_database(tmp_path: Path) -> None:
    """A path to no database is an error, and is not made one."""
    uri = f"sqlite:///{tmp_path}/nowhere.db"
    with pytest.raises(ModelError) as raised:
        acquire(config(mlflow_tracking_uri=uri), tmp_path)
    reason = "there is no such database; `make model` trains and registers a first model"
    assert str(raised.value) == f"models:/{NAME}@champion at {uri}: {reason}"
    assert list(tmp_path.iterdir()) == []


def test_interrupted_start(silent_server: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A start that waits for its registry ends at once, quietly, and leaves nothing."""
    starts = []
    for number in (signal.SIGTERM, signal.SIGHUP):
        memory = tmp_path_factory.mktemp("memory")
        starts.append((number, memory, Service(silent_server, memory_dir=str(memory), model_load_timeout="600")))
    for number, memory, service in starts:
        wait_until(lambda memory=memory: list(memory.iterdir()), "it has begun to load")
        service.popen.send_signal(number)
        assert (service.wait(), list(memory.iterdir())) == (128 + number, []), service.log
        assert "Traceback" not in service.log
        service.stop()


def test_bad_configuration() -> None:
    status, _, lines = failure("ftp://registry", slow_seconds="many")
    assert (status, lines) == (
        1,
        [
            "bad configuration: "
            "MLFLOW_TRACKING_URI is 'ftp://registry', expected an http://, https:// or sqlite:/// address; "
            "SLOW_SECONDS is 'many', expected a whole number from 1 to 600"
        ],
    )


# -- in memory ---------------------------------------------------------------------------------------------------------


def test_nothing_is_written_to_disk(champion: str, service: Service, tmp_path: Path) -> None:
    """Start, predictions, a bad request, a killed worker: the kernel counts no byte written to storage.

    `write_bytes` of /proc/<pid>/io counts what a process and its ended children caused to be written to a block
    device; tmpfs and sockets are not in it (man 5 proc). A write of this process shows first that the count works here,
    and `service` has read all files before, as a file's first access may write its access time.
    """
    before = status_bytes(os.getpid(), "write_bytes")
    (tmp_path / "x").write_bytes(b"x" * 9999)
    counts = status_bytes(os.getpid(), "write_bytes") > before
    if not counts:
        pytest.skip(f"{tmp_path} is on no block device: a write there is not counted")
    with running(champion, web_concurrency="2") as started:
        for _ in range(20):
            started.post("/predict", TRANSACTION)
        with pytest.raises(urllib.error.HTTPError):
            started.post("/predict", b"{")
        killed = started.workers()[0]
        os.kill(killed, signal.SIGKILL)
        wait_until(lambda: len({*started.workers()} - {killed}) == 2, "the worker is replaced")
        started.post("/predict", TRANSACTION)
        written = {pid: status_bytes(pid, "write_bytes") for pid in [started.pid, *started.workers()]}
    assert set(written.values()) == {0}


def test_s3(champion: str, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Artifacts in an S3 store that is not AWS: the service itself fetches them."""
    port = free_port()
    keys = {
        "AWS_ACCESS_KEY_ID": "key-of-the-store",
        "AWS_SECRET_ACCESS_KEY": "secret-of-the-store",
        "AWS_DEFAULT_REGION": "eu-central-1",
        "MLFLOW_S3_ENDPOINT_URL": f"http://127.0.0.1:{port}",
    }
    for name, value in keys.items():
        monkeypatch.setenv(name, value)
    store = Process(sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port))
    try:
        wait_until(lambda: get(keys["MLFLOW_S3_ENDPOINT_URL"]), "the store answers")
        boto3.client("s3", endpoint_url=keys["MLFLOW_S3_ENDPOINT_URL"]).create_bucket(
            Bucket="models", CreateBucketConfiguration={"LocationConstraint": "eu-central-1"}
        )
        experiment = mlflow.create_experiment("s3", artifact_location="s3://models/root")
        with mlflow.start_run(experiment_id=experiment):
            pipeline = mlflow.sklearn.load_model(f"models:/{NAME}/1")
            rows = data.generate(100, 0).rows
            versions.register(pipeline, rows, "in-s3", {"release": "v2"}, threshold=0.5)
        with running(
            champion, model_uri="models:/in-s3/1", **{name.lower(): value for name, value in keys.items()}
        ) as s:
            answer, log = s.post("/predict", TRANSACTION), s.log
    finally:
        requests = store.log
        store.stop()
    assert answer["fraud_probability"] == probability(model, TRANSACTION)
    assert answer["model_version"] == "v2"
    assert re.search(r"GET /models/root/\S+/model.skops", requests)
    assert "of-the-store" not in log


# -- what production installs ------------------------------------------------------------------------------------------


SERVED = [
    *("fraud_api.py", "model.py", "server.py", "telemetry.py", "config.py", "gunicorn.conf.py"),
    *("openapi.json", "page.html", "trusted_types.txt", "version.json"),
]


def test_requirements_alone_serve(champion: str, model: Model, tmp_path: Path) -> None:
    """An environment made from requirements.txt alone and the service's own files serve from an HTTP registry."""
    uv = shutil.which("uv") or str(Path(sys.executable).with_name("uv"))
    environment = tmp_path / "venv"
    subprocess.run([uv, "venv", "--quiet", "--python", sys.executable, environment], check=True)
    install = [uv, "pip", "sync", "--quiet", "--require-hashes", "--python", environment / "bin/python"]
    locked = (HERE / "requirements.txt").read_text()
    if find_spec("gunicorn_h1c") is None:  # no compiler here: `make install` has left out the parser in C as well
        locked = re.sub(r"^gunicorn-h1c==(.*\\\n)*.*\n", "", locked, flags=re.M)
    (tmp_path / "requirements.txt").write_text(locked)
    subprocess.run([*install, tmp_path / "requirements.txt"], check=True)
    names = {path.name.lower() for path in (environment / "lib").glob("python3*/site-packages/*")}
    assert names.isdisjoint({"sqlalchemy", "flask", "matplotlib", "pytest", "pyarrow"})
    assert not any(re.match(r"mlflow-\d", name) for name in names)
    for name in SERVED:
        shutil.copy(HERE / name, tmp_path)
    with running(champion, python=str(environment / "bin/python"), cwd=tmp_path) as service:
        answer = service.post("/predict", TRANSACTION)
        threads = {re.search(r"Threads:\s+(\d+)", Path(f"/proc/{service.pid}/status").read_text())[1]}
    assert answer["fraud_probability"] == probability(model, TRANSACTION)
    assert threads == {"1"}


def test_the_locks_agree() -> None:
    """What the service runs on is what it was developed and tested on; no index address is in either."""

    def pins(name: str) -> set[str]:
        text = (HERE / name).read_text()
        assert "://" not in text
        return set(re.findall(r"^\S+==\S+", text, re.M))

    assert pins("requirements.txt") <= pins("requirements-dev.txt")
    assert pins("requirements.txt")


def test_the_generator_is_what_it_says() -> None:
    """About 1 % fraud, the same for the same seed, labels that follow the true probabilities."""
    sample, again = data.generate(200_000, seed=3), data.generate(200_000, seed=3)
    labels, truth = sample.labels, sample.truth
    assert sample.rows.equals(again.rows)
    assert 0.009 < labels.mean() < 0.011
    assert abs(labels.mean() - truth.mean()) < 0.001
    risky = truth > np.quantile(truth, 0.99)
    assert abs(labels[risky].mean() - truth[risky].mean()) < 0.03
