"""Numbers that Python, C++ and Triton each must know are the same in all of them."""

import importlib
import re
from pathlib import Path

import pytest

from specdec_ops._core import dispatch

ROOT = Path(__file__).parents[2]

# Where C++ has a limit, and where Python has it.
LIMITS = {
    ("common/types.h", "kMaxEos"): ("specdec_ops._core.checks", "MAX_EOS"),
    ("early_exit/params.h", "kMaxTopK"): ("specdec_ops.ops.early_exit.exit_confidence", "MAX_TOP_K"),
    ("early_exit/params.h", "kMaxParts"): ("specdec_ops.ops.early_exit.head_bounds", "MAX_PARTS"),
    ("early_exit/params.h", "kMaxLayers"): ("specdec_ops.ops.early_exit.exit_mlp", "_MAX_LAYERS"),
    ("kv/params.h", "kMaxKvLayers"): ("specdec_ops.ops.kv.contract", "MAX_LAYERS"),
    ("topology/params.h", "kMaxGrowWidth"): ("specdec_ops.ops.topology.candidate_pool", "MAX_WIDTH"),
    ("topology/cuda/build_topology.cuh", "kBuildTopologyMaxNodes"): (
        "specdec_ops.ops.topology.prune_tree",
        "MAX_PRUNED_NODES",
    ),
}


def constant(header, name):
    """The value of `constexpr int32_t kA = 1, kB = 1 << 20;`, one of its names."""
    value = re.search(rf"\b{name} = ([\d <]+)[,;]", (ROOT / "csrc" / header).read_text())[1]
    first, *shift = map(int, value.split("<<"))
    return first << sum(shift)


@pytest.mark.parametrize(("header", "name"), LIMITS)
def test_limits(header, name):
    module, own = LIMITS[header, name]
    assert getattr(importlib.import_module(module), own) == constant(header, name)


def test_the_largest_vocabularies():
    header = "acceptance/cuda/launchers.h"
    expected = {"accept": constant(header, "kAcceptMaxVocab"), "sample": constant(header, "kSampleMaxVocab")}
    assert expected == dispatch._MAX_CUDA_VOCAB


def enum_of(header, name):
    """{Name: number} of a C++ enumeration."""
    text = re.sub(r"//.*", "", (ROOT / "csrc" / header).read_text())
    body = re.search(rf"enum class {name} : int32_t \{{(.*?)\}};", text, re.DOTALL)[1]
    return {key: int(value) for key, value in re.findall(r"k(\w+) = (\d+)", body)}


@pytest.mark.parametrize(
    ("header", "name"),
    [
        ("acceptance/params.h", "AcceptRule"),
        ("acceptance/params.h", "SampleDomain"),
        ("early_exit/params.h", "ExitMeasure"),
        ("early_exit/params.h", "ExitLevel"),
    ],
)
def test_names_of_an_enumeration_are_in_its_order(header, name):
    """What the contracts call its values: bindings/contract.h."""
    text = (ROOT / "csrc/bindings/contract.h").read_text()
    names = re.findall(r'"(\w*)"', re.search(rf"EnumNames<{name}> \{{(.*?)\}};", text, re.DOTALL)[1])
    values = enum_of(header, name)
    assert sorted(values.values()) == list(range(len(names)))
    for key, value in values.items():
        words = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", key).lower()
        assert names[value] in (words, words.partition("_")[0], "" if words == "none" else words), (key, names[value])


def test_triton_numbers_the_rules_alike():
    pytest.importorskip("triton")
    from specdec_ops.triton_kernels.acceptance import accept, accept_state

    for key, value in enum_of("acceptance/params.h", "AcceptRule").items():
        name = "LONGEST" if key == "LongestPath" else re.sub(r"(?<=[a-z])(?=[A-Z])", "_", key).upper()
        assert getattr(accept_state, name).value == value
        assert accept.RULES[value] == name.lower()
