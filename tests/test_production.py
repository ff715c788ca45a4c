"""Production on a laptop: an app with all layers, one configuration, loops that lose nothing, all of it kept alive."""

import asyncio
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import msgspec
import psutil
import pytest
from conftest import Quarter, free_port, settings_in
from kill_helpers import lives
from score_helpers import SMALL, release_version
from service_helpers import FIRST, SECOND, until

from mlops_course.capstone.operations import Operations, part_states, quantile, read_metrics, read_operations
from mlops_course.capstone.ops_page import OPERATIONS_FILES
from mlops_course.capstone.processes import SupervisorError, is_supervised, read_state
from mlops_course.capstone.production import (
    Ports,
    check_ports,
    environment_of,
    loop_parts,
    production_app,
    prometheus_config,
    prometheus_part,
    rules_folder,
    service_part,
)
from mlops_course.capstone.proofs import CLOSED_OPERATIONS, OPEN_OPERATIONS, PROOF_PATHS, Proofs
from mlops_course.capstone.rounds import (
    Reviewed,
    RoundError,
    months_due,
    production_folder,
    read_decision,
    read_reviews,
    retrain_if_due,
    review_due,
)
from mlops_course.environment import CourseError, Settings, load_settings
from mlops_course.ledger import LedgerEntry, append_entry
from mlops_course.monitoring.retraining import read_trainings
from mlops_course.project import flight_delay
from mlops_course.registry import score_month
from mlops_course.security.keys import create_key
from mlops_course.serving.metrics import Metrics, expose

pytestmark = pytest.mark.filterwarnings("ignore:Series.values returning:DeprecationWarning")  # inside pyarrow
COMMAND = [sys.executable, "-c", "from mlops_course.cli import main; main()"]
CASE = "mlops_course.project:flight_delay"


def ask(app: Any, *paths: str, key: str = "") -> list[httpx.Response]:
    """What an app answers."""
    headers = {"authorization": f"Bearer {key}"} if key else {}

    async def all_of_them() -> list[httpx.Response]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://ops") as client:
            return [await client.get(path, headers=headers) for path in paths]

    return asyncio.run(all_of_them())


def review(month: str = "2013-07", **about: Any) -> Reviewed:
    usual: dict[str, Any] = {
        "month": month, "model": FIRST, "verdict": "look", "alarms": [], "features": 10, "moved": [], "score_psi": 0.1,
        "estimated": 0.46, "interval": (0.44, 0.48), "trust": "trusted", "labelled": None, "coverage": {"share": 0.5},
        "trained": ("2013-01", "2013-03"), "performance": "", "tables": {}, "page": f"flight-delay-{month}.html",
        "time": f"{month}-28T00:00:00.000Z",
    }  # fmt: skip
    return Reviewed(**usual | about)


def write_reviews(settings: Settings, *reviews: Reviewed) -> None:
    path = production_folder(settings) / "reviews-flight-delay.json"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(msgspec.json.encode(reviews))


@pytest.fixture
def production(home: Path) -> Settings:
    """A workspace in which something has happened, with its own folder in as many places as possible."""
    settings = settings_in(home)
    write_reviews(settings, review(alarms=[f"the loss is too high, see {home}/reports"], verdict="alarm"))
    (home / "reports").mkdir()
    (home / "reports" / "flight-delay-2013-07.html").write_text(f"<p>A report of {home}/data", encoding="utf-8")
    entry = {"event": "restore", "use_case": "flight-delay", "subject": FIRST, "by": "ann"}
    append_entry(settings, LedgerEntry(**entry, reason=f"from {home}/copies"))
    run = settings.runs / "20130701T000000000000Z-training-000001"
    run.mkdir()
    about = {"id": run.name, "pipeline": "training", "status": "failed", "started": "2013-07-01", "seconds": 3.0}
    about |= {"folder": str(run), "error": f"can't read {home}/data", "stages": [], "parameters": {}}
    (run / "run.json").write_text(json.dumps(about), encoding="utf-8")
    parts = [{"name": "monitoring", "state": "failing", "pid": 1, "birth": "no", "error": f"no {home}/data"}]
    state = {"pid": 1, "birth": "no", "since": "2013-07-01T00:00:00.000Z", "parts": parts}
    (production_folder(settings) / "state.json").write_text(json.dumps(state), encoding="utf-8")
    return settings


