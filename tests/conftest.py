"""Fixtures of all tests: seeds, poisoned memory, and the implementations that can run here."""

import importlib.util
import os
import sys
from typing import NamedTuple

import pytest
import torch

# Without a GPU, Triton kernels run in Triton's interpreter, which must be chosen before triton is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import specdec_ops
from specdec_ops._core import alloc, dispatch, loader
from tests.attention import attention_cases
from tests.emulator import build, kernels
from tests.harness import selection
from tests.harness.cpu_seconds import CpuSeconds


def pytest_addoption(parser):
    parser.addoption("--quick", action="store_true", help="what two minutes are enough for (make quick)")


def pytest_configure(config):
    """Tests that run side by side share the cores."""
    config.pluginmanager.register(CpuSeconds())
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
    torch.set_num_threads(max(1, torch.get_num_threads() // workers))
    prepare_interpreter()


def prepare_interpreter():
    """Where Triton is interpreted: faster, and with the same products everywhere."""
    if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
        from tests.harness import triton_interpreter

        triton_interpreter.replace_names_once()
        triton_interpreter.round_products_once()


class Target(NamedTuple):
    """A backend and the device whose tensors it gets."""

    backend: str
    device: str

    @property
    def interpreted(self) -> bool:
        """Run by Triton's interpreter: right, but very slow."""
        return self.backend == "triton" and self.device == "cpu"


def targets(op: str) -> list[Target]:
    """Every backend that can run an op on this machine, on CPU tensors and, where there is a GPU, on CUDA tensors.

    One more is known to the tests only: the CUDA kernels on CPU tensors, run by the emulator in tests/emulator.
    """
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    emulated = [Target(kernels.BACKEND, "cpu")] if op in kernels.IMPLEMENTATIONS and not build.why_not() else []
    return emulated + [
        Target(backend, device)
        for device in devices
        for backend, reason in specdec_ops.backends(op, device).items()
        if reason is None
    ]


def pytest_generate_tests(metafunc):
    """`target` is parametrised over the implementations of the op that the module tests (its OP, or tree_attention).

    `isa` is, over the instruction sets that the module lists (its ISAS), unless a test chooses its own.
    """
    own = any("isa" in mark.args[0] for mark in metafunc.definition.iter_markers("parametrize"))
    if "isa" in metafunc.fixturenames and not own:
        metafunc.parametrize("isa", metafunc.module.ISAS, indirect=True)
    if "target" in metafunc.fixturenames:
        found = targets(getattr(metafunc.module, "OP", "tree_attention"))
        metafunc.parametrize("target", found, ids=[f"{target.backend}-on-{target.device}" for target in found])


def pytest_collection_modifyitems(config, items):
    """Whatever runs on CUDA tensors is marked gpu: `pytest -m gpu` is everything that a GPU can show.

    Which of the others run, and in which order, is in selection.py.
    """
    for item in items:
        if (target := selection.target_of(item)) and target.device == "cuda":
            item.add_marker(pytest.mark.gpu)
    kept = selection.kept(items, config.getoption("quick", False))
    if len(kept) < len(items):
        gone = set(map(id, items)) - set(map(id, kept))
        config.hook.pytest_deselected(items=[item for item in items if id(item) in gone])
    items[:] = selection.ordered(kept)


def poisoned_empty(shape, dtype, device):
    """Memory in which an unwritten element shows: NaN, or the smallest integer. Of a bool, the impossible byte 0x80."""
    tensor = torch.empty(shape, dtype=dtype, device=device)
    if dtype == torch.bool:
        tensor.view(torch.uint8).fill_(0x80)
        return tensor
    if dtype == torch.uint8:  # bytes of scratch, which may be any numbers
        return tensor.fill_(0xFF)
    return tensor.fill_(float("nan") if dtype.is_floating_point else torch.iinfo(dtype).min)


class PoisonedTorch:
    """PyTorch with a poisoned `empty`, for kernels that make their own scratch (they may not import alloc)."""

    def __getattr__(self, name):
        return getattr(torch, name)

    def empty(self, shape, *, dtype, device):
        return poisoned_empty(shape, dtype, device)


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """Every op allocates through alloc.empty; Triton's launch functions make scratch with torch.empty."""
    monkeypatch.setattr(alloc, "empty", poisoned_empty)
    for name, module in list(sys.modules.items()):
        if name.startswith("specdec_ops.triton_kernels.") and hasattr(module, "torch"):
            monkeypatch.setattr(module, "torch", PoisonedTorch())


@pytest.fixture
def isa(request):
    """The CPU kernels run on this instruction set, and " without vnni" has no dot products of bytes."""
    module, reason = loader.load()
    if module is None:
        pytest.skip(reason)
    name, _, without = request.param.partition(" without ")
    module.set_cpu_isa(name)
    module.allow_cpu_vnni(not without)
    try:
        if module.cpu_isa() != name:
            pytest.skip(f"this processor (or this build) has no {name}")
        yield request.param
    finally:
        module.set_cpu_isa("")
        module.allow_cpu_vnni(True)


@pytest.fixture
def threads():
    """Sets the number of threads; the old one comes back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def one_thread(threads):
    """For rows and heads that are too small to share."""
    threads(1)


def emulate_cuda(monkeypatch):
    """Make the emulator a backend that ops can name. The package itself knows nothing of it."""
    resolve = dispatch.resolve

    def resolve_or_emulate(op, backend, *tensors):
        return kernels.IMPLEMENTATIONS[op] if backend == kernels.BACKEND else resolve(op, backend, *tensors)

    monkeypatch.setattr(dispatch, "resolve", resolve_or_emulate)


@pytest.fixture(autouse=True)
def emulated_cuda(request, monkeypatch):
    """Lets tests over all targets name the emulator as a backend."""
    if "target" in request.fixturenames:
        emulate_cuda(monkeypatch)


@pytest.fixture(autouse=True)
def sixteen_bits(request, monkeypatch):
    """The CUDA kernel of tree_attention refuses float32: its tests run in bfloat16, unless they name another dtype."""
    target = request.node.callspec.params.get("target") if hasattr(request.node, "callspec") else None
    if target and target.backend in ("cuda", kernels.BACKEND) and not hasattr(request.module, "OP"):
        if request.node.callspec.params.get("dtype") == torch.float32:
            pytest.skip("the CUDA attention kernel refuses float32, which test_dispatch.py tests")
        monkeypatch.setattr(attention_cases, "DEFAULT_DTYPE", torch.bfloat16)


@pytest.fixture(autouse=True)
def seeded():
    """The same random numbers in every run, whatever ran before."""
    torch.manual_seed(0)
