"""Transactions to train on: read from a file and checked by the rules of the API, or generated; and how they are split.

Rows are held out by the value of their hash, or as the latest. `Split` records how, so that it can be told later which
rows a model has never seen.
"""

import gzip
import re
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pandas as pd

import model
from model import CATEGORY, DTYPES, LARGEST, MONEY, NUMBERS, SIGNATURE, Features, Floats, Reference

LABEL, ID = "is_fraud", "transaction_id"
# The rules of the API, and of the label, as JSON Schema.
RULES = model.RULES | {
    LABEL: {"type": "integer", "minimum": 0, "maximum": 1, "multipleOf": 1, "description": "0 or 1"},
}
# "" and "NA" are text, not missing values; a surplus cell is an error.
CSV: Any = {"dtype": {CATEGORY: str, ID: str}, "keep_default_na": False, "low_memory": False, "index_col": False}
UNREADABLE = (OSError, EOFError, ValueError, TypeError, NotImplementedError, zlib.error, pd.errors.ParserWarning)
CONTROL = r"[\x00-\x1f\x7f-\x9f]"
NO_TEXT = re.compile("[\0\udc80-\udcff]")  # NUL, and what errors="surrogateescape" makes of bytes not in UTF-8
TIME_NAME = r"(?i)(^|_)(date|time|datetime|timestamp|ts|at)(_|$)"
SECONDS = (946_684_800, 2_000_000_000)  # since 1970, from the year 2000 to 2033; stamps like 2026010100 are above
FEWEST = 100  # rows of either class, to train and measure on
FEWEST_IN_PART = 10
MOST_CATEGORIES = 1000  # that monitoring knows; more are probably merchants, not categories
MOST_ENCODED = 254  # categories that the trees distinguish: HistGradientBoosting takes 255 values
KEY = "fraud-api split1"  # of the hash, 16 bytes: another key, or another hash in pandas, holds out other rows

Column = Any  # of a pandas DataFrame


class DataError(Exception):
    """The transactions cannot be trained on; the message names columns, rows and rules."""


@dataclass(frozen=True)
class Sample:
    """Transactions (rows × 6) and their labels (1 is fraud).

    `truth` are the probabilities behind the labels where they are generated, `times` the values of the time column, in
    seconds since 1970 where they are `dated`. `notes` are sentences about the file that a reader of the report needs.
    """

    rows: pd.DataFrame
    labels: np.ndarray
    truth: Floats | None = None
    times: Floats | None = None
    dated: bool = False
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, chosen: np.ndarray) -> "Sample":
        """The rows of a mask or of positions."""
        truth, times = (None if each is None else each[chosen] for each in (self.truth, self.times))
        return replace(self, rows=self.rows.iloc[chosen], labels=self.labels[chosen], truth=truth, times=times)

    def when(self, time: float) -> str:
        """A time as people read it: as a date, where times are dates."""
        if not self.dated:
            return str(float(time))
        return np.datetime_as_string(np.datetime64(int(time), "s"), unit="m").replace("T", " ") + " UTC"

    def evenly(self, most: int) -> "Sample":
        """At most `most` rows, evenly spaced from the first to the last."""
        return self.take(np.linspace(0, len(self) - 1, min(len(self), most)).astype(int))


# -- from a file -------------------------------------------------------------------------------------------------------


def read(path: Path, time_column: str | None = None) -> Sample:
    """The transactions of a file, in its order or that of the time column. Raises `DataError`."""
    try:
        with warnings.catch_warnings(action="error", category=pd.errors.ParserWarning):
            table = _table(path)
        columns = {name: _typed(table[name], rule["type"]) for name, rule in RULES.items() if name in table}
        times, dated = _moments(table[time_column]) if time_column in table else (None, False)
    except UNREADABLE as error:
        raise DataError(f"{path} cannot be read: {str(error).strip().partition(chr(10))[0]}") from None
    if found := [*_faults(table, columns, time_column, times)]:
        raise DataError(f"{path} cannot be trained on: {'; '.join(found)}")
    rows = pd.DataFrame({name: columns[name].to_numpy(DTYPES[kind]) for name, kind in SIGNATURE})
    rows[[*MONEY]] = rows[[*MONEY]].clip(-LARGEST, LARGEST)  # as the service does
    labels, notes = columns[LABEL].to_numpy(np.int64), tuple(_notes(table, rows, time_column))
    if times is None:
        return Sample(rows, labels, notes=notes)
    return Sample(rows, labels, None, times.to_numpy(), dated, notes).take(np.argsort(times, kind="stable"))


