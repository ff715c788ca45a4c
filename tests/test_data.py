"""Deliveries come in twice, late, wrong, broken off or all at once, and the tables stay what they must be."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pandera.pandas as pandera
import pyarrow
import pytest
from deltalake import DeltaTable, write_deltalake

from mlops_course.data import (
    DataError,
    Delivery,
    Validation,
    build_features,
    check_rows,
    conform,
    feature_names,
    ingest,
    labelled_features,
    month_after,
    months,
    newest_reference,
    parse_month,
    read_table,
    replace_months,
    require_history,
    split_reference,
    split_rows,
    table_version,
    validate,
    widen_column,
)
from mlops_course.environment import CourseError, Settings, WorkspaceError
from mlops_course.project import (
    DeliveryError,
    Table,
    find_file,
    flight_delay,
    late_label,
    read_delivery,
    supplier_folder,
)

pytestmark = pytest.mark.filterwarnings("ignore:Series.values returning:DeprecationWarning")  # inside pyarrow

Tables = dict[str, pd.DataFrame]
JANUARY, FEBRUARY, MARCH = "2013-01", "2013-02", "2013-03"
KEY = list(flight_delay.key)
posix_only = pytest.mark.skipif(os.name == "nt", reason="uses POSIX signals")


# ---------------------------------------------------------------------------------------------------------------------
# Small deliveries of real rows


@pytest.fixture(scope="module")
def delivered() -> dict[str, Tables]:
    """Three months, as the supplier delivers them, but only every thirtieth flight."""
    whole = {month: read_delivery(month) for month in (JANUARY, FEBRUARY, MARCH)}
    return {month: tables | {"flights": tables["flights"].iloc[::30]} for month, tables in whole.items()}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """An empty folder for deliveries."""
    folder = tmp_path / "source"
    folder.mkdir()
    return folder


def put(source: Path, month: str, tables: Tables, ending: str = "parquet") -> Path:
    """Lay a delivery down in a folder of its own, in place of any that is there."""
    folder = source / month
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, table in tables.items():
        write = table.to_parquet if ending == "parquet" else table.to_csv
        write(folder / f"{name}.{ending}", index=False)
    return folder


class Desk:
    """A workspace and a folder of deliveries for it."""

    def __init__(self, settings: Settings, source: Path) -> None:
        self.settings, self.source = settings, source

    def take(self, month: str, tables: Tables) -> Delivery:
        """Let a delivery arrive, and take it in."""
        put(self.source, month, tables)
        return ingest(self.settings, flight_delay, month, self.source)

    def check(self, *periods: str) -> Validation:
        """Validate months of what has been taken in last."""
        names = [table.name for table in flight_delay.tables]
        raw = {name: newest_reference(self.settings, f"flight-delay/raw_{name}") for name in names}
        return validate(self.settings, flight_delay, raw, periods)

    def read(self, name: str, *periods: str) -> pd.DataFrame:
        """The newest version of a table."""
        return read_table(self.settings, newest_reference(self.settings, f"flight-delay/{name}"), periods or None)

    def state(self) -> dict[str, list[str]]:
        """Every file of every table."""
        files = sorted(path.relative_to(self.settings.data) for path in self.settings.data.rglob("*") if path.is_file())
        return {"versions": self.versions(), "files": [path.as_posix() for path in files]}

    def versions(self) -> list[str]:
        """Every table with its newest version."""
        names = sorted(path.name for path in self.settings.data.glob("flight-delay/*"))
        return [newest_reference(self.settings, f"flight-delay/{name}") for name in names]


@pytest.fixture
def desk(settings: Settings, source: Path) -> Desk:
    """An empty workspace."""
    return Desk(settings, source)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory, delivered: dict[str, Tables]) -> Path:
    """The tables of a workspace with January and February in it, checked."""
    folder = tmp_path_factory.mktemp("template")
    desk = Desk(Settings(home=folder / "workspace").prepare(), folder)
    for month in (JANUARY, FEBRUARY):
        desk.take(month, delivered[month])
    desk.check(JANUARY, FEBRUARY)
    return desk.settings.data


@pytest.fixture
def full_desk(desk: Desk, template: Path) -> Desk:
    """A workspace with January and February in it, checked."""
    shutil.copytree(template, desk.settings.data, dirs_exist_ok=True)
    return desk


def change(tables: Tables, name: str, **columns: object) -> Tables:
    """A delivery with other columns in one of its tables."""
    return tables | {name: tables[name].assign(**columns)}


def arriving(flights: pd.DataFrame, delay: pd.Series) -> pd.DataFrame:
    """The same flights with another delay at arrival, and with the clock time that goes with it."""
    clock = flights["sched_arr_time"] // 100 * 60 + flights["sched_arr_time"] % 100 + delay
    return flights.assign(arr_delay=delay, arr_time=clock % 1440 // 60 * 100 + clock % 60)


def one_line(error: CourseError) -> bool:
    """A message that a person can read: one line, not a page."""
    return "\n" not in str(error) and 20 < len(str(error)) < 700


# ---------------------------------------------------------------------------------------------------------------------
# Months and references


@pytest.mark.parametrize(
    "text", ["2013-1", "2013-13", "2013-00", "201301", "Jan 2013", "2013_01", "", "2013-01-01", "20x3-01"]
)
def test_a_month_in_another_form_is_refused(text: str) -> None:
    with pytest.raises(DataError, match=r"not a month.*such as 2013-01"):
        parse_month(text)


def test_months_are_listed_and_counted_across_years() -> None:
    assert months("2012-11", "2013-02") == ["2012-11", "2012-12", "2013-01", "2013-02"]
    assert months("2013-05", "2013-05") == ["2013-05"]
    assert (month_after("2013-12"), month_after("2013-01", -1)) == ("2014-01", "2012-12")
    with pytest.raises(DataError, match="2013-01 lies before the first month 2013-02"):
        months("2013-02", "2013-01")


@pytest.mark.parametrize("reference", ["flights", "flights@", "@3", "flights@latest", "flights@-1", "flights@1.0"])
def test_a_table_without_a_version_is_refused(reference: str) -> None:
    with pytest.raises(DataError, match="name@version"):
        split_reference(reference)


@pytest.mark.parametrize("reference", ["flight-delay/flights@99", "flight-delay/trains@0", "trains/flights@0"])
def test_a_version_that_is_not_there_is_named(full_desk: Desk, reference: str) -> None:
    with pytest.raises(DataError, match=f"can't read {reference}") as caught:
        read_table(full_desk.settings, reference)
    assert one_line(caught.value)


def test_a_version_whose_files_are_gone_is_named(full_desk: Desk) -> None:
    for path in (full_desk.settings.data / "flight-delay" / "flights").rglob("*.parquet"):
        path.unlink()
    with pytest.raises(DataError, match=r"can't read flight-delay/flights@.*gone or damaged") as caught:
        full_desk.read("flights")
    assert one_line(caught.value)


def test_months_and_columns_can_be_read_alone(full_desk: Desk) -> None:
    reference = newest_reference(full_desk.settings, "flight-delay/flights")
    rows = read_table(full_desk.settings, reference, [FEBRUARY], ["carrier", "period"])
    assert list(rows.columns) == ["carrier", "period"]
    assert set(rows["period"]) == {FEBRUARY}
    assert read_table(full_desk.settings, reference, ["1999-01"]).empty


# ---------------------------------------------------------------------------------------------------------------------
# Twice, corrected, late


def test_the_same_delivery_twice_changes_nothing(full_desk: Desk, delivered: dict[str, Tables]) -> None:
    before = full_desk.state()
    again = full_desk.take(JANUARY, delivered[JANUARY])
    assert again.changed == dict.fromkeys(("flights", "weather", "planes", "airports"), False)
    checked = full_desk.check(JANUARY, FEBRUARY)
    assert checked.changed == []
    assert full_desk.state() == before


def test_the_suppliers_whole_months_twice_change_nothing(settings: Settings) -> None:
    first = [ingest(settings, flight_delay, month) for month in (JANUARY, FEBRUARY)][-1]
    checked = validate(settings, flight_delay, first.tables, [JANUARY, FEBRUARY])
    features = build_features(settings, flight_delay, checked.tables, JANUARY, FEBRUARY)
    again = [ingest(settings, flight_delay, month) for month in (FEBRUARY, JANUARY)][-1]
    assert again.tables == first.tables
    assert validate(settings, flight_delay, again.tables, [JANUARY, FEBRUARY]).tables == checked.tables
    assert build_features(settings, flight_delay, checked.tables, JANUARY, FEBRUARY) == features


def test_a_corrected_month_replaces_only_itself(full_desk: Desk, delivered: dict[str, Tables]) -> None:
    old, january = full_desk.versions(), full_desk.read("flights", JANUARY)
    february = full_desk.read("flights", FEBRUARY)
    flights = delivered[FEBRUARY]["flights"]
    corrected = arriving(flights, flights["arr_delay"] + 1).iloc[1:]
    delivery = full_desk.take(FEBRUARY, delivered[FEBRUARY] | {"flights": corrected})
    assert delivery.changed == {"flights": True, "weather": False, "planes": False, "airports": False}
    assert delivery.periods == [FEBRUARY]
    assert full_desk.check(*delivery.periods).changed == [FEBRUARY]
    pd.testing.assert_frame_equal(full_desk.read("flights", JANUARY), january)
    assert len(full_desk.read("flights", FEBRUARY)) == len(february) - 1
    assert full_desk.read("flights", FEBRUARY)["arr_delay"].sum() != february["arr_delay"].sum()
    before = next(reference for reference in old if reference.startswith("flight-delay/flights@"))
    pd.testing.assert_frame_equal(read_table(full_desk.settings, before, [FEBRUARY]), february)


def test_late_rows_land_in_the_month_they_are_about(desk: Desk, delivered: dict[str, Tables]) -> None:
    january, february = delivered[JANUARY], delivered[FEBRUARY]
    held_back = january["flights"].iloc[-5:]
    short = january | {"flights": january["flights"].iloc[:-5]}
    with_late = february | {"flights": pd.concat([held_back, february["flights"]])}
    desk.take(JANUARY, short)
    assert desk.check(JANUARY).rows["flights"] == len(january["flights"]) - 5
    delivery = desk.take(FEBRUARY, with_late)
    assert delivery.late == {"flights": 5, "weather": 0}
    assert delivery.periods == [JANUARY, FEBRUARY]
    assert desk.check(*delivery.periods).changed == [JANUARY, FEBRUARY]
    complete = desk.read("flights", JANUARY)
    assert len(complete) == len(january["flights"])
    assert complete[KEY].equals(complete[KEY].sort_values(KEY, ignore_index=True))

    redelivered = desk.take(JANUARY, change(short, "flights", distance=short["flights"]["distance"] + 1))
    assert redelivered.changed["flights"]
    assert desk.check(JANUARY).rows["flights"] == len(january["flights"]), "the late rows must survive"

    without_late = desk.take(FEBRUARY, february)
    assert without_late.periods == [JANUARY, FEBRUARY], "January lost rows, so it must be checked again"
    assert desk.check(*without_late.periods).rows["flights"] == len(january["flights"]) + len(february["flights"]) - 5


def test_the_newest_delivery_of_a_row_wins(full_desk: Desk, delivered: dict[str, Tables]) -> None:
    flights = delivered[JANUARY]["flights"]
    wrong = flights[flights["arr_delay"].notna()].iloc[[10]]
    right = arriving(wrong, pd.Series(77.0, wrong.index))
    march = delivered[MARCH]
    delivery = full_desk.take(MARCH, march | {"flights": pd.concat([march["flights"], right])})
    checked = full_desk.check(*delivery.periods)
    assert (checked.duplicates["flights"], checked.changed) == (1, [JANUARY, MARCH])
    table = full_desk.read("flights", JANUARY)
    assert len(table) == len(flights)
    row = table[(table["flight"] == wrong["flight"].item()) & (table["dep_time"] == wrong["dep_time"].item())]
    assert 77.0 in row["arr_delay"].to_numpy()


def test_a_bad_correction_does_not_wipe_out_a_good_row(full_desk: Desk, delivered: dict[str, Tables]) -> None:
    before = full_desk.read("flights", JANUARY)
    wrong = delivered[JANUARY]["flights"].iloc[[0]].assign(dest="nowhere")
    flights = pd.concat([delivered[MARCH]["flights"], wrong])
    checked_months = full_desk.take(MARCH, delivered[MARCH] | {"flights": flights}).periods
    checked = full_desk.check(*checked_months)
    assert JANUARY in checked_months
    pd.testing.assert_frame_equal(full_desk.read("flights", JANUARY), before)
    assert checked.report.query("table == 'flights'")["value"].tolist() == ["nowhere"]


def test_two_different_rows_with_one_key_in_a_delivery_are_both_put_aside(
    full_desk: Desk, delivered: dict[str, Tables]
) -> None:
    flights = delivered[JANUARY]["flights"]
    twin, same = flights.iloc[[0]].assign(distance=lambda row: row["distance"] + 1), flights.iloc[[1]]
    full_desk.take(JANUARY, delivered[JANUARY] | {"flights": pd.concat([flights, twin, same])})
    checked = full_desk.check(JANUARY)
    found = checked.report.query("table == 'flights'")
    assert found["check"].tolist() == ["one row for each key"] * 2
    assert len(full_desk.read("flights", JANUARY)) == len(flights) - 1


def test_the_list_of_the_newest_month_counts_whenever_it_comes(full_desk: Desk, delivered: dict[str, Tables]) -> None:
    before = full_desk.read("planes")
    shorter = delivered[JANUARY]["planes"].iloc[:100]
    full_desk.take(JANUARY, delivered[JANUARY] | {"planes": shorter})
    full_desk.check(JANUARY)
    pd.testing.assert_frame_equal(full_desk.read("planes"), before)


def test_features_are_not_built_over_a_gap(full_desk: Desk, delivered: dict[str, Tables]) -> None:
    april = read_delivery("2013-04")
    full_desk.take("2013-04", april | {"flights": april["flights"].iloc[::30]})
    clean = full_desk.check("2013-04").tables
    with pytest.raises(DataError, match=r"need flights of 2013-03, which are not there"):
        build_features(full_desk.settings, flight_delay, clean, "2013-04", "2013-04")


def test_rows_of_a_later_month_are_refused(full_desk: Desk, delivered: dict[str, Tables]) -> None:
    before = full_desk.state()
    mixed = pd.concat([delivered[JANUARY]["flights"], delivered[MARCH]["flights"].head(1)])
    with pytest.raises(DataError, match="flights of the delivery 2013-01 holds rows of 2013-03, which is later"):
        full_desk.take(JANUARY, delivered[JANUARY] | {"flights": mixed})
    assert full_desk.state() == before


def test_the_order_of_deliveries_does_not_matter(tmp_path: Path, delivered: dict[str, Tables]) -> None:
    tables = []
    for order in ((JANUARY, FEBRUARY, MARCH), (MARCH, JANUARY, FEBRUARY)):
        desk = Desk(Settings(home=tmp_path / order[0]).prepare(), tmp_path / order[0])
        for month in order:
            desk.take(month, delivered[month])
        desk.check(*order)
        tables.append(desk.read("flights").sort_values(KEY, ignore_index=True))
    pd.testing.assert_frame_equal(*tables)


# ---------------------------------------------------------------------------------------------------------------------
# Bad rows


def test_a_bad_row_is_put_aside_with_all_that_is_needed_to_complain(
    full_desk: Desk, delivered: dict[str, Tables]
) -> None:
    flights = delivered[JANUARY]["flights"].copy()
    place = flights.index[flights["dep_delay"].notna()][7]
    flights.loc[place, ["dep_delay", "origin"]] = [99999.0, "BOS"]
    full_desk.take(JANUARY, delivered[JANUARY] | {"flights": flights})
    checked = full_desk.check(JANUARY)
    assert checked.rows["flights"] == len(flights) - 1
    report = checked.report.set_index("column")
    assert set(report.index) == {"dep_delay", "origin"}
    assert set(report["table"]) == {"flights"} and set(report["period"]) == {JANUARY}
    assert report["value"].to_dict() == {"dep_delay": "99999.0", "origin": "BOS"}
    assert re.search("-180.*2880", report.loc["dep_delay", "check"])
    assert re.search("EWR.*JFK.*LGA", report.loc["origin", "check"])
    row = json.loads(report.loc["origin", "row"])
    assert (row["flight"], row["dep_delay"], row["origin"]) == (flights.loc[place, "flight"], 99999.0, "BOS")
    assert len(full_desk.read("quarantine", JANUARY)) == 2
    assert "BOS" not in set(full_desk.read("flights")["origin"])


def test_the_quarantine_heals_when_a_corrected_delivery_comes(full_desk: Desk, delivered: dict[str, Tables]) -> None:
    """The real hurricane of February stays in quarantine; January's bad row goes when January is corrected."""
    assert full_desk.read("quarantine")["value"].tolist() == ["1048.36058"]
    flights = delivered[JANUARY]["flights"]
    full_desk.take(
        JANUARY, change(delivered[JANUARY], "flights", distance=flights["distance"].where(flights.index > 0, 1))
    )
    full_desk.check(JANUARY)
    assert sorted(full_desk.read("quarantine")["value"]) == ["1", "1048.36058"]
    full_desk.take(JANUARY, delivered[JANUARY])
    healed = full_desk.check(JANUARY)
    assert healed.report.empty and healed.changed == [JANUARY]
    assert full_desk.read("quarantine")["value"].tolist() == ["1048.36058"]
    assert len(full_desk.read("flights", JANUARY)) == len(flights)


