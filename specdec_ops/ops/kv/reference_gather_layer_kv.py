"""The definition of gather_layer_kv."""

import torch

from .contract import layers_of
from .reference_kv_commit import bits_of_layer, table_of_layer
from .reference_kv_propagate import places_of


def gather_layer_kv(arguments, outputs) -> None:
    """Write for each slot K and V of every layer, one kv head after the other; zeros where there is no such slot.

    The arguments and outputs: specdec_ops/ops/kv/contract.py.
    """
    out = outputs.out.view(bits_of_layer(arguments.k_caches, 0).dtype)
    for layer in range(layers_of(arguments)):
        table = table_of_layer(arguments, layer)
        k, v = (bits_of_layer(caches, layer) for caches in (arguments.k_caches, arguments.v_caches))
        stored, places = places_of(arguments.requests, arguments.slots, table, k)
        rows = torch.zeros(len(stored), k.shape[2], k.shape[3] + v.shape[3], dtype=k.dtype, device=k.device)
        rows[stored] = torch.cat([k[places], v[places]], dim=-1)
        out[:, layer] = rows.flatten(1)
