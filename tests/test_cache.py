"""The cache of stages: keys, entries, copies; real tables, real runs, real processes, real damage."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from conftest import settings_in
from deltalake import DeltaTable, write_deltalake
from msgspec import to_builtins
from msgspec.structs import replace

from mlops_course.environment import Settings
from mlops_course.experiments import quiet_mlflow
from mlops_course.pipelines.cache import (
    YOUNG_S,
    CacheEntry,
    CacheStore,
    Found,
    History,
    KeyInputError,
    Output,
    OutputError,
    StageKey,
    describe_output,
    explain,
    find_entry,
    keep_result,
    key_lock,
    list_entries,
    prune_entries,
    restore_entry,
    stage_key,
    verify_entries,
)
from mlops_course.pipelines.results import stage_folder

CODE = "from helper import double\nresult = double(rows)"

posix_only = pytest.mark.skipif(os.name == "nt", reason="permissions of POSIX")


def notebook_text(*cells: str, failed: bool = False) -> str:
    outputs = [{"output_type": "error", "ename": "E", "evalue": "", "traceback": []}] if failed else []
    code = [
        {"cell_type": "code", "source": cell, "metadata": {}, "outputs": outputs, "execution_count": None}
        for cell in cells
    ]
    return json.dumps({"cells": code, "metadata": {}, "nbformat": 4, "nbformat_minor": 4})


class Stage:
    """A stage with a helper module beside its notebook; it is "run" by copying the notebook."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        self.cache, self.folder = CacheStore(settings), folder
        self.notebook, self.helper = folder / "stage.ipynb", folder / "helper.py"
        folder.mkdir(parents=True, exist_ok=True)
        self.notebook.write_text(notebook_text(CODE), encoding="utf-8")
        self.helper.write_text("def double(x):\n    return 2 * x\n", encoding="utf-8")
        self.runs = 0

    def parts(self, **given: Any) -> StageKey:
        outputs = given.pop("outputs", {"answer": "value"})
        return stage_key(self.cache, self.notebook, [self.folder], outputs=outputs, **given)

    def run_folder(self) -> Path:
        self.runs += 1
        folder = self.cache.settings.runs / f"run-{self.runs}"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def store(self, parts: StageKey, text: str | None = None, modules: Any = (), **results: Any) -> Found:
        """Keep results; an Output stands for itself and records its value."""
        folder, results = self.run_folder(), results or {"answer": 42}
        executed = folder / "01_stage.ipynb"
        executed.write_text(text or self.notebook.read_text(encoding="utf-8"), encoding="utf-8")
        outputs = {}
        for name, kind in parts.inputs.outputs.items():
            value = results[name]
            own = stage_folder(folder, "stage")
            outputs[name] = value if isinstance(value, Output) else describe_output(self.cache, kind, value, own)
            results[name] = outputs[name].value
        return keep_result(self.cache, parts, "demo", "stage", results, outputs, executed, 1.5, modules)

    def lookup(self, parts: StageKey) -> Found:
        """In a new process there would be a new memo, too."""
        return find_entry(CacheStore(self.cache.settings), parts, "demo", "stage")


@pytest.fixture
def stage(settings: Settings, tmp_path: Path) -> Stage:
    return Stage(settings, tmp_path / "project")


def write_table(settings: Settings, name: str, rows: dict[str, list[Any]], **options: Any) -> str:
    location = str(settings.data / name)
    write_deltalake(location, pyarrow.table(rows), mode="overwrite", **options)
    return f"{name}@{DeltaTable(location).version()}"


# ---------------------------------------------------------------- keys and explanations


def test_what_was_kept_is_found(stage: Stage) -> None:
    parts = stage.parts(parameters={"rows": 21}, seed=1)
    assert stage.lookup(parts) == Found(None, ["never run before"])
    kept = stage.store(parts)
    found = stage.lookup(stage.parts(parameters={"rows": 21}, seed=1))
    assert kept.reasons == found.reasons == []
    assert found.entry is not None
    assert (found.entry.results, found.entry.seconds, found.entry.stage) == ({"answer": 42}, 1.5, "stage")
    assert found.entry == kept.entry


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"parameters": {"rows": 22}}, "parameter rows changed (21 -> 22)"),
        ({"parameters": {"rows": 21.0}}, "parameter rows changed (21 -> 21.0)"),
        ({"parameters": {"rows": "21"}}, "parameter rows changed (int 21 -> str 21)"),
        ({"parameters": {"rows": None}}, "parameter rows changed (21 -> none)"),
        ({"parameters": {"rows": 21, "more": [1, {"a": True}]}}, "parameter more changed (nothing -> [1, {a: True}])"),
        ({"seed": 2}, "the seed changed (1 -> 2)"),
        ({"environment": {"REGION": "eu"}}, "environment variable REGION changed"),
        ({"outputs": {"answer": "file"}}, "output answer is declared differently (value -> file)"),
        ({"inputs": {"features": Output("value", 1, "abc")}}, "input features changed"),
        ({"reads": ["registry"]}, "the registry changed"),
    ],
)
def test_each_change_is_a_miss_with_its_reason(stage: Stage, change: dict[str, Any], reason: str) -> None:
    usual: dict[str, Any] = {"parameters": {"rows": 21}, "seed": 1}
    stage.store(stage.parts(**usual))
    assert stage.lookup(stage.parts(**(usual | change))) == Found(None, [reason])
    assert stage.lookup(stage.parts(**usual)), "and back again it is found"


def test_code_packages_and_python_are_explained(stage: Stage) -> None:
    old = stage.parts().inputs
    stage.helper.write_text("def double(x):\n    return x + x\n", encoding="utf-8")
    stage.notebook.write_text(notebook_text(CODE + "  # now"), encoding="utf-8")
    new = replace(
        stage.parts().inputs,
        packages=old.packages | {"pandas": "99.1 abc", "new-one": "1.0 x", "numpy": old.packages["numpy"] + "x"},
        python="CPython 4",
    )
    new.packages.pop("pyarrow")
    numpy, pandas = (old.packages[name].split()[0] for name in ("numpy", "pandas"))
    assert explain(old, new) == [
        "the notebook changed",
        "helper changed",
        "new-one 1.0 was installed",
        f"numpy {numpy} was installed again, with other files",
        f"pandas {pandas} -> 99.1",
        f"pyarrow {old.packages['pyarrow'].split()[0]} was removed",
        f"Python: {old.python} -> CPython 4",
    ]
    assert explain(None, new) == ["never run before"]
    assert explain(new, new) == []


