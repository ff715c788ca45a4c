"""The features of a flight hold what was known two hours before it, and nothing else.

The proof has two halves. First, every feature of a sample of flights is computed a second time, slowly, by filters that
a reader can check at a glance; the two must agree exactly. Second, all that became known after a moment is replaced by
nonsense, and nothing that was asked before that moment may move.
"""

from collections.abc import Callable, Iterable
from datetime import date
from types import ModuleType, SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from mlops_course.data import (
    build_features,
    conform,
    months,
    read_table,
    replace_months,
)
from mlops_course.environment import Settings
from mlops_course.project import (
    DeliveryError,
    calendar_month,
    find_file,
    flight_delay,
    read_file,
    supplier_folder,
    windows,
)
from mlops_course.project import features as features_module
from mlops_course.project.features import flight_features

Tables = dict[str, pd.DataFrame]
Random = np.random.Generator
pytestmark = pytest.mark.filterwarnings("ignore:Series.values returning:DeprecationWarning")  # inside pyarrow

WHO = ["time_hour", "minute", "carrier", "flight", "origin", "dest", "scheduled_departure", "predicted_at"]
KEY = ["time_hour", "minute", "carrier", "flight", "origin"]
PLANNED = [
    "scheduled_hour", "scheduled_minute_of_day", "scheduled_arrival_minute_of_day", "weekday", "block_minutes",
    "distance", "planned_speed", "seats", "aircraft_age", "departures_same_hour_origin", "departures_same_hour_dest",
    "departures_same_hour_origin_carrier", "previous_leg_1_gap", "previous_leg_1_slack", "previous_leg_2_gap",
    "previous_leg_2_slack",
]  # fmt: skip


def minutes(number: float) -> pd.Timedelta:
    """A span of time."""
    return pd.Timedelta(minutes=number)


def when_scheduled(flights: pd.DataFrame) -> pd.Series:
    """Scheduled departure of each flight."""
    return flights["time_hour"] + pd.to_timedelta(flights["minute"], unit="m")


def features_of(tables: Tables, threads: int | None = None) -> pd.DataFrame:
    """The features, one row a flight, findable by the flight's key."""
    return flight_features(tables, threads=threads).set_index(KEY)


def assert_equal(actual: pd.DataFrame, expected: pd.DataFrame) -> None:
    """Equal to the last bit of each float32; NaN equals NaN. Names the column and the flight that differ."""
    assert list(actual.columns) == list(expected.columns)
    expected = expected.loc[actual.index]
    for name in actual.columns:
        left, right = actual[name], expected[name]
        different = (left != right) & (left.notna() | right.notna())
        assert not different.any(), f"{name}: {left[different].iloc[0]!r}, not {right[different].iloc[0]!r}; " + (
            f"flight {left[different].index[0]}; {different.sum()} flights differ"
        )


# ---------------------------------------------------------------------------------------------------------------------
# Real data


@pytest.fixture(scope="module")
def year() -> Tables:
    """All of 2013, as delivered, without the one impossible wind."""
    tables = {
        table.name: conform(read_file(find_file(supplier_folder(), table.name)), table.contract())
        for table in flight_delay.tables
    }
    return tables | {"weather": tables["weather"].query("not wind_speed > 150")}


@pytest.fixture(scope="module")
def year_features(year: Tables) -> pd.DataFrame:
    """Every feature of every flight of 2013."""
    return features_of(year)


def part(tables: Tables, first: str, last: str) -> Tables:
    """The flights scheduled, and the weather measured, from one day to another, excluded."""
    begin, end = pd.Timestamp(first, tz="UTC"), pd.Timestamp(last, tz="UTC")
    cut = {name: tables[name][tables[name]["time_hour"].between(begin, end, "left")] for name in ("flights", "weather")}
    return tables | cut


@pytest.fixture(scope="module")
def weeks(year: Tables) -> Tables:
    """Five weeks with a snow storm in front (8 February) and the change to summer time (10 March) near the end."""
    return part(year, "2013-02-07", "2013-03-14")


# ---------------------------------------------------------------------------------------------------------------------
# The second computation. It shares nothing with the package: one flight at a time, one filter for each sentence.

