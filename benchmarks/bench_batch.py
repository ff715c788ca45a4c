"""How fast is a month scored in a batch, where does the time go, and what limits it?

One real month of flights and the default model, trained on the months before it. One core each: scikit-learn's pipeline
on a DataFrame; the same trees on numbers that are encoded already; the bundle's graph in onnxruntime; the encoding of a
DataFrame; and the two together, which is what `Predictor.predict` does. Then models of fewer trees, because a score is
the sum of all trees, and the bundle on all cores. Several rounds side by side, the best of each counts.

    OMP_NUM_THREADS=1 python benchmarks/bench_batch.py --repeat 5
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before scikit-learn looks: one core for each way

import numpy as np
import pandas as pd

from mlops_course.data import build_features, ingest, labelled_features, months, validate
from mlops_course.environment import Settings, cores
from mlops_course.experiments import TrainingConfig, scores, train
from mlops_course.project import flight_delay
from mlops_course.serving import Origin, Predictor, load_predictor, write_bundle

TRAINING, MONTH = ("2013-01", "2013-02"), "2013-03"
TREES = (160, 80, 40, 20)


def read(settings: Settings) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Labelled features of the training, and of the month that is scored."""
    for month in months(TRAINING[0], MONTH):
        delivery = ingest(settings, flight_delay, month)
    tables = validate(settings, flight_delay, delivery.tables, months(TRAINING[0], MONTH)).tables
    features = build_features(settings, flight_delay, tables, TRAINING[0], MONTH)
    periods = (TRAINING, (MONTH, MONTH))
    past, future = (labelled_features(settings, flight_delay, features, tables["flights"], *each) for each in periods)
    return past, future


def bundle(settings: Settings, past: pd.DataFrame, trees: int) -> tuple[Any, Path]:
    """A model, and its bundle."""
    model = train(past, flight_delay, TrainingConfig(iterations=trees))
    about = Origin(run_id="benchmark", data={}, first=TRAINING[0], last=TRAINING[1])
    return model, write_bundle(settings, flight_delay, model, past, f"flight-delay@{trees}", about)


def race(ways: dict[str, Callable[[], object]], rows: int, repeat: int) -> dict[str, float]:
    """Rows a second of each way: the best of several rounds, one way after the other in each."""
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(repeat):
        for name, way in ways.items():
            begin = time.perf_counter()
            way()
            best[name] = min(best[name], time.perf_counter() - begin)
    return {name: round(rows / seconds) for name, seconds in best.items()}


def steps(predictor: Predictor, matrix: np.ndarray, model: Any) -> float:
    """How many branches a row takes, on average over rows: the work of a score."""
    visited = 0
    some = matrix[:: max(1, len(matrix) // 500)].astype(np.float64)
    for (tree,) in model.named_steps["classifier"]._predictors:
        nodes = tree.nodes
        for row in some:
            at = 0
            while not nodes[at]["is_leaf"]:
                node, visited = nodes[at], visited + 1
                value = row[node["feature_idx"]]
                left = node["missing_go_to_left"] if np.isnan(value) else value <= node["num_threshold"]
                at = node["left"] if left else node["right"]
    return visited / len(some)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print the ways only, a row for each")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(home=Path(folder)).prepare()
        past, month = read(settings)
        model, place = bundle(settings, past, TREES[0])
        one, all_cores = load_predictor(place), load_predictor(place, threads=cores())
        matrix = one.encode_frame(month)
        record = dict(zip(one.features, month[list(one.features)].iloc[0].tolist(), strict=True))
        ways = {
            "scikit-learn, DataFrame": lambda: scores(model, month),
            "scikit-learn, encoded": lambda: model.named_steps["classifier"].predict_proba(matrix),
            "bundle, encoded": lambda: one.scores(matrix),
            "encoding a DataFrame": lambda: one.encode_frame(month),
            "bundle, DataFrame": lambda: one.scores(one.encode_frame(month)),
            f"bundle, DataFrame, {cores()} threads": lambda: all_cores.scores(all_cores.encode_frame(month)),
        }
        found = race(ways, len(month), arguments.repeat)
        alone = {"bundle, a record at a time": lambda: [one.scores(one.encode([record])) for _ in range(2000)]}
        single = race(alone, 2000, arguments.repeat)
        fewer = {trees: load_predictor(bundle(settings, past, trees)[1]) for trees in TREES[1:]}
        by_trees = race({str(n): lambda n=n: fewer[n].scores(matrix) for n in fewer}, len(month), arguments.repeat)
        same = bool((all_cores.scores(matrix) == one.scores(matrix)).all())
        visited = steps(one, matrix, model)
    base = found["scikit-learn, DataFrame"]
    report = {
        "rows": len(month),
        "rows a second": {**found, **single},
        "against scikit-learn on a DataFrame": {name: round(value / base, 2) for name, value in found.items()},
        "rows a second by trees": {str(TREES[0]): found["bundle, encoded"], **by_trees},
        "branches a row": round(visited),
        "nanoseconds a branch": round(1e9 / found["bundle, encoded"] / visited, 2),
        "same answers on all cores": same,
        "largest difference": float(np.abs(one.scores(matrix) - scores(model, month)).max()),
    }
    rows = [{"way": way, "rows a second": round(rate)} for way, rate in {**found, **single}.items()]
    print(json.dumps(rows if arguments.json else report, indent=1))
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
