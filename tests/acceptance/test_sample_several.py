"""Several tokens of one row: sample_tokens with a count; and that no two kinds of noise are the same."""

import itertools
import math

import pytest
import torch

from specdec_ops import (
    Topology,
    Tree,
    chain_accept,
    dlpack,
    longest_path_accept,
    sample_children,
    sample_tokens,
    tree_accept,
)
from specdec_ops.ops.acceptance import reference_philox
from specdec_ops.ops.acceptance.reference_sample import Settings, draw
from tests.acceptance.test_sample import in_band, laws, on, row_noise, slow

OP = "sample"
INF = float("inf")
POSITION = 100
TOKENS = 10  # equally likely


@pytest.mark.parametrize("vocab", [1, 3, 40, 5003])
def test_several_tokens(vocab, target):
    """The definition's, in their order; the first is the plain sample; -1 where there are no more; `out`."""
    if slow(target) and vocab > 1000:
        pytest.skip("interpreted: a small vocabulary has all cases")
    rows, count = 6 if slow(target) else 30, 7
    logits = 2 * torch.randn(rows, vocab)
    options = {**laws(rows, vocab, vocab), **row_noise(rows, vocab)}
    moved, where = on(target.device, options), {"backend": target.backend}
    got = sample_tokens(logits.to(target.device), count=count, **moved, **where)
    assert (got.dtype, got.shape) == (torch.int32, (rows, count))
    plain = sample_tokens(logits.to(target.device), **moved, **where)
    assert torch.equal(got[:, 0], plain)
    assert torch.equal(sample_tokens(logits.to(target.device), count=1, **moved, **where), plain[:, None])
    out = torch.full((rows, count), -9, dtype=torch.int32, device=target.device)
    assert sample_tokens(logits.to(target.device), count=count, out=out, **moved, **where) is out
    assert torch.equal(out, got)
    got, want = got.cpu(), sample_tokens(logits, count=count, backend="torch", **options)
    wrong = (got != want).any(1).nonzero()[:, 0].tolist()
    assert len(wrong) <= 1
    for row in wrong:
        part = {name: value[row : row + 1] for name, value in options.items()}

        def same(row=row, part=part):
            return torch.equal(sample_tokens(logits[row : row + 1], count=count, backend="torch", **part)[0], got[row])

        assert in_band(same)
    for row, tokens in enumerate(got.tolist()):
        drawn = [token for token in tokens if token >= 0]
        assert len(set(drawn)) == len(drawn)
        assert tokens == drawn + [-1] * (count - len(drawn))
        k = options["top_k"][row].item()
        if options["temperature"][row] == 0:
            assert drawn == logits[row].argsort(descending=True)[:count].tolist()
        elif options["top_p"][row] == 1:
            assert len(drawn) == min(count, vocab, k if k > 0 else vocab)


def test_it_is_the_race_of_plain_sampling():
    """Straight from the noise: the best of the domain SAMPLE at the token's own position, not of DRAFT."""
    row = torch.randn(50)
    tokens = sample_tokens(row[None], seeds=7, positions=12, count=4)[0].tolist()
    for domain, detail, same in (
        (reference_philox.SAMPLE, 0, True),
        (reference_philox.DRAFT, 0, False),
        (reference_philox.DRAFT, 12, False),
    ):
        drawn = reference_philox.exponentials(50, 7, 12, domain, detail)
        raced, _ = draw(row, Settings(1.0, 0, 1.0), 4, False, lambda _, drawn=drawn: drawn)
        assert (tokens == raced) is same


def test_odd_rows(target):
    """One defined token of a malformed row; of others those that have a probability."""
    nan = float("nan")
    rows = torch.tensor([[0.0, nan, 3.0, 1.0], [0.0, INF, INF, nan], [-INF] * 4, [nan] * 4, [-INF, 0.0, -INF, 1.0]])
    got = sample_tokens(rows.to(target.device), seeds=1, positions=0, count=3, backend=target.backend).tolist()
    assert got[:4] == [[2, -1, -1], [1, -1, -1], [0, -1, -1], [0, -1, -1]]
    assert (sorted(got[4][:2]), got[4][2]) == ([1, 3], -1)
    empty = torch.zeros(0, 9, device=target.device)
    assert sample_tokens(empty, seeds=1, positions=0, count=2, backend=target.backend).shape == (0, 2)


