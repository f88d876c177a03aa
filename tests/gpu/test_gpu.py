"""What only a GPU can show: streams, graphs, several devices, no waiting, offsets beyond 31 bits.

The values themselves are the business of the ops' own tests, which run on CUDA tensors too where there is a GPU.
"""

import functools

import pytest
import torch

import specdec_ops
from specdec_ops import Tree, tree_attention
from specdec_ops._core import dispatch
from tests.harness.device_cases import CASES, overwrite, to

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
KERNELS = ("cuda", "triton")
NAMES = [(op, name) for op in dispatch.IMPLEMENTATIONS for name in CASES.get(op, ["no case"])]
ROUNDS = 25


def every_kernel(test):
    """Over all cases of all ops, on the backends that are kernels."""
    test = pytest.mark.parametrize("backend", KERNELS)(test)
    test = pytest.mark.parametrize(("op", "name"), NAMES, ids=lambda value: value or "")(test)
    return pytest.mark.gpu(needs_gpu(test))


@pytest.fixture
def case(op, name, backend):
    if op not in CASES:
        pytest.skip(f"{op} has no case in device_cases.py")
    reason = specdec_ops.backends(op, "cuda")[backend]
    if reason is not None:
        pytest.skip(reason)
    return CASES[op][name]


def capture(call):
    """A graph of one call: (replay, the results that each replay writes)."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()  # compiles and allocates what only a first call does
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    return graph.replay, results


def assert_same(got, expected, what=""):
    for index, (one, other) in enumerate(zip(got, expected, strict=True)):
        torch.testing.assert_close(one.cpu(), other.cpu(), rtol=0, atol=0, equal_nan=True, msg=f"{what} result {index}")


@pytest.mark.sanitize
@every_kernel
def test_small_calls_are_right(case, backend, device="cuda"):
    """Against the definition on the CPU, within some roundings of the inputs; the ops' own tests are stricter."""
    tensors = case.make(1)
    precise = {name: tensors[name].double() for name in case.precise}
    exact = case.call(tensors | precise, "torch")
    rounding = max((torch.finfo(tensors[name].dtype).eps for name in case.precise), default=0.0)
    for got, right in zip(case.call(to(tensors, device), backend), exact, strict=True):
        torch.testing.assert_close(got.cpu(), right.to(got.dtype), rtol=4 * rounding, atol=4 * rounding)


@every_kernel
def test_graph_replay_with_changed_inputs(case, backend, device="cuda"):
    """Trees, lengths, pages and queries change in place between replays; results are those of a plain call."""
    tensors = to(case.make(1), device)
    replay, results = capture(lambda: case.call(tensors, backend))
    for seed in (2, 3, 1):
        changed = to(case.make(seed), device)
        overwrite(tensors, changed)
        replay()
        replay()
        assert_same(results, case.call(changed, backend), f"seed {seed},")


@every_kernel
def test_two_graphs_at_once(case, backend, device="cuda"):
    """Two graphs of one call, captured on one stream and replayed on two: they share no counters."""
    inputs = [to(case.make(seed), device) for seed in (1, 2)]
    alone = [case.call(tensors, backend) for tensors in inputs]
    graphs = [capture(lambda tensors=tensors: case.call(tensors, backend)) for tensors in inputs]
    streams = [torch.cuda.Stream() for _ in inputs]
    torch.cuda.synchronize()
    for _ in range(ROUNDS):
        for (replay, _), stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                replay()
    torch.cuda.synchronize()
    for expected, (_, got) in zip(alone, graphs, strict=True):
        assert_same(got, expected)


@pytest.mark.gpu
@needs_gpu
def test_a_captured_call_writes_no_zeros(tmp_path):
    """Its counters are zero already: the graph of an op that needs some has the op's kernels alone."""
    logits = torch.randn(2, 40_000, device="cuda")
    noise = {"seeds": torch.tensor([1, 2], device="cuda"), "positions": 3}
    call = functools.partial(specdec_ops.sample_tokens, logits, **noise, backend="cuda")
    if reason := specdec_ops.backends("sample_tokens", "cuda")["cuda"]:
        pytest.skip(reason)
    call()
    graph = torch.cuda.CUDAGraph()
    graph.enable_debug_mode()
    with torch.cuda.graph(graph):
        call()
    graph.debug_dump(str(tmp_path / "graph.dot"))
    nodes = (tmp_path / "graph.dot").read_text()
    assert "sample_kernel" in nodes and "MEMSET" not in nodes.upper()


