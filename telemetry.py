"""What can be seen of the service: a line in the log for every request, and metrics for Prometheus.

The log never has a field of a transaction in it other than its id, nor a key. Metrics are numbers in shared memory,
made by the master before it forks: each process adds to a block of its own, and `/metrics` adds up all blocks.
"""

import logging
import math
import mmap
import os
import re
import sys
import threading
import time
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from functools import partial
from http import HTTPStatus
from select import PIPE_BUF, select
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
from gunicorn.glogging import Logger
from prometheus_client import Metric, generate_latest
from prometheus_client.utils import floatToGoString

from model import CATEGORY, FIELDS, Columns, Model, Reference

# Keys of the WSGI environment: what the application adds to the request's log line, and the route.
LOG_FIELDS, ROUTE = "fraud_api.log_fields", "fraud_api.route"
TRACE_PARENT = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}(-.*)?")
MOST_LINES = 100_000  # lines that wait to be written; more are lost
WRITE_SECONDS = 0.005  # the writer collects lines for this long
STALL_SECONDS = 0.1  # a reader of the log that takes nothing for this long has stalled

ROUTES = (
    *("/", "/predict", "/predict/batch", "/health", "/health/live", "/health/ready"),
    *("/metrics", "/openapi.json", "/version", "-"),
)
STATUSES = (200, *(status.value for status in HTTPStatus if status >= HTTPStatus.BAD_REQUEST))
SECONDS = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, math.inf)
LIMITS = [str(floatToGoString(limit)) for limit in SECONDS]  # type: ignore[no-untyped-call]
DECILES = range(1, 11)
# name: type, help, label names
METRICS = {
    "requests": ("counter", "requests by route and status", ("route", "status")),
    "request_seconds": ("histogram", "duration of a request", ("route", "le")),
    "rows": ("counter", "rows by decision: fraud, legitimate or invalid", ("decision",)),
    "score_decile": ("counter", "scores by decile of the training scores", ("decile", "registry_version")),
    "unfamiliar_values": ("counter", "values that training had none of, by field", ("field",)),
    "worker_restarts": ("counter", "workers that ended without being told to", ()),
    "failed_reloads": ("counter", "looks at the registry that found no version to serve", ()),
    "log_lines_lost": ("counter", "log lines lost because the log was not read fast enough", ()),
    "score_decile_training_share": ("gauge", "share of the training scores", ("decile", "registry_version")),
    "model_info": ("gauge", "1, for what is served", ("model_name", "model_version", "sha256", "scorer")),
}
# Every counter and its labels: (name, what the sample's name ends in, value of each label).
CELLS: list[tuple[Any, ...]] = [
    *(("score_decile", "_total", decile) for decile in DECILES),
    *(("requests", "_total", route, status) for route in ROUTES for status in STATUSES),
    *(("request_seconds", "_bucket", route, limit) for route in ROUTES for limit in LIMITS),
    *(("request_seconds", end, route) for route in ROUTES for end in ("_count", "_sum")),
    *(("rows", "_total", decision) for decision in ("fraud", "legitimate", "invalid")),
    *(("unfamiliar_values", "_total", field) for field in FIELDS),
    *((name, "_total") for name in ("worker_restarts", "failed_reloads", "log_lines_lost")),
]