def test_a_miss_is_explained_by_the_nearest_run(stage: Stage) -> None:
    for month in range(1, 6):
        stage.store(stage.parts(parameters={"month": f"2013-{month:02d}"}))
    stage.helper.write_text("double = abs\n", encoding="utf-8")
    assert stage.lookup(stage.parts(parameters={"month": "2013-02"})).reasons == ["helper changed"]


def test_what_is_no_key_is_refused(stage: Stage) -> None:
    with pytest.raises(KeyInputError, match="of type object"):
        stage.parts(parameters={"rows": object()})


def test_a_state_that_cannot_be_known_means_running_each_time(settings: Settings, tmp_path: Path) -> None:
    far = Stage(settings.model_copy(update={"tracking_uri": "http://localhost:1"}), tmp_path / "project")
    parts = far.parts(reads=["registry"])
    assert not far.store(parts)
    assert far.lookup(parts).reasons == ["the registry can't be looked into, so it runs each time"]


def test_another_store_of_runs_is_another_key(stage: Stage) -> None:
    far = stage.cache.settings.model_copy(update={"tracking_uri": "http://localhost:1"})
    assert (
        stage_key(CacheStore(far), stage.notebook, [stage.folder]).key
        != stage_key(CacheStore(stage.cache.settings), stage.notebook).key
    )


# ---------------------------------------------------------------- nothing depends on a place


def test_a_moved_workspace_and_a_moved_project_keep_their_hits(settings: Settings, tmp_path: Path) -> None:
    old = Stage(settings, tmp_path / "project")
    reference = write_table(settings, "rows", {"x": [1, 2]})
    (settings.home / "reports").mkdir()
    (settings.home / "reports" / "page.html").write_text("<p>", encoding="utf-8")
    outputs = {"rows": "table", "page": "file"}

    def parts(stage: Stage) -> StageKey:
        home = stage.cache.settings.home
        return stage.parts(parameters={"source": str(home / "data"), "file": stage.helper}, outputs=outputs, seed=1)

    kept = old.store(parts(old), rows=reference, page=str(settings.home / "reports" / "page.html"))
    assert kept, kept.reasons
    settings.home.rename(tmp_path / "elsewhere")
    shutil.copytree(old.folder, tmp_path / "clone")
    shutil.rmtree(old.folder)
    new = Stage(settings_in(tmp_path / "elsewhere"), tmp_path / "clone")
    found = new.lookup(parts(new))
    assert found.entry is not None, found.reasons
    restored = restore_entry(new.cache, found.entry, new.run_folder() / "01.ipynb")
    assert restored.results["page"] == str(tmp_path / "elsewhere" / "reports" / "page.html")
    assert str(tmp_path) not in json.dumps(to_builtins(parts(new).inputs))


# ---------------------------------------------------------------- tables


def test_equal_rows_written_again_are_the_same_content(settings: Settings) -> None:
    cache, rows = CacheStore(settings), {"month": ["a", "a", "b"], "x": [1.5, None, -0.0]}
    first = describe_output(cache, "table", write_table(settings, "t", rows, partition_by=["month"]))
    second = describe_output(cache, "table", write_table(settings, "t", rows, partition_by=["month"]))
    other = describe_output(cache, "table", write_table(settings, "other", rows, partition_by=["month"]))
    assert (first.value, second.value, other.value) == ("t@0", "t@1", "other@0")
    assert first.content == second.content == other.content
    assert {name for name, *_ in first.files}.isdisjoint({name for name, *_ in second.files if "parquet" in name})
    assert describe_output(cache, "table", "t@0") == first, "an old version stays what it was"


@pytest.mark.parametrize(
    "rows",
    [
        {"month": ["a", "a", "b"], "x": [1, 2, 4]},
        {"month": ["a", "b", "b"], "x": [1, 2, 3]},
        {"month": ["a", "a", "b"], "y": [1, 2, 3]},
        {"month": ["a", "a", "b"], "x": [1.0, 2.0, 3.0]},
        {"month": ["a", "a", "b"], "x": [1, 2, 3], "z": [None, None, 1]},
    ],
)
def test_other_rows_names_or_types_are_another_content(settings: Settings, rows: dict[str, list[Any]]) -> None:
    cache = CacheStore(settings)
    first = describe_output(
        cache, "table", write_table(settings, "a", {"month": ["a", "a", "b"], "x": [1, 2, 3]}, partition_by=["month"])
    )
    assert (
        describe_output(cache, "table", write_table(settings, "b", rows, partition_by=["month"])).content
        != first.content
    )


def test_partitions_count(settings: Settings) -> None:
    """The same bytes in each file, but filed under other months."""
    cache = CacheStore(settings)
    for name, months in (("a", ["x", "y"]), ("b", ["x", "z"])):
        write_table(settings, name, {"month": months, "n": [1, 2]}, partition_by=["month"])
    assert describe_output(cache, "table", "a@0").content != describe_output(cache, "table", "b@0").content


def test_many_tables_are_described_together(settings: Settings) -> None:
    cache = CacheStore(settings)
    a, b = write_table(settings, "a", {"x": [1]}), write_table(settings, "b", {"x": [2]})
    both = describe_output(cache, "table", {"one": a, "two": [b]})
    assert both.content == describe_output(cache, "table", {"two": [b], "one": a}).content
    assert both.content != describe_output(cache, "table", {"one": b, "two": [a]}).content
    assert len(both.files) == 4, "two logs and two data files"


