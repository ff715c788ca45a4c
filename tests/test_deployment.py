"""Releases seen from outside: a real client, a real service with two workers, real flights."""

import json
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pandas as pd
import pytest
from conftest import Quarter, settings_in
from release_helpers import COMMAND, ready, serving, wait_until

from mlops_course.deployment import (
    ReleaseError,
    ReleaseLimits,
    live_reference,
    promote_release,
    read_counts,
    read_release,
    read_release_history,
    refuse_during_release,
    release_status,
    roll_back_release,
    start_release,
)  # fmt: skip
from mlops_course.deployment.judging import judge_counts
from mlops_course.environment import Settings
from mlops_course.experiments import TrainingConfig, train
from mlops_course.project import flight_delay
from mlops_course.serving import Origin, load_predictor, publish, write_bundle

pytestmark = pytest.mark.skipif(os.name == "nt", reason="several workers share a listening socket")
STABLE, GOOD, BAD = "flight-delay@1", "flight-delay@2", "flight-delay@3"
CARRIER = "US"  # one flight in sixteen
FAST = {"min_samples": 100, "slice_min_samples": 40, "hold_seconds": 0.0, "pairs_a_second": 400, "caller_share": 1}
# caller_share: all desks of these tests have one address


@dataclass(frozen=True)
class Models:
    """A workspace with three bundles, and flights to ask for."""

    settings: Settings
    records: list[dict[str, Any]]
    carriers: list[str]

    def copy(self, home: Path) -> Settings:
        """The bundles in a workspace of the test's own; the first one is live."""
        shutil.copytree(self.settings.serving, home / "serving")
        settings = settings_in(home)
        publish(settings, STABLE)
        return settings


@pytest.fixture(scope="module")
def models(quarter: Quarter, tmp_path_factory: pytest.TempPathFactory) -> Models:
    """A stable model, a good candidate, and one that takes all flights of one carrier to be late."""
    settings = settings_in(tmp_path_factory.mktemp("models") / "workspace")
    rows, origin = (
        quarter.labelled("2013-01", "2013-02"),
        Origin(run_id="none", data={}, first="2013-01", last="2013-02"),
    )
    wrong = rows.assign(label=rows["label"].where(rows["carrier"] != CARRIER, 1.0))
    for reference, table, iterations in ((STABLE, rows, 40), (GOOD, rows, 44), (BAD, wrong, 44)):
        model = train(table, flight_delay, TrainingConfig(iterations=iterations))
        names = list(model.feature_names_in_)
        write_bundle(settings, flight_delay, model, rows, reference, origin)
    march = quarter.labelled("2013-03").sample(3000, random_state=1)
    plain = march[names].astype("object").where(march[names].notna(), None)
    return Models(settings, plain.to_dict("records"), march["carrier"].tolist())


@dataclass
class Client:
    """Asks for flights from several threads, each flight from the desk with its number, and keeps what came."""

    url: str
    records: list[dict[str, Any]]
    threads: int = 4
    answers: list[tuple[float, int, int, str]] = field(default_factory=list)  # when, row, status, model
    failures: list[str] = field(default_factory=list)
    stop: threading.Event = field(default_factory=threading.Event)

    def ask(self, number: int) -> None:
        """One thread: its own connection, every so-many-th flight, again and again."""
        mine = [
            (row, json.dumps({"record": self.records[row]})) for row in range(number, len(self.records), self.threads)
        ]
        with httpx.Client(base_url=self.url, headers={"content-type": "application/json"}, timeout=20) as client:
            while not self.stop.is_set():
                for row, body in mine:
                    if self.stop.is_set():
                        return
                    try:
                        address = f"10.1.{row // 200}.{row % 200}"  # believed only where a proxy is trusted
                        sent = {"x-sticky-key": f"desk-{row}", "x-forwarded-for": address}
                        answer = client.post("/predict", content=body, headers=sent)
                        model = answer.json().get("model", "")
                        self.answers.append((time.monotonic(), row, answer.status_code, model))
                    except httpx.HTTPError as error:
                        self.failures.append(repr(error))

    def until(self, condition: Callable[[], bool], seconds: float = 120) -> "Client":
        """Ask until something has happened, and a little longer."""
        threads = [threading.Thread(target=self.ask, args=(number,)) for number in range(self.threads)]
        for thread in threads:
            thread.start()
        try:
            wait_until(condition, seconds)
            time.sleep(2.5)  # so that all workers have heard of it, and answer accordingly
        finally:
            self.stop.set()
            for thread in threads:
                thread.join()
        self.stop.clear()
        return self

    def of_row(self) -> dict[int, list[str]]:
        """Which models a desk has heard, in order."""
        found: dict[int, list[str]] = {}
        for _, row, _, model in sorted(self.answers):
            found.setdefault(row, []).append(model)
        return found

    def assert_nothing_failed(self) -> None:
        """Every request was answered, and with 200."""
        assert self.failures == []
        assert {status for _, _, status, _ in self.answers} == {200}


