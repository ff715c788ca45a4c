"""The image, really built and run: as nobody in particular, on a file system that can't be written to.

Nothing is pulled: unless IMAGE_TEST_BASE and IMAGE_TEST_BUILD name images, both are made from Debian's packages.
"""

import hashlib
import json
import os
import shutil
import ssl
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pandas as pd
import pytest
from conftest import settings_in

from mlops_course.environment import Settings
from mlops_course.experiments import TrainingConfig, train
from mlops_course.project import flight_delay
from mlops_course.serving import Origin, load_predictor, publish, write_bundle
from mlops_course.serving.predictions import log_folder

ROOT = Path(__file__).resolve().parent.parent
NEEDED = ("podman", "buildah", "runc", "debootstrap")
MISSING = [name for name in NEEDED if shutil.which(name) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.thorough,  # an image from nothing takes minutes; the service in it is that of all other tests
    pytest.mark.system,
    pytest.mark.skipif(
        bool(MISSING), reason=f"not installed: {', '.join(MISSING)} (Debian: apt install {' '.join(NEEDED)})"
    ),
    pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="makes its base image as root"),
    pytest.mark.skipif(not os.environ.get("IMAGE_TEST"), reason="builds images for some minutes: set IMAGE_TEST=1"),
]
IMAGE, BASE, USER = "localhost/mlops-course:test", "localhost/python:base", 10001
SUITE, PACKAGES = "bookworm", "python3,ca-certificates,python3-venv,python3-pip"
CONTAINERS = """[containers]
default_ulimits=["nofile=1024:1024","nproc=1024:1024"]
netns="host"
[engine]
runtime="runc"
cgroup_manager="cgroupfs"
"""
STORAGE = """[storage]
driver = "vfs"
graphroot = "{folder}/storage"
runroot = "{folder}/run"
"""


def run(*command: object, check: bool = True, seconds: float = 600) -> str:
    """Run a program that needs no terminal; what it printed."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, cwd=ROOT, timeout=seconds)
    assert not check or done.returncode == 0, f"{command}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
    return done.stdout.strip()


@pytest.fixture(scope="module", autouse=True)
def storage_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A place for images that nobody else uses."""
    folder = tmp_path_factory.mktemp("containers")
    (folder / "containers.conf").write_text(CONTAINERS)
    (folder / "storage.conf").write_text(STORAGE.format(folder=folder))
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("STORAGE_DRIVER", raising=False)
        patch.setenv("CONTAINERS_CONF", str(folder / "containers.conf"))
        patch.setenv("CONTAINERS_STORAGE_CONF", str(folder / "storage.conf"))
        yield folder
        run("podman", "rm", "--all", "--force", check=False)
        run("podman", "rmi", "--all", "--force", check=False)
    shutil.rmtree(folder, ignore_errors=True)


def packed_debian(folder: Path) -> Path:
    """Debian with Python and pip, in one file; it is kept outside of the project for the next time."""
    command = ["debootstrap", "--variant=minbase", f"--include={PACKAGES}", SUITE]
    name = hashlib.sha256(" ".join(command).encode()).hexdigest()[:12]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mlops_course"
    packed = cache / f"{SUITE}-{name}.tar"
    if not packed.is_file():
        quick = {**os.environ, "DPKG_FORCE": "unsafe-io"}  # nothing has to survive a power cut
        made = subprocess.run([*command, str(folder)], capture_output=True, text=True, env=quick)
        assert made.returncode == 0, f"debootstrap failed: {made.stdout[-2000:]}{made.stderr[-2000:]}"
        shutil.rmtree(folder / "var" / "cache" / "apt", ignore_errors=True)
        cache.mkdir(parents=True, exist_ok=True)
        begun = packed.with_suffix(f".{os.getpid()}")
        run("tar", "--directory", folder, "--create", "--file", begun, ".")
        begun.replace(packed)
        shutil.rmtree(folder)
    return packed


