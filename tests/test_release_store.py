"""Where workers meet: in a folder on one machine, in Redis among pods. Real files, a real server, real processes."""

import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import msgspec
import pytest
import redis
from redis_helpers import RedisServer
from service_helpers import FIRST, SECOND, Running, serving, until
from typer.testing import CliRunner

from mlops_course.cli import app
from mlops_course.deployment import (
    ReleaseError,
    ReleaseLimits,
    ReleaseModels,
    create_release,
    live_reference,
    read_counts,
    read_release,
    read_release_history,
    roll_back_release,
    start_release,
    update_release,
)
from mlops_course.deployment.leader import Leader, review_release
from mlops_course.deployment.release_files import agree_on_live, repeat_agreed_live, take_agreed_live
from mlops_course.deployment.release_store import refuse_lonely_pods, release_store
from mlops_course.environment import Settings
from mlops_course.serving import publish
from mlops_course.serving.models import LiveModels

pytestmark = pytest.mark.system
URL = "MLOPS_COURSE_GUARD_URL"
APP = ("--app", "mlops_course.deployment:release_app", "--limit", "rate=100000")
LIMITS = ReleaseLimits(
    shift=1, decision_flip_rate=1, slice_shift=1, slice_decision_flip_rate=1, latency=100, slow=1, rank_disagreement=1,
    spread_ratio=1000, warned_ratio=1000, caller_share=1, trust_records=True, hold_seconds=1, min_requests=300,
    min_samples=10, slices=("carrier",),
)  # fmt: skip


def guarded(home: Path, url: str | None) -> Settings:
    return Settings(home=home, guard_url=url)


def two_homes(home: Path, folder: Path) -> list[Path]:
    """Two workspaces that share nothing."""
    return [Path(shutil.copytree(home, folder / name)) for name in ("one", "two")]


@pytest.fixture(params=["folder", "redis"])
def url(request: pytest.FixtureRequest) -> str | None:
    """Where the workers meet; None: in a folder."""
    return str(request.getfixturevalue("redis_url")) if request.param == "redis" else None


# ---------------------------------------------------------------- the same in both places


