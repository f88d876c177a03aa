"""Multi-candidate drafts in the engine: several roots, stops, caches, and what a request may depend on."""

import dataclasses
import random

import pytest
import torch

from specdec_ops import Topology, Tree, drafts, sample_tokens
from specdec_ops.decode import Cache, Engine, Rows, Sampling
from specdec_ops.decode.cache import Sequence
from tests.decode.test_engine import DRAFT, LENGTH, PROMPTS, TARGET, by_hand, eos_of, law_by_hand, samplings
from tests.harness.tiny_models import Characters, first_layers, make_decoder, watch_sent_back

SURE = drafts.StopBelow("probability", 0.7)
GREEDY = Sampling(max_tokens=LENGTH)

FORESTS = {
    "fork": lambda **options: drafts.MultiCandidate(DRAFT, (1, 1, 1), target_roots=3, **options),
    "fork with a stop": lambda **options: drafts.MultiCandidate(DRAFT, (1,) * 4, target_roots=2, stop=SURE, **options),
    "static": lambda **options: drafts.MultiCandidate(DRAFT, (2, 2, 1), target_roots=2, **options),
    "static with repeats": lambda **options: drafts.MultiCandidate(
        DRAFT, (2, 1), target_roots=2, replacement=True, **options
    ),
}
STOPPING = {
    "chain": lambda: drafts.Chain(DRAFT, 4, stop=SURE),
    "tree": lambda: drafts.MultiCandidate(DRAFT, (3, 2, 1, 1), stop=SURE),
    "tree, together": lambda: drafts.MultiCandidate(DRAFT, (3, 2, 1, 1), stop=SURE, stops_together=True),
    "margin": lambda: drafts.MultiCandidate(DRAFT, (2, 1, 1), stop=drafts.StopBelow("margin", 0.5)),
    "entropy": lambda: drafts.MultiCandidate(DRAFT, (2, 1, 1), stop=drafts.StopBelow("entropy_bound", 0.5)),
}


def run(draft, prompts, asked, rule="longest_path", **options) -> list:
    return Engine(TARGET, draft, rule, adapt=False, **options).generate(prompts, asked)


def spied(engine: Engine) -> list:
    """The trees of all rounds to come."""
    seen, propose = [], engine.proposer.propose
    engine.proposer.propose = lambda batch: seen.append(propose(batch)) or seen[-1]
    return seen


def last_logits(model, text: list[int]) -> torch.Tensor:
    cache, table = kept(model, text)
    rows = Rows(torch.tensor([text[-1:]]).int(), Tree.chain(1).to("cpu"), torch.tensor([len(text) - 1]).int(), table)
    return model.forward(rows, cache).logits[0]


def kept(model, text: list[int]) -> tuple[Cache, torch.Tensor]:
    """A cache after one pass over a text, and its page table."""
    cache, sequence = Cache(model.shape, 8), Sequence()
    cache.reserve(sequence, len(text))
    table, start = cache.page_table([sequence]), torch.zeros(1, dtype=torch.int32)
    model.forward(Rows(torch.tensor([text]).int(), Tree.chain(len(text)).to("cpu"), start, table), cache, want=False)
    return cache, table


# Texts that are the target's.


@pytest.mark.parametrize("temperature", [0.0, 0.9], ids=["greedy", "sampled"])
@pytest.mark.parametrize("name", STOPPING)
def test_text_is_that_of_plain_decoding_wherever_drafts_stop(name, temperature):
    asked = samplings(temperature)
    engine = Engine(TARGET, STOPPING[name](), rule="match", max_batch=3, adapt=False)
    seen = spied(engine)
    results = engine.generate(PROMPTS, asked)
    texts = [by_hand(prompt, sampling) for prompt, sampling in zip(PROMPTS, asked, strict=True)]
    assert [result.tokens for result in results] == texts
    depths = {drafted.tokens.shape[1] for drafted in seen}
    assert len(depths) > 1, "some rounds should have stopped early"
    assert any(drafted.sizes for drafted in seen) == (name != "tree, together")
    assert engine.proposer.cache.pool.free == engine.proposer.cache.pool.pages


