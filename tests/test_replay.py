"""Decisions on record are computed again; what differs is found and named."""

import dataclasses
import gzip
import hmac
import json
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import mlflow
import msgspec
import numpy as np
import pandas as pd
import pytest
from mlflow import MlflowClient

import replay
from conftest import HERE, NAME, Process, config
from data import DataError, Sample, generate
from model import FIELDS, Model
from report import Scored, bootstrap, short
from versions import as_served

ROWS = 4000
SAMPLE = generate(ROWS, seed=7)
VALUES = [
    [float(v) if name != "merchant_category" else v for name, v in zip(FIELDS, row, strict=True)]
    for row in SAMPLE.rows.itertuples(index=False, name=None)
]
TABLE = SAMPLE.rows.assign(transaction_id=[f"tx_{row}" for row in range(ROWS)])
LABELLED = TABLE.assign(is_fraud=SAMPLE.labels)
KEY = "a key of the record"
START = datetime(2026, 11, 18, tzinfo=UTC)  # a Wednesday

Run = Callable[..., tuple[int, list[str]]]
Lines = list[dict[str, Any]]


@pytest.fixture(scope="module")
def models(champion: str, second: str) -> dict[str, Model]:
    """Two versions by their numbers."""
    mlflow.set_tracking_uri(champion)
    return {number: as_served(NAME, number, config(mlflow_tracking_uri=champion)) for number in ("1", second)}


@pytest.fixture
def run(
    champion: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Run]:
    """Writes record and data, replays, and gives the exit status and the lines printed."""
    monkeypatch.chdir(tmp_path)

    def run(lines: Lines, *words: str, table: pd.DataFrame = TABLE, **variables: str) -> Any:
        Path("log.ndjson").write_text("".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines))
        table.to_csv("data.csv", index=False)
        options = replay.arguments(["--decisions", "log.ndjson", "--data", "data.csv", *words])
        status = replay.run(options, config(**{"mlflow_tracking_uri": champion} | variables))
        return status, capsys.readouterr().out.splitlines()

    yield run
    assert capsys.readouterr().err == ""


def digest(values: list[Any]) -> str:
    """As the service makes it, by hand."""
    return hmac.new(KEY.encode(), json.dumps(values, separators=(",", ":")).encode(), "sha256").hexdigest()[:32]


def record(model: Model, rows: range, digests: bool = False, release: str = "v1.2.3") -> Lines:
    """The lines of some rows, the even ones asked for one by one, the odd ones in a batch; one row in three minutes."""
    scores = model.scorer([*zip(*(VALUES[row] for row in rows), strict=True)]).tolist()
    lines = []
    for row, score in zip(rows, scores, strict=True):
        kind: dict[str, Any] = {"logger": "request", "method": "POST", "path": "/predict", "status": 200}
        if row % 2:
            kind = {"logger": "decision", "index": row}
        threshold = model.threshold_for(VALUES[row][0])
        line = {"time": (START + timedelta(minutes=3 * row)).isoformat().replace("+00:00", "Z"), "level": "info"} | kind
        line |= {"request_id": f"r-{row}", "transaction_id": f"tx_{row}", "fraud_probability": score}
        line |= {"is_fraud": score >= threshold, "threshold": threshold, "model_name": NAME}
        line |= {"registry_version": model.snapshot.number, "model_version": release, "client": "payments"}
        line |= {"sha256": model.snapshot.sha256[:12]}
        lines.append(line | ({"digest": digest(VALUES[row])} if digests else {}))
    return lines


def named(model: Model, release: str = "v1.2.3") -> str:
    """How a version is named in what is printed."""
    return f"{NAME} version {model.snapshot.number} ({release}, SHA-256 {model.snapshot.sha256[:12]})"


UNKNOWN = "the data or the model differs, which only a digest and RECORD_KEY can tell"
OTHERS = [
    {"logger": "request", "path": "/predict/batch", "status": 200, "rows": 2, "fraud": 0, "invalid": 0},
    {"logger": "gunicorn.error", "message": "Worker ready"},
    {"logger": "request", "path": "/predict", "status": 499, "fraud_probability": 0.5},
]


# -- the verdict -------------------------------------------------------------------------------------------------------


def test_equal(run: Run, models: dict[str, Model]) -> None:
    """Every decision of a transaction counts, also where it was decided twice; other lines of the log do not."""
    lines = record(models["1"], range(1000))
    assert run([*OTHERS[:2], *lines, *lines[:10]], table=TABLE[3:]) == (
        0,
        [
            "log.ndjson: 1,010 decisions, 6 without data, 7 repeated",
            f"{named(models['1'])}: 1,004 decisions, largest difference 0.0e+00, 0 decided otherwise",
            "EQUAL: 1,004 decisions, to 1e-09",
        ],
    )


