"""FlashInfer and xFormers as their documentation describes them, in plain PyTorch: what benchmarks/ must hand to them.

They read page lists, masks and layouts the way the real kernels do, so a wrong list gives a wrong result. They share no
code with the adaptors.
"""

import math
import types

import numpy as np
import torch


def attend(q, k, v, visible):
    """[rows, heads, dim] over [slots, kv_heads, dim] with bool [rows, slots]: the output, and its lse to base 2."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(group, dim=1) for x in (k, v))
    scores = torch.einsum("rhd,shd->hrs", q.double(), k) / math.sqrt(q.shape[2])
    scores = scores.masked_fill(~visible, -torch.inf)
    out = torch.einsum("hrs,shd->rhd", scores.softmax(-1), v)
    return out.to(q.dtype), (scores.logsumexp(-1).T / math.log(2)).float()


class Prefill:
    """What the two prefill wrappers have in common."""

    def __init__(self, workspace, kv_layout="NHD", *, backend="auto"):
        assert kv_layout == "NHD" and workspace.dtype == torch.uint8 and backend in ("fa2", "fa3")
        self.backend, self.planned = backend, None

    def check(self, lengths, heads, dtypes, custom_mask, causal):
        rows = self.planned["qo"]
        assert not causal and (custom_mask is None or self.backend == "fa2"), "FA3 takes no custom mask"
        assert dtypes["q_data_type"] == dtypes["kv_data_type"] and len(heads) == 3
        cells = [(int(end - start) * length) for start, end, length in zip(rows[:-1], rows[1:], lengths, strict=True)]
        assert custom_mask is None or (custom_mask.dtype == torch.bool and custom_mask.shape == (sum(cells),))
        parts = [None] * len(cells) if custom_mask is None else list(custom_mask.split(cells))
        self.planned |= {"lengths": lengths, "masks": parts, "heads": heads}

    def attend_all(self, q, keys_and_values, return_lse):
        starts, results = self.planned["qo"].tolist(), []
        assert q.shape == (starts[-1], self.planned["heads"][0], self.planned["heads"][2]) and q.is_contiguous()
        for request, (k, v) in enumerate(keys_and_values):
            rows = q[starts[request] : starts[request + 1]]
            mask = self.planned["masks"][request]
            seen = torch.ones(len(rows), len(k), dtype=torch.bool) if mask is None else mask.view(len(rows), len(k))
            results.append(attend(rows, k, v, seen))
        out, lse = (torch.cat(parts) for parts in zip(*results, strict=True))
        return (out, lse) if return_lse else out


class BatchPrefillWithPagedKVCacheWrapper(Prefill):
    def plan(self, qo, kv, indices, last, heads, kv_heads, dim, page_size, *, custom_mask=None, causal=False, **dtypes):
        assert all(x.dtype == torch.int32 for x in (qo, kv, indices, last))
        self.planned = {"qo": qo, "kv": kv.tolist(), "indices": indices.long()}
        pages = (kv[1:] - kv[:-1] - 1).tolist()
        assert all(1 <= used <= page_size for used in last.tolist())
        lengths = [count * page_size + used for count, used in zip(pages, last.tolist(), strict=True)]
        self.check(lengths, (heads, kv_heads, dim), dtypes, custom_mask, causal)

    def run(self, q, caches, *, return_lse=False):
        kv, parts = self.planned["kv"], []
        for request, length in enumerate(self.planned["lengths"]):
            pages = self.planned["indices"][kv[request] : kv[request + 1]]
            parts.append([cache[pages].flatten(0, 1)[:length] for cache in caches])
        return self.attend_all(q, parts, return_lse)


class BatchPrefillWithRaggedKVCacheWrapper(Prefill):
    def plan(self, qo, kv, heads, kv_heads, dim, *, custom_mask=None, causal=False, **dtypes):
        self.planned = {"qo": qo, "kv": kv.tolist()}
        self.check((kv[1:] - kv[:-1]).tolist(), (heads, kv_heads, dim), dtypes, custom_mask, causal)

    def run(self, q, k, v, *, return_lse=False):
        kv = self.planned["kv"]
        parts = [[x[kv[r] : kv[r + 1]] for x in (k, v)] for r in range(len(kv) - 1)]
        return self.attend_all(q, parts, return_lse)


def merge_state(v_a, s_a, v_b, s_b):
    weight = torch.sigmoid((s_a.double() - s_b.double()) * math.log(2))[..., None]
    merged = weight * v_a.double() + (1 - weight) * v_b.double()
    return merged.to(v_a.dtype), torch.logaddexp2(s_a, s_b)


def xqa(
    q, k, v, table, seq_lens, output, workspace, semaphores, num_kv_heads, page_size, *, q_seq_len, mask, q_scale=1.0
):
    """Bits of a row are little-endian in 16-bit words; the last q_seq_len slots of a request are its draft."""
    batch, beam, rows = q.shape[:3]
    words = mask.view(torch.int16).numpy().view(np.uint16)
    assert (beam, rows, k.shape[1], k.shape[2]) == (1, q_seq_len, page_size, num_kv_heads)
    assert seq_lens.dtype == torch.uint32 and seq_lens.shape == (batch, 1) and table.dtype == torch.int32
    assert mask.dtype == torch.uint16 and words.shape == (batch, rows, (rows + 31) // 32 * 2)
    assert not semaphores.any() and workspace.data_ptr() != semaphores.data_ptr() and output.shape == q.shape
    for request, length in enumerate(seq_lens.view(torch.int32)[:, 0].tolist()):
        keys, values = (cache[table[request].long()].flatten(0, 1)[:length] for cache in (k, v))
        visible = torch.ones(rows, length, dtype=torch.bool)
        bits = np.unpackbits(words[request].view(np.uint8), axis=1, bitorder="little")[:, :rows]
        visible[:, length - rows :] = torch.from_numpy(bits.astype(bool))
        output[request, 0] = attend(q[request, 0], keys, values, visible)[0]


class BlockDiagonalPaddedKeysMask:
    @classmethod
    def from_seqlens(cls, *, q_seqlen, kv_padding, kv_seqlen, device):
        self = cls()
        self.rows, self.padding, self.lengths = q_seqlen, kv_padding, kv_seqlen
        return self


def tree_attention(q, spec_k, spec_v, cache_k, cache_v, spec_attn_bias, prefix_attn_bias, prefix_op, suffix_op):
    """[batch, nodes, kv_heads, group, dim]; the kernels want views of whole batches, and bias rows 8 elements apart."""
    batch, nodes, kv_heads, group, dim = q.shape
    slots = cache_k.shape[1]
    assert prefix_op is suffix_op is FwOp and spec_attn_bias.shape == (nodes, nodes)
    assert spec_attn_bias.dtype == q.dtype and spec_attn_bias.stride(0) % 8 == 0
    assert prefix_attn_bias.padding == slots and prefix_attn_bias.rows == [nodes] * batch
    q.view(1, batch * nodes, kv_heads, group, dim), cache_k.view(1, batch * slots, kv_heads, group, dim)
    out = torch.empty_like(q)
    for request, context in enumerate(prefix_attn_bias.lengths):
        rows = q[request].flatten(1, 2)
        k, v = (
            torch.cat([cache[request, :context], new[request]])[:, :, 0]
            for cache, new in ((cache_k, spec_k), (cache_v, spec_v))
        )
        visible = torch.cat([torch.ones(nodes, context, dtype=torch.bool), spec_attn_bias == 0], dim=1)
        out[request] = attend(rows, k, v, visible)[0].view(nodes, kv_heads, group, dim)
    return out


class FwOp:
    """Stands for the split-K kernel."""


def modules() -> dict[str, types.ModuleType]:
    """What sys.modules gets."""
    contents = {
        "flashinfer": (BatchPrefillWithPagedKVCacheWrapper, BatchPrefillWithRaggedKVCacheWrapper, merge_state),
        "flashinfer.xqa": (xqa,),
        "xformers": (),
        "xformers.ops": (),
        "xformers.ops.tree_attention": (tree_attention,),
        "xformers.ops.fmha": (),
        "xformers.ops.fmha.attn_bias": (BlockDiagonalPaddedKeysMask,),
        "xformers.ops.fmha.triton_splitk": (FwOp,),
    }
    made = {}
    for name, values in contents.items():
        made[name] = types.ModuleType(name)
        for value in values:
            setattr(made[name], value.__name__, value)
    return made
