"""`python -m specdec_ops`: what is installed, which backends work here and why others don't, and a check of each op."""

import importlib.metadata
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from . import (
    CandidatePool,
    Tree,
    __version__,
    bound_head,
    build_topology,
    early_exit,
    exit_confidence,
    exit_mlp,
    gather_layer_kv,
    grow_tree,
    kv_commit,
    kv_propagate,
    linear,
    merge_states,
    prune_tree,
    quantize_head,
    quantize_linear,
    rms_norm,
    sample_children,
    sample_tokens,
    tree_accept,
    tree_attention,
)
from ._core import dispatch, loader

# Far above the rounding of float32 on any backend, far below the error of a kernel that is wrong.
TOLERANCE = 5e-3


def main() -> int:
    """Print the report. Return 1 if an available backend gave a wrong result or failed, else 0."""
    print_versions()
    failures = 0
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    for device in devices:
        print(f"\nbackends on {describe(device)}")
        for op in dispatch.IMPLEMENTATIONS:
            for backend, reason in dispatch.backends(op, device).items():
                verdict, failed = (f"no: {reason}", False) if reason else check(op, backend, device)
                failures += failed
                print(f"  {op:<16} {backend:<8} {verdict}", flush=True)
    if "cuda" not in devices:
        print("\nPyTorch sees no CUDA device, so nothing ran on one")
    print(f"\n{failures} self-checks failed" if failures else "\nevery self-check passed")
    return 1 if failures else 0


def print_versions() -> None:
    """Print what is installed, and what was compiled into it."""
    module, reason = loader.load()
    print(f"specdec_ops  {__version__} ({Path(__file__).parent})")
    print(f"python       {platform.python_version()} ({platform.platform()})")
    print(f"torch        {torch.__version__} (CUDA {torch.version.cuda or 'none'}, {torch.get_num_threads()} threads)")
    print(f"triton       {installed('triton')}")
    print(f"numpy        {installed('numpy')}")
    if module is None:
        print(f"compiled     no: {reason}")
        return
    info = module.build_info()
    cuda = f"CUDA {info['cuda']} for SM {info['archs']}" if info["cuda"] else "no CUDA kernels"
    cuda += f" ({info['left_out']})" if info["left_out"] else ""
    stale = "" if info["version"] == __version__ else f"; built for version {info['version']}: build it again"
    print(f"compiled     {info['compiler']}; {cuda}{stale}")
    print(f"CPU kernels  {module.cpu_isa()}")


