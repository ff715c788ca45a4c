"""Training and testing: the figures are scikit-learn's, a run can be repeated, and nothing looks ahead in time."""

import hashlib
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import Quarter, free_port
from hypothesis import assume, example, given
from hypothesis import settings as examples
from hypothesis import strategies as st
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, brier_score_loss, log_loss, roc_auc_score
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import FunctionTransformer

from mlops_course.data import DataError, feature_names, read_table, replace_months
from mlops_course.environment import Settings
from mlops_course.experiments import (
    METRICS,
    ExperimentError,
    TrainingConfig,
    array_digest,
    bootstrap,
    calibrate,
    calibration_table,
    compare,
    connect,
    constant_scores,
    cost_per_row,
    evaluate,
    evaluate_run,
    find_tracked_run,
    load_run_model,
    log_model,
    measure,
    quiet_mlflow,
    rate_scores,
    reproduce,
    sample_configs,
    scores,
    search,
    slices,
    time_splits,
    tracked_run,
    train,
    train_run,
    training_rows,
)
from mlops_course.experiments.evaluation import draw_means, rank_scores, ranking_areas, row_losses
from mlops_course.experiments.model import rank_categories
from mlops_course.project import Costs, flight_delay
from mlops_course.registry import register

pytestmark = pytest.mark.filterwarnings("ignore:Series.values returning:DeprecationWarning")  # inside pyarrow

JANUARY, FEBRUARY, MARCH = "2013-01", "2013-02", "2013-03"
COSTS = flight_delay.costs
QUICK = TrainingConfig(iterations=5, leaf_samples=50)
METRIC_NAMES = ("pr_auc", "roc_auc", "log_loss")


# ---------------------------------------------------------------------------------------------------------------------
# Metrics


def truths_and_scores(*, ties: bool) -> st.SearchStrategy[list[tuple[int, float, int]]]:
    """Rows of label, score and weight."""
    score = st.sampled_from([0.0, 0.1, 0.25, 0.5, 1.0]) if ties else st.floats(0, 1, allow_subnormal=False)
    return st.lists(st.tuples(st.integers(0, 1), score, st.integers(0, 3)), min_size=2, max_size=60)


