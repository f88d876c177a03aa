"""What is called WRONG: no right result, however exact PyTorch happens to be, and every planted wrong one."""

import dataclasses

import pytest
import torch

from benchmarks.acceptance import accept
from benchmarks.acceptance import cases as acceptance_cases
from benchmarks.acceptance import inputs as acceptance_inputs
from benchmarks.attention import cases, merge_states, tree_attention
from benchmarks.attention import inputs as attention_inputs
from benchmarks.early_exit import cases as exit_cases
from benchmarks.early_exit import exit_confidence, exit_mlp, peers
from benchmarks.early_exit import inputs as exit_inputs
from benchmarks.harness.cases import Model
from benchmarks.harness.contestant import Contestant, Expected, allowed_error, check
from benchmarks.kv import cases as kv_cases
from benchmarks.kv import kv_propagate
from benchmarks.registry import OPS
from specdec_ops import _C
from tests.harness.quick_reader import quick_reader  # noqa: F401

MODEL = Model("one", 4, 2, 64)
ISAS = ("generic", "avx2", "avx512", "")  # those of this processor: a limit above it is none


class Options:
    backends = isas = ()
    preset, flex_seconds = "quick", 0


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield
    _C.set_cpu_isa("")


@pytest.fixture
def exact_pytorch(monkeypatch):
    """PyTorch's own error is nothing, as one figure's may be by chance: only the bounds are left."""
    for module in (tree_attention, merge_states, exit_confidence, exit_mlp, kv_propagate):
        monkeypatch.setattr(module, "largest_error", lambda got, exact: 0.0)


def some_cases(dtype):
    exits = [(997, 64, 3), (4000, 1024, 1), (4000, 1024, 8), (32000, 768, 2), (8000, 4096, 1)]
    return [
        *(exit_cases.toy(vocab=vocab, dim=dim, rows=rows, dtype=dtype) for vocab, dim, rows in exits),
        exit_cases.toy(vocab=4000, dim=768, rows=4, dtype=dtype, screened=True),
        *(cases.attention(MODEL, *shape, dtype) for shape in ((0, 8), (1, 16), (100, 64), (4096, 8), (4096, 60))),
        *(cases.attention(MODEL, context, 1, dtype) for context in (1, 1024)),
        cases.toy("merge_states", dtype=dtype, contexts=(0, 0)),
        kv_cases.toy(dtype=dtype),
        kv_cases.KvCase(MODEL, 1024, 3, 5, dtype),
        exit_cases.toy_model(dtype=dtype),
        exit_cases.MlpCase((768, 512, 256, 1), 60, dtype),
    ]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_no_right_result_is_refused(exact_pytorch, dtype):
    """Of ours on every instruction set and of PyTorch's: within the bound itself, without the lenience for peers."""
    for case in some_cases(dtype):
        op = OPS[case.op]
        inputs = op.make_inputs(case)
        expected = op.expected(inputs)
        for isa in ISAS:
            _C.set_cpu_isa(isa)
            for contestant in op.contestants(inputs, Options):
                if contestant.role == "control" or (isa and contestant.role != "ours"):
                    continue
                check(contestant, expected)
                assert contestant.problem == "" and contestant.error <= 1, (case.label, isa, contestant.name)


