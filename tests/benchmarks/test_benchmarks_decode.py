"""Decoding of n-gram models: the models, the three checks, that the law test can fail, and the table of lengths."""

import csv
import dataclasses
import sys

import numpy as np
import pytest
import torch

from benchmarks.acceptance import lengths
from benchmarks.decode import lossless, ngram_decode
from benchmarks.decode.lossless import FALSE_ALARM, check_law
from benchmarks.decode.ngram_decode import SAMPLING_RULES, Rule, decode
from benchmarks.decode.ngram_model import Counts, NgramModel, advance, context_of, standard_library
from specdec_ops import Tree, tree_accept


@pytest.fixture(scope="module")
def models():
    counts = Counts(standard_library(1_500_000))
    return ngram_decode.Models(NgramModel(counts, 8), NgramModel(counts, 4))


pytestmark = pytest.mark.usefixtures("one_thread")  # as the programs themselves: the rows are short


# ---- the models


def test_counts_against_plain_counting():
    text = b"abracadabra, abracadabra! " * 3
    counts = Counts(np.frombuffer(text, np.uint8))
    whole = text[:-7]  # the last seven bytes begin no string of eight
    for order in (1, 2, 3, 8):
        contexts = [text[i : i + order - 1] for i in range(40)] + [b"\0" * (order - 1), b"zzzzzzz"[: order - 1]]
        rows = counts.following(np.array([context_of(context) for context in contexts], np.uint64), order)
        for context, row in zip(contexts, rows, strict=True):
            for byte in b"abr ,z\0\xff":
                gram = context + bytes([byte])
                assert row[byte] == sum(text.startswith(gram, at) for at in range(len(whole)))


def test_rows_are_distributions_and_do_not_depend_on_who_else_asks(models):
    contexts = torch.tensor([context_of(text) for text in (b"import ", b"    def", b"\xff" * 7, b"", b"import ")])
    logits = models.target(contexts)
    assert logits.shape == (5, 256) and logits.dtype == torch.float32 and logits.isfinite().all()
    torch.testing.assert_close(logits.double().exp().sum(-1), torch.ones(5).double(), rtol=0, atol=1e-5)
    assert torch.equal(logits[0], logits[4])
    forgetful = NgramModel(models.target.counts, 8, remembered=2)
    assert torch.equal(forgetful(contexts), logits)
    assert torch.equal(forgetful(contexts[1:2])[0], logits[1])
    assert torch.equal(models.target(contexts.view(5, 1))[:, 0], logits)


def test_advance_keeps_seven_bytes():
    contexts = torch.tensor([context_of(b"abcdefg"), context_of(b"xy")])
    longer = advance(contexts, torch.tensor([ord("h"), -1]))
    assert longer.tolist() == [context_of(b"bcdefgh"), context_of(b"xy")]


# ---- the checks


def test_greedy_equals_plain_greedy_decoding(models):
    assert lossless.check_greedy(models, 100) == 4 * 8 * 100


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_match_equals_plain_sampling(models, temperature):
    assert lossless.check_match(models, 60, temperature) == 2 * 4 * 8 * 60


@pytest.mark.parametrize("number, rule", list(enumerate(SAMPLING_RULES)), ids=[rule.name for rule in SAMPLING_RULES])
def test_every_lossless_rule_follows_the_targets_law(models, number, rule):
    """The chance of a false alarm is 1e-6 for each rule, if the seeds were not fixed."""
    assert check_law(models, rule, 8192, seed=10 + number)[2] > FALSE_ALARM


def misreported(drafted):
    """The draft's bytes are drawn at temperature 1, and said to be drawn at another one."""
    given = (drafted.target_logits, drafted.tokens, drafted.topology, drafted.draft_logits)
    return tree_accept(*given, draft_temperature=1.2, **drafted.options)


def taken_for_drawn(drafted):
    """The draft's top bytes, said to be drawn from its distribution."""
    given = (drafted.target_logits, drafted.tokens, drafted.topology, drafted.draft_logits)
    return tree_accept(*given, **drafted.options)


@pytest.mark.parametrize("proposals, accept", [("distinct", misreported), ("greatest", taken_for_drawn)])
def test_the_law_test_finds_wrong_rules(models, proposals, accept):
    assert check_law(models, Rule("wrong", proposals, accept), 8192)[2] < FALSE_ALARM


def test_g_test_of_a_law_itself(models):
    """Cells share out all of the probability; exact proportions give G 0, and one cell too many is noticed."""
    cells = lossless.cells_of(models.target, b"\n    def ", 3, 4096)
    assert abs(sum(cells.values()) - 1) < 1e-9 and len(cells) > 20
    halves = {(): 0.25, (97,): 0.5, (98, 99): 0.25}
    tokens = torch.tensor([[97, 1]] * 50 + [[98, 99]] * 25 + [[98, 1]] * 20 + [[1, 1]] * 5)
    assert lossless.g_test(tokens, halves)[:2] == (0.0, 2)
    assert lossless.g_test(torch.tensor([[97, 1]] * 100), halves)[2] < FALSE_ALARM