ZONES = dict.fromkeys(("BQN", "PSE", "SJU", "STT"), "America/Puerto_Rico")  # in the Caribbean, not in the list
GROUPS = {
    "system": [], "origin": ["origin"], "carrier": ["carrier"], "dest": ["dest"], "route": ["origin", "dest"],
    "origin_carrier": ["origin", "carrier"], "origin_hour": ["origin", "hour"], "flight_number": ["carrier", "flight"],
    "aircraft": ["tailnum"],
}  # fmt: skip
HOURS = {"30m": 0.5, "1h": 1, "2h": 2, "6h": 6, "2d": 48, "7d": 7 * 24, "28d": 28 * 24}
AFTER_LANDING = {  # what is known of a flight that has arrived: group and windows
    "late_rate": "system 2d, origin 2d, carrier 7d 28d, origin_hour 7d 28d, route 7d 28d, dest 7d 28d, "
    "flight_number 7d 28d, aircraft 7d 28d",
    "mean_delay": "system 2d, origin 2h 6h 2d, carrier 2h 6h 7d 28d, origin_hour 7d 28d, route 7d 28d, "
    "dest 2h 6h 7d 28d, flight_number 7d 28d, aircraft 7d 28d",
    "overrun": "route 6h 28d, dest 6h",
    "count": "flight_number 7d 28d, aircraft 7d 28d",
}
AFTER_DEPARTURE = {  # what is known of a flight that has left
    "departure_delay": "system 30m 1h 2h 6h, origin 30m 1h 2h 6h, carrier 2h 6h, origin_carrier 2h 6h, dest 2h 6h",
    "departed_late": "system 30m 1h 2h 6h, origin 30m 1h 2h 6h, carrier 2h 6h, origin_carrier 2h 6h",
}
OVERDUE = ("system", "origin", "carrier", "origin_carrier", "dest")
REPORTED = {
    "temperature": "temp", "dew_point": "dewp", "humidity": "humid", "wind_direction": "wind_dir",
    "wind_speed": "wind_speed", "wind_gust": "wind_gust", "precipitation": "precip",
    "pressure": "pressure", "visibility": "visib",
}  # fmt: skip
CHANGE = ("temperature", "humidity", "wind_speed", "precipitation", "pressure", "visibility")


def planned_minutes(flights: pd.DataFrame, airports: pd.DataFrame) -> pd.Series:
    """From gate to gate: until the destination's clocks next show the scheduled arrival."""
    zone_of, scheduled = ZONES | dict(airports[["faa", "tzone"]].dropna().to_numpy()), when_scheduled(flights)
    block = pd.Series(0.0, index=flights.index)
    for zone, some in flights.groupby(flights["dest"].map(lambda dest: zone_of.get(dest, "America/New_York"))):
        leaves = scheduled[some.index].dt.tz_convert(zone).dt.tz_localize(None)
        hours, rest = some["sched_arr_time"] // 100, some["sched_arr_time"] % 100
        arrives = leaves.dt.normalize() + pd.to_timedelta(hours, unit="h") + pd.to_timedelta(rest, unit="m")
        arrives = arrives.where(arrives >= leaves, arrives + pd.Timedelta(days=1))
        arrives = arrives.where(arrives < leaves + pd.Timedelta(days=1), arrives - pd.Timedelta(days=1))
        block[some.index] = (arrives - leaves).dt.total_seconds() / 60
    return block


def history(tables: Tables) -> SimpleNamespace:
    """All that ever happened, with the time at which it became known; NaT when it never did."""
    flights = tables["flights"].sort_values(KEY).reset_index(drop=True)
    flights["scheduled"] = when_scheduled(flights)
    flights["block"] = planned_minutes(flights, tables["airports"])
    flights["left"] = flights["scheduled"] + pd.to_timedelta(flights["dep_delay"], unit="m")
    arrived = flights["block"] + flights["arr_delay"]
    flights["arrived"] = flights["scheduled"] + pd.to_timedelta(arrived, unit="m")
    flights["late_rate"] = (flights["arr_delay"] > 15).astype("float64")
    flights["mean_delay"] = flights["arr_delay"]
    flights["overrun"] = flights["arr_delay"] - flights["dep_delay"]
    flights["departure_delay"] = flights["dep_delay"]
    flights["departed_late"] = (flights["dep_delay"] > 15).astype("float64")
    weather = tables["weather"].assign(published=tables["weather"]["time_hour"] + minutes(60))
    text = dict.fromkeys(("origin", "carrier", "dest", "tailnum"), "category")  # compared fast
    return SimpleNamespace(flights=flights.astype(text), weather=weather, planes=tables["planes"].set_index("tailnum"))


