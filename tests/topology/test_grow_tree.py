"""grow_tree and prune_tree against plain loops and EAGLE's own algorithm, and their edge cases."""

import copy
import functools
import math

import pytest
import torch

import specdec_ops
from specdec_ops import (
    CandidatePool,
    GrowStatus,
    Tree,
    VocabMap,
    exit_confidence,
    greedy_accept,
    grow_tree,
    prune_tree,
    sample_children,
    tree_accept,
    tree_attention,
)
from tests.conftest import targets
from tests.emulator import kernels
from tests.topology.grow_cases import (
    CPU,
    NONE,
    TORCH,
    Round,
    assert_round,
    assert_tables,
    eagle_tree,
    expected_pool,
    grown,
    pruned,
    random_round,
    tables_of,
)

OP = "grow_tree"
# (batch, levels, width, branching): widths below, at and above what a level has; more than a word of nodes; one level.
SHAPES = ((1, 6, 8, 8), (3, 4, 10, 10), (2, 3, 5, 2), (2, 3, 2, 9), (2, 12, 7, 3), (1, 1, 4, 6), (2, 5, 1, 1))
NAN, INF = math.nan, math.inf


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_plain_loops(shape, target):
    case = random_round(*shape, vocab=50)
    for nodes in (1, 2, 1 + case.branching, 61):
        assert_round(case, target, nodes)


def test_large_sizes(target):
    """Two words of ancestors and more, and a level of more candidates than a block has threads."""
    case = random_round(1, 3, 40, 4, vocab=300) if target.interpreted else random_round(2, 4, 40, 20, vocab=300)
    assert_round(case, target, 130)


def test_the_largest_width_and_branching(target):
    case = random_round(1, 3, 256, 64 if not target.interpreted else 4, vocab=80)
    if target.interpreted:
        case = random_round(1, 3, 64, 16, vocab=80)
    assert_round(case, target, 300)


def test_a_pool_of_several_blocks_with_few_different_scores(target):
    """Equals at the cut, across warps and blocks of threads: the lower index stays."""
    generator = torch.Generator().manual_seed(3)
    case = random_round(1, 3, 16, 8, vocab=40) if target.interpreted else random_round(3, 5, 16, 16, vocab=40)
    for _, logprobs in case.levels:
        logprobs.copy_(-torch.randint(1, 3, logprobs.shape, generator=generator) / 2)
    for nodes in (17, 150, 400):
        assert_round(case, target, nodes)


def path_model(seed, vocab=40, sharpness=2.0):
    """log_probs_of(path): what a draft says after a path, the same whenever it is asked."""

    @functools.cache
    def log_probs_of(path):
        generator = torch.Generator().manual_seed(hash((seed, *path)) % 2**60)
        values = (sharpness * torch.randn(vocab, generator=generator)).log_softmax(0)
        return dict(enumerate(values.tolist()))

    return log_probs_of


def grow_by_path(models, roots, levels, width, branching, target, **options):
    """The pool of a draft that follows the frontier, as engines do: the paths of each row are told by parent_rows."""
    pool = CandidatePool.empty(len(models), levels=levels, width=width, branching=branching, device=target.device)
    paths = [[(root,)] for root in roots]
    for level in range(levels):
        rows = 1 if level == 0 else width
        tokens = torch.full((len(models), rows, branching), -1, dtype=torch.int32)
        logprobs = torch.full((len(models), rows, branching), NAN)
        for request, model in enumerate(models):
            for row, path in enumerate(paths[request]):
                if path is None:
                    continue
                top = sorted(model(path).items(), key=lambda item: -item[1])[:branching]
                tokens[request, row] = torch.tensor([token for token, _ in top])
                logprobs[request, row] = torch.tensor([value for _, value in top])
        frontier = grow_tree(
            pool, tokens.to(target.device), logprobs.to(target.device), level=level, **options, backend=target.backend
        )
        extended = zip(paths, frontier.tokens.tolist(), frontier.parent_rows.tolist(), strict=True)
        paths = [
            [(*own[row], token) if token >= 0 else None for token, row in zip(new, rows_of, strict=True)]
            for own, new, rows_of in extended
        ]
    assert pool.status.tolist() == [0] * len(models)
    return pool


