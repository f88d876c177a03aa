"""The early exit benchmarks: PyTorch's forms are right, and a cell is checked, timed and judged."""

import pytest
import torch

from benchmarks import exit, exit_cases, results, roofs, targets
from benchmarks.contestant import check
from benchmarks.peers import OPS
from benchmarks.timing import CpuTimer


class Options:
    backends = ()


@pytest.mark.parametrize("top_k", [0, 5])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_every_contestant_is_right(dtype, top_k):
    inputs = exit.make_inputs(exit_cases.toy(dtype=dtype, top_k=top_k))
    exact = exit.expected(inputs)
    for contestant in exit.contestants(inputs, Options):
        assert check(contestant, exact).problem == "", contestant.name


def test_a_wrong_result_gets_no_time():
    inputs = exit.make_inputs(exit_cases.toy())
    exact = exit.expected(inputs)
    wrong = exit.ours(inputs, "torch", "wrong")
    right = wrong.to_result
    wrong.to_result = lambda result: [figure * 1.01 for figure in right(result)]
    assert check(wrong, exact).problem.startswith("WRONG")


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
    assert [verdict.met is None for verdict in judged] == [rows != 1, rows != 60]
    assert torch.is_tensor(inputs.head)
