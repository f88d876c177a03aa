"""The registry: for each op, how to make its inputs, its exact result and its contestants."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from . import attention, small_ops


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
