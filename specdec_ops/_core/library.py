"""An op's contract as a torch.library operator, and the rule that decides when a call may skip the operator.

A contract is two named tuples, the arguments and the outputs of an op's implementations. Their annotations say all that
PyTorch needs: the schema, and which of the arguments are tensors.

torch.compile, torch.export, fake tensors and dispatch modes see `torch.ops.specdec_ops.*`: a schema, a fake and an
implementation for CPU and CUDA. A plain eager call goes straight to the implementation, since the detour through
PyTorch's dispatcher costs several microseconds of a call that may take ten.

The ops are for inference: they have no backward.
"""

import contextlib
import inspect
import itertools
import threading
import typing
from collections.abc import Callable

import torch

from . import alloc, dispatch, loader
from .checks import grad_error

_LIBRARY = torch.library.Library("specdec_ops", "DEF")
_NAMESPACE = torch.ops.specdec_ops
# Types of a call that hides nothing: a parameter differs from a tensor in its name alone.
_PLAIN = frozenset((torch.Tensor, torch.nn.Parameter, type(None), int, float, bool, str, list, tuple))
# Fields of contracts whose arguments have other names in public ops.
_CALLED = {
    **dict.fromkeys(("ancestors", "depths", "num_nodes", "offsets", "first_child", "next_sibling"), "topology"),
    **dict.fromkeys(("draft_to_target", "target_to_draft", "token_map"), "vocab_map"),
    **dict.fromkeys(("cosines", "sines"), "rope"),
    **{f"{name}s": name for name in ("query_start", "temperature", "top_p", "top_k", "seed")},
}
_CALLED_IN_OUT = {"next_tokens": "next_token", "parents_out": "parents", "num_nodes_out": "num_nodes"}
_SCHEMA_TYPES = {
    torch.Tensor: "Tensor",
    torch.Tensor | None: "Tensor?",
    list[torch.Tensor]: "Tensor[]",
    int: "SymInt",
    float: "float",
    bool: "bool",
    str: "str",
    list[int]: "int[]",
    list[float]: "float[]",
}

# Private names, so a PyTorch that drops one only costs the bypass.
_dispatch_modes = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 1)
_tracing = torch._C._get_tracing_state  # torch.jit.trace records operators, and nothing of what they do
_increment_version = torch.autograd.graph.increment_version
_transforms = getattr(torch._C._functorch, "maybe_current_level", lambda: 1)  # vmap and the like hide what a tensor is


def nobody_watches() -> bool:
    """Whether nothing records, transforms or compiles what is done here with tensors."""
    return not torch.compiler.is_compiling() and not _dispatch_modes() and _transforms() is None and _tracing() is None


def are_plain(values: typing.Iterable) -> bool:
    """Whether all these are tensors and numbers as they come, and no subclass that wants to see what is done to it."""
    return _PLAIN.issuperset(map(type, values))


class _Call(typing.NamedTuple):
    """What a call came down to."""

    implementation: Callable
    arguments: tuple
    outputs: tuple
    make_outputs: Callable | None
    what: dict
    """options for make_outputs"""


class _Recording(threading.local):
    calls: list[_Call] | None = None


_recording = _Recording()


