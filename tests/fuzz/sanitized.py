"""A build of the compiled module under AddressSanitizer and UndefinedBehaviorSanitizer, and what runs Python with it.

`python -m tests.fuzz.sanitized` compiles it into build/sanitized: every CPU kernel and the bindings, once; later calls
compile what has changed. `environment()` is what a process needs that is to use it in the place of the other module.
"""

import os
import runpy
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDER = Path("build", "sanitized")  # of ROOT
MODULE = FOLDER / "module.so"
VARIABLE = "SPECDEC_OPS_FUZZED_MODULE"  # tests/fuzz/__init__.py loads what it names
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-g1"]


def build() -> None:
    """Compile what has changed. -O1: with more the instrumented kernels take twice as long to compile."""
    os.chdir(ROOT)
    os.environ["SPECDEC_OPS_BUILD"] = "cpu"
    setup = runpy.run_path("setup.py")
    setup["CXX_FLAGS"][setup["CXX_FLAGS"].index("-O3")] = "-O1"
    made = setup["Build"]("sanitized")
    made.cxx += SANITIZE
    made.folder = FOLDER
    made.run(MODULE)


def environment() -> dict[str, str]:
    """Variables of a process: the sanitizers' runtime comes first, and a finding ends the process."""
    runtimes = (
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so", "libstdc++.so")
    )
    return {
        VARIABLE: str(ROOT / MODULE),
        "LD_PRELOAD": " ".join(runtimes),
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1",  # the interpreter does not give back all that it takes
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }


if __name__ == "__main__":
    build()
