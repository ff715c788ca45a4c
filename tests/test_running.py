"""A pipeline's runs: what is skipped and why, what runs side by side, what is tried again, where secrets never go."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from kill_helpers import lives
from pipeline_helpers import RECORD, statuses, write_chain, write_notebook, write_pipeline

from mlops_course.environment import Settings
from mlops_course.pipelines import (
    Options,
    ParameterError,
    PipelineError,
    PipelineRun,
    RunError,
    StageError,
    backfill,
    compare_runs,
    find_run,
    list_runs,
    month_range,
    plan,
    run,
)

posix_only = pytest.mark.skipif(os.name == "nt", reason="uses POSIX signals")


@pytest.fixture
def chain(tmp_path: Path) -> Path:
    return write_chain(tmp_path)


def ran(folder: Path) -> list[str]:
    """The stages that really ran since the last call."""
    path = folder / "ran"
    names = path.read_text().split() if path.exists() else []
    path.unlink(missing_ok=True)
    return names


def change(notebook: Path, old: str, new: str) -> None:
    text = notebook.read_text()
    assert old in text
    notebook.write_text(text.replace(old, new))


# ---------------------------------------------------------------- what is skipped


def test_what_has_not_changed_is_not_run_again(chain: Path, settings: Settings) -> None:
    first = run(chain, settings=settings)
    assert ran(chain.parent) == ["double", "square", "tell"]
    again = run(chain, settings=settings)
    assert ran(chain.parent) == []
    assert statuses(again) == dict.fromkeys(("double", "square", "tell"), "cached")
    assert again.results == first.results
    assert again.folder != first.folder
    for stage in again.stages:
        assert stage.notebook.parent == again.folder
        assert stage.notebook.is_file(), "a cached stage's report lies in the new run's folder as well"


def test_a_changed_parameter_runs_what_depends_on_it(chain: Path, settings: Settings) -> None:
    run(chain, settings=settings)
    ran(chain.parent)
    run(chain, {"number": 2}, settings)
    assert ran(chain.parent) == ["double", "square", "tell"]
    run(chain, {"number": 1}, settings)
    assert ran(chain.parent) == [], "the old results are still there"


def test_an_equal_result_stops_the_wave(chain: Path, settings: Settings) -> None:
    run(chain, settings=settings)
    ran(chain.parent)
    record = run(chain, {"noise": 1}, settings)
    assert ran(chain.parent) == ["double"]
    assert statuses(record) == {"double": "done", "square": "cached", "tell": "cached"}


def test_a_changed_notebook_runs_again_but_not_for_its_prose_or_outputs(chain: Path, settings: Settings) -> None:
    run(chain, settings=settings)
    ran(chain.parent)
    notebook = json.loads((chain.parent / "square.ipynb").read_text())
    notebook["cells"].insert(0, {"cell_type": "markdown", "id": "prose", "metadata": {}, "source": "# New words"})
    notebook["cells"][1]["execution_count"] = 7
    (chain.parent / "square.ipynb").write_text(json.dumps(notebook))
    run(chain, settings=settings)
    assert ran(chain.parent) == []
    change(chain.parent / "square.ipynb", "doubled**2", "doubled**3")
    run(chain, settings=settings)
    assert ran(chain.parent) == ["square", "tell"] or ran(chain.parent) == ["square"]


def test_changed_source_beside_the_pipeline_runs_its_users_again(chain: Path, settings: Settings) -> None:
    (chain.parent / "rates.py").write_text("def rate():\n    return 2\n")
    hidden = "doubled * __import__('importlib').import_module('ra' + 'tes').rate()"
    change(chain.parent / "square.ipynb", "doubled**2", hidden)
    assert run(chain, settings=settings).results["square"] == {"squared": 4}
    ran(chain.parent)
    (chain.parent / "rates.py").write_text("def rate():\n    return 5\n")
    record = run(chain, settings=settings)
    assert record.results["square"] == {"squared": 10}, "an import that no source shows is seen all the same"
    assert ran(chain.parent) == ["square", "tell"]


def test_a_failure_is_never_kept(chain: Path, settings: Settings) -> None:
    change(chain.parent / "square.ipynb", "record_result(squared", "1 / 0\\nrecord_result(squared")
    for _ in range(2):
        with pytest.raises(StageError, match="ZeroDivisionError"):
            run(chain, settings=settings)
    assert ran(chain.parent) == ["double", "square", "square"]


def test_a_stage_that_must_not_be_cached_runs_each_time(chain: Path, settings: Settings) -> None:
    chain.write_text(chain.read_text().replace("inputs: [squared]}", "inputs: [squared], cache: false}"))
    run(chain, settings=settings)
    ran(chain.parent)
    record = run(chain, settings=settings)
    assert ran(chain.parent) == ["tell"]
    assert record.stages[-1].reasons == ["it runs every time (cache: false)"]


def test_files_at_a_path_count_by_their_content(tmp_path: Path, settings: Settings) -> None:
    write_notebook(tmp_path / "read.ipynb", "source: str = None", RECORD + "record_result(text=open(source).read())")
    pipeline = write_pipeline(
        tmp_path,
        """
        name: reader
        parameters: {source: {type: path}}
        stages: [{name: read, notebook: read.ipynb, parameters: {source: "${source}"}, outputs: {text: value}}]
        """,
    )
    data = tmp_path / "data.txt"
    data.write_text("one")
    assert run(pipeline, {"source": data}, settings).results["read"]["text"] == "one"
    data.write_text("two")
    assert run(pipeline, {"source": data}, settings).results["read"]["text"] == "two"
    assert statuses(run(pipeline, {"source": data}, settings)) == {"read": "cached"}


def test_whatever_the_supplier_changes_in_a_folder_is_seen(tmp_path: Path, settings: Settings) -> None:
    read = "from pathlib import Path\nnames = sorted(Path(source).rglob('*.csv'))\n"
    read += "names += Path(source, 'current').glob('*.csv')\n"
    write_notebook(
        tmp_path / "ingest.ipynb",
        "source: str = None",
        RECORD + read + "record_result(periods={path.name: path.read_text() for path in names})",
    )
    pipeline = write_pipeline(
        tmp_path,
        """
        name: months
        parameters: {source: {type: path}}
        stages:
          - {name: ingest, notebook: ingest.ipynb, parameters: {source: "${source}"}, outputs: {periods: value}}
        """,
    )
    source, behind = tmp_path / "source", tmp_path / "behind"
    for path in (source / "inner", behind):
        path.mkdir(parents=True)
    first, inner, linked = source / "2013-01.csv", source / "inner" / "2013-02.csv", behind / "2013-03.csv"
    for path in (first, inner, linked):
        path.write_text("old")
    (source / "current").symlink_to(behind, target_is_directory=True)
    times = first.stat()

    def correct(path: Path) -> None:
        path.write_text("new")
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))

    def replace(path: Path) -> None:
        (tmp_path / "other").write_text("neu")
        (tmp_path / "other").replace(path)

    changes = [lambda: correct(first), lambda: replace(inner), lambda: correct(linked), inner.unlink]
    changes += [lambda: (source / "2013-04.csv").write_text("April"), lambda: (behind / "2013-05.csv").touch()]
    for change in changes:
        before = run(pipeline, {"source": source}, settings).results["ingest"]
        assert statuses(run(pipeline, {"source": source}, settings)) == {"ingest": "cached"}
        change()
        record = run(pipeline, {"source": source}, settings)
        assert statuses(record) == {"ingest": "done"}
        (reason,) = record.stages[0].reasons
        assert reason.startswith("parameter source changed (content ")
        assert record.results["ingest"] != before


def test_a_folder_that_leads_around_itself_is_read_each_time(tmp_path: Path, settings: Settings) -> None:
    read = RECORD + "from pathlib import Path\nrecord_result(text=Path(source, 'up', 'beside.txt').read_text())"
    write_notebook(tmp_path / "read.ipynb", "source: str = None", read)
    stage = '{name: read, notebook: read.ipynb, parameters: {source: "${source}"}, outputs: {text: value}}'
    (tmp_path / "p.yaml").write_text(f"name: reader\nparameters: {{source: {{type: path}}}}\nstages: [{stage}]\n")
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "up").symlink_to("..", target_is_directory=True)
    for text in ("one", "two"):
        (tmp_path / "beside.txt").write_text(text)
        record = run(tmp_path / "p.yaml", {"source": tmp_path / "source"}, settings)
        assert record.results["read"] == {"text": text}
    expected = "source has a link (up) to a folder in which it lies, and I can't follow that"
    assert record.stages[0].reasons == [expected]


def test_the_order_of_a_mapping_is_part_of_the_key(tmp_path: Path, settings: Settings) -> None:
    write_notebook(tmp_path / "first.ipynb", "x: dict = None", RECORD + "record_result(first=list(x)[0])")
    for mapping, first in {"{q: 2, p: 1}": "q", "{p: 1, q: 2}": "p"}.items():
        stage = f"{{name: first, notebook: first.ipynb, outputs: {{first: value}}, parameters: {{x: {mapping}}}}}"
        (tmp_path / "p.yaml").write_text(f"name: order\nstages: [{stage}]\n")
        record = run(tmp_path / "p.yaml", settings=settings)
        assert (record.results["first"], statuses(record)) == ({"first": first}, {"first": "done"})
    assert record.stages[0].reasons == ["parameter x changed ({q: 2, p: 1} -> {p: 1, q: 2})"]


READ_CODE = {
    "spec_from_file_location": """
        import importlib.util as u
        spec = u.spec_from_file_location('helper', {0!r})
        helper = u.module_from_spec(spec)
        spec.loader.exec_module(helper)
        value = helper.value
        """,
    "exec": "exec(open({0!r}).read())",
    "run_path": "import runpy\nvalue = runpy.run_path({0!r})['value']",
    "%run": "%run {0}",
}


@pytest.mark.parametrize("way", READ_CODE)
def test_code_that_is_read_from_a_file_is_never_stale(tmp_path: Path, settings: Settings, way: str) -> None:
    helper = tmp_path / "helper.py"
    cell = textwrap.dedent(READ_CODE[way]).format(str(helper))
    write_notebook(tmp_path / "use.ipynb", "", cell, RECORD + "record_result(value=value)")
    stage = "{name: use, notebook: use.ipynb, outputs: {value: value}}"
    (tmp_path / "use.yaml").write_text(f"name: use\nstages: [{stage}]\n")
    for value in (1, 2):
        helper.write_text(f"value = {value}\n")
        record = run(tmp_path / "use.yaml", settings=settings)
        assert record.results["use"] == {"value": value}
        assert record.stages[0].reasons == [f"its notebook says {way}, and I can't follow that"]
    (planned,) = plan(tmp_path / "use.yaml", settings=settings)
    assert (planned.action, planned.reasons) == ("run", record.stages[0].reasons)


def test_a_result_that_is_never_kept_says_why(tmp_path: Path, settings: Settings) -> None:
    """A stage that writes into the folder that it reads: each run is the first that could be kept, and never is."""
    (tmp_path / "source").mkdir()
    note = "from pathlib import Path\nPath(source, 'log').open('a').write('x')\n" + RECORD + "record_result(v=1)"
    write_notebook(tmp_path / "note.ipynb", "source: str = None", note)
    stage = '{name: note, notebook: note.ipynb, parameters: {source: "${source}"}, outputs: {v: value}}'
    (tmp_path / "p.yaml").write_text(f"name: noting\nparameters: {{source: {{type: path}}}}\nstages: [{stage}]\n")
    given = {"source": tmp_path / "source"}
    assert run(tmp_path / "p.yaml", given, settings).stages[0].reasons == [
        "never run before",
        "not kept: source changed while it ran",
    ]
    expected = ["its last result was not kept: source changed while it ran"]
    assert [each.reasons for each in plan(tmp_path / "p.yaml", given, settings)] == [expected]


@posix_only
def test_a_cached_tool_can_still_be_run(tmp_path: Path, settings: Settings) -> None:
    make = "from pathlib import Path\nPath('tool').write_text('#!/bin/sh\\necho works')\nPath('tool').chmod(0o755)\n"
    write_notebook(tmp_path / "make.ipynb", "", make + RECORD + "record_result(tool='tool')")
    use = "import subprocess\n" + RECORD + "record_result(said=subprocess.check_output([tool], text=True))"
    write_notebook(tmp_path / "use.ipynb", "tool: str = None\nround: int = 0", use)
    pipeline = write_pipeline(
        tmp_path,
        """
        name: tools
        parameters: {round: {type: integer, default: 0}}
        stages:
          - {name: make, notebook: make.ipynb, outputs: {tool: file}}
          - {name: use, notebook: use.ipynb, parameters: {round: "${round}"}, inputs: [tool], outputs: {said: value}}
        """,
    )
    for number, status in enumerate(["done", "cached"]):
        record = run(pipeline, {"round": number}, settings)
        assert record.results["use"] == {"said": "works\n"}
        assert statuses(record) == {"make": status, "use": "done"}


def test_a_made_file_that_is_gone_or_changed_comes_back(tmp_path: Path, settings: Settings) -> None:
    made = tmp_path / "made.txt"
    make = f"open({str(made)!r}, 'w').write('precious')\n" + RECORD + f"record_result(report={str(made)!r})"
    write_notebook(tmp_path / "make.ipynb", "", make)
    use = RECORD + "record_result(found=open(report).read())"
    write_notebook(tmp_path / "use.ipynb", "report: str = None\nround: int = 0", use)
    pipeline = write_pipeline(
        tmp_path,
        """
        name: files
        parameters: {round: {type: integer, default: 0}}
        stages:
          - {name: make, notebook: make.ipynb, outputs: {report: file}}
          - {name: use, notebook: use.ipynb, parameters: {round: "${round}"}, inputs: [report], outputs: {found: value}}
        """,
    )
    run(pipeline, settings=settings)
    for number, harm in enumerate([made.unlink, lambda: made.write_text("worthless")], start=1):
        harm()
        record = run(pipeline, {"round": number}, settings)
        assert record.results["use"] == {"found": "precious"}
        assert statuses(record) == {"make": "cached", "use": "done"}
        assert made.read_text() == "precious"


def test_modules_are_those_of_the_place_where_it_runs(
    tmp_path: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A module that lies where the runner stands, once seen in the source and once not."""
    for import_it in ("import mine", "mine = __import__('importlib').import_module('mi' + 'ne')"):
        write_notebook(tmp_path / "use.ipynb", "", f"{import_it}\n{RECORD}record_result(value=mine.value)")
        (tmp_path / "use.yaml").write_text("name: use\nstages: [{name: use, notebook: use.ipynb}]\n")
        for number, place in enumerate(("one", "two")):
            (tmp_path / place).mkdir(exist_ok=True)
            (tmp_path / place / "mine.py").write_text(f"value = {number}\n")
            monkeypatch.chdir(tmp_path / place)
            assert run(tmp_path / "use.yaml", settings=settings).results["use"] == {"value": number}


