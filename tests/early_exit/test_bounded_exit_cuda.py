"""Early exit with bounds in CUDA, emulated: parts, launches, bytes, rows, schedules, sanitizers, mutants."""

import pytest
import torch

from specdec_ops import HeadBounds, bound_head, early_exit, quantize_head
from tests.early_exit.exit_cases import ExitCase, make_case
from tests.early_exit.test_exit_confidence import DTYPES, FIGURES
from tests.early_exit.test_exit_confidence_cuda import BF16, DECISION, FLOAT, HALF, launch_of, outputs_of, whole
from tests.emulator import build, kernels
from tests.emulator.checks import NO_FENCE, assert_race, assert_same, launch_tests, reveals

if reason := build.why_not():
    pytest.skip(reason, allow_module_level=True)

ENDS = (70, 256, 300, 801)  # inside of tiles, at their end, and less than one
NEVER = torch.tensor(float("nan"))  # a threshold that decides nothing


def fading_case(rows, dim, vocab, dtype, int8=False, fade=5, **options):
    """A head whose rows become shorter, and hidden rows of all lengths: some are sure after any part."""
    case = make_case(rows, dim, vocab, FLOAT, **options)
    case.head *= torch.linspace(0, -fade, vocab).exp()[:, None]
    generator = torch.Generator().manual_seed(rows)
    chosen = torch.randint(vocab // 8, (rows,), generator=generator)
    case.hidden[::2] += 1.5 * case.head[chosen[::2]]
    case.hidden *= torch.linspace(0.3, 2, rows)[:, None]
    case = case.to(dtype)
    if int8:
        case.head = quantize_head(case.head.float())
    return case


def bounded_launch(case, ends=ENDS, threshold=0.4, **options):
    return launch_of(case, threshold=threshold, bounds=bound_head(case.head, ends), **options)


def whole_outputs(launch):
    """What the same call gives without bounds."""
    return outputs_of(whole(launch))


def assert_decided_alike(got, expected):
    """The decision, and the tokens of the rows that exit."""
    assert_same({name: got[name] for name in DECISION}, {name: expected[name] for name in DECISION})
    exited = expected["exited"]
    for name in ("token", "top_tokens"):
        if name in expected:
            assert torch.equal(got[name][exited], expected[name][exited]), name


def assert_near_whole(got, expected, rows=slice(None)):
    """Stats but for the order of their sums."""
    for name in FIGURES:
        torch.testing.assert_close(got[name][rows], expected[name][rows], rtol=2e-5, atol=2e-6, msg=name)


@pytest.mark.parametrize("int8", [False, True], ids=["same", "int8"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [3, 12, 30, 70])
def test_every_number_of_rows(rows, dtype, int8):
    """The whole head's decisions, and the reference's parts; several blocks of rows in the last one."""
    case = fading_case(rows, 40 + rows, 801, dtype, int8, norm=rows % 2 == 1, bias=rows == 12)
    launch = bounded_launch(case, top_k=3)
    got, expected = outputs_of(launch), whole_outputs(launch)
    assert_decided_alike(got, expected)
    assert_near_whole(got, expected, got["seen"] == 801)
    reference = early_exit(
        case.hidden, case.head, 0.4, top_k=3, bounds=bound_head(case.head, ENDS), **case.options, backend="torch"
    )
    assert (got["seen"] == reference.seen).float().mean() >= (0.9 if rows > 3 else 1)
    assert rows < 12 or len(got["seen"].unique()) >= 2


@pytest.mark.parametrize("measure", ["max_prob", "margin", "entropy"])
@pytest.mark.parametrize("level", ["row", "any", "all"])
@pytest.mark.parametrize("threshold", [0.02, 0.3, 0.9, 3.0])
def test_measures_and_levels(measure, level, threshold):
    """At levels any and all every row sees the same."""
    case = fading_case(14, 64, 801, BF16, temperatures=True)
    launch = bounded_launch(case, threshold=threshold, measure=measure, level=level, top_k=2)
    got, expected = outputs_of(launch), whole_outputs(launch)
    assert_decided_alike(got, expected)
    assert level == "row" or len(got["seen"].unique()) == 1


@pytest.mark.parametrize("multiprocessors", [1, 3, 132])
def test_however_many_multiprocessors(multiprocessors):
    """Blocks with many tiles, and parts with fewer tiles than the others; a threshold for each row."""
    case = fading_case(20, 64, 1700, HALF, bias=True)
    thresholds = torch.linspace(0, 1, 20)
    ends = (1, 200, 1300, 1301, 1700)
    launch = bounded_launch(case, ends, thresholds, multiprocessors=multiprocessors, top_k=16)
    got, expected = outputs_of(launch), whole_outputs(launch)
    assert_decided_alike(got, expected)
    assert_near_whole(got, expected, got["seen"] == 1700)


@pytest.mark.parametrize("parts", [1, 2, 16])
def test_all_parts_are_the_whole_head(parts):
    """Where nothing can be decided before the end."""
    case = fading_case(9, 48, 640, FLOAT, norm=True, bias=True)
    ends = tuple(640 * part // parts for part in range(1, parts + 1))
    got = outputs_of(bounded_launch(case, ends, NEVER, top_k=16))
    expected = outputs_of(launch_of(case, threshold=NEVER, top_k=16))
    assert got["seen"].eq(640).all()
    assert_same({"top_tokens": got["top_tokens"]}, {"top_tokens": expected["top_tokens"]})
    assert_near_whole(got, expected)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int8], ids=str)
def test_a_row_does_not_depend_on_the_others(dtype):
    """Not in a single bit: neither on how many there are, nor on when they close."""
    case = fading_case(70, 56, 801, BF16 if dtype == torch.int8 else dtype, dtype == torch.int8, norm=True)
    together = outputs_of(bounded_launch(case, top_k=3))
    assert len(together["seen"].unique()) >= 2
    for rows in (slice(0, 1), slice(69, 70), slice(11, 20), slice(5, 45)):
        part = ExitCase(case.hidden[rows], case.head, case.options)
        got = outputs_of(bounded_launch(part, top_k=3))
        names = [name for name in got if name not in ("active_rows", "inverse", "num_active")]
        assert_same({name: got[name] for name in names}, {name: together[name][rows] for name in names})


def test_one_launch_for_each_part_and_one_more():
    """Whether rows are open or not."""
    case = fading_case(5, 64, 801, BF16)
    for threshold in (NEVER, 2.0, 0.4):
        launch = bounded_launch(case, threshold=threshold)
        before = kernels.launches("bounded_exit")
        kernels.run(launch)
        assert kernels.launches("bounded_exit") - before == len(ENDS) + 1


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int8], ids=str)
def test_what_is_read(dtype):
    """Of the head the parts that some row needs, once; of the hidden rows only those that are open, for each tile."""
    element = BF16 if dtype == torch.int8 else dtype
    case = fading_case(8, 64, 801, element, dtype == torch.int8, bias=True)
    read = []
    for threshold in (2.0, 0.4, NEVER):
        launch = bounded_launch(case, threshold=threshold)
        moved, seen = kernels.traffic(launch), launch.tensors["seen"]
        head, hidden = launch.tensors["head"], launch.tensors["hidden"]
        assert moved["head"].read == int(seen.max()) * 64 * head.element_size()
        assert moved["head"].written == moved["hidden"].written == 0
        row_bytes, visits, begin = 64 * hidden.element_size(), 8, 0
        for end in ENDS:
            tiles = -(-(end - begin) // 128)
            blocks = min(tiles, 2 * kernels.MULTIPROCESSORS) if dtype in (HALF, torch.int8) else 0
            visits += int((seen >= end).sum()) * (tiles + blocks)
            begin = end
        assert moved["hidden"].read == visits * row_bytes
        read.append(int(seen.max()))
    assert read[0] == ENDS[0] and read[-1] == ENDS[-1]


def test_masks_and_what_is_invalid():
    """Masks over any part, NaN in a row, in a bias and among the bounds: the whole head's decisions."""
    masks = [slice(0, 70), slice(70, 801), slice(256, 801), slice(0, 801), slice(2, 799)]
    for index, mask in enumerate(masks):
        case = fading_case(10, 64, 801, BF16)
        case.options["bias"] = torch.zeros(801)
        case.options["bias"][mask] = float("-inf")
        case.hidden[3, 5], case.hidden[7] = float("inf"), float("nan")
        launch = bounded_launch(case, top_k=4)
        got = outputs_of(launch)
        assert_decided_alike(got, whole_outputs(launch))
        assert index not in (1, 2) or got["seen"].max() <= mask.start
    for name, place, value in (("bias", 800, NEVER), ("norms_after", 0, NEVER), ("norms_after", 0, float("inf"))):
        case = fading_case(10, 64, 801, BF16, bias=True)
        launch = bounded_launch(case, (300, 801), 2.0)
        assert outputs_of(launch)["seen"].eq(300).all()
        launch.tensors[name][place] = value
        got = outputs_of(launch)
        assert_decided_alike(got, whole_outputs(launch))
        assert got["seen"].eq(801).all()


def test_rows_of_a_call_share_nothing():
    """An invalid row leaves its neighbours as they are."""
    for int8 in (False, True):
        case = fading_case(12, 64, 801, BF16, int8)
        right = outputs_of(bounded_launch(case))
        case.hidden[3, 5], case.hidden[7] = float("inf"), NEVER
        got = outputs_of(bounded_launch(case))
        assert got["status"].tolist() == [int(row in (3, 7)) for row in range(12)]
        others = [row for row in range(12) if row not in (3, 7)]
        names = (*FIGURES, "token", "status", "seen", "exited")
        assert_same({name: got[name][others] for name in names}, {name: right[name][others] for name in names})


@pytest.mark.parametrize("factor", [2.0**-30, 2.0**12, 2.0**60])
def test_rows_of_any_length(factor):
    """What float16 numbers can't hold, and products near the end of float32."""
    for dtype in (FLOAT, BF16):
        case = fading_case(9, 48, 801, dtype, int8=dtype == BF16)
        case.hidden *= factor
        launch = bounded_launch(case, temperature=factor)
        assert_decided_alike(outputs_of(launch), whole_outputs(launch))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int8], ids=str)