# ---------------------------------------------------------------- one app, one configuration


def test_everything_that_is_served_has_a_role_or_is_open(home: Path) -> None:
    app = production_app(settings_in(home))
    served = {each.path for each in app.app.api.routes if each.path.startswith("/ops")}  # type: ignore[attr-defined]
    assert served == {path for _, path in OPEN_OPERATIONS | CLOSED_OPERATIONS}
    assert served == {*OPERATIONS_FILES, "/ops.json", *PROOF_PATHS}
    assert not OPEN_OPERATIONS & CLOSED_OPERATIONS
    assert served <= app.paths, "what isn't named is counted as another path"


def test_with_keys_the_document_and_the_proofs_are_for_whoever_operates(production: Settings) -> None:
    keys = {role: create_key(production, role, role).text for role in ("predict", "operate", "admin")}
    app = production_app(production)
    closed = [path for _, path in sorted(CLOSED_OPERATIONS)]
    for role, allowed in (("", False), ("predict", False), ("operate", True), ("admin", True)):
        answers = ask(app, *closed, key=keys.get(role, ""))
        assert {answer.status_code in (401, 403) for answer in answers} == {not allowed}, role
        assert {answer.status_code for answer in ask(app, *OPERATIONS_FILES, key=keys.get(role, ""))} == {200}


def test_a_file_of_keys_that_is_named_and_not_there_opens_nothing(home: Path, tmp_path: Path) -> None:
    settings = load_settings(home=home, keys_file=tmp_path / "no keys")
    assert {answer.status_code for answer in ask(production_app(settings), "/ops.json", "/metrics")} == {401}


def test_each_fact_leads_to_its_proof_and_nothing_names_a_folder_of_the_machine(production: Settings) -> None:
    app = production_app(production)
    (document,) = ask(app, "/ops.json")
    proofs = sorted({found["proof"] for found in facts(document.json()) if found["proof"].startswith("/ops/")})
    assert {path.split("?")[0] for path in proofs} == set(PROOF_PATHS) - {"/ops/metrics"}
    for path, answer in zip(proofs, ask(app, *proofs), strict=True):
        assert answer.status_code == 200, path
    for answer in [document, *ask(app, *proofs, *OPERATIONS_FILES, "/ops/metrics")]:
        assert str(production.home) not in answer.text, answer.url
        assert production.home.parent.name not in answer.text, answer.url


def facts(found: Any) -> Iterator[dict[str, Any]]:
    """Whatever has a proof."""
    for each in found.values() if isinstance(found, dict) else found if isinstance(found, list) else []:
        yield from facts(each)
    if isinstance(found, dict) and "proof" in found:
        yield found


@pytest.mark.parametrize("name", ["../secret", "", "..%2fsecret", "%2fetc%2fpasswd", "flight-delay-2013-07.html%00"])
def test_a_proof_is_looked_up_and_never_a_path(production: Settings, name: str) -> None:
    (production.home / "secret").write_text("a secret", encoding="utf-8")
    names = (f"/ops/report?name={name}", f"/ops/model?name={name}", f"/ops/run?id={name}")
    for answer in ask(production_app(production), *names):
        assert answer.status_code in (404, 422)
        assert "a secret" not in answer.text and str(production.home) not in answer.text


def test_a_report_may_run_and_load_nothing(production: Settings) -> None:
    policy = Proofs(production).report("flight-delay-2013-07.html").headers["content-security-policy"]
    assert "default-src 'none'" in policy and "sandbox" in policy and "script-src" not in policy


