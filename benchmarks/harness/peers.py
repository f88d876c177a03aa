"""The registry: for each op, how to make its inputs, its exact result and its contestants."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from benchmarks import draft_ops, small_ops
from benchmarks.acceptance import accept as acceptance
from benchmarks.acceptance.cases import CHAIN_RULES, FILTERED, TREE_RULES
from benchmarks.attention import tree_attention as attention
from benchmarks.early_exit import exit_confidence as exit


class Op(NamedTuple):
    """make_inputs(case, device), expected(inputs) -> Expected, contestants(inputs, options) -> list of Contestant."""

    make_inputs: Callable
    expected: Callable
    contestants: Callable


OPS = {
    "tree_attention": Op(attention.make_inputs, attention.expected, attention.contestants),
    "merge_states": Op(small_ops.make_states, small_ops.expected_states, small_ops.merge_contestants),
    "build_topology": Op(small_ops.make_parents, small_ops.expected_topology, small_ops.topology_contestants),
}
OPS |= dict.fromkeys(("exit_confidence", "screened_exit"), Op(exit.make_inputs, exit.expected, exit.contestants))
OPS["bounded_exit"] = Op(exit.make_inputs, exit.expected_exits, exit.exits_contestants)
OPS["kv_propagate"] = Op(draft_ops.make_propagation, draft_ops.expected_propagation, draft_ops.propagators)
OPS["exit_mlp"] = Op(draft_ops.make_decision, draft_ops.expected_decision, draft_ops.deciders)
OPS |= {
    f"accept {rule}{suffix}": Op(acceptance.make_inputs, acceptance.expected, acceptance.contestants)
    for rule in (*CHAIN_RULES, *TREE_RULES)
    for suffix in (("", " top-p") if rule in FILTERED else ("",))
}
