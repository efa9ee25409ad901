"""The model: from the MLflow Model Registry into memory, and from transactions to probabilities of fraud.

In a child of the master process, one version is downloaded into memory (tmpfs) and verified (`fetch_in_child`). Each
worker calls `load` after the fork and gets a `Model`. Both raise `ModelError` with a message for the operator.
"""

import fcntl
import hashlib
import hmac
import json
import logging
import os
import re
import resource
import select
import shutil
import signal
import tempfile
import time
import traceback
import zipfile
from bisect import bisect_left
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import reduce
from itertools import repeat
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Any

import mlflow.artifacts
import mlflow.sklearn
import msgspec
import numpy as np
import pandas as pd
import skops.io  # noqa: F401  (MLflow imports it to load a model; imported here, the workers share its memory)
import treelite.sklearn
from mlflow import MlflowClient
from mlflow.models import Model as MLmodel
from msgspec import Meta
from scipy.special import beta, expit

from config import Config, without_credentials

log = logging.getLogger("gunicorn.error")

Floats = np.ndarray[Any, np.dtype[np.float64]]
Columns = Sequence[Any]  # the values of n transactions, one sequence of n values per field

HINT = "README: A model of your own"
GOLDEN_TOLERANCE = 1e-6
LEAF_MASK_TOLERANCE = 1e-9
MOST_LEAVES = 64  # bits of the largest unsigned integer
MOST_TABLE_BYTES = 2**26
# Rows × trees of a piece. Arrays of 0.8 MB stay in the CPU cache; memory of 1 MB is returned to the kernel each time.
LEAVES_AT_A_TIME = 100_000
# DataFrames are clipped to this: forests convert to float32 and refuse what does not fit.
LARGEST = 1e30

SKOPS_FILE, SKOPS_PROTOCOL = "model.skops", 2
# Everything that a model in skops format may consist of: how objects are loaded, types and functions.
_lines = Path(__file__).with_name("trusted_types.txt").read_text().splitlines()
TRUSTED_TYPES = {line for line in _lines if line and not line.startswith("#")}

# Blocked amid a fork: the exception that their handlers raise at the start would be lost in a hook of `os.fork`.
STOP_SIGNALS = {signal.SIGHUP, signal.SIGINT, signal.SIGTERM}


class ModelError(Exception):
    """The model cannot be served; the message is one sentence that says why."""


class Features(msgspec.Struct, frozen=True, gc=False):
    """What the model sees of a transaction. The one schema: column order, MLflow signature and validation follow it.

    Whole numbers are floats with `multiple_of=1`, so that `14` and `14.0` are the same hour, and a row is all floats.
    """

    amount: Annotated[float, Meta(ge=0, description="an amount of money, a number from 0")]
    merchant_category: Annotated[str, Meta(min_length=1, max_length=64, description="a string of 1 to 64 characters")]
    hour: Annotated[float, Meta(ge=0, le=23, multiple_of=1, description="an hour, a whole number from 0 to 23")]
    day_of_week: Annotated[
        float, Meta(ge=0, le=6, multiple_of=1, description="a day, a whole number from 0 (Monday) to 6 (Sunday)")
    ]
    user_age: Annotated[float, Meta(ge=0, le=130, multiple_of=1, description="years, a whole number from 0 to 130")]
    account_balance: Annotated[float, Meta(description="an amount of money, a number, may be negative")]


TransactionId = Annotated[str, Meta(min_length=1, max_length=128, description="a string of 1 to 128 characters")]


class Transaction(Features, frozen=True, gc=False):
    """One transaction as the client sends it."""

    transaction_id: TransactionId


CATEGORY = "merchant_category"
FIELDS = Features.__struct_fields__
NUMBERS = tuple(name for name in FIELDS if name != CATEGORY)
MONEY = ("amount", "account_balance")
values_of = attrgetter(*FIELDS)


# {field: its rule}, as JSON Schema
RULES: dict[str, dict[str, Any]] = msgspec.json.schema(Transaction)["$defs"]["Transaction"]["properties"]
# [(column, MLflow type)], in column order: the signature that a model must have.
SIGNATURE = [
    (name, "string" if name == CATEGORY else "long" if "multipleOf" in RULES[name] else "double") for name in FIELDS
]
DTYPES = {"string": "object", "long": "int64", "double": "float64"}


