"""grow_tree and prune_tree against plain loops and EAGLE's own algorithm, and their edge cases."""

import copy
import math

import pytest
import torch

from specdec_ops import (
    CandidatePool,
    GrowStatus,
    VocabMap,
    grow_tree,
    prune_tree,
)
from tests.conftest import targets
from tests.emulator import kernels
from tests.topology.grow_cases import (
    CPU,
    TORCH,
    Round,
    assert_round,
    assert_tables,
    expected_pool,
    grown,
    pruned,
    random_round,
    tables_of,
)

OP = "grow_tree"
# (batch, levels, width, branching): widths below, at and above what a level has; more than a word of nodes; one level.
SHAPES = ((1, 6, 8, 8), (3, 4, 10, 10), (2, 3, 5, 2), (2, 3, 2, 9), (2, 12, 7, 3), (1, 1, 4, 6), (2, 5, 1, 1))
NAN, INF = math.nan, math.inf


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_plain_loops(shape, target):
    case = random_round(*shape, vocab=50)
    for nodes in (1, 2, 1 + case.branching, 61):
        assert_round(case, target, nodes)


def test_large_sizes(target):
    """Two words of ancestors and more, and a level of more candidates than a block has threads."""
    case = random_round(1, 3, 40, 4, vocab=300) if target.interpreted else random_round(2, 4, 40, 20, vocab=300)
    assert_round(case, target, 130)


def test_the_largest_width_and_branching(target):
    case = random_round(1, 3, 256, 64 if not target.interpreted else 4, vocab=80)
    if target.interpreted:
        case = random_round(1, 3, 64, 16, vocab=80)
    assert_round(case, target, 300)


def test_a_pool_of_several_blocks_with_few_different_scores(target):
    """Equals at the cut, across warps and blocks of threads: the lower index stays."""
    generator = torch.Generator().manual_seed(3)
    case = random_round(1, 3, 16, 8, vocab=40) if target.interpreted else random_round(3, 5, 16, 16, vocab=40)
    for _, logprobs in case.levels:
        logprobs.copy_(-torch.randint(1, 3, logprobs.shape, generator=generator) / 2)
    for nodes in (17, 150, 400):
        assert_round(case, target, nodes)


def test_logprobs_above_0_count_as_0(target):
    """Rounding of a log-softmax may give them. A child would have passed its parent."""
    case = random_round(2, 3, 4, 4, vocab=20)
    for _, logprobs in case.levels:
        logprobs[:, :, 0] = 1e-7
    pool, _ = assert_round(case, target, 9)
    assert pool.scores.max() == 0
    scores, parents = pool.scores.cpu(), pool.parents.cpu()
    above = scores.gather(1, parents.clamp(min=0).long())
    assert (scores <= torch.where(parents >= 0, above, 0)).all()


ODD = {
    "NaN": (7, NAN, GrowStatus.LOGPROB_INVALID),
    "+inf": (7, INF, GrowStatus.LOGPROB_INVALID),
    "-inf": (7, -INF, 0),
    "padding": (-1, -0.1, 0),
    "padding beside NaN": (-1, NAN, 0),
    "negative": (-2, -0.1, GrowStatus.TOKEN_OUT_OF_RANGE),
    "smallest": (-(2**31), -0.1, GrowStatus.TOKEN_OUT_OF_RANGE),
    "negative and NaN": (-7, NAN, GrowStatus.TOKEN_OUT_OF_RANGE),
}


@pytest.mark.parametrize("odd", ODD)
def test_odd_candidates_are_none_and_spare_their_neighbours(odd, target):
    token, logprob, bits = ODD[odd]
    sound = random_round(3, 4, 4, 4, vocab=30)
    case = copy.deepcopy(sound)
    for level, place in ((0, (1, 0, 0)), (1, (1, 2, 1)), (3, (1, 0, 3))):
        case.levels[level][0][place], case.levels[level][1][place] = token, logprob
    pool, _ = assert_round(case, target, 20)
    assert pool.status.tolist() == [0, bits, 0]
    alone, _ = grown(sound, target)
    for name, table in tables_of(pool).items():
        assert torch.equal(table[[0, 2]], tables_of(alone)[name][[0, 2]]), name