@pytest.mark.parametrize(("depth", "top_k", "total"), [(5, 8, 59), (7, 10, 59), (3, 4, 30), (2, 2, 5)])
def test_equals_eagles_own_algorithm(depth, top_k, total, target):
    """On drafts without equal scores, for several requests at once."""
    if target.interpreted and depth > 5:
        depth = 4
    models = [path_model(seed) for seed in range(1 if target.interpreted else 3)]
    roots = [7 + seed for seed in range(len(models))]
    pool = grow_by_path(models, roots, depth + 1, top_k, top_k, target)
    tree = prune_tree(pool, total + 1, root_tokens=torch.tensor(roots, device=target.device), backend=target.backend)
    for request, model in enumerate(models):
        tokens, parents = eagle_tree(model, roots[request], depth, top_k, total)
        assert tree.tokens[request].tolist() == tokens
        assert tree.topology.parents[request].tolist() == parents
        scores = pool.scores[request][pool.scores[request] > NONE]
        assert len(scores.unique()) == len(scores)  # so the comparison says something


def test_logprobs_above_0_count_as_0(target):
    """Rounding of a log-softmax may give them. A child would have passed its parent."""
    case = random_round(2, 3, 4, 4, vocab=20)
    for _, logprobs in case.levels:
        logprobs[:, :, 0] = 1e-7
    pool, _ = assert_round(case, target, 9)
    assert pool.scores.max() == 0
    scores, parents = pool.scores.cpu(), pool.parents.cpu()
    above = scores.gather(1, parents.clamp(min=0).long())
    assert (scores <= torch.where(parents >= 0, above, 0)).all()


ODD = {
    "NaN": (7, NAN, GrowStatus.LOGPROB_INVALID),
    "+inf": (7, INF, GrowStatus.LOGPROB_INVALID),
    "-inf": (7, -INF, 0),
    "padding": (-1, -0.1, 0),
    "padding beside NaN": (-1, NAN, 0),
    "negative": (-2, -0.1, GrowStatus.TOKEN_OUT_OF_RANGE),
    "smallest": (-(2**31), -0.1, GrowStatus.TOKEN_OUT_OF_RANGE),
    "negative and NaN": (-7, NAN, GrowStatus.TOKEN_OUT_OF_RANGE),
}


@pytest.mark.parametrize("odd", ODD)
def test_odd_candidates_are_none_and_spare_their_neighbours(odd, target):
    token, logprob, bits = ODD[odd]
    sound = random_round(3, 4, 4, 4, vocab=30)
    case = copy.deepcopy(sound)
    for level, place in ((0, (1, 0, 0)), (1, (1, 2, 1)), (3, (1, 0, 3))):
        case.levels[level][0][place], case.levels[level][1][place] = token, logprob
    pool, _ = assert_round(case, target, 20)
    assert pool.status.tolist() == [0, bits, 0]
    alone, _ = grown(sound, target)
    for name, table in tables_of(pool).items():
        assert torch.equal(table[[0, 2]], tables_of(alone)[name][[0, 2]]), name


def test_whole_rows_of_nothing(target):
    """Requests that have no candidate at level 0, none from level 1 on, fewer than the width at level 2."""
    case = random_round(4, 4, 4, 4, vocab=30)
    case.levels[0][1][0] = NAN
    case.levels[1][1][1] = -INF
    case.levels[2][0][2] = -1
    case.levels[2][0][2, 1, 2] = 5
    pool, tree = assert_round(case, target, 30)
    assert pool.topology.num_nodes.tolist() == [1, 5, 10, 13]
    assert tree.topology.num_nodes.tolist()[:2] == [1, 5]
    assert pool.status.tolist() == [GrowStatus.LOGPROB_INVALID, 0, 0, 0]


def test_scores_below_float32_are_none(target):
    case = random_round(1, 3, 2, 2, vocab=30)
    for _, logprobs in case.levels:
        logprobs[:, :, 1] = -3e38
    assert_round(case, target, 9)


def test_rows_behind_padding_are_not_looked_at(target):
    case = random_round(2, 3, 4, 4, vocab=30)
    case.levels[0][1][0, 0, 2:] = -INF  # rows 2 and 3 of level 1 follow nothing
    expected, _ = grown(case, target)
    for junk in ((3, 0.0), (-5, NAN), (2**31 - 1, INF)):
        case.levels[1][0][0, 2:], case.levels[1][1][0, 2:] = junk
        pool, _ = grown(case, target)
        assert_tables(tables_of(pool), tables_of(expected))
        assert pool.status.tolist() == [0, 0]


