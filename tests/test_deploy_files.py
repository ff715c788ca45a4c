"""The files in deploy: each is checked by the tool that will read it, or against the service that it speaks of."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml

from mlops_course.deployment import release_app
from mlops_course.environment import Settings
from mlops_course.experiments import TrainingConfig, train
from mlops_course.project import flight_delay
from mlops_course.serving import Origin, publish, write_bundle
from mlops_course.serving.app import PATHS
from mlops_course.serving.limits import Limits
from mlops_course.serving.metrics import Metrics, expose

ROOT = Path(__file__).resolve().parent.parent
DEPLOY = ROOT / "deploy"
OVERLAYS = ("local", "production", "canary")
Document = dict[str, Any]


def program(name: str) -> str:
    """A program of the environment or the machine; the test is skipped where there is none (make system)."""
    found = shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def run(*command: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, cwd=ROOT)


# ---------------------------------------------------------------- Kubernetes


@pytest.fixture(scope="module", params=OVERLAYS)
def overlay(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """One overlay as kustomize builds it: its name, and the file."""
    built = run(program("kubectl"), "kustomize", DEPLOY / "kubernetes" / "overlays" / request.param)
    assert built.returncode == 0, built.stderr
    path = tmp_path_factory.mktemp("built") / f"{request.param}.yaml"
    path.write_text(built.stdout, encoding="utf-8")
    return request.param, path


def documents(overlay: tuple[str, Path]) -> list[Document]:
    return list(yaml.safe_load_all(overlay[1].read_text(encoding="utf-8")))


def of_kind(found: list[Document], kind: str) -> list[Document]:
    return [each for each in found if each["kind"] == kind]


def containers(found: list[Document]) -> list[Document]:
    pods = [each["spec"]["template"]["spec"] for each in of_kind(found, "Deployment")]
    return [container for pod in pods for container in [*pod.get("initContainers", []), *pod["containers"]]]


def test_kubernetes_accepts_every_manifest(overlay: tuple[str, Path]) -> None:
    checked = run(program("kubernetes-validate"), "--strict", overlay[1])
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_every_container_is_confined_and_bounded(overlay: tuple[str, Path]) -> None:
    found = documents(overlay)
    for pod in (each["spec"]["template"]["spec"] for each in of_kind(found, "Deployment")):
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["automountServiceAccountToken"] is False
    assert len(containers(found)) == 2
    for each in containers(found):
        assert each["securityContext"] == {
            "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]},
        }  # fmt: skip
        assert {"cpu", "memory"} == set(each["resources"]["limits"]) == set(each["resources"]["requests"])


def test_the_image_is_named_with_a_version(overlay: tuple[str, Path]) -> None:
    images = {each["image"] for each in containers(documents(overlay))}
    assert len(images) == 1, "the pod checks the bundle with the program that will read it"
    assert all(re.search(r"/mlops-course:[\w.]+$", image) for image in images)
    assert overlay[0] == "local" or not any(image.endswith(":latest") for image in images)


def test_probes_ask_what_the_service_answers(overlay: tuple[str, Path]) -> None:
    from mlops_course.serving.app import PATHS

    service = containers(documents(overlay))[-1]
    for probe, path in (("startupProbe", "ready"), ("readinessProbe", "ready"), ("livenessProbe", "live")):
        assert service[probe]["httpGet"] == {"path": f"/health/{path}", "port": "http"}
        assert f"/health/{path}" in PATHS
    assert {each["name"]: each["containerPort"] for each in service["ports"]} == {"http": 8000}


def test_the_commands_in_the_pods_exist(overlay: tuple[str, Path]) -> None:
    for each in containers(documents(overlay)):
        command, *arguments = each["args"]
        told = run(sys.executable, "-c", "from mlops_course.cli import main; main()", command, "--help")
        assert told.returncode == 0, told.stderr
        assert all(option in told.stdout for option in arguments if option.startswith("--"))


def test_time_to_end_is_longer_than_the_longest_request(overlay: tuple[str, Path]) -> None:
    for each in of_kind(documents(overlay), "Deployment"):
        pod = each["spec"]["template"]["spec"]
        pause = pod["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"]
        assert pod["terminationGracePeriodSeconds"] > pause + Limits().seconds


def test_from_outside_all_but_the_metrics_can_be_asked() -> None:
    built = run(program("kubectl"), "kustomize", DEPLOY / "kubernetes" / "overlays" / "production")
    (ingress,) = of_kind(list(yaml.safe_load_all(built.stdout)), "Ingress")
    (rule,) = ingress["spec"]["rules"]
    open_to_all = {(each["path"], each["pathType"]) for each in rule["http"]["paths"]}
    assert open_to_all == {(path, "Exact") for path in PATHS if path != "/metrics"}


def test_the_service_with_releases_can_ask_who_may_do_what(settings: Settings) -> None:
    def authorize(scope: object) -> str:
        return "desk"

    assert release_app(settings, authorize=authorize).authorize is authorize


def selected(selector: Document, found: list[Document]) -> list[str]:
    """The deployments whose pods a selector takes."""
    return [
        each["metadata"]["name"] for each in of_kind(found, "Deployment")
        if selector.items() <= each["spec"]["template"]["metadata"]["labels"].items()
    ]  # fmt: skip


def test_what_belongs_together_finds_each_other() -> None:
    built = [
        run(program("kubectl"), "kustomize", DEPLOY / "kubernetes" / "overlays" / name)
        for name in ("production", "canary")
    ]
    found = [document for each in built for document in yaml.safe_load_all(each.stdout)]
    both = ["mlops-course", "mlops-course-canary"]
    (service,), (budget,), (network,) = (
        of_kind(found, kind) for kind in ("Service", "PodDisruptionBudget", "NetworkPolicy")
    )
    assert selected(service["spec"]["selector"], found) == both, "the canary gets its share of the requests"
    assert selected(budget["spec"]["selector"]["matchLabels"], found) == both
    assert selected(network["spec"]["podSelector"]["matchLabels"], found) == both
    for each in of_kind(found, "Deployment"):
        assert selected(each["spec"]["selector"]["matchLabels"], found) == [each["metadata"]["name"]], (
            "only its own pods"
        )
    (scaler,) = of_kind(found, "HorizontalPodAutoscaler")
    assert scaler["spec"]["scaleTargetRef"]["name"] == "mlops-course"
    stable, canary = of_kind(found, "Deployment")
    assert "replicas" not in stable["spec"], "the autoscaler decides"
    assert canary["spec"]["replicas"] == 1
    names = {each["metadata"]["name"] for each in found}
    for pod in (stable["spec"]["template"]["spec"], canary["spec"]["template"]["spec"]):
        claims = {
            each["persistentVolumeClaim"]["claimName"] for each in pod["volumes"] if "persistentVolumeClaim" in each
        }
        models = {
            each["valueFrom"]["configMapKeyRef"]["name"]
            for each in pod["containers"][0]["env"]
            if "configMapKeyRef" in each.get("valueFrom", {})
        }
        assert claims | models | {pod["serviceAccountName"]} <= names
    assert {each["metadata"].get("namespace", each["metadata"]["name"]) for each in found} == {"mlops-course"}


# ---------------------------------------------------------------- containers


def test_the_build_sees_only_what_it_copies() -> None:
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    allowed = {line[1:] for line in ignored if line.startswith("!")}
    copied: set[str] = set()
    for path in DEPLOY.glob("*Dockerfile"):
        for line in re.findall(r"^COPY (?!--from)(.*) \S+$", path.read_text(encoding="utf-8"), re.MULTILINE):
            copied |= {part for part in line.split() if not part.startswith("--")}
    assert "*" in ignored
    assert copied == allowed
    assert all((ROOT / name).exists() for name in copied)


def compose() -> Document:
    return yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))


def test_the_compose_file_fits_its_schema() -> None:
    checked = run(
        sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", DEPLOY / "compose.yaml"
    )
    assert checked.returncode == 0, checked.stdout


def test_compose_is_open_to_this_machine_only_and_knows_no_password() -> None:
    found = compose()
    assert set(found["services"]) == {"api", "mlflow", "postgres", "redis", "prometheus", "grafana"}
    for name, service in found["services"].items():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), name
        assert service["read_only"] and service["cap_drop"] == ["ALL"], name
        assert "healthcheck" in service or name == "api", "the api's own is in its image"
        given = {key for key in service.get("environment", {}) if "PASSWORD" in key.upper() or "SECRET" in key.upper()}
        assert all(key.upper().endswith("_FILE") for key in given), name
    assert all(set(secret) == {"file"} for secret in found["secrets"].values())
    assert "HEALTHCHECK" in (DEPLOY / "Dockerfile").read_text(encoding="utf-8")


def test_the_passwords_are_made_once_and_never_committed(tmp_path: Path) -> None:
    make_secrets = runpy.run_path(str(DEPLOY / "secrets.py"))["make_secrets"]
    assert [len(make_secrets(tmp_path / "s")) for _ in range(2)] == [2, 0]
    words = {path.name: path.read_text() for path in (tmp_path / "s").iterdir()}
    assert set(words) == set(compose()["secrets"])
    assert all(len(word) > 30 for word in words.values())
    assert len(set(words.values())) == 2
    assert run("git", "check-ignore", "deploy/secrets/postgres_password").returncode == 0


LOCKS = sorted(DEPLOY.glob("*.lock"))


@pytest.mark.parametrize("lock", LOCKS, ids=lambda path: path.name)
def test_an_images_lock_has_the_projects_versions_with_hashes_and_no_address(lock: Path) -> None:
    from mlops_course.environment import locked_versions

    ours, whole = locked_versions(lock), locked_versions(ROOT / "requirements.lock")
    text = lock.read_text(encoding="utf-8")
    assert ours
    assert {name: versions for name, versions in ours.items() if name in whole and not versions <= whole[name]} == {}
    assert set(ours) - set(whole) <= {"psycopg2-binary"}
    assert "://" not in text
    assert all("--hash=sha256:" in part for part in re.split(r"^(?=[\w.-]+==)", text, flags=re.MULTILINE)[1:])


def test_the_service_needs_no_more_than_its_lock(settings: Settings) -> None:
    """Everything that the service imports, also when it answers, comes from a package that is in the image."""
    generator = np.random.default_rng(1)
    rows = pd.DataFrame({name: generator.choice(["UA", "JFK", "BOS"], 1000) for name in flight_delay.categorical})
    rows = rows.assign(hour_of_day=generator.integers(5, 23, 1000).astype(np.float32), label=np.arange(1000) % 2.0)
    model, origin = (
        train(rows, flight_delay, TrainingConfig(iterations=2)),
        Origin(run_id="", data={}, first="", last=""),
    )
    publish(settings, write_bundle(settings, flight_delay, model, rows, "flight-delay@1", origin))
    code = """
