"""The early exit ops as torch.library operators; see _library for when a call goes through them."""

import torch

from . import _alloc, _dispatch
from ._library import define, fake_empty, short_cut

_NAMESPACE = torch.ops.specdec_ops

# exit_confidence. `arguments` is everything from hidden to level, in the order of the schema below. Outputs: those of
# Confidence, then those of Exit, which are None (empty, in the operator) without a measure.

_EXIT_CONFIDENCE = (
    "Tensor hidden, Tensor head, Tensor? scales, Tensor? norm_weight, float norm_eps, Tensor? bias, "
    "float temperature, Tensor? temperatures, Tensor? token_map, float threshold, Tensor? thresholds, str measure, "
    "str level"
)
_OUTPUTS = (
    *("token", "max_prob", "margin", "entropy", "logsumexp", "top_tokens", "top_logprobs", "status"),
    *("exited", "active_rows", "inverse", "num_active"),
)
_OPTIONAL = ("top_tokens", "top_logprobs", "exited", "active_rows", "inverse", "num_active")


def exit_confidence(arguments: tuple, top_k: int, backend: str, out: tuple | None = None) -> tuple:
    """Checked arguments in; the tensors of Confidence and Exit out, None where there are none."""
    return _call("exit_confidence", arguments, (), top_k, backend, out)


def screened_exit(arguments: tuple, screen: tuple, top_k: int, backend: str, out: tuple | None = None) -> tuple:
    """The same with a screen (values, scales, error_norms, norms, error_gain, tolerance); rechecked comes last."""
    return _call("screened_exit", arguments, screen, top_k, backend, out)


def _call(name: str, arguments: tuple, screen: tuple, top_k: int, backend: str, out: tuple | None) -> tuple:
    outputs = _OUTPUTS if name == "exit_confidence" else (*_OUTPUTS, "rechecked")
    run_out = _run_exit_confidence_out if name == "exit_confidence" else _run_screened_exit_out
    tensors = (*arguments[:4], arguments[5], arguments[7], arguments[8], arguments[10], *screen[:5])
    if short_cut(*(tensors if out is None else tensors + out)):
        if out is None:
            out = _outputs(_alloc.empty, arguments, top_k, name)
        run_out(*arguments, *screen, backend, *out)
    elif out is None:
        results = getattr(_NAMESPACE, name)(*arguments, *screen, backend, top_k)
        decides = bool(arguments[11])
        wanted = (top_k > 0 if n.startswith("top_") else decides or n not in _OPTIONAL for n in outputs)
        return tuple(result if given else None for result, given in zip(results, wanted, strict=True))
    else:
        getattr(_NAMESPACE, name).out(*arguments, *screen, backend, **dict(zip(outputs, out, strict=True)))
    return out


def _outputs(empty, arguments: tuple, top_k: int, name: str = "exit_confidence") -> tuple:
    rows, device, decides = arguments[0].shape[0], arguments[0].device, bool(arguments[11])
    return (
        empty((rows,), torch.int32, device),
        empty((rows,), torch.float32, device),
        empty((rows,), torch.float32, device),
        empty((rows,), torch.float32, device),
        empty((rows,), torch.float32, device),
        empty((rows, top_k), torch.int32, device) if top_k else None,
        empty((rows, top_k), torch.float32, device) if top_k else None,
        empty((rows,), torch.int32, device),
        empty((rows,), torch.bool, device) if decides else None,
        empty((rows,), torch.int32, device) if decides else None,
        empty((rows,), torch.int32, device) if decides else None,
        empty((1,), torch.int32, device) if decides else None,
        *((empty((rows,), torch.int32, device),) if name == "screened_exit" else ()),
    )


def _filled(outputs: tuple, empty, device) -> tuple:
    """An operator can't return None for a Tensor."""
    return tuple(empty((0,), torch.int32, device) if output is None else output for output in outputs)


def _run_exit_confidence(*arguments):
    *arguments, backend, top_k = arguments
    out = _outputs(_alloc.empty, arguments, top_k)
    _run_exit_confidence_out(*arguments, backend, *out)
    return _filled(out, _alloc.empty, arguments[0].device)


