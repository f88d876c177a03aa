"""Byte-level language models with nothing to download: n-grams counted in the Python standard library's own sources.

One sort of all strings of eight bytes is the whole training: n-grams of a shorter order are leading parts of them, so
they are sorted too. A model of order n predicts a byte x from the n - 1 bytes h before it. Orders are interpolated as
Witten and Bell did (1991): with h' for h without its first byte, and types(h) for how many different bytes follow h,

    p_n(x | h) = (count(h x) + types(h) * p_{n-1}(x | h')) / (count(h) + types(h))

and order 0 is uniform. So every byte always has a positive probability.

A context is one integer that holds the last seven bytes. A tree of drafts costs one integer a node, and a batch of
contexts is a plain array.
"""

from __future__ import annotations

import sysconfig
from pathlib import Path

import numpy as np
import torch

VOCAB = 256
LONGEST = 8  # bytes of an n-gram in a 64-bit key
CONTEXT_MASK = (1 << 8 * (LONGEST - 1)) - 1


def standard_library(most_bytes: int | None = None) -> np.ndarray:
    """The sources of Python's top-level modules, one after another, as uint8; those that fit into `most_bytes`."""
    text = bytearray()
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        source = path.read_bytes()
        if most_bytes is None or len(text) + len(source) <= most_bytes:
            text += source
    if len(text) < 10_000:
        raise FileNotFoundError("the sources of Python's standard library are not installed here")
    return np.frombuffer(bytes(text), np.uint8)


class Counts:
    """How often each n-gram of up to eight bytes occurs: per order, sorted keys and their counts."""

    def __init__(self, text: np.ndarray) -> None:
        windows = np.zeros(len(text) - LONGEST + 1, np.uint64)
        for first in range(LONGEST):
            windows = windows << np.uint64(8) | text[first : first + len(windows)]
        windows.sort()
        self.keys: list[np.ndarray] = []
        self.counts: list[np.ndarray] = []
        for order in range(1, LONGEST + 1):
            prefixes = windows >> np.uint64(8 * (LONGEST - order))
            starts = np.flatnonzero(np.concatenate([[True], prefixes[1:] != prefixes[:-1]]))
            self.keys.append(prefixes[starts])
            self.counts.append(np.diff(starts, append=len(prefixes)).astype(np.float64))

    def following(self, contexts: np.ndarray, order: int) -> np.ndarray:
        """float64 [rows, 256]: how often each byte follows the last `order - 1` bytes of each context."""
        keys = self.keys[order - 1]
        first = (contexts & np.uint64((1 << 8 * (order - 1)) - 1)) << np.uint64(8)
        start, stop = np.searchsorted(keys, first), np.searchsorted(keys, first | np.uint64(VOCAB - 1), side="right")
        sizes = stop - start
        rows = np.repeat(np.arange(len(contexts)), sizes)
        found = np.arange(sizes.sum()) + np.repeat(start - (np.cumsum(sizes) - sizes), sizes)
        counts = np.zeros((len(contexts), VOCAB))
        counts[rows, (keys[found] & np.uint64(VOCAB - 1)).astype(np.int64)] = self.counts[order - 1][found]
        return counts


class NgramModel:
    """A language model of a given order over shared counts. Calling it is the forward pass.

    Rows are remembered by context, so that asking again costs a look-up: at most `remembered` of them.
    """

    def __init__(self, counts: Counts, order: int, remembered: int = 1 << 16) -> None:
        if not 1 <= order <= LONGEST:
            raise ValueError(f"order must be from 1 to {LONGEST}, got {order}")
        self.counts, self.order = counts, order
        self.mask = np.uint64((1 << 8 * (order - 1)) - 1)
        self.rows = np.empty((remembered, VOCAB), np.float32)
        self.known: dict[int, int] = {}

    def __call__(self, contexts: torch.Tensor) -> torch.Tensor:
        """Logits of the byte after each context: int64 [...] to float32 [..., 256]. They are log-probabilities."""
        seen, inverse = np.unique(contexts.numpy().astype(np.uint64).ravel() & self.mask, return_inverse=True)
        fits = len(seen) <= len(self.rows)
        rows = self.rows[self._remember(seen)] if fits else self._logits(seen)
        return torch.from_numpy(rows[inverse]).view(*contexts.shape, VOCAB)

    def _remember(self, contexts: np.ndarray) -> np.ndarray:
        """The place of each context's row, which is filled where it is new."""
        new = [context for context in contexts.tolist() if context not in self.known]
        if len(self.known) + len(new) > len(self.rows):
            self.known.clear()
            new = contexts.tolist()
        if new:
            first = len(self.known)
            self.rows[first : first + len(new)] = self._logits(np.array(new, np.uint64))
            self.known.update((context, first + i) for i, context in enumerate(new))
        return np.array([self.known[context] for context in contexts.tolist()])

    def _logits(self, contexts: np.ndarray) -> np.ndarray:
        probabilities = np.full((len(contexts), VOCAB), 1 / VOCAB)
        for order in range(1, self.order + 1):
            counts = self.counts.following(contexts, order)
            total, types = counts.sum(1, keepdims=True), (counts > 0).sum(1, keepdims=True)
            seen = total[:, 0] > 0
            smoothed = (counts + types * probabilities)[seen] / (total + types)[seen]
            probabilities[seen] = smoothed
        return np.log(probabilities).astype(np.float32)


def context_of(text: bytes) -> int:
    """The context after a text: its last seven bytes, zeros in front if it is shorter."""
    return int.from_bytes(text[-(LONGEST - 1) :], "big")


def advance(contexts: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """The contexts after one more byte each. A token of -1, which is none, leaves its context as it is."""
    longer = (contexts << 8 | tokens.clamp(min=0)) & CONTEXT_MASK
    return torch.where(tokens >= 0, longer, contexts)
