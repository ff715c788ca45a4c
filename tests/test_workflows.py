"""The workflows: what they may do, that their commands exist, and that what they call does what it says."""

import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import click
import pytest
import typer
import yaml
from conftest import ROOT
from delivery_helpers import FIRST, SECOND
from service_helpers import serving

from mlops_course.cli import app
from mlops_course.delivery.report import REPORT_MARK
from mlops_course.delivery.sign_off import gate_report_file
from mlops_course.environment import Settings
from mlops_course.ledger import read_ledger

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
PINNED = re.compile(r"uses: [\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+")
by_workflow = pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)


def jobs_of(workflow: Path) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = yaml.safe_load(workflow.read_text(encoding="utf-8"))["jobs"]
    return found


def scripts_of(job: dict[str, Any]) -> list[str]:
    return [step["run"] for step in job["steps"] if "run" in step]


# ---------------------------------------------------------------- what they may do


@by_workflow
def test_an_action_is_pinned_to_a_commit_and_says_which_version_that_is(workflow: Path) -> None:
    uses = [line.strip().removeprefix("- ") for line in workflow.read_text(encoding="utf-8").splitlines()]
    assert [line for line in uses if line.startswith("uses:") and not PINNED.fullmatch(line)] == []


@by_workflow
def test_a_job_may_write_only_what_it_is_there_for(workflow: Path) -> None:
    allowed = {"publish": {"pages", "id-token"}, "image": {"packages", "id-token", "attestations"}}
    allowed["comment"] = {"pull-requests"}
    for name, job in jobs_of(workflow).items():
        writes = {what for what, how in job.get("permissions", {}).items() if how == "write"}
        if workflow.stem in ("docs", "image", "comment"):
            assert writes <= allowed.get(name, set())
        else:
            assert writes == set()


@by_workflow
def test_what_somebody_else_has_written_never_becomes_part_of_a_script(workflow: Path) -> None:
    scripts = [script for job in jobs_of(workflow).values() for script in scripts_of(job)]
    assert [script for script in scripts if "${{" in script] == [], "hand it in by env, and quote the variable"


@by_workflow
def test_no_checkout_leaves_a_token_behind(workflow: Path) -> None:
    steps = [step for job in jobs_of(workflow).values() for step in job["steps"]]
    checkouts = [step for step in steps if "actions/checkout@" in step.get("uses", "")]
    assert [step for step in checkouts if step["with"]["persist-credentials"] is not False] == []


@by_workflow
def test_only_the_default_branchs_code_runs_where_the_models_live(workflow: Path) -> None:
    """A job without an environment, which could refuse other branches, has to refuse them itself."""
    jobs = [job for job in jobs_of(workflow).values() if "self-hosted" in job["runs-on"]]
    first = "github.ref_name == github.event.repository.default_branch"
    assert [job for job in jobs if job.get("if") != first and "needs" not in job] == []
    assert [job for job in jobs if "MLOPS_COURSE_HOME:?" not in job["steps"][0].get("run", "")] == []


@by_workflow
def test_a_job_ends_some_time(workflow: Path) -> None:
    assert [name for name, job in jobs_of(workflow).items() if "timeout-minutes" not in job] == []


def course_commands() -> list[tuple[str, list[str]]]:
    """Each line of a workflow that calls the course's command: the workflow, and the words."""
    found = []
    for workflow in WORKFLOWS:
        for script in (script for job in jobs_of(workflow).values() for script in scripts_of(job)):
            for line in re.findall(r"\bmlops-course ([^\n|>)]*)", script.replace("\\\n", " ")):
                words = shlex.split(line)
                stop = next((at for at, word in enumerate(words) if word == "||"), len(words))
                found.append((workflow.stem, words[:stop]))
    return found


@pytest.mark.parametrize(("workflow", "words"), course_commands(), ids=lambda value: str(value)[:60])
def test_a_command_in_a_workflow_is_one_that_there_is(workflow: str, words: list[str]) -> None:
    command: Any = typer.main.get_command(app)
    while isinstance(command, click.Group) or hasattr(command, "commands"):
        command = command.get_command(click.Context(command), words.pop(0))
        assert command is not None, workflow
    options = {name: parameter for parameter in command.params for name in parameter.opts if name.startswith("-")}
    given = [word for word in words if word.startswith("--")]
    assert [word for word in given if word not in options] == []
    arguments = [parameter for parameter in command.params if parameter.param_type_name == "argument"]
    values = sum(not options[word].is_flag for word in given)
    assert len(words) - len(given) - values <= len(arguments)


# ---------------------------------------------------------------- GitHub, as far as the scripts ask it


