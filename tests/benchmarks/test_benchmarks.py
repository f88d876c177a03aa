"""The benchmark harness at toy size: every op runs, wrong results get no time, files are written and read back."""

import dataclasses
import functools
import importlib
import importlib.util
import itertools
import operator
import re
import time
from pathlib import Path

import pytest
import torch

from benchmarks import compare, registry, run
from benchmarks.acceptance import lengths as acceptance_lengths
from benchmarks.attention import cases, tree_attention
from benchmarks.attention.inputs import make_inputs
from benchmarks.harness import reading, report, results, roofs, targets, timing
from benchmarks.harness.cases import TREES, Model, TreeShape, chain
from benchmarks.harness.contestant import Contestant, check
from benchmarks.kv import append_cases
from benchmarks.kv import cases as kv_cases
from benchmarks.linear import cases as linear_cases
from benchmarks.topology import cases as topology_cases
from specdec_ops import _C
from specdec_ops._core import dispatch
from tests.harness.quick_reader import quick_reader  # noqa: F401

ROOT = Path(__file__).parents[2]
COLUMNS = {"machine": "a machine", "isa": "an ISA", "threads": "1", "torch": "2", "commit": "abc", "date": "today"}
COLUMNS |= {"specdec_ops": "0", "python": "3", "command": "python -m benchmarks.run"}


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def toy_roofs():
    return roofs.measure("cpu", ["fp32", "bf16"], seconds=0.01, sizes=(64,), reads=reading.reader())


def run_toys(toy_roofs, some, modes=("warm",)):
    clock = run.Clock("standard", len(some) * len(modes), cell_seconds=0.02)
    runner = run.Runner(run.Options("standard"), toy_roofs, COLUMNS, clock)
    for case in some:
        runner.run(case, modes)
    return runner.rows


def toys():
    return [
        cases.toy(),
        cases.toy(dtype="bf16"),
        cases.toy(contexts=(48, 48)),
        cases.toy(contexts=(48, 0, 17), tree=TREES[44]),
        cases.toy(tree=TREES[1]),
        cases.toy("merge_states"),
        cases.toy("merge_states", dtype="bf16", contexts=(0, 0)),
        *(linear_cases.toy(dtype=dtype) for dtype in linear_cases.WEIGHT_BYTES),
        linear_cases.toy_norm(),
        linear_cases.toy_norm(dtype="bf16"),
        append_cases.toy(),
        append_cases.toy(dtype="bf16"),
        topology_cases.toy(),
        topology_cases.toy(batch=2, tree=TREES[128]),
        kv_cases.toy_commit(),
        kv_cases.toy_commit(layout="one tensor", batch=1),
        kv_cases.toy_commit(layout="pages", dtype="bf16"),
        kv_cases.toy_gather(),
        kv_cases.toy_gather(layout="one tensor", rows=1),
        kv_cases.toy_gather(layout="pages", dtype="bf16"),
        topology_cases.toy_round(),
        topology_cases.toy_round(batch=3),
        topology_cases.toy_round("prune_tree"),
    ]


def test_every_op_has_a_toy_case():
    """Those of acceptance and early exit are in files of their own."""
    others = {op for op in registry.OPS if op.startswith("accept ")} | {*targets.EXIT_OPS}
    assert {case.op for case in toys()} == registry.OPS.keys() - others


def test_every_op_is_found_by_its_path():
    """benchmarks/<family>/<op>.py measures what csrc/<family>/cpu/<op>.cpp computes, and the README has its command."""
    measured = dispatch.IMPLEMENTATIONS.keys() - {"sample"}  # of which there is no benchmark yet, as the README says
    assert {op.partition(" ")[0] for op in registry.OPS} == measured
    for op in measured:
        (kernel,) = ROOT.glob(f"csrc/*/cpu/{op}.cpp")
        (program,) = ROOT.glob(f"benchmarks/*/{op}.py")
        family = program.parent.name
        assert family == kernel.parts[-3]
        assert op in importlib.import_module(f"benchmarks.{family}").__doc__
        line = rf"^\| `{family}/{op}.py` .*`python -m benchmarks.run --quick --op '?{op}\b"
        assert re.search(line, (ROOT / "benchmarks/README.md").read_text(), re.MULTILINE), op


