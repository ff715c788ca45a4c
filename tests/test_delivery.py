"""The road to production: nobody gets past the gate and the approval, and whoever is interrupted goes on."""

import hashlib
import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import delivery_helpers
import pytest
from bundle_helpers import reseal
from conftest import Quarter
from delivery_helpers import FIRST, PROMOTE, SECOND, production
from service_helpers import Running, serving
from typer.testing import CliRunner

from mlops_course.commands import as_group
from mlops_course.commands.deliver import deliver_commands
from mlops_course.delivery import sign_off as sign_off_module
from mlops_course.delivery.delivering import SmokeTestError, deliver, try_service, undo_delivery
from mlops_course.delivery.gate import GateDecision
from mlops_course.delivery.report import REPORT_MARK
from mlops_course.delivery.sign_off import (
    SignOffError,
    approve,
    check_second_person,
    gate_report_file,
    require_sign_off,
    write_gate_report,
)
from mlops_course.deployment import ReleaseError, promote_release, roll_back_release, start_release
from mlops_course.deployment.rollout import AT_ONCE, RolloutPlan, roll_out, take_back
from mlops_course.environment import Settings
from mlops_course.experiments import TrainingConfig, train_run
from mlops_course.ledger import read_ledger
from mlops_course.project import flight_delay
from mlops_course.registry import PromotionConflict, RegistryError, register
from mlops_course.security.vouching import check_vouched, voucher
from mlops_course.serving import BundleError
from mlops_course.serving.bundle import find_bundle
from mlops_course.serving.publishing import for_case

SHADOW = RolloutPlan("shadow")


@pytest.fixture
def settings(two_versions: Path, tmp_path: Path) -> Settings:
    """A copy of that."""
    return Settings(home=shutil.copytree(two_versions, tmp_path / "workspace"))


class Terminal:
    """A shell in which somebody delivers."""

    def __init__(self, settings: Settings) -> None:
        self.home = str(settings.home)

    def __call__(self, *words: str) -> tuple[int, str]:
        done = CliRunner().invoke(as_group(deliver_commands), [*words, "--home", self.home])
        return done.exit_code, done.output + str(done.exception or "")


# ---------------------------------------------------------------- an approval is about contents


def test_an_approval_says_who_why_and_what(settings: Settings) -> None:
    line = require_sign_off(settings, SECOND)
    assert (line.event, line.subject, line.by, line.reason) == ("approve", SECOND, "eve", "I have read the report")
    assert sorted(line.after) == ["code", "data.features", "model", "report"]
    assert {len(digest or "") for digest in line.after.values()} == {64}


def change_report(settings: Settings) -> None:
    path = gate_report_file(settings, SECOND)
    path.write_bytes(path.read_bytes().replace(b"no guard", b"mo guard"))


def change_model(settings: Settings) -> None:
    folder = settings.serving / "bundles" / SECOND
    reseal(folder, question="Is it Monday?")


def change_data(settings: Settings) -> None:
    (file,) = (settings.data / "flight-delay" / "features").rglob("*.parquet")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("change", "named"), [(change_report, "report"), (change_model, "model"), (change_data, "data.features")]
)
def test_what_changes_after_the_approval_voids_it_and_is_named(
    settings: Settings, change: Callable[[Settings], None], named: str
) -> None:
    change(settings)
    with pytest.raises(SignOffError, match=rf"eve approved {SECOND} at 20.*, and since then changed: {named}\."):
        deliver(settings, flight_delay, SECOND, "better")
    assert production(settings) == (FIRST, FIRST)
    approve(settings, SECOND, "I have looked again", by="eve")
    deliver(settings, flight_delay, SECOND, "better")
    assert production(settings) == (SECOND, SECOND)


