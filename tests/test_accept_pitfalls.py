"""What has gone wrong in other implementations of acceptance: one test for each pitfall, by its number.

The numbers are those of the project's list of published bugs (sgl-kernel, FlashInfer, vLLM, TensorRT-LLM, MCSD,
Sequoia, Hugging Face). 28 and 29 are about early exit. Laws are tested here by a chi-square that fails by chance once
in a million.
"""

import dataclasses
import functools

import pytest
import torch

from accept_cases import (
    CHAINS,
    RULES,
    WITH_DRAFT,
    AcceptCase,
    Bands,
    assert_same,
    chain,
    fields_of,
    make_case,
    one,
    random_parents,
    request_of,
    star,
)
from specdec_ops import (
    Topology,
    Tree,
    VocabMap,
    _dispatch,
    backends,
    chain_accept,
    greedy_accept,
    match_accept,
    sample_children,
    sample_tokens,
    tree_accept,
)

OP = "accept"
INTERPRETED_SHARE = 11
INF, NAN = float("inf"), float("nan")
STOCHASTIC = [rule for rule in RULES if rule != "greedy"]
STATUS_TARGET, STATUS_DRAFT, STATUS_IMPOSSIBLE, STATUS_TREE = 1, 2, 4, 16


def slow(target):
    """Interpreted or emulated: right, but very slow."""
    return target.device == "cpu" and target.backend in ("triton", "cuda-emulated")


def extra(rule):
    return {"width": 2} if rule == "longest" else {}


def forest_roots(rule):
    return 2 if rule == "longest" else 1


def many(target, kernels=20_000):
    """How many requests a test of a law can afford."""
    return 60 if slow(target) else 500 if target.backend == "torch" else kernels


def log(*probabilities):
    """Logits of a distribution."""
    return torch.tensor(probabilities).log()


def repeated(target, count, *rows):
    """[count, rows, vocab] over the same rows, by strides."""
    return torch.stack(rows).to(target.device).expand(count, -1, -1)


def noise(target, count, seed=0):
    """Seeds that differ, on the device."""
    return {"seeds": torch.arange(seed, seed + count, device=target.device), "positions": 3}


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


def perfect(rule, nodes=4, vocab=12, batch=3, **options):
    """A chain that every rule accepts whole: the target is certain of the drafted tokens."""
    case = make_case(rule, [chain(nodes)] * batch, vocab, **extra(rule), **options)
    case.target[:] = -INF
    tokens = case.tokens if rule in CHAINS else case.tokens[:, 1:]
    for step in range(nodes - 1):
        case.target[torch.arange(batch), step, tokens[:, step].long()] = 0.0
    case.target[:, nodes - 1, vocab - 1] = 0.0
    if case.draft is not None:
        case.draft[:] = case.target[:, : case.draft.shape[1]]
    return case


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


@pytest.mark.parametrize("rule", RULES)
def test_04_masked_tokens_and_rows(rule, target):
    """-inf is never emitted; a row of nothing else has a defined token, a status, and progress."""
    case = make_case(rule, [star(3)] * 10 if rule not in CHAINS else [chain(3)] * 10, 30, **extra(rule))
    case.target[..., 10:] = -INF
    result = case.to(target.device).run(target.backend)
    emitted = result.next_tokens if rule == "longest" else result.next_token[:, None]
    assert ((emitted >= 0) & (emitted < 10)).all()
    if rule != "longest":
        case.target[0] = -INF
        result = case.to(target.device).run(target.backend)
        assert result.status[0] & STATUS_TARGET
        assert result.tokens[0, 0] == 0
        assert not (result.status[1:] & STATUS_TARGET).any()


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("rule", RULES)
def test_05_nan_and_infinity(rule, value, target):
    """A status, an id of the vocabulary, progress, and untouched neighbours."""
    vocab, bad = 45, 2
    case = make_case(rule, [random_parents(7, 3, forest_roots(rule))] * 4, vocab, **extra(rule))
    want = case.to(target.device).run(target.backend)
    case.target[bad, :, 40] = value
    result = case.to(target.device).run(target.backend)
    Bands().check(case, result)
    assert result.status[bad] & STATUS_TARGET
    emitted = result.next_tokens[bad, 0] if rule == "longest" else result.next_token[bad]
    assert 0 <= emitted < vocab
    others = [0, 1, 3]
    assert all(request_of(result, index) == request_of(want, index) for index in others)
    if case.draft is not None:
        case = make_case(rule, [random_parents(7, 3, forest_roots(rule))] * 4, vocab, **extra(rule))
        case.draft[bad, :, 0] = value
        result = case.to(target.device).run(target.backend)
        assert result.status[bad] == STATUS_DRAFT
        assert result.num_accepted[bad] == (1 if rule == "longest" else 0)
        assert all(request_of(result, index) == request_of(want, index) for index in others)


