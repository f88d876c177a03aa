"""Acceptance: which drafted tokens to keep, and what comes after them, so that the text keeps the target's law."""

from __future__ import annotations

import dataclasses
import functools
import warnings

import torch

from specdec_ops._core.checks import argument_error, check_eos, is_int
from specdec_ops._core.library import are_plain, nobody_watches
from specdec_ops.topology import Topology
from specdec_ops.vocab_map import VocabMap

from . import contract
from .checks import (
    check_count,
    check_draft_law,
    check_draft_logits,
    check_fraction,
    check_ids,
    check_law,
    check_links,
    check_noise,
    check_per_request,
    check_target,
    check_tokens,
    check_written,
    draft_options_refused,
)
from .contract import AcceptArguments

MAX_DEPTH = 65_535
_GREEDY_LAW = (0.0, None, 0, None, 1.0, None)
_NO_NOISE = (0, None, 0, None)
_NO_THRESHOLDS = (1.0, 1.0)
_CHAIN_RULES = {"token": "recursive", "block": "traversal"}
_TREE_RULES = ("recursive", "traversal", "target_only", "kseq")
_OLD_TREE_RULES = {"coin": "target_only"}


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Acceptance:
    """What a round of speculative decoding gives each request, on the target's device.

    A text can end with an id of `eos` in two ways, and `finished` is true of both. If a *drafted* one was accepted, it
    counts in num_accepted and has a node, as its K and V are there, and next_token is -1: nothing follows. If the
    *target* chose one, it is next_token, and as any next token it has no node yet. Either way it is the last of
    `tokens`, so a loop appends `tokens` up to its padding, and goes on with the requests that are not finished:

        >>> logits, drafted = torch.tensor([[[0.0, 9, 0], [9, 0, 0]]] * 2), torch.tensor([[0, 1], [0, 2]])
        >>> accepted = greedy_accept(logits, drafted, Tree.chain(2).to("cpu"), eos=1)  # 1 was drafted for one of two
        >>> accepted.next_token.tolist(), accepted.num_accepted.tolist()
        ([-1, 1], [1, 0])
        >>> accepted.tokens.tolist(), accepted.finished.tolist()
        ([[1, -1], [1, -1]], [True, True])

    Attributes:
        tokens: int32 `[batch, max_depth + 1]`: the accepted draft tokens, then next_token, then -1.
        nodes: int32 `[batch, max_depth + 1]`: the accepted path from node 0, which is always there, to the last
            accepted node; then -1. What a commit of the KV cache needs.
        num_accepted: int32 `[batch]`: how many draft tokens were accepted. Node 0 is not counted.
        next_token: int32 `[batch]`: the token after the accepted ones, or -1 if the last of them is in `eos`.
        status: int32 `[batch]`: 0, or `AcceptStatus` bits of the rows that the walk has read.
        finished: bool `[batch]`: whether the last token emitted is in `eos`. Always false without.
    """

    tokens: torch.Tensor
    nodes: torch.Tensor
    num_accepted: torch.Tensor
    next_token: torch.Tensor
    status: torch.Tensor
    finished: torch.Tensor


