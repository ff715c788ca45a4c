"""Drift is seen where it is and not where it is normal, days are New York's, and the report is one file of its own."""

import json
import math
import threading
from dataclasses import replace
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import pytest
from conftest import Quarter
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from mlops_course.commands.monitor import monitor_commands
from mlops_course.data import feature_names, read_table, replace_months
from mlops_course.environment import WorkspaceError
from mlops_course.experiments import TrainingConfig, evaluate_run, measure, train_run
from mlops_course.monitoring import (
    ALARM,
    MonitoringError,
    MonthReport,
    bin_codes,
    bin_edges,
    column_drift,
    drift,
    join_outcomes,
    monitor_month,
    performance,
    stability_index,
    write_report,
)
from mlops_course.project import flight_delay
from mlops_course.registry import register, score_month

matplotlib.use("agg")
pytestmark = pytest.mark.filterwarnings("ignore:Series.values returning:DeprecationWarning")  # inside pyarrow

JANUARY, FEBRUARY, MARCH = "2013-01", "2013-02", "2013-03"
QUICK = TrainingConfig(iterations=5, leaf_samples=50)


def numbers(*values: float | None) -> pd.Series:
    return pd.Series(values, dtype="float32")


def naive_psi(reference: pd.Series, current: pd.Series) -> float:
    """What one finds everywhere: ten quantile bins, zeros and gaps like any other value."""
    edges = np.unique(np.nanquantile(reference, np.linspace(0, 1, 11)[1:-1]))
    then, now = (np.bincount(np.searchsorted(edges, part, side="right"), minlength=11) for part in (reference, current))
    return stability_index(then, now)


# ---------------------------------------------------------------- the index


def test_the_index_by_hand() -> None:
    # (0.25 - 0.5) ln(0.25 / 0.5) + (0.75 - 0.5) ln(0.75 / 0.5) = 0.173287 + 0.101366
    assert stability_index(np.array([50, 50]), np.array([1, 3])) == pytest.approx(0.274653, abs=1e-6)
    # an empty bin counts as 1e-4: 2 (0.9999 ln 10000)
    assert stability_index(np.array([7, 0]), np.array([0, 9])) == pytest.approx(18.418838, abs=1e-6)
    assert stability_index(np.array([0, 0]), np.array([0, 0])) == 0.0


counts = st.lists(st.integers(0, 10_000), min_size=3, max_size=3)


@given(counts, counts, st.integers(2, 50))
def test_the_index_is_zero_for_equal_shares_and_the_same_in_both_directions(
    then: list[int], now: list[int], times: int
) -> None:
    left, right = np.array(then), np.array(now)
    index = stability_index(left, right)
    assert index >= 0
    assert index == pytest.approx(stability_index(right, left), abs=1e-12)
    assert stability_index(left, left * times) == pytest.approx(0, abs=1e-12)


def test_bins_end_at_the_quantiles_of_what_is_there_and_is_not_zero() -> None:
    column = np.array([0] * 500 + [math.nan] * 300 + list(range(1, 101)), dtype=np.float32)
    edges = bin_edges(column)
    assert edges.tolist() == pytest.approx(np.quantile(np.arange(1, 101), np.linspace(0.1, 0.9, 9)))
    codes = bin_codes(np.array([-5, 1, 100, 1e9, 0, math.nan], dtype=np.float32), edges)
    assert codes.tolist() == [0, 0, 9, 9, 10, 11]
    assert np.bincount(bin_codes(column, edges), minlength=12).tolist() == [10] * 10 + [500, 300]


# ---------------------------------------------------------------- one column


def test_rain_that_becomes_more_frequent_is_seen_although_most_hours_are_dry() -> None:
    random = np.random.default_rng(0)

    def rain(share: float) -> pd.Series:
        wet = random.random(20_000) < share
        return pd.Series(np.where(wet, random.exponential(0.1, 20_000), 0), dtype="float32")

    before = rain(0.05)
    assert column_drift(before, rain(0.05)) < 0.01
    assert naive_psi(before, rain(0.09)) < column_drift(before, rain(0.09)) / 2 < ALARM
    assert column_drift(before, rain(0.25)) > ALARM


