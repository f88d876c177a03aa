"""What stops a draft: measures by their definitions, the same bits in every batch, networks saved and found again."""

import dataclasses
import itertools
import json

import pytest
import torch

from specdec_ops import drafts, exit_confidence, exit_features
from specdec_ops.drafts import stop
from tests.decode.test_engine import DRAFT, TARGET
from tests.harness.tiny_models import make_decoder

HIDDEN = torch.zeros(0)


def rows(count: int, vocab: int, seed: int = 0) -> torch.Tensor:
    return 6 * torch.randn(count, vocab, generator=torch.Generator().manual_seed(seed))


def network(inputs: int, inner: int = 44, seed: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    sizes = (inputs, inner, 1)
    return [
        (torch.randn(out, size, generator=generator) / size**0.5, torch.randn(out, generator=generator))
        for size, out in itertools.pairwise(sizes)
    ]


@pytest.mark.parametrize("vocab", [11, 64, 1000, 4097])
def test_measures_are_their_definitions(vocab):
    logits = rows(9, vocab)
    law = logits.double().softmax(-1)
    best = law.sort(dim=-1, descending=True).values
    entropy = torch.special.entr(law).sum(-1)
    assert torch.allclose(stop.entropy(logits).double(), entropy, atol=1e-5)
    assert torch.allclose(stop.top_probabilities(logits, 10).double(), best[:, :10], atol=1e-6)
    measures = {"probability": best[:, 0], "margin": best[:, 0] - best[:, 1]}
    measures["entropy_bound"] = 1 - (0.2 * entropy).sqrt()
    for name, value in measures.items():
        threshold = float(value.median()) + 1e-4
        found = drafts.StopBelow(name, threshold).goes_on(logits, HIDDEN, DRAFT)
        assert torch.equal(found, value >= threshold) and 0 < int(found.sum()) < 9


def test_features_are_those_of_exit_features():
    """Which the network gets that has no logits to read them from."""
    hidden, head = torch.randn(7, 32), torch.randn(50, 32)
    expected = exit_features(exit_confidence(hidden, head, top_k=10))
    assert torch.allclose(stop.confidence(hidden @ head.T), expected, atol=1e-5)


def test_rows_without_many_tokens():
    logits = torch.full((2, 20), -torch.inf)
    logits[0, 3], logits[1, 5], logits[1, 7] = 1.0, 2.0, 2.0
    assert torch.equal(stop.top_probabilities(logits, 3), torch.tensor([[1.0, 0, 0], [0.5, 0.5, 0]]))
    assert torch.allclose(stop.entropy(logits), torch.tensor([0.0, 0.5]).mul(2).mul(torch.tensor(2.0).log()))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("vocab", [37, 49152])
def test_a_row_has_the_same_bits_in_every_batch(vocab, threads):
    """Texts would depend on batching otherwise: a measure next to its threshold would fall on either side."""
    logits, layers = rows(9, vocab), network(11)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        together = stop.confidence(logits)
        decision = drafts.Decision(layers)
        wants = decision.goes_on(logits, HIDDEN, DRAFT)
        for first, last in ((0, 1), (3, 4), (2, 7), (8, 9), (1, 9)):
            part = logits[first:last].clone()
            assert torch.equal(stop.confidence(part), together[first:last])
            assert torch.equal(decision.goes_on(part, HIDDEN, DRAFT), wants[first:last])
    finally:
        torch.set_num_threads(before)


def test_a_decision_is_its_network():
    logits, hidden = rows(12, 40), torch.randn(12, DRAFT.shape.dim)
    for features, read in (("confidence", stop.confidence(logits)), ("hidden", DRAFT.norm(hidden))):
        layers = network(read.shape[1])
        (w1, b1), (w2, b2) = layers
        score = torch.sigmoid((read @ w1.T + b1).relu() @ w2.T + b2)[:, 0]
        threshold = float(score.median()) + 1e-4
        decision = drafts.Decision(layers, features, threshold)
        decision.check(DRAFT)
        assert torch.equal(decision.goes_on(logits, hidden, DRAFT), score > threshold)


@pytest.mark.parametrize("features", ["confidence", "hidden"])
def test_saved_decisions_are_found_again(tmp_path, features):
    model = dataclasses.replace(DRAFT, name="somewhere/tiny")
    decision = drafts.Decision(network(11 if features == "confidence" else DRAFT.shape.dim), features, 0.3)
    decision.save(tmp_path, model, {"command": "python -m specdec_ops.train.decision"})
    again = drafts.Decision.load(tmp_path, model)
    assert (again.features, again.threshold) == (features, 0.3)
    assert drafts.Decision.load(tmp_path, model, threshold=0.7).threshold == 0.7
    logits, hidden = rows(12, 40), torch.randn(12, DRAFT.shape.dim)
    assert torch.equal(again.goes_on(logits, hidden, model), decision.goes_on(logits, hidden, model))
    said = json.loads((tmp_path / "draft.json").read_text())
    assert said["draft"] == "decision" and said["command"].endswith("decision")
    with pytest.raises(ValueError, match="must be tiny, for which the draft was trained"):
        drafts.Decision.load(tmp_path, TARGET)  # another model: more layers
    with pytest.raises(ValueError, match="must hold a draft of kind eagle, got decision"):
        drafts.Eagle.load(tmp_path, model)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: drafts.StopBelow("surprise", 1.0), ValueError, "measure must be 'probability', 'margin' or"),
        (lambda: drafts.StopBelow("margin", "1"), TypeError, "threshold must be a number"),
        (lambda: drafts.Decision(network(11), "logits"), ValueError, "features must be 'confidence' or 'hidden'"),
        (lambda: drafts.Decision(network(11), threshold=None), TypeError, "threshold must be a number"),
        (lambda: drafts.Decision(network(12)), ValueError, "layers must be of 11 inputs for features 'confidence'"),
        (lambda: drafts.Decision(network(12), "hidden").check(DRAFT), ValueError, "layers must be of 32 inputs"),
        (lambda: drafts.Decision(network(32), "hidden").check(object()), TypeError, "model must be a specdec_ops"),
        (lambda: drafts.Decision([]), ValueError, "layers must be 1 to 8 pairs"),
    ],
    ids=range(8),
)
def test_arguments_are_checked(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_networks_read_other_models_alike():
    """The confidence of a row says nothing of the model's sizes."""
    drafts.Decision(network(11)).check(make_decoder(5, layers=1))
