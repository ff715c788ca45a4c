"""What `mlops-course start` gives to a learner runs from top to bottom before anything is filled in."""

from pathlib import Path

import pytest
from lesson_helpers import CHECKED, run_in_a_kernel

from mlops_course.course.copies import make_copy
from mlops_course.course.lessons import Lesson, notebook_text
from mlops_course.course.running import MIME


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("lesson", CHECKED, ids=lambda lesson: lesson.name)
def test_a_learners_copy_runs_through_papermill_with_every_exercise_unattempted(lesson: Lesson, tmp_path: Path) -> None:
    copy = tmp_path / "work" / lesson.path.name
    copy.parent.mkdir()
    copy.write_text(notebook_text(make_copy(lesson)), encoding="utf-8")
    made = run_in_a_kernel(copy, tmp_path / "made.ipynb")
    outputs = [output for cell in made if cell["cell_type"] == "code" for output in cell["outputs"]]
    judged = [output["data"][MIME] for output in outputs if MIME in output.get("data", {})]
    assert {each["id"] for each in judged} == set(lesson.exercises)
    assert {each["id"]: each["status"] for each in judged if each["status"] != "unattempted"} == {}
    assert [output for output in outputs if output["output_type"] == "error"] == []
