"""The weights of a `Decoder` by name, and a decoder made of them: for training, and for saved drafts."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import torch

from specdec_ops.decode.decoder import Attention, Decoder, Layer, Mlp, Norm, Projection
from specdec_ops.decode.rows import Shape
from specdec_ops.ops.linear.gguf_weight import GgufWeight
from specdec_ops.ops.linear.quantized_weight import QuantizedWeight, quantize_linear
from specdec_ops.rope import Rope

Weight = torch.Tensor | QuantizedWeight | GgufWeight
Tensors = Mapping[str, torch.Tensor]

_OF_ATTENTION = ("heads", "kv_heads", "head_dim", "interleaved", "scale", "window", "softcap")
_NORMS = ("attention_norm", "mlp_norm", "after_attention", "after_mlp", "q_norm", "k_norm")
_PROJECTIONS = ("qkv", "out", "up", "down")
_FORMS = ("int8", "bfloat16", "float32")

# Activations without a gate, as models in this package's format are saved with them.
_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": functools.partial(torch.nn.functional.gelu, approximate="tanh"),
    "relu": torch.nn.functional.relu,
    "silu": torch.nn.functional.silu,
}


def dense_weight(weight: Weight) -> torch.Tensor:
    """[outputs, dim]: a weight in float32. Of a float32 tensor it is that tensor."""
    if isinstance(weight, GgufWeight):
        return weight.dequantize()
    if isinstance(weight, QuantizedWeight):
        return weight.values.float() * weight.scales[:, None]
    return weight.float()


def projections(layer: Layer) -> dict[str, Projection]:
    """qkv, out, up and down of a layer."""
    return dict(
        zip(_PROJECTIONS, (layer.attention.qkv, layer.attention.out, layer.mlp.up, layer.mlp.down), strict=True)
    )


def norms(layer: Layer) -> dict[str, Norm]:
    """The norms that a layer has, by name."""
    attention = layer.attention
    found = (layer.attention_norm, layer.mlp_norm, layer.after_attention, layer.after_mlp)
    found = (*found, attention.q_norm, attention.k_norm)
    return {name: norm for name, norm in zip(_NORMS, found, strict=True) if norm is not None}


def sizes_of(layer: Layer) -> dict:
    """What a layer is besides its weights and its rotation, as JSON can say it.

    Raises:
        ValueError: it has an activation that has no name here, or attention sinks.
    """
    attention = layer.attention
    if attention.sinks is not None:
        raise ValueError("specdec_ops.drafts: model must be one without attention sinks")
    said = {name: getattr(attention, name) for name in _OF_ATTENTION}
    said |= {"activation": activation_name(layer.mlp.activation), "parallel": layer.parallel}
    return said | {"eps": {name: norm.eps for name, norm in norms(layer).items()}}


def activation_name(activation: str | Callable) -> str:
    """The name of an activation, which for a function is that of one that does the same."""
    if isinstance(activation, str):
        return activation
    probe = torch.linspace(-6, 6, 97)
    for name, known in _ACTIVATIONS.items():
        if torch.allclose(activation(probe), known(probe), rtol=1e-5, atol=1e-6):
            return name
    must = f"a model with an activation of {', '.join(_ACTIVATIONS)}, or a gated one"
    raise ValueError(f"specdec_ops.drafts: model must be {must}, got {activation!r}")


def make_layer(sizes: dict, parts: Mapping[str, Projection | Norm], rope: Rope | None) -> Layer:
    """A layer of what `sizes_of` says, its projections and norms by name, and its rotation."""
    attention = Attention(
        parts["qkv"],
        parts["out"],
        rope=rope,
        q_norm=parts.get("q_norm"),
        k_norm=parts.get("k_norm"),
        **{name: sizes[name] for name in _OF_ATTENTION},
    )
    mlp = Mlp(parts["up"], parts["down"], _ACTIVATIONS.get(sizes["activation"], sizes["activation"]))
    return Layer(
        parts["attention_norm"],
        attention,
        parts["mlp_norm"],
        mlp,
        parts.get("after_attention"),
        parts.get("after_mlp"),
        sizes["parallel"],
    )


def to_tensors(model: Decoder, form: str) -> tuple[dict[str, torch.Tensor], dict]:
    """A model as tensors by name, and what JSON says of it.

    Args:
        model: of any form of weights.
        form: of the layers' weights: "int8", with a scale for each row, "bfloat16" or "float32". The embedding, and a
            head that is another one, are in bfloat16 or float32.

    Raises:
        ValueError: form is none of these, or a layer can't be said in JSON.
    """
    if form not in _FORMS:
        raise ValueError(f"specdec_ops.drafts: weights must be one of {', '.join(_FORMS)}, got {form!r}")
    wide = torch.float32 if form == "float32" else torch.bfloat16
    head = dense_weight(model.head.weight)
    is_tied = head.shape == model.embedding.shape and torch.equal(head, model.embedding.float())
    tensors = {"embedding": model.embedding.to(wide)} | ({} if is_tied else {"head": head.to(wide)})
    if model.head.bias is not None:
        tensors["head.bias"] = model.head.bias
    if model.position_embedding is not None:
        tensors["position_embedding"] = model.position_embedding.to(wide)
    tensors |= _of_norm("norm", model.norm)
    ropes = list({id(layer.attention.rope): layer.attention.rope for layer in model.layers}.values())
    places = {id(rope): place for place, rope in enumerate(ropes)}
    said = []
    for place, layer in enumerate(model.layers):
        for name, norm in norms(layer).items():
            tensors |= _of_norm(f"layers.{place}.{name}", norm)
        for name, projection in projections(layer).items():
            tensors |= _of_projection(f"layers.{place}.{name}", projection, form)
        said.append(sizes_of(layer) | {"rope": places[id(layer.attention.rope)]})
    for place, rope in enumerate(ropes):
        if rope is not None:
            tensors |= {f"ropes.{place}.cosines": rope.cosines, f"ropes.{place}.sines": rope.sines}
    shape = model.shape
    about = {name: getattr(shape, name) for name in ("kv_heads", "head_dim", "dim", "vocab", "max_positions")}
    about |= {"embedding_scale": model.embedding_scale, "norm_eps": model.norm.eps, "layers": said}
    return tensors, about


def from_tensors(tensors: Tensors, about: dict, *, dtype: torch.dtype, device: torch.device) -> Decoder:
    """The model of what `to_tensors` gave.

    Args:
        tensors: by name.
        about: what JSON said.
        dtype: of rows, keys and values.
        device: where it will be.
    """
    tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
    ropes: dict[int, Rope | None] = {}
    layers = []
    for place, sizes in enumerate(about["layers"]):
        parts: dict[str, Projection | Norm] = {}
        for name in _PROJECTIONS:
            parts[name] = _projection(tensors, f"layers.{place}.{name}", dtype)
        for name, eps in sizes["eps"].items():
            parts[name] = _norm(tensors, f"layers.{place}.{name}", eps)
        rope = sizes["rope"]
        if rope not in ropes:
            tables = [tensors.get(f"ropes.{rope}.{name}") for name in ("cosines", "sines")]
            ropes[rope] = None if tables[0] is None else Rope.from_tables(*tables)
        layers.append(make_layer(sizes, parts, ropes[rope]))
    embedding, positions = tensors["embedding"], tensors.get("position_embedding")
    head = tensors.get("head", embedding)
    names = ("kv_heads", "head_dim", "dim", "vocab", "max_positions")
    shape = Shape(layers=len(layers), dtype=dtype, device=device, **{name: about[name] for name in names})
    return Decoder(
        shape,
        embedding,
        layers,
        _norm(tensors, "norm", about["norm_eps"]),
        Projection(head if dtype == torch.float32 else head.to(dtype), _bias(tensors, "head", dtype)),
        embedding_scale=about["embedding_scale"],
        position_embedding=None if positions is None else positions.to(dtype),
    )


def _of_norm(name: str, norm: Norm) -> dict[str, torch.Tensor]:
    return {f"{name}.weight": norm.weight} | ({} if norm.bias is None else {f"{name}.bias": norm.bias})


def _of_projection(name: str, projection: Projection, form: str) -> dict[str, torch.Tensor]:
    weight = projection.weight
    found = {} if projection.bias is None else {f"{name}.bias": projection.bias}
    if form == "int8":
        weight = weight if isinstance(weight, QuantizedWeight) else quantize_linear(dense_weight(weight))
        return found | {f"{name}.weight": weight.values, f"{name}.scales": weight.scales}
    return found | {f"{name}.weight": dense_weight(weight).to(getattr(torch, form))}


def _norm(tensors: Tensors, name: str, eps: float) -> Norm:
    return Norm(tensors[f"{name}.weight"], tensors.get(f"{name}.bias"), eps)


def _projection(tensors: Tensors, name: str, dtype: torch.dtype) -> Projection:
    weight, scales = tensors[f"{name}.weight"], tensors.get(f"{name}.scales")
    if scales is not None:
        weight = QuantizedWeight(weight, scales)
    elif dtype != torch.float32:
        weight = weight.to(dtype)
    return Projection(weight, _bias(tensors, name, dtype))


def _bias(tensors: Tensors, name: str, dtype: torch.dtype) -> torch.Tensor | None:
    bias = tensors.get(f"{name}.bias")
    return None if bias is None else bias.to(dtype)