def greedy_accept(
    target: torch.Tensor,
    draft_tokens: torch.Tensor,
    topology: Topology,
    *,
    eos: int | tuple[int, ...] | None = None,
    max_depth: int | None = None,
    out: Acceptance | None = None,
    backend: str = "auto",
) -> Acceptance:
    """Follow the target's most likely tokens through the tree: greedy decoding, exactly.

    From node 0 on, the walk goes to the lowest child whose token is the target's choice at the current node, until none
    is; that choice is then the next token. Of equal logits the lowest id wins.

    Args:
        target: the target's choices, int32 or int64 ids `[batch, nodes]`; or its logits, float32, bfloat16 or float16
            `[batch, nodes, vocab]`, of which only the rows on the accepted path need be read. Row n scores what follows
            node n. Any strides with a contiguous last dimension.
        draft_tokens: int32 or int64 `[batch, nodes]`; that of node 0 is not read. -1 is padding: no token.
        topology: the trees, of batch 1 or that of target, with room for its nodes. Node 0 is the last committed token.
        eos: up to 8 ids that end a sequence: nothing after one is accepted, see `Acceptance`.
        max_depth: the most draft tokens to accept; nodes - 1 by default.
        out: an Acceptance to write into, with contiguous tensors.
        backend: "auto", "cuda", "triton", "cpu" or "torch"; see `specdec_ops.backends("greedy_accept")`. A named
            backend never falls back. float64 logits run with the torch backend.

    Returns:
        An Acceptance, `out` where given. Nothing waits for the device; a request's result depends on it alone.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: a wrong shape, range, device or memory layout.
        RuntimeError: the named backend is not available, or an input requires grad.

    The walk is that of SpecInfer (Miao et al., 2024).
    """
    op = "greedy_accept"
    if isinstance(target, torch.Tensor) and target.dtype in (torch.int32, torch.int64):
        if target.dim() != 2 or target.shape[1] < 1:
            raise ValueError(argument_error(op, "target", "ids [batch, nodes] or logits [batch, nodes, vocab]", target))
        batch, nodes = target.shape
        target = check_ids(op, "target", target, batch, nodes, target.device)
    else:
        batch, nodes, _ = check_target(op, target, name="target")
    device = target.device
    draft_tokens = check_tokens(op, draft_tokens, batch, nodes, device)
    links = check_links(op, topology, batch, nodes, device)
    arguments = AcceptArguments(
        *("greedy", target, draft_tokens, None, None, *links, *_GREEDY_LAW, *_GREEDY_LAW, *_NO_NOISE),
        eos=check_eos(op, eos), thresholds=_NO_THRESHOLDS, replacement=False, child_rows=False,
    )  # fmt: skip
    return accepted(op, arguments, nodes - 1, max_depth, out, backend)


def match_accept(
    target_logits: torch.Tensor,
    draft_tokens: torch.Tensor,
    topology: Topology,
    *,
    seeds: torch.Tensor | int,
    positions: torch.Tensor | int,
    temperature: torch.Tensor | float = 1.0,
    top_k: torch.Tensor | int = 0,
    top_p: torch.Tensor | float = 1.0,
    eos: int | tuple[int, ...] | None = None,
    max_depth: int | None = None,
    out: Acceptance | None = None,
    backend: str = "auto",
) -> Acceptance:
    """Sample from the target at each node as decoding without drafts would, and go to the child that says the same.

    The text equals, token for token, that of a loop of `sample_tokens` with the same seeds, temperature, top_k and
    top_p, whatever was drafted. So it is lossless for every draft, and needs no draft probabilities. Stochastic drafts
    are accepted less often than by `tree_accept`; for tokens that were chosen deterministically it is as good.

    Here `positions` are those of node 0, the last committed token; there they are of the token drawn, one further on:

        >>> logits, length = torch.randn(2, 50), 7  # the 7 tokens so far have the positions 0 to 6
        >>> node_0, root = torch.zeros(2, 1, dtype=torch.int32), Tree.chain(1).to("cpu")
        >>> accepted = match_accept(logits[:, None], node_0, root, seeds=3, positions=length - 1)
        >>> torch.equal(accepted.next_token, sample_tokens(logits, seeds=3, positions=length))
        True

    Numbers that make no sense are refused. Values of tensors can't be, without a wait for the device, so each counts as
    something, for every op and backend alike:

    - temperature: NaN and negative values as 0, with `AcceptStatus.SETTING_INVALID`; what is below 1e-20 as 0; what is
      above 1e20, infinity among them, as 1e20: then all tokens are equally likely that top_k and top_p keep, which
      still go by the logits.
    - top_k: from 0 down as off, from the vocabulary's size up as everything, which is the same.
    - top_p: from 0 down as so little that one token is kept, from 1 up as off; NaN as off, with SETTING_INVALID.
    - seeds, positions: any bits will do. Positions wrap around behind 2**31 - 1.

    Args:
        target_logits: float32, bfloat16 or float16 `[batch, nodes, vocab]`. Row n scores what follows node n. Any
            strides with a contiguous last dimension, here and for draft_logits of other rules.
        draft_tokens: int32 or int64 `[batch, nodes]`; that of node 0 is not read. -1 is padding: it ends the list of
            siblings it is in.
        topology: the trees, of batch 1 or that of target_logits, with room for its nodes. Node 0 is the last committed
            token.
        seeds: int64 `[batch]` (uint64, int32 or uint32 too), or an int for all requests. All noise of a request is a
            function of its seed and of positions; requests with equal seeds and equal inputs get equal results.
        positions: int32 or int64 `[batch]`, or an int: the absolute position of node 0 (the number of tokens before
            it). It must grow from round to round, as it does, so that no noise is used twice.
        temperature: float32 `[batch]` or a number of at least 0. At 0 a request is greedy.
        top_k: int32 or int64 `[batch]` or an int: keep the k most likely tokens; 0 is off.
        top_p: float32 `[batch]` or a number: of these, keep the most likely ones that together have at least this
            share, and at least one; 1 is off. Among equal logits the lowest ids are kept.
        eos: up to 8 ids that end a sequence: nothing after one is accepted, see `Acceptance`.
        max_depth: the most draft tokens to accept; nodes - 1 by default.
        out: an Acceptance to write into, with contiguous tensors.
        backend: "auto", "cuda", "triton", "cpu" or "torch"; see `specdec_ops.backends("match_accept")`. A named backend
            never falls back. float64 logits run with the torch backend.

    Returns:
        An Acceptance, `out` where given. Nothing waits for the device; a request's result depends on it alone.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: a wrong shape, range, device or memory layout.
        RuntimeError: the named backend is not available, or an input requires grad.

    The rule is MCSD's naive sampling (Yang et al., 2024), with noise that depends on seed and position alone.
    """
    op = "match_accept"
    batch, nodes, _ = check_target(op, target_logits)
    device = target_logits.device
    law = check_law(op, temperature, top_k, top_p, batch, device)
    arguments = AcceptArguments(
        *("match", target_logits, check_tokens(op, draft_tokens, batch, nodes, device), None, None),
        *(*check_links(op, topology, batch, nodes, device), *law, *law),
        *check_noise(op, seeds, positions, batch, device),
        eos=check_eos(op, eos), thresholds=_NO_THRESHOLDS, replacement=False, child_rows=False,
    )  # fmt: skip
    return accepted(op, arguments, nodes - 1, max_depth, out, backend)


