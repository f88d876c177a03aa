"""The table of sorted drafts with tiny random models: every column, costs without prompts, no time for wrong text."""

import pytest

from benchmarks.decode import sorted as table
from specdec_ops import drafts
from specdec_ops.decode import Engine, Sampling
from specdec_ops.ops.linear.quantized_weight import QuantizedWeight
from tests.harness.tiny_models import first_layers, make_decoder

pytestmark = pytest.mark.usefixtures("one_thread")
TARGET = make_decoder(1, layers=4)
MODEL = first_layers(TARGET, 3)
FIXED = {"machine": "here", "isa": "any", "threads": 1, "torch": "2", "commit": "abc", "date": "today"}
PROMPTS = [[1, 2, 3], [4, 5, 6, 7], list(range(20)), [9]]


def made() -> dict[str, drafts.Sorted]:
    options = {"steps": 3, "head": None}
    return {
        "S2D .5 .5 0": drafts.Sorted(MODEL, (1, 2, 3), (0.5, 0.5, 0.0), **options),
        "first exit": drafts.Sorted(MODEL, (1,), (0.0,), **options),
        "tree, first exit": drafts.Sorted(MODEL, (1,), (0.0,), tree=table.TREE, **options),
    }


def entries_of(forms, temperature: float = 0.0):
    return table.run_seed(forms, PROMPTS, 0, temperature, 16, (), lambda number, of: None)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_every_column(temperature, tmp_path):
    forms = table.forms_of(TARGET, made(), 64)
    entries = entries_of(forms, temperature)
    table.check(entries)
    rows = [row | FIXED for row in table.rows_of("tiny", 0, temperature, forms, entries)]
    assert [row["contestant"] for row in rows] == ["plain", "S2D .5 .5 0", "first exit", "tree, first exit"]
    plain, mixed, first, tree = rows
    assert plain["tokens_per_call"] == 1 and plain["measured"] == 1 and "c" not in plain
    for row in (mixed, first, tree):
        assert row["problem"] == "" and row["tokens"] == 4 * 16
        assert row["tokens_per_call"] > 1 and row["c"] > 0 and row["measured"] > 0
        assert row["modelled"] == pytest.approx(row["tokens_per_call"] / (row["c"] + row["t_rows"]))
        assert row["modelled_7B"] < row["modelled_13B"] < row["modelled_70B"] < row["tokens_per_call"]
    assert first["layer_passes"] == 1 and first["head_passes"] == 1
    assert 1 < mixed["layer_passes"] < 3 and mixed["layer_rows"] >= mixed["layer_passes"]
    assert sum(mixed[name] for name in ("left_first", "left_second", "left_last")) == pytest.approx(1)
    paper = tuple(first.get(f"paper_{name}") for name in ("7B", "13B", "70B"))
    assert paper == ((1.30, 1.35, None) if temperature else (1.38, 1.38, 1.83)) and "paper_70B" not in tree
    out = tmp_path / "table.csv"
    table.results.write(out, rows, True, table.COLUMNS)
    later = [row | {"seed": 1, "measured": 2 * (row["measured"] or 1)} for row in rows]
    table.results.write(out, later, False, table.COLUMNS)
    again = table.results.read(out)
    assert len(again) == 8
    mean = table.summary(again)[1]
    assert mean["seeds"] == 2 and mean["measured"] == pytest.approx(1.5 * mixed["measured"], rel=1e-3)
    assert (mean["lowest"], mean["highest"]) == pytest.approx((mixed["measured"], 2 * mixed["measured"]), rel=1e-3)
    lines = table.table(again)
    assert len(lines) == 5 and ("1.27/1.38/-" if temperature else "1.34/1.38/1.92") in lines[2]
    assert lines[1].startswith(f"tiny, T = {temperature:g} ")
    pytest.importorskip("matplotlib")
    assert "plot" in table.draw(again, tmp_path / "table.png") and (tmp_path / "table.png").stat().st_size > 1000


def test_prompts_are_left_out_of_costs():
    """A draft that reads 20 tokens before its first guess has still run one layer over one row for each token."""
    forms = table.forms_of(TARGET, {"first exit": made()["first exit"]}, 64)
    entries_of(forms)
    for cost in forms[1].costs:
        assert cost["layer_rows"] <= cost["left"][0] + len(PROMPTS) * 16
        assert cost["layer_passes"] == cost["head_passes"] == cost["left"][0]


def test_wrong_text_gets_no_time():
    forms = table.forms_of(TARGET, made(), 64)
    entries = entries_of(forms)
    entries[1].runs[2].answers[0][5] += 1
    table.check(entries)
    rows = table.rows_of("tiny", 0, 0.0, forms, entries)
    assert rows[1]["problem"].startswith("WRONG: the text of prompt 2") and "measured" not in rows[1]
    assert rows[2]["problem"] == ""


def test_names_are_the_papers():
    names = [table.name_of(thresholds) for thresholds in table.THRESHOLDS]
    assert names == ["S2D .5 .5 0", "S2D .75 .7 0", "S2D .9 .85 0"]
    assert set(names) <= set(table.PAPER) and set(table.PAPER_SAMPLED) <= set(table.PAPER)


def test_weights_of_another_form_are_the_same_model():
    """Float32 and int8 of one model, as the targets of the table are made."""
    plain = table.remade(TARGET, table.dense_weight)
    coarse = table.remade(TARGET, lambda weight: table.quantize_linear(table.dense_weight(weight)))
    texts = [Engine(model).generate(PROMPTS, Sampling(max_tokens=8)) for model in (TARGET, plain)]
    assert [result.tokens for result in texts[0]] == [result.tokens for result in texts[1]]
    assert isinstance(coarse.head.weight, QuantizedWeight)
    assert all(isinstance(layer.mlp.down.weight, QuantizedWeight) for layer in coarse.layers)
    assert coarse.layers[1].attention.rope is TARGET.layers[1].attention.rope
