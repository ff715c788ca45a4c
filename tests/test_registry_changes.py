"""Nobody loses a promotion: neither one of many at once, nor one that was killed; on SQLite and on PostgreSQL."""

import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path

import pytest
import registry_helpers
from conftest import free_port
from registry_helpers import (
    OPERATIONS,
    add_run,
    add_versions,
    all_aliases,
    make_database,
    make_history,
    named,
    run_crowd,
    serve_postgres,
)
from typer.testing import CliRunner

from mlops_course.commands import as_group
from mlops_course.commands.models import ledger_commands
from mlops_course.environment import Settings
from mlops_course.ledger import LedgerError, list_periods, read_ledger, verify_ledger
from mlops_course.project import flight_delay
from mlops_course.registry import (
    PromotionConflict,
    RegistryError,
    champion_at,
    champion_history,
    champion_reference,
    compare_versions,
    delete_version,
    find_version,
    open_registry,
    promote,
    register,
    register_and_promote,
    roll_back,
    versions,
)
from mlops_course.registry.changes import list_models
from mlops_course.registry.store import check_registry, repair_registry


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """A server of our own."""
    yield from serve_postgres(free_port())


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.system)])
def settings(request: pytest.FixtureRequest, tmp_path: Path, empty_store: Path) -> Settings:
    """A workspace whose registry is a file in it, or a database on a server; nothing is registered yet."""
    home = tmp_path / "workspace"
    if request.param == "sqlite":
        home.mkdir()
        shutil.copy(empty_store, home / "mlflow.db")
        return Settings(home=home)
    return Settings(home=home, tracking_uri=make_database(request.getfixturevalue("postgres"), tmp_path.name))


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """A workspace with a file of its own and five versions, of which the first three became champion."""
    settings = Settings(home=tmp_path_factory.mktemp("template") / "workspace")
    make_history(settings)
    return settings


@pytest.fixture
def local(template: Settings, tmp_path: Path) -> Settings:
    """A copy of that, for one test."""
    return Settings(home=shutil.copytree(template.home, tmp_path / "workspace"))


def test_from_registration_to_the_way_back(settings: Settings) -> None:
    add_versions(settings, 3)
    assert all_aliases(settings) == {"challenger": named(3)}
    assert promote(settings, flight_delay, named(1), "the first one", "ann", "eve", expected=None) is None
    assert promote(settings, flight_delay, "challenger", "better", "bob", expected=named(1)) == named(1)
    assert all_aliases(settings) == {"challenger": named(3), "champion": named(3), "previous": named(1)}
    with pytest.raises(PromotionConflict, match=rf"{named(3)} is champion, not {named(1)}: bob promoted it at 20"):
        promote(settings, flight_delay, named(2), "mine is better", "joe", expected=named(1))
    assert roll_back(settings, flight_delay, "complaints", by="eve") == named(1)
    assert all_aliases(settings) == {"challenger": named(3), "champion": named(1)}
    delete_version(settings, flight_delay, named(2), "tidying up")
    assert [f"{version.name}@{version.version}" for version in versions(settings, flight_delay)] == [named(1), named(3)]
    events = [(entry.event, entry.subject, entry.by, entry.approver) for entry in read_ledger(settings)[3:-1]]
    assert events == [
        ("promote", named(1), "ann", "eve"), ("promote", named(3), "bob", ""), ("rollback", named(1), "eve", ""),
    ]  # fmt: skip
    assert verify_ledger(settings) == check_registry(settings) == []
    digests = [(entry.before["model_digest"], entry.after["model_digest"]) for entry in read_ledger(settings)[3:-1]]
    assert digests == [(None, "d1"), ("d1", "d3"), ("d3", "d1")]


@pytest.mark.slow
def test_a_crowd_that_registers_and_promotes_loses_nothing(settings: Settings, thorough: bool) -> None:
    open_registry(settings, flight_delay)
    times = 25 if thorough else 5
    run_crowd(settings, "crowd", times)
    entries = read_ledger(settings)
    assert verify_ledger(settings) == check_registry(settings) == []
    registered = [entry.after["model_digest"] for entry in entries if entry.event == "register"]
    assert sorted(map(str, registered)) == sorted(f"w{each}-{number}" for each in range(8) for number in range(times))
    assert {version.tags["model_digest"] for version in versions(settings, flight_delay)} == set(registered)
    promoted = [entry for entry in entries if entry.event == "promote"]
    assert len(promoted) == len(entries) - 8 * times == 8 * times
    assert [entry.before["champion"] for entry in promoted] == [None, *(entry.subject for entry in promoted[:-1])]
    assert all_aliases(settings)["champion"] == champion_reference(settings, flight_delay) == promoted[-1].subject


