"""LayerCache: whatever exits, rejections and trees came before, each row is that of a full pass from scratch."""

import functools
import random

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.kv.layer_cases import VOCAB, Toy

EXITS = (1, 3, 5)


def draw(rng, count):
    return [rng.randrange(VOCAB) for _ in range(count)]


def assert_rows(model, cache, group, newest, sequences):
    """`newest` are the last tokens of these sequences, after the layers of `group`."""
    assert len(newest) == len(sequences)
    for row, sequence in zip(newest, sequences, strict=True):
        expected = model.from_scratch(sequence)[cache.exits[group] - 1]
        torch.testing.assert_close(row, expected, rtol=1e-11, atol=1e-11)


def feed(model, cache, rows, parents, sequences, depth):
    """Append, run the groups up to `depth`, and check the newest rows at each exit."""
    cache.append(model.embedding[rows], parents)
    for group in range(depth + 1):
        assert_rows(model, cache, group, model.step(cache, group), sequences)


@pytest.mark.parametrize("seed", range(4))
def test_chain_with_random_exits_and_rejections(seed):
    rng, model = random.Random(seed), Toy()
    cache = model.cache(EXITS, 64)
    tokens = draw(rng, 7)
    cache.append(model.embedding[tokens])
    for group in range(cache.groups):
        assert_rows(model, cache, group, model.step(cache, group)[-1:], [tokens])
    depths = set()
    for _ in range(6):
        start = len(tokens)
        for _ in range(rng.randint(1, 5)):
            tokens += draw(rng, 1)
            depth = rng.choice((0, 0, 1, 1, 2))
            depths.add(depth)
            feed(model, cache, tokens[-1:], None, [tokens], depth)
            check_lengths(cache)
        keep = rng.randint(start, len(tokens))  # rejected from here on
        tokens = tokens[:keep]
        cache.crop(keep)
        assert cache.lengths[0] == (keep,)
    assert depths == {0, 1, 2}


def check_lengths(cache):
    lengths = cache.lengths
    for boundary in range(cache.groups):
        start, rows = cache.pending(boundary)
        assert start == lengths[boundary + 1][0]
        assert len(rows) == lengths[boundary][0] - lengths[boundary + 1][0] >= 0


@pytest.mark.parametrize("seed", range(4))
def test_trees_whose_levels_exit_at_different_depths(seed):
    rng, model = random.Random(seed), Toy()
    cache = model.cache(EXITS, 96)
    tokens = draw(rng, 5)
    feed(model, cache, tokens[:-1], None, [tokens[: i + 1] for i in range(4)], 2)
    feed(model, cache, tokens[-1:], None, [tokens], rng.choice((0, 2)))
    for _ in range(4):
        context, nodes, frontier = list(tokens), [], [-1]
        for _ in range(rng.randint(1, 4)):
            parents = sorted(rng.choice(frontier) for _ in range(rng.randint(1, 4)))
            first = len(nodes)
            nodes += [(p, t) for p, t in zip(parents, draw(rng, len(parents)), strict=True)]
            frontier = list(range(first, len(nodes)))
            sequences = [context + path_tokens(nodes, node) for node in frontier]
            level = torch.tensor(parents, dtype=torch.int32)
            feed(model, cache, [t for _, t in nodes[first:]], level, sequences, rng.choice((0, 1, 2)))
        accepted = path(nodes, rng.randrange(len(nodes)))[: rng.randint(0, 4)]
        cache.commit([accepted])
        tokens = context + [nodes[node][1] for node in accepted]
        assert cache.lengths[0] == (len(tokens),)
        check_lengths(cache)
        tokens += draw(rng, 1)  # the target's own token, and a first look at what was committed
        feed(model, cache, tokens[-1:], None, [tokens], rng.choice((0, 1, 2)))


def path(nodes, node):
    return [] if node < 0 else [*path(nodes, nodes[node][0]), node]


def path_tokens(nodes, node):
    return [nodes[n][1] for n in path(nodes, node)]


