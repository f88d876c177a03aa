// Shapes of tree_attention's tiles, and what one warp does with a tile of slots: scores, masks, softmax, values.
//
// Rows of every tile in shared memory are 16 bytes longer than a head, so the eight rows that an ldmatrix reads lie in
// different banks, whatever the dimension, without a swizzle.
#pragma once

#include "specdec/device.cuh"
#include "specdec/params.h"

namespace specdec {

// kDim: the dimension, rounded up to one that is compiled. kRows: packed query rows of a block. A warp owns 16 rows and
// all slots of a tile, or half of them where there are too few rows to keep four warps busy. Sizes are chosen for the
// 99 KiB of the smallest current devices (8.6, 8.9, 12.0) and for more than one block on the larger ones.
template <int kDim_, int kRows_>
struct TileShape {
  static constexpr int kDim = kDim_;
  static constexpr int kRows = kRows_;
  static constexpr int kSlots = kDim <= 64 ? 64 : 32;
  static constexpr int kStages = kDim <= 192 ? 3 : 2;
  static constexpr int kRowWarps = kRows / 16;
  static constexpr int kSlotWarps = kRows <= 32 ? 2 : 1;
  static constexpr int kThreads = kRowWarps * kSlotWarps * kWarpSize;
  static constexpr int kWarpSlots = kSlots / kSlotWarps;
  static constexpr int kPitch = kDim + 8;
  static constexpr int kTile = kSlots * kPitch;  // elements of K, or of V, of one stage
};

// Where a slot lies: its page and its row there. A slot that must not be read has page -1.
struct SlotPlace {
  int32_t page, row;
};

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

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

// 64 bits of a set, from bit `first` on. Bits before the first one (the context) are ones, those after the end zeros.
__device__ __forceinline__ uint64_t bits_from(const uint64_t* words, int32_t count, int32_t first) {
  if (first <= -64) return ~uint64_t(0);
  const int32_t word = first < 0 ? -1 : first / 64;
  const int32_t shift = first - word * 64;
  const uint64_t low = word < 0 ? ~uint64_t(0) : (word < count ? words[word] : 0);
  const uint64_t high = word + 1 < count ? words[word + 1] : 0;
  return shift == 0 ? low : low >> shift | high << (64 - shift);
}

// What a lane holds of its warp's 16 rows: rows lane / 4 and lane / 4 + 8, every fourth pair of columns.
template <class Shape>
struct WarpRows {
  float out[Shape::kDim / 8][4] = {};
  float maximum[2];     // in units of log2
  float total[2] = {};  // of this lane's columns until the loop ends
};

// scores [16 rows, kWarpSlots] of a warp = q . k. `k` is at the warp's first slot, `q` at its first row.
template <class T, class Shape>
__device__ __forceinline__ void score_tile(float (&scores)[Shape::kWarpSlots / 8][4], const T* q, const T* k,
                                           int lane) {
#pragma unroll
  for (int step = 0; step < Shape::kDim / 16; ++step) {
    uint32_t a[4];
    ldmatrix_x4(a, q + (lane % 16) * Shape::kPitch + step * 16 + lane / 16 * 8);
#pragma unroll
    for (int j = 0; j < Shape::kWarpSlots / 16; ++j) {
      uint32_t b[4];
      ldmatrix_x4(b, k + (j * 16 + lane % 8 + lane / 16 * 8) * Shape::kPitch + step * 16 + lane / 8 % 2 * 8);
      mma_m16n8k16<T>(scores[2 * j], a, b[0], b[1]);
      mma_m16n8k16<T>(scores[2 * j + 1], a, b[2], b[3]);
    }
  }
}

// Online softmax: scores become weights, the rows' sums follow the new maximum.
template <class Shape>
__device__ __forceinline__ void soften(WarpRows<Shape>& rows, float (&scores)[Shape::kWarpSlots / 8][4]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float maximum = rows.maximum[i];
#pragma unroll
    for (int j = 0; j < Shape::kWarpSlots / 8; ++j) {
      maximum = fmaxf(maximum, fmaxf(scores[j][2 * i], scores[j][2 * i + 1]));
    }
    maximum = fmaxf(maximum, warp_shuffle_xor(maximum, 1));
    maximum = fmaxf(maximum, warp_shuffle_xor(maximum, 2));
    const float base = maximum == negative_infinity() ? 0.0f : maximum;  // a row that has seen nothing yet
    const float decay = fast_exp2(rows.maximum[i] - base);
    rows.maximum[i] = maximum;
    float total = rows.total[i] * decay;
#pragma unroll
    for (int j = 0; j < Shape::kWarpSlots / 8; ++j) {
      scores[j][2 * i] = fast_exp2(scores[j][2 * i] - base);
      scores[j][2 * i + 1] = fast_exp2(scores[j][2 * i + 1] - base);
      total += scores[j][2 * i] + scores[j][2 * i + 1];
    }
    rows.total[i] = total;
#pragma unroll
    for (int j = 0; j < Shape::kDim / 8; ++j) {
      rows.out[j][2 * i] *= decay;
      rows.out[j][2 * i + 1] *= decay;
    }
  }
}

