"""The processes: a worker that slow clients cannot block, and a supervisor that replaces workers one by one.

Both rest on gunicorn's threaded worker and its master. tests/test_gunicorn.py lists the names that they use and that
gunicorn's documentation does not promise, and looks them up in the installed version. requirements.in bounds gunicorn
to the minor version that they were checked with.
"""

import errno
import math
import mmap
import os
import re
import select
import shutil
import socket
import struct
import threading
import time
from _thread import start_new_thread
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, suppress
from pathlib import Path
from queue import SimpleQueue
from typing import Any, cast

from gunicorn.arbiter import Arbiter
from gunicorn.http.errors import ParseException
from gunicorn.workers.gthread import TConn, ThreadWorker

import fraud_api
import telemetry
from config import Config
from fraud_api import process
from model import ModelError, Snapshot, fetch_in_child

SLOW_RATE = 100  # bytes/s in both directions together; slower connections are closed after SLOW_SECONDS
LINGER = 3  # seconds in which an idle connection of a stopping worker may send one more request
HEALTH_CHECKS = 16  # connections beyond MAX_CONNECTIONS, for health checks
ONE_SECOND = struct.pack("ll", 1, 0)
# Of this thread: the `request` that it handles, and whether part of it may be `unread`. If so, gunicorn waits up to 2 s
# for the client to close: a connection that is closed with something unread is reset, and the answer may be lost.
current = threading.local()


class Client(socket.socket):
    """The socket of a client. Waiting for the client takes from `credit`, in seconds; bytes that move add to it.

    A client without credit is slow, and the connection is closed. What the service computes takes no credit.
    """

    def __init__(self, accepted: socket.socket, seconds: float) -> None:
        super().__init__(accepted.family, accepted.type, accepted.proto, accepted.detach())
        self.credit = self.most = seconds
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):  # after that time comes BlockingIOError (socket(7))
            self.setsockopt(socket.SOL_SOCKET, option, ONE_SECOND)

    def wait(self, call: Callable[..., Any], *args: Any) -> Any:
        """Call a method that waits for the client. Raises `ConnectionResetError` if the credit runs out."""
        while self.credit > 0:
            started, done = time.monotonic(), None
            with suppress(BlockingIOError):
                done = call(*args)
            moved = done if isinstance(done, int) else len(done or b"")
            self.credit = min(self.credit + moved / SLOW_RATE - (time.monotonic() - started), self.most)
            if done is not None:
                return done
        raise ConnectionResetError(errno.ECONNRESET, "the client is slow")  # gunicorn closes it quietly

    def recv(self, *args: Any) -> bytes:
        return cast(bytes, self.wait(super().recv, *args))

    def send(self, *args: Any) -> int:
        return cast(int, self.wait(super().send, *args))

    def sendall(self, data: Any, *args: Any) -> None:
        rest = memoryview(data)
        while rest:
            rest = rest[self.send(rest, *args) :]

    def next_request(self, worker: "Worker") -> bytes:
        """The begin of the next request; b"" if none comes in time. Waiting for it takes no credit."""
        started = time.monotonic()
        with suppress(OSError):
            while time.monotonic() < min(started + worker.cfg.keepalive, worker.idle_until):
                with suppress(BlockingIOError):
                    return super().recv(2**13)
        return b""


