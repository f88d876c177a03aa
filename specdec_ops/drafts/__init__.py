"""Drafts of the engine: who proposes what the target verifies.

Ngram            continuations of earlier occurrences of the last tokens; needs no model
Chain            a small model drafts one token after another
MultiCandidate   a small model drafts a tree of fixed shape
Eagle            one layer over the target's last rows, trained for it, drafts a tree that grows where it is sure
Draft, Proposer, Drafted   to write one's own
"""

from .base import Draft as Draft
from .base import Drafted as Drafted
from .base import Proposer as Proposer
from .chain import Chain as Chain
from .eagle import Eagle as Eagle
from .multi_candidate import MultiCandidate as MultiCandidate
from .ngram import Ngram as Ngram
