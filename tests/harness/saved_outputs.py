"""Saves the outputs of a fixed set of calls of every op, or compares with saved ones bit by bit: for refactorings.

    python -m tests.harness.saved_outputs save FILE       # before
    python -m tests.harness.saved_outputs compare FILE    # after, on the same machine; exit status 1: they differ

Every op runs with the definition (torch), with the CPU kernels on each instruction set that the processor has and one
or two threads, with the emulated CUDA kernels and with interpreted Triton. The last two are slow, so they have small
inputs; where PyTorch sees a GPU, Triton is not interpreted and refuses them. A call that a backend refuses is saved
without tensors, so that it stays refused. New memory starts out filled, so what no kernel writes is always the same.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import specdec_ops
from specdec_ops import _C, AttentionState, VocabMap, bound_head, quantize_head
from tests import conftest
from tests.acceptance import accept_cases
from tests.attention import attention_cases
from tests.early_exit import exit_cases
from tests.harness import device_cases, public_calls
from tests.harness.public_calls import int32, random, tensors_of

EMULATED = conftest.kernels.BACKEND
SMALL = ("triton", EMULATED)  # backends that get small inputs
# Vocabularies that take interpreted Triton minutes.
LARGE = tuple(f"device {op} " for op in ("accept", "sample", "exit_confidence", "bounded_exit", "screened_exit"))
ISAS = ("generic", "avx2", "avx512", "avx512_bf16", "amx")
FLOAT32, BFLOAT16, FLOAT16, FLOAT8 = torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn
DTYPES = (FLOAT32, BFLOAT16, FLOAT16)
Cases = Iterator[tuple[str, Callable]]  # a name, and what calls an op, given a backend


def shared_cases(small: bool) -> Cases:
    """Those that other tests have: every public function, and the ops' larger calls."""
    for name, call in public_calls.CALLS.items():
        if call.op is not None:
            yield f"public {name}", functools.partial(call.function, **call.arguments)
        elif not small:  # these have no backend: the CPU kernels run where there are any
            yield f"public {name}", lambda backend, call=call: call.function(**call.arguments)
    for (op, cases), seed in itertools.product(device_cases.CASES.items(), range(1 if small else 3)):
        for name, case in cases.items():
            yield f"device {op} {name} {seed}", functools.partial(case.call, made(case.make, seed))


@functools.lru_cache(maxsize=4)
def made(make: Callable, seed: int) -> device_cases.Tensors:
    """Several calls of an op share their inputs."""
    return make(seed)


FEATURES = (
    {},
    {"window": 9, "softcap": 7.0},
    {"sinks": True, "alibi": True, "scale": 0.3},
    {"num_splits": 3, "window": 20, "sinks": True},
    {"first_nodes": [2, 1, 0], "queries": 1, "softcap": 4.0},
    {"packed": True, "alibi": True},
)


def attention_case(trees, contexts, dtype, **options) -> attention_cases.AttentionCase:
    if dtype != FLOAT8:
        return attention_cases.make_case(trees, contexts, dtype=dtype, **options)
    case = attention_cases.make_case(trees, contexts, dtype=BFLOAT16, k_scale=0.7, v_scale=1.6, **options)
    return replace(case, k_cache=case.k_cache.to(FLOAT8), v_cache=case.v_cache.to(FLOAT8))


def empty_state(q: torch.Tensor) -> AttentionState:
    return AttentionState(torch.empty_like(q), torch.empty(q.shape[:-1]))


