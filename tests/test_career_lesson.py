"""Section 15: the lab refuses a repair that only moves the world; a right answer passes however it is written."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from mlops_course.course.lessons import Lesson, find_lesson
from mlops_course.environment import load_settings

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def lesson() -> Lesson:
    return find_lesson("15")


@pytest.fixture
def lab(lesson: Lesson, tmp_path: Path) -> Iterator[dict[str, Any]]:
    """The lab's names, with its flaws planted."""
    assert lesson.lab is not None
    scope: dict[str, Any] = {"__name__": "lab", "settings": load_settings(home=tmp_path).prepare()}
    for part in (lesson.lab.prepare, lesson.lab.check):
        exec(part, scope)
    scope["sound"](scope["settings"])
    exec(lesson.lab.breaks, scope)
    yield scope


def change(lab: dict[str, Any], edit: str) -> None:
    """Change the description by a line of code."""
    path: Path = lab["lab"] / "architecture.yaml"
    system, world = yaml.safe_load(path.read_text()), json.loads((lab["lab"] / "world.json").read_text())
    parts = {part["name"].rpartition("-")[0]: part for part in system["parts"]}
    exec(edit, {"system": system, "parts": parts, "world": world})
    path.write_text(yaml.safe_dump(system))


@pytest.mark.parametrize("time", range(5))
def test_each_time_three_flaws_are_found_and_the_repair_holds(lesson: Lesson, lab: dict[str, Any], time: int) -> None:
    with pytest.raises(AssertionError):
        lab["sound"](lab["settings"])
    assert lesson.lab is not None
    exec(lesson.lab.fix, lab)
    lab["sound"](lab["settings"])


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        ("system['parts'] = [each for each in system['parts'] if each is not parts['online']]", ""),
        ("system['promises']['label_days'] = 1", "isn't yours to decide"),
        ("system['promises']['watched'] = []", "isn't yours to decide"),
        ("parts['service'].update(needs=[], uses=[])", "forgotten it"),
        ("parts['service'].update(needs=[], uses=world['links'][parts['service']['name']]['needs'] "
         "+ world['links'][parts['service']['name']]['uses'])", "can't answer without"),
        ("parts['predictions'].update(keeps_days=0)", "denies it"),
        ("parts['predictions'].update(keeps_days=world['promises']['label_days'] - 1)", "deleted after"),
    ],
)  # fmt: skip
def test_a_repair_that_moves_the_world_is_refused(lesson: Lesson, lab: dict[str, Any], edit: str, words: str) -> None:
    assert lesson.lab is not None
    exec(lesson.lab.fix, lab)
    change(lab, edit)
    with pytest.raises(Exception, match=words):
        lab["sound"](lab["settings"])


STYLES = {
    "15.4": [
        "def weakest(reviews):\n    import pandas as pd\n    means = pd.DataFrame(reviews).mean().sort_index()\n"
        "    return None if means.empty else means.idxmin()",
        "def weakest(reviews):\n    names = sorted(set().union(*reviews))\n"
        "    def mean(name):\n        levels = [each[name] for each in reviews if name in each]\n"
        "        return sum(levels) / len(levels)\n    return min(names, key=mean) if names else None",
    ],
    "15.5": [
        "def alive(needs, gone):\n    down = set(gone)\n    for _ in needs:\n"
        "        down |= {part for part, each in needs.items() if down & set(each)}\n    return set(needs) - down",
        "def alive(needs, gone):\n    def dead(part, seen):\n        return part in gone or any(\n"
        "            dead(each, seen | {part}) for each in needs[part] if each not in seen)\n"
        "    return {part for part in needs if not dead(part, {part})}",
    ],
}


@pytest.mark.parametrize(("number", "answer"), [(number, each) for number, some in STYLES.items() for each in some])
def test_a_right_answer_passes_however_it_is_written(lesson: Lesson, number: str, answer: str) -> None:
    scope: dict[str, Any] = {}
    for cell in lesson.notebook["cells"]:
        if cell["cell_type"] == "code" and cell["source"].startswith(("import ", "SYSTEM =", "from mlops")):
            source = cell["source"].replace("system = read_architecture(SYSTEM)\nreview_architecture(system)", "")
            exec(source, scope)
    exec(answer, scope)
    exec(lesson.exercises[number].tests, scope)
