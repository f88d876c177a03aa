"""LayerCache refuses what doesn't fit, in one sentence, and loses nothing; copies are caches of their own."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from specdec_ops import LayerCache
from tests.kv.layer_cases import Toy, assert_shows, refused, shown

OVER = "run must be the cache's open run, got one that is over"
ROWS = torch.arange(24.0).view(3, 8)
KV = torch.arange(48.0).view(3, 1, 16)
LEVEL = torch.tensor([-1, -1, 0], dtype=torch.int32)


def make(**changes):
    sizes = {"exits": (2, 3), "slots": 6, "kv_heads": 1, "head_dim": 16, "dim": 8, **changes}
    return LayerCache(**sizes)


def attended(cache, group=0):
    """The open run of a group whose layers have all attended."""
    run = cache.run(group)
    kv = torch.ones(len(run.slots), 1, 16)
    for layer in cache.layers(group):
        cache.attend(run, layer, kv, kv, kv)
    return run


def step(cache, group=0):
    run = attended(cache, group)
    return cache.finish(run, run.hidden + 1)


def filled():
    """A cache with K, V and pending rows."""
    cache = make()
    cache.append(ROWS[:2])
    step(cache)
    return cache


def with_tree():
    """Context 2, of which group 1 has nothing yet; nodes 0 and 1 below the context, node 2 below 0."""
    cache = filled()
    cache.append(ROWS, LEVEL)
    step(cache)
    return cache


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"exits": (2, 2)}, "exits must be ascending ints from 1 on, got \\(2, 2\\)"),
        ({"exits": ()}, "exits must be ascending ints from 1 on"),
        ({"exits": 3}, "exits must be ascending ints, got 3"),
        ({"slots": 0}, "slots must be at least 1, got 0"),
        ({"dim": 2.5}, "dim must be an int, got 2.5"),
        ({"dtype": torch.int32}, "dtype must be a floating dtype"),
    ],
)
def test_sizes(changes, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make(**changes)


def test_a_run_is_finished_once():
    """The lengths were ((3,), (6,)) after the second finish."""
    cache = LayerCache((2,), 16, 3, 64, 64)
    cache.append(torch.randn(3, 64))
    run = cache.run(0)
    for layer in cache.layers(0):
        cache.attend(run, layer, *torch.randn(3, 3, 3, 64))
    cache.finish(run, run.hidden)
    refused(cache, lambda: cache.finish(run, run.hidden), OVER)
    assert cache.lengths == ((3,), (3,))


def test_nothing_comes_between_run_and_finish():
    cache = with_tree()
    run = cache.run(1)
    before = "must be called while no run is open, got an open run of group 1"
    for name, call in (
        ("append", lambda: cache.append(ROWS[:1], LEVEL[:1])),
        ("run", lambda: cache.run(1)),
        ("run", lambda: cache.run(0)),
        ("crop", lambda: cache.crop(1)),
        ("commit", lambda: cache.commit([[0]])),
    ):
        refused(cache, call, f"{name} {before}")
    cache.attend(run, 2, *torch.ones(3, 5, 1, 16))
    assert cache.finish(run, run.hidden).shape == (3, 8)


def test_layers_attend_once_and_in_order():
    cache = make()
    cache.append(ROWS)
    run = cache.run(0)
    refused(cache, lambda: cache.finish(run, ROWS), "finish must be called after attend of layers 0 to 1")
    for layer in (1, 2, -1, 5):
        refused(cache, lambda layer=layer: cache.attend(run, layer, KV, KV, KV), "layer must be 0, the next layer")
    refused(cache, lambda: cache.attend(run, "0", KV, KV, KV), "layer must be an int, got '0'")
    cache.attend(run, 0, KV, KV, KV)
    refused(cache, lambda: cache.attend(run, 0, KV, KV, KV), "layer must be 1, the next layer of the open run, got 0")
    refused(cache, lambda: cache.finish(run, ROWS), "finish must be called after attend of layers 1 to 1")
    cache.attend(run, 1, KV, KV, KV)
    refused(cache, lambda: cache.attend(run, 1, KV, KV, KV), "layer must be left out, as all layers have attended")
    cache.finish(run, ROWS)
    assert cache.lengths == ((3,), (3,), (0,))


def test_only_the_open_run_counts():
    """Not one that is over, abandoned, another cache's or none at all."""
    cache, other = make(), make()
    for one in (cache, other):
        one.append(ROWS)
    foreign, abandoned = other.run(0), cache.run(0)
    cache.abandon()
    for run in (foreign, abandoned):
        refused(cache, lambda run=run: cache.attend(run, 0, KV, KV, KV), OVER)
        refused(cache, lambda run=run: cache.finish(run, ROWS), OVER)
    run = cache.run(0)
    refused(cache, lambda: cache.attend(foreign, 0, KV, KV, KV), OVER)
    refused(cache, lambda: cache.attend(None, 0, KV, KV, KV), "run must be the cache's open run, got NoneType")
    refused(cache, lambda: cache.finish(0, ROWS), "run must be the cache's open run, got int")
    assert cache.open_run is run
    cache.abandon()
    cache.abandon()
    assert cache.open_run is None and cache.lengths == ((3,), (0,), (0,))
    assert torch.equal(cache.pending(0)[1], ROWS)


