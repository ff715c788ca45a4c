"""A stream in pieces, from however many workers, is the same as one table; and it stays small."""

import numpy as np
import pandas as pd
import pytest

from mlops_course.monitoring.bins import MonitoringError
from mlops_course.monitoring.comparing import drift
from mlops_course.monitoring.profiles import (
    Profile,
    dump_profile,
    merge_profiles,
    parse_profile,
    profile_drift,
    profile_frame,
)  # fmt: skip

ROWS = 100_003  # no number of pieces divides it


@pytest.fixture(scope="module")
def frame() -> pd.DataFrame:
    random = np.random.default_rng(12)
    made = pd.DataFrame({"normal": random.normal(10, 3, ROWS), "rain": random.exponential(1, ROWS).astype("float32")})
    made["rain"] = made["rain"].where(random.random(ROWS) < 0.1, 0)
    made["kind"] = random.choice(list("abcd"), ROWS, p=[0.5, 0.3, 0.15, 0.05])
    return made.mask(random.random((ROWS, 3)) < 0.02)


def quantile_error(profile: Profile, column: pd.Series) -> float:
    """How far a sketch's ranks are off, at worst."""
    name, values = str(column.name), np.sort(column[column.notna() & (column != 0)])
    shares = np.linspace(0.01, 0.99, 99)
    found = np.searchsorted(values, profile[name].opened().get_quantiles(shares)) / len(values)
    return float(np.abs(found - shares).max())


@pytest.mark.parametrize("pieces", [1, 2, 9, 37])
def test_pieces_add_up_to_the_whole(frame: pd.DataFrame, pieces: int) -> None:
    cut = np.array_split(np.arange(ROWS), pieces)
    merged = merge_profiles(profile_frame(frame.iloc[piece]) for piece in cut)
    whole = profile_frame(frame)
    for name in frame:
        one, other = merged[name], whole[name]
        exact = ("rows", "missing", "zeros", "numbers", "low", "high", "texts", "rest")
        assert {key: getattr(one, key) for key in exact} == {key: getattr(other, key) for key in exact}
    assert quantile_error(merged, frame["normal"]) < 0.02
    assert quantile_error(merged, frame["rain"]) < 0.02


def test_a_profile_that_is_used_twice_remembers_nothing(frame: pd.DataFrame) -> None:
    first, second = profile_frame(frame.iloc[:1000]), profile_frame(frame.iloc[1000:3000])
    before = dump_profile(first)
    once, twice = merge_profiles([first, second]), merge_profiles([first, second])
    assert dump_profile(first) == before
    assert once["normal"].rows == twice["normal"].rows == 3000
    assert once["normal"].opened().n == twice["normal"].opened().n


def test_a_profile_survives_a_file_and_refuses_what_is_none(frame: pd.DataFrame) -> None:
    profile = profile_frame(frame.assign(empty=None, when=pd.Timestamp("2013-01-01")))
    assert parse_profile(dump_profile(profile)) == profile
    for wrong in ("", "[]", "{}", '{"format": 2, "columns": {}}', '{"format": 1, "columns": {"a": {}}}'):
        with pytest.raises(MonitoringError, match="this is not a profile"):
            parse_profile(wrong)
    with pytest.raises(MonitoringError, match="no profiles to merge"):
        merge_profiles([])


def test_a_profile_stays_small_whatever_it_is_fed() -> None:
    random, merged = np.random.default_rng(0), None
    for _ in range(20):
        piece = pd.DataFrame({"x": random.normal(0, 1, 50_000), "id": random.integers(0, 10**9, 50_000).astype("str")})
        merged = merge_profiles([profile_frame(piece)] if merged is None else [merged, profile_frame(piece)])
    assert merged is not None and merged["x"].rows == 1_000_000
    assert len(dump_profile(merged)) < 60_000
    assert len(merged["id"].texts) == 1000 and merged["id"].rest + sum(merged["id"].texts.values()) == 1_000_000


def test_drift_of_profiles_is_drift_of_rows_within_the_sketchs_error(frame: pd.DataFrame) -> None:
    then, now = frame.iloc[:60_000], frame.iloc[60_000:].copy()
    now["normal"] += 4
    now["kind"] = now["kind"].replace("d", "new")
    blocks = [profile_frame(then.iloc[start : start + 15_000]) for start in range(0, 60_000, 15_000)]
    exact, sketches = drift(then, now), [profile_drift(blocks, profile_frame(now)) for _ in range(3)]
    for sketched in sketches:
        assert sketched["alarm"].sort_index().tolist() == exact["alarm"].sort_index().tolist() == [True, True, False]
        assert sketched.loc["kind", "new_categories"] == exact.loc["kind", "new_categories"] == "new"

    def off(name: str, statistic: str) -> float:
        """The error of the middle one of three sketches: each of them is drawn anew, and a few are unlucky."""
        return float(np.median([abs(each.loc[name, statistic] - exact.loc[name, statistic]) for each in sketches]))

    assert all(off(name, "psi") <= 0.06 for name in frame)
    assert off("normal", "ks") <= 0.02
    assert off("normal", "wasserstein") <= 0.05 * exact.loc["normal", "wasserstein"]


def test_a_column_that_changes_its_type_or_goes_away(frame: pd.DataFrame) -> None:
    now = frame.head(5000).assign(normal=frame["normal"].head(5000).astype("str")).drop(columns="rain")
    table = profile_drift(profile_frame(frame), profile_frame(now))
    assert "numbers have become text" in table.loc["normal", "why"]
    assert table.loc["rain", "why"] == "absent from the current data"
    assert not table.loc["kind", "alarm"]
    silent = frame.head(5000).assign(normal=np.nan)
    assert profile_drift(profile_frame(frame), profile_frame(silent)).loc["normal", "missing_alarm"]


@pytest.mark.parametrize("value", [pd.Timestamp("2013-01-01"), [1, 2]], ids=["times", "lists"])
def test_a_column_of_neither_numbers_nor_texts_that_goes_empty_raises_an_alarm(value: object) -> None:
    past = pd.DataFrame({"when": pd.Series([value] * 1000)})
    blocks = [profile_frame(past.iloc[start : start + 250]) for start in range(0, 1000, 250)]
    same, empty = (profile_drift(blocks, profile_frame(now)) for now in (past, past.assign(when=None)))
    assert not same.loc["when", "alarm"]
    assert empty.loc["when", "missing_alarm"], empty.loc["when", "why"]


def test_texts_that_become_times_raise_an_alarm_and_are_not_missing() -> None:
    past = pd.DataFrame({"when": ["2013-01-01", "2013-01-02"] * 500})
    now = past.assign(when=pd.to_datetime(past["when"]))
    row = profile_drift(profile_frame(past), profile_frame(now)).loc["when"]
    assert row["alarm"] and not row["missing_alarm"], row["why"]
