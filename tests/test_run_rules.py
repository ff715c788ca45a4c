"""A run with `--no-skips` and `--time-limit` fails when something was left out, or is too slow."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent


def outcome(folder: Path, test: str, *options: str) -> tuple[int, str]:
    """What a run of one small test file comes to."""
    (folder / "test_it.py").write_text(f"import pytest, time\n\n{test}\n")
    (folder / "pytest.ini").write_text("[pytest]\nmarkers = slow\n")
    program = f"import sys; sys.path.insert(0, {str(TESTS)!r}); import pytest; sys.exit(pytest.main(sys.argv[1:]))"
    command = [sys.executable, "-c", program, "-p", "xdist", "-p", "run_rules", *options, str(folder)]
    alone = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=alone)
    return done.returncode, done.stdout


SKIPPED = '@pytest.mark.skip(reason="{}")\ndef test_one():\n    pass'
SLOW = "{}\ndef test_one():\n    time.sleep(0.2)"


@pytest.mark.parametrize(
    ("test", "options", "status"),
    [
        (SKIPPED.format("redis is not there"), [], 0),
        (SKIPPED.format("redis is not there"), ["--no-skips", "-n1"], 1),
        ('pytest.skip("redis is not there", allow_module_level=True)', ["--no-skips"], 1),
        (SKIPPED.format("uses POSIX signals"), ["--no-skips"], 0),
        ("@pytest.mark.xfail\ndef test_one():\n    assert False", ["--no-skips"], 0),
        (SLOW.format(""), ["--time-limit=0.1"], 1),
        (SLOW.format(""), ["--time-limit=9"], 0),
        (SLOW.format("@pytest.mark.slow"), ["--time-limit=0.1"], 0),
    ],
)
def test_what_breaks_a_rule_fails_the_run(tmp_path: Path, test: str, options: list[str], status: int) -> None:
    found, said = outcome(tmp_path, test, *options)
    assert bool(found) == bool(status), said
    if status and "skip" in test:
        assert "was skipped: redis is not there" in said
    if status and "sleep" in test:
        assert "make it faster, or mark it slow" in said
