"""How good a model is: measures with intervals, tables and plots, and the HTML page that shows them."""

import io
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from joblib import Parallel, delayed
from matplotlib.figure import Figure
from scipy.stats import binomtest, chi2, entropy
from sklearn.inspection import PartialDependenceDisplay
from sklearn.metrics import average_precision_score, brier_score_loss, confusion_matrix, log_loss, roc_auc_score

from data import Sample
from model import CATEGORY, NUMBERS, Floats

NEW, CHAMPION, BASELINE, WITHOUT_AGE = "new version", "champion", "logistic regression", "without age"
INTERVAL = (0.05, 0.95)
RATES = (0.001, 0.01, 0.05)
MISCALIBRATED = 1.25  # expected and actual frauds of a band differ by no more than this factor, beyond noise
FEWEST = 20  # frauds: a smaller segment gets no figures
TINY = 1e-9
NAMES = {
    CATEGORY: "Category",
    "hour": "Hour of the day",
    "day_of_week": "Day of the week (0 is Monday)",
    "user_age": "Age of the user, years",
    "roc_auc": "ROC AUC",
    "cost": "Cost per 1,000 transactions",
    "cost_of_flagging_nothing": "Cost per 1,000 if nothing is flagged",
    "split_last": "Last training row",
    "data_sha256": "SHA-256 of the data",
}


def readable(name: str) -> str:
    return NAMES.get(name, (name[:1].upper() + name[1:]).replace("_percent", " %").replace("_", " "))


def short(value: float) -> str:
    if not np.isfinite(value):
        return "too few" if np.isnan(value) else "none"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


