"""The long card: every figure is computed again, by other means, and a group that is judged badly is marked."""

import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import Quarter
from sklearn.metrics import average_precision_score, log_loss, roc_auc_score
from typer.testing import CliRunner

from mlops_course.cli import app
from mlops_course.environment import CourseError
from mlops_course.experiments import TrainingConfig, evaluate_run, load_run_model, scores, train_run
from mlops_course.project import flight_delay
from mlops_course.registry import find_version, register
from mlops_course.security.card import CardError, card_page, group_figures, long_card, version_card, whole_figures


@pytest.fixture(scope="module")
def rows() -> pd.DataFrame:
    """Sixty days; one small airline is later than its scores say."""
    draw = np.random.default_rng(7)
    made = pd.DataFrame({"carrier": draw.choice(["UA", "HA", "EV"], 5000, p=[0.6, 0.05, 0.35])})
    hours = pd.to_timedelta(draw.integers(0, 60 * 24, 5000), unit="h")
    made[flight_delay.time] = pd.Timestamp("2013-11-01", tz="UTC") + hours
    made["score"] = draw.beta(2, 6, 5000)
    made["label"] = (draw.random(5000) < made["score"] + 0.3 * (made["carrier"] == "HA")).astype(float)
    return made


@pytest.fixture(scope="module")
def days(rows: pd.DataFrame) -> np.ndarray:
    return rows[flight_delay.time].dt.date.to_numpy()


def test_the_figures_of_the_whole_are_those_of_scikit_learn(rows: pd.DataFrame, days: np.ndarray) -> None:
    found = whole_figures(rows, rows["score"].to_numpy(), days)
    for name, measure in (("pr_auc", average_precision_score), ("roc_auc", roc_auc_score), ("log_loss", log_loss)):
        assert found.loc[name, "measured"] == pytest.approx(measure(rows["label"], rows["score"]))
        assert found.loc[name, "low"] < found.loc[name, "measured"] < found.loc[name, "high"]


def test_the_figures_of_each_group_are_its_means(rows: pd.DataFrame, days: np.ndarray) -> None:
    found = group_figures(rows, rows["score"].to_numpy(), days, ["carrier"]).set_index("value")
    for name, part in rows.groupby("carrier"):
        line = found.loc[name]
        assert (line["rows"], line["base_rate"]) == (len(part), pytest.approx(part["label"].mean()))
        assert line["gap"] == pytest.approx(part["label"].mean() - part["score"].mean())
        assert line["log_loss"] == pytest.approx(log_loss(part["label"], part["score"]))


def test_an_interval_is_that_of_days_drawn_one_by_one(rows: pd.DataFrame, days: np.ndarray) -> None:
    line = group_figures(rows, rows["score"].to_numpy(), days, ["carrier"]).set_index("value").loc["EV"]
    part = rows[rows["carrier"] == "EV"]
    by_day = (part["label"] - part["score"]).groupby(part[flight_delay.time].dt.date).agg(["sum", "size"])
    draw = np.random.default_rng(1)
    means = [np.divide(*by_day.iloc[draw.integers(0, len(by_day), len(by_day))].sum()) for _ in range(2000)]
    np.testing.assert_allclose([line["low"], line["high"]], np.percentile(means, [2.5, 97.5]), atol=0.006)


def test_the_group_with_wrong_scores_comes_first_and_is_the_only_one_marked(rows: pd.DataFrame) -> None:
    text = long_card("# Model card: flight-delay@3\n", rows, rows["score"].to_numpy(), flight_delay, ["carrier"])
    lines = [line for line in text.splitlines() if line.startswith("| carrier")]
    assert lines[0].startswith("| carrier | HA |")
    assert [line.endswith("* |") for line in lines] == [True, False, False]


def test_every_figure_on_the_card_is_one_that_was_measured(rows: pd.DataFrame, days: np.ndarray) -> None:
    score = rows["score"].to_numpy()
    text = long_card("# Model card: flight-delay@3\n", rows, score, flight_delay, ["carrier"])
    assert text.startswith("# Model card: flight-delay@3\n") and "5,000 rows of 60 days" in text
    whole, groups = whole_figures(rows, score, days), group_figures(rows, score, days, ["carrier"])
    for name, line in whole.iterrows():
        assert f"| {name} | {line['measured']:.4f} | {line['low']:.4f} to {line['high']:.4f} |" in text
    for line in groups.itertuples():
        shown = re.search(rf"\| {line.value} \| ([\d,]+) \| ([\d.]+) \| ([\d.]+) \| ([+-][\d.]+) \|", text)
        assert shown is not None
        figures = [float(each.replace(",", "")) for each in shown.groups()]
        assert figures == pytest.approx([line.rows, line.base_rate, line.mean_score, line.gap], abs=6e-4)


def test_a_missing_value_makes_no_group(rows: pd.DataFrame, days: np.ndarray) -> None:
    odd = rows.assign(carrier=["F9", None, *rows["carrier"][2:]])
    found = group_figures(odd, rows["score"].to_numpy(), days, ["carrier"]).set_index("value")
    assert found.loc["F9", "rows"] == 1
    assert found["rows"].sum() == len(rows) - 1


