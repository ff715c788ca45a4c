"""Outcomes that land while a canary runs: a real service, its own log, the command, and the guard."""

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
from conftest import Quarter
from service_helpers import FIRST, SECOND, serving, until
from typer.testing import CliRunner

from mlops_course.cli import app
from mlops_course.data import newest_reference, read_table, replace_months
from mlops_course.deployment import ReleaseLimits, read_counts, read_release, release_status, start_release
from mlops_course.environment import Settings
from mlops_course.monitoring.release_outcomes import count_outcomes
from mlops_course.project import flight_delay

LIMITS = ReleaseLimits(
    shift=1, decision_flip_rate=1, latency=100, slow=1, rank_disagreement=1, spread_ratio=1000, warned_ratio=1000,
    caller_share=1, hold_seconds=0, min_requests=60, min_samples=20, slices=(), brier=0.5,
)  # fmt: skip


@pytest.fixture
def settings(quarter: Quarter, home: Path) -> Settings:
    """A workspace that can serve, with the tables behind it; nobody has been asked for anything yet."""
    shutil.copytree(quarter.settings.data, home / "data", dirs_exist_ok=True)
    return Settings(home=home).prepare()


def run(settings: Settings, *words: str) -> dict[str, object]:
    done = CliRunner().invoke(app, [*words, "--home", str(settings.home), "--json"])
    assert done.exit_code == 0, done.output
    return dict(json.loads(done.stdout))


def ask_for(settings: Settings, rows: slice, model: str, when: pd.Timestamp, month: str = "2013-02") -> None:
    """Add to the table of what was asked for."""
    features = read_table(settings, newest_reference(settings, "flight-delay/features"), [month])
    asked = features[list(flight_delay.key)].iloc[rows].astype({"minute": "Int64", "flight": "Int64"})
    asked = asked.assign(model=model, time=when.as_unit("us"), segment=f"{model}-{rows.start}")
    replace_months(settings, "flight-delay/predictions_online", asked, by="segment")


def test_there_is_nothing_to_count_without_a_release_and_nothing_known_without_requests(settings: Settings) -> None:
    assert count_outcomes(settings, flight_delay) is None
    assert run(settings, "release", "outcomes") == {"outcomes": None}
    start_release(settings, SECOND, limits=LIMITS)
    assert run(settings, "release", "outcomes") == {"outcomes": {"count": 0, "total": 0.0, "squares": 0.0}}


def test_only_rows_count_that_these_versions_were_asked_for_since_it_began(settings: Settings) -> None:
    release = start_release(settings, SECOND, limits=LIMITS)
    began = pd.Timestamp(release.started)
    ask_for(settings, slice(0, 40), FIRST, began + pd.Timedelta(seconds=1))
    ask_for(settings, slice(20, 60), SECOND, began + pd.Timedelta(seconds=2))  # some of them again
    ask_for(settings, slice(60, 80), FIRST, began - pd.Timedelta(days=1))
    ask_for(settings, slice(80, 90), "flight-delay@7", began + pd.Timedelta(seconds=3))
    counted = count_outcomes(settings, flight_delay)
    assert counted is not None and 55 <= counted.count <= 60, "all that were asked for, but for cancelled ones"
    assert count_outcomes(settings, flight_delay) == counted
    assert read_counts(settings, release.id).outcomes == counted, "counted again, they count once"
    checks = {check["name"]: check for check in release_status(settings)["checks"]}
    assert (checks["brier"]["count"], checks["brier"]["limit"]) == (counted.count, 0.5)


def test_rows_from_which_a_version_has_learnt_do_not_count(settings: Settings) -> None:
    release = start_release(settings, SECOND, limits=LIMITS)
    ask_for(settings, slice(0, 40), FIRST, pd.Timestamp(release.started), month="2013-01")
    counted = count_outcomes(settings, flight_delay)
    assert counted is not None and counted.count == 0


def test_of_a_long_log_only_what_can_be_of_the_release_is_read(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = start_release(settings, SECOND, limits=LIMITS)
    began, read = pd.Timestamp(release.started), []
    ask_for(settings, slice(0, 40), "20130101T000000-host", began - pd.Timedelta(days=300))
    ask_for(settings, slice(0, 30), FIRST, began)

    def reading(of: Settings, reference: str, *more: object, **named: object) -> pd.DataFrame:
        read.append(more)
        return read_table(of, reference, *more, **named)  # type: ignore[arg-type]

    monkeypatch.setattr("mlops_course.monitoring.release_outcomes.read_table", reading)
    counted = count_outcomes(settings, flight_delay)
    assert counted is not None and 25 <= counted.count <= 30
    assert [more[0] for more in read] == [[f"{FIRST}-0"]]


def test_without_the_limit_nobody_waits_for_outcomes(settings: Settings) -> None:
    start_release(settings, SECOND, limits=ReleaseLimits())
    assert "brier" not in {check["name"] for check in release_status(settings)["checks"]}


@pytest.mark.slow
def test_a_canary_that_waits_for_outcomes_is_promoted_when_they_are_known(settings: Settings) -> None:
    with serving(settings.home, "--app", "mlops_course.deployment:release_app", "--limit", "rate=100000") as running:
        start_release(settings, SECOND, "canary", (0.5,), LIMITS)
        keys = [each["key"] for each in running.client.get("/examples?count=50").json()]

        def only_outcomes_are_missing() -> bool:
            for key in keys:
                assert running.ask(key=key).status_code == 200
            told = release_status(settings)["outlook"]
            return bool(told["action"] == "wait" and told["reason"].startswith("not sure yet: brier -inf to inf"))

        until(only_outcomes_are_missing, 60)
    assert run(settings, "collect-predictions")["rows"] >= 60  # type: ignore[operator]
    outcomes = run(settings, "release", "outcomes")["outcomes"]
    assert isinstance(outcomes, dict) and 20 <= outcomes["count"] <= 50
    with serving(settings.home, "--app", "mlops_course.deployment:release_app") as running:
        until(lambda: running.client.get("/model").json()["model"] == SECOND)
    release = read_release(settings)
    assert release is not None and (release.status, release.by) == ("promoted", "guard")
