"""Parts of production: started, killed, started again with patience, found again after a reboot, and ended."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from kill_helpers import lives

from mlops_course.capstone.processes import (
    STATE_FILE,
    Keeper,
    Part,
    PartState,
    Patience,
    Supervisor,
    SupervisorError,
    SupervisorState,
    birth_of,
    end_left_behind,
    end_process,
    end_supervisor,
    is_alive,
    is_supervised,
    last_words,
    read_state,
    start_process,
    supervise,
)

QUICK = Patience(first=0.05, most=0.2, steady=5.0, tries=3)


def program(text: str, name: str = "part") -> Part:
    return Part(name, (sys.executable, "-S", "-c", text))


SLEEPER = "import time; time.sleep(60)"


def until(condition: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


@pytest.fixture
def supervised(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Starts a supervisor in a process of its own, as `up` does; ends whatever is left of it."""
    started: list[subprocess.Popen[bytes]] = []

    def start(*parts: Part) -> Path:
        code = (
            "import sys; from pathlib import Path; from mlops_course.capstone.processes import *; import msgspec\n"
            "parts = msgspec.json.decode(sys.argv[2], type=list[Part])\n"
            "supervise(parts, Path(sys.argv[1]), Patience(0.05, 0.2, 5.0, 3), 0.02)"
        )
        import msgspec

        command = [sys.executable, "-c", code, str(tmp_path), msgspec.json.encode(parts).decode()]
        started.append(subprocess.Popen(command, start_new_session=os.name == "posix"))
        until(lambda: pids(tmp_path) and all(pids(tmp_path)))
        return tmp_path

    yield start
    for process in started:
        process.kill()
        process.wait()
    if state := read_state(tmp_path):
        end_left_behind(state.parts, 2)


def pids(folder: Path) -> list[int]:
    state = read_state(folder)
    return [part.pid for part in state.parts if part.state != "off"] if state else []


def part(folder: Path, name: str) -> PartState:
    state = read_state(folder)
    assert state is not None
    return next(each for each in state.parts if each.name == name)


def test_who_looks_after_the_parts_imports_nothing_of_what_they_do() -> None:
    code = "import sys, mlops_course.capstone.processes; print(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "mlops_course.capstone.processes" in found
    assert not {"numpy", "pandas", "sklearn", "mlflow", "mlops_course.serving"} & set(found)


def test_every_name_that_the_section_offers_is_found_where_it_lives() -> None:
    from mlops_course import capstone

    assert all(getattr(capstone, name).__name__ == name for name in capstone.__all__)
    with pytest.raises(AttributeError, match="no attribute 'replay_decade'"):
        capstone.replay_decade  # noqa: B018


def test_a_number_is_not_a_process() -> None:
    process = subprocess.Popen([sys.executable, "-S", "-c", SLEEPER])
    born = birth_of(process.pid)
    assert born and born == birth_of(process.pid) != birth_of(os.getpid())
    process.kill()
    until(lambda: birth_of(process.pid) == "")  # a zombie counts as gone: nobody has waited for it yet
    process.wait()
    assert birth_of(process.pid) == birth_of(-1) == birth_of(0) == ""


def test_each_part_that_is_killed_comes_back_and_the_others_stay(supervised: Callable[..., Path]) -> None:
    folder = supervised(program(SLEEPER, "one"), program(SLEEPER, "two"), program(SLEEPER, "three"))
    for name in ("one", "two", "three"):
        before = {each: part(folder, each).pid for each in ("one", "two", "three")}
        psutil.Process(before[name]).kill()
        until(lambda: part(folder, name).pid not in (0, before[name]))  # noqa: B023
        after = {each: part(folder, each).pid for each in before}
        assert {each for each in before if before[each] != after[each]} == {name}
        assert part(folder, name).restarts == 1
        assert "KILL" in part(folder, name).error or os.name == "nt"
    assert end_supervisor(folder) == ["one", "two", "three"]


def test_what_fails_again_and_again_is_said_so_with_its_last_words(supervised: Callable[..., Path]) -> None:
    folder = supervised(program(SLEEPER, "well"))
    end_supervisor(folder)
    keeper, clock = Keeper(program("raise SystemExit('the disk is full')"), folder, QUICK), 0.0
    states = []
    for _ in range(4):
        keeper.look(clock)
        assert keeper.process is not None
        keeper.process.wait()
        keeper.look(clock + 0.01)
        states.append(keeper.state.state)
        clock += 1
    assert states == ["waiting", "waiting", "failing", "failing"]
    assert keeper.state.error == "exit status 1: the disk is full"


def test_a_part_that_has_run_for_a_while_is_forgiven(tmp_path: Path) -> None:
    keeper = Keeper(program("raise SystemExit(3)"), tmp_path, QUICK)
    for clock in (0.0, 1.0, 2.0):
        keeper.look(clock)
        assert keeper.process is not None
        keeper.process.wait()
        keeper.look(clock + 0.01)
    assert keeper.state.state == "failing"
    keeper.part = program(SLEEPER)
    keeper.look(10.0)
    assert keeper.state.state == "failing", "that it runs again proves nothing yet"
    keeper.look(10.0 + QUICK.steady)
    assert keeper.state.state == "running"
    assert keeper.process is not None
    end_process(keeper.process.pid, hard=True)
    keeper.process.wait()
    keeper.look(20.0)
    assert (keeper.state.state, keeper.state.restarts) == ("waiting", 3), "one death, after a long life"