@pytest.mark.parametrize("rule", ["coin", "recursive", "traversal"])
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


@pytest.mark.parametrize("rule", ["recursive", "traversal", "coin"])
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
    if rule == "coin":
        with pytest.raises(ValueError, match="draft_logits must be None with rule='coin'"):
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


@pytest.mark.parametrize("vocab", [1, 3, 31, 65, 257, 1023])
def test_11_the_tail_of_the_vocabulary(vocab, target):
    """The last token wins if it should; what lies behind a row is not read."""
    memory = torch.full((2, 3, vocab + 16), INF, device=target.device)
    logits = memory[..., :vocab]
    logits[:] = -INF
    logits[..., -1] = -5.0
    tokens = torch.full((2, 3), vocab - 1, dtype=torch.int32, device=target.device)
    topology = Tree.chain(3).to(target.device)
    noisy = {"backend": target.backend, **noise(target, 2)}
    for result in (
        greedy_accept(logits, tokens, topology, backend=target.backend),
        match_accept(logits, tokens, topology, **noisy),
        tree_accept(logits, tokens, topology, logits, **noisy),
        tree_accept(logits, tokens, topology, rule="coin", top_p=0.9, **noisy),
    ):
        assert result.tokens.tolist() == [[vocab - 1] * 3] * 2
        assert result.status.tolist() == [0, 0]


def test_12_ids_beyond_24_bits(target):
    """Where float32 can't tell neighbouring ids apart."""
    if slow(target):
        pytest.skip("interpreted: 16 million tokens")
    vocab = 2**24 + 5
    logits = torch.full((1, 1, vocab), -INF, dtype=torch.bfloat16, device=target.device)
    logits[..., 2**24 + 3] = 1.0
    logits[..., 2**24 + 1] = 1.0
    logits[..., 7] = 0.5
    tokens, topology = torch.zeros(1, 1, dtype=torch.int32, device=target.device), Tree([-1]).to(target.device)
    assert greedy_accept(logits, tokens, topology, backend=target.backend).next_token.item() == 2**24 + 1
    if target.backend == "torch":
        return  # the definition sorts 16 million tokens for what follows
    options = {"positions": 0, "top_k": 2, "backend": target.backend}
    drawn = {match_accept(logits, tokens, topology, seeds=seed, **options).next_token.item() for seed in range(8)}
    assert drawn == {2**24 + 1, 2**24 + 3}


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


@pytest.mark.parametrize("rule", ["match", "recursive", "coin", "typical"])
def test_15_no_scan_runs_over_the_end(rule, target):
    """All mass on the first tokens, none on a thousand behind them."""
    count = 10 if slow(target) else 300
    row = torch.full((1003,), -INF)
    row[:3] = log(0.2, 0.3, 0.5)
    tokens = torch.zeros(count, 1, dtype=torch.int32)
    options = {"seeds": torch.arange(count), "positions": 1}
    case = AcceptCase(rule, row.expand(count, 1, -1), tokens, Tree([-1]).to("cpu"), None, options)
    result = case.to(target.device).run(target.backend)
    assert (result.next_token < 3).all()


