"""A workspace in which nearly all of the ML Test Score holds, and a repository that executes it."""

import copy
import hashlib
import json
import shutil
import subprocess
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import msgspec
import pandas as pd
from conftest import ROOT, Quarter
from threadpoolctl import threadpool_limits

from mlops_course.delivery.evidence import ChampionRows, Evidence
from mlops_course.delivery.gate import GateDecision
from mlops_course.delivery.sign_off import approve, write_gate_report
from mlops_course.deployment.releases import new_release
from mlops_course.environment import Settings
from mlops_course.experiments import (
    TrainingConfig,
    evaluate_run,
    quiet_mlflow,
    sample_configs,
    search,
    train_run,
)
from mlops_course.project import flight_delay
from mlops_course.project.features import flight_features
from mlops_course.registry import package, promote, register, score_month
from mlops_course.serving import publish

OLD, CHAMPION = "flight-delay@1", "flight-delay@2"
SMALL = TrainingConfig(iterations=40, leaf_samples=60, leaves=8, l2=1.0)
SPACE = {"iterations": [30, 40], "leaves": [6, 8], "leaf_samples": [60, 90]}


def make_repository(folder: Path) -> Path:
    """The parts of this repository that execute something, committed."""
    for name in (".github/workflows", ".ci", "nbs/pipelines"):
        shutil.copytree(ROOT / name, folder / name)
    for name in ("Makefile", "tasks.py", "requirements.lock"):
        shutil.copy(ROOT / name, folder / name)
    (folder / "tests").mkdir()
    for path in (ROOT / "tests").glob("*.py"):
        shutil.copy(path, folder / "tests" / path.name)
    for command in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "--message", "all of it"]):
        git(folder, *command)
    return folder


def git(folder: Path, *arguments: str) -> str:
    """What git says."""
    who = ["-c", "user.name=Ann", "-c", "user.email=ann@example.org", "-c", "commit.gpgsign=false"]
    return subprocess.run(["git", "-C", folder, *who, *arguments], check=True, capture_output=True, text=True).stdout


def tune(quarter: Quarter) -> TrainingConfig:
    """A search on January and February, written down: its best settings."""
    rows = quarter.labelled("2013-01", "2013-02").iloc[::3]
    configs = sample_configs(SPACE, 8, SMALL)
    found = search(rows, flight_delay, configs, [(["2013-01"], ["2013-02"])], 1, quarter.settings)
    best = found.iloc[0]
    return replace(SMALL, **{name: int(best[name]) for name in SPACE})


def release_version(quarter: Quarter, config: TrainingConfig, last: str, number: int) -> str:
    """Train a version, test it, make it champion and publish it: its run."""
    settings, about = quarter.settings, (quarter.features, quarter.rows)
    run = train_run(settings, flight_delay, *about, "2013-01", last, config)
    evaluate_run(settings, flight_delay, run, "2013-03", "2013-03")
    reference = register(settings, flight_delay, run, by="ann")
    assert reference == f"flight-delay@{number}"
    promote(settings, flight_delay, reference, "better than the one before", by="ann")
    publish(settings, package(settings, flight_delay, reference), "better", "ann")
    return run


def write_runs(settings: Settings) -> None:
    """What three runs of the training pipeline have left: the newest one made the champion."""
    for number in range(3):
        folder = settings.runs / f"2013040{number + 1}T000000000000Z-training-00000{number}"
        train = {"name": "train", "seconds": 20.0 + number, "peak_memory": 5e8, "results": {}}
        register = {"name": "register", "results": {"model": CHAMPION if number == 2 else OLD}}
        stages = [train, register, {"name": "package", "results": {"packaged": "x"}}]
        done = [{"status": "done"} | stage for stage in stages]
        about = {"id": folder.name, "folder": str(folder), "status": "done", "parameters": {}, "stages": done}
        folder.mkdir(parents=True)
        (folder / "run.json").write_text(json.dumps(about), encoding="utf-8")


def make_production(quarter: Quarter, repository: Path) -> None:
    """Two versions, tuned, judged, released by a canary; March scored; and the runs that made them."""
    settings = quarter.settings
    with threadpool_limits(1):  # several threads wait for each other on a busy machine
        best = tune(quarter)
        release_version(quarter, replace(SMALL, iterations=5), "2013-01", 1)
        run = release_version(quarter, best, "2013-02", 2)
    lock = hashlib.sha256((repository / "requirements.lock").read_bytes()).hexdigest()
    tags = {"code.commit": git(repository, "rev-parse", "HEAD").strip(), "code.dirty": "False", "code.lock": lock}
    for name, value in tags.items():
        quiet_mlflow().MlflowClient().set_tag(run, name, value)
    score_month(settings, flight_delay, CHAMPION, quarter.features, "2013-03")
    write_gate_report(settings, CHAMPION, GateDecision("promote", "better", ()), OLD)
    approve(settings, CHAMPION, "I have read the report", "eve")
    release = msgspec.structs.replace(new_release("canary", OLD, CHAMPION), status="promoted", by="guard")
    path = settings.serving / "flight-delay" / "release.json"
    path.write_bytes(msgspec.json.encode(release))
    write_runs(settings)


@dataclass(frozen=True)
class Production:
    """A workspace, its repository, and what was read of them already."""

    evidence: Evidence

    def fresh(self) -> Evidence:
        """Evidence of its own, which shares what was read; a test may put other things into it."""
        made = copy.copy(self.evidence)
        rows = copy.copy(self.evidence.rows)
        rows.evidence = made
        vars(made)["rows"] = rows
        return made

    def reread(self, home: Path | None = None, root: Path | None = None) -> Evidence:
        """Evidence of which nothing was read yet, of a copied workspace or another repository."""
        settings = self.evidence.settings
        if home:
            shutil.copytree(settings.home, home, dirs_exist_ok=True)
            settings = settings.model_copy(update={"home": home})
        return Evidence(settings, flight_delay, root or self.evidence.root)


def put(evidence: Evidence, **values: object) -> Evidence:
    """Let evidence say something else: of itself or of its rows."""
    for name, value in values.items():
        target = evidence.rows if hasattr(ChampionRows, name) else evidence
        vars(target)[name] = value
    return evidence


def leaking_features(tables: dict[str, pd.DataFrame], horizon: timedelta) -> pd.DataFrame:
    """The flights' features, and one that nobody can know two hours ahead."""
    made, key = flight_features(tables, horizon=horizon), list(flight_delay.key)
    delay = made[key].merge(tables["flights"][[*key, "arr_delay"]], on=key, how="left")["arr_delay"]
    return made.assign(sneaked_in=delay.to_numpy("float32"))
