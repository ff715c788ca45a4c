"""How good is the model, what is knowledge of the aircraft worth, and where do the defaults of training come from?

Without options: train on January to September, test on October to December, once with all features and once without
those that need the tail number, which is the aircraft that really flew and may have been planned otherwise two hours
before. With --choose: the number of trees and the learning rate, compared on August and September after training on
January to July; October to December are not looked at. Uses the workspace of a finished `make run`.
"""

import argparse
import json
import time

import pandas as pd

from mlops_course.data import labelled_features, newest_reference
from mlops_course.environment import load_settings
from mlops_course.experiments import TrainingConfig, constant_scores, measure, scores, train
from mlops_course.project import flight_delay

AIRCRAFT = ("previous_leg_", "_aircraft_", "aircraft_age", "seats")
SHOWN = ["columns", "seconds", "pr_auc", "roc_auc", "log_loss", "brier"]


def measured(past: pd.DataFrame, future: pd.DataFrame, config: TrainingConfig) -> dict[str, float]:
    """Train, test and time one model."""
    begin = time.perf_counter()
    model = train(past, flight_delay, config)
    seconds = time.perf_counter() - begin
    label = future["label"].to_numpy()
    found = measure(label, scores(model, future), flight_delay.costs)
    return {"columns": len(model.feature_names_in_), "seconds": round(seconds, 1)} | found


def with_and_without_aircraft(frame: pd.DataFrame) -> dict[str, dict[str, float]]:
    """October to December, with all features and without those of the aircraft."""
    past, future = frame[frame["period"] <= "2013-09"], frame[frame["period"] > "2013-09"]
    aircraft = [name for name in frame.columns if any(part in name for part in AIRCRAFT)]
    constant = measure(future["label"].to_numpy(), constant_scores(past, len(future)), flight_delay.costs)
    return {
        "constant": {"columns": 0, "seconds": 0.0} | constant,
        "without the aircraft": measured(past.drop(columns=aircraft), future, TrainingConfig()),
        "all features": measured(past, future, TrainingConfig()),
    }


def candidates_for_the_defaults(frame: pd.DataFrame) -> dict[str, dict[str, float]]:
    """August and September, for some numbers of trees and learning rates."""
    past, future = frame[frame["period"] <= "2013-07"], frame[frame["period"].isin(["2013-08", "2013-09"])]
    tried = [(500, 0.04), (250, 0.08), (160, 0.1), (80, 0.1), (80, 0.2)]
    return {
        f"{trees} trees, learning rate {rate}": measured(
            past, future, TrainingConfig(iterations=trees, learning_rate=rate)
        )
        for trees, rate in tried
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--choose", action="store_true", help="compare settings on August and September")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    options = parser.parse_args()
    settings = load_settings()
    features, rows = (newest_reference(settings, f"flight-delay/{name}") for name in ("features", "flights"))
    frame = labelled_features(settings, flight_delay, features, rows, "2013-01", "2013-12")
    results = candidates_for_the_defaults(frame) if options.choose else with_and_without_aircraft(frame)
    print(json.dumps(results, indent=1) if options.json else pd.DataFrame(results).T[SHOWN].round(4).to_string())


if __name__ == "__main__":
    main()
