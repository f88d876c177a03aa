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

# Models that `load` does not take, for attention alone: here one with sinks.
_EXPERTS = {
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
}
OTHERS = {"gpt_oss, sinks": ("GptOssConfig", {**_LLAMA, **_EXPERTS, "sliding_window": 5})}


def make(name: str, *, seed: int = 0, dtype: torch.dtype = torch.float32):
    """A model whose logits are far enough apart for texts to vary."""
    kind, settings = {**MODELS, **OTHERS}[name]
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(getattr(transformers, kind)(**settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter) / (parameter.shape[-1] ** 0.5 if parameter.dim() > 1 else 3)
            parameter.add_(0.8 * noise)
    return model.to(dtype)


def write_gguf(model, path, kind: str) -> None:
    """A Llama as a GGUF file, its weights in the given type where rows are whole blocks of 32, else in float32.

    The model gets the weights that the file stands for. Rows of q and k lie as llama.cpp wants them, the two elements
    of a rotated pair side by side.
    """
    import gguf

    config, own = model.config, gguf.GGMLQuantizationType[kind.upper()]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_eos_token_id(config.eos_token_id)

    def add(name: str, parameter, heads: int = 0) -> None:
        rows = parameter.data.numpy()
        if rows.ndim == 2 and rows.shape[1] % 32 == 0 and own != gguf.GGMLQuantizationType.F32:
            blocks, stored = gguf.quants.quantize(rows, own), own
            parameter.data = torch.from_numpy(gguf.quants.dequantize(blocks, own).astype("float32"))
        else:
            blocks, stored = rows, None
        if heads:
            blocks = blocks.reshape(heads, 2, -1, blocks.shape[-1]).swapaxes(1, 2).reshape(blocks.shape).copy()
        writer.add_tensor(f"{name}.weight", blocks, raw_dtype=stored)

    inner = model.model
    add("token_embd", inner.embed_tokens.weight)
    for index, layer in enumerate(inner.layers):
        attention, mlp, of = layer.self_attn, layer.mlp, f"blk.{index}."
        add(of + "attn_norm", layer.input_layernorm.weight)
        add(of + "attn_q", attention.q_proj.weight, config.num_attention_heads)
        add(of + "attn_k", attention.k_proj.weight, config.num_key_value_heads)
        add(of + "attn_v", attention.v_proj.weight)
        add(of + "attn_output", attention.o_proj.weight)
        add(of + "ffn_norm", layer.post_attention_layernorm.weight)
        for name in ("gate", "up", "down"):
            add(of + f"ffn_{name}", getattr(mlp, f"{name}_proj").weight)
    add("output_norm", inner.norm.weight)
    add("output", model.lm_head.weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def prompts(batch: int = 3, length: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and attention mask, padded on the left."""
    ids = torch.randint(6, VOCAB, (batch, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    for row in range(1, batch):
        mask[row, : 3 * row] = 0
    return ids * mask, mask
