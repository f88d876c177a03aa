"""What the benchmarks do on a GPU, without one: what peers are given, the clock, the goals, and going on with a run."""

import sys
from types import SimpleNamespace

import pytest
import torch

from benchmarks import run
from benchmarks.acceptance import lengths as acceptance_lengths
from benchmarks.attention import cases, flashinfer_peers, tree_attention, xformers_peer
from benchmarks.attention.inputs import make_inputs
from benchmarks.gpu import timing as gpu_timing
from benchmarks.harness import report, results, roofs, targets_gpu, timing
from benchmarks.harness.cases import TREES, Model
from benchmarks.harness.contestant import Contestant, check, unavailable
from tests.benchmarks import stub_peers

MODEL = Model("small", 4, 2, 32)
SHAPES = {
    "one request": cases.AttentionCase("tree_attention", MODEL, (70,), TREES[8], "bf16"),
    "even pages": cases.AttentionCase("tree_attention", MODEL, (120, 120), TREES[8], "fp32"),
    "ragged": cases.AttentionCase("tree_attention", MODEL, (150, 64, 1, 63), TREES[16], "bf16"),
    "odd mask": cases.AttentionCase("tree_attention", MODEL, (33, 90), TREES[44], "fp32"),
    "one node": cases.AttentionCase("tree_attention", MODEL, (65, 127), TREES[1], "fp32"),
}


@pytest.fixture
def peers(monkeypatch):
    """Stubs in place of the libraries, which read what they are given as the real ones do."""
    for name, module in stub_peers.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(flashinfer_peers, "WORKSPACE_BYTES", 1 << 20)
    monkeypatch.setattr(flashinfer_peers, "SEMAPHORE_BYTES", 1 << 10)
    monkeypatch.setattr(flashinfer_peers, "XQA_NODES", (8, 16, 44))
    monkeypatch.setattr(flashinfer_peers, "_workspaces", {})
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the tensors are tiny
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("case", SHAPES.values(), ids=SHAPES)
def test_libraries_get_what_they_need(peers, case):
    """Every form is right by the check that comes before each timing, and again when it is called again."""
    inputs = make_inputs(case)
    expected = tree_attention.expected(inputs)
    listed = [*flashinfer_peers.contestants(inputs), *xformers_peer.contestants(inputs)]
    names = {each.name for each in listed if not each.problem}
    right = {"flashinfer mask", "flashinfer mask + plan", "flashinfer fa2 + tree + merge", "xformers tree_attention"}
    assert right | ({"flashinfer xqa"} if case.nodes > 1 else set()) <= names
    for _ in range(2):
        for contestant in listed:
            if contestant.name in names:
                checked = check(contestant, expected)
                assert not checked.problem and checked.error is not None, (contestant.name, checked.problem)


def test_plans_are_inside_or_outside(peers, monkeypatch):
    """A contestant that plans can't be in a graph, and its plan never touches the wrappers of the one in the graph."""
    inputs = make_inputs(SHAPES["ragged"])
    listed = {each.name: each for each in flashinfer_peers.contestants(inputs)}
    assert [name for name, each in listed.items() if not each.graph] == [n for n in listed if n.endswith("+ plan")]
    stub, calls = sys.modules["flashinfer"].BatchPrefillWithPagedKVCacheWrapper, []

    def recording(name, original):
        return lambda self, *arguments, **options: calls.append((name, self)) or original(self, *arguments, **options)

    for name in ("plan", "run"):
        monkeypatch.setattr(stub, name, recording(name, getattr(stub, name)))
    listed["flashinfer mask"].call()
    listed["flashinfer mask + plan"].call()
    assert [name for name, _ in calls] == ["run", "plan", "run"]
    assert calls[0][1] is not calls[1][1] and calls[1][1] is calls[2][1]


