"""The short examples run, and print what they promise."""

import re
import runpy
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def ngrams():
    """The variables that the program leaves."""
    return runpy.run_path(str(EXAMPLES / "ngram_decode.py"), run_name="__main__")


def test_tree_attention(capsys):
    runpy.run_path(str(EXAMPLES / "tree_attention.py"), run_name="__main__")
    assert "largest difference from the float64 definition" in capsys.readouterr().out


def test_a_decode_loop_gives_more_than_a_byte_per_call(capsys):
    runpy.run_path(str(EXAMPLES / "ngram_decode.py"), run_name="__main__")
    found = re.findall(r"^(\w+): ([\d.]+) bytes per call of the target; b?'", capsys.readouterr().out, re.MULTILINE)
    assert [rule for rule, _ in found] == ["match", "recursive", "traversal"]
    depth = 4
    assert all(1.5 < float(given) <= depth + 1 for _, given in found)


def test_its_models_are_right(ngrams):
    """Counted by hand in the same text; every byte may follow, which the rules need."""
    text = bytes(ngrams["corpus"].tolist())
    draft, target = (ngrams[name] for name in ("draft_logits", "target_logits"))
    assert draft.isfinite().all() and target.isfinite().all()
    assert draft[ord("q"), ord("u")].exp() == pytest.approx(text.count(b"qu"), rel=1e-4)
    follow = target[ord("i") * 256 + ord("m")].exp()
    assert follow[ord("p")] == pytest.approx(text.count(b"imp"), rel=0.01)


@pytest.mark.parametrize("first_seed", [1, 1000])
def test_match_gives_the_text_of_plain_sampling(ngrams, first_seed):
    """At other seeds than the program's own, and the seeds matter."""
    prompts, seeds = [b"import ", b"    if "], torch.tensor([first_seed, 7])
    plain = ngrams["decode_plainly"](prompts, 40, seeds)
    texts, calls = ngrams["decode"]("match", prompts, 40, seeds)
    assert calls < 40
    assert all(text.startswith(expected) for text, expected in zip(texts, plain, strict=True))
    other = ngrams["decode_plainly"](prompts, 40, seeds + 1)
    assert all(a != b for a, b in zip(plain, other, strict=True))


def test_a_text_does_not_depend_on_its_neighbours(ngrams):
    prompts, seeds = [b"import ", b"    if "], torch.tensor([3, 4])
    for rule in ("recursive", "traversal"):
        together, _ = ngrams["decode"](rule, prompts, 40, seeds)
        alone, _ = ngrams["decode"](rule, prompts[1:], 40, seeds[1:])
        assert together[1].startswith(alone[0]) or alone[0].startswith(together[1])


def test_a_client_and_a_server_that_lose_each_other(capsys):
    pytest.importorskip("msgpack", reason="the extra remote has it")
    runpy.run_path(str(EXAMPLES / "client_server.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert printed.rstrip().endswith("the line was cut 1 time; the text is the target's: True")
    assert re.search(r"^\w[^\[]*\[.+\]$", printed, re.MULTILINE), "it went on alone"