def test_arguments_of_an_idle_cache():
    cache, two = filled(), make(batch=2)
    for call, message in (
        (lambda: cache.append(ROWS.double()), r"rows must be float32 \[rows, 8\], got float64 \[3, 8\]"),
        (lambda: cache.append(ROWS[:, :7]), r"rows must be float32 \[rows, 8\], got float32 \[3, 7\]"),
        (lambda: cache.append(ROWS.tolist()), r"rows must be float32 \[rows, 8\], got list"),
        (lambda: cache.append(ROWS.to("meta")), "rows must be on cpu, got a tensor on meta"),
        (lambda: cache.append(torch.zeros(5, 8)), r"rows must be at most 4 for request 0 \(6 slots in all\), got 5"),
        (lambda: cache.append(ROWS, torch.zeros(3)), r"parents must be int32 or int64 \[3\], got float32"),
        (lambda: cache.append(ROWS, LEVEL[:2]), r"parents must be int32 or int64 \[3\], got int32 \[2\]"),
        (lambda: cache.append(ROWS, LEVEL.to("meta")), "parents must be on cpu, got a tensor on meta"),
        (lambda: cache.append(ROWS, counts=[2]), r"counts must be 1 ints that sum to 3, got \(2,\)"),
        (lambda: cache.append(ROWS, counts=[3.0]), "counts must be 1 ints that sum to 3, got 3.0"),
        (lambda: cache.append(ROWS, counts=3), "counts must be 1 ints that sum to 3, got 3"),
        (lambda: cache.append(ROWS.clone().requires_grad_()), "an input requires grad"),
        (lambda: cache.run(2), "group must be from 0 to 1, got 2"),
        (lambda: cache.run(-1), "group must be from 0 to 1, got -1"),
        (lambda: cache.run(0.0), "group must be an int, got 0.0"),
        (lambda: cache.run(0, most=-1), "most must be at least 1, got -1"),
        (lambda: cache.run(0, most=1.5), "most must be an int or None, got 1.5"),
        (lambda: cache.run(0, requests=[]), "requests must be 1 bools, got 0"),
        (lambda: cache.run(0, requests=True), "requests must be 1 bools, got True"),
        (lambda: cache.pending(2), "boundary must be from 0 to 1, got 2"),
        (lambda: cache.pending(0, -1), "request must be an int from 0 to 0, got -1"),
        (lambda: cache.layers(-1), "group must be from 0 to 1, got -1"),
        (lambda: cache.crop(3), r"lengths\[0\] must be from 0 to 2, got 3"),
        (lambda: cache.crop(-1), r"lengths\[0\] must be from 0 to 2, got -1"),
        (lambda: cache.crop(1.5), "lengths must be 1 ints or one, got 1.5"),
        (lambda: cache.crop(torch.tensor([1.5])), "lengths must be 1 ints or one, got 1.5"),
        (lambda: cache.crop([1, 1]), "lengths must be 1 ints or one, got 2"),
        (lambda: cache.crop("1"), "lengths must be 1 ints or one, got '1'"),
        (lambda: cache.commit([[0]]), r"nodes\[0\] must be ascending nodes below 0, got \[0\]"),
        (lambda: cache.commit([]), "nodes must be one path for each of 1 requests, got 0"),
        (lambda: cache.commit([0]), "nodes must be one path of ints for each of 1 requests, got 0"),
        (lambda: cache.commit(torch.tensor(0)), "nodes must be one path of ints for each of 1 requests, got 0"),
        (lambda: cache.commit([[0.5]]), "nodes must be one path of ints for each of 1 requests, got 0.5"),
    ):
        refused(cache, call, message)
    refused(two, lambda: two.append(ROWS), "rows must be a multiple of the batch of 2, without counts, got 3")
    refused(two, lambda: two.append(ROWS, counts=[-1, 4]), r"counts must be 2 ints that sum to 3, got \(-1, 4\)")


