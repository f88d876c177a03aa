// Passes over the weights of a node: their sum, and a weighted draw among them (common/philox.h).
//
// Weights are made from the rows each time; nothing of the size of a vocabulary is ever written. A thread makes the
// weights of a chunk of 8 tokens from 16 bytes of the target's row and as much of each draft row, takes the noise of
// the chunk from two calls of Philox, and remembers its best token. A token's score is w / E, E exponential; E is never below
// its uniform v, so w / v bounds the score, and most tokens are passed over before a logarithm is taken.
#pragma once

#include "acceptance/cuda/row.cuh"
#include "acceptance/cuda/token_distribution.cuh"
#include "common/cuda/block_team.cuh"
#include "common/philox.h"

namespace specdec::cuda {

// The rows of one request.
struct RequestRows {
  const AcceptParams& p;
  int32_t request;

  __device__ Row target(int32_t node) const {
    return row_at(p.target, request * p.target_stride_batch + node * p.target_stride_node, p.vocab, p.target_dtype);
  }
  __device__ Row draft(int32_t row) const {
    return row_at(p.draft, request * p.draft_stride_batch + row * p.draft_stride_row, p.draft_vocab, p.draft_dtype);
  }
  // The draft's own id of a token, or -1.
  __device__ int32_t draft_id(int32_t token) const {
    const int32_t id = p.target_to_draft != nullptr ? p.target_to_draft[token] : token;
    return id < p.draft_vocab ? id : -1;
  }
};

// A set of tokens, one bit each; words are shared by chunks of 4.
__device__ __forceinline__ bool has_token(const uint32_t* bits, int32_t token) {
  return bits[token / 32] >> token % 32 & 1;
}

// The probabilities of the tokens of a chunk in a draft row. With `loaded` they are given its logits.
__device__ inline void draft_probabilities(const RequestRows& rows, const Term& term, int32_t first, bool loaded,
                                           float (&probability)[kChunk]) {
  const Row row = rows.draft(term.row);
  if (rows.p.target_to_draft == nullptr) {
    if (first >= row.vocab) {
#pragma unroll
      for (int i = 0; i < kChunk; ++i) probability[i] = 0;
      return;
    }
    if (!loaded) load_logits(row, first, probability);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) probability[i] = probability_of(term.distribution, probability[i], first + i);
    return;
  }
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    const int32_t id = first + i < rows.p.vocab ? rows.draft_id(first + i) : -1;
    probability[i] = id >= 0 ? probability_of(term.distribution, logit_at(row, id), id) : 0.0f;
  }
}

// Whether the tokens of a chunk lie side by side in the draft's rows, too, so that they can be loaded ahead.
__device__ __forceinline__ bool has_draft_chunks(const RequestRows& rows, const Weights& w) {
  return w.terms > 0 && rows.p.target_to_draft == nullptr;
}

// Turns a chunk of the target's logits into weights. `first_draft` are those of the first term's row, if has_draft_chunks.
__device__ inline void weigh(const RequestRows& rows, const Weights& w, const uint32_t* bits, int32_t first,
                             const float (&first_draft)[kChunk], float (&weight)[kChunk]) {
  const bool of_draft = w.kind == WeightKind::kDraft;
#pragma unroll
  for (int i = 0; i < kChunk; ++i) weight[i] = of_draft ? 0.0f : probability_of(w.target, weight[i], first + i);
  const float inverse_rho = 1.0f / w.rho;
#pragma unroll 1
  for (int32_t t = 0; t < w.terms; ++t) {
    const Term& term = t == 0 ? w.first : w.more[t - 1];
    const bool loaded = t == 0 && has_draft_chunks(rows, w);
    float q[kChunk];
#pragma unroll
    for (int i = 0; i < kChunk; ++i) q[i] = loaded ? first_draft[i] : 0.0f;
    draft_probabilities(rows, term, first, loaded, q);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      weight[i] -= w.kind == WeightKind::kKseq ? w.gain * fminf(q[i], weight[i] * inverse_rho)
                                               : (of_draft ? -1.0f : term.factor) * q[i];
    }
  }
  const uint32_t excluded = w.with_excluded ? 0 : bits[first / 32] >> first % 32;
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    const bool counts = weight[i] > (w.kind == WeightKind::kThreshold ? w.threshold : 0.0f) && !(excluded >> i & 1);
    weight[i] = counts && first + i < rows.p.vocab ? weight[i] : 0.0f;
  }
}

constexpr uint64_t kNoLimit = ~uint64_t{0};
constexpr float kAlmostOne = 1.0f - 0x1p-19f;  // room for the rounding of E

// The best token of a draw so far. Any score above 0 is better than none, where the greatest weight decides.
struct Best {
  uint64_t key = 0;
  float score = 0;

  __device__ __forceinline__ void meet(float weight, uint32_t number, int32_t token, uint64_t limit) {
    const float v = draw_uniform(number);
    if (!(weight > 0.0f) || weight < score * v * kAlmostOne) return;
    const float own = weight / draw_exponential(v);
    const uint64_t own_key = key_of(own > 0.0f ? 0x80000000u | bits_of(own) : bits_of(weight), token);
    if (own_key <= key || own_key >= limit) return;
    key = own_key;
    score = own;
  }
};

__device__ __forceinline__ float score_of(uint64_t key) {
  const uint32_t high = uint32_t(key >> 32);
  return high >> 31 != 0 ? float_of(high & 0x7fffffffu) : 0.0f;
}

// No uniform is below 2^-33. So a token whose weight is no normal number, and which float32 holds badly or not at all,
// has a score below this one, and scores above it are right and complete.
constexpr float kLeastScore = 0x1p-92f;
__device__ __forceinline__ bool is_sure(uint64_t key) { return score_of(key) >= kLeastScore; }

