"""One function answers all questions: what may come in, what is refused and how, and that answers stay the same."""

import itertools
import json
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pandas as pd
import pytest
from conftest import Quarter, settings_in
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from sklearn.pipeline import Pipeline

from mlops_course.data import feature_names, read_table
from mlops_course.experiments import TrainingConfig, scores, train
from mlops_course.project import flight_delay
from mlops_course.serving import InputError, Predictor, load_predictor
from mlops_course.serving.bundle import Feature
from mlops_course.serving.encoding import Encoder
from mlops_course.serving.packaging import Origin, write_bundle

pytestmark = pytest.mark.filterwarnings("ignore:Series.values returning:DeprecationWarning")  # inside pyarrow

NUMBER = "visibility"
ORIGIN = Origin(run_id="5e43e4af", data={"features": "features@1"}, first="2013-01", last="2013-01")
LARGEST = float(np.finfo(np.float32).max)


@pytest.fixture(scope="module")
def model(quarter: Quarter) -> Pipeline:
    """A model of January that looks at the carrier and at the weather."""
    january = quarter.labelled("2013-01")
    january.loc[::3, NUMBER] = np.nan
    late = (january["carrier"] == "UA") | (january[NUMBER] < 5) | january[NUMBER].isna()
    return train(january.assign(label=late.astype("float64")), flight_delay, TrainingConfig(20, leaf_samples=20))


