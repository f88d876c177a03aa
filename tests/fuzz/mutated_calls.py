"""Valid calls of which something was changed by hand. A program.

`python -m tests.fuzz.mutated_calls SECONDS FIRST_SEED [OP ...]` makes calls of each op in turn until the time is up.
Each is answered or refused in one sentence of ours, and by the CPU kernels and the definition alike: same sentence, or
the same answer. Prints a line for each op: calls, and those where that is not so.
"""

import copy
import dataclasses
import faulthandler
import math
import sys
import time

import torch

import specdec_ops
from tests.fuzz.calls import MAKERS, Draws, copied, make
from tests.fuzz.valid_calls import differ, is_near, tolerance_of
from tests.harness.public_calls import tensors_of

SLOWEST = 60  # seconds of a call; beyond that it hangs
WILD = (-(2**63), -(2**31), -(2**30), -2, -1, 0, 1, 2, 3, 7, 40, 1000, 2**20, 2**30, 2**31 - 1, 2**31, 2**40, 2**63 - 1)
WILD_FLOATS = (math.nan, math.inf, -math.inf, 3.4e38, -3.4e38, 1e-45, -1e-45, 0.0, -0.0, 1.0, 1e30, -1e30, 1e-30)
DTYPES = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.uint64, torch.bool)
DTYPES += (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.complex64)


def wild_values(draws: Draws, tensor: torch.Tensor) -> torch.Tensor:
    """Some of its numbers, or all, become any numbers."""
    if tensor.dtype.is_floating_point:
        numbers = torch.tensor([draws.of(*WILD_FLOATS) for _ in range(16)], dtype=torch.float64, device="cpu")
    elif tensor.dtype == torch.bool:
        return ~tensor
    elif tensor.dtype.is_complex:
        return tensor
    else:
        limits = torch.iinfo(tensor.dtype)
        numbers = torch.tensor([min(max(draws.of(*WILD), limits.min), limits.max) for _ in range(16)], device="cpu")
    result = copied(tensor)
    if tensor.numel():
        shape = tuple(tensor.shape)
        chosen = draws.normal(shape) > draws.of(-9.0, 0.0, 1.5)
        values = numbers[draws.ints(0, 16, *shape).long()].to(tensor.dtype)
        result = (
            torch.where(chosen, values, tensor)
            if 0 in tensor.stride()
            else result.copy_(torch.where(chosen, values, tensor))
        )
    return result


def other_layout(draws: Draws, tensor: torch.Tensor):
    """Another shape, other strides, another device, or no tensor at all."""
    dim = draws.int(0, max(tensor.dim() - 1, 0))
    kind = draws.of(
        "shorter", "empty", "more", "flat", "expanded", "turned", "every second", "meta", "one", "list", "array"
    )
    if kind == "flat":
        return tensor.flatten()
    if kind == "more":
        return tensor.unsqueeze(dim)
    if kind == "meta":
        return tensor.to("meta")
    if tensor.dim() == 0 and kind in ("turned", "every second"):
        return tensor.expand(2)
    if kind == "list":
        return tensor.tolist() if tensor.numel() < 99 else [1, 2]
    if kind == "array":
        return tensor.detach().float().numpy() if tensor.device.type == "cpu" else None
    if tensor.dim() == 0:
        return tensor.expand(2)
    if kind in ("shorter", "empty", "one"):
        kept = {"shorter": tensor.shape[dim] - 1, "empty": 0, "one": 1}[kind]
        return tensor.narrow(dim, 0, max(0, min(kept, tensor.shape[dim])))
    if kind == "expanded":
        return tensor.narrow(dim, 0, 1).expand(tensor.shape) if tensor.shape[dim] else tensor
    if kind == "turned":
        return tensor.transpose(dim, -1)
    return torch.repeat_interleave(tensor, 2, dim)[(slice(None),) * dim + (slice(None, None, 2),)]


def mutated(draws: Draws, value):
    """The value with one thing changed."""
    if isinstance(value, torch.Tensor) and value.is_meta:
        return value
    if isinstance(value, torch.Tensor):
        kind = draws.of("values", "values", "layout", "layout", "dtype", "grad")
        if kind == "values":
            return wild_values(draws, value)
        if kind == "layout":
            return other_layout(draws, value)
        if kind == "dtype":
            return value.to(draws.of(*DTYPES))
        return value.detach().clone().requires_grad_() if value.dtype.is_floating_point else value
    if dataclasses.is_dataclass(value):
        return mutated_object(draws, value)
    if isinstance(value, bool | str) or value is None:
        return draws.of(None, True, 1, "", "any", "cpu", 0.5, torch.zeros(2))
    if isinstance(value, int):
        return draws.of(*WILD, 0.5, None, "1", True, 2**64, torch.tensor(1))
    if isinstance(value, float):
        return draws.of(*WILD_FLOATS, 0, 1, None, "1", 2**64, torch.tensor(0.5))
    if isinstance(value, list | tuple) and len(value):
        parts, place = list(value), draws.int(0, len(value) - 1)
        if draws.chance(0.2):
            del parts[place]
        else:
            parts[place] = mutated(draws, parts[place])
        return type(value)(parts)
    if isinstance(value, dict):
        name = draws.of(*value)
        return {**value, name: mutated(draws, value[name])}
    return draws.of(None, 1, (), "x")


