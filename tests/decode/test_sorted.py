"""Sorted drafts in the engine: texts of plain decoding, and drafts that are those of full passes from scratch."""

import dataclasses
import functools

import pytest
import torch

from specdec_ops import Tree, drafts
from specdec_ops.decode import Cache, Engine, Rows, Sampling
from specdec_ops.decode.cache import Sequence
from specdec_ops.decode.decoder import Norm
from specdec_ops.drafts import TreeShape
from specdec_ops.ops.linear.quantized_weight import quantize_linear
from tests.decode import test_engine_law as law
from tests.decode.test_engine import PROMPTS, by_hand, samplings
from tests.harness.tiny_models import DIM, first_layers, joined_late, make_decoder

TARGET = make_decoder(1, layers=4)
MODEL = first_layers(TARGET, 3)
EXITS, MIXED = (1, 2, 3), (0.7, 0.6, 0.0)
SHAPE = TreeShape(levels=3, width=3, branching=4, nodes=9)


def draft(thresholds=MIXED, exits=EXITS, model=MODEL, **options) -> drafts.Sorted:
    return drafts.Sorted(model, exits, thresholds, **{"head": None, **options})


DRAFTS = {
    "chain": lambda: draft(steps=4),
    "chain, always first": lambda: draft((0.0, 0.0, 0.0), steps=3),
    "chain, always last": lambda: draft((2.0, 2.0, 2.0), steps=3),
    "chain, one exit": lambda: draft((0.0,), (2,), steps=1),
    "chain, hot int8 head": lambda: draft(steps=3, hot_vocab=torch.arange(0, 40, 2), head="int8"),
    "tree": lambda: draft(tree=SHAPE),
    "tree, always first": lambda: draft((0.0, 0.0, 0.0), tree=SHAPE),
    "tree, always last": lambda: draft((2.0, 2.0, 2.0), tree=SHAPE),
    "tree, hot int8 head": lambda: draft(tree=TreeShape(4, 2, 2, 6), hot_vocab=torch.arange(1, 40, 2), head="int8"),
    "tree, wide": lambda: draft(tree=TreeShape(2, 40, 16, 120)),
}


@pytest.fixture(scope="module", params=[0.0, 0.9], ids=["greedy", "sampled"])
def expected(request):
    asked = samplings(request.param)
    return asked, [by_hand(prompt, sampling, TARGET) for prompt, sampling in zip(PROMPTS, asked, strict=True)]


@pytest.mark.parametrize("name", DRAFTS)
def test_text_is_that_of_plain_decoding(name, expected):
    asked, texts = expected
    engine = Engine(TARGET, DRAFTS[name](), max_batch=3, adapt=False)
    assert engine.rule == "match"
    results = engine.generate(PROMPTS, asked)
    assert [result.tokens for result in results] == texts
    assert engine.is_idle and engine.cache.pool.free == engine.cache.pool.pages
    pool, counts = engine.proposer.cache.pages.pool, engine.proposer.counts
    assert pool.free == pool.pages
    assert sum(result.stats.accepted for result in results) > 0, "the draft is meant to be right now and then"
    if "always" in name:
        assert [count > 0 for count in counts.left] == (
            [True, False, False] if "first" in name else [False] * 2 + [True]
        )
    elif len(counts.left) > 1:
        assert all(counts.left), "the thresholds are meant to let some tokens leave at each exit"


def rounds_of(results) -> list[tuple[int, int]]:
    return [(result.stats.accepted, result.stats.target_calls) for result in results]


@pytest.mark.parametrize("name", ["chain", "tree"])
def test_a_request_does_not_depend_on_the_others(name, expected):
    """Joining late, in another order, beside one that doesn't speculate: the same drafts, so the same rounds."""
    asked, texts = expected
    alone = [
        Engine(TARGET, DRAFTS[name](), max_batch=1, adapt=False).generate([prompt], sampling)[0]
        for prompt, sampling in zip(PROMPTS, asked, strict=True)
    ]
    engine = Engine(TARGET, DRAFTS[name](), max_batch=4, adapt=False)
    results = joined_late(engine, PROMPTS, asked)
    assert [result.tokens for result in results] == texts
    assert rounds_of(results) == rounds_of(alone)


