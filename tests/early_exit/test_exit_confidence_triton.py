"""The early exit kernels in Triton: launches, passes and parts that small calls don't have, and their roundings.

The cases common to all backends are in test_early_exit.py, test_screened_head.py, test_draft_stop.py and
test_kv_propagate.py.
"""

import importlib
import itertools

import pytest
import torch

from specdec_ops import early_exit, exit_confidence, exit_mlp, kv_propagate, quantize_head
from tests.early_exit.exit_cases import count_launches, make_case

pytest.importorskip("triton")
import triton
import triton.language as tl
from specdec_ops.triton_kernels.early_exit import exit_confidence as whole
from specdec_ops.triton_kernels.early_exit import exit_kernels, screened_exit
from specdec_ops.triton_kernels.early_exit import exit_mlp as mlp
from specdec_ops.triton_kernels.kv import kv_propagate as propagate

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FIGURES = ("max_prob", "margin", "entropy", "logsumexp")


@pytest.fixture
def launches(monkeypatch):
    """The grids of all launches so far."""
    return count_launches(monkeypatch, whole, screened_exit, mlp, propagate)


def decided(case, **options):
    return early_exit(case.hidden, case.head, 0.5, **case.options, **options, backend="triton")


def test_launches_depend_on_shapes_alone(launches):
    for rows, sure in ((1, 1.0), (3, 0.0)):
        case = make_case(rows, 32, 300, torch.float32).to(torch.float32, DEVICE)
        case.hidden *= sure  # rows of zeros fall back to the whole head
        launches.clear()
        decided(case)
        assert len(launches) == 3
        launches.clear()
        assert (decided(case, screen=quantize_head(case.head)).confidence.status == (0 if sure else 2)).all()
        assert len(launches) == 4


@pytest.mark.parametrize(("sizes", "grids"), [((11, 44, 1), [(1, 1)]), ((9, 1), [(1,)]), ((200, 150, 70, 1), 2)])
def test_launches_of_a_decision_model(launches, sizes, grids):
    layers = [(torch.ones(o, i, device=DEVICE), torch.ones(o, device=DEVICE)) for i, o in itertools.pairwise(sizes)]
    exit_mlp(torch.ones(5, sizes[0], device=DEVICE), layers, backend="triton")
    assert launches == grids or len(launches) == grids


def test_a_launch_for_each_layer(launches):
    layers = [(None, torch.ones(32, 20, device=DEVICE), torch.ones(32, 20, device=DEVICE))] * 3
    caches = [torch.zeros(1, 4, 2, 16, device=DEVICE) for _ in range(6)]
    ids = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    kv_propagate(
        torch.ones(1, 20, device=DEVICE), layers, ids, ids, caches[:3], caches[3:], rope=None, backend="triton"
    )
    assert len(launches) == 3


def test_rows_in_passes(launches, monkeypatch):
    """Where the scratch for all rows would be too large; the decision is about all of them."""
    case = make_case(5, 32, 300, torch.bfloat16, temperatures=True).to(torch.bfloat16, DEVICE)
    case.hidden[3] = 0  # falls back
    screen = quantize_head(case.head)
    for level in ("row", "any"):
        options = {"screen": screen, "level": level, "top_k": 3}
        once = decided(case, **options)
        launches.clear()
        with monkeypatch.context() as patch:
            patch.setattr(screened_exit, "SCRATCH_BYTES", 0)
            patch.setattr(screened_exit, "LEAST_ROWS", 2)
            again = decided(case, **options)
        assert len(launches) == 3 * 4
        for name in ("exited", "active_rows", "inverse", "num_active"):
            assert torch.equal(getattr(again, name), getattr(once, name)), name
        for name in (*FIGURES, "token", "top_tokens", "top_logprobs", "status", "rechecked"):
            assert torch.equal(getattr(again.confidence, name), getattr(once.confidence, name)), name


def test_parts_and_programs(monkeypatch):
    """A vocabulary in many parts, seen by one program or by many."""
    case = make_case(3, 32, 1000, torch.float32, norm=True, bias=True).to(torch.float32, DEVICE)
    screen = quantize_head(case.head)
    usual, exact = decided(case, screen=screen, top_k=5).confidence, case.exact(top_k=5)
    for chunk, programs in ((128, 1), (256, 16)):
        monkeypatch.setattr(screened_exit, "LEAST_CHUNK", chunk)
        monkeypatch.setattr(whole, "PROGRAMS_PER_PROCESSOR", programs)
        for got in (decided(case, screen=screen, top_k=5).confidence, decided(case, top_k=5).confidence):
            assert torch.equal(got.top_tokens, exact.top_tokens)
            assert (got.status == 0).all()
            for name in FIGURES:
                torch.testing.assert_close(getattr(got, name), getattr(usual, name), rtol=1e-2, atol=1e-2)
            if got.rechecked is not None:
                assert torch.equal(got.rechecked, usual.rechecked)


