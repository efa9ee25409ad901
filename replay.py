"""Compute recorded decisions again: `python replay.py --decisions decisions.ndjson --data transactions.csv`.

The record is the service's log as it was written. Each decision is scored by the version that made it, which is
fetched, checked and loaded as the service does it. `--version` and `--threshold` ask instead what another version or
another threshold would have decided. Exits with

0  every decision with data is the same, to 1e-9; or the comparison with --version or --threshold is written
1  an error: in the record, the data, the registry, or a version that is gone, has changed or cannot be loaded
2  a wrong option
3  there are differences
"""

import argparse
import re
import sys

from config import Config, prepare

DIFFERENT = 3


def _probability(text: str) -> float:
    if not 0 <= float(text) <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not from 0 to 1")
    return float(text)


def _version(text: str) -> str:
    if not re.fullmatch("[1-9][0-9]*", text):
        raise argparse.ArgumentTypeError(f"{text} is not the number of a version")
    return text


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    """The options of the command line, or of `words`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--decisions", metavar="FILE", required=True, help="log lines of the service, .gz if compressed")
    columns = "transaction_id, the fields of the API and, to measure with --version or --threshold, is_fraud"
    add("--data", metavar="FILE", required=True, help=f"CSV, CSV.gz or Parquet with {columns}")
    add("--version", metavar="NUMBER", type=_version, help="decide by this version instead, and compare")
    add("--threshold", metavar="SHARE", type=_probability, help="decide by this threshold instead, and compare")
    add("--output", metavar="FOLDER", help="where to write the comparison (default: beside the decisions)")
    missed = "what a fraud costs that is not flagged (default its amount)"
    add("--cost-missed", metavar="MONEY", type=float, help=missed)
    add("--cost-review", metavar="MONEY", type=float, default=5.0, help="what an alert costs (default %(default).2f)")
    return parser.parse_args(words)


if __name__ == "__main__":  # before the libraries are imported: they read the environment then
    options, config = arguments(), prepare("replay")

import gzip
import sqlite3
import time
import warnings
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime, timedelta
from itertools import islice, repeat
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import mlflow
import msgspec
import numpy as np
import pandas as pd
from msgspec import Meta

from data import CSV, FEWEST_IN_PART, ID, LABEL, RULES, DataError, Sample, _keeps, _typed
from model import FIELDS, Model, ModelError, digest
from report import INTERVAL, Scored, bootstrap, readable, short
from train import RESAMPLES
from versions import as_served

TOLERANCE = 1e-9
NAMED = 10  # differences that are named
CHUNK = 20_000  # rows at a time
UNREADABLE = (OSError, EOFError, zlib.error)  # a file that is not there, or broken
SECONDS = 5.0  # between two lines of progress
MOST_MEASURED = 200_000  # decisions that intervals are computed from
MEASURES = ("average_precision", "recall", "precision", "cost")
ENDS = ("on record", "now")
WORDS = {True: "fraud", False: "not fraud"}
CAUSES = {
    True: "the data is the same, the model or the record differs",
    False: "the data differs",
    None: "the data or the model differs, which only a digest and RECORD_KEY can tell",
}
# SQLite keeps both tables in a file without a name (SQLITE_TMPDIR, else /var/tmp), which is gone when the program ends.
TABLES = f"""
PRAGMA journal_mode = OFF;
PRAGMA cache_size = -65536;
CREATE TABLE data (id TEXT, {", ".join(FIELDS)}, label);
CREATE TABLE decided (version, line, week, amount, label, old, before, new, after, difference);
"""
FIND = f"SELECT rowid, {', '.join(FIELDS)}, label FROM data WHERE id = ?"  # noqa: S608  (names from the code)
TOTALS = "SELECT COUNT(*), COUNT(difference) FROM decided"
FIRST = "SELECT difference FROM decided WHERE difference IS NOT NULL ORDER BY line LIMIT ?"
VERSIONS = "SELECT version, COUNT(*), MAX(ABS(new - old)), SUM(after != before) FROM decided GROUP BY version"
CHANGES = """
SELECT week, COUNT(*) AS "Decisions", SUM(before) AS "Alerts on record", SUM(after) AS "Alerts now",
    SUM(after > before) AS "Newly flagged", SUM(amount * (after > before)) AS "Amount newly flagged",
    SUM(after < before) AS "No longer flagged", SUM(amount * (after < before)) AS "Amount no longer flagged"
