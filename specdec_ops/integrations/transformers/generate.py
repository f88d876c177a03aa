"""`tree_decode`: speculative decoding inside `model.generate`, with Hugging Face's own processors and criteria."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

import torch

from specdec_ops.decode.batch import Batch
from specdec_ops.decode.decoder import Decoder
from specdec_ops.decode.engine import Engine
from specdec_ops.decode.request import Request, State
from specdec_ops.decode.sampling import Sampling
from specdec_ops.drafts.base import Draft, Drafted
from specdec_ops.drafts.ngram import Ngram
from specdec_ops.ops.acceptance.accept import Acceptance

from .load import load

if TYPE_CHECKING:
    from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList

_OP = "integrations.transformers.tree_decode"
_ENDLESS = 2**30
_decoders: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def tree_decode(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    draft: Draft | None = None,
    decoder: Decoder | None = None,
    stream_to=None,
    **model_kwargs,
) -> torch.Tensor:
    """A loop with drafts for `generate`: `model.generate(..., custom_generate=tree_decode, draft=Chain(...))`.

    The target's row of every node on the accepted path goes through the logits processors with the text before it, a
    token is taken or drawn from it as `generate` does, and where a drafted node has the same token the walk goes on
    there. So greedy answers are those of `generate` (but for near-ties of logits, which another order of sums may
    decide otherwise), sampled ones have its law, and with a batch of one they follow the same random numbers. Stopping
    criteria see the text after every single token.

    Args:
        model: of a family that `load` supports.
        input_ids: int64 [batch, length], padded on the left where attention_mask is 0.
        logits_processor: as `generate` prepares it.
        stopping_criteria: likewise; max_length and EOS are among them.
        generation_config: for do_sample, temperature and the padding token.
        draft: from `specdec_ops.drafts`; by default `Ngram()`.
        decoder: of the model, from `load`; made once for each model by default, from its weights as they are then.
        stream_to: a streamer. (`generate` keeps its own streamer from custom loops.) With a batch of one only.
        model_kwargs: attention_mask, and a cache that is empty, or of a batch of one: a dynamic or static one
            without sliding layers. It is read, and has the answer's keys and values afterwards.

    Returns:
        int64 [batch, length], the answers after the prompts, padded.

    Raises:
        ValueError: beams or outputs are asked for that this loop does not have, or a cache that it can't take.
    """
    _refuse(generation_config, model_kwargs, len(input_ids), stream_to)
    decoder = decoder or _decoders.get(model) or _decoders.setdefault(model, load(model))
    mask = model_kwargs.get("attention_mask")
    mask = torch.ones_like(input_ids) if mask is None else mask
    cache = model_kwargs.get("cache", model_kwargs.get("past_key_values"))
    engine = _Engine(
        decoder,
        Ngram() if draft is None else draft,
        logits_processor,
        stopping_criteria,
        generation_config,
        max_batch=len(input_ids),
    )
    temperature = float(generation_config.temperature or 1.0) if generation_config.do_sample else 0.0
    sampling = Sampling(temperature=temperature, max_tokens=_ENDLESS, eos=(), seed=torch.initial_seed() % 2**63)
    for row, seen in zip(input_ids, mask, strict=True):
        engine.add(row.tolist(), seen.bool().tolist(), sampling)
    if cache is not None and cache.get_seq_length() > 0:
        engine.adopt(cache)
    if stream_to is not None:
        stream_to.put(input_ids.cpu())
    while not engine.is_idle:
        for chunk in engine.step():
            for token in chunk.tokens if stream_to is not None else ():
                stream_to.put(torch.tensor([token]))
    if stream_to is not None:
        stream_to.end()
    if cache is not None and len(input_ids) == 1:
        engine.hand_over(cache)
    return _padded(input_ids, engine.answers, generation_config)


def _refuse(config: GenerationConfig, model_kwargs: dict, batch: int, stream_to) -> None:
    if (config.num_beams or 1) > 1:
        raise ValueError(f"specdec_ops.{_OP}: num_beams must be 1, got {config.num_beams}")
    for name in ("output_scores", "output_logits", "output_attentions", "output_hidden_states"):
        if config.return_dict_in_generate and getattr(config, name, None):
            raise ValueError(f"specdec_ops.{_OP}: {name} must be False, got True")
    if "inputs_embeds" in model_kwargs:
        raise ValueError(f"specdec_ops.{_OP}: inputs_embeds must not be given; prompts are token ids here")
    if stream_to is not None and batch != 1:
        raise ValueError(f"specdec_ops.{_OP}: stream_to must be None with a batch of {batch}")
    cache = model_kwargs.get("cache", model_kwargs.get("past_key_values"))
    if cache is not None and cache.get_seq_length() > 0:
        if batch != 1:
            raise ValueError(f"specdec_ops.{_OP}: the cache must be empty with a batch of {batch}")
        if any(getattr(layer, "is_sliding", False) for layer in cache.layers):
            raise ValueError(f"specdec_ops.{_OP}: the cache must be empty where it has sliding layers")


def _padded(input_ids: torch.Tensor, answers: list[list[int]], config: GenerationConfig) -> torch.Tensor:
    longest = max(map(len, answers))
    pad = config.pad_token_id if config.pad_token_id is not None else 0
    rows = torch.tensor([answer + [pad] * (longest - len(answer)) for answer in answers])
    return torch.cat((input_ids, rows.to(input_ids)), dim=1)


class _Engine(Engine):
    """Chooses tokens as `generate` does: processors, then argmax or a draw, then criteria."""

    def __init__(self, target, draft, processors, criteria, config, **options) -> None:
        super().__init__(target, draft, "match", **options)
        self._processors, self._criteria, self._do_sample = processors, criteria, config.do_sample
        self._added: list[Request] = []
        self._padding: dict[int, list[int]] = {}  # padding before the prompt, which processors see
        self._places: dict[int, int] = {}
        self._stopped: set[int] = set()
        self._last_pages: dict[int, list[int]] = {}
        self.scheduler.on_release = self._remember_pages

    def add(self, row: list[int], seen: list[bool], sampling: Sampling) -> None:
        """A prompt, of which `seen` tells what is no padding."""
        number = self.submit([token for token, there in zip(row, seen, strict=True) if there], sampling)
        self._added.append(self._requests[number])
        self._places[number] = len(self._places)
        self._padding[number] = [token for token, there in zip(row, seen, strict=True) if not there]

    @property
    def answers(self) -> list[list[int]]:
        return [request.tokens for request in self._added]

    def adopt(self, cache) -> None:
        """Take the keys and values of a cache that has the beginning of the only prompt."""
        request = self._added[0]
        length = min(int(cache.get_seq_length()), len(request.ids) - 1)
        pages = self.cache.pool.take(-(-length // self.cache.pool.page_size))
        slots = self._slots(pages, length)
        for layer, (k_cache, v_cache) in enumerate(zip(self.cache.k_caches, self.cache.v_caches, strict=True)):
            theirs = cache.layers[layer]
            for ours, given in ((k_cache, theirs.keys), (v_cache, theirs.values)):
                ours.view(-1, *ours.shape[2:])[slots] = given[0, :, :length].transpose(0, 1).to(ours.dtype)
        self.cache.pool.register(request.ids[:length], pages)  # admission finds whole pages
        self.cache.pool.drop(pages)

    def hand_over(self, cache) -> None:
        """Give a cache the keys and values of the only text that it does not have yet."""
        request = self._added[0]
        start, end = int(cache.get_seq_length()), len(request.ids) - 1
        slots = self._slots(self._last_pages[request.number], end)[start:]
        if not len(slots):
            return
        for layer, (k_cache, v_cache) in enumerate(zip(self.cache.k_caches, self.cache.v_caches, strict=True)):
            rows = (ours.view(-1, *ours.shape[2:])[slots].transpose(0, 1)[None] for ours in (k_cache, v_cache))
            cache.update(*rows, layer)

    def _slots(self, pages: list[int], length: int) -> torch.Tensor:
        size = self.cache.pool.page_size
        first = torch.tensor(pages, dtype=torch.int64)[:, None] * size
        return (first + torch.arange(size)).reshape(-1)[:length].to(self.cache.device)

    def _remember_pages(self, request: Request) -> None:
        self._last_pages[request.number] = list(request.sequence.pages)

    def _accept(
        self, draft: Draft | None, batch: Batch, logits: torch.Tensor, drafted: Drafted
    ) -> tuple[Acceptance, None]:
        walks = [
            self._walk(request, logits[place], *_children(drafted, place))
            for place, request in enumerate(batch.requests)
        ]
        longest = max(len(tokens) for tokens, _ in walks)

        def table(rows: list[list[int]]) -> torch.Tensor:
            padded = [row + [-1] * (longest - len(row)) for row in rows]
            return torch.tensor(padded, dtype=torch.int32).to(logits.device)

        counts = torch.tensor([len(tokens) - 1 for tokens, _ in walks], dtype=torch.int32).to(logits.device)
        tokens, nodes = (table([walk[part] for walk in walks]) for part in (0, 1))
        last = tokens.gather(1, counts.long()[:, None])[:, 0]
        sound = torch.zeros_like(counts)
        return Acceptance(tokens, nodes, counts, last, sound, sound.bool()), None

    def _walk(self, request: Request, logits: torch.Tensor, children: dict) -> tuple[list[int], list[int]]:
        """The tokens of a request's round, and the nodes that they were chosen at."""
        text = torch.tensor([self._padding[request.number] + request.ids]).to(logits.device)
        tokens, nodes, node = [], [], 0
        while node is not None:
            scores = self._scores(text, logits[node : node + 1].float(), self._places[request.number])
            token = int(torch.multinomial(scores.softmax(-1), 1) if self._do_sample else scores.argmax(-1))
            tokens.append(token)
            nodes.append(node)
            text = torch.cat((text, text.new_tensor([[token]])), dim=1)
            if bool(self._criteria(text, scores).all()):
                self._stopped.add(request.number)
                break
            node = children.get((node, token))
        return tokens, nodes

    def _scores(self, text: torch.Tensor, row: torch.Tensor, place: int) -> torch.Tensor:
        """A row after the processors. Some hold a setting for each prompt, so that a row must stand in its place."""
        batch = len(self._added)
        return self._processors(text.expand(batch, -1), row.expand(batch, -1).contiguous())[place : place + 1]

    def _take(self, requests, table, drafted, logprobs) -> list[int]:
        accepted = super()._take(requests, table, drafted, logprobs)
        for request in requests:
            if request.number in self._stopped and request.state is State.RUNNING:
                request.finish("stop")
        return accepted


def _children(drafted: Drafted, place: int) -> tuple[dict]:
    """(node, token) to the child of the node that has the token."""
    tokens = drafted.tokens[place].tolist()
    parents = drafted.topology.parents[place if drafted.topology.batch > 1 else 0].tolist()
    size = drafted.sizes[place] if drafted.sizes else len(tokens)
    found: dict[tuple[int, int], int] = {}
    for node in range(1, size):
        found.setdefault((parents[node], tokens[node]), node)
    return (found,)
