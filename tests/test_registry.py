"""Versions have one content each, the champion changes hands for a reason, and the way back is one call."""

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import Quarter

from mlops_course.data import newest_reference, read_table
from mlops_course.environment import Settings
from mlops_course.experiments import (
    Evaluation,
    ExperimentError,
    TrainingConfig,
    evaluate,
    evaluate_run,
    exclusive_lock,
    find_tracked_run,
    load_run_model,
    scores,
    tracked_run,
    train,
    train_run,
)
from mlops_course.project import flight_delay
from mlops_course.registry import (
    PromotionDecision,
    RegistryError,
    _new_version,
    champion_reference,
    decide_promotion,
    fair_rivals,
    find_version,
    load_scorer,
    open_registry,
    package,
    promote,
    register,
    register_and_promote,
    score_month,
    versions,
)
from mlops_course.serving import load_predictor, materialise, open_feature_table, publish, read_bundle

pytestmark = pytest.mark.filterwarnings("ignore:Series.values returning:DeprecationWarning")  # inside pyarrow

JANUARY, FEBRUARY, MARCH = "2013-01", "2013-02", "2013-03"
SMALL = TrainingConfig(iterations=3, leaf_samples=50)
GOOD = TrainingConfig(iterations=60, leaf_samples=50)
Runs = dict[str, str]


@pytest.fixture(scope="module")
def trained(quarter: Quarter, tmp_path_factory: pytest.TempPathFactory) -> tuple[Quarter, Runs]:
    """A workspace with runs, none of them registered; the tests copy it."""
    template = quarter.fresh(tmp_path_factory.mktemp("trained") / "workspace")
    wanted = {"small": (JANUARY, SMALL), "same": (JANUARY, SMALL), "good": (JANUARY, GOOD), "longer": (FEBRUARY, SMALL)}
    runs = {}
    for name, (last, config) in wanted.items():
        runs[name] = train_run(template.settings, flight_delay, template.features, template.rows, JANUARY, last, config)
    return template, runs


@pytest.fixture
def runs(trained: tuple[Quarter, Runs]) -> Runs:
    return trained[1]


@pytest.fixture
def home(trained: tuple[Quarter, Runs], tmp_path: Path) -> Settings:
    """A workspace with runs, and an empty registry."""
    return trained[0].copy(tmp_path / "workspace").settings


def trained_features(settings: Settings) -> str:
    return newest_reference(settings, "flight-delay/features")


def references(settings: Settings) -> list[str]:
    return [f"{version.name}@{version.version}" for version in versions(settings, flight_delay)]


# ---------------------------------------------------------------- versions


@pytest.mark.slow
def test_the_same_model_never_gets_a_second_version(home: Settings, runs: Runs) -> None:
    assert runs["small"] != runs["same"]
    assert register(home, flight_delay, runs["small"]) == "flight-delay@1"
    assert register(home, flight_delay, runs["small"]) == "flight-delay@1"
    assert register(home, flight_delay, runs["same"]) == "flight-delay@1", "another run, but the same model"
    assert register(home, flight_delay, runs["good"]) == "flight-delay@2"
    assert register(home, flight_delay, runs["same"]) == "flight-delay@1"
    assert references(home) == ["flight-delay@1", "flight-delay@2"]


def test_the_challenger_is_what_was_registered_last(home: Settings, runs: Runs) -> None:
    for name, number in (("small", "1"), ("good", "2"), ("same", "1")):
        register(home, flight_delay, runs[name])
        assert str(find_version(home, flight_delay, "challenger").version) == number


def test_a_version_leads_to_its_run_and_so_to_its_data(home: Settings, runs: Runs, quarter: Quarter) -> None:
    register(home, flight_delay, runs["longer"])
    version = find_version(home, flight_delay, "flight-delay@1")
    assert version.run_id == runs["longer"]
    assert (version.tags["first"], version.tags["last"]) == (JANUARY, FEBRUARY)
    run = find_tracked_run(home, flight_delay, str(version.run_id))
    assert (run.data.tags["data.features"], run.data.tags["data.rows"]) == (quarter.features, quarter.rows)
    assert open_registry(home, flight_delay).get_registered_model("flight-delay").description == flight_delay.question


def test_versions_are_in_the_order_of_their_numbers(home: Settings, runs: Runs) -> None:
    register(home, flight_delay, runs["small"])
    source = find_tracked_run(home, flight_delay, runs["small"]).data.tags["model_uri"]
    for _ in range(10):
        open_registry(home, flight_delay).create_model_version("flight-delay", source)
    assert references(home) == [f"flight-delay@{number}" for number in range(1, 12)]