def test_one_byte_of_the_code_voids_it(settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = Path(str(sign_off_module.files("mlops_course")))
    copy = Path(shutil.copytree(code, tmp_path / "code", ignore=shutil.ignore_patterns("__pycache__", "nbs")))
    monkeypatch.setattr(sign_off_module, "files", lambda _: copy)
    require_sign_off(settings, SECOND)
    with (copy / "framing.py").open("ab") as file:
        file.write(b"\n")
    with pytest.raises(SignOffError, match=r"since then changed: code\."):
        require_sign_off(settings, SECOND)


def test_nobody_agrees_to_what_the_gate_has_rejected_or_has_not_seen(settings: Settings) -> None:
    write_gate_report(settings, SECOND, GateDecision("reject", "carrier=UA lost", ()), FIRST)
    with pytest.raises(SignOffError, match=rf"the gate has rejected {SECOND}: carrier=UA lost"):
        approve(settings, SECOND, "it is Friday")
    gate_report_file(settings, SECOND).unlink()
    with pytest.raises(SignOffError, match=f"the gate hasn't judged {SECOND}"):
        approve(settings, SECOND, "it is Friday")
    gate_report_file(settings, SECOND).write_text("{")
    with pytest.raises(SignOffError, match="isn't a report"):
        approve(settings, SECOND, "it is Friday")


def test_what_needs_a_person_can_be_agreed_to(settings: Settings) -> None:
    write_gate_report(settings, SECOND, GateDecision("needs a person", "in doubt: the ranking", ()), FIRST)
    approve(settings, SECOND, "the ranking of 19 h is right now, it was wrong before", by="eve")
    deliver(settings, flight_delay, SECOND, "better")
    assert production(settings) == (SECOND, SECOND)


# ---------------------------------------------------------------- there, and back


def test_a_delivery_is_done_once_however_often_it_is_asked_for(settings: Settings) -> None:
    assert deliver(settings, flight_delay, SECOND, "better", by="ann") == [
        f"{SECOND} is champion, after {FIRST}", f"{SECOND} is published",
    ]  # fmt: skip
    lines = len(read_ledger(settings))
    assert deliver(settings, flight_delay, SECOND, "better", by="ann") == []
    assert len(read_ledger(settings)) == lines
    promoted = [line for line in read_ledger(settings) if line.event == "promote"][-1]
    assert (promoted.by, promoted.approver) == ("ann", "eve")


def test_what_is_delivered_is_signed_before_anything_changes(settings: Settings) -> None:
    bundle = find_bundle(settings, SECOND)
    attest = voucher(flight_delay, "ann")
    done = roll_out(settings, flight_delay, SECOND, "better", SHADOW, "ann", attest=attest).done
    assert done == [f"{SECOND} is signed", f"shadow of {SECOND} began"]
    promote_release(for_case(settings, SECOND), "an hour without a complaint")
    done = roll_out(settings, flight_delay, SECOND, "better", SHADOW, "ann", attest=attest).done
    assert done == [f"{SECOND} is champion, after {FIRST}"] and check_vouched(settings, bundle)["by"] == "ann"
    assert undo_delivery(settings, flight_delay, "complaints", bad=SECOND, attest=attest) == FIRST
    assert check_vouched(settings, find_bundle(settings, FIRST))["signed"]


def test_what_was_changed_after_it_was_signed_is_not_delivered(settings: Settings) -> None:
    bundle, attest = find_bundle(settings, SECOND), voucher(flight_delay)
    assert attest(settings, bundle)
    (bundle / "sbom.cdx.json").write_bytes(b"{}")  # an approval is about model, data and code, so it still holds
    with pytest.raises(BundleError, match=r"sbom\.cdx\.json isn't what was signed"):
        deliver(settings, flight_delay, SECOND, "better", attest=attest)
    assert production(settings) == (FIRST, FIRST)


def test_a_comparison_with_another_champion_is_worth_nothing(settings: Settings) -> None:
    write_gate_report(settings, SECOND, PROMOTE, None)
    approve(settings, SECOND, "not read closely", by="eve")
    with pytest.raises(PromotionConflict, match=f"{FIRST} is champion, not nobody"):
        deliver(settings, flight_delay, SECOND, "better")
    assert production(settings) == (FIRST, FIRST)


def test_the_way_back_takes_the_approval_along(settings: Settings) -> None:
    deliver(settings, flight_delay, SECOND, "better")
    for _ in range(2):
        assert undo_delivery(settings, flight_delay, "complaints", bad=SECOND) == FIRST
        assert production(settings) == (FIRST, FIRST)
    with pytest.raises(SignOffError, match="or it was taken out since"):
        deliver(settings, flight_delay, SECOND, "better after all")
    with pytest.raises(RegistryError, match="no version was champion before"):
        undo_delivery(settings, flight_delay, "complaints again")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="fork is for Linux")
