"""A new version is verified before any worker is touched, takes over one by one, and loses no request."""

import os
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import mlflow
import pytest
from mlflow import MlflowClient
from sklearn.pipeline import Pipeline

from chaos import Chaos, Load, Relay
from conftest import NAME, TRANSACTION, Service, Through, running, wait_until

ALIAS = "rolling"
URI = f"models:/{NAME}@{ALIAS}"


@pytest.fixture
def promote(champion: str, second: str) -> Iterator[Callable[[str], None]]:
    """Moves the alias that these tests serve to a version, by its number or release; it begins at version 1."""
    client, numbers = MlflowClient(champion), {"v1.2.3": "1", "v2": second}

    def promote(version: str) -> None:
        client.set_registered_model_alias(NAME, ALIAS, numbers.get(version, version))

    promote("1")
    yield promote
    client.delete_registered_model_alias(NAME, ALIAS)


class Hanging(Pipeline):  # type: ignore[misc]
    """Loads in the process that verifies it, whose memory is bounded, and hangs in a worker."""

    def __reduce__(self) -> tuple[object, ...]:
        limit = f"__import__('resource').getrlimit({resource.RLIMIT_DATA})[0]"
        wait = f"{limit} == -1 and __import__('time').sleep(3600)"
        return eval, (f"{wait} or model", {"model": Pipeline(self.steps)})


@pytest.fixture(scope="module")
def pickled(champion: str) -> str:
    """The number of a version of the same model that is a pickle."""
    return as_pickle(mlflow.sklearn.load_model(f"models:/{NAME}/1"))


def as_pickle(estimator: Pipeline) -> str:
    metadata = mlflow.models.get_model_info(f"models:/{NAME}/1")
    with mlflow.start_run():
        logged = mlflow.sklearn.log_model(
            estimator,
            name="pickled",
            registered_model_name=NAME,
            signature=metadata.signature,
            metadata=metadata.metadata,
            serialization_format="cloudpickle",
            pip_requirements=[],
        )
    return str(logged.registered_model_version)


def announced(service: Service, version: str, times: int) -> Callable[[], bool]:
    return lambda: service.log.count(f"] serving {NAME} {version}, ") == times


def probability(service: Service) -> float:
    return float(service.post("/predict", TRANSACTION)["fraud_probability"])


