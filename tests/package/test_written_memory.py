"""What a call writes: it is apart from all else of the call, autograd learns of it, and it may not require grad."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import specdec_ops
from specdec_ops import AttentionState, QuantizedHead, Tree, VocabMap, build_topology, kv_append, kv_commit, linear
from specdec_ops._core import loader
from tests.harness.public_calls import CALLS, Call, tensors_of

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(loader.load()[0] is None, reason="the compiled module compares addresses")
TREE = Tree.chain(3).to("cpu")
LENGTHS = torch.tensor([4], dtype=torch.int32)


def elements(tensor: torch.Tensor) -> list[int]:
    """Where each byte of a view of uint8 lies."""
    at = torch.zeros((), dtype=torch.int64)
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        at = at[..., None] + torch.arange(size) * stride
    return (at.flatten() + tensor.storage_offset()).tolist()


def random_view(store: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Strides that nest or not, and any place."""

    def draw(high):
        return int(torch.randint(high, (), generator=generator))

    shape = [1 + draw(4) for _ in range(1 + draw(3))]
    strides = [draw(9) if draw(3) else draw(4) * 8 for _ in shape]
    reach = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    return store.as_strided(shape, strides, draw(len(store) - reach + 1))


def test_what_is_shared_is_never_missed():
    """Against the bytes of random views of one store."""
    generator, store = torch.Generator().manual_seed(0), torch.zeros(200, dtype=torch.uint8)
    shared = loader.load()[0].shared_memory
    found = apart = told_apart = 0
    for _ in range(4000):
        read, written = (random_view(store, generator) for _ in range(2))
        own, other = elements(written), elements(read)
        meets = bool(set(own) & set(other)) or len(set(own)) < len(own)
        told = shared((read,), (written,), ()) is not None
        assert told or not meets, (read.shape, read.stride(), written.shape, written.stride())
        found += meets
        apart += not meets
        told_apart += not told
    assert found > 1000 < apart
    assert told_apart > 0.8 * apart  # the rest are strides that hardly anybody has