def test_ends_of_text_stay_and_are_not_expanded(target):
    case = random_round(3, 4, 4, 4, vocab=12, eos=(3, 5))
    pool, tree = assert_round(case, target, 30, eos=(3, 5))
    tokens, expanded = pool.tokens.cpu(), pool.expanded.cpu()
    ends = (tokens == 3) | (tokens == 5)
    assert ends.any()
    assert (expanded[ends] == -1).all()
    assert ((tree.tokens == 3) | (tree.tokens == 5)).any()
    case.options["eos"] = 3
    assert_round(case, target, 30, eos=(3,))


def test_nothing_but_ends_of_text(target):
    case = random_round(1, 3, 2, 2, vocab=30)
    case.levels[0][0].copy_(torch.tensor([[[4, 9]]]))
    case.options["eos"] = [9, 4]
    pool, tree = assert_round(case, target, 30, eos=(9, 4))
    assert pool.topology.num_nodes.tolist() == [1]
    assert tree.tokens.tolist()[0][:3] == [500, 4, 9]


def test_vocab_map(target):
    """Draft entries become target ids, before eos is looked for; entries that don't exist are none."""
    ids = [(7 * entry) % 200 for entry in range(30)]
    case = random_round(2, 3, 4, 4, vocab=30, eos=ids[3], vocab_map=VocabMap(ids, 200).to(target.device))
    case.levels[1][0][1, 0, 0] = 30
    case.levels[2][0][1, 1, 1] = 2**31 - 1
    pool, _ = assert_round(case, target, 30, eos=(ids[3],), draft_to_target=ids)
    assert pool.status.tolist() == [0, GrowStatus.TOKEN_OUT_OF_RANGE]
    assert set(pool.tokens.unique().tolist()) <= {-1, *ids}


def test_requests_that_no_longer_draft(target):
    """Request 0 stops before level 2, request 1 before level 0; their rows may hold anything then."""
    case = random_round(3, 4, 4, 4, vocab=30)
    pool = case.empty(target.device)
    stopped = copy.deepcopy(case)
    frontiers = []
    for level, (tokens, logprobs) in enumerate(stopped.levels):
        active = torch.tensor([level < 2, False, True])
        logprobs[~active], tokens[~active] = NAN, -9
        frontiers.append(
            grow_tree(
                pool, tokens.to(target.device), logprobs.to(target.device), level=level,
                active=active.to(target.device), backend=target.backend,
            )
        )  # fmt: skip
    for level, tokens in ((2, stopped.levels), (0, stopped.levels)):
        for part, _ in tokens[level:]:
            part[0 if level else 1] = -1
    assert_tables(tables_of(pool), expected_pool(stopped))
    assert pool.status.tolist() == [0, 0, 0]
    assert frontiers[1].tokens[0].min() >= 0
    assert frontiers[2].tokens[0].tolist() == [-1] * 4
    assert frontiers[0].tokens[1].tolist() == [-1] * 4


def test_a_round_may_end_early_and_a_pool_is_used_again(target):
    """Nothing is left of the round before."""
    long, short = random_round(2, 5, 4, 4, vocab=30), random_round(2, 5, 4, 4, vocab=30, seed=1)
    pool, _ = grown(long, target)
    pool.status.fill_(3)
    grown(short, target, pool, levels=2)
    assert_tables(tables_of(pool), expected_pool(short, levels=2))
    assert pool.status.tolist() == [0, 0]
    tree = pruned(pool, 50, target)
    assert tree.topology.num_nodes.tolist() == [21, 21]
    assert tree.topology.depths.max() == 2


