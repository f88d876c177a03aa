"""What the README says of fork: which children may use the ops after their parent did."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SECONDS = 60  # for a child that works: it may have to import PyTorch on a busy machine
SECONDS_OF_A_HANG = 4  # a forked child that works takes milliseconds

PROGRAM = f"""
import json, multiprocessing, os, signal, sys, time
import torch
from specdec_ops import Tree, tree_attention

def use():
    tree = Tree.chain(4).to("cpu")
    q, k, v = torch.ones(8, 4, 8, 64), torch.ones(8, 128, 8, 64), torch.full((8, 128, 8, 64), 3.0)
    assert (tree_attention(q, k, v, tree, 100, backend="cpu") == 3).all()

def fork(child, seconds):
    pid = os.fork()
    if pid == 0:
        child()
        os._exit(0)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return f"status {{status}}"
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return "hangs"

def start(method):
    child = multiprocessing.get_context(method).Process(target=use, daemon=True)
    child.start()
    child.join({SECONDS})
    return f"status {{child.exitcode}}"

def one_thread(then):
    torch.set_num_threads(1)
    then()

if __name__ == "__main__":
    torch.set_num_threads(2)
    found = {{"fork before the first use": fork(use, {SECONDS})}}
    use()
    found["fork"] = fork(use, {SECONDS_OF_A_HANG})
    found["fork, PyTorch's own"] = fork(lambda: torch.ones(1_000_000).exp(), {SECONDS_OF_A_HANG})
    found["one thread in the child"] = fork(lambda: one_thread(use), {SECONDS})
    found["spawn"] = start("spawn")
    found["forkserver"] = start("forkserver")
    torch.set_num_threads(1)
    found["one thread in the parent"] = fork(use, {SECONDS})
    found["libgomp"] = "libgomp" in open("/proc/self/maps").read()
    print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    script = tmp_path_factory.mktemp("fork") / "program.py"
    script.write_text(PROGRAM)
    done = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        text=True,
        capture_output=True,
        timeout=6 * SECONDS,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


WORKING = ("one thread in the child", "one thread in the parent", "spawn", "forkserver", "fork before the first use")


@pytest.mark.parametrize("way", WORKING)
def test_these_children_may_use_the_ops(way, found):
    assert found[way] == "status 0"


@pytest.mark.parametrize("way", ["fork", "fork, PyTorch's own"])
def test_a_plain_fork_hangs(way, found):
    """In ours as in PyTorch's. Should this fail, the note in the README has become too strict."""
    if not found["libgomp"]:
        pytest.skip("PyTorch uses another OpenMP runtime here, which may live through a fork; the note is on libgomp")
    assert found[way] == "hangs"
