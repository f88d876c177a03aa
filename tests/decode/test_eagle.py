"""Drafts of EAGLE: texts of plain decoding, and full acceptance where the weights make the draft copy its target."""

import dataclasses

import pytest
import torch

from specdec_ops import drafts
from specdec_ops.decode import Engine, Sampling, pace
from specdec_ops.decode.decoder import Norm, Projection
from specdec_ops.drafts import grown_tree
from specdec_ops.ops.linear.quantized_weight import quantize_linear
from tests.decode import test_engine_law as law
from tests.decode.test_engine import LENGTH, PROMPTS, TARGET, by_hand, eos_of, samplings
from tests.harness.tiny_models import DIM, from_embedding, joined_late, make_decoder, noisy_eagle


def flat(norm: Norm) -> Norm:
    return norm._replace(weight=torch.ones_like(norm.weight))


# A target of one layer whose final norm only scales: its head's order is that of the rows before the norm, so a draft
# that is the target's layer over the embedding alone finds what the target will say.
SHALLOW = make_decoder(1, layers=1, sharpness=30.0)  # so sure that no tree leaves its first choice out
SHALLOW = dataclasses.replace(SHALLOW, norm=flat(SHALLOW.norm))


def copy_of(target, **options) -> drafts.Eagle:
    return drafts.Eagle(from_embedding(), target.layers[0], **options)


DRAFTS = {
    "tree": lambda: noisy_eagle(TARGET, levels=3, width=3, branching=4, nodes=9),
    "all tokens": lambda: noisy_eagle(TARGET, hot=False, levels=4, width=2, branching=2, nodes=6),
    "chain": lambda: noisy_eagle(TARGET, levels=3, width=1, branching=1, nodes=4),
    "one level": lambda: noisy_eagle(TARGET, levels=1, branching=5, nodes=4),
    "wide": lambda: noisy_eagle(TARGET, hot=False, levels=2, width=64, branching=40, nodes=200),
}


@pytest.fixture(scope="module", params=[0.0, 0.9], ids=["greedy", "sampled"])
def expected(request):
    asked = samplings(request.param)
    return asked, [by_hand(prompt, sampling) for prompt, sampling in zip(PROMPTS, asked, strict=True)]


@pytest.mark.parametrize("name", DRAFTS)
def test_text_is_that_of_plain_decoding(name, expected):
    asked, texts = expected
    engine = Engine(TARGET, DRAFTS[name](), max_batch=3, adapt=False)
    assert engine.rule == "match"
    results = engine.generate(PROMPTS, asked)
    assert [result.tokens for result in results] == texts
    assert engine.is_idle and engine.cache.pool.free == engine.cache.pool.pages
    assert engine.proposer.cache.pool.free == engine.proposer.cache.pool.pages
    assert sum(result.stats.accepted for result in results) > 0, "the draft is meant to be right now and then"


@pytest.mark.parametrize("name", DRAFTS)
def test_nothing_follows_an_eos(name, expected):
    asked, texts = expected
    ends = [eos_of(text, 5) for text in texts]
    asked = [dataclasses.replace(sampling, eos=end) for sampling, end in zip(asked, ends, strict=True)]
    target = dataclasses.replace(TARGET, eos=(ends[0],))  # the draft grows nothing below this one
    results = Engine(target, DRAFTS[name](), adapt=False).generate(PROMPTS, asked)
    for result, text, end in zip(results, texts, ends, strict=True):
        assert result.tokens == text[: text.index(end) + 1]
        assert result.finish_reason == "eos"


def accepted_by_request(results) -> list[tuple[int, int]]:
    return [(result.stats.accepted, result.stats.target_calls) for result in results]


def test_a_request_does_not_depend_on_the_others(expected):
    """Joining late, in another order, beside one that doesn't speculate: the same trees, so the same rounds."""
    asked, texts = expected

    def engine(batch: int) -> Engine:
        return Engine(TARGET, DRAFTS["tree"](), max_batch=batch, adapt=False)

    alone = [engine(1).generate([prompt], s)[0] for prompt, s in zip(PROMPTS, asked, strict=True)]
    together = engine(4)
    results = joined_late(together, PROMPTS, asked)
    assert [result.tokens for result in results] == texts
    assert accepted_by_request(results) == accepted_by_request(alone)


