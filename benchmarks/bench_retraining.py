"""How often does a model have to be trained again, and what does it cost to train less often?

Replays 2013 month by month, from a model of the first quarter on: never trained again, trained each month, and trained
when the policy of section 12 says so. All of them score the same flights. Prints the log loss of each month, how many
trainings there were, and the loss of the policy against that of monthly training.
"""

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path

import pandas as pd
from apart import keys_of_its_own

from mlops_course.data import build_features, ingest, labelled_features, months, validate
from mlops_course.environment import Settings
from mlops_course.experiments import TrainingConfig
from mlops_course.experiments.evaluation import row_losses
from mlops_course.experiments.model import scores, train
from mlops_course.monitoring.retraining import ModelState, RetrainingPolicy, decide_retraining
from mlops_course.monitoring.watching import alarm_text, watch_performance
from mlops_course.project import flight_delay

FIRST, BEFORE, LAST = "2013-01", "2013-03", "2013-12"


def labelled_year(home: Path) -> pd.DataFrame:
    """All flights of the year with features and labels."""
    settings = Settings(home=home).prepare()
    for month in months(FIRST, LAST):
        delivery = ingest(settings, flight_delay, month)
    clean = validate(settings, flight_delay, delivery.tables, months(FIRST, LAST)).tables
    features = build_features(settings, flight_delay, clean, FIRST, LAST)
    return labelled_features(settings, flight_delay, features, clean["flights"], FIRST, LAST)


class Models:
    """One model for each last month of training; each is trained once."""

    def __init__(self, year: pd.DataFrame, config: TrainingConfig) -> None:
        self.year, self.config = year, config
        self._trained: dict[str, object] = {}

    def score(self, trained_last: str, month: str) -> pd.DataFrame:
        """A month with the scores of the model that was trained up to another one."""
        if trained_last not in self._trained:
            past = self.year[self.year["period"] <= trained_last]
            self._trained[trained_last] = train(past, flight_delay, self.config)
        rows = self.year[self.year["period"] == month]
        found = rows[[flight_delay.time, "period", "label"]]
        return found.assign(score=scores(self._trained[trained_last], rows))  # type: ignore[arg-type]


def replay_policy(models: Models, policy: RetrainingPolicy) -> tuple[pd.DataFrame, list[str]]:
    """The year with the policy: all scored rows, and why it trained when."""
    state, scored, since, said = ModelState(BEFORE, FIRST, BEFORE), [], [], []
    for month in months("2013-04", LAST):
        rows = models.score(state.trained_last, month)
        scored.append(rows)
        since.append(rows)
        watched = watch_performance(pd.concat(since), flight_delay)
        state = replace(state, month=month, performance=alarm_text(watched, month))
        decision = decide_retraining(policy, state)
        if decision.retrain and month < LAST:
            said.append(f"{month}: {decision.rule}, {decision.reason}")
            state = replace(state, trained_last=month, trainings=(*state.trainings, month))
            since = []
    return pd.concat(scored), said


def losses_of(rows: pd.DataFrame) -> pd.Series:
    """What each row adds to the log loss, by month."""
    return pd.Series(row_losses(rows["label"].to_numpy(), rows["score"].to_numpy()), index=rows["period"].to_numpy())


def main() -> None:
    """Replay and compare."""
    keys_of_its_own()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--iterations", type=int, default=160, help="trees of each model")
    parser.add_argument("--json", action="store_true", help="print the table as JSON")
    options = parser.parse_args()
    config = TrainingConfig(iterations=options.iterations)
    with tempfile.TemporaryDirectory() as folder:
        models = Models(labelled_year(Path(folder)), config)
    replayed = months("2013-04", LAST)
    by_policy, said = replay_policy(models, RetrainingPolicy())
    before = dict(zip(replayed, [BEFORE, *replayed], strict=False))
    every = {
        "never again": pd.concat([models.score(BEFORE, month) for month in replayed]),
        "each month": pd.concat([models.score(before[month], month) for month in replayed]),
        "by the policy": by_policy,
    }
    losses = {name: losses_of(rows) for name, rows in every.items()}
    total = {name: each.mean() for name, each in losses.items()}
    trainings = {"never again": 0, "each month": len(replayed) - 1, "by the policy": len(said)}
    if options.json:
        table = [
            {"trained": name, "trainings": trainings[name], "log loss": round(float(value), 4),
             "against each month": f"{value / total['each month'] - 1:+.2%}"}
            for name, value in total.items()
        ]  # fmt: skip
        return print(json.dumps(table, indent=1))
    print(pd.DataFrame({name: each.groupby(level=0).mean() for name, each in losses.items()}).round(4).to_string())
    print("\nlog loss of all:", {name: round(float(value), 4) for name, value in total.items()})
    print("trainings:", trainings)
    print("\n".join(f"  {line}" for line in said))
    print(f"the policy against monthly training: {total['by the policy'] / total['each month'] - 1:+.2%} log loss")
    print(f"never again against monthly training: {total['never again'] / total['each month'] - 1:+.2%} log loss")


if __name__ == "__main__":
    main()