def refused(inputs, expected, call):
    """Whether what `call` makes of the inputs gets no time."""
    return check(Contestant("planted", "ours", lambda: call(inputs)), expected).problem.startswith("WRONG")


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_wrong_attention_is_refused(dtype):
    """One slot that is not seen, a wrong scale, a row of another node, a row of nothing."""
    inputs = attention_inputs.make_inputs(cases.attention(MODEL, 1000, 16, dtype))
    expected = tree_attention.expected(inputs)
    assert not refused(inputs, expected, tree_attention.eager)
    for slot in (0, 500, 999):
        k, v = (cache.clone() for cache in (inputs.k_cache, inputs.v_cache))
        k[:, slot], v[:, slot] = k[:, slot - 1], v[:, slot - 1]  # another one twice in its place
        assert refused(dataclasses.replace(inputs, k_cache=k, v_cache=v), expected, tree_attention.eager), slot
    scale = 1 + {"fp32": 1e-3, "bf16": 5e-2}[dtype]
    assert refused(dataclasses.replace(inputs, q=(inputs.q * scale).to(inputs.q.dtype)), expected, tree_attention.eager)
    swapped = [*range(14), 15, 14]
    assert refused(inputs, expected, lambda i: tree_attention.eager(i)[:, swapped])
    assert refused(inputs, expected, lambda i: tree_attention.eager(i) * (torch.arange(16) != 3)[:, None, None])
    assert refused(inputs, expected, lambda i: tree_attention.eager(i) * (1 + 2 * {"fp32": 1e-3, "bf16": 4e-2}[dtype]))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_wrong_exit_figures_are_refused(dtype):
    """Another token, a wrong scale, a tile of the head that is left out, the figures of another row."""
    inputs = exit_inputs.make_inputs(exit_cases.toy(vocab=4000, dim=1024, rows=2, dtype=dtype))
    expected = exit_confidence.expected(inputs)
    assert not refused(inputs, expected, peers.eager)

    def second_best(i):
        max_prob, lse, _ = peers.eager(i)
        return [max_prob, lse, (peers.normalised(i) @ i.head.T).float().topk(2, 1).indices[:, 1]]

    assert refused(inputs, expected, second_best)
    scale = 1 + {"fp32": 1e-3, "bf16": 2e-2}[dtype]
    scaled = dataclasses.replace(inputs, norm_weight=inputs.norm_weight.float() * scale, hidden=inputs.hidden.float())
    assert refused(scaled, expected, lambda i: peers.eager(dataclasses.replace(i, head=i.head.float())))
    if dtype == "fp32":  # a tile of 64 unlikely tokens weighs less than one rounding of a logit in bfloat16
        missing = dataclasses.replace(inputs, head=torch.cat([inputs.head[:1000], inputs.head[1064:]]))
        assert refused(missing, expected, peers.eager)
    assert refused(inputs, expected, lambda i: [figure.flip(0) for figure in peers.eager(i)])
    for part in range(2):  # each figure alone
        factors = [1.0, 1.0, 1]
        factors[part] += {"fp32": 1e-3, "bf16": 0.1}[dtype]
        wrong = lambda i, by=factors: [figure * factor for figure, factor in zip(peers.eager(i), by, strict=True)]  # noqa: E731
        assert refused(inputs, expected, wrong), part


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_wrong_results_of_the_other_ops_are_refused(dtype):
    off = 1 + {"fp32": 1e-3, "bf16": 5e-2}[dtype]
    states = merge_states.make_inputs(cases.toy("merge_states", dtype=dtype))
    expected = merge_states.expected(states)
    assert not refused(states, expected, lambda s: merge_states.eager(*s.all))
    assert refused(states, expected, lambda s: [merge_states.eager(*s.all)[0] * off, merge_states.eager(*s.all)[1]])
    assert refused(states, expected, lambda s: merge_states.eager(s.out_a, s.lse_a * off, s.out_b, s.lse_b))

    inputs = kv_propagate.make_inputs(kv_cases.KvCase(MODEL, 256, 3, 5, dtype))
    expected = kv_propagate.expected(inputs)
    assert not refused(inputs, expected, lambda i: kv_propagate.layer_by_layer(i, i.caches()))
    assert refused(inputs, expected, lambda i: kv_propagate.layer_by_layer(i, i.caches()) * off)
    late = dataclasses.replace(inputs, positions=(inputs.positions - 1).clamp(min=0))
    assert refused(late, expected, lambda i: kv_propagate.layer_by_layer(i, i.caches()))
    elsewhere = dataclasses.replace(inputs, long_slots=inputs.long_slots - 1)
    assert refused(elsewhere, expected, lambda i: kv_propagate.layer_by_layer(i, i.caches()))

    inputs = exit_mlp.make_inputs(exit_cases.MlpCase((768, 512, 256, 1), 8, dtype))
    expected = exit_mlp.expected(inputs)
    cast = [(weight, bias.to(weight.dtype)) for weight, bias in inputs.layers]
    assert not refused(inputs, expected, lambda i: exit_mlp.linear_layers(i.features, cast))
    without_bias = [(weight, bias * (number > 0)) for number, (weight, bias) in enumerate(cast)]
    assert refused(inputs, expected, lambda i: exit_mlp.linear_layers(i.features, without_bias))
    score, decision = exit_mlp.linear_layers(inputs.features, cast)
    assert refused(inputs, expected, lambda i: [score, ~decision])


def test_one_wrong_token_is_refused():
    inputs = acceptance_inputs.make_inputs(acceptance_cases.toy("token"))
    expected = accept.expected(inputs)
    right = acceptance_inputs.call(inputs)
    assert not refused(inputs, expected, lambda i: right)
    tokens = right.tokens.clone()
    tokens[0, 0] = (tokens[0, 0] + 1) % inputs.case.vocab
    assert refused(inputs, expected, lambda i: dataclasses.replace(right, tokens=tokens))


def test_a_decision_at_the_edge_may_go_either_way():
    """Two logits that differ by less than their rounding: either is the greatest. Two that differ by more: one is."""
    inputs = acceptance_inputs.make_inputs(acceptance_cases.toy("greedy"))
    target = inputs.target.double()
    for gap, accepted in ((1e-8, True), (1e-3, False)):
        target[0, 0] = 0.0
        first, second = 5, 6
        target[0, 0, first], target[0, 0, second] = 8.0 * (1 + gap), 8.0
        tokens = inputs.tokens.clone()
        tokens[0, 1:] = 7  # no child has either token: node 0 gives the only one
        edge = dataclasses.replace(inputs, target=target, tokens=tokens)
        expected = accept.expected(edge)
        right = acceptance_inputs.call(edge, "torch")
        assert right.tokens[0, 0] == first
        other = right.tokens.clone()
        other[0, 0] = second
        assert refused(edge, expected, lambda i, o=other, r=right: dataclasses.replace(r, tokens=o)) is not accepted


def test_the_larger_of_both_is_allowed():
    exact = torch.tensor([4.0, 8.0])
    bound = torch.tensor([1e-3, 1e-2])
    assert allowed_error(exact, 0.0, bound).tolist() == bound.tolist()
    assert allowed_error(exact, 2e-3, bound).tolist() == pytest.approx([4e-3, 1e-2])
    assert allowed_error(exact, 100.0, bound).tolist() == pytest.approx([0.8, 0.8])  # a tenth of the largest


def test_a_missing_figure_is_infinitely_wrong():
    expected = Expected(list, [torch.tensor([1.0, 2.0])], [torch.tensor([0.1, 0.1])])
    assert expected.worst([torch.tensor([1.0, 2.05])]) == pytest.approx(0.5)
    for wrong in ([1.0, float("nan")], [1.0, float("inf")]):
        assert expected.worst([torch.tensor(wrong)]) == float("inf")
    assert expected.worst([torch.tensor([1.0])]) == float("inf")
    assert Expected(list, [torch.tensor([1.0])], [0.0]).worst([torch.tensor([1.0])]) == 0.0
