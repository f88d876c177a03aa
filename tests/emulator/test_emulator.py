"""The emulator of CUDA kernels catches what it is for: bugs planted in small kernels that are right without them."""

import re
import shutil
import subprocess

import pytest
import torch

from . import build

WRONG = r"^wrong result in "
DEADLOCK = r"^deadlock in block \(\d+, 0, 0\)\n  threads [\d,-]+: "
RACE = r"WARNING: ThreadSanitizer: data race"
POISONED = r"AddressSanitizer: use-after-poison"
OVERFLOW = r"AddressSanitizer: heap-buffer-overflow"


def error(what):
    """An error of the emulator: what, where, and who."""
    return rf"^{what} at [\w/]*planted_bugs\.cpp:\d+, thread \d+ in block \(0, 0, 0\)\n"


def everywhere(what):
    return {"plain": what, "address": what, "thread": what}


# What each build says. A build that is not named has no way to know, or may or may not.
BUGS = {
    "missing-barrier": {"plain": WRONG, "address": WRONG, "thread": RACE},
    "static-overflow": {"address": r"runtime error: index 4 out of bounds"},
    "divergent-barrier": {"plain": DEADLOCK, "address": DEADLOCK, "thread": rf"{RACE}|{DEADLOCK}"},
    "two-barriers": everywhere(error("divergent barrier: threads meet in different calls of block_sync")),
    "exit-before-barrier": everywhere(
        DEADLOCK + r"exited\n  threads 0-95: wait in block_sync at .*planted_bugs\.cpp:\d+\n"
    ),
    "part-of-a-warp": everywhere(DEADLOCK + r"exited|wait in warp_shuffle of lanes ffffffff at "),
    "no-warp-sync": {"plain": WRONG, "address": WRONG, "thread": RACE},
    "no-atomic": {"thread": RACE},
    "no-fence": {"thread": RACE},
    "missing-wait": {"plain": WRONG, "address": POISONED, "thread": WRONG},
    "never-waits": {"plain": error("an asynchronous copy is never waited for"), "address": POISONED},
    "no-barrier-after-wait": {"plain": WRONG, "address": POISONED, "thread": RACE},
    "no-barrier-before-reuse": {"plain": WRONG, "address": POISONED, "thread": RACE},
    "wrong-stage": everywhere(error("the destination of cp_async_16 is not inside one array in shared memory")),
    "dynamic-overflow": {"address": OVERFLOW},
    "too-much-shared": everywhere(
        error("an array in shared memory ends at byte 6160, the launch asked for 6144 bytes")
    ),
    "different-arrays": everywhere(error("threads cut the shared memory into different arrays")),
    "unaligned-row": everywhere(error("a row of ldmatrix is not aligned to 16 bytes")),
    "wrong-lanes": everywhere(WRONG),
    "global-overflow": {"address": OVERFLOW},
    "unaligned-load": everywhere(error("the address of load_16 is not aligned to 16 bytes")),
    "unaligned-pack": {"address": r"runtime error: .* misaligned address"},
    "shift-too-far": {"plain": WRONG, "address": r"runtime error: shift exponent 64 is too large"},
    "lane-not-named": everywhere(error("warp_ballot is called by a lane that it does not name")),
    "group-too-few": everywhere(DEADLOCK + r"exited\n  threads 0-31: wait in group_sync 1 of 64 threads at "),
    "group-counts-differ": everywhere(error("threads name different numbers for one group barrier")),
}


def run(name, *arguments):
    try:
        return build.run(name, *arguments)
    except build.CannotRun as reason:
        pytest.skip(str(reason))


@pytest.mark.parametrize("sanitizer", build.SANITIZERS)
def test_right_kernels_are_right(sanitizer):
    """In every order of threads and blocks, and in the eyes of every sanitizer."""
    status, output = run(f"{sanitizer}/planted_bugs", "none")
    assert status == 0, output


@pytest.mark.parametrize(("bug", "sanitizer"), [(bug, sanitizer) for bug, found in BUGS.items() for sanitizer in found])
def test_planted_bug(bug, sanitizer):
    status, output = run(f"{sanitizer}/planted_bugs", bug)
    assert status != 0
    assert re.search(BUGS[bug][sanitizer], output, re.MULTILINE), output
    assert "of no use afterwards" not in output


def test_every_planted_bug_is_tested():
    source = (build.FOLDER / "planted_bugs.cpp").read_text()
    names = re.search(r"kNames\[\] = \{(.*?)\};", source, re.DOTALL)[1]
    assert re.findall(r'"([\w-]+)"', names) == ["none", *BUGS]


RIGHT = "all kernels ran, 0 values are wrong\n"


@pytest.mark.parametrize("sanitizer", build.SANITIZERS)
def test_names_mean_what_they_mean_on_a_gpu(sanitizer):
    status, output = run(f"{sanitizer}/device_names")
    assert status == 0 and output.endswith(RIGHT), output


@pytest.mark.gpu
def test_names_on_a_gpu(tmp_path):
    """The same program from nvcc; without a GPU it is only compiled, which takes every line of PTX to the assembler."""
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if nvcc is None:
        pytest.skip("there is no nvcc")
    program = tmp_path / "device_names"
    sources = [build.FOLDER / "device_names.cpp", build.ROOT / "csrc" / "common" / "cuda" / "memory.cu"]
    arch = "native" if torch.cuda.is_available() else "sm_80"
    options = ["-std=c++17", f"-arch={arch}", f"-I{build.ROOT / 'csrc'}", "-x", "cu", "-o", program]
    done = subprocess.run([nvcc, *options, *sources], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    if torch.cuda.is_available():
        assert build.output_of([program]) == (0, RIGHT)