def alike(rows: pd.DataFrame, flight: pd.Series, group: str) -> np.ndarray:
    """Which rows belong to the same group as a flight; a missing tail number equals nothing."""
    mask = np.ones(len(rows), bool)
    for column in GROUPS[group]:
        mask &= (rows[column] == flight[column]).to_numpy(bool)
    return mask


def means(
    rows: pd.DataFrame, known: str, wanted: dict[str, str], flight: pd.Series, asked: pd.Timestamp
) -> dict[str, float]:
    """Means over the rows that became known within each window, its start excluded and its end included."""
    rows = rows[(rows[known] <= asked) & (rows[known] > asked - minutes(60 * HOURS["28d"]))]
    age, features = asked - rows[known], {}
    for statistic, text in wanted.items():
        for group, *spans in (words.split() for words in text.split(",")):
            same = alike(rows, flight, group)
            for window in spans:
                inside = same & (age < minutes(60 * HOURS[window])).to_numpy()
                value = inside.sum() if statistic == "count" else rows[statistic][inside].mean()
                features[f"{statistic}_{group}_{window}"] = value
    return features


def waiting(flights: pd.DataFrame, flight: pd.Series, asked: pd.Timestamp) -> dict[str, float]:
    """Flights past their schedule by less than six hours that have not left."""
    late = flights[(flights["scheduled"] <= asked) & (flights["scheduled"] > asked - minutes(360))]
    late = late[late["left"].isna() | (late["left"] > asked)]
    features = {}
    for group in OVERDUE:
        mine = late[alike(late, flight, group)]
        features[f"overdue_{group}"] = len(mine)
        features[f"overdue_minutes_{group}"] = (asked - mine["scheduled"]).dt.total_seconds().sum() / 60
    return features


def earlier_leg(legs: pd.DataFrame, flight: pd.Series, asked: pd.Timestamp, steps: int) -> dict[str, float]:
    """The last (or the last but one) departure of the same aircraft within two days, as it looked when asked."""
    values = dict.fromkeys(("state", "delay", "gap", "slack", "slack_left"), np.nan)
    if len(legs) >= steps and flight["scheduled"] - legs.iloc[-steps]["scheduled"] < pd.Timedelta(days=2):
        leg = legs.iloc[-steps]
        if leg["arrived"] <= asked:
            values |= {"state": 3, "delay": leg["arr_delay"]}
        elif leg["left"] <= asked:
            values |= {"state": 2, "delay": leg["dep_delay"]}
        elif leg["scheduled"] <= asked:
            values |= {"state": 1, "delay": (asked - leg["scheduled"]).total_seconds() / 60}
        else:
            values["state"] = 0
        values["gap"] = (flight["scheduled"] - leg["scheduled"]).total_seconds() / 60
        values["slack"] = values["gap"] - 2 * leg["block"]
        values["slack_left"] = values["slack"] - (0 if values["state"] == 0 else values["delay"])
    return {f"previous_leg_{steps}_{name}": value for name, value in values.items()}


def newest_report(weather: pd.DataFrame, origin: str, at: pd.Timestamp) -> dict[str, np.float32]:
    """The last report published, unless it is six hours old or older."""
    out = weather[(weather["origin"] == origin) & (weather["published"] <= at)]
    out = out[out["published"] > at - minutes(360)]
    row = out.loc[out["published"].idxmax()] if len(out) else dict.fromkeys(REPORTED.values(), np.nan)
    return {name: np.float32(row[column]) for name, column in REPORTED.items()}


