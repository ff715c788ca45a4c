"""The real pipeline on real flights, run as a user runs it: what it gives, what stops it, and that it carries on."""

import contextlib
import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from base64 import b64decode
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from conftest import settings_in

from mlops_course.data import ingest, newest_reference, read_table, table_version
from mlops_course.environment import Settings
from mlops_course.experiments import TrainingConfig, quiet_mlflow, train_run
from mlops_course.pipelines import read_result
from mlops_course.project import flight_delay, read_delivery
from mlops_course.registry import champion_reference, versions
from mlops_course.security.vouching import check_vouched
from mlops_course.serving import live_bundle, load_predictor, open_feature_table

pytestmark = [
    pytest.mark.system,
    pytest.mark.filterwarnings("ignore:Series.values returning:DeprecationWarning"),  # inside pyarrow
]

JANUARY, FEBRUARY, MARCH = "2013-01", "2013-02", "2013-03"
SLICE = ["-p", f"first={JANUARY}", "-p", f"train_last={JANUARY}", "-p", f"test_last={FEBRUARY}"]
TRAINING = ["run", "training", *SLICE, "-p", "iterations=10", "--json"]
STAGES = ["ingest", "validate", "features", "train", "evaluate", "register", "package", "score", "monitor"]
KEYS = tempfile.TemporaryDirectory(prefix="trust-")  # workspaces that are copied keep their signers
# A shell that runs the tests in the background may have told its children to ignore Ctrl-C.
COMMAND = (
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); import mlops_course.cli as c; c.main()"
)


def variables(home: Path) -> dict[str, str]:
    """The environment of a user whose workspace is there."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MLOPS_COURSE_")}
    return {**kept, "MLOPS_COURSE_HOME": str(home), "MLOPS_COURSE_TRUST": KEYS.name}


def start(home: Path, *arguments: object) -> subprocess.Popen[str]:
    """Begin a command in an empty folder."""
    folder = home.parent / "elsewhere"
    folder.mkdir(exist_ok=True)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8"}
    command = [sys.executable, "-c", COMMAND, *map(str, arguments)]
    return subprocess.Popen(command, cwd=folder, env=variables(home), **pipes)


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    status: int
    output: str
    errors: str

    @property
    def document(self) -> dict[str, Any]:
        """What it printed, as JSON."""
        return json.loads(self.output)

    @property
    def results(self) -> dict[str, dict[str, Any]]:
        """What each stage recorded."""
        return {stage["name"]: stage["results"] for stage in self.document["stages"]}

    @property
    def error(self) -> str:
        """The one line that says what went wrong."""
        printed = re.compile(r"\[\d/\d\] \w+\|")  # by cells
        own = [line for line in self.errors.splitlines() if not printed.match(line)]
        assert not [line for line in own if "Traceback" in line]
        lines = [line for line in own if line.startswith("error: ")]
        assert len(lines) == 1, self.errors
        assert self.errors.rstrip().splitlines()[-1] == lines[0], "it stands at the end"
        return lines[0].removeprefix("error: ")


def finish(process: subprocess.Popen[str], seconds: float = 300) -> Done:
    """Wait for the end of a command."""
    output, errors = process.communicate(timeout=seconds)
    return Done(process.returncode, output, errors)


def tables(settings: Settings) -> dict[str, int | None]:
    """Each table with its newest version."""
    names = [path.name for path in settings.data.glob("flight-delay/*")]
    return {name: table_version(settings, f"flight-delay/{name}") for name in names}


def leftovers(home: Path) -> list[Path]:
    """Files that were not finished."""
    return [path for path in home.rglob("*") if path.name.endswith(".tmp") or ".tmp." in path.name]


# ---------------------------------------------------------------- refused before anything runs


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "trainnig"], "there is no pipeline 'trainnig'. Perhaps you meant 'training'"),
        (["run", "training", "-p", "iteratoins=5"], "no parameter 'iteratoins'. Perhaps you meant 'iterations'"),
        (["run", "training", "-p", "iterations=many"], "iterations is 'many', but should be a whole number like 500"),
        (["run", "training", "-p", "first=January"], "first is 'January', but should be a month like 2013-01"),
        (["run", "training", "-p", "train_last=2013-12"], "train_last is 2013-12, but should lie before test_last"),
        (["run", "training", "--source", "no/such"], "source is 'no/such', but should be a file or folder that exists"),
        (["run", "scoring"], "parameter month is missing. Give -p month=…"),
    ],
)
def test_wrong_usage_is_one_line_and_touches_nothing(tmp_path: Path, arguments: list[str], words: str) -> None:
    done = finish(start(tmp_path / "workspace", *arguments), 30)
    assert words in done.error
    assert done.errors.count("\n") == 1
    assert (done.status, done.output) == (2, "")
    assert not (tmp_path / "workspace").exists()


def test_a_workspace_that_is_a_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("mine")
    done = finish(start(tmp_path / "taken", *TRAINING), 30)
    assert (
        f"can't write {tmp_path / 'taken'}: a file stands where a folder should be. Move that file away" in done.error
    )
    assert done.status == 1
    assert (tmp_path / "taken").read_text() == "mine"


# ---------------------------------------------------------------- refused, corrected, taken


@pytest.mark.slow
def test_a_corrected_delivery_ends_what_a_late_row_and_a_bad_month_began(tmp_path: Path) -> None:
    """The refused run leaves its months in the cache; the corrected files are taken, and so are they a second time."""
    home, source = tmp_path / "workspace", write_source(tmp_path / "source", every=5)
    run = [*TRAINING, "--source", source, "--to", "features"]
    flights = source / JANUARY / "flights.csv"
    january = pd.read_csv(flights, low_memory=False)
    february = len(read_delivery(FEBRUARY)["flights"][::5])
    eve = january[january["day"] == 31].head(1)
    instant = (pd.to_datetime(eve["time_hour"]) - pd.Timedelta(days=31)).dt.strftime("%Y-%m-%dT%H:%M:%SZ")
    late = eve.assign(year=2012, month=12, time_hour=instant)
    pd.concat([late, january[january["day"] < 15]]).to_csv(flights, index=False)
    refused = finish(start(home, *run), 240)
    assert refused.status == 1 and "flights of 2013-01 is not whole" in refused.error
    pd.concat([late, january]).to_csv(flights, index=False)
    taken = finish(start(home, *run), 240)
    assert taken.status == 0 and taken.results["validate"]["made"].startswith(f"{len(january) + february + 1:,} rows")
    january.to_csv(flights, index=False)
    for _ in range(2):
        corrected = finish(start(home, *run), 240)
        assert corrected.status == 0, corrected.errors
        assert corrected.results["validate"]["made"].startswith(f"{len(january) + february:,} rows")
    forced = finish(start(home, *run, "--force"), 240)
    assert forced.status == 0, "December is named no more, and nobody asks for it"


# ---------------------------------------------------------------- stopped at the first stage


def write_source(folder: Path, rows: int | None = None, every: int = 1, **renamed: str) -> Path:
    """The supplier's flights of two months as CSV files: all of them, the first ones, or every so-many-th."""
    for month in (JANUARY, FEBRUARY):
        (folder / month).mkdir(parents=True)
        for name, table in read_delivery(month).items():
            table = table.rename(columns=renamed)[:rows:every] if name == "flights" else table
            table.to_csv(folder / month / f"{name}.csv", index=False)
    return folder


