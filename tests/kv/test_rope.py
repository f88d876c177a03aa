"""Rope: its tables against the papers' formulas, and against transformers' with every kind of scaling."""

import importlib.util
import math
import types

import pytest
import torch

from specdec_ops import Rope, kv_append

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}
LONG = {
    "rope_type": "longrope",
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [1.0 + i for i in range(8)],
    "original_max_position_embeddings": 32,
}


def angle(position, pair, base, pairs):
    return position * base ** (-pair / pairs)


def assert_tables(rope, angles, factor=1.0):
    """angles(position, pair), in Python's numbers."""
    for position in (0, 1, rope.positions // 2, rope.positions - 1):
        for pair in range(rope.pairs):
            exact = angles(position, pair)
            assert rope.cosines[position, pair].item() == pytest.approx(factor * math.cos(exact), abs=1e-7 * factor)
            assert rope.sines[position, pair].item() == pytest.approx(factor * math.sin(exact), abs=1e-7 * factor)


def test_the_paper():
    rope = Rope(10_000.0, 32, 5000)
    assert (rope.positions, rope.pairs, rope.cosines.dtype) == (5000, 32, torch.float32)
    assert rope.cosines.is_contiguous() and rope.sines.shape == rope.cosines.shape
    assert_tables(rope, lambda position, pair: angle(position, pair, 1e4, 32))
    assert repr(rope) == "<Rope of 32 pairs at 5000 positions on cpu>"


def test_far_into_a_context():
    """A float32 angle at position 10^6 is off by 0.03; these are right to the last digit."""
    rope = Rope(500_000.0, 2, 1_000_001)
    assert_tables(rope, lambda position, pair: angle(position, pair, 5e5, 2))


def test_linear():
    rope = Rope(1e4, 8, 64, scaling={"type": "linear", "factor": 4})
    assert_tables(rope, lambda position, pair: angle(position / 4, pair, 1e4, 8))


def test_dynamic():
    """NTK-aware: the base grows so that the slowest pair turns as if all were divided by the stretch."""
    scaling = {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 32}
    for positions in (16, 32):
        rope = Rope(1e4, 8, positions, scaling=scaling)
        assert_tables(rope, lambda position, pair: angle(position, pair, 1e4, 8))
    stretch = 2.0 * 128 / 32 - 1
    rope = Rope(1e4, 8, 128, scaling=scaling)
    assert_tables(rope, lambda position, pair: angle(position, pair, 1e4 * stretch ** (16 / 14), 8))
    slowest = math.asin(rope.sines[1, 7].item())
    assert slowest == pytest.approx(1e4 ** (-7 / 8) / stretch, rel=1e-5)


def test_llama3():
    """Wavelengths above 8192 are divided by 8, those below 2048 stay, those between are mixed."""
    rope = Rope(5e5, 64, 4096, scaling=LLAMA3)

    def scaled(position, pair):
        plain = angle(1, pair, 5e5, 64)
        wavelength = 2 * math.pi / plain
        if wavelength > 8192:
            return position * plain / 8
        if wavelength < 8192 / 4:
            return position * plain
        smooth = (8192 / wavelength - 1.0) / (4.0 - 1.0)
        return position * ((1 - smooth) * plain / 8 + smooth * plain)

    assert_tables(rope, scaled)


@pytest.mark.parametrize("truncate", [True, False])
def test_yarn(truncate):
    """Pairs with more than 32 turns in the original context stay, those with less than one are divided by 4."""
    rope = Rope(1e4, 64, 8192, scaling={**YARN, "truncate": truncate})

    def pair_with(turns):
        return 64 * math.log(4096 / (turns * 2 * math.pi)) / math.log(1e4)

    low, high = pair_with(32), pair_with(1)
    if truncate:
        low, high = math.floor(low), math.ceil(high)

    def scaled(position, pair):
        ramp = min(max((pair - low) / (high - low), 0), 1)
        plain = angle(position, pair, 1e4, 64)
        return plain / 4 * ramp + plain * (1 - ramp)

    assert_tables(rope, scaled, factor=0.1 * math.log(4) + 1)
    given = Rope(1e4, 64, 64, scaling={**YARN, "attention_factor": 1.5})
    assert given.cosines[0, 0] == 1.5
    equal = Rope(1e4, 64, 64, scaling={**YARN, "mscale": 0.7, "mscale_all_dim": 0.7})  # DeepSeek's: they cancel
    assert equal.cosines[0, 0] == 1
    assert Rope(1e4, 64, 64, scaling={**YARN, "mscale": 0, "mscale_all_dim": 0}).cosines[0, 0] == rope.cosines[0, 0]


def test_longrope():
    short = Rope(1e4, 8, 32, scaling=LONG)
    assert_tables(short, lambda position, pair: angle(position, pair, 1e4, 8) / LONG["short_factor"][pair])
    factor = math.sqrt(1 + math.log(128 / 32) / math.log(32))
    long = Rope(1e4, 8, 128, scaling=LONG)
    assert_tables(long, lambda position, pair: angle(position, pair, 1e4, 8) / LONG["long_factor"][pair], factor)
    assert Rope(1e4, 8, 128, scaling={**LONG, "attention_factor": 1.25}).cosines[0, 0] == 1.25


SMALL = {"hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 128}


@pytest.mark.parametrize(
    ("config", "base", "pairs", "scaling"),
    [
        (SMALL, 1e4, 8, None),
        ({**SMALL, "head_dim": 32, "rope_theta": 1e6}, 1e6, 16, None),
        ({**SMALL, "rope_theta": 5e5, "rope_scaling": {**LLAMA3, "factor": 2.0}}, 5e5, 8, {**LLAMA3, "factor": 2.0}),
        ({**SMALL, "rope_parameters": {"rope_type": "default", "rope_theta": 7e4}}, 7e4, 8, None),
        ({**SMALL, "rotary_pct": 0.25, "rotary_emb_base": 2e4}, 2e4, 2, None),
        ({**SMALL, "partial_rotary_factor": 0.5}, 1e4, 4, None),
        ({**SMALL, "rope_parameters": {"rope_theta": 9.0, "partial_rotary_factor": 0.5}}, 9.0, 4, None),
        ({"text_config": {**SMALL, "rope_theta": 3e4}, "vision_config": {}}, 3e4, 8, None),
    ],
)
def test_configurations(config, base, pairs, scaling):
    """As dicts and as objects, with their own number of positions and with another."""
    want = Rope(base, pairs, 128, scaling=scaling)
    for given in (config, types.SimpleNamespace(**config)):
        rope = Rope.from_config(given)
        assert torch.equal(rope.cosines, want.cosines) and torch.equal(rope.sines, want.sines)
        assert torch.equal(Rope.from_config(given, positions=9).cosines, want.cosines[:9])


def test_configurations_with_two_kinds_of_layers():
    """Gemma 3, before transformers 5 and since."""
    old = {**SMALL, "rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": {"type": "linear", "factor": 8.0}}
    new = {
        **SMALL,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    }
    full = Rope(1e6, 8, 128, scaling={"rope_type": "linear", "factor": 8.0})
    for config in (old, new):
        assert torch.equal(Rope.from_config(config, layer_type="full_attention").sines, full.sines)
        assert torch.equal(Rope.from_config(config, layer_type="sliding_attention").sines, Rope(1e4, 8, 128).sines)
        with pytest.raises(ValueError, match="layer_type must be one of full_attention, sliding_attention, got None"):
            Rope.from_config(config)


def test_another_device():
    rope = Rope(1e4, 4, 8).to("meta")
    assert rope.cosines.device.type == "meta" and (rope.positions, rope.pairs) == (8, 4)


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda: Rope("1", 4, 8), TypeError, "base must be a number, got '1'"),
        (lambda: Rope(0, 4, 8), ValueError, "base must be a finite number above 0, got 0"),
        (lambda: Rope(1e4, 4.0, 8), TypeError, "pairs must be an int, got 4.0"),
        (lambda: Rope(1e4, 4, 0), ValueError, "positions must be from 1 to 2**31 - 1, got 0"),
        (lambda: Rope(1e4, 4, 8, scaling=4.0), TypeError, "scaling must be None or a dict, got 4.0"),
        (
            lambda: Rope(1e4, 4, 8, scaling={"rope_type": "ntk"}),
            ValueError,
            "scaling[\"rope_type\"] must be one of default, linear, dynamic, llama3, yarn, longrope, got 'ntk'",
        ),
        (
            lambda: Rope(1e4, 4, 8, scaling={"type": "linear"}),
            TypeError,
            'scaling["factor"] must be a number, got None',
        ),
        (
            lambda: Rope(1e4, 4, 8, scaling={"type": "linear", "factor": -1}),
            ValueError,
            'scaling["factor"] must be a finite number above 0, got -1',
        ),
        (
            lambda: Rope(1e4, 4, 8, scaling={"type": "default", "mrope_section": [1, 1, 2]}),
            ValueError,
            "scaling must be of \"default\" with no other keys than rope_type, got 'mrope_section'",
        ),
        (
            lambda: Rope(1e4, 4, 8, scaling={**LLAMA3, "high_freq_factor": 1.0}),
            ValueError,
            'scaling["high_freq_factor"] must be above low_freq_factor of 1, got 1.0',
        ),
        (
            lambda: Rope(1e4, 4, 8, scaling=LONG),
            ValueError,
            'scaling["short_factor"] must be a list of 4 numbers above 0, got 8 numbers',
        ),
        (
            lambda: Rope(1e4, 8, 8, scaling={**LONG, "long_factor": 3}),
            TypeError,
            'scaling["long_factor"] must be a list of 8 numbers above 0, got 3',
        ),
        (lambda: Rope(1.0, 4, 8, scaling=YARN), ValueError, "base must be other than 1 with yarn, got 1.0"),
        (
            lambda: Rope(1e4, 4, 8, scaling={**YARN, "truncate": 1}),
            TypeError,
            'scaling["truncate"] must be a bool, got 1',
        ),
        (lambda: Rope.from_config({}), TypeError, "config must be a Hugging Face configuration with head_dim, or"),
        (lambda: Rope.from_config(3), TypeError, "config must be a Hugging Face configuration with head_dim, or"),
        (lambda: Rope.from_config({"head_dim": 8}), ValueError, "positions must be given: config has none, got None"),
    ],
)
def test_wrong_arguments(make, kind, message):
    with pytest.raises(kind) as raised:
        make()
    assert str(raised.value).startswith("specdec_ops.Rope") and message in str(raised.value)


