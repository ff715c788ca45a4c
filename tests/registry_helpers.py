"""Versions without models behind them, a PostgreSQL server, and what happens to a registry in a crowd or at a kill."""

import json
import os
import pwd
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from kill_helpers import begin_child, end_of, kill_after_change, run_child

from mlops_course.environment import Settings
from mlops_course.experiments import connect, quiet_mlflow
from mlops_course.ledger import read_ledger, repair_ledger, verify_ledger
from mlops_course.project import flight_delay
from mlops_course.registry import (
    PromotionConflict,
    champion_reference,
    delete_version,
    find_version,
    open_registry,
    promote,
    register,
    roll_back,
    versions,
)
from mlops_course.registry.store import aliases_of, check_registry, repair_registry
from mlops_course.serving import live_bundle, publish
from mlops_course.serving.publishing import check_live, repair_live


def named(number: int) -> str:
    return f"flight-delay@{number}"


def add_run(settings: Settings, digest: str) -> str:
    """A run that says about itself what a registration asks for; its model is nowhere."""
    experiment = connect(settings, flight_delay)
    about = {"model_digest": digest, "first": "2013-01", "last": "2013-02", "model_uri": f"s3://models/{digest}"}
    return str(quiet_mlflow().MlflowClient().create_run(experiment, tags=about).info.run_id)


def add_versions(settings: Settings, number: int) -> None:
    for each in range(1, number + 1):
        assert register(settings, flight_delay, add_run(settings, f"d{each}"), by="ann") == named(each)


def all_aliases(settings: Settings) -> dict[str, str]:
    return aliases_of(open_registry(settings, flight_delay).get_registered_model("flight-delay"))


# ---------------------------------------------------------------- PostgreSQL


def postgres_program(name: str) -> str | None:
    """A program of the server; Debian keeps them in a folder of its own."""
    places = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    return shutil.which(name) or (str(places[-1]) if places else None)


def serve_postgres(port: int) -> Iterator[str]:
    """A server of our own, as another user where this one is root; yields its address, without a database."""
    server = postgres_program("postgres")
    if server is None:
        pytest.skip("PostgreSQL is not installed (apt-get install postgresql)")
    home = Path(tempfile.mkdtemp(prefix="postgres"))
    owner: dict[str, Any] = {}
    if os.getuid() == 0:
        nobody = pwd.getpwnam("nobody")
        os.chown(home, nobody.pw_uid, nobody.pw_gid)
        owner = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
    data, quiet = home / "data", {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    make = [postgres_program("initdb"), "-D", data, "-U", "mlflow", "-A", "trust", "--no-sync"]
    subprocess.run([str(part) for part in make], check=True, cwd=home, **quiet, **owner)
    options = ["-p", str(port), "-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories=", "-c", "fsync=off"]
    running = subprocess.Popen([server, "-D", str(data), *options], cwd=home, **quiet, **owner)
    try:
        yield f"127.0.0.1:{port}"
    finally:
        running.send_signal(signal.SIGINT)
        running.wait(30)
        shutil.rmtree(home)


def make_database(address: str, name: str) -> str:
    """A new database on a server that may only just have started; its address for MLflow."""
    import psycopg2

    for attempt in count():
        try:
            connection = psycopg2.connect(f"postgresql://mlflow@{address}/postgres")
            connection.autocommit = True
            connection.cursor().execute(f'CREATE DATABASE "{name}"')
            connection.close()
            return f"postgresql+psycopg2://mlflow@{address}/{name}"
        except psycopg2.OperationalError:
            if attempt > 200:
                raise
            time.sleep(0.1)
    raise AssertionError("not reached")


# ---------------------------------------------------------------- one of a crowd


def join_crowd(settings: Settings, who: str, times: int) -> None:
    """Register and promote, again and again."""
    for each in range(times):
        reference = register(settings, flight_delay, add_run(settings, f"{who}-{each}"), by=who)
        promote(settings, flight_delay, reference, f"number {each} of {who}", by=who)


def join_race(settings: Settings, who: str, times: int) -> None:
    """Replace the champion that was seen, again and again; print what came of it: won, lost, or had it already."""
    chance = random.Random(who)
    for each in range(times):
        seen, reason = champion_reference(settings, flight_delay), f"number {each} of {who}"
        chosen = chance.choice([named(number) for number in range(1, 6) if named(number) != seen])
        try:
            before = promote(settings, flight_delay, chosen, reason, by=who, expected=seen)
            print(json.dumps(("had" if before == chosen else "won", reason)))
        except PromotionConflict as error:
            print(json.dumps(("lost", str(error))))


def join_search(settings: Settings, who: str, times: int) -> None:
    """Look for the experiment, which isn't there yet, and print what it is."""
    print(json.dumps(connect(settings, flight_delay)))


CROWDS = {"crowd": join_crowd, "race": join_race, "search": join_search}


def run_crowd(settings: Settings, task: str, times: int) -> list[list[Any]]:
    """Eight processes that do the same at once; what each of them printed."""
    variables = {**os.environ, "MLOPS_COURSE_HOME": str(settings.home), "MLOPS_COURSE_TRACKING_URI": settings.tracking}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, task, str(times), folder]
        done = subprocess.run(command, capture_output=True, text=True, env=variables, timeout=1500)
        assert done.returncode == 0, done.stderr[-3000:]
        files = [Path(folder) / f"w{each}" for each in range(8)]
        return [[json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] for file in files]