# -- measures ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """A decision rule: flag probabilities of at least a `threshold`, or of at least `review_cost` ÷ amount.

    The second has the lowest expected cost if a missed fraud costs its amount and probabilities are calibrated (Elkan
    2001, "The Foundations of Cost-Sensitive Learning"). `by` is the name of the limit in the metadata.
    """

    by: str
    limit: float

    def flags(self, probabilities: Floats, sample: Sample) -> np.ndarray:
        amounts = sample.rows["amount"].to_numpy().clip(TINY)
        limit = self.limit if self.by == "threshold" else np.minimum(1, self.limit / amounts)
        return np.asarray(probabilities >= limit)


@dataclass(frozen=True)
class Scored:
    """The scores of a model on the hold-out, and which rows it flags."""

    name: str
    probabilities: Floats
    flagged: np.ndarray


@dataclass(frozen=True)
class Evidence:
    """All that the gate and the report need to know about a model.

    `validated` are training rows with their cross-validated scores. `models` are the models scored on the hold-out, the
    new version first. `rounds` are their measures on the resamples of `bootstrap`.
    """

    options: Namespace
    sample: Sample
    training: Sample
    held_out: Sample
    models: dict[str, Scored]
    rounds: dict[str, pd.DataFrame]
    pipeline: Any
    rules: dict[str, Rule]
    settings: dict[str, Any]
    validated: tuple[Sample, Floats]

    def measured(self) -> pd.DataFrame:
        """The measures as text, measures × models, with the intervals of the resamples."""
        found = {}
        for name, rounds in self.rounds.items():
            low, high = rounds[1:].quantile(INTERVAL).map(short).to_numpy(object)
            found[name] = rounds.iloc[0].map(short) + " [" + low + ", " + high + "]"
        return pd.DataFrame(found).rename(readable)


def costs_of_missing(sample: Sample, options: Namespace) -> Floats:
    """The cost of each row if it is not flagged: 0 if it is no fraud."""
    amounts = sample.rows["amount"].to_numpy() if options.cost_missed is None else options.cost_missed
    return np.asarray(sample.labels * amounts, np.float64)


def cost_of(flagged: np.ndarray, missed: Floats, review: float) -> float:
    """The cost per 1,000 transactions of frauds that are not flagged and of reviews."""
    return float(1000 * (missed[~flagged].sum() + review * flagged.sum()) / len(missed))


def cost_curve(probabilities: Floats, missed: Floats, review: float) -> tuple[Floats, Floats, np.ndarray]:
    """All thresholds in falling order from 1, the total cost of each, and the number of rows that it flags."""
    thresholds, place = np.unique(np.append(probabilities, 1.0), return_inverse=True)
    alerts = np.bincount(place[:-1], minlength=len(thresholds))[::-1].cumsum()
    caught = np.bincount(place[:-1], weights=missed, minlength=len(thresholds))[::-1].cumsum()
    return thresholds[::-1], missed.sum() - caught + review * alerts, alerts


def measures(labels: Any, scores: Floats, flagged: Any, missed: Floats, review: float) -> dict[str, float]:
    """The measures of a model; the rows are in falling order of probability, costs are per 1,000 transactions."""
    frauds, hits = labels.sum(), labels[flagged].sum()
    found = {
        "average_precision": average_precision_score(labels, scores),
        "roc_auc": roc_auc_score(labels, scores),
        "log_loss": log_loss(labels, scores, labels=[0, 1]),
        "brier_score": brier_score_loss(labels, scores),
        "recall": hits / frauds,
        "precision": hits / max(flagged.sum(), 1),
        "alert_rate": flagged.mean(),
        **{f"recall_at_{100 * rate:g}_percent": labels[: round(rate * len(labels))].sum() / frauds for rate in RATES},
        "cost": cost_of(flagged, missed, review),
        "cost_of_flagging_nothing": 1000 * missed.sum() / len(labels),
    }
    return {name: float(value) for name, value in found.items()}


def bootstrap(models: list[Scored], sample: Sample, options: Namespace, resamples: int) -> dict[str, pd.DataFrame]:
    """For each model a table of its measures (columns) on the hold-out (first row) and on resamples (other rows).

    A resample has as many rows as the hold-out, drawn with replacement (Efron 1979). All models get the same resamples.
    """
    missed, size = costs_of_missing(sample, options), len(sample)
    orders = [np.argsort(-model.probabilities, kind="stable") for model in models]

    def measured(number: int) -> list[Any]:
        drawn = np.random.default_rng(number).integers(0, size, size) if number else np.arange(size)
        times, found = np.bincount(drawn, minlength=size), []
        for model, order in zip(models, orders, strict=True):
            rows = np.repeat(order, times[order])
            labels, scores, flagged = sample.labels[rows], model.probabilities[rows], model.flagged[rows]
            found.append(measures(labels, scores, flagged, missed[rows], options.cost_review))
        return found

    rounds = Parallel(-1, require="sharedmem")(map(delayed(measured), range(resamples + 1)))
    return {model.name: pd.DataFrame(each) for model, each in zip(models, zip(*rounds, strict=True), strict=True)}


def bands(model: Scored, sample: Sample) -> pd.DataFrame:
    """Expected and actual frauds among the rows that are not flagged, and in three bands of those that are.

    Each band of flagged rows has a third of the expected frauds. `low` and `high` are the 99 % interval of the actual
    number (Garwood 1936). `factor` is the ratio of the expected number to the nearer end, 1 inside the interval.
    """
    p, flagged = model.probabilities, model.flagged
    order = np.flatnonzero(flagged)[np.argsort(p[flagged], kind="stable")]
    band = np.zeros(len(p), int)
    band[order] = 1 + np.minimum(3 * p[order].cumsum() / max(p[order].sum(), TINY), 2).astype(int)
    table = pd.DataFrame({"from": p, "to": p, "rows": 1, "expected": p, "actual": sample.labels}).groupby(band)
    found = table.agg({"from": "min", "to": "max", "rows": "sum", "expected": "sum", "actual": "sum"})
    found["low"] = chi2.ppf(0.005, 2 * found["actual"].clip(lower=TINY)) / 2
    found["high"] = chi2.ppf(0.995, 2 * found["actual"] + 2) / 2
    outside = np.maximum(found["expected"] / found["high"], found["low"] / found["expected"].clip(lower=TINY))
    names = ("not flagged", "flagged, lowest third", "flagged, middle third", "flagged, highest third")
    return found.assign(factor=outside.clip(lower=1)).rename(index=dict(enumerate(names)))


# -- tables ------------------------------------------------------------------------------------------------------------


def business(rounds: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """Alerts, frauds and money for 100,000 transactions a day: champion, new version, and the change."""
    found = pd.DataFrame({name: rounds[name].iloc[0] for name in (CHAMPION, NEW) if name in rounds}).T
    alerts, frauds = found["alert_rate"] * 1e5, found["alert_rate"] * found["precision"] * 1e5
    lines = {"Alerts": alerts, "Frauds caught": frauds}
    lines["Money saved, against flagging nothing"] = (found["cost_of_flagging_nothing"] - found["cost"]) * 100
    lines["False alerts per 10 frauds caught"] = 10 * (alerts - frauds) / frauds.clip(lower=TINY)
    table = pd.DataFrame(lines).T
    if CHAMPION in table:
        return table.map("{:,.0f}".format).assign(change=(table[NEW] - table[CHAMPION]).map("{:+,.0f}".format))
    return table.map("{:,.0f}".format)


def decisions(evidence: Evidence) -> pd.DataFrame:
    """Confusion matrix and cost on the hold-out: both rules, the cheapest threshold in hindsight, and no alerts."""
    scores, missed = evidence.models[NEW].probabilities, costs_of_missing(evidence.held_out, evidence.options)
    thresholds, costs, _ = cost_curve(scores, missed, evidence.options.cost_review)
    rules = {name + ", in force" * (name == evidence.options.decide_by): rule for name, rule in evidence.rules.items()}
    rules["cheapest threshold, in hindsight"] = Rule("threshold", float(thresholds[costs.argmin()]))
    found = {}
    for name, rule in (rules | {"flag nothing": Rule("threshold", np.inf)}).items():
        flagged = rule.flags(scores, evidence.held_out)
        counts = confusion_matrix(evidence.held_out.labels, flagged, labels=[1, 0]).ravel()
        found[name] = [rule.limit, *counts, cost_of(flagged, missed, evidence.options.cost_review)]
    columns = ["limit", "frauds flagged", "frauds missed", "genuine flagged", "genuine passed", "cost per 1,000"]
    return pd.DataFrame.from_dict(found, orient="index", columns=columns).map(short)


def share(chosen: np.ndarray) -> str:
    """The share of the true values in percent, with its 95 % interval (Wilson 1927)."""
    if not len(chosen):
        return "none"
    low, high = binomtest(int(chosen.sum()), len(chosen)).proportion_ci(method="wilson")
    return f"{100 * chosen.mean():.3g} % [{100 * low:.3g}, {100 * high:.3g}]"


def segments(evidence: Evidence) -> pd.DataFrame:
    """Measures on parts of the hold-out: by age, amount, hour, category, and by whether training had the category."""
    rows, fraud, categories = evidence.held_out.rows, evidence.held_out.labels == 1, evidence.held_out.rows[CATEGORY]
    fifths = np.quantile(rows["amount"], [0.2, 0.4, 0.6, 0.8, 1]).round()
    groups = {
        "Age": _cut(rows["user_age"], [0, 25, 35, 50, 65, 131]),
        "Amount": _cut(rows["amount"], np.unique([0, *fifths[:-1], fifths[-1] + 2])),
        "Hour": _cut(rows["hour"], [0, 6, 12, 18, 24]),
        "Category": categories.where(categories.isin(categories.value_counts().index[:20]), "all others"),
        "New category": np.where(categories.isin(evidence.training.rows[CATEGORY].unique()), "no", "yes"),
    }
    models = {"": evidence.models[NEW], " without age": evidence.models[WITHOUT_AGE]}
    found = {}
    for kind, values in groups.items():
        for segment, at in rows.groupby(values, observed=True).indices.items():
            new, frauds = models[""], fraud[at].sum()
            row = {"rows": f"{len(at):,}", "frauds": f"{frauds:,}", "expected": f"{new.probabilities[at].sum():,.0f}"}
            row["alert rate"] = share(new.flagged[at])
            row["precision"] = share(fraud[at][new.flagged[at]]) if frauds >= FEWEST else "too few"
            for name, model in models.items():
                row["recall" + name] = share(model.flagged[at][fraud[at]]) if frauds >= FEWEST else "too few"
                row["false-positive rate" + name] = share(model.flagged[at][~fraud[at]])
            found[kind, segment] = row
    return pd.DataFrame(found).T


def _cut(values: Any, edges: Any) -> Any:
    parts = pd.cut(values, edges, right=False)
    return parts.cat.rename_categories(lambda part: f"{part.left:,.0f} to {part.right - 1:,.0f}")


def by_period(sample: Sample, probabilities: Floats, rule: Rule) -> pd.DataFrame:
    """Measures by month if times are dates, else by fifth of the rows in order of time."""
    period = np.array([f"fifth {n + 1}" for n in 5 * np.arange(len(sample)) // len(sample)])
    if sample.dated and sample.times is not None:
        period = np.datetime_as_string(sample.times.astype("datetime64[s]"), unit="M")
    flagged, found = rule.flags(probabilities, sample), {}
    for name, at in pd.Series(period).groupby(period).indices.items():
        p, labels = probabilities[at], sample.labels[at]
        precision = average_precision_score(labels, p) if labels.sum() >= FEWEST else np.nan
        found[name] = [len(at), precision, 100 * flagged[at].mean(), p.sum(), labels.sum()]
    columns = ["rows", "average precision", "alert rate, %", "frauds expected", "frauds"]
    return pd.DataFrame.from_dict(found, orient="index", columns=columns).map(short)


def drift(sample: Sample) -> "pd.Series[float]":
    """The population stability index of each field, between the first and the last fifth of the rows.

    It is the sum of both relative entropies; numbers are in tenths of the first fifth.
    """

    def index(values: Any) -> float:
        if values.name != CATEGORY:
            values = np.searchsorted(np.unique(np.quantile(values[:size], np.arange(1, 10) / 10)), values)
        codes, kinds = pd.factorize(values)
        before, after = (np.bincount(part, minlength=len(kinds)) + 0.5 for part in (codes[:size], codes[-size:]))
        return float(entropy(after, before) + entropy(before, after))

    size = len(sample) // 5
    return sample.rows.apply(index).rename("population stability index")


# -- plots -------------------------------------------------------------------------------------------------------------

# Colours that are visible on white and on black. Text and axes take the colour of the page's text.
COLORS = {NEW: "#d9480f", CHAMPION: "#2b7fd4", BASELINE: "#7d858c", WITHOUT_AGE: "#2f9e44"}
STYLE: Any = {"svg.fonttype": "none", "font.size": 9, "savefig.transparent": True, "legend.frameon": False}


def draw_alerts(axes: Any, evidence: Evidence) -> None:
    size, labels = len(evidence.held_out), evidence.held_out.labels
    at = np.unique(np.geomspace(max(size / 10_000, 1), size, 300).astype(int))
    for name in (name for name in evidence.models if name in (NEW, CHAMPION, BASELINE)):
        model, color = evidence.models[name], COLORS[name]
        caught = labels[np.argsort(-model.probabilities, kind="stable")].cumsum()[at - 1] / labels.sum()
        axes.plot(1e5 * at / size, 100 * caught, color=color, label=name)
        axes.plot(1e5 * model.flagged.mean(), 100 * labels[model.flagged].sum() / labels.sum(), "o", color=color)
    axes.set(xscale="log", ylim=(0, 101), xlabel="alerts per 100,000 transactions", ylabel="frauds caught, %")
    axes.legend()


def draw_cost(axes: Any, evidence: Evidence) -> None:
    scores, review = evidence.models[NEW].probabilities, evidence.options.cost_review
    missed = costs_of_missing(evidence.held_out, evidence.options)
    thresholds, costs, _ = cost_curve(scores, missed, review)
    costs, at = 1000 * costs / len(scores), np.linspace(0, len(costs) - 1, 500).astype(int)
    axes.plot(thresholds[at], costs[at], color=COLORS[NEW], label="every threshold")
    axes.plot(thresholds[costs.argmin()], costs.min(), "o", color=COLORS[CHAMPION], label="cheapest, in hindsight")
    axes.axvline(evidence.rules["threshold"].limit, color=COLORS[NEW], linestyle=":", label="rule: threshold")
    paid = cost_of(evidence.rules["expected-cost"].flags(scores, evidence.held_out), missed, review)
    axes.axhline(paid, color=COLORS[WITHOUT_AGE], linestyle="--", label="rule: expected cost")
    axes.set(xscale="log", xlabel="threshold", ylabel="cost per 1,000 transactions", ylim=(0, 1.5 * costs[0]))
    axes.legend()


def draw_bands(axes: Any, evidence: Evidence) -> None:
    table = bands(evidence.models[NEW], evidence.held_out)
    low, actual, high = table[["low", "actual", "high"]].div(table["expected"], axis=0).to_numpy().T
    names = table.index.str.replace(", ", ",\n")
    axes.errorbar(names, actual, (actual - low, high - actual), fmt="o", color=COLORS[NEW])
    axes.axhline(1, color=COLORS[BASELINE], linestyle=":")
    axes.set(ylim=(0, None), ylabel="actual frauds for each expected one")


def draw_effect(axes: Any, evidence: Evidence, name: str) -> None:
    """Draw the partial dependence (Friedman 2001); for numbers also 50 individual curves (Goldstein et al. 2015)."""
    rows = evidence.held_out.evenly(500).rows.astype(dict.fromkeys(NUMBERS, float))
    rows = rows[rows[CATEGORY].isin(rows[CATEGORY].value_counts().index[:15])]
    drawn: Any = {"kind": "average" if name == CATEGORY else "both", "categorical_features": [CATEGORY]}
    drawn |= {"subsample": 50, "random_state": 0, "grid_resolution": 30}
    shown = PartialDependenceDisplay.from_estimator(evidence.pipeline, rows, [name], ax=axes, **drawn)
    shown.axes_[0, 0].set(xlabel=readable(name), ylabel="probability of fraud", ylim=(0, None))


def svg(draw: Any, *given: Any) -> str:
    """An SVG without its opening "<svg ", to which the page adds attributes; black becomes the colour of the text."""
    text = io.StringIO()
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(5, 3.4), layout="constrained")
        draw(figure.subplots(), *given)
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue().partition("<svg ")[2].replace("#000000", "currentColor")


# -- the page ----------------------------------------------------------------------------------------------------------


def page(evidence: Evidence, title: str, verdict: str, checks: list[str], made: dict[str, Any]) -> str:
    """The report: report.html, which calls the functions of this module."""
    folder = FileSystemLoader(Path(__file__).parent)
    template = Environment(loader=folder, autoescape=True, undefined=StrictUndefined).get_template("report.html")
    return template.render(globals(), evidence=evidence, title=title, verdict=verdict, checks=checks, made=made)
