"""The gate: what is better is promoted, what harms somebody is refused, and what can't be known goes to a person."""

from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import Quarter

from mlops_course.delivery import Contender, GateCheck, GateDecision, GateError, GateLimits, judge_challenger, run_gate
from mlops_course.delivery.gate import decide_gate, draw_interval, time_in_turn
from mlops_course.experiments import TrainingConfig, scores, train, train_run
from mlops_course.experiments.evaluation import row_losses
from mlops_course.project import flight_delay
from mlops_course.registry import RegistryError, promote, register

pytestmark = pytest.mark.filterwarnings("ignore:Series.values returning:DeprecationWarning")  # inside pyarrow

JANUARY, FEBRUARY, MARCH = "2013-01", "2013-02", "2013-03"
Names = tuple[pd.DataFrame, Contender, Contender, float]


@pytest.fixture(scope="module")
def march(quarter: Quarter) -> Names:
    """The flights of March; a challenger that learnt from January and February, and a champion that hardly learnt."""
    past, frame = quarter.labelled(JANUARY, FEBRUARY), quarter.labelled(MARCH)
    models = {
        "old": train(quarter.labelled(JANUARY), flight_delay, TrainingConfig(iterations=5, leaf_samples=50)),
        "new": train(past, flight_delay, TrainingConfig(iterations=60, leaf_samples=50)),
    }
    new = Contender("new", scores(models["new"], frame), FEBRUARY)
    old = Contender("old", scores(models["old"], frame), JANUARY)
    return frame, new, old, float(past["label"].mean())


def judged(march: Names, limits: GateLimits | None = None, **changed: Any) -> GateDecision:
    """The gate's answer about a challenger that was changed."""
    frame, new, old, rate = march
    return judge_challenger(frame, flight_delay, replace(new, **changed), old, rate, limits)


def named(decision: GateDecision, verdict: str) -> set[str]:
    return {f"{check.name} {check.slice}".strip() for check in decision.checks if check.verdict == verdict}


# ---------------------------------------------------------------- the three answers


def test_a_better_model_is_promoted_and_the_reason_has_the_figures(march: Names) -> None:
    decision = judged(march)
    frame, new, old, _ = march
    label = frame["label"].to_numpy()
    gain = row_losses(label, new.score).mean() - row_losses(label, old.score).mean()
    assert decision.action == "promote", decision.reason
    assert f"log loss against old {gain:+.4f}" in decision.reason
    assert not named(decision, "fail")


def test_the_champion_itself_is_not_better_than_itself(march: Names) -> None:
    decision = judged(march, score=march[2].score, last="")
    assert decision.action == "reject"
    assert decision.reason.startswith("not better beyond doubt: log loss against old +0.0000")


def test_a_worse_model_is_refused(march: Names) -> None:
    frame, new, old, rate = march
    decision = judge_challenger(frame, flight_delay, old, replace(new, last=""), rate)
    assert decision.action == "reject"
    assert "log loss against new" in named(decision, "fail")


def test_a_model_that_is_good_on_average_and_bad_for_one_airline_is_refused(march: Names) -> None:
    frame, new, _, _ = march
    carrier = frame["carrier"].value_counts().index[3]
    spoilt = np.where(frame["carrier"] == carrier, 1 - new.score, new.score)
    decision = judged(march, score=spoilt)
    assert decision.action == "reject"
    assert f"log loss against old carrier={carrier}" in named(decision, "fail")


@pytest.mark.parametrize("bad", [np.nan, -0.1, 1.5, np.inf])
def test_one_score_that_is_no_probability_is_enough(march: Names, bad: float) -> None:
    score = march[1].score.copy()
    score[17] = bad
    decision = judged(march, score=score)
    assert (decision.action, len(named(decision, "fail"))) == ("reject", 1)


def test_a_model_that_has_seen_the_test_is_refused_however_good(march: Names) -> None:
    decision = judged(march, last=MARCH)
    assert decision.action == "reject"
    assert "months of the test seen in training" in decision.reason