@pytest.mark.slow
def test_of_a_crowd_that_promotes_each_wins_or_is_told_who_won(local: Settings, thorough: bool) -> None:
    open_registry(local, flight_delay)
    settings, earlier = local, len(read_ledger(local))
    times = 10 if thorough else 4
    found = run_crowd(settings, "race", times)
    entries = read_ledger(settings)[earlier:]
    assert verify_ledger(settings) == check_registry(settings) == []
    outcomes = [outcome for outcomes in found for outcome in outcomes]
    assert len(outcomes) == 8 * times
    won, lost = ([said for kind, said in outcomes if kind == wanted] for wanted in ("won", "lost"))
    assert sorted(won) == sorted(entry.reason for entry in entries), "who was told that they won did win"
    least = 2 * times if thorough else 0  # a small crowd may be through before it has met so often
    assert len(lost) > least, "they were in each other's way"
    assert [entry.before["champion"] for entry in entries] == [named(3), *(entry.subject for entry in entries[:-1])]
    winners = {f"{entry.by} promoted it at {entry.time} ({entry.reason})": entry.subject for entry in entries}
    for message in lost:
        who, _, change = message.partition(". ")[0].partition(": ")
        assert who.split()[0] == winners[change], "the one who is named made it champion"
    assert all_aliases(settings)["champion"] == champion_reference(settings, flight_delay) == entries[-1].subject


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="fork is for Linux")
@pytest.mark.parametrize("operation", list(OPERATIONS))
def test_whoever_is_killed_after_any_change_leaves_it_before_or_after(
    operation: str, template: Settings, tmp_path: Path, stride: int
) -> None:
    killed, unfinished = run_killing("changes", operation, template, tmp_path, stride)
    assert killed >= 12 // stride, "its line, the folders and locks around it, and MLflow's transactions"
    assert unfinished >= 4 // stride, "the line was written, and MLflow hadn't followed"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="fork is for Linux")
def test_whoever_is_killed_at_any_moment_leaves_it_before_or_after(
    template: Settings, tmp_path: Path, thorough: bool
) -> None:
    rounds = 30 if thorough else 8
    killed, _ = run_killing("moments", "promote", template, tmp_path, rounds)
    assert killed > rounds // 2, "so many moments came in time"


def run_killing(how: str, operation: str, template: Settings, folder: Path, number: int) -> tuple[int, int]:
    """How many processes were killed, of which the number says more, and how many left something to be finished."""
    command = [sys.executable, registry_helpers.__file__, how, operation, str(template.home), str(folder), str(number)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1700)
    assert done.returncode == 0, done.stderr[-3000:]
    killed, unfinished = map(int, done.stdout.split())
    return killed, unfinished


# ---------------------------------------------------------------- who wins, and the way back


def test_a_promotion_that_was_done_already_is_done(local: Settings) -> None:
    lines = len(read_ledger(local))
    assert promote(local, flight_delay, named(3), "again", expected=named(2)) == named(3)
    assert promote(local, flight_delay, "champion", "again") == named(3)
    assert len(read_ledger(local)) == lines


def test_one_who_expects_nobody_is_told_who_is_there(local: Settings) -> None:
    with pytest.raises(PromotionConflict, match=rf"{named(3)} is champion, not nobody: ann promoted it"):
        promote(local, flight_delay, named(5), "the first one", expected=None)
    assert champion_reference(local, flight_delay) == named(3)


def test_the_pipeline_does_not_replace_a_champion_that_it_has_not_seen(local: Settings) -> None:
    run = add_run(local, "new")
    found = register_and_promote(local, flight_delay, run, True, "better")
    assert found == {"model": named(6), "champion": named(6), "previous": named(3), "promoted": True}
    assert read_ledger(local)[-1].before["champion"] == named(3)


