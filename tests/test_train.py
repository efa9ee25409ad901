"""From a file of transactions to a promoted champion, against a real registry."""

import hashlib
import re
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from scipy.special import logit
from sklearn.ensemble import RandomForestClassifier
from sklearn.pipeline import make_pipeline
from webtest import TestApp

import train
from conftest import HERE, TRANSACTION, Process, config, trained
from fraud_api import create_app
from model import CATEGORY, NUMBERS, TRUSTED_TYPES, Features, Model, ModelError, TreeScore, acquire, load

SAMPLE = train.generate(12_000, seed=4)
TABLE = SAMPLE.rows.assign(is_fraud=SAMPLE.labels, transaction_id=[f"tx_{row}" for row in range(12_000)])
PRICES = train.Prices(missed=None, review=5.0, max_alert_rate=1.0)
MEASURES = [
    "average_precision",
    "roc_auc",
    "log_loss",
    "brier_score",
    "calibration_error",
    "recall",
    "precision",
    "alert_rate",
    "recall_at_0.1_percent",
    "recall_at_1_percent",
    "recall_at_5_percent",
    "cost",
    "cost_of_flagging_nothing",
]
DATED = pd.date_range("2026-01-01", periods=12_000, freq="min", tz="UTC")
AMOUNT, HOUR = "an amount of money, a number from 0", "an hour, a whole number from 0 to 23"
DAY, BALANCE = "a day, a whole number from 0 (Monday) to 6 (Sunday)", "an amount of money, a number, may be negative"
HAS = f"the file has the columns {', '.join(TABLE)}"
MISSING = "; ".join(f"{name}: the column is missing" for name in train.RULES if name != "transaction_id")
CLASSES = "expected at least 100 of 0 and of 1"

# -- transactions ------------------------------------------------------------------------------------------------------


def written(folder: Path, table: pd.DataFrame, name: str) -> Path:
    path = folder / name
    table.to_parquet(path, index=False) if name.endswith("parquet") else table.to_csv(path, index=False)
    return path


@pytest.mark.parametrize("name", ["t.csv", "t.csv.gz", "t.parquet"])
def test_every_format_is_the_same(tmp_path: Path, name: str) -> None:
    """What was written comes back, in its order, whatever the order of the columns and without the optional one."""
    for table in (TABLE, TABLE.drop(columns="transaction_id")[TABLE.columns[-2::-1]]):
        sample = train.read(written(tmp_path, table, name))
        pd.testing.assert_frame_equal(sample.rows, SAMPLE.rows, check_dtype=False)
        assert [dtype.kind for dtype in sample.rows.dtypes] == ["f", "O", "i", "i", "i", "f"]
        np.testing.assert_array_equal(sample.labels, SAMPLE.labels)


def test_categories_are_text_whatever_they_look_like(tmp_path: Path) -> None:
    """Merchant category codes are numbers in Parquet and digits in CSV; NA is a name like others."""
    codes = np.where(np.arange(12_000) % 2, "5411", "NA")
    assert [*train.read(written(tmp_path, TABLE.assign(**{CATEGORY: codes}), "t.csv")).rows[CATEGORY]] == [*codes]
    numbers = TABLE.assign(**{CATEGORY: 5411})
    assert {*train.read(written(tmp_path, numbers, "t.parquet")).rows[CATEGORY]} == {"5411"}


def with_cell(column: str, row: int, value: object) -> pd.DataFrame:
    """The table with another value in a row, counted from 1."""
    cells = TABLE[column].astype(object)
    cells[row - 1] = value
    return TABLE.assign(**{column: cells})


def one(column: str, rule: str) -> str:
    return f"{column}: 1 of 12,000 rows are wrong, the first is row 7: expected {rule}"