def ended(settings: Settings) -> bool:
    """Whether the release is over."""
    release = read_release(settings)
    return release is not None and release.status != "running"


@pytest.fixture
def workspace(models: Models, tmp_path: Path) -> Settings:
    """A workspace with all bundles; the first one is live."""
    return models.copy(tmp_path / "workspace")


# ---------------------------------------------------------------- what must be shown


@pytest.mark.slow
def test_a_canary_that_is_bad_for_one_carrier_is_rolled_back_by_itself(models: Models, workspace: Settings) -> None:
    with serving(workspace) as server:
        start_release(workspace, BAD, "canary", (0.3,), ReleaseLimits(min_requests=100_000, **FAST))
        client = Client(server.url, models.records).until(lambda: ended(workspace))
        after = httpx.get(f"{server.url}/model").json()["reference"]
    client.assert_nothing_failed()
    last = read_release_history(workspace)[-1]
    assert (last["status"], last["by"]) == ("rolled back", "guard")
    assert f"of carrier={CARRIER} " in last["reason"]
    assert "carrier" in last["reason"].split(";")[0], "the mean over all flights gave nothing away"
    assert live_reference(workspace) == after == STABLE
    checks = {(each["name"], each["slice"]): each["verdict"] for each in release_status(workspace)["checks"]}
    assert {name for (_, name), verdict in checks.items() if verdict == "fail"} == {f"carrier={CARRIER}"}
    assert checks["errors", ""] != "fail" != checks["shift", ""]
    told = [model for when, _, _, model in client.answers if when > client.answers[-1][0] - 0.5]
    assert set(told) == {STABLE}, "nobody gets the bad version any more"


@pytest.mark.slow
def test_a_good_canary_goes_from_step_to_step_and_is_promoted(models: Models, workspace: Settings) -> None:
    with serving(workspace) as server:
        start_release(workspace, GOOD, "canary", (0.2, 0.6), ReleaseLimits(min_requests=700, **FAST), "more trees")
        client = Client(server.url, models.records).until(lambda: ended(workspace))
        after = httpx.get(f"{server.url}/model").json()["reference"]
    client.assert_nothing_failed()
    history = read_release_history(workspace)
    assert [(line["status"], line["share"], line["by"]) for line in history] == [
        ("running", 0.2, "person"), ("running", 0.6, "guard"), ("promoted", 0.0, "guard"),
    ]  # fmt: skip
    assert "all limits held over" in history[-1]["reason"]
    assert live_reference(workspace) == after == GOOD
    assert {model for when, _, _, model in client.answers if when > client.answers[-1][0] - 0.5} == {GOOD}
    settled = no_flapping(client)
    assert sum(GOOD in heard and STABLE in heard for heard in settled.values()) > 100, "desks did change over"


def attack(url: str, bodies: list[dict[str, Any]], requests: int = 1850) -> list[int]:
    """One anonymous client that sends as much as it can, each time under another sticky key; the answers' status."""
    with httpx.Client(base_url=url, headers={"x-forwarded-for": "192.0.2.7"}, timeout=20) as client:
        asked = ((bodies[number % len(bodies)], {"x-sticky-key": f"k{number}"}) for number in range(requests))
        return [client.post("/predict", json=body, headers=sticky).status_code for body, sticky in asked]


