"""Wrong acceptance rules, each of them shipped or proposed somewhere: the enumeration has to tell them apart.

They have the interface of reference_rules. Most are the right rule with one function replaced.
"""

from unittest.mock import patch

import torch

from specdec_ops.ops.acceptance import reference_philox
from specdec_ops.ops.acceptance import reference_rules as rules
from specdec_ops.ops.acceptance.reference_rules import excess, finish, proposal_left


def with_replaced(rule, **functions):
    """The rule with some functions of reference_rules replaced."""

    def mutant(tree, choice):
        with patch.multiple(rules, **functions):
            return rule(tree, choice)

    return mutant


def without_replacement(tree, choice):
    return rules.recursive(tree, choice, replacement=False)


def with_replacement(tree, choice):
    return rules.recursive(tree, choice, replacement=True)


def proposal_not_normalised(tree, child, removed, replacement):
    """A proposal without its removed tokens that sums to less than 1."""
    proposal = tree.proposal(child).clone()
    proposal[removed] = 0
    return proposal


def proposal_of_candidates(tree, child, removed, replacement):
    """MCSD at draft temperature 0: the softmax over the k greatest logits, which were not drawn at all."""
    parent = int(tree.problem.tree.parents[child])
    tokens = [tree.token(sibling) for sibling in tree.siblings[parent]]
    proposal = torch.zeros_like(tree.proposal(child))
    proposal[tokens] = tree.proposal(child)[tokens]
    proposal[removed] = 0
    return proposal / proposal.sum()


def proposal_at_another_temperature(tree, child, removed, replacement):
    """HF #47932: the rule is told another q than the one that children were drawn from."""
    proposal = tree.proposal(child) ** 2
    return proposal / proposal.sum()


def target_not_updated(replacement):
    """TensorRT-LLM before #15098: each sibling is tested against the first p, and one residual is left at the end."""

    def mutant(tree, choice):
        path = [0]
        while True:
            p, removed, accepted = tree.target(path[-1]), [], None
            left = p
            for child in tree.children(path[-1]):
                q = proposal_left(tree, child, removed, replacement)
                if choice.coin(child, float(q[tree.token(child)]), float(p[tree.token(child)])):
                    accepted = child
                    break
                removed.append(tree.token(child))
                left = excess(p, tree.proposal(child))[0]
            if accepted is None:
                return path, finish(tree, choice, path[-1], left, removed, bool(removed))
            path.append(accepted)

    return mutant


def target_only_with(deduplicate=True, cap=None, reuse=False):
    """target_only with a fault: repeats counted twice, a bounded list of exclusions, or its coin used once more."""

    def mutant(tree, choice):
        path = [0]
        while True:
            node, p, tried, mass, accepted = path[-1], tree.target(path[-1]), [], 0.0, None
            for child in tree.children(node):
                token = tree.token(child)
                if deduplicate and token in tried:
                    continue
                mass += float(p[token])
                if choice.coin(node, 1.0, mass, level=True):
                    accepted = child
                    break
                tried.append(token)
            if accepted is None:
                left = p.clone()
                left[tried[:cap]] = 0
                if reuse:
                    return path, choice.reuse(left, node, level=True)
                return path, finish(tree, choice, node, left, tried, bool(tried))
            path.append(accepted)

    return mutant


def finish_with_the_coin(tree, choice, node, left, removed, rejected):
    """The residual is drawn with the coin of the last rejected child."""
    tested = [child for child, _ in choice.coins if tree.claimed[child] == node]
    return choice.reuse(left, tested[-1]) if rejected else choice.draw(left, reference_philox.BONUS, node)


def finish_with_the_row_above(tree, choice, node, left, removed, rejected):
    """The bonus token comes from the row of the last accepted token's parent."""
    return finish(tree, choice, node, left if rejected or node == 0 else tree.target(tree.claimed[node]), [], rejected)


class UnscaledResidual(rules.Level):
    """Block verification whose correction is drawn from (p - q)+ instead of (alpha p - q)+."""

    def reject(self, token, q):
        p, alpha = self.p, self.alpha
        super().reject(token, q)
        self.p = excess(p, q)[0] if alpha < 1 else self.p


