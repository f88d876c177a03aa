"""Early exit with bounds: decisions are the whole head's, and figures are of the entries that were seen."""

import inspect

import pytest
import torch

from specdec_ops import HeadBounds, VocabMap, bound_head, early_exit, exit_confidence, quantize_head
from specdec_ops.ops.early_exit import reference_bounded_exit as reference
from specdec_ops.status import ExitStatus
from tests.early_exit.adversarial_heads import ADVERSARIAL
from tests.early_exit.exit_cases import ExitCase, make_case, many_rows

OP = "bounded_exit"
INTERPRETED_SHARE, EMULATED_SHARE = 11, 3
INTERPRETED_ROWS = 4
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ISAS = ("generic", "avx2", "avx512", "avx512_bf16")
THRESHOLDS = {"max_prob": 0.6, "margin": 0.4, "entropy": 2.0}
FIGURES = ("max_prob", "margin", "entropy", "logsumexp")


pytestmark = pytest.mark.usefixtures("one_thread")  # these heads are too small to share


def falling(case: ExitCase, by: float) -> ExitCase:
    """The same with a head whose rows get shorter, exp(by)-fold from the first to the last."""
    shrink = torch.linspace(0, -by, case.head.shape[0], device=case.head.device).exp()[:, None]
    return ExitCase(case.hidden, (case.head.float() * shrink).to(case.head.dtype), case.options)


def assert_same(case: ExitCase, backend: str, measure="max_prob", threshold=None, top_k=0, ends=None, **options):
    """The bounded form against the same backend's whole head. Returns what the bounded form said."""
    threshold = THRESHOLDS[measure] if threshold is None else threshold
    if backend == "triton" and not case.hidden.is_cuda:
        case = case.first(INTERPRETED_ROWS)
        threshold = threshold[:INTERPRETED_ROWS] if isinstance(threshold, torch.Tensor) else threshold
    options |= {"measure": measure, "top_k": top_k}
    whole = case.decide(backend, threshold, **options)
    bounds = bound_head(case.head, ends)
    got = case.decide(backend, threshold, bounds=bounds, **options)
    for name in ("exited", "active_rows", "inverse", "num_active"):
        assert torch.equal(getattr(got, name), getattr(whole, name)), name
    assert torch.equal(got.confidence.token[got.exited], whole.confidence.token[got.exited])
    if top_k:
        assert torch.equal(got.confidence.top_tokens[got.exited], whole.confidence.top_tokens[got.exited])
    assert set(got.seen.tolist()) <= set(bounds.ends)
    for end in set(got.seen.tolist()):
        assert_figures_of_the_first(end, case, backend, got, top_k)
    return got