def test_arguments_with_a_tree():
    cache = with_tree()
    for call, message in (
        (lambda: cache.append(ROWS[:1]), "parents must be given while request 0 has a tree"),
        (lambda: cache.append(ROWS[:2], LEVEL[:2]), r"rows must be at most 1 for request 0 \(6 slots in all\), got 2"),
        (lambda: cache.crop(3), r"lengths\[0\] must be from 0 to 2, got 3"),
        (lambda: cache.commit([[1, 0]]), r"nodes\[0\] must be ascending nodes below 3, got \[1, 0\]"),
        (lambda: cache.commit([[0, 0]]), r"nodes\[0\] must be ascending nodes below 3"),
        (lambda: cache.commit([[-2]]), r"nodes\[0\] must be ascending nodes below 3"),
        (lambda: cache.commit([[3]]), r"nodes\[0\] must be ascending nodes below 3"),
        (lambda: cache.commit([[1, 2]]), r"nodes\[0\] must be a path, .* with parents \[-1, -1, 0\], got \[1, 2\]"),
        (lambda: cache.commit([[2]]), r"nodes\[0\] must be a path"),
    ):
        refused(cache, call, message)
    cache.commit([[0, 2]])
    assert cache.lengths == ((4,), (4,), (0,))


def test_arguments_of_an_open_run():
    cache = make(kv_heads=2)
    cache.append(ROWS)
    run, kv = cache.run(0), torch.zeros(3, 2, 16)
    good = {"q": torch.zeros(3, 4, 16), "k": kv, "v": kv}
    for name, value, message in (
        ("k", kv[:2], r"k must be float32 \[3, 2, 16\], got float32 \[2, 2, 16\]"),
        ("v", kv[:, :1], r"v must be float32 \[3, 2, 16\], got float32 \[3, 1, 16\]"),
        ("k", kv.bfloat16(), r"k must be float32 \[3, 2, 16\], got bfloat16"),
        ("v", None, r"v must be float32 \[3, 2, 16\], got None"),
        ("v", kv.to("meta"), "v must be on cpu, got a tensor on meta"),
        ("q", kv.double(), r"q must be float32 \[3, heads, 16\] with a multiple of 2 heads, got float64 \[3, 2, 16\]"),
        ("q", torch.zeros(3, 3, 16), "q must be .* with a multiple of 2 heads, got"),
        ("q", torch.zeros(3, 0, 16), "q must be .* with a multiple of 2 heads, got"),
        ("q", kv[0], r"q must be float32 \[3, heads, 16\]"),
        ("q", kv.clone().requires_grad_(), "an input requires grad"),
        ("k", kv.clone().requires_grad_(), "an input requires grad"),
        ("v", kv.clone().requires_grad_(), "an input requires grad"),
    ):
        refused(cache, lambda name=name, value=value: cache.attend(run, 0, **{**good, name: value}), message)
    for name in ("return_lse", "out", "page_table", "query_start", "backend", "nonsense"):
        refused(
            cache, lambda name=name: cache.attend(run, 0, **good, **{name: None}), f"options must be of .*, got {name}"
        )
    before = shown(cache)
    with pytest.raises((TypeError, ValueError), match=r"specdec_ops\.tree_attention: window must be"):
        cache.attend(run, 0, **good, window=-5)
    assert_shows(cache, before)
    for layer in (0, 1):
        cache.attend(run, layer, **good, scale=1.0, window=2)
    for value, message in (
        (torch.zeros(2, 8), r"hidden must be float32 \[3, 8\], got float32 \[2, 8\]"),
        (torch.zeros(3, 8, dtype=torch.float16), r"hidden must be float32 \[3, 8\], got float16 \[3, 8\]"),
        (torch.zeros(3, 8, device="meta"), "hidden must be on cpu, got a tensor on meta"),
        (torch.zeros(3, 8, requires_grad=True), "an input requires grad"),
    ):
        refused(cache, lambda value=value: cache.finish(run, value), message)
    cache.finish(run, ROWS)


def test_ints_of_numpy_and_of_tensors():
    cache = with_tree()
    cache.commit(np.array([[0, 2]]))
    cache.crop(np.int64(3))
    cache.crop(torch.tensor(2))
    cache.append(ROWS, counts=torch.tensor([3]))
    assert cache.run(0, requests=torch.tensor([True])).counts == (3,)


def test_parameters_without_gradients():
    """Under no_grad rows may require grad. A cache made in inference mode may be used outside of it."""
    with torch.inference_mode():
        cache = make()
        cache.append(ROWS.clone())
    with torch.no_grad():
        cache.append(torch.nn.Parameter(ROWS))
    step(cache)
    assert not cache.pending(1)[1].requires_grad and cache.pending(1)[1].shape == (6, 8)