def by_hand(world: SimpleNamespace, position: int) -> dict[str, float]:
    """Every feature of one flight, from what was known two hours before it."""
    flight = world.flights.iloc[position]
    asked = flight["scheduled"] - minutes(120)
    near = (world.flights["scheduled"] - asked).between(pd.Timedelta(days=-31), pd.Timedelta(days=1))
    flights = world.flights[near]  # nothing is delayed by more than three days, no window is longer than 28
    plane = world.planes.loc[flight["tailnum"]] if flight["tailnum"] in world.planes.index else {}
    hour = flights[flights["time_hour"] == flight["time_hour"]]
    now = newest_report(world.weather, flight["origin"], asked)
    before = newest_report(world.weather, flight["origin"], asked - minutes(240))
    legs = flights.loc[: position - 1]
    legs = legs[alike(legs, flight, "aircraft")]
    features = {
        "scheduled_hour": flight["hour"],
        "scheduled_minute_of_day": flight["sched_dep_time"] // 100 * 60 + flight["sched_dep_time"] % 100,
        "scheduled_arrival_minute_of_day": flight["sched_arr_time"] // 100 * 60 + flight["sched_arr_time"] % 100,
        "weekday": date(flight["year"], flight["month"], flight["day"]).weekday(),
        "block_minutes": flight["block"], "distance": flight["distance"],
        "planned_speed": flight["distance"] / max(flight["block"], 1),
        "seats": plane.get("seats", np.nan), "aircraft_age": flight["year"] - plane.get("year", np.nan),
        "departures_same_hour_origin": alike(hour, flight, "origin").sum(),
        "departures_same_hour_origin_carrier": alike(hour, flight, "origin_carrier").sum(),
        "departures_same_hour_dest": alike(hour, flight, "dest").sum(),
    }  # fmt: skip
    features |= now | {f"{name}_change_4h": now[name] - before[name] for name in CHANGE}
    features |= means(flights, "arrived", AFTER_LANDING, flight, asked)
    features |= means(flights, "left", AFTER_DEPARTURE, flight, asked)
    features |= waiting(flights, flight, asked)
    return features | earlier_leg(legs, flight, asked, 1) | earlier_leg(legs, flight, asked, 2)


def all_by_hand(tables: Tables, choose: Callable[[pd.DataFrame], Iterable[int]]) -> pd.DataFrame:
    """The features of some flights; `choose` picks their positions among the flights sorted by key."""
    world = history(tables)
    positions = list(choose(world.flights))
    rows = pd.DataFrame([by_hand(world, position) for position in positions], dtype="float64")
    rows.index = pd.MultiIndex.from_frame(world.flights.iloc[positions][KEY])
    return rows.astype("float32")


def compare(expected: pd.DataFrame, actual: pd.DataFrame) -> None:
    """Equal, exactly. No tolerance is needed.

    All sums are sums of whole minutes below 2**24, which float32 holds as they are, and a quotient rounded to float64
    and then to float32 is the quotient rounded to float32. Weather is rounded to float32 before it is subtracted.
    """
    assert_equal(expected, actual[list(expected.columns)])


# ---------------------------------------------------------------------------------------------------------------------
# Both computations agree


def sample_of_the_year(flights: pd.DataFrame) -> list[int]:
    """Some flights of each month, and more of each kind that is easy to get wrong."""
    random = np.random.default_rng(2013)
    local_day = list(zip(flights["month"], flights["day"], strict=True))
    at_once = flights["tailnum"].notna() & flights.duplicated(["tailnum", "scheduled"], keep=False)
    kinds = {f"month {month}": (flights["month"] == month, 5) for month in range(1, 13)} | {
        "first days": (flights["scheduled"] < pd.Timestamp("2013-01-03T12:00Z"), 6),
        "spring forward": (pd.Series([day == (3, 10) for day in local_day]), 5),
        "fall back": (pd.Series([day == (11, 3) for day in local_day]), 5),
        "Caribbean": (flights["dest"].isin(ZONES), 6),
        "Hawaii": (flights["dest"] == "HNL", 4),
        "Arizona": (flights["dest"] == "PHX", 4),
        "Arizona, clocks elsewhere just changed": ((flights["dest"] == "PHX") & (flights["month"] == 11), 2),
        "without tail number": (flights["tailnum"].isna(), 5),
        "cancelled": (flights["dep_delay"].isna() & flights["tailnum"].notna(), 5),
        "sent elsewhere": (flights["dep_delay"].notna() & flights["arr_delay"].isna(), 4),
        "after midnight": (flights["hour"] < 5, 2),
        "snow storm": (pd.Series([day in ((2, 8), (2, 9)) for day in local_day]), 6),
        "thunderstorm": (pd.Series([day == (7, 10) for day in local_day]), 6),
        "no weather": (flights["scheduled"] > pd.Timestamp("2013-12-31T12:00Z"), 3),
        "aircraft twice at once": (at_once, 4),
    }
    chosen: set[int] = {0, len(flights) - 1}
    for kind, (which, number) in kinds.items():
        candidates = np.flatnonzero(which)
        assert len(candidates), f"there is no flight of the kind {kind!r}"
        chosen |= set(random.choice(candidates, min(number, len(candidates)), replace=False).tolist())
    return sorted(chosen)


