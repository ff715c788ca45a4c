"""A service with releases, started and ended as an operator does it."""

import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import httpx
import psutil

from mlops_course.environment import Settings

COMMAND = [sys.executable, "-c", "from mlops_course.cli import main; main()"]


@dataclass
class Server:
    """A running service with two workers."""

    settings: Settings
    process: subprocess.Popen[str]
    url: str

    def workers(self) -> list[psutil.Process]:
        """The processes that answer."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        return [each for each in children if "resource_tracker" not in " ".join(each.cmdline())]


@contextlib.contextmanager
def serving(settings: Settings, workers: int = 2, *options: str) -> Iterator[Server]:
    """Start the service, and end it as an operator would."""
    command = [*COMMAND, "serve", "--port", "0", "--workers", str(workers), "--json"]
    command += ["--app", "mlops_course.deployment:release_app", "--home", str(settings.home)]
    command += ["--limit", "rate=100000", *options]  # all requests come from one address
    with (settings.home / "service.log").open("a") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
    assert process.stdout is not None
    try:
        url = json.loads(process.stdout.readline())["url"]
        wait_until(lambda: ready(url), 60)
        yield Server(settings, process, url)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        finally:
            process.kill()
            process.stdout.close()


def ready(url: str) -> bool:
    """Whether the service answers."""
    try:
        return httpx.get(f"{url}/health/ready", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


def wait_until(condition: Callable[[], bool], seconds: float) -> None:
    """Wait for something that must happen."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.1)
