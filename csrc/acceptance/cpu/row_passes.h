// The row kernels (acceptance/cpu/row_kernels.h) of one instruction set.
//
// A scan takes blocks of 8 KB: a first look finds the block's maximum and NaNs, a second one, from the first-level
// cache, sums the exponentials and fetches the next block, so memory is read once and while there is work to do, and no
// exponential is taken in vain. The place of the maximum is looked for once, in the first block that has it.
//
// Weights are made 64 tokens at a time, in a buffer, from as many rows as they have terms. A draw multiplies its bound
// by the uniforms and passes on what is above it; the logarithm is taken for those few (an exponential is never below
// its uniform). Groups whose greatest weight could not win with the least uniform, and groups without weight, as most
// are after a filter, need no noise at all.
#pragma once

#include <type_traits>

#include "acceptance/cpu/row_kernels.h"
#include "common/cpu/max_of_halves.h"
#include "common/cpu/simd_int.h"

namespace specdec::cpu::SPECDEC_ISA {

constexpr int kPeakBlock = 8192;  // entries of which only the greatest is wanted

static SPECDEC_INLINE float minus_infinity() { return -__builtin_inff(); }

// The last, partial vector of a row: -inf beyond its end.
template <class Storage>
static SPECDEC_INLINE Vec load_tail(const typename Storage::Element* at, int count) {
  typename Storage::Element padded[kWidth] = {};
  __builtin_memcpy(padded, at, count * sizeof(padded[0]));
  alignas(64) float lane[kWidth];
  store(lane, Storage::load_vec(padded));
  for (int i = count; i < kWidth; i++) lane[i] = minus_infinity();
  return load(lane);
}
template <class Storage>
static SPECDEC_INLINE Vec load_some(const typename Storage::Element* at, int64_t count) {
  return count >= kWidth ? Storage::load_vec(at) : load_tail<Storage>(at, int(count));
}

template <class Storage>
static SPECDEC_INLINE float load_one(const void* row, int64_t place) {
  typename Storage::Element padded[kWidth] = {};
  padded[0] = static_cast<const typename Storage::Element*>(row)[place];
  alignas(64) float lane[kWidth];
  store(lane, Storage::load_vec(padded));
  return lane[0];
}

template <class Storage>
static SPECDEC_INLINE Vec peak_of(const typename Storage::Element* at, int count, NanFlag& nan) {
  Vec top[4];
  for (Vec& t : top) t = splat(minus_infinity());
  int i = 0;
  for (; i + 4 * kWidth <= count; i += 4 * kWidth) {
    Vec z[4];
    SPECDEC_UNROLL
    for (int j = 0; j < 4; j++) z[j] = Storage::load_vec(at + i + j * kWidth);
    nan.look_at(z[0], z[1]);
    nan.look_at(z[2], z[3]);
    SPECDEC_UNROLL
    for (int j = 0; j < 4; j++) top[j] = maximum(z[j], top[j]);  // the second operand where the first is a NaN
  }
  for (; i < count; i += kWidth) {
    const Vec z = load_some<Storage>(at + i, count - i);
    nan.look_at(z, z);
    top[0] = maximum(z, top[0]);
  }
  return maximum(maximum(top[0], top[1]), maximum(top[2], top[3]));
}

template <class Storage>
static SPECDEC_INLINE float block_peak(const typename Storage::Element* at, int count, NanFlag& nan) {
#if defined(__AVX2__)
  if constexpr (sizeof(typename Storage::Element) == 2) {
    constexpr int kInfinity = std::is_same<Storage, BFloat16>::value ? 0x7f80 : 0x7c00;
    const int whole = count / (4 * Halves::kLanes) * (4 * Halves::kLanes);
    uint16_t bits;
    if (whole > 0 && max_of_halves(at, whole, kInfinity, bits)) {
      const float top = load_one<Storage>(&bits, 0);
      if (whole == count) return top;
      const float rest = greatest(peak_of<Storage>(at + whole, count - whole, nan));
      return rest > top ? rest : top;
    }
  }
#endif
  return greatest(peak_of<Storage>(at, count, nan));
}

template <class Storage>
static int place_of(const typename Storage::Element* at, int count, float value) {
  for (int i = 0; i < count; i += kWidth) {
    const unsigned lanes = lanes_equal(load_some<Storage>(at + i, count - i), splat(value));
    if (lanes) return i + __builtin_ctz(lanes);
  }
  return 0;
}

// Sum and, with the entropy, sum of weight times exponent, of weights relative to a maximum that rises.
//
// Short sums are added up to long ones: a row of equal weights, summed one by one, would drift by 1e-5.
template <bool kEntropy>
struct Mass {
  Vec sum[2], log_sum[2];
  Vec folded = splat(0.0f), folded_log = splat(0.0f);