def test_a_wrong_mask_is_noticed(peers, monkeypatch):
    """The stubs obey the masks: with everything visible, each form with a mask is wrong."""
    inputs = make_inputs(SHAPES["ragged"])
    expected = tree_attention.expected(inputs)
    inputs.tree_mask = torch.ones_like(inputs.tree_mask)
    listed = [*flashinfer_peers.contestants(inputs), *xformers_peer.contestants(inputs)]
    assert len(listed) == 6 and all(check(each, expected).problem.startswith("WRONG") for each in listed)


def test_bits_of_the_draft_mask():
    mask = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 0, 1]]).bool()
    words = flashinfer_peers.draft_mask_words(mask, 2)
    assert words.dtype == torch.uint16 and words.view(torch.int16).tolist() == [[[1, 0], [3, 0], [5, 0]]] * 2
    wide = torch.ones(40, 40, dtype=torch.bool).tril()
    row = flashinfer_peers.draft_mask_words(wide, 1).view(torch.int16)[0, 39].tolist()
    assert row == [-1, -1, 0xFF, 0]


def test_page_lists_by_hand():
    indptr, indices, last = flashinfer_peers.page_lists([64, 65, 1], 3)
    assert indptr.tolist() == [0, 1, 3, 4] and indices.tolist() == [0, 3, 4, 6] and last.tolist() == [64, 1, 1]


def test_absent_libraries_say_so(monkeypatch):
    for name in ("flashinfer", "xformers", "xformers.ops.tree_attention"):
        monkeypatch.setitem(sys.modules, name, None)
    inputs = make_inputs(SHAPES["one request"])
    listed = [*flashinfer_peers.contestants(inputs), *xformers_peer.contestants(inputs)]
    assert [each.problem[:60].partition(":")[0] for each in listed] == [
        "flashinfer can't be imported",
        "can't be imported",
    ]


def test_a_form_that_fails_to_compile_spares_the_others(peers, monkeypatch):
    def broken(*arguments, **options):
        raise RuntimeError("ninja: build stopped")

    monkeypatch.setattr(sys.modules["flashinfer"], "BatchPrefillWithRaggedKVCacheWrapper", broken)
    listed = {each.name: each for each in flashinfer_peers.contestants(make_inputs(SHAPES["one request"]))}
    assert "ninja: build stopped" in listed["flashinfer fa2 + tree + merge"].problem
    assert not listed["flashinfer mask"].problem and not listed["flashinfer xqa"].problem


def test_every_kernel_is_compiled_before(peers, monkeypatch, capsys):
    """Each form and shape of a preset once, in as many processes as one likes; XQA per number of nodes and group."""
    few = [SHAPES["one request"], SHAPES["ragged"], cases.toy("merge_states"), SHAPES["even pages"]]
    monkeypatch.setitem(cases.PRESETS, "gpu", lambda: few)
    for index in range(2):
        assert flashinfer_peers.main(["gpu", f"{index}/2"]) == 0
    shown = [line for line in capsys.readouterr().out.splitlines() if line.endswith("...")]
    assert sorted(shown) == sorted(
        f"flashinfer {form}, small {shape} ..."
        for form, shape in [
            *((form, shape) for form in ("mask", "fa2 + tree + merge") for shape in ("bf16 n8", "fp32 n8")),
            *(("xqa", shape) for shape in ("bf16 n8", "bf16 n16", "fp32 n8")),
        ]
    )


def test_additive_masks_and_our_pages():
    inputs = make_inputs(SHAPES["ragged"])
    bias = tree_attention.additive(inputs.mask, torch.float32)
    assert bias.shape == inputs.mask.shape and bias.stride(-2) % 8 == 0
    assert torch.equal(bias == 0, inputs.mask) and torch.equal(bias == -torch.inf, ~inputs.mask)
    checked = check(tree_attention.ours_paged(inputs), tree_attention.expected(inputs))
    assert not checked.problem and checked.error is not None