@pytest.mark.skipif(DEVICE != "cpu", reason="a GPU has orders of its own")
def test_programs_may_come_in_any_order(monkeypatch):
    """Whoever arrives last merges, answers and decides; lists that are filled in another order change no bit."""
    case = make_case(4, 32, 700, torch.bfloat16, norm=True).to(torch.bfloat16, DEVICE)
    case.hidden[2] = 0  # falls back
    screen = quantize_head(case.head)
    model = [(torch.randn(o, i), torch.randn(o)) for i, o in itertools.pairwise((40, 300, 1))]
    monkeypatch.setattr(screened_exit, "LEAST_CHUNK", 128)

    def results():
        found = []
        for level, options in itertools.product(("row", "any"), ({}, {"screen": screen})):
            made = decided(case, level=level, top_k=4, **options)
            found += [getattr(part, name) for part in (made, made.confidence) for name in part.__slots__]
        found += exit_mlp(case.hidden.repeat(10, 2)[:, :40], model, backend="triton")
        return [tensor for tensor in found if isinstance(tensor, torch.Tensor)]

    grids = []

    def backwards(*ends):
        grids.append(ends)
        return range(*ends)[::-1]

    expected = results()
    monkeypatch.setattr(importlib.import_module("triton.runtime.interpreter"), "range", backwards, raising=False)
    got = results()
    assert grids
    assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))


def honest(screen, head):
    """Make the bounds of a screen true after its values have changed."""
    approximation = screen.scales.double()[:, None] * screen.values.double()
    error = head.double() - approximation
    screen.error_norms.copy_(error.norm(dim=1) * 1.001)
    screen.norms.copy_(approximation.norm(dim=1) * 1.001)
    screen.error_gain.fill_(float(torch.linalg.matrix_norm(error, 2)) * 1.001)
    return screen


def test_a_worse_screen_changes_nothing():
    """Bounds that are honest, however wide, cost time and no result; without them results are wrong."""
    case = make_case(5, 64, 600, torch.bfloat16).to(torch.bfloat16, DEVICE)
    whole = decided(case, top_k=3)
    least = decided(case, top_k=3, screen=quantize_head(case.head)).confidence.rechecked
    for noise in (6, 40):
        screen = quantize_head(case.head)
        change = torch.randint(-noise, noise + 1, screen.values.shape).to(DEVICE)
        screen.values.copy_((screen.values + change).clamp(-127, 127))
        got = decided(case, top_k=3, screen=honest(screen, case.head))
        assert torch.equal(got.exited, whole.exited)
        assert torch.equal(got.confidence.top_tokens, whole.confidence.top_tokens)
        assert (got.confidence.rechecked > least).any()
    screen.error_norms.zero_()
    screen.error_gain.zero_()
    assert not torch.equal(decided(case, screen=screen, tolerance=1.0).confidence.token, whole.confidence.token)


@pytest.mark.parametrize("praised", [False, True])
def test_copies_that_lie_and_say_so(praised):
    """The best entries look worst, or the worst look best: bounds tell what may be the best."""
    case = make_case(12, 64, 600, torch.bfloat16).to(torch.bfloat16, DEVICE)
    case.hidden = case.hidden[1::2] * 2
    exact = case.exact(top_k=1)
    lying = exact.token.long()
    if praised:
        lying = (case.hidden.float() @ case.head.float().T).topk(3, largest=False).indices.flatten().unique()
    screen = quantize_head(case.head)
    screen.scales[lying] *= -2 if praised else -1
    got = exit_confidence(case.hidden, case.head, screen=honest(screen, case.head), tolerance=1.0, backend="triton")
    assert torch.equal(got.token, exact.token)
    assert (got.rechecked < 300).any()


@triton.jit
def convert_kernel(x, out, WIDEN: tl.constexpr, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    tl.store(out + lane, exit_kernels.narrowed(tl.load(x + lane), out.dtype.element_ty, WIDEN))


@triton.jit
def order_kernel(x, entries, out, values, back, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    order = exit_kernels.order_of(tl.load(x + lane), tl.load(entries + lane))
    tl.store(out + lane, order)
    tl.store(values + lane, exit_kernels.value_of(order))
    tl.store(back + lane, exit_kernels.entry_of(order))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounding_is_to_nearest_even(dtype):
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), 1 + 2**-8, 1 + 3 * 2**-8, 1e-40, 3.3e38])
    x = torch.cat([special, torch.randn(1016) * 10 ** torch.linspace(-4, 4, 1016)]).to(DEVICE)
    out = torch.empty(1024, dtype=dtype, device=DEVICE)
    convert_kernel[(1,)](x, out, WIDEN=DEVICE == "cpu", BLOCK=1024)
    assert torch.equal(out, x.to(dtype))
    convert_kernel[(1,)](x * float("nan"), out, WIDEN=DEVICE == "cpu", BLOCK=1024)
    assert out.isnan().all()


def test_orders():
    """By value, then by the lower entry; zeros of both signs are equal."""
    values = [float("inf"), 3e38, 1.0, 1.0, 1e-40, 0.0, -0.0, 0.0, -1e-40, -1.0, -3e38, -3e38, float("-inf")]
    entries = [5, 1, 7, 2**31 - 2, 3, 2, 4, 9, 0, 6, 10, 11, 8]
    x = torch.tensor([*values, *[0.0] * 3], device=DEVICE)
    ids = torch.tensor([*entries, 0, 0, 0], dtype=torch.int32, device=DEVICE)
    out, back = torch.empty(16, dtype=torch.int64, device=DEVICE), torch.empty_like(ids)
    again = torch.empty_like(x)
    order_kernel[(1,)](x, ids, out, again, back, BLOCK=16)
    assert out[:13].tolist() == sorted(out[:13].tolist(), reverse=True)
    assert len(set(out[:13].tolist())) == 13
    assert torch.equal(again, x) and torch.equal(back, ids)
