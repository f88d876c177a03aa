"""The acceptance kernel and its launch: one program per request, one launch per call, whatever the rule.

Scratch is one bit per token of the vocabulary and 96 bytes per node for each request. Nothing of it is read before the
kernel has written it. Launches depend on shapes alone: nothing syncs, and the call can be captured in a CUDA graph.

The kernel takes plain tuples, which cost a launch no more than single arguments, and makes named ones of them, which
cost nothing there. Numbers that change from call to call are in no tuple: Triton compiles a kernel anew for a number
that is 1 or a multiple of 16, and members of tuples can't be exempt from that.
"""

import torch
import triton
import triton.language as tl
from specdec_ops.triton_kernels.common.launch import batch_stride, on
from specdec_ops.triton_kernels.common.token_rows import Sampling, request_sampling, request_seed, request_setting

from . import sample
from .accept_kernels import accept_walk
from .accept_lossy_kernels import accept_lossy
from .accept_state import (
    GREEDY,
    LONGEST,
    NODE_WORDS,
    RECURSIVE,
    TARGET_ONLY,
    TRAVERSAL,
    TREE_INVALID,
    TYPICAL,
    UNCLAIMED,
    Model,
    Outputs,
    Request,
    Tree,
    fill,
)
from .accept_traversal_kernel import accept_traversal

RULES = ("greedy", "match", "recursive", "traversal", "target_only", "kseq", "typical", "longest")  # by their numbers
MAX_EOS = 8

# No recompilation for values of these that happen to be 1 or a multiple of 16. The sizes and strides of rows are not
# among them: loads of 16 bytes need to know that rows are aligned.
VOLATILE = [
    "token_batch_stride", "token_stride", "first_batch_stride", "next_batch_stride", "num_nodes_stride",
    "scratch_stride", "columns", "max_depth", "width", "top_k", "draft_top_k", "seed_low", "seed_high", "position",
    "eos0", "eos1", "eos2", "eos3", "eos4", "eos5", "eos6", "eos7",
]  # fmt: skip