# ---- the decode


def test_a_text_does_not_depend_on_its_neighbours(models):
    """Requests leave the batch when they are done; who stays draws as if alone."""
    tree, rule = Tree.from_branching((3, 2, 1), root=True), SAMPLING_RULES[5]
    prompts, seeds = [b"import ", b"class ", b"    for "], torch.tensor([7, 8, 9])
    together = decode(models, rule, tree, prompts, 40, seeds=seeds)
    for request in range(3):
        alone = decode(models, rule, tree, prompts[request : request + 1], 40, seeds=seeds[request : request + 1])
        assert torch.equal(alone.tokens[0], together.tokens[request])
        assert (alone.given[0], alone.calls[0]) == (together.given[request], together.calls[request])
    assert (together.given >= 40).all() and together.texts[0] == bytes(together.tokens[0].tolist()).decode("latin-1")


def test_levels_with_children_of_different_number(models):
    """Only leading draws without replacement are used where a node has fewer children than its neighbours."""
    tree = Tree([-1, 0, 0, 1, 1, 1, 2, 4])
    for rule in (SAMPLING_RULES[2], SAMPLING_RULES[8]):
        decoded = decode(models, rule, tree, [b"import "] * 4, 30)
        assert (decoded.given >= 30).all() and (decoded.given <= decoded.calls * (tree.depth + 1)).all()


def test_acceptance_lengths(models, tmp_path):
    lines = lengths.acceptance_lengths(models, length=12, copies=1)
    assert {line["tree"] for line in lines} == set(ngram_decode.TREES)
    by_rule = {(line["rule"], line["tree"]): line["tokens_per_call"] for line in lines}
    assert all(1 <= line["tokens_per_call"] <= line["depth"] + 1 for line in lines)
    chain = "chain of 5"
    assert by_rule["token", chain] == by_rule["recursive", chain], "the same rule, noise and draft"
    assert by_rule["block", chain] == by_rule["traversal", chain]
    assert ("token", "4x2x2x1") not in by_rule and len(lines) == 2 + 4 * 10
    rows = lengths.table(lines)
    assert len(rows) == 1 + 12 and "±" in rows[1]
    columns = dict.fromkeys(lengths.MACHINE_COLUMNS, "some")
    lengths.write(tmp_path / "a" / "lengths.csv", lines, columns)
    with (tmp_path / "a" / "lengths.csv").open(newline="") as file:
        written = list(csv.DictReader(file))
    assert len(written) == len(lines) and float(written[0]["tokens_per_call"]) == pytest.approx(
        lines[0]["tokens_per_call"], 1e-5
    )
    pytest.importorskip("matplotlib", reason="plots are optional")
    assert lengths.draw(lines, tmp_path / "lengths.png").startswith("plot: ")
    assert (tmp_path / "lengths.png").stat().st_size > 10_000


def test_without_matplotlib_it_says_so(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert lengths.draw([], tmp_path / "lengths.png") == "no plot: matplotlib is not installed"


def test_the_report_of_the_benchmarks(models, monkeypatch, tmp_path):
    monkeypatch.setattr(ngram_decode, "load", lambda: models)
    monkeypatch.setattr(ngram_decode, "TREES", {"chain of 2": Tree.chain(3)})
    monkeypatch.setitem(lengths.SIZES, "quick", (8, 1))
    said, columns = [], dict.fromkeys(lengths.MACHINE_COLUMNS, "")
    lengths.report("quick", tmp_path / "lengths.csv", columns, said.append, plot=False)
    assert (tmp_path / "lengths.csv").exists() and said[-1] == "lines: lengths.csv"
    assert any(line.startswith("traversal, top children") for line in said)


def test_a_wrong_rule_fails_the_program(models, monkeypatch, capsys):
    small = {"chain of 2": Tree.chain(3)}
    monkeypatch.setattr(ngram_decode, "TREES", small | {"4x2x2x1": Tree.from_branching((2, 1), root=True)})
    wrong = dataclasses.replace(SAMPLING_RULES[2], proposals="greatest")
    for rules, status in (((SAMPLING_RULES[0],), 0), ((SAMPLING_RULES[0], wrong), 1)):
        monkeypatch.setattr(ngram_decode, "SAMPLING_RULES", rules)
        assert lossless.run(models, 20, 4096) == status
    assert "1 rules do not follow the target's law" in capsys.readouterr().err
