"""A workspace is a folder like any other: moved, copied or renamed it goes on, and what it was copied from stays."""

import hashlib
import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Quarter, settings_in

from mlops_course.environment import Settings, SettingsError, load_settings
from mlops_course.experiments import connect, find_tracked_run, load_run_model, quiet_mlflow, tracked_run, train_run
from mlops_course.experiments.model import TrainingConfig
from mlops_course.pipelines.cache import relativize, resolve
from mlops_course.pipelines.runs import list_runs
from mlops_course.project import flight_delay
from mlops_course.registry import champion_reference, fair_rivals, find_version, promote, register
from mlops_course.relocation import moved_address, old_roots, read_tracking, relocate, run_folders

NAMES = ["with a blank", "März (1) #2", "100%"]
SLICE = ["-p", "first=2013-01", "-p", "train_last=2013-01", "-p", "test_last=2013-02"]


def addresses(settings: Settings) -> list[str]:
    """Every text of MLflow's store that is an address of a file."""
    with sqlite3.connect(settings.home / "mlflow.db") as store:
        dump = [str(value) for line in store.iterdump() for value in line.split("'")]
    return [value for value in dump if value.startswith("file:")]


def content(folder: Path) -> dict[str, str]:
    """What each file below a folder holds. Locks are empty, and asking for one is not a change."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and "lock" not in path.name]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def trained(quarter: Quarter, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """A workspace with a champion."""
    mine = quarter.fresh(tmp_path_factory.mktemp("trained") / "workspace")
    config = TrainingConfig(iterations=5)
    run_id = train_run(mine.settings, flight_delay, mine.features, mine.rows, "2013-01", "2013-02", config)
    promote(mine.settings, flight_delay, register(mine.settings, flight_delay, run_id), "the first")
    return mine.settings


def copy_of(settings: Settings, home: Path) -> Settings:
    shutil.copytree(settings.home, home)
    return settings_in(home)


# ---------------------------------------------------------------- MLflow's store


@pytest.mark.parametrize("name", NAMES)
def test_a_copy_has_its_own_models_and_leaves_the_original_alone(trained: Settings, tmp_path: Path, name: str) -> None:
    before = content(trained.home)
    copy = copy_of(trained, tmp_path / name)
    run_id = str(find_version(copy, flight_delay, "champion").run_id)
    assert list(fair_rivals(copy, flight_delay, "2013-03")) == ["flight-delay@1"]
    with tracked_run(copy, flight_delay, "only here", {}) as run:
        quiet_mlflow().log_text("in the copy", "note.txt")
    assert (copy.artifacts / run.info.run_id / "artifacts" / "note.txt").read_text() == "in the copy"
    with quiet_mlflow().start_run(run_id=run_id):
        quiet_mlflow().log_text("about the old run", "second.txt")
    assert all(folder.is_relative_to(copy.artifacts) for folder in run_folders(copy, run_id))
    assert {address for address in addresses(copy) if not address.startswith(copy.artifacts.as_uri())} == set()
    assert content(trained.home) == before


@pytest.mark.parametrize("name", NAMES)
def test_a_moved_workspace_goes_on_and_does_not_come_back(trained: Settings, tmp_path: Path, name: str) -> None:
    first = copy_of(trained, tmp_path / "first")
    connect(first, flight_delay)
    moved = settings_in(first.home.rename(tmp_path / name))
    run_id = str(find_version(moved, flight_delay, "champion").run_id)
    assert load_run_model(moved, flight_delay, run_id)
    model = quiet_mlflow().artifacts.download_artifacts(artifact_uri="models:/flight-delay@champion")
    assert Path(model).is_relative_to(moved.artifacts)
    with tracked_run(moved, flight_delay, "after the move", {}):
        quiet_mlflow().log_text("here", "note.txt")
    assert not first.home.exists()


def test_a_stored_model_does_not_say_where_it_lies(trained: Settings) -> None:
    (about,) = trained.artifacts.rglob("MLmodel")
    assert "\nartifact_path: model\n" in f"\n{about.read_text(encoding='utf-8')}"
    assert "file:" not in about.read_text(encoding="utf-8")


def test_what_goes_to_no_experiment_of_ours_stays_in_the_workspace(settings: Settings) -> None:
    connect(settings, flight_delay)
    with read_tracking(settings) as ask:
        (row,) = ask("SELECT artifact_location FROM experiments WHERE name = 'Default'")
    assert row["artifact_location"] == f"{settings.artifacts.as_uri()}/0"


def test_looking_for_the_files_of_a_run_finds_them_after_a_move_and_writes_nothing(
    trained: Settings, tmp_path: Path
) -> None:
    copy = copy_of(trained, tmp_path / "copy")
    run_id = next(iter(trained.artifacts.glob("*/artifacts"))).parent.name
    before = (copy.home / "mlflow.db").read_bytes()
    folders = run_folders(copy, run_id)
    assert folders
    assert all(folder.is_dir() and folder.is_relative_to(copy.home) for folder in folders)
    assert (copy.home / "mlflow.db").read_bytes() == before


def test_the_repair_is_whole_and_done_once(trained: Settings, tmp_path: Path) -> None:
    copy = copy_of(trained, tmp_path / "copy")
    assert relocate(copy) == len(addresses(trained))
    assert relocate(copy) == 0
    assert relocate(trained) == 0


def test_a_link_to_a_workspace_is_the_workspace(trained: Settings, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(trained.home, target_is_directory=True)
    assert relocate(settings_in(link)) == 0
    assert champion_reference(settings_in(link), flight_delay) == "flight-delay@1"


def test_an_experiment_that_is_kept_elsewhere_stays_there(settings: Settings, tmp_path: Path) -> None:
    connect(settings, flight_delay)
    client = quiet_mlflow().MlflowClient(settings.tracking, settings.tracking)
    client.create_experiment("on another disk", artifact_location=(tmp_path / "disk").as_uri())
    moved = settings_in(settings.home.rename(tmp_path / "moved"))
    connect(moved, flight_delay)
    client = quiet_mlflow().MlflowClient(moved.tracking, moved.tracking)
    assert client.get_experiment_by_name("on another disk").artifact_location == (tmp_path / "disk").as_uri()
    assert client.get_experiment_by_name("flight-delay").artifact_location == moved.artifacts.as_uri()


def test_a_folder_of_the_same_name_that_is_no_workspaces_is_left_alone(settings: Settings, tmp_path: Path) -> None:
    connect(settings, flight_delay)
    team = tmp_path / "team" / "mlartifacts"
    team.mkdir(parents=True)
    client = quiet_mlflow().MlflowClient(settings.tracking, settings.tracking)
    client.create_experiment("on a shared disk", artifact_location=team.as_uri())
    client.create_experiment("in a bucket", artifact_location="s3://team/mlartifacts")
    assert relocate(settings) == 0


def test_a_shared_store_keeps_its_own_folders(trained: Settings, tmp_path: Path) -> None:
    store = shutil.copy(trained.home / "mlflow.db", tmp_path / "shared.db")
    shared = Settings(home=tmp_path / "workspace", tracking_uri=f"sqlite:///{store}").prepare()
    run_id = next(iter(trained.artifacts.glob("*/artifacts"))).parent.name
    assert all(folder.is_relative_to(trained.artifacts) for folder in run_folders(shared, run_id))


def test_a_result_that_is_a_path_in_the_workspace_moves_with_it(settings: Settings, tmp_path: Path) -> None:
    values = {"where": str(settings.home / "exports"), "text": "home:data", "deep": [{"a": str(settings.home)}], "n": 3}
    kept = relativize(settings, values)
    assert str(settings.home) not in json.dumps(kept)
    assert resolve(settings, kept) == values
    moved = settings_in(settings.home.rename(tmp_path / "moved"))
    assert resolve(moved, kept) == {
        "where": str(moved.home / "exports"),
        "text": "home:data",
        "deep": [{"a": str(moved.home)}],
        "n": 3,
    }


def test_a_store_outside_the_workspace_is_not_touched(trained: Settings, tmp_path: Path) -> None:
    store = shutil.copy(trained.home / "mlflow.db", tmp_path / "shared.db")
    shared = Settings(home=tmp_path / "workspace", tracking_uri=f"sqlite:///{store}").prepare()
    before = Path(store).read_bytes()
    assert relocate(shared) == 0
    assert Path(store).read_bytes() == before


def test_a_drive_is_a_part_of_the_address(settings: Settings) -> None:
    there, here = "file:///D:/old%20disk/mlartifacts", "file:///E:/workspace/mlartifacts"
    locations = [there, f"{there}/0", "s3://bucket/models", "mlflow-artifacts:/1", settings.artifacts.as_uri()]
    assert old_roots(locations, settings) == [there]
    assert moved_address(f"{there}/models/m-1/artifacts", [there], here) == f"{here}/models/m-1/artifacts"
    assert moved_address(there, [there], here) == here
    assert moved_address(f"{there}-of-others/1", [there], here) == f"{there}-of-others/1"


@pytest.mark.parametrize(("name", "found"), [("what?", "?"), ("50%25", "%25"), ("a [copy]", "["), ("a^b", "^")])
def test_a_folder_that_no_address_can_name_is_refused(tmp_path: Path, name: str, found: str) -> None:
    with pytest.raises(SettingsError, match=re.escape(f"should be a folder without {found} in its path")):
        load_settings(home=tmp_path / name)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- everything at once, as a user does it


TRUST = tempfile.TemporaryDirectory(prefix="trust-")
KEYS = {"MLOPS_COURSE_TRUST": TRUST.name}  # wherever a workspace goes, its keys stay where they are


def course(home: Path, *arguments: str) -> Any:
    """A command of the course in some workspace; what it prints as JSON."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MLOPS_COURSE_")}
    command = [sys.executable, "-c", "import mlops_course.cli as c; c.main()", *arguments, "--json"]
    where = {"cwd": home.parent, "env": {**kept, "MLOPS_COURSE_HOME": str(home), **KEYS}}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, **where)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def statuses(run: dict[str, Any]) -> set[str]:
    return {stage["status"] for stage in run["stages"]}


