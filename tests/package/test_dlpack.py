"""NumPy arrays, and arrays of any other framework with __dlpack__, in and out without a copy."""

import inspect
import types

import numpy as np
import pytest
import torch

import specdec_ops
from specdec_ops import (
    Acceptance,
    AttentionState,
    CandidatePool,
    Frontier,
    Topology,
    Tree,
    build_topology,
    dlpack,
    grow_tree,
    tree_accept,
)
from tests.attention.attention_cases import make_case, random_tree
from tests.harness.public_names import PUBLIC

CASE = make_case([random_tree(9)] * 2, [4, 20], page_size=4, sinks=True)
WANTED = CASE.run("auto", return_lse=True)
ARRAYS = [tensor.numpy() for tensor in (CASE.q, CASE.k_cache, CASE.v_cache)]
OPTIONS = {name: value.numpy() for name, value in CASE.options.items()}
LENGTHS = CASE.context_lens.numpy()


def test_numpy_in_numpy_out():
    """Every tensor argument may be an array."""
    out = dlpack.tree_attention(*ARRAYS, CASE.topology, LENGTHS, **OPTIONS)
    assert isinstance(out, np.ndarray)
    np.testing.assert_array_equal(out, WANTED.out.numpy())
    state = dlpack.tree_attention(*ARRAYS, CASE.topology, LENGTHS, **OPTIONS, return_lse=True)
    assert isinstance(state, AttentionState)
    np.testing.assert_array_equal(state.lse, WANTED.lse.numpy())


def test_out_is_written_in_place():
    """No copy on the way out either."""
    out = np.full(ARRAYS[0].shape, np.nan, np.float32)
    assert dlpack.tree_attention(*ARRAYS, CASE.topology, LENGTHS, **OPTIONS, out=out) is out
    np.testing.assert_array_equal(out, WANTED.out.numpy())
    state = AttentionState(np.empty_like(out), np.empty(out.shape[:-1], np.float32))
    got = dlpack.tree_attention(*ARRAYS, CASE.topology, LENGTHS, **OPTIONS, out=state, return_lse=True)
    assert got is state
    np.testing.assert_array_equal(state.lse, WANTED.lse.numpy())


def test_nothing_is_copied():
    """The tensor lies on the array's memory, also for an array that may not be written."""
    for array in (np.zeros((2, 3), np.float32), np.zeros((2, 3), np.int32)):
        assert dlpack.to_torch(array).data_ptr() == array.ctypes.data
        array.flags.writeable = False
        assert dlpack.to_torch(array).data_ptr() == array.ctypes.data
    tensor = torch.zeros(3)
    assert dlpack.to_torch(tensor) is tensor
    assert dlpack.from_torch(tensor, np.zeros(1)).ctypes.data == tensor.data_ptr()


def test_read_only_inputs_and_outputs():
    """Inputs may be read-only, an output may not."""
    q = ARRAYS[0].copy()
    q.flags.writeable = False
    np.testing.assert_array_equal(
        dlpack.tree_attention(q, *ARRAYS[1:], CASE.topology, LENGTHS, **OPTIONS), WANTED.out.numpy()
    )
    with pytest.raises(ValueError, match="out must be writeable, got a read-only array"):
        dlpack.tree_attention(*ARRAYS, CASE.topology, LENGTHS, **OPTIONS, out=q)