@pytest.mark.parametrize("case", toys(), ids=lambda case: case.label)
def test_each_kind_of_case_runs(case, toy_roofs):
    rows = run_toys(toy_roofs, [case], ("warm", "cold") if case.op == "tree_attention" else ("warm",))
    for cell in results.cells(rows):
        assert cell.ours is not None, report.problem(cell)
        assert cell.ours["ratio"] > 0 and cell.ours["rounds"] >= timing.MIN_ROUNDS
        peers_timed = [row["contestant"] for row in cell.rows if row["role"] == "pytorch" and row["p50_us"] != ""]
        assert "eager" in peers_timed, report.problem(cell, "pytorch")
        if case.op == "tree_attention":
            forms = {"sdpa", "sdpa packed", "sdpa head-major", "sdpa packed head-major"}
            assert forms <= set(peers_timed), report.problem(cell, "pytorch")
            assert cell.ours["roof_percent"] > 0
            by_head = cell.of("specdec_ops head-major")
            assert by_head is not None and by_head["best_peer"] == cell.ours["best_peer"]


@pytest.mark.parametrize("layout", ["list", "one tensor", "pages"])
@pytest.mark.parametrize("case", [kv_cases.toy_commit(), kv_cases.toy_gather()], ids=lambda case: case.op)
def test_contestants_that_move_rows_are_checked(case, layout):
    """All are right, and one that moves nothing is not. The three targets have their cells."""
    case, op = dataclasses.replace(case, layout=layout), registry.OPS[case.op]
    inputs = op.make_inputs(case)
    exact = op.expected(inputs)
    found = op.contestants(inputs, run.Options("standard"))
    assert all(check(contestant, exact).problem == "" for contestant in found)
    idle = found[0]
    idle.call = (lambda: None) if case.op == "kv_commit" else inputs.room
    assert check(idle, exact).problem.startswith("WRONG")


def test_targets_of_ops_that_move_rows(toy_roofs):
    found = results.cells(run_toys(toy_roofs, [kv_cases.toy_commit(), kv_cases.toy_gather()]))
    assert [verdict.met is None for verdict in targets.row_verdicts(found)] == [False] * 3
    for cell, wanted in zip(found, ([False, False, True], [True, True, False]), strict=True):
        assert [verdict.met is None for verdict in targets.row_verdicts([cell])] == wanted
        text = "\n".join(report.summary([cell]))
        assert f"target: {cell.first['op']}: 3x" in text


def test_a_wrong_contestant_gets_no_time(monkeypatch, toy_roofs):
    def with_a_wrong_one(inputs, options):
        blind = torch.ones_like(inputs.tree_mask)  # every node sees the whole tree
        cheat = dataclasses.replace(inputs, tree_mask=blind)
        broken = Contestant("broken", "pytorch", lambda: 1 / 0)
        return [
            *tree_attention.contestants(inputs, options),
            Contestant("cheat", "pytorch", lambda: tree_attention.eager(cheat)),
            Contestant("not a number", "pytorch", lambda: tree_attention.eager(inputs) * float("nan")),
            broken,
        ]

    op = registry.OPS["tree_attention"]._replace(contestants=with_a_wrong_one)
    monkeypatch.setitem(registry.OPS, "tree_attention", op)
    rows = {row["contestant"]: row for row in run_toys(toy_roofs, [cases.toy(dtype="bf16")])}
    assert rows["cheat"]["problem"].startswith("WRONG") and rows["cheat"]["p50_us"] == ""
    assert rows["not a number"]["problem"].startswith("WRONG") and rows["not a number"]["p50_us"] == ""
    assert rows["broken"]["problem"].startswith("fails: ZeroDivisionError") and rows["broken"]["p50_us"] == ""
    assert rows["specdec_ops"]["best_peer"] not in ("cheat", "not a number", "broken")
    assert any("cheat: WRONG" in line for line in report.problems(results.cells(list(rows.values()))))


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_the_check_sees_one_missing_ancestor(dtype):
    model = Model("one head", 4, 1, 64)
    case = cases.attention(model, 1024, 64, dtype)
    inputs = make_inputs(case)
    blind = inputs.tree_mask.clone()
    leaf = int(blind.sum(dim=1).argmax())
    blind[leaf, int(blind[leaf].nonzero()[1])] = False
    wrong = dataclasses.replace(inputs, tree_mask=blind)
    expected = tree_attention.expected(inputs)
    right = check(Contestant("right", "pytorch", lambda: tree_attention.eager(inputs)), expected)
    assert not right.problem and right.error <= 1
    assert check(Contestant("wrong", "pytorch", lambda: tree_attention.eager(wrong)), expected).problem


