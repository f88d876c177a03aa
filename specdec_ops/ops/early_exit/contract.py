"""The contracts of exit_confidence, of its forms that read less (screened_exit, bounded_exit), and of exit_mlp.

A number that has a tensor [rows] beside it, such as `temperature` and `temperatures`, counts where the tensor is None.
"""

from typing import NamedTuple, get_type_hints

import torch

from specdec_ops._core.library import Operator


class ExitConfidenceArguments(NamedTuple):
    """Hidden rows, a head, and what makes a decision. All contiguous, but for the rows of hidden."""

    hidden: torch.Tensor
    """[rows, dim]"""
    head: torch.Tensor
    """[vocab, dim], floating or int8"""
    scales: torch.Tensor | None
    """float32 [vocab] of an int8 head"""
    norm_weight: torch.Tensor | None
    """[dim] of the RMSNorm before the head; None: no norm"""
    norm_eps: float
    bias: torch.Tensor | None
    """float32 [vocab]; -inf masks an entry"""
    temperature: float
    temperatures: torch.Tensor | None
    """float32"""
    token_map: torch.Tensor | None
    """int32 [vocab]: the token of each entry; None: entries are tokens"""
    threshold: float
    thresholds: torch.Tensor | None
    """float32"""
    measure: str
    """"max_prob", "margin" or "entropy": what is compared; "": no decision"""
    level: str
    """"row", or "any" or "all": one decision for all rows"""


class ExitConfidenceOutputs(NamedTuple):
    """What the head says of each row; from `exited` on, the decision, which is None without a measure."""

    token: torch.Tensor
    """int32 [rows]"""
    max_prob: torch.Tensor
    """float32 [rows], like the next three"""
    margin: torch.Tensor
    entropy: torch.Tensor
    logsumexp: torch.Tensor
    top_tokens: torch.Tensor | None
    """int32 [rows, top_k]; None without top_k"""
    top_logprobs: torch.Tensor | None
    """float32 like top_tokens"""
    status: torch.Tensor
    """int32 [rows]: ExitStatus bits"""
    exited: torch.Tensor | None
    """bool [rows]"""
    active_rows: torch.Tensor | None
    """int32 [rows]: the rows that do not exit, then -1"""
    inverse: torch.Tensor | None
    """int32 [rows]: the place of each row in active_rows, or -1"""
    num_active: torch.Tensor | None
    """int32 [1]"""


def _extended(kind: type, **fields: type) -> type:
    """A NamedTuple with further fields behind those of `kind`."""
    return NamedTuple(f"_{kind.__name__}AndMore", [*get_type_hints(kind).items(), *fields.items()])


class ScreenedExitArguments(
    _extended(
        ExitConfidenceArguments,
        screen_values=torch.Tensor,
        screen_scales=torch.Tensor,
        error_norms=torch.Tensor,
        norms=torch.Tensor,
        error_gain=torch.Tensor,
        tolerance=float,
    )
):
    """Those of exit_confidence and a screen: an int8 copy of the head, with what is known of its error.

    screen_values int8 [vocab, dim]; screen_scales, error_norms and norms float32 [vocab]; error_gain float32 [1];
    tolerance of max_prob and margin.
    """

    __slots__ = ()


class ScreenedExitOutputs(_extended(ExitConfidenceOutputs, rechecked=torch.Tensor)):
    """Those of exit_confidence, and rechecked int32 [rows]: entries that were read in full precision."""

    __slots__ = ()


class BoundedExitArguments(_extended(ExitConfidenceArguments, norms_after=torch.Tensor, ends=list[int])):
    """Those of exit_confidence, with a measure, and bounds.

    norms_after float32 [parts]: not below the length of any row of the head behind a part; ends: of the parts, the last
    one is vocab.
    """

    __slots__ = ()


class BoundedExitOutputs(_extended(ExitConfidenceOutputs, seen=torch.Tensor)):
    """Those of exit_confidence, and seen int32 [rows]: entries that a row's statistics are of."""

    __slots__ = ()


def _make_stats(arguments, empty, top_k: int) -> dict:
    """The outputs that all forms have."""
    rows, device, decides = arguments.hidden.shape[0], arguments.hidden.device, bool(arguments.measure)

    def of_rows(dtype, *more):
        return empty((rows, *more), dtype, device)

    return {
        "token": of_rows(torch.int32),
        "max_prob": of_rows(torch.float32),
        "margin": of_rows(torch.float32),
        "entropy": of_rows(torch.float32),
        "logsumexp": of_rows(torch.float32),
        "top_tokens": of_rows(torch.int32, top_k) if top_k else None,
        "top_logprobs": of_rows(torch.float32, top_k) if top_k else None,
        "status": of_rows(torch.int32),
        "exited": of_rows(torch.bool) if decides else None,
        "active_rows": of_rows(torch.int32) if decides else None,
        "inverse": of_rows(torch.int32) if decides else None,
        "num_active": empty((1,), torch.int32, device) if decides else None,
    }


def _make_whole(arguments, empty, *, top_k: int) -> ExitConfidenceOutputs:
    return ExitConfidenceOutputs(**_make_stats(arguments, empty, top_k))


def _make_screened(arguments, empty, *, top_k: int) -> ScreenedExitOutputs:
    rechecked = empty((arguments.hidden.shape[0],), torch.int32, arguments.hidden.device)
    return ScreenedExitOutputs(**_make_stats(arguments, empty, top_k), rechecked=rechecked)


def _make_bounded(arguments, empty, *, top_k: int) -> BoundedExitOutputs:
    seen = empty((arguments.hidden.shape[0],), torch.int32, arguments.hidden.device)
    return BoundedExitOutputs(**_make_stats(arguments, empty, top_k), seen=seen)


def _answers_exit(arguments, outputs) -> bool:
    if arguments.hidden.shape[0]:
        return False
    if outputs.num_active is not None:
        outputs.num_active.zero_()
    return True


exit_confidence = Operator(
    "exit_confidence", ExitConfidenceArguments, ExitConfidenceOutputs, _make_whole, answers=_answers_exit
)
screened_exit = Operator(
    "screened_exit", ScreenedExitArguments, ScreenedExitOutputs, _make_screened, answers=_answers_exit
)
bounded_exit = Operator("bounded_exit", BoundedExitArguments, BoundedExitOutputs, _make_bounded, answers=_answers_exit)


class ExitMlpArguments(NamedTuple):
    """Features and the layers of a decision model: up to 8, with ReLU between them."""

    features: torch.Tensor
    """[rows, inputs], its last dimension contiguous"""
    weights: list[torch.Tensor]
    """of each layer, [outputs, inputs], contiguous; the last has one output"""
    biases: list[torch.Tensor]
    """float32 [outputs] of each layer"""
    threshold: float


class ExitMlpOutputs(NamedTuple):
    """What the model says."""

    score: torch.Tensor
    """float32 [rows]"""
    stop: torch.Tensor
    """bool [1]: no row's score is above the threshold"""


def _make_scores(arguments: ExitMlpArguments, empty) -> ExitMlpOutputs:
    rows, device = arguments.features.shape[0], arguments.features.device
    return ExitMlpOutputs(empty((rows,), torch.float32, device), empty((1,), torch.bool, device))


def _answers_mlp(arguments: ExitMlpArguments, outputs: ExitMlpOutputs) -> bool:
    if arguments.features.shape[0]:
        return False
    outputs.stop.fill_(True)
    return True


exit_mlp = Operator("exit_mlp", ExitMlpArguments, ExitMlpOutputs, _make_scores, answers=_answers_mlp)
