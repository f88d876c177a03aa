"""The compiled CUDA code: its architectures, registers and spills, and what its launchers say without a GPU."""

import re
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from specdec_ops import _loader

MODULE, REASON = _loader.load()
if MODULE is None or not MODULE.build_info()["cuda"]:
    pytest.skip(REASON or "the compiled module has no CUDA kernels: it was built without nvcc", allow_module_level=True)

ARCHS = MODULE.build_info()["archs"].split()
# With this many registers per thread, a block of 256 threads leaves room for three more on every multiprocessor.
MOST_REGISTERS = 64
KERNELS = {"build_topology_kernel": 2, "merge_states_kernel": 6, "any_kernel": 1}  # instantiations of each


@pytest.fixture(scope="module")
def listing():
    """What cuobjdump, which Triton's wheel brings along, reads from the compiled module."""
    triton = find_spec("triton")
    tool = triton and Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool or not tool.exists():
        pytest.skip("there is no cuobjdump: triton is not installed")
    command = [str(tool), "--dump-resource-usage", MODULE.__file__]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def usage(listing):
    """{(architecture, function): {"REG": ..., "STACK": ..., "LOCAL": ...}}"""
    found, arch = {}, None
    for line in listing.splitlines():
        if match := re.match(r"arch = sm_(\w+)", line):
            arch = match[1]
        elif match := re.match(r"\s*Function (\w+):", line):
            function = match[1]
        elif "REG:" in line:
            found[arch, function] = {name: int(count) for name, count in re.findall(r"(\w+):(\d+)", line)}
    return found


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
    for where, used in usage.items():
        assert used["STACK"] == 0 and used["LOCAL"] == 0, (where, used)
        assert used["REG"] <= MOST_REGISTERS, (where, used)


def test_empty_batch_needs_no_device():
    MODULE.build_topology_cuda(*[0] * 9, 0, 44, 1, 0, 0)
    MODULE.merge_states_cuda(*[0] * 6, 0, 128, 1, 0, 0)


def test_too_many_nodes_is_a_sentence():
    with pytest.raises(
        RuntimeError, match=r"^build_topology_cuda: a size is beyond what the kernel takes .*2048 nodes"
    ):
        MODULE.build_topology_cuda(*[0] * 9, 1, 2049, 33, 0, 0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_reason_is_a_sentence():
    reason = r"^(no CUDA driver, or one that is older than CUDA \d+\.\d+|the CUDA driver sees no device)$"
    assert re.match(reason, MODULE.cuda_device_error(0))
    with pytest.raises(RuntimeError, match=r"no CUDA driver|sees no device"):
        MODULE.merge_states_cuda(*[0] * 6, 1, 128, 1, 0, 0)
