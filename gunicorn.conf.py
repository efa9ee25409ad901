"""How gunicorn runs the service: one model version fetched in the master, loaded by each worker after the fork.

gunicorn finds this file by itself in the folder it is started in. Three things are done otherwise than it does them:
the master replaces workers one by one once a new version is proven (`Supervisor`), a worker that cannot start ends
the service only at its start, and slow clients take nobody else's place (`Worker`).
https://gunicorn.org/reference/settings/
"""

import atexit
import fcntl
import gc
import math
import mmap
import os
import re
import resource
import selectors
import shutil
import signal
import socket
import struct
import sys
import termios
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from itertools import count, islice
from pathlib import Path

sys.dont_write_bytecode = True  # the service writes no file to any disk

from config import INTERRUPTS, LOOPBACK_ONLY, prepare

started = time.monotonic()
for number in INTERRUPTS:  # until gunicorn has its own
    signal.signal(number, lambda number, _: sys.exit(128 + number))
settings = prepare("fraud-api")
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # a descriptor a connection; 1024 is usual otherwise

import falcon
from gunicorn import util
from gunicorn.http.errors import ParseException
from gunicorn.workers.gthread import ThreadWorker

import fraud_api  # imports the numeric libraries, which read the environment that `prepare` made
import telemetry
from model import Acquisition, ModelError, acquire, new_folder

SLOW_THREADS = 64
SLOW_RATE = 100  # bytes a second, both ways taken together; who moves less for SLOW_SECONDS is cut
PEEK = 8192  # bytes of a request that is waited for without a thread
FRAMING = re.compile(rb"(?i)\n(?:content-length|transfer-encoding|expect):")
LENGTH = re.compile(rb"(?i)\ncontent-length:[ \t]*(0|[1-9]\d{0,7})[ \t]*\r?\n")
WHOLE, PART, LONG = object(), object(), object()

METRICS = "metrics"  # their folder beside the versions'
POLL = settings.model_poll_seconds or math.inf

serving = mmap.mmap(-1, 1)  # shared by all processes: whether any worker has ever been ready
fraud_api.stopping = mmap.mmap(-1, 1)


class Overloaded(ParseException):
    """A request has waited too long for a thread."""


