"""Whatever dies, hangs or is full: a clear message, no process left, and the next notebook runs."""

import itertools
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nbformat
import psutil
import pytest
from kill_helpers import lives

from mlops_course.environment import WorkspaceError
from mlops_course.pipelines.engine.requests import CellError, Event, Interrupted, Request, TimedOut, WorkerDied
from mlops_course.pipelines.engine.workers import Workers
from mlops_course.wording import number_of

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
IMPORTS = "import ctypes, os, signal, subprocess, sys, time"


@pytest.fixture(scope="module")
def every_kind() -> Iterator[dict[str, Workers]]:
    with Workers("fork") as fork, Workers("spawn") as spawn, Workers("kernel") as kernel:
        yield {"fork": fork, "spawn": spawn, "kernel": kernel}


@pytest.fixture(params=["fork", "spawn", "kernel"])
def workers(request: pytest.FixtureRequest, every_kind: dict[str, Workers]) -> Workers:
    return every_kind[request.param]


@pytest.fixture(params=["fork", "spawn"])
def warm(request: pytest.FixtureRequest, every_kind: dict[str, Workers]) -> Workers:
    return every_kind[request.param]


def ask(folder: Path, *sources: str, **more: Any) -> Request:
    name = f"n{len(list(folder.iterdir()))}"
    cells = [nbformat.v4.new_code_cell(source) for source in (IMPORTS, *sources)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), folder / f"{name}.ipynb")
    environment = {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}
    options = {"parameters": {}, "folder": folder, "environment": environment, "timeout": 60.0}
    return Request(folder / f"{name}.ipynb", folder / f"{name}_out.ipynb", **{**options, **more})


def texts(request: Request) -> list[str]:
    cells = [cell for cell in nbformat.read(request.output, 4).cells if cell.cell_type == "code"]
    shown = [["".join(output.get("text") or output.get("evalue") or "") for output in cell.outputs] for cell in cells]
    return ["".join(parts) for parts in shown]


def works(workers: Workers, folder: Path) -> bool:
    """Whether the next notebook runs."""
    request = ask(folder, "print(6 * 7)")
    workers.execute(request)
    return texts(request)[1] == "42\n"


def gone(pid: int, seconds: float = 0.0) -> bool:
    """Whether a process is gone within some seconds."""
    deadline = time.monotonic() + seconds
    while True:
        if not lives(pid):
            return True
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.02)


def noted(folder: Path) -> list[int]:
    """The processes that a notebook wrote down."""
    return [int(line) for line in (folder / "pids").read_text().split()]


# A process in the group, and a daemon that hides in a session of its own without its parent.
CHILDREN = """
child = subprocess.Popen(["sleep", "300"])
daemon = "import os, sys\\nif os.fork(): os._exit(0)\\nos.setsid()\\nif os.fork(): os._exit(0)\\n"
daemon += "open(sys.argv[1], 'a').write(f'{os.getpid()}\\\\n')\\nos.execvp('sleep', ['sleep', '300'])"
with open("pids", "w") as file: print(child.pid, os.getpid(), file=file)
_ = subprocess.run([sys.executable, "-c", daemon, "pids"])
while len(open("pids").read().split()) < 3: time.sleep(0.01)
"""
ENDINGS: dict[str, tuple[str, type[Exception] | None, str]] = {
    "success": ("1", None, ""),
    "an error": ("1 / 0", CellError, "division by zero"),
    "SIGKILL": ("os.kill(os.getpid(), signal.SIGKILL)", WorkerDied, "ended by SIGKILL, as the system does when memory"),
    "SIGTERM": ("os.kill(os.getpid(), signal.SIGTERM); time.sleep(9)", WorkerDied, "ended by SIGTERM"),
    "a crash": ("ctypes.string_at(0)", WorkerDied, "ended by SIGSEGV"),
    "its own exit": ("os._exit(3)", WorkerDied, "ended by itself, with exit status 3"),
}


DEATHS = [ending for ending in ENDINGS if ending not in ("SIGTERM", "a crash", "its own exit")]  # like SIGKILL


@pytest.mark.parametrize(
    ("workers", "ending"),
    [*itertools.product(["fork", "spawn"], ENDINGS), *itertools.product(["kernel"], DEATHS)],
    indirect=["workers"],
)
def test_nothing_is_left_of_a_notebook(ending: str, workers: Workers, tmp_path: Path) -> None:
    code, kind, message = ENDINGS[ending]
    request = ask(tmp_path, CHILDREN, f"print('before', flush=True); time.sleep(0.3); {code}")
    if kind is None:
        workers.execute(request)
    else:
        with pytest.raises(kind, match=message) as caught:
            workers.execute(request)
        assert getattr(caught.value, "cell", None) == 3
        assert "In [3]" in nbformat.read(request.output, 4).cells[0].source
    assert "before" in texts(request)[2]
    assert [pid for pid in noted(tmp_path) if not gone(pid)] == []
    assert works(workers, tmp_path)


