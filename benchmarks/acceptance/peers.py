"""What PyTorch's users write for acceptance, in its best form: batched, no loop over requests, no wait on a GPU.

Three kinds. *eager* normalises every row first, as the verifiers of today's engines are fed. *lazy* gathers the rows of
the path level by level, which is the least that PyTorch can read. *engine* is the pipeline with top-p: softmax over all
rows, renormalisation by sorting, then the walk. All take their noise from an object, so that with ours they must decide
as the reference does, and with PyTorch's they are timed.
"""

from __future__ import annotations

import torch

from specdec_ops.ops.acceptance import reference_philox as reference_noise

from .cases import CHAIN_RULES, AcceptCase
from .inputs import Inputs, call


class TorchNoise:
    """Noise as PyTorch's users draw it."""

    def __init__(self, inputs):
        self.shape, self.vocab, self.device = inputs.tokens.shape, inputs.case.vocab, inputs.target.device

    def coins(self) -> torch.Tensor:
        """[batch, nodes]: one per drafted node."""
        return torch.rand(self.shape, device=self.device)

    level_coins = coins  # one per parent

    def race(self, node, residual) -> torch.Tensor:
        """Exponential variables [batch, vocab] of the next token; `node` and `residual` are [batch]."""
        return torch.empty(self.shape[0], self.vocab, device=self.device).exponential_()

    def sample(self, depth: int) -> torch.Tensor:
        return torch.empty(self.shape[0], self.vocab, device=self.device).exponential_()


class ExactNoise:
    """The noise that the ops use."""

    def __init__(self, inputs):
        self.seeds, self.positions = inputs.seeds.tolist(), inputs.positions.tolist()
        self.nodes, self.vocab, self.device = inputs.case.nodes, inputs.case.vocab, inputs.target.device

    def _each(self, one) -> torch.Tensor:
        drawn = [
            one(seed, position, b) for b, (seed, position) in enumerate(zip(self.seeds, self.positions, strict=True))
        ]
        return torch.stack([torch.as_tensor(values) for values in drawn]).to(self.device)

    def coins(self, level=False):
        def one(seed, position, _):
            return [reference_noise.coin(seed, position, node, level=level) for node in range(self.nodes)]

        return self._each(lambda *key: torch.tensor(one(*key), dtype=torch.float64))

    def level_coins(self):
        return self.coins(level=True)

    def race(self, node, residual):
        def one(seed, position, b):
            domain = reference_noise.RESIDUAL if residual[b] else reference_noise.BONUS
            return reference_noise.exponentials(self.vocab, seed, position, domain, int(node[b]))

        return self._each(one)

    def sample(self, depth):
        domain = reference_noise.SAMPLE
        return self._each(
            lambda seed, position, _: reference_noise.exponentials(self.vocab, seed, position + depth + 1, domain, 0)
        )


def forms(case: AcceptCase) -> list[tuple[str, object]]:
    """The PyTorch forms of a case's rule, by name."""
    if case.rule in CHAIN_RULES:
        form = {"token": chain_token, "block": chain_block}[case.rule]
        listed = [("eager", form)]
        if case.rule == "token" and case.top_p == 1:
            listed.append(("lazy", chain_token_lazy))
        if case.compiled and case.top_p == 1:
            listed.append(("compiled", form))
        return listed
    if case.rule == "greedy":
        return [("eager", greedy_eager), ("lazy", greedy_lazy)]
    listed = {
        "match": [("lazy", match_lazy)],
        "recursive": [("lazy", recursive_lazy)],
        "traversal": [],
        "target_only": [("lazy", target_only_lazy)],
        "typical": [("eager", typical_eager)],
    }[case.rule]
    if case.rule == "target_only" and case.top_p < 1:
        listed.append(("engine", target_only_engine))
    if case.compiled and case.top_p == 1 and listed:
        listed.append(("compiled", listed[-1][1]))
    return listed


