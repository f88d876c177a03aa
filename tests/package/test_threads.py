"""Threads of CPU kernels: how work is dealt to them changes no bit, and where others hold cores a team gets smaller."""

import re
import subprocess
import sys

import pytest
import torch

import specdec_ops as ops
from specdec_ops import _C, Tree
from tests.harness.public_calls import tensors_of
from tests.package.test_layering import ROOT

MILLISECOND = 1_000_000
LATE = 8 * MILLISECOND  # a time slice or two of a scheduler
THREADS = (2, 3, 8)
TIMES = 6


def random(*shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(dtype)


def attention(nodes, **options):
    q, caches = random(2, nodes, 8, 64), random(2, 2, 1500, 4, 64)
    topology = Tree.from_branching((nodes - 1,)).to("cpu", 2) if nodes > 1 else Tree.chain(1).to("cpu", 2)
    lens = torch.tensor([1400, 700], dtype=torch.int32)
    return lambda: ops.tree_attention(q, *caches, topology, lens, return_lse=True, backend="cpu", **options)


def product(rows, dtype, quantized=False):
    x, weight = random(rows, 576, dtype=dtype), random(1000, 576, dtype=dtype)
    weight = ops.quantize_linear(weight) if quantized else weight
    return lambda: ops.linear(x, weight, activation="swiglu", backend="cpu")


def confidence(rows, **options):
    hidden, head = random(rows, 192), random(6000, 192)
    return lambda: ops.exit_confidence(hidden, head, norm_weight=random(192), top_k=5, backend="cpu", **options)


def decision():
    layers = [(random(n, m) / m**0.5, random(n)) for m, n in ((700, 600), (600, 600), (600, 1))]
    return lambda: ops.exit_mlp(random(4, 700), layers, 0.4, backend="cpu")


def propagation():
    layers = [(random(512), random(512, 512), random(512, 512)) for _ in range(2)]
    places = torch.arange(5, dtype=torch.int32)

    def call():
        caches = [[torch.zeros(1, 8, 8, 64) for _ in layers] for _ in "kv"]
        tables = (random(8, 32), random(8, 32))
        ops.kv_propagate(random(5, 512), layers, places, places, *caches, rope=tables, norm_eps=1e-5, backend="cpu")
        return [*caches[0], *caches[1]]

    return call


def acceptance(batch):
    logits, topology = 4 * random(batch, 9, 40000), Tree.chain(9).to("cpu", batch)
    tokens, seeds = logits.argmax(-1).int().roll(1, 1), torch.arange(batch)
    positions = torch.arange(batch, dtype=torch.int32)
    options = dict(seeds=seeds, positions=positions, top_p=0.9, backend="cpu")
    return lambda: ops.tree_accept(logits, tokens, topology, **options)


def draws():
    logits = random(3, 40000)
    options = dict(seeds=torch.arange(3), positions=torch.arange(3, dtype=torch.int32), count=8, backend="cpu")
    return lambda: ops.sample_tokens(logits, **options)


CALLS = {
    "linear of one row": lambda: product(1, torch.float32),
    "linear of 40 rows": lambda: product(40, torch.float32),
    "linear in bfloat16": lambda: product(3, torch.bfloat16),
    "linear in int8": lambda: product(2, torch.float32, quantized=True),
    "rms_norm": lambda: lambda: ops.rms_norm(random(300, 600), random(600), backend="cpu"),
    "one node": lambda: attention(1),
    "a tree": lambda: attention(40),
    "a path-invariant tree": lambda: attention(12, path_invariant=True),
    "exit_confidence": lambda: confidence(2),
    "a screened head": lambda: confidence(2, screen=ops.quantize_head(random(6000, 192))),
    "exit_mlp": decision,
    "kv_propagate": propagation,
    "one request accepts": lambda: acceptance(1),
    "requests accept": lambda: acceptance(9),
    "sample_tokens": draws,
}


def bits(result):
    return [part.contiguous().flatten().view(torch.uint8).clone() for part in tensors_of(result)]


@pytest.fixture(scope="module")
def busy_neighbours():
    """Two programs that hold a core each."""
    programs = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]
    yield
    for program in programs:
        program.kill()
        program.wait()


@pytest.mark.parametrize("name", CALLS)
def test_dealing_changes_no_bit(name, threads, busy_neighbours):
    """Any number of threads, and neighbours that hold some of them up."""
    call = CALLS[name]()
    threads(1)
    expected = bits(call())
    assert expected
    for count in THREADS:
        threads(count)
        for _ in range(TIMES):
            assert all(map(torch.equal, bits(call()), expected)), count


def test_a_team_that_was_waited_for_gets_smaller():
    limit = _C.TeamLimit()
    assert [limit.threads(asked, now=0) for asked in (1, 2, 16)] == [1, 2, 16]
    for expected in (15, 14):
        limit.note(threads=expected + 1, waited=LATE, worked=MILLISECOND, now=0)
        assert [limit.threads(asked, now=1) for asked in (1, 2, 16)] == [1, 2, expected]
    limit.note(threads=2, waited=LATE, worked=MILLISECOND, now=0)
    assert limit.threads(16, now=1) == 1


def test_a_team_gets_its_threads_back():
    """After as long as was lost; where that was too early, after twice the last time, and half a second at most."""
    limit, now = _C.TeamLimit(), 0
    for pause in (1, 2, 4, 8, 16, 32, 62.5, 62.5):  # times LATE
        limit.note(threads=2, waited=LATE, worked=0, now=now)
        assert limit.threads(2, now=now + int(pause * LATE) - 1) == 1
        now += int(pause * LATE)
        assert limit.threads(2, now=now) == 2
        now += LATE  # the next wait
    now += 1000 * MILLISECOND  # in which nobody was waited for
    limit.note(threads=2, waited=LATE, worked=0, now=now)
    assert [limit.threads(2, now=now + past) for past in (0, LATE - 1, LATE)] == [1, 1, 2]


@pytest.mark.parametrize(
    ("waited", "worked"),
    [(MILLISECOND // 20, 0), (LATE, LATE), (LATE, 100 * LATE)],
    ids=["waking a thread", "a last share", "a long call"],
)
def test_usual_waits_cost_no_thread(waited, worked):
    limit = _C.TeamLimit()
    limit.note(threads=2, waited=waited, worked=worked, now=0)
    assert limit.threads(2, now=0) == 2


def test_threads_are_started_in_one_place():
    """But for the loops that benchmarks measure a machine with."""
    starts = re.compile(r"#pragma omp|std::thread\b(?!::)|pthread_create")
    found = {
        str(path.relative_to(ROOT))
        for path in ROOT.glob("csrc/*/cpu/**/*")
        if path.is_file() and starts.search(path.read_text())
    }
    assert found == {"csrc/common/cpu/thread_pool.h", "csrc/common/cpu/benchmark_probes.cpp"}
