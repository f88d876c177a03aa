"""FlashInfer's ways to attend over a tree, each in its fastest correct form.

FlashInfer has no one call for a tree over a context. There are three forms, all over a cache in pages of 64 slots:

- its prefill kernel with a custom mask: a bit for every node and slot, the context included;
- XQA, the kernel for speculative decoding: a mask among the drafted nodes only. It is compiled per number of nodes;
- prefill without a mask over the context, prefill with a mask over the tree, and a merge of the two.

The prefill wrappers plan on the host. A plan serves all layers of one step, so each form is timed twice: planned
before, in a graph; and with the plan inside, as the first layer of a step pays for it, which no graph can hold.

Making pages, masks and lists is never timed.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as functional

from benchmarks.harness.contestant import Contestant, unavailable

from .cases import PRESETS, AttentionCase
from .inputs import Inputs, make_inputs

PAGE = 64
WORKSPACE_BYTES = 256 << 20
SEMAPHORE_BYTES = 8 << 20
XQA_NODES = (8, 64, 256)  # each number of nodes is one compilation of most of a minute
XQA_GENERATIONS = (9, 10, 12)

_workspaces: dict[tuple, torch.Tensor] = {}


def workspace(device: torch.device, kind: str) -> torch.Tensor:
    """Zeroed scratch, shared by all contestants: they run one after another on one stream."""
    key = device, kind
    if key not in _workspaces:
        _workspaces[key] = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
    return _workspaces[key]


def to_pages(cache: torch.Tensor) -> torch.Tensor:
    """[batch, slots, kv_heads, dim] as [batch * pages, PAGE, kv_heads, dim]; a request's pages follow each other."""
    _, slots, kv_heads, dim = cache.shape
    padded = functional.pad(cache, (0, 0, 0, 0, 0, -slots % PAGE))
    return padded.reshape(-1, PAGE, kv_heads, dim).contiguous()


