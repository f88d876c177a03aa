"""`finished`: the two ways in which a text ends, for every rule, and what a loop makes of it."""

import functools

import pytest
import torch

from specdec_ops import Topology, Tree, greedy_accept, longest_path_accept
from tests.acceptance.accept_cases import CHAINS, RULES, AcceptCase, fields_of, make_case
from tests.acceptance.test_accept_cuda import accepted
from tests.emulator import build

OP = "accept"
INF = float("inf")
VOCAB, EOS = 12, (9, 7)
# Drafted tokens of nodes 1 and 2, the target's choices after nodes 0 to 2, and what comes out of it.
ENDINGS = [
    ((7, 5), (7, 5, 4), [7, -1, -1], True),  # drafted, and accepted: nothing follows
    ((5, 7), (5, 7, 4), [5, 7, -1], True),
    ((5, 6), (9, 6, 4), [9, -1, -1], True),  # the target's choice after a rejection
    ((5, 6), (5, 6, 7), [5, 6, 7], True),  # and where nothing was rejected
    ((7, 9), (3, 9, 4), [3, -1, -1], False),  # drafted, and rejected
    ((5, 6), (5, 6, 4), [5, 6, 4], False),
    ((5, -1), (5, 9, 4), [5, 9, -1], True),  # padding behind
]


def sure(choices):
    """Logits [batch, nodes, VOCAB] that leave no choice."""
    logits = torch.full((len(choices), len(choices[0]), VOCAB), -INF)
    return logits.scatter_(2, torch.tensor(choices).clamp(0)[..., None], 0.0)


def case_of(rule):
    """All endings as one batch; drafts are as sure of themselves as the target is."""
    target = sure([choices for _, choices, _, _ in ENDINGS])
    drafted = torch.tensor([tokens for tokens, _, _, _ in ENDINGS], dtype=torch.int32)
    draft = make_case(rule, [[-1, 0, 1]], VOCAB).draft
    if draft is not None:
        draft = sure([(*tokens, 0) for tokens, _, _, _ in ENDINGS])[:, : draft.shape[1]]
    noise = {} if rule == "greedy" else {"seeds": 3, "positions": 8}
    if rule in CHAINS:
        return AcceptCase(rule, target, drafted, None, draft, {**noise, "eos": EOS})
    tokens = torch.nn.functional.pad(drafted, (1, 0), value=9)  # node 0 is committed: it ends nothing
    return AcceptCase(rule, target, tokens, Tree.chain(3).to("cpu"), draft, {**noise, "eos": EOS})


def check(result):
    got = fields_of(result)
    assert got["tokens"].tolist() == [tokens for _, _, tokens, _ in ENDINGS]
    assert got["finished"].tolist() == [ended for _, _, _, ended in ENDINGS]
    assert got["finished"].dtype == torch.bool
    emitted = (got["tokens"] >= 0).sum(1)
    assert torch.equal(emitted, got["num_accepted"] + (got["next_token"] >= 0))


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "longest"])
def test_both_endings(rule, target):
    """Drafted and accepted, or chosen by the target; nothing else ends a text, nor anything without `eos`."""
    case = case_of(rule).to(target.device)
    result = case.run(target.backend)
    check(result)
    if target.interpreted:  # right, but very slow
        return
    result.finished.logical_not_()
    check(case.run(target.backend, out=result))
    assert case.run(target.backend, eos=None).finished.tolist() == [False] * len(ENDINGS)


@pytest.mark.skipif(bool(build.why_not()), reason=str(build.why_not()))
@pytest.mark.parametrize("rule", ["match", "token", "block", "recursive", "target_only", "kseq", "typical"])
def test_the_race_that_comes_later_knows_too(rule):
    """CUDA's eager path draws the next token in a launch of its own."""
    check(accepted(case_of(rule), "eager"))
    check(accepted(case_of(rule), "lazy"))


def test_ids_of_the_target(target):
    """Where only the choices are known; -1 among them is no end, though unused places of `eos` may hold it."""
    ids = torch.tensor([choices for _, choices, _, _ in ENDINGS])
    drafted = torch.nn.functional.pad(torch.tensor([tokens for tokens, _, _, _ in ENDINGS]), (1, 0))
    call = functools.partial(greedy_accept, topology=Tree.chain(3).to(target.device), eos=EOS, backend=target.backend)
    check(call(ids.to(target.device), drafted.to(target.device)))
    ids[:] = -1
    assert call(ids.to(target.device), drafted.to(target.device)).finished.tolist() == [False] * len(ENDINGS)


def test_longest_path(target):
    """The path's last token ends a text, a root among them. Candidates for the next one end nothing yet."""
    tokens = torch.tensor([[5, 4, 7], [9, 4, 6], [5, 9, 6], [5, 4, 6]], dtype=torch.int32, device=target.device)
    topology = Topology.from_trees([Tree([-1, -1, 0])], target.device)
    logits = torch.zeros(4, 3, VOCAB, device=target.device)
    logits[:, 0] = -INF
    logits[torch.arange(4), 0, tokens[:, 2].long()] = 0.0
    call = functools.partial(longest_path_accept, width=12, seeds=2, positions=3, eos=EOS, backend=target.backend)
    result = call(logits, tokens, topology, logits)
    assert result.num_accepted.tolist() == [2, 1, 2, 2]
    assert result.finished.tolist() == [True, True, False, False]
    assert result.next_tokens[:2].tolist() == [[-1] * 12] * 2
    assert set(EOS) <= set(result.next_tokens[2].tolist())


def test_what_is_written_is_checked():
    """As for every output: dtype and shape, in one sentence."""
    case = case_of("recursive")
    out = case.run("torch")
    wrong = type(out)(*(getattr(out, name) for name in out.__slots__[:-1]), out.status)
    with pytest.raises(TypeError, match=r"tree_accept: out.finished must be bool \[7\], got int32 \[7\]"):
        case.run("torch", out=wrong)