def test_it_is_not_started_before_its_time(tmp_path: Path) -> None:
    keeper = Keeper(Part("absent", (str(tmp_path / "no such program"),)), tmp_path, Patience(first=1.0))
    for clock in (0.0, 0.5, 0.99):
        keeper.look(clock)
        assert keeper.state.restarts == 0
    keeper.look(1.0)
    assert keeper.state.restarts == 1
    assert "can't be started" in keeper.state.error


@pytest.mark.skipif(os.name == "nt", reason="Windows has no process groups that outlive their leader")
def test_what_a_dead_part_has_left_behind_is_ended_before_it_is_started_again(tmp_path: Path) -> None:
    child = (
        "import subprocess, sys, time\n"
        f"child = subprocess.Popen([sys.executable, '-S', '-c', {SLEEPER!r}])\n"
        "print(child.pid, flush=True); time.sleep(60)"
    )
    keeper = Keeper(program(child), tmp_path, QUICK)
    keeper.look(0.0)
    until(lambda: last_words(keeper.log).isdigit())
    pid = int(last_words(keeper.log))
    assert keeper.process is not None
    keeper.process.kill()
    keeper.process.wait()
    assert lives(pid)
    keeper.look(0.1)
    until(lambda: not lives(pid))


def test_down_ends_the_supervisor_and_all_parts_and_opens_the_lock(supervised: Callable[..., Path]) -> None:
    folder = supervised(program(SLEEPER, "one"), program(SLEEPER, "two"))
    state = read_state(folder)
    assert state is not None and is_alive(SupervisorState(state.pid, state.birth, "")) and is_supervised(folder)
    running = [psutil.Process(pid) for pid in (state.pid, *pids(folder))]
    assert end_supervisor(folder) == ["one", "two"]
    psutil.wait_procs(running, timeout=10)
    assert not any(map(lives, running))
    assert not is_supervised(folder) and read_state(folder) is None
    assert end_supervisor(folder) == [], "once more does no harm"


def test_a_part_that_does_not_listen_is_ended_all_the_same(tmp_path: Path) -> None:
    deaf = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); {SLEEPER}"
    whole = Supervisor([program(deaf)], tmp_path)
    whole.look()
    until(lambda: last_words(tmp_path / "logs" / "part.log") == "deaf")
    process = whole.keepers[0].process
    whole.end(seconds=0.3)
    assert process is not None and process.returncode is not None
    assert read_state(tmp_path) is None


def test_a_second_supervisor_is_refused_and_names_the_first(supervised: Callable[..., Path]) -> None:
    folder = supervised(program(SLEEPER, "one"))
    state = read_state(folder)
    assert state is not None
    with pytest.raises(SupervisorError, match=f"process {state.pid}, since .* mlops-course down"):
        supervise([], folder)
    assert pids(folder) == [part.pid for part in state.parts], "the first one goes on"


def test_what_a_killed_supervisor_has_left_is_found_and_ended(supervised: Callable[..., Path]) -> None:
    folder = supervised(program(SLEEPER, "one"), program(SLEEPER, "two"))
    state, before = read_state(folder), pids(folder)
    assert state is not None
    psutil.Process(state.pid).kill()
    until(lambda: not is_supervised(folder))
    assert all(map(lives, before)), "its parts have lost their supervisor"
    assert sorted(end_supervisor(folder)) == ["one", "two"]
    until(lambda: not any(map(lives, before)))


def test_a_new_supervisor_ends_what_the_killed_one_has_left(supervised: Callable[..., Path]) -> None:
    folder = supervised(program(SLEEPER, "one"))
    state, before = read_state(folder), pids(folder)
    assert state is not None
    psutil.Process(state.pid).kill()
    until(lambda: not is_supervised(folder))
    supervised(program(SLEEPER, "one"))
    until(lambda: bool(pids(folder)) and pids(folder) != before)
    until(lambda: not lives(before[0]))


def test_after_a_reboot_nobody_elses_process_is_ended(tmp_path: Path) -> None:
    """The number is in use again, by somebody else: its birth is another one."""
    stranger = subprocess.Popen([sys.executable, "-S", "-c", SLEEPER])
    try:
        parts = [PartState("api", "running", stranger.pid, "another boot-4711")]
        supervisor = SupervisorState(stranger.pid, "another boot-4710", "2013-01-01T00:00:00.000Z", parts)
        import msgspec

        (tmp_path / STATE_FILE).write_bytes(msgspec.json.encode(supervisor))
        end_supervisor(tmp_path)
        assert stranger.poll() is None
        assert read_state(tmp_path) is None
    finally:
        stranger.kill()
        stranger.wait()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"pid": "x"}', b"\xff"])
def test_a_damaged_file_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / STATE_FILE).write_bytes(content)
    with pytest.raises(SupervisorError, match=r"state\.json doesn't say what runs"):
        read_state(tmp_path)


def test_a_full_log_begins_anew_and_the_old_one_is_kept(tmp_path: Path) -> None:
    log = tmp_path / "part.log"
    log.write_bytes(b"x" * 5_000_001)
    start_process(program("print('new')"), log).wait()
    assert log.read_text().strip() == "new"
    assert (tmp_path / "part.log.1").stat().st_size == 5_000_001


def test_it_can_run_in_a_thread_too(tmp_path: Path) -> None:
    thread = threading.Thread(target=supervise, args=([program(SLEEPER, "one")], tmp_path))
    thread.start()
    until(lambda: bool(pids(tmp_path)) and all(pids(tmp_path)))
    assert end_supervisor(tmp_path) == ["one"]
    thread.join(10)
    assert not thread.is_alive()