def test_the_way_back_leads_over_champions_only_and_past_deleted_ones(local: Settings) -> None:
    promote(local, flight_delay, named(5), "better")
    assert roll_back(local, flight_delay, "complaints", named(5)) == named(3)
    assert roll_back(local, flight_delay, "complaints", named(5)) == named(3), "it is out already"
    with pytest.raises(PromotionConflict, match=rf"{named(3)} is champion, not {named(4)}"):
        roll_back(local, flight_delay, "complaints", named(4))
    open_registry(local, flight_delay).delete_model_version("flight-delay", "2")  # past the ledger
    assert roll_back(local, flight_delay, "complaints again") == named(1)
    with pytest.raises(RegistryError, match="no version was champion before"):
        roll_back(local, flight_delay, "and again")
    assert [period.value for period in champion_history(local, flight_delay)][-3:] == [named(5), named(3), named(1)]


def test_a_version_that_something_needs_is_not_deleted(local: Settings) -> None:
    open_registry(local, flight_delay).set_registered_model_alias("flight-delay", "audited", "4")
    for number, word in ((3, "champion"), (2, "previous"), (5, "challenger"), (4, "audited")):
        with pytest.raises(RegistryError, match=f"{named(number)} is {word}"):
            delete_version(local, flight_delay, named(number), "tidying up")
    for reference in ("champion", "flight-delay@", "flight-delay@99", "bikes@1", ""):
        with pytest.raises(RegistryError, match="there is no version"):
            delete_version(local, flight_delay, reference, "tidying up")
    lines = len(read_ledger(local))
    for _ in range(2):
        delete_version(local, flight_delay, named(1), "tidying up")
    assert len(read_ledger(local)) == lines + 1
    with pytest.raises(RegistryError, match="there is no model"):
        find_version(local, flight_delay, named(1))
    assert register(local, flight_delay, add_run(local, "d1")) == named(6), "a number is never given twice"


# ---------------------------------------------------------------- past the ledger


def test_an_alias_that_was_moved_by_hand_is_written_down_as_that(local: Settings) -> None:
    open_registry(local, flight_delay).set_registered_model_alias("flight-delay", "champion", "4")
    assert champion_reference(local, flight_delay) == named(4)
    last = read_ledger(local)[-1]
    assert (last.event, last.by, last.before["champion"], last.after["champion"]) == (
        "adopt", "unknown", named(3), named(4),
    )  # fmt: skip
    assert [period.exact for period in champion_history(local, flight_delay)][-2:] == [False, True]
    assert roll_back(local, flight_delay, "who did that?") == named(3)


def test_a_workspace_older_than_its_ledger_goes_on(local: Settings) -> None:
    client = open_registry(local, flight_delay)
    shutil.rmtree(local.ledger.parent)
    client.delete_registered_model_tag("flight-delay", "ledger.head")
    assert champion_reference(local, flight_delay) == named(3)
    (line,) = read_ledger(local)
    assert (line.event, line.by, line.after["champion"]) == ("adopt", "unknown", named(3))
    assert "before this ledger began" in line.reason
    assert verify_ledger(local) == check_registry(local) == []
    assert promote(local, flight_delay, named(4), "better") == named(3)


@pytest.mark.parametrize("left", [0, 1, 7])
def test_lines_that_are_missing_at_the_end_are_known_to_the_registry(local: Settings, left: int) -> None:
    lines = local.ledger.read_bytes().splitlines(keepends=True)
    last = read_ledger(local)[-1].hash
    local.ledger.write_bytes(b"".join(lines[:left]))
    assert verify_ledger(local) == [], "the chain alone can't show it"
    (missing,) = check_registry(local)
    assert last[:12] in missing
    with pytest.warns(UserWarning, match="a line that isn't in the ledger"):
        assert champion_reference(local, flight_delay) == named(3), "who scores goes on"
    refused = r"isn't in the ledger.*Restore the ledger from a copy"
    with pytest.raises(LedgerError, match=refused):
        promote(local, flight_delay, named(4), "better")
    with pytest.raises(LedgerError, match=refused):
        roll_back(local, flight_delay, "complaints")
    assert local.ledger.read_bytes() == b"".join(lines[:left]), "nobody covers it up"
    local.ledger.write_bytes(b"".join(lines))
    assert check_registry(local) == [], "the copy is back"


