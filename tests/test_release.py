"""Release logic without a service: who gets which version, what is concluded from counts, what is written down."""

import copy
import hashlib
import json
import math
import multiprocessing
import os
import subprocess
import sys
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlops_course.deployment import (
    STEPS,
    Release,
    ReleaseError,
    ReleaseLimits,
    create_release,
    live_reference,
    promote_release,
    read_release,
    read_release_history,
    release_files,
    roll_back_release,
    update_release,
)  # fmt: skip
from mlops_course.deployment.callers import GROUPS, caller_group
from mlops_course.deployment.counting import (
    Counts,
    PairCounts,
    RankCounts,
    RequestCounts,
    read_counts,
    since,
    write_counts,
)
from mlops_course.deployment.judging import decide_release, judge_counts
from mlops_course.deployment.leader import review_release
from mlops_course.deployment.pairing import (
    Answered,
    Sample,
    compare_sample,
    count_outcome,
    default_slice_columns,
    slice_values,
    tally,
    time_rows,
)
from mlops_course.deployment.releases import MAX_SLICES
from mlops_course.deployment.routing import candidate_answers, place_of
from mlops_course.deployment.statistics import (
    BUCKETS,
    bucket_of,
    edge_of,
    mean_interval,
    quantile_buckets,
    share_interval,
    times_of,
)  # fmt: skip
from mlops_course.deployment.workers import Counter, Route, can_replace
from mlops_course.environment import Settings, write_atomic
from mlops_course.serving.bundle import Feature
from mlops_course.serving.models import Asked, Choice

STABLE, CANDIDATE = "flight-delay@3", "flight-delay@4"
shares = st.floats(0, 1)
keys = st.text(max_size=40)

# ---------------------------------------------------------------- the router


@given(keys, keys)
def test_a_key_has_one_place_below_one(key: str, release: str) -> None:
    assert 0 <= place_of(key, release) < 1
    assert place_of(key, release) == place_of(key, release)


@given(keys, shares, shares)
def test_a_growing_share_never_takes_a_key_back(key: str, one: float, other: float) -> None:
    small, large = sorted((one, other))
    place = place_of(key, "release")
    assert candidate_answers(place, small) <= candidate_answers(place, large)
    assert not candidate_answers(place, 0.0)
    assert candidate_answers(place, 1.0)


def test_the_share_of_the_keys_is_the_share_that_was_asked_for() -> None:
    places = np.array([place_of(f"{number}", "r") for number in range(20_000)])
    for share in (0.01, 0.05, 0.5, 0.9):
        assert abs((places < share).mean() - share) < 4 * math.sqrt(share * (1 - share) / 20_000)


def test_another_release_tries_its_candidate_on_other_keys() -> None:
    places = np.array([[place_of(f"{number}", release) for number in range(5000)] for release in "ab"])
    assert abs(np.corrcoef(places)[0, 1]) < 0.06


def test_a_key_has_the_same_place_on_every_machine() -> None:
    assert place_of("desk-1", "20261124-canary") == 0.3871934740580941


def test_requests_without_a_key_reach_the_candidate_too() -> None:
    stable, candidate = Choice(Formula(0.0)), Choice(Formula(0.1))  # type: ignore[arg-type]
    release = release_of(steps=(0.3,))
    route = Route(release, stable, candidate, Counter(release))
    found = sum(route.choose(None) is candidate for _ in range(4000)) / 4000
    assert abs(found - 0.3) < 0.04
    assert len({id(route.choose("desk")) for _ in range(50)}) == 1


# ---------------------------------------------------------------- intervals


@given(st.integers(0, 300), st.integers(0, 300), st.floats(1e-6, 0.4))
def test_a_share_lies_in_its_interval_and_less_risk_means_a_wider_one(count: int, rest: int, alpha: float) -> None:
    trials = count + rest
    low, high = share_interval(count, trials, alpha)
    assert 0 <= low <= (count / trials if trials else 0.5) <= high <= 1
    wider = share_interval(count, trials, alpha / 10)
    assert wider[0] <= low + 1e-9
    assert wider[1] >= high - 1e-9


def ever_wrong(share: float, generator: np.random.Generator, alpha: float) -> bool:
    """Whether the interval of a service misses its true share at any of 600 looks."""
    counts = (generator.random(600) < share).cumsum()
    looks = ((int(count), trials) for trials, count in enumerate(counts, 1))
    return any(not low <= share <= high for low, high in (share_interval(*look, alpha) for look in looks))


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.01, 0.3])
def test_shares_are_missed_no_more_often_than_promised_at_all_looks_together(share: float) -> None:
    generator, runs, alpha = np.random.default_rng(1), 120, 0.1
    missed = sum(ever_wrong(share, generator, alpha) for _ in range(runs))
    assert missed <= runs * alpha + 3 * math.sqrt(runs * alpha)


def test_means_are_missed_no_more_often_than_promised_at_all_looks_together() -> None:
    generator, runs, alpha, missed = np.random.default_rng(2), 300, 0.1, 0
    for _ in range(runs):
        values = generator.exponential(0.1, 1500) - 0.1  # skewed, with mean 0
        totals, squares = values.cumsum(), (values**2).cumsum()
        looks = [mean_interval(n, totals[n - 1], squares[n - 1], alpha) for n in range(50, 1500, 10)]
        missed += any(not low <= 0 <= high for low, high in looks)
    assert missed <= runs * alpha + 3 * math.sqrt(runs * alpha)


@given(st.lists(st.floats(1e-6, 200), min_size=1, max_size=300), st.floats(0.05, 0.95))
def test_a_quantile_lies_in_its_interval(times: list[float], quantile: float) -> None:
    buckets = np.bincount([bucket_of(each) for each in times], minlength=BUCKETS).tolist()
    low, high = times_of(*quantile_buckets(buckets, quantile, 0.01))
    found = float(np.quantile(times, quantile, method="inverted_cdf"))
    assert low <= found <= high


@given(st.floats(1e-6, 200))
def test_a_time_lies_in_its_bucket(seconds: float) -> None:
    bucket = bucket_of(seconds)
    assert seconds <= edge_of(bucket) * (1 + 1e-9)
    assert bucket == 0 or seconds >= edge_of(bucket - 1) * (1 - 1e-9)


# ---------------------------------------------------------------- counts

