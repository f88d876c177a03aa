"""What a draft is to the engine: `Draft`, `Proposer` and `Drafted`."""

# ruff: noqa: B027 -- hooks do nothing unless a draft has a use for them; propose alone must be written.

from __future__ import annotations

import abc
import dataclasses
from typing import TYPE_CHECKING, Literal

import torch

from specdec_ops.topology import Topology
from specdec_ops.vocab_map import VocabMap

if TYPE_CHECKING:
    from specdec_ops.decode.batch import Batch
    from specdec_ops.decode.model import Model
    from specdec_ops.decode.request import Request
    from specdec_ops.ops.acceptance.accept import Acceptance

Proposals = Literal["deterministic", "distinct", "repeated"]


@dataclasses.dataclass(frozen=True)
class Drafted:
    """The trees of a round.

    Attributes:
        tokens: int32 [batch, nodes], -1 where no node is. Node 0 is the last committed token; with several target
            roots the first nodes are those.
        topology: the trees, of batch 1 or that of tokens.
        draft_logits: [batch, nodes, vocab]: row n is what the children of node n were sampled from. None: children
            were not sampled.
        sizes: nodes of each request, where they differ and the host knows them: then rows without a node cost nothing.
        is_chain: whether no node has a sibling, so that accepted keys and values are in their places already.
    """

    tokens: torch.Tensor
    topology: Topology
    draft_logits: torch.Tensor | None = None
    vocab_map: VocabMap | None = None
    sizes: tuple[int, ...] | None = None
    is_chain: bool = False


class Draft(abc.ABC):
    """What a user makes: the settings and weights of a draft. What it knows of requests is in the engine's `Proposer`.

    Nothing in it changes while engines use it, so it may be given to any number of them at once, in any threads, for
    different targets.

    Attributes:
        proposals: how children are chosen, from which the lossless rules follow: "deterministic" (a function of the
            text before them), "distinct" (drawn without replacement) or "repeated" (with).
        max_nodes: of a tree, its roots included.
        max_depth: the most levels below the roots, where that is known to be less than max_nodes - 1.
        min_depth: the fewest levels below the roots; None: max_depth.
        max_positions: the longest text that it can follow; None: any.
        target_roots: how many candidates for the next token the target draws, the roots of the next tree: they are
            `Request.candidates`. 1: the next token itself, which is in the text already when it becomes node 0.
        is_chain: whether its trees are chains.
        weighs_rows: whether it looks at how long passes take (seconds of the batch), and proposes nothing where
            nothing pays. Of other drafts the engine measures whether they pay, and leaves them out if not.
        wants_hidden: whether `Proposer.see` is to be called. Prompts then share no pages, since their rows are wanted.
        wants_layers: whether `Proposer.propose` reads `Batch.layer_kv`. Where the target is elsewhere, the draft there
            makes states of that, and `Proposer.see` gets them; see `states`.
    """

    proposals: Proposals
    max_nodes: int
    max_depth: int | None = None
    min_depth: int | None = None
    max_positions: int | None = None
    target_roots: int = 1
    is_chain: bool = False
    weighs_rows: bool = False
    wants_hidden: bool = False
    wants_layers: bool = False

    def states(self, stacked: torch.Tensor) -> torch.Tensor:
        """[tokens, width]: all that the draft goes on from, of [tokens, layers, 2 * kv_heads * head_dim].

        Only of drafts that want layers.
        """
        raise TypeError(f"specdec_ops.drafts.{type(self).__name__}: it reads no layers, so nobody makes states of them")

    @abc.abstractmethod
    def bind(self, target: Model, *, max_batch: int, max_length: int, max_slots: int, is_coupled: bool) -> Proposer:
        """Once for each engine: check that the draft fits the target, and allocate.

        Args:
            target: the model that verifies.
            max_batch: the most requests at once.
            max_length: the most slots of a request.
            max_slots: the most slots of all requests together, which is what the target's pages have.
            is_coupled: whether the rule is "match": sampled children are then to be drawn with the target's own noise,
                so that they are those which the target will draw wherever both agree.
        """

    def __repr__(self) -> str:
        shape = "chains" if self.is_chain else "trees"
        return f"<{type(self).__name__}: {shape} of up to {self.max_nodes} nodes, {self.proposals} proposals>"


class Proposer(abc.ABC):
    """A draft at work in one engine: proposes trees of tokens for its requests, and owns its caches.

    What requests have as draft_state belongs to it.

    Attributes:
        levels: the most levels of the next trees below node 0, for drafts that each level costs time; None: as many as
            the draft has. Who waits long for each round wants more of them (`specdec_ops.remote`).
    """

    levels: int | None = None

    def start(self, request: Request) -> None:
        """A request joins. It may have an answer already, if it had to wait for pages."""

    def reserve(self, request: Request) -> bool:
        """Make room for a request's text and its next tree.

        Returns False, and does nothing, if there is none at the moment: then the newest request of the engine gives up
        what it has and waits. A request that is alone must be served.
        """
        return True

    def see(self, request: Request, start: int, hidden: torch.Tensor) -> None:
        """The target has run some of a request's tokens, in a prompt or because they were accepted.

        Args:
            request: whose.
            start: the position of the first.
            hidden: [tokens, dim], of the target's last layer before its final norm; or what `Draft.states` has made.
        """

    @abc.abstractmethod
    def propose(self, batch: Batch) -> Drafted:
        """Trees for the requests of a round."""

    def observe(self, batch: Batch, drafted: Drafted, acceptance: Acceptance, accepted: list[int]) -> None:
        """What was accepted. The texts of the requests have it already.

        Args:
            batch: of the round.
            drafted: what `propose` gave.
            acceptance: of the target.
            accepted: num_accepted of each request, on the host.
        """

    def seconds_of_level(self, requests: int) -> float | None:
        """How long a level of a tree with one node takes for so many requests; None if nothing is known or it is short.

        Asked before the first tree for so many requests, so that a draft which can't pay is never made to run prompts.
        """
        return None

    def retract(self, request: Request, length: int) -> None:
        """Only the first `length` tokens of the text it knows still hold, which is what the request has, and no draft.

        The engine itself never takes a token back. By default it begins anew with the text.
        """
        self.drop(request)
        self.start(request)

    def drop(self, request: Request) -> None:
        """A request leaves, or has to wait."""
