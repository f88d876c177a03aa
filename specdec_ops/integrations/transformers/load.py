"""`load`: a Hugging Face model, from an object or a folder, as a target or draft of the engine."""

from __future__ import annotations

import importlib.util
import os

import torch

from specdec_ops._core.checks import argument_error
from specdec_ops.decode.decoder import Decoder
from specdec_ops.ops.linear.quantized_weight import quantize_linear

from .families import Settings, decoder_of
from .gguf import load_gguf

_OP = "integrations.transformers.load"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def load(model, tokenizer=None, *, dtype: torch.dtype | None = None, weights: str | None = None) -> Decoder:
    """A decoder-only Hugging Face model on this package's ops.

    Each of the model's modules has an op in its place: `print` of what comes back lists them. The model itself works as
    before, its own `forward` and `generate` included. Only its q, k, v and its gate and up weights are laid one after
    another in memory, which `restore()` of what comes back undoes.

    Supported are Llama, Mistral, Qwen2, Qwen3, Phi-3, Gemma 2, Gemma 3 (text), GPT-NeoX and GPT-2: with grouped heads,
    sliding windows, soft caps, norms of q and k, tied heads and partial rotation as the model has them.

    Args:
        model: a model, e.g. of AutoModelForCausalLM; a folder with one; or a GGUF file of a Llama, whose quantised
            weights are read as they lie there.
        tokenizer: of the model; by default that in the folder or file, if there is one.
        dtype: of rows, keys and values: float32, bfloat16 or float16; by default that of the model's weights.
        weights: "int8" quantises the weights of the layers and of the head, to 8 bits with a scale per row; "bfloat16"
            rounds them; None leaves them as they are.

    Returns:
        A Decoder, for `specdec_ops.decode.Engine` and for drafts.

    Raises:
        TypeError, ValueError: an argument does not fit, or the model's family is not supported.
        RuntimeError: the package transformers is not installed.
    """
    if importlib.util.find_spec("transformers") is None:
        raise RuntimeError(f"specdec_ops.{_OP}: needs the package transformers (pip install specdec_ops[transformers])")
    if dtype is not None and dtype not in _DTYPES:
        raise TypeError(argument_error(_OP, "dtype", "float32, bfloat16 or float16", dtype))
    if weights not in (None, "int8", "bfloat16"):
        raise ValueError(argument_error(_OP, "weights", "'int8', 'bfloat16' or None", weights))
    if isinstance(model, str | os.PathLike):
        path = os.fspath(model)
        if path.endswith(".gguf"):
            if weights is not None:
                raise ValueError(f"specdec_ops.{_OP}: weights must be None for a GGUF file, got {weights!r}")
            return load_gguf(path, tokenizer, dtype or torch.float32)
        model, tokenizer = _from_folder(path, tokenizer, dtype)
    own = next(model.parameters()).dtype
    dtype = own if dtype is None else dtype
    if dtype not in _DTYPES:
        raise TypeError(argument_error(_OP, "dtype", "float32, bfloat16 or float16", dtype))

    def prepare(weight: torch.Tensor) -> object:
        if weights == "int8":
            return quantize_linear(weight)
        if weights == "bfloat16":
            return weight.to(torch.bfloat16)
        return weight if weight.dtype == dtype or dtype == torch.float32 else weight.to(dtype)

    with torch.no_grad():
        decoder = decoder_of(model, Settings(dtype, prepare))
    decoder.tokenizer = tokenizer
    decoder.eos = _eos(model, tokenizer)
    decoder.name = model.config._name_or_path or model.config.model_type
    return decoder


def _from_folder(path: str, tokenizer, dtype):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not os.path.isdir(path):
        raise ValueError(argument_error(_OP, "model", "a model, a folder or a .gguf file that exists", path))
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype or "auto").eval()
    if tokenizer is None and any(name.startswith("tokenizer") for name in os.listdir(path)):
        tokenizer = AutoTokenizer.from_pretrained(path)
    return model, tokenizer


def _eos(model, tokenizer) -> tuple[int, ...]:
    """Of the generation config, which has all of them; else of the config or the tokenizer."""
    for source in (getattr(model, "generation_config", None), model.config, tokenizer):
        ids = getattr(source, "eos_token_id", None)
        if ids is not None:
            return tuple(ids) if isinstance(ids, list | tuple) else (ids,)
    return ()
