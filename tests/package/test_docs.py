"""What the documents tell people to type works: Python runs, shell commands name what there is, and so do links."""

import contextlib
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
    assert {language for language, _ in found} <= {"", "sh", "python", "text"}, "a block nobody tests"
    return [text for language, text in found if language in languages]


def prose(path):
    return re.sub(r"^```.*\n(?:.*\n)*?```$", "", path.read_text(), flags=re.MULTILINE)


def run_python(path):
    """Run a document's blocks in their order, as one program; return its variables."""
    variables = {"__name__": "__main__"}
    for number, text in enumerate(blocks(path, "python")):
        with contextlib.redirect_stdout(io.StringIO()), torch.random.fork_rng(devices=[]):
            torch.manual_seed(number)
            exec(compile(text, f"{path.name}, block {number}", "exec"), variables)
    return variables


@pytest.mark.parametrize("path", DOCUMENTS, ids=names(DOCUMENTS))
def test_python_runs(path):
    run_python(path)


def test_the_readme_says_what_comes_out():
    variables = run_python(ROOT / "README.md")
    error = (variables["out"] - variables["exact"]).abs().max()
    assert 2e-4 < error < 1e-2, "about 2e-3: one rounding to bfloat16"
    assert type(variables["array"]).__module__ == "numpy"


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
