// Stores new rows of K and V, and rotates K and Q on the way, in one launch.
//
// A warp owns one head of one row: of Q, of K or of V. A block has eight heads of a row, and finds its place in the
// cache once per warp (kv/append_row.h): four dependent reads of a few bytes, all of which the L2 cache has after the
// first warp. A lane takes four elements at a time, two rotated pairs: with halves two neighbours of the first half
// and the same two of the second, interleaved four neighbours. So a rotation needs nothing of another lane, and a lane
// writes only what it has read itself: q_out may be q. A norm needs the sum of the head's squares, for which a head is
// read one time more, from the first-level cache.
//
// Bytes: k, v and q once, the cache's rows and q_out once, and the row's cosines and sines once per head, of which all
// but the first reads hit a cache. For 63 rows of Llama-3-8B that is 0.8 MB, so a call costs what a launch costs;
// prompts of thousands of rows run at the speed of memory: a warp's read or write is 128 bytes of 16-bit elements.
#pragma once

#include "common/cuda/device.cuh"
#include "kv/append_row.h"
#include "kv/cache_code.h"
#include "kv/params.h"

namespace specdec::cuda {

constexpr int kKvAppendThreads = 256, kKvAppendWarps = kKvAppendThreads / kWarpSize;

struct KvAppendLaunch {
  KvAppendParams call;
  bool in_twos;  // every tensor may be read and written two elements at a time
};

// Four elements of a head: their places, and how many of the first two and of the last two exist.
struct KvAppendPiece {
  int32_t first, second;  // of two neighbours each
  int32_t first_count, second_count;
  int32_t pair;  // of the first rotated pair, or -1: these four are not rotated
};

__device__ __forceinline__ KvAppendPiece kv_append_piece(int32_t index, int32_t dim, int32_t pairs, bool interleaved) {
  KvAppendPiece piece;
  const int32_t turning = (pairs + 1) / 2;
  if (index < turning && !interleaved) {
    piece.pair = 2 * index;
    piece.first = piece.pair, piece.second = pairs + piece.pair;
    piece.first_count = piece.second_count = min(2, pairs - piece.pair);
    return piece;
  }
  piece.pair = index < turning ? 2 * index : -1;
  piece.first = index < turning ? 4 * index : 2 * pairs + 4 * (index - turning);
  piece.second = piece.first + 2;
  const int32_t left = (index < turning ? 2 * pairs : dim) - piece.first;
  piece.first_count = min(2, left);
  piece.second_count = max(0, min(2, left - 2));
  return piece;
}

template <class T>
__device__ __forceinline__ void kv_append_load(const T* from, int32_t count, bool in_twos, float& a, float& b) {
  a = b = 0.0f;
  if (count == 2 && in_twos) {
    const Pack<T, 2> two = *reinterpret_cast<const Pack<T, 2>*>(from);
    a = to_float(two.element[0]), b = to_float(two.element[1]);
  } else {
    if (count > 0) a = to_float(from[0]);
    if (count > 1) b = to_float(from[1]);
  }
}

template <class T>
__device__ __forceinline__ void kv_append_store(T* to, int32_t count, bool in_twos, T a, T b) {
  if (count == 2 && in_twos) {
    *reinterpret_cast<Pack<T, 2>*>(to) = {{a, b}};
  } else {
    if (count > 0) to[0] = a;
    if (count > 1) to[1] = b;
  }
}

__device__ __forceinline__ uint8_t kv_append_code(float value, CacheCode code) {
  return code == CacheCode::kInt8         ? int8_of(value)
         : code == CacheCode::kFloat8E4m3 ? float8_e4m3_of(value)
                                          : float8_e5m2_of(value);
}

// Two elements to where they go.
template <class T>
__device__ __forceinline__ void kv_append_put(void* to, int64_t at, int32_t count, bool in_twos, float a, float b,
                                              CacheCode code) {
  if (code == CacheCode::kPlain) {
    kv_append_store(static_cast<T*>(to) + at, count, in_twos, from_float<T>(a), from_float<T>(b));
  } else {
    kv_append_store(static_cast<uint8_t*>(to) + at, count, in_twos, kv_append_code(a, code), kv_append_code(b, code));
  }
}

// What a warp works on.
template <class T>
struct KvAppendHead {
  const T* from;
  void* to;
  int64_t at;  // in elements of `to`
  int32_t dim, pairs;
  const void* norm_weight;
  DType norm_dtype;
  float scale;
  CacheCode code;
};

// 1 / root of the mean square of a head.
template <class T>
__device__ __forceinline__ float kv_append_inverse_root(const KvAppendHead<T>& head, int32_t pieces, bool interleaved,
                                                        bool in_twos, float eps) {
  const int32_t lane = int32_t(threadIdx.x) % kWarpSize;
  float squares = 0.0f;
  for (int32_t index = lane; index < pieces; index += kWarpSize) {
    const KvAppendPiece piece = kv_append_piece(index, head.dim, head.pairs, interleaved);
    float x[4];
    kv_append_load(head.from + piece.first, piece.first_count, in_twos, x[0], x[1]);
    kv_append_load(head.from + piece.second, piece.second_count, in_twos, x[2], x[3]);
#pragma unroll
    for (int i = 0; i < 4; ++i) squares += x[i] * x[i];
  }
#pragma unroll
  for (int bits = kWarpSize / 2; bits > 0; bits /= 2) squares += warp_shuffle_xor(squares, bits);
  return 1.0f / sqrtf(squares / float(head.dim) + eps);
}

template <class T>
__device__ __forceinline__ float kv_append_weight(const KvAppendHead<T>& head, int32_t element) {
  return head.norm_dtype == DType::kFloat32 ? static_cast<const float*>(head.norm_weight)[element]
                                            : to_float(static_cast<const T*>(head.norm_weight)[element]);
}

__device__ __forceinline__ void swap_middle(float (&x)[4]) {
  const float second = x[1];
  x[1] = x[2], x[2] = second;
}

// Reads a head, and writes it as it is to be. All lanes of a warp make this call.
template <class T>
__device__ __forceinline__ void kv_append_head(const KvAppendLaunch& launch, const KvAppendHead<T>& head,
                                               int64_t position) {
  const KvAppendParams& p = launch.call;
  const int32_t lane = int32_t(threadIdx.x) % kWarpSize;
  const bool interleaved = p.interleaved != 0;
  const int32_t pieces = (head.pairs + 1) / 2 + (head.dim - 2 * head.pairs + 3) / 4;
  float inverse_root = 1.0f;
  if (head.norm_weight != nullptr) {
    inverse_root = kv_append_inverse_root(head, pieces, interleaved, launch.in_twos, p.norm_eps);
  }
  for (int32_t index = lane; index < pieces; index += kWarpSize) {
    const KvAppendPiece piece = kv_append_piece(index, head.dim, head.pairs, interleaved);
    float x[4];
    kv_append_load(head.from + piece.first, piece.first_count, launch.in_twos, x[0], x[1]);
    kv_append_load(head.from + piece.second, piece.second_count, launch.in_twos, x[2], x[3]);
    if (head.norm_weight != nullptr) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int32_t count = i < 2 ? piece.first_count : piece.second_count;
        if (i % 2 < count) x[i] *= inverse_root * kv_append_weight(head, (i < 2 ? piece.first : piece.second) + i % 2);
      }
    }
    if (piece.pair >= 0) {
      if (interleaved) swap_middle(x);  // pairs are now elements i and i + 2 either way
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (piece.pair + i >= head.pairs) continue;
        const int64_t at = position * head.pairs + piece.pair + i;
        const float cosine = p.cosines[at], sine = p.sines[at], before = x[i];
        x[i] = before * cosine - x[i + 2] * sine;
        x[i + 2] = x[i + 2] * cosine + before * sine;
      }
      if (interleaved) swap_middle(x);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = x[i] / head.scale;
    kv_append_put<T>(head.to, head.at + piece.first, piece.first_count, launch.in_twos, x[0], x[1], head.code);
    kv_append_put<T>(head.to, head.at + piece.second, piece.second_count, launch.in_twos, x[2], x[3], head.code);
  }
}

