"""The service without shared memory: each worker imports the libraries itself."""

import os
from pathlib import Path

import msgspec

bind = f"127.0.0.1:{os.environ['PORT']}"
workers = 1
threads = 4
worker_class = "gthread"
worker_tmp_dir = "/dev/shm"
control_socket_disable = True


def post_fork(server, worker):
    import fraud_api  # noqa: PLC0415
    from model import Snapshot  # noqa: PLC0415

    fraud_api.process.snapshot = msgspec.json.decode(Path(os.environ["SNAPSHOT"]).read_bytes(), type=Snapshot)
