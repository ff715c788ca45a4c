"""Work that goes on after the last cell is finished, shown, or named as what was cut off: never lost in silence."""

import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nbformat
import papermill
import pytest

from mlops_course.pipelines import engine
from mlops_course.pipelines.engine import sessions
from mlops_course.pipelines.engine.requests import CellError, Event, Interrupted, Request, TimedOut, WorkerDied
from mlops_course.pipelines.engine.workers import Workers
from mlops_course.wording import number_of

WARM = ["fork", "spawn"] if sys.platform == "linux" else ["spawn"]
LATE_THREAD = "import threading, time\ndef late():\n    time.sleep({0})\n    {1}\nthreading.Thread(target=late).start()"
DONE = "open('done.txt', 'w').close()"


@pytest.fixture(scope="module")
def every_kind() -> Iterator[Callable[[str], Workers]]:
    made: dict[str, Workers] = {}

    def get(kind: str) -> Workers:
        return made.setdefault(kind, made.get(kind) or Workers(kind))

    yield get
    for each in made.values():
        each.close()
    engine.close_kept()


@pytest.fixture(params=WARM)
def warm(request: pytest.FixtureRequest, every_kind: Callable[[str], Workers]) -> Workers:
    return every_kind(request.param)


@pytest.fixture(params=[*WARM, "kernel"])
def any_kind(request: pytest.FixtureRequest, every_kind: Callable[[str], Workers]) -> Workers:
    return every_kind(request.param)


@pytest.fixture
def first(every_kind: Callable[[str], Workers]) -> Workers:
    """Of the kind that is usual here."""
    return every_kind(WARM[0])


def ask(folder: Path, *sources: str, **more: Any) -> Request:
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), folder / "in.ipynb")
    environment = {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}
    options = {"parameters": {}, "folder": folder, "environment": environment, "timeout": 60.0}
    return Request(folder / "in.ipynb", folder / "out.ipynb", **{**options, **more})


def shown(request: Request) -> list[str]:
    cells = [cell for cell in nbformat.read(request.output, 4).cells if cell.cell_type == "code"]
    return ["".join(output.get("text") or output.get("evalue", "") for output in cell.outputs) for cell in cells]


WORK = {
    "a thread": LATE_THREAD.format(0.6, DONE),
    "a thread for longer than a kernel is given": LATE_THREAD.format(3.5, DONE),
    "threads that start threads": "import threading, time\ndef last(): time.sleep(0.3); " + DONE + "\n"
    "def first(): time.sleep(0.3); threading.Thread(target=last).start()\nthreading.Thread(target=first).start()",
    "a pool of threads": "import concurrent.futures, time\npool = concurrent.futures.ThreadPoolExecutor(1)\n"
    f"def job(): {DONE}\n_ = pool.submit(time.sleep, 0.5), pool.submit(job)",
    "a pool of processes": "import concurrent.futures, multiprocessing, time\ndef job():\n    time.sleep(0.5)\n    "
    f"{DONE}\ncontext = multiprocessing.get_context('fork')\n"
    "pool = concurrent.futures.ProcessPoolExecutor(1, context)\n_ = pool.submit(job)",
    "a process": f"import multiprocessing, time\ndef job():\n    time.sleep(0.5)\n    {DONE}\n"
    "multiprocessing.get_context('fork').Process(target=job).start()",
    "the default pool of the event loop": "import asyncio, time\ndef job():\n    time.sleep(0.5)\n    "
    f"{DONE}\n_ = asyncio.get_running_loop().run_in_executor(None, job)\nawait asyncio.sleep(0)",
}


@pytest.mark.parametrize("work", list(WORK))
def test_work_is_finished(work: str, any_kind: Workers, tmp_path: Path) -> None:
    any_kind.execute(ask(tmp_path, "x = 1", WORK[work]))
    assert (tmp_path / "done.txt").exists()


def test_exit_functions_run_after_threads_and_may_take_their_time(warm: Workers, tmp_path: Path) -> None:
    code = (
        LATE_THREAD.format(0.4, "print('thread')") + "\nimport atexit\ndef leave():\n    print('exit'); time.sleep(6); "
    )
    warm.execute(ask(tmp_path, code + DONE + "\n_ = atexit.register(leave)"))
    assert (tmp_path / "done.txt").exists()
    assert shown(ask(tmp_path)) == ["thread\nexit\n"]


def test_what_is_printed_late_is_shown_under_the_last_cell(warm: Workers, tmp_path: Path) -> None:
    late = "print('late'); print('error', file=sys.stderr); display(6 * 7); os.write(1, b'raw\\n')"
    request, events = (
        ask(tmp_path, "import os, sys\nprint('early')", LATE_THREAD.format(0.4, late) + "\nprint('last')"),
        list[Event](),
    )
    warm.execute(request, events.append)
    assert shown(request)[0] == "early\n"
    outputs = nbformat.read(request.output, 4).cells[1].outputs
    assert "".join(output.text for output in outputs if output.get("name") == "stdout") == "last\nlate\nraw\n"
    assert [output.text for output in outputs if output.get("name") == "stderr"] == ["error\n"]
    assert [output.data["text/plain"] for output in outputs if "data" in output] == ["42"]
    assert {"late", "error"} <= {event.text for event in events}