def rows_that_differ(models: Models) -> list[dict[str, Any]]:
    """Real flights that the two good versions decide otherwise: whoever wants to harm a candidate sends these."""
    one, other = (load_predictor(models.settings.serving / "bundles" / name) for name in (STABLE, GOOD))
    matrix = one.encode(models.records)
    flipped = (one.scores(matrix) >= one.threshold) != (other.scores(matrix) >= other.threshold)
    return [{"record": record} for record, flips in zip(models.records, flipped, strict=True) if flips]


DESKS = {name: value for name, value in FAST.items() if name != "caller_share"}  # each desk has its own address


@pytest.mark.slow
def test_one_anonymous_client_rolls_no_honest_canary_back_and_honest_traffic_promotes_it(
    models: Models, workspace: Settings
) -> None:
    worst = rows_that_differ(models)
    assert worst, "some flights are decided otherwise"
    impossible = [{"record": {**models.records[0], "distance": 1e9}}]
    with serving(workspace, 2, "--trusted-proxy", "127.0.0.1") as server:
        start_release(workspace, GOOD, "canary", (0.3,), ReleaseLimits(min_requests=1500, **DESKS))
        release = read_release(workspace)
        assert release is not None
        assert set(attack(server.url, impossible, 50)) == {422}
        refused = httpx.post(f"{server.url}/predict", json=impossible[0]).json()
        assert refused["field"] == "record.distance"
        assert "1e+09" in refused["detail"] and "between 10 and 12000" in refused["detail"]
        assert set(attack(server.url, worst)) == {200}
        time.sleep(2.5)
        assert not ended(workspace), read_release_history(workspace)[-1]
        counts = read_counts(workspace, release.id)
        checks = {(each.name, each.slice): each.verdict for each in judge_counts(counts, release.limits)}
        assert checks["decision_flip_rate", ""] == "fail", "if they counted, it would be rolled back"
        client = Client(server.url, models.records).until(lambda: ended(workspace))
    client.assert_nothing_failed()
    assert read_release_history(workspace)[-1]["status"] == "promoted"


@pytest.mark.slow
def test_a_bad_canary_is_rolled_back_by_many_callers_of_whom_none_counts_for_much(
    models: Models, workspace: Settings
) -> None:
    with serving(workspace, 2, "--trusted-proxy", "127.0.0.1") as server:
        start_release(workspace, BAD, "canary", (0.3,), ReleaseLimits(min_requests=100_000, **DESKS))
        fine = next(row for row, name in zip(models.records, models.carriers, strict=True) if name != CARRIER)
        attack(server.url, [{"record": fine}], 500)  # whoever wants to hide the fault
        Client(server.url, models.records).until(lambda: ended(workspace)).assert_nothing_failed()
    last = read_release_history(workspace)[-1]
    assert (last["status"], last["by"]) == ("rolled back", "guard")
    assert f"carrier={CARRIER}" in last["reason"]


def no_flapping(client: Client) -> dict[int, list[str]]:
    """A desk that has heard the candidate doesn't hear the stable version again, but for the second of a switch."""
    heard = client.of_row()
    for row, models_heard in heard.items():
        first = models_heard.index(GOOD) if GOOD in models_heard else len(models_heard)
        late = models_heard[first + 1 :].count(STABLE)
        assert late <= 1, f"desk {row} heard {models_heard}"
    return heard


@pytest.mark.slow
def test_while_the_release_can_not_be_read_the_stable_version_answers_everybody(
    models: Models, workspace: Settings
) -> None:
    start_release(workspace, GOOD, "canary", (0.5,), ReleaseLimits(min_requests=100_000, **FAST))
    path = workspace.serving / "flight-delay" / "release.json"
    sound = path.read_bytes()

    def heard() -> set[str]:
        bodies = [{"record": record} for record in models.records[:40]]
        return {client.post("/predict", json=body).json()["model"] for body in bodies}

    def warnings() -> list[str]:  # that nobody can ask by key here is another one
        return [each for each in client.get("/health/ready").json()["warnings"] if "requests by key" not in each]

    with serving(workspace) as server, httpx.Client(base_url=server.url) as client:
        wait_until(lambda: heard() == {STABLE, GOOD}, 15)
        path.write_bytes(sound[:100])
        wait_until(lambda: warnings() != [], 15)
        assert heard() == {STABLE}
        assert "release.json" in warnings()[0] and str(workspace.home) not in warnings()[0]
        path.write_bytes(sound)
        wait_until(lambda: warnings() == [], 15)
        assert heard() == {STABLE, GOOD}


