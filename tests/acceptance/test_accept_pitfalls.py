"""What has gone wrong in other implementations of acceptance: one test for each pitfall, by its number.

The numbers are those of the project's list of published bugs (sgl-kernel, FlashInfer, vLLM, TensorRT-LLM, MCSD,
Sequoia, Hugging Face). 28 and 29 are about early exit. Laws are tested here by a chi-square that fails by chance once
in a million. Pitfalls of what acceptance reads and writes are in test_accept_pitfalls_inputs.
"""

import functools

import pytest
import torch

from specdec_ops import (
    Tree,
    VocabMap,
    backends,
    chain_accept,
    greedy_accept,
    longest_path_accept,
    match_accept,
    sample_children,
    tree_accept,
)
from tests.acceptance.accept_cases import (
    CHAINS,
    RULES,
    WITH_DRAFT,
    AcceptCase,
    Bands,
    chain,
    make_case,
    random_parents,
    request_of,
    star,
)
from tests.acceptance.pitfall_cases import (
    INF,
    STATUS_IMPOSSIBLE,
    STATUS_TARGET,
    extra,
    forest_roots,
    log,
    noise,
    perfect,
    slow,
)

OP = "accept"
INTERPRETED_SHARE, EMULATED_SHARE = 17, 3
STOCHASTIC = [rule for rule in RULES if rule != "greedy"]


def many(target, kernels=20_000):
    """How many requests a test of a law can afford."""
    return 60 if slow(target) else 500 if target.backend == "torch" else kernels


def repeated(target, count, *rows):
    """[count, rows, vocab] over the same rows, by strides."""
    return torch.stack(rows).to(target.device).expand(count, -1, -1)


def chi_square(tokens, probabilities):
    """How far counts are from their expectation, in units of the value exceeded once in a million."""
    expected = torch.as_tensor(probabilities).double().cpu() * len(tokens)
    assert (tokens >= 0).all()
    counts = tokens.cpu().long().bincount(minlength=len(expected)).double()
    assert (counts[expected == 0] == 0).all(), "a token of probability 0"
    likely = expected > 0
    freedom = int(likely.sum()) - 1
    value = ((counts - expected)[likely] ** 2 / expected[likely]).sum().item()
    limit = freedom * (1 - 2 / (9 * freedom) + 4.75 * (2 / (9 * freedom)) ** 0.5) ** 3
    return value / limit


def drafted_star(target, draft_row, count, children, *, replacement=False, **law):
    """Tokens [count, 1 + children] of stars, sampled from the draft's row."""
    sampling = "torch" if backends("sample")["cpu"] is not None else "auto"
    rows = draft_row.to(target.device).expand(count, 1, -1)
    options = {"replacement": replacement, "backend": sampling, **noise(target, count), **law}
    found = sample_children(rows, children, **options)
    return torch.nn.functional.pad(found.tokens[:, 0], (1, 0))


@pytest.mark.parametrize("rule", ["token", "block", "recursive", "traversal", "kseq"])
def test_01_equal_distributions_always_accept(rule, target):
    """And the residual, which is empty, is never needed."""
    count = 20 if slow(target) else 300
    row = torch.randn(9)
    tree = Tree.chain(4).to(target.device)
    tokens = torch.stack([torch.randperm(9)[:4] for _ in range(count)]).int().to(target.device)
    logits = repeated(target, count, row, row, row, row)
    options = {"backend": target.backend, **noise(target, count)}
    if rule in CHAINS:
        result = chain_accept(logits, tokens[:, 1:], logits[:, 1:], rule=rule, **options)
    else:
        result = tree_accept(logits, tokens, tree, logits, rule=rule, **options)
    assert (result.num_accepted == 3).all()
    assert (result.status == 0).all()


