"""Docstrings: their examples run, and what they name exists."""

import ast
import builtins
import dataclasses
import doctest
import enum
import importlib
import inspect
import keyword
import pydoc
import re
import textwrap
import typing
from pathlib import Path

import pytest
import torch

import specdec_ops
from tests.harness.public_names import PUBLIC

ROOT = Path(specdec_ops.__file__).parent
MODULES = sorted(
    str(path.relative_to(ROOT.parent).with_suffix("")).replace("/", ".").removesuffix(".__init__")
    for path in ROOT.rglob("*.py")
    if path.name != "__main__.py"
)
PUBLIC_MODULES = [name for name in MODULES if "._" not in name and ".reference" not in name]
# What other people's packages call it, and names of a formula's parts.
FOREIGN = {
    *(
        "output_accepted_token_num",
        "retrive_",
        "retrieve_",
        "all_greedy",
        "all_random",
        "__dlpack__",
        "d2t",
        "layer_of",
        "generate",
        "specdec",
    ),
    *("context", "slot", "new", "position", "exp", "sqrt", "ceil", "tanh", "single", "accumulated", "i"),
}
# The systems above the ops: their classes are named without their packages, too.
SYSTEMS = ("decode", "drafts", "integrations.transformers", "train")
OFFERED = {
    **PUBLIC,
    **{
        name: thing
        for system in SYSTEMS
        for name, thing in vars(importlib.import_module(f"specdec_ops.{system}")).items()
        if inspect.isclass(thing) or inspect.isfunction(thing)
    },
}
PACKAGES = ("transformers", "flashinfer", "vllm", "sgl_kernel", "torch", "numpy", "gguf")


def docstrings(module):
    """(where, text) of every docstring of a module, those below attributes among them."""
    tree = ast.parse(inspect.getsource(module))
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        for index, part in enumerate(body if isinstance(body, list) else ()):
            literal = isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant)
            if not literal or not isinstance(part.value.value, str):
                continue
            owner = node if index == 0 else body[index - 1]
            if index == 0 or isinstance(owner, ast.Assign | ast.AnnAssign):
                yield f"{module.__name__}:{part.lineno}", inspect.cleandoc(part.value.value), node


def parameters_of(thing):
    try:
        return set(inspect.signature(thing).parameters)
    except (TypeError, ValueError):
        return set()


def members_of(thing):
    """What follows a dot: attributes, and the fields of records."""
    fields = {field.name for field in dataclasses.fields(thing)} if dataclasses.is_dataclass(thing) else set()
    try:
        own = set(re.findall(r"self\.(\w+)", inspect.getsource(thing))) if inspect.isclass(thing) else set()
    except OSError:  # made by a function, such as those of a NamedTuple in torch
        own = set()
    return fields | own | set(dir(thing))


def known_words(module):
    """Names that a docstring of this module may use by themselves."""
    words = {*FOREIGN, *PACKAGES, *dir(builtins), *keyword.kwlist, *OFFERED, *vars(module), "specdec_ops"}
    for name in MODULES if module.__name__.startswith("specdec_ops.compat") else ():
        words |= set(vars(importlib.import_module(name))) if name.startswith("specdec_ops.compat") else set()
    for thing in (*OFFERED.values(), *vars(module).values()):
        if inspect.isfunction(thing):
            words |= parameters_of(thing)
        elif inspect.isclass(thing) and thing.__module__.startswith("specdec_ops"):
            words |= members_of(thing) | parameters_of(thing)
            for member in vars(thing).values():
                words |= parameters_of(getattr(member, "__func__", member)) if callable(member) else set()
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        if isinstance(node, ast.arg):
            words.add(node.arg)
    return words


def resolved(path, module):
    """Whether a dotted name leads somewhere: from our package, from the module, or from one of its classes."""
    first, *rest = path.split(".")
    if first in PACKAGES:
        return True
    thing = specdec_ops if first == "specdec_ops" else OFFERED.get(first, vars(module).get(first))
    if thing is None:  # a value, such as `topology.offsets`: some public class has a member of that name
        classes = [each for each in (*OFFERED.values(), torch.Tensor) if inspect.isclass(each)]
        return all(any(name in members_of(each) for each in classes) for name in rest)
    for name in rest:
        if inspect.isclass(thing) and name in members_of(thing):
            return True
        if inspect.ismodule(thing) and f"{thing.__name__}.{name}" in MODULES and not hasattr(thing, name):
            thing = importlib.import_module(f"{thing.__name__}.{name}")
        elif hasattr(thing, name):
            thing = getattr(thing, name)
        else:
            return False
    return True


def names_in(text):
    """Names between backticks: alone, with a dot, or called; and ours wherever they are."""
    text = re.sub(r"^\s*(>>>|\.\.\.) .*$", "", text, flags=re.MULTILINE)
    name = r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*"
    for double, single in re.findall(r"``([^`]+)``|`([^`\n]+)`", text):
        code = re.sub(r"\"[^\"]*\"|'[^']*'", "", double or single)
        if re.fullmatch(name, code):
            yield code
        else:  # a formula, a call, a shape
            yield from (word for word in re.findall(rf"(?<![\w.)/]){name}", code) if "." in word or f"{word}(" in code)
    yield from re.findall(r"(?<![\w./])specdec_ops(?:\.\w+)+", text)


def attributes_of(thing):
    """What the section Attributes of a class's docstring says, by name."""
    found = re.search(r"^Attributes:\n((?: {4}.*\n|\n)+)", inspect.getdoc(thing) + "\n", re.MULTILINE)
    entries = re.findall(r"^ {4}(\w+): (.*(?:\n {5,}.*)*)", found[1], re.MULTILINE) if found else []
    return dict(entries)


