"""What a notebook shows can be its own: no output without a cell that makes it, and a copy says what it is."""

import ast
import re
from pathlib import Path
from typing import Any

import papermill
import pytest

from mlops_course.course.copies import make_copy
from mlops_course.course.lessons import find_lessons, notebook_text, read_lesson, read_notebook, tags
from mlops_course.course.outputs import changed_output
from mlops_course.course.running import MIME

Cell = dict[str, Any]


def run(notebook: Path, target: Path) -> list[Cell]:
    """All cells as papermill and a stock kernel leave them."""
    quiet = {"progress_bar": False, "log_output": False}
    how = {"cwd": str(notebook.parent), "kernel_name": "python3", "engine_name": "nbclient"}
    papermill.execute_notebook(str(notebook), str(target), **how, **quiet)
    parameters = {"injected-parameters"}
    return [cell for cell in read_notebook(target)["cells"] if not parameters & tags(cell)]


@pytest.mark.filterwarnings("ignore")
def test_the_checks_in_a_learners_copy_say_unattempted_in_a_stock_kernel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For the tests' own lesson: all copies are made alike, and test_lessons.py tries every stub of the course."""
    lesson = read_lesson(Path(__file__).with_name("lessons") / "21_numbers.ipynb")
    monkeypatch.setenv("MLOPS_COURSE_LESSONS", str(lesson.path.parent))
    copy = tmp_path / "work" / lesson.path.name
    copy.parent.mkdir()
    copy.write_text(notebook_text(make_copy(lesson)), encoding="utf-8")
    made = run(copy, tmp_path / "made.ipynb")
    outputs = [output for cell in made if cell["cell_type"] == "code" for output in cell["outputs"]]
    judged = [output["data"][MIME] for output in outputs if MIME in output.get("data", {})]
    assert {each["id"]: each["status"] for each in judged} == dict.fromkeys(lesson.exercises, "unattempted")
    assert [output for output in outputs if output["output_type"] == "error"] == []


NOTEBOOKS = sorted(find_lessons()[0].parent.rglob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_no_output_stands_below_a_cell_that_cannot_make_it(path: Path) -> None:
    """For every notebook, without running it: an empty cell shows nothing, a definition has no value, ..."""
    wrong = []
    for cell in read_notebook(path)["cells"]:
        if cell["cell_type"] != "code" or not cell["outputs"]:
            continue
        kinds = {output["output_type"] for output in cell["outputs"]}
        body = [] if re.search(r"^[%!]", cell["source"], re.MULTILINE) else ast.parse(cell["source"]).body
        calls = any(isinstance(node, ast.Call) for statement in body for node in ast.walk(statement))
        if "error" in kinds and "raises-exception" not in tags(cell):
            wrong.append(f"{cell['source'][:60]!r} shows an error and isn't marked as expecting it")
        if body and "execute_result" in kinds and not isinstance(body[-1], ast.Expr):
            wrong.append(f"{cell['source'][:60]!r} shows a value, but doesn't end in one")
        if not cell["source"].strip() or (body and kinds != {"execute_result"} and not calls):
            wrong.append(f"{cell['source'][:60]!r} shows {kinds}, but calls nothing")
    assert wrong == []


@pytest.mark.parametrize(
    ("saved", "made", "equal"),
    [
        ("0.743", "0.7431", True),
        ("0.680 late", "0.678 late", False),
        ("28,889 rows", "28,889 rows", True),
        ("28,889 rows", "27,889 rows", False),
        ("pandas 3.1.1", "pandas 3.1.1", True),
        ("late", "early", False),
    ],
)
def test_a_figure_that_no_cell_makes_is_noticed(saved: str, made: str, equal: bool) -> None:
    def cell(text: str) -> Cell:
        output = {"output_type": "execute_result", "data": {"text/plain": text}}
        return {"cell_type": "code", "source": "x", "metadata": {}, "outputs": [output]}

    assert (changed_output(cell(saved), cell(made)) == "") is equal


def test_an_error_that_is_another_one_or_is_gone_is_noticed() -> None:
    def stopped(name: str) -> Cell:
        error = {"output_type": "error", "ename": name, "evalue": "x", "traceback": ["line 3"]}
        return {"cell_type": "code", "source": "late[0]", "metadata": {}, "outputs": [error]}

    assert changed_output(stopped("KeyError"), stopped("KeyError")) == ""
    assert "ValueError" in changed_output(stopped("KeyError"), stopped("ValueError"))
    assert "shows {}" in changed_output(stopped("KeyError"), {**stopped(""), "outputs": []})