def test_everybody_on_a_gpu_is_checked(peers):
    """All contestants of a cell, ratios against any library included."""
    inputs = make_inputs(SHAPES["odd mask"])
    listed = tree_attention.contestants_on_gpu(inputs, run.Options("gpu", backends=("torch",), device="cuda"))
    expected = tree_attention.expected(inputs)
    assert not [f"{each.name}: {each.problem}" for each in (check(c, expected) for c in listed) if each.problem]
    assert {each.role for each in listed} == {"ours", "pytorch", "library"}
    timings = {each.name: timing.Timing([2.0]) for each in listed} | {"flashinfer xqa": timing.Timing([1.0])}
    assert results.fastest_peer(listed, timings) == "flashinfer xqa"


# --- the clock


@pytest.fixture
def fake_cuda(monkeypatch):
    """A GPU whose time passes by a millisecond in each call of `spend`; graphs replay what was captured."""
    state = SimpleNamespace(now=0.0, captured=None, fail=False)

    class Event:
        def __init__(self, enable_timing):
            self.at = None

        def record(self):
            self.at = state.now

        def synchronize(self):
            pass

        def elapsed_time(self, other):
            return 1e3 * (other.at - self.at)

    class Graph:
        def replay(self):
            state.now += 1e-3 * self.calls

    class Capture:
        def __init__(self, graph):
            self.graph = graph

        def __enter__(self):
            self.start = state.now
            if state.fail:
                raise RuntimeError("operation not permitted when stream is capturing")

        def __exit__(self, *_):
            self.graph.calls = round((state.now - self.start) * 1e3)

    class Stream:
        def wait_stream(self, other):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    replacements = {"Event": Event, "CUDAGraph": Graph, "graph": Capture, "Stream": Stream}
    replacements |= {"current_stream": Stream, "stream": lambda stream: stream, "synchronize": lambda: None}
    for name, value in replacements.items():
        monkeypatch.setattr(torch.cuda, name, value)

    def spend(milliseconds):
        def call():
            state.now += milliseconds / 1e3

        return call

    state.spend = spend
    return state


def test_the_clock_divides_by_the_copies(fake_cuda):
    """Copies of the inputs run in turn within one replay; a contestant that plans runs in a loop, and both say so."""
    names = {"ours": ("ours", 1, True), "peer": ("library", 2, True), "peer + plan": ("library", 5, False)}
    copies = [
        [Contestant(name, role, fake_cuda.spend(ms), graph=graph) for name, (role, ms, graph) in names.items()]
        + [unavailable("absent", "library", "not installed"), Contestant("short of memory", "library", list)]
        for _ in range(3)
    ]
    copies[2][-1].problem = "out of memory"
    measured = gpu_timing.GpuTimer().measure(copies, seconds=0.2)
    assert {name: round(timing.median * 1e3, 6) for name, timing in measured.timings.items()} == {
        name: ms for name, (_, ms, _) in names.items()
    }
    assert measured.how == {"ours": "graph", "peer": "graph", "peer + plan": "loop"}
    assert measured.rounds_run >= 5


def test_a_capture_that_fails_is_a_loop(fake_cuda):
    fake_cuda.fail = True
    measured = gpu_timing.GpuTimer().measure([[Contestant("ours", "ours", fake_cuda.spend(1))]], seconds=0.01)
    assert measured.how == {"ours": "loop"} and round(measured.timings["ours"].median * 1e3, 6) == 1


