"""The processes that serve: started, killed, replaced, swapped under load, and ended with what they were at."""

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from kill_helpers import lives
from service_helpers import FIRST, SECOND, Running, serving, until, workers

from mlops_course.commands.serve import about_service
from mlops_course.environment import Settings
from mlops_course.serving import publish
from mlops_course.serving.predictions import log_folder, read_segment
from mlops_course.serving.publishing import live_file

pytestmark = pytest.mark.filterwarnings("ignore:Series.values returning:DeprecationWarning")  # inside pyarrow


class Load:
    """Clients that ask without a pause, each over its own connections, until the end of the block."""

    def __init__(self, running: Running, clients: int = 4) -> None:
        self.running, self.stopping = running, threading.Event()
        self.record = running.client.get("/examples").json()[0]["record"]
        self.answered: list[str] = []  # ids
        self.models: Counter[str] = Counter()
        self.failed: list[str] = []
        self.threads = [threading.Thread(target=self._ask, daemon=True) for _ in range(clients)]

    def _ask(self) -> None:
        with httpx.Client(base_url=self.running.url, timeout=30) as client:
            while not self.stopping.is_set():
                try:
                    answer = client.post("/predict", json={"record": self.record})
                except httpx.TransportError as error:
                    self.failed.append(type(error).__name__)
                    continue
                if answer.status_code == 200:
                    self.answered.append(answer.json()["request_id"])
                    self.models[answer.json()["model"]] += 1
                else:
                    self.failed.append(answer.text)

    def __enter__(self) -> "Load":
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopping.set()
        for thread in self.threads:
            thread.join(30)


def logged(running: Running) -> list[str]:
    folder = log_folder(running.settings, "flight-delay")
    return [each.id for path in folder.iterdir() for each in read_segment(path)[0]]


@pytest.mark.slow
def test_a_model_is_swapped_twenty_times_under_load_and_no_request_fails(home: Path) -> None:
    with serving(home) as running:
        with Load(running) as load:
            for number in range(20):
                reference = SECOND if number % 2 == 0 else FIRST
                before = load.models[reference]
                publish(running.settings, reference)
                until(lambda: load.models[reference] > before)  # noqa: B023
        assert load.failed == []
        assert sorted(load.answered) == sorted(logged(running)), "each prediction is there, and once"


def test_a_killed_worker_is_replaced_and_what_it_answered_is_there(home: Path) -> None:
    with serving(home, "--workers", "2") as running:
        until(lambda: len(workers(running)) == 2)
        with Load(running) as load:
            until(lambda: len(load.answered) > 200)
            victim = workers(running)[0]
            os.kill(victim, signal.SIGKILL)
            until(lambda: victim not in workers(running) and len(workers(running)) == 2)
            seen = len(load.answered)
            until(lambda: len(load.answered) > seen + 200)
        assert all("Error" in each for each in load.failed), load.failed[:3]
        assert len(load.failed) <= 20, "only what the dead one was at, or was given in the moment of its death"
        assert running.stop() == 0
        found = logged(running)
        assert set(load.answered) <= set(found)
        assert len(found) - len(load.answered) <= 8, "a prediction that was written, and never answered"


@pytest.mark.slow
def test_counts_of_all_workers_are_added_and_outlive_them(home: Path) -> None:
    with serving(home, "--workers", "2") as running:

        def count(pattern: str) -> float:
            with httpx.Client(base_url=running.url) as client:
                text = client.get("/metrics").text
            return sum(float(each) for each in re.findall(rf"^{pattern} ([\d.e+]+)$", text, re.MULTILINE))

        until(lambda: count("serving_ready") == 2)
        record = running.client.get("/examples").json()[0]["record"]
        for _ in range(40):
            with httpx.Client(base_url=running.url) as client:  # a connection of its own: any worker may get it
                assert client.post("/predict", json={"record": record}).status_code == 200
        answers = r'serving_requests_total\{method="POST",path="/predict",status="200"\}'
        assert count(answers) == 40
        os.kill(workers(running)[0], signal.SIGKILL)
        until(lambda: count("serving_ready") == 2 and len(workers(running)) == 2)
        assert count(answers) == 40


def test_asked_to_end_it_finishes_what_it_is_at(home: Path) -> None:
    with serving(home) as running:
        record = running.client.get("/examples").json()[0]["record"]
        body = json.dumps({"record": record}).encode()
        with socket.create_connection(("127.0.0.1", running.port), timeout=20) as connection:
            head = b"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
            connection.sendall(head % len(body) + body[:100])
            time.sleep(0.3)
            running.process.send_signal(signal.SIGTERM)
            until(lambda: refuses(running.port))
            connection.sendall(body[100:])
            assert connection.recv(65536).startswith(b"HTTP/1.1 200")
        assert running.process.wait(20) == 0
        assert len(logged(running)) == 1


