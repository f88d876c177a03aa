// Shapes of tree_attention's tiles, and what one warp does with a tile of slots: scores, softmax, values.
//
// Rows of every tile in shared memory are 16 bytes longer than a head, so the eight rows that an ldmatrix reads lie in
// different banks, whatever the dimension, without a swizzle.
//
// An fp8 cache stays fp8 in shared memory and becomes 16-bit in registers. ldmatrix moves pairs of bytes as if they
// were 16-bit numbers, so a lane gets four neighbours where it would get two. For scores that is another order of the
// 16 dims of a matrix instruction, which q follows (float8_place); for values one instruction has the even, the next
// the odd columns of 16, and the sums are put straight after the last tile.
#pragma once

#include "attention/params.h"
#include "common/constants.h"
#include "common/cuda/device.cuh"

namespace specdec::cuda {

// T: the type of q and of the matrix instructions. Cache: T or Float8. kDim: the dimension, rounded up to one that is
// compiled. kRows: packed query rows of a block.
//
// A warp owns 16 rows. Two warps share them, each with all scores and half of the columns of the values, where a block
// would have few warps otherwise: with few rows, or with 64 of many columns. Slots are never split
// between warps: how a row's sum is rounded depends on the dimension alone, not on how many rows its neighbours have.
// Warps beyond those that multiply help with copies and with the join of splits.
//
// With 128 rows, or 64 of dim 256, the compiler holds a few numbers in local memory to stay within 128 registers: up to
// 84 bytes a thread, none of which are written in the loop over tiles, and one word of which is read there beside 64
// matrix instructions, eight more in masked tiles. For that a multiprocessor has 16 warps instead of 8, and twice as
// many bytes under way.
//
// Sizes are chosen for the 99 KiB of the smallest current devices (8.6, 8.9, 12.0) and for more than one block on the
// larger ones. Only 128 rows of dim 256 do not fit there: those devices serve them as two blocks of 64.
template <class T_, class Cache_, int kDim_, int kRows_>
struct TileShape {
  using T = T_;
  using Cache = Cache_;
  static constexpr bool kFloat8 = sizeof(Cache) == 1;
  static constexpr int kDim = kDim_;
  static constexpr int kRows = kRows_;
  static constexpr int kSlots = kDim <= 64 ? 64 : kDim <= 128 ? 32 : 16;
  static constexpr int kStages = kFloat8 ? 5 : 3;
  static constexpr int kRowWarps = kRows / 16;
  static constexpr int kColumnWarps = kRows <= 32 || (kDim > 128 && kRows <= 64) ? 2 : 1;
  static constexpr int kColumns = kDim / kColumnWarps;
  static constexpr int kWorkers = kRowWarps * kColumnWarps;  // warps that multiply
  static constexpr int kThreads = (kWorkers < 4 ? 4 : kWorkers) * kWarpSize;
  // Blocks that are to share a multiprocessor, which limits a thread's registers: 168 where a block has 4 warps, 128
  // where it has 8.
  static constexpr int kMinBlocks = kThreads <= 128 ? 3 : kDim > 128 && kRows > 64 ? 1 : 2;
  static constexpr int kPitch = kDim + 8;                             // of q
  static constexpr int kCachePitch = kDim + 16 / int(sizeof(Cache));  // of K and V
  static constexpr int kTile = kSlots * kCachePitch;                  // elements of K, or of V, of one stage
};

// Through 2 to a power below 0, which can't overflow; near zero, where 1 - e would cancel, by its series.
__device__ __forceinline__ float soft_tanh(float x) {
  const float e = fast_exp2(-2.0f * kLog2E * fabsf(x));
  const float far = (1.0f - e) / (1.0f + e);
  const float square = x * x;
  float series = 0.021869488536155203f - square * 0.008863235529902197f;
  series = -0.05396825396825397f + square * series;
  series = 0.13333333333333333f + square * series;
  series = -0.3333333333333333f + square * series;
  return fabsf(x) < 0.35f ? x + x * square * series : (x < 0.0f ? -far : far);
}

// What a lane holds of its warp's 16 rows: rows lane / 4 and lane / 4 + 8, and of the warp's columns one pair in four,
// those that `column` names.
template <class Shape>
struct WarpRows {
  float out[Shape::kColumns / 8][4] = {};
  float maximum[2];     // in units of log2
  float total[2] = {};  // of this lane's slots until the loop ends
};

// The first column of a lane's j-th pair, after the last tile.
template <class Shape>
__device__ __forceinline__ int column_of(int j, int lane) {
  return j / 2 * 16 + (Shape::kFloat8 ? lane % 4 * 4 + j % 2 * 2 : j % 2 * 8 + lane % 4 * 2);
}

// Where a pair of neighbouring dims of q lies among the eight pairs of 16 dims, for fp8 keys.
__device__ __forceinline__ int float8_place(int pair) { return pair / 2 + pair % 2 * 4; }

// scores [16 rows, kSlots] of a warp = q . k. `q` is at the warp's first row.
template <class Shape>
__device__ __forceinline__ void score_tile(float (&scores)[Shape::kSlots / 8][4], const typename Shape::T* q,
                                           const typename Shape::Cache* k, int lane) {
  using T = typename Shape::T;
#pragma unroll
  for (int step = 0; step < Shape::kDim / 16; ++step) {
    uint32_t a[4], b[4];
    ldmatrix_x4(a, q + (lane % 16) * Shape::kPitch + step * 16 + lane / 16 * 8);
    if constexpr (Shape::kFloat8) {
#pragma unroll
      for (int j = 0; j < Shape::kSlots / 32; ++j) {
        ldmatrix_x4(b, k + (j * 32 + lane) * Shape::kCachePitch + step * 16);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          uint32_t b0, b1;
          widen_float8<T>(b[i], b0, b1);
          mma_m16n8k16<T>(scores[4 * j + i], a, b0, b1);
        }
      }
    } else {
#pragma unroll
      for (int j = 0; j < Shape::kSlots / 16; ++j) {
        ldmatrix_x4(b, k + (j * 16 + lane % 8 + lane / 16 * 8) * Shape::kCachePitch + step * 16 + lane / 8 % 2 * 8);
        mma_m16n8k16<T>(scores[2 * j], a, b[0], b[1]);
        mma_m16n8k16<T>(scores[2 * j + 1], a, b[2], b[3]);
      }
    }
  }
}