class SimpleRatio(rules.Level):
    """A public port of traversal verification: alpha becomes min(1, S / sum of q without the token)."""

    def reject(self, token, q):
        total = excess(self.p, q, self.alpha)[1]
        super().reject(token, q)
        if self.node != 0:
            left = float(q.sum()) - float(q[token])
            self.alpha = min(1.0, total / left) if left > 0 else 0.0


class FirstFailure(rules.Level):
    """Block verification whose weight is not what is left after a rejection: alpha stays as it was."""

    def reject(self, token, q):
        alpha = self.alpha
        super().reject(token, q)
        self.alpha = alpha


# name: (mutant, the right rule, problems as arguments of accept_laws.problems)
MUTANTS = {
    "without replacement, q not normalised": (
        with_replaced(without_replacement, proposal_left=proposal_not_normalised),
        without_replacement,
        (["star 2", "2x2"], ["without"]),
    ),
    "without replacement, p not updated": (
        target_not_updated(False),
        without_replacement,
        (["star 2", "2x2"], ["without"]),
    ),
    "with replacement, p not updated": (target_not_updated(True), with_replacement, (["star 2", "2x2"], ["with"])),
    "without replacement scored as with": (with_replacement, without_replacement, (["star 2", "2x2"], ["without"])),
    "target_only, repeats counted twice": (
        target_only_with(deduplicate=False),
        rules.target_only,
        (["star 2", "2x2"], ["duplicates"]),
    ),
    "target_only, capped exclusions": (target_only_with(cap=1), rules.target_only, (["star 2", "2x2"], ["functions"])),
    "target_only, final draw with the same coin": (
        target_only_with(reuse=True),
        rules.target_only,
        (["chain 1", "chain 2"], ["functions"]),
    ),
    "token, final draw with the same coin": (
        with_replaced(without_replacement, finish=finish_with_the_coin),
        without_replacement,
        (["chain 1", "2x2"], ["without"]),
    ),
    "draft at temperature 0 scored with its best k": (
        with_replaced(without_replacement, proposal_left=proposal_of_candidates),
        without_replacement,
        (["star 2", "2x2"], ["functions"]),
    ),
    "q of another temperature": (
        with_replaced(without_replacement, proposal_left=proposal_at_another_temperature),
        without_replacement,
        (["chain 1", "chain 2"], ["without"]),
    ),
    "bonus from the wrong row": (
        with_replaced(without_replacement, finish=finish_with_the_row_above),
        without_replacement,
        (["chain 1", "2x2"], ["without"]),
    ),
    "block, residual unscaled": (
        with_replaced(rules.traversal, Level=UnscaledResidual),
        rules.traversal,
        (["chain 2", "chain 3"], ["with"]),
    ),
    "traversal, simple ratio": (
        with_replaced(rules.traversal, Level=SimpleRatio),
        rules.traversal,
        (["1x2", "2x2"], ["without"]),
    ),
    "traversal, weight kept after a rejection": (
        with_replaced(rules.traversal, Level=FirstFailure),
        rules.traversal,
        (["chain 2", "2x2"], ["without"]),
    ),
    "kseq, factor 1": (
        with_replaced(rules.kseq, kseq_factor=lambda p, q, count: 1.0),
        rules.kseq,
        (["star 2", "2x2"], ["with"]),
    ),
}


def one_round(count, domains, p, q):
    """Counts of the first emitted token in `count` rounds with one drafted token, seeds 0, 1, ...: int64 [vocab].

    Args:
        count: rounds.
        domains: of the draft's race, of the coin and of the residual's race, as counter words.
        p: the target, float64 [vocab].
        q: the draft.
    """
    draft, coin, residual = domains
    vocab, seeds = len(p), torch.arange(count)

    def words(domain):
        quads = [reference_philox.philox((quad, 7, domain, 0), (seeds, seeds >> 32)) for quad in range(-(-vocab // 4))]
        return torch.stack([word for quad in quads for word in quad], dim=-1)[:, :vocab]

    drafted = (q / reference_philox.exponentials_of(words(draft))).argmax(dim=-1)
    accepted = reference_philox.coins_of(words(coin)[:, 0]) * q[drafted] < p[drafted]
    corrected = ((p - q).clamp(min=0) / reference_philox.exponentials_of(words(residual))).argmax(dim=-1)
    return torch.where(accepted, drafted, corrected).bincount(minlength=vocab)