def test_frontiers_of_other_widths(target):
    """A narrower level: the places of the others stay blank, and the next one has fewer rows."""
    case = random_round(2, 4, 6, 5, vocab=30)
    pool, widths = case.empty(target.device), (6, 2, 3, 0)
    rows = 1
    for level, ((tokens, logprobs), width) in enumerate(zip(case.levels, widths, strict=True)):
        given = [part[:, :rows].to(target.device) for part in (tokens, logprobs)]
        frontier = grow_tree(pool, *given, level=level, width=width, backend=target.backend)
        assert frontier.tokens.shape == (2, width)
        rows = width
    full, _ = grown(case, target)
    assert torch.equal(pool.candidates[:, :9], full.candidates[:, :9])
    assert (pool.candidates[:, 9:13] == -1).all()
    assert (pool.topology.ancestors[:, 9:13] == 0).all()
    assert (pool.topology.depths[:, 13:16] == 3).all()
    assert pool.topology.num_nodes.tolist() == [16, 16]
    assert pruned(pool, 70, target).topology.status.tolist() == [0, 0]


def test_levels_out_of_order_do_no_harm(target):
    """A level whose parents are not there has no candidates."""
    case = random_round(1, 4, 4, 4, vocab=30)
    pool = case.empty(target.device)
    for level in (0, 2, 3):
        tokens, logprobs = (part.to(target.device) for part in case.levels[level])
        frontier = grow_tree(pool, tokens, logprobs, level=level, backend=target.backend)
    assert frontier.tokens.shape == (1, 0)
    assert_tables(tables_of(pool), expected_pool(case, levels=1))


def test_a_request_depends_on_that_request_alone(target):
    case = random_round(5, 4, 6, 5, vocab=40, eos=2)
    case.levels[1][1][3] = NAN
    order = [3, 0, 4, 2, 1]
    pool, frontiers = grown(case, target)
    tree = pruned(pool, 25, target, 0)
    other_pool, other_frontiers = grown(case.requests(order), target)
    for name, table in tables_of(pool).items():
        assert torch.equal(table[order], tables_of(other_pool)[name]), name
    for one, other in zip(frontiers, other_frontiers, strict=True):
        assert torch.equal(one.scores[order], other.scores)
        assert torch.equal(one.parent_rows[order], other.parent_rows)
    assert torch.equal(tree.tokens[order, 1:], pruned(other_pool, 25, target, 0).tokens[:, 1:])
    alone, _ = grown(case.requests([4]), target)
    for name, table in tables_of(pool).items():
        assert torch.equal(table[[4]], tables_of(alone)[name]), name


@pytest.mark.parametrize("count", [1, 7])
def test_any_number_of_threads(count, threads):
    """Of a batch that is worth several."""
    threads(count)
    case = random_round(40, 4, 16, 16, vocab=40)
    pool, _ = grown(case, CPU)
    tree = pruned(pool, 60, CPU)
    wanted, _ = grown(case, TORCH)
    assert_tables(tables_of(pool), tables_of(wanted))
    assert torch.equal(tree.topology.ancestors, pruned(wanted, 60, TORCH).topology.ancestors)


def test_a_pool_that_someone_else_has_written_does_no_harm(target):
    """Parents that are nowhere are none."""
    case = random_round(4, 3, 4, 4, vocab=30)
    pool, _ = grown(case, target)
    pool.candidates.fill_(2**31 - 1)
    tokens, logprobs = (part.to(target.device) for part in case.levels[2])
    assert grow_tree(pool, tokens, logprobs, level=1, backend=target.backend).tokens.max() == -1


def test_empty_batches(target):
    case = random_round(0, 3, 4, 4)
    pool, frontiers = grown(case, target)
    assert frontiers[0].tokens.shape == (0, 4)
    tree = pruned(pool, 9, target)
    assert tree.tokens.shape == (0, 9)
    assert tree.topology.ancestors.shape == (0, 9, 1)


def test_inputs_may_be_views(target):
    case = random_round(2, 3, 4, 4, vocab=30)
    wide = [tuple(part.repeat_interleave(2, dim=2)[:, :, ::2] for part in level) for level in case.levels]
    pool, _ = grown(Round(wide, 4), target)
    assert_tables(tables_of(pool), expected_pool(case))


# What an engine does with it.


def test_the_drafts_attention_over_a_growing_tree():
    """Each level's rows see the context and their own path, on every backend; blank places are seen by nobody."""
    for backend in specdec_ops.backends("tree_attention", "cpu"):
        if specdec_ops.backends("tree_attention", "cpu")[backend] is None:
            check_attention(backend)