// out += weights . v. `v` is at the warp's first slot.
template <class T, class Shape>
__device__ __forceinline__ void add_values(WarpRows<Shape>& rows, const float (&weights)[Shape::kWarpSlots / 8][4],
                                           const T* v, int lane) {
#pragma unroll
  for (int step = 0; step < Shape::kWarpSlots / 16; ++step) {
    const float (&left)[4] = weights[2 * step];
    const float (&right)[4] = weights[2 * step + 1];
    const uint32_t a[4] = {pack_pair<T>(left[0], left[1]), pack_pair<T>(left[2], left[3]),
                           pack_pair<T>(right[0], right[1]), pack_pair<T>(right[2], right[3])};
#pragma unroll
    for (int j = 0; j < Shape::kDim / 16; ++j) {
      uint32_t b[4];
      ldmatrix_x4_trans(b, v + (step * 16 + lane % 16) * Shape::kPitch + j * 16 + lane / 16 * 8);
      mma_m16n8k16<T>(rows.out[2 * j], a, b[0], b[1]);
      mma_m16n8k16<T>(rows.out[2 * j + 1], a, b[2], b[3]);
    }
  }
}

// Two halves of the slots, done by two warps, become one. `out` is [rows, kDim], `stats` is [rows, 2].
template <class Shape>
__device__ __forceinline__ void leave_half(const WarpRows<Shape>& rows, float* out, float* stats, int lane) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = lane / 4 + 8 * i;
    if (lane % 4 == 0) {
      stats[row * 2] = rows.maximum[i];
      stats[row * 2 + 1] = rows.total[i];
    }
#pragma unroll
    for (int j = 0; j < Shape::kDim / 8; ++j) {
      float* at = out + row * Shape::kDim + j * 8 + lane % 4 * 2;
      at[0] = rows.out[j][2 * i];
      at[1] = rows.out[j][2 * i + 1];
    }
  }
}
template <class Shape>
__device__ __forceinline__ void join_half(WarpRows<Shape>& rows, const float* out, const float* stats, int lane) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = lane / 4 + 8 * i;
    const float maximum = fmaxf(rows.maximum[i], stats[row * 2]);
    const float base = maximum == negative_infinity() ? 0.0f : maximum;
    const float mine = fast_exp2(rows.maximum[i] - base);
    const float other = fast_exp2(stats[row * 2] - base);
    rows.maximum[i] = maximum;
    rows.total[i] = rows.total[i] * mine + stats[row * 2 + 1] * other;
#pragma unroll
    for (int j = 0; j < Shape::kDim / 8; ++j) {
      const float* at = out + row * Shape::kDim + j * 8 + lane % 4 * 2;
      rows.out[j][2 * i] = rows.out[j][2 * i] * mine + at[0] * other;
      rows.out[j][2 * i + 1] = rows.out[j][2 * i + 1] * mine + at[1] * other;
    }
  }
}

}  // namespace specdec