def test_what_cannot_be_known_is_not_kept(chain: Path, settings: Settings) -> None:
    record = run(chain, settings=settings, options=Options(engine="kernel"))
    assert record.stages[0].reasons[-1] == "not kept: this engine can't tell which modules it loaded"
    assert plan(chain, settings=settings)[0].action == "run"
    change(chain.parent / "double.ipynb", "with open(", "%run other.py\\nwith open(".replace("\\\\", "\\"))
    (found, *_) = plan(chain, settings=settings)
    assert found.reasons == ["its notebook says %run, and I can't follow that"]


def test_a_path_that_is_written_to_while_a_stage_reads_it(tmp_path: Path, settings: Settings) -> None:
    read = "import time\ntext = open(source).read()\ntime.sleep(0.5)\n" + RECORD + "record_result(text=text)"
    write_notebook(tmp_path / "read.ipynb", "source: str = None", read)
    stage = '{name: read, notebook: read.ipynb, parameters: {source: "${source}"}, outputs: {text: value}}'
    pipeline = tmp_path / "reader.yaml"
    pipeline.write_text(f"name: reader\nparameters: {{source: {{type: path}}}}\nstages: [{stage}]\n")
    data = tmp_path / "data.txt"
    data.write_text("old")

    def overwrite(kind: str, record: PipelineRun, stage: Any) -> None:
        if kind == "started":
            data.write_text("new")

    run(pipeline, {"source": data}, settings, overwrite)
    data.write_text("old")
    record = run(pipeline, {"source": data}, settings)
    assert (record.results["read"]["text"], statuses(record)) == ("old", {"read": "done"})


