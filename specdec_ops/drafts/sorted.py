"""`Sorted`: nested sub-models in one draft; a token leaves at the first whose confidence passes its threshold (S2D)."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence as Ordered
from typing import TYPE_CHECKING, NamedTuple

import torch

from specdec_ops._core.checks import argument_error, is_int, is_number
from specdec_ops.decode.decoder import Decoder
from specdec_ops.decode.rows import Rows
from specdec_ops.ops.early_exit.early_exit import early_exit
from specdec_ops.ops.early_exit.exit_confidence import MAX_TOP_K, exit_confidence
from specdec_ops.ops.early_exit.quantized_head import QuantizedHead, quantize_head
from specdec_ops.ops.topology.candidate_pool import CandidatePool, check_int
from specdec_ops.ops.topology.grow_tree import grow_tree
from specdec_ops.ops.topology.prune_tree import MAX_PRUNED_NODES, PrunedTree, prune_tree
from specdec_ops.tree import MAX_NODES, Tree
from specdec_ops.vocab_map import VocabMap

from . import checkpoint
from .base import Draft, Drafted, Proposer
from .model_draft import draft_cache
from .sorted_cache import Part, SortedCache, SortedSequence
from .weights import dense_weight, from_tensors, to_tensors

if TYPE_CHECKING:
    from specdec_ops.decode.batch import Batch
    from specdec_ops.decode.model import Model
    from specdec_ops.decode.request import Request
    from specdec_ops.ops.acceptance.accept import Acceptance

_OP = "drafts.Sorted"


@dataclasses.dataclass(frozen=True)
class TreeShape:
    """The sizes of trees that grow where the draft is sure, as EAGLE-2's do.

    Attributes:
        levels: passes of the draft in a round, so also the depth of its trees, 1 to 64.
        width: nodes that a level expands, 1 to 256.
        branching: children of each of them, 1 to 16.
        nodes: of a tree that the target judges, its root included, 2 to 1024.
    """

    levels: int = 4
    width: int = 3
    branching: int = 4
    nodes: int = 8

    def __post_init__(self) -> None:
        limits = {"levels": 64, "width": 256, "branching": MAX_TOP_K, "nodes": MAX_PRUNED_NODES // 2}
        for name, high in limits.items():
            check_int("drafts.TreeShape", name, getattr(self, name), 2 if name == "nodes" else 1, high)

    @property
    def run_nodes(self) -> int:
        """Nodes of a tree that the draft runs itself."""
        return 1 + (self.levels - 1) * self.width


@dataclasses.dataclass
class ExitCounts:
    """What the drafts of an engine have cost so far. For the choice of exits and thresholds.

    Attributes:
        left: of each exit: drafted tokens that left there, or levels of trees.
        layer_rows: rows times layers, those of prompts and of catch-ups included.
        head_rows: rows that the head has judged.
        layer_passes: layers that were run, each over some rows at once: what costs time while rows are few.
        head_passes: how often the head was run.
    """

    left: list[int]
    layer_rows: int = 0
    head_rows: int = 0
    layer_passes: int = 0
    head_passes: int = 0


class Sorted(Draft):
    """Sorted speculative decoding, S2D (Kavehzadeh et al., 2024): one draft whose leading layers are drafts, too.

    The model's first `exits[0]` layers, its first `exits[1]` and so on are sub-models that share the final norm and the
    head. Each drafted token leaves at the first sub-model that gives its likeliest token at least the probability that
    the threshold asks for. Layers behind that exit run the token when a later one goes deeper, so that all they see
    is what a full pass would give. Tokens are the likeliest ones, whatever the temperature: proposals are
    deterministic, so every rule for such proposals is lossless.

    A model whose leading layers were trained for it is needed: `python -m specdec_ops.train.soft` makes one from
    the first layers of any supported model, and `Sorted.load` reads it. One draft serves any number of targets
    that have its tokenizer, at once: each engine has keys and values of its own.

    With a `tree` each level of it leaves as a whole, when one of its nodes passes (S2D's rule), and it grows as the
    trees of EAGLE-2 do.

    Args:
        model: the draft, with the target's tokenizer. Layers behind the last exit are not used.
        exits: layer counts after which tokens may leave, ascending from 1.
        thresholds: a probability for each exit, where 0 always lets the token leave and anything above 1 never. At
            the last exit everything leaves, whatever its threshold says.
        steps: tokens of a chain, from 1.
        tree: sizes of trees; None drafts chains.
        hot_vocab: int32 or int64 [entries]: the ids that it proposes, for which alone the head is multiplied, and among
            which probabilities are taken. None: all.
        head: "int8" quantises the head, in which the most bytes of a small draft lie; None takes it as the model has
            it, float or int8. Blocks of a GGUF file become int8.

    Raises:
        TypeError, ValueError: an argument has a wrong type or is out of range, or the model caps its logits.
    """

    proposals = "deterministic"

    def __init__(
        self,
        model: Decoder,
        exits: Ordered[int],
        thresholds: Ordered[float],
        *,
        steps: int = 5,
        tree: TreeShape | None = None,
        hot_vocab: torch.Tensor | None = None,
        head: str | None = "int8",
    ) -> None:
        if not isinstance(model, Decoder):
            raise TypeError(argument_error(_OP, "model", "a specdec_ops.decode.Decoder", model))
        if model.logit_softcap is not None:
            must = (
                "one without a soft cap of its logits, which early_exit lacks, so thresholds would mean another thing"
            )
            raise ValueError(argument_error(_OP, "model", must, model))
        self.exits, self.thresholds = _checked_exits(exits, len(model.layers)), _checked_thresholds(thresholds)
        if len(self.thresholds) != len(self.exits):
            must = f"one for each of the exits {self.exits}"
            raise ValueError(argument_error(_OP, "thresholds", must, self.thresholds))
        check_int(_OP, "steps", steps, 1, MAX_NODES - 1)
        if tree is not None and not isinstance(tree, TreeShape):
            raise TypeError(argument_error(_OP, "tree", "a specdec_ops.drafts.TreeShape or None", tree))
        if hot_vocab is not None and not isinstance(hot_vocab, torch.Tensor):
            raise TypeError(argument_error(_OP, "hot_vocab", "int32 or int64 [entries], or None", hot_vocab))
        if head not in (None, "int8"):
            raise ValueError(argument_error(_OP, "head", "'int8' or None", head))
        self.model, self.steps, self.tree, self.hot_vocab = model, steps, tree, hot_vocab
        self.max_positions = model.shape.max_positions
        self.is_chain = tree is None
        self._tokenizer_hash = checkpoint.tokenizer_hash(model.tokenizer)
        if tree is None:
            self.max_nodes, self.max_depth = steps + 1, steps
        else:
            self.max_depth = tree.levels
            self.max_nodes = min(tree.nodes, 1 + tree.branching * tree.run_nodes)
        self.vocab_map = None
        if hot_vocab is not None:
            self.vocab_map = VocabMap(hot_vocab.to(model.shape.device), model.shape.vocab)
        self.head = _head(model, self.vocab_map, head)
        norm = model.norm
        self._before_head = norm if norm.bias is not None else None  # a LayerNorm: the op has RMSNorm inside
        self.head_options = {"vocab_map": self.vocab_map, "bias": _head_bias(model, self.vocab_map)}
        if norm.bias is None:
            self.head_options |= {"norm_weight": norm.weight, "norm_eps": norm.eps}

    @classmethod
    def load(
        cls,
        folder: str | os.PathLike,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        **options,
    ) -> Sorted:
        """The draft in a folder that `save` has written. `model` of the result is the small model itself.

        Args:
            folder: with a draft.safetensors and a draft.json.
            dtype: of rows, keys and values.
            device: where it will be.
            options: as of the class; exits, thresholds and hot_vocab are by default those in the folder.

        Raises:
            TypeError, ValueError: there is no such draft in the folder, or an option doesn't fit.
            RuntimeError: the package safetensors is not installed.
        """
        tensors, about = checkpoint.load(folder, "sorted", None)
        model = from_tensors(tensors, about["model"], dtype=dtype, device=torch.device(device))
        model.name = os.path.basename(os.path.normpath(folder))
        options = {"exits": about["exits"], "thresholds": about["thresholds"], **options}
        draft = cls(model, **{"hot_vocab": tensors.get("hot_vocab"), **options})
        draft._tokenizer_hash = about["tokenizer_sha256"]
        return draft

    def save(
        self, folder: str | os.PathLike, target: Decoder, *, weights: str = "int8", about: dict | None = None
    ) -> None:
        """Write the draft into a folder: draft.safetensors, and a draft.json that names the target and its tokenizer.

        Args:
            folder: made if there is none.
            target: the model that it was made from. Others with its tokenizer can have the draft, too.
            weights: of the layers: "int8", with a scale for each row, "bfloat16" or "float32".
            about: what else the JSON shall say, such as the command that trained it.

        Raises:
            ValueError: weights is none of these, or the model can't be saved.
            RuntimeError: the package safetensors is not installed.
        """
        tensors, said = to_tensors(self.model, weights)
        if self.hot_vocab is not None:
            tensors["hot_vocab"] = self.hot_vocab.to(torch.int32)
        said = {"exits": list(self.exits), "thresholds": list(self.thresholds), "model": said}
        checkpoint.save(folder, "sorted", tensors, target, said | (about or {}))

    def bind(self, target: Model, *, is_coupled: bool, **limits) -> SortedProposer:
        """See `Draft.bind`. Its proposals are the likeliest ones with any rule."""
        if self.model.shape.vocab != target.shape.vocab:
            raise ValueError(
                f"specdec_ops.{_OP}: model must have the target's vocabulary of {target.shape.vocab} tokens, "
                f"got {self.model.shape.vocab}"
            )
        of_target = checkpoint.tokenizer_hash(target.tokenizer)
        if None not in (of_target, self._tokenizer_hash) and of_target != self._tokenizer_hash:
            raise ValueError(f"specdec_ops.{_OP}: target must have the tokenizer that the draft was trained with")
        return SortedProposer(self, target.eos[:8], **limits)

    def at_head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Rows [rows, dim] as the head's op takes them."""
        return hidden if self._before_head is None else self._before_head(hidden)


class _Said(NamedTuple):
    """Of the newest rows: tokens [rows], or [rows, branching] with their log-probabilities."""

    tokens: torch.Tensor
    logprobs: torch.Tensor | None


class SortedProposer(Proposer):
    """Keys, values and pending rows of a sorted draft, for the requests of one engine.

    Attributes:
        cache: a `SortedCache`.
        counts: what drafts have cost so far.
    """

    def __init__(self, draft: Sorted, eos: tuple[int, ...], **limits) -> None:
        self.draft, self._eos = draft, eos or None
        self._run_nodes = draft.steps if draft.tree is None else draft.tree.run_nodes
        shape = draft.model.shape._replace(layers=draft.exits[-1])
        self.cache = SortedCache(draft.model, draft.exits, draft_cache(shape, self._run_nodes, **limits))
        self.counts = ExitCounts([0] * len(draft.exits))
        self._pools: dict[int, CandidatePool] = {}
        self._drafted: tuple[Part, PrunedTree | None] | None = None

    def start(self, request: Request) -> None:
        """An empty cache."""
        request.draft_state = SortedSequence(len(self.draft.exits))

    def reserve(self, request: Request) -> bool:
        """See `Proposer.reserve`."""
        return self.cache.pages.reserve(request.draft_state, len(request.ids) - 1 + self._run_nodes)

    def drop(self, request: Request) -> None:
        """Give its pages back."""
        if request.draft_state is not None:
            self.cache.pages.drop(request.draft_state)
            request.draft_state = None

    def propose(self, batch: Batch) -> Drafted:
        """A chain for each request, or a tree."""
        sequences = [request.draft_state for request in batch.requests]
        if not all(map(self.reserve, batch.requests)):
            raise RuntimeError("specdec_ops.drafts: the draft's cache is full, which must not happen")
        part = Part(sequences, self.cache.pages.page_table(sequences))
        newest = self.cache.read(sequences, [request.ids for request in batch.requests], part.page_table)
        drafted = self._chains(batch, part, newest) if self.draft.tree is None else self._trees(batch, part, newest)
        self.counts.layer_rows, self.counts.layer_passes = self.cache.layer_rows, self.cache.layer_passes
        return drafted

    def _chains(self, batch: Batch, part: Part, newest: torch.Tensor) -> Drafted:
        topology = Tree.chain(self.draft.max_nodes).to(self.cache.device)
        tokens = [batch.last_tokens]
        for step in range(self.draft.steps):
            if step:
                rows = Rows(tokens[-1][:, None], topology, batch.context_lens, part.page_table, query_start=step)
                newest = self.cache.run(0, part.sequences, rows, [1] * len(batch))
            tokens.append(self._said(part, newest, 1).tokens)
        self._drafted = part, None
        return Drafted(torch.stack(tokens, dim=1), topology, is_chain=True)

    def _trees(self, batch: Batch, part: Part, newest: torch.Tensor) -> Drafted:
        size, shape = len(batch), self.draft.tree
        pool = self._pools.get(size)
        if pool is None:
            sizes = {"levels": shape.levels, "width": shape.width, "branching": shape.branching}
            pool = self._pools[size] = CandidatePool.empty(size, **sizes, device=self.cache.device)
        exists = None
        for level in range(shape.levels):
            width, end = 1, 1
            if level:
                width, end = shape.width, pool.query_start(level) + shape.width
                start, tokens = pool.query_start(level), pool.frontiers[level - 1].tokens
                rows = Rows(tokens, pool.topology, batch.context_lens, part.page_table, query_start=start)
                newest, exists = self.cache.run(0, part.sequences, rows, [width] * size), tokens >= 0
            part = dataclasses.replace(part, parents=pool.topology.parents[:, :end])
            said = self._said(part, newest, width, exists)
            grow_tree(pool, *(some.view(size, width, -1) for some in said), level=level, eos=self._eos)
        tree = prune_tree(pool, self.draft.max_nodes, root_tokens=batch.last_tokens)
        self._drafted = part, tree
        return Drafted(tree.tokens, tree.topology)

    def _said(self, part: Part, newest: torch.Tensor, width: int, exists: torch.Tensor | None = None) -> _Said:
        """What comes after the newest rows, each request's from the first exit that it passes.

        Args:
            part: the requests, whose newest rows group 0 has run.
            newest: [requests * width, dim], of group 0.
            width: rows of a request that leave together.
            exists: bool [requests, width]: which of them are nodes; None: all.
        """
        draft, last = self.draft, len(self.draft.exits) - 1
        options, branching = draft.head_options, 0 if draft.tree is None else draft.tree.branching
        there, said = list(range(len(part.sequences))), None
        for group, threshold in enumerate(draft.thresholds):
            if group:
                newest = self.cache.deeper(group, part.only(there), width)
            hidden = draft.at_head(newest)
            self.counts.head_rows += len(hidden)
            self.counts.head_passes += 1
            if group == last:
                found, leaves = exit_confidence(hidden, draft.head, top_k=branching, **options), [True] * len(there)
            else:
                decision = early_exit(hidden, draft.head, threshold, top_k=branching, **options)
                found, leaves = decision.confidence, self._leave(decision.exited, exists, there, width)
            said = _merged(said, found, there, width, len(part.sequences))
            self.counts.left[group] += sum(leaves)
            there = [place for place, leaving in zip(there, leaves, strict=True) if not leaving]
            if not there:
                break
        return said

    @staticmethod
    def _leave(exited: torch.Tensor, exists: torch.Tensor | None, there: list[int], width: int) -> list[bool]:
        """Which requests leave: those with one row that passes, or with no node at all. The one copy to the host."""
        exited = exited.view(-1, width)
        if exists is not None:
            exists = exists if len(there) == len(exists) else exists[torch.tensor(there).to(exists.device)]
            exited = (exited & exists).any(1) | ~exists.any(1)
        return exited.view(-1).tolist()

    def observe(self, batch: Batch, drafted: Drafted, acceptance: Acceptance, accepted: list[int]) -> None:
        """Keep what was accepted, in every group as far as it has got."""
        part, tree = self._drafted
        if tree is None:
            for request, own, count in zip(batch.requests, part.sequences, accepted, strict=True):
                own.crop(min(own.root + 1 + count, len(request.ids) - 1))
            return
        paths = tree.draft_path(acceptance.nodes).tolist()
        self.cache.commit(part, [[node for node in path if node >= 0] for path in paths])


def _merged(said: _Said | None, found, there: list[int], width: int, requests: int) -> _Said:
    """What is said, with that of the requests that are still there replaced."""
    tokens, logprobs = (found.token, None) if found.top_tokens is None else (found.top_tokens, found.top_logprobs)
    if said is None or len(there) == requests:
        return _Said(tokens, logprobs)
    rows = (torch.tensor(there)[:, None] * width + torch.arange(width)).view(-1).to(tokens.device)
    new = said.tokens.index_copy(0, rows, tokens)
    return _Said(new, None if logprobs is None else said.logprobs.index_copy(0, rows, logprobs))


def _checked_exits(exits: Ordered[int], layers: int) -> tuple[int, ...]:
    exits = tuple(exits)
    if not all(map(is_int, exits)):
        raise TypeError(argument_error(_OP, "exits", "ints", exits))
    if not exits or exits[0] < 1 or exits[-1] > layers or sorted(set(exits)) != list(exits):
        raise ValueError(argument_error(_OP, "exits", f"ascending from 1 to the model's {layers} layers", exits))
    return exits


def _checked_thresholds(thresholds: Ordered[float]) -> tuple[float, ...]:
    thresholds = tuple(thresholds)
    if not all(map(is_number, thresholds)):
        raise TypeError(argument_error(_OP, "thresholds", "numbers", thresholds))
    if not all(threshold >= 0 for threshold in thresholds):
        raise ValueError(argument_error(_OP, "thresholds", "at least 0", thresholds))
    return tuple(map(float, thresholds))


def _head(model: Decoder, vocab_map: VocabMap | None, form: str | None) -> torch.Tensor | QuantizedHead:
    """The rows of the hot vocabulary, in a form that the exits take."""
    weight = model.head.weight
    keeps = form is None and isinstance(weight, torch.Tensor)
    rows = weight if isinstance(weight, torch.Tensor) else dense_weight(weight)
    if vocab_map is not None:
        rows = rows.index_select(0, vocab_map.draft_to_target.long())
    return rows.contiguous() if keeps else quantize_head(rows)


def _head_bias(model: Decoder, vocab_map: VocabMap | None) -> torch.Tensor | None:
    bias = model.head.bias
    if bias is None:
        return None
    return (bias if vocab_map is None else bias.index_select(0, vocab_map.draft_to_target.long())).float().contiguous()
