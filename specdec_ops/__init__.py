"""Kernels for speculative decoding of large language models, behind plain PyTorch functions.

Topology: the shape of a draft
    Tree                 a draft tree on the host: constructors, paths, mask, positions, free slicing
    Topology             the trees of a batch as device tensors, as every op takes them; made by `Tree.to`
    build_topology       makes a Topology on the device from parents that change every step
    grow_tree            takes a draft's candidates level by level, and chooses what it runs next (EAGLE-2)
    prune_tree           keeps the best candidates of all levels: the tree that the target judges
    CandidatePool        the candidates of a round and the draft's own tree, on the device; sizes are fixed
    Frontier             what grow_tree returns
    PrunedTree           what prune_tree returns
    published_trees      the trees of papers (MCSD, improved MCSD, Medusa, EAGLE) by name
    VocabMap             which target token each entry of a reduced draft vocabulary is

Attention:
    tree_attention       attention of tree nodes over dense or paged K and V, or of any rows over a context alone
    merge_states         merges attention results over different slots, by their log-sum-exps
    AttentionState       an output with its log-sum-exp

Acceptance: which drafted tokens to keep, and what comes next
    greedy_accept        exact greedy decoding through a tree
    match_accept         exactly what sampling without a draft would give, token for token
    chain_accept         lossless speculative sampling of a chain, by token or by block
    tree_accept          lossless speculative sampling of a tree: recursive, traversal, target_only, kseq
    typical_accept       Medusa's typical acceptance; lossy
    longest_path_accept  improved MCSD's longest accepted path of a forest; lossy
    sample_tokens        samples from the target, one token per row or several different ones
    sample_children      samples the children of draft nodes, with what acceptance needs to know of them
    Acceptance           what the accept functions return: tokens, nodes, counts, status
    LongestPath          what longest_path_accept returns
    Children             what sample_children returns

Early exit: at which layer a draft may stop, and when to stop drafting
    exit_confidence      RMSNorm, LM head and statistics of its softmax in one pass; no logits in memory
    early_exit           which rows are confident enough to exit, and the others in their order
    exit_mlp             scores rows with a small decision model
    exit_features        the 11 inputs of the 11-44-1 decision model
    entropy_stop         AdaEDL's rule for when to stop drafting
    AdaptiveThreshold    Draft & Verify's threshold, which follows how much is accepted
    quantize_head        makes the int8 copy of an LM head
    bound_head           makes the bounds that let `early_exit` read a part of the head only
    Confidence           what exit_confidence returns
    Exit                 what early_exit returns
    QuantizedHead        what quantize_head returns
    HeadBounds           what bound_head returns

Keys and values
    LayerCache           K, V and pending rows of a draft whose tokens exit at different layers, or a plain cache
    kv_append            K and V of new rows: normalised, rotated and stored, with their queries
    Rope                 the cosines and sines of rotary embedding, as a model's configuration says
    gather_layer_kv      K and V of all layers at some slots, as rows for layer self-attention
    kv_commit            the rows of accepted nodes moved to the end of the context, in all layers
    kv_propagate         K and V of skipped layers from the row at which a token exited

Linear: products of few rows
    linear               a weight times few rows at one read of it, with the norm before and the activation after
    rms_norm             the norm of rows where no product follows that could take it along
    Linear               linear as a module, made of torch.nn.Linear or of several
    quantize_linear      makes the int8 copy of a weight
    QuantizedWeight      what quantize_linear returns
    GgufWeight           a weight in the blocks of a GGUF file

Everything
    backends             which backends work for an op on a device, and why the others do not
    AcceptStatus         the bits of Acceptance.status, LongestPath.status and Children.status
    ExitStatus           the bits of Confidence.status
    GrowStatus           the bits of CandidatePool.status
    TopologyStatus       the bits of Topology.status

`help(specdec_ops.tree_attention)` has an op's shapes, dtypes, options and errors. `specdec_ops.dlpack` has the ops for
NumPy, CuPy and JAX, `specdec_ops.compat` those of sgl-kernel, FlashInfer and vLLM under their own signatures.

Importing this package initialises no GPU, imports no Triton and loads no compiled code: each backend is loaded when an
op first needs it.
"""

