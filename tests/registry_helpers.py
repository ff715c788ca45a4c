"""Versions without models behind them, a PostgreSQL server, and what happens to a registry in a crowd or at a kill."""

import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from mlops_course.environment import Settings
from mlops_course.experiments import connect, quiet_mlflow
from mlops_course.ledger import read_ledger, verify_ledger
from mlops_course.project import flight_delay
from mlops_course.registry import (
    champion_reference,
    delete_version,
    find_version,
    open_registry,
    promote,
    register,
    roll_back,
    versions,
)
from mlops_course.registry.store import aliases_of


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


# ---------------------------------------------------------------- killed at each step

# name -> what is done, the aliases before, and after
OPERATIONS: dict[str, tuple[Callable[[Settings], Any], dict[str, str], dict[str, str]]] = {
    "promote": (
        lambda settings: promote(settings, flight_delay, named(4), "better", by="ann", expected=named(3)),
        {"champion": named(3), "previous": named(2), "challenger": named(5)},
        {"champion": named(4), "previous": named(3), "challenger": named(5)},
    ),
    "rollback": (
        lambda settings: roll_back(settings, flight_delay, "complaints", bad=named(3), by="ann"),
        {"champion": named(3), "previous": named(2), "challenger": named(5)},
        {"champion": named(2), "previous": named(1), "challenger": named(5)},
    ),
    "delete": (
        lambda settings: delete_version(settings, flight_delay, named(4), "tidying up", by="ann"),
        {"champion": named(3), "previous": named(2), "challenger": named(5)},
        {"champion": named(3), "previous": named(2), "challenger": named(5)},
    ),
}
STEPS = {  # the functions whose every line is a step: those that change something, and what leads to them
    "promote", "roll_back", "delete_version", "record", "append_entry", "_write_line", "_set_aside", "_apply",
    "changing_registry", "_writing",
}  # fmt: skip


def die_at(step: int) -> None:
    """From here on, the process kills itself before that line of the functions that change something."""
    lines = count(1)

    def line(frame: FrameType, event: str, _: Any) -> Any:
        if event == "line" and next(lines) == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return line

    def call(frame: FrameType, event: str, _: Any) -> Any:
        code = frame.f_code
        return line if code.co_name in STEPS and "mlops_course" in code.co_filename else None

    sys.settrace(call)


def in_child(task: Callable[[], None]) -> int:
    """What becomes of a task in a process of its own: 0, or the negative number of the signal that killed it."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            task()
            status = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def judge(settings: Settings, name: str) -> None:
    """After a kill: before or after, never between; done again, it is complete, and the ledger is whole."""
    operation, before, after = OPERATIONS[name]
    happened = any(entry.event == name and entry.subject in (named(4), named(2)) for entry in read_ledger(settings)[8:])
    found = all_aliases(settings)
    assert found == (after if happened else before), (happened, found)
    there = {f"{version.name}@{version.version}" for version in versions(settings, flight_delay)}
    assert (named(4) in there) == (name != "delete" or not happened)
    operation(settings)
    assert all_aliases(settings) == after
    assert champion_reference(settings, flight_delay) == after["champion"]
    assert [entry.event for entry in read_ledger(settings)[8:]] == [name], "it is written down once"
    assert verify_ledger(settings) == []
    if name != "delete":
        said = find_version(settings, flight_delay, "champion").tags["promoted_because"]
        assert said == read_ledger(settings)[-1].reason


def kill_at_each_step(name: str, folder: Path) -> int:
    """Kill an operation at its first step, in a new workspace at its second one, and so on; how many there were."""
    import mlflow.store.model_registry.sqlalchemy_store
    import mlflow.store.tracking.sqlalchemy_store  # noqa: F401 (so that the children needn't import it)

    quiet_mlflow()
    template, home = Settings(home=folder / "template"), Settings(home=folder / "workspace")

    def prepare() -> None:
        add_versions(template, 5)
        for number in (1, 2, 3):
            promote(template, flight_delay, named(number), "better", by="ann")

    assert in_child(prepare) == 0
    for step in count(1):
        shutil.rmtree(home.home, ignore_errors=True)
        shutil.copytree(template.home, home.home)

        def attempt(step: int = step) -> None:
            die_at(step)
            OPERATIONS[name][0](home)

        ended = in_child(attempt)
        assert ended in (0, -signal.SIGKILL), ended
        assert in_child(lambda: judge(home, name)) == 0, f"{name} was killed at step {step}"
        if ended == 0:
            return step - 1
    raise AssertionError("not reached")


if __name__ == "__main__":
    task, *words = sys.argv[1:]
    if task == "crowd":
        join_crowd(Settings(), words[0], int(words[1]))
    else:
        print(kill_at_each_step(task, Path(words[0])))