@pytest.mark.parametrize("branching", [(1, 1, 1), (3, 2, 1)], ids=["chain", "tree"])
def test_the_longest_path_of_one_root_is_greedy_text(branching):
    """At temperature 0 a node is accepted if it is the argmax: nothing is lost."""
    results = run(drafts.MultiCandidate(DRAFT, branching), PROMPTS, [GREEDY] * len(PROMPTS), max_batch=3)
    assert [result.tokens for result in results] == [by_hand(prompt, GREEDY) for prompt in PROMPTS]
    assert sum(result.stats.accepted for result in results) > 0


def simulated(prompt: list[int], roots: int, branching: tuple[int, ...], length: int) -> list[int]:
    """Improved MCSD at temperature 0, by hand: the likeliest roots and children, and the longest path of argmaxes."""

    def best(model, text, count):
        return last_logits(model, text).sort(descending=True, stable=True).indices[:count].tolist()

    text, candidates = list(prompt), best(TARGET, prompt, roots)
    while len(text) - len(prompt) < length:
        paths = [([root], True) for root in candidates]
        level = paths
        for count in branching:
            level = [
                ([*path, token], alive and token == best(TARGET, text + path, 1)[0])
                for path, alive in level
                for token in best(DRAFT, text + path, count)
            ]
            paths = paths + level
        longest = max(len(path) for path, alive in paths if alive)
        text += next(path for path, alive in paths if alive and len(path) == longest)
        candidates = best(TARGET, text, roots)
    return text[len(prompt) :][:length]


@pytest.mark.parametrize(("roots", "branching"), [(2, (1, 1)), (3, (1, 1, 1)), (2, (2, 1))], ids=str)
def test_greedy_roots_are_the_likeliest_tokens(roots, branching):
    """The authors' static program takes them from a one-hot row at temperature 0, where all but one are arbitrary."""
    draft = drafts.MultiCandidate(DRAFT, branching, target_roots=roots)
    results = run(draft, PROMPTS[:3], GREEDY)
    texts = [simulated(prompt, roots, branching, LENGTH) for prompt in PROMPTS[:3]]
    assert [result.tokens for result in results] == texts
    assert texts != [by_hand(prompt, GREEDY) for prompt in PROMPTS[:3]], "the case should tell them apart"


def test_first_roots_have_the_noise_and_the_law_of_the_targets_own_tokens():
    """At the request's temperature, and drawn with other noise than the children of a draft."""
    for seed in range(8):
        asked = Sampling(temperature=0.5, top_k=7, seed=seed, max_tokens=4)
        engine = Engine(TARGET, drafts.MultiCandidate(TARGET, (1,), target_roots=4), "longest_path")
        number = engine.submit(PROMPTS[0], asked)
        engine.scheduler.admit()
        engine._prefill()
        logits, length = last_logits(TARGET, PROMPTS[0])[None], len(PROMPTS[0])
        options = {"seeds": seed, "positions": length, "temperature": 0.5, "top_k": 7}
        request = engine._requests[number]
        assert request.candidates == sample_tokens(logits, count=4, **options)[0].tolist()
        assert request.candidates[0] == sample_tokens(logits, **options).item()
        assert len(request.tokens) == 0


# What a request may depend on.