def _table(path: Path) -> pd.DataFrame:
    if path.suffix.lower() in (".parquet", ".pq"):
        return pd.read_parquet(path)
    if not path.name.lower().endswith((".csv", ".csv.gz")):
        raise ValueError("expected a name that ends in .csv, .csv.gz or .parquet")
    opened: Any = gzip.open if path.suffix.lower() == ".gz" else open
    with opened(path, "rt", encoding="utf-8", errors="surrogateescape", newline="\n") as file:
        for number, line in enumerate(file, 1):  # pandas does not name the line, and cuts text at a NUL byte
            if found := NO_TEXT.search(line):
                what = f"it has the byte {found[0].encode(errors='surrogateescape')!r}"
                raise ValueError(f"line {number:,} is not text in UTF-8, the encoding expected: {what}")
            if number == 1 and "," not in line and (found := re.search("[;\t|]", line)):
                raise ValueError(f"its columns seem to be separated by {found[0]!r}: expected commas")
    return pd.read_csv(path, **CSV)


def _typed(column: Column, kind: str) -> Column:
    """Text, "" if it is missing; or numbers as float64, NaN if they are missing."""
    if kind == "string":
        return column.astype(object).where(column.notna(), "").astype(str)
    if column.dtype.kind in ("mM" if kind == "integer" else "bmM"):  # true is 1 as a label only; a date is no number
        return pd.Series(np.full(len(column), np.nan))
    return pd.Series(pd.to_numeric(column, errors="coerce").to_numpy(np.float64, na_value=np.nan))


def _moments(column: Column) -> tuple[Column, bool]:
    """Numbers or, from ISO 8601, seconds since 1970, NaN where there is none; and whether nearly all are dates.

    Dates without a zone are UTC. Numbers are dates if all are seconds of the years from 2000 to 2033, or all milli-,
    micro- or nanoseconds of them.
    """
    numbers = _typed(column, "number")
    if column.dtype.kind in "bm":
        return numbers, False
    if numbers.notna().any():
        for unit in (1, 10**3, 10**6, 10**9):
            if (numbers / unit).dropna().between(*SECONDS).all():
                return numbers / unit, True
        return numbers, False
    moments = pd.to_datetime(column, errors="coerce", format="ISO8601", utc=True)
    seconds = (moments.astype("datetime64[us, UTC]") - pd.Timestamp("1970-01-01", tz="UTC")).dt.total_seconds()
    return seconds, bool(moments.notna().mean() > 0.9)


def _faults(
    table: pd.DataFrame, columns: dict[str, Column], time_column: str | None, times: Column | None
) -> Iterator[str]:
    """A sentence for each fault of a table; the first row below the header is row 1."""
    needed = [name for name in (*RULES, time_column) if name not in (None, ID)]
    if missing := [f"{name}: the column is missing" for name in needed if name not in table]:
        yield from missing
        yield f"the file has the columns {', '.join(map(str, table.columns))[:300]}"
    yield from (f"{name}: there are two such columns" for name in [*needed, ID] if f"{name}.1" in table)
    if time_column in RULES:
        yield f"{time_column}: expected a column with the time, not a field of the transaction"
    checks = [(name, _keeps(column, RULES[name]), RULES[name]["description"]) for name, column in columns.items()]
    if ID in columns:
        checks.append((ID, ~columns[ID].duplicated(), "no id twice"))
    if CATEGORY in columns:
        checks.append((CATEGORY, ~columns[CATEGORY].str.contains(CONTROL), "no control characters"))
    if times is not None:
        checks.append((str(time_column), np.isfinite(times), "a number, or date and time as in ISO 8601"))
    for name, right, rule in checks:
        if wrong := int((~right).sum()):
            where = f"{wrong:,} of {len(table):,} rows are wrong, the first is row {int(np.argmin(right)) + 1:,}"
            yield f"{name}: {where}: expected {rule}"
    if LABEL in columns and _keeps(columns[LABEL], RULES[LABEL]).all():
        frauds = int(columns[LABEL].sum())
        if not FEWEST <= frauds <= len(table) - FEWEST:
            yield f"{LABEL}: {frauds:,} of {len(table):,} rows are 1: expected at least {FEWEST} of 0 and of 1"


