"""A pytest plugin: outcomes are recorded, and a later run leaves out the tests that have one.

`python -m pytest -p benchmarks.gpu.resume_tests --record FOLDER --shard 0/4`. For runs that must end within minutes, in
several processes on one GPU. All tests of an op, or of a function that is not over ops, are in one shard, so that no
two processes compile the same kernels. A test that leaves the GPU unusable ends the run with status 75; the next one
goes on behind it. A test that ended its process, or had to be ended, twice counts as failed.
"""

import json
import sys
from collections import Counter
from pathlib import Path

import pytest

UNFINISHED = 75
MOST_STARTS = 2


def pytest_addoption(parser):
    parser.addoption("--record", type=Path, help="the folder of the recorded outcomes")
    parser.addoption("--shard", default="0/1", help="run only one part of several, as in 0/4")


def recorded(folder: Path) -> dict[str, str]:
    """{test: passed, failed or skipped} of all runs so far."""
    outcomes, starts = {}, Counter()
    for file in sorted(folder.glob("*.jsonl")):
        for line in map(json.loads, file.read_text().splitlines()):
            if line["outcome"] == "started":
                starts[line["test"]] += 1
            else:
                outcomes[line["test"]] = line["outcome"]
    never_ended = {test: "failed" for test, count in starts.items() if count >= MOST_STARTS and test not in outcomes}
    return never_ended | outcomes


def subject(item) -> str:
    """What a test compiles kernels for: the op that it is parametrised with, else its function."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    op = parameters.get("op")
    return op if isinstance(op, str) else item.nodeid.partition("[")[0]


def shards(items: list, count: int) -> list[list]:
    """The tests in `count` parts of about one size, subject by subject, each in the order of the whole."""
    subjects = Counter(map(subject, items))
    sizes, part_of = [0] * count, {}
    for name, size in subjects.most_common():
        part_of[name] = sizes.index(min(sizes))
        sizes[part_of[name]] += size
    return [[item for item in items if part_of[subject(item)] == part] for part in range(count)]


def pytest_configure(config):
    if config.getoption("--record"):
        config.pluginmanager.register(Recorder(config.getoption("--record"), config.getoption("--shard")))


class Recorder:
    """Leaves out what has run, and writes down what runs."""

    def __init__(self, folder: Path, shard: str) -> None:
        self.index, self.count = map(int, shard.split("/"))
        self.folder, self.file = folder, folder / f"{self.index}.jsonl"
        self.outcome = {}

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config, items):
        """After -m and -k have chosen, so that the shards are even."""
        done = recorded(self.folder)
        own = shards(items, self.count)[self.index]
        chosen = [item for item in own if item.nodeid not in done]
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = chosen

    def write(self, test: str, outcome: str) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.file.open("a") as file:
            file.write(json.dumps({"test": test, "outcome": outcome}) + "\n")

    def pytest_runtest_logstart(self, nodeid):
        self.write(nodeid, "started")

    def pytest_runtest_logreport(self, report):
        """The worst of setup, call and teardown counts."""
        if report.when == "setup" or report.outcome == "failed" or self.outcome.get(report.nodeid) == "passed":
            self.outcome[report.nodeid] = report.outcome
        if report.when == "teardown":
            self.write(report.nodeid, self.outcome[report.nodeid])
            if self.outcome[report.nodeid] == "failed" and gpu_failed():
                pytest.exit(f"the GPU is unusable after {report.nodeid}", returncode=UNFINISHED)

    def pytest_sessionfinish(self, session, exitstatus):
        """Nothing left to run is no error here."""
        if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and recorded(self.folder):
            session.exitstatus = pytest.ExitCode.OK


def gpu_failed() -> bool:
    """Whether a kernel has left the GPU unusable for this process."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False
