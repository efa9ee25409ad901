"""How good a model is: measures checked by hand, and a report as a reader finds it, in a browser and on paper."""

import base64
import html
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from selenium import webdriver
from sklearn.metrics import average_precision_score

import data
import report
import train
from conftest import few_resamples
from data import Sample
from model import CATEGORY
from report import CHAMPION, NEW, WITHOUT_AGE, Evidence, Rule, Scored

SAMPLE = data.generate(12_000, seed=4)
OPTIONS = SimpleNamespace(cost_missed=None, cost_review=5.0)
MADE = {
    "command": "python train.py --data a&b.csv",
    "git_commit": "abc",
    "data_sha256": "0" * 64,
    "pandas_version": "3",
    "MLflow_run": "http://mlflow/#/7",
}

# -- measures ----------------------------------------------------------------------------------------------------------


def test_measures() -> None:
    """Figures small enough to check by hand; those that scikit-learn has are scikit-learn's."""
    labels, probabilities = np.array([1, 0, 1, 0, 0]), np.array([0.9, 0.6, 0.4, 0.2, 0.1])
    missed = labels * np.array([50.0, 3.0, 40.0, 2.0, 1.0])
    found = report.measures(labels, probabilities, probabilities >= 0.5, missed, review=5.0)
    assert found == pytest.approx(
        {
            "average_precision": 0.5 * 1 + 0.5 * 2 / 3,
            "roc_auc": 5 / 6,
            "log_loss": -np.log([0.9, 0.8, 0.4, 0.4, 0.9]).mean(),
            "brier_score": np.square([0.1, 0.2, 0.6, 0.6, 0.1]).mean(),
            "recall": 0.5,
            "precision": 0.5,
            "alert_rate": 0.4,
            "recall_at_0.1_percent": 0,
            "recall_at_1_percent": 0,
            "recall_at_5_percent": 0,
            "cost": 1000 * (40 + 2 * 5) / 5,
            "cost_of_flagging_nothing": 1000 * 90 / 5,
        }
    )
    many = [np.repeat(each, 100) for each in (labels, probabilities, probabilities >= 0.5, missed)]
    assert report.measures(*many, 5.0)["recall_at_5_percent"] == 25 / 200


def test_rules() -> None:
    """By threshold the amount does not matter; by expected cost probability × amount decides; 1 is always flagged."""
    rows = Sample(pd.DataFrame({"amount": [0.0, 4.0, 10.0, 1000.0, 1000.0]}), np.zeros(5))
    probabilities = np.array([1.0, 1.0, 0.5, 0.005, 0.0049])
    assert Rule("threshold", 0.5).flags(probabilities, rows).tolist() == [True, True, True, False, False]
    assert Rule("review_cost", 5.0).flags(probabilities, rows).tolist() == [True, True, True, True, False]


def test_intervals() -> None:
    """Resamples are of the hold-out, the same for all models, and as wide as chance: mean of labels ± its error."""
    few = SAMPLE.take(np.arange(3000))
    models = [Scored(name, few.truth, np.ones(3000, bool)) for name in ("one", "two")]
    found = report.bootstrap(models, few, OPTIONS, resamples=100)
    one = found["one"]
    assert one.equals(found["two"])
    assert len(one) == 101
    share, error = few.labels.mean(), np.sqrt(few.labels.mean() / 3000)
    assert one["precision"][0] == share
    assert one["precision"][1:].std() == pytest.approx(error, rel=0.25)
    assert one["precision"][1:].mean() == pytest.approx(share, abs=0.5 * error)
    assert one["average_precision"][0] == average_precision_score(few.labels, few.truth)


def test_bands() -> None:
    """Item 8: what is flagged, in thirds of as many expected frauds, and the rest; true probabilities are inside."""
    sample = data.generate(100_000, seed=8)
    flagged = sample.truth >= 0.02
    table = report.bands(Scored(NEW, sample.truth, flagged), sample)
    assert [*table.index] == ["not flagged", "flagged, lowest third", "flagged, middle third", "flagged, highest third"]
    assert table["rows"].sum() == 100_000
    assert table["rows"].iloc[0] == (~flagged).sum()
    assert table["actual"].sum() == sample.labels.sum()
    assert table["expected"].iloc[1:].to_numpy() == pytest.approx(sample.truth[flagged].sum() / 3, rel=0.02)
    assert (table["low"] < table["expected"]).all()
    assert (table["expected"] < table["high"]).all()
    assert (table["factor"] == 1).all()
    wrong = report.bands(Scored(NEW, np.where(flagged, sample.truth / 2, sample.truth), flagged), sample)["factor"]
    assert wrong.iloc[0] == 1
    assert (wrong.iloc[1:] > 1.25).all()


