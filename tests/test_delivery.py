"""The road to production: nobody gets past the gate and the approval, and whoever is interrupted goes on."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import delivery_helpers
import numpy as np
import pandas as pd
import pytest
from bundle_helpers import reseal
from conftest import settings_in
from delivery_helpers import FIRST, SECOND, production
from service_helpers import serving
from typer.testing import CliRunner

from mlops_course.commands import as_group
from mlops_course.commands.deliver import deliver_commands
from mlops_course.data import replace_months
from mlops_course.delivery import sign_off as sign_off_module
from mlops_course.delivery.delivering import SmokeTestError, deliver, try_service, undo_delivery
from mlops_course.delivery.gate import GateDecision
from mlops_course.delivery.sign_off import SignOffError, approve, gate_report_file, require_sign_off, write_gate_report
from mlops_course.environment import Settings
from mlops_course.experiments import TrainingConfig, connect, quiet_mlflow, train
from mlops_course.ledger import read_ledger
from mlops_course.project import flight_delay
from mlops_course.registry import PromotionConflict, RegistryError, register
from mlops_course.serving import Origin, write_bundle

PROMOTE = GateDecision("promote", "better, and no guard broken", ())


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> Path:
    """Two versions, packaged; the first one is delivered, the second one judged and approved."""
    settings = settings_in(tmp_path_factory.mktemp("template"))
    shutil.copy(empty_store, settings.home / "mlflow.db")
    draw = np.random.default_rng(2013)
    rows = pd.DataFrame({name: draw.choice(["AA", "UA"], 500) for name in flight_delay.categorical})
    rows["wind_speed"] = (draw.random(500) * 40).astype(np.float32)
    rows["label"] = (rows["wind_speed"] > 25).astype(float)
    features, _ = replace_months(settings, "flight-delay/features", rows.assign(period="2013-01"))
    experiment, client = connect(settings, flight_delay), quiet_mlflow().MlflowClient()
    for trees in (3, 5):
        about = {"model_digest": f"d{trees}", "first": "2013-01", "last": "2013-01", "model_uri": "s3://nowhere"}
        run = client.create_run(experiment, tags={**about, "data.features": features}).info.run_id
        reference = register(settings, flight_delay, run, by="ann")
        model = train(rows, flight_delay, TrainingConfig(iterations=trees, leaf_samples=50))
        origin = Origin(run_id=run, data={"features": features}, first="2013-01", last="2013-01")
        write_bundle(settings, flight_delay, model, rows, reference, origin)
    write_gate_report(settings, FIRST, PROMOTE, None)
    approve(settings, FIRST, "the first one", by="eve")
    deliver(settings, flight_delay, FIRST, "the first one", by="ann")
    write_gate_report(settings, SECOND, PROMOTE, FIRST)
    approve(settings, SECOND, "I have read the report", by="eve")
    return settings.home


@pytest.fixture
def settings(template: Path, tmp_path: Path) -> Settings:
    """A copy of that."""
    return Settings(home=shutil.copytree(template, tmp_path / "workspace"))


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


def test_one_byte_of_the_code_voids_it(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
@pytest.mark.parametrize("way", ["there", "back"])
def test_whoever_is_killed_on_the_way_goes_on(template: Path, tmp_path: Path, way: str) -> None:
    command = [sys.executable, delivery_helpers.__file__, way, str(template), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) > 12, "two lines, MLflow's transactions, and the file that names what is live"


# ---------------------------------------------------------------- the running service is asked


def test_the_running_service_is_asked_for_golden_rows(settings: Settings) -> None:
    run = CliRunner()

    def command(*words: str) -> tuple[int, str]:
        done = run.invoke(as_group(deliver_commands), [*words, "--home", str(settings.home)])
        return done.exit_code, done.output

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