def test_a_row_is_bad_only_once_however_often_it_is_checked(full_desk: Desk) -> None:
    before = full_desk.state()
    for _ in range(2):
        assert full_desk.check(JANUARY, FEBRUARY).report["value"].tolist() == ["1048.36058"]
    assert full_desk.state() == before


def test_a_few_bad_rows_are_tolerated_and_many_are_not(delivered: dict[str, Tables]) -> None:
    table, flights = flight_delay.tables[0], delivered[JANUARY]["flights"]
    flights = conform(flights, table.contract()).assign(period=JANUARY, delivery=JANUARY)
    tolerated = int(0.02 * len(flights))
    for number in (tolerated, tolerated + 1):
        bad = flights.assign(dest=flights["dest"].where(np.arange(len(flights)) >= number, "nowhere"))
        if number == tolerated:
            good, report = split_rows(bad, table, JANUARY)
            assert (len(good), len(report)) == (len(flights) - number, number)
        else:
            with pytest.raises(DataError, match=r"rows of flights in 2013-01 are bad, most often dest"):
                split_rows(bad, table, JANUARY)


def test_good_rows_break_no_promise(delivered: dict[str, Tables]) -> None:
    for table in flight_delay.tables:
        found = check_rows(conform(delivered[JANUARY][table.name], table.contract()), table.contract())
        assert found.empty and list(found.columns) == ["column", "check", "value", "index"]


