"""The suite itself: what of the slow backends runs, in which order, and what the tests cost."""

import os
from itertools import product
from pathlib import Path

import pytest
import torch

from tests.harness import cpu_seconds, selection

CASES = [
    *(("every rule", {("rule", rule), ("option", option)}) for rule, option in product("abcdef", "123")),
    *(("sizes", {("size", str(size))}) for size in range(40)),
    ("plain", set()),
]


def test_chosen_cases_cover_every_test_and_every_shared_value():
    cases = [*CASES, *(("rules again", {("rule", rule)}) for rule in "fg")]
    picked = [cases[index] for index in selection.chosen(cases, 17)]
    assert {test for test, _ in picked} == {test for test, _ in cases}
    values = {value for _, values in picked for value in values}
    assert {value for value in values if value[0] == "rule"} == {("rule", rule) for rule in "abcdefg"}
    assert len([test for test, _ in picked if test == "sizes"]) == 3, "a parameter of one test alone gets its share"
    assert len(picked) <= 13


def test_chosen_cases_make_new_pairs():
    cases = [(test, {("rule", rule), ("option", option)}) for test in "xy" for rule, option in product("ab", "12")]
    picked = [frozenset(cases[index][1]) for index in selection.chosen(cases, 2)]
    assert len(picked) == len(set(picked)) == 4


def test_a_share_of_one_is_everything():
    assert selection.chosen(CASES, 1) == list(range(len(CASES)))


def test_the_files_named_exist():
    for name in selection.LONGEST_FIRST:
        assert len(list(Path(__file__).parents[1].glob(f"*/{name}.py"))) == 1, name


def test_processes_that_have_ended_are_counted():
    before = cpu_seconds.spent()
    if os.fork() == 0:
        while sum(os.times()[:2]) < 0.2:
            pass
        os._exit(0)
    os.wait()
    assert cpu_seconds.spent() - before >= 0.15


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU kernels are compiled, not interpreted")
def test_names_are_replaced_once_in_a_launch(monkeypatch):
    """And by every launch anew, for the interpreter puts them back at its end."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    from specdec_ops import sample_tokens

    replaced, counts = [], []
    replace = interpreter._patch_builtin
    monkeypatch.setattr(
        interpreter, "_patch_builtin", lambda names, *rest: (replaced.append(names), replace(names, *rest))
    )
    logits = torch.full((2, 20), -torch.inf)
    logits[:, 7] = 0
    for rows in (1, 2):
        replaced.clear()
        assert sample_tokens(logits[:rows], seeds=1, positions=0, backend="triton").tolist() == [7] * rows
        counts.append(len(replaced))
    assert 0 < counts[0] == counts[1] <= 16, "without this it is 143 and 288"
