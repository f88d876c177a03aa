"""The compiled CUDA code: its architectures, registers and spills, and what its launchers say without a GPU."""

import os
import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import specdec_ops
from specdec_ops._core import loader
from tests.emulator import kernels
from tests.harness.public_calls import CALLS, run

MODULE, REASON = loader.load()
if MODULE is None or not MODULE.build_info()["cuda"]:
    reason = REASON or f"the compiled module has no CUDA kernels: {MODULE.build_info()['left_out']}"
    pytest.skip(reason, allow_module_level=True)

ARCHS = MODULE.build_info()["archs"].split()
ROOT = Path(__file__).parents[2]
# With this many registers per thread, a block of 256 threads leaves room for three more on every multiprocessor.
MOST_REGISTERS = 64
# Blocks of acceptance and sampling have 512 threads, those that walk 384, and one fits a multiprocessor.
ACCEPTANCE = {
    "accept_walk_kernel": 168,
    "accept_distributions_kernel": 128,
    "accept_draw_kernel": 128,
    "sample_kernel": 128,
}
# Of early exit: two blocks of 256 threads fill a multiprocessor. Heads of 16 bits for 8 to 64 hidden rows, float32 ones
# for 8 and 32, int8 ones for 8 to 32, and for 8 and 16 in two parts.
# The screened form for few and many rows and three dtypes of heads.
EXIT = {"exit_confidence_kernel": 4 + 4 + 2 + 3 + 2, "screen_kernel": 6, "recheck_kernel": 3}
# One block of 256 threads on a multiprocessor keeps its memory busy: much is under way in each.
DRAFT = {"exit_mlp_kernel": 255, "kv_propagate_kernel": 255, "linear_kernel": 255}
# What moves rows, by 16, 4, 2 and 1 bytes.
MOVES = ("gather_layer_kv_kernel", "kv_commit_kernel", "kv_copy_pages_kernel")
APPEND = {"kv_append_kernel": 80}  # three blocks of 256 threads
# tree_attention has blocks of these packed rows for each of the compiled dims, those of fp8 caches after the others.
# Twice, for bfloat16 and float16.
ROWS = (16, 32, 64, 128)
DIMS = (64, 96, 128, 192, 256, 64, 128)
ATTENTION = 2 * len(DIMS) * len(ROWS)
KERNELS = {  # instantiations of each
    "measure_exit_kernel": 1,
    "build_topology_kernel": 2,
    "grow_tree_kernel": 1,
    "merge_states_kernel": 6,
    "prune_tree_kernel": 1,
    "any_kernel": 1,
    "tree_attention_kernel": ATTENTION,
    **dict.fromkeys(ACCEPTANCE, 1),
    **EXIT,
    "exit_mlp_kernel": 2,
    "kv_append_kernel": 3,
    "kv_propagate_kernel": 9,
    "linear_kernel": 4 + 4 + 2,  # two dtypes of 16 bits with plain and quantised weights for few and more rows; float32
    "rms_norm_kernel": 3,
    **dict.fromkeys(MOVES, 4),
}


@pytest.fixture(scope="module")
def cuobjdump():
    """The tool that Triton's wheel brings along, on the compiled module or another file."""
    triton = find_spec("triton")
    tool = triton and Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool or not tool.exists():
        pytest.skip("there is no cuobjdump: triton is not installed")

    def dump(*options, file=MODULE.__file__, cwd=None):
        command = [str(tool), *options, str(file)]
        return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=True).stdout

    return dump


@pytest.fixture(scope="module")
def listing(cuobjdump):
    """What every kernel uses."""
    return cuobjdump("--dump-resource-usage")


@pytest.fixture(scope="module")
def usage(listing):
    """{(architecture, function): {"REG": ..., "STACK": ..., "LOCAL": ...}}"""
    return usage_in(listing)


def usage_in(listing, arch=None):
    """The same from any listing; that of code for a single architecture does not name it."""
    found = {}
    for line in listing.splitlines():
        if match := re.match(r"arch = sm_(\w+)", line):
            arch = match[1]
        elif match := re.match(r"\s*Function (\w+):", line):
            function = match[1]
        elif "REG:" in line:
            found[arch, function] = {name: int(count) for name, count in re.findall(r"(\w+):(\d+)", line)}
    return found


@pytest.fixture(scope="module")
def functions(cuobjdump):
    """{function: its instructions} for SM 8.0."""
    if "8.0" not in ARCHS:
        pytest.skip("not built for SM 8.0")
    bodies = re.split(r"\n\s*Function : ", cuobjdump("--dump-sass", "--gpu-architecture", "sm_80"))[1:]
    return {body.partition("\n")[0]: body for body in bodies}


