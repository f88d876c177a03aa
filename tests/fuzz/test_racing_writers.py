"""No caller that writes during a call can take the process down."""

import subprocess
import sys
from pathlib import Path

import pytest

from specdec_ops import backends
from tests.fuzz.racing_writers import OPS

CALLS = 1000
ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(
    backends("tree_attention", "cpu")["cpu"] is not None, reason="there are no CPU kernels in this build"
)
@pytest.mark.parametrize("op", sorted(OPS))
def test_a_call_survives_a_racing_writer(op):
    command = [sys.executable, "-m", "tests.fuzz.racing_writers", op, str(CALLS)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, f"exit {done.returncode}: {done.stderr[-2000:]}"
    assert done.stdout.strip() == f"{op}: {CALLS} calls"
