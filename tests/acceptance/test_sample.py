"""sample_tokens and sample_children on every backend against the definition, and what match_accept promises."""

import math

import pytest
import torch

from specdec_ops import (
    Topology,
    Tree,
    VocabMap,
    chain_accept,
    match_accept,
    sample_children,
    sample_tokens,
    tree_accept,
)
from specdec_ops.ops.acceptance import reference_philox
from specdec_ops.ops.acceptance import reference_sample as reference
from specdec_ops.ops.acceptance.reference_sample import Settings
from tests.acceptance.accept_cases import BAND, draw

OP = "sample"
INTERPRETED_SHARE, EMULATED_SHARE = 7, 3
SLOW = ("triton", "cuda-emulated")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def slow(target):
    """Interpreted or emulated: right, but very slow."""
    return target.device == "cpu" and target.backend in SLOW


def laws(rows, seed, vocab):
    """Temperatures, top_k and top_p per row; some greedy, some unfiltered."""
    rng = torch.Generator().manual_seed(seed)

    def pick(values, dtype):
        values = torch.tensor(values, dtype=dtype)
        return values[torch.randint(len(values), (rows,), generator=rng)]

    return {
        "temperature": pick([0.0, 0.3, 0.7, 1.0, 2.0], torch.float32),
        "top_k": pick([0, 1, 3, 20, vocab + 1], torch.int32),
        "top_p": pick([1.0, 0.9, 0.3, 0.0], torch.float32),
    }


def row_noise(rows, seed):
    """Seeds and positions per row."""
    rng = torch.Generator().manual_seed(seed)
    return {
        "seeds": torch.randint(-(2**62), 2**62, (rows,), generator=rng),
        "positions": torch.randint(0, 2**30, (rows,), generator=rng, dtype=torch.int32),
    }


def on(device, options):
    """Options with their tensors moved."""
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in options.items()}


def disturbed(values, generator):
    """At most BAND off."""
    return values * (1 + BAND * (2 * torch.rand(values.shape, generator=generator, dtype=torch.float64) - 1))


def in_band(run):
    """Whether the definition gives the answer that `run` tests for, when its weights and noise are disturbed."""
    generator = torch.Generator().manual_seed(0)
    law, exponentials = reference.law, reference_philox.exponentials
    try:
        reference.law = lambda logits, settings: law(logits, settings, lambda values: disturbed(values, generator))
        reference_philox.exponentials = lambda *arguments: disturbed(exponentials(*arguments), generator)
        return any(run() for _ in range(48))
    finally:
        reference.law, reference_philox.exponentials = law, exponentials


@pytest.mark.parametrize("vocab", [1, 2, 7, 33, 1000, 32_001])
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
def test_sample_tokens(dtype, vocab, target):
    """Per-row laws and noise."""
    rows = 3 if slow(target) else 8 if vocab > 1000 else 40
    logits = (3 * torch.randn(rows, vocab)).to(dtype)
    options = {**laws(rows, vocab, vocab), **row_noise(rows, vocab)}
    want = sample_tokens(logits, backend="torch", **options)
    got = sample_tokens(logits.to(target.device), backend=target.backend, **on(target.device, options)).cpu()
    assert (got.dtype, got.shape) == (torch.int32, (rows,))
    wrong = (got != want).nonzero()[:, 0].tolist()
    assert len(wrong) <= 1
    for row in wrong:
        part = {name: value[row : row + 1] for name, value in options.items()}
        assert in_band(
            lambda row=row, part=part: sample_tokens(logits[row : row + 1], backend="torch", **part) == got[row]
        )


def test_temperature_zero_takes_the_lowest_argmax(target):
    """Whatever filters and seeds say."""
    logits = torch.randint(0, 3, (20, 50)).float()
    got = sample_tokens(
        logits.to(target.device), seeds=1, positions=0, temperature=0.0, top_k=7, backend=target.backend
    )
    assert got.tolist() == [row.index(max(row)) for row in logits.tolist()]