  SPECDEC_INLINE Mass() { clear(); }
  SPECDEC_INLINE void clear() {
    for (int j = 0; j < 2; j++) sum[j] = log_sum[j] = splat(0.0f);
  }
  SPECDEC_INLINE void fold() {
    folded = folded + (sum[0] + sum[1]);
    if (kEntropy) folded_log = folded_log + (log_sum[0] + log_sum[1]);
    clear();
  }
  SPECDEC_INLINE void add(int j, Vec weight, Vec exponent) {
    sum[j] = sum[j] + weight;
    if (kEntropy) log_sum[j] = fma(weight, maximum(exponent, splat(-200.0f)), log_sum[j]);  // 0 * -inf would be NaN
  }
  // Of what has been folded.
  SPECDEC_INLINE void lower(float exponent) {
    const Vec factor = exp2(splat(exponent));
    if (kEntropy) folded_log = fma(splat(maximum_of(exponent, -200.0f)), folded, folded_log) * factor;
    folded = folded * factor;
  }
  static SPECDEC_INLINE float maximum_of(float a, float b) { return a > b ? a : b; }
};

template <class Storage, bool kSums, bool kEntropy, bool kKeeps>
static ScanPart scan_of(const RowSpan& span, float scale, [[maybe_unused]] float* weights,
                        [[maybe_unused]] float* tops) {
  const auto* row = static_cast<const typename Storage::Element*>(span.row);
  ScanPart part{minus_infinity(), span.begin, false, 0.0f, 0.0f};
  NanFlag nan;
  Mass<kEntropy> mass;
  constexpr int kBlock = kSums ? kSumBlock : kPeakBlock;
  int64_t greatest_at = span.end;  // the first block with the maximum: its place there is looked for once, at the end
  for (int64_t at = span.begin; at < span.end; at += kBlock) {
    const int count = int(min_of<int64_t>(kBlock, span.end - at));
    const float peak = block_peak<Storage>(row + at, count, nan);
    if (peak > part.max) {
      if (kSums && part.max > minus_infinity()) mass.lower((part.max - peak) * scale);
      part.max = peak;
      greatest_at = at;
    }
    if (kKeeps) tops[at / kSumBlock] = part.max;
    if (!kSums || part.max == minus_infinity()) {
      if (kKeeps) __builtin_memset(weights + at, 0, count * sizeof(float));
      continue;
    }
    const Vec max = splat(part.max), factor = splat(scale);
    int i = 0;
    for (; i + 2 * kWidth <= count; i += 2 * kWidth) {
      __builtin_prefetch(row + at + kBlock + i);
      if (kWidth * sizeof(row[0]) == 64) __builtin_prefetch(row + at + kBlock + i + kWidth);
      SPECDEC_UNROLL
      for (int j = 0; j < 2; j++) {
        const Vec exponent = (Storage::load_vec(row + at + i + j * kWidth) - max) * factor;
        const Vec weight = exp2(exponent);
        if (kKeeps) store(weights + at + i + j * kWidth, weight);
        mass.add(j, weight, exponent);
      }
    }
    for (; i < count; i += kWidth) {
      const Vec exponent = (load_some<Storage>(row + at + i, count - i) - max) * factor;
      const Vec weight = exp2(exponent);
      if (kKeeps) store(weights + at + i, weight);  // 0 behind the row's end, where there is room for it
      mass.add(0, weight, exponent);
    }
    mass.fold();
  }
  if (greatest_at < span.end) {
    const int count = int(min_of<int64_t>(kBlock, span.end - greatest_at));
    part.argmax = greatest_at + place_of<Storage>(row + greatest_at, count, part.max);
  }
  part.has_nan = nan.any();
  part.sum = total(mass.folded);
  part.log_sum = total(mass.folded_log);
  return part;
}

template <class Storage, bool kMass>
static void above_of(const RowSpan& span, float max, float scale, const float* thresholds, float* sums) {
  const auto* row = static_cast<const typename Storage::Element*>(span.row);
  Vec threshold[kThresholds], sum[kThresholds];
  SPECDEC_UNROLL
  for (int t = 0; t < kThresholds; t++) threshold[t] = splat(thresholds[t]), sum[t] = splat(0.0f);
  for (int64_t at = span.begin; at < span.end; at += kSumBlock) {
    const int64_t end = min_of<int64_t>(at + kSumBlock, span.end);
    Vec part[kThresholds];
    SPECDEC_UNROLL
    for (int t = 0; t < kThresholds; t++) part[t] = splat(0.0f);
    for (int64_t i = at; i < end; i += kWidth) {
      const Vec z = load_some<Storage>(row + i, end - i);
      const Vec weight = kMass ? exp2((z - splat(max)) * splat(scale)) : splat(1.0f);
      SPECDEC_UNROLL
      for (int t = 0; t < kThresholds; t++) part[t] = part[t] + zero_unless_above(weight, z, threshold[t]);
    }
    SPECDEC_UNROLL
    for (int t = 0; t < kThresholds; t++) sum[t] = sum[t] + part[t];
  }
  SPECDEC_UNROLL
  for (int t = 0; t < kThresholds; t++) sums[t] = total(sum[t]);
}

template <class Storage>
static int64_t collect_of(const RowSpan& span, float threshold, float* values, int32_t* places) {
  const auto* row = static_cast<const typename Storage::Element*>(span.row);
  int64_t found = 0;
  for (int64_t i = span.begin; i < span.end; i += kWidth) {
    const Vec z = load_some<Storage>(row + i, span.end - i);
    unsigned lanes = lanes_above(z, splat(threshold));
    if (!lanes) continue;
    alignas(64) float lane[kWidth];
    store(lane, z);
    for (; lanes; lanes &= lanes - 1) {
      const int j = __builtin_ctz(lanes);
      values[found] = lane[j];
      places[found++] = int32_t(i + j);
    }
  }
  return found;
}

// The weights of one vector from place `at` on that a cut keeps: one comparison, but for the vector where ties end.
static SPECDEC_INLINE Vec keep(Vec weight, Vec z, int64_t at, const Cut& cut) {
  if (at > cut.last) return zero_unless_above(weight, z, splat(cut.value));
  const Vec kept = zero_unless_from(weight, z, splat(cut.value));
  if (at + kWidth - 1 <= cut.last) return kept;
  const unsigned later = ~0u << (cut.last + 1 - at);
  return zero_where(kept, later & lanes_equal(z, splat(cut.value)));
}

template <class Storage>
static ScanPart kept_of(const RowSpan& span, float max, float scale, const Cut& cut) {
  const auto* row = static_cast<const typename Storage::Element*>(span.row);
  Mass<true> mass;
  for (int64_t at = span.begin; at < span.end; at += kSumBlock) {
    const int64_t end = min_of<int64_t>(at + kSumBlock, span.end);
    for (int64_t i = at; i < end; i += kWidth) {
      const Vec z = load_some<Storage>(row + i, end - i);
      const Vec exponent = (z - splat(max)) * splat(scale);
      mass.add(0, keep(exp2(exponent), z, i, cut), exponent);
    }
    mass.fold();
  }
  return {max, 0, false, total(mass.folded), total(mass.folded_log)};
}

// Probabilities of the tokens [token, token + count) of one row; 0 beyond them.
template <class Storage>
static void fill_plain(const DistributionRow& from, int64_t token, int count, float* out) {
  const auto* at = static_cast<const typename Storage::Element*>(from.row) + token;
  const TokenDistribution& distribution = from.distribution;
  const Vec max = splat(distribution.max), scale = splat(distribution.scale),
            inverse_sum = splat(distribution.inverse_sum);
  const bool all = distribution.cut == minus_infinity();
  const Cut cut{distribution.cut, distribution.cut_id};
  for (int i = 0; i < kGroup; i += kWidth) {
    if (i >= count) {
      store(out + i, splat(0.0f));
      continue;
    }
    const Vec z = load_some<Storage>(at + i, count - i);
    const Vec weight = exp2((z - max) * scale) * inverse_sum;
    store(out + i, all ? weight : keep(weight, z, token + i, cut));
  }
}
template <class Storage>
static void fill_mapped(const DistributionRow& from, int64_t token, int count, float* out) {
  const TokenDistribution& distribution = from.distribution;
  for (int i = 0; i < kGroup; i++) {
    const int32_t id = i < count ? read_once(from.map + token + i) : -1;
    const float z = id < 0 || id >= from.entries ? minus_infinity() : load_one<Storage>(from.row, id);
    out[i] =
        z > distribution.cut || (z == distribution.cut && id >= 0 && id <= distribution.cut_id) ? z : minus_infinity();
  }
  const Vec max = splat(distribution.max), scale = splat(distribution.scale),
            inverse_sum = splat(distribution.inverse_sum);
  for (int i = 0; i < kGroup; i += kWidth) store(out + i, exp2((load(out + i) - max) * scale) * inverse_sum);
}
static void fill_one_hot(const DistributionRow& from, int64_t token, int count, float* out) {
  for (int i = 0; i < kGroup; i++) {
    const int64_t id = i >= count ? -1 : from.map ? from.map[token + i] : token + i;
    out[i] = id == from.distribution.argmax ? 1.0f : 0.0f;
  }
}
template <class Storage>
static SPECDEC_INLINE void fill_of(const DistributionRow& from, int64_t token, int count, float* out) {
  if (from.map) return fill_mapped<Storage>(from, token, count, out);
  fill_plain<Storage>(from, token, count, out);
}
// What the scan has kept of them.
static SPECDEC_INLINE void fill_kept(const DistributionRow& from, int64_t token, float* out) {
  const Vec scale = splat(from.scales[token / kSumBlock]);
  for (int i = 0; i < kGroup; i += kWidth) store(out + i, load(from.weights + token + i) * scale);
}
static SPECDEC_INLINE void fill(const DistributionRow& from, int64_t token, int count, float* out) {
  if (from.weights) return fill_kept(from, token, out);
  if (from.distribution.one_hot) return fill_one_hot(from, token, count, out);
  switch (from.dtype) {
    case DType::kFloat32:
      return fill_of<Float32>(from, token, count, out);
    case DType::kBFloat16:
      return fill_of<BFloat16>(from, token, count, out);
    case DType::kFloat16:
      return fill_of<Float16>(from, token, count, out);
  }
}

// max(0, p - factor * q) of 64 tokens, of two rows that are kept.
static SPECDEC_INLINE void weigh_kept_pair(const DistributionRow& target, const DistributionRow& draft, int64_t token,
                                           float* weight) {
  const Vec p_scale = splat(target.scales[token / kSumBlock]);
  const Vec q_scale = splat(draft.factor * draft.scales[token / kSumBlock]);
  const float *p = target.weights + token, *q = draft.weights + token;
  SPECDEC_UNROLL
  for (int i = 0; i < kGroup; i += kWidth)
    store(weight + i, maximum(load(p + i) * p_scale - load(q + i) * q_scale, splat(0.0f)));
}

// Weights of up to 64 tokens; `other` is a buffer for the rows of the terms.
static void weigh_any(const WeightPass& pass, int64_t token, int count, float* weight, float* other) {
  fill(pass.target, token, count, weight);
  const Vec zero = splat(0.0f);
  for (int term = 0; term < pass.terms; term++) {
    const DistributionRow& row = term == 0 ? pass.first : pass.more[term - 1];
    fill(row, token, count, other);
    const Vec factor = splat(row.factor), gain = splat(pass.gain), inverse_rho = splat(1.0f / pass.rho);
    for (int i = 0; i < kGroup; i += kWidth) {
      const Vec p = load(weight + i), q = load(other + i);
      const Vec taken =
          pass.kind == WeightKind::kKseq ? gain * (zero - maximum(zero - q, zero - p * inverse_rho)) : factor * q;
      store(weight + i, term + 1 < pass.terms ? p - taken : maximum(p - taken, zero));
    }
  }
  if (pass.kind == WeightKind::kThreshold) {
    for (int i = 0; i < kGroup; i += kWidth) {
      const Vec p = load(weight + i);
      store(weight + i, zero_unless_above(p, p, splat(pass.threshold)));
    }
  }
}

static SPECDEC_INLINE void weigh_group(const WeightPass& pass, int64_t token, int count, float* weight, float* other) {
  if (pass.kind == WeightKind::kDraft) {
    fill(pass.first, token, count, weight);
  } else if (pass.terms == 1 && pass.kind == WeightKind::kResidual && !pass.folded && pass.target.weights &&
             pass.first.weights) {
    weigh_kept_pair(pass.target, pass.first, token, weight);
  } else {
    weigh_any(pass, token, count, weight, other);
  }
  const uint64_t excluded = pass.excluded ? pass.excluded[token / kGroup] : 0;
  for (uint64_t bits = excluded; bits; bits &= bits - 1) weight[__builtin_ctzll(bits)] = 0.0f;
}

static SPECDEC_INLINE void offer_above(DrawSink* sink, Vec values, Vec uniforms, int64_t token) {
  unsigned lanes = lanes_above(values, uniforms * splat(sink->bound));
  if (!lanes) return;
  alignas(64) float value[kWidth], uniform[kWidth];
  store(value, values);
  store(uniform, uniforms);
  for (; lanes; lanes &= lanes - 1) {
    const int i = __builtin_ctz(lanes);
    sink->offer(sink, value[i], uniform[i], int32_t(token + i));
  }
}

static void draw_group(const WeightPass& pass, const float* weight, int64_t token, DrawSink* sink) {
  for (int i = 0; i < kGroup; i += 4 * kWidth) {
    Vec uniform[4];
    if (pass.noisy) {
      draw_uniforms(pass.noise, int32_t(token + i), uniform);
    } else {
      for (Vec& u : uniform) u = splat(1.0f);
    }
    for (int j = 0; j < 4; j++) offer_above(sink, load(weight + i + j * kWidth), uniform[j], token + i + j * kWidth);
  }
}

static float weigh(const WeightPass& pass, int64_t begin, int64_t end, DrawSink* sink) {
  alignas(64) float weight[kGroup], other[kGroup];
  Vec sum = splat(0.0f);
  for (int64_t at = begin; at < end; at += kSumBlock) {
    Vec part = splat(0.0f);
    for (int64_t token = at; token < min_of<int64_t>(at + kSumBlock, end); token += kGroup) {
      weigh_group(pass, token, int(min_of<int64_t>(kGroup, end - token)), weight, other);
      Vec group = splat(0.0f), top = splat(0.0f);
      SPECDEC_UNROLL
      for (int i = 0; i < kGroup; i += kWidth) {
        const Vec w = load(weight + i);
        group = group + w;
        top = maximum(top, w);
      }
      part = part + group;
      // No uniform is below 2^-33.
      if (sink && any_above(top, splat(sink->bound * 0x1p-33f))) draw_group(pass, weight, token, sink);
    }
    sum = sum + part;
  }
  return total(sum);
}

static void fold(const WeightPass& pass, int64_t begin, int64_t end, float* left) {
  alignas(64) float other[kGroup];
  for (int64_t token = begin; token < end; token += kGroup) {
    const int count = int(min_of<int64_t>(kGroup, end - token));
    fill(pass.target, token, count, left + token);
    for (int term = 0; term < pass.terms; term++) {
      const DistributionRow& row = term == 0 ? pass.first : pass.more[term - 1];
      fill(row, token, count, other);
      for (int i = 0; i < kGroup; i += kWidth) {
        const Vec taken = splat(row.factor) * load(other + i);
        store(left + token + i, load(left + token + i) - taken);
      }
    }
  }
}

static void rho_sums(const DistributionRow& target, const DistributionRow& draft, float from, float step, int64_t begin,
                     int64_t end, float* sums) {
  alignas(64) float p[kGroup], q[kGroup];
  Vec rho[kRhoPoints], sum[kRhoPoints];
  SPECDEC_UNROLL
  for (int r = 0; r < kRhoPoints; r++) rho[r] = splat(from + float(r + 1) * step), sum[r] = splat(0.0f);
  for (int64_t token = begin; token < end; token += kGroup) {
    const int count = int(min_of<int64_t>(kGroup, end - token));
    fill(target, token, count, p);
    fill(draft, token, count, q);
    for (int i = 0; i < kGroup; i += kWidth) {
      const Vec minus_p = splat(0.0f) - load(p + i), minus_q = splat(0.0f) - load(q + i);
      SPECDEC_UNROLL
      for (int r = 0; r < kRhoPoints; r++) sum[r] = sum[r] + maximum(minus_p, rho[r] * minus_q);
    }
  }
  SPECDEC_UNROLL
  for (int r = 0; r < kRhoPoints; r++) sums[r] = -total(sum[r]);
}

template <class Storage>
static void top_of(const RowSpan& span, DrawSink* sink) {
  const auto* row = static_cast<const typename Storage::Element*>(span.row);
  for (int64_t i = span.begin; i < span.end; i += kWidth)
    offer_above(sink, load_some<Storage>(row + i, span.end - i), splat(1.0f), i);
}

// Calls function<Storage>(arguments) for the storage of a dtype.
#define SPECDEC_BY_DTYPE(dtype, call) \
  switch (dtype) {                    \
    case DType::kFloat32: {           \
      using Storage = Float32;        \
      return call;                    \
    }                                 \
    case DType::kBFloat16: {          \
      using Storage = BFloat16;       \
      return call;                    \
    }                                 \
    case DType::kFloat16:             \
      break;                          \
  }                                   \
  using Storage = Float16;            \
  return call

template <bool kSums, bool kEntropy, bool kKeeps = false>
static ScanPart scan_any(const RowSpan& span, float scale, float* weights = nullptr, float* tops = nullptr) {
  SPECDEC_BY_DTYPE(span.dtype, (scan_of<Storage, kSums, kEntropy, kKeeps>(span, scale, weights, tops)));
}
static ScanPart scan(const RowSpan& span, ScanKind kind, float scale, float* weights, float* tops) {
  if (kind == ScanKind::kPeak) return scan_any<false, false>(span, scale);
  if (kind == ScanKind::kEntropy) return scan_any<true, true>(span, scale);
  return weights ? scan_any<true, false, true>(span, scale, weights, tops) : scan_any<true, false>(span, scale);
}
template <bool kMass>
static void above_any(const RowSpan& span, float max, float scale, const float* thresholds, float* sums) {
  SPECDEC_BY_DTYPE(span.dtype, (above_of<Storage, kMass>(span, max, scale, thresholds, sums)));
}
static void above(const RowSpan& span, ScanKind kind, float max, float scale, const float* thresholds, float* sums) {
  return kind == ScanKind::kSum ? above_any<true>(span, max, scale, thresholds, sums)
                                : above_any<false>(span, max, scale, thresholds, sums);
}
static int64_t collect(const RowSpan& span, float threshold, float* values, int32_t* places) {
  SPECDEC_BY_DTYPE(span.dtype, collect_of<Storage>(span, threshold, values, places));
}
static ScanPart kept(const RowSpan& span, float max, float scale, const Cut& cut) {
  SPECDEC_BY_DTYPE(span.dtype, kept_of<Storage>(span, max, scale, cut));
}
static void top(const RowSpan& span, DrawSink* sink) { SPECDEC_BY_DTYPE(span.dtype, top_of<Storage>(span, sink)); }

#undef SPECDEC_BY_DTYPE

extern const RowKernels kRowKernels = {scan, above, collect, kept, weigh, fold, rho_sums, top};

}  // namespace specdec::cpu::SPECDEC_ISA