def _run_exit_confidence_out(*arguments):
    hidden, num_active = arguments[0], arguments[-1]
    implementation = _dispatch.resolve("exit_confidence", arguments[13], hidden)
    if hidden.shape[0]:
        implementation(*arguments[:13], *arguments[14:])
    elif num_active is not None:
        num_active.zero_()


def _fake_exit_confidence(*arguments):
    *arguments, _, top_k = arguments
    return _filled(_outputs(fake_empty, arguments, top_k), fake_empty, arguments[0].device)


def _run_screened_exit(*arguments):
    *arguments, backend, top_k = arguments
    out = _outputs(_alloc.empty, arguments, top_k, "screened_exit")
    _run_screened_exit_out(*arguments, backend, *out)
    return _filled(out, _alloc.empty, arguments[0].device)


def _run_screened_exit_out(*arguments):
    hidden, num_active, rechecked = arguments[0], arguments[-2], arguments[-1]
    implementation = _dispatch.resolve("screened_exit", arguments[19], hidden)
    if hidden.shape[0]:
        implementation(*arguments[:13], *arguments[20:-1], *arguments[13:19], rechecked)
    elif num_active is not None:
        num_active.zero_()


def _fake_screened_exit(*arguments):
    *arguments, _, top_k = arguments
    return _filled(_outputs(fake_empty, arguments, top_k, "screened_exit"), fake_empty, arguments[0].device)


def _define(name: str, schema: str, outputs: tuple, run, run_out, fake) -> None:
    marks = (f"Tensor({chr(ord('a') + i)}!){'?' if n in _OPTIONAL else ''} {n}" for i, n in enumerate(outputs))
    define(
        name,
        f"{schema}, str backend",
        f"({', '.join(['Tensor'] * len(outputs))})",
        ", ".join(marks),
        run,
        lambda *arguments, **out: run_out(*arguments, *(out.get(n) for n in outputs)),
        fake,
        what=", SymInt top_k",
    )


_define(
    "exit_confidence",
    _EXIT_CONFIDENCE,
    _OUTPUTS,
    _run_exit_confidence,
    _run_exit_confidence_out,
    _fake_exit_confidence,
)
_define(
    "screened_exit",
    f"{_EXIT_CONFIDENCE}, Tensor screen_values, Tensor screen_scales, Tensor error_norms, Tensor norms, "
    "Tensor error_gain, float tolerance",
    (*_OUTPUTS, "rechecked"),
    _run_screened_exit,
    _run_screened_exit_out,
    _fake_screened_exit,
)


# exit_mlp


def exit_mlp(features, weights: list, biases: list, threshold: float, backend: str) -> tuple:
    """Checked arguments in; (score, stop) out."""
    if short_cut(features, *weights, *biases):
        return _run_exit_mlp(features, weights, biases, threshold, backend)
    return _NAMESPACE.exit_mlp(features, weights, biases, threshold, backend)


def _mlp_outputs(empty, features) -> tuple:
    return empty((features.shape[0],), torch.float32, features.device), empty((1,), torch.bool, features.device)


def _run_exit_mlp(features, weights, biases, threshold, backend):
    out = _mlp_outputs(_alloc.empty, features)
    _run_exit_mlp_out(features, weights, biases, threshold, backend, *out)
    return out


def _run_exit_mlp_out(features, weights, biases, threshold, backend, score, stop):
    implementation = _dispatch.resolve("exit_mlp", backend, features)
    if features.shape[0]:
        implementation(features, weights, biases, threshold, score, stop)
    else:
        stop.fill_(True)


define(
    "exit_mlp",
    "Tensor features, Tensor[] weights, Tensor[] biases, float threshold, str backend",
    "(Tensor, Tensor)",
    "Tensor(a!) score, Tensor(b!) stop",
    _run_exit_mlp,
    _run_exit_mlp_out,
    lambda features, *_: _mlp_outputs(fake_empty, features),
)
