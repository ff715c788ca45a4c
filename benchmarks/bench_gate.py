"""Does the gate refuse what is bad and accept what is good? The real year, twenty planted faults, twenty honest models.

Six tables, and how often each answer was given: twenty challengers for July, each better than the champion until one
fault was planted; the real retraining of July and of November against the model of January to March; twenty honest
challengers, with a source of information that the champion hasn't, or trained to the end where it hardly learnt; ten
whose gain is small; twenty twins of the champion, which differ in their seed alone; and made-up months with a known
truth, for the share of false promotions and the power. Needs the features and flights of the whole year in the
workspace (`make run` leaves them). All but the honest ones take the schedule and the weather only, so that it ends in
minutes.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from mlops_course.data import labelled_features, newest_reference, read_table
from mlops_course.delivery import Contender, GateDecision, judge_challenger
from mlops_course.environment import load_settings
from mlops_course.experiments import TrainingConfig, scores, train
from mlops_course.project import flight_delay
from mlops_course.serving.packaging import group_features

KNOWN = {"the weather at the origin", "the time of day and week"}
ALSO = {"distance", "block_minutes", "seats", "planned_speed", "aircraft_age"}
FULL = TrainingConfig(iterations=80)
Row = dict[str, Any]


def year() -> tuple[pd.DataFrame, pd.DataFrame]:
    """All features and labels of the year; and schedule and weather alone, with the delay at departure as a leak."""
    settings = load_settings()
    features, rows = (newest_reference(settings, f"flight-delay/{name}") for name in ("features", "flights"))
    frame = labelled_features(settings, flight_delay, features, rows, "2013-01", "2013-12")
    groups = group_features(map(str, frame.columns), flight_delay.groups)
    numbers = [name for name in frame if frame[name].dtype == "float32"]
    dropped = [name for name in numbers if groups.get(name) not in KNOWN and name not in ALSO]
    left = read_table(settings, rows)[[*flight_delay.key, "dep_delay"]].astype({"dep_delay": "float32"})
    narrow = frame.drop(columns=dropped).merge(left, on=list(flight_delay.key), how="left", validate="one_to_one")
    return frame, narrow


def trained(frame: pd.DataFrame, last: str, config: TrainingConfig = FULL, **changed: Any) -> Any:
    """A model of January up to a month; `dep_delay` stays out of it unless it is asked for."""
    past = frame[frame["period"] <= last]
    if not changed.get("leak"):
        past = past.drop(columns="dep_delay", errors="ignore")
    if "flip" in changed:
        past = past.assign(label=past["label"].where(past["carrier"] != changed["flip"], 1 - past["label"]))
    return train(past, flight_delay, config)


def judged(frame: pd.DataFrame, month: str, new: Contender, old: Contender) -> GateDecision:
    """The gate's answer for one month."""
    rate = float(frame.loc[frame["period"] < month, "label"].mean())
    return judge_challenger(frame[frame["period"] == month], flight_delay, new, old, rate)


def logit(score: np.ndarray) -> np.ndarray:
    """Scores as odds."""
    return np.log(score / (1 - score))


def expit(odds: np.ndarray) -> np.ndarray:
    """Odds as scores."""
    return 1 / (1 + np.exp(-odds))


def with_map(model: Any, column: int, test: pd.DataFrame, wrong: Any) -> np.ndarray:
    """Scores with another map of one column's categories."""
    encoder = model.named_steps["columns"].transformers_[0][1]
    right = encoder.categories_[column]
    renamed = dict(zip(right, wrong(list(right)), strict=True))
    name = flight_delay.categorical[column]
    return scores(model, test.assign(**{name: test[name].map(lambda value: renamed.get(value, value))}))


def faults(frame: pd.DataFrame, new: Any) -> dict[str, Contender]:
    """Twenty bad challengers for July."""
    test = frame[frame["period"] == "2013-07"]
    good, label = scores(new, test), test["label"].to_numpy()
    random, june = np.random.default_rng(2013), "2013-06"

    def where(rows: Any, other: np.ndarray) -> np.ndarray:
        return np.where(rows, other, good)

    leak = trained(frame, june, leak=True)
    found = {
        "scores of EV turned round": where(test["carrier"] == "EV", 1 - good),
        "scores of US turned round": where(test["carrier"] == "US", 1 - good),
        "scores of WN turned round": where(test["carrier"] == "WN", 1 - good),
        "scores of LGA turned round": where(test["origin"] == "LGA", 1 - good),
        "scores of 19 h turned round": where(test["scheduled_hour"] == 19, 1 - good),
        "trained with the labels of B6 turned round": scores(trained(frame, june, flip="B6"), test),
        "leak: the departure delay is a feature": scores(leak, test),
        "leak: half of the label": 0.5 * good + 0.5 * label.clip(0.05, 0.95),
        "stale: January only": scores(trained(frame, "2013-01"), test),
        "rows mixed up by a day": np.roll(good, 950),
        "promises too much (square root)": np.sqrt(good),
        "promises too much (odds + 1)": expit(logit(good) + 1),
        "too sure (odds x 2.5)": expit(2.5 * logit(good)),
        "not sure of anything (odds x 0.2)": expit(0.2 * logit(good)),
        "noise on the odds": expit(logit(good) + random.normal(0, 1.5, len(good))),
        "carriers' codes moved by one": with_map(new, 0, test, lambda names: [*names[1:], names[0]]),
        "destinations' codes turned round": with_map(new, 2, test, lambda names: names[::-1]),
        "hours in another time zone": scores(new, test.assign(**{
            name: ((test[name] + minutes) % (24 * 60 if minutes > 24 else 24)).astype("float32")
            for name, minutes in (("scheduled_hour", 8), ("scheduled_minute_of_day", 480))
        })),
        "no answer for one airline": where(test["carrier"] == "AA", np.nan),
        "slow": good,
    }  # fmt: skip
    lasts = {"stale: January only": "2013-01"}
    made = {name: Contender(name, score, lasts.get(name, june)) for name, score in found.items()}
    made |= {name: replace(each, trained=good) for name, each in made.items() if "codes" in name}  # packaged wrongly
    made["slow"] = replace(made["slow"], seconds=random.gamma(50, 4e-5, 200))
    return made


