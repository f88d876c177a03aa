// The early exit kernels (cpu/exit_kernels.h) of one instruction set.
//
// Logits are dot products along the dim: kWidth / 4 rows of the head times up to four hidden rows in as many
// accumulators as a vector has lanes, reduced together. A group of head rows is multiplied with all hidden rows while
// it is in the first-level cache; hidden rows come from the second. They are packed in groups of four whose steps
// alternate, so that a group is one stream of memory, which the hardware fetches ahead of use, and rows that are a
// power of two apart do not fight for the same sets of a cache. With few hidden rows memory is what all wait for, and
// every row of the head is read from its beginning to its end. With more, the dim is cut where a group's rows would
// not fit in the first-level cache.
//
// While the first hidden rows are multiplied, the same part of the next head rows is fetched into the second-level
// cache. Fetching a fixed distance ahead in the same rows is slower than not to fetch at all: it ends where rows do.
// Rows that are picked one by one have no next ones.
//
// A row takes a tile's 64 logits in with two looks: for those among its greatest, then for the exponentials.
#pragma once

#include "cpu/exit_kernels.h"
#include "cpu/lanes.h"
#if defined(__AVX512BF16__)
#include "cpu/exit_quads.h"
#endif

namespace specdec::SPECDEC_ISA {

// 32-bit floats times elements that are widened to them.
template <class Storage>
struct Widened {
  using Element = typename Storage::Element;
  using Hidden = float;
  using Operand = Vec;
  static constexpr int kStep = kWidth;
  static SPECDEC_INLINE Operand load_head(const Element* at) { return Storage::load_vec(at); }
  static SPECDEC_INLINE Operand load_hidden(const Hidden* at) { return load(at); }
  static SPECDEC_INLINE Vec apply(Vec sum, Operand head, Operand hidden) { return fma(head, hidden, sum); }
  static void pack(const float* y, int count, Hidden* to) { __builtin_memcpy(to, y, count * sizeof(float)); }
  static void round(float*, int) {}
};

struct Int8 {
  using Element = int8_t;
  static SPECDEC_INLINE Vec load_vec(const int8_t* at) {
#if defined(__AVX512F__)
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at))));
#elif defined(__AVX2__)
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(at))));
#else
    Vec v;
    for (int i = 0; i < kWidth; i++) v[i] = float(at[i]);
    return v;
#endif
  }
};

#if defined(__AVX512BF16__)
// Pairs of bfloat16. Hidden rows are rounded to it, as PyTorch does before such a head.
struct BFloat16Pairs {
  using Element = uint16_t;
  using Hidden = uint16_t;
  using Operand = __m512bh;
  static constexpr int kStep = 2 * kWidth;
  static SPECDEC_INLINE Operand load_head(const Element* at) { return (__m512bh)_mm512_loadu_si512(at); }
  static SPECDEC_INLINE Operand load_hidden(const Hidden* at) { return (__m512bh)_mm512_loadu_si512(at); }
  static SPECDEC_INLINE Vec apply(Vec sum, Operand head, Operand hidden) { return _mm512_dpbf16_ps(sum, head, hidden); }
  static void pack(const float* y, int count, Hidden* to) {
    alignas(64) float step[kStep] = {};
    __builtin_memcpy(step, y, count * sizeof(float));
    store_bf16(to, load(step));
    store_bf16(to + kWidth, load(step + kWidth));
  }
  static void round(float* y, int dim) {
    for (int d = 0; d < dim; d++) {
      uint16_t rounded[kWidth];
      store_bf16(rounded, splat(y[d]));
      const uint32_t bits = uint32_t(rounded[0]) << 16;
      __builtin_memcpy(y + d, &bits, sizeof bits);
    }
  }
};
using HeadBFloat16 = BFloat16Pairs;
#else
using HeadBFloat16 = Widened<BFloat16>;
#endif

