"""All drop-in forms at once: on every backend, and whatever surrounds the call."""

import contextlib

import pytest
import torch

from specdec_ops import build_topology
from specdec_ops._core import dispatch
from specdec_ops.compat import flashinfer, sgl_kernel
from tests.compat.compat_cases import call, metadata

OP = "accept"  # `target` runs over its backends
BATCH, STEPS, VOCAB, NODES = 3, 4, 11, 6


def made(seed=0):
    """Inputs on which all have something to do: padding, an id beyond the vocabulary, a row of NaN, one of zeros."""
    generator = torch.Generator().manual_seed(seed)

    def probs(*shape):
        return torch.randn(*shape, VOCAB, generator=generator, dtype=torch.float32).mul(2).softmax(-1)

    def ids(*shape):
        return torch.randint(0, VOCAB, shape, generator=generator)

    drafts = ids(BATCH, STEPS)
    drafts[0, 2], drafts[1, 3] = -1, VOCAB
    target, draft, tree_probs = probs(BATCH, STEPS + 1), probs(BATCH, STEPS), probs(BATCH, NODES)
    target[2, 1], target[1, 0] = torch.nan, 0
    tree_probs[2, 0] = torch.nan
    numbers = torch.rand(2, BATCH, NODES, generator=generator, dtype=torch.float32)
    topology = build_topology(torch.tensor([[-1, 0, 0, 1, 1, 2]] * BATCH, dtype=torch.int32))
    links = (topology.first_child.long(), topology.next_sibling.long())
    return drafts, target, draft, (ids(BATCH, NODES), links, tree_probs, numbers), ids(BATCH, NODES)


def outcomes(inputs) -> list[torch.Tensor]:
    """What all functions give."""
    drafts, target, draft, (candidates, links, tree_probs, numbers), choices = inputs
    given = list(flashinfer.chain_speculative_sampling(draft, drafts, target, seed=5, offset=9))

    flat, generators = target[:, :STEPS].reshape(-1, VOCAB), lambda: {"generators": seeded()}
    chains = {"draft_probs": draft.reshape(-1, VOCAB), "how": "target_probs"}
    given.append(call(drafts, flat, metadata(BATCH, **generators()), **chains))
    logits = {**chains, "how": "place"}
    given.append(call(drafts, flat.log(), metadata(BATCH, **generators()), **logits))
    rates = {"synthetic_mode": True, "synthetic_conditional_rates": torch.full((STEPS,), 0.6, device="cpu")}
    given.append(call(drafts, flat.log(), metadata(BATCH, **generators()), **logits, **rates))
    given.append(call(drafts, flat.log(), metadata(BATCH, all_greedy=True), how="place"))

    for sampled in (False, True):
        slots = torch.arange(BATCH * NODES, device="cpu").view(BATCH, NODES)
        outputs = [torch.full(shape, -7, dtype=torch.int32, device="cpu") for shape in ((BATCH * NODES,), (BATCH, 3))]
        outputs.append(torch.full((BATCH,), -7, dtype=torch.int32, device="cpu"))
        tree = (*outputs, candidates, slots, *links)
        if sampled:
            sgl_kernel.tree_speculative_sampling_target_only(*tree, numbers[0], numbers[1, :, 0], tree_probs)
        else:
            sgl_kernel.verify_tree_greedy(*tree, choices)
        given += outputs

    written = [torch.full((BATCH, 3), 9, dtype=torch.int64, device="cpu") for _ in range(3)]
    mask = torch.ones(BATCH * 9, dtype=torch.bool, device="cpu")
    positions = torch.zeros(BATCH * 3, dtype=torch.int64, device="cpu")
    selected = torch.arange(2, device="cpu").repeat(BATCH, 1)
    lengths = torch.full((BATCH,), 5, dtype=torch.int64, device="cpu")
    nothing = torch.empty(BATCH, 0, dtype=torch.int64, device="cpu")
    sgl_kernel.build_tree_kernel_efficient(nothing, selected, lengths, mask, positions, *written, 2, 1, 3, 1)
    return [*given, mask, positions, *written]


def seeded():
    return {request: torch.Generator(device="cpu").manual_seed(request) for request in range(BATCH)}


def test_every_backend_gives_the_same(target, monkeypatch):
    """What the drop-in forms leave to "auto" runs on the target's backend. What the reference gives is right."""
    if target.device != "cpu":
        pytest.skip("outcomes() makes tensors of the CPU; the ops have GPU tests of their own")
    resolve = dispatch.resolve

    def outcomes_on(chosen):
        monkeypatch.setattr(dispatch, "resolve", lambda op, backend, *tensors: resolve(op, chosen, *tensors))
        return outcomes(made())

    for ours, reference in zip(outcomes_on(target.backend), outcomes_on("torch"), strict=True):
        assert ours.dtype == reference.dtype and torch.equal(ours, reference)


@contextlib.contextmanager
def default(setter, getter, value):
    before = getter()
    setter(value)
    try:
        yield
    finally:
        setter(before)


SURROUNDINGS = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "default_dtype_float64": lambda: default(torch.set_default_dtype, torch.get_default_dtype, torch.float64),
    "default_dtype_bfloat16": lambda: default(torch.set_default_dtype, torch.get_default_dtype, torch.bfloat16),
    "default_device_meta": lambda: torch.device("meta"),
    "inference_mode": torch.inference_mode,
    "deterministic": lambda: default(
        torch.use_deterministic_algorithms, torch.are_deterministic_algorithms_enabled, True
    ),
}


@pytest.mark.parametrize("surroundings", SURROUNDINGS)
def test_surroundings_change_nothing(surroundings):
    inputs = made()
    expected = outcomes(inputs)
    with SURROUNDINGS[surroundings]():
        given = outcomes(inputs)
    for ours, plain in zip(given, expected, strict=True):
        assert ours.dtype == plain.dtype and torch.equal(ours, plain)