// Lets the tokens of a chunk meet.
__device__ __forceinline__ void draw_chunk(const NoiseKey& noise, int32_t first, const float (&weight)[kChunk],
                                           uint64_t limit, Best& best) {
#pragma unroll
  for (int quad = 0; quad < kChunk / 4; ++quad) {
    const Random4 random = random4(noise, uint32_t(first) / 4 + quad);
#pragma unroll
    for (int i = 0; i < 4; ++i) best.meet(weight[4 * quad + i], random.lane[i], first + 4 * quad + i, limit);
  }
}

struct WeightsSum {
  uint64_t best;  // key of the draw's winner among those below the limit; 0: none
  float sum;
  uint32_t unused;
};

// The sum of a span's weights and, if it draws, the best token whose key is below a limit.
__device__ inline WeightsSum pass_over(TeamReducer& reduce, const RequestRows& rows, const Weights& w,
                                       const uint32_t* bits, Span span, bool draws, const NoiseKey& noise,
                                       uint64_t limit) {
  Best best;
  float sum = 0;
  const bool with_draft = has_draft_chunks(rows, w);
  const Row target = rows.target(w.node), draft = with_draft ? rows.draft(w.first.row) : target;
  const auto use = [&](int32_t first, const float (&logit)[kChunk], const float (&first_draft)[kChunk]) {
    float weight[kChunk], chunk_sum = 0;
#pragma unroll
    for (int i = 0; i < kChunk; ++i) weight[i] = logit[i];
    weigh(rows, w, bits, first, first_draft, weight);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) chunk_sum += weight[i];
    sum += chunk_sum;
    if (draws && chunk_sum > 0) draw_chunk(noise, first, weight, limit, best);
  };
  for_each_chunk_of_two(reduce.team, target, draft, with_draft, span, use);
  return reduce(WeightsSum{best.key, sum, 0}, [](const WeightsSum& a, const WeightsSum& b) {
    return WeightsSum{a.best > b.best ? a.best : b.best, a.sum + b.sum, 0};
  });
}

__device__ __forceinline__ int32_t token_or_none(uint64_t key) { return key != 0 ? id_of(key) : -1; }

__device__ inline RhoSums rho_sums_of(TeamReducer& reduce, const RequestRows& rows, const Weights& w, float low,
                                      float step) {
  RhoSums sums{};
  const bool with_draft = rows.p.target_to_draft == nullptr;
  const Row target = rows.target(w.node), draft = rows.draft(w.first.row);
  const auto use = [&](int32_t first, const float (&z)[kChunk], const float (&first_draft)[kChunk]) {
    float q[kChunk];
#pragma unroll
    for (int i = 0; i < kChunk; ++i) q[i] = with_draft ? first_draft[i] : 0.0f;
    draft_probabilities(rows, w.first, first, with_draft, q);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      const float p = probability_of(w.target, z[i], first + i);
#pragma unroll
      for (int k = 0; k < kRhoPoints; ++k) sums.sum[k] += fminf(p, (low + float(k + 1) * step) * q[i]);
    }
  };
  for_each_chunk_of_two(reduce.team, target, draft, with_draft, whole(target), use);
  return reduce(sums, [](const RhoSums& a, const RhoSums& b) {
    RhoSums both;
#pragma unroll
    for (int k = 0; k < kRhoPoints; ++k) both.sum[k] = a.sum[k] + b.sum[k];
    return both;
  });
}

// The greatest logit of a row that its distribution keeps, of ids that are left; -inf: none.
template <class IsLeft>
__device__ inline float greatest_left(TeamReducer& reduce, const Row& row, const TokenDistribution& distribution,
                                      const IsLeft& is_left) {
  float best = negative_infinity();
  for_each_chunk(reduce.team, row, whole(row), [&](int32_t first, const float (&logit)[kChunk]) {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      if (logit[i] > best && keeps(distribution, logit[i], first + i) && is_left(first + i)) best = logit[i];
    }
  });
  return from_ordered(uint32_t(reduce.greatest(ordered(best))));
}

// The same of the draft's row that a term names, and of tokens that are not in a set.
__device__ inline float greatest_of_draft(TeamReducer& reduce, const RequestRows& rows, const Term& term,
                                          const uint32_t* bits) {
  const Row row = rows.draft(term.row);
  if (rows.p.target_to_draft == nullptr) {
    return greatest_left(reduce, row, term.distribution, [&](int32_t id) { return !has_token(bits, id); });
  }
  float best = negative_infinity();
  for (int32_t token = reduce.team.rank; token < rows.p.vocab; token += reduce.team.size) {
    const int32_t id = has_token(bits, token) ? -1 : rows.draft_id(token);
    if (id < 0) continue;
    const float logit = logit_at(row, id);
    if (logit > best && keeps(term.distribution, logit, id)) best = logit;
  }
  return from_ordered(uint32_t(reduce.greatest(ordered(best))));
}

// The greatest finite logit of a span whose key is below a limit; 0: none.
__device__ inline uint64_t greatest_logit(TeamReducer& reduce, const Row& row, Span span, uint64_t limit) {
  uint64_t best = 0;
  for_each_chunk(reduce.team, row, span, [&](int32_t first, const float (&logit)[kChunk]) {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      const bool finite = logit[i] - logit[i] == 0.0f;
      const uint64_t key = key_of(ordered(logit[i]), first + i);
      if (finite && key > best && key < limit) best = key;
    }
  });
  return reduce.greatest(best);
}

}  // namespace specdec::cuda
