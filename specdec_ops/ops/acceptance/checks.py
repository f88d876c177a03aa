"""Argument checks of the acceptance and sampling ops. They raise; `specdec_ops._core.checks` words the sentences.

Each returns what the implementations take: contiguous int32 tensors, and for an option that may differ per request a
number with None, or the number's neutral value with a tensor.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from specdec_ops._core.checks import (
    FLOAT_MAX,
    INT32_MAX,
    KERNEL_DTYPES,
    argument_error,
    as_int32,
    as_int64,
    describe_dtype,
    device_error,
    grad_error,
    is_int,
    is_number,
    strides_error,
    wrong_batch,
    wrong_topology,
)
from specdec_ops.topology import Topology
from specdec_ops.vocab_map import VocabMap

MAX_NODES = 65_535
"""Noise is keyed by 16 bits of the node."""
MAX_DRAWS = 65_535
_NO_TOKEN = -2  # and no padding either
_LOGIT_DTYPES = (*KERNEL_DTYPES, torch.float64)


def check_logits(op: str, name: str, layout: str, value) -> tuple:
    """Check logits with at least one vocabulary entry; return their shape."""
    if not isinstance(value, torch.Tensor) or value.dtype not in _LOGIT_DTYPES:
        raise TypeError(argument_error(op, name, f"float32, bfloat16 or float16 {layout}", value))
    shape = value.shape
    if len(shape) != layout.count(",") + 1 or not 0 < shape[-1] <= INT32_MAX or shape[0] > INT32_MAX:
        must = "a vocab of at least 1" if len(shape) != layout.count(",") + 1 or not shape[-1] else "sizes below 2**31"
        raise ValueError(argument_error(op, name, f"{layout} with {must}", value))
    if value.stride(-1) != 1 and shape[-1] > 1:
        raise ValueError(strides_error(op, name, "contiguous in its last dimension", value))
    if value.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(grad_error(op))
    return shape


def check_target(op: str, value, layout: str = "[batch, nodes, vocab]", name: str = "target_logits") -> tuple:
    """Check the target's logits; return batch, nodes and vocab."""
    batch, nodes, vocab = check_logits(op, name, layout, value)
    if not 1 <= nodes <= MAX_NODES:
        raise ValueError(argument_error(op, name, f"{layout} with 1 to {MAX_NODES} rows per request", value))
    return batch, nodes, vocab


def check_ids(op: str, name: str, value, batch: int, columns: int, device) -> torch.Tensor:
    """Token ids, or nodes, int32 [batch, columns]; ids that int32 can't hold stay invalid."""
    if not isinstance(value, torch.Tensor) or value.dtype != torch.int32:
        value = as_int32(op, name, f"[{batch}, {columns}]", value)
    if value.shape != (batch, columns):
        sentence = argument_error(op, name, f"int32 or int64 [{batch}, {columns}]", value)
        raise ValueError(f"{sentence}; there is one for each row of logits")
    if value.device != device:
        raise ValueError(device_error(op, name, device, value))
    return value if value.is_contiguous() else value.contiguous()


def check_tokens(op: str, value, batch: int, columns: int, device) -> torch.Tensor:
    """Drafted tokens, int32 [batch, columns]. Two that int32 can't hold are not one: they are no tokens."""
    if isinstance(value, torch.Tensor) and value.dtype == torch.int64:
        value = torch.where(value > INT32_MAX, _NO_TOKEN, value)
    return check_ids(op, "draft_tokens", value, batch, columns, device)