class Worker(ThreadWorker):
    """gunicorn's threaded worker, in which whoever is slow waits apart and not for ever.

    A request takes a thread once it has come wholly: one of a few, as more would only contend. A long one and a stream
    take a thread of a larger pool, where they wait for their client. A connection that moves next to nothing for a
    while is cut, sooner where there is no place for others.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)  # in the master, before the fork
        self.snapshot, self.born, self.leaving = fraud_api.snapshot, time.monotonic(), False
        self.ready, self.tls = mmap.mmap(-1, 1), self.cfg.is_ssl
        self.max_keepalived = self.worker_connections // 2
        self.active = {}  # connection: since when it has been looked at, and the bytes that it had moved by then
        self.parting = {}  # connection: until when its client may go on
        self.looked, self.refused = time.monotonic(), 0
        self.behind = 0  # milliseconds that the last request waited for a thread

    def init_process(self):
        """Fail-fast belongs to the start: gunicorn would stop the healthy workers with one that cannot start."""
        self.slow_pool = ThreadPoolExecutor(SLOW_THREADS)
        try:
            super().init_process()
        except Exception:
            if self.booted or not serving[0]:
                raise
            self.log.exception("a worker cannot start")
            time.sleep(1)
            sys.exit(1)

    def accept(self, listener):
        """As many as are there, not one: under load the next turn of the main loop may be a while away."""
        for _ in range(16):
            connections = self.nr_conns
            try:
                super().accept(listener)
            except OSError as error:  # no descriptor or memory for it: others go on
                self.log.debug("cannot accept: %s", error)
                self.refused += 1
                time.sleep(0.01)
            if self.nr_conns == connections:
                return

    def enqueue_req(self, conn):
        """Give a connection on which something has come a thread of the right pool, or none yet."""
        begun = b"" if self.tls else peek(conn.sock)
        kind = LONG if self.tls or unsent(conn.sock) else kind_of(begun)
        if conn not in self.active:
            # Where threads are behind nobody was accepted in time either, and has waited for that in the kernel.
            late = self.behind * 2 > settings.max_wait_ms and waiting(conn.sock) > settings.max_wait_ms
            if (late or len(self.active) >= settings.max_connections) and not begun.startswith(b"GET /health"):
                self.handle_error(None, conn.sock, conn.client, Overloaded())
                self.part_from(conn)
                return
            self.active[conn], conn.wanted = (time.monotonic(), 0), 0
        if kind is PART and len(begun) >= conn.wanted:
            self.wait_for_more(conn, len(begun) + 1)
        else:
            if conn.wanted:
                conn.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)
            conn.data_ready, conn.wanted = True, 0
            self.submit(conn, self.slow_pool if kind is LONG else self.tpool)

    def submit(self, conn, pool):
        conn.queued = time.monotonic()
        done = pool.submit(self.handle, conn)
        done.add_done_callback(lambda done: self.method_queue.defer(self.finish_request, conn, done))

    def wait_for_more(self, conn, size):
        """In the main loop, until so many bytes have come or none will (socket(7), SO_RCVLOWAT)."""
        conn.wanted, conn.timeout = size, math.inf
        conn.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, size)
        self.pending_conns.append(conn)
        self.poller.register(conn.sock, selectors.EVENT_READ, partial(self.on_pending_socket_readable, conn))

    def handle(self, conn):
        conn.waited = self.behind = (time.monotonic() - conn.queued) * 1000
        return super().handle(conn)

    def handle_request(self, req, conn):
        if conn.waited > settings.max_wait_ms and not req.path.startswith("/health"):
            raise Overloaded
        return super().handle_request(req, conn)

    def handle_error(self, req, client, addr, exc):
        """What is no HTTP or comes too late gets a problem, and no echo of what was sent."""
        if not isinstance(exc, ParseException):
            super().handle_error(req, client, addr, exc)
            return
        if isinstance(exc, Overloaded):
            error = falcon.HTTPServiceUnavailable(retry_after=1)
            self.refused += 1
        else:
            error = falcon.HTTPBadRequest()
            self.log.warning("refused what is no valid HTTP: %s", type(exc).__name__)
        asked = {"REQUEST_METHOD": req.method, "PATH_INFO": req.path} if req else {}
        record = {"request_id": fraud_api.request_id(dict(req.headers).get("X-REQUEST-ID") if req else None)}
        self.log.metrics.answer({telemetry.RECORD: record, **asked}, error.status_code)
        body = fraud_api.encode(fraud_api.problem(error, **record))
        fields = {"Content-Type": fraud_api.PROBLEM, "Content-Length": len(body), "Connection": "close"}
        fields["X-Request-ID"] = record["request_id"]
        lines = [f"{name}: {value}" for name, value in (fields | dict(error.headers or {})).items()]
        with suppress(OSError):  # there may be nobody any longer
            util.write_nonblock(client, "\r\n".join([f"HTTP/1.1 {error.status}", *lines, "", ""]).encode() + body)

    def _keepalive_after(self, conn, keepalive):
        try:
            return super()._keepalive_after(conn, keepalive)
        except OSError:  # the rest of a body that was refused is broken too
            return False

    def finish_request(self, conn, done):
        keep = self.alive and done.result()
        more = keep and conn.parser.unreader.take_buffered()
        if more:  # of a next request, sent without waiting for the answer; where it ends, nobody has looked
            conn.parser.unreader.unread(more)
            self.submit(conn, self.slow_pool)
            return
        del self.active[conn]
        if keep:
            super().finish_request(conn, done)
        else:
            self.part_from(conn)

    def part_from(self, conn):
        """Close, and wait up to 2 s, while there is room, for the client to do the same (RFC 9112, section 9.6)."""
        cut(conn.sock, socket.SHUT_WR)
        try:
            conn.sock.setblocking(False)
            self.poller.register(conn.sock, selectors.EVENT_READ, partial(self.linger, conn))
        except (OSError, ValueError):  # gunicorn has closed it, as after an error amid a response
            self.nr_conns -= 1
            conn.close()
        else:
            self.parting[conn] = time.monotonic() + 2

    def linger(self, conn, client):
        with suppress(OSError):
            if client.recv(2**16):
                return
        self.forget(conn)

    def forget(self, conn):
        del self.parting[conn]
        self.poller.unregister(conn.sock)
        self.nr_conns -= 1
        conn.close()

    def murder_keepalived(self):
        """gunicorn calls this after every turn of the main loop."""
        super().murder_keepalived()
        now = time.monotonic()
        self.log.flush(now)
        for conn, until in list(self.parting.items()):  # the oldest first
            if now < until and self.alive and self.nr_conns < self.worker_connections * 3 // 4:
                break
            self.forget(conn)

    def notify(self):
        """gunicorn calls this from the main loop."""
        super().notify()
        now = time.monotonic()
        if now - self.looked >= 1:
            self.looked = now
            self.make_room(now)
            if self.refused:
                self.log.warning("overloaded, refused %s requests", self.refused)
                self.refused = 0

    def make_room(self, now):
        full = max(len(self.active), self.nr_conns // 2) >= settings.max_connections
        for conn, (since, moved) in list(self.active.items()):
            if now - since >= (1 if full and conn.wanted else settings.slow_seconds):
                total = bytes_moved(conn.sock)
                if total - moved < SLOW_RATE * (now - since):
                    cut(conn.sock)
                self.active[conn] = now, total
        if full:
            for conn in islice(self.keepalived_conns, 100):
                conn.timeout = now

    def set_accept_enabled(self, enabled):
        super().set_accept_enabled(enabled)
        if not (enabled or self.alive):  # the end: nobody new, and nobody idle
            for listener in self.sockets:
                listener.close()
            self.wait_for_and_dispatch_events(0)
            for conn in self.keepalived_conns:
                conn.timeout = 0
            self.murder_keepalived()
            for conn in self.pending_conns:
                if conn.wanted == 1:
                    cut(conn.sock)

    def run(self):
        super().run()
        self.log.flush()
        for conn in self.active:  # out of time: a thread that waits for a client would hold up the exit
            cut(conn.sock)
        for pool in (self.tpool, self.slow_pool):
            pool.shutdown()
        self.log.flush()


def peek(connection):
    """The first bytes that wait there, which go on waiting."""
    try:
        return connection.recv(PEEK, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except OSError:
        return b""


def kind_of(begun):
    """Whether that is a whole request, part of a short one, or the beginning of one that is long or chunked."""
    head, end, body = begun.partition(b"\r\n\r\n")
    if not end:
        return PART if len(begun) < PEEK else LONG
    if b"explain=" in head.partition(b"\r\n")[0]:  # takes as long as 64 of others
        return LONG
    length = LENGTH.search(head + b"\n")
    missing = int(length[1]) - len(body) if length else 0
    if len(FRAMING.findall(head)) > bool(length) or len(begun) + missing > PEEK:
        return LONG
    return PART if missing > 0 else WHOLE


def unsent(connection):
    """Bytes that the client has not taken yet: what is sent to it next may have to wait (tcp(7), SIOCOUTQ)."""
    try:
        return int.from_bytes(fcntl.ioctl(connection, termios.TIOCOUTQ, bytes(4)), sys.byteorder)
    except OSError:
        return 0


def waiting(connection):
    """Milliseconds since the last bytes came (tcp(7), linux/tcp.h)."""
    try:
        return int.from_bytes(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 56)[52:], sys.byteorder)
    except OSError:  # no TCP
        return 0


def bytes_moved(connection):
    """Bytes of a TCP connection that came and that the client has acknowledged (tcp(7), linux/tcp.h)."""
    try:
        info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 136)
        return sum(struct.unpack_from("QQ", info, 120))
    except (OSError, struct.error):  # no TCP, or a kernel that does not count
        return math.inf


def cut(connection, how=socket.SHUT_RDWR):
    """End a connection, both ways or one, under whoever waits on it."""
    with suppress(OSError):  # it has ended
        connection.shutdown(how)


class Supervisor:
    """What the master does beside gunicorn's own: all workers on one version, and on the next once it is proven."""

    def __init__(self, server, folder):
        self.server, self.log, self.folder = server, server.log, folder
        self.settled = fraud_api.snapshot  # what all workers serve; while they are replaced, what they served before
        self.search, self.complaint, self.told = None, "", False
        self.next_look = time.monotonic() + POLL
        server.manage_workers, server.handle_hup, server.handle_term = self.manage_workers, self.look_now, self.drain

    def manage_workers(self):
        """gunicorn calls this after every signal, and once a second; an exception would end the healthy workers too."""
        try:
            self.look()
            self.replace()
            self.settle()
        except Exception:
            self.log.exception("the master goes on")

    def look_now(self):
        """SIGHUP"""
        self.next_look, self.complaint, self.told = 0, "", True

    def look(self):
        """Ask the registry, in a child process, for the version to serve."""
        if self.search and self.search.ready():
            self.take()
        if not self.search and time.monotonic() >= self.next_look and fraud_api.snapshot is self.settled:
            self.next_look = time.monotonic() + POLL
            self.search = Acquisition(settings, self.folder, settings.model_load_timeout, self.settled)

    def take(self):
        """What the search has found, or why not: once, however often it is polled."""
        search, self.search = self.search, None
        try:
            found = search.result()
        except ModelError as error:
            fraud_api.metrics.failed_reloads.inc()
            if str(error) != self.complaint:
                self.log.error("still serving %s, not %s", self.settled.version, error)
            self.complaint = str(error)
        else:
            if found != self.settled:
                announce(self.log, "proven, replacing workers for", found)
                fraud_api.snapshot = found
            elif self.told:
                self.log.info("nothing new, still serving %s %s", found.name, found.version)
            self.complaint = ""
        finally:
            self.told = False
            search.end()
            self.tidy()

    def replace(self):
        """Start a worker that is missing or to take over; when it is ready, let the oldest of the others go."""
        now, live = time.monotonic(), [worker for worker in self.server.WORKERS.values() if not worker.leaving]
        booting = [worker for worker in live if not worker.ready[0]]
        stale = [worker for worker in live if worker.snapshot is not fraud_api.snapshot]
        excess = len(live) - self.server.num_workers
        for worker in booting:
            if now - worker.born > settings.model_load_timeout:
                self.server.kill_worker(worker.pid, signal.SIGKILL)
        if excess < 0 or (excess == 0 and stale and not booting):
            for _ in range(max(-excess, 1)):
                self.server.spawn_worker()
        elif excess > 0 and not booting:
            worker = min(stale or live, key=lambda worker: worker.age)
            worker.leaving = True
            self.server.kill_worker(worker.pid, signal.SIGTERM)

    def settle(self):
        workers = self.server.WORKERS.values()
        if fraud_api.snapshot is not self.settled and all(
            worker.snapshot is fraud_api.snapshot and worker.ready[0] for worker in workers
        ):
            self.settled = fraud_api.snapshot
            announce(self.log, "serving", self.settled)
            self.tidy()

    def lost(self, worker):
        """A worker has ended. If it was to load a new version and did not come to it, that version is no good."""
        if not worker.leaving and not fraud_api.stopping[0]:
            fraud_api.metrics.restarts.inc()
        if not worker.ready[0] and worker.snapshot is fraud_api.snapshot is not self.settled:
            self.log.error("still serving %s, not %s: no worker for it", self.settled.version, worker.snapshot.version)
            fraud_api.snapshot = self.settled
            fraud_api.metrics.failed_reloads.inc()
            self.tidy()

    def tidy(self):
        """Only the versions in use stay in memory, and the metrics."""
        used = [self.folder / METRICS, *(Path(snapshot.path) for snapshot in (fraud_api.snapshot, self.settled))]
        with suppress(OSError):
            for folder in self.folder.iterdir():
                if not any(path.is_relative_to(folder) for path in used):
                    shutil.rmtree(folder, ignore_errors=True)

    def drain(self):
        """SIGTERM: not ready any longer, then no new connections, then the end."""
        fraud_api.stopping[0] = 1
        time.sleep(settings.drain_seconds)
        raise StopIteration


