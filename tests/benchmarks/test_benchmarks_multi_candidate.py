"""The tables of multi-candidate drafts with tiny models: every column, greedy text that costs nothing, laws apart."""

import importlib.util

import pytest
import torch

from benchmarks.decode import multi_candidate as tables
from specdec_ops import drafts
from tests.harness.tiny_models import first_layers, make_decoder

pytestmark = pytest.mark.usefixtures("one_thread")
TARGET = make_decoder(1)
MODEL = first_layers(TARGET, 1)
PROMPTS = [[1, 2, 3], [4, 5, 6, 7]]
FIXED = {"target": "tiny", "draft": "tinier", "commit": "abc"}


def bench(*options: str) -> tables.Bench:
    asked = tables.parser().parse_args(["--tokens", "12", "--seeds", "2", *options])
    return tables.Bench(TARGET, MODEL, PROMPTS, asked, lambda text: None)


def written(table: str, rows: list[dict], folder) -> list[dict]:
    """As main writes and draws them."""
    path = folder / f"{table}.csv"
    tables.results.write(path, [row | FIXED for row in rows], True, (*tables.COLUMNS[table], *FIXED))
    found = tables.results.read(path)
    assert all(set(row) <= {*tables.COLUMNS[table]} for row in rows)
    if importlib.util.find_spec("matplotlib"):
        assert "plot" in tables.draw(table, found, path.with_suffix(".png"))
        assert path.with_suffix(".png").stat().st_size > 1000
    return found


@pytest.mark.parametrize("temperature", ["0", "0.7"])
def test_forms(temperature, tmp_path):
    rows = tables.forms(bench("--temperature", temperature))
    assert [(row["form"], row["rule"]) for row in rows[1:]] == [(form.name, form.rule) for form in tables.FORMS]
    assert [row["rows"] for row in rows] == [1, 5, 45, 45, 45, 41, 41, 41, 82]
    plain, *others = rows
    assert plain["tokens_per_call"] == 1 and plain["nll_more"] == 0 and plain["ratio_plain"] == 1
    for row in others:
        assert row["problem"] == "" and row["requests"] == 4 and row["tokens_per_call"] > 1 and row["nll"] > 0
        assert row["per_call_low"] <= row["tokens_per_call"] <= row["per_call_high"]
        if temperature == "0" and row is not others[-1]:
            assert row["nll_more"] == 0, "with one root greedy text is the target's, whatever the rule"
    assert len(written("forms", rows, tmp_path)) == 9


def test_laws(tmp_path):
    rows = tables.law(bench("--draws", "300"))
    gaps = {(row["form"], row["rule"]): row["tv_at_least"] for row in rows}
    assert abs(gaps["4x2x2x1", "traversal"]) < 0.06
    assert gaps["4x2x2x1", "longest_path"] > 0.06 and gaps[tables.PAPER.name, "longest_path"] > 0.1
    assert len(written("law", rows, tmp_path)) == len(tables.LAWS)


def test_widths(tmp_path, monkeypatch):
    decision = drafts.Decision([(torch.zeros(1, 11), torch.zeros(1))], "confidence", 0.6)  # it never goes on
    monkeypatch.setattr(tables.drafts.Decision, "load", classmethod(lambda cls, folder, model: decision))
    rows = tables.width(bench("--widths", "1", "3", "--decision", "folder"))
    assert [(row["width"], row["stop"]) for row in rows] == [
        (width, stop) for width in (1, 3) for stop in ("none", "probability 0.3", "11-1")
    ]
    for row in rows:
        assert row["tokens_per_call"] >= 1 and row["temperature"] == 1.0
        assert row["rows"] == pytest.approx(row["width"] * (1 + row["levels"])) and 1 <= row["levels"] <= tables.DEPTH
        assert row["levels"] == {"none": tables.DEPTH, "11-1": 1}.get(row["stop"], row["levels"])
    assert len(written("width", rows, tmp_path)) == 6


def test_topologies(tmp_path):
    rows = tables.topology(bench())
    kinds = {row["kind"]: row for row in rows if row["tree"] == "(2,4,3,1,1)" and row["context"] == 4096}
    assert kinds["sliced topology"]["bytes_a_round"] == 4 and kinds["sliced topology"]["bytes_once"] < 4096
    assert kinds["mask rebuilt"]["bytes_a_round"] == 82 * (4096 + 82)
    assert len(written("topology", rows, tmp_path)) == len(rows) == 18
