"""How gunicorn runs the service. gunicorn reads this file from the folder that it is started in.

The master fetches one version of the model; each worker loads it after the fork. See server.py for what is done
otherwise than gunicorn does it. https://gunicorn.org/reference/settings/
"""

import gc
import os
import resource
import shutil
import signal
import socket
import sys
import time

sys.dont_write_bytecode = True  # the service writes no file to any disk
gc.set_threshold(10_000)  # with the default of 700, collections take a tenth of a start and 3 % of a stream's time

from config import LOOPBACK_ONLY, prepare

for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):  # until gunicorn has its own handlers
    signal.signal(number, lambda number, _: sys.exit(128 + number))
settings = prepare("fraud-api")
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # each connection takes a descriptor

import fraud_api  # imports the numeric libraries, which read the environment that `prepare` has made
import telemetry
from model import ModelError, acquire, new_folder
from server import Supervisor, Worker, announce, close_connection, current, shared_flag

METRICS_BLOCKS = 4096  # a new one for each worker of a new version
process = fraud_api.process
process.stopping, process.metrics = shared_flag(), telemetry.Metrics(METRICS_BLOCKS)
process.close_connection = close_connection
Worker.settings = settings
telemetry.Log.mask, telemetry.Log.metrics = settings.mask, process.metrics

wsgi_app = "fraud_api:get_app()"
logger_class = telemetry.Log
bind = f"[{settings.host}]:{settings.port}" if ":" in settings.host else f"{settings.host}:{settings.port}"
workers = settings.web_concurrency
worker_class = Worker
threads = settings.max_connections
worker_connections = threads + threads // 2  # gunicorn keeps worker_connections - threads idle connections open
keepalive = 75  # longer than proxies keep idle connections, or they send a request on one that was just closed
graceful_timeout = settings.graceful_timeout - settings.drain_seconds - 1  # 1 s is left for the master itself
timeout = graceful_timeout + 10  # seconds without a sign of life, after which the master kills a worker
loglevel = settings.log_level
worker_tmp_dir = settings.memory_dir
control_socket_disable = True  # it would be a file under $HOME


def on_starting(server):
    """Before the first worker: log the configuration, fetch the model, or end with one line."""
    server.log.info("%r", settings)
    server.cfg.set("reuse_port", False)  # each worker would open sockets that `when_ready` does not check
    try:
        server.folder = new_folder(settings.memory_dir)
        process.snapshot = acquire(settings, server.folder)
    except BaseException as error:
        on_exit(server)
        if not isinstance(error, ModelError):
            raise
        server.log.critical("cannot serve %s", error)
        sys.exit(1)
    announce(server.log, "serving", process.snapshot)
    server.supervisor = Supervisor(server, settings, server.folder)
    gc.collect()
    gc.freeze()  # the collector leaves alone what is imported, so that the workers share its memory


def on_exit(server):
    """The master ends."""
    if hasattr(server, "supervisor"):
        server.supervisor.steps.close()
    if hasattr(server, "folder"):
        shutil.rmtree(server.folder, ignore_errors=True)


def when_ready(server):
    """Check the sockets, and let the kernel keep connections until data arrives on them (tcp(7))."""
    for listener in server.LISTENERS:
        if listener.sock.family in (socket.AF_INET, socket.AF_INET6):
            host = listener.sock.getsockname()[0]
            if not settings.may_listen_on(host):  # by gunicorn --bind, or a socket that was handed over
                server.log.critical("cannot listen on %s: expected %s", host, LOOPBACK_ONLY)
                on_exit(server)
                sys.exit(1)
            listener.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, settings.slow_seconds)


def pre_fork(server, worker):
    """Give the new worker a block of the metrics."""
    taken = {0, *(other.block for other in server.WORKERS.values())}  # 0 is the master's
    worker.block = process.metrics.free_block(taken, int(worker.snapshot.number))


def post_fork(server, worker):
    """Metrics of its own, and a time limit for loading the model."""
    if worker.age > server.cfg.workers:
        server.WORKER_BOOT_ERROR = 1  # gunicorn ends the service if a worker exits with 3; only the first ones may
    signal.alarm(settings.model_load_timeout)  # ends a worker that hangs while it loads
    process.metrics.use(worker.block, int(worker.snapshot.number))
    process.log_line, process.write_log = worker.log.output.put, worker.log.output.drain


def pre_request(worker, request):
    """So that `close_connection` finds it. A worker that is full keeps no connection."""
    current.request = request
    if len(worker.conns) > worker.cfg.threads:
        request.force_close()


def post_worker_init(worker):
    """The worker has its model."""
    signal.alarm(0)
    gc.collect()
    gc.freeze()
    sys.setswitchinterval(0.0005)  # with the default of 5 ms, connections are refused too slowly under overload
    worker.log.info("Worker ready %.2f s after the fork", time.monotonic() - worker.born)
    worker.log.output.start()
    worker.ready[0] = 1
    os.kill(worker.ppid, signal.SIGCHLD)  # wakes the master


def child_exit(server, worker):
    """The master has noticed that a worker has ended."""
    server.supervisor.lost(worker)


def worker_exit(server, worker):
    """Last thing in a worker: write what is left of the log."""
    if not worker.ready[0]:
        time.sleep(1)  # the master starts the next one at once
    worker.log.output.drain()
