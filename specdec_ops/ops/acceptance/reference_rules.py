"""The acceptance rules, stated as their papers state them: on probability vectors that are updated and normalised.

Kernels never write such vectors; they carry a few coefficients instead. So this file is an independent statement.

Each rule is a function of one request, seen through two objects:

`tree`
    children(node): yields the drafted children that may be tried, ascending. Nothing below an end-of-sequence token.
    With `once`, a node that another parent has yielded is none: only a malformed tree has such a node.
    token(node): a drafted token. depth(node).
    target(node): the target's distribution after the node, float64 [vocab]. argmax(node): its most probable token.
    target_logs(node): natural logarithms of the same, up to a constant; finite however unlikely a token is.
    proposal(child, removed): the distribution that the child was drawn from, float64 [vocab], normalised once the
    removed tokens are out; None if it can't be used, or if nothing is left of it.
    proposes(child, removed): whether the child's token can be drawn from that, even if so rarely that a float is 0.
    own_proposals: whether siblings have proposals of their own, each given what was drawn before it.
    one_hot: whether children are functions of their prefix, drawn from nothing: their proposal is all on themselves.
    greedy: whether the target's temperature is 0.
    possible(child): whether the child's token is in the vocabulary; flags it if not.
    flag(bit): sets a bit of the status. ends(node): whether the node's token ends the sequence.
`choice`, which decides what is left to chance
    coin(node, left, right): whether u * left < right, for a uniform u of the node. `level` names one coin for all
    children of a node.
    draw(weights, domain, node): a token with probability proportional to its weight.
    draw_many(logs, domain, node, count): tokens drawn without replacement from weights of which these are the logs.
    sample(weights, depth): the same, with the noise of plain sampling at that depth.
With the noise of reference_philox they are what ops do; with a choice that enumerates, the exact law comes out.

A rule returns (path, next token): the nodes from node 0 to the last accepted one, and the token after them, or None
if the sequence has ended.
"""

import torch

from specdec_ops.status import AcceptStatus

from .reference_philox import BONUS, RESIDUAL

DRAFT_TOKEN_IMPOSSIBLE, RESIDUAL_EMPTY = AcceptStatus.DRAFT_TOKEN_IMPOSSIBLE, AcceptStatus.RESIDUAL_EMPTY


def excess(p, q, alpha: float = 1.0):
    """(alpha p - q)+ normalised, and its sum before. All zeros if it is empty."""
    rest = (alpha * p - q).clamp(min=0)
    total = float(rest.sum())
    return (rest / total if total > 0 else rest), total


def proposal_left(tree, child, removed, replacement):
    """The distribution that the child was drawn from, given what was drawn before it; None if nothing is left to draw.

    Without replacement, that is the row without its removed tokens, normalised. A sibling with a proposal of its own
    has it as it is.
    """
    if tree.one_hot:
        proposal = torch.zeros_like(tree.target(0))
        proposal[tree.token(child)] = 1
        return proposal
    return tree.proposal(child, [] if replacement or tree.own_proposals else removed)


def is_impossible(tree, child, removed, replacement):
    """Whether the child was not drawn from its proposal, whatever was said."""
    return not tree.one_hot and not tree.proposes(child, [] if replacement or tree.own_proposals else removed)


def finish(tree, choice, node, left, removed, rejected):
    """The next token from what is left of the target's distribution."""
    if not float(left.sum()) > 0:
        tree.flag(RESIDUAL_EMPTY)
        left = tree.target(node).clone()
        left[removed] = 0
        if not float(left.sum()) > 0:
            left = tree.target(node)
    return choice.draw(left, RESIDUAL if rejected else BONUS, node)


def greedy(tree, choice):
    """The path of the target's argmax."""
    return follow(tree, tree.argmax)


def match(tree, choice):
    """The path of plain sampling: the text is that of a decoder without drafts and with the same noise."""
    return follow(tree, lambda node: choice.sample(tree.target(node), tree.depth(node)))


def follow(tree, token_after):
    """Descend into the lowest child that is the token after its parent."""
    path = [0]
    while not tree.ends(path[-1]):
        token = token_after(path[-1])
        for child in tree.children(path[-1]):
            if tree.possible(child) and tree.token(child) == token:
                path.append(child)
                break
        else:
            return path, token
    return path, None


