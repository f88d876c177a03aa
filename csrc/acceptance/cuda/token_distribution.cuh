// The distribution of a row: what of its logits decides the probability of any of its tokens.
//
// A pass over the row finds the greatest logit, the lowest id that has it, and the sum of exp((z - max) / T), in one
// go: when a thread meets a greater logit it scales down what it has added up. Parts of a row can be merged, so several
// blocks can share one; top_k_top_p.cuh does the filters afterwards, for rows that have any.
#pragma once

#include <cmath>

#include "acceptance/cuda/row.cuh"
#include "acceptance/walk.h"
#include "common/constants.h"
#include "common/cuda/block_team.cuh"

namespace specdec::cuda {

__device__ __forceinline__ float scale_of(float temperature) {
  return temperature > 0 ? kLog2E / temperature : 0.0f;  // finite, see settings.h: times 0 it must be 0
}
__device__ __forceinline__ float weight_of(const TokenDistribution& distribution, float logit) {
  return fast_exp2((logit - distribution.max) * distribution.scale);
}
__device__ __forceinline__ bool keeps(const TokenDistribution& distribution, float logit, int32_t id) {
  return logit > distribution.cut || (logit == distribution.cut && id <= distribution.cut_id);
}
__device__ __forceinline__ float kept_weight(const TokenDistribution& distribution, float logit, int32_t id) {
  return keeps(distribution, logit, id) ? weight_of(distribution, logit) : 0.0f;
}
__device__ __forceinline__ float probability_of(const TokenDistribution& distribution, float logit, int32_t id) {
  if (distribution.one_hot) return id == distribution.argmax ? 1.0f : 0.0f;
  return kept_weight(distribution, logit, id) * distribution.inverse_sum;
}

// What is known of a part of a row.
struct DistributionPart {
  uint64_t best;  // key_of the greatest logit that is a number; 0: none
  float sum;      // of weights, with respect to that logit
  uint32_t has_nan;
};

__device__ __forceinline__ float max_of(const DistributionPart& part) {
  return part.best == 0 ? negative_infinity() : from_ordered(uint32_t(part.best >> 32));
}

__device__ __forceinline__ DistributionPart merged(const DistributionPart& a, const DistributionPart& b, float scale) {
  const float max_a = max_of(a), max_b = max_of(b), max = fmaxf(max_a, max_b);
  DistributionPart merged{a.best > b.best ? a.best : b.best, 0, a.has_nan | b.has_nan};
  if (max_a > negative_infinity()) merged.sum += a.sum * fast_exp2((max_a - max) * scale);
  if (max_b > negative_infinity()) merged.sum += b.sum * fast_exp2((max_b - max) * scale);
  return merged;
}

// One thread's part of a span.
__device__ inline DistributionPart own_distribution_part(const BlockTeam& team, const Row& row, Span span,
                                                         float scale) {
  float max = negative_infinity(), sum = 0;
  int32_t argmax = -1;
  bool has_nan = false;
  stream_chunks(team, row, span, [&](int32_t first, const float (&logit)[kChunk]) {
    float chunk_max = logit[0];
#pragma unroll
    for (int i = 1; i < kChunk; ++i) chunk_max = fmaxf(chunk_max, logit[i]);  // of a NaN and a number, the number
    if (chunk_max > max) {
      sum *= max > negative_infinity() ? fast_exp2((max - chunk_max) * scale) : 0.0f;
      max = chunk_max;
#pragma unroll
      for (int i = kChunk - 1; i >= 0; --i) argmax = logit[i] == max ? first + i : argmax;
    }
    if (argmax < 0 && max == negative_infinity()) argmax = first;
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      has_nan |= logit[i] != logit[i];
      sum += logit[i] > negative_infinity() ? fast_exp2((logit[i] - max) * scale) : 0.0f;
    }
  });
  return {argmax < 0 ? 0 : key_of(ordered(max), argmax), sum, has_nan};
}

__device__ inline DistributionPart distribution_part(TeamReducer& reduce, const Row& row, Span span, float scale) {
  return reduce(own_distribution_part(reduce.team, row, span, scale),
                [scale](const DistributionPart& a, const DistributionPart& b) { return merged(a, b, scale); });
}

// The distribution of a whole row before its filters. A row that is no distribution is its argmax, or token 0.
__device__ inline TokenDistribution distribution_of(const DistributionPart& part, float temperature) {
  const float max = max_of(part);
  TokenDistribution distribution;
  distribution.valid = part.has_nan == 0 && max > negative_infinity() && max < -negative_infinity();
  distribution.one_hot = !distribution.valid || !(temperature > 0);
  distribution.max = max;
  distribution.argmax = max > negative_infinity() ? id_of(part.best) : 0;
  distribution.scale = scale_of(temperature);
  distribution.inverse_sum = distribution.one_hot ? 1.0f : 1.0f / part.sum;
  distribution.cut = negative_infinity();
  distribution.cut_id = kEveryId;
  distribution.entropy = 0;
  return distribution;
}

struct Moments {
  float sum, product;
};

// The sum and the natural entropy of a distribution whose cut is known: log of the sum minus the mean of the logits / T.
__device__ inline void add_up(TeamReducer& reduce, const Row& row, TokenDistribution& distribution) {
  Moments own{0, 0};
  for_each_chunk(reduce.team, row, whole(row), [&](int32_t first, const float (&logit)[kChunk]) {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      const float weight = kept_weight(distribution, logit[i], first + i);
      own.sum += weight;
      own.product += weight > 0 ? weight * (logit[i] - distribution.max) : 0.0f;
    }
  });
  const Moments all =
      reduce(own, [](const Moments& a, const Moments& b) { return Moments{a.sum + b.sum, a.product + b.product}; });
  distribution.inverse_sum = 1.0f / all.sum;
  distribution.entropy = logf(all.sum) - all.product * distribution.inverse_sum * distribution.scale * (1.0f / kLog2E);
}

}  // namespace specdec::cuda
