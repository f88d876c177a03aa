"""Temperatures and thresholds of hidden rows that come from the device: each means one thing, on every backend.

`exit_confidence` and `early_exit` document what. Here a row with an odd temperature must come out, bit for bit, as with
the one that it counts as, or as an invalid row; and decide as its own figures and the definition say.
"""

import math

import numpy as np
import pytest
import torch

from specdec_ops import (
    AdaptiveThreshold,
    ExitStatus,
    bound_head,
    early_exit,
    entropy_stop,
    exit_confidence,
    exit_mlp,
    quantize_head,
)

OP = "exit_confidence"
INTERPRETED_SHARE = 2
INF, NAN = float("inf"), float("nan")
LEAST, MOST = np.float32(1e-20), np.float32(1e20)
TEMPERATURES = [NAN, -NAN, -1.0, -INF, -1e-45, -0.0, 0.0, 1e-45, 1e-21, 1e-20, 0.1, 1.0, 9.0, 1e19, 1e20, 3e38, INF]
THRESHOLDS = [NAN, -INF, -1.0, 0.31, 0.97, 3.1, 1e30, INF]
FORMS = ("whole", "int8", "screened", "bounded")
MEASURES = ("max_prob", "margin", "entropy")
FIGURES = ("token", "max_prob", "margin", "entropy", "logsumexp", "top_tokens", "top_logprobs")
ROWS, DIM, VOCAB, TOP_K = 17, 32, 300, 3
ENDS = (40, 100, 200, VOCAB)  # of what is read at a time, with bounds
pytestmark = pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning", "ignore:invalid:RuntimeWarning")


def counted(given):
    """What temperatures count as, and which are none: NumPy float32 in, tensors out."""
    none = ~(given >= 0)
    kept = np.where(none, np.float32(1), np.clip(given, LEAST, MOST))
    return torch.from_numpy(kept.astype(np.float32)), torch.from_numpy(none)


def table(seed, rows=ROWS):
    """All temperatures, or `rows` that cover them, with thresholds of all kinds."""
    rng = torch.Generator().manual_seed(seed)
    thresholds = torch.tensor(THRESHOLDS * 3)[torch.randperm(3 * len(THRESHOLDS), generator=rng)[:rows]]
    return torch.tensor(TEMPERATURES)[torch.linspace(0, ROWS - 1, rows).round().long()], thresholds


def random_bits(seed, rows=ROWS):
    """Every second row is an ordinary one."""
    rng = np.random.default_rng(seed)
    bits = rng.integers(-(2**31), 2**31, (2, rows), dtype=np.int64).astype(np.int32).view(np.float32)
    bits[:, 1::2] = np.array([[1.3], [0.4]], np.float32)
    return tuple(torch.from_numpy(row.copy()) for row in bits)


def inputs(seed):
    """Hidden rows from unsure to sure; some entries are masked by the bias."""
    rng = torch.Generator().manual_seed(seed)
    head = torch.randn(VOCAB, DIM, generator=rng) * torch.linspace(1.5, 0.1, VOCAB)[:, None]  # so that bounds tell
    rows = torch.randn(ROWS, DIM, generator=rng) * torch.linspace(0.05, 1.5, ROWS)[:, None]
    bias = torch.randn(VOCAB, generator=rng)
    bias[::7] = -INF
    return rows, head, bias


def decide(form, backend, device, seed, temperature, threshold, measure, level="row"):
    """early_exit in one of its forms, on the CPU."""
    rows, head, bias = (tensor.to(device) for tensor in inputs(seed))
    rows = rows[: len(threshold)]
    options = {"screen": quantize_head(head)} if form == "screened" else {}
    if form == "bounded":
        options["bounds"] = bound_head(head, ENDS)
    got = early_exit(
        rows,
        quantize_head(head) if form == "int8" else head,
        threshold.to(device),
        measure=measure,
        level=level,
        bias=bias,
        temperature=temperature.to(device),
        top_k=TOP_K,
        backend=backend,
        **options,
    )
    names = {name: getattr(got.confidence, name).cpu() for name in (*FIGURES, "status")}
    names["status"] = names["status"] & ~ExitStatus.FELL_BACK
    return names | {"exited": got.exited.cpu(), "inverse": got.inverse.cpu(), "num_active": got.num_active.cpu()}