# ---------------------------------------------------------------- the plan


def test_a_plan_says_what_would_run_and_why(chain: Path, settings: Settings) -> None:
    before = plan(chain, settings=settings)
    assert {each.stage: each.action for each in before} == {"double": "run", "square": "perhaps", "tell": "perhaps"}
    assert "never run before" in " ".join(before[0].reasons)
    assert not settings.runs.exists() or not list(settings.runs.iterdir())
    run(chain, settings=settings)
    assert {each.action for each in plan(chain, settings=settings)} == {"cached"}
    changed = plan(chain, {"number": 3}, settings)
    assert changed[0].action == "run"
    assert "number" in " ".join(changed[0].reasons)
    assert "1" in " ".join(changed[0].reasons) and "3" in " ".join(changed[0].reasons)
    change(chain.parent / "tell.ipynb", "print(squared)", "print(squared, 1)")
    edited = {each.stage: each for each in plan(chain, settings=settings)}
    assert [each.action for each in edited.values()] == ["cached", "cached", "run"]
    assert "notebook" in " ".join(edited["tell"].reasons)


def test_planning_loads_nothing_heavy(chain: Path, settings: Settings) -> None:
    run(chain, settings=settings)
    code = f"""
        import sys
        from mlops_course.pipelines import plan
        assert {{each.action for each in plan({str(chain)!r})}} == {{"cached"}}
        heavy = {{"pandas", "numpy", "papermill", "nbclient", "IPython", "mlflow", "deltalake", "matplotlib"}}
        print(sorted(heavy & set(sys.modules)))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ---------------------------------------------------------------- limits


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (Options(force=True), ["double", "square", "tell"]),
        (Options(start="square"), ["square", "tell"]),
        (Options(only="square"), ["square"]),
        (Options(start="double", until="square"), ["double", "square"]),
        (Options(until="square"), []),
    ],
)
def test_what_is_asked_for_runs_whatever_the_cache_says(
    chain: Path, settings: Settings, options: Options, expected: list[str]
) -> None:
    run(chain, settings=settings)
    ran(chain.parent)
    record = run(chain, settings=settings, options=options)
    assert ran(chain.parent) == expected
    assert record.status == "done"
    if options.only:
        assert statuses(record) == {"double": "cached", "square": "done", "tell": "not run"}


def test_only_needs_what_it_needs(chain: Path, settings: Settings) -> None:
    with pytest.raises(PipelineError, match="--only square needs what double makes, which isn't in the cache: never"):
        run(chain, settings=settings, options=Options(only="square"))
    assert ran(chain.parent) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (Options(start="sqare"), "--from: chain has no stage 'sqare'. Perhaps you meant 'square'"),
        (Options(only="x"), "--only: chain has no stage 'x'. Known are: double, square, tell"),
        (Options(start="double", only="tell"), "--only can't be given together with --from or --to"),
        (Options(until="y"), "--to: chain has no stage 'y'"),
        (Options(width=0), "--width is 0"),
        (Options(engine="frok"), "--engine: there is none called 'frok'. Perhaps you meant 'fork'"),
        (Options(timeout=-1), "--timeout is -1"),
    ],
)
def test_limits_that_make_no_sense_are_refused(chain: Path, settings: Settings, options: Options, message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        run(chain, settings=settings, options=options)
    assert not settings.runs.exists() or not list(settings.runs.iterdir())


# ---------------------------------------------------------------- side by side


def write_fan(folder: Path, cell: str, count: int = 2) -> Path:
    """Stages that don't need each other, each with the number `me`."""
    for number in range(count):
        write_notebook(folder / f"s{number}.ipynb", "", f"me = {number}\n{cell}")
    stages = "\n".join(f"  - {{name: s{number}, notebook: s{number}.ipynb}}" for number in range(count))
    (folder / "fan.yaml").write_text(f"name: fan\nstages:\n{stages}\n")
    return folder / "fan.yaml"


