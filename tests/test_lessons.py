"""Every lesson keeps its promises: stubs stay unattempted, wrong answers fail, solutions pass, each cell shows what is
saved below it, labs can be fixed. The course's own engine runs them, which is much faster; that it shows what a stock
kernel shows has tests of its own.
"""

import re
from pathlib import Path
from typing import Any

import pytest

from mlops_course.course.lessons import Lesson, belongs_to, find_lessons, read_lesson, tags
from mlops_course.course.names import bound_names, free_names
from mlops_course.course.prove import prove
from mlops_course.pipelines.engine import WarmEngine

CHECKED = [lesson for lesson in map(read_lesson, find_lessons()) if lesson.exercises]
USED_INSIDE = """
import deltalake, matplotlib.pyplot, mlflow.sklearn, mlflow.store.model_registry.sqlalchemy_store
import mlflow.store.tracking.sqlalchemy_store, onnxruntime, pandera.pandas, skl2onnx, skops.io, sklearn.ensemble
"""


@pytest.fixture(scope="module")
def packages_imported_once() -> None:
    """The lessons run in copies of one process: in that one, all is imported that they and our package use."""
    cells = [cell for lesson in CHECKED for cell in lesson.notebook["cells"] if cell["cell_type"] == "code"]
    WarmEngine.warm_up([USED_INSIDE, *(cell["source"] for cell in cells)])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("lesson", CHECKED, ids=lambda lesson: lesson.name)
def test_a_lesson_keeps_its_promises(
    lesson: Lesson, packages_imported_once: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "workspace"
    monkeypatch.setenv("MLOPS_COURSE_HOME", str(home))
    monkeypatch.delenv("MPLBACKEND", raising=False)
    assert [str(proof) for proof in prove(lesson, home) if not proof.ok] == []


@pytest.mark.parametrize("lesson", CHECKED, ids=lambda lesson: lesson.name)
def test_a_lesson_has_what_every_section_has(lesson: Lesson) -> None:
    assert 4 <= len(lesson.exercises) <= 7
    assert 5 <= len(lesson.questions) <= 8
    assert lesson.lab is not None


def only_for_checks(lesson: Lesson) -> list[str]:
    """The cells, not folded in a learner's copy, that define what checks need and nobody else, not even indirectly."""
    cells = [cell for cell in lesson.notebook["cells"] if cell["cell_type"] == "code"]
    read = {id(cell): names_read(cell["source"]) for cell in cells}
    users = {id(cell) for cell in cells if belongs_to(cell, "check")}
    others = [cell for cell in cells if not belongs_to(cell) and not cell.get("outputs") and "def " in cell["source"]]
    found: list[Any] = []
    while others:
        given = {id(cell): names_given(cell["source"]) for cell in others}
        readers = {own: {other for other in read if other != own and read[other] & given[own]} for own in given}
        more = [cell for cell in others if readers[id(cell)] and readers[id(cell)] <= users]
        if not more:
            break
        found += more
        users |= {id(cell) for cell in more}
        others = [cell for cell in others if cell not in more]
    return [cell["source"] for cell in found if "helper" not in tags(cell)]


def names_read(source: str) -> frozenset[str]:
    """What a cell reads; of one with magic in it, each word."""
    try:
        return free_names(source)
    except SyntaxError:
        return frozenset(re.findall(r"\w+", source))


def names_given(source: str) -> frozenset[str]:
    """What a cell gives; one with magic in it nothing."""
    try:
        return bound_names(source)
    except SyntaxError:
        return frozenset()


@pytest.mark.parametrize("lesson", CHECKED, ids=lambda lesson: lesson.name)
def test_what_only_checks_need_is_folded_in_a_learners_copy(lesson: Lesson) -> None:
    assert sum(source.count("\n") + 1 for source in only_for_checks(lesson)) <= 40
