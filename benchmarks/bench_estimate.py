"""Are the estimates those that NannyML makes, and what do they take?

Estimates ROC-AUC, average precision, precision, recall and the cost of one made-up month of scores and of what they
mean, with `mlops_course.monitoring.estimating` and with NannyML's own functions (CBPE), which get an environment of
their own. Prints both figures, their difference, and the median time of each. Where scores are tied, NannyML depends on
the order of the rows, so all scores differ here.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from time import perf_counter

import numpy as np

from mlops_course.framing import Costs
from mlops_course.monitoring.estimating import expected_metrics

COSTS = Costs(missed=150, warning=40)
THEIRS = """
import json, sys
from statistics import median
from time import perf_counter
import numpy as np
from nannyml.performance_estimation.confidence_based import metrics as cbpe

given = np.load(sys.argv[1])
score, meaning, warned = given["score"], given["meaning"], given["warned"].astype(int)
costs = np.array([[0, 40], [150, 40]])  # [true negative, false positive], [false negative, true positive]


def everything():
    return {
        "roc_auc": cbpe.estimate_roc_auc(meaning, score), "pr_auc": cbpe.estimate_ap(meaning, score),
        "precision": cbpe.estimate_precision(warned, meaning), "recall": cbpe.estimate_recall(warned, meaning),
        "cost": cbpe.estimate_business_value(warned, meaning, None, costs) / len(score),
    }


times = []
for _ in range(7):
    start = perf_counter()
    found = everything()
    times.append(perf_counter() - start)
print(json.dumps({"found": {name: float(value) for name, value in found.items()}, "seconds": median(times)}))
"""


def made_up_month(rows: int) -> dict[str, np.ndarray]:
    """Scores, what each means, and who is warned of."""
    random = np.random.default_rng(12)
    score = random.beta(1.2, 3.5, rows)
    return {"score": score, "meaning": np.clip(score * 1.1 + 0.02, 0, 1), "warned": score >= COSTS.threshold}


def theirs(month: dict[str, np.ndarray], folder: Path) -> dict:
    """What NannyML finds, in an environment that is made for it."""
    uv = Path(sys.executable).with_name("uv")
    python = folder / "nannyml" / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    if not python.exists():
        subprocess.run([uv, "venv", "--quiet", "--python", "3.11", python.parent.parent], check=True)
        wanted = ["nannyml==0.13.1", "statsmodels"]
        subprocess.run([uv, "pip", "install", "--quiet", "--python", python, *wanted], check=True)
    np.savez(folder / "month.npz", **month)
    done = subprocess.run([python, "-W", "ignore", "-c", THEIRS, folder / "month.npz"], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    """Compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=30_000)
    parser.add_argument("--folder", type=Path, help="where NannyML's environment is, or is made; none: a temporary one")
    arguments = parser.parse_args()
    month, times = made_up_month(arguments.rows), []
    for _ in range(7):
        start = perf_counter()
        ours = expected_metrics(month["score"], month["meaning"], COSTS)
        times.append(perf_counter() - start)
    with tempfile.TemporaryDirectory() as temporary:
        other = theirs(month, arguments.folder or Path(temporary))
    print(f"{arguments.rows:,} rows{'':12}ours   NannyML   difference")
    for name, value in other["found"].items():
        print(f"{name:14} {ours[name]:12.6f} {value:9.6f} {ours[name] - value:12.1e}")
    print(f"all seven of ours {median(times) * 1e3:.1f} ms, five of NannyML's {other['seconds'] * 1e3:.1f} ms")


if __name__ == "__main__":
    main()
