"""The ML Test Score: each of the 28 tests can fail, says why, and is worth a whole point only if something runs it."""

import copy
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import Quarter
from score_helpers import OLD, Production, git, make_production, make_repository, put

from mlops_course.data import read_table, replace_months
from mlops_course.delivery import score_data
from mlops_course.delivery.automation import command_words, read_automation, task_commands
from mlops_course.delivery.evidence import Evidence, EvidenceError, find_repository
from mlops_course.delivery.ml_test_score import RUBRIC_CHECKS, run_rubric_check, score_system
from mlops_course.delivery.rubric import RUBRIC, MLTestScore, RubricResult, score_meaning
from mlops_course.environment import Settings
from mlops_course.experiments import TrainingConfig, load_run_model, train
from mlops_course.project import flight_delay
from mlops_course.registry import find_version
from mlops_course.serving import load_predictor
from mlops_course.serving.packaging import Origin, write_bundle

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
Plant = Callable[[Production, Path], Evidence]
EVERY = [(section, number) for section in RUBRIC for number in range(1, 8)]


@pytest.fixture(scope="module")
def production(quarter: Quarter, tmp_path_factory: pytest.TempPathFactory) -> Production:
    folder = tmp_path_factory.mktemp("production")
    repository = make_repository(folder / "repository")
    own = quarter.fresh(folder / "workspace")
    make_production(own, repository)
    return Production(Evidence(own.settings, flight_delay, repository))


def judged(evidence: Evidence, section: str, number: int) -> tuple[float, str]:
    """What one test is worth, and its evidence."""
    finding, automatic = run_rubric_check(RUBRIC_CHECKS[section][number - 1], evidence)
    return RubricResult(section, number, "", finding.holds, "", automatic).points, finding.evidence


# ---------------------------------------------------------------- a system that is in production

WORTH = {  # of the workspace and the repository of these tests
    "data": [1.0, 0.0, 0.5, 0.5, 0.5, 1.0, 1.0],
    "model": [1.0, 1.0, 0.5, 0.5, 0.0, 0.5, 0.5],
    "infrastructure": [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0],
    "monitoring": [0.5, 1.0, 1.0, 0.5, 1.0, 0.5, 1.0],
}


@pytest.mark.parametrize(("section", "number"), EVERY)
def test_each_test_of_a_system_in_production_is_worth_what_it_shows(
    production: Production, section: str, number: int
) -> None:
    points, evidence = judged(production.evidence, section, number)
    assert points == WORTH[section][number - 1], evidence


# ---------------------------------------------------------------- what breaks each of them


def changed_run(production: Production, **values: str) -> Evidence:
    """Evidence whose run has written down something else."""
    made = production.fresh()
    run = copy.deepcopy(made.run)
    for name, value in values.items():
        for part in (run.data.params, run.data.tags):
            if name in part:
                part[name] = value
    return put(made, run=run)


def without_tests(production: Production, folder: Path) -> Evidence:
    """A repository whose tests are gone."""
    root = Path(shutil.copytree(production.evidence.root or folder, folder / "repository"))
    shutil.rmtree(root / "tests")
    (root / "tests").mkdir()
    return put(production.fresh(), root=root, automation=read_automation(root))


def leaking(production: Production, folder: Path) -> Evidence:
    case = replace(flight_delay, features="score_helpers:leaking_features")
    made = production.fresh()
    put(made, use_case=case)
    made.rows.use_case = case
    vars(made.rows).pop("rebuilt", None)
    return made


def personal(production: Production, folder: Path) -> Evidence:
    made = production.reread(folder / "workspace")
    rows = pd.DataFrame({"period": ["2013-01"], "seat": ["12A"], "remark": ["write to ann@example.org"]})
    replace_months(made.settings, "flight-delay/passengers", rows)
    return made


def one_byte(production: Production, folder: Path) -> Evidence:
    """The version that was approved, with another card."""
    made = production.reread(folder / "workspace")
    report = made.settings.runs / "gates" / f"{production.evidence.champion}.json"
    report.write_bytes(report.read_bytes() + b" ")
    return made


def edited(production: Production, folder: Path, pattern: str, edit: Callable[[dict[str, Any]], None]) -> Evidence:
    """A workspace in which the newest of some JSON files says something else."""
    made = production.reread(folder / "workspace")
    path = max(made.settings.home.glob(pattern))
    content = json.loads(path.read_text(encoding="utf-8"))
    edit(content)
    path.write_text(json.dumps(content), encoding="utf-8")
    return made


