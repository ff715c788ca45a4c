"""The ground that everything stands on: settings, workspace, whole files, fingerprint, doctor."""

import contextlib
import errno
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy
import pytest
from pydantic import ValidationError

from mlops_course import environment
from mlops_course.doctor import Tool, check_machine
from mlops_course.environment import (
    CourseError,
    Settings,
    SettingsError,
    WorkspaceError,
    default_home,
    find_project,
    fingerprint,
    load_settings,
    lock_differences,
    locked_versions,
    run_quietly,
    seed_everything,
    workspace_error,
    write_atomic,
)

posix_only = pytest.mark.skipif(os.name == "nt", reason="uses POSIX limits and signals")


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*.tmp"))


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("problem", "remedy", "expected"),
    [
        ("no month '2013-13'", "Give another", "no month '2013-13'. Give another."),
        ("no month '2013-13'.", "", "no month '2013-13'."),
        ("no setting X", "Did you mean Y?", "no setting X. Did you mean Y?"),
        ("no use case", "Did you mean 'flight_delay'?", "no use case. Did you mean 'flight_delay'?"),
        ("two\n  lines", "of\ttext", "two lines. of text."),
    ],
)
def test_an_error_is_one_line_with_both_halves(problem: str, remedy: str, expected: str) -> None:
    assert str(CourseError(problem, remedy)) == expected


def test_an_error_survives_the_way_between_processes() -> None:
    error = pickle.loads(pickle.dumps(SettingsError("bad seed", "Choose another")))
    assert (type(error), error.problem, error.remedy) == (SettingsError, "bad seed", "Choose another")


# ---------------------------------------------------------------- settings


def test_settings_come_from_the_environment_and_overrides_win(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MLOPS_COURSE_SEED", "7")
    monkeypatch.setenv("MLOPS_COURSE_THREADS", "3")
    monkeypatch.setenv("MLOPS_COURSE_HOME", str(tmp_path))
    found = load_settings(seed=9)
    assert (found.seed, found.threads, found.home) == (9, 3, tmp_path)


def test_an_empty_variable_is_no_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLOPS_COURSE_HOME", "")
    monkeypatch.setenv("MLOPS_COURSE_SEED", "")
    assert load_settings() == Settings(home=default_home(), seed=2013)


def test_the_home_is_absolute_and_stays(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    found = load_settings(home="a/../b")
    monkeypatch.chdir("/")
    assert found.home == tmp_path / "b"
    assert load_settings(home="~/course").home == Path("~/course").expanduser()


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("SEED", "many", "a valid integer"),
        ("SEED", "-1", "greater than or equal to 0"),
        ("SEED", str(2**32), "less than"),
        ("THREADS", "0", "greater than or equal to 1"),
        ("HOME", "s3://bucket/course", "a folder on this machine"),
    ],
)
def test_a_bad_value_is_named_with_its_variable(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, expected: str
) -> None:
    monkeypatch.setenv(f"MLOPS_COURSE_{name}", value)
    with pytest.raises(SettingsError) as caught:
        load_settings()
    message = str(caught.value)
    assert f"MLOPS_COURSE_{name} is {value!r}" in message
    assert expected in message
    assert "\n" not in message


def test_a_misspelt_variable_is_refused_and_a_foreign_one_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLOPS_COURSE_API_KEY_FILE", "somewhere")
    load_settings()
    monkeypatch.setenv("MLOPS_COURSE_SEDE", "7")
    with pytest.raises(SettingsError, match="Did you mean MLOPS_COURSE_SEED"):
        load_settings()


def test_an_unknown_override_is_refused_with_the_known_ones() -> None:
    with pytest.raises(SettingsError, match=r"no setting 'sed'.*home, seed, threads, tracking_uri, features_url"):
        load_settings(sed=1)


def test_settings_are_frozen(settings: Settings) -> None:
    with pytest.raises(ValidationError):
        settings.seed = 1  # type: ignore[misc]


def test_tracking_is_a_file_of_the_workspace_unless_told_otherwise(settings: Settings) -> None:
    assert settings.tracking == f"sqlite:///{settings.home.as_posix()}/mlflow.db"
    assert load_settings(tracking_uri="http://server:5000").tracking == "http://server:5000"


# ---------------------------------------------------------------- workspace


def make_project(folder: Path, name: str = "mlops_course") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "settings.ini").write_text(f"[DEFAULT]\nlib_name = {name}\n", encoding="utf-8")
    return folder


