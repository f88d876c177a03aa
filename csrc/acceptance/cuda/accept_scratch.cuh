// Scratch of the acceptance kernels in global memory: where each request has what.
#pragma once

#include "acceptance/cuda/accept_launch.h"
#include "acceptance/cuda/token_distribution.cuh"
#include "acceptance/cuda/top_k_top_p.cuh"
#include "acceptance/cuda/weighted_draw.cuh"
#include "acceptance/walk.h"
#include "common/cuda/device.cuh"

namespace specdec::cuda {

constexpr int32_t kEagerSpan = 8192;  // tokens of a row that one block reads: two chunks for each of 512 threads

// The draw that the eager walk leaves to the last launch.
struct DeferredDraw {
  NoiseKey noise;
  Weights weights;
  bool wanted;
};
struct LastDraw {
  DeferredDraw* deferred;
  uint32_t* bits;   // [bit_words] excluded tokens
  uint64_t* parts;  // [spans] the best key of each span
};

__host__ __device__ inline int32_t bit_words(const AcceptParams& p) { return (p.vocab + 31) / 32; }
__host__ __device__ inline int32_t spans_of(int32_t vocab) { return (vocab + kEagerSpan - 1) / kEagerSpan; }
// Rows of a request that have a distribution in the table: the target's, then the draft's.
__host__ __device__ inline int32_t table_rows(const AcceptParams& p) {
  return p.draft != nullptr ? 2 * p.nodes : p.nodes;
}

// Lays out one request's scratch, and counts the bytes of all.
inline CallScratch lay_out(AcceptLaunch& launch, bool eager) {
  const AcceptParams& p = launch.call;
  const WalkNeeds needs = walk_needs(p);
  int64_t end = 0;
  const auto take = [&end](int64_t bytes) {
    const int64_t begin = end;
    end += (bytes + 15) / 16 * 16;
    return begin;
  };
  launch.spans = eager ? spans_of(p.vocab) : 0;
  launch.states = take(needs.states ? (int64_t(p.max_depth) + 1) * int64_t(sizeof(WalkState)) : 0);
  launch.terms = take(needs.terms ? p.nodes * int64_t(sizeof(Term)) : 0);
  launch.marks = take(needs.marks ? p.nodes * int64_t(sizeof(PathMark)) : 0);
  if (eager) {
    launch.distributions = take(table_rows(p) * int64_t(sizeof(TokenDistribution)));
    launch.parts = take(int64_t(table_rows(p)) * launch.spans * int64_t(sizeof(DistributionPart)));
    launch.draw = take(sizeof(DeferredDraw));
    launch.bits = take(bit_words(p) * int64_t(sizeof(uint32_t)));
    launch.draw_parts = take(launch.spans * int64_t(sizeof(uint64_t)));
  }
  launch.stride = end;
  return {end * p.batch, eager ? (int64_t(table_rows(p)) + 1) * p.batch : 0};
}

template <class T>
__device__ __forceinline__ T* scratch_at(const AcceptLaunch& launch, int32_t request, int64_t begin) {
  return reinterpret_cast<T*>(launch.scratch + request * launch.stride + begin);
}

__device__ __forceinline__ WalkScratch walk_scratch_of(const AcceptLaunch& launch, int32_t request) {
  return {scratch_at<WalkState>(launch, request, launch.states), scratch_at<Term>(launch, request, launch.terms),
          scratch_at<PathMark>(launch, request, launch.marks)};
}
__device__ __forceinline__ TokenDistribution* distributions_of(const AcceptLaunch& launch, int32_t request) {
  return launch.spans == 0 ? nullptr : scratch_at<TokenDistribution>(launch, request, launch.distributions);
}
__device__ __forceinline__ DistributionPart* parts_of(const AcceptLaunch& launch, int32_t request, int32_t row) {
  return scratch_at<DistributionPart>(launch, request, launch.parts) + int64_t(row) * launch.spans;
}
__device__ __forceinline__ LastDraw draw_of(const AcceptLaunch& launch, int32_t request) {
  return {scratch_at<DeferredDraw>(launch, request, launch.draw), scratch_at<uint32_t>(launch, request, launch.bits),
          scratch_at<uint64_t>(launch, request, launch.draw_parts)};
}

__device__ inline Sampling row_sampling(const RequestRows& rows, bool of_target) {
  if (rows.p.rule == AcceptRule::kGreedy) return {0.0f, 0, 1.0f};
  return sampling_of(of_target ? rows.p.target_sampling : rows.p.draft_sampling, rows.request);
}

}  // namespace specdec::cuda