@pytest.mark.parametrize("name", ["chain", "tree"])
def test_rounds_without_the_draft_are_caught_up_with(name, expected, monkeypatch):
    asked, texts = expected
    engine = Engine(TARGET, DRAFTS[name](), max_batch=3)
    monkeypatch.setattr(engine, "_warn_of_loss", lambda pace: None)
    turns = iter([True, False, False, True, False] * 100)
    monkeypatch.setattr("specdec_ops.decode.pace.Pace.wants_draft", lambda self: next(turns))
    results = engine.generate(PROMPTS, asked)
    assert [result.tokens for result in results] == texts
    assert sum(result.stats.accepted for result in results) > 0


TARGETS = (TARGET, make_decoder(7), dataclasses.replace(MODEL, norm=MODEL.norm._replace(eps=1e-3)))


@pytest.mark.parametrize("name", ["chain", "tree"])
def test_one_draft_serves_three_targets_at_once(name):
    """The paper's scenario: another target takes its turn between any two rounds of one, in one process."""
    shared = DRAFTS[name]()
    asked = samplings(0.7)
    engines = [Engine(target, shared, max_batch=2, adapt=False) for target in TARGETS]
    numbers = [[engine.submit(*task) for task in zip(PROMPTS, asked, strict=True)] for engine in engines]
    results = [{} for _ in engines]
    while not all(engine.is_idle for engine in engines):
        for engine, found in zip(engines, results, strict=True):
            found |= {chunk.request: chunk.result for chunk in engine.step() if chunk.result is not None}
    for engine, found, order in zip(engines, results, numbers, strict=True):
        alone = Engine(engine.target, DRAFTS[name](), max_batch=2, adapt=False)
        expected = alone.generate(PROMPTS, asked)
        together = [found[number] for number in order]
        texts = [by_hand(prompt, sampling, engine.target) for prompt, sampling in zip(PROMPTS, asked, strict=True)]
        assert [result.tokens for result in together] == texts
        assert rounds_of(together) == rounds_of(expected)
        assert engine.proposer.counts == alone.proposer.counts


# What is drafted, against passes over whole texts.


def rows_from_scratch(model, ids: list[int], layers: int) -> torch.Tensor:
    """[len(ids), dim]: after the first layers, in a cache of its own."""
    cache, sequence = Cache(model.shape, 32), Sequence()
    cache.reserve(sequence, len(ids))
    rows = Rows(
        torch.tensor([ids], dtype=torch.int32),
        Tree.chain(len(ids)).to("cpu"),
        torch.zeros(1, dtype=torch.int32),
        cache.page_table([sequence]),
    )
    return model.forward(rows, cache, layers=(0, layers), want=False).hidden


def law_from_scratch(made: drafts.Sorted, ids: list[int], layers: int) -> torch.Tensor:
    """float64 [vocab]: the sub-model's next-token probabilities; 0 outside of the hot vocabulary."""
    model = made.model
    hidden = rows_from_scratch(model, ids, layers)[-1].double()
    normed = hidden * (hidden.square().mean() + model.norm.eps).rsqrt() * model.norm.weight.double()
    logits = model.head.weight.double() @ normed
    if made.hot_vocab is not None:
        allowed = torch.zeros(len(logits), dtype=torch.bool)
        allowed[made.hot_vocab.long()] = True
        logits = logits.masked_fill(~allowed, float("-inf"))
    return logits.softmax(0)


def chain_from_scratch(made: drafts.Sorted, ids: list[int]) -> tuple[list[int], list[int]]:
    """Tokens, and at which exit each has left."""
    text, left = list(ids), []
    for _ in range(made.steps):
        for layers, threshold in zip(made.exits, made.thresholds, strict=True):
            chances = law_from_scratch(made, text, layers)
            if chances.max() >= threshold or layers == made.exits[-1]:
                break
        text.append(int(chances.argmax()))
        left.append(made.exits.index(layers))
    return text[len(ids) :], left


