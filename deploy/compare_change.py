"""What a change of code does to the model: train with the code before and after it, and let the gate compare the two.

python deploy/compare_change.py BEFORE AFTER --first 2013-01 --train-last 2013-04 --test-last 2013-06 --output report.md

BEFORE and AFTER are two checkouts with an environment each (`make install`). Both train in the workspace that
MLOPS_COURSE_HOME names, which must be a new one. The exit status says whether there is a report, not what it says.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

MARK = "<!-- mlops-course: model report -->"
GATE = {0: "promote", 1: "reject", 3: "needs a person"}  # exit statuses of `deliver gate`


def course(folder: Path, *words: str, statuses: tuple[int, ...] = (0,)) -> str:
    """Run the command of a checkout; what it prints."""
    program = folder / ".venv" / ("Scripts/mlops-course.exe" if os.name == "nt" else "bin/mlops-course")
    done = subprocess.run([program.absolute(), *words], stdout=subprocess.PIPE, text=True, encoding="utf-8")
    if done.returncode not in statuses:
        sys.exit(f"in {folder}, mlops-course {' '.join(words)} ended with {done.returncode}")
    return done.stdout


def train(folder: Path, given: argparse.Namespace) -> list[dict[str, Any]]:
    """Run the whole training with the code of a checkout; the versions that are registered then, oldest first."""
    values = {"first": given.first, "train_last": given.train_last, "test_last": given.test_last}
    parameters = [f"{name}={value}" for name, value in values.items()] + given.parameter
    course(folder, "run", "training", *(word for each in parameters for word in ("-p", each)))
    found: list[dict[str, Any]] = json.loads(course(folder, "models", "list", "--json"))
    return found


def following(month: str) -> str:
    """The month after it."""
    year, number = (int(part) for part in month.split("-"))
    return f"{year + number // 12}-{number % 12 + 1:02d}"


def report(given: argparse.Namespace) -> str:
    """Markdown."""
    before = train(given.before, given)
    after = train(given.after, given)
    if len(after) == len(before):
        return f"{MARK}\n### The model stays as it is\n\nBoth give {before[-1]['version']}: the same content.\n"
    challenger, why = after[-1]["version"], "the model of the code before"
    # The training may have promoted the new one. The gate compares it with the old one, whatever that is worth.
    course(given.after, "models", "promote", before[-1]["version"], "--reason", why, "--json")
    months = ("--first", following(given.train_last), "--last", given.test_last)
    said = course(given.after, "deliver", "gate", challenger, *months, "--json", statuses=tuple(GATE))
    if not said:
        sys.exit(f"the gate says nothing about {challenger}")
    return course(given.after, "deliver", "report", challenger)


def main() -> None:
    """Write the report."""
    parser = argparse.ArgumentParser(description="What a change of code does to the model.")
    parser.add_argument("before", type=Path, help="checkout of the code before the change")
    parser.add_argument("after", type=Path, help="checkout of the code after it")
    for name in ("first", "train-last", "test-last"):
        parser.add_argument(f"--{name}", required=True, help="a month, such as 2013-01")
    parser.add_argument("-p", "--parameter", action="append", default=[], help="name=value for the training")
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    given.output.write_text(report(given), encoding="utf-8")
    print(f"{given.output} is written")


if __name__ == "__main__":
    main()
