"""The acceptance and sampling ops as PyTorch sees them: schemas, fakes, out overloads, torch.compile."""

import dataclasses

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from specdec_ops import chain_accept, sample_children, sample_tokens, tree_accept
from specdec_ops.ops.acceptance import contract
from tests.acceptance.accept_cases import RULES, assert_same, make_case, random_parents

OPS = torch.ops.specdec_ops
CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def case_of(rule, **options):
    trees = [random_parents(size, size, 2 if rule == "longest" else 1) for size in (6, 3)]
    return make_case(rule, trees, 12, **({"width": 2} if rule == "longest" else {}), **options)


def operator_call(monkeypatch, function, name):
    """The arguments, backend and options with which a public op calls its operator."""
    seen = []
    operator = getattr(contract, name)

    def call(arguments, backend, out=None, **what):
        seen.append((arguments, backend, what))
        return operator(arguments, backend, out, **what)

    monkeypatch.setattr(contract, name, call)
    function()
    return seen[0]


@pytest.mark.parametrize("rule", ["greedy", "match", "block", "recursive", "longest"])
def test_opcheck_accept(rule, monkeypatch):
    """Both overloads."""
    case = case_of(rule)
    arguments, backend, what = operator_call(monkeypatch, lambda: case.run("auto"), "accept")
    torch.library.opcheck(OPS.accept.default, (*arguments, backend), what, test_utils=CHECKS)
    outputs = OPS.accept(*arguments, backend, **what)
    names = contract.AcceptOutputs._fields
    into = {name: torch.zeros_like(tensor) for name, tensor in zip(names, outputs, strict=True)}
    torch.library.opcheck(OPS.accept.out, (*arguments, backend), into, test_utils=CHECKS)
    OPS.accept.out(*arguments, backend, **into)
    assert all(torch.equal(into[name], tensor) for name, tensor in zip(names, outputs, strict=True))


@pytest.mark.parametrize("children", [False, True])
def test_opcheck_sample(children, monkeypatch):
    """Both overloads, with and without log-probabilities."""
    logits = torch.randn(2, 3, 9)

    def call():
        if children:
            return sample_children(logits, 2, seeds=torch.arange(2), positions=4, top_k=3)
        return sample_tokens(logits[0], seeds=1, positions=torch.arange(3, dtype=torch.int32))

    arguments, backend, what = operator_call(monkeypatch, call, "sample")
    torch.library.opcheck(OPS.sample.default, (*arguments, backend), what, test_utils=CHECKS)
    outputs = OPS.sample(*arguments, backend, **what)
    names = contract.SampleOutputs._fields
    kept = names if children else ("tokens", "status")
    into = {n: torch.zeros_like(t) if n in kept else None for n, t in zip(names, outputs, strict=True)}
    torch.library.opcheck(OPS.sample.out, (*arguments, backend), into, test_utils=CHECKS)
    OPS.sample.out(*arguments, backend, **into)
    assert all(torch.equal(into[n], tensor) for n, tensor in zip(names, outputs, strict=True) if n in kept)


@pytest.mark.parametrize("rule", RULES)
def test_compile(rule):
    """One graph without breaks, with and without out, for every rule."""
    torch._dynamo.reset()
    case = case_of(rule)
    want = case.run("auto")
    compiled = torch.compile(lambda case: case.run("auto"), fullgraph=True, backend="aot_eager")
    assert_same(compiled(case), want)
    out = type(want)(*(torch.full_like(getattr(want, field.name), -9) for field in dataclasses.fields(want)))

    def write(case, out):
        case.run("auto", out=out)
        return out.tokens + 1

    tokens = torch.compile(write, fullgraph=True, backend="aot_eager")(case, out)
    assert torch.equal(tokens, want.tokens + 1)
    assert_same(out, want)


def test_compile_with_dynamic_shapes():
    """A round of sampling and acceptance, and no new compilation for another batch, length or position."""
    torch._dynamo.reset()

    def step(target, draft, seeds, positions):
        tokens = sample_children(draft, 1, seeds=seeds, positions=positions).tokens[:, :, 0]
        result = chain_accept(target, tokens, draft, seeds=seeds, positions=positions, temperature=0.7)
        return result.tokens + 1, result.next_token

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch, steps in ((2, 3), (3, 4)):
        arguments = inputs(batch, steps)
        for got, want in zip(compiled(*arguments), step(*arguments), strict=True):
            assert torch.equal(got, want)
    with torch.compiler.set_stance("fail_on_recompile"):
        compiled(*inputs(5, 6))


def inputs(batch, steps):
    positions = torch.arange(batch, dtype=torch.int32)
    return torch.randn(batch, steps + 1, 9), torch.randn(batch, steps, 9), torch.arange(batch), positions


def test_fake_tensors():
    """Shapes without running anything, on a device that is not there too."""
    with FakeTensorMode():
        target = torch.empty(2, 4, 9, device="cuda", dtype=torch.bfloat16)
        tokens, seeds = (
            torch.empty(2, 3, device="cuda", dtype=torch.int64),
            torch.empty(2, device="cuda", dtype=torch.int64),
        )
        draft = torch.empty(2, 3, 9, device="cuda", dtype=torch.bfloat16)
        result = chain_accept(target, tokens, draft, seeds=seeds, positions=3)
        children = sample_children(target, 5, seeds=seeds, positions=3)
    assert (result.tokens.shape, result.tokens.device.type) == ((2, 4), "cuda")
    assert result.next_token.shape == result.status.shape == (2,)
    assert children.logprobs.shape == (2, 4, 5)


def test_inference_mode():
    """Results are the same, and ask for no gradient."""
    case = case_of("recursive")
    want = case.run("auto")
    with torch.inference_mode():
        assert_same(case.run("auto"), want)
    with torch.no_grad():
        got = tree_accept(case.target.clone().requires_grad_(), case.tokens, case.topology, case.draft, **case.options)
    assert_same(got, want)