@triton.jit(do_not_specialize=VOLATILE)
def accept_kernel(
    target, draft, tree, settings, draft_settings, noise, outputs, scratch, thresholds,
    token_batch_stride, token_stride, first_batch_stride, next_batch_stride, num_nodes_stride, scratch_stride, columns,
    max_depth, width, top_k, draft_top_k, seed_low, seed_high, position, eos0, eos1, eos2, eos3, eos4, eos5, eos6, eos7,
    RULE: tl.constexpr, IDS: tl.constexpr, REPLACEMENT: tl.constexpr, CHILD_ROWS: tl.constexpr, FILTER: tl.constexpr,
    DRAFT_FILTER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid: (batch,). The tuples hold what accept has under these names.

    target            target, its strides by request and node, vocab
    draft             draft_logits, its strides by request and node, draft_vocab, target_to_draft
    tree              draft_tokens, first_child, next_sibling, num_nodes
    settings          temperature, temperatures, top_ks, top_p, top_ps of the target, draft_settings those of the draft
    noise             seeds, positions
    outputs           tokens, nodes, num_accepted, next_tokens, status, finished
    thresholds        a pair of numbers

    scratch int32 holds for each request a bit per token of the vocabulary, then NODE_WORDS per node; None with IDS.
    """
    index = tl.program_id(0).to(tl.int64)
    logits, batch_stride, node_stride, size = target
    logits += index * batch_stride
    tokens, first_child, next_sibling, num_nodes = tree
    tokens += index * token_batch_stride
    if first_child is not None:
        first_child += index * first_batch_stride
        next_sibling += index * next_batch_stride
    else:
        tokens -= token_stride  # a chain has no column for node 0
    given = tl.load(num_nodes + index * num_nodes_stride)
    count = tl.minimum(tl.maximum(given, 1), columns)
    bits = tl.where(count == given, 0, TREE_INVALID)
    seeds, positions = noise
    seed = request_seed(seeds, seed_low, seed_high, index)
    position = request_setting(position, positions, index)

    draft_logits, draft_batch_stride, draft_node_stride, draft_size, ids_of_target = draft
    if draft_logits is not None:
        draft_logits += index * draft_batch_stride
    sampling, wrong = request_sampling(settings, top_k, index)
    draft_sampling, wrong_for_draft = request_sampling(draft_settings, draft_top_k, index)
    weighted = (sampling.temperature > 0.0) & (draft_logits is not None)
    bits |= wrong | tl.where(weighted, wrong_for_draft, 0)
    if RULE == GREEDY:
        sampling = Sampling(0.0, sampling.top_k, sampling.top_p)

    state = scratch
    excluded = None
    if not IDS:
        words = (size + 31) // 32
        state += index * scratch_stride
        if (RULE == RECURSIVE) | (RULE == TARGET_ONLY) | (RULE == TRAVERSAL):
            excluded = state
            fill(excluded, words, 0, BLOCK)
            state += words
        if (RULE == TRAVERSAL) | (RULE == TYPICAL) | (RULE == LONGEST):
            fill(state, columns * NODE_WORDS, UNCLAIMED, BLOCK)

    tokens_out, nodes_out, num_accepted, next_tokens, status, finished = outputs
    request = Request(
        index,
        Model(logits, node_stride, size, sampling, None),
        Model(draft_logits, draft_node_stride, draft_size, draft_sampling, ids_of_target),
        weighted,
        Tree(tokens, token_stride, first_child, next_sibling, count, columns, max_depth),
        seed,
        position,
        (eos0, eos1, eos2, eos3, eos4, eos5, eos6, eos7),
        state,
        excluded,
        thresholds,
        Outputs(tokens_out, nodes_out, num_accepted, next_tokens, status, finished, width),
    )
    if RULE == TRAVERSAL:
        accept_traversal(request, bits, REPLACEMENT, CHILD_ROWS, FILTER, DRAFT_FILTER, BLOCK)
    elif (RULE == TYPICAL) | (RULE == LONGEST):
        accept_lossy(request, bits, RULE, FILTER, DRAFT_FILTER, BLOCK)
    else:
        accept_walk(request, bits, RULE, IDS, REPLACEMENT, CHILD_ROWS, FILTER, DRAFT_FILTER, BLOCK)


def accept(arguments, outputs) -> None:
    """Accept drafted tokens by one of RULES, on checked arguments; reference_accept.py defines the result.

    What the arguments and outputs are is told in specdec_ops/ops/acceptance/contract.py.
    """
    rule, target, draft_tokens, first_child = (
        arguments.rule, arguments.target, arguments.draft_tokens, arguments.first_child
    )  # fmt: skip
    top_k, top_p, draft_top_k, draft_top_p = (
        arguments.top_k, arguments.top_p, arguments.draft_top_k, arguments.draft_top_p
    )  # fmt: skip
    tokens, next_tokens = outputs.tokens, outputs.next_tokens
    batch, depths = tokens.shape
    ids = target.dim() == 2
    columns, size = target.shape[1], 2**31 - 1 if ids else target.shape[2]
    block, words, scratch = 64, 0, None
    if not ids:
        block, words = sample.block_of(size), (size + 31) // 32 + columns * NODE_WORDS.value
        scratch = torch.empty((batch, words), dtype=torch.int32, device=target.device)
    a, rows = arguments, arguments.draft_logits
    draft = (None, 0, 0, 0, None)
    if rows is not None and rule not in ("greedy", "match", "target_only", "typical"):
        draft = (rows, *rows.stride()[:2], rows.shape[2], a.target_to_draft)
    seed_low, seed_high = sample.seed_words(a.seed or 0)
    with on(target.device):
        accept_kernel[(batch,)](
            (target, *target.stride()[:2], size),
            draft,
            (draft_tokens, first_child, a.next_sibling, a.num_nodes),
            (a.temperature, a.temperatures, a.top_ks, top_p, a.top_ps),
            (a.draft_temperature, a.draft_temperatures, a.draft_top_ks, draft_top_p, a.draft_top_ps),
            (a.seeds, a.positions),
            (tokens, outputs.nodes, outputs.num_accepted, next_tokens, outputs.status,
             outputs.finished.view(torch.int8)),
            scratch, tuple(a.thresholds), *draft_tokens.stride(), batch_stride(first_child),
            batch_stride(a.next_sibling), batch_stride(a.num_nodes), words, columns, depths - 1,
            next_tokens.numel() // batch, top_k, draft_top_k, seed_low, seed_high, a.position or 0, *a.eos,
            *[-1] * (MAX_EOS - len(a.eos)), RULE=RULES.index(rule), IDS=ids, REPLACEMENT=a.replacement,
            CHILD_ROWS=a.child_rows, FILTER=sample.filters(top_k, a.top_ks, top_p, a.top_ps),
            DRAFT_FILTER=sample.filters(draft_top_k, a.draft_top_ks, draft_top_p, a.draft_top_ps), BLOCK=block,
            num_warps=sample.warps_of(block),
        )  # fmt: skip