def without_old_bundle(production: Production, folder: Path) -> Evidence:
    made = production.reread(folder / "workspace")
    (made.settings.serving / "bundles" / OLD / "model.onnx").unlink()
    return made


def other_lock(production: Production, folder: Path) -> Evidence:
    root = Path(shutil.copytree(production.evidence.root or folder, folder / "repository"))
    with (root / "requirements.lock").open("a") as lock:
        lock.write("# another one\n")
    return put(production.fresh(), root=root)


def bad_inputs(production: Production, folder: Path) -> Evidence:
    made = production.reread(folder / "workspace")
    rows = read_table(made.settings, made.rows.tables["flights"], ["2013-03"])
    replace_months(made.settings, "flight-delay/flights", rows.assign(distance=-1))
    vars(made.rows).pop("tables", None)
    return made


def old_model(production: Production, folder: Path) -> Evidence:
    """A bundle that isn't made of the model."""
    version = find_version(production.evidence.settings, flight_delay, OLD)
    model = load_run_model(production.evidence.settings, flight_delay, str(version.run_id))
    return put(production.fresh(), model=model)


def with_score(change: Callable[[pd.DataFrame, np.ndarray], np.ndarray]) -> Plant:
    """The champion with other scores."""

    def plant(production: Production, folder: Path) -> Evidence:
        made = production.fresh()
        return put(made, score=np.asarray(change(made.rows.test, made.rows.score)))

    return plant


def with_rows(name: str, change: Callable[[pd.DataFrame], pd.DataFrame]) -> Plant:
    """Other rows of one kind."""

    def plant(production: Production, folder: Path) -> Evidence:
        made = production.fresh()
        return put(made, **{name: change(getattr(made.rows, name))})

    return plant


def dear(production: Production, folder: Path) -> Evidence:
    made = production.fresh()
    return put(made, rebuilt=(made.rows.rebuilt[0], 1e4))


def other_features(production: Production, folder: Path) -> Evidence:
    made = production.fresh()
    frame = made.rows.rebuilt[0]
    return put(made, rebuilt=(frame.assign(distance=frame["distance"] + 1), 1.0))


PLANTS: dict[str, tuple[tuple[str, int], Plant, str]] = {
    "a column without a schema": (
        ("data", 1), with_rows("test", lambda rows: rows.assign(gusts=np.float32(1))), "not described: gusts"),
    "features that take long": (("data", 3), dear, "too much: "),
    "a feature from the future": (("data", 4), leaking, "sneaked_in moved before they could"),
    "an address in a table": (("data", 5), personal, "passengers.remark (holds an e-mail address)"),
    "features without tests": (("data", 7), without_tests, "no test calls flight_features"),
    "feature code that has changed": (("data", 7), other_features, "it differs in distance"),
    "an approval that is void": (("model", 1), one_byte, "since then changed: report"),
    "code that wasn't committed": (
        ("model", 1), lambda made, _: changed_run(made, **{"code.dirty": "True"}), "changes that aren't in"),
    "decisions turned round": (
        ("model", 2),
        with_rows("served", lambda rows: rows.assign(warned=~rows["warned"].astype(bool))), "saved correlate with -"),
    "no search": (
        ("model", 3),
        lambda made, _: put(made.fresh(), runs=made.evidence.runs.drop(columns="tags.best_run")), "none is a search"),
    "other values than the best": (
        ("model", 3), lambda made, _: changed_run(made, leaves="24"), "the champion has other values of leaves"),
    "a single month of training": (
        ("model", 4), with_rows("training", lambda rows: rows[rows["period"] == "2013-01"]), "only 2013-01"),
    "a model like a constant": (
        ("model", 5), with_score(lambda rows, score: np.full(len(rows), 0.23)), "than a constant, a table of rates"),
    "an airline turned round": (
        ("model", 6),
        with_score(lambda rows, score: np.where(rows["carrier"] == "UA", 1 - score, score)), "carrier UA"),
    "an airport that is promised too much": (
        ("model", 7),
        with_score(lambda rows, score: np.where(rows["origin"] == "JFK", 1 - score, score)), "off: origin JFK +0"),
    "another model than was stored": (
        ("infrastructure", 1), lambda made, _: changed_run(made, model_digest="0" * 64), "scores differ"),
    "a model without tests": (("infrastructure", 2), without_tests, "no test calls build_model"),
    "a pipeline that failed": (
        ("infrastructure", 3),
        lambda made, folder: edited(made, folder, "runs/*-*/run.json", lambda run: run.update(status="failed")),
        "none made flight-delay@2 from end to end"),
    "no line in the ledger": (
        ("infrastructure", 4), lambda made, _: put(made.fresh(), entries=[]), "doesn't say why it is champion"),
    "a step that doesn't fit": (("infrastructure", 5), old_model, "the steps don't fit"),
    "a canary without a guard": (
        ("infrastructure", 6),
        lambda made, folder: edited(made, folder, "serving/*/release.json", lambda release: release.update(by="ann")),
        "no guard has promoted it"),
    "no way back": (("infrastructure", 7), without_old_bundle, "flight-delay@1 can't be served"),
    "another lock": (("monitoring", 1), other_lock, "was trained with the lock"),
    "inputs that break the contract": (("monitoring", 2), bad_inputs, "broken: flights.distance"),
    "skew": (("monitoring", 3), old_model, "limit 1e-05"),
    "a stale champion": (("monitoring", 4), lambda made, _: changed_run(made, last="2012-11"), "4 behind, at most 3"),
    "a score that isn't a number": (
        ("monitoring", 5),
        with_score(lambda rows, score: np.where(score > 0.3, np.nan, score)), "scores aren't probabilities"),
    "a training that takes ten times as long": (
        ("monitoring", 6),
        lambda made, folder: edited(
            made, folder, "runs/*-*/run.json", lambda run: run["stages"][0].update(seconds=200.0)
        ), "seconds 9."),
    "served rows turned round": (
        ("monitoring", 7),
        with_rows("served", lambda rows: rows.assign(score=1 - rows["score"])), "against a constant (worse)"),
}  # fmt: skip


