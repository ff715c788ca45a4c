"""What a service tells whoever watches it: numbers that add up over its workers, and log lines that belong together."""

import json
import math
import os
import re
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from service_helpers import FIRST, Running, serving, until, workers

from mlops_course.serving import publish
from mlops_course.serving.access import trace_id_of
from mlops_course.serving.metrics import Metrics, State, expose
from mlops_course.serving.problems import REASON_OF, REASONS, HTTPProblem
from mlops_course.serving.publishing import live_file

pytestmark = pytest.mark.filterwarnings("ignore:Series.values returning:DeprecationWarning")  # inside pyarrow


def scrape(running: Running) -> dict[str, float]:
    """All series as Prometheus gets them, over a connection of its own: any worker may be asked."""
    with httpx.Client(base_url=running.url) as client:
        text = client.get("/metrics").text
    lines = [line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in lines}


def once(running: Running, method: str, path: str, **given: object) -> httpx.Response:
    """One request over a connection of its own."""
    with httpx.Client(base_url=running.url, timeout=30) as client:
        return client.request(method, path, **given)  # type: ignore[arg-type]


def rejected(found: dict[str, float]) -> dict[str, float]:
    counts = {name: value for name, value in found.items() if name.startswith("serving_rejected_total{") and value}
    return {re.findall(r'reason="(\w+)"', name)[0]: value for name, value in counts.items()}


# ---------------------------------------------------------------- numbers


def test_refusals_of_all_workers_are_counted_by_their_reason(home: Path) -> None:
    with serving(home, "--workers", "2", "--limit", "body=5000", "--limit", "head=4000") as running:
        record = once(running, "GET", "/examples").json()[0]["record"]
        sent = {
            "too_large": lambda: once(running, "POST", "/predict", content=b" " * 6000),
            "invalid": lambda: once(running, "POST", "/predict", json={"record": {**record, "distance": "far"}}),
            "media_type": lambda: once(running, "POST", "/predict", content=b"{}", headers={"content-type": "text/x"}),
            "not_found": lambda: once(running, "GET", "/no/such/page"),
            "method": lambda: once(running, "DELETE", "/predict"),
            "headers": lambda: once(running, "GET", "/model", headers={"x-long": "y" * 5000}),
        }
        for _ in range(4):
            for ask in sent.values():
                assert 400 <= ask().status_code < 500
        assert rejected(scrape(running)) == dict.fromkeys(sent, 4)
        publish(running.settings, FIRST)
        assert once(running, "POST", "/predict", json={"record": record}).status_code == 200
        assert rejected(scrape(running)) == dict.fromkeys(sent, 4), "an answer is no refusal"


def test_too_much_at_once_and_too_often_are_told_apart(home: Path) -> None:
    with serving(home, "--limit", "rate=0.2", "--limit", "burst=3", "--limit", "waiting=1") as running:
        statuses = [once(running, "POST", "/predict", json={"record": {}}).status_code for _ in range(5)]
        assert statuses == [503, 503, 503, 429, 429]
        time.sleep(6)  # the rate is for whoever asks for the metrics, too
        assert rejected(scrape(running)) == {"busy": 3, "rate": 2}


def test_limits_and_load_add_up_over_workers_and_the_dead_take_theirs_with_them(home: Path) -> None:
    with serving(home, "--workers", "2", "--limit", "running=5", "--limit", "waiting=1000000") as running:
        until(lambda: scrape(running).get("serving_ready") == 2)
        found = scrape(running)
        assert (found["serving_running_limit"], found["serving_held_bytes_limit"]) == (10, 2_000_000)
        victim = workers(running)[0]
        os.kill(victim, signal.SIGKILL)
        until(lambda: scrape(running)["serving_running_limit"] == 5)  # one that is dead has no room for requests
        until(lambda: victim not in workers(running) and scrape(running)["serving_running_limit"] == 10)


def test_bodies_that_wait_are_seen_while_they_wait_and_not_after(home: Path) -> None:
    with serving(home) as running:
        done = threading.Event()

        def slowly() -> object:
            yield b" " * 70_000
            done.wait(10)

        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(lambda: once(running, "POST", "/predict", content=slowly()))
            until(lambda: scrape(running)["serving_held_bytes"] >= 70_000)
            done.set()
            assert asked.result().status_code == 400
        until(lambda: scrape(running)["serving_held_bytes"] == 0)
        until(lambda: scrape(running)["serving_running"] <= 1)


