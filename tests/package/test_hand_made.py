"""Objects that someone builds or changes by hand: what does not fit is refused when they are made.

Ops rely on it: they check what an object is, not again what it holds.
"""

import dataclasses

import pytest
import torch

from specdec_ops import (
    HeadBounds,
    QuantizedHead,
    QuantizedWeight,
    Tree,
    VocabMap,
    bound_head,
    quantize_head,
    quantize_linear,
    sample_children,
)

TOPOLOGY = Tree.from_branching((2, 2), root=True).to("cpu", batch=3)
PACKED = dataclasses.replace(TOPOLOGY, offsets=torch.tensor([0, 7, 14, 21], dtype=torch.int32))
HEAD = torch.randn(300, 16, generator=torch.Generator().manual_seed(0))
QUANTIZED, BOUNDS, WEIGHT = quantize_head(HEAD), bound_head(HEAD, (100, 300)), quantize_linear(HEAD)


def strided(tensor):
    return torch.stack((tensor, tensor), dim=-1)[..., 0]


WRONG = [
    *(
        (TOPOLOGY, name, change, error)
        for name in ("parents", "depths", "first_child", "next_sibling", "num_nodes", "status", "ancestors")
        for change, error in (
            (lambda tensor: tensor.short(), TypeError),
            (lambda tensor: tensor.tolist(), TypeError),
            (lambda tensor: tensor[..., :-1].contiguous(), ValueError),
            (lambda tensor: tensor[:2].contiguous(), ValueError),
            (strided, ValueError),
            (lambda tensor: tensor.to("meta"), ValueError),
        )
    ),
    (TOPOLOGY, "num_nodes", lambda tensor: tensor.long(), TypeError),
    (TOPOLOGY, "ancestors", lambda tensor: tensor.int(), TypeError),
    (PACKED, "offsets", lambda tensor: tensor.long(), TypeError),
    (PACKED, "offsets", lambda tensor: tensor[:-1], ValueError),
    (PACKED, "offsets", strided, ValueError),
    *(
        (owner, name, change, error)
        for owner, names in (
            (QUANTIZED, ("scales", "error_norms", "norms", "error_gain")),
            (WEIGHT, ("scales",)),
            (BOUNDS, ("norms_after",)),
        )
        for name in names
        for change, error in (
            (lambda tensor: tensor.half(), TypeError),
            (lambda tensor: tensor.double(), TypeError),
            (lambda tensor: tensor[:-1], ValueError),
            (lambda tensor: tensor[:, None], ValueError),
        )
    ),
    *((owner, "scales", lambda tensor: tensor[:1].expand(300), ValueError) for owner in (QUANTIZED, WEIGHT)),
    *((owner, "values", lambda tensor: tensor.int(), TypeError) for owner in (QUANTIZED, WEIGHT)),
    *((owner, "values", lambda tensor: tensor[:, ::2], ValueError) for owner in (QUANTIZED, WEIGHT)),
    (BOUNDS, "ends", lambda ends: list(ends), TypeError),
    (BOUNDS, "ends", lambda ends: (*ends, 10.5), TypeError),
    (BOUNDS, "ends", lambda ends: ends[::-1], ValueError),
    (BOUNDS, "ends", lambda ends: (0, 300), ValueError),
    (BOUNDS, "ends", lambda ends: tuple(range(1, 18)), ValueError),
    (BOUNDS, "ends", lambda ends: (), ValueError),
]


@pytest.mark.parametrize("place", range(len(WRONG)))
def test_what_does_not_fit_is_refused(place):
    owner, name, change, error = WRONG[place]
    found = "(parents|depths)" if name == "parents" else name  # the others no longer fit to other parents
    with pytest.raises(error, match=rf"^specdec_ops\.{type(owner).__name__}: {found} must be .*, got "):
        dataclasses.replace(owner, **{name: change(getattr(owner, name))})


def test_one_tree_may_be_cut_for_each_request():
    """What is legal stays legal."""
    one = Tree.from_branching((2, 2), root=True).to("cpu")
    sizes = torch.tensor([3, 7, 1], dtype=torch.int32)
    assert dataclasses.replace(one, num_nodes=sizes).num_nodes is sizes
    for owner in (TOPOLOGY, PACKED, QUANTIZED, WEIGHT, BOUNDS):
        assert type(dataclasses.replace(owner)) is type(owner)


def test_a_head_of_another_dtype_is_no_screen():
    with pytest.raises(TypeError, match=r"QuantizedHead: scales must be float32 \[300\], got float16 \[300\]"):
        QuantizedHead(*(value.half() if value.is_floating_point() else value for value in parts(QUANTIZED)))
    with pytest.raises(ValueError, match=r"QuantizedWeight: scales must be float32 \[300\], got float32 \[17\]"):
        QuantizedWeight(QUANTIZED.values, QUANTIZED.scales[:17])
    with pytest.raises(ValueError, match=r"HeadBounds: norms_after must be float32 \[2\], got float32 \[3\]"):
        HeadBounds((100, 300), torch.zeros(3))


def parts(owner):
    return [getattr(owner, field.name) for field in dataclasses.fields(owner)]


@pytest.mark.parametrize("kind", ["int32", "int64", "numpy"])
def test_a_vocab_map_is_a_copy(kind):
    """The caller's later changes do not move tokens, and children never leave the vocabulary."""
    ids = torch.arange(5, 15, dtype=torch.int64 if kind == "int64" else torch.int32)
    given = ids.numpy() if kind == "numpy" else ids
    vocab_map = VocabMap(given, 20)
    ids += 1_000_000
    drawn = sample_children(torch.zeros(2, 3, 10), 4, seeds=1, positions=0, vocab_map=vocab_map)
    assert ((drawn.tokens >= 5) & (drawn.tokens < 15)).all()
    assert vocab_map.target_to_draft[5:15].tolist() == list(range(10))
