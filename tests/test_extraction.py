"""Attacks on what a model answers: copies get better with answers, a limit makes them slow, and overfitting tells."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import threadpoolctl
from sklearn.tree import DecisionTreeClassifier

from mlops_course.security.attacks import (
    AttackError,
    coarse_answers,
    extraction,
    hours_for,
    membership_hint,
    plot_extraction,
    rounded,
    with_limits,
)

DRAW = np.random.default_rng(7)
ROWS = DRAW.normal(size=(2400, 3))
QUERIES, FRESH = ROWS[:1200], ROWS[1200:]


def score(rows: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-2 * rows[:, 0] + rows[:, 1]))


@pytest.fixture(autouse=True)
def one_thread() -> None:
    threadpoolctl.threadpool_limits(1)


def test_a_copy_is_better_the_more_answers_it_has_and_than_saying_always_the_same() -> None:
    stolen = extraction(score, QUERIES, FRESH, 0.5, counts=[1200, 50])
    assert set(stolen["answers"]) == {"exact", "to a tenth", "yes or no"} and stolen["n"].tolist() == [50, 1200] * 3
    for _, part in stolen.groupby("answers"):
        assert part["agrees"].is_monotonic_increasing and part["rank"].iloc[-1] > 0.7
        assert part["agrees"].iloc[-1] > part["never"].iloc[-1] + 0.3


def test_the_same_seed_gives_the_same_copy_and_rows_stay_as_they_are() -> None:
    rows = QUERIES.copy()
    one, other = (extraction(score, rows, FRESH, 0.5, counts=[100], seed=3) for _ in range(2))
    assert one.equals(other) and np.array_equal(rows, QUERIES)


def test_a_model_that_says_always_the_same_gives_nothing_away() -> None:
    stolen = extraction(lambda rows: np.full(len(rows), 0.2), QUERIES, FRESH, 0.5, counts=[100])
    assert (stolen["rank"] == 0).all() and (stolen["never"] == 1).all()


@pytest.mark.parametrize("counts", [[], [19], [1201]])
def test_more_answers_than_rows_or_too_few_are_refused(counts: list[int]) -> None:
    with pytest.raises(AttackError, match="1,200 rows can't give"):
        extraction(score, QUERIES, FRESH, 0.5, counts=counts)


def test_answers_get_coarser() -> None:
    told = coarse_answers(np.array([0.04, 0.25, 0.61]), 0.25)
    assert told["yes or no"].tolist() == [0, 1, 1]
    assert np.allclose(told["to a tenth"], [0, 0.2, 0.6]) and np.array_equal(rounded(score(FRESH), 0), score(FRESH))


def test_a_limit_makes_it_slow_and_keys_make_it_quick_again() -> None:
    assert hours_for(3600, 1) == 1 and hours_for(3600, 1, burst=1800) == 0.5 and hours_for(10, 1, burst=10) == 0
    assert hours_for(3600, 1, keys=4) == 0.25
    table = with_limits(extraction(score, QUERIES, FRESH, 0.5, counts=[50, 100]), {"slow": 1 / 36})
    assert table["slow"].tolist() == [0.5, 1.0] * 3


@pytest.mark.parametrize("given", [(-1, 1), (1, 0), (1, 1, -1), (1, 1, 0, 0)])
def test_a_limit_that_is_none_is_refused(given: tuple) -> None:
    with pytest.raises(AttackError, match="make no sense"):
        hours_for(*given)


def test_a_model_that_knows_its_rows_by_heart_tells_who_was_there() -> None:
    labels = (DRAW.random(2400) < score(ROWS)).astype(int)
    members, strangers = (QUERIES, labels[:1200]), (FRESH, labels[1200:])
    tree = DecisionTreeClassifier(random_state=1).fit(*members)
    by_heart = membership_hint(lambda rows: tree.predict_proba(rows)[:, 1].clip(0.01, 0.99), members, strangers)
    honest = membership_hint(score, members, strangers)
    assert by_heart["auc"] > 0.6 and by_heart["advantage"] > 0.2 and by_heart["loss_members"] < 0.02
    assert abs(honest["auc"] - 0.5) < 0.05 and honest["advantage"] < 0.1


@pytest.mark.parametrize("labels", [np.zeros(3), np.full(1200, 0.5), np.full(1200, np.nan)])
def test_labels_that_are_none_are_refused(labels: np.ndarray) -> None:
    with pytest.raises(AttackError, match="labels"):
        membership_hint(score, (QUERIES, labels), (FRESH, np.zeros(1200)))


def test_the_picture_has_a_line_for_each_way_to_answer() -> None:
    axes = plot_extraction(extraction(score, QUERIES, FRESH, 0.5, counts=[50, 100]))
    assert [line.get_label() for line in axes.lines] == ["exact", "to a tenth", "yes or no", "says always the same"]
    plt.close(axes.figure)