def test_whole_rows_of_nothing(target):
    """Requests that have no candidate at level 0, none from level 1 on, fewer than the width at level 2."""
    case = random_round(4, 4, 4, 4, vocab=30)
    case.levels[0][1][0] = NAN
    case.levels[1][1][1] = -INF
    case.levels[2][0][2] = -1
    case.levels[2][0][2, 1, 2] = 5
    pool, tree = assert_round(case, target, 30)
    assert pool.topology.num_nodes.tolist() == [1, 5, 10, 13]
    assert tree.topology.num_nodes.tolist()[:2] == [1, 5]
    assert pool.status.tolist() == [GrowStatus.LOGPROB_INVALID, 0, 0, 0]


def test_scores_below_float32_are_none(target):
    case = random_round(1, 3, 2, 2, vocab=30)
    for _, logprobs in case.levels:
        logprobs[:, :, 1] = -3e38
    assert_round(case, target, 9)


def test_rows_behind_padding_are_not_looked_at(target):
    case = random_round(2, 3, 4, 4, vocab=30)
    case.levels[0][1][0, 0, 2:] = -INF  # rows 2 and 3 of level 1 follow nothing
    expected, _ = grown(case, target)
    for junk in ((3, 0.0), (-5, NAN), (2**31 - 1, INF)):
        case.levels[1][0][0, 2:], case.levels[1][1][0, 2:] = junk
        pool, _ = grown(case, target)
        assert_tables(tables_of(pool), tables_of(expected))
        assert pool.status.tolist() == [0, 0]


def test_ends_of_text_stay_and_are_not_expanded(target):
    case = random_round(3, 4, 4, 4, vocab=12, eos=(3, 5))
    pool, tree = assert_round(case, target, 30, eos=(3, 5))
    tokens, expanded = pool.tokens.cpu(), pool.expanded.cpu()
    ends = (tokens == 3) | (tokens == 5)
    assert ends.any()
    assert (expanded[ends] == -1).all()
    assert ((tree.tokens == 3) | (tree.tokens == 5)).any()
    case.options["eos"] = 3
    assert_round(case, target, 30, eos=(3,))


def test_nothing_but_ends_of_text(target):
    case = random_round(1, 3, 2, 2, vocab=30)
    case.levels[0][0].copy_(torch.tensor([[[4, 9]]]))
    case.options["eos"] = [9, 4]
    pool, tree = assert_round(case, target, 30, eos=(9, 4))
    assert pool.topology.num_nodes.tolist() == [1]
    assert tree.tokens.tolist()[0][:3] == [500, 4, 9]


def test_vocab_map(target):
    """Draft entries become target ids, before eos is looked for; entries that don't exist are none."""
    ids = [(7 * entry) % 200 for entry in range(30)]
    case = random_round(2, 3, 4, 4, vocab=30, eos=ids[3], vocab_map=VocabMap(ids, 200).to(target.device))
    case.levels[1][0][1, 0, 0] = 30
    case.levels[2][0][1, 1, 1] = 2**31 - 1
    pool, _ = assert_round(case, target, 30, eos=(ids[3],), draft_to_target=ids)
    assert pool.status.tolist() == [0, GrowStatus.TOKEN_OUT_OF_RANGE]
    assert set(pool.tokens.unique().tolist()) <= {-1, *ids}


def test_requests_that_no_longer_draft(target):
    """Request 0 stops before level 2, request 1 before level 0; their rows may hold anything then."""
    case = random_round(3, 4, 4, 4, vocab=30)
    pool = case.empty(target.device)
    stopped = copy.deepcopy(case)
    frontiers = []
    for level, (tokens, logprobs) in enumerate(stopped.levels):
        active = torch.tensor([level < 2, False, True])
        logprobs[~active], tokens[~active] = NAN, -9
        frontiers.append(
            grow_tree(
                pool, tokens.to(target.device), logprobs.to(target.device), level=level,
                active=active.to(target.device), backend=target.backend,
            )
        )  # fmt: skip
    for level, tokens in ((2, stopped.levels), (0, stopped.levels)):
        for part, _ in tokens[level:]:
            part[0 if level else 1] = -1
    assert_tables(tables_of(pool), expected_pool(stopped))
    assert pool.status.tolist() == [0, 0, 0]
    assert frontiers[1].tokens[0].min() >= 0
    assert frontiers[2].tokens[0].tolist() == [-1] * 4
    assert frontiers[0].tokens[1].tolist() == [-1] * 4