@pytest.fixture(scope="module")
def bad_deliveries(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Done]]:
    """Three runs with data that can't be used, each in a workspace of its own, all at once."""
    folder = tmp_path_factory.mktemp("bad")
    write_source(folder / "renamed", 1000, dep_delay="departure_delay")
    (folder / "picture").mkdir()
    (folder / "picture" / "flights.parquet").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(500))
    wanted = {
        "missing month": ["-p", "first=2012-01", "-p", "train_last=2012-01", "-p", "test_last=2012-02"],
        "picture": [*SLICE, "--source", folder / "picture"],
        "renamed": [*SLICE, "--source", folder / "renamed"],
    }
    started = {name: start(folder / f"{name} workspace", "run", "training", *more) for name, more in wanted.items()}
    return {name: (folder / f"{name} workspace", finish(process)) for name, process in started.items()}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("missing month", "DeliveryError: no rows of 2012-01 in flights.csv.zip. That file holds 2013-01 to 2013-12"),
        ("picture", "flights.parquet: Could not open Parquet input source"),
        ("renamed", "DataError: the table flights has no column 'dep_delay'. Was it renamed to 'departure_delay'?"),
    ],
)
def test_data_that_cannot_be_used_stop_the_run_in_one_line(
    bad_deliveries: dict[str, tuple[Path, Done]], name: str, words: str
) -> None:
    home, done = bad_deliveries[name]
    assert words in done.error
    assert "training stopped at stage ingest (ingest.ipynb, cell [" in done.error
    assert done.status == 1
    assert tables(settings_in(home)) == {}, "not even an empty table"
    assert not leftovers(home)
    (run,) = (home / "runs").iterdir()
    told = json.loads((run / "run.json").read_text())
    assert [stage["status"] for stage in told["stages"]] == ["failed"] + ["not run"] * 8
    assert str(run / "01_ingest.ipynb") in done.error
    assert sorted(path.name for path in run.iterdir()) == ["01_ingest.ipynb", "run.json"]