def test_for_the_business() -> None:
    """Item 10: alerts, frauds, money and false alerts, for 100,000 transactions, and what changes."""
    names = ["alert_rate", "precision", "cost", "cost_of_flagging_nothing"]
    found = report.business(
        {
            NEW: pd.DataFrame([[0.01, 0.5, 300, 900]], columns=names),
            CHAMPION: pd.DataFrame([[0.02, 0.2, 400, 900]], columns=names),
        }
    )
    assert found.to_dict("split") == {
        "index": [
            "Alerts",
            "Frauds caught",
            "Money saved, against flagging nothing",
            "False alerts per 10 frauds caught",
        ],
        "columns": [CHAMPION, NEW, "change"],
        "data": [
            ["2,000", "1,000", "-1,000"],
            ["400", "500", "+100"],
            ["50,000", "60,000", "+10,000"],
            ["40", "10", "-30"],
        ],
    }


# -- the report --------------------------------------------------------------------------------------------------------


def measured(sample: Sample) -> Evidence:
    card = ("--owner", "Risk <1>", "--purpose", "rank transfers")
    options = train.arguments(["--trees", "10", "--budget", "1", *card])
    training, held_out, _ = data.split(sample, 0.4)
    with few_resamples():
        return train.evaluate(options, sample, training, held_out, None)


@pytest.fixture(scope="module")
def of() -> Evidence:
    """Of rows in no order of time; one category is only among those held out."""
    sample = data.generate(20_000, seed=4)
    held_out = data.split(sample, 0.4)[1].rows.index
    rows = sample.rows.astype({CATEGORY: object})
    rows.loc[held_out[:300], CATEGORY] = "lottery"
    held = np.isin(np.arange(20_000), held_out)
    found = measured(sample)
    return data.replace(
        found,
        held_out=Sample(rows[held], sample.labels[held], notes=()),
        sample=data.replace(sample, notes=("WARNING: <b>",)),
    )


@pytest.fixture(scope="module")
def dated() -> Evidence:
    """Of four months, in the last of which amounts are ten times as large; the champion is the same model."""
    sample = data.generate(20_000, seed=4)
    rows = sample.rows.copy()
    rows.loc[18_000:, "amount"] *= 10
    times = (
        pd.date_range("2026-01-01", "2026-04-30", periods=20_000)
        .astype("datetime64[s]")
        .astype("int64")
        .to_numpy(float)
    )
    found = measured(data.replace(sample, rows=rows, times=times, dated=True))
    champion = data.replace(found.models[NEW], name=CHAMPION)
    return data.replace(
        found, models=found.models | {CHAMPION: champion}, rounds=found.rounds | {CHAMPION: found.rounds[NEW]}
    )


def paper(of: Evidence) -> str:
    return report.page(of, "fraud <7>", "Promoted: it is good", ["calibrated", "NOT cheap"], MADE)


@pytest.fixture(scope="module")
def page(of: Evidence) -> str:
    return paper(of)


@pytest.fixture(scope="module")
def dated_page(dated: Evidence) -> str:
    return paper(dated)


def tables(page: str) -> dict[str, pd.DataFrame]:
    """The tables of a report by their captions."""
    found = {}
    for part in re.findall(r"<table>.*?</table>", page.replace("&nbsp;", " "), re.S):
        [caption] = re.findall("<caption>(.*?)</caption>", part)
        rows = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.S) for row in re.findall("<tr.*?</tr>", part, re.S)]
        [head, *body] = [[html.unescape(cell) for cell in row] for row in rows]
        found[caption] = pd.DataFrame(body, columns=[""] * (len(body[0]) - len(head)) + head)
    return found


def test_what_can_be_seen_first(page: str) -> None:
    """Item 10: verdict, what was checked, warnings, business, measures and the plot, before anything else."""
    first = page[page.index("<header>") : page.index("<h2>")]
    parts = [
        "fraud &lt;7&gt;",
        "Promoted: it is good",
        "<li>NOT cheap</li>",
        "WARNING: &lt;b&gt;",
        "For 100,000 transactions a day",
    ]
    parts += ["Average precision", "Frauds caught by alerts"]
    assert sorted(parts, key=first.index) == parts
    assert first.count("<svg ") == 1


def test_champion_and_challenger_are_side_by_side(dated_page: str) -> None:
    found = tables(dated_page)
    assert [*found["For 100,000 transactions a day"]] == ["", CHAMPION, NEW, "change"]
    assert {*found["For 100,000 transactions a day"]["change"]} == {"+0"}
    assert [*found["Measures on the rows held out"]][:3] == ["", NEW, "logistic regression"]


