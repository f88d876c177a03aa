// What the acceptance and sampling kernels ask of each instruction set: passes over a part of one row of logits.
//
// A part is [begin, end) of a row, at most kChunk entries, and starts at a multiple of it. Its results are merged in
// the order of the parts, so the number of threads never shows. Arithmetic is float32.
#pragma once

#include <cstdint>

#include "acceptance/params.h"
#include "acceptance/walk_base.h"
#include "common/philox.h"

namespace specdec::cpu {

constexpr int64_t kChunk = 16384;     // 32 or 64 KB: half of a small second-level cache with both rows of a pair
constexpr int kGroup = 64;            // tokens whose weights are made at once: one word of a bit set
constexpr int64_t kMaxKept = 262144;  // entries of a row whose weights are kept: 1 MB
constexpr int kSumBlock = 2048;       // entries whose values are kept in the first-level cache: 8 KB of float32

struct RowSpan {
  const void* row;
  DType dtype;
  int64_t begin, end;
};

struct ScanPart {
  float max;       // of what is not a NaN
  int64_t argmax;  // the lowest, or begin if everything is -inf or NaN
  bool has_nan;
  float sum;      // of exp2((z - max) * scale), if asked for
  float log_sum;  // of the same times its exponent, if asked for
};
enum class ScanKind { kPeak, kSum, kEntropy };

// The entries of a row that a filter keeps, by their place in the row.
struct Cut {
  float value;
  int64_t last;  // place of the last one kept among those that equal `value`
};

constexpr int kThresholds = 7;

// A row as a distribution. With `map`, entry map[x] is token x's, and none if that is not below `entries`. Where its scan has kept
// `weights`, the probability of entry x is weights[x] * scales[x / kSumBlock]; zeros follow to a multiple of kGroup.
struct DistributionRow {
  const void* row;
  DType dtype;
  const int32_t* map;
  int32_t entries;
  TokenDistribution distribution;
  float factor;
  const float* weights;
  const float* scales;
};

// Takes part in a draw whatever may still win: weight / uniform above the bound.
struct DrawSink {
  float bound;
  void (*offer)(DrawSink* sink, float weight, float uniform, int32_t token);
};

struct WeightPass {
  WeightKind kind;
  DistributionRow target, first;
  const DistributionRow* more;
  int32_t terms;  // of `first` and `more`
  bool folded;    // `target` has other terms taken off already
  float gain, rho, threshold;
  const uint64_t* excluded;  // bit set over the vocabulary, or nullptr
  bool noisy;                // false: every uniform is 1, so that the greatest weight wins
  NoiseKey noise;
};

struct RowKernels {
  // With kSum and `weights` it leaves exp2((z - top) * scale) of every entry, and the `top` of every kSumBlock.
  ScanPart (*scan)(const RowSpan& span, ScanKind kind, float scale, float* weights, float* tops);
  // Entries above each threshold: their number or, with kSum, their mass.
  void (*above)(const RowSpan& span, ScanKind kind, float max, float scale, const float* thresholds, float* sums);
  // Entries above a threshold with their places, in their order. Returns how many.
  int64_t (*collect)(const RowSpan& span, float threshold, float* values, int32_t* places);
  // Mass of the entries that a cut keeps, as `sum` and `log_sum`.
  ScanPart (*kept)(const RowSpan& span, float max, float scale, const Cut& cut);
  // Sum of the weights of tokens [begin, end), which are offered to the sink if there is one.
  float (*weigh)(const WeightPass& pass, int64_t begin, int64_t end, DrawSink* sink);
  // What the terms leave of p for tokens [begin, end), below 0 too; to a multiple of kGroup. `left` is all of them.
  void (*fold)(const WeightPass& pass, int64_t begin, int64_t end, float* left);
  // kRhoPoints sums of min(p, (from + (i + 1) * step) * q).
  void (*rho_sums)(const DistributionRow& target, const DistributionRow& draft, float from, float step, int64_t begin,
                   int64_t end, float* sums);
  // Offers the values themselves: the bound is a value.
  void (*top)(const RowSpan& span, DrawSink* sink);
};

namespace generic {
extern const RowKernels kRowKernels;
}
namespace avx2 {
extern const RowKernels kRowKernels;
}
namespace avx512 {
extern const RowKernels kRowKernels;
}

// Those of the current instruction set.
const RowKernels& row_kernels();

}  // namespace specdec::cpu