import sys, json
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in blocked:
            raise ModuleNotFoundError(name)
blocked = set(json.loads(sys.argv[1]))
sys.meta_path.insert(0, Missing())
import mlops_course.cli, mlops_course.serving.server
from pathlib import Path
from mlops_course.deployment import ReleaseModels, release_app
from mlops_course.deployment import release_app
from mlops_course.environment import Settings
settings = Settings(home=Path(sys.argv[2]))
release_app(settings)
models = ReleaseModels(settings)
models.refresh()
predictor = models.choose("desk").predictor
record = {"carrier": "UA", "origin": "JFK", "dest": "BOS", "hour_of_day": 9.0}
print(predictor.scores(predictor.encode([record])), predictor.reasons(predictor.encode([record])))
"""
    from importlib.metadata import packages_distributions

    from mlops_course.environment import locked_versions

    there = {re.sub(r"[-_.]+", "-", name).lower() for name in locked_versions(DEPLOY / "serving.lock")} | {
        "mlops-course"
    }
    blocked = sorted(
        module for module, names in packages_distributions().items()
        if not {re.sub(r"[-_.]+", "-", name).lower() for name in names} & there
    )  # fmt: skip
    assert {"pandas", "sklearn", "mlflow"} <= set(blocked)
    done = run(sys.executable, "-c", code, json.dumps(blocked), settings.home)
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------- numbers and pictures


def known_series() -> set[str]:
    """All series that the service's /metrics has, once something has happened."""
    metrics = Metrics()
    metrics.answered("/predict", "POST", 200, 0.01)
    metrics.scored("flight-delay@1", "live", [0.1, 0.9], 0.3)
    metrics.swaps.labels("flight-delay@1").inc()
    return set(re.findall(r"^([a-z_]+)", expose(metrics).decode(), re.MULTILINE))