def test_trees_have_their_sizes():
    assert all(tree.nodes == nodes for nodes, tree in TREES.items())
    for tree in TREES.values():
        assert all(-1 <= parent < i for i, parent in enumerate(tree.parents))


@pytest.mark.parametrize("preset", sorted(run.PRESETS))
def test_presets_list_each_cell_once(preset):
    """All but the quick ones and that of a first run on a GPU have every op."""
    labels = [(case.label, mode) for case in run.PRESETS[preset]() for mode in case.modes]
    assert len(labels) == len(set(labels))
    missing = registry.OPS.keys() - {case.op for case in run.PRESETS[preset]()}
    if preset == "gpu-first":  # headline cells, in minutes: one op of every family, and both kinds of acceptance
        assert not {"tree_attention", "accept greedy", "accept recursive", "exit_confidence", "kv_commit"} & missing
        assert not {"build_topology", "linear"} & missing
    else:
        assert not missing - ({"accept token top-p", "accept recursive top-p"} if "quick" in preset else set())


def test_bytes_and_flops_by_hand():
    case = cases.attention(Model("m", 4, 2, 16), 100, TreeShape("t", chain(8)), "bf16", batch=3)
    assert case.kv_bytes == 2 * 2 * 16 * 2 * 3 * 108
    assert case.bytes == case.kv_bytes + 2 * 2 * 4 * 16 * 24 + 8 * 24
    assert case.flops == 4 * 4 * 16 * 3 * 8 * 108