def test_merge_states():
    """NumPy in, NumPy out."""
    out, lse = WANTED.out.numpy(), WANTED.lse.numpy()
    merged = dlpack.merge_states(out, lse, out, lse)
    np.testing.assert_allclose(merged.out, out, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(merged.lse, lse + np.log(2), rtol=1e-6)


def test_build_topology():
    """Parents as an array; the topology is what the ops take."""
    parents = np.array([[-1, 0, 0, 1]], np.int32)
    topology = dlpack.build_topology(parents)
    assert isinstance(topology, Topology)
    assert torch.equal(topology.ancestors, build_topology(torch.from_numpy(parents)).ancestors)


def test_growing_trees():
    """What the draft says decides the framework; the pool and the topologies stay tensors."""
    pool, same = (CandidatePool.empty(1, levels=1, width=2, branching=3) for _ in range(2))
    tokens, logprobs = np.array([[[4, 9, 2]]]), np.array([[[-0.5, -1, -3]]], np.float32)
    frontier = dlpack.grow_tree(pool, tokens, logprobs, level=0, active=np.array([True]))
    assert isinstance(frontier, Frontier)
    assert isinstance(frontier.tokens, np.ndarray)
    grow_tree(same, torch.from_numpy(tokens), torch.from_numpy(logprobs), level=0)
    assert torch.equal(pool.scores, same.scores)
    tree = dlpack.prune_tree(pool, 3, root_tokens=np.array([7], np.int32))
    np.testing.assert_array_equal(tree.tokens, [[7, 4, 9]])
    assert isinstance(tree.topology, Topology)


def test_another_framework(monkeypatch):
    """Results go back through the module that the first argument's type comes from."""

    class Array:
        def __init__(self, tensor):
            self.tensor = tensor

        def __dlpack__(self, **options):
            return self.tensor.__dlpack__(**options)

        def __dlpack_device__(self):
            return self.tensor.__dlpack_device__()

    Array.__module__ = "other_framework.arrays"
    framework = types.ModuleType("other_framework")
    framework.from_dlpack = lambda tensor: Array(torch.from_dlpack(tensor))
    monkeypatch.setitem(dlpack.sys.modules, "other_framework", framework)
    out = dlpack.tree_attention(
        Array(CASE.q), *map(Array, (CASE.k_cache, CASE.v_cache)), CASE.topology, Array(CASE.context_lens), **OPTIONS
    )
    assert isinstance(out, Array)
    assert torch.equal(out.tensor, WANTED.out)


def test_what_can_not_be_shared():
    """Strings, for instance."""
    with pytest.raises(TypeError, match="q can't be shared through DLPack"):
        dlpack.tree_attention(np.array(["a"]), *ARRAYS[1:], CASE.topology, LENGTHS)


def test_strides_below_0_are_refused():
    """PyTorch has none, and its DLPack importer would end the process."""
    with pytest.raises(TypeError, match=r"logits can't be shared through DLPack: .*negative"):
        dlpack.sample_tokens(np.ones((2, 9), np.float32)[:, ::-1], seeds=3, positions=1)


def test_numpy_integers():
    """Its default int64, and its numbers."""
    wanted = dlpack.tree_attention(*ARRAYS, CASE.topology, LENGTHS, **OPTIONS)
    got = dlpack.tree_attention(*ARRAYS, CASE.topology, LENGTHS.astype(np.int64), **OPTIONS)
    np.testing.assert_array_equal(got, wanted)
    logits = np.random.default_rng(0).normal(size=(2, 9)).astype(np.float32)
    wanted = dlpack.sample_tokens(logits, seeds=2**64 - 1, positions=3, temperature=0.5, top_k=4)
    got = dlpack.sample_tokens(
        logits, seeds=np.uint64(2**64 - 1), positions=np.int64(3), temperature=np.float64(0.5), top_k=np.array(4)
    )
    np.testing.assert_array_equal(got, wanted)


def test_acceptance():
    """Records of arrays come out, and may be given to be written into."""
    tree = Tree.from_branching((2, 1), root=True)
    logits = np.random.default_rng(0).normal(size=(2, len(tree), 9)).astype(np.float32)
    tokens = np.arange(2 * len(tree), dtype=np.int64).reshape(2, -1) % 9
    noise = {"seeds": np.arange(2), "positions": np.array([3, 4], np.int32)}
    got = dlpack.tree_accept(logits, tokens, tree.to("cpu"), logits, **noise)
    assert isinstance(got, Acceptance)
    assert isinstance(got.tokens, np.ndarray)
    tensors = {name: torch.from_numpy(value) for name, value in noise.items()}
    target = torch.from_numpy(logits)
    want = tree_accept(target, torch.from_numpy(tokens), tree.to("cpu"), target, **tensors)
    np.testing.assert_array_equal(got.nodes, want.nodes.numpy())
    into = Acceptance(*(np.full_like(getattr(got, name), -9) for name in got.__slots__))
    assert dlpack.tree_accept(logits, tokens, tree.to("cpu"), logits, out=into, **noise) is into
    np.testing.assert_array_equal(into.tokens, got.tokens)
    assert isinstance(dlpack.sample_tokens(logits[0], seeds=1, positions=0), np.ndarray)
    assert isinstance(dlpack.sample_children(logits, 2, seeds=1, positions=0).logprobs, np.ndarray)


OPS = [name for name, thing in PUBLIC.items() if inspect.isfunction(thing) and name != "backends"]


def test_every_op_is_here():
    assert [name for name in OPS if not hasattr(dlpack, name)] == []


@pytest.mark.parametrize("op", OPS)
def test_at_the_top_level_arrays_are_refused_with_the_way_to_go(op):
    """And no op fails half-way for want of a tensor's methods."""
    function = getattr(specdec_ops, op)
    needed = [p for p in inspect.signature(function).parameters.values() if p.default is p.empty]
    arguments = {p.name: np.zeros((2, 2, 2, 16), np.float32) for p in needed}
    wants_a_record = op in ("exit_features", "grow_tree", "prune_tree")
    way = "" if wants_a_record else "; torch.from_dlpack makes a tensor of it, and specdec_ops.dlpack takes it"
    with pytest.raises(TypeError, match=rf"specdec_ops\.{op}: \w+ must be .*, got ndarray float32 [^;]*{way}$"):
        function(**arguments)


def test_early_exit():
    """Nested records, their empty fields, and a record as the first argument."""
    numbers = np.random.default_rng(1)
    hidden, head = numbers.normal(size=(3, 16)).astype(np.float32), numbers.normal(size=(40, 16)).astype(np.float32)
    got = dlpack.early_exit(hidden, head, np.array([0.1, 0.2, 0.9], np.float32), top_k=10)
    want = specdec_ops.early_exit(*map(torch.from_numpy, (hidden, head)), torch.tensor([0.1, 0.2, 0.9]), top_k=10)
    assert isinstance(got, specdec_ops.Exit) and isinstance(got.confidence, specdec_ops.Confidence)
    np.testing.assert_array_equal(got.exited, want.exited.numpy())
    np.testing.assert_array_equal(got.confidence.top_tokens, want.confidence.top_tokens.numpy())
    assert got.seen is None and isinstance(got.confidence.entropy, np.ndarray)
    features = dlpack.exit_features(got.confidence)
    np.testing.assert_array_equal(features, specdec_ops.exit_features(want.confidence).numpy())
    layers = [(numbers.normal(size=(1, 11)).astype(np.float32), np.zeros(1, np.float32))]
    score, stop = dlpack.exit_mlp(features, layers)
    assert isinstance(score, np.ndarray) and stop.dtype == bool
    assert isinstance(dlpack.entropy_stop(got.confidence.entropy, 0.5), np.ndarray)
    screen = dlpack.quantize_head(head)
    assert isinstance(screen, specdec_ops.QuantizedHead) and isinstance(dlpack.bound_head(head), specdec_ops.HeadBounds)
    screened = dlpack.exit_confidence(hidden, head, screen=screen)
    np.testing.assert_array_equal(screened.token, want.confidence.token.numpy())
    into = dlpack.exit_confidence(hidden, head)
    assert dlpack.exit_confidence(hidden, head, out=into) is into


def test_caches_are_written_in_place():
    """Those of kv_propagate, which must not be read-only."""
    numbers = np.random.default_rng(2)
    hidden, weight = (numbers.normal(size=shape).astype(np.float32) for shape in ((1, 16), (16, 16)))
    k, v = np.zeros((2, 1, 4, 1, 16), np.float32)
    at = np.array([2], np.int32)
    layers = [(None, weight, weight)]
    assert dlpack.kv_propagate(hidden, layers, at, at, [k], [v], rope=None) is None
    np.testing.assert_allclose(k[0, 2, 0], weight @ hidden[0], rtol=1e-4, atol=1e-5)
    assert not k[0, :2].any() and (k == v).all()
    v.flags.writeable = False
    with pytest.raises(ValueError, match="v_caches must be writeable, got a read-only array"):
        dlpack.kv_propagate(hidden, layers, at, at, [k], v_caches=[v], rope=None)


def test_rows_of_caches_move_and_are_gathered():
    """A path with a gap, in lists of arrays and in one array of all layers; a dtype that the kernels know as bits."""
    for dtype in (np.float32, np.float16, np.int8):
        caches = np.arange(2 * 3 * 1 * 9 * 2 * 4).reshape(2, 3, 1, 9, 2, 4).astype(dtype)
        wanted = caches.copy()
        wanted[:, :, 0, 5], wanted[:, :, 0, 6] = caches[:, :, 0, 6], caches[:, :, 0, 8]
        lists = [list(part) for part in caches.copy()]
        nodes = np.array([[0, 2, 4, -1]])
        assert dlpack.kv_commit(*lists, nodes, np.array([4])) is None
        dlpack.kv_commit(*caches, nodes, 4)
        np.testing.assert_array_equal(caches, wanted)
        np.testing.assert_array_equal(np.array(lists), wanted)
        rows = dlpack.gather_layer_kv(*caches, np.array([5, -1]))
        assert isinstance(rows, np.ndarray) and rows.dtype == dtype
        np.testing.assert_array_equal(rows[0], wanted[:, :, 0, 5].transpose(1, 2, 0, 3).reshape(3, 16))
        assert not rows[1].any()
    caches.flags.writeable = False
    with pytest.raises(ValueError, match="k_caches must be writeable, got a read-only array"):
        dlpack.kv_commit(*caches, nodes, 4)


def test_rows_are_appended_in_place():
    """Into NumPy's caches, turned by NumPy's tables; queries come back as an array, or are turned where they lie."""
    numbers = np.random.default_rng(3)
    k, q = (numbers.normal(size=(1, 2, heads, 8)).astype(np.float32) for heads in (1, 3))
    angles = numbers.normal(size=(9, 4)).astype(np.float32)
    caches, tensors = np.zeros((2, 1, 6, 1, 8), np.float32), torch.zeros(2, 1, 6, 1, 8)
    rope = np.cos(angles), np.sin(angles)
    got = dlpack.kv_append(k, k, *caches, None, 3, q=q, rope=rope)
    plain = [torch.from_numpy(array) for array in (k, q, *rope)]
    want = specdec_ops.kv_append(plain[0], plain[0], *tensors, None, 3, q=plain[1], rope=tuple(plain[2:]))
    assert isinstance(got, np.ndarray) and (got == want.numpy()).all() and (caches == tensors.numpy()).all()
    dlpack.kv_append(k, k, *caches, None, np.array([3]), q=q, rope=rope, q_out=q)
    assert (q == got).all()
    q.flags.writeable = False
    with pytest.raises(ValueError, match="q_out must be writeable, got a read-only array"):
        dlpack.kv_append(k, k, *caches, None, 3, q=q, q_out=q)
