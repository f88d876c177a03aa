"""What the `status` tensors of results say: one bit for each thing that was odd, 0 where nothing was.

A status stays on the device as an integer. On the host its bits have names:

    >>> from specdec_ops import AcceptStatus
    >>> AcceptStatus(5)
    <AcceptStatus.TARGET_INVALID|DRAFT_TOKEN_IMPOSSIBLE: 5>
    >>> bool(torch.tensor([0, 5])[1] & AcceptStatus.TARGET_INVALID)
    True
"""

import enum


class AcceptStatus(enum.IntFlag):
    """Bits of `Acceptance.status`, `LongestPath.status` and `Children.status`.

    Attributes:
        TARGET_INVALID: a target row held NaN or +inf, or only -inf. It counts as certain of its first +inf, else of its
            argmax.
        DRAFT_INVALID: the same of a draft row: the children drawn from it were not tried, and none are drawn from it.
        DRAFT_TOKEN_IMPOSSIBLE: a drafted token outside of the vocabulary, or of draft probability 0: rejected.
        RESIDUAL_EMPTY: rounding left no residual to draw from: the next token came from the target's row without the
            rejected tokens.
        TREE_INVALID: a link that leads back or out of the tree was taken as none, or a bad num_nodes was clamped.
        SETTING_INVALID: a temperature of the request was NaN or negative, and counted as 0; or a top_p was NaN, and
            counted as off.
    """

    TARGET_INVALID = 1
    DRAFT_INVALID = 2
    DRAFT_TOKEN_IMPOSSIBLE = 4
    RESIDUAL_EMPTY = 8
    TREE_INVALID = 16
    SETTING_INVALID = 32


class ExitStatus(enum.IntFlag):
    """Bits of `Confidence.status`.

    Attributes:
        INVALID: the row's logits held NaN or +inf, or only -inf. Its statistics are 0, its logsumexp is -inf; it never
            exits.
        FELL_BACK: the screen left something open, so the row was read from the whole head.
        SETTING_INVALID: the row's temperature was NaN or negative. Its token is right; the rest is as of a row with
            INVALID.
    """

    INVALID = 1
    FELL_BACK = 2
    SETTING_INVALID = 4


class GrowStatus(enum.IntFlag):
    """Bits of `CandidatePool.status`, of all levels since level 0. Each of these was no candidate.

    Attributes:
        LOGPROB_INVALID: a token with a logprob of NaN or +inf.
        TOKEN_OUT_OF_RANGE: a token below -1, or, with a vocab_map, one that is no entry of the draft's vocabulary.
    """

    LOGPROB_INVALID = 1
    TOKEN_OUT_OF_RANGE = 2


class TopologyStatus(enum.IntFlag):
    """Bits of `Topology.status`.

    Attributes:
        PARENT_OUT_OF_RANGE: a parent below -1, or not below num_nodes. The node became a root.
        PARENT_NOT_BEFORE: a parent that does not come before its child, as in every cycle. The node became a root.
        NUM_NODES_OUT_OF_RANGE: num_nodes below 0 or above the number of columns of parents. It was clamped.
    """

    PARENT_OUT_OF_RANGE = 1
    PARENT_NOT_BEFORE = 2
    NUM_NODES_OUT_OF_RANGE = 4
