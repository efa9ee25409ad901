"""Bulk scoring on Spark: a table of transactions in, a table of scores out, by the model and the rules of the service.

    spark-submit bulk.py --input s3a://lake/transactions --output s3a://lake/scores --model models:/fraud-detector/7

The driver resolves --model (a number or an alias) to one version and verifies it before it reads the table. Each Python
worker of the executors fetches and verifies the same files once, and turns Arrow batches of transactions into Arrow
batches of scores. The job prints its counts as JSON, or ends before it writes, with one sentence and status 1.
"""

from config import Config, export, prepare

export()  # in the driver and in each Python worker, before NumPy and MLflow are imported

import argparse
import os
import time
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import unquote

import msgspec
import numpy as np
import pyarrow
from pyspark import errors, sql

from model import RULES, Model, ModelError, acquire, fetch, load

SCORES = "transaction_id string, fraud_probability double, is_fraud boolean, threshold double, error string"
NUMBERS = ("tinyint", "smallint", "int", "bigint", "float", "double", "decimal")  # Spark's types
LARGEST = float(np.finfo(np.float64).max)


# -- in the Python workers: a batch of transactions → a batch of scores ------------------------------------------------


@cache
def loaded(config: Config, name: str, number: str, release: str | None) -> Model:
    """The version that the driver has verified, fetched and verified once in this process. Raises `ModelError`."""
    os.environ["MLFLOW_TRACKING_URI"] = os.environ["MLFLOW_REGISTRY_URI"] = config.mlflow_tracking_uri
    with TemporaryDirectory(prefix="fraud-bulk-", dir=config.memory_dir) as folder:
        return load(fetch(config, Path(folder, "model"), name, number, release), config)


def values(column: pyarrow.Array) -> np.ndarray:
    """A column for the scorer. Of strings, only the distinct ones become Python objects."""
    if pyarrow.types.is_floating(column.type):
        return column.to_numpy()
    encoded = column.dictionary_encode()
    return np.array(encoded.dictionary.to_pylist(), object)[encoded.indices.to_numpy()]


def scored(batch: pyarrow.RecordBatch, model: Model) -> pyarrow.RecordBatch:
    """The columns of `SCORES` for each row, and those that are carried through. Rows with an error are not scored."""
    *fields, ids, error = batch.columns[: len(RULES) + 1]
    right, found, thresholds = error.is_null(), *np.zeros((2, len(batch)))
    keep = right.to_numpy(zero_copy_only=False)
    if keep.any():
        columns, cost = [values(column.filter(right)) for column in fields], model.metadata.review_cost
        found[keep] = model.scorer(columns)  # the next line is `Model.threshold_for`
        thresholds[keep] = cost / np.maximum(columns[0], cost) if model.threshold is None else model.threshold
    scores = [pyarrow.array(each, mask=~keep) for each in (found, found >= thresholds, thresholds)]
    arrays = [ids, *scores, error, *batch.columns[len(RULES) + 1 :]]
    return pyarrow.RecordBatch.from_arrays(arrays, [*map(str, range(len(arrays)))])


# -- on the driver: a table of transactions → a table of scores --------------------------------------------------------


def expressions(name: str, table: sql.DataFrame, text: list[str]) -> tuple[str, str]:
    """A field in SQL: its value for the scorer, named as no other column, and the error of a row that breaks its rule.

    Columns in `text` are read as text. Ends the program with one sentence if the column is missing or of another type.
    """
    rule, found = RULES[name], dict(table.dtypes).get(name, "missing")
    if found.partition("(")[0] not in (("string",) if rule["type"] == "string" or name in text else NUMBERS):
        raise SystemExit(f"bulk: column {name} of the input is {found}, expected {rule['type']}")
    value = name if rule["type"] == "string" else f"try_cast({name} AS double)"
    kept = f"length({name}) BETWEEN {rule.get('minLength')} AND {rule.get('maxLength')}"
    if rule["type"] != "string":  # to Spark, NaN is above all numbers
        kept = f"{value} BETWEEN {rule.get('minimum', -LARGEST)}D AND {rule.get('maximum', LARGEST)}D"
        kept += f" AND rint({value}) = {value}" * ("multipleOf" in rule)
    return f"{value} AS `({name})`", f"CASE WHEN {kept} THEN NULL ELSE '{name}: expected {rule['description']}' END"