@pytest.mark.slow
def test_a_release_survives_a_restart_and_keys_keep_their_version(models: Models, workspace: Settings) -> None:
    start_release(workspace, GOOD, "ab", (0.4,), ReleaseLimits(**FAST))
    heard, answered = [], []
    release = read_release(workspace)
    assert release is not None
    for _ in range(2):
        with serving(workspace) as server:
            before = read_counts(workspace, release.id).candidate.answered
            client = Client(server.url, models.records[:400])

            def enough(client: Client = client) -> bool:
                return len({row for _, row, _, _ in client.answers}) == 400

            client.until(enough).assert_nothing_failed()
        heard.append({row: set(found) for row, found in client.of_row().items()})
        answered.append((before, read_counts(workspace, release.id).candidate.answered, client))
    assert heard[0] == heard[1], "the same desk, the same version"
    assert {len(found) for found in heard[0].values()} == {1}, "of both workers, in both lives"
    share = np.mean([found == {GOOD} for found in heard[0].values()])
    assert 0.3 < share < 0.5
    assert answered[0][0] == 0
    assert answered[1][0] == answered[0][1] > 0, "what was counted before the restart counts"
    assert answered[1][1] > answered[1][0]
    assert read_release(workspace) == release


def test_without_a_key_requests_are_shared_by_chance_and_the_stable_version_stays_the_one_that_is_shown(
    models: Models, workspace: Settings
) -> None:
    start_release(workspace, GOOD, "ab", (0.5,), ReleaseLimits(**FAST))
    with serving(workspace, workers=1) as server, httpx.Client(base_url=server.url) as client:
        asked = {"record": models.records[0]}
        told = [client.post("/predict", json=asked).json()["model"] for _ in range(60)]
        shown = {client.get(path).json()[name] for path, name in (("/model", "reference"), ("/health/ready", "model"))}
        swaps = [
            line for line in client.get("/metrics").text.splitlines() if line.startswith("serving_model_swaps_total")
        ]
    assert set(told) == {STABLE, GOOD}
    assert shown == {STABLE}
    assert all(GOOD not in line for line in swaps), "a canary isn't a swap of the live model"


@pytest.mark.slow
def test_a_killed_worker_is_no_loss_even_if_it_was_the_guard(models: Models, workspace: Settings) -> None:
    with serving(workspace) as server:
        limits = ReleaseLimits(min_requests=100_000, **{**FAST, "slice_min_samples": 150})
        start_release(workspace, BAD, "canary", (0.5,), limits)
        release = read_release(workspace)
        assert release is not None
        client = Client(server.url, models.records)
        client.until(lambda: read_counts(workspace, release.id).candidate.answered > 50)
        before = read_counts(workspace, release.id)
        killed = server.workers()
        assert len(killed) == 2
        for worker in killed:  # one after the other, so both the guard and the other
            worker.kill()
            worker.wait(30)
            wait_until(lambda: len(server.workers()) == 2, 30)
            wait_until(lambda: ready(server.url), 30)
        after = read_counts(workspace, release.id)
        assert after.candidate.answered >= before.candidate.answered
        assert not ended(workspace), "too little was seen before"
        Client(server.url, models.records).until(lambda: ended(workspace)).assert_nothing_failed()
    assert f"carrier={CARRIER}" in read_release_history(workspace)[-1]["reason"]


