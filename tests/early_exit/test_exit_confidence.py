"""exit_confidence and early_exit: every backend against the definition in float64."""

import pytest
import torch

from specdec_ops import VocabMap, early_exit, exit_confidence, quantize_head
from tests.early_exit.exit_cases import ExitCase, make_case

OP = "exit_confidence"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FIGURES = ("max_prob", "margin", "entropy", "logsumexp")
ISAS = ("generic", "avx2", "avx512")
# Relative distance of two logits, or of a figure and its threshold, within which a decision may differ.
BAND = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def like(case: ExitCase) -> ExitCase:
    """Eight times the rows, all but the first ones a little different: one row's error may be small by luck."""
    generator = torch.Generator().manual_seed(0)
    rows, dim = case.hidden.shape
    factor = 1 + 0.02 * torch.randn(8, rows, dim, generator=generator).to(case.hidden.device)
    factor[0] = 1
    options = dict(case.options)
    if isinstance(options.get("temperature"), torch.Tensor):
        options["temperature"] = options["temperature"].repeat(8)
    hidden = (case.hidden.float() * factor).view(-1, dim).to(case.hidden.dtype)
    return ExitCase(hidden, case.head, options)


def assert_right(case: ExitCase, target, top_k: int = 0):
    """Figures within the tolerance; the token, and the listed ones, among those that tie for their place."""
    case = case.to(case.hidden.dtype, target.device)
    got, exact = case.run(target.backend, top_k=top_k), case.exact(top_k=max(top_k, 2))
    assert torch.equal(got.status.cpu(), exact.status.cpu())
    more = like(case)
    more_exact = more.exact()
    for name, plain in zip(FIGURES, more.plain(), strict=True):
        value, true = getattr(got, name), getattr(exact, name)
        sound = exact.status == 0
        assert torch.equal(value[~sound], true[~sound])
        if sound.any():
            # Twice PyTorch's error, and that of a logit that was rounded four times.
            theirs = (plain - getattr(more_exact, name))[more_exact.status == 0].abs().max()
            rounding = 4 * torch.finfo(torch.float32).eps * (1 + exact.logsumexp[sound].abs().max())
            assert (value - true)[sound].abs().max() <= 2 * theirs + rounding, name
    gap = exact.top_logprobs[:, 0] - exact.top_logprobs[:, 1]
    scale = exact.logsumexp.abs() + exact.top_logprobs[:, 0].abs() + 1
    clear = (exact.status == 0) & (gap > BAND[case.hidden.dtype] * scale)
    assert len(clear) < 4 or clear.float().mean() >= 0.5, "too few rows are decided clearly"
    assert torch.equal(got.token[clear], exact.token[clear])
    if top_k:
        listed = exact.top_logprobs[:, :top_k]
        sound = exact.status == 0
        assert torch.equal(got.top_tokens[sound, 0], got.token[sound])
        finite = listed.isfinite()
        assert torch.equal(got.top_logprobs.isfinite(), finite)
        error = (got.top_logprobs - listed)[finite].abs().max()
        assert error <= BAND[case.hidden.dtype] * scale.max()
        assert (got.top_tokens[finite] >= 0).all()
        assert (got.top_tokens[~finite] == -1).all()
    return got, exact


def reduced(target, shapes):
    """Fewer and smaller cases where kernels are interpreted or emulated."""
    return shapes[:2] if target.interpreted else shapes[:-2] if target.backend == "cuda-emulated" else shapes


SHAPES = ((1, 64, 97), (5, 48, 130), (3, 80, 1000), (8, 128, 4097), (9, 64, 333), (33, 96, 500), (60, 256, 2048))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_the_definition(target, dtype):
    for rows, dim, vocab in reduced(target, SHAPES):
        assert_right(make_case(rows, dim, vocab, dtype, norm=True), target, top_k=4)
        assert_right(make_case(rows, dim, vocab, dtype), target)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_options(target, dtype):
    rows, dim, vocab = 4, 48, 130
    assert_right(make_case(rows, dim, vocab, dtype, norm=True, bias=True, temperatures=True), target, top_k=16)
    assert_right(make_case(rows, dim, vocab, dtype, norm=True, norm_eps=1e-2, temperature=0.6), target)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_quantised_heads(target, dtype):
    case = make_case(4, 64, 130, torch.float32, norm=True)
    case.head = quantize_head(case.head)
    case.hidden = case.hidden.to(dtype)
    case.options["norm_weight"] = case.options["norm_weight"].to(dtype)
    got, exact = case.to(dtype, target.device).run(target.backend), case.exact()
    for name in FIGURES:
        error = (getattr(got, name) - getattr(exact, name)).abs().max()
        assert error <= 1e-5 * getattr(exact, name).abs().max() + 1e-6 if dtype == torch.float32 else error <= 0.03


