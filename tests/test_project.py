"""The project's promises: the contract with the supplier, the label, the costs, the bars, the use case by name."""

import shutil
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from mlops_course.data import check_rows, conform
from mlops_course.environment import CourseError
from mlops_course.project import (
    AGREEMENTS,
    Costs,
    DeliveryError,
    SuccessMetrics,
    Table,
    UseCase,
    calendar_month,
    find_file,
    find_use_case,
    flight_delay,
    late_label,
    load_object,
    read_delivery,
    read_file,
    supplier_folder,
)
from mlops_course.project.supplier import _rows_of_month

Tables = dict[str, pd.DataFrame]
CONTRACTS = {table.name: table.contract for table in flight_delay.tables}


@pytest.fixture(scope="module")
def year() -> Tables:
    """All of the supplier's tables, in the contract's types."""
    return {
        name: conform(read_file(find_file(supplier_folder(), name)), contract()) for name, contract in CONTRACTS.items()
    }


@pytest.fixture(scope="module")
def some(year: Tables) -> Tables:
    """A hundred good rows of each table, with a median wind that the contract accepts."""
    return {name: frame.iloc[-3000:].iloc[::30].reset_index(drop=True) for name, frame in year.items()}


# ---------------------------------------------------------------------------------------------------------------------
# The contract


@pytest.mark.parametrize("name", ["flights", "planes", "airports"])
def test_the_contract_accepts_every_real_row(year: Tables, name: str) -> None:
    assert check_rows(year[name], CONTRACTS[name]()).empty


def test_the_contract_finds_the_one_impossible_wind(year: Tables) -> None:
    found = check_rows(year["weather"], CONTRACTS["weather"]())
    assert found[["column", "value"]].to_numpy().tolist() == [["wind_speed", "1048.36058"]]
    row = year["weather"].loc[int(found["index"].item())]
    assert row[["origin", "month", "day"]].tolist() == ["EWR", 2, 12]


def test_each_month_of_real_weather_has_a_typical_wind_and_temperature(year: Tables) -> None:
    """A promise about a month must not fail in summer or in winter."""
    weather = year["weather"][year["weather"]["wind_speed"].fillna(0) < 150]
    for _, month in weather.groupby("month"):
        assert check_rows(month.reset_index(drop=True), CONTRACTS["weather"]()).empty


VIOLATIONS: list[tuple[str, str, Any]] = [
    ("flights", "year", 1492), ("flights", "month", 13), ("flights", "day", 0), ("flights", "dep_time", 975.0),
    ("flights", "dep_time", 2500.0), ("flights", "sched_dep_time", 1261), ("flights", "dep_delay", 2881.0),
    ("flights", "dep_delay", -181.0), ("flights", "arr_time", -5.0), ("flights", "sched_arr_time", 2401),
    ("flights", "arr_delay", 99999.0), ("flights", "carrier", "united"), ("flights", "carrier", None),
    ("flights", "flight", 0), ("flights", "origin", "BOS"), ("flights", "dest", "Boston"), ("flights", "dest", None),
    ("flights", "air_time", 4.0), ("flights", "distance", 9), ("flights", "hour", 24), ("flights", "minute", 60),
    ("flights", "time_hour", pd.NaT), ("weather", "origin", "BOS"), ("weather", "month", 0), ("weather", "day", 32),
    ("weather", "temp", 131.0), ("weather", "dewp", -61.0), ("weather", "humid", 101.0), ("weather", "wind_dir", 361.0),
    ("weather", "wind_speed", 1048.36), ("weather", "wind_gust", 201.0), ("weather", "precip", -0.1),
    ("weather", "pressure", 29.9), ("weather", "visib", 11.0), ("planes", "tailnum", "N"),
    ("planes", "tailnum", "n-123"), ("planes", "year", 0.0), ("planes", "seats", 0), ("planes", "engines", 9),
    ("airports", "faa", "new york"), ("airports", "tzone", "EST"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "column", "value"), VIOLATIONS)
def test_a_planted_violation_is_found_and_named(some: Tables, name: str, column: str, value: Any) -> None:
    assert check_rows(some[name], CONTRACTS[name]()).empty
    frame = some[name].copy()
    frame.loc[17, column] = value
    found = check_rows(frame, CONTRACTS[name]())
    found = found[found["column"] == column]
    assert found["index"].tolist() == [17]
    if not pd.isna(value):
        assert found["value"].tolist() == [str(value)]


