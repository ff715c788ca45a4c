"""Pipelines in other systems: the files say the same as the pipeline, nothing in them can be misread, and they work."""

import ast
import contextlib
import datetime
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import nbformat
import pytest
import yaml

from mlops_course import __version__
from mlops_course.environment import CourseError
from mlops_course.pipelines.definition import Pipeline, find_pipeline
from mlops_course.pipelines.export import Target, export, save_export
from mlops_course.pipelines.export.__main__ import main, run_stage
from mlops_course.pipelines.export.target import target_for
from mlops_course.pipelines.notebooks import ParameterError, PipelineError
from mlops_course.pipelines.parameters import Parameter
from mlops_course.pipelines.results import ResultError, read_result

ROOT = Path(__file__).resolve().parent.parent
SYSTEMS = ("github", "airflow", "argo")
RECORD = "from mlops_course.pipelines.results import record_result\nimport os\nfrom pathlib import Path\n"
NASTY = [
    "it's",
    'say "hi"',
    "'''",
    '"""',
    "back\\slash\\",
    "a: b",
    "# no comment",
    "- list",
    "no",
    "1e3",
    "2013-01",
    "null",
    "~",
    "&a *a",
    "%TAG",
    "$HOME $(touch x) `touch x`",
    "${{ secrets.TOKEN }}",
    "{{ ds }} {% raw %}",
    "{{workflow.name}}",
    "two\nlines",
    "\n'\"\nimport os\n",
    "tab\there",
    " spaces ",
    "ü 🎉 漢字",
    "\u2028\u0085\x0c",
    "{'a': 1}",
    "!!python/object:x",
]


def write(path: Path, parameters: str, code: str) -> None:
    """A notebook with parameters."""
    first = nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})
    nbformat.write(nbformat.v4.new_notebook(cells=[first, nbformat.v4.new_code_cell(code)]), path)


@pytest.fixture(name="demo")
def _demo(tmp_path: Path) -> Pipeline:
    """A diamond: one stage, two beside each other, one that needs both."""
    folder = tmp_path / "pipelines"
    folder.mkdir()
    write(folder / "start.ipynb", "word: str = ''\nfactor: int = 1\nmaybe: 'str or None' = None", START)
    write(folder / "left.ipynb", "letters: int = None", RECORD + "record_result(left=letters + 1)")
    write(folder / "right.ipynb", "text: str = None\nmonth: str = ''\nsure: bool = False", RIGHT)
    write(folder / "end.ipynb", "left: int = None\nright: dict = None", RECORD + "record_result(total=[left, right])")
    (folder / "demo.yaml").write_text(DEMO, encoding="utf-8")
    return Pipeline.read(folder / "demo.yaml")


START = RECORD + (
    "Path('note.txt').write_text(word)\nrecord_result(letters=factor * len(word), text='note.txt', maybe=maybe)"
)
RIGHT = RECORD + (
    "assert os.environ['TOKEN'] == 'hid' + 'den' and 'OTHER' not in os.environ\n"
    "print('the token is', os.environ['TOKEN'])\n"
    "record_result(right={'text': Path(text).read_text(), 'month': month, 'sure': sure})"
)
DEMO = """
name: demo
description: A diamond.
timeout: 900
parameters:
  word: {type: text, default: two words, help: what is counted}
  factor: {type: integer, default: 2}
  month: {type: month, help: which month}
  sure: {type: boolean, default: true}
  maybe: {type: text, default: null}
  share: {type: number, default: 0.5}
stages:
  - name: start
    notebook: start.ipynb
    parameters: {word: "${word}", factor: "${factor}", maybe: "${maybe}-${share}"}
    outputs: {letters: value, text: file}
    retries: 2
    backoff: 1.5
    timeout: 90
    secrets: [OTHER]
  - {name: left, notebook: left.ipynb, inputs: [letters], outputs: {left: value}}
  - name: right_one
    notebook: right.ipynb
    inputs: [text]
    parameters: {month: "${month}", sure: "${sure}"}
    outputs: {right: value}
    secrets: [TOKEN]
    environment: [REGION]
  - {name: end, notebook: end.ipynb, inputs: [left, right], outputs: {total: value}}
"""


def constants(source: str) -> dict[str, Any]:
    """The constants of an exported DAG of Airflow, read without running it."""
    found = {}
    for line in ast.parse(source).body:
        if isinstance(line, ast.Assign) and isinstance(line.targets[0], ast.Name):
            with contextlib.suppress(ValueError):  # a path isn't a constant
                found[line.targets[0].id] = ast.literal_eval(line.value)
    return found


def needs(pipeline: Pipeline, system: str, place: Target | None = None) -> dict[str, set[str]]:
    """Who waits for whom, as an exported file says it."""
    text = export(pipeline, system, place or Target(pipeline="demo.yaml"))
    if system == "airflow":
        return {name: set(stage["needs"]) for name, stage in constants(text)["STAGES"].items()}
    found = yaml.safe_load(text)
    if system == "github":
        return {name: set(job.get("needs", [])) for name, job in found["jobs"].items()}
    tasks = found["spec"]["templates"][0]["dag"]["tasks"]
    return {task["name"]: set(task.get("dependencies", [])) for task in tasks}


# ---------------------------------------------------------------- the same graph, parameters and limits


@pytest.mark.parametrize("system", ["airflow", "argo", "github"])
@pytest.mark.parametrize("name", ["training", "scoring", "monitoring"])
def test_our_pipelines_wait_for_the_same_stages_everywhere(system: str, name: str) -> None:
    pipeline = find_pipeline(name)
    assert needs(pipeline, system, Target(workspace="/srv")) == pipeline.needs


