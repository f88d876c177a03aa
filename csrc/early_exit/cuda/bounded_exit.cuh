// early_exit with bounds on a GPU: a small launch, then a launch of exit_confidence for each part of the head.
//
// The first launch measures. A block for each hidden row finds its length as it will be multiplied, and leaves an empty
// state; kBiasBlocks blocks for each part but the first find the greatest bias in it.
//
// A part's launch is exit_confidence's (exit_confidence.cuh) with two ends. Its blocks share the part's tiles, which
// begin where the part does, and have those rows that the part before has listed. The last block of a block of rows
// merges their states with those of the parts before, which lie in the first slot, puts the sum back there and writes
// statistics: a row that is closed keeps those of the last part that it saw. The last block of all asks of each row
// whether any unread logit can matter (bounded_exit.h, exit_part.cuh), and lists those for which one can. Where none is
// left, or no part, it decides who exits, and later launches end at once.
//
// How many launches there are depends on the number of parts alone, and nobody waits for a result. Rows are multiplied
// and merged one by one in an order that only the parts and the number of multiprocessors decide, so at ExitLevel::kRow
// a row depends on no other.
//
// The bound on a product's rounding is that of screened_exit.cuh, (256 + dim / 8) * 2^-23 of the lengths' product.
// Rows are staged as bfloat16 or float32 numbers, whose length is measured, or as float16 numbers times a power of two,
// which are longer by a 2^-10th at most, and by 2^-24 of the power a dim where they are small.
//
// Bytes: each part that some row needs, once; hidden rows and biases once more; scratch as exit_confidence's, a slot
// more for each row, which every part reads and writes.
#pragma once

#include "early_exit/cuda/exit_part.cuh"
#include "early_exit/cuda/exit_rows.cuh"

namespace specdec::cuda {

constexpr int32_t kBiasBlocks = 32;  // for each part
constexpr int kMeasureThreads = 256;

// The length of a row and what rounding adds to its products. By a block.
__device__ inline RowReach reach_of(TeamReducer& reduce, const BoundedLaunch& launch, int32_t row) {
  const ExitParams& p = launch.call.exit;
  const HiddenRows rows = {p, &row, 1, launch.hidden_aligned, launch.norm_aligned};
  const bool has_norm = p.norm_weight != nullptr, is_bfloat16 = p.head_type == HeadType::kBFloat16;
  const bool is_float16 = p.head_type == HeadType::kFloat16 || p.head_type == HeadType::kInt8;
  float squares = 0.0f, largest = 0.0f;
  double weighed = 0.0;
#pragma unroll 1
  for (int32_t dim = reduce.team.rank * 8; dim < p.dim; dim += reduce.team.size * 8) {
    float x[8], weight[8];
    numbers_of(rows.hidden(0, dim), p.hidden_dtype, x);
    if (has_norm) numbers_of(rows.norm(dim), p.norm_dtype, weight);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      float y = has_norm ? x[i] * weight[i] : x[i];
      if (is_bfloat16) y = to_float(from_float<BFloat16>(y));
      squares = fmaf(x[i], x[i], squares);
      weighed += double(y) * y;
      largest = fmaxf(largest, fabsf(y));
    }
  }
  squares = reduce.sum(squares);
  weighed = reduce(weighed, [](double a, double b) { return a + b; });
  largest = reduce(largest, [](float a, float b) { return fmaxf(a, b); });

  const float norm = has_norm ? inverse_rms(p, squares) : 1.0f;
  const double root = sqrt(double(p.dim)), sums = (256 + p.dim / 8.0) * 0x1p-23, vanishing = root * 0x1p-120;
  double length = norm * sqrt(weighed);
  if (is_float16) {
    const double lost = root * 0x1p-24 * power_of_two_inverse(scale_to_16_bits(largest * norm));
    length = length * (1 + 0x1p-10) + lost;
  }
  // Where squares vanish, their sum depends on who adds it up.
  if (has_norm && !(squares / float(p.dim) + p.norm_eps > 1e-30f)) length = -negative_infinity();
  constexpr double kOutward = 1 + 1e-6;
  return {(length * (1 + sums) + vanishing) * kOutward, (vanishing * length + p.dim * 0x1p-120) * kOutward};
}

// The first launch.
__global__ void __launch_bounds__(kMeasureThreads) measure_exit_kernel(BoundedLaunch launch) {
  const ExitParams& p = launch.call.exit;
  SPECDEC_SHARED(uint32_t, slots, [TeamReducer::kWords]);
  TeamReducer reduce({int32_t(threadIdx.x), kMeasureThreads}, slots);
  const int32_t block = int32_t(blockIdx.x), lane = int32_t(threadIdx.x) % kWarpSize;
  if (block < p.rows) {
    const RowReach reach = reach_of(reduce, launch, block);
    auto* all = reinterpret_cast<double*>(launch.scratch + launch.reach);
    if (threadIdx.x == 0) all[2 * int64_t(block)] = reach.by_length;
    if (threadIdx.x == 0) all[2 * int64_t(block) + 1] = reach.floor;
    const StoredStates stored(launch.scratch, launch.scratch + launch.keys, launch.slots, top_k_of(p));
    if (int(threadIdx.x) < kWarpSize) stored.leave(block, 0, empty_state(), 0, lane);
    return;
  }
  const int32_t share = (block - p.rows) % kBiasBlocks, part = 1 + (block - p.rows) / kBiasBlocks;
  const int32_t begin = launch.call.ends[part - 1], count = launch.call.ends[part] - begin;
  const int32_t each = (count + kBiasBlocks - 1) / kBiasBlocks, first = min(share * each, count);
  const float greatest = greatest_of(reduce, p.bias + begin + first, min(each, count - first));
  auto* biases = reinterpret_cast<float*>(launch.scratch + launch.biases);
  if (threadIdx.x == 0) biases[(part - 1) * kBiasBlocks + share] = greatest;
}

}  // namespace specdec::cuda