@pytest.mark.parametrize("rule", RULES)
def test_02_a_token_of_probability_zero_is_never_accepted(rule, target):
    """Not with any coin."""
    count = 10 if slow(target) else 200
    case = make_case(rule, [chain(3)] * count, 6, **extra(rule))
    tokens = case.tokens if rule in CHAINS else case.tokens[:, 1:]
    case.target[torch.arange(count), 0, tokens[:, 0].long()] = -INF
    result = case.to(target.device).run(target.backend)
    assert (result.num_accepted == (1 if rule == "longest" else 0)).all()


@pytest.mark.parametrize("rule", WITH_DRAFT)
def test_03_a_drafted_token_that_the_draft_excludes(rule, target):
    """Rejected and reported; the next token is the target's."""
    case = make_case(rule, [chain(3)] * 5, 8, **extra(rule))
    tokens = case.tokens if rule in CHAINS else case.tokens[:, 1:]
    case.draft[torch.arange(5), 0, tokens[:, 0].long()] = -INF
    result = case.to(target.device).run(target.backend)
    assert (result.num_accepted == (1 if rule == "longest" else 0)).all()
    assert (result.status == STATUS_IMPOSSIBLE).all()
    Bands().check(case, result)


@pytest.mark.parametrize("rule", ["target_only", "recursive", "traversal"])
def test_06_equal_siblings(rule, target):
    """A repeat is as good as a token of probability 0 in its place."""
    count = 20 if slow(target) else 200
    row = log(0.4, 0.3, 0.2, 0.1, 0.0)
    rows = repeated(target, count, row, row, row, row)
    topology = Tree(star(3)).to(target.device)

    def run(*tokens):
        tokens = torch.tensor([[0, *tokens]], dtype=torch.int32, device=target.device).expand(count, -1)
        return tree_accept(rows, tokens, topology, rule=rule, backend=target.backend, **noise(target, count))

    repeat, none = run(1, 1, 2), run(1, 4, 2)
    assert torch.equal(repeat.tokens[:, 0], none.tokens[:, 0])
    assert torch.equal(repeat.num_accepted, none.num_accepted)
    assert (repeat.nodes[:, 1] != 2).all()
    assert chi_square(repeat.tokens[:, 0], row.exp()) < 1


P, Q = log(0.05, 0.15, 0.3, 0.5), log(0.4, 0.3, 0.2, 0.1)


@pytest.mark.parametrize("replacement", [False, True])
@pytest.mark.parametrize("rule", ["recursive", "traversal"])
def test_07_with_and_without_replacement(rule, replacement, target):
    """Each is right for siblings that were drawn so."""
    count = many(target)
    tokens = drafted_star(target, Q, count, 3, replacement=replacement)
    options = {"rule": rule, "backend": target.backend, **noise(target, count)}
    logits, draft = repeated(target, count, P, P, P, P), repeated(target, count, Q, Q, Q, Q)
    topology = Tree(star(3)).to(target.device)
    result = tree_accept(logits, tokens, topology, draft, replacement=replacement, **options)
    assert chi_square(result.tokens[:, 0], P.exp()) < 1
    # The reverse is right as well: of repeated draws, the distinct ones are draws without replacement.
    if count >= 20_000 and not replacement and rule == "recursive":
        wrong = tree_accept(logits, tokens, topology, draft, replacement=True, **options)
        assert chi_square(wrong.tokens[:, 0], P.exp()) > 2


@pytest.mark.parametrize("rule", ["recursive", "traversal"])
def test_08_nothing_left_of_the_draft(rule, target):
    """All that the draft could propose is rejected; further siblings can't exist, and no division by zero happens."""
    count = 20 if slow(target) else 200
    p, q = log(0.0, 0.0, 0.5, 0.5), log(0.5, 0.5, 0.0, 0.0)
    tokens = torch.tensor([[0, 0, 1, 2, 3]], dtype=torch.int32, device=target.device).expand(count, -1)
    result = tree_accept(
        repeated(target, count, p, p, p, p, p),
        tokens,
        Tree(star(4)).to(target.device),
        repeated(target, count, q, q, q, q, q),
        rule=rule,
        backend=target.backend,
        **noise(target, count),
    )
    assert (result.num_accepted == 0).all()
    assert chi_square(result.next_token, p.exp()) < 1
    single = AcceptCase(
        rule,
        p.expand(3, 5, 4),
        tokens[:3].cpu(),
        Tree(star(4)).to("cpu"),
        q.expand(3, 5, 4),
        {"seeds": torch.arange(3), "positions": 3},
    )
    Bands().check(single, single.to(target.device).run(target.backend))


