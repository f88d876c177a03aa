"""The CUDA kernels of early exit, emulated: launches, bytes, blocks, alignment, schedules, sanitizers, mutants.

Their values are also tested with all other backends', in test_early_exit.py.
"""

import copy

import pytest
import torch

from specdec_ops import exit_confidence, quantize_head
from specdec_ops.ops.early_exit.contract import ExitConfidenceArguments, ExitConfidenceOutputs
from tests.early_exit.exit_cases import ExitCase, make_case
from tests.early_exit.test_exit_confidence import DTYPES, FIGURES
from tests.emulator import build, kernels
from tests.emulator.checks import NO_FENCE, assert_race, assert_same, launch_tests, outputs, poison, reveals

if reason := build.why_not():
    pytest.skip(reason, allow_module_level=True)

DECISION = ("exited", "active_rows", "inverse", "num_active")
HALF, BF16, FLOAT = torch.float16, torch.bfloat16, torch.float32


def launch_of(case, decides=True, threshold=0.4, multiprocessors=kernels.MULTIPROCESSORS, **options):
    """The launch of a case, not run, with outputs that nobody has written."""

    def call():
        if decides:
            case.decide("auto", threshold, **options)
        else:
            case.run("auto", **options)

    return kernels.launch_of(call, multiprocessors=multiprocessors)


def outputs_of(launch, *order):
    """Run a launch on poisoned outputs."""
    poison(launch)
    kernels.run(launch, *order)
    return outputs(launch)


def int8_case(rows, dim, vocab, dtype, **options):
    case = make_case(rows, dim, vocab, FLOAT, **options)
    case.head = quantize_head(case.head)
    return case.to(dtype)


def assert_near(got, case, tolerance, **options):
    """Stats near the definition's, and the same tokens where they are clear."""
    exact = case.exact(top_k=2)
    clear = exact.top_logprobs[:, 0] - exact.top_logprobs[:, 1] > tolerance
    assert torch.equal(got["token"][clear], exact.token[clear])
    for name in FIGURES:
        assert (got[name] - getattr(exact, name)).abs().max() <= tolerance, name


TOLERANCE = {FLOAT: 2e-5, BF16: 0.1, HALF: 1e-2}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [8, 9, 17, 33, 65, 130])
def test_every_number_of_rows(rows, dtype):
    """Every size of a block, several blocks of rows, and dims and vocabularies that end anywhere in a piece."""
    dim, vocab = 70 + rows, 129 + rows
    case = make_case(rows, dim, vocab, dtype, norm=True, bias=True)
    assert_near(outputs_of(launch_of(case)), case, TOLERANCE[dtype])
    case = int8_case(rows, dim, vocab, dtype, norm=True)
    assert_near(outputs_of(launch_of(case)), case, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_does_not_depend_on_how_many_there_are(dtype):
    """Not in a single bit, although blocks for few and for many rows are other kernels."""
    for make in (make_case, int8_case):
        case = make(70, 100, 700, dtype, norm=True)
        whole = outputs_of(launch_of(case, top_k=3))
        for rows in (1, 9, 20, 40):
            part = ExitCase(case.hidden[:rows], case.head, case.options)
            got = outputs_of(launch_of(part, decides=False, top_k=3))
            assert_same(got, {name: whole[name][:rows] for name in got})


@pytest.mark.parametrize("multiprocessors", [1, 3, 132])
def test_however_many_multiprocessors(multiprocessors):
    """One block with all tiles, several each, and more multiprocessors than tiles."""
    case = make_case(5, 64, 1100, BF16, norm=True)
    got = outputs_of(launch_of(case, multiprocessors=multiprocessors, top_k=16))
    expected = outputs_of(launch_of(case, top_k=16))
    assert torch.equal(got["top_tokens"], expected["top_tokens"])
    for name in FIGURES:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int8], ids=str)
def test_result_does_not_depend_on_where_rows_start(dtype):
    """What can't be copied in pieces of 16 bytes is copied by the element, with the same result."""
    make = int8_case if dtype == torch.int8 else make_case
    case = make(3, 64, 200, BF16 if dtype == torch.int8 else dtype, norm=True)
    launch = launch_of(case)
    expected = outputs_of(launch)
    moved = {}
    for name in ("hidden", "head", "norm_weight"):
        tensor = launch.tensors[name]
        memory = torch.zeros(tensor.numel() + 3, dtype=tensor.dtype)
        moved[name] = memory[3:].view(tensor.shape).copy_(tensor)
        assert moved[name].data_ptr() % 16 == 3 * tensor.element_size() % 16
    launch.tensors.update(moved)
    assert_same(outputs_of(launch), expected)


