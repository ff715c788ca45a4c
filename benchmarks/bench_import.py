"""How long does the command take to say anything, beside `import pandas` and papermill's own command?

Each is started in a fresh process, in turn, several times; the median counts. The budget is 0.3 s for ours.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

BIN = Path(sys.executable).parent
PYTHON = [sys.executable, "-c"]
COMMANDS = {
    "python -c pass": [*PYTHON, "pass"],
    "import mlops_course": [*PYTHON, "import mlops_course"],
    "mlops-course --help": [str(BIN / "mlops-course"), "--help"],
    "import mlops_course.environment": [*PYTHON, "import mlops_course.environment"],
    "import pandas": [*PYTHON, "import pandas"],
    "papermill --help": [str(BIN / "papermill"), "--help"],
    "import mlflow": [*PYTHON, "import mlflow"],
}
OURS = ("import mlops_course", "mlops-course --help")
BUDGET = 0.3


def seconds(command: list[str]) -> float:
    """One start."""
    begin = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - begin


def main() -> int:
    """Print the table; 1 when one of ours is over budget."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--json", action="store_true", help="print the table as JSON")
    options = parser.parse_args()
    repeat = options.repeat
    for command in COMMANDS.values():
        seconds(command)  # compiles, and warms the disk's cache
    found: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(repeat):
        for name, command in COMMANDS.items():
            found[name].append(seconds(command))
    middle = {name: statistics.median(times) for name, times in found.items()}
    late = [name for name in OURS if middle[name] > BUDGET]
    if options.json:
        bare = middle["python -c pass"]
        table = [
            {"command": name, "median, s": round(each, 3), "fastest, s": round(min(found[name]), 3),
             "× python -c pass": round(each / bare, 1)}
            for name, each in middle.items()
        ]  # fmt: skip
        print(json.dumps(table, indent=1, ensure_ascii=False))
        return 1 if late else 0
    print(f"{'median of ' + str(repeat):<34}{'seconds':>8}{'fastest':>9}")
    for name, each in middle.items():
        print(f"{name:<34}{each:>8.3f}{min(found[name]):>9.3f}")
    print(f"budget for ours {BUDGET} s: {'over: ' + ', '.join(late) if late else 'kept'}")
    return 1 if late else 0


if __name__ == "__main__":
    sys.exit(main())
