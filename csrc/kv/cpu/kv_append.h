// Normalises, rotates and stores rows of K, V and Q on one instruction set.
//
// A head of a row is read once (twice with a norm: the second time from the first-level cache) and written once. Pairs
// of halves are two vectors from two places; interleaved pairs are neighbours in one vector, whose sines change their
// sign from lane to lane: both tables of the row are spread out once, for all of its heads. A cache in 8 bits gets a
// head by way of a buffer of float32. What is left of a vector goes through the same instructions as whole ones, so an
// element's result does not depend on where it stands.
#pragma once

#include "common/cpu/simd.h"
#include "kv/append_row.h"
#include "kv/cache_code.h"
#include "kv/params.h"

namespace specdec::cpu::SPECDEC_ISA {

template <class Storage>
static SPECDEC_INLINE Vec load_some(const typename Storage::Element* p, int count) {
  if (count >= kWidth) return Storage::load_vec(p);
  typename Storage::Element part[kWidth] = {};
  __builtin_memcpy(part, p, count * sizeof(part[0]));
  return Storage::load_vec(part);
}

template <class Storage>
static SPECDEC_INLINE void store_some(typename Storage::Element* p, Vec v, int count) {
  if (count >= kWidth) return Storage::store_vec(p, v);
  typename Storage::Element part[kWidth];
  Storage::store_vec(part, v);
  __builtin_memcpy(p, part, count * sizeof(part[0]));
}

// The rotation of one row, or none. With interleaved pairs the tables are spread out: [2 * pairs], sines with signs.
struct Turn {
  const float *cosines, *sines;
  int pairs;
  bool interleaved;
};

// The factors of a head's elements: 1 / root of its mean square, and the norm's weights in float32. nullptr: no norm.
struct HeadNorm {
  const float* weights;
  float scale;
};

static SPECDEC_INLINE Vec normed(Vec x, const HeadNorm& norm, int at, int count) {
  return norm.weights == nullptr ? x : x * splat(norm.scale) * load_some<Float32>(norm.weights + at, count);
}

template <class Storage>
static SPECDEC_INLINE float inverse_root(const typename Storage::Element* x, int dim, float eps) {
  Vec squares = splat(0.0f);
  for (int d = 0; d < dim; d += kWidth) {
    const Vec part = load_some<Storage>(x + d, dim - d);
    squares = fma(part, part, squares);
  }
  float lanes[kWidth], sum = 0.0f;
  store(lanes, squares);
  for (int i = 0; i < kWidth; i++) sum += lanes[i];
  return 1.0f / __builtin_sqrtf(sum / float(dim) + eps);
}

template <class From, class To>
static SPECDEC_INLINE void turn_head(const typename From::Element* x, typename To::Element* out, int dim,
                                     const Turn& turn, const HeadNorm& norm) {
  const int pairs = turn.pairs, turned = 2 * pairs;
  if (turn.interleaved) {
    for (int d = 0; d < turned; d += kWidth) {
      const int count = turned - d;
      const Vec part = normed(load_some<From>(x + d, count), norm, d, count);
      const Vec cosines = load_some<Float32>(turn.cosines + d, count),
                sines = load_some<Float32>(turn.sines + d, count);
      store_some<To>(out + d, fma(swap_neighbours(part), sines, part * cosines), count);
    }
  } else {
    for (int d = 0; d < pairs; d += kWidth) {
      const int count = pairs - d;
      const Vec first = normed(load_some<From>(x + d, count), norm, d, count);
      const Vec second = normed(load_some<From>(x + pairs + d, count), norm, pairs + d, count);
      const Vec cosines = load_some<Float32>(turn.cosines + d, count),
                sines = load_some<Float32>(turn.sines + d, count);
      store_some<To>(out + d, fma(splat(0.0f) - second, sines, first * cosines), count);
      store_some<To>(out + pairs + d, fma(first, sines, second * cosines), count);
    }
  }
  for (int d = turned; d < dim; d += kWidth) {
    store_some<To>(out + d, normed(load_some<From>(x + d, dim - d), norm, d, dim - d), dim - d);
  }
}

static SPECDEC_INLINE void store_codes(const float* values, uint8_t* out, int dim, float scale, CacheCode code) {
  if (code == CacheCode::kInt8) {
    for (int d = 0; d < dim; d++) out[d] = int8_of(values[d] / scale);
  } else if (code == CacheCode::kFloat8E4m3) {
    for (int d = 0; d < dim; d++) out[d] = float8_e4m3_of(values[d] / scale);
  } else {
    for (int d = 0; d < dim; d++) out[d] = float8_e5m2_of(values[d] / scale);
  }
}

// One head into a cache.
template <class Storage>
static SPECDEC_INLINE void store_head(const typename Storage::Element* x, void* cache, int64_t at, int dim,
                                      const Turn& turn, const HeadNorm& norm, float scale, CacheCode code,
                                      float* buffer) {
  using Element = typename Storage::Element;
  if (code == CacheCode::kPlain && scale == 1.0f) {
    Element* out = static_cast<Element*>(cache) + at;
    if (turn.pairs == 0 && norm.weights == nullptr) {
      __builtin_memcpy(out, x, dim * sizeof(Element));
    } else {
      turn_head<Storage, Storage>(x, out, dim, turn, norm);
    }
    return;
  }
  turn_head<Storage, Float32>(x, buffer, dim, turn, norm);
  if (code != CacheCode::kPlain) return store_codes(buffer, static_cast<uint8_t*>(cache) + at, dim, scale, code);
  for (int d = 0; d < dim; d += kWidth) {
    const Vec scaled = load_some<Float32>(buffer + d, dim - d) / splat(scale);
    store_some<Storage>(static_cast<Element*>(cache) + at + d, scaled, dim - d);
  }
}

// Weights of a norm in float32, in `buffer`; nullptr for none.
template <class Storage>
static const float* norm_weights(const void* weights, DType dtype, int dim, float* buffer) {
  if (weights == nullptr || dtype == DType::kFloat32) return static_cast<const float*>(weights);
  const auto* from = static_cast<const typename Storage::Element*>(weights);
  for (int d = 0; d < dim; d += kWidth) store_some<Float32>(buffer + d, load_some<Storage>(from + d, dim - d), dim - d);
  return buffer;
}

template <class Storage>
static void append_rows_of(const KvAppendParams& p, int64_t begin, int64_t end, float* memory) {
  using Element = typename Storage::Element;
  float* const k_weights = memory;
  float* const q_weights = k_weights + p.k_dim;
  float* const cosines = q_weights + p.k_dim;
  float* const sines = cosines + p.k_dim;
  float* const buffer = sines + p.k_dim;
  HeadNorm k_norm = {norm_weights<Storage>(p.k_norm_weight, p.k_norm_dtype, p.k_dim, k_weights), 0.0f};
  HeadNorm q_norm = {norm_weights<Storage>(p.q_norm_weight, p.q_norm_dtype, p.k_dim, q_weights), 0.0f};
  const Turn no_turn = {nullptr, nullptr, 0, false};
  const HeadNorm no_norm = {nullptr, 0.0f};

  for (int64_t row = begin; row < end; row++) {
    const AppendRow place = find_append_row(p, row);
    const int64_t request = p.packed ? 0 : row / p.queries, within = row - request * p.queries;
    const int64_t index = p.packed ? row : within;
    Turn turn = no_turn;
    if (place.position >= 0 && p.pairs > 0) {
      turn = {p.cosines + place.position * p.pairs, p.sines + place.position * p.pairs, p.pairs, p.interleaved != 0};
      if (turn.interleaved) {
        for (int i = 0; i < p.pairs; i++) {
          cosines[2 * i] = cosines[2 * i + 1] = turn.cosines[i];
          sines[2 * i] = -turn.sines[i], sines[2 * i + 1] = turn.sines[i];
        }
        turn.cosines = cosines, turn.sines = sines;
      }
    }
    if (place.first >= 0) {
      const Element* k = static_cast<const Element*>(p.k) + request * p.k_stride_batch + index * p.k_stride_row;
      const Element* v = static_cast<const Element*>(p.v) + request * p.v_stride_batch + index * p.v_stride_row;
      const int64_t k_at = place.first * p.k_cache_stride_batch + place.slot * p.k_cache_stride_slot;
      const int64_t v_at = place.first * p.v_cache_stride_batch + place.slot * p.v_cache_stride_slot;
      for (int head = 0; head < p.kv_heads; head++) {
        const Element* x = k + head * p.k_stride_head;
        if (k_norm.weights != nullptr) k_norm.scale = inverse_root<Storage>(x, p.k_dim, p.norm_eps);
        const float k_scale = p.k_scales != nullptr ? p.k_scales[head] : p.k_scale;
        const float v_scale = p.v_scales != nullptr ? p.v_scales[head] : p.v_scale;
        store_head<Storage>(x, p.k_cache, k_at + head * p.k_cache_stride_head, p.k_dim, turn, k_norm, k_scale, p.code,
                            buffer);
        store_head<Storage>(v + head * p.v_stride_head, p.v_cache, v_at + head * p.v_cache_stride_head, p.v_dim,
                            no_turn, no_norm, v_scale, p.code, buffer);
      }
    }
    const Element* q = static_cast<const Element*>(p.q) + request * p.q_stride_batch + index * p.q_stride_row;
    Element* out = static_cast<Element*>(p.q_out) + request * p.out_stride_batch + index * p.out_stride_row;
    for (int head = 0; head < p.heads; head++) {
      Element* to = out + head * p.out_stride_head;
      if (place.position < 0) {
        __builtin_memset(to, 0, p.k_dim * sizeof(Element));
        continue;
      }
      const Element* x = q + head * p.q_stride_head;
      if (q_norm.weights != nullptr) q_norm.scale = inverse_root<Storage>(x, p.k_dim, p.norm_eps);
      turn_head<Storage, Storage>(x, to, p.k_dim, turn, q_norm);
    }
  }
}

// `memory` has append_memory(p) floats.
void append_rows(const KvAppendParams& p, int64_t begin, int64_t end, float* memory) {
  switch (p.dtype) {
    case DType::kFloat32:
      return append_rows_of<Float32>(p, begin, end, memory);
    case DType::kBFloat16:
      return append_rows_of<BFloat16>(p, begin, end, memory);
    case DType::kFloat16:
      return append_rows_of<Float16>(p, begin, end, memory);
  }
}

}  // namespace specdec::cpu::SPECDEC_ISA