class Visitors:
    """Clients that ask without a pause until nobody listens; every second one over a new connection each time."""

    def __init__(self, running: Running, number: int = 12) -> None:
        self.port, self.answered = running.port, 0
        record = running.client.get("/examples").json()[0]["record"]
        self.body = json.dumps({"record": record}).encode()
        self.lost: list[str] = []
        self.threads = [threading.Thread(target=self._visit, args=(each % 2 == 0,)) for each in range(number)]
        for thread in self.threads:
            thread.start()

    def _visit(self, keep: bool) -> None:
        while True:
            client = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
            try:
                client.connect()
            except ConnectionRefusedError:
                return
            last = False
            while not last:
                try:
                    client.request("POST", "/predict", self.body, {"Content-Type": "application/json"})
                    response = client.getresponse()
                    response.read()
                except (OSError, http.client.HTTPException) as error:
                    self.lost.append(repr(error))
                    break
                self.answered += response.status == 200
                self.lost += [] if response.status == 200 else [f"status {response.status}"]
                last = response.getheader("connection") == "close" or not keep
            client.close()

    def join(self) -> None:
        """Wait until each has found nobody."""
        for thread in self.threads:
            thread.join(40)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the system can't be told to let nobody in")
@pytest.mark.parametrize("count", ["1", "3"])
def test_asked_to_end_amid_many_clients_it_loses_none(home: Path, count: str) -> None:
    with serving(home, "--workers", count) as running:
        visitors = Visitors(running)
        until(lambda: visitors.answered > 300)
        assert running.stop() == 0
        visitors.join()
        assert visitors.lost == []
        assert visitors.answered <= len(logged(running)) <= visitors.answered + 1  # and the one who only looked


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the system can't be told to let nobody in")
@pytest.mark.slow
def test_workers_that_are_replaced_in_turn_lose_none(home: Path) -> None:
    with serving(home, "--workers", "2") as running:
        until(lambda: len(workers(running)) == 2)
        before, visitors = workers(running), Visitors(running)
        until(lambda: visitors.answered > 100)
        running.process.send_signal(signal.SIGHUP)
        until(lambda: not {*before} & {*workers(running)}, 180)
        seen = visitors.answered
        until(lambda: visitors.answered > seen + 100)
        assert running.stop() == 0
        visitors.join()
        assert visitors.lost == []


def test_a_client_that_is_silent_may_ask_once_more_and_is_told_that_it_was_the_last_time(home: Path) -> None:
    with serving(home) as running:
        client = http.client.HTTPConnection("127.0.0.1", running.port, timeout=30)
        client.request("GET", "/health/live")
        assert client.getresponse().read()
        idle = socket.create_connection(("127.0.0.1", running.port))
        running.process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        client.request("GET", "/health/live")
        response = client.getresponse()
        assert (response.status, response.getheader("connection")) == (200, "close")
        assert idle.recv(1) == b"", "who says nothing is let go"
        assert running.process.wait(20) == 0


def refuses(port: int) -> bool:
    with socket.socket() as attempt:
        return attempt.connect_ex(("127.0.0.1", port)) != 0


@pytest.mark.parametrize("count", ["1", "2"])
def test_asked_to_end_it_ends_with_status_0_and_leaves_nobody(home: Path, count: str) -> None:
    with serving(home, "--workers", count) as running:
        family = [running.process.pid, *(each.pid for each in psutil.Process(running.process.pid).children(True))]
        assert running.stop() == 0
        until(lambda: not any(map(lives, family[1:])))
        assert refuses(running.port)


def test_without_their_supervisor_the_workers_end_as_well(home: Path) -> None:
    with serving(home, "--workers", "2") as running:
        until(lambda: len(workers(running)) == 2)
        found = workers(running)
        folder = Path(psutil.Process(found[0]).environ()["PROMETHEUS_MULTIPROC_DIR"])
        assert list(folder.iterdir())
        running.process.kill()
        running.process.wait(10)
        until(lambda: not any(map(lives, found)))
        assert not folder.exists(), "where they counted together"
        assert refuses(running.port), "the address is free for the next one"


