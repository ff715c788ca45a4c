"""Large content at an s3:// address: a real server, real processes; nothing is lost, and no flipped byte is read."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import boto3
import pandas as pd
import pytest
from conftest import Quarter, free_port, settings_in
from deletion_helpers import ONLINE, bytes_of, collected
from deltalake import DeltaTable

from mlops_course.data import DataError, newest_reference, read_table, replace_months, widen_column
from mlops_course.environment import CourseError, Settings, SettingsError, load_settings
from mlops_course.experiments import ExperimentError, TrainingConfig, find_tracked_run, load_run_model, train_run
from mlops_course.experiments.artifacts import read_artifact
from mlops_course.project import flight_delay
from mlops_course.registry import find_version, package, promote, register, roll_back
from mlops_course.registry.data_diff import diff_versions
from mlops_course.registry.data_versions import fetch_version, list_tables, table_history, tag_version
from mlops_course.registry.reproduction import reproduce_model
from mlops_course.registry.restoring import restore_version
from mlops_course.registry.retention import prune_versions
from mlops_course.registry.table_ledger import check_tables
from mlops_course.remote_tables import fetch_rows
from mlops_course.security.deletion import forget_rows
from mlops_course.security.finding import DeletionError, choose_rows
from mlops_course.serving import BundleError, live_bundle, load_predictor, publish
from mlops_course.storage import StorageError, fetch_file, list_objects, put_file, require_storage, storage_place

pytestmark = pytest.mark.filterwarnings("ignore:Series.values returning:DeprecationWarning")  # inside pyarrow
SECRET = "dont/show/this+0123456789"  # half of all secret keys have a slash
KEYS = {"AWS_ACCESS_KEY_ID": "learner", "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_REGION": "us-east-1"}
FLIGHTS = "toy/flights"
JANUARY, FEBRUARY, MARCH = "2013-01", "2013-02", "2013-03"
COURSE = [sys.executable, "-c", "from mlops_course.cli import main; main()"]


def start_server(**variables: str) -> tuple["subprocess.Popen[bytes]", str]:
    """A server that speaks S3, and its address."""
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, **variables}
    )
    address, end = f"http://127.0.0.1:{port}", time.monotonic() + 60
    while time.monotonic() < end:
        try:
            urllib.request.urlopen(f"{address}/moto-api/", timeout=5).close()
            return process, address
        except OSError:
            assert process.poll() is None, "the server ended at once"
            time.sleep(0.1)
    raise AssertionError("the server doesn't answer")


@pytest.fixture(scope="session")
def server() -> Iterator[str]:
    process, address = start_server()
    yield address
    process.kill()
    process.wait()


@dataclass(frozen=True)
class Bucket:
    """A bucket of the test's own."""

    name: str
    client: Any

    @property
    def address(self) -> str:
        return f"s3://{self.name}/course"

    def listed(self, part: str = "") -> list[str]:
        found = self.client.list_objects_v2(Bucket=self.name).get("Contents", [])
        return [each["Key"] for each in found if part in each["Key"]]

    def get(self, key: str) -> tuple[bytes, dict[str, str]]:
        found = self.client.get_object(Bucket=self.name, Key=key)
        return found["Body"].read(), found["Metadata"]

    def flip(self, key: str) -> str:
        """Let a byte in the middle flip, as a bad disk does; the address."""
        content, about = self.get(key)
        changed = bytearray(content)
        changed[len(changed) // 2] ^= 1
        self.client.put_object(Bucket=self.name, Key=key, Body=bytes(changed), Metadata=about)
        return f"s3://{self.name}/{key}"


NUMBERS = count()


def set_keys(server: str, patch: pytest.MonkeyPatch) -> None:
    for name, value in {**KEYS, "AWS_ENDPOINT_URL": server}.items():
        patch.setenv(name, value)


def make_bucket(server: str, patch: pytest.MonkeyPatch) -> Bucket:
    set_keys(server, patch)
    found = Bucket(f"bucket-{os.getpid()}-{next(NUMBERS)}", boto3.client("s3"))
    found.client.create_bucket(Bucket=found.name)
    return found


@pytest.fixture
def bucket(server: str, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    return make_bucket(server, monkeypatch)


def workspace(bucket: Bucket, home: Path) -> Settings:
    """A workspace whose large content is in the bucket."""
    return settings_in(home).model_copy(update={"storage": bucket.address}).prepare()


@pytest.fixture
def far(bucket: Bucket, tmp_path: Path) -> Settings:
    return workspace(bucket, tmp_path / "Flüge und Wetter" / "workspace")


def rows_of(month: str, *delays: float) -> pd.DataFrame:
    return pd.DataFrame({"period": month, "flight": range(1, len(delays) + 1), "delay": pd.Series(delays)})


def delays(settings: Settings, reference: str) -> list[float]:
    return sorted(read_table(settings, reference)["delay"])


def course(*arguments: str, seconds: float = 300, **variables: str) -> "subprocess.CompletedProcess[str]":
    """Run a command as a user would."""
    environment = {**os.environ, **variables}
    return subprocess.run([*COURSE, *arguments], capture_output=True, text=True, env=environment, timeout=seconds)


# ---------------------------------------------------------------- the setting


@pytest.mark.parametrize(
    "address",
    ["https://bucket/course", "s3://", "s3://B", "bucket", "s3://bucket/../x", "s3://bucket/ä", "s3://bucket//x"],
)
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(SettingsError, match=r"storage is .*, but should be an address such as s3://bucket/course"):
        load_settings(storage=address)


def test_an_address_with_a_password_is_refused_without_showing_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLOPS_COURSE_STORAGE", f"s3://me:{SECRET}@bucket/course")
    with pytest.raises(SettingsError, match="without a name and a password") as caught:
        load_settings()
    assert SECRET not in str(caught.value) and "MLOPS_COURSE_STORAGE" in str(caught.value)


def test_tables_of_two_places_never_mix(tmp_path: Path) -> None:
    storages = [None, "s3://a-bucket/b", "s3://a-bucket-b", "s3://a-bucket/b/c"]
    folders = {Settings(home=tmp_path, storage=each).data for each in storages}
    assert len(folders) == 4 and all(folder.is_relative_to(tmp_path) for folder in folders)
    assert load_settings(storage="s3://a-bucket/b/").storage == "s3://a-bucket/b"


# ---------------------------------------------------------------- a newcomer's mistakes: one line each, within seconds


def failing(far: Settings, *arguments: str, **variables: str) -> str:
    """The one line of a command that can't reach its storage."""
    begin = time.monotonic()
    where = {"MLOPS_COURSE_HOME": str(far.home), "MLOPS_COURSE_STORAGE": str(far.storage)}
    done = course(*(arguments or ("data", "history")), **{**where, **variables})
    assert done.returncode == 1 and time.monotonic() - begin < 60, done.stderr
    assert SECRET not in done.stdout + done.stderr
    (line,) = done.stderr.strip().splitlines()
    return line


def test_a_bucket_that_is_not_there(far: Settings) -> None:
    line = failing(far, MLOPS_COURSE_STORAGE="s3://nobodys-bucket/course")
    assert "s3://nobodys-bucket/course" in line
    assert line.endswith("there is no such bucket. Make it, or correct MLOPS_COURSE_STORAGE.")


def test_a_server_that_is_not_there(far: Settings) -> None:
    address = f"http://127.0.0.1:{free_port()}"
    line = failing(far, AWS_ENDPOINT_URL=address.replace("//", f"//me:{SECRET}@"))
    assert f"no answer from {address.replace('//', '//…@')}" in line and "correct AWS_ENDPOINT_URL" in line


def test_a_name_of_a_server_that_nobody_knows(far: Settings) -> None:
    line = failing(far, AWS_ENDPOINT_URL="http://storage.invalid:9000")
    assert "no answer from http://storage.invalid:9000" in line


def test_an_endpoint_that_is_no_address(far: Settings) -> None:
    assert "AWS_ENDPOINT_URL isn't an address: localhost" in failing(far, AWS_ENDPOINT_URL="localhost")


def test_keys_that_are_not_set(far: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    assert "AWS_SECRET_ACCESS_KEY not set. Set them in the environment" in failing(far)


def test_training_stops_before_it_begins_when_the_storage_is_away(far: Settings) -> None:
    line = failing(far, "run", "training", AWS_ENDPOINT_URL=f"http://127.0.0.1:{free_port()}")
    assert "no answer from" in line
    assert not list(far.runs.glob("*"))


def test_without_the_extra_the_message_says_how_to_install_it(far: Settings, tmp_path: Path) -> None:
    (tmp_path / "none" / "boto3").mkdir(parents=True)
    (tmp_path / "none" / "boto3" / "__init__.py").write_text("raise ImportError('no boto3 here')", encoding="utf-8")
    line = failing(far, PYTHONPATH=str(tmp_path / "none"))
    assert line.endswith("an s3:// address needs boto3. Run: pip install 'mlops_course[s3]'.")


def test_without_a_storage_nothing_needs_the_extra(tmp_path: Path) -> None:
    (tmp_path / "none" / "boto3").mkdir(parents=True)
    (tmp_path / "none" / "boto3" / "__init__.py").write_text("raise ImportError('no boto3 here')", encoding="utf-8")
    assert course("data", "history", PYTHONPATH=str(tmp_path / "none")).returncode == 0


DENY = {"Effect": "Deny", "Action": "s3:*", "Resource": "*"}


@pytest.mark.slow
def test_keys_that_the_server_does_not_know(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    process, address = start_server(INITIAL_NO_AUTH_ACTION_COUNT="4")
    try:
        for name, value in {**KEYS, "AWS_ENDPOINT_URL": address}.items():
            monkeypatch.setenv(name, value)
        iam, policy = boto3.client("iam", region_name="us-east-1"), {"Version": "2012-10-17", "Statement": [DENY]}
        boto3.client("s3").create_bucket(Bucket="guarded")
        iam.create_user(UserName="ann")
        iam.put_user_policy(UserName="ann", PolicyName="none", PolicyDocument=json.dumps(policy))
        key = iam.create_access_key(UserName="ann")["AccessKey"]
        far = Settings(home=tmp_path / "workspace", storage="s3://guarded/course").prepare()
        assert "the server doesn't know the access key. Correct AWS_ACCESS_KEY_ID" in failing(far)
        wrong = {"AWS_ACCESS_KEY_ID": key["AccessKeyId"]}
        assert "the secret key isn't the one of the access key" in failing(far, **wrong)
        assert "this key may not do that" in failing(far, **wrong, AWS_SECRET_ACCESS_KEY=key["SecretAccessKey"])
    finally:
        process.kill()
        process.wait()


def test_the_doctor_says_whether_the_storage_answers(far: Settings, bucket: Bucket) -> None:
    where = {"MLOPS_COURSE_HOME": str(far.home), "MLOPS_COURSE_STORAGE": bucket.address, "COLUMNS": "200"}
    found = {tool["name"]: tool for tool in json.loads(course("doctor", "--json", **where).stdout)}
    assert found["storage"]["found"] and found["storage"]["version"] == bucket.address
    assert bucket.listed() == [], "it tidies up"
    missing = course("doctor", "--json", **{**where, "MLOPS_COURSE_STORAGE": "s3://nobodys-bucket"})
    told = {tool["name"]: tool for tool in json.loads(missing.stdout)}["storage"]
    assert not told["found"] and "there is no such bucket" in told["how_to_get"] and missing.returncode == 1


# ---------------------------------------------------------------- single objects


def test_a_name_is_written_once(far: Settings, tmp_path: Path) -> None:
    (tmp_path / "one").write_text("one")
    (tmp_path / "other").write_text("other")
    place = storage_place(far) / "note"
    assert put_file(place, tmp_path / "one", new=True)
    assert put_file(place, tmp_path / "one", new=True), "the same content again: the reply may have been lost"
    assert not put_file(place, tmp_path / "other", new=True)
    assert fetch_file(place, tmp_path / "copy").read_text() == "one"


def test_what_is_too_large_is_refused_before_it_is_read(far: Settings, bucket: Bucket, tmp_path: Path) -> None:
    bucket.client.put_object(Bucket=bucket.name, Key="course/big", Body=b"x" * 1001)
    with pytest.raises(StorageError, match="course/big has 1001 bytes; at most 1000 are read"):
        fetch_file(storage_place(far) / "big", tmp_path / "copy", most=1000)
    assert not (tmp_path / "copy").exists()


@pytest.mark.slow
def test_more_objects_than_fit_on_a_page_are_all_listed(far: Settings, bucket: Bucket) -> None:
    for number in range(1005):
        bucket.client.put_object(Bucket=bucket.name, Key=f"course/many/{number:04d}", Body=b"")
    assert len(list_objects(storage_place(far) / "many")) == 1005


# ---------------------------------------------------------------- tables


@pytest.fixture
def toy(far: Settings) -> Settings:
    """A table of four versions in the storage."""
    replace_months(far, FLIGHTS, pd.concat([rows_of(JANUARY, 5, 20), rows_of(FEBRUARY, 7)]))
    replace_months(far, FLIGHTS, rows_of(JANUARY, 5, 21))
    replace_months(far, FLIGHTS, rows_of(MARCH, 1, 2, 3), sources={"raw": "toy/raw@9"})
    return far


def test_another_machine_reads_the_same_table(toy: Settings, bucket: Bucket, tmp_path: Path) -> None:
    other = workspace(bucket, tmp_path / "other")
    assert list_tables(other) == [FLIGHTS]
    assert delays(other, f"{FLIGHTS}@3") == [1, 2, 3, 5, 7, 21]
    assert delays(other, f"{FLIGHTS}@1") == [5, 7, 20]
    assert [each.what for each in table_history(other, FLIGHTS)] == [each.what for each in table_history(toy, FLIGHTS)]
    assert not list((other.home / "data").iterdir()), "nothing of it is in the folder of local tables"


def test_only_the_months_that_are_asked_for_are_fetched(toy: Settings, bucket: Bucket, tmp_path: Path) -> None:
    other = workspace(bucket, tmp_path / "other")
    assert list(read_table(other, f"{FLIGHTS}@3", [FEBRUARY])["delay"]) == [7]
    assert [path.parent.name for path in other.data.rglob("*.parquet")] == [f"period={FEBRUARY}"]


def test_any_program_that_knows_delta_can_read_what_is_in_the_bucket(
    toy: Settings, bucket: Bucket, server: str
) -> None:
    options = {**KEYS, "AWS_ENDPOINT_URL": server, "AWS_ALLOW_HTTP": "true"}
    table = DeltaTable(f"{bucket.address}/data/{FLIGHTS}", storage_options=options)
    assert table.version() == 3
    assert sorted(table.to_pandas()["delay"]) == [1, 2, 3, 5, 7, 21]


def test_the_same_rows_again_write_nothing(toy: Settings, bucket: Bucket) -> None:
    before = bucket.listed()
    assert replace_months(toy, FLIGHTS, rows_of(JANUARY, 5, 21)) == (f"{FLIGHTS}@3", [])
    assert bucket.listed() == before


WRITER = """
import sys, pandas as pd
from mlops_course.data import replace_months
from mlops_course.environment import load_settings

settings = load_settings()
sys.stdin.readline()
for month in sys.argv[1:]:
    replace_months(settings, "toy/flights", pd.DataFrame({"period": [month] * 3, "delay": [float(month[5:])] * 3}))
"""


@pytest.mark.slow
def test_two_processes_on_two_machines_that_write_different_months_lose_nothing(bucket: Bucket, tmp_path: Path) -> None:
    months = [f"2013-{number:02d}" for number in range(1, 13)]
    writers = []
    for half in (months[::2], months[1::2]):
        variables = {"MLOPS_COURSE_HOME": str(tmp_path / half[0]), "MLOPS_COURSE_STORAGE": bucket.address}
        command = [sys.executable, "-c", WRITER, *half]
        environment = {**os.environ, **variables}
        writers.append(subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, env=environment))
    for writer in writers:
        assert writer.stdin
        writer.stdin.write(b"go\n")
        writer.stdin.flush()
    said = [writer.communicate(timeout=120)[1] for writer in writers]
    assert [writer.returncode for writer in writers] == [0, 0], said
    reader = workspace(bucket, tmp_path / "reader")
    assert len(table_history(reader, FLIGHTS)) == 13, "one version for each month, after the empty one"
    assert delays(reader, f"{FLIGHTS}@12") == sorted([float(number) for number in range(1, 13)] * 3)
    assert len(bucket.listed(".parquet")) == 12, "what came too late took its files away again"


def test_a_write_that_is_cut_off_leaves_the_table_as_it_was(
    toy: Settings, bucket: Bucket, server: str, tmp_path: Path
) -> None:
    with pytest.MonkeyPatch.context() as patch:  # the server goes away when the rows have to be sent
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
        with pytest.raises(StorageError, match="no answer from"):
            replace_months(toy, FLIGHTS, rows_of(JANUARY, 99))
    assert delays(toy, f"{FLIGHTS}@3") == [1, 2, 3, 5, 7, 21]
    assert not list(toy.data.glob(".writing-*"))
    assert replace_months(toy, FLIGHTS, rows_of(JANUARY, 99))[0] == f"{FLIGHTS}@4"


@pytest.mark.parametrize("kind", [".parquet", "00000000000000000002.json"])
def test_a_flipped_byte_of_a_table_is_named_with_its_address(
    toy: Settings, bucket: Bucket, tmp_path: Path, kind: str
) -> None:
    address = bucket.flip(bucket.listed(kind)[-1])
    with pytest.raises(StorageError, match=rf"{re.escape(address)} is damaged: its SHA-256 is \w+…, and should"):
        delays(workspace(bucket, tmp_path / "other"), f"{FLIGHTS}@3")
    assert delays(toy, f"{FLIGHTS}@3") == [1, 2, 3, 5, 7, 21], "whoever has whole copies goes on"


def test_no_log_makes_a_file_outside_of_its_table(toy: Settings) -> None:
    with pytest.raises(StorageError, match=r"toy/flights speaks of a file outside of it: '\.\./\.\./stolen.parquet'"):
        fetch_rows(toy, FLIGHTS, ["../../stolen.parquet"])


def test_a_flipped_byte_of_a_copy_is_noticed_and_the_copy_fetched_again(toy: Settings) -> None:
    for path in toy.data.rglob("*.parquet"):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(bytes(content))
    assert delays(toy, f"{FLIGHTS}@3") == [1, 2, 3, 5, 7, 21]


def test_what_another_program_wrote_has_no_checksum_and_is_refused(
    toy: Settings, bucket: Bucket, tmp_path: Path
) -> None:
    (key,) = bucket.listed("00000000000000000003.json")
    bucket.client.put_object(Bucket=bucket.name, Key=key, Body=bucket.get(key)[0])
    with pytest.raises(StorageError, match=rf"{key} has no checksum"):
        delays(workspace(bucket, tmp_path / "other"), f"{FLIGHTS}@3")


def test_a_bucket_that_was_emptied_is_noticed(toy: Settings, bucket: Bucket) -> None:
    for key in bucket.listed():
        bucket.client.delete_object(Bucket=bucket.name, Key=key)
    with pytest.raises(StorageError, match="is gone or another one: this workspace has seen that version"):
        replace_months(toy, FLIGHTS, rows_of(JANUARY, 1))
    assert bucket.listed() == []


def test_files_that_are_gone_from_the_bucket_are_told_by_the_history(
    toy: Settings, bucket: Bucket, tmp_path: Path
) -> None:
    (key,) = bucket.listed(f"period={MARCH}")
    bucket.client.delete_object(Bucket=bucket.name, Key=key)
    other = workspace(bucket, tmp_path / "other")
    assert [each.gone for each in table_history(other, FLIGHTS)] == ["", "", "", "1 of 3 files are gone"]
    with pytest.raises(DataError, match="1 of its 3 files are gone"):
        fetch_version(other, f"{FLIGHTS}@3")
    with pytest.raises(StorageError, match=rf"can't read s3://{bucket.name}/{key}: it isn't there"):
        delays(other, f"{FLIGHTS}@3")


def test_an_old_version_comes_back_from_another_machine(toy: Settings, bucket: Bucket, tmp_path: Path) -> None:
    other = workspace(bucket, tmp_path / "other")
    tag_version(other, f"{FLIGHTS}@1", "good")
    done = restore_version(other, f"{FLIGHTS}@good", "the newer rows are wrong")
    assert (done.before, done.now, done.changed) == (f"{FLIGHTS}@3", f"{FLIGHTS}@4", True)
    assert delays(toy, f"{FLIGHTS}@4") == [5, 7, 20]
    assert check_tables(other) == []
    third = workspace(bucket, tmp_path / "third")
    assert delays(third, f"{FLIGHTS}@4") == [5, 7, 20], "its files have their checksums still"
    diff = diff_versions(third, f"{FLIGHTS}@3", f"{FLIGHTS}@4", ["period", "flight"])
    assert (diff.removed, diff.changed) == (3, 1)


def test_a_column_is_widened(toy: Settings, bucket: Bucket, tmp_path: Path) -> None:
    replace_months(toy, "toy/counts", pd.DataFrame({"period": [JANUARY] * 2, "n": pd.array([1, 2], dtype="int16")}))
    assert widen_column(toy, "toy/counts", "n", "int32") == "toy/counts@2"
    assert list(read_table(workspace(bucket, tmp_path / "other"), "toy/counts@2")["n"]) == [1, 2]


def test_tables_that_others_may_need_are_not_pruned(toy: Settings, bucket: Bucket) -> None:
    before = bucket.listed()
    with pytest.raises(DataError, match=rf"can't prune the tables in {bucket.address}: other workspaces may need"):
        prune_versions(toy, older_than=0)
    assert bucket.listed() == before


def test_a_workspace_that_is_moved_goes_on_with_its_storage(toy: Settings, bucket: Bucket, tmp_path: Path) -> None:
    tag_version(toy, f"{FLIGHTS}@1", "good")
    moved = workspace(bucket, toy.home.rename(tmp_path / "elsewhere"))
    assert delays(moved, f"{FLIGHTS}@3") == [1, 2, 3, 5, 7, 21]
    assert table_history(moved, FLIGHTS)[1].tags == ("good",)


# ---------------------------------------------------------------- artifacts and bundles


@dataclass(frozen=True)
class Model:
    """A workspace with a champion that is served; all of it is in the storage."""

    settings: Settings
    bucket: Bucket
    run_id: str


@pytest.fixture(scope="module")
def champion(
    quarter: Quarter, server: str, empty_store: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Model, dict[str, tuple[bytes, dict[str, str]]]]:
    """Made once, with what is in the bucket then."""
    with pytest.MonkeyPatch.context() as patch:
        bucket = make_bucket(server, patch)
        far = workspace(bucket, tmp_path_factory.mktemp("champion") / "workspace")
        shutil.copyfile(empty_store, far.home / "mlflow.db")
        tables = {
            name: replace_months(far, name.partition("@")[0], read_table(quarter.settings, name))[0]
            for name in (quarter.features, quarter.rows)
        }
        config = TrainingConfig(iterations=5)
        run_id = train_run(far, flight_delay, tables[quarter.features], tables[quarter.rows], JANUARY, FEBRUARY, config)
        promote(far, flight_delay, register(far, flight_delay, run_id), "the first")
        publish(far, package(far, flight_delay, "champion").name)
        content = {key: bucket.get(key) for key in bucket.listed() if "/data/" not in key}
    return Model(far, bucket, run_id), content


@pytest.fixture
def model(
    champion: tuple[Model, dict[str, tuple[bytes, dict[str, str]]]],
    server: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> Iterator[Model]:
    """A copy of the workspace; the bucket is put back as it was."""
    made, content = champion
    set_keys(server, monkeypatch)
    home = Path(shutil.copytree(made.settings.home, tmp_path / "Flüge und Wetter"))
    yield Model(workspace(made.bucket, home), made.bucket, made.run_id)
    there = made.bucket.listed()
    for key, (body, about) in content.items():
        if key not in there or made.bucket.get(key) != (body, about):
            made.bucket.client.put_object(Bucket=made.bucket.name, Key=key, Body=body, Metadata=about)


def test_runs_and_bundles_are_in_the_bucket_and_no_key_is_in_the_workspace(model: Model) -> None:
    assert not list(model.settings.artifacts.rglob("*.skops"))
    assert len(model.bucket.listed("/artifacts/model.skops")) == 1
    names = ["MODEL_CARD.md", "bundle.json", "golden.json", "model.onnx"]
    assert model.bucket.listed("course/bundles/") == [f"course/bundles/flight-delay/1/{name}" for name in names]
    found = [path for path in model.settings.home.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]
    assert found == []


def test_a_model_is_made_again_from_what_is_in_the_bucket(model: Model) -> None:
    done = reproduce_model(model.settings, flight_delay, "champion")
    assert [each.what for each in done.comparisons if each.result and not each.same] == ["data"]  # no clean tables here
    assert {"model", "bundle"} <= {each.what for each in done.comparisons if each.same}


@pytest.mark.parametrize("name", ["model.skops", "fingerprint.json"])
def test_a_flipped_byte_of_an_artifact_is_named_with_its_address(model: Model, name: str) -> None:
    (key,) = [each for each in model.bucket.listed("mlartifacts") if each.endswith(name)]
    address = model.bucket.flip(key)
    with pytest.raises(ExperimentError, match=rf"{re.escape(address)} is damaged: its SHA-256 is \w+…, the run says"):
        if name == "model.skops":
            load_run_model(model.settings, flight_delay, model.run_id)
        else:
            read_artifact(find_tracked_run(model.settings, flight_delay, model.run_id), name)


def test_an_artifact_that_is_gone_is_named_too(model: Model) -> None:
    (key,) = model.bucket.listed("model.skops")
    model.bucket.client.delete_object(Bucket=model.bucket.name, Key=key)
    with pytest.raises(ExperimentError, match=rf"there is no s3://{model.bucket.name}/{re.escape(key)}"):
        load_run_model(model.settings, flight_delay, model.run_id)


def test_a_bundle_that_is_lost_here_is_fetched_when_it_is_needed(model: Model) -> None:
    shutil.rmtree(model.settings.serving / "bundles")
    folder = live_bundle(model.settings)
    assert folder and load_predictor(folder).reference == "flight-delay@1"


def test_another_workspace_serves_a_bundle_from_the_storage(model: Model, tmp_path: Path) -> None:
    other = workspace(model.bucket, tmp_path / "other")
    assert load_predictor(publish(other, "flight-delay@1")).reference == "flight-delay@1"
    with pytest.raises(BundleError, match=r"there is no .*flight-delay@2"):
        publish(other, "flight-delay@2")


def test_who_serves_needs_no_key_to_the_storage_if_somebody_else_has_fetched(model: Model, tmp_path: Path) -> None:
    """As in a pod: one container fetches, and the next one, which knows of no storage, publishes."""
    home = ("--home", str(tmp_path / "pod"))
    said = course("fetch-bundle", "flight-delay@1", *home, MLOPS_COURSE_STORAGE=model.bucket.address)
    assert (said.returncode, said.stdout) == (0, "flight-delay@1 is here\n"), said.stderr
    assert live_bundle(Settings(home=tmp_path / "pod")) is None
    assert course("publish", "flight-delay@1", *home, MLOPS_COURSE_STORAGE="").stdout == "flight-delay@1 is live\n"
    missing = course("fetch-bundle", "flight-delay@9", *home, MLOPS_COURSE_STORAGE=model.bucket.address)
    assert missing.returncode == 1 and "flight-delay@9" in missing.stderr


@pytest.mark.parametrize("name", ["model.onnx", "bundle.json", "golden.json", "MODEL_CARD.md"])
def test_a_flipped_byte_of_a_bundle_is_named_with_its_address(model: Model, name: str) -> None:
    shutil.rmtree(model.settings.serving / "bundles")
    address = model.bucket.flip(f"course/bundles/flight-delay/1/{name}")
    with pytest.raises(StorageError, match=rf"{re.escape(address)} is damaged: its SHA-256"):
        live_bundle(model.settings)
    assert not (model.settings.serving / "bundles" / "flight-delay@1").exists(), "nothing damaged stays here"


def test_a_bundle_that_was_replaced_as_a_whole_is_not_the_one_that_was_published(model: Model, tmp_path: Path) -> None:
    shutil.rmtree(model.settings.serving / "bundles")
    content, _ = model.bucket.get("course/bundles/flight-delay/1/MODEL_CARD.md")
    (tmp_path / "card").write_bytes(content + b"\nTrust me.\n")
    model.bucket.client.delete_object(Bucket=model.bucket.name, Key="course/bundles/flight-delay/1/MODEL_CARD.md")
    put_file(storage_place(model.settings) / "bundles/flight-delay/1/MODEL_CARD.md", tmp_path / "card")
    address = f"s3://{model.bucket.name}/course/bundles/flight-delay/1/MODEL_CARD.md"
    with pytest.raises(BundleError, match=f"{re.escape(address)} is damaged"):
        live_bundle(model.settings)


def test_two_workspaces_cannot_publish_two_bundles_under_one_name(
    model: Model, quarter: Quarter, tmp_path: Path
) -> None:
    other = quarter.fresh(tmp_path / "other").settings
    config = TrainingConfig(iterations=7)
    run_id = train_run(other, flight_delay, quarter.features, quarter.rows, JANUARY, FEBRUARY, config)
    promote(other, flight_delay, register(other, flight_delay, run_id), "another first")
    package(other, flight_delay, "champion")
    before = {key: model.bucket.get(key) for key in model.bucket.listed("bundles")}
    with pytest.raises(BundleError, match="somebody else published a flight-delay@1"):
        publish(other.model_copy(update={"storage": model.bucket.address}), "flight-delay@1")
    assert {key: model.bucket.get(key) for key in model.bucket.listed("bundles")} == before
    assert live_bundle(other) is None


def test_runs_from_before_the_storage_stay_readable_where_they_are(
    own_quarter: Quarter, bucket: Bucket, tmp_path: Path
) -> None:
    here = own_quarter.settings
    data, config = (own_quarter.features, own_quarter.rows), TrainingConfig(iterations=5)
    first = train_run(here, flight_delay, *data, JANUARY, FEBRUARY, config)
    promote(here, flight_delay, register(here, flight_delay, first), "the first")
    far = here.model_copy(update={"storage": bucket.address})
    assert load_run_model(far, flight_delay, first)
    for name in data:
        replace_months(far, name.partition("@")[0], read_table(here, name))
    newest = [f"{name.partition('@')[0]}@1" for name in data]
    second = train_run(far, flight_delay, *newest, JANUARY, FEBRUARY, TrainingConfig(iterations=6))
    promote(far, flight_delay, register(far, flight_delay, second), "better")
    assert str(find_tracked_run(far, flight_delay, second).info.artifact_uri).startswith(bucket.address)
    assert roll_back(far, flight_delay, "complaints") and find_version(far, flight_delay, "champion").run_id == first
    third = train_run(here, flight_delay, *data, JANUARY, JANUARY, config)
    assert str(find_tracked_run(here, flight_delay, third).info.artifact_uri).startswith(here.artifacts.as_uri())


def test_the_storage_is_asked_once_and_not_before_each_call(far: Settings, bucket: Bucket) -> None:
    require_storage(far)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mlops_course.storage._ANSWERED", set())
        require_storage(far)
    with pytest.raises(CourseError, match="can't reach s3://nobodys-bucket/course: there is no such bucket"):
        require_storage(far.model_copy(update={"storage": "s3://nobodys-bucket/course"}))


# ---------------------------------------------------------------- the whole


@pytest.mark.slow
@pytest.mark.thorough
def test_the_commands_work_as_they_do_without_a_storage(bucket: Bucket, tmp_path: Path) -> None:
    where = {"MLOPS_COURSE_HOME": str(tmp_path / "Flüge und Wetter"), "MLOPS_COURSE_STORAGE": bucket.address}

    def run(*arguments: str) -> str:
        done = course(*arguments, seconds=900, **where)
        assert done.returncode == 0, f"{arguments}: {done.stderr}"
        assert SECRET not in done.stdout + done.stderr
        return done.stdout

    months = ("-p", "first=2013-01", "-p", "train_last=2013-01", "-p", "test_last=2013-02", "-p", "iterations=20")
    run("run", "training", *months)
    assert "nothing to do" in run("run", "training", *months) or run("plan", "training", *months)
    run("run", "scoring", "-p", "month=2013-02")
    history = json.loads(run("data", "history", "--json"))
    names = {each["reference"].partition("@")[0] for each in history}
    assert {"flight-delay/flights", "flight-delay/features", "flight-delay/predictions"} <= names
    assert all(each["gone"] == "" for each in history)
    run("data", "restore", "flight-delay/predictions@0", "--reason", "a test")
    assert "flight-delay@1" in run("models", "list", "--json")
    assert json.loads(run("reproduce", "champion", "--json"))["equal"]
    assert not list((tmp_path / "Flüge und Wetter" / "data").rglob("*.parquet"))


def test_what_is_no_file_of_a_bundle_is_not_fetched(model: Model) -> None:
    shutil.rmtree(model.settings.serving / "bundles")
    key = "course/bundles/flight-delay/1/../../../evil.py"
    model.bucket.client.put_object(Bucket=model.bucket.name, Key=key, Body=b"import os", Metadata={})
    try:
        with pytest.raises(BundleError, match=r"evil\.py isn't a file of a bundle"):
            live_bundle(model.settings)
        assert not list(model.settings.home.rglob("evil.py"))
    finally:
        model.bucket.client.delete_object(Bucket=model.bucket.name, Key=key)


# ---------------------------------------------------------------- somebody's rows are deleted


MINE = choose_rows(flight_delay, ids=["secret-1"])


def told_by(bucket: Bucket) -> list[str]:
    """The objects of a bucket that tell somebody's request."""
    return [key for key in bucket.listed() if b"secret-1" in bucket.get(key)[0]]


def test_somebodys_rows_are_deleted_in_the_storage_too(far: Settings, bucket: Bucket, tmp_path: Path) -> None:
    collected(far, ("secret-1", 12), ("other-1", 700))
    tag_version(far, collected(far, ("other-2", 701)), "golden")
    reader = workspace(bucket, tmp_path / "another machine")
    read_table(reader, f"{ONLINE}@2", by="segment")
    bucket.client.copy_object(  # what a writer left that was killed
        Bucket=bucket.name, Key=f"course/data/{ONLINE}/segment=x/part-left.parquet",
        CopySource={"Bucket": bucket.name, "Key": next(key for key in told_by(bucket) if key.endswith(".parquet"))},
    )  # fmt: skip
    bucket.client.put_object(Bucket=bucket.name, Key="course/mlartifacts/1/notes.txt", Body=b"27,004 flights")
    shutil.rmtree(far.data)  # the copies: whoever deletes may be on another machine
    done = forget_rows(far, flight_delay, MINE, "asked for", by="ann")
    assert done.complete and done.statement.left == () and done.statement.searched["model"] == 1
    assert {each.place for each in done.statement.found} == {"table", "table log"}
    assert told_by(bucket) == [] and b"secret-1" not in bytes_of(far)
    kept = read_table(far, newest_reference(far, ONLINE), by="segment")
    assert sorted(kept["id"]) == ["other-1", "other-2"]
    assert sorted(read_table(reader, newest_reference(reader, ONLINE), by="segment")["id"]) == ["other-1", "other-2"]
    assert [each.gone for each in table_history(far, ONLINE) if each.rows] == ["pruned", "pruned", ""]
    assert forget_rows(far, flight_delay, MINE, "asked for").statement.found == ()


def test_a_model_in_the_storage_that_tells_a_row_is_named_and_left(far: Settings, bucket: Bucket) -> None:
    collected(far, ("other-1", 700))
    bucket.client.put_object(Bucket=bucket.name, Key="course/mlartifacts/1/sample.csv", Body=b"id\nsecret-1\n")
    done = forget_rows(far, flight_delay, MINE, "asked for")
    assert done.complete and [each.place for each in done.statement.left] == ["model"]
    assert done.statement.left[0].what == f"{bucket.address}/mlartifacts/1/sample.csv"


def test_rows_from_before_there_was_a_storage_go_with_the_others(far: Settings, bucket: Bucket) -> None:
    near = far.model_copy(update={"storage": None})
    collected(near, ("secret-1", 12))
    collected(far, ("secret-1", 12))
    assert forget_rows(far, flight_delay, MINE, "asked for").complete
    assert told_by(bucket) == [] and b"secret-1" not in bytes_of(far)


def test_who_deletes_without_the_storage_is_told_of_its_copies(far: Settings, bucket: Bucket) -> None:
    collected(far, ("secret-1", 12))
    near = far.model_copy(update={"storage": None})
    with pytest.raises(DeletionError, match=r"copies of a table in another storage\. Set MLOPS_COURSE_STORAGE"):
        forget_rows(near, flight_delay, MINE, "asked for")
    assert told_by(bucket), "nothing was done by halves"


def test_a_bucket_that_keeps_what_is_deleted_is_refused(far: Settings, bucket: Bucket) -> None:
    collected(far, ("secret-1", 12))
    before = bucket.listed()
    for status in ("Enabled", "Suspended"):
        bucket.client.put_bucket_versioning(Bucket=bucket.name, VersioningConfiguration={"Status": status})
        with pytest.raises(DeletionError, match="keeps what is deleted: nobody can say that rows are gone"):
            forget_rows(far, flight_delay, MINE, "asked for")
    assert bucket.listed() == before


def test_a_storage_that_is_away_deletes_nothing(far: Settings, bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    collected(far, ("secret-1", 12))
    with monkeypatch.context() as away:
        away.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
        with pytest.raises(StorageError, match="no answer"):
            forget_rows(far, flight_delay, MINE, "asked for")
    assert told_by(bucket)
