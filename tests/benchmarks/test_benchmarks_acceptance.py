"""The acceptance benchmarks: PyTorch's forms decide as the reference does, and a wrong form gets no time."""

from pathlib import Path

import pytest
import torch

from benchmarks.acceptance import cases as acceptance_cases
from benchmarks.acceptance import inputs as acceptance
from benchmarks.acceptance import peers as acceptance_peers
from benchmarks.harness import results, roofs, targets
from benchmarks.harness.contestant import check
from benchmarks.harness.timing import CpuTimer
from benchmarks.registry import OPS
from tests.harness.quick_reader import quick_reader  # noqa: F401

RULES = (*acceptance_cases.CHAIN_RULES, *acceptance_cases.TREE_RULES)


class Options:
    backends = ()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_pytorch_forms_decide_as_the_reference(rule, top_p):
    if rule == "greedy" and top_p < 1:
        top_p = 1.0
    case = acceptance_cases.toy(rule, batch=8, top_p=top_p, compiled=True)
    inputs = acceptance.make_inputs(case)
    found = acceptance_peers.forms(case)
    assert found or rule == "traversal"
    for name, form in found:
        assert acceptance_peers.problem(inputs, form) == "", name


def test_a_wrong_form_gets_no_time():
    def biased(inputs, noise):
        """Takes the bonus row's probabilities as they are: no residual."""
        tokens = acceptance_peers.chain_token(inputs, noise)
        return torch.where(tokens >= 0, (tokens + 1) % inputs.case.vocab, tokens)

    inputs = acceptance.make_inputs(acceptance_cases.toy("token"))
    assert acceptance_peers.problem(inputs, biased).startswith("WRONG")


@pytest.mark.parametrize("rule", ["greedy", "recursive"])
def test_a_cell_is_checked_timed_and_judged(rule):
    case = acceptance_cases.toy(rule)
    op = OPS[case.op]
    inputs = op.make_inputs(case)
    exact = op.expected(inputs)
    group = [check(contestant, exact) for contestant in op.contestants(inputs, Options)]
    assert [contestant.problem for contestant in group if contestant.role == "ours"] == [""]
    measured = CpuTimer().measure(group, "warm", 0.2, 0.0)
    machine = dict.fromkeys(results.MACHINE_COLUMNS, "")
    rows = results.rows_of(case, "warm", group, measured, roofs.Roofs(1e10, {}), machine)
    (cell,) = results.cells(rows)
    assert cell.ours["ratio"] > 0
    assert cell.ours["read_percent"] > 0
    judged = targets.acceptance_verdicts([cell])
    assert [verdict.met is None for verdict in judged] == [rule != "greedy", True, False]


def test_older_results_call_a_rule_by_its_old_name():
    """Saved lines stay as they were; whoever reads them finds the cells that are measured today."""
    path = Path(results.__file__).parents[1] / "results" / "2026-11-21-epyc-zen4-2-cores-standard-acceptance.csv"
    assert "\naccept coin," in path.read_text()
    found = {row["op"] for row in results.read(path)}
    assert {"accept target_only", "accept target_only top-p"} <= found <= set(OPS)


def test_the_rows_that_must_be_read():
    """Path-lazy: as many target rows as nodes on the paths, and the draft's rows of those that have children."""
    case = acceptance_cases.toy("recursive", batch=8)
    inputs = acceptance.make_inputs(case)
    for rows, path in zip(acceptance.rows_to_read(inputs), acceptance.call(inputs).nodes.tolist(), strict=True):
        path = [node for node in path if node >= 0]
        assert [node for kind, _, node in rows if kind == "target"] == path
        assert [node for kind, _, node in rows if kind == "draft"] == [n for n in path if n in (0, 1, 2)]
    assert case.bytes == sum(map(len, acceptance.rows_to_read(inputs))) * case.row_bytes