// Online softmax: scores become weights, the rows' sums follow the new maximum.
template <class Shape>
__device__ __forceinline__ void online_softmax(WarpRows<Shape>& rows, float (&scores)[Shape::kSlots / 8][4]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float maximum = rows.maximum[i];
#pragma unroll
    for (int j = 0; j < Shape::kSlots / 8; ++j) {
      maximum = fmaxf(maximum, fmaxf(scores[j][2 * i], scores[j][2 * i + 1]));
    }
    maximum = fmaxf(maximum, warp_shuffle_xor(maximum, 1));
    maximum = fmaxf(maximum, warp_shuffle_xor(maximum, 2));
    const float base = maximum == negative_infinity() ? 0.0f : maximum;  // a row that has seen nothing yet
    const float decay = fast_exp2(rows.maximum[i] - base);
    rows.maximum[i] = maximum;
    float total = rows.total[i] * decay;
#pragma unroll
    for (int j = 0; j < Shape::kSlots / 8; ++j) {
      scores[j][2 * i] = fast_exp2(scores[j][2 * i] - base);
      scores[j][2 * i + 1] = fast_exp2(scores[j][2 * i + 1] - base);
      total += scores[j][2 * i] + scores[j][2 * i + 1];
    }
    rows.total[i] = total;
#pragma unroll
    for (int j = 0; j < Shape::kColumns / 8; ++j) {
      rows.out[j][2 * i] *= decay;
      rows.out[j][2 * i + 1] *= decay;
    }
  }
}

// Four bytes of two slots and two columns, [slot][column], turned around.
__device__ __forceinline__ uint32_t turned(uint32_t bytes) {
  return (bytes & 0xff0000ffu) | (bytes >> 8 & 0x0000ff00u) | (bytes << 8 & 0x00ff0000u);
}

// Two 16-bit numbers, in the halves of a word.
template <class T>
constexpr uint32_t kExponentOf = 0x7f80;
template <>
constexpr uint32_t kExponentOf<Float16> = 0x7c00;
template <class T>
constexpr uint32_t kOneOf = 0x3f80;
template <>
constexpr uint32_t kOneOf<Float16> = 0x3c00;

template <class T>
__device__ __forceinline__ bool has_nonfinite(uint32_t pair) {
  return (pair & kExponentOf<T>) == kExponentOf<T> || (pair >> 16 & kExponentOf<T>) == kExponentOf<T>;
}

// Takes what is not finite out of a pair. Where that was +Inf `high` has a 1, where it was -Inf `low`; for NaN both.
template <class T>
__device__ __forceinline__ void take_nonfinite(uint32_t& pair, uint32_t& high, uint32_t& low) {
  high = low = 0;
#pragma unroll
  for (int shift = 0; shift < 32; shift += 16) {
    const uint32_t bits = pair >> shift & 0xffff;
    if ((bits & kExponentOf<T>) != kExponentOf<T>) continue;
    pair &= ~(0xffffu << shift);
    const bool nan = (bits & 0x7fff) != kExponentOf<T>;
    if (nan || (bits & 0x8000) == 0) high |= kOneOf<T> << shift;
    if (nan || (bits & 0x8000) != 0) low |= kOneOf<T> << shift;
  }
}

