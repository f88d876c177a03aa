"""Inputs for tests of the acceptance ops, and the comparison with the definition in float64.

`make_case` builds a ragged batch in which everything that must not be read is poisoned: rows of nodes that don't exist,
the token of node 0. Drafted tokens come from the draft's own rows, so that accepting and rejecting both happen.

Kernels compute in float32, so a decision near a tie may fall otherwise than in float64. Such a case counts as a *band*
case only if the definition itself gives the kernel's very answer once its weights and noise are disturbed by at most
BAND; the tests count these and require them rare.
"""

import dataclasses

import numpy as np
import torch

import specdec_ops
from specdec_ops import Topology, Tree, VocabMap
from specdec_ops.ops.acceptance import reference_accept as reference
from specdec_ops.ops.acceptance.reference_sample import Settings, law

BAND = 1e-5
BAND_TRIALS = 48
NAN = float("nan")
LOSSLESS = ("greedy", "match", "token", "block", "recursive", "traversal", "target_only", "kseq")
RULES = (*LOSSLESS, "typical", "longest")
CHAINS = ("token", "block")
WITH_DRAFT = ("token", "block", "recursive", "traversal", "kseq", "longest")
FIELDS = ("tokens", "nodes", "num_accepted", "next_token", "status")


@dataclasses.dataclass
class AcceptCase:
    """One call of one op: `rule` names the op and its rule."""

    rule: str
    target: torch.Tensor
    tokens: torch.Tensor
    topology: Topology | None
    draft: torch.Tensor | None
    options: dict

    def run(self, backend, **options):
        """Call the op."""
        options = {**self.options, **options}
        rule, tree = self.rule, (self.target, self.tokens, self.topology)
        if rule == "greedy":
            return specdec_ops.greedy_accept(*tree, backend=backend, **options)
        if rule == "match":
            return specdec_ops.match_accept(*tree, backend=backend, **options)
        if rule == "typical":
            return specdec_ops.typical_accept(*tree, backend=backend, **options)
        if rule == "longest":
            return specdec_ops.longest_path_accept(*tree, self.draft, backend=backend, **options)
        if rule in CHAINS:
            drafted = (self.target, self.tokens, self.draft)
            return specdec_ops.chain_accept(*drafted, rule=rule, backend=backend, **options)
        return specdec_ops.tree_accept(*tree, self.draft, rule=rule, backend=backend, **options)

    def to(self, device):
        """The same case on another device."""
        moved = {name: value.to(device) if hasattr(value, "to") else value for name, value in self.options.items()}
        draft = None if self.draft is None else self.draft.to(device)
        topology = None if self.topology is None else self.topology.to(device)
        return AcceptCase(self.rule, self.target.to(device), self.tokens.to(device), topology, draft, moved)

    def changed(self, **changes):
        """The same with other fields, or other options."""
        names = {field.name for field in dataclasses.fields(self)}
        fields = {name: value for name, value in changes.items() if name in names}
        options = {name: value for name, value in changes.items() if name not in names}
        return dataclasses.replace(self, **fields, options={**self.options, **options})


def random_parents(nodes, seed, roots=1, wide=0.5):
    """Every node hangs below an earlier one: with `wide` near 1 an early one, near 0 a late one."""
    rng = np.random.default_rng(seed)
    parents = [-1] * min(roots, nodes)
    for node in range(len(parents), nodes):
        power = np.log(0.5) / np.log(1 - np.clip(wide, 0.02, 0.98))
        parents.append(min(node - 1, int(node * rng.random() ** power)))
    return parents


def star(children):
    """A root and its children."""
    return [-1] + [0] * children


def chain(nodes):
    """One path."""
    return [node - 1 for node in range(nodes)]


def make_case(
    rule,
    trees,
    vocab,
    *,
    seed=0,
    dtype=torch.float32,
    scale=2.0,
    gap=1.0,
    one_hot=False,
    draft_vocab=None,
    dirt=0.0,
    **options,
):
    """A ragged batch.

    Args:
        rule: one of RULES.
        trees: parents of every request. For chains only their lengths count.
        vocab: of the target.
        seed: of everything random.
        dtype: of the logits.
        scale: spread of the target's logits.
        gap: spread of the difference between draft and target: 0 for a perfect draft.
        one_hot: deterministic proposals; no draft logits.
        draft_vocab: make a VocabMap onto this many target tokens.
        dirt: share of drafted tokens that are replaced: by a sibling's, by any token, by -1, by one out of range.
        options: of the op. Noise is added.
    """
    rng = torch.Generator().manual_seed(seed)
    batch, nodes = len(trees), max(map(len, trees))
    target = scale * torch.randn(batch, nodes, vocab, generator=rng)
    mapping = None
    if draft_vocab is not None:
        mapping = VocabMap(torch.randperm(vocab, generator=rng)[:draft_vocab], vocab)
    known = torch.arange(vocab) if mapping is None else mapping.draft_to_target.long()
    draft = target[..., known] + gap * torch.randn(batch, nodes, len(known), generator=rng)
    target, draft = target.to(dtype), draft.to(dtype)
    tokens = torch.full((batch, nodes), -(2**31), dtype=torch.int32)
    for request, parents in enumerate(trees):
        settings = draft_settings(options, request)
        replacement = options.get("replacement", False) or rule == "kseq"
        deterministic = one_hot or rule not in WITH_DRAFT
        for node in range(-1, len(parents)):
            children = [
                child for child, parent in enumerate(parents) if parent == node and (child or rule == "longest")
            ]
            if children:
                row = draft[request, max(node, 0)]
                drawn = draw(row, settings, len(children), replacement, deterministic, rng)
                tokens[request, children] = known[drawn].int()
        target[request, len(parents) :] = NAN
        draft[request, len(parents) :] = NAN
    if dirt:
        spoil(tokens, trees, vocab, dirt, rng, rule)
    noise = {
        "seeds": torch.randint(-(2**62), 2**62, (batch,), generator=rng),
        "positions": torch.randint(0, 2**20, (batch,), generator=rng, dtype=torch.int32),
    }
    options = {**({} if rule == "greedy" else noise), **options}
    if one_hot or rule not in WITH_DRAFT:
        draft = None
    elif mapping is not None:
        options["vocab_map"] = mapping
    if rule in CHAINS:
        lengths = torch.tensor([len(parents) - 1 for parents in trees], dtype=torch.int32)
        options["num_steps"] = lengths
        tokens, topology = tokens[:, 1:].contiguous(), None
        draft = None if draft is None else draft[:, : nodes - 1]
    else:
        topology = Topology.from_trees([Tree(parents) for parents in trees])
    return AcceptCase(rule, target, tokens, topology, draft, options)


