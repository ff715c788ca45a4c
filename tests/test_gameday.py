"""A game day: each fault can be broken, seen and put right; doing nothing, or everything at once, is worth little."""

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import Quarter
from typer.testing import CliRunner

from mlops_course.capstone.debrief import debrief_markdown, write_debrief
from mlops_course.capstone.faults import AREAS, Fault, FaultError, Scene, break_scene, still_wrong
from mlops_course.capstone.faults_security import ledger_copy
from mlops_course.capstone.gameday import (
    GameError,
    begin_game,
    check_game,
    choose_faults,
    diagnose,
    end_game,
    fault_catalogue,
    game_settings,
    list_goods,
    lost_goods,
    read_game,
    say_area,
    score_game,
    solve_game,
)
from mlops_course.cli import app
from mlops_course.environment import Settings
from mlops_course.experiments import TrainingConfig, train_run
from mlops_course.pipelines.cache.keeping import keep_result
from mlops_course.pipelines.cache.keys import stage_key
from mlops_course.pipelines.cache.store import CacheStore
from mlops_course.project import flight_delay
from mlops_course.registry import package, promote, register
from mlops_course.security.keys import create_key
from mlops_course.serving import publish

SETS = (  # each fault is in one of them, and those of a set go together
    ("delivered-twice", "spoilt-copy", "unjudged-champion", "changed-graph", "stranger-key", "edited-ledger"),
    ("half-a-month", "lost-copy", "moved-alias", "foreign-file", "printed-key", "cut-ledger"),
    ("month-lost", "torn-pointer", "open-keys"),
    ("other-unit", "other-model-live"),
    ("frozen-sensor", "forgotten-canary"),
    ("torn-release",),
    ("stranger-signature",),
    ("swapped-sbom",),
)