@pytest.mark.parametrize("rule", ["recursive", "traversal", "coin"])
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


def test_19_expanded_logits(target):
    """One row for all requests and nodes, by strides of 0: more than 2^31 elements that nobody stores."""
    if slow(target):
        pytest.skip("interpreted: the batch is too large")
    batch, nodes, vocab = 9, 2000, 128_257
    assert batch * nodes * vocab > 2**31
    row = torch.randn(1, 1, vocab, device=target.device)
    tokens = row[0, 0].topk(nodes).indices.int().expand(batch, nodes)
    topology = Tree(random_parents(nodes, 1, wide=0.9)).to(target.device)
    noise = {"seeds": torch.arange(batch), "positions": 4, "temperature": 0.25}
    case = AcceptCase("coin", row.expand(batch, nodes, vocab), tokens, topology, None, noise)
    got = case.to(target.device).run(target.backend)
    assert got.num_accepted.sum() > 0
    last = one(case, batch - 1)
    Bands().check(last, last.to(target.device).run(target.backend))
    assert request_of(last.to(target.device).run(target.backend), 0) == request_of(got, batch - 1)


def test_19_offsets_beyond_32_bits(target):
    """The last request's rows lie more than 2^31 elements behind the first's. Memory in between is never touched."""
    if target.device != "cpu" or slow(target):
        pytest.skip("needs 4 GB of address space that is not backed by memory")
    vocab, nodes = 1000, 3
    try:
        memory = torch.empty(2**31 + nodes * vocab, dtype=torch.bfloat16)
    except RuntimeError as error:
        pytest.skip(f"no address space: {error}")
    logits = memory.as_strided((2, nodes, vocab), (2**31, vocab, 1))
    case = make_case("token", [chain(nodes)] * 2, vocab, dtype=torch.bfloat16, one_hot=True)
    logits.copy_(case.target)
    assert_same(case.changed(target=logits).run(target.backend), case.run(target.backend))


@pytest.mark.parametrize("rule", RULES)
def test_20_a_permuted_batch_permutes_the_result(rule, target):
    """And a request alone gets the same as in company."""
    trees = [random_parents(size, size, forest_roots(rule), 0.6) for size in (9, 3, 1, 12, 7)]
    options = {} if rule == "greedy" else {"temperature": torch.tensor([0.0, 1.0, 0.5, 0.9, 1.3]), "top_p": 0.95}
    case = make_case(rule, trees, 33, **extra(rule), **options)
    want = case.to(target.device).run(target.backend)
    order = torch.tensor([3, 0, 4, 1, 2])
    requests = [one(case, index) for index in order.tolist()]
    options = {
        name: torch.cat([part.options[name] for part in requests])
        if isinstance(value, torch.Tensor) and value.dim()
        else value
        for name, value in case.options.items()
    }
    topology = case.topology and Topology(
        *(
            None if field.name == "offsets" else torch.cat([getattr(part.topology, field.name) for part in requests])
            for field in dataclasses.fields(Topology)
        )
    )
    permuted = AcceptCase(
        rule,
        case.target[order],
        case.tokens[order],
        topology,
        None if case.draft is None else case.draft[order],
        options,
    )
    got = permuted.to(target.device).run(target.backend)
    assert [request_of(got, index) for index in range(5)] == [request_of(want, index) for index in order.tolist()]
    assert request_of(requests[0].to(target.device).run(target.backend), 0) == request_of(want, 3)


@pytest.mark.parametrize("rule", STOCHASTIC)
def test_21_replays_with_changed_seeds(rule, target):
    """Seeds and positions are read when the op runs: changed in place, as between replays of a graph, they count."""
    case = make_case(rule, [random_parents(6, 1, forest_roots(rule))] * 8, 400, scale=0.5, **extra(rule)).to(
        target.device
    )
    result = case.run(target.backend)
    assert_same(case.run(target.backend), result)
    before = {name: tensor.clone() for name, tensor in fields_of(result).items()}
    seeds, positions = case.options["seeds"], case.options["positions"]
    for tensor, change in ((seeds, 1), (seeds, 2**32), (positions, 1)):
        tensor += change
        case.run(target.backend, out=result)
        assert any(not torch.equal(before[name], tensor) for name, tensor in fields_of(result).items())
        tensor -= change
    case.run(target.backend, out=result)
    assert all(torch.equal(before[name], tensor) for name, tensor in fields_of(result).items())


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