def installed(distribution: str) -> str:
    """The version of a package, without importing it."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def describe(device: str) -> str:
    """A device with its model."""
    if device == "cpu":
        return f"cpu ({platform.machine()})"
    major, minor = torch.cuda.get_device_capability()
    return f"cuda ({torch.cuda.device_count()} x {torch.cuda.get_device_name()}, SM {major}.{minor})"


def check(op: str, backend: str, device: str) -> tuple[str, bool]:
    """Run an op on small inputs against the reference in float64. Return what to print, and whether it failed."""
    start = time.perf_counter()
    try:
        error = CHECKS[op](backend, device)
    except Exception as problem:
        return f"yes, but it FAILED: {type(problem).__name__}: {problem}", True
    milliseconds = 1e3 * (time.perf_counter() - start)
    if not error <= TOLERANCE:
        return f"yes, but it is WRONG: largest error {error:.1e}", True
    return f"yes (largest error {error:.0e}, {milliseconds:.0f} ms with its first start)", False


def check_build_topology(backend: str, device: str) -> float:
    """1 if anything differs from the reference, else 0. One of the trees is malformed."""
    rows = [list(Tree.from_branching((4, 2, 2, 1)).parents), list(Tree.chain(44).parents), [43, *range(43)]]
    parents = torch.tensor(rows, dtype=torch.int32, device=device)
    num_nodes = torch.tensor([44, 20, 44], dtype=torch.int32, device=device)
    got, want = (build_topology(parents, num_nodes, backend=name) for name in (backend, "torch"))
    names = ("parents", "depths", "ancestors", "first_child", "next_sibling", "num_nodes", "status")
    return float(any(not torch.equal(getattr(got, name), getattr(want, name)) for name in names))


def check_accept(backend: str, device: str) -> float:
    """1 if any decision over four requests differs from the reference's in float64, else 0."""
    tree = Tree.from_branching((4, 2, 2), root=True)
    target, draft = random_like(device, (4, len(tree), 1000), (4, len(tree), 1000))
    draft = target + draft  # a draft that knows something of its target
    topology, noise = tree.to(device), {"seeds": torch.arange(4, device=device), "positions": 3}
    children = sample_children(draft.float(), 4, backend="torch", temperature=0.5, **noise).tokens
    parents = torch.from_numpy(tree.parents[1:].copy()).long()
    ranks = torch.tensor([sum(parents[:node] == parents[node]) for node in range(len(parents))])
    tokens = torch.nn.functional.pad(children[:, parents, ranks], (1, 0))

    def run(dtype: torch.dtype, rule: str, name: str):
        logits = (target.to(dtype), draft.to(dtype))
        temperature = torch.tensor([0.5] * 3 + [0.0], device=device)
        return tree_accept(
            logits[0], tokens, topology, logits[1], rule=rule, temperature=temperature, top_p=0.9, backend=name, **noise
        )

    same = True
    for rule in ("recursive", "traversal"):
        got, want = run(torch.float32, rule, backend), run(torch.float64, rule, "torch")
        same &= all(torch.equal(getattr(got, name), getattr(want, name)) for name in ("tokens", "nodes", "status"))
    return float(not same)


def check_sample(backend: str, device: str) -> float:
    """1 if any of 24 sampled tokens differs from the reference's in float64, or the largest error of a logprob."""
    (logits,) = random_like(device, (12, 1000))
    options = {"seeds": torch.arange(12, device=device), "positions": 7, "temperature": 0.8, "top_k": 50}
    got, want = (
        (sample_tokens(values, backend=name, **options), sample_children(values[:, None], 1, backend=name, **options))
        for values, name in ((logits.float(), backend), (logits, "torch"))
    )
    if not (torch.equal(got[0], want[0]) and torch.equal(got[1].tokens, want[1].tokens)):
        return 1.0
    return largest_difference(got[1].logprobs, want[1].logprobs)


def check_tree_attention(backend: str, device: str) -> float:
    """The largest error of a 44-node tree over two requests, grouped heads; in float16 where float32 is refused."""
    dtype = torch.float16 if backend == "cuda" else torch.float32
    tree = Tree.from_branching((4, 2, 2, 1))
    shapes = (2, len(tree), 4, 64), (2, 160, 2, 64), (2, 160, 2, 64)
    q, k_cache, v_cache = (tensor.to(dtype) for tensor in random_like(device, *shapes))
    context_lens = torch.tensor([100, 17], dtype=torch.int32, device=device)
    topology = tree.to(device, batch=2)

    def run(dtype: torch.dtype, name: str) -> torch.Tensor:
        caches = (k_cache.to(dtype), v_cache.to(dtype))
        return tree_attention(q.to(dtype), *caches, topology, context_lens, backend=name)

    return largest_difference(run(dtype, backend), run(torch.float64, "torch"))


def check_exit_confidence(backend: str, device: str) -> float:
    """The largest error of four rows' figures, or 1 if a token differs."""
    return exit_error(backend, device, {})


def check_screened_exit(backend: str, device: str) -> float:
    """The same with a screen."""
    _, head = exit_inputs(device)
    return exit_error(backend, device, {"screen": quantize_head(head.float()), "tolerance": 1e-3})


