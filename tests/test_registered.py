"""Bundles out of MLflow: a real tracking server, a champion that changes, and whatever should be refused."""

import base64
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from conftest import Quarter, free_port, settings_in
from lock_helpers import WITHOUT_OTHERS, modules_beside

from mlops_course.delivery.delivering import deliver, undo_delivery
from mlops_course.delivery.gate import GateDecision
from mlops_course.delivery.sign_off import approve, write_gate_report
from mlops_course.environment import Settings
from mlops_course.experiments import TrainingConfig, find_tracked_run, quiet_mlflow, train_run
from mlops_course.project import flight_delay
from mlops_course.registry import package, register
from mlops_course.registry.shared_bundles import log_bundle, share_bundle
from mlops_course.security.signing import trusted
from mlops_course.security.vouching import voucher
from mlops_course.serving import BundleError, load_predictor, read_bundle
from mlops_course.serving.bundle import MANIFEST_FILE, SIGNATURE_FILE, write_manifest
from mlops_course.serving.registered import BUNDLE_TAG, fetch_registered
from mlops_course.storage import file_sha256

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="MLflow's server wants a process group to be ended"),
]
JANUARY, FEBRUARY = "2013-01", "2013-02"
FIRST, SECOND, THIRD = (f"flight-delay@{number}" for number in (1, 2, 3))
CHAMPION = "models:/flight-delay@champion"
PROMOTE = GateDecision("promote", "better, and no guard broken", ())


@contextmanager
def tracking_server(home: Path) -> Iterator[str]:
    """MLflow's own server, which keeps the files of runs itself; its address."""
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{home}/mlflow.db", "--artifacts-destination", f"{home}/artifacts"]
    variables = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    with (home / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=variables, start_new_session=True)
    try:
        yield wait_for(process, f"http://127.0.0.1:{port}")
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_for(process: "subprocess.Popen[bytes]", address: str) -> str:
    """The address, once it answers."""
    end = time.monotonic() + 300
    while time.monotonic() < end:
        try:
            urllib.request.urlopen(f"{address}/health", timeout=5).close()
            return address
        except OSError:
            assert process.poll() is None, "the server ended at once"
            time.sleep(0.2)
    raise AssertionError("the server doesn't answer")


@dataclass(frozen=True)
class Production:
    """Where models are made and delivered: a workspace whose tracking store is a server."""

    settings: Settings
    kept: Path  # the folder of the server
    train: Callable[[int], str]  # another model, registered; its version

    def file(self, reference: str, name: str) -> Path:
        """A file of a bundle, where the server keeps it."""
        run_id = read_bundle(self.settings.serving / "bundles" / reference).run_id
        (found,) = self.kept.glob(f"artifacts/*/{run_id}/artifacts/bundle/{name}")
        return found

    def deliver(self, reference: str, replaces: str | None) -> list[str]:
        """Judge, approve and deliver a version, signed; what was done."""
        package(self.settings, flight_delay, reference)
        write_gate_report(self.settings, reference, PROMOTE, replaces)
        approve(self.settings, reference, "I have read the report", by="eve")
        return self.again(reference)

    def again(self, reference: str) -> list[str]:
        """Deliver what was approved."""
        return deliver(self.settings, flight_delay, reference, "better", attest=voucher(flight_delay))


@pytest.fixture(scope="module")
def production(quarter: Quarter, empty_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Production]:
    base = tmp_path_factory.mktemp("production")
    kept = base / "server"
    kept.mkdir()
    shutil.copy(empty_store, kept)
    with tracking_server(kept) as address:
        own = quarter.fresh(base / "workspace").settings
        settings = own.model_copy(update={"tracking_uri": address, "trust": base / "trust"})

        def train(iterations: int) -> str:
            data = (quarter.features, quarter.rows, JANUARY, FEBRUARY)
            config = TrainingConfig(iterations=iterations)
            return register(settings, flight_delay, train_run(settings, flight_delay, *data, config))

        found = Production(settings, kept, train)
        assert found.deliver(train(3), None)[:2] == [f"{FIRST} is signed", f"the bundle of {FIRST} is in MLflow"]
        yield found
    quiet_mlflow().set_tracking_uri(quarter.settings.tracking)


