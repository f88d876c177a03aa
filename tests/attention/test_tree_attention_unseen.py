"""What a row of tree_attention does not see must not reach it, whatever it holds: NaN, infinities, pages of nobody."""

import dataclasses
import itertools

import pytest
import torch

from specdec_ops import Tree, tree_attention
from tests.attention.attention_cases import chain, forest, make_case, random_tree, star
from tests.attention.unseen_cases import INF, NAN, assert_each_row_shows_what_it_sees, poison, taint

ISAS = ("generic", "avx2", "avx512", "avx512_bf16", "amx")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
VALUES = ((NAN, NAN, INF), (INF, -INF, NAN), (-INF, NAN, -INF))

# One row, few rows, a block of rows, several; the window's edge inside of a tile, of a page, of the tree; levels alone.
CASES = {
    "one row, window": dict(trees=[chain(1)] * 2, contexts=[5, 300], window=5, heads=2, dim=16),
    "one row, pages": dict(trees=[chain(1)] * 2, contexts=[70, 0], window=9, page_size=4, heads=2, dim=80),
    "few rows": dict(trees=[star(4), chain(2)], contexts=[3, 130], heads=2, dim=48, sinks=True),
    "few rows, window, pages": dict(trees=[random_tree(4), chain(3)], contexts=[90, 33], window=3, page_size=1),
    "a level": dict(
        trees=[random_tree(20, seed=2)] * 2, contexts=[66, 7], first_nodes=[17, 15], queries=3, page_size=2
    ),
    "a level, window": dict(trees=[forest(9)], contexts=[129], first_nodes=7, window=2, dim=96, num_splits=3),
    "no tree": dict(trees=None, contexts=[0, 70], queries=3, window=5, page_size=8, packed=False, dim=112),
    "a tree": dict(trees=[random_tree(20, seed=1), star(5)], contexts=[0, 65], heads=4, kv_heads=1, softcap=3.0),
    "a tree, pages": dict(trees=[random_tree(70), forest(9)], contexts=[33, 5], page_size=3, packed=True, dim=128),
    "a tree, window": dict(trees=[random_tree(40), chain(9)], contexts=[150, 20], window=4, alibi=True, num_splits=2),
    "many rows": dict(trees=[random_tree(80, seed=4)], contexts=[70], heads=2, kv_heads=2, window=70, sinks=True),
    "many rows, pages": dict(trees=[random_tree(50, seed=5)], contexts=[40], window=3, page_size=16, dim=256),
    "many heads": dict(trees=[star(9), random_tree(6)], contexts=[300, 1], heads=8, kv_heads=1, window=200, dim=192),
}


def poisoned(name, value, device="cpu", **changes):
    case = make_case(**CASES[name], **changes, device=device)
    poison(case, value)
    return case


def check(case, values, backend):
    """As it is, the case gives what it would without its poison. And tainted, each row shows what it sees alone."""
    assert_each_row_shows_what_it_sees(case, case.run(backend, return_lse=True))
    taint(case, values, seed=len(case.contexts))
    assert_each_row_shows_what_it_sees(case, case.run(backend, return_lse=True))


@pytest.mark.parametrize(("name", "values"), [*zip(CASES, itertools.cycle(VALUES), strict=False)], ids=str)
def test_rows_show_what_they_see(name, values, target):
    """Every backend, in its usual dtype."""
    if target.interpreted and "many rows" in name:
        pytest.skip("too slow for the interpreter, which has 70 rows, windows, pages and two pieces of a dim in others")
    check(poisoned(name, values[0], target.device, dtype=DTYPES[1] if "tree" in name else None), values, target.backend)


# The last two instruction sets add bfloat16 only: for other dtypes avx512 runs under their names.
BY_ISA = [(isa, dtype) for isa in ISAS for dtype in DTYPES if dtype == torch.bfloat16 or ISAS.index(isa) < 3]


@pytest.mark.parametrize(("isa", "dtype"), BY_ISA, indirect=["isa"], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_every_instruction_set_keeps_rows_apart(isa, dtype, name):
    values = VALUES[(list(CASES).index(name) + BY_ISA.index((isa, dtype))) % 3]
    check(poisoned(name, values[0], dtype=dtype), values, "cpu")


def test_what_is_tainted():
    """So the cases above are not empty: most have slots that some rows see and others don't."""
    counts = {name: taint(poisoned(name, NAN), VALUES[0], seed=1) for name in CASES}
    assert sum(count > 0 for count in counts.values()) >= 9, counts
    assert sum(counts.values()) >= 30, counts


@pytest.mark.parametrize("unseen", [NAN, INF, -INF])
def test_a_value_before_the_window(unseen, target):
    q, k, v = (
        torch.full(shape, value) for shape, value in (((1, 1, 1, 16), 1.0), ((1, 8, 1, 16), 0.0), ((1, 8, 1, 16), 1.0))
    )
    v[0, 0] = unseen
    q, k, v = (tensor.to(target.device, torch.bfloat16) for tensor in (q, k, v))
    out = tree_attention(q, k, v, Tree.chain(1).to(target.device), 5, window=5, backend=target.backend)
    assert (out == 1).all()


@pytest.mark.parametrize("unseen", [NAN, INF, -INF])
def test_a_value_of_a_sibling(unseen, target):
    q, k, v = (
        torch.full(shape, value) for shape, value in (((1, 1, 1, 16), 1.0), ((1, 8, 1, 16), 0.0), ((1, 8, 1, 16), 1.0))
    )
    v[0, 1] = unseen
    q, k, v = (tensor.to(target.device, torch.bfloat16) for tensor in (q, k, v))
    out = tree_attention(q, k, v, Tree([-1, 0, 0]).to(target.device), 0, query_start=2, backend=target.backend)
    assert (out == 1).all()


def test_a_request_without_nodes_reads_no_page(target):
    """Its context may lie in freed pages."""
    case = make_case([chain(2), chain(3)], [6, 9], page_size=4, device=target.device)
    wanted = case.run(target.backend)
    case.options["page_table"][0] = -1
    topology = dataclasses.replace(
        case.topology, num_nodes=torch.tensor([0, 3], dtype=torch.int32, device=target.device)
    )
    state = dataclasses.replace(case, topology=topology).run(target.backend, return_lse=True)
    assert (state.out[0] == 0).all()
    assert (state.lse[0] == -INF).all()
    assert torch.equal(state.out[1], wanted[1])