def announce(log, what, snapshot):
    log.info("%s %s %s, SHA-256 %s", what, snapshot.name, snapshot.version, snapshot.sha256)
    if snapshot.unsafe:
        log.warning("MODEL_ALLOW_UNSAFE: this model may run code of its own: %s", "; ".join(snapshot.unsafe))


class Log(telemetry.Log):
    """Made by gunicorn before there are metrics, which every worker has from its master."""

    mask = settings.mask

    @property
    def metrics(self):
        return fraud_api.metrics


wsgi_app = "fraud_api:get_app()"
logger_class = Log
bind = f"[{settings.host}]:{settings.port}" if ":" in settings.host else f"{settings.host}:{settings.port}"
workers = settings.web_concurrency
threads = settings.threads  # 4: at 16 connections 8 % less requests/s than 8 threads, and half the p99 (12 for 23 ms)
worker_class = Worker
worker_connections = 2 * settings.max_connections  # as many may be idle, or on their way out
keepalive = 75  # longer than what stands in front keeps its connections, or it sends on one just closed
graceful_timeout = max(settings.graceful_timeout - settings.drain_seconds - 1, 1)  # 1 for what comes before and after
timeout = graceful_timeout + 10  # without a sign of life; a worker that finishes its requests gives none
loglevel = settings.log_level
worker_tmp_dir = settings.memory_dir
control_socket_disable = True  # it would make a file under $HOME


