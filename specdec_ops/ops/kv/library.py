"""kv_propagate as a torch.library operator that writes to its last two arguments; see specdec_ops._core.library."""

import torch

from specdec_ops._core import dispatch
from specdec_ops._core.library import _LIBRARY, short_cut

_SCHEMA = (
    "kv_propagate(Tensor hidden, Tensor[] norm_weights, Tensor[] k_weights, Tensor[] v_weights, float norm_eps, "
    "Tensor? cosines, Tensor? sines, bool interleaved, Tensor? requests, Tensor slots, Tensor? page_table, "
    "Tensor(a!)[] k_caches, Tensor(b!)[] v_caches, str backend) -> ()"
)


def kv_propagate(*arguments) -> None:
    """Checked arguments in, in the order of the schema."""
    hidden, norms, keys, values, _, cosines, sines, _, requests, slots, page_table, k_caches, v_caches, _ = arguments
    lists = (*norms, *keys, *values, *k_caches, *v_caches)
    if short_cut(hidden, cosines, sines, requests, slots, page_table, *lists):
        _run(*arguments)
    else:
        torch.ops.specdec_ops.kv_propagate(*arguments)


def _run(hidden, *others) -> None:
    *arguments, backend = others
    implementation = dispatch.resolve("kv_propagate", backend, hidden)
    if len(hidden):
        implementation(hidden, *arguments)


_LIBRARY.define(_SCHEMA, tags=(torch.Tag.needs_fixed_stride_order,))
for _key in ("CPU", "CUDA"):
    _LIBRARY.impl("kv_propagate", _run, _key)
torch.library.register_fake("specdec_ops::kv_propagate", lambda *_: None, lib=_LIBRARY)
