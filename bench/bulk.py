"""Bulk scoring by bulk.py beside MLflow's Spark UDF: speed, equality with /predict, and memory.

`make bench-bulk` runs it. Both score the same generated transactions with the same registered model on the same Spark
of two cores, from Parquet to Parquet. It writes the tables into README.md.
"""

from config import prepare

if __name__ == "__main__":
    prepare("bench")

import argparse
import json
import os
import re
import signal
import statistics
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import mlflow
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyspark.sql import DataFrame, SparkSession

import bulk
import data
import versions
from bench.bench import machine, register, say, service
from bench.tables import write_table
from model import FIELDS

OURS, UDF = "`bulk.py`", "`mlflow.pyfunc.spark_udf`"
NOTHING = "`mapInArrow` that computes nothing"
VERSION = "models:/bench-150/1"
PIECE, WARM_UP, COMPARED = 1_000_000, 100_000, 1000  # rows


def write(folder: Path, rows: int, piece: int = PIECE) -> None:
    """Generated transactions in Parquet files of so many each, so that not all of them are in memory."""
    folder.mkdir(exist_ok=True)
    for number, start in enumerate(range(0, rows, piece)):
        table = pa.Table.from_pandas(data.generate(min(piece, rows - start), number).rows, preserve_index=False)
        category = table.column_names.index("merchant_category")
        table = table.set_column(category, "merchant_category", table["merchant_category"].cast(pa.string()))
        ids = pc.binary_join_element_wise("tx", pa.array(range(start, start + len(table))).cast(pa.string()), "_")
        table = table.add_column(0, "transaction_id", ids)
        pq.write_table(table, folder / f"{number:03}.parquet", row_group_size=WARM_UP)


