"""How long does the guard of a release take, how often is it wrong, and which faults does it find?

Made-up releases with a known truth: flights arrive at 100 a second, of the airlines in their shares of 2013, and each
is scored by both versions. An honest retraining differs from the stable model as the model of January to April does
from that of January to March, measured on May: mean difference 0.02, deviation 0.05; 7 % of the decisions, and 10 % of
the orders of two rows, are others. The judge sees the counts every five seconds, as the leader of the workers does
every second. Three tables: when an honest candidate is promoted; how often each fault is found, and when; and how often
a candidate at the edge of its limits is decided wrongly, beside the promise `alpha`.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mlops_course.deployment import Release, ReleaseLimits, decide_release
from mlops_course.deployment.counting import Counts, PairCounts, RankCounts, RequestCounts
from mlops_course.deployment.statistics import BUCKETS

PER_SECOND, LOOK = 100, 5  # requests, and seconds between two looks
CARRIERS = {
    "UA": 0.174, "B6": 0.162, "EV": 0.161, "DL": 0.143, "AA": 0.097, "MQ": 0.078, "US": 0.061, "9E": 0.055,
    "WN": 0.036, "VX": 0.0153, "FL": 0.0097, "AS": 0.0021, "F9": 0.002, "YV": 0.0018, "HA": 0.001, "OO": 0.0001,
}  # fmt: skip
NAMES = tuple(CARRIERS)
THRESHOLD = 0.2667
Chance = np.random.Generator
# n rows -> names of carriers as places, scores of the stable version and of the candidate (NaN: it fails)
Candidate = Callable[[Chance, int], tuple[np.ndarray, np.ndarray, np.ndarray]]


def rows(chance: Chance, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Flights, and what the stable version says of them: a fifth is warned of."""
    shares = np.array(list(CARRIERS.values()))
    return chance.choice(len(NAMES), count, p=shares / shares.sum()), chance.beta(1.1, 4.6, count)


