"""The online feature table: what a service looks up is what the pipeline computed, bit for bit, never half of it."""

import asyncio
import json
import socket
import sqlite3
import subprocess
import sys
import threading
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pandas as pd
import pytest
from conftest import Quarter, settings_in

from mlops_course.data import feature_names, read_table, replace_months
from mlops_course.environment import CourseError, Settings, SettingsError, load_settings
from mlops_course.experiments import TrainingConfig, train
from mlops_course.project import flight_delay
from mlops_course.serving import InputError, load_predictor
from mlops_course.serving.app import housekeep, refresh_table
from mlops_course.serving.limits import Limits
from mlops_course.serving.lookup import OnlineTable
from mlops_course.serving.messages import PredictRequest
from mlops_course.serving.models import LiveModels
from mlops_course.serving.online import (
    BETWEEN,
    FeatureTable,
    FeatureTableError,
    PackedRow,
    RowLayout,
    features_path,
    materialise,
    open_feature_table,
    some_keys,
    write_file,
)
from mlops_course.serving.packaging import Origin, write_bundle
from mlops_course.serving.predict import PredictJob, Service, find_records, name_keys
from mlops_course.serving.problems import HTTPProblem

pytestmark = pytest.mark.filterwarnings("ignore:Series.values returning:DeprecationWarning")  # inside pyarrow

JANUARY, FEBRUARY = "2013-01", "2013-02"
ORIGIN = Origin(run_id="5e43e4af", data={"features": "features@1"}, first=JANUARY, last=JANUARY)


@pytest.fixture(scope="module")
def made(quarter: Quarter, tmp_path_factory: pytest.TempPathFactory) -> Quarter:
    """A workspace with February online; no test changes it."""
    own = quarter.fresh(tmp_path_factory.mktemp("online"))
    assert materialise(own.settings, flight_delay, own.features, [FEBRUARY]) == 4991
    return own


@pytest.fixture(scope="module")
def february(made: Quarter) -> pd.DataFrame:
    return read_table(made.settings, made.features, [FEBRUARY])


@pytest.fixture(params=["file", pytest.param("redis", marks=pytest.mark.system)])
def own(request: pytest.FixtureRequest, quarter: Quarter, tmp_path: Path) -> Quarter:
    """A workspace of the test's own, whose features go into a file or to a server."""
    fresh = quarter.fresh(tmp_path / "workspace")
    if request.param == "file":
        return fresh
    url = request.getfixturevalue("redis_url")
    import redis

    redis.Redis.from_url(url).flushdb()
    return replace(fresh, settings=fresh.settings.model_copy(update={"features_url": url}))


def key_of(table: FeatureTable, row: pd.Series) -> str:
    """The key of a row as a client names it: JSON's values, the time in ISO form."""
    given = {name: row[name] for name in flight_delay.key}
    given = {**given, "time_hour": row["time_hour"].isoformat(), **{n: int(row[n]) for n in ("minute", "flight")}}
    return table.key(json.loads(json.dumps(given)))


# ---------------------------------------------------------------- online is offline


def test_every_row_of_a_month_is_there_bit_for_bit(own: Quarter, february: pd.DataFrame) -> None:
    materialise(own.settings, flight_delay, own.features, [FEBRUARY])
    table = open_feature_table(own.settings)
    records = table.get([key_of(table, row) for _, row in february.iterrows()])
    assert None not in records
    names = feature_names(february, flight_delay)
    online = pd.DataFrame.from_records(records)
    assert set(online.columns) == set(names)
    numbers = [name for name in names if name not in flight_delay.categorical]
    bits = [frame[numbers].astype("float32").to_numpy().view(np.uint32) for frame in (online, february)]
    nan = np.isnan(february[numbers].to_numpy())
    np.testing.assert_array_equal(bits[0][~nan], bits[1][~nan])
    np.testing.assert_array_equal(online[numbers].isna().to_numpy(), nan)
    for name in flight_delay.categorical:
        assert online[name].tolist() == february[name].tolist()


def test_a_flight_by_its_key_has_the_score_of_the_batch(made: Quarter, february: pd.DataFrame, tmp_path: Path) -> None:
    january = made.labelled(JANUARY)
    model = train(january, flight_delay, TrainingConfig(20, leaf_samples=20))
    folder = write_bundle(settings_in(tmp_path), flight_delay, model, january, "flight-delay@1", ORIGIN)
    predictor, table = load_predictor(folder), open_feature_table(made.settings)
    records = table.get([key_of(table, row) for _, row in february.iterrows()], predictor.features)
    np.testing.assert_array_equal(predictor.scores(predictor.encode(records)), predictor.predict(february)["score"])