def first(folder: Path, rows: int) -> Path:
    """A folder with the files of the first so many rows."""
    part = folder / f"first-{rows}"
    part.mkdir(exist_ok=True)
    for file in sorted(folder.glob("*.parquet"))[: -(-rows // PIECE)]:
        (part / file.name).unlink(missing_ok=True)
        os.link(file, part / file.name)
    return part


def start() -> SparkSession:
    builder = SparkSession.builder.master("local[2]").config("spark.ui.enabled", "false")
    spark = builder.config("spark.driver.host", "127.0.0.1").getOrCreate()
    spark.sparkContext.setLogLevel("ERROR")
    return spark


def ours(source: Path, target: Path) -> float:
    """Rows per second of bulk.py, as it prints them: reading, scoring and writing."""
    with redirect_stdout(StringIO()) as output:
        bulk.main(["--input", str(source), "--output", str(target), "--model", VERSION, "--mode", "overwrite"])
    return float(json.loads(output.getvalue())["rows_per_second"])


def written(table: DataFrame, target: Path, rows: int) -> float:
    """Rows per second of a job that reads, computes and writes a table."""
    started = time.monotonic()
    table.write.mode("overwrite").parquet(str(target))
    return rows / (time.monotonic() - started)


def by_udf(spark: SparkSession, score: object, source: Path, target: Path, rows: int) -> float:
    """Rows per second of MLflow's UDF: reading, scoring and writing."""
    probability = score(*FIELDS)[1].alias("fraud_probability")
    return written(spark.read.parquet(str(source)).select("transaction_id", probability), target, rows)


def pass_on(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Batches in, batches with the columns of bulk.py out."""
    for batch in batches:
        amounts, *_, ids = batch.columns
        arrays = [ids, amounts, pa.nulls(len(batch), pa.bool_()), amounts, pa.nulls(len(batch), pa.string())]
        yield pa.RecordBatch.from_arrays(arrays, [*map(str, range(len(arrays)))])


def by_nothing(spark: SparkSession, source: Path, target: Path, rows: int) -> float:
    """Rows per second of Spark itself, reading and writing the columns of bulk.py through its Python workers."""
    table = spark.read.parquet(str(source)).select(*bulk.RULES)
    return written(table.mapInArrow(pass_on, bulk.SCORES), target, rows)


def speed(folder: Path, rows: int, rounds: int) -> tuple[float, ...]:
    """Rows per second of bulk.py, the UDF and Spark itself, medians, in one Spark whose Python workers have started."""
    write(warm_up := folder / "warm-up", WARM_UP, WARM_UP // 8)  # enough files for two tasks
    spark = start()
    score = mlflow.pyfunc.spark_udf(spark, VERSION, result_type="array<double>", env_manager="local")
    say(f"first job: {ours(warm_up, folder / 'ours'):,.0f} rows/s")
    say(f"first job of the UDF: {by_udf(spark, score, warm_up, folder / 'udf', WARM_UP):,.0f} rows/s")
    found = []
    for number in range(1, rounds + 1):
        source = first(folder, rows)
        own = ours(source, folder / "ours")
        other = by_udf(spark, score, source, folder / "udf", rows)
        most = by_nothing(spark, source, folder / "nothing", rows)
        say(f"round {number}/{rounds}: {own:,.0f} rows/s, UDF {other:,.0f} rows/s, Spark itself {most:,.0f} rows/s")
        found.append((own, other, most))
    spark.stop()
    return tuple(map(statistics.median, zip(*found, strict=True)))


def compare(folder: Path, port: int) -> list[tuple[int, float]]:
    """Of bulk.py and the UDF: how many of the first rows are as /predict answers, and the largest difference."""
    answers, found = {}, []
    with service(port, 150):
        for row in pq.read_table(folder / "000.parquet").slice(0, COMPARED).to_pylist():
            body, kind = json.dumps(row).encode(), {"Content-Type": "application/json"}
            request = urllib.request.Request(f"http://127.0.0.1:{port}/predict", body, kind)
            with urllib.request.urlopen(request) as answer:
                answers[row["transaction_id"]] = json.load(answer)["fraud_probability"]
    for name in ("ours", "udf"):
        columns, chosen = ["transaction_id", "fraud_probability"], [("transaction_id", "in", list(answers))]
        scores = pq.read_table(folder / name, columns=columns, filters=chosen).to_pylist()
        gaps = [abs(row["fraud_probability"] - answers[row["transaction_id"]]) for row in scores]
        found.append((gaps.count(0), max(gaps)))
    return found


def look(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """The largest memory that this Python worker has had, and its share of pages that processes share now, in KB."""
    peak = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    share = re.search(r"Pss:\s+(\d+)", Path("/proc/self/smaps_rollup").read_text())
    for _ in batches:
        yield pa.RecordBatch.from_pylist([{"peak": int(peak[1]), "share": int(share[1])}])


def memory(folder: Path, rows: int) -> list[str]:
    """Of one job in a new Spark: rows, rows per second, and megabytes of the larger Python worker."""
    spark = start()
    rate = ours(first(folder, rows), folder / "ours")
    seen = spark.range(0, 16, 1, 16).mapInArrow(look, "peak long, share long").collect()
    spark.stop()
    sizes = [max(row[name] for row in seen) / 1024 for name in ("peak", "share")]
    say(f"{rows:,} rows: {rate:,.0f} rows/s, {sizes[0]:.0f} MB")
    return [f"{rows:,} rows", f"{rate:,.0f}", *(f"{size:,.0f}" for size in sizes)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, default=4_000_000, help="for each job (default %(default)s)")
    parser.add_argument("--most", type=int, default=20_000_000, help="for memory (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="interleaved rounds (default %(default)s)")
    parser.add_argument("--port", type=int, default=18000, help="of the service (default %(default)s)")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the files and the service go too
    os.environ |= {"PYSPARK_PYTHON": sys.executable, "MODEL_LOAD_TIMEOUT": "300"}
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        os.environ["MLFLOW_TRACKING_URI"] = uri = f"sqlite:///{folder}/mlflow.db"
        mlflow.set_tracking_uri(uri)
        versions.use_experiment("bench", uri)
        say("training")
        register(150)
        say(f"generating {options.most:,} transactions")
        write(folder, options.most)
        rates = speed(folder, options.rows, options.rounds)
        say(f"comparing {COMPARED:,} rows with /predict")
        same = compare(folder, options.port)
        used = [memory(folder, rows) for rows in (PIECE, options.most)]
    lines = [
        f"Medians of {options.rounds} interleaved rounds in one Spark with `local[2]`, after a job that starts the",
        f"Python workers, on {machine()}; from Parquet to Parquet, with a model of 150 trees.",
        "",
        f"| job | rows | rows/s | of {COMPARED:,} rows equal to `/predict`, bit for bit | largest difference |",
        "| --- | --: | --: | --: | --: |",
        *(
            f"| {name} | {options.rows:,} | {rate:,.0f} | {equal:,} | {gap:.1g} |"
            for name, rate, (equal, gap) in zip((OURS, UDF), rates[:2], same, strict=True)
        ),
        f"| {NOTHING} | {options.rows:,} | {rates[2]:,.0f} | | |",
        f"| `bulk.py` against the UDF | | {rates[0] / rates[1]:.1f}× of at most {rates[2] / rates[1]:.1f}× | | |",
        "",
        "| first job of a Spark, `bulk.py` | rows/s | peak memory of a Python worker, MB | shared pages divided |",
        "| --: | --: | --: | --: |",
        *(f"| {' | '.join(cells)} |" for cells in used),
    ]
    write_table("bench-bulk", "\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
