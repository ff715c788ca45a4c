"""The course tool: learners' copies, and what becomes of an answer, whatever was done to the notebook around it."""

import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import nbformat
import pytest

from mlops_course.course import check, hint, solution, wrong_answers
from mlops_course.course.checking import Report, check_notebook
from mlops_course.course.copies import (
    cell_key,
    copy_of,
    make_copy,
    reset_exercise,
    start_copy,
    text_digest,
    update_copy,
)
from mlops_course.course.lessons import (
    Lesson,
    LessonError,
    belongs_to,
    find_exercise,
    find_lesson,
    make_stub,
    notebook_text,
    open_names,
    read_lesson,
    read_notebook,
    read_question,
    tags,
)
from mlops_course.course.notebook_api import Card, check_exercise, show_hint, show_solution
from mlops_course.course.progress import read_progress
from mlops_course.course.prove import Proof, prove_run, summary_lines
from mlops_course.environment import CourseError

LESSONS = Path(__file__).resolve().parent / "lessons"
MEAN, LATE = "mean = sum(delays) / len(delays)", "return delay > 15"


@pytest.fixture(autouse=True)
def course(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A learner's folder, and a course that has only the small lesson."""
    monkeypatch.setenv("MLOPS_COURSE_LESSONS", str(LESSONS))
    monkeypatch.delenv("MLOPS_COURSE_CHECKING", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "workspace").mkdir()
    (tmp_path / "workspace" / ".mlops_course").touch()
    return tmp_path


@pytest.fixture
def lesson() -> Lesson:
    """The small lesson, read afresh, so that a test may change it."""
    return read_lesson(LESSONS / "21_numbers.ipynb")


def changed(lesson: Lesson, tmp_path: Path, change: Any) -> Lesson:
    """The lesson from a file of its own, in which each cell went through a function that gives a list of cells."""
    cells = [new for cell in lesson.notebook["cells"] for new in change(dict(cell))]
    path = tmp_path / "changed" / lesson.path.name
    path.parent.mkdir(exist_ok=True)
    path.write_text(notebook_text({**lesson.notebook, "cells": cells}), encoding="utf-8")
    return read_lesson(path)


class Learner:
    """Somebody's copy, and what they write into it."""

    def __init__(self, lesson: Lesson) -> None:
        start_copy(lesson)
        self.lesson, self.path = lesson, copy_of(lesson)
        self.notebook = read_notebook(self.path)

    @property
    def cells(self) -> list[dict[str, Any]]:
        return self.notebook["cells"]

    def cell(self, number: str, kind: str = "exercise") -> dict[str, Any]:
        return next(cell for cell in self.cells if belongs_to(cell, kind) == number)

    def answer(self, number: str, code: str) -> "Learner":
        self.cell(number)["source"] = f"# Exercise {number}\n{textwrap.dedent(code)}"
        return self

    def all_right(self) -> "Learner":
        return self.answer("21.1", MEAN).answer("21.2", f"def late(delay):\n    {LATE}")

    def add(self, source: str, place: int | None = None) -> "Learner":
        cell = {"cell_type": "code", "id": f"own-{len(self.cells)}", "metadata": {}, "outputs": [], "source": source}
        self.cells.insert(len(self.cells) if place is None else place, {**cell, "execution_count": None})
        return self

    def save(self) -> Path:
        self.path.write_text(notebook_text(self.notebook), encoding="utf-8")
        return self.path

    def check(self, only: str | None = None, timeout: float | None = None) -> Report:
        return check_notebook(self.lesson, self.save(), only, timeout)


@pytest.fixture
def learner(lesson: Lesson) -> Learner:
    return Learner(lesson)


def statuses(report: Report) -> dict[str, str]:
    return {outcome.id: outcome.status for outcome in report.exercises}


def messages(report: Report) -> dict[str, str]:
    return {outcome.id: outcome.message for outcome in report.exercises}


# ---------------------------------------------------------------- reading a lesson


def test_a_lesson_holds_its_exercises_lab_and_quiz(lesson: Lesson) -> None:
    exercise = lesson.exercises["21.1"]
    assert (exercise.title, len(exercise.hints), len(exercise.wrong)) == ("the mean", 2, 3)
    assert exercise.solution == MEAN
    assert lesson.lab is not None and "def sound" in lesson.lab.check
    assert [sorted(question.right) for question in lesson.questions] == [[1], [0, 2]]
    assert lesson.questions[1].reason == "More than 15 minutes."


@pytest.mark.parametrize(
    ("stub", "names"),
    [
        ("a = ...", ["a"]),
        ("a, b = ..., ...", ["a", "b"]),
        ("a: float = ...", ["a"]),
        ("a = b = ...", ["a", "b"]),
        ("limit = 15\ndef f(x):\n    ...\nclass C:\n    ...", ["f", "C"]),
        ("a, b = ..., 1", []),
        ("print(...)", []),
        ("table[key] = ...", []),
        ("config.seed = ...", []),
    ],
)
def test_a_stub_leaves_names_open(stub: str, names: list[str]) -> None:
    assert open_names(stub) == names


def test_a_stub_can_always_run() -> None:
    source = "def f():\n    ### BEGIN SOLUTION\n    return 1\n    ### END SOLUTION\nx = 2"
    scope: dict[str, Any] = {}
    exec(make_stub(source), scope)
    assert (scope["f"](), scope["x"]) == (None, 2)


def test_the_line_decides_where_a_cell_belongs() -> None:
    cell = {"cell_type": "code", "metadata": {"nbgrader": {"grade_id": "exercise-5-2"}}, "source": "x = 1"}
    assert belongs_to(cell) == "5.2"
    assert belongs_to({**cell, "source": "\n#Exercise 5.3: again\nx = 1"}) == "5.3"
    assert belongs_to({**cell, "source": "# Check 5.3"}) is None
    assert belongs_to({**cell, "cell_type": "markdown"}) is None
    assert belongs_to({**cell, "metadata": {"nbgrader": None}}) is None


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("### END SOLUTION", "", "21.1 needs one solution"),
        ("# Exercise 21.1\n", "# Exercise 21.7\n", "21.7 has a second cell, or no heading"),
        ("### Exercise 21.2: late flights", "### Exercise 21.1: again", "21.1 is there twice"),
        ("### BEGIN HIDDEN TESTS", "###", "21.1 is checked without"),
        ('wrong_answers("21.1", {', 'wrong_answers("21.1", {**more, ', "wrong_answers is not plain text"),
    ],
)
def test_a_lesson_that_contradicts_itself_is_refused(
    lesson: Lesson, tmp_path: Path, old: str, new: str, said: str
) -> None:
    wrong = changed(lesson, tmp_path, lambda cell: [{**cell, "source": cell["source"].replace(old, new)}])
    with pytest.raises(LessonError, match=said):
        wrong.exercises  # noqa: B018


