"""Bulk scoring on a real Spark of two cores: `make bulk-test`. Without PySpark, as in `make test`, this is skipped."""

import json
import os
import signal
import subprocess
import sys
import threading
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from glob import glob
from math import inf, log, nan
from pathlib import Path
from typing import Any

import msgspec
import pytest

pyspark = pytest.importorskip("pyspark", reason="bulk.py needs PySpark: make bulk-test")

import pyarrow as pa
import pyarrow.parquet as pq
from pyspark.sql import SparkSession
from webtest import TestApp

import bulk
import data
import size
from conftest import HERE, NAME, TRANSACTION, wait_until
from model import FIELDS, SIGNATURE, Model

pytestmark = pytest.mark.filterwarnings("default")  # Spark's own are not ours to mend
VERSION = f"models:/{NAME}/1"
FAULTS = {
    "transaction_id": ["", "x" * 129],
    "amount": [-0.01, nan, inf],
    "merchant_category": ["", "x" * 65],
    "hour": [-1.0, 24.0, 13.5],
    "day_of_week": [7.0, nan],
    "user_age": [131.0, -1.0],
    "account_balance": [-inf, nan],
}


@pytest.fixture(scope="module")
def environ(champion: str) -> Iterator[None]:
    """The environment of a job."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", champion)
        patch.setenv("MODEL_URI", VERSION)  # `bulk.main` sets it
        patch.setenv("MODEL_LOAD_TIMEOUT", "300")
        patch.setenv("PYSPARK_PYTHON", sys.executable)
        patch.setenv("JDK_JAVA_OPTIONS", "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC")  # for short jobs, the fastest
        yield


@pytest.fixture(scope="module")
def command(environ: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, subprocess.Popen[bytes]]]:
    """`spark-submit bulk.py`, started, and the folder that it works in."""
    folder = tmp_path_factory.mktemp("command")
    pq.write_table(transactions(100), folder / "in")
    words = ["--input", f"{folder}/in", "--output", f"{folder}/out", "--model", f"models:/{NAME}@champion"]
    submit = [f"{Path(pyspark.__file__).parent}/bin/spark-submit", "--master", "local[2]", f"{HERE}/bulk.py"]
    with (folder / "stdout").open("wb") as output, (folder / "stderr").open("wb") as log:
        process = subprocess.Popen([*submit, *words], stdout=output, stderr=log)
    yield folder, process
    process.kill()
    process.wait()


@pytest.fixture(scope="module")
def spark(environ: None, command: object) -> Iterator[SparkSession]:
    """Spark on two cores; as on a cluster, a task is tried four times. `command` takes long, so it runs beside."""
    builder = SparkSession.builder.master("local[2,4]").config("spark.ui.enabled", "false")
    session = builder.config("spark.driver.host", "127.0.0.1").getOrCreate()
    session.sparkContext.setLogLevel("OFF")
    yield session
    session.stop()


def transactions(rows: int) -> pa.Table:
    """Generated transactions, and a column `branch` that the API does not know."""
    table = pa.Table.from_pandas(data.generate(rows, 1).rows, preserve_index=False)
    table = table.set_column(1, "merchant_category", table["merchant_category"].cast(pa.string()))
    ids = pa.array([f"tx_{number}" for number in range(rows)])
    return table.add_column(0, "transaction_id", ids).append_column("branch", pa.array(range(rows)))


def score(folder: Path, capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    """Score `in` in a folder into `out`, and give what the job prints."""
    bulk.main(["--input", f"{folder}/in", "--output", f"{folder}/out", "--model", VERSION, *words])
    return dict(json.loads(capsys.readouterr().out))


def rows(spark: SparkSession, folder: Path) -> list[dict[str, Any]]:
    """What is in `out`, in the order of the ids."""
    written = spark.read.parquet(f"{folder}/out").collect()
    return sorted((row.asDict() for row in written), key=lambda row: str(row["transaction_id"]))


def expected(app: TestApp, model: Model, transaction: dict[str, Any], **carried: Any) -> dict[str, Any]:
    """The row that the API's answer to a transaction says."""
    answer = app.post_json("/predict", transaction, expect_errors=True).json
    fine = "detail" not in answer
    return {
        "transaction_id": transaction["transaction_id"],
        "fraud_probability": answer.get("fraud_probability"),
        "is_fraud": answer.get("is_fraud"),
        "threshold": model.threshold_for(transaction["amount"]) if fine else None,
        "error": answer.get("detail"),
        **carried,
        "model_version": "v1.2.3",
        "model_sha256": model.snapshot.sha256,
    }