def test_command_writes_csv_and_plot(tmp_path, monkeypatch, capsys):
    few = [cases.toy(), cases.toy(tree=TREES[16]), cases.toy("merge_states"), topology_cases.toy()]
    monkeypatch.setitem(run.PRESETS, "quick", lambda: few)
    monkeypatch.setattr(roofs, "SIZES", (64,))
    monkeypatch.setitem(acceptance_lengths.SIZES, "quick", (4, 1))
    path = tmp_path / "folder" / "result.csv"
    assert run.main(["--quick", "--seconds", "0.02", "--csv", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "[4/4]" in shown and "geometric mean, fp32" in shown and "target:" in shown
    assert "bytes per call of the target" in shown and path.with_name("result-acceptance.csv").exists()
    rows = results.read(path)
    assert tuple(rows[0]) == results.COLUMNS
    assert len(results.cells(rows)) == 4
    assert str(tmp_path) not in path.read_text() and "result.csv" in rows[0]["command"]
    if importlib.util.find_spec("matplotlib") is None:
        assert "matplotlib is not installed" in shown
    else:
        names = sorted(file.name for file in path.parent.glob("*.png"))
        assert names == ["result-acceptance.png", "result-ratio.png", "result-roof.png"]


def test_list_and_filter(capsys):
    assert run.main(["--full", "--list", "--filter", "TinyLlama fp32 ctx4096 b4", "--cold"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "9 cases" and all(line.endswith("cold") for line in lines[:-1])


def test_compare(tmp_path, toy_roofs, capsys):
    old, new = tmp_path / "old.csv", tmp_path / "new.csv"
    rows = run_toys(toy_roofs, [cases.toy()])
    results.write(old, rows, header=True)
    faster = [row | {"p50_us": row["p50_us"] and row["p50_us"] / 2, "isa": "another"} for row in rows]
    results.write(new, faster, header=True)
    assert compare.main([str(old), str(new)]) == 0
    shown = capsys.readouterr().out
    assert "geometric mean over 1 cells: 2.00x in time, 1.00x in the ratio" in shown
    assert "isa: an ISA -> another" in shown


def fake_cells(ratio, nodes=64, **changes):
    shape = {"op": "tree_attention", "model": "Llama-3-8B", "dtype": "bf16", "context": 1024, "lengths": "equal"}
    shape |= {"batch": 1, "tree": "random", "nodes": nodes, "mode": "warm", "problem": "", "contestant": "specdec_ops"}
    shape |= {"p50_us": 1.0, "ratio": ratio, "gemm_percent": 85.0, "read_percent": 75.0, "role": "ours"}
    shape |= {"heads": 32, "kv_heads": 8, "roof_percent": ""}
    return results.Cell([shape | changes])


def test_targets_name_the_cells_that_miss():
    good, bad = fake_cells(6.0, roof_percent=90.0), fake_cells(0.9, context=4096, roof_percent=80.0)
    verdicts = targets.verdicts([good, bad])
    assert verdicts[0].met is False and verdicts[0].missed == [f"{bad.label}: 0.9x"]
    assert verdicts[2].met is False and verdicts[2].missed == [f"{bad.label}: 0.90x"]
    assert verdicts[5].met is False and verdicts[5].missed == [f"{bad.label}: 80%"]
    assert verdicts[6].met is True and verdicts[3].met is None  # no cell of few nodes
    decode = [fake_cells(4.5, nodes=1, mode="cold", roof_percent=75.0, context=context) for context in (1024, 4096)]
    judged = targets.verdicts(decode)
    assert judged[3].missed == [f"{decode[1].label}: 75%"] and judged[4].met is True
    by_head = fake_cells(0.5, contestant="specdec_ops head-major")
    both = results.Cell(good.rows + by_head.rows)
    assert targets.verdicts([both])[1].missed == [f"{both.label}: 0.5x"]
    wide = fake_cells(5.0, nodes=256, tree="random", gemm_percent=70.0, roof_percent=90.0)
    assert targets.verdicts([good, wide])[-1].missed == [f"{wide.label}: 82.4%"]


def test_rounds_alternate_and_stay_paired():
    calls = []

    def spin(name, seconds):
        calls.append(name)
        end = time.thread_time() + seconds  # of its own work: a busy machine delays both
        while time.thread_time() < end:
            pass

    pair = [
        Contestant("slow", "pytorch", lambda: spin("slow", 0.012)),
        Contestant("fast", "ours", lambda: spin("fast", 0.006)),
    ]
    measured = timing.CpuTimer().measure(pair, "cold", 0.2)
    ratio = timing.paired_ratio(measured.timings["slow"], measured.timings["fast"])
    assert 1.3 < ratio < 3
    assert abs(calls.count("slow") - calls.count("fast")) <= 1 and len(measured.timings["slow"].seconds) >= 5


def test_busy_rounds_are_dropped_when_enough_are_quiet():
    measured = timing.keep_quiet({"a": [1.0] * 6 + [9.0] * 4}, [0.0] * 6 + [50.0] * 4)
    assert measured.timings["a"].seconds == [1.0] * 6 and not measured.noisy
    measured = timing.keep_quiet({"a": [1.0] * 2 + [9.0] * 4}, [0.0] * 2 + [50.0] * 4)
    assert len(measured.timings["a"].seconds) == 6 and measured.noisy


def test_hopeless_peers_leave():
    pair = [Contestant("fast", "pytorch", list), Contestant("slow", "pytorch", list), Contestant("ours", "ours", list)]
    left = timing.without_hopeless(pair, {"fast": [1.0], "slow": [10.0], "ours": [100.0]})
    assert [each.name for each in left] == ["fast", "ours"]


def test_time_limit_passes_through_handlers_of_exceptions():
    with pytest.raises(tree_attention.OutOfTime, match="did not compile"), tree_attention.time_limit(0.05):
        try:
            time.sleep(5)
        except Exception:
            time.sleep(5)


def test_no_time_for_flex_is_said():
    contestant = tree_attention.flex(make_inputs(cases.toy()), seconds=1)
    assert contestant.problem == "no time left to compile it in this preset"


# --- roofs


def test_each_way_reads_every_byte():
    """The exclusive or of all words, whatever the streams, the threads and the size."""
    words = torch.randint(-(2**62), 2**62, (12_345,), generator=torch.Generator().manual_seed(1))
    for count in (0, 1, 31, 32, 1000, len(words)):
        want = functools.reduce(operator.xor, words[:count].tolist(), 0) % 2**64
        for threads, streams, (ahead, nearest) in itertools.product((1, 3), reading.STREAMS, reading.PREFETCHES):
            assert _C.read_bytes(words.data_ptr(), 8 * count, threads, streams, ahead, nearest) == want
    with pytest.raises(ValueError, match="1 to 16 streams"):
        _C.read_bytes(words.data_ptr(), 8, 1, 17)


def test_the_read_roof_is_the_fastest_of_the_ways(monkeypatch):
    """A processor that reads fastest in four streams with a prefetch, on huge pages, with half of its threads."""
    best = reading.Way(2, 4, 1024, True, True)

    def seconds(self, offset, size, way):
        assert offset >= 0 and offset + size <= self.size
        differs = sum(getattr(way, name) != getattr(best, name) for name in ("threads", "streams", "ahead", "huge"))
        clock[0] += size / 1e9 * (1 + differs)

    clock = [0.0]
    monkeypatch.setattr(reading.Reader, "read_at", seconds)
    monkeypatch.setattr(reading.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    found = reading.Reader(size=1 << 16, seconds=1e-6)
    assert (found.chosen.threads, found.chosen.streams, found.chosen.ahead, found.chosen.huge) == (2, 4, 1024, True)
    assert found.bandwidth == pytest.approx(1e9)
    assert found.way_for(1 << 40) is found.chosen and list(found.buffers) == [True]


def test_a_read_of_more_than_the_buffer_goes_over_it_again(monkeypatch):
    found = reading.Reader(size=1 << 12, seconds=0.0)
    seen = []
    monkeypatch.setattr(found, "read_at", lambda offset, size, way: seen.append((offset, size)))
    found.read(10_000, found.chosen)
    assert seen == [(0, 4096), (0, 4096), (0, 1808)]


def test_no_kernel_can_beat_the_roof_of_arithmetic():
    """Multiply-adds: each instruction set that is there counts what it does, and a dtype has the fastest of its own."""
    counts = {isa: _C.multiply_adds(isa, 100, 2) for isa in roofs.LOOPS["bf16"]}
    lanes = {"generic": 4, "avx2": 8, "avx512": 16, "avx512_bf16": 32}
    for isa, count in counts.items():
        assert count in ((0, 2 * 100 * 4 * 2 * 16 * 16 * 32) if isa == "amx" else (0, 2 * 100 * 12 * 2 * lanes[isa]))
    assert counts["generic"] > 0 and _C.multiply_adds("sse9", 100, 1) == 0
    for isa in roofs.allowed_isas("fp32"):
        assert isa in roofs.LOOPS["fp32"] and counts[isa] > 0 and roofs.multiply_add_loop(isa).rate > 0


def test_a_roof_is_of_the_instruction_sets_that_may_be_used(monkeypatch):
    """Where the kernels are held to one, the roof has none of the newer ones; a contestant that is held has its own."""
    monkeypatch.setenv("SPECDEC_OPS_CPU_ISA", "generic")
    _C.set_cpu_isa("")
    try:
        assert roofs.allowed_isas("fp32") == roofs.allowed_isas("bf16") == ["generic"]
    finally:
        monkeypatch.delenv("SPECDEC_OPS_CPU_ISA")
        _C.set_cpu_isa("")
    case = cases.attention(Model("m", 4, 2, 16), 100, TreeShape("t", chain(8)), "fp32")
    known = roofs.Roofs(1e30, {"fp32": (4e9, 10)}, rates={("fp32", "avx2"): 1e9})
    both = [Contestant("specdec_ops", "ours", list), Contestant("specdec_ops avx2", "ours", list, isa="avx2")]
    timings = {each.name: timing.Timing([1e-3]) for each in both}
    rows = results.rows_of(case, "warm", both, timing.Measurement(timings), known, {})
    assert [row["roof_us"] for row in rows] == pytest.approx([1e6 * case.flops / 4e9, 1e6 * case.flops / 1e9])


def test_the_ratio_is_against_the_fastest_layout():
    """Whatever ours gets: a cache that suits PyTorch is no other league."""
    case = cases.toy()
    names = {"specdec_ops": "ours", "specdec_ops head-major": "ours", "sdpa": "pytorch", "sdpa head-major": "pytorch"}
    listed = [Contestant(name, role, list) for name, role in names.items()]
    seconds = dict(zip(names, (4.0, 2.0, 3.0, 1.0), strict=True))
    measured = timing.Measurement({name: timing.Timing([value]) for name, value in seconds.items()})
    rows = results.rows_of(case, "warm", listed, measured, roofs.Roofs(1e9), {})
    assert {row["best_peer"] for row in rows} == {"sdpa head-major"}
    assert [row["ratio"] for row in rows[:2]] == [0.25, 0.5]


def test_the_roof_is_the_longer_of_the_best_read_and_the_best_arithmetic():
    case = cases.attention(Model("m", 4, 2, 16), 100, TreeShape("t", chain(8)), "fp32")
    known = roofs.Roofs(1e9, {"fp32": (1e9, 10)}, loops={"fp32": roofs.Loop(4e9, "avx2", 1, 1e6)})
    ours = [Contestant("specdec_ops", "ours", list)]

    def row(**seconds):
        timings = {name.replace("_", " "): timing.Timing([value]) for name, value in seconds.items()}
        timings |= {"specdec_ops": timing.Timing([1e-3])}
        return results.rows_of(case, "warm", ours, timing.Measurement(timings), known, {})[0]

    assert row()["roof_us"] == pytest.approx(1e6 * max(case.bytes / 1e9, case.flops / 4e9))
    assert row()["gemm_percent"] == pytest.approx(100 * case.flops / 1e-3 / 1e9)
    assert row(plain_read=5e-4)["roof_us"] == pytest.approx(500) and row(plain_read=5e-4)["read_percent"] == 50
    beside = row(plain_read=1e-9, **{"matrix product": 2e3 / 8e9, "multiply-adds": 1e6 / 2e9})  # 8 and 2 GFLOP/s
    assert beside["roof_us"] == pytest.approx(1e6 * case.flops / 8e9)


def test_older_results_are_marked(tmp_path, toy_roofs):
    """Their roofs were lower than what is possible."""
    rows = run_toys(toy_roofs, [cases.toy()])
    path = tmp_path / "old.csv"
    results.write(path, [row | {"roofs": "a way"} for row in rows], header=True)
    assert results.roofs_note(results.read(path)) == ""
    lines = path.read_text().splitlines()
    path.write_text("\n".join(line.rpartition(",")[0] for line in lines) + "\n")  # without the last column
    assert "lower than what is possible" in results.roofs_note(results.read(path))
    assert results.roofs_note(results.read(path)) in report.summary(results.cells(results.read(path)))
