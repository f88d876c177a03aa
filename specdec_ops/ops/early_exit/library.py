"""The early exit ops as torch.library operators; see specdec_ops._core.library for when a call goes through them."""

import torch

from specdec_ops._core import alloc, dispatch
from specdec_ops._core.library import define, fake_empty, short_cut, short_cut_of

_NAMESPACE = torch.ops.specdec_ops

# exit_confidence and its forms that read less. `arguments` is everything from hidden to level, in the order of the
# schema below, `extra` what the form adds. Outputs: those of Confidence, then those of Exit, which are None (empty, in
# the operator) without a measure, then the form's own.

_EXIT_CONFIDENCE = (
    "Tensor hidden, Tensor head, Tensor? scales, Tensor? norm_weight, float norm_eps, Tensor? bias, "
    "float temperature, Tensor? temperatures, Tensor? token_map, float threshold, Tensor? thresholds, str measure, "
    "str level"
)
_ARGUMENTS = 13
_exit_short_cut = short_cut_of(_EXIT_CONFIDENCE)
_OUTPUTS = (
    *("token", "max_prob", "margin", "entropy", "logsumexp", "top_tokens", "top_logprobs", "status"),
    *("exited", "active_rows", "inverse", "num_active"),
)
_OPTIONAL = ("top_tokens", "top_logprobs", "exited", "active_rows", "inverse", "num_active")


def exit_confidence(arguments: tuple, top_k: int, backend: str, out: tuple | None = None) -> tuple:
    """Checked arguments in; the tensors of Confidence and Exit out, None where there are none."""
    return _call(_WHOLE, arguments, (), top_k, backend, out)


def screened_exit(arguments: tuple, screen: tuple, top_k: int, backend: str, out: tuple | None = None) -> tuple:
    """The same with a screen (values, scales, error_norms, norms, error_gain, tolerance); rechecked comes last."""
    return _call(_SCREENED, arguments, screen, top_k, backend, out)


def bounded_exit(arguments: tuple, bounds: tuple, top_k: int, backend: str) -> tuple:
    """The same with bounds (norms_after, ends); seen comes last."""
    return _call(_BOUNDED, arguments, bounds, top_k, backend, None)


class _Form:
    """An operator: exit_confidence with `schema` added to its arguments, and one int32 [rows] to its outputs."""

    def __init__(self, name: str, schema: str = "", own: tuple = ()):
        self.name, self.outputs = name, (*_OUTPUTS, *own)
        self.tensors = schema.count("Tensor ")  # the form's own arguments begin with them
        self.inputs = _ARGUMENTS + len(schema.split(", ")) if schema else _ARGUMENTS
        marks = (f"Tensor({chr(ord('a') + i)}!){'?' if n in _OPTIONAL else ''} {n}" for i, n in enumerate(self.outputs))
        define(
            name,
            ", ".join(filter(None, (_EXIT_CONFIDENCE, schema, "str backend"))),
            f"({', '.join(['Tensor'] * len(self.outputs))})",
            ", ".join(marks),
            self.run,
            lambda *arguments, **out: self.run_out(*arguments, *(out.get(n) for n in self.outputs)),
            self.fake,
            what=", SymInt top_k",
        )

    def make(self, empty, hidden, decides: bool, top_k: int) -> tuple:
        rows, device = hidden.shape[0], hidden.device
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
            *(empty((rows,), torch.int32, device) for _ in self.outputs[len(_OUTPUTS) :]),
        )

    def run_out(self, *arguments):
        """The arguments, the form's own, backend, outputs. An implementation takes the form's own arguments last."""
        hidden, num_active = arguments[0], arguments[self.inputs + len(_OUTPUTS)]
        implementation = dispatch.resolve(self.name, arguments[self.inputs], hidden)
        first_own = self.inputs + 1 + len(_OUTPUTS)
        if hidden.shape[0]:
            outputs, own = arguments[self.inputs + 1 : first_own], arguments[first_own:]
            implementation(*arguments[:_ARGUMENTS], *outputs, *arguments[_ARGUMENTS : self.inputs], *own)
        elif num_active is not None:
            num_active.zero_()

    def run(self, *arguments):
        *arguments, backend, top_k = arguments
        out = self.make(alloc.empty, arguments[0], bool(arguments[11]), top_k)
        self.run_out(*arguments, backend, *out)
        return _filled(out, alloc.empty, arguments[0].device)

    def fake(self, *arguments):
        *arguments, _, top_k = arguments
        out = self.make(fake_empty, arguments[0], bool(arguments[11]), top_k)
        return _filled(out, fake_empty, arguments[0].device)


def _filled(outputs: tuple, empty, device) -> tuple:
    """An operator can't return None for a Tensor."""
    return tuple(empty((0,), torch.int32, device) if output is None else output for output in outputs)


def _call(form: _Form, arguments: tuple, extra: tuple, top_k: int, backend: str, out: tuple | None) -> tuple:
    decides = bool(arguments[11])
    if _exit_short_cut(arguments, *extra[: form.tensors], *(out or ())):
        if out is None:
            out = form.make(alloc.empty, arguments[0], decides, top_k)
        form.run_out(*arguments, *extra, backend, *out)
    elif out is None:
        results = getattr(_NAMESPACE, form.name)(*arguments, *extra, backend, top_k)
        wanted = (top_k > 0 if n.startswith("top_") else decides or n not in _OPTIONAL for n in form.outputs)
        return tuple(result if given else None for result, given in zip(results, wanted, strict=True))
    else:
        getattr(_NAMESPACE, form.name).out(*arguments, *extra, backend, **dict(zip(form.outputs, out, strict=True)))
    return out


_WHOLE = _Form("exit_confidence")
_SCREENED = _Form(
    "screened_exit",
    "Tensor screen_values, Tensor screen_scales, Tensor error_norms, Tensor norms, Tensor error_gain, float tolerance",
    ("rechecked",),
)
_BOUNDED = _Form("bounded_exit", "Tensor norms_after, int[] ends", ("seen",))


# exit_mlp


def exit_mlp(features, weights: list, biases: list, threshold: float, backend: str) -> tuple:
    """Checked arguments in; (score, stop) out."""
    if short_cut(features, *weights, *biases):
        return _run_exit_mlp(features, weights, biases, threshold, backend)
    return _NAMESPACE.exit_mlp(features, weights, biases, threshold, backend)


def _mlp_outputs(empty, features) -> tuple:
    return empty((features.shape[0],), torch.float32, features.device), empty((1,), torch.bool, features.device)


def _run_exit_mlp(features, weights, biases, threshold, backend):
    out = _mlp_outputs(alloc.empty, features)
    _run_exit_mlp_out(features, weights, biases, threshold, backend, *out)
    return out


def _run_exit_mlp_out(features, weights, biases, threshold, backend, score, stop):
    implementation = dispatch.resolve("exit_mlp", backend, features)
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