def chain_accept(
    target_logits: torch.Tensor,
    draft_tokens: torch.Tensor,
    draft_logits: torch.Tensor | None = None,
    *,
    rule: str = "token",
    num_steps: torch.Tensor | int | None = None,
    seeds: torch.Tensor | int,
    positions: torch.Tensor | int,
    temperature: torch.Tensor | float = 1.0,
    top_k: torch.Tensor | int = 0,
    top_p: torch.Tensor | float = 1.0,
    draft_temperature: torch.Tensor | float | None = None,
    draft_top_k: torch.Tensor | int | None = None,
    draft_top_p: torch.Tensor | float | None = None,
    vocab_map: VocabMap | None = None,
    eos: int | tuple[int, ...] | None = None,
    out: Acceptance | None = None,
    backend: str = "auto",
) -> Acceptance:
    """Speculative sampling of a chain: a draft without branches. Lossless.

    Args:
        target_logits: float32, bfloat16 or float16 `[batch, steps + 1, vocab]`: row i scores step i, and the last row
            what follows the last step.
        draft_tokens: int32 or int64 `[batch, steps]`, target ids. -1 is padding: it ends the draft.
        draft_logits: `[batch, steps, vocab]`, or `[batch, steps, draft_vocab]` with vocab_map: the rows that the draft
            tokens were *sampled* from. None: the tokens were chosen deterministically, such as by argmax or n-gram
            lookup. A choice by argmax that is reported with its logits would bias the text, unless draft_temperature
            is 0.
        rule: "token": each token is tested alone (Leviathan et al., 2023; Chen et al., 2023). "block": the same law
            with more tokens accepted, by looking at all of them before deciding (block verification, Sun et al., 2024).
        num_steps: int32 or int64 `[batch]` or an int: how many leading steps exist; all by default. In a tensor what is
            out of range is clamped, with `AcceptStatus.TREE_INVALID`.
        seeds: see match_accept, as for positions, temperature, top_k, top_p, eos, out and backend.
        positions: the absolute position of the last committed token, which is the one before draft_tokens.
        temperature: of the target.
        top_k: of the target.
        top_p: of the target.
        draft_temperature: that with which the draft tokens were sampled; the target's by default. Ignored for requests
            whose target is greedy. The same for the next two.
        draft_top_k: see above.
        draft_top_p: see above.
        vocab_map: the tokens that the entries of draft_logits stand for, where the draft's vocabulary is a part of the
            target's.
        eos: ids that end a sequence.
        out: an Acceptance to write into, of max_depth `steps`.
        backend: as in match_accept.

    Returns:
        An Acceptance, `out` where given, with max_depth = steps. In `nodes`, step i is node i + 1.

    Raises:
        TypeError, ValueError, RuntimeError: as in match_accept.
    """
    op = "chain_accept"
    if not isinstance(rule, str) or rule not in _CHAIN_RULES:
        raise ValueError(argument_error(op, "rule", "'token' or 'block'", rule))
    layout = "[batch, steps + 1, vocab]"
    batch, nodes, vocab = check_target(op, target_logits, layout)
    device, steps = target_logits.device, nodes - 1
    draft_tokens = check_tokens(op, draft_tokens, batch, steps, device)
    law = draft_law = check_law(op, temperature, top_k, top_p, batch, device)
    target_to_draft = None
    if draft_logits is not None:
        target_to_draft = check_draft_logits(op, draft_logits, steps, vocab_map, batch, vocab, target_logits)
        draft_law = check_draft_law(op, draft_temperature, draft_top_k, draft_top_p, batch, device, law)
    else:
        draft_options_refused(op, draft_temperature, draft_top_k, draft_top_p, vocab_map)
    noise = check_noise(op, seeds, positions, batch, device)
    arguments = AcceptArguments(
        *(_CHAIN_RULES[rule], target_logits, draft_tokens, draft_logits, target_to_draft, None, None),
        *(_num_nodes(op, num_steps, steps, batch, target_logits), *law, *draft_law, *noise),
        eos=check_eos(op, eos), thresholds=_NO_THRESHOLDS, replacement=False, child_rows=False,
    )  # fmt: skip
    return accepted(op, arguments, steps, None, out, backend)


