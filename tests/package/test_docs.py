"""What the documents tell people to type works: Python runs, shell commands name what there is, and so do links."""

import contextlib
import inspect
import io
import re
import runpy
import shlex
import subprocess
import sys
import warnings
from pathlib import Path
from unittest import mock

import pytest
import torch

from specdec_ops import tree_attention
from specdec_ops._core import dispatch
from tests.harness.public_names import PUBLIC
from tests.harness.walk_through import DOCUMENT as WALK_THROUGH
from tests.harness.walk_through import without_places

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "benchmarks/README.md")]
DOCUMENTS += sorted((ROOT / "docs").rglob("*.md"))
MAKEFILE = (ROOT / "Makefile").read_text()
PYPROJECT = (ROOT / "pyproject.toml").read_text()
ELSEWHERE = ("git", "pre-commit")  # commands of other projects, which only have to be well-formed


def names(paths):
    return [str(path.relative_to(ROOT)) for path in paths]


def blocks(path, *languages):
    """The fenced code blocks of a document, without a language a shell's."""
    found = re.findall(r"^```(.*)\n((?:.*\n)*?)```$", path.read_text(), re.MULTILINE)
    known = {"", "sh", "python", "text", *(("cpp", "toml") if path == WALK_THROUGH else ())}
    assert {language for language, _ in found} <= known, "a block nobody tests"
    return [text for language, text in found if language in languages]


def prose(path):
    return re.sub(r"^```.*\n(?:.*\n)*?```$", "", without_places(path.read_text()), flags=re.MULTILINE)


def run_python(path):
    """Run a document's blocks in their order, as one program; return its variables."""
    variables = {"__name__": "__main__"}
    for number, text in enumerate(blocks(path, "python")):
        with contextlib.redirect_stdout(io.StringIO()), torch.random.fork_rng(devices=[]):
            torch.manual_seed(number)
            exec(compile(text, f"{path.name}, block {number}", "exec"), variables)
    return variables


PROGRAMS = [path for path in DOCUMENTS if path != WALK_THROUGH]  # whose blocks test_add_an_op.py puts into files


@pytest.mark.parametrize("path", PROGRAMS, ids=names(PROGRAMS))
def test_python_runs(path):
    run_python(path)


def test_the_readme_says_what_comes_out():
    """The attention is right, and the tokens are what the comment says of them."""
    found = run_python(ROOT / "README.md")
    arguments = (found["q"], found["k_cache"], found["v_cache"])
    exact = tree_attention(*map(torch.Tensor.double, arguments), found["topology"], found["context_lens"])
    torch.testing.assert_close(found["out"].double(), exact, atol=2e-2, rtol=0)
    accepted = found["accepted"]
    for tokens, count in zip(accepted.tokens.tolist(), accepted.num_accepted.tolist(), strict=True):
        assert min(tokens[: count + 1]) >= 0 and set(tokens[count + 1 :]) == {-1}


def test_the_readme_is_short_and_names_every_op():
    """One screen for each question; whoever looks for an op finds its line."""
    text = (ROOT / "README.md").read_text()
    assert text.count("\n") <= 150
    index = text.partition("## All ops")[2].partition("\n## ")[0]
    named = set(re.findall(r"`(\w+)`", "".join(line.split("|")[1] for line in index.splitlines() if "|" in line)))
    returned = {name for name, thing in PUBLIC.items() if inspect.isclass(thing)} - named  # that help() lists
    assert named == set(PUBLIC) - returned
    assert returned == {
        *("AcceptStatus", "Acceptance", "AttentionState", "Children", "Confidence", "Exit", "ExitStatus"),
        *("Frontier", "GrowStatus", "HeadBounds", "LongestPath", "PrunedTree", "QuantizedHead", "TopologyStatus"),
        "QuantizedWeight",
    }


SHORT = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}


def test_the_support_table_is_what_dispatch_does(monkeypatch):
    """Every op in a row, every backend in a column, and in the cell the dtypes that the backend does not refuse."""
    monkeypatch.setattr(dispatch, "_unavailable", lambda op, backend, _: None)
    table = (ROOT / "README.md").read_text().partition("## What works where")[2].strip().split("\n\n")[0]
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    backends = [name.split()[0] for name in header[1:]]
    assert sorted(backends) == sorted(dispatch.BACKENDS)
    seen = set()
    for first, *cells in rows:
        for name in re.findall(r"`(\w+)`", first):
            op = dispatch.PUBLIC_OPS.get(name, name)
            seen.add(name)
            for backend, cell in zip(backends, cells, strict=True):
                if name in ("build_topology", "grow_tree", "prune_tree"):  # the public function takes one dtype
                    assert cell == ("int32" if name == "build_topology" else "fp32")
                    continue
                tensors = {dtype: torch.empty(1, 64, dtype=SHORT[dtype]) for dtype in SHORT}
                takes = [d for d, t in tensors.items() if not dispatch._refusal(op, backend, t, t.dtype, True)]
                assert cell.split() == takes, (name, backend)
    assert seen == {*dispatch.PUBLIC_OPS, "screened_exit", "bounded_exit"}


