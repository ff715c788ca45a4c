"""The doctor's catalogue: each trouble is brought about where that can be, or known by its tool's own words."""

import errno
import json
import os
import re
import shutil
import socket
import sqlite3
import subprocess
import sys
import sysconfig
import time
import webbrowser
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import pytest

from mlops_course.environment import Settings
from mlops_course.troubles import TROUBLES, explain_lines, look_for_troubles, network, system
from mlops_course.troubles.explaining import MOST_READ, part_to_show, read_pasted
from mlops_course.troubles.trouble import Trouble, letters_in_common, look_for_all

NAMED = {trouble.name: trouble for trouble in TROUBLES}
# What the tools print, one file for each trouble that has a line. Most were made by running the tool; the lines of
# Windows, macOS, SELinux, AppArmor, S3 and a few other versions are quoted from their makers.
SAMPLES = Path(__file__).with_name("troubles")
ALL_SAMPLES = [path.read_text(encoding="utf-8") for path in sorted(SAMPLES.iterdir())]
BREAKING = {trouble.name for trouble in TROUBLES if trouble.breaks}
PROGRAM = [sys.executable, "-c", "from mlops_course.cli import main; main()"]
COMMAND = [*PROGRAM, "doctor"]
NO_ONE = 54_321  # the number of a user that nobody has
posix_only = pytest.mark.skipif(os.name == "nt", reason="uses POSIX limits and signals")


def sample(trouble: Trouble) -> Path:
    return SAMPLES / (re.sub(r"\W+", "-", trouble.name.lower()).strip("-") + ".txt")


def seen(name: str, settings: Settings | None = None) -> str:
    """What the look sees, or the error that it fails with."""
    look = NAMED[name].looks
    assert look is not None
    return look(settings or Settings())


def causes(text: str) -> list[str]:
    """What an error is explained by."""
    return [found.trouble.name for found in explain_lines(text.splitlines(), TROUBLES)]


def said_by(*command: object, folder: Path | None = None, **variables: str) -> str:
    """What a program that fails says."""
    environment = {**os.environ, "LC_ALL": "C.UTF-8", **variables}
    done = subprocess.run(
        [*map(str, command)], capture_output=True, text=True, cwd=folder, env=environment, encoding="utf-8"
    )
    assert done.returncode != 0, done.stdout
    return done.stdout + done.stderr


def said_by_python(code: str, **variables: str) -> str:
    return said_by(sys.executable, "-c", code, **variables)


def doctor(*arguments: object, pasted: bytes = b"", **variables: str) -> subprocess.CompletedProcess[bytes]:
    command = [*COMMAND, *map(str, arguments)]
    return subprocess.run(command, input=pasted, capture_output=True, env={**os.environ, "COLUMNS": "160", **variables})


@pytest.fixture(autouse=True)
def no_proxy_around_the_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository that looks like the course's, and is the current folder."""
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_AUTHOR_NAME", "GIT_AUTHOR_EMAIL"):
        monkeypatch.delenv(name, raising=False)
    for name in ("GIT_CONFIG_GLOBAL", "GIT_CONFIG_SYSTEM"):
        monkeypatch.setenv(name, os.devnull)
    folder = tmp_path / "clone"
    folder.mkdir()
    (folder / "settings.ini").write_text("[DEFAULT]\nlib_name = mlops_course\n", encoding="utf-8")
    subprocess.run(["git", "init", "-q", folder], check=True)
    monkeypatch.chdir(folder)
    return folder


def test_a_misspelt_package_is_not_taken_for_a_missing_network() -> None:
    unknown = ["(from versions: none)", "ERROR: No matching distribution found for pandsa"]
    assert causes("\n".join(unknown)) == ["a package isn't known by that name"]
    away = "WARNING: Retrying: Failed to establish a new connection: [Errno -2] Name or service not known"
    assert causes("\n".join([away, *unknown]))[0] == "there is no network"


# ---------------------------------------------------------------- the catalogue


def test_there_are_many_and_each_can_be_found_and_helped() -> None:
    assert len(TROUBLES) >= 30
    assert len(NAMED) == len(TROUBLES), "two have the same name"
    assert [each.name for each in TROUBLES if not each.looks and not each.looks_like] == []
    assert [each.name for each in TROUBLES if not each.remedy.strip() or "\n" in each.remedy] == []


