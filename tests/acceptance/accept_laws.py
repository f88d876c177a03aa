"""Exact laws of acceptance rules: every outcome of drafting and accepting on a tiny vocabulary, with its probability.

A problem is a tree shape and two tables of distributions that depend on the whole prefix, so that a rule which mixes
rows up is seen. A rule's outcome, a few tokens, is completed from the target; a lossless rule makes the joint law of
the completed sequence the target's own, to rounding.
"""

import dataclasses
import itertools
import zlib
from collections import defaultdict

import torch

from specdec_ops.ops.acceptance.reference_accept import Links
from specdec_ops.tree import Tree

ROUNDING = 1e-14


class Enumerated:
    """A `choice` of reference_rules that follows a script of decisions and remembers which there were."""

    def __init__(self, script):
        self.script, self.decisions, self.probability = script, [], 1.0
        self.coins = {}  # the interval that each coin is known to lie in

    def decide(self, chances):
        """An index with a positive chance. What is left of 1 by rounding is no chance."""
        possible = [index for index, chance in enumerate(chances) if chance > ROUNDING]
        step = len(self.decisions)
        taken = self.script[step] if step < len(self.script) else 0
        self.decisions.append((taken, len(possible)))
        self.probability *= chances[possible[taken]] / sum(chances)
        return possible[taken]

    def coin(self, node, left, right, *, level=False):
        """Whether u * left < right. A coin that was asked before is known to lie in an interval."""
        low, high = self.coins.get((node, level), (0.0, 1.0))
        limit = min(1.0, max(0.0, right / left)) if left > 0 else float(right > 0)
        limit = min(max(limit, low), high)
        below = not self.decide([limit - low, high - limit])
        self.coins[node, level] = (low, limit) if below else (limit, high)
        return below

    def draw(self, weights, domain, node):
        """The law of the token instead of a token: nothing depends on it any more."""
        return weights / weights.sum()

    def draw_many(self, logs, domain, node, count):
        return self.draw(logs.exp(), domain, node)

    def sample(self, weights, depth):
        return self.decide(weights.tolist())

    def reuse(self, weights, node, *, level=False):
        """Inverse transform of a coin that was asked before: a mistake that mutants make."""
        low, high = self.coins.get((node, level), (0.0, 1.0))
        edges = torch.cat([torch.zeros(1, dtype=torch.float64), (weights / weights.sum()).cumsum(0)]).clamp(low, high)
        return edges.diff() / (high - low)


def outcomes(run):
    """Every result of `run(choice)` and its probability."""
    script = []
    while True:
        choice = Enumerated(script)
        yield run(choice), choice.probability
        decisions = choice.decisions
        while decisions and decisions[-1][0] + 1 == decisions[-1][1]:
            decisions.pop()
        if not decisions:
            return
        script = [taken for taken, _ in decisions[:-1]] + [decisions[-1][0] + 1]


