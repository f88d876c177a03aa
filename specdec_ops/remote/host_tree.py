"""`HostTree`: a tree of tokens in plain Python, as it travels and as the client looks into it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from specdec_ops.drafts.base import Drafted


class HostTree(NamedTuple):
    """A tree of tokens; node 0 is the text's last one, and a parent comes before its children."""

    tokens: list[int]
    parents: list[int]

    @classmethod
    def chain(cls, tokens: Sequence[int]) -> HostTree:
        """One token after another."""
        return cls(list(tokens), list(range(-1, len(tokens) - 1)))

    @classmethod
    def of(cls, drafted: Drafted) -> HostTree:
        """What was drafted for a single request, nodes that came to nothing (-1) included."""
        tokens, parents = drafted.tokens[0].tolist(), drafted.topology.parents[0].tolist()
        count = int(drafted.topology.num_nodes[0])
        return cls(tokens[:count], parents[:count])

    def first(self, nodes: int) -> HostTree:
        """Its first nodes that have a token. They are a tree too: what follows a node without one has none either."""
        place: dict[int, int] = {}
        for node, (token, parent) in enumerate(zip(self.tokens, self.parents, strict=True)):
            if token >= 0 and (parent in place or node == 0) and len(place) < nodes:
                place[node] = len(place)
        return HostTree([self.tokens[n] for n in place], [place.get(self.parents[n], -1) for n in place])

    def walk(self, tokens: Sequence[int]) -> list[int]:
        """The nodes that these tokens lead to from node 0, which comes first; as far as there are any."""
        before: dict[int, int] = {}
        level = [0]
        for token in tokens:
            above = set(level)
            found = [n for n, p in enumerate(self.parents) if p in above and self.tokens[n] == token]
            if not found:
                break
            before |= {node: self.parents[node] for node in found}
            level = found
        path = [level[0]]
        while path[-1] in before:
            path.append(before[path[-1]])
        return path[::-1]

    def likeliest(self) -> list[int]:
        """Tokens along the first children, which are those that the draft is surest of, or has drawn."""
        first: dict[int, int] = {}
        for node, parent in enumerate(self.parents):
            first.setdefault(parent, node)
        tokens, node = [], 0
        while node in first and self.tokens[first[node]] >= 0:
            node = first[node]
            tokens.append(self.tokens[node])
        return tokens

    def below(self, node: int) -> HostTree:
        """The part of which this node is the root."""
        place = {node: 0}
        for other in range(node + 1, len(self.tokens)):
            if self.parents[other] in place:
                place[other] = len(place)
        return HostTree([self.tokens[n] for n in place], [-1 if n == node else place[self.parents[n]] for n in place])