def test_a_run_without_a_model_gets_no_version(home: Settings, runs: Runs) -> None:
    with pytest.raises(RuntimeError), tracked_run(home, flight_delay, "broken", {}) as run:
        raise RuntimeError
    for run_id in (run.info.run_id, "ffff"):
        with pytest.raises(ExperimentError, match=f"{run_id}.*(has no model_digest|Train first)"):
            register(home, flight_delay, run_id)
    assert references(home) == []


REGISTER = """
import sys
from mlops_course.environment import load_settings
from mlops_course.experiments import quiet_mlflow
from mlops_course.project import flight_delay
from mlops_course.registry import register
quiet_mlflow()
print("ready", flush=True)
sys.stdin.readline()
print(register(load_settings(), flight_delay, sys.argv[1]))
"""


def start_to_register(settings: Settings, run_id: str) -> subprocess.Popen[str]:
    """A process that registers a run's model as soon as it is told to."""
    variables = {**os.environ, "MLOPS_COURSE_HOME": str(settings.home)}
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", REGISTER, run_id], text=True, env=variables, **pipes)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


@pytest.mark.slow
def test_who_registers_waits_for_another_process_that_does(home: Settings, runs: Runs) -> None:
    with exclusive_lock(home):
        process = start_to_register(home, runs["same"])
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
        time.sleep(2)
        assert (process.poll(), references(home)) == (None, [])
        run = find_tracked_run(home, flight_delay, runs["small"])
        _new_version(open_registry(home, flight_delay), flight_delay, run)
    output, errors = process.communicate(timeout=60)
    assert output == "flight-delay@1\n", errors
    assert references(home) == ["flight-delay@1"]


@pytest.mark.slow
def test_two_processes_may_register_the_first_models_at_once(home: Settings, runs: Runs) -> None:
    processes = [start_to_register(home, runs[name]) for name in ("small", "good")]
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    ended = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], ended
    assert {output for output, _ in ended} == {"flight-delay@1\n", "flight-delay@2\n"}
    assert references(home) == ["flight-delay@1", "flight-delay@2"]


# ---------------------------------------------------------------- the champion


def test_the_champion_changes_hands_and_comes_back(home: Settings, runs: Runs, trained: tuple[Quarter, Runs]) -> None:
    february = trained[0].labelled(FEBRUARY)
    for name in ("small", "good"):
        register(home, flight_delay, runs[name])
    assert champion_reference(home, flight_delay) is None
    assert promote(home, flight_delay, "flight-delay@1", "the first one") is None
    first = load_scorer(home, flight_delay).predict(february)
    assert promote(home, flight_delay, "challenger", "log loss -0.01") == "flight-delay@1"
    second = load_scorer(home, flight_delay).predict(february)
    assert champion_reference(home, flight_delay) == "flight-delay@2"
    assert promote(home, flight_delay, "flight-delay@1", "the second one broke") == "flight-delay@2"
    again = load_scorer(home, flight_delay).predict(february)
    assert set(first["model"]) == {"flight-delay@1"}
    assert set(second["model"]) == {"flight-delay@2"}
    assert (first["score"] != second["score"]).any()
    pd.testing.assert_frame_equal(again, first, check_exact=True)
    reasons = [version.tags["promoted_because"] for version in versions(home, flight_delay)]
    assert reasons == ["the second one broke", "log loss -0.01"]
    assert len(references(home)) == 2, "nothing was taken away"