def mutated_object(draws: Draws, value):
    """One of its fields is another, as far as it can be; or the numbers in one are overwritten."""
    names = [field.name for field in dataclasses.fields(value) if getattr(value, field.name) is not None]
    if not names:
        return None
    name = draws.of(*names)
    part = getattr(value, name)
    if isinstance(part, torch.Tensor) and part.is_contiguous() and not part.is_meta and draws.chance(0.5):
        other = copy.deepcopy(value)
        getattr(other, name).copy_(wild_values(draws, part))
        return other
    return dataclasses.replace(value, **{name: mutated(draws, part)})


def outcome(function):
    """What a call returns, or the error that it raises."""
    try:
        return function()
    except Exception as error:
        return error


def is_ours(error: Exception) -> bool:
    """One sentence, of a kind that is promised. PyTorch's own word for too little memory will do."""
    text = str(error)
    if isinstance(error, MemoryError | RuntimeError) and "allocate memory" in text:
        return True
    kinds = (TypeError, ValueError, RuntimeError, MemoryError)
    return type(error) in kinds and text.startswith("specdec_ops.") and "\n" not in text


def check(name: str, seed: int) -> str:
    """What is wrong, or nothing."""
    draws, case = Draws(seed), make(name, seed)
    made = case.arguments
    try:
        arguments = dict(made)
        for _ in range(draws.of(1, 1, 1, 2, 3)):
            changed = draws.of(*(name for name in arguments if name != "levels"))
            arguments[changed] = mutated(draws, arguments[changed])
    except (TypeError, ValueError, RuntimeError) as error:  # an object that can't be made so
        refused = is_ours(error) or "CandidatePool" in str(error) or "field" in str(error)
        refused = refused or "unexpected keyword" in str(error)
        return "" if refused else f"made: {type(error).__name__}: {error}"
    case = case._replace(arguments=arguments)
    plain = case
    if name == "path_attention" and case.arguments.get("path_invariant") is True:
        plain = case._replace(arguments={**case.arguments, "path_invariant": False})
    got, wanted = outcome(lambda: case.run(backend="cpu")), outcome(lambda: plain.run(backend="torch"))
    for backend, found in (("cpu", got), ("torch", wanted)):
        if isinstance(found, Exception) and not is_ours(found):
            return f"{backend}: {type(found).__name__}: {str(found)[:300]!r}"
    if isinstance(got, RuntimeError) and "is unavailable" in str(got):
        return ""  # these kernels don't take what the definition does
    if isinstance(got, Exception) or isinstance(wanted, Exception):
        same = type(got) is type(wanted) and str(got) == str(wanted)
        return "" if same else f"not alike: cpu {describe(got)}, torch {describe(wanted)}"
    if any(tensor.is_meta for tensor in got) or not is_judged(name, case.arguments, made, got):
        return ""
    wrong = differ(got, wanted, tolerance=tolerance_of(case))
    if wrong and is_near(name, case):
        return ""
    return f"not alike: {wrong}" if wrong else ""


def is_judged(name: str, arguments: dict, made: dict, got: list[torch.Tensor]) -> bool:
    """Whether the numbers of an answer mean something, and are not what the order of some steps makes of them."""
    numbers = [tensor for tensor in tensors_of([list(arguments.values())]) if tensor.dtype.is_floating_point]
    for tensor in numbers:
        size = tensor.double().abs()
        if not ((size == 0) | ((size > 1e-30) & (size < 1e15))).all():
            return False
    if any(tensor.dtype.is_floating_point and (tensor.double().abs() > 1e4).any() for tensor in got):
        return False
    if name in ("screened_exit", "bounded_exit") and any(
        arguments[key] is not made[key] for key in ("screen", "bounds") if key in made
    ):
        return False  # bounds of another head
    places = [arguments.get(key) for key in ("page_table", "slots")] if name.startswith("kv_") else []
    return all(place is None or len(place.unique()) == place.numel() for place in places)  # else writes cross


def describe(found) -> str:
    return f"{type(found).__name__}: {found}" if isinstance(found, Exception) else "answers"


def main(seconds: float, seed: int, names: list[str]) -> int:
    faulthandler.enable()
    counts = {name: [0, 0] for name in names}
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        for name in names:
            print(f"{name} {seed}", file=sys.stderr, flush=True)  # of a crash this is the last line
            faulthandler.dump_traceback_later(SLOWEST, exit=True)
            wrong = check(name, seed)
            counts[name][0] += 1
            if wrong:
                counts[name][1] += 1
                print(f"{name} {seed}: {wrong}", flush=True)
        seed += 1
    faulthandler.cancel_dump_traceback_later()
    for name, (calls, different) in counts.items():
        print(f"= {name} {calls} {different}")
    return int(any(different for _, different in counts.values()))


if __name__ == "__main__":
    assert specdec_ops.backends("linear")["cpu"] is None, "there are no CPU kernels in this build"
    sys.exit(main(float(sys.argv[1]), int(sys.argv[2]), sys.argv[3:] or list(MAKERS)))