def _keeps(column: Column, rule: dict[str, Any]) -> Column:
    """Which values follow a rule of the API (JSON Schema)."""
    if rule["type"] == "string":
        return column.str.len().between(rule["minLength"], rule["maxLength"])
    within = column.between(rule.get("minimum", -np.inf), rule.get("maximum", np.inf)) & np.isfinite(column)
    return within & (column % rule["multipleOf"] == 0) if "multipleOf" in rule else within


def _notes(table: pd.DataFrame, rows: pd.DataFrame, time_column: str | None) -> Iterator[str]:
    """Sentences about what training accepts but a reader of the report must know."""
    if (kinds := rows[CATEGORY].nunique()) > MOST_ENCODED:
        yield f"{kinds:,} values of {CATEGORY}: the {kinds - MOST_ENCODED + 1:,} rarest are taken as one"
    if kinds > MOST_CATEGORIES:
        yield f"WARNING: {kinds:,} values of {CATEGORY} look like identifiers, not kinds"
    others = [] if time_column else [str(name) for name in table.columns if name not in RULES]
    if found := [name for name in others if re.search(TIME_NAME, name) or _moments(table[name].head(1000))[1]]:
        yield (
            f"WARNING: {', '.join(found)} looks like a time, and --time-column is not given: "
            "rows are held out at random, so figures for later transactions may be far worse than those measured"
        )


# -- generated ---------------------------------------------------------------------------------------------------------

# category: share of transactions, mean log amount, weight of the category in the log-odds of fraud
CATEGORIES = {
    "grocery_stores": (0.24, 3.4, -0.9),
    "restaurants": (0.18, 3.2, -0.7),
    "online_retail": (0.14, 3.8, 0.8),
    "gas_stations": (0.12, 3.6, -0.2),
    "pharmacies": (0.06, 3.0, -0.6),
    "utilities": (0.06, 4.4, -1.4),
    "entertainment": (0.06, 3.5, 0.0),
    "clothing": (0.05, 4.0, 0.1),
    "electronics": (0.04, 5.2, 1.1),
    "travel": (0.03, 5.9, 0.5),
    "jewelry": (0.01, 6.0, 1.4),
    "money_transfer": (0.01, 5.3, 1.9),
}
# Transactions by hour of the day: few at night, most in the late afternoon.
HOURS = [10, 6, 4, 3, 3, 5, 15, 30, 40, 45, 50, 55, 65, 60, 55, 55, 60, 70, 75, 70, 60, 50, 35, 20]
INTERCEPT = -7.58  # gives 1 % fraud


def generate(rows: int, seed: int) -> Sample:
    """Synthetic transactions with the probabilities that their labels are drawn from.

    Fraud is rare (about 1 %), more likely for amounts that are large for their category or for the account, at night
    and above all at night in risky categories, for the youngest and oldest users and for overdrawn accounts.
    As the probabilities are known, so is the best that any model can reach.
    """
    random = np.random.default_rng(seed)
    share, log_amount, risk = np.array(list(CATEGORIES.values())).T
    category = random.choice(len(share), rows, p=share / share.sum())
    excess = random.standard_normal(rows)
    data = pd.DataFrame(
        {
            "amount": np.exp(log_amount[category] + 0.8 * excess).round(2),
            "merchant_category": np.array(list(CATEGORIES))[category],
            "hour": random.choice(24, rows, p=np.array(HOURS) / sum(HOURS)),
            "day_of_week": random.integers(0, 7, rows),
            "user_age": (18 + random.gamma(3, 9.5, rows)).clip(max=100).astype(int),
            "account_balance": (np.exp(7.6 + 1.1 * random.standard_normal(rows)) - 250).round(2),
        }
    )
    night = data["hour"] < 6
    log_odds = (
        INTERCEPT
        + risk[category]
        + 1.9 * excess.clip(min=0.3)
        + 1.5 * night
        + 1.1 * (night & (risk[category] > 0.4))
        + 1.3 * np.log1p(4 * data["amount"] / (data["account_balance"].abs() + 100))
        + 0.6 * ((data["user_age"] < 22) | (data["user_age"] > 70))
        + 0.8 * (data["account_balance"] < 0)
    )
    probability = np.asarray(1 / (1 + np.exp(-log_odds)))
    return Sample(data, (random.random(rows) < probability).astype(np.int64), probability)