@pytest.mark.parametrize("word", ["", "  ", "UNKNOWN", "nan", "None", "NULL", "N/A"])
@pytest.mark.parametrize("number", [1, 40])
def test_a_key_that_names_nothing_is_refused(
    full_desk: Desk, delivered: dict[str, Tables], word: str, number: int
) -> None:
    flights = delivered[JANUARY]["flights"]
    blank = flights.assign(tailnum=flights["tailnum"].where(np.arange(len(flights)) >= number, word))
    full_desk.take(JANUARY, delivered[JANUARY] | {"flights": blank})
    if number == 1:
        report = full_desk.check(JANUARY).report
        assert report[["table", "column", "value"]].to_numpy().tolist() == [["flights", "tailnum", word]]
        assert word not in set(full_desk.read("flights", JANUARY)["tailnum"])
    else:
        with pytest.raises(DataError, match=r"40 of .* rows of flights in 2013-01 are bad, most often tailnum"):
            full_desk.check(JANUARY)


def test_a_key_of_any_table_names_something() -> None:
    """Whatever the contract of somebody else's table says."""
    contract = pandera.DataFrameSchema({"shop": pandera.Column("str"), "sold": pandera.Column("int64")}, name="sales")
    table = Table("sales", lambda: contract, key=("shop",))
    rows = pd.DataFrame({"shop": [f"shop {number}" for number in range(200)], "sold": 1})
    rows.loc[7, "shop"] = " Unknown "
    good, report = split_rows(rows.assign(period=JANUARY, delivery=JANUARY), table, JANUARY)
    assert len(good) == 199
    assert report[["column", "check", "value"]].to_numpy().tolist() == [
        ["shop", "no blank and no placeholder in a key", " Unknown "]
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Whole months, and a few rows of one

DECEMBER = "2012-12"


def of_december(flights: pd.DataFrame, number: int, **columns: object) -> pd.DataFrame:
    """Flights of New Year's Eve: real rows that say consistently that they are a year and some hours older."""
    rows = flights[flights["day"] == 31].head(number)
    before = pd.to_datetime(rows["time_hour"]) - pd.Timedelta(days=31)
    return rows.assign(year=2012, month=12, time_hour=before.dt.strftime("%Y-%m-%dT%H:%M:%SZ"), **columns)


HALVES: dict[str, tuple[str, Callable[[pd.DataFrame], pd.DataFrame], str]] = {
    "its first week": ("flights", lambda rows: rows[rows["day"] < 8], "it has rows on 7 of its 28 days"),
    "its first half": ("flights", lambda rows: rows[rows["day"] < 15], r"on 14 of its days \(15, 16, 17, 18, 19 …\)"),
    "weather of its first half": ("weather", lambda rows: rows[rows["day"] < 15], r"on 14 of its days \(15, 16"),
    "every second row": ("flights", lambda rows: rows.iloc[::2], "it has .* a day, other months have"),
    "without an airport": ("flights", lambda rows: rows[rows["origin"] != "LGA"], "of LGA a day, other months have"),
    "without a day": ("flights", lambda rows: rows[rows["day"] != 9], r"of EWR are missing on 1 of its days \(9\)"),
    "without a day at one airport": (
        "flights", lambda rows: rows[(rows["day"] != 9) | (rows["origin"] != "JFK")], r"of JFK are missing on 1 of"
    ),
    "three days without weather": (
        "weather", lambda rows: rows[(rows["day"] < 26) | (rows["hour"] < 4)], r"rows of EWR .* \(26, 27, 28\)"
    ),
}  # fmt: skip


@pytest.mark.parametrize("half", HALVES)
def test_half_a_month_is_refused_until_the_rest_has_come(
    full_desk: Desk, delivered: dict[str, Tables], half: str
) -> None:
    name, cut, message = HALVES[half]
    before = {table: full_desk.read(table) for table in ("flights", "weather")}
    february = delivered[FEBRUARY]
    full_desk.take(FEBRUARY, february | {name: cut(february[name])})
    message = rf"{name} of {FEBRUARY} is not whole: .*{message}.*Ask the supplier for the rest"
    with pytest.raises(DataError, match=message) as caught:
        full_desk.check(JANUARY, FEBRUARY)
    assert one_line(caught.value)
    for table, rows in before.items():
        pd.testing.assert_frame_equal(full_desk.read(table), rows)
    full_desk.take(FEBRUARY, february)
    assert full_desk.check(FEBRUARY).changed == []


@pytest.mark.slow
def test_every_real_month_is_whole_beside_the_others(settings: Settings) -> None:
    """The thinnest day, the shortest month and the stormiest one are no reason to call a person."""
    year = months("2013-01", "2013-12")
    raw = [ingest(settings, flight_delay, month) for month in year][-1].tables
    checked = validate(settings, flight_delay, raw, year)
    assert checked.partial == {} and checked.rows["flights"] == 336_776
    assert validate(settings, flight_delay, raw, ["2013-11"]).changed == []


def test_a_late_row_of_a_month_that_nobody_delivered_stops_nothing(desk: Desk, delivered: dict[str, Tables]) -> None:
    """One row has no typical distance, no thirty days, and no other rows of which it would be two per cent."""
    january = delivered[JANUARY]
    late = of_december(read_delivery(JANUARY)["flights"], 3)
    late = late.assign(distance=[5000, 4900, 3])  # a median far from usual, and one bad row of three
    desk.take(JANUARY, january | {"flights": pd.concat([late, january["flights"]])})
    checked = desk.check(DECEMBER, JANUARY)
    assert checked.rows["flights"] == len(january["flights"]) + 2
    assert checked.partial == {DECEMBER: "flights: it has rows on 1 of its 31 days"}
    assert checked.report[["period", "column", "value"]].to_numpy().tolist() == [[DECEMBER, "distance", "3"]]
    tables = checked.tables
    assert len(read_table(desk.settings, build_features(desk.settings, flight_delay, tables, JANUARY, JANUARY)))


def test_a_withdrawn_month_is_emptied_and_the_others_go_on(desk: Desk, delivered: dict[str, Tables]) -> None:
    """A refused delivery, a corrected one, and whoever goes on naming the old months: all of that ends well."""
    january, february = delivered[JANUARY], delivered[FEBRUARY]
    late = of_december(read_delivery(JANUARY)["flights"], 2)
    broken = pd.concat([late, january["flights"].assign(dest="nowhere")])
    named = desk.take(JANUARY, january | {"flights": broken}).periods
    assert named == [DECEMBER, JANUARY]
    with pytest.raises(DataError, match="rows of flights in 2013-01 are bad, most often dest"):
        desk.check(*named)
    corrected = desk.take(JANUARY, january)
    assert corrected.periods == [DECEMBER, JANUARY], "December may differ from before: it is gone"
    for _ in range(2):  # and again, as when the months come out of a cache
        checked = desk.check(*named)
        assert checked.rows["flights"] == len(january["flights"])
        assert set(desk.read("flights")["period"]) == {JANUARY}
    desk.take(FEBRUARY, february | {"flights": pd.concat([late, february["flights"]])})
    assert desk.check(DECEMBER, FEBRUARY).changed == [DECEMBER, FEBRUARY]
    assert len(desk.read("flights", DECEMBER)) == 2
    assert desk.check(*desk.take(FEBRUARY, february).periods).changed == [DECEMBER]
    assert set(desk.read("flights")["period"]) == {JANUARY, FEBRUARY}
    assert desk.check(DECEMBER, JANUARY, FEBRUARY).changed == []
    with pytest.raises(DataError, match=r"flights has no rows of 2012-11.*Ingest those months first"):
        desk.check("2012-11", JANUARY)


def test_a_row_of_long_ago_is_no_beginning_of_the_history(desk: Desk, delivered: dict[str, Tables]) -> None:
    """The features of January need December only when the data really begin before it."""
    january = delivered[JANUARY]
    late = of_december(read_delivery(JANUARY)["flights"], 1)
    year_before = pd.to_datetime(late["time_hour"]) - pd.Timedelta(days=366)
    long_ago = late.assign(year=2011, time_hour=year_before.dt.strftime("%Y-%m-%dT%H:%M:%SZ"))
    desk.take(JANUARY, january | {"flights": pd.concat([long_ago, january["flights"]])})
    tables = desk.check("2011-12", JANUARY).tables
    assert len(desk.read("flights", "2011-12")) == 1
    build_features(desk.settings, flight_delay, tables, JANUARY, JANUARY)


def test_a_quiet_season_is_a_part_of_the_history() -> None:
    """Months that are whole and small count, fragments of one don't, as far as anybody knows what was delivered."""
    year = dict.fromkeys(months(JANUARY, "2013-12"), 1000)
    quiet = year | {"2013-06": 40, "2013-07": 40}
    require_history(flight_delay, quiet, ["2013-08"])
    require_history(flight_delay, quiet, ["2013-08"], quiet | {"2013-07": 60})
    require_history(flight_delay, quiet | {"2013-07": 4}, ["2013-08"], quiet | {"2013-07": 4})
    never = {month: rows for month, rows in quiet.items() if month != "2013-07"}
    for deliveries, rows in ((None, 4), (never, 40), (year, 40)):
        with pytest.raises(DataError, match=r"need flights of 2013-07, which are not there"):
            require_history(flight_delay, quiet | {"2013-07": rows}, ["2013-08"], deliveries)


def test_features_are_built_over_a_quiet_month(desk: Desk, delivered: dict[str, Tables]) -> None:
    for month in (JANUARY, FEBRUARY, MARCH):
        desk.take(month, delivered[month])
    tables = desk.check(JANUARY, FEBRUARY, MARCH).tables
    name = "flight-delay/raw_flights"
    for table in (name, "flight-delay/flights"):  # as if February had always had so few flights
        rows = read_table(desk.settings, newest_reference(desk.settings, table), [FEBRUARY]).iloc[::40]
        by = "delivery" if table == name else "period"
        tables["flights"] = replace_months(desk.settings, table, rows, by)[0]
    assert build_features(desk.settings, flight_delay, tables, MARCH, MARCH)


# ---------------------------------------------------------------------------------------------------------------------
# Another shape, another meaning

DRIFTS: dict[str, tuple[str, Callable[[pd.DataFrame], pd.DataFrame], str]] = {
    "a renamed column": (
        "flights",
        lambda frame: frame.rename(columns={"dep_delay": "departure_delay"}),
        r"flights has no column 'dep_delay'.*renamed to 'departure_delay'\?",
    ),
    "a column left out": ("weather", lambda frame: frame.drop(columns="visib"), "weather has no column 'visib'"),
    "times without zone, as text": (
        "flights",
        lambda frame: frame.assign(time_hour=frame["time_hour"].str.rstrip("Z")),
        r"flights.time_hour must hold times with a time zone.*row 0 holds '2013-",
    ),
    "times without zone": (
        "weather",
        lambda frame: frame.assign(time_hour=pd.to_datetime(frame["time_hour"]).dt.tz_localize(None)),
        "weather.time_hour must hold times with a time zone",
    ),
    "a missing time": (
        "flights",
        lambda frame: frame.assign(time_hour=frame["time_hour"].where(np.arange(len(frame)) != 3)),
        r"time_hour must hold times.*row 3 holds nan \(1 such row\)",
    ),
    "no time at all": ("flights", lambda frame: frame.assign(time_hour="2013-99-01T10:00:00Z"), "row 0 holds '2013-99"),
    "text in a number": (
        "flights",
        lambda frame: frame.assign(
            arr_delay=frame["arr_delay"].astype("str").where(np.arange(len(frame)) != 5, "two hours")
        ),
        r"flights.arr_delay must hold a number, but row 5 holds 'two hours' \(1 such row\)",
    ),
    "half a mile": (
        "flights",
        lambda frame: frame.assign(distance=frame["distance"] + 0.5),
        "must hold a whole number",
    ),
    "a distance missing": (
        "flights",
        lambda frame: frame.assign(distance=frame["distance"].where(np.arange(len(frame)) != 2)),
        r"flights.distance must hold a whole number, but row 2 holds .*nan",
    ),
    "seats missing": (
        "planes",
        lambda frame: frame.assign(seats=frame["seats"].where(frame.index > 0)),
        "planes.seats",
    ),
}


@pytest.mark.parametrize("drift", DRIFTS)
def test_a_delivery_of_another_shape_is_refused_as_a_whole(
    full_desk: Desk, delivered: dict[str, Tables], drift: str
) -> None:
    name, damage, message = DRIFTS[drift]
    before, march = full_desk.state(), delivered[MARCH]
    with pytest.raises(DataError, match=message) as caught:
        full_desk.take(MARCH, march | {name: damage(march[name])})
    assert one_line(caught.value)
    assert full_desk.state() == before
    assert full_desk.take(MARCH, march).changed["flights"], "the right delivery is taken in afterwards"


MEANINGS: dict[str, tuple[str, Callable[[pd.DataFrame], pd.DataFrame], str]] = {
    "km/h for mph": (
        "weather",
        lambda frame: frame.assign(wind_speed=frame["wind_speed"] * 1.609344),
        "weather of 2013-03 breaks a promise about the whole table: wind_speed must have median 3 to 14 mph",
    ),
    "hectopascal for inches of mercury": (
        "weather",
        lambda frame: frame.assign(pressure=frame["pressure"] / 33.86),
        r"most often pressure: .*900.*1100",
    ),
    "New York's clock called UTC": (
        "flights",
        lambda frame: frame.assign(
            time_hour=pd.to_datetime(frame["time_hour"])
            .dt.tz_convert("America/New_York").dt.tz_localize(None).dt.strftime("%Y-%m-%dT%H:%M:%SZ")
        ),
        r"in 2013-03 are bad, most often \(row\): time_hour \(UTC\) and year, month, day, hour \(New York\) agree",
    ),
    "minutes of the day for clock times": (
        "flights",
        lambda frame: frame.assign(sched_dep_time=frame["sched_dep_time"] // 100 * 60 + frame["sched_dep_time"] % 100),
        r"\(row\): sched_dep_time and hour, minute agree",
    ),
    "hours for minutes of delay": (
        "flights",
        lambda frame: frame.assign(dep_delay=frame["dep_delay"] * 3600),
        r"most often dep_delay: .*-180.*2880",
    ),
}  # fmt: skip


@pytest.mark.parametrize("meaning", MEANINGS)
def test_a_delivery_of_another_meaning_is_refused_until_it_is_corrected(
    full_desk: Desk, delivered: dict[str, Tables], meaning: str
) -> None:
    name, damage, message = MEANINGS[meaning]
    march = delivered[MARCH]
    clean = [f"flight-delay/{name}" for name in ("airports", "flights", "planes", "quarantine", "weather")]
    before = [table_version(full_desk.settings, table) for table in clean]
    full_desk.take(MARCH, march | {name: damage(march[name])})
    with pytest.raises(DataError, match=message) as caught:
        full_desk.check(JANUARY, FEBRUARY, MARCH)
    assert one_line(caught.value)
    assert [table_version(full_desk.settings, table) for table in clean] == before
    full_desk.take(MARCH, march)
    assert full_desk.check(MARCH).changed == [MARCH]


def test_new_columns_are_ignored(full_desk: Desk, delivered: dict[str, Tables]) -> None:
    before = full_desk.state()
    full_desk.take(JANUARY, change(delivered[JANUARY], "flights", gate="B12", distance_km=5))
    assert full_desk.state() == before


# ---------------------------------------------------------------------------------------------------------------------
# Nothing there, nothing readable


def test_a_month_nobody_delivered_is_named_with_what_there_is(settings: Settings) -> None:
    with pytest.raises(DeliveryError, match=r"no rows of 2014-01 in flights.*2013-01 to 2013-12"):
        ingest(settings, flight_delay, "2014-01")
    with pytest.raises(DataError, match="not a month"):
        ingest(settings, flight_delay, "2013-1")
    assert list(settings.data.iterdir()) == []


def test_each_stage_names_the_month_it_misses(full_desk: Desk) -> None:
    settings, tables = full_desk.settings, full_desk.check(JANUARY, FEBRUARY).tables
    with pytest.raises(DataError, match=r"flights has no rows of 2013-04.*Ingest"):
        full_desk.check(FEBRUARY, "2013-04")
    with pytest.raises(DataError, match=r"need flights of 2013-03, which are not there.*Ingest and validate"):
        build_features(settings, flight_delay, tables, FEBRUARY, MARCH)
    features = build_features(settings, flight_delay, tables, FEBRUARY, FEBRUARY)
    with pytest.raises(DataError, match=rf"{features} has no rows of 2013-01.*Build the features"):
        labelled_features(settings, flight_delay, features, tables["flights"], JANUARY, FEBRUARY)


def test_a_source_that_is_not_there_is_named(settings: Settings, tmp_path: Path) -> None:
    with pytest.raises(DeliveryError, match="nowhere does not exist"):
        ingest(settings, flight_delay, JANUARY, tmp_path / "nowhere")
    with pytest.raises(DeliveryError, match="no file for the table flights"):
        ingest(settings, flight_delay, JANUARY, tmp_path)


def cut(path: Path) -> None:
    """Keep the first half of a file."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def fill(content: bytes) -> Callable[[Path], object]:
    """Replace a file's content."""
    return lambda path: path.write_bytes(content)


PNG = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR\x00\x00\x00\x01\x00\x00\x00\x01\x08\x06\x00\x00\x00\x1f\x15\xc4\x89" * 20


@pytest.mark.parametrize(
    ("ending", "damage"),
    [
        ("csv.zip", cut), ("csv.gz", cut), ("parquet", cut), ("parquet", fill(PNG)), ("parquet", fill(b"")),
        ("csv", fill(b"")), ("csv", fill(PNG)), ("csv.zip", fill(PNG)), ("csv.gz", fill(b"year,month\n2013,3\n")),
        ("csv", fill(b"year,month,day\n")), ("csv", fill(b'year,month\n2013,"3\n')),
        ("csv", fill(b"a,b\n1,2\n3,4,5\n")),
    ],
)  # fmt: skip
def test_an_unreadable_file_is_named_and_changes_nothing(
    full_desk: Desk, delivered: dict[str, Tables], ending: str, damage: Callable[[Path], object]
) -> None:
    before = full_desk.state()
    folder = put(full_desk.source, MARCH, delivered[MARCH], ending)
    damage(folder / f"flights.{ending}")
    with pytest.raises(DeliveryError, match=rf"{MARCH}.*flights\.{ending}.*Ask for the file again") as caught:
        ingest(full_desk.settings, flight_delay, MARCH, full_desk.source)
    assert one_line(caught.value)
    assert full_desk.state() == before
    put(full_desk.source, MARCH, delivered[MARCH], ending)
    assert ingest(full_desk.settings, flight_delay, MARCH, full_desk.source).changed["flights"]


# ---------------------------------------------------------------------------------------------------------------------
# Files of one's own


@pytest.fixture(scope="module")
def supplied(tmp_path_factory: pytest.TempPathFactory) -> Tables:
    """The raw tables of February, from the supplier."""
    desk = Desk(Settings(home=tmp_path_factory.mktemp("supplied")).prepare(), Path())
    ingest(desk.settings, flight_delay, FEBRUARY)
    return {table.name: desk.read(f"raw_{table.name}") for table in flight_delay.tables}


def as_typed(tables: Tables) -> Tables:
    """The same content in the types that other programs write."""
    flights, weather = (
        tables[name].assign(
            time_hour=lambda frame: pd.to_datetime(frame["time_hour"]).dt.tz_convert("America/New_York")
        )
        for name in ("flights", "weather")
    )
    flights = flights.astype({"carrier": "category", "distance": "int16", "dep_delay": "float32", "arr_delay": "Int64"})
    return tables | {"flights": flights, "weather": weather.convert_dtypes(dtype_backend="pyarrow")}


@pytest.mark.parametrize("layout", ["one file", "a folder a delivery"])
@pytest.mark.parametrize("ending", ["csv", "csv.gz", "parquet", "typed parquet"])
def test_own_files_give_the_same_tables_as_the_supplier(
    settings: Settings, source: Path, supplied: Tables, layout: str, ending: str
) -> None:
    tables = {month: read_delivery(month) for month in (JANUARY, FEBRUARY)}
    tables = {month: as_typed(some) if "typed" in ending else some for month, some in tables.items()}
    if layout == "one file":
        both = {name: pd.concat([tables[month][name] for month in tables]) for name in ("flights", "weather")}
        put(source, ".", tables[FEBRUARY] | both, ending.split()[-1])
    else:
        put(source, FEBRUARY, tables[FEBRUARY], ending.split()[-1])
    ingest(settings, flight_delay, FEBRUARY, source)
    desk = Desk(settings, source)
    for name, expected in supplied.items():
        pd.testing.assert_frame_equal(desk.read(f"raw_{name}"), expected)


def test_a_file_that_changes_is_read_again(full_desk: Desk, delivered: dict[str, Tables]) -> None:
    shorter = delivered[JANUARY] | {"flights": delivered[JANUARY]["flights"].iloc[1:]}
    assert full_desk.take(JANUARY, shorter).rows["flights"] == len(delivered[JANUARY]["flights"]) - 1


# ---------------------------------------------------------------------------------------------------------------------
# The writer's rules


def rows_of(month: str, number: int = 50, **columns: object) -> pd.DataFrame:
    """A small table of one month."""
    return pd.DataFrame({"period": [month] * number, "value": np.arange(number, dtype="float64")}).assign(**columns)


def test_another_order_of_rows_is_another_content(settings: Settings) -> None:
    first, _ = replace_months(settings, "table", rows_of(JANUARY))
    second, changed = replace_months(settings, "table", rows_of(JANUARY).iloc[::-1])
    assert (first != second, changed) == (True, [JANUARY])
    assert read_table(settings, second)["value"].tolist() == list(range(49, -1, -1))


def test_rows_keep_their_order_however_the_frame_was_put_together(settings: Settings) -> None:
    pieces = pd.concat([rows_of(JANUARY, 1, value=[float(number)]) for number in range(40)], ignore_index=True)
    reference, _ = replace_months(settings, "table", pieces)
    assert read_table(settings, reference)["value"].tolist() == [*map(float, range(40))]
    assert replace_months(settings, "table", pieces) == (reference, []), "and so the same delivery changes nothing"


def test_the_log_says_what_a_version_was_made_from(full_desk: Desk) -> None:
    def sources(name: str) -> dict[str, str]:
        table = DeltaTable(str(full_desk.settings.data / "flight-delay" / name))
        return dict(json.loads(table.history(1)[0]["sources"]))

    raw = newest_reference(full_desk.settings, "flight-delay/raw_flights")
    assert sources("flights") == {"raw_flights": raw}
    clean = {table.name: f"flight-delay/{table.name}@1" for table in flight_delay.tables}
    build_features(full_desk.settings, flight_delay, clean, JANUARY, JANUARY)
    assert sources("features") == clean


def test_versions_are_not_forgotten_after_a_month(settings: Settings) -> None:
    """Delta Lake shortens a log after 30 days, at the next checkpoint, unless the table says otherwise."""
    first, _ = replace_months(settings, "table", rows_of(JANUARY))
    place, old = settings.data / "table", time.time() - 40 * 86400
    for writes in (97, 8):
        for _ in range(writes):
            write_deltalake(str(place), rows_of(MARCH, 1), mode="overwrite", predicate=f"period = '{MARCH}'")
        for path in (place / "_delta_log").iterdir():
            os.utime(path, (old, old))
    assert len([*(place / "_delta_log").glob("*.checkpoint.parquet")]) == 1
    pd.testing.assert_frame_equal(read_table(settings, first), rows_of(JANUARY))


def test_another_set_of_columns_is_refused_unless_the_table_can_be_made_again(settings: Settings) -> None:
    reference, _ = replace_months(settings, "table", pd.concat([rows_of(JANUARY), rows_of(FEBRUARY)]))
    wider = rows_of(FEBRUARY, extra=1.0)
    with pytest.raises(DataError, match="the columns of table have changed") as caught:
        replace_months(settings, "table", wider)
    assert one_line(caught.value)
    assert table_version(settings, "table") == split_reference(reference)[1]
    derived, _ = replace_months(settings, "table", wider, derived=True)
    pd.testing.assert_frame_equal(read_table(settings, derived)[wider.columns], wider)


def test_text_where_numbers_were_is_refused(settings: Settings) -> None:
    reference, _ = replace_months(settings, "table", rows_of(JANUARY))
    with pytest.raises(CourseError, match="table") as caught:
        replace_months(settings, "table", rows_of(FEBRUARY, value="nine"))
    assert one_line(caught.value)
    assert f"table@{table_version(settings, 'table')}" == reference


INSTANTS = pd.to_datetime(["2013-01-01T10:00:00Z", "2013-01-01T11:30:00Z"])
TYPES: dict[str, tuple[object, object]] = {  # what the table holds, and what comes
    "a fraction where whole numbers were": ([1, 2], [1.5, 2.0]),
    "whole numbers where fractions were": ([1.5, 2.0], [1, 2]),
    "whole numbers written as floats": ([1, 2], [1.0, 2.0]),
    "two precisions": (np.float32([0.5, 1]), [0.1, 1.0]),
    "more bits": (np.int8([1, 2]), [1, 2]),
    "a number where True and False were": ([True, False], [2, 0]),
    "numbers where text was": (["1", "2"], [1, 2]),
    "text where numbers were": ([1, 2], ["1", "2"]),
    "times without a zone": (INSTANTS, INSTANTS.tz_localize(None)),
    "times with a zone": (INSTANTS.tz_localize(None), INSTANTS),
    "nanoseconds": (INSTANTS, INSTANTS.as_unit("ns") + pd.Timedelta(1, unit="ns")),
    "too large a number": ([1, 2], np.uint64([2**63 + 1, 2])),
    "two kinds in one column": ([1, 2], pd.Series(["1", 2], dtype="object")),
    "numbers where categories were": (pd.Categorical(["a", "b"]), [1, 2]),
}


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("month", [JANUARY, FEBRUARY])
def test_a_type_never_changes_in_silence(settings: Settings, kind: str, month: str) -> None:
    before, after = TYPES[kind]
    reference, _ = replace_months(settings, "table", rows_of(JANUARY, 2, value=before))
    kept = read_table(settings, reference)
    with pytest.raises(DataError, match=r"column value of the table table (holds|can't be kept as it is)") as caught:
        replace_months(settings, "table", rows_of(month, 2, value=after))
    assert one_line(caught.value)
    assert table_version(settings, "table") == split_reference(reference)[1]
    pd.testing.assert_frame_equal(read_table(settings, reference), kept)


def test_a_correction_of_a_large_number_beside_a_gap_is_a_change(settings: Settings) -> None:
    for number in (2**53 + 1, 2**53):
        frame = rows_of(JANUARY, 2, value=pd.array([number, None], dtype="Int64"))
        reference, changed = replace_months(settings, "table", frame)
        assert changed == [JANUARY]
        held = DeltaTable(str(settings.data / "table"), version=split_reference(reference)[1]).to_pyarrow_table()
        assert held["value"].to_pylist() == [number, None]
    assert replace_months(settings, "table", frame) == (reference, [])


NOON = datetime(2013, 1, 1, 12)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([date(2013, 1, 1), NOON], "days and times without a zone"),
        ([NOON, NOON.replace(tzinfo=UTC)], "times with a zone and times without a zone"),
        (["a", b"a"], "bytes and text"),
        ([date(2013, 1, 1), 1], "days and numbers"),
        ([np.True_, 2], "numbers and truth values"),
        ([pd.Timestamp("2013-01-01 12:00:00.000000001"), None], "times with nanoseconds"),
        (pd.Categorical(["a", b"a"]), "bytes and text"),
    ],
)
def test_a_column_of_several_kinds_of_values_is_refused(settings: Settings, values: Any, words: str) -> None:
    column = values if isinstance(values, pd.Categorical) else pd.Series(values, dtype="object")
    with pytest.raises(DataError, match=f"column value of the table table can't be kept as it is: it holds {words}"):
        replace_months(settings, "table", rows_of(JANUARY, 2, value=column))
    assert table_version(settings, "table") is None