# ---------------------------------------------------------------- a disk that gets full


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A small file system, where the machine lets us make one."""
    folder.mkdir()
    try:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("can't mount a small file system here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def enlarge(folder: Path, size: str) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", folder], check=True)


@pytest.mark.slow
def test_a_disk_that_is_full_at_the_first_table(tmp_path: Path) -> None:
    with small_disk(tmp_path / "small", "3M") as disk:
        done = finish(start(disk / "workspace", *TRAINING), 60)
        assert "WorkspaceError: can't write the table flight-delay/raw_flights: " in done.error
        assert "free some space and run again" in done.error
        assert done.status == 1
        assert done.document["status"] == "failed"
        settings = settings_in(disk / "workspace")
        assert tables(settings) == {}
        assert not leftovers(disk)
        enlarge(disk, "30M")
        delivery = ingest(settings, flight_delay, JANUARY)
        assert len(read_table(settings, delivery.tables["flights"])) == len(read_delivery(JANUARY)["flights"])


# ---------------------------------------------------------------- the whole way


def wait_until_training(home: Path, process: subprocess.Popen[str]) -> None:
    """Wait until a model is being fitted."""
    end = time.monotonic() + 120
    while time.monotonic() < end:
        assert process.poll() is None, finish(process)
        if (home / "mlflow.db").exists() and statuses(home) == ["RUNNING"]:
            time.sleep(1.5)
            return
        time.sleep(0.05)
    raise AssertionError("it took too long")


def statuses(home: Path) -> list[str]:
    """The state of each MLflow run."""
    with contextlib.closing(sqlite3.connect(home / "mlflow.db")) as database:
        return [status for (status,) in database.execute("select status from runs order by start_time")]


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Done, dict[str, int | None]]:
    """A workspace in which somebody pressed Ctrl-C in the midst of a long training."""
    home = tmp_path_factory.mktemp("mine") / "workspace"
    process = start(home, "run", "training", *SLICE, "-p", "iterations=50000")
    wait_until_training(home, process)
    process.send_signal(signal.SIGINT)
    done = finish(process, 30)
    return home, done, tables(settings_in(home))


@dataclass(frozen=True)
class Trained:
    """Two workspaces: `mine`, with three equal runs in it, and `other`, with the same flights from CSV files."""

    mine: Path
    first: Done
    second: Done  # all stages, whatever is in the cache
    third: Done
    before_second: dict[str, int | None]
    files_before_second: list[Path]
    other: Path
    from_csv: Done
    scoring: Done

    @property
    def settings(self) -> Settings:
        """Those of `mine`."""
        return settings_in(self.mine)


def files(home: Path) -> list[Path]:
    """Everything under `data` and `mlartifacts/models`."""
    return sorted(path for part in ("data", "mlartifacts/models") for path in (home / part).rglob("*"))


@pytest.fixture(scope="module")
def trained(interrupted: tuple[Path, Done, dict[str, int | None]], tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Two runs at a time, because most machines have two cores."""
    mine, folder = interrupted[0], tmp_path_factory.mktemp("other")
    other, source = folder / "workspace", write_source(folder / "source")
    one, two = start(mine, *TRAINING), start(other, *TRAINING, "--source", source)
    first, from_csv = finish(one), finish(two)
    before, kept = tables(settings_in(mine)), [path for path in files(mine) if "data" in path.parts]
    one, two = start(mine, *TRAINING, "--force"), start(other, "run", "scoring", "-p", f"month={MARCH}", "--json")
    second, scoring = finish(one), finish(two)
    return Trained(mine, first, second, finish(start(mine, *TRAINING)), before, kept, other, from_csv, scoring)


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="uses POSIX signals")
def test_an_interrupted_training_is_one_line_and_leaves_whole_tables(
    interrupted: tuple[Path, Done, dict[str, int | None]],
) -> None:
    home, done, left = interrupted
    assert done.error.startswith("interrupted: ")
    assert done.status == 130
    assert set(left) >= {"raw_flights", "flights", "features"}
    assert "predictions" not in left
    assert not leftovers(home)
    assert statuses(home)[:1] == ["FAILED"], "it doesn't look as if it were still running"
    told = [json.loads(path.read_text()) for path in (home / "runs").glob("*/run.json")]
    states = [stage["status"] for stage in min(told, key=lambda run: run["started"])["stages"]]
    assert states == ["done"] * 3 + ["interrupted"] + ["not run"] * 5