def test_the_workspace_is_beside_the_nearest_clone(tmp_path: Path) -> None:
    clone = make_project(tmp_path / "clone")
    below = clone / "nbs" / "pipelines"
    below.mkdir(parents=True)
    assert find_project(below) == clone
    assert default_home(below) == clone / "workspace"


def test_another_projects_settings_are_not_ours(tmp_path: Path) -> None:
    other = make_project(tmp_path / "other", name="somebody_elses")
    assert default_home(other) == other / "workspace"
    assert find_project(other) is None


def test_without_a_clone_an_existing_workspace_above_is_found(tmp_path: Path) -> None:
    below = tmp_path / "a" / "b"
    below.mkdir(parents=True)
    assert default_home(below) == below / "workspace"
    Settings(home=tmp_path / "workspace").prepare()
    assert default_home(below) == tmp_path / "workspace"


def test_making_settings_creates_nothing_and_preparing_twice_changes_nothing(tmp_path: Path) -> None:
    found = Settings(home=tmp_path / "workspace")
    assert not found.home.exists()
    found.prepare()
    (found.data / "kept").write_text("x", encoding="utf-8")
    before = sorted(found.home.rglob("*"))
    assert found.prepare() is found
    assert sorted(found.home.rglob("*")) == before


@pytest.mark.parametrize("place", ["workspace", "workspace/data", "workspace/.mlops_course/x"])
def test_a_file_in_the_way_is_named(tmp_path: Path, place: str) -> None:
    blocked = tmp_path / place
    blocked.parent.mkdir(parents=True, exist_ok=True)
    blocked.write_text("in the way", encoding="utf-8")
    with pytest.raises(WorkspaceError) as caught:
        Settings(home=tmp_path / "workspace").prepare()
    assert str(tmp_path / "workspace") in str(caught.value)
    assert "MLOPS_COURSE_HOME" in caught.value.remedy
    assert leftovers(tmp_path) == []


@contextlib.contextmanager
def nobody_in_particular() -> Iterator[None]:
    """Without an administrator's right to write everywhere, where the tests have it."""
    if os.geteuid() != 0:
        yield
        return
    os.setresuid(65534, 65534, 0)  # the last is what may be taken back
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)


@posix_only
def test_a_workspace_without_permission_is_refused() -> None:
    with tempfile.TemporaryDirectory() as folder:  # not pytest's, into which only the administrator may look
        Path(folder).chmod(0o755)
        settings = Settings(home=Path(folder) / "workspace").prepare()
        settings.home.chmod(0o555)
        with nobody_in_particular(), pytest.raises(WorkspaceError, match="you may not write there"):
            settings.prepare()
        settings.home.chmod(0o755)


@pytest.mark.parametrize(
    ("number", "expected"),
    [(errno.ENOSPC, "the disk is full"), (errno.EROFS, "read-only"), (errno.EACCES, "may not write")],
)
def test_what_the_system_says_becomes_a_sentence(number: int, expected: str) -> None:
    error = workspace_error(OSError(number, os.strerror(number)), Path("/course/data"))
    assert expected in str(error)
    assert str(Path("/course/data")) in error.problem


# ---------------------------------------------------------------- whole files