def test_a_round_may_end_early_and_a_pool_is_used_again(target):
    """Nothing is left of the round before."""
    long, short = random_round(2, 5, 4, 4, vocab=30), random_round(2, 5, 4, 4, vocab=30, seed=1)
    pool, _ = grown(long, target)
    pool.status.fill_(3)
    grown(short, target, pool, levels=2)
    assert_tables(tables_of(pool), expected_pool(short, levels=2))
    assert pool.status.tolist() == [0, 0]
    tree = pruned(pool, 50, target)
    assert tree.topology.num_nodes.tolist() == [21, 21]
    assert tree.topology.depths.max() == 2


def test_frontiers_of_other_widths(target):
    """A narrower level: the places of the others stay blank, and the next one has fewer rows."""
    case = random_round(2, 4, 6, 5, vocab=30)
    pool, widths = case.empty(target.device), (6, 2, 3, 0)
    rows = 1
    for level, ((tokens, logprobs), width) in enumerate(zip(case.levels, widths, strict=True)):
        given = [part[:, :rows].to(target.device) for part in (tokens, logprobs)]
        frontier = grow_tree(pool, *given, level=level, width=width, backend=target.backend)
        assert frontier.tokens.shape == (2, width)
        rows = width
    full, _ = grown(case, target)
    assert torch.equal(pool.candidates[:, :9], full.candidates[:, :9])
    assert (pool.candidates[:, 9:13] == -1).all()
    assert (pool.topology.ancestors[:, 9:13] == 0).all()
    assert (pool.topology.depths[:, 13:16] == 3).all()
    assert pool.topology.num_nodes.tolist() == [16, 16]
    assert pruned(pool, 70, target).topology.status.tolist() == [0, 0]


def test_levels_out_of_order_do_no_harm(target):
    """A level whose parents are not there has no candidates."""
    case = random_round(1, 4, 4, 4, vocab=30)
    pool = case.empty(target.device)
    for level in (0, 2, 3):
        tokens, logprobs = (part.to(target.device) for part in case.levels[level])
        frontier = grow_tree(pool, tokens, logprobs, level=level, backend=target.backend)
    assert frontier.tokens.shape == (1, 0)
    assert_tables(tables_of(pool), expected_pool(case, levels=1))


def test_a_request_depends_on_that_request_alone(target):
    case = random_round(5, 4, 6, 5, vocab=40, eos=2)
    case.levels[1][1][3] = NAN
    order = [3, 0, 4, 2, 1]
    pool, frontiers = grown(case, target)
    tree = pruned(pool, 25, target, 0)
    other_pool, other_frontiers = grown(case.requests(order), target)
    for name, table in tables_of(pool).items():
        assert torch.equal(table[order], tables_of(other_pool)[name]), name
    for one, other in zip(frontiers, other_frontiers, strict=True):
        assert torch.equal(one.scores[order], other.scores)
        assert torch.equal(one.parent_rows[order], other.parent_rows)
    assert torch.equal(tree.tokens[order, 1:], pruned(other_pool, 25, target, 0).tokens[:, 1:])
    alone, _ = grown(case.requests([4]), target)
    for name, table in tables_of(pool).items():
        assert torch.equal(table[[4]], tables_of(alone)[name]), name


@pytest.mark.parametrize("count", [1, 7])
def test_any_number_of_threads(count, threads):
    """Of a batch that is worth several."""
    threads(count)
    case = random_round(40, 4, 16, 16, vocab=40)
    pool, _ = grown(case, CPU)
    tree = pruned(pool, 60, CPU)
    wanted, _ = grown(case, TORCH)
    assert_tables(tables_of(pool), tables_of(wanted))
    assert torch.equal(tree.topology.ancestors, pruned(wanted, 60, TORCH).topology.ancestors)


