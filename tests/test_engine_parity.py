"""Whole notebooks, of the kinds that papermill, nbclient and ploomber-engine test with, run warm and by a stock kernel.

Both runs go through `papermill.execute_notebook`. They must agree cell by cell, and in what is raised. Where they
differ, the table says why the difference is for the better; a reason whose difference is gone fails, too.
"""

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nbformat
import papermill
import pytest
from engine_helpers import comparable, normal
from run_rules import each_fourth

from mlops_course.pipelines import engine
from mlops_course.pipelines.engine.recording import KernelDied
from mlops_course.pipelines.engine.requests import TimedOut

NOTEBOOKS = Path(__file__).parent / "engine_notebooks"
pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform == "win32", reason="the notebooks speak to a shell")]


@dataclass
class Case:
    """How a notebook is run, and in what the warm run differs for the better."""

    options: dict[str, Any] = field(default_factory=dict)
    better: dict[str, str] = field(default_factory=dict)  # what differs: why that is better
    attempts: int = 1  # of the stock kernel, where chance decides whether it dies before it has replied


NO_MESSAGE = "papermill's error has neither class nor text for what only a kernel's reply tells; mine has both"
LATE = "the stock kernel loses what is printed after the last cell; mine shows it there"
CUT_OFF = "the stock kernel is ended 2.5 seconds after its last cell, and the file is never written"
HALF = "the stock kernel replaces half a character; mine spells it out"
NO_NAME = "a notebook that names no kernel is refused by papermill; mine takes it for Python"
NOTHING_RUN = "papermill writes a notebook in which no cell has run, as completed; mine writes none"
WHERE = "papermill raises nbclient's error and saves a notebook that looks completed; mine names cell and cause in both"
LEAVES = "papermill goes on after a cell that asks to leave; mine ends the notebook there, with success"
READ = ("outputs", "counts", "states", "sources", "facts")
ENDED = dict.fromkeys(("raises", "outputs", "states", "sources", "facts"), WHERE)

CASES: dict[str, Case] = {path.stem: Case() for path in sorted(NOTEBOOKS.glob("*.ipynb"))} | {
    "parameters": Case({"parameters": {"name": "you", "times": 2}}),
    "parameters_typed": Case({"parameters": {"label": None, "ratio": float("inf"), "words": ["a 'b'", 'c "d"']}}),
    "parameters_untagged": Case({"parameters": {"extra": {"key": [1, None, True]}}}),
    "parameters_again": Case({"parameters": {"size": 3}, "report_mode": True}),
    "errors_allowed": Case({"allow_errors": True}),
    "errors_by_name": Case({"allow_error_names": ["ValueError"]}),
    "cells_skipped": Case({"skip_cells_with_tag": "skip-execution"}),
    "exit_shell": Case(better=dict.fromkeys(("outputs", "counts", "states"), LEAVES), attempts=8),
    "quit_shell": Case(better=dict.fromkeys(("outputs", "counts", "states"), LEAVES), attempts=8),
    "fails_line_magic": Case(better={"raises": NO_MESSAGE, "outputs": NO_MESSAGE}),
    "fails_cell_magic": Case(better={"raises": NO_MESSAGE, "outputs": NO_MESSAGE}),
    "work_after_the_end": Case(better={"outputs": LATE}),
    "work_long_after_the_end": Case(better={"files": CUT_OFF}),
    "half_character": Case(better={"outputs": HALF}),
    "no_kernelspec": Case(better=dict.fromkeys(("raises", "language", *READ), NO_NAME)),
    "version_3": Case(better=dict.fromkeys(("raises", "language", *READ), NO_NAME)),
    "other_kernel": Case(better=dict.fromkeys(READ, NOTHING_RUN)),
    "other_language": Case(better=dict.fromkeys(("language", *READ), NOTHING_RUN)),
    "killed": Case(better=ENDED),
    "too_slow": Case({"execution_timeout": 2}, better=ENDED),
}


@pytest.fixture(autouse=True, scope="module")
def close_engine() -> Iterator[None]:
    yield
    engine.close_kept()