@pytest.fixture
def pod(production: Production, tmp_path: Path) -> Settings:
    """A workspace in which nothing is; it knows the tracking server, and whose signature counts."""
    (tmp_path / "trusted").mkdir()
    shutil.copy(production.settings.trust / "verifying_key.pem", tmp_path / "trusted")
    empty = settings_in(tmp_path / "pod")
    return empty.model_copy(update={"tracking_uri": production.settings.tracking, "trust": tmp_path / "trusted"})


def course(settings: Settings, *arguments: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    """A command, where no package is that the service's image lacks."""
    code = f"{WITHOUT_OTHERS}\nfrom mlops_course.cli import main\nsys.argv = ['mlops-course', *sys.argv[2:]]\nmain()"
    blocked = modules_beside("serving.lock")
    assert {"mlflow", "pandas", "httpx", "requests", "boto3"} <= set(blocked)
    where = {"HOME": settings.home, "TRUST": settings.trust, "TRACKING_URI": settings.tracking}
    environment = {**os.environ, **{f"MLOPS_COURSE_{name}": str(value) for name, value in where.items()}, **variables}
    command = [sys.executable, "-c", code, json.dumps(blocked), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


def refused(settings: Settings, address: str = CHAMPION, signed: bool = True) -> str:
    """What somebody is told who fetches in vain; nothing is left of the attempt."""
    with pytest.raises(BundleError) as caught:
        fetch_registered(settings, address, trusted(settings) if signed else None)
    assert [each.name for each in settings.home.iterdir() if each.name.startswith(".fetch")] == []
    assert not (settings.serving / "bundles").exists()
    return str(caught.value)


@contextmanager
def changed(path: Path, content: bytes) -> Iterator[None]:
    """Another content in a file of the server, for a while."""
    before = path.read_bytes()
    path.write_bytes(content)
    try:
        yield
    finally:
        path.write_bytes(before)


# ---------------------------------------------------------------- by its alias


def test_the_registry_alone_is_enough_to_serve_the_champion(production: Production, pod: Settings) -> None:
    """As in a pod: the image has no MLflow, and the workspace is empty."""
    version = read_bundle(production.settings.serving / "bundles" / FIRST)
    run = find_tracked_run(production.settings, flight_delay, version.run_id)
    assert run.info.artifact_uri.startswith("mlflow-artifacts:"), "the server has the files, not this machine"
    said = course(pod, "publish", CHAMPION)
    assert (said.returncode, said.stdout) == (0, f"{FIRST} is live\n"), said.stderr
    folder = pod.serving / "bundles" / FIRST
    assert load_predictor(folder, verify=trusted(pod)).reference == FIRST
    delivered = production.settings.serving / "bundles" / FIRST
    assert {each.name: each.read_bytes() for each in folder.iterdir()} == {
        each.name: each.read_bytes() for each in delivered.iterdir()
    }
    again = course(pod, "fetch-bundle", "models:/flight-delay/1")
    assert (again.returncode, again.stdout) == (0, f"{FIRST} is here\n"), again.stderr


def test_who_starts_after_the_alias_has_moved_gets_the_new_champion(production: Production, pod: Settings) -> None:
    done = production.deliver(production.train(5), FIRST)
    assert f"the bundle of {SECOND} is in MLflow" in done
    assert done.index(f"the bundle of {SECOND} is in MLflow") < done.index(f"{SECOND} is champion, after {FIRST}")
    assert production.again(SECOND) == [], "once"
    assert fetch_registered(pod, CHAMPION, trusted(pod)).name == SECOND
    assert fetch_registered(pod, "models:/flight-delay@previous", trusted(pod)).name == FIRST
    assert fetch_registered(pod, f"models:/{SECOND}").name == SECOND
    undo_delivery(production.settings, flight_delay, "complaints", SECOND, attest=voucher(flight_delay))
    assert fetch_registered(pod, CHAMPION, trusted(pod)).name == FIRST


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("models:/flight-delay@nobody", "there is no model flight-delay@nobody at http://"),
        ("models:/flight-delay/77", "there is no model flight-delay@77 at http://"),
        ("models:/bike-demand@champion", "there is no model bike-demand@champion at http://"),
        ("models:/flight-delay", "doesn't name a registered model. Write models:/NAME@champion"),
        ("models:/../x@champion", "doesn't name a registered model. Write models:/NAME@champion"),
    ],
)
def test_what_is_not_there_is_named(pod: Settings, address: str, told: str) -> None:
    assert told in refused(pod, address)


