"""The course tool's state: progress in one file, labs in the workspace, quizzes, and what lessons promise."""

import ast
import json
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mlops_course.course.labs import LabError, LabState, break_lab, check_lab, fix_lab, prove_lab, run_steps
from mlops_course.course.lessons import Lab, Lesson, find_lessons, read_lesson
from mlops_course.course.progress import (
    ProgressError,
    edit_progress,
    locked,
    migrate,
    note_outcomes,
    read_progress,
    section_of,
)
from mlops_course.course.prove import main as prove_main
from mlops_course.course.prove import prove, prove_run
from mlops_course.course.quiz import AnswerError, keep_answers, kept_answers, mark, mark_all
from mlops_course.course.running import ExerciseOutcome
from mlops_course.environment import WorkspaceError
from mlops_course.pipelines import find_pipeline

LESSONS = Path(__file__).resolve().parent / "lessons"


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "workspace"


@pytest.fixture
def lesson() -> Lesson:
    return read_lesson(LESSONS / "21_numbers.ipynb")


def status_of(home: Path, number: str) -> str:
    return read_progress(home)["sections"][number.split(".")[0]]["exercises"][number]["status"]


# ---------------------------------------------------------------- progress


def test_what_is_passed_stays_passed(home: Path) -> None:
    for status in ("unattempted", "failed", "passed", "failed", "unattempted"):
        note_outcomes(home, [ExerciseOutcome("5.1", status)])
    assert status_of(home, "5.1") == "passed"
    assert read_progress(home)["sections"]["5"]["exercises"]["5.1"]["tries"] == 3


def test_many_processes_lose_nothing(home: Path) -> None:
    """Each adds its own exercises to the same file, all at once."""
    program = """
        import sys
        from pathlib import Path
        from mlops_course.course.progress import note_outcomes
        from mlops_course.course.running import ExerciseOutcome
        for number in range(20):
            note_outcomes(Path(sys.argv[1]), [ExerciseOutcome(f"5.{sys.argv[2]}{number:02}", "passed")])
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(home)]
    processes = [subprocess.Popen([*command, str(number)]) for number in range(1, 5)]
    assert [process.wait(60) for process in processes] == [0] * 4
    assert len(read_progress(home)["sections"]["5"]["exercises"]) == 80


def test_a_killed_process_blocks_nobody(home: Path) -> None:
    program = """
        import sys, time
        from pathlib import Path
        from mlops_course.course.progress import edit_progress
        with edit_progress(Path(sys.argv[1])) as document:
            document["sections"]["1"] = {}
            print("held", flush=True)
            time.sleep(60)
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(home)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    process.kill()
    process.wait()
    process.stdout.close()
    note_outcomes(home, [ExerciseOutcome("5.1", "passed")])
    assert set(read_progress(home)["sections"]) == {"5"}


def test_who_waits_too_long_is_told(home: Path) -> None:
    with locked(home / "lock"), pytest.raises(ProgressError, match="another process"), locked(home / "lock", 0.1):
        pass


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe", b"[]", b"{}", b'{"schema": 1}', b'{"schema": 1, "sections": []}',
    b'{"schema": 1, "sections": {"5": 3}}', b'{"schema": 1, "sections": {"5": {"exercises": {"5.1": 1}}}}',
    b'{"schema": "x", "sections": {}}', b'{"schema": 0, "sections": {}}'],
)  # fmt: skip
def test_a_broken_file_is_put_aside_and_said(home: Path, content: bytes) -> None:
    home.mkdir()
    (home / "progress.json").write_bytes(content)
    notices = note_outcomes(home, [ExerciseOutcome("5.1", "passed")])
    aside = list(home.glob("progress.broken-*.json"))
    assert [path.read_bytes() for path in aside] == [content]
    assert aside[0].name in notices[0]
    assert status_of(home, "5.1") == "passed"
    assert note_outcomes(home, [ExerciseOutcome("5.2", "passed")]) == []


