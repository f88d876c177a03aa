"""The CUDA kernels of acceptance and sampling, emulated: both paths, launches, bytes, schedules, sanitizers, mutants.

Their values are also tested with all other backends', in test_accept.py and test_sampling.py.
"""

import functools
from unittest import mock

import pytest
import torch

from specdec_ops import chain_accept, sample_children, sample_tokens
from specdec_ops._core import dispatch
from tests.acceptance.accept_cases import RULES, Bands, chain, make_case, random_parents, star
from tests.emulator import build, kernels, mutants
from tests.emulator.checks import NO_FENCE, assert_race, assert_same, launch_tests, outputs, reveals

if reason := build.why_not():
    pytest.skip(reason, allow_module_level=True)

PATHS = ("lazy", "eager")
LAWS = {
    "temperature": torch.tensor([0.7, 1.3, 0.0]),
    "top_k": torch.tensor([0, 40, 3], dtype=torch.int32),
    "top_p": torch.tensor([0.9, 1.0, 0.5]),
}


def emulated(function, op, path="auto"):
    """The result of a public op on one of the paths."""
    implementation = functools.partial(kernels.IMPLEMENTATIONS[op], path=kernels.PATHS[path])
    with mock.patch.object(dispatch, "resolve", lambda *_: implementation):
        return function(backend=kernels.BACKEND)


def accepted(case, path):
    """The result of a case on one of the paths."""
    return emulated(case.run, "accept", path)


def accept_launch(case, path):
    return kernels.launch_of(functools.partial(case.run, "auto"), path=path)


def options_of(rule, distributions=True):
    options = {"width": 3} if rule == "longest" else {}
    return {**options, **LAWS} if distributions and rule != "greedy" else options


def trees_of(rule, sizes=(9, 1, 7)):
    return [random_parents(size, size, 3 if rule == "longest" else 1) for size in sizes]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("rule", RULES)
def test_both_paths_are_right(rule, path):
    """Several warps and filters; then several spans of a row, with rows of their own, maps and deterministic drafts."""
    bands = Bands()
    for vocab, seed in ((1100, 0), (17_001, 1)):
        trees = trees_of(rule, (6, 1, 4) if vocab > 10_000 else (9, 1, 7))
        case = make_case(rule, trees, vocab, seed=seed, **options_of(rule, vocab < 10_000))
        bands.check(case, accepted(case, path))
    bands.assert_rare()


@pytest.mark.parametrize("rule", ["recursive", "traversal"])
@pytest.mark.parametrize("options", [{"draft_rows": "child"}, {"draft_vocab": 500, **LAWS}, {"one_hot": True, **LAWS}])
def test_eager_drafts(rule, options):
    """Distributions of rows for single nodes, of a reduced vocabulary, and no draft rows at all."""
    bands = Bands()
    for seed in range(2):
        case = make_case(rule, trees_of(rule), 900, seed=seed, **options)
        bands.check(case, accepted(case, "eager"))
    bands.assert_rare()


@pytest.mark.parametrize("path", PATHS)
def test_odd_rows(path):
    """NaN, +inf and all -inf rows: a status, a defined token, and neighbours untouched."""
    case = make_case("recursive", [chain(4)] * 4, 300, gap=0.1)
    case.target[0, 0, 7] = float("nan")
    case.target[1, 1, 9] = float("inf")
    case.target[2, 0] = float("-inf")
    case.draft[3, 0, 250] = float("nan")
    Bands().check(case, accepted(case, path))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("top", [{"top_k": 700}, {"top_p": 0.6}, {"top_k": 900, "top_p": 0.5}], ids=str)
def test_cuts_among_equals(path, top):
    """More equal logits than candidates fit: the cut goes by id, in several histograms."""
    case = make_case("recursive", [chain(3)] * 2, 3000, **top)
    case.target[:] = case.target.round()
    case.target[0, :, ::2] = 9.0
    case.target[1] = 0.0
    Bands().check(case, accepted(case, path))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_result_does_not_depend_on_where_rows_start(dtype):
    """Not in a single bit: sums go by the tokens' ids, whatever the alignment."""
    case = make_case("recursive", trees_of("recursive"), 1003, dtype=dtype, **LAWS)
    results = []
    for shift in (0, 1, 3):
        memory = torch.full((case.target.shape[0], case.target.shape[1], 1003 + 5), float("nan"), dtype=dtype)
        view = memory[..., shift : shift + 1003]
        launch = accept_launch(case.changed(target=view.copy_(case.target)), "lazy")
        assert launch.tensors["target"].data_ptr() % 16 == shift * dtype.itemsize % 16
        kernels.run(launch)
        results.append(outputs(launch))
    for other in results[1:]:
        assert_same(other, results[0])