class Metrics:
    """All metrics, as k8s/README.md explains them. A block is an array: the model's version, then a number per cell."""

    def __init__(self, blocks: int = 1) -> None:
        self.cells = {cell: number for number, cell in enumerate(CELLS, 1)}
        self.blocks = np.frombuffer(mmap.mmap(-1, blocks * (1 + len(CELLS)) * 8)).reshape(blocks, -1)
        self.lock = threading.Lock()
        self.use(0, -1)

    def use(self, block: int, version: float) -> None:
        """Add to this block from now on, on top of what an earlier process counted there for the same version."""
        self.own = self.blocks[block]
        self.own[0] = version

    def free_block(self, taken: Collection[int], version: float) -> int:
        """A block that no process adds to, unused or with the scores of this version."""
        fitting = (n for n, block in enumerate(self.blocks) if n not in taken and block[0] in (0, version))
        return next(fitting, len(self.blocks) - 1)

    def add(self, name: str, *labels: object, by: float = 1) -> None:
        """Add to a counter."""
        with self.lock:
            self.own[self.cells[name, "_total", *labels]] += by

    def answered(self, route: str, status: int, seconds: float | None) -> None:
        """Count a request, and its duration where that is known."""
        own, cells = self.own, self.cells
        with self.lock:
            own[cells["requests", "_total", route, status]] += 1
            if seconds is not None:
                first = cells["request_seconds", "_bucket", route, LIMITS[bisect_left(SECONDS, seconds)]]
                own[first : cells["request_seconds", "_bucket", route, "+Inf"] + 1] += 1  # cumulative
                own[cells["request_seconds", "_count", route]] += 1
                own[cells["request_seconds", "_sum", route]] += seconds

    def text(self, model: Model) -> bytes:
        """Everything in Prometheus' text format; what is served is this worker's."""
        families = {name: Metric(f"fraud_api_{name}", text, kind) for name, (kind, text, _) in METRICS.items()}
        for (name, suffix, *labels), value in [*self.counts(), *gauges(model)]:
            named = dict(zip(METRICS[name][2], map(str, labels), strict=False))  # sums have no `le`
            families[name].add_sample(f"fraud_api_{name}{suffix}", named, value)
        return generate_latest(SimpleNamespace(collect=families.values))

    def counts(self) -> Iterator[tuple[tuple[Any, ...], float]]:
        """Every cell and its number over all processes, but for combinations of route and status without requests."""
        used = self.blocks[: next((n for n, block in enumerate(self.blocks) if not block[0]), None)]
        for cell, number in zip(CELLS, used.sum(axis=0)[1:].tolist(), strict=True):
            if cell[0] != "score_decile" and (number or cell[0] != "requests"):
                yield cell, number
        for version in {*used[:, 0].tolist()} - {-1}:
            counts = used[used[:, 0] == version].sum(axis=0)[1 : len(DECILES) + 1]
            yield from (((*cell, f"{version:.0f}"), number) for cell, number in zip(CELLS, counts, strict=False))


def gauges(model: Model) -> Iterator[tuple[tuple[Any, ...], float]]:
    """What is served, and the shares of its deciles at training."""
    facts = model.facts()
    yield ("model_info", "", *(facts[name] for name in METRICS["model_info"][2])), 1
    if model.metadata.reference:
        for decile, share in zip(DECILES, model.metadata.reference.score_shares, strict=True):
            yield ("score_decile_training_share", "", decile, model.snapshot.number), share


class ScoreCounter:
    """Counts scored rows: their decisions, and how scores and values compare with those of training (drift)."""

    def __init__(self, reference: Reference | None, metrics: Metrics) -> None:
        self.reference, self.metrics = reference, metrics
        self.categories = frozenset(reference.categories if reference else ())

    def count(self, columns: Columns, scores: Sequence[float], fraud: int) -> None:
        self.metrics.add("rows", "fraud", by=fraud)
        self.metrics.add("rows", "legitimate", by=len(scores) - fraud)
        if self.reference:
            places = Counter(bisect_left(self.reference.score_deciles, score) for score in scores)
            for place, count in places.items():
                self.metrics.add("score_decile", place + 1, by=count)
            for field, values in zip(FIELDS, columns, strict=True):
                if unfamiliar := self.unfamiliar(field, values):
                    self.metrics.add("unfamiliar_values", field, by=unfamiliar)

    def count_invalid(self, count: int) -> None:
        self.metrics.add("rows", "invalid", by=count)

    def unfamiliar(self, field: str, values: Sequence[Any]) -> int:
        """How many of a field's values training had none of: unknown categories, numbers outside the range."""
        if field == CATEGORY:
            known = self.categories.issuperset(values)
            return 0 if known else sum(value not in self.categories for value in values)
        low, high = self.reference.ranges[field]  # type: ignore[union-attr]
        return 0 if low <= min(values) and max(values) <= high else sum(not low <= value <= high for value in values)