def check_attention(backend):
    width, dim, context_lens = 3, 16, torch.tensor([5, 0], dtype=torch.int32)
    case = random_round(2, 4, width, 2, vocab=30)  # level 0 has two candidates for three places
    case.levels[1][1][1] = -INF  # request 1 stops after level 0
    pool = case.empty()
    nodes = pool.topology.nodes
    generator = torch.Generator().manual_seed(0)
    k, v = torch.full((2, 2, 5 + nodes, 1, dim), NAN)
    k[0, :5], v[0, :5] = torch.randn(2, 5, 1, dim, generator=generator)
    keys, values, q = torch.randn(3, 2, nodes, 1, dim, generator=generator)
    for level in range(4):
        start, rows = pool.query_start(level), 1 if level == 0 else width
        own = slice(start, start + rows)
        there = pool.topology.ancestors[:, own].ne(0).any(-1)
        for request in range(2):  # what is not there is not even written
            for row in there[request].nonzero()[:, 0]:
                slot, node = int(context_lens[request]) + start + row, start + row
                k[request, slot], v[request, slot] = keys[request, node], values[request, node]
        out = tree_attention(
            q[:, own].contiguous(), k, v, pool.topology, context_lens, query_start=start, backend=backend
        )
        for request in range(2):
            for row in range(rows):
                path, candidate = [], start + row
                while there[request, row] and candidate >= 0:
                    path.insert(0, candidate)
                    candidate = int(pool.topology.parents[request, candidate])
                length = int(context_lens[request])
                seen_k = torch.cat([k[request, :length, 0], keys[request, path, 0]]).double()
                seen_v = torch.cat([v[request, :length, 0], values[request, path, 0]]).double()
                weights = (seen_k @ q[request, start + row, 0].double() / dim**0.5).softmax(0)
                if start + row < pool.topology.num_nodes[request] or there[request, row]:
                    torch.testing.assert_close(out[request, row, 0].double(), weights @ seen_v, rtol=1e-5, atol=1e-5)
        grow_tree(pool, *case.levels[level], level=level)


def tiny_model(vocab=30, dim=16, seed=0):
    """A language model of one attention layer, run over the nodes of a tree: hidden(tokens, positions, mask)."""
    generator = torch.Generator().manual_seed(seed)
    embedding, places = torch.randn(vocab, dim, generator=generator), torch.randn(64, dim, generator=generator)
    weights = torch.randn(3, dim, dim, generator=generator) * dim**-0.5
    head = torch.randn(vocab, dim, generator=generator)
    return embedding, places, weights, head


class Draft:
    """The tiny model with a cache in slots, over a topology: what an engine's draft does."""

    def __init__(self, batch, slots, model):
        self.embedding, self.places, (self.wq, self.wk, self.wv), self.head = model
        self.k, self.v = torch.zeros(2, batch, slots, 1, self.wq.shape[0])

    def run(self, tokens, positions, slots, topology, context_lens, query_start):
        x = self.embedding[tokens.clamp(min=0).long()] + self.places[positions.long()]
        for request in range(len(x)):
            self.k[request, slots[request], 0] = x[request] @ self.wk
            self.v[request, slots[request], 0] = x[request] @ self.wv
        q = (x @ self.wq)[:, :, None].contiguous()
        return x + tree_attention(q, self.k, self.v, topology, context_lens, query_start=query_start)[:, :, 0]