def test_launches():
    """One, three, and never more; which of them is decided by shapes."""
    small = make_case("recursive", [chain(3)], 100)
    ids = make_case("greedy", [chain(3)], 100).changed(target=torch.zeros(1, 3, dtype=torch.int32))
    large = make_case("greedy", [star(3)], 16_384)
    expectations = [(small, "lazy", 1), (small, "eager", 3), (small, "auto", 1), (ids, "eager", 1)]
    for case, path, expected in [*expectations, (large, "auto", 3)]:
        before = kernels.launches("accept")
        accepted(case, path)
        assert kernels.launches("accept") - before == expected
    before = kernels.launches("sample")
    emulated(functools.partial(sample_tokens, torch.randn(2, 9000), seeds=1, positions=2), "sample")
    assert kernels.launches("sample") - before == 1


def test_which_rows_are_read_by_many_blocks():
    """Those of up to 512 nodes in a batch: 8 requests with 61 nodes each, and 9 no more. Short rows never."""

    def counters(batch, vocab):
        rows = torch.empty(batch, 61, vocab, device="meta")
        tokens = torch.empty(batch, 60, dtype=torch.int32, device="meta")
        call = functools.partial(chain_accept, rows, tokens, rows[:, 1:], rule="token", seeds=0, positions=0)
        return kernels.needs_of(call)[1]

    assert counters(8, 128_256) == counters(8, 16_384) == 8 * (2 * 61 + 1)
    assert counters(9, 128_256) == counters(8, 16_383) == 0


def test_scratch():
    """Rules that keep nothing need none; the eager path keeps a table, and one counter for each row."""

    def needs(rule, batch, path):
        rows = torch.empty(batch, 60, 128_256, device="meta")
        tokens = torch.empty(batch, 59, dtype=torch.int32, device="meta")
        options = {"rule": rule, "seeds": 0, "positions": 0}
        return kernels.needs_of(lambda: chain_accept(rows, tokens, rows[:, 1:], **options), path=path)

    assert needs("token", 8, "lazy") == (0, 0)
    scratch, counters = needs("block", 8, "lazy")
    assert 0 < scratch < 8 * 60 * 256 and counters == 0
    scratch, counters = needs("token", 2, "eager")
    assert 0 < scratch < 2 * 100_000 and counters == 2 * (2 * 60 + 1)


ROW = 4096


def moved(case, path):
    """(bytes read of the target, of the draft) in rows of 16 bits, and what was accepted."""
    launch = accept_launch(case, path)
    traffic = kernels.traffic(launch)
    rows = [traffic[name].read / (2 * ROW) if name in traffic else 0.0 for name in ("target", "draft_logits")]
    return *rows, launch.tensors["num_accepted"].tolist()[0]


@pytest.mark.parametrize("gap", [0.0, 3.0])
def test_lazy_reads_rows_of_the_path_only(gap):
    """The roofline is (accepted + 1) rows of the target, and of the draft where one decides. Greedy acceptance reads
    just that. A stochastic rule reads the end's rows once more for its race, and single logits: less than 1% of a row.
    """
    trees = [random_parents(24, 3)]
    target, _, count = moved(make_case("greedy", trees, ROW, dtype=torch.bfloat16, gap=gap), "lazy")
    assert target == count + 1
    case = make_case("recursive", [chain(6)], ROW, dtype=torch.bfloat16, gap=gap)
    target, draft, count = moved(case, "lazy")
    rejected = count < 5
    assert rejected == (gap > 0)
    assert count + 2 <= target < count + 2.01
    assert count + 2 * rejected <= draft < count + 2 * rejected + 0.01


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("children", [3, 20, 32])
def test_children_cost_one_logit_each(path, children):
    """Of the target and of the draft, beside whole rows: the first question brings those of all siblings at once."""
    case = make_case("recursive", [star(children)], ROW, dtype=torch.bfloat16, gap=30.0)
    launch = accept_launch(case, path)
    traffic = kernels.traffic(launch)
    assert launch.tensors["num_accepted"].tolist() == [0]
    for name in ("target", "draft_logits"):
        assert traffic[name].read % (2 * ROW) == 2 * children


def test_eager_reads_every_row_once():
    """Those of nodes that exist, and the end's once more; draft rows that have no child are not read."""
    case = make_case("recursive", [chain(6)], ROW, dtype=torch.bfloat16, gap=0.0)
    target, draft, count = moved(case, "eager")
    assert count == 5
    assert 7 <= target < 7.01
    assert 5 <= draft < 5.01


def test_sampling_reads_a_row_twice():
    """Once for the distribution, once (from the cache) for the race; at temperature 0 once."""
    logits = torch.randn(3, ROW).to(torch.bfloat16)
    for temperature, rows in ((1.0, 6), (0.0, 3)):
        function = functools.partial(sample_tokens, logits, seeds=1, positions=2, temperature=temperature)
        launch = kernels.launch_of(function)
        assert kernels.traffic(launch)["logits"].read == rows * 2 * ROW


def children_launch(vocab=9001, **options):
    logits = torch.randn(2, 2, vocab)
    noise = {"seeds": torch.tensor([5, 6]), "positions": torch.tensor([3, 4], dtype=torch.int32), "first_parent": 0}
    return kernels.launch_of(functools.partial(sample_children, logits, 3, **noise, **options))


def accept_case(rule, path, vocab=600, **options):
    case = make_case(rule, trees_of(rule, (6, 1, 5)), vocab, seed=3, **{**options_of(rule), **options})
    return accept_launch(case, path)


