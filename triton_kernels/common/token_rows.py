"""The distribution of the tokens that a row of logits gives, and draws from it: the parts of every sampling kernel.

A row is read in blocks of BLOCK tokens by all threads of one program. What is carried from block to block is kept per
lane and reduced once at the end: a lane sees its ids in ascending order, so a strict comparison keeps the lowest id,
and the sums have one order whatever the machine. Lanes past the vocabulary read -inf, which has no weight.

A row's distribution is six numbers, see TokenDistribution; a token's weight follows from its own logit and these.

The first pass finds the maximum and whether the row is sound, the second adds the weights; the row (304 KB for 151,936
tokens of 16 bits) is in L2 by then, and two passes cost one exp2 per token where one online pass costs two. Filters
bisect for the cut with a pass per pivot, over the integers that order floats, hence exactly and in a bounded number of
steps; in all but crafted rows the interval holds a single token after about twenty, and the search ends.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .philox import exponential, token_uniforms

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
NO_ID = tl.constexpr(2147483647)
# No uniform is below 2^-33. So a token whose weight is no normal number, and which float32 holds badly or not at all,
# has a score below this one, and scores above it are right and complete.
LEAST_SCORE = tl.constexpr(2.0**-92)
STAGES = tl.constexpr(8)  # blocks under way at once: 14 KB of 16-bit logits
TARGET_INVALID = tl.constexpr(1)
DRAFT_INVALID = tl.constexpr(2)
SETTING_INVALID = tl.constexpr(32)
# Temperatures further out count as these, see csrc/common/sampling_params.h.
LEAST_TEMPERATURE = tl.constexpr(1e-20)
MAX_TEMPERATURE = tl.constexpr(1e20)


class Sampling(NamedTuple):
    """How a request's logits become a distribution. Temperature 0 stands for the argmax, top_k 0 for no limit."""

    temperature: tl.tensor
    top_k: tl.tensor
    top_p: tl.tensor


class TokenDistribution(NamedTuple):
    """A row's tokens have the weight exp2((z - maximum) * scale) where they are kept, else 0.

    Kept are z > cut, and of those with z == cut the ids up to cut_id: that is top-k and top-p, exactly, without a sort.
    one_hot_id >= 0 overrules all this: that token has probability 1 (temperature 0, or a malformed row).
    """

    maximum: tl.tensor
    scale: tl.tensor  # log2(e) / temperature
    inverse: tl.tensor  # 1 / sum of the weights
    cut: tl.tensor
    cut_id: tl.tensor
    one_hot_id: tl.tensor  # or -1


@triton.jit
def keep_best(best, best_id, value, ids):
    """Per lane, the greatest value and its id; the earlier one among equals."""
    better = value > best
    return tl.where(better, value, best), tl.where(better, ids, best_id)


@triton.jit
def best_of(best, best_id):
    """Over the lanes, the greatest value and the lowest id that has it; NO_ID if no lane was ever replaced."""
    top = tl.max(best, 0)
    return top, tl.min(tl.where(best == top, best_id, NO_ID), 0)


@triton.jit
def row_tile(row, ids, size):
    return tl.load(row + ids, mask=ids < size, other=float("-inf")).to(tl.float32)


@triton.jit
def is_kept(z, ids, cut, cut_id):
    return (z > cut) | ((z == cut) & (ids <= cut_id))


@triton.jit
def token_weight(z, ids, maximum, scale, cut, cut_id):
    return tl.where(is_kept(z, ids, cut, cut_id), tl.exp2((z - maximum) * scale), 0.0)


@triton.jit
def token_probability(z, ids, of):
    """Of tokens with logits z, under a TokenDistribution."""
    weight = token_weight(z, ids, of.maximum, of.scale, of.cut, of.cut_id) * of.inverse
    return tl.where(of.one_hot_id >= 0, tl.where(ids == of.one_hot_id, 1.0, 0.0), weight)


@triton.jit
def request_setting(value, values, request):
    """A per-request setting: from the tensor if there is one, else the number."""
    if values is not None:
        return tl.load(values + request)
    else:
        return value


@triton.jit
def is_temperature(temperature):
    """False for NaN and negative numbers."""
    return temperature >= 0.0


@triton.jit
def softmax_temperature(temperature):
    """As the early exit ops take it: between the bounds, the lower one where it is none."""
    bounded = tl.where(temperature >= LEAST_TEMPERATURE, temperature, LEAST_TEMPERATURE)
    return tl.minimum(bounded, MAX_TEMPERATURE)