def tree_from_scratch(made: drafts.Sorted, ids: list[int]) -> tuple[set[tuple[int, ...]], list[int]]:
    """Paths of the tree that the target judges, and at which exit each level has left."""
    shape, frontier, candidates, left = made.tree, [((), 0.0)], [], []
    for _ in range(shape.levels):
        for layers, threshold in zip(made.exits, made.thresholds, strict=True):
            laws = [law_from_scratch(made, ids + list(path), layers) for path, _ in frontier]
            if any(law.max() >= threshold for law in laws) or layers == made.exits[-1]:
                break
        left.append(made.exits.index(layers))
        level = []
        for (path, score), chances in zip(frontier, laws, strict=True):
            best = chances.log().topk(shape.branching)
            level += [((*path, int(t)), score + float(s)) for s, t in zip(*best, strict=True) if s > float("-inf")]
        candidates += level
        frontier = sorted(level, key=lambda node: -node[1])[: shape.width]
    kept = sorted(candidates, key=lambda node: -node[1])[: shape.nodes - 1]
    return {path for path, _ in kept}, left


def paths_of(drafted, place: int) -> set[tuple[int, ...]]:
    parents, tokens = drafted.topology.parents[place].tolist(), drafted.tokens[place].tolist()
    count = int(drafted.topology.num_nodes[place])
    paths: list[tuple[int, ...]] = [()]
    for node in range(1, count):
        paths.append((*paths[parents[node]], tokens[node]))
    return set(paths[1:])


@pytest.mark.parametrize("name", ["chain", "chain, hot", "tree", "tree, hot"])
def test_drafts_are_those_of_passes_from_scratch(name):
    """Whatever left early, was caught up with, accepted or rejected before: as if nothing had been before."""
    hot = {"hot_vocab": torch.randperm(40, generator=torch.Generator().manual_seed(1))[:24]} if "hot" in name else {}
    made = draft(tree=SHAPE, **hot) if "tree" in name else draft(steps=4, **hot)
    engine = Engine(TARGET, made, max_batch=3, adapt=False)
    propose, left, seen = engine.proposer.propose, [0, 0, 0], []

    def checked(batch):
        texts = [list(request.ids) for request in batch.requests]
        drafted = propose(batch)
        for place, ids in enumerate(texts):
            if made.tree is None:
                tokens, exits = chain_from_scratch(made, ids)
                assert drafted.tokens[place].tolist() == [ids[-1], *tokens]
            else:
                paths, exits = tree_from_scratch(made, ids)
                assert paths_of(drafted, place) == paths
            seen.append(exits)
            for exit in exits:
                left[exit] += 1
        assert engine.proposer.counts.left == left
        return drafted

    engine.proposer.propose = checked
    engine.generate(PROMPTS, samplings(0.5))
    assert len(seen) > 30 and all(left), "every exit is meant to be taken"


# Limits.


@pytest.mark.parametrize("tree", [None, SHAPE], ids=["chain", "tree"])
@pytest.mark.parametrize(("thresholds", "layers"), [((0.0, 0.0, 0.9), 1), ((1.1, 1.1, 0.0), 3), ((1.1, 0.0, 0.0), 2)])
def test_thresholds_that_decide_alone(thresholds, layers, tree):
    """0 is always the first exit, more than 1 never: the draft of one exit, its drafts, and its rows of layers."""
    fixed, runs = draft((0.0,), (layers,), tree=tree, steps=4), []
    for made in (fixed, draft(thresholds, tree=tree, steps=4)):
        engine = Engine(TARGET, made, max_batch=3, adapt=False)
        runs.append((rounds_of(engine.generate(PROMPTS, samplings(0.0))), engine.proposer.counts))
    assert runs[0][0] == runs[1][0]
    assert runs[0][1].layer_rows == runs[1][1].layer_rows
    assert runs[1][1].left == [runs[0][1].left[0] if exit == layers else 0 for exit in EXITS]