def test_older_files_are_brought_forward_and_newer_ones_left_alone(home: Path) -> None:
    steps: dict[int, Any] = {1: lambda old: {**old, "a": 1}, 2: lambda old: {**old, "b": old["a"] + 1}}
    assert migrate({"schema": 1, "x": 0}, steps, 3) == {"schema": 3, "x": 0, "a": 1, "b": 2}
    home.mkdir()
    text = json.dumps({"schema": 99, "sections": {}})
    (home / "progress.json").write_text(text, encoding="utf-8")
    with pytest.raises(ProgressError, match="newer version"):
        note_outcomes(home, [ExerciseOutcome("5.1", "passed")])
    assert (home / "progress.json").read_text(encoding="utf-8") == text


def test_what_a_later_version_added_is_kept(home: Path) -> None:
    home.mkdir()
    document = {"schema": 1, "sections": {"5": {"stars": 3}}, "theme": "dark"}
    (home / "progress.json").write_text(json.dumps(document), encoding="utf-8")
    note_outcomes(home, [ExerciseOutcome("5.1", "passed")])
    found = read_progress(home)
    assert (found["theme"], found["sections"]["5"]["stars"]) == ("dark", 3)


def test_a_change_that_fails_changes_nothing(home: Path) -> None:
    note_outcomes(home, [ExerciseOutcome("5.1", "passed")])
    before = (home / "progress.json").read_bytes()
    with pytest.raises(ZeroDivisionError), edit_progress(home) as document:
        document["sections"] = {}
        1 / 0  # noqa: B018
    assert (home / "progress.json").read_bytes() == before


def test_a_workspace_that_is_a_file_is_named(home: Path) -> None:
    home.write_text("", encoding="utf-8")
    with pytest.raises(WorkspaceError, match="workspace"):
        note_outcomes(home, [ExerciseOutcome("5.1", "passed")])