class Worker(ThreadWorker):  # type: ignore[misc]
    """gunicorn's threaded worker with a thread for each connection, so that slow clients cannot block others.

    The main thread accepts connections. Beyond MAX_CONNECTIONS it answers 503, but for HEALTH_CHECKS health checks. A
    stopping worker says `Connection: close` in every answer and leaves idle connections LINGER seconds.
    """

    settings: Config

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)  # in the master, before the fork
        self.snapshot, self.ready, self.born = process.snapshot, shared_flag(), time.monotonic()
        self.conns, self.keepalived_conns = set[TConn](), set[TConn]()  # all, and the idle ones among them
        self.accepted, self.started = SimpleQueue[TConn](), 0  # connections for the threads; how many threads there are
        self.idle_until = math.inf

    def run(self) -> None:
        """Accept connections until a signal comes, then stop."""
        while self.alive and self.is_parent_alive():
            self.accept_waiting(1)
        self.alive: bool = False
        stop(self)

    def accept_waiting(self, seconds: float) -> bool:
        """Wait up to `seconds` for connections and signals; return whether there were any."""
        self.notify()
        ready = select.select(self.wait_fds, [], [], seconds)[0]
        for source in ready:
            if source == self.PIPE[0]:
                os.read(source, 4096)
            else:
                self.accept(source)
        return bool(ready)

    def accept(self, listener: Any) -> None:
        """Serve a new connection in a thread of its own, or refuse it."""
        try:
            accepted, address = listener.accept()
        except OSError as error:  # another worker has it, or there is no descriptor or memory for it
            time.sleep(0 if isinstance(error, BlockingIOError) else 0.05)
            return
        most = self.cfg.threads
        if not self.has_room(most) and not (is_health_check(accepted) and self.has_room(most + HEALTH_CHECKS)):
            answer_problem(self.log, accepted, 503)
            with suppress(OSError):
                accepted.recv(2**16, socket.MSG_DONTWAIT)  # a connection that is closed with something unread is reset
            accepted.close()
            return
        client = Client(accepted, self.settings.slow_seconds)
        conn = TConn(self.cfg, client, address, listener.getsockname())
        conn.data_ready = True  # gunicorn shall not wait for data
        self.conns.add(conn)
        self.accepted.put(conn)

    def has_room(self, most: int) -> bool:
        """Whether there are fewer connections than that, and a thread is free or can be started."""
        if self.started <= len(self.conns) < most:
            with suppress(RuntimeError):  # the system allows no more threads
                start_new_thread(self.work, ())
                self.started += 1
        return len(self.conns) < min(self.started, most)

    def work(self) -> None:
        """In a thread: serve one connection after another."""
        while True:
            self.serve(self.accepted.get())

    def serve(self, conn: TConn) -> None:
        """Handle the requests of a connection until it is closed."""
        current.unread = False
        try:
            while self.handle(conn) and self.wait_for_request(conn):
                pass
        except BaseException:  # the thread goes on
            self.log.exception("a connection failed")
        finally:
            self.keepalived_conns.discard(conn)
            with suppress(OSError):  # gunicorn has closed it
                conn.close(graceful=current.unread)
            self.conns.remove(conn)

    def wait_for_request(self, conn: TConn) -> bool:
        """Whether one more request comes on an idle connection."""
        self.keepalived_conns.add(conn)
        more = conn.parser.unreader.take_buffered()  # sent behind the last request without waiting
        more = more or conn.sock.next_request(self)
        conn.parser.unreader.unread(more)
        self.keepalived_conns.remove(conn)
        return bool(more)

    def handle_error(self, req: Any, client: Client, addr: Any, exc: Exception) -> None:
        current.unread = True
        if isinstance(exc, ParseException):
            answer_problem(self.log, client, 400)
        else:
            super().handle_error(req, client, addr, exc)


def stop(worker: Worker) -> None:
    """Accept no more, let requests in progress end, and leave idle connections a while."""
    deadline = time.monotonic() + max(worker.cfg.graceful_timeout - 1, 1)  # before the master kills this worker
    worker.idle_until = min(time.monotonic() + LINGER, deadline)
    while process.stopping[0] and time.monotonic() < worker.idle_until and worker.accept_waiting(0):
        pass  # what waits, if the whole service stops; else other workers accept it
    for listener in worker.sockets:
        listener.close()
    wait_for_end(worker, deadline)
    for conn in list(worker.conns):
        with suppress(OSError):  # it has ended
            conn.sock.shutdown(socket.SHUT_RDWR)
    wait_for_end(worker, time.monotonic() + 1)


def wait_for_end(worker: Worker, deadline: float) -> None:
    """Wait until all connections are closed."""
    while worker.conns and time.monotonic() < deadline:
        worker.notify()
        time.sleep(0.02)


def answer_problem(log: telemetry.Log, client: socket.socket, status: int) -> None:
    """Answer overload, or what is not HTTP, with a problem that does not echo what was sent."""
    request_id = fraud_api.request_id(None)
    log.answered({telemetry.LOG_FIELDS: {"request_id": request_id}}, status)
    found = fraud_api.problem(status, request_id=request_id)
    body = fraud_api.encode(found)
    fields = {"Content-Type": fraud_api.PROBLEM, "Content-Length": len(body), "Connection": "close"}
    fields |= {"X-Request-ID": request_id} | ({"Retry-After": 1} if status == 503 else {})
    lines = [f"HTTP/1.1 {status} {found.title}", *(f"{name}: {value}" for name, value in fields.items()), "", ""]
    with suppress(OSError):  # the client may be gone
        # Not `Client.send`, which would try again.
        socket.socket.send(client, "\r\n".join(lines).encode() + body, socket.MSG_DONTWAIT)


def is_health_check(client: socket.socket) -> bool:
    """Whether a request is a health check, which is not refused, or a busy service would be restarted."""
    with suppress(OSError):
        return re.match(b"(GET|HEAD) /health", client.recv(64, socket.MSG_DONTWAIT | socket.MSG_PEEK)) is not None
    return False


def shared_flag() -> mmap.mmap:
    """A byte that is shared with all processes that are forked later."""
    return mmap.mmap(-1, 1)


