"""The noise of every op that draws: Philox4x32-10 (Salmon et al., 2011), its counters, coins and exponentials.

Integers are made here in int64 arithmetic, and are the same on every backend. What is made of them is float64 here and
float32 in kernels.

The key is the request's seed. The counter names the draw: (token or node // 4, position, domain, detail), and each of
the four words serves one of four neighbouring tokens or nodes. No two draws of different meaning share a counter:

| domain   | first word | position     | detail                     | used for                                  |
|----------|------------|--------------|----------------------------|-------------------------------------------|
| SAMPLE   | token // 4 | of the token | 0                          | plain sampling, and "match"               |
| DRAFT    | token // 4 | of node 0    | parent node + (draw << 16) | children in a draft tree                  |
| ACCEPT   | node // 4  | of node 0    | 0; 1 for a level's coin    | the coin of a drafted node, or of a level |
| RESIDUAL | token // 4 | of node 0    | node the walk ends at      | the next token after a rejection          |
| BONUS    | token // 4 | of node 0    | node the walk ends at      | the next token if nothing was rejected    |

The position of node 0 grows in every round, so a round never sees the noise of another, whatever it looked at.
"""

import torch

SAMPLE, DRAFT, ACCEPT, RESIDUAL, BONUS = range(5)

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
WORD = 0xFFFFFFFF


def philox(counter, key) -> tuple[torch.Tensor, ...]:
    """The four 32-bit words of Philox4x32-10.

    Args:
        counter: four integers or int64 tensors that broadcast, each taken modulo 2^32.
        key: two integers, taken modulo 2^32.

    Returns:
        Four int64 tensors of values in [0, 2^32).
    """
    a, b, c, d = (_int64(word) & WORD for word in counter)
    keys = [word & WORD for word in key]
    for _ in range(ROUNDS):
        # The product of two 32-bit words wraps around in int64, but its 64 bits are right.
        left, right = a * MULTIPLIERS[0], c * MULTIPLIERS[1]
        a, b, c, d = (
            ((right >> 32) & WORD) ^ b ^ keys[0],
            right & WORD,
            ((left >> 32) & WORD) ^ d ^ keys[1],
            left & WORD,
        )
        keys = [(word + step) & WORD for word, step in zip(keys, KEY_STEPS, strict=True)]
    return a, b, c, d


def _int64(word) -> torch.Tensor:
    """An int on the CPU, whatever the default device: a number may join tensors of any device."""
    return word.long() if isinstance(word, torch.Tensor) else torch.tensor(word, dtype=torch.int64, device="cpu")


def words(count: int, seed: int, position: int, domain: int, detail: int, device=None) -> torch.Tensor:
    """One 32-bit word for each of `count` tokens or nodes: int64 [count]."""
    quads = torch.arange(-(-count // 4), device=device)
    drawn = philox((quads, position, domain, detail), (seed, seed >> 32))
    return torch.stack(torch.broadcast_tensors(*drawn), dim=-1).flatten()[:count]


def coin(seed: int, position: int, node: int, *, level: bool = False) -> float:
    """A uniform number in (0, 1): the middle of one of 2^23 equal intervals.

    That is what float32 holds exactly. Of 2^24 intervals the last middle would round to 1: with such a coin p = q would
    be rejected and leave nothing to draw from.

    Args:
        seed: of the request.
        position: of node 0.
        node: the drafted node that is tested or, with `level`, the parent of those that are.
        level: whether one coin serves all children of `node`.
    """
    word = philox((node // 4, position, ACCEPT, int(level)), (seed, seed >> 32))[node % 4]
    return coins_of(word).item()


def exponentials(vocab: int, seed: int, position: int, domain: int, detail: int, device=None) -> torch.Tensor:
    """Exponential variables of the race, float64 [vocab]. See `race`."""
    return exponentials_of(words(vocab, seed, position, domain, detail, device))


def coins_of(word: torch.Tensor) -> torch.Tensor:
    """Words to coins, float64."""
    return ((word >> 9).double() + 0.5) * 2.0**-23


def exponentials_of(word: torch.Tensor) -> torch.Tensor:
    """Words to exponential variables, float64.

    The smallest ones decide races, so the 32 bits must resolve small values: -log1p(-v) does, -log(v) would cut the
    tail of the vocabulary off or inflate it.
    """
    return -torch.log1p(-(word.double() + 0.5) * 2.0**-32)


def first_of_race(logs: torch.Tensor, exponential: torch.Tensor, count: int) -> list[int]:
    """The first `count` tokens of a race, which are so many draws without replacement; fewer where fewer are possible.

    What is left for the later ones may be less than a float holds, in proportion to what is gone; logarithms are not.
    Each draw counts them from the greatest that is left: from -1e16 on the noise would be lost in them.

    Args:
        logs: logarithms of the weights [vocab], not normalised; -inf for what is never drawn.
        exponential: [vocab].
        count: at least 1.
    """
    left, noise, tokens = logs.clone(), exponential.log(), []
    while len(tokens) < count and bool((left > float("-inf")).any()):
        tokens.append(lowest_argmax(left - left.max() - noise))
        left[tokens[-1]] = float("-inf")
    return tokens


def scores(weights: torch.Tensor, exponential: torch.Tensor) -> torch.Tensor:
    """Scores of a race, whose first is a draw from the weights.

    Args:
        weights: [vocab], not normalised. A token of weight 0 never wins.
        exponential: [vocab].

    Returns:
        [vocab]; where a weight is positive but all scores are 0, the weights.
    """
    score = torch.where(weights > 0, weights / exponential, 0.0)
    return score if bool((score > 0).any()) else weights


def race(weights: torch.Tensor, exponential: torch.Tensor) -> int:
    """The token with the greatest weight / exponential, the lowest among equals."""
    return lowest_argmax(scores(weights, exponential))


def lowest_argmax(values: torch.Tensor) -> int:
    """Index of the greatest value, the lowest among equals. NaN must not occur."""
    return int((values == values.max()).nonzero()[0, 0])
