"""Acceptance: inputs, the reference's decisions, and our contestants. PyTorch's forms are in acceptance_peers.py.

The job is the same for everybody: from logits to the accepted tokens and the next one. Nobody is given probabilities.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

import specdec_ops
from benchmarks.attention.tree_attention import DTYPES, fill_random
from benchmarks.harness.contestant import Contestant, Expected, compiled, unavailable
from benchmarks.harness.reading import reader

from . import peers as acceptance_peers
from .cases import CHAIN_RULES, UNSAMPLED, AcceptCase

DISTINCT = 8  # requests of their own; larger batches repeat them in memory
BAND, BAND_TRIALS = 2.0**-20, 16  # a decision this near to another one may go either way; looked for after a difference
LIKELY = 64  # tokens of a row that share most of its probability


@dataclass
class Inputs:
    """Logits [batch, nodes, vocab], draft_logits the same or None, tokens int32 [batch, nodes]; node 0's is not read.

    A chain is a tree here, too; only the call of chain_accept takes its rows apart.
    """

    case: AcceptCase
    target: torch.Tensor
    draft: torch.Tensor | None
    tokens: torch.Tensor
    topology: specdec_ops.Topology
    tree: specdec_ops.Tree
    seeds: torch.Tensor
    positions: torch.Tensor

    def __post_init__(self):
        self.table = acceptance_peers.TreeTable.of(self.tree, self.target.device)


def make_inputs(case: AcceptCase, device: str = "cpu") -> Inputs:
    """Rows like a language model's: most of the mass is on a few dozen tokens, and the draft is roughly right there.

    Children are drawn from the draft without replacement and with the same top-p, or are its most likely tokens, as the
    rule expects.
    """
    tree = specdec_ops.Tree.from_parents(case.tree.parents)
    distinct, nodes, vocab = min(case.batch, DISTINCT), case.nodes, case.vocab
    generator = torch.Generator().manual_seed(case.vocab + case.nodes)
    likely = torch.randint(vocab, (distinct, nodes, min(LIKELY, vocab)), generator=generator)
    height = torch.rand(likely.shape, generator=generator) * 9 + 5
    rows = []
    for seed, blur in ((1, 0.0), (2, 1.0)):
        row = fill_random((distinct, nodes, vocab), DTYPES[case.dtype], seed)
        off = torch.randn(height.shape, generator=generator) * blur
        rows.append(row.scatter_(2, likely, (height + off).to(row.dtype)))
    seeds, positions = torch.arange(case.batch) * 7919 + 11, torch.arange(case.batch, dtype=torch.int32) * 3 + 100
    noise = {"seeds": seeds[:distinct], "positions": positions[:distinct], "top_p": case.top_p}
    if case.rule in UNSAMPLED:
        noise["temperature"] = 0.0
    tokens = draw_children(tree, rows[1], noise)
    repeat = -(-case.batch // distinct)

    def spread(tensor):
        return tensor.repeat(repeat, *[1] * (tensor.dim() - 1))[: case.batch].to(device)

    inputs = Inputs(
        case,
        spread(rows[0]),
        spread(rows[1]) if case.drafts else None,
        spread(tokens),
        tree.to(device),
        tree,
        seeds.to(device),
        positions.to(device),
    )
    case.must_read[:] = [sum(len(reads) for reads in rows_to_read(inputs)) * case.row_bytes]
    return inputs


def draw_children(tree, draft, noise) -> torch.Tensor:
    tokens = torch.full(draft.shape[:2], -1, dtype=torch.int32)
    for node in range(len(tree)):
        children = [child for child in range(len(tree)) if tree.parents[child] == node]
        if children:
            row = draft[:, node : node + 1]
            drawn = specdec_ops.sample_children(row, len(children), first_parent=node, **noise)
            tokens[:, children] = drawn.tokens[:, 0]
    return tokens


def call(inputs: Inputs, backend: str = "auto"):
    """The op of the case's rule."""
    case, rule = inputs.case, inputs.case.rule
    noise = {"seeds": inputs.seeds, "positions": inputs.positions, "top_p": case.top_p, "backend": backend}
    if rule in CHAIN_RULES:
        draft = None if inputs.draft is None else inputs.draft[:, :-1]
        return specdec_ops.chain_accept(inputs.target, inputs.tokens[:, 1:], draft, rule=rule, **noise)
    tree = (inputs.target, inputs.tokens, inputs.topology)
    if rule == "greedy":
        return specdec_ops.greedy_accept(*tree, backend=backend)
    if rule == "match":
        return specdec_ops.match_accept(*tree, **noise)
    if rule == "typical":
        return specdec_ops.typical_accept(*tree, **noise)
    return specdec_ops.tree_accept(*tree, inputs.draft, rule=rule, **noise)


