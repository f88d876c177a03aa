"""What is timed, and the rule that comes first: a wrong result gets no time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass
class Contestant:
    """One way to compute a case.

    role: "ours", "pytorch" or "library" (peers, PyTorch's own forms and those of other packages: the ratio is against
        the fastest of them) or "control" (a yardstick that computes something else, such as a plain read of K and V; it
        is timed, never checked, never a peer).
    to_result: brings what `call` returns to the form that the check expects.
    reads: the large tensors it reads, evicted before each cold call.
    cold_call: what is called in place of `call` where the inputs are evicted before, if that is another way.
    before, after: run around each call, untimed.
    isa: the instruction set that it is held to, if it is: it is judged by that set's multiply-adds.
    graph: whether a CUDA graph can hold the call. One that plans on the host can't be captured and is timed in a loop.
    problem: why it gets no time ("WRONG ..." or the reason why it can't run), or "".
    """

    name: str
    role: str
    call: Callable[[], Any]
    to_result: Callable[[Any], Any] = lambda result: result
    reads: Sequence[torch.Tensor] = ()
    cold_call: Callable[[], Any] | None = None
    before: Callable[[], Any] | None = None
    after: Callable[[], Any] | None = None
    error: float | None = None
    isa: str = ""
    graph: bool = True
    problem: str = ""

    def run(self) -> Any:
        if self.before is not None:
            self.before()
        try:
            return self.call()
        finally:
            if self.after is not None:
                self.after()


def unavailable(name: str, role: str, reason: str) -> Contestant:
    """A contestant that can't take part, listed with the reason."""
    return Contestant(name, role, call=lambda: None, problem=reason)


def on_backends(ours: Callable[[str, str], Contestant], options) -> list[Contestant]:
    """ours(backend, name) for the backend that the op itself chooses, and for each that was asked for beside it."""
    named = [(backend, f"specdec_ops {backend}") for backend in options.backends]
    return [ours(*each) for each in (("auto", "specdec_ops"), *named)]


def compiled(form: Callable, **options) -> Callable:
    """`form` compiled for every shape that it is called with.

    PyTorch gives up compiling a function after eight shapes, and then runs it as it is with no more than a warning.
    """
    config = torch._dynamo.config
    config.cache_size_limit = config.accumulated_cache_size_limit = 1 << 20
    return torch.compile(form, dynamic=False, **options)


@dataclass
class Expected:
    """Parts of the exact result, with the error that each part may have: one number, or one for each of its figures.

    take: picks from a result the parts (tensors) that were computed exactly; checking all of a large case in float64
        would take longer than timing it.
    excuse: whether a result with errors is right nevertheless, because rounding may decide it either way.
    """

    take: Callable[[Any], list[torch.Tensor]]
    exact: list[torch.Tensor]
    allowed: list[float | torch.Tensor]
    excuse: Callable[[Any], bool] | None = None

    def worst(self, result: Any) -> float:
        """The largest error, as a multiple of what is allowed. NaN counts as infinitely wrong."""
        worst = 0.0
        for got, exact, allowed in zip(self.take(result), self.exact, self.allowed, strict=True):
            if got.shape != exact.shape:
                return float("inf")
            error = (got.double() - exact.double()).abs()
            share = torch.where(error == 0, 0.0, error / torch.as_tensor(allowed, device=error.device))
            if share.numel():
                worst = max(worst, float("inf") if share.isnan().any() else float(share.max()))
        return 0.0 if worst > 0 and self.excuse is not None and self.excuse(result) else worst


def largest_error(got: torch.Tensor, exact: torch.Tensor) -> float:
    error = (got.double() - exact.double()).abs()
    return float("inf") if not torch.isfinite(error).all() else float(error.max()) if error.numel() else 0.0


def allowed_error(exact: torch.Tensor, torch_error: float, bound: torch.Tensor) -> torch.Tensor:
    """The larger of twice the error of plain PyTorch in the same dtype, and of what roundings may do (rounding.py).

    Neither alone will do: PyTorch's error may by chance be nothing, and where its dtype makes it round more often than
    the bound provides for, others may do so too. It counts up to a tenth of the result: it must excuse no wrong mask.
    """
    return bound.clamp(min=min(2 * torch_error, 0.1 * float(exact.abs().max())))


# Peers need not keep our rule; they get no time when they are clearly wrong.
LENIENCE = {"ours": 1.0, "pytorch": 2.0, "library": 2.0}
PEERS = ("pytorch", "library")


def check(contestant: Contestant, expected: Expected) -> Contestant:
    """Run a contestant once and set `problem` unless its result is right. Controls are only run."""
    if contestant.problem:
        return contestant
    try:
        result = contestant.run()
        if contestant.role != "control":
            contestant.error = expected.worst(contestant.to_result(result))
    except Exception as error:  # a contestant that fails must not end the run
        contestant.problem = f"fails: {short(error)}"
        return contestant
    if contestant.error is not None and not contestant.error <= LENIENCE[contestant.role]:
        contestant.problem = f"WRONG: error is {contestant.error:.3g} times what is allowed"
    return contestant


def short(error: BaseException, length: int = 120) -> str:
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= length else text[: length - 3] + "..."