template <class Function>
static SPECDEC_INLINE auto with_head(HeadType type, const Function& function) {
  switch (type) {
    case HeadType::kFloat32:
      return function(Widened<Float32>());
    case HeadType::kBFloat16:
      return function(HeadBFloat16());
    case HeadType::kFloat16:
      return function(Widened<Float16>());
    default:
      return function(Widened<Int8>());
  }
}

// Elements of a packed row: whole steps, and whole cache lines.
template <class Multiplier>
static SPECDEC_INLINE int packed_dim(int dim) {
  constexpr int kLine = 64 / int(sizeof(typename Multiplier::Hidden));
  return round_up(dim, max_of(kLine, Multiplier::kStep));
}

constexpr int kSlots = kWidth / 4;  // rows of the head that are multiplied at once
constexpr int kTogether = 4;        // hidden rows
constexpr int kBlockBytes = 8192;   // of a head's row, where the dim is cut
constexpr int kFloat32Block = 512;  // elements: longer sums of float32 products would round more than PyTorch's do

// Products of kSlots rows of the head with a group of kRows packed hidden rows, summed over dims [begin, end), whole
// steps: slot * 4 + row of the result. `ahead` elements from here are fetched where kFetch says so.
template <class Multiplier, int kRows, bool kFetch>
static SPECDEC_INLINE void add_products(const typename Multiplier::Element* const (&head)[kSlots],
                                        const typename Multiplier::Hidden* hidden, int begin, int end, int64_t ahead,
                                        Vec (&sum)[kWidth]) {
  SPECDEC_UNROLL
  for (int i = 0; i < kWidth; i++) sum[i] = splat(0.0f);
  for (int d = begin; d < end; d += Multiplier::kStep) {
    typename Multiplier::Operand rows[kRows];
    SPECDEC_UNROLL
    for (int n = 0; n < kRows; n++) rows[n] = Multiplier::load_hidden(hidden + d * kRows + n * Multiplier::kStep);
    SPECDEC_UNROLL
    for (int k = 0; k < kSlots; k++) {
      if (kFetch) __builtin_prefetch(head[k] + d + ahead, 0, 2);
      const auto row = Multiplier::load_head(head[k] + d);
      SPECDEC_UNROLL
      for (int n = 0; n < kRows; n++) sum[k * 4 + n] = Multiplier::apply(sum[k * 4 + n], row, rows[n]);
    }
  }
}

// The same, each summed to a lane.
template <class Multiplier, int kRows, bool kFetch>
static SPECDEC_INLINE Vec dots(const typename Multiplier::Element* const (&head)[kSlots],
                               const typename Multiplier::Hidden* hidden, int begin, int end, int64_t ahead) {
  const int block = sizeof(*head[0]) == 4 ? kFloat32Block : end - begin;
  Vec sum[kWidth];
  add_products<Multiplier, kRows, kFetch>(head, hidden, begin, min_of(begin + block, end), ahead, sum);
  for (int at = begin + block; at < end; at += block) {
    Vec part[kWidth];
    add_products<Multiplier, kRows, kFetch>(head, hidden, at, min_of(at + block, end), ahead, part);
    SPECDEC_UNROLL
    for (int i = 0; i < kWidth; i++) sum[i] = sum[i] + part[i];
  }
  return sums(sum);
}

// kSlots rows of the head, and their last, partial steps, which must not be read beyond the rows' ends.
template <class Multiplier>
struct HeadGroup {
  using Element = typename Multiplier::Element;
  const Element *row[kSlots], *rest[kSlots];
  Element padded[kSlots][Multiplier::kStep];
  int whole;  // dims in whole steps
  int64_t ahead;

  HeadGroup(const ExitTile& tile, int slot) {
    whole = tile.dim / Multiplier::kStep * Multiplier::kStep;
    ahead = int64_t(kSlots) * tile.dim;
    for (int k = 0; k < kSlots; k++) {
      const int at = min_of(slot + k, tile.count - 1);
      row[k] = static_cast<const Element*>(tile.head) + int64_t(tile.entries ? tile.entries[at] : at) * tile.dim;
      if (whole == tile.dim) continue;
      __builtin_memset(padded[k], 0, sizeof(padded[k]));
      __builtin_memcpy(padded[k], row[k] + whole, (tile.dim - whole) * sizeof(Element));
      rest[k] = padded[k] - whole;
    }
  }
};

