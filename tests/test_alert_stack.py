"""The real chain: a service under load, Prometheus, Alertmanager, a message, its playbook, and the all-clear."""

import json
import re
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from service_helpers import FIRST, Running, serving, until

from mlops_course.serving.publishing import live_file

ROOT = Path(__file__).resolve().parent.parent
PROMETHEUS = ROOT / "deploy" / "prometheus"
RULES = ("rules.yml", "slo.yml", "alerts.yml")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:Series.values returning:DeprecationWarning"),  # inside pyarrow
    pytest.mark.skipif(
        not all(map(shutil.which, ("prometheus", "prometheus-alertmanager"))), reason="Prometheus is not installed"
    ),
]
SHORT = {"1m": "4s", "5m": "4s", "15m": "5s", "30m": "5s", "1h": "6s", "2h": "6s", "6h": "7s", "1d": "8s", "3d": "9s"}


def shortened(text: str) -> str:
    """The real rules with windows of seconds: nobody can wait for six hours here."""
    text = re.sub(r"\[(\w+)\]", lambda found: f"[{SHORT[found[1]]}]", text)
    return re.sub(r"for: \w+", "for: 1s", text)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class Webhook(ThreadingHTTPServer):
    """Whoever is told: keeps what Alertmanager sends."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Told)
        self.heard: list[tuple[str, str, str, str]] = []  # path, alert, status, playbook

    def said(self, path: str, alert: str, status: str) -> bool:
        return any(each[:3] == (path, alert, status) for each in self.heard)


class Told(BaseHTTPRequestHandler):
    """One message."""

    server: Webhook

    def do_POST(self) -> None:
        message = json.loads(self.rfile.read(int(self.headers["content-length"])))
        for each in message["alerts"]:
            url = each["annotations"]["runbook_url"]
            self.server.heard.append((self.path, each["labels"]["alertname"], each["status"], url))
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Silence."""


class Stack:
    """Everything that runs."""

    def __init__(self, running: Running, webhook: Webhook, prometheus: str) -> None:
        self.running, self.webhook, self.prometheus = running, webhook, prometheus

    def ask(self, path: str, **query: str) -> Any:
        answer = httpx.get(f"{self.prometheus}/api/v1/{path}", params=query)
        assert answer.status_code == 200, answer.text
        return answer.json()["data"]

    def firing(self) -> set[str]:
        return {each["labels"]["alertname"] for each in self.ask("alerts")["alerts"] if each["state"] == "firing"}


def write_configuration(folder: Path, service: str, alertmanager: int, webhook: int) -> None:
    """The real files, but for addresses and times."""
    for name in RULES:
        (folder / name).write_text(shortened((PROMETHEUS / name).read_text(encoding="utf-8")), encoding="utf-8")
    found = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text(encoding="utf-8"))
    found["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    found["alerting"]["alertmanagers"] = [{"static_configs": [{"targets": [f"127.0.0.1:{alertmanager}"]}]}]
    found["scrape_configs"] = found["scrape_configs"][:1]
    found["scrape_configs"][0]["static_configs"] = [{"targets": [service]}]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(found), encoding="utf-8")
    text = (PROMETHEUS / "alertmanager.yml").read_text(encoding="utf-8")
    text = text.replace("host.docker.internal:9099", f"127.0.0.1:{webhook}")
    text = re.sub(r"group_wait: \w+", "group_wait: 1s", text)
    (folder / "alertmanager.yml").write_text(re.sub(r"group_interval: \w+", "group_interval: 1s", text))