def test_missing_values_and_missing_text_are_none(own: Quarter, february: pd.DataFrame) -> None:
    changed = february.copy()
    changed.loc[changed.index[0], "dest"] = np.nan
    reference, _ = replace_months(own.settings, "flight-delay/features", changed, derived=True)
    materialise(own.settings, flight_delay, reference, [FEBRUARY])
    table = open_feature_table(own.settings)
    record = table.get([key_of(table, february.iloc[0])])[0]
    assert record is not None
    assert record["dest"] is None
    missing = february.iloc[0][[name for name in record if name not in flight_delay.categorical]].isna()
    assert {name for name, value in record.items() if value is None} == {"dest", *missing.index[missing]}
    json.dumps(record, allow_nan=False)


# ---------------------------------------------------------------- keys


@pytest.fixture(scope="module")
def table(made: Quarter) -> FeatureTable:
    return open_feature_table(made.settings)


GOOD: dict[str, Any] = {
    "time_hour": "2013-02-01T10:00:00Z", "minute": 15, "carrier": "UA", "flight": 1545, "origin": "EWR"
}  # fmt: skip


@pytest.mark.parametrize(
    "moment",
    [
        "2013-02-01T10:00:00Z",
        "2013-02-01T10:00:00+00:00",
        "2013-02-01T05:00:00-05:00",
        "2013-02-01 10:00Z",
        datetime(2013, 2, 1, 11, tzinfo=timezone(timedelta(hours=1))),
        pd.Timestamp("2013-02-01T10:00:00", tz="UTC"),
    ],
)
def test_one_moment_written_in_several_ways_is_one_key(table: FeatureTable, moment: Any) -> None:
    assert table.key(GOOD | {"time_hour": moment}) == "2013-02-01T10:00:00Z|15|UA|1545|EWR"


@pytest.mark.parametrize(
    ("change", "words", "field"),
    [
        ({"time_hour": "2013-02-01T10:00:00"}, "time_hour is '2013-02-01T10:00:00'. Give a time with", "time_hour"),
        ({"time_hour": "tomorrow"}, "the key's time_hour is 'tomorrow'", "time_hour"),
        ({"time_hour": "2013-02-01T10:00:00Z\n"}, "time_hour is", "time_hour"),
        ({"time_hour": "0001-01-01T00:00:00+14:00"}, "time_hour is", "time_hour"),
        ({"time_hour": 1359712800}, "the key's time_hour is 1359712800", "time_hour"),
        ({"time_hour": None}, "the key's time_hour is None", "time_hour"),
        ({"minute": "15"}, "the key's minute is '15'. Give a whole number", "minute"),
        ({"minute": 15.5}, "the key's minute is 15.5", "minute"),
        ({"minute": 1e300}, "the key's minute is 1e+300", "minute"),
        ({"minute": True}, "the key's minute is True", "minute"),
        ({"carrier": 7}, "the key's carrier is 7. Give text", "carrier"),
        ({"carrier": ""}, "the key's carrier is ''", "carrier"),
        ({"carrier": "UA|1545"}, "the key's carrier is 'UA|1545'", "carrier"),
        ({"carrier": "x" * 10**6}, "…", "carrier"),
        ({"plane": "N123"}, "a key has no 'plane'. Give time_hour, minute, carrier, flight, origin", "plane"),
    ],
)
def test_what_is_no_key_is_refused_with_its_field(
    table: FeatureTable, change: dict[str, Any], words: str, field: str
) -> None:
    with pytest.raises(InputError) as caught:
        table.key(GOOD | change)
    assert words in str(caught.value)
    assert caught.value.field == field
    assert len(str(caught.value)) < 300
    with pytest.raises(InputError, match="origin is None"):
        table.key({name: value for name, value in GOOD.items() if name != "origin"})


@pytest.mark.parametrize("time", ["2013-02-01t10:00:00z", "2013-02-01T10:00:00.000Z", "2013-02-01T05:00:00-05:00"])
def test_the_same_moment_and_number_are_the_same_key_however_json_writes_them(table: FeatureTable, time: str) -> None:
    whole = GOOD | {"time_hour": "2013-02-01T10:00:00Z"}
    assert table.key(whole | {"time_hour": time, "minute": float(GOOD["minute"])}) == table.key(whole)
    assert table.key(whole | {"time_hour": "2013-02-01T10:00:00.5Z"}) != table.key(whole)


