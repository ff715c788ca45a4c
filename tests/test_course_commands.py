"""The course's commands as a learner has them: real processes in a folder of their own."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import free_port

from mlops_course.course.lessons import notebook_text, read_notebook

LESSONS = Path(__file__).resolve().parent / "lessons"
PROGRAM = "import typer; from mlops_course.commands.learn import learn_app; from mlops_course.cli import Commands; "
PROGRAM += "app = typer.Typer(cls=Commands, pretty_exceptions_enable=False); app.add_typer(learn_app); app()"
COMMAND = [sys.executable, "-c", PROGRAM]
pytestmark = pytest.mark.system
posix_only = pytest.mark.skipif(os.name == "nt", reason="uses POSIX signals")


class Terminal:
    """A learner's terminal."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        taken = {name: value for name, value in os.environ.items() if name != "MLOPS_COURSE_HOME"}
        self.environment = {**taken, "MLOPS_COURSE_LESSONS": str(LESSONS), "COLUMNS": "160"}
        self.copy = folder / "work" / "21_numbers.ipynb"

    def __call__(self, *arguments: str, typed: str = "") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*COMMAND, *arguments], cwd=self.folder, env=self.environment, input=typed,
            capture_output=True, text=True, encoding="utf-8", timeout=120, check=False,
        )  # fmt: skip

    def json(self, *arguments: str) -> Any:
        return json.loads(self(*arguments, "--json").stdout)

    def write(self, old: str, new: str) -> None:
        notebook = read_notebook(self.copy)
        for cell in notebook["cells"]:
            cell["source"] = cell["source"].replace(old, new)
        self.copy.write_text(notebook_text(notebook), encoding="utf-8")


@pytest.fixture
def terminal(tmp_path: Path) -> Terminal:
    return Terminal(tmp_path)


@pytest.mark.slow
def test_a_section_from_start_to_end(terminal: Terminal) -> None:
    assert "start 21" in terminal("progress").stdout
    assert terminal("start", "21").returncode == 0
    assert (terminal.folder / "workspace" / ".mlops_course").is_file()
    assert terminal("check", "21").returncode == 3
    terminal.write("mean = ...", "mean = sum(delays)")
    failed = terminal("check", "21.1")
    assert failed.returncode == 1 and "Divide" in failed.stdout
    terminal.write("sum(delays)\n", "sum(delays) / len(delays)\n")
    assert terminal("check", "21.1").returncode == 0
    assert terminal("solution", "21.1").stdout == "mean = sum(delays) / len(delays)\n"
    terminal.write("    ...", "    return delay > 15")
    assert terminal("check", "21").returncode == 0
    assert "break 21" in terminal.json("progress")["next"]
    assert terminal("break", "21").returncode == 0
    assert terminal("check", "21").returncode == 1
    assert "fix the lab" in terminal.json("progress")["next"]
    (terminal.folder / "workspace" / "numbers.json").write_text("[1, 2, 3]", encoding="utf-8")
    assert terminal("check", "21").returncode == 0
    assert "quiz 21" in terminal.json("progress")["next"]
    assert terminal("quiz", "21", typed="b\nz\n").returncode == 1, "broken off after the first"
    assert terminal("quiz", "21", "--anew", typed="a\n").returncode == 1, "and again"
    assert "1 of 2 questions are answered" in terminal("quiz", "21", typed="").stdout
    assert "answered" not in terminal("quiz", "21", "--anew", typed="b\n").stdout
    assert "1 of 2 questions are answered" in (said := terminal("quiz", "21", typed="a c\n")).stdout
    assert said.returncode == 0
    found = terminal.json("progress")
    assert found["next"] == "You have done everything."
    assert found["sections"][0]["passed"] == ["21.1", "21.2"]


