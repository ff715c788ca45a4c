"""A year of production is played month by month, through the real service; killed at any moment, it goes on."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
from kill_helpers import lives

from mlops_course.capstone import replay
from mlops_course.capstone.asking import AskingError, ServiceClient, end_with_input, running_service
from mlops_course.capstone.replay import journal_file, replay_year
from mlops_course.capstone.replay_plan import (
    REPLAY_LIMITS,
    Journal,
    ReplayError,
    ReplayPlan,
    plan_replay,
    replay_settings,
)  # fmt: skip
from mlops_course.capstone.replay_steps import BEGINNING, MONTH_STEPS
from mlops_course.capstone.story import (
    LINES,
    MonthStory,
    decision_grid,
    loss_picture,
    month_text,
    story_document,
    story_rows,
    totals_text,
    write_story,
    year_story,
    year_totals,
)  # fmt: skip
from mlops_course.environment import Settings

TESTS = Path(__file__).parent
PLAN = plan_replay("2013", "2013-03", "2013-05", use_case="mist:mist", iterations=15)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("13",), "'13' is not a year"),
        (("20l3",), "'20l3' is not a year"),
        (("2013", "2013-02"), "has no two months of 2013 before it"),
        (("2013", "2012-12"), "has no two months of 2013 before it"),
        (("2013", "2013-07", "2013-06"), "would end with 2013-06"),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused(given: tuple[str, ...], said: str) -> None:
    with pytest.raises(ReplayError, match=re.escape(said)):
        plan_replay(*given)


def test_a_sample_is_large_enough_to_say_something() -> None:
    with pytest.raises(ReplayError, match="too few to judge a month by: 99 rows"):
        plan_replay("2013", rows=99)


def test_the_first_quarter_is_history() -> None:
    plan = plan_replay("2013")
    assert plan.history == ["2013-01", "2013-02", "2013-03"]
    assert (plan.played[0], plan.played[-1]) == ("2013-04", "2013-12")


def test_a_replay_leaves_the_workspace_alone(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path, storage="s3://bucket/course", tracking_uri="http://localhost:5000")
    own = replay_settings(settings, PLAN)
    assert own.home != settings.home and own.home.is_relative_to(settings.home)
    assert (own.storage, own.tracking_uri, own.features_url, own.use_case) == (None, None, None, "mist")


@pytest.mark.parametrize("field", [name for name in ReplayPlan.__struct_fields__ if name != "limits"])
def test_another_plan_is_refused_and_what_differs_is_named(tmp_path: Path, field: str) -> None:
    other = {"first": "2012-01", "begin": "2013-04", "last": "2013-06", "use_case": "other:case", "rows": 500}
    other |= {"iterations": 7, "seed": 1, "policy": msgspec.convert({"age": 9}, type(PLAN.policy))}
    path = tmp_path / "replay.json"
    Journal(path, PLAN).write("2013-03", "arrive", {})
    with pytest.raises(ReplayError, match=f"another replay: {field} .*--fresh"):
        Journal(path, msgspec.structs.replace(PLAN, **{field: other[field]}))


@pytest.mark.parametrize("content", [b"", b"{", b'{"plan": 1, "months": {}}', b"\xff"])
def test_a_damaged_journal_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "replay.json"
    path.write_bytes(content)
    with pytest.raises(ReplayError, match="can't be read"):
        Journal(path, PLAN)


class Stopped(Exception):
    """The replay ends here."""


def play(settings: Settings, stop_after: int | None) -> list[tuple[str, str]]:
    """Play with steps that only say that they were done; stopped right after so many."""
    done: list[tuple[str, str]] = []

    def tell(month: str, step: str, result: dict[str, Any]) -> None:
        done.append((month, step))
        if stop_after is not None and len(done) == stop_after:
            raise Stopped

    with contextlib.suppress(Stopped):
        replay_year(settings, PLAN, tell)
    return done


@pytest.fixture
def paper_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps and a service that do nothing: only their order counts."""
    for step in MONTH_STEPS:
        monkeypatch.setitem(MONTH_STEPS, step, lambda state, month: {})
    monkeypatch.setattr(replay, "begin_year", lambda state: None)
    monkeypatch.setattr(replay, "running_service", lambda settings: contextlib.nullcontext("http://nowhere"))
    monkeypatch.setattr(ServiceClient, "wait_ready", lambda self: None)


@pytest.mark.usefixtures("paper_steps")
def test_wherever_it_is_stopped_each_step_is_done_once_and_in_order(tmp_path: Path) -> None:
    whole = play(Settings(home=tmp_path / "whole"), None)
    assert whole[0] == (BEGINNING, "deliver")
    assert whole[1:] == [(month, step) for month in PLAN.played for step in MONTH_STEPS]
    for number in range(1, len(whole)):
        settings = Settings(home=tmp_path / str(number))
        assert play(settings, number) + play(settings, None) == whole
        assert play(settings, None) == []