def test_filters_are_kept_to(target):
    """No token outside of the top k, nor beyond the shortest part with enough mass."""
    rows = 20 if slow(target) else 300
    logits = torch.randn(1, 40)
    order = logits[0].argsort(descending=True)
    mass = torch.softmax(logits[0, order].double(), 0).cumsum(0)
    options = {"positions": torch.arange(rows, dtype=torch.int32), "seeds": 5}
    options = on(target.device, options)
    logits = logits.to(target.device).expand(rows, 40)
    kept = set(sample_tokens(logits, top_k=4, backend=target.backend, **options).tolist())
    assert kept <= set(order[:4].tolist())
    count = int((mass < 0.6).sum()) + 1
    kept = set(sample_tokens(logits, top_p=0.6, backend=target.backend, **options).tolist())
    assert kept <= set(order[:count].tolist())
    if not slow(target):
        assert len(kept) > count // 2


def test_the_frequencies_are_the_probabilities(target):
    """A coarse look at the law: the tests of acceptance have the fine one."""
    rows = 200 if slow(target) else 20_000
    if target.backend == "torch":
        rows = 2000
    probabilities = torch.tensor([0.5, 0.25, 0.125, 0.0625, 0.0625])
    logits = probabilities.log().to(target.device).expand(rows, 5)
    positions = torch.arange(rows, dtype=torch.int32, device=target.device)
    tokens = sample_tokens(logits, seeds=3, positions=positions, backend=target.backend).cpu()
    counts = tokens.bincount(minlength=5).double()
    expected = rows * probabilities.double()
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert chi_square < 33  # of 4 degrees of freedom: exceeded once in a million