@pytest.mark.parametrize(
    ("then", "now", "moved"),
    [
        ([math.nan] * 5, [math.nan] * 9, False),
        ([math.nan] * 5, [1.0] * 5, True),
        ([1.0, 2.0, 3.0, 4.0], [math.nan] * 4, True),
        ([1.0, math.nan] * 10, [1.0, math.nan, 1.0, 1.0] * 5, True),
        ([0.0] * 5, [0.0] * 7, False),
        ([0.0] * 5, [3.0] * 5, True),
        ([4.0] * 5, [4.0] * 6, False),
        ([4.0] * 5, [3.0] * 5, True),
        ([4.0] * 5, [0.0] * 5, True),
    ],
)
def test_columns_without_much_in_them(then: list[float], now: list[float], moved: bool) -> None:
    found = column_drift(numbers(*then), numbers(*now))
    assert math.isfinite(found)
    assert (found > ALARM) is moved
    assert moved or found == 0


@pytest.mark.parametrize(
    ("now", "moved"),
    [
        (["AA", "UA", None], False),
        (["AA", "UA", "UA", "AA", None, None], False),
        (["AA", "ZZ", None], True),
        (["AA", "AA", None], True),
        (["AA", "UA", "UA"], True),
    ],
)
@pytest.mark.parametrize("kind", ["str", "object", "category"])
def test_each_text_is_a_bin_of_its_own(now: list[str | None], moved: bool, kind: str) -> None:
    then = pd.Series(["UA", "AA", None] * 10, dtype=kind)
    found = column_drift(then, pd.Series(now * 10, dtype=kind))
    assert (found > ALARM) is moved
    assert moved or found == pytest.approx(0, abs=1e-12)


# ---------------------------------------------------------------- all columns


def months_of(**columns: list[float]) -> pd.DataFrame:
    """A hundred rows in each of as many months as there are values: each value is the mean of its month."""
    random = np.random.default_rng(4)
    number = len(next(iter(columns.values())))
    frame = pd.DataFrame({"period": np.repeat([f"2013-{month:02d}" for month in range(1, number + 1)], 400)})
    for name, means in columns.items():
        frame[name] = (np.repeat(means, 400) + random.normal(0, 1, 400 * number)).astype(np.float32)
    return frame


def test_an_alarm_needs_a_large_shift_that_is_larger_than_what_was_normal() -> None:
    then = months_of(steady=[9, 9, 9], restless=[8, 9, 10], nearly=[9, 9, 9])
    now = months_of(steady=[11], restless=[9.8], nearly=[9.2])
    table = drift(then, now, ["steady", "restless", "nearly"])
    assert table["alarm"].to_dict() == {"steady": True, "restless": False, "nearly": False}
    assert table.loc["steady", "psi"] > ALARM > table.loc["steady", "floor"]
    assert table.loc["restless", "floor"] > table.loc["restless", "psi"] > ALARM, "large, but it has always moved so"
    assert ALARM > table.loc["nearly", "psi"] > table.loc["nearly", "floor"], "more than normal, but small"
    assert table["psi"].is_monotonic_decreasing
    assert drift(then, months_of(restless=[13]), ["restless"])["alarm"].all(), "too much even for the restless one"


def test_one_month_of_training_has_no_floor() -> None:
    then, now = months_of(steady=[9]), months_of(steady=[9])
    table = drift(then, now.assign(steady=now["steady"] + 3), ["steady"])
    assert table.loc["steady", "floor"] == 0
    assert table.loc["steady", "alarm"]
    assert not drift(then, then, ["steady"])["alarm"].any()


def test_the_floor_is_the_largest_distance_between_months_without_the_oddest() -> None:
    then = pd.DataFrame(
        {"period": ["a"] * 4 + ["b"] * 4 + ["c"] * 4, "kind": list("xxyy") + list("xxyy") + list("xyyy")}
    )
    table = drift(then, then, ["kind"])
    assert table.loc["kind", "floor"] == 0.0, "c is the oddest, and without it a and b are alike"
    pair = drift(then[then["period"] != "a"], then, ["kind"])
    assert pair.loc["kind", "floor"] == stability_index(np.array([1, 3]), np.array([2, 2])), "of two, neither is odd"
    assert table.loc["kind", "psi"] == 0


