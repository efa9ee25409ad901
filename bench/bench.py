"""Compares this service with FastAPI + PyFunc, `mlflow models serve` and a bare gunicorn, all in one run.

`make bench` runs it. All servers have the same registered model and share one core; the load comes from another core
where there is one. Rounds are interleaved, and figures are medians. Ratios go into README.md, all figures into
bench/results.md and bench/results.png.
"""

from config import prepare

if __name__ == "__main__":
    prepare("bench")

import argparse
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path

import matplotlib as mpl
import mlflow
import msgspec
import numpy as np
import treelite

import data
import train
import versions
from bench.tables import write_table
from config import Config
from model import FIELDS, LeafMaskScorer, acquire

mpl.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
BIN = Path(sys.executable).parent
CORES = sorted(os.sched_getaffinity(0))
SERVER_CORE, LOAD_CORE = CORES[0], CORES[-1]
THIS, FASTAPI, MLFLOW, FLOOR = "fraud-api", "FastAPI + PyFunc", "mlflow models serve", "bare gunicorn"
QUIET, EXPLAINED = "fraud-api without request log", "fraud-api with explain=true"
RECORDED = "fraud-api with LOG_DECISIONS=true"
LIBRARIES = TREELITE, ONNX, SKLEARN = "treelite", "onnxruntime", "scikit-learn"
PEERS = FASTAPI, MLFLOW, FLOOR
PATHS = {MLFLOW: "/invocations", EXPLAINED: "/predict?explain=true"}
TREES = (30, 150, 500)
BATCH, LINES = 1000, 200_000
CALLS = {1: 500, 100: 100, 10_000: 1}  # rows in a call: calls in a round
Server = AbstractContextManager[subprocess.Popen[bytes]]


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


# -- the servers -------------------------------------------------------------------------------------------------------


@contextmanager
def server(*command: str, port: int, ready: str, **environ: str) -> Iterator[subprocess.Popen[bytes]]:
    """A server on its core, when it answers."""
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            ["taskset", "-c", str(SERVER_CORE), *command],
            env=os.environ
            | {"PORT": str(port), "PYTHONPATH": f"{HERE.parent}:{HERE}", "PATH": f"{BIN}:{os.environ['PATH']}"}
            | environ,
            cwd=HERE.parent,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            wait_for(f"http://127.0.0.1:{port}{ready}", process, log)
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, 15)
            process.wait(30)


def wait_for(url: str, process: subprocess.Popen[bytes], log: object) -> None:
    deadline = time.monotonic() + 120
    while True:
        try:
            urllib.request.urlopen(url, timeout=2).close()
        except OSError:
            if process.poll() is not None or time.monotonic() > deadline:
                log.seek(0)
                sys.exit(f"bench: {url} does not answer\n{log.read().decode()}")
            time.sleep(0.1)
        else:
            return


def service(port: int, trees: int, **environ: str) -> Server:
    environ |= {"MODEL_URI": f"models:/bench-{trees}@champion", "WEB_CONCURRENCY": "1", "MODEL_LOAD_TIMEOUT": "120"}
    return server(str(BIN / "gunicorn"), port=port, ready="/health/ready", **environ)


def peers(stack: ExitStack, port: int) -> dict[str, int]:
    """Start all servers; idle ones take no CPU while another is measured. name: port"""
    uri = "models:/bench-150@champion"
    stack.enter_context(service(port, 150))
    uvicorn = [str(BIN / "uvicorn"), "peer_fastapi:app", "--port", str(port + 1), "--no-access-log"]
    stack.enter_context(server(*uvicorn, port=port + 1, ready="/docs", MODEL_URI=uri))
    serve = [str(BIN / "mlflow"), "models", "serve", "-m", uri, "-p", str(port + 2), "--env-manager", "local"]
    stack.enter_context(server(*serve, port=port + 2, ready="/ping"))
    hello = [str(BIN / "gunicorn"), "-c", "/dev/null", "-b", f"127.0.0.1:{port + 3}", "-k", "gthread", "--threads", "4"]
    hello += ["--no-control-socket", "--worker-tmp-dir", "/dev/shm", "peer_hello:app"]
    stack.enter_context(server(*hello, port=port + 3, ready="/", WEB_CONCURRENCY="1"))
    stack.enter_context(service(port + 7, 150, LOG_DECISIONS="true"))
    stack.enter_context(service(port + 8, 150, LOG_LEVEL="warning"))
    ports = {THIS: port, QUIET: port + 8, EXPLAINED: port, RECORDED: port + 7}
    return ports | {FASTAPI: port + 1, MLFLOW: port + 2, FLOOR: port + 3}