def fork_crowd(task: str, times: int, folder: Path) -> bool:
    """Be eight processes, with all imported and nothing opened; whether each came to its end."""
    import mlflow.store.model_registry.sqlalchemy_store
    import mlflow.store.tracking.sqlalchemy_store  # noqa: F401

    quiet_mlflow()
    waiting, starter = os.pipe()

    def take_part(who: str) -> None:
        os.close(starter)
        os.read(waiting, 1)  # until the pipe is closed: all are there
        with (folder / who).open("w", encoding="utf-8") as file, redirect_stdout(file):
            CROWDS[task](Settings(), who, times)

    crowd = [begin_child(partial(take_part, f"w{each}")) for each in range(8)]
    os.close(starter)
    return [end_of(child) for child in crowd] == [0] * 8


# ---------------------------------------------------------------- killed


def make_history(settings: Settings) -> None:
    """Five versions, of which the first three became champion: eight lines; and the run of another model."""
    add_versions(settings, 5)
    add_run(settings, "new")
    for number in (1, 2, 3):
        promote(settings, flight_delay, named(number), f"better than {number - 1}", by="ann")


def register_new(settings: Settings) -> None:
    """Register the run of a sixth model, which is there."""
    experiment = connect(settings, flight_delay)
    (run,) = quiet_mlflow().MlflowClient().search_runs([experiment], "tags.model_digest = 'new'")
    register(settings, flight_delay, run.info.run_id, by="ann")


BEFORE = {"champion": named(3), "previous": named(2), "challenger": named(5)}
# name -> what is done, the version that it is about, and the aliases after it
OPERATIONS: dict[str, tuple[Callable[[Settings], Any], str, dict[str, str]]] = {
    "register": (register_new, named(6), {**BEFORE, "challenger": named(6)}),
    "promote": (
        lambda settings: promote(settings, flight_delay, named(4), "better", by="ann", expected=named(3)),
        named(4),
        {**BEFORE, "champion": named(4), "previous": named(3)},
    ),
    "rollback": (
        lambda settings: roll_back(settings, flight_delay, "complaints", bad=named(3), by="ann"),
        named(2),
        {**BEFORE, "champion": named(2), "previous": named(1)},
    ),
    "delete": (
        lambda settings: delete_version(settings, flight_delay, named(4), "tidying up", by="ann"),
        named(4),
        BEFORE,
    ),
}


def judge(settings: Settings, name: str) -> bool:
    """After a kill: before or after, never between; done again, it is complete. Whether something was unfinished."""
    operation, subject, after = OPERATIONS[name]
    unfinished = repair_or_agree(settings)
    happened = any(entry.event == name and entry.subject == subject for entry in read_ledger(settings)[8:])
    found = all_aliases(settings)
    assert found == (after if happened else BEFORE), (happened, found)
    there = {f"{version.name}@{version.version}" for version in versions(settings, flight_delay)}
    assert (subject in there) == (not happened) if name == "delete" else not happened or subject in there
    operation(settings)
    assert all_aliases(settings) == after
    assert champion_reference(settings, flight_delay) == after["champion"]
    assert [entry.event for entry in read_ledger(settings)[8:]] == [name], "it is written down once"
    assert len(versions(settings, flight_delay)) == {"register": 6, "delete": 4}.get(name, 5), "no number is lost"
    assert verify_ledger(settings) == check_registry(settings) == []
    if name in ("promote", "rollback"):
        said = find_version(settings, flight_delay, "champion").tags["promoted_because"]
        assert said == read_ledger(settings)[-1].reason
    return unfinished


