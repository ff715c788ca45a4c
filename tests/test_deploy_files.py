"""The files in deploy: each is checked by the tool that will read it, or against the service that it speaks of."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pandas as pd
import pytest
import yaml
from lock_helpers import WITHOUT_OTHERS, modules_beside

from mlops_course.deployment import release_app
from mlops_course.environment import Settings
from mlops_course.experiments import TrainingConfig, train
from mlops_course.project import flight_delay
from mlops_course.serving import Origin, publish, write_bundle
from mlops_course.serving.app import PATHS
from mlops_course.serving.bundle import case_of
from mlops_course.serving.limits import Limits
from mlops_course.serving.metrics import Metrics, expose
from mlops_course.serving.predictions import LoggedPrediction, LogLimits, PredictionLog, log_folder
from mlops_course.serving.registered import is_registered

ROOT = Path(__file__).resolve().parent.parent
DEPLOY = ROOT / "deploy"
OVERLAYS = ("local", "production", "guarded", "cloud", "registry", "canary")
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


def jobs(found: list[Document]) -> list[Document]:
    """The pods of the jobs that run by the clock."""
    return [each["spec"]["jobTemplate"]["spec"]["template"]["spec"] for each in of_kind(found, "CronJob")]


def every_pod(found: list[Document]) -> list[Document]:
    return [each["spec"]["template"]["spec"] for each in of_kind(found, "Deployment")] + jobs(found)


def test_kubernetes_accepts_every_manifest(overlay: tuple[str, Path], tmp_path: Path) -> None:
    own = [each for each in documents(overlay) if not each["apiVersion"].startswith("gateway.networking.k8s.io")]
    path = tmp_path / "own.yaml"  # the Gateway API is an addition, whose schema isn't among Kubernetes' own
    path.write_text(yaml.safe_dump_all(own), encoding="utf-8")
    checked = run(program("kubernetes-validate"), "--strict", path)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_every_container_is_confined_and_bounded(overlay: tuple[str, Path]) -> None:
    found = documents(overlay)
    for pod in every_pod(found):
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["automountServiceAccountToken"] is False
    assert len(containers(found)) == (3 if overlay[0] == "cloud" else 2)
    for each in [*containers(found), *(one for pod in jobs(found) for one in pod["containers"])]:
        assert each["securityContext"] == {
            "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]},
        }  # fmt: skip
        assert {"cpu", "memory"} == set(each["resources"]["limits"]) == set(each["resources"]["requests"])


def test_the_image_is_named_with_a_version(overlay: tuple[str, Path]) -> None:
    images = {each["image"] for each in containers(documents(overlay)) if each["name"] != "fetch"}
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
    found = documents(overlay)
    for each in [*containers(found), *(one for pod in jobs(found) for one in pod["containers"])]:
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
    own = {(path, "Exact") for path in PATHS if path != "/metrics" and not f"{path}/".startswith("/v2/")}
    assert open_to_all == own | {("/v2", "Prefix")}, "addresses of the Open Inference Protocol hold names"


def built(name: str) -> list[Document]:
    done = run(program("kubectl"), "kustomize", DEPLOY / "kubernetes" / "overlays" / name)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def test_a_gateway_opens_the_same_paths_as_the_ingress_and_alone_gets_in() -> None:
    (ingress,), (route,) = of_kind(built("production"), "Ingress"), of_kind(built("cloud"), "HTTPRoute")
    assert of_kind(built("cloud"), "Ingress") == []
    kinds = {"Exact": "Exact", "PathPrefix": "Prefix"}
    (rule,), (other,) = route["spec"]["rules"], ingress["spec"]["rules"]
    paths = {(each["path"]["value"], kinds[each["path"]["type"]]) for each in rule["matches"]}
    assert paths == {(each["path"], each["pathType"]) for each in other["http"]["paths"]}
    assert route["spec"]["hostnames"] == [other["host"]]
    network = of_kind(built("cloud"), "NetworkPolicy")[0]
    allowed = [each["namespaceSelector"]["matchLabels"] for each in network["spec"]["ingress"][0]["from"]]
    assert allowed == [
        {"kubernetes.io/metadata.name": each} for each in (route["spec"]["parentRefs"][0]["namespace"], "monitoring")
    ]
    assert float(rule["timeouts"]["request"].rstrip("s")) > Limits().seconds


def test_whoever_makes_the_workspace_may_write_above_every_mount(overlay: tuple[str, Path]) -> None:
    """A folder that only leads to a mount is made by root, and the pods' user couldn't write there."""
    for pod in (each["spec"]["template"]["spec"] for each in of_kind(documents(overlay), "Deployment")):
        places = {each["mountPath"] for each in pod["initContainers"][0]["volumeMounts"]}
        assert "/workspace" in places
        assert {str(Path(place).parent) for place in places} <= {"/", *places}, overlay[0]
        volumes = {each["name"] for each in pod["volumes"]}
        found = [each for one in containers(documents(overlay)) for each in one["volumeMounts"]]
        assert {each["name"] for each in found} == volumes, "each is there, and used"


def test_guarded_pods_meet_in_one_place_and_find_candidates_where_they_look() -> None:
    setup, service = containers(built("guarded"))
    assert setup["args"] == ["publish", "$(MODEL)", "--agreed"]
    for each in (setup, service):
        (guard,) = (one for one in each["env"] if one["name"] == "MLOPS_COURSE_GUARD_URL")
        assert guard["valueFrom"] == {"secretKeyRef": {"name": "mlops-course-guard", "key": "url"}}, "not optional"
        mounts = {one["mountPath"]: (one["name"], one.get("readOnly", False)) for one in each["volumeMounts"]}
        assert mounts["/workspace/serving"] == ("serving", False)
        assert mounts["/workspace/serving/bundles"] == ("models", True)


def test_a_managed_redis_is_reached_at_its_addresses_and_nothing_else_is_opened() -> None:
    before, after = (of_kind(built(name), "NetworkPolicy")[0]["spec"]["egress"] for name in ("production", "cloud"))
    assert before[0] == after[0], "the name service"
    assert "podSelector" in str(before[1]) and "podSelector" not in str(after[1])
    assert after[1]["to"] == [{"ipBlock": {"cidr": "10.20.0.0/24"}}]
    assert after[2:] == [{"ports": [{"protocol": "TCP", "port": 443}]}], "the bucket"


def test_with_bundles_in_a_bucket_no_volume_of_models_is_shared_and_the_service_gets_no_key_to_it() -> None:
    found = built("cloud")
    claims = {each["metadata"]["name"] for each in of_kind(found, "PersistentVolumeClaim")}
    assert claims == {"mlops-course-predictions", "mlops-course-tables"}
    fetch, publish_, service = (each for each in containers(found))
    assert (fetch["args"], publish_["args"]) == (["fetch-bundle", "$(MODEL)"], ["publish", "$(MODEL)"])
    secrets = [[each["secretRef"]["name"] for each in one.get("envFrom", [])] for one in (fetch, publish_, service)]
    assert secrets == [["mlops-course-storage"], [], []]
    homes = [
        {each["name"]: each["value"] for each in one["env"] if "value" in each} for one in (fetch, publish_, service)
    ]
    assert [each["MLOPS_COURSE_HOME"] for each in homes] == ["/workspace"] * 3


def test_with_bundles_in_mlflow_pods_fetch_the_champion_and_the_service_gets_no_key_to_it() -> None:
    found, before = built("registry"), built("production")
    claims = {each["metadata"]["name"] for each in of_kind(found, "PersistentVolumeClaim")}
    assert claims == {"mlops-course-predictions", "mlops-course-tables"}
    (model,) = [each["data"]["model"] for each in of_kind(found, "ConfigMap") if "model" in each.get("data", {})]
    fetch, service = containers(found)
    assert fetch["args"] == ["publish", "models:/$(MODEL)"] and model == "flight-delay@champion"
    assert is_registered(fetch["args"][1].replace("$(MODEL)", model))
    assert fetch["envFrom"] == [{"secretRef": {"name": "mlops-course-mlflow"}}] and "envFrom" not in service
    mounts = {each["mountPath"]: each.get("readOnly", False) for each in fetch["volumeMounts"]}
    assert mounts == {"/workspace": False}
    assert service["volumeMounts"] == containers(before)[-1]["volumeMounts"]
    opened = [of_kind(each, "NetworkPolicy")[0]["spec"]["egress"] for each in (before, found)]
    assert opened[1] == [*opened[0], {"ports": [{"protocol": "TCP", "port": 5000}]}]


def test_pods_are_added_before_the_one_core_that_each_can_use_is_used_up() -> None:
    (scaler,), found = of_kind(built("production"), "HorizontalPodAutoscaler"), built("production")
    (metric,) = scaler["spec"]["metrics"]
    service = containers(found)[-1]
    assert "--workers" not in service["args"] and service["resources"]["limits"]["cpu"] == "1"
    assert metric["resource"]["target"] == {"type": "AverageValue", "averageValue": "600m"}


def test_a_delivery_names_images_by_digest(tmp_path: Path) -> None:
    """What `kustomize edit set image …@sha256:…` writes is taken everywhere."""
    shutil.copytree(DEPLOY / "kubernetes", tmp_path / "kubernetes")
    path = tmp_path / "kubernetes" / "overlays" / "production" / "kustomization.yaml"
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    for number, image in enumerate(content["images"]):
        del image["newTag"]
        image["digest"] = f"sha256:{number:064x}"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    done = run(program("kubectl"), "kustomize", path.parent)
    images = set(re.findall(r"image: (\S+)", done.stdout))
    assert {image.partition("@")[2] for image in images} == {f"sha256:{number:064x}" for number in (0, 1)}, images


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
    (service,), (budget,), (network, other) = (
        of_kind(found, kind) for kind in ("Service", "PodDisruptionBudget", "NetworkPolicy")
    )
    assert selected(other["spec"]["podSelector"]["matchLabels"], found) == [], "it is the collector's"
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


def test_what_the_pods_predict_outlives_them_and_is_collected_from_there() -> None:
    built = run(program("kubectl"), "kustomize", DEPLOY / "kubernetes" / "overlays" / "production")
    found = list(yaml.safe_load_all(built.stdout))
    (model,) = [each["data"]["model"] for each in of_kind(found, "ConfigMap") if "model" in each.get("data", {})]
    claimed = []
    for pod in every_pod(found):
        names = {each["name"]: each.get("persistentVolumeClaim", {}).get("claimName") for each in pod["volumes"]}
        container = pod["containers"][0]
        home = next(each["value"] for each in container["env"] if each["name"] == "MLOPS_COURSE_HOME")
        folder = log_folder(Settings(home=Path(home)), case_of(model)).as_posix()
        claimed += [names[each["name"]] for each in container["volumeMounts"] if each["mountPath"] == folder]
    assert claimed == ["mlops-course-predictions"] * 2, "the service's and the collector's"
    (job,) = of_kind(found, "CronJob")
    assert job["spec"]["concurrencyPolicy"] == "Forbid"
    storage = next(each for each in of_kind(found, "PersistentVolumeClaim") if each["metadata"]["name"] == claimed[0])
    assert storage["spec"]["accessModes"] == ["ReadWriteMany"]
    room = int(storage["spec"]["resources"]["requests"]["storage"].removesuffix("Gi")) * 2**30
    assert room > LogLimits().total + LogLimits().spare, "the log refuses before the volume is full"


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


@pytest.mark.parametrize("name", ["compose.yaml", "compose.keys.yaml"])
def test_the_compose_file_fits_its_schema(name: str) -> None:
    checked = run(sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", DEPLOY / name)
    assert checked.returncode == 0, checked.stdout


def test_who_is_told_is_somebody_whom_alertmanager_can_reach() -> None:
    text = (DEPLOY / "prometheus" / "alertmanager.yml").read_text(encoding="utf-8")
    urls = [each["url"] for one in yaml.safe_load(text)["receivers"] for each in one["webhook_configs"]]
    services = compose()["services"]
    known = {each.split(":")[0] for each in services["alertmanager"].get("extra_hosts", [])} | set(services)
    hosts = {urlsplit(url).hostname for url in urls}
    assert len(urls) == 2 and hosts <= known, "a container's 127.0.0.1 is the container itself"


def test_with_keys_nobody_is_let_in_without_one_and_prometheus_has_one() -> None:
    added = yaml.safe_load((DEPLOY / "compose.keys.yaml").read_text(encoding="utf-8"))
    plain, locked = compose()["services"]["api"], added["services"]["api"]
    assert [word for word in plain["command"] if word not in locked["command"]] == ["--insecure"]
    assert [word for word in locked["command"] if word not in plain["command"]] == ["--keys"]
    ((_, folder, mode),) = [volume.split(":") for volume in locked["volumes"]]
    assert (str(PurePosixPath(locked["environment"]["MLOPS_COURSE_KEYS_FILE"]).parent), mode) == (folder, "ro")
    (secret,) = added["services"]["prometheus"]["secrets"]
    assert set(added["secrets"]) == {secret}
    text = (DEPLOY / "prometheus" / "prometheus.yml").read_text(encoding="utf-8")
    jobs = yaml.safe_load(text.replace("# authorization:", "authorization:"))["scrape_configs"]
    shown = {job["job_name"]: job["authorization"]["credentials_file"] for job in jobs if "authorization" in job}
    assert shown == {"mlops-course": f"/run/secrets/{secret}"}


def test_compose_is_open_to_this_machine_only_and_knows_no_password() -> None:
    found = compose()
    watching = {"prometheus", "alertmanager", "node-exporter", "grafana"}
    assert set(found["services"]) == {"api", "collector", "mlflow", "postgres", "redis"} | watching
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
    code = f"""{WITHOUT_OTHERS}