# -- the load ----------------------------------------------------------------------------------------------------------


def wrk(url: str, body: Path, connections: int, seconds: int) -> dict[str, float]:
    """Requests per second, and milliseconds of the median and the 99th percentile."""
    command = ["taskset", "-c", str(LOAD_CORE), "wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--latency"]
    command += ["--timeout", "10s", "-s", str(HERE / "post.lua"), url]
    output = subprocess.run(command, env=os.environ | {"BODY": str(body)}, capture_output=True, text=True, check=True)
    if re.search("Non-2xx|Socket errors", output.stdout):
        sys.exit(f"bench: {url} answers with errors\n{output.stdout}")
    rate = re.search(r"Requests/sec:\s+([\d.]+)", output.stdout)
    latency = dict(re.findall(r"(50|99)%\s+([\d.]+[mu]?s)", output.stdout))
    return {"rate": float(rate[1]), "p50": milliseconds(latency["50"]), "p99": milliseconds(latency["99"])}


def milliseconds(text: str) -> float:
    for unit, factor in (("us", 1e-3), ("ms", 1.0), ("s", 1e3)):
        if text.endswith(unit):
            return float(text.removesuffix(unit)) * factor
    raise ValueError(text)


def stream(port: int, lines: Path) -> float:
    """Rows per second of one `curl -T` of a file of JSON lines."""
    command = ["taskset", "-c", str(LOAD_CORE), "curl", "-sfT", str(lines), "-X", "POST", "-o", "/dev/null"]
    command += ["-H", "Content-Type: application/x-ndjson", "-H", "Expect:", "-w", "%{time_total}"]
    done = subprocess.run(
        [*command, f"http://127.0.0.1:{port}/predict/batch"], capture_output=True, text=True, check=True
    )
    return LINES / float(done.stdout)


# -- scorers in this process -------------------------------------------------------------------------------------------


def scorers(pipeline: object, rows: object) -> dict[str, Callable[[int], object]]:
    """Functions that score the first n rows, on one thread. This scorer takes values; the others an encoded array."""
    masks, columns = LeafMaskScorer(pipeline), [rows[name].tolist() for name in FIELDS]
    array = np.asarray(pipeline[:-1].transform(rows), np.float64)
    forest, session = treelite.sklearn.import_model(pipeline[-1]), onnx_session(pipeline[-1])
    float32 = array.astype(np.float32)
    return {
        THIS: lambda n: masks([values[:n] for values in columns]),
        TREELITE: lambda n: treelite.gtil.predict(forest, array[:n], nthread=1),
        ONNX: lambda n: session.run(None, {"X": float32[:n]}),
        SKLEARN: lambda n: pipeline[-1].predict_proba(array[:n]),
    }


def onnx_session(estimator: object) -> object:
    """The model in onnxruntime. skl2onnx 1.20 gives booleans where protobuf 7 takes only integers: convert them."""
    import onnx  # noqa: PLC0415
    from onnxruntime import InferenceSession, SessionOptions  # noqa: PLC0415
    from skl2onnx import to_onnx  # noqa: PLC0415

    make = onnx.helper.make_attribute
    onnx.helper.make_attribute = lambda key, value, *more, **others: make(
        key, [*map(int, value)] if key == "nodes_missing_value_tracks_true" else value, *more, **others
    )
    options = SessionOptions()
    options.intra_op_num_threads = 1
    document = to_onnx(estimator, np.zeros((1, len(FIELDS)), np.float32), options={"zipmap": False})
    return InferenceSession(document.SerializeToString(), options)


