"""The road to production: a workspace with two versions, and processes that are killed on the way."""

import shutil
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from kill_helpers import kill_after_change, run_child

from mlops_course.data import replace_months
from mlops_course.delivery.delivering import deliver, undo_delivery
from mlops_course.delivery.gate import GateDecision
from mlops_course.delivery.sign_off import approve, write_gate_report
from mlops_course.deployment import promote_release
from mlops_course.deployment.rollout import roll_out
from mlops_course.environment import Settings
from mlops_course.experiments import TrainingConfig, connect, quiet_mlflow, train
from mlops_course.ledger import repair_ledger, verify_ledger
from mlops_course.project import flight_delay
from mlops_course.registry import champion_reference, register
from mlops_course.registry.store import check_registry, repair_registry
from mlops_course.serving import Origin, live_bundle, write_bundle
from mlops_course.serving.publishing import check_live, for_case, repair_live

FIRST, SECOND = "flight-delay@1", "flight-delay@2"
PROMOTE = GateDecision("promote", "better, and no guard broken", ())


@pytest.fixture(scope="session")
def two_versions(tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> Path:
    """Two versions, packaged; the first one is delivered, the second one judged and approved."""
    settings = Settings(home=tmp_path_factory.mktemp("two-versions")).prepare()
    shutil.copy(empty_store, settings.home / "mlflow.db")
    draw = np.random.default_rng(2013)
    rows = pd.DataFrame({name: draw.choice(["AA", "UA"], 500) for name in flight_delay.categorical})
    rows["wind_speed"] = (draw.random(500) * 40).astype(np.float32)
    rows["label"] = (rows["wind_speed"] > 25).astype(float)
    features, _ = replace_months(settings, "flight-delay/features", rows.assign(period="2013-01"))
    experiment, client = connect(settings, flight_delay), quiet_mlflow().MlflowClient()
    for trees in (3, 5):
        about = {"model_digest": f"d{trees}", "first": "2013-01", "last": "2013-01", "model_uri": "s3://nowhere"}
        run = client.create_run(experiment, tags={**about, "data.features": features}).info.run_id
        reference = register(settings, flight_delay, run, by="ann")
        model = train(rows, flight_delay, TrainingConfig(iterations=trees, leaf_samples=50))
        origin = Origin(run_id=run, data={"features": features}, first="2013-01", last="2013-01")
        write_bundle(settings, flight_delay, model, rows, reference, origin)
    write_gate_report(settings, FIRST, PROMOTE, None)
    approve(settings, FIRST, "the first one", by="eve")
    deliver(settings, flight_delay, FIRST, "the first one", by="ann")
    write_gate_report(settings, SECOND, PROMOTE, FIRST)
    approve(settings, SECOND, "I have read the report", by="eve")
    return settings.home


def production(settings: Settings) -> tuple[str | None, str | None]:
    """The champion, and what is live."""
    live = live_bundle(settings)
    return champion_reference(settings, flight_delay), live.name if live else None


def go(settings: Settings) -> None:
    deliver(settings, flight_delay, SECOND, "better")


def come_back(settings: Settings) -> None:
    undo_delivery(settings, flight_delay, "complaints", bad=SECOND)


def go_step_by_step(settings: Settings) -> None:
    """With a person in place of the guard, who promotes what runs."""
    if roll_out(settings, flight_delay, SECOND, "better").under_way:
        promote_release(for_case(settings, SECOND), "no complaints")
        roll_out(settings, flight_delay, SECOND, "better")


def begin_step_by_step(settings: Settings) -> None:
    roll_out(settings, flight_delay, SECOND, "better")


WAYS: dict[str, tuple[Callable[[Settings], None], Callable[[Settings], None], str]] = {  # to be killed, whole, its end
    "there": (go, go, SECOND), "back": (come_back, come_back, FIRST),
    "step by step": (begin_step_by_step, go_step_by_step, SECOND),
}  # fmt: skip


def judge(settings: Settings, way: str) -> None:
    """After a kill and a repair: before or after, never anything else; done again, it is complete."""
    _, move, end = WAYS[way]
    repair_ledger(settings)
    repair_registry(settings, by="eve")
    repair_live(settings, by="eve")
    assert set(production(settings)) <= {FIRST, SECOND}
    assert verify_ledger(settings) == check_registry(settings) == check_live(settings) == []
    move(settings)
    assert production(settings) == (end, end)
    assert verify_ledger(settings) == check_registry(settings) == check_live(settings) == []


def kill_on(way: str, template: Path, folder: Path, stride: int) -> int:
    """Kill it after its first change, in a new workspace some changes later, and so on; how many there were at most.

    Only the children touch a table: Delta Lake doesn't work in a process that was forked after it began to.
    """
    import mlflow.store.model_registry.sqlalchemy_store
    import mlflow.store.tracking.sqlalchemy_store  # noqa: F401 (so that the children needn't import it)

    start, own = Settings(home=shutil.copytree(template, folder / "start")), Settings(home=folder / "workspace")
    if way == "back":
        run_child(lambda: go(start))
    for number in count(1, stride):
        shutil.rmtree(own.home, ignore_errors=True)
        shutil.copytree(start.home, own.home)
        killed = kill_after_change(number, own.home, lambda: WAYS[way][0](own))
        run_child(lambda: judge(own, way))
        if not killed:
            return number - 1
    raise AssertionError("not reached")


if __name__ == "__main__":
    print(kill_on(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])))
