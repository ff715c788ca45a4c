"""How long until a learner knows which answers are right, beside nbgrader's autograde of the same notebook?

The notebook is a learner's copy in which all exercises are answered. Both run it in a fresh process and judge each
exercise. Ours leaves out the cells that a lesson tags as of no use to its exercises, and draws no plots; nbgrader runs
every cell. `check` is the whole command, from the shell and back; a save under watch is what a save takes while `watch`
runs. nbgrader's database and assignment are made beforehand. Each is run in turn, several times; the median counts.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from apart import keys_of_its_own

from mlops_course.course.checking import check_notebook
from mlops_course.course.copies import make_copy
from mlops_course.course.lessons import Lesson, belongs_to, notebook_text, read_lesson
from mlops_course.environment import Settings, load_settings

ROOT = Path(__file__).resolve().parent.parent
WANTED = 5.0  # times faster than nbgrader, and seconds that a check may take
COMMAND = [sys.executable, "-c", "from mlops_course.commands.learn import learn_app; learn_app()"]


def answered_copy(lesson: Lesson) -> str:
    """A learner's copy with all solutions in it."""
    copy = make_copy(lesson)
    for cell in copy["cells"]:
        number = belongs_to(cell)
        if number:
            cell["source"] = lesson.exercises[number].source
    return notebook_text(copy)


def seconds(command: list[str], folder: Path, environment: dict[str, str]) -> float:
    """One run that has to succeed."""
    begin = time.perf_counter()
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command[:3])} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return time.perf_counter() - begin


def prepare_nbgrader(nbgrader: str, lesson: Lesson, folder: Path, environment: dict[str, str]) -> list[str]:
    """nbgrader's course: the lesson as its assignment, the answered copy as handed in; the command to time."""
    for place, text in (("source", lesson.path.read_text("utf-8")), ("submitted/learner", answered_copy(lesson))):
        path = folder / place / "lesson" / lesson.path.name
        path.parent.mkdir(parents=True)
        path.write_text(text, encoding="utf-8")
    kernel = folder / "jupyter" / "kernels" / "python3" / "kernel.json"  # nbgrader may live in another environment
    kernel.parent.mkdir(parents=True)
    argv = f'["{sys.executable}", "-m", "ipykernel_launcher", "-f", "{{connection_file}}"]'
    kernel.write_text(f'{{"argv": {argv}, "display_name": "python3", "language": "python"}}', encoding="utf-8")
    seconds([nbgrader, "generate_assignment", "lesson", "--create"], folder, environment)
    return [nbgrader, "autograde", "lesson", "--create", "--force", "--ExecutePreprocessor.timeout=600"]


def measure(
    lesson: Lesson, nbgrader: str | None, repeat: int, settings: Settings, folder: Path
) -> dict[str, list[float]]:
    """Seconds of each way, in turn."""
    environment = {**os.environ, "MLOPS_COURSE_HOME": str(settings.home), "JUPYTER_PATH": str(folder / "jupyter")}
    environment |= {"MLOPS_COURSE_LESSONS": str(lesson.path.parent)}
    if nbgrader:
        environment["PATH"] = os.pathsep.join([str(Path(nbgrader).parent), os.environ["PATH"]])
        grade = prepare_nbgrader(nbgrader, lesson, folder, environment)
    copy = folder / "work" / lesson.path.name
    copy.parent.mkdir()
    copy.write_text(answered_copy(lesson), encoding="utf-8")
    found: dict[str, list[float]] = {}
    os.environ["MLOPS_COURSE_HOME"] = str(settings.home)
    check_notebook(lesson, copy, home=settings.home)  # compiles, warms the disk's cache and the engine
    for _ in range(repeat):
        command = [*COMMAND, "check", f"{lesson.number}", "--json"]
        found.setdefault("mlops-course check", []).append(seconds(command, folder, environment))
        found.setdefault("a save under watch", []).append(check_notebook(lesson, copy, home=settings.home).seconds)
        if nbgrader:
            found.setdefault("nbgrader autograde", []).append(seconds(grade, folder, environment))
    return found


def main() -> int:
    """Print the table; 1 when ours is slower than wanted."""
    keys_of_its_own()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lesson", nargs="?", type=Path, default=ROOT / "nbs" / "05_data.ipynb")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--home", type=Path, help="a workspace that has what the lesson needs; none: one is made")
    parser.add_argument("--nbgrader", default=shutil.which("nbgrader"), help="its command; it may live elsewhere")
    options = parser.parse_args()
    lesson = read_lesson(options.lesson.resolve())
    with tempfile.TemporaryDirectory() as name:
        settings = load_settings(home=options.home or Path(name) / "workspace").prepare()
        found = measure(lesson, options.nbgrader, options.repeat, settings, Path(name))
    print(f"{lesson.path.name + ', median of ' + str(options.repeat):<36}{'seconds':>8}{'fastest':>9}")
    middle = {way: statistics.median(times) for way, times in found.items()}
    for way, times in found.items():
        print(f"{way:<36}{middle[way]:>8.2f}{min(times):>9.2f}")
    own = middle["mlops-course check"]
    if "nbgrader autograde" not in found:
        print("nbgrader is not here: name its command with --nbgrader")
        return int(own > WANTED)
    grade = middle["nbgrader autograde"]
    print(f"check: {grade / own:.1f} x faster, watch: {grade / middle['a save under watch']:.1f} x faster")
    return int(own > WANTED or grade / own < WANTED)


if __name__ == "__main__":
    sys.exit(main())
