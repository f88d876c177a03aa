"""What the tests cost: seconds on a processor of every file, those of the processes that it starts included.

Seconds on the clock say little where others share the machine. A long run ends with the sum, the budget, and the
files that take most of it, so that the suite does not grow unseen.
"""

import os

import pytest

# Of all tests, on two cores in a slow hour: 12 minutes, of which building and installing take a third.
BUDGET = 960
SHOWN_FROM = 100  # runs of less than this say nothing
LONGEST = 12


def spent():
    """By this process and by those that it has waited for."""
    return sum(os.times()[:4])


class CpuSeconds:
    """A plugin of pytest, in every process of pytest-xdist."""

    def __init__(self):
        self.files = {}
        self.processes = 0.0  # of pytest-xdist, with what they do outside of tests
        self.before = 0.0

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self):
        self.before = spent()
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, call):
        report = yield
        if call.when == "teardown":
            report.cpu_seconds = spent() - self.before
        return report

    def pytest_runtest_logreport(self, report):
        file = report.nodeid.partition("::")[0]
        self.files[file] = self.files.get(file, 0.0) + getattr(report, "cpu_seconds", 0.0)

    def pytest_sessionfinish(self, session):
        if hasattr(session.config, "workeroutput"):
            session.config.workeroutput["cpu_seconds"] = spent()

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node):
        self.processes += getattr(node, "workeroutput", {}).get("cpu_seconds", 0.0)

    def pytest_terminal_summary(self, terminalreporter):
        total = sum(os.times()[:2]) + self.processes if self.processes else spent()
        if total < SHOWN_FROM:
            return
        terminalreporter.section("seconds on a processor")
        over = total > BUDGET
        terminalreporter.line(f"{total:.0f}, and {BUDGET} at most{': too many' if over else ''}", red=over, bold=over)
        for file, seconds in sorted(self.files.items(), key=lambda item: -item[1])[:LONGEST]:
            terminalreporter.line(f"{seconds:6.0f}  {file}")
