"""The kernels of early exit and of the cache as their launches compile them; used by test_triton_aot.py."""

from __future__ import annotations

from dataclasses import dataclass

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "i8": torch.int8}
OF_HIDDEN = ("hidden", "norm_weight", "x", "k_weight", "v_weight", "k_cache", "v_cache")
OF_HEAD = ("head", "weight", "last_weight")
BYTES = ("exited", "stop", "screen")  # int8, too
INT_POINTERS = ("token_map", "token", "top_tokens", "status", "active_rows", "inverse", "num_active", "counters",
                "counter", "rechecked", "found", "all_status", "requests", "slots", "page_table", "seen")  # fmt: skip
LONG_POINTERS = {"carried_sums": "*fp64", "carried_best": "*i64"}
NUMBERS = ("rows", "vocab", "programs", "top_k", "dim", "inputs", "outputs", "pages", "page_size", "kv_heads",
           "head_dim", "pairs", "batch", "capacity", "parts", "limit", "all_rows", "part", "begin", "end")  # fmt: skip
FLOATS = ("temperature", "norm_eps", "share", "threshold", "tolerance")
ALIGNED = (*OF_HIDDEN, *OF_HEAD, "y", "state", "dim", "inputs", "y_stride", "x_stride", "hidden_stride", "screen",
           "k", "v", "q", "q_out", *(f"{rows}_{step}" for rows in ("k", "v", "q", "out", "k_cache", "v_cache")
                                     for step in ("batch", "row", "head", "first", "slot")))  # fmt: skip
# Of kv_append: rows, and what else points to float32; all other pointers are to integers.
APPENDED = ("k", "v", "q", "k_cache", "v_cache", "q_out")
APPEND_FLOATS = ("cosines", "sines", "q_norm_weight", "k_norm_weight", "k_scales", "v_scales")
APPEND_INTEGERS = ("depths", "num_nodes", "offsets", "context_lens", "query_starts", "requests", "slots", "positions",
                   "page_table")  # fmt: skip


@dataclass(frozen=True)
class ExitSpec:
    """One compilation of a kernel: which one, hidden rows, type of the hidden rows and of the head, listed logits."""

    kernel: str
    rows: int = 4
    hidden: str = "bf16"
    head: str = "bf16"
    top_k: int = 0
    even: bool = True
    architectures: tuple = (80, 90, 100)

    def __str__(self):
        even = "" if self.even else "-tails"
        return f"{self.kernel}-rows{self.rows}-{self.hidden}-{self.head}-top{self.top_k}{even}"


SPECS = [
    ExitSpec("rows", architectures=(80,)),
    ExitSpec("head"),
    ExitSpec("head", rows=32, hidden="fp16", head="fp16", top_k=10, architectures=(80,)),
    ExitSpec("head", rows=64, top_k=16, even=False),
    ExitSpec("head", head="i8", architectures=(90,)),
    ExitSpec("head", rows=64, head="i8", architectures=(80,)),
    ExitSpec("head", hidden="fp32", head="fp32", architectures=(100,)),
    ExitSpec("head", rows=64, hidden="fp32", head="i8", architectures=(90,)),
    ExitSpec("merge", top_k=16, architectures=(90,)),
    ExitSpec("approximate", architectures=(90,)),
    ExitSpec("scan", architectures=(80,)),
    ExitSpec("scan", rows=64, top_k=10, architectures=(90,)),
    ExitSpec("scan", hidden="fp32", head="fp32", architectures=(80,)),
    ExitSpec("fallback", architectures=(80,)),
    ExitSpec("part"),
    ExitSpec("part", rows=64, top_k=16, even=False, architectures=(80, 90)),
    ExitSpec("part", rows=32, head="i8", architectures=(100,)),
    ExitSpec("part", hidden="fp32", head="fp32", architectures=(90,)),
    ExitSpec("settle", architectures=(80, 100)),
    ExitSpec("settle", top_k=16, architectures=(80, 90)),
    ExitSpec("layer", architectures=(80, 90)),
    ExitSpec("layer", rows=64, head="fp32", architectures=(100,)),
    ExitSpec("propagate", architectures=(80, 100)),
    ExitSpec("propagate", rows=64, hidden="fp16", even=False, architectures=(90,)),
    ExitSpec("propagate", hidden="fp32", architectures=(90,)),
    ExitSpec("append", architectures=(80, 100)),
    ExitSpec("append", head="i8", architectures=(80, 90)),
    ExitSpec("append", hidden="fp32", head="fp32", even=False, architectures=(90,)),
]