@pytest.mark.parametrize(("minutes", "counted"), [(5, 300), (29, 1740), (31, 0), (-5, 0)])
def test_time_is_counted_between_commands(
    home: Path, minutes: int, counted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from datetime import UTC, datetime, timedelta

    seen = (datetime.now(UTC) - timedelta(minutes=minutes)).isoformat()
    document: dict[str, Any] = {"sections": {"5": {"seen": seen, "seconds": 10}}}
    assert section_of(document, 5)["seconds"] == pytest.approx(10 + counted, abs=2)


# ---------------------------------------------------------------- labs


def test_a_lab_is_passed_only_after_it_was_broken_and_fixed(lesson: Lesson, home: Path) -> None:
    assert check_lab(lesson, home) == ("unattempted", "Start it: mlops-course break 21")
    assert "can't be computed" in break_lab(lesson, home).symptom
    found = check_lab(lesson, home)
    assert found is not None and found[0] == "failed" and "can't be computed" in found[1]
    with pytest.raises(LabError, match="broken already"):
        break_lab(lesson, home)
    (home / "numbers.json").write_text("[1, 2, 3]", encoding="utf-8")
    found = check_lab(lesson, home)
    assert found is not None and found[0] == "passed"
    break_lab(lesson, home)
    found = check_lab(lesson, home)
    assert found is not None and found[0] == "failed", "broken again"


def test_what_is_not_broken_is_not_fixed(lesson: Lesson, home: Path) -> None:
    with pytest.raises(LabError, match="is not broken, so there is nothing to fix"):
        fix_lab(lesson, home)
    break_lab(lesson, home)
    code, _ = fix_lab(lesson, home)
    assert fix_lab(lesson, home) == (code, None), "it can be read again, and nothing is done"


def test_a_lab_that_broke_while_something_went_wrong_can_be_fixed(
    lesson: Lesson, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut_off(lab: Lab, steps: list[str], where: Path) -> list[LabState]:
        states = run_steps(lab, steps, where)
        if steps != ["look"]:
            raise LabError("the lab did not end in time")
        return states

    with monkeypatch.context() as patched, pytest.raises(LabError, match="in time"):
        patched.setattr("mlops_course.course.labs.run_steps", cut_off)
        break_lab(lesson, home)
    with pytest.raises(LabError, match="broken already"):
        break_lab(lesson, home)
    _, state = fix_lab(lesson, home)
    assert state is not None and state.sound


def test_looking_at_the_repair_is_no_pass(lesson: Lesson, home: Path) -> None:
    break_lab(lesson, home)
    code, state = fix_lab(lesson, home)
    assert state is not None and state.sound and "int(number)" in code
    found = check_lab(lesson, home)
    assert found is not None and found[0] == "unattempted"


def test_a_workspace_that_is_not_sound_is_not_broken_further(lesson: Lesson, home: Path) -> None:
    home.mkdir()
    (home / "numbers.json").write_text('["1"]', encoding="utf-8")
    with pytest.raises(LabError, match="Something else is wrong"):
        break_lab(lesson, home)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"breaks": "pass"}, "after breaks it is sound"),
        ({"breaks": "json.loads = None"}, "after a second look it is sound"),
        ({"fix": "pass"}, "after fix it is broken"),
        ({"fix": "reset_all = 1"}, "the fix is a reset"),
        ({"prepare": "1 / 0"}, "step prepare failed: ZeroDivisionError"),
        ({"breaks": "import os; os._exit(3)"}, "status 3"),
        ({"check": "def sound(settings): raise ValueError('odd')"}, "ValueError: odd"),
    ],
)
def test_a_lab_that_proves_nothing_is_found(lesson: Lesson, home: Path, change: dict[str, str], said: str) -> None:
    home.mkdir()
    assert lesson.lab is not None
    vars(lesson)["lab"] = Lab(**{**vars(lesson.lab), **change})
    assert said in "; ".join(prove_lab(lesson, home))


# ---------------------------------------------------------------- quiz


def test_a_quiz_that_was_broken_off_goes_on_where_it_was_left(lesson: Lesson, home: Path) -> None:
    assert kept_answers(lesson, home) == []
    keep_answers(lesson, ["b"], home)
    assert kept_answers(lesson, home) == ["b"]
    mark_all(lesson, ["b", "ac"], home)
    assert kept_answers(lesson, home) == [], "it is over"


@pytest.mark.parametrize("begun", [[["print", "b"]], [["print"]], "junk", 7, [7]])
def test_answers_to_other_questions_are_not_taken_for_ours(lesson: Lesson, home: Path, begun: object) -> None:
    with edit_progress(home) as document:
        section_of(document, 21)["quiz"]["begun"] = begun
    assert kept_answers(lesson, home) == []


def test_a_question_with_another_text_is_asked_again(lesson: Lesson, home: Path) -> None:
    keep_answers(lesson, ["b"], home)
    lesson.questions[0] = replace(lesson.questions[0], options=("5", "6", "7"))
    assert kept_answers(lesson, home) == []


def test_a_quiz_counts_what_is_wholly_right(lesson: Lesson, home: Path) -> None:
    assert [each.correct for each in mark_all(lesson, ["b", "CA"], home)] == [True, True]
    assert [each.correct for each in mark_all(lesson, ["a", "a"], home)] == [False, False]
    assert read_progress(home)["sections"]["21"]["quiz"] == {"right": 2, "of": 2}, "the best result counts"


def test_answers_that_are_none_are_refused(lesson: Lesson, home: Path) -> None:
    with pytest.raises(AnswerError, match="Name one or more of a, b, c"):
        mark(lesson.questions[0], "z")
    with pytest.raises(AnswerError, match="3 answers to 2 questions"):
        mark_all(lesson, ["a", "b", "c"], home)