class FirstCall:
    """The first of several calls of an op that differ in some tensors alone, for callers that make such calls often.

    It is checked and resolved as any call, and kept; later ones run what it came down to::

        first = FirstCall(("q", "k_cache", "v_cache"))
        outputs = first.again(same, key, (q, k_cache, v_cache))
        if outputs is None:
            with first.kept(same, key, (q, k_cache, v_cache)):
                out = tree_attention(q, k_cache, v_cache, ...)

    `same` is one object and compared by identity, `key` by equality. The two must tell apart all calls that would be
    checked or resolved differently: so the key has types, dtypes, shapes and strides of the tensors that are replaced.
    A call is kept if it goes straight to one implementation, with those tensors as they are.
    """

    __slots__ = ("_call", "_inputs", "_key", "_names", "_same", "_written")

    def __init__(self, inputs: tuple[str, ...], written: tuple[str, ...] | None = None) -> None:
        """Of the contract's arguments `inputs` are replaced, and all its outputs, if `written` has their names."""
        self._names = inputs, written
        self._call: _Call | None = None

    def again(self, same: object, key: tuple, inputs: tuple, written: tuple = ()) -> tuple | None:
        """Repeat the call that was kept.

        Args:
            same: what is the same object in all calls.
            key: what is equal in all calls.
            inputs: what takes the place of the first call's, in the order of their names.
            written: likewise of outputs that are written to. Without their names outputs are made.

        Returns:
            The outputs; None if another call was kept or none, or if someone watches.
        """
        call = self._call
        if (
            call is None
            or self._same is not same
            or self._key != key
            or torch.is_grad_enabled()
            or not nobody_watches()
        ):
            return None
        arguments = _replaced(call.arguments, self._inputs, inputs)
        if self._written is None:
            outputs = call.make_outputs(arguments, alloc.empty, **call.what)
        else:
            outputs = _replaced(call.outputs, self._written, written)
        call.implementation(arguments, outputs)
        return outputs

    @contextlib.contextmanager
    def kept(self, same: object, key: tuple, inputs: tuple) -> typing.Iterator[None]:
        """Keeps the call that is made within."""
        before, _recording.calls, self._call = _recording.calls, [], None
        try:
            yield
            calls = _recording.calls
        finally:
            _recording.calls = before
        if len(calls) != 1:
            return
        (call,), (names, written) = calls, self._names
        if all([getattr(call.arguments, name) is value for name, value in zip(names, inputs, strict=True)]):
            # Tensors need not live on.
            arguments = call.arguments._replace(**dict.fromkeys(names))
            outputs = call.outputs._make([None] * len(call.outputs))
            self._call = call._replace(arguments=arguments, outputs=outputs)
            self._inputs = [arguments._fields.index(name) for name in names]
            self._written = None if written is None else [outputs._fields.index(name) for name in written]
            self._same, self._key = same, key


def _replaced(fields: tuple, places: list[int], values: tuple) -> tuple:
    """`_replace` of a named tuple, whose fields' places are known: it takes a third of the time."""
    listed = list(fields)
    for place, value in zip(places, values):  # noqa: B905
        listed[place] = value
    return tuple.__new__(type(fields), listed)


def _fake_empty(shape, dtype, device):
    return torch.empty(shape, dtype=dtype, device=device)


def _wanted(*_) -> bool:
    """In the place of `empty`: which outputs there are, without making them."""
    return True


def _schema(fields: dict[str, type], marks: typing.Iterator[str] | None = None) -> str:
    """`Tensor q, Tensor? lse`. With marks, of tensors that are written to: `Tensor(a!) out`."""
    parts = []
    for name, kind in fields.items():
        if kind not in _SCHEMA_TYPES:
            raise TypeError(
                f"a contract's field {name} can't be {kind}; it may be {', '.join(map(str, _SCHEMA_TYPES))}"
            )
        written = _SCHEMA_TYPES[kind]
        if marks is not None:
            written = written.replace("Tensor", f"Tensor({next(marks)}!)")
        parts.append(f"{written} {name}")
    return ", ".join(parts)