def columns(rows: list[tuple[int, float, int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Label, score and weight as arrays; both classes have some weight."""
    label, score, weight = (np.array(column, dtype=np.float64) for column in zip(*rows, strict=True))
    assume(weight[label == 1].any() and weight[label == 0].any())
    return label, score, weight


@examples(deadline=None)
@given(truths_and_scores(ties=True) | truths_and_scores(ties=False))
@example([(1, 0.5, 1), (0, 0.5, 1)])
@example([(1, 1.0, 0), (1, 0.5, 2), (0, 0.25, 3), (0, 0.0, 0)])
def test_areas_of_weighted_rows_are_those_of_scikit_learn(rows: list[tuple[int, float, int]]) -> None:
    label, score, weight = columns(rows)
    order, positive, ends = rank_scores(label, score)
    pr_auc, roc_auc = ranking_areas(positive, weight[order], ends)
    drawn = weight > 0  # scikit-learn keeps thresholds of rows without weight, which changes rounding only
    wanted = average_precision_score(label[drawn], score[drawn], sample_weight=weight[drawn])
    assert pr_auc == pytest.approx(wanted, abs=1e-12)
    assert roc_auc == pytest.approx(roc_auc_score(label, score, sample_weight=weight), abs=1e-12)


@examples(deadline=None)
@given(truths_and_scores(ties=False))
@example([(1, 0.0, 1), (0, 1.0, 1)])
def test_log_loss_of_drawn_days_is_that_of_scikit_learn(rows: list[tuple[int, float, int]]) -> None:
    label, score, _ = columns(rows)
    days = np.arange(len(rows)) % 4
    days = np.unique(days, return_inverse=True)[1]
    draws = np.array([[1] * (days.max() + 1), list(range(1, days.max() + 2))])
    found = draw_means(row_losses(label, score), days, draws)
    wanted = [log_loss(label, np.clip(score, 1e-15, 1 - 1e-15), sample_weight=draw[days]) for draw in draws]
    assert found == pytest.approx(wanted, rel=1e-9)


def test_all_metrics_are_those_of_scikit_learn() -> None:
    random = np.random.default_rng(0)
    score = random.random(500).round(2)
    label = (random.random(500) < score).astype(np.float64)
    found = measure(label, score, COSTS)
    assert set(found) == set(METRICS)
    assert found["pr_auc"] == average_precision_score(label, score)
    assert found["roc_auc"] == roc_auc_score(label, score)
    assert found["log_loss"] == log_loss(label, score)
    assert found["brier"] == brier_score_loss(label, score)
    assert found["calibration_error"] < 0.1, "these labels were drawn with just these probabilities"
    assert measure(label, score**4, COSTS)["calibration_error"] > 0.2


def test_one_class_cannot_be_measured() -> None:
    with pytest.raises(ExperimentError, match="can't measure on 3 rows of one class"):
        measure(np.ones(3), np.array([0.1, 0.2, 0.3]), COSTS)


def test_a_mistake_costs_what_the_use_case_says() -> None:
    costs = Costs(missed=100, warning=25)
    label, score = np.array([1.0, 1.0, 0.0, 0.0]), np.array([0.9, 0.1, 0.25, 0.2])
    # warned rightly: 25; missed: 100; warned for nothing, exactly at the threshold: 25; rightly silent: 0
    assert cost_per_row(label, score, costs) == (25 + 100 + 25 + 0) / 4


def test_the_calibration_table_has_groups_of_the_same_size_from_low_to_high() -> None:
    score = np.random.default_rng(1).permutation(np.arange(1003) / 1003)
    table = calibration_table((score > 0.5).astype(np.float64), score)
    assert len(table) == 10
    assert set(table["rows"]) == {100, 101}
    assert table["rows"].sum() == 1003
    assert table["score"].is_monotonic_increasing
    assert table["happened"].tolist()[:4] == [0.0] * 4
    assert table["happened"].tolist()[6:] == [1.0] * 4
    assert table["score"].iloc[0] == pytest.approx(0.05, abs=0.001)


def test_the_calibration_table_does_not_divide_equal_scores() -> None:
    score, label = np.repeat([0.1, 0.3], 50), np.tile([1.0, 0.0], 50)
    for order in (slice(None), slice(None, None, -1)):
        table = calibration_table(label[order], score[order])
        assert table["rows"].tolist() == [50, 50]
        assert table["score"].tolist() == pytest.approx([0.1, 0.3])
        assert table["happened"].tolist() == [0.5, 0.5]


def test_the_calibration_table_of_few_rows() -> None:
    assert calibration_table(np.array([1.0, 0.0]), np.array([0.7, 0.2]))["score"].tolist() == [0.2, 0.7]
    assert calibration_table(np.empty(0), np.empty(0)).empty


# ---------------------------------------------------------------------------------------------------------------------
# Uncertainty


def noisy(rows: int = 2000, days: int = 20) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels, honest scores and days."""
    random = np.random.default_rng(7)
    score = random.beta(1, 3, rows)
    return (random.random(rows) < score).astype(np.float64), score, np.arange(rows) % days


def test_a_draw_is_the_measurement_of_whole_days() -> None:
    label, score, days = noisy(200, 4)
    found = bootstrap(label, {"model": score}, days, repeats=8, seed=3)
    drawn = np.random.default_rng(3).multinomial(4, np.full(4, 1 / 4), size=8)
    for number, counts in enumerate(drawn):
        again = np.repeat(np.arange(len(label)), counts[days])
        assert counts.sum() == 4
        wanted = [metric(label[again], score[again]) for metric in (average_precision_score, roc_auc_score, log_loss)]
        assert found["model"].loc[number, list(METRIC_NAMES)].tolist() == pytest.approx(wanted, rel=1e-9)


def test_every_candidate_meets_the_same_days_and_a_seed_repeats_them() -> None:
    label, score, days = noisy()
    draws = bootstrap(label, {"model": score, "twin": score.copy()}, days, repeats=20)
    pd.testing.assert_frame_equal(draws["model"], draws["twin"])
    assert draws["model"]["pr_auc"].nunique() == 20
    pd.testing.assert_frame_equal(draws, bootstrap(label, {"model": score, "twin": score}, days, repeats=20))
    assert not draws.equals(bootstrap(label, {"model": score, "twin": score}, days, repeats=20, seed=1))


def test_a_better_model_is_better_and_equal_ones_are_not() -> None:
    label, score, days = noisy()
    draws = bootstrap(label, {"model": score, "twin": score, "worse": score[::-1].copy()}, days)
    assert compare(draws, "model", "worse")["better"].tolist() == [1.0, 1.0, 1.0]
    assert compare(draws, "worse", "model")["better"].tolist() == [0.0, 0.0, 0.0]
    table = compare(draws, "model", "worse")
    assert (table["low"] <= table["difference"]).all() and (table["difference"] <= table["high"]).all()
    assert table.loc["log_loss", "high"] < 0 < table.loc["pr_auc", "low"]
    assert (compare(draws, "model", "twin") == 0).all(axis=None), "no difference, and better in no draw"
    with pytest.raises(ExperimentError, match=r"'rates' was not measured. There are model, twin, worse"):
        compare(draws, "model", "rates")


@pytest.mark.filterwarnings("error")
def test_days_of_one_class_only_are_no_draw_to_rank_in() -> None:
    label, score = np.array([1, 1, 0, 0, 0, 0.0]), np.array([0.9, 0.8, 0.2, 0.3, 0.1, 0.4])
    draws = bootstrap(label, {"model": score, "worse": 1 - score}, np.array([1, 1, 1, 2, 2, 3]), 50)
    assert draws["model"]["pr_auc"].isna().any(), "the seed draws days two and three only, too"
    assert draws["model"]["log_loss"].notna().all()
    assert compare(draws, "model", "worse")["better"].tolist() == [1.0, 1.0, 1.0]


# ---------------------------------------------------------------------------------------------------------------------
# Time and baselines


def test_no_split_tests_on_what_lies_before_its_training() -> None:
    splits = time_splits("2012-11", "2013-04", min_months=2)
    assert [test for _, test in splits] == [["2013-01"], ["2013-02"], ["2013-03"], ["2013-04"]]
    for past, future in splits:
        assert past == sorted(past)
        assert past[0] == "2012-11"
        assert max(past) < min(future)


@pytest.mark.parametrize(("first", "last", "least"), [("2013-01", "2013-03", 3), ("2013-01", "2013-01", 1)])
def test_too_few_months_for_a_split_are_refused(first: str, last: str, least: int) -> None:
    with pytest.raises(ExperimentError, match=f"too few for {least} of history"):
        time_splits(first, last, least)


def test_the_constant_baseline_knows_the_base_rate_of_the_past() -> None:
    assert constant_scores(pd.DataFrame({"label": [1.0, 0, 0, 0]}), 3).tolist() == [0.25, 0.25, 0.25]


def test_a_rate_is_pulled_to_the_overall_rate_where_rows_are_few() -> None:
    past = pd.DataFrame({"carrier": ["AA"] * 4 + ["UA"] * 2, "origin": ["JFK"] * 6, "label": [1.0, 1, 1, 0, 0, 0]})
    future = pd.DataFrame({"carrier": ["UA", "AA", "ZZ", "AA"], "origin": ["JFK", "JFK", "JFK", "LGA"]}, index=[9] * 4)
    found = rate_scores(past, future, ["carrier", "origin"], weight=2)
    assert found.tolist() == [(0 + 2 * 0.5) / (2 + 2), (3 + 2 * 0.5) / (4 + 2), 0.5, 0.5]
    assert rate_scores(past, future, ["carrier"], weight=1e-9).round(6).tolist() == [0.0, 0.75, 0.5, 0.75]


@pytest.mark.slow
def test_the_baselines_never_see_the_outcomes_that_they_are_tested_on(quarter: Quarter) -> None:
    past, future = quarter.labelled(JANUARY), quarter.labelled(FEBRUARY)
    turned = future.assign(label=1 - future["label"])
    model = train(past, flight_delay, QUICK)
    one, other = (evaluate(past, frame, flight_delay, model) for frame in (future, turned))
    for name in ("model", "constant", "rates"):
        np.testing.assert_array_equal(one.candidates[name], other.candidates[name])


# ---------------------------------------------------------------------------------------------------------------------
# Training


@pytest.fixture(scope="module")
def january(quarter: Quarter) -> pd.DataFrame:
    return quarter.labelled(JANUARY)


@pytest.fixture(scope="module")
def model(january: pd.DataFrame) -> Pipeline:
    return train(january, flight_delay, QUICK)


def test_training_twice_gives_the_same_scores_to_the_last_bit(january: pd.DataFrame, model: Pipeline) -> None:
    again, other = train(january, flight_delay, QUICK), train(january, flight_delay, TrainingConfig(5, seed=1))
    assert array_digest(scores(again, january)) == array_digest(scores(model, january))
    assert array_digest(scores(other, january)) != array_digest(scores(model, january))


def test_the_model_learns_something(quarter: Quarter, january: pd.DataFrame, model: Pipeline) -> None:
    future = quarter.labelled(FEBRUARY)
    found = evaluate(january, future, flight_delay, model)
    assert (
        found.metrics["pr_auc"] > found.comparison.loc["rates", "pr_auc"] > found.comparison.loc["constant", "pr_auc"]
    )
    assert found.metrics == measure(future["label"].to_numpy(), scores(model, future), COSTS)
    assert found.comparison.loc["constant", "roc_auc"] == 0.5
    low, high = found.comparison.loc["model", ["pr_auc_low", "pr_auc_high"]]
    assert low < found.metrics["pr_auc"] < high
    assert found.shortfalls == flight_delay.success.shortfalls(found.metrics)
    assert len(found.shortfalls) == 3, "five trees on a fifth of a month reach no bar"


@pytest.mark.parametrize("rows", [slice(0, 0), slice(None)])
def test_training_refuses_a_single_class(january: pd.DataFrame, rows: slice) -> None:
    punctual = january[january["label"] == 0].iloc[rows]
    with pytest.raises(ExperimentError, match=f"rows of both classes, but the labels of {len(punctual):,} rows are"):
        train(punctual, flight_delay, QUICK)


def test_an_unknown_category_counts_as_a_missing_one(january: pd.DataFrame) -> None:
    frame = january.assign(label=(january["carrier"] != "UA").astype("float64"))  # so that the carrier matters
    model = train(frame, flight_delay, TrainingConfig(20, leaf_samples=20, feature_share=1.0))
    asked = frame[frame["carrier"] == "UA"].head(50)
    missing = scores(model, asked.assign(carrier=pd.Series(np.nan, asked.index, dtype="str")))
    np.testing.assert_array_equal(scores(model, asked.assign(carrier="ZZ")), missing)
    assert (missing != scores(model, asked)).any()


def test_categories_are_ranked_by_how_often_they_are_late() -> None:
    values = pd.Series(["B", "A", "A", "C", "B", "D", None], dtype="str")
    assert rank_categories(values, pd.Series([1.0, 0, 1, 0, 1, 0, 1])) == ["C", "D", "A", "B"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"iterations": 0}, {"iterations": True}, {"learning_rate": "fast"}, {"learning_rate": float("nan")},
        {"l2": -1}, {"feature_share": 1.5}, {"seed": None}, {"seed": 2**32}, {"leaves": 1},
    ],
)  # fmt: skip
def test_a_training_setting_out_of_bounds_is_named(wrong: dict[str, Any]) -> None:
    ((name, value),) = wrong.items()
    with pytest.raises(ExperimentError) as caught:
        TrainingConfig(**wrong)
    assert f"the training setting {name} is {value!r}. Give a number from" in str(caught.value)


@pytest.mark.parametrize("method", ["sigmoid", "isotonic"])
def test_calibration_mends_scores_that_promise_too_much(quarter: Quarter, model: Pipeline, method: str) -> None:
    february, march = quarter.labelled(FEBRUARY), quarter.labelled(MARCH)
    bent = calibrate(model, february, method)
    raw, mended = scores(model, february), scores(bent, february)
    label = february["label"].to_numpy()
    assert abs(mended.mean() - label.mean()) < abs(raw.mean() - label.mean())
    assert measure(label, mended, COSTS)["calibration_error"] < measure(label, raw, COSTS)["calibration_error"]
    order = np.argsort(scores(model, march), kind="stable")
    assert (np.diff(scores(bent, march)[order]) >= 0).all(), "the order of the flights stays"


def test_an_unknown_calibration_is_refused(january: pd.DataFrame, model: Pipeline) -> None:
    with pytest.raises(ExperimentError, match=r"no calibration 'magic'. Use 'sigmoid' or 'isotonic'"):
        calibrate(model, january, "magic")


def test_slices_are_measured_by_themselves(january: pd.DataFrame, model: Pipeline) -> None:
    score = scores(model, january)
    table = slices(january, score, ["origin", "carrier"], min_rows=200)
    jfk = table.set_index("value").loc["JFK"]
    here = (january["origin"] == "JFK").to_numpy()
    assert jfk["rows"] == here.sum()
    assert jfk["roc_auc"] == roc_auc_score(january["label"][here], score[here])
    sizes = january["carrier"].value_counts()
    assert set(table.loc[table["column"] == "carrier", "value"]) == set(sizes.index[sizes >= 200])
    assert "HA" in sizes.index
    assert slices(january.assign(label=0.0), score, ["origin"]).empty, "one class can't be ranked"


# ---------------------------------------------------------------------------------------------------------------------
# Search


@pytest.mark.slow
def test_a_search_on_one_core_and_on_two_finds_the_same(quarter: Quarter) -> None:
    frame, splits = quarter.labelled(JANUARY, MARCH).iloc[::4], time_splits(JANUARY, MARCH, 1)
    configs = sample_configs({"iterations": [2, 4], "leaves": [4]}, 5, TrainingConfig(leaf_samples=20))
    one, two = (search(frame, flight_delay, configs, splits, jobs) for jobs in (1, 2))
    pd.testing.assert_frame_equal(one, two, check_exact=True)
    assert one["log_loss"].is_monotonic_increasing
    assert sorted(one["iterations"]) == [2, 4]
    best = TrainingConfig(iterations=int(one["iterations"].iloc[0]), leaves=4, leaf_samples=20)
    losses = []
    for past, future in splits:
        later = frame[frame["period"].isin(future)]
        trained = train(frame[frame["period"].isin(past)], flight_delay, best)
        losses.append(log_loss(later["label"], scores(trained, later)))
    assert one["log_loss"].iloc[0] == pytest.approx(np.mean(losses), rel=1e-12)


def logged_search(
    own: Quarter, jobs: int, data: dict[str, str]
) -> tuple[pd.DataFrame, list[Any], Any]:  # what was found, the tries' runs, the search's run
    frame, splits = own.labelled(JANUARY, MARCH).iloc[::4], time_splits(JANUARY, MARCH, 1)
    configs = sample_configs({"iterations": [2, 4, 6]}, 3, TrainingConfig(leaves=4, leaf_samples=20))
    found = search(frame, flight_delay, configs, splits, jobs, settings=own.settings, data=data)
    experiment = connect(own.settings, flight_delay)
    runs = quiet_mlflow().search_runs([experiment], output_format="list")
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    return found, [run for run in runs if run is not parent], parent


def test_a_search_writes_down_every_try(own_quarter: Quarter) -> None:
    found, tries, parent = logged_search(own_quarter, 2, {"features": own_quarter.features})
    assert {run.info.run_id for run in tries} == set(found["run"])
    assert {run.data.tags["mlflow.parentRunId"] for run in tries} == {parent.info.run_id}
    assert {run.info.status for run in [*tries, parent]} == {"FINISHED"}
    by_id = {run.info.run_id: run for run in tries}
    for row in found.to_dict("records"):
        run = by_id[row["run"]]
        assert {name: run.data.params[name] for name in ("iterations", "leaves", "seed")} == {
            name: str(row[name]) for name in ("iterations", "leaves", "seed")
        }
        assert {name: run.data.metrics[f"mean.{name}"] for name in METRICS} == pytest.approx(
            {name: row[name] for name in METRICS}, rel=1e-12
        )
        history = quiet_mlflow().MlflowClient().get_metric_history(row["run"], "split.log_loss")
        assert sorted(each.step for each in history) == [0, 1], "one value a split"
        assert np.mean([each.value for each in history]) == pytest.approx(row["log_loss"], rel=1e-12)
    assert parent.data.tags["data.features"] == own_quarter.features
    assert (parent.data.params["trials"], parent.data.params["tested_on"]) == ("3", "2013-02, 2013-03")
    assert parent.data.tags["best_run"] == found.loc[0, "run"]
    assert parent.data.metrics["best.log_loss"] == found["log_loss"].min()


def test_what_a_search_writes_down_changes_nothing_that_it_finds(own_quarter: Quarter) -> None:
    found, tries, _ = logged_search(own_quarter, 1, {})
    frame, splits = own_quarter.labelled(JANUARY, MARCH).iloc[::4], time_splits(JANUARY, MARCH, 1)
    configs = sample_configs({"iterations": [2, 4, 6]}, 3, TrainingConfig(leaves=4, leaf_samples=20))
    alone = search(frame, flight_delay, configs, splits, 1)
    pd.testing.assert_frame_equal(found.drop(columns="run"), alone, check_exact=True)
    assert len(tries) == 3


def test_a_search_that_fails_keeps_the_tries_that_were_done(own_quarter: Quarter) -> None:
    frame = own_quarter.labelled(JANUARY, FEBRUARY).iloc[::4]
    bad = TrainingConfig(iterations=2)
    object.__setattr__(bad, "leaves", 1)  # past its own checks: scikit-learn refuses it in the middle of the search
    with pytest.raises(ValueError, match="max_leaf_nodes"):
        search(frame, flight_delay, [QUICK, bad], [([JANUARY], [FEBRUARY])], 1, settings=own_quarter.settings)
    runs = quiet_mlflow().search_runs([connect(own_quarter.settings, flight_delay)], output_format="list")
    assert {"mlflow.parentRunId" in run.data.tags: run.info.status for run in runs} == {
        False: "FAILED",
        True: "FINISHED",
    }
    assert quiet_mlflow().active_run() is None


@pytest.mark.parametrize(("configs", "splits"), [([], [([JANUARY], [FEBRUARY])]), ([QUICK], [])])
def test_a_search_of_nothing_is_refused(january: pd.DataFrame, configs: list[Any], splits: list[Any]) -> None:
    with pytest.raises(ExperimentError, match=f"nothing to try: {len(configs)} settings, {len(splits)} splits"):
        search(january, flight_delay, configs, splits)


def test_settings_are_drawn_without_repeating_and_unknown_ones_are_refused() -> None:
    drawn = sample_configs({"leaves": [4, 8, 16], "l2": [0.0, 1.0]}, 100)
    assert len(set(drawn)) == len(drawn) == 6
    assert sample_configs({"leaves": range(2, 100)}, 3) == sample_configs({"leaves": range(2, 100)}, 3)
    with pytest.raises(ExperimentError, match=r"no training setting 'depth'. There are feature_share, iterations"):
        sample_configs({"depth": [3]}, 1)


# ---------------------------------------------------------------------------------------------------------------------
# Runs


@pytest.fixture(scope="module")
def run_id(quarter: Quarter) -> str:
    """A run that has trained on January and was tested on February."""
    run_id = train_run(quarter.settings, flight_delay, quarter.features, quarter.rows, JANUARY, JANUARY, QUICK)
    evaluate_run(quarter.settings, flight_delay, run_id, FEBRUARY, FEBRUARY)
    return run_id


def model_folder(settings: Settings, run_id: str) -> Path:
    """Where the files of a run's model are."""
    model_id = find_tracked_run(settings, flight_delay, run_id).data.tags["model_uri"].removeprefix("models:/")
    return settings.artifacts / "models" / model_id / "artifacts"


def test_a_run_trains_only_on_what_was_known_when_its_last_month_ended(quarter: Quarter, run_id: str) -> None:
    every = quarter.labelled(JANUARY)
    known = training_rows(quarter.settings, flight_delay, find_tracked_run(quarter.settings, flight_delay, run_id))
    end = pd.Timestamp("2013-02-01", tz="America/New_York") - pd.Timedelta(hours=30)
    pd.testing.assert_frame_equal(known, every[every["scheduled_departure"] <= end].reset_index(drop=True))
    assert 0 < len(every) - len(known) < 0.06 * len(every), "a day or so"


def test_a_run_knows_its_settings_data_code_and_model(quarter: Quarter, run_id: str) -> None:
    run = find_tracked_run(quarter.settings, flight_delay, run_id)
    params, tags, rows = run.data.params, run.data.tags, training_rows(quarter.settings, flight_delay, run)
    assert (run.info.status, run.info.run_name) == ("FINISHED", "train 2013-01 to 2013-01")
    assert {name: params[name] for name in ("first", "last", "rows")} == {
        "first": JANUARY, "last": JANUARY, "rows": str(len(rows)),
    }  # fmt: skip
    assert (params["iterations"], params["leaf_samples"], params["seed"]) == ("5", "50", "2013")
    assert (tags["data.features"], tags["data.rows"]) == (quarter.features, quarter.rows)
    assert {"code.commit", "code.dirty", "code.lock"} <= set(tags)
    assert run.data.metrics["train.base_rate"] == rows["label"].mean()
    stored = load_run_model(quarter.settings, flight_delay, run_id)
    assert tags["model_digest"] == array_digest(scores(stored, rows))
    written = quarter.settings.artifacts / run_id / "artifacts" / "fingerprint.json"
    kept = json.loads(written.read_text())
    assert kept["packages"]["scikit-learn"] and kept["machine"]["cores"]


def test_a_test_is_written_to_the_run_of_the_model(quarter: Quarter, run_id: str) -> None:
    run = find_tracked_run(quarter.settings, flight_delay, run_id)
    model, future = load_run_model(quarter.settings, flight_delay, run_id), quarter.labelled(FEBRUARY)
    wanted = measure(future["label"].to_numpy(), scores(model, future), COSTS)
    assert {name: run.data.metrics[f"test.{name}"] for name in METRICS} == wanted
    assert (run.data.tags["test.first"], run.data.tags["test.features"]) == (FEBRUARY, quarter.features)
    folder = quarter.settings.artifacts / run_id / "artifacts"
    assert set(json.loads((folder / "comparison.json").read_text())) == {"model", "constant", "rates"}
    assert "roc_auc" in json.loads((folder / "slices.json").read_text())["columns"]


def test_a_run_can_be_repeated_to_the_last_digit(quarter: Quarter, run_id: str) -> None:
    assert reproduce(quarter.settings, flight_delay, run_id) == 0.0


def test_a_run_can_be_repeated_after_its_tables_have_changed(own_quarter: Quarter) -> None:
    own = own_quarter
    run_id = train_run(own.settings, flight_delay, own.features, own.rows, JANUARY, JANUARY, QUICK)
    table = read_table(own.settings, own.features, [JANUARY])
    newer, changed = replace_months(own.settings, "flight-delay/features", table.assign(distance=np.float32(0)))
    assert (newer != own.features, changed) == (True, [JANUARY])
    assert reproduce(own.settings, flight_delay, run_id) == 0.0
    run = find_tracked_run(own.settings, flight_delay, run_id)
    assert training_rows(own.settings, flight_delay, run)["distance"].min() > 0


@pytest.mark.parametrize("first", [JANUARY, "2012-12"])
def test_a_month_that_the_model_has_seen_is_no_test(quarter: Quarter, run_id: str, first: str) -> None:
    before = find_tracked_run(quarter.settings, flight_delay, run_id).data.metrics
    with pytest.raises(ExperimentError, match=f"can't test on {first}: .* seen .* to 2013-01. Test from 2013-02 on"):
        evaluate_run(quarter.settings, flight_delay, run_id, first, MARCH)
    assert find_tracked_run(quarter.settings, flight_delay, run_id).data.metrics == before


def test_a_month_that_is_not_there_is_no_test(quarter: Quarter, run_id: str) -> None:
    with pytest.raises(DataError, match="has no rows of 2013-04"):
        evaluate_run(quarter.settings, flight_delay, run_id, MARCH, "2013-04")


def test_rivals_are_measured_beside_the_model(
    quarter: Quarter, run_id: str, model: Pipeline, january: pd.DataFrame
) -> None:
    twin = load_run_model(quarter.settings, flight_delay, run_id)
    gone = train(january.assign(gone=january["distance"]), flight_delay, QUICK)
    rivals = {"twin": twin, "other": model, "wants more": gone}
    found = evaluate_run(quarter.settings, flight_delay, run_id, MARCH, MARCH, rivals=rivals)
    assert list(found.comparison.index) == ["model", "constant", "rates", "twin", "other"], "one can't be asked"
    assert (found.versus["twin"]["difference"] == 0).all()
    assert (found.versus["other"]["difference"] != 0).all()


def test_a_run_that_fails_is_marked_as_failed(own_quarter: Quarter) -> None:
    settings, started = own_quarter.settings, []
    with pytest.raises(ZeroDivisionError), tracked_run(settings, flight_delay, "broken", {"features": "x@1"}) as run:
        started.append(run.info.run_id)
        print(1 / 0)
    failed = find_tracked_run(settings, flight_delay, started[0])
    assert failed.info.status == "FAILED"
    assert quiet_mlflow().active_run() is None
    with pytest.raises(ExperimentError, match=f"the run {started[0]}, which is failed, has no model_uri. Name a run"):
        load_run_model(settings, flight_delay, started[0])
    with pytest.raises(ExperimentError, match="has no last"):
        evaluate_run(settings, flight_delay, started[0], MARCH, MARCH)


def test_a_run_of_another_use_case_is_refused(settings: Settings) -> None:
    other = replace(flight_delay, name="bikes")
    with tracked_run(settings, flight_delay, "trained", {"features": "x@1"}) as run:
        run_id = run.info.run_id
    said = f"the run {run_id} is one of flight-delay, not of bikes"
    with pytest.raises(ExperimentError, match=said):
        find_tracked_run(settings, other, run_id)
    with pytest.raises(ExperimentError, match=said):
        evaluate_run(settings, other, run_id, MARCH, MARCH)
    with pytest.raises(ExperimentError, match=said):
        register(settings, other, run_id)
    assert find_tracked_run(settings, flight_delay, run_id).info.run_id == run_id


def test_an_unknown_run_is_named(quarter: Quarter) -> None:
    with pytest.raises(ExperimentError, match=r"there is no run 'ffff'.* Train first, or correct the id"):
        find_tracked_run(quarter.settings, flight_delay, "ffff")


# ---------------------------------------------------------------------------------------------------------------------
# The stored model is data, not code


def test_a_stored_model_holds_no_pickle(quarter: Quarter, run_id: str) -> None:
    folder = model_folder(quarter.settings, run_id)
    files = {path.name for path in folder.rglob("*") if path.is_file()}
    described = {"MLmodel", "conda.yaml", "python_env.yaml", "requirements.txt", "registered_model_meta"}
    assert files - described == {"model.skops"}
    assert not list(quarter.settings.artifacts.rglob("*.pkl"))
    with zipfile.ZipFile(folder / "model.skops") as inside:
        kinds = {Path(name).suffix for name in inside.namelist()}
        arrays = [inside.read(name)[:6] for name in inside.namelist() if name.endswith(".npy")]
    assert kinds <= {".json", ".npy"}
    assert set(arrays) == {b"\x93NUMPY"}
    again = feature_names(quarter.labelled(JANUARY), flight_delay)
    assert list(load_run_model(quarter.settings, flight_delay, run_id).feature_names_in_) == again


def untrusted_model() -> Pipeline:
    """A model that would call a function of its own."""
    steps = [("function", FunctionTransformer(lambda frame: frame)), ("model", LogisticRegression())]
    return Pipeline(steps).fit(pd.DataFrame({"distance": [1.0, 2, 3, 4]}), [0, 1, 0, 1])


def test_a_model_with_code_in_it_is_not_stored(own_quarter: Quarter) -> None:
    with (
        pytest.raises(ExperimentError, match=r"can't be stored: Untrusted types .*lambda"),
        tracked_run(own_quarter.settings, flight_delay, "mine", {}),
    ):
        log_model(untrusted_model(), flight_delay)
    assert not list(own_quarter.settings.artifacts.rglob("model.skops"))


@contextmanager
def served_by_mlflow(folder: Path, log: Path) -> Iterator[str]:
    """MLflow's own server with a stored model, on a free port."""
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "models", "serve", "--model-uri", str(folder), "--port", str(port)]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # MLflow starts uvicorn by its name
    with log.open("w") as file:
        process = subprocess.Popen(
            [*command, "--env-manager", "local"],
            env={**os.environ, "PATH": path},
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/ping", timeout=1):
                break
            time.sleep(0.1)
        else:
            pytest.fail(f"MLflow's server did not answer: {log.read_text()[-2000:]}")
        yield f"http://127.0.0.1:{port}/invocations"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        process.wait(20)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="MLflow's server wants a process group to be ended")