def check_links(op: str, topology, batch: int, nodes: int, device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The topology's first_child, next_sibling [batch or 1, nodes] and num_nodes [batch or 1], of one batch size."""
    if not isinstance(topology, Topology):
        raise TypeError(wrong_topology(op, "a specdec_ops.Topology", topology))
    first_child, next_sibling, num_nodes = topology.first_child, topology.next_sibling, topology.num_nodes
    trees, room = first_child.shape
    counts = num_nodes.shape[0]
    if (trees != batch and trees != 1) or (counts != batch and counts != 1):
        raise ValueError(wrong_batch(op, batch, max(trees, counts)))
    if room < nodes:
        raise ValueError(f"specdec_ops.{op}: topology must have room for the {nodes} nodes of a request, got {room}")
    if first_child.device != device:
        raise ValueError(device_error(op, "topology", device, first_child))
    if room > nodes:  # sliced: the logits have the leading nodes only, and links may lead beyond
        first_child, next_sibling = (
            torch.where(links < nodes, links, -1) for links in (first_child[:, :nodes], next_sibling[:, :nodes])
        )
    if trees != counts:  # one shared tree, cut to another size for every request
        first_child, next_sibling = first_child.expand(batch, -1), next_sibling.expand(batch, -1)
        num_nodes = num_nodes.expand(batch)
    if not (first_child.is_contiguous() and next_sibling.is_contiguous() and num_nodes.is_contiguous()):
        return first_child.contiguous(), next_sibling.contiguous(), num_nodes.contiguous()
    return first_child, next_sibling, num_nodes


def check_draft_logits(op: str, value, rows: int, vocab_map, batch: int, vocab: int, target) -> torch.Tensor | None:
    """Check the draft's logits against the target's and the map; return the map's target_to_draft, or None."""
    layout = "[batch, nodes, vocab]"
    shape = check_logits(op, "draft_logits", layout, value)
    if (value.dtype == torch.float64) != (target.dtype == torch.float64):
        raise TypeError(argument_error(op, "draft_logits", "float64 if and only if target_logits is", value))
    if value.device != target.device:
        raise ValueError(device_error(op, "draft_logits", target.device, value))
    target_to_draft, draft_vocab = None, vocab
    if vocab_map is not None:
        check_vocab_map(op, vocab_map, target.device)
        target_to_draft = vocab_map.target_to_draft
        draft_vocab = vocab_map.draft_to_target.shape[0]
        if target_to_draft.shape[0] != vocab:
            raise ValueError(
                f"specdec_ops.{op}: vocab_map must be for a target vocab of {vocab}, got {target_to_draft.shape[0]}"
            )
    if shape != (batch, rows, draft_vocab):
        raise ValueError(argument_error(op, "draft_logits", f"[{batch}, {rows}, {draft_vocab}]", value))
    return target_to_draft


def check_vocab_map(op: str, value, device) -> None:
    """Check for a VocabMap on this device."""
    if not isinstance(value, VocabMap):
        raise TypeError(argument_error(op, "vocab_map", "a specdec_ops.VocabMap or None", value))
    if value.draft_to_target.device != device:
        raise ValueError(device_error(op, "vocab_map", device, value.draft_to_target))


def check_law(op: str, temperature, top_k, top_p, batch: int, device) -> tuple:
    """(temperature, temperatures, top_k, top_ks, top_p, top_ps)."""
    return (
        *_number_or_tensor(_TEMPERATURE, op, "temperature", temperature, batch, device),
        *_number_or_tensor(_TOP_K, op, "top_k", top_k, batch, device),
        *_number_or_tensor(_TOP_P, op, "top_p", top_p, batch, device),
    )


def check_draft_law(op: str, temperature, top_k, top_p, batch: int, device, target_law: tuple) -> tuple:
    """The same for the draft, each as the target's where it is None."""
    if temperature is None and top_k is None and top_p is None:
        return target_law
    temperatures, top_ks, top_ps = target_law[0:2], target_law[2:4], target_law[4:6]
    if temperature is not None:
        temperatures = _number_or_tensor(_TEMPERATURE, op, "draft_temperature", temperature, batch, device)
    if top_k is not None:
        top_ks = _number_or_tensor(_TOP_K, op, "draft_top_k", top_k, batch, device)
    if top_p is not None:
        top_ps = _number_or_tensor(_TOP_P, op, "draft_top_p", top_p, batch, device)
    return (*temperatures, *top_ks, *top_ps)


def draft_options_refused(op: str, temperature, top_k, top_p, vocab_map) -> None:
    """Without draft_logits, options that say what they are must not be given."""
    options = {"draft_temperature": temperature, "draft_top_k": top_k, "draft_top_p": top_p, "vocab_map": vocab_map}
    for name, value in options.items():
        if value is not None:
            raise ValueError(argument_error(op, name, "None without draft_logits", value))


def check_noise(op: str, seeds, positions, batch: int, device) -> tuple:
    """(seed, seeds, position, positions)."""
    if isinstance(seeds, torch.Tensor):
        seeds = (0, check_per_request(op, "seeds", seeds, torch.int64, batch, device))
    elif not is_int(seeds):
        raise TypeError(argument_error(op, "seeds", "an int or int64 [batch]", seeds))
    elif not -(2**63) <= seeds < 2**64:
        raise ValueError(argument_error(op, "seeds", "an int of 64 bits", seeds))
    else:
        seeds = (seeds if seeds < 2**63 else seeds - 2**64, None)
    if isinstance(positions, torch.Tensor):
        return (*seeds, 0, check_per_request(op, "positions", positions, torch.int32, batch, device))
    if not is_int(positions):
        raise TypeError(argument_error(op, "positions", "an int, or int32 or int64 [batch]", positions))
    if not 0 <= positions <= INT32_MAX:
        raise ValueError(argument_error(op, "positions", "an int from 0 to 2**31 - 1", positions))
    return (*seeds, positions, None)


def check_count(op: str, name: str, value, low: int, high: int) -> int:
    """Check an int of a range."""
    if not is_int(value):
        raise TypeError(argument_error(op, name, f"an int from {low} to {high}", value))
    if not low <= value <= high:
        raise ValueError(argument_error(op, name, f"an int from {low} to {high}", value))
    return value


def check_fraction(op: str, name: str, value) -> None:
    """Check a number from 0 to 1."""
    if not is_number(value):
        raise TypeError(argument_error(op, name, "a number from 0 to 1", value))
    if not 0 <= value <= 1:
        raise ValueError(argument_error(op, name, "a number from 0 to 1", value))


def check_per_request(op: str, name: str, value, dtype: torch.dtype, batch: int, device) -> torch.Tensor:
    """A tensor [batch] of this dtype, contiguous. Other integers are converted; one without dimensions is for all."""
    if value.dtype != dtype:
        layout = f"[{batch}] if it is a tensor"
        if dtype == torch.float32:
            raise TypeError(argument_error(op, name, f"float32 {layout}", value))
        value = (as_int32 if dtype == torch.int32 else as_int64)(op, name, layout, value)
    if value.shape != (batch,):
        if value.dim() != 0:
            names = "int32 or int64" if dtype == torch.int32 else describe_dtype(dtype)
            raise ValueError(argument_error(op, name, f"{names} [{batch}] if it is a tensor", value))
        value = value.expand(batch)
    if value.device != device:
        raise ValueError(device_error(op, name, device, value))
    if value.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(grad_error(op))
    return value if value.is_contiguous() else value.contiguous()


def check_written(op: str, name: str, value, shape: tuple, device, dtype: torch.dtype = torch.int32) -> None:
    """Check a tensor that the op is to write into."""
    if not isinstance(value, torch.Tensor) or value.dtype != dtype:
        raise TypeError(argument_error(op, name, f"{describe_dtype(dtype)} {list(shape)}", value))
    if value.shape != shape:
        raise ValueError(argument_error(op, name, f"{describe_dtype(dtype)} {list(shape)}", value))
    if value.device != device:
        raise ValueError(device_error(op, name, device, value))
    if not value.is_contiguous():
        raise ValueError(strides_error(op, name, "contiguous", value))


class _Option(NamedTuple):
    """An option that is one number for all requests, or a tensor with one for each."""

    dtype: torch.dtype
    neutral: float  # which stands in the number's place where there is a tensor
    is_one: Callable[[object], bool]
    kinds: str
    greatest: float
    numbers: str


_TEMPERATURE = _Option(
    torch.float32, 1.0, is_number, "a number or float32 [batch]", FLOAT_MAX, "a finite number of at least 0"
)
_TOP_K = _Option(
    torch.int32, 0, is_int, "an int, or int32 or int64 [batch]", INT32_MAX, "an int from 0 (off) to 2**31 - 1"
)
_TOP_P = _Option(torch.float32, 1.0, is_number, "a number or float32 [batch]", 1, "a number from 0 to 1 (off)")


def _number_or_tensor(option: _Option, op: str, name: str, value, batch: int, device) -> tuple:
    """(the number, the tensor or None)."""
    if isinstance(value, torch.Tensor):
        return option.neutral, check_per_request(op, name, value, option.dtype, batch, device)
    if not option.is_one(value):
        raise TypeError(argument_error(op, name, option.kinds, value))
    if not 0 <= value <= option.greatest:
        raise ValueError(argument_error(op, name, option.numbers, value))
    return value, None
