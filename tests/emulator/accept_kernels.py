"""The acceptance and sampling launchers, emulated: scratch, counters, and the two paths of acceptance."""

import ctypes

import torch

from . import kernels
from .kernels import DTYPES, Launch

RULES = ("greedy", "match", "recursive", "traversal", "target_only", "kseq", "typical", "longest")  # AcceptRule
PATHS = {"auto": 0, "lazy": 1, "eager": 2}  # AcceptPath
MOST_EOS = 8


def accept_launch(
    rule, target, draft_tokens, draft_logits, target_to_draft, first_child, next_sibling, num_nodes,
    temperature, temperatures, top_k, top_ks, top_p, top_ps, draft_temperature, draft_temperatures,
    draft_top_k, draft_top_ks, draft_top_p, draft_top_ps, seed, seeds, position, positions, eos, thresholds,
    replacement, child_rows, tokens, nodes, num_accepted, next_tokens, status, finished, path="auto",
):  # fmt: skip
    """With scratch of just the size that the call needs, which may hold anything, and counters of zeros."""
    given = dict(locals())
    tensors = {name: value for name, value in given.items() if isinstance(value, torch.Tensor)}
    tensors["path"], tensors["draft"] = tensors.pop("nodes"), tensors.pop("draft_logits", None)
    ids = target.dim() == 2
    vocab = 0 if ids else target.shape[-1]
    numbers = {name: value for name, value in given.items() if isinstance(value, (int, float)) and name != "child_rows"}
    numbers |= {"rule": RULES.index(rule), "child_rows": child_rows, "target_is_ids": ids}
    numbers["width"] = next_tokens.numel() // len(tokens)
    numbers |= {"batch": tokens.shape[0], "nodes": target.shape[1], "max_depth": tokens.shape[1] - 1, "vocab": vocab}
    numbers |= strides("target_stride_", ("batch", "node"), target)
    numbers |= {"target_dtype": 0 if ids else DTYPES[target.dtype], "draft_vocab": vocab}
    numbers |= {"draft_tokens_stride_batch": draft_tokens.stride(0), "first_token_node": int(first_child is None)}
    if draft_logits is not None:
        numbers |= strides("draft_stride_", ("batch", "row"), draft_logits)
        numbers |= {"draft_dtype": DTYPES[draft_logits.dtype], "draft_vocab": draft_logits.shape[-1]}
    numbers["links_stride_batch"] = 0 if first_child is None or len(first_child) == 1 else first_child.stride(0)
    numbers["num_nodes_stride_batch"] = 0 if len(num_nodes) == 1 else 1
    numbers |= {"eos": (ctypes.c_int32 * MOST_EOS)(*eos), "eos_count": len(eos)}
    numbers |= {"thresholds": (ctypes.c_float * 2)(*thresholds), "launch_path": PATHS[path]}
    return with_scratch(Launch("accept", tensors, numbers))


def sample_launch(
    logits, draft_to_target, count, replacement, parents, first_parent, domain, temperature, temperatures,
    top_k, top_ks, top_p, top_ps, seed, seeds, position, positions, tokens, logprobs, logsumexp, status,
):  # fmt: skip
    given = dict(locals())
    tensors = {name: value for name, value in given.items() if isinstance(value, torch.Tensor)}
    numbers = {name: value for name, value in given.items() if isinstance(value, (int, float))}
    numbers |= strides("logits_stride_", ("batch", "row"), logits)
    numbers |= {"domain": ("sample", "draft").index(domain), "dtype": DTYPES[logits.dtype]}
    numbers |= dict(zip(("batch", "rows", "vocab"), logits.shape, strict=True))
    return with_scratch(Launch("sample", tensors, numbers))


def strides(prefix, axes, tensor):
    return {f"{prefix}{axis}": stride for axis, stride in zip(axes, tensor.stride(), strict=False)}


def with_scratch(launch):
    sizes = (ctypes.c_int64 * 2)()
    params = kernels.params_of(launch)
    kernels.library(launch.op, launch.op).specdec_scratch(ctypes.byref(params), sizes)
    if sizes[0]:
        launch.tensors["scratch"] = torch.full((sizes[0],), 0xFF, dtype=torch.uint8)
    if sizes[1]:
        launch.tensors["counters"] = torch.zeros(sizes[1], dtype=torch.int32)
    return launch


def launches(op):
    """Kernels that this op's library has launched so far."""
    return kernels.library(op, op).specdec_launches()


def run(launch, *order):
    kernels.run(launch, *order)
    assert counters_are_zero(launch.tensors), "the counters are not back at zero"


def counters_are_zero(tensors):
    return "counters" not in tensors or not tensors["counters"].any()


# The signature that all backends of an op share.
def accept(*arguments):
    run(accept_launch(*arguments))


def sample(*arguments):
    run(sample_launch(*arguments))


IMPLEMENTATIONS = {"accept": accept, "sample": sample}
