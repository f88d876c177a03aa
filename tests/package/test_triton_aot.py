"""The Triton kernels, compiled for real GPUs without one: nothing spills, shared memory fits, tensor cores are used.

The test starts this same file as a program, once per architecture and without TRITON_INTERPRET (with it, @triton.jit
gives interpreted functions, which cannot be compiled); the program prints what it measured as JSON.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.early_exit import exit_aot
from tests.kv import row_aot
from tests.linear import linear_aot

ARCHITECTURES = (80, 90, 100)
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
ALIGNED = ("q_", "k_", "v_", "out_", "size", "draft_size", "target_node", "target_batch_s", "draft_node",
           "draft_batch_s", "row_s", "batch_s")  # fmt: skip
INTEGERS = ("top_ks", "draft_top_ks", "positions", "parents", "tokens", "nodes", "num_accepted", "next_tokens",
            "status", "scratch", "draft_tokens", "target_to_draft", "draft_to_target", "first_child", "next_sibling",
            "num_nodes", "depths", "offsets", "context_lens", "page_table", "query_starts")  # fmt: skip
FLOATS = ("temperature", "top_p", "draft_temperature", "draft_top_p", "threshold_a", "threshold_b", "logit_scale",
          "softcap", "out_scale")  # fmt: skip
FLOAT_POINTERS = ("temperatures", "top_ps", "draft_temperatures", "draft_top_ps", "logprobs", "logsumexp", "lse",
                  "lse_a", "lse_b", "split_out", "split_stats", "sinks", "alibi_slopes")  # fmt: skip
NUMBERS = ("tokens", "nodes")  # of the attention kernels; to the acceptance kernels they are pointers
POINTERS = {"bf16": "*bf16", "fp16": "*fp16", "fp32": "*fp32"}
# The members of the arguments that are tuples.
SETTINGS = ("temperature", "temperatures", "top_ks", "top_p", "top_ps")
ACCEPT_TUPLES = {
    "target": ("target", "target_batch_stride", "target_node_stride", "size"),
    "draft": ("draft_logits", "draft_batch_stride", "draft_node_stride", "draft_size", "target_to_draft"),
    "tree": ("draft_tokens", "first_child", "next_sibling", "num_nodes"),
    "settings": SETTINGS,
    "draft_settings": tuple(f"draft_{name}" for name in SETTINGS),
    "noise": ("seeds", "positions"),
    "outputs": ("tokens", "nodes", "num_accepted", "next_tokens", "status", "finished"),
    "thresholds": ("threshold_a", "threshold_b"),
}
ATTENTION_TUPLES = {
    "queries": ("q", "q_batch_stride", "q_row_stride", "q_head_stride"),
    "k_cache": ("k_cache", "k_page_stride", "k_slot_stride", "k_head_stride"),
    "v_cache": ("v_cache", "v_page_stride", "v_slot_stride", "v_head_stride"),
    "output": ("out", "out_batch_stride", "out_row_stride", "out_head_stride", "lse"),
    "scratch": ("split_out", "split_stats"),
    "scales": ("logit_scale", "softcap", "out_scale"),
}
SAMPLE_TUPLES = {
    "logits": ("logits", "batch_stride", "row_stride", "size"),
    "settings": SETTINGS,
    "noise": ("seeds", "positions"),
    "outputs": ("tokens", "logprobs", "logsumexp", "status"),
}


@dataclass(frozen=True)
class Spec:
    """A form of the attention kernel: rows that share a KV head, dim, dtype, features, register limit, GPUs."""

    rows: int
    dim: int
    dtype: str = "bf16"
    paging: int = 0  # 0 dense, 1 tile inside a page, 2 any page size
    features: bool = False  # window, soft cap, sinks, ALiBi, packed rows, query_starts
    tree: bool = True
    split: bool = True
    registers: int = 255
    architectures: tuple = ARCHITECTURES

    def __str__(self):
        layout = ("dense", "pages", "anypage")[self.paging]
        extra = ("-features" if self.features else "") + ("" if self.tree else "-notree")
        return f"{self.dtype}-rows{self.rows}-dim{self.dim}-{layout}{extra}{'' if self.split else '-nosplit'}"


# The smallest and one of the largest on every architecture, the others on one (sm_80 has the least shared memory) or
# two, or on all with SPECDEC_OPS_ALL_TESTS=1.
SPECS = [
    Spec(16, 128, registers=168),
    Spec(16, 128, tree=False, split=False, registers=168, architectures=(90,)),
    Spec(32, 128, paging=2, features=True, architectures=(80,)),
    Spec(64, 128, paging=1, architectures=(100,)),
    Spec(64, 128, "fp16", features=True, architectures=(80,)),
    Spec(128, 128, architectures=(80, 90)),
    Spec(128, 128, paging=2, features=True),
    Spec(16, 64, "fp16", paging=1, registers=168, architectures=(100,)),
    Spec(128, 64, architectures=(90,)),
    Spec(64, 80, architectures=(80,)),
    Spec(128, 96, paging=1, architectures=(90,)),
    Spec(32, 256, architectures=(90,)),
    Spec(64, 256, paging=2, features=True, architectures=(80, 100)),
    Spec(16, 128, "fp32", features=True, registers=168, architectures=(80,)),
]
EVERYWHERE = os.environ.get("SPECDEC_OPS_ALL_TESTS") == "1"
PAIRS = [(spec, arch) for spec in SPECS for arch in (ARCHITECTURES if EVERYWHERE else spec.architectures)]
SMALL_KERNELS = ["merge_splits", "merge_states"]
# Of grow_tree the rows and branching of a level: EAGLE's, and the most there may be of either.
LEVELS = {"grow_tree first": (1, 10), "grow_tree": (10, 10), "grow_tree largest": (256, 64)}
TREES = [*LEVELS, "prune_tree"]


@dataclass(frozen=True)
class AcceptSpec:
    """One compilation of an acceptance kernel with all options that add code, or of the sampling kernel ("sample")."""

    rule: str
    architectures: tuple
    dtype: str = "bf16"
    draft: bool = True
    child_rows: bool = False

    def __str__(self):
        return f"{self.rule}-{self.dtype}{'' if self.draft else '-nodraft'}{'-childrows' if self.child_rows else ''}"


# Each on one architecture, for they are made of the same parts; with SPECDEC_OPS_ALL_TESTS=1 the largest on two.
ACCEPT_SPECS = [
    AcceptSpec("recursive", (80, 90) if EVERYWHERE else (90,)),
    AcceptSpec("traversal", (80, 100) if EVERYWHERE else (80,)),
    AcceptSpec("longest", (80,)),
    AcceptSpec("kseq", (90,)),
    AcceptSpec("target_only", (80,), draft=False),
    AcceptSpec("match", (100,), "fp16", draft=False),
    AcceptSpec("typical", (90,), draft=False),
    AcceptSpec("greedy", (100,), "fp32", draft=False),
    AcceptSpec("recursive", (100,), "fp32", child_rows=True),
    AcceptSpec("sample", (80, 100), draft=False),
]
ACCEPT_PAIRS = [(spec, arch) for spec in ACCEPT_SPECS for arch in spec.architectures]
LINEAR_PAIRS = [(spec, arch) for spec in linear_aot.SPECS for arch in spec.architectures]
EXIT_PAIRS = [(spec, arch) for spec in exit_aot.SPECS for arch in spec.architectures]


@pytest.fixture(scope="module")
def measured():
    """{architecture: {name: measurements}}; the architectures compile side by side.

    Triton keeps what it has compiled under build/, by the kernel's source, constants, version and architecture.
    """
    pytest.importorskip("triton")
    import specdec_ops

    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env["TRITON_CACHE_DIR"] = str(Path(__file__).parents[2] / "build" / "triton")
    env["PYTHONPATH"] = str(Path(specdec_ops.__file__).parents[1])
    running = {
        arch: subprocess.Popen([sys.executable, __file__, str(arch)], env=env, stdout=subprocess.PIPE, text=True)
        for arch in ARCHITECTURES
    }
    printed = {arch: process.communicate(timeout=600)[0] for arch, process in running.items()}
    assert all(process.returncode == 0 for process in running.values())
    return {arch: json.loads(text.splitlines()[-1]) for arch, text in printed.items()}


@pytest.mark.parametrize(("spec", "arch"), PAIRS, ids=lambda value: str(value))
def test_attention_kernel_fits_the_device(spec, arch, measured):
    """The stack is what the sums that are made slot by slot need, which is rare; the loop over tiles needs none."""
    use = measured[arch][str(spec)]
    assert use["stack"] <= max(stack_limit(), 32) and use["local"] == 0, use
    assert use["registers"] <= spec.registers, use
    assert use["registers"] * 32 * use["warps"] <= 65536, use
    assert use["shared"] <= SHARED_LIMIT[arch], use
    assert use["tensor_core_instructions"] > 0 or spec.dtype == "fp32", use


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("name", SMALL_KERNELS)
def test_merge_kernels_fit_the_device(name, arch, measured):
    use = measured[arch][name]
    assert use["stack"] == 0 and use["local"] == 0 and use["registers"] <= 128, use
    assert use["shared"] <= SHARED_LIMIT[arch] // 4, use
    if name == "merge_splits":  # the sums of all its splits are under way at once, in 128 threads
        from specdec_ops.triton_kernels.attention import tree_attention as module

        assert use["loads_of_16_bytes"] >= module.MERGE_ROWS * module.MERGE_PARTS * 128 // 4 // 128, use


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("name", TREES)
def test_kernels_of_growing_trees_fit_the_device(name, arch, measured):
    use = measured[arch][name]
    if "largest" not in name:  # which is 16,384 candidates in one program
        assert use["stack"] == 0 and use["local"] == 0 and use["registers"] <= 168, use
    assert use["shared"] <= SHARED_LIMIT[arch] // 4, use


@pytest.mark.parametrize(("spec", "arch"), ACCEPT_PAIRS, ids=lambda value: str(value))
def test_acceptance_kernels_fit_the_device(spec, arch, measured):
    """Without a spill at 128 registers, so that a multiprocessor holds their 512 threads; rows come in 16-byte or
    asynchronous loads, several blocks ahead."""
    use = measured[arch][str(spec)]
    # For sampling the assembler chooses 64 registers and a second program per multiprocessor over a few scalars.
    few = 48 if use["registers"] <= 64 else stack_limit()
    assert use["stack"] <= few and use["local"] == 0, use
    assert use["registers"] * 32 * use["warps"] <= 65536, use
    assert use["shared"] <= SHARED_LIMIT[arch] // 2, use
    assert use["asynchronous_copies"] > 0, use


@pytest.mark.parametrize(("spec", "arch"), ACCEPT_PAIRS, ids=lambda value: str(value))
def test_what_decides_is_divided_exactly(spec, arch, measured):
    """Triton's `/` of float32 is off by up to 2 ulp on GPUs: a draw that is nearly a tie would differ by backend."""
    assert measured[arch][str(spec)]["approximate_quotients"] == 0