@pytest.mark.parametrize(("way", "changes"), [("there", 12), ("back", 12), ("step by step", 6)])
def test_whoever_is_killed_on_the_way_goes_on(
    two_versions: Path, tmp_path: Path, way: str, changes: int, stride: int
) -> None:
    command = [sys.executable, delivery_helpers.__file__, way, str(two_versions), str(tmp_path), str(stride)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) > changes, "lines of the ledger, MLflow's transactions, and what names the live model"


# ---------------------------------------------------------------- the running service is asked


def test_the_running_service_is_asked_for_golden_rows(settings: Settings) -> None:
    command = Terminal(settings)
    with serving(settings.home) as running:
        status, said = command("release", SECOND, "--reason", "better", "--url", running.url, "--json")
        assert (status, json.loads(said)["done"][-1]) == (0, f"{running.url} scores 5 golden rows as it should")
        assert running.client.get("/model").json()["model"] == SECOND
        status, said = command("rollback", SECOND, "--reason", "complaints", "--url", running.url)
        assert (status, said) == (0, f"{FIRST} is in production again\n")
        assert running.client.get("/model").json()["model"] == FIRST
        with pytest.raises(SmokeTestError, match=rf"answers with {FIRST}, not with {SECOND}, after 0.5 s"):
            try_service(running.url, settings.serving / "bundles" / SECOND, 0.5)
    with pytest.raises(SmokeTestError, match="doesn't answer"):
        try_service(running.url, settings.serving / "bundles" / FIRST)


# ---------------------------------------------------------------- a few requests first


def events(settings: Settings, subject: str) -> list[str]:
    return [line.event for line in read_ledger(settings) if line.subject == subject]


def test_a_canary_is_champion_only_after_it_was_promoted(settings: Settings) -> None:
    for began in (True, False):
        done, under_way = roll_out(settings, flight_delay, SECOND, "better", by="ann")
        assert len(done) == began
        assert under_way.startswith(f"canary of {SECOND}: 5% of the requests, step 1 of 2, since 20")
        assert production(settings) == (FIRST, FIRST)
    promote_release(settings, "an hour without a complaint")
    assert production(settings) == (FIRST, SECOND)
    promoted = [f"{SECOND} is champion, after {FIRST}"]
    assert roll_out(settings, flight_delay, SECOND, "better", by="ann") == (promoted, "")
    assert roll_out(settings, flight_delay, SECOND, "better", by="ann") == ([], "")
    assert production(settings) == (SECOND, SECOND)
    assert events(settings, SECOND) == ["register", "approve", "release", "publish", "promote"]


def test_whom_the_guard_has_rolled_back_needs_another_approval(settings: Settings) -> None:
    roll_out(settings, flight_delay, SECOND, "better", SHADOW)
    roll_back_release(settings, "complaints")
    with pytest.raises(ReleaseError, match=rf"{SECOND} was rolled back \(person: complaints\)"):
        roll_out(settings, flight_delay, SECOND, "better", SHADOW)
    with pytest.raises(SignOffError, match="or it was taken out since"):
        roll_out(settings, flight_delay, SECOND, "better", SHADOW)
    assert production(settings) == (FIRST, FIRST)
    approve(settings, SECOND, "the complaints were about the weather", by="eve")
    assert roll_out(settings, flight_delay, SECOND, "better", SHADOW).done == [f"shadow of {SECOND} began"]


def test_nothing_begins_without_an_approval_or_beside_another_release(settings: Settings) -> None:
    lines = len(read_ledger(settings))
    write_gate_report(settings, SECOND, PROMOTE, None)
    with pytest.raises(SignOffError, match=r"since then changed: report\."):
        roll_out(settings, flight_delay, SECOND, "better")
    approve(settings, SECOND, "not read closely", by="eve")
    with pytest.raises(PromotionConflict, match=f"{FIRST} is champion, not nobody"):
        roll_out(settings, flight_delay, SECOND, "better")
    assert (len(read_ledger(settings)), production(settings)) == (lines + 1, (FIRST, FIRST))
    write_gate_report(settings, SECOND, PROMOTE, FIRST)
    approve(settings, SECOND, "read closely", by="eve")
    for plan in (RolloutPlan("canry"), RolloutPlan("canary", (0.5, 0.1)), RolloutPlan("at once", (0.5,))):
        with pytest.raises(ReleaseError):
            roll_out(settings, flight_delay, SECOND, "better", plan)
    assert events(settings, SECOND)[-1] == "approve"
    start_release(settings, SECOND, "ab", reason="somebody else's")
    with pytest.raises(ReleaseError, match=f"{SECOND} is released by ab, not by canary"):
        roll_out(settings, flight_delay, SECOND, "better")


