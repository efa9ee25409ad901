"""How gunicorn runs the service: one model version fetched in the master, loaded by each worker after the fork.

gunicorn finds this file by itself in the folder it is started in.
https://gunicorn.org/reference/settings/
"""

import atexit
import gc
import os
import signal
import sys
import time

sys.dont_write_bytecode = True  # the service writes no file to any disk

from config import INTERRUPTS, prepare

started = time.monotonic()
if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:  # not again at a reload: gunicorn has its own by then
    for number in INTERRUPTS:
        signal.signal(number, lambda number, _: sys.exit(128 + number))
settings = prepare("fraud-api")

import fraud_api  # imports the numeric libraries, which read the environment that `prepare` made
from model import ModelError, acquire, release

wsgi_app = "fraud_api:get_app()"
bind = f"[{settings.host}]:{settings.port}" if ":" in settings.host else f"{settings.host}:{settings.port}"
workers = settings.web_concurrency
threads = settings.threads  # 4: at 16 connections 8 % less requests/s than 8 threads, and half the p99 (12 for 23 ms)
worker_class = "gthread"
loglevel = settings.log_level
worker_tmp_dir = settings.memory_dir
control_socket_disable = True  # it would make a file under $HOME


def on_starting(server):
    """Before the first worker: log the configuration, fetch the model, or end with one line."""
    server.log.info("%r", settings)
    try:
        fraud_api.snapshot = acquire(settings, settings.model_load_timeout - (time.monotonic() - started))
    except ModelError as error:
        server.log.critical("cannot serve %s", error)
        sys.exit(1)
    atexit.register(clean_up, os.getpid())
    server.log.info("serving %s %s", fraud_api.snapshot.name, fraud_api.snapshot.version)
    gc.collect()
    gc.freeze()  # what is imported stays out of the collector's way, in memory shared with the workers


def clean_up(master):
    """However the master ends; the workers inherit this with the fork and are not to do it."""
    if os.getpid() == master:
        release(fraud_api.snapshot)


def post_fork(server, worker):
    """First thing in a worker."""
    worker.forked = time.monotonic()


def post_worker_init(worker):
    """When a worker has its model."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000)  # 700, the default, looks in vain after every few requests: 3 % of a stream's time
    worker.log.info("Worker ready %.2f s after the fork", time.monotonic() - worker.forked)