FROM decided GROUP BY week
"""
SAMPLE = """
SELECT week, amount, label, old, before, new, after FROM decided
WHERE label IS NOT NULL AND rowid % (1 + (SELECT MAX(rowid) FROM decided) / :most) = 0
"""

T = TypeVar("T")
Probability = Annotated[float, Meta(ge=0, le=1)]
Version = tuple[str, str, str, str]  # name, number, release, first digits of the SHA-256


class Decision(msgspec.Struct, frozen=True, gc=False):
    """One decision as the service logs it."""

    logger: Literal["request", "decision"]
    time: datetime
    request_id: str
    transaction_id: str
    fraud_probability: Probability
    is_fraud: bool
    threshold: Probability
    model_name: str
    registry_version: Annotated[str, Meta(pattern="^[1-9][0-9]*$")]
    model_version: str
    sha256: Annotated[str, Meta(pattern="^[0-9a-f]{12}$")]
    digest: str | None = None
    status: int = 200


decode = msgspec.json.Decoder(Decision).decode

Figure = tuple[str, str, float, float, float]
# The number of a decision's line, the decision, and its transaction: number, six values in the order of FIELDS, label.
Row = tuple[int, Decision, tuple[Any, ...]]


# -- the two files -----------------------------------------------------------------------------------------------------


def with_progress(what: str, chunks: Iterable[T], share: Callable[[], float]) -> Iterator[T]:
    """The chunks; meanwhile a bar on standard error, or a line every few seconds where that is no terminal."""
    bar, shown = sys.stderr.isatty(), time.monotonic()
    for chunk in chunks:
        yield chunk
        if time.monotonic() - shown >= (0.2 if bar else SECONDS):
            shown, done = time.monotonic(), min(share(), 1.0)
            text = f"\r[{'#' * int(40 * done):40}] {done:4.0%} {what}" if bar else f"{what}: {done:.0%}\n"
            print(text, end="", file=sys.stderr, flush=True)
    print("\r\033[K" * bar, end="", file=sys.stderr, flush=True)


def lines_of(path: Path) -> Iterator[list[tuple[int, bytes]]]:
    """The lines of a log with their numbers, a chunk at a time."""
    with open(path, "rb") as file, gzip.open(file) if path.suffix.lower() == ".gz" else file as opened:
        lines = enumerate(opened, 1)
        chunks, size = iter(lambda: [*islice(lines, CHUNK)], []), max(path.stat().st_size, 1)
        yield from with_progress(f"replaying {path}", chunks, lambda: file.tell() / size)


def tables_of(path: Path) -> Iterator[pd.DataFrame]:
    """The rows of a file of transactions, a chunk at a time."""
    name = path.name.lower()
    with open(path, "rb") as file:
        if name.endswith((".parquet", ".pq")):
            from pyarrow.parquet import ParquetFile  # noqa: PLC0415  (it is not everywhere, and takes memory)

            chunks = (batch.to_pandas() for batch in ParquetFile(file).iter_batches(CHUNK))
        elif name.endswith((".csv", ".csv.gz")):
            chunks = pd.read_csv(file, chunksize=CHUNK, compression="gzip" if name.endswith(".gz") else None, **CSV)
        else:
            raise ValueError("expected a name that ends in .csv, .csv.gz or .parquet")
        yield from with_progress(f"reading {path}", chunks, lambda: file.tell() / path.stat().st_size)


def columns_in(table: pd.DataFrame, first: int) -> dict[str, Any]:
    """The columns of a chunk that begins with row `first`, by the rules of the API. Raises `DataError`."""
    names = [ID, *FIELDS, *[LABEL] * (LABEL in table)]
    if missing := [name for name in names if name not in table]:
        raise DataError(f"the column is missing: {', '.join(missing)}")
    if LABEL in table and table[LABEL].dtype == bool:
        table = table.astype({LABEL: float})
    columns = {name: _typed(table[name], RULES[name]["type"]) for name in names}
    for name, column in columns.items():
        if not (right := _keeps(column, RULES[name])).all():
            row = first + int(np.argmin(right))
            raise DataError(f"{name}: row {row:,} is wrong: expected {RULES[name]['description']}")
    return {LABEL: pd.Series([None] * len(table))} | columns


def load_data(database: sqlite3.Connection, path: Path) -> None:
    """Fill the table `data`. Raises `DataError`."""
    rows = 0
    try:
        with warnings.catch_warnings(action="error", category=pd.errors.ParserWarning):
            for table in tables_of(path):
                columns = columns_in(table, rows + 1)
                values = zip(*(columns[name].tolist() for name in (ID, *FIELDS, LABEL)), strict=True)
                database.executemany("INSERT INTO data VALUES (?, ?, ?, ?, ?, ?, ?, ?)", values)
                rows += len(table)
        database.execute("CREATE UNIQUE INDEX by_id ON data (id)")
    except sqlite3.IntegrityError:
        raise DataError(f"{path} cannot be replayed: {ID}: expected no id twice") from None
    except (*UNREADABLE, DataError, ValueError, TypeError, pd.errors.ParserWarning) as error:
        raise DataError(f"{path} cannot be replayed: {str(error).strip().partition(chr(10))[0]}") from None


# -- decided again -----------------------------------------------------------------------------------------------------


def load_version(name: str, number: str, sha256: str, config: Config) -> Model | str:
    """A version as the service loads it, or a sentence that says why there is none."""
    try:
        model = as_served(name, number, config)
        if not model.snapshot.sha256.startswith(sha256):
            raise ModelError(
                f"its SHA-256 begins with {model.snapshot.sha256[: len(sha256)]}, not {sha256} as on record"
            )
        return model
    except Exception as error:  # MLflow's, skops' and scikit-learn's exceptions have no common type
        why = config.mask(str(error).partition("\n")[0] or repr(error))
        return f"{printable(name)} version {number}: {why}"


def printable(text: str) -> str:
    """Text that others chose, without what a terminal would obey."""
    return ascii(text)[1:-1]


class Replay:
    """The record, joined with the data and decided again, a chunk at a time."""

    def __init__(self, options: argparse.Namespace, config: Config) -> None:
        self.options, self.config, self.key = options, config, (config.record_key or "").encode()
        self.database = sqlite3.connect("")
        self.database.executescript(TABLES)
        self.decisions, self.failed, self.unreadable, self.first = 0, Counter[str](), 0, ""
        self.repeated = 0
        self.models: dict[tuple[str, ...], Model | str] = {}
        named = {"version": options.version, "threshold": options.threshold}
        self.instead = ", ".join(f"{name} {value}" for name, value in named.items() if value is not None)

    def decide_all(self, path: Path) -> None:
        """Decide again what a log has decided, as far as there is data."""
        [(rows,)] = self.database.execute("SELECT COALESCE(MAX(rowid), 0) FROM data")
        self.seen = np.zeros(rows + 1, bool)  # whether a transaction has a decision yet
        for lines in lines_of(path):
            for version, rows in self.join(lines).items():
                model = self.model(version)
                if isinstance(model, str):
                    self.failed[model] += len(rows)
                elif rows:
                    self.decide(version, rows, model)

    def join(self, lines: list[tuple[int, bytes]]) -> dict[Version, list[Row]]:
        """The decisions that have data, by the version that made them."""
        joined: dict[Version, list[Row]] = defaultdict(list)
        for number, line in lines:
            if b'"fraud_probability"' in line:
                try:
                    each = decode(line)
                except ValueError as error:
                    self.unreadable += 1
                    self.first = self.first or f"line {number}: {error}"
                    continue
                if each.status == 200:
                    self.decisions += 1
                    rows = joined[each.model_name, each.registry_version, each.model_version, each.sha256]
                    if found := self.database.execute(FIND, (each.transaction_id,)).fetchone():
                        rows.append((number, each, found))
        return joined

    def model(self, version: Version) -> Model | str | None:
        """The version that made a decision, or the one to decide instead; None if only the threshold is another."""
        if self.instead and not self.options.version:
            return None
        name, number, _, sha256 = version
        if self.options.version:
            number, sha256 = self.options.version, ""
        key = name, number, sha256
        if key not in self.models:
            self.models[key] = load_version(name, number, sha256, self.config)
        return self.models[key]

    def decide(self, version: Version, rows: list[Row], model: Model | None) -> None:
        """Score and decide, and fill the table `decided`."""
        numbers, decisions, found = zip(*rows, strict=True)
        places, *columns, labels = zip(*found, strict=True)
        first = np.unique(np.array(places)[~self.seen[list(places)]])
        self.seen[first], self.repeated = True, self.repeated + len(places) - len(first)
        old, limits, before = (
            np.array([getattr(each, name) for each in decisions])
            for name in ("fraud_probability", "threshold", "is_fraud")
        )
        new = model.scorer(columns) if model else old
        if self.options.threshold is not None:
            limits = self.options.threshold
        elif self.instead and model:
            limits = np.array([model.threshold_for(amount) for amount in columns[0]])
        other = ~(np.abs(new - old) <= TOLERANCE)
        after = np.where(other, new, old) >= limits
        weeks = [each.time.date() - timedelta(each.time.weekday()) for each in decisions]
        name, number, release, sha256 = map(printable, version)
        names = repeat(f"{name} version {number} ({release}, SHA-256 {sha256})")
        values = [names, numbers, map(str, weeks), columns[0], labels]
        values += [each.tolist() for each in (old, before, new, after)]
        texts = repeat(None) if self.instead else self.differences(rows, other, new, after)
        insert = "INSERT INTO decided VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
        self.database.executemany(insert, zip(*values, texts, strict=False))

    def differences(self, rows: list[Row], other: Any, new: Any, after: Any) -> Iterator[str | None]:
        """For each decision what differs, in a sentence, or None."""
        for (number, each, found), p_differs, p, fraud in zip(rows, other, new, after, strict=True):
            same = None
            if self.key and each.digest:
                same = digest(self.key, found[1:-1]) == each.digest
            if not (p_differs or fraud != each.is_fraud or same is False):
                yield None
                continue
            yield (
                f"line {number}, {printable(each.transaction_id)}, request {printable(each.request_id)}: "
                f"{each.fraud_probability:.9f} and {WORDS[each.is_fraud]} on record, {p:.9f} and {WORDS[bool(fraud)]} "
                f"now, threshold {each.threshold:.6g}; {CAUSES[same]}"
            )


# -- what came of it ---------------------------------------------------------------------------------------------------


def conclude(replay: Replay) -> int:
    """Print what was found, and write the comparison; give the exit status. Raises `DataError`."""
    options, lost = replay.options, sum(replay.failed.values())
    compared, different = replay.database.execute(TOTALS).fetchone()
    if not (compared or replay.failed or replay.unreadable):
        raise DataError(f"{options.decisions} has no decision about a transaction in {options.data}")
    without = replay.decisions - compared - lost
    print(
        f"{options.decisions}: {replay.decisions:,} decisions, {without:,} without data, {replay.repeated:,} repeated"
    )
    verdict = "nothing was compared"
    if replay.instead and compared:
        verdict = f"written: {compare(replay.database, options, replay.instead)}.md and .csv"
    elif compared:
        audit(replay.database)
        verdict = f"EQUAL: {compared:,} decisions, to {TOLERANCE:g}"
    if different:
        verdict = f"DIFFERENT: {different:,} of {compared:,} decisions"
    for why, count in replay.failed.items():
        print(f"{why}; {count:,} decisions are not computed again")
    if replay.unreadable:
        print(f"{replay.unreadable:,} of its lines cannot be read as a decision; {replay.first}")
    incomplete = replay.failed or replay.unreadable
    print(f"INCOMPLETE; {verdict}" if incomplete else verdict)
    return 1 if incomplete else DIFFERENT if different else 0


def audit(database: sqlite3.Connection) -> None:
    """Print a line for each version, and the first differences."""
    for version, count, largest, flips in database.execute(VERSIONS):
        print(f"{version}: {count:,} decisions, largest difference {largest:.1e}, {flips:,} decided otherwise")
    for (text,) in database.execute(FIRST, (NAMED,)):
        print(text)


def compare(database: sqlite3.Connection, options: argparse.Namespace, instead: str) -> Path:
    """Print the comparison and write it as Markdown and CSV; give the path without its end."""
    decisions = Path(options.decisions)
    folder = Path(options.output or decisions.parent)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{decisions.name.partition('.')[0]}-{re.sub('[ ,]+', '-', instead)}"
    sample = pd.read_sql(SAMPLE, database, params={"most": MOST_MEASURED})
    table = pd.DataFrame(figures(database, sample, options), columns=["period", "figure", "value", "low", "high"])
    table["figure"] = table["figure"].str.replace(" now", f" with {instead}")
    table.to_csv(f"{path}.csv", index=False)
    text = markdown(table)
    if len(sample):
        low, high = INTERVAL
        text += f"\n[ ]: {low:.0%} to {high:.0%} of {RESAMPLES} resamples of {len(sample):,} decisions\n"
    print(f"\n{text}")
    Path(f"{path}.md").write_text(f"# {decisions.name} with {instead}\n\n{text}", encoding="utf-8")
    return path


def figures(database: sqlite3.Connection, sample: pd.DataFrame, options: argparse.Namespace) -> Iterator[Figure]:
    """The period, the figure, its value, and the ends of its interval."""
    changes = pd.read_sql(CHANGES, database, index_col="week")
    periods = {"all": (changes.sum(), sample)}
    if len(changes) > 1:
        weeks = changes.iterrows()
        periods |= {f"week of {week}": (counts, sample[sample["week"] == week]) for week, counts in weeks}
    for period, (counts, chosen) in periods.items():
        rates = {f"Alert rate {end}": counts[f"Alerts {end}"] / counts["Decisions"] for end in ENDS}
        yield from ((period, name, value, np.nan, np.nan) for name, value in (counts.to_dict() | rates).items())
        yield from ((period, *figure) for figure in measured(chosen, options) if len(sample))


def measured(sample: pd.DataFrame, options: argparse.Namespace) -> Iterator[tuple[str, float, float, float]]:
    """Measures of both with their intervals; NaN where there are too few of either class."""
    labels, rounds = sample["label"].to_numpy(np.int64), {}
    if FEWEST_IN_PART <= labels.sum() <= len(labels) - FEWEST_IN_PART:
        columns = zip(ENDS, ("old", "new"), ("before", "after"), strict=True)
        models = [Scored(end, sample[p].to_numpy(), sample[fraud].to_numpy(bool)) for end, p, fraud in columns]
        rounds = bootstrap(models, Sample(sample, labels), options, RESAMPLES)
    for measure in MEASURES:
        for end in ENDS:
            values = rounds[end][measure] if rounds else pd.Series([np.nan])
            yield f"{readable(measure)} {end}", values[0], *values[1:].quantile(INTERVAL)


def markdown(table: pd.DataFrame) -> str:
    """Figures × periods."""
    texts = []
    for value, low, high in table[["value", "low", "high"]].itertuples(index=False):
        texts.append(short(value) + (f" [{short(low)}, {short(high)}]" if low <= high else ""))
    cells = table.assign(text=texts).pivot(index="figure", columns="period", values="text")
    cells = cells.loc[table["figure"].unique(), table["period"].unique()]
    rows = [["", *cells], ["---", *["--:"] * len(cells.columns)], *cells.itertuples(name=None)]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def run(options: argparse.Namespace, config: Config) -> int:
    """Decide everything again and print what differs; give the exit status. Raises `DataError`."""
    mlflow.set_tracking_uri(config.mlflow_tracking_uri)
    replay = Replay(options, config)
    load_data(replay.database, Path(options.data))
    replay.decide_all(Path(options.decisions))
    return conclude(replay)


def main() -> int | str:
    """The exit status, or what went wrong."""
    try:
        return run(options, config)
    except DataError as error:
        return f"replay: {error}"
    except (*UNREADABLE, sqlite3.Error) as error:
        return f"replay: {options.decisions} cannot be replayed: {error}"


if __name__ == "__main__":
    sys.exit(main())
