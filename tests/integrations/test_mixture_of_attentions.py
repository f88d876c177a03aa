"""Mixture of Attentions for Hugging Face models of all families: text, rows, and training."""

import pytest
import torch

from specdec_ops.decode import Engine, Sampling
from specdec_ops.integrations.transformers import load
from specdec_ops.train import mixture_of_attentions as train
from specdec_ops.train.eagle import Teacher
from specdec_ops.train.mixture_of_attentions_net import masks, refresh_starts
from tests.decode.test_mixture_of_attentions import SIZES, row_of_network, watch
from tests.harness.tiny_models import mixture_net
from tests.integrations.hugging_face import MODELS, make, prompts


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("target_layers", [0, 1])
def test_rows_are_those_of_the_network(name, target_layers):
    model, (ids, mask) = make(name), prompts()
    target = load(model)
    net = mixture_net(target, target_layers)
    engine = Engine(target, net.draft(target, None, **SIZES), adapt=False)
    noted = watch(engine)
    texts = [row[seen.bool()].tolist() for row, seen in zip(ids, mask, strict=True)]
    results = engine.generate(texts, Sampling(max_tokens=8))
    for text, result in zip(texts, results, strict=True):
        assert (
            result.tokens
            == model.generate(torch.tensor([text]), do_sample=False, max_new_tokens=8)[0, len(text) :].tolist()
        )
    with torch.no_grad():
        for _, text, known, row in noted[::11]:
            want = row_of_network(net, text, known, target)
            assert (row.double() - want).abs().max() < 1e-3 * want.abs().max()


@pytest.mark.parametrize("name", MODELS)
def test_gradients_reach_all_weights(name):
    """Through the target's last layer, whatever it is made of, which itself stays as it is."""
    target = load(make(name))
    net = mixture_net(target, 1)
    tokens = torch.randint(6, 97, (2, 9), dtype=torch.int32)
    known = train.Beside(target, 1).run(tokens)
    seen = masks(torch.stack([refresh_starts(9, 2, 3), refresh_starts(9, 2, 4)]), torch.zeros(2, dtype=torch.bool))
    net(
        Teacher(target, None).embed(tokens), net.states(known.stacked), seen, known.stacked
    ).features.square().sum().backward()
    for name, parameter in net.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.isfinite().all() and parameter.grad.any(), name
        else:
            assert parameter.grad is None