def on_starting(server):
    """Before the first worker: log the configuration, fetch the model, or end with one line."""
    server.log.info("%r", settings)
    for address in server.cfg.address:
        if isinstance(address, tuple) and not settings.may_listen_on(address[0]):  # gunicorn --bind
            server.log.critical("cannot listen on %s: expected %s", address[0], LOOPBACK_ONLY)
            sys.exit(1)
    try:
        folder = new_folder(settings.memory_dir)
        atexit.register(clean_up, os.getpid(), server, folder)
        (folder / METRICS).mkdir()
        fraud_api.metrics = telemetry.Metrics(str(folder / METRICS))
        fraud_api.snapshot = acquire(settings, folder, settings.model_load_timeout - (time.monotonic() - started))
    except ModelError as error:
        server.log.critical("cannot serve %s", error)
        sys.exit(1)
    announce(server.log, "serving", fraud_api.snapshot)
    server.supervisor = Supervisor(server, folder)
    gc.collect()
    gc.freeze()  # what is imported stays out of the collector's way, in memory shared with the workers


def clean_up(master, server, folder):
    """However the master ends; the workers inherit this with the fork and are not to do it."""
    if os.getpid() == master:
        if hasattr(server, "supervisor") and server.supervisor.search:
            server.supervisor.search.end()
        shutil.rmtree(folder, ignore_errors=True)


def when_ready(server):
    """Let the kernel keep connections until something comes on them, so that a silent one takes no place."""
    for listener in server.LISTENERS:
        if listener.sock.family in (socket.AF_INET, socket.AF_INET6):
            listener.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, settings.slow_seconds)


def pre_fork(server, worker):
    """Give the new worker the first place that is free; the metrics of who had it before go on there."""
    taken = {other.place for other in server.WORKERS.values()}
    worker.place = next(number for number in count() if number not in taken)


def post_fork(server, worker):
    fraud_api.metrics.place = worker.place
    # The worker's own, in which it ends before the master kills it.
    server.cfg.set("graceful_timeout", max(server.cfg.graceful_timeout - 1, 1))


def post_worker_init(worker):
    """When a worker has its model."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000)  # 700, the default, looks in vain after every few requests: 3 % of a stream's time
    worker.log.info("Worker ready %.2f s after the fork", time.monotonic() - worker.born)
    serving[0] = worker.ready[0] = 1
    os.kill(worker.ppid, signal.SIGCHLD)  # wakes the master


def child_exit(server, worker):
    """When the master has noticed that a worker is gone."""
    server.supervisor.lost(worker)