def test_result_does_not_depend_on_where_rows_start(dtype):
    case = fading_case(3, 64, 801, BF16 if dtype == torch.int8 else dtype, dtype == torch.int8, norm=True)
    launch = bounded_launch(case)
    expected = outputs_of(launch)
    for name in ("hidden", "head", "norm_weight"):
        tensor = launch.tensors[name]
        memory = torch.zeros(tensor.numel() + 3, dtype=tensor.dtype)
        launch.tensors[name] = memory[3:].view(tensor.shape).copy_(tensor)
    assert_same(outputs_of(launch), expected)


def test_scratch_is_what_blocks_leave():
    """A slot more than exit_confidence has; nothing is written where no row is open."""
    launch = bounded_launch(fading_case(5, 64, 801, BF16), threshold=2.0, top_k=7)
    slots = 2 * kernels.MULTIPROCESSORS + 1
    lists = 2 * (5 + 1) * 4
    assert launch.tensors["scratch"].numel() == (5 * slots * (16 + 7 * 8) + 8) + 5 * 16 + 15 * 32 * 4 + lists
    state = 16 + 7 * 8
    # The first state and two numbers of each row; one block's state of the first part and what is carried on; the ends
    # of the lists.
    assert kernels.traffic(launch)["scratch"].written == 5 * (state + 16) + 2 * 5 * state + (len(ENDS) - 1) * 4


