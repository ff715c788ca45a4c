"""Runs a benchmark and keeps its figures in results.json, with machine, date and command: the site shows them.

    python benchmarks/keep.py import --repeat 5      # benchmarks/bench_import.py --json --repeat 5

The benchmark has to print its table as JSON: a list with a row for each line, of names and figures. How busy the
machine was with other work is kept as well: its load when the benchmark began, beside the number of its cores.
"""

import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
RESULTS = FOLDER / "results.json"


def processor() -> str:
    """What the system says about its processor."""
    about = Path("/proc/cpuinfo")
    lines = about.read_text(encoding="utf-8").splitlines() if about.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return (names or [platform.processor() or platform.machine()])[0]


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    load = round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None
    return {
        "processor": processor(), "cores": os.cpu_count(), "load": load,
        "system": platform.system(), "python": platform.python_version(),
    }  # fmt: skip


def question(program: Path) -> str:
    """What a benchmark answers: the first sentence of its file."""
    return program.read_text(encoding="utf-8").removeprefix('"""').partition("?")[0].replace("\n", " ") + "?"


def anywhere(argument: str) -> str:
    """An argument as another machine would have it: where a folder lies on this one is nobody's business."""
    return Path(argument).name.upper() if Path(argument).is_absolute() else argument


def measure(name: str, arguments: list[str]) -> dict[str, Any]:
    """Run one benchmark; its figures, and what is to be known about them. Raises: CalledProcessError when it fails."""
    program, about = FOLDER / f"bench_{name}.py", machine()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=FOLDER, capture_output=True, text=True)
    run = [sys.executable, str(program), "--json", *arguments]
    done = subprocess.run(run, stdout=subprocess.PIPE, text=True)
    if not done.stdout.strip():
        raise subprocess.CalledProcessError(done.returncode, run)
    return {
        "question": question(program),
        "command": " ".join(["python", f"benchmarks/{program.name}", *map(anywhere, arguments)]),
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "commit": commit.stdout.strip(),
        "machine": about,
        "bound kept": done.returncode == 0,
        "table": json.loads(done.stdout),
    }


def main() -> int:
    """Measure what is named, and keep it beside what was measured before."""
    if len(sys.argv) < 2 or not (FOLDER / f"bench_{sys.argv[1]}.py").is_file():
        known = ", ".join(sorted(path.stem.removeprefix("bench_") for path in FOLDER.glob("bench_*.py")))
        print(f"Name a benchmark: {known}", file=sys.stderr)
        return 2
    name, *arguments = sys.argv[1:]
    found = measure(name, arguments)
    kept = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    text = json.dumps({**kept, name: found}, indent=1, ensure_ascii=False, sort_keys=False)
    beside = RESULTS.with_suffix(".new")
    beside.write_text(text + "\n", encoding="utf-8")
    beside.replace(RESULTS)
    print(json.dumps(found["table"], indent=1, ensure_ascii=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