@pytest.mark.parametrize(("temperature", "rule"), [(0.0, "auto"), (0.0, "recursive"), (0.9, "match")])
@pytest.mark.parametrize("sizes", [(3, 3, 3, 8), (5, 1, 1, 6), (4, 2, 3, 5), (2, 4, 6, 20)])
def test_a_draft_that_copies_its_target_is_always_accepted(sizes, temperature, rule):
    """Greedy: every level is right in every round, whatever the tree. That finds a cache or a position that is off.

    Sampled tokens are those of the target, so they are accepted as often as they are among the draft's likeliest.
    """
    levels, width, branching, nodes = sizes
    draft = copy_of(SHALLOW, levels=levels, width=width, branching=branching, nodes=nodes)
    engine = Engine(SHALLOW, draft, rule, max_batch=3, adapt=False)
    asked = [Sampling(temperature=temperature, max_tokens=1 + 5 * (levels + 1), seed=seed) for seed in range(5)]
    prompts = [*PROMPTS[:4], list(range(30)) * 10]  # the last one takes two chunks of the engine and of the draft
    results = engine.generate(prompts, asked)
    plain = Engine(SHALLOW).generate(prompts, asked)
    assert [result.tokens for result in results] == [result.tokens for result in plain]
    for result in results:
        if temperature:
            assert result.stats.accepted > 0.5 * result.stats.target_calls
        else:
            assert result.stats.accepted >= 5 * levels, "five rounds, and one more token"
            assert result.stats.target_calls == 6


CYCLE = torch.randperm(DIM, generator=torch.Generator().manual_seed(3)).tolist()


def successor_target():
    """Token t is always followed by CYCLE[t]: embeddings are unit vectors, layers add nothing, and the head knows."""
    generator = torch.Generator().manual_seed(4)
    target = make_decoder(4, vocab=DIM)
    for layer in target.layers:
        layer.attention.out.weight.zero_()
        layer.mlp.down.weight.zero_()
    basis = torch.linalg.qr(torch.randn(DIM, DIM, generator=generator)).Q
    head = torch.empty(DIM, DIM)
    head[CYCLE] = basis
    return dataclasses.replace(target, embedding=basis, head=Projection(3 * head), norm=flat(target.norm)), basis


def test_features_belong_to_the_token_before():
    """A draft that looks at features alone: the feature of t tells CYCLE[t], whose feature the row predicts.

    Features of another position or another request would be followed by another token.
    """
    target, basis = successor_target()
    following = basis[CYCLE].T @ basis / DIM**0.5  # a feature is its token's unit vector times sqrt(dim)
    fc = Projection(torch.cat((torch.zeros(DIM, DIM), DIM**0.5 * following), dim=1))
    draft = drafts.Eagle(fc, target.layers[0], levels=3, width=2, branching=2, nodes=6)
    prompts = []
    for start, length in ((0, 2), (5, 7), (9, 3), (1, 4)):
        prompts.append([start])
        while len(prompts[-1]) < length:
            prompts[-1].append(CYCLE[prompts[-1][-1]])
    engine = Engine(target, draft, max_batch=3, adapt=False)
    for prompt, result in zip(prompts, engine.generate(prompts, Sampling(max_tokens=13)), strict=True):
        token = prompt[-1]
        for got in result.tokens:
            token = CYCLE[token]
            assert got == token
        assert (result.stats.accepted, result.stats.target_calls) == (12, 4), "3 + 1 tokens a round, 13 of 16 wanted"


def test_misplaced_features_are_found():
    """What the test before is worth: features that are one position late lose every token."""
    target, basis = successor_target()
    fc = Projection(torch.cat((torch.zeros(DIM, DIM), basis[CYCLE].T @ basis), dim=1))
    draft = drafts.Eagle(fc, target.layers[0], levels=2, width=1, branching=1, nodes=3)
    engine = Engine(target, draft, adapt=False)
    start = engine.proposer.start
    engine.proposer.start = lambda request: (start(request), request.draft_state.rows.append(torch.zeros(1, DIM)))
    prompt = [0, CYCLE[0], CYCLE[CYCLE[0]]]
    result = engine.generate([prompt], Sampling(max_tokens=8))[0]
    assert result.stats.accepted == 0 and result.stats.target_calls == 8


