"""The operators as PyTorch sees them: schema, fake, out overloads, torch.compile and fake tensors."""

import dataclasses

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from specdec_ops import AttentionState, Tree, build_topology, merge_states, tree_attention
from specdec_ops._core import library
from tests.attention.attention_cases import make_case, random_tree
from tests.harness.public_calls import CALLS, run

OPS = torch.ops.specdec_ops
CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


class Marked(torch.Tensor):
    """A subclass, which may want to see what is done with it."""


def case_of(**options):
    """A small ragged case."""
    return make_case([random_tree(7), random_tree(4)], [5, 12], dtype=torch.float32, **options)


def operator_arguments(case):
    """What the operator takes for a case, from q to path_invariant."""
    topology, options = case.topology, case.options
    return (
        case.q,
        case.k_cache,
        case.v_cache,
        topology.ancestors,
        topology.depths,
        topology.num_nodes,
        topology.offsets,
        case.context_lens,
        options.get("page_table"),
        options.get("query_start"),
        0,
        0.125,
        3,
        0.0,
        options.get("sinks"),
        options.get("alibi_slopes"),
        1.0,
        0,
        False,
    )


VARIANTS = {
    "padded": {},
    "packed-paged": {"packed": True, "page_size": 4, "sinks": True, "alibi": True},
    "rectangular": {"first_nodes": [1, 2]},
}


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("return_lse", [False, True])
def test_opcheck_tree_attention(options, return_lse):
    """The functional overload."""
    arguments = operator_arguments(case_of(**options))
    torch.library.opcheck(OPS.tree_attention.default, (*arguments, "auto", return_lse), test_utils=CHECKS)


@pytest.mark.parametrize("with_lse", [False, True])
def test_opcheck_tree_attention_out(with_lse):
    """The out overload."""
    case = case_of()
    out, lse = torch.zeros_like(case.q), torch.zeros(case.q.shape[:-1]) if with_lse else None
    arguments = (*operator_arguments(case), "auto")
    torch.library.opcheck(OPS.tree_attention.out, arguments, {"out": out, "lse": lse}, test_utils=CHECKS)
    OPS.tree_attention.out(*arguments, out=out, lse=lse)
    wanted, wanted_lse = OPS.tree_attention(*arguments, True)
    assert torch.equal(out, wanted)
    assert lse is None or torch.equal(lse, wanted_lse)


def test_opcheck_merge_states():
    """Both overloads."""
    state = (torch.randn(3, 4, 64), torch.randn(3, 4), torch.randn(3, 4, 64), torch.randn(3, 4))
    torch.library.opcheck(OPS.merge_states.default, (*state, "auto"), test_utils=CHECKS)
    into = {"out": torch.zeros(3, 4, 64), "lse": torch.zeros(3, 4)}
    torch.library.opcheck(OPS.merge_states.out, (*state, "auto"), into, test_utils=CHECKS)


def test_opcheck_build_topology():
    """Both overloads."""
    parents = torch.tensor([[-1, 0, 0, 1], [-1, 0, 1, 2]], dtype=torch.int32)
    num_nodes = torch.tensor([4, 2], dtype=torch.int32)
    torch.library.opcheck(OPS.build_topology.default, (parents, num_nodes, "auto"), test_utils=CHECKS)
    names = ("parents_out", "depths", "ancestors", "first_child", "next_sibling", "num_nodes_out", "status")
    outputs = OPS.build_topology(parents, num_nodes, "auto")
    into = {name: torch.zeros_like(tensor) for name, tensor in zip(names, outputs, strict=True)}
    torch.library.opcheck(OPS.build_topology.out, (parents, num_nodes, "auto"), into, test_utils=CHECKS)
    OPS.build_topology.out(parents, num_nodes, "auto", **into)
    assert all(torch.equal(into[name], tensor) for name, tensor in zip(names, outputs, strict=True))


def test_direct_calls_and_operators_agree():
    """The short cut for plain eager tensors, and the way through the dispatcher, give the same bits."""

    class Watcher(TorchDispatchMode):
        seen = ()

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.seen += (function,)
            return function(*args, **(kwargs or {}))

    case = case_of(sinks=True)
    wanted = case.run("auto", return_lse=True)
    with Watcher() as watcher:
        got = case.run("auto", return_lse=True)
        out = torch.empty_like(case.q)
        case.run("auto", out=out)
    assert OPS.tree_attention.default in watcher.seen
    assert OPS.tree_attention.out in watcher.seen
    assert torch.equal(got.out, wanted.out)
    assert torch.equal(got.lse, wanted.lse)
    assert torch.equal(out, wanted.out)


def test_what_bypasses_the_dispatcher():
    plain = torch.zeros(2)
    assert library.nobody_watches()
    assert library.are_plain((plain, None, torch.nn.Parameter(plain), 1, 1.0, True, "auto", [plain], ()))
    assert not library.are_plain((plain, plain.as_subclass(Marked)))
    with FakeTensorMode() as mode:
        assert not library.nobody_watches()
    assert not library.are_plain((mode.from_tensor(plain),))


