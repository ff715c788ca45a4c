"""The whole course as a learner plays it: the wheel, an empty folder, 15 sections one after the other.

The commands are the installed ones. After the first section they are given to one process that stays, as a shell would
stay open: it has everything imported, and each notebook and each step of a lab runs in a copy of it.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlops_course.course.checking import as_notebook
from mlops_course.course.lessons import (
    SECTIONS,
    Lesson,
    belongs_to,
    notebook_text,
    read_lesson,
    read_notebook,
    with_answer,
)

ROOT = Path(__file__).resolve().parent.parent
UPDATED = 7  # the section after which a newer version of the course comes
USED_INSIDE = """
import deltalake, matplotlib.pyplot, mlflow.sklearn, mlflow.store.model_registry.sqlalchemy_store
import mlflow.store.tracking.sqlalchemy_store, onnxruntime, pandera.pandas, skl2onnx, skops.io, sklearn.ensemble
"""
STAYS = f"""
import contextlib, io, json, os, sys
from pathlib import Path
import mlops_course.course.labs as labs
from mlops_course.cli import main
from mlops_course.course.checking import run_notebook
from mlops_course.course.lessons import find_lessons, read_lesson, read_notebook
from mlops_course.course.prove import _in_warm_process
from mlops_course.pipelines.engine import WarmEngine

cells = [cell for path in find_lessons() for cell in read_lesson(path).notebook["cells"]]
WarmEngine.warm_up([{USED_INSIDE!r}, *(cell["source"] for cell in cells if cell["cell_type"] == "code")])
labs._in_child = _in_warm_process  # else every step of a lab would import everything anew
answers = os.fdopen(os.dup(1), "w")


def run(order):
    if order[0] == "jupyter":  # the cells of a notebook, as JupyterLab runs them
        _, crash = run_notebook(read_notebook(Path(order[1])), Path(order[1]).parent, Path(order[1]).parent)
        return print(crash or "done")
    sys.argv[1:] = order
    main()


for line in sys.stdin:
    status = 0
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as errors:
        try:
            run(json.loads(line))
        except SystemExit as stop:
            status = stop.code or 0
    print(json.dumps([status, out.getvalue(), errors.getvalue()]), file=answers, flush=True)
"""


# ---------------------------------------------------------------- the course, installed


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, made of the clone as it is."""
    folder = tmp_path_factory.mktemp("wheel")
    steps = ["egg_info", "--egg-base", folder, "build", "--build-base", folder / "base"]
    steps += ["bdist_wheel", "--bdist-dir", folder / "files", "--dist-dir", folder / "dist"]
    subprocess.run([sys.executable, "setup.py", "--quiet", *steps], cwd=ROOT, check=True, capture_output=True)
    (made,) = (folder / "dist").glob("*.whl")
    return made


