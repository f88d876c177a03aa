// Hidden rows on their way into the products of an LM head: the norm, its weight, rounding.
//
// They come in units of eight dims through registers: the loads of a piece start before another one is multiplied, the
// numbers are stored behind it. A thread has the same dims of one or two rows in every piece; the second row comes
// while the other half is multiplied. Rows in memory are read again for each tile of the head, from the L2 cache as a
// rule.
//
// The norm. 1 / rms is one number for a row, so it may come last: where rows are staged as bfloat16 or float32, the
// squares are summed on the way through the first tile, and logits are multiplied when that is done. A float16 has
// neither the range of x * weight nor that of x, so such rows are read once before: their greatest number gives a power
// of two that brings them near 2^14, and 1 / rms goes with it. Logits are divided by the power of two. Small numbers
// are lost below 2^-38 of the greatest, which is what the second part of a number is good for, too.
#pragma once

#include "early_exit/cuda/head_tiles.cuh"

namespace specdec::cuda {

// Eight numbers of a row as they lie in memory; 16-bit ones fill the first half.
struct RowUnit {
  Bytes16 half[2];
};

__device__ __forceinline__ RowUnit load_unit(const void* row, DType dtype, int32_t first, int32_t count, bool aligned) {
  RowUnit unit = {};
  if (first >= count) return unit;
  const auto* halves = static_cast<const uint16_t*>(row) + first;
  const auto* words = static_cast<const uint32_t*>(row) + first;
  if (aligned && first + 8 <= count) {
    if (dtype == DType::kFloat32) {
      unit.half[0] = load_16(words);
      unit.half[1] = load_16(words + 4);
    } else {
      unit.half[0] = load_16(halves);
    }
    return unit;
  }
  // One after the other from behind: indices that are no constants would need local memory, unrolled loads registers.
#pragma unroll 1
  for (int i = 0; i < 8; ++i) {
    const bool exists = first + i < count, is_wide = dtype == DType::kFloat32;
    const uint32_t next = !exists ? 0 : is_wide ? words[i] : halves[i];
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      uint32_t& word = unit.half[k / 4].word[k % 4];
      const uint32_t above = k < 7 ? unit.half[(k + 1) / 4].word[(k + 1) % 4] : 0;
      if (is_wide) {
        word = k < 7 ? above : next;
      } else if (k < 4) {
        word = word >> 16 | (k < 3 ? above : next) << 16;
      }
    }
  }
  return unit;
}

__device__ __forceinline__ void numbers_of(const RowUnit& unit, DType dtype, float (&numbers)[8]) {
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const uint32_t pair = unit.half[0].word[i / 2], bits = i % 2 == 0 ? pair & 0xffff : pair >> 16;
    numbers[i] = dtype == DType::kFloat32    ? float_of(unit.half[i / 4].word[i % 4])
                 : dtype == DType::kBFloat16 ? float_of(bits << 16)
                                             : float16_bits_to_float(bits);
  }
}

// The hidden rows of a block.
struct HiddenRows {
  const ExitParams& p;
  const int32_t* ids;  // [count] in shared memory: registers are short
  int32_t count;
  bool aligned, norm_aligned;

  __device__ __forceinline__ int32_t row(int n) const { return ids[n]; }
  __device__ __forceinline__ RowUnit hidden(int n, int32_t dim) const {
    const int64_t size = p.hidden_dtype == DType::kFloat32 ? 4 : 2;
    const auto* at = static_cast<const unsigned char*>(p.hidden) + int64_t(row(n)) * p.hidden_stride_row * size;
    return load_unit(at, p.hidden_dtype, dim, p.dim, aligned);
  }
  __device__ __forceinline__ RowUnit norm(int32_t dim) const {
    return load_unit(p.norm_weight, p.norm_dtype, dim, p.dim, norm_aligned);
  }
};

// Whether 1 / rms is applied to logits, not to rows.
template <class Shape>
constexpr bool kNormsLast = !std::is_same_v<typename Shape::T, Float16>;

