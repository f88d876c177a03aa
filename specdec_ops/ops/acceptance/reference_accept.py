"""The definition of greedy_accept, match_accept, chain_accept, tree_accept, typical_accept and longest_path_accept.

The rules are in reference_rules; here are the rows, the links, the noise and the outputs of one request after another.
All arithmetic is float64.
"""

import torch

from specdec_ops.status import AcceptStatus

from . import reference_philox, reference_rules
from .reference_sample import MINUS_INFINITY, law, ordered, settings_of, without


class Noise:
    """What is left to chance, decided by Philox. See reference.noise for the counters."""

    def __init__(self, seed: int, position: int, disturb=None):
        self.seed, self.position = seed, position
        self.disturb = disturb or (lambda values: values)

    def coin(self, node, left, right, *, level=False) -> bool:
        u = self.disturb(
            torch.tensor(reference_philox.coin(self.seed, self.position, node, level=level), dtype=torch.float64)
        )
        return float(u) * left < right

    def exponentials(self, vocab, domain, node):
        return self.disturb(reference_philox.exponentials(vocab, self.seed, self.position, domain, node))

    def draw(self, weights, domain, node) -> int:
        return reference_philox.race(weights, self.exponentials(len(weights), domain, node))

    def draw_many(self, logs, domain, node, count) -> list[int]:
        return reference_philox.first_of_race(logs, self.exponentials(len(logs), domain, node), count)

    def sample(self, weights, depth) -> int:
        drawn = reference_philox.exponentials(
            len(weights), self.seed, self.position + depth + 1, reference_philox.SAMPLE, 0
        )
        return reference_philox.race(weights, self.disturb(drawn))


class GreedyTop(Noise):
    """At temperature 0, next tokens are the greatest logits."""

    def __init__(self, logits):
        super().__init__(0, 0)
        self.logits = logits

    def draw_many(self, logs, domain, node, count) -> list[int]:
        row = self.logits[node].double().cpu()
        valid = bool((row < float("inf")).all()) and bool((row > MINUS_INFINITY).any())
        return ordered(row, count) if valid else [reference_philox.lowest_argmax(logs)]


class Links:
    """Tokens and sound links of one request's tree. Nothing in them can lead in a circle or out of the tree."""

    def __init__(self, tokens, first_child, next_sibling, num_nodes, vocab, eos, max_depth):
        self.tokens, self.first_child, self.next_sibling = tokens, first_child, next_sibling
        self.columns = len(tokens) + 1 if first_child is None else len(tokens)
        self.vocab, self.eos, self.max_depth = vocab, eos, max_depth
        self.status, self.depths, self.claimed = 0, {0: 0}, {}
        if not 1 <= num_nodes <= self.columns:
            self.flag(AcceptStatus.TREE_INVALID)
        self.num_nodes = min(max(num_nodes, 1), self.columns)

    def flag(self, bit):
        self.status |= bit

    def token(self, node):
        """A chain has no token for node 0, which is the last committed one."""
        return self.tokens[node - 1] if self.first_child is None else self.tokens[node]

    def depth(self, node):
        return self.depths[node]

    def ends(self, node):
        """Whether the node is a drafted (for forests: or root) token that ends the sequence."""
        return node in self.claimed and self.token(node) in self.eos

    def possible(self, child):
        sound = 0 <= self.token(child) < self.vocab
        if not sound:
            self.flag(AcceptStatus.DRAFT_TOKEN_IMPOSSIBLE)
        return sound

    def follow(self, node, link):
        """The node that a link of `node` leads to, or None. A slice of a tree leads past its end: that is no error."""
        if link < -1 or -1 < link <= node or link >= self.columns:
            self.flag(AcceptStatus.TREE_INVALID)
            return None
        return None if link == -1 or link >= self.num_nodes else link

    def roots(self):
        """Node 0 and its siblings: the roots of a forest. One that is no token is left out, but not node 0."""
        node = 0
        while node is not None:
            padding = self.token(node) == -1  # of node 0 alone, see below
            if padding or self.possible(node) or node == 0:
                self.depths[node], self.claimed[node] = 0, None
                yield node
            node = self.follow(node, self.next_sibling[node])
            node = None if node is not None and self.token(node) == -1 else node

    def children(self, node, once=False):
        if self.depths[node] >= self.max_depth or self.ends(node):
            return
        chain = self.first_child is None
        child = self.follow(
            node, node + 1 if chain and node + 1 < self.columns else -1 if chain else self.first_child[node]
        )
        while child is not None and self.token(child) != -1:
            if once and self.claimed.get(child, node) != node:
                self.flag(AcceptStatus.TREE_INVALID)
                return
            self.claimed[child], self.depths[child] = node, self.depths[node] + 1
            yield child
            child = None if chain else self.follow(child, self.next_sibling[child])