@pytest.fixture(scope="module")
def whole(quarter: Quarter, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with all that a training leaves behind, in which nothing is left to do."""
    home = tmp_path_factory.mktemp("whole") / "workspace"
    for _ in range(2):  # the second one compares with the champion of the first
        course(home, "run", "training", *SLICE, "-p", "iterations=5", "--source", str(quarter.source))
    return home


@pytest.fixture
def away(whole: Path) -> Iterator[Path]:
    """The original, at another place while the test runs."""
    yield whole.rename(whole.with_name("away"))
    whole.with_name("away").rename(whole)


@pytest.mark.slow
@pytest.mark.thorough
@pytest.mark.system
def test_a_moved_workspace_runs_nothing_again_and_scores_with_its_champion(
    away: Path, quarter: Quarter, tmp_path: Path
) -> None:
    moved, source = shutil.copytree(away, tmp_path / "März (1) moved"), ("--source", str(quarter.source))
    assert statuses(course(moved, "run", "training", *SLICE, "-p", "iterations=5", *source)) == {"cached"}
    scored = course(moved, "run", "scoring", "-p", "month=2013-03", *source)
    assert {stage["name"]: stage["results"] for stage in scored["stages"]}["score"]["model"] == "flight-delay@1"
    for run in list_runs(settings_in(moved)):
        assert Path(run["folder"]).is_dir()
        assert all(Path(stage["notebook"]).is_relative_to(moved) for stage in run["stages"])
    assert Path(list_runs(settings_in(moved))[-1]["stages"][-1]["results"]["report"]).is_relative_to(moved)
    assert not away.with_name("workspace").exists(), "nobody has made the old folder again"


@pytest.mark.slow
@pytest.mark.thorough
@pytest.mark.system
def test_a_copy_trains_packages_and_serves_without_a_byte_in_the_original(
    whole: Path, quarter: Quarter, tmp_path: Path
) -> None:
    before = content(whole)
    copy = shutil.copytree(whole, tmp_path / "a copy")
    again = course(copy, "run", "training", *SLICE, "-p", "iterations=8", "--source", str(quarter.source))
    assert {stage["name"]: stage["results"] for stage in again["stages"]}["register"]["model"] == "flight-delay@2"
    settings = settings_in(copy)
    run_id = str(find_version(settings, flight_delay, "flight-delay@2").run_id)
    assert find_tracked_run(settings, flight_delay, run_id).info.artifact_uri.startswith(settings.artifacts.as_uri())
    assert content(whole) == before