@triton.jit
def request_sampling(settings, top_k, request):
    """Sampling of a request, and a status bit. settings: temperature, temperatures, top_ks, top_p, top_ps."""
    temperature, temperatures, top_ks, top_p, top_ps = settings
    given = tl.full([], 0.0, tl.float32) + request_setting(temperature, temperatures, request)
    k = request_setting(top_k, top_ks, request)
    p = tl.full([], 0.0, tl.float32) + request_setting(top_p, top_ps, request)
    bits = tl.where(is_temperature(given) & (p == p), 0, SETTING_INVALID)
    bounded = tl.where(given >= LEAST_TEMPERATURE, tl.minimum(given, MAX_TEMPERATURE), 0.0)
    return Sampling(bounded, k, p), bits


@triton.jit
def request_seed(seeds, seed_low, seed_high, request):
    if seeds is not None:
        return tl.load(seeds + request)
    else:
        return (seed_high.to(tl.int64) << 32) | (seed_low.to(tl.int64) & 0xFFFFFFFF)


@triton.jit
def row_maximum(row, size, BLOCK: tl.constexpr):
    """Maximum and argmax of a row, NaN left out, and whether it is sound: at least one number, no NaN, no +inf."""
    lane = tl.arange(0, BLOCK)
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    best_id = tl.full([BLOCK], 2147483647, tl.int32)
    nan = tl.zeros([BLOCK], tl.int32)
    for start in tl.range(0, size, BLOCK, num_stages=STAGES):
        ids = start + lane
        z = row_tile(row, ids, size)
        nan |= (z != z).to(tl.int32)
        best, best_id = keep_best(best, best_id, tl.where(z != z, float("-inf"), z), ids)
    maximum, argmax = best_of(best, best_id)
    sound = (tl.max(nan, 0) == 0) & (maximum > float("-inf")) & (maximum < float("inf"))
    return maximum, tl.where(argmax == NO_ID, 0, argmax), sound


@triton.jit
def _key_of(value):
    """The integer that orders floats; -0 and +0 are equal tokens and get one key."""
    bits = tl.where(value == 0.0, 0.0, value).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)


@triton.jit
def _value_of(key):
    bits = key.to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _part_from(row, size, pivot, maximum, scale, cut, cut_id, BLOCK: tl.constexpr):
    """Count and mass of the kept tokens whose logit is at least the pivot."""
    lane = tl.arange(0, BLOCK)
    count = tl.zeros([BLOCK], tl.int32)
    mass = tl.zeros([BLOCK], tl.float32)
    for start in tl.range(0, size, BLOCK, num_stages=STAGES):
        ids = start + lane
        z = row_tile(row, ids, size)
        inside = z >= pivot
        weight = token_weight(z, ids, maximum, scale, cut, cut_id)
        count += (inside & is_kept(z, ids, cut, cut_id)).to(tl.int32)
        mass += tl.where(inside, weight, 0.0)
    return tl.sum(count, 0), tl.sum(mass, 0)


@triton.jit
def _id_of_tie(row, size, value, rank, BLOCK: tl.constexpr):
    """The id of the rank-th token, from 1, whose logit is this value; NO_ID if there are fewer."""
    lane = tl.arange(0, BLOCK)
    seen = 0
    found = 2147483647
    for start in range(0, size, BLOCK):
        ids = start + lane
        z = row_tile(row, ids, size)
        equal = ((z == value) & (ids < size)).to(tl.int32)
        before = seen + tl.cumsum(equal, 0)
        here = (equal > 0) & (before == rank)
        found = tl.minimum(found, tl.min(tl.where(here, ids, NO_ID), 0))
        seen += tl.sum(equal, 0)
    return found


