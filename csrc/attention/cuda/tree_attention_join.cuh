// What becomes of tree_attention's sums: a row's output and log-sum-exp, and the join of the splits of a request.
//
// A split leaves [kRows, kDim] sums and [kRows, 2] maxima and totals, of the rows that are real: padding moves no byte.
// The last block to arrive reads them back, from the L2 cache as a rule: a warp has a row, its lanes the columns, and up
// to 16 splits are under way at a time.
#pragma once

#include "attention/cuda/tree_attention.cuh"

namespace specdec::cuda {

// Where a packed row's result goes.
template <class T>
struct RowTarget {
  T* out;
  float* lse;
  int32_t head;
  bool exists, real;
};
template <class T>
__device__ __forceinline__ RowTarget<T> row_target(const TreeAttentionLaunch& launch, const BlockWork& work, int row) {
  const TreeAttentionParams& p = launch.call;
  const int32_t packed = work.first_row + row, tree_row = packed / launch.group;
  RowTarget<T> target;
  target.head = work.kv_head * launch.group + packed % launch.group;
  target.exists = tree_row < work.own_rows;
  target.real = target.exists && tree_row >= work.real_begin && tree_row < work.real_end;
  const int64_t q_row = int64_t(work.first_q) + tree_row;
  target.out = static_cast<T*>(p.out);
  if (target.exists) {
    target.out += work.request * p.out_stride_batch + q_row * p.out_stride_row + target.head * p.out_stride_head;
  }
  const int64_t lse_row = (p.offsets == nullptr ? int64_t(work.request) * p.queries : 0) + q_row;
  target.lse = p.lse == nullptr || !target.exists ? nullptr : p.lse + lse_row * p.heads + target.head;
  return target;
}

// What a row's sums become: the factor of its output, and its log-sum-exp.
struct RowResult {
  float factor, lse;
};
template <class T>
__device__ __forceinline__ RowResult finish_row(const TreeAttentionParams& p, const RowTarget<T>& target, float maximum,
                                                float total) {
  if (!target.real) return {0.0f, negative_infinity()};
  float factor = 1.0f;
  if (p.sinks != nullptr) {
    const float sink = p.sinks[target.head] * kLog2E;
    const float joined = fmaxf(maximum, sink);
    const float base = joined == negative_infinity() ? 0.0f : joined;
    factor = fast_exp2(maximum - base);
    total = total * factor + fast_exp2(sink - base);
    maximum = joined;
  }
  if (total == 0.0f) return {0.0f, negative_infinity()};
  return {factor * p.out_scale / total, (maximum + log2f(total)) * kLn2};
}

// The sums of a row that has seen nothing may be those of a query that is not there.
__device__ __forceinline__ float scaled(float sum, const RowResult& result) {
  return result.factor == 0.0f ? 0.0f : sum * result.factor;
}

template <class Shape>
__device__ __forceinline__ float* split_scratch(const TreeAttentionLaunch& launch, int32_t block) {
  return launch.call.scratch + int64_t(block) * Shape::kRows * (Shape::kDim + 2);
}

template <class Shape>
__device__ __forceinline__ void leave_split(const WarpRows<Shape>& sums, const TreeAttentionLaunch& launch,
                                            const BlockWork& work, int warp, int lane) {
  float* const split = split_scratch<Shape>(launch, int32_t(blockIdx.x));
  const int first_column = warp / Shape::kRowWarps * Shape::kColumns;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = warp % Shape::kRowWarps * 16 + lane / 4 + 8 * i;
    const int32_t tree_row = (work.first_row + row) / launch.group;
    if (tree_row < work.real_begin || tree_row >= work.real_end) continue;
    if (first_column == 0 && lane % 4 == 0) {
      *reinterpret_cast<Pack<float, 2>*>(split + Shape::kRows * Shape::kDim +
                                         row * 2) = {{sums.maximum[i], sums.total[i]}};
    }
#pragma unroll
    for (int j = 0; j < Shape::kColumns / 8; ++j) {
      const int column = first_column + column_of<Shape>(j, lane);
      *reinterpret_cast<Pack<float, 2>*>(split + row * Shape::kDim +
                                         column) = {{sums.out[j][2 * i], sums.out[j][2 * i + 1]}};
    }
  }
}

