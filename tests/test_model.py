"""What is loaded, what is refused, and that every way of scoring agrees with scikit-learn's `predict_proba`."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlflow.models import ModelSignature
from mlflow.types import ColSpec, Schema
from sklearn.compose import make_column_transformer
from sklearn.ensemble import (
    ExtraTreesClassifier,
    GradientBoostingClassifier,
    HistGradientBoostingClassifier,
    RandomForestClassifier,
)
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import OneHotEncoder, OrdinalEncoder, StandardScaler
from sklearn.svm import LinearSVC

import data
from conftest import config
from model import (
    CATEGORY,
    FIELDS,
    LARGEST,
    MONEY,
    MOST_LEAVES,
    NUMBERS,
    SIGNATURE,
    TRUSTED_TYPES,
    Columns,
    Features,
    Floats,
    LeafMaskScorer,
    Model,
    ModelError,
    PipelineScorer,
    Snapshot,
    choose_scorer,
    columns_of,
    frame,
    load,
    new_folder,
)

SAMPLE = data.generate(6000, seed=1)
DATA, LABELS = SAMPLE.rows, SAMPLE.labels
SIGNED = ModelSignature(Schema([ColSpec(kind, column) for column, kind in SIGNATURE]))
ORDINAL = OrdinalEncoder(handle_unknown="use_encoded_value", unknown_value=-1)
ONE_HOT = OneHotEncoder(handle_unknown="ignore")
# Not all models are to be trained on the labels as drawn: forests of a few trees would know next to no fraud.
COMMON = ((DATA["amount"] > 100) ^ (np.arange(len(DATA)) % 7 == 0)).astype(int)


def fitted(classifier: object, encoder: object = ORDINAL, rest: object = "passthrough") -> Pipeline:
    columns = make_column_transformer((encoder, [CATEGORY]), remainder=rest)
    return make_pipeline(columns, classifier).fit(DATA, COMMON)


TREES = {
    "hist gradient boosting": lambda: fitted(HistGradientBoostingClassifier(max_iter=20, random_state=0)),
    "categorical splits": lambda: fitted(
        HistGradientBoostingClassifier(max_iter=20, categorical_features=[0], random_state=0),
        OrdinalEncoder(handle_unknown="use_encoded_value", unknown_value=np.nan),
    ),
    "random forest": lambda: fitted(RandomForestClassifier(10, max_leaf_nodes=64, random_state=0)),
    "extra trees": lambda: fitted(ExtraTreesClassifier(10, max_leaf_nodes=40, random_state=0)),
    "gradient boosting": lambda: fitted(GradientBoostingClassifier(n_estimators=20, random_state=0)),
    "one-hot": lambda: fitted(RandomForestClassifier(10, max_depth=4, random_state=0), ONE_HOT),
}


@pytest.fixture(scope="module", params=TREES)
def trees(request: pytest.FixtureRequest) -> tuple[Pipeline, LeafMaskScorer]:
    pipeline = TREES[request.param]()
    return pipeline, LeafMaskScorer(pipeline)


categories = st.sampled_from(list(data.CATEGORIES)) | st.text(min_size=1, max_size=64)
rows = st.builds(
    Features,
    amount=st.floats(0, 1e4) | st.floats(0, allow_nan=False, allow_infinity=False),
    merchant_category=categories,
    hour=st.integers(0, 23).map(float),
    day_of_week=st.integers(0, 6).map(float),
    user_age=st.integers(0, 130).map(float),
    account_balance=st.floats(-1e5, 1e5) | st.floats(allow_nan=False, allow_infinity=False),
)


@settings(max_examples=100, deadline=None)
@given(batch=st.lists(rows, min_size=1, max_size=20))
def test_leaf_masks_equal_predict_proba(trees: tuple[Pipeline, LeafMaskScorer], batch: list[Features]) -> None:
    """Every supported ensemble, known and unknown categories, ordinary and extreme numbers; alone as in a batch."""
    pipeline, score = trees
    found = score(columns_of(batch))
    np.testing.assert_allclose(found, pipeline.predict_proba(frame(columns_of(batch)))[:, 1], rtol=0, atol=1e-12)
    assert [score(columns_of([row]))[0] for row in batch] == found.tolist()


ENSEMBLES = {
    "hist": lambda leaves, seed: HistGradientBoostingClassifier(max_iter=9, max_leaf_nodes=leaves, random_state=seed),
    "categorical": lambda leaves, seed: HistGradientBoostingClassifier(
        max_iter=9, max_leaf_nodes=leaves, categorical_features=[0], random_state=seed
    ),
    "gradient": lambda leaves, seed: GradientBoostingClassifier(
        n_estimators=9, max_depth=None, max_leaf_nodes=leaves, random_state=seed
    ),
    "forest": lambda leaves, seed: RandomForestClassifier(9, max_leaf_nodes=leaves, random_state=seed),
    "extra": lambda leaves, seed: ExtraTreesClassifier(9, max_leaf_nodes=leaves, random_state=seed),
}


@pytest.mark.parametrize("kind", ENSEMBLES)
@pytest.mark.parametrize("leaves", [2, 8, 9, 17, 33, 64])
def test_leaf_masks_at_the_cut_points(kind: str, leaves: int) -> None:
    """Values on every cut point, the nearest floats on either side, and the extremes; every width of mask."""
    unknown = np.nan if kind == "categorical" else -1
    encoder = OrdinalEncoder(handle_unknown="use_encoded_value", unknown_value=unknown, max_categories=8)
    pipeline = fitted(ENSEMBLES[kind](leaves, leaves), encoder)
    score, random = LeafMaskScorer(pipeline), np.random.default_rng(leaves)
    around = {
        name: np.array(
            [s for c in cuts for s in (c, np.nextafter(c, -np.inf), np.nextafter(c, np.inf))] + [1e300, -1e300]
        )
        for name, cuts in score.limits.items()
    }
    around = {name: values if name in MONEY else values[np.abs(values) < 1e9] for name, values in around.items()}
    names = np.array([*score.categories, "unknown", "\0"], object)
    columns = [random.choice(names if name == CATEGORY else [0.0, *around[name]], 3000) for name in FIELDS]
    array = encoded(pipeline, columns)
    expected = pipeline[-1].predict_proba(array)[:, 1]
    found = score(columns)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)
    assert found[:300].tolist() == [score([[values[row]] for values in columns])[0] for row in range(300)]
    whole = score.coalitions([values[:300] for values in columns], [values[7] for values in columns])
    assert whole[:, -1].tolist() == found[:300].tolist()
    np.testing.assert_array_equal(whole[:, 0], found[7])


def encoded(pipeline: Pipeline, columns: list[np.ndarray]) -> np.ndarray:
    """The input of the ensemble: fractions of whole numbers too, which a DataFrame of the signature could not hold."""
    table = pd.DataFrame(dict(zip(FIELDS, columns, strict=True))).astype(dict.fromkeys(NUMBERS, float))
    return np.asarray(pipeline[:-1].transform(table).astype(float)).clip(-LARGEST, LARGEST)


def test_too_many_leaves(caplog: pytest.LogCaptureFixture) -> None:
    """A tree of more leaves than a mask has bits is scored by the pipeline, and the log says why."""
    caplog.set_level("INFO", "gunicorn.error")
    estimator = fitted(RandomForestClassifier(5, max_leaf_nodes=MOST_LEAVES + 1, random_state=0))
    assert choose_scorer(estimator, []).name == "sklearn"
    assert caplog.messages[-1] == f"no leaf masks: a tree has {MOST_LEAVES + 1} leaves, more than {MOST_LEAVES}"


def test_too_large_tables(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same for tables of more memory than a worker should take; the size is that of the tables there would be."""
    caplog.set_level("INFO", "gunicorn.error")
    estimator = TREES["hist gradient boosting"]()
    size = sum(table.nbytes for table in LeafMaskScorer(estimator).tables)
    for bound, name in ((size, "leaf-masks"), (size - 1, "sklearn")):
        monkeypatch.setattr("model.MOST_TABLE_BYTES", bound)
        assert choose_scorer(estimator, []).name == name
    assert caplog.messages[-1].startswith("no leaf masks: its tables would take 0 MB")