def close_connection() -> None:
    """Close the connection of this thread's request after the answer. Its body may not have been read to the end."""
    current.request.force_close()
    current.unread = True


class Supervisor:
    """What the master does besides gunicorn's own: it finds new versions, and replaces workers one by one."""

    def __init__(self, server: Arbiter, settings: Config, folder: Path) -> None:
        self.server, self.settings, self.folder, self.log = server, settings, folder, server.log
        self.served = cast(Snapshot, process.snapshot)  # by all workers; in a roll, the version to go back to
        self.poll_at, self.asked = time.monotonic() + (settings.model_poll_seconds or math.inf), False
        self.steps, self.manage_workers = self.supervise(), server.manage_workers
        # The master calls these instead of its own methods.
        server.manage_workers, server.handle_hup, server.handle_term = self.step, self.look_now, self.drain

    def step(self) -> None:
        """gunicorn calls this after every signal, and once a second; an exception would end the service."""
        try:
            next(self.steps)
        except Exception:
            self.log.exception("the supervisor starts again")
            self.steps = self.supervise()
        try:
            self.manage_workers()
        except OSError:  # no process or memory for a worker: it is tried again
            self.log.exception("cannot start a worker")

    def look_now(self) -> None:
        """SIGHUP"""
        self.poll_at, self.asked = 0, True

    def drain(self) -> None:
        """SIGTERM: answer for a while as a service that is not ready, then stop."""
        process.stopping[0] = 1
        time.sleep(self.settings.drain_seconds)
        raise StopIteration

    def supervise(self) -> Iterator[None]:
        """Look for new versions and replace the workers; yields while there is something to wait for."""
        while True:
            while time.monotonic() < self.poll_at:
                yield
            asked, self.asked = self.asked, False
            self.poll_at = time.monotonic() + (self.settings.model_poll_seconds or math.inf)
            found = yield from self.fetch()
            if found and found != self.served:
                yield from self.roll(found)
            elif found and asked:
                self.log.info("nothing new, still serving %s %s", found.name, found.version)
            self.tidy()

    def fetch(self) -> Generator[None, None, Snapshot | None]:
        """The version that MODEL_URI names now, verified; None if there is none that can be served."""
        try:
            with closing(fetch_in_child(self.settings, self.folder, self.served)) as answers:
                while not (found := next(answers)):
                    yield
            return found
        except ModelError as error:
            process.metrics.add("failed_reloads")
            self.log.error("still serving %s, not %s", self.served.version, error)
            return None

    def roll(self, found: Snapshot) -> Iterator[None]:
        """One by one, start a worker that serves the new version, and when it is ready let the oldest worker stop."""
        announce(self.log, "verified, replacing workers for", found)
        process.snapshot, workers = found, self.server.WORKERS
        while not workers or any(worker.snapshot is not process.snapshot for worker in workers.values()):
            wanted = process.snapshot  # `lost` sets it back if the new worker ends
            self.server.num_workers += 1  # gunicorn starts one more, and below it stops the oldest
            try:
                while wanted is process.snapshot and not self.all_ready():
                    yield
            finally:
                self.server.num_workers = max(self.server.num_workers - 1, 1)  # SIGTTOU may have lowered it meanwhile
            while len(workers) > self.server.num_workers:
                yield
        if process.snapshot is found:
            self.served = found
            announce(self.log, "serving", found)

    def all_ready(self) -> bool:
        workers = self.server.WORKERS
        return len(workers) >= self.server.num_workers and all(worker.ready[0] for worker in workers.values())

    def lost(self, worker: Worker) -> None:
        """A worker has ended. A new version that its first worker does not come up with is given up."""
        if len(self.server.WORKERS) < self.server.num_workers and not process.stopping[0]:
            process.metrics.add("worker_restarts")
        rolling = process.snapshot is not self.served
        if rolling and worker.snapshot is process.snapshot and not worker.ready[0]:
            version = cast(Snapshot, worker.snapshot).version
            self.log.error("still serving %s, not %s: no worker for it", self.served.version, version)
            process.metrics.add("failed_reloads")
            process.snapshot = self.served

    def tidy(self) -> None:
        """Only the version that is served stays in memory."""
        with suppress(OSError):
            for folder in self.folder.iterdir():
                if not Path(self.served.path).is_relative_to(folder):
                    shutil.rmtree(folder, ignore_errors=True)


def announce(log: Any, what: str, snapshot: Snapshot) -> None:
    log.info("%s %s %s, SHA-256 %s", what, snapshot.name, snapshot.version, snapshot.sha256)
    if snapshot.unsafe:
        log.warning("MODEL_ALLOW_UNSAFE: this model may run code of its own: %s", "; ".join(snapshot.unsafe))
