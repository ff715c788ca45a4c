"""Every lesson keeps its promises: stubs stay unattempted, wrong answers fail, solutions pass, each cell shows what is
saved below it, labs can be fixed. The course's own engine runs them, which is much faster; that it shows what a stock
kernel shows has tests of its own.
"""

from pathlib import Path

import pytest

from mlops_course.course.lessons import Lesson, find_lessons, read_lesson
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
