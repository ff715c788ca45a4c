"""What a pipeline's file can say: the reader, the schema for editors and the page for people say the same."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as some
from jsonschema import Draft202012Validator

from mlops_course.pipelines.definition import Pipeline, PipelineFile, Stage, _check_default, list_pipelines
from mlops_course.pipelines.notebooks import PipelineError
from mlops_course.pipelines.parameters import TYPES, Parameter
from mlops_course.pipelines.reading import entries_of, read_part
from mlops_course.pipelines.schema import DEFAULT_SCHEMAS, OUTPUT_CONTENTS, pipeline_schema, reference

SCHEMA = pipeline_schema()
ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "nbs" / "pipeline_files.ipynb"
PARTS = (PipelineFile, Parameter, Stage)
STAGE = {"name": "train", "notebook": "train.ipynb"}
SMALL = {"name": "demo", "stages": [STAGE]}


def schema_takes(file: object) -> bool:
    return Draft202012Validator(SCHEMA).is_valid(file)


def reader_takes(file: object) -> bool:
    """Whether the reader gets as far as the notebooks."""
    try:
        read_part(file, PipelineFile, "demo.yaml")
    except PipelineError:
        return False
    return True


# ---------------------------------------------------------------- reader and schema agree

WRONG: list[dict[str, Any]] = [
    {"nmae": "x"},
    {"name": "../up"},
    {"name": None},
    {"name": 5},
    {"stages": []},
    {"stages": {}},
    {"stages": [5]},
    {"stages": [{"name": "x"}]},
    {"description": 5},
    {"timeout": 0},
    {"timeout": "90"},
    {"order": ["first > last"]},
    {"order": ["first"]},
    {"order": {"first": "last"}},
    {"preload": "pandas"},
    {"parameters": ["rows"]},
    {"parameters": {"up-to": {"type": "integer"}}},
    {"parameters": {"rows": {"default": 5}}},
    {"parameters": {"rows": {"type": "int"}}},
    {"parameters": {"rows": {"type": "integer", "defualt": 5}}},
    {"parameters": {"rows": {"type": "integer", "help": 5}}},
]
WRONG_STAGES: list[dict[str, Any]] = [
    {"make": "x"},
    {"notebook": ""},
    {"notebook": 5},
    {"name": "1st"},
    {"parameters": ["rows"]},
    {"parameters": {"a-b": 1}},
    {"inputs": "model"},
    {"inputs": ["a-b"]},
    {"inputs": [5]},
    {"inputs": {"model": 5}},
    {"outputs": ["model"]},
    {"outputs": {"model": "vaule"}},
    {"after": "clean"},
    {"after": [5]},
    {"makes": 5},
    {"cache": "maybe"},
    {"cache": 1},
    {"reads": "registry"},
    {"environment": {"A": "b"}},
    {"secrets": "KEY"},
    {"timeout": -1},
    {"timeout": True},
    {"retries": 1.5},
    {"retries": -1},
    {"retries": True},
    {"backoff": -0.5},
    {"preload": [5]},
]
FILES = [SMALL | wrong for wrong in WRONG] + [SMALL | {"stages": [STAGE | wrong]} for wrong in WRONG_STAGES]


@pytest.mark.parametrize("file", FILES, ids=str)
def test_what_the_schema_can_tell_is_refused_by_both(file: dict[str, Any]) -> None:
    assert not schema_takes(file)
    with pytest.raises(PipelineError) as caught:
        read_part(file, PipelineFile, "demo.yaml")
    line = str(caught.value)
    assert line.startswith("demo.yaml") and ". " in line and "\n" not in line


RIGHT: list[dict[str, Any]] = [
    {},
    {"description": None, "parameters": None, "order": None, "timeout": None, "preload": None},
    {"order": "first <= last", "timeout": 0.5},
    {"order": ["first <= last < end", "a < b"]},
    {"parameters": {"rows": {"type": "integer", "default": None, "help": None}}},
    {"stages": [STAGE | {key: None for key in entries_of(Stage) if key not in STAGE}]},
    {"stages": [STAGE | {"inputs": {"model": "champion"}, "after": ["clean"], "retries": 0, "backoff": 0}]},
    {"stages": [STAGE | {"parameters": {"a": {"b": [1, None]}, "_c": "${d}"}}]},
]


@pytest.mark.parametrize("file", RIGHT, ids=str)
def test_what_is_right_is_taken_by_both(file: dict[str, Any]) -> None:
    assert schema_takes(SMALL | file)
    assert reader_takes(SMALL | file)


WORDS = some.sampled_from(["a", "train", "a-b", "1st", "", "value", "table", "month", "x < y", "x <= y < z", "ü", " "])
SCALARS = some.none() | some.booleans() | some.integers(-2, 3) | some.sampled_from([0.5, -0.5]) | WORDS
VALUES = some.recursive(SCALARS, lambda inside: some.lists(inside, max_size=3) | some.dictionaries(WORDS, inside))


@given(key=some.sampled_from([*entries_of(Stage), "other"]), value=VALUES)
def test_reader_and_schema_agree_on_any_entry_of_a_stage(key: str, value: object) -> None:
    file = SMALL | {"stages": [STAGE | {key: value}]}
    assert schema_takes(file) == reader_takes(file)


@given(key=some.sampled_from([*entries_of(PipelineFile), "other"]), value=VALUES)
def test_reader_and_schema_agree_on_any_entry_of_the_file(key: str, value: object) -> None:
    assert schema_takes(SMALL | {key: value}) == reader_takes(SMALL | {key: value})


DEFAULT_VALUES = VALUES | some.sampled_from(
    ["2013-01", "2013-13", "5", "-5", "1e3", "1_0", "0.5", ".5", "5.", "inf", "true", "FALSE", "yes", "none", "9" * 19]
)


@given(kind=some.sampled_from([*TYPES]), value=DEFAULT_VALUES)
def test_reader_and_schema_agree_on_defaults(kind: str, value: object) -> None:
    part = {"type": kind, "default": value}
    file = {"name": "demo", "parameters": {"x": part}, "stages": [STAGE | {"parameters": {"x": "${x}"}}]}
    assert schema_takes(file) == default_is_read(part)


def default_is_read(part: dict[str, Any]) -> bool:
    try:
        _check_default(read_part(part, Parameter, "demo.yaml", "x"), "demo.yaml")
    except PipelineError:
        return False
    return True


# ---------------------------------------------------------------- declared once


def test_the_declaration_is_what_the_code_knows() -> None:
    properties = {name: part["properties"] for name, part in SCHEMA["$defs"].items()}
    assert set(properties["Parameter"]["type"]["enum"]) == set(TYPES) == set(DEFAULT_SCHEMAS)
    kinds = properties["Stage"]["outputs"]["anyOf"][0]["additionalProperties"]["enum"]
    assert set(OUTPUT_CONTENTS) == set(kinds)


def test_all_that_the_file_declares_is_in_the_pipeline() -> None:
    assert set(entries_of(Stage)) == {field.name for field in dataclasses.fields(Stage)}
    assert set(entries_of(PipelineFile)) == {field.name for field in dataclasses.fields(Pipeline)} - {"path"}


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.__name__)
def test_every_entry_has_a_meaning_and_examples_that_fit(part: type) -> None:
    table = reference(part)
    for name in entries_of(part):
        (line,) = [line for line in table.splitlines() if line.startswith(f"| `{name}` ")]
        kind, default, meaning, examples = [cell.strip() for cell in line.split(" | ")[1:]]
        assert kind and default and meaning
        for example in re.findall(r"`([^`]+)`", examples):
            fitting = {"name": "x", "notebook": "x.ipynb", "type": "month", "stages": [STAGE]}
            whole = {key: fitting[key] for key in entries_of(part) if key in fitting} | yaml.safe_load(example)
            assert read_part(whole, part, "example", "x" if part is Parameter else None)
        assert examples.strip("| ") or name == "stages"


# ---------------------------------------------------------------- the shipped file, and the page


def test_the_shipped_schema_is_the_present_one() -> None:
    shipped = json.loads((ROOT / "nbs" / "pipelines" / "pipeline.schema.json").read_text(encoding="utf-8"))
    assert shipped == json.loads(json.dumps(SCHEMA))
    Draft202012Validator.check_schema(shipped)


@pytest.mark.parametrize("path", list_pipelines(), ids=lambda path: path.stem)
def test_the_courses_files_name_the_schema_and_keep_it(path: Path) -> None:
    first = path.read_text(encoding="utf-8").splitlines()[0]
    named = re.fullmatch(r"# yaml-language-server: \$schema=(\S+)", first)
    assert named and (path.parent / named[1]).is_file()
    assert Pipeline.read(path).name == path.stem
    command = [sys.executable, "-m", "check_jsonschema", "--schemafile", path.parent / named[1], path]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def examples_of_the_page() -> list[str]:
    """All YAML on the page for people that is a whole file."""
    found = []
    for cell in nbformat.read(PAGE, 4).cells:
        found += re.findall(r"```yaml\n(.*?)```", cell.source, re.DOTALL) if cell.cell_type == "markdown" else []
        found += re.findall(r'"""\n?(.*?)"""', cell.source, re.DOTALL) if cell.cell_type == "code" else []
    return [text for text in found if re.search("^stages:", text, re.MULTILINE)]


@pytest.mark.parametrize("text", examples_of_the_page())
def test_the_examples_of_the_page_are_taken_by_both(text: str) -> None:
    file = yaml.safe_load(text)
    assert schema_takes(file), list(Draft202012Validator(SCHEMA).iter_errors(file))
    assert reader_takes(file)


def test_the_page_shows_the_present_tables() -> None:
    shown = [
        "".join(output.data.get("text/markdown", ""))
        for cell in nbformat.read(PAGE, 4).cells
        for output in cell.get("outputs", [])
        if "data" in output
    ]
    assert len(examples_of_the_page()) >= 2
    for part in PARTS:
        assert reference(part) in shown