@pytest.mark.usefixtures("paper_steps")
def test_fresh_begins_anew(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    play(settings, 5)
    left = replay_settings(settings, PLAN).home / "left.txt"
    left.write_text("of the earlier one")
    other = msgspec.structs.replace(PLAN, iterations=9)
    assert replay_year(settings, other, fresh=True).pages.plan == other
    assert not left.exists()


@pytest.mark.usefixtures("paper_steps")
def test_two_at_a_time_are_refused(tmp_path: Path) -> None:
    settings, refused = Settings(home=tmp_path), []

    def again(month: str, step: str, result: dict[str, Any]) -> None:
        with pytest.raises(ReplayError, match="is being played by another process") as found:
            replay_year(settings, PLAN)
        refused.append(found)

    replay_year(settings, PLAN, again)
    assert refused


# The story


def month_story(month: str, **other: Any) -> MonthStory:
    usual: dict[str, Any] = {
        "rows": 1000, "model": "mist@1", "estimate": 0.5, "policy": 0.5, "frozen": 0.6, "monthly": 0.4,
        "verdict": "quiet", "alarms": (), "drifted": 0.1, "retrain": False, "rule": "none", "reason": "nothing",
        "gate": "", "release": "",
    }  # fmt: skip
    return MonthStory(month, **usual | other)


PROMOTED = "mist@2 promoted"
YEAR = [
    month_story("2013-04", retrain=True, rule="new data", reason="2 new months", gate="promote"),
    month_story("2013-05", rows=3000, policy=0.3, verdict="alarm", alarms=("<worse> & more",), release=PROMOTED),
    month_story("2013-06", rule="drift", reason="held back: 1 must pass (it was: 60% moved)", model="mist@2"),
]


def test_the_year_s_loss_is_that_of_all_rows() -> None:
    totals = year_totals(YEAR)
    assert totals["policy"]["log_loss"] == pytest.approx((500 + 900 + 500) / 5000)
    assert totals["frozen"]["log_loss"] == pytest.approx(0.6)
    assert totals["policy"]["against_monthly"] == pytest.approx(0.38 / 0.4 - 1)
    assert {name: total["trainings"] for name, total in totals.items()} == {"policy": 1, "frozen": 0, "monthly": 2}


def test_each_month_says_who_decided_what() -> None:
    rows = {row["month"]: row for row in story_rows(YEAR)}
    assert (rows["2013-04"]["policy_said"], rows["2013-04"]["gate"]) == ("new data", "promote")
    assert rows["2013-05"]["canary"] == "mist@2 promoted"
    assert rows["2013-06"]["policy_said"] == "(drift)"
    assert any("Alarm: <worse>" in line for line in month_text(YEAR[1]))
    assert any("held back" in line for line in month_text(YEAR[2]))
    assert decision_grid(YEAR).count("<tr>") == 5
    assert "in May" in totals_text(YEAR)[-1]


class _Page(HTMLParser):
    """What a page asks for from outside, and the names of its pictures."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.asked += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data")]


def write_year(folder: Path) -> Journal:
    """A journal of a whole replay, as the steps write it."""
    journal = Journal(folder / "replay.json", plan_replay("2013", last="2013-06"))
    for each in YEAR:
        version, _, status = each.release.partition(" ")
        steps: dict[str, dict[str, Any]] = {
            "score": {"model": each.model}, "look": {"estimate": each.estimate},
            "learn": {"verdict": each.verdict, "alarms": each.alarms, "drifted": each.drifted},
            "compare": {"rows": each.rows} | {name: getattr(each, name) for name in LINES},
            "decide": {"retrain": each.retrain, "rule": each.rule, "reason": each.reason},
            "gate": {"action": each.gate} if each.gate else {},
            "release": {"model": version, "status": status} if version else {}, "monthly": {},
        }  # fmt: skip
        for step, result in steps.items():
            journal.write(each.month, step, result | {"seconds": 1.5})
    return journal


def test_the_story_is_what_the_journal_says(tmp_path: Path) -> None:
    journal = write_year(tmp_path)
    assert year_story(journal) == YEAR
    assert year_story(Journal(journal.path, journal.pages.plan)) == YEAR
    document = json.loads(json.dumps(story_document(journal)))
    assert [each["month"] for each in document["months"]] == [each.month for each in YEAR]
    assert "seconds" not in json.dumps(document["months"])


def test_the_page_needs_nothing_from_outside_and_says_its_pictures_in_words(tmp_path: Path) -> None:
    text = write_story(write_year(tmp_path), tmp_path / "year.html").read_text()
    page = _Page()
    page.feed(text)
    assert page.asked == []
    assert "script" not in page.tags
    assert page.tags.count("svg") == page.tags.count("desc") == 1
    assert "&lt;worse&gt; &amp; more" in text and "<worse>" not in text
    assert all(f"{each.frozen:.3f}" in loss_picture(YEAR) for each in YEAR)


def test_the_page_reads_well_in_both_colours_and_on_a_phone(tmp_path: Path, browser: Any) -> None:
    path = write_story(write_year(tmp_path), tmp_path / "year.html")
    for scheme in ("light", "dark"):
        page = browser.new_page(color_scheme=scheme, viewport={"width": 390, "height": 800})
        asked: list[str] = []
        page.on("request", lambda request, asked=asked: asked.append(request.url))
        page.goto(path.as_uri())
        assert asked == [path.as_uri()]
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        style = "getComputedStyle(document.body)"
        colours = [page.evaluate(f"{style}.{name}") for name in ("color", "backgroundColor")]
        light = [sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in colours]
        assert (light[0] < light[1]) == (scheme == "light")
        assert page.get_by_role("img", name="Log loss, month by month").count() == 1
        page.close()


# The service


def children_of(process: subprocess.Popen[Any]) -> list[psutil.Process]:
    """The processes that a process has started."""
    return psutil.Process(process.pid).children(recursive=True)


def wait_until(condition: Any, seconds: float = 60) -> None:
    """Wait for something to come true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.05)


