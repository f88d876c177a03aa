"""Integer tensors as Hugging Face and NumPy hand them over: int64 where int32 is the fast way, and unsigned seeds.

The conversion is Python's, before any backend, so two backends stand for all.
"""

import dataclasses

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from specdec_ops import AcceptStatus, LayerCache, Topology, Tree, build_topology, dlpack, greedy_accept, tree_attention
from tests.harness.public_calls import CALLS, int32, run
from tests.package.test_surroundings import differs

INTEGERS = (torch.int32, torch.int64)
ARGUMENTS = [
    (name, argument)
    for name, call in CALLS.items()
    for argument, value in call.arguments.items()
    if isinstance(value, torch.Tensor) and value.dtype in INTEGERS and not name.startswith(("sgl", "flash", "vllm"))
]
LOW, HIGH = -(2**31), 2**31 - 1


def with_backends(arguments):
    """Each with the options of two backends, where there are any."""
    both = ({"backend": "auto"}, {"backend": "torch"})
    found = [
        (name, argument, options) for name, argument in arguments for options in (both if CALLS[name].op else ({},))
    ]
    return pytest.mark.parametrize(("name", "argument", "options"), found, ids=str)


@with_backends(ARGUMENTS)
def test_the_other_dtype(name, argument, options):
    """Of every integer tensor of every public function: the same bits."""
    value = CALLS[name].arguments[argument]
    if argument == "seeds":
        value = value % 2**31
    other = torch.int32 if value.dtype == torch.int64 else torch.int64
    wanted = run(name, **{argument: value}, **options)
    assert not differs(run(name, **{argument: value.to(other)}, **options), wanted)


def test_every_argument_is_there():
    """So that a new one is not left out: those that the docs call int32 or int64."""
    named = {argument for _, argument in ARGUMENTS}
    assert named >= {"context_lens", "query_start", "page_table", "positions", "seeds", "top_k", "num_steps", "parents"}
    assert named >= {"num_nodes", "slots", "requests", "draft_tokens"}


# What may be out of range on the device: there a number that int32 can't hold is as good as the greatest it can.
BEYOND = [(name, argument) for name, argument in ARGUMENTS if argument not in ("seeds", "num_accepted", "num_drafted")]


@with_backends(BEYOND)
def test_beyond_int32(name, argument, options):
    """They do not wrap around: 2^32 + 3 is not 3."""
    value = CALLS[name].arguments[argument].clone()
    for number, limit in ((2**32 + 3, HIGH), (2**63 - 1, HIGH), (-(2**32) + 3, LOW), (-(2**63), LOW)):
        given, saturated = value.long(), value.clone()
        given.view(-1)[-1], saturated.view(-1)[-1] = number, limit
        assert outcome(name, {argument: given, **options}) == outcome(name, {argument: saturated, **options})


def outcome(name, changes):
    """The bytes of the results, or what is said on the CPU of a length beyond the cache."""
    try:
        return [
            (tensor.dtype, tensor.contiguous().view(torch.uint8).numpy().tobytes()) for tensor in run(name, **changes)
        ]
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("name", ["sample_tokens", "sample_children", "match_accept", "tree_accept"])
def test_unsigned_seeds(name):
    """64 bits are 64 bits; fewer are converted."""
    signed = torch.tensor([-1, 2**31 + 5])
    wanted = run(name, seeds=signed)
    assert not differs(run(name, seeds=signed.view(torch.uint64)), wanted)
    both = run(name, seeds=torch.tensor([7, 2**31 + 5]))
    assert not differs(run(name, seeds=torch.tensor([7, 2**31 + 5]).to(torch.uint32)), both)
    first = run(name, seeds=2**64 - 1)
    assert all(torch.equal(mine[:1], theirs[:1]) for mine, theirs in zip(first, wanted, strict=True))


PER_REQUEST = ("seeds", "positions", "top_k", "context_lens")
PER_ROW = ("kv_append packed", "kv_propagate")  # where positions are not of requests
FOR_ALL = [(name, argument) for name, argument in ARGUMENTS if argument in PER_REQUEST and name not in PER_ROW]


@pytest.mark.parametrize(("name", "argument"), FOR_ALL, ids=str)
def test_without_dimensions(name, argument):
    """Such a tensor counts for all requests, as an int does."""
    assert not differs(run(name, **{argument: torch.tensor(3)}), run(name, **{argument: 3}))


