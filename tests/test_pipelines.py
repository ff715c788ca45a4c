"""The runner: what it refuses before anything runs, what flows between stages, and what a failure leaves behind."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import psutil
import pytest
from kill_helpers import lives
from pipeline_helpers import RECORD, write_notebook, write_pipeline

from mlops_course import pipelines
from mlops_course.environment import Settings, WorkspaceError, cores, load_settings
from mlops_course.pipelines import (
    Options,
    Parameter,
    ParameterError,
    Pipeline,
    PipelineError,
    PipelineRun,
    ResultError,
    Stage,
    StageError,
    check_parameters,
    find_pipeline,
    list_pipelines,
    list_runs,
    plan,
    read_result,
    record_result,
    run,
)
from mlops_course.pipelines.engine.sessions import CANCEL_GRACE_S
from mlops_course.pipelines.notebooks import Taken, notebook_parameters, recorded_names
from mlops_course.pipelines.parameters import TYPES, fill, references
from mlops_course.pipelines.runs import repository
from mlops_course.pipelines.secrets import stage_environment

posix_only = pytest.mark.skipif(os.name == "nt", reason="uses POSIX signals")


def one_stage(folder: Path, *cells: str, parameters: str = "") -> Pipeline:
    """A pipeline of a single notebook that takes no parameters unless told."""
    write_notebook(folder / "only.ipynb", parameters, *cells)
    text = "name: small\nstages: [{name: only, notebook: only.ipynb}]\n"
    return Pipeline.read(write_pipeline(folder, text, "small"))


def write_demo(folder: Path) -> Path:
    """Three stages: numbers, their sum, which may be too much, and an end."""
    write_notebook(
        folder / "count.ipynb",
        "upto: int = 10  # how many",
        "numbers = list(range(upto))",
        RECORD + "record_result(numbers=numbers, made=f'{upto} numbers', figures={'upto': upto})",
    )
    write_notebook(
        folder / "total.ipynb",
        "numbers: list = None  # from count\nlimit: int = 100\ntitle: str = ''",
        "import os, sys\n\ntotal = sum(numbers)",
        "# is it too much?\nif total > limit:\n    raise ValueError(f'{total} is more\\nthan {limit}')",
        RECORD + "record_result(total=total, title=title, limit=limit)",
    )
    write_notebook(folder / "last.ipynb", "total: int = None", "print(total)")
    return write_pipeline(
        folder,
        """
        name: demo
        description: for tests
        parameters:
          upto: {type: integer, default: 5, help: how many}
          limit: {type: integer, default: 100}
        stages:
          - name: count
            notebook: count.ipynb
            makes: numbers
            parameters: {upto: "${upto}"}
            outputs: {numbers: value}
          - name: total
            notebook: total.ipynb
            parameters: {limit: "${limit}", title: "${upto} of ${limit}"}
            inputs: [numbers]
            outputs: {total: value}
          - {name: last, notebook: last.ipynb, inputs: {total: total}}
        """,
    )


@pytest.fixture
def demo(tmp_path: Path) -> Path:
    return write_demo(tmp_path)


@pytest.fixture(scope="module")
def failed(tmp_path_factory: pytest.TempPathFactory) -> tuple[StageError, dict[str, Any]]:
    """The error of a run whose second stage fails, and its run.json."""
    folder = tmp_path_factory.mktemp("failed")
    settings = Settings(home=folder / "workspace")
    with pytest.raises(StageError) as caught:
        run(write_demo(folder), {"upto": 4, "limit": 5}, settings)
    (told,) = list_runs(settings)
    return caught.value, told


# ---------------------------------------------------------------- parameters


@pytest.mark.parametrize(
    ("kind", "value", "expected"),
    [
        ("month", "2013-01", "2013-01"),
        ("integer", "500", 500),
        ("integer", 500, 500),
        ("integer", "-3", -3),
        ("number", "0.05", 0.05),
        ("number", "1e-3", 0.001),
        ("number", 3, 3.0),
        ("text", "a=b c", "a=b c"),
        ("boolean", "True", True),
        ("boolean", False, False),
        ("path", "s3://bucket/folder", "s3://bucket/folder"),
    ],
)
def test_a_value_gets_its_type(kind: str, value: object, expected: object) -> None:
    found = Parameter("value", kind, required=True).convert(value)
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("month", "2013-13"),
        ("month", "2013-1"),
        ("month", "2013-01-01"),
        ("month", "²013-01"),
        ("month", 201301),
        ("integer", "1.0"),
        ("integer", "1e3"),
        ("integer", "1_000"),
        ("integer", ""),
        ("integer", True),
        ("integer", "9" * 10_000),
        ("number", "nan"),
        ("number", "inf"),
        ("number", "many"),
        ("number", True),
        ("text", 5),
        ("boolean", "yes"),
        ("boolean", 1),
        ("path", "no/such/folder"),
        ("path", "~nobody-of-this-name/x"),
        ("path", "x\0y"),
        ("month", None),
        ("integer", "none"),
    ],
)
def test_a_value_of_another_type_is_refused_in_one_line(kind: str, value: object) -> None:
    with pytest.raises(ParameterError) as caught:
        Parameter("size", kind, "the size", required=True).convert(value)
    line = str(caught.value)
    assert "\n" not in line
    assert "size" in line
    assert TYPES[kind][0] in line
    assert "the size" in line
    assert kind == "path" or repr(value) in line


@pytest.mark.parametrize("value", ["none", "None", "null", "", None])
def test_only_an_optional_parameter_can_be_none(value: object) -> None:
    assert Parameter("seed", "integer").convert(value) is None
    with pytest.raises(ParameterError):
        Parameter("seed", "integer", default=3).convert(value)


def test_a_path_is_made_absolute_because_stages_run_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.csv").touch()
    monkeypatch.chdir(tmp_path)
    assert Parameter("source", "path").convert("mine.csv") == str(tmp_path / "mine.csv")


def test_all_of_a_runs_values(demo: Path) -> None:
    assert check_parameters(Pipeline.read(demo), {"upto": "7"}) == {"upto": 7, "limit": 100}


def test_unknown_and_missing_parameters_are_named(demo: Path) -> None:
    with pytest.raises(ParameterError, match=r"no parameter 'uptoo'.*'upto'"):
        check_parameters(Pipeline.read(demo), {"uptoo": "7"})
    demo.write_text(demo.read_text().replace("default: 5, ", ""))
    with pytest.raises(ParameterError, match=r"parameter upto is missing. Give -p upto=… \(a whole number.*: how many"):
        check_parameters(Pipeline.read(demo), {})


ORDERED = """
name: small
parameters:
  first: {type: month}
  last: {type: month, default: null}
  end: {type: month, default: "2013-05"}
  share: {type: number, default: 1}