def multiplies(spec):
    """Whether the kernel has a product that is worth a pipeline."""
    return spec.kernel in ("head", "layer", "propagate", "approximate", "fallback", "part")


def plan_of(spec):
    from specdec_ops.triton_kernels.early_exit import exit_confidence as module

    multiplied = module.multiplied_type(DTYPES[spec.hidden], DTYPES[spec.head])
    shape = module.block_shape(spec.rows, multiplied, DTYPES[spec.head])
    return module.Plan(shape, multiplied, 264, max(2, spec.top_k), 4096)


def compile_exit(spec, arch, compile_typed):
    """As for a dim of 4,096 and a large vocabulary."""
    plan = plan_of(spec)
    kernel, constants, warps, stages = {
        "rows": rows_launch, "head": head_launch, "merge": merge_launch, "layer": layer_launch,
        "propagate": propagate_launch, "approximate": approximate_launch, "scan": scan_launch,
        "fallback": fallback_launch, "part": part_launch, "settle": settle_launch, "append": append_launch,
    }[spec.kernel](spec, plan)  # fmt: skip
    types = {name: argument_type(name, spec, plan) for name in kernel.arg_names}
    return compile_typed(kernel, constants, arch, warps, stages, types.__getitem__, ALIGNED.__contains__)


def rows_launch(spec, plan):
    from specdec_ops.triton_kernels.early_exit.exit_kernels import rows_kernel

    return rows_kernel, {"BLOCK": 4096, "WIDEN": False}, 8, 3


def head_launch(spec, plan):
    from specdec_ops.triton_kernels.early_exit.exit_kernels import head_kernel

    shape = plan.shape
    constants = shape_constants(spec, shape) | {"LIST": plan.list} | ({} if spec.head == "i8" else {"scales": None})
    return head_kernel, constants, shape.warps, shape.stages


def merge_launch(spec, plan):
    from specdec_ops.triton_kernels.early_exit.exit_kernels import merge_kernel

    return merge_kernel, list_constants(plan) | {"MEASURE": "entropy", "LEVEL": "any", "BLOCK": 256}, 8, 3


def shape_constants(spec, shape):
    constants = {"ROWS": shape.rows, "BLOCK_V": shape.entries, "BLOCK_K": shape.dims, "EVEN": spec.even}
    return constants | {"WIDEN": False}


def list_constants(plan):
    return {"LISTED": plan.listed, "LIST": plan.list, "PROGRAMS": 512}


def approximate_launch(spec, plan):
    from specdec_ops.triton_kernels.early_exit import exit_confidence, screen_kernels

    shape = exit_confidence.block_shape(spec.rows, plan.multiplied, torch.int8)
    constants = shape_constants(spec, shape) | {"LIST": plan.list}
    return screen_kernels.approximate_kernel, constants, shape.warps, shape.stages


def scan_launch(spec, plan):
    from specdec_ops.triton_kernels.early_exit.screen_kernels import scan_kernel

    constants = shape_constants(spec, plan.shape) | list_constants(plan)
    constants |= {"MEASURE": "max_prob", "PARTS": 64, "CHUNK": 2048, "LANES": 32 * plan.shape.warps}
    return scan_kernel, constants, plan.shape.warps, plan.shape.stages