# -- the hold-out ------------------------------------------------------------------------------------------------------


class Split(msgspec.Struct, frozen=True):
    """How rows were held out, by "hash" or "time"; recorded with a version. `last` is the latest time in training.

    Versions of before may have the mode "order" with a hash as `last`: what they have seen is not known.
    """

    mode: str
    test_size: float
    key: str = KEY
    last: float | str | None = None

    def unseen(self, sample: Sample) -> np.ndarray:
        """A mask of the rows that a model with this split was not trained on. Raises `DataError` if it is unknown."""
        if self.key == KEY and self.mode == "hash":
            return np.asarray(pd.util.hash_array(_hashes(sample)) / 2.0**64 < self.test_size)
        if self.mode == "time" and sample.times is not None:
            return np.asarray(sample.times > float(self.last or 0))
        raise DataError(f"which rows were seen cannot be told: split by {self.mode}, key {self.key}")


def _hashes(sample: Sample) -> np.ndarray:
    """A hash of the values of each row; it does not depend on the file or the position."""
    return np.asarray(pd.util.hash_pandas_object(sample.rows, index=False, hash_key=KEY))


def split(sample: Sample, test_size: float) -> tuple[Sample, Sample, Split]:
    """Split into training rows and hold-out: the latest rows if their times are known, else chosen by hash."""
    chosen = Split("hash", test_size)
    if sample.times is not None:
        last = len(sample) - round(len(sample) * test_size) - 1
        chosen = Split("time", test_size, last=float(sample.times[last]))
    held_out = chosen.unseen(sample)
    parts = sample.take(~held_out), sample.take(held_out)
    for part, name in zip(parts, ("training", "hold-out"), strict=True):
        if not FEWEST_IN_PART <= part.labels.sum() <= len(part) - FEWEST_IN_PART:
            found = f"{part.labels.sum():,} of {len(part):,} {name} rows are 1"
            raise DataError(f"{LABEL}: {found}: expected at least {FEWEST_IN_PART} of 0 and of 1")
    return *parts, chosen


# -- what travels with a model -----------------------------------------------------------------------------------------


def midpoint(limit: float, scores: Floats) -> float:
    """The midpoint of the lowest score that is at least `limit` and the next lower one, so that no score equals it."""
    distinct = np.unique([0.0, *scores, 1.0])
    distinct = distinct[np.diff(distinct, prepend=-1) > 1e-9]  # rounding makes smaller differences
    at = max(int(np.searchsorted(distinct, limit)), 1)
    return float(distinct[at - 1 : at + 1].mean())


def reference(training: Sample, scores: Floats) -> Reference:
    """Summary statistics of the training rows, for monitoring and explanations; they contain no row.

    Each limit between tenths of the scores lies between two scores.
    """
    rows, numbers = training.rows, training.rows[[*NUMBERS]]
    categories = rows[CATEGORY].value_counts()
    ordinary = numbers.quantile(0.5, interpolation="lower").to_dict() | {CATEGORY: categories.index[0]}
    tenths = np.quantile(scores, np.arange(1, 10) / 10, method="inverted_cdf")
    limits = [midpoint(float(np.nextafter(tenth, 1)), scores) for tenth in tenths]
    counts, _ = np.histogram(scores, [0, *limits, 1])
    return Reference(
        score_deciles=limits,
        score_shares=(counts / len(scores)).tolist(),
        ranges={name: (float(numbers[name].min()), float(numbers[name].max())) for name in NUMBERS},
        categories=sorted(categories.index[:MOST_CATEGORIES]),
        transaction=Features(**ordinary),
    )