def test_scratch():
    """A slot more for each row, its two numbers, the biases of 15 parts, and two lists of rows."""
    hidden, head = (torch.empty(count, 64, device="meta") for count in (60, 128_256))
    bounds = HeadBounds((1000, 128_256), torch.empty(2, device="meta"))
    needs = kernels.needs_of(lambda: early_exit(hidden, head, 0.5, top_k=10, bounds=bounds), multiprocessors=132)
    assert needs == (60 * 265 * (16 + 80) + 60 * 16 + 15 * 32 * 4 + 496, 9)


LAUNCHES = {
    "bf16": lambda: bounded_launch(fading_case(9, 80, 801, BF16, norm=True, bias=True), top_k=5),
    "many rows": lambda: bounded_launch(fading_case(67, 40, 801, BF16, norm=True), (100, 500, 801)),
    "f16": lambda: bounded_launch(fading_case(18, 72, 801, HALF, temperatures=True, norm=True), top_k=16),
    "f32": lambda: bounded_launch(fading_case(9, 50, 801, FLOAT, bias=True), level="all", measure="entropy"),
    "int8": lambda: bounded_launch(fading_case(12, 72, 801, BF16, True, norm=True), measure="margin", level="any"),
    "closed": lambda: bounded_launch(fading_case(3, 37, 801, HALF, norm=True), threshold=2.0),
}
test_sanitizers_find_nothing, test_every_order_gives_the_same = launch_tests(LAUNCHES)