@pytest.mark.parametrize("name", FORESTS)
@pytest.mark.parametrize("temperature", [0.0, 0.9], ids=["greedy", "sampled"])
def test_a_request_does_not_depend_on_the_others(name, temperature):
    """Requests that join late, in another order, beside one that doesn't speculate; and log-probabilities likewise."""
    asked = samplings(temperature, logprobs=True)
    alone = [run(FORESTS[name](), [p], s, max_batch=1)[0] for p, s in zip(PROMPTS, asked, strict=True)]
    engine = Engine(TARGET, FORESTS[name](), "longest_path", max_batch=4)
    order, places, results = list(range(len(PROMPTS))), {}, {}
    random.Random(0).shuffle(order)
    other = None
    while order or not engine.is_idle:
        if order:
            place = order.pop()
            places[engine.submit(PROMPTS[place], asked[place])] = place
            if len(order) == 2:
                other = engine.submit([9, 9], Sampling(max_tokens=9, speculate=False))
        for chunk in engine.step():
            if chunk.result is not None:
                results[places.get(chunk.request, chunk.request)] = chunk.result
    for place, expected in enumerate(alone):
        assert results[place].tokens == expected.tokens
        assert results[place].logprobs == expected.logprobs
    assert results[other].tokens == by_hand([9, 9], Sampling(max_tokens=9))
    assert engine.cache.pool.free == engine.cache.pool.pages
    assert engine.proposer.cache.pool.free == engine.proposer.cache.pool.pages


@pytest.mark.parametrize("name", FORESTS)
def test_one_draft_serves_two_targets_at_once(name):
    """A round of one lies between two rounds of the other; each says what it says alone."""
    shared, targets, asked = FORESTS[name](), (TARGET, make_decoder(7)), samplings(0.9)
    engines = [Engine(target, shared, "longest_path", max_batch=2) for target in targets]
    numbers = [[engine.submit(*task) for task in zip(PROMPTS, asked, strict=True)] for engine in engines]
    found = [{}, {}]
    while not all(engine.is_idle for engine in engines):
        for engine, results in zip(engines, found, strict=True):
            results |= {chunk.request: chunk.result for chunk in engine.step() if chunk.result is not None}
    for target, results, order in zip(targets, found, numbers, strict=True):
        alone = Engine(target, FORESTS[name](), "longest_path", max_batch=2).generate(PROMPTS, asked)
        assert [results[number].tokens for number in order] == [result.tokens for result in alone]