template <class Multiplier, bool kFetch>
static SPECDEC_INLINE Vec dots_of_rows(const typename Multiplier::Element* const (&head)[kSlots],
                                       const typename Multiplier::Hidden* hidden, int rows, int begin, int end,
                                       int64_t ahead) {
  return rows == 1   ? dots<Multiplier, 1, kFetch>(head, hidden, begin, end, ahead)
         : rows == 2 ? dots<Multiplier, 2, kFetch>(head, hidden, begin, end, ahead)
         : rows == 3 ? dots<Multiplier, 3, kFetch>(head, hidden, begin, end, ahead)
                     : dots<Multiplier, 4, kFetch>(head, hidden, begin, end, ahead);
}

// A group of the head times one of hidden rows over a part of the dim, added to their logits.
template <class Multiplier, bool kFetch>
static SPECDEC_INLINE void add_dots(const HeadGroup<Multiplier>& head, const typename Multiplier::Hidden* hidden,
                                    int rows, int begin, int end, float* logits) {
  const int whole = min_of(end, head.whole);
  Vec sum = splat(0.0f);
  if (begin < whole) sum = dots_of_rows<Multiplier, kFetch>(head.row, hidden, rows, begin, whole, head.ahead);
  if (whole < end) sum = sum + dots_of_rows<Multiplier, false>(head.rest, hidden, rows, whole, end, 0);
  alignas(64) float by_slot[kWidth];
  store(by_slot, sum);
  for (int n = 0; n < rows; n++) {
    float* to = logits + n * kExitTile;
    SPECDEC_UNROLL
    for (int k = 0; k < kSlots; k++) to[k] = begin == 0 ? by_slot[k * 4 + n] : to[k] + by_slot[k * 4 + n];
  }
}

template <class Multiplier>
static void multiply_tile(const ExitTile& tile, const char* packed, int rows, bool narrow, float* logits) {
  using Hidden = typename Multiplier::Hidden;
  const auto* hidden = reinterpret_cast<const Hidden*>(packed);
  const int64_t stride = packed_dim<Multiplier>(tile.dim);
  constexpr int kSize = int(sizeof(typename Multiplier::Element));
  const int block = narrow ? tile.dim : kSize == 4 ? kFloat32Block : kBlockBytes / kSize;
  for (int begin = 0; begin < tile.dim; begin += block) {
    const int end = min_of(begin + block, tile.dim);
    for (int slot = 0; slot < tile.count; slot += kSlots) {
      const HeadGroup<Multiplier> head(tile, slot);
      if (!tile.entries) {
        add_dots<Multiplier, true>(head, hidden, min_of(kTogether, rows), begin, end, logits + slot);
      }
      for (int row = tile.entries ? 0 : kTogether; row < rows; row += kTogether) {
        add_dots<Multiplier, false>(head, hidden + row * stride, min_of(kTogether, rows - row), begin, end,
                                    logits + row * kExitTile + slot);
      }
    }
  }
}

static void multiply(HeadType type, const ExitTile& tile, const char* packed, int rows, bool narrow, float* logits) {
  with_head(type, [&](auto multiplier) {
    using Multiplier = decltype(multiplier);
#if defined(__AVX512BF16__)
    if (!narrow && type == HeadType::kBFloat16) {
      const int stride = packed_dim<BFloat16Pairs>(tile.dim);
      return multiply_quads(tile, reinterpret_cast<const uint16_t*>(packed), stride, rows, logits);
    }
#endif
    multiply_tile<Multiplier>(tile, packed, rows, narrow, logits);
  });
  for (int n = 0; n < rows; n++) {
    for (int i = tile.count; i < kExitTile; i++) logits[n * kExitTile + i] = -__builtin_inff();
  }
}

