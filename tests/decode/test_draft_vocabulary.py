"""Drafts whose logits have other entries than the target's: permuted, fewer, more, and padded."""

import dataclasses

import pytest
import torch

from specdec_ops import VocabMap, drafts
from specdec_ops.decode import Engine, Sampling
from specdec_ops.decode.decoder import Projection
from tests.decode import test_engine_law as law
from tests.decode.test_engine import DRAFT, LENGTH, PROMPTS, TARGET, by_hand, samplings
from tests.harness.tiny_models import Characters, make_decoder

VOCAB = TARGET.shape.vocab


def renumbered(model, ids: torch.Tensor):
    """The same model, whose entry e is token ids[e] of before."""
    shape = model.shape._replace(vocab=len(ids))
    head = Projection(model.head.weight[ids])
    return dataclasses.replace(model, shape=shape, embedding=model.embedding[ids], head=head)


def padded(model, vocab: int):
    """The same model with rows of zeros behind its vocabulary, whose logits are 0: not even unlikely."""
    more = vocab - model.shape.vocab
    weights = (torch.cat((w, torch.zeros(more, w.shape[1]))) for w in (model.embedding, model.head.weight))
    embedding, head = weights
    return dataclasses.replace(
        model, shape=model.shape._replace(vocab=vocab), embedding=embedding, head=Projection(head)
    )


PERMUTED = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(1))
SOME = PERMUTED[:25]
MAPPED = {
    "permuted": (PERMUTED, VocabMap(PERMUTED, VOCAB)),
    "fewer": (SOME, VocabMap(SOME, VOCAB)),
    "more": (torch.cat((SOME, torch.tensor([3, 3, 3]))), VocabMap(SOME, VOCAB)),
}


def make(kind: str, model, vocab_map) -> drafts.Draft:
    if kind == "chain":
        return drafts.Chain(model, 3, vocab_map=vocab_map)
    return drafts.MultiCandidate(model, (3, 2), replacement=kind == "repeats", vocab_map=vocab_map)


@pytest.fixture(scope="module", params=[0.0, 0.9], ids=["greedy", "sampled"])
def expected(request):
    asked = samplings(request.param)
    return asked, [by_hand(prompt, sampling) for prompt, sampling in zip(PROMPTS, asked, strict=True)]


@pytest.mark.parametrize("kind", ["chain", "tree", "repeats"])
@pytest.mark.parametrize("name", MAPPED)
def test_text_is_that_of_plain_decoding(name, kind, expected):
    asked, texts = expected
    ids, vocab_map = MAPPED[name]
    engine = Engine(TARGET, make(kind, renumbered(DRAFT, ids), vocab_map), "match", max_batch=3, adapt=False)
    results = engine.generate(PROMPTS, asked)
    assert [result.tokens for result in results] == texts
    assert sum(result.stats.accepted for result in results) > 0


@pytest.mark.parametrize("rule", ["match", "auto"])
@pytest.mark.parametrize("kind", ["chain", "tree", "repeats"])
def test_a_permuted_draft_is_the_draft(kind, rule, expected):
    """Every token read and proposed under its own number: as much is accepted as of the draft itself.

    Rules other than "match" draw children with noise by entry, so there only the greedy proposals are the same.
    """
    asked, _ = expected
    stats = []
    for model, vocab_map in ((DRAFT, None), (renumbered(DRAFT, PERMUTED), MAPPED["permuted"][1])):
        engine = Engine(TARGET, make(kind, model, vocab_map), rule, adapt=False)
        stats.append([dataclasses.asdict(result.stats) for result in engine.generate(PROMPTS, asked)])
    if rule == "match" or asked[0].temperature == 0:
        assert stats[0] == stats[1]


def test_a_target_under_other_numbers_is_accepted_whole():
    """By every rule: q is p, entry by entry."""
    model, vocab_map = renumbered(TARGET, PERMUTED), MAPPED["permuted"][1]
    for rule in ("match", "token", "block", "recursive", "traversal"):
        engine = Engine(TARGET, drafts.Chain(model, 3, vocab_map=vocab_map), rule, adapt=False)
        results = engine.generate(PROMPTS, samplings(0.9))
        assert all(result.stats.accepted == result.stats.drafted for result in results)


class Named(Characters):
    """Knows what its tokens are."""

    def __init__(self, count: int, first: int = 48) -> None:
        self.count, self.first = count, first

    def get_vocab(self) -> dict[str, int]:
        return {chr(self.first + token): token for token in range(self.count)}


