"""Decision models and rules that stop drafting, against float64 and against the rules written out."""

import itertools
import math

import pytest
import torch

from specdec_ops import AdaptiveThreshold, Confidence, entropy_stop, exit_confidence, exit_features, exit_mlp
from tests.early_exit.exit_cases import make_case

OP = "exit_mlp"
SHAPES = ((11, 44, 1), (768, 512, 256, 1), (2048, 1024, 512, 1), (5, 1), (67, 65, 130, 3, 1))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ISAS = ("generic", "avx2", "avx512", "avx512_bf16")


def make_model(sizes, dtype, seed=0):
    """Random layers whose scores spread over 0 to 1."""
    generator = torch.Generator().manual_seed(seed + sum(sizes))

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    layers = [
        ((normal(outputs, inputs) * (2 / inputs) ** 0.5).to(dtype), (normal(outputs) * 0.1).float())
        for inputs, outputs in itertools.pairwise(sizes)
    ]
    return layers, normal


def exact_scores(features, layers):
    """By loops over layers in float64, with numpy's idea of a product."""
    x = features.double().numpy()
    for index, (weight, bias) in enumerate(layers):
        x = x @ weight.double().numpy().T + bias.double().numpy()
        if index + 1 < len(layers):
            x = x * (x > 0)
    return torch.from_numpy(1 / (1 + math.e ** (-x[:, 0])))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SHAPES, ids=str)
def test_against_float64(target, dtype, sizes):
    layers, normal = make_model(sizes, dtype)
    layers = [(weight.to(target.device), bias.to(target.device)) for weight, bias in layers]
    for rows in (1, 7, 70) if sizes[0] < 100 else (1, 9):
        features = normal(rows, sizes[0]).to(dtype).to(target.device)
        score, stop = exit_mlp(features, layers, 0.4, backend=target.backend)
        exact = exact_scores(features.cpu(), [(w.cpu(), b.cpu()) for w, b in layers])
        bound = 1e-5 if dtype == torch.float32 else 2e-2  # pairs of bfloat16 round activations
        assert score.dtype == torch.float32
        assert (score.cpu() - exact).abs().max() <= bound
        assert stop.dtype == torch.bool
        assert stop.tolist() == [not bool((score > 0.4).any())]


def test_every_instruction_set(isa):
    for dtype in DTYPES:
        layers, normal = make_model((67, 65, 130, 1), dtype)
        for rows in (1, 3, 20):
            features = normal(rows, 67).to(dtype)
            score, _ = exit_mlp(features, layers, backend="cpu")
            bound = 1e-5 if dtype == torch.float32 else 2e-2
            assert (score - exact_scores(features, layers)).abs().max() <= bound


def test_any_row_goes_on(target):
    """One score above the threshold is enough, one that equals it is not, and a NaN is nobody's."""
    weight, bias = torch.tensor([[1.0]]), torch.tensor([0.0])
    layers = [(weight.to(target.device), bias.to(target.device))]

    def stops(values, threshold):
        features = torch.tensor(values, device=target.device)[:, None]
        return bool(exit_mlp(features, layers, threshold, backend=target.backend)[1])

    assert stops([-3.0, -2.0, -1.0], 0.5)
    assert not stops([-3.0, 2.0, -1.0], 0.5)
    assert stops([0.0, 0.0], 0.5)
    assert not stops([0.0, 0.0], 0.4)
    assert stops([float("nan"), -1.0], 0.5)
    assert not stops([float("nan"), 1.0], 0.5)
    assert not stops([200.0], 0.999) and stops([-200.0], 0.0)