def test_nobody_gets_past_the_guard_by_leaving_out_the_strategy(settings: Settings) -> None:
    command = Terminal(settings)
    words = ["release", SECOND, "--reason", "better"]
    assert command(*words, "--strategy", "canary")[0] == 4
    assert command(*words)[0] == 4, "what has begun goes on as it has begun"
    assert production(settings) == (FIRST, FIRST)
    roll_back_release(settings, "complaints")
    status, said = command(*words)
    assert (status, "was rolled back (person: complaints)" in said) == (1, True)
    assert production(settings) == (FIRST, FIRST)


def test_who_approves_again_while_a_canary_runs_goes_on_with_it(settings: Settings) -> None:
    roll_out(settings, flight_delay, SECOND, "better")
    approve(settings, SECOND, "still fine", by="eve")
    done, under_way = roll_out(settings, flight_delay, SECOND, "better")
    assert (done, under_way[:6]) == ([], "canary")
    roll_back_release(settings, "complaints")
    with pytest.raises(ReleaseError, match="was rolled back"):
        roll_out(settings, flight_delay, SECOND, "better")


def test_a_damaged_live_model_is_no_reason_to_do_without_the_guard(settings: Settings) -> None:
    with (settings.serving / "bundles" / FIRST / "bundle.json").open("ab") as file:
        file.write(b" ")
    with pytest.raises(BundleError, match="is not the bundle that was published"):
        roll_out(settings, flight_delay, SECOND, "better")
    assert events(settings, SECOND)[-1] == "approve"


def test_what_is_being_released_is_taken_back_first(settings: Settings) -> None:
    command = Terminal(settings)
    for bad in (SECOND, "champion"):
        roll_out(settings, flight_delay, SECOND, "better")
        assert command("rollback", bad, "--reason", "complaints") == (0, f"{FIRST} is in production again\n")
        assert production(settings) == (FIRST, FIRST)
        assert events(settings, SECOND)[-1] == "withdraw"
        approve(settings, SECOND, "it was the weather", by="eve")


def test_an_approval_may_name_the_report_that_was_read(settings: Settings) -> None:
    read = hashlib.sha256(gate_report_file(settings, SECOND).read_bytes()).hexdigest()
    assert approve(settings, SECOND, "read", by="eve", seen=read).after["report"] == read
    write_gate_report(settings, SECOND, GateDecision("promote", "other months", ()), FIRST)
    with pytest.raises(SignOffError, match=rf"the report on {SECOND} was read as {read[:12]}…, and now it is"):
        approve(settings, SECOND, "read", by="eve", seen=read)


@pytest.mark.slow
def test_the_guard_of_a_running_service_lets_a_delivery_go_on(settings: Settings) -> None:
    limits = ["shift=1", "decision_flip_rate=1", "slice_shift=1", "slice_decision_flip_rate=1", "latency=100", "slow=1"]
    limits += ["hold_seconds=1", "min_requests=20", "min_samples=10", "slices=carrier"]
    limits += ["caller_share=1", "rank_disagreement=1"]  # one caller asks, for the same row again and again
    words = ["release", SECOND, "--reason", "better", "--strategy", "blue-green"]
    words += [word for limit in limits for word in ("--limit", limit)]
    command = Terminal(settings)
    with serving(settings.home, "--app", "mlops_course.deployment:release_app") as running:
        status, said = command(*words, "--url", running.url)
        assert (status, production(settings)) == (4, (FIRST, FIRST)), said
        assert "wait: 0 of 20 requests in this step" in said, "who stops waiting is told what is missing"
        asking = threading.Thread(target=ask_until_live, args=(running, settings))
        asking.start()
        status, said = command(*words, "--url", running.url, "--wait", "60")
        asking.join()
        assert (status, production(settings)) == (0, (SECOND, SECOND)), said
        assert f"{running.url} scores 5 golden rows as it should" in said


