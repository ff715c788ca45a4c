"""A trigger says yes or no with its reason, and can't storm."""

import threading
from dataclasses import replace

import pytest

from mlops_course.environment import CourseError, Settings
from mlops_course.monitoring import RetrainingPolicy, decide_retraining, retrain_if_needed
from mlops_course.monitoring.retraining import ModelState, RetrainingError, read_trainings, training_parameters
from mlops_course.project import flight_delay

POLICY = RetrainingPolicy()
CALM = ModelState("2013-11", "2013-01", "2013-09")
WORSE = replace(CALM, performance="the log loss is 13% above what the scores promised")


@pytest.mark.parametrize(
    ("state", "rule", "reason"),
    [
        (CALM, "none", "nothing has changed: trained to 2013-09, no alarm"),
        (WORSE, "performance", "13% above"),
        (replace(CALM, drifted=0.6), "drift", "60% of the features raise an alarm"),
        (replace(CALM, drifted=0.49), "none", "nothing has changed"),
        (ModelState("2013-12", "2012-01", "2013-06"), "age", "the model's training ended 6 months ago"),
        (ModelState("2013-11", "2012-01", "2013-06"), "none", "nothing has changed"),
        (ModelState("2013-05", "2013-01", "2013-03"), "new data", "2 new months since a training on 3"),
        (ModelState("2013-04", "2013-01", "2013-03"), "none", "nothing has changed"),
        (replace(WORSE, drifted=0.9), "performance", "13% above"),
    ],
)
def test_each_rule_says_why(state: ModelState, rule: str, reason: str) -> None:
    decision = decide_retraining(POLICY, state)
    assert (decision.rule, decision.retrain) == (rule, rule != "none")
    assert reason in decision.reason


@pytest.mark.parametrize(
    ("state", "brake"),
    [
        (replace(WORSE, trainings=("2013-11",)), "the last training was started 0 months ago, and 1 must pass"),
        (replace(WORSE, trainings=tuple(f"2013-0{month}" for month in range(1, 7))), "6 trainings within"),
        (replace(WORSE, month="2013-09"), "the model hasn't seen 0 months"),
        (replace(WORSE, month="2013-10"), "the model hasn't seen 1 month, "),
    ],
)
def test_each_brake_holds_back_and_says_what_for(state: ModelState, brake: str) -> None:
    decision = decide_retraining(POLICY, state)
    assert not decision.retrain
    assert decision.rule == "performance"
    assert decision.reason.startswith(f"held back: {brake}")
    assert "13% above" in decision.reason


def test_a_brake_ends_when_its_time_has_passed() -> None:
    spent = tuple(f"2013-0{month}" for month in range(1, 7))
    assert not decide_retraining(POLICY, replace(WORSE, month="2013-12", trainings=spent)).retrain
    assert decide_retraining(POLICY, replace(WORSE, month="2014-01", trainings=spent)).retrain
    assert decide_retraining(POLICY, replace(WORSE, month="2013-12", trainings=("2013-11",))).retrain


@pytest.mark.parametrize("wrong", [{"age": -1}, {"budget": "six"}, {"new_data": True}])
def test_a_policy_that_makes_no_sense_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(RetrainingError, match=f"the retraining policy's {next(iter(wrong))} is"):
        RetrainingPolicy(**wrong)  # type: ignore[arg-type]


# ---------------------------------------------------------------- starting


def test_the_newest_month_is_kept_for_the_test() -> None:
    assert training_parameters(WORSE) == {"first": "2013-01", "train_last": "2013-10", "test_last": "2013-11"}


def test_asked_again_and_again_it_trains_once(settings: Settings) -> None:
    started: list[dict[str, str]] = []
    asked = [
        retrain_if_needed(settings, flight_delay, WORSE, start=lambda _, given: started.append(given)) for _ in range(5)
    ]
    assert [each.retrain for each in asked] == [True] + [False] * 4
    assert started == [training_parameters(WORSE)]
    assert [(each.month, each.rule, each.outcome) for each in read_trainings(settings, flight_delay)] == [
        ("2013-11", "performance", "done")
    ]


def test_a_training_that_fails_counts_and_says_why(settings: Settings) -> None:
    def fail(*_: object) -> None:
        raise CourseError("the disk is full", "Make room")

    with pytest.raises(CourseError, match="the disk is full"):
        retrain_if_needed(settings, flight_delay, WORSE, start=fail)
    assert read_trainings(settings, flight_delay)[0].outcome == "failed: the disk is full. Make room."
    assert not retrain_if_needed(settings, flight_delay, WORSE, start=fail).retrain, "it doesn't storm"


def test_a_training_that_dies_was_written_down_before(settings: Settings) -> None:
    class Killed(BaseException):
        """As a signal would end it."""

    def die(*_: object) -> None:
        assert [each.outcome for each in read_trainings(settings, flight_delay)] == ["started"]
        raise Killed

    with pytest.raises(Killed):
        retrain_if_needed(settings, flight_delay, WORSE, start=die)
    assert read_trainings(settings, flight_delay)[0].outcome == "stopped"


def test_two_monitors_start_one_training(settings: Settings) -> None:
    begun, may_end = threading.Event(), threading.Event()

    def slow(*_: object) -> None:
        begun.set()
        assert may_end.wait(20)

    first = threading.Thread(target=retrain_if_needed, args=(settings, flight_delay, WORSE), kwargs={"start": slow})
    first.start()
    try:
        assert begun.wait(20)
        with pytest.raises(RetrainingError, match="a training of flight-delay is under way already"):
            retrain_if_needed(settings, flight_delay, WORSE, start=slow)
    finally:
        may_end.set()
        first.join()
    assert len(read_trainings(settings, flight_delay)) == 1


def test_a_damaged_record_is_named_and_not_taken_for_an_empty_one(settings: Settings) -> None:
    path = settings.home / "monitoring" / "flight-delay" / "trainings.json"
    path.parent.mkdir(parents=True)
    path.write_text("[{")
    with pytest.raises(RetrainingError, match=r"trainings\.json can't be read"):
        retrain_if_needed(settings, flight_delay, WORSE, start=lambda *_: None)


def test_who_resumes_a_month_brings_its_training_to_an_end_and_trains_no_second_time(settings: Settings) -> None:
    started: list[str] = []

    def stop(_: Settings, given: dict[str, str]) -> None:
        started.append(given["train_last"])
        raise KeyboardInterrupt

    for start in (stop, lambda _, given: started.append(given["train_last"])):
        try:
            answer = retrain_if_needed(settings, flight_delay, WORSE, start=start, resume=True)
        except KeyboardInterrupt:
            assert [each.outcome for each in read_trainings(settings, flight_delay)] == ["stopped"]
    again = retrain_if_needed(settings, flight_delay, replace(WORSE, performance=""), start=stop, resume=True)
    assert again == answer, "what was decided stays decided"
    assert answer.retrain and answer.rule == "performance"
    assert len(started) == 2
    assert [each.outcome for each in read_trainings(settings, flight_delay)] == ["done"]


def test_resuming_another_month_is_a_decision_of_its_own(settings: Settings) -> None:
    retrain_if_needed(settings, flight_delay, WORSE, start=lambda *_: None, resume=True)
    later = replace(CALM, month="2013-12", trained_last="2013-11")
    assert not retrain_if_needed(settings, flight_delay, later, start=lambda *_: None, resume=True).retrain
