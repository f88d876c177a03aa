"""Loads the compiled module once, when it is first needed, and remembers why it can't be loaded."""

import functools
from pathlib import Path
from types import ModuleType


@functools.cache
def load() -> tuple[ModuleType | None, str | None]:
    """Return `(module, None)`, or `(None, reason)` when the compiled kernels are not there.

    PyTorch must have been imported before, so that both share one OpenMP runtime: the one that PyTorch brings.
    """
    try:
        from specdec_ops import _C
    except ImportError as error:
        source = Path(__file__).parents[2]
        hint = f"run `pip install -e .` in {source}" if (source / "setup.py").exists() else "reinstall specdec_ops"
        return None, f"the compiled kernels are unavailable ({error}); {hint}"
    return _C, None
