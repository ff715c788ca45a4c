"""Files that arrive: each is scored once, whatever dies in between, with the answers that the service would give."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import numpy as np
import pandas as pd
import psutil
import pyarrow.parquet
import pytest
from conftest import Quarter, settings_in
from release_helpers import COMMAND, serving

from mlops_course.deployment import InboxError, ScoredFile, watch_inbox
from mlops_course.deployment.inbox import Inbox, claim_file, recover_abandoned
from mlops_course.environment import Settings
from mlops_course.experiments import TrainingConfig, train, train_run
from mlops_course.project import flight_delay
from mlops_course.registry import CHAMPION, package, promote, register, score_month
from mlops_course.serving import Origin, live_bundle, load_predictor, publish, write_bundle


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """A workspace with a small live model of made-up flights."""
    settings = settings_in(tmp_path_factory.mktemp("small") / "workspace")
    rows = flights(4000)
    label = (np.random.default_rng(1).random(len(rows)) < 0.1 + 0.02 * rows["hour_of_day"]).astype(float)
    model = train(rows.assign(label=label), flight_delay, TrainingConfig(iterations=10, leaf_samples=50))
    origin = Origin(run_id="none", data={}, first="2013-01", last="2013-01")
    publish(settings, write_bundle(settings, flight_delay, model, rows, "flight-delay@1", origin))
    return settings


def flights(count: int, seed: int = 0) -> pd.DataFrame:
    """Features of made-up flights; some carriers have names that a CSV reader likes to misunderstand."""
    generator = np.random.default_rng(seed)
    return pd.DataFrame({
        "carrier": generator.choice(["UA", "NA", "9E", "007"], count), "origin": "JFK", "dest": "BOS",
        "hour_of_day": generator.integers(5, 23, count).astype(np.float32),
        "temperature": np.where(generator.random(count) < 0.1, np.nan, generator.normal(50, 20, count)),
    }).astype({"temperature": "float32"})  # fmt: skip


@pytest.fixture
def inbox(tmp_path: Path) -> Path:
    """A folder to be watched."""
    folder = tmp_path / "inbox"
    (folder / "incoming").mkdir(parents=True)
    return folder


def deliver(inbox: Path, name: str, rows: pd.DataFrame) -> Path:
    """Put a file into the folder as one should: under another name first."""
    path = inbox / "incoming" / name
    hidden = path.with_name(f".{name}")
    rows.to_parquet(hidden, index=False) if name.endswith(".parquet") else rows.to_csv(hidden, index=False)
    return hidden.rename(path)


def run_once(settings: Settings, inbox: Path, settle: float = 0) -> list[ScoredFile]:
    """Score all that is there."""
    told: list[ScoredFile] = []
    watch_inbox(settings, inbox, told.append, once=True, settle=settle)
    return told


def names(inbox: Path, folder: str) -> list[str]:
    return sorted(path.name for path in (inbox / folder).iterdir())


# ---------------------------------------------------------------- the same answers


@pytest.mark.parametrize("name", ["some.csv", "some.csv.gz", "some.parquet"])
def test_a_file_gets_the_answers_of_the_inference_function(small: Settings, inbox: Path, name: str) -> None:
    rows = flights(1000, seed=3)
    deliver(inbox, name, rows)
    (scored,) = run_once(small, inbox)
    live = live_bundle(small)
    assert live is not None
    expected = load_predictor(live).predict(rows)
    found = pd.read_parquet(scored.answers)
    assert (scored.status, scored.rows, scored.model) == ("scored", 1000, "flight-delay@1")
    np.testing.assert_array_equal(found["score"], expected["score"])
    assert (found["warned"] == expected["warned"]).all()
    assert names(inbox, "incoming") == names(inbox, "working") == []


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="starts the service with two workers")
def test_batch_micro_batch_and_online_give_the_same_answers(own_quarter: Quarter, inbox: Path) -> None:
    settings, config = own_quarter.settings, TrainingConfig(iterations=20)
    run_id = train_run(settings, flight_delay, own_quarter.features, own_quarter.rows, "2013-01", "2013-02", config)
    reference = register(settings, flight_delay, run_id)
    promote(settings, flight_delay, reference, "a test")
    publish(settings, package(settings, flight_delay, reference))
    _, batch = score_month(settings, flight_delay, CHAMPION, own_quarter.features, "2013-03")
    live = live_bundle(settings)
    assert live is not None
    predictor = load_predictor(live)
    from mlops_course.data import read_table

    march = read_table(settings, own_quarter.features, ["2013-03"])
    features = march[list(predictor.features)]
    deliver(inbox, "march.parquet", march)
    deliver(inbox, "march.csv", march)
    files = {scored.file: pd.read_parquet(scored.answers) for scored in run_once(settings, inbox)}
    records = features.astype("object").where(features.notna(), None).to_dict("records")
    with serving(settings) as server, httpx.Client(base_url=server.url, timeout=60) as client:
        online = []
        for start in range(0, len(records), 1000):
            asked = {"rows": [{"record": record} for record in records[start : start + 1000]]}
            answer = client.post("/predict/batch", json=asked)
            assert answer.status_code == 200, answer.text
            online += answer.json()["predictions"]
    assert len(batch) == len(online) == len(march) > 4000
    for name, found in {**files, "batch": batch}.items():
        np.testing.assert_array_equal(found["score"], [each["score"] for each in online], err_msg=name)
        assert found["warned"].tolist() == [each["warned"] for each in online], name
        assert set(found["model"]) == {reference}


# ---------------------------------------------------------------- files that are no good


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("letter.docx", b"Dear operations desk", "letter.docx is not a file of features. Deliver one of .csv, .csv.gz"),
        ("empty.csv", b"", "empty.csv can't be read: No columns"),
        ("heads.csv", b"carrier,origin,dest,hour_of_day,temperature\n", "heads.csv holds no rows"),
        ("torn.parquet", b"PAR1....", "torn.parquet can't be read: "),
        ("torn.csv.gz", b"\x1f\x8b\x08\x00", "torn.csv.gz can't be read: "),
        ("latin.csv", "carrier\nÜA\n".encode("latin-1"), "latin.csv can't be read: "),
        ("other.csv", b"a,b\n1,2\n", "the features lack carrier"),
        (
            "words.csv",
            b"carrier,origin,dest,hour_of_day,temperature\nUA,JFK,BOS,late,50\n",
            "hour_of_day is 'late' in row 0",
        ),
        ("huge.csv", b"carrier,origin,dest,hour_of_day,temperature\nUA,JFK,BOS,1e99,50\n", "hour_of_day is "),
    ],
)
def test_a_file_that_cannot_be_scored_is_set_aside_with_the_reason(
    small: Settings, inbox: Path, name: str, content: bytes, reason: str
) -> None:
    (inbox / "incoming" / name).write_bytes(content)
    deliver(inbox, "good.csv", flights(10))
    told = {scored.file: scored for scored in run_once(small, inbox)}
    assert told[name].status == "rejected"
    assert reason in told[name].reason
    assert (inbox / "rejected" / name).read_bytes() == content
    assert reason in (inbox / "rejected" / f"{name}.reason.txt").read_text()
    assert told["good.csv"].status == "scored", "the others don't suffer"
    assert str(inbox) not in told[name].reason


def test_two_bad_files_of_one_name_are_both_kept(small: Settings, inbox: Path) -> None:
    for content in (b"a\n1\n", b"a\n2\n"):
        (inbox / "incoming" / "bad.csv").write_bytes(content)
        run_once(small, inbox)
    kept = [path.read_bytes() for path in (inbox / "rejected").glob("bad*.csv")]
    assert sorted(kept) == [b"a\n1\n", b"a\n2\n"]


# ---------------------------------------------------------------- what isn't touched, what isn't done twice


def test_what_is_still_being_written_is_left_alone(small: Settings, inbox: Path) -> None:
    for name in (".hidden.csv", "half.csv.tmp", "half.parquet.part"):
        (inbox / "incoming" / name).write_text("carrier\n")
    (inbox / "incoming" / "folder.csv").mkdir()
    deliver(inbox, "fresh.csv", flights(5))
    assert run_once(small, inbox, settle=3600) == []
    assert len(names(inbox, "incoming")) == 5
    assert [scored.file for scored in run_once(small, inbox)] == ["fresh.csv"]


def test_the_same_content_is_scored_once_under_whatever_name(small: Settings, inbox: Path) -> None:
    deliver(inbox, "monday.csv", flights(50))
    (first,) = run_once(small, inbox)
    deliver(inbox, "monday.csv", flights(50))
    deliver(inbox, "tuesday.csv", flights(50))
    again = run_once(small, inbox)
    assert [(scored.status, scored.answers) for scored in again] == [("known", first.answers)] * 2
    deliver(inbox, "monday.csv", flights(50, seed=9))
    (corrected,) = run_once(small, inbox)
    assert corrected.status == "scored"
    assert len(names(inbox, "scored")) == 2, "a correction under the same name gets answers of its own"


def test_without_a_live_model_files_wait(inbox: Path, settings: Settings, small: Settings) -> None:
    deliver(inbox, "early.csv", flights(5))
    with pytest.raises(InboxError, match="no model is live"):
        run_once(settings, inbox)
    assert names(inbox, "incoming") == ["early.csv"]
    assert run_once(small, inbox)[0].status == "scored"


# ---------------------------------------------------------------- processes that die


@contextlib.contextmanager
def watching(settings: Settings, inbox: Path, *options: str, code: str = "") -> Iterator[subprocess.Popen[str]]:
    """The command line, in a process of its own, perhaps with something changed in it; it doesn't outlive the block."""
    command = [
        sys.executable,
        "-c",
        f"{code}\n{COMMAND[2]}",
        "inbox",
        str(inbox),
        "--settle",
        "0",
        "--json",
        *options,
    ]
    with subprocess.Popen([*command, "--home", str(settings.home)], stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert process.poll() is None, process.stdout and process.stdout.read()
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


SLOW = """
import time
from mlops_course.deployment import microbatch
own = microbatch.write_atomic
def slow(path, content):
    if {after}:
        own(path, content)
    path.parents[1].joinpath("begun").touch()
    time.sleep(600)
microbatch.write_atomic = slow
"""


def begun(inbox: Path) -> bool:
    """Whether the slow process is at the place where it waits."""
    return (inbox / "begun").exists()


@pytest.mark.skipif(os.name == "nt", reason="uses SIGKILL")
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_process_that_is_killed_while_it_scores_loses_nothing(small: Settings, inbox: Path, after: bool) -> None:
    """Killed before its answers are written, and between the answers and moving the file."""
    deliver(inbox, "only.csv", flights(200))
    with watching(small, inbox, code=SLOW.format(after=after)) as process:
        wait_until(lambda: begun(inbox), process)
        assert run_once(small, inbox) == [], "its process lives, so nobody else touches it"
        process.kill()
    (scored,) = run_once(small, inbox)
    assert scored.status == ("known" if after else "scored")
    assert len(pd.read_parquet(scored.answers)) == 200
    assert names(inbox, "working") == names(inbox, "incoming") == []
    assert len(names(inbox, "done")) == len(names(inbox, "scored")) == 1


DEADLY = """
import os, signal
from mlops_course.deployment import microbatch
own = microbatch.score_file
def deadly(inbox, path, predictor):
    if path.name == "bomb.csv":
        os.kill(os.getpid(), signal.SIGKILL)
    return own(inbox, path, predictor)
microbatch.score_file = deadly
"""


@pytest.mark.skipif(os.name == "nt", reason="uses SIGKILL")
def test_a_file_that_kills_every_process_is_set_aside_after_the_third(small: Settings, inbox: Path) -> None:
    deliver(inbox, "bomb.csv", flights(5))
    time.sleep(0.02)
    deliver(inbox, "good.csv", flights(20))
    ends = []
    for _ in range(4):
        with watching(small, inbox, "--once", code=DEADLY) as process:
            ends.append(process.wait(60))
    assert ends == [-signal.SIGKILL] * 3 + [1]
    assert "died, 3 times" in (inbox / "rejected" / "bomb.csv.reason.txt").read_text()
    assert [name.split(".")[0] for name in names(inbox, "done")] == ["good"]
    assert names(inbox, "working") == []


@pytest.mark.skipif(os.name == "nt", reason="uses signals")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_a_process_that_is_asked_to_end_gives_back_what_it_had(
    small: Settings, inbox: Path, how: signal.Signals
) -> None:
    deliver(inbox, "only.csv", flights(20))
    with watching(small, inbox, code=SLOW.format(after=False)) as process:
        wait_until(lambda: begun(inbox), process)
        process.send_signal(how)
        assert process.wait(30) in (130, 143)
    assert names(inbox, "incoming") == ["only.csv"]
    assert names(inbox, "working") == [], "and it doesn't count as a death"


def test_several_watchers_share_the_work_and_score_each_file_once(small: Settings, inbox: Path) -> None:
    for number in range(60):
        deliver(inbox, f"file{number:02d}.csv", flights(20, seed=number))
    told: list[list[ScoredFile]] = [[], [], []]
    watchers = [
        threading.Thread(target=watch_inbox, args=(small, inbox, each.append, True), kwargs={"settle": 0})
        for each in told
    ]
    for watcher in watchers:
        watcher.start()
    for watcher in watchers:
        watcher.join()
    files = [scored.file for each in told for scored in each]
    assert sorted(files) == [f"file{number:02d}.csv" for number in range(60)]
    assert len(names(inbox, "scored")) == len(names(inbox, "done")) == 60
    assert len((inbox / "log.jsonl").read_text().splitlines()) == 60


def test_a_new_live_model_scores_the_next_file(small: Settings, inbox: Path, tmp_path: Path) -> None:
    settings = settings_in(tmp_path / "other")
    live = live_bundle(small)
    assert live is not None
    publish(settings, live)
    rows = flights(2000)
    label = pd.Series(np.arange(len(rows)) % 2.0)
    model = train(rows.assign(label=label), flight_delay, TrainingConfig(iterations=2))
    newer = write_bundle(
        settings, flight_delay, model, rows, "flight-delay@2", Origin(run_id="x", data={}, first="", last="")
    )
    told: list[ScoredFile] = []

    def tell(scored: ScoredFile) -> None:
        told.append(scored)
        publish(settings, newer)

    deliver(inbox, "a.csv", flights(5, seed=1))
    time.sleep(0.02)
    deliver(inbox, "b.csv", flights(5, seed=2))
    watch_inbox(settings, inbox, tell, once=True, settle=0)
    assert [(scored.file, scored.model) for scored in told] == [
        ("a.csv", "flight-delay@1"),
        ("b.csv", "flight-delay@2"),
    ]


@pytest.fixture(autouse=True)
def nothing_left_running() -> Iterator[None]:
    """Every process that a test started has ended."""
    yield
    assert [child for child in psutil.Process().children() if "inbox" in " ".join(child.cmdline())] == []


# ---------------------------------------------------------------- deliveries with a name that was there before


def test_a_file_that_is_given_back_does_not_overwrite_a_new_delivery(inbox: Path) -> None:
    contents = []
    for killed in (False, True):
        owner = Inbox(inbox).open()
        (inbox / "incoming" / "some.csv").write_text(f"claimed {killed}")
        claimed = claim_file(owner, 0)
        assert claimed is not None
        (inbox / "incoming" / "some.csv").write_text(f"delivered {killed}")
        if killed:
            owner.lock.release(force=True)
            other = Inbox(inbox).open()
            assert recover_abandoned(other) == []
            other.close()
        else:
            owner.close()
        files = list((inbox / "incoming").iterdir())
        contents.append(sorted(path.read_text() for path in files))
        assert all(path.name.endswith(".csv") for path in files)
        for path in files:
            path.unlink()
    assert contents == [["claimed False", "delivered False"], ["claimed True", "delivered True"]]
    assert [len(note.read_text().splitlines()) for note in (inbox / "working").glob("some.*.csv.deaths")] == [1]


def test_a_file_that_no_library_likes_is_set_aside_and_the_next_one_is_scored(small: Settings, inbox: Path) -> None:
    rows = flights(3)
    deliver(inbox, "lists.parquet", rows.assign(carrier=[["UA"]] * 3))
    deliver(inbox, "twice.parquet", rows)
    table = pyarrow.parquet.read_table(inbox / "incoming" / "twice.parquet")
    twice = table.append_column("carrier", table["carrier"])
    pyarrow.parquet.write_table(twice, inbox / "incoming" / "twice.parquet")
    deliver(inbox, "good.parquet", rows)
    told = {scored.file: scored for scored in run_once(small, inbox)}
    assert {name: scored.status for name, scored in told.items()} == {
        "lists.parquet": "rejected", "twice.parquet": "rejected", "good.parquet": "scored",
    }  # fmt: skip
    assert "carrier" in told["lists.parquet"].reason
    assert names(inbox, "incoming") == []


def test_a_key_that_is_sometimes_a_number_does_not_stop_the_answers(small: Settings, inbox: Path) -> None:
    """A CSV reader that looks at a file piece by piece takes the first pieces for numbers and the last one for text."""
    rows = pd.concat([flights(300_000).assign(period=1), flights(1).assign(period="zz")])[
        ["carrier", "origin", "dest", "hour_of_day", "temperature", "period"]
    ]
    deliver(inbox, "mixed.csv", rows)
    (scored,) = run_once(small, inbox)
    assert (scored.status, scored.rows, scored.reason) == ("scored", 300_001, "")
    assert pd.read_parquet(scored.answers)["period"].iloc[-1] == "zz"
