// Sampling on a GPU, in one launch: the distribution of each row, then the best tokens of a weighted draw from it.
//
// A block has one span of 8,192 tokens of one row. It reads the span once for its part of the distribution and again (from the
// cache) for the span's best `count` tokens, whose scores are with respect to the greatest logit of the span. The block
// that arrives last at the row merges the parts in the order of the row, scales the scores to the greatest logit of
// all, and picks the winners. A row with top-k or top-p draws nothing before its cut is known, so there the last block
// does the rest alone; other rows have other last blocks. So it does where later tokens are so unlikely next to the
// first that their scores are not sure: it goes on with the rest of the draw, relative to the greatest logit that is
// left, which is one factor for all scores. It also describes the tokens, as the acceptance ops need it.
// A second counter brings a request's rows together, for its status.
#pragma once

#include "acceptance/cuda/accept_launch.h"
#include "acceptance/cuda/top_k_top_p.cuh"
#include "acceptance/cuda/weighted_draw.cuh"
#include "common/cuda/last_block.cuh"

namespace specdec::cuda {

constexpr int32_t kSampleSpan = 8192;

__device__ __forceinline__ NoiseKey sample_noise(const SampleParams& p, int32_t request, int32_t row, int32_t draw) {
  const int64_t seed = value_of(p.seed, request);
  const int32_t position = value_of(p.position, request);
  if (p.domain == SampleDomain::kSample) return noise_key(seed, position, kNoiseSample, 0);
  const int32_t parent = p.parents != nullptr ? p.parents[int64_t(request) * p.rows + row] : p.first_parent + row;
  return noise_key(seed, position, kNoiseDraft, uint32_t(parent) + (uint32_t(draw) << 16));
}

// The best token of a span below a limit; 0: none.
__device__ inline uint64_t draw_row(TeamReducer& reduce, const Row& row, const TokenDistribution& distribution,
                                    Span span, const NoiseKey& noise, uint64_t limit) {
  Best best;
  for_each_chunk(reduce.team, row, span, [&](int32_t first, const float (&logit)[kChunk]) {
    float weight[kChunk];
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      weight[i] = first + i < row.vocab ? kept_weight(distribution, logit[i], first + i) : 0.0f;
    }
    draw_chunk(noise, first, weight, limit, best);
  });
  return reduce.greatest(best.key);
}

// The key of a draw whose weights are scaled. What becomes 0 drops out.
__device__ __forceinline__ uint64_t scaled_key(uint64_t key, float factor) {
  const uint32_t high = uint32_t(key >> 32), is_score = high & 0x80000000u;
  const float scaled = float_of(high & 0x7fffffffu) * factor;
  return scaled > 0.0f ? uint64_t(is_score | bits_of(scaled)) << 32 | uint32_t(key) : 0;
}

// A row of a call, and what its blocks share in scratch.
struct SampledRow {
  const SampleLaunch& launch;
  const SampleParams& p;
  int32_t request, row;
  int64_t place;
  Row logits;
  Sampling sampling;
  bool is_cut, by_logit;  // by_logit: the greatest logits, without a draw

  __device__ SampledRow(const SampleLaunch& launch, int64_t place)
      : launch(launch),
        p(launch.call),
        request(int32_t(place / p.rows)),
        row(int32_t(place % p.rows)),
        place(place),
        logits(row_at(p.logits, request * p.logits_stride_batch + row * p.logits_stride_row, p.vocab, p.dtype)),
        sampling(sampling_of(p.sampling, request)),
        is_cut(cuts(sampling, p.vocab)),
        by_logit(!(sampling.temperature > 0)) {}