def seconds_per_call(score: Callable[[int], object], rows: int, calls: int) -> float:
    """On the core of the servers."""
    os.sched_setaffinity(0, {SERVER_CORE})
    started = time.perf_counter()
    for _ in range(calls):
        score(rows)
    seconds = time.perf_counter() - started
    os.sched_setaffinity(0, CORES)
    return seconds / calls


# -- the measurements --------------------------------------------------------------------------------------------------


def measure(folder: Path, rounds: int, seconds: int, port: int) -> dict[tuple[str, ...], float]:
    """All figures of the run, medians over the rounds."""
    found: dict[tuple[str, ...], list[float]] = defaultdict(list)
    bodies = write_bodies(folder)
    alone = scorers(mlflow.sklearn.load_model("models:/bench-150@champion"), data.generate(LINES, 7).rows)
    with ExitStack() as stack:
        say("starting the servers")
        ports = peers(stack, port)
        sizes = {trees: port + 3 + n for n, trees in enumerate(TREES, start=1)}
        for trees, own in sizes.items():
            stack.enter_context(service(own, trees))
        for number in range(1, rounds + 1):
            say(f"round {number}/{rounds}: single transactions")
            for connections in (1, 16):
                for name, own in ports.items():
                    if name != RECORDED:
                        path, body = PATHS.get(name, "/predict"), bodies["mlflow" if name == MLFLOW else "one"]
                        result = wrk(f"http://127.0.0.1:{own}{path}", body, connections, seconds)
                        for figure, value in result.items():
                            found[name, str(connections), figure].append(value)
            say(f"round {number}/{rounds}: batches of {BATCH}")
            for name in (THIS, RECORDED, FASTAPI, MLFLOW):
                path, body = ("/invocations", "mlflow batch") if name == MLFLOW else ("/predict/batch", "batch")
                rate = wrk(f"http://127.0.0.1:{ports[name]}{path}", bodies[body], 2, seconds)["rate"] * BATCH
                found[name, "batch"].append(rate)
            say(f"round {number}/{rounds}: stream of {LINES} lines, models of {TREES} trees, scorers")
            found[THIS, "stream"].append(stream(ports[THIS], bodies["lines"]))
            found[SKLEARN, "stream"].append(LINES / seconds_per_call(alone[SKLEARN], LINES, 1))
            for trees, own in sizes.items():
                for figure, value in wrk(f"http://127.0.0.1:{own}/predict", bodies["one"], 1, seconds).items():
                    found[THIS, f"{trees} trees", figure].append(value)
            for rows, calls in CALLS.items():
                for name, score in alone.items():
                    found[name, f"{rows} rows"].append(1e6 * seconds_per_call(score, rows, calls))
    return {key: statistics.median(values) for key, values in found.items()}


def write_bodies(folder: Path) -> dict[str, Path]:
    """The requests, as files. name: path"""
    records = data.generate(LINES, 7).rows.to_dict("records")
    rows = [{"transaction_id": f"tx_{number:06}", **row} for number, row in enumerate(records)]
    contents = {
        "one": json.dumps(rows[0]),
        "batch": json.dumps({"transactions": rows[:BATCH]}),
        "mlflow": json.dumps({"dataframe_records": records[:1]}),
        "mlflow batch": json.dumps({"dataframe_records": records[:BATCH]}),
        "lines": "".join(json.dumps(row) + "\n" for row in rows),
    }
    for name, text in contents.items():
        (folder / name).write_text(text)
    return {name: folder / name for name in contents}


def processes(folder: Path, port: int) -> dict[str, tuple[float, float]]:
    """Private memory of a worker in MB and seconds from fork to ready, shared and not."""
    snapshot = acquire(Config.from_environ(os.environ | {"MODEL_URI": "models:/bench-150@champion"}), folder)
    (folder / "snapshot").write_bytes(msgspec.json.encode(snapshot))
    unshared = [str(BIN / "gunicorn"), "-c", str(HERE / "unshared.conf.py"), "fraud_api:get_app()"]
    environ = {"SNAPSHOT": str(folder / "snapshot")}
    return {
        "shared": worker_figures(service(port + 9, 150), port + 9),
        "unshared": worker_figures(server(*unshared, port=port + 9, ready="/health/ready", **environ), port + 9),
    }