def recorded() -> dict[str, str]:
    rules = yaml.safe_load((DEPLOY / "prometheus" / "rules.yml").read_text(encoding="utf-8"))
    return {rule["record"]: rule["expr"] for group in rules["groups"] for rule in group["rules"]}


def dashboard() -> Document:
    return json.loads((DEPLOY / "grafana" / "dashboards" / "serving.json").read_text(encoding="utf-8"))


def asked_series(expression: str) -> set[str]:
    return set(re.findall(r"\bserving[a-z0-9_:]+", expression))


def test_every_number_that_is_asked_for_exists() -> None:
    series, rules = known_series(), recorded()
    expressions = [target["expr"] for panel in dashboard()["panels"] for target in panel["targets"]]
    assert len(expressions) > 10
    for expression in [*expressions, *rules.values()]:
        assert asked_series(expression), expression
        assert asked_series(expression) <= series | set(rules), expression


def test_every_label_that_is_asked_for_exists() -> None:
    labels = {"path", "method", "status", "model", "role", "warned", "le"}
    expressions = [target["expr"] for panel in dashboard()["panels"] for target in panel["targets"]]
    for expression in [*expressions, *recorded().values()]:
        used = set(re.findall(r"(\w+)\s*=~?\"", expression))
        for group in re.findall(r"by \(([\w, ]+)\)", expression):
            used |= {name.strip() for name in group.split(",")}
        assert used <= labels, expression


