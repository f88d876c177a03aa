"""The sdist is complete, the wheel made from it works elsewhere, and nobody's `triton_kernels` is hidden by ours."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SITE_PACKAGES = sysconfig.get_path("purelib")
pytest.importorskip("pybind11", reason="building needs pybind11")
pytest.importorskip("ninja", reason="building needs ninja")
nobodys = pytest.mark.skipif(
    Path(SITE_PACKAGES, "triton_kernels").exists(),
    reason="OpenAI's triton_kernels is installed here, so nothing shows what is found without it",
)

USE_IT = """
import torch, specdec_ops
from pathlib import Path
assert Path(specdec_ops.__file__).is_relative_to({folder!r}), specdec_ops.__file__
tree = specdec_ops.Tree.from_branching((2, 2))
q, k, v = torch.randn(1, len(tree), 4, 64), torch.randn(1, 40, 2, 64), torch.randn(1, 40, 2, 64)
lens = torch.tensor([30], dtype=torch.int32)
got, want = (specdec_ops.tree_attention(q, k, v, tree.to(), lens, backend=backend) for backend in ("cpu", "torch"))
assert torch.allclose(got, want, atol=1e-5)
"""
WHOSE_TRITON_KERNELS = """
import importlib.util
assert importlib.util.find_spec("triton_kernels").loader is not None, "a regular package, not a namespace"
assert importlib.util.find_spec("triton_kernels.matmul").origin.startswith({folder!r})
assert importlib.util.find_spec("triton_kernels.tree_attention") is None, "that one is ours"
import triton_kernels.matmul
assert triton_kernels.WHOSE == triton_kernels.matmul.WHOSE == "theirs", triton_kernels
import specdec_ops
for op in ("topology.build_topology", "attention.merge_states", "attention.tree_attention"):
    origin = importlib.util.find_spec("specdec_ops.triton_kernels." + op).origin
    assert origin.endswith("triton_kernels/" + op.replace(".", "/") + ".py"), origin
"""
NO_TRITON_KERNELS = """
import importlib, importlib.util, specdec_ops
assert importlib.util.find_spec("triton_kernels") is None
for look_up in (importlib.util.find_spec, importlib.import_module):
    try:
        look_up("triton_kernels.matmul")
    except ModuleNotFoundError as error:
        assert error.name == "triton_kernels", error
    else:
        raise AssertionError("found")
assert importlib.util.find_spec("specdec_ops.triton_kernels.attention.tree_attention") is not None
"""


def run(*command, cwd, **environment):
    done = subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, **environment},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def backend_hook(call, cwd, **environment):
    """Call setuptools as pip does, in a process where torch can't be imported. Return what it prints."""
    code = f"import sys; sys.modules['torch'] = None; from setuptools import build_meta; build_meta.{call}"
    return run(sys.executable, "-c", code, cwd=cwd, SPECDEC_OPS_BUILD="cpu", **environment)


def run_without_site(code, cwd, *folders, **environment):
    """Run a program that finds `folders` (their .pth files included), then this environment's packages, and no others.

    The .pth files of this environment are left out: one of them may install this checkout's package.
    """
    paths = f"import sys, site; [site.addsitedir(folder) for folder in {[str(folder) for folder in folders]!r}]"
    code = f"{paths}; sys.path.append({SITE_PACKAGES!r})\n{code}"
    return run(sys.executable, "-S", "-c", code, cwd=cwd, **environment)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The sdist, unpacked, with the checkout's object files beside it, so that only what differs is compiled."""
    folder = tmp_path_factory.mktemp("sdist")
    backend_hook(f"build_sdist({str(folder)!r})", ROOT)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    unpacked = folder / archive.name.removesuffix(".tar.gz")
    if (ROOT / "build").is_dir():
        others = shutil.ignore_patterns("lib*", "bdist*", "emulator", "triton")
        shutil.copytree(ROOT / "build", unpacked / "build", ignore=others)
    return unpacked


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    printed = backend_hook(f"build_wheel({str(folder)!r})", source)
    assert re.search(
        r"specdec_ops: built CPU kernels \(generic.*; no CUDA kernels \(SPECDEC_OPS_BUILD was cpu;", printed
    )
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A folder with the package as pip installs it."""
    folder = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


@pytest.fixture(scope="module")
def editable(source, wheel, tmp_path_factory):
    """A folder with what pip puts into site-packages for an editable install of `source`."""
    wheels, folder = tmp_path_factory.mktemp("editable_wheel"), tmp_path_factory.mktemp("editable")
    printed = backend_hook(f"build_editable({str(wheels)!r})", source)
    assert "ninja: no work to do" in printed, "everything was compiled for the wheel already"
    (path,) = wheels.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        archive.extractall(folder)
    return folder


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """A folder with somebody else's package triton_kernels."""
    folder = tmp_path_factory.mktemp("theirs")
    (folder / "triton_kernels").mkdir()
    for name in ("__init__.py", "matmul.py"):
        (folder / "triton_kernels" / name).write_text('WHOSE = "theirs"\n')
    return folder


