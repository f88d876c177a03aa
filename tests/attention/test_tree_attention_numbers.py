"""Absurd numbers on the device: lengths, first nodes, counts, pages. One meaning or one sentence, and no wild read."""

import dataclasses
import re

import pytest
import torch

from specdec_ops import AttentionState, kv_propagate, tree_attention
from tests.attention.attention_cases import chain, make_case, random_tree

SMALLEST, LARGEST = -(2**31), 2**31 - 1


def int32(*values, device="cpu"):
    return torch.tensor(values, dtype=torch.int32, device=device)


def reports(target):
    """Kernels on a GPU can't raise an error for what they read there."""
    return target.backend in ("cpu", "torch")


@pytest.mark.parametrize("page_size", [None, 4])
@pytest.mark.parametrize("length", [SMALLEST, -1, 14, LARGEST - 3, LARGEST])
def test_context_lengths(length, page_size, target):
    """An error, or: below 0 is 0, and slots beyond the cache are invisible."""
    case = make_case([chain(3), chain(2)], [4, 9], page_size=page_size, device=target.device)
    slots = case.k_cache.shape[1] * (1 if page_size is None else case.options["page_table"].shape[1])
    case.k_cache.nan_to_num_(), case.v_cache.nan_to_num_()  # of the cache's last slots, which are visible then
    given = dataclasses.replace(case, context_lens=int32(length, 9, device=target.device))
    if reports(target) and not 0 <= length <= slots - 3:
        with pytest.raises(
            ValueError, match=re.escape(f"specdec_ops.tree_attention: context_lens[0] {'' if length < 0 else 'is'}")
        ):
            given.run(target.backend)
        return
    got = given.run(target.backend, return_lse=True)
    meant = dataclasses.replace(case, context_lens=int32(min(max(length, 0), slots), 9, device=target.device))
    assert torch.equal(got.out, meant.run(target.backend))
    assert torch.equal(got.out[1], case.run(target.backend)[1])
    assert got.lse.isfinite()[0].all()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("start", [SMALLEST, -3, 3, LARGEST])
def test_first_nodes(start, packed, target):
    """Rows before node 0 and after the last node are padding."""
    case = make_case([chain(3), chain(3)], [4, 9], packed=packed, device=target.device)
    got = case.run(target.backend, query_start=int32(start, 0, device=target.device), return_lse=True)
    first, second = case.row_indices
    assert (got.out[first] == 0).all()
    assert (got.lse[first] == -float("inf")).all()
    assert torch.equal(got.out[second], case.run(target.backend)[second])


def test_packed_rows_before_the_tree(target):
    """A request has at most as many packed rows as the topology has room for nodes; the rows behind are padding."""
    case = make_case([random_tree(4), random_tree(4)], [4, 9], packed=True, device=target.device)
    topology = dataclasses.replace(case.topology, offsets=int32(0, 6, 10, device=target.device))
    got = dataclasses.replace(case, topology=topology).run(
        target.backend, query_start=int32(-2, 0, device=target.device)
    )
    assert (got[:2] == 0).all()
    assert got[2:4].isfinite().all() and (got[2:4] != 0).any()
    assert (got[4:6] == 0).all()


@pytest.mark.parametrize("count", [SMALLEST, -1, 0, 4, LARGEST])
def test_numbers_of_nodes(count, target):
    """From 0 to what there is room for."""
    case = make_case([chain(3), chain(3)], [4, 9], device=target.device)
    changed = dataclasses.replace(case.topology, num_nodes=int32(count, 3, device=target.device))
    got = dataclasses.replace(case, topology=changed).run(target.backend)
    wanted = case.run(target.backend)
    assert torch.equal(got[1], wanted[1])
    assert torch.equal(got[0], wanted[0] if count > 0 else torch.zeros_like(wanted[0]))


@pytest.mark.parametrize("page", [SMALLEST, -1, "pages", LARGEST])
def test_a_page_that_rows_see_and_that_does_not_exist(page, target):
    """An error, or zeros."""
    case = make_case([random_tree(6), chain(2)], [70, 9], page_size=4, device=target.device)
    page = len(case.k_cache) if page == "pages" else page
    for number in (0, 1, 17):  # in plain context, and in the tail
        table = case.options["page_table"].clone()
        table[0, number] = page
        if reports(target):
            message = f"page_table[0, {number}] must be a page below {len(case.k_cache)}, got {page}"
            with pytest.raises(ValueError, match=re.escape(f"specdec_ops.tree_attention: {message}")):
                case.run(target.backend, page_table=table)
            continue
        zeros = [torch.cat([cache, torch.zeros_like(cache[:1])]) for cache in (case.k_cache, case.v_cache)]
        named = case.options["page_table"].clone()
        named[0, number] = len(case.k_cache)
        wanted = dataclasses.replace(case, k_cache=zeros[0], v_cache=zeros[1]).run(target.backend, page_table=named)
        assert torch.equal(case.run(target.backend, page_table=table), wanted)