@pytest.mark.parametrize("kind", ["chain", "tree"])
@pytest.mark.parametrize("sizes", [(40, 48), (48, 40), (41, 48)], ids=str)
def test_logits_padded_to_another_length_need_no_map(sizes, kind, expected):
    """With the same tokenizer, as Qwen's models of 151936 and 152064 entries have it."""
    asked, texts = expected
    draft, target = (
        dataclasses.replace(padded(model, size) if size > VOCAB else model, tokenizer=Named(VOCAB))
        for model, size in zip((DRAFT, TARGET), sizes, strict=True)
    )
    if sizes[1] > VOCAB:
        texts = [by_hand(prompt, sampling, target) for prompt, sampling in zip(PROMPTS, asked, strict=True)]
    engine = Engine(target, make(kind, draft, None), "match", adapt=False)
    results = engine.generate(PROMPTS, asked)
    assert [result.tokens for result in results] == texts
    assert sum(result.stats.accepted for result in results) > 0


def refused(draft, target=TARGET) -> str:
    with pytest.raises((ValueError, TypeError)) as raised:
        Engine(target, draft)
    return str(raised.value)


def test_what_is_refused():
    named = dataclasses.replace(TARGET, tokenizer=Named(VOCAB))
    shifted = dataclasses.replace(DRAFT, tokenizer=Named(VOCAB, first=49))
    assert refused(drafts.Chain(shifted), named) == (
        "specdec_ops.drafts: the draft must have the target's tokenizer, or a vocab_map, got another: "
        "token 0 is '1' there, and '0' here"
    )
    other = make_decoder(3, vocab=41)
    assert "vocabulary of 40 tokens, or a vocab_map, got 41" in refused(drafts.Chain(other))
    assert "vocab_map must be into 40 target tokens, got 41" in refused(
        drafts.Chain(other, vocab_map=VocabMap(range(41), 41))
    )
    assert "vocab_map must have at most the draft's 40 entries, got 41" in refused(
        drafts.MultiCandidate(DRAFT, vocab_map=VocabMap(range(41), 41)), make_decoder(3, vocab=41)
    )
    assert "vocab_map must be a specdec_ops.VocabMap or None, got list [1, 2]" in refused(
        drafts.Chain(DRAFT, vocab_map=[1, 2])
    )
    with_map = drafts.Chain(shifted, vocab_map=VocabMap(range(VOCAB), VOCAB))  # the user knows better
    assert Engine(named, with_map).generate([[1]], Sampling(max_tokens=4))[0].tokens == by_hand(
        [1], Sampling(max_tokens=4)
    )


def test_tokens_that_the_draft_does_not_know():
    """They are read as its entry 0, in prompts and in the text: what is drafted is a function of the text still."""
    few = torch.arange(5)
    draft = drafts.Chain(renumbered(TARGET, few), 3, vocab_map=VocabMap(few, VOCAB))
    engine = Engine(TARGET, draft, "match", adapt=False)
    asked = samplings(0.9)
    results = engine.generate(PROMPTS, asked)
    assert [r.tokens for r in results] == [by_hand(p, s) for p, s in zip(PROMPTS, asked, strict=True)]
    assert all(len(result.tokens) == LENGTH for result in results)


FEWER = (torch.tensor([2, 0, 3]), lambda: make_decoder(12, vocab=3, sharpness=1.0))
MORE = (torch.tensor([1, 3, 0, 2]), lambda: make_decoder(12, vocab=6, sharpness=1.0))
LAWS = {
    "chain, token, fewer": ("chain", "token", FEWER),
    "chain, block, more": ("chain", "block", MORE),
    "chain, match, fewer": ("chain", "match", FEWER),
    "tree, recursive, more": ("tree", "recursive", MORE),
    "tree, traversal, fewer": ("tree", "traversal", FEWER),
    "tree with repeats, kseq, fewer": ("repeats", "kseq", FEWER),
    "tree with repeats, auto, more": ("repeats", "auto", MORE),
}


@pytest.mark.parametrize("setting", ["plain", "filtered"])
@pytest.mark.parametrize("case", LAWS)
def test_answers_have_the_targets_law(case, setting):
    """Whole runs of the engine against enumeration, as tests/decode/test_engine_law.py has it for other drafts."""
    kind, rule, (ids, model) = LAWS[case]
    draft = make(kind, model(), VocabMap(ids, law.VOCAB))
    engine = Engine(law.TARGET, draft, rule, max_batch=128, max_length=32, adapt=False)
    statistic, limit = law.chi_squared(engine, law.SETTINGS[setting])
    assert statistic < limit


def test_a_map_that_is_wrong_is_found():
    """What the test is worth: acceptance is told of another map than the children were drawn with."""
    engine = Engine(law.TARGET, make("chain", FEWER[1](), VocabMap(FEWER[0], 4)), "token", max_batch=128, adapt=False)
    propose = engine.proposer.propose
    engine.proposer.propose = lambda batch: dataclasses.replace(propose(batch), vocab_map=VocabMap([0, 2, 3], 4))
    statistic, limit = law.chi_squared(engine, law.SETTINGS["plain"])
    assert statistic > limit