@pytest.mark.slow
def test_blue_green_switches_all_at_once_and_back(models: Models, workspace: Settings, tmp_path: Path) -> None:
    def release(*arguments: str) -> dict[str, Any]:
        done = subprocess.run(
            [*COMMAND, "release", *arguments, "--home", str(workspace.home), "--json"], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    with serving(workspace) as server:
        shares = []
        for step in (
            lambda: None,
            lambda: release("start", GOOD, "--strategy", "blue-green", "--limit", "min_requests=99999"),
        ):
            step()
            time.sleep(2.5)
            client = Client(server.url, models.records[:200]).until(lambda: True, 5)
            client.assert_nothing_failed()
            shares.append({model for _, _, _, model in client.answers})
        back = release("rollback", "--reason", "only to see it")
        time.sleep(2.5)
        client = Client(server.url, models.records[:200]).until(lambda: True, 5)
        shares.append({model for _, _, _, model in client.answers})
    assert shares == [{STABLE}, {GOOD}, {STABLE}]
    assert back["release"]["status"] == "rolled back"
    assert back["counts"]["silent_stable"]["rows"] > 0, "the old version was compared silently meanwhile"
    assert [line["by"] for line in back["history"]] == ["person", "person"]


@pytest.mark.slow
def test_a_shadow_answers_nobody_and_is_found_out_all_the_same(models: Models, workspace: Settings) -> None:
    with serving(workspace) as server:
        start_release(workspace, BAD, "shadow", limits=ReleaseLimits(**FAST))
        client = Client(server.url, models.records).until(lambda: ended(workspace))
        metrics = httpx.get(f"{server.url}/metrics").text
    client.assert_nothing_failed()
    assert {model for _, _, _, model in client.answers} == {STABLE}
    assert f"carrier={CARRIER}" in read_release_history(workspace)[-1]["reason"]
    counts = release_status(workspace)["counts"]
    assert counts["candidate"]["answered"] == 0 < counts["silent_candidate"]["answered"]
    as_candidate = [line for line in metrics.splitlines() if f'model="{BAD}",role="candidate"' in line]
    assert [line for line in as_candidate if not line.endswith(" 0.0")] == []


@pytest.mark.slow
def test_a_candidate_that_cannot_be_loaded_is_rolled_back_and_nobody_notices(
    models: Models, workspace: Settings
) -> None:
    start_release(workspace, GOOD)
    graph = workspace.serving / "bundles" / GOOD / "model.onnx"
    graph.write_bytes(graph.read_bytes()[:-100])
    with serving(workspace) as server:
        client = Client(server.url, models.records).until(lambda: ended(workspace))
    client.assert_nothing_failed()
    assert {model for _, _, _, model in client.answers} == {STABLE}
    assert "can't be used" in read_release_history(workspace)[-1]["reason"]


# ---------------------------------------------------------------- by hand, without a service


def test_only_a_sound_bundle_with_the_same_features_is_released(models: Models, workspace: Settings) -> None:
    names = [*flight_delay.categorical, "distance"]
    frame = pd.DataFrame([{name: record[name] for name in names} for record in models.records])
    rows = frame.astype({"distance": "float32"}).assign(label=np.arange(len(frame)) % 2.0)
    model = train(rows, flight_delay, TrainingConfig(iterations=2))
    write_bundle(workspace, flight_delay, model, rows, "flight-delay@9", Origin(run_id="x", data={}, first="", last=""))
    with pytest.raises(ReleaseError, match=r"flight-delay@9 takes other features than flight-delay@1: \w+"):
        start_release(workspace, "flight-delay@9")
    with pytest.raises(ReleaseError, match="there is no strategy 'rolling'"):
        start_release(workspace, GOOD, "rolling")
    with pytest.raises(ReleaseError, match="flight-delay@1 has no column of categories named carriers, distance"):
        start_release(workspace, GOOD, limits=ReleaseLimits(slices=("carrier", "distance", "carriers")))
    assert read_release(workspace) is None


def test_a_person_promotes_and_takes_it_back(workspace: Settings) -> None:
    assert start_release(workspace, GOOD).limits.slices == ("origin", "carrier"), "written down, not guessed each time"
    with pytest.raises(ReleaseError, match="is being released since"):
        start_release(workspace, BAD)
    with pytest.raises(ReleaseError, match=r"is being released since .* End it first"):
        refuse_during_release(workspace)
    promote_release(workspace, "Friday evening")
    refuse_during_release(workspace)
    assert live_reference(workspace) == GOOD
    with pytest.raises(ReleaseError, match="is promoted"):
        promote_release(workspace, "again")
    roll_back_release(workspace, "Saturday morning")
    assert live_reference(workspace) == STABLE
    with pytest.raises(ReleaseError, match="nothing to roll back"):
        roll_back_release(workspace, "again")
    reasons = [line["reason"] for line in read_release_history(workspace)]
    assert reasons == ["asked for", "Friday evening", "Saturday morning"]
