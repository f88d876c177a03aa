"""What the tests of the pitfalls of acceptance share."""

import torch

from specdec_ops import AcceptStatus
from tests.acceptance.accept_cases import CHAINS, chain, make_case

INF, NAN = float("inf"), float("nan")
STATUS_TARGET, STATUS_DRAFT = AcceptStatus.TARGET_INVALID, AcceptStatus.DRAFT_INVALID
STATUS_IMPOSSIBLE, STATUS_TREE = AcceptStatus.DRAFT_TOKEN_IMPOSSIBLE, AcceptStatus.TREE_INVALID


def slow(target):
    """Interpreted or emulated: right, but very slow."""
    return target.device == "cpu" and target.backend in ("triton", "cuda-emulated")


def extra(rule):
    return {"width": 2} if rule == "longest" else {}


def forest_roots(rule):
    return 2 if rule == "longest" else 1


def log(*probabilities):
    """Logits of a distribution."""
    return torch.tensor(probabilities).log()


def noise(target, count, seed=0):
    """Seeds that differ, on the device."""
    return {"seeds": torch.arange(seed, seed + count, device=target.device), "positions": 3}


def perfect(rule, nodes=4, vocab=12, batch=3, **options):
    """A chain that every rule accepts whole: the target is certain of the drafted tokens."""
    case = make_case(rule, [chain(nodes)] * batch, vocab, **extra(rule), **options)
    case.target[:] = -INF
    tokens = case.tokens if rule in CHAINS else case.tokens[:, 1:]
    for step in range(nodes - 1):
        case.target[torch.arange(batch), step, tokens[:, step].long()] = 0.0
    case.target[:, nodes - 1, vocab - 1] = 0.0
    if case.draft is not None:
        case.draft[:] = case.target[:, : case.draft.shape[1]]
    return case