@pytest.mark.parametrize("dtype", [HALF, FLOAT], ids=str)
def test_numbers_beyond_float16(dtype):
    """float16 rows are staged times a power of two: neither large nor small ones are lost, nor their products."""
    for factor in (2.0**-20, 2.0**11):
        case = make_case(4, 64, 300, FLOAT, norm_eps=1e-12, norm=True)
        case.hidden *= factor
        case.options["norm_weight"] *= 60
        case.head *= 1 / 60
        case = case.to(HALF)
        if dtype == FLOAT:
            case.head = quantize_head(case.head)
            case.hidden = case.hidden.float()
            case.options["norm_weight"] = case.options["norm_weight"].float()
        assert_near(outputs_of(launch_of(case)), case, 2e-2 if dtype == HALF else 2e-5)


def test_one_launch():
    """Whatever the shapes, with or without a decision."""
    cases = [make_case(1, 64, 97, BF16), make_case(70, 48, 700, HALF, norm=True), int8_case(40, 64, 300, FLOAT)]
    for case, decides in [(case, decides) for case in cases for decides in (False, True)]:
        launch = launch_of(case, decides)
        before = kernels.launches("exit_confidence")
        kernels.run(launch)
        assert kernels.launches("exit_confidence") - before == 1


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int8], ids=str)
def test_the_head_is_read_once(dtype):
    """And nothing that is not there; hidden rows once per tile, and once per block before if they become float16."""
    rows, dim, vocab = 32 if dtype == torch.int8 else 8, 128, 900
    case = (int8_case if dtype == torch.int8 else make_case)(rows, dim, vocab, BF16 if dtype == torch.int8 else dtype)
    launch = launch_of(case)
    moved = kernels.traffic(launch)
    head, hidden = launch.tensors["head"], launch.tensors["hidden"]
    blocks = 2 * kernels.MULTIPROCESSORS
    assert moved["head"].read == head.numel() * head.element_size()
    assert moved["hidden"].read == (8 + blocks * (dtype in (HALF, torch.int8))) * hidden.numel() * hidden.element_size()
    assert moved["head"].written == moved["hidden"].written == 0
    if dtype == BF16:
        for rows in (60, 64):
            assert kernels.traffic(launch_of(make_case(rows, dim, vocab, BF16)))["head"].read == 2 * vocab * dim


def test_scratch_is_what_blocks_leave():
    """16 bytes and the list for each row and block, written once and read once or twice."""
    launch = launch_of(make_case(5, 64, 1100, BF16), top_k=7)
    blocks = 2 * kernels.MULTIPROCESSORS
    assert launch.tensors["scratch"].numel() == 5 * blocks * (16 + 7 * 8)
    assert kernels.traffic(launch)["scratch"].written == 5 * blocks * (16 + 7 * 8)


def test_scratch():
    """A state for each row and block: two blocks for each multiprocessor, but no more than tiles of 128 entries."""

    def needs(rows, vocab, top_k):
        hidden, head = (torch.empty(count, 64, device="meta") for count in (rows, vocab))
        return kernels.needs_of(lambda: exit_confidence(hidden, head, top_k=top_k), multiprocessors=132)

    assert needs(1, 97, 0) == (32, 2)
    assert needs(60, 128_256, 10) == (60 * 264 * (16 + 80), 9)


def screened_launch(*sizes, **options):
    """A case with a screen, and what its whole head says."""
    case_options = {name: options.pop(name) for name in ("norm", "bias", "temperatures") if name in options}
    case = make_case(*sizes, **case_options)
    return launch_of(case, screen=quantize_head(case.head), **options)


def whole(launch):
    """The same call without its screen or bounds."""
    parts = []
    for kind, part in ((ExitConfidenceArguments, launch.arguments), (ExitConfidenceOutputs, launch.outputs)):
        parts.append(kind(*(getattr(part, name) for name in kind._fields)))
    return kernels.Launch("exit_confidence", *copy.deepcopy(parts))


