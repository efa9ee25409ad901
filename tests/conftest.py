"""Real things to test with: a trained model, an MLflow server, gunicorn processes; slow, so shared."""

import fcntl
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from config import Config, export

HERE = Path(__file__).parent.parent
BASE_ENVIRON = {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}  # a registry that nobody runs
export()  # before anything imports MLflow or NumPy

import mlflow
import pytest
from mlflow import MlflowClient
from webtest import TestApp

import fraud_api
import report
import train
import versions
from bench.tables import write_table
from chaos import Chaos
from model import Model, Snapshot, acquire, load

NAME = "fraud-detector"
TABLE = 13  # rows that `make chaos` writes
TRANSACTION = {
    "transaction_id": "tx_12345",
    "amount": 150.50,
    "merchant_category": "grocery_stores",
    "hour": 14,
    "day_of_week": 2,
    "user_age": 35,
    "account_balance": 2500.00,
}
BODY = json.dumps(TRANSACTION).encode()
LINE = BODY + b"\n"


def config(**variables: str) -> Config:
    """A configuration from these variables, given in lower case."""
    return Config.from_environ(BASE_ENVIRON | {name.upper(): value for name, value in variables.items()})


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until(condition: Callable[[], object], what: str, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s in vain until {what}"
        time.sleep(0.02)


def get(url: str) -> int:
    """The status of a GET, 0 where nobody answers."""
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


def readable(line: str) -> str:
    if not line.startswith("{"):
        return line
    fields = json.loads(line)
    return "\n".join([f"[{fields['level'].upper()}] {fields['message']}", *fields.get("exception", "").splitlines()])


class Process:
    """A program, with what it writes kept in memory."""

    def __init__(self, *command: str, environ: dict[str, str] | None = None, cwd: Path = HERE) -> None:
        self.output, self.seen, self.lines = os.memfd_create("output"), 0, []
        fcntl.fcntl(self.output, fcntl.F_SETFL, os.O_APPEND)  # else what two processes write at once may be lost
        inherited = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
        self.popen = subprocess.Popen(
            command,
            cwd=cwd,
            env=inherited | {"PYTHONDONTWRITEBYTECODE": "1", "MLFLOW_DISABLE_TELEMETRY": "true"} | (environ or {}),
            stdin=subprocess.DEVNULL,
            stdout=self.output,
            stderr=self.output,
        )
        self.pid = self.popen.pid

    @property
    def output_lines(self) -> list[str]:
        """What it has written by now; what has been seen before is not read again."""
        while data := os.pread(self.output, 2**24, self.seen):
            *lines, rest = data.split(b"\n")
            self.lines += [line.decode() for line in lines]
            self.seen += len(data) - len(rest)
            if not lines:
                break
        return self.lines

    @property
    def log(self) -> str:
        """What it has written, but for the lines of requests and decisions; of lines of JSON the level and the text."""
        lines = [line for line in self.output_lines if not re.search('"logger":"(request|decision)"', line)]
        return "".join(f"{readable(line)}\n" for line in lines)

    @property
    def requests(self) -> list[dict[str, Any]]:
        """The lines of requests."""
        return [json.loads(line) for line in self.output_lines if '"logger":"request"' in line]

    def wait_answer(self, url: str) -> None:
        """Until a GET gives 200; an error at once if the program ends before."""
        wait_until(lambda: self.popen.poll() is not None or get(url) == 200, f"{url} answers")
        assert self.popen.poll() is None, self.log

    def wait(self, seconds: float = 60) -> int:
        return self.popen.wait(seconds)

    def stop(self) -> int:
        """Ask it to end, and give its exit status."""
        if self.popen.poll() is None:
            self.popen.send_signal(signal.SIGTERM)
        try:
            return self.popen.wait(40)
        finally:
            self.popen.kill()
            os.close(self.output)


class Service(Process):
    """The service, run by the plain gunicorn command."""

    def __init__(
        self, registry: str, *words: str, python: str = sys.executable, cwd: Path = HERE, **variables: str
    ) -> None:
        environ = {"MLFLOW_TRACKING_URI": registry, "PORT": str(free_port()), "DRAIN_SECONDS": "0"}
        environ |= {name.upper(): value for name, value in variables.items()}
        self.port = int(environ["PORT"])
        self.url = f"http://{environ.get('HOST', '127.0.0.1')}:{self.port}"
        super().__init__(str(Path(python).with_name("gunicorn")), *words, environ=environ, cwd=cwd)

    def post(self, path: str, body: object) -> dict[str, object]:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=30) as answer:
            return dict(json.load(answer))

    def workers(self) -> list[int]:
        """Of the master's children those that are workers."""
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        booted = re.findall(r"Booting worker with pid: (\d+)", self.log)
        return [int(pid) for pid in children if pid in booted]

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=20)

    def memory(self, key: str = "VmRSS") -> int:
        """Kilobytes of all workers together: what they have, or with VmHWM had at most (man 5 proc)."""
        texts = [Path(f"/proc/{pid}/status").read_text() for pid in self.workers()]
        return sum(int(re.findall(rf"{key}:\s+(\d+) kB", text)[0]) for text in texts)

    def versions(self) -> list[Path]:
        """The versions in the master's folder in memory."""
        return [path for path in self.folder().iterdir() if path.name != "metrics"]

    def folder(self) -> Path:
        """The master's folder in memory, which it keeps open."""
        links = [os.readlink(link) for link in Path(f"/proc/{self.pid}/fd").iterdir()]
        return Path(next(link for link in links if "/fraud-api-" in link))