def worker_figures(started_server: Server, port: int) -> tuple[float, float]:
    """Private megabytes of the worker after some requests; seconds from a kill to the next worker's first answer."""
    with started_server as process:
        master = process.pid
        for _ in range(200):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health/ready").close()
        worker = int(Path(f"/proc/{master}/task/{master}/children").read_text().split()[0])
        private = sum(map(int, re.findall(r"Private_\w+:\s+(\d+)", Path(f"/proc/{worker}/smaps_rollup").read_text())))
        os.kill(worker, 9)
        started = time.perf_counter()
        urllib.request.urlopen(f"http://127.0.0.1:{port}/health/ready", timeout=60).close()
        return private / 1024, time.perf_counter() - started


# -- the report --------------------------------------------------------------------------------------------------------


UNITS = {"rate": "requests/s", "p50": "p50 ms", "p99": "p99 ms"}
MANY, FIRST = ("16", "rate"), ("1", "p50")
RATIOS = [
    ("single transactions, 16 connections, against bare gunicorn", "{:.0%}", (THIS, *MANY), (FLOOR, *MANY)),
    ("against FastAPI + PyFunc", "{:.0f}×", (THIS, *MANY), (FASTAPI, *MANY)),
    ("with request log against without", "{:.0%}", (THIS, *MANY), (QUIET, *MANY)),
    ("with `explain=true` against without", "{:.0%}", (EXPLAINED, *MANY), (THIS, *MANY)),
    ("p50 of FastAPI + PyFunc against this, 1 connection", "{:.0f}×", (FASTAPI, *FIRST), (THIS, *FIRST)),
    ("500 trees against 30, 1 connection", "{:.0%}", (THIS, "500 trees", "rate"), (THIS, "30 trees", "rate")),
    ("JSON batches against FastAPI + PyFunc", "{:.1f}×", (THIS, "batch"), (FASTAPI, "batch")),
    ("JSON batches with `LOG_DECISIONS=true` against without", "{:.0%}", (RECORDED, "batch"), (THIS, "batch")),
    ("stream against `predict_proba` on a ready array, no server", "{:.0%}", (THIS, "stream"), (SKLEARN, "stream")),
]


def table(found: dict[tuple[str, ...], float], memory: dict[str, tuple[float, float]], how: str) -> str:
    """The figures as Markdown, but for the ratios."""

    def cells(*keys: tuple[str, ...]) -> list[str]:
        return [f"{found[key]:,.{2 if key[-1] in ('p50', 'p99') else 0}f}" for key in keys]

    single = [(connections, figure) for connections in ("1", "16") for figure in UNITS]
    scorers = (THIS, *LIBRARIES)
    workers = zip(
        ("private memory, MB", "s from a kill to the next worker's first answer"), *memory.values(), strict=True
    )
    many = {f"JSON batches of {BATCH:,}, {name}": (name, "batch") for name in (THIS, RECORDED, FASTAPI, MLFLOW)}
    many[f"stream of {LINES:,} JSON lines, {THIS}"] = (THIS, "stream")
    many["`predict_proba` on a ready array, no server"] = (SKLEARN, "stream")
    tables = {
        ("one transaction per request", *(f"{UNITS[figure]}, {number} conn." for number, figure in single)): [
            [name, *cells(*((name, *key) for key in single))] for name in (THIS, QUIET, EXPLAINED, *PEERS)
        ],
        ("many transactions, 2 connections", "rows/s"): [[name, *cells(key)] for name, key in many.items()],
        ("trees in the model, 1 connection", *map(str, TREES)): [
            [unit, *cells(*((THIS, f"{trees} trees", figure) for trees in TREES))] for figure, unit in UNITS.items()
        ],
        ("µs per call without a server", *scorers): [
            [f"{rows:,} rows", *cells(*((name, f"{rows} rows") for name in scorers))] for rows in CALLS
        ],
        ("a worker", "imports shared by the fork", "without", "ratio"): [
            [name, f"{shared:.3g}", f"{alone:.3g}", f"{shared / alone:.0%}"] for name, shared, alone in workers
        ],
    }
    return "\n\n".join([how, *(markdown(head, rows) for head, rows in tables.items())])