@pytest.mark.parametrize(("spec", "arch"), EXIT_PAIRS, ids=lambda value: str(value))
def test_exit_kernels_fit_the_device(spec, arch, measured):
    """No spill; products of 16-bit types by tensor cores, from a pipeline of which two fit Hopper's processors."""
    use = measured[arch][str(spec)]
    assert use["stack"] <= stack_limit() and use["local"] == 0, use
    assert use["registers"] * 32 * use["warps"] <= 65536, use
    assert use["shared"] <= SHARED_LIMIT[arch] // (1 if arch == 80 else 2), use
    if exit_aot.multiplies(spec):
        single = "fp32" in (spec.hidden, spec.head)
        assert use["asynchronous_copies"] > 0 and (use["tensor_core_instructions"] > 0) != single, use


@pytest.mark.parametrize(("spec", "arch"), LINEAR_PAIRS, ids=lambda value: str(value))
def test_linear_kernels_fit_the_device(spec, arch, measured):
    """The same. Blocks of GGUF files begin anywhere, so their bytes are no asynchronous copies."""
    use = measured[arch][str(spec)]
    assert use["stack"] <= stack_limit() and use["local"] == 0, use
    assert use["registers"] * 32 * use["warps"] <= 65536, use
    assert use["shared"] <= SHARED_LIMIT[arch] // 2, use
    if spec.weight:
        assert (use["tensor_core_instructions"] > 0) != (spec.x == "fp32"), use
        assert use["asynchronous_copies"] > 0 or spec.weight in linear_aot.BLOCK_BYTES, use


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("name", row_aot.NAMES)
def test_kernels_that_move_rows_fit_the_device(name, arch, measured):
    """Without a spill, and 16 bytes at a time."""
    use = measured[arch][name]
    assert use["stack"] == 0 and use["local"] == 0 and use["registers"] <= 128, use
    assert use["loads_of_16_bytes"] > 0 and use["stores_of_16_bytes"] > 0, use