// Grid: rows, groups of eight heads.
template <class T>
__global__ void __launch_bounds__(kKvAppendThreads, 3) kv_append_kernel(KvAppendLaunch launch) {
  const KvAppendParams& p = launch.call;
  const int32_t warp = int32_t(threadIdx.x) / kWarpSize, lane = int32_t(threadIdx.x) % kWarpSize;
  const int32_t heads = p.heads + 2 * p.kv_heads;
  for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x) {
    const AppendRow place = find_append_row(p, row);
    const int64_t request = p.packed != 0 ? 0 : row / p.queries, index = row - request * p.queries;
    for (int32_t n = int32_t(blockIdx.y) * kKvAppendWarps + warp; n < heads; n += int32_t(gridDim.y) * kKvAppendWarps) {
      KvAppendHead<T> head{};
      if (n < p.heads) {
        head.to = p.q_out;
        head.at = request * p.out_stride_batch + index * p.out_stride_row + n * p.out_stride_head;
        if (place.position < 0) {
          T* to = static_cast<T*>(p.q_out) + head.at;
          for (int32_t d = lane; d < p.k_dim; d += kWarpSize) to[d] = from_float<T>(0.0f);
          continue;
        }
        head.from =
            static_cast<const T*>(p.q) + request * p.q_stride_batch + index * p.q_stride_row + n * p.q_stride_head;
        head.dim = p.k_dim, head.pairs = p.pairs;
        head.norm_weight = p.q_norm_weight, head.norm_dtype = p.q_norm_dtype;
        head.scale = 1.0f, head.code = CacheCode::kPlain;
      } else if (place.first < 0) {
        continue;
      } else if (n < p.heads + p.kv_heads) {
        const int32_t of = n - p.heads;
        head.from =
            static_cast<const T*>(p.k) + request * p.k_stride_batch + index * p.k_stride_row + of * p.k_stride_head;
        head.to = p.k_cache;
        head.at =
            place.first * p.k_cache_stride_batch + place.slot * p.k_cache_stride_slot + of * p.k_cache_stride_head;
        head.dim = p.k_dim, head.pairs = p.pairs;
        head.norm_weight = p.k_norm_weight, head.norm_dtype = p.k_norm_dtype;
        head.scale = p.k_scales != nullptr ? p.k_scales[of] : p.k_scale, head.code = p.code;
      } else {
        const int32_t of = n - p.heads - p.kv_heads;
        head.from =
            static_cast<const T*>(p.v) + request * p.v_stride_batch + index * p.v_stride_row + of * p.v_stride_head;
        head.to = p.v_cache;
        head.at =
            place.first * p.v_cache_stride_batch + place.slot * p.v_cache_stride_slot + of * p.v_cache_stride_head;
        head.dim = p.v_dim;
        head.scale = p.v_scales != nullptr ? p.v_scales[of] : p.v_scale, head.code = p.code;
      }
      kv_append_head(launch, head, place.position);
    }
  }
}

template <class T>
cudaError_t kv_append(const KvAppendLaunch& launch_, int device, cudaStream_t stream) {
  const KvAppendParams& p = launch_.call;
  const int32_t heads = p.heads + 2 * p.kv_heads;
  const int64_t groups = (int64_t(heads) + kKvAppendWarps - 1) / kKvAppendWarps;
  const dim3 grid(unsigned(p.rows < 0x7fffffff ? p.rows : 0x7fffffff), unsigned(groups < 0xffff ? groups : 0xffff));
  return launch(kv_append_kernel<T>, grid, dim3(kKvAppendThreads), 0, device, stream, launch_);
}

}  // namespace specdec::cuda