@pytest.mark.slow
def test_features_equal_those_computed_by_hand(year: Tables, year_features: pd.DataFrame) -> None:
    expected = all_by_hand(year, sample_of_the_year)
    assert len(expected) > 110
    assert set(expected.columns) == set(year_features.columns) - set(WHO), "a feature was not recomputed"
    compare(expected, year_features)
    empty = [name for name in expected if expected[name].nunique() < 2]
    assert not empty, f"the sample says nothing about {empty}"


def small_world(seed: int) -> Tables:
    """Few of everything and times on a grid of half hours, so that events fall exactly on the ends of windows."""
    random, number = np.random.default_rng(seed), 55
    scheduled = pd.Timestamp("2013-03-09T12:00Z") + pd.to_timedelta(30 * random.integers(0, 120, number), unit="m")
    local = scheduled.tz_convert("America/New_York")
    delay = 30.0 * random.integers(-2, 14, number)
    left = np.where(random.random(number) < 0.2, np.nan, delay)
    arrived = np.where(random.random(number) < 0.1, np.nan, left + 15 * random.integers(-2, 4, number))
    flights = pd.DataFrame(
        {
            "year": local.year, "month": local.month, "day": local.day, "hour": local.hour, "minute": local.minute,
            "sched_dep_time": local.hour * 100 + local.minute, "dep_delay": left, "arr_delay": arrived,
            "sched_arr_time": 100 * random.integers(0, 24, number) + 30 * random.integers(0, 2, number),
            "carrier": random.choice(["AA", "UA"], number), "flight": random.integers(1, 4, number),
            "tailnum": random.choice(["N1", "N2", "N3", None], number), "origin": random.choice(["EWR", "JFK"], number),
            "dest": random.choice(["HNL", "PHX", "SJU", "XXX"], number), "distance": random.integers(100, 5000, number),
            "time_hour": scheduled.floor("h"),
        }
    )  # fmt: skip
    flights = flights.astype({"carrier": "str", "tailnum": "str", "origin": "str", "dest": "str"})
    hours = pd.date_range("2013-03-08T00:00Z", "2013-03-13T00:00Z", freq="h")
    places = pd.MultiIndex.from_product([["EWR", "JFK", "LGA"], hours], names=["origin", "time_hour"])
    weather = pd.DataFrame({name: random.normal(40, 9, len(places)) for name in REPORTED.values()}, index=places)
    weather = weather.mask(random.random(weather.shape) < 0.1).reset_index().sample(frac=0.25, random_state=seed)
    return {
        "flights": flights.drop_duplicates(KEY).drop_duplicates(["time_hour", "minute", "carrier", "flight"]),
        "weather": weather.astype({"origin": "str"}),
        "planes": pd.DataFrame({"tailnum": ["N1", "N2"], "year": [1999.0, np.nan], "seats": [100, 200]}),
        "airports": pd.DataFrame({"faa": ["HNL", "PHX"], "tzone": ["Pacific/Honolulu", "America/Phoenix"]}),
    }  # fmt: skip


@pytest.mark.parametrize("seed", range(3))
def test_features_equal_those_computed_by_hand_when_times_coincide(seed: int) -> None:
    tables = small_world(seed)
    compare(all_by_hand(tables, lambda flights: range(len(flights))), features_of(tables))


def test_known_times_agree_with_the_time_in_the_air(year: Tables) -> None:
    """A wrong time zone would let an arrival be known an hour early: before the aircraft could have been there."""
    flights = year["flights"]
    time = windows.timeline(flights, year["airports"], zero=0)
    on_the_ground = (time.arrival - time.departure - flights["air_time"])[time.landed]
    assert on_the_ground.min() >= 5
    assert on_the_ground.groupby(flights["dest"]).median().between(15, 45).all()


# ---------------------------------------------------------------------------------------------------------------------
# Nothing that became known later moves a feature