def fields_of(thing):
    """The fields of a record, with their annotations; the members of an enumeration."""
    if dataclasses.is_dataclass(thing):
        return {field.name: str(field.type) for field in dataclasses.fields(thing)}
    if issubclass(thing, enum.Enum):
        return dict.fromkeys(thing.__members__, "int")
    return {name: str(thing.__annotations__[name]) for name in getattr(thing, "_fields", ())}


CLASSES = {name: thing for name, thing in PUBLIC.items() if inspect.isclass(thing)}
CLASSES["Run"] = typing.get_type_hints(specdec_ops.LayerCache.run)["return"]
CLASSES["PublishedTree"] = specdec_ops.published_trees.PublishedTree


@pytest.mark.parametrize("name", CLASSES)
def test_help_names_every_field(name):
    """In the class's docstring, because `help` does not show a string below a field. Tensors with dtype and shape."""
    thing, entries = CLASSES[name], attributes_of(CLASSES[name])
    fields = fields_of(thing)
    own = set(re.findall(r"^        self\.([a-z]\w*)(?:: .*)? = ", inspect.getsource(thing), re.MULTILINE))
    assert set(entries) >= set(fields) | own
    assert not [entry for entry in entries if entry not in members_of(thing)]
    for field, annotation in fields.items():
        if "Tensor" in annotation:
            dtype = r"(u?int\d+|float\d+|bool|of q's dtype|of the cache's dtype)"
            shape = r"(`\[[^`]+\]`|like \w+)"
            assert re.search(rf"\b{dtype}\b.*{shape}", entries[field], re.DOTALL), (field, entries[field])


def test_the_records_are_among_them():
    names = {name for name, thing in CLASSES.items() if fields_of(thing)}
    expected = {"Acceptance", "LongestPath", "Children", "Confidence", "Exit", "Run", "Topology", "AttentionState"}
    assert names >= expected | {"HeadBounds", "QuantizedHead", "VocabMap", "AcceptStatus", "ExitStatus"}


@pytest.mark.parametrize("name", CLASSES)
def test_nothing_is_said_where_help_does_not_look(name):
    """No string stands below a field of a class."""
    (thing,) = ast.parse(textwrap.dedent(inspect.getsource(CLASSES[name]))).body
    for part in thing.body[1:]:
        assert not (isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant)), part.lineno


def test_help_of_the_package_is_an_index():
    """A line for every public name, once, and no other; the full help is of each name alone."""
    text = pydoc.render_doc(specdec_ops, renderer=pydoc.plaintext)
    assert len(text.splitlines()) < 120
    index = re.findall(r"^ {8}(\w+) {2,}(\S.{9,})$", text, re.MULTILINE)
    assert sorted(name for name, _ in index) == sorted(PUBLIC)
    for name, thing in PUBLIC.items():
        shown = pydoc.render_doc(thing, renderer=pydoc.plaintext)
        assert all(line in shown for line in inspect.getdoc(thing).splitlines()), name


def test_names_are_offered_to_type_checkers():
    """As PEP 484 has it, `from .module import name as name`."""
    lines = inspect.getsource(specdec_ops).splitlines()
    offered = {match[1] for line in lines if (match := re.fullmatch(r"from \S+ import (\w+) as \1", line))}
    assert offered == set(PUBLIC)


@pytest.mark.parametrize("name", PUBLIC_MODULES)
def test_what_docstrings_name_exists(name):
    """Ours in full, values by the members of public classes, single words among parameters, fields and the module."""
    module = importlib.import_module(name)
    words = known_words(module)
    for where, text, node in docstrings(module):
        local = {sub.id for sub in ast.walk(node) if isinstance(sub, ast.Name)}
        for path in names_in(text):
            found = resolved(path, module) if "." in path else path in words or path in local
            assert found, f"{where}: `{path}`"


def test_the_walk_finds_what_is_missing():
    """The status that was documented under a function's name, a field that is none, a parameter that is none."""
    module = importlib.import_module("specdec_ops.ops.early_exit.early_exit")
    text = "see specdec_ops.early_exit.STATUS_INVALID, `Confidence.maximum`, `tempreature` and `Exit.seen`"
    missing = [p for p in names_in(text) if not (resolved(p, module) if "." in p else p in known_words(module))]
    assert missing == ["Confidence.maximum", "tempreature", "specdec_ops.early_exit.STATUS_INVALID"]


@pytest.mark.parametrize(
    "name", [name for name in MODULES if ">>> " in inspect.getsource(importlib.import_module(name))]
)
def test_examples_run(name):
    """With torch and the public names at hand."""
    module = importlib.import_module(name)
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    count = 0
    for test in doctest.DocTestFinder().find(module, name, globs={"torch": torch, **PUBLIC}):
        result = runner.run(test)
        assert result.failed == 0, test.name
        count += result.attempted
    assert count > 0


def test_blocks_of_code_are_examples():
    """What is indented behind an empty line is run; a `::` before it marks a sketch, which parses."""
    found = 0
    for name in PUBLIC_MODULES:
        for where, text, _ in docstrings(importlib.import_module(name)):
            for before, block in re.findall(r"(\S[^\n]*)\n\n((?: {4,}[^\n]*\n)+)", text + "\n"):
                found += 1
                if before.endswith("::"):
                    ast.parse(textwrap.dedent(block))
                else:
                    assert block.lstrip().startswith(">>> "), f"{where}: {block}"
    assert found >= 6
