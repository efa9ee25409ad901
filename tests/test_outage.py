"""Once it serves, the registry may go away and workers may die: the same version keeps answering."""

import os
import random
import signal
import time
from pathlib import Path

import pytest

from chaos import Chaos, Load, Relay
from conftest import NAME, TRANSACTION, Through, running, wait_until
from model import Model, Transaction


def expected(model: Model) -> set[tuple[str, float]]:
    return {("v1.2.3", float(model.score([Transaction(**TRANSACTION)])[0]))}


def test_kills_without_a_registry(champion: str, model: Model, chaos: Chaos) -> None:
    """Workers are killed under load while the registry is silent or gone: what they were answering is lost, no more.

    Clients do not try again. Every failure is of a request that was under way when a worker was killed.
    """
    relay = Relay(champion)
    kills: list[tuple[float, float]] = []  # from the signal until the process is gone
    with running(relay.url, model_poll_seconds="1", web_concurrency="2") as service:
        relay.silent = True
        with Load(service.port, TRANSACTION, clients=8) as load:
            for number in chaos.rounds("workers killed without a registry"):
                load.wait_for(100)
                victim, killed = random.choice(service.workers()), time.monotonic()
                os.kill(victim, signal.SIGABRT if number % 3 else signal.SIGKILL)
                wait_until(lambda victim=victim: not Path(f"/proc/{victim}").exists(), "the worker is gone")
                kills.append((killed, time.monotonic()))
                wait_until(lambda: service.log.count("Worker ready") == 2 + len(kills), "the worker is replaced")
                if number == 1:
                    relay.cut()
        assert service.popen.poll() is None
        service.post("/predict", TRANSACTION)
    for answer in load.lost:
        assert any(answer.started <= gone and killed <= answer.ended for killed, gone in kills), answer
    assert len(load.lost) <= 8 * len(kills)
    assert {answer.model for answer in load.answers if answer.model} == expected(model)
    chaos.report(
        f"{len(kills)} workers killed under load, registry silent, then gone",
        f"{len(load.answers):,} requests",
        f"{len(load.lost)}, all in a killed worker",
    )


@pytest.mark.parametrize("through", ["direct", pytest.param("nginx", marks=pytest.mark.long)], indirect=True)
def test_recycling_without_a_registry(champion: str, model: Model, through: Through, chaos: Chaos) -> None:
    """`max_requests` replaces workers all the time: clients that keep connections and never retry lose nothing."""
    relay = Relay(champion)
    options = {"gunicorn_cmd_args": "--max-requests 500 --max-requests-jitter 100", "web_concurrency": "2"}
    with running(relay.url, **options) as service, through(service) as port:
        relay.cut()
        with Load(port, TRANSACTION, clients=8, paced=8) as load:
            for _ in chaos.rounds(f"workers recycled, port {port}"):
                load.wait_for(1500)
        recycled = service.log.count("Autorestarting worker")
    assert recycled >= 2
    assert load.lost == []
    assert load.dropped == 0
    assert {answer.model for answer in load.answers} == expected(model)
    where = ", through nginx" if port != service.port else ""
    chaos.report(f"{recycled} workers recycled, registry gone{where}", f"{len(load.answers):,} requests", "0")


def test_a_worker_that_cannot_start(champion: str) -> None:
    """Plain gunicorn would stop the master and the healthy worker: here they go on, and it is tried again."""
    with running(champion, web_concurrency="2") as service:
        folder, [snapshot] = service.folder(), service.versions()
        snapshot.rename(folder / "away")
        os.kill(service.workers()[0], signal.SIGKILL)
        wait_until(lambda: service.log.count("Exception in worker process") >= 2, "it has been tried twice")
        assert service.post("/predict", TRANSACTION)["model_version"] == "v1.2.3"
        (folder / "away").rename(snapshot)
        wait_until(lambda: service.log.count("Worker ready") == 3, "a worker has started")
        assert len(service.workers()) == 2
        assert f"serving {NAME} v1.2.3" in service.log
