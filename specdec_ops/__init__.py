"""Handwritten kernels for speculative decoding, behind plain PyTorch functions.

Importing this package initialises no GPU, imports no Triton and loads no compiled code: each backend is loaded when an
op first needs it. `backends(op, device)` says which ones are available here, and why the others are not.
"""

from pathlib import Path

__version__ = "0.1.0"

# In a source checkout the Triton kernels lie beside this folder. Installed, they are the subpackage
# specdec_ops.triton_kernels. They are never a top-level `triton_kernels`: that name belongs to another project.
_folder = Path(__file__).parent
if not (_folder / "triton_kernels").is_dir() and (_folder.parent / "triton_kernels").is_dir():
    __path__.append(str(_folder.parent))
del _folder, Path

from . import published_trees  # noqa: E402
from ._core.dispatch import backends  # noqa: E402
from .layer_cache import LayerCache  # noqa: E402
from .ops.acceptance.accept import Acceptance, chain_accept, greedy_accept, match_accept, tree_accept  # noqa: E402
from .ops.acceptance.accept_lossy import LongestPath, longest_path_accept, typical_accept  # noqa: E402
from .ops.acceptance.sample import Children, sample_children, sample_tokens  # noqa: E402
from .ops.attention.tree_attention import AttentionState, merge_states, tree_attention  # noqa: E402
from .ops.early_exit.exit_confidence import Confidence, Exit, early_exit, exit_confidence  # noqa: E402
from .ops.early_exit.exit_mlp import AdaptiveThreshold, entropy_stop, exit_features, exit_mlp  # noqa: E402
from .ops.early_exit.head_bounds import HeadBounds, bound_head  # noqa: E402
from .ops.early_exit.quantized_head import QuantizedHead, quantize_head  # noqa: E402
from .ops.kv.kv_propagate import kv_propagate  # noqa: E402
from .status import AcceptStatus, ExitStatus, TopologyStatus  # noqa: E402
from .topology import Topology, build_topology  # noqa: E402
from .tree import Tree  # noqa: E402
from .vocab_map import VocabMap  # noqa: E402

__all__ = [
    "AcceptStatus",
    "Acceptance",
    "AdaptiveThreshold",
    "AttentionState",
    "Children",
    "Confidence",
    "Exit",
    "ExitStatus",
    "HeadBounds",
    "LayerCache",
    "LongestPath",
    "QuantizedHead",
    "Topology",
    "TopologyStatus",
    "Tree",
    "VocabMap",
    "__version__",
    "backends",
    "bound_head",
    "build_topology",
    "chain_accept",
    "early_exit",
    "entropy_stop",
    "exit_confidence",
    "exit_features",
    "exit_mlp",
    "greedy_accept",
    "kv_propagate",
    "longest_path_accept",
    "match_accept",
    "merge_states",
    "published_trees",
    "quantize_head",
    "sample_children",
    "sample_tokens",
    "tree_accept",
    "tree_attention",
    "typical_accept",
]
