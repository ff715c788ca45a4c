"""Collecting predictions beside a service: the log doesn't fill up, and nothing is lost or counted twice on the way."""

import http.client
import json
import logging
import os
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pytest
from kill_helpers import lives
from service_helpers import FIRST, Running, serving, until, workers
from typer.testing import CliRunner

from mlops_course.cli import app
from mlops_course.data import newest_reference, read_table
from mlops_course.environment import Settings
from mlops_course.project import flight_delay
from mlops_course.serving import collecting, predictions
from mlops_course.serving.collecting import Collector, collecting_command
from mlops_course.serving.predictions import (
    CollectError,
    LoggedPrediction,
    PredictionLog,
    collect_predictions,
    log_folder,
    log_limits,
    maintain,
    read_segment,
)

pytestmark = pytest.mark.filterwarnings("ignore:Series.values returning:DeprecationWarning")  # inside pyarrow
TABLE = "flight-delay/predictions_online"


def entry(number: int) -> LoggedPrediction:
    return LoggedPrediction(f"r{number}", 1.36e9 + number, FIRST, 0.5, True, bytes(8), key={"carrier": "UA"})


def in_log(settings: Settings) -> list[str]:
    """The ids of what nobody has collected yet."""
    paths = log_folder(settings, "flight-delay").glob("[!.]*")
    return [each.id for path in paths for each in read_segment(path)[0]]


def in_table(settings: Settings) -> list[str]:
    """The ids of what was collected."""
    found = collect_predictions(settings, flight_delay)
    return [] if found.table is None else read_table(settings, found.table)["id"].tolist()


# ---------------------------------------------------------------- beside a service


