"""An estimate is right where scores mean what they say, says when it can't be trusted, and is judged afterwards."""

import math

import numpy as np
import pandas as pd
import pytest
from monitoring_helpers import served_rows as served

from mlops_course.experiments import measure
from mlops_course.framing import Costs
from mlops_course.monitoring import estimate_performance, judge_estimate, performance, watch_performance
from mlops_course.monitoring.concept import concept_drift
from mlops_course.monitoring.estimating import (
    EstimateError,
    TrustLimits,
    excess_loss,
    expected_metrics,
    learn_calibration,
    unseen_share,
)
from mlops_course.monitoring.outcomes import performance_by_slice, performance_intervals
from mlops_course.project import flight_delay
from mlops_course.wording import number_of

COSTS = Costs(missed=150, warning=40)
SHARED = ("log_loss", "brier", "roc_auc", "pr_auc", "cost")


# ---------------------------------------------------------------- metrics in expectation


def test_with_the_outcomes_as_meaning_it_is_the_realised_metric() -> None:
    rows = served(10)
    label, score = rows["label"].to_numpy(), rows["score"].round(2).to_numpy()  # rounded: with ties
    realised = measure(label, score, COSTS)
    assert {name: expected_metrics(score, label, COSTS)[name] for name in SHARED} == pytest.approx(
        {name: realised[name] for name in SHARED}, rel=1e-9
    )


def test_the_expectation_is_the_mean_over_many_possible_outcomes() -> None:
    random, score = np.random.default_rng(5), np.random.default_rng(4).beta(1.5, 4, 4000)
    meaning = np.clip(score * 0.8 + 0.05, 0, 1)
    possible = [expected_metrics(score, (random.random(4000) < meaning) * 1.0, COSTS) for _ in range(60)]
    mean, expected = pd.DataFrame(possible).mean(), pd.Series(expected_metrics(score, meaning, COSTS))
    assert mean.to_dict() == pytest.approx(expected.to_dict(), rel=0.01)


def test_what_is_undefined_is_missing_and_not_zero() -> None:
    nobody_warned = expected_metrics(np.array([0.1, 0.2]), np.array([0.1, 0.2]), COSTS)
    assert math.isnan(nobody_warned["precision"])
    assert nobody_warned["recall"] == 0
    no_positive = expected_metrics(np.array([0.1, 0.9]), np.array([0.0, 0.0]), COSTS)
    assert math.isnan(no_positive["roc_auc"])
    assert math.isnan(no_positive["recall"])
    assert no_positive["precision"] == 0


@pytest.mark.parametrize("score", [[], [0.5, math.nan], [0.5, 1.2]])
def test_what_is_no_probability_is_refused(score: list[float]) -> None:
    with pytest.raises(EstimateError, match=f"can't estimate from {len(score)} scores. Give scores from 0 to 1"):
        expected_metrics(np.array(score), np.array(score), COSTS)


# ---------------------------------------------------------------- calibration


def test_a_calibration_learns_what_scores_meant_and_changes_nothing_else() -> None:
    rows = served(60, wrong=0.1)
    before = rows.copy()
    meaning = learn_calibration(rows["label"].to_numpy(), rows["score"].to_numpy())
    assert meaning(np.array([0.2, 0.4])) == pytest.approx([0.3, 0.5], abs=0.03)
    pd.testing.assert_frame_equal(rows, before)
    again = learn_calibration(rows["label"].to_numpy()[::-1], rows["score"].to_numpy()[::-1])
    assert again(np.array([0.2, 0.4])) == pytest.approx(meaning(np.array([0.2, 0.4])), abs=1e-12), "nothing remembered"


@pytest.mark.parametrize(("rows", "label"), [(99, 0.5), (500, 1.0)])
def test_a_past_that_teaches_nothing_is_refused(rows: int, label: float) -> None:
    labels = (np.arange(rows) < rows * label).astype(float)
    with pytest.raises(EstimateError, match=f"can't calibrate on {rows:,} rows"):
        learn_calibration(labels, np.linspace(0, 1, rows))