@pytest.mark.parametrize("name", PLANTS)
def test_what_is_broken_is_worth_nothing_and_named(production: Production, tmp_path: Path, name: str) -> None:
    (section, number), plant, words = PLANTS[name]
    points, evidence = judged(plant(production, tmp_path), section, number)
    assert (points, words in evidence) == (0.0, True), evidence


def test_a_model_that_is_better_than_simpler_ones_gets_its_point(production: Production) -> None:
    made = production.fresh()
    knows = 0.6 * made.rows.score + 0.4 * made.rows.test["label"].to_numpy()
    assert judged(put(made, score=np.clip(knows, 0.01, 0.99)), "model", 5)[0] == 1.0


def test_a_feature_way_that_takes_too_long_is_worth_nothing(
    production: Production, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(score_data, "MOST_SECONDS", 0.0)
    points, evidence = judged(production.evidence, "data", 6)
    assert (points, "it was used" in evidence) == (0.0, True)


def test_every_test_has_something_that_breaks_it() -> None:
    assert {place for place, _, _ in PLANTS.values()} | {("data", 2), ("data", 6)} == {*EVERY}


# ---------------------------------------------------------------- features that are of no use


def useful(rows: int = 6000) -> pd.DataFrame:
    """Flights of 60 days that are late for reasons that the features hold."""
    draw = np.random.default_rng(5)
    frame = pd.DataFrame({name: draw.choice(["AA", "UA", "DL"], rows) for name in flight_delay.categorical})
    frame["wind_speed"] = (draw.random(rows) * 40).astype("float32")
    frame["white_noise"] = draw.normal(size=rows).astype("float32")
    frame[flight_delay.time] = pd.date_range("2013-01-01", periods=rows, freq="864s", tz="UTC")
    bad = sum((frame[name] == "UA").astype(float) for name in flight_delay.categorical)
    odds = bad + frame["wind_speed"] / 8 - 5
    return frame.assign(label=(draw.random(rows) < 1 / (1 + np.exp(-odds))).astype(float))


@pytest.mark.parametrize("noise", [False, True])
def test_a_feature_of_pure_noise_is_of_no_use(production: Production, tmp_path: Path, noise: bool) -> None:
    frame = useful() if noise else useful().drop(columns="white_noise")
    past, future = frame[:4000], frame[4000:].reset_index(drop=True)
    model = train(past, flight_delay, TrainingConfig(iterations=30, leaf_samples=50, feature_share=1.0))
    origin = Origin(run_id="r", data={}, first="2013-01", last="2013-01")
    settings = Settings(home=tmp_path / "workspace").prepare()
    bundle = load_predictor(write_bundle(settings, flight_delay, model, past, "flight-delay@1", origin))
    made = put(production.fresh(), predictor=bundle, test=future)
    points, evidence = judged(made, "data", 2)
    assert (points, "white_noise" in evidence) == ((0.0, True) if noise else (0.5, False)), evidence


# ---------------------------------------------------------------- what runs by itself


def test_a_workflow_that_calls_nothing_takes_half_of_each_point(production: Production, tmp_path: Path) -> None:
    made = production.fresh()
    root = Path(shutil.copytree(made.root or tmp_path, tmp_path / "repository"))
    shutil.rmtree(root / ".github" / "workflows")
    put(made, automation=read_automation(root))
    for section, number in [place for place in EVERY if WORTH[place[0]][place[1] - 1] == 1.0]:
        assert judged(made, section, number)[0] == 0.5, (section, number)


JOB = "on: {schedule: [{cron: '1 1 1 * *'}]}\njobs:\n  score:\n    steps:\n"


@pytest.mark.parametrize(
    ("step", "points"),
    [
        ("mlops-course test-score --at-least 2", 1.0),
        ("mlops-course test-score --at-least 0.5", 1.0),
        ("mlops-course test-score --at-least 0", 0.5),
        ("mlops-course test-score --at-least 0.0", 0.5),
        ("mlops-course test-score", 0.5),
        ("mlops-course test-score --at-least 2 || true", 0.5),
        ("mlops-course test-score --at-least 2 | tee log", 0.5),
        ("echo mlops-course test-score --at-least 2", 0.5),
    ],
)
def test_a_scheduled_job_that_fails_below_a_score_executes_all_of_it(
    production: Production, tmp_path: Path, step: str, points: float
) -> None:
    (tmp_path / ".github" / "workflows").mkdir(parents=True)
    (tmp_path / ".github" / "workflows" / "score.yml").write_text(f"{JOB}      - run: {step}\n")
    made = put(production.fresh(), automation=read_automation(tmp_path))
    assert judged(made, "monitoring", 4)[0] == points


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("push", "workflow_dispatch"),
        ("pytest", "pytest -k nothing"),
        ("pytest", "pytest tests/test_other.py"),
        ("pytest", "pytest || true"),
        ("- run: pytest", "- run: pytest\n        continue-on-error: true"),
        ("- run: pytest", "- run: pytest\n        if: inputs.tests"),
        ("- run: pytest", "- run: pytest\n        if: false"),
        ("pytest", "# pytest"),
        ("pytest", "if pytest; then echo fine; fi"),
    ],
)
def test_what_only_looks_as_if_it_ran_tests_does_not_count(tmp_path: Path, old: str, new: str) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_a.py").write_text("from x import train\ndef test_a():\n    assert train()\n")
    text = "on: push\njobs:\n  tests:\n    steps:\n      - run: pytest\n"
    path = tmp_path / ".github" / "workflows" / "ci.yml"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    assert read_automation(tmp_path).tests_call("train") == "tests/test_a.py, run by .github/workflows/ci.yml, tests"
    path.write_text(text.replace(old, new))
    assert read_automation(tmp_path).tests_call("train") == ""