def test_two_versions(run: Run, models: dict[str, Model], second: str) -> None:
    """Each decision is computed by the version that made it."""
    lines = record(models["1"], range(600)) + record(models[second], range(500, 900), release="v2")
    assert run(lines) == (
        0,
        [
            "log.ndjson: 1,000 decisions, 0 without data, 100 repeated",
            f"{named(models['1'])}: 600 decisions, largest difference 0.0e+00, 0 decided otherwise",
            f"{named(models[second], 'v2')}: 400 decisions, largest difference 0.0e+00, 0 decided otherwise",
            "EQUAL: 1,000 decisions, to 1e-09",
        ],
    )


def test_parquet(run: Run, models: dict[str, Model]) -> None:
    TABLE.to_parquet("data.parquet")
    status, printed = run(record(models["1"], range(1000)), "--data", "data.parquet", table=TABLE[:0])
    assert (status, printed[-1]) == (0, "EQUAL: 1,000 decisions, to 1e-09")


def test_command_line(champion: str, models: dict[str, Model], tmp_path: Path) -> None:
    """The command line, with compressed files; on no terminal there is no progress bar."""
    text = "".join(json.dumps(line) + "\n" for line in record(models["1"], range(1000), digests=True))
    (tmp_path / "log.ndjson.gz").write_bytes(gzip.compress(text.encode()))
    TABLE.to_csv(tmp_path / "data.csv.gz", index=False)
    words = ("--decisions", "log.ndjson.gz", "--data", "data.csv.gz")
    environ = {"MLFLOW_TRACKING_URI": champion, "RECORD_KEY": KEY}
    process = Process(sys.executable, str(HERE / "replay.py"), *words, environ=environ, cwd=tmp_path)
    status = process.wait(120)
    assert process.output_lines == [
        "log.ndjson.gz: 1,000 decisions, 0 without data, 0 repeated",
        f"{named(models['1'])}: 1,000 decisions, largest difference 0.0e+00, 0 decided otherwise",
        "EQUAL: 1,000 decisions, to 1e-09",
    ]
    assert status == 0
    process.stop()


def test_tampered_probability(run: Run, models: dict[str, Model]) -> None:
    """The first ten differences are named in the order of the record; the digest shows that it is not the data."""
    lines = record(models["1"], range(1000), digests=True)
    true = [line["fraud_probability"] for line in lines]
    for line in lines[100:112]:
        line["fraud_probability"] += 1e-6
    lines[0]["fraud_probability"] += 1e-10
    status, printed = run(lines, record_key=KEY)
    assert status == 3
    assert printed == [
        "log.ndjson: 1,000 decisions, 0 without data, 0 repeated",
        f"{named(models['1'])}: 1,000 decisions, largest difference 1.0e-06, 0 decided otherwise",
        *(
            f"line {row + 1}, tx_{row}, request r-{row}: {true[row] + 1e-6:.9f} and not fraud on record, "
            f"{true[row]:.9f} and not fraud now, threshold {lines[row]['threshold']:.6g}; "
            "the data is the same, the model or the record differs"
            for row in range(100, 110)
        ),
        "DIFFERENT: 12 of 1,000 decisions",
    ]


def test_tampered_decision(run: Run, models: dict[str, Model]) -> None:
    """A decision that does not follow from probability and threshold is a difference. Ids are printed as ASCII."""
    lines = record(models["1"], range(10))
    lines[3] |= {"is_fraud": True, "transaction_id": "tx_\x1b[2J", "request_id": "r-\x1b"}
    table = TABLE.assign(transaction_id=TABLE["transaction_id"].replace("tx_3", "tx_\x1b[2J"))
    p, threshold = lines[3]["fraud_probability"], lines[3]["threshold"]
    assert run(lines, table=table) == (
        3,
        [
            "log.ndjson: 10 decisions, 0 without data, 0 repeated",
            f"{named(models['1'])}: 10 decisions, largest difference 0.0e+00, 1 decided otherwise",
            f"line 4, tx_\\x1b[2J, request r-\\x1b: {p:.9f} and fraud on record, {p:.9f} and not fraud now, "
            f"threshold {threshold:.6g}; {UNKNOWN}",
            "DIFFERENT: 1 of 10 decisions",
        ],
    )