class Request(Links):
    """One request as the rules see it: its links and, read when asked for, its rows as distributions."""

    def __init__(self, links, target, draft, target_to_draft, settings, draft_settings, own_proposals, disturb):
        super().__init__(*links)
        self.target_rows, self.draft_rows, self.target_to_draft = target, draft, target_to_draft
        self.settings, self.draft_settings = settings, draft_settings
        self.greedy = settings.greedy
        if settings.invalid or (draft is not None and not self.greedy and draft_settings.invalid):
            self.flag(AcceptStatus.SETTING_INVALID)
        # At temperature 0 every proposal is as good as another, and drafts need not be read.
        self.one_hot = draft is None or self.greedy
        self.own_proposals = own_proposals and not self.one_hot
        self.disturb = disturb
        self.laws = {}

    def target(self, node):
        return self.target_law(node).probabilities

    def target_logs(self, node):
        return self.target_law(node).logs

    def target_law(self, node):
        row = self.read(("target", node), self.target_rows, node, self.settings)
        if not row.valid:
            self.flag(AcceptStatus.TARGET_INVALID)
        return row

    def argmax(self, node):
        if self.target_rows.dim() == 1:  # given as ids
            return int(self.target_rows[node])
        return reference_philox.lowest_argmax(self.target(node))  # one-hot, see request_of

    def proposal(self, child, removed=()):
        row = self.draft_law(child)
        if not row.valid:
            self.flag(AcceptStatus.DRAFT_INVALID)
            return None
        if not removed:
            return self.of_target(row.probabilities, 0.0)
        return without(self.of_target(row.logs, MINUS_INFINITY), removed)

    def proposes(self, child, removed=()):
        token = self.token(child)
        return token not in removed and float(self.of_target(self.draft_law(child).logs, MINUS_INFINITY)[token]) > (
            MINUS_INFINITY
        )

    def draft_law(self, child):
        node = child if self.own_proposals else self.claimed[child]
        return self.read(("draft", node), self.draft_rows, node, self.draft_settings)

    def of_target(self, values, unknown):
        """A draft row's values by the ids of the target."""
        if self.target_to_draft is None:
            return values
        entries = self.target_to_draft
        known = (entries >= 0) & (entries < len(values))
        return torch.where(known, values[entries.where(known, 0)], unknown)

    def read(self, key, rows, node, settings):
        if key not in self.laws:
            self.laws[key] = law(rows[node].cpu(), settings, self.disturb)
        return self.laws[key]


def accept(arguments, outputs) -> None:
    """Write what one round of speculative decoding accepts, one request after another.

    The arguments and outputs: specdec_ops/ops/acceptance/contract.py.
    """
    rule, tokens, nodes = arguments.rule, outputs.tokens, outputs.nodes
    next_tokens = outputs.next_tokens.view(len(tokens), -1)
    for output in (tokens, nodes, next_tokens):
        output.fill_(-1)
    for index in range(len(tokens)):
        tree, choice = request_of(index, arguments, outputs, None)
        path, following = walk(
            rule, tree, choice, arguments.thresholds, arguments.replacement, width=next_tokens.shape[1]
        )
        drafted = path if rule == "longest" else path[1:]
        emitted = [tree.token(node) for node in drafted]
        if rule != "longest" and following is not None:
            emitted.append(following[0])
        tokens[index, : len(emitted)] = torch.tensor(emitted, dtype=torch.int32)
        nodes[index, : len(path)] = torch.tensor(path, dtype=torch.int32)
        outputs.num_accepted[index] = len(drafted)
        if following is not None:
            next_tokens[index, : len(following)] = torch.tensor(following, dtype=torch.int32)
        outputs.status[index] = tree.status
        outputs.finished[index] = bool(emitted) and emitted[-1] in tree.eos


