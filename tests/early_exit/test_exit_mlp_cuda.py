"""The CUDA kernels of exit_mlp and kv_propagate, emulated: shapes, launches, bytes, schedules, sanitizers, mutants.

Their values are also tested with all other backends', in test_draft_stop.py and test_kv_propagate.py.
"""

import itertools
from unittest import mock

import pytest
import torch

from specdec_ops import exit_mlp, kv_propagate
from specdec_ops._core import dispatch
from tests.emulator import build, kernels
from tests.emulator.checks import NO_FENCE, assert_race, launch_tests
from tests.harness.close import assert_as_good_as_torch

if reason := build.why_not():
    pytest.skip(reason, allow_module_level=True)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
POISON = 7.5


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


def model(sizes, dtype=torch.float32):
    """Layers of these sizes."""
    return [
        ((normal(outputs, inputs) * (2 / inputs) ** 0.5).to(dtype), normal(outputs, seed=1).float() * 0.1)
        for inputs, outputs in itertools.pairwise(sizes)
    ]


def mlp_launch(rows, sizes, dtype=torch.float32, threshold=0.5, features=None):
    features = normal(rows, sizes[0]).to(dtype) if features is None else features
    return kernels.launch_of(lambda: exit_mlp(features, model(sizes, dtype), threshold))


def scores(launch):
    kernels.run(launch)
    return launch.tensors["score"]


