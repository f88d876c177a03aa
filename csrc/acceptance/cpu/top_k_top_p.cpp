// Top-k and top-p without a sort of the row.
//
// Both ask for the shortest leading part, by (logit descending, place ascending), whose amount (entries, or mass)
// reaches a target. A pass finds the amounts above seven thresholds at once, which brackets the cut; the next pass
// splits the bracket. What is left in the bracket is at most its amount over the least weight in it, so it is known
// when it is few enough to be collected and sorted. The first thresholds are spaced for logits as models give them: one
// pass and a collecting one are usual for top-k, which takes no exponentials, and one to three for top-p. Later ones
// halve the bits between two floats three at a time, so eleven passes bound any row. Where top-k leaves few entries,
// top-p runs on those alone. Amounts are summed from the top down and never as what is left of the whole, so their
// error is that of the share which is kept.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "acceptance/cpu/row_reader.h"
#include "common/constants.h"

namespace specdec::cpu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr double kFewToSort = 1024;
constexpr double kFewToCopy = 8192;
constexpr int kMaxPasses = 14;  // enough to tell any two floats apart

// Unsigned integers in the order of the floats they stand for; both zeros have one.
uint32_t key_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits & 0x80000000u ? ~bits + 1 : bits | 0x80000000u;
}
float value_of(uint32_t key) {
  const uint32_t bits = key & 0x80000000u ? key & 0x7fffffffu : ~(key - 1);
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

float weight_of(const TokenDistribution& distribution, float value) {
  return std::exp2((value - distribution.max) * distribution.scale);
}

int64_t chunks_of(int64_t size) { return (size + kChunk - 1) / kChunk; }

}  // namespace

void RowReader::sums_above(const View& view, ScanKind kind, const TokenDistribution& distribution,
                           const float* thresholds, double* sums) {
  const int64_t chunks = chunks_of(view.size);
  sums_.resize(chunks * kThresholds);
  pool_.run(chunks, [&](int64_t chunk, int) {
    const RowSpan span{view.row, view.dtype, chunk * kChunk, std::min((chunk + 1) * kChunk, view.size)};
    kernels_.above(span, kind, distribution.max, distribution.scale, thresholds, &sums_[chunk * kThresholds]);
  });
  std::fill(sums, sums + kThresholds, 0.0);
  for (int64_t i = 0; i < chunks * kThresholds; i++) sums[i % kThresholds] += sums_[i];
}

// Entries above the threshold, in their order.
int64_t RowReader::collect(const View& view, float threshold, std::vector<float>& values,
                           std::vector<int32_t>& places) {
  const int64_t chunks = chunks_of(view.size);
  values.resize(view.size);
  places.resize(view.size);
  counts_.resize(chunks);
  pool_.run(chunks, [&](int64_t chunk, int) {
    const RowSpan span{view.row, view.dtype, chunk * kChunk, std::min((chunk + 1) * kChunk, view.size)};
    counts_[chunk] = kernels_.collect(span, threshold, &values[chunk * kChunk], &places[chunk * kChunk]);
  });
  int64_t found = counts_[0];
  for (int64_t chunk = 1; chunk < chunks; found += counts_[chunk++]) {
    std::copy_n(&values[chunk * kChunk], counts_[chunk], &values[found]);
    std::copy_n(&places[chunk * kChunk], counts_[chunk], &places[found]);
  }
  return found;
}

ScanPart RowReader::kept(const View& view, const TokenDistribution& distribution, const Cut& cut) {
  const int64_t chunks = chunks_of(view.size);
  parts_.resize(chunks);
  pool_.run(chunks, [&](int64_t chunk, int) {
    const RowSpan span{view.row, view.dtype, chunk * kChunk, std::min((chunk + 1) * kChunk, view.size)};
    parts_[chunk] = kernels_.kept(span, distribution.max, distribution.scale, cut);
  });
  double sum = 0, log_sum = 0;
  for (int64_t chunk = 0; chunk < chunks; chunk++) sum += parts_[chunk].sum, log_sum += parts_[chunk].log_sum;
  return {distribution.max, 0, false, float(sum), float(log_sum)};
}

