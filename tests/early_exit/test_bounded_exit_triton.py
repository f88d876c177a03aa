"""Early exit with bounds in Triton: launches, rows that are closed beside open ones, carried states, verdicts, biases.

The cases common to all backends are in test_bounded_exit.py.
"""

import importlib

import pytest
import torch

from specdec_ops import bound_head, early_exit, exit_confidence, quantize_head
from specdec_ops.ops.early_exit import reference_bounded_exit as reference
from tests.early_exit.exit_cases import count_launches

pytest.importorskip("triton")
import triton
import triton.language as tl
from specdec_ops.triton_kernels.early_exit import bounded_exit as bounded
from specdec_ops.triton_kernels.early_exit import bounded_kernels
from specdec_ops.triton_kernels.early_exit import exit_confidence as whole

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FIGURES = ("max_prob", "margin", "entropy", "logsumexp")
NAN, INFINITY = float("nan"), float("inf")
ENDS = (50, 117, 118, 250, 400)


def make(rows=6, dim=32, vocab=400, decay=10.0, scale=3.0):
    """A head whose rows become shorter, and hidden rows of which every second one is sure of an early entry."""
    generator = torch.Generator().manual_seed(rows + dim + vocab)
    head = torch.randn(vocab, dim, generator=generator) * torch.linspace(0, -decay, vocab).exp()[:, None]
    hidden = torch.randn(rows, dim, generator=generator)
    sure = torch.randint(vocab // 10, (rows,), generator=generator)
    hidden[::2] += head[sure[::2]] * torch.linspace(1, 5, len(hidden[::2]))[:, None]
    return (hidden * scale / dim**0.5).to(DEVICE), head.to(DEVICE)


def run(hidden, head, threshold=0.5, ends=ENDS, bounds=None, **options):
    return early_exit(hidden, head, threshold, bounds=bounds or bound_head(head, ends), backend="triton", **options)


def tensors_of(got):
    """Everything that is returned, by name."""
    both = {name: getattr(part, name) for part in (got, got.confidence) for name in part.__slots__}
    return {name: value for name, value in both.items() if isinstance(value, torch.Tensor)}


def assert_same(got, expected):
    for name, value in tensors_of(got).items():
        assert torch.equal(value, tensors_of(expected)[name]), name


@pytest.mark.parametrize("level", ["row", "any", "all"])
def test_launches_depend_on_shapes_alone(monkeypatch, level):
    grids = count_launches(monkeypatch, whole, bounded)
    found = []
    for sure in (0.0, 1.0, 30.0):
        hidden, head = make(3)
        grids.clear()
        found.append((run(hidden * sure, head, level=level).seen.tolist(), list(grids)))
    assert found[0][0] != found[2][0], "these were to close behind different parts"
    assert all(launched == found[0][1] for _, launched in found)
    assert [len(grid) for grid in found[0][1]] == [1, *[2, 1] * len(ENDS)]


def test_closed_rows_stay_as_they_are():
    """What is behind a closed row's part may be NaN, although open rows of the same block read it and are spoilt."""
    hidden, head = make()
    bounds = bound_head(head, ENDS)
    expected = run(hidden, head, bounds=bounds, top_k=3)
    closed = expected.seen <= ENDS[2]
    assert 0 < closed.sum() < len(hidden)
    spoilt = head.clone()
    spoilt[ENDS[2] :] = NAN
    got = run(hidden, spoilt, bounds=bounds, top_k=3)
    for name, value in tensors_of(got).items():
        if name not in ("active_rows", "inverse", "num_active"):
            assert torch.equal(value[closed], tensors_of(expected)[name][closed]), name
    assert (got.confidence.status[~closed] == 1).all() and not got.exited[~closed].any()


@pytest.mark.parametrize(
    ("level", "threshold", "rows"), [("any", 0.6, 65), ("any", 1.1, 5), ("all", 0.6, 65), ("all", 0.05, 5)]
)
def test_rows_that_close_together(level, threshold, rows):
    """One of 65 is in a block of its own. What they don't see may be NaN."""
    hidden, head = make(rows, 16, 120, decay=5)
    bounds = bound_head(head, (30, 60, 90, 120))
    got = run(hidden, head, threshold, bounds=bounds, level=level)
    seen = int(got.seen[0])
    assert (got.seen == seen).all() and seen < 120
    expected = early_exit(hidden, head, threshold, level=level, backend="torch")
    assert torch.equal(got.exited, expected.exited)
    definition = early_exit(hidden, head, threshold, level=level, bounds=bounds, backend="torch")
    assert torch.equal(got.seen, definition.seen)
    assert torch.equal(got.confidence.token[got.exited], expected.confidence.token[got.exited])
    spoilt = head.clone()
    spoilt[seen:] = NAN
    assert_same(run(hidden, spoilt, threshold, bounds=bounds, level=level), got)


@pytest.mark.parametrize("quantised", [False, True])
def test_figures_are_those_of_the_entries_that_were_seen(quantised):
    """Whatever the ends and however many of the greatest logits are carried from part to part."""
    hidden, head = make(3)
    head = quantize_head(head) if quantised else head
    generator = torch.Generator().manual_seed(1)
    bias = torch.randn(400, generator=generator).to(DEVICE)
    bias[::3] = -INFINITY
    temperature = (0.3 + torch.rand(3, generator=generator)).to(DEVICE)
    cases = (((1, 2, 3, 399, 400), 16), ((37, 400), 5), ((400,), 0), (tuple(range(385, 401)), 1))
    for ends, top_k in cases[:2] if quantised else cases[1:]:
        bounds = bound_head(head, ends)
        got = run(hidden, head, bounds=bounds, bias=bias, temperature=temperature, top_k=top_k)
        for row in range(3):
            seen = int(got.seen[row])
            assert seen in ends
            masked = torch.where(torch.arange(400, device=DEVICE) < seen, bias, -INFINITY)
            one = exit_confidence(
                hidden[row : row + 1], head, bias=masked, temperature=temperature[row : row + 1], top_k=top_k,
                backend="triton",
            )  # fmt: skip
            for name, value in tensors_of(got).items():
                if name in FIGURES or name == "top_logprobs":
                    torch.testing.assert_close(value[row], getattr(one, name)[0], rtol=1e-5, atol=1e-6)
                elif name in ("token", "top_tokens", "status"):
                    assert torch.equal(value[row], getattr(one, name)[0]), name


def test_a_row_alone():
    """Its result is the same bits without the others, and with others beside it."""
    hidden, head = make(7)
    thresholds = torch.linspace(0.2, 0.9, 7, device=DEVICE)
    together = tensors_of(run(hidden, head, thresholds, top_k=2))
    others = tensors_of(run(hidden.flip(0) * 5, head, 0.9, top_k=2))
    assert not torch.equal(together["seen"], others["seen"].flip(0))
    for row in (0, 3, 6):
        mixed = hidden.flip(0) * 5
        mixed[0] = hidden[row]
        limits = torch.full_like(thresholds, 0.9)
        limits[0] = thresholds[row]
        alone = tensors_of(run(hidden[row : row + 1], head, thresholds[row : row + 1], top_k=2))
        beside = tensors_of(run(mixed, head, limits, top_k=2))
        for name in ("token", "status", "exited", "seen", "top_tokens", "top_logprobs", *FIGURES):
            assert torch.equal(together[name][row], alone[name][0]), name
            assert torch.equal(together[name][row], beside[name][0]), name


def test_programs(monkeypatch):
    """One program for a part, or one for each tile."""
    hidden, head = make(3, vocab=900)
    bias = torch.linspace(0, 1, 900, device=DEVICE)
    found = []
    monkeypatch.setattr(whole, "processors", lambda device: 1)
    for programs in (1, 2, 16):
        monkeypatch.setattr(whole, "PROGRAMS_PER_PROCESSOR", programs)
        found.append(run(hidden, head, ends=(64, 450, 900), bias=bias, top_k=4))
    for got in found[1:]:
        for name, value in tensors_of(got).items():
            torch.testing.assert_close(value, tensors_of(found[0])[name], rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(DEVICE != "cpu", reason="a GPU has orders of its own")
@pytest.mark.parametrize("level", ["row", "any"])
def test_programs_may_come_in_any_order(monkeypatch, level):
    hidden, head = make(19, 16)
    grids = []

    def backwards(*ends):
        grids.append(ends)
        return range(*ends)[::-1]

    expected = run(hidden, head, 0.2, level=level, top_k=2)
    monkeypatch.setattr(importlib.import_module("triton.runtime.interpreter"), "range", backwards, raising=False)
    assert_same(run(hidden, head, 0.2, level=level, top_k=2), expected)
    assert grids


def test_the_worst_entry_that_the_bounds_allow():
    """Rows along the longest entry, which comes late, and an early one nearly as long."""
    generator = torch.Generator().manual_seed(0)
    cases = {torch.float32: ("max_prob", 0.45), torch.bfloat16: ("margin", 0.5), torch.float16: ("entropy", 0.7)}
    for dtype, (measure, threshold) in cases.items():
        head = torch.randn(200, 64, generator=generator) * 0.2
        hidden = torch.randn(1, 64, generator=generator).repeat(5, 1)
        head[170] = hidden[0] * 0.3
        head[3] = hidden[0] * 0.3 * 0.995
        hidden, head = (hidden * torch.tensor([0.1, 0.5, 1, 4, 100])[:, None]).to(DEVICE, dtype), head.to(DEVICE, dtype)
        expected = early_exit(hidden, head, threshold, measure=measure, backend="triton")
        got = run(hidden, head, threshold, ends=(100, 160, 200), measure=measure)
        assert 0 < got.exited.sum() < 5
        assert torch.equal(got.exited, expected.exited)
        assert torch.equal(got.confidence.token[got.exited], expected.confidence.token[got.exited])


@pytest.mark.parametrize(("position", "value"), [(700, NAN), (1211, 30.0), (1212, INFINITY), (1713, 30.0), (1999, NAN)])
def test_biases_behind_a_part(monkeypatch, position, value):
    """The greatest one is found in every program's share, and a NaN is no bias."""
    monkeypatch.setattr(whole, "processors", lambda device: 2)
    hidden, head = make(2, 16, 2000)
    bias = torch.full((2000,), -INFINITY, device=DEVICE)
    bias[:600] = 0
    options = {"ends": (600, 690, 2000), "top_k": 1}
    assert (run(hidden, head, bias=bias, **options).seen == 600).all()
    bias[position] = value
    got = run(hidden, head, bias=bias, **options)
    assert (got.seen == 2000).all()
    assert (got.confidence.status == (0 if value == 30.0 else 1)).all()
    if value == 30.0:
        assert (got.confidence.token == position).all()


@pytest.mark.parametrize(
    ("value", "bounding"), [(0.1, True), (NAN, False), (INFINITY, False), (1e18, True), (1e31, False)]
)
def test_lengths_that_bound_nothing(value, bounding):
    """NaN, infinity, and lengths with which a sum might overflow leave rows open, even at the greatest temperature."""
    hidden, head = make(2)
    bounds = bound_head(head, ENDS)
    bounds.norms_after.fill_(value)
    got = run(hidden, head, 2.0, bounds=bounds, temperature=1e20)
    assert ((got.seen < 400) == bounding).all()


@triton.jit
def verdict_kernel(numbers, out, left, rows, MEASURE: tl.constexpr, BLOCK: tl.constexpr):
    """For many rows at once; the numbers of each are [8, rows]."""
    row = tl.arange(0, BLOCK)
    at = numbers + row
    there = row < rows
    maximum = tl.load(at, mask=there, other=0.0).to(tl.float32)
    total = tl.load(at + rows, mask=there, other=1.0)
    moment = tl.load(at + rows * 2, mask=there, other=0.0)
    unsound = tl.load(at + rows * 3, mask=there, other=0.0).to(tl.float32)
    second = tl.load(at + rows * 4, mask=there, other=0.0).to(tl.float32)
    least = tl.load(at + rows * 5, mask=there, other=0.0).to(tl.float32)
    ceiling = tl.load(at + rows * 6, mask=there, other=0.0)
    limit = tl.load(at + rows * 7, mask=there, other=0.0)
    one = tl.full([], 1.0, tl.float64)
    bits = bounded_kernels.verdict(
        maximum, total, moment, unsound, second, least, ceiling, one * left, one, limit, MEASURE
    )
    tl.store(out + row, bits, mask=there)


@pytest.mark.parametrize("measure", ["max_prob", "margin", "entropy"])
@pytest.mark.parametrize("left", [1, 100_000])
def test_verdicts(measure, left):
    """Those of the definition, whose numbers come from the logits themselves."""
    generator = torch.Generator().manual_seed(left)
    rows, entries, returned = 400, 40, 3
    logits = torch.randn(rows, entries, generator=generator) * torch.logspace(-4, 1.5, rows)[:, None]
    logits[5:300:7, 3:] = -INFINITY
    logits[6:300:7, 1:] = -INFINITY
    logits[rows - 1] = -INFINITY
    logits = logits.double()
    best = logits.topk(returned, dim=1).values
    first = best[:, :1].nan_to_num(0, 0, 0)
    below = torch.where(logits > -INFINITY, logits - first, 0.0)
    weight = torch.where(logits > -INFINITY, below.exp(), 0.0)
    total, moment = weight.sum(1), (weight * below).sum(1)
    unsound = torch.zeros(rows, dtype=torch.bool)
    unsound[::50] = True
    ceiling = first[:, 0] + 30 * torch.randn(rows, generator=generator).double()
    ceiling[::3] = first[::3, 0] - 25 * torch.rand(len(ceiling[::3]), generator=generator)
    ceiling[1::9], ceiling[2::18], ceiling[3::54] = best[1::9, 2], first[2::18, 0], -INFINITY
    ceiling[4::54], ceiling[5::54], ceiling[7::54] = INFINITY, NAN, first[7::54, 0] + 601
    figure = {
        "max_prob": 1 / total, "margin": (1 - (best[:, 1] - first[:, 0]).exp()) / total,
        "entropy": total.log() - moment / total,
    }[measure]  # fmt: skip
    limit = (figure * (1 + torch.linspace(-1, 1, rows).pow(3)[torch.randperm(rows, generator=generator)])).float()
    limit[8::40] = NAN
    numbers = (best[:, 0], total, moment, unsound.double(), best[:, 1], best[:, 2], ceiling, limit.double())
    out = torch.empty(rows, dtype=torch.int32, device=DEVICE)
    verdict_kernel[(1,)](torch.stack(numbers).to(DEVICE), out, left, rows, MEASURE=measure, BLOCK=512)
    expected = torch.stack(reference.verdicts(logits, unsound, ceiling, left, measure, limit, returned), dim=1)
    got = torch.stack([out.cpu() & bit != 0 for bit in (1, 2, 4)], dim=1)
    assert torch.equal(got, expected), (got != expected).nonzero()
    assert (expected.sum(0) > 20).all() and (~expected).all(dim=1).any()