@pytest.mark.parametrize("rule", RULES)
def test_25_inputs_are_not_written_and_outputs_all_are(rule, target):
    """Outputs start poisoned in every test of this suite; here they also start from another call's results."""
    trees = [random_parents(size, size, forest_roots(rule)) for size in (8, 2, 5)]
    case = make_case(rule, trees, 33, **extra(rule)).to(target.device)
    tensors = [value for value in vars(case).values() if isinstance(value, torch.Tensor)]
    tensors += [value for value in case.options.values() if isinstance(value, torch.Tensor)]
    if case.topology is not None:
        tensors += [case.topology.first_child, case.topology.next_sibling, case.topology.num_nodes]
    before = [tensor.clone() for tensor in tensors]
    result = case.run(target.backend)
    want = {name: tensor.clone() for name, tensor in fields_of(result).items()}
    case.run(target.backend, out=result)
    assert all(torch.equal(want[name], tensor) for name, tensor in fields_of(result).items())
    for tensor, copy in zip(tensors, before, strict=True):
        assert torch.equal(tensor.nan_to_num(77.0), copy.nan_to_num(77.0))
    assert all(((tensor >= -1) & (tensor < 2**20)).all() for tensor in want.values())


MALFORMED = {
    "a child that is its parent": {"first_child": [0, -1, -1, -1]},
    "siblings in a circle": {"next_sibling": [-1, 2, 1, -1]},
    "a sibling that is itself": {"next_sibling": [-1, 1, -1, -1]},
    "a child out of the tree": {"first_child": [99, -1, -1, -1]},
    "a sibling out of the tree": {"next_sibling": [-1, 2**31 - 1, -1, -1]},
    "a negative link": {"first_child": [-(2**31), -1, -1, -1]},
    "no node": {"num_nodes": [0]},
    "fewer than no node": {"num_nodes": [-5]},
    "more nodes than there are": {"num_nodes": [2**31 - 1]},
}


@pytest.mark.parametrize("kind", MALFORMED)
@pytest.mark.parametrize("rule", [rule for rule in RULES if rule not in CHAINS])
def test_26_malformed_trees(rule, kind, target):
    """A status, never a hang or a wild read; the other request is untouched."""
    sound = Topology.from_trees([Tree([-1, 0, 0, 1])] * 2)
    broken = dataclasses.replace(sound)
    for name, values in MALFORMED[kind].items():
        tensor = getattr(sound, name).clone()
        tensor[0] = (
            torch.tensor(values, dtype=torch.int64).to(torch.int32).squeeze(0)
            if name == "num_nodes"
            else (torch.tensor(values, dtype=torch.int64).to(torch.int32))
        )
        broken = dataclasses.replace(broken, **{name: tensor})
    # Nothing is accepted, so that every sibling is looked at. The tree is then seen to be broken at its root.
    case = make_case(rule, [[-1, 0, 0, 1]] * 2, 9, **extra(rule))
    case.target[..., :8] = -INF
    case.tokens[:] = case.tokens.clamp(0, 7)
    if case.draft is not None:
        case.draft[..., 8:] = -INF
    want = case.to(target.device).run(target.backend)
    case = case.changed(topology=broken)
    result = case.to(target.device).run(target.backend)
    assert request_of(result, 1) == request_of(want, 1)
    Bands().check(case, result)
    assert result.status[0] & STATUS_TREE


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule not in CHAINS])
def test_26_a_circle_on_the_accepted_path(rule, target):
    """A child of the last accepted node that leads back to the first."""
    case = perfect(rule)
    first_child = case.topology.first_child.clone()
    first_child[0, 2] = 1
    want = case.to(target.device).run(target.backend)
    circle = case.changed(topology=dataclasses.replace(case.topology, first_child=first_child))
    result = circle.to(target.device).run(target.backend)
    assert result.status.tolist() == [STATUS_TREE, 0, 0]
    assert (result.num_accepted - want.num_accepted).tolist() == [-1, 0, 0]
    assert torch.equal(result.nodes[0, :3], want.nodes[0, :3])
    assert torch.equal(result.tokens[1:], want.tokens[1:])


