"""Section 13's lesson: its lab refuses a repair that isn't one, and a right answer passes however it is written."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlops_course.course.lessons import Lesson, find_lesson, read_lesson, read_notebook, tags
from mlops_course.course.prove import prove_run
from mlops_course.environment import Settings, load_settings

pytestmark = pytest.mark.filterwarnings("ignore")

RESTORE = """
shutil.copytree(lab / "delivered" / "flight-delay@2", bundles_folder(lab_desk) / "flight-delay@2", dirs_exist_ok=True)
publish(lab_desk, "flight-delay@2")
"""
LEAKED = 'old = find_key(read_keys(lab_desk), (lab / "desk.key").read_text().strip())\n'
RENEW = 'write_atomic(lab / "desk.key", create_key(lab_desk, "desk", "predict").text, private=True)\n'
REVOKE = "revoke_key(lab_desk, old.id)\n"
CLEAR = 'write_notebook(lab / "look.ipynb", [])\n'
KEY = LEAKED + RENEW + REVOKE + CLEAR
ROTATE = """
from mlops_course.security import rotate_key
write_atomic(lab / "desk.key", rotate_key(lab_desk, old.id, OVERLAP).text, private=True)
"""


@pytest.fixture(scope="module")
def lesson() -> Lesson:
    return find_lesson("13")


@pytest.fixture(scope="module")
def broken(lesson: Lesson, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The lab's workspace with the fault in it, kept, and the place where it belongs: the ledger knows its home."""
    assert lesson.lab is not None
    home, kept = (tmp_path_factory.mktemp("lab13") / name for name in ("workspace", "kept"))
    settings = load_settings(home=home).prepare()
    scope: dict[str, Any] = {"__name__": "lab", "settings": settings}
    for part in (lesson.lab.prepare, lesson.lab.check, lesson.lab.breaks):
        exec(part, scope)
    shutil.copytree(home, kept)
    return home, kept


@pytest.fixture
def lab(lesson: Lesson, broken: tuple[Path, Path]) -> Iterator[dict[str, Any]]:
    """The names of the lab, in a workspace that is broken anew."""
    home, kept = broken
    shutil.rmtree(home)
    shutil.copytree(kept, home)
    settings: Settings = load_settings(home=home)
    scope: dict[str, Any] = {"__name__": "lab", "settings": settings}
    assert lesson.lab is not None
    exec(lesson.lab.prepare + "\n" + lesson.lab.check, scope)
    yield scope


@pytest.mark.parametrize(
    ("repair", "said"),
    {
        "none": ("", "isn't what was signed"),
        "the tampered model is signed": (
            'sign_bundle(bundles_folder(lab_desk) / "flight-delay@2", signing_key_file(lab_desk))\n' + KEY,
            "by our line it should be"),
        "the model before goes live, the tampered one is deleted": (
            'shutil.rmtree(bundles_folder(lab_desk) / "flight-delay@2")\npublish(lab_desk, "flight-delay@1")\n' + KEY,
            "is gone: a model"),
        "the tampered one stays where it is": ('publish(lab_desk, "flight-delay@1")\n' + KEY, "isn't what was signed"),
        "another key signs": (
            'shutil.rmtree(lab / "trust")\nfor version in (1, 2):\n'
            '    sign_bundle(bundles_folder(lab_desk) / f"flight-delay@{version}", signing_key_file(lab_desk))\n' + KEY,
            "is signed with the key"),
        "the output is cleared, the key stays": (RESTORE + CLEAR, "and it opens the door"),
        "both keys stay valid": (
            RESTORE + LEAKED + ROTATE.replace("OVERLAP", "timedelta(days=1)") + CLEAR, "and it opens the door"),
        "the desk has no key": (RESTORE + LEAKED + REVOKE + CLEAR, "closed door"),
        "the desk gets all rights": (RESTORE + KEY.replace('"predict"', '"admin"'), "no more"),
        "all keys are revoked": (
            RESTORE + "for each in read_keys(lab_desk):\n    revoke_key(lab_desk, each)\n" + RENEW + CLEAR,
            "Prometheus"),
        "the records are erased": (
            RESTORE + '(lab / "desk" / "keys.json").unlink()\n' + RENEW + CLEAR, "don't erase it"),
        "the output stays": (RESTORE + LEAKED + RENEW + REVOKE, "still has a key"),
        "the notebook is emptied": (
            RESTORE + KEY + 'write_atomic(lab / "look.ipynb", \'{"cells": []}\')\n', "has lost cells"),
        "the colleague's copy is changed": (
            RESTORE + CLEAR + 'write_notebook(lab / "mailed" / "look.ipynb", [])\n', "isn't what was sent"),
    }.values(),
)  # fmt: skip
def test_a_repair_that_is_none_is_refused(lab: dict[str, Any], repair: str, said: str) -> None:
    exec(repair, lab)
    with pytest.raises(Exception, match=said):
        lab["sound"](lab["settings"])