class Fails(TorchDispatchMode):
    """Operator number `at` raises, as it does without memory; the operators are counted."""

    def __init__(self, at):
        super().__init__()
        self.at, self.count, self.names = at, 0, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        self.names.append(function.name())
        if self.count == self.at:
            raise MemoryError(function.name())
        return function(*args, **(kwargs or {}))


def ragged(batch):
    """Two requests with trees of their own, which lag behind in group 1; or one."""
    model = Toy(layers=3, dim=8, heads=2, kv_heads=1)
    cache = model.cache((2, 3), 16, batch)
    cache.append(model.embedding[torch.arange(2 * batch)])
    model.step(cache, 0)
    parents = torch.tensor([-1, -1, 1] * batch, dtype=torch.int32)
    cache.append(model.embedding[torch.arange(3 * batch)], parents)
    model.step(cache, 0)
    return model, cache


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("call", ["append", "level", "run", "attend", "finish", "crop", "commit"])
def test_an_operator_that_fails_on_the_way_leaves_all_as_it_was(call, batch):
    """And the call can be made again. Only the last copies of `commit` move what is shown, and they need no memory."""
    model, start = ragged(batch)
    rows, level = model.embedding[torch.arange(batch)], torch.full((batch,), 2, dtype=torch.int32)
    if call == "append":
        start.commit([[1, 2]] * batch)
    if call in ("attend", "finish"):
        start.run(1)
    q, kv = (torch.ones(5 * batch, heads, 16, dtype=torch.float64) for heads in (2, 1))
    if call == "finish":
        start.attend(start.open_run, 2, q, kv, kv)
    calls = {
        "append": lambda cache: cache.append(rows),
        "level": lambda cache: cache.append(rows, level),
        "run": lambda cache: cache.run(1).hidden,
        "attend": lambda cache: cache.attend(cache.open_run, 2, q, kv, kv),
        "finish": lambda cache: cache.finish(cache.open_run, q[:, 0, :8]),
        "crop": lambda cache: cache.crop(1),
        "commit": lambda cache: cache.commit([[1, 2]] * batch),
    }
    wanted = copy.deepcopy(start)
    with Fails(at=0) as all_of_them:
        result = calls[call](wanted)
    names = all_of_them.names
    while call == "commit" and names[-1] == "aten::copy_":
        names.pop()
    assert names or call == "crop"
    for at in range(1, len(names) + 1):
        cache = copy.deepcopy(start)
        before = shown(cache)
        with pytest.raises(MemoryError), Fails(at):
            calls[call](cache)
        assert_shows(cache, before)
        again = calls[call](cache)
        assert result is None or torch.equal(again, result)
        assert_shows(cache, (shown(wanted)[0]._replace(run=cache.open_run), shown(wanted)[1]))


# ---- copies


@pytest.mark.parametrize("way", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
@pytest.mark.parametrize("batch", [1, 2])
def test_copies_go_on_by_themselves(way, batch):
    """Also in the middle of a run, which the copy has as its own open run."""
    model, cache = ragged(batch)
    run = cache.run(1)
    other = way(cache)
    assert other.open_run is not run and other.open_run.counts == run.counts
    refused(other, lambda: other.finish(run, run.hidden), "run must be the cache's open run")
    before = shown(cache)
    q, k, v = torch.randn(3, 5 * batch, 1, 16, dtype=torch.float64)
    out = other.attend(other.open_run, 2, q, k, v)
    newest = other.finish(other.open_run, other.open_run.hidden)
    other.commit([[1, 2]] * batch)
    other.crop(3)
    other.append(model.embedding[torch.arange(batch)])
    assert_shows(cache, before)
    assert torch.equal(cache.attend(run, 2, q, k, v), out)
    assert torch.equal(cache.finish(run, run.hidden), newest)
    cache.commit([[1, 2]] * batch)
    cache.crop(3)
    cache.append(model.embedding[torch.arange(batch)])
    assert_shows(other, shown(cache))
    tensors = [{t.untyped_storage().data_ptr() for t in vars(c).values() if torch.is_tensor(t)} for c in (cache, other)]
    assert not tensors[0] & tensors[1]


@pytest.mark.parametrize("way", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))])
def test_a_run_copied_with_its_cache_is_the_copys_run(way):
    cache = filled()
    other, run = way((cache, cache.run(0)))
    assert other.open_run is run
    with_run, without = len(pickle.dumps(cache)), len(pickle.dumps(filled()))
    assert with_run < without + 8 * 1024, "a run's pickle doesn't hold the cache's memory once more"