def tree_accept(
    target_logits: torch.Tensor,
    draft_tokens: torch.Tensor,
    topology: Topology,
    draft_logits: torch.Tensor | None = None,
    *,
    rule: str = "recursive",
    replacement: bool = False,
    draft_rows: str = "parent",
    thresholds: tuple[float, float] = _NO_THRESHOLDS,
    seeds: torch.Tensor | int,
    positions: torch.Tensor | int,
    temperature: torch.Tensor | float = 1.0,
    top_k: torch.Tensor | int = 0,
    top_p: torch.Tensor | float = 1.0,
    draft_temperature: torch.Tensor | float | None = None,
    draft_top_k: torch.Tensor | int | None = None,
    draft_top_p: torch.Tensor | float | None = None,
    vocab_map: VocabMap | None = None,
    eos: int | tuple[int, ...] | None = None,
    max_depth: int | None = None,
    out: Acceptance | None = None,
    backend: str = "auto",
) -> Acceptance:
    """Speculative sampling of a tree of candidates. Lossless, but for rule "target_only" with thresholds below 1.

    The rules differ in what they need to know of the draft, and in how much they accept:

    - "recursive": siblings are tested in turn, lowest node first; a rejection takes the sibling's draft probability out
      of the target's before the next is tested. SpecInfer (Miao et al., 2024) and MCSD (Yang et al., 2024) with
      replacement, MCSD and Sequoia (Chen et al., 2024) without.
    - "traversal": from the leaves up, which accepts more (traversal verification, Weng et al., 2025).
    - "target_only": one uniform number per level against the target's probability of the children tried so far; reads
      no draft logits. For children that are a function of what is before them (top-k of the draft, n-grams), not
      sampled. After SGLang, whose term it is. The rule was called "coin"; that name still works, with a
      DeprecationWarning.
    - "kseq": for siblings drawn with replacement: one scaled test for all (K-SEQ of SpecTr, Sun et al., 2023).

    With draft_logits None the children are taken as chosen deterministically: the rule that EAGLE-2 and S2D trees need.

    Args:
        target_logits: float32, bfloat16 or float16 `[batch, nodes, vocab]`. Row n scores what follows node n.
        draft_tokens: int32 or int64 `[batch, nodes]`, target ids; that of node 0 is not read. -1 is padding: it ends
            the list of siblings it is in. Equal siblings do no harm.
        topology: the trees, of batch 1 or that of target_logits, with room for its nodes. Node 0 is the last committed
            token.
        draft_logits: `[batch, nodes, vocab]`, or `[batch, nodes, draft_vocab]` with vocab_map: row n is what the
            children of node n were *sampled* from. None: they were chosen deterministically.
        rule: "recursive", "traversal", "target_only" (without draft_logits) or "kseq" (with draft_logits).
        replacement: the siblings were drawn with replacement. "kseq" takes that for granted.
        draft_rows: "parent" as above; "child": row n is what node n itself was sampled from, independently of its
            siblings, as when they come from different drafts. For "recursive" and "traversal". Sample each such node
            with its own number in place of its parent's (`sample_children(..., parents=...)`): siblings that two drafts
            sample for one parent would share their noise.
        thresholds: of "target_only": (single, accumulated), from 0 to 1. A child is accepted if its probability is at
            least `single`, or if the uniform number times `accumulated` is below the sum so far. **Below 1 the rule is
            lossy.**
        seeds: see match_accept, as for positions, temperature, top_k, top_p, eos, max_depth, out and backend.
        positions: the absolute position of node 0.
        temperature: of the target.
        top_k: of the target.
        top_p: of the target.
        draft_temperature: that with which the draft tokens were sampled; the target's by default. Ignored for requests
            whose target is greedy. The same for the next two.
        draft_top_k: see above.
        draft_top_p: see above.
        vocab_map: the tokens that the entries of draft_logits stand for, where the draft's vocabulary is a part of the
            target's.
        eos: ids that end a sequence.
        max_depth: the most draft tokens to accept; nodes - 1 by default.
        out: an Acceptance to write into.
        backend: as in match_accept.

    Returns:
        An Acceptance, `out` where given.

    Raises:
        TypeError, ValueError, RuntimeError: as in match_accept.
    """
    op = "tree_accept"
    rule = _current_name(op, rule)
    child_rows = _check_rule(op, rule, replacement, draft_rows, draft_logits)
    batch, nodes, vocab = check_target(op, target_logits)
    device = target_logits.device
    draft_tokens = check_tokens(op, draft_tokens, batch, nodes, device)
    links = check_links(op, topology, batch, nodes, device)
    law = draft_law = check_law(op, temperature, top_k, top_p, batch, device)
    target_to_draft = None
    if draft_logits is not None:
        target_to_draft = check_draft_logits(op, draft_logits, nodes, vocab_map, batch, vocab, target_logits)
        draft_law = check_draft_law(op, draft_temperature, draft_top_k, draft_top_p, batch, device, law)
    else:
        draft_options_refused(op, draft_temperature, draft_top_k, draft_top_p, vocab_map)
    noise = check_noise(op, seeds, positions, batch, device)
    if thresholds is not _NO_THRESHOLDS:
        thresholds = _check_thresholds(op, thresholds, rule)
    arguments = AcceptArguments(
        *(rule, target_logits, draft_tokens, draft_logits, target_to_draft, *links, *law, *draft_law, *noise),
        eos=check_eos(op, eos), thresholds=thresholds, child_rows=child_rows,
        replacement=replacement or child_rows or rule == "kseq",
    )  # fmt: skip
    return accepted(op, arguments, nodes - 1, max_depth, out, backend)


