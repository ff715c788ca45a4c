"""What becomes of a table's versions: told, compared, tagged, brought back, given up only when nobody needs them."""

import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import numpy as np
import pandas as pd
import pytest
from conftest import Quarter, settings_in
from deltalake import DeltaTable, write_deltalake
from filelock import FileLock
from service_helpers import Running, serving, until
from typer.testing import CliRunner

from mlops_course.cli import app
from mlops_course.data import DataError, build_features, newest_reference, read_table, replace_months, table_version
from mlops_course.environment import CourseError, Settings, WorkspaceError
from mlops_course.experiments import TrainingConfig, evaluate_run, train_run
from mlops_course.ledger import LedgerEntry, append_entry, read_ledger, repair_ledger, verify_ledger
from mlops_course.project import flight_delay
from mlops_course.registry import champion_reference, package, promote, register, score_month
from mlops_course.registry.data_diff import compare_distributions, diff_versions, distance, table_key
from mlops_course.registry.data_versions import (
    list_tables,
    read_notes,
    remove_tag,
    resolve_version,
    table_history,
    tag_version,
)
from mlops_course.registry.lineage import (
    find_thing,
    lineage_graph,
    lineage_json,
    lineage_mermaid,
    lineage_of,
    lineage_rows,
)
from mlops_course.registry.openlineage import openlineage_events
from mlops_course.registry.reproduction import bundle_digest, reproduce_model
from mlops_course.registry.restoring import restore_version
from mlops_course.registry.retention import (
    find_references,
    number_ranges,
    plan_prune,
    prune_versions,
    read_ranges,
    version_references,
)
from mlops_course.registry.store import check_registry
from mlops_course.registry.table_ledger import check_tables, repair_tables
from mlops_course.serving import materialise, publish
from mlops_course.serving.bundle import Manifest, open_bundle, write_manifest
from mlops_course.serving.publishing import check_live

pytestmark = pytest.mark.filterwarnings("ignore:Series.values returning:DeprecationWarning")  # inside pyarrow
JANUARY, FEBRUARY, MARCH = "2013-01", "2013-02", "2013-03"
FLIGHTS = "toy/flights"
KEY = flight_delay.key


def rows_of(month: str, *delays: float | None) -> pd.DataFrame:
    """Flights of a month, numbered from 1."""
    numbers = range(1, len(delays) + 1)
    return pd.DataFrame({"period": month, "flight": list(numbers), "delay": pd.Series(delays, dtype="float64")})


@pytest.fixture
def toy(settings: Settings) -> Settings:
    """A workspace with a table of five versions: the empty one, two months, and a column that came later."""
    replace_months(settings, FLIGHTS, pd.concat([rows_of(JANUARY, 5, 20), rows_of(FEBRUARY, 7)]))
    replace_months(settings, FLIGHTS, rows_of(JANUARY, 5, 21))
    replace_months(settings, FLIGHTS, rows_of(MARCH, 1, 2, 3), sources={"raw_flights": "toy/raw_flights@9"})
    whole = read_table(settings, f"{FLIGHTS}@3")
    replace_months(settings, FLIGHTS, whole.assign(gate="A1"), derived=True)
    return settings


def fates(settings: Settings, **options: object) -> dict[str, str]:
    """What a plan says of each version of the toy table; a version that may go has no reason."""
    plan = plan_prune(settings, [FLIGHTS], **{"older_than": 0.0, **options})  # type: ignore[arg-type]
    return {each.reference.partition("@")[2]: "; ".join(each.reasons) if each.keep else "" for each in plan}


# ---------------------------------------------------------------- history


def test_the_history_tells_what_was_done(toy: Settings) -> None:
    history = table_history(toy, FLIGHTS)
    assert [version.reference for version in history] == [f"{FLIGHTS}@{number}" for number in range(5)]
    assert [version.what for version in history] == [
        "made", "2013-01, 2013-02 written", "2013-01 written", "2013-03 written", "written as a whole",
    ]  # fmt: skip
    assert [version.rows for version in history] == [0, 3, 3, 6, 6]
    assert [version.columns[-1] for version in history] == ["delay"] * 4 + ["gate"]
    assert history[3].sources == {"raw_flights": "toy/raw_flights@9"}
    assert all(version.gone == "" for version in history)
    assert all(one.time <= other.time for one, other in pairwise(history))


def test_a_table_that_is_not_there_has_no_history(toy: Settings) -> None:
    with pytest.raises(DataError, match=r"no table 'toy/trains'; there are toy/flights"):
        table_history(toy, "toy/trains")


def test_a_table_of_another_program_has_a_history_too(settings: Settings) -> None:
    write_deltalake(str(settings.data / "foreign"), rows_of(JANUARY, 1, 2))
    write_deltalake(str(settings.data / "foreign"), rows_of(JANUARY, 3, 2), mode="append")
    history = [(version.rows, version.what, version.sources) for version in table_history(settings, "foreign")]
    assert history == [(2, "written as a whole", {}), (4, "rows added", {})]
    assert list_tables(settings) == ["foreign"]
    diff = diff_versions(settings, "foreign@0", "foreign@1")
    assert (diff.added, diff.removed, diff.unchanged) == (2, 0, 2)


# ---------------------------------------------------------------- differences


def test_rows_that_came_went_and_changed_are_counted_by_their_key(settings: Settings) -> None:
    replace_months(settings, FLIGHTS, rows_of(JANUARY, 5, None, 7, 8))
    after = pd.concat([rows_of(JANUARY, 5, 9, None).assign(flight=[1, 2, 3]), rows_of(JANUARY, 1).assign(flight=11)])
    replace_months(settings, FLIGHTS, after)
    diff = diff_versions(settings, f"{FLIGHTS}@1", f"{FLIGHTS}@2", ["flight"])
    assert (diff.added, diff.removed, diff.changed, diff.unchanged) == (1, 1, 2, 1)
    assert diff.cells == {"delay": 2} and diff.columns == {} and not diff.same


