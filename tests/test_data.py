"""Transactions: read and checked, generated, split so that it can be told what a model has seen."""

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import data
from data import DataError, Sample, Split, generate, midpoint, read, reference, split
from model import CATEGORY

SAMPLE = generate(12_000, seed=4)
TABLE = SAMPLE.rows.assign(is_fraud=SAMPLE.labels, transaction_id=[f"tx_{row}" for row in range(12_000)])
DATED = pd.date_range("2026-01-01", periods=12_000, freq="min", tz="UTC")
AMOUNT, HOUR = "an amount of money, a number from 0", "an hour, a whole number from 0 to 23"
DAY, BALANCE = "a day, a whole number from 0 (Monday) to 6 (Sunday)", "an amount of money, a number, may be negative"
HAS = f"the file has the columns {', '.join(TABLE)}"
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
        sample = read(written(tmp_path, table, name))
        pd.testing.assert_frame_equal(sample.rows, SAMPLE.rows, check_dtype=False)
        assert [dtype.kind for dtype in sample.rows.dtypes] == ["f", "O", "i", "i", "i", "f"]
        np.testing.assert_array_equal(sample.labels, SAMPLE.labels)


def test_categories_are_text_whatever_they_look_like(tmp_path: Path) -> None:
    """Merchant category codes are numbers in Parquet and digits in CSV; NA is a name like others."""
    codes = np.where(np.arange(12_000) % 2, "5411", "NA")
    assert [*read(written(tmp_path, TABLE.assign(**{CATEGORY: codes}), "t.csv")).rows[CATEGORY]] == [*codes]
    numbers = TABLE.assign(**{CATEGORY: 5411})
    assert {*read(written(tmp_path, numbers, "t.parquet")).rows[CATEGORY]} == {"5411"}


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
    "control character": (with_cell(CATEGORY, 7, "a\x1fb"), one(CATEGORY, "no control characters")),
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
    with pytest.raises(DataError) as refused:
        read(path)
    assert str(refused.value) == f"{path} cannot be trained on: {message}"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", b"", "No columns to parse from file"),
        ("t.csv", b"amount,hour\n1,2\n1,2,3\n", "Error tokenizing data. C error: Expected 2 fields in line 3, saw 3"),
        ("t.csv", b"amount,hour\n1,2,3\n", "Length of header or names does not match length of data."),
        (
            "t.csv",
            "amount\n1\n".encode("utf-16"),
            "line 1 is not text in UTF-8, the encoding expected: it has the byte b'\\xff'",
        ),
        (
            "t.csv",
            b"amount,x\n1,a\n1,caf\xe9\n",
            "line 3 is not text in UTF-8, the encoding expected: it has the byte b'\\xe9'",
        ),
        (
            "t.csv",
            b"amount,x\n1,a\n1,b\0c\n",
            "line 3 is not text in UTF-8, the encoding expected: it has the byte b'\\x00'",
        ),
        ("t.csv", b"amount;hour\n1;2\n", "its columns seem to be separated by ';': expected commas"),
        ("t.csv", b"amount;hour\n1,50;2\n", "its columns seem to be separated by ';': expected commas"),
        ("t.csv", b"amount\thour\n1,50\t2\n", "its columns seem to be separated by '\\t': expected commas"),
        ("t.csv.gz", b"amount", "Not a gzipped file"),
        ("t.csv.gz", b"\x1f\x8b\x08\0\0\0\0\0\0" + 20 * b"\xff", "Error -3 while decompressing data: invalid"),
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
    with pytest.raises(DataError) as refused:
        read(tmp_path / name)
    assert message in str(refused.value)
    assert str(tmp_path / name) in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("times", [DATED, DATED.strftime("%Y-%m-%d %H:%M:%S"), np.arange(12_000) - 6000.5])