import mlops_course.cli, mlops_course.serving.server
from pathlib import Path, PurePosixPath
from mlops_course.deployment import ReleaseModels, release_app
from mlops_course.environment import Settings
settings = Settings(home=Path(sys.argv[2]))
release_app(settings)
models = ReleaseModels(settings)
models.refresh()
predictor = models.choose("desk").predictor
record = {{"carrier": "UA", "origin": "JFK", "dest": "BOS", "hour_of_day": 9.0}}
print(predictor.scores(predictor.encode([record])), predictor.reasons(predictor.encode([record])))
"""
    blocked = modules_beside("serving.lock")
    assert {"pandas", "sklearn", "mlflow"} <= set(blocked)
    done = run(sys.executable, "-c", code, json.dumps(blocked), settings.home)
    assert done.returncode == 0, done.stderr


def test_the_collector_needs_no_more_than_its_lock(settings: Settings) -> None:
    """Everything that collecting imports comes from a package that is in its image."""
    writer = PredictionLog(log_folder(settings, "flight-delay"))
    writer.append([LoggedPrediction("r1", 1.36e9, "flight-delay@1", 0.5, True, bytes(4), key={"carrier": "UA"})])
    writer.close()
    code = f"""{WITHOUT_OTHERS}
from mlops_course.cli import main
sys.argv = ["mlops-course", *sys.argv[3:], "--home", sys.argv[2], "--json"]
main()
"""
    blocked = modules_beside("collecting.lock")
    assert {"sklearn", "mlflow", "fastapi"} <= set(blocked)
    program = (sys.executable, "-c", code, json.dumps(blocked), settings.home)
    done = run(*program, "collect-predictions")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rows"] == 1
    fetched = run(*program, "fetch-bundle", "flight-delay@1")
    assert "there is no" in fetched.stderr and "Missing" not in fetched.stderr, "it got as far as looking for it"


# ---------------------------------------------------------------- numbers and pictures


def known_series() -> set[str]:
    """All series that the service's /metrics has, once something has happened."""
    metrics = Metrics()
    metrics.answered("/predict", "POST", 200, 0.01)
    metrics.scored("flight-delay@1", "live", [0.1, 0.9], 0.3)
    metrics.swaps.labels("flight-delay@1").inc()
    metrics.failed.labels("flight-delay@1", "live").inc()
    return set(re.findall(r"^([a-z_]+)", expose(metrics).decode(), re.MULTILINE))