def test_only_months_whose_files_differ_are_read(toy: Settings) -> None:
    for path in (toy.data / FLIGHTS / "period=2013-02").iterdir():
        original, content = path, path.read_bytes()
        path.write_bytes(b"not Parquet")
        break
    diff = diff_versions(toy, f"{FLIGHTS}@1", f"{FLIGHTS}@2", ["flight"])
    assert diff.months == (JANUARY,) and diff.changed == 1
    original.write_bytes(content)
    assert diff_versions(toy, f"{FLIGHTS}@2", f"{FLIGHTS}@3", ["flight"]).months == (MARCH,)


def test_columns_and_their_types_are_compared(toy: Settings) -> None:
    diff = diff_versions(toy, f"{FLIGHTS}@1", FLIGHTS, ["period", "flight"])
    assert diff.columns == {"gate": "added, string"} and diff.added == 3 and diff.changed == 1
    back = diff_versions(toy, FLIGHTS, f"{FLIGHTS}@1", ["period", "flight"])
    assert back.columns == {"gate": "removed, was string"} and back.removed == 3


def test_a_version_is_the_same_as_itself_and_as_what_was_restored_from_it(toy: Settings) -> None:
    assert diff_versions(toy, f"{FLIGHTS}@2", f"{FLIGHTS}@2", ["flight"]).same
    restore_version(toy, f"{FLIGHTS}@2", "a try")
    diff = diff_versions(toy, f"{FLIGHTS}@2", FLIGHTS, ["flight"])
    assert diff.same and diff.months == ()


def test_numbers_beyond_what_a_float_holds_are_compared_exactly(settings: Settings) -> None:
    big = 2**53
    frame = pd.DataFrame({"period": JANUARY, "flight": [1, 2], "order": pd.array([big, None], "Int64")})
    replace_months(settings, FLIGHTS, frame)
    replace_months(settings, FLIGHTS, frame.assign(order=pd.array([big + 1, None], "Int64")))
    assert diff_versions(settings, f"{FLIGHTS}@1", f"{FLIGHTS}@2", ["flight"]).changed == 1


def test_keys_that_occur_twice_are_numbered(settings: Settings) -> None:
    twice = pd.concat([rows_of(JANUARY, 5), rows_of(JANUARY, 6)])
    replace_months(settings, FLIGHTS, twice)
    replace_months(settings, FLIGHTS, pd.concat([rows_of(JANUARY, 5), rows_of(JANUARY, 7), rows_of(JANUARY, 8)]))
    diff = diff_versions(settings, f"{FLIGHTS}@1", f"{FLIGHTS}@2", ["flight"])
    assert (diff.added, diff.removed, diff.changed) == (1, 0, 1)


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ([1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 4.0], 0.0),
        ([1.0, 2.0], [3.0, 4.0], 1.0),
        ([1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 9.0, 9.0], 0.5),
        (["a", "a", "b", "b"], ["a", "b", "b", "b"], 0.25),
        (["a"], ["b"], 1.0),
        ([True, False], [True, True], 0.5),
        ([None, None], [1.0, 2.0], np.nan),
    ],
)
def test_the_distance_of_distributions_lies_between_0_and_1(one: list, other: list, expected: float) -> None:
    found = distance(pd.Series(one), pd.Series(other))
    assert found == pytest.approx(expected, nan_ok=True)


def test_a_column_that_lost_its_values_shows_in_its_missing_share(settings: Settings) -> None:
    told = compare_distributions(rows_of(JANUARY, 1, 2), rows_of(JANUARY, None, 2))
    assert told.loc["delay", ["missing_before", "missing_after"]].tolist() == [0.0, 0.5]


def test_the_keys_of_a_use_cases_tables_are_known() -> None:
    assert table_key(flight_delay, "flight-delay/features") == flight_delay.key
    assert table_key(flight_delay, "flight-delay/raw_weather")[-1] == "delivery"
    assert table_key(flight_delay, "toy/flights") == ()


def test_what_can_not_be_compared_is_an_error(toy: Settings) -> None:
    for pair in ((f"{FLIGHTS}@1", "toy/trains@1"), (f"{FLIGHTS}@1", f"{FLIGHTS}@99"), (FLIGHTS, f"{FLIGHTS}@nothing")):
        with pytest.raises(DataError):
            diff_versions(toy, *pair)
    replace_months(toy, "toy/other", rows_of(JANUARY, 1))
    with pytest.raises(DataError, match="two tables"):
        diff_versions(toy, FLIGHTS, "toy/other")


# ---------------------------------------------------------------- tags


def test_a_tag_names_a_version_and_is_not_moved_by_accident(toy: Settings) -> None:
    assert tag_version(toy, f"{FLIGHTS}@1", "before-audit") == f"{FLIGHTS}@1"
    assert resolve_version(toy, f"{FLIGHTS}@before-audit") == f"{FLIGHTS}@1"
    with pytest.raises(DataError, match=r"belongs to toy/flights@1"):
        tag_version(toy, f"{FLIGHTS}@2", "before-audit")
    tag_version(toy, f"{FLIGHTS}@2", "before-audit", move=True)
    assert resolve_version(toy, f"{FLIGHTS}@before-audit") == f"{FLIGHTS}@2"
    remove_tag(toy, FLIGHTS, "before-audit")
    assert read_notes(toy, FLIGHTS).tags == {}
    with pytest.raises(DataError, match="no tag 'before-audit'"):
        resolve_version(toy, f"{FLIGHTS}@before-audit")


@pytest.mark.parametrize("tag", ["", "7", "a b", "../x", "ä", ".hidden", "-x"])
def test_a_tag_is_a_plain_word(toy: Settings, tag: str) -> None:
    with pytest.raises(DataError, match="not a valid tag"):
        tag_version(toy, FLIGHTS, tag)


def test_two_tags_at_once_are_both_kept(toy: Settings) -> None:
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda number: tag_version(toy, f"{FLIGHTS}@{number % 4}", f"tag-{number}"), range(12)))
    assert read_notes(toy, FLIGHTS).tags == {f"tag-{number}": number % 4 for number in range(12)}


def test_damaged_notes_are_an_error_and_not_the_loss_of_all_tags(toy: Settings) -> None:
    tag_version(toy, FLIGHTS, "golden")
    (toy.data / FLIGHTS / "_versions.json").write_text("{")
    for call in (lambda: table_history(toy, FLIGHTS), lambda: prune_versions(toy, [FLIGHTS], 0.0)):
        with pytest.raises(DataError, match="is damaged"):
            call()