def test_card(of: Evidence, page: str) -> None:
    """Item 11: who answers, for what, for what not, data, labels, limits; command, commit, hash and versions."""
    facts = dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", page, re.S))
    assert facts["Owner"] == "Risk &lt;1&gt;"
    assert facts["Approver"] == "not named"
    assert facts["Purpose"] == "rank transfers"
    assert facts["Data period"] == "unknown, as no --time-column was given"
    fraud = f"{len(of.held_out):,}, of them {of.held_out.labels.sum():,} fraud"
    assert facts["Rows compared"] == f"{fraud}; held out, and unseen by every version that is compared"
    assert "One input to, not the whole of, transaction monitoring" in facts["Intended use"]
    assert {"Purpose", "Data", "Training rows", "Not intended", "Labels", "Limits"} <= {*facts}
    made = {"Command": "python train.py --data a&amp;b.csv", "Git commit": "abc", "SHA-256 of the data": "0" * 64}
    assert (made | {"Pandas version": "3"}).items() <= facts.items()
    assert re.fullmatch('<a href="http://mlflow/#/7" [^>]+>http://mlflow/#/7</a>', facts["MLflow run"])


def test_decisions(of: Evidence, page: str) -> None:
    """Item 13: what both rules do, as confusion matrices with their costs; the one in force is named."""
    found = tables(page)["Both rules on the rows held out"]
    assert [*found.iloc[:, 0]] == [
        "threshold, in force",
        "expected-cost",
        "cheapest threshold, in hindsight",
        "flag nothing",
    ]
    counts = found.iloc[:, 2:6].map(lambda text: int(text.replace(",", "")))
    assert (counts.sum(axis=1) == len(of.held_out)).all()
    assert (counts.iloc[:, :2].sum(axis=1) == of.held_out.labels.sum()).all()
    costs = [float(text.replace(",", "")) for text in found["cost per 1,000"]]
    assert costs[2] <= costs[0] < costs[3]
    assert costs[0] == pytest.approx(of.rounds[NEW]["cost"][0], abs=0.6)
    for text in ("rule: threshold", "rule: expected cost", "cheapest, in hindsight", "Cost of every threshold"):
        assert text in page


def test_segments(of: Evidence, page: str) -> None:
    """Item 12: by age, amount, hour, category and new categories, with intervals; without the age beside it."""
    found = tables(page)["Segments of the rows held out"]
    kinds = found.iloc[:, 0]
    assert [*dict.fromkeys(kinds)] == ["Age", "Amount", "Hour", "Category", "New category"]
    assert [*found[kinds == "Hour"].iloc[:, 1]] == ["0 to 5", "6 to 11", "12 to 17", "18 to 23"]
    assert [*found[kinds == "Age"].iloc[:, 1]] == ["0 to 24", "25 to 34", "35 to 49", "50 to 64", "65 to 130"]
    assert found[kinds == "New category"].iloc[:, 1:3].to_numpy().tolist() == [
        ["no", f"{len(of.held_out) - 300:,}"],
        ["yes", "300"],
    ]
    for kind in dict.fromkeys(kinds):
        assert found["rows"][kinds == kind].str.replace(",", "").astype(int).sum() == len(of.held_out)
    night = (of.held_out.rows["hour"] < 6).to_numpy()
    frauds, flagged = of.held_out.labels[night] == 1, of.models[NEW].flagged[night]
    row = found[kinds == "Hour"].iloc[0]
    assert row["alert rate"].startswith(f"{100 * flagged.mean():.3g} % [")
    if frauds.sum() >= report.FEWEST:
        assert row["recall"].startswith(f"{100 * flagged[frauds].mean():.3g} % [")
    few = found["frauds"].str.replace(",", "").astype(int) < report.FEWEST
    assert (found["recall"] == "too few").equals(few)
    assert (found["recall without age"] == "too few").equals(few)
    assert not (found["false-positive rate"] == "too few").any()
    assert few.any()
    assert not few.all()
    ageless = of.models[WITHOUT_AGE]
    assert ageless.flagged.mean() <= of.models[NEW].flagged.mean() + 1e-9


def test_without_age_means_without_it(of: Evidence) -> None:
    """Item 12: the model beside it gives the same probability at every age."""
    _, others = train.fit(of.training, of.options)
    rows = of.held_out.rows.head(200)
    one, other = (others[WITHOUT_AGE].predict_proba(rows.assign(user_age=age)) for age in (20, 80))
    np.testing.assert_array_equal(one, other)


