"""What the tests of the service share: a workspace with two published models, and the service in real processes."""

import json
import os
import queue
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from conftest import Quarter, made_once, settings_in

from mlops_course.environment import Settings
from mlops_course.experiments import TrainingConfig, train
from mlops_course.project import flight_delay
from mlops_course.serving import Origin, materialise, publish, write_bundle

FIRST, SECOND = "flight-delay@1", "flight-delay@2"


@pytest.fixture(scope="session")
def published(quarter: Quarter, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with two bundles, the first of them live, and February's features online; no test changes it."""
    return made_once(tmp_path_factory, "published", partial(publish_two, quarter))


def publish_two(quarter: Quarter, home: Path) -> None:
    """Train two models, publish the first, and put February's features online."""
    own = quarter.fresh(home)
    rows = own.labelled("2013-01")
    origin = Origin(run_id="0f0f", data={"features": own.features}, first="2013-01", last="2013-01")
    for seed, reference in ((1, FIRST), (2, SECOND)):
        model = train(rows, flight_delay, TrainingConfig(20, leaf_samples=20, seed=seed))
        write_bundle(own.settings, flight_delay, model, rows, reference, origin)
    publish(own.settings, FIRST)
    materialise(own.settings, flight_delay, own.features, ["2013-02"])


@pytest.fixture
def home(published: Path, tmp_path: Path) -> Path:
    """A workspace of the test's own that can serve."""
    shutil.copytree(published / "serving", tmp_path / "served" / "serving")
    settings_in(tmp_path / "served")
    return tmp_path / "served"


class Running:
    """A service that was started as a user would start it."""

    def __init__(self, process: "subprocess.Popen[str]", url: str, home: Path) -> None:
        self.process, self.url, self.settings = process, url, Settings(home=home)
        self.port = int(url.rpartition(":")[2])
        self.lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.client = httpx.Client(base_url=url, timeout=30)
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        with suppress(ValueError):  # closed at the end
            for line in self.process.stderr or ():
                self.lines.put(line)

    def errors(self) -> str:
        """What it has said so far."""
        found = []
        while not self.lines.empty():
            found.append(self.lines.get())
        return "".join(found)

    def stop(self, seconds: float = 20) -> int:
        """Ask it to end; its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(seconds)

    def wait_ready(self, seconds: float = 30) -> None:
        """Until it can answer."""
        until(lambda: self.client.get("/health/ready").status_code == 200, seconds)

    def ask(self, **body: Any) -> httpx.Response:
        """Ask for one prediction."""
        return self.client.post("/predict", json=body)

    def raw(self, *parts: bytes, pause: float = 0.0, seconds: float = 20) -> tuple[int, bytes]:
        """Send bytes over a connection of their own; status and everything that came back."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=seconds) as connection:
            try:
                for part in parts:
                    connection.sendall(part)
                    time.sleep(pause)
            except (BrokenPipeError, ConnectionResetError):
                pass  # refused before everything was sent; the answer may be there all the same
            return read_answer(connection)


def read_answer(connection: socket.socket) -> tuple[int, bytes]:
    """Read one answer; status 0: the connection was closed without one."""
    data = b""
    try:
        while True:
            head, _, body = data.partition(b"\r\n\r\n")
            length = next((line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")), None)
            if b"\r\n\r\n" in data and length and len(body) >= int(length.split(b":")[1]):
                break
            part = connection.recv(65536)
            if not part:
                break
            data += part
    except ConnectionResetError:
        pass
    return (int(data.split()[1]) if data.startswith(b"HTTP/1.1 ") else 0), data


def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    """Wait for something to come true."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            pytest.fail(f"this did not come true within {seconds} seconds: {condition}")
        time.sleep(0.05)


def workers(running: Running) -> list[int]:
    """The processes that answer, in the order of their birth."""
    found = []
    for each in psutil.Process(running.process.pid).children():
        with suppress(psutil.Error):  # it has just died
            found += [each.pid] if "resource_tracker" not in " ".join(each.cmdline()) else []
    return found


@contextmanager
def serving(home: Path, *options: str, ready: bool = True) -> Iterator[Running]:
    """The command `mlops-course serve` on a free port, until the end of the block."""
    program = [sys.executable, "-c", "from mlops_course.cli import main; main()"]
    command = [*program, "serve", "--home", str(home), "--port", "0", *options]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, **pipes, start_new_session=True)
    try:
        line = process.stdout.readline() if process.stdout else ""
        if not line:
            pytest.fail(f"the service did not start: {process.stderr.read() if process.stderr else ''}")
        url = json.loads(line)["url"] if line.startswith("{") else line.strip()
        running = Running(process, url, home)
        if ready:
            running.wait_ready()
        yield running
        running.client.close()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait(10)
        for pipe in (process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()


@pytest.fixture(scope="module")
def service(published: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """One service for all tests of a file that leave it as it is."""
    own = tmp_path_factory.mktemp("service") / "workspace"
    shutil.copytree(published / "serving", own / "serving")
    with serving(own, "--limit", "seconds=2", "--limit", "body=200000", "--limit", "rows=50") as running:
        yield running