def test_the_first_layers_activation_is_not_skipped(target):
    """A model that is |x| by two ReLUs, which no linear one can be."""
    layers = [
        (torch.tensor([[1.0], [-1.0]], device=target.device), torch.zeros(2, device=target.device)),
        (torch.tensor([[1.0, 1.0]], device=target.device), torch.tensor([-1.0], device=target.device)),
    ]
    features = torch.tensor([[-3.0], [-0.5], [0.5], [3.0]], device=target.device)
    score, _ = exit_mlp(features, layers, backend=target.backend)
    assert torch.allclose(score, torch.sigmoid(features[:, 0].abs() - 1))


def test_strides_no_rows_and_threads(target):
    layers, normal = make_model((768, 512, 256, 1), torch.bfloat16)
    layers = [(weight.to(target.device), bias.to(target.device)) for weight, bias in layers]
    wide = normal(6, 800).bfloat16().to(target.device)
    score, _ = exit_mlp(wide[:, 10:778], layers, backend=target.backend)
    assert torch.equal(score, exit_mlp(wide[:, 10:778].contiguous(), layers, backend=target.backend)[0])
    none, stop = exit_mlp(wide[:0, :768], layers, backend=target.backend)
    assert none.shape == (0,) and stop.tolist() == [True]
    if target.backend == "cpu":
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        alone, _ = exit_mlp(wide[:, 10:778], layers, backend="cpu")
        torch.set_num_threads(threads)
        assert torch.equal(alone, score)


def test_the_operator():
    layers, normal = make_model((11, 44, 1), torch.float32)
    weights, biases = [weight for weight, _ in layers], [bias for _, bias in layers]
    features = normal(3, 11).float()
    torch.library.opcheck(torch.ops.specdec_ops.exit_mlp.default, (features, weights, biases, 0.5, "cpu"))
    compiled = torch.compile(lambda x: exit_mlp(x, layers)[0], backend="eager")
    assert torch.equal(compiled(features), exit_mlp(features, layers)[0])


def test_errors():
    layers, normal = make_model((11, 44, 1), torch.float32)
    features = normal(3, 11).float()
    (weight, bias), last = layers
    for error, text, call in (
        (TypeError, "features must be float32", lambda: exit_mlp(features.int(), layers)),
        (ValueError, r"features must be \[rows, inputs\]", lambda: exit_mlp(features[0], layers)),
        (TypeError, "threshold must be a number", lambda: exit_mlp(features, layers, bias)),
        (ValueError, "layers must be 1 to 8 pairs, got 0", lambda: exit_mlp(features, [])),
        (TypeError, r"layers must be a sequence of \(weight", lambda: exit_mlp(features, [weight])),
        (ValueError, r"layers\[0\] weight must be .* \[1, 11\]", lambda: exit_mlp(features, [(weight, bias)])),
        (ValueError, r"layers\[1\] weight must be .* \[1, 44\]", lambda: exit_mlp(features, [(weight, bias)] * 2)),
        (
            ValueError,
            r"layers\[0\] bias must be float32 \[44\]",
            lambda: exit_mlp(features, [(weight, bias[1:]), last]),
        ),
        (TypeError, r"layers\[0\] bias must be", lambda: exit_mlp(features, [(weight, bias.double()), last])),
    ):
        with pytest.raises(error, match=f"specdec_ops.exit_mlp: {text}"):
            call()
    with pytest.raises(RuntimeError, match="requires grad"):
        exit_mlp(features, [(weight.clone().requires_grad_(), bias), last])


def test_features():
    case = make_case(6, 32, 200, torch.float32)
    case.hidden[2] = float("nan")
    confidence = case.run("torch", top_k=12)
    features = exit_features(confidence)
    p = torch.softmax(case.hidden.double() @ case.head.double().T, 1)
    sound = torch.tensor([0, 1, 3, 4, 5])
    assert features.shape == (6, 11)
    assert torch.allclose(features[sound, 0].double(), torch.special.entr(p).sum(1)[sound], atol=1e-5)
    assert torch.allclose(features[sound, 1:].double(), p[sound].topk(10, 1).values, atol=1e-5)
    assert features[2].tolist() == [0.0] * 11
    few = exit_features(make_case(2, 32, 4, torch.float32).run("torch", top_k=10))
    assert torch.equal(few[:, 5:], torch.zeros(2, 6))
    assert torch.allclose(few[:, 1:5].sum(1), torch.ones(2))
    with pytest.raises(ValueError, match="exit_features: confidence must be made with a top_k"):
        exit_features(case.run("torch", top_k=9))
    with pytest.raises(TypeError, match="exit_features: confidence must be a specdec_ops"):
        exit_features(features)
    assert isinstance(confidence, Confidence)


