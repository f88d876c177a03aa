"""What every emulated launch must pass: sanitizers find nothing in it, and no order of threads changes its result."""

import copy

import pytest
import torch

from tests.conftest import poisoned_empty

from . import build, kernels, mutants
from .kernels import counters_are_zero

SANITIZERS = [sanitizer for sanitizer in build.SANITIZERS if sanitizer != "plain"]
RACE = "WARNING: ThreadSanitizer: data race"
# Bugs to plant are (file, the line, what becomes of it). This one is in every kernel whose last block joins the parts.
NO_FENCE = ("last_block.cuh", "  device_fence();\n  team.sync();", "  team.sync();")


def outputs(launch, tensors=None):
    """The outputs of a launch that was run: {name: a copy}. `tensors` may be those of a replay."""
    tensors = launch.tensors if tensors is None else tensors
    return {name: tensors[name].clone() for name in launch.output_names}


def assert_same(got, expected):
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, rtol=0, atol=0, equal_nan=False, msg=name)


def assert_sanitizer_finds_nothing(launch, sanitizer):
    """No race, no access outside of an array, nothing undefined, and the result of the plain build in every order."""
    try:
        after = kernels.replay(launch, sanitizer)
    except build.CannotRun as reason:
        pytest.skip(str(reason))
    kernels.run(launch)
    assert_same(outputs(launch, after), outputs(launch))
    assert counters_are_zero(after)


def assert_order_changes_nothing(launch, seeds):
    """Of warps, of threads in them, and of blocks; in scratch that holds anything."""
    first = copy.deepcopy(launch)
    kernels.run(first)
    expected = outputs(first)
    for order, seed in [("reverse", 0), *(("random", seed) for seed in range(seeds))]:
        again = copy.deepcopy(launch)
        again.tensors["scratch"].fill_(seed)
        kernels.run(again, order, seed)
        assert counters_are_zero(again.tensors)
        assert_same(outputs(again), expected)


def launch_tests(launches, seeds=2):
    """The two tests that a module's launches must pass, {name: what makes one}. A module joins by this line:

    test_sanitizers_find_nothing, test_every_order_gives_the_same = launch_tests(LAUNCHES)
    """

    @pytest.mark.parametrize("sanitizer", SANITIZERS)
    @pytest.mark.parametrize("case", launches)
    def test_sanitizers_find_nothing(case, sanitizer):
        assert_sanitizer_finds_nothing(launches[case](), sanitizer)

    @pytest.mark.parametrize("case", launches)
    def test_every_order_gives_the_same(case):
        assert_order_changes_nothing(launches[case](), seeds)

    return test_sanitizers_find_nothing, test_every_order_gives_the_same


def poison(launch):
    for name in outputs(launch):
        tensor = launch.tensors[name]
        tensor.copy_(poisoned_empty(tensor.shape, tensor.dtype, "cpu"))


def reveals(launch, file, old, new, only=None):
    """Whether a launch has another result if a file of csrc has `new` for `old`, or reports it."""
    poison(launch)
    kernels.run(launch)
    expected = outputs(launch)
    poison(launch)
    try:
        got = mutants.replay(launch, "plain", file, old, new, only)
    except build.CannotRun as reason:
        pytest.skip(str(reason))
    except RuntimeError:
        return True
    return any(not torch.equal(got[name], tensor) for name, tensor in expected.items())


def assert_race(launch, file, old, new, only=None):
    """ThreadSanitizer sees a race in a launch if a file of csrc has `new` for `old` (mutants.replay)."""
    try:
        with pytest.raises(RuntimeError, match=RACE):
            mutants.replay(launch, "thread", file, old, new, only)
    except build.CannotRun as reason:
        pytest.skip(str(reason))