@pytest.mark.parametrize("name", each_fourth(CASES))
def test_a_notebook_ends_as_with_the_stock_kernel(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINE_FOR_THIS_TEST", "yes")
    monkeypatch.delenv("PYTEST_CURRENT_TEST")  # with it, the stock kernel doesn't look at file descriptors
    stock, warm = run_stock(name, tmp_path), run(name, "mlops-course", tmp_path)
    different = {aspect: (stock[aspect], warm[aspect]) for aspect in stock if stock[aspect] != warm[aspect]}
    assert {aspect: pair for aspect, pair in different.items() if aspect not in CASES[name].better} == {}
    assert set(CASES[name].better) == set(different), "it doesn't differ any more: take the reason away"


def run_stock(name: str, folder: Path) -> dict[str, Any]:
    """What is to be seen of the stock kernel's run; one that died by chance doesn't count."""
    for attempt in range(CASES[name].attempts):
        found = run(name, None, folder / str(attempt) if attempt else folder)
        if not found["raises"]:
            break
    return found


def run(name: str, kind: str | None, folder: Path) -> dict[str, Any]:
    """What is to be seen of one run."""
    here, output = folder / str(kind) / "x", folder / f"{kind}.ipynb"
    here.mkdir(parents=True)
    (here / "beside.txt").write_text("a file beside it")
    (here / "helper_beside.py").write_text("WORD = 'imported'")
    given = {"progress_bar": False, "cwd": here, "engine_name": kind, **CASES[name].options}
    raised: tuple[Any, ...] = ()
    try:
        papermill.execute_notebook(NOTEBOOKS / f"{name}.ipynb", output, **given)
    except papermill.PapermillExecutionError as error:
        raised = (error.cell_index, error.exec_count, error.ename, normal(error.evalue))
    except Exception as error:
        raised = (type(error).__name__, str(error))
    return {"raises": raised, "files": sorted(path.name for path in here.glob("*.txt")), **look(output)}


def look(output: Path) -> dict[str, Any]:
    """What stands in an executed notebook."""
    made = nbformat.read(output, 4) if output.exists() else nbformat.v4.new_notebook()
    code = [cell for cell in made.cells if cell.cell_type == "code"]
    facts = made.metadata.get("papermill", {})
    return {
        "outputs": [[plain(one) for one in comparable(cell)] for cell in code],
        "counts": [cell.execution_count for cell in code],
        "states": [
            [cell.metadata.get("papermill", {}).get(key) for key in ("status", "exception")] for cell in made.cells
        ],
        "sources": [(cell.cell_type, cell.source, cell.metadata.get("tags")) for cell in made.cells],
        "facts": {name: facts.get(name) for name in ("parameters", "exception")},
        "language": made.metadata.get("language_info"),
        "widgets": made.metadata.get("widgets"),
    }


def plain(output: Any) -> Any:
    """An output without the kernel's own code in its traceback."""
    if output["output_type"] == "error":
        return {**output, "traceback": [frame for frame in output["traceback"] if "ipykernel/" not in frame]}
    return output


# ---------------------------------------------------------------- in what the warm run is better


def test_what_is_printed_after_the_last_cell_is_shown_there(tmp_path: Path) -> None:
    found = run("work_after_the_end", "mlops-course", tmp_path)
    assert found["raises"] == () and "late.txt" in found["files"]
    assert found["outputs"][-1] == [
        {"name": "stdout", "output_type": "stream", "text": "the last cell\nprinted late\n"}
    ]


def test_long_work_is_finished(tmp_path: Path) -> None:
    found = run("work_long_after_the_end", "mlops-course", tmp_path)
    assert found["raises"] == () and "late.txt" in found["files"]


def test_a_magic_that_fails_says_why(tmp_path: Path) -> None:
    found = run("fails_line_magic", "mlops-course", tmp_path)
    assert found["raises"][2:] == ("UsageError", "Line magic function `%no_such_line_magic` not found.")


def test_half_characters_are_spelled_out(tmp_path: Path) -> None:
    found = run("half_character", "mlops-course", tmp_path)
    assert [cell[0].get("text") or cell[0]["data"]["text/plain"] for cell in found["outputs"]] == [
        "caf\\udce9\n",
        "'\\ud83d'",
    ]


@pytest.mark.parametrize(("name", "mine"), [("killed", KernelDied), ("too_slow", TimedOut)])
def test_what_ends_badly_says_where(name: str, mine: type[Exception], tmp_path: Path) -> None:
    found = run(name, "mlops-course", tmp_path)
    assert found["raises"][0] == mine.__name__
    assert f"{name}.ipynb, cell [2]" in found["raises"][1]
    assert [state for state, _ in found["states"] if state] == ["completed", "failed", "pending"]


def test_the_command_line_ends_with_the_status_that_papermill_has_for_a_dead_kernel(tmp_path: Path) -> None:
    command = ["papermill", str(NOTEBOOKS / "killed.ipynb"), str(tmp_path / "out.ipynb"), "--engine", "mlops-course"]
    done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True)
    assert done.returncode == 138
    assert "cell [2] `import os`: WorkerDied: its process was ended by SIGKILL" in done.stderr