@pytest.mark.parametrize("rule", ["recursive", "traversal", "target_only"])
def test_09_deterministic_drafts(rule, target):
    """Top-k children without draft logits keep the law; a draft that was chosen so must say so."""
    count = many(target)
    tokens = torch.tensor([[0, 0, 1]], dtype=torch.int32, device=target.device).expand(count, -1)
    logits = repeated(target, count, P, P, P)
    topology = Tree(star(2)).to(target.device)
    options = {"backend": target.backend, **noise(target, count)}
    result = tree_accept(logits, tokens, topology, rule=rule, **options)
    assert chi_square(result.tokens[:, 0], P.exp()) < 1
    draft = repeated(target, count, Q, Q, Q)
    if rule == "target_only":
        with pytest.raises(ValueError, match="draft_logits must be None with rule='target_only'"):
            tree_accept(logits, tokens, topology, draft, rule=rule, **options)
    elif count >= 20_000:  # scored with the soft q, the law is another one
        wrong = tree_accept(logits, tokens, topology, draft, rule=rule, **options)
        assert chi_square(wrong.tokens[:, 0], P.exp()) > 2


@pytest.mark.parametrize("rule", STOCHASTIC)
def test_10_temperature_zero_in_a_mixed_batch(rule, target):
    """A greedy request follows the argmax, whatever its neighbours do."""
    trees = [random_parents(8, 5, forest_roots(rule))] * 6
    temperature = torch.tensor([0.0, 1.0, 0.0, 0.7, 0.0, 2.0])
    case = make_case(rule, trees, 20, gap=0.3, temperature=temperature, **extra(rule)).to(target.device)
    result = case.run(target.backend)
    assert (result.status & STATUS_TARGET == 0).all()
    if rule not in ("longest", *CHAINS):
        greedy = greedy_accept(case.target, case.tokens, case.topology, backend=target.backend)
        cold = [0, 2, 4]
        assert all(request_of(result, index) == request_of(greedy, index) for index in cold)
    Bands().check(case, result)


@pytest.mark.parametrize("vocab", [2, 70, 1500])
def test_13_ties_go_to_the_lowest_id(vocab, target):
    """Of the argmax, and of what top_k and top_p keep."""
    logits = torch.zeros(1, 2, vocab, device=target.device)
    tokens = torch.zeros(1, 2, dtype=torch.int32, device=target.device)
    topology = Tree.chain(2).to(target.device)
    assert greedy_accept(logits, tokens, topology, backend=target.backend).tokens.tolist() == [[0, 0]]
    for law in ({"top_k": 1}, {"top_p": 0.5 / vocab}, {"temperature": 0.0}):
        result = match_accept(logits, tokens, topology, seeds=5, positions=1, backend=target.backend, **law)
        assert result.tokens.tolist() == [[0, 0]]