@pytest.mark.slow
@pytest.mark.system
def test_pods_that_share_no_folder_are_asked_after_they_were_told(
    settings: Settings, tmp_path: Path, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pod = Path(shutil.copytree(settings.home, tmp_path / "pod"))
    own, plan = settings.model_copy(update={"guard_url": redis_url}), RolloutPlan(AT_ONCE)
    monkeypatch.setenv("MLOPS_COURSE_GUARD_URL", redis_url)
    with serving(pod, "--app", "mlops_course.deployment:release_app") as running:
        done = roll_out(own, flight_delay, SECOND, "better", plan, url=running.url).done
        assert done[-1] == f"{running.url} scores 5 golden rows as it should"
        assert take_back(own, flight_delay, "complaints", url=running.url) == FIRST
        assert running.client.get("/model").json()["model"] == FIRST


def ask_until_live(running: Running, settings: Settings) -> None:
    """Clients who want to know something, until the candidate is live."""
    record = dict.fromkeys(flight_delay.categorical, "AA") | {"wind_speed": 12.0}
    end = time.monotonic() + 60
    while production(settings)[1] != SECOND and time.monotonic() < end:
        for _ in range(20):
            assert running.ask(record=record).status_code == 200
        time.sleep(0.05)


# ---------------------------------------------------------------- the whole road, with real flights


@pytest.mark.slow
def test_from_real_flights_to_production_by_commands_alone(own_quarter: Quarter) -> None:
    settings, command = own_quarter.settings, Terminal(own_quarter.settings)
    months = ["--first", "2013-02", "--last", "2013-03"]
    for iterations, reference in ((10, FIRST), (60, SECOND)):
        config = TrainingConfig(iterations=iterations, leaf_samples=50)
        run = train_run(settings, flight_delay, own_quarter.features, own_quarter.rows, "2013-01", "2013-01", config)
        assert register(settings, flight_delay, run, by="ann") == reference
        status, said = command("gate", reference, *months, "--json")
        assert (status, json.loads(said)["action"]) == (0, "promote"), said
        assert command("approve", reference, "--reason", "I have read it", "--by", "eve")[0] == 0
        assert command("release", reference, "--reason", "better", "--by", "ann")[0] == 0
        assert production(settings) == (reference, reference)
    status, said = command("gate", FIRST, *months)
    assert status == 1 and "reject" in said, "it was worse, and still is"
    status, said = command("report", SECOND)
    assert said.startswith(f"{REPORT_MARK}\n### {SECOND} against {FIRST}: promote\n")
    assert "| log loss against flight-delay@1 | -0.0" in said and "Slices: " in said
    with pytest.raises(SignOffError, match=f"the gate has rejected {FIRST}"):
        approve(settings, FIRST, "it is Friday")


# ---------------------------------------------------------------- four eyes


def test_where_two_persons_are_needed_nobody_approves_their_own(settings: Settings) -> None:
    strict = settings.model_copy(update={"four_eyes": True})
    with pytest.raises(SignOffError, match="ann has made"):
        approve(strict, SECOND, "mine is fine", by="ann")
    approve(settings, SECOND, "mine is fine", by="ann")
    assert require_sign_off(settings, SECOND).by == "ann", "without that policy it is allowed"
    with pytest.raises(SignOffError, match="ann has made"):
        deliver(strict, flight_delay, SECOND, "better", by="bob")
    approve(strict, SECOND, "I have looked at it", by="bob")
    with pytest.raises(SignOffError, match="or asks for it"):
        deliver(strict, flight_delay, SECOND, "better", by="bob")
    assert deliver(strict, flight_delay, SECOND, "better", by="ann")


def test_where_two_persons_are_needed_it_must_be_known_who_made_it(settings: Settings) -> None:
    strict = settings.model_copy(update={"four_eyes": True})
    with pytest.raises(SignOffError, match="nobody knows who made"):
        check_second_person(strict, "flight-delay@7", "eve")