def run_serve(*options: str) -> "subprocess.CompletedProcess[str]":
    program = [sys.executable, "-c", "from mlops_course.cli import main; main()"]
    return subprocess.run([*program, "serve", *options], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("count", ["1", "2"])
def test_a_port_that_is_taken_is_said_in_one_line(tmp_path: Path, count: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = run_serve("--home", str(tmp_path), "--port", port, "--workers", count)
    assert (done.returncode, done.stdout) == (1, "")
    assert f"port {port} of 127.0.0.1 is in use" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1"])
def test_where_others_can_reach_it_it_serves_only_when_that_is_wanted(tmp_path: Path, host: str) -> None:
    done = run_serve("--home", str(tmp_path), "--host", host)
    assert (done.returncode, done.stdout) == (1, "")
    assert f"others can reach {host}, and nobody has to show a key" in done.stderr
    assert "--insecure" in done.stderr


def test_others_can_reach_it_when_that_is_wanted(home: Path) -> None:
    with serving(home, "--host", "0.0.0.0", "--insecure", ready=False) as running:
        until(lambda: httpx.get(f"http://127.0.0.1:{running.port}/health/live").status_code == 200)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--port", "99999"], "can't listen"),
        (["--host", "no.such.host.invalid"], "can't listen"),
        (["--workers", "0"], "0 workers"),
        (["--limit", "rows=many"], "the limit rows"),
        (["--app", "no.such:app"], "there is no app"),
        (["--app", "nonsense"], "there is no app"),
        (["--app", "mlops_course.deployment"], "is not a function"),
    ],
)
def test_what_cannot_be_started_is_said_in_one_line(tmp_path: Path, options: list[str], words: str) -> None:
    done = run_serve("--home", str(tmp_path), *options)
    assert (done.returncode, done.stdout) == (1, "")
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr


def test_who_starts_a_service_is_told_what_it_can_do(settings: Settings) -> None:
    ours, theirs = about_service(settings, None), about_service(settings, "my_desk:build")
    assert "a page to try it" in ours and f"No model is live in {settings.home} yet" in ours
    assert theirs == "Ctrl-C ends the service."
    live_file(settings, "flight-delay@1").parent.mkdir(parents=True, exist_ok=True)
    live_file(settings, "flight-delay@1").write_text("{}", encoding="utf-8")
    assert "No model" not in about_service(settings, "mlops_course.deployment:release_app")


def test_the_module_of_an_app_may_lie_where_the_service_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_desk.py").write_text("def build(settings, limits):\n    raise SystemExit('built here')\n")
    monkeypatch.chdir(tmp_path)
    assert "built here" in run_serve("--home", str(tmp_path), "--app", "my_desk:build").stderr


def test_for_programs_each_line_of_the_log_is_a_document(home: Path) -> None:
    with serving(home, "--json") as running:
        running.stop()
        time.sleep(0.2)
        lines = [json.loads(line) for line in running.errors().splitlines()]
    assert any(line["message"] == f"{FIRST} answers from now on" for line in lines)


def test_it_listens_to_this_machine_only(home: Path) -> None:
    with serving(home) as running:
        assert running.url.startswith("http://127.0.0.1:")
        listening = [each for each in psutil.Process(running.process.pid).net_connections() if each.status == "LISTEN"]
        assert [each.laddr.ip for each in listening] == ["127.0.0.1"]


ONE_ANSWER = """
import sys
from pathlib import Path
from mlops_course.environment import Settings
from mlops_course.serving import load_predictor, live_bundle
import mlops_course.serving.server, mlops_course.serving.app
predictor = load_predictor(live_bundle(Settings(home=Path(sys.argv[1]))))
record = {each.name: each.typical for each in predictor.manifest.features}
assert 0 < predictor.scores(predictor.encode([record]))[0] < 1
print(*sys.modules)
"""


def test_serving_a_model_imports_nothing_that_training_needs(home: Path) -> None:
    done = subprocess.run([sys.executable, "-c", ONE_ANSWER, str(home)], capture_output=True, text=True, check=True)
    tops = {name.split(".")[0] for name in done.stdout.split()}
    assert {"onnx", "onnxruntime"} <= tops, "the model was looked at, and asked"
    heavy = {"pandas", "sklearn", "scipy", "mlflow", "pyarrow", "deltalake", "skl2onnx", "papermill"}
    assert tops & heavy == set()


@pytest.mark.slow
def test_many_requests_while_models_are_swapped_and_workers_killed(root: Path, home: Path) -> None:
    """A small run of the script that sends half a million."""
    command = [sys.executable, str(root / "benchmarks" / "load_serving.py"), "--home", str(home)]
    command += ["--requests", "20000", "--swaps", "4"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_worker_is_small(home: Path) -> None:
    with serving(home) as running:
        record: dict[str, Any] = running.client.get("/examples").json()[0]["record"]
        for _ in range(100):
            running.ask(record=record)
        assert psutil.Process(running.process.pid).memory_info().rss < 250e6