STUCK = ["ctypes.PyDLL(None).pause()", "ctypes.PyDLL(None).sleep(60)", "time.sleep(60)"]


@pytest.mark.parametrize(
    ("workers", "stuck"),
    [*itertools.product(["fork", "spawn"], STUCK), ("kernel", STUCK[0])],
    indirect=["workers"],
)
def test_a_time_limit_ends_what_is_stuck_in_c(stuck: str, workers: Workers, tmp_path: Path) -> None:
    limit = 1.5 if workers.kind == "fork" else 5.0
    request, begin = ask(tmp_path, CHILDREN, stuck, timeout=limit), time.monotonic()
    with pytest.raises(TimedOut, match=f"cell \\[3\\] .*the notebook took longer than {number_of(limit, 'second')}"):
        workers.execute(request)
    assert time.monotonic() - begin < 30
    assert "the notebook took longer" in texts(request)[2]
    assert [pid for pid in noted(tmp_path) if not gone(pid)] == []
    assert works(workers, tmp_path)


def test_a_cell_that_refuses_to_be_interrupted_is_killed(warm: Workers, tmp_path: Path) -> None:
    stubborn = "print('here', flush=True)\nwhile True:\n    try: time.sleep(1)\n    except BaseException: pass"
    request, here = ask(tmp_path, CHILDREN, stubborn), threading.Event()
    thread = threading.Thread(target=lambda: here.wait(30) and warm.cancel("enough"))
    thread.start()
    with pytest.raises(Interrupted, match="enough"):
        warm.execute(request, lambda event: here.set() if event.text == "here" else None)
    thread.join()
    assert [pid for pid in noted(tmp_path) if not gone(pid)] == []
    assert works(warm, tmp_path)


def test_ctrl_c_in_the_waiting_process(warm: Workers, tmp_path: Path) -> None:
    request = ask(tmp_path, "try: print('here', flush=True); time.sleep(60)\nfinally: print('cleaned')")

    def interrupt(event: Event) -> None:
        if event.text == "here":
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        warm.execute(request, interrupt)
    assert "cleaned" in texts(request)[1]
    assert works(warm, tmp_path)


def test_memory_that_is_bounded(warm: Workers, tmp_path: Path) -> None:
    limit = "import resource\nresource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))"
    request = ask(tmp_path, limit, "x = bytearray(4 << 30)")
    with pytest.raises(CellError, match="MemoryError") as caught:
        warm.execute(request)
    assert caught.value.cell == 3
    assert works(warm, tmp_path)


# ---------------------------------------------------------------- the zygote


def zygote_of(workers: Workers) -> int:
    (source,) = workers.pools.live.values()
    return int(source.process.pid)


@pytest.fixture
def forks() -> Iterator[Workers]:
    with Workers("fork") as workers:
        yield workers


def test_the_zygote_is_killed_while_a_notebook_runs(forks: Workers, tmp_path: Path) -> None:
    request = ask(tmp_path, CHILDREN, "print('here', flush=True); time.sleep(60)")
    with pytest.raises(WorkerDied, match="the process that all workers are forked from was ended by SIGKILL"):
        forks.execute(
            request, lambda event: os.kill(zygote_of(forks), signal.SIGKILL) if event.text == "here" else None
        )
    assert texts(request)[2].startswith("here\n")
    assert [pid for pid in noted(tmp_path) if not gone(pid, 0.5)] == []
    assert works(forks, tmp_path)


def test_the_zygote_is_killed_between_notebooks(forks: Workers, tmp_path: Path) -> None:
    assert works(forks, tmp_path)
    old = zygote_of(forks)
    os.kill(old, signal.SIGKILL)
    assert gone(old, 5)
    time.sleep(0.2)
    assert works(forks, tmp_path)
    assert zygote_of(forks) != old


def test_a_spare_worker_is_killed(forks: Workers, tmp_path: Path) -> None:
    assert works(forks, tmp_path)
    time.sleep(0.2)
    for child in psutil.Process(zygote_of(forks)).children():
        child.kill()
    time.sleep(0.2)
    assert works(forks, tmp_path)


def test_closing_leaves_nothing(tmp_path: Path) -> None:
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    for kind in ("fork", "spawn", "kernel"):
        with Workers(kind, spare=2) as workers:
            workers.start()
            assert works(workers, tmp_path)
    after = psutil.Process().children(recursive=True)
    assert [child for child in after if child.pid not in before and lives(child)] == []