def test_a_version_without_a_bundle_says_how_to_add_one(production: Production, pod: Settings) -> None:
    third = production.train(7)
    told = refused(pod, f"models:/{third}", signed=False)
    command = f"mlops-course models log-bundle {third}"
    assert f"{third} has no bundle in MLflow at {pod.tracking}" in told and command in told
    package(production.settings, flight_delay, third)
    where = {"HOME": str(production.settings.home), "TRACKING_URI": pod.tracking}
    said = subprocess.run(
        [sys.executable, "-c", "from mlops_course.cli import main; main()", *command.split()[1:]],
        capture_output=True, text=True, timeout=300,
        env={**os.environ, **{f"MLOPS_COURSE_{name}": value for name, value in where.items()}},
    )  # fmt: skip
    assert said.returncode == 0 and said.stdout.startswith(f"{third} is in MLflow"), said.stderr
    assert "isn't signed" in refused(pod, f"models:/{third}"), "nobody has vouched for it yet"
    assert fetch_registered(pod, f"models:/{third}").name == third


@pytest.mark.parametrize("name", ["model.onnx", "bundle.json", "golden.json", "MODEL_CARD.md", "model.sig"])
def test_a_file_that_was_changed_at_the_server_is_named(production: Production, pod: Settings, name: str) -> None:
    path = production.file(FIRST, name)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    with changed(path, bytes(content)):
        told = refused(pod, "models:/flight-delay/1")
        assert f"bundle/{name} is damaged" in told and f"models log-bundle {FIRST}" in told
        log_bundle(production.settings, flight_delay, production.settings.serving / "bundles" / FIRST)
        assert fetch_registered(pod, "models:/flight-delay/1", trusted(pod)).name == FIRST, "the remedy helps"


def test_who_changes_tags_as_well_finds_the_manifest_and_then_the_signature(
    production: Production, pod: Settings
) -> None:
    folder, client = production.settings.serving / "bundles" / FIRST, quiet_mlflow().MlflowClient()
    card, manifest = (production.file(FIRST, name) for name in ("MODEL_CARD.md", MANIFEST_FILE))
    about = read_bundle(folder)
    files = {name: (folder / name).read_bytes() for name in about.files} | {"MODEL_CARD.md": b"Trust me."}

    def tell(path: Path) -> None:
        client.set_tag(about.run_id, BUNDLE_TAG + path.name, file_sha256(path))

    try:
        with changed(card, b"Trust me."):
            tell(card)
            assert "bundle/MODEL_CARD.md is damaged" in refused(pod, "models:/flight-delay/1")
            with changed(manifest, write_manifest(about, files)):
                tell(manifest)
                told = refused(pod, "models:/flight-delay/1")
                assert "bundle/MODEL_CARD.md isn't what was signed" in told
    finally:
        assert share_bundle(production.settings, flight_delay, folder), "its tags say that it is another one"
    assert fetch_registered(pod, "models:/flight-delay/1", trusted(pod)).name == FIRST


def test_a_file_that_is_gone_or_is_none_of_a_bundle(production: Production, pod: Settings) -> None:
    path, client = production.file(FIRST, SIGNATURE_FILE), quiet_mlflow().MlflowClient()
    run_id = read_bundle(production.settings.serving / "bundles" / FIRST).run_id
    client.set_tag(run_id, f"{BUNDLE_TAG}evil.py", "0" * 64)
    assert "evil.py of flight-delay@1 isn't a file of a bundle" in refused(pod, "models:/flight-delay/1")
    client.delete_tag(run_id, f"{BUNDLE_TAG}evil.py")
    away = path.rename(path.with_name("away"))
    told = refused(pod, "models:/flight-delay/1")
    away.rename(path)
    assert f"/{SIGNATURE_FILE}" in told and pod.tracking in told


