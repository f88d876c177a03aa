"""Attention of a draft tree over a key/value cache, checked against the definition.

python examples/tree_attention.py
"""

import torch

import specdec_ops
from specdec_ops import Tree, tree_attention

device = "cuda" if torch.cuda.is_available() else "cpu"
tree = Tree.from_branching((3, 2, 1), root=True)  # node 0 is the last committed token
print(tree)

batch, slots, heads, kv_heads, dim = 2, 256, 32, 8, 128  # the heads of Llama-3-8B
context_lens = torch.tensor([200, 77], dtype=torch.int32, device=device)
q = torch.randn(batch, len(tree), heads, dim, dtype=torch.bfloat16, device=device)
k_cache = torch.randn(batch, slots, kv_heads, dim, dtype=torch.bfloat16, device=device)
v_cache = torch.randn_like(k_cache)

topology = tree.to(device)  # made once, used by every layer and every request
out = tree_attention(q, k_cache, v_cache, topology, context_lens)

exact = tree_attention(q.double(), k_cache.double(), v_cache.double(), topology, context_lens, backend="torch")
error = (out - exact).abs().max().item()
print(f"{list(out.shape)} {out.dtype}, largest difference from the float64 definition: {error:.1e}")
print("backends:", {name: reason or "yes" for name, reason in specdec_ops.backends("tree_attention", device).items()})
assert error < 1e-2