@pytest.mark.parametrize(
    ("digests", "key", "cause"), [(True, KEY, "the data differs"), (False, KEY, UNKNOWN), (True, "", UNKNOWN)]
)
def test_changed_transaction(run: Run, models: dict[str, Model], digests: bool, key: str, cause: str) -> None:
    """Only a digest tells whether it is the data that differs."""
    lines = record(models["1"], range(1000), digests)
    table = TABLE.assign(amount=TABLE["amount"].where(TABLE["transaction_id"] != "tx_7", 98_765.43))
    [now] = models["1"].scorer([[value] for value in [98_765.43, *VALUES[7][1:]]]).tolist()
    status, printed = run(lines, table=table, record_key=key)
    old, threshold = lines[7]["fraud_probability"], lines[7]["threshold"]
    flips = now >= threshold
    assert (status, printed) == (
        3,
        [
            "log.ndjson: 1,000 decisions, 0 without data, 0 repeated",
            f"{named(models['1'])}: 1,000 decisions, largest difference {abs(now - old):.1e}, "
            f"{int(flips)} decided otherwise",
            f"line 8, tx_7, request r-7: {old:.9f} and not fraud on record, "
            f"{now:.9f} and {'fraud' if flips else 'not fraud'} now, threshold {threshold:.6g}; {cause}",
            "DIFFERENT: 1 of 1,000 decisions",
        ],
    )


def test_changed_transaction_that_scores_the_same(run: Run, models: dict[str, Model]) -> None:
    """The digest finds it."""
    table = TABLE.assign(account_balance=TABLE["account_balance"] + (TABLE["transaction_id"] == "tx_7") * 1e-9)
    lines = record(models["1"], range(10), digests=True)
    status, printed = run(lines, table=table, record_key=KEY)
    assert status == 3
    assert printed[2].startswith("line 8, tx_7, request r-7: ")
    assert printed[2].endswith("; the data differs")


# -- what cannot be computed again -------------------------------------------------------------------------------------


def test_another_model_under_the_number(run: Run, models: dict[str, Model], second: str) -> None:
    """The versions that are as they were are compared all the same."""
    lines = record(models["1"], range(10)) + record(models[second], range(10, 15), release="v2")
    for line in lines[10:]:
        line["sha256"] = "0123456789ab"
    assert run(lines) == (
        1,
        [
            "log.ndjson: 15 decisions, 0 without data, 0 repeated",
            f"{named(models['1'])}: 10 decisions, largest difference 0.0e+00, 0 decided otherwise",
            f"{NAME} version {second}: its SHA-256 begins with {models[second].snapshot.sha256[:12]}, "
            "not 0123456789ab as on record; 5 decisions are not computed again",
            "INCOMPLETE; EQUAL: 10 decisions, to 1e-09",
        ],
    )


def test_re_registered_model(run: Run, champion: str, models: dict[str, Model]) -> None:
    """The same model, registered anew, is not the version on record."""
    source = mlflow.sklearn.load_model(f"models:/{NAME}/1")
    info = mlflow.models.get_model_info(f"models:/{NAME}/1")
    with mlflow.start_run():
        logged = mlflow.sklearn.log_model(
            source,
            name="again",
            registered_model_name=NAME,
            signature=info.signature,
            metadata=info.metadata,
            serialization_format="skops",
            skops_trusted_types=info.flavors["sklearn"]["skops_trusted_types"],
            pip_requirements=[],
        )
    number = str(logged.registered_model_version)
    lines = [line | {"registry_version": number} for line in record(models["1"], range(10))]
    status, printed = run(lines)
    assert status == 1
    assert printed[1].startswith(f"{NAME} version {number}: its SHA-256 begins with ")
    MlflowClient(champion).delete_model_version(NAME, number)
    assert run(lines) == (
        1,
        [
            "log.ndjson: 10 decisions, 0 without data, 0 repeated",
            f"{NAME} version {number}: RESOURCE_DOES_NOT_EXIST: "
            f"Model Version (name={NAME}, version={number}) not found; 10 decisions are not computed again",
            "INCOMPLETE; nothing was compared",
        ],
    )