def test_float_settings_without_dimensions():
    """Temperature and top_p too."""
    for setting in ({"temperature": torch.tensor(0.5)}, {"top_p": torch.tensor(0.5)}):
        wanted = run("sample_tokens", **{name: value.item() for name, value in setting.items()})
        assert not differs(run("sample_tokens", **setting), wanted)


def decode(q, k_cache, v_cache, parents, num_nodes, lengths, table):
    """A step whose integers are all int64."""
    topology = build_topology(parents, num_nodes)
    return tree_attention(q, k_cache, v_cache, topology, lengths, page_table=table, query_start=lengths * 0)


def test_compiled_and_fake():
    """The conversion is a part of the graph, which has no breaks; shapes follow without running."""
    arguments = CALLS["tree_attention paged"].arguments
    inputs = [arguments[name] for name in ("q", "k_cache", "v_cache")]
    inputs += [torch.tensor([[-1, 0, 0], [-1, 0, 1]]), torch.tensor([3, 2]), torch.tensor([20, 9])]
    inputs += [arguments["page_table"].long()]
    torch._dynamo.reset()
    wanted = decode(*inputs)
    assert torch.equal(decode(*[tensor.int() if tensor.dtype == torch.int64 else tensor for tensor in inputs]), wanted)
    assert torch.equal(torch.compile(decode, fullgraph=True, backend="aot_eager")(*inputs), wanted)
    with FakeTensorMode() as mode:
        fake = decode(*map(mode.from_tensor, inputs))
    assert (fake.shape, fake.dtype) == (wanted.shape, wanted.dtype)


def test_numpy():
    """Its default dtypes, through DLPack."""
    call = CALLS["tree_accept"].arguments
    arrays = {name: value.numpy() if isinstance(value, torch.Tensor) else value for name, value in call.items()}
    arrays |= {name: arrays[name].astype(np.int64) for name in ("draft_tokens", "positions", "top_k")}
    first = arrays.pop("target_logits")
    got = dlpack.tree_accept(
        first,
        **arrays,
    )
    wanted = run("tree_accept")
    for index, field in enumerate(dataclasses.fields(got)):
        np.testing.assert_array_equal(getattr(got, field.name), wanted[index].numpy())
    arrays["seeds"] = np.array([7, 2**40], np.uint64)
    np.testing.assert_array_equal(dlpack.tree_accept(first, **arrays).tokens, got.tokens)


def test_layer_cache():
    """The parents of a level."""
    caches = [LayerCache((1,), 8, 2, 64, 4) for _ in range(2)]
    for cache, dtype in zip(caches, INTEGERS, strict=True):
        cache.append(torch.ones(3, 4), torch.tensor([-1, 0, 2**40], dtype=torch.int64).clamp(max=99).to(dtype))
    topologies = [cache.run(0).topology for cache in caches]
    assert torch.equal(topologies[0].parents, topologies[1].parents)
    cache = LayerCache((1,), 8, 2, 64, 4)
    cache.append(torch.ones(3, 4), torch.tensor([-1, 0, 2**32]))  # not node 0
    assert cache.run(0).topology.parents.tolist() == [[-1, 0, -1]]


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_tokens_that_are_too_great_are_not_the_same(backend):
    target = torch.tensor([[2**32 + 1, 5]])
    got = greedy_accept(target, torch.tensor([[0, 2**33 + 7]]), Tree.chain(2).to("cpu"), backend=backend)
    assert got.num_accepted.tolist() == [0]
    assert got.status.tolist() == [AcceptStatus.DRAFT_TOKEN_IMPOSSIBLE]


def test_positions_of_a_topology():
    """Also that an embedding takes them after the clamp which the docs name, and not before."""
    topology = Topology.from_trees([Tree.chain(3), Tree.chain(2)])
    ids = topology.position_ids(torch.tensor([5, 2**40]))
    assert ids.dtype == torch.int32
    assert ids[0].tolist() == [5, 6, 7]
    assert ids[1].tolist() == [2**31 - 4, 2**31 - 3, -1]  # as far as all depths fit
    ids = topology.position_ids(int32(5, 9))
    table = torch.nn.Embedding(16, 2)
    with pytest.raises(IndexError):
        table(ids)
    assert table(ids.clamp(min=0)).shape == (2, 3, 2)