@pytest.mark.parametrize(
    ("how", "through"),
    [
        ("SIGHUP", "direct"),
        ("polling", "nginx"),
        pytest.param("polling", "direct", marks=pytest.mark.long),
        pytest.param("SIGHUP", "nginx", marks=pytest.mark.long),
    ],
    indirect=["through"],
)
def test_forward_and_back_under_load(
    champion: str, promote: Callable[[str], None], through: Through, chaos: Chaos, how: str
) -> None:
    """No request is lost, though clients keep connections and never retry. A worker says `Connection: close` first.

    After a switch is announced, only the new version answers.
    """
    options = {"model_uri": URI, "web_concurrency": "2", "model_poll_seconds": "1" if how == "polling" else "0"}
    with running(champion, **options) as service, through(service) as port:
        scores, switches = {"v1.2.3": probability(service)}, [(time.monotonic(), "v1.2.3")]
        with Load(port, TRANSACTION, clients=8, paced=8) as load:
            enough = 50_000 if port != service.port else 0
            for number in chaos.rounds(f"rolls by {how}, port {port}", lambda: len(load.answers) >= enough):
                version = ["v2", "v1.2.3"][number % 2]
                load.wait_for(200)
                promote(version)
                if how == "SIGHUP":
                    service.popen.send_signal(signal.SIGHUP)
                wait_until(announced(service, version, 1 + (number + 1) // 2), f"{version} is announced")
                switches.append((time.monotonic(), version))
                scores.setdefault(version, probability(service))
                load.wait_for(200)
        assert len(service.versions()) == 1
        assert service.log.count("Traceback") == 0
        for roll in service.log.split("verified, replacing workers for")[1:]:
            assert roll.index("Worker ready") < roll.index("Worker exiting")
    assert load.lost == []
    assert load.dropped == 0
    assert len({*scores.values()}) == len(scores)
    for answer in load.answers:
        last, version = max(switch for switch in switches if switch[0] <= answer.started or switch == switches[0])
        following = [name for when, name in switches if when > last][:1]
        assert answer.model in [(name, scores[name]) for name in (version, *following)], answer
    where = "through nginx" if port != service.port else "on kept connections"
    chaos.report(f"{len(switches) - 1} rolls by {how} under load, {where}", f"{len(load.answers):,} requests", "0")


def test_what_is_wrong_with_a_version_stops_nothing(
    champion: str, second: str, pickled: str, promote: Callable[[str], None]
) -> None:
    """A version that is no good, no alias, no registry, a silent registry: one error each, and no worker is touched."""
    relay, client = Relay(champion), MlflowClient(champion)
    patience = {"mlflow_http_request_max_retries": "0", "mlflow_http_request_timeout": "5"}
    with running(relay.url, model_uri=URI, **patience) as service:
        workers = service.workers()
        errors = []

        def refused() -> str:
            service.popen.send_signal(signal.SIGHUP)
            wait_until(lambda: service.log.count("[ERROR] still serving v1.2.3, not ") > len(errors), "it is refused")
            errors.append(service.log.rpartition("[ERROR] ")[2].splitlines()[0])
            assert service.post("/predict", TRANSACTION)["model_version"] == "v1.2.3"
            assert service.workers() == workers
            assert len(service.versions()) == 1
            return errors[-1].removeprefix(f"still serving v1.2.3, not {URI} at {relay.url}: ")

        promote(pickled)
        assert refused() == (
            f"version {pickled} is not safe to load: "
            "serialization_format is cloudpickle, expected skops; pickled_model is model.pkl, expected model.skops "
            "(MODEL_ALLOW_UNSAFE; README: A model of your own)"
        )
        client.delete_registered_model_alias(NAME, ALIAS)
        assert "alias rolling not found" in refused()
        long = str(client.copy_model_version(f"models:/{NAME}/1", NAME).version)
        client.set_model_version_tag(NAME, long, "release", "x" * 70_000)  # more than a pipe holds
        promote(long)
        service.popen.send_signal(signal.SIGHUP)
        wait_until(announced(service, "x" * 70_000, 1), "it has the long tag")
        promote("1")
        service.popen.send_signal(signal.SIGHUP)
        wait_until(announced(service, "v1.2.3", 2), "it is back")
        workers = service.workers()
        promote(second)
        relay.silent = True
        assert "timed out" in refused()
        relay.cut()
        assert "refused" in refused()
        relay.restore()
        service.popen.send_signal(signal.SIGHUP)
        wait_until(announced(service, "v2", 1), "all is well again")
        assert service.post("/predict", TRANSACTION)["model_version"] == "v2"
        shutil.rmtree(service.folder())
        promote("1")
        service.popen.send_signal(signal.SIGHUP)
        wait_until(lambda: "[ERROR] still serving v2, not " in service.log, "there is no place for another")
        assert service.post("/predict", TRANSACTION)["model_version"] == "v2"
    relay.cut()


def test_only_a_signal_changes_the_version(champion: str, second: str, promote: Callable[[str], None]) -> None:
    """Not an alias that moves, nor a worker that is replaced meanwhile; nor a signal when nothing is new."""
    with running(champion, model_uri=URI) as service:
        promote(second)
        os.kill(service.workers()[0], signal.SIGKILL)
        wait_until(lambda: service.log.count("Worker ready") == 3, "the worker is replaced")
        answers = [service.post("/predict", TRANSACTION)["model_version"] for _ in range(50)]
        assert answers == ["v1.2.3"] * 50
        promote("1")
        workers, files = service.workers(), service.versions()
        for _ in range(2):
            service.popen.send_signal(signal.SIGHUP)
            seen = service.log.count(f"nothing new, still serving {NAME} v1.2.3")
            wait_until(
                lambda seen=seen: service.log.count(f"nothing new, still serving {NAME} v1.2.3") > seen, "it says so"
            )
        assert service.workers() == workers
        assert service.versions() == files
        assert service.log.count("[ERROR]") == 1  # of the worker that was killed


def test_a_version_that_workers_hang_with(champion: str, promote: Callable[[str], None]) -> None:
    """The worker is ended after MODEL_LOAD_TIMEOUT, and the old version stays."""
    number = as_pickle(Hanging(mlflow.sklearn.load_model(f"models:/{NAME}/1").steps))
    options = {"model_allow_unsafe": "true", "model_load_timeout": "15"}
    with running(champion, model_uri=URI, web_concurrency="1", **options) as service:
        old = service.workers()
        promote(number)
        service.popen.send_signal(signal.SIGHUP)
        wait_until(lambda: f"still serving v1.2.3, not v{number}: no worker for it" in service.log, "it is given up")
        assert service.workers() == old
        assert service.post("/predict", TRANSACTION)["model_version"] == "v1.2.3"


def idle(service: Service) -> bool:
    """No child but the workers."""
    return len(Path(f"/proc/{service.pid}/task/{service.pid}/children").read_text().split()) == len(service.workers())


def test_a_version_that_no_worker_comes_up_with(champion: str, second: str, promote: Callable[[str], None]) -> None:
    """Should a worker die of a version that was verified, the old one stays until it is tried again."""
    with running(champion, model_uri=URI, web_concurrency="2") as service:
        old = service.workers()
        promote(second)
        service.popen.send_signal(signal.SIGHUP)
        wait_until(lambda: len(service.workers()) > 2, "a worker for the new version has started")
        os.kill(max(service.workers()), signal.SIGKILL)
        wait_until(lambda: "still serving v1.2.3, not v2: no worker for it" in service.log, "it is given up")
        assert service.workers() == old
        assert service.post("/predict", TRANSACTION)["model_version"] == "v1.2.3"
        assert len(service.versions()) == 1
        service.popen.send_signal(signal.SIGHUP)
        wait_until(announced(service, "v2", 1), "told to, it tries again")