class Output(logging.Handler):
    """Standard output with a bounded queue: single requests never wait for its reader, and lost lines are counted."""

    def __init__(self, lost: Callable[..., None], mask: Callable[[str], str]) -> None:
        super().__init__()
        self.lost, self.mask, self.lines, self.writing = lost, mask, deque[bytes](), threading.Lock()
        self.wanted: threading.Event | None = None  # in a process that writes from a thread
        os.register_at_fork(after_in_child=self.lines.clear)  # the parent writes what it had queued

    def start(self) -> None:
        """Write from a thread from now on. In a process that forks, each line is written at once instead."""
        self.wanted = threading.Event()
        threading.Thread(target=self.run, args=[self.wanted], daemon=True).start()

    def run(self, wanted: threading.Event) -> None:
        while True:
            wanted.wait(timeout=1)  # or look again whether a reader that had stalled goes on
            time.sleep(WRITE_SECONDS)
            wanted.clear()
            self.drain()

    def put(self, line: dict[str, Any]) -> None:
        """Queue a line, or lose it if the queue is full."""
        if len(self.lines) < MOST_LINES:
            self.lines.append(msgspec.json.encode(line) + b"\n")
        else:
            self.lost()
        if not self.wanted:
            self.drain()
        elif not self.wanted.is_set():
            self.wanted.set()

    def drain(self) -> None:
        """Write what waits, in pieces that a pipe takes whole (pipe(7), PIPE_BUF), until the reader stalls."""
        descriptor = sys.stdout.fileno()
        with self.writing:
            while self.lines and select([], [descriptor], [], STALL_SECONDS)[1]:
                text = self.lines.popleft()
                while self.lines and len(text) + len(self.lines[0]) <= PIPE_BUF:
                    text += self.lines.popleft()
                try:
                    os.write(descriptor, text)
                except OSError:
                    self.lost(by=text.count(b"\n"))

    def emit(self, record: logging.LogRecord) -> None:
        """What is logged about anything but a request."""
        line = {"time": datetime.fromtimestamp(record.created, UTC), "level": record.levelname.lower()}
        line |= {"logger": record.name, "pid": record.process, "message": self.clean(record.getMessage())}
        if record.exc_info:
            line["exception"] = self.clean(logging.Formatter().formatException(record.exc_info))
        self.put(line)

    def clean(self, text: str) -> str:
        return self.mask(text).encode(errors="replace").decode()


class Log(Logger):  # type: ignore[misc]
    """gunicorn's log as lines of JSON on standard output.

    Other libraries log to it as well, from WARNING on. Secrets are masked.
    """

    mask: Callable[[str], str]
    metrics: Metrics

    def setup(self, cfg: Any) -> None:
        super().setup(cfg)
        self.output = Output(partial(self.metrics.add, "log_lines_lost"), type(self).mask)
        logging.basicConfig(handlers=[self.output], level=logging.WARNING, force=True)
        for logger in (self.error_log, logging.getLogger("mlflow")):
            logger.handlers, logger.propagate = [], True
        logging.captureWarnings(True)

    def access(self, resp: Any, req: Any, environ: Mapping[str, Any], request_time: timedelta) -> None:
        """gunicorn calls this when the last byte of an answer is sent, or cannot be."""
        self.answered(environ, int(resp.status[:3]), max(request_time.total_seconds(), 0))  # the clock may be set back

    def answered(self, environ: Mapping[str, Any], status: int, seconds: float | None = None) -> None:
        """Count a request and log its line."""
        self.metrics.answered(environ.get(ROUTE, "-"), status, seconds)
        if self.error_log.isEnabledFor(logging.INFO):
            line = {"time": datetime.now(UTC), "level": "info", "logger": "request"}
            path = environ.get("PATH_INFO", "-")[:256]
            line |= {"method": environ.get("REQUEST_METHOD", "-")}
            line |= {"path": path if ROUTE in environ else self.output.clean(path)}
            line |= {"status": status} | ({} if seconds is None else {"duration_ms": round(seconds * 1000, 3)})
            line |= environ.get(LOG_FIELDS, {})
            if found := TRACE_PARENT.fullmatch(environ.get("HTTP_TRACEPARENT", "")):
                line["trace_id"] = found[1]
            self.output.put(line)
