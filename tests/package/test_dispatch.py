"""Which backend runs: the order of "auto", the reasons, and no silent fallback."""

import inspect
import re

import pytest
import torch

from specdec_ops import backends
from specdec_ops._core import dispatch, loader
from tests.attention.attention_cases import chain, make_case
from tests.harness.public_names import PUBLIC

OPS = tuple(dispatch.IMPLEMENTATIONS)
HAS_GPU = torch.cuda.is_available()


@pytest.fixture(autouse=True)
def fresh_choices(monkeypatch):
    """No remembered choice before or after, and no variable from outside."""
    monkeypatch.delenv(dispatch.ENVIRONMENT, raising=False)
    dispatch.forget()
    yield
    dispatch.forget()


@pytest.fixture
def without_compiled_kernels(monkeypatch):
    """As in a checkout that was not built."""
    monkeypatch.setattr(loader, "load", lambda: (None, "the compiled kernels are unavailable (a test)"))
    dispatch.forget()


def chosen(op, tensor, backend="auto"):
    """The module and name of the function that would run."""
    function = dispatch.resolve(op, backend, tensor)
    return f"{function.__module__}:{function.__name__}"


@pytest.mark.parametrize("op", OPS)
def test_backends_lists_every_name(op):
    """With None or a sentence; the definition is always there."""
    found = backends(op)
    assert list(found) == ["cuda", "triton", "cpu", "torch"]
    assert found["torch"] is None
    assert found["cuda"]
    assert all(reason is None or isinstance(reason, str) for reason in found.values())
    assert backends(op, torch.zeros(1)) == found == backends(op, torch.device("cpu"))


def test_every_public_op_has_its_own_name():
    """Whatever takes a `backend` is asked for by its name, and only that."""
    takers = {
        name
        for name, function in PUBLIC.items()
        if inspect.isfunction(function) and "backend" in inspect.signature(function).parameters
    }
    assert takers == set(dispatch.PUBLIC_OPS)
    for name in takers:
        assert backends(name) == backends(dispatch.PUBLIC_OPS[name])
    assert backends("tree_accept")["torch"] is None


def test_unknown_names():
    """Of an op and of a backend."""
    names = ", ".join(dict.fromkeys((*dispatch.PUBLIC_OPS, *OPS)))
    with pytest.raises(ValueError, match=f"op must be one of {names}, got 'attend'"):
        backends("attend")
    with pytest.raises(ValueError, match="backend must be one of auto, cuda, triton, cpu, torch, got 'rocm'"):
        dispatch.resolve("tree_attention", "rocm", torch.zeros(1, 64))


@pytest.mark.parametrize("op", OPS)
def test_auto_on_cpu_takes_cpu_then_torch(op, monkeypatch):
    """And never Triton, even under its interpreter."""
    tensor = torch.zeros(2, 64)
    if loader.load()[0] is not None:
        assert chosen(op, tensor) == f"specdec_ops._core.native:{op}_cpu"
    monkeypatch.setattr(loader, "load", lambda: (None, "not built"))
    dispatch.forget()
    assert chosen(op, tensor) == dispatch.IMPLEMENTATIONS[op]["torch"]


@pytest.mark.parametrize("op", OPS)
def test_a_named_backend_never_falls_back(op, without_compiled_kernels):
    """It says why it is not available."""
    with pytest.raises(
        RuntimeError, match=re.escape(f"{op}: backend='cpu' is unavailable: the compiled kernels are un")
    ):
        dispatch.resolve(op, "cpu", torch.zeros(2, 64))
    with pytest.raises(RuntimeError, match=f"{op}: backend='cuda' is unavailable: "):
        dispatch.resolve(op, "cuda", torch.zeros(2, 64))


def test_the_op_reports_it_too(without_compiled_kernels):
    """Through the public function, whose automatic choice still works."""
    case = make_case([chain(3)], [4])
    with pytest.raises(RuntimeError, match=re.escape("backend='cpu' is unavailable: the compiled kernels")):
        case.run("cpu")
    assert case.run("auto").isfinite().all()


def test_reasons():
    """One for each way of not being available."""
    for op in OPS:
        assert "it takes CUDA tensors" in backends(op)["cuda"]
    if not HAS_GPU:
        assert backends("merge_states", "cuda")["cuda"] == "PyTorch sees no CUDA device"
        assert backends("merge_states", "cuda")["triton"] == "PyTorch sees no CUDA device"
    else:
        assert "it takes CPU tensors, these are on cuda" in backends("merge_states", "cuda")["cpu"]


def test_triton_on_cpu_needs_the_interpreter(monkeypatch):
    """Which is chosen by an environment variable."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert "interpreter only" in backends("tree_attention")["triton"]
    with pytest.raises(RuntimeError, match="backend='triton' is unavailable: Triton runs on CPU tensors in its interp"):
        dispatch.resolve("tree_attention", "triton", torch.zeros(2, 64))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert backends("tree_attention")["triton"] is None


def test_missing_triton(monkeypatch):
    """A reason, not an ImportError."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: None)
    assert backends("tree_attention")["triton"] == "the package triton is not installed"