def test_a_ragged_batch():
    """Requests with prompts, exits, trees and rejections of their own."""
    rng, model = random.Random(3), Toy()
    cache = model.cache(EXITS, 48, batch=3)
    tokens = [draw(rng, n) for n in (6, 1, 3)]
    cache.append(model.embedding[[t for part in tokens for t in part]], counts=[6, 1, 3])
    for group in range(3):
        newest = model.step(cache, group)
        assert_rows(model, cache, group, newest[[5, 6, 9]], tokens)
    for _ in range(8):
        counts = [rng.randint(0, 2) for _ in tokens]
        added = [draw(rng, n) for n in counts]
        cache.append(model.embedding[[t for part in added for t in part]], counts=counts)
        tokens = [old + new for old, new in zip(tokens, added, strict=True)]
        deeper = [True] * 3
        for group in range(3):
            newest = model.step(cache, group, requests=deeper)
            sequences = [
                seq[: len(seq) - n + i + 1]
                for seq, n, active in zip(tokens, counts, deeper, strict=True)
                for i in range(n)
                if active
            ]
            assert_rows(model, cache, group, newest, sequences)
            deeper = [active and rng.random() < 0.6 for active in deeper]
        keep = [rng.randint(max(1, len(seq) - 2), len(seq)) for seq in tokens]
        tokens = [seq[:n] for seq, n in zip(tokens, keep, strict=True)]
        cache.crop(torch.tensor(keep))
        assert cache.lengths[0] == tuple(keep)


def test_a_batch_of_trees():
    """One request grows a tree and the other doesn't; the accepted path is longer in the groups that saw it."""
    model = Toy()
    cache = model.cache((2, 5), 32, batch=2)
    tokens = [[1, 2, 3], [4, 5]]
    cache.append(model.embedding[[1, 2, 3, 4, 5]], counts=[3, 2])
    model.step(cache, 0)  # the prompts are pending at boundary 1
    cache.append(model.embedding[[6, 7, 8]], torch.tensor([-1, -1, 1], dtype=torch.int32), counts=[3, 0])
    sequences = [tokens[0] + [6], tokens[0] + [7], tokens[0] + [7, 8]]
    assert_rows(model, cache, 0, model.step(cache, 0), sequences)
    newest = model.step(cache, 1)
    assert_rows(model, cache, 1, newest[:3], sequences)
    cache.append(model.embedding[[9, 10]], torch.tensor([2, 0], dtype=torch.int32), counts=[2, 0])
    assert_rows(model, cache, 0, model.step(cache, 0), [sequences[2] + [9], sequences[0] + [10]])
    cache.commit(torch.tensor([[1, 2, 3], [-1, -1, -1]]))
    assert cache.lengths == ((6, 2), (6, 2), (5, 2))
    cache.append(model.embedding[[11, 12]])
    for group in range(2):
        assert_rows(model, cache, group, model.step(cache, group), [[1, 2, 3, 7, 8, 9, 11], [4, 5, 12]])


@pytest.mark.parametrize("most", [1, 3, 100])
def test_a_prompt_in_chunks(most):
    model, tokens = Toy(), draw(random.Random(1), 8)
    cache = model.cache(EXITS, 16)
    cache.append(model.embedding[tokens])
    for group in range(3):
        parts = []
        while len(cache.pending(group)[1]):
            parts.append(model.step(cache, group, most=most))
        assert_rows(model, cache, group, torch.cat(parts), [tokens[: i + 1] for i in range(8)])


def test_kernels_in_float32():
    """The same through the CPU kernels, against float64."""
    model, tokens = Toy(), draw(random.Random(2), 9)
    for w in model.layers:
        w.update({name: tensor.float() for name, tensor in w.items()})
    exact = Toy()
    model.embedding = model.embedding.float()
    cache = model.cache(EXITS, 16, dtype=torch.float32, backend="auto")
    cache.append(model.embedding[tokens])
    model.step(cache, 0)
    cache.append(model.embedding[[3, 4, 5]], torch.tensor([-1, -1, 0], dtype=torch.int32))
    for group in range(3):
        newest = model.step(cache, group)
    for row, tail in zip(newest, ([3], [4], [3, 5]), strict=True):
        torch.testing.assert_close(row.double(), exact.from_scratch(tokens + tail)[-1], rtol=1e-4, atol=1e-4)


