"""Mixture of Attentions at a client: what comes over the line is all that it needs, and it goes on without."""

from types import SimpleNamespace

import pytest
import torch

from specdec_ops import drafts
from specdec_ops.decode import Engine, Sampling
from specdec_ops.remote import Cut, Link, RemoteError, Server
from specdec_ops.remote import server as server_program
from specdec_ops.remote.clock import run
from specdec_ops.remote.drafter import Drafter
from specdec_ops.train.mixture_of_attentions import Beside
from tests.decode.test_mixture_of_attentions import SIZES, wanted, watch
from tests.harness.tiny_models import make_decoder, mixture_net
from tests.remote.talks import DRAFTS, PROMPT, TARGET, client, converse, local, server

GREEDY = Sampling(max_tokens=30, eos=())


@pytest.mark.parametrize("target_layers", [0, 1])
def test_rows_of_a_client_are_those_of_the_equations(target_layers):
    """The text gets ahead of the states, which come late and in pieces, and parts of it are taken back."""
    target = make_decoder(1)
    net = mixture_net(target, target_layers)
    draft = net.draft(target, None, **SIZES)
    text = torch.randint(40, (24,), generator=torch.Generator().manual_seed(5)).tolist()
    other = [(token + 1) % 40 for token in text]
    states = draft.states(Beside(target, 0).run(torch.tensor([text], dtype=torch.int32)).stacked[0])
    here = Drafter(draft, target, GREEDY, 128)
    noted = watch(SimpleNamespace(proposer=here._proposer))
    verified = 0
    for length, known in ((6, 5), (9, 5), (14, 9), (12, 9), (13, 12), (20, 12), (20, 19)):
        here.take_states(verified, states[verified:known])
        verified = known
        ids = text[: known + 1] + other[known + 1 : length]
        noted.clear()
        tree = here.propose(ids)
        assert here.states == known and len(tree.tokens) > 1
        with torch.no_grad():
            for _, path, _, row in noted[::2]:
                want = wanted(net, path, known + 1, target)
                assert (row.double() - want).abs().max() < 2e-4 * want.abs().max()


def test_its_trees_are_those_of_an_engine():
    draft = DRAFTS["mixture"]
    engine, rounds = Engine(TARGET, draft, "match", max_batch=1, adapt=False), []
    propose = engine.proposer.propose

    def noting(batch):
        drafted = propose(batch)
        rounds.append((list(batch.requests[0].ids), drafted.tokens[0].tolist()))
        return drafted

    engine.proposer.propose = noting
    text = [*PROMPT, *engine.generate([PROMPT], GREEDY)[0].tokens]
    states = draft.states(Beside(TARGET, 0).run(torch.tensor([text], dtype=torch.int32)).stacked[0])
    here = Drafter(draft, TARGET, GREEDY, 128)
    for ids, tokens in rounds:
        here.take_states(here.states, states[here.states : len(ids) - 1])
        assert here.propose(ids).tokens == tokens


def test_it_goes_on_alone():
    """From the states that it has, to the end of the answer."""
    cut = (Cut(at=0.5, seconds=1e6),)
    result, _, _ = converse(GREEDY, DRAFTS["mixture"], Link(rtt=0.1, cuts=cut), give_up=20.0)
    assert result.finish_reason == "disconnected" and len(result.tokens) == 30 and result.unverified > 8
    verified = len(result.tokens) - result.unverified
    assert result.tokens[:verified] == local(PROMPT, GREEDY).tokens[:verified]


def test_a_server_of_other_states_is_refused():
    async def talk():
        async with server(states=True) as there:
            with pytest.raises(RemoteError, match="states must be those of kind hidden, got layers"):
                await client(Link(rtt=0.1), there, DRAFTS["mixture"]).generate(PROMPT, GREEDY)

    run(talk())
    with pytest.raises(TypeError, match="states must be a bool, or a draft that wants layers"):
        Server(TARGET, states=DRAFTS["eagle"])


def test_drafts_of_any_kind_are_loaded(tmp_path):
    for name, kind in (("eagle", drafts.Eagle), ("mixture", drafts.MixtureOfAttentions)):
        DRAFTS[name].save(tmp_path / name, TARGET)
        assert isinstance(drafts.load(tmp_path / name, TARGET), kind)
        with pytest.raises(ValueError, match="target must be given for a draft of kind"):
            drafts.load(tmp_path / name)
    drafts.Sorted(TARGET, (1, 2), (0.5, 0.0)).save(tmp_path / "sorted", TARGET)
    assert isinstance(drafts.load(tmp_path / "sorted"), drafts.Sorted)
    with pytest.raises(ValueError, match=r"folder must hold a draft\.json"):
        drafts.load(tmp_path)
    (tmp_path / "draft.json").write_text('{"draft": "other"}')
    with pytest.raises(
        ValueError, match="folder must hold a draft of kind sorted, eagle, mixture_of_attentions, got other"
    ):
        drafts.load(tmp_path)


def test_the_program_takes_a_folder(tmp_path):
    """Its server has the hash of the draft, so that a client with another one is refused."""
    assert server_program.parser().parse_args(["--model", "m"]).states is False
    assert server_program.parser().parse_args(["--model", "m", "--states"]).states is True
    assert server_program.parser().parse_args(["--model", "m", "--states", "f"]).states == "f"