@pytest.mark.parametrize("sampled", [False, True])
def test_decoding_end_to_end(sampled):
    """A whole decode loop: the text is the target's own greedy text, whatever the draft says.

    With tree_accept at temperature 0 instead of greedy_accept, too. Requests have other prompts, the draft's cache is
    committed through draft_path, and one request ends early.
    """
    vocab, batch, slots, levels, width = 30, 3, 160, 4, 4
    target_model, draft_model = tiny_model(vocab), tiny_model(vocab)
    draft_model[3].add_(0.3 * torch.randn(vocab, 16, generator=torch.Generator().manual_seed(9)))
    prompts, length = [[1, 2, 3], [7], [5, 4]], 24
    pool = CandidatePool.empty(batch, levels=levels, width=width, branching=3)
    target, draft = Draft(batch, slots, target_model), Draft(batch, slots, draft_model)
    texts = [list(prompt) for prompt in prompts]
    for model in (target, draft):  # all but the last token of each prompt
        for request, prompt in enumerate(prompts):
            for at, token in enumerate(prompt[:-1]):
                x = model.embedding[token] + model.places[at]
                model.k[request, at, 0], model.v[request, at, 0] = x @ model.wk, x @ model.wv
    context_lens = torch.tensor([len(prompt) - 1 for prompt in prompts], dtype=torch.int32)
    rounds = drafted = 0
    while min(map(len, texts)) < length:
        tokens = roots = torch.tensor([text[-1:] for text in texts], dtype=torch.int32)
        for level in range(levels):
            start = pool.query_start(level)
            nodes = start + torch.arange(tokens.shape[1])
            hidden = draft.run(
                tokens,
                (context_lens[:, None] + level).expand_as(tokens),
                context_lens[:, None] + nodes,
                pool.topology,
                context_lens,
                start,
            )
            found = exit_confidence(hidden.flatten(0, 1), draft.head, top_k=3)
            shape = (batch, -1, 3)
            frontier = grow_tree(pool, found.top_tokens.view(shape), found.top_logprobs.view(shape), level=level)
            tokens = frontier.tokens
        tree = prune_tree(pool, 20, root_tokens=roots[:, 0])
        assert tree.topology.status.tolist() == pool.status.tolist() == [0] * batch
        nodes = torch.arange(20)
        positions = context_lens[:, None] + tree.topology.depths
        hidden = target.run(tree.tokens, positions, context_lens[:, None] + nodes, tree.topology, context_lens, 0)
        logits = hidden @ target.head.T
        if sampled:
            accepted = tree_accept(logits, tree.tokens, tree.topology, temperature=0.0, seeds=1, positions=0)
        else:
            accepted = greedy_accept(logits, tree.tokens, tree.topology)
        path = tree.draft_path(accepted.nodes)
        for request in range(batch):
            count, first = int(accepted.num_accepted[request]), int(context_lens[request])
            kept = [node for node in accepted.nodes[request].tolist() if node >= 0]
            run = [node for node in path[request].tolist() if node >= 0]
            assert len(kept) == count + 1
            assert len(run) in (count, count + 1)
            assert run == sorted(run)
            for model, nodes_of in ((target, kept), (draft, run)):
                for place, node in enumerate(nodes_of):  # ascending, so a slot is read before it is written
                    assert node >= place
                    model.k[request, first + place] = model.k[request, first + node].clone()
                    model.v[request, first + place] = model.v[request, first + node].clone()
            new = accepted.tokens[request, : count + 1].tolist()
            texts[request] += new
            if len(run) == count:  # the draft has not run the last accepted token
                at, token = first + count, new[count - 1]
                x = draft.embedding[token] + draft.places[at]
                draft.k[request, at, 0], draft.v[request, at, 0] = x @ draft.wk, x @ draft.wv
            drafted += count
        context_lens += accepted.num_accepted + 1
        rounds += 1
    assert drafted > rounds  # drafts were accepted
    for request, prompt in enumerate(prompts):
        assert texts[request][:length] == plain_greedy(target_model, prompt, length)


def plain_greedy(model, prompt, length):
    """The text of the model alone, each token from the whole text before it."""
    embedding, places, (wq, wk, wv), head = (part for part in model)
    text = list(prompt)
    while len(text) < length:
        x = embedding[text] + places[: len(text)]
        weights = ((x[-1] @ wq) @ (x @ wk).T / 16**0.5).softmax(0)
        text.append(int((head @ (x[-1] + weights @ (x @ wv))).argmax()))
    return text