@pytest.mark.parametrize("names", [["period", "a", "a"], ["period", "1", 1]])
def test_two_columns_of_one_name_are_refused(settings: Settings, names: list[object]) -> None:
    frame = pd.DataFrame([[JANUARY, 1, 2]], columns=names)
    with pytest.raises(DataError, match=f"the rows of the table table have two columns {names[-1]}"):
        replace_months(settings, "table", frame)


@pytest.mark.parametrize("value", [timedelta(minutes=5), NOON.time(), [NOON.time()]], ids=["span", "time", "list"])
def test_a_type_that_no_table_has_is_refused_with_its_column(settings: Settings, value: object) -> None:
    said = "column value of the table table can't be kept as it is: no table has the type (duration|time64|list)"
    with pytest.raises(DataError, match=said):
        replace_months(settings, "table", rows_of(JANUARY, 2, value=pd.Series([value, None])))


def test_rows_without_a_month_and_tables_without_rows_are_refused(settings: Settings) -> None:
    with pytest.raises(DataError, match="1 of 2 rows of the table table have no month: their period is missing"):
        replace_months(settings, "table", pd.DataFrame({"period": [JANUARY, None], "value": [1, 2]}))
    with pytest.raises(DataError, match="the rows of the table table have no column period"):
        replace_months(settings, "table", pd.DataFrame({"value": [1, 2]}))
    with pytest.raises(DataError, match="there is no table table, and no rows to make it of"):
        replace_months(settings, "table", rows_of(JANUARY, 0))
    reference, _ = replace_months(settings, "table", rows_of(JANUARY))
    assert replace_months(settings, "table", rows_of(FEBRUARY, 0)) == (reference, [])


