"""The acceptance ops on every backend against the definition in float64."""

import functools

import numpy as np
import pytest
import torch

from specdec_ops import Topology, Tree, VocabMap, chain_accept, greedy_accept, tree_accept
from tests.acceptance.accept_cases import (
    CHAINS,
    RULES,
    WITH_DRAFT,
    Bands,
    assert_same,
    chain,
    make_case,
    random_parents,
    star,
)

OP = "accept"
INTERPRETED_SHARE, EMULATED_SHARE = 17, 3
SLOW = ("triton", "cuda-emulated")


def slow(target):
    """Interpreted or emulated: right, but very slow."""
    return target.device == "cpu" and target.backend in SLOW


def extra(rule):
    """Options that a rule can't do without."""
    return {"width": 3} if rule == "longest" else {}


def roots(rule):
    """Forests for the rule that takes them."""
    return 3 if rule == "longest" else 1


def ragged(rule, seed, batch=6, most=14):
    """Random topologies of random sizes."""
    rng = np.random.default_rng(seed)
    sizes = [1, *rng.integers(1, most, batch - 1).tolist()]
    return [random_parents(size, seed + index, roots(rule), rng.random()) for index, size in enumerate(sizes)]


def mixed_law(batch, seed, vocab):
    """Another temperature, top_k and top_p for every request; some greedy, some unfiltered."""
    rng = np.random.default_rng(seed)
    return {
        "temperature": torch.tensor(rng.choice([0.0, 0.3, 0.7, 1.0, 1.5], batch), dtype=torch.float32),
        "top_k": torch.tensor(rng.choice([0, 1, 2, 5, vocab, vocab + 9], batch), dtype=torch.int32),
        "top_p": torch.tensor(rng.choice([1.0, 0.95, 0.5, 0.01], batch), dtype=torch.float32),
    }


def variants(rule):
    """Options by name."""
    found = {"plain": {}, "dirty": {"dirt": 0.3}, "eos": {"eos": (0, 1, 2, 3, 4, 5, 6)}, "depth": {"max_depth": 2}}
    if rule in CHAINS:
        found.pop("depth")
    if rule != "greedy":
        found["laws"] = {"laws": True}
    if rule in WITH_DRAFT:
        found["vocab_map"] = {"draft_vocab": 0.4, "laws": True}
        found["draft laws"] = {"laws": True, "draft laws": True, "dirt": 0.1}
    if rule in WITH_DRAFT and rule not in ("longest", "kseq"):
        found["one-hot"] = {"one_hot": True, "dirt": 0.1, "laws": True}
    if rule in ("recursive", "traversal"):
        found["replacement"] = {"replacement": True, "dirt": 0.1}
        found["child rows"] = {"draft_rows": "child"}
    if rule == "target_only":
        found["thresholds"] = {"thresholds": (0.3, 0.5)}
    if rule == "typical":
        found["sharp"] = {"epsilon": 0.05, "delta": 0.4}
    return found


VARIANTS = [(rule, name) for rule in RULES for name in variants(rule)]


@functools.cache
def variant_case(rule, name, vocab, seed, dtype=torch.float32, batch=6):
    """A case and what the definition says to it."""
    options = dict(variants(rule)[name])
    trees = ragged(rule, seed, batch)
    if options.pop("laws", False):
        options.update(mixed_law(len(trees), seed, vocab))
    if options.pop("draft laws", False):
        law = mixed_law(len(trees), seed + 1, vocab)
        options.update({f"draft_{key}": value for key, value in law.items()})
    if "draft_vocab" in options:
        options["draft_vocab"] = max(1, int(options["draft_vocab"] * vocab))
    case = make_case(rule, trees, vocab, seed=seed, dtype=dtype, **extra(rule), **options)
    return case, case.run("torch")


@pytest.mark.parametrize(("rule", "name"), VARIANTS, ids=["-".join(pair) for pair in VARIANTS])
def test_every_rule_and_option(rule, name, target):
    """Random ragged trees of a small vocabulary, where all branches of a rule are taken."""
    bands = Bands()
    for seed in range(2 if slow(target) or target.backend == "torch" else 12):
        case, want = variant_case(rule, name, 17 if seed % 2 else 40, seed)
        bands.check(case, case.to(target.device).run(target.backend), want)
    bands.assert_rare()


@pytest.mark.parametrize("vocab", [1, 2, 7, 33, 1000, 32_001])
@pytest.mark.parametrize("rule", RULES)
def test_vocabularies(rule, vocab, target):
    """No multiples of anything; one token only."""
    if slow(target) and vocab > 1000:
        pytest.skip("interpreted: a vocabulary of 1,000 covers several blocks")
    bands = Bands()
    for name, seed in (("plain", 3), ("plain" if rule == "greedy" else "laws", 4)):
        case, want = variant_case(rule, name, vocab, seed, batch=2 if vocab > 1000 else 6)
        bands.check(case, case.to(target.device).run(target.backend), want)
    bands.assert_rare()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("rule", RULES)