@pytest.mark.parametrize("left", [0, 3])
@pytest.mark.parametrize("text", [False, True])
def test_months_without_values_do_not_switch_an_alarm_off(left: int, text: bool) -> None:
    then, now = months_of(steady=[9] * 6), months_of(steady=[13])
    if text:
        then["steady"], now["steady"] = (
            pd.Series(np.where(each["steady"] > 11, "high", "low"), dtype="str") for each in (then, now)
        )
    usual = drift(then, now, ["steady"]).loc["steady"]
    silent = then["period"].isin(["2013-02", "2013-05"]) & (then.groupby("period").cumcount() >= left)
    found = drift(then.assign(steady=then["steady"].mask(silent)), now, ["steady"]).loc["steady"]
    assert usual["alarm"] and found["alarm"]
    assert max(found["floor"], found["floor_values"]) < 0.1
    empty = drift(then, now.assign(steady=now["steady"].mask(now.index >= left)), ["steady"])
    assert empty["alarm"].all(), "and a month without values is no month like the others"


def test_rows_of_the_past_must_say_their_month() -> None:
    then = months_of(steady=[9, 9])
    with pytest.raises(MonitoringError, match="1 of the 800 rows of the training say no month"):
        drift(then.assign(period=then["period"].mask(then.index == 5)), then, ["steady"])
    with pytest.raises(MonitoringError, match="the rows of the training say no month"):
        drift(then[["steady"]], then, ["steady"], period="period")


def test_one_bad_month_does_not_make_everything_normal() -> None:
    bad = months_of(steady=[9, 9, 9, 30, 9])
    table = drift(bad, months_of(steady=[12]), ["steady"])
    assert table.loc["steady", "floor"] < 0.05 < ALARM < table.loc["steady", "psi"]
    assert table.loc["steady", "alarm"]


@pytest.mark.parametrize("spike", [1.0, 0.9, 0.6, 0.3, 0.12])
@pytest.mark.parametrize("move", [0.5, -0.5, 1e-3, -1e-3, 1000.0], ids=str)
def test_a_spike_that_moves_is_seen_in_whatever_direction(spike: float, move: float) -> None:
    """A column with one value that many rows share: a constant, when all of them do."""
    random = np.random.default_rng(6)
    rest = random.normal(4, 1, 9000)
    values = np.where(random.random(9000) < spike, 4, rest).astype("float32")
    then = pd.DataFrame({"period": np.repeat(["a", "b", "c"], 3000), "x": values})
    now = then.assign(x=then["x"].where(then["x"] != 4, np.float32(4 + move)))
    row = drift(then, now, ["x"]).loc["x"]
    assert row["alarm"] and row["judged"]
    assert not drift(then, then.sample(frac=0.5, random_state=1), ["x"]).loc["x", "alarm"]