def test_a_pool_that_someone_else_has_written_does_no_harm(target):
    """Parents that are nowhere are none."""
    case = random_round(4, 3, 4, 4, vocab=30)
    pool, _ = grown(case, target)
    pool.candidates.fill_(2**31 - 1)
    tokens, logprobs = (part.to(target.device) for part in case.levels[2])
    assert grow_tree(pool, tokens, logprobs, level=1, backend=target.backend).tokens.max() == -1


def test_empty_batches(target):
    case = random_round(0, 3, 4, 4)
    pool, frontiers = grown(case, target)
    assert frontiers[0].tokens.shape == (0, 4)
    tree = pruned(pool, 9, target)
    assert tree.tokens.shape == (0, 9)
    assert tree.topology.ancestors.shape == (0, 9, 1)


def test_inputs_may_be_views(target):
    case = random_round(2, 3, 4, 4, vocab=30)
    wide = [tuple(part.repeat_interleave(2, dim=2)[:, :, ::2] for part in level) for level in case.levels]
    pool, _ = grown(Round(wide, 4), target)
    assert_tables(tables_of(pool), expected_pool(case))


# The public side.


def test_pools():
    pool = CandidatePool.empty(2, levels=6, width=8, branching=8)
    assert (pool.batch, pool.size, pool.topology.nodes, pool.topology.words) == (2, 328, 41, 1)
    assert CandidatePool.empty(1, levels=8, width=10, branching=10).size == 710  # EAGLE's
    assert [pool.query_start(level) for level in range(6)] == [0, 1, 9, 17, 25, 33]
    assert repr(pool) == "<CandidatePool of 2 requests, 6 levels, width 8, branching 8, on cpu>"
    moved = pool.to("meta")
    assert (moved.device.type, moved.topology.device.type, moved.width) == ("meta", "meta", 8)
    tree = prune_tree(pool, 5, root_tokens=torch.tensor([4, 9]))
    assert tree.tokens.tolist() == [[4, -1, -1, -1, -1], [9, -1, -1, -1, -1]]
    assert tree.topology.num_nodes.tolist() == [1, 1]
    with pytest.raises(TypeError, match=r"^specdec_ops\.CandidatePool: a pool must be made by CandidatePool\.empty\("):
        CandidatePool()


POOL = CandidatePool.empty(2, levels=3, width=4, branching=3)
TOKENS, LOGPROBS = torch.zeros(2, 4, 3, dtype=torch.int32), torch.zeros(2, 4, 3)
FIRST = {"top_tokens": TOKENS[:, :1], "top_logprobs": LOGPROBS[:, :1], "level": 0}