def row(month: str, decision: GateDecision) -> Row:
    """One line of a table."""
    return {"month": month, "answer": decision.action, "because": decision.reason[:110]}


def real_year(frame: pd.DataFrame, frozen: Any) -> dict[str, Row]:
    """July's retraining, and November's."""
    found = {}
    for month, last in (("2013-07", "2013-06"), ("2013-11", "2013-10")):
        test = frame[frame["period"] == month]
        new, old = (scores(model, test) for model in (trained(frame, last, TrainingConfig()), frozen))
        decision = judged(frame, month, Contender("retrained", new, last), Contender("frozen", old, "2013-03"))
        found[f"retrained for {month}"] = row(month, decision)
    return found


def planted(frame: pd.DataFrame, frozen: Any) -> dict[str, Row]:
    """The faults, and the faultless one."""
    test, new = frame[frame["period"] == "2013-07"], trained(frame, "2013-06")
    times = np.random.default_rng(1).gamma(50, 2e-5, 200)
    old = Contender("champion", scores(frozen, test), "2013-03", times)
    faultless = {"(no fault)": Contender("new", scores(new, test), "2013-06", times[::-1])}
    every = faultless | faults(frame, new)
    return {name: row("2013-07", judged(frame, "2013-07", each, old)) for name, each in every.items()}


def honest(wide: pd.DataFrame, narrow: pd.DataFrame) -> Iterator[tuple[str, dict[str, Row]]]:
    """Better for a known reason; hardly better, by more trees; and twins that differ in the seed alone."""
    better, hardly, twins = {}, {}, {}
    for number in range(3, 13):
        month, last = f"2013-{number:02}", f"2013-{number - 1:02}"

        def scored(frame: pd.DataFrame, config: TrainingConfig, month: str = month, last: str = last) -> Contender:
            name, test = f"{config.iterations} trees", frame[frame["period"] == month]
            return Contender(name, scores(trained(frame, last, config), test), last)

        new, usual = scored(wide, FULL), scored(narrow, FULL)
        weak, some = scored(wide, replace(FULL, iterations=5)), scored(narrow, replace(FULL, iterations=15))
        better[f"knows the state of the system, {month}"] = row(month, judged(wide, month, new, usual))
        better[f"80 trees against 5, {month}"] = row(month, judged(wide, month, new, weak))
        hardly[f"80 trees against 15, {month}"] = row(month, judged(narrow, month, usual, some))
        for seed in (1, 2):
            twin = scored(narrow, replace(FULL, seed=seed))
            twins[f"seed {seed}, {month}"] = row(month, judged(narrow, month, twin, usual))
    yield from {"honest": better, "hardly better": hardly, "twins": twins}.items()


def made_up(noise: float, repeats: int) -> dict[str, float]:
    """How often a challenger with some noise is promoted, or broken by a guard, when the champion's noise is 1."""
    found = {"promote": 0, "broken guard": 0}
    for seed in range(repeats):
        random = np.random.default_rng(seed)
        odds = random.normal(-1.3, 1.2, 6000) + np.repeat(random.normal(0, 0.5, 30), 200)
        slices = {"carrier": random.choice(list("ABCDEFGH"), 6000), "origin": random.choice(list("xyz"), 6000)}
        frame = pd.DataFrame(slices)
        days = pd.Timestamp("2013-07-01 16:00", tz="UTC") + pd.to_timedelta(np.arange(6000) // 200, "D")
        frame = frame.assign(scheduled_departure=days, scheduled_hour=random.integers(5, 23, 6000).astype(float))
        frame["label"] = (random.random(6000) < expit(odds)).astype(float)
        new, old = (expit((odds + random.normal(0, fog, 6000)) / (1 + 0.15 * fog**2)) for fog in (noise, 1.0))
        decision = judge_challenger(frame, flight_delay, Contender("new", new), Contender("old", old), 0.25)
        found["promote"] += decision.action == "promote"
        found["broken guard"] += any(each.kind == "guard" and each.verdict == "fail" for each in decision.checks)
    return {"noise": noise, "months": repeats} | {name: count / repeats for name, count in found.items()}


def measured(wide: pd.DataFrame, narrow: pd.DataFrame, repeats: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each table as soon as it is there."""
    frozen = trained(narrow, "2013-03", TrainingConfig())
    yield "planted faults", planted(narrow, frozen)
    yield "the real year", real_year(narrow, frozen)
    yield from honest(wide, narrow)
    yield "made-up months", {f"noise {noise}": made_up(noise, repeats) for noise in (1.1, 1.0, 0.9, 0.8, 0.7)}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--repeats", type=int, default=200, help="made-up months for each noise")
    options = parser.parse_args()
    found = {}
    for name, table in measured(*year(), options.repeats):
        found[name] = table
        if not options.json:
            shown = pd.DataFrame(table).T
            counts = shown["answer"].value_counts().to_string() if "answer" in shown else ""
            print(f"\n{name}\n{shown.to_string()}\n{counts}", flush=True)
    if options.json:
        print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