LENGTH = {"original_max_position_embeddings": 32}
# (transformers' model, its configuration's options, those of from_config)
FAMILIES = {
    "llama": ("Llama", {"rope_parameters": {**LLAMA3, "rope_theta": 5e5}}, {}),
    "mistral": ("Mistral", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, {}),
    "qwen2 with yarn": ("Qwen2", {"rope_parameters": {**YARN, "rope_theta": 1e6}}, {}),
    "qwen3": ("Qwen3", {"head_dim": 24}, {}),
    "phi3 with longrope": ("Phi3", {**LENGTH, "rope_parameters": {**LONG, "rope_theta": 1e4}}, {}),
    "gemma2": ("Gemma2", {"head_dim": 32}, {}),
    "gpt neox": ("GPTNeoX", {}, {}),
    "llama, linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}, {}),
    "llama, dynamic": ("Llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}}, {}),
    "gemma3, full": ("Gemma3", {"head_dim": 32}, {"layer_type": "full_attention"}),
    "gemma3, sliding": ("Gemma3", {"head_dim": 32}, {"layer_type": "sliding_attention"}),
}  # fmt: skip


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed")
@pytest.mark.parametrize("name", FAMILIES)
def test_transformers(name):
    """The rotation of a model's own code, by the angles of its own module, is that of kv_append with its config."""
    family, options, chosen = FAMILIES[name]
    module = importlib.import_module(f"transformers.models.{family.lower().replace('gptneox', 'gpt_neox')}")
    folder = module.__name__.rsplit(".", 1)[1]
    models = importlib.import_module(f"{module.__name__}.modeling_{folder}")
    configurations = importlib.import_module(f"{module.__name__}.configuration_{folder}")
    text = "Text" if family == "Gemma3" else ""
    heads = {"num_attention_heads": 4, "hidden_size": 64, "max_position_embeddings": 128, "pad_token_id": 0}
    config = getattr(configurations, f"{family}{text}Config")(**heads, **options)
    embedding = getattr(models, f"{family}RotaryEmbedding")(config)
    dim = getattr(config, "head_dim", None) or 16
    positions = torch.arange(100)[None]
    q, k = torch.randn(2, 1, 100, 4, dim, generator=torch.Generator().manual_seed(0))
    cosines, sines = embedding(q, positions, *chosen.values())
    turned = models.apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), cosines, sines)
    rope = Rope.from_config(config, **chosen)
    caches = torch.zeros(2, 1, 100, 4, dim)
    got = kv_append(k, k, *caches, None, 0, q=q, rope=rope)
    # transformers makes angles in float32: at position 100 they are off by 100 * 2^-24 and more.
    torch.testing.assert_close(got, turned[0].transpose(1, 2), rtol=0, atol=1e-4)
    torch.testing.assert_close(caches[0], turned[1].transpose(1, 2), rtol=0, atol=1e-4)


def test_tables_that_are_there_already():
    rope = Rope(1e4, 4, 8)
    again = Rope.from_tables(rope.cosines, rope.sines)
    assert again.cosines is rope.cosines and again.sines is rope.sines and (again.pairs, again.positions) == (4, 8)
    with pytest.raises(TypeError, match=r"cosines must be float32 \[positions, pairs\]"):
        Rope.from_tables([1.0], rope.sines)
    with pytest.raises(TypeError, match=r"sines must be float32 \[positions, pairs\]"):
        Rope.from_tables(rope.cosines, rope.sines.double())
    with pytest.raises(ValueError, match=r"sines must be contiguous float32 \[positions, pairs\]"):
        Rope.from_tables(rope.cosines, rope.sines[:4])
