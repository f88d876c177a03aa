"""The contracts of `accept`, which runs every acceptance rule, and of `sample`, which runs both samplers.

Each setting is a number, used where its tensor [batch] is None: `temperature` and `temperatures`, and so on up to
`position` and `positions`. Logits have a contiguous last dimension, all other tensors are contiguous.
"""

from typing import NamedTuple

import torch

from specdec_ops._core.library import Operator


class AcceptArguments(NamedTuple):
    """One round of speculative decoding: the target's rows, what was drafted, and what decides."""

    rule: str
    """"greedy", "match", "recursive", "traversal", "target_only", "kseq", "typical" or "longest\""""
    target: torch.Tensor
    """logits [batch, nodes, vocab] after each node, or for "greedy" int32 ids [batch, nodes]"""
    draft_tokens: torch.Tensor
    """int32 [batch, nodes], or for a chain [batch, nodes - 1], where column i is node i + 1"""
    draft_logits: torch.Tensor | None
    """[batch, rows, draft_vocab], row n for the children of node n; None: one-hot proposals"""
    target_to_draft: torch.Tensor | None
    """int32 [vocab], -1 outside of the draft's vocabulary; None: the vocabularies are the same"""
    first_child: torch.Tensor | None
    """int32 [batch or 1, nodes]; None for a chain: the child of node i is node i + 1"""
    next_sibling: torch.Tensor | None
    """like first_child"""
    num_nodes: torch.Tensor
    """int32 [batch or 1]"""
    temperature: float
    temperatures: torch.Tensor | None
    """float32"""
    top_k: int
    """0 is off"""
    top_ks: torch.Tensor | None
    """int32"""
    top_p: float
    """1 is off"""
    top_ps: torch.Tensor | None
    """float32"""
    draft_temperature: float
    """of the draft's rows, like the next ones"""
    draft_temperatures: torch.Tensor | None
    draft_top_k: int
    draft_top_ks: torch.Tensor | None
    draft_top_p: float
    draft_top_ps: torch.Tensor | None
    seed: int
    """64 bits"""
    seeds: torch.Tensor | None
    """int64"""
    position: int
    """of node 0"""
    positions: torch.Tensor | None
    """int32"""
    eos: list[int]
    """up to 8 tokens that end a sequence"""
    thresholds: list[float]
    """"target_only": (single, accumulated); "typical": (epsilon, delta)"""
    replacement: bool
    """whether siblings were drawn with replacement"""
    child_rows: bool
    """draft row n is what node n itself was drawn from, given the siblings before it"""


class AcceptOutputs(NamedTuple):
    """What is accepted."""

    tokens: torch.Tensor
    """int32 [batch, max_depth + 1]: accepted tokens, the next one, then -1. "longest": no next one"""
    nodes: torch.Tensor
    """int32 like tokens: the accepted path, from node 0 (which is not counted), then -1"""
    num_accepted: torch.Tensor
    """int32 [batch]. "longest" counts the root, which is node 0 or one of its siblings"""
    next_tokens: torch.Tensor
    """int32 [batch, width], or [batch] for one: -1 after an end of sequence, or where fewer are possible"""
    status: torch.Tensor
    """int32 [batch]: AcceptStatus bits of what the walk has looked at"""
    finished: torch.Tensor
    """bool [batch]: the last token emitted ends the sequence. "longest": that of the path"""


def _make_accepted(arguments: AcceptArguments, empty, *, max_depth: int, width: int) -> AcceptOutputs:
    """A width of 0: one next token, without a dimension of its own."""
    batch, device, columns = arguments.target.shape[0], arguments.target.device, max_depth + 1
    return AcceptOutputs(
        tokens=empty((batch, columns), torch.int32, device),
        nodes=empty((batch, columns), torch.int32, device),
        num_accepted=empty((batch,), torch.int32, device),
        next_tokens=empty((batch, width) if width else (batch,), torch.int32, device),
        status=empty((batch,), torch.int32, device),
        finished=empty((batch,), torch.bool, device),
    )


accept = Operator(
    "accept",
    AcceptArguments,
    AcceptOutputs,
    _make_accepted,
    answers=lambda arguments, outputs: arguments.target.shape[0] == 0,
)


class SampleArguments(NamedTuple):
    """Rows to draw tokens from."""

    logits: torch.Tensor
    """[batch, rows, vocab]"""
    draft_to_target: torch.Tensor | None
    """int32 [vocab] of target ids. Noise is keyed by the id in the row, not by the target's"""
    count: int
    """tokens per row"""
    replacement: bool
    """whether a row's tokens may repeat"""
    parents: torch.Tensor | None
    """int32 [batch, rows]: the node of each row; None: first_parent + row"""
    first_parent: int
    domain: str
    """"sample" (positions are those of the tokens drawn) or "draft" (positions are those of node 0)"""
    temperature: float
    temperatures: torch.Tensor | None
    """float32"""
    top_k: int
    """0 is off"""
    top_ks: torch.Tensor | None
    """int32"""
    top_p: float
    """1 is off"""
    top_ps: torch.Tensor | None
    """float32"""
    seed: int
    """64 bits"""
    seeds: torch.Tensor | None
    """int64"""
    position: int
    positions: torch.Tensor | None
    """int32"""


class SampleOutputs(NamedTuple):
    """What is drawn."""

    tokens: torch.Tensor
    """int32 [batch, rows, count], of the target's vocabulary. -1 where fewer tokens are possible"""
    logprobs: torch.Tensor | None
    """float32 like tokens: the log of the probability in the row's distribution, not conditioned on earlier tokens;
    -inf beside -1. At temperature 0, where it would say nothing: of temperature 1, unfiltered"""
    logsumexp: torch.Tensor | None
    """float32 [batch, rows]: of logits / temperature over the kept tokens; at temperature 0 of all logits"""
    status: torch.Tensor
    """int32 [batch]: SETTING_INVALID; TARGET_INVALID for an invalid row in the domain "sample", whose token is the
    defined one; DRAFT_INVALID in the domain "draft", where it has no children"""


def _make_sampled(arguments: SampleArguments, empty, *, with_law: bool) -> SampleOutputs:
    """with_law: also logprobs and logsumexp."""
    batch, rows, _ = arguments.logits.shape
    count, device = arguments.count, arguments.logits.device
    return SampleOutputs(
        tokens=empty((batch, rows, count), torch.int32, device),
        logprobs=empty((batch, rows, count), torch.float32, device) if with_law else None,
        logsumexp=empty((batch, rows), torch.float32, device) if with_law else None,
        status=empty((batch,), torch.int32, device),
    )


def _answers_sample(arguments: SampleArguments, outputs: SampleOutputs) -> bool:
    batch, rows, _ = arguments.logits.shape
    if batch and rows:
        return False
    outputs.status.zero_()  # requests without rows have nothing to report
    return True


sample = Operator("sample", SampleArguments, SampleOutputs, _make_sampled, answers=_answers_sample)
