"""Keys, values and pending rows of a sorted draft: after every round, to the last bit, those of passes from scratch."""

import random

import pytest
import torch

from specdec_ops import LayerCache, drafts
from specdec_ops.decode import Cache, Engine, Sampling
from specdec_ops.drafts import TreeShape
from specdec_ops.drafts.sorted_cache import Part, SortedCache, SortedSequence
from tests.decode.test_engine import PROMPTS, samplings
from tests.decode.test_sorted import EXITS, MIXED, MODEL, SHAPE, TARGET, draft, rows_from_scratch
from tests.harness.tiny_models import HEAD_DIM, KV_HEADS


def made_cache(exits: tuple[int, ...], pages: int, page_size: int) -> SortedCache:
    return SortedCache(MODEL, exits, Cache(MODEL.shape._replace(layers=exits[-1]), pages, page_size))


def kv_from_scratch(ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [layers, len(ids), kv_heads, head_dim] of the draft, in a cache with one page."""
    cache = made_cache((EXITS[-1],), 1, 512)
    own = SortedSequence(1)
    cache.pages.reserve(own, len(ids))
    table = cache.pages.page_table([own])
    for start in range(len(ids)):
        cache.read([own], [ids[: start + 1]], table)
    return tuple(torch.stack(caches)[:, 0, : len(ids)] for caches in (cache.pages.k_caches, cache.pages.v_caches))


def slots_of(cache, own: SortedSequence, count: int) -> list[torch.Tensor]:
    """The same of a request in a paged cache, for its first slots."""
    slots, size = torch.arange(count), cache.pool.page_size
    places = torch.tensor(own.pages)[slots // size], slots % size
    return [torch.stack([layer[places] for layer in caches]) for caches in (cache.k_caches, cache.v_caches)]


def assert_follows(proposer, request) -> None:
    """Every group has what a pass over the text would give it, and what waits before it is what would enter it."""
    own, ids, cache = request.draft_state, request.ids, proposer.cache.pages
    assert sorted(own.lengths, reverse=True) == own.lengths and own.lengths[0] < len(ids)
    expected = kv_from_scratch(ids[: own.lengths[0]])
    layers = list(zip((0, *EXITS), EXITS, strict=False))
    for group, (first, last) in enumerate(layers):
        length = own.lengths[group]
        for got, true in zip(slots_of(cache, own, length), expected, strict=True):
            assert_same(got[first:last], true[first:last, :length], cache)
        if group:
            stop, rows = own.lengths[group - 1], own.rows(group)
            assert (0 if rows is None else len(rows)) == stop - length
            if stop > length:
                assert_same(rows, rows_from_scratch(MODEL, ids[:stop], first)[length:], cache)


def assert_same(got: torch.Tensor, expected: torch.Tensor, cache) -> None:
    bound = 0.0 if cache._is_exact else 1e-5
    torch.testing.assert_close(got, expected, rtol=bound, atol=bound)


def watched(made: drafts.Sorted, prompts=PROMPTS, asked=None, **options) -> Engine:
    """Decode, and look at every request after every round."""
    engine = Engine(TARGET, made, **{"max_batch": 3, "adapt": False, **options})
    lags = set()
    for prompt, sampling in zip(prompts, asked or samplings(0.5), strict=True):
        engine.submit(prompt, sampling)
    while not engine.is_idle:
        engine.step()
        for request in engine.scheduler.running:
            if request.draft_state is not None and request.draft_state.lengths[0]:
                assert_follows(engine.proposer, request)
                lags.add(request.draft_state.lengths[0] - request.draft_state.lengths[-1])
    assert len(lags) > 2, "requests are meant to lag behind by different numbers of rows"
    return engine


@pytest.mark.parametrize("tree", [None, SHAPE, TreeShape(4, 2, 3, 7), TreeShape(2, 9, 9, 40)])
@pytest.mark.parametrize("thresholds", [MIXED, (0.5, 0.5, 0.0), (0.9, 0.4, 0.0)])
def test_each_group_has_what_a_full_pass_gives(tree, thresholds):
    engine = watched(draft(thresholds, steps=4, tree=tree))
    assert engine.proposer.counts.left[0] and engine.proposer.counts.left[-1]


@pytest.mark.parametrize("tree", [None, SHAPE], ids=["chain", "tree"])
def test_a_long_prompt_is_caught_up_with_in_chunks(tree):
    """It waits before the second group until a token goes there."""
    rng = random.Random(4)
    prompts = [[rng.randrange(40) for _ in range(count)] for count in (300, 270, 3)]
    asked = [Sampling(max_tokens=12, seed=seed) for seed in range(3)]
    engine = Engine(TARGET, draft((0.0, 0.0, 0.0), tree=tree), max_batch=3, adapt=False)
    for prompt, sampling in zip(prompts, asked, strict=True):
        engine.submit(prompt, sampling)
    while not engine.is_idle:
        engine.step()
        drafting = [r for r in engine.scheduler.running if r.draft_state is not None and r.draft_state.lengths[0]]
        for request in drafting:
            assert request.draft_state.lengths[1:] == [0, 0]
            assert_follows(engine.proposer, request)
        if drafting and drafting[0].draft_state.lengths[0] > 302:
            engine.proposer.draft = draft((0.5, 0.6, 0.0), tree=tree)  # from here on tokens go deeper
            break
    while not engine.is_idle:
        engine.step()
        for request in engine.scheduler.running:
            assert_follows(engine.proposer, request)
    assert all(engine.proposer.counts.left)


def test_no_layer_runs_what_no_exit_asks_for():
    """Rows of a group are those of its requests that went deeper, with all that lagged behind, each of them once."""
    engine = Engine(TARGET, draft(steps=4), max_batch=1, adapt=False)
    cache, expected, run = engine.proposer.cache, 0, engine.proposer.cache.run
    ran = []

    def counted(group, sequences, rows, sizes):
        ran.append((group, [own.lengths[group] for own in sequences], list(sizes)))
        return run(group, sequences, rows, sizes)

    cache.run = counted
    engine.generate(PROMPTS[:2], Sampling(max_tokens=20))
    per_layer = [0, 0, 0]
    for group, _, sizes in ran:
        expected += sum(sizes) * (EXITS[group] - (0, *EXITS)[group])
        per_layer[group] += sum(sizes)
    counts = engine.proposer.counts
    assert counts.layer_rows == expected
    assert per_layer[0] > per_layer[1] > per_layer[2] > 0
    judged = counts.left[0] + 2 * counts.left[1] + 3 * counts.left[2]
    assert counts.layer_passes == sum(EXITS[group] - (0, *EXITS)[group] for group, *_ in ran)
    assert counts.head_passes == counts.head_rows == judged, "every token asks each exit up to its own once"


def test_rows_are_those_of_a_layer_cache():
    """The same steps through `specdec_ops.LayerCache`, which has no pages: the same lengths and the same rows."""
    own, flat = SortedSequence(3), LayerCache(EXITS, 64, KV_HEADS, HEAD_DIM, MODEL.shape.dim)
    cache = made_cache(EXITS, 16, 4)
    cache.pages.reserve(own, 40)
    part = Part([own], cache.pages.page_table([own]))
    rng, ids = random.Random(5), [1, 2, 3, 4, 5]
    embed = torch.nn.functional.embedding
    for depth in (0, 2, 1, 0, 0, 1, 2, 0):
        flat.append(embed(torch.tensor(ids[flat.lengths[0][0] :]), MODEL.embedding))
        cache.read([own], [ids], part.page_table)
        for group in range(1, depth + 1):
            cache.deeper(group, part, 1)
        for group in range(depth + 1):
            _through(flat, group)
        assert [length[0] for length in flat.lengths[1:]] == own.lengths
        for group in (1, 2):
            _, rows = flat.pending(group)
            mine = own.rows(group)
            assert len(rows) == (0 if mine is None else len(mine))
            if mine is not None:
                torch.testing.assert_close(mine, rows, rtol=1e-4, atol=1e-5)
        keep = len(ids) - rng.randrange(3)
        own.crop(keep), flat.crop(keep)
        ids = ids[:keep] + [rng.randrange(40) for _ in range(2)]


def _through(flat: LayerCache, group: int) -> None:
    """A group of the model's layers over a LayerCache, with nothing of the engine's cache."""
    run = flat.run(group)
    hidden = run.hidden
    for index in flat.layers(group):
        layer = MODEL.layers[index]
        attention = layer.attention
        qkv = attention.qkv(hidden, layer.attention_norm).view(len(hidden), -1, HEAD_DIM)
        q, k, v = qkv.split((attention.heads, KV_HEADS, KV_HEADS), dim=1)
        q, k = (_turned(some, attention.rope, run.positions.long()) for some in (q, k))
        out = flat.attend(run, index, q, k, v.contiguous())
        hidden = layer.mlp(attended := attention.out(out.flatten(1), residual=hidden), layer.mlp_norm, attended)
    flat.finish(run, hidden)


def _turned(x: torch.Tensor, rope, positions: torch.Tensor) -> torch.Tensor:
    cosines, sines = (table[positions][:, None] for table in (rope.cosines, rope.sines))
    low, high = x.chunk(2, dim=-1)
    return torch.cat((low * cosines - high * sines, high * cosines + low * sines), dim=-1)


# What the test of each group is worth.


def crop_of_the_authors(self, length: int) -> None:
    """`get_candidates` of parsareal/SD2: an entry's start is one too small, so a rejected row too many survives."""
    old, self.lengths = self.lengths, [min(own, length) for own in self.lengths]
    for group in range(1, len(old)):
        kept = min(self.lengths[group - 1] - self.lengths[group] + 1, old[group - 1] - old[group])
        if kept < old[group - 1] - old[group]:
            self.pending[group] = [self.rows(group)[:kept]] if kept else []


def crop_without_pending(self, length: int) -> None:
    """Only keys and values are cropped: rows of rejected tokens wait on."""
    self.lengths = [min(own, length) for own in self.lengths]


def commit_as_if_in_place(self, path) -> None:
    """A tree's pending rows are taken for a chain."""
    old, count = self.lengths, self.root + len(path)
    self.lengths = [min(own, count) for own in old]
    for group in range(1, len(old)):
        kept = self.lengths[group - 1] - self.lengths[group]
        if kept < old[group - 1] - old[group]:
            self.pending[group] = [self.rows(group)[:kept]] if kept else []


@pytest.mark.parametrize(
    ("name", "wrong", "tree"),
    [
        ("crop", crop_of_the_authors, None),
        ("crop", crop_without_pending, None),
        ("commit", commit_as_if_in_place, SHAPE),
    ],
    ids=["crop of the authors", "crop without pending rows", "commit in place"],
)
def test_wrong_bookkeeping_is_found(name, wrong, tree, monkeypatch):
    monkeypatch.setattr(SortedSequence, name, wrong)
    with pytest.raises((AssertionError, RuntimeError)):
        watched(draft(steps=4, tree=tree))


@pytest.mark.parametrize("exits", [(1, 3), (1, 2, 3)])
def test_the_authors_case_exactly_one_rejected_token(exits):
    """A token leaves early and is the one that is rejected: its row must not enter the deeper layers."""
    own = SortedSequence(len(exits))
    cache = made_cache(exits, 8, 8)
    cache.pages.reserve(own, 20)
    part = Part([own], cache.pages.page_table([own]))
    ids = [3, 1, 4, 1, 5]
    cache.read([own], [ids], part.page_table)
    for group in range(1, len(exits)):
        cache.deeper(group, part, 1)
    cache.read([own], [[*ids, 9]], part.page_table)  # 9 leaves at the first exit
    own.crop(len(ids))
    assert own.lengths == [len(ids)] * len(exits) and own.rows(1) is None
    cache.read([own], [[*ids, 2, 6]], part.page_table)
    for group in range(1, len(exits)):
        newest = cache.deeper(group, part, 2)
        assert_same(newest, rows_from_scratch(MODEL, [*ids, 2, 6], exits[group])[-2:], cache.pages)