@triton.jit
def _search_cut(row, size, maximum, scale, cut, cut_id, need, target, BLOCK: tl.constexpr):
    """The cut after the shortest leading part of the kept tokens that has `need` of them and `target` of their mass.

    Invariant: the part from key `low` on has enough, the part from `high` on has not. It ends as soon as there is
    exactly one token between the two, or at one key, where the ties are dealt out by id. What is missing of the target
    there is a difference of two sums: it is off by as much of the whole mass as these are, and so is the cut.
    """
    low = _key_of(tl.full([], float("-inf"), tl.float32))
    high = _key_of(maximum) + 1
    low_count = 2147483647
    high_count = 0
    high_mass = 0.0
    step = 0
    while (high - low > 1) & (low_count - high_count > 1) & (low_count != need):
        # Logits lie evenly over their values rather than over the keys, but only the keys bound the number of steps.
        middle = low + (high - low) // 2
        low_value = _value_of(low)
        by_value = 0.5 * low_value + 0.5 * _value_of(high - 1)
        by_value = tl.where(step == 0, maximum - tl.div_rn(tl.full([], 16.0, tl.float32), scale), by_value)
        usable = (by_value > float("-inf")) & (step % 2 == 0)
        middle = tl.where(usable, _key_of(by_value), middle)
        middle = tl.minimum(tl.maximum(middle, low + 1), high - 1)
        count, mass = _part_from(row, size, _value_of(middle), maximum, scale, cut, cut_id, BLOCK)
        enough = (count >= need) & (mass >= target)
        low = tl.where(enough, middle, low)
        low_count = tl.where(enough, count, low_count)
        high = tl.where(enough, high, middle)
        high_count = tl.where(enough, high_count, count)
        high_mass = tl.where(enough, high_mass, mass)
        step += 1

    value = _value_of(low)
    new_id = 2147483647
    if (high - low <= 1) & (low_count - high_count > 1) & (low_count != need):
        weight = tl.exp2((value - maximum) * scale)
        by_mass = tl.where(weight > 0.0, tl.div_rn(target - high_mass, tl.where(weight > 0.0, weight, 1.0)), 1e9)
        rank = tl.maximum(need - high_count, tl.ceil(tl.minimum(by_mass, 1e9)).to(tl.int32))
        new_id = _id_of_tie(row, size, value, tl.maximum(rank, 1), BLOCK)
    new_id = tl.where(value == cut, tl.minimum(new_id, cut_id), new_id)
    return tl.where(value < cut, cut, value), tl.where(value < cut, cut_id, new_id)


@triton.jit
def top_k_top_p(row, size, maximum, scale, top_k, top_p, BLOCK: tl.constexpr):
    """The cut of top-k, then of top-p among what top-k has kept."""
    cut = tl.full([], float("-inf"), tl.float32)
    cut_id = tl.full([], 2147483647, tl.int32)
    # Twice through one loop, so that the search is compiled once.
    for stage in range(2):
        need = tl.where(stage == 0, tl.minimum(top_k, size), 1)
        active = tl.where(stage == 0, (top_k > 0) & (top_k < size), top_p < 1.0)
        if active:
            target = 0.0
            if stage == 1:
                _, total = _part_from(row, size, float("-inf"), maximum, scale, cut, cut_id, BLOCK)
                target = total * tl.maximum(top_p, 0.0)
            cut, cut_id = _search_cut(row, size, maximum, scale, cut, cut_id, need, target, BLOCK)
    return cut, cut_id


@triton.jit
def row_distribution(
    row, size, sampling, FILTER: tl.constexpr, SUM: tl.constexpr, ENTROPY: tl.constexpr, BLOCK: tl.constexpr
):
    """TokenDistribution, argmax, sound, entropy in nats.

    inverse is 1 unless SUM, for draws do not need it; so is the entropy 0 unless ENTROPY.
    """
    temperature, top_k, top_p = sampling
    maximum, argmax, sound = row_maximum(row, size, BLOCK)
    one_hot_id = tl.where(sound & (temperature > 0.0), -1, argmax)
    scale = tl.div_rn(tl.full([], LOG2E, tl.float32), tl.where(temperature > 0.0, temperature, 1.0))
    cut = tl.full([], float("-inf"), tl.float32)
    cut_id = tl.full([], 2147483647, tl.int32)
    inverse = tl.full([], 1.0, tl.float32)
    entropy = tl.full([], 0.0, tl.float32)
    if one_hot_id < 0:
        if FILTER:
            cut, cut_id = top_k_top_p(row, size, maximum, scale, top_k, top_p, BLOCK)
        if SUM:
            lane = tl.arange(0, BLOCK)
            total = tl.zeros([BLOCK], tl.float32)
            moment = tl.zeros([BLOCK], tl.float32)
            for start in tl.range(0, size, BLOCK, num_stages=STAGES):
                ids = start + lane
                z = row_tile(row, ids, size)
                weight = token_weight(z, ids, maximum, scale, cut, cut_id)
                total += weight
                if ENTROPY:
                    moment += tl.where(weight > 0.0, weight * ((z - maximum) * scale), 0.0)
            whole = tl.sum(total, 0)
            inverse = tl.div_rn(tl.full([], 1.0, tl.float32), whole)
            if ENTROPY:
                entropy = tl.log(whole) - LN2 * (tl.sum(moment, 0) * inverse)
    return TokenDistribution(maximum, scale, inverse, cut, cut_id, one_hot_id), argmax, sound, entropy