@pytest.mark.parametrize("name", FORESTS)
def test_few_pages_lose_nothing(name):
    """Requests that have to give their pages back keep what the target has drawn for them."""
    asked = samplings(0.9)
    expected = [result.tokens for result in run(FORESTS[name](), PROMPTS, asked)]
    slots = max(map(len, PROMPTS)) + LENGTH + FORESTS[name]().max_nodes
    engine = Engine(TARGET, FORESTS[name](), "longest_path", pages=slots // 4 + 3, page_size=4)
    sent_back = watch_sent_back(engine)
    assert [result.tokens for result in engine.generate(PROMPTS, asked)] == expected
    assert sent_back, "the test wants pages to run out"
    assert engine.cache.pool.free == engine.cache.pool.pages


@pytest.mark.parametrize("name", FORESTS)
def test_log_probabilities_are_the_targets(name):
    """Of every token, roots included, after the filters; whatever the token was drawn from."""
    asked = Sampling(temperature=0.8, top_k=9, max_tokens=8, seed=3, logprobs=True)
    result = run(FORESTS[name](), [PROMPTS[1]], asked)[0]
    text = list(PROMPTS[1])
    for token, logprob in zip(result.tokens, result.logprobs, strict=True):
        law = law_by_hand(last_logits(TARGET, text).double() / 0.8, top_k=9)
        assert logprob == pytest.approx(law[token].log().item(), abs=1e-4)
        text.append(token)


# Ends.


@pytest.mark.parametrize("name", FORESTS)
@pytest.mark.parametrize("temperature", [0.0, 0.9], ids=["greedy", "sampled"])
def test_nothing_follows_an_eos_and_no_cap_is_overshot(name, temperature):
    """The authors' programs trim neither."""
    asked = samplings(temperature)
    texts = [result.tokens for result in run(FORESTS[name](), PROMPTS, asked)]
    assert all(len(text) == LENGTH for text in texts)
    for cap in (1, 2, 7):
        capped = run(FORESTS[name](), PROMPTS, [dataclasses.replace(sampling, max_tokens=cap) for sampling in asked])
        assert [result.tokens for result in capped] == [text[:cap] for text in texts]
    ends = [eos_of(text, 3) for text in texts]
    ended = [dataclasses.replace(sampling, eos=end) for sampling, end in zip(asked, ends, strict=True)]
    for result, text, end in zip(run(FORESTS[name](), PROMPTS, ended), texts, ends, strict=True):
        assert result.tokens == text[: text.index(end) + 1] and result.finish_reason == "eos"


def test_stop_strings_are_found_across_blocks():
    target = dataclasses.replace(TARGET, tokenizer=Characters())
    text = run(FORESTS["fork"](), [PROMPTS[1]], GREEDY)[0].tokens
    shown = Characters().decode(text)
    for start in range(LENGTH - 3):
        stop = shown[start : start + 3]
        engine = Engine(target, FORESTS["fork"](), "longest_path")
        result = engine.generate([PROMPTS[1]], Sampling(max_tokens=LENGTH, stop=stop))[0]
        assert result.finish_reason == "stop" and result.text == shown[: shown.index(stop)]


@pytest.mark.parametrize("where", ["prompt", "answer"])
def test_nan_ends_its_request_alone(where):
    target = make_decoder(1)
    prompt = [1, 2, 33]
    if where == "answer":
        prompt = [3, 4, 5]
        target.embedding[simulated_token(prompt)] = float("nan")
    else:
        target.embedding[33] = float("nan")
    draft = drafts.MultiCandidate(first_layers(target, 1), (1, 1), target_roots=2)
    engine = Engine(target, draft, "longest_path", adapt=False)
    bad, good = engine.generate([prompt, [7, 8]], Sampling(max_tokens=8))
    alone = Engine(target, draft, "longest_path", adapt=False).generate([[7, 8]], Sampling(max_tokens=8))[0]
    assert bad.finish_reason == "invalid" and len(bad.tokens) < 8
    assert (good.finish_reason, good.tokens) == (alone.finish_reason, alone.tokens) and len(good.tokens) > 0


def simulated_token(prompt: list[int]) -> int:
    """The first root of an answer."""
    return int(last_logits(TARGET, prompt).argmax())


# Caches and topologies.


@pytest.mark.parametrize("model", ["own", "weak"])
@pytest.mark.parametrize(("roots", "branching"), [(1, (2, 1)), (2, (1, 1, 1)), (3, (2, 1))], ids=str)
def test_the_drafts_cache_is_that_of_the_text(model, roots, branching):
    """Also after rounds in which all was accepted, when the row of the last token is missing: all are with its own."""
    model = TARGET if model == "own" else DRAFT
    draft = drafts.MultiCandidate(model, branching, target_roots=roots)
    engine = Engine(TARGET, draft, "longest_path", adapt=False)
    number = engine.submit(PROMPTS[0], Sampling(temperature=0.9, max_tokens=40, seed=5))
    request, lengths = engine._requests[number], []
    for _ in range(6):
        before = len(request.ids)
        engine.step()
        lengths.append(len(request.ids) - before)
        state, text = request.draft_state, request.ids
        assert 0 < state.length < len(text)
        assert state.length == len(text) - 1 or lengths[-1] == 1 + len(branching)
        ours, table = engine.proposer.cache, engine.proposer.cache.page_table([state])
        theirs, whole = kept(model, text)
        slots = torch.arange(state.length, dtype=torch.int32)
        owners = torch.zeros_like(slots)
        found, wanted = ours.layer_kv(slots, owners, table), theirs.layer_kv(slots, owners, whole)
        assert torch.allclose(found, wanted, atol=1e-5)
    if model is TARGET:
        assert lengths == [1 + len(branching)] * 6


@pytest.mark.parametrize("name", FORESTS)
def test_topologies_are_made_once_and_sliced(name, monkeypatch):
    """Of trees that branch: one of the tree, one of the roots alone; in rounds none, however deep they are."""
    built, from_trees = [], Topology.from_trees.__func__

    def counted(cls, trees, *arguments, **options):
        trees = list(trees)
        built.extend(tree for tree in trees if tree.depth != len(tree) - 1)
        return from_trees(cls, trees, *arguments, **options)

    monkeypatch.setattr(Topology, "from_trees", classmethod(counted))
    engine = Engine(TARGET, FORESTS[name](), "longest_path")
    roots = engine.draft.target_roots
    assert built == [engine.draft.tree, Tree.from_branching((roots,), root=True)]
    seen = spied(engine)
    engine.generate(PROMPTS, samplings(0.9))
    assert len(built) == 2 and len(seen) > 5
    whole = engine.proposer._topology
    for drafted in seen:
        if drafted.sizes is None:
            assert drafted.topology.ancestors.data_ptr() == whole.ancestors.data_ptr()
            sliced = engine.draft.tree[: int(drafted.topology.num_nodes[0])]
            assert drafted.tokens.shape[1] == len(sliced)
    assert (len({drafted.tokens.shape[1] for drafted in seen}) > 1) == ("stop" in name)


def test_a_fork_is_a_tree_of_ones():
    draft = drafts.MultiCandidate(DRAFT, (1,) * 4, target_roots=5)
    assert draft.tree == Tree.fork(5, 4) and draft.max_nodes == 25 and draft.max_depth == 4


def test_rows_are_as_many_as_nodes():
    """No token stands in front of a forest: its rows are the paper's. With one root they are one more than drafted."""
    for roots, branching, rows in ((2, (4, 3, 1, 1), 82), (1, (4, 2, 2, 1), 45)):
        draft = drafts.MultiCandidate(DRAFT, branching, target_roots=roots)
        engine = Engine(TARGET, draft, "longest_path", adapt=False)
        seen = spied(engine)
        engine.generate([PROMPTS[0]], GREEDY)
        assert {drafted.tokens.shape[1] for drafted in seen} == {rows}


def test_diagnosis_of_several_roots():
    """Afresh the tree hangs from the true next token."""
    good = Engine(TARGET, drafts.MultiCandidate(TARGET, (1, 1), target_roots=2), "longest_path")
    found = good.diagnose(PROMPTS[:2], max_tokens=12)
    assert found.agreement == (1.0, 1.0) and found.accepted[0] == 1.0
    bad = Engine(TARGET, drafts.MultiCandidate(make_decoder(5), (1, 1), target_roots=2), "longest_path")
    assert bad.diagnose(PROMPTS[:2], max_tokens=12).agreement[0] < 0.5


# Refusals.


def test_rules_that_do_not_fit_are_refused():
    forest = drafts.MultiCandidate(DRAFT, (1,), target_roots=2)
    for rule in ("auto", "match", "recursive", "traversal", "typical"):
        with pytest.raises(ValueError, match="rule must be 'longest_path', which is lossy, for 2 target roots"):
            Engine(TARGET, forest, rule)
    with pytest.raises(ValueError, match=r"lossy by name \(typical\), got 'longest_path'"):
        Engine(TARGET, drafts.Ngram(), "longest_path")
    together = drafts.MultiCandidate(DRAFT, (1, 1), stop=SURE, stops_together=True)
    with pytest.raises(ValueError, match="stops_together must be False but with rule='match'"):
        Engine(TARGET, together)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"target_roots": "2"}, TypeError, "target_roots must be an int"),
        ({"target_roots": 0}, ValueError, "target_roots must be from 1 to 65535"),
        ({"stop": 0.5}, TypeError, "stop must be a specdec_ops.drafts.Stop or None"),
        ({"stops_together": 1}, TypeError, "stops_together must be True or False"),
    ],
    ids=lambda value: "" if isinstance(value, type | str) else "-".join(value),
)
def test_arguments_are_checked(options, error, message):
    with pytest.raises(error, match=message):
        drafts.MultiCandidate(DRAFT, (2, 1), **options)
    if "stop" in options:
        with pytest.raises(error, match=message):
            drafts.Chain(DRAFT, 2, **options)
