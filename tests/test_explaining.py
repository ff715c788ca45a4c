"""Why a score: contributions that add up to it, that are Shapley's to the last digits, and that SHAP finds as well."""

import pickle
import subprocess
import sys
from collections.abc import Callable, Iterable
from itertools import permutations
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import Quarter
from matplotlib.figure import Figure
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.pipeline import Pipeline

from mlops_course.experiments import TrainingConfig, train
from mlops_course.project import flight_delay
from mlops_course.security.explaining import (
    ExplanationError,
    Leaves,
    contributions,
    explain_score,
    feature_importance,
    plot_contributions,
    read_leaves,
)

SHAP = Path(sys.prefix) / "shap" / "bin" / "python"
Made = tuple[HistGradientBoostingClassifier, np.ndarray]


def small(seed: int, features: int = 4, missing: float = 0.0, leaves: int = 12, count: int = 3000) -> Made:
    """A classifier whose few features act together, and the rows that it was trained on."""
    draw = np.random.default_rng(seed)
    rows = draw.normal(size=(count, features)).astype(np.float32)
    label = (rows[:, 0] * rows[:, 1] + rows[:, -1] > 0.3).astype(int) ^ (draw.random(count) < 0.1)
    rows[draw.random(rows.shape) < missing] = np.nan
    made = HistGradientBoostingClassifier(max_iter=6, max_leaf_nodes=leaves, early_stopping=False, random_state=seed)
    return made.fit(rows, label), rows


def tree_score(nodes: np.ndarray, row: np.ndarray, known: Iterable[int], place: int = 0) -> float:
    """A tree's value for a row of which only some features are known: the definition, node by node."""
    node = nodes[place]
    if node["is_leaf"]:
        return float(node["value"])
    left, right = (nodes[node[side]]["count"] / node["count"] for side in ("left", "right"))
    if node["feature_idx"] in known:
        value = row[node["feature_idx"]]
        goes_left = node["missing_go_to_left"] if np.isnan(value) else value <= node["num_threshold"]
        left, right = (1.0, 0.0) if goes_left else (0.0, 1.0)
    parts = [(left, int(node["left"])), (right, int(node["right"]))]
    return sum(share * tree_score(nodes, row, known, child) for share, child in parts if share)


def every_order(classifier: HistGradientBoostingClassifier, row: np.ndarray) -> np.ndarray:
    """Shapley values as they are defined."""
    total, orders = np.zeros(len(row)), list(permutations(range(len(row))))
    scores = {}
    for order in orders:
        for place, feature in enumerate(order):
            for known in (frozenset(order[:place]), frozenset(order[: place + 1])):
                if known not in scores:
                    scores[known] = sum(tree_score(trees[0].nodes, row, known) for trees in classifier._predictors)
            total[feature] += scores[frozenset(order[: place + 1])] - scores[frozenset(order[:place])]
    return total / len(orders)


@pytest.mark.parametrize("missing", [0.0, 0.3])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_they_are_what_all_orders_one_by_one_give(seed: int, missing: float) -> None:
    classifier, rows = small(seed, missing=missing)
    found = contributions(read_leaves(classifier), rows[:6])
    np.testing.assert_allclose(found, [every_order(classifier, row) for row in rows[:6]], atol=1e-12)


def test_the_mean_score_is_that_of_a_row_of_which_nothing_is_known() -> None:
    classifier, rows = small(4)
    nothing = sum(tree_score(trees[0].nodes, rows[0], ()) for trees in classifier._predictors)
    assert read_leaves(classifier).mean_score == pytest.approx(float(classifier._baseline_prediction[0, 0]) + nothing)


@pytest.mark.parametrize("leaves", [2, 3, 31])
def test_each_row_adds_up_to_the_raw_score(leaves: int) -> None:
    classifier, rows = small(5, features=9, missing=0.2, leaves=leaves)
    read = read_leaves(classifier)
    total = read.mean_score + contributions(read, rows[:300]).sum(axis=1)
    np.testing.assert_allclose(total, classifier.decision_function(rows[:300]), atol=1e-12)


def test_a_value_on_a_threshold_goes_where_the_tree_sends_it() -> None:
    classifier, rows = small(6)
    thresholds = {
        (int(node["feature_idx"]), float(node["num_threshold"]))
        for trees in classifier._predictors
        for node in trees[0].nodes
        if not node["is_leaf"]
    }
    on = np.repeat(rows[:1].astype(float), len(thresholds), axis=0)
    for row, (feature, threshold) in zip(on, sorted(thresholds), strict=True):
        row[feature] = threshold
    read = read_leaves(classifier)
    np.testing.assert_allclose(
        read.mean_score + contributions(read, on).sum(axis=1), classifier.decision_function(on), atol=1e-12
    )


def test_a_feature_that_no_tree_asks_for_adds_nothing() -> None:
    classifier, rows = small(7, features=3)
    with_idle = HistGradientBoostingClassifier(max_iter=3, early_stopping=False)
    idle = np.column_stack([rows, np.zeros(len(rows))])
    with_idle.fit(idle, classifier.predict(rows))
    assert (contributions(read_leaves(with_idle), idle[:50])[:, 3] == 0).all()


def test_two_features_that_act_alike_get_the_same() -> None:
    leaf = {"low": -np.inf, "high": 0.0, "missing": True, "share": 0.4}
    parts = [np.array([[value, value]]) for value in leaf.values()]
    leaves = Leaves(np.array([3.0]), np.array([[0, 1]]), *parts, baseline=0.5)
    [found] = contributions(leaves, np.array([[-1.0, -1.0]]))
    assert found[0] == found[1] == pytest.approx((3 - 3 * 0.16) / 2)
    assert leaves.mean_score == pytest.approx(0.5 + 3 * 0.16)


