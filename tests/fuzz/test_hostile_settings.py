"""What a process is short of, or told wrongly, ends a call with a sentence and never the process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from specdec_ops import backends
from tests.fuzz.low_memory import OPS

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(
    backends("tree_attention", "cpu")["cpu"] is not None, reason="there are no CPU kernels in this build"
)


def run(*command, **environment):
    return subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "2", **environment},
    )


@pytest.mark.skipif(sys.platform != "linux", reason="/proc/self/status and RLIMIT_AS are Linux's")
@pytest.mark.parametrize("op", sorted(OPS))
def test_low_memory(op):
    done = run("-m", "tests.fuzz.low_memory", op)
    assert done.returncode == 0, f"exit {done.returncode}: {done.stderr[-2000:]}"
    answer = done.stdout.strip()
    ours = answer.startswith("MemoryError: specdec_ops.") and answer.endswith(
        "there is too little memory for this call"
    )
    assert answer == "answered" or ours or "allocate memory" in answer, answer
    if "attention" in op:  # whose scratch is larger than what is left
        assert ours, answer


CALL = """
import torch, specdec_ops
from specdec_ops import Tree, tree_attention
q, lengths = torch.zeros(4, 3, 8, 64), torch.tensor([40] * 4, dtype=torch.int32)
cache = torch.zeros(4, 64, 8, 64)
for _ in range(2):
    try:
        tree_attention(q, cache, cache, Tree.chain(3).to("cpu"), lengths, backend="cpu")
    except ValueError as error:
        print(error)
"""


def test_an_instruction_set_that_there_is_not():
    """Also where the first call that asks for it does so on several threads."""
    done = run("-c", CALL, SPECDEC_OPS_CPU_ISA="avx999")
    assert done.returncode == 0, done.stderr[-2000:]
    sentence = "SPECDEC_OPS_CPU_ISA must be generic, avx2, avx512, avx512_bf16 or amx, got 'avx999'"
    assert done.stdout.splitlines() == [sentence] * 2