def test_a_static_shape_is_plain_calls():
    """(4, 2, 2, 1) behind a root, drawn level by level: in level order a level is a slice, so nothing loops over nodes.

    It is the tree that one call per node draws, and tree_accept takes it with the rows it was drawn from.
    """
    tree, vocab, batch = Tree.from_branching((4, 2, 2, 1), root=True), 30, 2
    topology, seeds = tree.to("cpu"), torch.tensor([3, 8])
    rows = torch.randn(batch, len(tree), vocab, generator=torch.Generator().manual_seed(1))
    tokens = torch.full((batch, len(tree)), -1, dtype=torch.int32)
    bounds = tree.levels.tolist()
    for level, count in enumerate((4, 2, 2, 1)):
        first, end = bounds[level], bounds[level + 1]
        draft_logits = rows[:, first:end]  # what the draft says of these nodes, whose tokens are known
        children = sample_children(draft_logits, count, seeds=seeds, positions=10, first_parent=first)
        tokens[:, end : end + children.tokens[0].numel()] = children.tokens.flatten(1)
    assert (tokens[:, 1:] >= 0).all()
    for node in range(1, len(tree)):
        parent = int(tree.parents[node])
        siblings = [other for other in range(len(tree)) if tree.parents[other] == parent]
        drawn = sample_children(
            rows[:, parent : parent + 1].contiguous(), len(siblings), seeds=seeds, positions=10, first_parent=parent
        )
        assert torch.equal(tokens[:, node], drawn.tokens[:, 0, siblings.index(node)])
    target = torch.randn(batch, len(tree), vocab, generator=torch.Generator().manual_seed(2))
    accepted = tree_accept(target, tokens, topology, rows, seeds=seeds, positions=10)
    assert accepted.status.tolist() == [0, 0]


# The public side.


def test_pools():
    pool = CandidatePool.empty(2, levels=6, width=8, branching=8)
    assert (pool.batch, pool.size, pool.topology.nodes, pool.topology.words) == (2, 328, 41, 1)
    assert CandidatePool.empty(1, levels=8, width=10, branching=10).size == 710  # EAGLE's
    assert [pool.query_start(level) for level in range(6)] == [0, 1, 9, 17, 25, 33]
    assert repr(pool) == "<CandidatePool of 2 requests, 6 levels, width 8, branching 8, on cpu>"
    moved = pool.to("meta")
    assert (moved.device.type, moved.topology.device.type, moved.width) == ("meta", "meta", 8)
    tree = prune_tree(pool, 5, root_tokens=torch.tensor([4, 9]))
    assert tree.tokens.tolist() == [[4, -1, -1, -1, -1], [9, -1, -1, -1, -1]]
    assert tree.topology.num_nodes.tolist() == [1, 1]
    with pytest.raises(TypeError, match=r"^specdec_ops\.CandidatePool: a pool must be made by CandidatePool\.empty\("):
        CandidatePool()


POOL = CandidatePool.empty(2, levels=3, width=4, branching=3)
TOKENS, LOGPROBS = torch.zeros(2, 4, 3, dtype=torch.int32), torch.zeros(2, 4, 3)
FIRST = {"top_tokens": TOKENS[:, :1], "top_logprobs": LOGPROBS[:, :1], "level": 0}


