"""The documents name what there is: every public name is on one reference page, every path of the repository exists."""

import importlib
import re
from pathlib import Path

import pytest

import specdec_ops
from tests.harness.public_names import PUBLIC
from tests.harness.walk_through import without_places

ROOT = next(folder for folder in Path(__file__).parents if (folder / "pyproject.toml").is_file())
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "csrc").rglob("*.md"))]
PAGES = sorted((ROOT / "docs" / "reference").glob("*.md"))
FOLDERS = ("benchmarks", "csrc", "docs", "examples", "specdec_ops", "tests", "triton_kernels")


def names_on(page):
    """What mkdocstrings puts on a page, without the package's name."""
    return re.findall(r"^::: specdec_ops\.([\w.]+)$", page.read_text(), re.MULTILINE)


def paths_in(text):
    """Words between backticks that begin with a folder of this repository.

    Fenced blocks are left out, and the lines that say where they go, which test_add_an_op.py follows.
    """
    prose = re.sub(r"^```.*\n(?:.*\n)*?```$", "", without_places(text), flags=re.MULTILINE)
    words = (word for code in re.findall(r"`([^`\n]+)`", prose) for word in code.split())
    return [word for word in words if re.fullmatch(rf"(?:{'|'.join(FOLDERS)})/[\w./-]*", word)]


def missing(text):
    """Those that don't exist, or are no folder although they end with a slash."""
    found = [(path, ROOT / path) for path in paths_in(text)]
    return [path for path, place in found if not (place.is_dir() if path.endswith("/") else place.exists())]


def test_every_public_name_is_on_one_reference_page():
    found = [name for page in PAGES for name in names_on(page)]
    assert sorted(set(found)) == sorted(found), "twice"
    assert set(PUBLIC) <= set(found)


def test_what_a_reference_page_names_exists():
    for page in PAGES:
        for name in names_on(page):
            first, *rest = name.split(".")
            own = first in (*PUBLIC, "__version__")
            thing = specdec_ops if own else importlib.import_module(f"specdec_ops.{first}")
            for part in (first, *rest) if thing is specdec_ops else rest:
                is_module = not hasattr(thing, part)
                thing = importlib.import_module(f"{thing.__name__}.{part}") if is_module else getattr(thing, part)


def test_the_index_of_the_reference_names_what_its_pages_do():
    index = (ROOT / "docs" / "reference" / "index.md").read_text()
    rows = dict(re.findall(r"^\| \[[^]]+\]\((\w+\.md)\) \| (.*) \|$", index, re.MULTILINE))
    assert set(rows) == {page.name for page in PAGES} - {"index.md"}
    for page in PAGES:
        for name in names_on(page):
            last = name.rpartition(".")[2]
            assert re.search(rf"`(specdec_ops\.)?(\w+\.)*{last}`", rows[page.name]), (page.name, name)


@pytest.mark.parametrize("path", DOCUMENTS, ids=[str(path.relative_to(ROOT)) for path in DOCUMENTS])
def test_paths_exist(path):
    assert not missing(path.read_text())


def test_a_wrong_path_is_found():
    text = "`csrc/nowhere/cpu/`, `specdec_ops/tree.py`, `specdec_ops/tree.py/`, `pytest tests/nowhere`, `other/folder/`"
    assert paths_in(text) == ["csrc/nowhere/cpu/", "specdec_ops/tree.py", "specdec_ops/tree.py/", "tests/nowhere"]
    assert missing(text) == ["csrc/nowhere/cpu/", "specdec_ops/tree.py/", "tests/nowhere"]


def test_the_source_map_has_every_path_of_the_other_pages():
    known = {path.rstrip("/") for path in paths_in((ROOT / "docs" / "source_map.md").read_text())}
    for page in (ROOT / "docs").rglob("*.md"):
        assert {path.rstrip("/") for path in paths_in(page.read_text())} <= known, page.name


FAMILIES = ("topology", "attention", "acceptance", "early_exit", "kv", "linear")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_readme_of_a_family_names_its_files(family):
    """Every file of its own folder but instantiations, launchers and the lists of entry points; every Triton file."""
    folder, text = ROOT / "csrc" / family, (ROOT / "csrc" / family / "README.md").read_text()
    named = {path.name for path in folder.rglob("*") if path.suffix in (".h", ".cuh", ".cpp")}
    named -= {"entry_points.h", "launchers.h", "mlp_launch.h", "exit_launch.h", "exit_mlp.h"}
    named -= {path.name for path in (folder / "cpu" / "isa").glob("*")}
    named -= {f"{Path(name).stem}.cpp" for name in named if name.endswith(".h")}
    named |= (
        {path.name for path in (ROOT / "triton_kernels" / family).glob("*.py")} if family != "early_exit" else set()
    )
    assert not [name for name in sorted(named) if name not in text]
    for path in re.findall(r"`((?:cpu|cuda)/[\w/.]*)`", text):
        assert (folder / path).exists(), path
