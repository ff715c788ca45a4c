"""What `tasks.py shape` counts is what is there."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "tools"))

import shape  # noqa: E402  (a script of tools/, not a part of the package)


def test_a_class_that_is_cut_into_steps_is_found_and_a_family_is_not() -> None:
    steps = "class A: pass\nclass B(A): pass\nclass C(B): pass\n"
    family = "class Shape: pass\nclass Round(Shape): pass\nclass Square(Shape): pass\n"
    errors = "class OwnError(Exception): pass\nclass Worse(OwnError): pass\n"
    assert shape.ladders(ast.parse(steps + family + errors)) == [["C", "B", "A"]]


def notebook(*cells: tuple[str, str, bool]) -> str:
    made = [
        {"cell_type": kind, "source": text, "metadata": {}, "outputs": [{}] * shown, "execution_count": None}
        for kind, text, shown in cells
    ]
    return json.dumps({"cells": made, "metadata": {}, "nbformat": 4, "nbformat_minor": 5})


def test_a_notebook_is_measured_by_its_lines_of_code(tmp_path: Path) -> None:
    export = ("code", "#| export\n# why\ndef one():\n    return 1\n", False)
    told = notebook(export, export, ("markdown", "and then", False), export, ("code", "one()\n\n# a comment", True))
    (tmp_path / "page.ipynb").write_text(told)
    found = shape.notebook_shape(tmp_path / "page.ipynb")
    assert found == {"exported": 6, "shown": 1, "share": 0.143, "first": 5, "cells": 5, "run": 2}
    (tmp_path / "page.ipynb").write_text(notebook(("code", "1 + 1", True)))
    assert shape.notebook_shape(tmp_path / "page.ipynb") is None


@pytest.mark.parametrize("arguments", [[], ["--json"]])
def test_it_prints_for_people_and_for_programs(arguments: list[str]) -> None:
    command = [sys.executable, str(ROOT / "tasks.py"), "shape", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    if arguments:
        assert {"notebooks", "ladders", "two_homes", "unused", "public", "lines"} <= set(json.loads(done.stdout))
    else:
        assert "reference pages" in done.stdout
        assert "classes in steps" in done.stdout


def test_the_source_keeps_to_its_limits() -> None:
    """What doesn't: `tasks.py shape` shows where. A limit is lowered when it was beaten, and never raised."""
    measured = shape.summary(shape.measure())
    assert shape.breaches(measured, shape.LIMITS) == []
    assert shape.breaches(shape.BARS, shape.LIMITS) == [], "a limit is never stricter than its bar"


def test_what_is_handed_on_or_registered_is_not_public() -> None:
    code = "from a import given\nagain = given\nLIMIT = 3\n@app.command()\ndef serve(): pass\ndef used(): pass\n"
    assert shape.public_names(ast.parse(code)) == ["LIMIT", "used"]


def test_a_promise_that_is_filled_in_is_no_ladder() -> None:
    code = "class Store(Protocol): pass\nclass FileStore(Store): pass\n"
    assert shape.ladders(ast.parse(code)) == []