def passes(figure, threshold, measure):
    return figure <= threshold if measure == "entropy" else figure >= threshold


@pytest.mark.parametrize("make", [table, random_bits], ids=["table", "fuzz"])
@pytest.mark.parametrize("form", FORMS)
def test_early_exit(form, make, target):
    """As with what the odd temperatures count as; by its own figures; and as the definition."""
    few = target.interpreted
    for seed, measure in enumerate(MEASURES[FORMS.index(form) % 3 :][:1] if few else MEASURES):
        temperature, threshold = make(seed, 7 if few else ROWS)
        got = decide(form, *target, seed, temperature, threshold, measure)
        kept, none = counted(temperature.numpy())
        same = decide(form, *target, seed, kept, threshold, measure)
        for name in FIGURES:
            assert torch.equal(got[name][~none], same[name][~none]), f"{measure}: {name}"
        assert torch.equal(got["status"], torch.where(none, ExitStatus.SETTING_INVALID, 0).int())
        empty = {"max_prob": 0, "margin": 0, "entropy": 0, "logsumexp": -INF, "top_tokens": -1, "top_logprobs": -INF}
        for name, value in empty.items():
            assert (got[name][none] == value).all(), f"{measure}: {name}"
        if form != "bounded":  # there a row without a temperature is settled before the head is read
            assert torch.equal(got["token"], same["token"])
        assert all(torch.isfinite(got[name]).all() for name in ("max_prob", "margin", "entropy"))
        assert ((got["token"] >= 0) & (got["token"] < VOCAB)).all()
        if form != "bounded":
            assert torch.equal(got["exited"], passes(got[measure], threshold, measure) & ~none)
        want = decide(form, "torch", "cpu", seed, temperature, threshold, measure)
        exact = want[measure]
        clear = (exact - threshold).abs() > 1e-4 * (1 + exact)
        sure = clear | ~torch.isfinite(threshold) | none
        assert torch.equal(got["exited"][sure], want["exited"][sure])
        assert torch.equal(got["status"], want["status"])
        if form in ("whole", "int8"):
            assert torch.equal(got["token"], want["token"])
            for name in ("max_prob", "margin", "entropy", "logsumexp"):
                torch.testing.assert_close(got[name], want[name], rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("level", ["any", "all"])
@pytest.mark.parametrize("form", FORMS)
def test_levels(form, level, target):
    """A row without a temperature, or with a threshold of NaN, passes for nobody: it never makes all of them exit."""
    rows = 5 if target.interpreted else ROWS
    temperature, threshold = torch.full((rows,), 0.5), torch.full((rows,), -INF)
    for odd in ("temperature",) if target.interpreted else (None, "temperature", "threshold"):
        if odd == "temperature":
            temperature[3] = NAN
        if odd == "threshold":
            temperature[3], threshold[4] = 0.5, NAN
        got = decide(form, *target, 1, temperature, threshold, "max_prob", level)
        assert got["exited"].tolist() == [level == "any" or odd is None] * rows
    never = decide(form, *target, 1, torch.full((rows,), NAN), threshold, "margin", level)
    assert (not never["exited"].any(), never["num_active"].item()) == (True, rows)


def test_neighbours_are_untouched(target):
    """A row between odd ones is what it is alone, bit for bit."""
    rows = 6 if target.interpreted else ROWS
    for form in FORMS[::2] if target.interpreted else FORMS:
        temperature, threshold = random_bits(7, rows)
        got = decide(form, *target, 2, temperature, threshold, "max_prob")
        ordinary = [torch.full((rows,), float(values[1])) for values in (temperature, threshold)]
        alone = decide(form, *target, 2, *ordinary, "max_prob")
        for name in (*FIGURES, "status", "exited"):
            assert torch.equal(got[name][1::2], alone[name][1::2]), f"{form}: {name}"


def test_the_ends_of_temperature(target):
    """Infinity knows nothing but what is masked; 0 is sure, of equals alike."""
    logits = torch.tensor([[3.0, 1.0, 3.0, -1.0, 2.0], [5.0, 1.0, 3.0, -1.0, 2.0]])
    head, rows = torch.eye(16)[:5].contiguous(), torch.zeros(2, 16)
    rows[:, :5] = logits
    bias = torch.tensor([0.0, 0, 0, 0, -INF])
    where = {"bias": bias.to(target.device), "backend": target.backend}
    rows, head = rows.to(target.device), head.to(target.device)
    flat = exit_confidence(rows, head, temperature=torch.full((2,), INF, device=target.device), **where)
    torch.testing.assert_close(flat.max_prob.cpu(), torch.full((2,), 0.25))
    torch.testing.assert_close(flat.entropy.cpu(), torch.full((2,), math.log(4)))
    assert flat.token.tolist() == [0, 0]
    sure = exit_confidence(rows, head, temperature=torch.zeros(2, device=target.device), **where)
    assert sure.max_prob.tolist() == [0.5, 1.0]
    assert sure.margin.tolist() == [0.0, 1.0]
    assert flat.status.tolist() == sure.status.tolist() == [0, 0]


NUMBERS = [
    ("temperature", NAN, "a finite number above 0, got nan"),
    ("temperature", INF, "a finite number above 0, got inf"),
    ("temperature", 0, "a finite number above 0, got 0"),
    ("temperature", -1.0, "a finite number above 0, got -1.0"),
    ("temperature", 10**400, "a finite number above 0, got 1000"),
    ("norm_eps", NAN, "a finite number of at least 0, got nan"),
    ("norm_eps", INF, "a finite number of at least 0, got inf"),
    ("tolerance", NAN, "a number of at least 0.001, got nan"),
]


@pytest.mark.parametrize(("name", "value", "message"), NUMBERS, ids=lambda value: str(value)[:12])
def test_numbers_without_a_meaning_are_refused(name, value, message):
    """Where Python can see them."""
    with pytest.raises(ValueError, match=f"specdec_ops.exit_confidence: {name} must be {message}"):
        exit_confidence(torch.zeros(1, 4), torch.zeros(5, 4), **{name: value})


def test_other_numbers_without_a_meaning_are_refused():
    """Of the ops around it."""
    rows, head = torch.zeros(1, 4), torch.zeros(5, 4)
    with pytest.raises(ValueError, match="early_exit: threshold must be a number, not NaN, got nan"):
        early_exit(rows, head, NAN)
    model = [(torch.zeros(1, 4), torch.zeros(1))]
    with pytest.raises(ValueError, match="exit_mlp: threshold must be a number, not NaN, got nan"):
        exit_mlp(rows, model, NAN)
    with pytest.raises(ValueError, match="entropy_stop: gamma must be a finite number of at least 0, got nan"):
        entropy_stop(torch.zeros(1), 0.5, gamma=NAN)
    with pytest.raises(ValueError, match="entropy_stop: threshold must be a number, not NaN, got nan"):
        entropy_stop(torch.zeros(1), NAN)
    assert entropy_stop(torch.tensor([0.0, NAN, 9.0]), torch.tensor([NAN, 0.5, INF])).tolist() == [False, False, True]
    for name in ("start", "target", "step"):
        with pytest.raises(ValueError, match=f"AdaptiveThreshold: {name} must be a finite number, got inf"):
            AdaptiveThreshold(1, **{name: INF})
    assert early_exit(rows, head, -(10**400)).exited.tolist() == [True]
    assert early_exit(rows, head, 10**400).exited.tolist() == [False]
    assert early_exit(rows, head, INF, measure="entropy").exited.tolist() == [True]


def test_decision_models_never_go_on_for_nothing(target):
    """A threshold of infinity stops always, one of minus infinity never but for NaN."""
    backend = "auto" if target.backend == "cuda-emulated" else target.backend
    features = torch.tensor([[0.3, 1.0, -2.0, 0.5], [NAN, 1.0, 1.0, 1.0]], device=target.device)
    model = [(torch.ones(1, 4, device=target.device), torch.zeros(1, device=target.device))]
    for rows, threshold, stops in ((1, INF, True), (1, -INF, False), (2, 1e300, True), (2, -1e300, False)):
        assert exit_mlp(features[:rows], model, threshold, backend=backend)[1].item() is stops
    assert exit_mlp(features[1:], model, -INF, backend=backend)[1].item() is True