def check_bounded_exit(backend: str, device: str) -> float:
    """The largest error of the probabilities of rows that see a part of a head, or 1 if another one exits."""
    hidden, head = exit_inputs(device)
    head = (head * torch.logspace(0, -3, len(head), device=device)[:, None]).float()
    got = early_exit(hidden.float(), head, 0.5, bounds=bound_head(head, (300, 1000)), backend=backend)
    want = early_exit(hidden, head.double(), 0.5, bounds=bound_head(head, (300, 1000)), backend="torch")
    if not torch.equal(got.exited, want.exited) or not torch.equal(got.seen, want.seen):
        return 1.0
    return largest_difference(got.confidence.max_prob, want.confidence.max_prob)


def exit_inputs(device: str) -> list[torch.Tensor]:
    hidden, head = random_like(device, (4, 96), (1000, 96))
    return [(0.2 * hidden + 0.1 * head[:4]).float().double(), head]


def exit_error(backend: str, device: str, options: dict) -> float:
    hidden, head = exit_inputs(device)
    got = exit_confidence(hidden.float(), head.float(), **options, backend=backend)
    want = exit_confidence(hidden, head, backend="torch")
    if not torch.equal(got.token, want.token):
        return 1.0
    return max(largest_difference(getattr(got, name), getattr(want, name)) for name in ("max_prob", "margin"))


def check_exit_mlp(backend: str, device: str) -> float:
    """The largest error of a score."""
    features, first, last = (0.3 * part for part in random_like(device, (5, 11), (44, 11), (1, 44)))
    biases = [torch.zeros(size, device=device) for size in (44, 1)]
    got = exit_mlp(features.float(), list(zip((first.float(), last.float()), biases, strict=True)), backend=backend)
    want = exit_mlp(features, list(zip((first, last), biases, strict=True)), backend="torch")
    return largest_difference(got[0], want[0])


def check_gather_layer_kv(backend: str, device: str) -> float:
    """The largest difference over two layers, with a slot that does not exist."""
    k, v = random_like(device, (2, 1, 6, 2, 16), (2, 1, 6, 2, 8))
    slots = torch.tensor([5, -1, 0], dtype=torch.int32, device=device)
    got, want = (gather_layer_kv(k.float(), v.float(), slots, backend=name) for name in (backend, "torch"))
    return largest_difference(got, want)


def check_kv_commit(backend: str, device: str) -> float:
    """The largest difference over two layers, with a path that has a gap."""
    nodes = torch.tensor([[0, 2, 3, -1]], dtype=torch.int32, device=device)

    def run(name: str) -> torch.Tensor:
        caches = torch.stack(random_like(device, (2, 1, 9, 2, 16), (2, 1, 9, 2, 16))).float()
        kv_commit(*caches, nodes, 4, backend=name)
        return caches

    return largest_difference(run(backend), run("torch"))


def check_kv_propagate(backend: str, device: str) -> float:
    """The largest error over two layers, with a row that is padding."""
    hidden, norm, keys, values = random_like(device, (3, 64), (64,), (32, 64), (32, 64))
    positions, slots = (torch.tensor(ids, dtype=torch.int32, device=device) for ids in ([7, 0, 90], [2, -1, 0]))

    def run(dtype: torch.dtype, name: str) -> torch.Tensor:
        caches = torch.zeros(2, 2, 1, 4, 2, 16, dtype=dtype, device=device)  # K and V, layers
        layers = [tuple(weight.to(dtype) for weight in (norm, keys / 8, values / 8))] * 2
        kv_propagate(hidden.to(dtype), layers, positions, slots, *map(list, caches), rope=1e4, backend=name)
        return caches

    return largest_difference(run(torch.float32, backend), run(torch.float64, "torch"))


def check_linear(backend: str, device: str) -> float:
    """The largest error of a plain and of an int8 weight, with what goes before and after."""
    x, norm, weight, residual = random_like(device, (3, 64), (64,), (40, 64), (3, 20))
    options = {"norm_weight": norm.float(), "activation": "swiglu", "residual": residual.float()}
    exact = {"norm_weight": norm, "activation": "swiglu", "residual": residual}
    return max(
        largest_difference(linear(x.float(), one, **options, backend=backend), linear(x, two, **exact, backend="torch"))
        for one, two in ((weight.float(), weight), (quantize_linear(weight),) * 2)
    )