def test_no_rows_have_no_contributions_and_a_constant_model_has_none_to_give() -> None:
    classifier, rows = small(8)
    assert contributions(read_leaves(classifier), rows[:0]).shape == (0, rows.shape[1])
    constant = HistGradientBoostingClassifier(max_iter=2, min_samples_leaf=3000, early_stopping=False)
    read = read_leaves(constant.fit(rows, classifier.predict(rows)))
    assert (contributions(read, rows[:5]) == 0).all()
    assert read.mean_score == pytest.approx(float(constant.decision_function(rows[:1])[0]))


def three_classes() -> HistGradientBoostingClassifier:
    _, rows = small(9)
    return HistGradientBoostingClassifier(max_iter=2).fit(rows, np.arange(len(rows)) % 3)


def native_categories() -> HistGradientBoostingClassifier:
    codes = np.random.default_rng(1).integers(0, 5, (1000, 1)).astype(float)
    return HistGradientBoostingClassifier(max_iter=2, categorical_features=[0]).fit(
        codes, (codes[:, 0] % 2).astype(int)
    )


@pytest.mark.parametrize(("make", "words"), [(three_classes, "3 classes"), (native_categories, "native categories")])
def test_a_model_of_another_kind_is_refused(make: Callable[[], HistGradientBoostingClassifier], words: str) -> None:
    with pytest.raises(ExplanationError, match=words):
        read_leaves(make())


# ---------------------------------------------------------------- the model of the flights


@pytest.fixture(scope="module")
def flights(quarter: Quarter) -> pd.DataFrame:
    return quarter.labelled("2013-01", "2013-02")


@pytest.fixture(scope="module")
def model(flights: pd.DataFrame) -> Pipeline:
    return train(flights, flight_delay, TrainingConfig(20, leaf_samples=50))


def test_a_flight_is_explained_with_every_feature_and_adds_up(model: Pipeline, flights: pd.DataFrame) -> None:
    for place in (0, 77, 500):
        row = flights.iloc[[place]]
        found = explain_score(model, row)
        assert set(found["feature"]) == set(model.feature_names_in_)
        raw = float(np.log(np.divide(*model.predict_proba(row)[0, ::-1])))
        assert found.attrs["raw_score"] == pytest.approx(raw, abs=1e-9)
        assert found.attrs["mean_score"] + found["contribution"].sum() == pytest.approx(raw, abs=1e-9)
        assert found["contribution"].abs().is_monotonic_decreasing
        values = dict(zip(found["feature"], found["value"], strict=True))
        assert values["carrier"] == row["carrier"].iloc[0]


def test_what_can_not_be_explained_says_why(model: Pipeline, flights: pd.DataFrame) -> None:
    with pytest.raises(ExplanationError, match="2 rows"):
        explain_score(model, flights.head(2))
    with pytest.raises(ExplanationError, match="lack carrier"):
        explain_score(model, flights.head(1).drop(columns="carrier"))


def test_the_picture_ends_at_the_score(model: Pipeline, flights: pd.DataFrame) -> None:
    explained = explain_score(model, flights.iloc[[77]])
    bars = plot_contributions(explained, Figure().subplots(), count=5).patches
    assert len(bars) == 6
    assert bars[-1].get_x() + bars[-1].get_width() == pytest.approx(explained.attrs["raw_score"])


def test_the_importance_is_the_mean_size_of_contributions_and_what_shuffling_loses(
    model: Pipeline, flights: pd.DataFrame
) -> None:
    few = flights.iloc[::40]
    found = feature_importance(model, few, repeats=2)
    by_hand = pd.concat([explain_score(model, few.iloc[[place]]) for place in range(len(few))])
    expected = by_hand.assign(size=by_hand["contribution"].abs()).groupby("feature")["size"].mean()
    measured = found.set_index("feature")["mean_contribution"]
    np.testing.assert_allclose(measured, expected[measured.index], atol=1e-12)
    assert (found.loc[found["mean_contribution"] == 0, "lost_pr_auc"] == 0).all()
    assert found["mean_contribution"].is_monotonic_decreasing
    pd.testing.assert_frame_equal(found, feature_importance(model, few, repeats=2))


@pytest.mark.skipif(not SHAP.exists(), reason="SHAP is not installed (make system)")
def test_shap_finds_the_same(model: Pipeline, flights: pd.DataFrame, tmp_path: Path) -> None:
    """SHAP counts in float32 in places, hence the tolerance."""
    classifier, columns = model.named_steps["classifier"], model.named_steps["columns"]
    rows = columns.transform(flights[columns.feature_names_in_].iloc[::50]).astype(np.float64)
    (tmp_path / "given.pickle").write_bytes(pickle.dumps((classifier, rows)))
    program = [SHAP, Path(__file__).with_name("shap_program.py")]
    subprocess.run([*program, tmp_path / "given.pickle", tmp_path / "found.npz"], check=True, capture_output=True)
    found, leaves = np.load(tmp_path / "found.npz"), read_leaves(classifier)
    np.testing.assert_allclose(contributions(leaves, rows), found["contributions"], atol=1e-5)
    assert float(found["mean_score"]) == pytest.approx(leaves.mean_score, abs=1e-5)