SHARP = make_decoder(1, layers=3, sharpness=30.0)  # so sure that no tree leaves its first choice out


@pytest.mark.parametrize("thresholds", [(2.0, 2.0, 0.0), (1.0, 1.0, 0.0)])
@pytest.mark.parametrize("tree", [None, SHAPE, TreeShape(4, 2, 3, 7), TreeShape(1, 1, 5, 6)])
def test_a_draft_that_is_its_target_is_always_accepted(tree, thresholds):
    """Every level is right in every round, which finds a cache or a position that is off."""
    steps = 4 if tree is None else tree.levels
    made = draft(thresholds, model=SHARP, steps=4, tree=tree)
    engine = Engine(SHARP, made, max_batch=3, adapt=False)
    prompts = [*PROMPTS[:4], list(range(30)) * 10]  # the last one takes two chunks of the engine and of the draft
    asked = Sampling(max_tokens=1 + 5 * (steps + 1))
    results = engine.generate(prompts, asked)
    assert [r.tokens for r in results] == [r.tokens for r in Engine(SHARP).generate(prompts, asked)]
    if thresholds[0] > 1:
        assert all(r.stats.accepted >= 5 * steps and r.stats.target_calls == 6 for r in results)
    diagnosis = Engine(SHARP, made).diagnose(PROMPTS[:2], max_tokens=12)
    assert thresholds[0] <= 1 or diagnosis.agreement == (1.0,) * steps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tree", [None, SHAPE], ids=["chain", "tree"])
def test_narrow_rows(tree, dtype):
    """Rows, keys and values of the draft in 16 bits, int8 weights, a target in float32."""

    def narrow(part):
        return dataclasses.replace(part, weight=quantize_linear(part.weight))

    def of(layer):
        attention = dataclasses.replace(
            layer.attention, qkv=narrow(layer.attention.qkv), out=narrow(layer.attention.out)
        )
        mlp = dataclasses.replace(layer.mlp, up=narrow(layer.mlp.up), down=narrow(layer.mlp.down))
        return dataclasses.replace(layer, attention=attention, mlp=mlp)

    model = dataclasses.replace(
        MODEL,
        shape=MODEL.shape._replace(dtype=dtype),
        embedding=MODEL.embedding.to(dtype),
        layers=[of(layer) for layer in MODEL.layers],
        head=narrow(MODEL.head),
    )
    for head in (None, "int8"):
        engine = Engine(TARGET, draft(model=model, tree=tree, head=head), adapt=False)
        results = engine.generate(PROMPTS, Sampling(max_tokens=20))
        plain = Engine(TARGET).generate(PROMPTS, Sampling(max_tokens=20))
        assert [result.tokens for result in results] == [result.tokens for result in plain]
        assert sum(result.stats.accepted for result in results) > 0


def test_norms_and_biases_before_the_head():
    """A LayerNorm, and a head with a bias, which is a part of the hot vocabulary's rows."""
    generator = torch.Generator().manual_seed(3)
    norm = Norm(MODEL.norm.weight, 0.1 * torch.randn(DIM, generator=generator), 1e-5)
    head = dataclasses.replace(TARGET.head, bias=torch.randn(40, generator=generator))
    target = dataclasses.replace(SHARP, norm=norm, head=head)
    for hot in (None, torch.arange(40).flip(0)):
        made = draft((2.0, 2.0, 0.0), model=target, steps=3, hot_vocab=hot)
        results = Engine(target, made, adapt=False).generate(PROMPTS, Sampling(max_tokens=13))
        assert all(result.stats.accepted >= 9 and result.stats.target_calls == 4 for result in results)


# The law of whole answers.

LAW_CASES = {
    "chain, match": (None, "auto"),
    "chain, token": (None, "token"),
    "chain, block": (None, "block"),
    "tree, match": (TreeShape(2, 2, 2, 4), "match"),
    "tree, target_only": (TreeShape(2, 2, 2, 4), "target_only"),
    "tree, recursive": (TreeShape(2, 2, 2, 5), "recursive"),
    "tree, traversal": (TreeShape(2, 2, 3, 6), "traversal"),
}


