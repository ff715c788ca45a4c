"""One function answers all questions: what may come in, what is refused and how, and that answers stay the same."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import Quarter
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from mlops_course.data import feature_names, read_table
from mlops_course.experiments import TrainingConfig, scores, train
from mlops_course.project import flight_delay
from mlops_course.serving import InputError, Scorer, check_features

pytestmark = pytest.mark.filterwarnings("ignore:Series.values returning:DeprecationWarning")  # inside pyarrow

NUMBER = "visibility"


@pytest.fixture(scope="module")
def scorer(quarter: Quarter) -> Scorer:
    """A model of January that looks at the carrier and at the weather."""
    january = quarter.labelled("2013-01")
    january.loc[::3, NUMBER] = np.nan
    late = (january["carrier"] == "UA") | (january[NUMBER] < 5) | january[NUMBER].isna()
    model = train(january.assign(label=late.astype("float64")), flight_delay, TrainingConfig(20, leaf_samples=20))
    return Scorer(model, "flight-delay@7", flight_delay)


@pytest.fixture(scope="module")
def february(quarter: Quarter) -> pd.DataFrame:
    """Features as the pipeline hands them over, without a label."""
    return read_table(quarter.settings, quarter.features, ["2013-02"])


@pytest.fixture(scope="module")
def few(february: pd.DataFrame) -> pd.DataFrame:
    return february.iloc[:20]


# ---------------------------------------------------------------- what comes in


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda few: few.drop(columns=NUMBER), f"the features lack {NUMBER}. Build them with"),
        (lambda few: few.drop(columns="carrier"), "the features lack carrier. "),
        (lambda few: few[["carrier", "origin"]], "and 112 more"),
        (lambda few: pd.DataFrame(), "the features lack carrier, origin, dest and 114 more"),
        (lambda few: few.assign(**{NUMBER: "fog"}), f"the feature {NUMBER} is 'fog' in row 0. Give a finite number"),
        (lambda few: few.assign(**{NUMBER: ["10"] * 7 + ["?"] + ["1"] * 12}), f"feature {NUMBER} is '?' in row 7"),
        (lambda few: few.assign(**{NUMBER: np.inf}), f"the feature {NUMBER} is 'inf' in row 0"),
        (lambda few: few.assign(**{NUMBER: np.float32("-inf")}), f"the feature {NUMBER} is '-inf' in row 0"),
        (lambda few: few.assign(**{NUMBER: 1e300}), f"the feature {NUMBER} is '1e+300' in row 0"),
        (lambda few: few.assign(**{NUMBER: [[1]] * 20}), f"the feature {NUMBER} is '[1]' in row 0"),
    ],
)
def test_what_cannot_be_scored_is_refused_with_its_column_row_and_value(
    scorer: Scorer, few: pd.DataFrame, spoil: Callable[[pd.DataFrame], pd.DataFrame], words: str
) -> None:
    with pytest.raises(InputError) as caught:
        scorer.predict(spoil(few))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [np.nan, None, np.float32("nan"), pd.NA])
def test_a_missing_number_is_fine(scorer: Scorer, few: pd.DataFrame, value: Any) -> None:
    answers = scorer.predict(few.assign(**{NUMBER: value}))
    assert len(answers) == len(few)
    assert answers["score"].between(0, 1).all()
    np.testing.assert_array_equal(answers["score"], scorer.predict(few.assign(**{NUMBER: np.nan}))["score"])
    assert (answers["score"] != scorer.predict(few.assign(**{NUMBER: 10.0}))["score"]).any(), "it makes a difference"


@pytest.mark.parametrize("value", ["ZZ", "", "ua", None, np.nan, pd.NA, 7])
def test_a_category_that_the_model_has_not_seen_counts_as_missing(
    scorer: Scorer, few: pd.DataFrame, value: Any
) -> None:
    answers = scorer.predict(few.assign(carrier=value))
    missing = few.assign(carrier=pd.Series(np.nan, few.index, dtype="str"))
    np.testing.assert_array_equal(answers["score"], scores(scorer.model, missing))
    assert (answers["score"] != scorer.predict(few.assign(carrier="UA"))["score"]).any(), "it makes a difference"


def test_no_rows_have_no_predictions(scorer: Scorer, few: pd.DataFrame) -> None:
    answers = scorer.predict(few.iloc[:0])
    assert answers.empty
    assert list(answers.columns) == list(scorer.predict(few).columns)
    assert (answers["score"].dtype, answers["warned"].dtype) == ("float64", "bool")


@pytest.mark.parametrize("kind", ["float64", "object", "str", "Float64"])
def test_numbers_of_another_type_are_the_same_numbers(scorer: Scorer, few: pd.DataFrame, kind: str) -> None:
    known = few.assign(**{NUMBER: few[NUMBER].fillna(3.7).astype(np.float32)})
    other = known.assign(**{NUMBER: known[NUMBER].astype(kind)})
    np.testing.assert_array_equal(scorer.predict(other)["score"], scorer.predict(known)["score"])


def test_checked_features_are_text_and_single_precision(few: pd.DataFrame) -> None:
    checked = check_features(few.assign(carrier=pd.Categorical(few["carrier"])), ("carrier",), [NUMBER])
    assert list(checked.columns) == ["carrier", NUMBER]
    assert (checked["carrier"].dtype, checked[NUMBER].dtype) == ("str", "float32")
    assert checked.index.equals(few.index)


# ---------------------------------------------------------------- what goes out


def test_an_answer_says_which_flight_how_likely_whether_to_warn_and_who_said_so(
    scorer: Scorer, february: pd.DataFrame
) -> None:
    answers = scorer.predict(february)
    who = [*flight_delay.key, "period", "scheduled_departure"]
    assert list(answers.columns) == [*who, "score", "warned", "model"]
    pd.testing.assert_frame_equal(answers[who], february[who])
    np.testing.assert_array_equal(answers["score"], scores(scorer.model, february))
    np.testing.assert_array_equal(answers["warned"], answers["score"] >= flight_delay.costs.threshold)
    assert set(answers["model"]) == {"flight-delay@7"}
    assert 0 < answers["warned"].mean() < 1


def test_a_row_alone_gets_the_answer_that_it_gets_among_many(scorer: Scorer, february: pd.DataFrame) -> None:
    together = scorer.predict(february)
    for number in range(0, len(february), 400):
        alone = scorer.predict(february.iloc[[number]])
        pd.testing.assert_frame_equal(alone, together.iloc[[number]], check_exact=True)


def test_neither_the_order_of_rows_and_columns_nor_more_columns_matter(scorer: Scorer, february: pd.DataFrame) -> None:
    expected = scorer.predict(february)
    random = np.random.default_rng(0)
    shuffled = february.sample(frac=1, random_state=1)[random.permutation(february.columns)].assign(label="?", ß=1)
    found = scorer.predict(shuffled)
    pd.testing.assert_frame_equal(found.sort_index(), expected, check_exact=True)


def test_features_alone_are_enough(scorer: Scorer, few: pd.DataFrame) -> None:
    bare = scorer.predict(few[feature_names(few, flight_delay)])
    assert list(bare.columns) == ["carrier", "origin", "score", "warned", "model"], "no more of the key came in"
    np.testing.assert_array_equal(bare["score"], scorer.predict(few)["score"])


def test_what_came_in_stays_as_it_was(scorer: Scorer, few: pd.DataFrame) -> None:
    given_in = few.assign(**{NUMBER: few[NUMBER].astype("object")})
    before = given_in.copy(deep=True)
    scorer.predict(given_in)
    pd.testing.assert_frame_equal(given_in, before, check_exact=True)


@examples(deadline=None, max_examples=15)
@given(
    number=st.none() | st.floats(width=32, allow_infinity=False) | st.integers(-(2**31), 2**31),
    text=st.none() | st.text(max_size=5),
)
def test_any_finite_number_and_any_text_has_an_answer(
    scorer: Scorer, few: pd.DataFrame, number: Any, text: Any
) -> None:
    spoilt = few.head(2).assign(**{NUMBER: number, "carrier": text})
    assert scorer.predict(spoilt)["score"].between(0, 1).all()
