"""The model: from the MLflow Model Registry into memory, and from transactions to probabilities of fraud.

An `Acquisition`, begun by the master, puts one version's files into memory (tmpfs) and proves them. `load` runs in
each worker after the fork: it makes a `Model` of them, or refuses. Both raise `ModelError`, for the operator to read.
"""

import ctypes
import fcntl
import hashlib
import logging
import math
import os
import select
import shutil
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import chain, product
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Any, NoReturn

import mlflow.artifacts
import mlflow.pyfunc
import mlflow.sklearn
import msgspec
import numpy as np
import pandas as pd
import skops.io  # noqa: F401  (MLflow imports it when it loads a model: here, the workers share it)
import treelite.sklearn
from mlflow import MlflowClient
from mlflow.models import Model as MLmodel
from msgspec import Meta
from treelite.libpath import find_lib_path

from config import INTERRUPTS, Config, without_credentials

log = logging.getLogger("gunicorn.error")

Floats = np.ndarray[Any, np.dtype[np.float64]]
Score = Callable[[Sequence["Features"]], Floats]

FLAVOR = "mlflow.sklearn"
# What skops may make beside what it trusts by itself: parts of scikit-learn models, which run nothing of the artifact.
TRUSTED_TYPES = {
    "functools.partial",
    "sklearn.calibration._CalibratedClassifier",
    "sklearn.ensemble._hist_gradient_boosting.predictor.TreePredictor",
    "sklearn.tree._tree.Tree",
    "sklearn.utils.validation.check_array",
}
# What MLflow adds to a version's files when it is downloaded.
ADDED_FILES = {"registered_model_meta"}
HINT = "README: A model of your own"
GOLDEN_TOLERANCE = 1e-6
TREES_TOLERANCE = 1e-9
# Numbers are cut here before forests, which compute in float32 and refuse what does not fit, see them.
LARGEST = 1e30

# Up to this many rows treelite is faster than scikit-learn, which has 1 to 2 ms of overhead a call but less work a row.
# Microseconds for treelite / scikit-learn on one core, HistGradientBoosting of 150 trees: 16 / 1750 for 1 row,
# 2630 / 2800 for 200, 3860 / 3430 for 300 with 8 leaves a tree; 19 / 1800, 3910 / 3510, 5810 / 4530 with 31.
TREELITE_ROWS = 200


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
_all_values = attrgetter(*FIELDS)
_numbers = attrgetter(*NUMBERS)


def _column_type(schema: dict[str, Any]) -> str:
    """The MLflow column type of a field, from its JSON Schema."""
    return "string" if schema["type"] == "string" else "long" if "multipleOf" in schema else "double"


# [(column, MLflow type)], in column order: what a model's signature must say.
SIGNATURE = [
    (name, _column_type(schema))
    for name, schema in msgspec.json.schema(Features)["$defs"]["Features"]["properties"].items()
]
DTYPES = {"string": "object", "long": "int64", "double": "float64"}


# All coalitions of fields (64 × 6), in the order of itertools.product, and their weights for each field (64 × 6).
COALITIONS = np.array([*product((False, True), repeat=len(FIELDS))])
_orders = [math.factorial(size) * math.factorial(len(FIELDS) - 1 - size) for size in range(len(FIELDS))]
SHAPLEY_WEIGHTS = np.array(
    [[_orders[sum(c) - 1] if taken else -_orders[sum(c)] for taken in c] for c in COALITIONS.tolist()]
) / math.factorial(len(FIELDS))


class Golden(Features, frozen=True):
    """A row and the probability it had at training."""

    fraud_probability: Annotated[float, Meta(ge=0, le=1)]


class Reference(msgspec.Struct, frozen=True):
    """What monitoring and explanations compare with: small numbers about the training data."""

    score_deciles: Annotated[list[float], Meta(min_length=9, max_length=9)]
    ranges: dict[str, tuple[float, float]]
    categories: list[str]
    transaction: Features
    # Of the scores at training in each decile; a tenth where they do not tie.
    score_shares: Annotated[list[float], Meta(min_length=10, max_length=10)] = msgspec.field(
        default_factory=lambda: [0.1] * 10
    )

    def __post_init__(self) -> None:
        ranges = [self.ranges.get(name, (1, 0)) for name in NUMBERS]
        if self.score_deciles != sorted(self.score_deciles) or any(low > high for low, high in ranges):
            raise ValueError("expected deciles in order and a range for every number")