def test_the_refusal_names_column_types_and_remedy(settings: Settings) -> None:
    replace_months(settings, "table", rows_of(JANUARY, 2, value=[1, 2]))
    said = (
        r"the column value of the table table holds int64, and the new rows hold double\. Nothing was changed; "
        r"convert the rows to int64, or, .* call widen_column\(settings, 'table', 'value', 'double'\)"
    )
    with pytest.raises(DataError, match=said):
        replace_months(settings, "table", rows_of(JANUARY, 2, value=[1.5, 2.0]))


SAME: dict[str, tuple[object, object]] = {  # the same values, as another program writes them
    "another zone": (INSTANTS, INSTANTS.tz_convert("America/New_York")),
    "another unit": (INSTANTS, INSTANTS.as_unit("ns")),
    "categories": (["a", "b"], pd.Categorical(["a", "b"])),
    "objects": (["a", None], pd.Series(["a", None], dtype="object")),
    "numbers that may be missing": ([1, 2], pd.array([1, 2], dtype="Int64")),
    "a gap that is called NaN": ([0.5, None], pd.array(pyarrow.array([0.5, np.nan]), pd.ArrowDtype(pyarrow.float64()))),
}


@pytest.mark.parametrize("kind", SAME)
def test_the_same_values_in_other_clothes_change_nothing(settings: Settings, kind: str) -> None:
    before, after = SAME[kind]
    reference, _ = replace_months(settings, "table", rows_of(JANUARY, 2, value=before))
    again = rows_of(JANUARY, 2, value=after)
    assert replace_months(settings, "table", again[["value", "period"]]) == (reference, [])
    replace_months(settings, "table", rows_of(FEBRUARY, 2, value=after))
    second = table_version(settings, "table")
    replace_months(settings, "table", rows_of(FEBRUARY, 2, value=after))
    assert table_version(settings, "table") == second