def test_large_tiles_prefetch_with_asynchronous_copies(measured):
    """The loop over the context is pipelined: without it a tile's load would wait for the tile before."""
    for spec, arch in PAIRS:
        assert spec.dtype == "fp32" or measured[arch][str(spec)]["asynchronous_copies"] > 0, (arch, str(spec))


def stack_limit():
    """No byte of stack, hence no spill, with the Triton that the block shapes were chosen for; older assemblers fall
    short by a few registers in three of the kernels for sm_80."""
    import triton

    return 0 if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9) else 32


def compile_attention(spec, arch):
    from specdec_ops.triton_kernels.attention import tree_attention as module

    shape = module.block_shape(spec.rows, spec.dim, 4 if spec.dtype == "fp32" else 2, arch // 10, spec.paging > 0)
    dim0, dim1 = module.split_dim(spec.dim, shape.rows)
    constants = {
        "GROUP": 4, "DIM": spec.dim, "DIM0": dim0, "DIM1": dim1, "BLOCK_M": shape.rows, "BLOCK_N": shape.slots,
        "SPLIT_SLOTS": shape.split_slots, "PAGING": spec.paging, "WINDOW": spec.features, "SOFTCAP": spec.features,
        "SPLIT": spec.split, "WIDEN": False,
    }  # fmt: skip
    present = {
        "split_out": spec.split, "split_stats": spec.split, "ancestors": spec.tree, "depths": spec.tree,
        "num_nodes": spec.tree, "offsets": spec.features, "query_starts": spec.features, "sinks": spec.features,
        "alibi_slopes": spec.features, "page_table": spec.paging > 0,
    }  # fmt: skip
    constants |= {name: None for name, there in present.items() if not there}
    kernel = module.tree_attention_kernel
    element = POINTERS[spec.dtype]
    return compile_kernel(kernel, constants, element, arch, shape.warps, shape.stages, NUMBERS, ATTENTION_TUPLES)


def compile_small(name, arch):
    if name == "merge_states":
        from specdec_ops.triton_kernels.attention import merge_states as module

        constants = {"DIM": 128, "PADDED_DIM": 128, "ROWS": module.ROWS}
        return compile_kernel(module.merge_states_kernel, constants, "*bf16", arch, 4, 1)
    from specdec_ops.triton_kernels.attention import tree_attention as module

    constants = {
        "DIM": 128, "PADDED_DIM": 128, "ROWS": module.MERGE_ROWS, "PARTS": module.MERGE_PARTS, "SPLIT_SLOTS": 512,
        "BLOCK_N": 64, "WINDOW": True, "TREE": True,
    }  # fmt: skip
    return compile_kernel(module.merge_splits_kernel, constants, "*bf16", arch, 4, 3, NUMBERS, ATTENTION_TUPLES)


def compile_tree(name, arch):
    """With everything that adds code."""
    from specdec_ops.triton_kernels.topology import grow_tree as module

    if name == "prune_tree":
        from specdec_ops.triton_kernels.topology import prune_tree as module

        constants = {"BLOCK": module._MAX_BLOCK, "BLOCK_NODES": module.BLOCK_NODES, "WORDS": 1}
        return compile_typed(module.prune_tree_kernel, constants, arch, 8, 3, tree_type, lambda _: False)
    rows, branching = LEVELS[name]
    tile, shape = module.tile_of(rows, branching), {"WIDTH": 16 if rows < 16 else 256, "BLOCK": 256}
    constants = {"FIRST": rows == 1, **tile, **shape}
    warps = module.warps_of(rows, branching)
    return compile_typed(module.grow_tree_kernel, constants, arch, warps, 3, tree_type, lambda _: False)


def tree_type(name):
    """The sizes and places of a level are numbers, everything else is a table."""
    sizes = ("level", "rows", "branching", "width", "size", "nodes", "words", "draft_vocab")
    if name in sizes or name.startswith(("eos_", "first_parent", "first_candidate", "first_node")):
        return "i32"
    others = {"ancestors": "*i64", "active": "*i8", "top_logprobs": "*fp32", "frontier_scores": "*fp32"}
    return others.get(name, "*fp32" if name == "scores" else "*i32")


def compile_accept(spec, arch):
    from specdec_ops.triton_kernels.acceptance import accept, sample

    block = sample.block_of(10**5)
    if spec.rule == "sample":
        kernel, tuples = sample.sample_kernel, SAMPLE_TUPLES
        constants = {"REPLACEMENT": False, "DRAFTING": True, "FILTER": True, "PER_ROW": False, "BLOCK": block}
    else:
        kernel, tuples = accept.accept_kernel, ACCEPT_TUPLES
        constants = {
            "RULE": accept.RULES.index(spec.rule), "IDS": False, "REPLACEMENT": False, "CHILD_ROWS": spec.child_rows,
            "FILTER": True, "DRAFT_FILTER": True, "BLOCK": block,
        }  # fmt: skip
        if not spec.draft:
            constants |= {"draft_logits": None, "target_to_draft": None}
    return compile_kernel(kernel, constants, POINTERS[spec.dtype], arch, sample.warps_of(block), 3, tuples=tuples)


def compile_kernel(kernel, constants, element_pointer, arch, warps, stages, numbers=(), tuples=None):
    """Compile as the launch would: tensors of elements and their strides are aligned, everything else unknown."""

    def type_of(name):
        return "i32" if name in numbers else argument_type(name, element_pointer)

    def is_aligned(name):
        return type_of(name) == element_pointer or name.startswith(ALIGNED) or "split_" in name

    return compile_typed(kernel, constants, arch, warps, stages, type_of, is_aligned, tuples or {})


def compile_typed(kernel, constants, arch, warps, stages, type_of, is_aligned, tuples=None):
    """The same with the types and alignments of the arguments that are not constants, and the members of tuples."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, found, aligned = {}, {}, {}
    for index, argument in enumerate(kernel.arg_names):
        members = tuples.get(argument) if tuples and argument not in constants else None
        types = []
        for path, name in [((index, j), name) for j, name in enumerate(members)] if members else [((index,), argument)]:
            types.append("constexpr" if name in constants else type_of(name))
            if name in constants:
                found[path] = constants[name]
            elif is_aligned(name):
                aligned[path] = [["tt.divisibility", 16]]
        signature[argument] = tuple(types) if members else types[0]
    source = ASTSource(kernel, signature, found, aligned)
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": "tree_attention" not in kernel.__module__}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def argument_type(name, element_pointer):
    if name in ("q", "k_cache", "v_cache", "out", "out_a", "out_b", "target", "draft_logits", "logits"):
        return element_pointer
    if name in FLOAT_POINTERS:
        return "*fp32"
    if name in INTEGERS:
        return "*i32"
    if name in ("ancestors", "seeds"):
        return "*i64"
    if name == "finished":
        return "*i8"
    return "fp32" if name in FLOATS else "i32"


def measure(compiled):
    import triton.backends.nvidia

    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        dump = subprocess.run(
            [tool, "--dump-resource-usage", cubin.name], capture_output=True, text=True, check=True
        ).stdout
    use = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", dump)}
    ptx = compiled.asm["ptx"]
    return {
        "registers": use["REG"],
        "stack": use["STACK"],
        "local": use["LOCAL"],
        "shared": compiled.metadata.shared,
        "warps": compiled.metadata.num_warps,
        "tensor_core_instructions": len(re.findall(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)", ptx)),
        "asynchronous_copies": ptx.count("cp.async.c"),
        "approximate_quotients": len(re.findall(r"\bdiv\.(?:full|approx)\S*f32", ptx)),
        "loads_of_16_bytes": len(re.findall(r"ld\.global\.\S*v4\.b32", ptx)),
        "stores_of_16_bytes": len(re.findall(r"st\.global\.\S*v4\.b32", ptx)),
    }


def main(arch):
    results = {
        str(spec): measure(compile_attention(spec, arch)) for spec, architecture in PAIRS if architecture == arch
    }
    results |= {name: measure(compile_small(name, arch)) for name in SMALL_KERNELS}
    results |= {name: measure(compile_tree(name, arch)) for name in TREES}
    results |= {str(spec): measure(compile_accept(spec, arch)) for spec in ACCEPT_SPECS if arch in spec.architectures}
    for spec, architecture in EXIT_PAIRS:
        if architecture == arch:
            results[str(spec)] = measure(exit_aot.compile_exit(spec, arch, compile_typed))
    for spec, architecture in LINEAR_PAIRS:
        if architecture == arch:
            results[str(spec)] = measure(linear_aot.compile_linear(spec, arch, compile_typed))
    results |= {name: measure(row_aot.compile_row(name, arch, compile_typed)) for name in row_aot.NAMES}
    print(json.dumps(results))


if __name__ == "__main__":
    main(int(sys.argv[1]))