def test_the_law_is_that_of_draws_without_replacement(target):
    """Pairs (i, j) come with p_i p_j / (1 - p_i): chi-square over all of them."""
    rows = 240 if slow(target) else 1500 if target.backend == "torch" else 40_000
    p = torch.tensor([0.4, 0.3, 0.2, 0.1])
    positions = torch.arange(rows, dtype=torch.int32, device=target.device)
    logits = p.log().to(target.device).expand(rows, 4)
    pairs = sample_tokens(logits, seeds=5, positions=positions, count=2, backend=target.backend).cpu()
    expected = rows * p.double()[:, None] * p.double() / (1 - p.double()[:, None])
    found = torch.zeros(4, 4, dtype=torch.float64).index_put_(tuple(pairs.long().T), torch.tensor(1.0).double(), True)
    assert found.diagonal().sum() == 0
    off = ~torch.eye(4, dtype=torch.bool)
    assert ((found - expected)[off] ** 2 / expected[off]).sum() < 51  # of 11 degrees of freedom: once in two million


def test_argument_errors():
    """A count that is none, an output of the wrong shape."""
    logits, options = torch.zeros(2, 9), {"seeds": 1, "positions": 0}
    with pytest.raises(TypeError, match=r"specdec_ops.sample_tokens: count must be an int from 1 to 65535, got 2\.0"):
        sample_tokens(logits, count=2.0, **options)
    with pytest.raises(ValueError, match=r"specdec_ops.sample_tokens: count must be an int from 1 to 65535, got 0"):
        sample_tokens(logits, count=0, **options)
    out = torch.zeros(2, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"specdec_ops.sample_tokens: out must be int32 \[2, 3\], got int32 \[2\]"):
        sample_tokens(logits, count=3, out=out, **options)
    with pytest.raises(ValueError, match=r"specdec_ops.sample_tokens: out must be int32 \[2\], got int32 \[2, 3\]"):
        sample_tokens(logits, out=torch.zeros(2, 3, dtype=torch.int32), **options)