def test_a_screen_is_three_launches():
    """Whether rows fall back or not."""
    sure, open_ = screened_launch(5, 64, 700, BF16, norm=True), screened_launch(3, 16, 300, BF16)
    open_.tensors["hidden"].zero_()
    for launch, fell in ((sure, 0), (open_, 3)):
        before = kernels.launches("screened_exit")
        got = outputs_of(launch)
        assert kernels.launches("screened_exit") - before == 3
        assert (got["status"] & 2).ne(0).sum() == fell


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_a_screen_reads(dtype):
    """The copy once; of the head just what is counted, or all of it once for the rows that fell back."""
    launch = screened_launch(4, 128, 5000, dtype, norm=True)
    moved, rechecked = kernels.traffic(launch), launch.tensors["rechecked"]
    head = launch.tensors["head"]
    assert moved["screen_values"].read == head.numel()
    assert moved["head"].read == int(rechecked.sum()) * 128 * head.element_size() < 0.2 * head.nbytes
    assert not launch.tensors["status"].any()
    launch.tensors["hidden"][1:3] = 0
    assert (
        kernels.traffic(launch)["head"].read == int(rechecked[[0, 3]].sum()) * 128 * head.element_size() + head.nbytes
    )
    assert launch.tensors["status"].tolist() == [0, 2, 2, 0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_screen_answers_nearly_always(dtype):
    """Ordinary rows, sure and unsure; few entries are rechecked."""
    launch = screened_launch(16, 256, 4000, dtype, norm=True, threshold=0.5)
    got, expected = outputs_of(launch), outputs_of(whole(launch))
    assert_same({name: got[name] for name in ("token", *DECISION)}, {n: expected[n] for n in ("token", *DECISION)})
    assert (got["status"] != 0).sum() <= 1
    assert got["rechecked"].float().median() <= 0.02 * 4000


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_screened_row_does_not_depend_on_the_others(dtype):
    """Not in a single bit."""
    case = make_case(21, 100, 700, dtype, norm=True)
    screen = quantize_head(case.head)
    together = outputs_of(launch_of(case, screen=screen, top_k=3))
    for rows in (1, 9):
        part = ExitCase(case.hidden[:rows], case.head, case.options)
        got = outputs_of(launch_of(part, decides=False, screen=screen, top_k=3))
        assert_same(got, {name: together[name][:rows] for name in got})


def test_unaligned_screens():
    """dims that are no multiple of 16, and copies that start anywhere."""
    launch = screened_launch(3, 64, 300, HALF, norm=True)
    expected = outputs_of(launch)
    for name in ("screen_values", "head"):
        tensor = launch.tensors[name]
        memory = torch.zeros(tensor.numel() + 3, dtype=tensor.dtype)
        launch.tensors[name] = memory[3:].view(tensor.shape).copy_(tensor)
    assert_same(outputs_of(launch), expected)


LAUNCHES = {
    "screen": lambda: screened_launch(9, 80, 2300, BF16, norm=True, bias=True, top_k=5),
    "screen of f16": lambda: screened_launch(3, 72, 2100, HALF, norm=True, temperatures=True, measure="margin"),
    "screen of f32": lambda: screened_launch(17, 50, 300, FLOAT, level="any", measure="entropy"),
    "bf16": lambda: launch_of(make_case(5, 80, 700, BF16, norm=True, bias=True), top_k=5),
    "many rows": lambda: launch_of(make_case(67, 40, 300, BF16, norm=True), level="any"),
    "f16": lambda: launch_of(make_case(18, 72, 600, HALF, norm=True, temperatures=True), top_k=16),
    "f32": lambda: launch_of(make_case(9, 50, 520, FLOAT, norm=True), level="all", measure="entropy"),
    "int8": lambda: launch_of(int8_case(9, 144, 530, BF16, norm=True), measure="margin"),
    "int8 of f32": lambda: launch_of(int8_case(3, 130, 530, FLOAT)),
    "unaligned": lambda: launch_of(make_case(3, 37, 260, HALF, norm=True), decides=False),
}
test_sanitizers_find_nothing, test_every_order_gives_the_same = launch_tests(LAUNCHES)


# What a line of the kernels is for: (file, the line, what becomes of it). ThreadSanitizer finds each.
MUTANTS = {
    "no barrier before a stage is filled again": (
        "exit_confidence.cuh",
        "      block_sync();  // the piece has",
        "  //",
    ),
    "no barrier before logits are taken": (
        "exit_confidence.cuh",
        "    block_sync();\n#pragma unroll 1",
        "#pragma unroll 1",
    ),
    "no barrier before logits are handed over again": ("exit_confidence.cuh", "if (first > 0) block_sync();", ""),
    "no barrier behind the first factors": (
        "exit_confidence.cuh",
        "shared.factors);\n  block_sync();",
        "shared.factors);",
    ),
    "no barrier before entries are rechecked": (
        "screened_exit.cuh",
        "  block_sync();  // the factors and the list are there",
        "",
    ),
    "no fence before a block says that it is done": NO_FENCE,
}


@pytest.mark.parametrize("name", MUTANTS)
def test_planted_bug_in_shared_work(name):
    screened = MUTANTS[name][0] == "screened_exit.cuh"
    launch = LAUNCHES["screen of f16" if screened else "f16"]()
    assert_race(launch, *MUTANTS[name], only=f"{launch.op}_f16")


WRONG = {
    "screen: a bound without the copy's error": ("screen_stats.cuh", "bound.by_error * error_norm + noise", "noise"),
    "screen: candidates that are too deep": (
        "screened_exit.cuh",
        "!(plan.cut > clamped + error.all) || clamped > plan.deep",
        "clamped > plan.deep",
    ),
    "screen: rows that fall back and are not top_k": ("screened_exit.cuh", "settled ? 0 : 1;", "0;"),
    "pieces that are not waited for": ("exit_confidence.cuh", "cp_async_wait<Shape::kStages - 2>();", ""),
    "squares of every tile": ("exit_confidence.cuh", "next_tile == first);", "true);"),
    "equals that go to the higher entry": ("block_team.cuh", "(0xffffffffu - uint32_t(id))", "uint32_t(id)"),
    "a running maximum without its decay": ("exit_state.cuh", "state.sum *= decay;", ""),
    "a merge that stops early": ("exit_state.cuh", "rank < top_k && any", "rank < 1"),
    "dims of int8 heads in the order of memory": (
        "exit_rows.cuh",
        "if constexpr (Shape::kIsInt8) {",
        "if constexpr (false) {",
    ),
}


def wrong_screen():
    """A copy that is bad, and honest about it; some rows fall back."""
    case = make_case(20, 64, 1000, BF16)
    case.hidden[3] = 0
    screen = quantize_head(case.head)
    generator = torch.Generator().manual_seed(8)
    screen.values.add_(torch.randint(-9, 10, screen.values.shape, generator=generator)).clamp_(-127, 127)
    approximation = screen.scales.double()[:, None] * screen.values.double()
    error = case.head.double() - approximation
    screen.error_norms.copy_(error.norm(dim=1) * 1.001)
    screen.norms.copy_(approximation.norm(dim=1) * 1.001)
    screen.error_gain.fill_(float(torch.linalg.matrix_norm(error, 2)) * 1.001)
    return launch_of(case, screen=screen, tolerance=1.0, top_k=4)


@pytest.mark.parametrize("name", WRONG)
def test_planted_bug_in_numbers(name):
    """Each of them changes a result of the cases above, or is reported."""
    case = "int8" if "int8" in name else "bf16"
    launch = wrong_screen() if name.startswith("screen") else LAUNCHES[case]()
    assert reveals(launch, *WRONG[name], only=f"{launch.op}_{case}")


def test_rows_of_a_call_share_nothing():
    """An invalid row leaves its neighbours as they are, in either precision of an int8 head."""
    for dtype in (BF16, FLOAT):
        case = int8_case(12, 64, 200, dtype)
        right = outputs_of(launch_of(case, decides=False))
        case.hidden[3, 5], case.hidden[7] = float("inf"), float("nan")
        got = outputs_of(launch_of(case, decides=False))
        assert got["status"].tolist() == [int(row in (3, 7)) for row in range(12)]
        others = [row for row in range(12) if row not in (3, 7)]
        assert_same({name: value[others] for name, value in got.items()}, {n: v[others] for n, v in right.items()})