def test_what_was_published_here_under_that_name_must_be_the_same(production: Production, pod: Settings) -> None:
    other = pod.model_copy(update={"tracking_uri": f"sqlite:///{pod.home}/mlflow.db"})
    about = read_bundle(production.settings.serving / "bundles" / FIRST)
    folder = production.settings.serving / "bundles" / FIRST
    strange = pod.home / "strange"
    shutil.copytree(folder, strange)
    files = {name: (folder / name).read_bytes() for name in about.files} | {"MODEL_CARD.md": b"Another."}
    (strange / "MODEL_CARD.md").write_bytes(b"Another.")
    (strange / MANIFEST_FILE).write_bytes(write_manifest(about, files))
    said = course(other, "publish", str(strange), "--unsigned")
    assert said.returncode == 0, said.stderr
    with pytest.raises(BundleError, match="a published version never changes"):
        fetch_registered(pod, "models:/flight-delay/1", trusted(pod))


# ---------------------------------------------------------------- no server, another one, a strange one


def test_without_a_server_nobody_can_be_asked(pod: Settings) -> None:
    for address in (None, "sqlite:////tmp/x.db", "postgresql://ann:s3cret@db/mlflow"):
        told = refused(pod.model_copy(update={"tracking_uri": address}))
        assert "Set MLOPS_COURSE_TRACKING_URI to an address such as" in told and "s3cret" not in told
    silent = f"http://ann:s3cret@127.0.0.1:{free_port()}"
    said = course(pod.model_copy(update={"tracking_uri": silent}), "publish", CHAMPION)
    (line,) = said.stderr.strip().splitlines()
    assert said.returncode == 1 and "no answer from http://127.0.0.1:" in line and "s3cret" not in line


@contextmanager
def strange_server(*replies: tuple[int, dict[str, str], bytes]) -> Iterator[tuple[str, list[str | None]]]:
    """A server that gives these answers in turn; its address, and what each request says of who asks."""
    seen: list[str | None] = []

    class Strange(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, headers, body = replies[len(seen)]
            seen.append(self.headers["Authorization"])
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *about: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Strange) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", seen
        server.shutdown()


def at(address: str, home: Path) -> Settings:
    return settings_in(home).model_copy(update={"tracking_uri": address})


def test_who_asks_is_told_to_the_tracking_server_and_to_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "t0ken")
    with strange_server((401, {}, b"")) as (elsewhere, heard):
        with strange_server((302, {"Location": elsewhere}, b"")) as (address, seen):
            told = refused(at(address, tmp_path / "one"), signed=False)
        assert (seen, heard) == (["Bearer t0ken"], [None])
        assert "answers 401" in told and "MLFLOW_TRACKING_TOKEN" in told and "t0ken" not in told
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "ann")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "s3cret")
    for user, expected in (("", b"ann:s3cret"), ("bob:pass%40@", b"bob:pass@")):
        with strange_server((403, {}, b"")) as (address, seen):
            refused(at(address.replace("//", f"//{user}"), tmp_path / "two"), signed=False)
        assert seen == [f"Basic {base64.b64encode(expected).decode()}"]


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (b"<html>Welcome</html>", "doesn't answer as MLflow does"),
        (b'{"model_version": {"version": 3}}', "doesn't answer as MLflow does"),
        (b"[" * 100_000, "doesn't answer as MLflow does"),
        (b" " * 4_000_001, "has more than 4000000 bytes"),
    ],
)
def test_another_kind_of_server_is_found_out(tmp_path: Path, body: bytes, told: str) -> None:
    with strange_server((200, {}, body)) as (address, _):
        assert told in refused(at(address, tmp_path / "pod"), signed=False)