def test_stages_that_do_not_need_each_other_run_side_by_side(tmp_path: Path, settings: Settings) -> None:
    """Each waits for the other's sign of life, so that one after the other they would never end."""
    meet = f"""
        import pathlib, time
        here = pathlib.Path({str(tmp_path)!r})
        (here / f"here{{me}}").touch()
        until = time.monotonic() + 30
        while not (here / f"here{{1 - me}}").exists():
            assert time.monotonic() < until, "alone"
            time.sleep(0.01)
    """
    fan = write_fan(tmp_path, textwrap.dedent(meet))
    assert run(fan, settings=settings, options=Options(width=2)).status == "done"


def test_a_failure_lets_others_finish_but_nothing_new_begins(tmp_path: Path, settings: Settings) -> None:
    deed = "import time\nif me == 0:\n    raise ValueError('first')\ntime.sleep(0.8)"
    with pytest.raises(StageError, match="ValueError: first"):
        run(write_fan(tmp_path, deed, 3), settings=settings, options=Options(width=2))
    (told,) = list_runs(settings)
    assert [stage["status"] for stage in told["stages"]] == ["failed", "done", "not run"]


# ---------------------------------------------------------------- trying again, and giving up


def write_flaky(folder: Path, failures: int, entries: str, deed: str = "raise OSError('the line is busy')") -> Path:
    """A stage that fails so many times and then works."""
    count = f"""
        import pathlib
        path = pathlib.Path({str(folder / "tries")!r})
        tries = len(path.read_text()) if path.exists() else 0
        path.write_text("x" * (tries + 1))
        if tries < {failures}:
            {deed}
    """
    write_notebook(folder / "flaky.ipynb", "", textwrap.dedent(count))
    stage = f"{{name: flaky, notebook: flaky.ipynb, {entries}}}"
    (folder / "flaky.yaml").write_text(f"name: flaky\nstages: [{stage}]\n")
    return folder / "flaky.yaml"