def test_a_table_with_a_checkpoint_and_a_tidied_log_is_described(settings: Settings) -> None:
    cache = CacheStore(settings)
    for number in range(4):
        write_table(settings, "t", {"x": [number]})
    before = describe_output(cache, "table", "t@3")
    DeltaTable(str(settings.data / "t")).create_checkpoint()
    for number in range(3):
        (settings.data / "t" / "_delta_log" / f"{number:020d}.json").unlink()
    after = describe_output(cache, "table", "t@3")
    assert after.content == before.content
    assert any("checkpoint" in name for name, *_ in after.files)


def test_a_table_can_lie_below_the_name_of_its_use_case(settings: Settings) -> None:
    cache = CacheStore(settings)
    write_table(settings, "features", {"x": [1]})
    reference = write_table(settings, "flight-delay/features", {"x": [2]})
    found = describe_output(cache, "table", {"all": [reference]})
    assert found.content != describe_output(cache, "table", {"all": ["features@0"]}).content
    assert all(name.startswith("home:data/flight-delay/features/") for name, _, _ in found.files)


def test_strange_partition_names_are_found(settings: Settings) -> None:
    reference = write_table(settings, "t", {"p": ["a/b c%20", "ü=1"], "x": [1, 2]}, partition_by=["p"])
    assert len(describe_output(CacheStore(settings), "table", reference).files) == 3


NO_VERSIONS = ["t@7", "nothing@0", "t", "t@latest", "../t@0", None, 3, ["t@9"], "t@-1"]
NO_VERSIONS += ["a/../t@0", "a/../../data/t@0", "/t@0", "a//t@0", "a/@0", "./t@0", "a\\t@0", "a/t@0@1"]


@pytest.mark.parametrize("value", NO_VERSIONS)
def test_what_is_no_version_is_refused(settings: Settings, value: Any) -> None:
    write_table(settings, "t", {"x": [1]})
    write_table(settings, "a/t", {"x": [1]})
    with pytest.raises(OutputError):
        describe_output(CacheStore(settings), "table", value)


@pytest.mark.parametrize("damage", ["data gone", "data changed", "log gone", "all gone", "made anew"])
def test_a_table_that_is_not_what_it_was_is_a_miss(stage: Stage, damage: str) -> None:
    settings = stage.cache.settings
    parts = stage.parts(outputs={"rows": "table"})
    assert stage.store(parts, rows=write_table(settings, "t", {"x": [1, 2]}))
    table = settings.data / "t"
    data = next(table.glob("*.parquet"))
    if damage == "data gone":
        data.unlink()
    elif damage == "data changed":
        content, before = bytearray(data.read_bytes()), data.stat()
        content[20] ^= 1
        data.write_bytes(content)
        os.utime(data, ns=(before.st_atime_ns, before.st_mtime_ns))
    elif damage == "log gone":
        (table / "_delta_log" / f"{0:020d}.json").unlink()
    else:
        shutil.rmtree(table)
        _ = damage == "made anew" and write_table(settings, "t", {"x": [1, 2]})
    found = stage.lookup(parts)
    assert found.entry is None
    assert found.reasons[0].startswith("output rows: ")
    assert found.reasons[0].endswith("is gone" if "gone" in damage else "was changed")


def test_a_newer_version_does_not_disturb_an_older(stage: Stage) -> None:
    parts = stage.parts(outputs={"rows": "table"})
    stage.store(parts, rows=write_table(stage.cache.settings, "t", {"x": [1, 2]}))
    write_table(stage.cache.settings, "t", {"x": [3]})
    assert stage.lookup(parts)


def test_an_equal_output_stops_the_wave(stage: Stage) -> None:
    """A new version of a table with the same content gives the next stage the same key."""
    keys = []
    for rows in ([1, 2], [1, 2], [1, 3]):
        features = describe_output(stage.cache, "table", write_table(stage.cache.settings, "t", {"x": rows}))
        keys.append(stage.parts(inputs={"features": features}).key)
    assert keys[0] == keys[1] != keys[2]


# ---------------------------------------------------------------- runs


@pytest.fixture
def run_id(settings: Settings, empty_store: Path) -> str:
    """A real run with an artifact."""
    shutil.copy(empty_store, settings.home / "mlflow.db")
    client = quiet_mlflow().MlflowClient(settings.tracking, settings.tracking)
    experiment = client.create_experiment("late", artifact_location=settings.artifacts.as_uri())
    run = client.create_run(experiment)
    client.log_text(run.info.run_id, "weights", "model/weights.txt")
    client.set_terminated(run.info.run_id)
    return str(run.info.run_id)


def test_a_run_is_found_until_it_or_its_files_are_gone(stage: Stage, run_id: str) -> None:
    settings, parts = stage.cache.settings, stage.parts(outputs={"run_id": "run"})
    client = quiet_mlflow().MlflowClient(settings.tracking, settings.tracking)
    kept = stage.store(parts, run_id=run_id)
    assert kept.entry is not None, kept.reasons
    assert len(kept.entry.outputs["run_id"].files) == 1
    client.log_text(run_id, "later", "evaluation.txt")
    client.log_metric(run_id, "loss", 0.4)
    assert stage.lookup(parts), "more in the run is no harm"
    client.delete_run(run_id)
    assert stage.lookup(parts).reasons == [f"output run_id: the run {run_id} is gone from MLflow"]
    client.restore_run(run_id)
    next(settings.artifacts.rglob("weights.txt")).write_text("WEIGHTS", encoding="utf-8")
    assert stage.lookup(parts).reasons == ["output run_id: weights.txt was changed"]
    shutil.rmtree(settings.artifacts)
    assert stage.lookup(parts).reasons == ["output run_id: weights.txt is gone"]


def test_no_run_is_refused(stage: Stage, run_id: str) -> None:
    with pytest.raises(OutputError, match="there is no run 'other'"):
        describe_output(stage.cache, "run", "other")


