"""path_invariant: a node of a tree gets, bit for bit, what plain decoding of its path gives. Values, bits, refusals."""

import dataclasses
import functools

import pytest
import torch

from specdec_ops import AttentionState, Topology, Tree, tree_attention
from specdec_ops._core import dispatch, loader
from tests.attention import path_cases
from tests.attention.attention_cases import NAN, assert_right, chain, forest, make_case, random_tree, star
from tests.attention.path_cases import run, same_bits, state_of, wrong_nodes
from tests.attention.test_tree_attention_unseen import CASES, VALUES
from tests.attention.unseen_cases import assert_each_row_shows_what_it_sees, poison, taint

ISAS = ("generic", "avx2", "avx512", "avx512_bf16", "amx")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# The last two instruction sets add bfloat16 only: for other dtypes avx512 runs under their names.
BY_ISA = [(isa, dtype) for isa in ISAS for dtype in DTYPES if dtype == torch.bfloat16 or ISAS.index(isa) < 3]
kernels, reason = loader.load()
pytestmark = pytest.mark.skipif(kernels is None, reason=str(reason))

# Contexts around the borders of chunks of 256 positions; one head to a kv head and several; all kinds of layouts.
BITS = {
    "no context": dict(trees=[random_tree(20, 1), forest(7)], contexts=[0, 1], heads=4, kv_heads=2),
    "at a border": dict(trees=[random_tree(25, 2)] * 3, contexts=[255, 256, 257], heads=3, kv_heads=1),
    "across it": dict(trees=[chain(9), random_tree(40, 3)], contexts=[250, 511], heads=2, kv_heads=2, page_size=16),
    "many rows": dict(trees=[random_tree(70, 4)], contexts=[300], heads=8, kv_heads=2, dim=128),
    "many heads": dict(trees=[star(5), chain(3)], contexts=[513, 40], heads=16, kv_heads=1, dim=80, packed=True),
    "window": dict(trees=[random_tree(30, 5), forest(9)], contexts=[254, 600], window=9, heads=6, kv_heads=2, dim=48),
    "wide window": dict(trees=[random_tree(30, 6)], contexts=[700], window=300, heads=2, kv_heads=2, page_size=7),
    "all options": dict(
        trees=[random_tree(20, 7), chain(6)], contexts=[130, 255], window=200, softcap=3.0, alibi=True, sinks=True,
        scale=0.2, v_scale=0.5, heads=4, kv_heads=1, page_size=5, packed=True,
    ),
    "a level": dict(trees=[random_tree(30, 8)] * 2, contexts=[260, 90], first_nodes=[21, 25], queries=9, heads=4),
    "negative scale": dict(trees=[random_tree(12, 9)], contexts=[255], scale=-0.1, heads=4, kv_heads=4, dim=16),
}  # fmt: skip


def least_tree_rows(case) -> int:
    """Without a topology a row stands behind its context, which windows and ALiBi can tell."""
    return 1 if {"window", "alibi_slopes"} & set(case.options) else 0


@pytest.mark.parametrize(("isa", "dtype"), BY_ISA, indirect=["isa"], ids=str)
@pytest.mark.parametrize("name", BITS)
def test_a_node_gets_what_decoding_its_path_gives(isa, dtype, name, threads):
    """In value as good as the definition, and the same bits with one row, another division and another layout."""
    case = make_case(**BITS[name], dtype=dtype)
    threads(1)
    alone = assert_right(case, "cpu", path_invariant=True)
    threads(2)
    assert same_bits(run(case), alone)
    assert wrong_nodes(case, least_tree_rows=least_tree_rows(case)) == []


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_do_not_depend_on_other_rows(isa, dtype):
    """Any number of neighbours: blocks of rows of all sizes give the bits of one row."""
    case = make_case([chain(70)], [290], heads=2, kv_heads=2, dtype=dtype)
    whole = run(case)
    for first, count in ((0, 1), (3, 2), (5, 3), (9, 4), (2, 5), (11, 9), (20, 10), (1, 15), (30, 17), (7, 33)):
        part = dataclasses.replace(case, q=case.q[:, first : first + count], options={"query_start": first})
        rows = slice(first, first + count)
        assert same_bits(run(part), AttentionState(whole.out[:, rows], whole.lse[:, rows])), (first, count)


