"""`GrownTrees`: a proposer of trees that grow where the draft is sure of itself, as EAGLE-2's do."""

from __future__ import annotations

import abc
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from specdec_ops._core.checks import argument_error
from specdec_ops.decode.cache import Cache
from specdec_ops.decode.decoder import Decoder, Projection
from specdec_ops.decode.rows import Rows
from specdec_ops.ops.acceptance.sample import sample_children
from specdec_ops.ops.linear.gguf_weight import GgufWeight
from specdec_ops.ops.linear.quantized_weight import QuantizedWeight, quantize_linear
from specdec_ops.ops.topology.candidate_pool import CandidatePool, check_int
from specdec_ops.ops.topology.grow_tree import grow_tree
from specdec_ops.ops.topology.prune_tree import MAX_PRUNED_NODES, prune_tree
from specdec_ops.vocab_map import VocabMap

from .base import Draft, Drafted, Proposer

if TYPE_CHECKING:
    from specdec_ops.decode.batch import Batch
    from specdec_ops.decode.request import Request
    from specdec_ops.ops.acceptance.accept import Acceptance

_CHANCE = 0.5  # that the best child of a path is right, to guess before the level has been run


class GrownDraft(Draft):
    """A draft whose trees grow level by level.

    How, and what the sizes mean, `Eagle` says.

    Args:
        op: the name of the draft, for errors.
        hot_vocab: int32 or int64 [entries]: the ids that it proposes, for which alone the head is multiplied. None: all
            of the target's.
        levels: the most passes of the draft in a round, so also the depth of its trees, 1 to 64.
        width: nodes that a level expands, 1 to 256.
        branching: children of each of them, 1 to 64.
        nodes: the most of a tree that the target judges, its root included, 2 to 1024.

    Raises:
        TypeError, ValueError: an argument has a wrong type or is out of range.
    """

    proposals = "deterministic"

    def __init__(
        self, op: str, hot_vocab: torch.Tensor | None, *, levels: int, width: int, branching: int, nodes: int
    ) -> None:
        if hot_vocab is not None and not isinstance(hot_vocab, torch.Tensor):
            raise TypeError(argument_error(op, "hot_vocab", "int32 or int64 [entries], or None", hot_vocab))
        limits = {"levels": (levels, 1, 64), "width": (width, 1, 256), "branching": (branching, 1, 64)}
        for name, (value, low, high) in (limits | {"nodes": (nodes, 2, MAX_PRUNED_NODES // 2)}).items():
            check_int(op, name, value, low, high)
        self.hot_vocab = hot_vocab
        self.levels, self.width, self.branching = levels, width, branching
        self.max_nodes = min(nodes, 1 + branching * (1 + (levels - 1) * width))
        self.max_depth = levels
        self.run_nodes = 1 + (levels - 1) * width  # nodes of the tree that the draft runs itself


class GrownTrees(Proposer):
    """Trees of the paths that a draft thinks most likely. What a node's row is, the draft says.

    Args:
        draft: with its sizes and hot vocabulary.
        target: whose head makes logits of the rows.
        cache: of the draft, with slots for the nodes that it runs.
        is_int8: whether the draft's weights are int8: then the head's hot rows need not be more exact.
    """

    def __init__(self, draft: GrownDraft, target: Decoder, cache: Cache, *, is_int8: bool) -> None:
        self.draft, self.cache, self._target = draft, cache, target
        self._head, self._vocab_map = target.head, None
        if draft.hot_vocab is not None:
            self._vocab_map = VocabMap(draft.hot_vocab.to(target.shape.device), target.shape.vocab)
            self._head = _rows_of(target.head, self._vocab_map.draft_to_target)
            if is_int8:
                self._head = _in_int8(self._head)
        self._pools: dict[int, CandidatePool] = {}
        self._chances = _Chances()

    def reserve(self, request: Request) -> bool:
        """See `Proposer.reserve`."""
        return self.cache.reserve(request.draft_state, len(request.ids) - 1 + self.draft.run_nodes)

    def drop(self, request: Request) -> None:
        """Give its pages back."""
        if request.draft_state is not None:
            self.cache.drop(request.draft_state)
            request.draft_state = None

    @abc.abstractmethod
    def _run_roots(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Run what the cache does not have yet of the texts, node 0 included.

        Returns:
            the row of node 0 that the head makes logits of, [batch, dim], and the page table with room for the tree.
        """

    @abc.abstractmethod
    def _run_nodes(self, rows: Rows, before: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Run nodes of a level, whose parents' rows are `before`. Both are [rows, dim]."""

    @torch.inference_mode()
    def propose(self, batch: Batch) -> Drafted:
        """A tree for each request, of the paths that the draft thinks most likely."""
        size, device = len(batch), self.cache.device
        pool = self._pools.get(size)
        if pool is None:
            pool = CandidatePool.empty(
                size, levels=self.draft.levels, width=self.draft.width, branching=self.draft.branching, device=device
            )
            self._pools[size] = pool
        began = time.perf_counter()
        seconds = batch.seconds if device.type == "cpu" else None  # elsewhere a look at the pool would wait for it
        hidden, page_table = self._run_roots(batch)
        hidden = hidden[:, None]
        for level in range(self.draft.levels):
            logits = self._logits(hidden.flatten(0, 1)).view(size, hidden.shape[1], -1)
            top = sample_children(
                logits, self.draft.branching, seeds=0, positions=0, temperature=0.0, vocab_map=self._vocab_map
            )
            eos = self._target.eos[:8] or None
            frontier = grow_tree(pool, top.tokens, top.logprobs, level=level, eos=eos)
            if level + 1 == self.draft.levels:
                break
            if seconds is not None:
                spent = time.perf_counter() - began
                chances = self._chances.of(frontier.scores)
                if not _is_worth_a_level(chances, spent / (level + 1), spent + seconds(size)):
                    break
            places = frontier.parent_rows.clamp(min=0).long()[:, :, None].expand(-1, -1, hidden.shape[-1])
            rows = Rows(
                frontier.tokens,
                pool.topology,
                batch.context_lens,
                page_table,
                query_start=pool.query_start(level + 1),
            )
            before = hidden.gather(1, places).flatten(0, 1)
            hidden = self._run_nodes(rows, before, batch).view(size, self.draft.width, -1)
        nodes = self.draft.max_nodes
        if seconds is not None:
            best = pool.scores.topk(min(nodes - 1, pool.scores.shape[1]), dim=1).values
            nodes = _worthwhile(self._chances.of(best).sum(0), size, seconds, time.perf_counter() - began)
            self._chances.expect(best[:, : nodes - 1])
        tree = prune_tree(pool, nodes, root_tokens=batch.last_tokens)
        return Drafted(tree.tokens, tree.topology)

    def observe(self, batch: Batch, drafted: Drafted, acceptance: Acceptance, accepted: list[int]) -> None:
        """See `Proposer.observe`."""
        self._chances.learn(sum(accepted))

    def _logits(self, features: torch.Tensor) -> torch.Tensor:
        logits, softcap = self._head(features), self._target.logit_softcap
        return logits if softcap is None else torch.tanh(logits / softcap) * softcap


class _Chances:
    """How likely paths are to be accepted: what the draft gives them, times what has been accepted over what it gave.

    A greedy target says what the draft thinks most likely more often than the draft does, one at a high temperature
    less often.
    """

    _FIRST, _MEMORY = 16.0, 0.99  # tokens that are taken for expected and accepted at first; weight of the past

    def __init__(self) -> None:
        self._given = self._accepted = self._FIRST
        self._waiting = 0.0

    def of(self, scores: torch.Tensor) -> torch.Tensor:
        """Like scores, the draft's log-probabilities of paths."""
        return (scores.exp() * (self._accepted / self._given)).clamp(max=1.0)

    def expect(self, scores: torch.Tensor) -> None:
        """These paths are judged now."""
        self._waiting = scores.exp().sum().item()

    def learn(self, accepted: int) -> None:
        """So many of their tokens were accepted."""
        if self._waiting:
            self._given = self._MEMORY * self._given + self._waiting
            self._accepted = self._MEMORY * self._accepted + accepted
            self._waiting = 0.0


def _is_worth_a_level(chances: torch.Tensor, cost: float, spent: float) -> bool:
    """Whether one more level brings more tokens per second than a round that ends here would.

    Args:
        chances: [batch, width] of the paths that would go on.
        cost: seconds of a level.
        spent: seconds of the round without it.
    """
    return _CHANCE * chances.sum().item() * spent > len(chances) * cost


def _worthwhile(chances: torch.Tensor, size: int, seconds: Callable[[int], float], spent: float) -> int:
    """The number of nodes with which trees give most tokens per second, the root included.

    Args:
        chances: [nodes - 1] of each tree's best path, second best and so on, added over the trees.
        size: trees.
        seconds: of a round, by the rows of its pass.
        spent: seconds of the draft.
    """
    tokens = (size + chances.cumsum(0)).tolist()
    rates = [gain / (spent + seconds(size * (2 + place))) for place, gain in enumerate(tokens)]
    return 2 + max(range(len(rates)), key=rates.__getitem__)


def sizes_of_weight(weight) -> tuple[int, ...]:
    """[out, dim] of a weight, quantised or not."""
    return tuple(weight.shape) if isinstance(weight, torch.Tensor) else (weight.outputs, weight.dim)


def _rows_of(head: Projection, ids: torch.Tensor) -> Projection:
    """Some rows of a head, in the form that it has."""
    weight, ids = head.weight, ids.long()
    if isinstance(weight, GgufWeight):
        weight = GgufWeight(weight.blocks.index_select(0, ids), weight.weight_type)
    elif isinstance(weight, QuantizedWeight):
        weight = QuantizedWeight(weight.values.index_select(0, ids), weight.scales.index_select(0, ids))
    else:
        weight = weight.index_select(0, ids)
    return Projection(weight, None if head.bias is None else head.bias.index_select(0, ids))


def _in_int8(head: Projection) -> Projection:
    """The same in int8 with a scale per row, whose products are the fastest."""
    weight = head.weight.dequantize() if isinstance(head.weight, GgufWeight) else head.weight
    return head if isinstance(weight, QuantizedWeight) else Projection(quantize_linear(weight), head.bias)