static void round(HeadType type, float* y, int dim) {
  with_head(type, [&](auto multiplier) { decltype(multiplier)::round(y, dim); });
}

static size_t packed_bytes(HeadType type, int dim) {
  return with_head(type, [&](auto multiplier) {
    using Multiplier = decltype(multiplier);
    return size_t(packed_dim<Multiplier>(dim)) * sizeof(typename Multiplier::Hidden);
  });
}

static void pack(HeadType type, const float* y, int dim, char* packed, int row, int rows, bool narrow) {
  with_head(type, [&](auto multiplier) {
    using Multiplier = decltype(multiplier);
#if defined(__AVX512BF16__)
    if (!narrow && type == HeadType::kBFloat16) {
      const int stride = packed_dim<BFloat16Pairs>(dim);
      return pack_quads(y, dim, stride, reinterpret_cast<uint16_t*>(packed), row, rows);
    }
#else
    (void)narrow;
#endif
    constexpr int kStep = Multiplier::kStep;
    const int first = row / kTogether * kTogether, together = min_of(kTogether, rows - first);
    const int whole = packed_dim<Multiplier>(dim);
    auto* to = reinterpret_cast<typename Multiplier::Hidden*>(packed) + int64_t(first) * whole + (row - first) * kStep;
    for (int d = 0; d < whole; d += kStep, to += together * kStep) {
      __builtin_memset(to, 0, kStep * sizeof(*to));
      if (d < dim) Multiplier::pack(y + d, min_of(kStep, dim - d), to);
    }
  });
}

// Puts a logit where it belongs among the greatest ones. Entries come in ascending order, so equals stay behind.
static SPECDEC_INLINE void list(float value, int32_t entry, int listed, ExitState& state) {
#if defined(__AVX512F__)
  (void)listed;
  static_assert(kMostListed == kWidth, "");
  const Vec values = load(state.value);
  const __mmask16 ahead = _mm512_cmp_ps_mask(values, splat(value), _CMP_GE_OQ), others = ~(ahead + 1);
  store(state.value, _mm512_mask_expand_ps(splat(value), others, values));
  const __m512i entries = _mm512_loadu_si512(state.entry);
  _mm512_storeu_si512(state.entry, _mm512_mask_expand_epi32(_mm512_set1_epi32(entry), others, entries));
#else
  int at = listed - 1;
  for (; at > 0 && value > state.value[at - 1]; at--) {
    state.value[at] = state.value[at - 1];
    state.entry[at] = state.entry[at - 1];
  }
  state.value[at] = value;
  state.entry[at] = entry;
#endif
}

// Logits that are less than as many others as are listed: less than as many of the lanes' peaks.
static SPECDEC_INLINE uint64_t below_the_greatest(const float* logits, Vec peaks, int listed) {
  for (int i = 1; i < min_of(listed, kWidth); i++) peaks = keep_where_less(peaks, peaks, splat(greatest(peaks)));
  const Vec bound = splat(listed > kWidth ? -__builtin_inff() : greatest(peaks));
  uint64_t below = 0;
  SPECDEC_UNROLL
  for (int i = 0; i < kExitTile; i += kWidth) below |= uint64_t(lanes_above(bound, load(logits + i))) << i;
  return below;
}

