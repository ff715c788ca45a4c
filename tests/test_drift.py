"""Any two tables can be compared; what broke is found in its first batch, and what didn't rings no bell."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from scipy.spatial.distance import jensenshannon

from mlops_course.monitoring.bins import MonitoringError, bin_codes, bin_counts, bin_edges, category_codes, sorted_edges
from mlops_course.monitoring.columns import kind_of, numbers_of, read_pair
from mlops_course.monitoring.comparing import drift, label_drift, prediction_drift
from mlops_course.monitoring.concept import concept_drift
from mlops_course.monitoring.distances import (
    chi_square,
    cramers_v,
    js_distance,
    ks_distance,
    stability_index,
    step_distances,
    steps_of,
    wasserstein,
)  # fmt: skip
from mlops_course.monitoring.floors import chance_index, most_by_chance, noise_floor, question_risk, usual_limit
from mlops_course.monitoring.profiles import profile_drift, profile_frame
from mlops_course.project.supplier import calendar_month, find_file, read_file, supplier_folder

# ---------------------------------------------------------------- distances

SAMPLES = {
    "normal": (np.random.default_rng(1).normal(0, 1, 900), np.random.default_rng(2).normal(0.3, 2, 700)),
    "ties": (np.random.default_rng(3).integers(0, 9, 500) * 1.0, np.random.default_rng(4).integers(2, 12, 333) * 1.0),
    "constant": (np.full(50, 4.0), np.full(60, 5.0)),
    "float32": tuple(np.random.default_rng(5).exponential(1, (2, 400)).astype(np.float32)),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_distances_are_those_of_scipy(name: str) -> None:
    then, now = SAMPLES[name]
    assert ks_distance(then, now) == pytest.approx(stats.ks_2samp(then, now).statistic, abs=1e-12)
    scale = then.astype("float64").std() or 1.0
    assert wasserstein(then, now) == pytest.approx(stats.wasserstein_distance(then, now) / scale, rel=1e-5)
    edges = bin_edges(then)
    bins = [np.bincount(bin_codes(part, edges), minlength=len(edges) + 3) for part in (then, now)]
    assert js_distance(*bins) == pytest.approx(float(jensenshannon(*bins, base=2)), abs=1e-9)
    table = np.array(bins)[:, np.sum(bins, axis=0) > 0]
    assert chi_square(*bins) == pytest.approx(stats.chi2_contingency(table, correction=False).statistic)
    assert cramers_v(*bins) == pytest.approx(stats.contingency.association(table, method="cramer"))


def test_a_side_without_rows_has_no_distance() -> None:
    nothing, some = np.array([0, 0]), np.array([1, 2])
    assert np.isnan([js_distance(nothing, some), cramers_v(some, nothing), ks_distance(np.empty(0), np.ones(2))]).all()
    assert np.isnan(step_distances(steps_of(np.ones(2)), steps_of(np.empty(0)))).all()
    assert chi_square(nothing, some) == 0


@pytest.mark.parametrize("seed", range(5))
def test_counting_in_order_is_counting_one_by_one(seed: int) -> None:
    random = np.random.default_rng(seed)
    values = np.where(random.random(500) < 0.3, 0, random.normal(0, 2, 500)).round(seed)
    values[random.random(500) < 0.1] = np.nan
    there = np.sort(values[~np.isnan(values)])
    edges = bin_edges(values)
    assert edges.tolist() == sorted_edges(there[there != 0]).tolist()
    counted = bin_counts(there, int(np.isnan(values).sum()), edges)
    assert counted.tolist() == np.bincount(bin_codes(values, edges), minlength=len(edges) + 3).tolist()


def test_rare_texts_share_a_bin_and_unseen_ones_another() -> None:
    then, now, texts = category_codes(pd.Series([*"aaabbc", None]), pd.Series(["c", "z", "a", None]), most=2)
    assert texts == ["a", "b"]
    assert then.tolist() == [0, 0, 0, 1, 1, 2, 4]
    assert now.tolist() == [2, 3, 0, 4]


# ---------------------------------------------------------------- what is normal


def test_a_report_shares_its_risk_out() -> None:
    assert question_risk(1) == 1e-4
    assert question_risk(1000) == pytest.approx(1e-5)
    then = np.array([500, 500, 500])
    assert chance_index(then, then, 1e-6) > chance_index(then, then, 1e-4)


@pytest.mark.parametrize("blocks", [8, 30, 90])
def test_an_ordinary_block_stays_below_what_is_usual(blocks: int) -> None:
    random = np.random.default_rng(blocks)
    above = sum(usual_limit(random.lognormal(-2, 1, blocks), 1e-4) < random.lognormal(-2, 1) for _ in range(400))
    assert above <= 3
    few = np.array([0.1, 0.3])
    assert usual_limit(few, 1e-4) == 0.3, "of few, the largest"


def test_the_floor_of_many_blocks_survives_one_that_is_broken() -> None:
    alike = np.random.default_rng(0).multinomial(1000, [0.25] * 4, size=12)
    broken = np.vstack([alike, [[1000, 0, 0, 0]]])
    assert noise_floor(broken) < 0.25


def test_chance_alone_has_no_more_new_values_than_is_said() -> None:
    random = np.random.default_rng(0)
    for _ in range(50):
        past, now = random.zipf(1.5, 3000), random.zipf(1.5, 500)
        values, times = np.unique(past, return_counts=True)
        assert (~np.isin(now, values)).sum() <= most_by_chance(float((times == 1).sum()), 3000, 500)


# ---------------------------------------------------------------- columns

ODD = {
    "text": ["a", "b", None, "a"],
    "numbers": [1.5, 2.5, None, 4.0],
    "whole": [1, 2, 3, 4],
    "truth": [True, False, None, True],
    "empty": [None] * 4,
    "constant": [7.0] * 4,
    "mixed": [1, "a", 2.5, None],
    "lists": [[1], [2], None, [1]],
    "dicts": [{"a": 1}, {}, None, {}],
    "infinite": [1.0, np.inf, -np.inf, 2.0],
    "times": pd.to_datetime(["2013-01-01", None, "2013-01-03", "2013-01-04"]),
    "bytes": [b"a", b"b", None, b"a"],
    "complex": [1j, 2j, 0j, 1j],
    "number text": ["1", "2", "x", None],
    "huge": [2**70, 1, 2, 3],
}


@pytest.mark.parametrize("then", ODD)
def test_no_column_stops_a_report_whatever_it_has_become(then: str) -> None:
    reference, good = pd.Series(list(ODD[then]) * 100), pd.Series(np.arange(400) % 7.0)
    for now, values in ODD.items():
        current = pd.Series(list(values) * 100)
        table = drift(pd.DataFrame({"odd": reference, "good": good}), pd.DataFrame({"odd": current, "good": good + 50}))
        assert table.loc["good", "alarm"], now
        assert not table.loc["odd", "problem"].startswith("can't be compared"), now
        if then == now:
            assert not table.loc["odd", "alarm"], now


def test_what_a_column_holds_is_read_from_its_values() -> None:
    kinds = {
        name: kind_of(pd.Series(list(values), dtype=None if name == "times" else "object"))
        for name, values in ODD.items()
    }
    assert kinds["text"] == kinds["bytes"] == kinds["number text"] == "categorical"
    assert kinds["numbers"] == kinds["whole"] == kinds["truth"] == kinds["infinite"] == "numeric"
    assert (kinds["empty"], kinds["mixed"], kinds["lists"], kinds["times"]) == ("empty", "mixed", "nested", "time")
    assert numbers_of(pd.Series(["1", "x"]))[0].tolist()[0] == 1


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda column: column.astype("str"), "numbers have become text"),
        (lambda column: pd.Series([[1]] * len(column)), "numbers have become lists"),
        (
            lambda column: column.astype("object").where(column.index % 2 == 0, "n/a"),
            "numbers have become numbers and text",
        ),
    ],
)
def test_another_type_is_an_alarm_by_itself(change: object, told: str) -> None:
    column = pd.Series(np.arange(400) % 7.0)
    row = drift(pd.DataFrame({"x": column}), pd.DataFrame({"x": change(column)})).loc["x"]  # type: ignore[operator]
    assert row["alarm"] and told in row["why"] and told in row["problem"]


def test_precision_is_no_drift() -> None:
    column = pd.Series(np.where(np.arange(1000) % 3, 0.3, np.arange(1000) / 7))
    pair = read_pair(column.astype("float32"), column)
    assert pair.then.tolist() == pair.now.tolist()


def test_absent_and_double_columns_are_named() -> None:
    frame = pd.DataFrame({"a": [1.0] * 50, "b": [2.0] * 50})
    table = drift(frame, frame.rename(columns={"b": "c"}))
    assert table.loc["b", ["alarm", "why"]].tolist() == [True, "absent from the current data"]
    assert table.loc["c", ["alarm", "problem"]].tolist() == [False, "absent from the reference"]
    double = pd.concat([frame, frame[["a"]]], axis=1)
    assert "two columns have this name" in drift(double, double).loc["a", "problem"]


# ---------------------------------------------------------------- one verdict


def test_a_verdict_and_its_reasons_never_disagree() -> None:
    random, frames = np.random.default_rng(3), []
    for shift in (0.0, 2.0):
        frame = pd.DataFrame({f"x{number}": random.normal(shift * (number % 2), 1, 2000) for number in range(20)})
        frame["gaps"] = frame["x0"].mask(frame.index % 10 < 9 * (shift > 0))
        frame["kind"] = random.choice(["a", "b", "c" if shift else "a"], 2000)
        frames.append(frame)
    table = drift(*frames)
    assert (table["alarm"] == ((table["why"] != "") & ~table["why"].str.startswith("no verdict"))).all()
    assert (table["alarm"] >= table["missing_alarm"]).all() and (table["alarm"] >= table["new_alarm"]).all()
    assert table["alarm"].sum() == 12
    assert table.loc["kind", "new_categories"] == "c"


def test_a_column_gone_missing_is_no_zero() -> None:
    then = pd.DataFrame({"x": np.random.default_rng(0).normal(5, 1, 4000)})
    now = then.assign(x=then["x"].where(then.index % 20 == 0))
    row = drift(then, now).loc["x"]
    assert row["psi"] > 1 and row["missing_alarm"] and "95.0% missing, 0.0% before" in row["why"]
    assert stability_index(np.array([4000]), np.array([200])) == 0, "what one gets without a bin for gaps"


def test_labels_as_text_and_as_numbers() -> None:
    late, often = pd.Series(["late", "on time"] * 500), pd.Series(["late"] * 900 + ["on time"] * 100)
    assert label_drift(late, often)["alarm"] and not label_drift(late, late)["alarm"]
    numbers = pd.Series([1.0, 0.0] * 500)
    assert label_drift(numbers, numbers.astype(int))["psi"] == 0
    assert label_drift(numbers, numbers.astype(bool))["psi"] == 0
    scores = pd.Series(np.random.default_rng(0).random(1000))
    assert prediction_drift(scores, scores**3)["alarm"] and not prediction_drift(scores, scores)["alarm"]


def test_many_clean_columns_raise_no_alarm() -> None:
    random, alarms = np.random.default_rng(9), 0
    for _ in range(5):
        then, now = (pd.DataFrame(random.normal(0, 1, (rows, 200))) for rows in (4000, 900))
        alarms += int(drift(then, now)["alarm"].sum())
    assert alarms == 0


# ---------------------------------------------------------------- real data, day by day


@pytest.fixture(scope="module")
def winter() -> pd.DataFrame:
    """The flights of January to March with their weather, and the day of each."""
    root = supplier_folder()
    tables = {name: read_file(Path(str(find_file(root, name)))) for name in ("flights", "weather")}
    flights, weather = (table[table["month"] <= 3] for table in tables.values())
    key = ["origin", "month", "day", "hour"]
    values = ["temp", "humid", "wind_speed", "pressure", "visib", "precip"]
    frame = flights.merge(weather[[*key, *values]], on=key, how="left")
    frame["date"], frame["period"] = frame["month"] * 100 + frame["day"], calendar_month(frame)
    frame = frame.sort_values("date", kind="stable", ignore_index=True)
    return frame[["date", "carrier", "origin", "dest", "distance", "sched_dep_time", *values]]


FAULTS = {
    "another unit": ("wind_speed", lambda day: day["wind_speed"] * 1.609),
    "gone missing": ("temp", lambda day: day["temp"].where(np.arange(len(day)) % 20 == 0)),
    "a new airline": ("carrier", lambda day: day["carrier"].where(np.arange(len(day)) % 20 != 0, "ZZ")),
    "frozen": ("humid", lambda day: 60.0),
    "as text": ("distance", lambda day: day["distance"].astype("str")),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found_on_its_first_day(winter: pd.DataFrame, name: str) -> None:
    past, day = winter[winter["date"] < 320], winter[winter["date"] == 320]
    column, fault = FAULTS[name]
    table = drift(past, day.assign(**{column: fault(day)}), period="date")
    assert table.index[table["alarm"]].tolist() == [column]


def test_thirty_clean_days_raise_at_most_one_alarm(winter: pd.DataFrame) -> None:
    days = winter["date"].unique()[1::3][:30]
    alarms = {}
    for day in days:
        table = drift(winter[winter["date"] != day], winter[winter["date"] == day], period="date")
        if table["alarm"].any():
            alarms[int(day)] = table.loc[table["alarm"], "why"].to_dict()
    assert len(alarms) <= 1, alarms


# ---------------------------------------------------------------- concept


def scored(rows: int, more: float = 0.0, power: float = 1.0, seed: int = 0) -> pd.DataFrame:
    """Scores, and labels that follow them, or that are more."""
    random = np.random.default_rng(seed)
    score = random.beta(2, 5, rows) ** power
    return pd.DataFrame({"score": score, "label": (random.random(rows) < score + more).astype(float)})


def test_labels_that_are_more_for_equal_scores_are_concept_drift_and_higher_scores_are_not() -> None:
    past = scored(20_000)
    found = concept_drift(past, scored(3000, more=0.12, seed=1))
    assert (
        found.alarm and found.effect == pytest.approx(0.12, abs=0.02) and found.shift == pytest.approx(0.12, abs=0.02)
    )
    assert found.bins["rows_now"].sum() == 3000
    assert not concept_drift(past, scored(3000, power=0.6, seed=2)).alarm
    assert not concept_drift(past, scored(20, more=0.12, seed=3)).alarm, "too few to say so"
    assert not any(concept_drift(past, scored(1000, seed=seed)).alarm for seed in range(10, 60))


def test_blocks_that_always_differ_are_normal() -> None:
    blocks = [scored(3000, more=0.1 * (number % 2), seed=number).assign(period=number) for number in range(6)]
    found = concept_drift(pd.concat(blocks), scored(3000, more=0.1, seed=9))
    assert found.floor > 0.05 and not found.alarm
    with pytest.raises(MonitoringError, match="can't compare 20 labelled scores with 0"):
        concept_drift(scored(20), scored(20).assign(label=np.nan))


# ---------------------------------------------------------------- short histories


@pytest.mark.parametrize("chunks", [1, 2, 3, 4, 7, 8, 9, 10])
@pytest.mark.parametrize("profiles", [False, True])
def test_however_few_chunks_a_history_has_it_is_enough(chunks: int, profiles: bool) -> None:
    """Other tools want so many chunks before they say anything, or leave the last rows out."""
    parts, (same, sent) = year_of(*[5.0] * chunks, rows=700), year_of(5.0, 5.0, rows=700, seed=9)
    sent["wind"] *= 1.609
    if profiles:
        tables = [profile_drift([profile_frame(each) for each in parts], profile_frame(now)) for now in (same, sent)]
    else:
        past = pd.concat([part.assign(period=number) for number, part in enumerate(parts)])
        tables = [drift(past, now) for now in (same, sent)]
    assert [table.index[table["alarm"]].tolist() for table in tables] == [[], ["wind"]]
    assert all(table["judged"].all() for table in tables)


# ---------------------------------------------------------------- seasons


def year_of(*means: float, rows: int = 1000, seed: int = 7) -> list[pd.DataFrame]:
    """A table for each mean: a temperature of that mean, beside wind in whole knots and a text."""
    random, tables = np.random.default_rng(seed), []
    for number, mean in enumerate(means):
        wind = random.poisson(12 + number % 2, rows).astype("float64")
        kind = random.choice(["a", "b", "c"], rows, p=[0.6, 0.3, 0.1])
        tables.append(pd.DataFrame({"temperature": random.normal(mean, 6, rows), "wind": wind, "kind": kind}))
    return tables


def seasonal_drift(now: pd.DataFrame, *seasons: pd.DataFrame) -> pd.DataFrame:
    """Drift against a winter of three months; and profiles give the same alarms."""
    blocks = year_of(0, 2, 1)
    table = drift(pd.concat([block.assign(month=n) for n, block in enumerate(blocks)]), now, period="month",
                  seasons=seasons)  # fmt: skip
    profiles = [profile_frame(block) for block in blocks]
    sketched = profile_drift(profiles, profile_frame(now), seasons=[profile_frame(each) for each in seasons])
    assert sketched["alarm"].to_dict() == table["alarm"].to_dict()
    return table


SUMMER = year_of(6, 12, 18, 22, seed=8)


def test_what_moves_with_the_season_is_quiet_within_the_known_span() -> None:
    (september,) = year_of(15, seed=9)
    alone, known = seasonal_drift(september), seasonal_drift(september, *SUMMER)
    assert alone.index[alone["alarm"]].tolist() == ["temperature"]
    assert not known["alarm"].any()
    assert known.loc["temperature", "season"] == alone.loc["temperature", "why"], "it is still said what has moved"
    same = [name for name in alone.columns if name not in ("alarm", "why", "season")]
    pd.testing.assert_frame_equal(alone[same].drop(columns=["new_alarm"]), known[same].drop(columns=["new_alarm"]))


def test_what_lies_beyond_all_seasons_is_an_alarm() -> None:
    (heat,) = year_of(36, seed=9)
    assert seasonal_drift(heat, *SUMMER).loc["temperature", "alarm"]


@pytest.mark.parametrize(
    ("column", "fault"),
    [
        ("wind", lambda now: now["wind"] * 1.609),
        ("temperature", lambda now: now["temperature"] * 1.8 + 32),
        ("temperature", lambda now: 15.0),
        ("temperature", lambda now: now["temperature"].astype("str")),
        ("wind", lambda now: now["wind"].where(now.index % 20 == 0)),
        ("kind", lambda now: now["kind"].where(now.index % 20 != 0, "new")),
    ],
    ids=["km/h", "Fahrenheit", "frozen", "as text", "gone missing", "a new text"],
)
def test_no_season_explains_what_is_broken(column: str, fault: object) -> None:
    (september,) = year_of(15, seed=9)
    table = seasonal_drift(september.assign(**{column: fault(september)}), *SUMMER)  # type: ignore[operator]
    assert table.index[table["alarm"]].tolist() == [column]


def test_one_broken_season_does_not_make_its_fault_normal() -> None:
    april, may, june, july = SUMMER
    silent, faster = july["wind"].where(july.index % 20 == 0), july["wind"] * 1.609
    for fault in (silent, faster):
        table = seasonal_drift(july.assign(wind=fault), april, may, june.assign(wind=fault))
        assert table.loc["wind", "alarm"], table.loc["wind", "season"]


def test_seasons_that_say_nothing_change_nothing() -> None:
    (september,) = year_of(15, seed=9)
    alone = seasonal_drift(september)
    for nothing in (SUMMER[0].head(0), SUMMER[0][["kind"]], SUMMER[0].assign(temperature="mild")):
        pd.testing.assert_frame_equal(seasonal_drift(september, nothing), alone)


def test_clean_columns_with_seasons_raise_no_alarm_and_a_known_reference_is_asked_once() -> None:
    random = np.random.default_rng(19)
    then, now, *seasons = (pd.DataFrame(random.normal(0, 1, (rows, 200))) for rows in (4000, 900, 900, 900))
    pd.testing.assert_frame_equal(drift(then, now, seasons=seasons), drift(then, now))
    assert not drift(then, now, seasons=seasons)["alarm"].any()
