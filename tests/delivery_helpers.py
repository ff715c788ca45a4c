"""The road to production, in processes that are killed on the way."""

import shutil
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path

from kill_helpers import kill_after_change, run_child

from mlops_course.delivery.delivering import deliver, undo_delivery
from mlops_course.environment import Settings
from mlops_course.ledger import repair_ledger, verify_ledger
from mlops_course.project import flight_delay
from mlops_course.registry import champion_reference
from mlops_course.registry.store import check_registry, repair_registry
from mlops_course.serving import live_bundle
from mlops_course.serving.publishing import check_live, repair_live

FIRST, SECOND = "flight-delay@1", "flight-delay@2"


def production(settings: Settings) -> tuple[str | None, str | None]:
    """The champion, and what is live."""
    live = live_bundle(settings)
    return champion_reference(settings, flight_delay), live.name if live else None


def go(settings: Settings) -> None:
    deliver(settings, flight_delay, SECOND, "better")


def come_back(settings: Settings) -> None:
    undo_delivery(settings, flight_delay, "complaints", bad=SECOND)


WAYS: dict[str, tuple[Callable[[Settings], None], str]] = {"there": (go, SECOND), "back": (come_back, FIRST)}


def judge(settings: Settings, way: str) -> None:
    """After a kill and a repair: before or after, never anything else; done again, it is complete."""
    move, end = WAYS[way]
    repair_ledger(settings)
    repair_registry(settings, by="eve")
    repair_live(settings, by="eve")
    assert set(production(settings)) <= {FIRST, SECOND}
    assert verify_ledger(settings) == check_registry(settings) == check_live(settings) == []
    move(settings)
    assert production(settings) == (end, end)
    assert verify_ledger(settings) == check_registry(settings) == check_live(settings) == []


def kill_on(way: str, template: Path, folder: Path) -> int:
    """Kill it after its first change, in a new workspace after the second one, and so on; how often it was killed.

    Only the children touch a table: Delta Lake doesn't work in a process that was forked after it began to.
    """
    import mlflow.store.model_registry.sqlalchemy_store
    import mlflow.store.tracking.sqlalchemy_store  # noqa: F401 (so that the children needn't import it)

    start, own = Settings(home=shutil.copytree(template, folder / "start")), Settings(home=folder / "workspace")
    if way == "back":
        run_child(lambda: go(start))
    for number in count(1):
        shutil.rmtree(own.home, ignore_errors=True)
        shutil.copytree(start.home, own.home)
        killed = kill_after_change(number, own.home, lambda: WAYS[way][0](own))
        run_child(lambda: judge(own, way))
        if not killed:
            return number - 1
    raise AssertionError("not reached")


if __name__ == "__main__":
    print(kill_on(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])))
