"""kv_propagate in CUDA, emulated: bytes, orders of blocks, sanitizers, a planted race.

Its values are also tested with all other backends', in test_kv_propagate.py.
"""

import pytest
import torch

from specdec_ops import kv_propagate
from tests.emulator import build, kernels
from tests.emulator.checks import assert_race, launch_tests

if reason := build.why_not():
    pytest.skip(reason, allow_module_level=True)


def launch(rows, dtype, dim=320, layers=2, shift=0, norm=True):
    """shift: of hidden's first element, so that rows lie at no multiple of 16 bytes."""
    generator = torch.Generator().manual_seed(rows)

    def random(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    projections = [(random(dim) if norm else None, random(48, dim), random(48, dim)) for _ in range(layers)]
    caches = [[torch.zeros(1, rows, 3, 16, dtype=dtype) for _ in range(layers)] for _ in range(2)]
    hidden, places = random(rows, dim + 2 * shift)[:, shift : shift + dim], torch.arange(rows, dtype=torch.int32)
    return kernels.launch_of(lambda: kv_propagate(hidden, projections, places, places, *caches, rope=1e4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [1, 32, 64, 70])
def test_weights_are_read_once_for_64_rows(rows, dtype):
    case = launch(rows, dtype)
    traffic, blocks = kernels.traffic(case), -(-rows // 64)
    for name, tensor in case.tensors.items():
        if name.startswith(("k_weights", "v_weights")):
            assert traffic[name] == (blocks * tensor.nbytes, 0), name
        elif name.startswith(("k_caches", "v_caches")):
            assert traffic[name] == (0, tensor.nbytes), name


LAUNCHES = {
    "bf16": lambda: launch(9, torch.bfloat16),
    "f16 many rows": lambda: launch(66, torch.float16, layers=1),
    "f32": lambda: launch(3, torch.float32, layers=3),
    "no norm": lambda: launch(33, torch.bfloat16, norm=False),
    "odd": lambda: launch(2, torch.float32, dim=77, shift=1),
}

test_sanitizers_find_nothing, test_every_order_gives_the_same = launch_tests(LAUNCHES)


def test_planted_race():
    """A thread that does not wait for the tile that others make."""
    line = "    block_sync();  // the tile and y are complete, and nobody is still at those before them\n"
    assert_race(LAUNCHES["f32"](), "kv_propagate.cuh", line, "")