def summary(written: sql.DataFrame, model: Model, seconds: float) -> dict[str, object]:
    """What was written, counted, and the drift of the scores: their population stability index (PSI)."""
    reference = model.metadata.reference
    limits = reference.score_deciles if reference else []
    tests = [f"error LIKE '{name}:%'" for name in RULES] + [f"fraud_probability <= {limit}D" for limit in limits]
    counts = ["count(*)", "count(fraud_probability)", "count_if(is_fraud)", *(f"count_if({test})" for test in tests)]
    rows, scored, flagged, *more = written.selectExpr(*counts).first()
    found = {"rows": rows, "scored": scored, "flagged": flagged, "rows_per_second": round(rows / seconds)}
    found["errors"] = {name: count for name, count in zip(RULES, more, strict=False) if count}
    if reference and scored:
        shares, expected = np.diff([0, *more[len(RULES) :], scored]) / scored, np.array(reference.score_shares)
        ratios = np.maximum(shares, 1e-4) / np.maximum(expected, 1e-4)  # as in the alerts on drift
        found["psi"] = float(np.sum((shares - expected) * np.log(ratios)))
    return found


def run(options: argparse.Namespace, config: Config, model: Model) -> dict[str, object]:
    """Score the input, write the scores, and count what was written."""
    spark, snapshot = sql.SparkSession.builder.appName("bulk").getOrCreate(), model.snapshot
    spark.conf.set("spark.sql.sources.partitionColumnTypeInference.enabled", False)  # hour=07 is written as hour=07
    for name in ("bulk.py", "config.py", "model.py", "trusted_types.txt"):
        spark.sparkContext.addPyFile(str(Path(__file__).with_name(name)))
    table = spark.read.format(options.format).options(header=True, escape='"').load(options.input)
    # The files of a partitioned table are in folders with the names and values of partition columns: day=2026-11-01.
    folders = [name for file in table.inputFiles()[:1] for name in table.columns if f"/{name}=" in unquote(file)]
    text = table.columns if options.format == "csv" else folders
    fields, faults = zip(*(expressions(name, table, text) for name in RULES), strict=True)
    carried = [f"`{name}`" for name in dict.fromkeys(options.columns + folders)]
    schema = ", ".join([SCORES, *(f"`{name}` {kind}" for name, kind in table.select(*carried).dtypes)])
    # The error of a row is the first rule that it breaks.
    ready = table.selectExpr(*fields, f"coalesce({', '.join(faults)}) AS error", *carried)
    pinned = replace(config, model_sha256=snapshot.sha256, api_keys=None, secrets=())
    version, started = (snapshot.name, snapshot.number, snapshot.release), time.monotonic()
    scores = ready.mapInArrow(lambda batches: (scored(batch, loaded(pinned, *version)) for batch in batches), schema)
    named = {"model_version": sql.functions.lit(snapshot.version), "model_sha256": sql.functions.lit(snapshot.sha256)}
    scores.withColumns(named).write.mode(options.mode).parquet(options.output, partitionBy=folders)
    return summary(spark.read.schema(SCORES).parquet(options.output), model, time.monotonic() - started)


def main(words: list[str] | None = None) -> None:
    """Score by the options of the command line, or `words`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--input", "--output", "--model"):
        parser.add_argument(name, required=True)
    parser.add_argument("--format", choices=["parquet", "csv"], default="parquet", help="of the input")
    parser.add_argument("--columns", nargs="*", default=[], help="columns of the input to carry through")
    parser.add_argument("--mode", choices=["error", "overwrite"], default="error", help="where the output exists")
    options = parser.parse_args(words)
    os.environ["MODEL_URI"] = options.model
    config = prepare("bulk")
    try:
        with TemporaryDirectory(prefix="fraud-bulk-", dir=config.memory_dir) as folder:
            model = load(acquire(config, Path(folder)), config)
        print(msgspec.json.encode(run(options, config, model)).decode())
    except (ModelError, errors.PySparkException) as error:
        raise SystemExit(f"bulk: {str(error).strip().splitlines()[0]}") from None


if __name__ == "__main__":
    import bulk  # the module that Python workers import, so that `loaded` is one cache for each process

    bulk.main()
