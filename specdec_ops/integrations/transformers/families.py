"""From the modules of a Hugging Face model to a `Decoder`: where each family keeps its weights.

Weights are the model's own tensors. Projections that are read together (q, k and v; gate and up) are joined once, and
the model's parameters become views of the joined ones, so that nothing is stored twice and the model works as before.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import torch

from specdec_ops.decode.decoder import Attention, Decoder, Layer, Mlp, Norm, Projection
from specdec_ops.decode.listing import Replaced, linear_of
from specdec_ops.decode.rows import Shape
from specdec_ops.rope import Rope

_OP = "integrations.transformers.load"
_EMBEDDING = "embedding"
Prepare = Callable[[torch.Tensor], object]  # a weight [out, dim] as it comes, to one that `linear` takes


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a model is to run, and what has been put in the place of its modules so far."""

    dtype: torch.dtype
    prepare: Prepare
    replaced: list[tuple[tuple[torch.nn.Module, ...], str]] = dataclasses.field(default_factory=list)
    joined: list[torch.nn.Parameter] = dataclasses.field(default_factory=list)
    """parameters that are views of joined ones"""

    def note(self, by: str, *modules: torch.nn.Module) -> None:
        """`by` runs in place of these modules."""
        self.replaced.append((modules, by))


def _joined(linears: list, settings: Settings) -> Projection:
    """One projection of several modules that read the same rows."""
    weight = torch.cat([linear.weight.data for linear in linears])
    biases = [linear.bias for linear in linears]
    bias = None if biases[0] is None else torch.cat([bias.data for bias in biases])
    start = 0
    for linear in linears:
        rows = slice(start, start := start + len(linear.weight))
        linear.weight.data = weight[rows]
        settings.joined.append(linear.weight)
        if bias is not None:
            linear.bias.data = bias[rows]
            settings.joined.append(linear.bias)
    return _projection(weight, bias, settings, *linears)


def _projection(weight: torch.Tensor, bias: torch.Tensor | None, settings: Settings, *modules) -> Projection:
    """Of a weight that stands for these modules."""
    bias = None if bias is None else bias.detach().to(settings.dtype)
    prepared = settings.prepare(weight.detach())
    settings.note(linear_of(prepared), *modules)
    return Projection(prepared, bias)


def _linear(linear, settings: Settings) -> Projection:
    return _projection(linear.weight, linear.bias, settings, linear)


def _embedding(module, settings: Settings) -> torch.Tensor:
    settings.note(_EMBEDDING, module)
    return module.weight.detach()


def _rms_norm(norm, settings: Settings, *, plus_one: bool = False) -> Norm:
    settings.note("rms_norm, or in the linear that follows", norm)
    weight = norm.weight.detach()
    weight = weight.float() + 1 if plus_one else weight.to(settings.dtype)
    return Norm(weight, None, getattr(norm, "variance_epsilon", None) or norm.eps)


def _layer_norm(norm, settings: Settings) -> Norm:
    settings.note("layer_norm of PyTorch", norm)
    return Norm(norm.weight.detach().to(settings.dtype), norm.bias.detach().to(settings.dtype), norm.eps)


def _attention(module, settings: Settings, *parts, **options) -> Attention:
    """What stands for a module of attention, whose projections are noted already."""
    made = Attention(*parts, **options)
    said = ["kv_append with the rotation" if made.rope else "kv_append", "tree_attention"]
    said += [f"window {made.window}"] if made.window else []
    said += [f"soft cap {made.softcap:g}"] if made.softcap else []
    settings.note(", ".join(said), module)
    return made


def _gated(name: str) -> str:
    """The name that `linear` has for a gated activation of a Hugging Face config."""
    names = {"silu": "swiglu", "swish": "swiglu", "gelu_pytorch_tanh": "geglu"}
    if name not in names:
        raise ValueError(f"specdec_ops.{_OP}: hidden_act must be one of {', '.join(names)}, got {name!r}")
    return names[name]