def test_dtypes(rule, dtype, target):
    """Coarse logits tie often; the lowest id must win everywhere."""
    bands = Bands()
    for seed in range(1 if slow(target) or target.backend == "torch" else 4):
        name = "plain" if rule == "greedy" or seed % 2 else "laws"
        case, want = variant_case(rule, name, 300, seed, dtype)
        bands.check(case, case.to(target.device).run(target.backend), want)
    bands.assert_rare()


def test_dtypes_of_target_and_draft_may_differ(target):
    """Such as a draft in bfloat16."""
    case = make_case("recursive", ragged("recursive", 2), 50, seed=2)
    case = case.changed(draft=case.draft.to(torch.bfloat16))
    bands = Bands()
    bands.check(case, case.to(target.device).run(target.backend))


SHAPES = {
    "one node": [[-1]],
    "wide": [star(45), star(3)],
    "fan of fans": [[-1] + [0] * 6 + [1] * 40 + [47 - 7] * 3],
    "deep": [chain(60)],
    "1024 nodes": [random_parents(1024, 5, wide=0.6)],
    "1024 in one level": [star(1023)],
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rule", [rule for rule in RULES if rule not in CHAINS])
def test_topologies(rule, shape, target):
    """One node, wide fan-outs, long paths, large trees."""
    if slow(target) and shape.startswith("1024"):
        pytest.skip("interpreted: too many nodes")
    large = shape.startswith("1024")
    options = {} if rule not in ("recursive", "traversal") or not large else {"gap": 2.0}
    if shape == "deep":
        options = {"gap": 0.2}
    case = make_case(rule, SHAPES[shape], 1500 if large and rule != "typical" else 60, **extra(rule), **options)
    bands = Bands()
    bands.check(case, case.to(target.device).run(target.backend))


def test_long_paths_are_accepted(target):
    """A perfect draft is accepted to the last step, by every rule that knows it."""
    for rule in ("token", "block", "recursive", "traversal", "kseq"):
        requests = 1 if target.interpreted else 3
        case = make_case(rule, [chain(30)] * requests, 50, gap=0.0).to(target.device)
        result = case.run(target.backend)
        assert result.num_accepted.tolist() == [29] * requests
        assert (result.nodes.cpu() == torch.arange(30)).all()


def test_a_useless_draft_is_not(target):
    """The drafted tokens have no probability in the target."""
    for rule in ("token", "block", "recursive", "traversal", "target_only", "kseq", "match", "greedy", "typical"):
        case = make_case(rule, [chain(5)] * 3, 50)
        case.target[..., :25] = float("-inf")
        if case.draft is not None:
            case.draft[..., 25:] = float("-inf")
        case.tokens[:] = torch.randint(0, 25, case.tokens.shape, dtype=torch.int32)
        result = case.to(target.device).run(target.backend)
        assert result.num_accepted.tolist() == [0] * 3
        assert (result.next_token >= 25).all()


@pytest.mark.parametrize("rule", RULES)
def test_strides(rule, target):
    """Logits inside of larger, transposed memory; int64 ids; the batch's tree as one that is broadcast."""
    case = make_case(rule, [random_parents(9, 1, roots(rule))] * 3, 45, **extra(rule))

    def scattered(tensor):
        batch, rows, vocab = tensor.shape
        memory = torch.full((rows + 2, batch + 1, vocab + 5), float("nan"), dtype=tensor.dtype)
        view = memory[1:-1, 1:, 3:-2].transpose(0, 1)
        return view.copy_(tensor)

    wide = torch.full((3, 2 * case.tokens.shape[1]), -7, dtype=torch.int64)
    wide[:, ::2] = case.tokens
    topology = case.topology and Tree(random_parents(9, 1, roots(rule))).to("cpu")
    other = case.changed(
        target=scattered(case.target),
        draft=None if case.draft is None else scattered(case.draft),
        tokens=wide[:, ::2],
        topology=topology,
    )
    want = case.run("torch")
    assert_same(other.run("torch"), want)
    other = other.to(target.device) if target.device != "cpu" else other
    Bands().check(case, other.run(target.backend), want)


def test_greedy_from_ids_and_from_logits(target):
    """The same walk; ids of both integer types."""
    case = make_case("greedy", ragged("greedy", 8), 12, gap=0.3).to(target.device)
    want = case.run(target.backend)
    assert want.num_accepted.sum() > 5
    for dtype in (torch.int32, torch.int64):
        ids = case.target.nan_to_num(0.0).argmax(-1).to(dtype)
        assert_same(case.changed(target=ids).run(target.backend), want)


def test_sliced_topologies(target):
    """A leading part of a larger tree, with the logits of that part only; another size for every request."""
    parents = random_parents(12, 4)
    part = make_case("recursive", [parents[:7]] * 3, 30, gap=0.2)
    whole = Tree(parents).to("cpu")
    sliced = part.changed(topology=whole[:7])
    assert_same(sliced.to(target.device).run(target.backend), part.to(target.device).run(target.backend))
    sizes = torch.tensor([7, 1, 3], dtype=torch.int32)
    cut = part.changed(topology=whole[:sizes])
    trees = [Tree(parents[:size]) for size in sizes.tolist()]
    want = part.changed(topology=Topology.from_trees(trees)).run("torch")
    assert_same(cut.to(target.device).run(target.backend), want)


def test_chain_lengths(target):
    """num_steps as a number, as a tensor, and as trailing -1."""
    case = make_case("token", [chain(6)] * 3, 30, gap=0.1)
    lengths = torch.tensor([5, 0, 2], dtype=torch.int32)
    padded = case.tokens.clone()
    padded[1] = -1
    padded[2, 2:] = -1
    want = case.changed(num_steps=lengths).run("torch")
    assert want.num_accepted.tolist()[1] == 0
    case = case.to(target.device)
    assert_same(case.changed(num_steps=lengths.to(target.device)).run(target.backend), want)
    assert_same(case.changed(num_steps=None, tokens=padded.to(target.device)).run(target.backend), want)
    two = case.changed(num_steps=2).run(target.backend)
    assert (two.num_accepted <= 2).all()
    assert torch.equal(two.tokens[2], want.tokens[2].to(target.device))


def test_a_chain_is_a_tree(target):
    """Token-wise verification is the recursive rule on a chain, block verification is traversal."""
    case = make_case("token", [chain(7)] * 8, 20, gap=0.7).to(target.device)
    tree = Tree.chain(7).to(target.device)
    tokens = torch.nn.functional.pad(case.tokens, (1, 0), value=-5)
    draft = torch.nn.functional.pad(case.draft, (0, 0, 0, 1), value=float("nan"))
    options = {name: value for name, value in case.options.items() if name != "num_steps"}
    for rule, tree_rule in (("token", "recursive"), ("block", "traversal")):
        got = tree_accept(case.target, tokens, tree, draft, rule=tree_rule, backend=target.backend, **options)
        want = chain_accept(case.target, case.tokens, case.draft, rule=rule, backend=target.backend, **options)
        assert_same(got, want)


def test_an_empty_batch(target):
    """Shapes without requests."""
    for rule in RULES:
        case = make_case(rule, [random_parents(4, 0)], 9, **extra(rule)).to(target.device)
        options = {name: value[:0] if hasattr(value, "dim") else value for name, value in case.options.items()}
        topology = case.topology
        case = case.changed(target=case.target[:0], tokens=case.tokens[:0], topology=topology, **options)
        case.draft = None if case.draft is None else case.draft[:0]
        result = case.run(target.backend)
        assert result.tokens.shape == (0, 4)
        assert result.status.shape == (0,)


def test_out(target):
    """The given tensors are written, all of them, and returned."""
    for rule in RULES:
        case = make_case(rule, ragged(rule, 1, most=8), 25, **extra(rule)).to(target.device)
        want = case.run(target.backend)
        out = type(want)(*(torch.full_like(getattr(want, name), -99) for name in want.__slots__))
        assert case.run(target.backend, out=out) is out
        assert_same(out, want)


def test_scalars_and_tensors_mean_the_same(target):
    """A number for all requests, or a tensor that repeats it."""
    case = make_case("recursive", ragged("recursive", 5), 40, temperature=0.7, top_k=9, top_p=0.9).to(target.device)
    batch = len(case.target)
    full = functools.partial(torch.full, (batch,), device=case.target.device)
    numbers = case.changed(seeds=77, positions=5)
    tensors = case.changed(
        seeds=full(77),
        positions=full(5, dtype=torch.int32),
        temperature=full(0.7),
        top_k=full(9, dtype=torch.int32),
        top_p=torch.tensor(0.9, device=case.target.device).expand(batch),
    )
    same_draft = tensors.changed(
        **{f"draft_{name}": numbers.options[name] for name in ("temperature", "top_k", "top_p")}
    )
    want = numbers.run(target.backend)
    assert_same(tensors.run(target.backend), want)
    assert_same(same_draft.run(target.backend), want)


def test_a_map_onto_everything_changes_nothing(target):
    """A VocabMap that is the identity, and one that reorders the draft's entries."""
    case = make_case("recursive", ragged("recursive", 6), 40)
    order = torch.randperm(40)
    want = case.run("torch")
    for entries in (torch.arange(40), order):
        mapped = case.changed(draft=case.draft[..., entries].contiguous(), vocab_map=VocabMap(entries, 40))
        Bands().check(case, mapped.to(target.device).run(target.backend), want)


def test_max_depth_bounds_the_outputs(target):
    """And a bound beyond the tree gives room that stays -1."""
    case = make_case("greedy", [chain(6)], 4, gap=0.0).to(target.device)
    for depth in (0, 2, 5, 9):
        result = greedy_accept(case.target, case.tokens, case.topology, max_depth=depth, backend=target.backend)
        assert result.tokens.shape == (1, depth + 1)
        assert result.num_accepted.item() == min(depth, 5)
        assert result.nodes[0].tolist() == [*range(min(depth, 5) + 1), *[-1] * (depth - min(depth, 5))]
