"""setup.py: what its options mean, and that each wrong one is one sentence."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KNOWN = {"8.0", "9.0", "10.0", "10.3", "12.0"}
OPTIONS = ("SPECDEC_OPS_BUILD", "TORCH_CUDA_ARCH_LIST", "CUDA_HOME", "NVCC_THREADS", "MAX_JOBS", "CXX")


ISAS = {}  # {(compiler, processor): what Build.usable_isas found}: asking a compiler takes half a second


@pytest.fixture
def build(monkeypatch):
    """setup.py as a module, in a clean environment."""
    for name in OPTIONS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(ROOT)
    spec = importlib.util.spec_from_file_location("specdec_ops_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    ask = module.Build.usable_isas

    def ask_once(made):
        key = (tuple(made.cxx), module.platform.machine())
        if key not in ISAS:
            ISAS[key] = ask(made)
        return ISAS[key]

    monkeypatch.setattr(module.Build, "usable_isas", ask_once)
    return module


def script(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def toolkit(tmp_path, monkeypatch):
    """A CUDA toolkit that answers questions and compiles nothing. Its path has a space in it."""
    home = tmp_path / "cuda toolkit"
    answers = """case "$*" in
*--version*) echo "Cuda compilation tools, release 12.8, V12.8.61" ;;
*--list-gpu-code*) printf 'sm_80\\nsm_90\\nsm_100\\nsm_120\\n' ;;
*--dryrun*) echo '#$ INCLUDES="-I/cuda toolkit/include"'; echo '#$ LIBRARIES= "-L/cuda toolkit/lib"' ;;
esac"""
    script(home / "bin" / "nvcc", answers)
    monkeypatch.setenv("CUDA_HOME", str(home))
    return home


@pytest.mark.parametrize(
    ("text", "archs", "ptx"),
    [
        ("", ["8.0", "9.0", "10.0", "12.0"], ["12.0"]),
        ("8.0", ["8.0"], []),
        ("8.0;9.0+PTX", ["8.0", "9.0"], ["9.0"]),
        (" 8.0, 9.0a ; 10.0f+PTX 12.0 ", ["8.0", "9.0a", "10.0f", "12.0"], ["10.0f"]),
        ("10.3a", ["10.3a"], []),
        ("9.0 9.0 9.0+PTX", ["9.0"], ["9.0"]),
    ],
)
def test_arch_list(build, text, archs, ptx):
    assert build.parse_archs(text, KNOWN) == (archs, ptx)


def test_default_archs_are_those_that_nvcc_knows(build):
    assert build.parse_archs("", {"7.5", "8.0", "9.0"}) == (["8.0", "9.0"], ["9.0"])


@pytest.mark.parametrize("text", ["7.0", "Hopper", "90", "8.0a", "9.0f", "9.0b", "8.0+SASS", "8.0;;sm_90", "+PTX"])
def test_unknown_arch_is_named(build, text):
    with pytest.raises(
        SystemExit, match=r"TORCH_CUDA_ARCH_LIST has '.*', which this nvcc does not know; it knows 8\.0"
    ):
        build.parse_archs(text, KNOWN)


def test_gencode(build):
    assert build.gencode(["9.0a", "12.0"], ["12.0"]) == [
        *("-gencode", "arch=compute_90a,code=sm_90a"),
        *("-gencode", "arch=compute_120,code=sm_120"),
        *("-gencode", "arch=compute_120,code=compute_120"),
    ]
    assert build.gencode_from_oldest(["12.0", "9.0a"], ["12.0"]) == [
        *("-gencode", "arch=compute_90,code=[sm_120,sm_90a,compute_90]"),
        "-DSPECDEC_EVERY_ARCH",
    ]


WRONG_VALUES = {
    "SPECDEC_OPS_BUILD": [("gpu", r"^SPECDEC_OPS_BUILD must be auto, native, cuda or cpu, got 'gpu'\.$")],
    "MAX_JOBS": [(text, r"^MAX_JOBS must be a positive integer, got '.*'\.$") for text in ("0", "-1", "many", "1.5")],
    "NVCC_THREADS": [("all", r"^NVCC_THREADS must be a positive integer, got 'all'\.$")],
    "CUDA_HOME": [("/nowhere", r"^CUDA_HOME=/nowhere has no bin/nvcc; correct it, or set SPECDEC_OPS_BUILD=cpu\.$")],
    "TORCH_CUDA_ARCH_LIST": [
        ("6.0", r"^TORCH_CUDA_ARCH_LIST has '6\.0', which this nvcc does not know; it knows 8\.0")
    ],
    "CXX": [("no-such-compiler", r"^The C\+\+ compiler 'no-such-compiler' was not found; install g\+\+, or set CXX")],
}


@pytest.mark.parametrize(
    ("name", "value", "message"), [(name, *case) for name, cases in WRONG_VALUES.items() for case in cases]
)
def test_wrong_value(build, toolkit, monkeypatch, name, value, message):
    monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match=message):
        build.Build("0")


def test_wrong_value_ends_the_build_without_a_trace(tmp_path):
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(tmp_path), "--build-temp", str(tmp_path)]
    environment = {**os.environ, "SPECDEC_OPS_BUILD": "both"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1] == "SPECDEC_OPS_BUILD must be auto, native, cuda or cpu, got 'both'."
    assert "Traceback" not in done.stderr


def without_nvcc(build, monkeypatch):
    which = build.shutil.which
    monkeypatch.setattr(build.shutil, "which", lambda name, **how: None if name == "nvcc" else which(name, **how))


def test_cuda_is_required_but_absent(build, monkeypatch):
    without_nvcc(build, monkeypatch)
    with pytest.raises(
        SystemExit, match=r"^SPECDEC_OPS_BUILD=cuda, but no nvcc was found; set CUDA_HOME, or use .*cpu\.$"
    ):
        build.find_nvcc("cuda")


def test_auto_without_nvcc(build, monkeypatch):
    without_nvcc(build, monkeypatch)
    made = build.Build("0")
    assert made.describe().endswith(
        "no CUDA kernels (no nvcc was found; install the CUDA toolkit and build again to add them)"
    )
    assert "rule nvcc" not in made.ninja_file() and "SPECDEC_WITH_CUDA" not in made.ninja_file()


def test_cpu_ignores_the_toolkit(build, toolkit, monkeypatch):
    monkeypatch.setenv("SPECDEC_OPS_BUILD", "cpu")
    monkeypatch.setenv("CUDA_HOME", "/nowhere")
    made = build.Build("0")
    assert made.nvcc is None
    assert made.describe().endswith("no CUDA kernels (SPECDEC_OPS_BUILD was cpu; build again without it to add them)")


def test_toolkit_is_used_without_a_gpu(build, toolkit, monkeypatch):
    """Whether the machine has a GPU is never asked; paths with spaces reach the compiler in one piece."""
    monkeypatch.setenv("NVCC_THREADS", "3")
    made = build.Build("0")
    assert made.describe().endswith("; CUDA 12.8 for SM 8.0 9.0 10.0 12.0 + PTX 12.0")
    text = made.ninja_file()
    assert f"'{toolkit}/bin/nvcc'" in text and "'-L/cuda toolkit/lib'" in text
    assert "--threads 3" in text and "-lcudart_static" in text and "-lcudart " not in text
    assert "build_topology.cu.o: nvcc csrc/topology/cuda/build_topology.cu" in text


def test_fields_of_structs_are_made_anew_only_where_they_change(build, monkeypatch, tmp_path):
    """So that the bindings are compiled when a parameter struct has changed, and not otherwise."""
    monkeypatch.setenv("SPECDEC_OPS_BUILD", "cpu")
    monkeypatch.setattr(build.Build, "usable_isas", lambda self: [])
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc", ignore=shutil.ignore_patterns("*.cpp", "*.cu*"))
    monkeypatch.chdir(tmp_path)
    made = build.Build("0")
    made.folder.mkdir(parents=True)
    made.write_struct_fields()
    path, other = (made.folder / "struct_fields" / f"{family}.h" for family in ("attention", "topology"))
    first, text, others = path.stat(), path.read_text(), other.stat()
    assert "void for_each_field(TreeAttentionParams& of" in text and 'visit("num_splits", of.num_splits);' in text
    made.write_struct_fields()
    assert path.stat().st_mtime_ns == first.st_mtime_ns
    header = tmp_path / "csrc/attention/params.h"
    header.write_text(header.read_text().replace("  float softcap;", "  float softcap, extra;"))
    made.write_struct_fields()
    assert 'visit("extra", of.extra);' in path.read_text()
    assert other.stat().st_mtime_ns == others.st_mtime_ns, "of a family in which nothing has changed"
    header.write_text(header.read_text().replace("  float softcap, extra;", "  std::vector<float> softcap;"))
    with pytest.raises(SystemExit, match=r"^csrc/attention/params\.h: struct TreeAttentionParams has `std::vector"):
        made.write_struct_fields()


# --- native: what this machine can run


@pytest.fixture
def native(build, toolkit, monkeypatch):
    """Makes a native build on a machine with these GPUs, over a module that says this of itself."""
    monkeypatch.setenv("SPECDEC_OPS_BUILD", "native")
    monkeypatch.setattr(build.Build, "usable_isas", lambda self: ["avx2"])

    def make(gpus=(), before=None):
        monkeypatch.setattr(build, "gpus_here", lambda: list(gpus))
        monkeypatch.setattr(build, "built_before", lambda module: before or {})
        return build.Build("0", Path("module"))

    return make


def test_native_without_a_gpu_compiles_nothing_for_one(native):
    made = native()
    assert made.nvcc is None and "nvcc" not in made.ninja_file() and "SPECDEC_WITH_CUDA" not in made.ninja_file()
    assert made.left_out == "SPECDEC_OPS_BUILD was native and no GPU was found; `make build` adds them"
    assert f"no CUDA kernels ({made.left_out})" in made.describe()


def test_native_compiles_for_the_gpus_that_are_there(native):
    made = native(["9.0", "12.0"])
    assert (made.archs, made.ptx) == (["9.0", "12.0"], [])
    assert made.left_out == "SPECDEC_OPS_BUILD was native; `make build` adds those of other GPUs"


def test_native_keeps_the_cuda_kernels_of_an_earlier_build(native):
    full = {"cuda": "12.8", "archs": "8.0 9.0 12.0+PTX", "left_out": ""}
    for gpus in ([], ["9.0"], ["8.6"]):
        made = native(gpus, full)
        assert (made.archs, made.ptx, made.left_out) == (["8.0", "9.0", "12.0"], ["12.0"], "")
    one = {"cuda": "12.8", "archs": "9.0", "left_out": "for a reason"}
    assert native(["10.0"], one).archs == ["9.0", "10.0"] and native([], one).left_out == "for a reason"


def test_native_does_not_lose_cuda_kernels_that_it_cannot_build(build, native, monkeypatch):
    monkeypatch.delenv("CUDA_HOME")
    without_nvcc(build, monkeypatch)
    with pytest.raises(SystemExit, match=r"^The module here has CUDA kernels, and no nvcc was found .*without them\.$"):
        native([], {"cuda": "12.8", "archs": "9.0"})
    assert native(["9.0"]).left_out == "no nvcc was found; install the CUDA toolkit and build again to add them"


@pytest.mark.parametrize(
    ("gpus", "kept", "archs"),
    [
        (["9.0"], "", "9.0"),
        (["8.0", "8.6"], "", "8.0"),  # machine code runs on later processors of its generation
        (["8.6"], "8.0", "8.0"),
        (["8.0"], "8.6", "8.6 8.0"),
        (["10.1"], "", "10.0+PTX"),  # one that this nvcc does not know yet
        (["9.0"], "9.0a 12.0+PTX", "9.0a 12.0+PTX"),
        (["10.3"], "10.0a", "10.0a 10.3"),
        (["12.1"], "12.0f", "12.0f"),
        (["5.0"], "", ""),
    ],
)
def test_native_archs(build, gpus, kept, archs):
    assert build.native_archs(gpus, kept, KNOWN | {"8.6"}) == archs


def test_gpus_here(build, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    script(tmp_path / "nvidia-smi", "printf '12.0\\n9.0\\n9.0\\n'")
    assert build.gpus_here() == ["9.0", "12.0"]
    script(tmp_path / "nvidia-smi", "echo 'NVIDIA-SMI has failed: 12.0'")
    assert build.gpus_here() == []
    script(tmp_path / "nvidia-smi", "echo 9.0; exit 9")
    assert build.gpus_here() == []
    monkeypatch.setenv("PATH", "/nowhere")
    assert build.gpus_here() == []


def test_a_module_says_what_it_holds(build, tmp_path):
    from specdec_ops import _C

    assert build.built_before(Path(_C.__file__)) == _C.build_info()
    broken = tmp_path / Path(_C.__file__).name
    assert build.built_before(broken) == {}
    broken.write_text("half a module")
    assert build.built_before(broken) == {}


def test_builds_with_and_without_cuda_share_all_but_the_bindings(native):
    """Going from one to the other and back compiles what is missing and nothing twice."""

    def objects(made):
        """What is compiled, with its options."""
        edges = [text.partition(": ") for text in made.ninja_file().split("build ")[1:]]
        return {name: rest for name, _, rest in edges if not name.endswith("_C.so")}

    without, with_cuda = objects(native()), objects(native(["9.0"]))
    shared = without.keys() & with_cuda.keys()
    changed = [name for name in shared if without[name] != with_cuda[name]]
    assert len(changed) == 1 and changed[0].endswith("build_info.cpp.o")
    assert all("bindings" in name for name in without.keys() - shared)
    assert all("bindings" in name or "/cuda/" in name for name in with_cuda.keys() - shared)


def test_what_takes_longest_is_compiled_first(build):
    some = [
        "csrc/common/cpu/isa.cpp",
        "csrc/bindings/module.cpp",
        "csrc/linear/cpu/isa/product_kernels_generic.cpp",
        "csrc/acceptance/cuda/sample.cu",
    ]
    assert sorted(some, key=build.by_length) == [some[3], some[2], some[1], some[0]]


def test_old_toolkit(build, toolkit):
    nvcc = toolkit / "bin" / "nvcc"
    nvcc.write_text(nvcc.read_text().replace("12.8", "11.4"))
    with pytest.raises(SystemExit, match=r"^specdec_ops needs CUDA 11\.8 or newer, .*nvcc is 11\.4\.$"):
        build.Build("0")


def test_old_compiler_leaves_files_out(build, tmp_path, monkeypatch, capsys):
    """A compiler that knows no AMX: one line says so, the macro is absent, and the rest is built."""
    cxx = script(tmp_path / "old-g++", 'case "$*" in *-mamx*) exit 1 ;; esac\nexec g++ "$@"')
    monkeypatch.setenv("CXX", str(cxx))
    monkeypatch.setenv("SPECDEC_OPS_BUILD", "cpu")
    monkeypatch.setattr(build.platform, "machine", lambda: "x86_64")
    made = build.Build("0")
    if "avx512_bf16" not in made.isas:
        pytest.skip("this g++ has no AVX-512 BF16 to begin with")
    lines = [line for line in capsys.readouterr().out.splitlines() if "left out" in line]
    assert len(lines) == 1 and "does not know -mamx-bf16, so the amx kernels are left out" in lines[0]
    text = made.ninja_file()
    assert "SPECDEC_HAVE_AVX512_BF16=1" in text and "SPECDEC_HAVE_AMX" not in text and "_amx.cpp" not in text


def test_other_processors_get_the_generic_files(build, monkeypatch):
    monkeypatch.setenv("SPECDEC_OPS_BUILD", "cpu")
    monkeypatch.setattr(build.platform, "machine", lambda: "aarch64")
    made = build.Build("0")
    assert set(made.cpu_sources.values()) == {"generic"}
    assert "SPECDEC_X86" not in made.ninja_file() and "-mavx" not in made.ninja_file()


def test_isa_flags_follow_the_name(build, monkeypatch):
    monkeypatch.setenv("SPECDEC_OPS_BUILD", "cpu")
    monkeypatch.setattr(build.platform, "machine", lambda: "x86_64")
    made = build.Build("0")
    for isa in made.isas:
        own = {path: flags for path, flags in made.cpu_sources.items() if path.endswith(f"_{isa}.cpp")}
        assert own and set(own.values()) == {isa}
    assert made.cpu_sources["csrc/common/cpu/isa.cpp"] == made.cpu_sources["csrc/bindings/module.cpp"] == "generic"


def test_jobs(build, monkeypatch):
    assert 1 <= build.default_jobs() <= len(os.sched_getaffinity(0))
    monkeypatch.setattr(build, "GIGABYTES_PER_JOB", 1e6)
    assert build.default_jobs() == 1
    monkeypatch.setenv("MAX_JOBS", "7")
    monkeypatch.setenv("SPECDEC_OPS_BUILD", "cpu")
    assert build.Build("0").jobs == 7


def test_missing_ninja(build, monkeypatch):
    monkeypatch.setitem(sys.modules, "ninja", None)
    monkeypatch.setattr(build.shutil, "which", lambda name, **how: None)
    with pytest.raises(SystemExit, match=r"^ninja was not found; run `pip install ninja`\.$"):
        build.find_ninja()


def test_other_systems(build, monkeypatch):
    monkeypatch.setattr(build.sys, "platform", "win32")
    with pytest.raises(SystemExit, match=r"^specdec_ops builds on Linux only, not on win32\.$"):
        build.Build("0")


# --- make


@pytest.fixture
def make(tmp_path, monkeypatch):
    """Runs make in a folder whose Python notes what it is called with, and how it is to build."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    note = 'echo "${SPECDEC_OPS_BUILD:-auto} $*" >> calls'
    script(tmp_path / ".venv" / "bin" / "python", note)
    (tmp_path / ".venv" / "tools").touch()
    for name in ("SPECDEC_OPS_BUILD", "MAKEFLAGS", "MAKELEVEL"):
        monkeypatch.delenv(name, raising=False)

    def run(*targets, **environment):
        (tmp_path / "calls").write_text("")
        subprocess.run(["make", *targets], cwd=tmp_path, env=os.environ | environment, check=True, capture_output=True)
        return [line for line in (tmp_path / "calls").read_text().splitlines() if "urllib" not in line]

    return run


