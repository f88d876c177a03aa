"""The early exit benchmarks: PyTorch's forms are right, and a cell is checked, timed and judged."""

import dataclasses

import pytest
import torch

from benchmarks.early_exit import bounded_exit, exit_confidence, screened_exit
from benchmarks.early_exit import cases as exit_cases
from benchmarks.early_exit.inputs import make_inputs
from benchmarks.harness import results, roofs, targets
from benchmarks.harness.contestant import check, compiled
from benchmarks.harness.timing import CpuTimer
from benchmarks.kv import cases as kv_cases
from benchmarks.registry import OPS
from tests.harness.quick_reader import quick_reader  # noqa: F401


class Options:
    backends = ()


@pytest.mark.parametrize("top_k", [0, 5])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_every_contestant_is_right(dtype, top_k):
    inputs = make_inputs(exit_cases.toy(dtype=dtype, top_k=top_k))
    exact = exit_confidence.expected(inputs)
    for contestant in exit_confidence.contestants(inputs, Options):
        assert check(contestant, exact).problem == "", contestant.name


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_screened_cell_has_the_whole_head_beside_it(dtype):
    inputs = make_inputs(exit_cases.toy(dtype=dtype, vocab=300, screened=True))
    exact = screened_exit.expected(inputs)
    found = screened_exit.contestants(inputs, Options)
    assert [contestant.name for contestant in found][:2] == ["specdec_ops", "specdec_ops full head"]
    for contestant in found:
        assert check(contestant, exact).problem == "", contestant.name
    assert found[0].call().rechecked is not None and found[1].call().rechecked is None
    another = screened_exit.ours(inputs, "torch", "wrong")
    another.to_result = lambda result: [result.max_prob, result.logsumexp, (result.token + 1) % 300]
    assert check(another, exact).problem.startswith("WRONG")


@pytest.mark.parametrize("bounds", ["even", "falling"])
def test_a_bounded_cell_has_the_whole_head_beside_it(bounds):
    """It asks which rows exit, of which there are some that do and some that don't."""
    inputs = make_inputs(exit_cases.toy(dtype="bf16", vocab=4000, dim=512, rows=4, bounds=bounds))
    exact = bounded_exit.expected(inputs)
    assert set(exact.exact[0].tolist()) == {0.0, 1.0}
    found = bounded_exit.contestants(inputs, Options)
    assert [contestant.name for contestant in found][:2] == ["specdec_ops", "specdec_ops full head"]
    for contestant in found:
        assert check(contestant, exact).problem == "", contestant.name
    seen = found[0].call().seen
    assert found[1].call().seen is None
    assert (seen < 4000).any() == (bounds == "falling")
    another = bounded_exit.ours(inputs, "torch", "wrong")
    another.to_result = lambda result: [~result.exited]
    assert check(another, exact).problem.startswith("WRONG")


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("case", [kv_cases.toy(), exit_cases.toy_model()], ids=lambda case: case.op)
def test_contestants_of_the_draft_ops_are_right(case, dtype):
    """PyTorch's forms too; and one that leaves a cache alone, or a score that is off, is not."""
    op = OPS[case.op]
    inputs = op.make_inputs(dataclasses.replace(case, dtype=dtype))
    exact = op.expected(inputs)
    found = op.contestants(inputs, Options)
    for contestant in found:
        assert check(contestant, exact).problem == "", contestant.name
    idle = found[0]
    right = idle.call()
    if case.op == "kv_propagate":
        idle.call = inputs.caches
    else:
        idle.call = lambda: (right[0] + 0.1, right[1])
    assert check(idle, exact).problem.startswith("WRONG")


def test_compiled_contestants_are_compiled_for_every_shape():
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    form = compiled(lambda x: torch.relu(x) + 1, backend=backend)
    for rows in range(1, 13):
        form(torch.ones(rows, 3))
    assert len(graphs) == 12


def test_a_wrong_result_gets_no_time():
    inputs = make_inputs(exit_cases.toy())
    exact = exit_confidence.expected(inputs)
    wrong = exit_confidence.ours(inputs, "torch", "wrong")
    right = wrong.to_result
    wrong.to_result = lambda result: [figure * 1.01 for figure in right(result)]
    assert check(wrong, exact).problem.startswith("WRONG")


OTHERS = (
    *(exit_cases.toy(screened=True, rows=1), exit_cases.toy(bounds="even", dim=512, dtype="bf16")),
    *(exit_cases.toy(bounds="falling", dim=512, dtype="bf16"), kv_cases.toy(), exit_cases.toy_model()),
)


@pytest.mark.parametrize("case", OTHERS, ids=lambda case: case.label)
def test_cells_of_the_other_ops(case):
    op = OPS[case.op]
    inputs = op.make_inputs(case)
    exact = op.expected(inputs)
    group = [check(contestant, exact) for contestant in op.contestants(inputs, Options)]
    measured = CpuTimer().measure(group, "warm", 0.1, 0.0)
    machine = dict.fromkeys(results.MACHINE_COLUMNS, "")
    found = results.rows_of(case, "warm", group, measured, roofs.Roofs(1e10, {"fp32": (1e11, 512)}), machine)
    (cell,) = results.cells(found)
    assert cell.ours["ratio"] > 0 and cell.ours["read_percent"] > 0
    assert cell.key == results.key(case, "warm")
    assert cell.label.startswith(case.op)
    tree = case.tree.name
    assert [verdict.met is None for verdict in targets.exit_verdicts([cell])] == [
        *(True, True, case.op != "screened_exit", tree != "falling", tree != "even", False)
    ]


@pytest.mark.parametrize("preset", exit_cases.PRESETS)
def test_cases_differ(preset):
    """And bf16 as well as fp32 is measured. A first run on a GPU has heads in bf16 alone, and the draft's K and V."""
    draft = [case for case in kv_cases.PRESETS[preset]() if case.op in targets.EXIT_OPS]
    cases = [*exit_cases.PRESETS[preset](), *draft]
    assert len({case.label for case in cases}) == len({results.key(case, "warm") for case in cases}) == len(cases)
    first = {"exit_confidence", "kv_propagate"}
    assert {case.op for case in cases} == (first if preset == "gpu-first" else set(targets.EXIT_OPS))
    dtypes = {case.dtype for case in cases if case.op == "exit_confidence"}
    assert dtypes == ({"bf16"} if preset == "gpu-first" else {"bf16", "fp32"})


@pytest.mark.parametrize("rows", [1, 60])
def test_a_cell(rows):
    case = exit_cases.toy(rows=rows)
    op = OPS[case.op]
    inputs = op.make_inputs(case)
    exact = op.expected(inputs)
    group = [check(contestant, exact) for contestant in op.contestants(inputs, Options)]
    measured = CpuTimer().measure(group, "warm", 0.2, 0.0)
    machine = dict.fromkeys(results.MACHINE_COLUMNS, "")
    found = results.rows_of(case, "warm", group, measured, roofs.Roofs(1e10, {"fp32": (1e11, 512)}), machine)
    (cell,) = results.cells(found)
    assert cell.ours["ratio"] > 0 and cell.ours["read_percent"] > 0 and cell.ours["gflops"] > 0
    assert cell.ours["gbps"] == pytest.approx(case.bytes / cell.ours["p50_us"] / 1e3)
    judged = targets.exit_verdicts([cell])
    assert [verdict.met is None for verdict in judged] == [rows != 1, rows != 60, True, True, True, True]
    assert torch.is_tensor(inputs.head)
