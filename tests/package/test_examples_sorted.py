"""The sorted draft end to end, small: it learns, it leaves early where it is sure, and it knows what that costs."""

import dataclasses
import itertools
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from examples import sorted_draft, sorted_exit, toy_draft
from specdec_ops import drafts
from specdec_ops.decode import Engine, Sampling
from specdec_ops.drafts import TreeShape
from tests.harness.tiny_models import first_layers, make_decoder

ROOT = Path(__file__).parents[2]
LAYERS = toy_draft.QUICK.exits[-1]


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """The whole of `sorted_exit --quick` with an empty cache: (model, losses of its training, tables, cache folder)."""
    folder, threads = tmp_path_factory.mktemp("cache"), torch.get_num_threads()
    torch.set_num_threads(1)  # the rows are short
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        tables = sorted_exit.main(["--quick", "--texts", "2"])
        model, history = toy_draft.load(toy_draft.QUICK)
        yield model, history, tables, folder
    torch.set_num_threads(threads)


def test_every_exit_learns(quick):
    """From knowing nothing (5.5 nats, even odds over 256 bytes) the mean of all exits falls by 2.5 nats and more."""
    model, history, _, _ = quick
    assert len(history) == toy_draft.QUICK.steps
    assert history[0] > 5
    assert statistics.mean(history[-20:]) < history[0] - 2.5
    text = toy_draft.windows(toy_draft.corpus()[1], 16, 65, torch.Generator().manual_seed(5))
    losses = model.losses(text)
    assert (losses < 3.1).all()  # in text that it has not seen
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("title", ["along the text", "along its own words"])
def test_thresholds(quick, title):
    full, *lines = quick[2][title]
    tokens = sum(full.per_exit.values())
    assert full.per_exit == {**dict.fromkeys(full.per_exit, 0), LAYERS: tokens}
    assert full.agreement == lines[-1].agreement == 1.0  # a cache that errs would show here
    assert full.rows == lines[-1].rows == lines[-1].depth == LAYERS
    assert lines[-1].threshold == 1.0
    depths = [line.depth for line in lines]
    assert depths[-1] - depths[0] > 1
    # Along its own words each threshold has a text of its own, so that a step back is possible.
    slack = 0 if title == "along the text" else 0.5
    assert all(after >= before - slack for before, after in itertools.pairwise(depths))
    for line in lines:
        assert sum(line.per_exit.values()) == tokens
        if title == "along the text":  # one that agrees with the full depth is right where that is
            assert abs(line.right - full.right) <= 1 - line.agreement + 1e-9
        assert line.depth == pytest.approx(sum(depth * n for depth, n in line.per_exit.items()) / tokens)
        assert line.depth - 1e-9 <= line.rows <= LAYERS + 1e-9  # catching up never costs more than not having left


def pieces():
    """A prompt and the text behind it."""
    text = toy_draft.windows(toy_draft.corpus()[1], 1, 26, torch.Generator().manual_seed(7))[0]
    return text[:16], text[16:]


def test_the_lowest_threshold_leaves_at_once(quick):
    """All but the first token, which runs the prompt; and rows that nobody needs are never caught up with."""
    decoded = sorted_exit.decode(quick[0], *pieces(), 0.0)
    assert decoded.depths == [LAYERS] + [toy_draft.QUICK.exits[0]] * 9
    assert decoded.rows == LAYERS + 9 * toy_draft.QUICK.exits[0]


def test_weights_and_plot_are_kept_outside_of_the_repository(quick, capsys):
    model, history, _, folder = quick
    file = toy_draft.cache_file(toy_draft.QUICK)
    assert file.is_file() and file.is_relative_to(folder)
    assert file.with_suffix(".png").is_file()
    assert toy_draft.cache_file(dataclasses.replace(toy_draft.QUICK, steps=1)) != file
    again, losses = toy_draft.load(toy_draft.QUICK)
    assert capsys.readouterr().out == f"weights from {file}\n"
    assert losses == history
    for name, weight in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight)


def test_agreement_sees_a_wrong_token(quick):
    prompt, text = pieces()
    tokens = sorted_exit.decode(quick[0], prompt, text, None).tokens
    assert sorted_exit.agreeing(quick[0], prompt, text, tokens) == 10
    tokens[-1] = (tokens[-1] + 1) % 256
    assert sorted_exit.agreeing(quick[0], prompt, text, tokens) == 9


@pytest.mark.parametrize(
    ("script", "option"),
    [("toy_draft.py", "--quick"), ("sorted_exit.py", "--quick"), ("sorted_draft.py", "--thresholds")],
)
def test_runs_as_a_script(script, option):
    command = [sys.executable, f"examples/{script}", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert option in done.stdout


@pytest.mark.parametrize("tree", [None, TreeShape(3, 2, 3, 7)], ids=["chain", "tree"])
def test_one_draft_serves_several_targets(tree):
    """`sorted_draft`: what each target says is what it says alone, whoever takes turns with it."""
    target = make_decoder(1, layers=4)
    targets = [target, make_decoder(7), first_layers(target, 3)]
    draft = drafts.Sorted(first_layers(target, 3), (1, 2, 3), (0.7, 0.6, 0.0), tree=tree, head=None)
    sampling, prompts = Sampling(max_tokens=16), [[1, 2, 3], [7, 8]]
    for model, served in zip(targets, sorted_draft.serve(draft, targets, prompts, sampling), strict=True):
        alone = Engine(model).generate(prompts, sampling)
        assert [result.tokens for result in served.results] == [result.tokens for result in alone]
        assert served.tokens_per_call > 1 and sum(served.left) > 0 and served.layer_rows > sum(served.left)