def test_a_pattern_is_long_enough_to_mean_something() -> None:
    patterns = [pattern for each in TROUBLES for pattern in each.looks_like]
    assert [pattern for pattern in patterns if len(pattern.replace("…", "").strip()) < 6] == []
    assert [pattern for pattern in patterns if not all(pattern.split("…"))] == []


def test_each_pattern_has_a_sample_and_each_sample_a_trouble() -> None:
    with_a_line = [each for each in TROUBLES if each.looks_like]
    assert {path.name for path in SAMPLES.iterdir()} == {sample(each).name for each in with_a_line}
    missing = []
    for each in with_a_line:
        lines = sample(each).read_text(encoding="utf-8").lower().splitlines()
        missing += [line for line in each.looks_like if not any(letters_in_common(said, line) for said in lines)]
    assert missing == []


def test_a_sample_of_one_is_explained_by_that_one_alone() -> None:
    """Whole and line by line, and in front of what programs say when nothing is wrong."""
    wrong = {}
    for each in TROUBLES:
        if each.looks_like:
            text = sample(each).read_text(encoding="utf-8")
            found = {name for line in text.splitlines() for name in causes(line)} | set(causes(text))
            if found != {each.name}:
                wrong[each.name] = found
    assert wrong == {}


def test_what_is_well_is_not_explained(root: Path) -> None:
    assert causes((root / "LICENSE").read_text(encoding="utf-8")) == []
    assert causes("[1/8] ingest ...\n[1/8] ingest: done in 1.2 s: 27,004 rows\nmodel 3 is champion\n") == []


def test_who_may_not_log_in_or_run_a_file_is_not_told_to_give_files_away() -> None:
    assert causes("git@github.com: Permission denied (publickey).") == []
    assert causes("bash: ./run.sh: Permission denied") == []


def test_every_look_comes_to_its_end_on_this_machine(settings: Settings) -> None:
    for each in TROUBLES:
        assert each.looks is None or isinstance(each.looks(settings), str)


def test_a_machine_that_works_has_none_that_breaks(tmp_path: Path) -> None:
    clean = {name: os.environ[name] for name in ("PATH", "SYSTEMROOT") if name in os.environ}
    clean |= {"HOME": str(tmp_path), "MLOPS_COURSE_HOME": str(tmp_path / "w"), "PYTHONUTF8": "1"}
    done = subprocess.run([*COMMAND, "--json"], capture_output=True, env=clean, cwd=tmp_path)
    entries = json.loads(done.stdout)
    assert [each["name"] for each in entries if not each["ok"]] == []
    assert done.returncode == 0
    troubles = {each["name"]: each for each in entries if each["kind"] == "trouble"}
    assert set(troubles) == {each.name for each in TROUBLES if each.looks}
    assert {name for name, each in troubles.items() if each["required"]} == BREAKING
    assert not (tmp_path / "w").exists(), "looking creates nothing"