def another_future(tables: Tables, moment: pd.Timestamp, random: Random) -> Tables:
    """The same tables up to a moment; all that became known after it is replaced by nonsense.

    A flight that left later now leaves at another later time or never; one that was in the air arrives at another later
    time, or elsewhere; a cancelled one may leave; the weather published later is another one.
    """
    flights = tables["flights"].copy()
    scheduled, number = when_scheduled(flights), len(flights)
    block = planned_minutes(flights, tables["airports"])
    left = scheduled + pd.to_timedelta(flights["dep_delay"], unit="m")
    arrived = scheduled + pd.to_timedelta(block + flights["arr_delay"], unit="m")
    gone, landed = left <= moment, arrived <= moment
    wait = ((moment - scheduled).dt.total_seconds() / 60).clip(lower=-180)
    delay = (wait + random.integers(1, 900, number)).where(random.random(number) < 0.8)
    flights["dep_delay"] = flights["dep_delay"].where(gone, delay)
    soonest = np.maximum(wait - block, flights["dep_delay"] - block)
    delay = (soonest + random.integers(1, 900, number)).where(random.random(number) < 0.8)
    flights["arr_delay"] = flights["arr_delay"].where(landed, delay.where(flights["dep_delay"].notna()))
    for name in ("dep_time", "arr_time", "air_time"):
        nonsense = pd.Series(random.integers(0, 2400, number), flights.index, dtype="float64")
        flights[name] = flights[name].where(landed if name != "dep_time" else gone, nonsense)
    weather = tables["weather"].copy()
    later = weather["time_hour"] + minutes(60) > moment
    values = random.normal(40, 30, (later.sum(), len(REPORTED)))
    weather.loc[later, list(REPORTED.values())] = np.where(random.random(values.shape) < 0.9, values, np.nan)
    return tables | {"flights": flights, "weather": weather}