def columns_of(rows: Sequence[Features]) -> Columns:
    """The six columns of some rows, in the order of `FIELDS`."""
    return list(zip(*map(values_of, rows), strict=True))


def digest(key: bytes, values: Sequence[Any]) -> str:
    """32 hex digits that prove which six values were scored, without telling them (HMAC-SHA256, RFC 2104)."""
    return hmac.new(key, msgspec.json.encode(list(values)), "sha256").hexdigest()[:32]


class Golden(Features, frozen=True):
    """A row and the probability it had at training."""

    fraud_probability: Annotated[float, Meta(ge=0, le=1)]


class Reference(msgspec.Struct, frozen=True):
    """What monitoring and explanations compare with: small numbers about the training data."""

    score_deciles: Annotated[list[float], Meta(min_length=9, max_length=9)]
    ranges: dict[str, tuple[float, float]]
    categories: list[str]
    transaction: Features
    # The share of the training scores in each decile; a tenth unless scores tie.
    score_shares: Annotated[tuple[float, ...], Meta(min_length=10, max_length=10)] = (0.1,) * 10

    def __post_init__(self) -> None:
        ordered = all(name in self.ranges and self.ranges[name] == tuple(sorted(self.ranges[name])) for name in NUMBERS)
        if self.score_deciles != sorted(self.score_deciles) or not ordered:
            raise ValueError("expected deciles in order and a range for every number")


class Metadata(msgspec.Struct, frozen=True):
    """What travels with the model in its `MLmodel` file (`log_model(metadata=…)`).

    A version decides either by a fixed `threshold` on the probability or by expected cost: `review_cost` is what an
    alert costs, in the currency of the amounts.
    """

    golden: Annotated[list[Golden], Meta(min_length=1)]
    threshold: Annotated[float, Meta(ge=0, le=1)] | None = None
    review_cost: Annotated[float, Meta(gt=0)] | None = None
    metrics: dict[str, float] = {}  # on the hold-out
    reference: Reference | None = None

    def __post_init__(self) -> None:
        if (self.threshold is None) == (self.review_cost is None):
            raise ValueError("expected either `threshold` or `review_cost`")


class Contribution(msgspec.Struct, frozen=True):
    """One field's share of a probability (its Shapley value), and the probability `without` it.

    `without` is the probability if this field had the reference's value and all others were as they are.
    """

    field: str
    value: float
    without: float


class Explanation(msgspec.Struct, frozen=True):
    """The probability of the reference transaction and each field's contribution, the largest first.

    Base value and contributions add up to the probability.
    """

    base_value: float
    contributions: list[Contribution]


class Snapshot(msgspec.Struct, frozen=True):
    """One version of the model, its files in a folder in memory."""

    path: str
    name: str
    number: str
    release: str | None
    registry_uri: str
    sha256: str
    unsafe: list[str]  # what in it may run code of its own; empty unless MODEL_ALLOW_UNSAFE

    @property
    def version(self) -> str:
        """The `model_version` in predictions: the `release` tag, else `v` and the registry's number."""
        return self.release or f"v{self.number}"


# -- scorers: columns → probabilities ----------------------------------------------------------------------------------

# All coalitions of fields (64 × 6): bit f of a row's number says whether field f comes from the transaction or from the
# reference. Their weights in the Shapley value of each field (64 × 6).
COALITIONS = ((np.arange(2 ** len(FIELDS))[:, None] >> np.arange(len(FIELDS))) & 1).astype(bool)
_others = COALITIONS.sum(axis=1, keepdims=True) - COALITIONS
# beta(k + 1, n - k) is k! (n - 1 - k)! / n!
SHAPLEY_WEIGHTS = np.where(COALITIONS, 1, -1) * beta(_others + 1, len(FIELDS) - _others)