@every_kernel
def test_two_streams_at_once(case, backend, device="cuda"):
    """Calls that overlap give what each gives alone: nothing is shared between calls in flight."""
    inputs = [to(case.make(seed), device) for seed in (1, 2)]
    alone = [case.call(tensors, backend) for tensors in inputs]
    streams = [torch.cuda.Stream() for _ in inputs]
    results = [[], []]
    torch.cuda.synchronize()
    for _ in range(ROUNDS):
        for tensors, stream, kept in zip(inputs, streams, results, strict=True):
            with torch.cuda.stream(stream):
                kept.append(case.call(tensors, backend))
    torch.cuda.synchronize()
    for expected, kept in zip(alone, results, strict=True):
        for round_, got in enumerate(kept):
            assert_same(got, expected, f"round {round_},")


@every_kernel
def test_work_is_ordered_on_the_current_stream(case, backend, device="cuda"):
    """On a busy stream: inputs that are still to be written there are seen, and results can be read there."""
    tensors, changed = to(case.make(1), device), to(case.make(2), device)
    expected = case.call(changed, backend)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(50_000_000)  # cycles: tens of milliseconds
        overwrite(tensors, changed)
        got = [result.clone() for result in case.call(tensors, backend)]
    torch.cuda.synchronize()
    assert_same(got, expected)


@every_kernel
def test_nothing_waits_for_the_device(case, backend, device="cuda"):
    tensors = to(case.make(1), device)
    case.call(tensors, backend)
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        case.call(tensors, backend)
    finally:
        torch.cuda.set_sync_debug_mode(before)


@every_kernel
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_on_another_device_than_the_current_one(case, backend):
    expected = case.call(to(case.make(1), "cuda:0"), backend)
    with torch.cuda.device(0):
        got = case.call(to(case.make(1), "cuda:1"), backend)
        assert torch.cuda.current_device() == 0
    assert all(result.device.index == 1 for result in got)
    assert_same(got, expected)


def far_cache(rows: int, device) -> torch.Tensor:
    """[rows, 16, 8, 128] in bfloat16, not written."""
    needed = rows * 16 * 8 * 128 * 2
    if device != "cpu" and torch.cuda.mem_get_info()[0] < 1.5 * needed:
        pytest.skip(f"needs {needed >> 30} GiB of free GPU memory and a half more")
    return torch.empty(rows, 16, 8, 128, dtype=torch.bfloat16, device=device)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("paged", [False, True], ids=["dense", "paged"])
@pytest.mark.parametrize("backend", KERNELS)
def test_offsets_beyond_31_bits(backend, paged, device="cuda", elements=2**31):
    """The last request of a dense cache, and the last pages of a paged one, lie more than 2**31 elements in."""
    reason = specdec_ops.backends("tree_attention", device)[backend]
    if reason is not None:
        pytest.skip(reason)
    requests, slots_in_use, nodes = 3, 100, 20
    pages_each = -(-elements // (16 * 8 * 128) // (requests - 1)) + 8  # the last request starts beyond `elements`
    cache = far_cache(requests * pages_each, device)
    small = torch.randn(requests, 128, 8, 128, device=device).bfloat16()
    used = pages_each * 16 if not paged else None
    table = torch.arange(8, dtype=torch.int32, device=device) + torch.tensor(
        [[0], [1000 % pages_each], [(requests * pages_each) - 8]], dtype=torch.int32, device=device
    )
    if paged:
        cache[table.long()] = small.view(requests, 8, 16, 8, 128)
        caches, options = cache, {"page_table": table}
    else:
        caches, options = cache.view(requests, used, 8, 128), {}
        caches[:, :128] = small
    q = torch.randn(requests, nodes, 32, 128, device=device).bfloat16()
    topology = Tree.fork(4, 5).to(device)[:nodes]
    lengths = torch.full((requests,), slots_in_use, dtype=torch.int32, device=device)
    got = tree_attention(q, caches, caches, topology, lengths, backend=backend, **options)
    near = tree_attention(q, small, small, topology, lengths, backend=backend)
    torch.testing.assert_close(got, near, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(("op", "name"), [(op, name) for op in CASES for name in CASES[op]])
def test_cases_differ_by_seed_and_change_in_place(op, name):
    """The cases themselves, on the CPU: another seed is another result, of the same shapes."""
    case = CASES[op][name]
    tensors, others = case.make(1), case.make(2)
    first, second = case.call(tensors, "auto"), case.call(others, "auto")
    assert any(not torch.equal(a, b) for a, b in zip(first, second, strict=True))
    overwrite(tensors, others)
    assert_same(case.call(tensors, "auto"), second)