numbers = st.integers(0, 10**6)
requests = st.builds(
    RequestCounts, answered=numbers, failed=numbers, rows=numbers, warned=numbers,
    total=st.integers(0, 1000).map(float), buckets=st.binary(min_size=BUCKETS, max_size=BUCKETS).map(list),
)  # fmt: skip
pairs = st.dictionaries(
    st.sampled_from(["", "carrier=UA", "carrier=AA"]),
    st.builds(
        PairCounts,
        count=numbers,
        total=st.integers(-99, 99).map(float),
        squares=st.integers(0, 99).map(float),
        flips=numbers,
    ),
)
workers = st.lists(st.builds(Counts, stable=requests, candidate=requests, pairs=pairs), max_size=4)


@given(workers, st.randoms())
def test_counts_are_the_same_in_whatever_order_workers_are_added(counted: list[Counts], order: Any) -> None:
    def together(each: list[Counts]) -> bytes:
        total = Counts()
        for counts in each:
            total.add(msgspec.json.decode(msgspec.json.encode(counts), type=Counts))
        return msgspec.json.encode(total, order="sorted")

    mixed = list(counted)
    order.shuffle(mixed)
    assert together(mixed) == together(counted)


def test_a_damaged_file_of_counts_hides_nothing_and_nobody_goes_on_half_blind(settings: Settings) -> None:
    for worker in ("one", "two"):
        write_counts(settings, "r", worker, counted(700))
    (settings.serving / "release-counts" / "r" / "two.json").write_bytes(b'{"candidate": {"answered": null')
    counts = read_counts(settings, "r")
    assert (counts.candidate.answered, counts.unread) == (700, ["two"])
    decision = decide_release(release_of(), counts, 0)
    assert (decision.action, decision.reason) == ("wait", "can't read the counts of two")
    older = msgspec.to_builtins(counted(700))
    older["silent_stable"]["buckets"].pop()
    (settings.serving / "release-counts" / "r" / "two.json").write_bytes(msgspec.json.encode(older))
    assert read_counts(settings, "r").unread == ["two"], "an earlier version's buckets are not ours"
    write_counts(settings, "r", "three", counted(700, failed=300))
    assert decide_release(release_of(), read_counts(settings, "r"), 0).action == "roll back"
    assert read_counts(settings, "never").candidate.answered == 0


# ---------------------------------------------------------------- decisions

LIMITS = ReleaseLimits(min_requests=500, hold_seconds=0)


def release_of(strategy: str = "canary", limits: ReleaseLimits = LIMITS, **values: Any) -> Release:
    """A release that is running."""
    plain = {
        "id": "r",
        "status": "running",
        "stable": STABLE,
        "candidate": CANDIDATE,
        "steps": STEPS[strategy],
        "step": 0,
    }
    moments = {
        "started": "2026-01-01T00:00:00+00:00",
        "changed": "2026-01-01T00:00:00+00:00",
        "reason": "",
        "by": "person",
    }
    return Release(strategy=strategy, limits=limits, **{**plain, **moments, **values})  # type: ignore[arg-type]


def counted(
    rows: int = 1000, differences: float = 0.0, spread: float = 0.02, failed: int = 0, slower: float = 1.0,
    seed: int = 0,
    carriers: tuple[float, ...] = (0.6, 0.35, 0.05), wrong: dict[int, float] | None = None,
) -> Counts:  # fmt: skip
    """Counts of a candidate that has answered as many requests as the stable version."""
    generator, counts = np.random.default_rng(seed), Counts()
    counts.stable.answered = counts.candidate.answered = rows
    for role, factor in ((counts.silent_stable, 1.0), (counts.silent_candidate, slower)):
        for seconds in generator.gamma(16, 0.00025 * factor, rows):
            role.add_time(seconds)
    counts.candidate.failed = failed
    last = (0.0, 0.0)
    for carrier in generator.choice(len(carriers), rows, p=carriers):
        difference = generator.normal(differences + (wrong or {}).get(int(carrier), 0.0), spread)
        score, flipped = generator.random(), abs(difference) > 0.1
        counts.add_pair(["", f"carrier={carrier}"], difference, flipped, (score > 0.5) != flipped)
        counts.ranks.add_two(last, last := (score, score + difference))
    return counts


@pytest.mark.parametrize(
    ("counts", "named"),
    [
        (counted(failed=80), "errors "),
        (counted(slower=3), "latency "),
        (counted(differences=0.1), "shift "),
        (counted(spread=0.2), "decision_flip_rate "),
        (counted(4000, wrong={2: 0.3}), "shift of carrier=2 "),
        (counted(failed=999), "errors "),
    ],
)
@pytest.mark.parametrize("strategy", list(STEPS))
def test_a_broken_limit_is_a_roll_back_that_names_it(strategy: str, counts: Counts, named: str) -> None:
    decision = decide_release(release_of(strategy), counts, 0)
    assert decision.action == "roll back"
    assert named in decision.reason
    assert decision.values == {"status": "rolled back"}


def test_a_slice_that_is_too_small_to_be_seen_in_the_mean_is_seen() -> None:
    checks = judge_counts(counted(4000, wrong={2: 0.3}), LIMITS)
    verdicts = {(check.name, check.slice): check.verdict for check in checks}
    assert verdicts["shift", "carrier=2"] == "fail"
    assert verdicts["shift", ""] == "pass"


@pytest.mark.parametrize("rows", [0, 1, 20, 49])
def test_little_data_decides_nothing_however_bad_they_look(rows: int) -> None:
    assert decide_release(release_of(), counted(rows, differences=0.5, failed=rows), 10**6).action == "wait"


@given(st.integers(0, 2000), st.integers(0, 2000), st.integers(0, 100))
def test_more_failures_never_make_a_candidate_look_better(answered: int, failed: int, more: int) -> None:
    order = {"pass": 0, "inconclusive": 1, "insufficient": 1, "fail": 2}
    failed, verdicts = min(failed, answered), []
    for number in (failed, min(failed + more, answered)):
        counts = Counts(stable=RequestCounts(answered=1000), candidate=RequestCounts(answered=answered, failed=number))
        verdicts.append(order[judge_counts(counts, LIMITS)[0].verdict])
    assert verdicts[0] <= verdicts[1]


def test_a_good_canary_goes_up_and_is_promoted() -> None:
    first = decide_release(release_of(), counted(700), 0)
    assert (first.action, first.values) == ("step", {"step": 1, "before": 700})
    second = release_of(step=1, before=700)
    assert decide_release(second, counted(1000), 0).action == "wait", "300 in this step"
    assert decide_release(second, counted(1300), 0).values == {"status": "promoted"}


