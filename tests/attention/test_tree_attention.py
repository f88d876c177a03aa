"""tree_attention against naive float64 attention, on a covering set of dtypes, shapes, trees and lengths.

Every value of every factor appears with several values of the others; not every combination does.
"""

import pytest
import torch

from tests.attention.attention_cases import assert_right, chain, forest, make_case, random_tree, star

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DIMS = (64, 80, 96, 128, 192, 256)
HEADS = ((2, 2), (4, 2), (3, 1), (8, 2), (6, 1), (8, 1))  # (heads, kv_heads): ratios 1, 2, 3, 4, 6, 8
SIZES = (1, 2, 5, 16, 44, 60, 63, 64, 65, 82, 129, 256)
SHAPES = (random_tree, chain, random_tree, star, forest)
CONTEXTS = (0, 1, 63, 64, 65, 127, 129, 1000)
LAYOUTS = ({}, {"packed": True}, {"page_size": 16}, {"packed": True, "page_size": 7})


def name(value) -> str:
    """How a factor reads in a test's id."""
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, dict):
        return "-".join(value) or "dense"
    return "/".join(map(str, value)) if isinstance(value, tuple) else getattr(value, "__name__", str(value))


BY_TYPE = [
    (dtype, dim, HEADS[(i + j) % 6], LAYOUTS[(i + j) % 4])
    for i, dtype in enumerate(DTYPES)
    for j, dim in enumerate(DIMS)
]
BY_SIZE = [
    (nodes, SHAPES[i % 5], CONTEXTS[(3 * i + 1) % 8], DTYPES[i % 3], HEADS[i % 6], LAYOUTS[(i // 2) % 4])
    for i, nodes in enumerate(SIZES)
]


@pytest.mark.parametrize(("dtype", "dim", "heads", "layout"), BY_TYPE, ids=name)
def test_dtype_dim_and_heads(dtype, dim, heads, layout, target):
    """A ragged batch: trees and contexts of different sizes, one request without context and one of a single node."""
    trees, contexts = [random_tree(9), chain(1), star(6), forest(20)], [0, 65, 17, 130]
    if target.interpreted:
        trees, contexts = trees[1:], contexts[1:]
    assert_right(
        make_case(
            trees, contexts, dtype=dtype, dim=dim, heads=heads[0], kv_heads=heads[1], device=target.device, **layout
        ),
        target.backend,
    )


@pytest.mark.parametrize(("nodes", "shape", "context", "dtype", "heads", "layout"), BY_SIZE, ids=name)
def test_tree_size_and_context(nodes, shape, context, dtype, heads, layout, target):
    """Sizes around the 64 bits of a word and the usual tile sizes, contexts around the tile sizes."""
    if target.interpreted:
        heads = (heads[0] // heads[1], 1)
        context = min(context, 150)
    case = make_case(
        [shape(nodes)], [context], dtype=dtype, heads=heads[0], kv_heads=heads[1], device=target.device, **layout
    )
    assert_right(case, target.backend)


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("page_size", [None, 16])
def test_context_lengths(context, page_size, target):
    """Every context length beside a neighbour of another length."""
    if target.interpreted and context not in (1, 64, 129):
        pytest.skip("covered at other lengths by the interpreter")
    case = make_case(
        [random_tree(5), chain(3)], [context, 40], heads=2, kv_heads=1, page_size=page_size, device=target.device
    )
    assert_right(case, target.backend)


def test_thousand_nodes(target):
    """A tree of 1,024 nodes has 16 words per ancestor set."""
    if target.interpreted:
        pytest.skip("too slow for the interpreter")
    assert_right(make_case([random_tree(1024)], [70], heads=2, kv_heads=1, device=target.device), target.backend)


@pytest.mark.parametrize("heads", [(16, 16), (16, 1), (12, 2)], ids=name)
def test_many_heads(heads, target):
    """Multi-head and multi-query attention with more heads than the other cases have."""
    case = make_case([chain(3)], [20], heads=heads[0], kv_heads=heads[1], dtype=torch.bfloat16, device=target.device)
    assert_right(case, target.backend)


@pytest.mark.parametrize("dim", [16, 48, 112, 240])
def test_other_multiples_of_16(dim, target):
    """Kernels take any multiple of 16 up to 256."""
    assert_right(make_case([random_tree(6)], [30], dim=dim, dtype=torch.bfloat16, device=target.device), target.backend)


@pytest.mark.parametrize("dim", [8, 40, 72, 320])
def test_odd_dims_run_on_the_definition(dim):
    """Automatically: kernels don't have them."""
    assert_right(make_case([random_tree(6)], [30], dim=dim), "auto")


def test_float64_runs_on_the_definition():
    """Automatically, and in float64 throughout."""
    case = make_case([random_tree(20)], [30], dtype=torch.float64)
    got = assert_right(case, "auto")
    assert got.out.dtype == torch.float64