def test_unknown_keys_have_no_record_and_the_order_is_kept(own: Quarter, february: pd.DataFrame) -> None:
    materialise(own.settings, flight_delay, own.features, [FEBRUARY])
    table = open_feature_table(own.settings)
    one, two = (key_of(table, february.iloc[number]) for number in (3, 4))
    strange = "x'; DROP TABLE rows; --"
    records = table.get([two, "nothing", one, strange, two])
    assert [record is None for record in records] == [False, True, False, True, False]
    assert records[0] == records[4] != records[2]
    assert table.get([]) == []
    assert table.get(["?"] * 40_000) == [None] * 40_000


def test_only_the_features_that_a_model_takes(table: FeatureTable, february: pd.DataFrame) -> None:
    key = key_of(table, february.iloc[0])
    assert table.get([key], ["distance", "carrier"]) == [
        {"distance": float(february["distance"].iloc[0]), "carrier": february["carrier"].iloc[0]}
    ]
    with pytest.raises(FeatureTableError, match="has no feature seat_pitch, which the model takes"):
        table.get([key], ["seat_pitch"])


# ---------------------------------------------------------------- months


def test_a_month_is_replaced_as_a_whole_and_others_stay(own: Quarter, february: pd.DataFrame) -> None:
    materialise(own.settings, flight_delay, own.features, [JANUARY, FEBRUARY])
    table = open_feature_table(own.settings)
    kept, gone = key_of(table, february.iloc[1]), key_of(table, february.iloc[0])
    january = key_of(table, read_table(own.settings, own.features, [JANUARY]).iloc[0])
    changed = february.iloc[1:].assign(distance=np.float32(1))
    reference, _ = replace_months(own.settings, "flight-delay/features", changed, derived=True)
    assert materialise(own.settings, flight_delay, reference, [FEBRUARY]) == len(february) - 1
    records = table.get([kept, gone, january])
    assert (records[0] or {})["distance"] == 1
    assert records[1] is None
    assert (records[2] or {})["distance"] > 1


def test_doing_it_twice_changes_nothing(own: Quarter, february: pd.DataFrame) -> None:
    found = []
    for _ in range(2):
        materialise(own.settings, flight_delay, own.features, [FEBRUARY])
        table = open_feature_table(own.settings)
        found.append(table.get([key_of(table, row) for _, row in february.head(50).iterrows()]))
    assert found[0] == found[1]


def test_a_table_that_is_open_understands_features_that_came_later(own: Quarter, february: pd.DataFrame) -> None:
    materialise(own.settings, flight_delay, own.features, [FEBRUARY])
    table = open_feature_table(own.settings)
    more = february.assign(moon=np.float32(0.5)).drop(columns="seats")
    reference, _ = replace_months(own.settings, "flight-delay/features", more, derived=True)
    materialise(own.settings, flight_delay, reference, [FEBRUARY])
    record = table.get([key_of(table, february.iloc[0])])[0] or {}
    assert record["moon"] == 0.5
    assert "seats" not in record


# ---------------------------------------------------------------- in the service


LITTLE = RowLayout((("time_hour", "time"), ("flight", "integer")), ("a",), ())
MORE = RowLayout(LITTLE.key, ("a", "b"), ())


def key_at(hour: int, flight: int = 1) -> str:
    return f"2013-01-01T{hour:02}:00:00Z|{flight}"


def put(path: Path, layout: RowLayout, month: str, keys: list[str]) -> None:
    row = msgspec.msgpack.encode(PackedRow(layout.name, np.ones(len(layout.numbers), "<f4").tobytes(), ()))
    write_file(path, "u", layout, {month: dict.fromkeys(keys, row)}, "features@1")


def service_of(settings: Settings) -> Service:
    made = Service(LiveModels(settings), Limits(), OnlineTable(settings))
    made.online.refresh(None)
    return made


def ask(service: Service, flight: int, features: tuple[str, ...]) -> Any:
    request = PredictRequest(key={"time_hour": "2013-01-01T10:00:00Z", "flight": flight})
    job = PredictJob([request], "r1")
    name_keys(service, job)
    return asyncio.run(look_up_one(service, job, features))


async def look_up_one(service: Service, job: PredictJob, features: tuple[str, ...]) -> Any:
    predictor: Any = SimpleNamespace(features=features, encode=len)
    return (await find_records(service, predictor, job))[0]


def test_a_row_without_a_feature_is_refused_and_the_table_stays(settings: Settings) -> None:
    path = features_path(settings, "u")
    put(path, LITTLE, "2013-01", [key_at(10, 1)])
    put(path, MORE, "2013-02", [key_at(10, 2)])
    service = service_of(settings)
    with pytest.raises(HTTPProblem, match="has no feature b") as caught:
        ask(service, 1, ("a", "b"))
    assert (caught.value.status, caught.value.field) == (422, "key")
    assert ask(service, 2, ("a", "b")) == [{"a": 1.0, "b": 1.0}]