@pytest.mark.parametrize("gaps", [[None, None], [np.nan, np.nan]], ids=["None", "NaN"])
@pytest.mark.parametrize("value", [[1, 2], ["a", "b"], INSTANTS, [0.5, 1.0]], ids=["int", "text", "time", "float"])
def test_a_month_without_any_value_fits_every_type(settings: Settings, gaps: list[object], value: object) -> None:
    replace_months(settings, "table", rows_of(JANUARY, 2, value=value))
    empty = rows_of(FEBRUARY, 2, value=pd.Series(gaps, dtype="object"))
    reference, changed = replace_months(settings, "table", empty)
    assert changed == [FEBRUARY] and replace_months(settings, "table", empty) == (reference, [])
    assert read_table(settings, reference, [FEBRUARY])["value"].isna().all()
    replace_months(settings, "table", rows_of(FEBRUARY, 2, value=value))


def test_a_table_that_can_be_made_again_takes_the_new_type_as_a_whole(settings: Settings) -> None:
    both = pd.concat([rows_of(JANUARY, 2, value=[1, 2]), rows_of(FEBRUARY, 2, value=[3, 4])])
    replace_months(settings, "table", both, derived=True)
    halves = rows_of(FEBRUARY, 2, value=[3.5, 4.0])
    reference, changed = replace_months(settings, "table", halves, derived=True)
    assert changed == [FEBRUARY]
    pd.testing.assert_frame_equal(read_table(settings, reference)[halves.columns], halves, check_dtype=True)
    assert replace_months(settings, "table", halves, derived=True) == (reference, [])