def check_rms_norm(backend: str, device: str) -> float:
    """The largest error."""
    x, weight = random_like(device, (3, 100), (100,))
    got = rms_norm(x.float(), weight.float(), residual=x.float(), backend=backend)
    return largest_difference(got, rms_norm(x, weight, residual=x, backend="torch"))


def check_grow_tree(backend: str, device: str) -> float:
    """1 if any frontier of three levels, or anything in the pool, differs from the reference, else 0."""
    (_, got), (_, want) = (grown(name, device) for name in (backend, "torch"))
    return float(not all(torch.equal(*both) for both in zip(got, want, strict=True)))


def check_prune_tree(backend: str, device: str) -> float:
    """1 if anything of the trees of two requests differs from the reference, else 0."""
    pool, _ = grown("torch", device)
    roots = torch.tensor([3, 7], dtype=torch.int32, device=device)
    trees = [prune_tree(pool, 30, root_tokens=roots, backend=name) for name in (backend, "torch")]
    got, want = ([tree.tokens, tree.pool_ids, tree.topology.parents, tree.topology.ancestors] for tree in trees)
    return float(not all(torch.equal(*both) for both in zip(got, want, strict=True)))


def grown(backend: str, device: str) -> tuple[CandidatePool, list[torch.Tensor]]:
    """A pool of three levels, and what grow_tree wrote."""
    pool = CandidatePool.empty(2, levels=3, width=6, branching=5, device=device)
    found = []
    for level, logits in enumerate(random_like(device, (2, 1, 90), (2, 6, 90), (2, 6, 90))):
        logprobs, tokens = logits.float().log_softmax(-1).topk(5)
        frontier = grow_tree(pool, tokens, logprobs, level=level, eos=5, backend=backend)
        found += [frontier.tokens, frontier.parent_rows, frontier.scores]
    return pool, [*found, pool.tokens, pool.scores, pool.expanded, pool.topology.ancestors]


def check_merge_states(backend: str, device: str) -> float:
    """The largest error over rows of which some saw nothing, on one side or on both."""
    out_a, out_b = random_like(device, (2, 5, 4, 64), (2, 5, 4, 64))
    lse_a, lse_b = (lse.float() for lse in random_like(device, (2, 5, 4), (2, 5, 4)))
    lse_a[:, 0] = lse_b[:, :2] = float("-inf")
    got = merge_states(out_a.float(), lse_a, out_b.float(), lse_b, backend=backend)
    want = merge_states(out_a, lse_a, out_b, lse_b, backend="torch")
    return max(largest_difference(got.out, want.out), largest_difference(got.lse, want.lse))


def random_like(device: str, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    """float64 tensors that are the same on every device, and exact in float32."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).double().to(device) for shape in shapes]


def largest_difference(got: torch.Tensor, want: torch.Tensor) -> float:
    """The largest absolute difference. NaN counts as infinite, and so does an infinity in one of the two only."""
    same = got.double() == want.double()
    return torch.where(same, 0.0, (got.double() - want.double()).abs()).nan_to_num(nan=float("inf")).max().item()


CHECKS: dict[str, Callable[[str, str], float]] = {
    "accept": check_accept,
    "bounded_exit": check_bounded_exit,
    "build_topology": check_build_topology,
    "exit_confidence": check_exit_confidence,
    "exit_mlp": check_exit_mlp,
    "gather_layer_kv": check_gather_layer_kv,
    "kv_commit": check_kv_commit,
    "grow_tree": check_grow_tree,
    "kv_propagate": check_kv_propagate,
    "linear": check_linear,
    "merge_states": check_merge_states,
    "rms_norm": check_rms_norm,
    "prune_tree": check_prune_tree,
    "sample": check_sample,
    "screened_exit": check_screened_exit,
    "tree_attention": check_tree_attention,
}

if __name__ == "__main__":
    sys.exit(main())
