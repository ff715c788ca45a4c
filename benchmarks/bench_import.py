"""How long does the command take to say anything, beside `import pandas` and papermill's own command?

Each is started in a fresh process, in turn, several times; the median counts. The budget is 0.3 s for ours.
"""

import argparse
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
    repeat = parser.parse_args().repeat
    for command in COMMANDS.values():
        seconds(command)  # compiles, and warms the disk's cache
    found: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(repeat):
        for name, command in COMMANDS.items():
            found[name].append(seconds(command))
    print(f"{'median of ' + str(repeat):<34}{'seconds':>8}{'fastest':>9}")
    for name, times in found.items():
        print(f"{name:<34}{statistics.median(times):>8.3f}{min(times):>9.3f}")
    late = [name for name in OURS if statistics.median(found[name]) > BUDGET]
    print(f"budget for ours {BUDGET} s: {'over: ' + ', '.join(late) if late else 'kept'}")
    return 1 if late else 0


if __name__ == "__main__":
    sys.exit(main())