def recorded() -> dict[str, str]:
    files = [DEPLOY / "prometheus" / name for name in ("rules.yml", "slo.yml")]
    groups = [group for file in files for group in yaml.safe_load(file.read_text(encoding="utf-8"))["groups"]]
    return {rule["record"]: rule["expr"] for group in groups for rule in group["rules"] if "record" in rule}


def dashboard() -> Document:
    return json.loads((DEPLOY / "grafana" / "dashboards" / "serving.json").read_text(encoding="utf-8"))


def asked_series(expression: str) -> set[str]:
    return set(re.findall(r"\b(?:serving|slo:)[a-z0-9_:]+", expression))


def test_every_number_that_is_asked_for_exists() -> None:
    series, rules = known_series(), recorded()
    expressions = [target["expr"] for panel in dashboard()["panels"] for target in panel["targets"]]
    assert len(expressions) > 10
    for expression in [*expressions, *rules.values()]:
        assert asked_series(expression), expression
        assert asked_series(expression) <= series | set(rules), expression


def test_every_label_that_is_asked_for_exists() -> None:
    labels = {"path", "method", "status", "model", "role", "warned", "reason", "le"}
    expressions = [target["expr"] for panel in dashboard()["panels"] for target in panel["targets"]]
    for expression in [*expressions, *recorded().values()]:
        used = set(re.findall(r"(\w+)\s*=~?[\"']", expression))
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


def named_rules(configuration: str) -> list[str]:
    """Return the rule files that a configuration of Prometheus names, in its order."""
    return [Path(name).name for name in yaml.safe_load(configuration)["rule_files"]]


@pytest.mark.parametrize("name", ["prometheus.yml", "kubernetes.yml"])
def test_prometheus_accepts_its_configuration(name: str, tmp_path: Path) -> None:
    shutil.copytree(DEPLOY / "prometheus", tmp_path, dirs_exist_ok=True)
    text = (tmp_path / name).read_text(encoding="utf-8").replace(FINDS_PODS, FINDS_FILES)  # Debian's can't find pods
    (tmp_path / name).write_text(text, encoding="utf-8")
    checked = run(program("promtool"), "check", "config", tmp_path / name)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    written = [yaml.safe_load((tmp_path / rules).read_text(encoding="utf-8")) for rules in named_rules(text)]
    counts = [sum(len(group["rules"]) for group in groups["groups"]) for groups in written]
    assert [int(count) for count in re.findall(r"(\d+) rules found", checked.stdout)] == counts
    assert min(counts) > 0
