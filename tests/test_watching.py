"""The watch rings when the loss is beyond doubt higher than was promised; outcomes are counted honestly."""

import math
from datetime import UTC, datetime

import matplotlib
import numpy as np
import pandas as pd
import pytest
from monitoring_helpers import served_rows

from mlops_course.experiments import measure
from mlops_course.monitoring import (
    label_coverage,
    performance_by_slice,
    performance_intervals,
    plot_watch,
    watch_performance,
)
from mlops_course.monitoring.watching import alarm_text
from mlops_course.project import flight_delay

matplotlib.use("agg")


def test_an_honest_model_is_left_in_peace() -> None:
    for seed in range(5):
        watched = watch_performance(served_rows(90, seed=seed), flight_delay)
        assert not watched["alarm"].any()
        assert alarm_text(watched, "2013-05") == ""


def test_a_model_that_breaks_its_promise_is_found_and_the_day_is_named() -> None:
    honest = served_rows(60)
    broken = pd.concat([honest, served_rows(40, begin="2013-05-31", wrong=0.2, seed=2)])
    watched = watch_performance(broken, flight_delay)
    days = watched.index[watched["alarm"]]
    assert str(days[0]) > "2013-05-31", "no alarm before there was a reason"
    assert (days[0] - pd.Timestamp("2013-05-31").date()).days <= 14
    told = alarm_text(watched, "2013-06")
    june = [day for day in days if str(day).startswith("2013-06")]
    assert told.endswith(f"the alarm rang on {len(june)} days from {june[0]} to {june[-1]}")
    assert alarm_text(watched, "2013-04") == ""


def test_an_alarm_in_the_middle_of_a_month_is_not_lost_at_its_end() -> None:
    better = served_rows(20, begin="2013-05-31", seed=3)
    better["score"] = better["label"] * 0.8 + 0.1  # better than promised, so that the window forgets
    turns = [served_rows(20), served_rows(41, begin="2013-04-20", wrong=0.25, seed=2), better]
    watched = watch_performance(pd.concat(turns), flight_delay)
    june = watched[[str(day).startswith("2013-06") for day in watched.index]]
    assert june["alarm"].any()
    assert not june["alarm"].iloc[-1]
    assert "rang on" in alarm_text(watched, "2013-06")


def test_a_model_that_is_better_than_promised_raises_no_alarm() -> None:
    modest = served_rows(60)
    modest["score"] = modest["label"] * 0.4 + 0.2  # never sure, and always right
    assert not watch_performance(modest, flight_delay)["alarm"].any()


def test_a_storm_is_no_alarm_when_the_scores_knew_of_it() -> None:
    rows = served_rows(60)
    storm = rows["scheduled_departure"].dt.day == 8
    rows.loc[storm, "score"] = 0.8
    rows.loc[storm, "label"] = (np.random.default_rng(3).random(int(storm.sum())) < 0.8).astype(float)
    assert not watch_performance(rows, flight_delay)["alarm"].any()


def test_a_few_days_are_not_judged() -> None:
    watched = watch_performance(served_rows(13, wrong=0.3), flight_delay)
    assert not watched["judged"].any()
    assert not watched["alarm"].any()
    assert watch_performance(served_rows(14, wrong=0.3), flight_delay)["judged"].sum() == 1


def test_rows_without_an_outcome_count_nowhere() -> None:
    rows = served_rows(40, wrong=0.2)
    waiting = pd.concat([rows, served_rows(5, begin="2013-05-11").assign(label=math.nan)])
    pd.testing.assert_frame_equal(watch_performance(waiting, flight_delay), watch_performance(rows, flight_delay))
    nothing = watch_performance(rows.assign(label=math.nan), flight_delay)
    assert nothing.empty
    assert alarm_text(nothing, "2013-05") == ""


def test_the_picture_marks_the_days_of_the_alarm() -> None:
    watched = watch_performance(served_rows(40, wrong=0.2), flight_delay)
    axes = plot_watch(watched)
    assert len(axes.collections[-1].get_offsets()) == watched["alarm"].sum() > 0


# ---------------------------------------------------------------- outcomes


def test_a_label_that_waits_is_not_one_that_is_overdue() -> None:
    due = pd.to_datetime(["2013-05-01 12:00", "2013-05-01 12:00", "2013-05-03 12:00"], utc=True)
    joined = pd.DataFrame({"scheduled_departure": due, "label": [1.0, math.nan, math.nan]})
    found = label_coverage(joined, flight_delay, datetime(2013, 5, 2, 18, tzinfo=UTC))
    assert found == {"predicted": 3, "labelled": 1, "waiting": 1, "overdue": 1, "share": 0.5}
    early = label_coverage(joined, flight_delay, datetime(2013, 5, 2, 17, 59, tzinfo=UTC))
    assert (early["waiting"], early["overdue"]) == (2, 0), "the label's delay is a day and six hours"
    assert math.isnan(early["share"])


def test_intervals_hold_the_value_and_narrow_with_more_days() -> None:
    few, many = (performance_intervals(served_rows(days), flight_delay) for days in (7, 84))
    rows = served_rows(84)
    wanted = measure(rows["label"].to_numpy(), rows["score"].to_numpy(), flight_delay.costs)
    for name in ("log_loss", "brier", "roc_auc", "pr_auc", "cost"):
        assert many.loc[name, "value"] == pytest.approx(wanted[name])
        assert many.loc[name, "low"] < many.loc[name, "value"] < many.loc[name, "high"]
    width = {name: table["high"] - table["low"] for name, table in (("few", few), ("many", many))}
    assert (width["many"] < width["few"]).all()


def test_one_class_is_said_with_its_reason_and_no_number() -> None:
    table = performance_intervals(served_rows(2).assign(label=0.0), flight_delay)
    assert table.loc["log_loss":"cost", ["value", "low", "high"]].isna().all(axis=None)
    assert set(table["undefined"]) == {"one class only: all 600 labels are 0"}
    none = performance_intervals(served_rows(2).assign(label=math.nan), flight_delay)
    assert set(none["undefined"]) == {"no outcome is known yet"}


def test_no_slice_is_left_out() -> None:
    rows = served_rows(30)
    rows["carrier"] = np.where(np.arange(len(rows)) % 3 == 0, "AA", "UA")
    rows.loc[rows.index[:5], "carrier"] = "ZZ"
    rows.loc[rows.index[:5], "label"] = 1.0
    table = performance_by_slice(rows, flight_delay).set_index("value")
    assert set(table.index) == {"AA", "UA", "ZZ"}, "the columns that the rows have are broken down"
    assert table["rows"].sum() == len(rows)
    assert table.loc["ZZ", "undefined"] == "one class only: all 5 labels are 1"
    assert math.isnan(table.loc["ZZ", "log_loss"])
    assert table.loc["AA", "low"] < table.loc["AA", "log_loss"] < table.loc["AA", "high"]