def draft_settings(options, request):
    """The draft's temperature, top_k and top_p of a request."""

    def of(name, default):
        value = options.get(f"draft_{name}")
        value = options.get(name, default) if value is None else value
        return value[request].item() if isinstance(value, torch.Tensor) else value

    return Settings(of("temperature", 1.0), of("top_k", 0), of("top_p", 1.0))


def draw(row, settings, count, replacement, deterministic, rng):
    """Draft tokens of one row: sampled as it says, or its best ones. Beyond what is possible, any."""
    if deterministic:
        order = torch.sort(row.double(), descending=True, stable=True).indices
        return order[torch.arange(count) % len(order)]
    probabilities = law(row, settings).probabilities
    possible = int((probabilities > 0).sum())
    if replacement or count > possible:
        return torch.multinomial(probabilities, count, replacement=True, generator=rng)
    return torch.multinomial(probabilities, count, replacement=False, generator=rng)


def spoil(tokens, trees, vocab, dirt, rng, rule):
    """Replace a share of the drafted tokens. Roots of a forest are emitted as they are, so they stay."""
    for request, parents in enumerate(trees):
        for node in range(1, len(parents)):
            if parents[node] < 0 or torch.rand((), generator=rng) >= dirt:
                continue
            kind = int(torch.randint(4, (), generator=rng))
            siblings = [other for other in range(1, node) if parents[other] == parents[node]]
            if kind == 0 and siblings:
                tokens[request, node] = tokens[request, siblings[-1]]
            elif kind == 1:
                tokens[request, node] = int(torch.randint(vocab, (), generator=rng))
            else:
                tokens[request, node] = -1 if kind == 2 else vocab + int(torch.randint(9, (), generator=rng))


def fields_of(result):
    """The tensors of a result by name, on the CPU."""
    return {field.name: getattr(result, field.name).cpu() for field in dataclasses.fields(result)}


def request_of(result, request):
    """One request's part of a result, as lists."""
    return {name: value[request].tolist() for name, value in fields_of(result).items()}


def assert_same(got, want):
    """Every field of two results."""
    got, want = fields_of(got), fields_of(want)
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert got[name].dtype == tensor.dtype
        assert torch.equal(got[name], tensor), f"{name}: {got[name].tolist()}, expected {tensor.tolist()}"


def differing(got, want):
    """The requests in which two results differ."""
    got, want = fields_of(got), fields_of(want)
    pairs = [(got[name], want[name]) for name in want]
    assert all(mine.shape == theirs.shape and mine.dtype == theirs.dtype for mine, theirs in pairs)
    unequal = [(mine != theirs).reshape(len(theirs), -1).any(dim=1) for mine, theirs in pairs]
    return torch.stack(unequal).any(dim=0).nonzero()[:, 0].tolist()


class Bands:
    """Compares results with the definition, and counts decisions that fell otherwise within the band."""

    def __init__(self):
        self.compared, self.banded = 0, 0

    def check(self, case, got, want=None):
        """Every request is right, or within the band."""
        case = case.to("cpu")
        want = case.run("torch") if want is None else want
        self.compared += len(want.status)
        for request in differing(got, want):
            mine, theirs = (
                {name: value[request].tolist() for name, value in fields_of(r).items()} for r in (got, want)
            )
            assert within_band(case, request, mine), f"request {request} of {case.rule}: {mine}, expected {theirs}"
            self.banded += 1

    def assert_rare(self, share=0.002):
        """At most one in 500, or one at all."""
        assert self.banded <= max(1, share * self.compared), f"{self.banded} of {self.compared} are band cases"


def within_band(case, request, got):
    """Whether the definition gives this answer when its weights and noise are disturbed by at most BAND."""
    generator = torch.Generator().manual_seed(request)

    def disturb(values):
        values = torch.as_tensor(values, dtype=torch.float64)
        return values * (1 + BAND * (2 * torch.rand(values.shape, generator=generator, dtype=torch.float64) - 1))

    original = reference.request_of
    try:
        reference.request_of = lambda index, arguments, outputs, _: original(index, arguments, outputs, disturb)
        for _ in range(BAND_TRIALS):
            if request_of(one(case, request).run("torch"), 0) == got:
                return True
    finally:
        reference.request_of = original
    return False


def one(case, request):
    """A case with only one of its requests."""
    part = slice(request, request + 1)
    topology = case.topology
    if topology is not None and topology.batch > 1:
        names = [field.name for field in dataclasses.fields(topology)]
        topology = Topology(*(None if name == "offsets" else getattr(topology, name)[part] for name in names))
    options = {
        name: value[part] if isinstance(value, torch.Tensor) and value.dim() else value
        for name, value in case.options.items()
    }
    draft = None if case.draft is None else case.draft[part]
    return AcceptCase(case.rule, case.target[part], case.tokens[part], topology, draft, options)
