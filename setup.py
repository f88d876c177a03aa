"""The build of specdec_ops._C: every kernel, in one module that knows no framework.

What is compiled, and how, is decided by the compilers that are found and by five environment variables:

    SPECDEC_OPS_BUILD      auto (CUDA kernels if there is an nvcc), cuda (they are required) or cpu (none)
    TORCH_CUDA_ARCH_LIST   GPU architectures, such as "8.0 9.0a 12.0+PTX", separated by spaces, commas or semicolons
    CUDA_HOME              the CUDA toolkit, else nvcc on the PATH, else /usr/local/cuda
    MAX_JOBS, NVCC_THREADS compilers that run at once, and threads inside each nvcc
    CXX                    the C++ compiler, else g++, else c++

PyTorch is not needed, and no GPU is looked for: CUDA is decided by the toolkit alone. Objects are kept under build/, so
building again compiles only what has changed.
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import setuptools
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
BINDINGS = tuple(f"csrc/bindings{of}.cpp" for of in ("", "_accept", "_exit", "_kv"))  # the only files that know Python
DEFAULT_ARCHS = ("8.0", "9.0", "10.0", "12.0")
GIGABYTES_PER_JOB = 1.0  # the largest of our compilations, with room to spare

# The instruction set of a file in csrc/cpu/ is the ending of its name. Each set includes the one before it. A file with
# no such ending is compiled for the oldest processor, and decides at run time which of the others may be called.
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
NVCC_FLAGS = ["-O3", "-std=c++17", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall", "-Xptxas=-warn-spills"]
NVCC_FLAGS += ["-Xfatbin=-compress-all"]  # a fifth of the size
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
    """auto, cuda or cpu."""
    mode = os.environ.get("SPECDEC_OPS_BUILD", "").strip() or "auto"
    if mode not in ("auto", "cuda", "cpu"):
        raise SystemExit(f"SPECDEC_OPS_BUILD must be auto, cuda or cpu, got {mode!r}.")
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

    def __init__(self, version):
        if sys.platform != "linux":
            raise SystemExit(f"specdec_ops builds on Linux only, not on {sys.platform}.")
        mode = build_mode()
        self.version = version
        self.folder = Path("build", f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}")
        self.cxx, self.cxx_name = find_cxx()
        self.isas = self.usable_isas()
        self.cpu_sources = self.find_cpu_sources()
        self.nvcc = find_nvcc(mode)
        self.cuda_sources, self.cuda_version, self.archs, self.ptx = [], "", [], []
        self.nvcc_threads = 1
        if self.nvcc:
            self.find_cuda()
        self.cuda_absent = "SPECDEC_OPS_BUILD=cpu" if mode == "cpu" else "no nvcc was found"
        self.jobs = positive_integer("MAX_JOBS", default_jobs())

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
        sources = dict.fromkeys(BINDINGS, "generic")
        for path in sorted(Path("csrc/cpu").glob("*.cpp")):
            isa = next((isa for isa in X86_FLAGS if path.stem.endswith(f"_{isa}")), "generic")
            if isa == "generic" or isa in self.isas:
                sources[str(path)] = isa
        return sources

    def find_cuda(self):
        """The toolkit's version, the architectures to compile for, and the sources."""
        match = re.search(r"release (\d+\.\d+)", output_of(self.nvcc, "--version"))
        if match is None or float(match[1]) < 11.8:
            raise SystemExit(f"specdec_ops needs CUDA 11.8 or newer, {self.nvcc} is {match and match[1]}.")
        self.cuda_version = match[1]
        codes = re.findall(r"sm_(\d+)(\d)\b", output_of(self.nvcc, "--list-gpu-code"))
        known = {f"{major}.{minor}" for major, minor in codes}
        self.archs, self.ptx = parse_archs(os.environ.get("TORCH_CUDA_ARCH_LIST", ""), known)
        self.nvcc_threads = positive_integer("NVCC_THREADS", 4 if len(os.sched_getaffinity(0)) >= 16 else 1)
        self.cuda_sources = [str(path) for path in sorted(Path("csrc/cuda").glob("*.cu"))]

    def describe(self):
        """One line about what this build holds."""
        isas = [isa for isa in ("generic", *X86_FLAGS) if isa in self.cpu_sources.values()]
        cuda = f"no CUDA kernels ({self.cuda_absent})"
        if self.nvcc:
            ptx = "".join(f" + PTX {arch}" for arch in self.ptx)
            cuda = f"CUDA {self.cuda_version} for SM {' '.join(self.archs)}{ptx}"
        return f"CPU kernels ({', '.join(isas)}) with {self.cxx_name}; {cuda}"

    def macros(self):
        """What bindings.cpp reports, and errors.cu tells users with another GPU."""
        archs = " ".join(f"{arch}+PTX" if arch in self.ptx else arch for arch in self.archs)
        strings = {"VERSION": self.version, "COMPILER": self.cxx_name, "CUDA": self.cuda_version, "ARCHS": archs}
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
        python = ["-isystem", sysconfig.get_path("include"), "-isystem", pybind11.get_include(), *self.macros()]
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
            compile_cuda = [self.nvcc, *cuda_flags, *common, *self.macros()]
            lines.append(rule("nvcc", [*compile_cuda, "-MMD", "-MF", "$out.d", "-c", "$in", "-o", "$out"], True))
        for source, isa in self.cpu_sources.items():
            flags = python if source in BINDINGS else X86_FLAGS.get(isa, [])
            lines.append(f"build {self.folder}/{source}.o: cxx {source}\n  flags = {quote(flags)}\n")
        for source in self.cuda_sources:
            specific = any(part in source for part in SPECIFIC_TO_ARCH)
            flags = (gencode if specific else gencode_from_oldest)(self.archs, self.ptx)
            lines.append(f"build {self.folder}/{source}.o: nvcc {source}\n  flags = {quote(flags)}\n")
        objects = [f"{self.folder}/{source}.o" for source in (*self.cpu_sources, *self.cuda_sources)]
        lines.append(f"build {self.folder}/_C.so: link {' '.join(objects)}\n")
        return "\n".join(lines)

    def run(self, target):
        """Compile what has changed, and put the module at `target`."""
        text = self.ninja_file()
        self.folder.mkdir(parents=True, exist_ok=True)
        ninja_path = self.folder / "build.ninja"
        ninja_path.write_text(text)
        print(f"specdec_ops: building {self.describe()}; {self.jobs} jobs at once", flush=True)
        command = [find_ninja(), "-f", str(ninja_path), "-j", str(self.jobs)]
        if subprocess.run(command).returncode != 0:
            raise SystemExit("specdec_ops: a compiler failed; its message is above.")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)  # a process that has loaded the old module keeps it
        shutil.copyfile(self.folder / "_C.so", target)
        print(f"specdec_ops: built {self.describe()}")


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
        Build(self.distribution.get_version()).run(Path(self.get_ext_fullpath(extension.name)).absolute())


if __name__ == "__main__":
    sources = sorted(str(file.relative_to(ROOT)) for kind in ("cpp", "cu") for file in ROOT.glob(f"csrc/**/*.{kind}"))
    if int(setuptools.__version__.partition(".")[0]) < 77:  # older ones can't read pyproject.toml, and say so at length
        raise SystemExit(f"specdec_ops needs setuptools 77 or newer to be built, this is {setuptools.__version__}.")
    module = setuptools.Extension("specdec_ops._C", sources)
    setuptools.setup(ext_modules=[module], cmdclass={"build_ext": NinjaBuild})