def test_all_violations_are_found_at_once(some: Tables) -> None:
    """One of each column, each in a row of its own: all are named, and no row that is good."""
    planted = {column: (row, value) for row, (name, column, value) in enumerate(VIOLATIONS) if name == "flights"}
    frame = some["flights"].copy()
    for column, (row, value) in planted.items():
        frame.loc[row, column] = value
    found = check_rows(frame, CONTRACTS["flights"]())
    found = found[found["column"] != "(row)"]
    assert dict(zip(found["column"], found["index"].astype("int64"), strict=True)) == {
        column: row for column, (row, _) in planted.items()
    }


Damage = Callable[[pd.DataFrame], pd.DataFrame]
TWICE: dict[str, tuple[str, Damage, str]] = {  # what a row says twice: each value stays within its limits
    "another day": ("flights", lambda rows: rows.assign(day=rows["day"] % 28 + 1), "time_hour.*year, month, day"),
    "another month": ("flights", lambda rows: rows.assign(month=rows["month"] % 12 + 1), "time_hour.*month"),
    "another year": ("flights", lambda rows: rows.assign(year=rows["year"] + 1), "time_hour.*year"),
    "not a full hour": (
        "flights", lambda rows: rows.assign(time_hour=rows["time_hour"] + pd.Timedelta(minutes=20)), "time_hour"
    ),
    "another minute": ("flights", lambda rows: rows.assign(minute=(rows["minute"] + 7) % 60), "sched_dep_time and"),
    "another schedule": (
        "flights",
        lambda rows: rows.assign(**{name: (rows[name] + 100) % 2400 for name in ("sched_dep_time", "dep_time")}),
        "sched_dep_time and",
    ),
    "the sign of a departure": ("flights", lambda rows: rows.assign(dep_delay=-rows["dep_delay"]), "dep_delay and"),
    "half a minute": ("flights", lambda rows: rows.assign(dep_delay=rows["dep_delay"] + 0.5), "dep_delay and"),
    "the sign of an arrival": ("flights", lambda rows: rows.assign(arr_delay=-rows["arr_delay"]), "arr_delay and"),
    "hours for minutes": ("flights", lambda rows: rows.assign(arr_delay=rows["arr_delay"] / 60), "arr_delay and"),
    "an arrival at another time": (
        "flights", lambda rows: rows.assign(arr_time=(rows["arr_time"] + 100) % 2400), "arr_delay and"
    ),
    "landed and never left": (
        "flights", lambda rows: rows.assign(dep_time=np.nan, dep_delay=np.nan), "a flight that arrived has left"
    ),
    "no time in the air": ("flights", lambda rows: rows.assign(air_time=np.nan), "a flight that arrived has left"),
    "a delay and no departure": ("flights", lambda rows: rows.assign(dep_time=np.nan), "a flight that arrived"),
    "weather of another day": ("weather", lambda rows: rows.assign(day=rows["day"] % 28 + 1), "time_hour.*day"),
}  # fmt: skip


@pytest.mark.parametrize("fault", TWICE)
def test_what_a_row_says_twice_must_agree(some: Tables, fault: str) -> None:
    name, damage, promise = TWICE[fault]
    rows = some[name]
    ordinary = rows.index[rows["arr_delay"].abs() > 5] if name == "flights" else rows.index
    chosen = ordinary[[3, 8]]
    found = check_rows(pd.concat([rows.drop(index=chosen), damage(rows.loc[chosen])]), CONTRACTS[name]())
    assert sorted(found["index"]) == sorted(chosen), "two rows, and each with one reason"
    assert set(found["column"]) == {"(row)"} and found["check"].str.match(promise).all()


def test_all_real_rows_say_the_same_twice_and_their_gaps_are_known(year: Tables) -> None:
    """The promise is as strong as the real data: the rows that lack one of the two are counted here."""
    flights = year["flights"]
    assert {name: int((~kept(flights)).sum()) for name, kept in AGREEMENTS.items()} == dict.fromkeys(AGREEMENTS, 0)
    elsewhere = flights["dep_time"].notna() & flights["arr_delay"].isna()
    assert (int((elsewhere & flights["arr_time"].notna()).sum()), int(elsewhere.sum())) == (717, 1175)