def test_every_kernel_is_there_for_every_architecture(usage):
    for arch in ARCHS:
        number = arch.removesuffix("+PTX").replace(".", "")
        functions = [function for built_for, function in usage if built_for == number]
        for kernel, instantiations in KERNELS.items():
            assert sum(kernel in function for function in functions) == instantiations, (arch, kernel)
        assert len(functions) == sum(KERNELS.values()), f"SM {arch} has kernels that this test does not know"


def test_ptx_is_there_for_later_gpus(listing):
    assert ("Fatbin ptx code" in listing) == any(arch.endswith("+PTX") for arch in ARCHS)


def test_no_spills_and_no_local_memory(usage):
    assert_fits(usage)


def assert_fits(usage):
    for where, used in usage.items():
        assert used["STACK"] <= most_stack(*where) and used["LOCAL"] == 0, (where, used)
        assert used["REG"] <= most_registers(*where), (where, used)


# `make test` builds for 8.0 and 9.0. Of the architectures after them each sees a part of the kernels, and each kernel
# one of them: PTX of the module becomes machine code, as in the driver of a GPU that the module has no code for.
FROM_PTX = {
    "accept_walk_kernel": "100",
    "build_topology_kernel": "100",
    "kv_propagate_kernelINS0_7KvShapeI13__nv_bfloat16": "100",
    "tree_attention_kernelINS0_9TileShapeI13__nv_bfloat16S3_Li256": "100",
    "exit_mlp_kernelILi4E": "120",
    "exit_mlp_kernelILi8E": "100",
    "gather_layer_kv_kernel": "100",
    "kv_commit_kernel": "120",
    "kv_copy_pages_kernel": "120",
    "kv_propagate_kernelINS0_7KvShapeI6__half": "120",
    "merge_states_kernel": "120",
    "sample_kernel": "120",
    "tree_attention_kernelINS0_9TileShapeI6__halfS3_Li64": "120",
}
# Sources whose code depends on the architecture (SPECIFIC_TO_ARCH in setup.py) are compiled for it.
FROM_SOURCES = {
    "exit_confidence_bf16": "100",
    "screened_exit_f16": "100",
    "tree_attention_bf16_fp8_128": "100",
    "exit_confidence_int8": "120",
    "exit_confidence_int8_float32": "100",
    "screened_exit_f32": "120",
    "tree_attention_f16_fp8_64": "120",
}


