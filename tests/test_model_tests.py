"""Tests of models: they pass for what behaves, fail for what doesn't, and say which row it was."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
from conftest import Quarter

from mlops_course.delivery.model_tests import (
    ModelTestError,
    ModelTestResult,
    as_scorer,
    check_calibration,
    check_claims,
    check_direction,
    check_invariance,
    check_latency,
    check_minimum,
    check_skew,
    check_slices,
    results_html,
    results_junit,
    results_table,
    write_results,
)
from mlops_course.experiments import TrainingConfig, scores, train
from mlops_course.project import flight_delay
from mlops_course.project.claims import LATE_CLAIMS
from mlops_course.serving import Predictor, load_predictor
from mlops_course.serving.packaging import Origin, write_bundle

pytestmark = pytest.mark.filterwarnings("ignore:Series.values returning:DeprecationWarning")  # inside pyarrow


@dataclass(frozen=True)
class Trained:
    """A model, its bundle, and flights that it hasn't seen."""

    model: Any
    bundle: Predictor
    march: pd.DataFrame


@pytest.fixture(scope="module")
def trained(quarter: Quarter, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    past = quarter.labelled("2013-01", "2013-02")
    model = train(past, flight_delay, TrainingConfig(iterations=40, leaf_samples=50))
    settings = quarter.settings.model_copy(update={"home": tmp_path_factory.mktemp("bundled") / "workspace"}).prepare()
    origin = Origin(run_id="r", data={}, first="2013-01", last="2013-02")
    folder = write_bundle(settings, flight_delay, model, past, "flight-delay@1", origin)
    return Trained(model, load_predictor(folder), quarter.labelled("2013-03"))


def toy(rows: int = 600) -> pd.DataFrame:
    """Rows whose label depends on x, in two groups."""
    x = np.linspace(-3, 3, rows)
    label = (np.random.default_rng(0).random(rows) < 1 / (1 + np.exp(-x))).astype(float)
    groups = np.where(np.arange(rows) % 2, "a", "b")
    return pd.DataFrame({"x": x, "y": np.arange(rows) % 7, "group": groups, "label": label})


def good(frame: pd.DataFrame) -> np.ndarray:
    return np.asarray(1 / (1 + np.exp(-frame["x"])))


def spoilt(kind: str) -> Any:
    """Models with one fault each."""
    return {
        "nan": lambda frame: np.where(frame["y"] == 3, np.nan, good(frame)),
        "depends on y": lambda frame: np.where(frame["y"] == 3, 0.9 * good(frame), good(frame)),
        "depends on the order": lambda frame: good(frame) * np.linspace(0.9, 1, len(frame)),
        "turned round": lambda frame: 1 - good(frame),
        "turned round for a": lambda frame: np.where(frame["group"] == "a", 1 - good(frame), good(frame)),
        "ignores x": lambda frame: np.full(len(frame), 0.5),
        "too loud": lambda frame: np.sqrt(good(frame)),
    }[kind]


CLAIMS: dict[str, Any] = {
    "order": lambda model: check_invariance(model, toy(), "order", lambda rows: rows.iloc[::-1]),
    "y": lambda model: check_invariance(model, toy(), "y", lambda rows: rows.assign(y=0)),
    "x": lambda model: check_direction(model, toy(), "x", lambda rows: rows.assign(x=rows["x"] + 1)),
    "easy": lambda model: check_minimum(model, toy()[toy()["x"] > 2.5], "easy", low=0.9),
    "slices": lambda model: check_slices(model, toy(), "slices", ["group"]),
    "calibration": lambda model: check_calibration(model, toy(), "calibration", limit=0.08),
    "skew": lambda model: check_skew(good, model, toy(), "skew", threshold=0.3),
}


@pytest.mark.parametrize("claim", CLAIMS)
def test_a_good_model_passes(claim: str) -> None:
    found = CLAIMS[claim](good)
    assert (found.passed, found.broken, found.example) == (True, 0, "")


@pytest.mark.parametrize(
    ("fault", "failing"),
    [
        ("nan", {*CLAIMS}),
        ("depends on y", {"y", "skew", "easy"}),
        ("depends on the order", {"order", "skew", "easy"}),
        ("turned round", {"x", "easy", "slices", "calibration", "skew"}),
        ("turned round for a", {"x", "easy", "slices", "calibration", "skew"}),
        ("ignores x", {"x", "easy", "skew"}),
        ("too loud", {"calibration", "skew"}),
    ],
)
def test_a_fault_fails_the_claims_that_it_breaks_and_no_other(fault: str, failing: set[str]) -> None:
    assert {name for name, claim in CLAIMS.items() if not claim(spoilt(fault)).passed} == failing


@pytest.mark.parametrize("claim", ["x", "order", "skew", "easy"])
def test_no_rows_prove_nothing(claim: str) -> None:
    empty = toy().iloc[:0]
    checks: dict[str, Any] = {
        "x": lambda: check_direction(good, empty, "x", lambda rows: rows.assign(x=rows["x"] + 1)),
        "order": lambda: check_invariance(good, empty, "order", lambda rows: rows),
        "skew": lambda: check_skew(good, good, empty, "skew", 0.3),
        "easy": lambda: check_minimum(good, empty, "easy"),
    }
    assert not checks[claim]().passed


def test_small_slices_alone_prove_nothing() -> None:
    assert not check_slices(good, toy(100), "slices", ["group"], min_rows=200).passed


def test_the_worst_row_is_named() -> None:
    found = CLAIMS["y"](spoilt("depends on y"))
    assert found.example == "y 3"
    assert found.broken == (toy()["y"] == 3).sum()
    assert CLAIMS["slices"](spoilt("turned round for a")).example == "group a"


def test_a_flipped_decision_is_skew_however_close_the_scores() -> None:
    other = good(toy()) + 1e-7
    threshold = float(np.nextafter(good(toy())[300], 1))
    assert check_skew(good, lambda frame: other, toy(), "close", threshold=0.999).passed
    assert not check_skew(good, lambda frame: other, toy(), "close", threshold=threshold).passed


def test_latency_is_measured_on_single_rows() -> None:
    sizes = []

    def model(frame: pd.DataFrame) -> np.ndarray:
        sizes.append(len(frame))
        return good(frame)

    found = check_latency(model, toy(), "quick", limit=5.0, count=30)
    assert (found.passed, found.rows, set(sizes)) == (True, 30, {1})
    assert not check_latency(model, toy(), "quicker than anything", limit=1e-9, count=30).passed


def test_what_cannot_score_is_refused() -> None:
    for thing in ("model", 3, None):
        with pytest.raises(ModelTestError, match="can't score rows"):
            as_scorer(thing)


# ---------------------------------------------------------------- real models


def test_a_model_and_its_bundle_are_tested_alike(trained: Trained) -> None:
    one, other = as_scorer(trained.bundle)(trained.march), as_scorer(trained.model)(trained.march)
    np.testing.assert_allclose(one, other, atol=1e-5)
    skew = check_skew(trained.model, trained.bundle, trained.march, "same", flight_delay.costs.threshold)
    assert skew.passed, skew
    assert skew.rows == len(trained.march)


@pytest.mark.parametrize("kind", ["model", "bundle"])
def test_the_flights_claims_hold_for_a_trained_model(trained: Trained, kind: str) -> None:
    results = check_claims(getattr(trained, kind), trained.march, LATE_CLAIMS)
    failed = {each.claim: (each.value, each.example) for each in results if not each.passed}
    assert {"calibration", "slices"} >= {each.kind for each in results if not each.passed}, failed
    assert min(each.rows for each in results) > 2


def test_they_fail_for_a_model_that_is_turned_round(trained: Trained) -> None:
    results = check_claims(lambda frame: 1 - scores(trained.model, frame), trained.march, LATE_CLAIMS)
    failed = {each.kind for each in results if not each.passed}
    assert failed == {"direction", "slices", "calibration"}


def test_they_fail_for_a_model_that_knows_the_flights_number(trained: Trained) -> None:
    def knows(frame: pd.DataFrame) -> np.ndarray:
        return np.clip(scores(trained.model, frame) + (frame["flight"] % 10) / 100, 0, 1)

    found = check_claims(knows, trained.march, LATE_CLAIMS)
    failed = [each for each in found if not each.passed and each.kind == "invariance"]
    assert [each.example.split()[0] for each in failed] == ["flight"]


# ---------------------------------------------------------------- reports

RESULTS = [
    ModelTestResult("invariance", "The order <of> rows & more", True, 0.0, 1e-6, 10),
    ModelTestResult("slices", "Every airline", False, 0.5, 0.01, 10, 2, 'carrier "UA" & <b>'),
]


def test_the_page_and_the_table_say_the_same() -> None:
    page = results_html(RESULTS, "flight-delay@1 <x>")
    assert len(results_table(RESULTS)) == 2
    assert "<b>" not in page.replace("&lt;b&gt;", "")
    assert page.count('class="failed"') == page.count('class="passed"') == 1


def test_junit_is_xml_that_counts_its_failures(tmp_path: Path) -> None:
    suite = ElementTree.fromstring(results_junit(RESULTS, "flight-delay@1"))
    assert (suite.get("tests"), suite.get("failures")) == ("2", "1")
    (failure,) = suite.iter("failure")
    assert (failure.text, failure.get("message")) == ('carrier "UA" & <b>', "0.5, limit 0.01; 2 of 10 rows")
    assert [path.name for path in write_results(RESULTS, tmp_path, "x")] == ["model_tests.html", "model_tests.xml"]


def test_junit_has_the_shape_that_pytest_writes(tmp_path: Path) -> None:
    """Whoever reads pytest's file reads ours: the same elements, with the attributes that readers need."""
    (tmp_path / "test_x.py").write_text("def test_a(): pass\ndef test_b(): assert 0\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--junitxml=x.xml", "test_x.py"]
    subprocess.run(command, cwd=tmp_path, capture_output=True)
    theirs = next(ElementTree.parse(tmp_path / "x.xml").getroot().iter("testsuite"))
    ours = ElementTree.fromstring(results_junit(RESULTS, "x"))
    for one, other in ((ours, theirs), (ours[0], theirs[0]), (ours[1][0], theirs[1][0])):
        assert one.tag == other.tag
        assert set(other.keys()) - {"time", "timestamp", "hostname"} <= set(one.keys())
