"""The launchers of exit_mlp and kv_propagate, emulated: calls whose parameters have a structure per layer."""

import torch

from . import kernels
from .accept_kernels import run as run_with_counters
from .accept_kernels import with_scratch
from .kernels import DTYPES, Launch

HEAD_TYPES = {**DTYPES, torch.int8: 3}  # HeadType
MOST_KV_LAYERS = 32


def mlp_launch(features, weights, biases, threshold, score, stop):
    """With scratch of just the size that the call needs, which may hold anything, and counters of zeros."""
    tensors = {"features": features, "score": score, "stop": stop}
    numbers = {"features_stride_row": features.stride(0), "features_dtype": DTYPES[features.dtype]}
    numbers |= {"count": len(weights), "rows": features.shape[0], "inputs": features.shape[1], "threshold": threshold}
    for index, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        tensors |= {f"layers{index}_weight": weight, f"layers{index}_bias": bias}
        numbers |= {f"layers{index}_type": HEAD_TYPES[weight.dtype], f"layers{index}_outputs": weight.shape[0]}
    return with_scratch(Launch("exit_mlp", tensors, numbers))


def kv_launch(
    hidden, norm_weights, k_weights, v_weights, norm_eps, cosines, sines, interleaved, requests, slots, page_table,
    k_caches, v_caches,
):  # fmt: skip
    tensors = {"hidden": hidden, "cosines": cosines, "sines": sines, "slots": slots}
    tensors |= {"requests": requests, "page_table": page_table}
    first, second, kv_heads, head_dim = k_caches[0].shape
    numbers = {"hidden_stride_row": hidden.stride(0), "dtype": DTYPES[hidden.dtype], "norm_eps": norm_eps}
    numbers |= {"rows": hidden.shape[0], "dim": hidden.shape[1], "kv_heads": kv_heads, "head_dim": head_dim}
    numbers |= {"pairs": 0 if cosines is None else cosines.shape[1], "interleaved": interleaved}
    numbers |= {"count": len(k_caches), "batch": first, "slots_each": second}
    if page_table is not None:
        batch, max_pages = page_table.shape
        numbers |= {"batch": batch, "slots_each": max_pages * second, "pages": first, "page_size": second}
    for index, (k_cache, v_cache) in enumerate(zip(k_caches, v_caches, strict=True)):
        layer = f"layers{index}_"
        tensors |= {f"{layer}k_weight": k_weights[index], f"{layer}v_weight": v_weights[index]}
        tensors |= {f"{layer}k_cache": k_cache, f"{layer}v_cache": v_cache}
        if norm_weights:
            tensors[f"{layer}norm_weight"] = norm_weights[index]
            numbers[f"{layer}norm_dtype"] = DTYPES[norm_weights[index].dtype]
        for name, cache in (("k", k_cache), ("v", v_cache)):
            strides = zip(("batch", "slot", "head"), cache.stride(), strict=False)
            numbers |= {f"{layer}{name}_stride_{axis}": stride for axis, stride in strides}
    return Launch("kv_propagate", tensors, numbers)


# The signature that all backends of an op share.
def exit_mlp(*arguments):
    run_with_counters(mlp_launch(*arguments))


def kv_propagate(*arguments):
    """One launch for each MOST_KV_LAYERS layers, as specdec_ops.ops.kv.native makes them."""
    hidden, norms, keys, values, *middle, k_caches, v_caches = arguments
    for start in range(0, len(k_caches), MOST_KV_LAYERS):
        some = slice(start, start + MOST_KV_LAYERS)
        launch = kv_launch(hidden, norms[some], keys[some], values[some], *middle, k_caches[some], v_caches[some])
        kernels.run(launch)


IMPLEMENTATIONS = {"exit_mlp": exit_mlp, "kv_propagate": kv_propagate}