def fine_until_lately(window: int, answered: int, failed: int) -> Counts:
    """A million faultless requests to each version, and then some to the candidate in the newest window."""
    counts, worker = Counts(), Counts(window=window)
    worker.candidate, worker.stable = RequestCounts(answered=1_000_000), RequestCounts(answered=1_000_000)
    before = copy.deepcopy(worker)
    worker.candidate.answered += answered
    worker.candidate.failed += failed
    worker.recent = since(worker, before)
    counts.add(worker)
    return counts


@pytest.mark.parametrize("window", [0, 100])
@pytest.mark.parametrize("strategy", ["ab", "blue-green"])
def test_a_candidate_that_breaks_late_is_rolled_back_however_long_it_was_fine(strategy: str, window: int) -> None:
    """A million faultless requests, then a thousand of which a tenth fails."""
    counts = fine_until_lately(window, answered=1000, failed=100)
    assert judge_counts(counts, LIMITS)[0].verdict == "pass", "all in all it looks fine"
    decision = decide_release(release_of(strategy), counts, 10**6)
    assert decision.action == "roll back"
    assert "errors lately " in decision.reason


def test_nothing_is_promoted_while_its_few_newest_requests_fail() -> None:
    counts = fine_until_lately(1, answered=LIMITS.min_samples - 1, failed=LIMITS.min_samples - 1)
    decision = decide_release(release_of("blue-green"), counts, 10**6)
    assert decision.action == "wait"
    assert "errors lately " in decision.reason


