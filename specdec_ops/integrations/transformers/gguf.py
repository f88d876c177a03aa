"""A Llama from a GGUF file: its quantised blocks are multiplied as they lie in the file."""

from __future__ import annotations

import importlib.util
import os

import torch

from specdec_ops.decode.decoder import Attention, Decoder, Layer, Mlp, Norm, Projection
from specdec_ops.decode.listing import Replaced, linear_of
from specdec_ops.decode.rows import Shape
from specdec_ops.ops.linear.gguf_weight import BLOCK_BYTES, GgufWeight
from specdec_ops.rope import Rope

_OP = "integrations.transformers.load"


class _File:
    """Tensors of a GGUF file by name."""

    def __init__(self, path: str) -> None:
        from gguf import GGUFReader

        self._reader = GGUFReader(path)
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        self.replaced: list[Replaced] = []

    def field(self, name: str, default=None):
        found = self._reader.fields.get(name)
        return default if found is None else found.contents()

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def floats(self, name: str) -> torch.Tensor:
        """A tensor in float32, whatever it is in the file."""
        from gguf import dequantize

        tensor = self._tensors[name]
        return torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).astype("float32"))

    def weight(self, *names: str):
        """Several weights as one, rows after rows: GGUF blocks where `linear` takes them, else floats."""
        tensors = [self._tensors[name] for name in names]
        kinds = {tensor.tensor_type.name for tensor in tensors}
        if len(kinds) == 1 and (kind := kinds.pop().lower()) in BLOCK_BYTES:
            blocks = torch.cat([torch.from_numpy(tensor.data.copy()) for tensor in tensors])
            weight = GgufWeight(blocks, kind)
        else:
            weight = torch.cat([self.floats(name) for name in names])
        self.note(linear_of(weight), *names)
        return weight

    def note(self, by: str, *names: str) -> None:
        """`by` runs what the file has under these names."""
        self.replaced.append(Replaced(tuple(name.removesuffix(".weight") for name in names), by))


def load_gguf(path: str, tokenizer, dtype: torch.dtype) -> Decoder:
    """See `load`."""
    if importlib.util.find_spec("gguf") is None:
        raise RuntimeError(f"specdec_ops.{_OP}: needs the package gguf for GGUF files (pip install gguf)")
    if not os.path.isfile(path):
        raise ValueError(f"specdec_ops.{_OP}: model must be a GGUF file that exists, got {path!r}")
    file = _File(path)
    kind = file.field("general.architecture")
    if kind != "llama":
        raise ValueError(f"specdec_ops.{_OP}: a GGUF file must hold a llama, got {kind!r}; load it with transformers")
    if tokenizer is None:
        from transformers import AutoTokenizer

        folder, name = os.path.split(os.path.abspath(path))
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    heads, dim = file.field("llama.attention.head_count"), file.field("llama.embedding_length")
    kv_heads, count = file.field("llama.attention.head_count_kv", heads), file.field("llama.block_count")
    head_dim = file.field("llama.attention.key_length", dim // heads)
    eps, length = file.field("llama.attention.layer_norm_rms_epsilon"), file.field("llama.context_length")
    pairs = file.field("llama.rope.dimension_count", head_dim) // 2
    rope = Rope(file.field("llama.rope.freq_base", 10000.0), pairs, length)

    def norm(name: str) -> Norm:
        file.note("rms_norm, or in the linear that follows", name)
        return Norm(file.floats(f"{name}.weight"), None, eps)

    file.note("embedding", "token_embd")
    layers = []
    for index in range(count):
        of = f"blk.{index}."
        file.note("kv_append with the rotation, tree_attention", f"{of}attn")
        layers.append(
            Layer(
                norm(of + "attn_norm"),
                Attention(
                    Projection(file.weight(*(f"{of}attn_{part}.weight" for part in "qkv"))),
                    Projection(file.weight(of + "attn_output.weight")),
                    heads,
                    kv_heads,
                    head_dim,
                    rope,
                    interleaved=True,  # the file has the rows of q and k in the order that this rotation wants
                ),
                norm(of + "ffn_norm"),
                Mlp(
                    Projection(file.weight(of + "ffn_gate.weight", of + "ffn_up.weight")),
                    Projection(file.weight(of + "ffn_down.weight")),
                    "swiglu",
                ),
            )
        )
    embedding = file.floats("token_embd.weight")
    head = file.weight("output.weight" if "output.weight" in file else "token_embd.weight")
    shape = Shape(count, kv_heads, head_dim, dim, len(embedding), length, dtype, torch.device("cpu"))
    eos = file.field("tokenizer.ggml.eos_token_id")
    return Decoder(
        shape,
        embedding.to(dtype),
        layers,
        norm("output_norm"),
        Projection(head),
        tokenizer=tokenizer,
        eos=() if eos is None else (eos,),
        name=os.path.basename(path),
        replaced=tuple(file.replaced),
    )