def test_lines_that_are_no_decisions(run: Run, models: dict[str, Model]) -> None:
    """A line with a probability that is no decision is not passed over."""
    lines = record(models["1"], range(10))
    del lines[4]["threshold"]
    assert run(lines) == (
        1,
        [
            "log.ndjson: 9 decisions, 0 without data, 0 repeated",
            f"{named(models['1'])}: 9 decisions, largest difference 0.0e+00, 0 decided otherwise",
            "1 of its lines cannot be read as a decision; line 5: Object missing required field `threshold`",
            "INCOMPLETE; EQUAL: 9 decisions, to 1e-09",
        ],
    )


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (TABLE.drop(columns="hour"), "data.csv cannot be replayed: the column is missing: hour"),
        (pd.concat([TABLE, TABLE[:1]]), "data.csv cannot be replayed: transaction_id: expected no id twice"),
        (
            TABLE.assign(hour=TABLE["hour"].where(TABLE["transaction_id"] != "tx_7", 24)),
            "data.csv cannot be replayed: hour: row 8 is wrong: expected an hour, a whole number from 0 to 23",
        ),
        (TABLE[10:], "log.ndjson has no decision about a transaction in data.csv"),
    ],
)
def test_bad_data(run: Run, models: dict[str, Model], table: pd.DataFrame, message: str) -> None:
    with pytest.raises(DataError, match=f"^{message}$"):
        run(record(models["1"], range(10)), table=table)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "[Errno 2] No such file or directory: 'log.ndjson.gz'"),
        (b"{}", "Not a gzipped file (b'{}')"),
        (gzip.compress(b"{}", mtime=0)[:-1], "Compressed file ended before the end-of-stream marker was reached"),
        (gzip.compress(b"{}" * 9, mtime=0)[:10] + b"\xff" * 9, "Error -3 while decompressing data: invalid block type"),
    ],
)
def test_broken_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None, message: str) -> None:
    """One sentence, and exit status 1."""
    monkeypatch.chdir(tmp_path)
    TABLE.to_csv("data.csv", index=False)
    if content is not None:
        Path("log.ndjson.gz").write_bytes(content)
    words = replay.arguments(["--decisions", "log.ndjson.gz", "--data", "data.csv"])
    monkeypatch.setattr(replay, "options", words, raising=False)
    monkeypatch.setattr(replay, "config", config(), raising=False)
    assert replay.main() == f"replay: log.ndjson.gz cannot be replayed: {message}"