// Makes 16 slots of 8 columns of V (b0, b1) finite, and adds what they lose to the rows that see it. `seen` has the
// bits of these 16 slots.
template <class T>
__device__ __forceinline__ void add_nonfinite(float (&out)[4], uint32_t seen, uint32_t& b0, uint32_t& b1) {
  uint32_t sees[4], high[2], low[2];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    sees[i] = (seen >> 2 * i & 1) * kOneOf<T> | (seen >> (2 * i + 1) & 1) * (kOneOf<T> << 16);
  }
  take_nonfinite<T>(b0, high[0], low[0]);
  take_nonfinite<T>(b1, high[1], low[1]);
  float of_high[4] = {}, of_low[4] = {};
  mma_m16n8k16<T>(of_high, sees, high[0], high[1]);
  mma_m16n8k16<T>(of_low, sees, low[0], low[1]);
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    if (of_high[e] > 0.0f) out[e] -= negative_infinity();
    if (of_low[e] > 0.0f) out[e] += negative_infinity();
  }
}

// out += weights . v. `v` is at the warp's first column. In a masked tile `seen` tells which slots the lane's rows see,
// and others don't reach them, whatever they hold.
template <class Shape, bool kMasked>
__device__ __forceinline__ void add_values(WarpRows<Shape>& rows, const float (&weights)[Shape::kSlots / 8][4],
                                           const typename Shape::Cache* v, uint32_t seen, int lane) {
  using T = typename Shape::T;
#pragma unroll
  for (int step = 0; step < Shape::kSlots / 16; ++step) {
    const float (&left)[4] = weights[2 * step];
    const float (&right)[4] = weights[2 * step + 1];
    const uint32_t a[4] = {pack_pair<T>(left[0], left[1]), pack_pair<T>(left[2], left[3]),
                           pack_pair<T>(right[0], right[1]), pack_pair<T>(right[2], right[3])};
    const typename Shape::Cache* row = v + (step * 16 + lane % 16) * Shape::kCachePitch;
    uint32_t b[4];
    if constexpr (Shape::kFloat8) {
#pragma unroll
      for (int j = 0; j < Shape::kColumns / 32; ++j) {
        ldmatrix_x4_trans(b, row + j * 32 + lane / 16 * 16);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          uint32_t even[2], odd[2];
          widen_float8<T>(turned(b[2 * i]), even[0], odd[0]);
          widen_float8<T>(turned(b[2 * i + 1]), even[1], odd[1]);
          if constexpr (kMasked) {
            const bool nonfinite = has_nonfinite<T>(even[0]) || has_nonfinite<T>(even[1]) || has_nonfinite<T>(odd[0]) ||
                                   has_nonfinite<T>(odd[1]);
            if (warp_ballot(nonfinite) != 0) {
              add_nonfinite<T>(rows.out[4 * j + 2 * i], seen >> 8 * step, even[0], even[1]);
              add_nonfinite<T>(rows.out[4 * j + 2 * i + 1], seen >> 8 * step, odd[0], odd[1]);
            }
          }
          mma_m16n8k16<T>(rows.out[4 * j + 2 * i], a, even[0], even[1]);
          mma_m16n8k16<T>(rows.out[4 * j + 2 * i + 1], a, odd[0], odd[1]);
        }
      }
    } else {
#pragma unroll
      for (int j = 0; j < Shape::kColumns / 16; ++j) {
        ldmatrix_x4_trans(b, row + j * 16 + lane / 16 * 8);
        if constexpr (kMasked) {
          bool nonfinite = false;
#pragma unroll
          for (int i = 0; i < 4; ++i) nonfinite = nonfinite || has_nonfinite<T>(b[i]);
          if (warp_ballot(nonfinite) != 0) {
            add_nonfinite<T>(rows.out[2 * j], seen >> 8 * step, b[0], b[1]);
            add_nonfinite<T>(rows.out[2 * j + 1], seen >> 8 * step, b[2], b[3]);
          }
        }
        mma_m16n8k16<T>(rows.out[2 * j], a, b[0], b[1]);
        mma_m16n8k16<T>(rows.out[2 * j + 1], a, b[2], b[3]);
      }
    }
  }
}

// After the last tile: totals over all slots, and pairs of neighbouring columns.
template <class Shape>
__device__ __forceinline__ void finish_sums(WarpRows<Shape>& rows) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    rows.total[i] += warp_shuffle_xor(rows.total[i], 1);
    rows.total[i] += warp_shuffle_xor(rows.total[i], 2);
    if constexpr (Shape::kFloat8) {
#pragma unroll
      for (int j = 0; j < Shape::kColumns / 8; j += 2) {
        const float even = rows.out[j][2 * i + 1];
        rows.out[j][2 * i + 1] = rows.out[j + 1][2 * i];
        rows.out[j + 1][2 * i] = even;
      }
    }
  }
}

}  // namespace specdec::cuda