def test_side_by_side_stays_side_by_side(demo: Pipeline) -> None:
    expected = {"start": set(), "left": {"start"}, "right-one": {"start"}, "end": {"left", "right-one"}}
    assert needs(demo, "airflow") == demo.needs
    assert needs(demo, "argo") == expected
    assert needs(demo, "github", Target(pipeline="demo.yaml", workspace="/srv")) == expected


def test_jobs_that_hand_the_workspace_on_are_a_chain_that_keeps_the_order(demo: Pipeline) -> None:
    found = needs(demo, "github")
    order = [stage.name.replace("_", "-") for stage in demo.stages]
    assert all(before in found[after] for before, after in itertools.pairwise(order))
    assert all(
        {name.replace("_", "-") for name in demo.needs[stage.name]} <= found[stage.name.replace("_", "-")]
        for stage in demo.stages
    )


def test_github_asks_for_each_parameter_in_its_type(demo: Pipeline) -> None:
    inputs = yaml.safe_load(export(demo, "github", Target(pipeline="demo.yaml")))["on"]["workflow_dispatch"]["inputs"]
    assert {name: entry["type"] for name, entry in inputs.items()} == {
        "word": "string",
        "factor": "number",
        "month": "string",
        "sure": "boolean",
        "maybe": "string",
        "share": "number",
    }
    assert inputs["month"]["required"] is True and "default" not in inputs["month"]
    assert (inputs["factor"]["default"], inputs["sure"]["default"], inputs["maybe"]["default"]) == (2, True, "")


def test_airflow_asks_for_each_parameter_in_its_type(demo: Pipeline) -> None:
    found = constants(export(demo, "airflow"))["PARAMETERS"]
    assert found["factor"] == {"default": 2, "type": "integer"}
    assert found["maybe"] == {"default": None, "type": ["null", "string"]}
    assert "default" not in found["month"] and re.fullmatch(found["month"]["pattern"], "2013-12")
    assert not re.fullmatch(found["month"]["pattern"], "2013-13")


def test_argo_takes_all_parameters_and_the_image(demo: Pipeline) -> None:
    spec = yaml.safe_load(export(demo, "argo", Target(image="registry/image:1")))["spec"]
    found = {each["name"]: each.get("value") for each in spec["arguments"]["parameters"]}
    assert found == {
        "container-image": "registry/image:1",
        "word": "two words",
        "factor": "2",
        "month": None,
        "sure": "True",
        "maybe": "",
        "share": "0.5",
    }
    images = {template["container"]["image"] for template in spec["templates"][1:]}
    assert images == {"{{workflow.parameters.container-image}}"}


