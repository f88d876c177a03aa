"""Constants of mathematics have one definition in C++."""

import re
from pathlib import Path

import pytest

CSRC = Path(__file__).parent.parent.parent / "csrc"
HOME = "common/constants.h"
DIGITS = re.compile(r"\b(?:1\.442695|0\.693147)\d*f?")  # log2(e), ln(2)


def written_out(files):
    """The files that write the constants out, {path: what they write}."""
    found = {path: DIGITS.findall(text) for path, text in files.items()}
    return {path: numbers for path, numbers in found.items() if numbers}


def sources():
    kinds = ("h", "cuh", "cpp", "cu")
    return {str(path.relative_to(CSRC)): path.read_text() for kind in kinds for path in CSRC.rglob(f"*.{kind}")}


def test_the_logarithms_are_written_out_once():
    assert list(written_out(sources())) == [HOME]
    assert len(written_out(sources())[HOME]) == 2


@pytest.mark.parametrize("copy", ["constexpr float kLog2e = 1.44269504f;", "y = x * 0.6931471805599453;"])
def test_a_copy_is_found(copy):
    assert list(written_out({"planted.h": copy})) == ["planted.h"]
