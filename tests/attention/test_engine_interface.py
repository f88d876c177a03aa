"""What the CPU attention kernel asks of an engine is checked when the engine is compiled."""

import re
import subprocess

import pytest

from tests.emulator import build

pytestmark = pytest.mark.skipif(build.why_not() is not None, reason=str(build.why_not()))

HEADER = (build.ROOT / "csrc" / "attention" / "cpu" / "engine.h").read_text()
OUTPUT = re.search(r"struct OutputInterface \{\n(.*?)\n\};", HEADER, re.DOTALL)[1]
ENGINE = re.search(r"struct EngineInterface \{\n(.*?)\n\};", HEADER, re.DOTALL)[1]
CONSTANTS = re.findall(r"^  static const \w+ (\w+);", ENGINE, re.MULTILINE)
FUNCTIONS = re.findall(r"^  static \w+ (\w+)\(", ENGINE, re.MULTILINE)
OF_OUTPUT = re.findall(r"^  static \w+ (\w+)\(", OUTPUT, re.MULTILINE)


def compiler_says(members):
    """What the compiler prints about an engine with these members in place of its own."""
    code = (
        '#define SPECDEC_ISA generic\n#include "attention/cpu/engine_few_rows.h"\nnamespace specdec::cpu::generic {\n'
    )
    code += "using Sound = FewRowsEngine<Float32, 4>;\n"
    for index, member in enumerate(members):
        code += f"struct Engine{index} : Sound {{\n{member}\n}};\n"
        code += f"static_assert(EngineCheck<Engine{index}>::kHolds);\n"
    command = [*build.compiler(), "-std=c++17", "-w", f"-I{build.ROOT}/csrc", "-x", "c++", "-fsyntax-only", "-"]
    return subprocess.run(command, input=f"{code}}}", capture_output=True, text=True).stderr


def test_an_engine_as_declared_is_taken():
    assert (len(CONSTANTS), len(FUNCTIONS), len(OF_OUTPUT)) == (7, 11, 5)
    assert compiler_says([""]) == ""


def test_members_with_other_types_are_errors():
    values = {"kTile": 64, "kSpan": 64, "kStep": 4}
    members = [f"static constexpr long {name} = {values.get(name, 1)};" for name in CONSTANTS]
    for name in FUNCTIONS:
        template = "template <int> " if name in ("scores", "weigh", "accumulate") else ""
        members.append(f"{template}static long {name}(char);")
    text = compiler_says(members)
    for name in (*CONSTANTS, *FUNCTIONS):
        assert re.search(rf"\b{name} differs from what is declared", text), name


def test_outputs_with_other_types_are_errors():
    members = []
    for name in OF_OUTPUT:
        template = "template <int> " if name == "scale" else ""
        members.append(f"struct Output : Sound::Output {{ {template}static long {name}(char); }};")
    text = compiler_says(members)
    for name in OF_OUTPUT:
        assert re.search(rf"output's function {name} differs from what is declared", text), name


@pytest.mark.parametrize(
    "member",
    ["static constexpr int kTile = 60;", "static constexpr int kSpan = 48;", "static constexpr int kMaxVecs = 3;"],
)
def test_constants_that_do_not_fit_are_errors(member):
    assert "static assertion failed" in compiler_says([member])