@pytest.mark.parametrize(
    ("changed", "kind", "message"),
    [
        ({"pool": 3}, TypeError, "pool must be a specdec_ops.CandidatePool, got 3"),
        ({"level": 3}, ValueError, "level must be an int from 0 to 2, got 3"),
        ({"level": -1}, ValueError, "level must be an int from 0 to 2, got -1"),
        ({"level": True}, TypeError, "level must be an int from 0 to 2, got True"),
        ({"width": 5}, ValueError, "width must be an int from 0 to 4, got 5"),
        ({"width": 1, "level": 2}, ValueError, "width must be an int from 0 to 0, got 1"),
        ({"width": 2.0}, TypeError, "width must be an int from 0 to 4, got 2.0"),
        (
            FIRST | {"level": 1, "top_logprobs": LOGPROBS},
            ValueError,
            "[2, 4, 3] like top_logprobs, got int32 [2, 1, 3]",
        ),
        ({"level": 0}, ValueError, "top_logprobs must be float32 [2, 1, 3] at level 0, got float32 [2, 4, 3]"),
        ({"top_logprobs": LOGPROBS[:, :0]}, ValueError, "float32 [2, rows, 3] with 1 to 4 rows, got float32 [2, 0, 3]"),
        ({"top_logprobs": LOGPROBS[0]}, ValueError, "top_logprobs must be float32 [2, rows, 3] with 1 to 4 rows, got"),
        ({"top_logprobs": LOGPROBS[:, :, :2]}, ValueError, "with 1 to 4 rows, got float32 [2, 4, 2]"),
        ({"top_logprobs": LOGPROBS.double()}, TypeError, "top_logprobs must be float32 [2, rows, 3], got float64"),
        ({"top_logprobs": None}, TypeError, "top_logprobs must be float32 [2, rows, 3], got None"),
        ({"top_logprobs": LOGPROBS.to("meta")}, ValueError, "top_logprobs must be on cpu, got a tensor on meta"),
        ({"top_tokens": TOKENS.float()}, TypeError, "top_tokens must be int32 or int64 [2, 4, 3], got float32"),
        ({"top_tokens": TOKENS.to("meta")}, ValueError, "top_tokens must be on cpu, got a tensor on meta"),
        ({"eos": -1}, ValueError, "eos must be None, an int or up to 8 ints, each from 0 to 2**31 - 1, got -1"),
        ({"eos": range(3)}, TypeError, "eos must be None, an int or up to 8 ints, got range"),
        ({"vocab_map": [1]}, TypeError, "vocab_map must be a specdec_ops.VocabMap or None, got list [1]"),
        (
            {"vocab_map": VocabMap([1], 9).to("meta")},
            ValueError,
            "vocab_map must be on cpu, got a tensor on meta",
        ),
        ({"active": torch.ones(2)}, TypeError, "active must be bool [2] or None, got float32 [2]"),
        ({"active": torch.ones(3).bool()}, ValueError, "active must be bool [2] or None, got bool [3]"),
        ({"active": torch.ones(2).bool().to("meta")}, ValueError, "active must be on cpu, got a tensor on meta"),
        ({"top_logprobs": LOGPROBS.clone().requires_grad_()}, RuntimeError, "but this op has no backward"),
        ({"backend": "best"}, ValueError, "backend must be one of auto, cuda, triton, cpu, torch, got 'best'"),
    ],
    ids=str,
)
def test_errors_of_growing(changed, kind, message):
    arguments = {"pool": POOL, "top_tokens": TOKENS, "top_logprobs": LOGPROBS, "level": 1, **changed}
    with pytest.raises(kind) as raised:
        grow_tree(arguments.pop("pool"), **arguments)
    assert str(raised.value).startswith("specdec_ops.grow_tree: ")
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("changed", "kind", "message"),
    [
        ({"batch": -1}, ValueError, "batch must be an int from 0 to 2147483647, got -1"),
        ({"levels": 0}, ValueError, "levels must be an int from 1 to 64, got 0"),
        ({"width": 257}, ValueError, "width must be an int from 1 to 256, got 257"),
        ({"branching": 65}, ValueError, "branching must be an int from 1 to 64, got 65"),
        ({"branching": 2.0}, TypeError, "branching must be an int from 1 to 64, got 2.0"),
    ],
    ids=str,
)
def test_errors_of_pools(changed, kind, message):
    sizes = {"batch": 1, "levels": 2, "width": 3, "branching": 4, **changed}
    with pytest.raises(kind, match=f"^specdec_ops\\.CandidatePool\\.empty: {message}$"):
        CandidatePool.empty(sizes.pop("batch"), **sizes)


def test_a_round_compiles_without_a_break():
    """The pool is written inside of the graph, and read behind it."""
    case = random_round(2, 3, 4, 4, vocab=30)
    roots = torch.tensor([1, 2], dtype=torch.int32)

    def step(pool, levels):
        frontiers = [grow_tree(pool, *level, level=at, eos=3) for at, level in enumerate(levels)]
        return frontiers[1].tokens, prune_tree(pool, 12, root_tokens=roots)

    plain, compiled = case.empty(), case.empty()
    expected_frontier, expected_tree = step(plain, case.levels)
    frontier, tree = torch.compile(step, fullgraph=True, backend="aot_eager")(compiled, case.levels)
    assert torch.equal(frontier, expected_frontier)
    assert_tables(tables_of(compiled), tables_of(plain))
    for name in ("tokens", "pool_ids", "expanded"):
        assert torch.equal(getattr(tree, name), getattr(expected_tree, name))
    assert torch.equal(tree.topology.ancestors, expected_tree.topology.ancestors)


def test_every_backend_that_grows_prunes_too():
    """The tests above run both ops on the backends of one of them."""
    assert targets("grow_tree") == targets("prune_tree")
    assert ("grow_tree" in kernels.IMPLEMENTATIONS) == ("prune_tree" in kernels.IMPLEMENTATIONS)