static void absorb(float* logits, const float* scales, const float* bias, int32_t first_entry, float factor, int listed,
                   ExitState& state) {
  constexpr unsigned kAll = kWidth == 16 ? 0xffffu : 0xffu;
  const Vec infinity = splat(__builtin_inff()), least = splat(state.value[listed - 1]);
  Vec peaks = splat(-__builtin_inff());
  unsigned finite = kAll;
  uint64_t greater = 0;
  SPECDEC_UNROLL
  for (int i = 0; i < kExitTile; i += kWidth) {
    Vec z = load(logits + i);
    if (scales) z = z * load(scales + i);
    if (bias) z = z + load(bias + i);
    if (scales || bias) store(logits + i, z);
    finite &= lanes_above(infinity, z);
    greater |= uint64_t(lanes_above(z, least)) << i;
    peaks = maximum(z, peaks);  // the second operand where the first is a NaN
  }
  if (finite != kAll) state.invalid = true;
  if (!(state.value[listed - 1] > -__builtin_inff())) greater &= ~below_the_greatest(logits, peaks, listed);
  const float before = state.value[0];
  for (; greater; greater &= greater - 1) {
    const int i = __builtin_ctzll(greater);
    if (logits[i] > state.value[listed - 1]) list(logits[i], first_entry + i, listed, state);
  }
  const float top = state.value[0];
  if (!(top > -__builtin_inff())) return;
  constexpr float kLowestFall = -1e30f;  // 2 to the power of which is 0: -inf would make NaN of 0 * -inf
  if (top > before && state.sum > 0) {
    const float fall = __builtin_fmaxf(before - top, kLowestFall), decay = __builtin_exp2f(fall * factor);
    state.log_sum = (state.log_sum + state.sum * fall) * decay;
    state.sum *= decay;
  }
  const Vec max = splat(top), scale = splat(factor);
  Vec sum = splat(0.0f), log_sum = splat(0.0f);
  SPECDEC_UNROLL
  for (int i = 0; i < kExitTile; i += kWidth) {
    const Vec below = maximum(load(logits + i) - max, splat(kLowestFall));
    const Vec weight = exp2(below * scale);
    sum = sum + weight;
    log_sum = fma(weight, below, log_sum);
  }
  state.sum += total(sum);
  state.log_sum += total(log_sum);
}

template <class Storage>
static void normalise_row(const ExitParams& p, int row, float* y) {
  const auto* x = static_cast<const typename Storage::Element*>(p.hidden) + row * p.hidden_stride_row;
  alignas(64) float padded[kWidth];
  Vec squares = splat(0.0f);
  for (int d = 0; d < p.dim; d += kWidth) {
    Vec v;
    if (d + kWidth <= p.dim) {
      v = Storage::load_vec(x + d);
      store(y + d, v);
    } else {
      typename Storage::Element rest[kWidth] = {};
      __builtin_memcpy(rest, x + d, (p.dim - d) * sizeof(rest[0]));
      v = Storage::load_vec(rest);
      store(padded, v);
      __builtin_memcpy(y + d, padded, (p.dim - d) * sizeof(float));
    }
    squares = fma(v, v, squares);
  }
  if (!p.norm_weight) return;
  const float scale = 1.0f / __builtin_sqrtf(total(squares) / float(p.dim) + p.norm_eps);
  for (int d = 0; d < p.dim; d++) y[d] *= scale;
}

template <class Storage>
static void weigh_row(const ExitParams& p, float* y) {
  const auto* weight = static_cast<const typename Storage::Element*>(p.norm_weight);
  alignas(64) float padded[kWidth];
  for (int d = 0; d < p.dim; d += kWidth) {
    const int count = min_of(kWidth, p.dim - d);
    typename Storage::Element some[kWidth] = {};
    __builtin_memcpy(some, weight + d, count * sizeof(some[0]));
    store(padded, Storage::load_vec(some));
    for (int i = 0; i < count; i++) y[d + i] *= padded[i];
  }
}

static void normalise(const ExitParams& p, int row, float* y) {
  if (p.hidden_dtype == DType::kFloat32) normalise_row<Float32>(p, row, y);
  if (p.hidden_dtype == DType::kBFloat16) normalise_row<BFloat16>(p, row, y);
  if (p.hidden_dtype == DType::kFloat16) normalise_row<Float16>(p, row, y);
  if (!p.norm_weight) return;
  if (p.norm_dtype == DType::kFloat32) weigh_row<Float32>(p, y);
  if (p.norm_dtype == DType::kBFloat16) weigh_row<BFloat16>(p, y);
  if (p.norm_dtype == DType::kFloat16) weigh_row<Float16>(p, y);
}

const ExitKernels kExitKernels = {normalise, packed_bytes, pack, round, multiply, absorb};

}  // namespace specdec::SPECDEC_ISA
