"""The bits of a status have one meaning in Python, in C++ and in Triton."""

import ast
import re
from pathlib import Path

import pytest
import torch

import specdec_ops
from specdec_ops import AcceptStatus, ExitStatus, GrowStatus, TopologyStatus

ROOT = Path(__file__).parents[2]
HEADERS = {
    AcceptStatus: "csrc/acceptance/params.h",
    ExitStatus: "csrc/early_exit/params.h",
    GrowStatus: "csrc/topology/params.h",
    TopologyStatus: "csrc/topology/params.h",
}
# The constants of the Triton kernels by the file that has them: what bit each of them is.
TRITON = {
    "common/token_rows.py": {
        "TARGET_INVALID": AcceptStatus.TARGET_INVALID,
        "DRAFT_INVALID": AcceptStatus.DRAFT_INVALID,
        "SETTING_INVALID": AcceptStatus.SETTING_INVALID,
    },
    "acceptance/accept_state.py": {
        "TOKEN_IMPOSSIBLE": AcceptStatus.DRAFT_TOKEN_IMPOSSIBLE,
        "RESIDUAL_EMPTY": AcceptStatus.RESIDUAL_EMPTY,
        "TREE_INVALID": AcceptStatus.TREE_INVALID,
    },
    "early_exit/exit_kernels.py": {"INVALID": ExitStatus.INVALID, "SETTING_INVALID": ExitStatus.SETTING_INVALID},
    "early_exit/screen_kernels.py": {"FELL_BACK": ExitStatus.FELL_BACK},
    "topology/build_topology.py": {
        "OUT_OF_RANGE": TopologyStatus.PARENT_OUT_OF_RANGE,
        "NOT_BEFORE": TopologyStatus.PARENT_NOT_BEFORE,
        "BAD_COUNT": TopologyStatus.NUM_NODES_OUT_OF_RANGE,
    },
    "topology/grow_tree.py": {
        "LOGPROB_INVALID": GrowStatus.LOGPROB_INVALID,
        "TOKEN_OUT_OF_RANGE": GrowStatus.TOKEN_OUT_OF_RANGE,
    },
}


def enumerators(text, name):
    """NAME -> value of a C++ enumeration, its kNames as Python writes them."""
    body = re.search(rf"enum {name} : int32_t {{(.*?)}};", re.sub(r"//.*", "", text), re.DOTALL)[1]
    pairs = re.findall(r"k(\w+) = (\d+)", body)
    words = {re.sub(r"(?<=[a-z])(?=[A-Z])", "_", word).upper(): int(value) for word, value in pairs}
    return {word.removeprefix("EXIT_"): value for word, value in words.items()}


def constants(path):
    """NAME -> value of a file's `NAME = tl.constexpr(number)`."""
    found = re.findall(r"^(\w+) = tl\.constexpr\((\d+)\)", path.read_text(), re.MULTILINE)
    return {name: int(value) for name, value in found}


@pytest.mark.parametrize("flags", HEADERS, ids=lambda flags: flags.__name__)
def test_cpp_has_the_same_bits(flags):
    """All of them, and no other."""
    found = enumerators((ROOT / HEADERS[flags]).read_text(), flags.__name__)
    assert found == {flag.name: flag.value for flag in flags}


@pytest.mark.parametrize("name", TRITON)
def test_triton_has_the_same_bits(name):
    """Constants of kernels must be numbers: here is what they are."""
    found = constants(ROOT / "triton_kernels" / name)
    assert {constant: found[constant] for constant in TRITON[name]} == TRITON[name]


def bits_in(node):
    """What an expression may add to a status, as numbers and names."""
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "tl.where":
        return [bit for part in node.args[1:] for bit in bits_in(part)]
    if isinstance(node, ast.BinOp | ast.IfExp):
        sides = (node.left, node.right) if isinstance(node, ast.BinOp) else (node.body, node.orelse)
        return [bit for side in sides for bit in bits_in(side)]
    return [ast.unparse(node)] if isinstance(node, ast.Constant | ast.Name) else []


def test_no_kernel_of_triton_has_a_bit_of_its_own():
    """Whatever is stored into a status, or added to one, has a name that the table above knows."""
    known = {constant for names in TRITON.values() for constant in names}
    seen = set()
    for path in (ROOT / "triton_kernels").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            written = []
            if isinstance(node, ast.AugAssign) and getattr(node.target, "id", "") in ("bits", "status", "unsound"):
                written = bits_in(node.value)
            elif isinstance(node, ast.Call) and ast.unparse(node.func) == "tl.store" and "status" in ast.unparse(node):
                written = bits_in(node.args[1])
            for bit in written:
                assert bit in known or bit.islower() or bit == "0", f"{path.name}: {ast.unparse(node)}"
            seen |= known.intersection(written)
    assert seen >= {"TREE_INVALID", "TOKEN_IMPOSSIBLE", "DRAFT_INVALID", "OUT_OF_RANGE", "FELL_BACK"}


def test_python_has_no_second_definition():
    """The definitions of the ops take the bits from the enumerations."""
    for path in (ROOT / "specdec_ops").rglob("*.py"):
        if path.name == "status.py":
            continue
        for flags in HEADERS:
            for flag in flags:
                assert not re.search(rf"\b{flag.name} = \d", path.read_text()), f"{path}: {flag.name}"


def test_bits_and_integers_mix():
    """As people use them: on the host with a number, and on the device with a tensor."""
    assert AcceptStatus(0) == 0
    assert not AcceptStatus(0)
    assert str(AcceptStatus(3).name) == "TARGET_INVALID|DRAFT_INVALID"
    status = torch.tensor([0, 5, 32], dtype=torch.int32)
    assert (status & AcceptStatus.TARGET_INVALID).dtype == torch.int32
    assert (status & (AcceptStatus.TARGET_INVALID | AcceptStatus.SETTING_INVALID) != 0).tolist() == [False, True, True]
    grown = {specdec_ops.GrowStatus, specdec_ops.TopologyStatus}
    assert {specdec_ops.AcceptStatus, specdec_ops.ExitStatus, *grown} == set(HEADERS)