def test_a_stage_is_tried_again_when_it_asks_for_it(tmp_path: Path, settings: Settings) -> None:
    told: list[str] = []
    record = run(
        write_flaky(tmp_path, 2, "retries: 2, backoff: 0.1"),
        settings=settings,
        on_event=lambda kind, record, stage: told.append(kind),
    )
    (stage,) = record.stages
    assert (stage.status, stage.attempts, told.count("retry")) == ("done", 3, 2)
    assert sorted(path.name for path in record.folder.glob("*.ipynb")) == [
        "01_flaky.attempt1.ipynb",
        "01_flaky.attempt2.ipynb",
        "01_flaky.ipynb",
    ]
    assert "the line is busy" in (record.folder / "01_flaky.attempt2.ipynb").read_text()


@pytest.mark.parametrize("engine", ["auto", "spawn"])
def test_a_second_attempt_does_not_find_what_the_first_one_left(
    tmp_path: Path, settings: Settings, engine: str
) -> None:
    code = f"""
        import pathlib
        from mlops_course.pipelines import record_result
        with open("rows.csv", "a") as file:
            file.write("a row\\n")
        first = pathlib.Path({str(tmp_path / "first")!r})
        if not first.exists():
            first.touch()
            raise OSError("the line is busy")
        record_result(f="rows.csv")
    """
    write_notebook(tmp_path / "add.ipynb", "", textwrap.dedent(code))
    stage = "{name: add, notebook: add.ipynb, retries: 1, backoff: 0, outputs: {f: file}}"
    (tmp_path / "add.yaml").write_text(f"name: add\nstages: [{stage}]\n")
    record = run(tmp_path / "add.yaml", settings=settings, options=Options(engine=engine))
    assert record.stages[0].attempts == 2
    made = {path.parent.name: path.read_text() for path in record.folder.rglob("rows.csv")}
    assert made == {"add": "a row\n", ".add.attempt1": "a row\n"}