class Recorder(TorchDispatchMode):
    """The names of all operators called."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.name())
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("batch", [1, 2])
def test_nothing_reads_from_the_device(batch):
    """On a GPU these operators would wait: a value read by the host, or a shape that depends on values."""
    model = Toy()
    for w in model.layers:
        w.update({name: tensor.float() for name, tensor in w.items()})
    model.embedding = model.embedding.float()
    cache = model.cache(EXITS, 32, batch, dtype=torch.float32, backend="cpu")
    rows, parents = torch.arange(6 * batch), torch.tensor([-1, -1, 0] * batch, dtype=torch.int32)
    with Recorder() as recorder:
        cache.append(model.embedding[rows])
        model.step(cache, 0)
        model.step(cache, 1)
        cache.crop([5, 4][:batch])
        cache.append(model.embedding[rows[: 3 * batch]], parents)
        for group in range(3):
            model.step(cache, group)
        cache.commit([[0, 2], [1]][:batch])
    assert {"specdec_ops::tree_attention", "specdec_ops::build_topology"} <= recorder.names
    waits = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique")
    assert not [name for name in recorder.names if name.removeprefix("aten::").split(".")[0] in waits]


def test_committed_rows_are_not_new():
    """A deeper group that catches up after a commit returns none of them for a decision."""
    model = Toy()
    cache = model.cache(EXITS, 16)
    cache.append(model.embedding[[1, 2]])
    model.step(cache, 0)
    cache.append(model.embedding[[3]], torch.tensor([-1], dtype=torch.int32))
    assert len(model.step(cache, 0)) == 1
    cache.commit([[0]])
    assert len(model.step(cache, 1)) == 0
    cache.append(model.embedding[[4]])
    for group in range(3):
        assert_rows(model, cache, group, model.step(cache, group), [[1, 2, 3, 4]])


def test_a_parent_that_is_not_earlier_becomes_the_context():
    model = Toy()
    cache = model.cache(EXITS, 16)
    cache.append(model.embedding[[1, 2]])
    model.step(cache, 0)
    cache.append(model.embedding[[3, 4, 5]], torch.tensor([0, 2, -7], dtype=torch.int32))
    assert_rows(model, cache, 0, model.step(cache, 0), [[1, 2, 3], [1, 2, 4], [1, 2, 5]])


def test_one_exit_is_a_plain_cache():
    """Nothing is pending after a step; a tree goes in behind a chain, and its accepted path stays."""
    rng, model = random.Random(1), Toy()
    cache = model.cache((5,), 32)
    tokens = draw(rng, 6)
    cache.append(model.embedding[tokens])
    assert_rows(model, cache, 0, model.step(cache, 0)[-1:], [tokens])
    for accepted in ((0, 2, 4), (1,)):
        drafted, parents = draw(rng, 5), [-1, -1, 0, 1, 2]
        nodes = list(zip(parents, drafted, strict=True))
        sequences = [tokens + path_tokens(nodes, node) for node in range(5)]
        feed(model, cache, drafted, torch.tensor(parents), sequences, 0)
        cache.commit([accepted])
        tokens = sequences[accepted[-1]]
        assert cache.lengths == ((len(tokens),), (len(tokens),)) and len(cache.pending(0)[1]) == 0
    feed(model, cache, [3], None, [[*tokens, 3]], 0)


def test_self_speculation():
    """The target's first two layers draft; its others verify all drafted tokens in one run, without the first two."""
    rng, model = random.Random(2), Toy()
    cache = model.cache((2, 5), 64)
    tokens = draw(rng, 4)
    cache.append(model.embedding[tokens])
    model.step(cache, 0), model.step(cache, 1)
    for drafts, accepted in ((4, 2), (3, 3), (1, 0)):
        tokens += draw(rng, 1)  # what the target said last
        for step in range(drafts + 1):  # the last drafted token goes through the draft's layers, too
            feed(model, cache, tokens[-1:], None, [tokens], 0)
            tokens += draw(rng, 1) if step < drafts else []
        run = cache.run(1)
        assert run.counts == (drafts + 1,) and list(cache.layers(1)) == [2, 3, 4]
        hidden = run.hidden
        for layer in cache.layers(1):
            attend = functools.partial(cache.attend, run, layer)
            hidden = model.layer(layer, hidden, run.positions, attend)
        cache.finish(run, hidden)
        known = len(tokens) - drafts
        assert_rows(model, cache, 1, hidden, [tokens[: known + step] for step in range(drafts + 1)])
        tokens = tokens[: known + accepted]
        cache.crop(len(tokens))