@dataclasses.dataclass
class Problem:
    """A tree shape, how its tokens are drawn, and distributions that depend on the prefix."""

    parents: list
    """Of every node, -1 for roots. Nodes in any order that Tree takes."""
    vocab: int
    drafting: str
    """"without" or "with" replacement, "own" (siblings from different drafts), "functions" or "duplicates"."""
    seed: int = 0
    proposal_support: int | None = None
    """Tokens that a draft can propose; the others have q = 0."""
    target_support: int | None = None
    one_hot: bool | None = None
    """What the rule is told; None: the truth."""
    eos: tuple = ()

    def __post_init__(self):
        self.tree = Tree(self.parents)
        self.depth = int(self.tree.depths.max())
        self.rows = {}
        self.deterministic = self.drafting in ("functions", "duplicates")

    def row(self, kind, support, *key):
        """A random distribution, always the same for the same key."""
        key = (kind, *key)
        if key not in self.rows:
            generator = torch.Generator().manual_seed(zlib.crc32(repr((self.seed, *key)).encode()))
            weights = torch.rand(self.vocab, dtype=torch.float64, generator=generator) ** 2 + 0.02
            if support is not None:
                weights[torch.randperm(self.vocab, generator=generator)[support:]] = 0
            self.rows[key] = weights / weights.sum()
        return self.rows[key]

    def p(self, prefix):
        return self.row("p", self.target_support, *prefix)

    def q(self, prefix, sibling=0):
        return self.row("q", self.proposal_support, sibling if self.drafting == "own" else 0, *prefix)

    def left(self, prefix, sibling, removed):
        """The proposal without some tokens; None if nothing is left of it."""
        q = self.q(prefix, sibling).clone()
        q[removed] = 0
        return q / q.sum() if float(q.sum()) > 0 else None

    def ranked(self, prefix, sibling):
        return self.q(prefix, sibling).sort(descending=True, stable=True).indices.tolist()

    def token(self, prefix, sibling, before, choice):
        """Draw a child, given its prefix and the tokens of its earlier siblings."""
        if self.deterministic:
            return self.ranked(prefix, sibling)[sibling // 2 if self.drafting == "duplicates" else sibling]
        q = self.left(prefix, sibling, before if self.drafting == "without" else [])
        return -1 if q is None else choice.decide(q.tolist())


class SharpProblem(Problem):
    """Rows are the logits [vocab, vocab] after each token; token 0 comes first.

    Proposals are kept as logarithms: what is 1,000 below the greatest is 0 even in float64, until that is drawn.
    """

    def set(self, target, draft, temperature):
        self.target, self.draft = (table.double() / temperature for table in (target, draft))
        return self

    def p(self, prefix):
        return torch.softmax(self.target[prefix[-1] if prefix else 0], -1)

    def left(self, prefix, sibling, removed):
        logs = self.draft[prefix[-1] if prefix else 0].clone()
        logs[removed] = float("-inf")
        return torch.softmax(logs, -1)

    def q(self, prefix, sibling=0):
        return self.left(prefix, sibling, [])

    def ranked(self, prefix, sibling):
        return self.draft[prefix[-1] if prefix else 0].sort(descending=True, stable=True).indices.tolist()


class DraftedTree(Links):
    """A tree whose tokens are drawn when a rule looks at them, with the tables of a problem as rows.

    What a rule never looks at can't change its result, so drawing late gives the law of drawing early, in far fewer
    outcomes.
    """

    forest = False

    def __init__(self, problem, choice):
        tree = problem.tree
        super().__init__(
            [None] * len(tree),
            tree.first_child.tolist(),
            tree.next_sibling.tolist(),
            len(tree),
            problem.vocab,
            problem.eos,
            len(tree),
        )
        self.problem, self.choice, self.greedy = problem, choice, False
        self.one_hot = problem.deterministic if problem.one_hot is None else problem.one_hot
        self.own_proposals = problem.drafting == "own"
        self.siblings = defaultdict(list)
        for node, parent in enumerate(tree.parents.tolist()):
            self.siblings[parent].append(node)

    def prefix(self, node):
        """Tokens from the root to the node; a tree with one root starts with a committed token, which isn't counted."""
        parent = int(self.problem.tree.parents[node])
        if parent < 0:
            return (self.token(node),) if self.forest else ()
        return (*self.prefix(parent), self.token(node))

    def token(self, node):
        if self.tokens[node] is None:
            parent = int(self.problem.tree.parents[node])
            siblings = self.siblings[parent]
            place = siblings.index(node)
            before = [self.token(sibling) for sibling in siblings[:place]]
            if parent >= 0:
                self.tokens[node] = self.problem.token(self.prefix(parent), place, before, self.choice)
            else:  # roots of a forest are drawn from the target, without replacement
                weights = self.problem.p(()).clone()
                weights[before] = 0
                self.tokens[node] = self.choice.decide(weights.tolist())
        return self.tokens[node]

    def target(self, node):
        return self.problem.p(self.prefix(node))

    def argmax(self, node):
        return int(self.target(node).argmax())

    def target_logs(self, node):
        return self.target(node).log()

    def proposal(self, child, removed=()):
        parent = int(self.problem.tree.parents[child])
        prefix, sibling = self.prefix(parent), self.siblings[parent].index(child)
        return self.problem.left(prefix, sibling, removed) if removed else self.problem.q(prefix, sibling)

    def proposes(self, child, removed=()):
        return float(self.proposal(child, removed)[self.token(child)]) > 0


class Forest(DraftedTree):
    """Its roots are tokens drawn from the target."""

    forest = True


@dataclasses.dataclass
class Result:
    joint: torch.Tensor
    """float64 [vocab] * length: the law of the completed sequence."""
    accepted: float
    """Expected number of accepted drafts."""
    paths: int
    """Outcomes that were summed."""
    status: int
    """All bits that some outcome had."""


def law_of(problem, rule, *, forest=False) -> Result:
    """The joint law of the first depth + 1 tokens (of a forest, one more), when `rule(tree, choice)` decides."""
    length = problem.depth + (2 if forest else 1)
    emitted = defaultdict(lambda: torch.zeros(problem.vocab, dtype=torch.float64))
    ended = defaultdict(float)
    accepted, paths, total, status = 0.0, 0, 0.0, 0

    def run(choice):
        tree = (Forest if forest else DraftedTree)(problem, choice)
        path, following = rule(tree, choice)
        return tuple(tree.token(node) for node in (path if forest else path[1:])), following, tree.status

    for (tokens, following, bits), probability in outcomes(run):
        if following is None:
            ended[tokens] += probability
        elif torch.is_tensor(following):
            emitted[tokens] += probability * following
        else:
            emitted[tokens][following] += probability
        accepted += probability * len(tokens)
        total += probability
        paths += 1
        status |= bits
    assert abs(total - 1) < 1e-12, total
    joint = torch.zeros((problem.vocab,) * length, dtype=torch.float64)
    for tokens, weights in emitted.items():
        for token in range(problem.vocab):
            if weights[token] > 0:
                add_completed(problem, joint, (*tokens, token), float(weights[token]), length)
    for tokens, weight in ended.items():
        add_completed(problem, joint, tokens, weight, length)
    return Result(joint, accepted, paths, status)


def add_completed(problem, joint, tokens, weight, length):
    """Spread `weight` over the completions of `tokens`; after an end of sequence, over token 0 alone."""
    if any(token in problem.eos for token in tokens):
        end = next(place for place, token in enumerate(tokens) if token in problem.eos)
        tokens = (*tokens[: end + 1], *(0 for _ in range(length - end - 1)))
    if len(tokens) == length:
        joint[tokens] += weight
        return
    row = problem.p(tokens)
    for token in range(problem.vocab):
        if row[token] > 0:
            add_completed(problem, joint, (*tokens, token), weight * float(row[token]), length)


def target_joint(problem, length) -> torch.Tensor:
    """The law of plain sampling from the target."""
    joint = torch.zeros((problem.vocab,) * length, dtype=torch.float64)
    add_completed(problem, joint, (), 1.0, length)
    return joint


def total_variation(result, problem) -> float:
    """Distance between a rule's completed sequences and the target's."""
    return float((result.joint - target_joint(problem, result.joint.dim())).abs().sum()) / 2


# Named by the number of children along the way.
SHAPES = {
    "chain 1": [-1, 0],
    "chain 2": [-1, 0, 1],
    "chain 3": [-1, 0, 1, 2],
    "star 2": [-1, 0, 0],
    "star 3": [-1, 0, 0, 0],
    "2x2": [-1, 0, 0, 1, 1, 2, 2],
    "2x1": [-1, 0, 0, 1, 2],
    "ragged": [-1, 0, 0, 1, 3, 2, 2],
    "1x2": [-1, 0, 1, 1],
}


def problems(shapes, draftings, vocab=3, seeds=(0, 1), **others):
    """Problems for all combinations."""
    return [
        Problem(SHAPES[shape], vocab, drafting, seed, **others)
        for shape, drafting, seed in itertools.product(shapes, draftings, seeds)
    ]