def test_a_service_ends_when_whoever_started_it_is_killed(home: Path) -> None:
    code = "from mlops_course.capstone.asking import running_service; from mlops_course.environment import Settings\n"
    code += f"with running_service(Settings(home={str(home)!r})) as url: print(url, flush=True); input()"
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as starter:
        assert starter.stdout is not None
        client = ServiceClient(starter.stdout.readline().strip())
        client.wait_ready()
        started = children_of(starter)
        starter.kill()
    assert started
    wait_until(lambda: not any(map(lives, started)))
    with pytest.raises(AskingError, match="doesn't answer"):
        client.ask("/model")


def test_input_that_is_closed_ends_a_process() -> None:
    code = f"import time; from {end_with_input.__module__} import end_with_input; end_with_input(); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE) as process:
        assert process.poll() is None
    assert process.returncode == -signal.SIGTERM


def test_a_service_that_can_t_start_is_no_riddle(tmp_path: Path) -> None:
    wrong = Settings(home=tmp_path).model_copy(update={"threads": 0})
    refused = pytest.raises(AskingError, match=r"doesn't start.*service\.log")
    with refused, running_service(wrong):
        pass


# The real thing: other data than flights, the command, the real service, killed


@pytest.fixture
def environment() -> Iterator[dict[str, str]]:
    """In which `mist` is found by all processes."""
    yield {**os.environ, "PYTHONPATH": str(TESTS)}


def begin_replay(home: Path, environment: dict[str, str], *options: str) -> subprocess.Popen[str]:
    """The command, in a process of its own."""
    command = [sys.executable, "-c", "from mlops_course.cli import main; main()", "replay", "2013", "--home", str(home)]
    command += ["--use-case", "mist:mist", "--iterations", "15", "--from", "2013-03", "--to", "2013-05", "--json"]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": TESTS}
    return subprocess.Popen([*command, *options], env=environment, **pipes)


def end_replay(home: Path, environment: dict[str, str]) -> dict[str, Any]:
    """Play to the end; the story, without where its page is."""
    process = begin_replay(home, environment)
    out, errors = process.communicate(timeout=900)
    assert process.returncode == 0, errors
    story: dict[str, Any] = json.loads(out)
    assert Path(story.pop("page")).is_file()
    return story


def kill_when(process: subprocess.Popen[str], condition: Any) -> None:
    """Kill a replay at a moment, and see that nothing of it is left behind."""
    wait_until(lambda: process.poll() is not None or condition(), 600)
    assert process.poll() is None, process.communicate()
    started = children_of(process)
    process.kill()
    process.communicate()
    wait_until(lambda: not any(map(lives, started)))


@pytest.mark.slow
@pytest.mark.thorough
def test_killed_in_a_training_and_in_a_canary_it_tells_the_same_story(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    home = tmp_path / "killed"
    own = replay_settings(Settings(home=home), PLAN)
    trainings = own.home / "monitoring" / "mist" / "trainings.json"
    kill_when(begin_replay(home, environment), trainings.is_file)
    kill_when(begin_replay(home, environment), lambda: list(own.serving.rglob("release.json")))
    killed, whole = end_replay(home, environment), end_replay(tmp_path / "whole", environment)
    assert killed == whole
    assert [month["month"] for month in whole["months"]] == PLAN.played
    assert end_replay(home, environment) == whole, "what is done isn't done again"
    journal = Journal(journal_file(own), PLAN)
    assert set(journal.of_month("2013-04")) == set(MONTH_STEPS)


@pytest.mark.slow
@pytest.mark.thorough
def test_a_candidate_beyond_the_limits_is_rolled_back_and_the_year_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(TESTS))
    strict = msgspec.structs.replace(REPLAY_LIMITS, shift=0.0, decision_flip_rate=0.0)
    plan = msgspec.structs.replace(PLAN, limits=strict)
    journal = replay_year(Settings(home=tmp_path), plan)
    story = year_story(journal)
    tried = [each for each in story if each.release]
    assert tried, "the gate has let one through"
    assert all(each.release.endswith("rolled back") for each in tried)
    assert {each.model for each in story} == {"mist@1"}
    assert [each.month for each in story] == plan.played