def moments_of(tables: Tables, number: int, seed: int) -> list[pd.Timestamp]:
    """Moments in the middle of the working day: half of them exactly when a flight is asked about, half a bit later."""
    random = np.random.default_rng(seed)
    asked = (when_scheduled(tables["flights"]) - minutes(120)).sort_values()
    chosen = asked.iloc[random.integers(len(asked) // 10, len(asked) * 9 // 10, number)]
    return [moment + minutes(int(random.integers(1, 60)) * (place % 2)) for place, moment in enumerate(chosen)]


def leaks(tables: Tables, features: pd.DataFrame, moment: pd.Timestamp, random: Random) -> list[str]:
    """Features of flights asked about at or before a moment that move when what became known after it changes."""
    features = features.drop(columns=["dest", "scheduled_departure", "predicted_at"])
    other = features_of(another_future(tables, moment, random)).loc[features.index, features.columns]
    key = features.index.to_frame(index=False)
    before = (when_scheduled(key) - minutes(120) <= moment).to_numpy()
    assert 1000 < before.sum() < len(before) - 1000
    assert not features[~before].equals(other[~before])
    left, right = features[before], other[before]
    return [name for name in features if not left[name].equals(right[name])]


@pytest.fixture(scope="module")
def weeks_features(weeks: Tables) -> pd.DataFrame:
    """Every feature of the five weeks."""
    return features_of(weeks)


@pytest.mark.parametrize("seed", range(8))
def test_no_event_after_a_moment_moves_a_feature_asked_before_it(
    weeks: Tables, weeks_features: pd.DataFrame, seed: int
) -> None:
    moment = moments_of(weeks, 8, seed=7)[seed]
    assert leaks(weeks, weeks_features, moment, np.random.default_rng(seed)) == []


def test_every_feature_that_is_not_planned_moves_with_the_past(weeks: Tables, weeks_features: pd.DataFrame) -> None:
    """The control: the proof above would be empty if features did not depend on events at all."""
    random, flights, weather = np.random.default_rng(5), weeks["flights"].copy(), weeks["weather"].copy()
    for name in ("dep_delay", "arr_delay"):
        flights[name] += random.integers(1, 60, len(flights))
    for name in REPORTED.values():
        weather[name] += random.normal(0, 5, len(weather))
    other = features_of(weeks | {"flights": flights, "weather": weather}).loc[weeks_features.index]
    same = [name for name in weeks_features if weeks_features[name].equals(other[name])]
    assert set(same) == {*PLANNED, "dest", "scheduled_departure", "predicted_at"}


@pytest.mark.parametrize(
    ("module", "name", "value", "caught"),
    [
        (features_module, "PUBLISHED_AFTER", 0, "temperature"),
        (features_module, "_minutes_ahead", lambda horizon: 60, "departure_delay_system_30m"),
    ],
)
def test_a_planted_leak_is_caught(
    weeks: Tables, monkeypatch: pytest.MonkeyPatch, module: ModuleType, name: str, value: object, caught: str
) -> None:
    """The proof fails when weather is used in the hour in which it is measured, or when the desk asks too late."""
    monkeypatch.setattr(module, name, value)
    moment = moments_of(weeks, 1, seed=3)[0]
    assert caught in leaks(weeks, features_of(weeks), moment, np.random.default_rng(1))


def test_a_planted_leak_of_arrivals_is_caught(weeks: Tables, monkeypatch: pytest.MonkeyPatch) -> None:
    """The proof fails when a flight's delay is known at its scheduled arrival, before it has arrived."""
    honest = windows.timeline

    def leaky(*arguments: object) -> windows.Timeline:
        time = honest(*arguments)
        return windows.Timeline(**{**vars(time), "arrival": time.scheduled + time.block})

    monkeypatch.setattr(features_module, "timeline", leaky)
    moved = leaks(weeks, features_of(weeks), moments_of(weeks, 1, seed=3)[0], np.random.default_rng(1))
    assert {"mean_delay_carrier_2h", "late_rate_aircraft_7d"} <= set(moved)


# ---------------------------------------------------------------------------------------------------------------------
# What must not matter


def test_the_order_of_rows_does_not_matter(weeks: Tables, weeks_features: pd.DataFrame) -> None:
    shuffled = {name: table.sample(frac=1, random_state=11) for name, table in weeks.items()}
    assert features_of(shuffled).equals(weeks_features)


@pytest.mark.parametrize("threads", [1, 3])
def test_the_number_of_threads_does_not_matter(weeks: Tables, weeks_features: pd.DataFrame, threads: int) -> None:
    assert features_of(weeks, threads).equals(weeks_features)


def test_the_input_is_left_as_it_was(weeks: Tables) -> None:
    some = {name: table.head(500).copy() for name, table in weeks.items()}
    flight_features(some)
    for name, table in some.items():
        pd.testing.assert_frame_equal(table, weeks[name].head(500))


@pytest.mark.parametrize("month", ["2013-01", "2013-03", "2013-11"])
def test_a_month_alone_has_the_features_it_has_in_the_whole_year(
    settings: Settings, year: Tables, year_features: pd.DataFrame, month: str
) -> None:
    near = pd.period_range(pd.Period(month) - 2, pd.Period(month), freq="M").astype("str")
    references = {}
    for table in flight_delay.tables:
        frame = year[table.name]
        frame = frame.assign(period=calendar_month(frame) if table.period else "all")
        frame = frame[frame["period"].isin(near)] if table.period else frame
        references[table.name] = replace_months(settings, table.name, frame)[0]
    reference = build_features(settings, flight_delay, references, month, month)
    alone = read_table(settings, reference)
    assert set(alone["period"]) == {month}
    alone = alone.drop(columns="period").set_index(KEY)
    assert len(alone) == (calendar_month(year["flights"]) == month).sum() > 20_000
    assert_equal(alone.sort_index(), year_features)


@pytest.fixture(scope="module")
def year_tables(year: Tables, tmp_path_factory: pytest.TempPathFactory) -> tuple[Settings, dict[str, str]]:
    """All of 2013 in the clean tables of a workspace."""
    settings, references = Settings(home=tmp_path_factory.mktemp("year")).prepare(), {}
    for table in flight_delay.tables:
        frame = year[table.name].assign(period=calendar_month(year[table.name]) if table.period else "all")
        references[table.name] = replace_months(settings, table.name, frame)[0]
    return settings, references


@pytest.mark.slow
@pytest.mark.thorough
def test_a_year_month_by_month_is_the_year_at_once(
    year_tables: tuple[Settings, dict[str, str]], year_features: pd.DataFrame
) -> None:
    """Every column of every flight, bit for bit; where the months are cut does not matter."""
    settings, references = year_tables
    reference = build_features(settings, flight_delay, references, "2013-01", "2013-12", at_once=1)
    alone = read_table(settings, reference).drop(columns="period").set_index(KEY)
    assert len(alone) == len(year_features) == 336_776
    assert_equal(alone.sort_index(), year_features)
    for at_once in (5, 12):
        again = build_features(settings, flight_delay, references, "2013-01", "2013-12", at_once=at_once)
        assert again == reference, "no month was written again"


def test_only_a_bounded_history_is_read(
    year_tables: tuple[Settings, dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never more than the months that were asked for at once and the history before them."""
    settings, references = year_tables
    held: list[list[str]] = []

    def features(tables: Tables) -> pd.DataFrame:
        held.append(sorted(set(tables["flights"]["period"])))
        return flight_features(tables)

    monkeypatch.setattr(features_module, "flight_features", features)
    build_features(settings, flight_delay, references, "2013-04", "2013-09", at_once=3)
    assert held == [months("2013-03", "2013-06"), months("2013-05", "2013-09")], "31 days before July begins May's last"


# ---------------------------------------------------------------------------------------------------------------------
# Little data, missing data


def test_a_single_flight_has_features(weeks: Tables) -> None:
    one = weeks | {"flights": weeks["flights"].iloc[[1234]]}
    row = features_of(one)
    assert len(row) == 1
    compare(all_by_hand(one, lambda flights: [0]), row)
    assert row["count_aircraft_28d"].item() == row["overdue_system"].item() == 0
    assert np.isnan(row["late_rate_carrier_28d"].item())


def test_without_flights_the_error_says_what_to_do(weeks: Tables) -> None:
    with pytest.raises(DeliveryError, match=r"no flight to compute features for.*Ingest"):
        flight_features(weeks | {"flights": weeks["flights"].head(0)})


@pytest.mark.parametrize("which", ["no row", "another airport", "another year", "another century"])
def test_without_weather_only_the_weather_is_missing(weeks: Tables, weeks_features: pd.DataFrame, which: str) -> None:
    weather = weeks["weather"]
    shift = {"another year": 365, "another century": 36525}.get(which, 0)
    weather = {
        "no row": weather.head(0),
        "another airport": weather.assign(origin="BOS"),
    }.get(which, weather.assign(time_hour=weather["time_hour"] - pd.Timedelta(days=shift)))
    features = features_of(weeks | {"weather": weather})
    columns = [*REPORTED, *(f"{name}_change_4h" for name in CHANGE)]
    assert features[columns].isna().all(axis=None)
    assert features.drop(columns=columns).equals(weeks_features.drop(columns=columns))


def test_a_gap_in_the_weather_ends_after_six_hours(weeks: Tables) -> None:
    """The last report came out at noon; it serves until just before 18:00, then there is none until the next."""
    noon = pd.Timestamp("2013-02-20T12:00Z")
    published = weeks["weather"]["time_hour"] + minutes(60)
    gap = weeks | {"weather": weeks["weather"][(published <= noon) | (published > noon + minutes(600))]}
    features = features_of(gap)
    age = (features["predicted_at"] - noon).dt.total_seconds() / 60
    assert features["temperature"][age.between(0, 359)].notna().all()
    assert features["temperature"][age.between(360, 600)].isna().all()
    assert features["temperature"][age.between(661, 900)].notna().all()


def test_an_airport_nobody_knows_is_taken_to_keep_new_york_time(weeks: Tables) -> None:
    flights = weeks["flights"].head(300)
    boston, unknown = (features_of(weeks | {"flights": flights.assign(dest=dest)}) for dest in ("BOS", "QQQ"))
    assert boston.drop(columns="dest").equals(unknown.drop(columns="dest"))
    assert unknown["block_minutes"].notna().all()


def test_flights_without_tail_number_share_no_aircraft(weeks: Tables, weeks_features: pd.DataFrame) -> None:
    flights = weeks["flights"].assign(tailnum=pd.Series(np.nan, weeks["flights"].index, dtype="str"))
    features = features_of(weeks | {"flights": flights})
    aircraft = [name for name in features if "aircraft" in name or "previous_leg" in name or name == "seats"]
    assert (features[["count_aircraft_7d", "count_aircraft_28d"]] == 0).all(axis=None)
    assert features[aircraft].drop(columns=["count_aircraft_7d", "count_aircraft_28d"]).isna().all(axis=None)
    assert features.drop(columns=aircraft).equals(weeks_features.drop(columns=aircraft))


def test_an_aircraft_nobody_knows_has_no_seats_but_a_history(weeks: Tables, weeks_features: pd.DataFrame) -> None:
    features = features_of(weeks | {"planes": weeks["planes"].head(0)})
    assert features[["seats", "aircraft_age"]].isna().all(axis=None)
    columns = ["seats", "aircraft_age"]
    assert features.drop(columns=columns).equals(weeks_features.drop(columns=columns))


def test_features_are_float32_and_rows_stand_in_the_order_of_time(weeks: Tables) -> None:
    frame = flight_features(weeks)
    assert (frame.drop(columns=WHO).dtypes == "float32").all()
    assert frame[KEY].equals(frame[KEY].sort_values(KEY, ignore_index=True))
    assert (frame["scheduled_departure"] - frame["predicted_at"] == minutes(120)).all()
    assert not frame.duplicated(KEY).any()
