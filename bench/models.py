"""How good the models are that `train.py` makes, beside LightGBM with early stopping and logistic regression.

`make bench-models` runs it, on transactions as `data.generate` makes them and on wider ones that imitate what public
card data is like: dozens of categories, skewed amounts, fraud that has its hours and its amounts in each category. It
writes the table into README.md.
"""

from config import prepare

if __name__ == "__main__":
    prepare("bench")

import argparse
import time
from collections.abc import Callable

import lightgbm
import numpy as np
import pandas as pd
from sklearn.compose import make_column_transformer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, brier_score_loss, roc_auc_score
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import FunctionTransformer, OneHotEncoder, StandardScaler

import data
import train
from bench.tables import write_table
from model import CATEGORY

OURS, LIGHTGBM = "`train.py`", "LightGBM, early stopping, refitted to all"
MEASURES = {"average precision": average_precision_score, "ROC AUC": roc_auc_score, "Brier score": brier_score_loss}
DIGITS = (4, 4, 5)


def wide(rows: int, seed: int) -> data.Sample:
    """Transactions of 40 categories, the commonest of them 40 times as frequent as the rarest, about 2 % of them fraud.

    Each category has hours and amounts of its own at which fraud happens; the two together are worse than each.
    """
    world, random, kinds = np.random.default_rng(1), np.random.default_rng(seed), 40
    level = world.normal(3.5, 0.9, kinds)
    dear, risk, hot = world.normal(level + 1.8, 0.5), world.normal(0, 1.2, kinds), world.integers(0, 24, kinds)
    share = 1 / np.arange(1, kinds + 1)
    kind = random.choice(kinds, rows, p=share / share.sum())
    table = pd.DataFrame(
        {
            "amount": np.exp(level[kind] + 1.1 * random.standard_normal(rows)).round(2) + 0.01,
            CATEGORY: np.array([f"category_{number:02}" for number in range(kinds)])[kind],
            "hour": random.choice(24, rows, p=np.array(data.HOURS) / sum(data.HOURS)),
            "day_of_week": random.integers(0, 7, rows),
            "user_age": (18 + random.gamma(3, 9.5, rows)).clip(max=100).astype(int),
            "account_balance": (np.exp(7.6 + 1.3 * random.standard_normal(rows)) - 250).round(2),
        }
    )
    apart = (table["hour"].to_numpy() - hot[kind]) % 24
    near = np.minimum(apart, 24 - apart) <= 3
    log_odds = (
        risk[kind]
        - 8.6
        + 3.2 * near
        + 4.5 * np.exp(-(((np.log(table["amount"]) - dear[kind]) / 0.45) ** 2))
        + 1.5 * (near & (table["amount"] > 100))
        + 0.8 * ((table["user_age"] < 22) | (table["user_age"] > 70))
        + 0.7 * (table["account_balance"] < 0)
    )
    probability = np.asarray(1 / (1 + np.exp(-log_odds)))
    return data.Sample(table, (random.random(rows) < probability).astype(np.int64), probability)


def ours(training: data.Sample, held_out: data.Sample, seed: int) -> np.ndarray:
    found, _ = train.fit(training, train.arguments(["--seed", str(seed)]))
    return np.asarray(found["pipeline"].predict_proba(held_out.rows)[:, 1])