def test_diagnosis_agrees_with_the_engine():
    diagnosis = Engine(SHALLOW, copy_of(SHALLOW, levels=3)).diagnose(PROMPTS[:2], max_tokens=12)
    assert diagnosis.agreement == (1.0, 1.0, 1.0) and diagnosis.accepted[0] > 0.7


def test_rounds_without_the_draft_are_caught_up_with(monkeypatch):
    """Plain rounds in between: what they give is run by the draft when it is asked again."""
    engine = Engine(SHALLOW, copy_of(SHALLOW, levels=2, width=2, branching=2, nodes=4), max_batch=3)
    monkeypatch.setattr(engine, "_warn_of_loss", lambda speedup: None)
    turns = iter([True, False, False, True, False] * 100)
    monkeypatch.setattr("specdec_ops.decode.pace.Pace.wants_draft", lambda self: next(turns))
    results = engine.generate(PROMPTS, Sampling(max_tokens=LENGTH))
    plain = Engine(SHALLOW).generate(PROMPTS, Sampling(max_tokens=LENGTH))
    assert [result.tokens for result in results] == [result.tokens for result in plain]
    drafted = sum(result.stats.drafted for result in results)
    assert drafted > 0 and sum(result.stats.accepted for result in results) >= drafted / 3 * 2 - 10


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_rows_and_int8_weights(dtype):
    """A target in 16 bits, a draft with int8 weights."""

    def narrow(part):
        if isinstance(part, Projection):
            return Projection(part.weight.to(dtype))
        if isinstance(part, Norm):
            return part._replace(weight=part.weight.to(dtype))
        changes = {field.name: narrow(getattr(part, field.name)) for field in dataclasses.fields(part)}
        return dataclasses.replace(part, **changes)

    def narrow_layer(layer):
        return dataclasses.replace(
            layer,
            attention_norm=narrow(layer.attention_norm),
            mlp_norm=narrow(layer.mlp_norm),
            attention=dataclasses.replace(
                layer.attention, qkv=narrow(layer.attention.qkv), out=narrow(layer.attention.out)
            ),
            mlp=dataclasses.replace(layer.mlp, up=narrow(layer.mlp.up), down=narrow(layer.mlp.down)),
        )

    target = dataclasses.replace(
        SHALLOW,
        shape=SHALLOW.shape._replace(dtype=dtype),
        embedding=SHALLOW.embedding.to(dtype),
        layers=[narrow_layer(layer) for layer in SHALLOW.layers],
        norm=narrow(SHALLOW.norm),
        head=narrow(SHALLOW.head),
    )
    layer = SHALLOW.layers[0]
    int8 = [
        Projection(quantize_linear(part.weight))
        for part in (from_embedding(), layer.attention.qkv, layer.attention.out, layer.mlp.up, layer.mlp.down)
    ]
    layer = dataclasses.replace(
        layer,
        attention=dataclasses.replace(layer.attention, qkv=int8[1], out=int8[2]),
        mlp=dataclasses.replace(layer.mlp, up=int8[3], down=int8[4]),
    )
    draft = drafts.Eagle(int8[0], layer, torch.arange(40), levels=3, width=2, branching=2, nodes=6)
    results = Engine(target, draft, adapt=False).generate(PROMPTS, Sampling(max_tokens=20))
    plain = Engine(target).generate(PROMPTS, Sampling(max_tokens=20))
    assert [result.tokens for result in results] == [result.tokens for result in plain]
    assert sum(result.stats.accepted for result in results) > 2 * sum(result.stats.target_calls for result in results)


@pytest.mark.parametrize(("rule", "setting"), [("target_only", "plain"), ("recursive", "stop"), ("traversal", "plain")])
def test_answers_have_the_targets_law(rule, setting):
    """With rules other than "match", as tests/decode/test_engine_law.py has it for other drafts."""
    generator = torch.Generator().manual_seed(6)
    fc = Projection(from_embedding().weight + 0.1 * torch.randn(DIM, 2 * DIM, generator=generator))
    draft = drafts.Eagle(fc, law.TARGET.layers[0], torch.tensor([2, 0, 3]), levels=2, width=2, branching=2, nodes=4)
    engine = Engine(law.TARGET, draft, rule, max_batch=128, max_length=32, adapt=False)
    statistic, limit = law.chi_squared(engine, law.SETTINGS[setting])
    assert statistic < limit


