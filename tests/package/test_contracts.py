"""Contract and kernel agree: nothing that a caller says is dropped, and no parameter of a kernel is left at zero."""

import functools
import importlib
import importlib.util
import pkgutil
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import specdec_ops.ops
from specdec_ops._core import dispatch, loader
from specdec_ops._core.library import Operator
from tests.harness.public_calls import CALLS, run

MODULE, REASON = loader.load()
pytestmark = pytest.mark.skipif(MODULE is None, reason=str(REASON))
MEMORY = {"scratch", "counters"}  # set when a kernel is launched


def operators():
    """{name: operator} of every contract in specdec_ops/ops."""
    modules = [
        importlib.import_module(f"{found.name}.contract")
        for found in pkgutil.iter_modules(specdec_ops.ops.__path__, "specdec_ops.ops.")
        if found.ispkg and importlib.util.find_spec(f"{found.name}.contract")
    ]
    return {value.name: value for module in modules for value in vars(module).values() if isinstance(value, Operator)}


OPERATORS = operators()


@functools.cache
def calls():
    """{op: [(arguments, outputs)]}: what the public calls hand to implementations."""
    seen, resolve = {}, dispatch.resolve

    def record(op, *others):
        implementation = resolve(op, *others)

        def recorded(arguments, outputs):
            seen.setdefault(op, []).append((arguments, outputs))
            implementation(arguments, outputs)

        return recorded if op in OPERATORS else implementation

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "resolve", record)
        for name, call in CALLS.items():
            if call.op in OPERATORS:
                run(name, backend="cpu")
    return seen


def left_over(op, some_calls):
    """The contract's fields that no call has read by the kernel, and the parameters that none sets."""
    found = [getattr(MODULE, f"{op}_left_over")(*call) for call in some_calls]
    unread, unset = (set.intersection(*(set(names) for names in side)) for side in zip(*found, strict=True))
    return unread, unset - MEMORY


@pytest.mark.parametrize("op", OPERATORS)
def test_every_field_is_used(op):
    assert left_over(op, calls()[op]) == (set(), set())


@pytest.mark.parametrize("op", OPERATORS)
def test_a_forgotten_field_is_found(op):
    """On either side: one that only the contract has, and any of those that the kernel has."""
    for part in (0, 1):
        assert left_over(op, changed(op, part, lambda fields: {**fields, "forgotten": None})) == ({"forgotten"}, set())
        for name in calls()[op][0][part]._fields:
            fewer = changed(op, part, lambda fields, name=name: {n: v for n, v in fields.items() if n != name})
            try:
                _, unset = left_over(op, fewer)
            except KeyError as error:  # sizes or strides come from it, too
                assert f"the contract has no field `{name}`" in str(error)
            else:
                assert unset, name


def changed(op, part, change):
    """The calls with other fields in their arguments (part 0) or outputs (part 1)."""
    found = []
    for call in calls()[op]:
        fields = change(call[part]._asdict())
        kind = NamedTuple("Changed", [(name, object) for name in fields])
        found.append((kind(**fields), call[1]) if part == 0 else (call[0], kind(**fields)))
    return found


@pytest.mark.parametrize("op", OPERATORS)
def test_fields_fill_the_struct(op):
    """The places that tests read pointers from are those of the struct that kernels get."""
    fields = getattr(MODULE, f"{op}_fields")()
    params = getattr(MODULE, f"{op}_params")(*calls()[op][0])
    end = 0
    for _, offset, size, _ in sorted(fields, key=lambda field: field[1]):
        assert end <= offset < end + 8  # alignment leaves less than a pointer
        end = offset + size
    assert end <= len(params) < end + 8
    assert len({name for name, *_ in fields}) == len(fields)


def test_what_is_no_call_is_refused():
    """Also what a contract would never hold."""
    arguments, outputs = calls()["merge_states"][0]
    with pytest.raises(TypeError, match="two named tuples"):
        MODULE.merge_states_params(list(arguments), outputs)
    with pytest.raises(TypeError, match="a dtype that its kernels don't take"):
        MODULE.merge_states_params(arguments, outputs._replace(out=outputs.out.double()))
    arguments, outputs = calls()["tree_attention"][0]
    with pytest.raises(TypeError, match="a kernel takes a number, not a Tensor"):
        MODULE.tree_attention_params(arguments._replace(window=torch.ones(1, dtype=torch.int32)), outputs)
    twice = NamedTuple("Twice", [(name, object) for name in ("q", "lse")])
    with pytest.raises(ValueError, match="two fields `q`"):
        MODULE.tree_attention_params(arguments, twice(*outputs))


STRUCT = "struct OneParams {\n%s\n};\n"


@pytest.fixture(scope="module")
def struct_fields():
    """The generator of the functions that visit a struct's fields."""
    path = Path(__file__).parents[2] / "csrc/bindings/struct_fields.py"
    spec = importlib.util.spec_from_file_location("struct_fields", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_struct_fields_are_read_as_they_are_written(struct_fields):
    body = (
        "  const void* q;  // a; comment\n  PerRequest<float> top_p;\n  int32_t a, b[kMaxEos],\n      c;\n  Layer d[4];"
    )
    template = "template <class T>\nstruct PerRequest {\n  T value() const { return {}; }\n};\n"
    found = struct_fields.structs_of("params.h", template + STRUCT % body)
    assert found == {"OneParams": ["q", "top_p", "a", "b", "c", "d"]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (STRUCT % "  std::vector<int> x;", "struct OneParams has `std::vector<int> x;`, which is no field"),
        (STRUCT % "  int32_t x = 0;", "struct OneParams has `int32_t x = 0;`, which is no field"),
        (STRUCT % "  int32_t f() const;", "struct OneParams has `int32_t f() const;`, which is no field"),
        ("struct OneParams : Base {\n  int32_t x;\n};\n", "struct OneParams must have"),
        ("struct OneParams { int32_t x; };\n", "struct OneParams must have"),
    ],
)
def test_a_struct_that_cannot_be_read_is_one_clear_error(text, message, struct_fields):
    with pytest.raises(SystemExit) as stopped:
        struct_fields.structs_of("csrc/params.h", text)
    assert str(stopped.value).startswith("csrc/params.h: ") and message in str(stopped.value)
