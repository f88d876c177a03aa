"""Random valid calls: the CPU kernels against the definitions, in plain and in hostile settings. A program.

`python -m tests.fuzz.valid_calls SECONDS FIRST_SEED [OP ...]` makes calls of each op in turn until the time is up.
Each is made by both backends, which must agree, and once more with everything around it changed: threads, instruction
set, subnormals, autocast, default dtype and device; that one must agree to the last bit, but for what `set_cpu_isa`
changes. Prints a line for each op: calls, those that differ, and those that differ where they may (`is_near`), of which
there must not be many.
"""

import contextlib
import faulthandler
import sys
import time

import torch

from specdec_ops._core import loader
from tests.fuzz.calls import MAKERS, NAN, Case, Draws, make
from tests.harness.public_calls import tensors_of

# Of the greatest number beside it, to which a result may differ from the definition's: both round each once, and
# PyTorch's sums are in another order.
TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9, torch.float64: 2e-4}

MOST_NEAR = 0.05  # of the calls of an op
SHARP = 14.0  # between logits: e^-14 is below 2^-20


def tolerance_of(case: Case) -> float:
    """By the dtype of what it gets that holds the fewest bits."""
    found = [tensor.dtype for tensor in tensors_of([list(case.arguments.values())])]
    return max((TOLERANCE[dtype] for dtype in found if dtype in TOLERANCE), default=2e-4)


def differ(got: list[torch.Tensor], wanted: list[torch.Tensor], exactly: bool = False, tolerance: float = 2e-4) -> str:
    """What is not the same, or nothing."""
    if len(got) != len(wanted):
        return f"{len(got)} tensors and {len(wanted)}"
    for place, (one, other) in enumerate(zip(got, wanted, strict=True)):
        if one.dtype != other.dtype or one.shape != other.shape:
            return f"tensor {place}: {one.dtype} {list(one.shape)} and {other.dtype} {list(other.shape)}"
        if exactly or not one.dtype.is_floating_point:
            if not torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8)):
                return f"tensor {place}: {one.flatten()[:8].tolist()} and {other.flatten()[:8].tolist()}"
            continue
        a, b = one.double(), other.double()
        same = (a == b) | (a.isnan() & b.isnan())
        finite = b.where(b.isfinite(), 0.0).abs()
        allowed = max(tolerance, TOLERANCE.get(one.dtype, 0.15))
        close = (a - b).abs() <= allowed * (1 + finite.max() if finite.numel() else 0.0)
        if not (same | close).all():
            wrong = (~(same | close)).nonzero()[0].tolist()
            return f"tensor {place} at {wrong}: {a[tuple(wrong)]} and {b[tuple(wrong)]}"
    return ""


def is_near(name: str, case: Case) -> bool:
    """Whether float32, or the 16 bits of what it gets, may leave the result of a right call open.

    The definitions of acceptance and sampling count in float64. In float32 a token of a probability below 2^-20 can be
    what rounding makes of it: a residual that is 0 or that token alone. Drafts name such tokens here, and hardly ever
    where they were sampled. Exits are as exact as what they are computed from.
    """
    if name.endswith("exit") or name.startswith("exit"):
        return tolerance_of(case) > TOLERANCE[torch.float32]
    if not name.startswith(("accept", "sample")):
        return False
    temperature = case.arguments.get("temperature", 1.0)
    if isinstance(temperature, torch.Tensor):
        temperature = float(temperature.nan_to_num(0.0).min()) if len(temperature) else 1.0
    for rows in (value for key, value in case.arguments.items() if key.endswith("logits") or key == "target"):
        if rows is None or not rows.dtype.is_floating_point or rows.numel() == 0:
            continue
        rows = rows.double().where(rows.isfinite(), NAN).nan_to_num(0.0)
        if float((rows.amax(-1) - rows.amin(-1)).max()) > SHARP * min(max(temperature, 0.0), 1.0):
            return True
    return False


@contextlib.contextmanager
def hostile(draws: Draws):
    """Some settings of the process and the thread at once."""
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    with contextlib.ExitStack() as stack:
        stack.callback(torch.set_num_threads, threads)
        torch.set_num_threads(draws.of(1, 2, 3))
        if draws.chance(0.5):
            stack.callback(torch.set_flush_denormal, False)
            torch.set_flush_denormal(True)
        if draws.chance(0.3):
            stack.enter_context(torch.autocast("cpu", draws.of(torch.bfloat16, torch.float16)))
        if draws.chance(0.3):
            stack.callback(torch.set_default_dtype, dtype)
            torch.set_default_dtype(draws.of(torch.float64, torch.bfloat16))
        if draws.chance(0.3):
            stack.enter_context(torch.device("meta"))
        if draws.chance(0.3):
            stack.enter_context(draws.of(torch.inference_mode, torch.no_grad)())
        yield


def instruction_sets() -> list[str]:
    """Those that this processor has, the best last."""
    module, _ = loader.load()
    names = ["generic", "avx2", "avx512", "avx512_bf16", "amx"]
    return names[: names.index(module.cpu_isa()) + 1] if module.cpu_isa() in names else []


def check(name: str, seed: int) -> str:
    """What is wrong with a call; "near" if float32 could not decide."""
    case = make(name, seed)
    module, _ = loader.load()
    got = case.run(backend="cpu")
    of_definition = case  # which has no path_invariant, a matter of bits
    if name == "path_attention":
        of_definition = case._replace(arguments={**case.arguments, "path_invariant": False})
    wanted = of_definition.run(backend="torch")
    tolerance = tolerance_of(case)
    if wrong := differ(got, wanted, tolerance=tolerance):
        if is_near(name, case):
            return "near"
        return f"cpu and torch: {wrong}"
    draws = Draws(seed)
    with hostile(draws):
        again = case.run(backend="cpu")
    if wrong := differ(again, got, exactly=True):
        return f"other settings: {wrong}"
    try:
        module.set_cpu_isa(draws.of(*instruction_sets()))
        lesser = case.run(backend="cpu")
    finally:
        module.set_cpu_isa("")
    if wrong := differ(lesser, wanted, tolerance=tolerance):
        if is_near(name, case):
            return "near"
        return f"another instruction set: {wrong}"
    return ""


def main(seconds: float, seed: int, names: list[str]) -> int:
    faulthandler.enable()
    counts = {name: [0, 0, 0] for name in names}
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        for name in names:
            print(f"{name} {seed}", file=sys.stderr, flush=True)  # of a crash this is the last line
            try:
                wrong = check(name, seed)
            except Exception as error:  # of a valid call none is right
                wrong = f"{type(error).__name__}: {error}"
            counts[name][0] += 1
            if wrong == "near":
                counts[name][2] += 1
            elif wrong:
                counts[name][1] += 1
                print(f"{name} {seed}: {wrong}", flush=True)
        seed += 1
    for name, (calls, different, near) in counts.items():
        print(f"= {name} {calls} {different} {near}")
    return int(any(different or near > 2 + MOST_NEAR * calls for calls, different, near in counts.values()))


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]), int(sys.argv[2]), sys.argv[3:] or list(MAKERS)))