def test_looking_imports_nothing_heavy(settings: Settings) -> None:
    code = (
        "import sys; from mlops_course.environment import load_settings; "
        "from mlops_course.troubles import look_for_troubles; look_for_troubles(load_settings()); "
        "print(*{'pandas', 'numpy', 'mlflow', 'sklearn', 'papermill', 'typer', 'jupyter_client'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_a_look_that_fails_or_sleeps_stops_nobody(settings: Settings) -> None:
    def fails(settings: Settings) -> str:
        raise OSError("the machine is ill")

    def sleeps(settings: Settings) -> str:
        time.sleep(5)
        return "too late"

    ill, slow = Trouble("ill", "heal", looks=fails, breaks=True), Trouble("slow", "wait", looks=sleeps, breaks=True)
    start = time.perf_counter()
    found = look_for_all((ill, slow), settings, seconds=0.3)
    assert [(each.what, each.answered, each.ok) for each in found] == [("", True, True), ("", False, True)]
    assert time.perf_counter() - start < 4


# ---------------------------------------------------------------- Python


@pytest.mark.parametrize(
    ("variable", "name"),
    [
        ("PYTHONPATH", "PYTHONPATH is set"),
        ("PYTHONHOME", "PYTHONHOME is set"),
        ("PYTHONOPTIMIZE", "asserts are switched off"),
        ("PYTHONDONTWRITEBYTECODE", "nothing is kept compiled"),
        ("PYTHONDEVMODE", "Python is set to debug"),
        ("OMP_NUM_THREADS", "threads are set"),
        ("REQUESTS_CA_BUNDLE", "a certificate isn't trusted"),
        ("MLFLOW_TRACKING_URI", "MLflow is sent elsewhere"),
    ],
)
def test_a_variable_is_seen_while_it_is_set(variable: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "wrong")
    assert f"{variable}=wrong" in seen(name)
    monkeypatch.delenv(variable)
    assert seen(name) == ""


def test_another_python_in_front_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "another Python is first on the PATH"
    monkeypatch.delenv("VIRTUAL_ENV", raising=False)
    assert seen(name) == "", "nobody has to activate anything"
    other = tmp_path / ("python.exe" if os.name == "nt" else "python")
    other.touch(0o755)
    monkeypatch.setenv("VIRTUAL_ENV", sys.prefix)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert str(other) in seen(name)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert seen(name) == ""
    monkeypatch.setenv("VIRTUAL_ENV", str(tmp_path))
    assert f"{tmp_path} is activated" in seen(name)
    assert causes(said_by(sys.executable, "-I", "-S", "-c", "import mlops_course")) == [name]


def test_a_python_that_does_not_find_its_own_library() -> None:
    assert causes(said_by_python("1", PYTHONHOME="/nowhere")) == ["PYTHONHOME is set"]


def test_a_file_that_hides_a_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_analysis.py").touch()
    assert seen("a file hides a module") == ""
    (tmp_path / "json.py").write_text("import json\njson.dumps(1)\n", encoding="utf-8")
    assert "json.py" in seen("a file hides a module")
    (tmp_path / "sklearn.py").touch()
    assert "json.py, sklearn.py" in seen("a file hides a module"), "of the package scikit-learn"
    assert causes(said_by(sys.executable, "json.py", folder=tmp_path)) == ["a file hides a module"]


def test_an_old_copy_of_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "the package is installed twice"
    assert seen(name) == ""
    (tmp_path / "mlops_course").mkdir()
    for file in ("__init__.py", "environment.py"):
        (tmp_path / "mlops_course" / file).touch()
    use = "from mlops_course.environment import load_settings"
    assert causes(said_by(sys.executable, "-c", use, folder=tmp_path)) == [name]
    monkeypatch.syspath_prepend(str(tmp_path))
    assert str(tmp_path / "mlops_course") in seen(name)


def test_a_python_that_belongs_to_the_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "pip outside of an environment"
    (tmp_path / "EXTERNALLY-MANAGED").touch()
    monkeypatch.setattr(sysconfig, "get_path", lambda which: str(tmp_path))
    assert seen(name) == "", "inside of an environment pip may install"
    monkeypatch.setattr(sys, "prefix", sys.base_prefix)
    assert "belongs to the system" in seen(name)


def test_packages_that_are_not_those_of_the_lock(clone: Path) -> None:
    (clone / "requirements.lock").write_text("pandas==0.1\n", encoding="utf-8")
    assert "the lock says 0.1" in seen("versions differ from the lock")


@posix_only
def test_an_environment_that_was_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "the environment was copied or moved"
    assert seen(name) == ""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "old" / ".venv"], check=True)
    program = tmp_path / "old" / ".venv" / "bin" / "mlops-course"
    program.write_text(f"#!{program.parent}/python\n", encoding="utf-8")
    program.chmod(0o755)
    (tmp_path / "old").rename(tmp_path / "new")
    moved = tmp_path / "new" / ".venv"
    assert name in causes(said_by("bash", "-c", f"{moved}/bin/mlops-course"))
    monkeypatch.setattr(sys, "prefix", str(moved))
    assert str(tmp_path / "old") in seen(name)