class Metadata(msgspec.Struct, frozen=True):
    """What travels with the model in its `MLmodel` file (`log_model(metadata=…)`)."""

    threshold: Annotated[float, Meta(ge=0, le=1)]
    golden: Annotated[list[Golden], Meta(min_length=1)]
    metrics: dict[str, float] = {}  # on the hold-out
    reference: Reference | None = None


class Contribution(msgspec.Struct, frozen=True):
    """How much of a probability is owed to one field: its Shapley value."""

    field: str
    value: float


class Explanation(msgspec.Struct, frozen=True):
    """The probability of the reference transaction, and what each field adds to it, the largest first.

    Together they are the probability.
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
        """What predictions are signed with: the `release` tag, else `v` and the registry's number."""
        return self.release or f"v{self.number}"


@dataclass(frozen=True)
class Model:
    """One version in memory. `score` takes n rows and returns n probabilities of fraud, float64, in order."""

    snapshot: Snapshot
    threshold: float
    scorer: str
    metadata: Metadata
    score: Score
    load_seconds: float
    loaded_at: datetime = field(default_factory=lambda: datetime.now(UTC).replace(microsecond=0))

    def facts(self) -> dict[str, Any]:
        """What anybody may know of it."""
        return {
            "model_name": self.snapshot.name,
            "model_version": self.snapshot.version,
            "registry_version": self.snapshot.number,
            "registry_uri": self.snapshot.registry_uri,
            "sha256": self.snapshot.sha256,
            "unsafe": self.snapshot.unsafe,
            "threshold": self.threshold,
            "scorer": self.scorer,
            "loaded_at": self.loaded_at,
            "metrics": self.metadata.metrics,
            "explains": self.metadata.reference is not None,
        }

    def explain(self, rows: Sequence[Features]) -> tuple[Floats, list[Explanation]]:
        """Probabilities, and the exact Shapley values behind them against the reference transaction.

        A coalition takes some fields from the row and the others from the reference; a field's value is the mean of
        what it adds to coalitions, weighted as if fields came in random order (Shapley 1953; Lundberg and Lee 2017).
        """
        if self.metadata.reference is None:
            raise ValueError("the model has no reference transaction")
        background = _all_values(self.metadata.reference.transaction)
        mixed = [Features(*v) for row in rows for v in product(*zip(background, _all_values(row), strict=True))]
        worth = self.score(mixed).reshape(len(rows), len(COALITIONS))
        found = [
            sorted(map(Contribution, FIELDS, values), key=lambda each: -abs(each.value))
            for values in (worth @ SHAPLEY_WEIGHTS).tolist()
        ]
        return worth[:, -1], [Explanation(base, each) for base, each in zip(worth[:, 0].tolist(), found, strict=True)]


# -- registry → memory, in the master ----------------------------------------------------------------------------------