def attention(small: bool) -> Cases:
    tree, chain = attention_cases.random_tree, attention_cases.chain
    dims, dtypes = ((64, 96), (BFLOAT16, FLOAT16)) if small else ((64, 96, 128, 192, 256, 40), (*DTYPES, FLOAT8))
    for dim, dtype, page, (index, options) in itertools.product(dims, dtypes, (None, 16), enumerate(FEATURES)):
        case = attention_case([tree(9), chain(3), chain(1)], [37, 70, 0], dtype, dim=dim, page_size=page, **options)
        yield f"attention {dim} {dtype} page {page} features {index}", functools.partial(case.run, return_lse=True)
    for dim, dtype in ((128, FLOAT8), (256, BFLOAT16)) if small else ():
        case = attention_case([tree(9)], [37], dtype, dim=dim)
        yield f"attention {dim} {dtype}", functools.partial(case.run, return_lse=True)
    context, sizes, dtypes = (300, (1, 20), (BFLOAT16,)) if small else (2000, (1, 8, 60), DTYPES)
    for nodes, dtype, page, splits in itertools.product(sizes, dtypes, (None, 16), (None, 4)):
        options = {"heads": 8, "dim": 128, "page_size": page, "num_splits": splits}
        case = attention_case([tree(nodes)] * 2, [context, context - 7], dtype, **options)
        name = f"attention long {nodes} {dtype} page {page} splits {splits}"
        yield name, functools.partial(case.run, return_lse=True)
    case = attention_case([tree(9), chain(3)], [37, 5], BFLOAT16)
    yield "attention no lse", case.run
    yield "attention out", lambda backend: case.run(backend, out=torch.empty_like(case.q))
    yield "attention out and lse", lambda backend: case.run(backend, return_lse=True, out=empty_state(case.q))
    for dtype, dim in itertools.product(DTYPES, (64, 96, 40)):
        states = [random(5, 3, dim, seed=seed).to(dtype) for seed in (0, 1)]
        lses = [random(5, 3, seed=seed) for seed in (2, 3)]
        lses[0][:2], lses[1][1:3] = -torch.inf, -torch.inf
        arguments = (states[0], lses[0], states[1], lses[1])
        yield f"merge {dtype} {dim}", functools.partial(specdec_ops.merge_states, *arguments)


LAWS = (
    {"temperature": 0.05},
    {"temperature": 0.7, "top_k": 50},
    {"temperature": 1.0, "top_p": 0.9},
    {"temperature": torch.tensor([0.7, 0.0, 1.3]), "top_k": int32(0, 5, 20), "top_p": torch.tensor([0.8, 1, 0.5])},
)
ACCEPTANCE = (  # rules, and options of theirs
    *((rule, {}) for rule in accept_cases.RULES),
    ("greedy", {"eos": (3, 5), "max_depth": 2}),
    ("match", {"eos": 3, "max_depth": 2}),
    ("typical", {"epsilon": 0.1, "delta": 0.3}),
    ("target_only", {"thresholds": (0.4, 0.8)}),
    *((rule, {"draft_vocab": 200}) for rule in accept_cases.WITH_DRAFT),
    *((rule, {"one_hot": True}) for rule in ("token", "block", "recursive", "traversal")),
    *((rule, {"replacement": True, "draft_temperature": 1.2}) for rule in ("recursive", "traversal")),
    *((rule, {"draft_rows": "child", "draft_top_k": 40}) for rule in ("recursive", "traversal")),
    *((rule, {"dirt": 0.4}) for rule in accept_cases.RULES),
)


def acceptance(small: bool) -> Cases:
    """Every rule with every law over two vocabularies, and the rules' own options over the smaller one."""
    vocabs = (300,) if small else (1000, 50_257)
    for vocab, dtype, (index, law) in itertools.product(vocabs, (FLOAT32, BFLOAT16), enumerate(LAWS)):
        for rule, own in ACCEPTANCE:
            if (own and (vocab > 1000 or (small and index != 3))) or (rule == "greedy" and index):
                continue
            roots = 2 if rule == "longest" else 1
            trees = [accept_cases.random_parents(nodes, nodes, roots) for nodes in (5, 6, 3)]
            options = {**({} if rule == "greedy" else law), **({"width": 2} if rule == "longest" else {}), **own}
            case = accept_cases.make_case(rule, trees, vocab, seed=index, dtype=dtype, **options)
            yield f"accept {rule} {own} {vocab} {dtype} law {index}", case.run
    case = accept_cases.make_case("greedy", [accept_cases.random_parents(6, 6)] * 2, 300, scale=4.0)
    yield "accept greedy ids", case.changed(target=case.target.argmax(-1)).run


def sampling(small: bool) -> Cases:
    vocabs, dtypes = ((300,), (FLOAT32, BFLOAT16)) if small else ((1000, 50_257), DTYPES)
    for vocab, dtype, (index, law) in itertools.product(vocabs, dtypes, enumerate(LAWS)):
        logits = (3 * random(3, 4, vocab)).to(dtype)
        noise = {"seeds": torch.tensor([7, 2**40, -3]), "positions": int32(3, 70, 2**31 - 1), **law}
        name = f"{vocab} {dtype} law {index}"
        for count in (None, 3):
            tokens = functools.partial(specdec_ops.sample_tokens, logits[:, 0], count=count, **noise)
            yield f"sample_tokens {count} {name}", tokens
        mapping = VocabMap(torch.arange(5, 5 + vocab), 2 * vocab)
        parents = int32([0, 1, 2, 2], [0, 1, 3, 4], [0, 0, 0, 0])
        options = ({}, {"replacement": True}, {"vocab_map": mapping}, {"parents": parents, "first_parent": 1})
        for own in options[index:] if small else options:
            children = functools.partial(specdec_ops.sample_children, logits, 5, **own, **noise)
            yield f"sample_children {[*own]} {name}", children