def accepted(op: str, arguments: AcceptArguments, most: int, max_depth: int | None, out, backend: str) -> Acceptance:
    """Run a checked call of any rule with one next token."""
    if max_depth is None:
        max_depth = most
    else:
        check_count(op, "max_depth", max_depth, 0, MAX_DEPTH)
    if out is None:
        return Acceptance(*contract.accept(arguments, backend, max_depth=max_depth, width=0))
    if not isinstance(out, Acceptance):
        raise TypeError(argument_error(op, "out", "a specdec_ops.Acceptance", out))
    batch, device = arguments.target.shape[0], arguments.target.device
    for name, shape in (("tokens", (batch, max_depth + 1)), ("nodes", (batch, max_depth + 1))):
        check_written(op, f"out.{name}", getattr(out, name), shape, device)
    for name in ("num_accepted", "next_token", "status"):
        check_written(op, f"out.{name}", getattr(out, name), (batch,), device)
    check_written(op, "out.finished", out.finished, (batch,), device, torch.bool)
    written = contract.AcceptOutputs(
        out.tokens, out.nodes, out.num_accepted, next_tokens=out.next_token, status=out.status, finished=out.finished
    )
    contract.accept(arguments, backend, written)
    return out


def _current_name(op: str, rule) -> str:
    """Check the rule's name, and turn an old one into the one it has now."""
    if isinstance(rule, str):
        if rule in _TREE_RULES:
            return rule
        if rule in _OLD_TREE_RULES:
            now = _OLD_TREE_RULES[rule]
            if not torch.compiler.is_compiling():  # which can't trace a warning, and must not break for one
                message = f"specdec_ops.{op}: rule={rule!r} is now called {now!r}"
                warnings.warn(message, DeprecationWarning, stacklevel=3)
            return now
    raise ValueError(argument_error(op, "rule", "'recursive', 'traversal', 'target_only' or 'kseq'", rule))