def rows_to_read(inputs: Inputs) -> list[list[tuple[str, int, int]]]:
    """Of each request the rows (kind, request, node) that the accepted path alone makes necessary."""
    result = call(inputs)
    parents = {int(parent) for parent in inputs.tree.parents}
    needed = []
    for request, path in enumerate(result.nodes.tolist()):
        path = [node for node in path if node >= 0]
        rows = [("target", request, node) for node in path]
        if inputs.draft is not None:
            rows += [("draft", request, node) for node in path if node in parents]
        needed.append(rows)
    return needed


def expected(inputs: Inputs) -> Expected:
    """The reference's tokens for some requests. One differing decision is a wrong result."""
    some = sorted({0, inputs.case.batch // 2, inputs.case.batch - 1})
    picked = Inputs(
        inputs.case,
        inputs.target[some].double(),
        None if inputs.draft is None else inputs.draft[some].double(),
        inputs.tokens[some],
        inputs.topology,
        inputs.tree,
        inputs.seeds[some],
        inputs.positions[some],
    )
    exact = call(picked, "torch").tokens

    def take(result) -> list[torch.Tensor]:
        return [result.tokens[some] if isinstance(result, specdec_ops.Acceptance) else exact]

    def excuse(result) -> bool:
        """Whether each request's decisions are those of logits that differ by no more than rounding."""
        got, right = take(result)[0], torch.zeros(len(some), dtype=torch.bool, device=exact.device)
        for seed in range(BAND_TRIALS):
            right |= (call(nudged(picked, seed), "torch").tokens == got).all(1)
        return bool(right.all())

    return Expected(take, [exact], [0.0], excuse)


def nudged(inputs: Inputs, seed: int) -> Inputs:
    """The same with each logit moved by up to BAND of its size, one way or the other."""
    generator = torch.Generator(inputs.target.device).manual_seed(seed)

    def nudge(logits):
        if logits is None:
            return None
        signs = torch.randint(0, 2, logits.shape, generator=generator, device=logits.device) * 2 - 1
        return logits * (1 + BAND * signs)

    return replace(inputs, target=nudge(inputs.target), draft=nudge(inputs.draft))


def contestants(inputs: Inputs, options) -> list[Contestant]:
    def ours(backend: str, name: str) -> Contestant:
        return Contestant(name, "ours", lambda: call(inputs, backend))

    listed = [ours("auto", "specdec_ops")] + [ours(backend, f"specdec_ops {backend}") for backend in options.backends]
    if inputs.target.device.type == "cpu":
        listed.append(reader().control(inputs.case.bytes))
    if inputs.target.device.type == "cuda" and inputs.case.rule == "token" and inputs.case.top_p == 1:
        listed.append(flashinfer_chain(inputs))
    return listed + [peer(inputs, name, form, options) for name, form in acceptance_peers.forms(inputs.case)]


def flashinfer_chain(inputs: Inputs) -> Contestant:
    """FlashInfer's chain kernel with its softmax before it, as an engine calls them. It draws its own noise.

    Its result is right if the accepted tokens are a leading part of the drafted ones and one token of the vocabulary
    follows them; its law is not tested here.
    """
    try:
        from flashinfer.sampling import chain_speculative_sampling, softmax
    except ImportError:
        return unavailable("flashinfer", "library", "FlashInfer is not installed")
    (batch, nodes, vocab), drafted = inputs.target.shape, inputs.tokens[:, 1:].contiguous()

    def probabilities(logits):
        return softmax(logits.reshape(-1, vocab), enable_pdl=False).view(batch, -1, vocab)

    def call():
        p, q = probabilities(inputs.target), probabilities(inputs.draft[:, :-1])
        return chain_speculative_sampling(q, drafted, p)[0]

    def to_result(tokens):
        """As the reference's result if it is well-formed, else as it is."""
        count = (tokens >= 0).sum(1, keepdim=True) - 1
        steps = torch.arange(nodes - 1, device=tokens.device)
        follows = (tokens[:, :-1] == drafted) | (steps >= count)
        sound = bool((count >= 0).all()) and bool(follows.all()) and bool((tokens < vocab).all())
        return None if sound else specdec_ops.Acceptance(tokens, tokens, count, count, count, count)

    return Contestant("flashinfer", "library", call, to_result)


def peer(inputs: Inputs, name: str, form, options) -> Contestant:
    """A PyTorch form. With our noise it must decide as the reference does; it is timed with PyTorch's own noise."""
    problem = acceptance_peers.problem(inputs, form)
    if problem:
        return unavailable(name, "pytorch", problem)
    noise = acceptance_peers.TorchNoise(inputs)
    if name.startswith("compiled"):
        form = compiled(form)
    return Contestant(name, "pytorch", lambda: form(inputs, noise))