def test_a_kernel_of_another_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "the kernel is another environment's"
    assert seen(name) == ""
    spec = tmp_path / "kernels" / "python3" / "kernel.json"
    spec.parent.mkdir(parents=True)
    spec.write_text(json.dumps({"argv": [str(tmp_path / "python")]}), encoding="utf-8")
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    assert str(tmp_path / "python") in seen(name)
    said = said_by_python("from jupyter_client.kernelspec import get_kernel_spec; get_kernel_spec('of-old')")
    assert causes(said) == [name]


def test_text_that_is_not_utf_8() -> None:
    code = "from test_troubles import seen; print(seen(\"text isn't UTF-8\")); print('─')"
    said = said_by_python(code, PYTHONIOENCODING="latin-1", PYTHONPATH=str(Path(__file__).parent))
    assert "the terminal: iso8859-1" in said
    assert causes(said) == ["text isn't UTF-8"]


# ---------------------------------------------------------------- disk, memory, clock

IN_A_MOUNT = """
import json, os, sys
from pathlib import Path
from mlops_course.environment import Settings
from mlops_course.troubles import TROUBLES
found = {each.name: each.seen(Settings(home=Path(sys.argv[1]), trust=Path(sys.argv[1]))) for each in TROUBLES}
print(json.dumps(found))
"""


def in_a_mount(prepare: str, folder: Path, *, network: bool = False) -> dict[str, str]:
    """What is seen by a process that has mounts of its own, or a network of its own, too."""
    may_mount = os.name == "posix" and os.geteuid() == 0 and shutil.which("unshare")
    if not may_mount or subprocess.run(["unshare", "-mn", "true"], capture_output=True).returncode:
        pytest.skip("permissions of POSIX")
    script = f'set -e\n{prepare}\nexec "$0" -c "$1" "$2"'
    command = ["unshare", "-mn" if network else "-m", "sh", "-c", script, sys.executable, IN_A_MOUNT, folder]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=folder.parent)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def test_disks_that_are_full_or_small_or_closed(tmp_path: Path) -> None:
    place = tmp_path / "small"
    place.mkdir()
    found = in_a_mount(
        f"""
        mount -t tmpfs -o size=64k tmpfs {place}
        mount -t tmpfs -o size=64k tmpfs /dev/shm
        mkdir {place}/tmp
        mount -t tmpfs -o size=1m,noexec tmpfs {place}/tmp
        mkdir {place}/home
        mount -t tmpfs -o ro tmpfs {place}/home
        export TMPDIR={place}/tmp HOME={place}/home
        """,
        place,
    )
    assert f"0 MB free in {place}" in found["no space left"]
    assert f"{place}/tmp" in found["no room for temporary files"]
    assert "/dev/shm has 0 MB" in found["too little shared memory"]
    assert "noexec" in found["temporary files can't be executed"]
    assert f"{place}/home can't be written to" in found["the home folder is read-only"]


def test_a_disk_without_entries_for_new_files_and_nothing_temporary(tmp_path: Path) -> None:
    place = tmp_path / "few"
    place.mkdir()
    found = in_a_mount(
        f"""
        mount -t tmpfs -o size=1g,nr_inodes=9 tmpfs {place}
        mount -o remount,ro {place}
        for closed in /tmp /var/tmp /usr/tmp; do
            test ! -d $closed || {{ mount --rbind $closed $closed; mount -o remount,bind,ro $closed; }}
        done
        cd {place}
        """,
        place,
    )
    assert "no entries for new files" in found["no space left"]
    assert "may be written to" in found["no room for temporary files"]


def test_files_of_another_user(settings: Settings) -> None:
    name = "files belong to another user"
    assert seen(name, settings) == ""
    if os.name == "nt" or os.geteuid() != 0:
        pytest.skip("permissions of POSIX")
    (settings.home / "mlflow.db").touch()
    os.chown(settings.home / "mlflow.db", NO_ONE, NO_ONE)
    assert f"mlflow.db belongs to user {NO_ONE}" in seen(name, settings)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="looks into /proc")