class PipelineScorer:
    """Any scikit-learn classifier, through its own `predict_proba`. Raises `ModelError` if it has none."""

    name = "sklearn"
    rows_at_a_time = 2**16  # in `explain`, which bounds memory

    def __init__(self, estimator: Any) -> None:
        if not hasattr(estimator, "predict_proba"):
            raise ModelError(f"{type(estimator).__name__} has no predict_proba")
        if list(estimator.classes_) != [0, 1]:
            raise ModelError(f"the model's classes are {list(estimator.classes_)}, expected 0 and 1 (fraud)")
        self.estimator = estimator

    def __call__(self, columns: Columns) -> Floats:
        """The probabilities of fraud of n transactions, in order."""
        return np.asarray(self.estimator.predict_proba(frame(columns)), dtype=np.float64)[:, 1]

    def coalitions(self, columns: Columns, reference: Sequence[Any]) -> Floats:
        """The probabilities (n × 64) of n transactions with every choice of fields taken from the reference."""
        mixed = [
            np.where(COALITIONS[:, number], np.array(values, object)[:, None], reference[number]).ravel()
            for number, values in enumerate(columns)
        ]
        return self(mixed).reshape(-1, len(COALITIONS))


class LeafMaskScorer:
    """A tree ensemble behind a ColumnTransformer that encodes the category and passes the numbers through.

    Every leaf of a tree is a bit, and a set of leaves is a mask. Where a node sends a transaction to the left, the
    leaves on its right are ruled out, and the reverse. The AND of the masks of all nodes has one bit left: the leaf
    that the transaction falls into (QuickScorer: Lucchese et al., SIGIR 2015; RapidScorer: Ye et al., KDD 2018).

    The nodes on one field divide its values into intervals at their thresholds, and all values of an interval take the
    same branches. So the masks of all nodes on a field are combined at load: `tables[field][interval, tree]`. A
    transaction is then six look-ups, five ANDs over the trees, the leaves' values and their sum, and the link function.
    Masks are exact and each row is summed by itself, so a row scores the same, bit for bit, in a batch of any size.

    Raises an exception for a pipeline of another kind, for more than `MOST_LEAVES` leaves in a tree, and for tables of
    more than `MOST_TABLE_BYTES`.
    """

    name = "leaf-masks"

    def __init__(self, pipeline: Any) -> None:
        self.categories, codes, columns = encoding(pipeline[:-1])
        dump = json.loads(treelite.sklearn.import_model(pipeline[-1]).dump_as_json(pretty_print=False))
        self.base, self.average = dump["base_scores"][-1], dump["average_tree_output"]
        trees = [tree["nodes"] for tree in dump["trees"]]
        leaves = [add_masks(nodes) for nodes in trees]
        most = max(map(len, leaves))
        if most > MOST_LEAVES:
            raise ValueError(f"a tree has {most} leaves, more than {MOST_LEAVES}")
        self.leaf_values = np.array([values + [0.0] * (most - len(values)) for values in leaves]).ravel()
        self.first_leaves = np.arange(len(trees)) * most
        self.rows_at_a_time = max(LEAVES_AT_A_TIME // len(trees), len(COALITIONS))
        values = {name: {column: split_points(trees, column)} for name, column in columns.items()} | {CATEGORY: codes}
        dtype = np.min_scalar_type(2**most - 1)
        rows = sum(len(next(iter(each.values()))) for each in values.values())
        if (size := rows * len(trees) * dtype.itemsize) > MOST_TABLE_BYTES:
            raise ValueError(f"its tables would take {size / 2**20:.0f} MB, more than {MOST_TABLE_BYTES / 2**20:.0f}")
        self.tables = [mask_table(trees, values[name], dtype) for name in FIELDS]
        # Forests round their input to float32. The order of the limits stays the same, so the tables still fit.
        rounded = np.asarray if type(pipeline[-1]).__name__.startswith("Hist") else float32_limits
        self.limits = {name: rounded(values[name][column][:-1]) for name, column in columns.items()}
        self.cuts = {name: limits.tolist() for name, limits in self.limits.items()}  # faster for one value

    def __call__(self, columns: Columns) -> Floats:
        parts = pieces(columns, self.rows_at_a_time)
        return np.concatenate([self.probabilities(reduce(np.bitwise_and, self.masks(part))) for part in parts])

    def masks(self, columns: Columns) -> list[Any]:
        """For each field, the leaves (n × trees) that its values leave over."""
        found, unknown = [], len(self.categories)
        for name, table, values in zip(FIELDS, self.tables, columns, strict=True):
            if len(values) == 1:  # the same rows as below, without the overhead of arrays
                [value] = values
                row = self.categories.get(value, unknown) if name == CATEGORY else bisect_left(self.cuts[name], value)
                found.append(table[row : row + 1])
            elif name == CATEGORY:
                rows = np.fromiter(map(self.categories.get, values, repeat(unknown)), np.intp, len(values))
                found.append(table[rows])
            else:
                found.append(table[np.searchsorted(self.limits[name], np.asarray(values, np.float64))])
        return found

    def probabilities(self, masks: Any) -> Floats:
        """The probability of fraud for each row of masks (n × trees) with one bit in each."""
        leaves = np.bitwise_count(masks - 1)  # the number of the only bit
        found = self.leaf_values.take(self.first_leaves + leaves).sum(axis=1)
        return found / len(self.first_leaves) if self.average else np.asarray(expit(found + self.base))

    def coalitions(self, columns: Columns, reference: Sequence[Any]) -> Floats:
        """Each field's masks are the transaction's or the reference's: all 64 choices, by doubling."""
        masks = np.empty((len(columns[0]), len(COALITIONS), len(self.first_leaves)), self.tables[0].dtype)
        masks[:, 0] = np.iinfo(masks.dtype).max
        others = self.masks([[value] for value in reference])
        for number, (own, other) in enumerate(zip(self.masks(columns), others, strict=True)):
            done = 2**number
            np.bitwise_and(masks[:, :done], own[:, None], out=masks[:, done : 2 * done])
            masks[:, :done] &= other
        return self.probabilities(masks.reshape(-1, len(self.first_leaves))).reshape(-1, len(COALITIONS))


Scorer = PipelineScorer | LeafMaskScorer


def pieces(columns: Columns, size: int) -> Iterator[Columns]:
    """The columns of `size` rows at a time."""
    return ([values[start : start + size] for values in columns] for start in range(0, len(columns[0]), size))


def add_masks(nodes: list[dict[str, Any]]) -> list[float]:
    """Add to every node of a tree the mask of the leaves below it, and return the values of the leaves."""
    leaves: list[float] = []
    for node in reversed(nodes):  # children come after their parent
        if "leaf_value" in node:
            node["mask"] = 1 << len(leaves)
            leaves.append(np.ravel(node["leaf_value"])[-1])
        else:
            node["mask"] = nodes[node["left_child"]]["mask"] | nodes[node["right_child"]]["mask"]
    return leaves


def split_points(trees: Sequence[Any], column: int) -> Floats:
    """The thresholds of all nodes on a column, in ascending order, and infinity."""
    found = {node["threshold"] for nodes in trees for node in nodes if node.get("split_feature_id") == column}
    return np.array([*sorted(found), np.inf])


def float32_limits(limits: Floats) -> Floats:
    """For each limit, the largest float64 that is within it after rounding to float32, as forests round their input."""
    below = limits.astype(np.float32)
    below = np.where(below > limits, np.nextafter(below, np.float32(-np.inf)), below)
    middle = (below + np.nextafter(below, np.float32(np.inf)).astype(np.float64)) / 2
    return np.where(middle.astype(np.float32) <= below, middle, np.nextafter(middle, -np.inf))


def mask_table(trees: Sequence[Any], values: dict[int, Floats], dtype: np.dtype[Any]) -> Any:
    """[row, tree]: the leaves that are left over by all nodes on some columns, for each row of their values."""
    table = np.empty((len(next(iter(values.values()))), len(trees)), dtype)
    for number, nodes in enumerate(trees):
        table[:, number] = every = nodes[0]["mask"]
        for node in nodes:
            if node.get("split_feature_id") in values:
                left = goes_left(node, values[node["split_feature_id"]])
                masks = [dtype.type(every ^ nodes[node[child]]["mask"]) for child in ("right_child", "left_child")]
                table[:, number] &= np.where(left, *masks)
    return table


def goes_left(node: dict[str, Any], values: Floats) -> Any:
    """Which values a node sends to its left child; NaN is an unknown category."""
    if node["node_type"] == "categorical_test_node":
        left = np.isin(values, node["category_list"]) ^ node["category_list_right_child"]
    else:
        left = values <= node["threshold"]
    return np.where(np.isnan(values), node["default_left"], left)


def encoding(encoder: Any) -> tuple[dict[str, int], dict[int, Floats], dict[str, int]]:
    """How a fitted ColumnTransformer places the fields in the input of the ensemble.

    It transforms a row with another number in each field, to see which column of the output has which number. Returns
    for each category its row in the tables (one more row is for unknown ones), for each column that encodes the
    category the codes of all rows, and for each number its column. Raises an exception if the numbers are not passed
    through, as "passthrough" and a FunctionTransformer without a function do.
    """
    others = [step for _, step, of in encoder[0].transformers_ if list(of) != [CATEGORY]]
    if any(step != "passthrough" and getattr(step, "func", step) is not None for step in others):
        raise ValueError("the numbers are not passed through as they are")
    [known] = [step.categories_[0] for _, step, of in encoder[0].transformers_ if list(of) == [CATEGORY]]
    names = [*map(str, known), "\0"]
    rows = [[1.0, "\0", 2.0, 3.0, 4.0, 5.0], *([0.0, name, 0.0, 0.0, 0.0, 0.0] for name in names)]
    encoded = encoder.transform(frame(list(zip(*rows, strict=True))))
    encoded = np.asarray(encoded.toarray() if hasattr(encoded, "toarray") else encoded, dtype=np.float64)
    difference = encoded[0] - encoded[-1]
    columns = {name: int(np.flatnonzero(difference == number).item()) for number, name in enumerate(NUMBERS, 1)}
    codes = {column: encoded[1:, column] for column in range(encoded.shape[1]) if column not in columns.values()}
    return {name: row for row, name in enumerate(names[:-1])}, codes, columns


def frame(columns: Columns) -> pd.DataFrame:
    """The columns as the DataFrame that models are trained on. Amounts beyond any real one are clipped."""
    data = {name: np.array(values, DTYPES[kind]) for (name, kind), values in zip(SIGNATURE, columns, strict=True)}
    for name in MONEY:
        data[name] = data[name].clip(-LARGEST, LARGEST)
    return pd.DataFrame(data)


# -- the model of a worker ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """One version in memory."""

    snapshot: Snapshot
    metadata: Metadata
    scorer: Scorer
    fixed_threshold: float | None = None  # FRAUD_THRESHOLD
    loaded_at: datetime = field(default_factory=lambda: datetime.now(UTC).replace(microsecond=0))

    def score(self, rows: Sequence[Features]) -> Floats:
        """n transactions → n probabilities of fraud, in order."""
        return self.scorer(columns_of(rows))

    @property
    def threshold(self) -> float | None:
        """The fixed threshold, or None if the version decides by expected cost."""
        return self.metadata.threshold if self.fixed_threshold is None else self.fixed_threshold

    def threshold_for(self, amount: float) -> float:
        """The probability from which a transaction of this amount is fraud.

        By expected cost, an alert is worth its review if probability × amount ≥ review cost (Elkan, IJCAI 2001).
        """
        if (fixed := self.threshold) is not None:
            return fixed
        cost = self.metadata.review_cost or 0.0
        return cost / amount if amount > cost else 1.0

    def facts(self) -> dict[str, Any]:
        """What `/health` shows of it to a client with a key."""
        return {
            "model_name": self.snapshot.name,
            "model_version": self.snapshot.version,
            "registry_version": self.snapshot.number,
            "registry_uri": self.snapshot.registry_uri,
            "sha256": self.snapshot.sha256,
            "unsafe": self.snapshot.unsafe,
            "threshold": self.threshold,
            "review_cost": self.metadata.review_cost if self.threshold is None else None,
            "scorer": self.scorer.name,
            "loaded_at": self.loaded_at,
            "metrics": self.metadata.metrics,
            "explains": self.metadata.reference is not None,
        }

    def explain(self, columns: Columns) -> tuple[Floats, list[Explanation]]:
        """Probabilities and their exact Shapley values against the reference transaction.

        A coalition takes some fields from the transaction and the others from the reference. A field's value is the
        mean of what it adds to coalitions, as if fields came in random order (Shapley 1953; Lundberg and Lee 2017).
        """
        reference = values_of(self.metadata.reference.transaction)  # type: ignore[union-attr]
        parts = pieces(columns, self.scorer.rows_at_a_time // len(COALITIONS))
        worth = np.concatenate([self.scorer.coalitions(part, reference) for part in parts])
        without = worth[:, [len(COALITIONS) - 1 - 2**number for number in range(len(FIELDS))]]
        explanations = [
            Explanation(base, sorted(map(Contribution, FIELDS, shares, alone), key=lambda each: -abs(each.value)))
            for base, shares, alone in zip(
                worth[:, 0].tolist(), (worth @ SHAPLEY_WEIGHTS).tolist(), without.tolist(), strict=True
            )
        ]
        return worth[:, -1], explanations


def load(snapshot: Snapshot, config: Config) -> Model:
    """Load a snapshot through MLflow and check that it keeps its promises: signature, probabilities, golden rows."""
    info = MLmodel.load(snapshot.path)
    _check_signature(info.signature)
    try:
        metadata = msgspec.convert(info.metadata or {}, Metadata)
    except msgspec.ValidationError as error:
        raise ModelError(f"the model's metadata does not fit: {error}") from None
    scorer = choose_scorer(mlflow.sklearn.load_model(snapshot.path), metadata.golden)
    _check_golden(scorer, metadata.golden)
    return Model(snapshot, metadata, scorer, config.fraud_threshold)


def _check_signature(signature: Any) -> None:
    columns = signature.inputs.to_dict() if signature and signature.inputs else []
    found = [(column.get("name"), column["type"]) for column in columns]
    if found != SIGNATURE:
        raise ModelError(f"the model's signature is {found or 'missing'}, expected {SIGNATURE}")


def _check_golden(scorer: Scorer, golden: Sequence[Golden]) -> None:
    expected = np.array([row.fraud_probability for row in golden])
    found = scorer(columns_of(golden))
    worst = int(np.argmax(np.abs(found - expected)))
    if not abs(found[worst] - expected[worst]) <= GOLDEN_TOLERANCE:
        raise ModelError(
            f"golden row {worst} scores {found[worst]:.9f} here and scored {expected[worst]:.9f} at training; "
            "are the versions of scikit-learn the same?"
        )


def choose_scorer(estimator: Any, golden: Sequence[Golden]) -> Scorer:
    """The leaf masks, if they agree with the pipeline on golden and generated rows; else the pipeline itself."""
    pipeline = PipelineScorer(estimator)
    try:
        pipeline(columns_of([*golden, *_comparison_rows([])]))
    except ValueError as error:
        raise ModelError(f"the model does not score known, unknown and extreme transactions: {error}") from error
    try:
        masks = LeafMaskScorer(estimator)
        columns = columns_of([*golden, *_comparison_rows([*masks.categories])])
        gap = np.abs(masks(columns) - pipeline(columns)).max()
        if gap <= LEAF_MASK_TOLERANCE:
            log.info("leaf masks of %d trees", len(masks.first_leaves))
            return masks
        log.warning("no leaf masks: they differ from predict_proba by %.3g", gap)
    except Exception as error:  # the pipeline scores every model
        log.info("no leaf masks: %s", error)
    return pipeline


def _comparison_rows(categories: Sequence[str]) -> list[Features]:
    """Rows to compare scorers on: every category and an unknown one, from ordinary to extreme numbers."""
    random, many = np.random.default_rng(0), 20
    amounts, balances = random.lognormal(4, 2, many), random.normal(0, 20_000, many)
    whole = [random.integers(0, end, many) for end in (24, 7, 131)]
    numbers = [[0, 0, 0, 0, -1e308], [1e308, 23, 6, 130, 1e308], *np.column_stack([amounts, *whole, balances]).tolist()]
    return [
        Features(amount, category, *others) for category in [*categories, "\0 unknown"] for amount, *others in numbers
    ]


# -- registry → memory, in a child of the master -----------------------------------------------------------------------


def acquire(config: Config, folder: Path) -> Snapshot:
    """Fetch the version that MODEL_URI names into `folder` and verify it. Raises `ModelError`."""
    with closing(fetch_in_child(config, folder)) as answers:
        return next(filter(None, answers))


def fetch_in_child(config: Config, folder: Path, served: Snapshot | None = None) -> Generator[Snapshot | None]:
    """Let a child process resolve MODEL_URI, download that version and verify that it loads.

    Yields None every 0.1 s until the child has answered, then the snapshot. Raises `ModelError` if there is none within
    MODEL_LOAD_TIMEOUT. `close` ends the child. A version that is `served` already is not downloaded again.

    The master itself opens no connection and starts no thread, because it forks workers; and whatever hangs (DNS, a
    socket, C code) is killed with the child.
    """
    deadline = time.monotonic() + config.model_load_timeout
    child, reader = _fork(config, folder / str(time.monotonic_ns()), served)
    try:
        while not (readable := select.select([reader], [], [], 0.1)[0]) and time.monotonic() < deadline:
            yield None
        found: Snapshot | str = f"not loaded within {config.model_load_timeout} s (MODEL_LOAD_TIMEOUT)"
        if readable:
            with open(reader, "rb", closefd=False) as pipe:
                answer = pipe.read()
            died = "the process that loads it died; did it need more memory (MODEL_MEMORY_MB)?"
            found = msgspec.json.decode(answer, type=Snapshot | str) if answer else died
        if isinstance(found, str):
            raise ModelError(f"{config.model_uri} at {without_credentials(config.mlflow_tracking_uri)}: {found}")
        yield found
    finally:
        os.close(reader)
        with suppress(ChildProcessError):  # gunicorn has waited for it
            if not os.waitpid(child, os.WNOHANG)[0]:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)


def _fork(config: Config, folder: Path, served: Snapshot | None) -> tuple[int, int]:
    """Start the child; return its process id and the pipe for its answer."""
    reader, writer = os.pipe()
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        child = os.fork()
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    if not child:
        try:
            _answer(config, folder, served, writer)
        finally:
            os._exit(0)
    os.close(writer)
    return child, reader


def _answer(config: Config, folder: Path, served: Snapshot | None, writer: int) -> None:
    """The child's work: a snapshot, or a sentence that says why there is none, as JSON into the pipe."""
    try:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(config.model_load_timeout + 1)  # should the master die first
        answer: Snapshot | str = _find(config, folder, served)
    except MemoryError:
        answer = f"it takes more than {config.model_memory_mb} MB of memory to load (MODEL_MEMORY_MB)"
    except BaseException as error:
        log.debug("the model cannot be served: %s", config.mask(traceback.format_exc()))
        text = config.mask(str(error).partition("\n")[0] or repr(error))[:1000]
        answer = text.encode(errors="replace").decode()  # it may quote half of a surrogate pair
    with open(writer, "wb") as pipe:
        pipe.write(msgspec.json.encode(answer))


def limit_memory(megabytes: int) -> None:
    """Let this process take no more private memory than that beyond what it has (setrlimit(2), RLIMIT_DATA)."""
    [used] = re.findall(r"VmData:\s+(\d+) kB", Path("/proc/self/status").read_text())
    limit = int(used) * 1024 + megabytes * 2**20
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    resource.setrlimit(resource.RLIMIT_FSIZE, (megabytes * 2**20, megabytes * 2**20))  # of a file that is downloaded


def _find(config: Config, folder: Path, served: Snapshot | None) -> Snapshot:
    limit_memory(config.model_memory_mb)
    name, number, release = _resolve(config)
    if served and (name, number, release) == (served.name, served.number, served.release):
        return served
    snapshot = fetch(config, folder, name, number, release)
    try:
        load(snapshot, config)
    except ModelError as error:
        raise ModelError(f"{error} ({HINT})") from error
    return snapshot


def _resolve(config: Config) -> tuple[str, str, str | None]:
    """The one version that MODEL_URI names now: name, number, `release` tag."""
    scheme, _, database = config.mlflow_tracking_uri.partition(":///")
    if scheme == "sqlite" and not (Path(database).exists() and Path(database).stat().st_size):  # MLflow would make one
        raise ModelError("there is no such database; `make model` trains and registers a first model")
    mlflow.set_tracking_uri(config.mlflow_tracking_uri)
    mlflow.set_registry_uri(config.mlflow_tracking_uri)
    client = MlflowClient()
    name, mark, which = re.split("([@/])", config.model_uri.removeprefix("models:/"))
    found = (client.get_model_version_by_alias if mark == "@" else client.get_model_version)(name, which)
    return name, str(found.version), found.tags.get("release")


def fetch(config: Config, folder: Path, name: str, number: str, release: str | None) -> Snapshot:
    """Download a version's files and decide whether they are to be trusted. Raises `ModelError`."""
    folder.mkdir()
    path = mlflow.artifacts.download_artifacts(artifact_uri=f"models:/{name}/{number}", dst_path=str(folder))
    sha256, unsafe = _sha256(Path(path)), _unsafe(Path(path))
    if config.model_sha256 not in (None, sha256):
        raise ModelError(f"the SHA-256 of version {number} is {sha256}, expected {config.model_sha256} (MODEL_SHA256)")
    if unsafe and not config.model_allow_unsafe:
        raise ModelError(f"version {number} is not safe to load: {'; '.join(unsafe)} (MODEL_ALLOW_UNSAFE; {HINT})")
    return Snapshot(path, name, number, release, without_credentials(config.mlflow_tracking_uri), sha256, unsafe)


def _sha256(folder: Path) -> str:
    """SHA-256 over the files of a version, as `sha256sum` prints it of each, sorted by name."""
    added = {"registered_model_meta"}  # by MLflow, at the download
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} - added
    lines = [f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in sorted(names)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _unsafe(folder: Path) -> list[str]:
    """What in a version could run code that came with it, or touch anything but its input. Nothing in a safe one: [].

    `load` reads the `sklearn` flavor of the `MLmodel` file and no other. MLflow trusts the types that it lists; skops
    trusts more types by itself. Whoever wrote the artifact wrote both, so only what is known here is let through.
    """
    flavor = MLmodel.load(folder).flavors.get("sklearn")
    if flavor is None:
        raise ModelError("it is no scikit-learn model: its MLmodel file has no flavor sklearn")
    rules: list[tuple[str, Any, Any]] = [
        ("serialization_format", flavor.get("serialization_format"), "skops"),
        ("pickled_model", flavor.get("pickled_model"), SKOPS_FILE),
        ("code_paths", flavor.get("code"), None),
        ("skops_trusted_types", sorted({*(flavor.get("skops_trusted_types") or ())} - TRUSTED_TYPES), []),
    ]
    found = [
        f"{name} is {value}, expected {expected or 'none'}" for name, value, expected in rules if value != expected
    ]
    return found or [f"it has {name} in it" for name in _untrusted(folder / SKOPS_FILE)]


def _untrusted(file: Path) -> list[str]:
    """The types, functions and loaders in a .skops file that are not on the list of trusted ones."""
    nodes: list[dict[str, Any]] = []
    with zipfile.ZipFile(file) as archive:
        json.loads(archive.read("schema.json"), object_hook=nodes.append)  # every object in it, the whole one last
    if (protocol := nodes[-1].get("protocol")) != SKOPS_PROTOCOL:  # it decides where skops finds a name
        return [f"skops protocol {protocol}"]
    nodes = [node for node in nodes if node.keys() & {"__loader__", "__module__", "__class__"}]
    types = {f"{node.get('__module__')}.{node.get('__class__')}" for node in nodes}
    return sorted((types | {str(node.get("__loader__")) for node in nodes}) - TRUSTED_TYPES)


def new_folder(parent: str) -> Path:
    """A new folder in memory, locked for as long as this process or a child of it lives. Raises `ModelError`.

    Folders without a lock were left behind by a crash: they are removed.
    """
    for old in Path(parent).glob("fraud-api-*"):
        with suppress(OSError):  # it is locked, or gone
            descriptor = os.open(old, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(old)
            finally:
                os.close(descriptor)
    try:
        folder = Path(tempfile.mkdtemp(prefix="fraud-api-", dir=parent))
    except OSError as error:
        raise ModelError(f"any model: no folder for it in MEMORY_DIR: {error}") from error
    fcntl.flock(os.open(folder, os.O_RDONLY), fcntl.LOCK_EX)  # until the descriptor is closed, when the process ends
    return folder