def test_a_champion_that_has_seen_the_test_needs_a_person(march: Names) -> None:
    frame, new, old, rate = march
    decision = judge_challenger(frame, flight_delay, new, replace(old, last=MARCH), rate)
    assert decision.action == "needs a person"
    assert "seen by the champion" in decision.reason


def test_older_data_than_the_champions_need_a_person(march: Names) -> None:
    frame, new, old, rate = march
    assert judge_challenger(frame, flight_delay, new, replace(old, last="2013-02"), rate).action == "promote"
    stale = judge_challenger(frame, flight_delay, replace(new, last=JANUARY), replace(old, last=FEBRUARY), rate)
    assert (stale.action, "older data" in stale.reason) == ("needs a person", True)


@pytest.mark.parametrize(("share_wrong", "wanted"), [(0.11, "needs a person"), (0.02, "reject")])
def test_what_is_too_good_to_be_true_is_not_promoted(march: Names, share_wrong: float, wanted: str) -> None:
    """A leak: it knows the answer mostly, and its probabilities are honest about that."""
    frame, new, _, rate = march
    label = frame["label"].to_numpy()
    wrong = np.random.default_rng(0).random(len(label)) < share_wrong
    knows = np.where(wrong, 1 - label, label)
    shares = pd.Series(label).groupby(knows).transform("mean").to_numpy()
    decision = judged(march, score=shares)
    assert (decision.action, "share of the loss gained" in decision.reason) == (wanted, True), decision.reason
    first = judge_challenger(frame, flight_delay, replace(new, score=shares), None, rate)
    assert first.action == "needs a person", "against a constant alone, as much can be gained honestly"


def test_what_is_served_otherwise_than_trained_is_refused_however_little_it_costs(march: Names) -> None:
    frame, new, _, _ = march
    flight = (frame["carrier"] == "HA").to_numpy()
    moved = np.where(flight, new.score + 0.01, new.score)
    assert judged(march, trained=new.score + 1e-6).action == "promote"
    decision = judged(march, score=moved, trained=new.score)
    assert 0 < flight.sum() < 40
    assert decision.action == "reject"
    assert f"rows served otherwise than trained +{flight.sum()}.0" in decision.reason


def test_a_ranking_that_is_turned_round_in_one_slice_needs_a_person(march: Names) -> None:
    """The labels of one hour are too few to see it; the scores are not."""
    frame, new, old, rate = march
    hour = 6.0
    near = 0.5 + 0.02 * (new.score - new.score.mean())  # next to nothing is said there, so next to nothing is lost
    rows = (frame["scheduled_hour"] == hour).to_numpy()
    base = np.full(len(frame), new.score[rows].mean())
    for sign, wanted in ((1, "promote"), (-1, "needs a person")):
        score = np.where(rows, base + sign * (near - near[rows].mean()), new.score)
        decision = judge_challenger(frame, flight_delay, replace(new, score=score), old, rate)
        assert decision.action == wanted, decision.reason
    assert f"ranking turned against old of scheduled_hour={hour:g}" in decision.reason


def test_what_nobody_said_is_named(march: Names) -> None:
    frame, new, old, rate = march
    assert set(judged(march).unchecked) == {"latency", "what was trained"}
    silent = judge_challenger(frame.drop(columns="period"), flight_delay, replace(new, last=""), None, rate)
    assert set(silent.unchecked) == {"months of the training", "what was trained"}
    told = {"seconds": np.ones(40), "trained": new.score}
    assert judge_challenger(frame, flight_delay, replace(new, **told), replace(old, **told), rate).unchecked == ()


def test_a_slow_model_is_refused_and_an_equally_fast_one_is_not(march: Names) -> None:
    frame, new, old, rate = march
    draw = np.random.default_rng(1)
    usual, same, slow = (draw.gamma(50, mean / 50, 200) for mean in (0.001, 0.001, 0.002))
    for seconds, wanted in ((same, "promote"), (slow, "reject")):
        timed = replace(new, seconds=seconds), replace(old, seconds=usual)
        assert judge_challenger(frame, flight_delay, *timed, rate).action == wanted
    few = replace(new, seconds=same[:10]), replace(old, seconds=usual[:10])
    assert judge_challenger(frame, flight_delay, *few, rate).action == "needs a person"