  // At temperature 0 a row is described as if it were 1.
  __device__ float temperature() const { return by_logit ? 1.0f : sampling.temperature; }
  __device__ DistributionPart* parts() const {
    return reinterpret_cast<DistributionPart*>(launch.scratch) + place * launch.spans;
  }
  __device__ uint64_t* keys() const {  // [spans, count]
    return reinterpret_cast<uint64_t*>(launch.scratch + launch.keys) + place * launch.spans * p.count;
  }
  __device__ int32_t* drawn() const {  // [count] ids of the row
    return reinterpret_cast<int32_t*>(launch.scratch + launch.drawn) + place * p.count;
  }
  __device__ int32_t* statuses() const {  // [rows] of the request
    return reinterpret_cast<int32_t*>(launch.scratch + launch.statuses) + int64_t(request) * p.rows;
  }
  __device__ NoiseKey noise(int32_t draw) const { return sample_noise(p, request, row, p.replacement ? draw : 0); }

  // The next of the best tokens of a span.
  __device__ uint64_t next_key(TeamReducer& reduce, const TokenDistribution& distribution, Span span, int32_t draw,
                               uint64_t limit) const {
    if (by_logit) return greatest_logit(reduce, logits, span, limit);
    return draw_row(reduce, logits, distribution, span, noise(draw), p.replacement ? kNoLimit : limit);
  }

  // The next of the best tokens of all spans.
  __device__ uint64_t next_merged(TeamReducer& reduce, const TokenDistribution& distribution, int32_t draw,
                                  uint64_t limit) const {
    uint64_t best = 0;
    const int32_t count = launch.spans * p.count;
    for (int32_t i = reduce.team.rank; i < count; i += reduce.team.size) {
      if (p.replacement && i % p.count != draw) continue;
      const float span_max = max_of(parts()[i / p.count]);
      uint64_t key = keys()[i];
      if (!by_logit && key != 0) key = scaled_key(key, fast_exp2((span_max - distribution.max) * distribution.scale));
      if (key > best && (p.replacement || key < limit)) best = key;
    }
    return reduce.greatest(best);
  }

  __device__ bool is_left(int32_t id, int32_t draws) const {
    for (int32_t i = 0; i < draws; ++i) {
      if (drawn()[i] == id) return false;
    }
    return true;
  }
  // The best token of the row that is not among those drawn.
  __device__ uint64_t next_left(TeamReducer& reduce, const TokenDistribution& distribution, int32_t draws) const {
    Best best;
    for_each_chunk(reduce.team, logits, whole(logits), [&](int32_t first, const float (&logit)[kChunk]) {
      float weight[kChunk];
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        weight[i] = first + i < logits.vocab ? kept_weight(distribution, logit[i], first + i) : 0.0f;
        if (weight[i] > 0.0f && !is_left(first + i, draws)) weight[i] = 0.0f;
      }
      draw_chunk(noise(0), first, weight, kNoLimit, best);
    });
    return reduce.greatest(best.key);
  }

  // By one thread: token `draw` and its description. id -1: there is none.
  __device__ void write(const TokenDistribution& described, int32_t draw, int32_t id) const {
    const int64_t to = place * p.count + draw;
    p.tokens[to] = id >= 0 && p.draft_to_target != nullptr ? p.draft_to_target[id] : id;
    if (p.logprobs == nullptr) return;
    const float above = id >= 0 ? (logit_at(logits, id) - described.max) / temperature() : negative_infinity();
    p.logprobs[to] = id >= 0 ? above + logf(described.inverse_sum) : negative_infinity();
  }
};

__device__ inline void write_span(TeamReducer& reduce, const SampledRow& row, Span span, int32_t index) {
  const DistributionPart part = distribution_part(reduce, row.logits, span, scale_of(row.temperature()));
  if (reduce.team.rank == 0) row.parts()[index] = part;
  if (row.is_cut) return;
  TokenDistribution distribution = distribution_of(part, row.temperature());
  uint64_t limit = kNoLimit;
  for (int32_t draw = 0; draw < row.p.count; ++draw) {
    if (!distribution.valid) {
      limit = 0;
    } else if (row.by_logit && draw == 0) {
      limit = part.best;
    } else {
      limit = row.next_key(reduce, distribution, span, draw, limit);
    }
    if (reduce.team.rank == 0) row.keys()[int64_t(index) * row.p.count + draw] = limit;
  }
}

