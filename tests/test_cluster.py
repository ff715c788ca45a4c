"""Stages on a Dask cluster: real processes, a real scheduler, a machine that dies in the middle of its stage."""

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from conftest import free_port
from kill_helpers import lives
from pipeline_helpers import RECORD, statuses, write_chain, write_notebook

from mlops_course.environment import Settings
from mlops_course.pipelines import Options, StageError, run
from mlops_course.pipelines.cluster import ClusterError

pytest.importorskip("distributed")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(os.name == "nt", reason="uses POSIX signals")]


def start(*arguments: str, folder: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "distributed.cli." + arguments[0], *arguments[1:]]
    with (folder / f"{'-'.join(arguments[:1])}-{time.time_ns()}.log").open("wb") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)


@pytest.fixture(scope="module")
def scheduler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A cluster of two workers with one thread each."""
    folder = tmp_path_factory.mktemp("dask")
    port = free_port()
    address = f"tcp://127.0.0.1:{port}"
    quiet = ["--no-dashboard"]
    place = ["--host", "127.0.0.1", "--port", str(port), "--dashboard-address", "127.0.0.1:0"]
    processes = [start("dask_scheduler", *place, *quiet, folder=folder)]
    for number in range(2):
        place = ["--local-directory", str(folder / str(number))]
        processes.append(start("dask_worker", address, "--nthreads", "1", *quiet, *place, folder=folder))
    from distributed import Client

    with Client(address, timeout=60) as client:
        client.wait_for_workers(2, timeout=120)
    yield address
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
    for process in processes:
        process.wait(30)


def one(folder: Path, cell: str) -> Path:
    """A pipeline of one stage."""
    write_notebook(folder / "only.ipynb", "", cell)
    (folder / "only.yaml").write_text("name: only\nstages: [{name: only, notebook: only.ipynb}]\n")
    return folder / "only.yaml"


def test_a_pipeline_runs_on_a_cluster_and_its_cache_is_shared(
    tmp_path: Path, settings: Settings, scheduler: str
) -> None:
    chain = write_chain(tmp_path)
    record = run(chain, {"number": 3}, settings, options=Options(scheduler=scheduler))
    assert record.results["square"] == {"squared": 36}
    assert "36" in record.stages[-1].notebook.read_text()
    assert set(statuses(run(chain, {"number": 3}, settings)).values()) == {"cached"}


def test_a_stage_that_fails_elsewhere_reads_like_one_that_fails_here(
    tmp_path: Path, settings: Settings, scheduler: str
) -> None:
    pipeline = one(tmp_path, "print('so far')\n1 / 0")
    with pytest.raises(StageError, match=r"only.ipynb, cell \[\d\] `print.*ZeroDivisionError") as caught:
        run(pipeline, settings=settings, options=Options(scheduler=scheduler))
    assert "so far" in caught.value.executed.read_text()


def test_a_killed_machines_stage_is_run_again_elsewhere(tmp_path: Path, settings: Settings, scheduler: str) -> None:
    attempts = tmp_path / "attempts"
    cell = f"""
        import os, time
        with open({str(attempts)!r}, "a") as file:
            file.write(f"{{os.getpid()}}\\n")
        if len(open({str(attempts)!r}).readlines()) == 1:
            time.sleep(120)
    """
    pipeline = one(tmp_path, textwrap.dedent(cell) + RECORD + "record_result(pid=os.getpid())")

    def kill_the_machine() -> None:
        until = time.monotonic() + 90
        while not (attempts.exists() and attempts.read_text().strip()) and time.monotonic() < until:
            time.sleep(0.1)
        stage = psutil.Process(int(attempts.read_text()))
        machine = next(each for each in stage.parents() if "multiprocessing" in " ".join(each.cmdline()))
        machine.kill()

    killer = threading.Thread(target=kill_the_machine)
    killer.start()
    record = run(pipeline, settings=settings, options=Options(scheduler=scheduler))
    killer.join()
    first, second = map(int, attempts.read_text().split())
    assert record.status == "done"
    assert record.results["only"] == {"pid": second}
    assert first != second
    assert not lives(first), "what the dead machine was doing is ended"


def test_an_interrupted_run_ends_its_stages_on_the_cluster(tmp_path: Path, settings: Settings, scheduler: str) -> None:
    pid = tmp_path / "pid"
    pipeline = one(tmp_path, f"import os, time\nopen({str(pid)!r}, 'w').write(str(os.getpid()))\ntime.sleep(120)")

    def interrupt() -> None:
        until = time.monotonic() + 90
        while not (pid.exists() and pid.read_text()) and time.monotonic() < until:
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run(pipeline, settings=settings, options=Options(scheduler=scheduler))
    until = time.monotonic() + 20
    while lives(int(pid.read_text())) and time.monotonic() < until:
        time.sleep(0.1)
    assert not lives(int(pid.read_text()))
    assert time.monotonic() - begin < 110


def test_joblib_inside_a_stage_can_use_the_same_cluster(tmp_path: Path, settings: Settings, scheduler: str) -> None:
    cell = f"""
        import os
        from distributed import Client
        from joblib import Parallel, delayed, parallel_config
        with Client({scheduler!r}, set_as_default=False) as client, parallel_config("dask", client=client):
            pids = set(Parallel()(delayed(os.getpid)() for _ in range(8)))
        from mlops_course.pipelines import record_result
        record_result(elsewhere=os.getpid() not in pids)
    """
    record = run(one(tmp_path, textwrap.dedent(cell)), settings=settings)
    assert record.results["only"] == {"elsewhere": True}


def test_a_cluster_that_is_not_there_is_named(tmp_path: Path, settings: Settings) -> None:
    with pytest.raises(ClusterError, match=r"there is no Dask scheduler at tcp://127\.0\.0\.1:9"):
        run(one(tmp_path, "1"), settings=settings, options=Options(scheduler="tcp://127.0.0.1:9"))