def drift(model: Model, scores: list[float]) -> float:
    """The population stability index, as in k8s/components/monitoring/rules.yaml."""
    reference = model.metadata.reference
    assert reference
    places = [bisect_left(reference.score_deciles, score) for score in scores]
    shares = [places.count(place) / len(scores) for place in range(10)]
    pairs = zip(shares, reference.score_shares, strict=True)
    return sum((share - before) * log(max(share, 1e-4) / max(before, 1e-4)) for share, before in pairs)


def test_rows_of_a_partitioned_table(
    spark: SparkSession, app: TestApp, model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """1,000 rows are scored as by /predict, bit for bit; partitions and the columns asked for are kept."""
    table = transactions(1000)
    sent = [{**TRANSACTION, **row} for row in table.drop(["branch"]).to_pylist()]
    kinds = {"amount": pa.decimal128(18, 2), "hour": pa.int8(), "user_age": pa.int64()}
    for name, kind in kinds.items():
        table = table.set_column(table.column_names.index(name), name, table[name].cast(kind))
    day = pa.array([f"{number % 3:02}" for number in range(1000)])
    pq.write_to_dataset(table.append_column("day", day), tmp_path / "in", ["day", "day_of_week"])
    found = score(tmp_path, capsys, "--columns", "branch", "hour")
    wanted = [
        expected(app, model, row, branch=number, hour=int(row["hour"]))
        | {"day": f"{number % 3:02}", "day_of_week": str(row["day_of_week"])}
        for number, row in enumerate(sent)
    ]
    assert rows(spark, tmp_path) == sorted(wanted, key=lambda row: row["transaction_id"])
    files = [
        [path.relative_to(tmp_path / end) for path in tmp_path.glob(f"{end}/*/*/*.parquet")] for end in ("in", "out")
    ]
    assert {path.parent for path in files[1]} == {path.parent for path in files[0]}
    scores = [row["fraud_probability"] for row in wanted]
    assert found.pop("rows_per_second") > 0
    assert found.pop("psi") == pytest.approx(drift(model, scores))
    assert found == {"rows": 1000, "scored": 1000, "flagged": sum(row["is_fraud"] for row in wanted), "errors": {}}


def test_rows_with_errors(
    spark: SparkSession, app: TestApp, model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows that break a rule of the API are written with the API's words, null like any other value."""
    bad = [(field, value) for field, values in FAULTS.items() for value in (*values, None)]
    sent = [TRANSACTION | {"transaction_id": f"tx_{number:02}"} | dict([fault]) for number, fault in enumerate(bad)]
    sent += [TRANSACTION | {"transaction_id": "tx_99", "merchant_category": "\u00e9" * 64, "amount": 1e308}]
    kinds = [(name, pa.string() if kind == "string" else pa.float64()) for name, kind in SIGNATURE]
    table = pa.Table.from_pylist(sent, pa.schema([("transaction_id", pa.string()), *kinds]))
    (tmp_path / "in").mkdir()
    pq.write_table(table, tmp_path / "in/1.parquet")
    found = score(tmp_path, capsys)
    finite = [{name: None if value in (nan, inf, -inf) else value for name, value in row.items()} for row in sent]
    wanted = [expected(app, model, row) for row in finite]
    assert rows(spark, tmp_path) == sorted(wanted, key=lambda row: str(row["transaction_id"]))
    errors = {field: len(values) + 1 for field, values in FAULTS.items()}
    assert {name: found[name] for name in ("rows", "scored", "errors")} == {
        "rows": len(sent),
        "scored": 1,
        "errors": errors,
    }


def test_csv(
    spark: SparkSession, app: TestApp, model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Columns of CSV are taken by their names; text that is no number breaks the field's rule."""
    lines = [
        "hour,transaction_id,amount,merchant_category,day_of_week,user_age,account_balance",
        '14,tx_1,150.50,"a ""b"", c",2,35,-2.5e3',
        "14.0,tx_2,twelve,travel,2,35,2500",
        "14,tx_3,1,,2,35,2500",
        "14,tx_4,1,travel,2,35",
    ]
    (tmp_path / "in").write_text("\n".join(lines))
    found = score(tmp_path, capsys, "--format", "csv")
    named = [TRANSACTION | {"transaction_id": f"tx_{number}"} for number in range(1, 5)]
    named[0] |= {"merchant_category": 'a "b", c', "account_balance": -2500}
    for row, field in zip(named[1:], ("amount", "merchant_category", "account_balance"), strict=True):
        row[field] = None
    assert rows(spark, tmp_path) == [expected(app, model, row) for row in named]
    assert found["errors"] == {"amount": 1, "merchant_category": 1, "account_balance": 1}


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--input", "{folder}/none"], "bulk: [PATH_NOT_FOUND] Path does not exist: file:{folder}/none."),
        (["--input", "{folder}/missing"], "bulk: column amount of the input is missing, expected number"),
        (["--input", "{folder}/text"], "bulk: column hour of the input is string, expected number"),
        (["--columns", "nothing"], "bulk: [UNRESOLVED_COLUMN.WITH_SUGGESTION] "),
        (["--columns", "error"], "bulk: [AMBIGUOUS_REFERENCE] Reference `error` is ambiguous"),
        (["--output", "{folder}/old"], "bulk: [PATH_ALREADY_EXISTS] Path file:{folder}/old already exists."),
        (["--model", "fraud-detector"], "bulk: bad configuration: MODEL_URI is 'fraud-detector', expected models:/"),
        (["--model", f"models:/{NAME}/99"], f"bulk: models:/{NAME}/99 at http://"),
    ],
)
def test_faults(spark: SparkSession, tmp_path: Path, words: list[str], sentence: str) -> None:
    """Every fault ends the job with one sentence before anything is written."""
    table = transactions(10)
    tables = {"in": table.append_column("error", table["branch"]), "missing": table.drop(["amount"]), "old": table}
    hour = table.column_names.index("hour")
    tables["text"] = table.set_column(hour, "hour", table["hour"].cast(pa.string()))
    for name, each in tables.items():
        (tmp_path / name).mkdir()
        pq.write_table(each, tmp_path / name / "1.parquet")
    before = sorted(tmp_path.rglob("*"))
    options = ["--input", f"{tmp_path}/in", "--output", f"{tmp_path}/out", "--model", VERSION]
    with pytest.raises(SystemExit) as ended:
        bulk.main([*options, *(word.format(folder=tmp_path) for word in words)])
    assert str(ended.value).startswith(sentence.format(folder=tmp_path))
    assert "\n" not in str(ended.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_no_registry(tmp_path: Path) -> None:
    """Without a registry the program ends with status 1 and one sentence, before Spark starts."""
    environ = os.environ | {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    words = ["--input", f"{tmp_path}/in", "--output", f"{tmp_path}/out", "--model", VERSION]
    done = subprocess.run(
        [sys.executable, HERE / "bulk.py", *words], env=environ, capture_output=True, text=True, check=False
    )
    [line] = [line for line in done.stderr.splitlines() if line.startswith("bulk: ")]
    assert (done.returncode, done.stdout) == (1, "")
    assert line.startswith(f"bulk: {VERSION} at http://127.0.0.1:9: ")
    assert "Traceback" not in done.stderr
    assert not [*tmp_path.iterdir()]


def workers(spark: SparkSession) -> list[int]:
    """The Python workers of this session: the children of the daemon that its JVM has started."""

    def children(pid: int) -> Iterator[int]:
        for file in glob(f"/proc/{pid}/task/*/children"):
            with suppress(OSError):  # threads of the JVM end, and so do other children of it, such as chmod
                yield from map(int, Path(file).read_text().split())

    java = next(pid for pid in children(os.getpid()) if b"pyspark-shell" in Path(f"/proc/{pid}/cmdline").read_bytes())
    return [pid for daemon in children(java) for pid in children(daemon)]


def test_killed_worker(spark: SparkSession, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Spark repeats the task of a Python worker that was killed. No row is lost, and none is written twice."""
    table = transactions(20_000)
    ids = [pa.array([f"{part}_{number}" for number in range(20_000)]) for part in range(40)]
    many = pa.concat_tables([table.set_column(0, "transaction_id", each) for each in ids])
    (tmp_path / "in").mkdir()
    pq.write_table(many, tmp_path / "in/1.parquet", row_group_size=20_000)  # which Spark gives to two tasks
    killed = []

    def kill() -> None:
        wait_until(lambda: [*tmp_path.glob("out/_temporary/**/*.parquet")], "the first rows are written")
        killed.append(workers(spark)[0])
        os.kill(killed[0], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    found = score(tmp_path, capsys)
    killer.join()
    tracker = spark.sparkContext.statusTracker()
    stages = [stage for job in tracker.getJobIdsForGroup(None) for stage in tracker.getJobInfo(job).stageIds]
    assert killed
    assert sum(info.numFailedTasks for stage in stages if (info := tracker.getStageInfo(stage))) > 0
    assert (found["rows"], found["scored"]) == (800_000, 800_000)
    ids = spark.read.parquet(f"{tmp_path}/out").select("transaction_id")
    assert (ids.count(), ids.distinct().count()) == (800_000, 800_000)


def test_loads_once_a_process(spark: SparkSession, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A Python worker loads the model once, not once for each of its tasks; `--mode overwrite` replaces the scores."""
    (tmp_path / "in").mkdir()
    for number in range(8):
        pq.write_table(transactions(10), tmp_path / f"in/{number}.parquet")
    for _ in range(2):
        found = score(tmp_path, capsys, "--mode", "overwrite")
    assert (found["rows"], len(rows(spark, tmp_path))) == (80, 80)

    def look(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            facts = bulk.loaded.cache_info()
            yield pa.RecordBatch.from_pylist([{"misses": facts.misses, "hits": facts.hits}] * len(batch))

    seen = spark.range(0, 8, 1, 8).mapInArrow(look, "misses long, hits long").collect()
    assert {row["misses"] for row in seen} == {1}
    assert max(row["hits"] for row in seen) > 1


def test_command(spark: SparkSession, command: tuple[Path, subprocess.Popen[bytes]]) -> None:
    """`spark-submit bulk.py` resolves an alias, and prints one line."""
    folder, process = command
    assert process.wait(300) == 0, (folder / "stderr").read_text()
    assert json.loads((folder / "stdout").read_text()) | {"rows_per_second": 0, "psi": 0, "flagged": 0} == {
        **{"rows": 100, "scored": 100, "flagged": 0, "rows_per_second": 0, "errors": {}, "psi": 0},
    }
    assert len(rows(spark, folder)) == 100


def test_threshold_by_expected_cost(model: Model) -> None:
    """A version with a review cost decides each amount as `Model.threshold_for` does, bit for bit."""
    by_cost = replace(model, metadata=msgspec.structs.replace(model.metadata, threshold=None, review_cost=25.3))
    table = transactions(1000)
    fields = [table[name].cast(pa.string() if name == "merchant_category" else pa.float64()) for name in FIELDS]
    arrays = [*fields, table["transaction_id"], pa.nulls(1000, pa.string())]
    [batch] = pa.table(arrays, [*map(str, range(8))]).to_batches()
    _, probabilities, decisions, thresholds, _ = bulk.scored(batch, by_cost).to_pydict().values()
    assert thresholds == [by_cost.threshold_for(amount) for amount in table["amount"].to_pylist()]
    assert decisions == [found >= limit for found, limit in zip(probabilities, thresholds, strict=True)]


def test_size() -> None:
    assert len(size.lines_of_code((HERE / "bulk.py").read_text())) <= 100


def test_packages() -> None:
    """The executors have what model.py needs of the service's packages, and Spark."""
    service, own = (
        {line.split()[0] for line in (HERE / name).read_text().splitlines() if line[:1].isalpha()}
        for name in ("requirements.in", "requirements-bulk.in")
    )
    assert own == {name for name in service if not name.startswith(("falcon", "gunicorn", "prometheus"))} | {
        "pyarrow",
        "pyspark>=4.0,<4.1",
    }