def test_what_cannot_be_read_is_said_and_hides_nothing_else(production: Settings) -> None:
    (production_folder(production) / "reviews-flight-delay.json").write_text("[", encoding="utf-8")
    (production_folder(production) / "state.json").write_text("[", encoding="utf-8")
    production.ledger.write_bytes(production.ledger.read_bytes().replace(b"ann", b"otto", 1))
    found = json.loads(Operations(production, Metrics()).content())
    assert [problem.split(" ")[0] for problem in found["problems"]] == [
        "production/reviews-flight-delay.json", "production/state.json",
    ]  # fmt: skip
    assert [model["model"] for model in found["models"]] == [FIRST]
    assert not found["ledger"]["sound"] and "was edited" in found["ledger"]["problem"]


def test_a_hundred_who_look_cost_one_look(production: Settings) -> None:
    operations = Operations(production, Metrics(), seconds=60)
    assert len({operations.content() for _ in range(100)}) == 1
    assert operations.made == 1


def test_latency_is_that_of_the_window_and_not_of_the_life(home: Path) -> None:
    metrics, settings = Metrics(), settings_in(home)
    operations = Operations(settings, metrics, seconds=0)
    for _ in range(100):
        metrics.answered("/predict", "POST", 200, 3.0)
    assert json.loads(operations.content())["latency"]["p50"] > 1
    for status, seconds in ((200, 0.002), (200, 0.002), (422, 0.002), (503, 0.002)):
        metrics.answered("/predict/batch", "POST", status, seconds)
    metrics.answered("/model", "GET", 500, 3.0)
    latency = json.loads(operations.content())["latency"]
    assert latency["p99"] < 0.01
    assert (latency["requests"], latency["failed"], latency["refused"]) == (4, 1, 1)


def test_a_service_that_was_started_anew_begins_at_nothing() -> None:
    metrics = Metrics()
    reading = read_metrics(expose(metrics).decode(), 0.0)
    assert sum(reading.buckets.values()) == 0
    assert quantile(reading.buckets, 0.5) is None


def test_the_share_of_each_version_is_shown_while_a_release_is_under_way(home: Path) -> None:
    from mlops_course.deployment import start_release

    settings = settings_in(home)
    start_release(settings, SECOND, "canary", (0.25, 0.5))
    found = read_operations(settings, read_metrics("", 0.0), 0.0, lambda name: {"model": name})
    shown = [(each["model"], each["role"], each["share"]) for each in found["models"]]
    assert shown == [(FIRST, "stable", 0.75), (SECOND, "candidate", 0.25)]
    assert found["releases"]["now"]["candidate"] == SECOND