from pathlib import Path

__version__ = "0.1.0"

# In a source checkout the Triton kernels lie beside this folder. Installed, they are the subpackage
# specdec_ops.triton_kernels. They are never a top-level `triton_kernels`: that name belongs to another project.
_folder = Path(__file__).parent
if not (_folder / "triton_kernels").is_dir() and (_folder.parent / "triton_kernels").is_dir():
    __path__.append(str(_folder.parent))
del _folder, Path

# "as" marks what is public, for type checkers. There is no __all__: with one, help() would print the whole help of
# every name behind the index above.
from . import published_trees as published_trees
from ._core.dispatch import backends as backends
from .layer_cache import LayerCache as LayerCache
from .ops.acceptance.accept import Acceptance as Acceptance
from .ops.acceptance.accept import chain_accept as chain_accept
from .ops.acceptance.accept import greedy_accept as greedy_accept
from .ops.acceptance.accept import match_accept as match_accept
from .ops.acceptance.accept import tree_accept as tree_accept
from .ops.acceptance.accept_lossy import LongestPath as LongestPath
from .ops.acceptance.accept_lossy import longest_path_accept as longest_path_accept
from .ops.acceptance.accept_lossy import typical_accept as typical_accept
from .ops.acceptance.sample import Children as Children
from .ops.acceptance.sample import sample_children as sample_children
from .ops.acceptance.sample import sample_tokens as sample_tokens
from .ops.attention.merge_states import merge_states as merge_states
from .ops.attention.tree_attention import AttentionState as AttentionState
from .ops.attention.tree_attention import tree_attention as tree_attention
from .ops.early_exit.early_exit import Exit as Exit
from .ops.early_exit.early_exit import early_exit as early_exit
from .ops.early_exit.exit_confidence import Confidence as Confidence
from .ops.early_exit.exit_confidence import exit_confidence as exit_confidence
from .ops.early_exit.exit_mlp import AdaptiveThreshold as AdaptiveThreshold
from .ops.early_exit.exit_mlp import entropy_stop as entropy_stop
from .ops.early_exit.exit_mlp import exit_features as exit_features
from .ops.early_exit.exit_mlp import exit_mlp as exit_mlp
from .ops.early_exit.head_bounds import HeadBounds as HeadBounds
from .ops.early_exit.head_bounds import bound_head as bound_head
from .ops.early_exit.quantized_head import QuantizedHead as QuantizedHead
from .ops.early_exit.quantized_head import quantize_head as quantize_head
from .ops.kv.gather_layer_kv import gather_layer_kv as gather_layer_kv
from .ops.kv.kv_append import kv_append as kv_append
from .ops.kv.kv_commit import kv_commit as kv_commit
from .ops.kv.kv_propagate import kv_propagate as kv_propagate
from .ops.linear.gguf_weight import GgufWeight as GgufWeight
from .ops.linear.linear import linear as linear
from .ops.linear.module import Linear as Linear
from .ops.linear.quantized_weight import QuantizedWeight as QuantizedWeight
from .ops.linear.quantized_weight import quantize_linear as quantize_linear
from .ops.linear.rms_norm import rms_norm as rms_norm
from .ops.topology.candidate_pool import CandidatePool as CandidatePool
from .ops.topology.grow_tree import Frontier as Frontier
from .ops.topology.grow_tree import grow_tree as grow_tree
from .ops.topology.prune_tree import PrunedTree as PrunedTree
from .ops.topology.prune_tree import prune_tree as prune_tree
from .rope import Rope as Rope
from .status import AcceptStatus as AcceptStatus
from .status import ExitStatus as ExitStatus
from .status import GrowStatus as GrowStatus
from .status import TopologyStatus as TopologyStatus
from .topology import Topology as Topology
from .topology import build_topology as build_topology
from .tree import Tree as Tree
from .vocab_map import VocabMap as VocabMap