def request_of(index, arguments, outputs, disturb):
    """One request's tree and noise. Of the outputs the shapes count."""

    def of_request(tensor):
        return None if tensor is None else tensor[index if len(tensor) > 1 else 0]

    def number(name):
        tensor = getattr(arguments, name + "s")
        return getattr(arguments, name) if tensor is None else int(tensor[index])

    def settings(prefix):
        names = ("temperature", "temperatures", "top_k", "top_ks", "top_p", "top_ps")
        return settings_of(index, *(getattr(arguments, prefix + name) for name in names))

    def links(tensor):
        return None if tensor is None else of_request(tensor).tolist()

    target, draft, mapping = arguments.target, arguments.draft_logits, arguments.target_to_draft
    vocab = 2**31 if target.dim() == 2 else target.shape[-1]  # ids tell nothing of the vocabulary
    tree = Request(
        (
            arguments.draft_tokens[index].tolist(),
            links(arguments.first_child),
            links(arguments.next_sibling),
            int(of_request(arguments.num_nodes)),
            vocab,
            arguments.eos,
            outputs.tokens.shape[1] - 1,
        ),
        target[index],
        None if draft is None else draft[index],
        None if mapping is None else mapping.cpu().long(),
        settings("")._replace(temperature=0.0) if arguments.rule == "greedy" else settings(""),
        settings("draft_"),
        arguments.child_rows,
        disturb,
    )
    choice = Noise(number("seed"), number("position"), disturb)
    if arguments.rule == "longest" and tree.greedy:
        choice = GreedyTop(target[index])
    return tree, choice


def walk(rule, tree, choice, thresholds, replacement, width):
    """Run one rule. Returns the accepted path and a list of next tokens, or None after an end of sequence."""
    if rule == "longest":
        return reference_rules.longest_path(tree, choice, list(tree.roots()), width)
    if rule == "greedy" or (rule == "kseq" and tree.greedy):
        path, following = reference_rules.greedy(tree, choice)
    elif rule in ("recursive", "traversal"):
        path, following = getattr(reference_rules, rule)(tree, choice, replacement)
    elif rule in ("target_only", "typical"):
        path, following = getattr(reference_rules, rule)(tree, choice, *thresholds)
    else:
        path, following = getattr(reference_rules, rule)(tree, choice)
    return path, None if following is None else [following]


def margins(arguments, outputs, relative=(1e-6, 1e-5, 1e-4, 1e-3), trials: int = 4, generator=None) -> torch.Tensor:
    """How near each request came to another result, for comparing kernels decision by decision.

    Every weight, coin and exponential is disturbed by a random relative error, and the request is decided again.

    Args:
        arguments: those of `accept`.
        outputs: the same. They are only read for their shapes.
        relative: sizes of the errors, ascending.
        trials: decisions at each size.
        generator: of the errors.

    Returns:
        float64 [batch]: the smallest of `relative` at which some trial came out differently, or inf.
    """

    def outcome(index, disturb):
        tree, choice = request_of(index, arguments, outputs, disturb)
        width = outputs.next_tokens[index].numel()
        return walk(arguments.rule, tree, choice, arguments.thresholds, arguments.replacement, width)

    def disturbed(size):
        def disturb(values):
            noise_of = torch.rand(values.shape, dtype=torch.float64, generator=generator)
            return values * (1 + size * (2 * noise_of - 1))

        return disturb

    found = []
    for index in range(len(outputs.tokens)):
        exact = outcome(index, None)
        changed = (size for size in relative for _ in range(trials) if outcome(index, disturbed(size)) != exact)
        found.append(next(changed, float("inf")))
    return torch.tensor(found, dtype=torch.float64)