def test_frame_is_what_models_are_trained_on(model: Model) -> None:
    """Same columns, same order, same kinds of values as the generated training data."""
    built = frame(columns_of([Features(**row) for row in DATA.head(50).to_dict("records")]))
    pd.testing.assert_frame_equal(built, DATA.head(50), check_dtype=False)
    assert [(column, dtype.kind) for column, dtype in built.dtypes.items()] == [
        (column, dtype.kind) for column, dtype in DATA.dtypes.items()
    ]
    assert [column for column, _ in SIGNATURE] == list(DATA.columns)


# -- the contract of a model -------------------------------------------------------------------------------------------


GOLDEN = DATA.iloc[0].to_dict() | {"fraud_probability": 0.5}


def golden(score: Callable[[pd.DataFrame], Sequence[float]]) -> list[dict[str, object]]:
    head = DATA.head(4)
    return [row | {"fraud_probability": float(p)} for row, p in zip(head.to_dict("records"), score(head), strict=True)]


def saved(folder: Path, estimator: Pipeline, **changes: object) -> Snapshot:
    """An estimator saved as the project saves it, but for the changes."""
    options = {
        "signature": SIGNED,
        "metadata": {
            "threshold": 0.5,
            "golden": golden(lambda rows: estimator.predict_proba(rows)[:, 1]) if "metadata" not in changes else None,
        },
        "skops_trusted_types": sorted(TRUSTED_TYPES),
        "pip_requirements": [],
    }
    mlflow.sklearn.save_model(estimator, folder / "model", **(options | changes))
    return Snapshot(str(folder / "model"), "n", "1", None, "http://registry", "0" * 64, [])