def test_when_the_live_model_was_published_and_how_full_the_log_may_become_is_told(home: Path) -> None:
    with serving(home) as running:
        found = scrape(running)
        assert found["serving_model_published_timestamp_seconds"] == pytest.approx(
            live_file(running.settings, FIRST).stat().st_mtime
        )
        assert 0 < found["serving_log_limit_bytes"] <= 8 * 2**30, "or what the disk has room for"
        assert found["serving_log_own_limit_bytes"] == 2 * 2**30
        before = found["serving_model_published_timestamp_seconds"]
        time.sleep(0.05)
        publish(running.settings, "flight-delay@2")
        until(lambda: scrape(running)["serving_model_published_timestamp_seconds"] > before)


def test_a_service_without_a_model_says_so_and_refuses_for_that_reason(tmp_path: Path) -> None:
    with serving(tmp_path, ready=False) as running:
        assert once(running, "POST", "/predict", json={"key": {"flight": 1}}).status_code == 503
        assert once(running, "GET", "/health/ready").status_code == 503
        found = scrape(running)
        assert rejected(found) == {"no_model": 1}, "who asks whether it is ready isn't refused"
        assert (found["serving_ready"], found["serving_model_published_timestamp_seconds"]) == (0, 0)


def test_reasons_are_a_short_list_whatever_a_refusal_says() -> None:
    assert {HTTPProblem(status, "x").reason for status in range(400, 600)} <= REASONS
    assert set(REASON_OF.values()) < REASONS
    metrics = Metrics()
    for word in ("busy", "a stranger's word", ""):
        metrics.rejected(503, word)
    metrics.rejected(599)
    lines = [line for line in expose(metrics).decode().splitlines() if "rejected_total{" in line]
    assert len(lines) == len(REASONS)
    assert sorted(line.split('"')[1] for line in lines if not line.endswith(" 0.0")) == ["busy", "other", "unavailable"]


def test_every_gauge_says_what_becomes_of_it_with_several_processes() -> None:
    state = Metrics().state
    assert isinstance(state, State)
    modes = {name: gauge._multiprocess_mode for name, gauge in vars(state).items()}
    assert set(modes.values()) == {"livesum", "livemax"}
    largest = {"log_bytes", "log_limit", "log_own", "log_own_limit", "published"}
    assert {name for name, mode in modes.items() if mode == "livemax"} == largest


# ---------------------------------------------------------------- log lines


TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"


def test_the_access_log_says_how_a_request_ended_and_never_what_was_asked(home: Path) -> None:
    with serving(home, "--json", "--access-log") as running:
        example = running.client.get("/examples").json()[0]
        headers = {"x-request-id": "r-17", "traceparent": f"00-{TRACE}-00f067aa0ba902b7-01"}
        headers["authorization"] = "Bearer s3"
        answer = running.client.post("/predict?reasons=3", json=example, headers=headers)
        running.client.get("/people/Ann%20Miller?key=s3")
        running.stop()
        time.sleep(0.2)
        text = running.errors()
    lines = [line for line in map(json.loads, text.splitlines()) if line["logger"] == "mlops_course.serving.access"]
    asked = next(line for line in lines if line.get("request_id") == "r-17")
    assert asked.items() >= {
        "level": "info", "method": "POST", "path": "/predict", "status": 200, "model": FIRST, "trace_id": TRACE,
        "bytes": len(answer.content),
    }.items()  # fmt: skip
    assert 0 < asked["milliseconds"] < 30_000 and not math.isnan(asked["time"])
    (lost,) = [line for line in lines if line["status"] == 404]
    assert (lost["path"], lost["refusal"], "trace_id" in lost) == ("other", "not_found", False)
    for secret in ("reasons", "s3", "Ann", "127.0.0.1", str(example["key"]["flight"]), "traceparent"):
        assert secret not in text.replace(str(asked["time"]), "").replace(str(asked["process"]), ""), secret


def test_without_the_option_no_request_leaves_a_line(home: Path) -> None:
    with serving(home, "--json") as running:
        running.client.get("/examples")
        running.stop()
        time.sleep(0.2)
        assert "access" not in running.errors()


@pytest.mark.parametrize("tail", [b"", b"-more"])
@pytest.mark.parametrize("version", [b"00", b"cc", b"fe"])
def test_a_callers_trace_is_taken_from_a_header_of_any_version(version: bytes, tail: bytes) -> None:
    assert trace_id_of(b"%s-%s-00f067aa0ba902b7-01%s" % (version, TRACE.encode(), tail)) == TRACE


@pytest.mark.parametrize("header", ["", TRACE, f"00-{TRACE.upper()}-00f067aa0ba902b7-01", f"00-{TRACE}-{'0' * 16}-01"])
def test_what_is_no_trace_header_is_ignored(header: str) -> None:
    assert trace_id_of(header.encode()) == ""