# ---------------------------------------------------------------- restore


def test_a_restore_brings_back_rows_and_columns(toy: Settings) -> None:
    wanted = read_table(toy, f"{FLIGHTS}@1")
    restored = restore_version(toy, f"{FLIGHTS}@1", "March was wrong")
    assert (restored.before, restored.now, restored.changed) == (f"{FLIGHTS}@4", f"{FLIGHTS}@5", True)
    pd.testing.assert_frame_equal(read_table(toy, restored.now), wanted, check_exact=True)
    history = table_history(toy, FLIGHTS)
    assert (history[-1].what, history[-1].reason) == ("version 1 restored", "March was wrong")
    assert "gate" not in history[-1].columns, "the column that was added later is gone again"
    replace_months(toy, FLIGHTS, rows_of(MARCH, 4))  # what has the old columns fits again
    assert "gate" in read_table(toy, f"{FLIGHTS}@4"), "and nothing was lost"


def test_a_restore_of_what_is_there_already_changes_nothing(toy: Settings) -> None:
    assert not restore_version(toy, FLIGHTS, "nothing to do").changed
    restore_version(toy, f"{FLIGHTS}@2", "back")
    assert not restore_version(toy, f"{FLIGHTS}@2", "back").changed
    assert table_version(toy, FLIGHTS) == 5


def test_a_widened_column_is_narrow_again(settings: Settings) -> None:
    from mlops_course.data import widen_column

    whole = pd.DataFrame({"period": [JANUARY], "delay": [3]})
    replace_months(settings, FLIGHTS, whole)
    widen_column(settings, FLIGHTS, "delay", "double")
    restore_version(settings, f"{FLIGHTS}@1", "whole minutes do")
    with pytest.raises(DataError, match="holds int64"):
        replace_months(settings, FLIGHTS, whole.assign(delay=[1.5]))


def test_a_version_that_lost_a_file_is_not_restored(toy: Settings) -> None:
    DeltaTable(str(toy.data / FLIGHTS)).vacuum(0, dry_run=False, enforce_retention_duration=False)  # somebody else does
    with pytest.raises(DataError, match=r"can't be read any more: \d of its \d files are gone"):
        restore_version(toy, f"{FLIGHTS}@1", "too late")
    gone = {version.reference: version.gone for version in table_history(toy, FLIGHTS)}
    assert "files are gone" in gone[f"{FLIGHTS}@1"] and gone[f"{FLIGHTS}@4"] == ""


# ---------------------------------------------------------------- the ledger


def told(settings: Settings) -> list[tuple[str, str, str]]:
    """Event, subject and person of each line of the ledger, which has to be whole."""
    assert verify_ledger(settings) == []
    return [(entry.event, entry.subject, entry.by) for entry in read_ledger(settings)]


def write_line(settings: Settings, wanted: int, by: str = "ann") -> LedgerEntry:
    """The line of a restore whose process is killed right after it: the same one that a whole restore writes."""
    copy = settings_in(shutil.copytree(settings.home, settings.home.parent / "copy"))
    restore_version(copy, f"{FLIGHTS}@{wanted}", "cut short", by=by)
    line = append_entry(settings, read_ledger(copy)[-1])
    shutil.rmtree(copy.home)
    return line


def test_who_restores_or_prunes_is_in_the_ledger(toy: Settings) -> None:
    restore_version(toy, f"{FLIGHTS}@2", "March was wrong", by="ann", approver="eve")
    restore_version(toy, f"{FLIGHTS}@2", "again", by="ann")
    tag_version(toy, f"{FLIGHTS}@4", "gates")
    prune_versions(toy, [FLIGHTS], 0.0, by="bob", reason="the disk is full")
    prune_versions(toy, [FLIGHTS], 0.0, by="bob")
    restored, pruned = read_ledger(toy)
    assert (restored.event, restored.subject, restored.use_case) == ("restore", f"{FLIGHTS}@2", "toy")
    assert (restored.by, restored.approver, restored.reason) == ("ann", "eve", "March was wrong")
    assert [side["version"] for side in (restored.before, restored.after)] == [f"{FLIGHTS}@4", f"{FLIGHTS}@5"]
    assert restored.before["content"] != restored.after["content"]
    assert (pruned.event, pruned.subject, pruned.by, pruned.reason) == ("prune", FLIGHTS, "bob", "the disk is full")
    assert (pruned.before, pruned.after) == ({"pruned": ""}, {"pruned": "0-3"})
    assert check_tables(toy) == repair_tables(toy) == verify_ledger(toy) == []


def test_a_restore_that_was_cut_short_is_completed_by_whoever_comes_next(toy: Settings) -> None:
    write_line(toy, 1)
    assert check_tables(toy) == [f"line 1 says that {FLIGHTS}@5 holds {FLIGHTS}@1, and there is no {FLIGHTS}@5"]
    assert not restore_version(toy, f"{FLIGHTS}@1", "again", by="bob").changed
    assert (table_version(toy, FLIGHTS), check_tables(toy)) == (5, [])
    write_line(toy, 2)
    prune_versions(toy, [FLIGHTS], 0.0, by="bob")
    assert table_version(toy, FLIGHTS) == 6 and table_history(toy, FLIGHTS)[-1].what == "version 2 restored"
    assert told(toy) == [
        ("restore", f"{FLIGHTS}@1", "ann"),
        ("restore", f"{FLIGHTS}@2", "ann"),
        ("prune", FLIGHTS, "bob"),
    ]


def test_a_restore_that_came_too_late_is_taken_back(toy: Settings) -> None:
    write_line(toy, 1)
    newer = rows_of(MARCH, 9).assign(gate="A1")
    replace_months(toy, FLIGHTS, newer)
    assert check_tables(toy) == [f"line 1 says that {FLIGHTS}@5 holds {FLIGHTS}@1, and somebody else wrote {FLIGHTS}@5"]
    (done,) = repair_tables(toy, by="eve")
    assert done.startswith("line 2 was added: line 1 says that") and check_tables(toy) == []
    assert told(toy) == [("restore", f"{FLIGHTS}@1", "ann"), ("adopt", FLIGHTS, "eve")]
    assert read_table(toy, f"{FLIGHTS}@5", [MARCH])["delay"].tolist() == [9], "what was written stays"