def test_a_few_days_decide_nothing_however_clear(march: Names) -> None:
    frame, new, old, rate = march
    days = frame["scheduled_departure"].dt.tz_convert("America/New_York").dt.day
    for last, wanted in ((13, "needs a person"), (14, "promote")):
        rows = (days <= last).to_numpy()
        some = replace(new, score=new.score[rows]), replace(old, score=old.score[rows])
        assert judge_challenger(frame[rows], flight_delay, *some, rate).action == wanted


def test_the_first_model_has_to_beat_the_constant(march: Names) -> None:
    frame, new, _, rate = march
    assert judge_challenger(frame, flight_delay, new, None, rate).action == "promote"
    constant = replace(new, score=np.full(len(frame), rate))
    assert judge_challenger(frame, flight_delay, constant, None, rate).action == "reject"


def test_a_bad_champion_is_no_excuse_for_being_worse_than_a_constant(march: Names) -> None:
    frame, new, _, rate = march
    random = np.random.default_rng(2).random(len(frame))
    awful, bad = Contender("awful", random), replace(new, score=0.3 * random + 0.5)
    decision = judge_challenger(frame, flight_delay, bad, awful, rate)
    assert next(check for check in decision.checks if check.name == "log loss against awful").verdict == "pass"
    assert decision.action == "reject"


def test_the_same_rows_get_the_same_answer(march: Names) -> None:
    assert judged(march) == judged(march)
    table = judged(march).table()
    assert {"name", "slice", "estimate", "low", "high", "limit", "verdict"} <= set(table)


# ---------------------------------------------------------------- what can't be compared


def test_scores_of_other_rows_are_not_compared(march: Names) -> None:
    with pytest.raises(GateError, match=r"new has scores of shape \(9,\)"):
        judged(march, score=march[1].score[:9])


def test_a_champion_whose_scores_are_no_probabilities_is_no_rival(march: Names) -> None:
    frame, new, old, rate = march
    with pytest.raises(GateError, match="old is a rival, and its scores"):
        judge_challenger(frame, flight_delay, new, replace(old, score=np.full(len(frame), np.nan)), rate)
    with pytest.raises(GateError, match="constant is a rival"):
        judge_challenger(frame, flight_delay, new, None, float("nan"))


def test_times_of_other_rows_are_not_compared(march: Names) -> None:
    frame, new, old, rate = march
    timed = replace(new, seconds=np.ones(40)), replace(old, seconds=np.ones(50))
    with pytest.raises(GateError, match="40 times of new and 50 of old"):
        judge_challenger(frame, flight_delay, *timed, rate)


def test_rows_without_labels_or_slices_are_refused(march: Names) -> None:
    frame, new, old, rate = march
    for wrong, told in ((frame.drop(columns="carrier"), "carrier"), (frame.assign(label=np.nan), "labels")):
        with pytest.raises(GateError, match=told):
            judge_challenger(wrong, flight_delay, new, old, rate)


# ---------------------------------------------------------------- checks, and what becomes of them


def check(kind: Any, low: float, estimate: float, high: float, **more: Any) -> GateCheck:
    return GateCheck("x", kind, estimate, low, high, 0.0, **more)