def test_a_column_is_widened_once_and_exactly(settings: Settings) -> None:
    reference, _ = replace_months(settings, "table", rows_of(JANUARY, 3, value=[1, -(2**53), 7]))
    widened = widen_column(settings, "table", "value", "double")
    assert widened != reference
    assert widen_column(settings, "table", "value", "double") == widened
    assert read_table(settings, widened)["value"].tolist() == [1.0, -float(2**53), 7.0]
    assert read_table(settings, reference)["value"].dtype == "int64", "the old version stays what it was"
    assert replace_months(settings, "table", rows_of(FEBRUARY, 1, value=[0.5]))[1] == [FEBRUARY]
    assert replace_months(settings, "table", rows_of(JANUARY, 3, value=[1.0, -(2.0**53), 7.0]))[1] == []


@pytest.mark.parametrize(
    ("column", "kind", "message"),
    [
        ("value", "double", "not every value of table.value is exact as double"),
        ("value", "int32", "int32 does not hold all values of int64"),
        ("value", "string", "string does not hold all values of int64"),
        ("price", "double", "the table table has no column price"),
    ],
)
def test_a_column_is_not_widened_at_a_loss(settings: Settings, column: str, kind: str, message: str) -> None:
    reference, _ = replace_months(settings, "table", rows_of(JANUARY, 1, value=[2**53 + 1]))
    with pytest.raises(DataError, match=message) as caught:
        widen_column(settings, "table", column, kind)
    assert one_line(caught.value)
    assert f"table@{table_version(settings, 'table')}" == reference


def test_a_column_that_must_have_values_is_named(settings: Settings) -> None:
    """Such a table is made by another program: ours allow gaps."""
    fields = [pyarrow.field("period", pyarrow.string(), False), pyarrow.field("value", pyarrow.float64(), False)]
    DeltaTable.create(str(settings.data / "table"), pyarrow.schema(fields), partition_by=["period"])
    replace_months(settings, "table", rows_of(JANUARY, 2))
    with pytest.raises(DataError, match=r"column value of the table table must have a value in each row.*the 1 that"):
        replace_months(settings, "table", rows_of(FEBRUARY, 2, value=[1.0, np.nan]))


def test_a_month_is_emptied_in_the_same_step(settings: Settings) -> None:
    replace_months(settings, "table", pd.concat([rows_of(JANUARY, 2), rows_of(FEBRUARY, 2)]))
    old = table_version(settings, "table")
    reference, changed = replace_months(settings, "table", rows_of(MARCH, 3), gone=[JANUARY, "2012-12"])
    assert (reference, changed) == (f"table@{old + 1}", [JANUARY, MARCH])
    assert read_table(settings, reference)["period"].value_counts().to_dict() == {FEBRUARY: 2, MARCH: 3}
    assert replace_months(settings, "table", rows_of(MARCH, 3), gone=[JANUARY]) == (reference, [])
    assert replace_months(settings, "table", rows_of(MARCH, 0), gone=[MARCH])[1] == [MARCH]


def test_a_file_in_the_way_of_a_table_is_named(settings: Settings) -> None:
    (settings.data / "table").write_text("not a table")
    with pytest.raises(DataError, match=r"data.table is not a table.*Not a directory.*Move it away") as caught:
        replace_months(settings, "table", rows_of(JANUARY))
    assert one_line(caught.value)


def test_a_damaged_log_is_named(settings: Settings) -> None:
    replace_months(settings, "table", rows_of(JANUARY))
    for path in (settings.data / "table" / "_delta_log").glob("*.json"):
        path.write_bytes(b"\x00\x01")
    with pytest.raises(
        DataError, match=r"data.table is not a table, or a damaged one.*run the pipeline again"
    ) as caught:
        read_table(settings, "table@1")
    assert one_line(caught.value)


