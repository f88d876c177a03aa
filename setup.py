"""The build of specdec_ops._C: every kernel, in one module that knows no framework.

What is compiled, and how, is decided by the compilers that are found and by five environment variables:

    SPECDEC_OPS_BUILD      auto (CUDA kernels if there is an nvcc), cuda (they are required), cpu (none), or native
                           (for the GPUs of this machine only, none without one; those of an earlier build stay)
    TORCH_CUDA_ARCH_LIST   GPU architectures, such as "8.0 9.0a 12.0+PTX", separated by spaces, commas or semicolons
    CUDA_HOME              the CUDA toolkit, else nvcc on the PATH, else /usr/local/cuda
    MAX_JOBS, NVCC_THREADS compilers that run at once, and threads inside each nvcc
    CXX                    the C++ compiler, else g++, else c++

PyTorch is not needed. Except in a native build no GPU is looked for: CUDA is decided by the toolkit alone. Objects are
kept under build/, so building again compiles only what has changed or was left out.
"""

import json
import os
import platform
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import setuptools
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
BINDINGS = "csrc/bindings/"  # the only files that know Python
STRUCT_FIELDS = "csrc/bindings/struct_fields.py"  # makes a header for each family's bindings, of the structs in its
PARAMS_HEADERS = "csrc/*/params.h"
KNOW_THE_BUILD = (
    "csrc/common/cpu/build_info.cpp",
    "csrc/common/cuda/errors.cu",
)  # what was compiled, and for which GPUs
# What takes longest is compiled first, so that no core is left alone with it at the end.
LONGEST_FIRST = ("product_kernels_generic", "attention_generic", "module", "product_kernels", "attention_", "row_")
MODES = ("auto", "native", "cuda", "cpu")
DEFAULT_ARCHS = ("8.0", "9.0", "10.0", "12.0")
GIGABYTES_PER_JOB = 1.0  # the largest of our compilations, with room to spare