@pytest.mark.slow
def test_every_command_speaks_json(terminal: Terminal) -> None:
    started = terminal.json("start", "21")
    assert (started["new"], Path(started["notebook"])) == (True, terminal.copy)
    assert terminal.json("start", "21")["new"] is False
    report = terminal.json("check", "21")
    assert [(each["id"], each["status"], each["cell"]) for each in report["exercises"]] == [
        ("21.1", "unattempted", 3),
        ("21.2", "unattempted", 5),
    ]
    assert (report["status"], report["lab"]["status"], report["problems"]) == (3, "unattempted", [])
    assert terminal.json("hint", "21.1")["hint"] == 1
    assert terminal.json("hint", "21.1")["hint"] == 2
    assert [terminal.json("hint", "lab", "21")["hint"] for _ in range(3)] == [1, 2, 2]
    assert terminal.json("solution", "21.2", "--yes")["solution"] == "return delay > 15"
    assert terminal.json("reset", "21.1")["kept"] is None, "a stub that is still there isn't kept"
    assert terminal.json("break", "21")["sound"] is False
    assert terminal.json("fix", "21")["sound"] is True
    assert terminal.json("quiz", "21")["questions"][0]["options"] == ["1", "2", "3"]
    assert terminal.json("quiz", "21", "--answers", "b,a")["right"] == 1
    assert terminal.json("progress")["sections"][0]["quiz"] == {"right": 1, "of": 2}
    assert terminal.json("update")[0]["replaced"] == 0
    assert "--ServerApp.ip=127.0.0.1" in terminal.json("lab", "21", "--no-browser")["command"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["check", "21"], "Make one: mlops-course start 21"),
        (["start", "99"], "The sections are 21"),
        (["start", "10"], "section 10, CI/CD, is not in this version"),
        (["break", "21.1"], "21.1 is an exercise, not a section. Write 21"),
        (["fix", "21.1"], "21.1 is an exercise, not a section. Write 21"),
        (["quiz", "21.1"], "21.1 is an exercise, not a section. Write 21"),
        (["hint", "21.9"], "Section 21 has 21.1, 21.2"),
        (["hint", "lab", "21.1"], "21.1 is an exercise, not a section. Write 21"),
        (["hint", "lab"], "there is no section lab"),
        (["solution", "21.1"], "is not passed yet"),
        (["reset", "21.1"], "no notebook"),
        (["quiz", "21", "--answers", "b"], "1 answer to 2 questions"),
        (["update", "21"], "no notebook"),
    ],
)
def test_a_mistake_is_one_line_with_the_remedy(terminal: Terminal, arguments: list[str], said: str) -> None:
    done = terminal(*arguments)
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert said in done.stderr


def test_a_damaged_copy_names_the_command_that_makes_a_new_one(terminal: Terminal) -> None:
    assert terminal("start", "21").returncode == 0
    terminal.copy.write_text('{"cells": [', encoding="utf-8")
    done = terminal("check", "21")
    assert "not a readable notebook" in done.stderr
    assert "put it aside and run `mlops-course start 21`" in done.stderr


def test_many_cells_that_stop_for_one_reason_are_one_remark(terminal: Terminal) -> None:
    terminal("start", "21")
    notebook = read_notebook(terminal.copy)
    own = {"cell_type": "code", "metadata": {}, "outputs": [], "execution_count": None}
    notebook["cells"].append({"cell_type": "markdown", "id": "own", "metadata": {}, "source": "## My own"})
    notebook["cells"] += [{**own, "id": f"own-{n}", "source": f"missing + {n}"} for n in range(4)]
    terminal.copy.write_text(notebook_text(notebook), encoding="utf-8")
    said = terminal("check", "21").stdout
    assert "! a cell below 'My own'   missing + 0" in said
    assert "3 more cells stop after it, perhaps because of this one" in said
    assert said.count("NameError") == 1
    assert len(terminal.json("check", "21")["problems"]) == 4
    notebook["cells"].insert(0, {**own, "id": "first", "source": "import nothing"})
    terminal.copy.write_text(notebook_text(notebook), encoding="utf-8")
    assert "! code cell 1   import nothing" in terminal("check", "21").stdout, "no heading is above it"


def test_the_commands_work_from_the_folder_of_the_copies(terminal: Terminal) -> None:
    terminal("start", "21")
    terminal.folder = terminal.folder / "work"
    assert terminal("check", "21").returncode == 3
    assert not (terminal.folder / "work").exists() and not (terminal.folder / "workspace").exists()


def test_another_workspace_is_used_when_it_is_named(terminal: Terminal) -> None:
    elsewhere = terminal.folder / "elsewhere"
    terminal("start", "21", "--home", str(elsewhere))
    terminal.write("mean = ...", "mean = str(settings.home)")
    found = terminal.json("check", "21.1", "--home", str(elsewhere))
    assert f"it is '{elsewhere}'" in found["exercises"][0]["message"]
    assert (elsewhere / "progress.json").is_file()
    assert not (terminal.folder / "workspace").exists()