def test_wrong_arguments():
    fc, layer = from_embedding(), TARGET.layers[0]
    with pytest.raises(TypeError, match="fc must be a Projection"):
        drafts.Eagle(fc.weight, layer)
    with pytest.raises(TypeError, match="layer must be a Layer"):
        drafts.Eagle(fc, None)
    with pytest.raises(TypeError, match="hot_vocab must be int32 or int64"):
        drafts.Eagle(fc, layer, [1, 2])
    for name, value in (("levels", 0), ("width", 300), ("branching", 65), ("nodes", 1)):
        with pytest.raises(ValueError, match=f"{name} must be an int from"):
            drafts.Eagle(fc, layer, **{name: value})
    with pytest.raises(ValueError, match=r"fc must be \[32, 64\] for a target of dim 32, got \[16, 32\]"):
        Engine(TARGET, drafts.Eagle(from_embedding(16), layer))
    with pytest.raises(ValueError, match="VocabMap: draft_to_target must be of ids from 0 to 39"):
        Engine(TARGET, drafts.Eagle(fc, layer, torch.tensor([40])))


def test_rows_that_were_never_seen_are_an_error():
    engine = Engine(TARGET, noisy_eagle(TARGET), adapt=False)
    engine.proposer.see = lambda *_: None
    with pytest.raises(RuntimeError, match="the target's rows of 2 tokens must have been seen, got 1"):
        engine.generate([[3, 4]], Sampling(max_tokens=4))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("slope", [0.0, 0.2, 1e6], ids=["free rows", "dear rows", "rows past price"])
def test_trees_have_the_nodes_that_are_worth_their_rows(slope, batch, expected, monkeypatch):
    """With times of passes that the test makes up. Texts are the same whatever is left out."""
    asked, texts = expected
    monkeypatch.setattr(
        pace.Adaptation, "seconds_of_rows", lambda self, requests: lambda rows: 1e3 * (1 + slope * rows)
    )
    monkeypatch.setattr(pace.Adaptation, "plan", lambda self, requests: "draft")
    engine = Engine(TARGET, noisy_eagle(TARGET, hot=False, levels=3, width=3, branching=4, nodes=9), max_batch=batch)
    sizes, propose = set(), engine.proposer.propose

    def noted(requests):
        drafted = propose(requests)
        sizes.add(drafted.tokens.shape[1])
        return drafted

    engine.proposer.propose = noted
    assert [result.tokens for result in engine.generate(PROMPTS, asked)] == texts
    assert {0.0: sizes == {9}, 0.2: min(sizes) < 9 and max(sizes) > 2, 1e6: sizes == {2}}[slope], sizes


def test_levels_end_when_what_would_go_on_is_unlikely():
    chances = torch.tensor([[0.6, 0.1, 0.1], [0.2, 0.0, 0.0]])
    assert grown_tree._is_worth_a_level(chances, cost=0.99, spent=4.0)  # half a token expected, 2 requests, 4 seconds
    assert not grown_tree._is_worth_a_level(chances, cost=1.01, spent=4.0)


def test_nodes_by_hand():
    chances = torch.tensor([0.5, 0.3, 0.1, 0.01])
    tokens = {2: 1.5, 3: 1.8, 4: 1.9, 5: 1.91}
    for price, most in ((0.0, 5), (0.0, 4), (0.25, 5), (0.5, 5), (3.0, 5)):
        best = max((nodes for nodes in tokens if nodes <= most), key=lambda n: tokens[n] / (3.0 + price * n))
        assert grown_tree._worthwhile(chances[: most - 1], 1, lambda rows: 2.0 + price * rows, 1.0) == best  # noqa: B023


def test_chances_are_what_was_accepted_of_what_was_given():
    chances, scores = grown_tree._Chances(), torch.tensor([[0.5, 0.25]]).log()
    assert torch.allclose(chances.of(scores), torch.tensor([[0.5, 0.25]]))
    for _ in range(2000):
        chances.expect(scores)
        chances.learn(1)
        chances.learn(5)  # of a round for which nothing was expected
    assert torch.allclose(chances.of(scores), torch.tensor([[2 / 3, 1 / 3]]), atol=1e-3)
    assert chances.of(torch.zeros(1, 1)).item() == 1.0
