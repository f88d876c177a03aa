"""What an acceptance walk asks of a kernel is checked when the kernel is compiled."""

import re
import subprocess

import pytest

from tests.emulator import build

pytestmark = pytest.mark.skipif(build.why_not() is not None, reason=str(build.why_not()))

HEADER = (build.ROOT / "csrc" / "acceptance" / "walk_rows.h").read_text()
DECLARED = re.search(r"struct WalkRows \{\n(.*?)\n\};", HEADER, re.DOTALL)[1]
DECLARED = re.sub(r",\n +", ", ", DECLARED)  # a declaration a line
METHODS = re.findall(r"^  (?:static )?\w+ (\w+)\(.*\);", DECLARED, re.MULTILINE)


def compiler_says(methods):
    """What the compiler prints about rows with these methods; nothing if it takes them."""
    code = '#include "acceptance/walk_rows.h"\n'
    code += f"namespace specdec {{\nstruct Rows {{\n{methods}\n}};\nstatic_assert(WalkRowsCheck<Rows>::kHolds);\n}}"
    command = [*build.compiler(), "-std=c++17", f"-I{build.ROOT}/csrc", "-x", "c++", "-fsyntax-only", "-"]
    return subprocess.run(command, input=code, capture_output=True, text=True).stderr


def test_rows_as_declared_are_taken():
    assert len(METHODS) == 21
    assert compiler_says(DECLARED) == ""
    assert compiler_says(DECLARED.replace("bool leader();", "bool leader() const;")) == ""


@pytest.mark.parametrize("method", METHODS)
def test_a_missing_method_is_an_error(method):
    rest = re.sub(rf"^  (?:static )?\w+ {method}\(.*\n?", "", DECLARED, flags=re.MULTILINE)
    assert re.search(rf"\b{method}\b", compiler_says(rest))


@pytest.mark.parametrize("method", METHODS)
def test_a_method_with_another_type_is_an_error(method):
    other = re.sub(rf"^  (static )?\w+ {method}\(", rf"  \1long {method}(", DECLARED, flags=re.MULTILINE)
    assert f"the method {method} differs" in compiler_says(other)