def test_text_and_bytes_are_written_as_given(tmp_path: Path) -> None:
    path = tmp_path / "made" / "on" / "demand" / "file"
    assert write_atomic(path, "für\n") == path
    assert path.read_bytes() == "für\n".encode()
    write_atomic(path, b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"
    assert list(path.parent.iterdir()) == [path]


@posix_only
def test_the_usual_permissions_apply(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("x", encoding="utf-8")
    write_atomic(tmp_path / "atomic", "x")
    assert (tmp_path / "atomic").stat().st_mode == (tmp_path / "plain").stat().st_mode


WRITE_TOO_MUCH = """
import resource, signal, sys
from mlops_course.environment import WorkspaceError, write_atomic
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    write_atomic(sys.argv[1], "x" * 100_000)
except WorkspaceError as error:
    sys.exit(f"refused: {error}")
"""


@posix_only
def test_a_write_that_fails_in_the_middle_leaves_the_old_file(tmp_path: Path) -> None:
    path = write_atomic(tmp_path / "file", "old")
    done = subprocess.run([sys.executable, "-c", WRITE_TOO_MUCH, path], capture_output=True, text=True)
    assert done.stderr.startswith(f"refused: can't write {path}")
    assert path.read_text(encoding="utf-8") == "old"
    assert leftovers(tmp_path) == []


WRITE_FOR_EVER = """
import itertools, sys
from mlops_course.environment import write_atomic
for number in itertools.count():
    write_atomic(sys.argv[1], str(number % 10) * 3_000_000)
"""


@posix_only
def test_a_killed_writer_leaves_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    process = subprocess.Popen([sys.executable, "-c", WRITE_FOR_EVER, path])
    try:
        deadline = time.monotonic() + 20
        while not path.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    content = path.read_text(encoding="utf-8")
    assert len(content) == 3_000_000
    assert len(set(content)) == 1


def test_readers_never_see_a_part_while_several_write(tmp_path: Path) -> None:
    path = write_atomic(tmp_path / "file", "0" * 100_000)
    stop, seen = threading.Event(), set()

    def keep_writing(letter: str) -> None:
        while not stop.is_set():
            write_atomic(path, letter * 100_000)

    writers = [threading.Thread(target=keep_writing, args=[letter]) for letter in "ab"]
    for writer in writers:
        writer.start()
    for _ in range(200):
        content = path.read_text(encoding="utf-8")
        seen.add((len(content), len(set(content))))
    stop.set()
    for writer in writers:
        writer.join()
    assert seen == {(100_000, 1)}
    assert leftovers(tmp_path) == []


# ---------------------------------------------------------------- seeds


def test_the_same_seed_gives_the_same_numbers_from_each_source() -> None:
    def draw(seed: int) -> tuple[float, float, float]:
        generator = seed_everything(seed)
        return random.random(), float(numpy.random.rand()), float(generator.random())

    assert draw(5) == draw(5)
    assert all(one != other for one, other in zip(draw(5), draw(6), strict=True))


# ---------------------------------------------------------------- fingerprint


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A git repository with one commit."""
    folder = make_project(tmp_path / "clone")
    for command in (
        ["init", "--quiet"],
        ["add", "."],
        ["-c", "user.name=x", "-c", "user.email=x@y.z", "commit", "--quiet", "--no-verify", "-m", "one"],
    ):
        subprocess.run(["git", "-C", folder, *command], check=True)
    return folder


def test_the_fingerprint_names_the_commit_and_whether_it_was_changed(clone: Path) -> None:
    head = subprocess.run(["git", "-C", clone, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    assert fingerprint(clone)["commit"] == head.stdout.strip()
    assert fingerprint(clone)["dirty"] is False
    (clone / "new.py").write_text("x = 1\n", encoding="utf-8")
    assert fingerprint(clone)["dirty"] is True


ASK = "import json; from mlops_course.environment import fingerprint; print(json.dumps(fingerprint()))"


def asked_from(folder: Path, **variables: str) -> dict[str, Any]:
    """The fingerprint that a program gives which stands somewhere else."""
    command, environment = [sys.executable, "-c", ASK], {**os.environ, **variables}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_the_fingerprint_is_that_of_the_running_code_wherever_it_runs(clone: Path, tmp_path: Path, root: Path) -> None:
    (tmp_path / "far").mkdir()
    mine = fingerprint(root)
    assert mine["lock"] is not None
    for place in (tmp_path / "far", clone):
        found = asked_from(place, MLOPS_COURSE_HOME=str(tmp_path / "elsewhere"))
        assert (found["commit"], found["lock"]) == (mine["commit"], mine["lock"])
        assert found["commit"] != fingerprint(clone)["commit"]


@pytest.mark.parametrize(
    ("written", "commit"),
    [('{"commit": "abc", "dirty": false, "lock": "0"}', "abc"), ("[]", None), ("{", None), ("", None)],
)
def test_a_wheel_knows_what_it_was_built_from(
    clone: Path, tmp_path: Path, root: Path, written: str, commit: str | None
) -> None:
    site = clone / "site-packages"  # as in a clone's .venv: not the clone's code for that
    shutil.copytree(root / "mlops_course", site / "mlops_course", ignore=shutil.ignore_patterns("__pycache__"))
    if written:
        (site / "mlops_course" / "_build.json").write_text(written, encoding="utf-8")
    found = asked_from(tmp_path, PYTHONPATH=str(site))
    assert (found["commit"], found["lock"]) == (commit, "0" if commit else None)
    assert found["machine"]["cores"] >= 1


def test_the_fingerprint_changes_with_the_lock(clone: Path) -> None:
    assert fingerprint(clone)["lock"] is None
    (clone / "requirements.lock").write_text("a==1\n", encoding="utf-8")
    first = fingerprint(clone)["lock"]
    (clone / "requirements.lock").write_text("a==2\n", encoding="utf-8")
    assert len({first, fingerprint(clone)["lock"], None}) == 3


def test_the_fingerprint_knows_versions_and_machine(clone: Path) -> None:
    found = fingerprint(clone)
    assert found["packages"]["pandas"] == metadata.version("pandas")
    assert found["packages"]["mlops-course"] == metadata.version("mlops_course")
    assert found["machine"]["cores"] >= 1


def test_the_fingerprint_does_without_git(clone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fingerprint(tmp_path)["commit"] is None
    monkeypatch.setenv("PATH", str(tmp_path))
    found = fingerprint(clone)
    assert (found["commit"], found["dirty"]) == (None, None)
    assert found["packages"]["pandas"] == metadata.version("pandas")


def test_a_repository_without_a_commit_has_none(tmp_path: Path) -> None:
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)
    assert fingerprint(tmp_path)["commit"] is None


def test_a_program_that_hangs_or_fails_is_no_answer() -> None:
    begin = time.monotonic()
    assert run_quietly([sys.executable, "-c", "import time; time.sleep(60)"], seconds=0.5) is None
    assert time.monotonic() - begin < 10
    assert run_quietly([sys.executable, "-c", "raise SystemExit(3)"]) is None
    assert run_quietly(["no-such-program"]) is None
    assert run_quietly([sys.executable, "-c", "print('yes')"]).split() == ["yes"]


# ---------------------------------------------------------------- doctor


def named(tools: list[Tool], name: str) -> Tool:
    return next(tool for tool in tools if tool.name == name)


def test_the_doctor_passes_this_machine_and_says_a_version(settings: Settings) -> None:
    tools = check_machine(settings)
    assert [tool.name for tool in tools if not tool.ok] == []
    assert named(tools, "git").version.count(".") >= 1
    assert named(tools, "python").version == ".".join(map(str, sys.version_info[:3]))
    assert all(tool.needed_for and tool.how_to_get for tool in tools)


def test_without_git_the_doctor_says_so(settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    tools = check_machine(settings)
    git, quarto = named(tools, "git"), named(tools, "quarto")
    assert (git.found, git.ok) == (False, False)
    assert "git-scm.com" in git.how_to_get
    assert (quarto.found, quarto.ok) == (False, True)


def test_a_home_inside_a_file_fails_the_disk_check(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x", encoding="utf-8")
    disk = named(check_machine(Settings(home=tmp_path / "file" / "workspace")), "disk space")
    assert not disk.ok
    assert str(tmp_path / "file") in disk.how_to_get


def test_a_lock_is_read_whatever_its_form(tmp_path: Path) -> None:
    lock = tmp_path / "requirements.lock"
    lock.write_text(
        "# made by make lock\nFoo_Bar==1.0 ; python_full_version < '3.12' \\\n    --hash=sha256:0\n"
        "foo-bar==2.0 ; python_full_version >= '3.12'\nother.one==3\n",
        encoding="utf-8",
    )
    assert locked_versions(lock) == {"foo-bar": {"1.0", "2.0"}, "other-one": {"3"}}


def test_the_doctor_compares_packages_with_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clone = make_project(tmp_path / "clone")
    lock = clone / "requirements.lock"
    lock.write_text(f"pandas=={metadata.version('pandas')}\nnot-installed==1\n", encoding="utf-8")
    assert lock_differences(lock) == []
    lock.write_text("pandas==0.1\n", encoding="utf-8")
    assert lock_differences(lock) == [f"pandas is {metadata.version('pandas')}, the lock says 0.1"]
    monkeypatch.chdir(clone)
    locked = named(check_machine(Settings(home=tmp_path / "w")), "locked packages")
    assert not locked.found
    assert "the lock says 0.1" in locked.how_to_get


# ---------------------------------------------------------------- notebooks


def test_the_notebooks_are_found(root: Path) -> None:
    assert environment.notebooks_folder() == root / "nbs"
    assert (environment.notebooks_folder() / "02_environment.ipynb").is_file()