@pytest.mark.slow
def test_the_next_run_carries_on_and_ends_with_a_champion(trained: Trained) -> None:
    done = trained.first
    assert done.status == 0, done.errors
    document = done.document
    assert document["status"] == "done"
    assert [stage["name"] for stage in document["stages"]] == STAGES
    states = [stage["status"] for stage in document["stages"]]
    assert states == ["cached"] * 3 + ["done"] * 6, "what was done before Ctrl-C isn't done again"
    assert all(stage["seconds"] > 0 and stage["results"]["made"] for stage in document["stages"])
    assert all(Path(stage["notebook"]).is_file() for stage in document["stages"])
    results = done.results
    assert set(results["evaluate"]["metrics"]) >= {"pr_auc", "roc_auc", "log_loss", "brier"}
    rows = {row["model"]: row for row in results["evaluate"]["comparison"]}
    assert rows["model"]["pr_auc"] > rows["rates"]["pr_auc"] > rows["constant"]["pr_auc"]
    assert (results["register"]["model"], results["register"]["promoted"]) == ("flight-delay@1", True)
    assert (results["score"]["scored_month"], results["score"]["model"]) == (FEBRUARY, "flight-delay@1")
    assert len(read_table(trained.settings, results["score"]["predictions"], [FEBRUARY])) == 24_951
    assert Path(results["monitor"]["report"]).read_text().endswith("</html>")
    progress = [line for line in done.errors.splitlines() if ": done in " in line]
    assert [line.split()[1].rstrip(":") for line in progress] == STAGES[3:]
    assert statuses(trained.mine) == ["FAILED", "FINISHED", "FINISHED"]


@pytest.mark.slow
def test_the_same_run_twice_gives_the_same_to_the_last_digit_and_nothing_new(trained: Trained) -> None:
    one, two = trained.first.results, trained.second.results
    assert trained.second.status == 0, trained.second.errors
    assert one["evaluate"]["metrics"] == two["evaluate"]["metrics"]
    assert one["monitor"]["figures"] == two["monitor"]["figures"]
    for stage, name in (
        ("ingest", "raw"),
        ("validate", "tables"),
        ("features", "features"),
        ("score", "predictions"),
    ):
        assert one[stage][name] == two[stage][name]
    assert two["ingest"]["figures"]["deliveries changed"] == 0
    assert two["validate"]["figures"]["months changed"] == 0
    assert tables(trained.settings) == trained.before_second
    assert [path for path in files(trained.mine) if "data" in path.parts] == trained.files_before_second
    outcome = {name: two["register"][name] for name in ("model", "champion", "previous")}
    assert set(outcome.values()) == {"flight-delay@1"}
    assert two["register"]["promoted"] is False
    assert [int(version.version) for version in versions(trained.settings, flight_delay)] == [1]
    assert one["train"]["run_id"] != two["train"]["run_id"], "each run is written down, though"


@pytest.mark.slow
def test_once_more_and_nothing_has_to_run(trained: Trained) -> None:
    assert trained.third.status == 0, trained.third.errors
    assert {stage["status"] for stage in trained.third.document["stages"]} == {"cached"}
    assert trained.third.results == trained.second.results
    planned = finish(start(trained.mine, "plan", *TRAINING[1:]), 60).document
    assert {each["action"] for each in planned} == {"cached"}


@pytest.mark.slow
def test_own_csv_files_give_the_same_as_the_suppliers_data(trained: Trained) -> None:
    assert trained.from_csv.status == 0, trained.from_csv.errors
    mine, other = trained.first.results, trained.from_csv.results
    assert mine["evaluate"]["metrics"] == other["evaluate"]["metrics"]
    assert mine["evaluate"]["comparison"] == other["evaluate"]["comparison"]
    assert mine["score"]["figures"] == other["score"]["figures"]
    assert mine["monitor"]["figures"] == other["monitor"]["figures"]
    assert mine["ingest"]["made"] == other["ingest"]["made"]


@pytest.mark.slow
def test_the_champion_scores_the_next_month(trained: Trained) -> None:
    done, settings = trained.scoring, settings_in(trained.other)
    assert done.status == 0, done.errors
    results = done.results
    assert list(results) == ["ingest", "validate", "features", "package", "score", "monitor"]
    assert results["score"]["model"] == champion_reference(settings, flight_delay) == "flight-delay@1"
    scored = read_table(settings, results["score"]["predictions"])
    assert scored["period"].value_counts().to_dict() == {FEBRUARY: 24_951, MARCH: 28_834}
    assert set(scored["model"]) == {"flight-delay@1"}
    assert scored["score"].between(0, 1).all()
    assert results["monitor"]["figures"]["pr_auc"] > results["monitor"]["figures"]["base_rate"]
    assert Path(results["monitor"]["report"]).name == f"flight-delay-{MARCH}.html"