// 2^k for which largest * 2^k is from 2^13 to 2^14; 1 where the largest is 0, NaN or infinite.
__device__ __forceinline__ float scale_to_16_bits(float largest) {
  const int32_t exponent = int32_t(bits_of(largest) >> 23 & 0xff);
  if (exponent == 0 || exponent == 255) return 1.0f;
  return float_of(uint32_t(min(267 - exponent, 253)) << 23);
}

__device__ __forceinline__ float power_of_two_inverse(float power) { return float_of((254u << 23) - bits_of(power)); }

__device__ __forceinline__ float inverse_rms(const ExitParams& p, float squares) {
  return 1.0f / sqrtf(squares / float(p.dim) + p.norm_eps);
}

// What rows are multiplied by, in shared memory: when they are staged, and their logits. Where norms come last `staged`
// has the sum of their squares instead.
struct RowFactors {
  float *staged, *logit;  // [kRows]
};

// A warp has a row. The factors are seen behind the next barrier.
template <class Shape>
__device__ inline void find_factors(const HiddenRows& rows, const RowFactors& factors) {
  const int lane = int(threadIdx.x) % kWarpSize;
  const bool has_norm = rows.p.norm_weight != nullptr;
  for (int n = int(threadIdx.x) / kWarpSize; n < Shape::kRows; n += Shape::kThreads / kWarpSize) {
    float squares = 0.0f, largest = 0.0f;
    if constexpr (!kNormsLast<Shape>) {
      const int32_t dims = n < rows.count ? rows.p.dim : 0;
#pragma unroll 2
      for (int32_t dim = lane * 8; dim < dims; dim += kWarpSize * 8) {
        float x[8], weight[8];
        numbers_of(rows.hidden(n, dim), rows.p.hidden_dtype, x);
        if (has_norm) numbers_of(rows.norm(dim), rows.p.norm_dtype, weight);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          squares = fmaf(x[i], x[i], squares);  // to the bit what the screened form makes of the same row
          largest = fmaxf(largest, fabsf(has_norm ? x[i] * weight[i] : x[i]));
        }
      }
#pragma unroll
      for (int bit = 1; bit < kWarpSize; bit *= 2) {
        squares += warp_shuffle_xor(squares, bit);
        largest = fmaxf(largest, warp_shuffle_xor(largest, bit));
      }
    }
    if (lane != 0) continue;
    const float norm = has_norm && !kNormsLast<Shape> ? inverse_rms(rows.p, squares) : 1.0f;
    const float scale = kNormsLast<Shape> ? 1.0f : scale_to_16_bits(largest * norm);
    factors.staged[n] = kNormsLast<Shape> ? 0.0f : norm * scale;
    factors.logit[n] = power_of_two_inverse(scale);
  }
}

// Brings the hidden rows of a piece into a stage. Full: the type in which the whole head takes them, which the screened
// form rounds them to before.
template <class Shape, class Full = typename Shape::T>
class RowStager {
 public:
  static constexpr int kUnits = Shape::kDims / 8;  // of a row's piece
  static constexpr int kStride = Shape::kThreads / kUnits;
  static constexpr int kPerThread = (Shape::kRows + kStride - 1) / kStride;

  __device__ RowStager(const HiddenRows& rows, const RowFactors& factors) : rows_(rows), factors_(factors) {}

  // A thread's i-th row.
  __device__ __forceinline__ void load(int i, int32_t first_dim) {
    hidden_ = {};
    if (row(i) < rows_.count) hidden_ = rows_.hidden(row(i), first_dim + unit() * 8);
  }