def test_nobody_can_put_code_into_the_page() -> None:
    bad = ["<script>alert(1)</script>", "| a |\n|---|\n| <img src=x onerror=alert(1)> |", "[x](javascript:alert(1))"]
    page = card_page("\n\n".join(["# A", *bad, ""]))
    assert "<script>" not in page and "<img" not in page and 'href="javascript' not in page
    assert "<table>" in page and page.startswith("<!doctype html>")


@pytest.mark.parametrize(("number", "of_days"), [(99, 60), (5000, 9), (500, 1), (1, 1)])
def test_a_group_of_few_rows_or_days_has_no_interval_and_no_mark(
    rows: pd.DataFrame, days: np.ndarray, number: int, of_days: int
) -> None:
    small = np.flatnonzero(np.isin(days, np.unique(days)[:of_days]))[:number]
    named = rows.assign(carrier=np.where(np.isin(np.arange(len(rows)), small), "small", "UA"))
    score = np.where(named["carrier"] == "small", 0.01, rows["score"])
    line = group_figures(named, score, days, ["carrier"]).set_index("value").loc["small"]
    assert np.isnan(line["low"]) and np.isnan(line["high"]) and line["rows"] == len(small)
    text = long_card("# Model card: flight-delay@3\n", named, score, flight_delay, ["carrier"])
    (shown,) = [line for line in text.splitlines() if line.startswith("| carrier | small |")]
    assert shown.endswith("| too few |") and "nan" not in text


# ---------------------------------------------------------------- the card of a registered version


@pytest.fixture(scope="module")
def tested(quarter: Quarter, tmp_path_factory: pytest.TempPathFactory) -> Quarter:
    """A workspace with a version that was trained on January and tested on February, and one that nobody tested."""
    own = quarter.fresh(tmp_path_factory.mktemp("tested") / "workspace")
    for seed, month in ((1, "2013-02"), (2, "")):
        config = TrainingConfig(20, leaf_samples=50, seed=seed)
        run = train_run(own.settings, flight_delay, own.features, own.rows, "2013-01", "2013-01", config)
        if month:
            evaluate_run(own.settings, flight_delay, run, month, month)
        register(own.settings, flight_delay, run, by="ann")
    return own


def test_each_figure_on_the_card_of_a_version_is_measured_again(tested: Quarter) -> None:
    text = version_card(tested.settings, flight_delay, "flight-delay@1")
    rows = tested.labelled("2013-02")
    run = str(find_version(tested.settings, flight_delay, "flight-delay@1").run_id)
    score = scores(load_run_model(tested.settings, flight_delay, run), rows)
    label = rows["label"].to_numpy()
    whole = dict(re.findall(r"^\| (pr_auc|roc_auc|log_loss) \| ([\d.]+) \| [\d.]+ to ", text, re.MULTILINE))
    assert float(whole["roc_auc"]) == pytest.approx(roc_auc_score(label, score), abs=6e-5)
    assert float(whole["pr_auc"]) == pytest.approx(average_precision_score(label, score), abs=6e-5)
    assert float(whole["log_loss"]) == pytest.approx(log_loss(label, score), abs=6e-5)
    line = r"^\| (\w+) \| (\S+) \| ([\d,]+) \| ([\d.]+) \| ([\d.]+) \| ([-+][\d.]+) \| (.+) \|$"
    said = re.findall(line, text, re.MULTILINE)
    assert {column for column, *_ in said} == {*flight_delay.slices}
    for column, value, number, share, mean, gap, _ in said:
        inside = rows[column].astype(str) == value
        assert int(number.replace(",", "")) == inside.sum()
        found = (label[inside].mean(), score[inside].mean(), (label - score)[inside].mean())
        assert [float(each) for each in (share, mean, gap)] == pytest.approx(found, abs=6e-4)
    days = rows[flight_delay.time].dt.date.nunique()
    assert f"{len(rows):,} rows of {days} days" in text and text.startswith("# ")


def test_a_version_that_was_never_tested_has_no_card(tested: Quarter) -> None:
    with pytest.raises(CardError, match="was never tested"):
        version_card(tested.settings, flight_delay, "flight-delay@2")
    with pytest.raises(CourseError, match="flight-delay@9"):
        version_card(tested.settings, flight_delay, "flight-delay@9")


def test_the_command_writes_the_card_as_text_and_as_a_page(tested: Quarter, tmp_path: Path) -> None:
    words = ["models", "card", "flight-delay@1", "--home", str(tested.settings.home)]
    plain = CliRunner().invoke(app, words)
    assert plain.exit_code == 0 and "## Groups" in plain.stdout
    told = json.loads(CliRunner().invoke(app, [*words, "--output", str(tmp_path / "card.html"), "--json"]).stdout)
    page = Path(told["file"]).read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>") and "<h2>Groups</h2>" in page
    shown = json.loads(CliRunner().invoke(app, [*words, "--html", "--json"]).stdout)
    assert shown == {"card": "flight-delay@1", "format": "html", "text": page}