def test_entropy_stop():
    entropy = torch.tensor([0.0, 0.2, 1.25, 1.3, 5.0, 8.0])
    want = [1 - math.sqrt(0.2 * h) < 0.5 for h in entropy.tolist()]
    assert want == [False, False, False, True, True, True]
    assert entropy_stop(entropy, 0.5).tolist() == want
    assert entropy_stop(entropy, torch.full((6,), 0.5)).tolist() == want
    assert entropy_stop(entropy, -1.0).tolist() == [False] * 6
    assert entropy_stop(entropy, 0.5, gamma=0.0).tolist() == [False] * 6
    for error, text, call in (
        (TypeError, "entropy must be", lambda: entropy_stop(0.5, 0.5)),
        (ValueError, "entropy must be", lambda: entropy_stop(entropy[None], 0.5)),
        (ValueError, "threshold must be", lambda: entropy_stop(entropy, entropy[:2])),
        (ValueError, "gamma must be", lambda: entropy_stop(entropy, 0.5, gamma=-1)),
    ):
        with pytest.raises(error, match=f"specdec_ops.entropy_stop: {text}"):
            call()


def test_adaptive_threshold():
    """Against the rule of Draft & Verify, request by request."""
    generator = torch.Generator().manual_seed(2)
    requests, longest = 5, 8
    state = AdaptiveThreshold(requests)
    threshold, share = [0.5] * requests, [1.0] * requests
    moves = set()
    for _ in range(60):
        drafted = torch.randint(0, longest + 1, (requests,), generator=generator)
        accepted = (drafted * torch.rand(requests, generator=generator) ** 0.1).round().long()
        state.update(accepted, drafted, longest)
        for i, (a, d) in enumerate(zip(accepted.tolist(), drafted.tolist(), strict=True)):
            if d == 0:
                continue
            share[i] = 0.5 * share[i] + 0.5 * a / d
            if share[i] < 0.9:
                new = threshold[i] + 0.01
            elif d == longest:
                new = threshold[i]
            else:
                new = threshold[i] - 0.01
            moves.add(new > threshold[i] if new != threshold[i] else None)
            threshold[i] = 0.9 * threshold[i] + 0.1 * new
    assert moves == {True, False, None}
    assert torch.allclose(state.threshold, torch.tensor(threshold), atol=1e-5)
    assert torch.allclose(state.accepted_share, torch.tensor(share), atol=1e-5)


def test_adaptive_threshold_feeds_the_ops():
    case = make_case(5, 32, 100, torch.float32)
    state = AdaptiveThreshold(5)
    before = state.threshold
    after = state.update(torch.tensor([0, 1, 2, 3, 4]), torch.full((5,), 4), 8)
    assert after is before
    confidence = exit_confidence(case.hidden, case.head)
    assert entropy_stop(confidence.entropy, state.threshold).shape == (5,)
    assert torch.equal(case.decide("torch", state.threshold).exited, confidence.max_prob >= state.threshold)
    with pytest.raises(TypeError, match=r"AdaptiveThreshold.update: num_accepted must be int32 or int64 \[5\]"):
        state.update(torch.ones(5), torch.ones(5), 8)
    with pytest.raises(ValueError, match="AdaptiveThreshold: memory must be from 0 to 1"):
        AdaptiveThreshold(5, memory=2.0)