@pytest.fixture(scope="module")
def production(quarter: Quarter, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """Two real models of real flights, the first of them champion and live, and a cached run; no test changes it."""
    folder = tmp_path_factory.mktemp("production")
    own = quarter.fresh(folder / "workspace")
    for raw in (own.settings.data / "flight-delay").glob("raw_*"):
        shutil.rmtree(raw)  # what was delivered isn't needed any more, and reading it takes time
    settings = own.settings.model_copy(update={"trust": folder / "trust"})
    for iterations in (10, 15):
        config = TrainingConfig(iterations=iterations, leaf_samples=50)
        run = train_run(settings, flight_delay, own.features, own.rows, "2013-01", "2013-02", config)
        package(settings, flight_delay, register(settings, flight_delay, run, by="ann"))
    promote(settings, flight_delay, "flight-delay@1", "the first one", by="ann")
    publish(settings, "flight-delay@1", "the first one", by="ann")
    create_key(settings, "another desk", "predict", by="ann")
    store, executed = CacheStore(settings), settings.runs / "train.ipynb"
    executed.write_text(json.dumps({"cells": []}), encoding="utf-8")
    keep_result(store, stage_key(store, executed, seed=1), "training", "train", {}, {}, executed, 2.0)
    return settings


@pytest.fixture
def copy(production: Settings, tmp_path: Path) -> Settings:
    """A production of the test's own."""
    shutil.copytree(production.home, tmp_path / "production")
    return production.model_copy(update={"home": tmp_path / "production", "trust": tmp_path / "trust"})


def begin(settings: Settings, *names: str) -> None:
    begin_game(settings, flight_delay, 3, len(names), names, afresh=True)


def test_there_are_faults_of_all_parts_of_the_system_and_each_says_what_shows_and_mends_it() -> None:
    known = fault_catalogue()
    assert len(known) >= 15
    assert {fault.area for fault in known.values()} == set(AREAS)
    assert sorted(name for names in SETS for name in names) == sorted(known)
    for fault in known.values():
        assert all((fault.cause, fault.report, fault.where, fault.shown_by, fault.fixed_by, fault.touches))


@pytest.mark.slow
@pytest.mark.parametrize("names", SETS, ids=lambda names: names[0])
def test_what_is_broken_together_can_be_seen_and_is_put_right_by_the_solver(
    copy: Settings, names: tuple[str, ...]
) -> None:
    before = list_goods(Scene(copy, flight_delay))
    begin(copy, *names)
    game = read_game(copy)
    assert all(each.sign for each in game.faults)
    assert all(check_game(copy, flight_delay, game.began + 60)), "nothing was repaired yet"
    assert score_game(read_game(copy))["total"] == 0
    assert solve_game(copy, flight_delay, game.began + 120) == ["" for _ in names]
    ended = end_game(copy, flight_delay, game.began + 130)
    assert ended.lost == {}
    assert score_game(ended)["total"] == 100
    assert lost_goods(before, list_goods(Scene(copy, flight_delay))) == {}, "production was touched"
    text = debrief_markdown(ended)
    assert all(name in text for name in names)
    assert "<script" not in write_debrief(copy, ended).read_text(encoding="utf-8")


def test_a_seed_breaks_the_same_and_another_seed_something_else(copy: Settings) -> None:
    def broken(seed: int) -> list[str]:
        return [f.name for f in choose_faults(Scene(copy, flight_delay), 3, random.Random(seed))]

    assert broken(5) == broken(5)
    assert len({tuple(broken(seed)) for seed in range(8)}) > 4
    for seed in range(8):
        touched = [fault_catalogue()[name].touches for name in broken(seed)]
        assert len(set(touched)) == 3


def test_doing_nothing_is_worth_nothing_and_a_reset_little(copy: Settings) -> None:
    names = ("month-lost", "torn-pointer", "stranger-key")

    def score(act: object) -> float:
        begin(copy, *names)
        home = game_settings(copy).home
        if act == "reset":
            shutil.rmtree(home)
        if act == "yesterday":
            shutil.rmtree(home)
            shutil.copytree(copy.home, home, ignore=shutil.ignore_patterns("gameday"))
        return float(score_game(end_game(copy, flight_delay, read_game(copy).began + 60))["total"])

    assert score("nothing") == 0
    assert score("reset") == 0
    assert score("yesterday") < 20


def test_naming_the_whole_catalogue_is_worth_less_than_looking(copy: Settings) -> None:
    begin(copy, "month-lost", "torn-pointer", "stranger-key")
    soon = read_game(copy).began + 60
    for name in fault_catalogue():
        diagnose(copy, name, now=soon)
    assert score_game(end_game(copy, flight_delay, soon))["total"] < 50 - 5 * 5
    begin(copy, "month-lost", "torn-pointer", "stranger-key")
    soon = read_game(copy).began + 60
    for each in read_game(copy).faults:
        diagnose(copy, each.name, each.facts["where"], soon)
    assert score_game(end_game(copy, flight_delay, soon))["total"] == 60


def test_what_a_repair_costs_is_counted(copy: Settings) -> None:
    begin(copy, "stranger-key")
    game, place = read_game(copy), game_settings(copy)
    solve_game(copy, flight_delay, game.began + 60)
    shutil.rmtree(place.data / "flight-delay" / "features")
    (place.home / "keys.json").unlink()
    ended = end_game(copy, flight_delay, game.began + 70)
    assert {"tables", "keys"} <= set(ended.lost)
    assert 60 < score_game(ended)["total"] < 100


def test_late_is_worth_less_and_so_is_a_hint_or_a_place_not_named(copy: Settings) -> None:
    def score(minutes: float, where: bool = True, hints: int = 0) -> float:
        begin(copy, "month-lost")
        game = read_game(copy)
        moment = game.began + 60 * minutes
        if hints:
            CliRunner().invoke(app, ["gameday", "hint", "--home", str(copy.home)])
        assert say_area(copy, "data", moment)
        diagnose(copy, "month-lost", game.faults[0].facts["where"] if where else "", moment)
        return float(score_game(end_game(copy, flight_delay, moment))["total"])

    assert score(9) == 60 > score(30) > score(59) > 35
    assert score(9, where=False) == 50
    assert score(9, hints=1) == 50


def test_what_lies_outside_the_workspace_is_never_broken(copy: Settings) -> None:
    for name, value in (("tracking_uri", "http://localhost:5000"), ("storage", "s3://bucket"), ("keys_file", "k.json")):
        with pytest.raises(GameError, match=f"MLOPS_COURSE_{name.upper()}"):
            begin_game(copy.model_copy(update={name: value}), flight_delay, 1)
    assert not (copy.home / "gameday").exists()


def test_a_game_that_cannot_begin_leaves_the_one_before_as_it_is(copy: Settings) -> None:
    begin(copy, "stranger-key")
    before = read_game(copy)
    for call in (
        lambda: begin_game(copy, flight_delay, 1),
        lambda: begin_game(copy, flight_delay, 1, count=99, afresh=True),
        lambda: begin_game(copy, flight_delay, 1, names=("sunspots",), afresh=True),
        lambda: begin_game(game_settings(copy), flight_delay, 1),
    ):
        with pytest.raises(GameError):
            call()
    assert read_game(copy) == before == read_game(game_settings(copy)), "and it is found from both sides"


def test_a_fault_that_nothing_shows_is_not_a_fair_one(copy: Settings) -> None:
    fault: Fault = fault_catalogue()["stranger-key"]
    scene = Scene(copy, flight_delay)
    facts, sign = break_scene(fault, scene, random.Random(1))
    assert facts["where"] in sign
    assert still_wrong(fault, scene, facts)
    with pytest.raises(FaultError, match="can't be seen"):
        break_scene(replace(fault, sign=lambda scene, facts: ""), scene, random.Random(1))


def test_the_ledger_is_put_back_from_the_copy_that_the_player_is_told_of(copy: Settings) -> None:
    begin(copy, "cut-ledger")
    place = game_settings(copy)
    assert ledger_copy(Scene(place, flight_delay)) == place.home.parent / "backup" / "ledger.jsonl"
    shutil.copy(place.home.parent / "backup" / "ledger.jsonl", place.ledger)
    assert check_game(copy, flight_delay) == [""]


def test_the_whole_day_at_the_command_line(copy: Settings) -> None:
    def say(*arguments: str, status: int = 0) -> str:
        done = CliRunner().invoke(app, ["gameday", *arguments, "--home", str(copy.home)])
        assert done.exit_code == status, done.output
        return done.output

    begun = json.loads(say("start", "--seed", "4", "--only", "stranger-key", "--json"))
    assert begun["faults"] == 1
    key = read_game(copy).faults[0].facts["where"]
    say("found", "data", status=3)
    say("found", "security")
    say("diagnose", "torn-pointer", status=3)
    assert "and there" in say("diagnose", "stranger-key", "--where", key)
    say("check", status=3)
    revoked = CliRunner().invoke(app, ["keys", "revoke", key, "--home", begun["home"]])
    assert revoked.exit_code == 0, revoked.output
    assert "1 of 1" in say("check")
    assert json.loads(say("end", "--json"))["total"] == 90
    assert "over" in say("check", status=1)