def test_copies_exceed_the_cache_twice(monkeypatch):
    properties = SimpleNamespace(L2_cache_size=50 << 20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    for size in (1, 1 << 20, 30 << 20, 1 << 30):
        copies = gpu_timing.copies_needed(size)
        assert copies == gpu_timing.MAX_COPIES or copies * size > 100 << 20
    assert gpu_timing.copies_needed(1 << 30) == 2


COLUMNS = {"machine": "a GPU", "isa": "sm_90", "threads": "1", "torch": "2", "commit": "abc", "date": "today"}
COLUMNS |= {"specdec_ops": "0", "python": "3", "command": "python -m benchmarks.run"}


def test_a_cell_on_a_gpu(fake_cuda, peers, monkeypatch):
    """From inputs to the report, on a device of which only the clock is not real: every call takes a millisecond."""

    def contestants(inputs, options):
        listed = tree_attention.contestants_on_gpu(inputs, options)
        spend = fake_cuda.spend(1.0)
        for each in listed:
            each.call = lambda call=each.call: (call(), spend())[0]
        return listed

    properties = SimpleNamespace(L2_cache_size=50 << 10)
    operands = roofs.gemm_operands
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(roofs, "gemm_operands", lambda dtype, size, device: operands(dtype, size, "cpu"))
    on_cpu = run.OPS["tree_attention"]._replace(
        make_inputs=lambda case, device: make_inputs(case), contestants=contestants
    )
    monkeypatch.setitem(run.OPS, "tree_attention", on_cpu)
    case = SHAPES["ragged"]
    options = run.Options("gpu", device="cuda")
    known = roofs.Roofs(case.bytes / 5e-4, {"bf16": (1e12, 64)}, "copy")  # the bytes take half a millisecond
    runner = run.Runner(options, known, COLUMNS, run.Clock("gpu", 1, cell_seconds=0.1))
    (rows,) = runner.run(case, ("cold",))
    found = results.Cell(rows)
    assert found.ours["p50_us"] == pytest.approx(1000) and found.ours["ratio"] == pytest.approx(1)
    assert found.ours["read_percent"] == found.ours["roof_percent"] == pytest.approx(50)
    how = {row["contestant"]: row["how"] for row in rows}
    assert how["specdec_ops"] == how["flashinfer xqa"] == "graph" and how["flashinfer mask + plan"] == "loop"
    lines = report.summary([found])
    assert "against flashinfer xqa: mean 1.00x, least 1.00x over 1 cells" in lines
    assert any("85% of a copy's bandwidth" in line for line in lines)


def test_a_gpu_that_fails_ends_the_run(peers, monkeypatch, tmp_path):
    """Its cell is written without times, and the rest is left for another process."""

    def broken():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    monkeypatch.setattr(run.Runner, "_contestants", lambda self, case: [[Contestant("specdec_ops", "ours", list)]])
    runner = run.Runner(run.Options("gpu", device="cuda"), roofs.Roofs(1e12), COLUMNS, run.Clock("gpu", 2))
    chosen = [(SHAPES["ragged"], ("cold",)), (SHAPES["one node"], ("cold",))]
    assert run.run_all(runner, chosen, tmp_path / "result.csv") is False
    (written,) = results.cells(results.read(tmp_path / "result.csv"))
    assert written.ours is None and written.key == results.key(SHAPES["ragged"], "cold")


# --- goals


def cell(p50, peers, **changes):
    shape = {"op": "tree_attention", "model": "m", "heads": 32.0, "kv_heads": 8.0, "dtype": "bf16", "context": 8192.0}
    shape |= {"lengths": "equal", "batch": 8.0, "tree": "random", "nodes": 16.0, "mode": "cold", "problem": ""}
    shape |= {"read_percent": 90.0, "gemm_percent": 50.0, "isa": "sm_90", "others_percent": 0.0, "noise_percent": 1.0}
    shape |= changes
    ratio = min(peers.values()) / p50
    rows = [shape | {"contestant": "specdec_ops", "role": "ours", "p50_us": p50, "ratio": ratio}]
    rows += [shape | {"contestant": name, "role": "library", "p50_us": time} for name, time in peers.items()]
    return results.Cell(rows)


def test_goals_name_the_cells_that_miss():
    good = cell(10.0, {"a": 15.0, "b": 30.0})
    slow = cell(10.0, {"a": 9.0}, nodes=8.0, read_percent=70.0)
    wide = cell(10.0, {"a": 20.0}, nodes=256.0, gemm_percent=65.0)
    memory, compute, ratio = targets_gpu.verdicts([good, slow, wide])
    assert memory.met is False and memory.missed == [f"{slow.label}: 70%"]
    assert compute.met is True and ratio.met is False and ratio.missed == [f"{slow.label}: 0.90x"]
    assert targets_gpu.verdicts([good, wide])[2].met is True
    assert targets_gpu.library_means([good, slow]) == [
        "against a: mean 1.16x, least 0.90x over 2 cells",
        "against b: mean 3.00x, least 3.00x over 1 cells",
    ]


def test_every_goal_has_cells_in_the_presets():
    for preset in ("gpu", "gpu-quick"):
        chosen = [case for case in cases.PRESETS[preset]() if case.op == "tree_attention"]
        large = [case for case in chosen if case.batch >= targets_gpu.WIDE and case.context >= targets_gpu.LONG]
        rows = [case.nodes * case.model.group for case in large]
        assert sum(count <= targets_gpu.MEMORY_BOUND_ROWS for count in rows) >= 4
        assert sum(count >= targets_gpu.COMPUTE_BOUND_ROWS for count in rows) >= 1
        assert {44, 60, 64, 82} <= {case.nodes for case in large}


# --- going on with a run


@pytest.fixture
def known_roofs(monkeypatch):
    """Measuring them, and decoding text at the end of a run, takes longer than a toy."""
    monkeypatch.setattr(roofs, "measure", lambda device, dtypes: roofs.Roofs(1e10, {"fp32": (1e11, 64)}))
    monkeypatch.setattr(acceptance_lengths, "report", lambda *arguments, **options: None)


def test_a_run_goes_on_where_it_stopped(known_roofs, tmp_path, monkeypatch, capsys):
    few = [cases.toy(), cases.toy(tree=TREES[16]), cases.toy("merge_states")]
    monkeypatch.setitem(run.PRESETS, "quick", lambda: few)
    csv = tmp_path / "result.csv"
    command = ["--quick", "--seconds", "0.01", "--csv", str(csv), "--resume", "--no-plot", "--isa", ""]
    assert run.main([*command, "--limit", "0"]) == run.UNFINISHED
    assert run.main([*command, "--filter", "n16"]) == 0
    assert len(results.cells(results.read(csv))) == 1
    assert run.main(command) == 0
    assert "[2/2]" in capsys.readouterr().out
    rows = results.read(csv)
    assert {each.key for each in results.cells(rows)} == {results.key(case, "warm") for case in few} | {
        results.key(case, "cold") for case in few if "cold" in case.modes
    }
    assert run.main(command) == 0 and results.read(csv) == rows


def test_a_cell_that_ends_the_run_is_left_out_in_the_end(known_roofs, tmp_path, monkeypatch):
    few = [cases.toy(), cases.toy("merge_states")]
    monkeypatch.setitem(run.PRESETS, "quick", lambda: few)
    original = run.Runner.run

    def dies(self, case, modes):
        if case.op == "tree_attention":
            raise SystemExit("as if the process had died")
        return original(self, case, modes)

    monkeypatch.setattr(run.Runner, "run", dies)
    csv = tmp_path / "result.csv"
    command = ["--quick", "--seconds", "0.01", "--csv", str(csv), "--resume", "--no-plot"]
    for _ in range(run.MOST_ATTEMPTS):
        with pytest.raises(SystemExit, match="died"):
            run.main(command)
    assert run.main(command) == 0
    first, second = results.cells(results.read(csv))
    assert first.rows[0]["problem"] == "ended the run 3 times" and second.ours is not None


def test_contestants_can_be_left_out(known_roofs, tmp_path, monkeypatch):
    monkeypatch.setitem(run.PRESETS, "quick", lambda: [cases.toy()])
    csv = tmp_path / "result.csv"
    run.main(["--quick", "--seconds", "0.01", "--csv", str(csv), "--no-plot", "--without", "^sdpa|avx"])
    names = {row["contestant"] for row in results.read(csv)}
    assert "eager" in names and not [name for name in names if name.startswith("sdpa")]