# ---------------------------------------------------------------- what a lesson promises


def test_the_small_lesson_holds_what_it_promises(lesson: Lesson, capsys: pytest.CaptureFixture[str]) -> None:
    assert [str(proof) for proof in prove(lesson) if not proof.ok] == []
    assert prove_main([str(lesson.path)]) == 0
    assert "all hold" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("exercise", "change", "said"),
    [
        ("21.1", {"tests": "assert True"}, "21.1 wrong answer 'the median': is passed, but should fail"),
        ("21.1", {"tests": "assert False, 'no'"}, "21.1 solution: no"),
        ("21.1", {"hints": ["one"]}, "21.1 has two hints: 1"),
        ("21.2", {"wrong": []}, "21.2 has wrong answers: 0"),
        ("21.2", {"tests": "assert late(15) is False and late(40), 'More than 15.'"}, "the message lacks"),
    ],
)
def test_a_broken_promise_is_found(lesson: Lesson, exercise: str, change: dict[str, Any], said: str) -> None:
    vars(lesson.exercises[exercise]).update(change)
    vars(lesson)["lab"] = None
    failed = [str(proof) for proof in prove(lesson) if not proof.ok]
    assert any(said in line for line in failed), failed


def test_a_lesson_whose_copy_does_not_run_is_found(lesson: Lesson) -> None:
    for cell in lesson.notebook["cells"]:
        if cell["source"].startswith("#### Question 21.1"):
            vars(lesson)["lab"] = None
            cell.update(cell_type="code", source="mean + 1", outputs=[], execution_count=None)
    failed = [str(proof) for proof in prove(lesson) if not proof.ok]
    assert any("copy, code cell" in line and "needs mean of 21.1" in line for line in failed), failed


def test_a_cell_that_is_meant_to_fail_is_no_failure_but_one_that_is_not_is(lesson: Lesson, tmp_path: Path) -> None:
    saved = {"output_type": "error", "ename": "ZeroDivisionError", "evalue": "", "traceback": []}
    own = {"cell_type": "code", "source": "1 / 0", "outputs": [saved], "metadata": {"tags": ["raises-exception"]}}
    lesson.notebook["cells"].append(own)
    assert [str(proof) for proof in prove_run(lesson, tmp_path) if not proof.ok] == []
    lesson.notebook["cells"].append({**own, "metadata": {}})
    failed = [str(proof) for proof in prove_run(lesson, tmp_path) if not proof.ok]
    assert len(failed) == 1 and "code cell 15: ZeroDivisionError" in failed[0], failed


def test_a_figure_that_no_cell_makes_is_found(lesson: Lesson) -> None:
    saved = next(cell for cell in lesson.notebook["cells"] if "sum(delays)" in cell["source"])
    saved["outputs"][0]["data"]["text/plain"] = "51"
    vars(lesson)["lab"] = None
    failed = [str(proof) for proof in prove(lesson) if not proof.ok and "lab" not in proof.what]
    assert len(failed) == 1 and "{'text/plain': '51'} is saved" in failed[0], failed


# ---------------------------------------------------------------- the course as a whole


def test_the_first_lesson_names_the_stages_of_the_real_pipeline() -> None:
    cells = json.loads((find_lessons()[0]).read_text(encoding="utf-8"))["cells"]
    found = next("".join(cell["source"]) for cell in cells if "".join(cell["source"]).startswith("needs = {"))
    needs = find_pipeline("training").needs
    assert ast.literal_eval(found.removeprefix("needs = ")) == {name: sorted(needs[name]) for name in sorted(needs)}


def test_importing_the_course_loads_nothing_heavy() -> None:
    program = "import sys, mlops_course.course, mlops_course.commands.learn; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded = {name.split(".")[0] for name in done.stdout.split()}
    assert loaded.isdisjoint({"papermill", "IPython", "nbformat", "pydantic", "pandas", "numpy", "rich"})
