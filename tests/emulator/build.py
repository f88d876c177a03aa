"""Compiles kernels, emulator and their programs into build/emulator: ninja knows what has changed."""

import fcntl
import functools
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from specdec_ops._core import loader

FOLDER = Path(__file__).parent
ROOT = FOLDER.parent.parent
OUTPUT = Path("build", "emulator")  # of ROOT

# Most kernels run for less time than it takes to compile them: optimised only as far as that costs nothing.
FLAGS = ["-std=c++17", "-Og", "-g1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-Wall", "-Wextra"]
FLAGS += ["-Wno-unknown-pragmas", "-DSPECDEC_EMULATED", "-Itests/emulator", "-Icsrc"]
SANITIZERS = {
    "plain": [],
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
    "thread": ["-fsanitize=thread"],
}
# The emulator plays the part of the hardware, which ThreadSanitizer must not look into.
EMULATOR_FLAGS = {"plain": ["-O2"], "address": SANITIZERS["address"], "thread": ["-O2", "-DSPECDEC_EMULATOR_TSAN"]}
SHARED = ["-shared", "-Wl,-Bsymbolic"]
PROGRAMS = ["planted_bugs", "device_names"]
EMULATOR = ["emulator", "shared_memory", "fiber", "collectives"]
# Parameters of each op, whose launcher is OP_cuda. Its sources are csrc/*/cuda/**/OP*.cu, and those of an op it
# calls.
OPS = {
    "build_topology": "BuildTopologyParams",
    "grow_tree": "GrowTreeParams",
    "merge_states": "MergeStatesParams",
    "prune_tree": "PruneTreeParams",
    "tree_attention": "TreeAttentionParams",
    "accept": "AcceptParams",
    "sample": "SampleParams",
    "exit_confidence": "ExitParams",
    "bounded_exit": "BoundedParams",
    "screened_exit": "ScreenedParams",
    "exit_mlp": "MlpParams",
    "kv_append": "KvAppendParams",
    "gather_layer_kv": "GatherLayerKvParams",
    "kv_commit": "KvCommitParams",
    "kv_propagate": "KvPropagateParams",
    "linear": "LinearParams",
    "rms_norm": "RmsNormParams",
}
# Ops whose OP_scratch says how much a call needs.
SCRATCH = (
    *("tree_attention", "accept", "sample", "exit_confidence", "bounded_exit", "screened_exit", "exit_mlp"),
    *("linear",),
)
CALLS = {"bounded_exit": "exit_confidence", "screened_exit": "exit_confidence"}


class CannotRun(Exception):
    """This machine lacks something that an emulated kernel needs. Tests are skipped, with this as the reason."""


def compiler():
    return shlex.split(os.environ.get("CXX", "")) or ["g++" if shutil.which("g++") else "c++"]


def find_ninja():
    try:
        from ninja import BIN_DIR
    except ImportError:
        BIN_DIR = ""
    return shutil.which("ninja", path=BIN_DIR) or shutil.which("ninja")


def why_not():
    """Why nothing can be emulated here, or None."""
    if sys.platform != "linux":
        return "the emulator runs on Linux only"
    if shutil.which(compiler()[0]) is None:
        return f"there is no C++ compiler {compiler()[0]!r}"
    if find_ninja() is None:
        return "there is no ninja"
    return loader.load()[1]  # the compiled module marshals the calls


