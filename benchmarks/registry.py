"""Every op by name: how to make its inputs, its exact result and its contestants; and the cells of each preset."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

from .acceptance import accept
from .acceptance import cases as acceptance_cases
from .acceptance import inputs as acceptance_inputs
from .attention import cases as attention_cases
from .attention import inputs as attention_inputs
from .attention import merge_states, tree_attention
from .early_exit import bounded_exit, exit_confidence, exit_mlp, screened_exit
from .early_exit import cases as exit_cases
from .early_exit import inputs as exit_inputs
from .harness.cases import Case
from .kv import append_cases, gather_layer_kv, kv_append, kv_commit, kv_propagate
from .kv import cases as kv_cases
from .linear import cases as linear_cases
from .linear import linear, rms_norm
from .topology import build_topology, grow_tree, prune_tree
from .topology import cases as topology_cases


class Op(NamedTuple):
    """make_inputs(case, device), expected(inputs) -> Expected, contestants(inputs, options) -> list of Contestant."""

    make_inputs: Callable
    expected: Callable
    contestants: Callable


def op(module, inputs=None) -> Op:
    """The op that a module measures. `inputs` has make_inputs where several ops share it."""
    return Op((inputs or module).make_inputs, module.expected, module.contestants)


OPS = {
    "build_topology": op(build_topology),
    "grow_tree": op(grow_tree),
    "prune_tree": op(prune_tree),
    "tree_attention": op(tree_attention, attention_inputs),
    "merge_states": op(merge_states),
    "exit_confidence": op(exit_confidence, exit_inputs),
    "screened_exit": op(screened_exit, exit_inputs),
    "bounded_exit": op(bounded_exit, exit_inputs),
    "exit_mlp": op(exit_mlp),
    "gather_layer_kv": op(gather_layer_kv),
    "kv_append": op(kv_append),
    "kv_commit": op(kv_commit),
    "kv_propagate": op(kv_propagate),
    "linear": op(linear),
    "rms_norm": op(rms_norm),
    **dict.fromkeys(acceptance_cases.OPS, op(accept, acceptance_inputs)),
}
FAMILIES = (
    attention_cases,
    topology_cases,
    exit_cases,
    append_cases,
    kv_cases,
    linear_cases,
    acceptance_cases,
)  # in the order of a run


def every_family(preset: str) -> list[Case]:
    """The cases of all ops: attention first, but last where FlexAttention is compiled, in what time is left."""
    cases = [case for family in FAMILIES for case in family.PRESETS[preset]()]
    late = [case for case in cases if case.flex and preset == "quick"]
    return [*(case for case in cases if case not in late), *late]


PRESETS = {preset: functools.partial(every_family, preset) for preset in attention_cases.PRESETS}