def boosted(training: data.Sample, held_out: data.Sample, seed: int) -> np.ndarray:
    """Two sizes of tree, stopped early on a fifth of the training rows; the better one is fitted to all of them."""
    kinds = pd.CategoricalDtype(sorted(training.rows[CATEGORY].unique()))
    rows = training.rows.astype({CATEGORY: kinds})
    last = np.random.default_rng(seed).permutation(len(training))
    fitted, stopped_on = last[len(last) // 5 :], last[: len(last) // 5]
    best = (np.inf, 0, 0)
    settings = {"learning_rate": 0.05, "min_child_samples": 50, "reg_lambda": 1.0, "verbose": -1, "n_jobs": 1}
    for leaves in (8, 31):
        model = lightgbm.LGBMClassifier(n_estimators=2000, num_leaves=leaves, random_state=seed, **settings)
        stop = lightgbm.early_stopping(50, verbose=False)
        unseen = {"eval_X": rows.iloc[stopped_on], "eval_y": training.labels[stopped_on]}
        model.fit(rows.iloc[fitted], training.labels[fitted], callbacks=[stop], **unseen)
        best = min(best, (model.best_score_["valid_0"]["binary_logloss"], leaves, model.best_iteration_))
    model = lightgbm.LGBMClassifier(n_estimators=best[2], num_leaves=best[1], random_state=seed, **settings)
    model.fit(rows, training.labels)
    return np.asarray(model.predict_proba(held_out.rows.astype({CATEGORY: kinds}))[:, 1])


def linear(pipeline: Callable[[], Pipeline]) -> Callable[..., np.ndarray]:
    def scores(training: data.Sample, held_out: data.Sample, seed: int) -> np.ndarray:
        return np.asarray(pipeline().fit(training.rows, training.labels).predict_proba(held_out.rows)[:, 1])

    return scores


def by_hand() -> Pipeline:
    """A logistic regression with logarithms of money, and with hours and days as categories."""
    numbers = make_pipeline(FunctionTransformer(np.arcsinh), StandardScaler())
    encoder = OneHotEncoder(handle_unknown="ignore")
    columns = make_column_transformer((encoder, [CATEGORY, "hour", "day_of_week"]), remainder=numbers)
    return make_pipeline(columns, LogisticRegression(max_iter=1000))


def measured(scores: np.ndarray, held_out: data.Sample) -> list[float]:
    return [float(measure(held_out.labels, scores)) for measure in MEASURES.values()]


def compare(name: str, make: Callable[[int, int], data.Sample], rows: int, seeds: int) -> list[str]:
    """The lines of the table for one kind of transactions."""
    models = {OURS: ours, LIGHTGBM: boosted, "logistic regression, prepared by hand": linear(by_hand)}
    models["logistic regression, as in the gate"] = linear(train.logistic_regression)
    found: dict[str, list[list[float]]] = {model: [] for model in [*models, "best reachable"]}
    for seed in range(seeds):
        training, held_out, _ = data.split(make(rows, seed), 0.2)
        for model, scores in models.items():
            started = time.perf_counter()
            found[model].append(measured(scores(training, held_out, seed), held_out))
            print(name, seed, model, found[model][-1], f"{time.perf_counter() - started:.0f} s", flush=True)
        found["best reachable"].append(measured(held_out.truth, held_out))
    lines = []
    for model, values in found.items():
        gaps = np.array(values) - np.array(found[LIGHTGBM])
        worst = [gaps[:, 0].min(), gaps[:, 1].min(), gaps[:, 2].max()]
        means = zip(np.mean(values, axis=0), worst, DIGITS, strict=True)
        cells = [f"{mean:.{digits}f} ({gap:+.{digits}f})" for mean, gap, digits in means]
        lines.append(f"| {name} | {model} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition(",")[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, default=250_000, help="transactions of each kind (default %(default)s)")
    parser.add_argument("--seeds", type=int, default=5, help="data sets of each kind (default %(default)s)")
    options = parser.parse_args()
    lines = [
        f"Means over {options.seeds} data sets of {options.rows:,} transactions, a fifth of them held out; in brackets",
        "the worst difference to LightGBM on the same rows (of the Brier score less is better).",
        "",
        f"| transactions | model | {' | '.join(MEASURES)} |",
        "| --- | --- |" + " --: |" * len(MEASURES),
        *compare("generated", data.generate, options.rows, options.seeds),
        *compare("wide", wide, options.rows, options.seeds),
    ]
    write_table("bench-models", "\n".join(lines))


if __name__ == "__main__":
    main()
