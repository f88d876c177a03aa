"""Training of Mixture of Attentions: rows see what they see when they draft, gradients are right, and it learns."""

import pytest
import torch

from specdec_ops.drafts.mixture_of_attentions_parts import base_of
from specdec_ops.rope import Rope
from specdec_ops.train import mixture_of_attentions as train
from specdec_ops.train.mixture_of_attentions_net import Net, masks, refresh_starts
from tests.decode.mixture_reference import Reference
from tests.harness.tiny_models import make_decoder, mixture_net

TARGET = make_decoder(1, layers=3)


def restless(target, target_layers: int = 0, layer_inner: int | None = None) -> Net:
    return mixture_net(target, target_layers, layer_inner).double()


def known(target, tokens: torch.Tensor, target_layers: int = 0) -> train.Known:
    return train.Beside(target, target_layers, torch.float64).run(tokens)


def test_refresh_points_by_hand():
    assert refresh_starts(9, 3, 3).tolist() == [-1, 0, 1, 2, 3, 3, 3, 6, 6]  # refresh points are 0, 1, 2, 3 and 6
    assert refresh_starts(9, 0, 4, 1).tolist() == [-1, -1, 1, 1, 1, 1, 5, 5, 5]
    assert refresh_starts(5, 0, 1).tolist() == [-1, 0, 1, 2, 3]


def test_masks_by_hand():
    seen = masks(torch.tensor([[-1, 0, 0, 2]] * 2), torch.tensor([False, True]))
    verified = [[0, 0, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0], [1, 1, 1, 0]]
    drafted = [[1, 0, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 1]]
    causal = [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    assert seen.verified.int().tolist() == [verified] * 2
    assert seen.drafted.int().tolist() == [drafted] * 2
    assert seen.text.int().tolist() == [causal, drafted]


@pytest.mark.parametrize("layer_inner", [None, 0], ids=["layers attended", "layers averaged"])
def test_a_row_in_training_is_a_row_of_a_drafting_run(layer_inner):
    """Rounds are drafted one token at a time from what is verified then, of which nothing later is even there."""
    net, length, prompt = restless(TARGET, layer_inner=layer_inner), 17, 4
    tokens = torch.randint(40, (1, length), dtype=torch.int32, generator=torch.Generator().manual_seed(3))
    stacked = known(TARGET, tokens).stacked
    with torch.no_grad():
        states = net.states(stacked)
        for every, offset in ((3, 0), (5, 2), (1, 0)):
            starts = refresh_starts(length, prompt, every, offset)
            seen = masks(starts[None], torch.zeros(1, dtype=torch.bool))
            made = net(TARGET.embedding[tokens.long()].double(), states, seen).features[0]
            reference = Reference(net, TARGET)
            for row, start in enumerate(starts.tolist()):
                while len(reference.keys) < start + 1:
                    reference.verify(stacked[0, len(reference.keys)])
                want = reference.row(tokens[0, : row + 1].tolist(), start + 1)
                assert (made[row] - want).abs().max() < 1e-5  # the tables of cosines are float32


def test_gradients_of_all_weights():
    """Against differences, in float64, of the loss over rows and of every part."""
    target = make_decoder(2, layers=2)
    net = restless(target, target_layers=1)
    tokens = torch.randint(40, (2, 6), dtype=torch.int32)
    beside = known(target, tokens, 1)
    embedded = target.embedding[tokens.long()].double()
    wanted = torch.randn(2, 6, 32, dtype=torch.float64)
    seen = masks(torch.stack([refresh_starts(6, 1, 2), refresh_starts(6, 0, 3, 1)]), torch.tensor([False, True]))

    def loss() -> torch.Tensor:
        made = net(embedded, net.states(beside.stacked), seen, beside.stacked)
        return ((made.features - wanted).square() + made.crossed.sin()).sum()

    net.zero_grad()
    loss().backward()
    learned = {name: parameter for name, parameter in net.named_parameters() if parameter.requires_grad}
    assert len(learned) == 20 and not any(name.startswith("_last") for name in learned)
    for name, parameter in learned.items():
        direction = torch.randn_like(parameter)
        step = 1e-6
        with torch.no_grad():
            parameter += step * direction
            above = loss()
            parameter -= 2 * step * direction
            below = loss()
            parameter += step * direction
        expected = (above - below).item() / (2 * step)
        found = (parameter.grad * direction).sum().item()
        assert found == pytest.approx(expected, rel=2e-5, abs=1e-6), name


@pytest.mark.parametrize("scaling", [None, {"rope_type": "linear", "factor": 4.0}])
def test_the_base_of_a_rotation(scaling):
    assert base_of(Rope(5e5, 32, 64, scaling=scaling)) == 5e5
    assert base_of(None) == 1e4
