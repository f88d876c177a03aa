"""Programs that call the ops as no test would: random valid calls, mutated ones, hostile settings, racing writers.

`make fuzz` runs all of them in processes of their own, and so does `make fuzz-sanitized` with a build under
AddressSanitizer and UndefinedBehaviorSanitizer, which takes the place of the compiled module here.
"""

import importlib.util
import os
import sys

_NAME = "specdec_ops._C"

if (_path := os.environ.get("SPECDEC_OPS_FUZZED_MODULE")) and _NAME not in sys.modules:
    import torch  # noqa: F401 (both share one OpenMP runtime: the one that PyTorch brings)

    _spec = importlib.util.spec_from_file_location(_NAME, _path)
    sys.modules[_NAME] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules[_NAME])