def test_a_person_takes_over_what_the_registry_says_when_lines_are_lost(local: Settings) -> None:
    lines = local.ledger.read_bytes().splitlines(keepends=True)
    local.ledger.write_bytes(b"".join(lines[:-1]))
    (done,) = repair_registry(local, by="eve")
    last = read_ledger(local)[-1]
    assert (last.event, last.by, last.before["champion"], last.after["champion"]) == (
        "adopt", "eve", named(2), named(3),
    )  # fmt: skip
    assert done == f"line {last.number} was added, by eve: {last.reason}"
    assert repair_registry(local) == check_registry(local) == verify_ledger(local) == []
    assert promote(local, flight_delay, named(4), "better") == named(3)


def test_two_workspaces_with_a_ledger_each_do_not_change_one_registry(local: Settings, tmp_path: Path) -> None:
    other = Settings(home=tmp_path / "other", tracking_uri=local.tracking)
    with pytest.raises(LedgerError, match="another workspace uses this registry"):
        promote(other, flight_delay, named(4), "better")
    assert read_ledger(other) == []
    assert champion_reference(local, flight_delay) == named(3)


def test_a_registry_that_is_behind_is_brought_up_and_one_that_is_ahead_is_written_down(local: Settings) -> None:
    before = shutil.copytree(local.home, local.home.with_name("before"))
    promote(local, flight_delay, named(4), "better", by="ann")
    promote(local, flight_delay, named(5), "better still", by="ann")
    shutil.copy(before / "mlflow.db", local.home / "mlflow.db")
    assert check_registry(local) == [
        "the registry of flight-delay is 2 lines behind the ledger: whoever opens it next brings it up to date"
    ]
    assert repair_registry(local) == ["the registry of flight-delay was brought up to line 10: promote flight-delay@5"]
    client = open_registry(local, flight_delay)
    client.set_registered_model_alias("flight-delay", "champion", "1")
    (moved,) = check_registry(local)
    assert moved.endswith("changed past the ledger: champion is flight-delay@1, not flight-delay@5")
    assert repair_registry(local) == ["line 11 was added, by unknown: it was moved past the ledger"]
    assert check_registry(local) == verify_ledger(local) == []
    assert champion_reference(local, flight_delay) == named(1)


def test_a_model_that_was_deleted_in_mlflow_leaves_nobody_in_production(local: Settings) -> None:
    open_registry(local, flight_delay).delete_registered_model("flight-delay")
    assert champion_reference(local, flight_delay) is None
    last = read_ledger(local)[-1]
    assert (last.event, last.before["champion"], last.after["champion"]) == ("adopt", named(3), None)
    lines = len(read_ledger(local))
    assert champion_reference(local, flight_delay) is None
    assert len(read_ledger(local)) == lines, "it is told once"
    assert register(local, flight_delay, add_run(local, "new")) == named(1)


def test_an_edited_ledger_stops_those_who_change_something_and_nobody_else(local: Settings) -> None:
    local.ledger.write_bytes(local.ledger.read_bytes().replace(b"better than 1", b"better than 9"))
    with pytest.warns(UserWarning, match="can't be checked against its ledger"):
        assert champion_reference(local, flight_delay) == named(3)
    with pytest.raises(LedgerError, match="was edited"):
        promote(local, flight_delay, named(4), "better")
    with pytest.raises(LedgerError, match="was edited"):
        champion_history(local, flight_delay)


def test_a_moved_workspace_has_its_history(local: Settings, tmp_path: Path) -> None:
    when = [entry for entry in read_ledger(local) if entry.event == "promote"][1].time
    moved = Settings(home=local.home.rename(tmp_path / "moved"))
    assert roll_back(moved, flight_delay, "complaints") == named(2)
    assert champion_at(moved, flight_delay, datetime.fromisoformat(when)).value == named(2)
    assert str(tmp_path) not in moved.ledger.read_text(encoding="utf-8")


DAMAGES: dict[str, tuple[Callable[[list[bytes]], list[bytes]], str]] = {
    "edited": (lambda lines: [lines[0].replace(b"ann", b"bob"), *lines[1:]], "line 1: it was edited"),
    "removed": (lambda lines: [*lines[:3], *lines[4:]], "line 4: number 5 follows number 3"),
    "reordered": (lambda lines: [lines[1], lines[0], *lines[2:]], "line 1: number 2 follows number 0"),
    "torn": (lambda lines: [*lines[:-1], lines[-1][:-9]], "line 8: it was cut off"),
    "the last one removed": (lambda lines: lines[:-1], "has followed a line that isn't in the ledger"),
    "all removed": (lambda lines: [], "has followed a line that isn't in the ledger"),
}