BUILD = "setup.py --quiet build_ext --inplace"


def test_make_bench_builds_natively_and_make_build_everything(make):
    """In any order, together or not; and what only tests need is not installed before the benchmarks."""
    calls = make("bench")
    assert {call.split()[0] for call in calls} == {"native"}
    assert [call for call in calls if "pip install" in call] == [call for call in calls if call.endswith(".[bench]")]
    assert calls[0] == f"native {BUILD}" and calls[-2:] == [f"native {BUILD}", "native -m benchmarks.run --quick"]
    assert make("bench") == [f"native {BUILD}", "native -m benchmarks.run --quick"]
    calls = make("build")
    assert {call.split()[0] for call in calls} == {"auto"} and calls[-1] == f"auto {BUILD}"
    assert any(call.endswith(".[dev]") for call in calls)
    assert make("build") == [f"auto {BUILD}"]
    assert make("-j4", "bench", "build") == [f"native {BUILD}", "native -m benchmarks.run --quick", f"auto {BUILD}"]
    assert make("bench", SPECDEC_OPS_BUILD="cpu")[0] == f"cpu {BUILD}"


def test_make_build_needs_nothing_again_for_bench(make):
    make("build")
    assert make("bench") == [f"native {BUILD}", "native -m benchmarks.run --quick"]


@pytest.mark.parametrize(
    ("isa", "instruction"), [("avx2", "vfmadd"), ("avx512", "vfmadd"), ("avx512_bf16", "vdpbf16ps")]
)
def test_the_roof_of_arithmetic_stays_in_registers(build, isa, instruction):
    """Sums that lie in memory halve it: kernels would be faster than their roof."""
    made = build.Build("0")
    if isa not in made.isas:
        pytest.skip(f"{made.cxx_name} does not know {isa}")
    flags = [*build.CXX_FLAGS, *build.X86_FLAGS[isa], "-Icsrc", "-S", "-o", "-"]
    source = ROOT / f"csrc/common/cpu/isa/benchmark_loops_{isa}.cpp"
    text = subprocess.run([*made.cxx, *flags, str(source)], check=True, capture_output=True, text=True).stdout
    lines = text.splitlines()
    products = [index for index, line in enumerate(lines) if instruction in line]
    assert len(products) >= 12
    assert not [line for line in lines[products[0] : products[-1] + 1] if "(%r" in line]