def test_whoever_writes_while_a_restore_waits_for_the_ledger_keeps_their_rows(toy: Settings) -> None:
    restore_version(toy, f"{FLIGHTS}@1", "so that there is a ledger", by="ann")
    with ThreadPoolExecutor(1) as pool:
        with FileLock(toy.ledger.with_name("ledger.lock")):
            waiting = pool.submit(restore_version, toy, f"{FLIGHTS}@4", "too slow", "bob")
            time.sleep(1)
            replace_months(toy, FLIGHTS, rows_of(MARCH, 9))
        with pytest.raises(WorkspaceError, match="somebody else wrote to toy/flights"):
            waiting.result()
    assert told(toy)[1:] == [("restore", f"{FLIGHTS}@4", "bob"), ("adopt", FLIGHTS, "bob")]
    assert read_table(toy, newest_reference(toy, FLIGHTS), [MARCH])["delay"].tolist() == [9]
    assert check_tables(toy) == []


def test_a_table_that_was_made_anew_is_not_restored_from_an_old_line(toy: Settings) -> None:
    write_line(toy, 1)
    shutil.rmtree(toy.data / FLIGHTS)
    assert check_tables(toy) and len(repair_tables(toy)) == 1 and check_tables(toy) == []
    assert read_ledger(toy)[-1].after == {"version": None, "content": None}
    for number in range(4):
        replace_months(toy, FLIGHTS, rows_of(JANUARY, number))
    line = write_line(toy, 1)
    shutil.rmtree(toy.data / FLIGHTS)
    for number in range(4):
        replace_months(toy, FLIGHTS, rows_of(JANUARY, number))
    assert line.before["version"] == newest_reference(toy, FLIGHTS), "the number fits, and the content doesn't"
    assert len(repair_tables(toy)) == 1 and table_version(toy, FLIGHTS) == 4 and check_tables(toy) == []


def test_what_was_restored_past_the_ledger_or_is_missing_in_it_is_seen(toy: Settings) -> None:
    DeltaTable(str(toy.data / FLIGHTS)).restore(1)
    assert check_tables(toy) == [f"{FLIGHTS}@5 was made by a restore that isn't in the ledger"]
    repair_tables(toy)
    restore_version(toy, f"{FLIGHTS}@4", "back", by="ann")
    prune_versions(toy, [FLIGHTS], 0.0, by="ann")
    lines = toy.ledger.read_bytes().splitlines(keepends=True)
    toy.ledger.write_bytes(b"".join(lines[:1]))
    assert check_tables(toy) == [
        f"{FLIGHTS}@6 was made by a restore that isn't in the ledger",
        f"{FLIGHTS}@0-5 was pruned, and the ledger doesn't say so",
    ]
    assert len(repair_tables(toy, "eve")) == 2 and check_tables(toy) == []


def test_a_prune_that_was_cut_short_is_proved_anew(toy: Settings) -> None:
    copy = settings_in(shutil.copytree(toy.home, toy.home.parent / "copy"))
    prune_versions(copy, [FLIGHTS], 0.0, by="ann")
    line = read_ledger(copy)[-1]
    append_entry(toy, line)
    assert check_tables(toy) == [f"the ledger says that {FLIGHTS}@0-3 was pruned, and that didn't happen"]
    tag_version(toy, f"{FLIGHTS}@1", "golden")
    prune_versions(toy, [FLIGHTS], 0.0, by="bob")
    assert len(read_table(toy, f"{FLIGHTS}@1")) == 3
    assert told(toy) == [("prune", FLIGHTS, "ann"), ("adopt", FLIGHTS, "unknown"), ("prune", FLIGHTS, "bob")]
    assert read_ledger(toy)[-1].after == {"pruned": "0, 2-3"} and check_tables(toy) == []


def test_a_damaged_ledger_stops_whoever_wants_to_change_a_table(toy: Settings) -> None:
    restore_version(toy, f"{FLIGHTS}@1", "back", by="ann")
    toy.ledger.write_bytes(toy.ledger.read_bytes().replace(b"back", b"hack"))
    for call in (lambda: restore_version(toy, f"{FLIGHTS}@4", "x"), lambda: prune_versions(toy, [FLIGHTS], 0.0)):
        with pytest.raises(CourseError, match="it was edited"):
            call()
    assert table_version(toy, FLIGHTS) == 5 and read_notes(toy, FLIGHTS).pruned == ()


@pytest.mark.parametrize("numbers", [(), (0,), (0, 1), (3, 5, 6, 7, 9), tuple(range(0, 2000, 2)), (7, 8, 100)])
def test_numbers_are_written_shortly_and_read_again(numbers: tuple[int, ...]) -> None:
    assert read_ranges(number_ranges(numbers)) == numbers


# ---------------------------------------------------------------- two at once, and foreign hands


def test_two_overwrites_of_different_months_at_once_are_both_kept(toy: Settings) -> None:
    wanted = {JANUARY: rows_of(JANUARY, *range(50)), FEBRUARY: rows_of(FEBRUARY, *range(60))}
    for attempt in range(5):
        with ThreadPoolExecutor(2) as pool:
            frames = [frame.assign(delay=frame["delay"] + attempt, gate="B2") for frame in wanted.values()]
            list(pool.map(lambda frame: replace_months(toy, FLIGHTS, frame, derived=True), frames))
        found = read_table(toy, newest_reference(toy, FLIGHTS))
        assert found.groupby("period").size().to_dict() == {JANUARY: 50, FEBRUARY: 60, MARCH: 3}
        assert found.groupby("period")["delay"].max().tolist() == [49 + attempt, 59 + attempt, 3]