def test_a_worker_counts_each_window_anew(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """What came in the second in which a window ends still belongs to the old one."""

    class Silent:
        manifest, threshold = SimpleNamespace(features=[]), 0.5

    windows = iter([0, 0, 1, 1, 1])
    monkeypatch.setattr("mlops_course.deployment.workers.window_of", lambda _: next(windows))
    release, stable, candidate = release_of(), Choice(Silent(), "stable"), Choice(Silent(), "candidate")  # type: ignore[arg-type]
    route = Route(release, stable, candidate, Counter(release))
    recent = []
    for answers in (5, 7, 11, 13, 2):
        for _ in range(answers):
            route.observe(candidate, np.array([0.5]), True, [])
        route.compare(settings)
        counts = read_counts(settings, release.id)
        assert counts.recent is not None
        recent.append(counts.recent.candidate.answered)
    assert recent == [5, 12, 0, 13, 15]
    assert counts.candidate.answered == 38


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_whoever_is_asked_first_after_a_pause_is_not_taken_for_slow(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both versions are the same; the first call of each look at a few rows takes ten times as long."""
    clock = {"now": 0.0, "cold": 0.0}

    def scores(_: object) -> np.ndarray:
        clock["now"] += 0.0001 + clock["cold"]
        clock["cold"] = 0.0
        return np.array([0.5])

    same = SimpleNamespace(encode=lambda records: records, scores=scores)
    counts = Counts()
    clocks = SimpleNamespace(perf_counter=lambda: clock["now"])
    monkeypatch.setattr("mlops_course.deployment.pairing.time", clocks)
    for _ in range(400):
        clock["cold"] = 0.001
        time_rows(same, same, [({}, 0.5, [""], "")] * rows, counts)  # type: ignore[arg-type,list-item]
    latency = next(check for check in judge_counts(counts, LIMITS) if check.name == "latency")
    assert latency.verdict == "pass", latency


def test_only_the_newest_window_of_all_workers_is_recent() -> None:
    total = Counts()
    for window, answered in ((3, 5), (4, 7), (4, 8), (2, 9)):
        recent = Counts(candidate=RequestCounts(answered=answered))
        total.add(Counts(candidate=RequestCounts(answered=50), window=window, recent=recent))
    assert total.recent is not None
    assert (total.window, total.recent.candidate.answered, total.candidate.answered) == (4, 15, 200)


def test_one_client_with_large_batches_does_not_make_its_version_look_slow() -> None:
    """The versions are the same; a sticky client sends batches that take thirty times as long."""
    counts = counted(1000)
    for _ in range(2000):
        counts.stable.add_time(0.001)
    for seconds in [0.001] * 100 + [0.03] * 60:
        counts.candidate.add_time(seconds)
    assert decide_release(release_of(), counts, 0).action == "step"


@pytest.mark.parametrize("seconds", [1e-7, 3e-5, 0.01])
def test_however_fast_both_versions_are_their_times_can_be_compared(seconds: float) -> None:
    counts = counted(1000)
    for role in (counts.silent_stable, counts.silent_candidate):
        role.buckets = [0] * BUCKETS
        role.buckets[bucket_of(seconds)] = 1000
    assert {check.name: check.verdict for check in judge_counts(counts, LIMITS)}["latency"] == "pass"
    counts.silent_candidate.buckets = [0] * BUCKETS
    counts.silent_candidate.buckets[bucket_of(seconds * 100)] = 1000
    assert {check.name: check.verdict for check in judge_counts(counts, LIMITS)}["latency"] == "fail"


def with_slow_rows(stable: float, candidate: float, rows: int = 2000) -> Counts:
    """Counts of two versions of which such shares of the rows take a hundred times as long as the others."""
    counts, generator = counted(rows), np.random.default_rng(0)
    for role, share in ((counts.silent_stable, stable), (counts.silent_candidate, candidate)):
        role.buckets = [0] * BUCKETS
        for slow in generator.random(rows) < share:
            role.add_time(0.1 if slow else 0.001)
    return counts


@pytest.mark.parametrize(("stable", "candidate"), [(0.0, 0.4), (0.1, 0.45), (0.0, 1.0)])
def test_a_candidate_that_is_slow_for_many_rows_is_rolled_back(stable: float, candidate: float) -> None:
    decision = decide_release(release_of(), with_slow_rows(stable, candidate), 0)
    assert decision.action == "roll back"
    assert "slow " in decision.reason


@pytest.mark.parametrize("shape", [2, 4, 16, 64])
@pytest.mark.parametrize("factor", [1.0, 1.25, 1.45])
def test_a_candidate_that_is_slower_within_the_limit_has_no_slow_rows(shape: int, factor: float) -> None:
    """However much the times of single rows differ; and with enough of them the guard is sure."""
    generator, counts = np.random.default_rng(0), counted(1000)
    for role, slower in ((counts.silent_stable, 1.0), (counts.silent_candidate, factor)):
        buckets = [bucket_of(each) for each in generator.gamma(shape, 0.0015 * slower / shape, 30_000)]
        role.buckets = np.bincount(buckets, minlength=BUCKETS).tolist()
    assert {check.name: check.verdict for check in judge_counts(counts, LIMITS)}["slow"] == "pass"
    assert decide_release(release_of(), counts, 0).action != "roll back"


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9])
def test_a_machine_that_is_slow_now_and_then_hurts_neither_version(share: float) -> None:
    """Also when a quantile of the times, or the median, stands at the edge between fast and slow calls."""
    checks = {check.name: check for check in judge_counts(with_slow_rows(share, share), LIMITS)}
    assert checks["slow"].verdict in ("pass", "inconclusive")
    assert "fail" not in {check.verdict for check in checks.values()}
    if share in (0.0, 0.1):
        assert decide_release(release_of(), with_slow_rows(share, share), 0).action == "step"


@pytest.mark.parametrize(
    "limits", [ReleaseLimits(min_samples=1, min_requests=500, hold_seconds=0), ReleaseLimits(latency=1000)]
)
def test_few_times_and_wide_limits_can_be_judged(limits: ReleaseLimits) -> None:
    counts = counted(200)
    for role in (counts.silent_stable, counts.silent_candidate):
        role.buckets = [0] * BUCKETS
        role.add_time(500)
    assert decide_release(release_of(limits=limits), counts, 0).action == "wait"


def test_a_step_lasts_at_least_so_long() -> None:
    patient = release_of(limits=ReleaseLimits(min_requests=500, hold_seconds=60))
    assert decide_release(patient, counted(700), 59).action == "wait"
    assert decide_release(patient, counted(700), 60).action == "step"


def test_versions_that_are_faster_than_the_clock_of_the_counts_are_equally_fast() -> None:
    counts = counted(700)
    for role in (counts.stable, counts.candidate):
        role.buckets = [role.answered] + [0] * (BUCKETS - 1)
    assert decide_release(release_of(), counts, 0).action == "step"


@pytest.mark.parametrize("strategy", ["shadow", "ab"])
def test_shadow_and_ab_wait_for_a_person(strategy: str) -> None:
    counts = counted(2000)
    counts.silent_candidate.answered = 2000
    decision = decide_release(release_of(strategy), counts, 10**6)
    assert decision.action == "wait"
    assert "all limits held" in decision.reason
    assert "a person decides" in decision.reason


def test_a_candidate_at_the_limit_is_neither_promoted_nor_rolled_back() -> None:
    assert decide_release(release_of(), counted(3000, differences=LIMITS.shift), 10**6).action == "wait"


def test_a_slice_with_few_rows_does_not_hold_a_release_up_but_is_named() -> None:
    decision = decide_release(release_of(), counted(1000, carriers=(0.6, 0.39, 0.01)), 0)
    assert decision.action == "step"
    assert decision.reason.endswith("too few rows to judge carrier=2")


def test_good_candidates_are_not_rolled_back_by_chance() -> None:
    """200 harmless releases, each looked at three times: the promise is at most 1 % for all looks together."""
    back = 0
    for seed in range(200):
        release = release_of(limits=ReleaseLimits(min_requests=10**6))
        seen = (counted(rows, seed=seed, failed=rows // 100) for rows in range(100, 1000, 300))
        looks = (decide_release(release, counts, 0) for counts in seen)
        back += any(look.action == "roll back" for look in looks)
    assert back <= 4


def test_no_more_slices_are_judged_than_the_risk_is_shared_among() -> None:
    counts = Counts(pairs={f"dest={number}": PairCounts(count=number + 1) for number in range(100)})
    judged = {check.slice for check in judge_counts(counts, LIMITS) if check.slice}
    assert len(judged) == MAX_SLICES
    assert "dest=99" in judged
    assert "dest=3" not in judged


def test_a_candidate_that_no_worker_can_load_is_rolled_back() -> None:
    decision = decide_release(release_of(), Counts(problem="flight-delay@4 can't be used: damaged"), 0)
    assert (decision.action, decision.reason) == ("roll back", "flight-delay@4 can't be used: damaged")


def failing_on(tried: int, failed: int, slice_: str = "carrier=9") -> Counts:
    """A good candidate that can't score some rows of one slice."""
    counts = counted(3000)
    for _ in range(tried - failed):
        counts.add_pair([slice_], 0.0, flipped=False)
    for _ in range(failed):
        counts.add_failure(["", slice_], of_candidate=True)
    return counts


@pytest.mark.parametrize("tried", [60, 400])
def test_a_candidate_that_fails_on_one_small_slice_is_rolled_back_however_large_the_rest(tried: int) -> None:
    decision = decide_release(release_of(), failing_on(tried, tried), 0)
    assert decision.action == "roll back"
    assert "errors of carrier=9 " in decision.reason


@pytest.mark.parametrize(("tried", "failed"), [(1, 1), (7, 7), (40, 40), (40, 30)])
def test_a_slice_with_too_few_rows_to_fail_holds_a_release_up_when_it_looks_bad(tried: int, failed: int) -> None:
    decision = decide_release(release_of(), failing_on(tried, failed), 10**6)
    assert decision.action == "wait"
    assert "carrier=9" in decision.reason
    assert ("no row of carrier=9 could be compared" in decision.reason) == (failed == tried)
    assert decide_release(release_of(), failing_on(tried, 0), 10**6).action == "step"


def test_rows_that_only_the_candidate_can_score_do_not_speak_against_it() -> None:
    counts = counted(3000)
    for _ in range(100):
        counts.add_pair(["carrier=9"], 0.0, flipped=False)
        counts.add_failure(["carrier=9"], of_candidate=False)
    assert decide_release(release_of(), counts, 0).action == "step"


def used(stable: np.ndarray, candidate: np.ndarray, threshold: float) -> Counts:
    """Counts of two versions that have given these scores, without any slice."""
    counts = counted(len(stable))
    counts.pairs, counts.ranks = {"": PairCounts()}, RankCounts()
    for one, other in zip(stable, candidate, strict=True):
        counts.add_pair([""], other - one, (one >= threshold) != (other >= threshold), other >= threshold)
    both = list(zip(stable, candidate, strict=True))
    for one, other in zip(both[::2], both[1::2], strict=True):
        counts.ranks.add_two(one, other)
    return counts


SCORES = np.random.default_rng(5).beta(2, 8, 4000)


@pytest.mark.parametrize(
    ("candidate", "named"),
    [
        (np.minimum(SCORES, 0.34), "warned_ratio"),
        (np.random.default_rng(6).permutation(SCORES), "rank_disagreement"),
        (SCORES.max() - SCORES, "rank_disagreement"),
        (np.full(4000, SCORES.mean()), "rank_disagreement"),
        (0.2 + (SCORES - 0.2) * 0.2, "spread_ratio"),
        (np.clip(0.2 + (SCORES - 0.2) * 4, 0, 1), "spread_ratio"),
    ],
)
@pytest.mark.parametrize("slices", [(), None])
def test_a_candidate_of_no_use_is_found_whatever_the_slices(
    candidate: np.ndarray, named: str, slices: tuple[str, ...] | None
) -> None:
    """The other limits are so wide that nothing else can find it."""
    limits = ReleaseLimits(min_requests=500, hold_seconds=0, shift=1, decision_flip_rate=1, slices=slices)
    decision = decide_release(release_of(limits=limits), used(SCORES, candidate, 0.35), 0)
    assert decision.action == "roll back"
    assert f"{named} " in decision.reason


def test_a_candidate_that_never_warns_is_found_though_the_stable_version_warns_of_few_rows() -> None:
    limits = ReleaseLimits(min_requests=500, hold_seconds=0)
    assert 0.02 < (SCORES >= 0.4).mean() < 0.1
    decision = decide_release(release_of(limits=limits), used(SCORES, np.minimum(SCORES, 0.39), 0.4), 0)
    assert (decision.action, decision.reason[:13]) == ("roll back", "warned_ratio ")


def test_a_retrained_model_that_warns_ranks_and_spreads_a_little_otherwise_goes_on() -> None:
    retrained = np.clip(SCORES * 1.15 + np.random.default_rng(7).normal(0, 0.02, 4000), 0, 1)
    assert decide_release(release_of(), used(SCORES, retrained, 0.3), 0).action == "step"


def test_a_small_slice_passes_with_the_risk_of_being_wrong_once_not_with_a_part_of_it() -> None:
    """60 rows of which 4 are decided otherwise: enough to pass, though not among 192 checks that share the risk."""
    counts = counted(3000)
    for number in range(60):
        counts.add_pair(["carrier=9"], 0.0, flipped=number < 4)
    checks = {(each.name, each.slice): each for each in judge_counts(counts, LIMITS)}
    assert checks["decision_flip_rate", "carrier=9"].verdict == "pass"
    assert share_interval(4, 60, LIMITS.alpha / 2 / 2 / 192)[1] > LIMITS.slice_decision_flip_rate


def test_the_benchmark_of_the_guard_shows_honest_candidates_promoted_and_faults_found() -> None:
    command = [sys.executable, str(Path(__file__).parents[1] / "benchmarks" / "bench_guard.py"), "--quick"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    tables = [part.splitlines()[2:] for part in said.split("\n\n")[1:]]
    ended = [[line[42:64].split() for line in table] for table in tables]
    assert all(counts == ["2", "0", "0"] for counts in ended[0]), said
    assert all(counts == ["0", "2", "0"] for counts in ended[1]), said
    assert all(float(line[64:].split()[2].removesuffix("min")) <= 15 for line in tables[0]), said
    within, beyond = ended[2]
    assert (within[1], beyond[0]) == ("0", "0"), said


# ---------------------------------------------------------------- callers


def asked_by(rows: dict[str, int], wrong: dict[str, float] | None = None, fails: tuple[str, ...] = ()) -> Counts:
    """Counts of callers with so many rows each; what the candidate says of some is wrong, or it fails on them."""
    counts, generator = counted(2000), np.random.default_rng(2)
    counts.pairs, counts.ranks = {"": PairCounts()}, RankCounts()
    counts.candidate.answered = counts.stable.answered = 0
    for caller, many in rows.items():
        group, last = caller_group(caller, "r"), (0.0, 0.0)
        for _ in range(many):
            counts.candidate.answered += 1
            counts.stable.answered += 1
            count_outcome(counts, group, True, caller not in fails)
            count_outcome(counts, group, False, True)
            if caller in fails:
                counts.candidate.failed += 1
                counts.add_failure([""], True, group)
                continue
            score = generator.random()
            other = score + generator.normal((wrong or {}).get(caller, 0.0), 0.02)
            counts.add_pair([""], other - score, (score > 0.5) != (other > 0.5), other > 0.5, group)
            for each in counts.of(group):
                each.ranks.add_two(last, last := (score, other))
    return counts


DESKS = {f"10.0.0.{number}": 30 for number in range(60)}
ATTACKER = "192.0.2.7"


@pytest.mark.parametrize("rows", [200, 1850, 50_000])
@pytest.mark.parametrize("how", ["wrong", "fails"])
def test_no_caller_alone_rolls_a_candidate_back_or_holds_it_up(rows: int, how: str) -> None:
    attack = {"wrong": {"wrong": {ATTACKER: 0.5}}, "fails": {"fails": (ATTACKER,)}}[how]
    counts = asked_by({**DESKS, ATTACKER: rows}, **attack)  # type: ignore[arg-type]
    assert decide_release(release_of(), counts, 0).action == "step"
    believing = release_of(limits=msgspec.structs.replace(LIMITS, caller_share=1))
    assert decide_release(believing, counts, 0).action != "step", "if all rows counted"


@pytest.mark.parametrize("rows", [500, 1850])
def test_before_others_have_asked_a_caller_decides_nothing_and_the_reason_says_so(rows: int) -> None:
    for wrong in (0.0, 0.5):
        decision = decide_release(release_of(), asked_by({ATTACKER: rows}, {ATTACKER: wrong}), 10**6)
        assert decision.action == "wait"
    assert f"0 of {rows} rows count: no caller for more than 50%" in decision.reason
    assert "--trusted-proxy" in decision.reason


def test_a_caller_who_sends_only_fine_rows_does_not_hide_what_is_bad_for_the_others() -> None:
    wrong = dict.fromkeys(DESKS, 0.2)
    decision = decide_release(release_of(), asked_by({**DESKS, ATTACKER: 50_000}, wrong), 0)
    assert decision.action in ("roll back", "wait")
    assert decide_release(release_of(), asked_by(DESKS, wrong), 0).action == "roll back"


def test_whoever_has_a_network_of_addresses_is_one_caller_and_another_release_has_other_groups() -> None:
    addresses = [f"2001:db8:0:7::{number:x}" for number in range(500)]
    assert len({caller_group(each, "r") for each in addresses}) == 1
    assert len({caller_group(f"2001:db8:0:{number:x}::1", "r") for number in range(500)}) == GROUPS
    assert len({caller_group(ATTACKER, f"r{number}") for number in range(100)}) == GROUPS
    assert caller_group("", "r") == ""


def test_of_a_request_only_rows_that_prove_something_are_compared() -> None:
    stable, candidate, counts, sample = Formula(0.0), Formula(0.1), Counts(), Sample(100)
    stable.manifest.features = (stable.manifest.features[0], Feature("x", "number", 0.0, seen=(0.0, 1.0)))
    rows = [{"carrier": "UA", "x": value} for value in (0.5, 1.9, -0.9, 2.1, -1.1, 1e9)]
    for row in rows:
        sample.offer(Answered(stable, np.array([0.5]), [row]))  # type: ignore[arg-type]
    sample.offer(Answered(stable, np.array([0.5] * 2), rows[:2], "3", (False, True)))  # type: ignore[arg-type]
    sample.offer(Answered(stable, np.array([0.5]), rows[:1], "3", (False,)))  # type: ignore[arg-type]
    compare_sample(stable, candidate, sample, ReleaseLimits(), counts)  # type: ignore[arg-type]
    assert counts.pairs[""].count == 4
    assert counts.callers["3"].pairs[""].count == 1
    assert counts.left_out["unlike the training"] == 3
    assert counts.left_out["not looked up in the feature table"] >= 1
    assert "rows, unlike the training" in decide_release(release_of(), counts, 0).reason


def test_where_there_is_a_feature_table_whole_records_count_only_if_somebody_says_so() -> None:
    for trust, answered in ((False, 0), (True, 1)):
        release = release_of(limits=ReleaseLimits(trust_records=trust))
        choices = [Choice(Formula(0.0)), Choice(Formula(0.1))]  # type: ignore[arg-type]
        route = Route(release, *choices, Counter(release))
        route.observe(choices[1], np.array([0.5]), True, [{"carrier": "UA", "x": 0.5}], Asked("desk", (False,)))
        counts = route.counter.counts
        assert (counts.candidate.answered, sum(counts.left_out.values())) == (answered, 1 - answered)


# ---------------------------------------------------------------- comparisons


class Formula:
    """Stands for a predictor: a formula over one feature."""

    features, threshold, reference = ("carrier", "x"), 0.5, "formula@1"

    def __init__(self, add: float, fails_on: float = math.inf, carrier: str = "category") -> None:
        self.add, self.fails_on = add, fails_on
        known = ("UA", "AA") if carrier == "category" else ()
        self.manifest = SimpleNamespace(
            features=(Feature("carrier", carrier, None, known), Feature("x", "number", 0.0))  # type: ignore[arg-type]
        )

    def encode(self, records: list[dict[str, Any]]) -> np.ndarray:
        return np.array([[record["x"]] for record in records])

    def scores(self, matrix: np.ndarray) -> np.ndarray:
        if (matrix == self.fails_on).any():
            raise RuntimeError("no")
        return matrix[:, 0] + self.add


def compared(
    stable: Formula,
    candidate: Formula,
    requests: list[tuple[bool, list[dict[str, Any]]]],
    most: int = 1000,
) -> Counts:
    """Counts after a second's requests: who answered, and the rows."""
    counts, sample = Counts(), Sample(100)
    for by_candidate, records in requests:
        predictor: Any = candidate if by_candidate else stable
        sample.offer((predictor, predictor.scores(predictor.encode(records)), records))
    compare_sample(stable, candidate, sample, ReleaseLimits(pairs_a_second=most), counts)  # type: ignore[arg-type]
    assert sample.kept == []
    return counts


def test_a_difference_has_the_same_sign_whoever_answered() -> None:
    rows = [(by, [{"carrier": "UA", "x": 0.3}]) for by in (True, False) for _ in range(5)]
    counts = compared(Formula(0.0), Formula(0.25), rows)
    assert counts.pairs[""].count == 10
    assert counts.pairs[""].total == pytest.approx(2.5)
    assert counts.pairs["carrier=UA"].flips == 10
    assert (counts.silent_candidate.answered, counts.silent_stable.answered) == (5, 5)
    assert sum(counts.silent_stable.buckets) == sum(counts.silent_candidate.buckets) == 10, "timed in pairs"


def test_a_request_with_many_rows_is_one_observation_of_each_slice() -> None:
    rows = [{"carrier": carrier, "x": 0.1} for carrier in ["UA"] * 30 + ["AA"] * 20 + [None]]
    counts = compared(Formula(0.0), Formula(0.1), [(False, rows)])
    assert {name: pairs.count for name, pairs in counts.pairs.items()} == {"": 1, "carrier=UA": 1, "carrier=AA": 1}


def test_a_version_that_fails_silently_is_counted_as_failing_and_the_rest_is_compared() -> None:
    rows = [(False, [{"carrier": "UA", "x": value}]) for value in (0.1, 0.2, 0.3)]
    counts = compared(Formula(0.0), Formula(0.1, fails_on=0.2), rows)
    assert (counts.silent_candidate.answered, counts.silent_candidate.failed) == (3, 1)
    assert counts.pairs[""].count == 2
    assert [counts.pairs[name].failed for name in ("", "carrier=UA")] == [1, 1], "by slice as well"
    other = compared(Formula(0.0, fails_on=0.2), Formula(0.1), [(True, [{"carrier": "AA", "x": 0.2}])])
    assert (other.pairs["carrier=AA"].failed, other.pairs["carrier=AA"].stable_failed) == (0, 1)


def test_rows_are_ranked_two_by_two_and_one_that_is_left_over_waits() -> None:
    counts, sample, stable, candidate = Counts(), Sample(100), Formula(0.0), Formula(0.1)
    found = []
    for value in (0.1, 0.3, 0.2, 0.5, 0.4):
        sample.offer((stable, np.array([value]), [{"carrier": "UA", "x": value}]))  # type: ignore[arg-type]
        compare_sample(stable, candidate, sample, ReleaseLimits(), counts)  # type: ignore[arg-type]
        found.append(counts.ranks.count)
    assert found == [0, 1, 1, 2, 2]
    assert counts.ranks.disagreed == 0
    assert counts.ranks.gap == pytest.approx(counts.ranks.stable_gap)


def test_clients_invent_no_slices_and_a_second_compares_no_more_rows_than_allowed() -> None:
    junk = [{"carrier": f"junk-{number}", "x": 0.1} for number in range(1000)]
    requests = [(False, [*junk, {"carrier": "UA", "x": 0.1}]) for _ in range(60)]
    counts = compared(Formula(0.0), Formula(0.1), requests, most=50)
    assert set(counts.pairs) <= {"", "carrier=other", "carrier=UA"}
    assert counts.silent_candidate.answered <= 50


def test_unless_columns_are_named_those_with_few_categories_make_the_slices() -> None:
    both = (Formula(0.0), Formula(0.1))
    for each, more in zip(both, (0, 1), strict=True):
        for name, many in (("dest", MAX_SLICES - 2 - 3), ("origin", 3), ("tail", 2)):
            each.manifest.features += (Feature(name, "category", None, tuple(map(str, range(many + more)))),)
    assert default_slice_columns(both[0]) == ("carrier", "tail", "origin"), "dest would be too much"  # type: ignore[arg-type]
    assert set(slice_values(("dest", "x", "moon"), both)) == {"dest"}  # type: ignore[arg-type]
    assert len(slice_values(("dest",), both)["dest"]) == MAX_SLICES - 4, "of both versions"  # type: ignore[arg-type]
    assert slice_values((), both) == {}  # type: ignore[arg-type]


def test_slices_that_are_not_judged_are_named() -> None:
    counts = counted(1000)
    counts.pairs |= {f"dest={number:03}": PairCounts(count=100) for number in range(MAX_SLICES + 1)}
    decision = decide_release(release_of(), counts, 0)
    assert decision.action == "step"
    assert "more slices than are judged: dest=062, dest=063, dest=064, carrier=2 (4 of them)" in decision.reason


@pytest.mark.parametrize("nothing", [math.nan, math.inf])
def test_a_score_that_is_no_number_is_a_failure_and_the_counts_can_be_read_again(
    settings: Settings, nothing: float
) -> None:
    rows = [(False, [{"carrier": "UA", "x": value}]) for value in (0.1, 0.2)]
    counts = compared(Formula(0.0), Formula(nothing), rows)
    assert (counts.silent_candidate.answered, counts.silent_candidate.failed) == (2, 2)
    assert not tally(counts.candidate, np.array([0.5, nothing]), 0.5)
    write_counts(settings, "r", "one", counts)
    read = read_counts(settings, "r")
    assert (read.candidate.failed, read.silent_candidate.failed, read.unread) == (1, 2, [])


def test_a_candidate_whose_feature_has_another_kind_or_whose_score_is_none_replaces_nobody() -> None:
    can_replace(Formula(0.0), Formula(0.1))  # type: ignore[arg-type]
    with pytest.raises(ReleaseError, match=r"takes other features .*: carrier \(number, not category\)"):
        can_replace(Formula(0.0), Formula(0.1, carrier="number"))  # type: ignore[arg-type]
    with pytest.raises(ReleaseError, match="gives nan as a score"):
        can_replace(Formula(0.0), Formula(math.nan))  # type: ignore[arg-type]


def test_of_many_requests_a_fair_sample_is_kept() -> None:
    places = np.zeros(400)
    for _ in range(300):
        sample = Sample(40)
        for number in range(400):
            sample.offer((None, number, []))  # type: ignore[arg-type]
        for _, number, *_ in sample.take():
            places[number] += 1
    assert places.sum() == 40 * 300
    assert abs(places[:200].sum() / places.sum() - 0.5) < 0.03
    assert (sample.seen, sample.kept) == (0, [])


# ---------------------------------------------------------------- what is written down


def test_each_step_is_kept_with_its_reason(settings: Settings) -> None:
    release = create_release(settings, "canary", STABLE, CANDIDATE, reason="because")
    stepped = update_release(settings, release, "held", step=1, before=7)
    assert stepped is not None
    assert update_release(settings, stepped, "broken", status="rolled back") == read_release(settings)
    lines = read_release_history(settings)
    assert [(line["revision"], line["share"], line["reason"]) for line in lines] == [
        (1, 0.05, "because"), (2, 0.25, "held"), (3, 0.0, "broken"),
    ]  # fmt: skip


def test_a_line_that_a_killed_process_did_not_write_is_added_by_the_next(settings: Settings) -> None:
    release = create_release(settings, "canary", STABLE, CANDIDATE)
    path = settings.serving / "release-history.jsonl"
    path.write_text("")
    stepped = update_release(settings, release, "held", step=1)
    assert stepped is not None
    assert [line["revision"] for line in read_release_history(settings)] == [1, 2]
    with path.open("a") as file:
        file.write('{"release": "cut o')
    update_release(settings, stepped, "broken", status="rolled back")
    assert [line["revision"] for line in read_release_history(settings)] == [1, 2, 3]


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"candidate": "../../etc@1"}, r"\$\.candidate"),
        ({"candidate": STABLE}, "both candidate and stable"),
        ({"strategy": "rolling"}, r"\$\.strategy"),
        ({"steps": (0.5, 1.5)}, r"<= 1\.0"),
        ({"steps": (0.5, 0.5)}, "Only a canary has several, and they rise"),
        ({"strategy": "ab", "steps": (0.1, 0.5)}, "Only a canary has several"),
        ({"strategy": "shadow", "steps": (0.1,)}, "Only a shadow answers nothing"),
    ],
)
def test_nonsense_is_refused_by_name_and_leaves_no_trace(
    settings: Settings, values: dict[str, Any], named: str
) -> None:
    with pytest.raises(ReleaseError, match=named):
        create_release(settings, **{"strategy": "canary", "stable": STABLE, "candidate": CANDIDATE, **values})
    assert read_release(settings) is None
    assert read_release_history(settings) == []


