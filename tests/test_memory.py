"""Memory: what no body may keep, what a full MEMORY_DIR may not end, and what no model may take."""

import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import mlflow
import numpy as np
import pytest
from mlflow import MlflowClient

from chaos import Load
from conftest import BODY, LINE, NAME, TRANSACTION, Service, get, running, wait_until
from model import Snapshot

PAD = b"x" * 40_000

# -- malformed bodies --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alone(champion: str) -> Iterator[Service]:
    """A service of one worker that takes a transaction of 1 MB."""
    with running(champion, web_concurrency="1", max_line_bytes="1048576") as service:
        yield service


def padded(row: bytes) -> bytes:
    """The same transaction with 40 kB in a field that is ignored."""
    return row[:-1] + b', "note": "' + PAD + b'"}'


JSON, LINES = "application/json", "application/x-ndjson"
ROWS = b", ".join([padded(BODY)] * 95)
# name: path, Content-Type, body, and the statuses that may come back
BAD: dict[str, tuple[str, str, bytes, set[int]]] = {
    "malformed JSON": ("/predict", JSON, padded(BODY)[:-2] + PAD * 24, {400}),
    "a malformed batch": ("/predict/batch", JSON, b'{"transactions": [' + ROWS, {400}),
    "a batch with a malformed row": ("/predict/batch", JSON, b'{"transactions": [{}, ' + ROWS + b"]}", {200}),
    "a wrong type": ("/predict", JSON, BODY.replace(b'"grocery_stores"', b'["' + PAD * 24 + b'"]'), {422}),
    "too large": ("/predict", JSON, b"x" * 4_200_000, {413}),
    "a stream with blank and broken lines": (
        "/predict/batch",
        LINES,
        LINE * 4000 + b"\n" + LINE[:-5] + b"\n",
        {200},
    ),
    "not JSON": ("/predict", "text/plain", PAD * 100, {415}),
}


def private(service: Service) -> int:
    """Private memory of the workers, in MB (man 5 proc)."""
    texts = [Path(f"/proc/{pid}/smaps_rollup").read_text() for pid in service.workers()]
    return sum(int(size) for text in texts for size in re.findall(r"Private_\w+:\s+(\d+) kB", text)) // 1024


def send(service: Service, path: str, kind: str, body: bytes, missing: int = 0) -> int:
    """Send it on a connection of its own, but for its last bytes; the status of the answer, when the server closes."""
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: {kind}\r\nConnection: close\r\n"
    with service.connect() as connection:
        with suppress(BrokenPipeError, ConnectionResetError):  # refused before all was sent
            connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode())
            connection.sendall(body[: len(body) - missing])
        if missing:
            connection.shutdown(socket.SHUT_WR)
        answer = b""
        while data := connection.recv(2**20):
            answer = answer or data
    return int(answer[9:12])


@pytest.mark.parametrize("name", [*BAD, "a body that breaks off"])
def test_bad_bodies_leave_nothing(alone: Service, name: str) -> None:
    """100 of a kind, 1 or 4 MB each: private memory is not larger than after the first ones."""
    path, kind, body, statuses = BAD.get(name, ("/predict", JSON, PAD * 24, {400}))
    missing = 0 if name in BAD else 5000
    for _ in range(4):
        assert send(alone, path, kind, body, missing) in statuses
    sizes = [private(alone)]
    for _ in range(10):
        for _ in range(10):
            assert send(alone, path, kind, body, missing) in statuses
        sizes.append(private(alone))
    assert sizes[0] > 0
    assert max(sizes) - sizes[0] < 30
    assert alone.post("/predict", TRANSACTION)["transaction_id"] == "tx_12345"


# -- a full MEMORY_DIR -------------------------------------------------------------------------------------------------


@pytest.fixture
def small() -> Iterator[Path]:
    """A tmpfs of 64 MB."""
    folder = tempfile.mkdtemp(dir="/dev/shm")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64m", "none", folder], capture_output=True, check=False
    )
    try:
        if mounted.returncode:
            pytest.skip(f"cannot mount a tmpfs, which takes root: {mounted.stderr.decode().strip()}")
        yield Path(folder)
    finally:
        if not mounted.returncode:
            subprocess.run(["umount", "--lazy", folder], check=True)
        Path(folder).rmdir()


def fill(folder: Path) -> None:
    """To the last byte."""
    with (folder / "filler").open("ab", buffering=0) as file, suppress(OSError):
        while file.write(b"x" * 4096):
            pass
    assert shutil.disk_usage(folder).free == 0