class Operator:
    """An op with a contract: `operator(arguments, backend, out, **what_to_make)` runs it and returns its outputs."""

    def __init__(
        self,
        name: str,
        arguments: type,
        outputs: type,
        make_outputs: Callable | None,
        *,
        decided_by: Callable[[tuple, tuple], tuple] | None = None,
        answers: Callable[[tuple, tuple], bool] | None = None,
        pieces: Callable[[tuple, tuple], typing.Iterable[tuple[tuple, tuple]]] | None = None,
        may_be: dict[str, tuple[str, ...]] | None = None,
        own_outputs: bool = False,
    ):
        """Registers the operator.

        Args:
            name: of the operator, of its implementations in `dispatch`, and of its functions in the compiled module.
            arguments: a NamedTuple class. The first tensor's device is that of the call.
            outputs: a NamedTuple class of tensors.
            make_outputs: `make_outputs(arguments, empty, *, option)` allocates the outputs of a call with
                `empty(shape, dtype, device)`. Its keyword-only parameters say what is to be made, and follow the
                arguments in the schema; an output that is not made is None. Without this function the op has no
                functional form: it writes to tensors that the caller gives, which come before `backend` in the schema.
            decided_by: `decided_by(arguments, outputs)` gives what `dispatch.resolve` looks at to choose an
                implementation, by default the first tensor.
            answers: `answers(arguments, outputs)` returns whether it has answered a call that leaves nothing to
                compute. Implementations are spared such calls.
            pieces: `pieces(arguments, outputs)` cuts a call into several that implementations take.
            may_be: of an output the arguments that it may be itself, and share no memory with otherwise.
            own_outputs: no caller gives outputs; those of `__call__` are the public op's own, and apart.
        """
        self.name = name
        self._arguments, self._outputs = arguments, outputs
        fields, written = typing.get_type_hints(arguments), typing.get_type_hints(outputs)
        self._argument_lists, self._output_lists = (
            [place for place, kind in enumerate(kinds.values()) if kind == list[torch.Tensor]]
            for kinds in (fields, written)
        )
        self._first_tensor = next(place for place, kind in enumerate(fields.values()) if kind is torch.Tensor)
        self._decided_by = decided_by
        self._answers, self._pieces = answers, pieces
        names = self._names = [*fields, *written]
        self._may_be = tuple(
            1000 * names.index(output) + names.index(argument)
            for output, others in (may_be or {}).items()
            for argument in others
        )
        self._own_outputs = own_outputs
        self._make_outputs = make_outputs
        inputs, marks = _schema(fields), map(chr, itertools.count(ord("a")))
        if make_outputs is None:
            self._options = ()
            self._register("", f"({inputs}, {_schema(written, marks)}, str backend) -> ()", self._in_place, None)
        else:
            options = inspect.get_annotations(make_outputs)
            parameters = inspect.signature(make_outputs).parameters.values()
            self._options = tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)
            asked = "".join(f", {_schema({name: options[name]})}" for name in self._options)
            results = ", ".join(["Tensor"] * len(written))
            self._register("", f"({inputs}, str backend{asked}) -> ({results})", self._functional, self._fake)
            self._register(".out", f"({inputs}, str backend, *, {_schema(written, marks)}) -> ()", self._out, None)
            self._out_operator = getattr(_NAMESPACE, name).out
        self._operator = getattr(_NAMESPACE, name).default

    def _register(self, overload: str, schema: str, function: Callable, fake: Callable | None) -> None:
        """The out overload returns nothing: a returned alias of an argument is what fake tensors can't follow.

        The tag keeps the compiler from handing over inputs in another layout than the one the checks have accepted.
        """
        name = self.name + overload
        _LIBRARY.define(name + schema, tags=(torch.Tag.needs_fixed_stride_order,))
        for key in ("CPU", "CUDA"):
            _LIBRARY.impl(name, function, key)
        torch.library.register_fake(f"specdec_ops::{name}", fake or (lambda *_, **__: None), lib=_LIBRARY)

    def __call__(self, arguments: tuple, backend: str, out: tuple | None = None, **what) -> tuple:
        """Run the op on checked arguments.

        Args:
            arguments: of the contract's type.
            backend: its name, or "auto".
            out: outputs to write to, of the contract's type; None makes them.
            what: a value for each option of `make_outputs`. Without effect where `out` is given.

        Returns:
            `out`, or new outputs of the contract's type.
        """
        if self.bypass_dispatcher(arguments, out):
            if out is None:
                out = self._make_outputs(arguments, alloc.empty, **what)
                self._run(arguments, backend, out, what)
            elif self._own_outputs:
                self._run(arguments, backend, out, what)
            else:
                self._write(arguments, backend, out, what)
        elif self._make_outputs is None:
            self._operator(*arguments, *out, backend)
        elif out is None:
            results = self._operator(*arguments, backend, *(what[name] for name in self._options))
            results = (results,) if isinstance(results, torch.Tensor) else results
            there = self._make_outputs(arguments, _wanted, **what)
            return self._outputs(*(result if made else None for result, made in zip(results, there)))  # noqa: B905
        else:
            self._out_operator(*arguments, backend, **out._asdict())
        return out

    def bypass_dispatcher(self, arguments: tuple, out: tuple | None) -> bool:
        """Whether this call may go straight to an implementation: nobody watches, and it hides nothing."""
        if not nobody_watches() or not are_plain(arguments) or not (out is None or are_plain(out)):
            return False
        for place in self._argument_lists:
            if not are_plain(arguments[place]):
                return False
        if out is not None:
            for place in self._output_lists:
                if not are_plain(out[place]):
                    return False
        return True

    def _write(self, arguments: tuple, backend: str, outputs: tuple, what: dict | None = None) -> None:
        """Run into tensors of the caller's, which must be apart; autograd is told that they are not what they were.

        The compiled module compares addresses; without it nothing does.
        """
        module, _ = loader.load()
        if module is not None:
            shared = module.shared_memory(arguments, outputs, self._may_be)
            if shared is not None:
                self._refuse_shared(*shared, arguments, outputs)
        given = itertools.chain(*outputs) if self._output_lists else outputs  # lists of tensors, or none
        written = [tensor for tensor in given if tensor is not None]
        if torch.is_grad_enabled() and any([tensor.requires_grad for tensor in written]):
            raise RuntimeError(grad_error(self.name))
        self._run(arguments, backend, outputs, what)
        _increment_version(written)

    def _refuse_shared(self, written: int, other: int, arguments: tuple, outputs: tuple) -> None:
        if arguments[self._first_tensor].is_meta:
            return  # nothing has an address
        first = len(arguments)
        several = sum(output is not None for output in outputs) > 1

        def called(field: int) -> str:
            name = self._names[field]
            if field < first or self._make_outputs is None:
                return _CALLED.get(name, name)
            return f"out.{_CALLED_IN_OUT.get(name, name)}" if several else "out"

        name = called(written)
        if written == other:
            raise ValueError(f"specdec_ops.{self.name}: {name} must not be expanded, nor overlap itself")
        must = f"not share memory with {called(other)}"
        if 1000 * written + other in self._may_be:
            must = f"be {called(other)} or share no memory with it"
        raise ValueError(f"specdec_ops.{self.name}: {name} must {must}")

    def _run(self, arguments: tuple, backend: str, outputs: tuple, what: dict | None = None) -> None:
        """With `what` where nothing is hidden, and the call may be kept."""
        if self._decided_by is None:
            implementation = dispatch.resolve(self.name, backend, arguments[self._first_tensor])
        else:
            implementation = dispatch.resolve(self.name, backend, *self._decided_by(arguments, outputs))
        if self._answers is not None and self._answers(arguments, outputs):
            return
        if self._pieces is None:
            if _recording.calls is not None and what is not None:
                _recording.calls.append(_Call(implementation, arguments, outputs, self._make_outputs, what))
            implementation(arguments, outputs)
        else:
            for piece in self._pieces(arguments, outputs):
                implementation(*piece)

    # What PyTorch's dispatcher calls, with flat arguments: those of the contract, backend, options.

    def _functional(self, *flat):
        arguments, (backend, *options) = self._split(flat)
        outputs = self._make_outputs(arguments, alloc.empty, **dict(zip(self._options, options, strict=True)))
        self._run(arguments, backend, outputs)
        return _all_tensors(outputs, alloc.empty)

    def _fake(self, *flat):
        arguments, (_, *options) = self._split(flat)
        outputs = self._make_outputs(arguments, _fake_empty, **dict(zip(self._options, options, strict=True)))
        return _all_tensors(outputs, _fake_empty)

    def _out(self, *flat, **outputs):
        arguments, (backend,) = self._split(flat)
        self._write(arguments, backend, self._outputs(*(outputs.get(name) for name in self._outputs._fields)))

    def _in_place(self, *flat):
        arguments, (*outputs, backend) = self._split(flat)
        self._write(arguments, backend, self._outputs._make(outputs))

    def _split(self, flat: tuple) -> tuple[tuple, tuple]:
        count = len(self._arguments._fields)
        return self._arguments._make(flat[:count]), flat[count:]


def _all_tensors(outputs: tuple, empty: Callable) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """As an operator returns them: no None for a Tensor, what was not made is an empty one; and no tuple of one."""
    device = next(output for output in outputs if output is not None).device
    results = tuple(empty((0,), torch.float32, device) if output is None else output for output in outputs)
    return results[0] if len(results) == 1 else results