def compiled_for(arch, source, folder, cuobjdump):
    """What the kernels of a source use on another architecture than the module has. Skips where that has no meaning."""
    if any(arch == built.partition("+")[0].replace(".", "") for built in ARCHS):
        pytest.skip(f"the module has machine code for SM {arch}")
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")
    if nvcc is None:
        pytest.skip("there is no nvcc")
    if f"sm_{arch}" not in subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True).stdout.split():
        pytest.skip(f"this nvcc knows no SM {arch}")
    cubin = folder / "kernels.cubin"
    options = ["-O3", "-std=c++17", f"-arch=sm_{arch}", f"-I{ROOT / 'csrc'}", "-cubin", "-o", cubin]
    done = subprocess.run([nvcc, *options, source], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    used = usage_in(cuobjdump("--dump-resource-usage", file=cubin), arch)
    assert used
    return used


@pytest.fixture(scope="module")
def ptx(cuobjdump, tmp_path_factory):
    """The files of PTX in the module."""
    if not any(arch.endswith("+PTX") for arch in ARCHS):
        pytest.skip("the module has no PTX")
    folder = tmp_path_factory.mktemp("ptx")
    cuobjdump("--extract-ptx", "all", cwd=folder)
    return sorted(folder.glob("*.ptx"))


@pytest.mark.parametrize(("kernel", "arch"), FROM_PTX.items())
def test_ptx_fits_later_architectures(kernel, arch, ptx, cuobjdump, tmp_path):
    (file,) = (file for file in ptx if re.search(rf"\.entry \w*{kernel}", file.read_text()))
    assert_fits(compiled_for(arch, file, tmp_path, cuobjdump))


@pytest.mark.parametrize(("source", "arch"), FROM_SOURCES.items())
def test_sources_fit_later_architectures(source, arch, cuobjdump, tmp_path):
    assert_fits(compiled_for(arch, next((ROOT / "csrc").rglob(f"{source}.cu")), tmp_path, cuobjdump))


def attention_shape(function):
    """(dim, rows) of an instantiation of tree_attention_kernel, or None."""
    match = "tree_attention_kernel" in function and re.search(r"Li(\d+)ELi(\d+)E", function)
    return (int(match[1]), int(match[2])) if match else None


def most_registers(arch, function):
    """Per thread. Three blocks of 128 threads of tree_attention share a multiprocessor, and two of 256 threads, but for
    128 rows of large dims; two blocks of early exit share one where their memory fits.
    """
    if any(kernel in function for kernel in EXIT):
        return 255 if "Li64" in function and arch not in ("90", "100") else 128
    if (shape := attention_shape(function)) is None:
        return next(
            (most for kernel, most in (ACCEPTANCE | DRAFT | APPEND).items() if kernel in function), MOST_REGISTERS
        )
    dim, rows = shape
    if rows == 128:
        return 255 if dim > 128 else 128
    return 128 if dim > 128 and rows == 64 else 168


def most_stack(arch, function):
    """Bytes per thread. Blocks of 256 threads of tree_attention spill a little, so that two of them fit. The compiler
    keeps a few words more there on 10.0 and 12.0, so that three blocks of 64 rows fit, and ten of the walk on 12.0.
    """
    if arch == "120" and "accept_walk_kernel" in function:
        return 40
    if arch in ("100", "120") and attention_shape(function) in ((64, 64), (128, 64)):
        return 16
    return (104 if arch == "120" else 96) if may_spill(function) else 0


def may_spill(function):
    """Of fp8 caches also 64 rows of dim 128, by two words on 8.0."""
    shape = attention_shape(function)
    return shape in SPILLED or ("Float8" in function and shape == (128, 64))


SPILLED = {*((dim, 128) for dim in DIMS if dim <= 128), (192, 64), (256, 64)}


def loop_over_tiles(body):
    """The instructions of the innermost loop that holds all kinds of a tile's work: copies, scores and values."""
    code = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,6})\*/\s+([^;]+);", body)]
    loops = []
    for at, text in code:
        back = re.search(r"\bBRA\S*(?: \S+,)? 0x([0-9a-f]+)", text)
        if back and int(back[1], 16) < at:
            loop = [inner for place, inner in code if int(back[1], 16) <= place <= at]
            if all(any(re.search(what, inner) for inner in loop) for what in (*MATRIX.values(), COPIES)):
                loops.append(loop)
    return min(loops, key=len)


COPIES = r"\bLDGSTS\.E\S*\.128\b"
MATRIX = {"HMMA": r"\bHMMA\.16816\.F32", "ldmatrix": r"\bLDSM\.16\.\S*M88\.4\b"}


def test_attention_uses_what_the_hardware_has(functions):
    """Tensor cores, asynchronous copies of 16 bytes, 16-byte stores of results, and no local memory."""
    needed = {"copies": COPIES, **MATRIX, "loads": r"\bLDG\.E\S*\.128\b", "stores": r"\bSTG\.E\S*\.128\b"}
    kernels = {function: body for function, body in functions.items() if attention_shape(function) is not None}
    for function, body in kernels.items():
        for what, pattern in needed.items():
            assert re.search(pattern, body), (function, what)
        if not may_spill(function):
            assert not re.search(r"\b(LDL|STL)\b", body), function
    assert len(kernels) == ATTENTION


def test_what_attention_spills_is_not_in_its_way(functions):
    """Nothing is written in the loop over tiles; of the few words that are read most are for masked tiles."""
    spilled = [body for function, body in functions.items() if may_spill(function)]
    assert len(spilled) == 2 * (sum(dim <= 128 for dim in DIMS) + 3)
    for body in spilled:
        loop = loop_over_tiles(body)
        assert sum(bool(re.search(MATRIX["HMMA"], text)) for text in loop) >= 64
        assert not any(re.search(r"\bSTL\b", text) for text in loop), body.partition("\n")[0]
        assert sum(bool(re.search(r"\bLDL\b", text)) for text in loop) <= 16, body.partition("\n")[0]


def test_heads_use_what_the_hardware_has(functions):
    """Asynchronous copies of 16 bytes; tensor cores, but for float32 heads; no local memory."""
    kernels = {name: body for name, body in functions.items() if any(kernel in name for kernel in EXIT)}
    assert len(kernels) == sum(EXIT.values())
    for function, body in kernels.items():
        assert re.search(COPIES, body), function
        assert bool(re.search(MATRIX["HMMA"], body)) == ("HeadShapeIff" not in function), function
        assert not re.search(r"\b(LDL|STL)\b", body), function