def test_14_the_tail_is_neither_cut_nor_inflated(target):
    """200,000 tokens with a logit 18 below the top: 0.3% together. 24-bit noise makes it 1.2%, clamped noise 0.04%."""
    if target.backend != "cpu" and target.device == "cpu":
        pytest.skip("800 million exponentials are for compiled kernels; the formula is tested in test_noise.py")
    count, vocab = 4000, 200_001
    row = torch.full((vocab,), -18.0, device=target.device)
    row[1234] = 0.0
    tokens = torch.zeros(count, 1, dtype=torch.int32, device=target.device)
    result = match_accept(
        row.expand(count, 1, vocab),
        tokens,
        Tree([-1]).to(target.device),
        backend=target.backend,
        **noise(target, count),
    )
    tail = (result.next_token != 1234).sum().item()
    expected = count * (1 - 1 / (1 + (vocab - 1) * torch.tensor(-18.0).exp().item()))
    assert abs(tail - expected) < 4.8 * expected**0.5


@pytest.mark.parametrize("rule", ["recursive", "traversal", "target_only"])
def test_16_the_next_token_has_noise_of_its_own(rule, target):
    """After a rejection it has the residual's law: the coin that rejected says nothing about it."""
    count = many(target)
    row = log(0.5, 0.25, 0.15, 0.1)
    tokens = torch.tensor([[0, 0]], dtype=torch.int32, device=target.device).expand(count, -1)
    topology = Tree.chain(2).to(target.device)
    result = tree_accept(
        repeated(target, count, row, row), tokens, topology, rule=rule, backend=target.backend, **noise(target, count)
    )
    rejected = result.num_accepted == 0
    assert chi_square(rejected.int(), [0.5, 0.5]) < 1
    assert chi_square(result.next_token[rejected], [0, 0.5, 0.3, 0.2]) < 1
    assert chi_square(result.next_token[~rejected], row.exp()) < 1


@pytest.mark.parametrize("rule", CHAINS)
def test_17_no_noise_is_used_twice(rule, target):
    """Drafting, accepting and the next token with one seed: the pair of tokens has the target's joint law."""
    count = many(target, 40_000)
    after = torch.stack([log(0.7, 0.2, 0.1), log(0.1, 0.1, 0.8), log(0.3, 0.4, 0.3)])  # depends on the first token
    first, q = log(0.2, 0.5, 0.3), log(0.5, 0.2, 0.3)
    tokens = drafted_star(target, q, count, 1)[:, 1:]
    seconds = after.to(target.device)[tokens[:, 0].long()]
    logits = torch.stack([first.to(target.device).expand(count, -1), seconds], dim=1)
    draft = repeated(target, count, q)
    result = chain_accept(logits, tokens, draft, rule=rule, backend=target.backend, **noise(target, count))
    assert chi_square(result.tokens[:, 0], first.exp()) < 1
    accepted = result.num_accepted == 1
    pairs = 3 * result.tokens[accepted, 0] + result.tokens[accepted, 1]
    both = torch.minimum(first, q).exp()
    joint = (both[:, None] * after.exp()).flatten() / both.sum()
    assert chi_square(pairs, joint) < 1


@pytest.mark.parametrize("dtypes", [("float32", "float16"), ("float16", "float32"), ("bfloat16", "float32")], ids=str)
def test_18_sums_in_full_precision(dtypes, target):
    """32,000 equal logits: summed in half precision they would stop at 2,048 or 256, and p would not be q."""
    count, vocab = (2, 3000) if slow(target) else (20, 32_000)
    target_dtype, draft_dtype = (getattr(torch, name) for name in dtypes)
    logits = torch.zeros(1, 1, vocab, device=target.device).expand(count, 3, vocab)
    tokens = torch.randint(0, vocab, (count, 2), dtype=torch.int32).to(target.device)
    result = chain_accept(
        logits.to(target_dtype),
        tokens,
        logits[:, 1:].to(draft_dtype),
        backend=target.backend,
        **noise(target, count),
    )
    assert (result.num_accepted == 2).all()


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "longest"])
def test_22_the_next_token_comes_from_the_last_accepted_node(rule, target):
    """At a leaf, at max_depth, without drafts, before padding."""
    case = perfect(rule, nodes=4, vocab=12)
    drafted = case.tokens if rule in CHAINS else case.tokens[:, 1:]
    result = case.to(target.device).run(target.backend)
    assert result.tokens.tolist() == [[*row, 11] for row in drafted.tolist()]
    if rule not in CHAINS:
        short = case.to(target.device).run(target.backend, max_depth=2)
        assert short.num_accepted.tolist() == [2] * 3
        assert short.next_token.tolist() == drafted[:, 2].tolist()
    case.tokens[:, -2] = -1  # the third of four nodes
    padded = case.to(target.device).run(target.backend)
    assert padded.num_accepted.tolist() == [1] * 3
    assert padded.next_token.tolist() == case.target[:, 1].argmax(-1).tolist()
    assert padded.status.tolist() == [0] * 3
    alone = perfect(rule, nodes=1).to(target.device).run(target.backend)
    assert alone.tokens.tolist() == [[11]] * 3
    assert alone.nodes.tolist() == [[0]] * 3