def test_masks_and_reduced_vocabularies(target):
    case = make_case(3, 32, 50, torch.float32, bias=True)
    case.options["bias"][::2] = float("-inf")
    ids = torch.arange(50) * 7 + 3
    case.options["vocab_map"] = VocabMap(ids, 400)
    got, _ = assert_right(case, target, top_k=3)
    assert ((got.token - 3) // 7 % 2 == 1).all()
    case.options["bias"][3:] = float("-inf")  # one entry is left
    got = case.to(torch.float32, target.device).run(target.backend, top_k=3)
    assert got.token.tolist() == [10] * 3
    assert got.top_tokens.tolist() == [[10, -1, -1]] * 3
    assert got.max_prob.tolist() == got.margin.tolist() == [1.0] * 3
    assert got.entropy.tolist() == [0.0] * 3


def test_masks_of_large_numbers(target):
    """The least float32 number as a mask, of all entries of a tile and of the first ones seen."""
    case = make_case(4, 32, 300, torch.float32)
    case.options["bias"] = torch.where(torch.arange(300) < 200, torch.finfo(torch.float32).min, 0.0)
    got, exact = assert_right(case, target)
    assert (exact.entropy > 0.1).any()
    assert torch.isclose(got.entropy, exact.entropy, rtol=1e-4, atol=1e-4).all()


def test_ties_go_to_the_lowest_entry(target):
    head = torch.zeros(200, 16)
    head[[5, 77, 150], 0] = 1.0
    case = ExitCase(torch.ones(3, 16), head).to(torch.float32, target.device)
    got = case.run(target.backend, top_k=5)
    assert got.token.tolist() == [5] * 3
    assert got.top_tokens.tolist() == [[5, 77, 150, 0, 1]] * 3
    assert got.margin.tolist() == [0.0] * 3


def test_invalid_rows_touch_nobody(target):
    case = make_case(6, 32, 70, torch.float32)
    case.hidden[1] = float("nan")
    case.hidden[4, 0] = float("inf")
    got, exact = assert_right(case, target, top_k=2)
    assert exact.status.tolist() == [0, 1, 0, 0, 1, 0]
    alone = make_case(6, 32, 70, torch.float32).to(torch.float32, target.device).run(target.backend)
    assert torch.equal(got.max_prob[[0, 2, 3, 5]], alone.max_prob[[0, 2, 3, 5]])
    case = make_case(2, 32, 70, torch.float32, bias=True)
    case.options["bias"][:] = float("-inf")
    decided = case.to(torch.float32, target.device).decide(target.backend, 0.0)
    assert decided.exited.tolist() == [False, False]
    assert decided.confidence.status.tolist() == [1, 1]


def test_one_entry(target):
    case = make_case(2, 16, 1, torch.float32).to(torch.float32, target.device)
    got = case.run(target.backend)
    assert got.token.tolist() == [0, 0]
    assert got.max_prob.tolist() == got.margin.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("measure", ["max_prob", "margin", "entropy"])
@pytest.mark.parametrize("level", ["row", "any", "all"])
def test_decisions(target, measure, level):
    case = make_case(21, 48, 130, torch.float32).to(torch.float32, target.device)
    figure = getattr(case.exact(), measure)
    threshold = figure.sort().values[10:12].mean()  # between two rows
    got = case.decide(target.backend, float(threshold), measure=measure, level=level)
    passed = figure <= threshold if measure == "entropy" else figure >= threshold
    assert 0 < passed.sum() < 21
    want = {"row": passed, "any": passed.any().expand(21), "all": passed.all().expand(21)}[level]
    assert torch.equal(got.exited, want)
    active = (~want).nonzero()[:, 0].tolist()
    assert got.num_active.tolist() == [len(active)]
    assert got.active_rows.tolist() == active + [-1] * (21 - len(active))
    assert got.inverse.tolist() == [active.index(row) if row in active else -1 for row in range(21)]


def test_thresholds_per_row_and_at_the_edge(target):
    """A figure that equals its threshold exits."""
    case = make_case(7, 48, 130, torch.float32).to(torch.float32, target.device)
    figures = case.run(target.backend).max_prob
    above = torch.nextafter(figures, torch.tensor(2.0, device=figures.device))
    thresholds = torch.where(torch.arange(7, device=figures.device) % 2 == 0, figures, above)
    assert case.decide(target.backend, thresholds).exited.tolist() == [True, False] * 3 + [True]


def test_none_and_all(target):
    case = make_case(5, 32, 64, torch.float32).to(torch.float32, target.device)
    nobody = case.decide(target.backend, 1.5)
    assert nobody.active_rows.tolist() == nobody.inverse.tolist() == [0, 1, 2, 3, 4]
    everybody = case.decide(target.backend, 0.0)
    assert everybody.num_active.tolist() == [0]
    assert everybody.active_rows.tolist() == everybody.inverse.tolist() == [-1] * 5


def test_no_rows(target):
    got = early_exit(
        torch.empty(0, 16, device=target.device), torch.ones(3, 16, device=target.device), 0.5, backend=target.backend
    )
    assert got.num_active.tolist() == [0]
    assert got.exited.shape == got.confidence.token.shape == (0,)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_a_row_does_not_depend_on_the_others(target, dtype):
    rows = 7 if target.interpreted else 37
    case = make_case(rows, 64, 300, dtype, norm=True).to(dtype, target.device)
    together = case.run(target.backend)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(1)).to(target.device)
    shuffled = ExitCase(case.hidden[order], case.head, case.options).run(target.backend)
    for name in (*FIGURES, "token"):
        assert torch.equal(getattr(shuffled, name), getattr(together, name)[order])


