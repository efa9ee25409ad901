"""Train on generated transactions, register the model, point the alias `champion` at it: `python train.py`."""

import argparse
import sys
from pathlib import Path

from config import prepare


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, default=250_000, help="transactions to generate (default %(default)s)")
    parser.add_argument("--trees", type=int, default=150, help="boosting rounds (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of data and training (default %(default)s)")
    parser.add_argument("--name", default="fraud-detector", help="registered model (default %(default)s)")
    parser.add_argument("--release", metavar="v1.2.3", help="tag of the version, shown as model_version")
    parser.add_argument("--if-missing", action="store_true", help="do nothing if the registry has a champion")
    return parser.parse_args()


if __name__ == "__main__":  # before the libraries are imported: they read the environment then
    options, config = arguments(), prepare("train")

import mlflow
import numpy as np
import pandas as pd
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.types import ColSpec, Schema
from sklearn.compose import make_column_transformer
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score
from sklearn.model_selection import train_test_split
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import OrdinalEncoder

from model import CATEGORY, SIGNATURE, TRUSTED_TYPES

ALIAS = "champion"
GOLDEN_ROWS = 8

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


def generate(rows: int, seed: int) -> tuple[pd.DataFrame, np.ndarray, np.ndarray]:
    """Sample transactions (rows × 6), their labels (1 is fraud) and the true probabilities the labels were drawn from.

    Fraud is rare (about 1 %), more likely for amounts that are large for their category or for the account, at night
    and above all at night in risky categories, for the youngest and oldest users and for overdrawn accounts.
    As the probabilities are known, so is the best ROC AUC that any model can reach.
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
    return data, (random.random(rows) < probability).astype(int), probability


def pipeline(trees: int, seed: int) -> Pipeline:
    """Encoding and trees as one object, regularised: the defaults diverge on rare fraud.

    Means over three seeds, 50,000 rows held out of 250,000: 8 leaves a tree give an average precision of 0.372 and a
    log loss of 0.03406, 31 leaves, scikit-learn's default, at half the learning rate 0.365 and 0.03418.
    """
    category = OrdinalEncoder(handle_unknown="use_encoded_value", unknown_value=-1)
    return make_pipeline(
        make_column_transformer((category, [CATEGORY]), remainder="passthrough"),
        HistGradientBoostingClassifier(
            max_iter=trees,
            learning_rate=0.1,
            max_leaf_nodes=8,
            min_samples_leaf=200,
            l2_regularization=10,
            early_stopping=False,
            random_state=seed,
        ),
    )


def best_threshold(labels: np.ndarray, scores: np.ndarray) -> float:
    """The score from which precision and recall are best together (greatest F1)."""
    precision, recall, thresholds = precision_recall_curve(labels, scores)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-9)
    return float(thresholds[f1[:-1].argmax()])


def golden_rows(model: Pipeline, data: pd.DataFrame) -> list[dict[str, object]]:
    """A handful of rows, from the least to the most suspicious, with the scores they have now."""
    scores = model.predict_proba(data)[:, 1]
    chosen = np.argsort(scores)[np.linspace(0, len(scores) - 1, GOLDEN_ROWS).astype(int)]
    return [{**data.iloc[index].to_dict(), "fraud_probability": float(scores[index])} for index in chosen]


def register(model: Pipeline, data: pd.DataFrame, threshold: float, name: str, release: str | None) -> str:
    """Log the model with all that the service asks of it, register it, move the alias; return its version number."""
    logged = mlflow.sklearn.log_model(
        model,
        name="model",
        registered_model_name=name,
        signature=ModelSignature(Schema([ColSpec(kind, column) for column, kind in SIGNATURE])),
        input_example=data.head(2),
        metadata={"threshold": threshold, "golden": golden_rows(model, data)},
        pyfunc_predict_fn="predict_proba",
        serialization_format="skops",
        skops_trusted_types=sorted(TRUSTED_TYPES),
        pip_requirements=mlflow.sklearn.get_default_pip_requirements(include_skops=True),  # guessing them takes seconds
    )
    client, version = MlflowClient(), str(logged.registered_model_version)
    if release:
        client.set_model_version_tag(name, version, "release", release)
    client.set_registered_model_alias(name, ALIAS, version)
    return version


def has_champion(name: str) -> bool:
    return any(ALIAS in found.aliases for found in MlflowClient().search_registered_models(f"name='{name}'"))


def use_experiment(name: str, tracking_uri: str) -> None:
    """Log to the experiment `name`; with a local database, keep the artifacts beside it."""
    if tracking_uri.startswith("sqlite:///"):
        database = Path(tracking_uri.removeprefix("sqlite:///")).absolute()
        folder = database.parent
        folder.mkdir(parents=True, exist_ok=True)
        if not database.exists():  # made aside and moved: MLflow cannot go on with one that it was stopped in making
            MlflowClient(f"sqlite:///{database}.new").search_experiments()
            Path(f"{database}.new").rename(database)
        if mlflow.get_experiment_by_name(name) is None:
            mlflow.create_experiment(name, artifact_location=(folder / "artifacts").as_uri())
    mlflow.set_experiment(name)


def train(rows: int, trees: int, seed: int, name: str, release: str | None) -> None:
    """Generate, fit, measure on rows not trained on, register."""
    data, labels, truth = generate(rows, seed)
    parts = train_test_split(data, labels, truth, test_size=0.2, random_state=seed, stratify=labels)
    data, held_data, labels, held_labels, _, held_truth = parts
    with mlflow.start_run():
        model = pipeline(trees, seed).fit(data, labels)
        scores = model.predict_proba(held_data)[:, 1]
        metrics = {
            "roc_auc": roc_auc_score(held_labels, scores),
            "roc_auc_best_reachable": roc_auc_score(held_labels, held_truth),
            "average_precision": average_precision_score(held_labels, scores),
            "average_precision_best_reachable": average_precision_score(held_labels, held_truth),
        }
        mlflow.log_params({"rows": rows, "trees": trees, "seed": seed})
        mlflow.log_metrics(metrics)
        for metric in ("roc_auc", "average_precision"):
            best = metrics[f"{metric}_best_reachable"]
            print(f"{metric.replace('_', ' ')}: {metrics[metric]:.4f} (best reachable {best:.4f})")
        version = register(model, held_data, best_threshold(held_labels, scores), name, release)
    print(f"registered {name} version {version}, alias {ALIAS}")


def main() -> None:
    use_experiment(options.name, config.mlflow_tracking_uri)
    if not (options.if_missing and has_champion(options.name)):
        train(options.rows, options.trees, options.seed, options.name, options.release)


if __name__ == "__main__":
    try:
        main()
    except MlflowException as error:
        sys.exit(f"train: {config.mask(str(error).partition(chr(10))[0])}")