def fallback_launch(spec, plan):
    from specdec_ops.triton_kernels.early_exit.screen_kernels import fallback_kernel

    constants = shape_constants(spec, plan.shape) | list_constants(plan)
    constants |= {"MEASURE": "max_prob", "LEVEL": "row", "BLOCK": 256}
    return fallback_kernel, constants, plan.shape.warps, plan.shape.stages


def part_launch(spec, plan):
    from specdec_ops.triton_kernels.early_exit.bounded_kernels import part_kernel

    return part_kernel, *head_launch(spec, plan)[1:]


def settle_launch(spec, plan):
    """The level for which verdicts of all rows are counted, and the measure with the most to it."""
    from specdec_ops.triton_kernels.early_exit.bounded_kernels import settle_kernel

    constants = list_constants(plan) | {"MEASURE": "entropy", "LEVEL": "any", "BLOCK": 256}
    return settle_kernel, constants, 8 if plan.list > 4 else 4, 3


def layer_launch(spec, plan):
    from specdec_ops.triton_kernels.early_exit import exit_mlp as module

    rows, tile, step = module.block_shape(spec.rows, 2048, 1024, DTYPES[spec.head], False)
    constants = {"ROWS": rows, "BLOCK_O": tile, "BLOCK_K": step, "BLOCK": module.FINISH_BLOCK, "WIDEN": False}
    single = spec.head == "fp32"
    return module.layer_kernel, constants | {"PRECISION": "ieee" if single else "tf32"}, 4, 2 if single else 5


def propagate_launch(spec, plan):
    from specdec_ops.triton_kernels.kv import kv_propagate as module

    rows, pairs, step, stages = module.block_shape(spec.rows, 4096, DTYPES[spec.hidden])
    constants = {"INTERLEAVED": False, "ROWS": rows, "BLOCK_P": pairs, "BLOCK_K": step, "EVEN": spec.even}
    return module.kv_propagate_kernel, constants | {"WIDEN": False}, 4, stages


def append_launch(spec, plan):
    """Trees with all that adds code, e4m3 caches where the head is int8; without `even` packed rows of a caller's own
    places.
    """
    from specdec_ops.triton_kernels.kv import kv_append as module

    constants = {"PACKED": not spec.even, "INTERLEAVED": not spec.even, "HEADS": module.HEADS, "BLOCK_P": 64}
    constants |= {"CODE": module.FLOAT8_E4M3 if spec.head == "i8" else module.PLAIN, "WIDEN": False}
    left_out = ("offsets", "requests", "slots", "positions")
    if not spec.even:
        left_out = ("depths", "num_nodes", "offsets", "context_lens", "query_starts")
    return module.kv_append_kernel, constants | dict.fromkeys(left_out), 4, 3


def append_type(name, spec):
    if name in APPENDED:
        return "*u8" if name.endswith("cache") and spec.head == "i8" else f"*{spec.hidden}"
    if name in APPEND_FLOATS:
        return "*fp32"
    if name in APPEND_INTEGERS:
        return "*i32"
    return "fp32" if name in ("norm_eps", "k_scale", "v_scale") else "i32"


def argument_type(name, spec, plan):
    """Of a pointer, after the tensor that the launch passes; numbers are int32 but for FLOATS."""
    if spec.kernel == "append":
        return append_type(name, spec)
    if name in FLOATS:
        return "fp32"
    if name in NUMBERS or name.endswith("stride"):
        return "i32"
    if name in OF_HIDDEN:
        return f"*{spec.hidden}"
    if name in OF_HEAD:
        return f"*{spec.head}"
    if name == "y" and spec.kernel != "layer":
        return "*" + next(short for short, dtype in DTYPES.items() if dtype == plan.multiplied)
    if name in BYTES:
        return "*i8"
    if name in LONG_POINTERS:
        return LONG_POINTERS[name]
    return "*i32" if name in INT_POINTERS else "*fp32"