def test_retries_come_to_an_end(tmp_path: Path, settings: Settings) -> None:
    with pytest.raises(StageError, match=r"after 2 attempts\): OSError: the line is busy"):
        run(write_flaky(tmp_path, 5, "retries: 1, backoff: 0"), settings=settings)


@posix_only
def test_a_killed_worker_is_tried_again_too(tmp_path: Path, settings: Settings) -> None:
    deed = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    record = run(write_flaky(tmp_path, 1, "retries: 1, backoff: 0", deed), settings=settings)
    assert (record.status, record.stages[0].attempts) == ("done", 2)


IN_C = "import ctypes\nctypes.CDLL(None).sleep(60)"


@posix_only
@pytest.mark.parametrize("where", ["stage", "run"])
def test_time_outs_end_even_a_call_into_c(tmp_path: Path, settings: Settings, where: str) -> None:
    write_notebook(tmp_path / "slow.ipynb", "", "print('before')", IN_C)
    entries = ", timeout: 1" if where == "stage" else ""
    (tmp_path / "slow.yaml").write_text(f"name: slow\nstages: [{{name: slow, notebook: slow.ipynb{entries}}}]\n")
    begin = time.monotonic()
    with pytest.raises(StageError, match=r"TimedOut: (.*1 s|the time for the whole run was over)") as caught:
        run(tmp_path / "slow.yaml", settings=settings, options=Options(timeout=1 if where == "run" else None))
    assert time.monotonic() - begin < 20
    assert "before" in caught.value.executed.read_text()


@posix_only
def test_a_runner_that_was_killed_leaves_no_process_and_can_be_resumed(chain: Path, settings: Settings) -> None:
    pid = chain.parent / "pid"
    wait = f"import os, time\nopen({str(pid)!r}, 'w').write(str(os.getpid()))\ntime.sleep(60)\n"
    whole = (chain.parent / "square.ipynb").read_text()
    change(chain.parent / "square.ipynb", "with open(", json.dumps(wait)[1:-1] + "with open(")
    code = f"from mlops_course.pipelines import run; run({str(chain)!r})"
    runner = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    until = time.monotonic() + 60
    while not (pid.exists() and pid.read_text()) and time.monotonic() < until:
        time.sleep(0.05)
    family = [runner.pid, *(child.pid for child in psutil.Process(runner.pid).children(recursive=True))]
    assert int(pid.read_text()) in family
    runner.send_signal(signal.SIGKILL)
    runner.wait()
    until = time.monotonic() + 10
    while any(map(lives, family)) and time.monotonic() < until:
        time.sleep(0.05)
    assert [number for number in family if lives(number)] == []
    assert [told["status"] for told in list_runs(settings)] == ["killed"]
    (chain.parent / "square.ipynb").write_text(whole)
    ran(chain.parent)
    assert run(chain, settings=settings).status == "done"
    assert ran(chain.parent) == ["square", "tell"], "what was done before the kill isn't done again"