def recursive(tree, choice, replacement=False):
    """Recursive rejection: SpecInfer's multi-step sampling, MCSD and Sequoia; on a chain, Leviathan's and Chen's rule.

    A child x drawn from q is accepted with probability min(1, p(x) / q(x)). Otherwise p becomes norm((p - q)+) and,
    without replacement, q loses x, before the next child is tried.
    """
    path = [0]
    while not tree.ends(path[-1]):
        node, p, removed, rejected, accepted = path[-1], tree.target(path[-1]), [], False, None
        for child in tree.children(node):
            if not tree.possible(child):
                rejected = True
                continue
            token = tree.token(child)
            q = proposal_left(tree, child, removed, replacement)
            if q is None and tree.own_proposals:
                continue
            if q is None:
                break
            rejected = True
            if is_impossible(tree, child, removed, replacement):
                tree.flag(DRAFT_TOKEN_IMPOSSIBLE)
                continue
            if choice.coin(child, float(q[token]), float(p[token])):
                accepted = child
                break
            p, total = excess(p, q)
            removed.append(token)
            if not total > 0:
                break
        if accepted is None:
            return path, finish(tree, choice, node, p, removed, rejected)
        path.append(accepted)
    return path, None


class Level:
    """A node on the current path of `traversal`, with the state that rejections below it change."""

    def __init__(self, tree, node, alpha):
        self.node, self.alpha, self.p = node, alpha, None
        self.children, self.removed, self.rejected = tree.children(node, once=True), [], False

    def reject(self, token, q):
        """Update p and alpha after the child `token`, drawn from q, was deleted."""
        self.p, total = excess(self.p, q, self.alpha)
        if total > 0:
            # 1 - alpha first, so that alpha = 1 stays exactly 1.
            self.alpha = total / (total + (1 - self.alpha))
        elif self.node != 0:
            self.alpha = 0.0
        self.removed.append(token)


def traversal(tree, choice, replacement=False):
    """Traversal verification (2505.12398), from the leaves to the root; on a chain, block verification (2403.10444).

    Each node on the way down has a weight alpha(child) = min(1, alpha p(x) / q(x)), 1 at node 0. The first leaf is
    accepted, with its whole path, with probability alpha. Otherwise it is deleted, and at its parent, with
    S = sum (alpha p - q)+: p becomes norm((alpha p - q)+), alpha becomes S / (S + 1 - alpha) except at node 0, and
    without replacement q loses x. A node without children left is a leaf.

    A child of weight 0 is deleted without a look at what is below it: no descendant could be accepted.
    """
    levels = [Level(tree, 0, 1.0)]
    drawn_from = {}
    while True:
        level = levels[-1]
        child = next(level.children, None)
        if child is None:
            if len(levels) == 1 or choice.coin(level.node, 1.0, level.alpha):
                path = [above.node for above in levels]
                if tree.ends(level.node):
                    return path, None
                p = tree.target(level.node) if level.p is None else level.p
                return path, finish(tree, choice, level.node, p, level.removed, level.rejected)
            levels.pop()
            levels[-1].rejected = True
            levels[-1].reject(tree.token(level.node), drawn_from[level.node])
            continue
        if not tree.possible(child):
            level.rejected = True
            continue
        token = tree.token(child)
        level.p = tree.target(level.node) if level.p is None else level.p
        q = proposal_left(tree, child, level.removed, replacement)
        if q is None:
            if not tree.own_proposals:
                level.children = iter(())
        elif is_impossible(tree, child, level.removed, replacement):
            level.rejected = True
            tree.flag(DRAFT_TOKEN_IMPOSSIBLE)
        else:
            weight, proposed = level.alpha * float(level.p[token]), float(q[token])
            alpha = weight / proposed if weight < proposed else float(weight > 0)
            if alpha > 0:
                drawn_from[child] = q
                levels.append(Level(tree, child, alpha))
            else:
                level.rejected = True
                level.reject(token, q)


def target_only(tree, choice, single=1.0, accumulated=1.0):
    """SGLang's target-only rule: one coin per level against the target's mass of the distinct children tried so far.

    It is lossless if children are functions of their prefix and both thresholds are 1. A child is also accepted if
    its own probability is at least `single`; the coin is multiplied by `accumulated`.
    """
    path = [0]
    while not tree.ends(path[-1]):
        node, p, tried, rejected, accepted = path[-1], tree.target(path[-1]), [], False, None
        mass = 0.0
        for child in tree.children(node):
            if not tree.possible(child):
                rejected = True
                continue
            token = tree.token(child)
            if token in tried:
                continue
            mass += float(p[token])
            sure = p[token] > 0 and p[token] >= single
            if sure or choice.coin(node, accumulated, mass, level=True):
                accepted = child
                break
            rejected = True
            tried.append(token)
        if accepted is None:
            left = p.clone()
            left[tried] = 0
            return path, finish(tree, choice, node, left, tried, rejected)
        path.append(accepted)
    return path, None