def assert_figures_of_the_first(end: int, case: ExitCase, backend: str, got, top_k: int):
    """Of rows that have seen `end` entries: what a head of these entries says."""
    options = dict(case.options)
    if options.get("bias") is not None:
        options["bias"] = options["bias"][:end]
    if options.get("vocab_map") is not None:
        ids = options["vocab_map"].draft_to_target[:end]
        options["vocab_map"] = VocabMap(ids, options["vocab_map"].vocab)
    head = case.head
    if isinstance(head, torch.Tensor):
        head = head[:end]
    else:
        each = (head.values, head.scales, head.error_norms, head.norms)
        head = type(head)(*(part[:end] for part in each), head.error_gain)
    want = ExitCase(case.hidden, head, options).run(backend, top_k=top_k)
    here = got.seen == end
    assert torch.equal(got.confidence.status[here], want.status[here])
    sound = here & (want.status == 0)
    for name in FIGURES:
        value, true = getattr(got.confidence, name), getattr(want, name)
        torch.testing.assert_close(value[sound], true[sound], rtol=2e-5, atol=2e-6, msg=name)
        assert torch.equal(value[here & ~sound], true[here & ~sound])
    assert torch.equal(got.confidence.token[sound], want.token[sound])
    if top_k:
        assert torch.equal(got.confidence.top_tokens[sound], want.top_tokens[sound])
        torch.testing.assert_close(
            got.confidence.top_logprobs[sound], want.top_logprobs[sound], rtol=2e-5, atol=2e-5, msg="top_logprobs"
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("measure", list(THRESHOLDS))
def test_against_the_whole_head(target, dtype, measure):
    largest = (67, 128, 4097) if target.backend != "cuda-emulated" else (35, 80, 2100)
    shapes = ((5, 48, 300),) if target.interpreted else ((9, 80, 1000), (1, 64, 97), largest)
    stopped = 0
    for rows, dim, vocab in shapes:
        ends = None if vocab > 2000 else (vocab // 9, vocab // 3, vocab - 1, vocab)
        case = make_case(rows, dim, vocab, dtype, norm=True, bias=True, temperatures=True).to(dtype, target.device)
        for by in (0, 8):
            got = assert_same(falling(case, by), target.backend, measure, top_k=16, ends=ends)
            stopped += int((got.seen < vocab).sum())
            plain = make_case(rows, dim, vocab, dtype).to(dtype, target.device)
            got = assert_same(falling(plain, by), target.backend, measure, ends=ends)
            stopped += int((got.seen < vocab).sum())
    assert stopped > 0, "reading never ended early"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_instruction_set(isa, dtype):
    for rows, dim, vocab in ((1, 63, 1030), (3, 64, 200), (5, 200, 700), (12, 33, 600)):
        case = make_case(rows, dim, vocab, dtype, norm=True, bias=True)
        for measure in THRESHOLDS:
            assert_same(falling(case, 10), "cpu", measure, top_k=3, ends=(65, 130, vocab))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_quantised_heads(target, dtype):
    case = falling(make_case(9, 64, 330, torch.float32, norm=True), 8)
    case.head = quantize_head(case.head)
    case = case.to(dtype, target.device)
    got = assert_same(case, target.backend, top_k=2, ends=(40, 120, 330))
    assert (got.seen < 330).any()


@pytest.mark.parametrize("make", ADVERSARIAL, ids=lambda make: make.__name__)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_adversarial_heads(target, dtype, make):
    case = make(torch.Generator().manual_seed(5), dtype).to(dtype, target.device)
    vocab = case.head.shape[0]
    ends = tuple(dict.fromkeys(max(1, vocab * part // 8) for part in (1, 3, 8)))
    slow = target.backend == "torch" or target.interpreted
    for measure in ("max_prob",) if slow else THRESHOLDS:
        assert_same(case, target.backend, measure, ends=ends)
    assert_same(falling(case, 12), target.backend, top_k=5, ends=ends)


def test_random_rows():
    """100,000 rows; not one decision differs, and outside of a band none differs from float64's either."""
    differing = differing_from_exact = in_band = stopped = rows = 0
    for seed, (dim, vocab, dtype) in enumerate(
        ((16, 200, torch.float32), (32, 500, torch.bfloat16), (64, 300, torch.bfloat16), (48, 800, torch.float16))
    ):
        head = falling(make_case(2, dim, vocab, dtype, seed), 6).head
        bounds = bound_head(head, (vocab // 16, vocab // 8, vocab // 4, vocab // 2, vocab))
        for part in range(25):
            hidden = many_rows(head, 1000 * seed + part)
            whole = early_exit(hidden, head, 0.5, backend="cpu")
            bounded = early_exit(hidden, head, 0.5, bounds=bounds, backend="cpu")
            differing += int((whole.exited != bounded.exited).sum())
            exited = whole.exited
            differing += int((whole.confidence.token != bounded.confidence.token)[exited].sum())
            stopped += int((bounded.seen < vocab).sum())
            p = torch.softmax(hidden.double() @ head.double().T, 1).amax(1)
            near = (p - 0.5).abs() <= 0.02
            in_band += int(near.sum())
            differing_from_exact += int(((p >= 0.5) != bounded.exited)[~near].sum())
            rows += 1000
    assert rows == 100_000
    assert (differing, differing_from_exact) == (0, 0)
    assert in_band < 0.1 * rows
    assert stopped > 0.5 * rows


# An oracle that does not share the idea of the bounds: unread logits of every kind below the ceiling.


def completions(ceiling: torch.Tensor, left: int) -> list[torch.Tensor]:
    """What `left` unread logits [rows, left] may be, if none is above the ceilings [rows]."""
    highest = ceiling[:, None].expand(-1, left)
    drops = [torch.full((1, left), drop, dtype=ceiling.dtype) for drop in (0.0, 0.1, 1.0, 2.0, 4.0, 8.0, 16.0)]
    drops += [torch.where(torch.arange(left) < some, 0.0, float("inf"))[None].double() for some in (1, 2, left // 2)]
    drops += [torch.full((1, left), float("inf"), dtype=ceiling.dtype)]
    generator = torch.Generator().manual_seed(left)
    shape = (len(ceiling), left)
    drops += [torch.rand(shape, generator=generator, dtype=torch.float64) * scale for scale in (1, 5, 20)]
    alone = torch.full(shape, float("inf"), dtype=torch.float64)
    alone[:, 0] = torch.rand(len(ceiling), generator=generator, dtype=torch.float64) * 3  # one, somewhere near
    return [highest - drop for drop in [*drops, alone]]


def exact_figure(logits: torch.Tensor, measure: str) -> torch.Tensor:
    p = torch.softmax(logits, 1)
    best = p.topk(2, 1).values
    return {"max_prob": best[:, 0], "margin": best[:, 0] - best[:, 1], "entropy": torch.special.entr(p).sum(1)}[measure]


def contradictions(verdicts, measure: str) -> tuple[int, int]:
    """How many of 6,000 random rows a verdict says too much of, and how many it says anything of."""
    generator = torch.Generator().manual_seed(1)
    wrong = certain = 0
    for left, returned in ((2, 1), (5, 2), (40, 1)):
        seen = torch.randn(2000, 7, generator=generator, dtype=torch.float64)
        seen *= torch.logspace(-1, 1, 2000, dtype=torch.float64)[torch.randperm(2000, generator=generator)][:, None]
        ceiling = seen.amax(1) + 8 * torch.rand(2000, generator=generator, dtype=torch.float64) - 6
        sample = exact_figure(seen, measure)[torch.randperm(2000, generator=generator)]
        limit = (sample * (0.8 + 0.4 * torch.rand(2000, generator=generator))).float()
        no, yes, known = verdicts(seen, torch.zeros(2000, dtype=torch.bool), ceiling, left, measure, limit, returned)
        best = seen.topk(returned, 1).indices
        bad = no & yes
        for others in completions(ceiling, left):
            all_logits = torch.cat((seen, others), 1)
            figure = exact_figure(all_logits, measure)
            passes = figure <= limit if measure == "entropy" else figure >= limit
            bad |= (no & passes) | (yes & ~passes)
            bad |= known & (
                torch.sort(all_logits, dim=1, descending=True, stable=True).indices[:, :returned] != best
            ).any(1)
        wrong += int(bad.sum())
        certain += int((no | yes).sum() + known.sum())
    return wrong, certain


@pytest.mark.parametrize("measure", list(THRESHOLDS))
def test_no_completion_contradicts_a_verdict(measure):
    wrong, certain = contradictions(reference.verdicts, measure)
    assert wrong == 0
    assert certain > 3000


WRONG_RULES = {
    "unread logits are taken to be below the greatest": ("above, rest = up > 0,", "above, rest = up > 99,"),
    "as if nothing were left": ("left * peak", "0 * peak"),
    "as if one entry were left": ("left * peak", "1 * peak"),
    "the greatest is taken to be known": ("known = bounded & (ceiling <= best[:, returned - 1])", "known = bounded"),
    "the listed are known if the greatest is": ("best[:, returned - 1]", "best[:, 0]"),
    "entropy only grows": ("torch.minimum(entropy, mixed)", "entropy"),
    "what is left is of one kind": ("mixed + most * others", "mixed"),
    "the second one stays the second": ("torch.maximum(gap, up)", "gap"),
}


@pytest.mark.parametrize("rule", list(WRONG_RULES))
def test_wrong_rules_are_contradicted(rule):
    correct, wrong = WRONG_RULES[rule]
    source = inspect.getsource(reference.verdicts)
    assert correct in source
    names = dict(vars(reference))
    exec(source.replace(correct, wrong), names)
    assert sum(contradictions(names["verdicts"], measure)[0] for measure in THRESHOLDS) > 0


@pytest.mark.parametrize("measure", list(THRESHOLDS))
def test_no_unread_entry_could_have_changed_a_decision(target, measure):
    """Whatever rows the head had behind the part that a row saw, if they were no longer than its longest one there."""
    rows, dim, vocab = 6, 24, 300
    case = falling(make_case(rows, dim, vocab, torch.float32), 8).to(torch.float32, target.device)
    figure = getattr(case.exact(), measure)
    limit = float(figure.sort().values[2:4].mean())
    bounds = bound_head(case.head, (20, 60, 120, vocab))
    got = case.decide(target.backend, limit, measure=measure, bounds=bounds)
    logits = case.hidden.double() @ case.head.double().T
    lengths, norms = case.hidden.double().norm(dim=1), case.head.double().norm(dim=1)
    assert (got.seen < vocab).any()
    for row, seen in enumerate(got.seen.tolist()):
        if seen == vocab:
            continue
        part = logits[row : row + 1, :seen].cpu()
        for others in completions((lengths[row] * norms[seen:].max())[None].cpu(), vocab - seen):
            value = float(exact_figure(torch.cat((part, others), 1), measure))
            assert (value <= limit if measure == "entropy" else value >= limit) == bool(got.exited[row])
            if got.exited[row]:
                assert int(torch.cat((part, others), 1).argmax()) == int(got.confidence.token[row])


def test_what_is_seen(target):
    """Three parts; where a row stops is known beforehand."""
    head = torch.zeros(400, 32)
    head[:, 0] = 1e-3  # behind 100 entries nothing counts
    head[3, 0], head[50, 1], head[70, 2], head[399, 4] = 20.0, 3.0, 3.0, 0.5
    hidden = torch.zeros(4, 32)
    hidden[0, 0] = 1.0  # sure after 100 entries
    hidden[1, 1:3] = 2.0  # two entries are equal: never sure, after 100 entries
    hidden[2, 4] = 30.0  # the last entry decides
    hidden[3, 4:6] = 10.0  # it might have, but 200 others are too many for a length of 14
    case = ExitCase(hidden, head).to(torch.float32, target.device)
    got = assert_same(case, target.backend, threshold=0.9, ends=(100, 200, 400))
    assert got.seen.tolist() == [100, 100, 400, 200]
    assert got.exited.tolist() == [True, False, True, False]
    assert got.confidence.token.tolist()[:3] == [3, 50, 399]


def test_a_bias_behind_the_part_counts(target):
    """The ceiling has the greatest bias among the unread entries, masks included."""
    case = ExitCase(torch.zeros(2, 16), torch.ones(300, 16)).to(torch.float32, target.device)
    bias = torch.zeros(300, device=target.device)
    bias[0] = 12.0
    case.options["bias"] = bias
    for last, seen in ((11.0, 300), (5.0, 200), (2.0, 100)):  # each of 200 or 100 unread ones may be as great
        bias[299] = last
        got = assert_same(case, target.backend, threshold=0.9, ends=(100, 200, 300))
        assert got.seen.tolist() == [seen, seen]
    bias[:100], bias[100:] = 0.0, float("-inf")
    got = assert_same(case, target.backend, threshold=0.01, ends=(100, 200, 300))
    assert got.seen.tolist() == [300, 300]  # a hundredth to the last bit
    got = assert_same(case, target.backend, threshold=0.009, ends=(100, 200, 300))
    assert got.seen.tolist() == [100, 100]


def test_where_nothing_is_known_everything_is_read(target):
    """Rows of NaN or of numbers whose products overflow, and a bias of NaN, stay open."""
    case = falling(make_case(4, 32, 90, torch.float32), 20).to(torch.float32, target.device)
    case.hidden[1, 3] = float("nan")
    case.hidden[2] *= 1e36
    got = assert_same(case, target.backend, ends=(30, 90))
    assert got.seen.tolist()[2] == 90
    assert (got.confidence.status & ExitStatus.INVALID).tolist()[1] == 1
    case = falling(make_case(3, 32, 90, torch.float32), 20).to(torch.float32, target.device)
    case.options["bias"] = torch.zeros(90, device=target.device)
    case.options["bias"][60] = float("nan")
    got = assert_same(case, target.backend, ends=(30, 90))
    assert got.seen.tolist() == [90] * 3
    assert not got.exited.any()


@pytest.mark.parametrize("level", ("any", "all"))
@pytest.mark.parametrize("measure", list(THRESHOLDS))
def test_levels(target, level, measure):
    """One decision for all rows, and one number of entries that they have seen."""
    case = falling(make_case(9, 64, 500, torch.bfloat16), 10).to(torch.bfloat16, target.device)
    seen = set()
    for threshold in (0.0, 0.3, 0.6, 1.5, 6.0):
        got = assert_same(case, target.backend, measure, threshold=threshold, level=level, ends=(60, 200, 500))
        assert len(set(got.seen.tolist())) == 1
        seen.update(got.seen.tolist())
    assert min(seen) < 500


def test_where_rows_stop_is_where_the_definition_says():
    for measure in THRESHOLDS:
        for level in ("row", "any", "all"):
            case = falling(make_case(60, 48, 3000, torch.float32, temperatures=True), 6)
            options = {"measure": measure, "level": level, "bounds": bound_head(case.head)}
            got = case.decide("cpu", THRESHOLDS[measure], **options)
            want = case.decide("torch", THRESHOLDS[measure], **options)
            assert (got.seen == want.seen).float().mean() >= 0.98
            assert level != "row" or len(set(got.seen.tolist())) > 2


@pytest.mark.parametrize("measure", list(THRESHOLDS))
def test_thresholds_at_the_edge(target, measure):
    """Thresholds that a row meets exactly, misses by the least number or nearly meets."""
    case = falling(make_case(33, 64, 500, torch.float32), 8).to(torch.float32, target.device)
    figures = getattr(case.run(target.backend), measure)
    row = torch.arange(33, device=figures.device) % 4
    off = torch.where(row == 2, 1 - 1e-6, 1 + 1e-4)
    above = torch.nextafter(figures, torch.tensor(20.0, device=figures.device))
    thresholds = torch.where(row == 0, figures, torch.where(row == 1, above, figures * off))
    # The parts' sums are added up in another order than the whole head's: a figure may be off by its last bits.
    clear = row == 3
    bounds = bound_head(case.head, (50, 150, 500))
    got = case.decide(target.backend, thresholds, measure=measure, bounds=bounds)
    whole = case.decide(target.backend, thresholds, measure=measure)
    assert torch.equal(got.exited[clear], whole.exited[clear])
    assert (got.exited == whole.exited).float().mean() >= 0.5


def test_parts_of_the_default_size_are_the_whole_heads_bit_for_bit():
    """On the CPU, for rows that see everything."""
    case = make_case(12, 64, 5000, torch.bfloat16, norm=True)
    got = case.decide("cpu", 0.6, bounds=bound_head(case.head), top_k=4)
    whole = case.decide("cpu", 0.6, top_k=4)
    assert got.seen.tolist() == [5000] * 12
    for name in (*FIGURES, "token", "top_tokens", "top_logprobs", "status"):
        assert torch.equal(getattr(got.confidence, name), getattr(whole.confidence, name))


def test_a_row_does_not_depend_on_the_others(target):
    rows = 7 if target.interpreted else 37
    case = falling(make_case(rows, 64, 300, torch.bfloat16, norm=True), 8).to(torch.bfloat16, target.device)
    bounds = bound_head(case.head, (30, 50, 70, 90, 300))
    together = case.decide(target.backend, 0.6, bounds=bounds)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(1)).to(target.device)
    shuffled = ExitCase(case.hidden[order], case.head, case.options).decide(target.backend, 0.6, bounds=bounds)
    assert torch.equal(shuffled.seen, together.seen[order])
    assert len(set(together.seen.tolist())) > 1
    for name in (*FIGURES, "token"):
        assert torch.equal(getattr(shuffled.confidence, name), getattr(together.confidence, name)[order])


def test_threads_change_nothing():
    case = falling(make_case(20, 128, 9000, torch.bfloat16, norm=True), 8)
    bounds = bound_head(case.head)
    alone = case.decide("cpu", 0.6, bounds=bounds)
    for count in (2, 3):
        torch.set_num_threads(count)
        got = case.decide("cpu", 0.6, bounds=bounds)
        assert torch.equal(got.seen, alone.seen)
        assert torch.equal(got.confidence.logsumexp, alone.confidence.logsumexp)


def test_no_rows(target):
    head = torch.ones(300, 16, device=target.device)
    got = early_exit(head[:0], head, 0.5, bounds=bound_head(head, (5, 300)), backend=target.backend)
    assert got.num_active.tolist() == [0]
    assert got.seen.shape == got.exited.shape == (0,)
    assert early_exit(head[:2], head, 0.5, backend=target.backend).seen is None


def test_reduced_vocabulary(target):
    case = falling(make_case(9, 64, 50, torch.bfloat16), 20)
    case.options["vocab_map"] = VocabMap(torch.arange(50) * 7 + 3, 400)
    got = assert_same(case.to(torch.bfloat16, target.device), target.backend, top_k=4, ends=(9, 20, 50))
    assert ((got.confidence.token - 3) % 7 == 0).all()


def test_sorted_by_length():
    """The recipe of bound_head's docstring: other entries, the same tokens."""
    case = falling(make_case(20, 64, 4000, torch.float32), 8)
    mixed = case.head[torch.randperm(4000, generator=torch.Generator().manual_seed(1))]
    order = mixed.float().norm(dim=1).argsort(descending=True)
    whole = early_exit(case.hidden, mixed, 0.6)
    options = {"vocab_map": VocabMap(order, len(order))}
    head = mixed[order].contiguous()
    got = early_exit(case.hidden, head, 0.6, bounds=bound_head(head), **options)
    assert torch.equal(got.exited, whole.exited)
    assert torch.equal(got.confidence.token[got.exited], whole.confidence.token[got.exited])
    assert got.seen.float().mean() < 0.8 * 4000
    assert early_exit(case.hidden, mixed, 0.6, bounds=bound_head(mixed)).seen.float().mean() > got.seen.float().mean()


def test_bounds_hold():
    for dtype in (*DTYPES, torch.float64):
        head = falling(make_case(2, 70, 2000, dtype), 3).head
        bounds = bound_head(head, (1, 700, 1999, 2000))
        norms = head.double().norm(dim=1)
        assert bounds.norms_after.dtype == torch.float32
        for end, norm in zip(bounds.ends[:-1], bounds.norms_after.double().tolist(), strict=False):
            assert norms[end:].max() <= norm <= norms[end:].max() * (1 + 1e-6)
        assert bounds.norms_after[-1] == 0
        screen = quantize_head(head)
        norms = (screen.scales.double()[:, None] * screen.values.double()).norm(dim=1)
        assert bound_head(screen, (700, 2000)).norms_after[0] >= norms[700:].max()


def test_default_parts():
    for vocab, ends in (
        (1, (1,)),
        (512, (512,)),
        (1500, (512, 1024, 1500)),
        (32_000, (2048, 4096, 8192, 16_384, 32_000)),
    ):
        bounds = bound_head(torch.zeros(vocab, 1))
        assert bounds.ends == ends
        assert bounds.norms_after.shape == (len(ends),)
    assert repr(bounds) == "<HeadBounds of 32000 entries in 5 parts on cpu>"
    assert bounds.to("meta").norms_after.device.type == "meta"


def test_the_operator():
    """The schema, and what torch.compile sees."""
    case = falling(make_case(3, 32, 100, torch.float32), 9)
    bounds = bound_head(case.head, (20, 100))
    arguments = (case.hidden, case.head, None, None, 1e-6, None, 1.0, None, None, 0.5, None, "max_prob", "row")
    extra = (bounds.norms_after, list(bounds.ends))
    torch.library.opcheck(torch.ops.specdec_ops.bounded_exit.default, (*arguments, *extra, "cpu", 2))
    compiled = torch.compile(lambda x: early_exit(x, case.head, 0.5, bounds=bounds).seen, backend="eager")
    assert torch.equal(compiled(case.hidden), case.decide("cpu", 0.5, bounds=bounds).seen)


def test_errors():
    case = make_case(3, 32, 100, torch.float32)
    bounds = bound_head(case.head)
    for error, text, options in (
        (TypeError, "bounds must be a specdec_ops.HeadBounds or None, got float32", {"bounds": case.head}),
        (ValueError, "bounds must be None with a screen", {"bounds": bounds, "screen": quantize_head(case.head)}),
        (
            ValueError,
            "bounds must be made from the head, of 100 entries",
            {"bounds": bound_head(case.head[:50])},
        ),
        (ValueError, "bounds.norms_after must be on cpu", {"bounds": bounds.to("meta")}),
    ):
        with pytest.raises(error, match=f"specdec_ops.early_exit: {text}"):
            early_exit(case.hidden, case.head, 0.5, **options)
    must = "ends must be ascending ints that end at 100, at most 16"
    for error, text, arguments in (
        (TypeError, r"head must be float32, bfloat16 or float16 \[vocab, dim\]", (3,)),
        (TypeError, "head must be float32", (case.head.int(),)),
        (ValueError, r"head must be \[vocab, dim\] with at least one of each", (case.head[0],)),
        (ValueError, "head must be finite", (case.head / 0,)),
        (TypeError, must, (case.head, 100)),
        (TypeError, must, (case.head, (50.0, 100))),
        (ValueError, must, (case.head, (50,))),
        (ValueError, must, (case.head, (0, 100))),
        (ValueError, must, (case.head, (50, 50, 100))),
        (ValueError, must, (case.head, ())),
        (ValueError, must, (case.head, (*range(1, 17), 100))),
    ):
        with pytest.raises(error, match=f"specdec_ops.bound_head: {text}"):
            bound_head(*arguments)
    assert isinstance(bounds, HeadBounds)
    assert exit_confidence(case.hidden, case.head).rechecked is None
