"""`Batch`: what a round knows of its requests, as tensors."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch

from specdec_ops.ops.acceptance.sample import sample_tokens
from specdec_ops.vocab_map import VocabMap

from .cache import Cache
from .request import Request


@dataclasses.dataclass(frozen=True)
class Law:
    """The settings of the requests' distributions, in the order of the batch: tensors [batch], or a number for all.

    `noise` and `filters` are the keywords of the acceptance and sampling ops.
    """

    seeds: torch.Tensor
    """int64 [batch]"""
    temperature: torch.Tensor | float
    top_k: torch.Tensor | int
    top_p: torch.Tensor | float
    log_min_p: torch.Tensor | None
    """float32 [batch, 1, 1]: the log of min_p times the temperature, or None: off for all"""
    is_greedy: bool
    """whether all temperatures are 0"""

    @classmethod
    def of(cls, requests: list[Request], device: torch.device) -> Law:
        """Of the requests' settings."""
        asked = [request.sampling for request in requests]

        def shared(name: str, dtype: torch.dtype):
            values = [getattr(sampling, name) for sampling in asked]
            return values[0] if len(set(values)) == 1 else torch.tensor(values, dtype=dtype).to(device)

        seeds = [sampling.seed - 2**64 if sampling.seed >= 2**63 else sampling.seed for sampling in asked]
        log_min_p = None
        if any(sampling.min_p > 0 for sampling in asked):
            cuts = [s.temperature * math.log(s.min_p) if s.min_p > 0 else -math.inf for s in asked]
            log_min_p = torch.tensor(cuts, dtype=torch.float32).view(-1, 1, 1).to(device)
        return cls(
            torch.tensor(seeds, dtype=torch.int64).to(device),
            shared("temperature", torch.float32),
            shared("top_k", torch.int32),
            shared("top_p", torch.float32),
            log_min_p,
            all(sampling.temperature == 0 for sampling in asked),
        )

    def part(self, index: torch.Tensor) -> Law:
        """Of some of the requests, int64 [part]. `is_greedy` stays that of all."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        chosen = {n: v.index_select(0, index) if isinstance(v, torch.Tensor) else v for n, v in fields.items()}
        return Law(**chosen)

    @property
    def filters(self) -> dict:
        """temperature, top_k and top_p."""
        return {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}

    def without_improbable(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits [batch, nodes, vocab] in which tokens below min_p are -inf."""
        if self.log_min_p is None:
            return logits
        least = logits.amax(dim=-1, keepdim=True) + self.log_min_p.to(logits.dtype)
        return logits.masked_fill(logits < least, -math.inf)

    def logprobs(self, logits: torch.Tensor) -> torch.Tensor:
        """The natural logs of the probabilities that tokens are drawn with: float32 [batch, rows, vocab].

        Of logits [batch, rows, vocab] without the improbable ones. Greedy requests report those of temperature 1.
        """
        logits = logits.float()
        temperature = torch.as_tensor(self.temperature, dtype=torch.float32, device=logits.device).reshape(-1, 1, 1)
        logits = logits / temperature.where(temperature > 0, 1.0)
        sampled = (temperature > 0).expand(len(logits), 1, 1)
        return torch.where(sampled, _keep_top_p(_keep_top_k(logits, self.top_k), self.top_p), logits).log_softmax(-1)


def _keep_top_k(logits: torch.Tensor, top_k) -> torch.Tensor:
    if not isinstance(top_k, torch.Tensor) and top_k == 0:
        return logits
    vocab = logits.shape[-1]
    kept = torch.as_tensor(top_k, device=logits.device).long().reshape(-1, 1, 1).expand(len(logits), logits.shape[1], 1)
    kept = torch.where((kept <= 0) | (kept > vocab), vocab, kept)
    order = logits.sort(dim=-1, descending=True, stable=True).indices
    rank = torch.empty_like(order).scatter_(-1, order, torch.arange(vocab, device=logits.device).expand_as(order))
    return logits.masked_fill(rank >= kept, -math.inf)