def problem(inputs: Inputs, form) -> str:
    """Why a form is wrong for these inputs, or "": with our noise it must decide as our reference does."""
    few = inputs.exact(list(range(min(inputs.case.batch, 2))))
    exact = call(few, "torch").tokens
    try:
        got = form(few, ExactNoise(few))
    except Exception as error:  # a form that fails must not end the run
        return f"fails: {error}"
    width = max(got.shape[1], exact.shape[1])
    got, exact = (torch.nn.functional.pad(t, (0, width - t.shape[1]), value=-1) for t in (got.to(exact.dtype), exact))
    if torch.equal(got, exact):
        return ""
    return "WRONG: decides differently from the reference with the same noise"


# --- rows


def softmax(logits: torch.Tensor, top_p: float) -> torch.Tensor:
    """Probabilities, in float32 unless the logits are float64; cut by sorting where top_p asks for it."""
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    p = torch.softmax(logits, -1, dtype=dtype)
    if top_p >= 1:
        return p
    ordered, order = p.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered
    ordered = torch.where(before < top_p, ordered, 0.0)
    p = torch.zeros_like(p).scatter_(-1, order, ordered)
    return p / p.sum(-1, keepdim=True)


def at(rows: torch.Tensor, node: torch.Tensor) -> torch.Tensor:
    """Rows [batch, nodes, ...] of one node per request."""
    return rows[torch.arange(len(node), device=node.device), node]