# The instruction set of a file in csrc/*/cpu/ is the ending of its name. Each set includes the one before it. A file
# with no such ending is compiled for the oldest processor, and decides at run time which of the others may be called.
_AVX2 = ["-mavx2", "-mfma", "-mf16c"]
_AVX512 = [*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
_AVX512_VNNI = [*_AVX512, "-mavx512vnni"]
_AVX512_BF16 = [*_AVX512_VNNI, "-mavx512bf16"]
X86_FLAGS = {
    "avx2": _AVX2,
    "avx512": _AVX512,
    "avx512_vnni": _AVX512_VNNI,
    "avx512_bf16": _AVX512_BF16,
    "amx": [*_AVX512_BF16, "-mamx-tile", "-mamx-bf16"],
}
CXX_FLAGS = ["-O3", "-std=c++17", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-fno-math-errno", "-ffp-contract=fast"]
# The last three are about g++'s own AVX-512 intrinsics, and about vectors that only inlined functions pass around.
CXX_WARNINGS = ["-Wall", "-Wextra", "-Wno-uninitialized", "-Wno-maybe-uninitialized", "-Wno-psabi"]
NVCC_FLAGS = ["-O3", "-std=c++17", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall"]
NVCC_FLAGS += ["-Xfatbin=-compress-all"]  # a fifth of the size; tests look for spills
# The CUDA sources whose device code asks for the architecture, by what their names hold: each architecture has its own
# PTX of them. The others become PTX of the oldest, once, and machine code of each from it, in half the time. They see
# SPECDEC_EVERY_ARCH, and nothing in device.cuh that depends on the architecture.
SPECIFIC_TO_ARCH = ("exit_confidence", "screened_exit", "fp8")


def output_of(*command):
    """Everything that a command prints. A command that fails is an error of the build."""
    return subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT).stdout


def positive_integer(name, default):
    """The value of an environment variable that counts something."""
    text = os.environ.get(name, "").strip()
    if not text:
        return default
    if not text.isdecimal() or int(text) == 0:
        raise SystemExit(f"{name} must be a positive integer, got {text!r}.")
    return int(text)


def build_mode():
    """One of MODES."""
    mode = os.environ.get("SPECDEC_OPS_BUILD", "").strip() or "auto"
    if mode not in MODES:
        raise SystemExit(f"SPECDEC_OPS_BUILD must be auto, native, cuda or cpu, got {mode!r}.")
    return mode


def find_cxx():
    """The C++ compiler as a command, and what to call it: (["g++"], "g++ 12.2.0")."""
    command = shlex.split(os.environ.get("CXX", "")) or ["g++" if shutil.which("g++") else "c++"]
    if shutil.which(command[0]) is None:
        raise SystemExit(f"The C++ compiler {command[0]!r} was not found; install g++, or set CXX to another compiler.")
    version = re.search(r"\d+\.\d+[.\d]*", output_of(*command, "--version").splitlines()[0].rpartition(")")[2])
    return command, f"{Path(command[0]).name} {version.group() if version else ''}".strip()


def find_nvcc(mode):
    """The path of nvcc, or None for a build without CUDA."""
    if mode == "cpu":
        return None
    home = os.environ.get("CUDA_HOME", "").strip()
    if home:
        nvcc = Path(home) / "bin" / "nvcc"
        if not nvcc.is_file():
            raise SystemExit(f"CUDA_HOME={home} has no bin/nvcc; correct it, or set SPECDEC_OPS_BUILD=cpu.")
        return str(nvcc)
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if nvcc is None and mode == "cuda":
        raise SystemExit("SPECDEC_OPS_BUILD=cuda, but no nvcc was found; set CUDA_HOME, or use SPECDEC_OPS_BUILD=cpu.")
    return nvcc


def parse_archs(text, known):
    """Read TORCH_CUDA_ARCH_LIST: "8.0;9.0a+PTX" gives (["8.0", "9.0a"], ["9.0a"]), machine code and PTX.

    `known` is what nvcc can compile for, as in {"8.0", "9.0"}. Without a list it is the default architectures that nvcc
    knows, and PTX of the newest of them for GPUs yet to come.
    """
    if not text.strip():
        archs = [arch for arch in DEFAULT_ARCHS if arch in known]
        if not archs:
            raise SystemExit(f"This nvcc knows none of SM {' '.join(DEFAULT_ARCHS)}; set TORCH_CUDA_ARCH_LIST.")
        return archs, archs[-1:]
    archs, ptx = [], []
    for item in re.split(r"[\s;,]+", text.strip(" \t\n;,")):
        arch = item.removesuffix("+PTX")
        match = re.fullmatch(r"(\d+\.\d)([af]?)", arch)
        suffix_since = {"": 0, "a": 9, "f": 10}  # the first generation that has such a variant
        if not match or match[1] not in known or float(match[1]) < suffix_since[match[2]]:
            names = " ".join(sorted(known, key=float))
            raise SystemExit(f"TORCH_CUDA_ARCH_LIST has {item!r}, which this nvcc does not know; it knows {names}.")
        if arch not in archs:
            archs.append(arch)
        if item != arch and arch not in ptx:
            ptx.append(arch)
    return archs, ptx


def gpus_here():
    """The compute capabilities of this machine's GPUs, as in ["9.0"]; none where nvidia-smi does not work."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return []
    found = re.findall(r"^\s*(\d+\.\d)\s*$", done.stdout, re.MULTILINE) if done.returncode == 0 else []
    return sorted(set(found), key=float)


def built_before(module):
    """What a compiled module says of itself; {} where it does not exist or does not load. It is asked in a process of
    its own, because a module that is loaded can't be loaded anew.
    """
    code = "import importlib.util, json, sys\n"
    code += "spec = importlib.util.spec_from_file_location('_C', sys.argv[1])\n"
    code += "module = importlib.util.module_from_spec(spec)\n"
    code += "spec.loader.exec_module(module)\n"
    code += "print(json.dumps(module.build_info()))"
    if not module.is_file():
        return {}
    done = subprocess.run([sys.executable, "-c", code, str(module)], capture_output=True, text=True)
    return json.loads(done.stdout) if done.returncode == 0 else {}


def native_archs(gpus, kept, known):
    """TORCH_CUDA_ARCH_LIST of a native build: that of the earlier build, and what these GPUs need beside it."""

    def serves(arch, gpu):
        name = arch.removesuffix("+PTX")
        if name.endswith("a"):
            return name == f"{gpu}a"
        major, minor = name.rstrip("f").split(".")
        return major == gpu.split(".")[0] and int(minor) <= int(gpu.split(".")[1])

    archs = kept.split()
    for gpu in gpus:
        older = [arch for arch in known if float(arch) <= float(gpu)]
        if older and not any(serves(arch, gpu) for arch in archs):
            newest = max(older, key=float)
            archs.append(newest if newest == gpu else f"{newest}+PTX")
    return " ".join(archs)


def gencode_from_oldest(archs, ptx):
    """Options of nvcc for machine code of these architectures from PTX of the oldest, kept if there is to be any."""
    oldest = min((arch.rstrip("af").replace(".", "") for arch in archs), key=int)
    codes = [f"sm_{arch.replace('.', '')}" for arch in archs] + ([f"compute_{oldest}"] if ptx else [])
    return ["-gencode", f"arch=compute_{oldest},code=[{','.join(codes)}]", "-DSPECDEC_EVERY_ARCH"]


def gencode(archs, ptx):
    """Options of nvcc for these architectures, each from sources seen by it alone."""
    flags = []
    for arch in archs:
        number = arch.replace(".", "")
        flags += ["-gencode", f"arch=compute_{number},code=sm_{number}"]
    for arch in ptx:
        number = arch.replace(".", "")
        flags += ["-gencode", f"arch=compute_{number},code=compute_{number}"]
    return flags


def default_jobs():
    """As many compilers as there are cores to run them and free memory to hold them."""
    jobs = len(os.sched_getaffinity(0))
    match = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    return max(1, min(jobs, int(int(match[1]) / 1e6 / GIGABYTES_PER_JOB))) if match else jobs


def find_ninja():
    """The path of ninja. The one of the Python package need not be on the PATH."""
    try:
        from ninja import BIN_DIR
    except ImportError:
        BIN_DIR = ""
    path = shutil.which("ninja", path=BIN_DIR) or shutil.which("ninja")
    if path is None:
        raise SystemExit("ninja was not found; run `pip install ninja`.")
    return path


class Build:
    """One build of the module: what was found, what is left out, and the ninja file that does it."""

    def __init__(self, version, module=None):
        """`module` is the compiled module in the source tree, which a native build adds to."""
        if sys.platform != "linux":
            raise SystemExit(f"specdec_ops builds on Linux only, not on {sys.platform}.")
        mode = build_mode()
        self.version = version
        self.folder = Path("build", f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}")
        self.cxx, self.cxx_name = find_cxx()
        self.isas = self.usable_isas()
        self.cpu_sources = self.find_cpu_sources()
        self.cuda_sources, self.cuda_version, self.archs, self.ptx = [], "", [], []
        self.nvcc_threads = 1
        self.left_out = ""  # why something is not compiled, and how to add it
        self.nvcc = self.find_native(module) if mode == "native" else find_nvcc(mode)
        if mode == "cpu":
            self.left_out = "SPECDEC_OPS_BUILD was cpu; build again without it to add them"
        elif mode != "native" and self.nvcc:
            self.find_cuda(os.environ.get("TORCH_CUDA_ARCH_LIST", ""))
        elif not self.nvcc and not self.left_out:
            self.left_out = "no nvcc was found; install the CUDA toolkit and build again to add them"
        self.jobs = positive_integer("MAX_JOBS", default_jobs())

    def find_native(self, module):
        """Where nvcc is if this machine has a GPU or the module CUDA kernels, which must not get lost; else None."""
        gpus, before = gpus_here(), built_before(module) if module else {}
        if not gpus and not before.get("cuda"):
            self.left_out = "SPECDEC_OPS_BUILD was native and no GPU was found; `make build` adds them"
            return None
        self.nvcc = find_nvcc("auto")
        if self.nvcc is None:
            if before.get("cuda"):
                raise SystemExit(
                    "The module here has CUDA kernels, and no nvcc was found to build them again; set CUDA_HOME, or "
                    "SPECDEC_OPS_BUILD=cpu to build it without them."
                )
            return None
        asked = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip()
        self.find_cuda(asked or (lambda known: native_archs(gpus, before.get("archs", ""), known)))
        if before.get("cuda"):
            self.left_out = before.get("left_out", "")
        elif not asked:
            self.left_out = "SPECDEC_OPS_BUILD was native; `make build` adds those of other GPUs"
        return self.nvcc

    def usable_isas(self):
        """Which entries of X86_FLAGS this processor family has and this compiler knows."""
        if platform.machine().lower() not in ("x86_64", "amd64"):
            return []
        isas = []
        for isa, flags in X86_FLAGS.items():
            probe = [*self.cxx, *flags, "-x", "c++", "-fsyntax-only", "-include", "immintrin.h", os.devnull]
            if subprocess.run(probe, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 0:
                isas.append(isa)
            else:
                print(f"specdec_ops: {self.cxx_name} does not know {flags[-1]}, so the {isa} kernels are left out")
        return isas

    def find_cpu_sources(self):
        """{file: its instruction set, or "generic"}, without the files that can't be compiled here."""
        sources = dict.fromkeys(map(str, sorted(Path(BINDINGS).glob("*.cpp"))), "generic")
        for path in sorted(Path("csrc").glob("*/cpu/**/*.cpp")):
            isa = next((isa for isa in X86_FLAGS if path.stem.endswith(f"_{isa}")), "generic")
            if isa == "generic" or isa in self.isas:
                sources[str(path)] = isa
        return sources

    def find_cuda(self, archs):
        """The toolkit's version, the architectures to compile for, and the sources. `archs` is as
        TORCH_CUDA_ARCH_LIST, or gives that when it gets the set of those that nvcc knows.
        """
        match = re.search(r"release (\d+\.\d+)", output_of(self.nvcc, "--version"))
        if match is None or float(match[1]) < 11.8:
            raise SystemExit(f"specdec_ops needs CUDA 11.8 or newer, {self.nvcc} is {match and match[1]}.")
        self.cuda_version = match[1]
        codes = re.findall(r"sm_(\d+)(\d)\b", output_of(self.nvcc, "--list-gpu-code"))
        known = {f"{major}.{minor}" for major, minor in codes}
        self.archs, self.ptx = parse_archs(archs(known) if callable(archs) else archs, known)
        self.nvcc_threads = positive_integer("NVCC_THREADS", 4 if len(os.sched_getaffinity(0)) >= 16 else 1)
        self.cuda_sources = [str(path) for path in sorted(Path("csrc").glob("*/cuda/**/*.cu"))]

    def describe(self):
        """One line about what this build holds."""
        isas = [isa for isa in ("generic", *X86_FLAGS) if isa in self.cpu_sources.values()]
        left_out = f" ({self.left_out})" if self.left_out else ""
        cuda = f"no CUDA kernels{left_out}"
        if self.nvcc:
            ptx = "".join(f" + PTX {arch}" for arch in self.ptx)
            cuda = f"CUDA {self.cuda_version} for SM {' '.join(self.archs)}{ptx}{left_out}"
        return f"CPU kernels ({', '.join(isas)}) with {self.cxx_name}; {cuda}"

    def macros(self):
        """What build_info() reports, and errors.cu tells users with another GPU."""
        archs = " ".join(f"{arch}+PTX" if arch in self.ptx else arch for arch in self.archs)
        strings = {"VERSION": self.version, "COMPILER": self.cxx_name, "CUDA": self.cuda_version, "ARCHS": archs}
        strings["LEFT_OUT"] = self.left_out
        return [f'-DSPECDEC_{name}="{value}"' for name, value in strings.items()]

    def ninja_file(self):
        """The text of build.ninja. Paths are relative to the root, so a copied checkout reuses its objects."""
        try:
            import pybind11
        except ImportError:
            raise SystemExit("pybind11 was not found; run `pip install pybind11`.") from None
        isa_macros = [f"-DSPECDEC_HAVE_{isa.upper()}=1" for isa in self.isas]
        x86_macros = ["-DSPECDEC_X86=1", *isa_macros] if self.isas else []
        common = ["-Icsrc", *x86_macros]
        python = [f"-I{self.folder}", "-isystem", sysconfig.get_path("include"), "-isystem", pybind11.get_include()]
        cuda_flags = [*NVCC_FLAGS, "$flags", "--threads", str(self.nvcc_threads)]
        if os.environ.get("CXX"):
            cuda_flags += ["-ccbin", self.cxx[0]]
        link_flags = ["-shared", "-fopenmp", "-Wl,--exclude-libs,ALL"]
        link_libraries = []
        if self.nvcc:
            python.append("-DSPECDEC_WITH_CUDA=1")
            settings = output_of(self.nvcc, "--dryrun", "--shared", "x.o", "-o", "x.so")
            python += ["-isystem" + path for path in re.findall(r'"-I([^"]+)"', settings)]
            link_libraries = sorted(set(re.findall(r'"(-L[^"]+)"', settings)))
            link_libraries += ["-lcudart_static", "-lrt", "-lpthread", "-ldl"]
        compile_cxx = [*self.cxx, *CXX_FLAGS, *CXX_WARNINGS, *common]
        lines = [
            f"builddir = {self.folder}\n",
            rule("cxx", [*compile_cxx, "$flags", "-MMD", "-MF", "$out.d", "-c", "$in", "-o", "$out"], depfile=True),
            rule("link", [*self.cxx, *link_flags, "$in", *link_libraries, "-o", "$out"]),
        ]
        if self.nvcc:
            compile_cuda = [self.nvcc, *cuda_flags, *common]
            lines.append(rule("nvcc", [*compile_cuda, "-MMD", "-MF", "$out.d", "-c", "$in", "-o", "$out"], True))
        for source in sorted((*self.cuda_sources, *self.cpu_sources), key=by_length):
            if source in self.cuda_sources:
                specific = any(part in Path(source).stem for part in SPECIFIC_TO_ARCH)
                flags = (gencode if specific else gencode_from_oldest)(self.archs, self.ptx)
            else:
                flags = python if source.startswith(BINDINGS) else X86_FLAGS.get(self.cpu_sources[source], [])
            flags = [*flags, *(self.macros() if source in KNOW_THE_BUILD else [])]
            compiler = "nvcc" if source in self.cuda_sources else "cxx"
            lines.append(f"build {self.object_of(source)}: {compiler} {source}\n  flags = {quote(flags)}\n")
        objects = [self.object_of(source) for source in (*self.cpu_sources, *self.cuda_sources)]
        lines.append(f"build {self.folder}/_C.so: link {' '.join(objects)}\n")
        return "\n".join(lines)

    def object_of(self, source):
        """Where a source's object goes. The bindings have one with CUDA and one without, and neither replaces the
        other: a build that leaves CUDA out costs the next one nothing.
        """
        return f"{self.folder}/{source}{'.cuda' if self.nvcc and source.startswith(BINDINGS) else ''}.o"

    def write_struct_fields(self):
        """Make a header for each family that tells its bindings the fields of its structs.

        It stays as it is if nothing differs: a change in one family compiles the bindings of no other.
        """
        header, folder = runpy.run_path(STRUCT_FIELDS)["header"], self.folder / "struct_fields"
        folder.mkdir(exist_ok=True)
        for source in sorted(Path().glob(PARAMS_HEADERS)):
            text, path = header(str(source)), folder / f"{source.parent.name}.h"
            if not path.is_file() or path.read_text() != text:
                path.write_text(text)

    def run(self, target):
        """Compile what has changed, and put the module at `target`."""
        text = self.ninja_file()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.write_struct_fields()
        ninja_path = self.folder / "build.ninja"
        ninja_path.write_text(text)
        print(f"specdec_ops: building {self.describe()}; {self.jobs} jobs at once", flush=True)
        command = [find_ninja(), "-f", str(ninja_path), "-j", str(self.jobs)]
        if subprocess.run(command).returncode != 0:
            raise SystemExit("specdec_ops: a compiler failed; its message is above.")
        target.parent.mkdir(parents=True, exist_ok=True)
        complete = target.with_suffix(".new")
        shutil.copyfile(self.folder / "_C.so", complete)
        complete.replace(target)  # at once; a process that has loaded the old module keeps it
        print(f"specdec_ops: built {self.describe()}")


def by_length(source):
    """A key by which what takes longest comes first."""
    stem = Path(source).stem
    return not source.endswith(".cu"), [not stem.startswith(start) for start in LONGEST_FIRST]


def quote(arguments):
    """A shell command inside a ninja file. ninja's own variables stay as they are."""
    ninja_variables = ("$in", "$out", "$flags", "$out.d")
    quoted = (a if a in ninja_variables else shlex.quote(a).replace("$", "$$") for a in arguments)
    return " ".join(quoted)


def rule(name, command, depfile=False):
    """A rule of a ninja file."""
    dependencies = "  depfile = $out.d\n  deps = gcc\n" if depfile else ""
    return f"rule {name}\n  command = {quote(command)}\n  description = {name} $out\n{dependencies}"


class NinjaBuild(build_ext):
    """setuptools asks for the extension; ninja builds it."""

    def build_extension(self, extension):
        os.chdir(ROOT)
        target = Path(self.get_ext_fullpath(extension.name)).absolute()
        Build(self.distribution.get_version(), ROOT / "specdec_ops" / target.name).run(target)


if __name__ == "__main__":
    sources = sorted(str(file.relative_to(ROOT)) for kind in ("cpp", "cu") for file in ROOT.glob(f"csrc/**/*.{kind}"))
    if int(setuptools.__version__.partition(".")[0]) < 77:  # older ones can't read pyproject.toml, and say so at length
        raise SystemExit(f"specdec_ops needs setuptools 77 or newer to be built, this is {setuptools.__version__}.")
    module = setuptools.Extension("specdec_ops._C", sources)
    setuptools.setup(ext_modules=[module], cmdclass={"build_ext": NinjaBuild})