order: [first <= last < end, first < end]
stages:
  - {name: only, notebook: only.ipynb, parameters: {x: ["${first}", "${last}", "${end}", "${share}"]}}
"""


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"first": "2013-02", "last": "2013-01"}, "first is 2013-02, but should lie at or before last"),
        ({"first": "2013-02", "last": "2013-05"}, "last is 2013-05, but should lie before end, which is 2013-05"),
        ({"first": "2013-05"}, "first is 2013-05, but should lie before end"),
        ({"first": "2013-02", "last": "2013-02"}, None),
        ({"first": "2013-04"}, None),
    ],
)
def test_parameters_are_in_order(tmp_path: Path, given: dict[str, str], message: str | None) -> None:
    write_notebook(tmp_path / "only.ipynb", "x: list = None")
    pipeline = Pipeline.read(write_pipeline(tmp_path, ORDERED, "small"))
    if message is None:
        assert check_parameters(pipeline, given).items() >= given.items()
    else:
        with pytest.raises(ParameterError, match=message):
            check_parameters(pipeline, given)


@pytest.mark.parametrize(
    ("order", "message"),
    [
        ("[first < lost]", "'lost', which isn't a parameter. Perhaps you meant 'last'"),
        ("[first > last]", "order has 'first > last'. Write a list of lines"),
        ("[first]", "order has 'first'"),
        ("[first <]", "order has 'first <'"),
        ("{first: last}", "Write a list of lines"),
        ("[first < share]", "can't compare month with number"),
    ],
)
def test_a_mistake_in_the_order_is_named(tmp_path: Path, order: str, message: str) -> None:
    write_notebook(tmp_path / "only.ipynb", "x: list = None")
    text = ORDERED.replace("[first <= last < end, first < end]", order)
    with pytest.raises(PipelineError, match=message):
        Pipeline.read(write_pipeline(tmp_path, text, "small"))


def test_a_wrong_parameter_stops_before_anything_is_made(demo: Path, tmp_path: Path) -> None:
    settings = load_settings(home=tmp_path / "elsewhere")
    with pytest.raises(ParameterError):
        run(demo, {"upto": "many"}, settings)
    assert not settings.home.exists()


# ---------------------------------------------------------------- the file


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("name: demo", "nmae: demo", "demo.yaml has an unknown entry 'nmae'. Perhaps you meant 'name'"),
        ("name: demo", "name: ../up", "'../up' can't be a name"),
        ("name: demo", "", "demo.yaml has no 'name'"),
        ("type: integer, default: 5", "type: int, default: 5", "parameter upto has the type 'int'.*'integer'"),
        ("type: integer, default: 5", "default: 5", "parameter upto has no 'type'"),
        ("default: 5", "default: five", "parameter upto is 'five'"),
        ("default: 5", "defualt: 5", "unknown entry 'defualt'.*'default'"),
        ("limit: {type", "up-to: {type", "'up-to' can't be a name"),
        ("limit: {type", "upto: {type", "'upto' stands twice"),
        ("{name: last", "{name: count", "two stages named 'count'"),
        ("makes: numbers", "make: numbers", "a stage has an unknown entry 'make'.*'makes'"),
        ("last.ipynb", "lost.ipynb", "there is no notebook .*lost.ipynb. Perhaps you meant 'last.ipynb'"),
        ("last.ipynb", "demo.yaml", "demo.yaml can't be read as a notebook"),
        ('upto: "${upto}"', 'uptoo: "${upto}"', "passes 'uptoo', but count.ipynb has no such parameter.*'upto'"),
        ("inputs: {total: total}", "inputs: {}", "stage last doesn't pass 'total', which last.ipynb needs"),
        ("inputs: {total: total}", "inputs: {total: totals}", "last needs 'totals', which no stage makes.*'total'"),
        ("inputs: [numbers]", "inputs: [number]", "total needs 'number', which no stage makes.*'numbers'"),
        ("inputs: [numbers]", "inputs: {numbers: total}", "total needs 'total', which it makes itself"),
        ("inputs: [numbers]", "inputs: numbers", r"inputs are 'numbers'. Write them as `\[name, …\]`"),
        ("inputs: [numbers]", "parameters: {}", "'parameters' stands twice"),
        ("{total: value}", "{numbers: value}", "stage total makes 'numbers', which count makes too"),
        ("{total: total}}", "{total: total}, outputs: {end: value}}", "promises .* 'end', but last.ipynb records no"),
        ("{total: value}", "{total: vaule}", "output total has the kind 'vaule'.*'value'"),
        ("{total: value}", "[total]", "outputs are .'total'.. Write them as `{name: …}`"),
        ("${limit}", "${numbers.x}", "refers to ..numbers.x., which isn't a parameter.*flow through `inputs`"),
        ("${limit}", "${limi}", "refers to ..limi., which isn't a parameter of the pipeline.*'limit'"),
        ('limit: "${limit}"', 'limit: "${limit"', "without its }"),
        ('limit: "${limit}", title: "${upto} of ${limit}"', "limit: 3", "no stage uses the parameter 'limit'"),
        ('limit: "${limit}"', 'limit: "x${limit}"', r"passes limit = .*\(str\), but its notebook declares 'int'"),
        ("{type: integer, default: 5", "{type: text, default: x", "upto.*declares 'int'"),
        ("outputs: {total: value}", "outputs: {total: value}\n    cache: maybe", "cache is 'maybe'.*true or false"),
        ("outputs: {total: value}", "outputs: {total: value}\n    timeout: -1", "timeout is -1, but should be seconds"),
        ("outputs: {total: value}", "outputs: {total: value}\n    retries: 1.5", "retries is 1.5.*a whole number"),
        ("outputs: {total: value}", "outputs: {total: value}\n    secrets: KEY", "secrets is 'KEY', but should be"),
        ("stages:", "stages: none\nother:", "unknown entry 'other'"),
        ("description: for tests", "description: [", "isn't valid YAML"),
        ("parameters: {upto:", "parameters: [upto,", "isn't valid YAML"),
    ],
)
def test_a_mistake_in_the_file_is_named(demo: Path, old: str, new: str, message: str) -> None:
    text = demo.read_text()
    assert old in text
    demo.write_text(text.replace(old, new, 1))
    with pytest.raises(PipelineError, match=message) as caught:
        Pipeline.read(demo)
    assert "\n" not in str(caught.value)


UNFIT = {
    "2013-01-01": r'x = 2013-01-01, which is a date: .* Write it as text, in quotes: "2013-01-01"',
    "2013-01-01 10:00:00": r"x = 2013-01-01 10:00:00, which is a datetime",
    "{days: [2013-01-01]}": r"x\.days\[0\] = 2013-01-01, which is a date",
    "!!binary aGk=": "x = b'hi', which is of type bytes",
    "!!set {a, b}": "x = {'.', '.'}, which is of type set",
    "!!omap [a: 1]": r"x\[0\] = \('a', 1\), which is of type tuple",
    ".nan": "x = nan, which is no finite number",
    "[1, -.inf]": r"x\[1\] = -inf, which is no finite number",
    "{2013: late}": r'which is a dictionary with the key 2013, which isn\'t text.*Write it in quotes: "2013"',
    "{a: {0: b}}": r"x\.a = .* a dictionary with the key 0,",
    "{null: b}": "a dictionary with the key None",
    r'"half \ud800"': r"x = 'half \\ud800', which is text with half of a character in it|isn't valid YAML",
    r'{"\ud800": 1}': "text with half of a character|isn't valid YAML",
    "0x" + 5000 * "f": "x = a number, which is a whole number with too many digits",
    5000 * "9": "isn't valid YAML",
    "2013-13-45": "isn't valid YAML: month must be in 1..12",
    "!!timestamp soon": "isn't valid YAML: a value isn't what its tag says",
    "!!bool perhaps": "isn't valid YAML: a value isn't what its tag says",
    "!!int many": "isn't valid YAML: invalid literal",
    1500 * "[" + 1500 * "]": "isn't valid YAML|recursion",
}


@pytest.mark.parametrize("value", UNFIT)
def test_a_value_that_no_notebook_can_get_is_refused_before_anything_runs(
    tmp_path: Path, settings: Settings, value: str
) -> None:
    write_notebook(tmp_path / "only.ipynb", "x = None", "x")
    text = f"name: odd\nstages:\n  - name: only\n    notebook: only.ipynb\n    parameters:\n      x: {value}\n"
    (tmp_path / "odd.yaml").write_text(text, encoding="utf-8")
    for attempt in (plan, run):
        with pytest.raises(PipelineError, match=UNFIT[value]):
            attempt(tmp_path / "odd.yaml", settings=settings)
    assert not list(settings.runs.glob("*"))


def test_values_from_python_are_held_against_the_same_rule(tmp_path: Path) -> None:
    write_notebook(tmp_path / "only.ipynb", "x = None", "x")
    circle: list[Any] = [1]
    circle.append(circle)
    for value in ((1, 2), tmp_path, {1}, object(), "\ud800", {"\ud800": 1}, np.int64(3), circle, {"a": circle}):
        with pytest.raises(PipelineError, match=r"pipeline odd: stage only passes x.* a notebook can't get that"):
            Pipeline("odd", (Stage("only", tmp_path / "only.ipynb", {"x": value}),))
    shared = [1, 2]  # twice the same list isn't a circle
    for value in (2**70, -1.5, True, None, "ü", [], {}, {"a": [shared, shared, {"b": None}]}):
        Pipeline("odd", (Stage("only", tmp_path / "only.ipynb", {"x": value}),))


def test_text_that_cannot_be_written_is_refused() -> None:
    for kind in ("text", "path"):
        with pytest.raises(ParameterError, match=r"parameter x is 'a\\udce4', but should be"):
            Parameter("x", kind, required=True).convert("a\udce4")


def test_a_stage_whose_notebook_is_a_module_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("print(1)\n")
    pipeline = write_pipeline(tmp_path, "name: one\nstages: [{name: train, notebook: train.py}]\n")
    with pytest.raises(PipelineError, match=r"train\.py can't be read as a notebook: it isn't JSON\. Name a notebook"):
        Pipeline.read(pipeline)


def test_a_run_names_the_commit_of_its_pipelines_repository(
    tmp_path: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):
        monkeypatch.delenv(name, raising=False)
    clone = tmp_path / "clone"
    (clone / "pipelines").mkdir(parents=True)
    pipeline = one_stage(clone / "pipelines", "1")
    (tmp_path / "alone").mkdir()
    alone = one_stage(tmp_path / "alone", "1")
    git = ["git", "-C", str(clone), "-c", "user.name=me", "-c", "user.email=me@example.org"]
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "first"]):
        subprocess.run([*git, *command], check=True)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    placed = replace(pipeline, path=clone / "pipelines" / "p.yaml")
    code = run(placed, settings=settings).fingerprint
    assert (code["commit"], code["dirty"]) == (commit, False)
    (clone / "new").touch()
    assert run(placed, settings=settings).fingerprint["dirty"]
    code = run(replace(alone, path=tmp_path / "alone" / "p.yaml"), settings=settings).fingerprint
    assert (code["commit"], code["dirty"]) == (None, None)
    assert repository(find_pipeline("training").folder) is None, "the course's own: its clone, or what its wheel says"


def test_stages_that_wait_for_each_other_are_named(tmp_path: Path) -> None:
    for name, needed, made in [("one", "c", "a"), ("two", "a", "b"), ("three", "b", "c")]:
        write_notebook(tmp_path / f"{name}.ipynb", f"{needed}: int = None", f"record_result({made}=1)")
    stages = [
        Stage("one", tmp_path / "one.ipynb", inputs=["c"], outputs={"a": "value"}),
        Stage("two", tmp_path / "two.ipynb", inputs=["a"], outputs={"b": "value"}),
        Stage("three", tmp_path / "three.ipynb", inputs=["b"], outputs={"c": "value"}),
    ]
    with pytest.raises(PipelineError, match=r"these stages wait for each other: \w+( -> (one|two|three)){3}"):
        Pipeline("round", tuple(stages))


def test_stages_are_sorted_by_what_they_need(demo: Path) -> None:
    pipeline = Pipeline.read(demo)
    backwards = Pipeline("demo", pipeline.stages[::-1], pipeline.parameters, path=demo)
    assert [stage.name for stage in backwards.stages] == ["count", "total", "last"]
    assert backwards.needs == {"count": set(), "total": {"count"}, "last": {"total"}}
    assert backwards.after({"total"}) == {"total", "last"}


# ---------------------------------------------------------------- order without data


def write_ordered(folder: Path, early: str = "swept.touch()", second: str = "1") -> Path:
    """Three stages: early, and late that only comes after it; last takes what late records."""
    head = RECORD + f"from pathlib import Path\nswept = Path({str(folder / 'swept')!r})"
    write_notebook(folder / "early.ipynb", "", head, early, RECORD + "record_result(swept=1)")
    write_notebook(folder / "late.ipynb", "", head, second, "assert swept.exists()\nrecord_result(number=7)")
    write_notebook(folder / "last.ipynb", "number: int = None", "print(number)")
    text = """
        name: ordered
        stages:
          - {name: last, notebook: last.ipynb, inputs: [number]}
          - {name: late, notebook: late.ipynb, outputs: {number: value}, after: [early]}
          - {name: early, notebook: early.ipynb}
        """
    return write_pipeline(folder, text, "ordered")


def test_after_is_order_and_touches_nothing(tmp_path: Path) -> None:
    pipeline = Pipeline.read(write_ordered(tmp_path))
    assert [stage.name for stage in pipeline.stages] == ["early", "late", "last"]
    assert pipeline.needs == {"early": set(), "late": {"early"}, "last": {"late"}}
    assert pipeline.takes == {"early": set(), "late": set(), "last": {"late"}}
    assert pipeline.after({"early"}) == {"early"} and pipeline.after({"late"}) == {"late", "last"}


@pytest.mark.parametrize(
    ("new", "message"),
    [
        ("[erly]", "stage late comes after 'erly', which isn't a stage. Perhaps you meant 'early'"),
        ("[late]", "stage late comes after itself"),
        ("[last]", r"these stages wait for each other: \w+ -> \w+ -> \w+\. Take out .* `after`"),
        ("early", "after is 'early', but should be a list of names"),
    ],
)
def test_a_mistake_in_the_order_of_stages_is_named(tmp_path: Path, new: str, message: str) -> None:
    path = write_ordered(tmp_path)
    path.write_text(path.read_text().replace("after: [early]", f"after: {new}"))
    with pytest.raises(PipelineError, match=message):
        Pipeline.read(path)


def test_a_stage_that_runs_again_does_not_touch_one_that_only_comes_after_it(
    tmp_path: Path, settings: Settings
) -> None:
    path = write_ordered(tmp_path)
    slow = "import time; time.sleep(1.5); swept.touch()"
    assert run(write_ordered(tmp_path, slow), settings=settings, options=Options(width=2)).status == "done"
    write_ordered(tmp_path, f"{slow}; print('anew')")
    again = {stage.name: stage.status for stage in run(path, settings=settings).stages}
    assert again == {"early": "done", "late": "cached", "last": "cached"}
    planned = {each.stage: each.action for each in pipelines.plan(path, None, settings, Options(start="early"))}
    assert planned == {"early": "run", "late": "cached", "last": "cached"}


def test_a_stage_does_not_run_when_the_one_before_it_fails(tmp_path: Path, settings: Settings) -> None:
    with pytest.raises(StageError, match="no broom"):
        run(write_ordered(tmp_path, "raise ValueError('no broom')"), settings=settings, options=Options(width=2))
    (told,) = list_runs(settings)
    assert {stage["name"]: stage["status"] for stage in told["stages"]} == {
        "early": "failed",
        "late": "not run",
        "last": "not run",
    }


def test_a_part_of_a_pipeline_with_order(tmp_path: Path, settings: Settings) -> None:
    path = write_ordered(tmp_path)
    record = run(path, settings=settings, options=Options(until="late"))
    assert {stage.name: stage.status for stage in record.stages} == {"early": "done", "late": "done", "last": "not run"}
    write_ordered(tmp_path, "raise ValueError('not asked for')")
    record = run(path, settings=settings, options=Options(only="last"))
    assert {stage.name: stage.status for stage in record.stages} == {
        "early": "not run",
        "late": "cached",
        "last": "done",
    }


# ---------------------------------------------------------------- many values


def write_varied(folder: Path) -> Path:
    """A pipeline that takes one value of each type."""
    kinds = {"month": "month", "region": "text", "n": "integer", "share": "number", "file": "path", "sure": "boolean"}
    write_notebook(folder / "only.ipynb", "\n".join(f"{name}: 'object' = ''" for name in kinds), "assert n != 2, 'no'")
    parameters = "".join(f"  {name}: {{type: {kind}, default: null}}\n" for name, kind in kinds.items())
    passed = ", ".join(f'{name}: "${{{name}}}"' for name in kinds)
    text = f"name: varied\nparameters:\n{parameters}stages:\n"
    text += f"  - {{name: only, notebook: only.ipynb, parameters: {{{passed}}}}}\n"
    return write_pipeline(folder, text, "varied")


@pytest.mark.parametrize(
    ("over", "values"),
    [
        ("month=2012-11..2013-02", ["2012-11", "2012-12", "2013-01", "2013-02"]),
        ("month=2013-01,2013-03..2013-04", ["2013-01", "2013-03", "2013-04"]),
        ("region=eu, us,apac", ["eu", "us", "apac"]),
        ("region=a=b", ["a=b"]),
        ("region=a..b", ["a..b"]),
        ("n=-1..2,7", ["-1", "0", "1", "2", "7"]),
        ("n=5..5", ["5"]),
        ("share=0.1,0.25", ["0.1", "0.25"]),
        ("sure=true,false", ["true", "false"]),
        ("file=..,.", ["..", "."]),
        ("region=@regions.txt", ["eu", "us, all of it", "apac"]),
        ("month=@months.txt", ["2013-01", "2013-02", "2013-05"]),
    ],
)
def test_what_a_backfill_can_run_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, over: str, values: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "regions.txt").write_text("eu\r\nus, all of it\n\n  apac\n", encoding="utf-8")
    (tmp_path / "months.txt").write_text("2013-01..2013-02\n2013-05")
    assert pipelines.values_over(Pipeline.read(write_varied(tmp_path)), over) == (over.partition("=")[0], values)


@pytest.mark.parametrize(
    ("over", "message"),
    [
        ("month", "--over 'month' has no values. Write --over name="),
        ("mnoth=2013-01", "no parameter 'mnoth'. Perhaps you meant 'month'"),
        ("month=2013-01,October", "month is 'October', but should be a month like"),
        ("month=2013-01..", "month is '', but should be a month"),
        ("month=2013-06..2013-01", "month=2013-06..2013-01 ends before it begins"),
        ("month=0001-01..9999-12", "month has 119,988 values. Give at most 10,000"),
        ("n=5..1", "n=5..1 ends before it begins"),
        ("n=1..99999999999", "n=1..99999999999 has 99,999,999,999 values"),
        ("n=1.5", "n is '1.5', but should be a whole number"),
        ("n=1,2,01", r"n is 1 twice \(as '1' and '01'\)"),
        ("n=1..3,2", "n is 2 twice. Give each value once"),
        ("share=0.1..0.5", "numbers without end"),
        ("region=eu,us,eu", "region is 'eu' twice"),
        ("region=eu,,us", "a value of region is empty"),
        ("region=", "there is no value of region"),
        ("region=@nowhere.txt", "region can't be read from nowhere.txt"),
        ("region=@empty.txt", "there is no value of region"),
        ("file=nowhere", "file is 'nowhere', but should be a file or folder that exists"),
    ],
)
def test_what_a_backfill_cannot_run_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, over: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(ParameterError, match=message):
        pipelines.values_over(Pipeline.read(write_varied(tmp_path)), over)


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux only")
def test_workers_that_are_given_serve_run_after_run_of_one_pipeline(tmp_path: Path, settings: Settings) -> None:
    who = "import os\n" + RECORD + "record_result(parent=os.getppid(), own=os.getpid(), doubled=2 * number)"
    write_notebook(tmp_path / "who.ipynb", "number: int = 1", who)
    text = """
        name: {0}
        parameters:
          number: {{type: integer, default: 1}}
        stages:
          - {{name: who, notebook: who.ipynb, parameters: {{number: "${{number}}"}}}}
        """
    file, other = (write_pipeline(tmp_path, text.format(name), name) for name in ("one", "other"))
    with contextlib.closing(pipelines.LazyExecutor()) as workers:
        first, second = (
            pipelines.run(file, {"number": number}, settings, workers=workers).results["who"] for number in (1, 2)
        )
        with pytest.raises(PipelineError, match=r"these workers are those of one\.yaml"):
            pipelines.run(other, {}, settings, workers=workers)
        third = pipelines.run(file, {"number": 3}, settings, workers=workers).results["who"]
    assert [each["doubled"] for each in (first, second, third)] == [2, 4, 6]
    assert first["parent"] == second["parent"] == third["parent"], "forked from one process"
    assert len({each["own"] for each in (first, second, third)}) == 3, "each in a copy of its own"
    assert not lives(first["parent"]), "whoever made them has closed them"


def test_a_backfill_takes_values_of_the_parameters_type(tmp_path: Path, settings: Settings) -> None:
    path = write_varied(tmp_path)
    filled = pipelines.backfill(path, "n", [1, "2", 3], settings=settings)
    assert [(each.value, each.status) for each in filled] == [("1", "done"), ("2", "failed"), ("3", "done")]
    assert sorted(each["parameters"]["n"] for each in list_runs(settings)) == [1, 2, 3]
    for values, message in {(1, "1"): "n is 1 twice", (): "no value of n", ("x",): "n is 'x'"}.items():
        with pytest.raises(ParameterError, match=message):
            pipelines.backfill(path, "n", values, settings=settings)
    with pytest.raises(ParameterError, match="no parameter 'm'"):
        pipelines.backfill(path, "m", [1], settings=settings)


# ---------------------------------------------------------------- more about the file


@pytest.mark.parametrize("text", ["", "[]", "just words", "name: x\nstages: {}", "name: x\nstages: [5]", "? [a]\n: b"])
def test_a_file_that_is_no_pipeline_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(PipelineError):
        Pipeline.read(write_pipeline(tmp_path, text))


def test_a_pipeline_is_found_by_name_or_path(demo: Path, tmp_path: Path) -> None:
    assert find_pipeline(str(demo)).name == "demo"
    with pytest.raises(ParameterError, match=r"no pipeline 'trainign'. Perhaps you meant 'training'"):
        find_pipeline("trainign")
    with pytest.raises(PipelineError, match=r"can't read the pipeline .*gone.yaml"):
        find_pipeline(tmp_path / "gone.yaml")


@pytest.mark.parametrize("path", list_pipelines(), ids=lambda path: path.stem)
def test_the_courses_own_pipelines_agree_with_their_notebooks(path: Path) -> None:
    pipeline = Pipeline.read(path)
    assert pipeline.name == path.stem
    assert pipeline.description
    assert all(parameter.help for parameter in pipeline.parameters)
    assert all(stage.makes for stage in pipeline.stages)


# ---------------------------------------------------------------- notebooks as stages


def test_a_notebooks_parameters_and_which_must_be_passed(tmp_path: Path) -> None:
    cell = """
        %matplotlib inline
        run_id: str = None  # must be passed
        tables: dict[str, str]
        source: str | None = None
        other: "str or None" = None
        rows: int = 100
        month = "2013-01"
    """
    path = write_notebook(tmp_path / "stage.ipynb", textwrap.dedent(cell).strip(), "later: int = 3")
    taken = notebook_parameters(path) or {}
    assert {name: each.required for name, each in taken.items()} == {
        "run_id": True,
        "tables": True,
        "source": False,
        "other": False,
        "rows": False,
        "month": False,
    }


@pytest.mark.parametrize(
    ("annotation", "fits", "differs"),
    [
        ("int", [3], [True, 3.0, "3", None]),
        ("float", [3, 0.5], [True, "3"]),
        ("bool", [True], [1]),
        ("str | None", ["x", None], [1]),
        ("str or None", ["x", None], [1]),
        ("dict[str, str]", [{}], [[]]),
        ("list[dict[str, int]]", [[]], [{}]),
        ("pd.DataFrame", [1, "x"], []),
        ("", [1, "x"], []),
    ],
)
def test_values_are_held_against_the_annotation(annotation: str, fits: list[Any], differs: list[Any]) -> None:
    assert all(Taken(annotation).accepts(value) for value in fits)
    assert not any(Taken(annotation).accepts(value) for value in differs)


def test_a_notebook_that_lost_its_tag_is_refused(demo: Path) -> None:
    write_notebook(demo.parent / "last.ipynb", None, "total = 3")
    with pytest.raises(PipelineError, match=r"no cell of last.ipynb has the tag `parameters`"):
        Pipeline.read(demo)


def test_a_parameters_cell_that_is_not_python_is_refused(demo: Path) -> None:
    write_notebook(demo.parent / "last.ipynb", "total: int =")
    with pytest.raises(PipelineError, match=r"parameters cell of .*last.ipynb isn't Python"):
        Pipeline.read(demo)


def test_recorded_names_are_known_only_where_the_source_says_so(tmp_path: Path) -> None:
    plain = write_notebook(tmp_path / "a.ipynb", "", "%%bash\necho x", "!ls\npipelines.record_result(x=1, y=2)")
    hidden = write_notebook(tmp_path / "b.ipynb", "", "record_result(x=1, **more)")
    assert recorded_names(plain) == {"x", "y"}
    assert recorded_names(hidden) is None


def test_references_and_what_is_filled_in() -> None:
    known = {"first": "2013-01", "rows": 3, "tables": {"flights": "raw@1"}}
    value = {"a": "${tables}", "b": ["${rows}", "from ${first} with ${rows}"], "c": 5, "d": "$first"}
    assert references(value) == ["tables", "rows", "first", "rows"]
    filled = {"a": {"flights": "raw@1"}, "b": [3, "from 2013-01 with 3"], "c": 5, "d": "$first"}
    assert fill(value, known) == filled


@pytest.mark.parametrize(
    ("value", "where"),
    [
        ({"pr_auc": float("nan")}, r"values.pr_auc is nan"),
        ([1, {2, 3}], r"values\[1\] is {2, 3}, of type set"),
        ({1: "a"}, r"values is {1: 'a'}"),
        (Path("x"), "PosixPath|WindowsPath"),
    ],
)
def test_only_what_json_can_hold_is_recorded(value: object, where: str) -> None:
    with pytest.raises(ResultError, match=where):
        record_result(values=value)


@pytest.mark.slow
def test_results_can_be_read_from_a_notebook_that_plain_papermill_ran(
    demo: Path, failed: tuple[StageError, dict[str, Any]]
) -> None:
    out = demo.parent / "out.ipynb"
    command = [sys.executable, "-m", "papermill", demo.parent / "count.ipynb", out, "-p", "upto", "4"]
    subprocess.run([str(part) for part in command], check=True, capture_output=True)
    assert read_result(out) == failed[1]["stages"][0]["results"]
    assert read_result(out) == {"numbers": [0, 1, 2, 3], "made": "4 numbers", "figures": {"upto": 4}}


def test_reading_results_of_nothing(tmp_path: Path) -> None:
    assert read_result(write_notebook(tmp_path / "plain.ipynb", None, "1")) == {}
    (tmp_path / "half.ipynb").write_text('{"cells": [')
    for name in ("half.ipynb", "gone.ipynb"):
        with pytest.raises(ResultError, match=name):
            read_result(tmp_path / name)


# ---------------------------------------------------------------- running


def test_a_run_from_beginning_to_end(demo: Path, settings: Settings) -> None:
    told: list[tuple[str, str | None]] = []

    def listen(kind: str, record: PipelineRun, stage: Any) -> None:
        if kind not in ("started", "cell", "line"):
            told.append((kind, stage and stage.name))

    before, here = dict(os.environ), Path.cwd()
    record = run(demo, {"upto": "4"}, settings, listen)
    assert record.status == "done"
    assert record.results["count"] == {"numbers": [0, 1, 2, 3], "made": "4 numbers", "figures": {"upto": 4}}
    assert record.results["last"] == {}
    assert told == [
        ("run started", None),
        *[(kind, name) for name in ("count", "total", "last") for kind in ("stage started", "stage ended")],
        ("run ended", None),
    ]
    assert sorted(path.name for path in record.folder.iterdir()) == [
        "01_count.ipynb",
        "02_total.ipynb",
        "03_last.ipynb",
        "run.json",
    ]
    assert record.folder.parent == settings.runs
    assert all(stage.seconds and stage.seconds > 0 for stage in record.stages)
    assert (dict(os.environ), Path.cwd()) == (before, here)
    nbformat.validate(nbformat.read(record.stages[1].notebook, 4))


def test_run_json_tells_the_whole_story(failed: tuple[StageError, dict[str, Any]]) -> None:
    told = failed[1]
    assert told["pipeline"] == "demo"
    assert told["status"] == "failed"
    assert told["parameters"] == {"upto": 4, "limit": 5}
    assert [stage["status"] for stage in told["stages"]] == ["done", "failed", "not run"]
    assert told["stages"][1]["parameters"] == {"numbers": [0, 1, 2, 3], "limit": 5, "title": "4 of 5"}
    assert "6 is more than 5" in told["error"]
    assert told["error"] == told["stages"][1]["error"]
    assert told["fingerprint"]["packages"]["papermill"]
    assert Path(told["stages"][1]["notebook"]).is_file()


def test_a_failure_names_pipeline_stage_notebook_cell_and_error(failed: tuple[StageError, dict[str, Any]]) -> None:
    error = failed[0]
    assert (error.pipeline, error.stage, error.notebook.name) == ("demo", "total", "total.ipynb")
    assert (error.cell, error.source) == (4, "# is it too much?")
    assert (error.error_class, error.message) == ("ValueError", "6 is more than 5")
    executed = nbformat.read(error.executed, 4)
    shown = next(cell for cell in executed.cells if cell.get("execution_count") == 4)
    assert shown.source.startswith("# is it too much?")
    assert shown.outputs[0].ename == "ValueError"
    line = str(error)
    assert "\n" not in line
    assert "Traceback" not in line
    assert str(error.executed) in line


def test_an_error_raised_on_purpose_is_shown_with_its_remedy(tmp_path: Path, settings: Settings) -> None:
    raising = "from mlops_course.environment import CourseError\nraise CourseError('there is no tea', 'Boil water')"
    with pytest.raises(StageError, match=r"CourseError: there is no tea\. Boil water\. The executed notebook is"):
        run(one_stage(tmp_path, raising), settings=settings)


@posix_only
@pytest.mark.parametrize(
    ("deed", "words", "error_class"),
    [
        ("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)", "ended by SIGKILL, as the system", "WorkerDied"),
        ("import os\nos._exit(3)", "ended by itself, with exit status 3", "WorkerDied"),
        ("import sys\nsys.exit(4)", "SystemExit: 4", "SystemExit"),
    ],
)
def test_a_stage_that_ends_its_process_is_an_error_like_any_other(
    tmp_path: Path, settings: Settings, deed: str, words: str, error_class: str
) -> None:
    with pytest.raises(StageError, match=words) as caught:
        run(one_stage(tmp_path, "print('so far')", deed), settings=settings)
    assert caught.value.cell == 2
    executed = nbformat.read(caught.value.executed, 4)
    outputs = [output for cell in executed.cells for output in cell.get("outputs", [])]
    texts = [output.get("text", output.get("evalue", "")) for output in outputs]
    assert texts[0] == "so far\n"
    assert any(error_class in output.get("ename", "") for output in outputs), "the notebook says why it ends"


def test_a_result_that_was_not_recorded_after_all(tmp_path: Path, settings: Settings) -> None:
    write_notebook(tmp_path / "a.ipynb", "", RECORD + "if 1 > 2:\n    record_result(x=1)")
    write_notebook(tmp_path / "b.ipynb", "x: int = None", "print(x)")
    first, second = "{name: a, notebook: a.ipynb, outputs: {x: value}}", "{name: b, notebook: b.ipynb, inputs: [x]}"
    with pytest.raises(ResultError, match=r"stage a promises 'x', but did not record it. Call record_result\(x=…\)"):
        run(write_pipeline(tmp_path, f"name: two\nstages: [{first}, {second}]\n"), settings=settings)
    assert [stage["status"] for stage in list_runs(settings)[0]["stages"]] == ["failed", "not run"]


def test_a_stage_has_this_python_its_own_folder_and_the_settings(
    tmp_path: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    stranger = tmp_path / "jupyter" / "kernels" / "python3"
    stranger.mkdir(parents=True)
    wrong = {"argv": ["/no/such/python"], "display_name": "old", "language": "python"}
    (stranger / "kernel.json").write_text(json.dumps(wrong))
    monkeypatch.setenv("JUPYTER_PATH", str(stranger.parent.parent))
    monkeypatch.setenv("MLOPS_COURSE_THREADS", "1")
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "beside.py").write_text("value = 42\n")
    (mine / "json.py").write_text("raise ImportError('shadowed')\n")
    monkeypatch.chdir(mine)
    cell = """
        import os, sys, json
        from mlops_course.environment import load_settings
        import beside
        found = load_settings()
        record_result(python=sys.executable, folder=os.getcwd(), home=str(found.home), seed=found.seed,
                      threads=found.threads, beside=beside.value)
    """
    pipeline = one_stage(tmp_path, RECORD + textwrap.dedent(cell))
    record = run(pipeline, settings=Settings(home=settings.home, seed=7, threads=None))
    assert record.results["only"] == {
        "python": sys.executable,
        "folder": str(record.folder / "files" / "only"),
        "home": str(settings.home),
        "seed": 7,
        "threads": None,
        "beside": 42,
    }


def test_what_a_stage_prints_stays_in_its_notebook(
    tmp_path: Path, settings: Settings, capfd: pytest.CaptureFixture[str]
) -> None:
    run(one_stage(tmp_path, "import os\nos.system('echo from a child')\nprint('from Python')"), settings=settings)
    assert capfd.readouterr() == ("", "")


def test_a_kernel_that_cannot_start_says_why(
    tmp_path: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ipykernel_launcher.py").write_text("raise SystemExit('the launcher is broken')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(StageError, match=r"before its first cell.*status 1; its last words: the launcher is broken"):
        run(one_stage(tmp_path, "1"), settings=settings, options=Options(engine="kernel"))


def test_a_run_outside_the_main_thread(tmp_path: Path, settings: Settings) -> None:
    pipeline, found = one_stage(tmp_path, RECORD + "record_result(x=1)"), []
    thread = threading.Thread(target=lambda: found.append(run(pipeline, settings=settings)))
    thread.start()
    thread.join(60)
    assert found[0].results == {"only": {"x": 1}}


@posix_only
def test_an_interrupt_ends_the_kernel_and_is_written_down(tmp_path: Path, settings: Settings) -> None:
    pid = tmp_path / "pid"
    child = "import subprocess, sys\nchild = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(99)'])\n"
    tell = f"import os, time\nopen({str(pid)!r}, 'w').write(f'{{os.getpid()}} {{child.pid}}')\nprint('began')"
    pipeline = one_stage(tmp_path, child + tell, "time.sleep(99)")

    def interrupt(kind: str, record: PipelineRun, stage: Any) -> None:
        if kind == "cell" and stage.cell == 3:
            threading.Timer(0.5, os.kill, [os.getpid(), signal.SIGINT]).start()

    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt, match="SIGINT"):
        run(pipeline, settings=settings, on_event=interrupt)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    assert not [number for number in pid.read_text().split() if lives(int(number))]
    (told,) = list_runs(settings)
    assert (told["status"], told["error"]) == ("interrupted", "interrupted by SIGINT")
    assert [stage["status"] for stage in told["stages"]] == ["interrupted"]
    assert "began" in Path(told["stages"][0]["notebook"]).read_text()


@posix_only
@pytest.mark.parametrize("polite", [True, False])
def test_an_interrupted_cell_can_clean_up_but_not_for_ever(tmp_path: Path, settings: Settings, polite: bool) -> None:
    """What MLflow's `with start_run()` needs to mark its run as ended."""
    ended, endless = tmp_path / "ended", "while True:\n    try: time.sleep(99)\n    except BaseException: pass"
    kind = f"try:\n    time.sleep(99)\nfinally:\n    open({str(ended)!r}, 'w').close()"
    pipeline = one_stage(tmp_path, f"import time\n{kind if polite else endless}")
    asked: list[float] = []

    def stop() -> None:
        asked.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)

    def interrupt(kind: str, record: PipelineRun, stage: Any) -> None:
        if kind == "cell" and stage.cell == 2:
            threading.Timer(0.7, stop).start()

    with pytest.raises(KeyboardInterrupt):
        run(pipeline, settings=settings, on_event=interrupt)
    assert ended.exists() == polite
    assert time.monotonic() - asked[0] < 2 * CANCEL_GRACE_S + 5
    assert [child for child in psutil.Process().children() if "ipykernel_launcher" in child.cmdline()] == []