def test_forest(tmp_path: Path) -> None:
    assert load(saved(tmp_path, TREES["random forest"]()), config()).scorer.name == "leaf-masks"


def test_the_scorer_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "gunicorn.error")
    assert choose_scorer(TREES["hist gradient boosting"](), []).name == "leaf-masks"
    assert caplog.messages[-1] == "leaf masks of 20 trees"


def test_model_without_fast_path(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Logistic regression on scaled numbers is served through its own predict_proba, and the log says so once."""
    caplog.set_level("INFO", "gunicorn.error")
    estimator = fitted(LogisticRegression(), ONE_HOT, StandardScaler())
    loaded = load(saved(tmp_path, estimator), config())
    assert loaded.scorer.name == "sklearn"
    assert [re.sub(":.*", "", record.message) for record in caplog.records if record.name == "gunicorn.error"] == [
        "no leaf masks"
    ]
    batch = [Features(**row) for row in DATA.head(5).to_dict("records")]
    np.testing.assert_array_equal(loaded.score(batch), estimator.predict_proba(DATA.head(5))[:, 1])


def test_memory_of_explanations(model: Model) -> None:
    """A batch is explained in pieces, by each scorer, and the pieces are put together in order."""
    estimator, sizes = fitted(LogisticRegression(), ONE_HOT, StandardScaler()), list[int]()

    class Counting(PipelineScorer):
        def __call__(self, columns: Columns) -> Floats:
            sizes.append(len(columns[0]))
            return super().__call__(columns)

    columns = columns_of([Features(**row) for row in DATA.head(3000).to_dict("records")])
    probabilities, explanations = replace(model, scorer=Counting(estimator)).explain(columns)
    np.testing.assert_array_equal(probabilities, PipelineScorer(estimator)(columns))
    for explanation, probability in zip(explanations, probabilities, strict=True):
        total = explanation.base_value + sum(each.value for each in explanation.contributions)
        assert total == pytest.approx(probability, abs=1e-9)
    assert max(sizes) == 2**16
    assert sum(sizes) == 3000 * 64


class Doubtful(HistGradientBoostingClassifier):
    """Trees that treelite reads as such, with a `predict_proba` of their own for some rows."""

    def predict_proba(self, X: np.ndarray) -> np.ndarray:
        probabilities = super().predict_proba(X)
        return np.where(np.asarray(X)[:, [1]] > 50, probabilities[:, ::-1], probabilities)


def test_disagreement_means_no_fast_path(caplog: pytest.LogCaptureFixture) -> None:
    """What looks accelerable and scores otherwise is found out at load, and served through itself."""
    estimator = fitted(Doubtful(max_iter=20))
    LeafMaskScorer(estimator)  # built without complaint
    scorer = choose_scorer(estimator, [])
    assert scorer.name == "sklearn"
    assert re.fullmatch(r"no leaf masks: they differ from predict_proba by 0\.\d+", caplog.messages[-1])
    np.testing.assert_array_equal(
        scorer(columns_of([Features(500.0, "travel", 1.0, 1.0, 30.0, 100.0)])),
        estimator.predict_proba(frame(columns_of([Features(500.0, "travel", 1.0, 1.0, 30.0, 100.0)])))[:, 1],
    )


DOES_NOT = "the model does not score known, unknown and extreme transactions"


@pytest.mark.parametrize("rest", [SimpleImputer(missing_values=-1.0), StandardScaler()])
def test_changed_numbers_mean_no_fast_path(rest: object) -> None:
    """Also where no probe would show it, as for an imputer of one value."""
    with pytest.raises(ValueError, match="not passed through"):
        LeafMaskScorer(fitted(RandomForestClassifier(5, max_leaf_nodes=9), ORDINAL, rest))


def test_many_categories() -> None:
    """Ten thousand are found, each with its own code, without ten thousand calls."""
    names = np.array([f"category {number}" for number in range(10_000)])
    data = pd.concat([DATA] * 2, ignore_index=True).head(10_000).assign(merchant_category=names)
    columns = make_column_transformer((ORDINAL, [CATEGORY]), remainder="passthrough")
    labels = np.arange(len(data)) % 2
    estimator = make_pipeline(columns, HistGradientBoostingClassifier(max_iter=5)).fit(data, labels)
    scorer = choose_scorer(estimator, [])
    assert scorer.name == "leaf-masks"
    batch = columns_of([Features(**row) for row in data.tail(100).to_dict("records")])
    np.testing.assert_allclose(scorer(batch), estimator.predict_proba(data.tail(100))[:, 1], rtol=0, atol=1e-9)


def refusal(snapshot: Snapshot) -> str:
    with pytest.raises(ModelError) as raised:
        load(snapshot, config())
    return str(raised.value)


def test_classifier_without_probabilities_is_refused(tmp_path: Path) -> None:
    estimator = fitted(LinearSVC())
    snapshot = saved(tmp_path, estimator, metadata={"threshold": 0.5, "golden": golden(lambda rows: [0.5] * 4)})
    assert refusal(snapshot) == "Pipeline has no predict_proba"


def test_other_classes_are_refused(tmp_path: Path) -> None:
    estimator = make_pipeline(make_column_transformer((ORDINAL, [CATEGORY])), LogisticRegression())
    estimator.fit(DATA, COMMON.map({0: "honest", 1: "fraud"}))
    assert (
        refusal(saved(tmp_path, estimator)) == "the model's classes are ['fraud', 'honest'], expected 0 and 1 (fraud)"
    )


def test_model_that_cannot_score_new_categories_is_refused(tmp_path: Path) -> None:
    estimator = fitted(LogisticRegression(), OneHotEncoder(), StandardScaler())
    assert refusal(saved(tmp_path, estimator)).startswith(f"{DOES_NOT}: Found unknown")


@pytest.mark.parametrize(
    ("signature", "found"),
    [
        (None, "missing"),
        (
            ModelSignature(Schema([ColSpec("double", "amount"), ColSpec("string", CATEGORY)])),
            "[('amount', 'double'), ('merchant_category', 'string')]",
        ),
        (
            ModelSignature(Schema([ColSpec(kind, column) for column, kind in reversed(SIGNATURE)])),
            f"{list(reversed(SIGNATURE))}",
        ),
    ],
    ids=["none", "too few columns", "another order"],
)
def test_wrong_signature_is_refused(tmp_path: Path, signature: ModelSignature | None, found: str) -> None:
    snapshot = saved(tmp_path, TREES["random forest"](), signature=signature)
    assert refusal(snapshot) == f"the model's signature is {found}, expected {SIGNATURE}"


def test_changed_golden_score_is_refused(tmp_path: Path) -> None:
    """What scored differently at training is not the same model here."""
    estimator = TREES["random forest"]()
    rows = golden(lambda rows: estimator.predict_proba(rows)[:, 1])
    was = rows[2]["fraud_probability"]
    rows[2]["fraud_probability"] = abs(was - 2e-6)
    snapshot = saved(tmp_path, estimator, metadata={"threshold": 0.5, "golden": rows})
    assert refusal(snapshot) == (
        f"golden row 2 scores {was:.9f} here and scored {abs(was - 2e-6):.9f} at training; "
        "are the versions of scikit-learn the same?"
    )


@pytest.mark.parametrize(
    ("metadata", "problem"),
    [
        (None, "Object missing required field `golden`"),
        (
            {
                "threshold": 0.5,
                "golden": [GOLDEN],
                "reference": {
                    "score_deciles": [0.1] * 9,
                    "ranges": {"amount": [0, 1]},
                    "categories": [],
                    "transaction": GOLDEN,
                },
            },
            "expected deciles in order and a range for every number - at `$.reference`",
        ),
        ({"threshold": 0.5}, "Object missing required field `golden`"),
        ({"threshold": 1.5}, "Expected `float` <= 1.0 - at `$.threshold`"),
        ({"threshold": 0.5, "golden": []}, "Expected `array` of length >= 1 - at `$.golden`"),
    ],
)
def test_missing_metadata_is_refused(tmp_path: Path, metadata: dict[str, object] | None, problem: str) -> None:
    snapshot = saved(tmp_path, TREES["random forest"](), metadata=metadata)
    assert refusal(snapshot) == f"the model's metadata does not fit: {problem}"


def test_threshold(snapshot: Snapshot, model: Model) -> None:
    """The model's own, unless FRAUD_THRESHOLD says otherwise."""
    metadata = mlflow.models.Model.load(snapshot.path).metadata
    assert model.threshold == metadata["threshold"]
    assert load(snapshot, config(fraud_threshold="0.875")).threshold == 0.875
    assert load(snapshot, config(fraud_threshold="0")).threshold == 0


# -- the folder in memory ----------------------------------------------------------------------------------------------


def test_folder_of_a_crashed_run_is_removed(tmp_path: Path) -> None:
    """A start removes what no living process holds, and nothing else."""
    (tmp_path / "fraud-api-crashed" / "model").mkdir(parents=True)
    (tmp_path / "somebody-else").mkdir()
    held = new_folder(str(tmp_path))
    another = new_folder(str(tmp_path))
    assert sorted(tmp_path.iterdir()) == sorted([tmp_path / "somebody-else", held, another])


def test_folder_lives_as_long_as_its_process(tmp_path: Path) -> None:
    program = f"import model, sys; print(model.new_folder({str(tmp_path)!r}), flush=True); sys.stdin.read()"
    owner = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ
    )
    with owner:
        assert owner.stdout is not None
        left = Path(owner.stdout.readline().strip())
        mine = new_folder(str(tmp_path))
        assert set(tmp_path.iterdir()) == {left, mine}
        owner.kill()
        owner.wait()
        shutil.rmtree(mine)
        assert set(tmp_path.iterdir()) == {left}
        last = new_folder(str(tmp_path))
    assert set(tmp_path.iterdir()) == {last}


def test_numbers_are_all_but_the_category() -> None:
    assert {*NUMBERS, CATEGORY} == {column for column, _ in SIGNATURE}