@pytest.mark.slow
def test_what_the_pipeline_leaves_is_ready_to_serve_and_says_what_the_batch_said(trained: Trained) -> None:
    assert trained.first.results["package"]["packaged"] == "flight-delay@1"
    for settings, months in ((trained.settings, [FEBRUARY]), (settings_in(trained.other), [FEBRUARY, MARCH])):
        folder = live_bundle(settings)
        assert folder is not None and folder.name == "flight-delay@1"
        predictor, table = load_predictor(folder), open_feature_table(settings)
        for month in months:
            answers = read_table(settings, newest_reference(settings, "flight-delay/predictions"), [month])
            keys = [table.key(row) for row in answers[list(flight_delay.key)].to_dict("records")]
            records = table.get(keys, predictor.features)
            assert predictor.scores(predictor.encode(records)).tolist() == answers["score"].tolist()


@pytest.mark.slow
def test_the_pipeline_signs_what_it_packages_and_nobody_else_has_to(trained: Trained) -> None:
    settings = trained.settings.model_copy(update={"trust": Path(KEYS.name)})
    bundle = live_bundle(settings)
    assert bundle is not None
    found = check_vouched(settings, bundle)
    assert found["signed"] and not found["problems"] and not found["missing"]
    statement = json.loads(b64decode(json.loads((bundle / "provenance.json").read_bytes())["payload"]))
    asked = statement["predicate"]["buildDefinition"]["externalParameters"]
    assert (asked["iterations"], asked["last"]) == ("10", JANUARY), "as the run that trained it says"


@pytest.mark.slow
def test_whoever_deletes_what_the_service_reads_gets_it_again(trained: Trained, tmp_path: Path) -> None:
    home = Path(shutil.copytree(trained.mine, tmp_path / "workspace"))
    shutil.rmtree(home / "serving")
    done = finish(start(home, *TRAINING))
    states = {stage["name"]: stage["status"] for stage in done.document["stages"]}
    assert [name for name in STAGES if states[name] == "done"] == ["package"]
    assert live_bundle(settings_in(home)) == home / "serving" / "bundles" / "flight-delay@1"


@pytest.mark.slow
def test_a_stage_by_plain_papermill_records_the_same_as_in_the_pipeline(
    trained: Trained, root: Path, tmp_path: Path
) -> None:
    stage = next(stage for stage in trained.second.document["stages"] if stage["name"] == "evaluate")
    notebook, executed = root / "nbs" / "pipelines" / "evaluate.ipynb", tmp_path / "executed.ipynb"
    command = [sys.executable, "-m", "papermill", str(notebook), str(executed), "--no-progress-bar"]
    command += ["-y", yaml.safe_dump(stage["parameters"]), "--cwd", str(tmp_path)]
    done = subprocess.run(
        command, capture_output=True, text=True, env=variables(trained.mine), timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert read_result(executed) == stage["results"]


@pytest.mark.slow
def test_a_disk_that_gets_full_while_a_run_is_written_down(
    interrupted: tuple[Path, Done, dict[str, int | None]], tmp_path: Path
) -> None:
    with small_disk(tmp_path / "small", "80M") as disk:
        home = disk / "workspace"
        shutil.copytree(interrupted[0] / "data", home / "data")
        settings = settings_in(home)
        before, free = tables(settings), shutil.disk_usage(disk).free
        (disk / "other people's files").write_bytes(bytes(free - 1_600_000))  # enough for the store, not for a model
        done = finish(start(home, *TRAINING), 120)
        assert "training stopped at stage train (train.ipynb, cell [" in done.error
        assert f"WorkspaceError: can't write {home}: the disk is full. Free some space" in done.error
        assert done.status == 1
        assert (tables(settings), leftovers(disk)) == (before, [])
        (disk / "other people's files").unlink()
        features, rows = (f"flight-delay/{name}@{before[name]}" for name in ("features", "flights"))
        config = TrainingConfig(iterations=10)
        run_id = train_run(settings, flight_delay, features, rows, JANUARY, JANUARY, config)
        assert quiet_mlflow().get_run(run_id).info.status == "FINISHED", "the store is whole"