def repair_or_agree(settings: Settings) -> bool:
    """Either all agrees, or a repair says what it did, and then it does. Whether there was something to repair."""
    wrong = [defect.problem for defect in verify_ledger(settings)] or check_registry(settings)
    kept, done = repair_ledger(settings), repair_registry(settings)
    assert bool(wrong) == bool(kept or done), (wrong, kept, done)
    for said in done:
        assert said.startswith("the registry of flight-delay was brought up to line 9: "), "nothing is guessed"
    assert verify_ledger(settings) == check_registry(settings) == []
    return bool(wrong)


class Killing:
    """One operation, killed in one new workspace after the other."""

    def __init__(self, name: str, template: Path, folder: Path) -> None:
        self.name, self.template, self.home = name, template, Settings(home=folder / "workspace")
        self.unfinished = folder / "unfinished"
        self.killed = 0
        elsewhere = Settings(home=shutil.copytree(template, folder / "elsewhere"))
        OPERATIONS[name][0](elsewhere)  # so that the children needn't import MLflow,
        judge(elsewhere, name)  # nor compile the database's queries

    def begin_anew(self) -> None:
        """A new workspace in the old one's place."""
        shutil.rmtree(self.home.home, ignore_errors=True)
        shutil.copytree(self.template, self.home.home)

    def work(self) -> None:
        """Do it."""
        OPERATIONS[self.name][0](self.home)

    def kill_after(self, number: int) -> bool:
        """Do it in a new workspace, and kill it after so many changes on the disk; whether there are so many."""
        self.begin_anew()
        killed = kill_after_change(number, self.home.home, self.work)
        self.look(killed, f"after change {number}")
        return killed

    def kill_within(self, seconds: float | None) -> float:
        """Do it in a new workspace, and kill it after a time, or never; how long it lasted."""
        self.begin_anew()
        begin, child = time.perf_counter(), begin_child(self.work)
        if seconds is not None:
            time.sleep(seconds)
            os.kill(child, signal.SIGKILL)
        ended = end_of(child)
        took = time.perf_counter() - begin
        assert ended in (0, -signal.SIGKILL), ended
        self.look(ended != 0, f"after {seconds} s")
        return took

    def look(self, killed: bool, when: str) -> None:
        """Judge in a child, so that no connection to the database is left in this process."""
        assert end_of(begin_child(self.judge)) == 0, f"{self.name} was killed {when}"
        self.killed += killed

    def judge(self) -> None:
        """Note whether something was left to be finished."""
        if judge(self.home, self.name):
            with self.unfinished.open("a", encoding="utf-8") as file:
                file.write("once\n")

    def say(self) -> None:
        """How many were killed, and how many of those left something to be finished."""
        times = self.unfinished.read_text(encoding="utf-8").count("once") if self.unfinished.exists() else 0
        print(self.killed, times)


def kill_at_changes(killing: Killing, stride: int) -> None:
    """After the first change on the disk, in a new workspace some changes later, and so on."""
    for number in count(1, stride):
        if not killing.kill_after(number):
            return


def kill_at_moments(killing: Killing, rounds: int) -> None:
    """At any moment, also within the system's calls, of the disk and of the database."""
    took = min(killing.kill_within(None) for _ in range(3))
    chance = random.Random(2013)
    for _ in range(rounds):
        killing.kill_within(chance.uniform(0, took))


def kill_publications(settings: Settings, old: str, new: str) -> None:
    """Publish, killed after one change after the other; what is live is one of the two, and the ledger says which."""
    unfinished = 0
    for number in count(1):
        run_child(lambda: publish(settings, old))
        killed = kill_after_change(number, settings.home, lambda: publish(settings, new))
        live = live_bundle(settings)
        assert live is not None and live.name in (old, new)
        wrong = [defect.problem for defect in verify_ledger(settings)] or check_live(settings)
        kept, done = repair_ledger(settings), repair_live(settings, by="eve")
        assert bool(wrong) == bool(kept or done), (number, wrong, kept, done)
        assert (live_bundle(settings), read_ledger(settings)[-1].after["live"]) == (live, live.name), "it stays"
        unfinished += bool(done)
        run_child(lambda: publish(settings, new))
        assert (live_bundle(settings) or live).name == read_ledger(settings)[-1].after["live"] == new
        assert verify_ledger(settings) == check_live(settings) == []
        if not killed:
            print(number - 1, unfinished)
            return


if __name__ == "__main__":
    task, *words = sys.argv[1:]
    if task in CROWDS:
        sys.exit(0 if fork_crowd(task, int(words[0]), Path(words[1])) else 1)
    elif task == "publish":
        kill_publications(Settings(), *words)
    else:
        kills, number = Killing(words[0], Path(words[1]), Path(words[2])), int(words[3])
        kill_at_changes(kills, number) if task == "changes" else kill_at_moments(kills, number)
        kills.say()