def test_a_thread_that_fails_late_is_seen(warm: Workers, tmp_path: Path) -> None:
    request = ask(tmp_path, LATE_THREAD.format(0.3, "raise ValueError('too late')"))
    warm.execute(request)
    plain = re.sub(r"\x1b\[[0-9;]*m", "", shown(request)[0])  # since 3.13 Python colours it itself
    assert "ValueError: too late" in plain


def test_secrets_are_masked_in_late_output(warm: Workers, tmp_path: Path) -> None:
    request = ask(tmp_path, LATE_THREAD.format(0.3, "print('is', 'hunter' + '2222')"), secrets=("hunter2222",))
    warm.execute(request)
    assert shown(request) == ["is ***\n"]
    assert "hunter2222" not in request.output.read_text().replace("'hunter' + '2222'", "")


ENDLESS = "import threading\nthreading.Thread(target=threading.Event().wait, name='the endless one').start()"


def test_a_time_limit_ends_endless_work_and_names_it(any_kind: Workers, tmp_path: Path) -> None:
    limit = 1.5 if any_kind.kind == "fork" else 5.0
    request, begin = ask(tmp_path, "x = 1", ENDLESS, timeout=limit), time.monotonic()
    with pytest.raises(
        TimedOut, match=f"longer than {number_of(limit, 'second')}: after the last cell, .* still went on"
    ) as caught:
        any_kind.execute(request)
    assert time.monotonic() - begin < 30
    assert any_kind.kind == "kernel" or "thread 'the endless one'" in str(caught.value)
    made = nbformat.read(request.output, 4)
    assert made.metadata.papermill.exception is True and "In [2]" in made.cells[0].source
    assert "still went on" in made.cells[-1].outputs[-1].evalue


def test_the_limit_for_a_cell_holds_for_the_end_as_well(tmp_path: Path) -> None:
    source = ask(tmp_path, "import time\ntime.sleep(0.8)", ENDLESS + "\ntime.sleep(0.8)").notebook
    notebook = nbformat.read(source, 4)
    options = {"kernel_name": "python3", "engine_name": "mlops-course", "progress_bar": False, "execution_timeout": 1}
    with pytest.raises(
        TimedOut, match=r"the notebook's end took longer than 1 second: .*'the endless one' still went"
    ):
        papermill.execute_notebook(notebook, None, **options)


def test_without_any_limit_endless_work_is_an_error_one_day(first: Workers, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(sessions, "LATE_S", 1.0)
    with pytest.raises(TimedOut, match=r"the notebook's end took longer than 1 second: .*'the endless one'"):
        first.execute(ask(tmp_path, ENDLESS, timeout=None))


def test_waiting_is_said(first: Workers, tmp_path: Path) -> None:
    events: list[Event] = []
    first.execute(ask(tmp_path, LATE_THREAD.format(0.8, "pass")), events.append)
    assert "the last cell has ended, but not thread 'Thread-1 (late)': waiting" in [event.text for event in events]


def test_endless_work_can_be_cancelled(warm: Workers, tmp_path: Path) -> None:
    request, waiting, begin = ask(tmp_path, ENDLESS), threading.Event(), time.monotonic()
    thread = threading.Thread(target=lambda: waiting.wait(30) and warm.cancel("enough"))
    thread.start()
    with pytest.raises(Interrupted, match="enough: after the last cell, thread 'the endless one' still went on"):
        warm.execute(request, lambda event: waiting.set() if "waiting" in event.text else None)
    thread.join()
    assert time.monotonic() - begin < 30, "without a limit it would go on for ten minutes"


def test_a_crash_in_late_work_is_an_error(warm: Workers, tmp_path: Path) -> None:
    request = ask(tmp_path, LATE_THREAD.format(0.3, "import ctypes; ctypes.string_at(0)"))
    with pytest.raises(WorkerDied, match="ended by SIGSEGV"):
        warm.execute(request)


def test_a_failed_notebook_does_not_wait(warm: Workers, tmp_path: Path) -> None:
    begin = time.monotonic()
    with pytest.raises(CellError, match="division by zero"):
        warm.execute(ask(tmp_path, ENDLESS, "1 / 0"))
    assert time.monotonic() - begin < 30


def test_idle_pools_and_daemons_cost_no_time(warm: Workers, tmp_path: Path) -> None:
    code = "import concurrent.futures, threading\npool = concurrent.futures.ThreadPoolExecutor(2)\n"
    code += "_ = list(pool.map(abs, [1]))\nthreading.Thread(target=threading.Event().wait, daemon=True).start()"
    begin = time.monotonic()
    warm.execute(ask(tmp_path, code))
    assert time.monotonic() - begin < 30