def test_a_damaged_store_is_a_miss(stage: Stage, run_id: str) -> None:
    parts = stage.parts(outputs={"run_id": "run"})
    stage.store(parts, run_id=run_id)
    (stage.cache.settings.home / "mlflow.db").write_bytes(b"damaged" * 1000)
    assert stage.lookup(parts).entry is None


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("how", ["relative", "in its own folder", "in the run's folder", "in the workspace", "outside"])
@pytest.mark.parametrize("what", ["file", "folder"])
@pytest.mark.parametrize("then", ["gone", "changed", "there"])
def test_files_are_put_back(stage: Stage, tmp_path: Path, how: str, what: str, then: str) -> None:
    first = stage.cache.settings.runs / "run-1"
    own = stage_folder(first, "stage")
    base = {"relative": own, "in its own folder": own, "in the run's folder": first}
    base["in the workspace"] = stage.cache.settings.home
    path = base.get(how, tmp_path / "outside") / "out" / "report ü.html"
    inner = path / "deep" / "page.html" if what == "folder" else path
    inner.parent.mkdir(parents=True)
    inner.write_text("<p>first</p>", encoding="utf-8")
    parts = stage.parts(outputs={"report": "file"})
    kept = stage.store(parts, report="out/report ü.html" if how == "relative" else str(path))
    assert kept, kept.reasons
    if then == "gone":
        shutil.rmtree(path.parent)
    elif then == "changed":
        inner.write_text("<p>other</p>", encoding="utf-8")
    found = stage.lookup(parts)
    assert found.entry is not None, found.reasons
    second = stage.run_folder()
    entry = restore_entry(stage.cache, found.entry, second / "01_stage.ipynb")
    moved = stage_folder(second, "stage")
    folders = {"in the run's folder": second, "relative": moved, "in its own folder": moved}
    place = folders[how] / "out" / "report ü.html" if how in folders else path
    assert entry.results["report"] == ("out/report ü.html" if how == "relative" else str(place))
    page = place / "deep" / "page.html" if what == "folder" else place
    assert page.read_text(encoding="utf-8") == "<p>first</p>"
    page.write_text("it can be written", encoding="utf-8")
    assert stage.lookup(parts), "and that does not touch the copy"
    assert (second / "01_stage.ipynb").read_bytes() == (first / "01_stage.ipynb").read_bytes()


def put_back(stage: Stage, parts: StageKey, run: Path) -> CacheEntry:
    """The entry as another process finds it, put into a run's folder."""
    found = stage.lookup(parts)
    assert found.entry is not None, found.reasons
    return restore_entry(stage.cache, found.entry, run / "01_stage.ipynb")


@posix_only
@pytest.mark.parametrize("mode", [0o755, 0o700, 0o600, 0o444, 0o664, 0o640])
@pytest.mark.parametrize("what", ["file", "folder"])
def test_permissions_are_put_back(stage: Stage, mode: int, what: str) -> None:
    own = stage_folder(stage.cache.settings.runs / "run-1", "stage")
    inner = own / "out" / "tool" if what == "folder" else own / "out"
    inner.parent.mkdir(parents=True)
    inner.write_text("#!/bin/sh\necho ran\n", encoding="utf-8")
    inner.chmod(mode)
    parts = stage.parts(outputs={"out": "file"})
    assert stage.store(parts, out="out")
    second = stage.run_folder()
    entry = put_back(stage, parts, second)
    restored = second / inner.relative_to(own.parent.parent)
    assert restored.stat().st_mode & 0o777 == mode
    if mode & 0o100:
        assert subprocess.run([restored], capture_output=True, text=True, check=True).stdout == "ran\n"
    assert verify_entries(stage.cache) == []
    assert (
        describe_output(stage.cache, "file", "out", stage_folder(second, "stage")).content
        == entry.outputs["out"].content
    )


@posix_only
def test_an_executable_file_is_another_content_and_other_permissions_are_not(stage: Stage, tmp_path: Path) -> None:
    tool = tmp_path / "tool"
    tool.touch()
    contents = {}
    for mode in (0o644, 0o600, 0o664, 0o755, 0o700):
        tool.chmod(mode)
        contents[mode] = describe_output(stage.cache, "file", str(tool)).content
    assert contents[0o644] == contents[0o600] == contents[0o664] != contents[0o755] == contents[0o700]


@pytest.mark.parametrize("what", ["file", "folder"])
@pytest.mark.parametrize("where", ["beside it", "absolute, beside it", "elsewhere"])
def test_a_linked_output_is_put_back(stage: Stage, tmp_path: Path, what: str, where: str) -> None:
    own = stage_folder(stage.cache.settings.runs / "run-1", "stage")
    target = (tmp_path if where == "elsewhere" else own) / "models" / "v7"
    inner = target / "model.txt" if what == "folder" else target
    inner.parent.mkdir(parents=True)
    inner.write_text("seven", encoding="utf-8")
    own.mkdir(parents=True, exist_ok=True)
    (own / "latest").symlink_to("models/v7" if where == "beside it" else target, target_is_directory=what == "folder")
    parts = stage.parts(outputs={"model": "file"})
    assert stage.store(parts, model="latest")
    shutil.rmtree(own)
    shutil.rmtree(tmp_path / "models", ignore_errors=True)
    second = stage.run_folder()
    entry = put_back(stage, parts, second)
    latest = stage_folder(second, "stage") / "latest"
    assert Path(entry.outputs["model"].blob) == latest
    assert (latest / "model.txt" if what == "folder" else latest).read_text(encoding="utf-8") == "seven"
    assert latest.is_symlink() == (where != "elsewhere")
    if latest.is_symlink():
        assert latest.resolve() == (stage_folder(second, "stage") / "models" / "v7").resolve()
    put_back(stage, parts, second)  # once more, over what is there
    shutil.rmtree(stage_folder(second, "stage") / "models", ignore_errors=True)  # now the link leads nowhere
    put_back(stage, parts, second)
    assert (latest / "model.txt" if what == "folder" else latest).read_text(encoding="utf-8") == "seven"


