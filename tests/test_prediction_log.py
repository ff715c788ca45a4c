"""The log of predictions: what was answered is on the disk, whatever happens to the process, and counted once."""

import asyncio
import errno
import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import Quarter
from service_helpers import FIRST, serving, until
from typer.testing import CliRunner

from mlops_course.cli import app
from mlops_course.data import read_table
from mlops_course.environment import Settings
from mlops_course.project import flight_delay
from mlops_course.serving import load_predictor, predictions
from mlops_course.serving.app import housekeep
from mlops_course.serving.limits import Limits
from mlops_course.serving.lookup import OnlineTable
from mlops_course.serving.models import LiveModels
from mlops_course.serving.predict import Service
from mlops_course.serving.predictions import (
    LoggedPrediction,
    LogLimits,
    PredictionLog,
    collect_predictions,
    encode_json,
    log_folder,
    maintain,
    read_segment,
)
from mlops_course.serving.problems import HTTPProblem
from mlops_course.serving.publishing import live_bundle

pytestmark = pytest.mark.filterwarnings("ignore:Series.values returning:DeprecationWarning")  # inside pyarrow

KEY = {"time_hour": "2013-02-01T10:00:00Z", "minute": 5, "carrier": "UA", "flight": 12, "origin": "EWR"}


def entry(number: int = 0, **changes: Any) -> LoggedPrediction:
    features = np.array([number, np.nan], dtype="<f4").tobytes()
    given: dict[str, Any] = {"id": f"r{number}", "time": 1.36e9 + number, "model": FIRST, "score": 0.5, "warned": True}
    return LoggedPrediction(**{**given, "features": features, "key": KEY, **changes})


def segments(settings: Settings, ending: str) -> list[Path]:
    return sorted(log_folder(settings, "flight-delay").glob(f"*.{ending}"))


@pytest.fixture
def writer(settings: Settings) -> Any:
    made = PredictionLog(log_folder(settings, "flight-delay"))
    yield made
    made.close()


# ---------------------------------------------------------------- writing


def test_what_was_appended_is_in_the_file_at_once(writer: PredictionLog, settings: Settings) -> None:
    writer.append([entry(1), entry(2)])
    found, torn = read_segment(segments(settings, "open")[0])
    assert (found, torn) == ([entry(1), entry(2)], 0)
    assert writer.segment.size == segments(settings, "open")[0].stat().st_size


