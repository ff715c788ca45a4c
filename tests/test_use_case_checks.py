"""The seam for other people's problems: what is wrong with a use case is said once, in words, by the field's name."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any

import mist as second
import numpy as np
import pandas as pd
import pytest
from conftest import Quarter
from mist import mist

from mlops_course.data import (
    DataError,
    build_features,
    feature_names,
    ingest,
    labelled_features,
    labels,
    make_features,
    read_table,
    table_name,
    table_version,
    validate,
)
from mlops_course.deployment import read_release
from mlops_course.environment import CourseError, Settings
from mlops_course.experiments import ExperimentError, TrainingConfig, evaluate, measure, train
from mlops_course.framing import Costs
from mlops_course.monitoring import join_outcomes
from mlops_course.project import PageText, UseCase, UseCaseError, flight_delay
from mlops_course.project.features import flight_features
from mlops_course.serving import Origin, live_bundle, open_feature_table, read_bundle, write_bundle

pytestmark = pytest.mark.filterwarnings("ignore:Series.values returning")  # inside pyarrow and pandas
JANUARY, FEBRUARY = "2013-01", "2013-02"
Tables = dict[str, pd.DataFrame]


@pytest.fixture(scope="module")
def reports() -> Tables:
    """Real reports of ten days, as they are in the clean table."""
    raw = second.read_reports(JANUARY)["reports"]
    kept = raw[raw["day"] <= 10].assign(period=JANUARY, time_hour=pd.to_datetime(raw["time_hour"], utc=True))
    return {"reports": kept.reset_index(drop=True)}


def computed(reports: Tables, change: Callable[[pd.DataFrame], Any], case: UseCase = mist) -> pd.DataFrame:
    """The features after a change that the use case's author has made."""
    second.changed = lambda tables: change(second.make_features(tables))  # type: ignore[attr-defined]
    return make_features(replace(case, features="mist:changed"), reports, [JANUARY])


# ---------------------------------------------------------------- what can be seen without data


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("name", "Bike hire", "must be 1 to 60 of the letters"), ("name", "../up", "must be 1 to 60"),
        ("name", "", "must be 1 to 60"), ("name", "x" * 61, "must be 1 to 60"), ("name", "bike@3", "must be 1 to 60"),
        ("name", "con", "is taken"), ("name", "lpt1", "is taken"), ("name", "bundles", "is taken"),
        ("question", "", "must be text"), ("tables", (), "must be a tuple of Table"),
        ("tables", mist.tables * 2, "have one name twice"), ("time_zone", "New York", "is not a valid time zone"),
        ("time_zone", "", "is not a valid time zone"),
        ("features", "mist.make_features", "must have the form module:function"),
        ("read", "mist", "must be a function"), ("label", None, "must be a function"), ("time", "", "a column's name"),
        ("categorical", "origin", "must be a tuple"), ("categorical", ("a", "a"), "must be a tuple of different"),
        ("slices", ["origin"], "must be a tuple"), ("horizon", 3, "must be a span of time"),
        ("lookback", timedelta(-1), "not before zero"), ("label_delay", None, "must be a span of time"),
        ("costs", 3, "must be Costs"), ("success", Costs(2, 1), "must be SuccessMetrics"),
        ("page_text", PageText(noun=""), "must be PageText, with a noun"),
    ],
)  # fmt: skip
def test_a_wrong_field_is_named_when_the_use_case_is_made(field: str, value: Any, words: str) -> None:
    with pytest.raises(UseCaseError, match=f"its {field} .*{words}"):
        replace(mist, **{field: value})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": "raw_reports"}, "can't be called raw_reports"), ({"name": "features"}, "can't be called features"),
        ({"name": "Re ports"}, "can't be called Re ports"), ({"key": ()}, "need a key each"),
        ({"key": "origin"}, "need a key each"), ({"period": None}, "must say the month of each row"),
    ],
)  # fmt: skip
def test_a_wrong_table_is_named_when_the_use_case_is_made(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UseCaseError, match=f"'mist': its tables .*{words}"):
        replace(mist, tables=(replace(mist.tables[0], **changes),))


def test_a_table_has_its_use_case_in_its_name() -> None:
    assert table_name(mist, "features") == "mist/features"


# ---------------------------------------------------------------- what the reader gives


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (None, "gave a NoneType, not a dictionary"), (pd.DataFrame(), "gave a DataFrame, not a dictionary"),
        ({}, "gave no table reports, but nothing"), ({"report": pd.DataFrame()}, "no table reports, but report"),
        ({"reports": [1]}, "gave no table reports"), ({"reports": pd.DataFrame({"origin": []})}, "no rows of reports"),
    ],
)  # fmt: skip
def test_a_reader_that_gives_no_tables_is_named(settings: Settings, given: Any, words: str) -> None:
    with pytest.raises(DataError, match=f"the reader of mist, asked for 2013-01, .*{words}"):
        ingest(settings, replace(mist, read=lambda month, source: given), JANUARY)
    assert not any(settings.data.iterdir())