def test_a_test_that_is_skipped_does_not_count(tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    text = "import pytest\nfrom x import train\n@pytest.mark.skip\ndef test_a():\n    assert train()\n"
    (tmp_path / "tests" / "test_a.py").write_text(text)
    path = tmp_path / ".github" / "workflows" / "ci.yml"
    path.parent.mkdir(parents=True)
    path.write_text("on: push\njobs:\n  tests:\n    steps:\n      - run: pytest\n")
    assert read_automation(tmp_path).tests_call("train") == ""


def test_this_repository_runs_its_tests_and_the_training_by_itself(root: Path) -> None:
    found = read_automation(root)
    assert found.tests_call("reproduce_model").startswith("tests/test_data_versions.py, run by .github/workflows/")
    assert found.stage_calls("train_run", "schedule").startswith("stage train of training, run by .github/workflows/")
    assert found.stage_calls("no_such_function") == ""


def test_words_of_commands_are_those_of_a_shell() -> None:
    script = 'set -e\ntool="x/mlops-course"  # ours\n$tool run training \\\n  -p "a b" && make test\n'
    script += "false || pytest\n"
    found = command_words(script)
    assert ["x/mlops-course", "run", "training", "-p", "a b"] in found
    assert ["make", "test"] in found
    assert not [words for words in found if words[0] == "pytest"]


def test_a_task_that_is_not_there_runs_nothing(root: Path) -> None:
    source = (root / "tasks.py").read_text(encoding="utf-8")
    assert ["pytest"] in [words[:1] for words in task_commands(source, ["test"])]
    assert task_commands(source, ["run", "scoring"])[0] == ["mlops-course", "run", "scoring"]
    assert task_commands(source, ["no-such-task"]) == []


# ---------------------------------------------------------------- the score


def test_the_smallest_sum_is_the_score() -> None:
    def points(section: str, number: int) -> RubricResult:
        return RubricResult(section, number, "", section != "model" or number == 1, "", "ci.yml" if number > 2 else "")

    score = MLTestScore(tuple(points(*place) for place in EVERY))
    assert score.sums == {"data": 6.0, "model": 0.5, "infrastructure": 6.0, "monitoring": 6.0}
    assert (score.score, score.meaning) == (0.5, score_meaning(0.5))
    assert len({score_meaning(each) for each in (0, 1, 2, 3, 5, 7)}) == 6
    assert score_meaning(0.1) == score_meaning(1.0)


@pytest.mark.parametrize("damage", ["nothing", "mlflow.db", "serving/ledger/ledger.jsonl", "serving/bundles"])
def test_whatever_is_missing_or_damaged_the_score_is_told(production: Production, tmp_path: Path, damage: str) -> None:
    if damage == "nothing":
        evidence = Evidence(Settings(home=tmp_path / "workspace"), flight_delay, tmp_path)
    else:
        evidence = production.reread(tmp_path / "workspace")
        path = evidence.settings.home / damage
        shutil.rmtree(path) if path.is_dir() else path.write_bytes(b"damaged\n")
    sections = ("data", "model") if damage == "nothing" else ("infrastructure",)
    found = [run_rubric_check(check, evidence) for section in sections for check in RUBRIC_CHECKS[section]]
    assert all(finding.remedy for finding, _ in found if not finding.holds)
    assert not all(finding.holds for finding, _ in found)
    assert str(tmp_path) not in "".join(finding.evidence for finding, _ in found)


def test_a_champion_that_was_never_tested_is_named(tmp_path: Path) -> None:
    evidence = Evidence(Settings(home=tmp_path / "workspace"), flight_delay, None)
    run = SimpleNamespace(data=SimpleNamespace(tags={}))
    vars(evidence).update(champion=OLD, run=run)
    with pytest.raises(EvidenceError, match=f"{OLD} was never tested on later months"):
        _ = evidence.rows.test


def test_an_empty_folder_scores_nothing_and_stays_empty(tmp_path: Path) -> None:
    told: list[str] = []
    settings = Settings(home=tmp_path / "workspace")
    score = score_system(settings, flight_delay, tmp_path, lambda done, test: told.append(test))
    assert (score.score, set(score.sums.values()), len(told)) == (0.0, {0.0}, 28)
    assert all(each.remedy and each.evidence for each in score.results)
    assert list(tmp_path.iterdir()) == []


def test_the_repository_is_found_from_below(tmp_path: Path) -> None:
    (tmp_path / "a" / ".github" / "workflows").mkdir(parents=True)
    (tmp_path / "a" / "b").mkdir()
    assert find_repository(tmp_path / "a" / "b") == tmp_path / "a"
    assert find_repository(tmp_path) is None


def test_the_command_ends_with_status_1_below_a_score(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from mlops_course.cli import main; main()", "test-score", "--json"]
    (tmp_path / "workspace").mkdir()
    place = ["--home", str(tmp_path / "workspace"), "--repository", str(tmp_path)]
    below = subprocess.run([*command, "--at-least", "0.5", *place], capture_output=True, text=True, cwd=tmp_path)
    assert (below.returncode, "at least 0.5 was asked for" in below.stderr) == (1, True)
    told = json.loads(below.stdout)
    assert (told["score"], len(told["tests"])) == (0.0, 28)
    assert set(told["tests"][0]) == {"section", "number", "test", "points", "evidence", "automatic", "remedy"}


def test_a_commit_that_nobody_knows_is_not_reviewed(production: Production, tmp_path: Path) -> None:
    git(tmp_path, "init", "--quiet")
    points, evidence = judged(put(production.fresh(), root=tmp_path), "model", 1)
    assert (points, "doesn't know the commit" in evidence) == (0.0, True)