def test_a_page_table_of_more_slots_than_32_bits_count(target):
    """It may be that wide, if a context isn't."""
    case = make_case([random_tree(5)], [100], page_size=64, device=target.device)
    wide = torch.zeros(1, 2**25, dtype=torch.int32, device=target.device)
    wide[0, : case.options["page_table"].shape[1]] = case.options["page_table"]
    assert torch.equal(case.run(target.backend, page_table=wide), case.run(target.backend))
    if reports(target):
        far = dataclasses.replace(case, context_lens=int32(LARGEST - 9))
        message = "context_lens[0] is 2147483638 and with its tree it needs 2147483643 slots"
        with pytest.raises(ValueError, match=re.escape(message)):
            far.run(target.backend, page_table=wide)


def test_a_dense_cache_of_more_slots_than_32_bits_count(target):
    """Rows that all lie in one place take no memory."""
    case = make_case([chain(2)], [9], heads=2, kv_heads=1, device=target.device)
    one = [cache[:, :1].expand(1, 2**32, 1, 64) for cache in (case.k_cache, case.v_cache)]
    got = dataclasses.replace(case, k_cache=one[0], v_cache=one[1]).run(target.backend)
    torch.testing.assert_close(got, case.v_cache[:, :1].expand(1, 2, 2, 64), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("return_lse", [False, True])
def test_packed_rows_that_nobody_owns(return_lse, target):
    """Before the first request and behind the last one: padding."""
    case = make_case([chain(3), chain(2)], [4, 9], packed=True, device=target.device)
    moved = torch.cat((case.q.new_full((2, *case.q.shape[1:]), float("nan")), case.q))
    topology = dataclasses.replace(case.topology, offsets=int32(2, 5, 7, device=target.device))
    out, lse = torch.full_like(moved, 7), torch.full(moved.shape[:-1], 7.0, device=target.device)
    given = AttentionState(out, lse) if return_lse else out
    dataclasses.replace(case, q=moved, topology=topology).run(target.backend, return_lse=return_lse, out=given)
    assert torch.equal(out[2:7], case.run(target.backend)[:5])
    assert (out[:2] == 0).all() and (out[7:] == 0).all()
    if return_lse:
        assert (lse[:2] == -float("inf")).all() and (lse[7:] == -float("inf")).all()
        assert lse[2:7].isfinite().all()


@pytest.mark.parametrize("offsets", [(0, 4, 3), (0, LARGEST, 5), (0, SMALLEST, 5), (-1, 2, 5)])
def test_offsets(offsets, target):
    """An error, or at least no wild read: what is seen of a request stays finite."""
    case = make_case([chain(3), chain(2)], [4, 9], packed=True, device=target.device)
    case.q.nan_to_num_()
    given = dataclasses.replace(
        case, topology=dataclasses.replace(case.topology, offsets=int32(*offsets, device=target.device))
    )
    if reports(target):
        with pytest.raises(ValueError, match=r"topology.offsets must rise from at least 0 to at most \d rows, got"):
            given.run(target.backend)
    else:
        given.run(target.backend, out=torch.zeros_like(case.q))


def test_a_length_beyond_32_bits():
    case = make_case([chain(3)], [4])
    message = "specdec_ops.tree_attention: context_lens must be from 0 to 2**31 - 1, got 2147483648"
    with pytest.raises(ValueError, match=re.escape(message)):
        tree_attention(case.q, case.k_cache, case.v_cache, case.topology, 2**31)


def test_a_window_beyond_32_bits_is_none(target):
    case = make_case([random_tree(5)], [30], device=target.device)
    torch.testing.assert_close(case.run(target.backend, window=2**40), case.run(target.backend))


@pytest.mark.parametrize("backend", ["cpu", "torch", "triton"])
def test_kv_propagate_takes_a_page_table_of_more_slots_than_32_bits_count(backend):
    hidden, weight = torch.randn(2, 16), torch.randn(16, 16)
    caches = [torch.zeros(3, 64, 1, 16) for _ in range(2)]
    table = torch.zeros(2, 2**25, dtype=torch.int32)
    table[1, 1] = 2
    slots, requests = int32(3, 70), int32(0, 1)
    options = {"rope": None, "requests": requests, "page_table": table, "backend": backend}
    kv_propagate(hidden, [(None, weight, weight)], slots, slots, caches[:1], caches[1:], **options)
    wanted = hidden @ weight.T
    torch.testing.assert_close(caches[0][0, 3, 0], wanted[0])
    torch.testing.assert_close(caches[0][2, 6, 0], wanted[1])