def test_a_key_or_a_month_that_the_contract_lacks_is_named(settings: Settings) -> None:
    (table,) = mist.tables
    with pytest.raises(DataError, match="contract of reports has no column station, which is its key"):
        ingest(settings, replace(mist, tables=(replace(table, key=("station",)),)), JANUARY)
    for period in (lambda frame: frame["monat"], lambda frame: frame["month"], lambda frame: pd.Series(["2013-01"])):
        with pytest.raises(DataError, match="the period of mist's reports"):
            ingest(settings, replace(mist, tables=(replace(table, period=period),)), JANUARY)
    assert not any(settings.data.iterdir())


@pytest.mark.parametrize("late", [3, 50])
def test_late_rows_of_a_month_that_nobody_delivered_are_never_a_whole_one(settings: Settings, late: int) -> None:
    """This table has no parts, so nothing but its deliveries says whether a month is whole."""
    january, february = (second.read_reports(month)["reports"] for month in (JANUARY, FEBRUARY))
    table = replace(mist.tables[0], period=lambda frame: frame["time_hour"].dt.strftime("%Y-%m"))
    both = {"reports": pd.concat([january.head(late), february[february["day"] < 28]], ignore_index=True)}
    case = replace(mist, tables=(table,), read=lambda month, source: both)
    delivery = ingest(settings, case, FEBRUARY)
    checked = validate(settings, case, delivery.tables, delivery.periods)
    assert checked.partial == {JANUARY: f"reports: it was not delivered, only {late:,} late rows"}
    assert checked.rows["reports"] == len(both["reports"])


# ---------------------------------------------------------------- features


def test_numbers_of_all_kinds_become_features_that_models_take(reports: Tables) -> None:
    made = second.make_features(reports)
    assert set(made.dtypes.astype("str")) >= {"float64", "int64", "bool"}
    found = make_features(mist, reports, [JANUARY])
    names = feature_names(found, mist)
    assert names == [*second.NUMBERS, "spread", "warmer", "falling", "visibility_before", "hour_of_day"]
    assert set(found[names].dtypes.astype("str")) == {"float32"}
    for name in names:
        np.testing.assert_array_equal(found[name], made[name].to_numpy().astype(np.float32))


@pytest.mark.parametrize("values", [[2**24, -(2**25)], [2**24 + 1, 0.5], [2.0**60, None]])
def test_whole_numbers_that_float32_holds_and_fractions_are_features(reports: Tables, values: list[Any]) -> None:
    found = computed(reports, lambda made: made.assign(number=[*values, *[1] * (len(made) - 2)]))
    assert found["number"].dtype == "float32"


def test_missing_values_stay_missing_whatever_they_are_called(reports: Tables) -> None:
    rows = len(reports["reports"])
    kinds = {"whole": "Int64", "decimal": "Float64", "flag": "boolean"}
    found = computed(
        reports,
        lambda made: made.assign(
            **{name: pd.array([1, *[None] * (rows - 1)], dtype=kind) for name, kind in kinds.items()}
        ),
    )
    for name in kinds:
        assert found[name].dtype == "float32"
        assert found[name].notna().tolist() == [True] + [False] * (rows - 1)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda made: made.assign(seen=made["time_hour"]), r"the feature seen of mist is datetime64\[us, UTC\]"),
        (lambda made: made.assign(since=made["due"] - made["time_hour"]), "the feature since of mist is timedelta"),
        (lambda made: made.assign(wind="north"), "the feature wind of mist is str"),
        (lambda made: made.assign(odd=[[1]] * len(made)), "the feature odd of mist is object"),
        (lambda made: made.assign(big=1e39), r"the feature big of mist holds 1e\+39, which float32 can't hold"),
        (lambda made: made.assign(endless=np.float32(np.inf)), "the feature endless of mist holds inf"),
        (lambda made: made.assign(number=2**24 + 1), "number of mist holds the whole number 16777217, which float32"),
        (lambda made: made.assign(number=2**53 + 1), "the whole number 9007199254740993, which float32 rounds"),
        (lambda made: made.assign(number=np.uint64(2**64 - 1)), "the whole number 18446744073709551615, which"),
        (lambda made: made.assign(number=[2.0**24 + 1, *[np.nan] * (len(made) - 1)]), "the whole number 16777217, wh"),
        (lambda made: made.assign(due=made["due"].dt.tz_localize(None)), "column due of mist's features must .* zone"),
        (lambda made: made.drop(columns="due"), r"features of mist \(mist:changed\) have no column due"),
        (lambda made: made.drop(columns=["period", "origin"]), "have no column origin, period"),
        (lambda made: made.iloc[::2], "the features of mist lack 357 of the 714 rows of reports, and have 0 others"),
        (lambda made: pd.concat([made, made.head(3)]), "the features of mist have 3 rows with the key of another one"),
        (lambda made: made.assign(origin="XXX").drop_duplicates("time_hour"), "lack 714 of the 714 .* 239 others"),
        (lambda made: made[["origin", "time_hour", "period", "due"]], "mist has no feature"),
        (lambda made: made.assign(predicted_at=made["due"]), "are those of 0:00:00 before due, but its horizon is 3:"),
        (lambda made: made.to_dict(), "are a dict, not a table"),
        (lambda made: pd.concat([made, made[["temp"]]], axis=1), "have the column temp twice"),
    ],
)  # fmt: skip
def test_a_feature_that_cannot_be_one_is_refused_by_its_name(
    reports: Tables, change: Callable[[pd.DataFrame], Any], words: str
) -> None:
    with pytest.raises(DataError, match=words):
        computed(reports, change)