def test_the_settings_of_production_are_those_of_each_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {"home": tmp_path, "seed": 7, "threads": 2, "tracking_uri": "sqlite:///x.db"}
    given |= {"four_eyes": True, "features_url": "redis://:secret@here", "use_case": "x", "storage": "s3://bucket/x"}
    given |= {"trust": tmp_path / "trust", "keys_file": tmp_path / "keys", "guard_url": "redis://:secret@there"}
    assert set(given) == set(Settings.model_fields), "a setting that no part would hear of"
    settings, plain = Settings(**given), Settings(home=tmp_path)
    for wanted, other in ((settings, plain), (plain, settings)):
        for name, value in environment_of(other).items():  # of a terminal in which something else was set
            monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
        for name, value in environment_of(wanted).items():
            monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
        assert load_settings() == wanted
    for part in (service_part(settings, Ports()), *loop_parts(settings, CASE)):
        assert "secret" not in " ".join(part.command), "everybody can read a command"


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_prometheus_understands_its_configuration(settings: Settings, tmp_path: Path) -> None:
    folder = production_folder(settings) / "prometheus"
    prometheus_part(settings, Ports())
    command = ["promtool", "check", "config", str(folder / "prometheus.yml")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (rules := rules_folder()) is not None
    for name in ("rules.yml", "slo.yml", "alerts.yml"):
        assert (folder / name).read_bytes() == (rules / name).read_bytes(), "what rings here is what rings there"
    found = json.loads(prometheus_config(8000, [], tmp_path / "key"))
    assert {job["authorization"]["credentials_file"] for job in found["scrape_configs"]} == {str(tmp_path / "key")}
    assert {job["metrics_path"] for job in found["scrape_configs"]} == {"/metrics", "/ops/metrics"}


@pytest.mark.parametrize("name", ["api", "mlflow", "prometheus"])
def test_a_port_in_use_is_named_with_its_part_and_its_option(settings: Settings, name: str) -> None:
    import socket

    from mlops_course.capstone.processes import Part

    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        option = "--port" if name == "api" else f"--{name}-port"
        with pytest.raises(SupervisorError, match=f"port {port}, which {name} wants, is in use.*{option}"):
            check_ports([Part(name, (), url=f"http://127.0.0.1:{port}")])
        check_ports([Part(name, (), url=f"http://127.0.0.1:{port}", off="not installed")])


# ---------------------------------------------------------------- the loops


def test_a_month_is_due_once_and_again_when_its_tables_change() -> None:
    months, old, new = [f"2013-{month:02}" for month in range(1, 13)], {"rows": "x@1"}, {"rows": "x@2"}
    seen = [review(month, tables=old) for month in months]
    assert months_due(months, [], old) == months
    assert months_due(months, seen, old) == []
    assert months_due(months, seen, new) == months[-2:], "outcomes land late; older months stay as they were judged"
    assert months_due(months, seen[:5] + seen[6:], old) == ["2013-06"]


def test_a_training_is_asked_for_once_and_its_reason_is_kept(settings: Settings) -> None:
    started: list[dict[str, str]] = []
    assert retrain_if_due(settings, flight_delay, lambda _, values: started.append(values)) is None, "no review yet"
    write_reviews(settings, review())
    for _ in range(3):
        retrain_if_due(settings, flight_delay, lambda _, values: started.append(values))
    assert started == [{"first": "2013-01", "train_last": "2013-06", "test_last": "2013-07"}]
    decided = read_decision(settings, "flight-delay")
    assert decided is not None and decided.retrain and decided.rule == "new data"


def test_a_training_that_was_cut_off_is_begun_again_but_not_for_ever(settings: Settings) -> None:
    write_reviews(settings, review())

    def killed(_: Settings, values: dict[str, str]) -> None:
        raise KeyboardInterrupt

    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            retrain_if_due(settings, flight_delay, killed)
    with pytest.raises(RoundError, match="cut off 3 times"):
        retrain_if_due(settings, flight_delay, killed)
    assert [each.outcome for each in read_trainings(settings, flight_delay)] == ["stopped"] * 3
    write_reviews(settings, review("2013-08"))
    assert retrain_if_due(settings, flight_delay, lambda *_: None) is not None, "the next month is another matter"


def test_a_training_that_failed_is_not_tried_for_ever(settings: Settings) -> None:
    write_reviews(settings, review())

    def fails(_: Settings, values: dict[str, str]) -> None:
        raise CourseError("a stage failed")

    with pytest.raises(CourseError, match="a stage failed"):
        retrain_if_due(settings, flight_delay, fails)
    decided = retrain_if_due(settings, flight_delay, fails)
    assert decided is not None and not decided.retrain and "held back" in decided.reason


# ---------------------------------------------------------------- all of it, with real processes


@contextmanager
def up(settings: Settings, *options: str) -> Iterator[dict[str, int]]:
    """Production on free ports; whatever happens, nothing of it is left."""
    ports = {"port": free_port(), "mlflow-port": free_port(), "prometheus-port": free_port()}
    chosen = [word for name, port in ports.items() for word in (f"--{name}", str(port))]
    try:
        done = run(settings, "up", *chosen, "--every", "1", *options)
        assert done.returncode == 0, done.stdout + done.stderr + logs(settings)
        yield ports
    finally:
        run(settings, "down")


def run(settings: Settings, *words: str) -> subprocess.CompletedProcess[str]:
    command = [*COMMAND, *words, "--home", str(settings.home)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240)


def logs(settings: Settings) -> str:
    found = sorted((production_folder(settings) / "logs").glob("*.log"))
    return "\n".join(f"{path.name}: {path.read_text(encoding='utf-8', errors='replace')[-1500:]}" for path in found)


def pid_of(settings: Settings, name: str) -> int:
    state = read_state(production_folder(settings))
    return next((part.pid for part in state.parts if part.name == name), 0) if state else 0


def ready(port: int) -> Callable[[], bool]:
    def look() -> bool:
        try:
            return httpx.get(f"http://127.0.0.1:{port}/health/ready", timeout=5).status_code == 200
        except httpx.TransportError:
            return False

    return look


@pytest.mark.slow
@pytest.mark.system
def test_production_survives_the_death_of_each_part_and_leaves_nothing(own_quarter: Quarter, browser: Any) -> None:
    settings = own_quarter.settings
    release_version(own_quarter, SMALL, "2013-02", 1)
    score_month(settings, flight_delay, FIRST, own_quarter.features, "2013-03")
    assert run(settings, "status").returncode == 3
    with up(settings) as ports:
        url = f"http://127.0.0.1:{ports['port']}"
        until(ready(ports["port"]), 60)
        again = run(settings, "up")
        assert again.returncode == 1
        assert "production is up since" in again.stderr and "mlops-course down" in again.stderr
        predicts(url)
        until(lambda: read_decision(settings, "flight-delay") is not None, 120)
        assert [each.month for each in read_reviews(settings, "flight-delay")] == ["2013-03"]
        page = browser.new_page()
        page.goto(f"{url}/ops")
        page.get_by_text("2013-03").first.wait_for()
        parts = {part.name: part for part in part_states(settings) if part.state != "off"}
        assert {"api", "monitoring", "retraining", "mlflow"} <= set(parts)
        for name in parts:
            before = pid_of(settings, name)
            psutil.Process(before).kill()
            until(lambda: pid_of(settings, name) not in (0, before), 60)  # noqa: B023
        until(ready(ports["port"]), 60)
        predicts(url)
        page.locator("#parts").get_by_text("ended by SIGKILL").first.wait_for(timeout=60_000)
        page.close()
        until(lambda: run(settings, "status").returncode == 0, 120)
        shown = json.loads(run(settings, "status", "--json").stdout)["parts"]
        assert {each["part"]: each["restarts"] for each in shown if each["state"] != "off"} == dict.fromkeys(parts, 1)
        state = read_state(production_folder(settings))
        assert state is not None
        family = [psutil.Process(state.pid), *psutil.Process(state.pid).children(recursive=True)]
        done = run(settings, "down", "--json")
        assert json.loads(done.stdout)["ended"] == [*parts]
    assert not any(map(lives, family))
    assert not is_supervised(production_folder(settings)) and read_state(production_folder(settings)) is None
    assert run(settings, "status").returncode == 3
    assert review_due(settings, flight_delay) == [], "what was looked at is known"


def predicts(url: str) -> None:
    record = httpx.get(f"{url}/examples", timeout=30).json()[0]["record"]
    assert httpx.post(f"{url}/predict", json={"record": record}, timeout=30).json()["model"] == FIRST


@pytest.mark.slow
@pytest.mark.system
@pytest.mark.skipif(os.name == "nt", reason="tries a signal")
def test_a_killed_supervisor_is_told_and_up_starts_all_again(home: Path) -> None:
    settings = settings_in(home)
    with up(settings) as ports:
        state = read_state(production_folder(settings))
        assert state is not None
        psutil.Process(state.pid).kill()
        until(lambda: not is_supervised(production_folder(settings)))
        told = run(settings, "status", "--json")
        assert told.returncode == 1
        assert {each["state"] for each in json.loads(told.stdout)["parts"]} <= {"alone", "off"}
        assert "supervisor is gone; mlops-course up" in told.stdout
        before = psutil.Process(pid_of(settings, "api"))
        options = ["--port", str(ports["port"]), "--prometheus-port", str(ports["prometheus-port"])]
        started = run(settings, "up", *options)
        assert started.returncode == 0, started.stdout + started.stderr + logs(settings)
        assert not lives(before)
        until(ready(ports["port"]), 60)
    assert read_state(production_folder(settings)) is None