@pytest.mark.parametrize("word", ["", " ", "nan", "UNKNOWN", "None", "NULL", "N/A", "n/a", "-", "<NA>", "null", "NaT"])
@pytest.mark.parametrize(
    ("name", "column"),
    [("flights", name) for name in ("tailnum", "carrier", "dest", "origin")]
    + [("planes", "tailnum"), ("airports", "faa"), ("weather", "origin")],
)
def test_a_placeholder_names_nothing(some: Tables, name: str, column: str, word: str) -> None:
    frame = some[name].copy()
    frame.loc[17, column] = word
    found = check_rows(frame, CONTRACTS[name]())
    assert set(found["index"]) == {17} and set(found["column"]) == {column}


@pytest.mark.parametrize(
    ("column", "damage", "promise"),
    [
        ("distance", lambda flights: flights.assign(distance=(flights["distance"] * 1.609).astype(int)), "median"),
        ("arr_delay", lambda flights: shifted(flights, 60), "5% to 50% of the flights that arrived"),
        ("arr_delay", lambda flights: shifted(flights, -60), "5% to 50% of the flights that arrived"),
        ("arr_delay", lambda flights: mirrored(flights), "a mean above its median"),
    ],
    ids=["kilometres", "always late", "never late", "the other sign"],
)
def test_a_promise_about_the_label_and_the_unit_of_a_table(
    some: Tables, column: str, damage: Damage, promise: str
) -> None:
    found = check_rows(damage(some["flights"]), CONTRACTS["flights"]())
    of_table = found[found["index"].isna()]
    assert column in set(of_table["column"]) and of_table["check"].str.startswith(promise).any()
    few = check_rows(damage(some["flights"]).head(49), CONTRACTS["flights"]())
    assert few["index"].notna().all(), "49 rows have no typical value"