  // `first_time`: of these dims. Their weights are few enough for the first-level cache.
  __device__ __forceinline__ void store(int i, int32_t first_dim, unsigned char* stage, bool first_time) {
    if (row(i) >= Shape::kRows) return;
    const bool has_norm = rows_.p.norm_weight != nullptr;
    float y[8], weight[8];
    numbers_of(hidden_, rows_.p.hidden_dtype, y);
    if constexpr (kNormsLast<Shape>) {
      if (first_time && has_norm) {
        float squares = 0.0f;
#pragma unroll
        for (int e = 0; e < 8; ++e) squares += y[e] * y[e];
#pragma unroll
        for (int bit = 1; bit < kUnits; bit *= 2) squares += warp_shuffle_xor(squares, bit);
        if (unit() == 0) factors_.staged[row(i)] += squares;
      }
    } else if constexpr (!kRounded) {
      multiply_by_factor(y, row(i));
    }
    if (has_norm) {
      numbers_of(rows_.norm(first_dim + unit() * 8), rows_.p.norm_dtype, weight);
#pragma unroll
      for (int e = 0; e < 8; ++e) y[e] *= weight[e];
    }
    if constexpr (kRounded) {
#pragma unroll
      for (int e = 0; e < 8; ++e) y[e] = to_float(from_float<Full>(y[e]));
      multiply_by_factor(y, row(i));
    }
    put(stage + Shape::kHeadBytes, row(i), y);
  }

  // When the first tile is done. The factors are seen behind the next barrier.
  __device__ __forceinline__ void finish_norm() {
    if constexpr (kNormsLast<Shape>) {
      const int n = int(threadIdx.x);
      if (rows_.p.norm_weight != nullptr && n < Shape::kRows) {
        factors_.logit[n] = inverse_rms(rows_.p, factors_.staged[n]);
      }
    }
  }

 private:
  static constexpr bool kRounded = !std::is_same_v<Full, typename Shape::T>;

  __device__ __forceinline__ void multiply_by_factor(float (&y)[8], int n) const {
    const float factor = factors_.staged[n];
#pragma unroll
    for (int e = 0; e < 8; ++e) y[e] *= factor;
  }
  __device__ __forceinline__ static int unit() { return int(threadIdx.x) % kUnits; }
  __device__ __forceinline__ static int row(int i) { return int(threadIdx.x) / kUnits + i * kStride; }

  __device__ __forceinline__ static void put(unsigned char* to, int row, const float (&y)[8]) {
    using T = typename Shape::T;
    if constexpr (Shape::kIsFloat32) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        *reinterpret_cast<Pack<float, 4>*>(to + chunk_place(row, unit() * 2 + half)) = {
            {y[half * 4], y[half * 4 + 1], y[half * 4 + 2], y[half * 4 + 3]}};
      }
    } else {
      float left[8];
#pragma unroll
      for (int e = 0; e < 8; ++e) left[e] = y[e];
#pragma unroll
      for (int part = 0; part < Shape::kParts; ++part, to += Shape::kPanels * Shape::kPanelBytes) {
        uint32_t pairs[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          pairs[i] = pack_pair<T>(left[2 * i], left[2 * i + 1]);
          if (part + 1 < Shape::kParts) {
            left[2 * i] -= float16_bits_to_float(pairs[i] & 0xffff);
            left[2 * i + 1] -= float16_bits_to_float(pairs[i] >> 16);
          }
        }
        if constexpr (Shape::kIsInt8) {  // the order of the head's dims: every second pair is eight dims further on
          unsigned char* panel = to + unit() / 8 * Shape::kPanelBytes;
          const int chunk = unit() % 8 / 2 * 2, offset = unit() % 2 * 8;
          *reinterpret_cast<Pack<uint32_t, 2>*>(panel + chunk_place(row, chunk) + offset) = {{pairs[0], pairs[2]}};
          *reinterpret_cast<Pack<uint32_t, 2>*>(panel + chunk_place(row, chunk + 1) + offset) = {{pairs[1], pairs[3]}};
        } else {
          *reinterpret_cast<Bytes16*>(to + chunk_place(row, unit())) = {{pairs[0], pairs[1], pairs[2], pairs[3]}};
        }
      }
    }
  }

  const HiddenRows& rows_;
  const RowFactors factors_;
  RowUnit hidden_;
};

}  // namespace specdec::cuda
