"""What is measured of acceptance: vocabularies, batches, trees and rules. Plain data."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from benchmarks.harness.cases import ITEM_BYTES, Case, Model, TreeShape, branching, chain, presets

VOCABULARIES = (32_000, 128_256, 151_936)

# Every tree has the last committed token as node 0: a published forest of n nodes is n + 1 nodes here.
CHAIN_5 = TreeShape("chain of 5", chain(6))
MCSD_44 = TreeShape("MCSD 4x2x2x1", branching(1, 4, 2, 2, 1))
MCSD_60 = TreeShape("MCSD 4x2x2x1x1", branching(1, 4, 2, 2, 1, 1))
MCSD_82 = TreeShape("improved MCSD 2x4x3x1x1", branching(1, 2, 4, 3, 1, 1))

CHAIN_RULES = ("token", "block")
TREE_RULES = ("greedy", "match", "recursive", "traversal", "target_only", "typical")
FILTERED = ("token", "recursive", "target_only")  # that are measured with top-p, too
OPS = tuple(
    f"accept {rule}{suffix}"
    for rule in (*CHAIN_RULES, *TREE_RULES)
    for suffix in (("", " top-p") if rule in FILTERED else ("",))
)
UNSAMPLED = ("greedy", "match", "target_only", "typical")  # their trees are made of the draft's most likely tokens


@dataclass(frozen=True)
class AcceptCase(Case):
    """One cell: a rule, a tree, a batch of requests and a vocabulary.

    What a call must read depends on what it accepts, so `bytes` is known only once the inputs are made: the target's
    rows on the accepted path and, for rules that compare, the draft's rows that score their children.
    With top_p below 1 the pipeline of today's engines competes too: softmax, top-p by sorting, then the walk.
    """

    rule: str
    vocab: int
    batch: int
    tree: TreeShape
    dtype: str
    top_p: float = 1.0
    compiled: bool = False
    modes: tuple[str, ...] = ("warm",)
    must_read: list[int] = field(default_factory=list, compare=False, repr=False)

    @property
    def op(self) -> str:
        return f"accept {self.rule}" + (" top-p" if self.top_p < 1 else "")

    @property
    def model(self) -> Model:
        return Model(f"vocabulary {self.vocab}", 0, 0, 0)

    @property
    def drafts(self) -> bool:
        """Whether the rule reads the draft's logits."""
        return self.rule in ("token", "block", "recursive", "traversal")

    @property
    def row_bytes(self) -> int:
        return self.vocab * ITEM_BYTES[self.dtype]

    @property
    def bytes(self) -> int:
        return self.must_read[0] if self.must_read else self.row_bytes * self.batch

    @property
    def memory(self) -> int:
        return self.batch * self.nodes * self.row_bytes * (2 if self.drafts else 1)

    @property
    def label(self) -> str:
        return f"{self.op} V{self.vocab} {self.dtype} b{self.batch} n{self.nodes} ({self.tree.name})"


def acceptance(rule: str, batch: int, tree: TreeShape | None = None, vocab: int = 128_256, **options) -> AcceptCase:
    tree = tree or (CHAIN_5 if rule in CHAIN_RULES else MCSD_60)
    return AcceptCase(rule, vocab, batch, tree, options.pop("dtype", "bf16"), **options)


def quick() -> list[AcceptCase]:
    """Half a minute: each rule once at batch 8, the main ones at the ends as well."""
    cases = [acceptance("greedy", batch) for batch in (1, 8, 64)]
    cases += [acceptance("token", batch) for batch in (1, 8, 64)] + [acceptance("block", 8)]
    cases += [acceptance(rule, 8) for rule in TREE_RULES[1:]]
    cases += [acceptance("recursive", 1), acceptance("recursive", 8, MCSD_44, 32_000, dtype="fp32")]
    return [*cases, acceptance("target_only", 8, top_p=0.9), acceptance("token", 8, dtype="fp32", compiled=True)]


def standard() -> list[AcceptCase]:
    """Every vocabulary, batch, tree and rule in bfloat16, and two lines through float32.

    PyTorch's compiler, which needs ten seconds for a tree's levels, takes chains everywhere and trees at batch 8.
    """
    cases = []
    for vocab in VOCABULARIES:
        for batch in (1, 8, 64):
            cases += [acceptance(rule, batch, vocab=vocab, compiled=True) for rule in CHAIN_RULES]
            cases += [acceptance(rule, batch, MCSD_60, vocab, compiled=batch == 8) for rule in TREE_RULES]
            cases += [acceptance("recursive", batch, tree, vocab, compiled=batch == 8) for tree in (MCSD_44, MCSD_82)]
            cases += [acceptance(rule, batch, vocab=vocab, top_p=0.9) for rule in FILTERED]
        cases += [acceptance(rule, 8, vocab=vocab, dtype="fp32", compiled=True) for rule in (*CHAIN_RULES, *TREE_RULES)]
    main = ("token", "greedy", "recursive")
    cases += [acceptance(rule, batch, dtype="fp32") for batch in (1, 64) for rule in main]
    return cases


def gpu_first() -> list[AcceptCase]:
    """Eight requests with a published tree."""
    return [acceptance(rule, 8) for rule in ("greedy", "recursive")]


PRESETS = presets(quick, standard, gpu_first)


def toy(rule: str = "recursive", **changes) -> AcceptCase:
    """A case of a few kilobytes, for tests."""
    tree = chain(4) if rule in CHAIN_RULES else branching(1, 2, 2)
    return replace(AcceptCase(rule, 97, 3, TreeShape("toy", tree), "fp32"), **changes)