@pytest.mark.parametrize("name", ["t.csv", "t.parquet"])
def test_time_column(tmp_path: Path, name: str, times: object) -> None:
    """Shuffled rows come back in the order of the column: dates or numbers."""
    shuffled = TABLE.assign(time=times).sample(frac=1, random_state=0)
    sample = read(written(tmp_path, shuffled, name), "time")
    pd.testing.assert_frame_equal(sample.rows.reset_index(drop=True), SAMPLE.rows, check_dtype=False)
    np.testing.assert_array_equal(sample.labels, SAMPLE.labels)


def test_dates_are_told_from_numbers(tmp_path: Path) -> None:
    """Only dates have months; numbers, also as text, are but an order, unless they are seconds since 1970."""
    first = 1767225600
    for times, dated, begin in (
        (DATED, True, first),
        (DATED.strftime("%Y-%m-%d"), True, first),
        (first + np.arange(12_000), True, first),
        ((first + np.arange(12_000)).astype(str), True, first),
        (np.arange(12_000).astype(str), False, 0),
        (10**3 * (first + np.arange(12_000)), True, first),
        (10**6 * (first + np.arange(12_000)), True, first),
        (10**9 * (first + np.arange(12_000)), True, first),
        (20260101000000 + np.arange(12_000), False, 20260101000000),
        (2026010100 + np.arange(12_000), False, 2026010100),  # year, month, day and hour
        (first * np.where(np.arange(12_000) < 11_900, 1, 1000), False, first),
    ):
        sample = read(written(tmp_path, TABLE.assign(time=times), "t.parquet"), "time")
        assert sample.dated is dated
        assert sample.times[0] == begin
        assert sample.when(begin) == ("2026-01-01 00:00 UTC" if dated else f"{begin}.0")


def test_times_without_an_end(tmp_path: Path) -> None:
    """Infinity is no time; the latest date that can be read is shown."""
    path = written(tmp_path, TABLE.assign(time=np.where(np.arange(12_000) < 9, np.inf, 1.0)), "t.parquet")
    with pytest.raises(DataError, match="time: 9 of 12,000 rows are wrong, the first is row 1: expected a number"):
        read(path, "time")
    last = read(written(tmp_path, TABLE.assign(time="9999-12-31T23:59:59-01:00"), "t.csv"), "time")
    assert last.when(last.times[-1]) == "10000-01-01 00:59 UTC"
    assert data.replace(last, dated=False).when(1e30) == "1e+30"