def test_limits_that_are_too_low() -> None:
    code = """
        import os, resource
        from mlops_course.troubles import TROUBLES
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        resource.setrlimit(resource.RLIMIT_NPROC, (99, 99))
        resource.setrlimit(resource.RLIMIT_NOFILE, (30, 30))
        for each in TROUBLES:
            if each.name in ("too few open files", "too few processes", "one processor only"):
                print(each.name, each.looks(None), sep=": ")
        files = [open(os.devnull) for _ in range(30)]
    """
    said = said_by_python(re.sub(r"^ {8}", "", code, flags=re.MULTILINE))
    assert said.splitlines()[:3] == [
        "too few open files: 30 open files",
        "too few processes: 99 processes",
        "one processor only: 1 processor",
    ]
    assert causes(said) == ["too few open files"]


@posix_only
def test_memory_that_is_too_little(monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (2**29, 2**29)); "
        "[bytes(2**24) for _ in range(99)] and bytes(2**31)"
    )
    assert causes(said_by_python(code)) == ["too little memory"]
    monkeypatch.setattr(system, "memory", lambda: 5e8)
    assert seen("too little memory") == "0.5 GB of memory"


@pytest.mark.parametrize("folder", ["Dropbox", "OneDrive - University", "iCloud Drive", "Mobile Documents"])
def test_a_folder_that_a_service_copies(folder: str, tmp_path: Path) -> None:
    name = "the workspace is in a synchronised folder"
    assert folder in seen(name, Settings(home=tmp_path / folder / "workspace"))
    assert seen(name, Settings(home=tmp_path / f"not {folder}" / "workspace")) == ""


@pytest.mark.parametrize("kind", ["nfs4", "cifs", "fuse.sshfs", "9p"])
def test_a_drive_of_another_machine(kind: str, tmp_path: Path) -> None:
    mounts, far = tmp_path / "mounts", tmp_path / "far away"
    escaped = str(far).replace(" ", "\\040")
    mounts.write_text(f"tmpfs / tmpfs rw 0 0\nserver:/a {escaped} {kind} rw 0 0\n", encoding="utf-8")
    assert kind in system._far_away(Settings(home=far / "workspace"), mounts)
    assert system._far_away(Settings(home=tmp_path / "near"), mounts) == ""