def page_lists(lengths: list[int], pages_per_request: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Starts [batch + 1] in the page numbers, those, and the slots used of each request's last page."""
    used = [max(1, -(-length // PAGE)) for length in lengths]
    indptr = torch.tensor([0, *used], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    indices = [request * pages_per_request + page for request, count in enumerate(used) for page in range(count)]
    last = [length - (count - 1) * PAGE for length, count in zip(lengths, used, strict=True)]
    return indptr, torch.tensor(indices, dtype=torch.int32), torch.tensor(last, dtype=torch.int32)


def row_starts(batch: int, nodes: int) -> torch.Tensor:
    return torch.arange(batch + 1, dtype=torch.int32) * nodes


def whole_mask(inputs: Inputs) -> torch.Tensor:
    """One bool for every node and visible slot, request after request, flat."""
    nodes, parts = inputs.case.nodes, []
    for context in inputs.case.contexts:
        seen = torch.ones(nodes, context, dtype=torch.bool, device=inputs.tree_mask.device)
        parts.append(torch.cat([seen, inputs.tree_mask], dim=1).flatten())
    return torch.cat(parts)


def draft_mask_words(tree_mask: torch.Tensor, batch: int) -> torch.Tensor:
    """XQA's mask: uint16 [batch, nodes, words], little-endian bits, an even number of words in each row."""
    nodes = tree_mask.shape[0]
    words = -(-nodes // 32) * 2
    bits = functional.pad(tree_mask.int(), (0, 16 * words - nodes)).view(nodes, words, 16)
    values = (bits << torch.arange(16, device=bits.device)).sum(dim=2)
    signed = torch.where(values >= 1 << 15, values - (1 << 16), values).to(torch.int16)
    return signed.expand(batch, -1, -1).contiguous().view(torch.uint16)


def rows(tensor: torch.Tensor) -> torch.Tensor:
    """[batch, nodes, ...] as [batch * nodes, ...]."""
    return tensor.reshape(-1, *tensor.shape[2:])


class Problem:
    """What every form needs of a case: pages, rows of queries, lists and the common arguments of a plan."""

    def __init__(self, inputs: Inputs, library) -> None:
        self.inputs, self.case, self.library = inputs, inputs.case, library
        self.device, self.dtype = inputs.q.device, inputs.q.dtype
        self.q = rows(inputs.q).contiguous()
        self.pages = to_pages(inputs.k_cache), to_pages(inputs.v_cache)
        self.pages_per_request = self.pages[0].shape[0] // self.case.batch
        self.starts = row_starts(self.case.batch, self.case.nodes)
        model = self.case.model
        self.heads = (model.heads, model.kv_heads, model.dim)
        self.dtypes = {"q_data_type": self.dtype, "kv_data_type": self.pages[0].dtype}

    def prefill(self, backend: str):
        return self.library.BatchPrefillWithPagedKVCacheWrapper(
            workspace(self.device, "prefill"), "NHD", backend=backend
        )

    def unrow(self, out: torch.Tensor) -> torch.Tensor:
        return out.reshape(self.inputs.q.shape)

    def contestant(self, name: str, call, graph: bool = True) -> Contestant:
        return Contestant(name, "library", call, self.unrow, self.pages, graph=graph)


def with_and_without_plan(problem: Problem, name: str, make) -> list[Contestant]:
    """make() gives a plan and a run over their own wrappers: a second plan would pull the lists from under a graph."""
    (plan, run), (plan_again, run_again) = make(), make()
    plan()

    def both():
        plan_again()
        return run_again()

    return [problem.contestant(name, run), problem.contestant(f"{name} + plan", both, graph=False)]


def custom_mask(problem: Problem) -> list[Contestant]:
    """The whole rectangle of nodes and slots as a mask. Only the FA2 kernels take one."""
    mask = whole_mask(problem.inputs)
    lists = page_lists([context + problem.case.nodes for context in problem.case.contexts], problem.pages_per_request)

    def make():
        wrapper = problem.prefill("fa2")

        def plan():
            wrapper.plan(problem.starts, *lists, *problem.heads, PAGE, custom_mask=mask, **problem.dtypes)

        return plan, lambda: wrapper.run(problem.q, problem.pages)

    return with_and_without_plan(problem, "flashinfer mask", make)


def composed(problem: Problem, backend: str) -> list[Contestant]:
    """Context without a mask, tree with one, merged: three kernels and two plans."""
    inputs, case = problem.inputs, problem.case
    lists = page_lists(list(case.contexts), problem.pages_per_request)
    mask = inputs.tree_mask.flatten().repeat(case.batch)
    k, v = (
        torch.cat([cache[r, context : context + case.nodes] for r, context in enumerate(case.contexts)])
        for cache in (inputs.k_cache, inputs.v_cache)
    )

    def make():
        prefix = problem.prefill(backend)
        scratch = workspace(problem.device, "tree")
        tail = problem.library.BatchPrefillWithRaggedKVCacheWrapper(scratch, "NHD", backend="fa2")

        def plan():
            prefix.plan(problem.starts, *lists, *problem.heads, PAGE, causal=False, **problem.dtypes)
            tail.plan(problem.starts, problem.starts, *problem.heads, custom_mask=mask, **problem.dtypes)

        def run():
            context = prefix.run(problem.q, problem.pages, return_lse=True)
            return problem.library.merge_state(*context, *tail.run(problem.q, k, v, return_lse=True))[0]

        return plan, run

    return with_and_without_plan(problem, f"flashinfer {backend} + tree + merge", make)


def xqa(problem: Problem) -> list[Contestant]:
    """One launch and no plan; only the drafted nodes have a mask."""
    inputs, case, name = problem.inputs, problem.case, "flashinfer xqa"
    if case.nodes not in XQA_NODES:
        sizes = ", ".join(map(str, XQA_NODES))
        return [unavailable(name, "library", f"compiled per number of nodes, here only for {sizes}")]
    if torch.cuda.is_available() and torch.cuda.get_device_capability()[0] not in XQA_GENERATIONS:
        return [unavailable(name, "library", "its kernels are for SM 9.x, 10.x and 12.x")]
    scratch = workspace(problem.device, "xqa")
    table = torch.arange(problem.pages[0].shape[0], dtype=torch.int32, device=problem.device)
    table = table.view(case.batch, problem.pages_per_request)
    lengths = [[context + case.nodes] for context in case.contexts]
    seq_lens = torch.tensor(lengths, dtype=torch.int32, device=problem.device).view(torch.uint32)
    q, out = inputs.q[:, None].contiguous(), torch.empty_like(inputs.q[:, None])
    options = {"q_seq_len": case.nodes, "mask": draft_mask_words(inputs.tree_mask, case.batch)}
    function = importlib.import_module("flashinfer.xqa").xqa

    def run():
        memory = scratch[SEMAPHORE_BYTES:], scratch[:SEMAPHORE_BYTES]
        function(q, *problem.pages, table, seq_lens, out, *memory, case.model.kv_heads, PAGE, **options)
        return out

    return [problem.contestant(name, run)]


def on_hopper() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9


def forms() -> dict[str, Callable[[Problem], list[Contestant]]]:
    """Each form by name. Prefill without a mask has kernels of its own for Hopper."""
    backends = ("fa2", "fa3") if on_hopper() else ("fa2",)
    merged = {f"flashinfer {each} + tree + merge": functools.partial(composed, backend=each) for each in backends}
    return {"flashinfer mask": custom_mask, "flashinfer xqa": xqa, **merged}


def missing() -> str:
    """Why FlashInfer can't be used here, or ""."""
    try:
        importlib.import_module("flashinfer")
    except Exception as error:  # it imports much, and fails in many ways
        return f"flashinfer can't be imported: {type(error).__name__}: {error}"[:120]
    return ""


def contestants(inputs: Inputs) -> list[Contestant]:
    """All forms; one that can't be made is listed with the reason."""
    reason = missing()
    if reason:
        return [unavailable("flashinfer", "library", reason)]
    problem, listed = Problem(inputs, importlib.import_module("flashinfer")), []
    for name, form in forms().items():
        try:
            listed += form(problem)
        except Exception as error:  # a form that fails to compile must not end the others
            text = " ".join(f"{type(error).__name__}: {error}".split())
            listed.append(unavailable(name, "library", f"can't be prepared: {text[-100:]}"))
    return listed


# --- compiling before the benchmarks, because it takes minutes


def compilations(preset: str) -> list[tuple[str, AttentionCase]]:
    """One (form, small case) for everything that FlashInfer compiles for the cells of a preset."""
    found = {}
    for case in PRESETS[preset]():
        if case.op != "tree_attention":
            continue
        for name in forms():
            key = (name, case.model.dim, case.dtype)
            if name == "flashinfer xqa":
                key = (*key, case.model.group, case.nodes)
                if case.nodes not in XQA_NODES:
                    continue
            found.setdefault(key, (name, replace(case, contexts=(PAGE,), flex=False)))
    return list(found.values())


def main(arguments: list[str] | None = None) -> int:
    """`python -m benchmarks.attention.flashinfer_peers PRESET 0/4`: compile the kernels of every fourth form."""
    preset, shard = sys.argv[1:] if arguments is None else arguments
    index, count = map(int, shard.split("/"))
    reason = missing()
    if reason:
        print(reason)
        return 0
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name, case in compilations(preset)[index::count]:
        print(f"{name}, {case.model.name} {case.dtype} n{case.nodes} ...", flush=True)
        try:
            problem = Problem(make_inputs(case, device), importlib.import_module("flashinfer"))
            for contestant in forms()[name](problem):
                contestant.run()
                print(f"{contestant.name}: {contestant.problem or 'compiled'}", flush=True)
        except Exception as error:  # the benchmarks list it with the reason
            print(f"{name}: {type(error).__name__}: {error}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