@pytest.mark.parametrize("text", [b"", b"{}", b"\xff", b'{"format": 2}', b"[]"])
def test_a_damaged_state_is_named_and_nothing_is_overwritten(settings: Settings, text: bytes) -> None:
    path = write_atomic(settings.serving / "flight-delay" / "release.json", text)
    with pytest.raises(ReleaseError, match=r"can't read .*release\.json"):
        read_release(settings)
    with pytest.raises(ReleaseError):
        create_release(settings, "canary", STABLE, CANDIDATE)
    assert path.read_bytes() == text


@pytest.mark.parametrize("text", [b"", b"{}", b"\xff", None])
def test_a_release_whose_file_is_damaged_or_gone_can_be_rolled_back(settings: Settings, text: bytes | None) -> None:
    release = create_release(settings, "canary", STABLE, CANDIDATE)
    path = settings.serving / "flight-delay" / "release.json"
    write_atomic(path.with_name("live.json"), b"{}")  # something is served
    path.unlink() if text is None else path.write_bytes(text)
    found = roll_back_release(settings, "the desks complain")
    assert (found.id, found.revision, found.status, found.by) == (release.id, 2, "rolled back", "person")
    assert read_release(settings) == found
    assert [line["status"] for line in read_release_history(settings)] == ["running", "rolled back"]
    assert path.with_suffix(".damaged").exists() == (text is not None), "what it said is kept"
    create_release(settings, "canary", STABLE, CANDIDATE)  # and the next one can begin


