"""The processes: a worker that slow clients cannot block, and a supervisor that replaces workers one by one.

Both rest on gunicorn's threaded worker and its master. `PRIVATE` lists the names that they use and that gunicorn's
documentation does not promise. A test looks them up in the installed version, and requirements.in bounds gunicorn to
the minor version that they were checked with.
"""

import math
import mmap
import selectors
import shutil
import socket
import struct
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, cast

from gunicorn import util
from gunicorn.arbiter import Arbiter
from gunicorn.http.errors import ParseException
from gunicorn.http.message import Request
from gunicorn.http.parser import RequestParser
from gunicorn.http.unreader import Unreader
from gunicorn.workers.gthread import TConn, ThreadWorker
from msgspec import structs

import fraud_api
import telemetry
from config import Config
from fraud_api import process
from model import ModelError, ModelFetcher, Snapshot

SLOW_RATE = 100  # bytes/s in both directions together; slower connections are closed after SLOW_SECONDS
LINGER = 3  # seconds in which an idle connection of a stopping worker may send one more request
MOST_LINGERING = 100  # refused connections that wait for their client to close
ACCEPTS = 64  # connections accepted in one turn of the main loop
PRIVATE = {  # methods and functions; attributes
    ThreadWorker: (
        "accept enqueue_req finish_request handle handle_request get_thread_pool set_accept_enabled run handle_error "
        "wait_for_and_dispatch_events on_client_socket_readable on_pending_socket_readable init_process",
        "alive booted keepalived_conns max_keepalived nr_conns pending_conns poller tpool",
    ),
    TConn: ("set_timeout close", "data_ready parser sock timeout"),
    RequestParser: ("", "unreader"),
    Unreader: ("take_buffered unread", ""),
    Request: ("force_close", "headers"),
    util: ("close_graceful write_nonblock", ""),
    Arbiter: ("manage_workers handle_hup handle_term", "WORKERS num_workers"),
}
current = threading.local()  # of this thread: the parsed `request`, and whether its body was left `unread`


class Worker(ThreadWorker):  # type: ignore[misc]
    """gunicorn's threaded worker, in which slow clients and overload cannot block others.

    Every request in progress has a thread, which costs little while it waits for its client; THREADS of them score at a
    time. Requests beyond MAX_CONNECTIONS are answered 503. Connections slower than SLOW_RATE for SLOW_SECONDS are
    closed. A stopping worker says `Connection: close` in every answer and leaves idle connections LINGER seconds.
    """

    settings: Config

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)  # in the master, before the fork
        self.snapshot, self.ready, self.born = process.snapshot, shared_flag(), time.monotonic()
        self.max_keepalived = self.settings.max_connections
        self.watched, self.lingering = self.born, set[TConn]()
        self.active: dict[TConn, list[float]] = {}  # requests in progress: since when watched, bytes moved by then

    def init_process(self) -> None:
        """A first worker that cannot start ends the service; a later one must not take healthy workers with it."""
        try:
            super().init_process()
        except Exception:
            if self.booted or self.age <= self.cfg.workers:
                raise
            self.log.exception("a worker cannot start")
            time.sleep(1)
            sys.exit(1)

    def get_thread_pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(2 * self.settings.max_connections)  # started as needed

    def accept(self, listener: Any) -> None:
        for _ in range(ACCEPTS):
            before = self.nr_conns
            with suppress(OSError):  # no descriptor or memory for it: the others go on
                super().accept(listener)
            if self.nr_conns == before:
                return

    def enqueue_req(self, conn: TConn) -> None:
        begun = peek(conn.sock)  # a health check is not refused, or a busy service would be restarted
        if len(self.active) < self.settings.max_connections or (begun or b"").startswith(b"GET /health"):
            self.active[conn], conn.data_ready = [time.monotonic(), 0], True
            super().enqueue_req(conn)
        elif begun is None:  # it is looked at again when its request comes
            conn.timeout = time.monotonic() + self.settings.slow_seconds
            wait_readable(self, conn, self.pending_conns, self.on_pending_socket_readable)
        else:
            refuse(self, conn)

    def handle(self, conn: TConn) -> bool:
        """In a thread: handle a request, and those that the client has sent behind it without waiting."""
        current.unread = False
        keep = bool(super().handle(conn))
        while keep and (more := conn.parser.unreader.take_buffered()):
            conn.parser.unreader.unread(more)
            keep = bool(super().handle(conn))
        self.active.pop(conn, None)
        if current.unread:  # closing a socket with unread data would reset it before the answer is read
            util.close_graceful(conn.sock)
        elif not keep:
            conn.close()
        return keep

    def handle_request(self, req: Any, conn: TConn) -> bool:
        current.request = req
        return bool(super().handle_request(req, conn))

    def finish_request(self, conn: TConn, done: Future[bool]) -> None:
        """In the main loop: wait for the next request of a connection, even if the worker is stopping."""
        if not done.exception() and done.result():
            conn.set_timeout()
            wait_readable(self, conn, self.keepalived_conns, self.on_client_socket_readable)
        else:
            self.nr_conns -= 1

    def handle_error(self, req: Any, client: Any, addr: Any, exc: Exception) -> None:
        if isinstance(exc, ParseException):
            current.unread = True
            answer_problem(self.log, client, 400, req)
        else:
            super().handle_error(req, client, addr, exc)

    def wait_for_and_dispatch_events(self, timeout: float) -> None:
        super().wait_for_and_dispatch_events(min(timeout, 1))
        if time.monotonic() - self.watched >= 1:
            self.watched = time.monotonic()
            close_slow(self.active, self.settings.slow_seconds)

    def set_accept_enabled(self, enabled: bool) -> None:
        super().set_accept_enabled(enabled)
        if not (enabled or self.alive):
            for listener in self.sockets:
                self.accept(listener)
                listener.close()
            let_idle_go(self)

    def run(self) -> None:
        super().run()
        for conn in list(self.active):  # out of time
            cut(conn.sock)
        self.tpool.shutdown()