@pytest.mark.parametrize(
    "words", [["--version", "x"], ["--threshold", "2"], ["--threshold", "nan"], ["--cost-review", "?"]]
)
def test_wrong_options(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        replay.arguments(["--decisions", "a", "--data", "b", *words])
    assert ended.value.code == 2


# -- what another version or threshold would do ------------------------------------------------------------------------

ALL, FIRST, LAST = range(ROWS), range(2400), range(2400, ROWS)  # 2,400 decisions are of the first week


def expected(old: Model, new: Model | None, threshold: float | None, rows: range, labelled: bool) -> list[list[float]]:
    """The figures of the comparison, each with the ends of its interval, computed in another way."""
    columns = [*zip(*(VALUES[row] for row in rows), strict=True)]
    amounts, scores = np.array(columns[0]), [model.scorer(columns) for model in (old, new or old)]
    before = scores[0] >= [old.threshold_for(amount) for amount in amounts]
    after = scores[1] >= (threshold or [(new or old).threshold_for(amount) for amount in amounts])
    more, fewer = after & ~before, before & ~after
    sums = [len(amounts), before.sum(), after.sum()]
    sums += [more.sum(), amounts[more].sum(), fewer.sum(), amounts[fewer].sum(), before.mean(), after.mean()]
    figures = [[value, np.nan, np.nan] for value in sums]
    if labelled:
        sample = Sample(SAMPLE.rows.iloc[rows], SAMPLE.labels[rows])
        models = [Scored("old", scores[0], before), Scored("new", scores[1], after)]
        rounds = bootstrap(models, sample, Namespace(cost_missed=None, cost_review=5.0), 100)
        for name in ("average_precision", "recall", "precision", "cost"):
            for each in rounds.values():
                figures.append([each[name][0], *each[name][1:].quantile([0.05, 0.95])])
    return figures


def names(what: str, labelled: bool) -> list[str]:
    """What the figures are called."""
    counts = ["Decisions", "Alerts on record", f"Alerts with {what}", "Newly flagged", "Amount newly flagged"]
    counts += ["No longer flagged", "Amount no longer flagged", "Alert rate on record", f"Alert rate with {what}"]
    measures = ["Average precision", "Recall", "Precision", "Cost per 1,000 transactions"] if labelled else []
    return counts + [f"{name} {end}" for name in measures for end in ("on record", f"with {what}")]


def cell(value: float, low: float, high: float) -> str:
    return short(value) if np.isnan(low) else f"{short(value)} [{short(low)}, {short(high)}]"


@pytest.mark.parametrize("threshold", [None, 0.03])
def test_another_version(run: Run, models: dict[str, Model], second: str, threshold: float | None) -> None:
    """Counts, and measures where the data has labels, of the whole and of each week; in text, Markdown and CSV."""
    words, what = ["--version", second], f"version {second}"
    if threshold:
        words, what = [*words, "--threshold", str(threshold)], f"{what}, threshold {threshold}"
    status, printed = run(record(models["1"], ALL), *words, "--output", "found", table=LABELLED)
    periods = {"all": ALL, "week of 2026-11-16": FIRST, "week of 2026-11-23": LAST}
    columns = {period: expected(models["1"], models[second], threshold, rows, True) for period, rows in periods.items()}
    table = [
        f"|  | {' | '.join(periods)} |",
        "| --- | --: | --: | --: |",
        *(
            f"| {name} | {' | '.join(cell(*column[place]) for column in columns.values())} |"
            for place, name in enumerate(names(what, True))
        ),
        "",
        "[ ]: 5% to 95% of 100 resamples of 4,000 decisions",
    ]
    path = f"found/log-{what.replace(', ', '-').replace(' ', '-')}"
    assert (status, printed) == (
        0,
        ["log.ndjson: 4,000 decisions, 0 without data, 0 repeated", "", *table, "", f"written: {path}.md and .csv"],
    )
    assert Path(f"{path}.md").read_text().splitlines() == [f"# log.ndjson with {what}", "", *table]
    written = pd.read_csv(f"{path}.csv")
    assert [*written] == ["period", "figure", "value", "low", "high"]
    assert [*written["period"]] == [period for period in periods for _ in names(what, True)]
    assert [*written["figure"]] == names(what, True) * 3
    values = [figure for column in columns.values() for figure in column]
    np.testing.assert_allclose(written[["value", "low", "high"]], values, rtol=1e-12)


def test_another_threshold(run: Run, models: dict[str, Model]) -> None:
    """The probabilities are those on record, and no model is loaded; written beside the record."""
    lines = record(models["1"], range(1000))
    figures = expected(models["1"], None, 0.05, range(1000), False)
    assert figures[3][0] + figures[5][0] > 0
    assert run(lines, "--threshold", "0.05", mlflow_tracking_uri="http://127.0.0.1:9") == (
        0,
        [
            "log.ndjson: 1,000 decisions, 0 without data, 0 repeated",
            "",
            "|  | all |",
            "| --- | --: |",
            *(f"| {n} | {short(f[0])} |" for n, f in zip(names("threshold 0.05", False), figures, strict=True)),
            "",
            "written: log-threshold-0.05.md and .csv",
        ],
    )
    assert Path("log-threshold-0.05.csv").exists()


def test_too_few_frauds(run: Run, models: dict[str, Model]) -> None:
    status, printed = run(record(models["1"], range(100)), "--threshold", "0.05", table=LABELLED)
    assert status == 0
    assert printed[13:] == [
        *(f"| {name} | too few |" for name in names("threshold 0.05", True)[9:]),
        "",
        "[ ]: 5% to 95% of 100 resamples of 100 decisions",
        "",
        "written: log-threshold-0.05.md and .csv",
    ]


def test_expected_cost(run: Run, models: dict[str, Model]) -> None:
    """A version that decides by expected cost has a threshold for each row; it is the one on record."""
    by_cost = dataclasses.replace(
        models["1"], metadata=msgspec.structs.replace(models["1"].metadata, threshold=None, review_cost=5.0)
    )
    lines = record(by_cost, range(1000))
    assert len({line["threshold"] for line in lines}) > 100
    status, printed = run(lines)
    assert (status, printed[-1]) == (0, "EQUAL: 1,000 decisions, to 1e-09")


def test_version_that_is_not_there(run: Run, models: dict[str, Model]) -> None:
    assert run(record(models["1"], range(10)), "--version", "99") == (
        1,
        [
            "log.ndjson: 10 decisions, 0 without data, 0 repeated",
            f"{NAME} version 99: RESOURCE_DOES_NOT_EXIST: Model Version (name={NAME}, version=99) not found; "
            "10 decisions are not computed again",
            "INCOMPLETE; nothing was compared",
        ],
    )


# -- long files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("terminal", "expected"),
    [(False, "reading: 50%\n" * 2), (True, f"\r[{'#' * 20:40}]  50% reading" * 2 + "\r\x1b[K")],
)
def test_progress(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], terminal: bool, expected: str
) -> None:
    """A bar on a terminal, else a line every five seconds."""
    clock = iter([0.0, 1.0, 7.0, 7.0, 13.0, 13.0] if not terminal else [0.0, 0.1, 0.3, 0.3, 0.6, 0.6])
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    monkeypatch.setattr(replay.time, "monotonic", lambda: next(clock))
    assert [*replay.with_progress("reading", "abc", lambda: 0.5)] == ["a", "b", "c"]
    assert capsys.readouterr().err == expected