@pytest.mark.parametrize("key", [KEY, LEAKED + ROTATE.replace("OVERLAP", "timedelta(0)") + CLEAR])
def test_more_than_one_repair_is_right(lab: dict[str, Any], key: str) -> None:
    exec(RESTORE + key, lab)
    lab["sound"](lab["settings"])


STYLES = {
    "13.1": (
        """\
scrapers = ["admin", "operate"]
""",
        """\
scrapers = []
for role in sorted(KEY_ROLES):
    if ("GET", "/metrics") in KEY_ROLES[role]:
        scrapers.append(role)
""",
        """\
scrapers = list(filter(lambda role: ("GET", "/metrics") in KEY_ROLES[role], sorted(KEY_ROLES)))
""",
    ),
    "13.2": (
        """\
scraper = create_key(desk, name="prometheus", role="operate", expires=timedelta(hours=30 * 24), by="Ann")
""",
        """\
month = timedelta(30)
scraper = create_key(desk, "prometheus", "operate", month, rate=1)
""",
        """\
from mlops_course.security.keys import read_duration
scraper = create_key(desk, "prometheus", "operate", read_duration("30d"))
""",
    ),
    "13.3": (
        """\
risky = {"GLOBAL", "STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4"}
try:
    return not risky.isdisjoint(opcodes(content))
except ValueError:
    return True
""",
        """\
import pickletools
try:
    for code, argument, place in pickletools.genops(content):
        if code.name in ("GLOBAL", "STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4"):
            return True
except Exception:
    return True
return False
""",
        """\
try:
    names = set(opcodes(content))
except ValueError:
    return True
return bool(names & {"GLOBAL", "STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4"})
""",
    ),
    "13.4": (
        """\
sizes = table.groupby(columns, dropna=False)[columns[0]].transform("size")
return (sizes == 1).mean()
""",
        """\
counts = table.value_counts(columns, dropna=False)
return (counts == 1).sum() / len(table)
""",
        """\
from collections import Counter
rows = [tuple(None if value != value else value for value in row) for row in table[columns].itertuples(index=False)]
seen = Counter(rows)
return sum(seen[row] == 1 for row in rows) / len(rows)
""",
    ),
    "13.5": (
        """\
before = [""] + [line["hash"] for line in lines]
for number, (line, previous) in enumerate(zip(lines, before), 1):
    if line["previous"] != previous or link(line["text"], line["previous"]) != line["hash"]:
        return number
""",
        """\
ends = ["", *(line["hash"] for line in lines)]
right = [(end, link(line["text"], end)) for end, line in zip(ends, lines)]
bad = [i + 1 for i, line in enumerate(lines) if (line["previous"], line["hash"]) != right[i]]
return min(bad, default=None)
""",
        """\
i = 0
previous = ""
while i < len(lines):
    line = lines[i]
    i += 1
    if (line["previous"], line["hash"]) != (previous, link(line["text"], previous)):
        return i
    previous = line["hash"]
""",
    ),
    "13.6": (
        """\
found, tokens, last = [], float(burst), None
for now in times:
    if last is not None:
        tokens = min(burst, tokens + rate * (now - last))
    last = now
    if tokens >= 1:
        tokens -= 1
        found.append(True)
    else:
        found.append(False)
return found
""",
        """\
limiter = RateLimiter(rate, burst)
return [limiter.wait("me", now) == 0 for now in times]
""",
        """\
import numpy as np
level, found = burst, []
for gap in np.diff(times, prepend=times[:1]):
    level = min(burst, level + gap * rate)
    yes = level >= 1
    found.append(yes)
    level = level - 1 if yes else level
return found
""",
    ),
}


def test_a_right_answer_passes_in_any_style(lesson: Lesson, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The right answers stand in the place of the wrong ones: each must be called one that should have failed."""
    notebook = read_notebook(lesson.path)
    for cell in notebook["cells"]:
        if "wrong-answers" in tags(cell):
            number = cell["source"].split('"')[1]
            answers = {f"style {place}": (code.strip(), "-") for place, code in enumerate(STYLES[number])}
            cell["source"] = f"wrong_answers({number!r}, {answers!r})"
        elif "skip-check" in tags(cell) and not {"lab-prepare", "lab-check", "lab-break", "lab-fix"} & tags(cell):
            cell["source"], cell["outputs"] = "pass", []
    copy = tmp_path / lesson.path.name
    copy.write_text(json.dumps(notebook), encoding="utf-8")
    monkeypatch.setenv("MLOPS_COURSE_HOME", str(tmp_path / "workspace"))
    said = [str(proof) for proof in prove_run(read_lesson(copy), tmp_path / "workspace")]
    passed = dict.fromkeys(STYLES, 0)
    for number in STYLES:
        passed[number] = sum(f"{number} wrong answer" in each and "is passed, but" in each for each in said)
    assert passed == dict.fromkeys(STYLES, 3), said
