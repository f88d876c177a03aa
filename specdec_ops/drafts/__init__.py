"""Drafts of the engine: who proposes what the target verifies.

Ngram            continuations of earlier occurrences of the last tokens; needs no model
Chain            a small model drafts one token after another
MultiCandidate   a small model drafts a tree of fixed shape, below one root or below several candidates of the target
StopBelow, Decision, Stop   when drafting stops before the last level: thresholds, a trained network, one's own
Eagle            one layer over the target's last rows, trained for it, drafts a tree that grows where it is sure
MixtureOfAttentions   attends to keys and values of all layers of the target, trained for it; trees as Eagle's
Sorted           the leading layers of one draft are drafts, too; a token leaves where the draft is sure (S2D)
load             a draft that a training has saved, of any kind
Draft, Proposer, Drafted   to write one's own
"""

from .base import Draft as Draft
from .base import Drafted as Drafted
from .base import Proposer as Proposer
from .chain import Chain as Chain
from .eagle import Eagle as Eagle
from .mixture_of_attentions import MixtureOfAttentions as MixtureOfAttentions
from .multi_candidate import MultiCandidate as MultiCandidate
from .ngram import Ngram as Ngram
from .saved import load as load
from .sorted import Sorted as Sorted
from .sorted import TreeShape as TreeShape
from .stop import Decision as Decision
from .stop import Stop as Stop
from .stop import StopBelow as StopBelow
