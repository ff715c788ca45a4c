"""Money, baselines and leaks: thresholds are the cheapest there are, and what looks ahead in time is found."""

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from mlops_course.environment import CourseError
from mlops_course.framing import (
    Costs,
    FramingError,
    LeakError,
    constant_scores,
    cost_curve,
    cost_of_decisions,
    cost_per_row,
    find_leaks,
    known_too_late,
    limited_warnings,
    pretend_unknown,
    rate_scores,
    require_no_leaks,
)

COSTS = Costs(missed=150, warning=40)
Tables = dict[str, pd.DataFrame]
probabilities = st.sampled_from([0.0, 0.1, 4 / 15, 0.3, 0.5, 1.0]) | st.floats(0, 1)
rows = st.lists(st.tuples(st.integers(0, 1), probabilities, st.integers(0, 3)), min_size=1, max_size=40)


def columns(drawn: list[tuple[int, float, int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels, scores and groups."""
    label, score, group = zip(*drawn, strict=True)
    return np.array(label, dtype=np.float64), np.array(score), np.array(group)


# ---------------------------------------------------------------------------------------------------------------------
# Costs and decisions


@pytest.mark.parametrize(
    ("missed", "warning"), [(10, 40), (40, 40), (150, 0), (150, -1), (-5, -10), (float("nan"), 1), (float("inf"), 1)]
)
def test_costs_that_make_no_sense_are_refused(missed: float, warning: float) -> None:
    with pytest.raises(FramingError, match=rf"0 < warning < missed, not warning={warning}, missed={missed}"):
        Costs(missed=missed, warning=warning)


@given(st.floats(0, 1), st.floats(1, 100), st.floats(1.01, 100))
def test_at_the_threshold_a_warning_becomes_the_cheaper_decision(score: float, warning: float, times: float) -> None:
    costs = Costs(missed=warning * times, warning=warning)
    one = np.array([score])
    warn, stay_silent = (cost_of_decisions(one, np.array([decision]), costs) for decision in (True, False))
    if abs(score - costs.threshold) > 1e-9:
        assert (warn < stay_silent) == (score > costs.threshold)
    else:
        assert warn == pytest.approx(stay_silent)


@examples(deadline=None)
@given(st.lists(probabilities, min_size=1, max_size=6))
def test_no_other_decisions_are_expected_to_be_cheaper_than_those_of_the_threshold(drawn: list[float]) -> None:
    score = np.array(drawn)
    ours = cost_of_decisions(score, score >= COSTS.threshold, COSTS)
    every = itertools.product([True, False], repeat=len(score))
    assert ours == pytest.approx(min(cost_of_decisions(score, np.array(way), COSTS) for way in every))


@given(rows)
def test_costs_are_those_of_a_loop_over_the_rows(drawn: list[tuple[int, float, int]]) -> None:
    label, score, _ = columns(drawn)
    total = 0.0
    for truth, probability in zip(label, score, strict=True):
        if probability >= 40 / 150:
            total += 40
        elif truth:
            total += 150
    assert cost_per_row(label, score, COSTS) == pytest.approx(total / len(label))


@given(rows, st.lists(probabilities, min_size=1, max_size=5))
def test_the_curve_is_the_cost_at_each_threshold(drawn: list[tuple[int, float, int]], tried: list[float]) -> None:
    label, score, _ = columns(drawn)
    found = cost_curve(label, score, COSTS, np.array(tried))
    assert found == pytest.approx([cost_of_decisions(label, score >= threshold, COSTS) for threshold in tried])


def test_the_ends_of_the_curve_are_always_warning_and_never_warning() -> None:
    label, score = np.array([1.0, 0.0, 0.0]), np.array([0.2, 0.9, 0.4])
    assert cost_curve(label, score, COSTS, np.array([0.0, 1.1])).tolist() == [40.0, 50.0]


def test_frames_are_taken_as_they_come() -> None:
    frame = pd.DataFrame({"label": [1.0, 0.0], "score": [0.9, 0.1]}, index=[7, 3])
    assert cost_per_row(frame["label"], frame["score"], COSTS) == 20.0


WRONG_ROWS: list[tuple[Any, Any, str]] = [
    ([1.0, 0.0], [True], r"the shapes are late \(2,\), warned \(1,\).*Take the same rows"),
    ([[1.0]], [[True]], "one value per row"),
    ([], [], "late is empty"),
    ([1.0, np.nan], [True, False], r"1 of 2 values of late are missing.*Leave out"),
    ([1.0, 0.0], [0.9, 0.1], "True or False, not float64.*Compare the score with a threshold"),
]


@pytest.mark.parametrize(("late", "warned", "message"), WRONG_ROWS)
def test_rows_that_do_not_fit_are_refused(late: Any, warned: Any, message: str) -> None:
    with pytest.raises(FramingError, match=message):
        cost_of_decisions(np.array(late, dtype=np.float64), np.array(warned), COSTS)


def test_a_score_that_is_missing_is_not_silence() -> None:
    label, score = np.array([1.0, 0.0]), np.array([0.5, np.nan])
    for cost in (lambda: cost_per_row(label, score, COSTS), lambda: cost_curve(label, score, COSTS, np.array([0.5]))):
        with pytest.raises(FramingError, match="1 of 2 values of score are missing"):
            cost()


# ---------------------------------------------------------------------------------------------------------------------
# A desk that can do only so much


@given(rows, st.integers(0, 5), probabilities)
def test_limited_warnings_are_those_of_a_loop(
    drawn: list[tuple[int, float, int]], capacity: int, threshold: float
) -> None:
    _, score, group = columns(drawn)
    expected = np.zeros(len(score), dtype=bool)
    for value in set(group.tolist()):
        positions = [position for position in range(len(score)) if group[position] == value]
        for position in sorted(positions, key=lambda position: -score[position])[:capacity]:
            expected[position] = score[position] >= threshold
    assert limited_warnings(score, group, capacity, threshold).tolist() == expected.tolist()


@given(rows, st.integers(0, 5))
def test_capacity_is_kept_and_no_silent_row_scores_higher(drawn: list[tuple[int, float, int]], capacity: int) -> None:
    _, score, group = columns(drawn)
    warned = limited_warnings(score, group, capacity)
    for value in set(group.tolist()):
        inside = group == value
        assert warned[inside].sum() == min(capacity, inside.sum())
        if warned[inside].any() and (~warned[inside]).any():
            assert score[inside & warned].min() >= score[inside & ~warned].max()


def test_groups_may_be_dates_or_text() -> None:
    days = pd.Series(pd.to_datetime(["2013-01-01", "2013-01-02", "2013-01-01"]))
    assert limited_warnings(np.array([0.4, 0.1, 0.6]), days, 1).tolist() == [False, True, True]
    assert limited_warnings(np.array([0.4, 0.1, 0.6]), np.array(["a", "b", "a"]), 1).tolist() == [False, True, True]


@pytest.mark.parametrize("capacity", [-1, 2.5, True, "3"])
def test_a_capacity_is_a_whole_number(capacity: Any) -> None:
    with pytest.raises(FramingError, match=r"the capacity is .*whole number, 0 or more"):
        limited_warnings(np.array([0.1]), np.array([1]), capacity)


def test_every_row_needs_a_group() -> None:
    with pytest.raises(FramingError, match="1 of 2 values of group are missing"):
        limited_warnings(np.array([0.1, 0.2]), np.array(["a", None], dtype=object), 1)


# ---------------------------------------------------------------------------------------------------------------------
# Baselines

PAST = pd.DataFrame({"carrier": ["AA"] * 4 + ["UA"] * 2, "origin": ["JFK"] * 6, "label": [1.0, 1, 1, 0, 0, 0]})


def test_the_constant_baseline_knows_the_base_rate_of_the_past() -> None:
    assert constant_scores(PAST, 3).tolist() == [0.5, 0.5, 0.5]


def test_rows_without_a_label_teach_nothing() -> None:
    past = pd.concat([PAST, pd.DataFrame({"carrier": ["AA"], "origin": ["JFK"], "label": [np.nan]})])
    assert constant_scores(past, 1) == constant_scores(PAST, 1)
    assert (rate_scores(past, PAST, ["carrier"]) == rate_scores(PAST, PAST, ["carrier"])).all()


@pytest.mark.parametrize("past", [PAST.drop(columns="label"), PAST.assign(label=np.nan), PAST.head(0)])
def test_a_past_without_outcomes_is_refused(past: pd.DataFrame) -> None:
    for baseline in (lambda: constant_scores(past, 1), lambda: rate_scores(past, PAST, ["carrier"])):
        with pytest.raises(FramingError, match="no known label"):
            baseline()


@examples(deadline=None)
@given(st.lists(st.tuples(st.sampled_from("ABC"), st.integers(0, 1)), min_size=1, max_size=30), st.floats(0, 100))
def test_rates_are_those_of_a_loop(drawn: list[tuple[str, int]], weight: float) -> None:
    past = pd.DataFrame(drawn, columns=["carrier", "label"]).astype({"label": "float64"})
    future = pd.DataFrame({"carrier": list("CABZ")}, index=[9] * 4)
    overall = past["label"].mean()
    expected = []
    for carrier in future["carrier"]:
        labels = [label for name, label in drawn if name == carrier]
        expected.append((sum(labels) + weight * overall) / (len(labels) + weight) if labels else overall)
    assert rate_scores(past, future, ["carrier"], weight).tolist() == pytest.approx(expected)


@given(st.floats(0, 1000), st.floats(0, 1000))
def test_more_weight_pulls_every_rate_nearer_to_the_overall_rate(one: float, other: float) -> None:
    little, much = (rate_scores(PAST, PAST, ["carrier"], weight) for weight in sorted([one, other]))
    assert (np.abs(much - 0.5) <= np.abs(little - 0.5) + 1e-12).all()


@pytest.mark.parametrize(
    ("names", "weight", "message"),
    [
        (["airline"], 1.0, "column 'airline' is not in both"),
        ([], 1.0, r"can't make rates by \[\]"),
        (["carrier"], -1.0, "weight -1.0"),
        (["carrier"], float("nan"), "weight nan"),
    ],
)
def test_rates_that_cannot_be_made_are_refused(names: list[str], weight: float, message: str) -> None:
    with pytest.raises(FramingError, match=message):
        rate_scores(PAST, PAST, names, weight)


# ---------------------------------------------------------------------------------------------------------------------
# Leaks


def some_flights(number: int = 200, seed: int = 1) -> Tables:
    """Flights with the time at which each is asked about and left, and hourly weather with the time of publication."""
    random = np.random.default_rng(seed)
    start = pd.Timestamp("2013-03-01T06:00:00Z")
    scheduled = (start + pd.to_timedelta(np.sort(random.integers(0, 3000, number)), unit="min")).to_series()
    flights = pd.DataFrame({"scheduled": scheduled.array, "predicted_at": (scheduled - pd.Timedelta("2h")).array})
    flights["dep_delay"] = random.integers(-10, 200, number).astype(np.float64)
    flights.loc[::17, "dep_delay"] = np.nan  # cancelled: the delay is never known
    flights["departed"] = flights["scheduled"] + pd.to_timedelta(flights["dep_delay"], unit="min")
    flights["carrier"] = random.choice(["AA", "UA"], number)
    flights["diverted"] = random.random(number) < 0.2
    flights["gate"] = random.choice(["A1", "B2"], number)
    hours = pd.DataFrame({"hour": start + pd.to_timedelta(np.arange(-5, 60), unit="h"), "temp": random.random(65)})
    return {"flights": flights, "weather": hours.assign(published=hours["hour"] + pd.Timedelta("1h"))}


KNOWN = {
    "flights": {"dep_delay": "departed", "departed": "departed", "diverted": "departed", "gate": "departed"},
    "weather": {"temp": "published"},
}


def leaks_of(compute: Callable[[Tables], pd.DataFrame], **changes: Any) -> pd.DataFrame:
    """What the test for leaks finds in a feature function."""
    tables = some_flights()
    given: dict[str, Any] = {"tables": tables, "known": KNOWN, "predicted_at": tables["flights"]["predicted_at"]}
    return find_leaks(compute, **(given | changes))


def honest(tables: Tables) -> pd.DataFrame:
    """The schedule, the delay of the flight that left last, the weather that was published last."""
    flights, weather = tables["flights"], tables["weather"].sort_values("published")
    gone = flights.dropna(subset="departed").sort_values("departed")[["departed", "dep_delay"]]
    last = pd.merge_asof(flights, gone, left_on="predicted_at", right_on="departed", suffixes=("_own", ""))
    sky = pd.merge_asof(flights, weather, left_on="predicted_at", right_on="published")
    return pd.DataFrame(
        {"carrier": flights["carrier"], "last_delay": last["dep_delay"], "temp": sky["temp"]}, index=flights.index
    )


def leaking(column: str, of: Callable[[Tables], Any]) -> Callable[[Tables], pd.DataFrame]:
    """The honest features and one that isn't."""
    return lambda tables: honest(tables).assign(**{column: of(tables)})


def test_honest_features_do_not_move() -> None:
    found = leaks_of(honest)
    assert found.empty and list(found.columns) == ["rows", "example"]
    require_no_leaks(found)


def weather_at_departure(tables: Tables) -> pd.Series:
    """The classic: the weather of the hour in which the flight leaves, which is two hours away."""
    hours = tables["weather"].set_index("hour")["temp"]
    return tables["flights"]["scheduled"].dt.floor("h").map(hours)


LEAKS: dict[str, Callable[[Tables], Any]] = {
    "own delay": lambda tables: tables["flights"]["dep_delay"],
    "a comparison": lambda tables: (tables["flights"]["dep_delay"] > 15).astype(np.float64),
    "the other comparison": lambda tables: (tables["flights"]["dep_delay"] < 300).astype(np.float64),
    "whether it was cancelled": lambda tables: tables["flights"]["dep_delay"].isna().astype(np.float64),
    "a mean over everything": lambda tables: tables["flights"]["dep_delay"].mean(),
    "the time of departure": lambda tables: (
        tables["flights"]["departed"] - tables["flights"]["scheduled"]
    ).dt.total_seconds(),
    "a flag": lambda tables: tables["flights"]["diverted"].astype(np.float64),
    "text": lambda tables: tables["flights"]["gate"],
    "the next flight": lambda tables: tables["flights"]["dep_delay"].shift(-1),
    "the last flight by schedule": lambda tables: tables["flights"]["dep_delay"].shift(1),
    "weather at departure": weather_at_departure,
}


@pytest.mark.parametrize("name", LEAKS)
def test_a_planted_leak_is_found_and_no_other_feature_is_blamed(name: str) -> None:
    found = leaks_of(leaking(name, LEAKS[name]))
    assert found.index.tolist() == [name]
    assert found.loc[name, "rows"] >= 1
    with pytest.raises(LeakError, match=rf"not known at prediction time: {name} \(\d+ rows\)"):
        require_no_leaks(found)


def test_the_example_of_a_leak_is_a_row_that_was_asked_about_before_its_flight_left() -> None:
    flights = some_flights()["flights"]
    example = leaks_of(leaking("leak", LEAKS["own delay"])).loc["leak", "example"]
    assert example in flights.index
    assert not flights.loc[example, "departed"] <= flights.loc[example, "predicted_at"]


def test_the_data_are_left_as_they_were() -> None:
    tables = some_flights()

    def careless(given: Tables) -> pd.DataFrame:
        features = honest(given)
        given["flights"]["dep_delay"] = 0.0
        return features

    assert leaks_of(careless, tables=tables).empty
    pd.testing.assert_frame_equal(tables["flights"], some_flights()["flights"])


def test_a_function_that_is_different_each_time_proves_nothing() -> None:
    random = np.random.default_rng(0)
    with pytest.raises(FramingError, match=r"'noise' is different each time.*Fix its seed"):
        leaks_of(leaking("noise", lambda tables: random.random(len(tables["flights"]))))


def test_features_that_do_not_fit_the_predictions_are_refused() -> None:
    with pytest.raises(FramingError, match="do not fit the predictions"):
        leaks_of(lambda tables: honest(tables).iloc[1:])
    with pytest.raises(FramingError, match="do not fit the predictions"):
        leaks_of(lambda tables: honest(tables)["temp"])


def test_names_that_depend_on_the_data_are_refused() -> None:
    with pytest.raises(FramingError, match="names depend on the data"):
        leaks_of(lambda tables: honest(tables).add_suffix(str(tables["flights"]["dep_delay"].max() > 1000)))


@pytest.mark.parametrize(
    "known", [{}, {"flights": {}}, {"trains": {"delay": "left"}}], ids=["nothing", "no column", "another table"]
)
def test_a_test_that_could_not_fail_is_refused(known: dict[str, dict[str, str]]) -> None:
    with pytest.raises(FramingError, match="Say when each prediction is made"):
        leaks_of(honest, known=known)


def test_a_column_that_is_not_there_is_named() -> None:
    with pytest.raises(FramingError, match=r"no column 'delay'.*There are scheduled, predicted_at"):
        leaks_of(honest, known={"flights": {"delay": "departed"}})


def test_a_prediction_without_a_time_is_refused() -> None:
    times = some_flights()["flights"]["predicted_at"].copy()
    times.iloc[3] = pd.NaT
    with pytest.raises(FramingError, match="Say when each prediction is made"):
        leaks_of(honest, predicted_at=times)


def test_only_what_was_unknown_is_replaced() -> None:
    flights = some_flights()["flights"]
    moment = flights["predicted_at"].iloc[100]
    changed = pretend_unknown(flights, KNOWN["flights"], moment)
    was_known = flights["departed"] <= moment
    assert was_known.any() and not was_known.all()
    pd.testing.assert_frame_equal(changed[was_known], flights[was_known])
    assert (changed.loc[~was_known, "dep_delay"] == 1e6).all()
    assert not (changed.loc[~was_known, "departed"] <= moment).any()
    assert (changed.loc[~was_known, "gate"] == "nonsense 1e+06").all()
    untouched = ["scheduled", "predicted_at", "carrier"]
    pd.testing.assert_frame_equal(changed[untouched], flights[untouched])


def test_categories_are_refused_with_a_way_out() -> None:
    flights = some_flights()["flights"].astype({"gate": "category"})
    with pytest.raises(FramingError, match=r"'gate' holds category.*Make it text or numbers"):
        pretend_unknown(flights, {"gate": "departed"}, flights["predicted_at"].iloc[0])


def test_columns_that_are_known_too_late_are_listed_with_how_late() -> None:
    flights = some_flights()["flights"]
    weeks_ahead = flights["scheduled"] - pd.Timedelta("30D")
    known = pd.DataFrame({"schedule": weeks_ahead, "now": flights["predicted_at"], "dep_delay": flights["departed"]})
    found = known_too_late(known, flights["predicted_at"])
    assert found.index.tolist() == ["dep_delay"]
    line = found.loc["dep_delay"]
    assert line["never"] == flights["departed"].isna().sum() > 0
    assert line["rows"] == (~(flights["departed"] <= flights["predicted_at"])).sum() == line["share"] * len(flights)
    assert line["typical"] == (flights["departed"] - flights["predicted_at"]).median()
    with pytest.raises(LeakError, match=r"dep_delay \(200 rows\)"):
        require_no_leaks(found)
    require_no_leaks(known_too_late(known[["schedule", "now"]], flights["predicted_at"]))


def test_times_that_do_not_fit_are_refused() -> None:
    flights = some_flights()["flights"]
    known = flights[["departed"]]
    for times in (flights["predicted_at"].iloc[1:], flights["predicted_at"].where(flights.index > 0)):
        with pytest.raises(FramingError, match="Give one row and one time"):
            known_too_late(known, times)


def test_every_error_here_is_one_of_the_courses() -> None:
    assert issubclass(LeakError, FramingError) and issubclass(FramingError, CourseError)