def kseq(tree, choice):
    """K-SEQ (SpecTr, 2310.15141): K siblings drawn with replacement, tested with one and the same scaled ratio.

    A child x is accepted with probability min(1, p(x) / (rho q(x))). The residual p - g min(q, p / rho) is exact for
    every rho that is large enough, of which the least accepts most.
    """
    path = [0]
    while not tree.ends(path[-1]):
        node, rejected, accepted = path[-1], False, None
        p, children = tree.target(node), list(tree.children(node))
        left, factor = p, None
        for child in children:
            if not tree.possible(child):
                rejected = True
                continue
            q, token = tree.proposal(child), tree.token(child)
            if q is None:
                break
            if factor is None:
                factor = kseq_factor(p, q, len(children))
                left = kseq_residual(p, q, factor, len(children))
            rejected = True
            if is_impossible(tree, child, [], True):
                tree.flag(DRAFT_TOKEN_IMPOSSIBLE)
            elif choice.coin(child, factor * float(q[token]), float(p[token])):
                accepted = child
                break
        if accepted is None:
            return path, finish(tree, choice, node, left, [], rejected)
        path.append(accepted)
    return path, None


def kseq_factor(p, q, count: int) -> float:
    """An upper bound, 2^-12 from it, of the rho in [1, count] with 1 - (1 - beta)^count = rho beta."""
    low, high = 1.0, float(count)
    while high - low > low * 2.0**-12:
        middle = (low + high) / 2
        beta = min(1.0, float(torch.minimum(q, p / middle).sum()))
        if beta * kseq_gain(beta, count) > middle * beta:
            low = middle
        else:
            high = middle
    return high


def kseq_gain(beta: float, count: int) -> float:
    """(1 - (1 - beta)^count) / beta as the sum that it is: no difference, however small beta is."""
    return sum((1 - beta) ** number for number in range(count))


def kseq_residual(p, q, factor: float, count: int):
    """Weights of the next token when all children were rejected."""
    accepted = torch.minimum(q, p / factor)
    return (p - kseq_gain(min(1.0, float(accepted.sum())), count) * accepted).clamp(min=0)


def typical(tree, choice, epsilon=0.3, delta=0.09):
    """Medusa's typical acceptance (2401.10774): lossy.

    A node is accepted with its parent if p(x) > min(epsilon, delta exp(-H(p))). The deepest accepted node wins; among
    equals the greatest product of probabilities on the path, then the lowest node. The next token is drawn from the
    tokens that pass the same threshold.
    """

    def threshold(p):
        return min(epsilon, delta * float(torch.exp(torch.special.entr(p).sum())) ** -1)

    parents, logs = {0: None}, {0: 0.0}
    reached = [0]
    for node in reached:  # grows while it is read
        children = list(tree.children(node, once=True))
        least = threshold(tree.target(node)) if children else None
        for child in children:
            p = tree.target(node)
            if tree.possible(child) and p[tree.token(child)] > least:
                parents[child] = node
                logs[child] = logs[node] + float(torch.log(p[tree.token(child)]))
                reached.append(child)
    end = min(reached, key=lambda node: (-tree.depth(node), -logs[node], node))
    if tree.ends(end):
        return path_to(end, parents), None
    p = tree.target(end)
    left = torch.where(p > threshold(p), p, 0.0)
    return path_to(end, parents), finish(tree, choice, end, left, [], False)


def longest_path(tree, choice, roots, width):
    """Improved MCSD's rule for a forest whose roots were drawn from the target (2409.10644): lossy.

    Every other node is tested on its own, with probability min(1, p(x) / q(x)) and never updated p and q. The deepest
    node whose whole path passed wins, the lowest among equals. `width` next tokens are drawn without replacement: from
    norm((p - q)+) if the winner has children, from p if it has none, or if it is a root: then it is node 0. From p
    every possible token can be drawn. A difference has no logarithm to go by: from (p - q)+ tokens whose weight is 0 in
    the arithmetic used (here float64, in kernels float32) are not drawn.

    Returns:
        The path from the winner's root, and a list of next tokens or None.
    """
    parents = dict.fromkeys(roots)
    reached = list(roots)
    for node in reached:
        for child in tree.children(node, once=True):
            if not tree.possible(child):
                continue
            p, token = tree.target(node), tree.token(child)
            q = proposal_left(tree, child, [], True)
            if q is None:
                continue
            if is_impossible(tree, child, [], True):
                tree.flag(DRAFT_TOKEN_IMPOSSIBLE)
            elif choice.coin(child, float(q[token]), float(p[token])):
                parents[child] = node
                reached.append(child)
    end = min(reached, key=lambda node: (-tree.depth(node), node))
    path = path_to(end, parents)
    if tree.ends(end):
        return path, None
    logs, domain = tree.target_logs(end), BONUS
    child = next(tree.children(end), None)
    if parents[end] is not None and child is not None:
        q = None if tree.one_hot else tree.proposal(child)
        if q is not None:
            left, domain = (tree.target(end) - q).clamp(min=0), RESIDUAL
            if float(left.sum()) > 0:
                logs = left.log()
            else:
                tree.flag(RESIDUAL_EMPTY)
    return path, choice.draw_many(logs, domain, end, width)


def path_to(node, parents):
    """The nodes from a root to `node`."""
    path = []
    while node is not None:
        path.insert(0, node)
        node = parents[node]
    return path
