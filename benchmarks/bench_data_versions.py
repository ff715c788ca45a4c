"""What does it cost to keep every state of a growing table, and to go back, beside DVC and a plain copy?

All 336,776 flights of 2013 come month by month. After each month the whole state is kept: as a version of a Delta
table, as what `dvc add` makes of a folder of Parquet files, and as a copy of it. Then March is overwritten, and each
way goes back to what was there before; then each reads the state of June. In the end every way must have the same rows.
The figures are the best of some rounds. DVC runs without git, on a cache in its own folder, and each command is a new
process, as people call it. This project does without it: name the program with --dvc, or put it on the path.
Without it, its line says that it was left out.
"""

import argparse
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from mlops_course.data import read_table, replace_months
from mlops_course.environment import Settings
from mlops_course.project import find_file, flight_delay, read_file, supplier_folder
from mlops_course.registry.restoring import restore_version

MONTHS = [f"2013-{month:02}" for month in range(1, 13)]
BAD, READ = MONTHS[2], MONTHS[5]
BOUND = 10  # seconds for going back, on the whole year
NAME = "flight-delay/flights"


class Deltas:
    """A Delta table, a version a month: what this project does."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.settings = Settings(home=folder).prepare()
        self.versions: dict[str, str] = {}

    def keep(self, month: str, rows: pd.DataFrame) -> None:
        self.versions[month] = replace_months(self.settings, NAME, rows.assign(period=month))[0]

    def spoil(self, rows: pd.DataFrame) -> None:
        replace_months(self.settings, NAME, rows.assign(period=BAD))

    def go_back(self) -> None:
        restore_version(self.settings, self.versions[MONTHS[-1]], "overwritten", by="the benchmark")

    def read(self, state: str) -> pd.DataFrame:
        return read_table(self.settings, self.versions[state]).drop(columns="period")

    def now(self) -> pd.DataFrame:
        return read_table(self.settings, f"{NAME}@{int(self.versions[MONTHS[-1]].rpartition('@')[2]) + 2}")


class Copies:
    """A folder of Parquet files, a month each, and a copy of it for each state."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.data = folder, folder / "data"
        self.data.mkdir(parents=True)

    def keep(self, month: str, rows: pd.DataFrame) -> None:
        rows.to_parquet(self.data / f"{month}.parquet", index=False)
        self.snapshot(month)

    def snapshot(self, state: str) -> None:
        shutil.copytree(self.data, self.folder / "states" / state)

    def spoil(self, rows: pd.DataFrame) -> None:
        rows.to_parquet(self.data / f"{BAD}.parquet", index=False)
        self.snapshot("spoilt")

    def go_back(self) -> None:
        self.check_out(MONTHS[-1])

    def check_out(self, state: str) -> None:
        shutil.rmtree(self.data)
        shutil.copytree(self.folder / "states" / state, self.data)

    def read(self, state: str) -> pd.DataFrame:
        files = sorted((self.folder / "states" / state).iterdir())
        return pd.concat([pd.read_parquet(file) for file in files], ignore_index=True)

    def now(self) -> pd.DataFrame:
        return pd.concat([pd.read_parquet(file) for file in sorted(self.data.iterdir())], ignore_index=True)


class Dvc(Copies):
    """The same folder, kept by DVC."""

    def __init__(self, folder: Path, program: str) -> None:
        super().__init__(folder)
        self.program = program
        self.run("init", "--no-scm")

    def run(self, *words: str) -> None:
        quiet = {**os.environ, "DVC_NO_ANALYTICS": "1"}
        subprocess.run([self.program, *words, "-q"], cwd=self.folder, check=True, env=quiet)

    def snapshot(self, state: str) -> None:
        self.run("add", "data")
        shutil.copy(self.folder / "data.dvc", self.folder / f"{state}.kept")  # what git would keep

    def check_out(self, state: str) -> None:
        shutil.copy(self.folder / f"{state}.kept", self.folder / "data.dvc")
        self.run("checkout", "--force")

    def read(self, state: str) -> pd.DataFrame:
        self.check_out(state)
        return self.now()


def seconds(task: Callable[[], object]) -> float:
    """How long a task takes."""
    begin = time.perf_counter()
    task()
    return time.perf_counter() - begin


def size(folder: Path) -> float:
    """Megabytes on the disk; two names of one file count once."""
    files = {entry.stat().st_ino: entry.stat().st_size for entry in folder.rglob("*") if entry.is_file()}
    return sum(files.values()) / 1e6


def measure(way: Deltas | Copies, rows: dict[str, pd.DataFrame]) -> list[float]:
    """Seconds for twelve states, for going back and for reading an old state, and megabytes."""
    kept = seconds(lambda: [way.keep(month, rows[month]) for month in MONTHS])
    way.spoil(rows[BAD].assign(arr_delay=-rows[BAD]["arr_delay"]))
    back = seconds(way.go_back)
    assert len(way.now()) == sum(map(len, rows.values()))
    assert way.now()["arr_delay"].sum() == sum(each["arr_delay"].sum() for each in rows.values())
    found: list[pd.DataFrame] = []
    read = seconds(lambda: found.append(way.read(READ)))
    assert len(found[0]) == sum(len(rows[month]) for month in MONTHS if month <= READ)
    return [kept, back, read, size(way.folder)]


def best(make: Callable[[Path], Deltas | Copies], rows: dict[str, pd.DataFrame], rounds: int) -> list[float]:
    """The best figures of some rounds, each in a new folder."""
    found = []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as place:
            found.append(measure(make(Path(place) / "kept"), rows))
    return [min(each) for each in zip(*found, strict=True)]


def flights() -> dict[str, pd.DataFrame]:
    """The flights of each month, as the supplier has them."""
    name = flight_delay.tables[0].name
    year = read_file(find_file(supplier_folder(), name))
    return {month: year[year["month"] == int(month[-2:])].reset_index(drop=True) for month in MONTHS}


def main() -> None:
    """Measure and print; exit status 1 when going back takes too long."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dvc", default=shutil.which("dvc"), help="the program")
    parser.add_argument("--rounds", type=int, default=3)
    options, rows = parser.parse_args(), flights()
    ways: dict[str, Callable[[Path], Deltas | Copies]] = {"Delta table": Deltas, "plain copy": Copies}
    if options.dvc:
        ways["DVC"] = lambda folder: Dvc(folder, options.dvc)
    found = {name: best(make, rows, options.rounds) for name, make in ways.items()}
    ours = found["Delta table"]
    print(f"{'':12} {'12 states':>16} {'going back':>16} {'reading June':>16} {'on the disk':>16}")
    for name, figures in found.items():
        units = zip(figures, ours, ("s ", "s ", "s ", "MB"), strict=True)
        cells = [f"{value:6.2f} {unit} {value / own:5.1f}x" for value, own, unit in units]
        print(f"{name:12} {' '.join(f'{cell:>16}' for cell in cells)}")
    if not options.dvc:
        print("DVC          left out: it isn't installed; install it anywhere, and name it with --dvc")
    raise SystemExit(ours[1] > BOUND)


if __name__ == "__main__":
    main()