def _ropes(config, layers: int) -> list[Rope]:
    """Of each layer. Gemma 3 turns its sliding layers by another base."""
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * layers
    per_kind = isinstance(getattr(config, "rope_parameters", None), dict) and kinds[0] in config.rope_parameters
    made = {kind: Rope.from_config(config, layer_type=kind if per_kind else None) for kind in dict.fromkeys(kinds)}
    return [made[kind] for kind in kinds]


def _windows(config, layers: int) -> list[int | None]:
    """Of each layer: how many positions it sees, or None for all."""
    window = getattr(config, "sliding_window", None)
    if not window:
        return [None] * layers
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * layers
    return [window if kind == "sliding_attention" else None for kind in kinds]


def _llama(model, settings: Settings) -> Decoder:
    """Llama, Mistral, Qwen2, Qwen3, Phi-3, Gemma 2 and Gemma 3 (text)."""
    config, inner = model.config, model.model
    gemma = config.model_type.startswith("gemma")
    layers = []
    ropes, windows = _ropes(config, len(inner.layers)), _windows(config, len(inner.layers))
    for part, rope, window in zip(inner.layers, ropes, windows, strict=True):
        attention, mlp = part.self_attn, part.mlp
        joined = hasattr(attention, "qkv_proj")
        q_norm, k_norm = (getattr(attention, name, None) for name in ("q_norm", "k_norm"))
        layers.append(
            Layer(
                _rms_norm(part.input_layernorm, settings, plus_one=gemma),
                _attention(
                    attention,
                    settings,
                    _linear(attention.qkv_proj, settings)
                    if joined
                    else _joined([attention.q_proj, attention.k_proj, attention.v_proj], settings),
                    _linear(attention.o_proj, settings),
                    config.num_attention_heads,
                    config.num_key_value_heads,
                    attention.head_dim,
                    rope,
                    scale=float(attention.scaling),
                    window=window,
                    softcap=getattr(attention, "attn_logit_softcapping", None),
                    q_norm=None if q_norm is None else _rms_norm(q_norm, settings, plus_one=gemma),
                    k_norm=None if k_norm is None else _rms_norm(k_norm, settings, plus_one=gemma),
                ),
                _rms_norm(
                    part.pre_feedforward_layernorm if gemma else part.post_attention_layernorm, settings, plus_one=gemma
                ),
                Mlp(
                    _linear(mlp.gate_up_proj, settings)
                    if hasattr(mlp, "gate_up_proj")
                    else _joined([mlp.gate_proj, mlp.up_proj], settings),
                    _linear(mlp.down_proj, settings),
                    _gated(getattr(config, "hidden_activation", None) or config.hidden_act),
                ),
                after_attention=_rms_norm(part.post_attention_layernorm, settings, plus_one=True) if gemma else None,
                after_mlp=_rms_norm(part.post_feedforward_layernorm, settings, plus_one=True) if gemma else None,
            )
        )
    return Decoder(
        _shape(model, layers, settings),
        _embedding(inner.embed_tokens, settings),
        layers,
        _rms_norm(inner.norm, settings, plus_one=gemma),
        _linear(model.lm_head, settings),
        embedding_scale=config.hidden_size**0.5 if gemma else None,
        logit_softcap=getattr(config, "final_logit_softcapping", None),
    )


def _gpt_neox(model, settings: Settings) -> Decoder:
    config, inner = model.config, model.gpt_neox
    heads = config.num_attention_heads
    head_dim = config.hidden_size // heads
    rope = _ropes(config, len(inner.layers))[0]
    layers = []
    for part in inner.layers:
        joined = part.attention.query_key_value  # its rows: of each head q, k and v
        order = torch.arange(3 * heads * head_dim).view(heads, 3, head_dim).transpose(0, 1).reshape(-1)
        bias = None if joined.bias is None else joined.bias[order]
        layers.append(
            Layer(
                _layer_norm(part.input_layernorm, settings),
                _attention(
                    part.attention,
                    settings,
                    _projection(joined.weight[order], bias, settings, joined),
                    _linear(part.attention.dense, settings),
                    heads,
                    heads,
                    head_dim,
                    rope,
                ),
                _layer_norm(part.post_attention_layernorm, settings),
                Mlp(_linear(part.mlp.dense_h_to_4h, settings), _linear(part.mlp.dense_4h_to_h, settings), part.mlp.act),
                parallel=config.use_parallel_residual,
            )
        )
    return Decoder(
        _shape(model, layers, settings),
        _embedding(inner.embed_in, settings),
        layers,
        _layer_norm(inner.final_layer_norm, settings),
        _linear(model.get_output_embeddings(), settings),
    )