@pytest.mark.parametrize("damage", list(DAMAGES))
def test_the_command_finds_whatever_happened_to_the_ledger(local: Settings, damage: str) -> None:
    change, told = DAMAGES[damage]
    verify = ["verify", "--home", str(local.home)]
    assert CliRunner().invoke(as_group(ledger_commands), verify).exit_code == 0
    local.ledger.write_bytes(b"".join(change(local.ledger.read_bytes().splitlines(keepends=True))))
    done = CliRunner().invoke(as_group(ledger_commands), verify)
    assert (done.exit_code, told in done.output) == (1, True), done.output


# ---------------------------------------------------------------- what others ran into


def test_a_champion_that_was_deleted_in_mlflow_does_not_dangle(local: Settings) -> None:
    open_registry(local, flight_delay).delete_model_version("flight-delay", "3")
    assert champion_reference(local, flight_delay) is None
    assert "champion" not in all_aliases(local)
    assert [entry.event for entry in read_ledger(local)][-2:] == ["promote", "adopt"]
    with pytest.raises(RegistryError, match=r"there is no model 'champion'.*flight-delay@4"):
        find_version(local, flight_delay, "champion")
    assert promote(local, flight_delay, named(4), "better", expected=None) is None


def test_an_alias_that_dangles_in_the_database_is_cleared(local: Settings) -> None:
    with sqlite3.connect(local.home / "mlflow.db") as database:
        database.execute("UPDATE registered_model_aliases SET version = 77 WHERE alias = 'champion'")
    assert champion_reference(local, flight_delay) is None
    assert "champion" not in all_aliases(local)
    assert read_ledger(local)[-1].after == {"champion": None}


def test_a_list_of_versions_has_the_aliases_that_a_search_leaves_out(local: Settings) -> None:
    assert {tuple(version.aliases) for version in versions(local, flight_delay)} == {()}
    found = {line["version"]: line["aliases"] for line in list_models(local, flight_delay)}
    assert found == {named(1): "", named(2): "previous", named(3): "champion", named(4): "", named(5): "challenger"}


@pytest.mark.slow
def test_an_experiment_that_eight_make_at_once_is_one(settings: Settings) -> None:
    found = run_crowd(settings, "search", 1)
    assert len(found) == 8
    assert len({str(experiments) for experiments in found}) == 1, found
    assert len(found[0]) == 1


# ---------------------------------------------------------------- side by side


def test_two_versions_are_compared_in_what_their_runs_wrote_down(local: Settings) -> None:
    run = find_version(local, flight_delay, named(2)).run_id
    client = open_registry(local, flight_delay)
    client.log_metric(run, "test.log_loss", 0.43)
    client.log_param(run, "iterations", "40")
    found = compare_versions(local, flight_delay, "champion", named(2))
    assert found["version"] == (named(3), named(2))
    assert found["model_digest"] == ("d3", "d2")
    assert (found["test.log_loss"], found["iterations"]) == ((None, 0.43), (None, "40"))
    assert "first" not in found
    assert compare_versions(local, flight_delay, named(2), "previous") == {}
    for reference in ("nobody", "3", "@3", "a/b@3"):
        with pytest.raises(RegistryError, match=f"there is no model '{reference}'"):
            compare_versions(local, flight_delay, reference, named(2))


def test_the_history_of_another_use_case_is_another_one(local: Settings) -> None:
    assert [period.value for period in list_periods(read_ledger(local), "bikes")] == [None]


def test_a_registry_that_begins_anew_loses_nothing_to_old_deletions(local: Settings) -> None:
    delete_version(local, flight_delay, named(1), "tidying up")
    client = open_registry(local, flight_delay)
    client.delete_registered_model("flight-delay")
    client.create_registered_model("flight-delay")
    client.create_model_version("flight-delay", "s3://models/new")
    client.set_registered_model_alias("flight-delay", "champion", "1")
    assert champion_reference(local, flight_delay) == named(1)
    assert [f"{version.name}@{version.version}" for version in versions(local, flight_delay)] == [named(1)]
    assert read_ledger(local)[-1].after["champion"] == named(1)