def markdown(head: Sequence[str], rows: list[list[str]]) -> str:
    """A table whose columns but the first are numbers."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] + ["--:"] * (len(head) - 1), *rows])


def chart(found: dict[tuple[str, ...], float], file: Path) -> None:
    """Requests/s at 16 connections, median latency at 1 connection, rows/s."""
    names = [THIS, FASTAPI, MLFLOW, FLOOR]
    panels = [
        ("requests/s, 16 connections", {name: found[name, "16", "rate"] for name in names}),
        ("median latency in ms, 1 connection", {name: found[name, "1", "p50"] for name in names}),
        (f"rows/s, JSON batches of {BATCH:,}", {name: found[name, "batch"] for name in names[:3]}),
    ]
    figure, axes = plt.subplots(1, 3, figsize=(12, 2.6), layout="constrained")
    for axis, (title, values) in zip(axes, panels, strict=True):
        colors = ["#c2410c" if name == THIS else "#94a3b8" for name in values]
        bars = axis.barh(list(values), list(values.values()), color=colors)
        axis.bar_label(bars, fmt=lambda value: f"{value:,.0f}" if value > 20 else f"{value:.2f}", padding=3)
        axis.set_title(title)
        axis.invert_yaxis()
        axis.xaxis.set_visible(False)
        axis.spines[["top", "right", "bottom"]].set_visible(False)
        axis.margins(x=0.2)
    figure.savefig(file, dpi=110)


def machine() -> str:
    model = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    return f"{len(CORES)} cores ({model[1] if model else 'unknown'}), Python {sys.version.split()[0]}"


def register(trees: int) -> None:
    """Train and register a model with this number of trees."""
    sample, name = data.generate(100_000, 0), f"bench-{trees}"
    pipeline = train.pipeline(trees, 0).fit(sample.rows, sample.labels)
    with mlflow.start_run():
        reference = data.reference(sample, pipeline.predict_proba(sample.rows)[:, 1])
        version = versions.register(pipeline, sample.rows, name, threshold=0.5, reference=reference)
    versions.promote(name, version, None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds (default %(default)s)")
    parser.add_argument("--seconds", type=int, default=4, help="of each measurement (default %(default)s)")
    parser.add_argument("--port", type=int, default=18000, help="first of ten (default %(default)s)")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the servers end too
    missing = [name for name in ("wrk", "curl", "taskset") if not shutil.which(name)]
    if missing:
        sys.exit(f"bench: {', '.join(missing)} not found; on Debian: apt-get install wrk curl util-linux")
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        os.environ["MLFLOW_TRACKING_URI"] = uri = f"sqlite:///{folder}/mlflow.db"
        mlflow.set_tracking_uri(uri)
        versions.use_experiment("bench", uri)
        for trees in TREES:
            say(f"training {trees} trees")
            register(trees)
        found = measure(folder, options.rounds, options.seconds, options.port)
        say("memory and start of a worker")
        memory = processes(folder, options.port)
    load = "the other" if LOAD_CORE != SERVER_CORE else "the same"
    how = (
        f"Medians of {options.rounds} interleaved rounds of {options.seconds} s on {machine()}; every server has one "
        f"process on one core, wrk runs on {load}. The model has 150 trees unless said otherwise. Without a server, "
        "fraud-api's scorer takes the values of transactions, the others take an encoded array; all use one thread. "
        "onnxruntime computes in float32."
    )
    ratios = markdown((THIS, "ratio"), [[name, form.format(found[a] / found[b])] for name, form, a, b in RATIOS])
    text = table(found, memory, how)
    write_table("bench", ratios)
    (HERE / "results.md").write_text(f"# What `make bench` measured\n\n{text}\n")
    chart(found, HERE / "results.png")
    print(ratios, text, sep="\n\n")


if __name__ == "__main__":
    main()