def test_two_identical_runs_do_the_work_once(chain: Path, settings: Settings) -> None:
    change(chain.parent / "double.ipynb", "with open(", "import time\\ntime.sleep(1)\\nwith open(")
    code = f"from mlops_course.pipelines import run; print(run({str(chain)!r}).results)"
    runners = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [runner.communicate(timeout=120)[0] for runner in runners]
    assert said[0] == said[1] != ""
    assert sorted(ran(chain.parent)) == ["double", "square", "tell"]


@pytest.mark.parametrize("entries", ["", "retries: 5, backoff: 30"])
def test_when_the_time_for_a_run_is_over_nothing_begins(tmp_path: Path, settings: Settings, entries: str) -> None:
    pipeline = write_flaky(tmp_path, 9, entries or "makes: nothing")
    begin = time.monotonic()
    with pytest.raises(StageError, match=r"the time for the whole run was over|OSError"):
        run(pipeline, settings=settings, options=Options(timeout=0.001 if not entries else 6))
    assert time.monotonic() - begin < 25
    assert (tmp_path / "tries").exists() == bool(entries)


def test_who_listens_cannot_hurt_a_run(chain: Path, settings: Settings) -> None:
    def broken(*event: object) -> None:
        raise BrokenPipeError

    assert run(chain, settings=settings, on_event=broken).status == "done"


# ---------------------------------------------------------------- secrets