@pytest.mark.parametrize("factor", [25.4, 0.1, 3.0])
@pytest.mark.parametrize("gaps", [0.0, math.nan], ids=["zeros", "missing"])
def test_another_unit_of_a_column_with_many_gaps_is_seen(factor: float, gaps: float) -> None:
    """Rain in another unit, in the three hours of a hundred that have any."""
    random = np.random.default_rng(7)

    def rain(number: int) -> pd.DataFrame:
        wet = random.random(number) < 0.03
        frame = pd.DataFrame({"period": np.repeat(["a", "b", "c"], number // 3)})
        return frame.assign(rain=np.where(wet, random.exponential(0.1, number), gaps).astype("float32"))

    then, now = rain(60_000), rain(30_000)
    calm = drift(then, now, ["rain"]).loc["rain"]
    assert not calm["alarm"]
    moved = drift(then, now.assign(rain=now["rain"] * np.float32(factor)), ["rain"]).loc["rain"]
    assert moved["alarm"] and moved["psi_values"] > ALARM
    assert column_drift(then["rain"], now["rain"] * np.float32(3)) < ALARM, "as a whole it moves too little"


@pytest.mark.parametrize("rows", [1, 10, 30, 100, 300, 1000, 3000])
def test_what_has_not_changed_is_no_alarm_however_few_rows_there_are(rows: int) -> None:
    random = np.random.default_rng(8)
    number = 20_000
    frame = pd.DataFrame({"period": np.repeat(list("abcd"), number // 4)})
    for kind in range(5):
        frame[f"normal {kind}"] = random.normal(0, 1, number).astype("float32")
        frame[f"rare {kind}"] = np.where(random.random(number) < 0.1, 1, 0).astype("float32")
        frame[f"text {kind}"] = random.choice(list("ABCDEFGHIJ"), number)
    names = list(frame.columns[1:])
    alarms, judged = 0, 0
    for _ in range(20):
        table = drift(frame, frame.sample(rows, random_state=int(random.integers(2**31))), names)
        alarms, judged = alarms + int(table["alarm"].sum()), judged + int(table["judged"].sum())
    assert alarms == 0
    assert judged == 0 if rows <= 10 else judged == 20 * len(names) if rows >= 300 else True


def test_a_report_says_what_cannot_be_judged(tmp_path: Path) -> None:
    then = months_of(steady=[9, 9, 9], shaky=[9, 9, 9])
    report = MonthReport(MARCH, "x@1", drift(then, then.head(8), ["steady", "shaky"]), pd.DataFrame(), math.nan)
    page = write_report(report, tmp_path / "report.html").read_text()
    assert "An alarm for 0 of 2 features. 2 can't be judged: the month has too few rows." in page


def test_missing_values_are_counted_before_and_now() -> None:
    then = months_of(steady=[9, 9])
    now = then.copy()
    now.loc[:199, "steady"] = np.nan
    row = drift(then, now, ["steady"]).loc["steady"]
    assert (row["missing_then"], row["missing_now"]) == (0.0, 0.25)


def test_nothing_cannot_be_compared() -> None:
    then = months_of(steady=[9])
    for one, other in ((then, then.iloc[:0]), (then.iloc[:0], then)):
        with pytest.raises(MonitoringError, match=r"can't compare .*Name months that hold data"):
            drift(one, other, ["steady"])
    with pytest.raises(MonitoringError, match="the features of the month lack steady"):
        drift(then, then.drop(columns="steady"), ["steady"])


def test_a_winter_month_is_calmer_than_a_changed_one(quarter: Quarter) -> None:
    past = quarter.labelled(JANUARY, FEBRUARY)
    march = read_table(quarter.settings, quarter.features, [MARCH])
    names = feature_names(past, flight_delay)
    calm = drift(past, march, names)
    warm = march.assign(temperature=march["temperature"] + 40, carrier="ZZ", visibility=np.float32("nan"))
    moved = drift(past, warm, names)
    changed = ["temperature", "carrier", "visibility"]
    assert moved.loc[changed, "alarm"].all()
    assert not calm.loc[["carrier", "visibility", "distance"], "alarm"].any()
    assert moved.loc["visibility", "missing_now"] == 1
    pd.testing.assert_frame_equal(moved.drop(changed).sort_index(), calm.drop(changed).sort_index())
    assert set(calm.index) == set(names)


# ---------------------------------------------------------------- predictions and outcomes


@pytest.fixture
def joined() -> pd.DataFrame:
    """Three days in New York; the second ends after midnight in UTC, and has late flights only."""
    times = ["2013-01-01 10:00", "2013-01-02 04:59", "2013-01-02 05:00", "2013-01-03 04:30", "2013-01-03 12:00"]
    return pd.DataFrame(
        {
            "scheduled_departure": pd.to_datetime(times, utc=True),
            "score": [0.2, 0.8, 0.6, 0.7, 0.5],
            "label": [0.0, 1.0, 1.0, 1.0, math.nan],
        }
    )


def test_performance_by_the_days_of_new_york(joined: pd.DataFrame) -> None:
    table = performance(joined, flight_delay)
    assert list(table.index) == ["2013-01-01", "2013-01-02", "all"]
    assert table["rows"].tolist() == [2, 2, 4], "a flight whose outcome is not known yet does not count"
    assert table["base_rate"].tolist() == [0.5, 1.0, 0.75]
    assert table["mean_score"].tolist() == pytest.approx([0.5, 0.65, 0.575])
    whole = measure(joined["label"][:4].to_numpy(), joined["score"][:4].to_numpy(), flight_delay.costs)
    assert table.loc["all", list(whole)].to_dict() == whole
    assert table.loc["2013-01-01", "roc_auc"] == 1.0
    assert table.loc["2013-01-02", list(whole)].isna().all(), "one class cannot be ranked"


def test_performance_before_any_outcome_is_known(joined: pd.DataFrame) -> None:
    table = performance(joined.assign(label=math.nan), flight_delay)
    assert list(table.index) == ["all"]
    assert table.loc["all", "rows"] == 0
    assert math.isnan(table.loc["all", "base_rate"])


def test_performance_on_days_of_one_class(joined: pd.DataFrame) -> None:
    table = performance(joined.assign(label=1.0), flight_delay)
    assert table["base_rate"].tolist() == [1, 1, 1, 1]
    assert "pr_auc" not in table
    report = MonthReport("2013-01", "x@1", pd.DataFrame({"alarm": [True, False]}), table, math.nan)
    assert report.figures == {"alarms": 1} and isinstance(report.figures["alarms"], int)  # a count, and no 1.0000


def test_outcomes_are_joined_by_key_and_may_be_unknown(quarter: Quarter) -> None:
    outcomes = read_table(quarter.settings, quarter.rows, [MARCH])
    predictions = outcomes[[*flight_delay.key]].assign(score=0.5)
    shuffled = outcomes.sample(frac=1, random_state=0).iloc[100:]
    joined = join_outcomes(predictions, shuffled, flight_delay)
    assert len(joined) == len(predictions)
    known = joined["label"].notna()
    assert known.sum() == shuffled["arr_delay"].notna().sum()
    assert joined["label"][known].tolist() == (outcomes["arr_delay"][known] > 15).astype(float).tolist()
    with pytest.raises(pd.errors.MergeError):
        join_outcomes(predictions, pd.concat([outcomes, outcomes]), flight_delay)


# ---------------------------------------------------------------- a month


@pytest.fixture(scope="module")
def monitored(quarter: Quarter, tmp_path_factory: pytest.TempPathFactory) -> tuple[Quarter, str, dict[str, str]]:
    """A workspace in which March was scored by a model of January, which was tested on February."""
    own = quarter.fresh(tmp_path_factory.mktemp("monitored") / "workspace")
    run_id = train_run(own.settings, flight_delay, own.features, own.rows, JANUARY, JANUARY, QUICK)
    evaluate_run(own.settings, flight_delay, run_id, FEBRUARY, FEBRUARY)
    untested = train_run(
        own.settings, flight_delay, own.features, own.rows, JANUARY, JANUARY, replace(QUICK, iterations=4)
    )
    references = [register(own.settings, flight_delay, each) for each in (run_id, untested)]
    assert references == ["flight-delay@1", "flight-delay@2"]
    tables = {
        name: score_month(own.settings, flight_delay, reference, own.features, month)[0]
        for name, reference, month in (
            ("untested", references[1], MARCH), ("february", references[0], FEBRUARY), ("march", references[0], MARCH),
        )
    }  # fmt: skip
    return own, references[0], tables


@pytest.fixture(scope="module")
def report(monitored: tuple[Quarter, str, dict[str, str]]) -> MonthReport:
    own, _, tables = monitored
    return monitor_month(own.settings, flight_delay, tables["march"], own.features, MARCH, own.rows)


@pytest.mark.slow
def test_a_month_is_compared_with_the_training_of_the_model_that_scored_it(
    monitored: tuple[Quarter, str, dict[str, str]], report: MonthReport
) -> None:
    own, reference, tables = monitored
    assert (report.month, report.model) == (MARCH, reference)
    january, march = (read_table(own.settings, own.features, [month]) for month in (JANUARY, MARCH))
    pd.testing.assert_frame_equal(report.drift, drift(january, march, feature_names(january, flight_delay)))
    scored = read_table(own.settings, tables["march"], [MARCH])
    outcomes = read_table(own.settings, own.rows, [MARCH])
    known = outcomes["arr_delay"].notna()
    label = (outcomes["arr_delay"] > 15)[known].astype(float)
    wanted = measure(label.to_numpy(), scored["score"][known].to_numpy(), flight_delay.costs)
    assert report.performance.loc["all", "rows"] == known.sum()
    assert {name: report.performance.loc["all", name] for name in wanted} == pytest.approx(wanted, rel=1e-12)
    assert report.performance["rows"].drop("all").sum() == known.sum()
    assert len(report.performance) == 31 + 1
    measured = {"pr_auc", "log_loss", "base_rate", "mean_score"}
    assert set(report.figures) == {"alarms", "score_psi", "estimated_log_loss"} | measured


def test_scores_are_compared_with_those_of_the_models_test(
    monitored: tuple[Quarter, str, dict[str, str]], report: MonthReport
) -> None:
    own, _, tables = monitored
    same = monitor_month(own.settings, flight_delay, tables["february"], own.features, FEBRUARY)
    assert same.score_drift < 0.005, "February is what it was tested on; only flights that never arrived are more"
    assert report.score_drift > same.score_drift
    assert same.performance.empty
    assert set(same.figures) == {"alarms", "score_psi", "estimated_log_loss"}
    untested = monitor_month(own.settings, flight_delay, tables["untested"], own.features, MARCH)
    assert untested.model == "flight-delay@2"
    assert math.isnan(untested.score_drift)
    assert set(untested.figures) == {"alarms", "estimated_log_loss"}


def test_a_month_is_seen_as_it_was_at_a_moment(
    monitored: tuple[Quarter, str, dict[str, str]], report: MonthReport
) -> None:
    """A year that is replayed has all its outcomes from the beginning; what came later must not be known."""
    own, _, tables = monitored
    given = (own.settings, flight_delay, tables["march"], own.features, MARCH, own.rows)
    begin, middle, end = (datetime(2013, month, day, tzinfo=UTC) for month, day in ((3, 1), (3, 16), (4, 3)))
    early, half, late = (monitor_month(*given, moment=moment) for moment in (begin, middle, end))
    assert (early.coverage["labelled"], early.coverage["waiting"]) == (0, report.coverage["predicted"])
    assert "log_loss" not in early.figures
    times = read_table(own.settings, tables["march"], [MARCH])[flight_delay.time]
    due = int((times + flight_delay.label_delay <= pd.Timestamp(middle)).sum())
    assert half.coverage["waiting"] == report.coverage["predicted"] - due
    assert 0 < half.coverage["labelled"] <= due
    assert (late.coverage, late.figures) == (report.coverage, report.figures)
    pd.testing.assert_frame_equal(late.estimated, report.estimated)


def test_a_month_that_was_not_scored_is_named(monitored: tuple[Quarter, str, dict[str, str]]) -> None:
    own, _, tables = monitored
    with pytest.raises(MonitoringError, match=r"predictions@\d holds no predictions of 2013-04. Score that month"):
        monitor_month(own.settings, flight_delay, tables["march"], own.features, "2013-04")


# ---------------------------------------------------------------- the report


class Page(HTMLParser):
    """Reads a page and notes what is wrong with it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.words: list[str] = []
        self.tags: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "action", "data", "srcset")]
        if tag not in ("meta", "img", "br", "hr", "link", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_the_report_is_one_page_that_needs_nothing_else(report: MonthReport, tmp_path: Path) -> None:
    path = write_report(report, tmp_path / "reports" / "march.html")
    text = path.read_text(encoding="utf-8")
    assert text.startswith("<!doctype html>")
    page = Page(text)
    assert len(page.addresses) == 2
    assert all(address.startswith("data:image/png;base64,iVBOR") for address in page.addresses)
    assert not {"script", "link", "iframe", "object", "embed"} & set(page.tags)
    assert not any(words in text for words in ("http:", "https:", "url(", "@import"))
    words = " ".join(page.words)
    assert "flight-delay@1 in 2013-03" in words
    assert report.drift.index[0] in words
    assert f"{report.performance.loc['all', 'pr_auc']:.4f}".rstrip("0") in words
    assert [path.name for path in path.parent.iterdir()] == ["march.html"]


def test_a_report_before_any_outcome_is_known(report: MonthReport, tmp_path: Path) -> None:
    path = write_report(replace(report, performance=pd.DataFrame(), score_drift=math.nan), tmp_path / "march.html")
    page = Page(path.read_text(encoding="utf-8"))
    assert len(page.addresses) == 1
    assert "Were the predictions good?" not in page.words


def test_names_in_a_report_are_text_and_not_html(report: MonthReport, tmp_path: Path) -> None:
    odd = report.drift.rename({report.drift.index[0]: "<script>alert(1)</script>"})
    path = write_report(replace(report, model="<b>model & co</b>", drift=odd), tmp_path / "march.html")
    page = Page(path.read_text(encoding="utf-8"))
    assert not {"script", "b"} & set(page.tags)
    assert "<b>model & co</b> in 2013-03" in page.words
    assert "<script>alert(1)</script>" in page.words


def test_who_reads_a_report_while_it_is_written_sees_a_whole_one(report: MonthReport, tmp_path: Path) -> None:
    path, seen, done = tmp_path / "march.html", set[str](), threading.Event()
    write_report(report, path)

    def read() -> None:
        while not done.is_set():
            seen.add(path.read_text(encoding="utf-8")[-14:])

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for _ in range(2):
            write_report(report, path)
    finally:
        done.set()
        reader.join()
    assert seen == {"</body></html>"}


def test_a_report_that_cannot_be_written_leaves_the_old_ones_alone(report: MonthReport, tmp_path: Path) -> None:
    (tmp_path / "reports").write_text("a file")
    with pytest.raises(WorkspaceError, match="a file stands where a folder should be"):
        write_report(report, tmp_path / "reports" / "march.html")
    assert [path.name for path in tmp_path.iterdir() if path.name != "workspace"] == ["reports"]
    assert (tmp_path / "reports").read_text() == "a file"


# ---------------------------------------------------------------- the monthly round


def told(own: Quarter, month: str = MARCH) -> tuple[int, dict[str, Any]]:
    """What `mlops-course monitor` ends with, and its document."""
    done = CliRunner().invoke(monitor_commands, [month, "--json", "--home", str(own.settings.home)])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, json.loads(done.stdout, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


@pytest.mark.slow
def test_a_month_is_reviewed_by_one_command_that_a_timer_understands(
    monitored: tuple[Quarter, str, dict[str, str]],
) -> None:
    own, _, _ = monitored
    status, quiet = told(own)
    assert (status, quiet["alarms"]) == (0, [])
    assert quiet["verdict"] in ("quiet", "look")
    assert quiet["coverage"]["labelled"] == quiet["coverage"]["predicted"] - quiet["coverage"]["overdue"]
    assert quiet["estimates"]["log_loss"]["low"] is None or quiet["estimates"]["log_loss"]["low"] > 0
    shown = (own.settings.home / "monitoring" / "flight-delay.prom").read_text()
    assert 'monitoring_broken_columns{use_case="flight-delay"} 0' in shown
    assert not quiet["seasonal"], "nothing but the training is known"
    told(own, FEBRUARY)
    verdict = own.settings.home / "reports" / f"flight-delay-{FEBRUARY}.json"
    assert set(json.loads(verdict.read_text())) == {"month", "model", "verdict", "alarms"}
    verdict.write_text('{"verdict": "alarm"}')
    assert told(own)[1]["drifted"] == quiet["drifted"], "a month with an alarm is no season"
    verdict.write_text('{"verdict": "look"}')
    known = told(own)[1]
    assert known["seasonal"] and sorted(known["drifted"] + known["seasonal"]) == sorted(quiet["drifted"])
    silent = read_table(own.settings, own.features, [MARCH]).assign(visibility=np.float32("nan"))
    replace_months(own.settings, "flight-delay/features", silent)
    status, broken = told(own)
    assert (status, broken["verdict"]) == (3, "alarm")
    assert broken["alarms"][0].startswith("visibility: ")
    assert Path(broken["report"]).read_text().count("visibility") > 1
    assert "monitoring_broken_columns{" in (own.settings.home / "monitoring" / "flight-delay.prom").read_text()
