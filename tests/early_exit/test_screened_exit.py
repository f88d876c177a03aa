"""Screened heads: token, figures and decisions are the whole head's, whatever the head."""

import subprocess

import pytest
import torch

from specdec_ops import VocabMap, early_exit, exit_confidence, quantize_head
from specdec_ops.ops.early_exit import quantized_head
from specdec_ops.status import ExitStatus
from tests.early_exit.adversarial_heads import (
    ADVERSARIAL,
    all_equal,
    duplicated_rows,
    huge_norms,
    near_ties,
    outliers,
    tiny_numbers,
    zero_rows,
)
from tests.early_exit.exit_cases import ExitCase, make_case, many_rows
from tests.emulator import build

OP = "screened_exit"
INTERPRETED_SHARE, EMULATED_SHARE = 11, 3
INTERPRETED_ROWS = 4  # up to half a second each
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ISAS = ("generic", "avx2", "avx512", "avx512_bf16")
THRESHOLDS = {"max_prob": 0.6, "margin": 0.4, "entropy": 2.0}


pytestmark = pytest.mark.usefixtures("one_thread")  # these heads are too small to share


def assert_same(case: ExitCase, backend: str, measure="max_prob", threshold=None, top_k=0, tolerance=0.01, **options):
    """The screened form against the same backend's whole head. Returns the screened Confidence."""
    threshold = THRESHOLDS[measure] if threshold is None else threshold
    if backend == "triton" and not case.hidden.is_cuda:
        case = case.first(INTERPRETED_ROWS)
        threshold = threshold[:INTERPRETED_ROWS] if isinstance(threshold, torch.Tensor) else threshold
    whole = case.decide(backend, threshold, measure=measure, top_k=top_k, **options)
    screened = case.decide(
        backend,
        threshold,
        measure=measure,
        top_k=top_k,
        screen=quantize_head(case.head),
        tolerance=tolerance,
        **options,
    )
    got, want = screened.confidence, whole.confidence
    assert torch.equal(got.token, want.token)
    assert torch.equal(screened.exited, whole.exited)
    assert torch.equal(screened.active_rows, whole.active_rows)
    assert torch.equal(screened.inverse, whole.inverse)
    assert torch.equal(screened.num_active, whole.num_active)
    assert torch.equal(got.status & ExitStatus.INVALID, want.status)
    assert (got.max_prob - want.max_prob).abs().max() <= tolerance
    assert (got.margin - want.margin).abs().max() <= tolerance
    sound = want.status == 0
    if sound.any():
        # max_prob off by tolerance is a factor of 1 + tolerance / max_prob; the estimate cannot be worse than that.
        least = (want.max_prob[sound] - tolerance).clamp_min(1e-6)
        off = (got.logsumexp - want.logsumexp)[sound].abs()
        assert (off <= tolerance / least + 1e-3).all()
    if top_k:
        assert torch.equal(got.top_tokens, want.top_tokens)
        finite = want.top_logprobs.isfinite()
        assert torch.equal(got.top_logprobs.isfinite(), finite)
    vocab = case.head.shape[0]
    assert (got.rechecked >= 1).all()
    fell = (got.status & ExitStatus.FELL_BACK) != 0
    assert (got.rechecked[fell] == vocab).all()
    for name in ("max_prob", "margin", "entropy", "logsumexp"):  # those rows are the whole head's very numbers
        assert torch.equal(getattr(got, name)[fell], getattr(want, name)[fell])
    return got


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("measure", list(THRESHOLDS))
def test_against_the_whole_head(target, dtype, measure):
    largest = (67, 128, 4097) if target.backend != "cuda-emulated" else (35, 80, 2100)
    shapes = ((9, 80, 1000), (1, 64, 97), largest)
    for rows, dim, vocab in shapes[: 1 if target.interpreted else 3]:
        case = make_case(rows, dim, vocab, dtype, norm=True, bias=True, temperatures=True).to(dtype, target.device)
        assert_same(case, target.backend, measure, top_k=16)
        assert_same(make_case(rows, dim, vocab, dtype).to(dtype, target.device), target.backend, measure)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_instruction_set(isa, dtype):
    for rows, dim, vocab in ((1, 63, 1030), (3, 64, 200), (5, 200, 700), (12, 33, 600)):
        assert_same(make_case(rows, dim, vocab, dtype, norm=True, bias=True), "cpu", top_k=3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_of_rechecked_entries_are_the_whole_heads_own(isa, dtype):
    """Bit for bit: differences of listed log-probabilities do not depend on the sum."""
    case = make_case(11, 100, 900, dtype, norm=True)
    got = case.run("cpu", top_k=8, screen=quantize_head(case.head))
    want = case.run("cpu", top_k=8)
    assert torch.equal(got.top_tokens, want.top_tokens)
    rounding = 4e-6 * (1 + want.top_logprobs.abs().max())
    assert (
        (got.top_logprobs - got.top_logprobs[:, :1]) - (want.top_logprobs - want.top_logprobs[:, :1])
    ).abs().max() < (rounding)


@pytest.mark.parametrize("make", ADVERSARIAL, ids=lambda make: make.__name__)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_adversarial_heads(target, dtype, make):
    case = make(torch.Generator().manual_seed(5), dtype).to(dtype, target.device)
    slow = target.backend == "torch" or target.interpreted
    for measure in ("max_prob",) if slow else THRESHOLDS:
        assert_same(case, target.backend, measure)
    assert_same(case, target.backend, top_k=5)


@pytest.mark.parametrize("make", ADVERSARIAL, ids=lambda make: make.__name__)
def test_adversarial_heads_on_every_instruction_set(isa, make):
    for dtype in (torch.float32, torch.bfloat16):
        assert_same(make(torch.Generator().manual_seed(6), dtype), "cpu", top_k=2)


def test_random_rows():
    """100,000 rows; not one decision differs, and outside of a band none differs from float64's either."""
    differing = differing_from_exact = in_band = fell = rows = 0
    for seed, (dim, vocab, dtype) in enumerate(
        ((16, 200, torch.float32), (32, 500, torch.bfloat16), (64, 300, torch.bfloat16), (48, 800, torch.float16))
    ):
        head = make_case(2, dim, vocab, dtype, seed).head
        screen = quantize_head(head)
        for part in range(25):
            hidden = many_rows(head, 1000 * seed + part)
            whole = early_exit(hidden, head, 0.5, backend="cpu")
            screened = early_exit(hidden, head, 0.5, screen=screen, backend="cpu")
            differing += int((whole.exited != screened.exited).sum())
            differing += int((whole.confidence.token != screened.confidence.token).sum())
            fell += int((screened.confidence.status != 0).sum())
            p = torch.softmax(hidden.double() @ head.double().T, 1).amax(1)
            near = (p - 0.5).abs() <= 0.02
            in_band += int(near.sum())
            differing_from_exact += int(((p >= 0.5) != screened.exited)[~near].sum())
            rows += 1000
    assert rows == 100_000
    assert (differing, differing_from_exact) == (0, 0)
    assert in_band < 0.1 * rows
    assert fell < 0.02 * rows


@pytest.mark.parametrize("make", (near_ties, huge_norms, duplicated_rows, zero_rows, outliers, tiny_numbers, None))
def test_the_error_bound_in_float64(make, monkeypatch):
    """What quantize_head promises of its rows, of any product with them, and of all products together."""
    monkeypatch.setattr(quantized_head, "_GRAM_COLUMNS", 24)
    generator = torch.Generator().manual_seed(7)
    case = make(generator, torch.float32) if make else make_case(50, 110, 300, torch.float32)
    head, screen = case.head.double(), quantize_head(case.head)
    approximation = screen.scales.double()[:, None] * screen.values.double()
    error = head - approximation
    assert (error.norm(dim=1) <= screen.error_norms.double()).all()
    assert (approximation.norm(dim=1) <= screen.norms.double()).all()
    gain, spectral = float(screen.error_gain), float(torch.linalg.matrix_norm(error, 2))
    blocks = (head.shape[1] + 23) // 24
    assert spectral <= gain <= 1.01 * blocks**0.5 * spectral + 1e-30
    worst = error[error.norm(dim=1).argmax()]  # the row that meets its bound
    for y in (*case.hidden.double()[:20], worst, torch.linalg.svd(error, full_matrices=False).Vh[0]):
        off = error @ y
        assert (off.abs() <= screen.error_norms.double() * y.norm() * (1 + 1e-9)).all()
        assert off.norm() <= gain * y.norm() * (1 + 1e-9)


def test_a_worse_screen_changes_nothing(isa):
    """Bounds that are honest, however wide, cost time and no result."""
    case = make_case(30, 64, 2000, torch.bfloat16)
    screen = quantize_head(case.head)
    generator = torch.Generator().manual_seed(8)
    noise = torch.randint(-6, 7, screen.values.shape, generator=generator)
    screen.values.copy_((screen.values + noise).clamp(-127, 127))
    approximation = screen.scales.double()[:, None] * screen.values.double()
    error = case.head.double() - approximation
    screen.error_norms.copy_(error.norm(dim=1) * 1.001)
    screen.norms.copy_(approximation.norm(dim=1) * 1.001)
    screen.error_gain.fill_(float(torch.linalg.matrix_norm(error, 2)) * 1.001)
    whole = case.decide("cpu", 0.6, top_k=3)
    got = case.decide("cpu", 0.6, top_k=3, screen=screen)
    assert torch.equal(got.exited, whole.exited)
    assert torch.equal(got.confidence.top_tokens, whole.confidence.top_tokens)
    better = case.decide("cpu", 0.6, top_k=3, screen=quantize_head(case.head))
    assert got.confidence.rechecked.sum() > better.confidence.rechecked.sum()


def test_a_dishonest_screen_is_what_the_other_tests_would_catch():
    """The bound is what keeps results right: without it they are wrong."""
    case = make_case(40, 64, 2000, torch.bfloat16)
    screen = quantize_head(case.head)
    generator = torch.Generator().manual_seed(8)
    screen.values.add_(torch.randint(-9, 10, screen.values.shape, generator=generator)).clamp_(-127, 127)
    screen.error_norms.zero_()
    screen.error_gain.zero_()
    token = case.run("cpu", screen=screen, tolerance=1.0).token
    assert not torch.equal(token, case.run("cpu").token)


def test_falling_back_is_rare_and_little_is_rechecked():
    """Heads of ordinary size, sure and unsure rows: the screen nearly always answers, from a few entries."""
    for dtype, (dim, vocab) in zip(DTYPES, ((256, 8000), (512, 16000), (128, 4000)), strict=True):
        case = make_case(64, dim, vocab, dtype, norm=True)
        got = assert_same(case, "cpu")
        assert (got.status != 0).float().mean() <= 0.05
        assert got.rechecked.float().median() <= 0.02 * vocab


def test_falling_back_is_counted():
    case = all_equal(torch.Generator().manual_seed(1), torch.bfloat16)
    got = assert_same(case, "cpu")
    assert (got.status == ExitStatus.FELL_BACK).all()
    assert (got.rechecked == 1000).all()
    assert (got.token == 0).all()


@pytest.mark.parametrize("measure", list(THRESHOLDS))
@pytest.mark.parametrize("temperature", (1.0, 0.1))
def test_thresholds_at_the_edge(target, measure, temperature):
    """Thresholds that a row meets exactly, misses by the least number or nearly meets, of unsure and of sure rows."""
    case = make_case(33, 64, 500, torch.float32, temperature=temperature).to(torch.float32, target.device)
    figures = getattr(case.run(target.backend), measure)
    row = torch.arange(33, device=figures.device) % 4
    off = torch.where(row == 2, 1 - 1e-6, 1 + 1e-4)
    above = torch.nextafter(figures, torch.tensor(20.0, device=figures.device))
    thresholds = torch.where(row == 0, figures, torch.where(row == 1, above, figures * off))
    assert_same(case, target.backend, measure, threshold=thresholds)


@pytest.mark.parametrize("level", ("any", "all"))
def test_levels(target, level):
    case = make_case(9, 64, 500, torch.bfloat16).to(torch.bfloat16, target.device)
    for threshold in (0.0, 0.3, 0.6, 1.5):
        assert_same(case, target.backend, threshold=threshold, level=level)


def test_reduced_vocabulary(target):
    case = make_case(9, 64, 50, torch.bfloat16)
    case.options["vocab_map"] = VocabMap(torch.arange(50) * 7 + 3, 400)
    got = assert_same(case.to(torch.bfloat16, target.device), target.backend, top_k=4)
    assert ((got.token - 3) % 7 == 0).all()


def test_threads_and_neighbours_change_nothing():
    case = make_case(40, 128, 3000, torch.bfloat16, norm=True)
    screen = quantize_head(case.head)
    together = case.run("cpu", screen=screen)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    for count in (1, 3):
        torch.set_num_threads(count)
        shuffled = ExitCase(case.hidden[order], case.head, case.options).run("cpu", screen=screen)
        for name in ("token", "max_prob", "margin", "entropy", "logsumexp", "rechecked", "status"):
            assert torch.equal(getattr(shuffled, name), getattr(together, name)[order])


def test_no_rows_and_results_in_place(target):
    case = make_case(3, 32, 100, torch.float32).to(torch.float32, target.device)
    screen = quantize_head(case.head)
    none = early_exit(case.hidden[:0], case.head, 0.5, screen=screen, backend=target.backend)
    assert none.num_active.tolist() == [0]
    assert none.confidence.rechecked.shape == (0,)
    first = case.run(target.backend, screen=screen)
    again = case.run(target.backend, screen=screen, out=case.run("torch", screen=screen))
    for name in ("token", "max_prob", "rechecked"):
        assert torch.equal(getattr(again, name), getattr(first, name))
    assert case.run(target.backend).rechecked is None


def test_the_operator():
    """The schema, and what torch.compile sees."""
    case = make_case(3, 32, 100, torch.float32)
    screen = quantize_head(case.head)
    arguments = (case.hidden, case.head, None, None, 1e-6, None, 1.0, None, None, 0.5, None, "max_prob", "row")
    quantised = (screen.values, screen.scales, screen.error_norms, screen.norms, screen.error_gain, 0.01)
    torch.library.opcheck(torch.ops.specdec_ops.screened_exit.default, (*arguments, *quantised, "cpu", 2))
    compiled = torch.compile(lambda x: exit_confidence(x, case.head, screen=screen).token, backend="eager")
    assert torch.equal(compiled(case.hidden), case.run("cpu").token)


def test_errors():
    case = make_case(3, 32, 100, torch.float32)
    screen = quantize_head(case.head)
    for error, text, head, options in (
        (
            TypeError,
            "screen must be a specdec_ops.QuantizedHead or None, got float32",
            case.head,
            {"screen": case.head},
        ),
        (TypeError, "head must be the tensor that the screen was made from", screen, {"screen": screen}),
        (ValueError, r"screen.values must be int8 \[100, 32\]", case.head, {"screen": quantize_head(case.head[:50])}),
        (ValueError, "tolerance must be a number of at least 0.001", case.head, {"screen": screen, "tolerance": 0.0}),
    ):
        with pytest.raises(error, match=f"specdec_ops.exit_confidence: {text}"):
            exit_confidence(case.hidden, head, **options)
    with pytest.raises(TypeError, match=r"out\.rechecked must be contiguous int32"):
        exit_confidence(case.hidden, case.head, screen=screen, out=case.run("cpu"))


# Int8 heads as heads of their own, by integer products where the processor has them.


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_int8_heads_of_16_bit_rows(isa, dtype):
    """Two limbs hold a row to 1 in 65,000 of its greatest number, finer than its own dtype."""
    for rows, dim, vocab in ((1, 64, 97), (2, 65, 64), (3, 127, 130), (4, 129, 200), (9, 1000, 300), (70, 48, 100)):
        case = make_case(rows, dim, vocab, dtype, norm=True)
        case.head = quantize_head(case.head)
        got, exact = case.run("cpu", top_k=2), case.exact(top_k=2)
        assert torch.equal(got.token, exact.token)
        assert (got.logsumexp - exact.logsumexp).abs().max() <= 2e-3
        assert (got.max_prob - exact.max_prob).abs().max() <= 1e-3


def test_int8_products_are_exact(isa):
    """Rows of integers are multiplied without any error."""
    generator = torch.Generator().manual_seed(3)
    values = torch.randint(-127, 128, (90, 300), generator=generator).double()
    values[:, 0] = 127
    head = quantize_head(values)
    assert torch.equal(head.values.double(), values)
    hidden = torch.randint(-127, 128, (6, 300), generator=generator).double()
    hidden[:, 0] = 127
    got = exit_confidence(hidden.bfloat16(), head, temperature=1e4, top_k=16, backend="cpu")
    true = (hidden @ values.T / 1e4).sort(dim=1, descending=True, stable=True)
    assert torch.equal(got.top_tokens.long(), true.indices[:, :16])
    assert (got.logsumexp - (hidden @ values.T / 1e4).logsumexp(1)).abs().max() <= 1e-4


def test_int8_heads_of_invalid_rows(isa):
    case = make_case(4, 32, 70, torch.bfloat16)
    case.head = quantize_head(case.head)
    case.hidden[1, 3] = float("nan")
    case.hidden[2, 4] = float("inf")
    assert case.run("cpu").status.tolist() == [0, 1, 1, 0]
    case.hidden[:] = 0
    assert case.run("cpu").max_prob.tolist() == pytest.approx([1 / 70] * 4)


@pytest.mark.skipif(build.why_not() is not None, reason=str(build.why_not()))
def test_polynomials_bound_the_exponentials(tmp_path):
    program = tmp_path / "screen_bounds"
    source = build.ROOT / "tests" / "early_exit" / "screen_bounds.cpp"
    flags = ["-std=c++17", "-O1", "-w", "-I", build.ROOT / "csrc", source, "-o", program]
    subprocess.run([*build.compiler(), *flags], check=True)
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
