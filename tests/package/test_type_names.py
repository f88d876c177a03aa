"""One qualified C++ type name has one definition.

Every object ends up in one module. Two types of one name in it break the one definition rule: the linker keeps one of
their inline functions for both, and no compiler says so. Kernels of CPUs are in `specdec::cpu`, those of GPUs in
`specdec::cuda`, and what both share in `specdec`.
"""

import re
from collections import defaultdict
from pathlib import Path

import pytest

CSRC = Path(__file__).parent.parent.parent / "csrc"
FILES = sorted(path for kind in ("h", "cuh", "cpp", "cu") for path in CSRC.rglob(f"*.{kind}"))
ISAS = ("generic", "avx2", "avx512", "avx512_vnni", "avx512_bf16", "amx")

NOT_CODE = re.compile(
    r"""//[^\n]* | /\*.*?\*/ | ^[ \t]*\#(?:[^\n]*\\\n)*[^\n]* | "(?:\\.|[^"\\\n])*" | '(?:\\.|[^'\\\n])+'""",
    re.X | re.S | re.M,
)
DIGIT_SEPARATOR = re.compile(r"(?<=\d)'(?=\d)")
NAMESPACE = re.compile(r"\bnamespace\s*([\w:]*)\s*$")
TYPE = re.compile(
    r"\b(?:struct|class|union|enum(?:\s+class)?)\s+(?:alignas\s*\([^{]*?\)\s*)?(\w+)(?:\s+final)?\s*(?::(?!:)[^;{]*)?$"
)


def types_of(text):
    """The qualified names of the types that a file defines, without those local to a function or to the file."""
    code = NOT_CODE.sub(" ", DIGIT_SEPARATOR.sub("", text))
    found, scopes, begin = [], [], 0  # a scope is its name, or None for one whose types are local
    for place in re.finditer("[{};]", code):
        head = code[begin : place.start()].strip()
        begin = place.end()
        if place[0] == "}":
            scopes.pop()
        elif place[0] == "{":
            if match := NAMESPACE.search(head):
                scopes.append(match[1] or None)
            elif match := TYPE.search(head):
                if None not in scopes:
                    found.append("::".join([*scopes, match[1]]))
                scopes.append(match[1])
            else:
                scopes.append(None)
    assert not scopes, "braces don't match: the scan has lost its way"
    return found


def defined_twice(files):
    """{qualified name: the files that define it}, of those that more than one file defines.

    A header with SPECDEC_ISA is compiled for every instruction set, and so has its types in all of their namespaces.
    Within a file a name may come twice: in the branches of an #if.
    """
    places = defaultdict(set)
    for path, text in files.items():
        for name in types_of(text):
            for isa in ISAS if "SPECDEC_ISA" in name else [""]:
                places[name.replace("SPECDEC_ISA", isa)].add(path)
    return {name: sorted(paths) for name, paths in places.items() if len(paths) > 1}


def sources():
    return {str(path.relative_to(CSRC)): path.read_text() for path in FILES}


def test_every_type_has_a_name_of_its_own():
    assert not defined_twice(sources())


def test_the_scan_sees_types():
    names = {name for text in sources().values() for name in types_of(text)}
    assert len(names) > 100
    assert {"specdec::AcceptParams", "specdec::AcceptRule", "specdec::cuda::Bytes16"} <= names
    assert any(name.startswith("specdec::cpu::SPECDEC_ISA::") for name in names)


PLANTED = {
    "a struct": "namespace specdec {\nstruct AcceptParams {\n  int x;\n};\n}",
    "nested namespaces": "namespace specdec { namespace cuda {\nstruct alignas(16) Bytes16 final { int x; }; } }",
    "an enum": "namespace specdec { enum class AcceptRule : int { kOne }; }",
    "a derived class": "namespace specdec { template <class T> class AcceptParams : public Base<T> { }; }",
    "an instruction set": "namespace specdec::cpu::avx2 { class Rows { }; } namespace specdec::cpu::SPECDEC_ISA {}",
}


@pytest.mark.parametrize("planted", PLANTED.values(), ids=PLANTED)
def test_a_second_type_of_a_name_is_found(planted):
    files = {**sources(), "isa.h": "namespace specdec::cpu::SPECDEC_ISA { struct Rows { int x; }; }"}
    assert not defined_twice(files)
    assert ["planted.h" in paths for paths in defined_twice({**files, "planted.h": planted}).values()] == [True]


NO_SECOND_TYPE = {
    "a declaration": "namespace specdec { struct AcceptParams; }",
    "another namespace": "namespace specdec::cpu { struct AcceptParams { }; }",
    "one of the file's own": "namespace specdec { namespace { struct AcceptParams { }; } }",
    "one of a function": "namespace specdec { inline int f() { struct AcceptParams { }; return 0; } }",
    "a variable": "namespace specdec { const AcceptParams none = {}; void f(const struct AcceptParams& p) { } }",
    "a comment": 'namespace specdec { /* struct AcceptParams { */ const char* text = "struct AcceptParams {"; }',
}


@pytest.mark.parametrize("harmless", NO_SECOND_TYPE.values(), ids=NO_SECOND_TYPE)
def test_what_defines_no_type_is_let_be(harmless):
    assert not defined_twice({**sources(), "harmless.h": harmless})
