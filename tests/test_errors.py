"""Every error class of the package can leave the process in which it was raised, with all that it says."""

import copy
import importlib
import inspect
import multiprocessing
import pickle
import pkgutil
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nbformat
import papermill
import pytest

import mlops_course
from mlops_course.environment import CourseError
from mlops_course.pipelines.engine.requests import NotebookError, Place, TimedOut

PLACE = Place(Path("in.ipynb"), Path("out.ipynb"), 2, "train()", 3)
STAGE = SimpleNamespace(name="train", notebook=Path("train.ipynb"))
# How those are made that take something of their own.
MADE: dict[str, tuple[Any, ...]] = {
    "Problem": (422, "the temperature is text", "Give a number", "record.temp", 3, (("Retry-After", "1"),)),
    "AccessRefusal": (403, "not allowed", "Use another key", "role", "id", "predict"),
    "InputError": ("temp", "is text", "Give a number"),
    "LackingRowError": ("JFK", "temp"),
    "StageError": (
        SimpleNamespace(name="training", notebook=lambda stage: stage.notebook),
        STAGE,
        SimpleNamespace(notebook=Path("out.ipynb"), attempts=2),
        TimedOut(PLACE, "TimedOut", "it took too long"),
    ),
}


def error_classes() -> list[type[Exception]]:
    """All exception classes that the package's modules define."""
    found = set()
    for info in pkgutil.walk_packages(mlops_course.__path__, "mlops_course."):
        if not info.name.endswith("__main__"):
            module = importlib.import_module(info.name)
            found |= {
                value for value in vars(module).values() if inspect.isclass(value) and value.__module__ == info.name
            }
    return sorted(
        (each for each in found if issubclass(each, Exception)), key=lambda each: (each.__module__, each.__qualname__)
    )


CLASSES = error_classes()


def make(kind: type[Exception]) -> Exception:
    """One of a class; a class with an `__init__` of its own needs a line in MADE."""
    if issubclass(kind, NotebookError):
        return kind(replace(PLACE), "ValueError", "bad value")
    if kind.__name__ in MADE:
        return kind(*MADE[kind.__name__])
    return kind("what was wrong", "What to do") if issubclass(kind, CourseError) else kind("what was wrong")


def test_there_are_many() -> None:
    assert {"CourseError", "TimedOut", "WorkerDied", "CellError", "StageError"} <= {each.__name__ for each in CLASSES}


@pytest.mark.parametrize(
    "kind", CLASSES, ids=lambda kind: f"{kind.__module__.removeprefix('mlops_course.')}.{kind.__name__}"
)
def test_an_error_survives_pickling_and_copying(kind: type[Exception]) -> None:
    error = make(kind)
    error.add_note("a note")
    for other in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
        assert type(other) is kind
        assert str(other) == str(error) and other.args == error.args and other.__notes__ == ["a note"]
        assert {name: repr(value) for name, value in vars(other).items()} == {
            name: repr(value) for name, value in vars(error).items()
        }


# ---------------------------------------------------------------- programs that run notebooks in processes of their own

FORK = pytest.mark.skipif(sys.platform != "linux", reason="forks")


def execute(number: int, code: str, folder: str) -> tuple[int, str]:
    """Run a notebook with the warm engine."""
    metadata = {"kernelspec": {"name": "python3", "language": "python", "display_name": "Python 3"}}
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)], metadata=metadata)
    options = {"engine_name": "mlops-course", "progress_bar": False, "execution_timeout": 20}
    made = papermill.execute_notebook(notebook, f"{folder}/{number}.ipynb", **options)
    return number, made.cells[0].outputs[0].text


@pytest.mark.parametrize("method", [pytest.param("fork", marks=FORK), "spawn"])
def test_an_error_leaves_a_pool_and_the_pool_goes_on(method: str, tmp_path: Path) -> None:
    with ProcessPoolExecutor(1, multiprocessing.get_context(method)) as pool:
        failing = [
            pool.submit(execute, n, code, str(tmp_path)) for n, code in enumerate(["import os; os._exit(3)", "1 / 0"])
        ]
        with pytest.raises(CourseError, match=r"cell \[1\] .*exit status 3"):
            failing[0].result(120)
        with pytest.raises(papermill.PapermillExecutionError, match="division by zero"):
            failing[1].result(120)
        assert pool.submit(execute, 2, "print(6 * 7)", str(tmp_path)).result(120) == (2, "42\n")


@FORK
def test_children_that_a_program_forks_run_notebooks_of_their_own(tmp_path: Path) -> None:
    """After a run the program has warm workers; its children must not order from them."""
    assert execute(0, "print(0)", str(tmp_path)) == (0, "0\n")
    with multiprocessing.get_context("fork").Pool(2) as pool:
        jobs = [pool.apply_async(execute, (n, f"print({n})", str(tmp_path))) for n in range(1, 5)]
        assert [job.get(120) for job in jobs] == [(n, f"{n}\n") for n in range(1, 5)]
    assert execute(5, "print(5)", str(tmp_path)) == (5, "5\n")