@pytest.mark.parametrize("rule", ["recursive", "traversal"])
def test_23_a_reduced_draft_vocabulary(rule, target):
    """What the draft can't say has draft probability 0; the residual covers the whole vocabulary."""
    count = many(target)
    p, q = log(0.3, 0.05, 0.25, 0.2, 0.15, 0.05), log(0.5, 0.2, 0.3)
    mapping = VocabMap(torch.tensor([4, 1, 2]), 6).to(target.device)
    tokens = drafted_star(target, q, count, 2, vocab_map=mapping)
    assert set(tokens[:, 1:].unique().tolist()) == {1, 2, 4}
    result = tree_accept(
        repeated(target, count, p, p, p),
        tokens,
        Tree(star(2)).to(target.device),
        repeated(target, count, q, q, q),
        rule=rule,
        vocab_map=mapping,
        backend=target.backend,
        **noise(target, count),
    )
    assert chi_square(result.tokens[:, 0], p.exp()) < 1


@pytest.mark.parametrize("rule", ["recursive", "traversal"])
def test_24_the_draft_that_was_sampled_is_the_one_that_is_told(rule, target):
    """Sampled at another temperature and cut to its top tokens: right if told, another law if not."""
    count = many(target)
    drafted = {"temperature": 0.4, "top_k": 3, "top_p": 0.97}
    tokens = drafted_star(target, Q, count, 2, **drafted)
    call = functools.partial(
        tree_accept,
        repeated(target, count, P, P, P),
        tokens,
        Tree(star(2)).to(target.device),
        repeated(target, count, Q, Q, Q),
        rule=rule,
        backend=target.backend,
        **noise(target, count),
    )
    told = call(draft_temperature=0.4, draft_top_k=3, draft_top_p=0.97)
    assert chi_square(told.tokens[:, 0], P.exp()) < 1
    if count >= 20_000:
        assert chi_square(call().tokens[:, 0], P.exp()) > 2


@pytest.mark.parametrize(
    ("second", "third", "tokens", "status"),
    [(-1, 1, [2, 3], 0), (9, -1, [2, 3], 4), (-2, 1, [1, 3], 4), (1, -1, [2, 3], 0)],
)
def test_roots_that_are_no_tokens(second, third, tokens, status, target):
    """-1 ends the list of roots, as `next_tokens` of the round before pads it; others are left out and reported."""
    topology = Tree([-1, -1, -1, 0, 2]).to(target.device)
    logits = torch.zeros(1, 5, 4, device=target.device)
    logits[0, :, 3] = 40.0  # every child that is tried passes
    drafted = torch.tensor([[2, second, third, 3 if tokens[0] == 2 else 0, 3]], device=target.device).int()
    proposals = torch.zeros(1, 5, 4, device=target.device)
    options = {"seeds": 1, "positions": 1, "backend": target.backend}
    got = longest_path_accept(logits, drafted, topology, proposals, width=2, **options)
    assert got.tokens[0, :2].tolist() == tokens
    assert got.status.tolist() == [status]