def test_a_secret_reaches_its_stage_and_nothing_else(
    tmp_path: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = "tr0ub4dor&3-ünïcode"
    look = "import os, sys\nvalue = os.environ.get('API_KEY')\n"
    tell = look + "print('the key is', value)\nprint(repr(value), file=sys.stderr)\nvalue"
    length = RECORD + "record_result(length=len(value or ''))"
    write_notebook(tmp_path / "with.ipynb", "", tell, length)
    write_notebook(tmp_path / "without.ipynb", "", tell, length)
    pipeline = tmp_path / "keys.yaml"
    pipeline.write_text(
        "name: keys\nstages:\n  - {name: with, notebook: with.ipynb, secrets: [API_KEY]}\n"
        "  - {name: without, notebook: without.ipynb}\n"
    )
    monkeypatch.setenv("API_KEY", secret)
    lines: list[str] = []
    record = run(pipeline, settings=settings, on_event=lambda *event: lines.append(event[2].line if event[2] else ""))
    assert record.results == {"with": {"length": len(secret)}, "without": {"length": 0}}
    kept = [path for path in settings.home.rglob("*") if path.is_file()]
    assert not [path for path in kept if secret.encode() in path.read_bytes() or b"tr0ub4dor" in path.read_bytes()]
    assert "the key is ***" in (record.folder / "01_with.ipynb").read_text()
    assert "the key is ***" in lines
    assert not [line for line in lines if "tr0ub4dor" in line]


def test_a_secret_can_lie_in_a_file_and_must_be_there(
    tmp_path: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_notebook(tmp_path / "with.ipynb", "", "import os\n" + RECORD + "record_result(n=len(os.environ['API_KEY']))")
    pipeline = tmp_path / "keys.yaml"
    pipeline.write_text("name: keys\nstages: [{name: with, notebook: with.ipynb, secrets: [API_KEY]}]\n")
    monkeypatch.delenv("API_KEY", raising=False)
    with pytest.raises(ParameterError, match=r"the secret API_KEY isn't set\. Set API_KEY, or API_KEY_FILE"):
        run(pipeline, settings=settings)
    assert not settings.runs.exists() or not list(settings.runs.iterdir())
    (tmp_path / "key").write_text("12345\n")
    monkeypatch.setenv("API_KEY_FILE", str(tmp_path / "key"))
    assert run(pipeline, settings=settings).results["with"] == {"n": 5}
    monkeypatch.setenv("API_KEY", "a/b+c==12345")
    write_notebook(
        tmp_path / "with.ipynb",
        "",
        "import base64, os, urllib.parse\nkey = os.environ['API_KEY']",
        "print(urllib.parse.quote_plus(key), base64.b64encode(b'user:' + key.encode()).decode(), {key: 1})",
        "print(open('/proc/self/environ').read() if os.path.exists('/proc/self/environ') else '')",
    )
    record = run(pipeline, settings=settings)
    text = record.stages[0].notebook.read_text()
    assert "a%2Fb" not in text
    assert "YS9iK2M9PTEy" not in text.replace("***", "")
    assert "a/b+c" not in text
    monkeypatch.delenv("API_KEY")
    (tmp_path / "key").write_text("x")
    with pytest.raises(ParameterError, match="the secret API_KEY has only 1 character:"):
        run(pipeline, settings=settings)


# ---------------------------------------------------------------- backfill


def write_months(folder: Path) -> Path:
    """One stage that fails in February while the file `closed` is there."""
    cell = f"""
        import pathlib
        with open({str(folder / "ran")!r}, "a") as file:
            file.write(month + "\\n")
        closed = pathlib.Path({str(folder / "closed")!r}).exists()
        assert not (closed and month == "2013-02"), "February is closed"
    """
    write_notebook(folder / "month.ipynb", "month: str = None\nextra: int = 0", textwrap.dedent(cell))
    return write_pipeline(
        folder,
        """
        name: months
        parameters: {month: {type: month}, extra: {type: integer, default: 0}}
        stages: [{name: work, notebook: month.ipynb, parameters: {month: "${month}", extra: "${extra}"}}]
        """,
        "months",
    )


def test_a_backfill_goes_on_after_a_failure_and_the_same_command_mends_it(tmp_path: Path, settings: Settings) -> None:
    pipeline, months = write_months(tmp_path), month_range("2013-01", "2013-04")
    (tmp_path / "closed").touch()
    filled = backfill(pipeline, "month", months, settings=settings, options=Options(width=2))
    assert [(each.value, each.status) for each in filled] == [
        ("2013-01", "done"),
        ("2013-02", "failed"),
        ("2013-03", "done"),
        ("2013-04", "done"),
    ]
    assert "AssertionError: February is closed" in filled[1].error
    assert find_run(settings, filled[1].run)["parameters"]["month"] == "2013-02"
    (tmp_path / "closed").unlink()
    ran(tmp_path)
    again = backfill(pipeline, "month", months, settings=settings)
    assert [each.status for each in again] == ["cached", "done", "cached", "cached"]
    assert ran(tmp_path) == ["2013-02"]


@pytest.mark.parametrize(
    ("parameter", "values", "message"),
    [
        ("month", ["2013-1"], "month is '2013-1'"),
        ("moth", ["2013-01"], "no parameter 'moth'"),
        ("month", [], "there is no value of month"),
    ],
)
def test_a_wrong_backfill_is_refused_as_a_whole(
    tmp_path: Path, settings: Settings, parameter: str, values: list[str], message: str
) -> None:
    with pytest.raises(ParameterError, match=message):
        backfill(write_months(tmp_path), parameter, values, settings=settings)
    assert ran(tmp_path) == []


@pytest.mark.parametrize(
    ("first", "last", "expected"),
    [("2013-11", "2014-02", ["2013-11", "2013-12", "2014-01", "2014-02"]), ("2013-05", "2013-05", ["2013-05"])],
)
def test_months_between_two(first: str, last: str, expected: list[str]) -> None:
    assert month_range(first, last) == expected
    with pytest.raises(ParameterError):
        month_range(last, "2013-13")


def test_months_in_the_wrong_order_are_refused() -> None:
    with pytest.raises(ParameterError, match="first is 2013-02, but should lie at or before last"):
        month_range("2013-02", "2013-01")


# ---------------------------------------------------------------- records


def test_runs_are_found_and_compared(chain: Path, settings: Settings) -> None:
    one = run(chain, settings=settings)
    other = run(chain, {"number": 4}, settings)
    assert find_run(settings, "last")["id"] == other.id
    assert find_run(settings, one.id[-6:])["id"] == one.id
    found = compare_runs(find_run(settings, one.id), find_run(settings, other.id))
    assert found["parameters.number"] == (1, 4)
    assert found["stages.square.results.squared"] == (4, 64)
    assert not [name for name in found if "folder" in name or "seconds" in name or name.startswith("fingerprint")]
    assert compare_runs(find_run(settings, one.id), find_run(settings, one.id)) == {}
    with pytest.raises(RunError, match="2 runs have 'chain' in their id"):
        find_run(settings, "chain")
    with pytest.raises(RunError, match="there is no run '1999'"):
        find_run(settings, "1999")


def test_a_run_can_be_saved_as_pages(chain: Path, settings: Settings) -> None:
    pytest.importorskip("nbconvert")
    record = run(chain, settings=settings, options=Options(html=True))
    pages = sorted(path.name for path in record.folder.glob("*.html"))
    assert pages == ["01_double.html", "02_square.html", "03_tell.html"]
    assert "doubled" in (record.folder / "02_square.html").read_text(encoding="utf-8")


def test_every_engine_gives_the_same_results(chain: Path, settings: Settings) -> None:
    results: list[Any] = []
    for engine in ("fork", "spawn", "kernel") if sys.platform == "linux" else ("spawn", "kernel"):
        results.append(run(chain, settings=settings, options=Options(engine=engine, force=True)).results)
    assert all(each == results[0] for each in results)