// By the row's last block. Returns the row's status.
__device__ inline int32_t write_row(TeamReducer& reduce, const CutScratch& cut, const SampledRow& row) {
  const SampleParams& p = row.p;
  const float scale = scale_of(row.temperature());
  DistributionPart part = row.parts()[0];
  for (int32_t i = 1; i < row.launch.spans; ++i) part = merged(part, row.parts()[i], scale);
  Sampling sampling = row.sampling;
  sampling.temperature = row.temperature();
  if (row.by_logit) sampling.top_k = 0, sampling.top_p = 1.0f;
  const TokenDistribution distribution = finished_distribution(reduce, cut, row.logits, part, sampling, false);

  const bool drafting = p.domain == SampleDomain::kDraft, leader = reduce.team.rank == 0;
  const bool repeats_argmax = !distribution.valid || (row.by_logit && p.replacement);
  TokenDistribution rescaled = distribution;  // relative to the greatest logit that is left
  bool anew = false;                          // whether that is another than the row's
  uint64_t limit = kNoLimit;
  for (int32_t draw = 0; draw < p.count; ++draw) {
    int32_t id = -1;
    if (repeats_argmax) {
      if ((distribution.valid || !drafting) && (draw == 0 || p.replacement)) id = distribution.argmax;
    } else if (limit != 0) {
      if (anew) {
        reduce.team.sync();  // drawn() is read by all
        limit = row.next_left(reduce, rescaled, draw);
      } else {
        limit = row.is_cut ? row.next_key(reduce, distribution, whole(row.logits), draw, limit)
                           : row.next_merged(reduce, distribution, draw, limit);
      }
      if (draw > 0 && !row.by_logit && !p.replacement && !is_sure(limit)) {
        anew = true;
        reduce.team.sync();
        rescaled.max = greatest_left(reduce, row.logits, distribution,
                                     [&](int32_t candidate) { return row.is_left(candidate, draw); });
        limit = rescaled.max > negative_infinity() ? row.next_left(reduce, rescaled, draw) : 0;
      }
      id = token_or_none(limit);
    }
    if (leader) {
      row.write(distribution, draw, id);
      row.drawn()[draw] = id;
    }
  }
  if (leader && p.logsumexp != nullptr) {
    const float total = distribution.max / row.temperature() - logf(distribution.inverse_sum);
    p.logsumexp[row.place] = distribution.valid ? total : negative_infinity();
  }
  return distribution.valid ? 0 : drafting ? kDraftInvalid : kTargetInvalid;
}

__global__ void __launch_bounds__(kTeamMaxThreads, 1) sample_kernel(SampleLaunch launch) {
  const SampleParams& p = launch.call;
  if (p.rows == 0) {  // nothing to sample, but the status is an output
    if (threadIdx.x == 0) p.status[blockIdx.x] = 0;
    return;
  }
  const int32_t index = int32_t(blockIdx.x % launch.spans);
  const SampledRow row(launch, blockIdx.x / launch.spans);
  SharedMemory memory;
  TeamReducer reduce({int32_t(threadIdx.x), int32_t(blockDim.x)}, memory.take<uint32_t>(TeamReducer::kWords));
  const CutScratch cut(memory);
  write_span(reduce, row, {index * kSampleSpan, min((index + 1) * kSampleSpan, p.vocab)}, index);
  if (!arrives_last(reduce.team, launch.counters + row.place, launch.spans)) return;
  const int32_t status = write_row(reduce, cut, row);
  if (threadIdx.x == 0) row.statuses()[row.row] = status;
  int32_t* counter = launch.counters + int64_t(p.batch) * p.rows + row.request;
  if (!arrives_last(reduce.team, counter, p.rows) || threadIdx.x != 0) return;
  int32_t all = setting_status(p.sampling, row.request);
  for (int32_t i = 0; i < p.rows; ++i) all |= row.statuses()[i];
  p.status[row.request] = all;
}

}  // namespace specdec::cuda