class Client:
    """Asks for batches; it waits while the log is rather full, so that only a collector lets it go on."""

    def __init__(self, running: Running, rows: int, most: int) -> None:
        self.running, self.most, self.statuses = running, most, Counter[int]()
        self.answered: Counter[str] = Counter()  # rows, by the request's id
        self.sent = 0  # bytes that the log has had to take, or a little fewer
        record = running.client.get("/examples").json()[0]["record"]
        self.rows, self.body = rows, json.dumps({"rows": [{"record": record}] * rows}).encode()

    def ask(self) -> None:
        """Ask once, over a connection of its own: any worker may get it."""
        until(lambda: self._log_size() < self.most, 90)
        before, connection = self._log_size(), http.client.HTTPConnection("127.0.0.1", self.running.port, timeout=30)
        connection.request("POST", "/predict/batch", self.body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        told = json.loads(response.read())
        connection.close()
        self.statuses[response.status] += 1
        if response.status == 200:
            self.answered[told["request_id"]] += self.rows
            self.sent += max(0, self._log_size() - before)

    def _log_size(self) -> int:
        size = 0
        for path in log_folder(self.running.settings, "flight-delay").glob("*"):
            try:
                size += path.stat().st_size
            except FileNotFoundError:
                continue
        return size


@pytest.mark.slow
def test_a_service_under_load_with_a_small_log_stays_ready(home: Path) -> None:
    own, total = 150_000, 300_000
    options = ["--limit", f"log={own}", "--limit", f"logs={total}", "--collect-every", "1s", "--workers", "2"]
    with serving(home, *options) as running:
        client = Client(running, 20, total // 4)
        while client.sent < 1.2 * total:  # more than both workers together may leave
            client.ask()
            assert running.client.get("/health/ready").status_code == 200
        assert set(client.statuses) == {200}
        assert running.stop() == 0
        assert "collecting predictions" not in running.errors()
    collected = len(read_table(running.settings, str(newest_reference(running.settings, TABLE))))
    assert 0 < collected <= client.answered.total() - 1, "somebody has collected while it ran"
    assert Counter(in_table(running.settings)) == client.answered


def test_without_a_collector_the_same_service_refuses_and_says_which_limit_it_is(home: Path) -> None:
    with serving(home, "--limit", "log=100000", "--collect-every", "off") as running:
        client = Client(running, 50, 10**9)
        until(lambda: client.ask() or running.client.get("/health/ready").status_code == 503, 60)
        said = running.client.get("/health/ready").json()["detail"]
        assert "of this process wait in predictions, and its limit is 100,000" in said
        assert "serving_log_own_limit_bytes 100000.0" in running.client.get("/metrics").text
        collect_predictions(running.settings, flight_delay)
        running.wait_ready()  # a closed segment was collected


@pytest.mark.parametrize("count", ["1", "2"])
def test_a_service_that_ends_takes_its_collector_with_it(home: Path, count: str) -> None:
    with serving(home, "--workers", count, "--collect-every", "1s") as running:
        until(lambda: len(collectors(running)) == 1, 30)
        (collector,) = collectors(running)
        assert running.stop() == 0
        until(lambda: not lives(collector))
        assert "collecting" not in running.errors()


def collectors(running: Running) -> list[int]:
    """The processes that collect for a service at this moment."""
    found = []
    for each in psutil.Process(running.process.pid).children():
        try:
            found += [each.pid] if "collect_beside" in " ".join(each.cmdline()) else []
        except psutil.Error:
            continue
    return found


def test_workers_import_nothing_that_a_table_needs_though_predictions_are_collected(home: Path) -> None:
    with serving(home, "--collect-every", "1s", "--workers", "2") as running:
        until(lambda: len(collectors(running)) == 1, 30)
        for pid in (running.process.pid, *workers(running)):
            if pid not in collectors(running):
                mapped = {Path(each.path).name for each in psutil.Process(pid).memory_maps()}
                assert not [name for name in mapped if name.startswith(("libarrow", "_internal.abi3"))]


# ---------------------------------------------------------------- killed at random


@pytest.mark.slow
def test_a_collector_that_is_killed_at_any_moment_loses_nothing_and_counts_nothing_twice(settings: Settings) -> None:
    writer = PredictionLog(log_folder(settings, "flight-delay"), log_limits(8, 2**30))
    number, draw = 0, random.Random(11)
    warm = _time_of(collecting_command(settings, None))
    for _ in range(12):
        for _ in range(4):
            writer.append([entry(number), entry(number + 1)])
            number += 2
            maintain(writer)
        process = subprocess.Popen(collecting_command(settings, None), stdout=subprocess.DEVNULL)
        time.sleep(draw.uniform(0.6, 1.1) * warm)  # imports take most of the time, and come first
        process.kill()
        process.wait()
    writer.close()
    assert Counter(in_table(settings)) == Counter(f"r{each}" for each in range(number))
    assert in_log(settings) == []


def _time_of(command: list[str]) -> float:
    begin = time.monotonic()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - begin


def test_two_collectors_take_turns(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = PredictionLog(log_folder(settings, "flight-delay"), log_limits(8, 2**30))
    for number in range(6):
        writer.append([entry(number)])
        maintain(writer)
    writer.close()
    real, inside, most = predictions._collect, [0], []

    def counted(*arguments: Any) -> Any:
        inside[0] += 1
        most.append(inside[0])
        try:
            return real(*arguments)
        finally:
            inside[0] -= 1

    monkeypatch.setattr(predictions, "_collect", counted)
    rows: list[int] = []
    threads = [
        threading.Thread(target=lambda: rows.append(collect_predictions(settings, flight_delay).rows)) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (sorted(rows), max(most)) == ([0, 0, 6], 1)


def test_who_waits_too_long_for_another_collector_is_told(settings: Settings) -> None:
    folder = log_folder(settings, "flight-delay")
    folder.mkdir(parents=True)
    with (
        predictions._alone(folder),
        pytest.raises(CollectError, match="another collector"),
        predictions._alone(folder, seconds=0.05),
    ):
        pass


# ---------------------------------------------------------------- limits


def test_the_limit_of_one_process_stops_no_other(settings: Settings) -> None:
    folder, limits = log_folder(settings, "flight-delay"), log_limits(2000, 10**6)
    mine = PredictionLog(folder, limits)
    while not mine.problem:
        mine.append([entry(1)])
        mine.sync()
        maintain(mine)
    code = """
import sys
from pathlib import Path
from mlops_course.serving.predictions import PredictionLog, log_limits, maintain
log = PredictionLog(Path(sys.argv[1]), log_limits(2000, 10**6))
log.open()
log.sync()
maintain(log)
print(repr(log.problem), log.own, log.total > 2000)
log.close()
"""
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["''", "0", "True"]
    mine.close()


@pytest.mark.parametrize(("own", "total"), [(1000, 10**9), (10**9, 1000), (8, 8), (2 * 2**30, 8 * 2**30)])
def test_a_file_is_full_long_before_the_log_is(own: int, total: int) -> None:
    limits = log_limits(own, total)
    assert 1 <= limits.segment <= min(own, total) / 8 <= 2**28


def test_how_much_the_log_may_hold_is_no_more_than_the_disk_has(settings: Settings) -> None:
    folder = log_folder(settings, "flight-delay")
    log = PredictionLog(folder, log_limits(2**60, 2**62))
    log.open()
    log.sync()
    status = os.statvfs(folder)
    assert 0 < log.most <= status.f_blocks * status.f_frsize
    log.close()


# ---------------------------------------------------------------- where it can't be done


def test_where_tables_cannot_be_written_nothing_is_started_and_whoever_asks_is_told(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    from mlops_course.commands import serve

    monkeypatch.setattr(collecting, "_NEEDED", ("pandas", "a_package_that_is_not_there"))
    limits = serve._limits_of(None)
    with serve._collecting(Settings(home=home), None, None, limits) as nothing:
        assert nothing is None
    done = CliRunner().invoke(app, ["serve", "--home", str(home), "--collect-every", "10m"])
    assert "can't be collected" in done.output


def test_a_collector_that_fails_is_tried_again_and_the_service_hears_of_it(
    settings: Settings, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    tried = tmp_path / "tried"
    code = f"open({str(tried)!r}, 'a').write('x'); raise SystemExit('the storage does not answer')"
    with caplog.at_level(logging.WARNING), Collector(settings, [sys.executable, "-c", code], 0.05, 2**30):
        until(lambda: tried.exists() and len(tried.read_text()) >= 3)
    assert "the storage does not answer" in caplog.text


def test_the_command_collects_again_and_again_until_it_is_told_to_end(settings: Settings) -> None:
    writer = PredictionLog(log_folder(settings, "flight-delay"))
    program = [sys.executable, "-c", "from mlops_course.cli import main; main()", "collect-predictions"]
    command = [*program, "--home", str(settings.home), "--every", "1s"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        for number in range(2):
            writer.append([entry(number)])
            writer.close()
            while (line := process.stdout.readline()).startswith("0 "):
                continue
            assert line.startswith("1 prediction of 1 file in")
        process.terminate()
        _, said = process.communicate(timeout=20)
        assert "Traceback" not in said
    finally:
        process.kill()
        process.wait()