def test_the_realised_metric_is_that_of_the_models_own_scores() -> None:
    """Corrected scores serve the estimate; what is judged is what was in service."""
    known, batch = served(60, wrong=0.1), served(28, begin="2013-06-01", wrong=0.1, seed=2)
    judged = judge_estimate(estimate_performance(batch, flight_delay, known), batch, flight_delay)
    own = measure(batch["label"].to_numpy(), batch["score"].to_numpy(), flight_delay.costs)
    assert judged.loc[list(SHARED), "true"].to_dict() == pytest.approx({name: own[name] for name in SHARED})
    assert judged["inside"].all(), "it learnt by how much the scores are wrong"


# ---------------------------------------------------------------- trust


def reasons(table: pd.DataFrame) -> str:
    """The doubts of a batch."""
    return str(table.loc["log_loss", "reasons"])


def test_scores_that_mean_what_they_say_are_trusted() -> None:
    table = estimate_performance(served(28, begin="2013-06-01", seed=2), flight_delay, served(60))
    assert set(table["state"]) == {"trusted"}
    assert (table["low"] < table["estimate"]).all() and (table["estimate"] < table["high"]).all()


def test_the_limits_hold_what_they_promise() -> None:
    """Of many honest months about 95 % come true between the limits: days are independent here."""
    known, inside = served(60, rows=100), []
    for seed in range(15):
        batch = served(14, rows=100, begin="2013-06-01", seed=100 + seed)
        table = estimate_performance(batch, flight_delay, known)
        inside.append(judge_estimate(table, batch, flight_delay).loc[["log_loss", "brier", "cost"], "inside"].mean())
    assert 0.85 <= np.mean(inside) <= 1.0


def test_each_doubt_is_named() -> None:
    june = served(28, begin="2013-06-01", seed=2)
    assert "too few outcomes of either kind are known" in reasons(estimate_performance(june, flight_delay))
    assert "60 rows, fewer than 1,000" in reasons(estimate_performance(june.head(60), flight_delay, served(60)))
    strange = estimate_performance(june, flight_delay, served(60), unseen=0.3)
    assert "30% of the rows look like nothing" in reasons(strange)
    turned = pd.concat([served(30), served(28, begin="2013-05-01", wrong=0.15)])
    table = estimate_performance(june, flight_delay, turned)
    assert "above what the scores promised" in reasons(table)
    assert set(table["state"]) == {"doubtful"}
    lenient = TrustLimits(excess=9, rows=1)
    assert "look like nothing" not in reasons(estimate_performance(june, flight_delay, turned, 0.01, lenient))


def test_without_a_known_past_there_are_no_limits() -> None:
    table = estimate_performance(served(28), flight_delay)
    assert table[["low", "high"]].isna().all(axis=None)
    assert table["estimate"].notna().all()


def test_an_undefined_metric_says_so_and_the_others_stand() -> None:
    calm = served(28).assign(score=0.05)
    table = estimate_performance(calm, flight_delay, served(60))
    assert table.loc["precision", "state"] == "undefined"
    assert "warned of" in table.loc["precision", "reasons"]
    assert table.loc["log_loss", "state"] != "undefined"


def test_excess_is_zero_for_honest_scores_and_grows_with_the_error() -> None:
    honest, *wrong = (excess_loss(served(60, wrong=each), flight_delay) for each in (0.0, 0.1, 0.2))
    assert honest[1] < 0 < honest[2]
    assert 0 < wrong[0][1] < wrong[0][0] < wrong[1][0]


def test_rows_that_the_past_has_not_are_counted() -> None:
    random = np.random.default_rng(3)
    past = pd.DataFrame(random.normal(size=(5000, 6)), columns=list("abcdef"))
    same = pd.DataFrame(random.normal(size=(4000, 6)), columns=list("abcdef"))
    assert unseen_share(past, same) < 0.02
    strange = same.copy()
    strange.loc[:399, ["a", "b"]] = 40.0
    assert unseen_share(past, strange) == pytest.approx(0.1, abs=0.01)
    assert unseen_share(past.assign(g=np.nan), same.assign(g=1.0)) < 0.02, "a column without a past says nothing"
    silent = same.assign(a=np.nan)
    assert unseen_share(past, silent.assign(b=np.nan)) == 1.0, "the past was never silent"
    gaps = past.where(random.random(past.shape) < 0.9)
    assert unseen_share(gaps, same.where(random.random(same.shape) < 0.9)) < 0.02, "gaps that are usual say nothing"