def test_rows_of_the_same_time_keep_their_order(tmp_path: Path) -> None:
    sample = read(written(tmp_path, TABLE.assign(time=np.arange(12_000) // 5), "t.csv"), "time")
    pd.testing.assert_frame_equal(sample.rows, SAMPLE.rows, check_dtype=False)


def test_numbers_beyond_any_real_one(tmp_path: Path) -> None:
    """What the API takes is trained on, cut as the service cuts it."""
    sample = read(written(tmp_path, with_cell("account_balance", 7, -1e308), "t.csv"))
    assert sample.rows["account_balance"][6] == -1e30


def test_bad_times(tmp_path: Path) -> None:
    times = DATED.strftime("%Y-%m-%d").to_numpy(object)
    times[6] = "yesterday"
    for column, message in (
        ("time", one("time", "a number, or date and time as in ISO 8601")),
        ("t", "t: the column is missing"),
        ("hour", "hour: expected a column with the time, not a field of the transaction"),
    ):
        with pytest.raises(DataError, match=re.escape(f"cannot be trained on: {message}")):
            read(written(tmp_path, TABLE.assign(time=times), "t.csv"), column)


def test_a_boolean_label(tmp_path: Path) -> None:
    """Item 15: true and false in Parquet are labels; true as an amount is not a number."""
    for kind in ("bool", "boolean"):  # of NumPy and, with missing values, of pandas
        path = written(tmp_path, TABLE.assign(is_fraud=TABLE["is_fraud"].astype(kind)), "t.parquet")
        np.testing.assert_array_equal(read(path).labels, SAMPLE.labels)
    path = written(tmp_path, with_cell("is_fraud", 7, None).astype({"is_fraud": "boolean"}), "t.parquet")
    with pytest.raises(DataError, match=one("is_fraud", "0 or 1")):
        read(path)
    path = written(tmp_path, TABLE.assign(amount=TABLE["amount"] > 0), "t.parquet")
    with pytest.raises(
        DataError, match=f"amount: 12,000 of 12,000 rows are wrong, the first is row 1: expected {AMOUNT}"
    ):
        read(path)


@pytest.mark.parametrize("character", ["\0", "\n", "\x1f", "\x7f", "\x85"])
def test_control_characters_in_parquet(tmp_path: Path, character: str) -> None:
    with pytest.raises(DataError, match=re.escape(one(CATEGORY, "no control characters"))):
        read(written(tmp_path, with_cell(CATEGORY, 7, f"a{character}b"), "t.parquet"))


def test_categories_that_look_like_identifiers(tmp_path: Path) -> None:
    """Item 15: 1,000 categories are taken as they are, more with a warning."""
    warning = "WARNING: 1,001 values of merchant_category look like identifiers, not kinds"
    for kinds, warnings in ((254, []), (1000, []), (1001, [warning])):
        names = [f"shop {row % kinds}" for row in range(12_000)]
        notes = read(written(tmp_path, TABLE.assign(**{CATEGORY: names}), "t.csv")).notes
        assert [note for note in notes if note.startswith("WARNING")] == warnings
        assert len(notes) == len(warnings) + (kinds > 254)


@pytest.mark.parametrize("value", ["9999-12-31", pd.Timedelta(1, "h"), b"\xff"])
def test_other_columns_may_hold_anything(tmp_path: Path, value: object) -> None:
    path = written(tmp_path, TABLE.assign(valid=value), "t.parquet")
    assert len(read(path)) == 12_000
    if value == "9999-12-31":
        sample = read(path, "valid")
        assert sample.when(sample.times[0]) == "9999-12-31 00:00 UTC"


@pytest.mark.parametrize("times", [DATED, DATED.strftime("%Y-%m-%d %H:%M:%S"), np.arange(12_000)])
def test_a_column_that_looks_like_a_time(tmp_path: Path, times: object) -> None:
    """Item 7: a time that is not used is warned of, by its name or by its values; one that is used is not."""
    for name in ("created_at",) if isinstance(times, np.ndarray) else ("created_at", "x"):
        path = written(tmp_path, TABLE.assign(**{name: times, "plate": "B-7", "merchant_lat": 52.5}), "t.csv")
        [note] = read(path).notes
        assert note.startswith(f"WARNING: {name} looks like a time, and --time-column is not given: ")
        assert read(path, name).notes == ()
    assert read(written(tmp_path, TABLE.assign(status="ok", rate=0.5), "t.csv")).notes == ()


# -- the hold-out ------------------------------------------------------------------------------------------------------


def test_split_by_time() -> None:
    """What is held out is later than what is trained on, also where many rows have the same time."""
    timed = data.replace(SAMPLE, times=np.arange(12_000) // 7.0)
    training, held_out, how = split(timed, 0.25)
    pd.testing.assert_frame_equal(pd.concat([training.rows, held_out.rows]), SAMPLE.rows)
    assert how == Split("time", 0.25, last=float(training.times.max()))
    assert training.times.max() < held_out.times.min()
    assert 0 <= 3000 - len(held_out) < 7


def test_no_row_changes_sides() -> None:
    """Item 6: the value of its hash decides: a row stays where it is in a longer, shorter or shuffled file."""
    training, held_out, how = split(SAMPLE, 0.25)
    assert how == Split("hash", 0.25)
    assert sorted([*training.rows.index, *held_out.rows.index]) == [*range(12_000)]
    assert len(held_out) / 12_000 == pytest.approx(0.25, abs=0.02)
    assert held_out.labels.mean() == pytest.approx(SAMPLE.labels.mean(), abs=0.003)
    np.testing.assert_array_equal(held_out.labels, SAMPLE.labels[held_out.rows.index])
    shuffled = SAMPLE.take(np.random.default_rng(0).permutation(12_000)[:9000])
    longer = pd.concat([generate(9000, seed=5).rows, SAMPLE.rows], ignore_index=True)
    kept = split(Sample(longer, np.arange(21_000) % 2), 0.25)[1].rows.index
    assert {row - 9000 for row in kept if row >= 9000} == {*held_out.rows.index}
    assert {*split(shuffled, 0.25)[1].rows.index} == {*held_out.rows.index} & {*shuffled.rows.index}
    assert {*split(SAMPLE, 0.1)[1].rows.index} < {*held_out.rows.index}


def test_the_hash_is_the_one_that_is_recorded() -> None:
    """If pandas hashed otherwise, rows would change sides unnoticed: then KEY has to change too."""
    rows = pd.DataFrame(
        {"amount": [1.5], CATEGORY: ["é"], "hour": [3], "day_of_week": [1], "user_age": [30], "account_balance": [-2.0]}
    )
    assert data.KEY == "fraud-api split1"
    assert f"{data._hashes(Sample(rows, np.zeros(1)))[0]:016x}" == "85728e2ad1b67702"


def test_what_a_model_has_not_seen() -> None:
    """Item 6: of each kind of split, also in a file that has grown or was cut; else it is refused with a sentence."""
    timed = data.replace(SAMPLE, times=np.arange(12_000.0))
    older, newer = timed.take(np.arange(8000)), timed.take(np.arange(2000, 12_000))
    training, _, by_time = split(older, 0.2)
    assert not {*training.rows.index} & {*newer.take(by_time.unseen(newer)).rows.index}
    assert by_time.unseen(newer).sum() == 12_000 - 6400
    np.testing.assert_array_equal(by_time.unseen(timed), timed.times > 6399)
    np.testing.assert_array_equal(
        Split("hash", 0.3).unseen(SAMPLE) & Split("hash", 0.2).unseen(SAMPLE), Split("hash", 0.2).unseen(SAMPLE)
    )
    for record, sample in (
        (Split("hash", 0.2, key="another"), SAMPLE),
        (by_time, SAMPLE),
        (Split("order", 0.2, last="85728e2ad1b67702"), SAMPLE),  # of a version made before
    ):
        with pytest.raises(DataError, match=r"^which rows were seen cannot be told: split by \w+, key [\w -]+$"):
            record.unseen(sample)


def test_a_part_without_fraud() -> None:
    """A hold-out in which there is next to no fraud measures nothing."""
    ordered = data.replace(SAMPLE.take(np.argsort(-SAMPLE.labels, kind="stable")), times=np.arange(12_000.0))
    with pytest.raises(
        DataError, match=r"^is_fraud: 0 of 2,400 hold-out rows are 1: expected at least 10 of 0 and of 1$"
    ):
        split(ordered, 0.2)


# -- what travels with a model -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limit", "expected"),
    [(0.0, 0.05), (0.05, 0.05), (0.1, 0.05), (0.11, 0.2), (0.3, 0.2), (0.6, 0.6), (0.9, 0.6), (1.0, 0.95)],
)
def test_between(limit: float, expected: float) -> None:
    """A limit flags the same rows as before, and lies in the middle between two scores; last digits are no scores."""
    scores = np.array([0.1, 0.3, 0.3 + 1e-15, 0.9])
    assert midpoint(limit, scores) == pytest.approx(expected, abs=1e-12)


def test_reference_of_scores_that_tie() -> None:
    found = reference(SAMPLE, np.repeat([0.1, 0.2, 0.3], [700, 200, 100]))
    assert found.score_deciles == pytest.approx([0.15] * 7 + [0.25] * 2)
    assert found.score_shares == [0.7, 0, 0, 0, 0, 0, 0, 0.2, 0, 0.1]