def test_a_full_memory_dir(champion: str, small: Path) -> None:
    """Every request is answered, no worker dies of it, and one that is killed is replaced. Metrics may stop."""
    with running(champion, memory_dir=str(small), web_concurrency="2", max_line_bytes="1048576") as service:
        fill(small)
        with Load(service.port, TRANSACTION, clients=4) as load:
            load.wait_for(200)
            for path, kind, body, statuses in BAD.values():
                assert send(service, path, kind, body) in statuses
            for path in ("/health", "/health/ready", "/nothing", "/version"):
                assert get(service.url + path) == (404 if path == "/nothing" else 200)
            assert get(f"{service.url}/metrics") in (200, 503)
            fill(small)
            victim, killed = service.workers()[0], time.monotonic()
            os.kill(victim, signal.SIGKILL)
            wait_until(lambda: not Path(f"/proc/{victim}").exists(), "the worker is gone")
            gone = time.monotonic()
            wait_until(lambda: service.log.count("Worker ready") == 3, "the worker is replaced")
            load.wait_for(200)
            assert get(f"{service.url}/metrics") in (200, 503)
        assert [answer for answer in load.lost if answer.started > gone or answer.ended < killed] == []
        assert service.log.count("Booting worker") == 3
        assert service.popen.poll() is None


# -- a model that unpacks to more than there is ------------------------------------------------------------------------

LIMIT = 256  # MODEL_MEMORY_MB


@pytest.fixture(scope="module")
def bomb(champion: str, snapshot: Snapshot, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The number of a version with the champion's files, but one of its arrays is 1.5 GB of zeros: 2 MB as a zip."""
    folder = tmp_path_factory.mktemp("bomb") / "model"
    shutil.copytree(snapshot.path, folder, ignore=shutil.ignore_patterns("registered_model_meta"))
    with zipfile.ZipFile(folder / "model.skops") as source:
        members = {name: source.read(name) for name in source.namelist()}
    with zipfile.ZipFile(folder / "model.skops", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as target:
        largest = max((name for name in members if name.endswith(".npy")), key=lambda name: len(members[name]))
        for name, content in members.items():
            if name != largest:
                target.writestr(name, content)
        with target.open(largest, "w", force_zip64=True) as array:
            header = {"descr": "<f8", "fortran_order": False, "shape": (1500 * 2**17,)}
            np.lib.format.write_array_header_1_0(array, header)
            for _ in range(1500):
                array.write(bytes(2**20))
    assert (folder / "model.skops").stat().st_size < 10 * 2**20
    with mlflow.start_run() as run:
        mlflow.log_artifacts(str(folder), "model")
    return str(mlflow.register_model(f"runs:/{run.info.run_id}/model", NAME).version)


def peak(service: Service) -> int:
    """MB that the largest of a service's processes had at most, once the service has ended (man 2 getrusage)."""
    ended: list[tuple[int, resource.struct_rusage]] = []

    def has_ended() -> bool:
        pid, status, usage = os.wait4(service.pid, os.WNOHANG)
        if pid:
            ended.append((os.waitstatus_to_exitcode(status), usage))
        return bool(pid)

    wait_until(has_ended, "the service ends")
    service.popen.returncode, usage = ended[0]
    return usage.ru_maxrss // 1024


def test_a_bomb_at_start(champion: str, bomb: str) -> None:
    """One sentence that names MODEL_MEMORY_MB, and no process has ever had much more."""
    service = Service(champion, model_uri=f"models:/{NAME}/{bomb}", model_memory_mb=str(LIMIT))
    try:
        most = peak(service)
        lines = re.findall(r"\[CRITICAL\] (.*)", service.log)
        assert service.popen.returncode == 1
        assert len(lines) == 1
        assert lines[0].startswith(f"cannot serve models:/{NAME}/{bomb} at {champion}: ")
        assert "MODEL_MEMORY_MB" in lines[0]
        assert "Traceback" not in service.log
        assert most < LIMIT + 600  # what a process has before it unpacks a model
    finally:
        service.stop()


def test_a_bomb_in_a_roll(champion: str, bomb: str) -> None:
    """The version in service stays, with the same sentence in the log."""
    client = MlflowClient(champion)
    client.set_registered_model_alias(NAME, "bombed", "1")
    with running(champion, model_uri=f"models:/{NAME}@bombed", model_memory_mb=str(LIMIT)) as service:
        workers = service.workers()
        client.set_registered_model_alias(NAME, "bombed", bomb)
        service.popen.send_signal(signal.SIGHUP)
        wait_until(lambda: "[ERROR] still serving v1.2.3, not " in service.log, "it is refused")
        assert "MODEL_MEMORY_MB" in service.log.rpartition("[ERROR] still serving v1.2.3, not ")[2].splitlines()[0]
        assert service.post("/predict", TRANSACTION)["model_version"] == "v1.2.3"
        assert service.workers() == workers
        service.popen.send_signal(signal.SIGTERM)
        assert peak(service) < LIMIT + 600
    client.delete_registered_model_alias(NAME, "bombed")