class GitHub(ThreadingHTTPServer):
    """What the scripts ask of GitHub: it can't be here, so this keeps pull requests, comments and approvals."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.pulls: list[dict[str, Any]] = []
        self.comments: list[dict[str, Any]] = []
        self.approvals: list[dict[str, Any]] = []
        self.tokens: set[str | None] = set()

    def page(self, path: str, query: dict[str, list[str]]) -> list[dict[str, Any]]:
        if path == "/repos/ann/course/pulls":
            found = [each for each in self.pulls if each["head"]["label"] == query["head"][0]]
        elif path == "/repos/ann/course/actions/runs/7/approvals":
            return self.approvals
        else:
            assert path == "/repos/ann/course/issues/5/comments"
            found = self.comments
        size, number = int(query["per_page"][0]), int(query["page"][0])
        return found[size * (number - 1) : size * number]

    def say(self, body: str, login: str = "github-actions[bot]") -> None:
        self.comments.append({"id": 1000 + len(self.comments), "user": {"login": login}, "body": body})


class Answer(BaseHTTPRequestHandler):
    """One answer."""

    server: GitHub

    def answer(self, content: Any) -> None:
        self.server.tokens.add(self.headers["Authorization"])
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(content).encode())

    def sent(self) -> Any:
        return json.loads(self.rfile.read(int(self.headers["Content-Length"])))

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        self.answer(self.server.page(parts.path, parse_qs(parts.query)))

    def do_POST(self) -> None:
        self.server.say(self.sent()["body"])
        self.answer(self.server.comments[-1])

    def do_PATCH(self) -> None:
        wanted = int(self.path.rpartition("/")[2])
        (found,) = (each for each in self.server.comments if each["id"] == wanted)
        found["body"] = self.sent()["body"]
        self.answer(found)

    def log_message(self, *words: Any) -> None:
        """Say nothing."""


@pytest.fixture
def github() -> Iterator[GitHub]:
    with GitHub() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def environment_of(github: GitHub) -> dict[str, str]:
    about = {"GITHUB_API_URL": f"http://127.0.0.1:{github.server_port}", "GITHUB_REPOSITORY": "ann/course"}
    return {**os.environ, **about, "GITHUB_TOKEN": "sesame", "GITHUB_RUN_ID": "7", "GITHUB_ACTOR": "ann"}


def call(github: GitHub, script: str, *words: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, str(ROOT / "deploy" / script), *words]
    return subprocess.run(command, env=environment_of(github), capture_output=True, text=True, timeout=60)


def post(github: GitHub, folder: Path, text: str, commit: str) -> "subprocess.CompletedProcess[str]":
    report = folder / "model-report.md"
    report.write_text(text, encoding="utf-8")
    return call(github, "comment.py", str(report), "--head", "eve:faster/trees", "--commit", commit)


def test_a_pull_request_has_one_comment_that_survives_a_rebase(github: GitHub, tmp_path: Path) -> None:
    github.pulls = [{"number": 5, "head": {"label": "eve:faster/trees", "sha": "a" * 40}}]
    for number in range(150):
        github.say(f"remark {number}", "eve")
    github.say(f"{REPORT_MARK}\nnot by us", "eve")
    assert post(github, tmp_path, f"{REPORT_MARK}\nfirst", "a" * 40).stdout == "posted on pull request 5\n"
    github.pulls[0]["head"]["sha"] = "b" * 40
    assert post(github, tmp_path, f"{REPORT_MARK}\nsecond", "b" * 40).stdout == "updated on pull request 5\n"
    ours = [each["body"] for each in github.comments if each["user"]["login"] == "github-actions[bot]"]
    assert ours == [f"{REPORT_MARK}\nsecond\n\nOf commit {'b' * 12}."]
    assert len(github.comments) == 152
    assert github.tokens == {"Bearer sesame"}


def test_a_late_report_of_an_earlier_commit_says_nothing(github: GitHub, tmp_path: Path) -> None:
    github.pulls = [{"number": 5, "head": {"label": "eve:faster/trees", "sha": "b" * 40}}]
    done = post(github, tmp_path, f"{REPORT_MARK}\nfirst", "a" * 40)
    assert (done.returncode, github.comments) == (0, [])
    assert "isn't the head of an open pull request any more" in done.stdout


def test_a_report_is_bounded_and_is_one(github: GitHub, tmp_path: Path) -> None:
    github.pulls = [{"number": 5, "head": {"label": "eve:faster/trees", "sha": "a" * 40}}]
    assert post(github, tmp_path, "buy now", "a" * 40).returncode == 1
    assert github.comments == []
    assert post(github, tmp_path, REPORT_MARK + "x" * 1_000_000, "a" * 40).returncode == 0
    assert len(github.comments[0]["body"]) < 65_536
    assert "the rest is in the artifact" in github.comments[0]["body"]


def test_whoever_agreed_is_named_and_without_anybody_nothing_goes_on(github: GitHub) -> None:
    done = call(github, "approver.py")
    assert (done.returncode, done.stdout) == (1, "")
    assert "required reviewers" in done.stderr
    for state, login in (("rejected", "bob"), ("approved", "eve")):
        github.approvals.append({"state": state, "user": {"login": login}})
    assert call(github, "approver.py").stdout == "eve\n"


def test_github_that_is_away_is_one_line(github: GitHub, tmp_path: Path) -> None:
    github.shutdown()
    github.server_close()
    for done in (call(github, "approver.py"), post(github, tmp_path, REPORT_MARK, "a" * 40)):
        assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
        assert "sesame" not in done.stderr


# ---------------------------------------------------------------- the workflows' own steps


def run_job(github: GitHub, workflow: str, job: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    """The scripts of a job one after the other, as GitHub runs them; what the last one said."""
    environment = environment_of(github) | variables
    for script in scripts_of(jobs_of(ROOT / ".github" / "workflows" / f"{workflow}.yml")[job]):
        if script != "python3 tasks.py install":
            command = ["bash", "--noprofile", "--norc", "-e", "-c", script]
            done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
            if done.returncode:
                return done
    return done


@pytest.mark.slow
@pytest.mark.system
@pytest.mark.skipif(os.name == "nt", reason="GitHub's runners on Linux have bash")
def test_a_model_goes_into_production_and_back_by_the_workflows(
    two_versions: Path, tmp_path: Path, github: GitHub
) -> None:
    home = shutil.copytree(two_versions, tmp_path / "workspace")
    with serving(home) as running:
        given = {"MLOPS_COURSE_HOME": str(home), "GITHUB_STEP_SUMMARY": os.devnull, "SERVICE_URL": running.url}
        given["REASON"] = 'it is "better"; $(rm -rf /)'
        report = hashlib.sha256(gate_report_file(Settings(home=home), SECOND).read_bytes()).hexdigest()
        words = given | {"MODEL": SECOND, "STRATEGY": "at once", "REPORT": report}
        done = run_job(github, "release-model", "deliver", **words)
        assert (done.returncode, "nobody has approved this run" in done.stderr) == (1, True)
        github.approvals = [{"state": "approved", "user": {"login": "eve"}}]
        done = run_job(github, "release-model", "deliver", **words)
        assert (done.returncode, "is whole" in done.stdout) == (0, True), done.stderr
        assert running.client.get("/model").json()["model"] == SECOND
        done = run_job(github, "roll-back-model", "rollback", BAD=SECOND, **given)
        assert (done.returncode, "is whole" in done.stdout) == (0, True), done.stderr
        assert running.client.get("/model").json()["model"] == FIRST
    last = {line.event: (line.by, line.approver, line.reason) for line in read_ledger(Settings(home=home))}
    assert last["approve"] == ("eve", "", given["REASON"])
    assert last["promote"] == ("ann", "eve", given["REASON"])
    assert last["rollback"] == ("ann", "", given["REASON"])


# ---------------------------------------------------------------- what a change does to the model


@pytest.mark.slow
@pytest.mark.thorough
@pytest.mark.system
@pytest.mark.skipif(os.name == "nt", reason="the code after the change is a shell script here")
def test_a_change_of_the_model_is_reported_and_no_change_as_well(tmp_path: Path) -> None:
    program = shutil.which("mlops-course", path=str(Path(sys.executable).parent))
    assert program
    before, after = tmp_path / "before", tmp_path / "after"
    for folder, trees in ((before, 10), (after, 30)):
        line = f'[ "$1 $2" = "run training" ] && set -- "$@" -p iterations={trees}'
        script = folder / ".venv" / "bin" / "mlops-course"
        script.parent.mkdir(parents=True)
        script.write_text(f'#!/bin/sh\n{line}\nexec {shlex.quote(program)} "$@"\n')
        script.chmod(0o755)
    report = tmp_path / "report.md"
    command = [sys.executable, str(ROOT / "deploy" / "compare_change.py"), "--first", "2013-01"]
    command += ["--train-last", "2013-01", "--test-last", "2013-02", "--output", str(report)]
    environment = {**os.environ, "MLOPS_COURSE_HOME": str(tmp_path / "workspace")}
    for other, wanted in ((before, "The model stays as it is"), (after, "flight-delay@2 against flight-delay@1:")):
        done = subprocess.run([*command, str(before), str(other)], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        assert report.read_text(encoding="utf-8").startswith(f"{REPORT_MARK}\n### {wanted}")
    assert "| log_loss | 0." in report.read_text(encoding="utf-8")
