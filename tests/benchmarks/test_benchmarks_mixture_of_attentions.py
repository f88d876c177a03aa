"""The tables of Mixture of Attentions with tiny random models: every column, and figures that are known beforehand."""

import argparse
import json

import pytest

from benchmarks.decode import mixture_of_attentions as table
from specdec_ops import drafts
from tests.harness.tiny_models import Characters, make_decoder, noisy_eagle, noisy_mixture

pytestmark = pytest.mark.usefixtures("one_thread")
TARGET = make_decoder(1, layers=2, tokenizer=Characters())
FIXED = {"machine": "here", "isa": "any", "threads": 1, "torch": "2", "commit": "abc", "date": "today"}
PROMPTS = {0: [[1, 2, 3], [4, 5, 6, 7]], 1: [list(range(20)), [9]]}
ASKED = argparse.Namespace(tokens=12, before=6, copies=0)
ABOUT = {"steps": 7, "held_out_agreement_1": 0.25, "held_out_agreement_2": 0.2}


def made() -> dict:
    return {
        "mixture, N = 0": (noisy_mixture(TARGET), ABOUT),
        "eagle": (noisy_eagle(TARGET), {}),
        "own chain": (drafts.Chain(TARGET, 4), {}),
    }


def quiet(*_) -> None:
    pass


def test_speed(tmp_path):
    rows = table.speed(ASKED, TARGET, made(), PROMPTS, quiet)
    assert [(row["seed"], row["contestant"]) for row in rows] == [
        (seed, name) for seed in PROMPTS for name in ("plain", *made())
    ]
    for row in rows:
        assert row["problem"] == "" and row["tokens"] == 24 and row["x_plain"] > 0 and row["x_eagle"] > 0
    assert all(row["tokens_per_call"] == 1 and row["x_plain"] == 1 for row in rows if row["contestant"] == "plain")
    assert all(row["x_eagle"] == 1 for row in rows if row["contestant"] == "eagle")
    mixture, own = rows[1], rows[3]
    assert (mixture["paper_tokens_per_call"], mixture["paper_speed_up"]) == (4.22, 1.95)
    assert (mixture["steps"], mixture["held_out_agreement"]) == (7, 0.25) and mixture["c"] > 0
    assert own["tokens_per_call"] > 3
    table.results.write(tmp_path / "t.csv", [row | FIXED for row in rows], True, table.COLUMNS)
    lines = table.table(table.results.read(tmp_path / "t.csv"))
    assert len(lines) == 5 and "4.22" in lines[2]


def test_after_a_cut(monkeypatch):
    """A draft that is the target says what the target would; Eagle ends after a tree; all others go on."""
    monkeypatch.setattr(table, "DISTANCES", (1, 2, 8))
    rows = table.cut(ASKED, TARGET, made(), PROMPTS, quiet)
    by_name = {name: [row for row in rows if row["contestant"] == name] for name in made()}
    assert [row["tokens_since_cut"] for row in by_name["own chain"]] == [1, 2, 8] * 2
    for row in by_name["own chain"]:
        assert row["agreement"] == row["same_so_far"] == 1 and row["nll"] == pytest.approx(row["nll_of_target"])
        assert row["tokens"] == 2 * {1: 1, 2: 1, 8: 6}[row["tokens_since_cut"]]
    for row in by_name["mixture, N = 0"]:
        assert row["requests"] == 2 and row["nll"] >= row["nll_of_target"]
        assert 0 <= row["same_so_far"] <= row["agreement"] <= 1 or row["agreement"] >= 0
        assert row["tokens"] == 2 * {1: 1, 2: 1, 8: 6}[row["tokens_since_cut"]]
    assert all(row["tokens"] <= 4 for row in by_name["eagle"])


def test_names_say_how_a_draft_was_trained(tmp_path):
    for place, (layers, about, name) in enumerate((
        (0, {}, "mixture, N = 0"),
        (1, {}, "mixture, N = 1"),
        (0, {"command": "python -m x --all-states"}, "mixture, N = 0, no CA mask"),
    )):  # fmt: skip
        noisy_mixture(TARGET, layers).save(tmp_path / str(place), TARGET, about=about)
        assert table.name_of(tmp_path / str(place)) == name
    about = json.loads((tmp_path / "0" / "draft.json").read_text())
    about["sizes"]["layer_inner"] = 0
    (tmp_path / "0" / "draft.json").write_text(json.dumps(about))
    assert table.name_of(tmp_path / "0") == "mixture, N = 0, no LSA"