def test_mlflow_serves_what_is_stored_with_the_scores_of_training(own_quarter: Quarter, tmp_path: Path) -> None:
    rows = own_quarter.labelled("2013-01").head(3000)
    model = train(rows, flight_delay, TrainingConfig(iterations=100, leaf_samples=5))
    with tracked_run(own_quarter.settings, flight_delay, "mine", {}):
        address = log_model(model, flight_delay)
        folder = Path(quiet_mlflow().artifacts.download_artifacts(artifact_uri=address))
    records = rows[list(model.feature_names_in_)].to_json(orient="records", double_precision=15)
    body = f'{{"dataframe_records": {records}}}'.encode()
    with served_by_mlflow(folder, tmp_path / "log.txt") as url:
        question = urllib.request.Request(url, body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(question, timeout=60) as answer:
            told = json.load(answer)["predictions"]
    np.testing.assert_allclose(np.array(told)[:, 1], scores(model, rows), atol=1e-9)


def exchange_for_other_types(folder: Path) -> None:
    """Another kind of model, whose folder says that it can be trusted."""
    import skops.io

    forest = RandomForestClassifier(n_estimators=1).fit([[1.0], [2.0]], [0, 1])
    skops.io.dump(forest, folder / "model.skops")
    wanted = "\n".join(f"    - {name}" for name in skops.io.get_untrusted_types(file=folder / "model.skops"))
    assert wanted
    text = (folder / "MLmodel").read_text()
    (folder / "MLmodel").write_text(text.replace("skops_trusted_types:\n", f"skops_trusted_types:\n{wanted}\n"))


def exchange_for_a_pickle(folder: Path) -> None:
    """Code that makes a file when it is opened, in a folder that says it is a pickle."""
    code = f"cposix\nsystem\n(S'touch {folder / 'was-here'}'\ntR."
    (folder / "model.skops").write_bytes(code.encode())
    text = (folder / "MLmodel").read_text()
    (folder / "MLmodel").write_text(text.replace("serialization_format: skops", "serialization_format: pickle"))


def take_away(folder: Path) -> None:
    shutil.rmtree(folder)


def cut_off(folder: Path) -> None:
    content = (folder / "model.skops").read_bytes()
    (folder / "model.skops").write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize("damage", [exchange_for_other_types, exchange_for_a_pickle, take_away, cut_off])
def test_a_model_whose_files_were_exchanged_or_damaged_is_refused(
    own_quarter: Quarter, damage: Callable[[Path], None]
) -> None:
    settings = own_quarter.settings
    run_id = train_run(settings, flight_delay, own_quarter.features, own_quarter.rows, JANUARY, JANUARY, QUICK)
    folder = model_folder(settings, run_id)
    assert load_run_model(settings, flight_delay, run_id).named_steps
    damage(folder)
    with pytest.raises(ExperimentError) as caught:
        load_run_model(settings, flight_delay, run_id)
    assert f"can't load the model of the run {run_id}: " in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (folder / "was-here").exists()


@pytest.mark.parametrize("damage", [exchange_for_other_types, exchange_for_a_pickle])
def test_an_exchanged_model_is_refused_even_if_its_checksum_was_exchanged_too(
    own_quarter: Quarter, damage: Callable[[Path], None]
) -> None:
    settings = own_quarter.settings
    run_id = train_run(settings, flight_delay, own_quarter.features, own_quarter.rows, JANUARY, JANUARY, QUICK)
    folder = model_folder(settings, run_id)
    damage(folder)
    digest = hashlib.sha256((folder / "model.skops").read_bytes()).hexdigest()
    quiet_mlflow().MlflowClient().set_tag(run_id, "sha256.model/model.skops", digest)
    with pytest.raises(ExperimentError, match=f"can't load the model of the run {run_id}: (?!.*is damaged)"):
        load_run_model(settings, flight_delay, run_id)
    assert not (folder / "was-here").exists()


# ---------------------------------------------------------------------------------------------------------------------
# The store


def notes(folder: Path) -> str:
    (folder / "notes.txt").write_text("no database\n" * 1000)
    return f"sqlite:///{folder / 'notes.txt'}"


@pytest.mark.parametrize(
    ("address", "words"),
    [
        (lambda folder: "nonsense://x", "unsupported URI"),
        (lambda folder: "somewhere", "maintenance mode"),
        (notes, "file is not a database"),
        (lambda folder: notes(folder) + "/runs.db", "notes.txt"),
        (lambda folder: "mysql://ann:secret@localhost/runs", "MySQLdb"),
        (lambda folder: "http://127.0.0.1:9", "Max retries exceeded"),
    ],
)
def test_a_bad_address_of_the_store_is_one_clear_line(
    settings: Settings, tmp_path: Path, address: Callable[[Path], str], words: str
) -> None:
    elsewhere = Settings(home=settings.home, tracking_uri=address(tmp_path))
    with pytest.raises(ExperimentError) as caught:
        connect(elsewhere, flight_delay)
    line = str(caught.value)
    assert line.startswith("can't open the tracking store ")
    assert words in line
    assert "MLOPS_COURSE_TRACKING_URI" in line
    assert "\n" not in line and len(line) < 500
    assert "secret" not in line
    assert not (settings.home / "mlflow.db").exists()


def test_a_driver_that_is_not_installed_is_named_with_what_installs_it(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "psycopg2", None)
    elsewhere = Settings(home=settings.home, tracking_uri="postgresql+psycopg2://ann:secret@localhost:9/runs")
    with pytest.raises(ExperimentError, match=r"psycopg2.*pip install 'mlops_course\[cluster\]'") as caught:
        connect(elsewhere, flight_delay)
    assert "secret" not in str(caught.value)


def test_a_damaged_store_is_named(settings: Settings) -> None:
    (settings.home / "mlflow.db").write_text("no database\n" * 1000)
    with pytest.raises(ExperimentError, match=r"mlflow.db: .*not a database.* Look at that file, or move it away"):
        connect(settings, flight_delay)


CONNECT = """
import sys, time
from mlops_course.environment import Settings
from mlops_course.experiments import connect, quiet_mlflow
from mlops_course.project import flight_delay
settings = Settings(home=sys.argv[1]).prepare()
quiet_mlflow()
print("ready", flush=True)
sys.stdin.readline()
print(connect(settings, flight_delay))
"""


def start_to_connect(home: Path) -> subprocess.Popen[str]:
    """A process that connects as soon as it is told to."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", CONNECT, str(home)], text=True, **pipes)
    return process


@pytest.mark.slow
def test_four_processes_may_begin_at_once_in_a_fresh_workspace(settings: Settings) -> None:
    processes = [start_to_connect(settings.home) for _ in range(4)]
    for process in processes:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    ended = [process.communicate("go\n", timeout=60) for process in _told(processes)]
    assert [process.returncode for process in processes] == [0] * 4, ended
    assert [output for output, _ in ended] == ["1\n"] * 4, "all of them see the same experiment"
    with sqlite3.connect(settings.home / "mlflow.db") as database:
        assert database.execute("pragma integrity_check").fetchone() == ("ok",)
        assert database.execute("select count(*) from experiments where name = 'flight-delay'").fetchone() == (1,)
    assert sorted(path.name for path in settings.home.glob("*.db*")) == ["mlflow.db"]


def _told(processes: list[subprocess.Popen[str]]) -> list[subprocess.Popen[str]]:
    """The same, each told to go on before the first one is waited for."""
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    return processes


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="uses POSIX signals")
def test_a_process_that_is_killed_while_it_makes_the_store_leaves_nothing_behind(settings: Settings) -> None:
    process = start_to_connect(settings.home)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    _told([process])
    lock = settings.home / ".tracking.lock"
    end = time.monotonic() + 20
    while not lock.exists():
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.01)
    time.sleep(0.5)  # in the midst of some fifty steps
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=20)
    assert not (settings.home / "mlflow.db").exists()
    assert connect(settings, flight_delay) == "1"


def test_a_store_that_is_there_is_kept(own_quarter: Quarter, tmp_path: Path) -> None:
    settings = own_quarter.settings
    with tracked_run(settings, flight_delay, "kept", {}) as run:
        pass
    other = own_quarter.copy(tmp_path / "other").settings
    assert find_tracked_run(other, flight_delay, run.info.run_id).info.run_name == "kept"
    with tracked_run(other, flight_delay, "only there", {}) as second:
        pass
    assert find_tracked_run(settings, flight_delay, run.info.run_id).info.run_name == "kept"
    with pytest.raises(ExperimentError, match="there is no run"):
        find_tracked_run(settings, flight_delay, second.info.run_id)