def test_closing_ends_what_runs(tmp_path: Path) -> None:
    request, here = ask(tmp_path, CHILDREN, "print('here', flush=True); time.sleep(60)"), threading.Event()
    caught: list[BaseException] = []

    def run() -> None:
        try:
            workers.execute(request, lambda event: here.set() if event.text == "here" else None)
        except BaseException as error:
            caught.append(error)

    workers = Workers("fork")
    thread = threading.Thread(target=run)
    thread.start()
    here.wait(30)
    workers.close()
    thread.join(10)
    assert [type(error) for error in caught] == [Interrupted]
    assert [pid for pid in noted(tmp_path) if not gone(pid)] == []


def test_a_python_that_cannot_start_is_an_error_and_not_a_wait(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("raise SystemExit('no Python today')")
    request = ask(tmp_path, "1")
    request.environment["PYTHONPATH"] = str(tmp_path)
    for kind in ("fork", "spawn"):
        with Workers(kind) as workers, pytest.raises(WorkerDied, match="no worker process could be started"):
            workers.execute(request)


# ---------------------------------------------------------------- the runner

RUNNER = """
import sys
from pathlib import Path
from mlops_course.pipelines.engine.requests import Request
from mlops_course.pipelines.engine.workers import Workers
folder = Path(sys.argv[2])
with Workers(sys.argv[1], spare=2) as workers:
    workers.execute(Request(Path(sys.argv[3]), folder / "out.ipynb", {}, folder, dict(__import__("os").environ)))
"""


HOW = [("fork", "SIGKILL"), ("fork", "SIGTERM"), ("fork", "SIGINT"), ("spawn", "SIGKILL"), ("spawn", "SIGINT")]


@pytest.mark.parametrize(("kind", "name"), HOW)
def test_the_runner_is_ended(kind: str, name: str, tmp_path: Path) -> None:
    request = ask(tmp_path, CHILDREN, "print('here'); time.sleep(300)")
    command = [sys.executable, "-c", RUNNER, kind, str(tmp_path), str(request.notebook)]
    runner = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)
    wait_for(lambda: (tmp_path / "pids").exists() and len(noted(tmp_path)) == 3)
    family = [child.pid for child in psutil.Process(runner.pid).children(recursive=True)] + noted(tmp_path)
    os.kill(runner.pid, getattr(signal, name))
    runner.wait(20)
    assert [pid for pid in family if not gone(pid, 4.0)] == []


def wait_for(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


# ---------------------------------------------------------------- the disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_is_full_from_the_beginning(warm: Workers, small_disk: Path, tmp_path: Path) -> None:
    (small_disk / "filler").write_bytes(b"x" * 256 * 1024)
    request = ask(tmp_path, "open('ran', 'w').close()")
    with pytest.raises(WorkspaceError, match=r"No space left|full"):
        warm.execute(Request(request.notebook, small_disk / "out.ipynb", {}, tmp_path, request.environment))
    assert not (tmp_path / "ran").exists()
    assert works(warm, tmp_path)


def test_a_disk_that_fills_up(warm: Workers, small_disk: Path, tmp_path: Path) -> None:
    request = ask(tmp_path, "print('x' * 400_000)", "open('ran', 'w').close()")
    output = small_disk / "out.ipynb"
    with pytest.raises(WorkspaceError, match=r"No space left|full"):
        warm.execute(Request(request.notebook, output, {}, tmp_path, request.environment))
    assert (tmp_path / "ran").exists()
    assert nbformat.read(output, 4).cells[0].source == IMPORTS  # an older state, but whole
    assert [path.name for path in small_disk.iterdir()] == ["out.ipynb"]
    assert works(warm, tmp_path)


def test_a_notebook_that_is_edited_while_it_runs(warm: Workers, tmp_path: Path) -> None:
    request = ask(tmp_path, "open('started', 'w').close(); time.sleep(0.4)", "print('as it was')")

    def edit() -> None:
        wait_for(lambda: (tmp_path / "started").exists())
        text = request.notebook.read_text()
        request.notebook.write_text(text.replace("as it was", "as it is"))

    thread = threading.Thread(target=edit)
    thread.start()
    warm.execute(request)
    thread.join()
    assert texts(request)[2] == "as it was\n"
    assert "as it is" in request.notebook.read_text()


def test_a_cell_cannot_break_the_line(warm: Workers, tmp_path: Path) -> None:
    """Output that looks like a message, closed streams, a fork that comes back: the talk goes on."""
    request = ask(
        tmp_path,
        "os.write(1, (8).to_bytes(8, 'big') + b'{\"do\": 1}')",
        "pid = os.fork()\nif pid == 0: sys.exit(0)\n_ = os.waitpid(pid, 0)",
        "os.close(0)\nsys.stderr.close()",
        textwrap.dedent("""
            import threading
            def shout():
                for n in range(200): print("shout", n)
            threads = [threading.Thread(target=shout) for _ in range(4)]
            [t.start() for t in threads]
            [t.join() for t in threads]
            print("end")
        """),
    )
    warm.execute(request)
    assert texts(request)[4].count("shout") == 800
    assert texts(request)[4].endswith("end\n")
