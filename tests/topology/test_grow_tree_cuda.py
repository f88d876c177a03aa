"""The CUDA kernels of grow_tree and prune_tree, emulated, under sanitizers, in many orders, and the bytes they move.

Their values are tested with all other backends'.
"""

import functools
import math

import pytest
import torch

from specdec_ops import VocabMap, grow_tree, prune_tree
from tests.emulator import build, kernels
from tests.emulator.checks import launch_tests
from tests.topology.grow_cases import TORCH, grown, random_round

if reason := build.why_not():
    pytest.skip(reason, allow_module_level=True)


def grow_launch(level, *shape, poison=True, **options):
    """A level of a round whose levels before it are grown, with candidates that are none."""
    case = random_round(*shape, vocab=100)
    if poison:
        for tokens, logprobs in case.levels:
            logprobs[:, :, 1::5], tokens[-1, :, ::3] = math.nan, -9
    pool, _ = grown(case, TORCH, levels=level)
    return kernels.launch_of(lambda: grow_tree(pool, *case.levels[level], level=level, **options))


def prune_launch(nodes, *shape, equal=False):
    case = random_round(*shape, vocab=100)
    if equal:
        for _, logprobs in case.levels:
            logprobs.fill_(-1.0)
    pool, _ = grown(case, TORCH)
    roots = torch.arange(pool.batch, dtype=torch.int32)
    return kernels.launch_of(lambda: prune_tree(pool, nodes, root_tokens=roots))


MAP = VocabMap([3 * entry for entry in range(70)], 300)
LAUNCHES = {
    "level 0": functools.partial(grow_launch, 0, 2, 4, 5, 7),
    "level 0, two words": functools.partial(grow_launch, 0, 2, 4, 30, 3),
    "level 2": functools.partial(grow_launch, 2, 3, 4, 5, 7, eos=(3, 9), vocab_map=MAP),
    "more candidates than threads": functools.partial(grow_launch, 1, 1, 3, 40, 10),
    "the last level": functools.partial(grow_launch, 3, 2, 4, 5, 7),
    "requests that stop": functools.partial(grow_launch, 1, 2, 4, 5, 7, active=torch.tensor([False, True])),
    "prune": functools.partial(prune_launch, 20, 2, 4, 5, 7),
    "prune, more nodes than candidates": functools.partial(prune_launch, 70, 1, 2, 4, 5),
    "prune among equals": functools.partial(prune_launch, 300, 1, 4, 16, 16, equal=True),
    "prune to the root": functools.partial(prune_launch, 1, 2, 4, 5, 7),
}


test_sanitizers_find_nothing, test_every_order_gives_the_same = launch_tests(LAUNCHES, 6)


def test_a_sanitizer_finds_a_pool_that_is_too_small():
    """So the replay really gives every tensor memory of its own size."""
    launch = LAUNCHES["level 2"]()
    launch.tensors["tokens"] = launch.tensors["tokens"][:, :-36].contiguous()
    try:
        with pytest.raises(RuntimeError, match="AddressSanitizer: heap-buffer-overflow"):
            kernels.replay(launch, "address")
    except build.CannotRun as reason:
        pytest.skip(str(reason))


def test_a_level_is_one_launch_and_so_is_the_end():
    for op, case in (("grow_tree", "level 2"), ("prune_tree", "prune")):
        launch = LAUNCHES[case]()
        before = kernels.launches(op)
        kernels.run(launch)
        assert kernels.launches(op) == before + 1


def test_a_level_moves_its_own_rows():
    """The pool behind it and the levels before are left alone, but for what the parents say and get."""
    batch, levels, width, branching = 2, 5, 8, 6
    launch = grow_launch(3, batch, levels, width, branching, poison=False)
    moved = kernels.traffic(launch)
    count = batch * width * branching * 4
    assert moved["top_tokens"] == moved["top_logprobs"] == (count, 0)
    for name in ("tokens", "scores", "parents"):
        assert moved[name].written == count, name
    assert moved["expanded"] == (0, count + batch * width * 4)
    for name in ("frontier_tokens", "parent_rows", "frontier_scores", "candidates", "node_parents", "depths"):
        assert moved[name].written == batch * width * 4, name
    assert moved["ancestors"] == (batch * width * 8, batch * width * 8)
    assert moved["first_child"] == (0, 2 * batch * width * 4)
    assert moved["candidates"].read == count  # each candidate asks for its parent


def test_pruning_writes_each_byte_once():
    launch = LAUNCHES["prune"]()
    moved = kernels.traffic(launch)
    for name in launch.output_names:
        assert moved[name] == (0, kernels.extent(launch.tensors[name])), name
    assert moved["scores"].read <= 5 * kernels.extent(launch.tensors["scores"])


def test_sizes_beyond_the_kernels_are_cudas_errors():
    """The public functions refuse them before."""
    launch = LAUNCHES["prune"]()
    assert launch.op == "prune_tree"
    call = bytearray(launch.call())
    for op, name, place in place_of("prune_tree", "nodes"):
        call[place : place + 4] = (2049).to_bytes(4, "little")
        with pytest.raises(RuntimeError, match=f"{op} on the emulator: CUDA error 1$"):
            kernels.run_call(op, bytes(call))
        assert name == "nodes"


def place_of(op, wanted):
    return [(op, name, offset) for name, offset, _, _ in kernels.fields(op) if name == wanted]
