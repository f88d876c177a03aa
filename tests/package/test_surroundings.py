"""What surrounds a call does not change its result: every public function, on every backend, in every surrounding.

Results are compared bit by bit with those of the same call without. OP is None: `backend` is a parameter of its own,
since one test goes through the functions of all ops.
"""

import contextlib
import threading

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import specdec_ops
from tests.harness.public_calls import CALLS, run, tensors_of


@contextlib.contextmanager
def setting(get, put, value):
    """A setting of the process, and back; also what the call left behind is looked at."""
    before = get()
    put(value)
    try:
        inside = get()
        yield
        assert get() == inside
    finally:
        put(before)


def default_dtype(dtype):
    return setting(torch.get_default_dtype, torch.set_default_dtype, dtype)


def products(precision):
    return setting(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, precision)


@contextlib.contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


class Rounds(TorchFunctionMode):
    """A user's mode that makes what the definitions compute coarse."""

    CHANGED = ("matmul", "__matmul__", "einsum", "exp", "softmax", "sum", "log", "log1p", "sort", "max")

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if (
            getattr(function, "__name__", "") in self.CHANGED
            and isinstance(result, torch.Tensor)
            and result.is_floating_point()
        ):
            return result.mul(8).round().div(8)
        return result


class Watches(TorchDispatchMode):
    """A user's mode that sees every operator: ours, and what Python does before them."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def flushed():
    """Subnormal numbers are zeros, for this thread; what the call left behind is looked at."""
    tiny = torch.tensor([1e-39], device="cpu", dtype=torch.float32)
    assert torch.set_flush_denormal(True)
    try:
        assert (tiny * 0.5).item() == 0
        yield
        assert (tiny * 0.5).item() == 0
    finally:
        torch.set_flush_denormal(False)


SURROUNDINGS = {
    "flushed subnormals": flushed,
    "autocast cpu bfloat16": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast cpu float16": lambda: torch.autocast("cpu", torch.float16),
    "autocast cuda": lambda: torch.autocast("cuda", torch.bfloat16),
    "default dtype float64": lambda: default_dtype(torch.float64),
    "default dtype bfloat16": lambda: default_dtype(torch.bfloat16),
    "default device": lambda: torch.device("meta"),
    "products medium": lambda: products("medium"),
    "products high": lambda: products("high"),
    "deterministic": deterministic,
    "inference mode": torch.inference_mode,
    "no grad": torch.no_grad,
    "function mode": Rounds,
    "dispatch mode": Watches,
}
RUNS = [
    (name, backend)
    for name, call in CALLS.items()
    for backend in (["auto"] if call.op is None else [b for b, why in specdec_ops.backends(call.op).items() if not why])
]
EXACT = [(name, backend) for name, backend in RUNS if backend != "triton"]
# Kernels see nothing of it, interpreted or not; what could is their launch, which the calls of one op share.
FIRST = {call.op: name for name, call in reversed(CALLS.items()) if call.op}
LAUNCHED = [(name, backend) for name, backend in RUNS if backend == "triton" and name in FIRST.values()]


def options_of(name, backend):
    return {} if CALLS[name].op is None else {"backend": backend}


def differs(got, wanted):
    return not all(
        g.dtype == w.dtype and g.device == w.device and torch.equal(g, w) for g, w in zip(got, wanted, strict=True)
    )


@pytest.mark.parametrize(("name", "backend"), EXACT, ids=str)
def test_each(name, backend):
    """One after another."""
    options = options_of(name, backend)
    wanted = run(name, **options)
    assert wanted
    wrong = []
    for surrounding, enter in SURROUNDINGS.items():
        if surrounding == "function mode" and name == "exit_features":
            continue  # a line of PyTorch for the user's graph, and the mode's own to change
        with enter():
            got = run(name, **options)
        if differs(got, wanted):
            wrong.append(surrounding)
    assert not wrong


@pytest.mark.parametrize(("name", "backend"), LAUNCHED, ids=str)
def test_all_at_once(name, backend):
    """Triton's launches, in all of them together."""
    wanted = run(name, backend=backend)
    with contextlib.ExitStack() as stack:
        for enter in SURROUNDINGS.values():
            stack.enter_context(enter())
        got = run(name, backend=backend)
    assert not differs(got, wanted)


def test_a_number_of_steps_is_remembered_on_the_cpu():
    """What a first call under a default device or in inference mode keeps must serve later calls."""
    wanted = run("chain_accept", num_steps=3)
    specdec_ops.ops.acceptance.accept._constant.cache_clear()
    with torch.device("meta"), torch.inference_mode():
        run("chain_accept", num_steps=3)
    assert not differs(run("chain_accept", num_steps=3), wanted)


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_inference_tensors(backend):
    """As inputs, as outputs and as a cache, made in inference mode and used outside of it."""
    call = CALLS["tree_attention"]
    wanted = run("tree_attention", backend=backend)
    with torch.inference_mode():
        inputs = {name: call.arguments[name].clone() for name in ("q", "k_cache", "v_cache", "context_lens")}
        out = specdec_ops.AttentionState(torch.empty_like(wanted[0]), torch.empty_like(wanted[1]))
        cache = specdec_ops.LayerCache((1, 2), 8, 2, 64, 16, backend=backend)
    assert not differs(run("tree_attention", backend=backend, **inputs, out=out), wanted)
    cache.append(torch.ones(2, 16))
    assert cache.pending(0)[1].tolist() == [[1.0] * 16] * 2
    assert not cache.pending(0)[1].is_inference()