@pytest.mark.parametrize(
    ("one", "verdict", "action"),
    [
        (check("proof", -3, -2, -1), "pass", "promote"),
        (check("proof", -3, -2, 0), "inconclusive", "reject"),
        (check("proof", 1, 2, 3), "fail", "reject"),
        (check("proof", -3, -2, -1, count=13, min_count=14), "insufficient", "needs a person"),
        (check("guard", -1, 0, 1), "pass", "promote"),
        (check("guard", -1, 0.1, 1), "inconclusive", "needs a person"),
        (check("guard", 0.1, 0.5, 1), "fail", "reject"),
        (check("guard", -1, 0.1, 1, slice="a=1"), "inconclusive", "promote"),
        (check("guard", 0.1, 0.5, 1, slice="a=1"), "fail", "reject"),
        (check("guard", 0.1, 0.5, 1, slice="a=1", count=1, min_count=2), "insufficient", "promote"),
        (check("fact", 1, 1, 1, doubt=True), "inconclusive", "needs a person"),
        (check("guard", 0.1, 0.5, 1, slice="a=1", doubt=True), "inconclusive", "needs a person"),
        (check("guard", -0.1, 0.5, 1, slice="a=1", doubt=True), "inconclusive", "promote"),
    ],
)
def test_what_one_check_makes_of_an_otherwise_good_challenger(one: GateCheck, verdict: str, action: str) -> None:
    decision = decide_gate([check("proof", -3, -2, -1), one])
    assert (one.verdict, decision.action) == (verdict, action)
    assert bool(decision.watch) == (bool(one.slice) and verdict in ("inconclusive", "insufficient"))


def test_the_gravest_reason_comes_first() -> None:
    broken, unproven, few = check("guard", 1, 2, 3), check("proof", -1, 0, 1), check("proof", 1, 2, 3, min_count=2)
    assert decide_gate([unproven, few, broken]).action == "reject"
    assert decide_gate([unproven, few]).action == "needs a person"


def test_a_nan_is_never_good() -> None:
    nan = float("nan")
    for kind in ("proof", "guard", "fact"):
        assert check(kind, nan, nan, nan).verdict != "pass"


def test_an_interval_of_one_day_is_infinite() -> None:
    assert draw_interval(0.5, np.full(100, 0.5), 1, 0.05) == (-np.inf, np.inf)


# ---------------------------------------------------------------- as they are served


@pytest.mark.slow  # two models are trained, registered, packaged and timed
def test_registered_versions_are_judged_as_they_are_served(own_quarter: Quarter) -> None:
    home, data = own_quarter.settings, (own_quarter.features, own_quarter.rows)

    def registered(last: str, iterations: int) -> str:
        config = TrainingConfig(iterations=iterations, leaf_samples=50)
        return register(home, flight_delay, train_run(home, flight_delay, *data, JANUARY, last, config))

    relaxed = GateLimits(latency=100)  # this machine may be busy
    old = registered(JANUARY, 4)
    first = run_gate(home, flight_delay, old, *data, MARCH, MARCH, relaxed)
    assert first.action == "promote", first.reason
    promote(home, flight_delay, old, "the first one")
    new = registered(FEBRUARY, 60)
    decision = run_gate(home, flight_delay, "challenger", *data, MARCH, MARCH, relaxed)
    assert (new, decision.action) == ("flight-delay@2", "promote"), decision.reason
    looked_at = {check.name for check in decision.checks}
    assert {"latency, times the champion's", "calibration error", "rows served otherwise than trained"} <= looked_at
    assert decision.unchecked == ()
    assert run_gate(home, flight_delay, new, *data, FEBRUARY, MARCH, relaxed).action == "reject", "it has seen February"
    with pytest.raises(GateError, match="flight-delay@1 is the champion"):
        run_gate(home, flight_delay, old, *data, MARCH, MARCH)
    with pytest.raises(RegistryError):
        run_gate(home, flight_delay, "flight-delay@9", *data, MARCH, MARCH)


def test_times_are_taken_of_the_same_rows_in_turn() -> None:
    met: dict[str, list[int]] = {"one": [], "other": []}
    frame = pd.DataFrame({"row": range(7)})

    def scorer(name: str) -> Any:
        return lambda rows: met[name].append(int(rows["row"].iloc[0]))

    times = time_in_turn([scorer("one"), scorer("other")], frame, 20)
    assert met["one"] == met["other"]
    assert [len(each) for each in times] == [20, 20]
    assert all((each > 0).all() for each in times)