def test_files_put_together_and_pruned_leave_every_kept_version_as_it_was(toy: Settings) -> None:
    tag_version(toy, f"{FLIGHTS}@2", "golden")
    wanted, newest = read_table(toy, f"{FLIGHTS}@2"), read_table(toy, f"{FLIGHTS}@4")
    write_deltalake(str(toy.data / FLIGHTS), rows_of(MARCH, 9).assign(gate="C3"), mode="append")
    DeltaTable(str(toy.data / FLIGHTS)).optimize.compact()
    assert table_history(toy, FLIGHTS)[-1].what == "files put together"
    done = prune_versions(toy, [FLIGHTS], older_than=0.0)
    assert done.files > 0
    pd.testing.assert_frame_equal(read_table(toy, f"{FLIGHTS}@2"), wanted, check_exact=True)
    assert len(read_table(toy, newest_reference(toy, FLIGHTS))) == len(newest) + 1
    restore_version(toy, f"{FLIGHTS}@golden", "the way back is still open")
    pd.testing.assert_frame_equal(read_table(toy, newest_reference(toy, FLIGHTS)), wanted, check_exact=True)


@pytest.mark.parametrize("change", ["column", "type", "missing month"])
def test_a_wrong_schema_is_named_in_the_tables_own_words(toy: Settings, change: str) -> None:
    right = rows_of(JANUARY, 1.0).assign(gate="A1")
    wrong = {
        "column": right.rename(columns={"gate": "terminal"}),
        "type": right.assign(delay=["late"]),
        "missing month": right.assign(period=None),
    }
    with pytest.raises(DataError) as error:
        replace_months(toy, FLIGHTS, wrong[change])
    told = str(error.value)
    assert {"column": "terminal", "type": "delay", "missing month": "period"}[change] in told and FLIGHTS in told
    inner = ("Arrow", "RecordBatch", "DataFusion", "physical plan", "SchemaMismatch", "Generic", "__", "site-packages")
    assert not [word for word in inner if word in told]
    assert table_version(toy, FLIGHTS) == 4, "nothing was written"


# ---------------------------------------------------------------- retention


def test_nothing_young_goes(toy: Settings) -> None:
    plan = plan_prune(toy, [FLIGHTS])
    assert all(each.keep and "younger than 7 days" in " ".join(each.reasons) for each in plan)
    assert prune_versions(toy, [FLIGHTS]).files == 0


def test_a_plan_changes_nothing_and_names_a_reason_for_each(toy: Settings) -> None:
    tag_version(toy, f"{FLIGHTS}@1", "golden")
    before = sorted((path, path.stat().st_mtime_ns) for path in (toy.data / FLIGHTS).rglob("*"))
    found = fates(toy, others=lambda: {f"{FLIGHTS}@3": ["cache entry 3f of training/train"]})
    assert found == {
        "0": "", "1": "it has the tag golden", "2": "",
        "3": "cache entry 3f of training/train", "4": "it is the newest version",
    }  # fmt: skip
    assert before == sorted((path, path.stat().st_mtime_ns) for path in (toy.data / FLIGHTS).rglob("*"))


def test_what_goes_is_gone_and_what_stays_can_be_read(toy: Settings) -> None:
    tag_version(toy, f"{FLIGHTS}@1", "golden")
    kept = {number: read_table(toy, f"{FLIGHTS}@{number}") for number in (1, 4)}
    plan = {each.reference: each.size for each in plan_prune(toy, [FLIGHTS], 0.0)}
    done = prune_versions(toy, [FLIGHTS], 0.0)
    assert done.bytes > 0 and done.bytes >= max(plan.values())
    assert [version.gone for version in table_history(toy, FLIGHTS)] == ["pruned", "", "pruned", "pruned", ""]
    for number, rows in kept.items():
        pd.testing.assert_frame_equal(read_table(toy, f"{FLIGHTS}@{number}"), rows, check_exact=True)
    for call in (lambda: restore_version(toy, f"{FLIGHTS}@3", "x"), lambda: tag_version(toy, f"{FLIGHTS}@3", "x")):
        with pytest.raises(DataError, match="was pruned"):
            call()
    assert table_version(toy, FLIGHTS) == 4, "pruning adds no version, so nothing has to run again"
    assert prune_versions(toy, [FLIGHTS], 0.0).files == 0


def test_what_a_kept_version_was_made_from_is_kept_however_far_back(toy: Settings) -> None:
    replace_months(toy, "toy/features", rows_of(JANUARY, 1), sources={"flights": f"{FLIGHTS}@2"})
    replace_months(toy, "toy/scores", rows_of(JANUARY, 1), sources={"features": "toy/features@1"})
    replace_months(toy, "toy/features", rows_of(JANUARY, 2), sources={"flights": f"{FLIGHTS}@4"})
    assert fates(toy)["2"] == "toy/features@1 was made from it; toy/features@2 was made from it"
    assert (fates(toy)["1"], fates(toy)["3"]) == ("", "")


def test_references_are_found_wherever_they_stand() -> None:
    document = {"a@1": ["flight-delay/flights@7"], "b": ("x", {"c": "toy/x_y@12, toy/z@3."}), "n": 7, "d": None}
    assert find_references(document) == {"flight-delay/flights@7", "toy/x_y@12", "toy/z@3"}


SMALL = TrainingConfig(iterations=3, leaf_samples=50)


@pytest.fixture(scope="module")
def produced(quarter: Quarter, tmp_path_factory: pytest.TempPathFactory) -> Quarter:
    """A workspace in which a model was trained, tested, registered, packaged and has scored March; it is copied."""
    own = quarter.fresh(tmp_path_factory.mktemp("produced") / "workspace")
    run = train_run(own.settings, flight_delay, own.features, own.rows, JANUARY, FEBRUARY, SMALL)
    evaluate_run(own.settings, flight_delay, run, MARCH, MARCH)
    promote(own.settings, flight_delay, register(own.settings, flight_delay, run), "the first one")
    package(own.settings, flight_delay, "champion")
    score_month(own.settings, flight_delay, "champion", own.features, MARCH)
    return own


@pytest.fixture
def product(produced: Quarter, tmp_path: Path) -> Quarter:
    return replace(produced, settings=settings_in(shutil.copytree(produced.settings.home, tmp_path / "product")))


