"""External state: MLflow's registry read from its file, and functions of one's own."""

import os
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import settings_in

from mlops_course.environment import Settings
from mlops_course.experiments import quiet_mlflow
from mlops_course.pipelines.cache.states import StateError, read_states, registry_state, serving_state
from mlops_course.relocation import local_path, run_folders, tracking_file


@pytest.fixture
def store(settings: Settings, empty_store: Path) -> Settings:
    """A workspace with an empty MLflow store."""
    shutil.copy(empty_store, settings.home / "mlflow.db")
    return settings


def client(settings: Settings) -> object:
    return quiet_mlflow().MlflowClient(settings.tracking, settings.tracking)


def add_version(settings: Settings, name: str = "one") -> str:
    """A version of the model `late`."""
    from mlflow.exceptions import MlflowException

    try:
        client(settings).create_registered_model("late")
    except MlflowException as error:
        assert error.error_code == "RESOURCE_ALREADY_EXISTS"
    return str(client(settings).create_model_version("late", (settings.artifacts / name).as_uri()).version)


def test_no_store_is_the_same_as_an_empty_one(settings: Settings, empty_store: Path) -> None:
    before = registry_state(settings)
    assert not tracking_file(settings).exists(), "looking makes nothing"
    shutil.copy(empty_store, tracking_file(settings))
    assert registry_state(settings) == before is not None


def test_what_is_served_is_a_state_that_any_change_of_it_changes(settings: Settings) -> None:
    from mlops_course.serving import FeatureTable
    from mlops_course.serving.online import FileStore, RowLayout, features_path, write_file

    states = [serving_state(settings)]
    assert not settings.serving.exists(), "looking makes nothing"

    def changed() -> bool:
        states.append(serving_state(settings))
        assert states[-1] is not None
        return states[-1] not in states[:-1]

    live, manifest = settings.serving / "late" / "live.json", settings.serving / "bundles" / "late@1" / "bundle.json"
    manifest.parent.mkdir(parents=True)
    live.parent.mkdir()
    live.write_text('{"bundle": "late@1"}', encoding="utf-8")
    assert changed()
    manifest.write_text("{}", encoding="utf-8")
    assert changed()
    layout = RowLayout((("flight", "integer"),), ("speed",), ())
    for number_of_write, number in enumerate((1, 1, 2)):
        write_file(features_path(settings, "late"), "late", layout, {"2013-01": {"7": b"?"}}, f"features@{number}")
        assert changed() is (number_of_write != 1)
    with_reader = FeatureTable(FileStore(features_path(settings, "late")))
    assert not changed(), "whoever reads changes nothing"
    with_reader.close()
    live.unlink()
    assert changed()
    features_path(settings, "late").write_bytes(b"not a database" * 100)
    assert serving_state(settings) is None, "can't be known"
    assert serving_state(settings.model_copy(update={"features_url": "redis://server"})) is None


def test_everything_that_matters_changes_the_state(store: Settings) -> None:
    states = [registry_state(store)]

    def changed() -> bool:
        states.append(registry_state(store))
        return states[-1] not in states[:-1]

    add_version(store)
    assert changed()
    add_version(store, "two")
    assert changed()
    client(store).set_registered_model_alias("late", "champion", "1")
    assert changed()
    client(store).set_registered_model_alias("late", "champion", "2")
    assert changed()
    client(store).set_model_version_tag("late", "2", "approved", "yes")
    assert changed()
    client(store).set_registered_model_tag("late", "owner", "us")
    assert changed()


def test_what_does_not_matter_leaves_it(store: Settings) -> None:
    add_version(store)
    before = registry_state(store)
    client(store).update_registered_model("late", description="Late by more than 15 minutes?")
    client(store).update_model_version("late", "1", description="the first")
    client(store).set_model_version_tag("late", "1", "mlflow.note", "internal")
    assert registry_state(store) == before


def test_going_back_gives_the_state_of_before(store: Settings) -> None:
    add_version(store)
    client(store).set_registered_model_alias("late", "champion", "1")
    before = registry_state(store)
    version = add_version(store, "two")
    client(store).set_registered_model_alias("late", "champion", version)
    assert registry_state(store) != before
    client(store).set_registered_model_alias("late", "champion", "1")
    client(store).delete_model_version("late", version)
    assert registry_state(store) == before