def _check_rule(op: str, rule: str, replacement, draft_rows, draft_logits) -> bool:
    """Check the options that say what kind of draft it is; return whether rows belong to the children."""
    if type(replacement) is not bool:
        raise TypeError(argument_error(op, "replacement", "a bool", replacement))
    if not isinstance(draft_rows, str) or draft_rows not in ("parent", "child"):
        raise ValueError(argument_error(op, "draft_rows", "'parent' or 'child'", draft_rows))
    if draft_logits is None:
        if rule == "kseq":
            raise ValueError(argument_error(op, "draft_logits", "given with rule='kseq'", None))
        if replacement:
            raise ValueError(argument_error(op, "replacement", "False without draft_logits", True))
        if draft_rows == "child":
            raise ValueError(argument_error(op, "draft_rows", "'parent' without draft_logits", draft_rows))
    elif rule == "target_only":
        raise ValueError(
            argument_error(
                op, "draft_logits", "None with rule='target_only', which is for unsampled drafts", draft_logits
            )
        )
    elif rule == "kseq" and draft_rows == "child":
        raise ValueError(argument_error(op, "draft_rows", "'parent' with rule='kseq'", draft_rows))
    return draft_rows == "child"


def _check_thresholds(op: str, thresholds, rule: str) -> tuple[float, float]:
    if not isinstance(thresholds, tuple | list) or len(thresholds) != 2:
        raise TypeError(argument_error(op, "thresholds", "two numbers (single, accumulated)", thresholds))
    for value in thresholds:
        check_fraction(op, "thresholds", value)
    if rule != "target_only" and tuple(thresholds) != _NO_THRESHOLDS:
        raise ValueError(
            f"specdec_ops.{op}: thresholds must be (1.0, 1.0) but with rule='target_only', got {tuple(thresholds)}"
        )
    return tuple(thresholds)


def _num_nodes(op: str, num_steps, steps: int, batch: int, target: torch.Tensor) -> torch.Tensor:
    """How many nodes the chains have: the last committed token and the steps."""
    if isinstance(num_steps, torch.Tensor):
        num_steps = check_per_request(op, "num_steps", num_steps, torch.int32, batch, target.device)
        return num_steps.clamp(max=2**31 - 2).add_(1)  # of the greatest int32 the next one is negative
    if num_steps is None:
        num_steps = steps
    elif not is_int(num_steps):
        raise TypeError(argument_error(op, "num_steps", "None, an int, or int32 or int64 [batch]", num_steps))
    elif not 0 <= num_steps <= steps:
        raise ValueError(argument_error(op, "num_steps", f"an int from 0 to {steps}", num_steps))
    device = target.device
    if device.type == "cpu" and nobody_watches() and are_plain((target,)):
        return _constant(num_steps + 1)
    return torch.full((1,), num_steps + 1, dtype=torch.int32, device=device)


@functools.lru_cache(maxsize=256)
def _constant(value: int) -> torch.Tensor:
    return torch.full((1,), value, dtype=torch.int32, device="cpu")