def shifted(flights: pd.DataFrame, minutes: int) -> pd.DataFrame:
    """All flights arrive so much later, and their clock times say so, too."""
    clock = flights["arr_time"] // 100 * 60 + flights["arr_time"] % 100
    clock = (clock + minutes) % 1440
    return flights.assign(arr_delay=flights["arr_delay"] + minutes, arr_time=clock // 60 * 100 + clock % 60)


def mirrored(flights: pd.DataFrame) -> pd.DataFrame:
    """All flights arrive as much too early as they were late, within the limits."""
    delay = (-flights["arr_delay"]).clip(lower=-180)
    clock = flights["sched_arr_time"] // 100 * 60 + flights["sched_arr_time"] % 100
    clock = (clock + delay) % 1440
    return flights.assign(arr_delay=delay, arr_time=(clock // 60 * 100 + clock % 60).where(delay.notna()))


@pytest.mark.parametrize("name", ["flights", "weather"])
def test_two_clocks_that_disagree_are_found(some: Tables, name: str) -> None:
    frame = some[name].copy()
    frame.loc[[3, 8], "time_hour"] += pd.Timedelta(hours=1)
    found = check_rows(frame, CONTRACTS[name]())
    assert sorted(found["index"]) == [3, 8]
    assert set(found["column"]) == {"(row)"} and found["check"].str.contains("agree").all()


def test_another_unit_of_wind_breaks_a_promise_about_the_table(some: Tables) -> None:
    frame = some["weather"].assign(wind_speed=some["weather"]["wind_speed"] * 1.609344)
    found = check_rows(frame, CONTRACTS["weather"]())
    assert found["column"].tolist() == ["wind_speed"] and found["index"].isna().all()
    assert "median 3 to 14 mph" in found["check"].item()


def test_values_that_may_be_missing_may_be_missing(some: Tables) -> None:
    allowed = {
        "flights": ["dep_time", "dep_delay", "arr_time", "arr_delay", "tailnum", "air_time"],
        "weather": ["dewp", "humid", "wind_dir", "wind_gust", "precip", "pressure", "visib"],
        "planes": ["year", "type", "manufacturer", "model"],
        "airports": ["tzone"],
    }
    for name, columns in allowed.items():
        frame = some[name].copy()
        frame.loc[5, columns] = np.nan
        assert check_rows(frame, CONTRACTS[name]()).empty


# ---------------------------------------------------------------------------------------------------------------------
# The supplier


def test_twelve_deliveries_make_the_year(year: Tables) -> None:
    months = [read_delivery(f"2013-{number:02d}") for number in range(1, 13)]
    for name in ("flights", "weather"):
        assert sum(len(month[name]) for month in months) == len(year[name])
        assert all(calendar_month(month[name]).nunique() == 1 for month in months)
    assert all(len(month["planes"]) == len(year["planes"]) for month in months)


def test_the_month_of_a_row_is_new_yorks(year: Tables) -> None:
    some = year["flights"].iloc[::101]
    local = some["time_hour"].dt.tz_convert("America/New_York")
    assert (calendar_month(some) == local.dt.strftime("%Y-%m")).all()


def test_a_month_that_is_not_there_is_named_with_those_that_are(year: Tables) -> None:
    with pytest.raises(DeliveryError, match=r"no rows of 2012-12 in own.csv.*holds 2013-01 to 2013-12"):
        _rows_of_month(year["flights"], "2012-12", Path("somewhere/own.csv"))


def test_the_folder_of_a_delivery_goes_before_the_file_of_everything(tmp_path: Path, some: Tables) -> None:
    (tmp_path / "2013-12").mkdir()
    for name, frame in some.items():
        frame.to_csv(tmp_path / f"{name}.csv", index=False)
    some["planes"].head(3).to_csv(tmp_path / "2013-12" / "planes.csv", index=False)
    month = str(calendar_month(some["flights"]).iloc[0])
    shutil.move(tmp_path / "2013-12", tmp_path / "moved")
    assert len(read_delivery(month, tmp_path, ("planes",))["planes"]) == len(some["planes"])
    shutil.move(tmp_path / "moved", tmp_path / month)
    assert len(read_delivery(month, str(tmp_path), ("planes",))["planes"]) == 3


def test_a_folder_without_a_table_is_named(tmp_path: Path) -> None:
    with pytest.raises(DeliveryError, match=r"no file for the table flights in .*Put flights\.csv"):
        read_delivery("2013-01", tmp_path)
    with pytest.raises(DeliveryError, match=r"absent does not exist.*Name a folder"):
        read_delivery("2013-01", tmp_path / "absent")


WRITES: dict[str, Callable[[pd.DataFrame], object]] = {
    "a column": lambda frame: frame.insert(0, "seen", 1),
    "some rows": lambda frame: frame.__setitem__("seats", 0),
    "a cell": lambda frame: frame.__setitem__("seats", frame["seats"].mask(frame.index == 0, -1)),
    "a column less": lambda frame: frame.pop("seats"),
    "the array": lambda frame: frame["seats"].array.__setitem__(slice(None), -3),
    "the buffer": lambda frame: np.asarray(frame["seats"].array).__setitem__(0, -4),
    "by force": lambda frame: force(frame["seats"].to_numpy()),
    "text": lambda frame: frame["tailnum"].array.__setitem__(0, "N0"),
}


def force(values: np.ndarray) -> None:
    """Write into an array that pandas has locked."""
    values.flags.writeable = True
    values[:] = -5


@pytest.mark.parametrize("layout", ["the supplier's", "a folder a delivery", "one file"])
@pytest.mark.parametrize("write", WRITES)
def test_whoever_writes_into_a_delivery_writes_into_a_copy_of_their_own(
    tmp_path: Path, some: Tables, write: str, layout: str
) -> None:
    folder = tmp_path / "2013-12" if layout == "a folder a delivery" else tmp_path
    folder.mkdir(exist_ok=True)
    some["planes"].to_csv(folder / "planes.csv", index=False)
    source = None if layout == "the supplier's" else tmp_path
    first = read_delivery("2013-12", source, ("planes",))["planes"]
    before = first.copy(deep=True)
    WRITES[write](first)
    pd.testing.assert_frame_equal(read_delivery("2013-12", source, ("planes",))["planes"], before)


def test_whoever_changes_a_contract_changes_only_their_own() -> None:
    for contract in CONTRACTS.values():
        before = list(contract().columns)
        contract().columns.clear()
        assert list(contract().columns) == before != []


# ---------------------------------------------------------------------------------------------------------------------
# The label, the costs, the bars


def test_late_is_more_than_fifteen_minutes() -> None:
    label = late_label(pd.DataFrame({"arr_delay": [-60.0, 0.0, 15.0, 16.0, 900.0, np.nan]}))
    assert label.dtype == "float64"
    np.testing.assert_array_equal(label, [0.0, 0.0, 0.0, 1.0, 1.0, np.nan])


def test_the_label_of_the_year(year: Tables) -> None:
    flights, label = year["flights"], late_label(year["flights"])
    assert label.index.equals(flights.index)
    assert label.isna().sum() == 9430 and label[flights["dep_delay"].isna()].isna().all()
    assert label.mean() == pytest.approx(0.237, abs=0.001)


def test_the_threshold_is_where_a_warning_costs_as_much_as_silence() -> None:
    costs = Costs(missed=150, warning=40)
    assert costs.threshold * costs.missed == pytest.approx(costs.warning)
    assert flight_delay.costs.threshold == pytest.approx(40 / 150)


@pytest.mark.parametrize(("missed", "warning"), [(10, 40), (40, 40), (150, 0), (150, -1), (-5, -10), (float("nan"), 1)])
def test_costs_that_make_no_sense_are_refused(missed: float, warning: float) -> None:
    with pytest.raises(CourseError, match=rf"0 < warning < missed, not warning={warning}, missed={missed}"):
        Costs(missed=missed, warning=warning)


BARS = SuccessMetrics(pr_auc=0.56, roc_auc=0.77, log_loss=0.435)
GOOD = {"pr_auc": 0.56, "roc_auc": 0.77, "log_loss": 0.435, "brier": 0.9}


@pytest.mark.parametrize(
    "worse",
    [{}, {"pr_auc": 0.5599}, {"log_loss": 0.4351}, {"pr_auc": 0.22, "roc_auc": 0.5, "log_loss": 0.53}],
    ids=lambda worse: " ".join(worse) or "none",
)
def test_each_bar_that_is_missed_is_named_with_its_value(worse: dict[str, float]) -> None:
    sentences = BARS.shortfalls(GOOD | worse)
    assert len(sentences) == len(worse)
    for (name, value), sentence in zip(worse.items(), sentences, strict=True):
        assert sentence.startswith(f"{name} is {value:.4f}") and str(getattr(BARS, name)) in sentence


@pytest.mark.parametrize("name", ["pr_auc", "roc_auc", "log_loss"])
def test_a_metric_that_is_not_a_number_reaches_no_bar(name: str) -> None:
    assert len(BARS.shortfalls(GOOD | {name: float("nan")})) == 1


# ---------------------------------------------------------------------------------------------------------------------
# The use case by name


def test_a_use_case_is_found_by_name() -> None:
    assert find_use_case("mlops_course.project:flight_delay") is flight_delay
    assert callable(load_object(flight_delay.features))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("flight_delay", "not a name of the form module:attribute"),
        (":flight_delay", "not a name of the form module:attribute"),
        ("mlops_course.project:", "not a name of the form module:attribute"),
        ("", "not a name of the form module:attribute"),
        ("mlops_course.projects:flight_delay", "can't import 'mlops_course.projects'"),
        ("no_such_package:bikes", "can't import 'no_such_package'.*Install it"),
        ("mlops_course.project:flight_delya", "has no 'flight_delya'.*Did you mean 'flight_delay'"),
        ("mlops_course.project:zzz", "has no 'zzz'.*Correct the name"),
        ("mlops_course.project:late_label", "is a function, not a UseCase"),
        ("os:path", "is a module, not a UseCase"),
    ],
)
def test_a_wrong_name_is_explained(name: str, message: str) -> None:
    with pytest.raises(CourseError, match=message) as caught:
        find_use_case(name)
    assert "\n" not in str(caught.value)


def test_a_use_case_of_ones_own_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_bikes.py").write_text(
        "from dataclasses import replace\n"
        "from mlops_course.project import flight_delay\n"
        "bikes = replace(flight_delay, name='bikes')\n"
    )
    (tmp_path / "broken_bikes.py").write_text("import package_that_is_not_installed\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert find_use_case("my_bikes:bikes").name == "bikes"
    with pytest.raises(CourseError, match=r"broken_bikes.*package_that_is_not_installed"):
        find_use_case("broken_bikes:bikes")


def test_the_parts_of_the_use_case_fit_together(some: Tables) -> None:
    """Every name it mentions is there: keys and times as columns, tables as contracts of the same name."""
    check: Callable[[Table], bool] = lambda table: set(table.key) <= set(table.contract().columns)  # noqa: E731
    assert all(check(table) for table in flight_delay.tables)
    assert [table.contract().name for table in flight_delay.tables] == [table.name for table in flight_delay.tables]
    features = load_object(flight_delay.features)(some)
    assert isinstance(flight_delay, UseCase)
    for name in (flight_delay.time, *flight_delay.categorical, *flight_delay.slices, *flight_delay.key):
        assert name in features
    assert (features[flight_delay.time] - features["predicted_at"] == pd.Timedelta(flight_delay.horizon)).all()
    assert flight_delay.lookback >= timedelta(days=28) + flight_delay.horizon
