"""Tiny random Hugging Face models, one of each family and of what families do differently."""

import torch
import transformers
from transformers import AutoModelForCausalLM

VOCAB = 97
_COMMON = {"vocab_size": VOCAB, "max_position_embeddings": 512, "eos_token_id": 5, "bos_token_id": 1, "pad_token_id": 0}
_SIZES = {"intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
_LLAMA = {**_COMMON, **_SIZES, "hidden_size": 32, "num_key_value_heads": 2, "head_dim": 16}
_LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_NEOX = {**_COMMON, **_SIZES, "hidden_size": 64, "rotary_pct": 0.5}
_GEMMA = {**_LLAMA, "sliding_window": 5, "query_pre_attn_scalar": 20}

MODELS = {
    "llama": ("LlamaConfig", _LLAMA),
    "llama, biases, long rope": (
        "LlamaConfig",
        {**_LLAMA, "attention_bias": True, "rope_parameters": {**_LLAMA3, "original_max_position_embeddings": 32}},
    ),
    "llama, tied": ("LlamaConfig", {**_LLAMA, "tie_word_embeddings": True}),
    "mistral, window": ("MistralConfig", {**_LLAMA, "sliding_window": 7}),
    "qwen2": ("Qwen2Config", _LLAMA),
    "qwen2, windows above": (
        "Qwen2Config",
        {**_LLAMA, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3Config", _LLAMA),
    "gemma2": ("Gemma2Config", _GEMMA),
    "gemma3": ("Gemma3TextConfig", _GEMMA),
    "phi3": ("Phi3Config", {**_LLAMA, "hidden_size": 64}),
    "gpt_neox": ("GPTNeoXConfig", _NEOX),
    "gpt_neox, one after another": ("GPTNeoXConfig", {**_NEOX, "use_parallel_residual": False}),
    "gpt2": ("GPT2Config", {**_COMMON, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512}),
}


def make(name: str, *, seed: int = 0, dtype: torch.dtype = torch.float32):
    """A model whose logits are far enough apart for texts to vary."""
    kind, settings = MODELS[name]
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(getattr(transformers, kind)(**settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter) / (parameter.shape[-1] ** 0.5 if parameter.dim() > 1 else 3)
            parameter.add_(0.8 * noise)
    return model.to(dtype)


def prompts(batch: int = 3, length: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and attention mask, padded on the left."""
    ids = torch.randint(6, VOCAB, (batch, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    for row in range(1, batch):
        mask[row, : 3 * row] = 0
    return ids * mask, mask