def test_labels_meet_features_row_by_row(full_desk: Desk) -> None:
    settings, tables = full_desk.settings, full_desk.check(JANUARY, FEBRUARY).tables
    features = build_features(settings, flight_delay, tables, JANUARY, FEBRUARY)
    frame = labelled_features(settings, flight_delay, features, tables["flights"], FEBRUARY, FEBRUARY)
    flights = full_desk.read("flights", FEBRUARY)
    arrived = flights[flights["arr_delay"].notna()]
    assert len(frame) == len(arrived) < len(flights)
    expected = late_label(arrived.set_index(KEY))
    assert frame.set_index(KEY)["label"].sort_index().equals(expected.sort_index().rename("label"))
    assert frame["scheduled_departure"].is_monotonic_increasing
    names = feature_names(frame, flight_delay)
    assert names[:3] == ["carrier", "origin", "dest"]
    assert not {"label", "period", "minute", "flight", "scheduled_departure"} & set(names)


# ---------------------------------------------------------------------------------------------------------------------
# Killed, at the same time, no room

# Each ends by os._exit: Arrow's threads now and then abort a process that is already done.
WRITER = """
import os, sys, time
import numpy as np, pandas as pd
from mlops_course.data import replace_months
from mlops_course.environment import CourseError, Settings

home, month, rounds, number = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
settings = Settings(home=home)
replace_months(Settings(home=home + "-warm").prepare(), "warm", pd.DataFrame({"period": [month], "value": [0.0]}))
print("ready", flush=True)
sys.stdin.readline()
for round in range(rounds):
    frame = pd.DataFrame({"period": [month] * number, "value": np.full(number, float(round + os.getpid() * 1000))})
    try:
        replace_months(settings, "table", frame)
    except CourseError as error:
        print("failed", error, flush=True)
print("done", flush=True)
os._exit(0)
"""


class Writer:
    """Another process that replaces a month again and again, each time with one value in all rows."""

    def __init__(self, settings: Settings, month: str, rounds: int, number: int = 20_000) -> None:
        command = [sys.executable, "-c", WRITER, str(settings.home), month, str(rounds), str(number)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ready(self) -> None:
        """Wait until it has loaded everything."""
        assert self.process.stdout.readline() == "ready\n"

    def go(self) -> None:
        """Let it write."""
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def output(self) -> list[str]:
        """What it has said, at its end."""
        return self.process.communicate(timeout=60)[0].splitlines()


@pytest.fixture
def writers(settings: Settings) -> Iterator[Callable[..., Writer]]:
    """Starts writers, and ends those that are left."""
    started: list[Writer] = []

    def start(*arguments: object) -> Writer:
        started.append(Writer(settings, *arguments))
        return started[-1]

    yield start
    for writer in started:
        writer.process.kill()
        writer.process.wait()
        writer.process.stdout.close()


def whole_or_nothing(settings: Settings, month: str, number: int = 20_000) -> bool:
    """A month that is not there, or that has all of its rows and one value in all of them."""
    version = table_version(settings, "table")
    values = read_table(settings, f"table@{version}", [month])["value"] if version is not None else []
    return len(values) == 0 or (len(values) == number and values.nunique() == 1)


@posix_only
def test_a_writer_that_is_killed_leaves_whole_months(settings: Settings, writers: Callable[..., Writer]) -> None:
    chance = random.Random(8)
    crowd = [writers(JANUARY, 10_000) for _ in range(3)]
    for writer in crowd:
        writer.ready()
    for writer in crowd:
        writer.go()
        time.sleep(chance.uniform(0.05, 0.5))
        writer.process.send_signal(signal.SIGKILL)
        assert writer.process.wait() == -signal.SIGKILL
        assert whole_or_nothing(settings, JANUARY)
    assert table_version(settings, "table") > 0, "no writer wrote anything before it was killed"
    reference, changed = replace_months(settings, "table", rows_of(JANUARY))
    assert changed == [JANUARY]
    assert read_table(settings, reference, [JANUARY])["value"].tolist() == list(range(50))


@posix_only
def test_an_ingestion_that_is_killed_is_completed_by_the_next(desk: Desk, delivered: dict[str, Tables]) -> None:
    """It dies when the flights have landed and before the airports have."""
    put(desk.source, JANUARY, delivered[JANUARY])
    code = (
        "import sys; from mlops_course.data import ingest; from mlops_course.environment import Settings;"
        "from mlops_course.project import flight_delay;"
        f"ingest(Settings(home=sys.argv[1]), flight_delay, {JANUARY!r}, sys.argv[2])"
    )
    command = [sys.executable, "-c", code, str(desk.settings.home), str(desk.source)]
    landed, last = (
        desk.settings.data / "flight-delay" / name / "_delta_log" / f"{1:020}.json"
        for name in ("raw_flights", "raw_airports")
    )
    with subprocess.Popen(command) as process:
        until = time.monotonic() + 60
        while not landed.exists() and process.poll() is None and time.monotonic() < until:
            time.sleep(0.0005)
        process.kill()
    assert landed.exists() and not last.exists()
    delivery = ingest(desk.settings, flight_delay, JANUARY, desk.source)
    assert not delivery.changed["flights"] and delivery.changed["airports"]
    assert desk.check(JANUARY).rows["flights"] == len(delivered[JANUARY]["flights"])


@pytest.mark.parametrize("second", [FEBRUARY, JANUARY], ids=["different months", "the same month"])
def test_two_processes_may_write_at_once(settings: Settings, writers: Callable[..., Writer], second: str) -> None:
    """Both begin with a table that is not there yet."""
    pair = [writers(JANUARY, 6), writers(second, 6)]
    for writer in pair:
        writer.ready()
    for writer in pair:
        writer.go()
    assert [writer.output() for writer in pair] == [["done"], ["done"]]
    months_written = read_table(settings, f"table@{table_version(settings, 'table')}")["period"].value_counts()
    assert months_written.to_dict() == dict.fromkeys({JANUARY, second}, 20_000)
    assert all(whole_or_nothing(settings, month) for month in (JANUARY, second))


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of two megabytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    command = [mount or "mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True) if mount else None
    if done is None or done.returncode != 0:
        pytest.skip(f"can't mount a small disk here: {done.stderr.strip() if done else 'there is no mount command'}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.system
def test_a_disk_too_small_is_noticed_before_anything_is_written(tiny_disk: Path) -> None:
    settings = Settings(home=tiny_disk / "workspace").prepare()
    first, _ = replace_months(settings, "table", rows_of(JANUARY))
    before = Desk(settings, tiny_disk).state()
    with pytest.raises(
        WorkspaceError, match=r"to write, but only 2\.\d MB of disk are free.*free some space"
    ) as caught:
        replace_months(settings, "table", rows_of(FEBRUARY, 200_000))
    assert one_line(caught.value)
    assert Desk(settings, tiny_disk).state() == before
    assert replace_months(settings, "table", rows_of(JANUARY)) == (first, [])


@pytest.mark.system
@pytest.mark.parametrize("left", [0, 4096, 8192, 12288])
def test_a_disk_that_fills_up_while_writing_leaves_the_old_version(tiny_disk: Path, left: int) -> None:
    """The rows would fit, but not the file, or not the log entry that makes it count."""
    settings = Settings(home=tiny_disk / "workspace").prepare()
    first, _ = replace_months(settings, "table", rows_of(JANUARY))
    ballast = tiny_disk / "ballast"
    ballast.write_bytes(bytes(shutil.disk_usage(tiny_disk).free - left))
    values = np.random.default_rng(1).random(500 if left == 12288 else 150)
    frame = pd.DataFrame({"period": FEBRUARY, "value": values})
    try:
        replace_months(settings, "table", frame)
    except WorkspaceError as error:
        assert one_line(error) and re.search("No space left on device|MB of disk are free", str(error))
        assert f"table@{table_version(settings, 'table')}" == first
    else:
        assert left > 0, "a full disk took rows"
    assert read_table(settings, first)["value"].tolist() == list(range(50))
    ballast.unlink()
    reference, _ = replace_months(settings, "table", frame)
    assert read_table(settings, reference, [FEBRUARY])["value"].tolist() == frame["value"].tolist()


def test_the_suppliers_files_are_where_they_are_expected() -> None:
    assert all(find_file(supplier_folder(), table.name) for table in flight_delay.tables)
