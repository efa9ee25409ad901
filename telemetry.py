"""What can be seen of the service: a line in the log for every request, and metrics.

No line has a field of a transaction in it but its id, nor a key. Metrics are shared by all processes through files in
memory, a set for each worker's place: who takes over a place goes on with its counters.
https://prometheus.github.io/client_python/multiprocess/
"""

import logging
import math
import os
import re
import sys
import threading
import time
from collections import Counter as Tally
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from functools import partial
from operator import attrgetter
from select import PIPE_BUF, select
from typing import Any

import msgspec
import numpy as np
from gunicorn.glogging import Logger
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest, values
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.multiprocess import MultiProcessCollector

from config import share_metrics
from model import CATEGORY, NUMBERS, Features, Floats, Model, Reference

PREFIX = "fraud_api"
# In the WSGI environment: what the application adds to the request's line, and the route it took.
RECORD, ROUTE = f"{PREFIX}.record", f"{PREFIX}.route"
TRACE_PARENT = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}(-.*)?")
LATENCIES = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10)
SIZES = (1, 10, 100, 1000, 10_000, 100_000, 1_000_000)
TOGETHER = 0.02  # seconds of requests that are logged and counted in one go
KEPT = 10_000  # lines, while nobody reads them; older ones are lost
PATIENCE = 0.1  # seconds that any other line waits for somebody to read
FEW = 16  # rows; fewer wait until they are counted together with others, more are counted at once


class Answer(msgspec.Struct, frozen=True, gc=False):
    """What there is to count and to log about a request."""

    time: float  # of its end, seconds since the epoch
    method: str
    path: str
    route: str
    status: int
    seconds: float | None
    record: dict[str, Any]
    trace_parent: str


