"""What does a registry that writes down every change cost beside raw MLflow, and how fast does it say who was champion?

Prints medians of: registering a version, promoting it, and finding the champion, on SQLite in a workspace of its own;
then the time of `champion_at` over a ledger of 10,000 changes, beside the bound that it must keep.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

from mlops_course.environment import Settings
from mlops_course.experiments import connect, quiet_mlflow
from mlops_course.ledger import LedgerEntry, append_entry, read_ledger, seal_line
from mlops_course.project import flight_delay
from mlops_course.registry import champion_at, champion_reference, promote, register

BOUND = 50  # milliseconds for an answer out of 10,000 changes
CHANGES = 10_000


def milliseconds(
    task: Callable[[int], object], times: int, of: Callable[[list[float]], float] = statistics.median
) -> float:
    """The median time of a task, which is told how often it ran before."""
    found = []
    for each in range(times):
        begin = time.perf_counter()
        task(each)
        found.append((time.perf_counter() - begin) * 1000)
    return of(found)


def compare(settings: Settings, times: int) -> dict[str, tuple[float, float]]:
    """Raw MLflow and ours, by what is done, in milliseconds."""
    experiment = connect(settings, flight_delay)
    client = quiet_mlflow().MlflowClient()
    runs = []
    for each in range(times):
        about = {"model_digest": f"d{each}", "first": "2013-01", "last": "2013-02", "model_uri": f"s3://models/{each}"}
        runs.append(client.create_run(experiment, tags=about).info.run_id)
    client.create_registered_model("raw")
    raw = [
        milliseconds(lambda n: client.create_model_version("raw", f"s3://models/{n}", run_id=runs[n]), times),
        milliseconds(lambda n: client.set_registered_model_alias("raw", "champion", str(n + 1)), times),
        milliseconds(lambda n: client.get_model_version_by_alias("raw", "champion"), times),
    ]
    ours = [
        milliseconds(lambda n: register(settings, flight_delay, runs[n]), times),
        milliseconds(lambda n: promote(settings, flight_delay, f"flight-delay@{n + 1}", "better"), times),
        milliseconds(lambda n: champion_reference(settings, flight_delay), times),
    ]
    return dict(zip(("register", "promote", "find the champion"), zip(raw, ours, strict=True), strict=True))


def ask_history(settings: Settings, times: int) -> float:
    """The shortest time of a question to a ledger of many changes, each of which it verifies."""
    begin, lines, previous = datetime(2013, 1, 1, tzinfo=UTC), [], ""
    settings.ledger.parent.mkdir(parents=True)
    for number in range(1, CHANGES + 1):
        moment = begin + timedelta(minutes=number)
        change = LedgerEntry(
            event="promote", use_case=flight_delay.name, subject=f"flight-delay@{number}", by="ann",
            reason="log loss -0.0044 against flight-delay@1 (95 % interval -0.0071 to -0.0009)", number=number,
            after={"champion": f"flight-delay@{number}", "previous": f"flight-delay@{number - 1}"}, previous=previous,
            before={"champion": f"flight-delay@{number - 1}"}, time=f"{moment:%Y-%m-%dT%H:%M:%S}.000Z",
        )  # fmt: skip
        lines.append(seal_line(change))
        previous = lines[-1][-67:-3].decode()
    settings.ledger.write_bytes(b"".join(lines))
    append_entry(settings, read_ledger(settings)[-1])  # it can be added to, so it is what it should be
    middle = begin + timedelta(minutes=CHANGES // 2, seconds=1)
    assert champion_at(settings, flight_delay, middle).value == f"flight-delay@{CHANGES // 2}"
    return milliseconds(lambda _: champion_at(settings, flight_delay, middle), times, min)


def as_table(found: dict[str, tuple[float, float]], took: float) -> list[dict[str, object]]:
    """The same figures for programs, a row for each line."""
    columns = ("raw MLflow, ms", "with the ledger, ms", "ratio")
    rows = [(name, (round(raw, 1), round(ours, 1), round(ours / raw, 1))) for name, (raw, ours) in found.items()]
    table = [{"what": name, **dict(zip(columns, values, strict=True))} for name, values in rows]
    return [*table, {"what": f"who was champion, of {CHANGES:,} changes", "with the ledger, ms": round(took, 1)}]


def main() -> None:
    """Measure and print; exit status 1 when the bound isn't kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--json", action="store_true", help="print the table as JSON")
    options = parser.parse_args()
    times = options.times
    with tempfile.TemporaryDirectory() as folder:
        found = compare(Settings(home=Path(folder) / "workspace"), times)
        took = ask_history(Settings(home=Path(folder) / "history"), times)
    if options.json:
        print(json.dumps(as_table(found, took), indent=1))
        sys.exit(took > BOUND)
    print(f"{'milliseconds, median of ' + str(times):32} {'raw MLflow':>10} {'with ledger':>12} {'ratio':>6}")
    for name, (raw, ours) in found.items():
        print(f"{name:32} {raw:10.1f} {ours:12.1f} {ours / raw:6.1f}")
    verdict = "kept" if took <= BOUND else "BROKEN"
    print(f"who was champion, {CHANGES:,} changes: {took:.1f} ms (the fastest); at most {BOUND} ms: {verdict}")
    sys.exit(took > BOUND)


if __name__ == "__main__":
    main()