// The maximum and the total of a row over all splits. Lane l has splits l, l + 32, ...
template <class Shape>
__device__ __forceinline__ Pack<float, 2> join_stats(const float* first_split, int32_t splits, int row, int lane) {
  constexpr int64_t kSplit = Shape::kRows * (Shape::kDim + 2);
  const float* stats = first_split + Shape::kRows * Shape::kDim + row * 2;
  float maximum = negative_infinity(), total = 0.0f;
  for (int32_t split = lane; split < splits; split += kWarpSize) maximum = fmaxf(maximum, stats[split * kSplit]);
#pragma unroll
  for (int bit = 1; bit < kWarpSize; bit *= 2) maximum = fmaxf(maximum, warp_shuffle_xor(maximum, bit));
  const float base = maximum == negative_infinity() ? 0.0f : maximum;
  for (int32_t split = lane; split < splits; split += kWarpSize) {
    total += stats[split * kSplit + 1] * fast_exp2(stats[split * kSplit] - base);
  }
#pragma unroll
  for (int bit = 1; bit < kWarpSize; bit *= 2) total += warp_shuffle_xor(total, bit);
  return {{maximum, total}};
}

// The last block joins the splits, in the order of the slots.
template <class Shape>
__device__ __forceinline__ void join_splits(const TreeAttentionLaunch& launch, const BlockWork& work) {
  using T = typename Shape::T;
  constexpr int64_t kSplit = Shape::kRows * (Shape::kDim + 2);
  constexpr int kAtOnce = 16;
  const TreeAttentionParams& p = launch.call;
  const int lane = threadIdx.x % kWarpSize;
  const float* first_split = split_scratch<Shape>(launch, int32_t(blockIdx.x) - work.split);
#pragma unroll 1
  for (int row = threadIdx.x / kWarpSize; row < Shape::kRows; row += Shape::kThreads / kWarpSize) {
    const RowTarget<T> target = row_target<T>(launch, work, row);
    if (!target.exists) continue;
    const int32_t splits = target.real ? work.splits : 0;
    const Pack<float, 2> joined = join_stats<Shape>(first_split, splits, row, lane);
    const float maximum = joined.element[0], base = maximum == negative_infinity() ? 0.0f : maximum;
    const RowResult result = finish_row(p, target, maximum, joined.element[1]);
    if (target.lse != nullptr && lane == 0) *target.lse = result.lse;
    const float* stats = first_split + Shape::kRows * Shape::kDim + row * 2;
#pragma unroll 1
    for (int column = lane * 4; column < p.dim; column += kWarpSize * 4) {
      float sum[4] = {};
#pragma unroll 1
      for (int32_t split = 0; split < splits; split += kAtOnce) {
        Pack<float, 4> piece[kAtOnce];
        float weight[kAtOnce];
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          piece[i] = {};
          weight[i] = 0.0f;
          if (split + i >= splits) continue;
          const int64_t at = (split + i) * kSplit;
          piece[i] = *reinterpret_cast<const Pack<float, 4>*>(first_split + at + row * Shape::kDim + column);
          weight[i] = fast_exp2(stats[at] - base);
        }
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
#pragma unroll
          for (int e = 0; e < 4; ++e) sum[e] += piece[i].element[e] * weight[i];
        }
      }
      Pack<T, 4> rounded;
#pragma unroll
      for (int e = 0; e < 4; ++e) rounded.element[e] = from_float<T>(scaled(sum[e], result));
      *reinterpret_cast<Pack<T, 4>*>(target.out + column) = rounded;
    }
  }
}

// Rows of a packed q that no block has: before the first request, after the last one, and a request's rows from
// max_queries on. Of each KV head the request's first block blanks them.
template <class T>
__device__ __forceinline__ void blank_rows(const TreeAttentionLaunch& launch, const BlockWork& work) {
  const TreeAttentionParams& p = launch.call;
  if (p.offsets == nullptr || work.first_row != 0 || work.split != 0) return;
  const int32_t pieces = work.request == 0 ? 2 : 1;
  for (int32_t piece = 0; piece < pieces; ++piece) {
    const bool before = piece == 1;
    const int32_t begin = before ? 0 : work.first_q + work.own_rows;
    int32_t end = before ? work.first_q : at_most(at_least(p.offsets[work.request + 1], begin), p.queries);
    if (!before && work.request == p.batch - 1) end = p.queries;
    for (int64_t i = threadIdx.x; i < int64_t(end - begin) * launch.group; i += blockDim.x) {
      const int64_t row = begin + i / launch.group;
      const int32_t head = work.kv_head * launch.group + int32_t(i % launch.group);
      T* out = static_cast<T*>(p.out) + row * p.out_stride_row + head * p.out_stride_head;
      for (int32_t column = 0; column < p.dim; ++column) out[column] = from_float<T>(0.0f);
      if (p.lse != nullptr) p.lse[row * p.heads + head] = negative_infinity();
    }
  }
}

}  // namespace specdec::cuda