// The cut itself, among the few entries of (low, high]; `above` is the amount above high.
Cut RowReader::last_of(const View& view, float low, float high, ScanKind kind, double target, double above,
                       const TokenDistribution& distribution, double* reached) {
  const int64_t found = collect(view, low, values_, places_);
  order_.clear();
  for (int64_t i = 0; i < found; i++)
    if (values_[i] <= high) order_.push_back(uint64_t(~key_of(values_[i])) << 32 | uint32_t(places_[i]));
  if (value_of(key_of(low) + 1) < high) std::sort(order_.begin(), order_.end());  // else all equal, and in order
  *reached = above;
  for (const uint64_t entry : order_) {
    const float value = value_of(~uint32_t(entry >> 32));
    *reached += kind == ScanKind::kSum ? weight_of(distribution, value) : 1.0f;
    if (*reached >= target) return {value, int64_t(uint32_t(entry))};
  }
  return {-kInfinity, std::numeric_limits<int64_t>::max()};  // the whole row does not reach it
}

Cut RowReader::narrow(const View& view, ScanKind kind, double target, const TokenDistribution& distribution,
                      double* reached) {
  float low = -kInfinity, high = distribution.max, thresholds[kThresholds];
  double above = 0, within = double(view.size), sums[kThresholds];
  const float step = 1.0f / distribution.scale;  // halves a weight
  for (int i = 0; i < kThresholds; i++) thresholds[i] = distribution.max - step * float(1 << i) * 0.75f;
  for (int pass = 0; pass < kMaxPasses && within > kFewToSort && key_of(high) - key_of(low) > 1; pass++) {
    sums_above(view, kind, distribution, thresholds, sums);
    double reached_at_low = -1;
    for (int i = 0; i < kThresholds && reached_at_low < 0; i++) {
      if (!(thresholds[i] < high && thresholds[i] > low)) continue;
      if (sums[i] >= target) {
        low = thresholds[i];
        reached_at_low = sums[i];
      } else {
        high = thresholds[i];
        above = sums[i];
      }
    }
    if (reached_at_low >= 0) {
      const double least = kind == ScanKind::kSum ? std::max(weight_of(distribution, low), 1e-38f) : 1.0;
      within = (reached_at_low - above) / least;
    }
    const uint64_t from = key_of(low), range = key_of(high) - from;
    for (int i = 0; i < kThresholds; i++)
      thresholds[i] = value_of(uint32_t(from + range * uint64_t(kThresholds - i) / (kThresholds + 1)));
  }
  return last_of(view, low, high, kind, target, above, distribution, reached);
}

RowReader::Kept RowReader::filter(const View& row, const RowSettings& settings, const TokenDistribution& distribution,
                                  double mass) {
  View view = row;
  Cut cut{-kInfinity, std::numeric_limits<int64_t>::max()};
  if (settings.top_k > 0 && settings.top_k < row.size) {
    double reached = 0;
    cut = narrow(row, ScanKind::kPeak, settings.top_k, distribution, &reached);
    if (cut.value > -kInfinity && settings.top_k <= kFewToCopy) {
      // Of the entries that equal the cut some may be beyond it; they are dropped.
      const float below = std::nextafter(cut.value, -kInfinity);
      const int64_t found = collect(row, below, top_values_, top_places_);
      int64_t size = 0;
      for (int64_t i = 0; i < found; i++)
        if (top_values_[i] > cut.value || top_places_[i] <= cut.last)
          top_values_[size] = top_values_[i], top_places_[size++] = top_places_[i];
      view = {top_values_.data(), DType::kFloat32, size};
      mass = kept(view, distribution, {-kInfinity, size}).sum;
    } else {
      mass = kept(row, distribution, cut).sum;
    }
  }
  if (settings.top_p < 1) {
    double reached = 0;
    const double target = std::max(double(settings.top_p) * mass, 1e-300);
    Cut shorter = narrow(view, ScanKind::kSum, target, distribution, &reached);
    if (shorter.value > -kInfinity && view.row != row.row) shorter.last = top_places_[shorter.last];
    if (shorter.value > cut.value || (shorter.value == cut.value && shorter.last < cut.last)) {
      cut = shorter;
      mass = reached;
    }
  }
  return {cut, mass};
}