def test_fake_tensors():
    """Shapes, dtypes and devices without running anything, on a device that is not there too."""
    with FakeTensorMode() as mode:
        q = torch.empty(2, 7, 4, 64, dtype=torch.bfloat16, device="cuda")
        cache = torch.empty(2, 99, 2, 64, dtype=torch.bfloat16, device="cuda")
        lengths = torch.empty(2, dtype=torch.int32, device="cuda")
        parents = torch.empty(2, 7, dtype=torch.int32, device="cuda")
        topology = build_topology(parents)
        state = tree_attention(q, cache, cache, topology, lengths, return_lse=True)
        merged = merge_states(*state, *state)
    assert mode is not None
    assert topology.ancestors.shape == (2, 7, 1)
    assert topology.ancestors.dtype == torch.int64
    meta = torch.empty(2, 7, 4, 64, device="meta")
    lengths = torch.empty(2, dtype=torch.int32, device="meta")
    assert tree_attention(meta, meta, meta, None, lengths).device.type == "meta"
    for out, lse in (state, merged):
        assert (out.shape, out.dtype, out.device.type) == (q.shape, torch.bfloat16, "cuda")
        assert (lse.shape, lse.dtype, lse.device.type) == (q.shape[:-1], torch.float32, "cuda")


def verify(q, k_cache, v_cache, parents, lengths):
    """What a decode step does: a tree on the device, attention in two parts, a merge."""
    topology = build_topology(parents)
    tree = tree_attention(q * 2, k_cache, v_cache, topology, lengths, window=50, return_lse=True)
    context = tree_attention(q, k_cache, v_cache, None, lengths, return_lse=True)
    merged = merge_states(*tree, *context)
    return merged.out + 1, merged.lse, topology.position_ids(lengths)


def verify_arguments(batch, nodes, slots):
    """Inputs of `verify`."""
    parents = torch.tensor([random_tree(nodes, seed) for seed in range(batch)], dtype=torch.int32)
    lengths = torch.randint(0, slots - nodes, (batch,), dtype=torch.int32)
    q = torch.randn(batch, nodes, 4, 64)
    return q, torch.randn(batch, slots, 2, 64), torch.randn(batch, slots, 2, 64), parents, lengths


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_compile_with_dynamic_shapes(compiler):
    """One graph without breaks, and no new compilation for another batch, tree size or cache size."""
    torch._dynamo.reset()
    compiled = torch.compile(verify, fullgraph=True, dynamic=True, backend=compiler)
    for sizes in ((2, 7, 40), (3, 5, 60), (4, 9, 50)):
        arguments = verify_arguments(*sizes)
        for got, wanted in zip(compiled(*arguments), verify(*arguments), strict=True):
            torch.testing.assert_close(got, wanted)
    with torch.compiler.set_stance("fail_on_recompile"):
        arguments = verify_arguments(5, 8, 70)
        torch.testing.assert_close(compiled(*arguments)[0], verify(*arguments)[0])


def test_compile_with_a_ready_topology_and_out():
    """A topology as an argument, an out tensor that is written, int lengths and every option."""
    torch._dynamo.reset()
    case = case_of(page_size=4, sinks=True, alibi=True, softcap=5.0)

    def run(q, k_cache, v_cache, topology, lengths, options, out):
        tree_attention(q, k_cache, v_cache, topology, lengths, out=out, num_splits=2, scale=0.1, **options)
        half = tree_attention(q, k_cache, v_cache, topology[:3], 2, **options)
        return out * 2, half

    arguments = (case.q, case.k_cache, case.v_cache, case.topology, case.context_lens, case.options)
    wanted = run(*arguments, torch.zeros_like(case.q))
    out = torch.zeros_like(case.q)
    got = torch.compile(run, fullgraph=True, backend="aot_eager")(*arguments, out)
    for mine, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, theirs)
    torch.testing.assert_close(out * 2, wanted[0])


def test_compile_reports_errors():
    """A wrong argument is refused while tracing, with its own message."""
    torch._dynamo.reset()
    case = case_of()
    compiled = torch.compile(lambda q: dataclasses.replace(case, q=q).run("auto"), backend="eager")
    with pytest.raises(Exception, match=r"q must be float32, bfloat16 or float16"):
        compiled(case.q.int())


def test_out_of_one_state_is_an_input_of_the_next():
    """merge_states in place, through the operator."""
    state = AttentionState(torch.randn(2, 4, 64), torch.randn(2, 4))
    other = AttentionState(torch.randn(2, 4, 64), torch.randn(2, 4))
    wanted = merge_states(*state, *other)
    OPS.merge_states.out(*state, *other, "auto", out=state.out, lse=state.lse)
    assert torch.equal(state.out, wanted.out)


def test_inference_mode_and_no_grad():
    """Both work, and results don't ask for a gradient."""
    case = make_case([Tree.chain(3).parents.tolist()], [4])
    with torch.inference_mode():
        first = case.run("auto")
    with torch.no_grad():
        second = dataclasses.replace(case, q=case.q.clone().requires_grad_()).run("auto")
    assert torch.equal(first, second)
    assert not second.requires_grad


TENSORS = [
    (name, argument)
    for name, call in CALLS.items()
    if call.op is not None
    for argument, value in call.arguments.items()
    if type(value) is torch.Tensor
]


@pytest.mark.parametrize(("name", "argument"), TENSORS)
def test_no_tensor_of_a_call_is_overlooked(name, argument, monkeypatch):
    """A single argument that is more than a plain tensor, also an optional one, sends the call through the operator."""
    plain, bypass = [], library.Operator.bypass_dispatcher

    def watched(*arguments):
        plain.append(bypass(*arguments))
        return plain[-1]

    monkeypatch.setattr(library.Operator, "bypass_dispatcher", watched)
    run(name, backend="cpu")
    run(name, **{argument: CALLS[name].arguments[argument].as_subclass(Marked)}, backend="cpu")
    assert plain == [True, False]