@pytest.mark.parametrize("heads", [(2, 2), (6, 2), (8, 1)], ids=str)
def test_siblings_may_lie_in_any_order(isa, heads):
    trees = [random_tree(30, 11), forest(17, 4), star(9)]
    case = make_case(trees, [254, 5, 300], heads=heads[0], kv_heads=heads[1])
    whole = run(case)
    for seed in range(3):
        moved, places = path_cases.with_siblings_moved(case, seed)
        result = run(moved)
        for request, place in enumerate(places):
            assert place != list(range(len(place))), "the order is another one"
            for node, where in enumerate(place):
                assert same_bits(state_of(case, result, request, where), state_of(case, whole, request, node))


def test_batch_and_strides(isa):
    """A permuted batch, caches by head, and outputs with gaps."""
    trees, contexts = [random_tree(12, 1), chain(4), forest(9)], [255, 0, 600]
    case = make_case(trees, contexts, heads=4, kv_heads=2, sinks=True)
    whole = run(case)
    order = torch.tensor([2, 0, 1])
    topology = Topology.from_trees([Tree(trees[request]) for request in order])
    by_head = [cache[order].transpose(1, 2).contiguous().transpose(1, 2) for cache in (case.k_cache, case.v_cache)]
    rows = max(map(len, trees))
    room = torch.full((3, rows, 4, 160), NAN)
    state = AttentionState(room[..., 5:69], torch.full((3, rows, 4), NAN))
    options = {**case.options, "out": state}
    got = path_cases.attention(case.q[order], *by_head, topology, case.context_lens[order], **options)
    assert got is state
    assert torch.equal(state.out, whole.out[order])
    assert torch.equal(state.lse, whole.lse[order])
    assert room[..., 69:].isnan().all()
    without_lse = case.run("cpu", path_invariant=True)
    assert torch.equal(without_lse, whole.out)


@pytest.mark.parametrize(
    ("tree", "context", "heads", "dim"),
    [(chain(1), 5000, (8, 8), 64), (random_tree(9), 3000, (8, 2), 64), (random_tree(64), 5000, (8, 2), 256)],
    ids=("one row", "few rows", "more states than wait at a time"),
)
def test_threads_change_no_bit(tree, context, heads, dim, threads):
    """Every number of threads cuts the work differently."""
    case = make_case([tree, tree[:1]], [context, 700], heads=heads[0], kv_heads=heads[1], dim=dim)
    results = []
    for number in (1, 2, 3, 16):
        threads(number)
        results.append(run(case))
    assert all(same_bits(result, results[0]) for result in results)


def test_long_paths_and_many_rows(isa):
    """Paths of several chunks, and more rows than a task has."""
    case = make_case([chain(600)], [100], heads=2, kv_heads=1, dim=32)
    assert_right(case, "cpu", path_invariant=True)
    whole = run(case)
    for node in (0, 155, 156, 400, 599):
        got = path_cases.decoded(case, 0, node, tree_rows=1, page_size=None)
        assert same_bits(got, state_of(case, whole, 0, node)), node