SHARP = torch.tensor([0.02, 1.3, 0.0])
LAUNCHES = {
    "recursive": lambda: accept_case("recursive", "lazy", temperature=SHARP),
    "child rows": lambda: accept_case("traversal", "lazy", draft_rows="child"),
    "vocab map": lambda: accept_case("kseq", "lazy", draft_vocab=300, dtype=torch.bfloat16),
    "longest": lambda: accept_case("longest", "lazy", dtype=torch.float16, temperature=SHARP),
    "typical": lambda: accept_case("typical", "eager"),
    "spans": lambda: accept_case("traversal", "eager", vocab=8300, temperature=SHARP),
    "children": lambda: children_launch(temperature=torch.tensor([0.002, 1.0])),
    "cut children": lambda: children_launch(top_p=0.9),
}
test_sanitizers_find_nothing, test_every_order_gives_the_same = launch_tests(LAUNCHES, seeds=3)


# What a line of the kernels is for: (file, the line, what becomes of it). ThreadSanitizer finds each.
MUTANTS = {
    "no fence before a block says that it is done": NO_FENCE,
    "no barrier between the histogram and its sums": (
        "cuda/top_k_top_p.cuh",
        "bins[kCutBins - 1], last);\n  team.sync();",
        "bins[kCutBins - 1], last);",
    ),
    "no barrier after the bins are cleared": (
        "cuda/top_k_top_p.cuh",
        "bins[bin] = 0;\n  team.sync();",
        "bins[bin] = 0;",
    ),
    "one slot for all reductions": ("block_team.cuh", "turn_ ^= 1;", "turn_ = 0;"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_planted_bug_in_shared_work(name):
    assert_race(children_launch(top_p=0.9, vocab=8300), *MUTANTS[name])


def test_planted_bug_in_the_excluded_tokens():
    """Bits that are left of something earlier keep their tokens from being drawn."""
    case = make_case("recursive", [star(3)] * 40, 5, gap=3.0)
    right = accepted(case, "lazy")
    launch = accept_launch(case, "lazy")
    changed = ("acceptance/cuda/accept.cuh", "shared.bits[word] = 0;", "shared.bits[word] = 5;")
    got = mutants.replay(launch, "plain", *changed)
    assert not torch.equal(got["tokens"], right.tokens)


# What is loaded before it is asked for.
AHEAD = {
    "logits of another node's children": ("cuda/accept.cuh", "known.row != task.row", "known.row < 0"),
    "logits of a sibling": ("cuda/accept.cuh", "known.logit[at]", "known.logit[at ^ 1]"),
    "the draft's chunk of before": ("cuda/row.cuh", "    raw_other = next_other;\n", ""),
}


@pytest.mark.parametrize("name", AHEAD)
def test_planted_bug_in_what_is_loaded_ahead(name):
    """Trees of two levels: with few tokens, that children of different nodes share; or rows of several steps."""
    vocab, count = (9000, 12) if "chunk" in name else (6, 40)
    case = make_case("recursive", [[-1, 0, 0, 1, 1, 2, 2]] * count, vocab, gap=2.0)
    assert reveals(accept_launch(case, "lazy"), *AHEAD[name])


# What is left of a draft row: (the test of it, logits of the draft, temperature). A difference that is never summed,
# and a sum that is never stated anew, lose the later of sharp siblings.
SHARP_MUTANTS = [
    ("s.left >= kSafePart * s.summed", [4.0, 0.0, -0.5, -1.5], 0.1),
    ("s.left >= kLeastLeft", [0.0, -7.0, -14.0, -21.0], 0.02),
]


@pytest.mark.parametrize(("statement", "draft", "temperature"), SHARP_MUTANTS)
def test_planted_bug_in_what_is_left_of_a_draft(statement, draft, temperature):
    count, draft = 150, torch.tensor(draft)
    case = make_case("recursive", [star(3)] * count, 4, temperature=temperature)
    noise = {"seeds": torch.arange(count), "positions": 0, "first_parent": 0}
    drawn = sample_children(draft.expand(count, 1, 4), 3, temperature=temperature, backend="torch", **noise)
    case.tokens[:, 1:], case.draft[:] = drawn.tokens[:, 0], draft
    case.target[:] = temperature * torch.randn(4)
    right, launch = accepted(case, "lazy"), accept_launch(case, "lazy")
    assert torch.equal(accepted(case, "eager").tokens, right.tokens)
    got = mutants.replay(launch, "plain", "acceptance/walk_rejection.h", f"if ({statement}", "if (true || false")
    assert (got["num_accepted"] != right.num_accepted).sum() > count // 20


def test_planted_bug_in_unlikely_children():
    """Scores that float32 can't hold, taken for sure: children are missing."""
    launch = children_launch(vocab=40, temperature=0.002)
    got = mutants.replay(
        launch, "plain", "acceptance/cuda/weighted_draw.cuh", "kLeastScore = 0x1p-92f", "kLeastScore = 0.0f"
    )
    assert (got["tokens"] < 0).any()
    kernels.run(launch)
    assert (launch.tensors["tokens"] >= 0).all()