def start(stack: ExitStack, *command: object) -> None:
    """A program that runs until the end of the test."""
    process = subprocess.Popen([str(each) for each in command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    stack.callback(process.wait, 20)
    stack.callback(process.terminate)


def answers(url: str) -> bool:
    with suppress(httpx.TransportError):
        return httpx.get(url).status_code == 200
    return False


@pytest.fixture
def stack(home: Path, tmp_path: Path) -> Iterator[Stack]:
    """A service that has lost its live model, asked all the time, and everybody who watches it."""
    live_file(settings_of(home), FIRST).unlink()
    with ExitStack() as whole:
        webhook = Webhook()
        threading.Thread(target=webhook.serve_forever, daemon=True).start()
        whole.callback(webhook.server_close)
        whole.callback(webhook.shutdown)
        running = whole.enter_context(serving(home, "--workers", "2", ready=False))
        at, ours = free_port(), free_port()
        write_configuration(tmp_path, f"127.0.0.1:{running.port}", at, webhook.server_port)
        start(
            whole, "prometheus-alertmanager", f"--config.file={tmp_path / 'alertmanager.yml'}",
            f"--storage.path={tmp_path / 'alertmanager'}", f"--web.listen-address=127.0.0.1:{at}",
            "--cluster.listen-address=",
        )  # fmt: skip
        start(
            whole, "prometheus", f"--config.file={tmp_path / 'prometheus.yml'}",
            f"--web.listen-address=127.0.0.1:{ours}", f"--storage.tsdb.path={tmp_path / 'tsdb'}",
        )  # fmt: skip
        until(lambda: answers(f"http://127.0.0.1:{ours}/-/ready") and answers(f"http://127.0.0.1:{at}/-/ready"), 30)
        ending = threading.Event()
        asking = threading.Thread(target=keep_asking, args=(running, ending), daemon=True)
        asking.start()
        whole.callback(asking.join, 10)
        whole.callback(ending.set)
        yield Stack(running, webhook, f"http://127.0.0.1:{ours}")


def settings_of(home: Path) -> Any:
    from mlops_course.environment import Settings

    return Settings(home=home)


def keep_asking(running: Running, ending: threading.Event) -> None:
    """A client that asks ten times a second: with a row, once it knows one."""
    body: dict[str, Any] = {"record": {}}
    with httpx.Client(base_url=running.url, timeout=10) as client:
        while not ending.wait(0.1):
            with suppress(httpx.TransportError):
                if not body["record"] and client.get("/health/ready").status_code == 200:
                    body = {"record": client.get("/examples").json()[0]["record"]}
                client.post("/predict", json=body)


def panels() -> list[str]:
    found = json.loads((ROOT / "deploy" / "grafana" / "dashboards" / "serving.json").read_text(encoding="utf-8"))
    return [target["expr"] for panel in found["panels"] for target in panel["targets"]]


def test_who_is_called_does_what_the_playbook_says_and_it_is_over(stack: Stack) -> None:
    until(lambda: stack.webhook.said("/page", "NoLiveModel", "firing"), 40)
    until(lambda: "AvailabilityBudgetBurnsFast" in stack.firing(), 30)
    heard = next(each for each in stack.webhook.heard if each[1] == "NoLiveModel")
    anchor = heard[3].partition("#")[2]
    cells = json.loads((ROOT / "nbs" / "playbooks.ipynb").read_text(encoding="utf-8"))["cells"]
    texts = ["".join(cell["source"]) for cell in cells]
    book = next(text for text in texts if text.lower().startswith(f"## {anchor}\n"))
    (command,) = re.findall(r"`mlops-course (publish) flight-delay@\d+`", book)
    program = [sys.executable, "-c", "from mlops_course.cli import main; main()"]
    home = str(stack.running.settings.home)
    done = subprocess.run([*program, command, FIRST, "--home", home], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    until(lambda: stack.webhook.said("/page", "NoLiveModel", "resolved"), 40)
    until(lambda: not stack.firing() & {"NoLiveModel", "AvailabilityBudgetBurnsFast", "ServiceDown"}, 40)
    until(lambda: "serving_predictions_total" in stack.ask("label/__name__/values"))
    what_the_dashboard_asks_for_is_there(stack)


def what_the_dashboard_asks_for_is_there(stack: Stack) -> None:
    """Prometheus itself understands each query, and has each series that is asked for."""
    names = set(stack.ask("label/__name__/values"))
    for query in panels():
        stack.ask("query", query=query)
        asked = set(re.findall(r"\b(?:serving|slo:)[a-z0-9_:]+", query))
        assert asked and asked <= names | {"serving_model_failures_total"}, query
