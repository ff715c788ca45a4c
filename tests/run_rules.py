"""Two options for a run that has to prove everything: `--no-skips` and `--time-limit`. `.ci/run` sets both."""

import re
from typing import Any

import pytest

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
    group.addoption("--time-limit", type=float, metavar="SECONDS", help="fail when a test not marked slow takes longer")


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # xdist's workers tell the process that started them
        config.pluginmanager.register(RunRules(config.getoption("no_skips"), config.getoption("time_limit")))


class RunRules:
    """Collects what breaks the two rules, says it at the end, and fails the run."""

    def __init__(self, no_skips: bool, time_limit: float | None) -> None:
        self.no_skips = no_skips
        self.time_limit = time_limit
        self.skipped: list[str] = []
        self.slow: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.note_skip(report)
        over = self.time_limit is not None and report.when == "call" and report.duration > self.time_limit
        if over and "slow" not in report.keywords:
            self.slow.append(f"{report.nodeid} took {report.duration:.0f} s: make it faster, or mark it slow")

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

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        if self.skipped or self.slow:
            terminalreporter.section("rules of the run", red=True)
            for line in [*self.skipped, *self.slow]:
                terminalreporter.write_line(line)