TokenDistribution RowReader::distribution(const void* row, DType dtype, int64_t size, const RowSettings& settings,
                                          bool with_entropy, KeptRow* keep) {
  const View view{row, dtype, size};
  const bool greedy = !(settings.temperature > 0);
  const float scale = greedy ? 0.0f : kLog2E / settings.temperature;
  const bool filtered = (settings.top_k > 0 && settings.top_k < size) || settings.top_p < 1;
  const ScanKind kind = greedy ? ScanKind::kPeak : with_entropy && !filtered ? ScanKind::kEntropy : ScanKind::kSum;
  if (keep) keep->row = nullptr;
  if (kind != ScanKind::kSum || filtered || size > kMaxKept) keep = nullptr;
  const ScanPart part = scan(view, kind, scale, keep);

  TokenDistribution distribution{};
  distribution.max = part.max;
  distribution.scale = scale;
  distribution.inverse_sum = 1.0f;
  distribution.cut = -kInfinity;
  distribution.cut_id = kEveryId;
  distribution.argmax = int32_t(part.argmax);
  distribution.valid = !part.has_nan && std::isfinite(part.max);
  distribution.one_hot = greedy || !distribution.valid;
  if (distribution.one_hot) return distribution;

  double mass = part.sum, log_mass = part.log_sum;
  if (filtered) {
    const Kept left = filter(view, settings, distribution, mass);
    distribution.cut = left.cut.value;
    distribution.cut_id = int32_t(std::min<int64_t>(left.cut.last, kEveryId));
    mass = left.mass;
    if (with_entropy) {
      const ScanPart exact = kept(view, distribution, left.cut);
      mass = exact.sum;
      log_mass = exact.log_sum;
    }
  }
  distribution.inverse_sum = float(1.0 / mass);
  if (keep) {
    keep->row = row;
    keep->max = distribution.max;
    keep->inverse_sum = distribution.inverse_sum;
    for (int64_t block = 0; block * kSumBlock < size; block++) {
      float& top = keep->scales[block];
      top = std::exp2((top - distribution.max) * scale) * distribution.inverse_sum;
    }
  }
  if (with_entropy) distribution.entropy = float(std::log(mass) - kLn2Double * log_mass / mass);
  return distribution;
}

ScanPart RowReader::scan(const View& view, ScanKind kind, float scale, KeptRow* keep) {
  const int64_t chunks = chunks_of(view.size);
  if (keep && !keep->weights) {
    const int64_t room = (view.size + kGroup - 1) / kGroup * kGroup;
    keep->weights.reset(new float[room]);
    std::fill(keep->weights.get() + view.size, keep->weights.get() + room, 0.0f);
    keep->scales.reset(new float[(view.size + kSumBlock - 1) / kSumBlock]);
  }
  float *weights = keep ? keep->weights.get() : nullptr, *tops = keep ? keep->scales.get() : nullptr;
  parts_.resize(chunks);
  pool_.run(chunks, [&](int64_t chunk, int) {
    const RowSpan span{view.row, view.dtype, chunk * kChunk, std::min((chunk + 1) * kChunk, view.size)};
    parts_[chunk] = kernels_.scan(span, kind, scale, weights, tops);
  });
  ScanPart whole = parts_[0];
  for (int64_t chunk = 1; chunk < chunks; chunk++) {
    whole.has_nan |= parts_[chunk].has_nan;
    if (parts_[chunk].max > whole.max) whole.max = parts_[chunk].max, whole.argmax = parts_[chunk].argmax;
  }
  if (kind == ScanKind::kPeak) return whole;
  double sum = 0, log_sum = 0;
  for (const ScanPart& part : parts_) {
    if (part.max == -kInfinity) continue;
    const double exponent = (double(part.max) - whole.max) * scale, factor = std::exp2(exponent);
    sum += factor * part.sum;
    log_sum += factor * (part.log_sum + std::max(exponent, -200.0) * part.sum);
  }
  whole.sum = float(sum);
  whole.log_sum = float(log_sum);
  return whole;
}

}  // namespace specdec::cpu