WRONG = {
    "missing column": (TABLE.drop(columns="hour"), f"hour: the column is missing; {HAS.replace('hour, ', '')}"),
    "no label": (TABLE.drop(columns="is_fraud"), f"is_fraud: the column is missing; {HAS.replace(', is_fraud', '')}"),
    "semicolons": (pd.DataFrame({"amount;hour": []}), f"{MISSING}; the file has the columns amount;hour"),
    "text": (with_cell("amount", 7, "ten"), one("amount", AMOUNT)),
    "empty": (with_cell("amount", 7, None), one("amount", AMOUNT)),
    "boolean": (with_cell("amount", 7, True), one("amount", AMOUNT)),
    "infinite": (with_cell("amount", 7, "inf"), one("amount", AMOUNT)),
    "negative": (with_cell("amount", 7, -0.01), one("amount", AMOUNT)),
    "fraction": (with_cell("hour", 7, 1.5), one("hour", HOUR)),
    "hour 24": (with_cell("hour", 7, 24), one("hour", HOUR)),
    "day 7": (
        with_cell("day_of_week", 7, 7),
        one("day_of_week", DAY),
    ),
    "age 131": (with_cell("user_age", 7, 131), one("user_age", "years, a whole number from 0 to 130")),
    "balance": (
        with_cell("account_balance", 7, "-"),
        one("account_balance", BALANCE),
    ),
    "no category": (with_cell(CATEGORY, 7, None), one(CATEGORY, "a string of 1 to 64 characters")),
    "long category": (with_cell(CATEGORY, 7, "x" * 65), one(CATEGORY, "a string of 1 to 64 characters")),
    "long id": (with_cell("transaction_id", 7, "x" * 129), one("transaction_id", "a string of 1 to 128 characters")),
    "same id": (with_cell("transaction_id", 7, "tx_0"), one("transaction_id", "no id twice")),
    "label 2": (with_cell("is_fraud", 7, 2), one("is_fraud", "0 or 1")),
    "label text": (with_cell("is_fraud", 7, "yes"), one("is_fraud", "0 or 1")),
    "one class": (TABLE.assign(is_fraud=0), f"is_fraud: 0 of 12,000 rows are 1: {CLASSES}"),
    "other class": (
        TABLE.assign(is_fraud=1),
        f"is_fraud: 12,000 of 12,000 rows are 1: {CLASSES}",
    ),
    "no rows": (TABLE.head(0), f"is_fraud: 0 of 0 rows are 1: {CLASSES}"),
    "several": (
        TABLE.assign(amount=-1.0, hour=[*[24] * 1500, *[3] * 10_500]).drop(columns="user_age"),
        f"user_age: the column is missing; {HAS.replace('user_age, ', '')}; "
        f"amount: 12,000 of 12,000 rows are wrong, the first is row 1: expected {AMOUNT}; "
        f"hour: 1,500 of 12,000 rows are wrong, the first is row 1: expected {HOUR}",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_bad_rows(tmp_path: Path, case: str) -> None:
    """One message names every column at fault, how many rows, the first of them, and the rule of the API."""
    table, message = WRONG[case]
    path = written(tmp_path, table, "t.csv")
    with pytest.raises(train.DataError) as refused:
        train.read(path)
    assert str(refused.value) == f"{path} cannot be trained on: {message}"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", b"", "No columns to parse from file"),
        ("t.csv", b"amount,hour\n1,2\n1,2,3\n", "Error tokenizing data. C error: Expected 2 fields in line 3, saw 3"),
        ("t.csv", b"amount,hour\n1,2,3\n", "Length of header or names does not match length of data."),
        ("t.csv", b"\xff\xfe\x00", "'utf-8' codec can't decode byte 0xff in position 0"),
        ("t.csv.gz", b"amount", "Not a gzipped file"),
        ("t.parquet", b"amount", "Parquet file size is 6 bytes"),
        ("t.csv", b"amount,amount,hour\n", "amount: there are two such columns"),
        ("absent.csv", None, "No such file or directory"),
        ("t.xlsx", b"PK", "expected a name that ends in .csv, .csv.gz or .parquet"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    """What is no table is said in a line that names the file."""
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(train.DataError) as refused:
        train.read(tmp_path / name)
    assert message in str(refused.value)
    assert str(tmp_path / name) in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("times", [DATED, DATED.strftime("%Y-%m-%d %H:%M:%S"), np.arange(12_000) - 6000.5])
@pytest.mark.parametrize("name", ["t.csv", "t.parquet"])
def test_time_column(tmp_path: Path, name: str, times: object) -> None:
    """Shuffled rows come back in the order of the column: dates or numbers."""
    shuffled = TABLE.assign(time=times).sample(frac=1, random_state=0)
    sample = train.read(written(tmp_path, shuffled, name), "time")
    pd.testing.assert_frame_equal(sample.rows.reset_index(drop=True), SAMPLE.rows, check_dtype=False)
    np.testing.assert_array_equal(sample.labels, SAMPLE.labels)


def test_rows_of_the_same_time_keep_their_order(tmp_path: Path) -> None:
    sample = train.read(written(tmp_path, TABLE.assign(time=np.arange(12_000) // 5), "t.csv"), "time")
    pd.testing.assert_frame_equal(sample.rows, SAMPLE.rows, check_dtype=False)


def test_numbers_beyond_any_real_one(tmp_path: Path) -> None:
    """What the API takes is trained on, cut as the service cuts it."""
    sample = train.read(written(tmp_path, with_cell("account_balance", 7, -1e308), "t.csv"))
    assert sample.rows["account_balance"][6] == -1e30


def test_bad_times(tmp_path: Path) -> None:
    times = DATED.strftime("%Y-%m-%d").to_numpy(object)
    times[6] = "yesterday"
    for column, message in (
        ("time", one("time", "a number, or date and time as in ISO 8601")),
        ("t", "t: the column is missing"),
    ):
        with pytest.raises(train.DataError, match=re.escape(f"cannot be trained on: {message}")):
            train.read(written(tmp_path, TABLE.assign(time=times), "t.csv"), column)


def test_chronological_split() -> None:
    """What is held out is later than what is validated on, and that later than what is trained on."""
    parts = train.split(SAMPLE, 0.25, in_order=True, seed=0)
    assert [len(part) for part in parts] == [7200, 1800, 3000]
    pd.testing.assert_frame_equal(pd.concat([part.rows for part in parts]), SAMPLE.rows)
    np.testing.assert_array_equal(np.concatenate([part.labels for part in parts]), SAMPLE.labels)


def test_stratified_split() -> None:
    """Every row is in one part, at random, and as large a share of frauds in each; as a file grows it stays there."""
    parts = train.split(SAMPLE, 0.25, in_order=False, seed=0)
    assert [len(part) for part in parts] == [7200, 1800, 3000]
    assert sorted(np.concatenate([part.rows.index for part in parts])) == [*range(12_000)]
    assert not np.array_equal(parts[2].rows.index, range(9000, 12_000))
    for part in parts:
        assert abs(part.labels.mean() - SAMPLE.labels.mean()) < 0.0005
        np.testing.assert_array_equal(part.labels, SAMPLE.labels[part.rows.index])
    fewer = SAMPLE.take(np.arange(9000))
    kept = {*train.split(fewer, 0.25, in_order=False, seed=0)[2].rows.index}
    assert len(kept & {*parts[2].rows.index}) > 0.95 * len(kept)
    again, other = (train.split(SAMPLE, 0.25, in_order=False, seed=seed)[2].rows.index for seed in (0, 1))
    assert parts[2].rows.index.equals(again)
    assert not parts[2].rows.index.equals(other)


def test_a_part_without_fraud() -> None:
    """A hold-out in which there is next to no fraud measures nothing."""
    ordered = SAMPLE.take(np.argsort(-SAMPLE.labels, kind="stable"))
    with pytest.raises(
        train.DataError, match=r"^is_fraud: 0 of 1,920 validation rows are 1: expected at least 10 of 0 "
    ):
        train.split(ordered, 0.2, in_order=True, seed=0)


# -- model, calibration, threshold, measures ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large() -> train.Parts:
    return train.split(train.generate(100_000, seed=5), 0.2, in_order=False, seed=0)


def options(*words: str) -> object:
    return train.arguments([*words])


def test_same_seed_same_model(capsys: pytest.CaptureFixture[str]) -> None:
    """Twice the same is found, fitted and decided, and each step of the search is told; another seed finds another."""
    training, validation, held_out = train.split(SAMPLE, 0.2, in_order=False, seed=0)
    words = ("--trees", "10", "--budget", "3", "--seed")
    first, again, other = (train.fit(training, validation, options(*words, seed), PRICES) for seed in "001")
    assert capsys.readouterr().out.count("search 3/3: average precision 0.") == 3
    assert first.chosen == again.chosen
    assert first.chosen != other.chosen
    probabilities = [fitted.model.predict_proba(held_out.rows) for fitted in (first, again)]
    np.testing.assert_array_equal(*probabilities)


def test_search_takes_the_best(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Defaults that learn nothing lose against what is drawn at random, and by time as well."""
    monkeypatch.setattr(train, "DEFAULTS", train.DEFAULTS | {"learning_rate": 1e-9})
    for in_order in (False, True):
        found = train.search(SAMPLE, 10, 3, in_order, seed=0)
        told = [float(mean) for mean in re.findall(r"precision (\S+) with", capsys.readouterr().out)]
        candidates = [train.DEFAULTS, *train.ParameterSampler(train.SPACE, 2, random_state=0)]
        assert found == candidates[int(np.argmax(told))]
        assert found != train.DEFAULTS
        assert len({*told}) == 3


def test_search_by_time(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Folds are later than what they are trained on; those with too little fraud are left out, in the end all."""
    seen = []
    monkeypatch.setattr(train, "cross_val_score", lambda *_, cv, **__: seen.append(cv) or np.zeros(3))
    train.search(SAMPLE, 1, 2, True, seed=0)
    assert [len(cv) for cv in seen] == [3, 3]
    assert all(fitted.max() < compared.min() for fitted, compared in seen[0])
    late = SAMPLE.take(np.argsort(SAMPLE.labels, kind="stable"))
    assert train.search(late, 1, 2, True, seed=0) == train.DEFAULTS
    assert "search left out: there is too little fraud in the earlier rows" in capsys.readouterr().out


def test_nothing_is_turned_upside_down(large: train.Parts, capsys: pytest.CaptureFixture[str]) -> None:
    """Where validation contradicts training, calibration would reverse the ranking: it is left out, and said."""
    training, validation, _ = large
    trees = train.pipeline(5, 0).fit(training.rows, training.labels)
    reversed_ = train.Sample(validation.rows, (trees.predict_proba(validation.rows)[:, 1] < 0.01).astype(int))
    model, found = train.calibrate(trees, reversed_)
    assert model is trees
    assert found["calibration"] == "left out: validation contradicts training"
    assert found["calibration_slope"] < 0
    assert f"calibration {found['calibration']}" in capsys.readouterr().out


def test_calibration(large: train.Parts) -> None:
    """Probabilities are true: in the mean, and among the most suspicious 5 %, where the decisions are."""
    training, validation, held_out = large
    model, _ = train.calibrate(train.pipeline(60, 0).fit(training.rows, training.labels), validation)
    probabilities = model.predict_proba(held_out.rows)[:, 1]
    assert train.calibration_error(held_out.labels, probabilities) < 0.003
    top = probabilities > np.quantile(probabilities, 0.95)
    for rows in (top, ~top):
        assert probabilities[rows].mean() == pytest.approx(held_out.truth[rows].mean(), rel=0.1)


def test_calibration_is_repaired_in_the_leaves(large: train.Parts, capsys: pytest.CaptureFixture[str]) -> None:
    """Trees that believe in 50 % fraud are set right, ranked as before, and still take the fast path."""
    training, validation, held_out = large
    balanced = train.pipeline(20, 0, train.DEFAULTS | {"class_weight": "balanced"}).fit(training.rows, training.labels)
    model, found = train.calibrate(balanced, validation)
    assert "calibration done: likelihood ratio" in capsys.readouterr().out
    before, after = (each.predict_proba(held_out.rows)[:, 1] for each in (balanced, model))
    assert train.calibration_error(held_out.labels, before) > 0.1
    assert train.calibration_error(held_out.labels, after) < 0.003
    expected = found["calibration_slope"] * logit(before) + found["calibration_intercept"]
    np.testing.assert_allclose(logit(after), expected, rtol=0, atol=1e-6)
    rows = [Features(**row) for row in held_out.rows.head(100).to_dict("records")]
    np.testing.assert_allclose(TreeScore(model)(rows), after[:100], rtol=0, atol=1e-9)


def test_what_is_calibrated_is_left_alone(large: train.Parts, capsys: pytest.CaptureFixture[str]) -> None:
    training, validation, _ = large
    trees = train.pipeline(60, 0).fit(training.rows, training.labels)
    assert train.calibrate(trees, validation)[0] is trees
    assert "calibration not needed: likelihood ratio" in capsys.readouterr().out


@pytest.mark.parametrize("missed", [None, 40.0])
@pytest.mark.parametrize("cap", [1.0, 0.02, 0.0])
@pytest.mark.parametrize("places", [1, 2, 17])
def test_threshold_by_cost(missed: float | None, cap: float, places: int) -> None:
    """As cheap as the cheapest of all thresholds that keep the cap, also where many rows score the same."""
    few = SAMPLE.take(np.arange(400))
    probabilities = np.round(few.truth, places)
    prices = train.Prices(missed, 5.0, cap)
    amounts = few.rows["amount"].to_numpy() if missed is None else np.full(400, missed)

    def cost(threshold: float) -> float:
        flagged = [p >= threshold for p in probabilities]
        pairs = zip(flagged, few.labels, amounts, strict=True)
        return sum(5.0 if flag else amount * label for flag, label, amount in pairs)

    allowed = [t for t in [*probabilities, 1.0] if sum(p >= t for p in probabilities) <= cap * 400]
    found = train.best_threshold(probabilities, few, prices)
    assert found in allowed
    assert cost(found) == pytest.approx(min(map(cost, allowed)))
    if cap == 0:
        assert found == 1.0


def test_measures() -> None:
    """Figures small enough to check by hand; the measures that scikit-learn has are scikit-learn's."""
    labels, probabilities = np.array([0, 0, 0, 1, 1]), np.array([0.1, 0.2, 0.6, 0.4, 0.9])
    missed = labels * np.array([1.0, 2.0, 3.0, 40.0, 50.0])
    found = train.measures(labels, probabilities, 0.5, missed, review=5.0)
    assert [*found] == MEASURES
    assert found == pytest.approx(
        {
            "average_precision": 0.5 * 1 + 0.5 * 2 / 3,
            "roc_auc": 5 / 6,
            "log_loss": -np.log([0.9, 0.8, 0.4, 0.4, 0.9]).mean(),
            "brier_score": np.square([0.1, 0.2, 0.6, 0.6, 0.1]).mean(),
            "calibration_error": (0.1 + 0.2 + 0.6 + 0.6 + 0.1) / 5,
            "recall": 0.5,
            "precision": 0.5,
            "alert_rate": 0.4,
            "recall_at_0.1_percent": 0,
            "recall_at_1_percent": 0,
            "recall_at_5_percent": 0,
            "cost": 1000 * (40 + 2 * 5) / 5,
            "cost_of_flagging_nothing": 1000 * 90 / 5,
        }
    )
    many = train.measures(np.repeat(labels, 100), np.repeat(probabilities, 100), 0.5, np.repeat(missed, 100), 5.0)
    assert many["recall_at_5_percent"] == 25 / 200
    assert many["calibration_error"] == pytest.approx(found["calibration_error"])


def test_intervals() -> None:
    """Resamples are of the hold-out, the same for all models, and as wide as chance: mean of labels ± its error."""
    few = SAMPLE.take(np.arange(3000))
    scores = train.Scores("m", few.truth, 0.0)
    one, two = train.bootstrap([scores, scores], few, PRICES, resamples=100)
    assert one.equals(two)
    assert len(one) == 101
    share, error = few.labels.mean(), np.sqrt(few.labels.mean() / 3000)
    assert one["precision"][0] == share
    assert one["precision"][1:].std() == pytest.approx(error, rel=0.25)
    assert one["precision"][1:].mean() == pytest.approx(share, abs=0.5 * error)


def rounds(precision: float, error: float, noise: float, loss: float = 0.03) -> pd.DataFrame:
    random = np.random.default_rng(0).normal(0, 1, (101, 4)) * noise
    random[0] = 0
    names = ["average_precision", "calibration_error", "log_loss", "cost"]
    return pd.DataFrame(random + np.array([precision, error, loss, 600]), columns=names)


CHAMPION = rounds(0.3, 0.002, 0)


@pytest.mark.parametrize(
    ("new", "passed", "verdict"),
    [
        (rounds(0.35, 0.002, 0.001), True, "gate passed against version 7: average precision +0.05 ["),
        (rounds(0.35, 0.002, 0.1), False, ", not better beyond noise; "),
        (rounds(0.25, 0.002, 0.001), False, "gate failed against version 7: average precision -0.05 ["),
        (rounds(0.35, 0.009, 0.001), False, ", better beyond noise; calibration error +0.007 ["),
        (rounds(0.35, 0.009, 0.001), False, ", worse beyond noise; "),
        (rounds(0.35, 0.002, 0.001, loss=0.04), False, ", worse beyond noise; "),
        (rounds(0.35, 0.003, 0.02), True, ", not worse beyond noise; cost per 1,000 +0 ["),
        (CHAMPION, False, "average precision +0 [+0, +0], not better beyond noise; "),
    ],
)
def test_gate(new: pd.DataFrame, passed: bool, verdict: str) -> None:
    """Better beyond noise and not worse calibrated beyond noise: each alone is not enough."""
    found = train.gate([new, CHAMPION], "7")
    assert found[0] is passed
    assert verdict in found[1]


@pytest.mark.parametrize(
    ("auc", "cost", "verdict"),
    [
        (0.7, 500, "gate passed: there is no champion; better than chance beyond noise, cheaper than flagging nothing"),
        (0.51, 500, "gate failed: there is no champion; not better than chance beyond noise, cheaper than"),
        (0.7, 600, "gate failed: there is no champion; better than chance beyond noise, not cheaper than"),
    ],
)
def test_gate_of_the_first(auc: float, cost: float, verdict: str) -> None:
    """Where there is nothing to be better than, it has to be good for something."""
    noise = np.append(0, np.random.default_rng(0).normal(0, 0.02, 100))
    new = pd.DataFrame({"roc_auc": auc + noise, "cost": cost + noise, "cost_of_flagging_nothing": 600 + 0 * noise})
    passed, found = train.gate([new], None)
    assert found.startswith(verdict)
    assert passed is verdict.startswith("gate passed")


def test_gate_without_comparison() -> None:
    """A champion that cannot be scored is not one that is not there."""
    assert train.gate([CHAMPION], "7") == (False, "gate failed: version 7, the champion, cannot be compared with")


# -- the registry ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gated(registry: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A champion trained on a file, too weak; then a better one."""
    path = written(tmp_path_factory.mktemp("gated"), TABLE, "t.csv")
    weak = ("--name", "gated", "--data", str(path), "--trees", "5", "--in-order")
    weak = (*weak, "--cost-missed", "400", "--cost-review", "2", "--max-alert-rate", "0.05")
    assert trained(registry, *weak) == 0
    assert train.aliases("gated") == {"champion": "1"}
    assert trained(registry, "--name", "gated", "--release", "better") == 0
    return registry, path


def version(number: str) -> ModelVersion:
    return MlflowClient().get_model_version("gated", number)


def test_a_better_one_is_promoted(gated: tuple[str, Path]) -> None:
    """The alias moves, the champion before becomes the previous one; tags and description have verdict and figures."""
    assert train.aliases("gated") == {"champion": "2", "previous": "1"}
    first, second = version("1"), version("2")
    assert first.description.startswith("gate passed: there is no champion; ")
    figures = r"average precision \+0\.\d+ \[\+0\.\d+, \+0\.\d+\], better beyond noise; "
    assert re.match(f"gate passed against version 1: {figures}", second.description)
    assert "; promoted, with --promote if-better  \n" in second.description
    metrics = MlflowClient().get_run(second.run_id).data.metrics
    assert second.tags == {"release": "better", "gate": "passed", "promote": "if-better"} | {
        name: f"{metrics[name]:.6g}" for name in MEASURES
    }
    for name in MEASURES:
        assert metrics[f"{name}_low"] <= metrics[f"{name}_high"]
        assert {f"{name}_champion", f"{name}_champion_low", f"{name}_logistic_regression"} <= {*metrics}
        assert f"{name}_best_reachable" in metrics
    assert metrics["average_precision"] < metrics["average_precision_best_reachable"]


def test_the_run_says_what_went_in(gated: tuple[str, Path]) -> None:
    """Options, counts, the file's SHA-256, commit, versions, lineage; plots that are pictures, a report with all."""
    run = MlflowClient().get_run(version("1").run_id)
    parameters = run.data.params
    assert parameters["data_sha256"] == hashlib.sha256(gated[1].read_bytes()).hexdigest()
    counts = [parameters[f"{part}_{what}"] for what in ("rows", "frauds") for part in train.PART_NAMES]
    assert counts[:3] == ["7680", "1920", "2400"]
    assert [int(count) for count in counts[3:]] == [part.labels.sum() for part in train.split(SAMPLE, 0.2, True, 0)]
    assert {
        "cost_review": "2.0",
        "cost_missed": "400.0",
        "trees": "5",
        "in_order": "True",
        "learning_rate": "0.1",
    }.items() <= parameters.items()
    assert {"scikit-learn_version", "mlflow_version", "python_version", "git_commit", "threshold"} <= {*parameters}
    assert [(item.dataset.name, str(gated[1]) in item.dataset.source) for item in run.inputs.dataset_inputs] == [
        (name, True) for name in train.PART_NAMES
    ]
    folder = Path(mlflow.artifacts.download_artifacts(run_id=run.info.run_id))
    plots = {path.stem: path.read_bytes() for path in (folder / "plots").iterdir()}
    assert {*plots} == {"precision_recall", "calibration", "scores", "cost", "permutation_importance"}
    assert all(png.startswith(b"\x89PNG") for png in plots.values())
    page = (folder / "report.html").read_text()
    assert re.findall(r'(?:src|href)="(.{14})', page) == ["data:image/png"] * 5
    assert page.count("<tr>") == len(MEASURES) + len(parameters)
    assert "gate passed: there is no champion" in page


def test_options_arrive(gated: tuple[str, Path]) -> None:
    """The threshold is that of the validation rows by the prices given; the champion is measured at its own."""
    weak = mlflow.sklearn.load_model("models:/gated/1")
    _, validation, _ = train.split(SAMPLE, 0.2, in_order=True, seed=0)
    prices = train.Prices(400.0, 2.0, 0.05)
    threshold = train.best_threshold(weak.predict_proba(validation.rows)[:, 1], validation, prices)
    client = MlflowClient()
    assert float(client.get_run(version("1").run_id).data.params["threshold"]) == threshold
    _, _, held_out = train.split(train.generate(20_000, 0), 0.2, in_order=False, seed=0)
    flagged = weak.predict_proba(held_out.rows)[:, 1] >= threshold
    assert client.get_run(version("2").run_id).data.metrics["alert_rate_champion"] == flagged.mean()


@pytest.mark.parametrize(
    ("choice", "passed", "promoted"),
    [
        ("always", True, True),
        ("always", False, True),
        ("if-better", True, True),
        ("if-better", False, False),
        ("never", True, False),
        ("never", False, False),
    ],
)
def test_promote(choice: str, passed: bool, promoted: bool) -> None:
    assert train.is_promoted(choice, passed) is promoted


def test_a_worse_one_is_not_promoted(gated: tuple[str, Path]) -> None:
    """By the command, on every core: it tells how far it is, registers the version, leaves the alias, and exits 3."""
    registry, path = gated
    words = ["--name", "gated", "--data", str(path), "--trees", "1", "--budget", "2", "--time-column", "user_age"]
    process = Process(sys.executable, "train.py", *words, environ={"MLFLOW_TRACKING_URI": registry})
    status, log = process.wait(), process.log
    process.stop()
    assert status == train.NOT_PROMOTED == 3, log
    steps = [
        "reading",
        "12,000 transactions",
        "search 2/2",
        "fitting 1 trees",
        "measured on 200/200 resamples",
        "registering",
    ]
    assert sorted(steps, key=log.index) == steps
    [verdict] = re.findall(
        r"^gate failed against version 2: .*, not better beyond noise; .*; not promoted, with .*$", log, re.M
    )
    assert version("3").description.startswith(verdict)
    assert version("3").tags["gate"] == "failed"
    assert train.aliases("gated") == {"champion": "2", "previous": "1"}


@pytest.fixture
def command(gated: tuple[str, Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., object]]:
    """train.py as a program, in this process; gives what it ends with."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", gated[0])

    def ended(*words: str) -> object:
        monkeypatch.setattr(sys, "argv", ["train.py", *words])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(HERE / "train.py"), run_name="__main__")
        return ended.value.code

    yield ended
    mlflow.set_tracking_uri(gated[0])


def test_rollback(command: Callable[..., object], capsys: pytest.CaptureFixture[str]) -> None:
    """Champion and previous change places, and change back; nothing is rolled back to nothing."""
    assert command("rollback", "--name", "gated") == 0
    assert capsys.readouterr().out.endswith(" gated: champion is version 1 again, previous is version 2\n")
    assert train.aliases("gated") == {"champion": "1", "previous": "2"}
    assert command("rollback", "--name", "gated") == 0
    assert train.aliases("gated") == {"champion": "2", "previous": "1"}
    problem = command("rollback", "--name", "nobody")
    assert problem == "train: nobody has no version to roll back to: its aliases are none"


def test_what_ends_it_is_one_line(
    command: Callable[..., object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = written(tmp_path, TABLE.drop(columns="hour"), "bad.csv")
    assert command("--name", "gated", "--data", str(bad)).startswith(f"train: {bad} cannot be trained on: hour: the ")
    assert command("--name", "gated", "--release", "better") == "train: release better is version 2 of gated already"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{bad}/x.db")
    assert re.fullmatch(r"train: .*\S", command("--name", "gated"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:s3cret@127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    assert re.fullmatch(r"train: .*refused.*", message := command("--name", "gated"))
    assert "s3cret" not in message


def test_what_cannot_be_done_is_said(gated: tuple[str, Path], tmp_path: Path) -> None:
    """Bad data ends it before a run is made; a champion that has moved meanwhile is left where it is."""
    registry, _ = gated
    client = MlflowClient()
    bad = written(tmp_path, TABLE.drop(columns="hour"), "bad.csv")
    runs = len(client.search_runs([mlflow.get_experiment_by_name("gated").experiment_id]))
    with pytest.raises(train.DataError, match="hour: the column is missing"):
        trained(registry, "--name", "gated", "--data", str(bad))
    assert len(client.search_runs([mlflow.get_experiment_by_name("gated").experiment_id])) == runs
    with pytest.raises(ModelError, match=r"^version 2 is not promoted: the champion is version 2 by now, not 1$"):
        train.promote("gated", "2", "1")


def test_a_champion_that_cannot_be_compared_with(registry: str, capsys: pytest.CaptureFixture[str]) -> None:
    """With --promote if-better it ends the training; else it is said, and there is no comparison."""
    with mlflow.start_run():
        mlflow.sklearn.log_model(
            train.logistic_regression().fit(SAMPLE.rows, SAMPLE.labels),
            name="model",
            registered_model_name="unsigned",
            pip_requirements=[],
        )
    MlflowClient().set_registered_model_alias("unsigned", "champion", "1")
    known = config(mlflow_tracking_uri=registry)
    with pytest.raises(
        ModelError, match=r"^version 1, the champion, cannot be compared with: .*missing, .*; see --promote$"
    ):
        train.champion_of(options("--name", "unsigned"), known)
    assert train.champion_of(options("--name", "unsigned", "--promote", "always"), known) == ("1", None)
    assert "version 1, the champion, cannot be compared with: " in capsys.readouterr().out


def test_if_missing(gated: tuple[str, Path]) -> None:
    assert trained(gated[0], "--name", "gated", "--if-missing") == 0
    assert len(MlflowClient().search_model_versions("name='gated'")) <= 3


def test_metadata_round_trip(champion: str, model: Model, app: TestApp) -> None:
    """What training has found out is what the service has in memory, and the threshold is the one it decides by."""
    run = MlflowClient(champion).get_run(MlflowClient(champion).get_model_version("fraud-detector", "1").run_id)
    assert model.metadata.metrics == {name: run.data.metrics[name] for name in MEASURES}
    assert model.threshold == float(run.data.params["threshold"])
    training, validation, held_out = train.split(train.generate(20_000, 0), 0.2, in_order=False, seed=0)
    reference, numbers = model.metadata.reference, training.rows[[*NUMBERS]]
    assert reference.ranges == {name: (numbers[name].min(), numbers[name].max()) for name in NUMBERS}
    assert reference.categories == sorted(train.CATEGORIES)
    ordinary = numbers.quantile(0.5, interpolation="lower").to_dict()
    assert reference.transaction == Features(merchant_category="grocery_stores", **ordinary)
    scores = model.score([Features(**row) for row in validation.rows.to_dict("records")])
    for tenths, limit in enumerate(reference.score_deciles, 1):
        below = scores[scores < limit]
        assert (below < below.max() - 1e-9).sum() < tenths / 10 * len(scores) <= len(below)
        assert abs(scores - limit).min() > 1e-12
    counts = np.histogram(scores, [0, *reference.score_deciles, 1])[0]
    assert reference.score_shares == (counts / len(scores)).tolist()
    rows = held_out.rows.head(200).to_dict("records")
    for row, probability in zip(rows, model.score([Features(**row) for row in rows]), strict=True):
        answer = app.post_json("/predict", {"transaction_id": "t", **row}).json
        assert answer["is_fraud"] is bool(probability >= float(run.data.params["threshold"]))


def test_a_model_of_your_own(registry: str, tmp_path: Path) -> None:
    """README's lines, run as they stand, make a version that the service takes."""
    readme = (HERE / "README.md").read_text()
    [code] = re.findall(r"```python\n(import mlflow\n.*?)```", readme.partition("### A model of your own")[2], re.S)
    assert "sklearn.tree._tree.Tree" in TRUSTED_TYPES
    columns = train.pipeline(1, 0)[0]
    forest = make_pipeline(columns, RandomForestClassifier(5, random_state=0)).fit(SAMPLE.rows, SAMPLE.labels)
    exec(code, {"model": forest, "rows": SAMPLE.rows})
    known = config(mlflow_tracking_uri=registry, model_uri="models:/my-model@champion")
    app = TestApp(create_app(known, load(acquire(known, tmp_path, 60), known)))
    frame = pd.DataFrame([{name: TRANSACTION[name] for name in SAMPLE.rows}])
    answer = app.post_json("/predict", TRANSACTION).json
    assert answer["fraud_probability"] == pytest.approx(forest.predict_proba(frame)[0, 1], abs=1e-9)
    assert app.get("/health").json["scorer"] == "treelite"


# -- the command line --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        ["--rows", "0"],
        ["--rows", "many"],
        ["--test-size", "1"],
        ["--seed", "-1"],
        ["--budget", "0"],
        ["--cost-missed", "-1"],
        ["--cost-missed", "nan"],
        ["--max-alert-rate", "1.1"],
        ["--promote", "perhaps"],
        ["--colour"],
        ["undo"],
        ["--time-column", "hour"],
        ["--in-order", "--data", "x.csv", "--time-column", "hour"],
        ["rollback", "--seed", "1"],
        ["--name", "a/b"],
        ["--cost-review", "inf"],
    ],
)
def test_wrong_options(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Status 2, and a line that names the option."""
    with pytest.raises(SystemExit) as ended:
        train.arguments(words)
    assert ended.value.code == 2
    assert words[0] in capsys.readouterr().err


def test_help_explains_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train.arguments(["--help"])
    shown = capsys.readouterr().out
    for name in vars(train.arguments([])):
        flag = name if name == "command" else "--" + name.replace("_", "-")
        assert name == "command" or re.search(rf"^  {flag}\b.*\n?\s+\w", shown, re.M), flag
