"""What an engine does with grow_tree and prune_tree: attention over a growing tree, decoding, static shapes."""

import math

import pytest
import torch

import specdec_ops
from specdec_ops import (
    CandidatePool,
    Tree,
    exit_confidence,
    greedy_accept,
    grow_tree,
    prune_tree,
    sample_children,
    tree_accept,
    tree_attention,
)
from tests.topology.grow_cases import (
    random_round,
)

NAN, INF = math.nan, math.inf


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