def test_a_model_is_loaded_by_alias_or_number(home: Settings, runs: Runs, trained: tuple[Quarter, Runs]) -> None:
    february = trained[0].labelled(FEBRUARY)
    register_and_promote(home, flight_delay, runs["small"], True, "the first one")
    register(home, flight_delay, runs["good"])
    for reference, number, name in (
        ("champion", 1, "small"),
        ("challenger", 2, "good"),
        ("flight-delay@1", 1, "small"),
    ):
        scorer = load_scorer(home, flight_delay, reference)
        assert scorer.reference == f"flight-delay@{number}"
        expected = scores(load_run_model(home, flight_delay, runs[name]), february)
        np.testing.assert_allclose(scorer.predict(february)["score"], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("filled", [True, False])
@pytest.mark.parametrize(
    "reference", ["champion", "flight-delay@9", "flight-delay@", "flight-delay@first", "bikes@1", "", "@", "nobody"]
)
def test_a_model_that_is_not_there_is_named_beside_those_that_are(
    home: Settings, runs: Runs, reference: str, filled: bool
) -> None:
    if filled:
        register(home, flight_delay, runs["small"])
    with pytest.raises(RegistryError) as caught:
        load_scorer(home, flight_delay, reference)
    line = str(caught.value)
    assert repr(reference) in line
    assert "\n" not in line
    if reference in ("champion", "flight-delay@9", "nobody"):
        assert ("registered are flight-delay@1" if filled else "registered are none yet") in line
    with pytest.raises(RegistryError):
        promote(home, flight_delay, reference, "why not")
    assert champion_reference(home, flight_delay) is None


def test_without_a_champion_nothing_is_scored(home: Settings) -> None:
    with pytest.raises(RegistryError, match=r"no model of flight-delay is in production.*promote a version by hand"):
        load_scorer(home, flight_delay, None)
    with pytest.raises(RegistryError, match=r"no model of flight-delay is in production.*promote a version by hand"):
        package(home, flight_delay, None)


def test_a_version_is_packaged_once_from_what_its_run_wrote_down(home: Settings, runs: Runs, quarter: Quarter) -> None:
    evaluate_run(home, flight_delay, runs["good"], FEBRUARY, FEBRUARY)
    register(home, flight_delay, runs["good"])
    folder = package(home, flight_delay, "challenger")
    assert folder == home.serving / "bundles" / "flight-delay@1"
    manifest, run = read_bundle(folder), find_tracked_run(home, flight_delay, runs["good"])
    assert (manifest.run_id, manifest.first, manifest.last) == (runs["good"], JANUARY, JANUARY)
    assert manifest.data == {"features": quarter.features, "rows": quarter.rows}
    card = (folder / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert f"Tested on {FEBRUARY} to {FEBRUARY}" in card
    assert f"| pr_auc | {run.data.metrics['test.pr_auc']:.4f} |" in card
    stamps = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert package(home, flight_delay, "flight-delay@1") == folder
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == stamps, "it was there already"
    (folder / "model.onnx").write_bytes(b"damaged")
    assert read_bundle(package(home, flight_delay, "flight-delay@1")) == manifest
    with pytest.raises(RegistryError, match="there is no model 'champion'"):
        package(home, flight_delay, "champion")


def test_a_month_in_a_batch_has_the_answers_of_the_service(home: Settings, runs: Runs) -> None:
    features = trained_features(home)
    register_and_promote(home, flight_delay, runs["good"], True, "the first one")
    _, answers = score_month(home, flight_delay, "champion", features, FEBRUARY)
    materialise(home, flight_delay, features, [FEBRUARY])
    table, predictor = open_feature_table(home), load_predictor(publish(home, "flight-delay@1"))
    keys = [table.key(row) for row in answers[list(flight_delay.key)].to_dict("records")]
    online = predictor.scores(predictor.encode(table.get(keys, predictor.features)))
    np.testing.assert_array_equal(online, answers["score"], "to the last bit")


def test_scoring_a_month_again_changes_nothing_but_another_model_does(home: Settings, runs: Runs) -> None:
    features = trained_features(home)
    register_and_promote(home, flight_delay, runs["small"], True, "the first one")
    first, answers = score_month(home, flight_delay, "champion", features, FEBRUARY)
    assert first == "flight-delay/predictions@1"
    assert score_month(home, flight_delay, "flight-delay@1", features, FEBRUARY)[0] == first
    other, _ = score_month(home, flight_delay, "flight-delay@1", features, MARCH)
    register_and_promote(home, flight_delay, runs["good"], True, "better")
    newest, _ = score_month(home, flight_delay, "champion", features, FEBRUARY)
    assert (other, newest) == ("flight-delay/predictions@2", "flight-delay/predictions@3")
    kept = read_table(home, newest)
    assert kept.groupby("period")["model"].unique().str[0].to_dict() == {
        FEBRUARY: "flight-delay@2", MARCH: "flight-delay@1",
    }  # fmt: skip
    old = read_table(home, first)[answers.columns]
    pd.testing.assert_frame_equal(old, answers.reset_index(drop=True), check_exact=True)


# ---------------------------------------------------------------- who may become champion


@pytest.fixture(scope="module")
def models(trained: tuple[Quarter, Runs]) -> dict[str, Any]:
    """The models of the runs, and one that has learnt the opposite of the truth."""
    template, runs = trained
    found = {name: load_run_model(template.settings, flight_delay, run_id) for name, run_id in runs.items()}
    january = template.labelled(JANUARY)
    return found | {"fool": train(january.assign(label=1 - january["label"]), flight_delay, GOOD)}


def in_february(template: Quarter, models: dict[str, Any], name: str, champion: str | None) -> Evaluation:
    """A candidate, tested on February, beside the champion."""
    rivals = {f"flight-delay@{champion}": models[champion]} if champion else {}
    return evaluate(template.labelled(JANUARY), template.labelled(FEBRUARY), flight_delay, models[name], rivals)


@pytest.mark.parametrize(
    ("candidate", "champion", "promoted", "words"),
    [
        ("good", "small", True, "log loss -0.0"),
        ("small", "good", False, "log loss +0.0"),
        ("same", "small", False, "log loss +0.0000 against flight-delay@small (95 % interval +0.0000 to +0.0000"),
        ("good", None, True, "against constant"),
        ("fool", None, False, "log loss +0."),
    ],
)
def test_only_a_better_model_becomes_champion(
    trained: tuple[Quarter, Runs],
    models: dict[str, Any],
    candidate: str,
    champion: str | None,
    promoted: bool,
    words: str,
) -> None:
    result = in_february(trained[0], models, candidate, champion)
    decision = decide_promotion(result, f"flight-delay@{champion}" if champion else None)
    assert decision.promote is promoted
    assert words in decision.reason
    assert (champion or "constant") in decision.reason


def test_a_champion_that_has_seen_the_test_is_not_compared(
    trained: tuple[Quarter, Runs], models: dict[str, Any]
) -> None:
    result = in_february(trained[0], models, "good", None)
    assert decide_promotion(result, None).promote, "without a champion it would be promoted"
    found = decide_promotion(result, "flight-delay@3")
    assert not found.promote
    assert "flight-delay@3 has seen months of the test" in found.reason
    assert "test on later months" in found.reason
    assert found == PromotionDecision(False, found.reason)


@pytest.mark.parametrize(("high", "promoted"), [(-0.0001, True), (0.0, False), (0.001, False)])
def test_a_gain_that_may_be_chance_is_no_reason_to_promote(
    trained: tuple[Quarter, Runs], models: dict[str, Any], high: float, promoted: bool
) -> None:
    loss = pd.DataFrame({"difference": -0.01, "low": -0.02, "high": high, "better": 0.97}, index=["log_loss"])
    result = replace(in_february(trained[0], models, "small", None), versus={"constant": loss})
    decision = decide_promotion(result, None)
    assert decision.promote is promoted
    assert f"-0.0100 against constant (95 % interval -0.0200 to {high:+.4f})" in decision.reason


def test_a_champion_is_a_rival_only_on_months_that_it_has_not_seen(home: Settings, runs: Runs) -> None:
    assert fair_rivals(home, flight_delay, FEBRUARY) == {}
    register_and_promote(home, flight_delay, runs["longer"], True, "the first one")
    assert fair_rivals(home, flight_delay, JANUARY) == {}
    assert fair_rivals(home, flight_delay, FEBRUARY) == {}
    (reference,) = fair_rivals(home, flight_delay, MARCH)
    assert reference == "flight-delay@1"


def test_from_training_to_champion(home: Settings, runs: Runs) -> None:
    def retrain(name: str) -> dict[str, Any]:
        rivals, champion = fair_rivals(home, flight_delay, FEBRUARY), champion_reference(home, flight_delay)
        result = evaluate_run(home, flight_delay, runs[name], FEBRUARY, FEBRUARY, rivals=rivals)
        decision = decide_promotion(result, champion)
        return register_and_promote(home, flight_delay, runs[name], decision.promote, decision.reason)

    one, two = "flight-delay@1", "flight-delay@2"
    assert retrain("small") == {"model": one, "champion": one, "previous": None, "promoted": True}
    assert retrain("same") == {"model": one, "champion": one, "previous": one, "promoted": False}
    assert retrain("good") == {"model": two, "champion": two, "previous": one, "promoted": True}
    assert retrain("small") == {"model": one, "champion": two, "previous": two, "promoted": False}
    assert "against flight-delay@1" in find_version(home, flight_delay, two).tags["promoted_because"]
    assert "against constant" in find_version(home, flight_delay, one).tags["promoted_because"]