# ---- commands


def commands(path):
    """Every simple command of a document: of its shell blocks, and those in prose, as lists of words."""
    for text in blocks(path, "", "sh"):
        script = re.sub(r"<[^<>\n]+>", "PLACEHOLDER", text).replace("\\\n", " ")
        assert subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True).stderr == ""
        for line in script.splitlines():
            for command in line.partition(" #")[0].split("&&"):
                if words := shlex.split(command, comments=True):
                    yield words
    for code in re.findall(r"`([^`\n]+)`", prose(path)):
        if re.match(r"(\w+=\S+ )*(make \w|python (-m \w|\S+\.py)|pip |pytest |pre-commit |git )", code):
            yield shlex.split(code)


def check_command(words, config):
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]  # which variables there are is another test
    program, arguments = words[0], words[1:]
    if program == "make":
        for argument in arguments:
            name, is_variable, _ = argument.partition("=")
            assert re.search(rf"\$\({name}\)" if is_variable else rf"^{name}:.*## ", MAKEFILE, re.MULTILINE), argument
    elif program == "python":
        check_program(arguments)
    elif program == "pytest":
        for option in (a for a in arguments if a.startswith("--")):
            with contextlib.suppress(ValueError):
                config.getoption(option)
                continue
            raise AssertionError(option)
        if "-m" in arguments:
            assert f'"{arguments[arguments.index("-m") + 1]}: ' in PYPROJECT
    elif program == "pip":
        for extra in re.findall(r"\[(\w+)\]", " ".join(arguments)):
            assert re.search(rf"^{extra} = \[", PYPROJECT, re.MULTILINE), extra
    else:
        assert program in ELSEWHERE or (program == "cd" and arguments in (["specdec_ops"], [".."])), words


def check_program(arguments):
    """`-m module options` or `file options`: it exists, and its help knows the options."""
    by_module = arguments[0] == "-m"
    program, options = (arguments[1], arguments[2:]) if by_module else (arguments[0], arguments[1:])
    if by_module:
        base = ROOT / program.replace(".", "/")
        assert base.with_suffix(".py").is_file() or (base / "__main__.py").is_file(), program
    else:
        assert (ROOT / program).is_file(), program
    options = [option for option in options if option.startswith("--")]
    if options:
        text = program_help(program, by_module)
        assert not [option for option in options if not re.search(rf"{option}\b(?!-)", text)], (program, options)


def program_help(program, by_module):
    """What it prints for --help, run here because an own process would import torch again."""
    printed = io.StringIO()
    argv, path = [program, "--help"], [str(ROOT), str((ROOT / program).parent), *sys.path]
    with (
        mock.patch.object(sys, "argv", argv),
        mock.patch.object(sys, "path", path),
        contextlib.redirect_stdout(printed),
        contextlib.suppress(SystemExit),
        warnings.catch_warnings(),
    ):
        if by_module:
            warnings.simplefilter("ignore", RuntimeWarning)  # that it is imported already
            runpy.run_module(program, run_name="__main__")
        else:
            runpy.run_path(str(ROOT / program), run_name="__main__")
    assert "--help" in printed.getvalue()
    return printed.getvalue()


@pytest.mark.parametrize("path", DOCUMENTS, ids=names(DOCUMENTS))
def test_commands_name_what_there_is(path, pytestconfig):
    found = list(commands(path))
    for words in found:
        check_command(words, pytestconfig)
    assert path.parent.name == "docs" or found


@pytest.mark.parametrize(
    "words",
    [
        "make tests",
        "make gpu PEICE=bench",
        "python -m benchmarks.nothing",
        "python -m benchmarks.run --quickly",
        "python examples/nothing.py",
        "pytest --numprocess auto",
        "pytest -m gpus",
        "pip install '.[nothing]'",
        "cmake .",
    ],
)
def test_a_wrong_command_is_found(words, pytestconfig):
    with pytest.raises(AssertionError):
        check_command(shlex.split(words), pytestconfig)


# ---- names


@pytest.mark.parametrize("path", DOCUMENTS, ids=names(DOCUMENTS))
def test_links_and_files_exist(path):
    text = prose(path)
    for link in re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", text):
        assert (path.parent / link).exists(), link
    places = (ROOT, path.parent, ROOT / "csrc")
    for file in re.findall(r"`([\w./-]+/[\w.-]+\.(?:py|h|cuh|cu|cpp|md|toml))`", text):
        assert any((place / file).is_file() for place in places), file


def test_environment_variables_are_read_somewhere():
    files = [
        ROOT / "setup.py",
        *(f for folder in ("specdec_ops", "tests", "benchmarks") for f in (ROOT / folder).rglob("*.py")),
    ]
    code = "".join(file.read_text() for file in files if file != Path(__file__))
    mentioned = {name for path in DOCUMENTS for name in re.findall(r"\bSPECDEC_OPS_[A-Z_]+\b", path.read_text())}
    assert "SPECDEC_OPS_BACKEND" in mentioned
    assert not [name for name in sorted(mentioned) if f'"{name}"' not in code]