@triton.jit
def next_logit(row, size, last, last_id, BLOCK: tl.constexpr):
    """The greatest logit that comes after (last, last_id), and its id; NO_ID where only -inf is left."""
    lane = tl.arange(0, BLOCK)
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    best_id = tl.full([BLOCK], 2147483647, tl.int32)
    for start in range(0, size, BLOCK):
        ids = start + lane
        z = row_tile(row, ids, size)
        waits = (z < last) | ((z == last) & (ids > last_id))
        best, best_id = keep_best(best, best_id, tl.where(waits, z, float("-inf")), ids)
    return best_of(best, best_id)


@triton.jit
def draw_score(weight, v, BY_WEIGHT):
    """What a draw takes the greatest of: weight / exponential, or the weight where all of these are 0.

    It decides, so it is rounded as on other backends: `/` of float32 is approximate on GPUs.
    """
    return tl.where(BY_WEIGHT, weight, tl.div_rn(weight, exponential(v)))


@triton.jit
def weighted_draw(row, size, of, stream, last, last_id, BY_WEIGHT, BLOCK: tl.constexpr):
    """The greatest score over one row, of a TokenDistribution, and its token; NO_ID if no token has a score.

    Only tokens that come after (last, last_id) in the order of the scores take part: calling again with the result
    gives the second, and so on, which are draws without replacement. (inf, -1) lets all take part.
    """
    lane = tl.arange(0, BLOCK)
    best = tl.zeros([BLOCK], tl.float32)
    best_id = tl.full([BLOCK], 2147483647, tl.int32)
    unscaled = TokenDistribution(of.maximum, of.scale, 1.0, of.cut, of.cut_id, of.one_hot_id)
    for start in range(0, size, BLOCK):
        ids = start + lane
        z = row_tile(row, ids, size)
        weight = token_probability(z, ids, unscaled)
        score = draw_score(weight, token_uniforms(stream, start, BLOCK), BY_WEIGHT)
        waits = (score < last) | ((score == last) & (ids > last_id))
        best, best_id = keep_best(best, best_id, tl.where(waits, score, 0.0), ids)
    return best_of(best, best_id)


@triton.jit
def _is_drawn(ids, drawn, count):
    """Whether ids are among the first `count` of a list."""
    found = ids < 0
    for index in range(count):
        found = found | (ids == tl.load(drawn + index))
    return found


@triton.jit
def _draw_from_rest(row, size, of, maximum, stream, drawn, count, BY_WEIGHT, BLOCK: tl.constexpr):
    """weighted_draw over the tokens that are not drawn yet, with weights relative to `maximum`."""
    lane = tl.arange(0, BLOCK)
    best = tl.zeros([BLOCK], tl.float32)
    best_id = tl.full([BLOCK], 2147483647, tl.int32)
    for start in range(0, size, BLOCK):
        ids = start + lane
        z = tl.where(_is_drawn(ids, drawn, count), float("-inf"), row_tile(row, ids, size))
        weight = token_weight(z, ids, maximum, of.scale, of.cut, of.cut_id)
        score = draw_score(weight, token_uniforms(stream, start, BLOCK), BY_WEIGHT)
        best, best_id = keep_best(best, best_id, score, ids)
    return best_of(best, best_id)


@triton.jit
def _greatest_of_rest(row, size, of, drawn, count, BLOCK: tl.constexpr):
    """The greatest logit that is kept and not drawn yet; -inf if there is none."""
    lane = tl.arange(0, BLOCK)
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in range(0, size, BLOCK):
        ids = start + lane
        z = row_tile(row, ids, size)
        left = is_kept(z, ids, of.cut, of.cut_id) & (_is_drawn(ids, drawn, count) == 0)
        best = tl.maximum(best, tl.where(left, z, float("-inf")))
    return tl.max(best, 0)


@triton.jit
def draw_next(row, size, of, maximum, stream, drawn, count, BLOCK: tl.constexpr):
    """The next of draws without replacement, of which `count` are made, and the logit that its weights are relative to.

    That is `maximum` as long as scores relative to it are reliable, else the greatest logit left: a change of it is one
    factor for all scores, so the order stays. NO_ID if nothing is left.
    """
    tl.debug_barrier()  # one thread has written what all read here
    score, token = _draw_from_rest(row, size, of, maximum, stream, drawn, count, False, BLOCK)
    if score < LEAST_SCORE:
        token = tl.full([], 2147483647, tl.int32)
        maximum = _greatest_of_rest(row, size, of, drawn, count, BLOCK)
        attempt = tl.where(maximum > float("-inf"), 0, 2)
        while (token == NO_ID) & (attempt < 2):  # by score, then by weight, should a uniform have rounded to 1
            _, token = _draw_from_rest(row, size, of, maximum, stream, drawn, count, attempt == 1, BLOCK)
            attempt += 1
    return token, maximum