def probability(p: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
    return p.gather(-1, token.long()[..., None])[..., 0]


def normal(weights: torch.Tensor) -> torch.Tensor:
    return weights / weights.sum(-1, keepdim=True)


def race(weights: torch.Tensor, exponential: torch.Tensor) -> torch.Tensor:
    return (weights / exponential).argmax(-1)


# --- chains


def chain_parts(inputs, p, q, noise):
    """Ratios p(x) / q(x) and coins of every step, [batch, steps]."""
    tokens = inputs.tokens[:, 1:]
    return tokens, probability(p[:, :-1], tokens), probability(q, tokens), noise.coins()[:, 1:]


def chain_end(tokens, count, following):
    """Tokens [batch, steps + 1]: the accepted ones, the next one, -1."""
    steps = torch.arange(tokens.shape[1] + 1, device=tokens.device)
    padded = torch.nn.functional.pad(tokens, (0, 1)).long()
    result = torch.where(steps < count[:, None], padded, -1)
    return torch.where(steps == count[:, None], following[:, None], result)


def chain_token(inputs, noise):
    top_p = inputs.case.top_p
    p, q = softmax(inputs.target, top_p), softmax(inputs.draft[:, :-1], top_p)
    tokens, px, qx, u = chain_parts(inputs, p, q, noise)
    count = (u * qx < px).long().cumprod(1).sum(1)
    some = count < tokens.shape[1]
    rest = at(q, count.clamp(max=tokens.shape[1] - 1)) * some[:, None]
    left = (at(p, count) - rest).clamp(min=0)
    return chain_end(tokens, count, race(left, noise.race(count, some)))


def chain_token_lazy(inputs, noise):
    """Without writing all probabilities: a log-sum-exp per row, and two rows at the end."""
    dtype = torch.float64 if inputs.target.dtype == torch.float64 else torch.float32
    tokens, target, draft = inputs.tokens[:, 1:], inputs.target, inputs.draft[:, :-1]
    log_p = probability(target[:, :-1], tokens).to(dtype) - target[:, :-1].to(dtype).logsumexp(-1)
    log_q = probability(draft, tokens).to(dtype) - draft.to(dtype).logsumexp(-1)
    u = noise.coins()[:, 1:]
    count = (u * log_q.exp() < log_p.exp()).long().cumprod(1).sum(1)
    some = count < tokens.shape[1]
    rest = softmax(at(draft, count.clamp(max=tokens.shape[1] - 1)), 1.0) * some[:, None]
    left = (softmax(at(target, count), 1.0) - rest).clamp(min=0)
    return chain_end(tokens, count, race(left, noise.race(count, some)))


def chain_block(inputs, noise):
    top_p = inputs.case.top_p
    p, q = softmax(inputs.target, top_p), softmax(inputs.draft[:, :-1], top_p)
    tokens, px, qx, u = chain_parts(inputs, p, q, noise)
    steps = tokens.shape[1]
    weight = torch.ones(len(tokens), dtype=p.dtype, device=p.device)
    count = torch.zeros(len(tokens), dtype=torch.long, device=p.device)
    weights = [weight]
    for i in range(steps):
        weight = torch.clamp(weight * px[:, i] / qx[:, i], max=1.0)
        weights.append(weight)
        if i + 1 < steps:
            excess = (weight[:, None] * p[:, i + 1] - q[:, i + 1]).clamp(min=0).sum(-1)
            chance = excess / (excess + (1 - weight))
        else:
            chance = weight
        count = torch.where(u[:, i] < chance, i + 1, count)
    some = count < steps
    scale = at(torch.stack(weights, 1), count)
    rest = at(q, count.clamp(max=steps - 1)) * some[:, None]
    left = (torch.where(some, scale, 1.0)[:, None] * at(p, count) - rest).clamp(min=0)
    return chain_end(tokens, count, race(left, noise.race(count, some)))


# --- trees


class Walk:
    """The walk from node 0, one level at a time for all requests. Children of a node are columns, padded with -1."""

    def __init__(self, inputs):
        device = inputs.target.device
        self.children, self.width, self.depth = inputs.table.children, inputs.table.width, inputs.table.depth
        self.tokens = inputs.tokens.long()
        batch = len(self.tokens)
        self.node = torch.zeros(batch, dtype=torch.long, device=device)
        self.alive = torch.ones(batch, dtype=torch.bool, device=device)
        self.emitted = []

    def over(self) -> bool:
        """Whether every walk has ended. On a GPU it would take a wait to know."""
        if self.tokens.is_cuda or torch.compiler.is_compiling():
            return False
        return not bool(self.alive.any())

    def kids(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Children of the current nodes and their tokens, [batch, width]."""
        kids = self.children[self.node]
        return kids, self.tokens.gather(1, kids.clamp(min=0)).clamp(min=0)

    def go(self, chosen: torch.Tensor, found: torch.Tensor, token: torch.Tensor) -> None:
        """Move to `chosen` where `found`; the walk ends elsewhere."""
        self.alive = self.alive & found
        self.emitted.append(torch.where(self.alive, token, -1))
        self.node = torch.where(self.alive, chosen, self.node)

    def result(self, following: torch.Tensor) -> torch.Tensor:
        rows = torch.stack([*self.emitted, torch.full_like(self.node, -1)], 1)
        count = (rows >= 0).sum(1, keepdim=True)
        return rows.scatter(1, count, following[:, None])


def follow(inputs, token_after):
    """Go to the child that has the token after its parent, while there is one."""
    walk, following = Walk(inputs), None
    for level in range(walk.depth + 1):
        token = token_after(walk.node, level)
        following = token if following is None else torch.where(walk.alive, token, following)
        kids, tokens = walk.kids()
        match = (tokens == token[:, None]) & (kids >= 0)
        chosen = kids.gather(1, match.long().argmax(1, keepdim=True))[:, 0]
        walk.go(chosen, match.any(1), token)
        if walk.over():
            break
    return walk.result(following)[:, : walk.depth + 1]


def greedy_eager(inputs, noise):
    ids = inputs.target.argmax(-1)
    return follow(inputs, lambda node, level: at(ids, node))


def greedy_lazy(inputs, noise):
    return follow(inputs, lambda node, level: at(inputs.target, node).argmax(-1))


def match_lazy(inputs, noise):
    top_p = inputs.case.top_p
    return follow(inputs, lambda node, level: race(softmax(at(inputs.target, node), top_p), noise.sample(level)))


def recursive_lazy(inputs, noise):
    """Without replacement. p and q are updated for the requests that reject, [batch, vocab] at a time."""
    walk, coins, top_p = Walk(inputs), noise.coins(), inputs.case.top_p
    left = residual = None
    for _ in range(walk.depth + 1):
        p, q = softmax(at(inputs.target, walk.node), top_p), softmax(at(inputs.draft, walk.node), top_p)
        kids, tokens = walk.kids()
        chosen, rejected = torch.full_like(walk.node, -1), torch.zeros_like(walk.alive)
        token = torch.full_like(walk.node, -1)
        for i in range(walk.width):
            child, x = kids[:, i], tokens[:, i]
            tested = walk.alive & (child >= 0) & (chosen < 0)
            accept = tested & (
                coins.gather(1, child.clamp(min=0)[:, None])[:, 0] * probability(q, x) < probability(p, x)
            )
            chosen, token = torch.where(accept, child, chosen), torch.where(accept, x, token)
            reject = tested & ~accept
            rejected = rejected | reject
            p = torch.where(reject[:, None], normal((p - q).clamp(min=0)), p)
            q = torch.where(reject[:, None], normal(q.scatter(1, x[:, None], 0.0)), q)
        ended = walk.alive & (chosen < 0)
        left = p if left is None else torch.where(ended[:, None], p, left)
        residual = rejected if residual is None else torch.where(ended, rejected, residual)
        walk.go(chosen, chosen >= 0, token)
        if walk.over():
            break
    return walk.result(race(left, noise.race(walk.node, residual)))


def target_only_walk(inputs, row, noise):
    """One coin per level against the target's mass of the children so far."""
    walk, coins = Walk(inputs), noise.level_coins()
    left = residual = None
    for _ in range(walk.depth + 1):
        p = row(walk.node)
        kids, tokens = walk.kids()
        mass = torch.where(kids >= 0, p.gather(1, tokens), 0.0).cumsum(1)
        hit = (at(coins, walk.node)[:, None] < mass) & (kids >= 0)
        first = hit.long().argmax(1, keepdim=True)
        found = hit.any(1)
        ended = walk.alive & ~found
        tried = p.scatter(1, tokens, torch.where(kids >= 0, 0.0, p.gather(1, tokens)))
        left = tried if left is None else torch.where(ended[:, None], tried, left)
        rejected = (kids >= 0).any(1)
        residual = rejected if residual is None else torch.where(ended, rejected, residual)
        walk.go(kids.gather(1, first)[:, 0], found, tokens.gather(1, first)[:, 0])
        if walk.over():
            break
    return walk.result(race(left, noise.race(walk.node, residual)))


def target_only_lazy(inputs, noise):
    return target_only_walk(inputs, lambda node: softmax(at(inputs.target, node), inputs.case.top_p), noise)


def target_only_engine(inputs, noise):
    p = softmax(inputs.target, inputs.case.top_p)
    return target_only_walk(inputs, lambda node: at(p, node), noise)


def typical_eager(inputs, noise, epsilon=0.3, delta=0.09):
    """Medusa's rule over all rows, as Medusa computes it."""
    p, table = softmax(inputs.target, inputs.case.top_p), inputs.table
    parents, depths = table.parents, table.depths
    threshold = torch.clamp(delta * torch.exp(-torch.special.entr(p).sum(-1)), max=epsilon)
    px = p[:, parents].gather(-1, inputs.tokens.clamp(min=0).long()[..., None])[..., 0]
    passed = px > threshold[:, parents]
    reached, score = passed.clone(), px.log()
    reached[:, 0], score[:, 0] = True, 0.0
    for nodes in table.levels[1:]:
        reached[:, nodes] &= reached[:, parents[nodes]]
        score[:, nodes] += score[:, parents[nodes]]
    rank = torch.where(reached, depths.to(score.dtype), -1.0)
    deepest = rank == rank.max(1, keepdim=True).values
    end = torch.where(deepest, score, float("-inf")).argmax(1)
    row = at(p, end)
    left = torch.where(row > at(threshold, end)[:, None], row, 0.0)
    following = race(left, noise.race(end, torch.zeros_like(end)))
    path, node = [], end
    for _ in range(table.depth):
        path.insert(0, torch.where(node > 0, inputs.tokens.gather(1, node[:, None])[:, 0].long(), -1))
        node = parents[node]
    rows = torch.stack([*path, torch.full_like(end, -1)], 1)
    order = (rows < 0).long().argsort(dim=1, stable=True)
    rows = rows.gather(1, order)
    return rows.scatter(1, (rows >= 0).sum(1, keepdim=True), following[:, None])