def test_effects(page: str) -> None:
    """Item 13: a plot for each field, by names that can be read, with units."""
    effects = page[page.index("<h2>Effects") : page.index("<h2>Stability")]
    titles = ["Amount", "Category", "Hour of the day", "Day of the week (0 is Monday)", "Age of the user, years"]
    assert re.findall("<h3>(.*?)</h3>", effects) == [*titles, "Account balance"]
    assert effects.count(">probability of fraud<") == 6
    assert "user_age" not in effects


def test_stability(page: str, dated_page: str) -> None:
    """Item 7: month by month, and each field's drift; else it says that nothing is known."""
    assert "Stability over time is unknown: the rows were not held out by time." in page
    assert "is unknown" not in dated_page
    found = tables(dated_page)
    months = found["Training rows, scored by models fitted to earlier ones"]
    assert [*months] == ["", "rows", "average precision", "alert rate, %", "frauds expected", "frauds"]
    assert [*months.iloc[:, 0]] == ["2026-01", "2026-02", "2026-03"]
    assert [*found["Rows held out"].iloc[:, 0]] == ["2026-03", "2026-04"]
    drift = found["Change from the first to the last fifth of the rows"]
    indexes = dict(zip(drift.iloc[:, 0], drift.iloc[:, 1].astype(float), strict=True))
    assert max(indexes, key=indexes.get) == "Amount"
    assert indexes["Amount"] > 0.25


def test_fifths_where_there_are_no_dates() -> None:
    found = report.by_period(SAMPLE, SAMPLE.truth, Rule("threshold", 0.5))
    assert [*found.index] == [f"fifth {number}" for number in range(1, 6)]
    assert {*found["rows"]} == {"2,400"}


def test_drift() -> None:
    """Item 7: the stability index of a field that stays is next to 0, of one that moves it is large."""
    rows = SAMPLE.rows.copy()
    rows.loc[9600:, "amount"] *= 3
    rows.loc[9600:, CATEGORY] = "new"
    found = report.drift(Sample(rows, SAMPLE.labels))
    assert {name for name, index in found.items() if index > 0.25} == {"amount", CATEGORY}
    assert max(index for name, index in found.items() if name not in ("amount", CATEGORY)) < 0.02


# -- in a browser ------------------------------------------------------------------------------------------------------


def test_nothing_is_fetched(page: str, dated_page: str) -> None:
    """Item 14: no external resource; every plot is described; nothing is black on black."""
    for text in (page, dated_page):
        assert not re.findall(r"""(?:src|link [^>]*href|url)[=(](?!["']?(?:data:|#))""", text)
        assert "@import" not in text
        assert text.count("<svg ") == text.count('<svg role="img" aria-label="') == 9
        assert not re.findall("#000000|: black", text)


@pytest.fixture(scope="module")
def browser() -> Iterator[webdriver.Chrome]:
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("no chromium and chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for word in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(word)
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()


WIDER = "return [...document.querySelectorAll(%r)].filter(e => e.getBoundingClientRect().right > innerWidth + 1).length"
COLORS = """const of = (tag, name) => getComputedStyle(document.querySelector(tag))[name];
return [of('body', 'backgroundColor'), of('body', 'color'), of('svg text', 'fill')]"""


def emulate(browser: webdriver.Chrome, width: int, media: str, scheme: str) -> None:
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": features})


def test_light_dark_phone_and_paper(browser: webdriver.Chrome, dated_page: str, tmp_path: Path) -> None:
    """Item 14: plots take the colours of the page; a phone scrolls tables only; paper is white and cuts nothing."""
    (tmp_path / "report.html").write_text(dated_page)
    browser.get(f"file://{tmp_path}/report.html")
    white, black = "rgb(255, 255, 255)", "rgb(0, 0, 0)"
    emulate(browser, 1280, "screen", "light")
    light = browser.execute_script(COLORS)
    emulate(browser, 1280, "screen", "dark")
    dark = browser.execute_script(COLORS)
    assert light[0] == white != dark[0]
    assert light[1] == light[2] != dark[1] == dark[2]
    emulate(browser, 360, "screen", "light")
    assert browser.execute_script("return document.documentElement.scrollWidth") == 360
    assert browser.execute_script(WIDER % "p, dd, svg, h2, .wide") == 0
    emulate(browser, 690, "print", "dark")
    assert browser.execute_script(COLORS) == [white, black, black]
    assert browser.execute_script(WIDER % "p, dd, svg, table") == 0
    assert base64.b64decode(browser.print_page()).startswith(b"%PDF")
    assert not browser.get_log("browser")