def test_kv_propagate_uses_what_the_hardware_has(functions):
    """The same copies and loads; tensor cores for 16 bits."""
    kernels = {function: body for function, body in functions.items() if "kv_propagate_kernel" in function}
    for function, body in kernels.items():
        wide = {"copies": COPIES, "loads": r"\bLDG\.E\S*\.128\b"} | ({} if "KvShapeIf" in function else MATRIX)
        for what, pattern in wide.items():
            assert re.search(pattern, body), (function, what)
    assert sum("KvShapeIf" in function for function in kernels) == 3


def test_rows_move_by_16_bytes(functions):
    """Read and written."""
    kernels = [body for name, body in functions.items() if any(f"{kernel}ILi16E" in name for kernel in MOVES)]
    assert len(kernels) == len(MOVES)
    for body in kernels:
        assert re.search(r"\bLDG\.E\S*\.128\b", body) and re.search(r"\bSTG\.E\S*\.128\b", body)


def test_exit_mlp_reads_weights_in_packs(functions):
    bodies = [body for function, body in functions.items() if "exit_mlp_kernel" in function]
    assert all(len(re.findall(r"\bLDG\.E\S*\.128\b", body)) >= 8 * 3 for body in bodies)


def launch(call, *, empty=False):
    """Hand what a public op would hand over to its CUDA launcher, which does not come to read memory here.

    empty: all tensors without what their first dimension counts, which the op itself would not hand over.
    """
    op, *parts = kernels.captured(call)[-1]
    if empty:
        parts = [part._replace(**{n: v[:0] for n, v in part._asdict().items() if torch.is_tensor(v)}) for part in parts]
    getattr(MODULE, f"{op}_cuda")(*parts, lambda *_: (0, 0), 0, 0)


def attention_call(*, shift=0, dtype=torch.bfloat16, cache=None, batch=1, dim=64):
    """Of 4 rows over 128 slots, whose first elements are `shift` behind a multiple of 16 bytes."""
    q, k = (torch.zeros(batch * rows * dim + shift, dtype=dtype)[shift:].view(batch, rows, 1, dim) for rows in (4, 128))
    k = k if cache is None else k.to(cache)
    return lambda: specdec_ops.tree_attention(q, k, k, None, torch.zeros(batch, dtype=torch.int32))


def chain_call(batch=1, vocab=100):
    """A chain of 4 nodes."""
    target, draft = torch.zeros(batch, 4, vocab), torch.zeros(batch, 3, vocab)
    tokens = torch.zeros(batch, 3, dtype=torch.int32)
    return lambda: specdec_ops.chain_accept(target, tokens, draft, seeds=0, positions=0)


@pytest.mark.parametrize("name", [name for name, call in CALLS.items() if call.op])
def test_empty_batch_needs_no_device(name):
    launch(lambda: run(name), empty=True)


def test_too_large_a_vocabulary_is_a_sentence():
    with pytest.raises(RuntimeError, match=r"^accept_cuda: a size is beyond what the kernel takes .*393216"):
        launch(chain_call(vocab=393_217))


def test_too_many_nodes_is_a_sentence():
    with pytest.raises(
        RuntimeError, match=r"^build_topology_cuda: a size is beyond what the kernel takes .*2048 nodes"
    ):
        launch(lambda: specdec_ops.build_topology(torch.full((1, 2049), -1, dtype=torch.int32)))


FLOAT8 = torch.float8_e4m3fn


@pytest.mark.parametrize(
    "wrong", [{"dtype": torch.float32}, {"dim": 72}, {"dim": 272}, {"cache": FLOAT8, "dim": 144}, {"shift": 4}], ids=str
)
def test_what_the_attention_launcher_refuses(wrong):
    with pytest.raises(RuntimeError, match=r"^tree_attention_cuda: a size is beyond .*multiples of 16 up to 256, rows"):
        launch(attention_call(**wrong))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_reason_is_a_sentence():
    reason = r"^(no CUDA driver, or one that is older than CUDA \d+\.\d+|the CUDA driver sees no device)$"
    assert re.match(reason, MODULE.cuda_device_error(0))
    with pytest.raises(RuntimeError, match=r"no CUDA driver|sees no device"):
        launch(lambda: run("merge_states"))
    with pytest.raises(RuntimeError, match=r"^counters: (no CUDA driver|.*sees no device)"):
        MODULE.zeroed_memory(0, 64)
    with pytest.raises(RuntimeError, match=r"no CUDA driver|sees no device"):
        launch(chain_call())