@posix_only
def test_a_run_stopped_at_its_very_beginning_has_its_record(
    demo: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(kind: str, record: PipelineRun, stage: Any) -> None:
        if kind == "run started":
            os.kill(os.getpid(), signal.SIGTERM)

    def looks_around(*clone: Path) -> dict[str, Any]:
        assert not settings.runs.exists() or not list(settings.runs.iterdir()), "no folder before there is a record"
        return {"python": "3"}

    monkeypatch.setattr("mlops_course.pipelines.runs.fingerprint", looks_around)
    with pytest.raises(KeyboardInterrupt, match="SIGTERM"):
        run(demo, settings=settings, on_event=interrupt)
    (told,) = list_runs(settings)
    assert (told["status"], told["fingerprint"]) == ("interrupted", {"python": "3"})
    assert {stage["status"] for stage in told["stages"]} == {"not run"}


@pytest.mark.parametrize(("threads", "width", "expected"), [(1, None, "1"), (None, 2, str(max(1, cores() // 2)))])
def test_stages_share_the_cores(
    tmp_path: Path, settings: Settings, threads: int | None, width: int | None, expected: str
) -> None:
    count = "import os\nrecord_result(threads=os.environ['OMP_NUM_THREADS'], said=os.environ.get(NAME))"
    count = count.replace("NAME", "'MLOPS_COURSE_THREADS'")
    mine = Settings(home=settings.home, threads=threads)
    record = run(one_stage(tmp_path, RECORD + count), settings=mine, options=Options(width=width))
    assert record.results["only"] == {"threads": expected, "said": None if threads is None else "1"}


def test_a_stages_variables_say_what_the_settings_are(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLOPS_COURSE_THREADS", "7")
    found = stage_environment(Settings(home=settings.home, seed=5, threads=None))
    assert (found["MLOPS_COURSE_HOME"], found["MLOPS_COURSE_SEED"]) == (str(settings.home), "5")
    assert "MLOPS_COURSE_THREADS" not in found


# ---------------------------------------------------------------- the disk


def test_a_workspace_that_is_a_file(demo: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").touch()
    with pytest.raises(WorkspaceError, match="taken"):
        run(demo, settings=load_settings(home=tmp_path / "taken"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Any:
    """A file system of 200 kB, where the machine lets us make one."""
    folder = tmp_path / "small"
    folder.mkdir()
    try:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", folder], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("can't mount a small file system here")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_disk_that_gets_full_while_a_pipeline_runs(small_disk: Path, tmp_path: Path) -> None:
    settings = load_settings(home=small_disk / "workspace")
    big = one_stage(tmp_path, "print('x' * 400_000)")
    with pytest.raises(WorkspaceError, match="the disk is full"):
        run(big, settings=settings)
    (told,) = list_runs(settings)
    assert told["status"] == "failed"
    left = {path.name for path in Path(told["folder"]).iterdir()}
    assert left <= {"run.json", "01_only.ipynb"}, "nothing half-written"
    small = one_stage(tmp_path, "1")
    assert run(small, settings=settings).status == "done", "the next run carries on"


@posix_only
def test_a_stage_that_meets_a_full_disk(tmp_path: Path, settings: Settings) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    with pytest.raises(StageError, match=r"OSError: .*No space left on device"):
        run(one_stage(tmp_path, "with open('/dev/full', 'w') as file:\n    file.write('x')"), settings=settings)


def test_a_run_whose_record_is_broken_is_listed_all_the_same(demo: Path, settings: Settings) -> None:
    folder = settings.runs / "20130101T000000Z-demo-abcdef"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text('{"id"')
    assert list_runs(settings) == [{"id": folder.name, "folder": str(folder), "status": "unreadable"}]


def test_what_people_call_is_public() -> None:
    wanted: dict[str, Callable[..., Any]] = {"run": run, "read_result": read_result, "Pipeline": Pipeline.read}
    assert set(wanted) <= set(pipelines.__all__)