def answer_problem(log: telemetry.Log, client: socket.socket, status: int, req: Any = None) -> None:
    """Answer overload, or what is not HTTP, with a problem that does not echo what was sent."""
    request_id = fraud_api.request_id(dict(req.headers).get("X-REQUEST-ID") if req else None)
    asked = {"REQUEST_METHOD": req.method, "PATH_INFO": req.path} if req else {}
    log.answered({telemetry.RECORD: {"request_id": request_id}, **asked}, status)
    found = structs.replace(fraud_api.problem(status), request_id=request_id)
    body = fraud_api.encode(found)
    fields = {"Content-Type": fraud_api.PROBLEM, "Content-Length": len(body), "Connection": "close"}
    fields |= {"X-Request-ID": request_id} | ({"Retry-After": 1} if status == 503 else {})
    lines = [f"HTTP/1.1 {status} {found.title}", *(f"{name}: {value}" for name, value in fields.items()), "", ""]
    with suppress(OSError):  # the client may be gone
        util.write_nonblock(client, "\r\n".join(lines).encode() + body)


def wait_readable(worker: Worker, conn: TConn, waiting: deque[TConn], callback: Callable[..., None]) -> None:
    """In the main loop, wait until something comes on a connection, no longer than its timeout."""
    conn.sock.setblocking(False)
    waiting.append(conn)
    worker.poller.register(conn.sock, selectors.EVENT_READ, partial(callback, conn))


def let_idle_go(worker: Worker) -> None:
    """Give the idle connections of a stopping worker LINGER seconds."""
    worker.cfg.set("keepalive", LINGER)
    for conn in worker.keepalived_conns:
        conn.timeout = min(conn.timeout, time.monotonic() + LINGER)


def refuse(worker: Worker, conn: TConn) -> None:
    """Answer 503 and close."""
    begun = b""
    with suppress(OSError):
        begun = conn.sock.recv(2**16, socket.MSG_DONTWAIT)
    answer_problem(worker.log, conn.sock, 503)
    worker.nr_conns -= 1
    if len(begun) < 2**16 or len(worker.lingering) >= MOST_LINGERING:
        conn.close()
    else:  # more is to come, and would reset the connection before the answer is read
        worker.lingering.add(conn)
        done = worker.tpool.submit(util.close_graceful, conn.sock)
        done.add_done_callback(lambda done: worker.lingering.discard(conn))


def peek(connection: socket.socket) -> bytes | None:
    """The first bytes that have come and not been read; None if there are none yet."""
    try:
        return connection.recv(16, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return None
    except OSError:
        return b""


def close_slow(active: dict[TConn, list[float]], seconds: float) -> None:
    """Close the connections that have moved less than `SLOW_RATE` for so long."""
    now = time.monotonic()
    for conn, watch in list(active.items()):
        if now - watch[0] >= seconds:
            moved = bytes_moved(conn.sock)
            if moved - watch[1] < SLOW_RATE * (now - watch[0]):
                cut(conn.sock)
            watch[:] = now, moved


def bytes_moved(connection: socket.socket) -> float:
    """Bytes of a TCP connection that were received and that the client has acknowledged (tcp(7), linux/tcp.h)."""
    try:
        return float(
            sum(struct.unpack_from("QQ", connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 136), 120))
        )
    except (OSError, struct.error):  # no TCP, or a kernel that does not count
        return math.inf


def cut(connection: socket.socket) -> None:
    """End a connection under the thread that waits for it."""
    with suppress(OSError):  # it has ended
        connection.shutdown(socket.SHUT_RDWR)


def shared_flag() -> mmap.mmap:
    """A byte that is shared with all processes that are forked later."""
    return mmap.mmap(-1, 1)


def close_connection(unread: bool) -> None:
    """Close the connection of this thread's request after the answer."""
    current.unread = unread
    current.request.force_close()


class Supervisor:
    """What the master does besides gunicorn's own: it finds new versions, and replaces workers one by one."""

    def __init__(self, server: Arbiter, settings: Config, folder: Path) -> None:
        self.server, self.settings, self.folder, self.log = server, settings, folder, server.log
        self.served = cast(
            Snapshot, process.snapshot
        )  # what all workers serve, or served before they began to be replaced
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
        self.manage_workers()

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
        """The version that MODEL_URI names now, proven; None if there is none that can be served."""
        fetcher = ModelFetcher(self.settings, self.folder, self.settings.model_load_timeout, self.served)
        try:
            while not (found := fetcher.result()):
                yield
            return found
        except ModelError as error:
            process.metrics.add("failed_reloads")
            self.log.error("still serving %s, not %s", self.served.version, error)
            return None
        finally:
            fetcher.end()

    def roll(self, found: Snapshot) -> Iterator[None]:
        """One by one, start a worker that serves the new version, and when it is ready let the oldest worker stop."""
        announce(self.log, "proven, replacing workers for", found)
        process.snapshot, workers = found, self.server.WORKERS
        while any(worker.snapshot is not (wanted := process.snapshot) for worker in workers.values()):
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
        if not worker.ready[0] and worker.snapshot is process.snapshot is not self.served:
            self.log.error(
                "still serving %s, not %s: no worker for it",
                self.served.version,
                cast(Snapshot, worker.snapshot).version,
            )
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