def test_a_question_without_a_reason_is_refused() -> None:
    with pytest.raises(LessonError, match=r"question 5\.1"):
        read_question("#### Question 5.1\n- [x] yes\n- [ ] no")
    assert read_question("just text") is None


@pytest.mark.parametrize("content", [None, "", "{}", '{"cells": 3}', '{"cells": [{"source": 3}]}', "\x00"])
def test_a_notebook_that_cannot_be_read_is_named(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "x.ipynb"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    with pytest.raises(LessonError, match=r"x\.ipynb"):
        read_notebook(path)


RIGHT = """**A loop**

```python
mean = 0
for delay in delays:
    mean += delay / 5
```

**Half**

```python
mean = 20
```
"""


def test_the_solution_is_tried_in_each_style_that_a_lesson_names(lesson: Lesson, tmp_path: Path) -> None:
    def add(cell: dict[str, Any]) -> list[dict[str, Any]]:
        styles = {"cell_type": "markdown", "id": "styles", "metadata": {"tags": ["right-answers"]}, "source": RIGHT}
        return [cell, styles] if 'wrong_answers("21.1"' in cell["source"] else [cell]

    styled = changed(lesson, tmp_path, add)
    assert list(styled.exercises["21.1"].right) == ["A loop", "Half"]
    assert not any("right-answers" in tags(cell) for cell in make_copy(styled)["cells"])
    proofs = {proof.what: proof.ok for proof in prove_run(styled, tmp_path / "workspace", "21.1")}
    assert proofs["21.1 in another style: A loop"] is True
    assert proofs["21.1 in another style: Half"] is False


def test_what_is_proved_is_told_with_the_styles_and_the_kinds_of_slips() -> None:
    found = [Proof("5.1 wrong answer 'boundary: > for >='", True, "No."), Proof("5.1 in another style: a loop", True)]
    assert summary_lines(found) == [
        "✓ 5.1  stub unattempted, 1 wrong answers refused (boundary), solution passes, in other styles, too (a loop)"
    ]


def test_reading_and_writing_changes_nothing(lesson: Lesson) -> None:
    assert notebook_text(lesson.notebook) == lesson.path.read_text(encoding="utf-8")


def test_unknown_sections_and_exercises_are_answered_with_the_known_ones() -> None:
    for number in ("5", "x", "", "-1"):
        with pytest.raises(LessonError, match="The sections are 21"):
            find_lesson(number)
    with pytest.raises(LessonError, match=r"Section 21 has 21\.1, 21\.2"):
        find_exercise("21.3")


# ---------------------------------------------------------------- the learner's copy


def test_a_copy_has_nothing_that_spoils(lesson: Lesson) -> None:
    copy = make_copy(lesson)
    text = "\n".join(cell["source"] for cell in copy["cells"])
    for spoiler in ("SOLUTION", "HIDDEN TESTS", "Hint", "wrong_answers(", "[x]", MEAN, LATE, "str(found[0])"):
        assert spoiler not in text
    assert not any(cell.get("outputs") for cell in copy["cells"])
    assert [cell["source"] for cell in copy["cells"] if belongs_to(cell, "check")] == ['check("21.1")', 'check("21.2")']
    assert "def sound" in text


def test_a_copy_folds_what_has_to_run_but_not_to_be_read(lesson: Lesson, tmp_path: Path) -> None:
    def mark(cell: dict[str, Any]) -> list[dict[str, Any]]:
        exported = {**cell, "source": f"#| export\n{cell['source']}"}
        return [exported if cell["source"].startswith("settings = load") else cell]

    cells = make_copy(changed(lesson, tmp_path, mark))["cells"]
    folded = [cell for cell in cells if cell["metadata"].get("jupyter", {}).get("source_hidden")]
    wanted = [cell for cell in cells if {"lab-prepare", "lab-check"} & tags(cell) or "#| export" in cell["source"]]
    assert folded == wanted and len(folded) > 2
    assert not any(belongs_to(cell) or belongs_to(cell, "check") for cell in folded)


def test_a_copy_is_a_valid_notebook_with_nbgraders_marks(lesson: Lesson, learner: Learner) -> None:
    notebook = nbformat.read(learner.path, as_version=4)
    nbformat.validate(notebook)
    marked = {cell.metadata.nbgrader.grade_id for cell in notebook.cells if "nbgrader" in cell.metadata}
    assert marked == {"exercise-21-1", "exercise-21-2", "check-21-1", "check-21-2"}


def test_start_never_writes_over_a_copy(learner: Learner) -> None:
    before = learner.answer("21.1", MEAN).save().read_bytes()
    assert start_copy(learner.lesson) is False
    assert learner.path.read_bytes() == before


def test_the_copy_is_found_from_below(learner: Learner, monkeypatch: pytest.MonkeyPatch) -> None:
    (learner.path.parent / "deep" / "er").mkdir(parents=True)
    monkeypatch.chdir(learner.path.parent / "deep" / "er")
    assert copy_of(learner.lesson) == learner.path


def test_the_copy_is_found_without_a_workspace(learner: Learner, course: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (course / "workspace" / ".mlops_course").unlink()
    monkeypatch.chdir(learner.path.parent)
    assert copy_of(learner.lesson) == learner.path


def test_reset_restores_one_stub_and_keeps_what_was_there(learner: Learner) -> None:
    learner.all_right().save()
    kept = reset_exercise("21.1")
    assert kept is not None and MEAN in kept.read_text(encoding="utf-8")
    assert statuses(check_notebook(learner.lesson, learner.path)) == {"21.1": "unattempted", "21.2": "passed"}


def test_a_stub_that_is_reset_is_not_kept(learner: Learner) -> None:
    assert reset_exercise("21.1") is None
    assert not (learner.path.parent / "kept").exists()


def test_reset_puts_a_deleted_cell_back_where_it_was(learner: Learner) -> None:
    order = [cell_key(cell) for cell in learner.cells]
    learner.cells.remove(learner.cell("21.2"))
    learner.save()
    assert reset_exercise("21.2") is None
    assert [cell_key(cell) for cell in read_notebook(learner.path)["cells"]] == order


def test_reset_of_a_copied_exercise_leaves_one_cell(learner: Learner) -> None:
    learner.answer("21.1", "mean = 1").add("# Exercise 21.1\nmean = 2").save()
    kept = reset_exercise("21.1")
    assert kept is not None and "mean = 1" in kept.read_text() and "mean = 2" in kept.read_text()
    assert [cell["source"] for cell in read_notebook(learner.path)["cells"]].count(
        learner.lesson.exercises["21.1"].stub
    )
    assert sum(belongs_to(cell) == "21.1" for cell in read_notebook(learner.path)["cells"]) == 1


# ---------------------------------------------------------------- a newer version of the lesson


def newer(cell: dict[str, Any]) -> list[dict[str, Any]]:
    """The next version: texts reworded, stub of 21.1 changed, one cell more, one fewer."""
    source = cell["source"].replace("mean = ...", "mean: float = ...").replace("The sum, divided", "The total, divided")
    if source.startswith("## Quiz"):
        return [{**cell, "source": "## Before the quiz", "id": "fresh001"}, cell]
    return [] if source.startswith("## 21.2 Lab") else [{**cell, "source": source}]


def test_an_update_replaces_what_is_untouched_and_keeps_what_is_not(learner: Learner, tmp_path: Path) -> None:
    lab = next(cell for cell in learner.cells if cell["source"].startswith("## 21.2 Lab"))
    assert text_digest(lab)
    learner.answer("21.1", MEAN).add("mine = 1", 3).save()
    found = update_copy(changed(learner.lesson, tmp_path, newer))
    texts = [cell["source"] for cell in read_notebook(learner.path)["cells"]]
    assert (found.replaced, found.added, found.removed, found.kept) == (1, 1, 1, ["# Exercise 21.1"])
    assert any("The total, divided" in text for text in texts)
    assert any(MEAN in text for text in texts)
    assert texts[3] == "mine = 1"
    assert texts.index("## Before the quiz") == texts.index("## Quiz") - 1
    assert not any(text.startswith("## 21.2 Lab") for text in texts)
    assert Path(found.saved).is_file()


def test_a_second_update_does_nothing(learner: Learner, tmp_path: Path) -> None:
    learner.answer("21.1", MEAN).save()
    lesson = changed(learner.lesson, tmp_path, newer)
    update_copy(lesson)
    before = learner.path.read_bytes()
    found = update_copy(lesson)
    assert (found.changed, found.saved) == (False, "")
    assert learner.path.read_bytes() == before


def test_an_update_leaves_order_deletions_and_copies_alone(learner: Learner, tmp_path: Path) -> None:
    late, quiz = learner.cell("21.2"), next(cell for cell in learner.cells if "#### Question 21.1" in cell["source"])
    learner.cells.remove(quiz)
    learner.cells.remove(late)
    learner.cells.insert(0, late)
    learner.cells.append({**late, "id": "copy", "source": "# Exercise 21.2\ncopied = 1"})
    learner.save()
    update_copy(changed(learner.lesson, tmp_path, newer))
    cells = read_notebook(learner.path)["cells"]
    assert belongs_to(cells[0]) == "21.2"
    assert cells[-1]["source"] == "# Exercise 21.2\ncopied = 1"
    assert not any("#### Question 21.1" in cell["source"] for cell in cells)


def test_an_update_of_a_copy_that_lost_its_memory_deletes_and_doubles_nothing(learner: Learner, tmp_path: Path) -> None:
    learner.answer("21.1", MEAN)
    del learner.notebook["metadata"]["mlops_course"]
    before = [cell["source"] for cell in read_notebook(learner.save())["cells"]]
    update_copy(changed(learner.lesson, tmp_path, newer))
    after = [cell["source"] for cell in read_notebook(learner.path)["cells"]]
    assert set(after) == {*before, "## Before the quiz"}
    assert len(after) == len(before) + 1


# ---------------------------------------------------------------- checking


def test_an_untouched_copy_is_unattempted_and_runs_to_its_end(learner: Learner) -> None:
    report = learner.check()
    assert statuses(report) == {"21.1": "unattempted", "21.2": "unattempted"}
    assert (report.problems, report.status) == ([], 3)


def test_right_answers_pass_however_they_are_written(learner: Learner) -> None:
    learner.answer("21.1", "total = sum(delays)\nmean = total / len(delays)  # hard work")
    report = learner.answer("21.2", "late = lambda delay: not delay <= 15").check()
    assert statuses(report) == {"21.1": "passed", "21.2": "passed"}
    assert report.status == 0


def test_comments_in_a_stub_are_no_attempt(learner: Learner) -> None:
    cell = learner.cell("21.1")
    cell["source"] += "\n\n# I'll think about it tomorrow."
    assert statuses(learner.check("21.1")) == {"21.1": "unattempted"}


def test_nbgraders_own_stub_is_no_attempt(learner: Learner) -> None:
    learner.answer("21.1", "mean = ...\n# YOUR CODE HERE\nraise NotImplementedError()")
    assert statuses(learner.check("21.1")) == {"21.1": "unattempted"}


ODD = "class Odd(AssertionError):\n    def __str__(self):\n        return 1 / 0"

TROUBLE = {
    "a syntax error": ("mean = (", r"SyntaxError.*line 2"),
    "a name that isn't there": ("mean = total / 5", r"NameError: name 'total'.*line 2: mean = total / 5"),
    "sys.exit": ("import sys\nsys.exit(3)", "sys.exit"),
    "an endless loop": ("while True:\n    pass", "did not end within 1 s"),
    "an endless loop that catches everything but bare": (
        "while True:\n    try:\n        1 / 0\n    except Exception:\n        pass",
        "did not end within 1 s",
    ),
    "an endless loop that can't be interrupted": (
        "while True:\n    try:\n        while sorted([1]):\n            sorted([1])\n    except:\n        pass",
        "could not be interrupted",
    ),
    "a C function that never returns": ("mean = sum(iter(int, 1))", "could not be interrupted"),
    "a killed process": ("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)", "ended the whole process"),
    "an exited process": ("import os\nos._exit(0)", "ended the whole process"),
    "an error that can't say what it is": (f"{ODD}\nraise Odd(5)", r"Odd: \(its text can't be shown\) \(line 5: raise"),
    "half an answer": ("mean = ...\nmean = [mean]", "one number, but it is"),
    "no number": ("mean = None", "should be one number"),
}


@pytest.mark.parametrize("trouble", TROUBLE)
def test_trouble_in_one_exercise_is_said_and_hides_no_other(learner: Learner, trouble: str) -> None:
    if os.name == "nt" and "process" in trouble:
        pytest.skip("POSIX signals")
    code, said = TROUBLE[trouble]
    report = learner.all_right().answer("21.1", code).check(timeout=1)
    assert statuses(report) == {"21.1": "failed", "21.2": "passed"}
    assert report.status == 1
    assert re.search(said, messages(report)["21.1"], re.DOTALL), messages(report)


def test_an_endless_loop_inside_a_function_is_found_by_its_check(learner: Learner) -> None:
    report = learner.all_right().answer("21.2", "def late(delay):\n    while True:\n        pass").check(timeout=1)
    assert statuses(report) == {"21.1": "passed", "21.2": "failed"}
    assert "did not end within 1 s" in messages(report)["21.2"]


@pytest.mark.parametrize("kind", ["AssertionError", "ValueError"])
def test_an_error_that_cannot_say_what_it_is_stops_no_check(learner: Learner, kind: str) -> None:
    code = f"{ODD.replace('AssertionError', kind)}\ndef late(delay):\n    raise Odd"
    report = learner.all_right().answer("21.2", code).check()
    assert statuses(report) == {"21.1": "passed", "21.2": "failed"}
    assert "(its text can't be shown)" in messages(report)["21.2"]


def test_a_cell_that_asks_for_input_is_told_why_it_gets_none(learner: Learner) -> None:
    said = messages(learner.all_right().answer("21.1", "mean = float(input())").check())["21.1"]
    assert "asks for input() (line 2: mean = float(input())): nobody answers while a check runs" in said


@pytest.mark.parametrize(
    "tests", ["assert mean > 900", "mean.no_such_thing", "raise ValueError('seen')", "1 / 0", "assert later(3)"]
)
def test_a_check_never_shows_a_line_of_its_own(learner: Learner, tests: str) -> None:
    learner.lesson.exercises["21.1"].tests = f"\n\n{tests}"
    said = messages(learner.all_right().check())["21.1"]
    assert said
    assert "line" not in said
    assert tests.removeprefix("assert ") not in said


def test_checks_do_not_come_from_the_learners_notebook(learner: Learner) -> None:
    """Deleted check cells, changed check cells, and a `check` of one's own change nothing."""
    learner.answer("21.1", "mean = 3").cell("21.1", "check")["source"] = "check = print"
    learner.cells.remove(learner.cell("21.2", "check"))
    report = learner.answer("21.2", f"def late(delay):\n    {LATE}").check()
    assert statuses(report) == {"21.1": "failed", "21.2": "passed"}
    assert "That is the median" in messages(report)["21.1"]


def test_reordered_exercises_are_found(learner: Learner) -> None:
    cell = learner.all_right().cell("21.2")
    learner.cells.remove(cell)
    learner.cells.insert(2, cell)
    assert statuses(learner.check()) == {"21.1": "passed", "21.2": "passed"}


@pytest.mark.parametrize("first", [True, False])
def test_of_a_copied_exercise_the_better_answer_counts(learner: Learner, first: bool) -> None:
    stub = learner.cell("21.1")["source"]
    learner.all_right()
    place = learner.cells.index(learner.cell("21.1"))
    learner.add(stub, place + (not first))
    report = learner.check()
    assert statuses(report) == {"21.1": "passed", "21.2": "passed"}
    assert report.notices == [
        "exercise 21.1 has 2 cells; the best of them counts. Delete those that you don't mean"
    ], "two cells for one exercise are mostly a slip"


def test_a_deleted_exercise_says_how_to_get_it_back(learner: Learner) -> None:
    learner.all_right().cells.remove(learner.cell("21.1"))
    report = learner.check()
    assert statuses(report) == {"21.1": "unattempted", "21.2": "passed"}
    assert "mlops-course reset 21.1" in messages(report)["21.1"]


def test_an_answer_in_another_cell_counts(learner: Learner) -> None:
    learner.all_right().cells.remove(learner.cell("21.1"))
    assert statuses(learner.add(MEAN).check()) == {"21.1": "passed", "21.2": "passed"}


def test_cells_of_the_learners_own_that_raise_are_reported(learner: Learner) -> None:
    report = learner.all_right().add("# my notes\nopen('no such file')").add("%time x = 1").add("!true").check()
    assert statuses(report) == {"21.1": "passed", "21.2": "passed"}
    assert [problem.source for problem in report.problems] == ["# my notes"]
    assert "No such file" in report.problems[0].message
    assert report.status == 1


def test_what_names_and_shell_a_learner_ruins_does_not_matter(learner: Learner) -> None:
    learner.add("assert = 3", 1).add("print = sum = len = None", 5).add("%reset -f", 5)
    report = learner.answer("21.2", f"def late(delay):\n    {LATE}").check()
    assert statuses(report)["21.2"] == "passed"


def test_one_exercise_is_checked_without_the_rest(learner: Learner) -> None:
    report = learner.all_right().add("1 / 0").answer("21.2", "while True: pass").check("21.1")
    assert (statuses(report), report.problems, report.status) == ({"21.1": "passed"}, [], 0)


def test_cells_that_a_check_leaves_out(learner: Learner) -> None:
    learner.all_right().add("1 / 0").cells[-1]["metadata"]["tags"] = ["skip-check"]
    learner.add("1 / 0").cells[-1]["metadata"]["tags"] = ["raises-exception"]
    learner.add("#| eval: false\n1 / 0")
    assert learner.check().problems == []


def test_a_check_does_not_touch_the_learners_names(lesson: Lesson, tmp_path: Path) -> None:
    def add(cell: dict[str, Any]) -> list[dict[str, Any]]:
        source = cell["source"].replace("assert isinstance(mean", "delays = mean\nassert isinstance(mean")
        return [{**cell, "source": source.replace('check("21.1")', 'check("21.1")\nsum(delays)')}]

    learner = Learner(changed(lesson, tmp_path, add))
    report = learner.all_right().add("assert delays == [3, -5, 40, 12, 0]").check()
    assert report.problems == []


def test_the_notebook_sees_its_own_folder(learner: Learner) -> None:
    (learner.path.parent / "notes.txt").write_text("hello", encoding="utf-8")
    assert learner.all_right().add("assert open('notes.txt').read() == 'hello'").check().problems == []


@pytest.mark.parametrize("trouble", ["an exited process", "a C function that never returns", "sys.exit"])
def test_papermills_own_engine_does_the_same(learner: Learner, trouble: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlops_course.course.checking._ENGINE", "an engine that isn't there")
    code, said = TROUBLE[trouble]
    report = learner.all_right().answer("21.1", code).check(timeout=1)
    assert statuses(report) == {"21.1": "failed", "21.2": "passed"}
    assert re.search(said, messages(report)["21.1"])


# ---------------------------------------------------------------- inside a notebook


def names(**more: Any) -> dict[str, Any]:
    return {"delays": [3, -5, 40, 12, 0], "median": lambda numbers: sorted(numbers)[2], "check": check, **more}


def checked(scope: dict[str, Any], number: str = "21.1") -> Card:
    found = check_exercise(number, scope)
    assert found is not None
    return found


def test_check_looks_at_the_names_of_its_caller(capsys: pytest.CaptureFixture[str]) -> None:
    exec("check('21.1')", names(mean=10.0))
    assert capsys.readouterr().out == "✓ Exercise 21.1: passed\n"


def test_check_in_a_notebook_judges_its_names(course: Path) -> None:
    assert checked(names(mean=...)).kind == "unattempted"
    assert checked(names()).kind == "unattempted"
    failed = checked(names(mean=3))
    assert failed.kind == "failed" and "That is the median" in repr(failed)
    bundle = checked(names(mean=10.0))._repr_mimebundle_()
    assert "passed" in bundle["text/plain"] and "#2da44e" in bundle["text/html"]
    assert read_progress(course / "workspace")["sections"]["21"]["exercises"]["21.1"]["status"] == "passed"


def test_a_functions_stub_is_unattempted_in_a_notebook(learner: Learner) -> None:
    program = f"""
        from IPython.core.interactiveshell import InteractiveShell
        shell = InteractiveShell()
        shell.run_cell("from mlops_course.course import check")
        for source in ({learner.cell("21.2")["source"]!r}, "def late(delay):\\n    return delay > 15"):
            shell.run_cell(source)
            shell.run_cell("check('21.2')")
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=True)
    assert re.findall(r"Exercise 21.2: (\w+)", done.stdout) == ["unattempted", "passed"]


def test_what_is_shown_cannot_be_taken_for_html() -> None:
    page = checked(names(mean="<script>alert(1)</script>"))._repr_mimebundle_()["text/html"]
    assert "<script>" not in page and "&lt;script&gt;" in page


def test_running_a_lessons_source_is_nobodys_progress(course: Path, lesson: Lesson) -> None:
    from nbclient import NotebookClient

    notebook = nbformat.read(lesson.path, as_version=4)
    NotebookClient(notebook, kernel_name="python3", timeout=60).execute()
    assert not (course / "workspace" / "progress.json").exists()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("passed" in output.get("data", {}).get("text/plain", "") for output in outputs) == 2


def test_hints_come_one_after_the_other(course: Path) -> None:
    assert [show_hint("21.1").text for _ in range(3)] == [
        "You need a sum and a count.",
        *["Python has `sum` and `len`."] * 2,
    ]


def test_a_solution_is_shown_after_a_pass_or_on_demand(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(CourseError, match="not passed yet"):
        solution("21.1")
    assert show_solution("21.1", yes=True).text == MEAN
    assert checked(names(mean=10.0)).kind == "passed"
    assert show_solution("21.1").text == MEAN
    solution("21.1")
    hint("21.1")
    assert capsys.readouterr().out.endswith("sum and a count.\n")


@pytest.mark.parametrize(
    "answers", [{}, {"a": ("x", "y")}, {"a": ("x", "y"), "b": "x"}, {"a": ("x", "y"), "b": ("x", " ")}]
)
def test_wrong_answers_are_declared_rightly(answers: Any) -> None:
    with pytest.raises(LessonError, match=r"5\.2"):
        wrong_answers("5.2", answers)


# ---------------------------------------------------------------- what the project's tools do to lessons


def test_nbdev_keeps_what_exercises_need(lesson: Lesson, root: Path, tmp_path: Path) -> None:
    """nbdev_clean strips metadata that settings.ini doesn't allow."""
    (tmp_path / "settings.ini").write_text((root / "settings.ini").read_text(encoding="utf-8"), encoding="utf-8")
    path = tmp_path / "nbs" / lesson.path.name
    path.parent.mkdir()
    path.write_bytes(lesson.path.read_bytes())
    program = "from nbdev.clean import nbdev_clean; import sys; nbdev_clean(sys.argv[1])"
    subprocess.run([sys.executable, "-c", program, path], cwd=tmp_path, check=True, capture_output=True)
    cleaned = json.loads(path.read_text(encoding="utf-8"))
    assert cleaned["metadata"]["mlops_course"] == lesson.options
    assert [cell["metadata"] for cell in cleaned["cells"]] == [cell["metadata"] for cell in lesson.notebook["cells"]]


# ---------------------------------------------------------------- nbgrader


@pytest.mark.slow
@pytest.mark.system
def test_nbgrader_makes_an_assignment_of_a_lesson(lesson: Lesson, tmp_path: Path) -> None:
    source = tmp_path / "source" / "numbers" / lesson.path.name
    source.parent.mkdir(parents=True)
    source.write_bytes(lesson.path.read_bytes())
    done = subprocess.run(
        [sys.executable, "-m", "nbgrader", "generate_assignment", "numbers", "--create"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
        env={**os.environ, "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    released = read_notebook(tmp_path / "release" / "numbers" / lesson.path.name)
    text = "\n".join(cell["source"] for cell in released["cells"] if "wrong-answers" not in tags(cell))
    for spoiler in ("SOLUTION", "HIDDEN TESTS", MEAN, LATE):
        assert spoiler not in text
    assert 'check("21.1")' in text and "raise NotImplementedError()" in text
    report = check_notebook(lesson, tmp_path / "release" / "numbers" / lesson.path.name)
    assert statuses(report) == {"21.1": "unattempted", "21.2": "unattempted"}
