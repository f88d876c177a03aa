"""Our attention alone in any Hugging Face model and any loop: an entry of `AttentionInterface`."""

from __future__ import annotations

import functools
import sys
from typing import NamedTuple

import torch

from specdec_ops.ops.attention.tree_attention import tree_attention
from specdec_ops.topology import Topology
from specdec_ops.tree import Tree

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
    """Make the name known to transformers. Returns it: `model.set_attn_implementation(register())`.

    Passes of up to 64 rows without padding run on `tree_attention`, over the model's own cache as it lies. Padded
    batches, and prompts, which have more rows, run on PyTorch's attention as before (on the model's own where scores
    are capped or there are sinks). With the keyword `specdec`, a `TreeView`, the rows are nodes of draft trees, and no
    mask is built for them; give the model their positions along with it:
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
    if view is None and (attention_mask is not None or rows > _MOST_ROWS or dropout or query.requires_grad):
        plain = _plain(module, options)
        return plain(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **options)
    if view is None:
        view = TreeView(_chain(rows, query.device), slots - rows)
    attended = tree_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        view.topology,
        view.context_lens,
        scale=scaling,
        window=options.get("sliding_window"),
        softcap=options.get("softcap"),
        sinks=_sinks(options.get("s_aux")),
    )
    return attended, None


def _plain(module: torch.nn.Module, options: dict):
    """PyTorch's attention, or the model's own where that lacks what the model has."""
    if options.get("softcap") is not None or options.get("s_aux") is not None:
        return sys.modules[type(module).__module__].eager_attention_forward
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return sdpa_attention_forward


def _sinks(given: torch.Tensor | None) -> torch.Tensor | None:
    return None if given is None else given.detach().float()


@functools.lru_cache(maxsize=256)
def _chain(rows: int, device: torch.device) -> Topology:
    return Tree.chain(rows).to(device)