def ninja_file():
    """How to make every program and library."""
    cxx = shlex.join(compiler())
    lines = [
        f"builddir = {OUTPUT}",
        f"rule compile\n  command = {cxx} -MMD -MF $out.d -x c++ -c $in -o $out $flags",
        "  depfile = $out.d\n  deps = gcc",
        f"rule link\n  command = {cxx} $in -o $out $flags",
    ]

    def compiled(name, source, flags):
        lines.append(f"build {OUTPUT}/{name}.o: compile {source}\n  flags = {shlex.join([*FLAGS, *flags])}")

    def linked(name, objects, flags):
        objects = " ".join(f"{OUTPUT}/{object_}.o" for object_ in objects)
        lines.append(f"build {OUTPUT}/{name}: link {objects}\n  flags = {shlex.join(flags)}")

    for build, flags in SANITIZERS.items():
        own, emulator = EMULATOR_FLAGS[build], [f"{build}/{name}" for name in EMULATOR]
        for name in (*EMULATOR, "replay"):
            compiled(f"{build}/{name}", f"tests/emulator/{name}.cpp", own)
        for name in PROGRAMS:
            compiled(f"{build}/{name}", f"tests/emulator/{name}.cpp", flags)
            linked(f"{build}/{name}", [*emulator, f"{build}/{name}"], flags)
        for op, params in OPS.items():
            names = [f"-DSPECDEC_LAUNCHER={op}_cuda", f"-DSPECDEC_PARAMS={params}"]
            names += [f"-DSPECDEC_SCRATCH={op}_scratch"] if op in SCRATCH else []
            compiled(f"{build}/{op}_entry", "tests/emulator/entry.cpp", [*own, *names])
            for kernel in own_kernels_of(op):
                if object_of(build, kernel) == f"{build}/{kernel}":
                    compiled(f"{build}/{kernel}", source_of(kernel), flags)
            objects = [object_of(build, name) for name in (*EMULATOR, f"{op}_entry", *kernels_of(op), "replay")]
            linked(f"{build}/{op}", objects, flags)

    # The join of tree_attention's parts without its fences.
    unfenced = "tree_attention_bf16_64"
    compiled("thread/unfenced", source_of(unfenced), [*SANITIZERS["thread"], "-DSPECDEC_WITHOUT_FENCES"])
    kernels = ["unfenced" if name == unfenced else name for name in kernels_of("tree_attention")]
    objects = [object_of("thread", name) for name in (*EMULATOR, "tree_attention_entry", *kernels, "replay")]
    linked("thread/tree_attention_unfenced", objects, SANITIZERS["thread"])

    compiled("count_traffic", "tests/emulator/count_traffic.cpp", [])
    for op in OPS:
        emulator = [f"plain/{name}" for name in (*EMULATOR, f"{op}_entry")]
        linked(f"{op}.so", [*emulator, *(f"plain/{kernel}" for kernel in kernels_of(op))], SHARED)
        instrumented = [object_of("thread", kernel) for kernel in kernels_of(op)]
        linked(f"{op}_traffic.so", [*emulator, *instrumented, "count_traffic"], SHARED)
    return "\n".join(lines) + "\n"


def object_of(build, name):
    """Where a build has what is compiled from this source.

    Attention in float16 is that in bfloat16 with another type, and half of all that there is to compile: sanitizers see
    bfloat16 only.
    """
    return f"plain/{name}" if name.startswith("tree_attention_f16") else f"{build}/{name}"


def own_kernels_of(op):
    return sorted(path.stem for path in (ROOT / "csrc").glob(f"*/cuda/**/{op}*.cu"))


def source_of(kernel):
    """The path of a CUDA source, from the root of the repository, by its name without the suffix."""
    (path,) = (ROOT / "csrc").glob(f"*/cuda/**/{kernel}.cu")
    return str(path.relative_to(ROOT))


def kernels_of(op):
    return own_kernels_of(op) + (own_kernels_of(CALLS[op]) if op in CALLS else [])


@functools.cache
def made(target):
    """The path of a program (plain/planted_bugs, thread/OP) or of a library (OP.so, OP_traffic.so), up to date."""
    if reason := why_not():
        raise CannotRun(reason)
    build = target.partition("/")[0]
    if build in SANITIZERS and not links(build):
        raise CannotRun(f"{compiler()[0]} can't link with {' '.join(SANITIZERS[build])}")
    (ROOT / OUTPUT).mkdir(parents=True, exist_ok=True)
    with open(ROOT / OUTPUT / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        text, path = ninja_file(), ROOT / OUTPUT / "build.ninja"
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
        jobs = len(os.sched_getaffinity(0))
        command = [find_ninja(), "-f", f"{OUTPUT}/build.ninja", "-j", str(jobs), f"{OUTPUT}/{target}"]
        done = subprocess.run(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout
    return str(ROOT / OUTPUT / target)


@functools.cache
def links(build):
    """Whether the compiler has what a sanitizer needs at run time."""
    with tempfile.TemporaryDirectory() as folder:
        command = [*compiler(), *SANITIZERS[build], "-x", "c++", "-", "-o", f"{folder}/empty"]
        return subprocess.run(command, input="int main() {}", text=True, capture_output=True).returncode == 0


def run(target, *arguments):
    """Run a program, or one that lies elsewhere: its exit status and everything it prints."""
    command = [target if target.startswith("/") else made(target), *map(str, arguments)]
    status, output = output_of(command)
    # ThreadSanitizer of older compilers fails where addresses are randomised by more bits than it knows.
    if "unexpected memory mapping" in output:
        if output_of(["setarch", "-R", "true"])[0] != 0:
            raise CannotRun("ThreadSanitizer does not support this machine's randomised addresses")
        status, output = output_of(["setarch", "-R", *command])
    return status, output


def output_of(command):
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0", "TSAN_OPTIONS": "halt_on_error=1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    try:
        done = subprocess.run(command, env=environment, text=True, errors="replace", timeout=120, **pipes)
    except FileNotFoundError as error:
        return 127, str(error)
    return done.returncode, done.stdout