@pytest.mark.parametrize("replacement", [False, True])
@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("vocab", [2, 7, 130, 5003])
def test_sample_children(vocab, mapped, replacement, target):
    """Tokens, log-probabilities and normalisers; fewer tokens than asked for."""
    if slow(target) and vocab > 1000:
        pytest.skip("interpreted: a small vocabulary has all cases")
    batch, rows, count = 5, 4, 6
    logits = 2 * torch.randn(batch, rows, vocab)
    logits[1, 2, 1:] = float("-inf")
    options = {**laws(batch, vocab, vocab), **row_noise(batch, vocab), "replacement": replacement}
    options["parents"] = torch.randperm(1000)[: batch * rows].view(batch, rows).int()
    mapping = VocabMap(torch.randperm(3 * vocab)[:vocab], 3 * vocab) if mapped else None
    want = sample_children(logits, count, backend="torch", vocab_map=mapping, **options)
    got = sample_children(
        logits.to(target.device),
        count,
        backend=target.backend,
        vocab_map=mapping and mapping.to(target.device),
        **on(target.device, options),
    )
    wrong = (got.tokens.cpu() != want.tokens).any(-1)
    assert wrong.sum() <= 1
    for request, row in wrong.nonzero().tolist():
        part = {name: v[request : request + 1] if isinstance(v, torch.Tensor) else v for name, v in options.items()}
        part["parents"] = part["parents"][:, row : row + 1]
        mine = got.tokens[request, row].cpu()

        def matches(request=request, row=row, part=part, mine=mine):
            values = logits[request : request + 1, row : row + 1]
            return torch.equal(
                sample_children(values, count, backend="torch", vocab_map=mapping, **part).tokens[0, 0], mine
            )

        assert in_band(matches)
    assert torch.equal(got.status.cpu(), want.status)
    torch.testing.assert_close(got.logprobs.cpu()[~wrong], want.logprobs[~wrong], rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(got.logsumexp.cpu(), want.logsumexp, rtol=2e-5, atol=2e-5)


def test_what_acceptance_is_told(target):
    """Log-probabilities are of the filtered row; the normaliser gives any kept token's."""
    logits = torch.randn(1, 1, 30)
    options = {"seeds": 4, "positions": 3, "temperature": 0.6, "top_k": 8}
    children = sample_children(logits.to(target.device), 8, backend=target.backend, **options)
    best = logits[0, 0].topk(8).indices
    assert sorted(children.tokens[0, 0].tolist()) == sorted(best.tolist())
    scaled = logits[0, 0].double() / 0.6
    total = torch.logsumexp(scaled[best], 0)
    tokens = children.tokens[0, 0].long().cpu()
    torch.testing.assert_close(children.logprobs[0, 0].cpu().double(), scaled[tokens] - total, rtol=1e-5, atol=1e-5)
    assert math.isclose(children.logsumexp.item(), total.item(), rel_tol=1e-5)


def test_children_of_different_nodes_and_draws_are_independent(target):
    """Another parent, seed or position gives other tokens; the same gives the same, wherever its row is."""
    logits = torch.zeros(1, 1, 1000, device=target.device)

    def sampled(**options):
        options = {"seeds": 1, "positions": 2, "first_parent": 3, **options}
        return sample_children(logits, 5, backend=target.backend, **options).tokens[0, 0].tolist()

    base = sampled()
    others = [sampled(seeds=2), sampled(positions=3), sampled(first_parent=4), sampled(seeds=1 + 2**32)]
    assert all(set(base).isdisjoint(other) or len(set(base) & set(other)) < 2 for other in others)
    assert len(set(sampled(replacement=True))) > 3
    rows = sample_children(
        logits.expand(2, 3, 1000),
        5,
        seeds=1,
        positions=2,
        parents=torch.tensor([[0, 3, 1], [3, 9, 8]], dtype=torch.int32, device=target.device),
        backend=target.backend,
    )
    assert rows.tokens[0, 1].tolist() == rows.tokens[1, 0].tolist() == base


def test_out_and_strides(target):
    """Results go into given tensors; rows may lie anywhere."""
    rows, vocab = 6, 37
    logits = torch.randn(rows, vocab)
    wide = torch.full((2 * rows, vocab + 3), float("nan"))
    wide[::2, 1 : vocab + 1] = logits
    view = wide.to(target.device)[::2, 1 : vocab + 1]
    options = on(target.device, row_noise(rows, 0))
    want = sample_tokens(logits.to(target.device), backend=target.backend, **options)
    out = torch.full((rows,), -9, dtype=torch.int32, device=target.device)
    assert sample_tokens(view, out=out, backend=target.backend, **options) is out
    assert torch.equal(out, want)
    children = sample_children(view[:, None], 3, backend=target.backend, **options)
    into = type(children)(*(torch.full_like(getattr(children, name), -9) for name in children.__slots__))
    assert sample_children(view[:, None], 3, out=into, backend=target.backend, **options) is into
    assert all(torch.equal(getattr(into, name), getattr(children, name)) for name in children.__slots__)


def test_no_rows(target):
    """An empty batch, and a batch without rows."""
    device = target.device
    assert sample_tokens(torch.zeros(0, 9, device=device), seeds=1, positions=0, backend=target.backend).shape == (0,)
    children = sample_children(torch.zeros(2, 0, 9, device=device), 3, seeds=1, positions=0, backend=target.backend)
    assert children.tokens.shape == (2, 0, 3)
    assert children.status.tolist() == [0, 0]


def test_odd_rows(target):
    """NaN, infinities and nothing but -inf: a defined token, or no child and a status."""
    inf, nan = float("inf"), float("nan")
    rows = torch.tensor([[0.0, nan, 3.0, 1.0], [0.0, inf, inf, nan], [-inf] * 4, [nan] * 4, [-inf, 0.0, -inf, -inf]])
    rows = rows.to(target.device)
    assert sample_tokens(rows, seeds=1, positions=0, backend=target.backend).tolist() == [2, 1, 0, 0, 1]
    children = sample_children(rows[:, None], 2, seeds=1, positions=0, backend=target.backend)
    assert children.tokens[:, 0].tolist() == [[-1, -1]] * 4 + [[1, -1]]
    assert children.status.tolist() == [2, 2, 2, 2, 0]
    assert children.logprobs[4, 0].tolist() == [0.0, -inf]


class Markov:
    """A random model whose next distribution depends on the last two tokens."""

    def __init__(self, vocab, seed, device):
        generator = torch.Generator().manual_seed(seed)
        self.table = (1.5 * torch.randn(vocab, vocab, vocab, generator=generator)).to(device)

    def rows(self, texts):
        """Logits after each of some texts."""
        return torch.stack([self.table[text[-2], text[-1]] for text in texts])


@pytest.mark.parametrize("law", [{}, {"temperature": 0.7, "top_k": 9, "top_p": 0.95}, {"temperature": 0.0}], ids=str)
def test_match_accept_is_plain_sampling(law, target):
    """Token for token, over hundreds of tokens, whatever was drafted."""
    length, vocab, batch = (40, 16, 1) if slow(target) else (300, 24, 3)
    model, drafter = Markov(vocab, 1, target.device), Markov(vocab, 1, target.device)
    drafter.table = drafter.table + 0.8 * Markov(vocab, 2, target.device).table
    seeds = torch.arange(10, 10 + batch, device=target.device)
    plain = [[0, 1] for _ in range(batch)]
    for position in range(2, 2 + length):
        tokens = sample_tokens(model.rows(plain), seeds=seeds, positions=position, backend=target.backend, **law)
        plain = [[*text, token] for text, token in zip(plain, tokens.tolist(), strict=True)]

    tree = Tree.from_branching((3, 2, 1), root=True)
    topology = tree.to(target.device)
    texts, rounds = [[0, 1] for _ in range(batch)], 0
    while min(map(len, texts)) < 2 + length:
        prefixes = [[text[:] for _ in range(len(tree))] for text in texts]
        drafted = torch.zeros(batch, len(tree), dtype=torch.int32, device=target.device)
        for node in range(1, len(tree)):
            parent = int(tree.parents[node])
            rank = sum(tree.parents[1:node] == parent)
            for request in range(batch):
                row = drafter.rows([prefixes[request][parent]])[0]
                token = int(row.topk(3).indices[rank])
                prefixes[request][node] = prefixes[request][parent] + [token]
                drafted[request, node] = token
        logits = torch.stack([model.rows(nodes) for nodes in prefixes])
        positions = torch.tensor([len(text) - 1 for text in texts], dtype=torch.int32, device=target.device)
        result = match_accept(
            logits, drafted, topology, seeds=seeds, positions=positions, backend=target.backend, **law
        )
        texts = [
            text + [token for token in tokens if token >= 0]
            for text, tokens in zip(texts, result.tokens.tolist(), strict=True)
        ]
        rounds += 1
    assert [text[: 2 + length] for text in texts] == plain
    assert rounds < 0.8 * length, "nothing was accepted"


def test_a_whole_round(target):
    """Children sampled by sample_children are accepted by a target that is the draft itself, by every rule."""
    if slow(target):
        pytest.skip("interpreted: covered by the other tests")
    batch, vocab, count = 4, 50, 3
    logits = torch.randn(batch, count + 1, vocab, device=target.device)
    noise_options = {"seeds": torch.arange(batch, device=target.device), "positions": 12}
    children = sample_children(logits[:, :1], count, backend=target.backend, **noise_options)
    tokens = torch.nn.functional.pad(children.tokens[:, 0], (1, 0))
    topology = Topology.from_trees([Tree([-1, 0, 0, 0])], target.device)
    for rule in ("recursive", "traversal"):
        result = tree_accept(
            logits,
            tokens,
            topology,
            logits,
            rule=rule,
            backend=target.backend,
            **noise_options,
        )
        assert result.num_accepted.tolist() == [1] * batch
    chained = chain_accept(
        logits[:, :2], children.tokens[:, 0, :1], logits[:, :1], backend=target.backend, **noise_options
    )
    assert chained.num_accepted.tolist() == [1] * batch


def test_drawing_helper_of_the_tests():
    """The tests' own drafts come from the row they say."""
    rng = torch.Generator().manual_seed(0)
    row = torch.tensor([0.0, 5.0, 4.0, -9.0])
    drawn = draw(row, Settings(1.0, 2, 1.0), 2, False, False, rng)
    assert sorted(drawn.tolist()) == [1, 2]