def honest(chance: Chance, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A retraining."""
    carriers, stable = rows(chance, count)
    return carriers, stable, np.clip(stable + chance.normal(0.02, 0.05, count), 0.001, 0.999)


def twin(chance: Chance, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The same model again."""
    carriers, stable = rows(chance, count)
    return carriers, stable, stable.copy()


def spoilt(change: Callable[[Chance, np.ndarray, np.ndarray], np.ndarray]) -> Candidate:
    """An honest retraining with a fault: what it says of flights, changed."""

    def scored(chance: Chance, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        carriers, stable, candidate = honest(chance, count)
        return carriers, stable, change(chance, carriers, candidate)

    return scored


def of(carrier: str, change: Callable[[np.ndarray], np.ndarray | float]) -> Candidate:
    """A fault of one airline's flights."""
    return spoilt(lambda _, carriers, scores: np.where(carriers == NAMES.index(carrier), change(scores), scores))


def seldom(change: Callable[[Chance, np.ndarray], np.ndarray]) -> Candidate:
    """A stable version that warns of 3 % of the rows, and a candidate that says something else."""

    def scored(chance: Chance, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        carriers, stable = rows(chance, count)
        return carriers, stable * 0.45, change(chance, stable * 0.45)

    return scored


def flat(chance: Chance, _: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """The mean score for everybody, with a little noise."""
    return 0.21 + chance.normal(0, 0.003, len(scores))


FAULTS: dict[str, Candidate] = {
    "fails on each flight of HA (1 in 1,000)": of("HA", lambda scores: np.nan),
    "fails on each flight of AS (1 in 480)": of("AS", lambda scores: np.nan),
    "calls all flights of WN late": of("WN", lambda scores: scores + 0.6),
    "fails on 5 % of all requests": spoilt(lambda chance, _, s: np.where(chance.random(len(s)) < 0.05, np.nan, s)),
    "never warns": spoilt(lambda _, __, scores: scores * 0.3 + 0.15),
    "never warns, and the stable one seldom": seldom(lambda _, scores: np.minimum(scores, 0.25)),
    "ranks nothing: scores dealt out anew": spoilt(lambda chance, _, scores: chance.permutation(scores)),
    "the same, with few warnings": seldom(lambda chance, scores: chance.permutation(scores)),
    "the same score for everybody": spoilt(flat),
    "0.1 too high": spoilt(lambda _, __, scores: scores + 0.1),
}
EDGES: dict[str, Candidate] = {
    "mean difference 0.049, limit 0.05": spoilt(lambda _, __, scores: scores + 0.029),
    "mean difference 0.051, limit 0.05": spoilt(lambda _, __, scores: scores + 0.031),
}


@dataclass
class Outcome:
    """How a release ended, and after how many seconds."""

    action: str
    seconds: float
    reason: str


def count_rows(counts: Counts, stable: np.ndarray, candidate: np.ndarray, carriers: np.ndarray) -> None:
    """Add what was seen of some rows, as the workers do row by row."""
    fine = np.isfinite(candidate)
    for name, chosen in [("", fine | True), *((f"carrier={NAMES[at]}", carriers == at) for at in np.unique(carriers))]:
        both, old, new = chosen & fine, stable[chosen & fine], candidate[chosen & fine]
        warned, before, difference = new >= THRESHOLD, old >= THRESHOLD, new - old
        pairs = PairCounts(
            count=int(both.sum()), total=float(difference.sum()), squares=float((difference**2).sum()),
            flips=int((warned != before).sum()), warned=int(warned.sum()), stable_warned=int(before.sum()),
            failed=int((chosen & ~fine).sum()),
        )  # fmt: skip
        counts.pairs[name] = counts.pairs.get(name, PairCounts()) + pairs
    old, new = stable[fine], candidate[fine]
    half = len(old) // 2
    gap, other = new[:half] - new[half : 2 * half], old[:half] - old[half : 2 * half]
    counts.ranks += RankCounts(
        half, int((gap * other <= 0).sum()), float(abs(gap).sum()), float((gap**2).sum()), float(abs(other).sum()),
        float((other**2).sum()),
    )  # fmt: skip


def count_requests(counts: Counts, share: float, chance: Chance, failed: np.ndarray) -> None:
    """Add the requests: the candidate answers a share, and scores the others silently; equally fast versions."""
    answers = chance.random(len(failed)) < share
    counts.candidate += RequestCounts(int(answers.sum()), int((answers & failed).sum()))
    counts.silent_candidate += RequestCounts(int((~answers | failed).sum()), int(failed.sum()))
    counts.stable += RequestCounts(int((~answers | failed).sum()))
    counts.silent_stable += RequestCounts(int((answers & ~failed).sum()))
    for role in (counts.silent_stable, counts.silent_candidate):
        times = np.clip(np.log2(chance.gamma(16, 3e-4 / 16, 20 * LOOK) / 1e-6) * 8 + 1, 0, BUCKETS - 1).astype(int)
        for bucket in times:
            role.buckets[bucket] += 1


def run(candidate: Candidate, seed: int, most: float, limits: ReleaseLimits) -> Outcome:
    """A canary with the usual steps, until the guard decides or the time is over."""
    chance, counts = np.random.default_rng(seed), Counts()
    when = {"started": "2013-01-01T00:00:00+00:00", "changed": "2013-01-01T00:00:00+00:00"}
    names = {
        "id": "r", "stable": "flight-delay@3", "candidate": "flight-delay@4", "status": "running",
        "reason": "", "by": "person",
    }  # fmt: skip
    step, before, since = 0, 0, 0.0
    for seconds in np.arange(LOOK, most + LOOK, LOOK):
        release = Release(
            strategy="canary", steps=(0.05, 0.25), step=step, before=before, limits=limits, **names, **when
        )  # type: ignore[arg-type]
        carriers, stable, scores = candidate(chance, PER_SECOND * LOOK)
        count_rows(counts, stable, scores, carriers)
        count_requests(counts, release.share, chance, ~np.isfinite(scores))
        decision = decide_release(release, counts, seconds - since)
        if decision.action in ("promote", "roll back"):
            return Outcome(decision.action, float(seconds), decision.reason)
        if decision.action == "step":
            step, before, since = step + 1, decision.values["before"], float(seconds)
    return Outcome("wait", float(most), decision.reason)


def show(title: str, kinds: dict[str, Candidate], runs: int, minutes: float) -> None:
    """One table: how each kind of candidate ends, and when."""
    limits = ReleaseLimits(slices=("carrier",))
    print(f"\n{title} ({runs} releases each, at most {minutes:g} minutes)")
    print(f"{'':42}{'promoted':>9}{'back':>6}{'waits':>7}{'median':>9}{'longest':>9}  reason of the first")
    for name, kind in kinds.items():
        found = [run(kind, seed, minutes * 60, limits) for seed in range(runs)]
        ended = [each.seconds / 60 for each in found if each.action != "wait"] or [float("nan")]
        many = {action: sum(each.action == action for each in found) for action in ("promote", "roll back", "wait")}
        times = f"{np.median(ended):6.1f} min{max(ended):5.1f} min"
        shown = f"{many['promote']:9}{many['roll back']:6}{many['wait']:7}{times}"
        print(f"{name:42}{shown}  {found[0].reason.split('; ')[0][:70]}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=50, help="releases of each kind")
    parser.add_argument("--quick", action="store_true", help="two releases of each kind")
    options = parser.parse_args()
    runs = 2 if options.quick else options.runs
    print(f"{PER_SECOND} requests a second, steps of 5 and 25 %, alpha {ReleaseLimits().alpha:g}")
    show("Honest", {"a retraining": honest, "the same model again": twin}, runs, 30)
    show("Faults", FAULTS, runs, 15)
    show("At the edge", EDGES, runs, 15)


if __name__ == "__main__":
    main()
