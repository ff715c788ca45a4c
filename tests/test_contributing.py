"""CONTRIBUTING tells newcomers where things are, and they are there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TABLE = re.compile(r"^\| .+ \| `(mlops_course/[\w/.]+)`.* \| `(\w+)` \|$", re.MULTILINE)
ROWS = TABLE.findall((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))


def test_the_table_has_its_rows() -> None:
    assert len(ROWS) >= 10


@pytest.mark.parametrize(("place", "name"), ROWS, ids=lambda part: part)
def test_what_newcomers_are_sent_to_is_there(place: str, name: str) -> None:
    path = ROOT / place
    files = [path] if path.is_file() else sorted(path.glob("*.py"))
    defined = re.compile(rf"^(?:def|class) {name}\b|^{name}\b.* = ", re.MULTILINE)
    assert any(defined.search(file.read_text(encoding="utf-8")) for file in files), f"{place} has no {name}"