def test_two_terminals_check_at_once(terminal: Terminal) -> None:
    terminal("start", "21")
    options: dict[str, Any] = {"cwd": terminal.folder, "env": terminal.environment, "stdout": subprocess.PIPE}
    both = [subprocess.Popen([*COMMAND, "check", f"21.{k}", "--json"], **options) for k in (1, 2)]
    found = [json.loads(process.communicate(timeout=120)[0]) for process in both]
    assert [each["exercises"][0]["id"] for each in found] == ["21.1", "21.2"]
    exercises = json.loads((terminal.folder / "workspace" / "progress.json").read_text())["sections"]["21"]["exercises"]
    assert set(exercises) == {"21.1", "21.2"}


def test_lab_says_how_to_install_what_is_missing(terminal: Terminal) -> None:
    program = "import mlops_course.course.tool as tool; tool.version_of = lambda name: None; " + PROGRAM
    done = subprocess.run(
        [sys.executable, "-c", program, "lab", "21"], cwd=terminal.folder, env=terminal.environment,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "pip install 'mlops_course[course]'" in done.stderr


@pytest.mark.slow
@posix_only
def test_lab_opens_jupyterlab_at_the_copy(terminal: Terminal) -> None:
    from urllib.request import urlopen

    (terminal.folder / "jupyter_server_config.json").write_text('{"ServerApp": {"allow_root": true}}', encoding="utf-8")
    terminal.environment |= {"JUPYTER_TOKEN": "let-me-in", "JUPYTER_CONFIG_DIR": str(terminal.folder)}
    port = free_port()
    process = subprocess.Popen(
        [*COMMAND, "lab", "21", "--no-browser", "--port", str(port)], cwd=terminal.folder, env=terminal.environment,
        stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    address = f"http://127.0.0.1:{port}/api/contents/21_numbers.ipynb?token=let-me-in&content=0"
    try:
        end = time.monotonic() + 60
        while True:
            try:
                with urlopen(address) as page:
                    assert json.load(page)["name"] == "21_numbers.ipynb"
                break
            except OSError:
                assert time.monotonic() < end and process.poll() is None
                time.sleep(0.2)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


# ---------------------------------------------------------------- watch


class Watching:
    """A `watch` in the background, with one JSON document on each line."""

    def __init__(self, terminal: Terminal) -> None:
        self.process = subprocess.Popen(
            [*COMMAND, "watch", "21", "--json"], cwd=terminal.folder, env=terminal.environment,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=os.name == "posix",
        )  # fmt: skip

    def next(self) -> dict[str, str]:
        assert self.process.stdout is not None
        document = json.loads(self.process.stdout.readline())
        return {each["id"]: each["status"] for each in document.get("exercises", [])} or document

    def family(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)


@posix_only
def test_watch_checks_on_every_save_and_ends_cleanly(terminal: Terminal) -> None:
    terminal("start", "21")
    watching = Watching(terminal)
    try:
        assert watching.next() == {"21.1": "unattempted", "21.2": "unattempted"}
        terminal.write("mean = ...", "mean = sum(delays) / len(delays)")
        assert watching.next() == {"21.1": "passed", "21.2": "unattempted"}
        text = terminal.copy.read_text(encoding="utf-8")
        terminal.copy.write_text(text[:100], encoding="utf-8")
        assert "not a readable notebook" in watching.next()["error"]
        terminal.copy.write_text(text, encoding="utf-8")
        assert watching.next() == {"21.1": "passed", "21.2": "unattempted"}
        family = watching.family()
        os.killpg(watching.process.pid, signal.SIGINT)
        assert watching.process.wait(20) == 0
        assert psutil.wait_procs(family, timeout=10)[1] == []
    finally:
        if watching.process.poll() is None:
            os.killpg(watching.process.pid, signal.SIGKILL)
        out, errors = watching.process.communicate()
    assert (out, errors.strip()) == ("", "Stopped watching.")


@posix_only
def test_ctrl_c_in_the_middle_of_a_check_leaves_no_process(terminal: Terminal) -> None:
    terminal("start", "21")
    terminal.write("mean = ...", "import time, pathlib\npathlib.Path('begun').touch()\ntime.sleep(60)")
    process = subprocess.Popen(
        [*COMMAND, "check", "21"], cwd=terminal.folder, env=terminal.environment, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    begun, end = terminal.folder / "work" / "begun", time.monotonic() + 60
    while not begun.exists():
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.05)
    family = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert errors.startswith("error: interrupted") and "Traceback" not in errors
    assert psutil.wait_procs(family, timeout=10)[1] == []