def test_another_file_in_the_place_of_the_table_is_noticed(settings: Settings) -> None:
    path = features_path(settings, "u")
    put(path, LITTLE, "2013-01", [key_at(10, 1)])
    service = service_of(settings)
    for each in path.parent.glob("features.db*"):
        each.unlink()
    put(path, LITTLE, "2013-01", [key_at(10, 2)])
    service.online.refresh(None)
    assert ask(service, 2, ("a",)) == [{"a": 1.0}]
    with pytest.raises(HTTPProblem, match="there is no"):
        ask(service, 1, ("a",))


def test_keys_to_try_come_from_all_over_the_table_and_none_when_it_is_gone(settings: Settings) -> None:
    path = features_path(settings, "u")
    put(path, LITTLE, "2013-01", [key_at(hour, flight) for hour in range(24) for flight in range(200)])
    table = open_feature_table(settings)
    hours = {key["time_hour"] for _ in range(20) for key in some_keys(table, 5)}
    assert len(hours) > 4
    assert len({table.key(key) for key in some_keys(table, 50)}) == 50
    plan = sqlite3.connect(path).execute(f"EXPLAIN QUERY PLAN {BETWEEN}", ("u", "", 1)).fetchall()
    assert all("SEARCH" in step[3] for step in plan), "nobody looks through the whole table"
    path.unlink()
    assert some_keys(table, 5) == []


def test_a_server_that_says_nothing_holds_up_its_own_askers_only(settings: Settings) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        url = f"redis://127.0.0.1:{silent.getsockname()[1]}/0"
        remote = settings.model_copy(update={"features_url": url})
        service = Service(LiveModels(settings), Limits(), OnlineTable(remote))
        seen = asyncio.run(beside_a_silent_one(service))
    assert seen == ["a thread", "a look at the models", "the table"]
    assert "can't use" in service.online.problem


async def beside_a_silent_one(service: Service) -> list[str]:
    """Who is ready first."""
    seen: list[str] = []

    async def note(name: str, what: Any) -> None:
        await what
        seen.append(name)

    waiting = asyncio.create_task(note("the table", refresh_table(service)))
    await asyncio.sleep(0.1)
    await note("a thread", asyncio.to_thread(lambda: None))
    await note("a look at the models", housekeep(service))
    await waiting
    return seen


def test_use_cases_share_a_store_without_meeting(own: Quarter, february: pd.DataFrame) -> None:
    other = replace(flight_delay, name="other")
    materialise(own.settings, flight_delay, own.features, [FEBRUARY])
    few = february.head(9).assign(distance=np.float32(7))
    reference, _ = replace_months(own.settings, "flight-delay/features", few, derived=True)
    materialise(own.settings, other, reference, [FEBRUARY])
    with pytest.raises(CourseError, match=r": flight-delay, other\. Name one|holds flight-delay, other. .*name one"):
        open_feature_table(own.settings)
    with pytest.raises(FeatureTableError, match=r"but nobody is asked for|there is no online feature table .*nobody"):
        open_feature_table(own.settings, "nobody")
    tables = {name: open_feature_table(own.settings, name) for name in ("flight-delay", "other")}
    keys = [key_of(tables["other"], february.iloc[number]) for number in (0, 20)]
    assert [record and record["distance"] for record in tables["other"].get(keys)] == [7.0, None]
    assert None not in tables["flight-delay"].get(keys)


def test_a_month_without_rows_or_two_rows_with_one_key_are_refused(own: Quarter, february: pd.DataFrame) -> None:
    with pytest.raises(FeatureTableError, match="has no rows of 2013-07"):
        materialise(own.settings, flight_delay, own.features, [FEBRUARY, "2013-07"])
    twice = pd.concat([february, february.head(2)])
    reference, _ = replace_months(own.settings, "flight-delay/features", twice, derived=True)
    with pytest.raises(FeatureTableError, match=r"rows with the key of another one: 2. time_hour, minute, carrier"):
        materialise(own.settings, flight_delay, reference, [FEBRUARY])