@pytest.fixture(scope="module")
def bases(storage_of_its_own: Path) -> tuple[str, str]:
    """What the service runs in, and what builds it: one image with Python and pip is both, made in half the time."""
    given = os.environ.get("IMAGE_TEST_BASE"), os.environ.get("IMAGE_TEST_BUILD")
    if all(given):
        return str(given[0]), str(given[1])
    run("podman", "import", "--quiet", packed_debian(storage_of_its_own / "root"), BASE)
    return BASE, BASE


def pip_settings(folder: Path) -> list[str]:
    """What this machine's pip needs to reach its index, as secrets for the build."""
    certificates = os.environ.get("PIP_CERT") or ssl.get_default_verify_paths().cafile or ""
    lines = ["[global]", *(["cert = /run/certificates.crt"] if Path(certificates).is_file() else [])]
    lines += [f"index-url = {os.environ['PIP_INDEX_URL']}"] if "PIP_INDEX_URL" in os.environ else []
    (folder / "pip.conf").write_text("\n".join(lines) + "\n")
    secrets = ["--secret", f"id=pip_conf,src={folder / 'pip.conf'}"]
    return secrets + (["--secret", f"id=certificates,src={certificates}"] if len(lines) > 1 else [])


@pytest.fixture(scope="module")
def image(bases: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """The image, built as the Dockerfile says."""
    base, build = bases
    secrets = pip_settings(tmp_path_factory.mktemp("pip"))
    options = ["--isolation", "chroot", "--network", "host", "--format", "docker", "--layers=false"]
    run(
        "buildah", "bud", *options, "--file", "deploy/Dockerfile", "--tag", IMAGE, "--build-arg", f"BASE_IMAGE={base}",
        "--build-arg", f"BUILD_IMAGE={build}", "--build-arg", "REVISION=0f0f0f", *secrets, ".",
    )  # fmt: skip
    return IMAGE


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """A workspace outside of the container, with a live model, that the container's user may write to."""
    settings = settings_in(tmp_path_factory.mktemp("outside") / "workspace")
    generator = np.random.default_rng(1)
    rows = pd.DataFrame({
        "carrier": generator.choice(["UA", "AA"], 3000), "origin": "JFK", "dest": "BOS",
        "hour_of_day": generator.integers(5, 23, 3000).astype(np.float32),
    })  # fmt: skip
    label = (generator.random(3000) < 0.1 + 0.02 * rows["hour_of_day"]).astype(float)
    model = train(rows.assign(label=label), flight_delay, TrainingConfig(iterations=5))
    origin = Origin(run_id="none", data={}, first="2013-01", last="2013-01")
    publish(settings, write_bundle(settings, flight_delay, model, rows, "flight-delay@1", origin))
    for path in (settings.serving, *settings.serving.rglob("*")):
        os.chown(path, USER, USER)
    return settings


@pytest.fixture(scope="module")
def container(image: str, settings: Settings) -> Iterator[tuple[str, str]]:
    """A running container: its id and its address."""
    hardened = ["--read-only", "--cap-drop", "all", "--security-opt", "no-new-privileges", "--tmpfs", "/tmp"]
    volume = ["--volume", f"{settings.serving}:/workspace/serving"]
    command = ["serve", "--port", "0", "--json", "--app", "mlops_course.deployment:release_app"]
    name = run("podman", "run", "--detach", "--no-healthcheck", *hardened, *volume, image, *command)
    end, lines = time.monotonic() + 60, ""
    while '"listening"' not in lines:
        lines = run("podman", "logs", name)
        assert time.monotonic() < end, lines
        time.sleep(0.3)
    address = next(json.loads(line)["url"] for line in lines.splitlines() if '"listening"' in line)
    while not answers(address):
        assert time.monotonic() < end, run("podman", "logs", name)
        time.sleep(0.3)
    yield name, address
    run("podman", "rm", "--force", name, check=False)


def answers(address: str) -> bool:
    try:
        return httpx.get(f"{address}/health/ready", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


def inside(container: tuple[str, str], *command: str) -> subprocess.CompletedProcess[str]:
    """Run something in the container."""
    return subprocess.run(["podman", "exec", container[0], *command], capture_output=True, text=True)


def test_a_request_is_answered_from_inside_as_outside(container: tuple[str, str], settings: Settings) -> None:
    record = {"carrier": "UA", "origin": "JFK", "dest": "BOS", "hour_of_day": 17.0}
    answer = httpx.post(f"{container[1]}/predict", json={"record": record})
    assert answer.status_code == 200, answer.text
    predictor = load_predictor(settings.serving / "bundles" / "flight-delay@1")
    assert answer.json()["score"] == pytest.approx(float(predictor.scores(predictor.encode([record]))[0]), abs=1e-6)
    assert answer.json()["model"] == "flight-delay@1"
    folder = log_folder(settings, flight_delay.name)
    written = [path.read_text() for path in folder.iterdir()]
    assert any(answer.json()["request_id"] in text for text in written), "the prediction is on the disk outside"


def test_it_runs_as_nobody_and_can_write_only_where_it_must(container: tuple[str, str]) -> None:
    assert inside(container, "id", "-u").stdout.strip() == str(USER)
    status = inside(container, "cat", "/proc/1/status").stdout
    assert [line.split()[1] for line in status.splitlines() if line.startswith("CapEff")] == ["0" * 16]
    for place in ("/", "/opt/mlops_course", "/etc", "/usr/bin"):
        assert inside(container, "touch", f"{place}/mine").returncode != 0
    for place in ("/tmp", "/workspace", "/workspace/serving"):
        assert inside(container, "touch", f"{place}/mine").returncode == 0


def test_its_own_health_check_finds_it_well_and_ill(container: tuple[str, str], image: str) -> None:
    (about,) = json.loads(run("podman", "image", "inspect", image))
    kind, *command = about["Healthcheck"]["Test"]
    assert kind == "CMD"
    port = container[1].rsplit(":", 1)[1]
    assert inside(container, *[part.replace("8000", port) for part in command]).returncode == 0
    assert inside(container, *[part.replace("8000", "1") for part in command]).returncode != 0


def test_it_holds_only_what_serving_needs(container: tuple[str, str], image: str, bases: tuple[str, str]) -> None:
    for name in ("pandas", "sklearn", "mlflow", "pip", "setuptools", "pytest"):
        assert inside(container, "/opt/mlops_course/bin/python", "-c", f"import {name}").returncode != 0, name
    whole, base = (int(run("podman", "image", "inspect", "--format", "{{.Size}}", name)) for name in (image, bases[0]))
    assert whole - base < 250e6
    (about,) = json.loads(run("podman", "image", "inspect", image))
    assert about["Config"]["Labels"]["org.opencontainers.image.revision"] == "0f0f0f"
    assert about["Config"]["User"] == f"{USER}:{USER}"
    state = inside(
        container, "python", "-c", "from mlops_course.environment import fingerprint; print(fingerprint()['commit'])"
    )
    assert state.stdout.strip() == "0f0f0f"


def test_a_bundle_is_published_from_a_read_only_place_as_in_a_pod(image: str, settings: Settings) -> None:
    models = f"{settings.serving / 'bundles'}:/models:ro"
    told = run(
        "podman",
        "run",
        "--rm",
        "--no-healthcheck",
        "--read-only",
        "--volume",
        models,
        image,
        "publish",
        "/models/flight-delay@1",
    )
    assert told.splitlines()[-1] == "flight-delay@1 is live"


def test_it_ends_when_it_is_told_to(image: str, container: tuple[str, str]) -> None:
    run("podman", "stop", "--time", "30", container[0])
    (about,) = json.loads(run("podman", "container", "inspect", container[0]))
    assert about["State"]["ExitCode"] == 0
