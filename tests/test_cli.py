"""The command line as a user has it: real processes, what they print, and how they end."""

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import nbformat
import psutil
import pytest
import typer
from kill_helpers import lives
from typer.testing import CliRunner

from mlops_course import __version__
from mlops_course.cli import app, asked_for, describe_error
from mlops_course.commands import parse_parameters
from mlops_course.commands.look import ui_command, without_password
from mlops_course.commands.run import _Watched
from mlops_course.console import print_json, summary
from mlops_course.environment import CourseError, Settings
from mlops_course.pipelines import ParameterError, PipelineRun, StageRun

posix_only = pytest.mark.skipif(os.name == "nt", reason="uses POSIX signals")
COMMAND = [sys.executable, "-c", "from mlops_course.cli import main; main()"]


def course(*arguments: object, seconds: float = 60, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the command; `done.stdout` and `done.stderr` are text."""
    environment = {**os.environ, "COLUMNS": "160", **variables}
    command = [*COMMAND, *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, encoding="utf-8", env=environment, timeout=seconds, check=False
    )


def write_pipeline(folder: Path, *cells: str) -> Path:
    """A pipeline `greet` with one stage and one required parameter."""
    code = nbformat.v4.new_code_cell
    first = code("month: str | None = None", metadata={"tags": ["parameters"]})
    nbformat.write(nbformat.v4.new_notebook(cells=[first, *map(code, cells)]), folder / "greet.ipynb")
    text = """
        name: greet
        parameters:
          month: {type: month, help: whom to greet}
          source: {type: path, default: null}
        stages:
          - {name: greet, notebook: greet.ipynb, makes: a greeting, parameters: {month: "${month}"}}
          - {name: again, notebook: greet.ipynb, parameters: {month: "${source}"}}
    """
    path = folder / "greet.yaml"
    path.write_text(textwrap.dedent(text), encoding="utf-8")
    return path


@pytest.fixture
def greet(tmp_path: Path) -> Path:
    result = """
        from mlops_course.pipelines import record_result
        rows = [{"model": "ours", "pr_auc": 0.56789}, {"model": "constant", "pr_auc": 0.25}]
        record_result(made=f"hello {month}", figures={"n": 1}, comparison=rows, report="/tmp/drift[1].html")
    """
    return write_pipeline(tmp_path, "print(month)", textwrap.dedent(result))


def one_error_line(done: subprocess.CompletedProcess[str]) -> str:
    """The only line on standard error that reports an error; no traceback."""
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in done.stderr + done.stdout
    assert len(lines) == 1, done.stderr
    return lines[0]


# ---------------------------------------------------------------- quick to answer


def test_version_and_help() -> None:
    assert course("--version").stdout.strip() == __version__
    shown = course("--help").stdout
    assert all(name in shown for name in ("run", "pipelines", "runs", "doctor", "ui"))


def test_help_imports_nothing_heavy() -> None:
    script = "import sys, mlops_course.cli; print(*sys.modules)"
    loaded = set(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout.split())
    assert not loaded & {"pandas", "numpy", "pydantic", "mlflow", "papermill", "yaml", "rich.table", "IPython"}


def test_no_command_shows_the_help_and_a_wrong_one_is_wrong_usage() -> None:
    shown = course()
    assert all(f"\n{panel}:\n" in shown.stdout + shown.stderr for panel in ("Learn", "Run", "Serve", "Look"))
    done = course("rnu")
    assert done.returncode == 2
    assert "rnu" in done.stderr


# ---------------------------------------------------------------- parameters


def test_parameters_may_contain_equals_signs() -> None:
    assert parse_parameters(["a=b=c", "d="]) == {"a": "b=c", "d": ""}


@pytest.mark.parametrize(
    ("pairs", "message"), [(["month"], "name=value"), (["=x"], "name=value"), (["a=1", "a=2"], "twice")]
)
def test_what_is_no_parameter_is_refused(pairs: list[str], message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        parse_parameters(pairs)
    with pytest.raises(ParameterError, match=f"--limit .*{message}"):
        parse_parameters(pairs, "--limit")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-p", "mnoth=2013-10"], "no parameter 'mnoth'. Perhaps you meant 'month'"),
        (["-p", "month=October"], "month is 'October', but should be a month like 2013-01. Give -p month=… (whom to"),
        ([], "parameter month is missing"),
        (["-p", "month=2013-10", "--source", "no/such"], "source is 'no/such', but should be a file or folder"),
        (["-p", "month=2013-10", "--source", ".", "-p", "source=."], "source is given twice"),
    ],
)
def test_wrong_parameters_are_one_line_and_wrong_usage(
    greet: Path, settings: Settings, arguments: list[str], words: str
) -> None:
    done = course("run", greet, *arguments)
    assert words in one_error_line(done)
    assert (done.returncode, done.stdout) == (2, "")
    assert not list(settings.runs.iterdir())


def test_months_in_the_wrong_order_are_refused_before_anything_runs(settings: Settings) -> None:
    done = course("run", "training", "-p", "train_last=2013-11", "-p", "test_last=2013-11")
    words = "parameter train_last is 2013-11, but should lie before test_last, which is 2013-11. Change one of the two"
    assert words in one_error_line(done)
    assert (done.returncode, done.stdout) == (2, "")
    assert not list(settings.runs.iterdir())


def test_an_unknown_pipeline_is_wrong_usage() -> None:
    done = course("run", "trainign")
    assert "Perhaps you meant 'training'" in one_error_line(done)
    assert done.returncode == 2


# ---------------------------------------------------------------- run


def test_a_run_for_people(greet: Path, tmp_path: Path) -> None:
    home = tmp_path / "elsewhere"
    done = course("run", greet, "-p", "month=2013-10", "--source", tmp_path, "--home", home, "--width", 1)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[0] == "[1/2] greet ..."
    assert done.stderr.splitlines()[1] == "[1/2] greet| 2013-10"
    assert done.stderr.splitlines()[-4].startswith("[1/2] greet: done in ")
    assert done.stderr.splitlines()[-4].endswith(" s: hello 2013-10")
    for words in ("greet: done", "hello 2013-10", "n 1", "ours", "0.5679", "constant", "/tmp/drift[1].html"):
        assert words in done.stdout
    (folder,) = (home / "runs").iterdir()
    assert str(folder) in done.stdout
    assert f"mlops-course ui --home {home}" in done.stdout
    listed = course("runs", "--home", home).stdout
    assert folder.name in listed
    assert "2 of 2" in listed
    assert json.loads(course("runs", "--json", "--home", home).stdout)[0]["parameters"]["source"] == str(tmp_path)


def test_a_run_for_programs_fails_with_the_same_document(tmp_path: Path, settings: Settings) -> None:
    failing = write_pipeline(tmp_path, "print('{')", "raise RuntimeError(f'no [bold]{month}[/bold]')")
    done = course("run", failing, "-p", "month=2013-10", "--json", "--width", 1)
    document = json.loads(done.stdout)
    assert done.returncode == 1
    assert [stage["status"] for stage in document["stages"]] == ["failed", "not run"]
    assert "RuntimeError: no [bold]2013-10[/bold]" in document["error"]
    assert one_error_line(done) == f"error: {document['error']}"
    assert json.loads((settings.runs / document["id"] / "run.json").read_text()) == document


def test_a_refused_run_for_programs_is_a_document_too(greet: Path) -> None:
    done = course("run", greet, "--json")
    assert json.loads(done.stdout)["status"] == "refused"
    assert done.returncode == 2


def test_a_failure_shows_people_what_was_done(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    stages = [
        StageRun("ingest", tmp_path, "raw tables", "done", 1.25, results={"made": "336,776 [rows]"}),
        StageRun("train", tmp_path, "a model", "failed", 2.0),
        StageRun("score", tmp_path, "predictions", "not run"),
    ]
    watched = _Watched()
    watched.run = PipelineRun("id", "training", tmp_path, {}, stages, "2013-01-01", "failed")
    watched.show_failed(CourseError("no"), as_json=False)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert [line.split() for line in shown.err.splitlines() if line.strip()][3:] == [
        ["ingest", "1.2", "336,776", "[rows]"],
        ["train", "2.0", "failed"],
        ["score", "not", "run"],
    ]


@pytest.mark.parametrize(
    ("results", "expected"),
    [
        ({"shortfalls": ["PR-AUC is 0.41, the bar is 0.45", "Too slow!"]},
         ["Below the bars: PR-AUC is 0.41, the bar is 0.45. Too slow!\n"]),
        ({"shortfalls": []}, ["All bars reached.\n"]),
        ({}, []),
    ],
)  # fmt: skip
def test_the_end_says_whether_the_bars_are_reached(
    tmp_path: Path, results: dict[str, Any], expected: list[str]
) -> None:
    stages = [StageRun("evaluate", tmp_path, "test figures", "done", 1.0, results=results)]
    tables = summary(PipelineRun("id", "training", tmp_path, {}, stages, "2013-01-01", "done"))
    assert [str(each) for each in tables[1:]] == expected


@pytest.mark.parametrize("debug", [["--debug"], []])
def test_debug_shows_the_traceback_wherever_it_stands(greet: Path, debug: list[str]) -> None:
    done = course("run", greet, *debug, **({} if debug else {"MLOPS_COURSE_DEBUG": "1"}))
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "ParameterError" in done.stderr


def test_a_workspace_that_is_a_file_is_one_line(greet: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").touch()
    done = course("run", greet, "-p", "month=2013-10", "--home", tmp_path / "taken")
    assert f"can't write {tmp_path / 'taken'}: a file stands where a folder should be" in one_error_line(done)
    assert done.returncode == 1


def test_a_bad_setting_is_one_line(greet: Path) -> None:
    done = course("run", greet, "-p", "month=2013-10", MLOPS_COURSE_SEED="many")
    assert "MLOPS_COURSE_SEED is 'many'" in one_error_line(done)
    assert done.returncode == 1


def test_errors_for_people() -> None:
    assert describe_error(CourseError("no tea", "Boil water")) == ("no tea. Boil water.", 1)
    assert describe_error(ParameterError("no tea")) == ("no tea.", 2)
    line, status = describe_error(ValueError("two\nlines"))
    assert line.startswith("unexpected ValueError: two lines. ")
    assert "--debug" in line
    assert status == 1


# ---------------------------------------------------------------- stopped from outside


def descendants(number: int) -> list[psutil.Process]:
    """All living processes below one."""
    try:
        return [child for child in psutil.Process(number).children(recursive=True) if lives(child)]
    except psutil.NoSuchProcess:
        return []


def kernels(number: int) -> list[psutil.Process]:
    """The kernels among them."""
    found = []
    for process in descendants(number):
        with contextlib.suppress(psutil.Error):
            found += [process] if any("ipykernel_launcher" in part for part in process.cmdline()) else []
    return found


def start_a_long_run(folder: Path) -> subprocess.Popen[str]:
    spawn = "import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', 'import time; time.sleep(99)'])\n"
    tell = f"open({str(folder / 'began')!r}, 'w').close()"
    pipeline = write_pipeline(folder, spawn + tell, "import time\ntime.sleep(99)")
    restore = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    command = [sys.executable, "-c", restore + COMMAND[2], "run", str(pipeline), "-p", "month=2013-10"]
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def wait_for(condition: Any, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.05)


@posix_only
def test_an_interrupted_run_leaves_no_process_and_says_so(tmp_path: Path, settings: Settings) -> None:
    process = start_a_long_run(tmp_path)
    wait_for((tmp_path / "began").exists)
    started = descendants(process.pid)
    assert len(started) >= 2, "a worker and its child, and whatever workers come from"
    process.send_signal(signal.SIGINT)
    time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 130
    assert [line for line in errors.splitlines() if line.startswith("error: ")] == [errors.splitlines()[-1]]
    assert "interrupted" in errors.splitlines()[-1]
    ours = [line for line in errors.splitlines() if not line.startswith("[")]  # the others are what cells print
    assert not [line for line in ours if "Traceback" in line]
    assert "Task" not in errors, "asyncio has nothing to complain about"
    assert [process for process in started if lives(process)] == []
    (folder,) = settings.runs.iterdir()
    told = json.loads((folder / "run.json").read_text())
    assert (told["status"], told["error"]) == ("interrupted", "interrupted by SIGINT")
    assert {path.name for path in folder.iterdir()} - {"02_again.ipynb"} == {"01_greet.ipynb", "run.json"}


@posix_only
def test_a_run_can_be_stopped_before_its_worker_is_ready(tmp_path: Path, settings: Settings) -> None:
    process = start_a_long_run(tmp_path)
    wait_for(lambda: descendants(process.pid))
    started = descendants(process.pid)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    assert process.returncode == 143
    assert [process for process in started if lives(process)] == []
    (folder,) = settings.runs.iterdir()
    assert json.loads((folder / "run.json").read_text())["status"] == "interrupted"


@posix_only
def test_a_killed_run_leaves_no_process_and_says_so_later(tmp_path: Path, settings: Settings) -> None:
    process = start_a_long_run(tmp_path)
    wait_for((tmp_path / "began").exists)
    started = descendants(process.pid)
    process.kill()
    process.communicate(timeout=20)
    wait_for(lambda: not any(map(lives, started)), 15)
    (folder,) = settings.runs.iterdir()
    assert json.loads((folder / "run.json").read_text())["stages"][0]["status"] == "running"
    assert json.loads(course("runs", "--json").stdout)[0]["status"] == "killed"


# ---------------------------------------------------------------- what would run, and what was run


def test_a_plan_a_run_and_nothing_to_do(greet: Path, tmp_path: Path) -> None:
    month = ("-p", "month=2013-10")
    planned = json.loads(course("plan", greet, *month, "--json").stdout)
    assert [each["action"] for each in planned] == ["run", "run"]
    assert planned[0]["reasons"] == ["never run before"]
    assert course("run", greet, *month).returncode == 0
    assert "nothing to do" in course("plan", greet, *month).stdout
    again = course("run", greet, *month)
    assert [line.split(":")[1].split()[0] for line in again.stderr.splitlines()] == ["cached", "cached"]
    assert "nothing to do, every stage is as it was" in again.stdout
    last = json.loads(course("runs", "show", "last", "--json").stdout)
    assert [stage["status"] for stage in last["stages"]] == ["cached", "cached"], "written down all the same"
    assert last["folder"] in again.stdout
    changed = json.loads(course("plan", greet, "-p", "month=2013-11", "--json").stdout)
    assert changed[0]["reasons"] == ["parameter month changed (2013-10 -> 2013-11)"]


def test_runs_can_be_shown_and_compared(greet: Path) -> None:
    for month in ("2013-10", "2013-11"):
        assert course("run", greet, "-p", f"month={month}").returncode == 0
    ids = [run["id"] for run in json.loads(course("runs", "--json").stdout)]
    shown = json.loads(course("runs", "show", "--json").stdout)
    assert (shown["id"], shown["parameters"]["month"]) == (ids[0], "2013-11")
    assert ids[1] in course("runs", "show", ids[1]).stdout
    assert "commit none" in course("runs", "show", ids[1]).stdout, "the pipeline lies in no repository"
    different = json.loads(course("runs", "diff", ids[1], "--json").stdout)
    assert different["parameters.month"] == ["2013-10", "2013-11"]
    assert "2013-11" in course("runs", "diff", ids[1], ids[0]).stdout
    lost = course("runs", "show", "1999")
    assert "there is no run '1999'" in one_error_line(lost)
    assert lost.returncode == 1


def test_the_cache_can_be_listed_thinned_out_and_checked(greet: Path, settings: Settings) -> None:
    assert course("run", greet, "-p", "month=2013-10").returncode == 0
    entries = json.loads(course("cache", "list", "--json").stdout)
    assert {each["stage"] for each in entries} == {"greet", "again"}
    assert "greet" in course("cache", "list").stdout
    assert course("cache", "verify").stdout == "the cache is sound\n"
    blob = next(path for path in (settings.cache / "blobs").rglob("*.ipynb"))
    blob.chmod(0o644)
    blob.write_text(blob.read_text().replace("hello", "hullo"))
    wrong = course("cache", "verify")
    assert wrong.returncode == 1
    assert "was changed" in wrong.stdout
    assert json.loads(course("cache", "prune", "--keep", "0", "--json").stdout)["entries"] == 2
    assert json.loads(course("cache", "list", "--json").stdout) == []


def test_a_backfill_says_which_month_failed_and_why(tmp_path: Path, settings: Settings) -> None:
    failing = write_pipeline(tmp_path, "print('{')", "assert month != '2013-02', 'February is closed'")
    months = ("--first", "2013-01", "--last", "2013-03")
    done = course("backfill", failing, *months, "--json")
    assert done.returncode == 1
    filled = json.loads(done.stdout)
    assert [each["status"] for each in filled] == ["done", "failed", "done"]
    assert "February is closed" in filled[1]["error"]
    assert "2013-02" in course("backfill", failing, *months).stdout


def test_a_backfill_runs_over_any_values(tmp_path: Path, settings: Settings) -> None:
    path = write_pipeline(tmp_path, "print(month)")
    done = course("backfill", path, "--over", "month=2013-01..2013-02,2013-05", "--json", "--width", 1)
    assert [(each["value"], each["status"]) for each in json.loads(done.stdout)] == [
        ("2013-01", "done"),
        ("2013-02", "done"),
        ("2013-05", "done"),
    ]
    (tmp_path / "months.txt").write_text("2013-01\n2013-05\n")
    again = course("backfill", path, "--over", f"month=@{tmp_path / 'months.txt'}", "--json")
    assert [each["status"] for each in json.loads(again.stdout)] == ["cached", "cached"]
    named = course("backfill", path, "--over", "month", "--first", "2013-01", "--last", "2013-02", "--json")
    assert [each["value"] for each in json.loads(named.stdout)] == ["2013-01", "2013-02"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--over", "month=2013-01,2013-01"], "month is '2013-01' twice. Give each value once."),
        (["--over", "month=2013-01,May"], "month is 'May', but should be a month like 2013-01"),
        (["--over", "mnoth=2013-01"], "no parameter 'mnoth'. Perhaps you meant 'month'"),
        (["--over", "month=2013-01", "--first", "2013-01"], "--over month=2013-01 says which values, and --first"),
        (["--first", "2013-01"], "no values of month are given. Give --over name=values"),
        (["--over", "month=2013-01", "-p", "month=2013-02"], "month is given, but it is the one that varies"),
    ],
)
def test_values_that_cannot_be_filled_are_refused(tmp_path: Path, arguments: list[str], message: str) -> None:
    done = course("backfill", write_pipeline(tmp_path, "print(month)"), *arguments)
    assert message in one_error_line(done)
    assert (done.returncode, done.stdout) == (2, "")


def test_the_schema_is_printed_or_written(tmp_path: Path) -> None:
    for option in ([], ["--json"]):
        found = json.loads(course("pipelines", "schema", *option).stdout)
        assert found["$defs"]["Stage"]["properties"]["retries"]["default"] == 0
    assert course("pipelines", "schema", "-o", tmp_path / "x.json").stdout.strip() == str(tmp_path / "x.json")
    assert json.loads((tmp_path / "x.json").read_text(encoding="utf-8")) == found
    written = json.loads(course("pipelines", "schema", "-o", tmp_path / "y.json", "--json").stdout)
    assert written == {"schema": str(tmp_path / "y.json")}


def test_an_export_is_told_what_is_there(greet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "reqs.txt").write_text("holidays\n")
    options = ("--runner", "ours", "--python", "3.13", "--requirements", "reqs.txt", "--package", "mlops_course>=0.1")
    shown = course("export", greet, "--to", "github", *options).stdout
    assert all(word in shown for word in ("runs-on: ours", "'3.13'", "'mlops_course>=0.1' --requirement reqs.txt"))
    assert "image: ours:1" not in shown
    refused = course("export", greet, "--to", "github", "--image", "ours:1")
    assert "--image is for argo or airflow, not for github" in one_error_line(refused) and refused.returncode == 2


def test_a_pipeline_can_be_drawn_and_written_for_others(
    greet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert course("graph", greet).stdout.startswith("flowchart")
    for name in ("graph.png", "graph.svg"):
        assert course("graph", greet, "-o", tmp_path / name).returncode == 0
        assert (tmp_path / name).stat().st_size > 1000
    for system in ("github", "airflow", "argo"):
        assert "greet" in course("export", greet, "--to", system).stdout
    assert course("export", greet, "--to", "argo", "-o", tmp_path / "argo.yaml").returncode == 0
    assert "greet" in (tmp_path / "argo.yaml").read_text()
    assert "slurm" in one_error_line(course("export", greet, "--to", "slurm"))


# ---------------------------------------------------------------- the other commands


def test_pipelines_can_be_listed() -> None:
    listed = {each["name"]: each for each in json.loads(course("pipelines", "--json").stdout)}
    assert listed["training"]["stages"][0]["name"] == "ingest"
    assert "train_last" in course("pipelines").stdout


def test_runs_of_an_empty_workspace(tmp_path: Path) -> None:
    done = course("runs", MLOPS_COURSE_HOME=str(tmp_path / "none"))
    assert "nothing was run" in done.stdout
    assert done.returncode == 0
    assert not (tmp_path / "none").exists(), "looking creates nothing"


READING = (
    "runs", "runs show last", "runs diff a b", "cache list", "cache verify", "ledger show", "ledger verify", "progress",
    "models list", "models show 1", "models compare 1", "models at 2013-10-01", "models card 1", "models verify 1",
    "data history", "data diff a@1 a@2", "lineage flight-delay@1", "deliver report 1", "keys list", "test-score",
    "status", "release status", "release outcomes", "monitor 2013-10", "interview",
    "data forgotten x.json --receipt y.json",
)  # fmt: skip


@pytest.mark.parametrize("command", READING)
def test_who_reads_names_a_workspace_that_is_there(command: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, [*command.split(), "--home", str(tmp_path / "lab11")])
    assert f"there is no workspace {tmp_path / 'lab11'}. Correct --home" in done.output
    assert done.exit_code == 1
    assert not (tmp_path / "lab11").exists(), "looking creates nothing"


def test_doctor_for_people_and_programs() -> None:
    tools = {tool["name"]: tool for tool in json.loads(course("doctor", "--json").stdout)}
    assert tools["python"]["ok"]
    assert "python" in course("doctor").stdout


def test_doctor_says_by_its_exit_status_that_something_is_missing(tmp_path: Path) -> None:
    done = course("doctor", PATH=str(tmp_path))
    assert done.returncode == 1
    assert "MISSING" in done.stdout


def test_ui_without_runs_says_what_to_do(settings: Settings) -> None:
    done = course("ui")
    assert "First run: mlops-course run training" in one_error_line(done)
    assert done.returncode == 1


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("http://ann:s3cret@server:5000/x", "http://ann:***@server:5000/x"),
        ("postgresql+psycopg://ann:p@ss@db/mlflow", "postgresql+psycopg://ann:***@db/mlflow"),
        ("http://server:5000/a@b", "http://server:5000/a@b"),
        ("sqlite:////tmp/mlflow.db", "sqlite:////tmp/mlflow.db"),
        ("postgresql://ann:p@ss/word@db:5432/mlflow", "postgresql://ann:***@db:5432/mlflow"),
    ],
)
def test_a_password_is_not_shown(address: str, shown: str) -> None:
    assert without_password(address) == shown


def test_ui_prints_no_password() -> None:
    done = course("ui", MLOPS_COURSE_TRACKING_URI="http://ann:s3cret@server:5000")
    assert done.returncode == 0
    assert "http://ann:***@server:5000" in done.stdout
    assert "s3cret" not in done.stdout + done.stderr


def test_mlflow_gets_the_address_by_a_variable_and_not_as_an_argument(settings: Settings) -> None:
    pytest.importorskip("mlflow")
    private = Settings(home=settings.home, tracking_uri="postgresql://ann:s3cret@db/mlflow")
    assert "s3cret" not in " ".join(ui_command(private, 5000))
    script = "import os, sys; print(os.environ['MLFLOW_BACKEND_STORE_URI'], *sys.argv)"
    replaced = "import sys, mlops_course.cli as cli, mlops_course.commands.look as look; "
    replaced += f"look.ui_command = lambda *a: [sys.executable, '-c', {script!r}]; "
    command = [sys.executable, "-c", replaced + "cli.app(args=['ui'])"]
    variables = {**os.environ, "MLOPS_COURSE_TRACKING_URI": private.tracking}
    done = subprocess.run(command, capture_output=True, text=True, env=variables, check=True)
    assert "postgresql://ann:s3cret@db/mlflow -c" in done.stdout
    assert "postgresql://ann:***@db/mlflow" in done.stdout


def test_only_the_command_that_is_asked_for_is_built_and_it_is_the_same_as_among_all() -> None:
    every = typer.main.get_group(app)
    assert {"run", "check", "release", "doctor"} <= set(every.commands)
    for name, command in every.commands.items():
        built = typer.main.get_group(asked_for(app, [name, "--json"]))
        assert list(built.commands) == [name]
        assert built.commands[name].help == command.help
        for one, other in ((built, every), (built.commands[name], command)):
            assert [each.opts for each in one.params] == [each.opts for each in other.params]


@pytest.mark.parametrize("words", [[], ["--help"], ["nonsense"], ["--version", "run"]])
def test_who_names_no_command_gets_all_of_them(words: list[str]) -> None:
    assert asked_for(app, words) is app


# ---------------------------------------------------------------- what a program reads


def test_a_document_has_no_number_that_json_lacks(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"high": math.inf, "rows": [{"brier": math.nan}, (0.5, -math.inf)], "n": 3})
    assert "NaN" not in (said := capsys.readouterr().out) and "Infinity" not in said
    assert json.loads(said) == {"high": None, "rows": [{"brier": None}, [0.5, None]], "n": 3}