def test_where_nothing_was_released_nothing_is_rolled_back(settings: Settings) -> None:
    with pytest.raises(ReleaseError, match="there was no release"):
        roll_back_release(settings, "the desks complain")


@pytest.mark.parametrize("text", [b"", b"{}", b"\xff"])
def test_what_the_history_does_not_know_is_not_rolled_back(settings: Settings, text: bytes) -> None:
    path = write_atomic(settings.serving / "flight-delay" / "release.json", text)
    with pytest.raises(ReleaseError, match=r"can't read .*release\.json"):
        roll_back_release(settings, "the desks complain")
    assert path.read_bytes() == text


def test_a_release_that_was_begun_with_the_old_words_goes_on(settings: Settings) -> None:
    release = create_release(settings, "canary", STABLE, CANDIDATE)
    path = settings.serving / "flight-delay" / "release.json"
    written = json.loads(path.read_bytes())
    old = {"least": 7, "slice_least": 8, "enough": 9, "flips": 0.25, "slice_flips": 0.5, "errors": 0.03}
    path.write_text(json.dumps({**written, "limits": old}))
    found = read_release(settings)
    assert found is not None
    assert found.limits == ReleaseLimits(
        errors=0.03, min_samples=7, slice_min_samples=8, min_requests=9, decision_flip_rate=0.25,
        slice_decision_flip_rate=0.5,
    )  # fmt: skip
    assert update_release(settings, found, "held", step=1) is not None
    assert "enough" not in json.loads(path.read_bytes())["limits"]
    assert found.id == release.id


