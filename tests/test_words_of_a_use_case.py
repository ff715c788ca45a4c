"""Nothing outside `project` names a flight: another use case would read of flights in its messages."""

import ast
import re
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

from mlops_course.project import DEFAULT_USE_CASE

PACKAGE = ROOT / "mlops_course"
OUTSIDE = sorted(
    path for path in PACKAGE.rglob("*.py") if path.parent.name != "project" and path.name != "_modidx.py"
)
STAGES = sorted((ROOT / "nbs" / "pipelines").glob("*.ipynb"))
PIPELINES = sorted((ROOT / "nbs" / "pipelines").glob("*.yaml"))
WORDS = re.compile(r"flight|carrier|airport|airline|aircraft|departure|tail_?num|nycflights", re.IGNORECASE)
# A description may show the form of a reference by one of the course's own: `flight-delay@3`, `flight-delay/flights`.
REFERENCE = re.compile(r"\bflight-delay(/\w+)?(@\d+)?|\b\w+@\d+")


def described(tree: ast.AST) -> set[int]:
    """What describes a module, its classes and functions, among its constants."""
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    bodies = [node.body[0] for node in ast.walk(tree) if isinstance(node, kinds) and node.body]
    return {id(first.value) for first in bodies if isinstance(first, ast.Expr)}


def names_and_texts(code: str) -> list[str]:
    """Every name that code gives or uses, and every text in it that describes nothing."""
    tree = ast.parse(code)
    docstrings, found = described(tree), []
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            found.append(node.value)
        found += [getattr(node, field) for field in ("id", "name", "arg", "attr") if hasattr(node, field)]
    return [each for each in found if isinstance(each, str)]


def descriptions(code: str) -> list[str]:
    """Descriptions and comments, line by line, without examples of references."""
    tree = ast.parse(code)
    docstrings = described(tree)
    told = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) in docstrings]
    lines = [line.partition("#")[2] for line in code.splitlines() if "#" in line and not line.startswith("# %%")]
    return [REFERENCE.sub("", str(line)) for line in [*told, *lines]]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", OUTSIDE, ids=name_of)
def test_code_and_messages_name_no_flight(path: Path) -> None:
    assert [each for each in names_and_texts(path.read_text(encoding="utf-8")) if WORDS.search(each)] == []


@pytest.mark.parametrize("path", OUTSIDE, ids=name_of)
def test_descriptions_name_no_flight_but_in_a_reference(path: Path) -> None:
    assert [line for line in descriptions(path.read_text(encoding="utf-8")) if WORDS.search(line)] == []


@pytest.mark.parametrize("path", [*STAGES, *PIPELINES], ids=name_of)
def test_pipelines_name_only_the_default_use_case(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert not WORDS.search(text.replace(DEFAULT_USE_CASE, "")), "say the use case's own word, or none"


@pytest.mark.parametrize("path", PIPELINES, ids=name_of)
def test_every_pipeline_has_the_same_default(path: Path) -> None:
    parameters = yaml.safe_load(path.read_text(encoding="utf-8"))["parameters"]
    assert parameters["use_case"]["default"] == DEFAULT_USE_CASE


@pytest.mark.parametrize(
    "code",
    [
        "def late_flights(): ...",
        "raise ValueError(f'{count} flights are lost')",
        "frame.assign(carrier=1)",
        "print(rows.tailnum)",
        "from mlops_course.project import flight_delay",
        "help = 'such as flight-delay@3'",
    ],
)
def test_a_name_and_a_text_are_found(code: str) -> None:
    assert any(WORDS.search(each) for each in names_and_texts(code))


@pytest.mark.parametrize(
    ("line", "fits"),
    [
        ("name: str  # such as `flight-delay@3` or `flight-delay/flights@7`", True),
        ("name: str  # of a table, such as `flight-delay/raw_flights`", True),
        ("name: str  # such as carrier=UA", False),
        ("name: str  # of a flight, such as flight-delay@3", False),
        ('def f():\n    """Rows of one airport."""', False),
    ],
)
def test_an_example_of_a_reference_is_no_name(line: str, fits: bool) -> None:
    assert fits is not any(WORDS.search(each) for each in descriptions(line))