@posix_only
def test_a_place_without_locks(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    name = "a file system without locks"
    assert seen(name, settings) == ""

    def refuse(file: int, what: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert "locks" in seen(name, settings)


def test_a_store_that_somebody_holds(settings: Settings) -> None:
    name = "the store is held by another program"
    assert seen(name, settings) == ""
    with closing(sqlite3.connect(settings.home / "mlflow.db", isolation_level=None)) as other:
        other.execute("CREATE TABLE runs (id)")
        assert seen(name, settings) == ""
        other.execute("BEGIN EXCLUSIVE")
        assert "locked" in seen(name, settings)
        mine = sqlite3.connect(settings.home / "mlflow.db", timeout=0)
        with closing(mine), pytest.raises(sqlite3.OperationalError) as refused:
            mine.execute("INSERT INTO runs VALUES (1)")
    assert causes(f"sqlite3.OperationalError: {refused.value}") == [name]


def test_a_path_that_is_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "a path is too long"
    with pytest.raises(OSError, match="too long") as refused:
        (tmp_path / ("a" * 300)).touch()
    assert causes(str(refused.value)) == [name]
    deep = Settings(home=tmp_path / ("a" * 120))
    assert os.name == "nt" or seen(name, deep) == ""
    monkeypatch.setattr(system, "os", SimpleNamespace(name="nt"))
    assert "characters" in seen(name, deep)


def test_a_clock_that_is_behind(clone: Path) -> None:
    assert seen("the clock is wrong") == ""
    tomorrow = time.time() + 86_400
    os.utime(clone / "settings.ini", (tomorrow, tomorrow))
    assert "24 hours behind" in seen("the clock is wrong")


@pytest.mark.skipif(not shutil.which("make"), reason="the notebooks speak to a shell")
def test_make_says_that_the_clock_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "Makefile").write_text("made: source\n\ttouch made; false\n", encoding="utf-8")
    (tmp_path / "source").touch()
    os.utime(tmp_path / "source", (time.time() + 86_400,) * 2)
    assert causes(said_by("make", "made", folder=tmp_path)) == ["the clock is wrong"]


# ---------------------------------------------------------------- ports, names, neighbours


def test_a_port_that_somebody_has(settings: Settings) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert str(port) in network._taken(settings, (port,))
        said = said_by(*PROGRAM, "ui", "--port", port) + said_by_python(
            f"import socket; socket.create_server(('127.0.0.1', {port}))"
        )
    assert causes(said) == ["a port is in use"]
    assert network._taken(settings, (port,)) == ""


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a proxy that nobody answers at, for everything."""
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{nobody.getsockname()[1]}"
        for name in ("http_proxy", "https_proxy"):
            monkeypatch.setenv(name, f"http://ada:secret{'@'}{address}")
        yield address


def test_a_proxy_before_this_machine(proxy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "a proxy stands before localhost"
    assert seen(name) == f"127.0.0.1 is asked through http://{proxy}", "and the password isn't shown"
    assert causes(said_by_python("import requests; requests.get('http://127.0.0.1:1/')")) == [name]
    monkeypatch.setenv("no_proxy", "localhost,127.0.0.1")
    assert seen(name) == ""


def test_a_localhost_that_is_elsewhere(tmp_path: Path) -> None:
    hosts, home = tmp_path / "hosts", tmp_path / "home"
    home.mkdir()
    for line, told in (("10.8.0.5 localhost", "localhost is 10.8.0.5"), ("127.0.0.1 localhost", "")):
        hosts.write_text(line + "\n", encoding="utf-8")
        assert in_a_mount(f"mount --bind {hosts} /etc/hosts", home)["localhost is another machine"] == told


def test_a_machine_without_127_0_0_1(tmp_path: Path) -> None:
    assert seen("only one of IPv4 and IPv6 works") == ""
    found = in_a_mount("true", tmp_path, network=True)
    assert "unreachable" in found["only one of IPv4 and IPv6 works"]


@posix_only
def test_a_docker_that_is_closed_or_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    door = tmp_path / "docker.sock"
    for name in ("DOCKER_HOST", "DOCKER_CONTEXT"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "docker").touch(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert network._docker_closed(Settings(), door) == ""
    assert not Path("/proc").is_dir() or str(door) in network._docker_stopped(Settings(), door)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(door))
        assert network._docker_closed(Settings(), door) == network._docker_stopped(Settings(), door) == ""
        monkeypatch.setattr(os, "access", lambda path, mode: False)
        assert str(door) in network._docker_closed(Settings(), door)


def test_a_machine_without_a_browser(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(using: str | None = None) -> None:
        raise webbrowser.Error("could not locate runnable browser")

    monkeypatch.setattr(webbrowser, "get", nobody)
    assert causes(seen("there is no browser")) == ["there is no browser"]


@pytest.mark.parametrize(
    ("file", "text", "is_open"),
    [
        ("jupyter_server_config.py", "c.ServerApp.ip = '0.0.0.0'\n", True),
        ("jupyter_notebook_config.json", '{"NotebookApp": {"ip": "*"}}', True),
        ("jupyter_lab_config.py", "c.ServerApp.ip = ''\n", True),
        ("jupyter_server_config.py", "# c.ServerApp.ip = '0.0.0.0'\nc.ServerApp.ip = '127.0.0.1'\n", False),
        ("jupyter_server_config.py", "c.ServerApp.zip = '*'\n", False),
    ],
)
def test_a_jupyter_that_is_open(
    file: str, text: str, is_open: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / file).write_text(text, encoding="utf-8")
    monkeypatch.setenv("JUPYTER_CONFIG_PATH", str(tmp_path))
    assert (str(tmp_path / file) in seen("Jupyter is open to everybody")) == is_open


def test_an_answer_of_nobody_in_a_certificate_and_in_a_name(tmp_path: Path) -> None:
    code = f"import requests; requests.get('https://127.0.0.1:1/', verify={str(tmp_path / 'none.pem')!r})"
    assert causes(said_by_python(code)) == ["a certificate isn't trusted"]


# ---------------------------------------------------------------- git


def test_a_git_without_a_name(clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "git has no name for you"
    assert seen(name) == "user.name and user.email isn't set"
    (clone / "a").touch()
    subprocess.run(["git", "add", "a"], check=True)
    assert causes(said_by("git", "-c", "user.useConfigOnly=true", "commit", "-m", "x")) == [name]
    subprocess.run(["git", "config", "user.name", "Ada"], check=True)
    assert seen(name) == "user.email isn't set"
    monkeypatch.setenv("GIT_AUTHOR_EMAIL", "ada@example.com")
    assert seen(name) == ""


def test_a_clone_of_another_user(clone: Path) -> None:
    name = "git doesn't trust the folder"
    assert seen(name) == ""
    if os.name == "nt" or os.geteuid() != 0:
        pytest.skip("permissions of POSIX")
    for path in (clone, clone / ".git"):
        os.chown(path, NO_ONE, NO_ONE)
    assert f"belongs to user {NO_ONE}" in seen(name)
    assert causes(said_by("git", "status")) == [name]


def test_a_lock_that_git_has_left(clone: Path) -> None:
    name = "a git that ended has left its lock"
    lock = clone / ".git" / "index.lock"
    lock.touch()
    assert seen(name) == "", "somebody may be at work"
    os.utime(lock, (time.time() - 3600,) * 2)
    assert "60 minutes old" in seen(name)
    assert causes(said_by("git", "add", "settings.ini")) == [name]


def test_a_filter_before_the_notebooks(clone: Path) -> None:
    name = "a git filter changes notebooks"
    assert seen(name) == ""
    (clone / ".gitattributes").write_text("*.ipynb filter=nbstripout\n", encoding="utf-8")
    (clone / "a.ipynb").touch()
    assert "the filter nbstripout" in seen(name)
    options = ("-c", "filter.nbstripout.clean=no-such-nbstripout", "-c", "filter.nbstripout.required=true")
    assert causes(said_by("git", *options, "add", "a.ipynb")) == [name]


def test_files_with_line_ends_of_windows(clone: Path) -> None:
    name = "line ends are those of Windows"
    assert seen(name) == ""
    (clone / "Makefile").write_bytes(b"all:\r\n\ttrue\r\n")
    assert seen(name) == "CRLF in Makefile"
    (clone / "run").write_bytes(b"#!/bin/sh\r\nif true; then\r\necho\r\nfi\r\n")
    assert os.name == "nt" or causes(said_by("bash", "run")) == [name]


def test_a_notebook_that_was_merged_as_text(clone: Path) -> None:
    (clone / "a.ipynb").write_text('{\n<<<<<<< HEAD\n "cells": []\n', encoding="utf-8")
    said = said_by_python("import nbformat; nbformat.read('a.ipynb', 4)")
    assert causes(said) == ["a notebook has marks of a merge"]


# ---------------------------------------------------------------- the command


def test_an_error_is_explained_from_what_is_pasted_and_from_a_file(tmp_path: Path) -> None:
    said = b"Traceback\nOSError: [Errno 98] Address already in use\n"
    done = doctor("--explain", pasted=said)
    text = done.stdout.decode()
    assert done.returncode == 0, done.stderr
    assert text.startswith("a port is in use\n  line 2: OSError: [Errno 98] Address already in use\n")
    assert NAMED["a port is in use"].remedy in text
    (tmp_path / "error.txt").write_bytes(said)
    assert doctor("--explain", tmp_path / "error.txt").stdout == done.stdout


def test_an_explanation_says_whether_this_machine_has_it() -> None:
    said = b"The following compiled module files exist, but seem incompatible\n"
    has = json.loads(doctor("--explain", "--json", pasted=said, PYTHONPATH="old").stdout)
    assert has["explained"][0]["here"] == "PYTHONPATH=old"
    for value, told in (("old", b"and this machine has it: PYTHONPATH=old"), ("", b"not seen on this machine now")):
        assert told in doctor("--explain", pasted=said, PYTHONPATH=value).stdout


def test_what_nobody_knows_is_said_with_where_to_ask_next() -> None:
    done = doctor("--explain", pasted=b"the coffee is cold\n")
    assert done.returncode == 1
    assert "Nothing in it looks like a trouble" in done.stdout.decode()
    assert "mlops-course doctor --json" in done.stdout.decode()
    as_json = doctor("--explain", "--json", pasted=b"the coffee is cold\n")
    assert (as_json.returncode, json.loads(as_json.stdout)) == (1, {"explained": [], "cut": False})


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--explain",), "there is nothing to explain"),
        (("--explain", "no-such-file"), "can't read no-such-file"),
        (("error.txt",), "Write doctor --explain FILE"),
    ],
)
def test_what_cannot_be_read_gets_one_line(arguments: tuple[str, ...], told: str) -> None:
    done = doctor(*arguments)
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert told in done.stderr.decode()


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="looks into /proc")
def test_an_endless_text_is_read_as_far_as_a_mebibyte() -> None:
    with Path("/dev/zero").open("rb") as endless:
        done = subprocess.run([*COMMAND, "--explain"], stdin=endless, capture_output=True, timeout=60)
    assert done.returncode == 1
    assert b"there is nothing to explain" in done.stderr


@pytest.mark.parametrize(
    "write",
    [
        lambda size: "permission denied while trying to connect to the docker daemo " * (size // 62),
        lambda size: "\n".join(f"address already in us {number}" for number in range(size // 28)),
        lambda size: "\n".join(f"has requirement {number}" for number in range(size // 22)),
        lambda size: "\n".join([*ALL_SAMPLES, *(f"{number:x}" for number in range(size // 7))]),
    ],
    ids=["one line", "many lines", "first pieces", "every trouble among short lines"],
)
def test_four_times_the_text_takes_no_more_than_a_few_times_as_long(write: Callable[[int], str]) -> None:
    def seconds(size: int) -> float:
        lines = write(size).splitlines()
        start = time.process_time()
        explain_lines(lines, TROUBLES)
        return time.process_time() - start

    assert min(seconds(MOST_READ) for _ in range(3)) < 12 * min(seconds(MOST_READ // 4) for _ in range(3))


def test_a_pasted_text_cannot_write_to_the_terminal_or_show_a_password(tmp_path: Path) -> None:
    address = "http://ada:secret" + "@127.0.0.1:8888/?token=4f2a9c"
    said = f"\x1b]0;owned\x07\x1b[31mAddress already in use\x1b[0m: {address}\r\n".encode()
    shown = doctor("--explain", pasted=said).stdout.decode()
    assert "Address already in use" in shown
    assert not re.search(r"[\x00-\x09\x0b-\x1f]|secret|4f2a9c", shown)


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("http://127.0.0.1:8888", "http://127.0.0.1:8888"),
        ("postgresql://ada:" + "p@ss/word@db:5432/x", "postgresql://ada:***@db:5432/x"),
        ("http://host/?token=4f2a&x=1", "http://host/?token=***&x=1"),
    ],
)
def test_a_password_is_hidden_and_a_port_is_shown(address: str, shown: str) -> None:
    known = Trouble("in use", "", ("in use",))
    assert part_to_show(explain_lines([f"in use: {address} now"], (known,))[0]) == f"in use: {shown} now"


def test_powershell_writes_its_files_in_another_encoding(tmp_path: Path) -> None:
    file = tmp_path / "error.txt"
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        file.write_text("MemoryError\n", encoding=encoding)
        with file.open("rb") as stream:
            assert read_pasted(stream).lines == ["MemoryError"]


def test_the_doctor_names_what_is_wrong_and_fails_if_it_breaks(tmp_path: Path) -> None:
    warned = doctor(PYTHONPATH=str(tmp_path), PYTHONOPTIMIZE="")
    assert f" warning: PYTHONPATH is set: PYTHONPATH={tmp_path}\n   unset PYTHONPATH\n" in warned.stdout.decode()
    assert warned.returncode == 0
    broken = doctor(PYTHONOPTIMIZE="1")
    assert " BREAKS: asserts are switched off: PYTHONOPTIMIZE=1\n   unset PYTHONOPTIMIZE\n" in broken.stdout.decode()
    assert broken.returncode == 1


def test_all_looks_together_see_what_each_sees(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "old")
    found = {each.trouble.name: each for each in look_for_troubles(settings)}
    assert list(found) == [each.name for each in TROUBLES if each.looks]
    assert found["PYTHONPATH is set"].what == "PYTHONPATH=old"