def change_once(settings: Settings, release: Release, number: int) -> bool:
    """In a process of its own."""
    return update_release(settings, release, f"{number}", by="person", step=1) is not None


@pytest.mark.skipif(os.name == "nt", reason="forks")
def test_of_many_who_change_the_same_revision_one_succeeds(settings: Settings) -> None:
    release = create_release(settings, "canary", STABLE, CANDIDATE)
    with multiprocessing.get_context("fork").Pool(4) as pool:
        done = pool.starmap(change_once, [(settings, release, number) for number in range(8)])
    assert sum(done) == 1
    assert [line["revision"] for line in read_release_history(settings)] == [1, 2]


def live(settings: Settings, reference: str, *_: object) -> None:
    """Make a folder look as if it were the live bundle."""
    manifest = settings.serving / "bundles" / reference / "bundle.json"
    write_atomic(manifest, "{}")
    digest = hashlib.sha256(b"{}").hexdigest()
    write_atomic(settings.serving / "flight-delay" / "live.json", json.dumps({"bundle": reference, "manifest": digest}))


@pytest.mark.parametrize(
    ("reference", "status", "reason"),
    [
        ("flight-delay@9", "rolled back", "flight-delay@9 became the live model meanwhile"),
        (CANDIDATE, "promoted", "it is the live model already"),
    ],
)
def test_a_release_follows_when_the_live_model_is_changed_beside_it(
    settings: Settings, reference: str, status: str, reason: str
) -> None:
    create_release(settings, "canary", STABLE, CANDIDATE)
    live(settings, reference)
    review_release(settings)
    release = read_release(settings)
    assert release is not None
    assert (release.status, release.reason, release.by) == (status, reason, "guard")
    assert review_release(settings) is None, "it is over"