@pytest.mark.parametrize(
    ("changed", "kind", "message"),
    [
        ({"pool": 3}, TypeError, "pool must be a specdec_ops.CandidatePool, got 3"),
        ({"level": 3}, ValueError, "level must be an int from 0 to 2, got 3"),
        ({"level": -1}, ValueError, "level must be an int from 0 to 2, got -1"),
        ({"level": True}, TypeError, "level must be an int from 0 to 2, got True"),
        ({"width": 5}, ValueError, "width must be an int from 0 to 4, got 5"),
        ({"width": 1, "level": 2}, ValueError, "width must be an int from 0 to 0, got 1"),
        ({"width": 2.0}, TypeError, "width must be an int from 0 to 4, got 2.0"),
        (
            FIRST | {"level": 1, "top_logprobs": LOGPROBS},
            ValueError,
            "[2, 4, 3] like top_logprobs, got int32 [2, 1, 3]",
        ),
        ({"level": 0}, ValueError, "top_logprobs must be float32 [2, 1, 3] at level 0, got float32 [2, 4, 3]"),
        ({"top_logprobs": LOGPROBS[:, :0]}, ValueError, "float32 [2, rows, 3] with 1 to 4 rows, got float32 [2, 0, 3]"),
        ({"top_logprobs": LOGPROBS[0]}, ValueError, "top_logprobs must be float32 [2, rows, 3] with 1 to 4 rows, got"),
        ({"top_logprobs": LOGPROBS[:, :, :2]}, ValueError, "with 1 to 4 rows, got float32 [2, 4, 2]"),
        ({"top_logprobs": LOGPROBS.double()}, TypeError, "top_logprobs must be float32 [2, rows, 3], got float64"),
        ({"top_logprobs": None}, TypeError, "top_logprobs must be float32 [2, rows, 3], got None"),
        ({"top_logprobs": LOGPROBS.to("meta")}, ValueError, "top_logprobs must be on cpu, got a tensor on meta"),
        ({"top_tokens": TOKENS.float()}, TypeError, "top_tokens must be int32 or int64 [2, 4, 3], got float32"),
        ({"top_tokens": TOKENS.to("meta")}, ValueError, "top_tokens must be on cpu, got a tensor on meta"),
        ({"eos": -1}, ValueError, "eos must be None, an int or up to 8 ints, each from 0 to 2**31 - 1, got -1"),
        ({"eos": range(3)}, TypeError, "eos must be None, an int or up to 8 ints, got range"),
        ({"vocab_map": [1]}, TypeError, "vocab_map must be a specdec_ops.VocabMap or None, got list [1]"),
        (
            {"vocab_map": VocabMap([1], 9).to("meta")},
            ValueError,
            "vocab_map must be on cpu, got a tensor on meta",
        ),
        ({"active": torch.ones(2)}, TypeError, "active must be bool [2] or None, got float32 [2]"),
        ({"active": torch.ones(3).bool()}, ValueError, "active must be bool [2] or None, got bool [3]"),
        ({"active": torch.ones(2).bool().to("meta")}, ValueError, "active must be on cpu, got a tensor on meta"),
        ({"top_logprobs": LOGPROBS.clone().requires_grad_()}, RuntimeError, "but this op has no backward"),
        ({"backend": "best"}, ValueError, "backend must be one of auto, cuda, triton, cpu, torch, got 'best'"),
    ],
    ids=str,
)
def test_errors_of_growing(changed, kind, message):
    arguments = {"pool": POOL, "top_tokens": TOKENS, "top_logprobs": LOGPROBS, "level": 1, **changed}
    with pytest.raises(kind) as raised:
        grow_tree(arguments.pop("pool"), **arguments)
    assert str(raised.value).startswith("specdec_ops.grow_tree: ")
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("changed", "kind", "message"),
    [
        ({"batch": -1}, ValueError, "batch must be an int from 0 to 2147483647, got -1"),
        ({"levels": 0}, ValueError, "levels must be an int from 1 to 64, got 0"),
        ({"width": 257}, ValueError, "width must be an int from 1 to 256, got 257"),
        ({"branching": 65}, ValueError, "branching must be an int from 1 to 64, got 65"),
        ({"branching": 2.0}, TypeError, "branching must be an int from 1 to 64, got 2.0"),
    ],
    ids=str,
)
def test_errors_of_pools(changed, kind, message):
    sizes = {"batch": 1, "levels": 2, "width": 3, "branching": 4, **changed}
    with pytest.raises(kind, match=f"^specdec_ops\\.CandidatePool\\.empty: {message}$"):
        CandidatePool.empty(sizes.pop("batch"), **sizes)


def test_a_round_compiles_without_a_break():
    """The pool is written inside of the graph, and read behind it."""
    case = random_round(2, 3, 4, 4, vocab=30)
    roots = torch.tensor([1, 2], dtype=torch.int32)

    def step(pool, levels):
        frontiers = [grow_tree(pool, *level, level=at, eos=3) for at, level in enumerate(levels)]
        return frontiers[1].tokens, prune_tree(pool, 12, root_tokens=roots)

    plain, compiled = case.empty(), case.empty()
    expected_frontier, expected_tree = step(plain, case.levels)
    frontier, tree = torch.compile(step, fullgraph=True, backend="aot_eager")(compiled, case.levels)
    assert torch.equal(frontier, expected_frontier)
    assert_tables(tables_of(compiled), tables_of(plain))
    for name in ("tokens", "pool_ids", "expanded"):
        assert torch.equal(getattr(tree, name), getattr(expected_tree, name))
    assert torch.equal(tree.topology.ancestors, expected_tree.topology.ancestors)


def test_every_backend_that_grows_prunes_too():
    """The tests above run both ops on the backends of one of them."""
    assert targets("grow_tree") == targets("prune_tree")
    assert ("grow_tree" in kernels.IMPLEMENTATIONS) == ("prune_tree" in kernels.IMPLEMENTATIONS)