def test_a_moved_workspace_has_the_same_state(store: Settings, tmp_path: Path) -> None:
    add_version(store)
    before = registry_state(store)
    moved = store.home.rename(tmp_path / "moved here")
    assert registry_state(settings_in(moved)) == before


@pytest.mark.parametrize(
    "uri", ["http://localhost:1", "postgresql://u:p@nowhere/db", "databricks", "file:///somewhere"]
)
def test_a_server_cannot_be_looked_into(tmp_path: Path, uri: str) -> None:
    settings = Settings(home=tmp_path, tracking_uri=uri)
    assert registry_state(settings) is None
    assert run_folders(settings, "any") == [], "its runs are trusted"


@pytest.mark.parametrize(
    "damage", [b"no database, but long enough to have a header", b"SQLite format 3\0" + b"\xff" * 4096]
)
def test_a_damaged_store_cannot_be_known(settings: Settings, damage: bytes) -> None:
    tracking_file(settings).write_bytes(damage)
    assert registry_state(settings) is None


def test_a_store_of_a_stranger_cannot_be_known(settings: Settings) -> None:
    with sqlite3.connect(tracking_file(settings)) as database:
        database.execute("CREATE TABLE registered_models (other TEXT)")
    assert registry_state(settings) is None


def test_looking_neither_writes_nor_waits_for_a_writer(store: Settings) -> None:
    add_version(store)
    path = tracking_file(store)
    before, stat = registry_state(store), path.stat()
    with sqlite3.connect(path, isolation_level=None) as writer:
        writer.execute("BEGIN IMMEDIATE")
        assert registry_state(store) == before
        writer.execute("ROLLBACK")
    assert (path.stat().st_mtime_ns, path.stat().st_size) == (stat.st_mtime_ns, stat.st_size)
    assert sorted(each.name for each in path.parent.glob("mlflow.db*")) == ["mlflow.db"]


def test_mlflow_is_not_imported_for_it(store: Settings) -> None:
    add_version(store)
    code = (
        "import sys\nfrom mlops_course.environment import load_settings\n"
        "from mlops_course.pipelines.cache.states import read_states\n"
        "print(read_states(load_settings(), ['registry']))\n"
        "print(sorted({'mlflow', 'sqlalchemy', 'pandas'} & set(sys.modules)))"
    )
    environment = os.environ | {"MLOPS_COURSE_HOME": str(store.home)}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert run.stdout.splitlines() == [str({"registry": registry_state(store)}), "[]"]


# ---------------------------------------------------------------- runs


def test_a_run_has_its_folders_until_it_is_deleted(store: Settings) -> None:
    experiment = client(store).create_experiment("late", artifact_location=store.artifacts.as_uri())
    run_id = client(store).create_run(experiment).info.run_id
    assert run_folders(store, run_id) == [store.artifacts / run_id / "artifacts"]
    assert run_folders(store, "no such run") is None
    client(store).delete_run(run_id)
    assert run_folders(store, run_id) is None
    client(store).restore_run(run_id)
    assert run_folders(store, run_id) == [store.artifacts / run_id / "artifacts"]


def test_where_artifacts_are(tmp_path: Path) -> None:
    strange = tmp_path / "with space & %41"
    assert local_path(strange.as_uri()) == strange
    assert local_path(str(tmp_path)) == tmp_path
    assert local_path("s3://bucket/key") is None


# ---------------------------------------------------------------- one's own


def test_a_function_of_ones_own_is_a_state(settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    code = "def rows(settings):\n    return str(len(settings.home.name))\n\ndef never(settings):\n    return None\n"
    (tmp_path / "my_states.py").write_text(code, encoding="utf-8")
    found = read_states(settings, ["my_states:rows", "my_states:never"], [tmp_path])
    assert found == {"my_states:rows": "9", "my_states:never": None}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("registri", "there is no state 'registri'"),
        ("no_such_module:f", "can't find the state no_such_module:f"),
        ("os:nothing", "can't find the state os:nothing"),
        ("os:sep", "isn.t a function"),
        ("os:getpid", "the state os:getpid failed"),
        ("builtins:id", "is [0-9]+"),
        ("os.path:", "there is no state"),
    ],
)
def test_a_state_that_cannot_be_asked_is_named(settings: Settings, name: str, message: str) -> None:
    with pytest.raises(StateError, match=message):
        read_states(settings, [name])