def _keep_top_p(logits: torch.Tensor, top_p) -> torch.Tensor:
    if not isinstance(top_p, torch.Tensor) and top_p >= 1:
        return logits
    share = torch.as_tensor(top_p, dtype=torch.float32, device=logits.device).reshape(-1, 1, 1)
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    probabilities = ordered.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    dropped = (before >= share) & (share < 1)
    dropped[..., 0] = False
    return logits.masked_fill(torch.zeros_like(dropped).scatter_(-1, order, dropped), -math.inf)


class Batch:
    """The requests of a round, all of which have but their last token in the target's cache.

    Attributes:
        requests: in the order of all tensors here.
        context_lens: int32 [batch]: slots in use, which is also the position of node 0 (and of all roots).
        page_table: int32 [batch, max_pages], of the target's cache.
        last_tokens: int32 [batch]: node 0 of trees with one root.
        law: the settings of their distributions.
        seconds: how long a round takes, its draft apart, by the rows of its pass. None: not known, or none of the
            draft's business, since with the rule the tree has a part in what is drawn.
    """

    def __init__(
        self, requests: list[Request], cache: Cache, law: Law, seconds: Callable[[int], float] | None = None
    ) -> None:
        self.seconds, self._cache = seconds, cache
        device = cache.device
        self.requests = requests
        lengths = [request.sequence.length for request in requests]
        self.context_lens = torch.tensor(lengths, dtype=torch.int32).to(device)
        self.page_table = cache.page_table([request.sequence for request in requests])
        self.last_tokens = torch.tensor([request.ids[-1] for request in requests], dtype=torch.int32).to(device)
        self.law = law

    def __len__(self) -> int:
        return len(self.requests)

    def part(self, places: list[int]) -> Batch:
        """Some of the requests."""
        index = torch.tensor(places).to(self.context_lens.device)
        part = Batch.__new__(Batch)
        part.requests = [self.requests[place] for place in places]
        for name in ("context_lens", "page_table", "last_tokens"):
            setattr(part, name, getattr(self, name).index_select(0, index))
        part.law, part._cache = self.law.part(index), self._cache
        return part

    def layer_kv(self, slots: torch.Tensor, places: torch.Tensor) -> torch.Tensor | None:
        """Keys and values of all layers of the target, [rows, layers, 2 * kv_heads * head_dim].

        None if the target is elsewhere.

        Args:
            slots: int32 or int64 [rows], below the context length.
            places: like slots, the place of each row's request in the batch.
        """
        return self._cache.layer_kv(slots, places, self.page_table)

    @property
    def noise(self) -> dict:
        """seeds, and positions of node 0: keywords of acceptance and of `sample_children`."""
        return {"seeds": self.law.seeds, "positions": self.context_lens}

    def draw_as_target(
        self, logits: torch.Tensor, depth: int, count: int, vocab_map: VocabMap | None = None
    ) -> torch.Tensor:
        """`count` tokens for each row of logits [batch, rows, vocab], with the noise of the target's own tokens.

        Whatever the target draws at this depth with the same logits is the first of them. With a vocab_map the rows are
        [batch, rows, draft_vocab], and the target's tokens that no entry stands for have a probability of 0.

        Returns:
            int32 [batch, rows, count]; -1 where there are fewer tokens.
        """
        if vocab_map is not None:
            rows = logits.new_full((*logits.shape[:2], vocab_map.vocab), -math.inf)
            logits = rows.index_copy_(2, vocab_map.draft_to_target.long(), logits)
        batch, rows, vocab = logits.shape

        def of_rows(value):
            return value.repeat_interleave(rows) if isinstance(value, torch.Tensor) else value

        drawn = sample_tokens(
            logits.reshape(batch * rows, vocab),
            seeds=of_rows(self.law.seeds),
            positions=of_rows(self.context_lens + depth),
            count=count,
            **{name: of_rows(value) for name, value in self.law.filters.items()},
        )
        return drawn.view(batch, rows, count)