def test_nothing_to_append_leaves_no_file_anywhere(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    late = PredictionLog(lambda model: log_folder(settings, model.partition("@")[0]))
    late.append([])
    assert not any(Path.cwd().iterdir()) and not segments(settings, "open")
    late.append([entry()])
    assert not any(Path.cwd().iterdir()) and len(segments(settings, "open")) == 1
    late.close()


def test_a_segment_is_closed_when_it_is_large_or_old_or_at_the_end(settings: Settings) -> None:
    writer = PredictionLog(log_folder(settings, "flight-delay"), LogLimits(segment=500, seconds=0.2))
    maintain(writer)
    assert segments(settings, "jsonl") == [], "an empty one isn't closed"
    while writer.segment.size < 500:
        writer.append([entry()])
    maintain(writer)
    assert (len(segments(settings, "jsonl")), len(segments(settings, "open")), writer.segment.size) == (1, 1, 0)
    writer.append([entry()])
    time.sleep(0.3)
    maintain(writer)
    assert len(segments(settings, "jsonl")) == 2
    writer.append([entry()])
    writer.close()
    assert (len(segments(settings, "jsonl")), len(segments(settings, "open"))) == (3, 0)
    writer.close()


def test_a_full_disk_refuses_and_leaves_no_half_line(
    writer: PredictionLog, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer.append([entry(1)])
    real = os.write

    def nearly_full(descriptor: int, data: bytes) -> int:
        if len(data) > 10:
            return real(descriptor, data[:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(predictions.os, "write", lambda descriptor, data: nearly_full(descriptor, bytes(data)))
    for _ in range(2):
        with pytest.raises(HTTPProblem, match="the disk is full") as caught:
            writer.append([entry(2)])
        assert caught.value.status == 503
    maintain(writer)
    assert writer.problem
    monkeypatch.setattr(predictions.os, "write", real)
    maintain(writer)
    assert writer.problem == ""
    writer.append([entry(3)])
    assert read_segment(segments(settings, "open")[0]) == ([entry(1), entry(3)], 0)


def test_more_than_the_total_refuses_until_somebody_collects(settings: Settings) -> None:
    writer = PredictionLog(log_folder(settings, "flight-delay"), LogLimits(segment=1, total=2000))
    while not writer.problem:
        writer.append([entry()])
        writer.sync()
        maintain(writer)
    with pytest.raises(HTTPProblem, match="the limit is 2,000"):
        writer.append([entry()])
    collect_predictions(settings, flight_delay)
    writer.sync()
    maintain(writer)
    writer.append([entry()])
    writer.close()


def test_a_disk_that_fails_is_told_until_it_works_again(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(segment: Any) -> None:
        raise OSError(5, "Input/output error")

    log = PredictionLog(log_folder(settings, "flight-delay"))
    service = Service(LiveModels(settings), Limits(), OnlineTable(settings), log)
    asyncio.run(housekeep(service))  # makes the folder
    assert log.problem == "" and log.folder.is_dir()
    with monkeypatch.context() as broken:
        broken.setattr(predictions.Segment, "sync", fails)
        asyncio.run(housekeep(service))
        with pytest.raises(HTTPProblem, match="can't be brought to the disk"):
            log.append([entry()])
    asyncio.run(housekeep(service))
    log.append([entry()])
    log.close()


def test_a_folder_that_is_taken_away_is_noticed(settings: Settings) -> None:
    blocked = settings.home / "blocked"
    blocked.write_text("")
    writer = PredictionLog(blocked)
    with pytest.raises(HTTPProblem) as caught:
        writer.append([entry()])
    assert caught.value.status == 503
    maintain(writer)
    assert writer.problem
    blocked.unlink()
    maintain(writer)
    writer.append([entry()])
    writer.close()


# ---------------------------------------------------------------- collecting


def test_the_table_has_the_key_in_its_own_columns(writer: PredictionLog, settings: Settings) -> None:
    writer.append([entry(1), entry(2, key=None, role="shadow", row=3), entry(3, key={"minute": "x", "carrier": 7})])
    writer.close()
    collected = collect_predictions(settings, flight_delay)
    assert (collected.segments, collected.rows, collected.torn) == (1, 3, 0)
    frame = read_table(settings, str(collected.table)).sort_values("id", ignore_index=True)
    assert list(frame.columns[:5]) == list(flight_delay.key)
    first = frame.iloc[0]
    assert first["time_hour"] == pd.Timestamp("2013-02-01T10:00:00Z")
    assert (first["minute"], first["carrier"], first["flight"], first["origin"]) == (5, "UA", 12, "EWR")
    assert frame.loc[1:, list(flight_delay.key)].isna().all(axis=None)
    assert frame["role"].tolist() == ["live", "shadow", "live"]
    np.testing.assert_array_equal(np.frombuffer(first["features"], "<f4"), np.float32([1, np.nan]))
    assert segments(settings, "jsonl") == []


@pytest.mark.parametrize("bad", [1.5, "inf", "1e400", float(2**60), "", True, 2**70])
def test_a_key_that_is_no_whole_number_is_missing_and_stops_nobody(
    writer: PredictionLog, settings: Settings, bad: Any
) -> None:  # fmt: skip
    writer.append([entry(1, key={"flight": bad, "time_hour": bad, "carrier": bad}), entry(2)])
    writer.close()
    frame = read_table(settings, str(collect_predictions(settings, flight_delay).table)).sort_values("id")
    assert frame["flight"].tolist()[1] == 12
    assert frame["flight"].isna().tolist()[0] is (bad is not True)


def test_a_segment_that_no_table_takes_is_set_aside_and_the_next_is_collected(
    writer: PredictionLog, settings: Settings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for number in (1, 2):
        writer.append([entry(number)])
        writer.close()
    real = predictions.as_frame

    def frame(entries: list[LoggedPrediction], *rest: Any) -> pd.DataFrame:
        if entries[0].id == "r1":
            raise ValueError("a value that nobody has thought of")
        return real(entries, *rest)

    monkeypatch.setattr(predictions, "as_frame", frame)
    for rows, bad in ((1, 1), (0, 0)):
        collected = collect_predictions(settings, flight_delay)
        assert (collected.rows, collected.set_aside) == (rows, bad)
    assert len(segments(settings, "bad")) == 1
    assert "set aside" in caplog.text


def test_the_command_collects(writer: PredictionLog, settings: Settings) -> None:
    writer.append([entry(1)])
    writer.close()
    done = CliRunner().invoke(app, ["collect-predictions", "--home", str(settings.home), "--json"])
    assert json.loads(done.output) == {
        "table": "flight-delay/predictions_online@1", "segments": 1, "rows": 1, "torn": 0, "set_aside": 0,
    }  # fmt: skip


def test_collecting_again_or_after_a_crash_counts_nothing_twice(
    writer: PredictionLog, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer.append([entry(number) for number in range(5)])
    writer.close()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            collect_predictions(settings, flight_delay)
    assert len(segments(settings, "jsonl")) == 1, "it is in the table, and the file is still there"
    collected = collect_predictions(settings, flight_delay)
    again = collect_predictions(settings, flight_delay)
    assert (collected.rows, again.rows, again.table) == (5, 0, collected.table)
    assert len(read_table(settings, str(again.table))) == 5


def test_a_line_that_was_never_finished_is_left_out(writer: PredictionLog, settings: Settings) -> None:
    writer.append([entry(1)])
    writer.close()
    path = segments(settings, "jsonl")[0]
    path.write_bytes(path.read_bytes() + b"\n" + encode_json(entry(2))[:40])
    assert read_segment(path) == ([entry(1)], 1)
    assert collect_predictions(settings, flight_delay).torn == 1


def test_what_is_being_written_is_left_alone(writer: PredictionLog, settings: Settings) -> None:
    writer.append([entry(1)])
    assert collect_predictions(settings, flight_delay).rows == 0
    writer.append([entry(2)])
    writer.close()
    assert collect_predictions(settings, flight_delay).rows == 2


def test_only_the_dead_of_the_own_machine_and_the_long_dead_are_collected(
    writer: PredictionLog, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer.append([entry(1)])
    path = segments(settings, "open")[0]
    assert f"-{predictions.host_name()}-" in path.name
    os.close(writer.segment.descriptor)  # its process has died
    writer.segment = None
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(predictions.socket, "gethostname", lambda: "another")
        assert collect_predictions(settings, flight_delay).rows == 0
        os.utime(path, (time.time() - 25 * 3600,) * 2)
        assert collect_predictions(settings, flight_delay).rows == 1


@pytest.mark.slow
def test_nothing_is_lost_between_a_writer_and_a_collector(settings: Settings) -> None:
    """Segments are opened and closed all the time, and collected all the time."""
    stop, rows = threading.Event(), 0
    writer = PredictionLog(log_folder(settings, "flight-delay"), LogLimits(segment=1))

    def write() -> None:
        for number in range(60):
            writer.append([entry(number)])
            maintain(writer)
        writer.close()
        stop.set()

    thread = threading.Thread(target=write)
    thread.start()
    while not stop.is_set():
        rows += collect_predictions(settings, flight_delay).rows
    thread.join()
    rows += (collected := collect_predictions(settings, flight_delay)).rows
    ids = read_table(settings, str(collected.table))["id"]
    assert (rows, sorted(ids)) == (60, sorted(f"r{number}" for number in range(60)))


# ---------------------------------------------------------------- with the service


def ids_in_log(settings: Settings) -> list[str]:
    return [each.id for path in log_folder(settings, "flight-delay").iterdir() for each in read_segment(path)[0]]


def test_a_killed_service_has_left_what_it_answered_and_labels_can_be_joined(
    home: Path, quarter: Quarter
) -> None:  # fmt: skip
    with serving(home) as running:
        examples = running.client.get("/examples?count=20").json()
        answers = [running.ask(key=each["key"]).json() for each in examples]
        batch = running.client.post("/predict/batch", json={"rows": examples}).json()
        os.killpg(running.process.pid, signal.SIGKILL)
        running.process.wait(10)
    assert ids_in_log(running.settings) == [each["request_id"] for each in answers] + [batch["request_id"]] * 20
    collected = collect_predictions(running.settings, flight_delay)
    assert (collected.rows, collected.torn) == (40, 0)
    frame = read_table(running.settings, str(collected.table))
    flights = read_table(quarter.settings, quarter.rows, ["2013-01", "2013-02"])
    joined = frame.merge(flights.assign(label=flight_delay.label(flights)), on=list(flight_delay.key), how="left")
    assert (len(joined), joined["sched_dep_time"].notna().all()) == (40, True)
    first = joined[joined["id"] == answers[0]["request_id"]].iloc[0]
    assert (first["score"], first["model"]) == (answers[0]["score"], FIRST)
    predictor = load_predictor(live_bundle(running.settings) or "")
    np.testing.assert_array_equal(np.frombuffer(first["features"], "<f4"), predictor.encode([examples[0]["record"]])[0])


@pytest.mark.slow
def test_a_service_that_cannot_write_refuses_and_recovers(home: Path) -> None:
    folder = home / "serving" / "flight-delay" / "predictions"
    folder.write_text("a file stands where the log should be")
    with serving(home, ready=False) as running:
        record = running.client.get("/examples").json()[0]["record"]
        refused = running.ask(record=record)
        assert (refused.status_code, "can't be recorded" in refused.json()["detail"]) == (503, True)
        assert running.client.get("/health/ready").status_code == 503
        assert "serving_log_failures_total 1.0" in running.client.get("/metrics").text
        folder.unlink()
        running.wait_ready()
        assert running.ask(record=record).status_code == 200
    assert len(ids_in_log(running.settings)) == 1


def test_lines_are_json_that_people_can_read(writer: PredictionLog, settings: Settings) -> None:
    writer.append([entry(1)])
    line = json.loads(segments(settings, "open")[0].read_text())
    assert (line["id"], line["key"], line["warned"]) == ("r1", KEY, True)


def test_a_service_closes_its_segment_when_it_ends(home: Path) -> None:
    with serving(home) as running:
        running.ask(record=running.client.get("/examples").json()[0]["record"])
        assert running.stop() == 0
        until(lambda: [path.suffix for path in log_folder(running.settings, "flight-delay").iterdir()] == [".jsonl"])