# What a line of the kernels is for: (file, the line, what becomes of it). ThreadSanitizer finds each.
MUTANTS = {
    "no fence before a block says that it is done": NO_FENCE,
    "no barrier before what is carried is replaced": (
        "exit_confidence.cuh",
        "    warp_sync();  // all lanes have read what is carried\n",
        "",
    ),
    "no barrier between thread 0 and the block's share": (
        "exit_confidence.cuh",
        "  block_sync();\n  const ExitShared",
        "  const ExitShared",
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_planted_bug_in_shared_work(name):
    assert_race(LAUNCHES["f16"](), *MUTANTS[name], only="exit_confidence_f16")


# (file, the line, what becomes of it, the one kernel file that is compiled with it). Each changes a result, or fails.
PART, MEASURE = "exit_confidence_bf16", "bounded_exit"
WRONG = {
    "what is carried left out": ("exit_confidence.cuh", "launch.part.seen != nullptr ? 1 : 0;", "0;", PART),
    "nothing carried on": ("exit_confidence.cuh", "    stored.leave(row, 0, state, own, lane);\n", "", PART),
    "entries that begin at 0 in each part": (
        "exit_confidence.cuh",
        "key_further_on(own, launch.part.begin)",
        "own",
        PART,
    ),
    "an empty part that does not say so": ("exit_confidence.cuh", "launch.part.open[p.rows] = 0;", "return;", PART),
    "rows that no part lists": ("exit_part.cuh", "if (goes_on) launch.part.open", "if (false) launch.part.open", PART),
    "rows that close as soon as they must pass": ("exit_part.cuh", "!row_settled(verdict)", "!verdict.yes", PART),
    "a ceiling without the biases": ("exit_part.cuh", "launch.part.biases == nullptr ?", "true ?", PART),
    "a ceiling of the lanes' own rows": ("exit_part.cuh", "reach[2 * int64_t(row)]", "reach[0]", PART),
    "half of the bias blocks": ("bounded_exit.cuh", "share * each", "share / 2 * each", MEASURE),
    "lengths without the norm": ("bounded_exit.cuh", "norm * sqrt(weighed)", "sqrt(weighed) / 1e3", MEASURE),
    "dims that are not measured": ("bounded_exit.cuh", "dim < p.dim", "dim < 8", MEASURE),
    "states that begin with anything": ("bounded_exit.cuh", "< kWarpSize) stored.leave", "< 0) stored.leave", MEASURE),
}


def revealing_launches():
    """Calls whose rows close after every part, turn with the last biases, or close before the last part but one."""
    spread = fading_case(24, 80, 801, BF16, fade=10)
    spread.hidden *= torch.linspace(0.3, 1.5, 24, dtype=BF16)[:, None]
    biased = ExitCase(spread.hidden, spread.head, {"bias": torch.zeros(801)})
    biased.options["bias"][290:300], biased.options["bias"][795:] = 0.5, 1.0
    normed = fading_case(24, 80, 801, BF16, fade=10, norm=True)
    soon = fading_case(24, 80, 801, BF16, fade=30).first(13)
    return [bounded_launch(case, top_k=5) for case in (spread, biased, normed, soon)]


def test_revealing_launches_reveal():
    """They are what they are said to be."""
    seen = [outputs_of(launch)["seen"].unique().tolist() for launch in revealing_launches()]
    assert all(len(ends) >= 3 for ends in seen[:3]), seen
    assert seen[3] == list(ENDS[:2])


@pytest.mark.parametrize("name", WRONG)
def test_planted_bug_in_numbers(name):
    assert any(reveals(launch, *WRONG[name]) for launch in revealing_launches())
