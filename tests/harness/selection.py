"""Which tests run, and which of them first.

Triton's interpreter takes seconds where a kernel takes microseconds, the emulator of CUDA a tenth of that. So a module
may set INTERPRETED_SHARE = n and EMULATED_SHARE = n: about every n-th of its interpreted or emulated cases runs, unless
SPECDEC_OPS_ALL_TESTS is 1. They are chosen by what they cover: at least one case of each test; every value of a
parameter that tests share, such as a rule or a dtype; and as many pairs of values as there is room for.
"""

import os
from collections import Counter
from fnmatch import fnmatch
from itertools import combinations
from pathlib import Path

from tests.emulator import build, kernels

# Of a worker's files the longest come first, so that no other worker waits for it at the end.
LONGEST_FIRST = (
    "test_triton_aot",
    "test_add_an_op",
    "test_exit_confidence_cuda",
    "test_bounded_exit_cuda",
    "test_accept",
    "test_packaging",
    "test_screened_exit",
    "test_bounded_exit",
    "test_tree_attention_mutants",
    "test_tree_attention_cuda",
    "test_cuda_build",
    "test_bounded_exit_triton",
    "test_accept_cuda",
    "test_exit_mlp_cuda",
    "test_accept_pitfalls",
    "test_exit_confidence_triton",
)
# Compilers, sanitizers, statistics and programs: not for `make quick`.
LEFT_OUT_IF_QUICK = (
    "*_aot", "*_cuda", "*_triton", "*_triton_*", "*_mutants", "*_statistics", "*_properties", "*_enumeration",
    "test_accept_pitfalls_inputs", "test_add_an_op", "test_benchmarks*", "test_build_options", "test_compat_trees",
    "test_cuda_build", "test_dlpack", "test_emulator", "test_examples*", "test_gpu*", "test_import", "test_library",
    "test_accept_library", "test_hostile_settings", "test_packaging", "test_racing_writers", "test_random_calls",
    "test_remote_fuzz",
)  # fmt: skip


def target_of(item):
    """The implementation that a test is parametrised with, or None."""
    return item.callspec.params.get("target") if hasattr(item, "callspec") else None


def slow_kind(item):
    """INTERPRETED, EMULATED or None."""
    target = target_of(item)
    if target is None:
        return None
    return "INTERPRETED" if target.interpreted else "EMULATED" if target.backend == kernels.BACKEND else None


def kept(items, quick=False):
    """The tests that run, in the order given."""
    if quick:
        return quick_ones(items)
    if os.environ.get("SPECDEC_OPS_ALL_TESTS") == "1":
        return items
    shared = {}
    for item in items:
        if (kind := slow_kind(item)) and (share := getattr(item.module, f"{kind}_SHARE", 1)) > 1:
            shared.setdefault((item.module.__name__, kind, share), []).append(item)
    left_out = {id(item) for cases in shared.values() for item in cases}
    for (_, _, share), cases in shared.items():
        described = [(case.originalname, values_of(case)) for case in cases]
        left_out -= {id(cases[index]) for index in chosen(described, share)}
    return [item for item in items if id(item) not in left_out]


def values_of(item):
    """{(parameter, value)} of a test, without its target."""
    return {(name, str(value)) for name, value in item.callspec.params.items() if name != "target"}


def chosen(cases, share):
    """The indices of some of the cases [(test, {(parameter, value)})]: see the head of this file."""
    tests_with = Counter(name for test, name in {(test, name) for test, values in cases for name, _ in values})
    missing = {value for _, values in cases for value in values if tests_with[value[0]] > 1}
    covered, picked = set(), []

    def pick(among):
        """Whichever adds most, values before pairs; the first of several."""
        best = max(among, key=lambda i: (len(cases[i][1] & missing), len(pairs_of(*cases[i]) - covered), -i))
        picked.append(best)
        missing.difference_update(cases[best][1])
        covered.update(pairs_of(*cases[best]))

    by_test = {}
    for index, (test, _) in enumerate(cases):
        by_test.setdefault(test, []).append(index)
    for indices in by_test.values():
        for _ in range(-(-len(indices) // share)):
            pick([index for index in indices if index not in picked])
    while missing:
        pick([index for index, (_, values) in enumerate(cases) if index not in picked and values & missing])
    return sorted(picked)


def pairs_of(test, values):
    return set(combinations(sorted({("test", test), *values}), 2))


def quick_ones(items):
    """Every op on the backends cpu and torch, and one interpreted and one emulated case of each module."""
    seen, ones = set(), []
    for item in items:
        name = Path(item.path).stem
        if any(fnmatch(name, pattern) for pattern in LEFT_OUT_IF_QUICK):
            continue
        if kind := slow_kind(item):
            op = getattr(item.module, "OP", "tree_attention")
            compiled = kind == "INTERPRETED" or (build.ROOT / build.OUTPUT / f"{op}.so").exists()
            if not compiled or (name, kind) in seen:
                continue
            seen.add((name, kind))
        ones.append(item)
    return ones


def ordered(items):
    """The files that take longest first, all others as they came."""
    place = {name: index for index, name in enumerate(LONGEST_FIRST)}
    return sorted(items, key=lambda item: place.get(Path(item.path).stem, len(place)))