def test_gradients_of_what_is_made_of_weights():
    """A head that is a parameter: its copies and bounds hold no graph, and are no inference tensors."""
    head = torch.nn.Parameter(CALLS["quantize_head"].arguments["head"])
    made = [*tensors_of(specdec_ops.quantize_head(head)), *tensors_of(specdec_ops.bound_head(head))]
    assert len(made) == 6
    assert not any(tensor.requires_grad or tensor.is_inference() for tensor in made)


def test_threads_of_pytorch(threads):
    """How many compute changes no result of the kernels; PyTorch's own products sum in another order."""
    for name, backend in EXACT:
        threads(1)
        wanted = run(name, **options_of(name, backend))
        threads(3)
        got = run(name, **options_of(name, backend))
        if backend == "cpu":
            assert not differs(got, wanted), name
        for mine, theirs in zip(got, wanted, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_threads_of_the_caller_share_the_process_settings():
    """The first to come takes them, the last to go gives them back, also after an error."""
    from specdec_ops._core.shield import shielded

    inside, leave, seen = threading.Event(), threading.Event(), []

    @shielded
    def wait():
        inside.set()
        leave.wait()
        seen.append((torch.get_default_dtype(), torch.get_float32_matmul_precision()))

    @shielded
    def fail():
        raise ValueError("as asked")

    with default_dtype(torch.float64), products("medium"):
        thread = threading.Thread(target=wait, daemon=True)
        thread.start()
        inside.wait()
        with pytest.raises(ValueError, match="as asked"):
            fail()
        assert torch.get_default_dtype() == torch.float32  # still held by the other thread
        leave.set()
        thread.join()
        assert torch.get_default_dtype() == torch.float64
        assert torch.get_float32_matmul_precision() == "medium"
    assert seen[0][0] == torch.float32


def test_settings_that_are_changed_during_a_call():
    """They do not reach the calls that begin then, and they stay when the last one ends."""
    from specdec_ops._core.shield import shielded

    inside, leave = threading.Event(), threading.Event()

    @shielded
    def wait():
        inside.set()
        leave.wait()

    @shielded
    def settings():
        return torch.get_default_dtype(), torch.get_float32_matmul_precision()

    with default_dtype(torch.float64), products("medium"):
        thread = threading.Thread(target=wait, daemon=True)
        thread.start()
        inside.wait()
        torch.set_default_dtype(torch.bfloat16)
        torch.set_float32_matmul_precision("high")
        try:
            assert settings()[0] == torch.float32
        finally:
            leave.set()
            thread.join()
            after = torch.get_default_dtype(), torch.get_float32_matmul_precision()
            torch.set_default_dtype(torch.float64)
            torch.set_float32_matmul_precision("medium")
    assert after == (torch.bfloat16, "high")


@pytest.mark.filterwarnings("ignore")  # tracing is deprecated, and tells of every check that it can't follow
@pytest.mark.parametrize("name", ["tree_attention", "exit_confidence", "sample_tokens"])
def test_traced(name):
    """torch.jit.trace records operators: an implementation that is called without them would be lost."""
    call = CALLS[name]
    tensors = {key: value for key, value in call.arguments.items() if type(value) is torch.Tensor}
    others = {key: value for key, value in call.arguments.items() if key not in tensors}

    def function(*given):
        result = call.function(**dict(zip(tensors, given, strict=True)), **others)
        return getattr(result, "token", result)

    wanted = function(*tensors.values())
    traced = torch.jit.trace(function, tuple(tensors.values()), check_trace=False)
    torch.testing.assert_close(traced(*tensors.values()), wanted, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["exit_confidence", "tree_attention odd", "tree_accept", "sample_tokens"])
def test_compiled(name):
    """Traced and run in autocast, with another default dtype and a default device."""
    torch._dynamo.reset()
    options = {} if CALLS[name].op is None else {"backend": "torch"}
    wanted = run(name, **options)
    call = CALLS[name]
    tensors = {key: value for key, value in call.arguments.items() if isinstance(value, torch.Tensor)}
    others = {key: value for key, value in call.arguments.items() if key not in tensors}
    compiled = torch.compile(
        lambda values: call.function(**values, **others, **options), fullgraph=True, backend="aot_eager"
    )
    with torch.autocast("cpu", torch.bfloat16), default_dtype(torch.float64), torch.device("meta"):
        got = tensors_of(compiled(tensors))
    assert not differs(got, wanted)


@pytest.mark.parametrize("name", ["exit_confidence", "tree_attention", "sample_tokens"])
def test_vmap(name):
    """It hides what a tensor is, so the operator is called, which PyTorch runs once for each."""
    call = CALLS[name]
    first = next(iter(call.arguments))
    several = torch.stack([call.arguments[first], call.arguments[first].flip(0)])
    got = torch.vmap(lambda one: tuple(run(name, **{first: one})))(several)
    for index, one in enumerate(several):
        assert not differs([part[index] for part in got], run(name, **{first: one}))