def test_limits_are_handed_over(demo: Pipeline) -> None:
    jobs = yaml.safe_load(export(demo, "github", Target(pipeline="demo.yaml")))["jobs"]
    assert jobs["start"]["timeout-minutes"] * 60 > 3 * 90 + 1.5 + 3 and jobs["left"]["timeout-minutes"] == 15
    assert all(job["timeout-minutes"] * 60 <= 900 for job in jobs.values()), "none has more than the whole run"
    free = yaml.safe_load(export(replace(demo, timeout=None), "github", Target(pipeline="demo.yaml")))["jobs"]
    assert free["start"]["timeout-minutes"] == 25 and "timeout-minutes" not in free["left"]
    assert jobs["start"]["steps"][4]["run"].endswith("--retry") or any(
        "--retry" in s.get("run", "") for s in jobs["start"]["steps"]
    )
    spec = yaml.safe_load(export(demo, "argo"))["spec"]
    templates = {template["name"]: template for template in spec["templates"]}
    assert spec["activeDeadlineSeconds"] == 900 and templates["stage-start"]["activeDeadlineSeconds"] >= 90
    backoff = {"duration": "1.5s", "factor": "2"}
    assert templates["stage-start"]["retryStrategy"] == {"limit": "2", "retryPolicy": "Always", "backoff": backoff}
    assert "retryStrategy" not in templates["stage-left"]
    start = constants(export(demo, "airflow"))["STAGES"]["start"]
    assert (start["retries"], start["backoff"], start["timeout"]) == (2, 1.5, 90)


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_secret_is_named_and_its_value_never_written(
    demo: Pipeline, system: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKEN", "hidden-in-the-environment")
    text = export(demo, system, Target(pipeline="demo.yaml"))
    assert "hidden-in-the-environment" not in text and "TOKEN" in text
    if system == "github":
        steps = {name: job["steps"] for name, job in yaml.safe_load(text)["jobs"].items()}
        with_secret = {name for name, found in steps.items() if "secrets.TOKEN" in json.dumps(found)}
        assert with_secret == {"right-one"}
    if system == "argo":
        reference = {"name": "TOKEN", "valueFrom": {"secretKeyRef": {"name": "mlops-course", "key": "TOKEN"}}}
        templates = yaml.safe_load(text)["spec"]["templates"][1:]
        assert [template["name"] for template in templates if reference in template["container"]["env"]] == [
            "stage-right-one"
        ]


# ---------------------------------------------------------------- nothing is misread


def hostile(demo: Pipeline, text: str) -> Pipeline:
    """The pipeline with a text wherever a text can be."""
    parameters = tuple(
        replace(each, help=text, default=text if each.type == "text" else each.default) for each in demo.parameters
    )
    first = replace(
        demo.stages[0],
        makes=text,
        parameters={**demo.stages[0].parameters, "maybe": text.replace("${", "$ {") + "${maybe}-${share}"},
    )
    return replace(demo, description=text, parameters=parameters, stages=(first, *demo.stages[1:]))


def code(source: str) -> str:
    """A Python file without its constants."""
    tree = ast.parse(source)
    names = {"DESCRIPTION", "PARAMETERS", "STAGES"}
    kept = [
        line for line in tree.body if not (isinstance(line, ast.Assign) and getattr(line.targets[0], "id", "") in names)
    ]
    return ast.unparse(ast.Module(kept, []))


@pytest.mark.parametrize("text", NASTY)
def test_no_text_can_become_code_of_airflow(demo: Pipeline, text: str) -> None:
    pipeline = hostile(demo, text)
    source = export(pipeline, "airflow")
    assert code(source) == code(export(demo, "airflow"))
    found = constants(source)
    assert found["PARAMETERS"]["word"]["default"] == text and found["PARAMETERS"]["month"]["description"] == text
    assert found["STAGES"]["start"]["parameters"] == pipeline.stages[0].parameters
    compile(source, "dag.py", "exec")


@pytest.mark.parametrize("text", NASTY)
def test_no_text_can_become_a_part_of_github(demo: Pipeline, text: str) -> None:
    place = Target(pipeline="demo.yaml")
    plain, found = (yaml.safe_load(export(each, "github", place)) for each in (demo, hostile(demo, text)))
    inputs = found["on"].pop("workflow_dispatch")["inputs"]
    plain["on"].pop("workflow_dispatch")
    assert found == plain, "jobs, scripts and variables don't depend on texts"
    assert inputs["word"]["default"] == ("" if "${{" in text or "\n" in text else text)
    assert not any("${{" in entry["description"] for entry in inputs.values())


@pytest.mark.parametrize("text", NASTY)
def test_no_text_can_become_a_part_of_argo(demo: Pipeline, text: str) -> None:
    plain, found = (yaml.safe_load(export(each, "argo")) for each in (demo, hostile(demo, text)))
    parameters = {each["name"]: each for each in found["spec"].pop("arguments")["parameters"]}
    plain["spec"].pop("arguments")
    assert found == plain
    assert parameters["word"]["value"] == ("" if "{{" in text else text)
    assert "{{" not in parameters["month"].get("description", "")


@pytest.mark.parametrize("name", ["a: b", "1st", "a/b", "${{ x }}", "{{x}}", "", "ü", "a\n", "x" * 101])
@pytest.mark.parametrize("system", SYSTEMS)
def test_a_name_that_would_be_misread_is_refused(demo: Pipeline, name: str, system: str) -> None:
    for bad in (
        replace(demo, name=name),
        replace(demo, stages=(replace(demo.stages[0], secrets=(name,)), *demo.stages[1:])),
    ):
        with pytest.raises(PipelineError, match="can't be a name"):
            export(bad, system)


@pytest.mark.parametrize("value", [float("nan"), datetime.date(2013, 1, 1), {1, 2}, b"x"])
def test_a_value_that_json_cannot_hold_is_refused(demo: Pipeline, value: object) -> None:
    first = replace(demo.stages[0], parameters={**demo.stages[0].parameters, "maybe": [value]})
    object.__setattr__(demo, "stages", (first, *demo.stages[1:]))
    with pytest.raises(PipelineError, match="stage start has a value that no other system can take"):
        export(demo, "airflow")


def test_what_cannot_work_elsewhere_is_refused(demo: Pipeline, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ParameterError, match=r"no export to 'jenkins'.*github, airflow, argo"):
        export(demo, "jenkins")
    with pytest.raises(PipelineError, match="limit of inf seconds"):
        export(replace(demo, timeout=float("inf")), "argo")
    with pytest.raises(PipelineError, match="isn't in the repository"):
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
        export(demo, "github")
    monkeypatch.chdir(demo.folder)
    for system in SYSTEMS:
        with pytest.raises(PipelineError, match="made in Python"):
            export(replace(demo, path=None), system)
    many = tuple(Parameter(f"p{number}", "text", default="x") for number in range(26))
    object.__setattr__(demo, "parameters", many)
    with pytest.raises(PipelineError, match="more than 25 parameters"):
        export(demo, "github")


OWN = [("github", name) for name in ("STAGE", "RUN", "PIPELINE", "MLOPS_COURSE_HOME", "PARAMETER_word", "GITHUB_REF")]
OWN += [("argo", "MLOPS_COURSE_HOME"), ("argo", "PARAMETER_word"), ("airflow", "MLOPS_COURSE_HOME")]


@pytest.mark.parametrize(("system", "name"), OWN)
@pytest.mark.parametrize("kind", ["secrets", "environment"])
def test_a_variable_called_like_one_of_the_files_own_is_refused(
    demo: Pipeline, system: str, name: str, kind: str
) -> None:
    stages = (demo.stages[0], replace(demo.stages[1], **{kind: (name,)}), *demo.stages[2:])
    with pytest.raises(PipelineError, match=f"stage left has the variable {name}, which {system} sets itself"):
        export(replace(demo, stages=stages), system, Target(pipeline="demo.yaml"))


def test_pipelines_that_hand_one_workspace_on_wait_for_each_other(demo: Pipeline) -> None:
    def group(pipeline: Pipeline, place: Target) -> str:
        found: str = yaml.safe_load(export(pipeline, "github", place))["concurrency"]["group"]
        return found

    handed, own = Target(pipeline="demo.yaml"), Target(pipeline="demo.yaml", workspace="/srv")
    other = replace(demo, name="other")
    assert group(demo, handed) == group(other, handed)
    assert group(demo, own) != group(other, own)


def test_names_that_differ_only_in_signs_stay_two(demo: Pipeline) -> None:
    stages = list(demo.stages)
    stages[1], stages[2] = replace(stages[1], name="a_b"), replace(stages[2], name="a-b")
    found = needs(replace(demo, stages=tuple(stages)), "argo")
    assert set(found) == {"start", "a-b", "a-b-2", "end"} and found["end"] == {"a-b", "a-b-2"}


def test_where_a_file_is_written(demo: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert save_export(demo, "github").as_posix() == ".github/workflows/pipeline-demo.yml"
    assert (
        yaml.safe_load(Path(".github/workflows/pipeline-demo.yml").read_text(encoding="utf-8"))["env"]["PIPELINE"]
        == "pipelines/demo.yaml"
    )
    assert save_export(demo, "airflow", tmp_path / "x.py").read_text(encoding="utf-8") == export(demo, "airflow")


# ---------------------------------------------------------------- one stage, anywhere


def test_a_stage_reads_what_the_stages_before_it_recorded(
    demo: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKEN", "hidden")
    monkeypatch.setenv("OTHER", "another")
    given, folder = {"month": "2013-10", "word": "it's {{ x }}", "factor": "3"}, tmp_path / "run"
    assert run_stage(demo, "start", folder, given)["letters"] == 36
    run_stage(demo, "left", folder, given)
    run_stage(demo, "right_one", folder, given)
    right = {"text": "it's {{ x }}", "month": "2013-10", "sure": True}
    assert run_stage(demo, "end", folder, given) == {"total": [37, right]}
    saved = (folder / "right_one.ipynb").read_text(encoding="utf-8")
    assert "hidden" not in saved and "the token is ***" in saved
    assert sorted(path.name for path in folder.iterdir()) == [
        "end.ipynb",
        "files",
        "left.ipynb",
        "right_one.ipynb",
        "start.ipynb",
    ]


def test_a_stage_whose_input_is_missing_says_whose_it_is(demo: Pipeline, tmp_path: Path) -> None:
    with pytest.raises(ResultError, match=r"start\.ipynb"):
        run_stage(demo, "left", tmp_path / "run", {"month": "2013-10"})
    shutil.copytree(demo.folder, tmp_path / "run")  # notebooks that were never executed
    with pytest.raises(ResultError, match="stage left needs 'letters'"):
        run_stage(demo, "left", tmp_path / "run", {"month": "2013-10"})
    with pytest.raises(ParameterError, match="no stage 'lefd'"):
        run_stage(demo, "lefd", tmp_path / "run", {"month": "2013-10"})


def test_a_stage_is_tried_again_when_asked(demo: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTHER", "another")
    flaky = "tries = Path('../tries')\ntries.write_text(tries.read_text() + 'x' if tries.exists() else 'x')\n"
    flaky += "Path('left').open('a').write('x')\nassert len(tries.read_text()) > 1\n"
    write(
        demo.folder / "start.ipynb",
        "word: str = ''\nfactor: int = 1\nmaybe: 'str or None' = None",
        RECORD + flaky + START,
    )
    stages = (replace(demo.stages[0], backoff=0.01), *demo.stages[1:])
    with pytest.raises(CourseError, match="AssertionError"):
        run_stage(replace(demo, stages=stages), "start", tmp_path / "once", {"month": "2013-10"})
    found = run_stage(replace(demo, stages=stages), "start", tmp_path / "run", {"month": "2013-10"}, retry=True)
    assert found["letters"] == 18 and (tmp_path / "run" / "files" / "tries").read_text() == "xx"
    left = {path.parent.name: path.read_text() for path in tmp_path.glob("run/files/*/left")}
    assert left == {"start": "x", ".start.attempt1": "x"}, "each attempt begins in an empty folder"


def test_the_program_takes_parameters_from_the_environment(
    demo: Pipeline, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {
        "OTHER": "another",
        "PARAMETER_word": "$(touch evil) \"'",
        "PARAMETER_month": "2013-10",
        "PARAMETER_factor": "",
    }.items():
        monkeypatch.setenv(name, value)
    arguments = [str(demo.path), "start", "--folder", str(tmp_path / "run")]
    assert main(arguments) == 0
    assert json.loads(capfd.readouterr().out)["letters"] == 2 * len("$(touch evil) \"'")
    monkeypatch.setenv("PARAMETER_month", "2013-13")
    assert main(arguments) == 1
    error = capfd.readouterr().err
    assert "2013-13" in error and len(error.strip().splitlines()) == 1


# ---------------------------------------------------------------- the files work


def substitute(text: str, known: dict[str, str]) -> str:
    """What a system puts where its braces are; anything unknown is an error."""
    return re.sub(r"\$?\{\{ *([\w.-]+) *\}\}", lambda found: known[found[1]], text)


def step(command: str, variables: dict[str, str], folder: Path, machine: dict[str, str] | None = None) -> None:
    """Run a script as GitHub does: on a machine with these variables, or else with our Python."""
    environment = {name: os.environ[name] for name in ("PATH", "HOME", "PYTHONPATH") if name in os.environ} | variables
    if machine is None:
        command = command.replace("python -m", f"'{sys.executable}' -m")
    else:
        environment = machine | variables
    subprocess.run(
        ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", command], env=environment, cwd=folder, check=True
    )


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("bash") is None or shutil.which("tar") is None, reason="needs bash and tar")
@pytest.mark.system
def test_jobs_on_bare_machines_hand_the_workspace_on(demo: Pipeline, tmp_path: Path) -> None:
    workflow = yaml.safe_load(export(demo, "github", Target(pipeline=str(demo.path))))
    form = {
        "word": "$(touch evil) `touch evil` \"' ; touch evil",
        "factor": "1",
        "month": "2013-10",
        "sure": "false",
        "maybe": "",
        "share": "0.5",
    }
    known = {
        "github.run_id": "7",
        "github.run_attempt": "1",
        "secrets.TOKEN": "hidden",
        "secrets.OTHER": "another",
        "vars.REGION": "",
    }
    known |= {f"inputs.{name}": value for name, value in form.items()}
    kept: dict[str, Path] = {}
    for name, job in workflow["jobs"].items():
        machine = tmp_path / f"machine-{name}"  # each job begins with nothing
        machine.mkdir()
        known["github.workspace"] = "/nowhere/workspace-of-the-job"
        work = {"github.workspace": str(tmp_path / "machine")}
        (tmp_path / "machine").unlink(missing_ok=True)
        (tmp_path / "machine").symlink_to(machine)  # the same path on each machine, as on GitHub's
        known |= work
        run_job(workflow, job, known, kept, machine)
    results = read_result(kept["notebook-end"])
    assert results["total"] == [len(form["word"]) + 1, {"text": form["word"], "month": "2013-10", "sure": False}]
    assert not list(tmp_path.rglob("evil"))
    assert all(b"hidden" not in path.read_bytes() for path in kept.values())


def run_job(
    workflow: dict[str, Any],
    job: dict[str, Any],
    known: dict[str, str],
    kept: dict[str, Path],
    machine: Path,
    variables: dict[str, str] | None = None,
) -> None:
    """The steps of a job; artifacts and caches are files. With a machine's variables, everything is installed, too."""
    common = {name: substitute(value, known) for name, value in workflow["env"].items()}
    known = known | {"env.RUN": common["RUN"]}
    for each in job["steps"]:
        options = {key: substitute(str(value), known) for key, value in each.get("with", {}).items()}
        action = each.get("uses", "").partition("@")[0]
        if action == "actions/upload-artifact":
            kept[options["name"]] = machine.parent / f"kept-{options['name']}"
            shutil.copy(machine / options["path"], kept[options["name"]])
        elif action == "actions/download-artifact":
            shutil.copy(kept[options["name"]], machine / "workspace.tar")
        elif "run" in each and (each["name"] != "Install" or variables):
            own = {name: substitute(value, known) for name, value in each.get("env", {}).items()}
            step(each["run"], common | own, machine, variables)


@pytest.mark.slow
@pytest.mark.system
def test_containers_that_share_a_volume(demo: Pipeline, tmp_path: Path) -> None:
    place = Target(pipeline=str(demo.path), workspace=str(tmp_path / "volume"))
    spec = yaml.safe_load(export(demo, "argo", place))["spec"]
    given = {each["name"]: each.get("value", "2013-10") for each in spec["arguments"]["parameters"]}
    known = {f"workflow.parameters.{name}": value for name, value in given.items()} | {"workflow.uid": "u1"}
    for template in spec["templates"][1:]:
        container = template["container"]
        assert container["command"][0] == "python" and container["volumeMounts"][0]["mountPath"] == place.workspace
        variables = {
            each["name"]: substitute(each["value"], known) if "value" in each else "hidden" for each in container["env"]
        }
        arguments = [substitute(each, known) for each in container["args"]]
        environment = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ} | variables
        subprocess.run(
            [sys.executable, *container["command"][1:], *arguments], env=environment, check=True, cwd=tmp_path
        )
    right = {"text": "two words", "month": "2013-10", "sure": True}
    assert read_result(tmp_path / "volume" / "runs" / "argo-u1" / "end.ipynb")["total"] == [19, right]


# ---------------------------------------------------------------- each system's own opinion


@pytest.mark.parametrize(
    "place", [Target(pipeline="x.yaml"), Target(pipeline="x.yaml", workspace="/srv", runner="self-hosted")]
)
def test_github_schema(demo: Pipeline, place: Target, tmp_path: Path) -> None:
    pytest.importorskip("check_jsonschema")
    for number, pipeline in enumerate(
        [demo, hostile(demo, 'it\'s {{ x }}: "#"\n'), find_pipeline("training"), find_pipeline("scoring")]
    ):
        (tmp_path / f"{number}.yml").write_text(export(pipeline, "github", place), encoding="utf-8")
    command = [
        sys.executable,
        "-m",
        "check_jsonschema",
        "--builtin-schema",
        "vendor.github-workflows",
        *tmp_path.glob("*.yml"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


ARGO = """
import sys, yaml
from hera.workflows.models import WorkflowTemplate
for path in sys.argv[1:]:
    written = yaml.safe_load(open(path, encoding="utf-8"))
    read = WorkflowTemplate.model_validate(written).model_dump(exclude_none=True, by_alias=True, mode="json")
    assert read == written, (path, "an entry is unknown to Argo")
"""


@pytest.mark.system
def test_argo_models(demo: Pipeline, tmp_path: Path) -> None:
    for number, pipeline in enumerate(
        [demo, hostile(demo, 'it\'s {{ x }}: "#"\n'), find_pipeline("training"), find_pipeline("scoring")]
    ):
        (tmp_path / f"{number}.yaml").write_text(export(pipeline, "argo"), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-c", ARGO, *map(str, tmp_path.glob("*.yaml"))], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


AIRFLOW_PYTHON = Path(sys.prefix) / "airflow" / "bin" / "python"
needs_airflow = pytest.mark.skipif(not AIRFLOW_PYTHON.exists(), reason="Airflow is not installed (make system)")
AIRFLOW = """
import json, sys
from airflow.dag_processing.dagbag import DagBag
bag = DagBag(sys.argv[1])
assert not bag.import_errors, bag.import_errors
run = bag.dags["demo"].test(run_conf={"month": "2013-10"})
edges = {name: {task.task_id: sorted(task.upstream_task_ids) for task in dag.tasks} for name, dag in bag.dags.items()}
print(json.dumps({"state": str(run.state), "edges": edges}))
"""


@pytest.mark.slow
@pytest.mark.thorough
@pytest.mark.system
@needs_airflow
def test_airflow_loads_and_runs_it(demo: Pipeline, tmp_path: Path) -> None:
    text, python = 'it\'s {{ ds }} ${HOME}\n"#" ü', str(AIRFLOW_PYTHON)
    strange = tmp_path / "{{ ds }} {x} 'y"
    shutil.copytree(demo.folder, strange)
    place = Target(workspace=str(tmp_path / "shared {w}"), kernel="project", folder=str(strange))
    for pipeline in (
        hostile(Pipeline.read(strange / "demo.yaml"), text),
        find_pipeline("training"),
        find_pipeline("scoring"),
    ):
        save_export(pipeline, "airflow", tmp_path / "dags" / f"{pipeline.name}.py", place)
    kernel = {
        "argv": [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"],
        "display_name": "x",
        "language": "python",
    }
    (tmp_path / "jupyter" / "kernels" / "project").mkdir(parents=True)
    (tmp_path / "jupyter" / "kernels" / "project" / "kernel.json").write_text(json.dumps(kernel))
    variables = {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "AIRFLOW_HOME": str(tmp_path / "airflow"),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "AIRFLOW__CORE__DAGBAG_IMPORT_TIMEOUT": "120",
    }
    variables |= {"JUPYTER_PATH": str(tmp_path / "jupyter"), "AIRFLOW__CORE__DAGS_FOLDER": str(tmp_path / "dags")}
    variables |= {"AIRFLOW_VAR_TOKEN": "hidden", "OTHER": "another"}
    subprocess.run([python, "-m", "airflow", "db", "migrate"], env=variables, check=True, capture_output=True)
    done = subprocess.run(
        [python, "-c", AIRFLOW, str(tmp_path / "dags")], env=variables, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert found["state"] == "success", done.stdout[-3000:]
    for pipeline in (demo, find_pipeline("training"), find_pipeline("scoring")):
        assert {name: set(edges) for name, edges in found["edges"][pipeline.name].items()} == pipeline.needs
    (run,) = (tmp_path / "shared {w}" / "runs").iterdir()
    right = {"text": text, "month": "2013-10", "sure": True}
    assert read_result(run / "end.ipynb")["total"] == [2 * len(text) + 1, right]
    assert "hidden" not in (run / "right_one.ipynb").read_text(encoding="utf-8") + done.stdout


# ---------------------------------------------------------------- in a stranger's repository


def write_repository(folder: Path) -> Path:
    """Three notebooks, a helper module, data, a requirement of its own, and nothing of this course's layout."""
    for name in ("steps", "data"):
        (folder / name).mkdir(parents=True)
    (folder / "ours.py").write_text("def shout(text):\n    return text.upper() + '!'\n")
    (folder / "steps" / "beside.py").write_text("def lines(path):\n    return path.read_text().splitlines()\n")
    (folder / "data" / "words.txt").write_text("one\ntwo\nthree\n")
    (folder / "requirements.txt").write_text("# what the notebooks want\nletters-of-ours>=1\n")
    count = "import beside, letters_of_ours\nwords = beside.lines(Path(source))\n"
    count += "record_result(count=letters_of_ours.count(words))"
    write(folder / "steps" / "count.ipynb", "source: str = None", RECORD + count)
    write(folder / "steps" / "sweep.ipynb", "", "print('swept')")
    report = "import ours\nPath('report.txt').write_text(ours.shout(f'{count} {word}'))\n"
    report += "record_result(report='report.txt', text=Path('report.txt').read_text())"
    write(folder / "steps" / "report.ipynb", "count: int = None\nword: str = ''", RECORD + report)
    (folder / "steps" / "words.yaml").write_text(WORDS, encoding="utf-8")
    for command in (["init", "-q"], ["add", "."], [*AUTHOR, "commit", "-qm", "All of it"]):
        subprocess.run(["git", *command], cwd=folder, check=True)
    return folder


AUTHOR = ["-c", "user.name=Somebody", "-c", "user.email=somebody@example.org"]
WORDS = """
name: words
parameters:
  source: {type: path, default: data/words.txt}
  word: {type: text, default: letters}
stages:
  - {name: sweep, notebook: sweep.ipynb}
  - {name: count, notebook: count.ipynb, after: [sweep], parameters: {source: "${source}"}, outputs: {count: value}}
  - name: report
    notebook: report.ipynb
    parameters: {word: "${word}"}
    inputs: [count]
    outputs: {report: file}
"""


def exported(repository: Path, system: str, *options: str) -> str:
    """What the command writes, started anywhere."""
    command = [sys.executable, "-c", "from mlops_course.cli import main; main()", "export"]
    command += [str(repository / "steps" / "words.yaml"), "--to", system, *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=repository.parent)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_no_export_holds_a_path_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = write_repository(tmp_path / "theirs")
    here = [str(Path.home()), str(tmp_path), str(Path.cwd()), sys.prefix, os.environ["MLOPS_COURSE_HOME"], "/tmp"]
    for system in SYSTEMS:
        ours = [export(find_pipeline(name), system) for name in ("training", "scoring")]
        for text in [exported(repository, system), *ours]:
            assert [path for path in here if path != "/" and path in text] == []
    assert "steps/words.yaml" in exported(repository, "github") and "nbs" not in exported(repository, "argo")
    monkeypatch.chdir(repository)
    source = Parameter("source", "path", default=str(repository / "data" / "words.txt"))
    pipeline = Pipeline.read("steps/words.yaml")
    for system in SYSTEMS:
        with pytest.raises(PipelineError, match=r"default of source has .*words\.txt, which is a place on this"):
            export(replace(pipeline, parameters=(source, pipeline.parameters[1])), system)
    shutil.copy("steps/sweep.ipynb", tmp_path / "outside.ipynb")
    outside = replace(pipeline.stages[0], notebook=Path("../../outside.ipynb"))
    beside = replace(pipeline.stages[0], notebook=Path("../steps/sweep.ipynb"))
    for system in SYSTEMS:
        for default in (f"file://{repository}/data", f"sqlite:///{repository}/a.db", f"file:{repository}"):
            address = Parameter("source", "text", default=default)
            with pytest.raises(PipelineError, match=r"the default of source has .* a place on this machine"):
                export(replace(pipeline, parameters=(address, pipeline.parameters[1])), system)
        with pytest.raises(PipelineError, match=r"stage sweep, \.\./\.\./outside\.ipynb, lies outside the repository"):
            export(replace(pipeline, stages=(outside, *pipeline.stages[1:])), system)
        assert export(replace(pipeline, stages=(beside, *pipeline.stages[1:])), system)
        for default in (f"s3:/{Path.home()}/data", f"https://example.org{repository}", f"{repository}-not"):
            address = Parameter("source", "text", default=default)
            assert export(replace(pipeline, parameters=(address, pipeline.parameters[1])), system)
    absolute = replace(pipeline.stages[0], notebook=repository / "steps" / "sweep.ipynb")
    with pytest.raises(PipelineError, match=r"stage sweep has .*a place on this machine"):
        export(replace(pipeline, stages=(absolute, *pipeline.stages[1:])), "argo")


def test_order_without_data_is_in_every_export(tmp_path: Path) -> None:
    repository = write_repository(tmp_path / "theirs")
    pipeline = Pipeline.read(repository / "steps" / "words.yaml")
    assert pipeline.needs["count"] == {"sweep"}
    for system in SYSTEMS:
        assert needs(pipeline, system, Target(pipeline="x.yaml", workspace="/srv")) == pipeline.needs


@pytest.mark.parametrize(
    ("files", "place", "expected"),
    [
        ({}, Target(), "pip install mlops_course==VERSION"),
        ({"requirements.txt": "a"}, Target(), "pip install mlops_course==VERSION --requirement requirements.txt"),
        ({"requirements.txt": "a\nmlops-course[x]>=0"}, Target(), "pip install --requirement requirements.txt"),
        (
            {"requirements.txt": "a==1 --hash=sha256:0"},
            Target(),
            "pip install --requirement requirements.txt\npython -m pip install mlops_course==VERSION",
        ),
        ({"pyproject.toml": "[project]\nname = 'a'"}, Target(), "pip install mlops_course==VERSION ."),
        ({"pyproject.toml": "[tool.ruff]"}, Target(), "pip install mlops_course==VERSION"),
        ({"my reqs": "a"}, Target(requirements=("my reqs",)), "mlops_course==VERSION --requirement 'my reqs'"),
        ({}, Target(package="mlops_course @ git+https://x/y@v1"), "pip install 'mlops_course @ git+https://x/y@v1'"),
        ({"requirements.txt": "a"}, Target(install="make install"), "make install"),
    ],
)
def test_each_job_installs_what_the_repository_asks_for(
    tmp_path: Path, files: dict[str, str], place: Target, expected: str
) -> None:
    repository = write_repository(tmp_path / "theirs")
    (repository / "requirements.txt").unlink()
    for name, text in files.items():
        (repository / name).write_text(text)
    workflow = yaml.safe_load(export(Pipeline.read(repository / "steps" / "words.yaml"), "github", place))
    for job in workflow["jobs"].values():
        steps = {step.get("name", step.get("uses", "")): step for step in job["steps"]}
        assert steps["Install"]["run"].endswith(expected.replace("VERSION", __version__))
        with_python = steps["actions/setup-python@v6"]["with"]
        assert with_python["python-version"] == ".".join(map(str, sys.version_info[:2]))
        assert all((repository / with_python["cache-dependency-path"]).is_file() for _ in range("cache" in with_python))


def test_what_a_system_has_no_use_for_is_refused() -> None:
    with pytest.raises(ParameterError, match="--image is for argo or airflow, not for github"):
        target_for("github", {"image": "x"})
    with pytest.raises(ParameterError, match="--runner is for github, not for argo"):
        target_for("argo", {"runner": "x", "image": None})
    with pytest.raises(ParameterError, match="no 'imgae' to say"):
        target_for("argo", {"imgae": "x"})
    assert target_for("argo", {"image": "x", "requirements": ()}) == Target(image="x")


def test_requirements_that_are_not_there(tmp_path: Path) -> None:
    pipeline = Pipeline.read(write_repository(tmp_path / "theirs") / "steps" / "words.yaml")
    with pytest.raises(ParameterError, match=r"there is no reqs\.txt in the repository"):
        export(pipeline, "github", Target(requirements=("reqs.txt",)))


def test_argo_and_airflow_are_told_where_things_are(tmp_path: Path) -> None:
    repository = write_repository(tmp_path / "theirs")
    options = ["--image", "ours:1", "--claim", "disk", "--folder", "/repo", "--workspace", "/shared"]
    argo = yaml.safe_load(exported(repository, "argo", *options, "--secret", "keys"))["spec"]
    assert argo["arguments"]["parameters"][0] == {"name": "container-image", "value": "ours:1"}
    assert argo["volumes"][0]["persistentVolumeClaim"] == {"claimName": "disk"}
    container = argo["templates"][1]["container"]
    assert (container["workingDir"], container["args"][0]) == ("/repo", "steps/words.yaml")
    assert container["volumeMounts"] == [{"name": "workspace", "mountPath": "/shared"}]
    assert "workingDir" not in yaml.safe_load(exported(repository, "argo"))["spec"]["templates"][1]["container"]
    airflow = exported(repository, "airflow", *options, "--kernel", "theirs")
    found = constants(airflow)
    assert (found["PIPELINE"], found["FOLDER"], found["KERNEL"]) == ("steps/words.yaml", "/repo", "theirs")
    assert "IMAGE, CLAIM = 'ours:1', 'disk'" in airflow
    assert "HOME = Path(os.environ.get(\"MLOPS_COURSE_HOME\") or '/shared')" in airflow


def build_wheels(folder: Path) -> Path:
    """Our own wheel, and one that the repository asks for."""
    source, wheels = folder / "source", folder / "wheels"
    others = (".*", "_docs", "_proc", "build", "dist", "workspace", "__pycache__", "*.egg-info", "tests")
    left_out = shutil.ignore_patterns(*others)
    shutil.copytree(ROOT, source, ignore=left_out, symlinks=True)
    command = [sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", wheels, source]
    subprocess.run([str(part) for part in command], check=True, capture_output=True)
    with zipfile.ZipFile(wheels / "letters_of_ours-1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr("letters_of_ours.py", "def count(words):\n    return sum(map(len, words))\n")
        about = "letters_of_ours-1.2.dist-info"
        wheel.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: letters-of-ours\nVersion: 1.2\n")
        wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{about}/RECORD", "")
    return wheels


def link_packages(venv: Path) -> None:
    """Let an environment have what our package needs, but neither it nor anything of the repository."""
    inside = Path(sysconfig.get_path("purelib", vars={"base": str(venv)}))
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        ours = path.name.startswith(("mlops_course", "__editable__", "_mlops_course")) or path.suffix == ".pth"
        if not ours and not (inside / path.name).exists():
            (inside / path.name).symlink_to(path)


@pytest.fixture(name="clean", scope="module")
def _clean(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A machine's variables: a new environment, whose pip finds our wheel and the locked versions.

    To download some hundred packages takes minutes, and that they can be installed is shown elsewhere. So they are
    there already, unless BARE_MACHINE is set.
    """
    folder = tmp_path_factory.mktemp("clean")
    subprocess.run([sys.executable, "-m", "venv", str(folder / "venv")], check=True)
    if not os.environ.get("BARE_MACHINE"):
        link_packages(folder / "venv")
    script = "import tasks, sys; sys.stdout.write(tasks.constraints())"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, capture_output=True, text=True)
    (folder / "constraints.txt").write_text(done.stdout)
    found = {name: value for name, value in os.environ.items() if name.startswith("PIP_") or name == "HOME"}
    links = " ".join([str(build_wheels(folder)), *os.environ.get("PIP_FIND_LINKS", "").split()])
    found |= {"PIP_FIND_LINKS": links, "PIP_CONSTRAINT": str(folder / "constraints.txt")}
    binaries = "Scripts" if os.name == "nt" else "bin"
    return found | {"PATH": os.pathsep.join([str(folder / "venv" / binaries), "/usr/bin", "/bin"])}


@pytest.mark.slow
@pytest.mark.thorough
@pytest.mark.system
@pytest.mark.skipif(shutil.which("bash") is None or shutil.which("tar") is None, reason="needs bash and tar")
def test_a_strangers_workflow_runs_as_it_is(tmp_path: Path, clean: dict[str, str]) -> None:
    repository = write_repository(tmp_path / "theirs")
    workflow = yaml.safe_load(exported(repository, "github"))
    known = {"github.run_id": "7", "github.run_attempt": "1", "inputs.source": "", "inputs.word": "LETTERS"}
    kept: dict[str, Path] = {}
    place = tmp_path / "machine"
    known["github.workspace"] = str(place)
    for name, job in workflow["jobs"].items():
        machine = tmp_path / f"machine-{name}"  # each job begins with what was checked out
        subprocess.run(["git", "clone", "-q", repository, machine], check=True)
        place.unlink(missing_ok=True)
        place.symlink_to(machine)
        run_job(workflow, job, known, kept, machine, clean)
    assert list(workflow["jobs"]) == ["sweep", "count", "report"]
    assert read_result(kept["notebook-report"])["text"] == "11 LETTERS!"
    assert "swept" in kept["notebook-sweep"].read_text(encoding="utf-8")


FIND = """
import json, os, sys
from airflow.dag_processing.dagbag import DagBag
bag = DagBag(sys.argv[1])
assert not bag.import_errors, bag.import_errors
run = bag.dags["words"].test(run_conf={"word": "letters"})
print(json.dumps({"state": str(run.state)}))
"""


@pytest.mark.slow
@pytest.mark.thorough
@pytest.mark.system
@needs_airflow
def test_a_strangers_dag_finds_its_repository(tmp_path: Path) -> None:
    repository, python = write_repository(tmp_path / "theirs"), str(AIRFLOW_PYTHON)
    (repository / "letters_of_ours.py").write_text("def count(words):\n    return sum(map(len, words))\n")
    (repository / "dags").mkdir()
    (repository / "dags" / "words.py").write_text(exported(repository, "airflow", "--kernel", "theirs"))
    argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    kernel = tmp_path / "jupyter" / "kernels" / "theirs"
    kernel.mkdir(parents=True)
    (kernel / "kernel.json").write_text(json.dumps({"argv": argv, "display_name": "x", "language": "python"}))
    variables = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "AIRFLOW_HOME": str(tmp_path / "airflow")}
    variables |= {"AIRFLOW__CORE__DAGBAG_IMPORT_TIMEOUT": "120"}
    variables |= {"AIRFLOW__CORE__LOAD_EXAMPLES": "False", "JUPYTER_PATH": str(tmp_path / "jupyter")}
    variables |= {"AIRFLOW__CORE__DAGS_FOLDER": str(repository / "dags")}
    subprocess.run([python, "-m", "airflow", "db", "migrate"], env=variables, check=True, capture_output=True)
    command = [python, "-c", FIND, str(repository / "dags")]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.strip().splitlines()[-1])["state"] == "success", done.stdout[-3000:]
    (run,) = (tmp_path / "airflow" / "mlops-course" / "runs").iterdir()
    assert read_result(run / "report.ipynb")["text"] == "11 LETTERS!"