def test_links_inside_a_folder_are_put_back(stage: Stage, tmp_path: Path) -> None:
    own = stage_folder(stage.cache.settings.runs / "run-1", "stage")
    (own / "out" / "v1").mkdir(parents=True)
    (own / "out" / "v1" / "a.txt").write_text("a", encoding="utf-8")
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "b.txt").write_text("b", encoding="utf-8")
    (own / "out" / "latest").symlink_to(own / "out" / "v1", target_is_directory=True)
    (own / "out" / "a.txt").symlink_to("v1/a.txt")
    (own / "out" / "shared").symlink_to(tmp_path / "shared", target_is_directory=True)
    (own / "out" / "nothing").symlink_to("gone")
    parts = stage.parts(outputs={"out": "file"})
    assert stage.store(parts, out="out")
    shutil.rmtree(own)
    shutil.rmtree(tmp_path / "shared")
    second = stage.run_folder()
    put_back(stage, parts, second)
    out = stage_folder(second, "stage") / "out"
    assert [(out / name).readlink().as_posix() for name in ("latest", "a.txt", "nothing")] == ["v1", "v1/a.txt", "gone"]
    assert (out / "latest" / "a.txt").read_text(encoding="utf-8") == "a"
    assert (out / "shared" / "b.txt").read_text(encoding="utf-8") == "b"


def test_a_folder_with_a_link_around_itself_is_refused(stage: Stage, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "up").symlink_to("..", target_is_directory=True)
    with pytest.raises(OutputError, match="has a link 'up' to a folder in which it lies itself"):
        describe_output(stage.cache, "file", str(tmp_path / "out"))


def test_a_workspace_behind_a_link_moves_as_well(settings: Settings, tmp_path: Path) -> None:
    """A stage asks where it stands, and gets another name of the same folder."""
    settings.home.mkdir(parents=True, exist_ok=True)
    (tmp_path / "link").symlink_to(settings.home, target_is_directory=True)
    stage = Stage(Settings(home=tmp_path / "link", tracking_uri=None), tmp_path / "project")
    real = stage_folder(settings.home / "runs" / "run-1", "stage") / "a.txt"
    real.parent.mkdir(parents=True)
    real.write_text("a", encoding="utf-8")
    parts = stage.parts(outputs={"a": "file"})
    assert stage.store(parts, a=str(real))
    second = stage.run_folder()
    assert put_back(stage, parts, second).results["a"] == str(stage_folder(second, "stage") / "a.txt")