def test_old_triton(monkeypatch):
    """A reason, not an error of Triton's compiler."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for version, old in (("3.3.1", True), ("3.4.0", False), ("3.10.0+git1234", False), (None, False)):
        monkeypatch.setattr(dispatch, "_triton_version", lambda version=version: version)
        expected = f"its kernels need Triton 3.4 or later, installed is {version}" if old else None
        assert backends("tree_attention")["triton"] == expected


def test_the_environment_overrides_auto_only(monkeypatch):
    """A name given in the call wins."""
    monkeypatch.setenv(dispatch.ENVIRONMENT, "torch")
    dispatch.forget()
    tensor = torch.zeros(2, 64)
    assert chosen("tree_attention", tensor) == "specdec_ops.ops.attention.reference_tree_attention:tree_attention"
    if loader.load()[0] is not None:
        assert chosen("tree_attention", tensor, "cpu") == "specdec_ops._core.native:tree_attention_cpu"


def test_the_environment_does_not_fall_back(monkeypatch):
    """An unavailable or unknown name is an error that names the variable."""
    monkeypatch.setenv(dispatch.ENVIRONMENT, "cuda")
    dispatch.forget()
    with pytest.raises(RuntimeError, match=re.escape("backend='cuda' (from SPECDEC_OPS_BACKEND) is unavailable: ")):
        dispatch.resolve("merge_states", "auto", torch.zeros(2, 64))
    monkeypatch.setenv(dispatch.ENVIRONMENT, "fast")
    dispatch.forget()
    with pytest.raises(
        ValueError, match="SPECDEC_OPS_BACKEND must be one of auto, cuda, triton, cpu, torch, got 'fast'"
    ):
        dispatch.resolve("merge_states", "auto", torch.zeros(2, 64))


def test_what_kernels_do_not_take():
    """float64 and odd dims: automatically the definition; by name an error that says so."""
    if loader.load()[0] is None:
        pytest.skip("the compiled kernels are not built")
    for tensor, message in (
        (torch.zeros(2, 64, dtype=torch.float64), "its kernels take float32, bfloat16 and float16, not float64"),
        (torch.zeros(2, 40), "its kernels take a dim that is a multiple of 16 up to 256, not 40"),
        (torch.zeros(2, 512), "its kernels take a dim that is a multiple of 16 up to 256, not 512"),
    ):
        assert chosen("tree_attention", tensor) == "specdec_ops.ops.attention.reference_tree_attention:tree_attention"
        with pytest.raises(RuntimeError, match=f"backend='cpu' is unavailable: {message}"):
            dispatch.resolve("tree_attention", "cpu", tensor)
    assert chosen("merge_states", torch.zeros(2, 40)) == "specdec_ops._core.native:merge_states_cpu"


FLOAT8, BF16 = torch.float8_e4m3fn, torch.bfloat16
CUDA_ATTENTION = {  # (dtype, dim, the caches' dtype, whether rows are aligned): why not, and what auto takes
    (BF16, 256, BF16, True): (None, "cuda"),
    (torch.float16, 16, FLOAT8, True): (None, "cuda"),
    (torch.float32, 64, torch.float32, True): (
        "its attention kernels take bfloat16 and float16, not float32",
        "triton",
    ),
    (BF16, 64, BF16, False): ("need rows of q, out and the caches that start at multiples of 16 bytes", "triton"),
    (BF16, 192, FLOAT8, True): ("its kernels take fp8 caches with a dim up to 128, not 192", "torch"),
    (BF16, 72, BF16, True): ("its kernels take a dim that is a multiple of 16 up to 256, not 72", "torch"),
}


@pytest.mark.parametrize("tensors", CUDA_ATTENTION, ids=str)
def test_what_the_cuda_attention_kernel_does_not_take(tensors, monkeypatch):
    """Automatically the next backend; by name an error that says so. As on a machine where every backend works."""
    monkeypatch.setattr(dispatch, "_unavailable", lambda *_: None)
    monkeypatch.setitem(dispatch._AUTO, "cpu", ("cuda", "triton", "torch"))
    dtype, dim, cache_dtype, aligned = tensors
    reason, automatic = CUDA_ATTENTION[tensors]
    q = torch.zeros(2, dim, dtype=dtype)
    assert dispatch._choose("tree_attention", "auto", q, cache_dtype, aligned) == automatic
    if reason is None:
        assert dispatch._choose("tree_attention", "cuda", q, cache_dtype, aligned) == "cuda"
    else:
        with pytest.raises(RuntimeError, match=f"tree_attention: backend='cuda' is unavailable: .*{reason}"):
            dispatch._choose("tree_attention", "cuda", q, cache_dtype, aligned)


def test_alignment():
    """Of first elements, and of every stride but the last."""
    cache = torch.zeros(2, 4, 3, 64, dtype=BF16)
    assert dispatch._is_aligned(cache, cache[:, 1:, 2:, 8:])
    assert not dispatch._is_aligned(cache, cache[..., 4:])
    assert not dispatch._is_aligned(torch.zeros(2, 4, 3, 68, dtype=BF16)[..., :64])
    assert not dispatch._is_aligned(torch.zeros(2, 4, 3, 72, dtype=FLOAT8)[..., :64])


@pytest.mark.parametrize("op", OPS)
def test_every_implementation_can_be_imported(op):
    """The table names functions that exist, and the compiled module has the op."""
    for backend in (*dispatch.IMPLEMENTATIONS[op], *(["cpu"] if loader.load()[0] else [])):
        assert callable(dispatch._load(op, backend))
