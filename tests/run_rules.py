"""Options for a run that has to prove something: `--no-skips`, `--time-limit` and `--second-try`, which `.ci/run` sets,
and `--thorough`.

A process killed after every change that it makes, eight writers for minutes, thousands of made-up requests, an image,
Airflow, the whole course played by a learner: that takes an hour and more, and finds something once in a while. A usual
run kills after every fourth change, looks at every fourth of many alike, and leaves the longest ways to the night;
`make thorough` does all of it, every night and before a release.

A clock measures the neighbours, too: three tests share two cores. So a test is too slow when it takes too long by the
clock and by the processor, its own time and that of the programs it started; by the clock alone, three times as long.
A processor's time alone would not do: whichever test ends a program is charged with all of that program's life.

Six thousand tests start processes, kill them and wait for them. When a few have failed, they are tried once more,
alone. What is wrong fails again; what was only disturbed passes, and is named as what it is: a test to be fixed.
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import pytest

PROCESSOR = "processor_seconds"  # a test's property of this name
FOR_ANOTHER_SYSTEM = (  # why a test may be skipped all the same: this is the whole list
    r"uses (POSIX signals|SIGKILL|signals)",
    r"(POSIX signals|forks|uses POSIX limits and signals|permissions( and pipes)? of POSIX)",
    r"(workers are forked on Linux only|fork is for Linux|one warm kind is enough|looks into /proc|no /dev/full here)",
    r"MLflow's server wants a process group to be ended",
    r"(starts the service with two workers|several workers share a listening socket)",
    r"the notebooks speak to a shell",
    r"git could not make a link here: .*",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("mlops_course")
    group.addoption("--no-skips", action="store_true", help="fail when a test is skipped that this system could run")
    group.addoption("--thorough", action="store_true", help="all kills, large crowds, and the tests marked thorough")
    limit = "fail when a test not marked slow takes longer, by clock and processor, or three times that by the clock"
    group.addoption("--time-limit", type=float, metavar="SECONDS", help=limit)
    again = "try once more, alone, what has failed, if not more than so many tests have"
    group.addoption("--second-try", type=int, metavar="MOST", default=0, help=again)


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # xdist's workers tell the process that started them
        rules = RunRules(config.getoption("no_skips"), config.getoption("time_limit"))
        config.pluginmanager.register(rules)
        if config.getoption("second_try"):
            config.pluginmanager.register(SecondTry(rules, config.getoption("second_try")))


@pytest.fixture(scope="session")
def thorough(request: pytest.FixtureRequest) -> bool:
    """Whether all is asked that a release needs."""
    return bool(request.config.getoption("thorough"))


@pytest.fixture(scope="session")
def stride(thorough: bool) -> int:
    """After which changes a process is killed: after each one, or after every fourth."""
    return 1 if thorough else 4


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is for a thorough run only; pytest counts it as deselected."""
    if not config.getoption("thorough"):
        left_out = [item for item in items if item.get_closest_marker("thorough")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def each_fourth(values: Iterable[Any]) -> list[Any]:
    """For `parametrize`: many that are alike, of which a usual run takes every fourth, and a thorough one all."""
    rows = [value if isinstance(value, tuple) else (value,) for value in values]
    return [pytest.param(*row, marks=pytest.mark.thorough if number % 4 else ()) for number, row in enumerate(rows)]


def processor_seconds() -> float:
    """What this process has used, and the programs that it has started and seen end."""
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Note with each test what it took; `--junitxml FILE` keeps it."""
    before = processor_seconds()
    try:
        yield
    finally:
        item.user_properties.append((PROCESSOR, round(processor_seconds() - before, 2)))


class RunRules:
    """Collects what breaks the two rules, says it at the end, and fails the run."""

    def __init__(self, no_skips: bool, time_limit: float | None) -> None:
        self.no_skips = no_skips
        self.time_limit = time_limit
        self.skipped: list[str] = []
        self.slow = dict[str, str]()  # what is said, by the name of the test

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.note_skip(report)
        if self.time_limit is not None and report.when == "call" and "slow" not in report.keywords:
            self.note_time(report, self.time_limit)

    def note_time(self, report: pytest.TestReport, limit: float) -> None:
        used = float(dict(report.user_properties).get(PROCESSOR, 0))
        if min(used, report.duration) > limit or report.duration > 3 * limit:
            took = f"{report.duration:.0f} s, {used:.0f} s of the processor"
            self.slow[report.nodeid] = f"{report.nodeid} took {took}: make it faster, or mark it slow"

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self.note_skip(report)

    def note_skip(self, report: Any) -> None:
        if not self.no_skips or not report.skipped or hasattr(report, "wasxfail"):
            return
        text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        reason = text.removeprefix("Skipped: ")
        if not any(re.fullmatch(allowed, reason) for allowed in FOR_ANOTHER_SYSTEM):
            self.skipped.append(f"{report.nodeid} was skipped: {reason}")

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        if (self.skipped or self.slow) and exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_unconfigure(self, config: pytest.Config) -> None:
        """Say it last: the one reason for a run that failed, although all tests passed, isn't to be searched for."""
        broken = [*self.skipped, *self.slow.values()]
        reporter = config.pluginmanager.get_plugin("terminalreporter")
        if broken and reporter is not None:
            reporter.section(f"{len(broken)} broke a rule of this run", red=True)
            for line in broken:
                reporter.write_line(line)


class SecondTry:
    """Tries the tests that have failed, or were too slow, once more, with nothing beside them."""

    def __init__(self, rules: RunRules, most: int) -> None:
        self.rules = rules
        self.most = most
        self.failed: list[str] = []
        self.collected = True

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self.collected = self.collected and not report.failed

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed.append(report.nodeid)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> Iterator[None]:
        """After all else has ended and was told."""
        yield
        again = list(dict.fromkeys([*self.failed, *self.rules.slow]))
        if self.may_help(session) and 0 < len(again) <= self.most:
            self.try_again(session, again)

    def may_help(self, session: pytest.Session) -> bool:
        """Whether tests failed, and nothing else did."""
        return session.exitstatus == pytest.ExitCode.TESTS_FAILED and self.collected and not self.rules.skipped

    def try_again(self, session: pytest.Session, again: list[str]) -> None:
        config = session.config
        reporter = config.pluginmanager.get_plugin("terminalreporter")
        reporter.section(f"{len(again)} once more, alone")
        reporter.flush()
        limit = config.getoption("time_limit")
        options = ["--no-skips"] * config.getoption("no_skips") + ["--thorough"] * config.getoption("thorough")
        options += [] if limit is None else [f"--time-limit={limit}"]
        command = [sys.executable, "-m", "pytest", "-n0", f"--rootdir={config.rootpath}", *options, *again]
        if subprocess.run(command, cwd=config.rootpath).returncode == pytest.ExitCode.OK:
            self.rules.slow.clear()
            session.exitstatus = pytest.ExitCode.OK
            reporter.section("disturbed by others: passed alone, to be fixed", yellow=True)
            reporter.write_line("\n".join(again))