def test_other_frameworks_and_compilation():
    """NumPy in and out, one graph, and shapes without a run."""
    logits = torch.randn(3, 20)
    want = sample_tokens(logits, seeds=4, positions=2, count=3)
    assert (dlpack.sample_tokens(logits.numpy(), seeds=4, positions=2, count=3) == want.numpy()).all()
    call = torch.compile(
        lambda logits: sample_tokens(logits, seeds=4, positions=2, count=3) + 1, fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(call(logits), want + 1)
    assert sample_tokens(logits.to("meta"), seeds=4, positions=2, count=3).shape == (3, 3)


# No two kinds of noise may be the same. Each kind says one of ten things about each of many requests, equally likely.


class Kinds:
    """What every domain of noise, at several nodes and draws, says to requests with the seeds 0, 1, 2, ..."""

    def __init__(self, backend, device, requests):
        self.requests, self.device, self.where = requests, device, {"backend": backend}
        self.noise = {"seeds": torch.arange(requests, device=device), "positions": POSITION}

    def even(self, nodes, extra=0):
        """Logits [requests, nodes, TOKENS + extra], the extra ones impossible."""
        logits = torch.zeros(self.requests, nodes, TOKENS + extra, device=self.device)
        logits[..., TOKENS:] = -INF
        return logits

    def sample(self, position):
        options = {**self.noise, "positions": position}
        return sample_tokens(self.even(1)[:, 0], **options, **self.where)

    def draft(self, parent, number):
        options = {"replacement": True, "first_parent": parent, **self.noise, **self.where}
        return sample_children(self.even(1), number + 1, **options).tokens[:, 0, number]

    def after(self, accepted, rejected):
        """The next token behind a chain of `accepted` sure drafts, and of an impossible one if `rejected`."""
        logits = self.even(accepted + 2, extra=1)
        logits[:, :accepted] = torch.tensor([0.0] + [-INF] * TOKENS, device=self.device)
        drafted = torch.full((self.requests, accepted + 1), TOKENS if rejected else -1, dtype=torch.int32)
        drafted[:, :accepted] = 0
        result = chain_accept(logits, drafted.to(self.device), **self.noise, **self.where)
        assert (result.num_accepted == accepted).all()
        return result.next_token

    def coin(self, node, rule="recursive"):
        """Which tenth the coin of a child is in, or that of all children: the children before it are impossible."""
        tree = Topology.from_trees([Tree([-1] + [0] * node)], self.device)
        drafted = torch.full((self.requests, node + 1), TOKENS, dtype=torch.int32, device=self.device)
        drafted[:, node] = 0
        tenth = torch.zeros(self.requests, dtype=torch.int32, device=self.device)
        for part in range(1, TOKENS):
            logits = self.even(node + 1, extra=1)
            logits[..., 1:TOKENS] = -INF
            logits[..., 0], logits[..., 1] = math.log(part / TOKENS), math.log(1 - part / TOKENS)
            options = {"rule": rule, **self.noise, **self.where}
            tenth += tree_accept(logits, drafted, tree, **options).num_accepted == 0
        return tenth

    def roots(self):
        """The first candidate that longest_path_accept draws where it has accepted nothing but node 0."""
        tree, tokens = Tree([-1]).to(self.device), torch.zeros(self.requests, 1, dtype=torch.int32, device=self.device)
        logits = self.even(1)
        options = {"width": 2, **self.noise, **self.where}
        return longest_path_accept(logits, tokens, tree, logits, **options).next_tokens[:, 0]

    def all(self):
        return {
            "sample at node 0": self.sample(POSITION),
            "sample behind node 0": self.sample(POSITION + 1),
            "children of node 0": self.draft(0, 0),
            "children of node 0, second draw": self.draft(0, 1),
            "children of node 1": self.draft(1, 0),
            "children of node 256": self.draft(256, 0),
            "coin of node 1": self.coin(1),
            "coin of node 2": self.coin(2),
            "coin of a level": self.coin(1, "target_only"),
            "residual at node 0": self.after(0, True),
            "residual at node 1": self.after(1, True),
            "bonus at node 0": self.after(0, False),
            "bonus at node 1": self.after(1, False),
        }


def dependence(a, b):
    """Chi-square of the table of two kinds against independence, over what it may be: above 1 once in a million."""
    a, b = a.cpu().long(), b.cpu().long()
    table = torch.bincount(a * TOKENS + b, minlength=TOKENS**2).view(TOKENS, TOKENS).double()
    expected = table.sum(1, keepdim=True) * table.sum(0, keepdim=True) / len(a)
    freedom = (TOKENS - 1) ** 2
    spread = 2 / (9 * freedom)  # Wilson and Hilferty
    return float(((table - expected) ** 2 / expected).sum()) / (freedom * (1 - spread + 4.75 * spread**0.5) ** 3)


def test_no_two_kinds_of_noise_are_the_same(target):
    """All pairs: a tenth of the requests agree, and nothing else of one tells anything about the other.

    With 20,000 requests two kinds that shared one draw in 20 would be found: the table's chi-square would be 180 above
    what it is expected to be, four times its limit's distance.
    """
    if slow(target):
        pytest.skip("interpreted: its noise is the definition's, number by number, in the other tests")
    if target.backend == "torch":
        pytest.skip("one request after the other; that its counters are disjoint is shown by test_noise.py")
    requests = 20_000
    kinds = Kinds(target.backend, target.device, requests).all()
    for name, said in kinds.items():
        counts = said.cpu().long().bincount(minlength=TOKENS).double()
        assert len(counts) == TOKENS, name
        assert ((counts - requests / TOKENS) ** 2 / (requests / TOKENS)).sum() < 46, name  # of 9: once in two million
    for (one, a), (other, b) in itertools.combinations(kinds.items(), 2):
        agree = float((a == b).double().mean())
        assert abs(agree - 0.1) < 5 * math.sqrt(0.09 / requests), f"{one}, {other}: {agree:.1%} agree"
        assert dependence(a, b) < 1, f"{one}, {other}"


def test_roots_of_sample_children_would_be_its_children():
    """What sample_tokens is for: drawn as children, the roots are what node 0's children race for."""
    kinds = Kinds("auto", "cpu", 2000)
    wrong, right = kinds.draft(0, 0), sample_tokens(kinds.even(1)[:, 0], count=4, **kinds.noise)[:, 0]
    children = sample_children(kinds.even(1), 4, **kinds.noise).tokens[:, 0, 0]
    assert torch.equal(wrong, children)
    assert dependence(wrong, children) > 1
    assert dependence(right, children) < 1
    bonus = kinds.after(0, False)
    assert torch.equal(kinds.roots(), bonus), "the next roots are the bonus: a round has one or the other"