@pytest.fixture(scope="module")
def folder(quarter: Quarter, model: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings = settings_in(tmp_path_factory.mktemp("bundle"))
    return write_bundle(settings, flight_delay, model, quarter.labelled("2013-01"), "flight-delay@7", ORIGIN)


@pytest.fixture(scope="module")
def shared(folder: Path) -> Predictor:
    return load_predictor(folder)


@pytest.fixture
def predictor(shared: Predictor) -> Predictor:
    """With a count of its own."""
    shared.unknown.clear()
    return shared


@pytest.fixture(scope="module")
def february(quarter: Quarter) -> pd.DataFrame:
    """Features as the pipeline hands them over, without a label."""
    return read_table(quarter.settings, quarter.features, ["2013-02"])


@pytest.fixture(scope="module")
def few(february: pd.DataFrame) -> pd.DataFrame:
    return february.iloc[:20]


def as_records(predictor: Predictor, frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows as JSON gives them: plain numbers and text, null where something is missing."""
    return json.loads(frame[list(predictor.features)].astype("object").to_json(orient="records", double_precision=15))


@pytest.fixture
def record(predictor: Predictor, few: pd.DataFrame) -> dict[str, Any]:
    return as_records(predictor, few.iloc[[3]])[0]


# ---------------------------------------------------------------- tables


@pytest.mark.parametrize(
    ("spoil", "words", "field", "row"),
    [
        (lambda few: few.drop(columns=NUMBER), f"the features lack {NUMBER}. Build them with", NUMBER, None),
        (lambda few: few.drop(columns="carrier"), "the features lack carrier. ", "carrier", None),
        (lambda few: few[["carrier", "origin"]], "and 112 more", "dest", None),
        (lambda few: pd.DataFrame(), "the features lack carrier, origin, dest and 114 more", "carrier", None),
        (lambda few: few.assign(**{NUMBER: "fog"}), f"the feature {NUMBER} is 'fog' in row 0. Give", NUMBER, 0),
        (lambda few: few.assign(**{NUMBER: [9.0] * 7 + ["?"] + [1] * 12}), f"{NUMBER} is '?' in row 7", NUMBER, 7),
        (lambda few: few.assign(**{NUMBER: "10"}), f"{NUMBER} is '10' in row 0", NUMBER, 0),
        (lambda few: few.assign(**{NUMBER: True}), f"{NUMBER} is 'True' in row 0", NUMBER, 0),
        (lambda few: few.assign(**{NUMBER: np.inf}), f"the feature {NUMBER} is 'inf' in row 0", NUMBER, 0),
        (lambda few: few.assign(**{NUMBER: np.float32("-inf")}), f"{NUMBER} is '-inf' in row 0", NUMBER, 0),
        (lambda few: few.assign(**{NUMBER: 1e300}), f"the feature {NUMBER} is '1e+300' in row 0", NUMBER, 0),
        (lambda few: few.assign(**{NUMBER: [[1]] * 20}), f"the feature {NUMBER} is '[1]' in row 0", NUMBER, 0),
        (lambda few: few.assign(carrier=7), "the feature carrier is '7' in row 0. Give text", "carrier", 0),
        (lambda few: few.assign(carrier=["UA"] * 9 + [1.5] * 11), "carrier is '1.5' in row 9", "carrier", 9),
        (lambda few: few.assign(carrier=[["UA"]] * 20), "the feature carrier is ['UA'] in row 0", "carrier", 0),
    ],
)
def test_a_table_that_cannot_be_scored_is_refused_with_its_column_row_and_value(
    predictor: Predictor, few: pd.DataFrame, spoil: Callable[[pd.DataFrame], pd.DataFrame], words: str, field: str,
    row: int | None,
) -> None:  # fmt: skip
    with pytest.raises(InputError) as caught:
        predictor.predict(spoil(few))
    assert words.replace("'[1]'", "[1]") in str(caught.value)
    assert (caught.value.field, caught.value.row) == (field, row)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [np.nan, None, np.float32("nan"), pd.NA])
def test_a_missing_number_is_fine(predictor: Predictor, few: pd.DataFrame, value: Any) -> None:
    answers = predictor.predict(few.assign(**{NUMBER: value}))
    assert len(answers) == len(few)
    assert answers["score"].between(0, 1).all()
    np.testing.assert_array_equal(answers["score"], predictor.predict(few.assign(**{NUMBER: np.nan}))["score"])
    assert (answers["score"] != predictor.predict(few.assign(**{NUMBER: 10.0}))["score"]).any(), "it makes a difference"


@pytest.mark.parametrize(("value", "counted"), [("ZZ", 20), ("", 20), ("ua", 20), (None, 0), (np.nan, 0), (pd.NA, 0)])
def test_a_category_that_the_model_has_not_seen_counts_as_missing_and_is_counted(
    predictor: Predictor, model: Pipeline, few: pd.DataFrame, value: Any, counted: int
) -> None:
    answers = predictor.predict(few.assign(carrier=value))
    assert predictor.unknown["carrier"] == counted
    missing = few.assign(carrier=pd.Series(np.nan, few.index, dtype="str"))
    np.testing.assert_allclose(answers["score"], scores(model, missing), atol=1e-6)
    assert (answers["score"] != predictor.predict(few.assign(carrier="UA"))["score"]).any(), "it makes a difference"


def test_no_rows_have_no_predictions(predictor: Predictor, few: pd.DataFrame) -> None:
    answers = predictor.predict(few.iloc[:0])
    assert answers.empty
    assert list(answers.columns) == list(predictor.predict(few).columns)
    assert (answers["score"].dtype, answers["warned"].dtype) == ("float64", "bool")
    assert predictor.encode([]).shape == predictor.encode_structs([]).shape == (0, 117)
    assert predictor.scores(predictor.encode([])).shape == (0,)


@pytest.mark.parametrize("kind", ["float64", "object", "Float64", "Float32"])
def test_numbers_of_another_type_are_the_same_numbers(predictor: Predictor, few: pd.DataFrame, kind: str) -> None:
    known = few.assign(**{NUMBER: few[NUMBER].fillna(3.7).astype(np.float32)})
    other = known.assign(**{NUMBER: known[NUMBER].astype(kind)})
    np.testing.assert_array_equal(predictor.predict(other)["score"], predictor.predict(known)["score"])


@pytest.mark.parametrize("kind", ["str", "object", "category"])
def test_text_of_another_type_is_the_same_text(predictor: Predictor, few: pd.DataFrame, kind: str) -> None:
    other = few.assign(carrier=few["carrier"].astype(kind))
    np.testing.assert_array_equal(predictor.encode_frame(other), predictor.encode_frame(few))


# ---------------------------------------------------------------- records


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        (NUMBER, "fog", f"the feature {NUMBER} is 'fog' in row 1. Give a finite number, or leave it missing"),
        (NUMBER, "10", f"{NUMBER} is '10' in row 1"),
        (NUMBER, True, f"{NUMBER} is 'True' in row 1"),
        (NUMBER, [1.0], f"{NUMBER} is [1.0] in row 1"),
        (NUMBER, {}, f"{NUMBER} is {{}} in row 1"),
        (NUMBER, float("inf"), f"{NUMBER} is 'inf' in row 1"),
        (NUMBER, 1e39, f"{NUMBER} is '1e+39' in row 1"),
        (NUMBER, LARGEST * (1 + 2**-24), f"{NUMBER} is"),
        (NUMBER, 10**400, f"{NUMBER} is"),
        (NUMBER, 1j, f"{NUMBER} is 1j in row 1"),
        (NUMBER, "x" * 1000, "…"),
        (NUMBER, np.float64("inf"), f"{NUMBER} is 'inf' in row 1"),
        ("carrier", 7, "the feature carrier is '7' in row 1. Give text, or leave it missing"),
        ("carrier", 1.5, "the feature carrier is '1.5'"),
        ("carrier", True, "the feature carrier is 'True'"),
        ("carrier", ["UA"], "the feature carrier is ['UA']"),
        ("carrier", b"UA", "the feature carrier is b'UA'"),
    ],
)
def test_a_record_that_cannot_be_scored_is_refused_with_its_field_row_and_value(
    predictor: Predictor, record: dict[str, Any], name: str, value: Any, words: str
) -> None:
    with pytest.raises(InputError) as caught:
        predictor.encode([record, record | {name: value}, record])
    assert words in str(caught.value)
    assert (caught.value.field, caught.value.row) == (name, 1)
    assert len(str(caught.value)) < 200


def without(record: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name not in names}


@pytest.mark.parametrize(
    ("spoil", "words", "field"),
    [
        (lambda record: without(record, NUMBER), f"the features lack {NUMBER} in row 2", NUMBER),
        (lambda record: without(record, "carrier"), "the features lack carrier in row 2", "carrier"),
        (lambda record: {}, "the features lack carrier, origin, dest and 114 more in row 2", "carrier"),
        (lambda record: record | {"visibilty": 1}, "the model knows no feature 'visibilty', as in row 2", "visibilty"),
        (lambda record: without(record, NUMBER) | {"visibilty": 1}, f"lack {NUMBER}", NUMBER),
        (lambda record: list(record.values()), "row 2 is", None),
        (lambda record: None, "row 2 is None, not a record", None),
        (lambda record: "carrier", "row 2 is 'carrier', not a record", None),
        (lambda record: 5, "row 2 is '5', not a record", None),
    ],
)
def test_a_record_with_other_names_is_refused(
    predictor: Predictor, record: dict[str, Any], spoil: Callable[[dict[str, Any]], Any], words: str, field: str | None
) -> None:
    with pytest.raises(InputError) as caught:
        predictor.encode([record, record, spoil(record)])
    assert words in str(caught.value)
    assert (caught.value.field, caught.value.row) == (field, 2)


@pytest.mark.parametrize("value", [None, float("nan"), np.float32("nan"), pd.NA])
def test_a_missing_value_of_a_record_is_fine(predictor: Predictor, record: dict[str, Any], value: Any) -> None:
    row = predictor.encode([record | {NUMBER: value, "carrier": value}])
    assert np.isnan(row[0, [predictor.features.index(NUMBER), predictor.features.index("carrier")]]).all()
    assert not predictor.unknown


def test_an_unknown_category_of_a_record_counts_as_missing_and_is_counted(
    predictor: Predictor, record: dict[str, Any]
) -> None:
    row = predictor.encode([record | {"carrier": "ZZ"}, record | {"carrier": "ZZ", "dest": ""}, record])
    assert predictor.unknown == {"carrier": 2, "dest": 1}
    np.testing.assert_array_equal(row[:1], predictor.encode([record | {"carrier": None}]))
    predictor.encode([record | {"carrier": "ZZ", NUMBER: np.float32(1)}])
    assert predictor.unknown == {"carrier": 3, "dest": 1}, "the slow way counts as well"


@pytest.mark.parametrize("value", [3, 3.0, np.float32(3), np.float64(3), np.int64(3)])
def test_any_kind_of_number_is_that_number(predictor: Predictor, record: dict[str, Any], value: Any) -> None:
    row = predictor.encode([record | {NUMBER: value}])
    assert row.dtype == np.float32
    assert row[0, predictor.features.index(NUMBER)] == 3


@pytest.mark.parametrize("value", [LARGEST, -LARGEST, 1e-50, 0.1])
def test_what_float32_can_hold_is_rounded_to_it(predictor: Predictor, record: dict[str, Any], value: float) -> None:
    row = predictor.encode([record | {NUMBER: value}])
    assert row[0, predictor.features.index(NUMBER)] == np.float32(value)


def test_the_order_of_names_does_not_matter(predictor: Predictor, record: dict[str, Any]) -> None:
    backwards = dict(reversed(list(record.items())))
    np.testing.assert_array_equal(predictor.encode([backwards]), predictor.encode([record]))


# ---------------------------------------------------------------- records, decoded by msgspec


def test_structs_records_and_tables_are_the_same_numbers(predictor: Predictor, february: pd.DataFrame) -> None:
    records = as_records(predictor, february)
    decoded = msgspec.json.decode(msgspec.json.encode(records), type=list[predictor.encoder.record_type])
    wanted = predictor.encode_frame(february)
    np.testing.assert_array_equal(predictor.encode(records), wanted)
    np.testing.assert_array_equal(predictor.encode_structs(decoded), wanted)
    assert np.isnan(wanted).any()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({NUMBER: "fog"}, rf"Expected `float | null`, got `str` - at `$.{NUMBER}`"),
        ({NUMBER: True}, rf"at `$.{NUMBER}`"),
        ({"carrier": 7}, "Expected `str | null`, got `int` - at `$.carrier`"),
        ({"visibilty": 1.0}, "unknown field `visibilty`"),
    ],
)
def test_the_type_of_a_record_refuses_what_does_not_fit(
    predictor: Predictor, record: dict[str, Any], change: dict[str, Any], words: str
) -> None:
    with pytest.raises(msgspec.ValidationError) as caught:
        msgspec.json.decode(msgspec.json.encode(record | change), type=predictor.encoder.record_type)
    assert words in str(caught.value)


def test_the_type_of_a_record_wants_every_feature(predictor: Predictor, record: dict[str, Any]) -> None:
    with pytest.raises(msgspec.ValidationError, match=f"missing required field `{NUMBER}`"):
        msgspec.json.decode(msgspec.json.encode(without(record, NUMBER)), type=predictor.encoder.record_type)


def test_a_feature_may_have_the_name_that_another_one_gets_inside() -> None:
    names = ["feature_1", "dew point", "feature_2_", "class"]
    encoder = Encoder([Feature(name, "number") for name in [*names, "feature_3"]])
    body = msgspec.json.encode({name: float(place) for place, name in enumerate(encoder.names)})
    decoded = msgspec.json.decode(body, type=encoder.record_type)
    np.testing.assert_array_equal(encoder.encode_structs([decoded]), [[0, 1, 2, 3, 4]])


def test_a_number_too_large_for_float32_is_refused_after_decoding(predictor: Predictor, record: dict[str, Any]) -> None:
    decoded = msgspec.json.decode(msgspec.json.encode(record | {NUMBER: 1e39}), type=predictor.encoder.record_type)
    with pytest.raises(InputError) as caught:
        predictor.encode_structs([decoded])
    assert (caught.value.field, caught.value.row) == (NUMBER, 0)


def test_names_that_python_would_not_take_are_features_all_the_same(quarter: Quarter, tmp_path: Path) -> None:
    odd = {NUMBER: "how far (miles)", "humidity": "class"}
    january = quarter.labelled("2013-01").rename(columns=odd)
    fitted = train(january, flight_delay, TrainingConfig(5))
    made = write_bundle(settings_in(tmp_path), flight_delay, fitted, january, "flight-delay@1", ORIGIN)
    predictor = load_predictor(made)
    body = msgspec.json.encode(as_records(predictor, january.head(3)))
    decoded = msgspec.json.decode(body, type=list[predictor.encoder.record_type])
    np.testing.assert_array_equal(predictor.encode_structs(decoded), predictor.encode_frame(january.head(3)))


# ---------------------------------------------------------------- what goes out


def test_an_answer_says_which_flight_how_likely_whether_to_warn_and_who_said_so(
    predictor: Predictor, model: Pipeline, february: pd.DataFrame
) -> None:
    answers = predictor.predict(february)
    who = [*flight_delay.key, "period", "scheduled_departure"]
    assert list(answers.columns) == [*who, "score", "warned", "model"]
    pd.testing.assert_frame_equal(answers[who], february[who])
    np.testing.assert_allclose(answers["score"], scores(model, february), rtol=0, atol=1e-6)
    np.testing.assert_array_equal(answers["warned"], answers["score"] >= flight_delay.costs.threshold)
    assert set(answers["model"]) == {predictor.reference} == {"flight-delay@7"}
    assert 0 < answers["warned"].mean() < 1


def test_a_month_at_once_row_by_row_and_in_pieces_has_the_same_answers_to_the_last_bit(
    predictor: Predictor, folder: Path, february: pd.DataFrame
) -> None:
    together = predictor.scores(predictor.encode_frame(february))
    records = as_records(predictor, february)
    alone = [predictor.scores(predictor.encode([record]))[0] for record in records]
    np.testing.assert_array_equal(np.array(alone), together)
    random = np.random.default_rng(0)
    cuts = [0, *np.sort(random.choice(len(february), 30, replace=False)), len(february)]
    pieces = [predictor.predict(february[start:end]) for start, end in itertools.pairwise(cuts)]
    np.testing.assert_array_equal(np.concatenate([piece["score"] for piece in pieces]), together)
    many = pd.concat([february] * 8, ignore_index=True)
    assert len(many) > 2 * 16_384, "more than one call"
    several = load_predictor(folder, threads=3)
    np.testing.assert_array_equal(several.scores(several.encode_frame(many)), np.tile(together, 8))


def test_neither_the_order_of_rows_and_columns_nor_more_columns_matter(
    predictor: Predictor, february: pd.DataFrame
) -> None:
    expected = predictor.predict(february)
    random = np.random.default_rng(0)
    shuffled = february.sample(frac=1, random_state=1)[random.permutation(february.columns)].assign(label="?", ß=1)
    found = predictor.predict(shuffled)
    pd.testing.assert_frame_equal(found.sort_index(), expected, check_exact=True)


def test_features_alone_are_enough(predictor: Predictor, few: pd.DataFrame) -> None:
    bare = predictor.predict(few[feature_names(few, flight_delay)])
    assert list(bare.columns) == ["carrier", "origin", "score", "warned", "model"], "no more of the key came in"
    np.testing.assert_array_equal(bare["score"], predictor.predict(few)["score"])


def test_what_came_in_stays_as_it_was(predictor: Predictor, few: pd.DataFrame, record: dict[str, Any]) -> None:
    given_in = few.assign(**{NUMBER: few[NUMBER].astype("object")})
    before, same = given_in.copy(deep=True), dict(record)
    predictor.predict(given_in)
    predictor.encode([record])
    pd.testing.assert_frame_equal(given_in, before, check_exact=True)
    assert record == same


@examples(deadline=None, max_examples=60)
@given(
    number=st.none() | st.floats(width=32, allow_infinity=False) | st.integers(-(2**31), 2**31),
    text=st.none() | st.text(max_size=5),
)
def test_any_finite_number_and_any_text_has_an_answer_that_does_not_depend_on_the_way_in(
    shared: Predictor, few: pd.DataFrame, number: Any, text: Any
) -> None:
    spoilt = few.head(2).assign(**{NUMBER: number, "carrier": text})
    answers = shared.predict(spoilt)["score"]
    assert answers.between(0, 1).all()
    records = [record | {NUMBER: number, "carrier": text} for record in as_records(shared, few.head(2))]
    np.testing.assert_array_equal(shared.scores(shared.encode(records)), answers)


def test_many_threads_share_one_predictor(predictor: Predictor, february: pd.DataFrame) -> None:
    rows = predictor.encode_frame(february)
    expected = predictor.scores(rows)
    found: dict[int, np.ndarray] = {}

    def score(number: int) -> None:
        found[number] = np.array([predictor.scores(rows[at : at + 1])[0] for at in range(number, 600, 4)])

    threads = [threading.Thread(target=score, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(4):
        np.testing.assert_array_equal(found[number], expected[number:600:4])


# ---------------------------------------------------------------- reasons


def test_reasons_are_what_a_score_loses_when_a_group_becomes_typical(
    predictor: Predictor, few: pd.DataFrame, record: dict[str, Any]
) -> None:
    row = predictor.encode([record])
    typical = {feature.name: feature.typical for feature in predictor.manifest.features}
    group = {feature.name: feature.group for feature in predictor.manifest.features}
    reasons = predictor.reasons(row, count=100)
    assert {reason.name for reason in reasons} == set(group.values())
    assert [abs(reason.effect) for reason in reasons] == sorted((abs(r.effect) for r in reasons), reverse=True)
    for reason in reasons:
        inside = {name for name in group if group[name] == reason.name}
        assert reason.values == {n: pytest.approx(record[n]) if record[n] is not None else None for n in inside}
        changed = record | {name: typical[name] for name in inside}
        expected = predictor.scores(row)[0] - predictor.scores(predictor.encode([changed]))[0]
        assert reason.effect == pytest.approx(expected, abs=1e-12)
    assert predictor.reasons(row[0])[:5] == reasons[:5]


def test_the_reason_of_a_made_up_model_is_what_it_was_made_of(predictor: Predictor, record: dict[str, Any]) -> None:
    reason = predictor.reasons(predictor.encode([record | {"carrier": "DL", NUMBER: 1.0}]), count=1)[0]
    assert reason.name == "the weather at the origin"
    assert reason.effect > 0.2


def test_reasons_without_groups_name_features(quarter: Quarter, model: Pipeline, tmp_path: Path) -> None:
    january, plain = quarter.labelled("2013-01"), replace(flight_delay, groups=())
    made = write_bundle(settings_in(tmp_path), plain, model, january, "flight-delay@1", ORIGIN)
    predictor = load_predictor(made)
    row = predictor.encode_frame(january.head(1).assign(carrier="UA", visibility=np.float32(1)))
    names = [reason.name for reason in predictor.reasons(row, count=2)]
    assert NUMBER in names
    assert all(set(reason.values) == {reason.name} for reason in predictor.reasons(row))
