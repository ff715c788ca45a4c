"""Every lesson keeps its promises: stubs stay unattempted, wrong answers fail, solutions pass, labs break and mend."""

import shutil
from pathlib import Path

import pytest

from mlops_course.course.checkpoints import make_checkpoint
from mlops_course.course.lessons import Lesson, find_lessons, read_lesson
from mlops_course.course.prove import prove
from mlops_course.environment import load_settings

CHECKED = [lesson for lesson in map(read_lesson, find_lessons()) if lesson.exercises]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with everything that any lesson needs, made once."""
    home = tmp_path_factory.mktemp("made") / "workspace"
    needs = sorted({need for lesson in CHECKED for need in lesson.options.get("needs", [])})
    make_checkpoint(needs, load_settings(home=home).prepare())
    return home


@pytest.mark.slow
@pytest.mark.parametrize("lesson", CHECKED, ids=lambda lesson: lesson.name)
def test_a_lesson_keeps_its_promises(
    lesson: Lesson, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "workspace"
    shutil.copytree(made, home)
    monkeypatch.setenv("MLOPS_COURSE_HOME", str(home))
    assert [str(proof) for proof in prove(lesson, home) if not proof.ok] == []


@pytest.mark.parametrize("lesson", CHECKED, ids=lambda lesson: lesson.name)
def test_a_lesson_has_what_every_section_has(lesson: Lesson) -> None:
    assert 4 <= len(lesson.exercises) <= 7
    assert 5 <= len(lesson.questions) <= 8
    assert lesson.lab is not None