# Sizes of layers: blocks and groups that are not full, weights in packs and not, layers beyond the second.
MODELS = {
    "two blocks of 64 units": (11, 70, 1),
    "17 blocks of 16 units, in four groups": (130, 264, 33, 1),
    "several chunks of inputs": (2056, 16, 8, 1),
    "five layers": (24, 40, 17, 9, 5, 1),
    "one layer": (300, 1),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_models(name, dtype):
    """Against the definition in float64, with as many rows as each size of a block has, and more."""
    sizes = MODELS[name]
    layers = model(sizes, dtype)
    exact = [(weight.double(), bias) for weight, bias in layers]
    for rows in (1, 3, 19):
        features = normal(rows, sizes[0]).to(dtype)
        want, _ = exit_mlp(features.double(), exact, backend="torch")
        got = scores(mlp_launch(rows, sizes, dtype))
        torch.testing.assert_close(got, want.float(), rtol=0, atol=3e-6)


def test_layers_of_several_dtypes():
    (first, a), (second, b), (third, c) = model((48, 32, 16, 1))
    layers = [(first.half(), a), (second, b), (third.bfloat16(), c)]
    features = normal(5, 48).bfloat16()
    launch = kernels.launch_of(lambda: exit_mlp(features, layers))
    exact = [(weight.double(), bias) for weight, bias in layers]
    want, _ = exit_mlp(features.double(), exact, backend="torch")
    torch.testing.assert_close(scores(launch), want.float(), rtol=0, atol=3e-6)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_a_score_does_not_depend_on_other_rows(dtype):
    """Nor on their number, which decides the size of a block."""
    features = normal(18, 200).to(dtype)
    alone = torch.cat([scores(mlp_launch(1, (200, 170, 20, 1), dtype, features=features[i : i + 1])) for i in (0, 7)])
    few, many = (scores(mlp_launch(rows, (200, 170, 20, 1), dtype, features=features[:rows])) for rows in (8, 18))
    assert torch.equal(few[[0, 7]], alone)
    assert torch.equal(many[:8], few)


def test_stop_is_of_all_blocks_of_rows():
    features = torch.full((30, 4), -1.0)
    for above in (None, 0, 29):
        rows = features.clone()
        if above is not None:
            rows[above] = 9.0
        layers = [(torch.ones(1, 4), torch.zeros(1))]
        launch = kernels.launch_of(lambda rows=rows, layers=layers: exit_mlp(rows, layers))
        scores(launch)
        assert launch.tensors["stop"].tolist() == [above is None]


def test_more_rows_than_scratch_is_for_take_another_launch():
    """Of 64 MiB: 256 rows of a model this wide. `stop` is that of all launches."""
    features = torch.full((264, 1), -1.0)
    features[3] = 5.0
    layers = [(torch.ones(64, 1), torch.zeros(64)), (torch.ones(16384, 64) / 64, torch.zeros(16384))]
    layers.append((torch.ones(1, 16384) / 16384, torch.zeros(1)))
    for above in (True, False):
        if not above:
            features[3] = -1.0
        launch = kernels.launch_of(lambda: exit_mlp(features, layers))
        before = kernels.launches("exit_mlp")
        want = torch.sigmoid(features[:, 0].relu())
        torch.testing.assert_close(scores(launch), want, rtol=0, atol=3e-6)
        assert kernels.launches("exit_mlp") == before + 2
        assert launch.tensors["stop"].tolist() == [not above]


def test_exit_mlp_is_one_launch_that_reads_the_weights_once():
    """Once for each block of 4 rows (8 with more than 16 rows); those of the third layer on, once for each row."""
    for rows, blocks in ((1, 1), (4, 1), (20, 3)):
        before = kernels.launches("exit_mlp")
        launch = mlp_launch(rows, (256, 128, 64, 1), torch.bfloat16)
        scores(launch)
        assert kernels.launches("exit_mlp") == before + 1
        traffic = kernels.traffic(launch)
        for name in ("weights[0]", "weights[1]"):
            assert traffic[name].read == blocks * launch.tensors[name].nbytes
        assert traffic["weights[2]"].read == blocks * (4 if rows <= 16 else 8) * 64 * 2


def test_scratch_of_exit_mlp():
    """For a block of 4 or 8 rows: a part for each 16 units, one for each group of parts, and two layers; a counter for
    each group and one for the groups; and one for all rows."""

    def needs(rows, *sizes):
        def tensor(*shape):
            return torch.empty(shape, device="meta")

        layers = [(tensor(outputs, inputs), tensor(outputs)) for inputs, outputs in itertools.pairwise(sizes)]
        return kernels.needs_of(lambda: exit_mlp(tensor(rows, sizes[0]), layers))

    assert needs(4, 2048, 1024, 512, 1) == ((64 + 8 + 2) * 4 * 512 * 4, 1 + 8 + 1)
    assert needs(60, 2048, 1024, 512, 1) == (8 * (64 + 8 + 2) * 8 * 512 * 4, 1 + 8 * (8 + 1))
    assert needs(5, 11, 44, 1) == (2 * (1 + 1 + 2) * 4 * 4, 1 + 2 * 2)
    assert (60 << 20) < needs(100_000, 2048, 1024, 512, 1)[0] <= (64 << 20)


def caches(layers, dtype, *shape):
    return [[torch.full(shape, POISON, dtype=dtype) for _ in range(layers)] for _ in range(2)]


def kv_call(rows, layers, heads, head_dim, dim, dtype, *, pairs=None, interleaved=False, norm=True, shift=0):
    """Arguments of a call into a dense cache. shift: of the weights' first elements from 16 bytes."""
    width = heads * head_dim

    def weight(seed):
        given = torch.empty(width * dim + shift, dtype=dtype)[shift:].view(width, dim)
        return given.copy_(normal(width, dim, seed=seed) / dim**0.5)

    parts = [
        ((1 + 0.3 * normal(dim, seed=layer)).float() if norm else None, weight(2 * layer), weight(2 * layer + 1))
        for layer in range(layers)
    ]
    positions = torch.arange(rows, dtype=torch.int32) * 3
    slots = torch.randperm(rows + 2, generator=torch.Generator().manual_seed(0))[:rows].int()
    angles = normal(3 * rows, head_dim // 2 if pairs is None else pairs).float()
    return {
        "hidden": normal(rows, dim).to(dtype),
        "layers": parts,
        "positions": positions,
        "slots": slots,
        "rope": (angles.cos(), angles.sin()),
        "interleaved": interleaved,
    }


def in_double(call):
    layers = [tuple(None if part is None else part.double() for part in layer) for layer in call["layers"]]
    rope = tuple(table.double() for table in call["rope"])
    return call | {"hidden": call["hidden"].double(), "layers": layers, "rope": rope}


KV_SHAPES = {  # rows, layers, heads, head_dim, dim
    "a head in three parts": (3, 1, 2, 80, 72),
    "heads of 5 elements, six to a tile": (9, 2, 7, 5, 40),
    "a head of 33": (2, 1, 1, 33, 8),
    "17 rows, tiles of 128 columns and a rest": (17, 2, 1, 32, 312),
    "two blocks of rows": (67, 1, 1, 16, 24),
    "one element": (1, 1, 1, 1, 1),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", KV_SHAPES)
def test_kv_shapes(name, dtype):
    """Partial rotation, both ways of pairing, rows of weights that start anywhere; against the definition."""
    rows, layers, heads, head_dim, dim = KV_SHAPES[name]
    for interleaved in (False, True):
        pairs = max(head_dim // 2 - 1, 0)
        if pairs == 0:
            pairs = head_dim // 2
        call = kv_call(
            rows, layers, heads, head_dim, dim, dtype, pairs=pairs, interleaved=interleaved, shift=int(interleaved)
        )
        if pairs == 0:
            call["rope"] = None
        shape = (1, rows + 2, heads, head_dim)
        got, plain, exact = (caches(layers, kind, *shape) for kind in (dtype, dtype, torch.float64))
        run_kv(call, got)
        kv_propagate(**call, k_caches=plain[0], v_caches=plain[1], backend="torch")
        double = in_double(call) if pairs else in_double(call | {"rope": (torch.ones(1, 1),) * 2}) | {"rope": None}
        kv_propagate(**double, k_caches=exact[0], v_caches=exact[1], backend="torch")
        for one, other, right in zip(got[0] + got[1], plain[0] + plain[1], exact[0] + exact[1], strict=True):
            # The definition rounds nothing in between; engines, and this kernel, round what they multiply.
            assert_as_good_as_torch(one, right, other, slack=4)


def kv_launch(call, pair):
    return kernels.launch_of(lambda: kv_propagate(**call, k_caches=pair[0], v_caches=pair[1]))


def run_kv(call, pair):
    with mock.patch.object(dispatch, "resolve", lambda *_: kernels.IMPLEMENTATIONS["kv_propagate"]):
        kv_propagate(**call, k_caches=pair[0], v_caches=pair[1])


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16), ids=str)
def test_keys_and_values_do_not_depend_on_other_rows(dtype):
    """Nor on their number, which decides the size of a block."""
    call = kv_call(66, 1, 1, 32, 136, dtype)
    whole = caches(1, dtype, 1, 68, 1, 32)
    run_kv(call, whole)
    for rows in (1, 9, 20, 40):
        some = caches(1, dtype, 1, 68, 1, 32)
        run_kv(call | {name: call[name][:rows] for name in ("hidden", "positions", "slots")}, some)
        for part in range(2):
            written = call["slots"][:rows].long()
            assert torch.equal(some[part][0][0, written], whole[part][0][0, written])


def test_kv_propagate_is_a_launch_for_32_layers_that_reads_weights_once():
    for layers, launches in ((3, 1), (33, 2)):
        call = kv_call(4, layers, 1, 16, 16, torch.bfloat16)
        pair = caches(layers, torch.bfloat16, 1, 6, 1, 16)
        before = kernels.launches("kv_propagate")
        run_kv(call, pair)
        assert kernels.launches("kv_propagate") == before + launches
        assert all((cache[0, call["slots"].long()] != POISON).all() for cache in pair[0] + pair[1])
    call = kv_call(4, 3, 4, 16, 264, torch.bfloat16)
    launch = kv_launch(call, caches(3, torch.bfloat16, 1, 6, 4, 16))
    traffic = kernels.traffic(launch)
    for layer in range(3):
        for name in (f"k_weights[{layer}]", f"v_weights[{layer}]"):
            assert traffic[name].read == launch.tensors[name].nbytes
        written = [traffic[f"{part}_caches[{layer}]"] for part in "kv"]
        assert all(each.read == 0 and each.written == 4 * 4 * 16 * 2 for each in written)


def paged_launch(dtype):
    """Three requests' rows over scattered pages, with rows that have no place."""
    call = kv_call(7, 2, 3, 16, 40, dtype)
    call |= {"slots": torch.tensor([0, 5, -1, 3, 1, 9, 2]).int(), "requests": torch.tensor([0, 2, 1, 1, 3, 0, 2]).int()}
    call["page_table"] = torch.tensor([[4, 1], [0, 3], [2, 9]]).int()
    return kv_launch(call, caches(2, dtype, 5, 4, 3, 16))


LAUNCHES = {
    "mlp": lambda: mlp_launch(5, (130, 70, 33, 1)),
    "mlp many": lambda: mlp_launch(18, (2056, 32, 8, 1), torch.bfloat16),
    "mlp 5 layers": lambda: mlp_launch(2, (24, 40, 17, 9, 5, 1), torch.float16),
    "kv": lambda: kv_launch(kv_call(9, 2, 1, 80, 300, torch.bfloat16), caches(2, torch.bfloat16, 1, 11, 1, 80)),
    "kv unaligned": lambda: kv_launch(
        kv_call(3, 2, 1, 33, 75, torch.float16, shift=1), caches(2, torch.float16, 1, 5, 1, 33)
    ),
    "kv float32": lambda: kv_launch(kv_call(5, 2, 2, 8, 140, torch.float32), caches(2, torch.float32, 1, 7, 2, 8)),
    "kv paged": lambda: paged_launch(torch.bfloat16),
}
test_sanitizers_find_nothing, test_every_order_gives_the_same = launch_tests(LAUNCHES)


# What a line of the kernels is for: (the launch, the file, the line, what becomes of it). ThreadSanitizer finds each.
MUTANTS = {
    "no barrier between chunks of activations": (
        "mlp many",
        "exit_mlp.cuh",
        "    block_sync();  // everybody has read the chunk before this one\n",
        "",
    ),
    "no fence before a block says that it is done": ("mlp", *NO_FENCE),
    "no barrier in front of a tile": (
        "kv",
        "kv_propagate.cuh",
        "    block_sync();  // the tile and y are complete, and nobody is still at those before them\n",
        "",
    ),
    "no barrier between parts of a sum": (
        "kv float32",
        "row_tiles.cuh",
        "    block_sync();  // the next part adds to it\n",
        "",
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_planted_bug_in_shared_work(name):
    case, *change = MUTANTS[name]
    assert_race(LAUNCHES[case](), *change)