@pytest.mark.parametrize(("isa", "dtype"), BY_ISA, indirect=["isa"], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_rows_show_what_they_see(isa, dtype, name):
    """What nobody sees holds NaN or infinities; and what some see, each row must show or not, as it sees."""
    values = VALUES[(list(CASES).index(name) + BY_ISA.index((isa, dtype))) % 3]
    case = make_case(**{key: value for key, value in CASES[name].items() if key != "num_splits"}, dtype=dtype)
    poison(case, values[0])
    assert_each_row_shows_what_it_sees(case, run(case))
    taint(case, values, seed=len(case.contexts))
    assert_each_row_shows_what_it_sees(case, run(case))


def test_rows_that_see_nothing():
    """Without a sink 0 and -inf, with one 0 and the sink; a row without a node 0 and -inf."""
    nothing = make_case(None, [0, 5], queries=2, sinks=True)
    state = run(nothing)
    assert (state.out[0] == 0).all()
    torch.testing.assert_close(state.lse[0], nothing.options["sinks"].expand(2, 4))
    padded = run(make_case([chain(1), chain(4)], [3, 3]))
    assert (padded.out[0, 1:] == 0).all()
    assert (padded.lse[0, 1:] == -torch.inf).all()


@pytest.mark.parametrize("words", [0, -1, 0x5555555555555555])
def test_ancestors_that_make_no_sense_do_no_harm(words):
    """Bits of nodes that come later, or of none: no slot behind the row's own is read."""
    case = make_case([random_tree(70)], [30])
    topology = dataclasses.replace(case.topology, ancestors=torch.full_like(case.topology.ancestors, words))
    state = run(dataclasses.replace(case, topology=topology))
    assert state.out.isfinite().all()


@pytest.mark.parametrize("depth", [-(2**31), -1, 0, 5, 2**31 - 1])
@pytest.mark.parametrize("window", [1, 30, 2**31 - 1])
def test_depths_that_contradict_ancestors_do_no_harm(window, depth):
    """Pages are checked by depths, and rows see by ancestors: no page that does not exist is read."""
    case = make_case([random_tree(40)], [20], page_size=4, window=window)
    topology = dataclasses.replace(case.topology, depths=torch.full_like(case.topology.depths, depth))
    case.options["page_table"][0, 5:] = torch.tensor([-1, 2**31 - 1, 2, -(2**31)] * 3)[
        : case.options["page_table"].shape[1] - 5
    ]
    try:
        run(dataclasses.replace(case, topology=topology))
    except ValueError as error:
        assert "page_table[0, " in str(error)


# ---- wrong variants


SMALL = dict(trees=[[-1, 0, 0, 1, 1, 2, 0, 4, 5, 7]], contexts=[14], heads=2, kv_heads=1, dim=16, scale=0.5)


def test_the_model_is_right():
    """Path-invariant attention in Python, of chunks of 8, is as good as the definition, and has the property."""
    case = make_case(**SMALL)
    torch.testing.assert_close(run(case, path_cases.model).out, case.run("torch"))
    assert wrong_nodes(case, path_cases.model) == []


@pytest.mark.parametrize("wrong", ["chunks by slot", "one maximum", "lanes by slot"])
def test_wrong_variants_are_caught(wrong):
    """Each gives right values. Their bits tell."""
    case, attend = make_case(**SMALL), functools.partial(path_cases.model, wrong=wrong)
    torch.testing.assert_close(run(case, attend).out, case.run("torch"))
    assert wrong_nodes(case, attend) != []


def test_the_normal_kernel_is_caught(isa):
    """It keeps a request apart from others, and no more than that."""
    attend = functools.partial(tree_attention, return_lse=True, backend="cpu")
    assert wrong_nodes(make_case(**BITS["across it"]), attend) != []


# ---- who has it


def test_other_backends_refuse(target):
    case = make_case([chain(3)], [4], dtype=torch.bfloat16, device=target.device)
    if target == ("cpu", "cpu"):
        assert case.run(target.backend, path_invariant=True).isfinite().all()
        return
    with pytest.raises(RuntimeError, match="path_invariant=True is kept by backend='cpu' alone, on CPU tensors"):
        case.run(target.backend, path_invariant=True)


def test_auto_takes_the_cpu_kernel_or_says_why_not(monkeypatch):
    case = make_case([chain(3)], [4])
    assert torch.equal(case.run("auto", path_invariant=True), case.run("cpu", path_invariant=True))
    message = "^specdec_ops.tree_attention: no backend takes this call on cpu: its kernels .*multiple of 16.*; path_in"
    with pytest.raises(RuntimeError, match=message):
        make_case([chain(3)], [4], dim=40).run("auto", path_invariant=True)
    monkeypatch.setitem(dispatch._AUTO, "cpu", dispatch._AUTO["cuda"])  # as on a GPU
    dispatch.forget()
    message = "^specdec_ops.tree_attention: no backend takes this call on cpu: path_invariant=True is kept by [^;]*$"
    with pytest.raises(RuntimeError, match=message):
        case.run("auto", path_invariant=True)
    dispatch.forget()


def test_arguments():
    case = make_case([chain(3)], [4])
    with pytest.raises(TypeError, match="tree_attention: path_invariant must be a bool, got 1"):
        case.run("cpu", path_invariant=1)
    with pytest.raises(ValueError, match="tree_attention: num_splits must be None with path_invariant, got 2"):
        case.run("cpu", path_invariant=True, num_splits=2)
    case.context_lens[0] = 2000
    with pytest.raises(ValueError, match=r"specdec_ops.tree_attention: context_lens\[0\] is 2000"):
        case.run("cpu", path_invariant=True)


def test_compiled_calls_keep_it():
    """Through the operator of torch.library, whose schema has the option."""
    case = make_case([random_tree(9)], [255])
    compiled = torch.compile(lambda q: dataclasses.replace(case, q=q).run("cpu", path_invariant=True), backend="eager")
    assert torch.equal(compiled(case.q), case.run("cpu", path_invariant=True))