def exits(small: bool) -> Cases:
    shapes = ((5, 48, 300),) if small else ((1, 64, 997), (7, 264, 5000), (40, 96, 5000))
    for (rows, dim, vocab), dtype in itertools.product(shapes, DTYPES):
        case = exit_cases.make_case(rows, dim, vocab, dtype, norm=True, bias=True, temperatures=True)
        plain = exit_cases.make_case(rows, dim, vocab, dtype, seed=1)
        quantised = replace(case, head=quantize_head(case.head))
        screen, bounds = quantised.head, bound_head(case.head, [vocab // 9, vocab // 3, vocab])
        name = f"{rows} {dim} {vocab} {dtype}"
        yield f"exit_confidence {name}", functools.partial(case.run, top_k=4)
        yield f"exit_confidence plain {name}", plain.run
        yield f"exit_confidence int8 {name}", functools.partial(quantised.run, top_k=16)
        yield f"exit_confidence screen {name}", functools.partial(case.run, top_k=2, screen=screen)
        ids = VocabMap(torch.arange(9, 9 + vocab), 2 * vocab)
        yield f"exit_confidence vocab_map {name}", functools.partial(plain.run, top_k=3, vocab_map=ids)
        decisions = (("max_prob", "row", 0.6), ("margin", "any", 0.4), ("entropy", "all", 2.0), ("entropy", "row", 2.0))
        forms = (("", case, {}), ("screen", case, {"screen": screen}), ("bounds", case, {"bounds": bounds}))
        forms += (("int8 bounds", quantised, {"bounds": bound_head(screen, [vocab // 5, vocab])}),)
        for (measure, level, threshold), (kind, of, options) in itertools.product(decisions, forms):
            call = functools.partial(of.decide, threshold=threshold, measure=measure, level=level, top_k=2, **options)
            yield f"early_exit {kind} {measure} {level} {name}", call
    for sizes, dtype in itertools.product(((11, 44, 1), (96, 64, 32, 1), (300, 1)), DTYPES):
        layers = [(random(o, i).to(dtype) / i**0.5, random(o)) for i, o in itertools.pairwise(sizes)]
        features = random(9, sizes[0]).to(dtype)
        yield f"exit_mlp {sizes} {dtype}", functools.partial(specdec_ops.exit_mlp, features, layers, 0.6)


def propagation(small: bool) -> Cases:
    rows, dim, width = (5, 48, 2 * 32) if small else (19, 136, 2 * 64)
    tables = tuple(random(32, width // 8, seed=seed) for seed in (0, 1))  # half of each head is rotated
    table = torch.randperm(8, generator=device_cases.generator_of(0)).view(2, 4).int()
    slots = torch.arange(rows).int() - 1  # the first row is padding
    for dtype, norm, rope, interleaved, paged in itertools.product(
        DTYPES, (None, FLOAT32, "own"), (None, 1e4, tables), (False, True), (False, True)
    ):
        norms = None if norm is None else random(dim).abs().to(dtype if norm == "own" else norm)
        weights = [(norms, random(width, dim).to(dtype), random(width, dim, seed=1).to(dtype)) for _ in range(2)]
        caches = [torch.zeros(*((8, 5) if paged else (2, 20)), 2, width // 2, dtype=dtype) for _ in range(2)]
        arguments = (random(rows, dim).to(dtype), weights, slots, slots, caches, caches)
        options = {"rope": rope, "interleaved": interleaved, "requests": slots % 2}
        call = functools.partial(public_calls._propagated, *arguments, page_table=table if paged else None, **options)
        kind = "tables" if rope is tables else rope
        name = f"kv_propagate {dtype} norm {norm} rope {kind} {'interleaved ' * interleaved}{'paged' * paged}"
        yield name, call


def topologies(small: bool) -> Cases:
    for nodes in (1, 7, 70) if small else (1, 7, 64, 65, 200, 1024):
        trees = torch.tensor([attention_cases.random_tree(nodes, seed) for seed in range(3)]).int()
        broken = trees.clone()
        broken[:, nodes // 2] = int32(nodes, -7, nodes // 2)
        for kind, parents, sizes in (("whole", trees, None), ("broken", broken, int32(nodes, nodes + 1, nodes // 2))):
            yield f"topology {nodes} {kind}", functools.partial(specdec_ops.build_topology, parents, sizes)


def layer_caches(small: bool) -> Cases:
    arguments = public_calls.CALLS["LayerCache"].arguments
    for dtype in (BFLOAT16, FLOAT16) if small else DTYPES:
        yield f"LayerCache {dtype}", functools.partial(public_calls._decoded, **arguments, dtype=dtype)


FAMILIES = (shared_cases, attention, acceptance, sampling, exits, propagation, topologies, layer_caches)


def configurations() -> list[tuple[str, str, str, int]]:
    """(name, backend, instruction set, threads) of all that can run here."""
    found = [("torch", "torch", "", 1), ("triton", "triton", "", 1)]
    if why := conftest.build.why_not():
        print(f"no emulated CUDA: {why}")
    else:
        found.append((EMULATED, EMULATED, "", 1))
    for isa in ISAS:
        _C.set_cpu_isa(isa)
        if _C.cpu_isa() == isa:
            found += [(f"cpu {isa} {threads}", "cpu", isa, threads) for threads in (1, 2)]
    _C.set_cpu_isa("")
    return found


def outputs(only: str) -> dict[str, list[torch.Tensor] | str]:
    """Of every case whose name contains `only`, its tensors, or what it raised."""
    found, known = {}, configurations()
    for small, family in itertools.product((False, True), FAMILIES):
        for case, call in family(small):
            for configuration, backend, isa, threads in known:
                name = f"{configuration}: {case}"
                too_slow = backend == "triton" and case.startswith(LARGE)
                if (backend in SMALL) != small or only not in name or too_slow:
                    continue
                assert name not in found, f"two cases are called {name}"
                _C.set_cpu_isa(isa)
                torch.set_num_threads(threads)
                torch.manual_seed(0)
                found[name] = outputs_of(call, backend)
    return found


def outputs_of(call: Callable, backend: str) -> list[torch.Tensor] | str:
    try:
        return [tensor.clone() for tensor in tensors_of(call(backend=backend))]
    except Exception as error:
        refused = isinstance(error, RuntimeError) and ("is unavailable" in str(error) or "kernels take" in str(error))
        return [] if refused else f"{type(error).__name__}: {error}"


def difference(before: list[torch.Tensor] | None, now: list[torch.Tensor] | str | None) -> str | None:
    """Where the bytes of two cases differ first, in words."""
    if isinstance(now, str):
        return f"raised {now}"
    if before is None or now is None:
        return "new" if before is None else "missing"
    if len(before) != len(now):
        return f"{len(now)} tensors, not {len(before)}"
    for index, (old, new) in enumerate(zip(before, now, strict=True)):
        if (old.shape, old.dtype) != (new.shape, new.dtype):
            return f"tensor {index}: {new.dtype} {[*new.shape]}, not {old.dtype} {[*old.shape]}"
        unequal = (bytes_of(old) != bytes_of(new)).any(1).nonzero()
        if len(unequal):
            first = int(unequal[0])
            values = f"{new.flatten()[first].item()}, not {old.flatten()[first].item()}"
            return f"tensor {index} {[*old.shape]}: {len(unequal)} elements differ, first number {first}: {values}"
    return None


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """uint8 [elements, bytes of one]."""
    return tensor.flatten().view(torch.uint8).view(-1, tensor.element_size())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=("save", "compare"))
    parser.add_argument("file", type=Path)
    parser.add_argument("--only", default="", help="a part of the names of the cases to look at")
    arguments = parser.parse_args()
    start = time.perf_counter()
    conftest.prepare_interpreter()
    torch.use_deterministic_algorithms(True)  # also fills new memory
    with pytest.MonkeyPatch.context() as patch:
        conftest.emulate_cuda(patch)
        now = outputs(arguments.only)
    before = now
    if arguments.action == "compare":
        before = {name: case for name, case in torch.load(arguments.file).items() if arguments.only in name}
    different = 0
    for name in sorted({*before, *now}):
        if text := difference(before.get(name), now.get(name)):
            different += 1
            print(f"{name}: {text}")
    if arguments.action == "save" and not different:
        torch.save(now, arguments.file)
    tensors, refused = sum(map(len, now.values())), sum(not case for case in now.values())
    seconds = f"{time.perf_counter() - start:.0f} s ({time.process_time():.0f} s of processors)"
    print(f"{len(now)} cases ({refused} refused), {tensors} tensors, {different} differ or fail; {seconds}")
    return min(different, 1)


if __name__ == "__main__":
    sys.exit(main())