def test_sdist_is_complete(source):
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("this is no git checkout, so nothing tells which files belong to it")
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT).splitlines()
    missing = [path for path in listed if (ROOT / path).is_file() and not (source / path).is_file()]
    assert not missing, "MANIFEST.in leaves these out"


def test_wheel_is_complete(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {str(path.relative_to(ROOT)) for path in (ROOT / "specdec_ops").rglob("*.py")}
    expected |= {f"specdec_ops/{path.relative_to(ROOT)}" for path in (ROOT / "triton_kernels").rglob("*.py")}
    expected |= {"specdec_ops/py.typed", "specdec_ops/_C.pyi"}  # what type checkers look for
    assert not expected - names, "missing from the wheel"
    others = {name for name in names - expected if ".dist-info/" not in name}
    assert len(others) == 1 and re.fullmatch(r"specdec_ops/_C\..*\.so", others.pop()), "more than one compiled module"
    assert any(name.endswith("LICENSE") for name in names)


def test_metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        text = archive.read(name).decode()
    required = [
        line.removeprefix("Requires-Dist: ") for line in text.splitlines() if line.startswith("Requires-Dist: ")
    ]
    assert [line for line in required if "extra" not in line] == ["torch>=2.6", "numpy"]
    assert "Version: 0.1.0" in text and "License-Expression: Apache-2.0" in text and "Requires-Python: >=3.10" in text


def test_compiled_module_needs_no_framework(installed):
    (module,) = (installed / "specdec_ops").glob("_C.*.so")
    needed = re.findall(r"NEEDED\s+(\S+)", run("objdump", "-p", str(module), cwd=ROOT))
    assert "libgomp.so.1" in needed, "the soname of the OpenMP runtime that torch brings"
    assert not [name for name in needed if re.match(r"lib(torch|c10|cuda|cudart|python)", name)], needed
    defined = run("nm", "--dynamic", "--defined-only", str(module), cwd=ROOT)
    assert re.findall(r" T (\S+)", defined) == ["PyInit__C"]


def test_wheel_works_elsewhere(installed, tmp_path):
    run_without_site(USE_IT.format(folder=str(installed)), tmp_path, installed)
    main = "from specdec_ops.__main__ import main; sys.exit(main())"
    report = run_without_site(main, tmp_path, installed, TRITON_INTERPRET="0")  # test_import.py has it with Triton
    assert "every self-check passed" in report and "no CUDA kernels" in report


def test_editable_install_works(editable, source, tmp_path):
    run_without_site(USE_IT.format(folder=str(source)), tmp_path, editable)


@pytest.mark.parametrize("where", ["the checkout", "elsewhere"])
@pytest.mark.parametrize("install", ["installed", "editable"])
def test_triton_kernels_is_theirs(install, where, theirs, tmp_path, request):
    """Also from the root of a checkout, where a folder of that name lies in the current directory."""
    folder = request.getfixturevalue(install)
    code = WHOSE_TRITON_KERNELS.format(folder=str(theirs))
    run_without_site(code, ROOT if where == "the checkout" else tmp_path, folder, theirs)


@nobodys
@pytest.mark.parametrize("install", ["installed", "editable"])
def test_no_triton_kernels_where_nobody_installed_one(install, tmp_path, request):
    """Neither the package nor a submodule, and the error names the package that is missing."""
    run_without_site(NO_TRITON_KERNELS, tmp_path, request.getfixturevalue(install))


@nobodys
@pytest.mark.parametrize("way", ["current folder", "PYTHONPATH", "safe path"])
def test_a_checkout_on_the_path_is_a_namespace(way, installed, tmp_path):
    """What the README warns of: Python takes any folder of that name for a package (PEP 420); and the way around it."""
    if way == "safe path":
        if sys.version_info < (3, 11):
            pytest.skip("Python has PYTHONSAFEPATH from 3.11 on")
        run_without_site(NO_TRITON_KERNELS, ROOT, installed, PYTHONSAFEPATH="1", PYTHONPATH="")
        return
    found = f"""
import importlib.util
spec = importlib.util.find_spec("triton_kernels")
assert spec.loader is None or type(spec.loader).__name__ == "NamespaceLoader", spec
assert {str(ROOT / "triton_kernels")!r} in spec.submodule_search_locations
assert importlib.util.find_spec("triton_kernels.matmul") is None
"""
    if way == "PYTHONPATH":
        run_without_site(found, tmp_path, installed, PYTHONPATH=str(ROOT))
    else:
        run_without_site(found, ROOT, installed, PYTHONPATH="")


def test_only_what_changed_is_compiled(source, editable):
    file = source / "csrc" / "topology" / "cpu" / "build_topology.cpp"
    file.write_text(file.read_text() + "\n// changed\n")
    build = (sys.executable, "setup.py", "build_ext", "--inplace")
    assert compiled(run(*build, cwd=source, SPECDEC_OPS_BUILD="cpu")) == ["csrc/topology/cpu/build_topology.cpp"]
    assert compiled(run(*build, cwd=source, SPECDEC_OPS_BUILD="cpu")) == []


def compiled(printed):
    return re.findall(r"^\[\d+/\d+\] cxx build/[^/]+/(\S+)\.o$", printed, re.MULTILINE)