class Acquisition:
    """A child process that finds the version that MODEL_URI names, fetches it and proves that it loads, in `seconds`.

    The master itself opens no connection and starts no thread, for it is to fork; and whatever hangs (a name server, a
    socket, C code) is killed. If the version is `served` already, that is all it does. Raises `ModelError`.
    """

    def __init__(self, config: Config, folder: Path, seconds: float, served: Snapshot | None = None) -> None:
        self.config, self.deadline = config, time.monotonic() + seconds
        self.reader, writer = os.pipe()
        signal.pthread_sigmask(signal.SIG_BLOCK, INTERRUPTS)  # an exception raised amid the fork would be lost
        try:
            self.child = os.fork()
        except OSError as error:
            os.close(self.reader)
            raise ModelError(f"{config.model_uri}: no process to load it in: {error}") from error
        else:
            if not self.child:
                signal.setitimer(signal.ITIMER_REAL, max(seconds, 0) + 1)  # should the master be gone
                _answer(config, folder / str(time.monotonic_ns()), served, writer)
        finally:
            os.close(writer)
        try:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, INTERRUPTS)
        except BaseException:
            self.end()
            raise

    def ready(self) -> bool:
        """Whether `result` has not to wait."""
        return bool(select.select([self.reader], [], [], 0)[0]) or time.monotonic() >= self.deadline

    def result(self) -> Snapshot:
        """What it found, as soon as it has. Raises `ModelError`."""
        remaining = max(self.deadline - time.monotonic(), 0)
        answered, _, _ = select.select([self.reader], [], [], remaining)
        found: Snapshot | str = f"not loaded within {self.config.model_load_timeout} s (MODEL_LOAD_TIMEOUT)"
        if answered:
            with open(self.reader, "rb", closefd=False) as pipe:
                answer = pipe.read()
            found = msgspec.json.decode(answer, type=Snapshot | str) if answer else "the process that loads it died"
        if isinstance(found, Snapshot):
            return found
        place = without_credentials(self.config.mlflow_tracking_uri)
        raise ModelError(f"{self.config.model_uri} at {place}: {found}")

    def end(self) -> None:
        """Leave nothing of it running. To be called once."""
        os.close(self.reader)
        with suppress(ChildProcessError):  # gunicorn has waited for it
            if not os.waitpid(self.child, os.WNOHANG)[0]:
                os.kill(self.child, signal.SIGKILL)
                os.waitpid(self.child, 0)


def acquire(config: Config, folder: Path, seconds: float) -> Snapshot:
    """Fetch the version that MODEL_URI names into `folder` and prove it. Raises `ModelError`."""
    acquisition = Acquisition(config, folder, seconds)
    try:
        return acquisition.result()
    finally:
        acquisition.end()


def _answer(config: Config, folder: Path, served: Snapshot | None, writer: int) -> NoReturn:
    """The child's life: a snapshot or a sentence, as JSON into the pipe. It never returns to the master's code."""
    try:
        for number in (*INTERRUPTS, signal.SIGALRM):
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, INTERRUPTS)
        with open(writer, "wb") as pipe:
            pipe.write(msgspec.json.encode(_find(config, folder, served)))
    finally:
        os._exit(0)


def _find(config: Config, folder: Path, served: Snapshot | None) -> Snapshot | str:
    try:
        name, version, release = _resolve(config)
        if served and (name, version, release) == (served.name, served.number, served.release):
            return served
        snapshot = fetch(config, folder, name, version, release)
        try:
            load(snapshot, config)
        except ModelError as error:
            raise ModelError(f"{error} ({HINT})") from error
        return snapshot
    except BaseException as error:
        log.debug("the model cannot be served: %s", config.mask(traceback.format_exc()))
        reason = config.mask(str(error).partition("\n")[0] or repr(error))
        return reason[:1000].encode(errors="replace").decode()


def _resolve(config: Config) -> tuple[str, str, str | None]:
    """The one version that MODEL_URI names now: name, number, `release` tag."""
    scheme, _, database = config.mlflow_tracking_uri.partition(":///")
    if scheme == "sqlite" and not (Path(database).exists() and Path(database).stat().st_size):  # MLflow would make one
        raise ModelError("there is no such database; `make model` trains and registers a first model")
    mlflow.set_tracking_uri(config.mlflow_tracking_uri)
    mlflow.set_registry_uri(config.mlflow_tracking_uri)
    client = MlflowClient()
    name, _, number = config.model_uri.removeprefix("models:/").partition("/")
    if not number:
        name, _, alias = name.partition("@")
        number = str(client.get_model_version_by_alias(name, alias).version)
    return name, number, client.get_model_version(name, number).tags.get("release")


def fetch(config: Config, folder: Path, name: str, number: str, release: str | None) -> Snapshot:
    """Download a version's files and decide whether they are to be trusted."""
    folder.mkdir()
    path = mlflow.artifacts.download_artifacts(artifact_uri=f"models:/{name}/{number}", dst_path=str(folder))
    sha256, unsafe = _digest(Path(path)), _unsafe(path)
    if config.model_sha256 not in (None, sha256):
        raise ModelError(f"the SHA-256 of version {number} is {sha256}, expected {config.model_sha256} (MODEL_SHA256)")
    if unsafe and not config.model_allow_unsafe:
        raise ModelError(f"version {number} is not safe to load: {'; '.join(unsafe)} (MODEL_ALLOW_UNSAFE; {HINT})")
    return Snapshot(path, name, number, release, without_credentials(config.mlflow_tracking_uri), sha256, unsafe)


