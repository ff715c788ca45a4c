"""From how many rows on do several threads help a training?

The course's own model is trained on made-up rows, by one thread and by as many as the machine has cores, in turn,
several times; the fastest counts. Below the limit of `training_threads`, `train` takes one thread: there several must
not be worth it. A second process that computes all the time stands for what else the machine has to do: tests, a
service, a browser. With --quiet there is none, and how threads wait decides: see OMP_WAIT_POLICY.
"""

import argparse
import json
import subprocess
import sys
import time

import numpy as np
import pandas as pd
from threadpoolctl import threadpool_limits

from mlops_course.environment import cores
from mlops_course.experiments.model import TrainingConfig, build_model, training_threads

ROWS = (2_000, 10_000, 19_999, 50_000, 200_000)
NUMBERS = [f"x{number}" for number in range(60)]
BUSY = [sys.executable, "-c", "while True: pass"]


def seconds(frame: pd.DataFrame, label: np.ndarray, threads: int) -> float:
    """One training."""
    model = build_model(TrainingConfig(iterations=30), {}, NUMBERS)
    with threadpool_limits(threads):
        begin = time.perf_counter()
        model.fit(frame, label)
    return time.perf_counter() - begin


def measure(rows: int, repeat: int) -> dict[str, float]:
    """Both ways, in turn."""
    draw = np.random.default_rng(2013)
    frame = pd.DataFrame(draw.random((rows, len(NUMBERS)), dtype=np.float32), columns=NUMBERS)
    label = (frame["x0"] + frame["x1"] > draw.random(rows) + 0.5).to_numpy(float)
    found: dict[int, list[float]] = {1: [], cores(): []}
    for _ in range(repeat):
        for threads, times in found.items():
            times.append(seconds(frame, label, threads))
    one, several = min(found[1]), min(found[cores()])
    return {
        "rows": rows,
        "one, s": round(one, 3),
        "several, s": round(several, 3),
        "one / several": round(one / several, 2),
    }


def main() -> int:
    """Print the table; 1 when several threads would be clearly faster where `train` takes one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--quiet", action="store_true", help="without the second process")
    parser.add_argument("--json", action="store_true", help="print the table as JSON")
    options = parser.parse_args()
    busy = None if options.quiet else subprocess.Popen(BUSY)
    try:
        seconds(pd.DataFrame(np.zeros((100, len(NUMBERS))), columns=NUMBERS), np.arange(100) % 2.0, 1)  # imports
        table = [measure(rows, options.repeat) for rows in ROWS]
    finally:
        if busy is not None:
            busy.kill()
            busy.wait()
    if options.json:
        print(json.dumps(table, indent=1))
    else:
        print(f"{cores()} cores{'' if options.quiet else ', one of them busy'}; above 1, several threads are faster")
        print(pd.DataFrame(table).to_string(index=False))
    return int(any(training_threads(int(row["rows"])) == 1 and row["one / several"] > 1.5 for row in table))


if __name__ == "__main__":
    sys.exit(main())