def _gpt2(model, settings: Settings) -> Decoder:
    config, inner = model.config, model.transformer
    heads = config.num_attention_heads
    head_dim = config.hidden_size // heads
    if config.scale_attn_by_inverse_layer_idx or not config.scale_attn_weights:
        raise ValueError(f"specdec_ops.{_OP}: GPT-2 with scale_attn_by_inverse_layer_idx or unscaled is not supported")

    def turned(conv) -> Projection:  # its weights are [dim, out]
        return _projection(conv.weight.t().contiguous(), conv.bias, settings, conv)

    layers = [
        Layer(
            _layer_norm(part.ln_1, settings),
            _attention(part.attn, settings, turned(part.attn.c_attn), turned(part.attn.c_proj), heads, heads, head_dim),
            _layer_norm(part.ln_2, settings),
            Mlp(turned(part.mlp.c_fc), turned(part.mlp.c_proj), part.mlp.act),
        )
        for part in inner.h
    ]
    return Decoder(
        _shape(model, layers, settings),
        _embedding(inner.wte, settings),
        layers,
        _layer_norm(inner.ln_f, settings),
        _linear(model.lm_head, settings),
        position_embedding=_embedding(inner.wpe, settings).to(settings.dtype),
    )


def _shape(model, layers: list[Layer], settings: Settings) -> Shape:
    attention = layers[0].attention
    head = model.get_output_embeddings().weight
    return Shape(
        len(layers),
        attention.kv_heads,
        attention.head_dim,
        model.config.hidden_size,
        len(head),
        model.config.max_position_embeddings,
        settings.dtype,
        head.device,
    )


FAMILIES: dict[str, Callable] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma2", "gemma3_text"), _llama),
    "gpt_neox": _gpt_neox,
    "gpt2": _gpt2,
}


def refuse_unsupported(op: str, model) -> None:
    """Raise ValueError if a model's family is not supported, by the name of an op."""
    kind = model.config.model_type
    if kind not in FAMILIES:
        raise ValueError(
            f"specdec_ops.{op}: model must be of one of {', '.join(FAMILIES)}, got {kind!r}{_why_not(model.config)}"
        )


def decoder_of(model, settings: Settings) -> Decoder:
    """The model on this package's ops.

    Raises:
        ValueError: its family is not supported.
    """
    refuse_unsupported(_OP, model)
    decoder = FAMILIES[model.config.model_type](model, settings)
    names = {module: name for name, module in model.named_modules()}
    in_order = sorted(settings.replaced, key=lambda one: one[1] != _EMBEDDING)  # stable
    decoder.replaced = tuple(Replaced(tuple(names[module] for module in modules), by) for modules, by in in_order)
    decoder.restore = functools.partial(_separate, settings.joined)
    return decoder


def _separate(parameters: list[torch.nn.Parameter]) -> None:
    """Give parameters that are views memory of their own."""
    for parameter in parameters:
        parameter.data = parameter.data.clone()


def _why_not(config) -> str:
    if getattr(config, "kv_lora_rank", None):
        return "; latent attention (MLA) keeps other keys and values than the engine's cache"
    if getattr(config, "is_encoder_decoder", False):
        return "; encoder-decoder models have a second source of keys and values"
    if any(hasattr(config, name) for name in ("state_size", "ssm_cfg", "rwkv_version", "attention_hidden_size")):
        return "; recurrent models have a state that can't be rolled back by tokens"
    return ""