@contextmanager
def running(registry: str, *words: str, **options: str) -> Iterator[Service]:
    """A service that is ready; stopped in the end."""
    service = Service(registry, *words, **options)
    try:
        service.wait_answer(f"{service.url}/health/ready")
        if options.get("log_level", "info") == "info":
            wait_until(lambda: service.log.count("Worker ready") >= int(options.get("web_concurrency", "2")), "all are")
        yield service
    finally:
        service.stop()


NGINX = """
daemon off;
master_process off;
pid {folder}/nginx.pid;
error_log stderr;
events {{ worker_connections 1024; }}
http {{
    access_log off;
    keepalive_requests 1000000;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    upstream service {{
        server 127.0.0.1:{port};
        keepalive 32;
        keepalive_requests 1000000;
    }}
    server {{
        listen 127.0.0.1:{listen};
        location / {{
            proxy_pass http://service;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_next_upstream off;
        }}
    }}
}}
"""


@contextmanager
def behind_nginx(port: int, folder: Path) -> Iterator[int]:
    """The port of an nginx that keeps connections to the service on `port`, as an Ingress does, and never retries."""
    program = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
    if program is None:
        pytest.skip("nginx is not installed (Debian: apt-get install nginx-light)")
    listen = free_port()
    (folder / "nginx.conf").write_text(NGINX.format(folder=folder, port=port, listen=listen))
    nginx = Process(program, "-p", str(folder), "-e", "stderr", "-c", str(folder / "nginx.conf"))
    try:
        nginx.wait_answer(f"http://127.0.0.1:{listen}/health/live")
        yield listen
    finally:
        nginx.stop()


Through = Callable[[Service], AbstractContextManager[int]]


@pytest.fixture
def through(request: pytest.FixtureRequest, tmp_path: Path) -> Through:
    """The port that clients of a service use: its own, or with the parameter "nginx" that of an nginx before it."""
    if request.param == "nginx":
        return lambda service: behind_nginx(service.port, tmp_path)
    return lambda service: nullcontext(service.port)


def failure(registry: str, **variables: str) -> tuple[int, float, list[str]]:
    """Of a start that fails: exit status, seconds it took, and the lines that say why."""
    started = time.monotonic()
    service = Service(registry, **variables)
    try:
        status = service.wait()
        lines = re.findall(r"(?:CRITICAL\] |^fraud-api: )(.*)", service.log, re.M)
        return status, time.monotonic() - started, lines
    finally:
        assert "Traceback" not in service.log
        assert service.log.count("Booting worker") == 0
        service.stop()


class Registry(Process):
    """A real MLflow server on loopback; it hands out artifacts itself."""

    def __init__(self) -> None:
        self.folder, port = Path(tempfile.mkdtemp(prefix="mlflow-")), free_port()
        self.url = f"http://127.0.0.1:{port}"
        super().__init__(
            *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"),
            *("--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db"),
            *("--artifacts-destination", str(self.folder / "artifacts")),
            environ={"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},  # it would leave its queues in /dev/shm
            cwd=self.folder,
        )

    def stop(self) -> int:
        if self.popen.poll() is not None:
            print(f"the registry has ended: {self.log}", file=sys.__stderr__)
        try:
            return super().stop()
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)


