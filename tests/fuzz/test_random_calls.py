"""A bounded run of the programs of random calls: `make fuzz` runs them for longer.

Each op is called some dozens of times in either. All ops share a process, since starting one takes longer: of a crash
the last line of stderr tells op and seed.
"""

import subprocess
import sys
from pathlib import Path

import pytest

from specdec_ops import backends

ROOT = Path(__file__).parents[2]
SECONDS, FIRST_SEED = 15, 1
pytestmark = pytest.mark.skipif(
    backends("tree_attention", "cpu")["cpu"] is not None, reason="there are no CPU kernels in this build"
)


@pytest.mark.parametrize("program", ["valid_calls", "mutated_calls"])
def test_random_calls(program):
    command = [sys.executable, "-m", f"tests.fuzz.{program}", str(SECONDS), str(FIRST_SEED)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, timeout=30 * SECONDS)
    assert done.returncode == 0, f"exit {done.returncode}: {done.stdout[-3000:]} {done.stderr[-2000:]}"
    assert "= rms_norm " in done.stdout