def _digest(folder: Path) -> str:
    """SHA-256 over the files of a version, as `sha256sum` prints it of each, sorted by name."""
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} - ADDED_FILES
    lines = [f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in sorted(names)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _unsafe(path: str) -> list[str]:
    """What in a version could run code that came with it. A scikit-learn model in skops' format that has none: [].

    MLflow runs what the `MLmodel` file names, and gives skops the list of types to trust that stands there: whoever
    wrote the artifact wrote both. Here only what is known is let through.
    """
    flavors = MLmodel.load(path).flavors
    pyfunc, sklearn = flavors.get("python_function", {}), flavors.get("sklearn", {})
    file = str(pyfunc.get("model_path"))
    rules = [
        ("loader_module", pyfunc.get("loader_module"), FLAVOR),
        ("serialization_format", sklearn.get("serialization_format"), "skops"),
        ("model_path", file, Path(file).name),
        ("code_paths", pyfunc.get("code") or sklearn.get("code"), None),
        ("data", pyfunc.get("data"), None),
        ("config", pyfunc.get("config"), None),
    ]
    foreign = sorted({*(sklearn.get("skops_trusted_types") or ())} - TRUSTED_TYPES)
    found = [
        f"{name} is {value}, expected {expected or 'none'}" for name, value, expected in rules if value != expected
    ]
    return found + [f"it asks to trust {name}" for name in foreign]


def new_folder(parent: str) -> Path:
    """A new folder in memory, locked for as long as this process or a child of it lives. Raises `ModelError`.

    Folders whose lock is free are what crashed runs left: they are removed.
    """
    for old in Path(parent).glob("fraud-api-*"):
        if (lock := _lock(old)) is not None:
            shutil.rmtree(old, ignore_errors=True)
            os.close(lock)
    while True:
        try:
            folder = Path(tempfile.mkdtemp(prefix="fraud-api-", dir=parent))
        except OSError as error:
            raise ModelError(f"any model: no folder for it in MEMORY_DIR: {error}") from error
        if _lock(folder) is not None and folder.exists():  # else another start took it for a left one in between
            return folder


def _lock(folder: Path) -> int | None:
    """The folder's lock, if free: a descriptor. Left open, it is held until the last process that has it ends."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return descriptor
        except OSError:
            os.close(descriptor)
    return None


# -- memory → score, in each worker ------------------------------------------------------------------------------------


def load(snapshot: Snapshot, config: Config) -> Model:
    """Load a snapshot through MLflow and check that it keeps its promises: signature, probabilities, golden rows."""
    started = time.monotonic()
    pyfunc = mlflow.pyfunc.load_model(snapshot.path)
    _check_signature(pyfunc.metadata)
    try:
        metadata = msgspec.convert(pyfunc.metadata.metadata or {}, Metadata)
    except msgspec.ValidationError as error:
        raise ModelError(f"the model's metadata does not fit: {error}") from None
    scorer, score = _scorer(pyfunc, metadata.golden)
    _check_golden(score, metadata.golden)
    threshold = metadata.threshold if config.fraud_threshold is None else config.fraud_threshold
    return Model(snapshot, threshold, scorer, metadata, score, time.monotonic() - started)


def _check_signature(metadata: Any) -> None:
    columns = metadata.signature.inputs.to_dict() if metadata.signature and metadata.signature.inputs else []
    found = [(column.get("name"), column["type"]) for column in columns]
    if found != SIGNATURE:
        raise ModelError(f"the model's signature is {found or 'missing'}, expected {SIGNATURE}")


def _check_golden(score: Score, golden: Sequence[Golden]) -> None:
    expected = np.array([row.fraud_probability for row in golden])
    found = score(golden)
    worst = int(np.argmax(np.abs(found - expected)))
    if not abs(found[worst] - expected[worst]) <= GOLDEN_TOLERANCE:
        raise ModelError(
            f"golden row {worst} scores {found[worst]:.9f} here and scored {expected[worst]:.9f} at training; "
            "are the versions of scikit-learn the same?"
        )


def _scorer(pyfunc: Any, golden: Sequence[Golden]) -> tuple[str, Score]:
    """The most direct way to the model's probabilities, and its name."""
    if pyfunc.loader_module != FLAVOR:
        return "pyfunc", _checked(_pyfunc_score(pyfunc), golden, of_labels=True)
    estimator = pyfunc.get_raw_model()
    direct = _checked(_sklearn_score(estimator), golden)
    try:
        trees = TreeScore(estimator)
        rows = [*golden, *_probes([*trees.codes])]
        expected = direct(rows)
        gap = max(np.abs(way(rows) - expected).max() for way in (trees.through_treelite, trees.through_sklearn))
        if gap <= TREES_TOLERANCE:
            return "treelite", trees
        log.warning("no fast path: treelite and scikit-learn differ by %.3g", gap)
    except Exception as error:  # what cannot be accelerated is served all the same
        log.info("no fast path: %s", error)
    return "sklearn", direct


def _checked(score: Score, golden: Sequence[Golden], of_labels: bool = False) -> Score:
    """`score`, if it gives probabilities for known, unknown and extreme rows."""
    rows = [*golden, *_probes([])]
    try:
        found = score(rows)
    except ValueError as error:
        raise ModelError(f"the model does not score known, unknown and extreme transactions: {error}") from error
    if of_labels and np.all((found == 0) | (found == 1)):
        raise ModelError("the model gives labels, not probabilities; log it with pyfunc_predict_fn='predict_proba'")
    return score


def _probes(categories: Sequence[str]) -> list[Features]:
    """Rows to compare scorers on: every category and an unknown one, from ordinary to extreme numbers."""
    random, many = np.random.default_rng(0), 20
    amounts, balances = random.lognormal(4, 2, many), random.normal(0, 20_000, many)
    whole = [random.integers(0, end, many) for end in (24, 7, 131)]
    numbers = [[0, 0, 0, 0, -1e308], [1e308, 23, 6, 130, 1e308], *np.column_stack([amounts, *whole, balances]).tolist()]
    return [
        Features(amount, category, *others) for category in [*categories, "\0 unknown"] for amount, *others in numbers
    ]


def frame(rows: Sequence[Features]) -> pd.DataFrame:
    """The rows as the DataFrame that models are trained on. Amounts beyond any real one are cut."""
    columns = zip(*map(_all_values, rows), strict=True)
    data = {name: np.array(values, DTYPES[kind]) for (name, kind), values in zip(SIGNATURE, columns, strict=True)}
    for name in MONEY:
        data[name] = data[name].clip(-LARGEST, LARGEST)
    return pd.DataFrame(data)


def _sklearn_score(estimator: Any) -> Score:
    if not hasattr(estimator, "predict_proba"):
        raise ModelError(f"{type(estimator).__name__} has no predict_proba")
    if list(estimator.classes_) != [0, 1]:
        raise ModelError(f"the model's classes are {list(estimator.classes_)}, expected 0 and 1 (fraud)")
    return lambda rows: np.asarray(estimator.predict_proba(frame(rows)), dtype=np.float64)[:, 1]


def _pyfunc_score(pyfunc: Any) -> Score:
    def score(rows: Sequence[Features]) -> Floats:
        output = np.asarray(pyfunc.predict(frame(rows)))
        if output.dtype.kind != "f":
            raise ValueError(f"it gives {output.dtype} labels, not probabilities")
        output = output[:, 1] if output.ndim == 2 and output.shape[1] == 2 else output
        if output.shape != (len(rows),) or not np.all((output >= 0) & (output <= 1)):
            raise ValueError("it does not give one probability from 0 to 1 for each row")
        return output.astype(np.float64)

    return score


class TreeScore:
    """The fast path: category looked up in a dictionary, numbers beside it, trees walked by treelite's GTIL.

    For a pipeline of one ColumnTransformer that encodes the category and passes numbers through, and a tree ensemble.
    Where each value goes is seen in what the pipeline makes of probes, and checked by `_scorer`. Raises an exception
    where the pipeline is of another kind.
    """

    def __init__(self, pipeline: Any) -> None:
        encoder, self.estimator = pipeline[:-1], pipeline[-1]
        others = [step for _, step, of in encoder[0].transformers_ if list(of) != [CATEGORY]]
        if any(step != "passthrough" and getattr(step, "func", step) is not None for step in others):
            raise ValueError("the numbers are not passed through as they are")
        [categories] = [step.categories_[0] for _, step, of in encoder[0].transformers_ if list(of) == [CATEGORY]]
        rows = [Features(0, str(category), 0, 0, 0, 0) for category in ["\0", *categories]]
        encoded = encoder.transform(frame([Features(1, "\0", 2, 3, 4, 5), *rows]))
        encoded = np.asarray(encoded.toarray() if hasattr(encoded, "toarray") else encoded, dtype=np.float64)
        difference = encoded[0] - encoded[1]
        places = [np.flatnonzero(difference == number).item() for number in (1, 2, 3, 4, 5)]
        codes = np.delete(encoded, places, axis=1)
        order = np.argsort([*np.delete(np.arange(len(difference)), places), *places])
        self.order = None if np.all(np.diff(order) == 1) else order  # None: codes, then numbers, is the model's order
        self.unknown: tuple[float, ...] = tuple(codes[1].tolist())
        self.codes = {row.merchant_category: tuple(code) for row, code in zip(rows, codes[1:].tolist(), strict=True)}
        self.float32 = not type(self.estimator).__name__.startswith("Hist")  # what forests round their input to
        self.walk = _gtil(treelite.sklearn.import_model(self.estimator), len(difference))

    def __call__(self, rows: Sequence[Features]) -> Floats:
        return self.through_treelite(rows) if len(rows) <= TREELITE_ROWS else self.through_sklearn(rows)

    def through_treelite(self, rows: Sequence[Features]) -> Floats:
        return self.walk(self.array(rows))

    def through_sklearn(self, rows: Sequence[Features]) -> Floats:
        return np.asarray(self.estimator.predict_proba(self.array(rows))[:, 1])

    def array(self, rows: Sequence[Features]) -> Floats:
        """The rows as the ensemble sees them, float64, contiguous."""
        codes, unknown = self.codes.get, self.unknown
        values = [codes(row.merchant_category, unknown) + _numbers(row) for row in rows]
        array = np.fromiter(chain.from_iterable(values), np.float64).reshape(len(rows), -1)  # twice as fast as np.array
        if self.float32:
            array = array.clip(-LARGEST, LARGEST).astype(np.float32).astype(np.float64)
        return array if self.order is None else np.ascontiguousarray(array[:, self.order])


def _gtil(trees: treelite.Model, width: int) -> Callable[[Floats], Floats]:
    """treelite's GTIL through its C API: the Python API takes three times as long for one row as the trees do.

    https://treelite.readthedocs.io/en/latest/treelite-c-api.html
    """
    library = ctypes.PyDLL(str(find_lib_path()[0]))  # with the GIL held: handing it over costs more than a few rows
    config = ctypes.c_void_p()
    failed = library.TreeliteGTILParseConfig(b'{"predict_type": "default", "nthread": 1}', ctypes.byref(config))
    if failed or trees.num_feature != width or trees.input_type != "float64":
        raise ValueError("treelite does not take these trees")
    classes = treelite.gtil.predict(trees, np.zeros((1, width)), nthread=1).shape[-1]  # 1, or 2 for forests
    predict = library.TreeliteGTILPredict
    pointer = ctypes.c_void_p
    predict.argtypes = [pointer, pointer, ctypes.c_char_p, ctypes.c_uint64, pointer, pointer]

    def walk(array: Floats) -> Floats:
        scores = np.empty((len(array), classes))
        if predict(trees.handle, array.ctypes.data, b"float64", len(array), scores.ctypes.data, config):
            raise RuntimeError("treelite failed")
        return scores[:, -1]

    return walk