def overwrite_everything(own: Quarter) -> None:
    """Somebody overwrites the features and the flights of January."""
    for name in ("flight-delay/features", "flight-delay/flights"):
        january = read_table(own.settings, newest_reference(own.settings, name), [JANUARY])
        replace_months(own.settings, name, january.iloc[: len(january) // 2])


def test_the_data_of_a_registered_model_stay(product: Quarter) -> None:
    overwrite_everything(product)
    found = version_references(product.settings)
    for reference in (product.features, product.rows):
        assert "model flight-delay@1 was trained on it" in found[reference]
        assert "model flight-delay@1 was tested on it" in found[reference]
        assert "bundle flight-delay@1 names it" in found[reference]
    assert "predictions in flight-delay/predictions were computed from it" in found[product.features]
    wanted = read_table(product.settings, product.features)
    prune_versions(product.settings, older_than=0.0)
    pd.testing.assert_frame_equal(read_table(product.settings, product.features), wanted, check_exact=True)
    for version in table_history(product.settings, "flight-delay/features"):
        assert (version.gone == "") == (version.reference in (product.features, f"{product.features[:-1]}2"))


def test_a_damaged_bundle_or_registry_stops_everything(product: Quarter) -> None:
    overwrite_everything(product)
    files = sorted(product.settings.data.rglob("*.parquet"))
    manifest = product.settings.serving / "bundles/flight-delay@1/bundle.json"
    content = manifest.read_bytes()
    manifest.write_bytes(content[:50])
    with pytest.raises(CourseError, match="is not a manifest"):
        prune_versions(product.settings, older_than=0.0)
    manifest.write_bytes(content)
    (product.settings.home / "mlflow.db").write_text("not a database")
    with pytest.raises(CourseError, match="can't open the tracking store"):
        prune_versions(product.settings, older_than=0.0)
    assert sorted(product.settings.data.rglob("*.parquet")) == files


# ---------------------------------------------------------------- go back


def command(settings: Settings, *words: str, status: int = 0) -> Any:
    """A command of `mlops-course` in a process of its own; what it printed as JSON."""
    program = [sys.executable, "-c", "from mlops_course.cli import main; main()", *words]
    done = subprocess.run([*program, "--home", str(settings.home), "--json"], capture_output=True, text=True)
    assert done.returncode == status, (words, done.stdout, done.stderr)
    return json.loads(done.stdout)


def serve_next(own: Quarter, reason: str) -> str:
    """Train on the newest data, promote, package and publish, as somebody does who suspects nothing."""
    run = train_run(own.settings, flight_delay, own.features, own.rows, JANUARY, FEBRUARY, SMALL)
    model = register(own.settings, flight_delay, run)
    promote(own.settings, flight_delay, model, reason, by="ann")
    package(own.settings, flight_delay, model)
    publish(own.settings, model, reason, by="ann")
    return model


def overwrite_february(own: Quarter) -> Quarter:
    """A supplier has turned the sign of the delays: February says the opposite now, and its features follow."""
    february = read_table(own.settings, own.rows, [FEBRUARY])
    flights, _ = replace_months(own.settings, "flight-delay/flights", february.assign(arr_delay=-february["arr_delay"]))
    tables = {**own.tables, "flights": flights}
    return replace(own, tables=tables, features=build_features(own.settings, flight_delay, tables, JANUARY, MARCH))


@pytest.mark.slow
def test_from_bad_data_and_a_bad_model_back_to_what_was_working(product: Quarter) -> None:
    settings, data = product.settings, [product.rows, product.features]
    publish(settings, "flight-delay@1", "the first one", by="ann")
    materialise(settings, flight_delay, product.features, [MARCH])
    working = figures(product, "flight-delay@1")
    with serving(settings.home) as service:
        record = service.client.get("/examples").json()[0]["record"]
        right = ask(service, record)
        bad = overwrite_february(product)
        assert serve_next(bad, "newer data") == "flight-delay@2"
        until(lambda: ask(service, record)["model"] == "flight-delay@2")
        assert ask(service, record)["score"] != right["score"]
        assert figures(bad, "flight-delay@2") != working, "that is why somebody looks"

        graph = lineage_graph(settings, flight_delay)
        story = lineage_of(*find_thing(settings, flight_delay, graph, "champion"), forth=False)
        assert {f"data {bad.rows}", f"data {bad.features}"} <= {*story.things}, "it was made from what was written last"
        found = diff_versions(settings, product.rows, bad.rows, table_key(flight_delay, "flight-delay/flights"))
        assert found.months == (FEBRUARY,) and [*found.cells] == ["arr_delay"]

        because = ("--reason", "February has the wrong sign")
        restored = command(settings, "data", "restore", *data, *because, "--by", "eve")
        assert [each["wanted"] for each in restored] == data and all(each["changed"] for each in restored)
        command(settings, "models", "rollback", "flight-delay@2", *because, "--by", "eve")
        command(settings, "publish", "flight-delay@1", *because)
        until(lambda: ask(service, record)["model"] == "flight-delay@1")
        assert ask(service, record) == right

    again = replace(product, features=restored[1]["now"], tables={**product.tables, "flights": restored[0]["now"]})
    assert figures(again, "champion") == working, "to the last digit"
    told = [(entry.event, entry.subject) for entry in read_ledger(settings) if entry.reason == because[1]]
    assert told == [
        *(("restore", each) for each in data),
        ("rollback", "flight-delay@1"),
        ("publish", "flight-delay@1"),
    ]
    assert verify_ledger(settings) == check_live(settings) == check_registry(settings) == check_tables(settings) == []
    graph = lineage_graph(settings, flight_delay)
    origin = lineage_of(*find_thing(settings, flight_delay, graph, restored[0]["now"]), forth=False)
    assert f"data {product.rows}" in origin.things and f"data {bad.rows}" not in origin.things


def test_a_model_comes_back_with_the_tables_that_it_was_trained_on(product: Quarter) -> None:
    settings, because = product.settings, ("--reason", "February has the wrong sign", "--by", "eve")
    overwrite_february(product)
    for changed in (True, False):
        told = command(settings, "models", "restore", "flight-delay@1", *because)
        assert told["champion"] == "flight-delay@1"
        assert [(each["wanted"], each["changed"]) for each in told["tables"]] == [
            (product.features, changed), (product.rows, changed),
        ]  # fmt: skip
    assert read_table(settings, told["tables"][1]["now"]).equals(read_table(settings, product.rows))
    assert verify_ledger(settings) == check_registry(settings) == check_tables(settings) == []


def figures(own: Quarter, model: str) -> dict[str, float]:
    """What a model is worth on the data of a workspace: trained on them anew, it is the same model, and so are they."""
    run = train_run(own.settings, flight_delay, own.features, own.rows, JANUARY, FEBRUARY, SMALL)
    assert register(own.settings, flight_delay, run) == str(named(own.settings, model))
    return evaluate_run(own.settings, flight_delay, run, MARCH, MARCH).metrics


def named(settings: Settings, model: str) -> str:
    """The version that is meant, such as the champion."""
    return str(champion_reference(settings, flight_delay)) if model == "champion" else model


def ask(service: Running, record: dict[str, Any]) -> dict[str, Any]:
    """What the service says about a flight; the time and the number of the request don't matter."""
    answer = service.ask(record=record).json()
    return {name: answer[name] for name in ("model", "score", "warned") if name in answer} or answer


# ---------------------------------------------------------------- killed

KILLED = """
import shutil, signal, sys
from itertools import count
from pathlib import Path

from kill_helpers import begin_child, end_of, kill_after_change
from mlops_course.environment import Settings
from mlops_course.registry.restoring import restore_version
from mlops_course.registry.retention import prune_versions
import deltalake

what, template, homes = sys.argv[1], sys.argv[2], Path(sys.argv[3])

def act(home):
    settings = Settings(home=home)
    if what == "restore":
        restore_version(settings, "toy/flights@1", "killed", by="ann")
    else:
        prune_versions(settings, ["toy/flights"], 0.0, by="ann")

def act_until(home, milliseconds):
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # its default ends the process at once, also inside Delta Lake
    signal.setitimer(signal.ITIMER_REAL, milliseconds / 1000)
    act(home)

def copy(name):
    return Path(shutil.copytree(template, homes / name))

for step in count(1):
    home = copy(f"step-{step:03}")
    if not kill_after_change(step, home, lambda: act(home)):
        break
moments = (5, 20, 40, 80, 160)
killed = sum(end_of(begin_child(lambda: act_until(copy(f"time-{moment:03}"), moment))) < 0 for moment in moments)
print(step - 1, killed)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="fork is for Linux")
@pytest.mark.parametrize("what", ["restore", "prune"])
def test_whoever_is_killed_leaves_the_state_before_or_after(toy: Settings, tmp_path: Path, what: str) -> None:
    tag_version(toy, f"{FLIGHTS}@1", "golden")
    before = {number: read_table(toy, f"{FLIGHTS}@{number}") for number in (1, 4)}
    homes = tmp_path / "homes"
    program = [sys.executable, "-c", KILLED, what, str(toy.home), str(homes)]
    paths = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run(program, capture_output=True, text=True, timeout=300, check=True, env=paths)
    steps, killed = map(int, done.stdout.split())
    assert steps >= {"restore": 6, "prune": 10}[what] and killed >= 1, done.stdout
    unfinished = 0
    for home in sorted(homes.iterdir()):
        copy = shutil.copytree(home, tmp_path / "copies" / home.name)
        if judge(settings_in(home), what, before, repair=False):
            unfinished += 1
            assert judge(settings_in(copy), what, before, repair=True)
    assert 1 <= unfinished < steps, "some were killed between the ledger and the table"


def judge(settings: Settings, what: str, before: dict[int, pd.DataFrame], repair: bool) -> bool:
    """After a kill: before or after, never between; done again, it is complete. Whether something was unfinished."""
    newest = table_version(settings, FLIGHTS)
    assert newest in ((4, 5) if what == "restore" else (4,))
    found = read_table(settings, f"{FLIGHTS}@{newest}")
    pd.testing.assert_frame_equal(found, before[4 if newest == 4 else 1], check_exact=True)
    assert {version.gone for version in table_history(settings, FLIGHTS)} <= {"", "pruned"}
    kept, wrong = repair_ledger(settings), check_tables(settings)
    if repair:
        assert bool(repair_tables(settings, by="eve")) == bool(wrong) and check_tables(settings) == []
    if what == "restore":
        assert restore_version(settings, f"{FLIGHTS}@1", "again", by="bob").now == f"{FLIGHTS}@5"
    else:
        prune_versions(settings, [FLIGHTS], 0.0, by="bob")
        assert len([*(settings.data / FLIGHTS).rglob("*.parquet")]) == 5 and not [*settings.data.rglob("*.tmp")]
    for number, rows in before.items():
        pd.testing.assert_frame_equal(read_table(settings, f"{FLIGHTS}@{number}"), rows, check_exact=True)
    assert verify_ledger(settings) == check_tables(settings) == []
    taken_back = ["adopt", what] if repair and wrong and what == "prune" else []
    assert [entry.event for entry in read_ledger(settings)] == [what, *taken_back], "it is written down once"
    return bool(kept or wrong)


def test_a_restore_writes_no_row_again(settings: Settings) -> None:
    months = [f"2013-{month:02}" for month in range(1, 13)]
    year = pd.concat([rows_of(month, *np.zeros(20_000)) for month in months])
    replace_months(settings, FLIGHTS, year)
    replace_months(settings, FLIGHTS, year.assign(delay=1.0))
    before = {*settings.home.rglob("*.parquet")}
    restore_version(settings, f"{FLIGHTS}@1", "a year")
    assert {*settings.home.rglob("*.parquet")} == before
    assert read_table(settings, newest_reference(settings, FLIGHTS))["delay"].sum() == 0


# ---------------------------------------------------------------- lineage, and the same again


def test_a_prediction_leads_back_to_everything_and_data_lead_forward_to_it(product: Quarter) -> None:
    graph = lineage_graph(product.settings, flight_delay)
    row = read_table(product.settings, "flight-delay/predictions@1").iloc[7]
    texts = ("time_hour", "carrier", "origin")
    key = json.dumps({name: str(row[name]) if name in texts else int(row[name]) for name in KEY})
    whole, start = find_thing(product.settings, flight_delay, graph, key)
    assert whole.things[start].facts["score"] == str(row["score"])
    found = {thing.kind: thing.name for thing in lineage_of(whole, start, forth=False).things.values()}
    assert found["model"] == "flight-delay@1" and {"run", "code", "lock", "machine", "data"} <= {*found}
    forth = lineage_of(*find_thing(product.settings, flight_delay, graph, product.rows), back=False)
    assert {"model flight-delay@1", "predictions 2013-03 by flight-delay@1", "bundle flight-delay@1"} <= {*forth.things}
    names = {each["name"] for each in lineage_json(forth)["things"]}
    assert names == {line["name"] for line in lineage_rows(forth)} and "flowchart LR" in lineage_mermaid(forth)


def test_what_is_named_and_gone_is_in_the_graph_as_gone(product: Quarter) -> None:
    shutil.rmtree(product.settings.data / "flight-delay/raw_flights")
    graph = lineage_graph(product.settings, flight_delay)
    gone = [thing.name for thing in graph.things.values() if thing.facts.get("gone") == "it is not there any more"]
    assert gone == ["flight-delay/raw_flights@3"]


NAMED = {"type": "object", "required": ["namespace", "name"], "properties": {"facets": {"$ref": "#/$defs/facets"}}}
EVENT = {
    "type": "object",
    "required": ["eventTime", "producer", "schemaURL", "run", "job"],
    "properties": {
        "eventType": {"enum": ["START", "RUNNING", "COMPLETE", "ABORT", "FAIL", "OTHER"]},
        "eventTime": {"type": "string", "pattern": r"^\d{4}-\d\d-\d\dT.*(Z|[+-]\d\d:\d\d)$"},
        "producer": {"type": "string", "pattern": "^https://"},
        "run": {
            "required": ["runId"],
            "properties": {
                "runId": {"pattern": "^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$"},
                "facets": {"$ref": "#/$defs/facets"},
            },
        },
        "job": NAMED, "inputs": {"type": "array", "items": NAMED}, "outputs": {"type": "array", "items": NAMED},
    },
    "$defs": {"facets": {"additionalProperties": {"type": "object", "required": ["_producer", "_schemaURL"]}}},
}  # fmt: skip


def test_the_lineage_is_told_in_open_lineage(product: Quarter) -> None:
    """What the specification demands of a run event, in the words of JSON Schema."""
    graph = lineage_graph(product.settings, flight_delay)
    events = openlineage_events(graph, "flight-delay", "2013-04-01T00:00:00+00:00")
    for event in events:
        jsonschema.validate(json.loads(json.dumps(event)), EVENT)
    training = next(event for event in events if event["job"]["name"] == "train")
    assert training["run"]["runId"].replace("-", "") in {thing.name for thing in graph.things.values()}
    assert {each["name"] for each in training["inputs"]} == {"flight-delay/features", "flight-delay/flights"}
    assert [each["name"] for each in training["outputs"]] == ["models/flight-delay"]
    assert events == openlineage_events(graph, "flight-delay", "2013-04-01T00:00:00+00:00"), "told twice, known once"


def test_a_model_is_made_again_to_the_last_digit(product: Quarter) -> None:
    again = reproduce_model(product.settings, flight_delay, "champion")
    assert [each.what for each in again.comparisons if each.result and not each.same] == []
    results = {each.what for each in again.comparisons if each.result}
    assert {"data", "model", "log_loss", "bundle"} <= results and again.equal


def test_a_bundle_made_by_another_commit_is_the_same_bundle(product: Quarter) -> None:
    manifest, files = open_bundle(product.settings.serving / "bundles" / "flight-delay@1")
    about = [{"fingerprint": {"commit": commit}} for commit in "ab"] + [{"question": "Another one?"}]
    made = [write_manifest(msgspec.structs.replace(manifest, **each), files) for each in about]  # type: ignore[arg-type]
    one, other, third = (msgspec.json.decode(each, type=Manifest) for each in made)
    assert one.digest != other.digest
    assert bundle_digest(one) == bundle_digest(other) == bundle_digest(manifest) != bundle_digest(third)


def test_the_first_cause_is_named_when_a_model_can_not_be_made_again(product: Quarter) -> None:
    flights = product.settings.data / "flight-delay/flights/period=2013-01"
    next(flights.iterdir()).unlink()
    first = reproduce_model(product.settings, flight_delay, "flight-delay@1").first_difference
    assert first is not None and first.what == "data" and "files are gone" in first.now


# ---------------------------------------------------------------- the commands


def test_the_commands_tell_compare_and_bring_back(toy: Settings) -> None:
    run = CliRunner()

    def call(*words: str) -> tuple[int, str]:
        done = run.invoke(app, ["data", *words])
        return done.exit_code, done.output

    assert len(json.loads(call("history", FLIGHTS, "--json")[1])) == 5
    status, told = call("diff", f"{FLIGHTS}@1", f"{FLIGHTS}@2", "--key", "period", "--key", "flight", "--json")
    assert status == 1 and json.loads(told)["changed"] == 1
    assert call("diff", f"{FLIGHTS}@2", f"{FLIGHTS}@2")[0] == 0
    assert call("tag", f"{FLIGHTS}@1", "golden")[0] == 0
    assert call("restore", f"{FLIGHTS}@golden", "--reason", "a test")[0] == 0
    assert call("restore", f"{FLIGHTS}@nothing", "--reason", "a test")[0] == 1
    status, told = call("prune", "--days", "0", "--dry-run", "--json")
    assert [each["keep"] for each in json.loads(told)["versions"]] == [False, True, False, False, False, True]
    assert call("prune", "--days", "0")[0] == 0 and call("diff", f"{FLIGHTS}@2", FLIGHTS)[0] == 1


def test_lineage_and_reproduction_have_commands(product: Quarter) -> None:
    def call(*words: str) -> tuple[int, str]:
        done = CliRunner().invoke(app, [*words, "--home", str(product.settings.home)])
        return done.exit_code, done.stdout

    assert "champion" in call("lineage", "champion", "--towards", "back")[1]
    assert call("lineage", "champion", "--mermaid")[1].startswith("flowchart LR")
    assert json.loads(call("lineage", "champion", "--openlineage")[1])[0]["eventType"] == "COMPLETE"
    assert (call("lineage", "nobody")[0], call("lineage", "champion", "--towards", "up")[0]) == (1, 2)
    status, told = call("reproduce", "champion", "--json")
    assert (status, json.loads(told)["equal"]) == (0, True)