def test_copies_are_read_only_and_keep_their_names(stage: Stage, tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text("<p>", encoding="utf-8")
    entry = stage.store(stage.parts(outputs={"report": "file"}), report=str(tmp_path / "report.html")).entry
    assert entry is not None
    copy = stage.cache.folder / entry.outputs["report"].blob
    assert copy.name == "report.html"
    assert copy.parent.name == entry.outputs["report"].content
    assert copy.stat().st_mode & 0o222 == 0


def test_a_file_in_place_of_a_folder_is_replaced(stage: Stage, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "inner").mkdir(parents=True)
    (out / "inner" / "a.txt").write_text("a", encoding="utf-8")
    entry = stage.store(stage.parts(outputs={"out": "file"}), out=str(out)).entry
    assert entry is not None
    shutil.rmtree(out)
    out.write_text("in the way", encoding="utf-8")
    restore_entry(stage.cache, entry, stage.run_folder() / "01.ipynb")
    assert (out / "inner" / "a.txt").read_text(encoding="utf-8") == "a"


def test_an_output_that_is_not_there_is_refused(stage: Stage, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="can't read the file"):
        describe_output(stage.cache, "file", str(tmp_path / "nothing"))
    with pytest.raises(OutputError, match="there is no kind of output 'tabel'"):
        describe_output(stage.cache, "tabel", "t@0")


# ---------------------------------------------------------------- what must not be kept


def test_a_failure_is_never_kept(stage: Stage) -> None:
    parts = stage.parts()
    assert stage.store(parts, text=notebook_text(CODE, failed=True)).reasons == ["a cell ended in an error"]
    assert stage.lookup(parts).entry is None


def test_a_notebook_edited_before_it_ran_is_not_kept(stage: Stage) -> None:
    parts = stage.parts()
    assert stage.store(parts, text=notebook_text(CODE, "more()")).reasons == ["the notebook changed before it was run"]
    assert stage.lookup(parts).entry is None


def test_a_notebook_edited_after_it_was_read_belongs_to_the_old_key(stage: Stage) -> None:
    parts, executed = stage.parts(), stage.notebook.read_text(encoding="utf-8")
    stage.notebook.write_text(notebook_text(CODE, "more()"), encoding="utf-8")
    assert stage.store(parts, text=executed)
    assert stage.lookup(stage.parts()).reasons == ["the notebook changed"]


@pytest.mark.parametrize("back", [False, True])
def test_a_module_edited_while_it_ran_is_not_kept(stage: Stage, back: bool) -> None:
    parts, text = stage.parts(), stage.helper.read_text(encoding="utf-8")
    time.sleep(0.02)
    stage.helper.write_text("double = abs", encoding="utf-8")
    _ = back and stage.helper.write_text(text, encoding="utf-8")
    assert stage.store(parts).reasons == ["helper changed while it ran"]
    assert stage.lookup(parts).entry is None


def test_an_input_changed_in_place_is_not_kept(stage: Stage, tmp_path: Path) -> None:
    settings, file = stage.cache.settings, tmp_path / "a.csv"
    file.write_text("a", encoding="utf-8")
    table = write_table(settings, "t", {"x": [1]})
    inputs = {
        "rows": describe_output(stage.cache, "table", table),
        "file": describe_output(stage.cache, "file", str(file)),
    }
    parts = stage.parts(inputs=inputs)
    file.write_text("b", encoding="utf-8")
    next((settings.data / "t").glob("*.parquet")).unlink()
    reasons = stage.store(parts).reasons
    assert len(reasons) == 2
    assert reasons[0].startswith("input rows: ")
    assert reasons[1] == "input file: a.csv was changed while it ran"


def test_an_input_that_was_put_back_while_it_ran_is_not_kept(stage: Stage, tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("raw", encoding="utf-8")
    parts = stage.parts(inputs={"file": describe_output(stage.cache, "file", str(path))})
    path.write_text("x", encoding="utf-8")
    path.write_text("raw", encoding="utf-8")
    assert stage.store(parts).reasons == ["input file was written to while it ran"]
    assert not stage.lookup(parts)
    parts = stage.parts(inputs={"file": describe_output(stage.cache, "file", str(path))})
    assert stage.store(parts).reasons == []


@pytest.mark.parametrize("value", ["d/../d", "d/.", "./d", "{0}/d/../d", "d/../e/../d"])
def test_a_roundabout_path_comes_back(stage: Stage, value: str) -> None:
    own = stage_folder(stage.cache.settings.runs / "run-1", "stage")
    for name in ("d", "e"):
        (own / name).mkdir(parents=True)
    (own / "d" / "x").write_text("x", encoding="utf-8")
    parts = stage.parts(outputs={"f": "file"})
    entry = stage.store(parts, f=value.format(own)).entry
    assert entry is not None
    target = stage.run_folder()
    restored = restore_entry(stage.cache, entry, target / "01_stage.ipynb")
    assert (stage_folder(target, "stage") / "d" / "x").read_text(encoding="utf-8") == "x"
    assert restored.results["f"] == ("d" if "{" not in value else str(stage_folder(target, "stage") / "d"))


def test_a_state_that_changed_meanwhile_is_not_kept(stage: Stage, empty_store: Path) -> None:
    parts = stage.parts(reads=["registry"])
    shutil.copy(empty_store, stage.cache.settings.home / "mlflow.db")
    client = quiet_mlflow().MlflowClient(stage.cache.settings.tracking, stage.cache.settings.tracking)
    client.create_registered_model("late")
    assert stage.store(parts).reasons == ["the registry changed while it ran"]


def test_outputs_other_than_declared_are_not_kept(stage: Stage) -> None:
    parts = stage.parts(outputs={"rows": "table"})
    run = stage.run_folder() / "01.ipynb"
    run.write_text(stage.notebook.read_text(encoding="utf-8"), encoding="utf-8")
    assert not keep_result(stage.cache, parts, "demo", "stage", {}, {}, run, 1.0)


def test_a_module_that_only_the_run_showed_is_watched(stage: Stage) -> None:
    plugin = stage.folder / "plugin.py"
    plugin.write_text("x = 1", encoding="utf-8")
    time.sleep(0.02)
    parts = stage.parts()
    loaded = [str(stage.helper), str(plugin)]
    kept = stage.store(parts, modules=loaded)
    assert kept.entry is not None, kept.reasons
    assert list(kept.entry.modules) == ["plugin.py"]
    assert stage.lookup(parts)
    plugin.write_text("x = 2", encoding="utf-8")
    assert stage.lookup(parts) == Found(None, ["plugin.py changed"])
    assert stage.store(parts, modules=loaded).reasons == ["plugin.py changed while it ran"]
    time.sleep(0.02)
    assert stage.store(stage.parts(), modules=loaded)
    assert stage.lookup(parts)
    plugin.unlink()
    assert stage.lookup(parts).reasons == ["plugin.py changed"]
    assert stage.store(stage.parts(), modules=loaded).reasons == ["plugin.py changed while it ran"]


# ---------------------------------------------------------------- damage


def entry_files(cache: CacheStore) -> list[Path]:
    return sorted((cache.folder / "entries").rglob("*.json"))


@pytest.mark.parametrize("damage", ["empty", "half", "bit", "json", "list", "other entry", "folder"])
def test_a_damaged_entry_is_a_miss_and_set_aside(stage: Stage, damage: str) -> None:
    parts, other = stage.parts(seed=1), stage.parts(seed=2)
    stage.store(parts)
    stage.store(other)
    path, content = stage.cache.entry_file(parts.key), stage.cache.entry_file(parts.key).read_bytes()
    made = {"empty": b"", "half": content[: len(content) // 2], "json": b"{}", "list": b"[1]"}
    made |= {"bit": content.replace(b'"answer": 42', b'"answer": 43')}
    made |= {"other entry": stage.cache.entry_file(other.key).read_bytes()}
    path.unlink()
    _ = path.mkdir() if damage == "folder" else path.write_bytes(made[damage])
    assert len(verify_entries(stage.cache)) == 1
    found = stage.lookup(parts)
    assert found.entry is None
    assert found.reasons[0].startswith("its kept result was damaged")
    assert not path.exists(), "set aside"
    assert len(list((stage.cache.folder / "damaged").iterdir())) == 1
    assert stage.store(parts)
    assert stage.lookup(parts)
    assert verify_entries(stage.cache) == []


@pytest.mark.parametrize("damage", ["gone", "changed", "other name", "empty folder"])
def test_a_damaged_copy_is_a_miss_and_made_anew(stage: Stage, tmp_path: Path, damage: str) -> None:
    report = tmp_path / "report.html"
    report.write_text("<p>", encoding="utf-8")
    parts = stage.parts(outputs={"report": "file"})
    entry = stage.store(parts, report=str(report)).entry
    assert entry is not None
    copy = stage.cache.folder / entry.outputs["report"].blob
    copy.chmod(0o644)
    if damage in ("gone", "empty folder"):
        shutil.rmtree(copy.parent)
        _ = damage == "empty folder" and copy.parent.mkdir()
    elif damage == "changed":
        copy.write_text("<q>", encoding="utf-8")
    else:
        copy.rename(copy.with_name("other.html"))
    assert len(verify_entries(stage.cache)) == 1
    assert stage.lookup(parts).reasons[0].startswith("output report: report.html")
    assert stage.store(parts, report=str(report))
    assert stage.lookup(parts)
    assert verify_entries(stage.cache) == []


@pytest.mark.parametrize("damage", [b"", b"{", b"[1, 2]", b'["x", [{}]]', b"{}", b'[null, {"a": 1}]'])
def test_a_damaged_index_only_costs_the_explanation(stage: Stage, damage: bytes) -> None:
    stage.store(stage.parts(seed=1))
    index = next((stage.cache.folder / "latest").iterdir())
    index.write_bytes(damage)
    assert stage.lookup(stage.parts(seed=2)).reasons == ["never run before"]
    assert stage.lookup(stage.parts(seed=1))
    assert stage.store(stage.parts(seed=3))


def test_a_copy_damaged_after_the_look_is_told_and_set_aside(stage: Stage) -> None:
    entry = stage.store(stage.parts()).entry
    assert entry is not None
    copy = stage.cache.folder / entry.notebook.blob
    copy.chmod(0o644)
    copy.write_text("damaged", encoding="utf-8")
    with pytest.raises(OutputError, match=r"01_stage\.ipynb is damaged"):
        restore_entry(stage.cache, entry, stage.run_folder() / "01.ipynb")
    assert not copy.exists()
    assert not any(stage.cache.settings.runs.glob("run-2/*"))


def run_python(code: str, *arguments: object, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, **options)


SLOW_STORE = """
    import sys, time
    from pathlib import Path
    from mlops_course.pipelines.cache import entries
    from test_cache import Stage, settings_in

    home, project, when = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    def slowly(*arguments, **options):
        if when == "_copy":
            arguments[1].write_text("half", encoding="utf-8")
        print("now", flush=True)
        time.sleep(60)
    setattr(entries.History if when == "add" else entries, when, slowly)
    stage = Stage(settings_in(home), project)
    (home / "report.html").write_text("<p>", encoding="utf-8")
    stage.store(stage.parts(outputs={"report": "file"}), report=str(home / "report.html"))
"""


@pytest.mark.parametrize("when", ["_copy", "_publish", "write_atomic", "add"])
def test_a_process_killed_while_it_keeps_a_result_leaves_no_wrong_entry(stage: Stage, when: str) -> None:
    home = stage.cache.settings.home
    process = run_python(SLOW_STORE, home, stage.folder, when)
    assert process.stdout is not None
    assert process.stdout.readline() == "now\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    parts = stage.parts(outputs={"report": "file"})
    assert bool(stage.lookup(parts)) == (when == "add"), "only the last step is not needed"
    assert verify_entries(stage.cache) == []
    assert stage.store(parts, report=str(home / "report.html"))
    assert stage.lookup(parts)
    age(stage.cache.folder)
    prune_entries(stage.cache)
    assert list((stage.cache.folder / "work").iterdir()) == []
    assert stage.lookup(parts)


def test_a_full_disk_leaves_no_wrong_entry(settings: Settings, tmp_path: Path) -> None:
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "none", str(place)], capture_output=True)
    if mounted.returncode:
        pytest.skip("needs root")
    try:
        stage = Stage(settings_in(place / "workspace"), tmp_path / "project")
        report = tmp_path / "report.bin"
        report.write_bytes(os.urandom(1_000_000))
        parts = stage.parts(outputs={"report": "file"})
        found = stage.store(parts, report=str(report))
        assert found.entry is None
        assert "the disk is full" in found.reasons[0]
        assert stage.lookup(parts).entry is None
        assert entry_files(stage.cache) == []
        report.write_bytes(b"small")
        assert stage.store(parts, report=str(report)), "there is room again"
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_a_cache_that_cannot_be_written_is_no_error(stage: Stage) -> None:
    shutil.rmtree(stage.cache.folder)
    stage.cache.folder.write_text("a file stands here", encoding="utf-8")
    parts = stage.parts()
    found = stage.store(parts)
    assert found.entry is None
    assert found.reasons[0].startswith("it can't be kept: ")
    assert stage.lookup(parts).entry is None
    with key_lock(stage.cache, "a" * 64, timeout=1) as held:
        assert not held
    assert prune_entries(stage.cache).entries == 0


# ---------------------------------------------------------------- several processes

WRITERS = """
    import sys
    from pathlib import Path
    from test_cache import Stage, settings_in

    home, project, number = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    stage = Stage.__new__(Stage)
    from mlops_course.pipelines.cache import CacheStore, prune_entries
    stage.cache, stage.folder, stage.runs = CacheStore(settings_in(home)), project, 1000 * number
    stage.notebook, stage.helper = project / "stage.ipynb", project / "helper.py"
    report = home / f"report-{number}.html"
    wrong = []
    for turn in range(12):
        report.write_text(f"<p>{turn % 4}</p>", encoding="utf-8")
        parts = stage.parts(parameters={"turn": turn % 4}, outputs={"report": "file", "turn": "value"})
        found = stage.lookup(parts)
        if found and found.entry.results["turn"] != turn % 4:
            wrong.append(found)
        if not found:
            kept = stage.store(parts, report=str(report), turn=turn % 4)
            wrong += [] if kept else [kept.reasons]
        if number == 0:
            prune_entries(stage.cache, keep=2)
    print(len(wrong), wrong[:1])
"""


@pytest.mark.slow
def test_many_processes_keep_and_find_the_same_and_other_things_at_once(stage: Stage) -> None:
    home = stage.cache.settings.home
    processes = [run_python(WRITERS, home, stage.folder, number) for number in range(4)]
    said = [process.communicate(timeout=120)[0] for process in processes]
    assert said == ["0 []\n"] * 4
    assert verify_entries(stage.cache) == []


LOCKED = """
    import sys, time
    from pathlib import Path
    from mlops_course.pipelines.cache import CacheStore, key_lock
    from test_cache import settings_in

    with key_lock(CacheStore(settings_in(Path(sys.argv[1]))), "b" * 64) as held:
        print("held", held, flush=True)
        time.sleep(float(sys.argv[2]))
"""


def test_the_second_waits_for_the_first(stage: Stage) -> None:
    process = run_python(LOCKED, stage.cache.settings.home, 0.6)
    assert process.stdout is not None
    assert process.stdout.readline() == "held True\n"
    begin = time.monotonic()
    with key_lock(stage.cache, "b" * 64, timeout=0.1) as held:
        assert not held, "it did not wait for ever"
    with key_lock(stage.cache, "c" * 64, timeout=0) as held:
        assert held, "another key is free"
    with key_lock(stage.cache, "b" * 64) as held:
        assert held
        assert time.monotonic() - begin > 0.3
    process.wait()


def test_a_dead_holder_blocks_nobody(stage: Stage) -> None:
    process = run_python(LOCKED, stage.cache.settings.home, 60)
    assert process.stdout is not None
    process.stdout.readline()
    process.kill()
    process.wait()
    with key_lock(stage.cache, "b" * 64, timeout=5) as held:
        assert held


# ---------------------------------------------------------------- order


def age(path: Path, seconds: float = 3 * YOUNG_S) -> None:
    """Make everything below older."""
    then = time.time() - seconds
    for each in [path, *path.rglob("*")]:
        os.utime(each, (then, then), follow_symlinks=False)


def test_entries_are_listed_the_last_used_first(stage: Stage) -> None:
    for seed in (1, 2, 3):
        stage.store(stage.parts(seed=seed))
        age(stage.cache.entry_file(stage.parts(seed=seed).key), 100 - seed)
    stage.lookup(stage.parts(seed=1))
    entries = list_entries(stage.cache)
    assert [entry.inputs.seed for entry in entries] == [1, 3, 2]
    assert all(entry.size > 0 and entry.seconds == 1.5 for entry in entries)


def test_pruning_keeps_what_it_is_told_and_all_that_is_needed(stage: Stage) -> None:
    for seed in (1, 2, 3):
        stage.store(stage.parts(seed=seed), answer=seed)
        stage.notebook.write_text(notebook_text(CODE, f"{seed}"), encoding="utf-8")
    age(stage.cache.folder)
    stage.notebook.write_text(notebook_text(CODE, "3"), encoding="utf-8")
    last = stage.parts(seed=4)
    stage.store(last)
    pruned = prune_entries(stage.cache, older_than=YOUNG_S)
    assert (pruned.entries, pruned.copies) == (3, 3)
    assert pruned.bytes > 0
    assert stage.lookup(last)
    assert len(list((stage.cache.folder / "blobs").glob("*/*"))) == 1
    assert verify_entries(stage.cache) == []


def test_pruning_by_number_and_by_size(stage: Stage) -> None:
    for seed in range(5):
        stage.store(stage.parts(seed=seed))
    assert prune_entries(stage.cache, keep=3).entries == 2
    size = list_entries(stage.cache)[0].size
    assert prune_entries(stage.cache, max_bytes=2 * size).entries == 1
    assert len(list_entries(stage.cache)) == 2
    assert prune_entries(stage.cache).entries == 0


def test_pruning_leaves_a_young_copy_alone(stage: Stage) -> None:
    """Another process may be about to write the entry that refers to it."""
    entry = stage.store(stage.parts()).entry
    assert entry is not None
    stage.cache.entry_file(entry.key).unlink()
    assert prune_entries(stage.cache).copies == 0
    age(stage.cache.folder)
    stage.store(stage.parts())
    stage.cache.entry_file(entry.key).unlink()
    assert prune_entries(stage.cache).copies == 0, "it was used again just now"
    age(stage.cache.folder)
    assert prune_entries(stage.cache).copies == 1


def test_a_result_that_was_not_kept_is_explained(stage: Stage) -> None:
    parts = stage.parts()
    text = stage.helper.read_text(encoding="utf-8")
    stage.helper.write_text("double = abs", encoding="utf-8")
    stage.helper.write_text(text, encoding="utf-8")
    assert not stage.store(parts)
    assert stage.lookup(stage.parts()).reasons == ["its last result was not kept: helper changed while it ran"]
    assert stage.store(stage.parts())
    assert stage.lookup(stage.parts())
    other = stage.parts(parameters={"rows": 1})
    assert stage.lookup(other).reasons == ["parameter rows changed (nothing -> 1)"]
    History(stage.cache, "demo", "stage").add_refusal(other.key, ["source changed while it ran"])
    assert stage.lookup(other).reasons == ["its last result was not kept: source changed while it ran"]
    third = stage.parts(parameters={"rows": 2})
    assert stage.lookup(third).reasons == ["parameter rows changed (nothing -> 2)"]


def test_a_pruned_result_is_explained(stage: Stage) -> None:
    parts = stage.parts()
    stage.store(parts)
    prune_entries(stage.cache, keep=0)
    assert stage.lookup(parts).reasons == ["its result is no longer kept"]


def test_verify_reads_what_the_memo_would_not(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that loses a bit tells nobody."""
    entry: CacheEntry | None = stage.store(stage.parts()).entry
    assert entry is not None
    copy = stage.cache.folder / entry.notebook.blob
    cache = CacheStore(stage.cache.settings)
    copy.chmod(0o644)
    copy.write_bytes(copy.read_bytes().replace(b"double", b"treble"))
    found = copy.stat()
    known = (found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino, entry.notebook.content)
    cache.memo._known.files[str(copy)] = known
    assert find_entry(cache, stage.parts(), "demo", "stage"), "the memo knows no better"
    assert len(verify_entries(cache)) == 1


# ---------------------------------------------------------------- speed


def test_planning_imports_nothing_heavy_and_is_quick(stage: Stage, tmp_path: Path) -> None:
    settings = stage.cache.settings
    features = write_table(
        settings, "features", {"p": [str(n) for n in range(12)], "x": list(range(12))}, partition_by=["p"]
    )
    for number in range(8):
        assert stage.store(stage.parts(seed=number, outputs={"features": "table"}), features=features)
    code = """
        import sys, time
        from pathlib import Path
        from mlops_course.pipelines.cache import CacheStore, find_entry, stage_key
        from test_plan import settings

        def plan():
            begin, cache = time.perf_counter(), CacheStore(settings)
            for number in range(8):
                parts = stage_key(cache, Path(sys.argv[1]), [sys.argv[2]], outputs={"features": "table"}, seed=number)
                assert find_entry(cache, parts, "demo", "stage")
            return time.perf_counter() - begin

        plan()
        heavy = {"deltalake", "papermill", "pandas", "numpy", "mlflow", "pyarrow", "IPython", "filelock"}
        print(min(plan() for _ in range(5)), sorted(heavy & set(sys.modules)))
    """
    plan = tmp_path / "test_plan.py"
    plan.write_text(
        f"from pathlib import Path\nfrom mlops_course.environment import Settings\n"
        f"settings = Settings(home=Path({str(settings.home)!r}), tracking_uri=None)\n",
        encoding="utf-8",
    )
    process = run_python(code, stage.notebook, stage.folder, cwd=tmp_path)
    seconds, heavy = process.communicate(timeout=60)[0].split(maxsplit=1)
    assert heavy == "[]\n"
    assert float(seconds) < 0.25, "some 0.02 s; more on a busy machine"
