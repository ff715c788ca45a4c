"""A run with `--no-skips` or `--time-limit` fails when one is left out, or too slow; `--thorough` asks for more, and
`--second-try` tries alone what has failed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent


def outcome(folder: Path, test: str, *options: str) -> tuple[int, str]:
    """What a run of one small test file comes to."""
    (folder / "test_it.py").write_text(f"import pytest, subprocess, sys, time\n\n{test}\n")
    settings = "[pytest]\naddopts = -p xdist -p run_rules\nmarkers =\n  slow\n  thorough\n"
    (folder / "pytest.ini").write_text(settings)
    command = [sys.executable, "-m", "pytest", *options, str(folder)]
    alone = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": str(TESTS)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=alone)
    return done.returncode, done.stdout


SKIPPED = '@pytest.mark.skip(reason="{}")\ndef test_one():\n    pass'
WAITS = "{}\ndef test_one():\n    time.sleep(0.4)"
WORK = "import time\nend = time.process_time() + 0.4\nwhile time.process_time() < end: pass"
WORKS = f"def test_one():\n    exec({WORK!r})"
REAPS = (
    "def test_one():\n    started.wait()\n\n"
    f"started = subprocess.Popen([sys.executable, '-c', {WORK!r}])\ntime.sleep(1)"
)
STARTS = f"def test_one():\n    subprocess.run([sys.executable, '-c', {WORK!r}])"


@pytest.mark.parametrize(
    ("test", "options", "status"),
    [
        (SKIPPED.format("redis is not there"), [], 0),
        (SKIPPED.format("redis is not there"), ["--no-skips", "-n1"], 1),
        ('pytest.skip("redis is not there", allow_module_level=True)', ["--no-skips"], 1),
        (SKIPPED.format("uses POSIX signals"), ["--no-skips"], 0),
        ("@pytest.mark.xfail\ndef test_one():\n    assert False", ["--no-skips"], 0),
        (WAITS.format(""), ["--time-limit=0.1"], 1),
        (WAITS.format("@pytest.mark.slow"), ["--time-limit=0.1"], 0),
        (WAITS.format(""), ["--time-limit=0.3", "-n1"], 0),
        (WORKS, ["--time-limit=0.3", "-n1"], 1),
        (STARTS, ["--time-limit=0.3"], 1),
        (WORKS, ["--time-limit=9"], 0),
        (REAPS, ["--time-limit=0.3"], 0),
    ],
)
def test_what_breaks_a_rule_fails_the_run(tmp_path: Path, test: str, options: list[str], status: int) -> None:
    found, said = outcome(tmp_path, test, *options)
    assert bool(found) == bool(status), said
    if status and "skip" in test:
        assert "was skipped: redis is not there" in said
    elif status:
        assert "make it faster, or mark it slow" in said.splitlines()[-1], "it is said last"


KILLED = """
@pytest.mark.thorough
def test_each():
    pass

def test_some(thorough, stride):
    print("asked:", thorough, stride)
"""


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], ["asked: False 4", "1 passed, 1 deselected"]),
        (["-m", "not slow"], ["asked: False 4", "1 passed, 1 deselected"]),
        (["-n1"], ["1 passed"]),
        (["--thorough"], ["asked: True 1", "2 passed"]),
        (["--thorough", "-n1"], ["2 passed"]),
    ],
)
def test_what_takes_an_hour_is_for_a_thorough_run(tmp_path: Path, options: list[str], said: list[str]) -> None:
    status, found = outcome(tmp_path, KILLED, "-s", *options)
    assert status == 0
    assert all(each in found for each in said), found


DISTURBED = """
from pathlib import Path

def test_one():
    tries = Path(__file__).with_name("tries.txt")
    tries.open("a").write("once ")
    assert len(tries.read_text().split()) > {}, "too early"

@pytest.mark.parametrize("number", range({}))
def test_wrong(number):
    assert False
"""


@pytest.mark.parametrize("side_by_side", [[], ["-n2"]], ids=["alone", "beside others"])
@pytest.mark.parametrize(
    ("fails", "wrong", "options", "status", "tries"),
    [
        (0, 0, ["--second-try=2"], 0, 1),
        (1, 0, [], 1, 1),
        (1, 0, ["--second-try=2"], 0, 2),
        (2, 0, ["--second-try=2"], 1, 2),
        (1, 1, ["--second-try=2"], 1, 2),
        (1, 2, ["--second-try=2"], 1, 1),
    ],
)
def test_what_failed_is_tried_once_more_and_named(
    tmp_path: Path, side_by_side: list[str], fails: int, wrong: int, options: list[str], status: int, tries: int
) -> None:
    found, said = outcome(tmp_path, DISTURBED.format(fails, wrong), *options, *side_by_side)
    assert (found, len((tmp_path / "tries.txt").read_text().split())) == (status, tries), said
    assert ("passed alone, to be fixed" in said) == (status == 0 and tries == 2)
    assert status or tries < 2 or said.splitlines()[-1] == "test_it.py::test_one", "it is said last"


def test_a_rule_is_kept_at_the_second_try_too(tmp_path: Path) -> None:
    slow_once = "def test_one():\n    path = __file__ + '.tried'\n"
    slow_once += "    time.sleep(0.01 if __import__('os').path.exists(path) else 0.5); open(path, 'w')"
    assert outcome(tmp_path, slow_once, "--time-limit=0.1", "--second-try=2")[0] == 0
    found, said = outcome(tmp_path, WAITS.format(""), "--time-limit=0.1", "--second-try=2")
    assert found == 1 and "make it faster" in said.splitlines()[-1]
    found, said = outcome(tmp_path, SKIPPED.format("redis is not there"), "--no-skips", "--second-try=2")
    assert found == 1 and "once more" not in said
    found, said = outcome(tmp_path, "import nothing_of_this_name\ndef test_one(): assert False", "--second-try=2")
    assert found != 0 and "once more" not in said