class Metrics:
    """All metrics that there are; README explains them. With a folder they are those of all processes together."""

    def __init__(self, folder: str | None = None) -> None:
        self.folder, self.registry = folder, CollectorRegistry()
        self.place: object = "master"  # of this process among those that share the folder
        if folder:
            share_metrics(folder)
            values.ValueClass = values.MultiProcessValue(lambda: self.place)  # type: ignore[no-untyped-call]
        counter = partial(Counter, namespace=PREFIX, registry=self.registry)
        histogram = partial(Histogram, namespace=PREFIX, registry=self.registry)
        self.requests = counter("requests", "requests by route and status", ["route", "status"])
        self.seconds = histogram("request_seconds", "duration of a request", ["route"], buckets=LATENCIES)
        self.rows = counter("rows", "rows by decision: fraud, legitimate or invalid", ["decision"])
        self.batch_rows = histogram("batch_rows", "rows in a batch or stream", buckets=SIZES)
        self.deciles = counter("score_decile", "scores by decile of those at training", ["model_version", "decile"])
        self.unfamiliar = counter("unfamiliar_values", "values that training had none of, by field", ["field"])
        self.restarts = counter("worker_restarts", "workers that ended without being told to")
        self.failed_reloads = counter("failed_reloads", "times that a version could not be found or served")
        self.answered, self.counted = deque[Answer](), deque[Answer]()  # to count, then to log
        self.decided: deque[tuple[Sequence[Features], Floats, int]] = deque()  # rows, their scores, how many are fraud
        self.drift: Drift | None = None
        self.turn = threading.Lock()

    def answer(self, environ: Mapping[str, Any], status: int, seconds: float | None = None) -> None:
        """A request has come to its end, after so many seconds where that is known."""
        get = environ.get
        self.answered.append(
            Answer(
                time.time(),
                get("REQUEST_METHOD", "-"),
                get("PATH_INFO", "-"),
                get(ROUTE, "-"),
                status,
                seconds,
                get(RECORD, {}),
                get("HTTP_TRACEPARENT", ""),
            )
        )

    def settle(self) -> None:
        """Count what has been left to count. Many at a time it takes half of what it takes one by one."""
        with self.turn:  # the main loop and whoever asks for the metrics
            answers = [self.answered.popleft() for _ in range(len(self.answered))]
            try:
                self._settle(answers)
            finally:
                self.counted.extend(answers)  # also should counting fail: their lines come

    def _settle(self, answers: Sequence[Answer]) -> None:
        for (route, status), count in Tally((answer.route, answer.status) for answer in answers).items():
            self.requests.labels(route, status).inc(count)
        for route in {answer.route for answer in answers}:
            observe = self.seconds.labels(route).observe
            for answer in answers:
                if answer.route == route and answer.seconds is not None:
                    observe(answer.seconds)
        decided = [self.decided.popleft() for _ in range(len(self.decided))]
        if decided:
            rows = [row for part, _, _ in decided for row in part]
            scores = np.concatenate([scores for _, scores, _ in decided])
            self.count_now(rows, scores, sum(fraud for _, _, fraud in decided))

    def count(self, rows: Sequence[Features], scores: Floats, fraud: int) -> None:
        """Rows have been scored, and so many of them found to be fraud."""
        if len(rows) < FEW:
            self.decided.append((rows, scores, fraud))
        else:
            self.count_now(rows, scores, fraud)

    def count_now(self, rows: Sequence[Features], scores: Floats, fraud: int) -> None:
        self.rows.labels("fraud").inc(fraud)
        self.rows.labels("legitimate").inc(len(rows) - fraud)
        if self.drift:
            self.drift.observe(rows, scores)

    def text(self, model: Model) -> bytes:
        """Everything in Prometheus' text format; what is served and how long it took to load from this worker."""
        self.settle()
        registry: Any = CollectorRegistry() if self.folder else self.registry
        if self.folder:
            MultiProcessCollector(registry, self.folder)  # type: ignore[no-untyped-call]
        labels = {name: str(model.facts()[name]) for name in ("model_name", "model_version", "sha256", "scorer")}
        info = GaugeMetricFamily(f"{PREFIX}_model_info", "1, for what is served", labels=[*labels])
        info.add_metric([*labels.values()], 1)
        load = GaugeMetricFamily(f"{PREFIX}_model_load_seconds", "time to load it into a worker", model.load_seconds)
        shares = GaugeMetricFamily(
            f"{PREFIX}_score_decile_training_share",
            "share of the scores at training",
            labels=["model_version", "decile"],
        )
        if reference := model.metadata.reference:
            for decile, share in enumerate(reference.score_shares, 1):
                shares.add_metric([model.snapshot.version, str(decile)], share)
        return generate_latest(registry) + generate_latest(_Families([info, load, shares]))


class _Families:
    """What `generate_latest` takes for a registry."""

    def __init__(self, families: list[GaugeMetricFamily]) -> None:
        self.families = families

    def collect(self) -> list[GaugeMetricFamily]:
        return self.families


class Drift:
    """Counts how scores and values lie to those of training."""

    def __init__(self, reference: Reference, version: str, metrics: Metrics) -> None:
        self.limits, self.categories = np.array(reference.score_deciles), {*reference.categories}
        self.deciles = [metrics.deciles.labels(version, str(decile)) for decile in range(1, 11)]
        self.category = metrics.unfamiliar.labels(CATEGORY)
        ranges = reference.ranges
        self.numbers = [(attrgetter(name), *ranges[name], metrics.unfamiliar.labels(name)) for name in NUMBERS]

    def observe(self, rows: Sequence[Features], scores: Floats) -> None:
        places = np.bincount(np.searchsorted(self.limits, scores), minlength=10)
        for decile, count in zip(self.deciles, places.tolist(), strict=True):
            decile.inc(count)
        if unknown := {row.merchant_category for row in rows} - self.categories:
            self.category.inc(sum(row.merchant_category in unknown for row in rows))
        for value_of, low, high, counter in self.numbers:
            values = np.fromiter(map(value_of, rows), np.float64, len(rows))
            if outside := np.count_nonzero((values < low) | (values > high)):
                counter.inc(int(outside))