def test_of_many_who_have_looked_at_one_revision_one_changes_it(home: Path, url: str | None) -> None:
    settings = guarded(home, url)
    release = create_release(settings, "canary", FIRST, SECOND)
    done: list[object] = []
    threads = [
        threading.Thread(target=lambda: done.append(update_release(settings, release, "me", "x", status="rolled back")))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(each is not None for each in done) == 1
    found = read_release(settings)
    assert found is not None and (found.revision, found.status) == (2, "rolled back")
    assert [line["revision"] for line in read_release_history(settings)] == [1, 2]


def test_who_has_slept_with_the_lock_in_its_hand_writes_nothing_over_a_later_revision(
    home: Path, url: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = guarded(home, url)
    release = create_release(settings, "canary", FIRST, SECOND)

    def fetch_slowly(*arguments: object) -> None:
        """Another one has got the lock meanwhile, because the lease of this one's has ended."""
        store = release_store(settings)
        assert store is not None
        later = msgspec.structs.replace(release, revision=2, status="rolled back", reason="the desks complain")
        store.write(msgspec.json.encode(later))

    monkeypatch.setattr("mlops_course.deployment.release_files.publish", fetch_slowly)
    with pytest.raises(ReleaseError, match="somebody has changed the release of flight-delay@2 meanwhile"):
        update_release(settings, release, "all limits held", live=SECOND, status="promoted")
    found = read_release(settings)
    assert found is not None and (found.status, found.reason) == ("rolled back", "the desks complain")


def test_from_the_moment_that_another_model_is_live_nobody_hears_of_the_release_before_it(home: Path) -> None:
    settings = guarded(home, None)
    start_release(settings, SECOND, "canary", (0.5,), LIMITS)
    models = ReleaseModels(settings)
    models.refresh()
    assert {models.choose(None).predictor.reference for _ in range(60)} == {FIRST, SECOND}
    publish(settings, SECOND)
    LiveModels.refresh(models)  # the first of the two things that a worker looks at
    assert {models.choose(None).predictor.reference for _ in range(60)} == {SECOND}


def test_one_leads_until_it_resigns(home: Path, url: str | None) -> None:
    settings, one, two = guarded(home, url), Leader(), Leader()
    assert [each.leads(settings) for each in (one, two, one, two)] == [True, False, True, False]
    one.resign()
    assert [each.leads(settings) for each in (two, one)] == [True, False]
    two.resign()


def test_a_damaged_release_is_never_overwritten_and_can_be_rolled_back(home: Path, url: str | None) -> None:
    settings = guarded(home, url)
    create_release(settings, "canary", FIRST, SECOND)
    store = release_store(settings)
    assert store is not None
    store.write(b'{"strategy": "canaries"}')
    with pytest.raises(ReleaseError, match=r"can't read .*release"):
        create_release(settings, "canary", FIRST, SECOND)
    assert roll_back_release(settings, "the desks complain").status == "rolled back"
    found = read_release(settings)
    assert found is not None and (found.status, live_reference(settings)) == ("rolled back", FIRST)


# ---------------------------------------------------------------- pods


def test_a_leader_that_is_silent_is_not_the_leader_any_more(
    home: Path, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlops_course.deployment.release_store._LEASE", 1)
    settings, one, two = guarded(home, redis_url), Leader(), Leader()
    assert [one.leads(settings), two.leads(settings)] == [True, False]
    until(lambda: two.leads(settings), 5)
    assert not one.leads(settings), "it comes back, and another one leads"


def test_without_the_server_nobody_leads_and_nothing_is_decided(home: Path, redis_url: str, tmp_path: Path) -> None:
    wrong = redis_url.replace("s3cret", "wr0ng")
    settings = guarded(home, wrong)
    assert not Leader().leads(settings)
    assert review_release(settings) is None
    with pytest.raises(ReleaseError, match=r"the workers can't meet in redis://…@127.0.0.1") as caught:
        start_release(settings, SECOND)
    assert "wr0ng" not in str(caught.value) and "MLOPS_COURSE_GUARD_URL" in str(caught.value)
    assert live_reference(guarded(home, None)) == FIRST


@pytest.mark.parametrize(
    "url",
    [
        "redis://:s3/cret@127.0.0.1:1/0", "redis://:s3#cret@127.0.0.1:1/0", "redis://:s3?cret@127.0.0.1:1/0",
        "redis://:s3@cret@127.0.0.1:1/0", "redis://127.0.0.1:1/0?password=s3cret",
        "redis://127.0.0.1:1/0?password=s3@cret", "redis://:s3[cret@127.0.0.1:1/0",
    ],
)  # fmt: skip
def test_no_address_shows_its_password_however_it_is_written(home: Path, url: str) -> None:
    with pytest.raises(ReleaseError, match=r"the workers can't meet in (redis://|…)") as caught:
        read_release(guarded(home, url))
    assert not re.search("s3|cret", str(caught.value)), str(caught.value)


def test_pods_that_cannot_meet_begin_no_release(home: Path, redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setattr("socket.gethostname", lambda: "mlops-course-5d8f7c9b6d-x2k4q")
    command = ["release", "start", SECOND, "--home", str(home)]
    refused = CliRunner().invoke(app, command)
    assert refused.exit_code == 1 and "MLOPS_COURSE_GUARD_URL" in refused.output
    assert read_release(guarded(home, None)) is None
    monkeypatch.setenv("MLOPS_COURSE_GUARD_URL", redis_url)
    assert CliRunner().invoke(app, command).exit_code == 0


@pytest.mark.parametrize(
    "name", ["jupyter-ann", "notebook-0", "jupyter-ann-2elee-2dsmith", "runner-set-8k2xv-runner-7mdqp"]
)
def test_a_pod_that_is_alone_is_a_machine_like_any_other(
    home: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    refuse_lonely_pods(guarded(home, None), name)


def test_a_new_pod_takes_what_all_serve_and_not_what_its_manifest_says(
    home: Path, redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLOPS_COURSE_GUARD_URL", redis_url)
    one, two = two_homes(home, tmp_path)
    pod = ["publish", FIRST, "--agreed", "--home", str(two)]
    assert CliRunner().invoke(app, pod).output == f"{FIRST} is live\n", "nothing has been agreed on"
    assert CliRunner().invoke(app, ["publish", SECOND, "--home", str(one)]).output == f"{SECOND} is live\n"
    assert CliRunner().invoke(app, pod).output == f"{SECOND} is live\n"
    assert live_reference(guarded(two, None)) == SECOND


def test_a_new_pod_starts_when_the_first_version_is_long_gone(
    home: Path, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLOPS_COURSE_GUARD_URL", redis_url)
    agree_on_live(Settings(home=home), SECOND)
    shutil.rmtree(home / "serving" / "bundles" / FIRST)
    done = CliRunner().invoke(app, ["publish", FIRST, "--agreed", "--home", str(home)])
    assert done.output == f"{SECOND} is live\n"


def test_a_workspace_that_serves_nobody_knows_what_the_pods_serve_and_can_take_it_back(
    home: Path, redis_url: str, tmp_path: Path
) -> None:
    pod, desk = (guarded(own, redis_url) for own in two_homes(home, tmp_path))
    release = start_release(desk, SECOND, "blue-green")
    assert update_release(pod, release, "all limits held", live=SECOND, status="promoted") is not None
    assert (live_reference(desk), live_reference(guarded(desk.home, None))) == (SECOND, FIRST)
    with pytest.raises(ReleaseError, match=f"{SECOND} is the live model already"):
        start_release(desk, SECOND)
    assert roll_back_release(desk, "the desks complain").status == "rolled back"
    assert take_agreed_live(pod) == FIRST


def test_a_leader_that_lags_behind_takes_its_own_old_model_for_nobodys(
    home: Path, redis_url: str, tmp_path: Path
) -> None:
    pod, behind = (guarded(own, redis_url) for own in two_homes(home, tmp_path))
    assert CliRunner().invoke(app, ["publish", SECOND, "--home", str(pod.home)], env={URL: redis_url}).exit_code == 0
    shutil.rmtree(behind.serving / "bundles" / SECOND)  # the one behind can't take it
    start_release(pod, FIRST)
    decision = review_release(behind)
    assert decision is not None and decision.action == "wait", "its own model is the candidate, and not all serve it"
    assert live_reference(behind) == SECOND


@pytest.mark.parametrize("found", [b"other@1", b"/tmp/bundle", b"\xff\xfe"])
def test_only_a_version_of_the_own_model_is_taken_from_the_server(home: Path, redis_url: str, found: bytes) -> None:
    settings = guarded(home, redis_url)
    redis.Redis.from_url(redis_url).set("release:flight-delay:live", found)
    with pytest.raises(ReleaseError, match="which isn't a version of flight-delay"):
        take_agreed_live(settings)
    agree_on_live(settings, FIRST)
    assert take_agreed_live(settings) is None and live_reference(settings) == FIRST


def test_a_server_that_has_lost_everything_hears_again_what_is_live_and_a_new_pod_takes_that(
    home: Path, redis_url: str, tmp_path: Path
) -> None:
    one, two = (guarded(own, redis_url) for own in two_homes(home, tmp_path))
    command = ["--home", str(one.home)]
    assert CliRunner().invoke(app, ["publish", SECOND, *command], env={URL: redis_url}).exit_code == 0
    redis.Redis.from_url(redis_url).flushdb()
    models = ReleaseModels(one)
    models.refresh()
    models.leader.resign()
    pod = ["publish", FIRST, "--agreed", "--home", str(two.home)]
    assert CliRunner().invoke(app, pod, env={URL: redis_url}).output == f"{SECOND} is live\n"
    repeat_agreed_live(guarded(home, redis_url))
    assert live_reference(one) == SECOND, "what is agreed on isn't changed"


@pytest.fixture
def pods(home: Path, redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Running]]:
    """Two services with two workers each, which share nothing but a server."""
    monkeypatch.setenv("MLOPS_COURSE_GUARD_URL", redis_url)
    with ExitStack() as stack:
        yield [stack.enter_context(serving(own, *APP, "--workers", "2")) for own in two_homes(home, tmp_path)]


def ask(running: Running, times: int = 20) -> set[str]:
    """Who answers."""
    record = running.client.get("/examples").json()[0]["record"]
    return {running.ask(record=record).raise_for_status().json()["model"] for _ in range(times)}


def live(running: Running) -> set[str]:
    """Who answers, by several looks: several workers answer."""
    return {running.client.get("/model").json()["model"] for _ in range(8)}


def all_serve(pods: list[Running], reference: str) -> None:
    """Wait until each pod answers with a version, and with no other."""
    until(lambda: all(live(each) == {reference} for each in pods))


def ask_until(running: list[Running], condition: object, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end, "it did not happen"
        for each in running:
            ask(each)


@pytest.mark.slow
def test_the_guard_decides_by_what_all_pods_have_counted_and_each_takes_the_new_model(
    pods: list[Running], redis_url: str
) -> None:
    settings = guarded(pods[0].settings.home, redis_url)
    release = start_release(settings, SECOND, "canary", (0.5,), LIMITS)
    ask_until(pods, lambda: read_release(settings).status == "promoted")  # type: ignore[union-attr]
    counts = read_counts(settings, release.id)
    assert counts.candidate.answered >= LIMITS.min_requests > 0
    assert [line["status"] for line in read_release_history(settings)] == ["running", "promoted"], "one has decided"
    all_serve(pods, SECOND)
    roll_back_release(settings, "the desks complain")
    all_serve(pods, FIRST)


@pytest.mark.slow
def test_a_pod_that_is_killed_takes_neither_its_counts_nor_the_guard_with_it(
    pods: list[Running], redis_url: str
) -> None:
    settings = guarded(pods[1].settings.home, redis_url)
    release = start_release(settings, SECOND, "canary", (0.5,), LIMITS)
    until(lambda: candidate_counted(settings, release.id, pods) > 20)
    before = read_counts(settings, release.id).candidate.answered
    os.killpg(pods[0].process.pid, signal.SIGKILL)
    ask_until(pods[1:], lambda: read_release(settings).status == "promoted")  # type: ignore[union-attr]
    assert read_counts(settings, release.id).candidate.answered > before
    all_serve(pods[1:], SECOND)


def candidate_counted(settings: Settings, release: str, pods: list[Running]) -> int:
    for each in pods:
        ask(each, 5)
    return read_counts(settings, release).candidate.answered


@pytest.mark.slow
def test_while_the_server_is_silent_the_stable_version_answers_and_then_it_goes_on(
    pods: list[Running], redis_server: RedisServer, redis_url: str
) -> None:
    settings = guarded(pods[0].settings.home, redis_url)
    start_release(settings, SECOND, "blue-green", None, LIMITS)
    until(lambda: SECOND in ask(pods[0], 1))
    redis_server.process.send_signal(signal.SIGSTOP)
    try:
        until(lambda: ask(pods[0], 1) == {FIRST}, 30)
        assert httpx.get(f"{pods[1].url}/health/ready").status_code == 200
    finally:
        redis_server.process.send_signal(signal.SIGCONT)
    ask_until(pods, lambda: read_release(settings).status == "promoted")  # type: ignore[union-attr]
    all_serve(pods, SECOND)
