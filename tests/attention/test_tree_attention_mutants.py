"""The attention tests must be able to fail: known wrong variants of the definition are told apart on the cases used."""

import pytest
import torch

from specdec_ops.ops.attention import reference_tree_attention as definition
from tests.attention.attention_cases import assert_right, make_case
from tests.attention.test_tree_attention_features import CONTEXTS, TREES

FEATURES = {"window": 4, "softcap": 2.0, "sinks": True, "alibi": True}


def slot_distance(nodes, context, tree_size):
    """Distances counted in slots, as if the tree were a chain."""
    return (context + nodes)[:, None] - torch.arange(context + tree_size)


def window_by_slot(visibility, attend):
    """Siblings would see different parts of the context."""

    def mutant(nodes, context, tree_size, depths, ancestors, window):
        visible, distance = visibility(nodes, context, tree_size, depths, ancestors, 0)
        by_slot = slot_distance(nodes, context, tree_size)
        return visible & (by_slot >= 0) & (by_slot < window), distance

    return {"visibility": mutant}


def alibi_by_slot(visibility, attend):
    """Siblings would be biased differently."""

    def mutant(nodes, context, tree_size, *others):
        return visibility(nodes, context, tree_size, *others)[0], slot_distance(nodes, context, tree_size)

    return {"visibility": mutant}


def ancestors_without_self(visibility, attend):
    """A node that does not see itself."""

    def mutant(nodes, context, *others):
        visible, distance = visibility(nodes, context, *others)
        visible[torch.arange(len(nodes)), context + nodes] = False
        return visible, distance

    return {"visibility": mutant}


def causal_instead_of_tree(visibility, attend):
    """Earlier siblings and cousins are visible."""

    def mutant(nodes, context, tree_size, *others):
        visible, distance = visibility(nodes, context, tree_size, *others)
        earlier = (slot_distance(nodes, context, tree_size) >= 0) & (distance >= 0)
        return visible | earlier, distance

    return {"visibility": mutant}


def context_off_by_one(visibility, attend):
    """The last context slot is missed."""

    def mutant(nodes, context, *others):
        visible, distance = visibility(nodes, context, *others)
        visible[:, max(0, context - 1) : context] = False
        return visible, distance

    return {"visibility": mutant}


def window_off_by_one(visibility, attend):
    """The window holds one position more."""

    def mutant(*arguments):
        *others, window = arguments
        return visibility(*others, window + 1)

    return {"visibility": mutant}


def softcap_after_alibi(visibility, attend):
    """The cap squeezes the bias as well."""

    def mutant(queries, keys, values, visible, distance, scale, softcap, slopes, sinks):
        queries = torch.cat([scale * queries, torch.ones_like(queries[..., :1])], dim=-1)
        biased = []
        for head in range(queries.shape[1]):  # the bias as one more feature of every key, a row at a time
            kv_head = head // (queries.shape[1] // keys.shape[1])
            for row in range(len(queries)):
                feature = -slopes[head] * distance[row].to(keys.dtype)
                key = torch.cat([keys[:, kv_head], feature[:, None]], dim=-1)
                one = slice(row, row + 1)
                result = attend(
                    queries[one, head : head + 1],
                    key[:, None],
                    values[:, kv_head : kv_head + 1],
                    visible[one],
                    distance[one],
                    1.0,
                    softcap,
                    None,
                    sinks[head : head + 1],
                )
                biased.append((head, row, *result))
        out = torch.zeros(*queries.shape[:2], values.shape[2])
        lse = torch.zeros(queries.shape[:2])
        for head, row, part, part_lse in biased:
            out[row, head], lse[row, head] = part[0, 0], part_lse[0, 0]
        return out, lse

    return {"attend": mutant}


def heads_interleaved(visibility, attend):
    """Query head h reads kv head h % kv_heads."""

    def mutant(queries, keys, values, *others):
        group = queries.shape[1] // keys.shape[1]
        return attend(queries, keys.repeat(1, group, 1), values.repeat(1, group, 1), *others)

    return {"attend": mutant}


def no_sink(visibility, attend):
    """The sink is ignored."""
    return {"attend": lambda *arguments: attend(*arguments[:-1], None)}


MUTANTS = (
    window_by_slot,
    alibi_by_slot,
    ancestors_without_self,
    causal_instead_of_tree,
    context_off_by_one,
    window_off_by_one,
    softcap_after_alibi,
    heads_interleaved,
    no_sink,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_mutant_is_caught(mutant, dtype, monkeypatch):
    """On the ragged batch of the feature tests, at their tolerance."""
    case = make_case(TREES, CONTEXTS, dtype=dtype, **FEATURES)
    assert_right(case, "torch")
    for name, function in mutant(definition.visibility, definition.attend).items():
        monkeypatch.setattr(definition, name, function)
    with pytest.raises(AssertionError, match="largest error"):
        assert_right(case, "torch")