REGISTRY = pytest.StashKey[Registry]()
Once = Callable[[], AbstractContextManager[None]]


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """pytest-xdist starts a process that runs tests. All of them share one registry.

    Files of tests add versions to `fraud-detector`; every other name, and every alias, is used by one file only.
    """
    if REGISTRY not in node.config.stash:
        node.config.stash[REGISTRY] = Registry()
    registry = node.config.stash[REGISTRY]
    node.workerinput |= {"registry": registry.url, "lock": str(registry.folder / "lock")}


def pytest_unconfigure(config: pytest.Config) -> None:
    if REGISTRY in config.stash:
        config.stash[REGISTRY].stop()


@pytest.fixture(scope="session")
def once(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Once:
    """A lock of all processes that run tests."""
    path = getattr(request.config, "workerinput", {}).get("lock") or tmp_path_factory.mktemp("once") / "lock"

    @contextmanager
    def once() -> Iterator[None]:
        with open(path, "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    return once


@pytest.fixture(scope="session")
def registry(request: pytest.FixtureRequest, once: Once) -> str:
    """The address of the registry; started here where pytest-xdist is not used."""
    url = getattr(request.config, "workerinput", {}).get("registry")
    if url is None:
        own = request.config.stash[REGISTRY] = Registry()
        own.wait_answer(f"{own.url}/health")
        url = own.url
    else:
        wait_until(lambda: get(f"{url}/health") == 200, "the registry answers")
    mlflow.set_tracking_uri(url)
    with once():
        versions.use_experiment(NAME, url)
    return url


def trained(registry: str, *options: str, page: bool = False) -> int:
    """Train a small model by the command line's options, and give the exit status. Its report is a page, or empty."""
    words = ["--rows", "20000", "--trees", "30", "--budget", "1", *options]
    with few_resamples() as patch:
        if not page:  # drawing takes half of the time
            patch.setattr(report, "page", lambda *_: "")
        return train.run(train.arguments(words), config(mlflow_tracking_uri=registry))


@contextmanager
def few_resamples() -> Iterator[pytest.MonkeyPatch]:
    """A fifth of the resamples: they take a third of the time of a small training."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "RESAMPLES", 20)
        yield patch


@pytest.fixture(scope="session")
def champion(registry: str, once: Once) -> str:
    """The registry, with a small model trained by the project in it: version 1, release v1.2.3, alias champion."""
    with once():
        assert trained(registry, "--release", "v1.2.3", "--if-missing") == 0
    return registry


@pytest.fixture(scope="session")
def second(champion: str, once: Once) -> str:
    """The number of another version in the registry, release v2, that scores otherwise. The alias stays."""

    def found() -> list[Any]:
        return list(MlflowClient(champion).search_model_versions(f"name='{NAME}' and tags.release='v2'"))

    with once():
        if not found():
            assert trained(champion, "--trees", "20", "--seed", "1", "--release", "v2", "--promote", "never") == 0
    return str(found()[0].version)


@pytest.fixture(scope="session")
def service(champion: str) -> Iterator[Service]:
    with running(champion, web_concurrency="2") as started:
        yield started


@pytest.fixture(scope="session")
def snapshot(champion: str, tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    """The champion's files, fetched as the service fetches them."""
    return acquire(config(mlflow_tracking_uri=champion), tmp_path_factory.mktemp("snapshot"))


@pytest.fixture(scope="session")
def model(snapshot: Snapshot) -> Model:
    return load(snapshot, config())


@pytest.fixture(scope="session")
def app(model: Model) -> TestApp:
    return client_of(
        fraud_api.create_app(config(max_batch_size="5", max_body_bytes="4096"), model, fraud_api.Process())
    )


def client_of(app: object) -> TestApp:
    """A client whose requests all have the id r-1, so that whole bodies can be compared."""
    return TestApp(app, extra_environ={"HTTP_X_REQUEST_ID": "r-1"})


# -- chaos: the tests of reliability, longer, with a table -------------------------------------------------------------


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--chaos", type=float, metavar="SECONDS", help="go on for so long with each test of reliability")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Function]) -> None:
    if config.getoption("--chaos"):
        items[:] = [item for item in items if "chaos" in item.fixturenames]
    else:
        items[:] = [item for item in items if not item.get_closest_marker("long")]


@pytest.fixture(scope="session")
def chaos(request: pytest.FixtureRequest) -> Iterator[Chaos]:
    seconds = request.config.getoption("--chaos")
    chaos = Chaos(seconds or 2)
    yield chaos
    if seconds and len(chaos.rows) == TABLE:  # not where a test failed, was left out, or did not come to its end
        write_table("chaos", chaos.table(), "k8s/README.md")
        print(f"\n{chaos.table()}", file=sys.__stderr__)