def test_what_is_declared_to_be_a_category_is_one_whatever_its_type(reports: Tables) -> None:
    case = replace(mist, categorical=("origin", "hour_of_day", "falling"))
    found = computed(reports, lambda made: made, case)
    assert set(found[list(case.categorical)].dtypes.astype("str")) == {"str"}
    assert set(found["hour_of_day"]) == {str(hour) for hour in range(24)}
    assert feature_names(found, case)[:3] == list(case.categorical)


def test_a_number_that_is_no_float32_is_never_left_out_without_a_word(reports: Tables) -> None:
    made = second.make_features(reports)
    with pytest.raises(DataError, match=r"not all numbers are float32: temp \(float64\)"):
        feature_names(made, mist)
    with pytest.raises(DataError, match="not all numbers are float32"):
        train(made.assign(label=(made["visib"] < 9).astype("float64")), mist)


# ---------------------------------------------------------------- labels


@pytest.mark.parametrize("dtype", ["float64", "int64", "bool", "boolean", "Int64", "object"])
def test_labels_of_all_types_mean_the_same(dtype: str) -> None:
    rows = pd.DataFrame({"x": [1, 0, 1]}, index=[4, 7, 9])
    found = labels(replace(mist, label=lambda rows: rows["x"].astype(dtype)), rows)
    assert (found.tolist(), found.dtype, found.index.tolist()) == ([1.0, 0.0, 1.0], "float64", [4, 7, 9])


@pytest.mark.parametrize("gap", [None, np.nan, pd.NA])
@pytest.mark.parametrize("dtype", ["object", "category", "str"])
def test_a_label_that_is_not_known_may_be_missing_in_any_way(gap: object, dtype: str) -> None:
    found = labels(replace(mist, label=lambda rows: pd.Series([gap, gap], dtype=dtype)), pd.DataFrame({"x": [1, 2]}))
    assert found.isna().all() and found.dtype == "float64"


@pytest.mark.parametrize(
    ("label", "words"),
    [
        (lambda rows: rows["x"] * 15, "2 labels of mist are neither 0 nor 1, but 30, 45"),
        (lambda rows: rows["x"].map({0: "no", 2: "1", 3: None}), "are neither 0 nor 1, but no, 1"),
        (lambda rows: rows["x"].map(lambda _: pd.NaT), r"the labels of mist are datetime64\[\w+\], not numbers"),
        (lambda rows: rows["x"].map(lambda _: pd.NaT).astype("object"), "3 labels of mist are not numbers, but NaT"),
        (lambda rows: rows["x"].map(lambda x: [x]), "3 labels of mist are not numbers, but list"),
        (lambda rows: rows["x"] * 1j, "the labels of mist are complex128, not numbers"),
        (lambda rows: pd.to_timedelta(rows["x"]), r"the labels of mist are timedelta64\[\w+\], not numbers"),
        (lambda rows: rows["x"].head(2), "must be a column with one for each of 3 rows"),
        (lambda rows: rows["x"].to_numpy(), "must be a column with one for each of 3 rows"),
        (lambda rows: rows["x"].reset_index(drop=True), "must be a column with one for each of 3 rows"),
    ],
)
def test_labels_that_are_no_labels_are_refused_with_their_value(label: Any, words: str) -> None:
    rows = pd.DataFrame({"x": [0, 2, 3]}, index=[4, 7, 9])
    with pytest.raises(DataError, match=words):
        labels(replace(mist, label=label), rows)