def test_the_dashboard_is_whole() -> None:
    found = dashboard()
    panels = found["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    source = yaml.safe_load((DEPLOY / "grafana" / "provisioning" / "datasources" / "prometheus.yaml").read_text())
    assert {panel["datasource"]["uid"] for panel in panels} == {source["datasources"][0]["uid"]}
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, f"{panel['title']} lies upon another panel"
        assert all(x < 24 for x, _ in cells)
        taken |= cells


FINDS_PODS = "kubernetes_sd_configs:\n      - role: pod\n"
FINDS_FILES = "file_sd_configs:\n      - files: [pods.json]\n"


def test_prometheus_asks_kubernetes_for_pods_and_nothing_else() -> None:
    """What the test of the configuration below has to put something else in the place of."""
    found = yaml.safe_load((DEPLOY / "prometheus" / "kubernetes.yml").read_text(encoding="utf-8"))
    assert [job["kubernetes_sd_configs"] for job in found["scrape_configs"]] == [[{"role": "pod"}]]
    assert (DEPLOY / "prometheus" / "kubernetes.yml").read_text(encoding="utf-8").count(FINDS_PODS) == 1


@pytest.mark.parametrize("name", ["prometheus.yml", "kubernetes.yml"])
def test_prometheus_accepts_its_configuration(name: str, tmp_path: Path) -> None:
    shutil.copytree(DEPLOY / "prometheus", tmp_path, dirs_exist_ok=True)
    text = (tmp_path / name).read_text(encoding="utf-8").replace(FINDS_PODS, FINDS_FILES)  # Debian's can't find pods
    (tmp_path / name).write_text(text, encoding="utf-8")
    checked = run(program("promtool"), "check", "config", tmp_path / name)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert "4 rules found" in checked.stdout