class Installed:
    """An environment that has our wheel, and beside it the packages of the clone's, but not the clone."""

    def __init__(self, folder: Path) -> None:
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
        self.python = folder / "bin" / "python"
        (self.packages,) = (folder / "lib").glob("python*/site-packages")
        others = Path(pytest.__file__).parent.parent
        (self.packages / "others.pth").write_text(f"{others}\n", encoding="utf-8")  # .pth files in there aren't read
        (folder / "share").symlink_to(Path(sys.prefix) / "share")  # Jupyter's kernels and templates
        self.path = os.pathsep.join([str(folder / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])

    def install(self, wheel: Path) -> None:
        command = ["uv", "pip", "install", "--quiet", "--offline", "--no-deps", "--reinstall", "--python", self.python]
        environment = {**os.environ, "PATH": self.path}
        subprocess.run([*command, wheel], env=environment, check=True)

    def lessons(self) -> list[Path]:
        return sorted((self.packages / "mlops_course" / "_notebooks").glob("[0-9][0-9]_*.ipynb"))

    def lesson(self, number: int) -> Lesson:
        return read_lesson(self.lessons()[number - 1])


# ---------------------------------------------------------------- the learner


class Learner:
    """Somebody in a folder that is empty at first, with a terminal and an editor."""

    def __init__(self, folder: Path, installed: Installed) -> None:
        self.folder, self.installed = folder, installed
        unknown = {"MLOPS_COURSE_HOME", "PYTHONPATH", "VIRTUAL_ENV", "MPLBACKEND"}
        known = {name: value for name, value in os.environ.items() if name not in unknown}
        self.environment = {**known, "PATH": installed.path, "COLUMNS": "160"}
        self.shell: subprocess.Popen[str] | None = None

    def stay(self) -> None:
        """From now on, commands are given to a process that stays."""
        self.shell = subprocess.Popen(
            [self.installed.python, "-c", STAYS], cwd=self.folder, env=self.environment,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def leave(self) -> None:
        if self.shell is not None:
            self.shell.communicate()

    def says(self, *arguments: str) -> tuple[int, str]:
        """A command's exit status, and what it prints."""
        if self.shell is None:
            options = {"cwd": self.folder, "env": self.environment, "capture_output": True, "text": True}
            done = subprocess.run(["mlops-course", *arguments], **options, check=False)
            status, out, errors = done.returncode, done.stdout, done.stderr
        else:
            assert self.shell.stdin is not None and self.shell.stdout is not None
            print(json.dumps(arguments), file=self.shell.stdin, flush=True)
            status, out, errors = json.loads(self.shell.stdout.readline())
        assert out, f"mlops-course {' '.join(arguments)}: {errors}"
        return status, out

    def __call__(self, *arguments: str) -> tuple[int, Any]:
        """A command's exit status, and the document that it prints."""
        status, out = self.says(*arguments, "--json")
        return status, json.loads(out)

    def copy(self, number: int) -> Path:
        """The notebook that `start` made."""
        (path,) = (self.folder / "work").glob(f"{number:02}_*.ipynb")
        return path

    def answer(self, lesson: Lesson, answers: dict[str, str]) -> None:
        """Write answers in the place of the stubs."""

        path = self.copy(lesson.number)
        notebook = read_notebook(path)
        for cell in notebook["cells"]:
            if (number := belongs_to(cell)) in answers:
                cell["source"] = with_answer(lesson.exercises[number].source, answers[number])
        path.write_text(notebook_text(notebook), encoding="utf-8")

    def written(self, number: int) -> dict[str, str]:
        """What stands in the cells of a copy that answer exercises."""
        cells = read_notebook(self.copy(number))["cells"]
        return {exercise: cell["source"] for cell in cells if (exercise := belongs_to(cell))}

    def repair(self, lesson: Lesson) -> None:
        """Do in a notebook of one's own, beside the copies, what the lab asks for."""
        assert lesson.lab is not None
        home = str(self.folder / "workspace")
        begin = f"import os\nos.environ['MLOPS_COURSE_HOME'] = {home!r}"  # as `mlops-course lab` does
        begin += "\nfrom mlops_course.environment import load_settings\nsettings = load_settings()"
        path = self.folder / "repairs" / f"{lesson.number}.ipynb"
        path.parent.mkdir(exist_ok=True)
        cells = as_notebook([begin, lesson.lab.prepare, lesson.lab.fix])
        path.write_text(notebook_text(cells), encoding="utf-8")
        if self.shell is None:
            self.stay()
        assert self.says("jupyter", str(path))[1] == "done\n"


@pytest.fixture
def learner(wheel: Path, tmp_path: Path) -> Iterator[Learner]:
    installed, folder = Installed(tmp_path / "environment"), tmp_path / "empty"
    installed.install(wheel)
    folder.mkdir()
    found = Learner(folder, installed)
    yield found
    found.leave()
    shutil.rmtree(tmp_path / "environment")


# ---------------------------------------------------------------- the way


def statuses(report: dict[str, Any]) -> dict[str, str]:
    return {each["id"]: each["status"] for each in report["exercises"]}


def row(learner: Learner, number: int) -> dict[str, Any]:
    """A section's line on the map of the course."""
    return next(each for each in learner("progress")[1]["sections"] if each["section"] == number)


PATIENT = ("--timeout", "600")  # seconds for a cell: other tests may keep the machine busy


def begin(learner: Learner, lesson: Lesson) -> None:
    """Start: nothing is attempted. The first answer is wrong, and hints help."""
    section, first = str(lesson.number), next(iter(lesson.exercises.values()))
    status, started = learner("start", section)
    assert (status, started["new"], started["title"]) == (0, True, lesson.title)
    now = row(learner, lesson.number)
    assert (now["begun"], now["passed"], now["lab"], now["quiz"]["right"]) == (True, [], "unattempted", 0)
    status, report = learner("check", first.id, *PATIENT)
    assert (status, statuses(report), report["problems"]) == (3, {first.id: "unattempted"}, [])
    assert [learner("hint", first.id)[1]["text"] for _ in range(2)] == first.hints


def finish(learner: Learner, lesson: Lesson) -> None:
    """Break, find, fix; a wrong answer among right ones; then the right one, and the quiz."""
    section, first = str(lesson.number), next(iter(lesson.exercises.values()))
    status, broken = learner("break", section)
    assert (status, broken["sound"]) == (0, False) and broken["symptom"]
    assert row(learner, lesson.number)["lab"] == "broken"
    learner.repair(lesson)
    answers = {name: each.solution for name, each in lesson.exercises.items()}
    learner.answer(lesson, {**answers, first.id: first.wrong[0].code})
    status, report = learner("check", section, *PATIENT)
    assert (status, report["problems"]) == (1, [])
    assert statuses(report) == {**dict.fromkeys(lesson.exercises, "passed"), first.id: "failed"}
    assert first.wrong[0].words in report["exercises"][0]["message"]
    assert report["lab"]["status"] == "passed"
    learner.answer(lesson, answers)
    assert statuses(learner("check", first.id, *PATIENT)[1]) == {first.id: "passed"}
    letters = ["".join("abcdefghijkl"[place] for place in sorted(each.right)) for each in lesson.questions]
    status, marked = learner("quiz", section, "--answers", ",".join(letters))
    assert (status, marked["right"]) == (0, len(lesson.questions))


def publish(learner: Learner) -> None:
    """What a newer version of the package brings: each lesson has another title, and a word more at its end."""
    for path in learner.installed.lessons():
        notebook = read_notebook(path)
        title = next(cell for cell in notebook["cells"] if cell["cell_type"] == "markdown")
        title["source"] = title["source"].replace("# ", "# Better: ", 1)
        notebook["cells"].append(
            {"cell_type": "markdown", "id": "afterword", "metadata": {}, "source": "That was all."}
        )
        path.write_text(notebook_text(notebook), encoding="utf-8")


def update(learner: Learner) -> None:
    """A newer version of the course; `update` brings it into the copies, and nothing of one's own is lost."""
    numbers = range(1, UPDATED + 1)
    before, answers = learner("progress")[1], [learner.written(number) for number in numbers]
    publish(learner)
    status, found = learner("update")
    changes = [(each["replaced"], each["added"], each["removed"], each["kept"]) for each in found]
    assert (status, changes) == (0, [(1, 1, 0, [])] * UPDATED)
    assert [learner.written(number) for number in numbers] == answers
    assert all(read_lesson(learner.copy(number)).title.startswith("Better: ") for number in numbers)
    assert done(learner("progress")[1]) == done(before)
    assert statuses(learner("check", "1.1")[1]) == {"1.1": "passed"}


def done(progress: dict[str, Any]) -> list[dict[str, Any]]:
    """A learner's map, without the clock."""
    return [{name: value for name, value in each.items() if name != "minutes"} for each in progress["sections"]]


@pytest.mark.thorough
@pytest.mark.slow
@pytest.mark.system
def test_the_whole_course_can_be_played_from_the_wheel_in_an_empty_folder(learner: Learner) -> None:
    for number in range(1, len(SECTIONS) + 1):
        lesson = learner.installed.lesson(number)
        begin(learner, lesson)
        finish(learner, lesson)
        if number == UPDATED:
            update(learner)
    found = learner("progress")[1]
    assert found["next"] == "You have done everything."
    assert [each["section"] for each in found["sections"]] == list(range(1, len(SECTIONS) + 1))
    assert [each["passed"] for each in found["sections"]] == [each["exercises"] for each in found["sections"]]
    assert {each["lab"] for each in found["sections"]} == {"passed"}
    assert all(each["quiz"]["right"] == each["quiz"]["of"] for each in found["sections"])
