"""Our attention alone in any Hugging Face model and any loop: an entry of `AttentionInterface`."""

from __future__ import annotations

import functools
import sys
from typing import NamedTuple

import torch

from specdec_ops.ops.attention.tree_attention import tree_attention
from specdec_ops.topology import Topology
from specdec_ops.tree import MAX_NODES, Tree

NAME = "specdec_ops"
_MOST_ROWS = 64  # more rows are a prompt, for which PyTorch's attention is made


class TreeView(NamedTuple):
    """Where the rows of a pass stand, as the keyword `specdec` of the model: `model(ids, specdec=TreeView(...))`.

    The last `topology.nodes` of the keys are the tree's; those before `context_lens[b]` are what all nodes see.
    """

    topology: Topology
    context_lens: torch.Tensor
    """int32 [batch]"""


def register() -> str:
    """Make the name known to transformers. Returns it, for the model's set_attn_implementation.

    Passes of up to 64 rows without padding run on `tree_attention`, over the model's own cache as it lies. Padded
    batches, and prompts, which have more rows, run on PyTorch's attention as before. Where scores are capped or there
    are sinks, which it lacks, prompts run on ours and padded batches on the model's own. With the keyword `specdec`, a
    `TreeView`, the rows are nodes of draft trees, and no mask is built for them; give the model their positions along:
    `position_ids = topology.position_ids(context_lens)`.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    return NAME


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **options,
) -> tuple[torch.Tensor, None]:
    """Query [batch, heads, rows, dim], key and value [batch, kv_heads, slots, dim], as transformers calls it."""
    view, rows, slots = options.pop("specdec", None), query.shape[2], key.shape[2]
    capped = options.get("softcap") is not None or options.get("s_aux") is not None
    is_prompt = rows > _MOST_ROWS and not capped
    if view is None and (attention_mask is not None or is_prompt or dropout or query.requires_grad):
        plain = _own_of(module) if capped else _pytorch()
        mask = _added(attention_mask, query.dtype) if capped else attention_mask
        return plain(module, query, key, value, mask, scaling=scaling, dropout=dropout, **options), None
    attend = functools.partial(
        tree_attention,
        scale=scaling,
        window=options.get("sliding_window"),
        softcap=options.get("softcap"),
        sinks=_sinks(options.get("s_aux")),
    )
    q, k, v = (states.transpose(1, 2) for states in (query, key, value))
    if view is not None:
        return attend(q, k, v, view.topology, view.context_lens), None
    parts = []
    for start in range(0, rows, MAX_NODES):
        part = q[:, start : start + MAX_NODES]
        parts.append(attend(part, k, v, _chain(part.shape[1], query.device), slots - rows + start))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1), None


def _pytorch():
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return lambda *arguments, **options: sdpa_attention_forward(*arguments, **options)[0]


def _own_of(module: torch.nn.Module):
    """The model's own attention, which has soft caps and sinks."""
    own = sys.modules[type(module).__module__].eager_attention_forward
    return lambda *arguments, **options: own(*arguments, **options)[0]


def _added(mask: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """A boolean mask as numbers to be added to scores."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)


def _sinks(given: torch.Tensor | None) -> torch.Tensor | None:
    return None if given is None else given.detach().float()


@functools.lru_cache(maxsize=256)
def _chain(rows: int, device: torch.device) -> Topology:
    return Tree.chain(rows).to(device)