def test_readers_never_see_half_of_a_month(own: Quarter, february: pd.DataFrame) -> None:
    """Each write gives all rows another distance; a reader asks for rows from both ends of the month."""
    references = []
    for number in (1, 2):
        changed = february.assign(distance=np.float32(number))
        references.append(replace_months(own.settings, "flight-delay/features", changed, derived=True)[0])
    materialise(own.settings, flight_delay, references[0], [FEBRUARY])
    table = open_feature_table(own.settings)
    keys = [key_of(table, february.iloc[number]) for number in (0, 1, 2500, -2, -1)]
    seen: set[tuple[float | None, ...]] = set()
    done = threading.Event()

    def look() -> None:
        while not done.is_set():
            seen.add(tuple((record or {}).get("distance") for record in table.get(keys)))

    readers = [threading.Thread(target=look) for _ in range(2)]
    for reader in readers:
        reader.start()
    for number in range(8):
        materialise(own.settings, flight_delay, references[(number + 1) % 2], [FEBRUARY])
    done.set()
    for reader in readers:
        reader.join()
    assert seen == {(1.0,) * 5, (2.0,) * 5}


WRITE = """
import sys
from mlops_course.environment import load_settings
from mlops_course.project import flight_delay
from mlops_course.serving import materialise
print(materialise(load_settings(), flight_delay, sys.argv[1], [sys.argv[2]]))
"""


def test_several_processes_that_begin_with_no_table_at_all(quarter: Quarter, tmp_path: Path) -> None:
    own = quarter.fresh(tmp_path / "workspace")
    command = [sys.executable, "-c", WRITE, own.features]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    running = [subprocess.Popen([*command, month], **pipes) for month in (JANUARY, FEBRUARY, "2013-03", FEBRUARY)]
    ended = [process.communicate(timeout=120) for process in running]
    assert [process.returncode for process in running] == [0] * 4, ended
    with sqlite3.connect(features_path(own.settings, "flight-delay")) as base:
        rows = dict(base.execute("SELECT month, count(*) FROM rows GROUP BY month"))
        assert rows == dict(base.execute("SELECT month, rows FROM months"))
    assert rows == {month: int(out) for month, (out, _) in zip((JANUARY, FEBRUARY, "2013-03"), ended[:3], strict=True)}


# ---------------------------------------------------------------- stores that are not there


def test_no_table_or_a_damaged_one_is_said_in_words(settings: Settings) -> None:
    with pytest.raises(FeatureTableError, match=r"there is no online feature table .*features\.db. Run the training"):
        open_feature_table(settings)
    features_path(settings, "flight-delay").parent.mkdir(parents=True)
    features_path(settings, "flight-delay").write_bytes(b"not a database, but long enough to be looked at" * 100)
    with pytest.raises(FeatureTableError, match=r"can.t read the online feature table .*not a database"):
        open_feature_table(settings)


def test_a_damaged_table_is_not_written_to(quarter: Quarter, tmp_path: Path) -> None:
    own = quarter.fresh(tmp_path / "workspace")
    features_path(own.settings, "flight-delay").parent.mkdir(parents=True)
    features_path(own.settings, "flight-delay").write_bytes(b"not a database" * 100)
    with pytest.raises(FeatureTableError, match=r"can.t write .*not a database"):
        materialise(own.settings, flight_delay, own.features, [FEBRUARY])


def test_reading_changes_nothing(made: Quarter, february: pd.DataFrame) -> None:
    table = open_feature_table(features_path(made.settings, "flight-delay"))
    with pytest.raises(sqlite3.OperationalError, match="readonly"):
        table.store.base.execute("DELETE FROM rows")  # type: ignore[attr-defined]
    table.close()


@pytest.mark.system
@pytest.mark.parametrize(
    "spoil", [lambda url: url.replace("s3cret", "wr0ng"), lambda _: "redis://:s3cret@127.0.0.1:1/0"]
)
def test_a_server_that_refuses_is_named_without_the_password(redis_url: str, spoil: Any, quarter: Quarter) -> None:
    url = spoil(redis_url)
    settings = quarter.settings.model_copy(update={"features_url": url})
    read, write = open_feature_table, lambda _: materialise(settings, flight_delay, quarter.features, [FEBRUARY])
    for attempt in (read, write):
        with pytest.raises(FeatureTableError, match=r"can.t use the online feature table redis://…@127") as caught:
            attempt(url)
        assert "s3cret" not in str(caught.value)
        assert "wr0ng" not in str(caught.value)


@pytest.mark.parametrize("url", ["http://server:6379", "server:6379", "redis://", ""])
def test_an_address_that_is_none_of_redis_is_refused(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLOPS_COURSE_FEATURES_URL", url)
    if not url:
        assert load_settings().features_url is None
        return
    with pytest.raises(SettingsError, match="MLOPS_COURSE_FEATURES_URL is"):
        load_settings()
