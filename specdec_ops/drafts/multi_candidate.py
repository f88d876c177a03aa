"""`MultiCandidate`: a small model drafts a tree below one root or below several that the target has drawn."""

from __future__ import annotations

from collections.abc import Sequence

from specdec_ops._core.checks import argument_error, is_int
from specdec_ops.decode.model import Model
from specdec_ops.ops.acceptance.checks import MAX_DRAWS
from specdec_ops.vocab_map import VocabMap

from .fixed_tree import FixedTreeDraft
from .stop import Stop, check_stop

_OP = "drafts.MultiCandidate"


class MultiCandidate(FixedTreeDraft):
    """Multi-candidate speculative decoding: several children of every node, drawn from the draft.

    With one root this is MCSD (Yang et al., 2024): the root is the text's last token, `branching=(4, 2, 2, 1)` are 4 +
    8 + 16 + 16 nodes below it, and the engine's lossless rules apply.

    With several `target_roots` it is improved MCSD (Lu et al., 2024): in place of the next token the target draws that
    many candidates for it, without replacement, and the draft continues each. `branching=(4, 3, 1, 1)` with 2 roots is
    the paper's (2, 4, 3, 1, 1); ones, as in `(1,) * 5`, give its fork. **Lossy**: the rule "longest_path" keeps the
    root whose draft is accepted furthest, so likely tokens get likelier, and it must be asked for by name.

    With a `stop` trees are as deep as it lets them grow. The topology is made once for the whole tree, and a round that
    stops early has a leading part of it.

    Args:
        model: the draft, with the target's tokenizer.
        branching: children of each node below the roots, level by level.
        target_roots: candidates for the next token that the target draws, from 1.
        stop: from `specdec_ops.drafts`: asked after each level but the last whether to draft another one. None: always.
        stops_together: draft as deep for all requests of a batch as for the one that wants to go deepest, instead of
            asking for each. For rule "match" alone, with which the text does not depend on trees.
        replacement: whether siblings may repeat. Without, more is accepted.
        vocab_map: as for `Chain`.

    Raises:
        TypeError, ValueError: as `Tree.from_branching`; target_roots or stop has a wrong type or is out of range.
    """

    def __init__(
        self,
        model: Model,
        branching: Sequence[int] = (4, 2, 2, 1),
        *,
        target_roots: int = 1,
        stop: Stop | None = None,
        stops_together: bool = False,
        replacement: bool = False,
        vocab_map: VocabMap | None = None,
    ) -> None:
        if not is_int(target_roots):
            raise TypeError(argument_error(_OP, "target_roots", "an int", target_roots))
        if not 1 <= target_roots <= MAX_DRAWS:
            raise ValueError(argument_error(_OP, "target_roots", f"from 1 to {MAX_DRAWS}", target_roots))
        check_stop(_OP, stop)
        if not isinstance(stops_together, bool):
            raise TypeError(argument_error(_OP, "stops_together", "True or False", stops_together))
        super().__init__(
            model,
            tuple(branching),
            target_roots=target_roots,
            replacement=replacement,
            stop=stop,
            stops_together=stops_together,
            vocab_map=vocab_map,
        )