def test_training_testing_and_monitoring_refuse_the_same_labels(quarter: Quarter) -> None:
    minutes = replace(flight_delay, label=lambda flights: flights["arr_delay"])
    with pytest.raises(DataError, match="labels of flight-delay are neither 0 nor 1"):
        labelled_features(quarter.settings, minutes, quarter.features, quarter.rows, JANUARY, JANUARY)
    flights = read_table(quarter.settings, quarter.rows, [JANUARY])
    with pytest.raises(DataError, match="labels of flight-delay are neither 0 nor 1"):
        join_outcomes(flights.assign(score=0.5), flights, minutes)


def test_a_row_without_a_label_is_never_learnt_from(quarter: Quarter) -> None:
    rows = quarter.labelled(JANUARY)
    unknown = rows["label"].mask(rows.index % 3 == 0)
    with pytest.raises(ExperimentError, match=f"{unknown.isna().sum()} of {len(rows)} rows have no label"):
        train(rows.assign(label=unknown), flight_delay)
    with pytest.raises(ExperimentError, match=r"a label must be 0 or 1, but there are 2\.0"):
        train(rows.assign(label=rows["label"] * 2), flight_delay)
    with pytest.raises(ExperimentError, match="rows have no label"):
        measure(unknown.to_numpy(), np.full(len(rows), 0.5), flight_delay.costs)


# ---------------------------------------------------------------- a use case without categories and slices


def test_a_use_case_of_numbers_alone_is_trained_tested_and_packaged(settings: Settings) -> None:
    months = [JANUARY, FEBRUARY]
    raw = [ingest(settings, mist, month).tables for month in months][-1]
    tables = validate(settings, mist, raw, months).tables
    assert tables == {"reports": "mist/reports@1"}
    features = build_features(settings, mist, tables, *months)
    rows = labelled_features(settings, mist, features, tables["reports"], *months)
    past, future = rows[rows["period"] == JANUARY], rows[rows["period"] == FEBRUARY]
    model = train(past, mist, TrainingConfig(20))
    result = evaluate(past, future, mist, model)
    assert result.metrics["roc_auc"] > 0.8
    assert list(result.candidates) == ["model", "constant"], "without slices there is no table of rates"
    assert list(result.slices.sort_values("roc_auc").columns)[:2] == ["column", "value"]
    origin = Origin(run_id="0", data={}, first=JANUARY, last=JANUARY)
    manifest = read_bundle(write_bundle(settings, mist, model, past, "mist@1", origin))
    assert {feature.kind for feature in manifest.features} == {"number"}
    assert (manifest.title, manifest.noun) == ("mist", "row")


# ---------------------------------------------------------------- the horizon


def test_flights_obey_the_horizon_of_their_use_case(quarter: Quarter) -> None:
    case = replace(flight_delay, name="early", horizon=timedelta(hours=6))
    tables = {
        name: read_table(quarter.settings, reference).assign(period=JANUARY)
        for name, reference in quarter.tables.items()
    }
    tables["flights"] = tables["flights"].iloc[:2000]
    early, usual = (make_features(each, tables, [JANUARY]) for each in (case, flight_delay))
    ahead = early["scheduled_departure"] - early["predicted_at"]
    assert ahead.unique().tolist() == [pd.Timedelta(hours=6)]
    key = list(case.key)
    early, usual = (each.sort_values(key, ignore_index=True) for each in (early, usual))
    assert (early["distance"] == usual["distance"]).all()
    assert early["departure_delay_system_2h"].notna().sum() < usual["departure_delay_system_2h"].notna().sum()


@pytest.mark.parametrize("horizon", [timedelta(days=4), timedelta(hours=-1)])
def test_a_horizon_that_flights_have_no_history_for_is_refused(quarter: Quarter, horizon: timedelta) -> None:
    tables = {name: read_table(quarter.settings, reference) for name, reference in quarter.tables.items()}
    with pytest.raises(UseCaseError, match="the horizon of the flights is"):
        flight_features(tables, horizon=horizon)


# ---------------------------------------------------------------- a workspace from before


def test_what_an_earlier_version_has_left_is_not_taken_and_not_touched(quarter: Quarter, settings: Settings) -> None:
    """Tables and what is served lay in one folder for all use cases then."""
    shutil.copytree(quarter.settings.data / "flight-delay", settings.data, dirs_exist_ok=True)
    settings.serving.mkdir()
    for name in ("live.json", "release.json", "features.db"):
        (settings.serving / name).write_text("{}", encoding="utf-8")
    before = {path: path.read_bytes() for path in settings.home.rglob("*") if path.is_file()}
    assert table_version(settings, table_name(flight_delay, "flights")) is None
    assert (live_bundle(settings), read_release(settings)) == (None, None)
    with pytest.raises(CourseError, match="there is no online feature table"):
        open_feature_table(settings)
    assert ingest(settings, flight_delay, JANUARY).tables["flights"] == "flight-delay/raw_flights@1"
    assert {path: path.read_bytes() for path in before} == before