LAYOUTS = {  # of K and V, or of q, k and v, that lie in one store and are apart
    "turns of pages": lambda store: store.view(5, 2, 4, 2, 8).unbind(1),
    "turns of slots": lambda store: store.view(20, 2, 2, 8).unbind(1),
    "turns of heads": lambda store: store.view(5, 4, 2, 2, 8).unbind(3),
    "parts of a head": lambda store: store.view(5, 4, 2, 16).split(8, dim=-1),
    "halves": lambda store: store.view(2, 5, 4, 2, 8).unbind(0),
    "columns of a product": lambda store: store.view(40, 16).split((8, 4, 4), dim=-1),
    "every second page": lambda store: (store.view(10, 64)[::2], store.view(10, 64)[1::2]),
    "heads before slots": lambda store: [part.transpose(1, 2) for part in store.view(5, 2, 2, 4, 8).unbind(1)],
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_that_are_apart(name):
    parts = LAYOUTS[name](torch.zeros(640))
    shared = loader.load()[0].shared_memory
    assert shared(tuple(parts[1:]), (parts[0],), ()) is None
    assert shared((), tuple(parts), ()) is None
    assert shared((parts[0],), (parts[0],), ()) == (1, 0)
    assert shared((parts[0],), (parts[0],), (1000,)) is None


def attention_of(q, k, out):
    return specdec_ops.tree_attention(q, k, k, TREE, LENGTHS, out=out)


Q, K = torch.randn(1, 3, 2, 16), torch.randn(1, 9, 2, 16)
STORE = torch.randn(1, 12, 2, 16)
LOGITS, IDS = torch.randn(1, 3, 40), torch.zeros(1, 3, dtype=torch.int32)
ACCEPTED = specdec_ops.greedy_accept(LOGITS, IDS, TREE)
CHILDREN = specdec_ops.sample_children(LOGITS, 2, seeds=1, positions=1)
HIDDEN, HEAD = torch.randn(4, 8), torch.randn(30, 8)
CONFIDENCE = specdec_ops.exit_confidence(HIDDEN, HEAD)
LAYERS = [(None, torch.randn(16, 8), torch.randn(16, 8))]
SHARED = {
    "tree_attention": (
        lambda: attention_of(STORE[:, 1:4], K, STORE[:, :3]),
        "out must be q or share no memory with it",
    ),
    "tree_attention cache": (lambda: attention_of(Q, STORE, STORE[:, 3:6]), "out must not share memory with k_cache"),
    "merge_states": (
        lambda: specdec_ops.merge_states(
            STORE[0, 1:],
            STORE[0, 1:, :, 0].contiguous(),
            STORE[0, 1:].clone(),
            STORE[0, 1:, :, 0].contiguous(),
            out=AttentionState(STORE[0, :-1], torch.empty(11, 2)),
        ),
        "out.out must be out_a or share no memory with it",
    ),
    "greedy_accept": (
        lambda: specdec_ops.greedy_accept(LOGITS, IDS, TREE, out=dataclasses.replace(ACCEPTED, nodes=ACCEPTED.tokens)),
        "out.tokens must not share memory with out.nodes",
    ),
    "tree_accept": (
        lambda: specdec_ops.tree_accept(LOGITS, ACCEPTED.tokens, TREE, seeds=1, positions=1, out=ACCEPTED),
        "out.tokens must not share memory with draft_tokens",
    ),
    "sample_children": (
        lambda: specdec_ops.sample_children(
            LOGITS,
            2,
            seeds=1,
            positions=1,
            out=dataclasses.replace(CHILDREN, logprobs=CHILDREN.tokens.view(torch.float32)),
        ),
        "out.tokens must not share memory with out.logprobs",
    ),
    "sample_tokens": (
        lambda: specdec_ops.sample_tokens(LOGITS[0], seeds=1, positions=1, out=LOGITS.view(torch.int32)[0, 0, :3]),
        "out.tokens must not share memory with logits",
    ),
    "exit_confidence": (
        lambda: specdec_ops.exit_confidence(
            HIDDEN, HEAD, out=dataclasses.replace(CONFIDENCE, margin=CONFIDENCE.max_prob)
        ),
        "out.max_prob must not share memory with out.margin",
    ),
    "build_topology": (
        lambda: build_topology(TREE.first_child, out=dataclasses.replace(TREE)),
        "out.first_child must not share memory",
    ),
    "linear": (
        lambda: linear(STORE.view(-1, 16)[:4], torch.randn(16, 16), out=STORE.view(-1, 16)[3:7]),
        "out must not share memory with x",
    ),
    "rms_norm": (
        lambda: specdec_ops.rms_norm(STORE.view(-1, 16)[:4], STORE[0, -1, 0], out=STORE.view(-1, 16)[3:7]),
        "out must be x or share no memory with it",
    ),
    "kv_append": (
        lambda: kv_append(STORE[:, 1:4], Q, STORE, STORE.clone(), TREE, LENGTHS),
        "k_cache must not share memory with k",
    ),
    "kv_append caches": (
        lambda: kv_append(Q, Q, STORE, STORE, TREE, LENGTHS),
        "k_cache must not share memory with v_cache",
    ),
    "kv_append q_out": (
        lambda: kv_append(
            Q, Q.clone(), K, torch.zeros(1, 9, 2, 16), TREE, LENGTHS, q=STORE[:, 1:4], q_out=STORE[:, :3]
        ),
        "q_out must be q or share no memory with it",
    ),
    "kv_append expanded": (
        lambda: kv_append(Q, Q, K[:, :1].expand(1, 9, 2, 16), torch.zeros(1, 9, 2, 16), TREE, LENGTHS),
        "k_cache must not be expanded, nor overlap itself",
    ),
    "kv_commit": (
        lambda: kv_commit(
            [STORE, STORE],
            [STORE.clone(), STORE.clone()],
            torch.tensor([[0, 2]], dtype=torch.int32),
            LENGTHS,
            page_table=None,
        ),
        "k_caches must not be expanded, nor overlap itself",
    ),
    "kv_propagate": (
        lambda: specdec_ops.kv_propagate(
            HIDDEN[:1], LAYERS, LENGTHS, LENGTHS, [STORE[:, :, :1]], [STORE[:, :, :1]], rope=None
        ),
        "k_caches must not share memory with v_caches",
    ),
    "gather_layer_kv": (
        lambda: specdec_ops.gather_layer_kv([STORE], [K[:, [0] * 12]], LENGTHS, out=STORE[:, :2].view(1, 1, 64)),
        "out must not share memory with k_caches",
    ),
}


@pytest.mark.parametrize("name", SHARED)
def test_what_is_written_is_apart(name):
    call, sentence = SHARED[name]
    with pytest.raises(ValueError, match=rf"^specdec_ops\.\w+: {sentence}"):
        call()


def test_what_may_be_one_tensor():
    """With the result that it has otherwise."""
    wanted = attention_of(Q, K, torch.empty_like(Q))
    q = Q.clone()
    assert torch.equal(attention_of(q, K, q), wanted)
    state = [Q.clone(), Q[..., 0].contiguous(), K[:, :3].clone(), K[:, :3, :, 0].contiguous()]
    wanted = specdec_ops.merge_states(*state)
    for first in (0, 2):
        given = [tensor.clone() for tensor in state]
        specdec_ops.merge_states(*given, out=AttentionState(*given[first : first + 2]))
        assert torch.equal(given[first], wanted.out) and torch.equal(given[first + 1], wanted.lse)
    x, residual = torch.randn(3, 8), torch.randn(3, 8)
    wanted = specdec_ops.rms_norm(x, HEAD[0], residual=residual)
    for place in (0, 1):
        given = [x.clone(), residual.clone()]
        assert torch.equal(specdec_ops.rms_norm(given[0], HEAD[0], residual=given[1], out=given[place]), wanted)
    weight = torch.randn(8, 8)
    wanted = linear(x, weight, residual=residual)
    assert torch.equal(linear(x, weight, residual=residual, out=residual), wanted)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_autograd_learns_of_writes(backend):
    """What was saved for a backward pass must not be overwritten unseen."""
    weight = torch.randn(16, 16, requires_grad=True)
    out = torch.zeros(4, 16)
    product = (out * weight[:4]).sum()
    linear(torch.randn(4, 8), torch.randn(16, 8), out=out, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()
    caches = [torch.zeros(1, 9, 2, 16) for _ in range(2)]
    before = [cache._version for cache in caches]
    kv_append(Q, Q.clone(), *caches, TREE, LENGTHS, backend=backend)
    kv_commit([caches[0]], [caches[1]], torch.tensor([[0, 2]], dtype=torch.int32), LENGTHS, backend=backend)
    assert all(cache._version >= version + 2 for cache, version in zip(caches, before, strict=True))
    with torch.inference_mode():
        inside = torch.zeros(4, 16)
        linear(torch.randn(4, 8), torch.randn(16, 8), out=inside, backend=backend)


def requiring_grad(value):
    """Each way of making one floating tensor in it require grad."""
    if isinstance(value, torch.Tensor) and value.dtype in (torch.float32, torch.bfloat16, torch.float16):
        yield value.detach().clone().requires_grad_()
    elif isinstance(value, list | tuple):
        for place, part in enumerate(value):
            for other in requiring_grad(part):
                yield type(value)([*value[:place], other, *value[place + 1 :]])


OPS = {name: call for name, call in CALLS.items() if call.op is not None}


def grads_of(call: Call) -> dict:
    return {name: list(requiring_grad(value)) for name, value in call.arguments.items()}


@pytest.mark.parametrize("name", OPS)
def test_every_input_that_requires_grad_is_refused(name):
    """Also caches, norms, biases, tables and settings: a gradient that is missing must not go unnoticed."""
    call, tried = OPS[name], 0
    for argument, others in grads_of(call).items():
        for other in others:
            with pytest.raises(
                RuntimeError, match=r"^specdec_ops\.\w+: an input requires grad, but this op has no backward"
            ):
                call.function(**{**call.arguments, argument: other})
            with torch.no_grad():
                assert tensors_of(call.function(**{**call.arguments, argument: other}))
            tried += 1
    assert tried or name in ("build_topology", "prune_tree")


def test_what_objects_hold_may_not_require_grad():
    head = specdec_ops.quantize_head(torch.randn(30, 8))
    for field in ("scales", "error_norms", "norms", "error_gain"):
        with pytest.raises(RuntimeError, match=r"^specdec_ops\.QuantizedHead: an input requires grad"):
            dataclasses.replace(head, **{field: getattr(head, field).clone().requires_grad_()})
    assert isinstance(head, QuantizedHead) and VocabMap([1, 0], 2) is not None


def test_outputs_may_not_require_grad():
    out = torch.zeros(4, 16, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"^specdec_ops\.linear: an input requires grad"):
        linear(torch.randn(4, 8), torch.randn(16, 8), out=out)


INTERRUPTED = """
import os, signal, threading, time, torch
from specdec_ops import Tree, tree_attention
torch.set_num_threads({threads})
q, cache = torch.randn(4, 64, 8, 128), torch.randn(1, 1, 8, 128).expand(4, 60_000, -1, -1)
tree, lengths = Tree.chain(64).to("cpu"), torch.tensor([59_000] * 4, dtype=torch.int32)
sent = []
def interrupt():
    time.sleep(0.2)
    sent.append(time.monotonic())
    os.kill(os.getpid(), signal.SIGINT)
threading.Thread(target=interrupt).start()
try:
    for _ in range(20):
        tree_attention(q, cache, cache, tree, lengths)
except KeyboardInterrupt:
    print(time.monotonic() - sent[0])
"""


def test_a_long_call_notices_an_interrupt():
    """A call takes a second and more here, and an interrupt is looked for each tenth of one."""
    command = [sys.executable, "-c", INTERRUPTED.format(threads=2)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert float(done.stdout) < 1.0