def test_the_guard_waits_acts_and_counts_the_time_of_a_step(settings: Settings) -> None:
    release = create_release(
        settings, "canary", STABLE, CANDIDATE, limits=ReleaseLimits(min_requests=500, hold_seconds=3600)
    )
    live(settings, STABLE)
    write_counts(settings, release.id, "one", counted(700))
    waiting = review_release(settings)
    assert waiting is not None
    assert waiting.action == "wait"
    later = review_release(settings, datetime.now(UTC) + timedelta(hours=1, seconds=5))
    assert later is not None
    assert later.action == "step"
    now = read_release(settings)
    assert now is not None
    assert (now.share, now.before) == (0.25, 700)
    write_counts(settings, release.id, "two", counted(600, failed=300))
    review_release(settings)
    assert read_release(settings) != now
    assert read_release_history(settings)[-1]["status"] == "rolled back"


@pytest.fixture
def made_up_bundles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Publishing needs no real bundle."""
    monkeypatch.setattr(release_files, "publish", live)


@pytest.mark.usefixtures("made_up_bundles")
def test_a_person_who_rolls_back_while_the_guard_promotes_has_the_last_word(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The guard has decided to promote; before it publishes, a person rolls back."""
    release = create_release(
        settings, "canary", STABLE, CANDIDATE, (0.5,), ReleaseLimits(min_requests=500, hold_seconds=0)
    )
    live(settings, STABLE)
    write_counts(settings, release.id, "one", counted(1000))
    person = threading.Thread(target=roll_back_release, args=(settings, "customers complain"))

    def interrupted(settings: Settings, reference: str, *_: object) -> None:
        if reference == CANDIDATE:
            person.start()
            person.join(0.5)  # whoever waits for a lock waits longer than this
        live(settings, reference)

    monkeypatch.setattr(release_files, "publish", interrupted)
    review_release(settings)
    person.join()
    assert [line["status"] for line in read_release_history(settings)] == ["running", "promoted", "rolled back"]
    assert live_reference(settings) == STABLE
    assert review_release(settings) is None


@pytest.mark.usefixtures("made_up_bundles")
def test_a_step_of_the_guard_does_not_stop_a_person_and_another_live_model_does(settings: Settings) -> None:
    release = create_release(settings, "canary", STABLE, CANDIDATE)
    live(settings, "flight-delay@9")
    assert update_release(settings, release, "held", live=CANDIDATE, status="promoted") is None
    with pytest.raises(ReleaseError, match="flight-delay@9 is live"):
        promote_release(settings, "in a hurry")
    assert live_reference(settings) == "flight-delay@9"
    live(settings, STABLE)
    assert promote_release(settings, "in a hurry").status == "promoted"
    assert live_reference(settings) == CANDIDATE
