"""The steps of docs/add_an_op.md: each code block, and the place that the line before it names."""

import re
from pathlib import Path
from typing import NamedTuple

DOCUMENT = Path(__file__).parents[2] / "docs" / "add_an_op.md"
FORMS = {
    "new": r"New file `(?P<path>[^`]+)`:",
    "end": r"At the end of `(?P<path>[^`]+)`:",
    "edit": r"In `(?P<path>[^`]+)`, (?P<how>after|before|in place of) `(?P<anchor>[^`]+)`:",
}
COMMANDS = ("sh", "text")  # what these blocks hold goes into no file


class Step(NamedTuple):
    """line: of the document, from 1, where the code begins. section: the heading of level 2 above it."""

    line: int
    section: str
    path: str
    how: str
    anchor: str
    code: str


class WalkThroughError(Exception):
    """What a step of the document does not say, or names and is not there."""

    def __init__(self, line: int, what: str):
        super().__init__(f"{DOCUMENT.parent.name}/{DOCUMENT.name}:{line}: {what}")


def place_of(line: str) -> tuple[str, str, str] | None:
    """(path, how, anchor) of a line that says where a block goes, or None for any other."""
    for form, pattern in FORMS.items():
        if match := re.fullmatch(pattern, line):
            found = match.groupdict()
            return found["path"], found.get("how", form), found.get("anchor", "")
    return None


def without_places(text: str) -> str:
    """The document without those lines. They name files that a reader of it makes."""
    return "\n".join(line for line in text.split("\n") if place_of(line) is None)


def steps(text: str) -> list[Step]:
    """All of them, in order. A block without a place is an error, and so is a place without a block."""
    found, section, place, lines = [], "", None, text.split("\n")
    number = 0
    while number < len(lines):
        line = lines[number]
        number += 1
        if not line.startswith("```"):
            if place is not None and line:
                raise WalkThroughError(number, "a code block must follow the line before it")
            place = place_of(line) or place
            section = line.removeprefix("## ") if line.startswith("## ") else section
            continue
        end = lines.index("```", number)
        if line.removeprefix("```") not in COMMANDS:
            if place is None:
                raise WalkThroughError(number, "nothing says where this code block goes")
            found.append(Step(number + 1, section, *place, "".join(f"{line}\n" for line in lines[number:end])))
        elif place is not None:
            raise WalkThroughError(number, "a block that goes into a file must name its language")
        place, number = None, end + 1
    return found


def apply(step: Step, root: Path) -> None:
    """Put a block where it belongs in the checkout at `root`."""
    path = root / step.path
    if step.how == "new":
        if path.exists():
            raise WalkThroughError(step.line, f"{step.path} exists already")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(step.code)
        return
    if not path.is_file():
        raise WalkThroughError(step.line, f"{step.path} does not exist")
    lines = path.read_text().splitlines(keepends=True)
    if step.how == "end":
        first = last = len(lines)
    else:
        places = [index for index, line in enumerate(lines) if line.strip() == step.anchor]
        if len(places) != 1:
            count = len(places)
            raise WalkThroughError(step.line, f"{step.path} has {count} lines `{step.anchor}`, and must have one")
        first = places[0] + (step.how == "after")
        last = places[0] + (step.how != "before")
    path.write_text("".join([*lines[:first], step.code, *lines[last:]]))