@pytest.mark.parametrize("rule", ["recursive", "traversal", "coin", "kseq", "match", "greedy", "typical"])
def test_26_more_than_64_siblings(rule, target):
    """The last of 90 is the one to accept."""
    vocab = 120
    case = make_case(rule, [star(90)] * 2, vocab, gap=0.0)
    case.target[:] = -INF
    case.tokens[:] = torch.arange(91, dtype=torch.int32)
    case.target[:, :, 90] = 0.0
    if case.draft is not None:
        case.draft[:] = 0.0
    result = case.to(target.device).run(target.backend)
    assert result.tokens[:, 0].tolist() == [90, 90]
    if rule != "kseq":
        assert result.nodes[:, 1].tolist() == [90, 90]


@pytest.mark.parametrize("rule", RULES)
def test_27_the_end_of_a_sequence_inside_the_path(rule, target):
    """Nothing after it, no next token; whatever lies below it is not looked at."""
    case = perfect(rule, nodes=5, vocab=12)
    drafted = case.tokens if rule in CHAINS else case.tokens[:, 1:]
    drafted[:] = torch.tensor([3, 7, 4, 5])
    case.target[:] = -INF
    case.target[:, torch.arange(4), drafted[0].long()] = 0.0
    case.target[:, 2:] = NAN  # rows behind the end
    if case.draft is not None:
        case.draft[:] = case.target[:, : case.draft.shape[1]]
    result = case.to(target.device).run(target.backend, eos=(9, 7))
    if rule == "longest":
        assert result.num_accepted.tolist() == [3] * 3
        assert (result.next_tokens == -1).all()
        return
    assert result.tokens.tolist() == [[3, 7, -1, -1, -1]] * 3
    assert result.nodes.tolist() == [[0, 1, 2, -1, -1]] * 3
    assert result.next_token.tolist() == [-1] * 3
    assert result.status.tolist() == [0] * 3


@pytest.mark.parametrize("rule", RULES)
def test_30_strides_are_honoured_or_refused(rule, target):
    """Every second row of a larger tensor; a last dimension with gaps."""
    case = make_case(rule, [random_parents(6, 2, forest_roots(rule))] * 2, 21, **extra(rule)).to(target.device)
    want = case.run(target.backend)
    memory = torch.full((4, 12, 21), NAN, device=target.device)
    memory[::2, ::2] = case.target
    assert_same(case.changed(target=memory[::2, ::2]).run(target.backend), want)
    gaps = torch.zeros(*case.target.shape, 2, device=target.device)[..., 0]
    with pytest.raises(ValueError, match="must be contiguous in its last dimension"):
        case.changed(target=gaps).run(target.backend)


@pytest.mark.parametrize("op", ["accept", "sample"])
def test_31_triton_is_no_silent_no_op_on_a_cpu(op, monkeypatch):
    """Without its interpreter, a kernel on CPU tensors is refused."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    _dispatch.forget()
    try:
        with pytest.raises(RuntimeError, match="backend='triton' is unavailable"):
            if op == "sample":
                sample_tokens(torch.zeros(1, 4), seeds=0, positions=0, backend="triton")
            else:
                greedy_accept(torch.zeros(1, 1, 4), torch.zeros(1, 1).int(), Tree([-1]).to("cpu"), backend="triton")
    finally:
        _dispatch.forget()