def test_a_batch_of_one_class_is_judged_where_it_can_be() -> None:
    batch, known = served(28, begin="2013-06-01", seed=2), served(60)
    judged = judge_estimate(estimate_performance(batch, flight_delay, known), batch.assign(label=0.0), flight_delay)
    assert judged.loc[["roc_auc", "pr_auc", "recall"], "true"].isna().all(), "nothing to rank, nothing to find"
    assert judged.loc[["roc_auc", "pr_auc", "recall"], "inside"].isna().all(), "so nobody can say whether it is inside"
    assert judged.loc[["log_loss", "brier", "cost"], "inside"].tolist() == [False] * 3
    with pytest.raises(EstimateError, match=r"can't calibrate on 8,400 rows with 1 class"):
        estimate_performance(batch, flight_delay, batch.assign(label=0.0))


@pytest.mark.parametrize("words", [("late", "on time"), ("1", "0")], ids=["words", "digits"])
def test_labels_as_text_are_refused_wherever_something_is_measured(words: tuple[str, str]) -> None:
    rows = served(28).assign(carrier="UA")
    text = rows.assign(label=np.where(rows["label"] == 1, *words)).astype({"label": "object"})
    text.loc[text.index[:9], "label"] = None
    measured = {
        "estimate": lambda: estimate_performance(rows, flight_delay, text),
        "judge": lambda: judge_estimate(estimate_performance(rows, flight_delay), text, flight_delay),
        "calibration": lambda: learn_calibration(text["label"].dropna().to_numpy(), rows["score"].to_numpy()[9:]),
        "by day": lambda: performance(text, flight_delay),
        "intervals": lambda: performance_intervals(text, flight_delay),
        "by slice": lambda: performance_by_slice(text, flight_delay),
        "watch": lambda: watch_performance(text, flight_delay),
        "concept": lambda: concept_drift(rows, text),
    }
    for name, measure_it in measured.items():
        with pytest.raises(EstimateError, match=r"8391 of 8391 rows is neither 1 nor 0, such as '(on time|late|0|1)'"):
            measure_it()
            pytest.fail(f"{name} takes texts")


def test_labels_as_truth_values_and_whole_numbers_are_labels() -> None:
    rows = served(28)
    wanted = performance(rows, flight_delay)
    for kind in ("bool", "int64", "Int8", "object"):
        pd.testing.assert_frame_equal(performance(rows.assign(label=rows["label"].astype(kind)), flight_delay), wanted)


@pytest.mark.parametrize("days", [1, 2, 6, 7, 9])
def test_a_short_history_is_enough_or_it_is_said_that_it_isnt(days: int) -> None:
    batch, known = served(5, begin="2013-06-01", seed=2), served(days)
    table, found = estimate_performance(batch, flight_delay, known), performance_intervals(known, flight_delay)
    short = f"outcomes of {number_of(days, 'day')} are known, fewer than 7"
    assert (short in reasons(table)) == (days < 7) == (table.loc["log_loss", "state"] == "doubtful")
    assert table["estimate"].notna().all() and found["value"].notna().all()
    assert table["low"].isna().all() == found["low"].isna().all() == (days == 1), "how days differ, one day can't tell"
    assert not watch_performance(known, flight_delay)["judged"].any() and len(performance(known, flight_delay))
    if days > 1:
        assert (found["low"] < found["high"]).all()


def test_without_limits_nobody_says_whether_the_truth_lies_inside() -> None:
    batch = served(28)
    judged = judge_estimate(estimate_performance(batch, flight_delay), batch, flight_delay)
    assert judged["inside"].isna().all()
    assert judged["true"].notna().all()
