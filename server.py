"""The processes: a worker that slow clients cannot block, and a supervisor that replaces workers one by one.

Both rest on gunicorn's threaded worker and its master. tests/test_gunicorn.py lists the names that they use and that
gunicorn's documentation does not promise, and looks them up in the installed version. requirements.in bounds gunicorn
to the minor version that they were checked with.
"""

import math
import mmap
import os
import select
import shutil
import socket
import struct
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, cast

from gunicorn import util
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
# Of this thread: the `connection` that it serves, the `request` that it handles, and whether part of it is `unread`. If
# so, gunicorn waits up to 2 s for the client to close: a connection that is closed with something unread is reset, and
# the client may lose the answer.
current = threading.local()


class Connection(TConn):  # type: ignore[misc]
    """A connection, and how much it moves."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.data_ready, self.timeout = True, math.inf  # gunicorn shall not wait for data
        self.idle, self.computing = False, False
        self.since, self.moved = time.monotonic(), 0.0  # when `end_if_late` last looked, and the bytes moved until then
        self.probe_only = False  # the last free thread answers one health check

    def wait_for_request(self, keepalive: float) -> None:
        """Return when something comes, or the connection is shut down."""
        self.timeout, unreader = time.monotonic() + keepalive, self.parser.unreader
        self.idle = True
        with suppress(OSError):  # what was sent behind the last request without waiting, else what comes
            unreader.unread(unreader.take_buffered() or self.sock.recv(2**13))
        self.idle, self.since = False, time.monotonic()

    def end_if_late(self, slow_seconds: float, idle_until: float) -> None:
        """End it if it has been idle for too long, or has moved less than `SLOW_RATE` for `slow_seconds`."""
        now = time.monotonic()
        if self.idle:
            if now > min(self.timeout, idle_until):
                self.end(socket.SHUT_RD)  # a request that has just come is answered
        elif self.computing:
            self.since = now
        elif now - self.since >= slow_seconds:
            since, before, self.since, self.moved = self.since, self.moved, now, bytes_moved(self.sock)
            if self.moved - before < SLOW_RATE * (now - since):
                self.end()

    def end(self, how: int = socket.SHUT_RDWR) -> None:
        """Shut it down; its thread closes it."""
        with suppress(OSError):  # it has ended
            self.sock.shutdown(how)


class Worker(ThreadWorker):  # type: ignore[misc]
    """gunicorn's threaded worker with a thread for each connection, so that slow clients cannot block others.

    One free thread at a time waits for a new connection, and serves it until it is closed. The last free thread serves
    health checks only, and answers 503 to the others. The main thread closes connections that are slow, or idle for too
    long. A stopping worker says `Connection: close` in every answer and leaves idle connections LINGER seconds.
    """

    settings: Config

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)  # in the master, before the fork
        self.snapshot, self.ready, self.born = process.snapshot, shared_flag(), time.monotonic()
        self.conns, self.keepalived_conns = set[Connection](), set[Connection]()  # all, and the idle ones among them
        self.threads, self.accepting, self.idle_until = list[threading.Thread](), threading.Lock(), math.inf

    def run(self) -> None:
        """In the main thread: watch the connections until a signal comes, then stop."""
        self.readable = select.poll()
        end, writer = os.pipe()  # `end` is readable when the worker stops
        for source in (end, *self.sockets):
            self.readable.register(source, select.POLLIN)
        with self.accepting:  # until the thread is in `threads`, which it compares with `conns`
            start_thread(self, self.work)
        while self.alive and self.is_parent_alive():
            self.watch(1)
        self.alive: bool = False
        os.close(writer)
        self.stop()

    def stop(self) -> None:
        """Accept no more, let requests in progress end, and leave idle connections a while."""
        deadline = time.monotonic() + max(self.cfg.graceful_timeout - 1, 1)  # before the master kills this worker
        with self.accepting:
            for listener in self.sockets:  # serve what waits, if the whole service stops; else other workers do
                while process.stopping[0] and len(self.conns) < self.cfg.threads and (conn := accept(self, listener)):
                    start_thread(self, self.serve, conn)
                listener.close()
        self.idle_until = time.monotonic() + LINGER
        while self.conns and time.monotonic() < deadline:
            self.watch(0.02)
        for conn in list(self.conns):
            conn.end()
        for thread in self.threads:
            thread.join(timeout=1)

    def watch(self, seconds: float) -> None:
        """Close the connections that are late, and wait up to `seconds` for a signal."""
        self.notify()
        for conn in list(self.conns):
            conn.end_if_late(self.settings.slow_seconds, self.idle_until)
        if select.select([self.PIPE[0]], [], [], seconds)[0]:
            os.read(self.PIPE[0], 4096)

    def work(self) -> None:
        """In a thread: serve one connection after another."""
        while conn := self.next_connection():
            self.serve(conn)

    def next_connection(self) -> Connection | None:
        """Wait for a connection; None if the worker stops."""
        with self.accepting:
            while self.alive:
                self.readable.poll()
                for conn in filter(None, map(partial(accept, self), self.sockets)):
                    conn.probe_only = not another_is_free(self)
                    if not conn.probe_only or is_probe(conn):
                        return conn
                    answer_problem(self.log, conn.sock, 503)
                    conn.close()
                    self.conns.remove(conn)
        return None

    def serve(self, conn: Connection) -> None:
        """Handle the requests of a connection until it is closed."""
        current.connection, current.unread = conn, False
        try:
            while self.handle(conn) and not conn.probe_only:
                self.keepalived_conns.add(conn)
                conn.wait_for_request(self.cfg.keepalive)
                self.keepalived_conns.remove(conn)
        except Exception:  # the thread goes on
            self.log.exception("a connection failed")
        finally:
            self.keepalived_conns.discard(conn)
            with suppress(OSError):  # gunicorn has closed it
                conn.close(graceful=current.unread and not conn.probe_only)
            # Not before: gunicorn may have waited for the client in `close`, and the thread was not free.
            self.conns.remove(conn)

    def handle_error(self, req: Any, client: Any, addr: Any, exc: Exception) -> None:
        current.unread = True
        if isinstance(exc, ParseException):
            answer_problem(self.log, client, 400, req)
        else:
            super().handle_error(req, client, addr, exc)


def answer_problem(log: telemetry.Log, client: socket.socket, status: int, req: Any = None) -> None:
    """Answer overload, or what is not HTTP, with a problem that does not echo what was sent."""
    request_id = fraud_api.request_id(dict(req.headers).get("X-REQUEST-ID") if req else None)
    asked = {"REQUEST_METHOD": req.method, "PATH_INFO": req.path} if req else {}
    log.answered({telemetry.LOG_FIELDS: {"request_id": request_id}, **asked}, status)
    found = fraud_api.problem(status, request_id=request_id)
    body = fraud_api.encode(found)
    fields = {"Content-Type": fraud_api.PROBLEM, "Content-Length": len(body), "Connection": "close"}
    fields |= {"X-Request-ID": request_id} | ({"Retry-After": 1} if status == 503 else {})
    lines = [f"HTTP/1.1 {status} {found.title}", *(f"{name}: {value}" for name, value in fields.items()), "", ""]
    with suppress(OSError):  # the client may be gone
        util.write_nonblock(client, "\r\n".join(lines).encode() + body)


def start_thread(worker: Worker, target: Callable[..., None], *args: Any) -> None:
    thread = threading.Thread(target=target, args=args, daemon=True)
    thread.start()
    worker.threads.append(thread)


def another_is_free(worker: Worker) -> bool:
    """Whether another thread is free. If none is, one is started, up to MAX_CONNECTIONS of them."""
    if len(worker.threads) <= len(worker.conns) and len(worker.threads) < worker.cfg.threads:
        with suppress(RuntimeError):  # the system allows no more
            start_thread(worker, worker.work)
    return len(worker.threads) > len(worker.conns)


def accept(worker: Worker, listener: Any) -> Connection | None:
    """A new connection; None if there is none, or no descriptor or memory for it."""
    try:
        conn = Connection(worker.cfg, *listener.accept(), listener.getsockname())
    except OSError as error:
        time.sleep(0 if isinstance(error, BlockingIOError) else 0.05)
        return None
    worker.conns.add(conn)
    return conn


def is_probe(conn: Connection) -> bool:
    """Whether a connection begins with a health check, which is not refused, or a busy service would be restarted."""
    with suppress(OSError):
        begun = conn.sock.recv(2**16, socket.MSG_DONTWAIT)
        if begun.startswith(b"GET /health") and b"\r\n\r\n" in begun:
            conn.init()
            conn.parser.unreader.unread(begun)
            return True
    return False


def bytes_moved(connection: socket.socket) -> float:
    """Bytes of a TCP connection that were received and that the client has acknowledged (tcp(7), linux/tcp.h)."""
    try:
        return float(
            sum(struct.unpack_from("QQ", connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 136), 120))
        )
    except (OSError, struct.error):  # no TCP, or a kernel that does not count
        return math.inf


def shared_flag() -> mmap.mmap:
    """A byte that is shared with all processes that are forked later."""
    return mmap.mmap(-1, 1)


def close_connection() -> None:
    """Close the connection of this thread's request after the answer. Its body may not have been read to the end."""
    current.request.force_close()
    current.unread = True


@contextmanager
def computing() -> Iterator[None]:
    """While this thread waits for its turn and computes, it does not wait for its client, which is not slow then."""
    current.connection.computing = True
    try:
        yield
    finally:
        current.connection.computing = False


class Supervisor:
    """What the master does besides gunicorn's own: it finds new versions, and replaces workers one by one."""

    def __init__(self, server: Arbiter, settings: Config, folder: Path) -> None:
        self.server, self.settings, self.folder, self.log = server, settings, folder, server.log
        self.served = cast(Snapshot, process.snapshot)  # by all workers, before a roll if there is one: the way back
        self.poll_at, self.asked = time.monotonic() + (settings.model_poll_seconds or math.inf), False
        self.steps, self.manage_workers = self.supervise(), server.manage_workers
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
                self.server.num_workers = max(self.server.num_workers - 1, 1)  # SIGTTOU may have come
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
