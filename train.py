"""From a file of transactions to a promoted champion: `python train.py --data transactions.csv`.

Rows, checked by the rules of the API → training rows and hold-out → settings and decision rule from cross-validation on
the training rows → a model fitted to all of them → measures on the hold-out, beside the champion's and a logistic
regression's → a version in the registry, with a report → the alias, if the gate lets it. Exits with

0  done: registered and promoted (or, with --promote never, registered as asked), or rolled back
1  an error: in the data, the registry or the champion; nothing is promoted
2  a wrong option
3  registered but not promoted: the gate failed
"""

import argparse
import re
import sys
from collections.abc import Callable
from typing import Any

from config import Config, prepare, without_credentials

NOT_PROMOTED = 3


def _number(low: float, high: float = sys.float_info.max, kind: Any = float) -> Callable[[str], Any]:
    def number(text: str) -> Any:
        if low <= (found := kind(text)) <= high:
            return found
        raise argparse.ArgumentTypeError(f"{text} is not from {low:g} to {high:g}")

    return number


def _name(text: str) -> str:
    if re.fullmatch(r"[\w. -]+", text):
        return text
    raise argparse.ArgumentTypeError("expected letters, digits, _ . - and spaces")


# name, what argparse makes of it, meaning; money is in the currency of the amounts
OPTIONS: list[tuple[str, dict[str, Any], str]] = [
    ("data", {}, "CSV, CSV.gz or Parquet: the fields of the API and is_fraud; else transactions are generated"),
    ("rows", {"type": _number(1, kind=int), "default": 250_000}, "how many to generate"),
    ("test-size", {"type": _number(0.01, 0.9), "default": 0.2}, "share of the rows that are held out to measure on"),
    ("time-column", {}, "hold out the latest rows by this column, not a random share"),
    ("seed", {"type": _number(0, 2**32 - 1, int), "default": 0}, "of generation and search, not of the hold-out"),
    ("trees", {"type": _number(1, kind=int), "default": 150}, "more take longer to score"),
    ("budget", {"type": _number(1, kind=int), "default": 8}, "settings compared: each size of tree, then random ones"),
    ("decide-by", {"choices": ["threshold", "expected-cost"], "default": "threshold"}, "rule to flag transactions by"),
    ("cost-missed", {"type": _number(0)}, "what a fraud costs that is not flagged; its amount if not given"),
    ("cost-review", {"type": _number(0), "default": 5.0}, "what an alert costs"),
    ("max-alert-rate", {"type": _number(0, 1), "default": 1.0}, "flag no larger share of the rows"),
    ("name", {"type": _name, "default": "fraud-detector"}, "registered model"),
    ("release", {"type": _name}, "tag of the version, such as v1.2.3, that predictions are signed with"),
    ("promote", {"choices": ["if-better", "always", "never"], "default": "if-better"}, "whether it becomes champion"),
    ("if-missing", {"action": "store_true"}, "do nothing if there is a champion"),
    ("purpose", {"default": "rank card transactions for review by people"}, "what the model is for"),
    ("owner", {"default": "not named"}, "who answers for the model"),
    ("approver", {"default": "not named"}, "who approves its use"),
]


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    """The options of the command line, or of `words`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = "rollback exchanges the champion and the version before it"
    parser.add_argument("command", nargs="?", choices=["train", "rollback"], default="train", help=commands)
    for name, kind, meaning in OPTIONS:
        parser.add_argument(f"--{name}", help=meaning + " (default %(default)s)" * ("default" in kind), **kind)
    found = parser.parse_args(words)
    if found.command == "rollback" and found != parser.parse_args(["rollback", f"--name={found.name}"]):
        parser.error("rollback takes no option but --name")
    if found.time_column and not found.data:
        parser.error("--time-column: expected with --data")
    if found.decide_by == "expected-cost" and (found.cost_missed is not None or not found.cost_review):
        parser.error("--decide-by expected-cost: expected without --cost-missed and with a --cost-review above 0")
    return found


if __name__ == "__main__":  # before the libraries are imported: they read the environment then
    options, config = arguments(), prepare("train")

import hashlib
import platform
import shlex
import time
import warnings
from dataclasses import replace
from importlib.metadata import version as installed
from pathlib import Path

import mlflow
import msgspec
import numpy as np
import pyarrow
from joblib import Parallel, delayed
from mlflow.exceptions import MlflowException
from scipy.special import logit
from scipy.stats import loguniform
from sklearn.compose import make_column_transformer
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score
from sklearn.model_selection import ParameterSampler, StratifiedKFold, TimeSeriesSplit
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import OneHotEncoder, OrdinalEncoder, StandardScaler
from sqlalchemy.exc import SQLAlchemyError

import data
import report
import versions
from data import LABEL, DataError, Sample, Split
from model import CATEGORY, Features, Model, ModelError
from report import BASELINE, CHAMPION, NEW, WITHOUT_AGE, Evidence, Rule, Scored, readable
from versions import say

SEARCH_ROWS = 200_000
FOLDS = 3
MARGIN = 0.003  # average precision: smaller gains in a search are chance
RESAMPLES = 100


# -- the model ---------------------------------------------------------------------------------------------------------

# One good setting of each size of tree: 8 leaves suit the generated transactions, 63 data with strong interactions.
# They are regularised, as scikit-learn's defaults diverge on rare fraud. The service's fast path takes up to 64 leaves.
START = [
    {"learning_rate": 0.1, "max_leaf_nodes": 8, "min_samples_leaf": 200, "l2_regularization": 10.0},
    {"learning_rate": 0.1, "max_leaf_nodes": 16, "min_samples_leaf": 100, "l2_regularization": 10.0},
    {"learning_rate": 0.1, "max_leaf_nodes": 31, "min_samples_leaf": 50, "l2_regularization": 15.0},
    {"learning_rate": 0.08, "max_leaf_nodes": 63, "min_samples_leaf": 50, "l2_regularization": 15.0},
]
SPACE = {
    "learning_rate": loguniform(0.05, 0.2),
    "max_leaf_nodes": [6, 8, 12, 16, 24, 31, 48, 63],
    "min_samples_leaf": [20, 50, 100, 200],
    "l2_regularization": loguniform(1, 100),
}


def pipeline(trees: int, seed: int, parameters: dict[str, Any] = START[0]) -> Pipeline:
    """Gradient-boosted trees that split sets of categories; the service scores them without a DataFrame.

    The encoder merges the rarest of more than 254 categories. An unknown category is a missing value.
    """
    unknown = {"handle_unknown": "use_encoded_value", "unknown_value": np.nan}
    category = OrdinalEncoder(max_categories=data.MOST_ENCODED, **unknown)
    columns = make_column_transformer((category, [CATEGORY]), remainder="passthrough")
    fixed = {"max_iter": trees, "early_stopping": False, "random_state": seed, "categorical_features": [0]}
    return make_pipeline(columns, HistGradientBoostingClassifier(**fixed | parameters))


def logistic_regression() -> Pipeline:
    """The baseline that a first champion must beat."""
    encoder = OneHotEncoder(handle_unknown="infrequent_if_exist", max_categories=data.MOST_ENCODED)
    columns = make_column_transformer((encoder, [CATEGORY]), remainder=StandardScaler())
    return make_pipeline(columns, LogisticRegression(max_iter=1000))


def search(sample: Sample, options: argparse.Namespace) -> tuple[dict[str, Any], Sample, np.ndarray]:
    """Return the settings with the best average precision in cross-validation, the rows used, and their scores.

    The score of a row comes from a model that was not fitted to it; by time, from one fitted to earlier rows. A random
    setting must be better in every fold, and by `MARGIN` in the mean, so that the result depends little on the seed.
    The search uses at most `SEARCH_ROWS` rows, evenly spaced. Folds run in parallel with one thread each, which takes
    less CPU time than one fold after another with two threads.
    """
    random = ParameterSampler(SPACE, max(options.budget - len(START), 0), random_state=options.seed)
    candidates, few = [*START, *random], sample.evenly(SEARCH_ROWS)
    splitter = StratifiedKFold(FOLDS, shuffle=True, random_state=0) if few.times is None else TimeSeriesSplit(FOLDS)
    every = splitter.split(few.rows, few.labels)
    folds = [fold for fold in every if all(few.labels[rows].sum() >= data.FEWEST_IN_PART for rows in fold)]
    if not folds:
        raise DataError(f"{LABEL}: too few of the earlier rows are 1 to validate on later ones")

    def scored(settings: dict[str, Any], fitted: np.ndarray, others: np.ndarray) -> Any:
        model = pipeline(options.trees, options.seed, settings).fit(few.rows.iloc[fitted], few.labels[fitted])
        return model.predict_proba(few.rows.iloc[others])[:, 1]

    jobs = (delayed(scored)(settings, *fold) for settings in candidates for fold in folds)
    done, best, taken, scores = Parallel(-1, require="sharedmem", return_as="generator")(jobs), np.zeros(1), {}, []
    for number, settings in enumerate(candidates):
        found = [next(done) for _ in folds]
        each = [average_precision_score(few.labels[rows], p) for (_, rows), p in zip(folds, found, strict=True)]
        shown = ", ".join(f"{readable(name).lower()} {value:.3g}" for name, value in settings.items())
        say(f"search {number + 1}/{len(candidates)}: average precision {np.mean(each):.4f} with {shown}")
        gains, margin = np.array(each) - best, MARGIN if number >= len(START) else 0
        if gains.mean() > margin and (not margin or gains.min() > 0):
            best, taken, scores = np.array(each), settings, found
    return taken, few.take(np.concatenate([rows for _, rows in folds])), np.concatenate(scores)


# -- the decision ------------------------------------------------------------------------------------------------------


def recalibrated(probabilities: np.ndarray, sample: Sample) -> Sample:
    """The rows with a probability of fraud, given score and amount, in place of each label.

    On a sample of labels a few large frauds decide which threshold costs least. Expected costs vary far less between
    samples. The logistic regression corrects scores that are too high or too low, in general or by amount.
    """
    log_odds = logit(probabilities.clip(report.TINY, 1 - report.TINY))
    fields = np.column_stack([log_odds, np.log1p(sample.rows["amount"])])
    model = make_pipeline(StandardScaler(), LogisticRegression()).fit(fields, sample.labels)
    return replace(sample, labels=model.predict_proba(fields)[:, 1])


def best_threshold(probabilities: np.ndarray, sample: Sample, options: argparse.Namespace) -> float:
    """The threshold with the lowest cost on these rows among those that flag no more than --max-alert-rate."""
    missed = report.costs_of_missing(sample, options)
    thresholds, costs, alerts = report.cost_curve(probabilities, missed, options.cost_review)
    most = options.max_alert_rate * len(sample)
    return float(thresholds[np.argmin(np.where(alerts <= most, costs, np.inf))])


def review_cost(probabilities: np.ndarray, sample: Sample, options: argparse.Namespace) -> float:
    """--cost-review, or the lowest review cost above it with which no more than --max-alert-rate are flagged."""
    worth = np.sort(probabilities * sample.rows["amount"].to_numpy())[::-1]
    most = int(options.max_alert_rate * len(sample))
    return float(max([options.cost_review, *np.nextafter(worth[most : most + 1], np.inf)]))


def gate(evidence: Evidence, champion: str | None) -> tuple[bool, list[str]]:
    """Whether the new version may become champion, and a sentence for each check; `champion` is a version number.

    "Beyond noise" means in 95 % of the resamples. A first champion must be better than a logistic regression.
    """
    if champion and CHAMPION not in evidence.models:
        return False, [f"NOT compared with version {champion}, the champion"]
    new, other = evidence.rounds[NEW], evidence.rounds[CHAMPION if champion else BASELINE]
    gains = (new - other)[["average_precision", "cost"]]
    low, high = gains[1:].quantile(report.INTERVAL).to_numpy()
    gain, extra = (f"{v:+.3g} [{a:+.3g}, {b:+.3g}]" for v, a, b in zip(gains.iloc[0], low, high, strict=True))
    factor = report.bands(evidence.models[NEW], evidence.held_out)["factor"].max()
    off = f"{factor:.2f}× apart beyond noise in the worst band, accepted up to {report.MISCALIBRATED}×"
    checks = [(factor <= report.MISCALIBRATED, f"calibrated: expected and actual frauds are {off}")]
    if champion:
        checks.append((low[0] > 0, f"more precise than version {champion} beyond noise: average precision {gain}"))
        cheap = f"cheaper than version {champion} beyond" if high[1] < 0 else f"as cheap as version {champion} within"
        checks.append((low[1] <= 0, f"{cheap} noise: cost per 1,000 {extra}"))
    else:
        saved = new["cost_of_flagging_nothing"][0] - new["cost"][0]
        checks.append((gains.iloc[0, 0] > 0, f"more precise than a {BASELINE}: average precision {gain}"))
        checks.append((saved > 0, f"cheaper than flagging nothing: {saved:,.0f} saved per 1,000"))
    return all(right for right, _ in checks), ["NOT " * (not right) + what for right, what in checks]


# -- from start to end -------------------------------------------------------------------------------------------------


def fit(training: Sample, options: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Pipeline]]:
    """Fit the model and choose its rules; return these parts of `Evidence`, and fitted models to compare with."""
    settings, few, scores = search(training, options)
    say(f"fitting {options.trees} trees to {len(training):,} rows, and what to compare them with")
    part = training.evenly(SEARCH_ROWS)
    jobs = [
        delayed(pipeline(options.trees, options.seed, settings).fit)(training.rows, training.labels),
        delayed(pipeline(options.trees, options.seed, settings).fit)(training.rows.assign(user_age=0), training.labels),
        delayed(logistic_regression().fit)(part.rows, part.labels),
    ]
    trees, ageless, baseline = Parallel(-1, require="sharedmem")(jobs)
    cheapest = best_threshold(scores, recalibrated(scores, few), options)
    threshold = data.midpoint(cheapest, trees.predict_proba(training.rows)[:, 1])
    by_cost = Rule("review_cost", review_cost(scores, few, options))
    rules = {"threshold": Rule("threshold", threshold), "expected-cost": by_cost}
    found = {"pipeline": trees, "rules": rules, "settings": settings, "validated": (few, scores)}
    return found, {BASELINE: baseline, WITHOUT_AGE: ageless}


def evaluate(
    options: argparse.Namespace, sample: Sample, training: Sample, held_out: Sample, champion: Model | None
) -> Evidence:
    """Search, fit, and measure all models on the hold-out.

    Models without a rule of their own flag as many rows as the new version.
    """
    found, others = fit(training, options)
    rule, scores = found["rules"][options.decide_by], found["pipeline"].predict_proba(held_out.rows)[:, 1]
    models = {NEW: Scored(NEW, scores, rule.flags(scores, held_out))}
    if champion:
        scores = champion.score([Features(*row) for row in held_out.rows.itertuples(index=False, name=None)])
        limits = [champion.threshold_for(amount) for amount in held_out.rows["amount"]]
        models[CHAMPION] = Scored(CHAMPION, scores, scores >= limits)
    compared = {name: model.predict_proba(held_out.rows)[:, 1] for name, model in others.items()}
    compared |= {} if held_out.truth is None else {"best reachable": held_out.truth}
    rate = models[NEW].flagged.mean()
    models |= {name: Scored(name, each, each > np.quantile(each, 1 - rate)) for name, each in compared.items()}
    say(f"measuring on {len(held_out):,} rows held out and {RESAMPLES} resamples of them")
    rounds = report.bootstrap([*models.values()], held_out, options, RESAMPLES)
    return Evidence(options, sample, training, held_out, models, rounds, **found)


def log_inputs(options: argparse.Namespace, how: Split, training: Sample, held_out: Sample) -> None:
    """Log options, counts of rows, SHA-256 of the file, package versions and data sets."""
    left_out = {"command", "if_missing", "rows" if options.data else "data"}
    given = {name: value for name, value in vars(options).items() if name not in left_out}
    given["cost_missed"] = options.cost_missed if options.cost_missed is not None else "amount"
    given |= {f"split_{name}": value for name, value in msgspec.to_builtins(how).items() if name != "test_size"}
    if isinstance(how.last, float):
        given["split_last"] = training.when(how.last)
    given["git_commit"] = mlflow.active_run().data.tags.get("mlflow.source.git.commit")  # type: ignore[union-attr]
    for part, name in ((training, "training"), (held_out, "holdout")):
        given |= {f"{name}_rows": len(part), f"{name}_frauds": int(part.labels.sum())}
        rows = part.rows.assign(**{LABEL: part.labels})
        # MLflow warns that columns of integers cannot have missing values.
        with warnings.catch_warnings(action="ignore", category=UserWarning):
            mlflow.log_input(mlflow.data.from_pandas(rows, options.data, LABEL, name), name)  # type: ignore[attr-defined]
    if options.data:
        with open(options.data, "rb") as file:
            given["data_sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
    packages = ("mlflow", "numpy", "pandas", "scikit-learn", "skops")
    given |= {"python_version": platform.python_version()} | {f"{name}_version": installed(name) for name in packages}
    mlflow.log_params(given)


def run(options: argparse.Namespace, config: Config) -> int:
    """Train, measure, register and, if the gate passes, promote; return the exit status.

    Raises `DataError`, `ModelError`, or MLflow's exception.
    """
    versions.use_experiment(options.name, config.mlflow_tracking_uri)
    if options.if_missing and CHAMPION in versions.aliases(options.name):
        return 0
    versions.check_release(options)
    path = options.data
    say(f"reading {path}" if path else f"generating {options.rows:,} transactions")
    sample = data.read(Path(path), options.time_column) if path else data.generate(options.rows, options.seed)
    pyarrow.default_memory_pool().release_unused()  # of a file of a million rows 140 MB, which nothing else can use
    training, held_out, how = data.split(sample, options.test_size)
    number, champion, held_out = versions.champion_of(options, config, held_out)
    for line in (*sample.notes, f"{len(sample):,} transactions, {sample.labels.sum():,} of them fraud"):
        say(line)
    with mlflow.start_run():
        log_inputs(options, how, training, held_out)
        evidence = evaluate(options, sample, training, held_out, champion)
        passed, checks = gate(evidence, number)
        promoted = options.promote == "always" or (options.promote == "if-better" and passed)
        fulfilled = f"{sum(not check.startswith('NOT') for check in checks)} of the gate's {len(checks)} checks passed"
        verdict = f"{'Promoted' if promoted else 'Not promoted'} with --promote {options.promote}: {fulfilled}"
        print(evidence.measured().to_string(), verdict, *checks, sep="\n", flush=True)
        version = publish(evidence, how, passed, [verdict, *checks])
        log_report(evidence, version, verdict, checks)
    versions.as_served(options.name, version, config)
    if promoted:
        versions.promote(options.name, version, number)
    return 0 if promoted or options.promote == "never" else NOT_PROMOTED


def publish(evidence: Evidence, how: Split, passed: bool, verdict: list[str]) -> str:
    """Register the version with its metadata, tags and description; return its number."""
    say("registering")
    options, measured = evidence.options, evidence.rounds[NEW].iloc[0].to_dict()
    rule = evidence.rules[options.decide_by]
    tags = {"gate": "passed" if passed else "failed", "split": msgspec.json.encode(how).decode()}
    tags |= {name: getattr(options, name) for name in ("promote", "decide_by", "owner", "approver")}
    tags |= {"release": options.release} if options.release else {}
    if options.promote == "always" and not passed:
        user = mlflow.active_run().data.tags.get("mlflow.user")  # type: ignore[union-attr]
        tags["override"] = f"promoted by {user} against the gate: {'; '.join(verdict)}"
    tags |= {name: f"{value:.6g}" for name, value in measured.items()}
    known = {rule.by: rule.limit, "metrics": measured}
    known["reference"] = data.reference(evidence.training, evidence.models[NEW].probabilities)
    about = "  \n".join(verdict)
    return versions.register(evidence.pipeline, evidence.held_out.rows, options.name, tags, about, **known)


def log_report(evidence: Evidence, version: str, verdict: str, checks: list[str]) -> None:
    """Log measures, settings and the report, which shows all parameters of the run."""
    say("drawing and logging the report")
    for name, rounds in evidence.rounds.items():
        suffix = "" if name == NEW else "_" + name.replace(" ", "_")
        mlflow.log_metrics({measure + suffix: float(value) for measure, value in rounds.iloc[0].items()})
    mlflow.log_params(evidence.settings | {rule.by: rule.limit for rule in evidence.rules.values()})
    run, where = mlflow.active_run().info, without_credentials(mlflow.get_tracking_uri())  # type: ignore[union-attr]
    link = f"{where.rstrip('/')}/#/experiments/{run.experiment_id}/runs/" if where.startswith("http") else ""
    made = {"command": f"python {shlex.join(sys.argv)}", "MLflow_run": link + run.run_id}
    made |= mlflow.get_run(run.run_id).data.params
    title = f"{evidence.options.name} version {version}, {time.strftime('%Y-%m-%d')}"
    mlflow.log_text(report.page(evidence, title, verdict, checks, made), "report.html")
    say(f"report: {without_credentials(mlflow.get_artifact_uri())}/report.html")


def main() -> int | str:
    """Train, or roll back; return the exit status or an error message."""
    mlflow.set_tracking_uri(config.mlflow_tracking_uri)
    try:
        with versions.still():
            return versions.rollback(options.name) if options.command == "rollback" else run(options, config)
    except (DataError, ModelError, MlflowException, OSError, SQLAlchemyError) as error:
        return f"train: {config.mask(str(error).partition(chr(10))[0])}"


if __name__ == "__main__":
    sys.exit(main())