class Log(Logger):  # type: ignore[misc]
    """gunicorn's log as lines of JSON on standard output, or for people where that is a terminal.

    What other libraries log goes the same way, from WARNING on, and nothing with a secret in it.
    """

    mask: Callable[[str], str]
    metrics: Metrics

    def setup(self, cfg: Any) -> None:
        super().setup(cfg)
        self.human, self.lines, self.flushed = sys.stdout.isatty(), deque[bytes](maxlen=KEPT), 0.0
        handler = logging.StreamHandler(Output())
        handler.setFormatter(Lines(type(self).mask, self.human))
        logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
        for logger in (self.error_log, logging.getLogger("mlflow")):
            logger.handlers, logger.propagate = [], True
        logging.captureWarnings(True)

    def access(self, resp: Any, req: Any, environ: Mapping[str, Any], request_time: timedelta) -> None:
        """gunicorn calls this when the last byte of an answer is sent, or cannot be."""
        self.metrics.answer(environ, resp.status_code, max(request_time.total_seconds(), 0))  # clocks are set back

    def line(self, answer: Answer) -> bytes:
        now = datetime.fromtimestamp(answer.time, UTC)
        line = {"time": now, "level": "info", "logger": "request", "method": answer.method}
        line |= {"path": answer.path[:256], "status": answer.status}
        if answer.seconds is not None:
            line["duration_ms"] = round(answer.seconds * 1000, 3)
        line |= answer.record
        if found := TRACE_PARENT.fullmatch(answer.trace_parent):
            line["trace_id"] = found[1]
        if self.human:
            values = " ".join(ascii(value).strip("'") for value in [*line.values()][3:])
            return f"{now:%H:%M:%S} {values}\n".encode()
        return msgspec.json.encode(line) + b"\n"

    def flush(self, now: float = math.inf) -> None:
        """Count requests, then write their lines, in the worker's main loop, some at a time.

        In each thread for itself it would cost a request 40 µs. No more is written at once than a pipe takes whole
        from one of many writers (pipe(7), PIPE_BUF).
        """
        if now - self.flushed < TOGETHER:
            return
        self.flushed = time.monotonic()
        wanted, counted = self.error_log.isEnabledFor(logging.INFO), self.metrics.counted
        try:
            self.metrics.settle()
            while counted:
                answer = counted.popleft()
                if wanted:
                    self.lines.append(self.line(answer))
        except Exception:  # must not end the worker
            self.error_log.exception("requests are not counted or not logged")
        output = sys.stdout.fileno()
        while self.lines and select([], [output], [], 0)[1]:  # who does not read it holds up nobody
            text = self.lines.popleft()
            while self.lines and len(text) + len(self.lines[0]) <= PIPE_BUF:
                text += self.lines.popleft()
            with suppress(OSError):  # nobody reads it any longer
                os.write(output, text)


class Output:
    """Standard output that holds up nobody: what has not gone into the pipe in a while is lost."""

    def write(self, text: str) -> None:
        """In pieces that a pipe takes whole if it takes anything (pipe(7))."""
        output, data = sys.stdout.fileno(), text.encode()
        for start in range(0, len(data), PIPE_BUF):
            if not select([], [output], [], PATIENCE)[1]:
                return
            os.write(output, data[start : start + PIPE_BUF])

    def flush(self) -> None:
        """There is nothing to flush."""


class Lines(logging.Formatter):
    """What is logged about anything but a request."""

    def __init__(self, mask: Callable[[str], str], human: bool) -> None:
        super().__init__()
        self.mask, self.human = mask, human

    def format(self, record: logging.LogRecord) -> str:
        message = self.mask(record.getMessage()).encode(errors="replace").decode()
        trace = self.mask(self.formatException(record.exc_info)) if record.exc_info else ""
        now = datetime.fromtimestamp(record.created, UTC)
        if self.human:
            return f"{now:%H:%M:%S} [{record.process}] [{record.levelname}] {message}" + f"\n{trace}" * bool(trace)
        line = {"time": now, "level": record.levelname.lower(), "logger": record.name, "pid": record.process}
        return msgspec.json.encode(line | {"message": message} | ({"exception": trace} if trace else {})).decode()