@pytest.mark.parametrize("rows", [3, 5, 8, 9, 12, 13, 24, 33, 59, 60, 61, 73])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_dims_and_vocabularies_that_fill_no_vector(rows, dtype):
    """Several rows on the CPU: right figures, the same as among fewer rows, and nothing read beside the head."""
    fewer = 3 if rows <= 4 else 5 if rows <= 8 else 9  # between these numbers of rows sums may have another order
    for dim, vocab in ((7, 9), (33, 65), (40, 130), (100, 7), (4096 + 35, 19)):
        case = make_case(rows, dim, vocab, dtype)
        memory = torch.full((case.head.numel() + 256,), float("inf"), dtype=dtype)
        inside = memory[128 : 128 + case.head.numel()].view(vocab, dim)
        case.head = inside.copy_(case.head)
        got, exact = case.run("cpu"), case.exact()
        theirs = (case.plain()[3] - exact.logsumexp).abs().max()
        rounding = 4 * torch.finfo(torch.float32).eps * (1 + exact.logsumexp.abs().max())
        assert (got.logsumexp - exact.logsumexp).abs().max() <= 2 * theirs + rounding
        assert torch.equal(case.first(fewer).run("cpu").logsumexp, got.logsumexp[:fewer])


def test_strided_rows_and_results_in_place(target):
    case = make_case(4, 32, 70, torch.bfloat16, norm=True).to(torch.bfloat16, target.device)
    wide = torch.full((4, 41), float("nan"), dtype=torch.bfloat16, device=target.device)
    wide[:, 3:35] = case.hidden
    before = wide.clone()
    out = case.run(target.backend, top_k=2)
    again = exit_confidence(
        wide[:, 3:35], case.head, **case.options, top_k=2, out=case.run("torch", top_k=2), backend=target.backend
    )
    for name in (*FIGURES, "token", "top_tokens", "top_logprobs"):
        assert torch.equal(getattr(again, name), getattr(out, name))
    assert torch.equal(wide.view(torch.int16), before.view(torch.int16))


@pytest.mark.parametrize("rows", [1, 4, 20])
def test_long_sums_of_float32_do_not_drift(isa, rows):
    """A logit of 16,384 products is off by a few roundings, however many rows there are: sums of sums."""
    errors, logits = [], []
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        hidden, head = (torch.randn(n, 16384, generator=generator) for n in (rows, 1))
        logits.append((hidden.double() @ head.double().T)[:, 0])
        errors.append(exit_confidence(hidden, head, backend="cpu").logsumexp - logits[-1])  # of one entry: its logit
    assert torch.cat(errors).std() <= 5 * 2**-24 * torch.cat(logits).std()