def law_draft(tree) -> drafts.Sorted:
    return drafts.Sorted(law.DRAFT, (1, 2), (0.45, 0.0), steps=2, tree=tree, head=None)


@pytest.mark.parametrize("case", LAW_CASES)
def test_answers_have_the_targets_law(case):
    """As tests/decode/test_engine_law.py has it for other drafts."""
    tree, rule = LAW_CASES[case]
    engine = Engine(law.TARGET, law_draft(tree), rule, max_batch=128, max_length=32, adapt=False)
    statistic, limit = law.chi_squared(engine, law.SETTINGS["stop" if "tree" in case else "plain"])
    assert statistic < limit
    assert all(engine.proposer.counts.left)


def test_the_softmax_of_the_draft_as_its_law_is_found():
    """The authors' code at T = 1 takes softmax(draft logits) for the law of an argmax: the texts are biased."""
    engine = Engine(law.TARGET, law_draft(None), "token", max_batch=128, max_length=32, adapt=False)
    propose = engine.proposer.propose
    row = functools.cache(lambda *ids: law_from_scratch(engine.draft, list(ids), 2).log())

    def with_softmax(batch):
        drafted = propose(batch)
        rows = [
            row(*request.ids, *drafted.tokens[place, 1 : node + 1].tolist())
            for place, request in enumerate(batch.requests)
            for node in range(3)
        ]
        return dataclasses.replace(drafted, draft_logits=torch.stack(rows).view(len(batch), 3, -1).float())

    engine.proposer.propose = with_softmax
    statistic, limit = law.chi_squared(engine, law.SETTINGS["plain"])
    assert statistic > limit


def test_wrong_arguments():
    with pytest.raises(TypeError, match=r"model must be a specdec_ops\.decode\.Decoder"):
        drafts.Sorted("folder", (1,), (0,))
    with pytest.raises(ValueError, match="model must be one without a soft cap of its logits, which early_exit lacks"):
        drafts.Sorted(dataclasses.replace(MODEL, logit_softcap=30.0), (1,), (0,))
    for exits in ((), (0, 1), (2, 1), (1, 1), (1, 4)):
        with pytest.raises(ValueError, match="exits must be ascending from 1 to the model's 3 layers"):
            drafts.Sorted(MODEL, exits, (0,) * len(exits))
    with pytest.raises(TypeError, match="exits must be ints"):
        drafts.Sorted(MODEL, (1.0,), (0,))
    with pytest.raises(ValueError, match=r"thresholds must be one for each of the exits \(1, 2\)"):
        drafts.Sorted(MODEL, (1, 2), (0.5,))
    with pytest.raises(ValueError, match="thresholds must be at least 0"):
        drafts.Sorted(MODEL, (1,), (-0.5,))
    with pytest.raises(ValueError, match="thresholds must be at least 0"):
        drafts.Sorted(MODEL, (1,), (float("nan"),))
    with pytest.raises(TypeError, match="thresholds must be numbers"):
        drafts.Sorted(MODEL, (1,), ("a",))
    with pytest.raises(ValueError, match="steps must be an int from 1"):
        draft(steps=0)
    with pytest.raises(TypeError, match=r"tree must be a specdec_ops\.drafts\.TreeShape or None"):
        draft(tree=(4, 3, 4, 8))
    with pytest.raises(TypeError, match="hot_vocab must be int32 or int64"):
        draft(hot_vocab=[1, 2])
    with pytest.raises(ValueError, match="VocabMap: draft_to_target must be of ids from 0 to 39"):
        draft(hot_vocab=torch.tensor([40]))
    with pytest.raises(ValueError, match="head must be 'int8' or None"):
        draft(head="int4")
    with pytest.raises(ValueError, match="branching must be an int from 1 to 16"):
        TreeShape(branching=17)
    with pytest.raises(ValueError, match="model must have the target's vocabulary of 40 tokens, got 32"):
        Engine(TARGET, draft(model=make_decoder(1, layers=3, vocab=32)))
