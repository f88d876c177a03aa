// Plain structs of the early exit ops, shared by the CPU kernels, the CUDA launchers and the bindings. See common/types.h.
#pragma once

#include <cstdint>

#include "common/sampling_params.h"
#include "common/types.h"
#include "linear/weight_type.h"

namespace specdec {

enum class ExitMeasure : int32_t { kNone = 0, kMaxProb = 1, kMargin = 2, kEntropy = 3 };
enum class ExitLevel : int32_t { kRow = 0, kAny = 1, kAll = 2 };

// Bits of a row's status.
enum ExitStatus : int32_t {
  kExitInvalid = 1,         // a logit of NaN or +inf, or none above -inf
  kExitFellBack = 2,        // the screen could not answer, the whole head was read
  kExitSettingInvalid = 4,  // a temperature of NaN or below 0
};

constexpr int32_t kMaxTopK = 16;  // of top_k

struct ExitParams {
  const void* hidden;         // [rows, dim]
  const void* head;           // [vocab, dim], contiguous
  const float* scales;        // [vocab] of an int8 head, else nullptr
  const void* norm_weight;    // [dim] of the RMSNorm, or nullptr: no norm
  const float* bias;          // [vocab] or nullptr
  const float* temperatures;  // [rows] or nullptr: `temperature`
  const int32_t* token_map;   // [vocab] or nullptr: entries are tokens
  const float* thresholds;    // [rows] or nullptr: `threshold`

  int32_t* token;   // [rows]
  float* max_prob;  // [rows], as the next three
  float* margin;
  float* entropy;
  float* logsumexp;
  int32_t* top_tokens;   // [rows, top_k], or nullptr
  float* top_logprobs;   // [rows, top_k], or nullptr
  int32_t* status;       // [rows]
  bool* exited;          // [rows]; this and the rest: nullptr without a measure
  int32_t* active_rows;  // [rows]
  int32_t* inverse;      // [rows]
  int32_t* num_active;   // [1]

  int64_t hidden_stride_row;
  DType hidden_dtype, norm_dtype;
  HeadType head_type;
  ExitMeasure measure;
  ExitLevel level;
  int32_t rows, dim, vocab, top_k;
  float norm_eps, temperature, threshold;
};

// As it was given, which may be anything; what it counts as; and the bit for what is none.
SPECDEC_HOST_DEVICE float given_temperature(const ExitParams& p, int32_t row) {
  return p.temperatures ? p.temperatures[row] : p.temperature;
}
SPECDEC_HOST_DEVICE float temperature_of(const ExitParams& p, int32_t row) {
  return softmax_temperature(given_temperature(p, row));
}
SPECDEC_HOST_DEVICE int32_t setting_status(const ExitParams& p, int32_t row) {
  return is_temperature(given_temperature(p, row)) ? 0 : kExitSettingInvalid;
}

// The same with an int8 copy of the head, which is read first (specdec_ops.QuantizedHead).
struct ScreenedParams {
  ExitParams exit;
  const int8_t* values;      // [vocab, dim], contiguous
  const float* scales;       // [vocab], as the next two
  const float* error_norms;  // not below |head - scale * values| of a row
  const float* norms;        // not below |scale * values| of a row
  const float* error_gain;   // [1], not below the spectral norm of head - scales * values
  int32_t* rechecked;        // [rows]
  float tolerance;           // of max_prob and margin
};

// The same, reading the head in parts until every decision is certain (specdec_ops.HeadBounds, early_exit/bound_verdict.h).
constexpr int32_t kMaxParts = 16;

struct BoundedParams {
  ExitParams exit;
  const float* norms_after;  // [parts], not below the length of any row of the head behind the part; the last one is 0
  int32_t* seen;             // [rows]: entries that the row's statistics are of
  int32_t ends[kMaxParts];   // of the parts in the vocabulary, ascending, the last one is vocab
  int32_t parts;
};

// A decision model: linear layers, ReLU between them, a sigmoid at the end.
constexpr int32_t kMaxLayers = 8;

struct MlpLayer {
  const void* weight;  // [outputs, inputs], contiguous
  const float* bias;   // [outputs]
  HeadType type;       // not kInt8
  int32_t outputs;
};

struct MlpParams {
  const void* features;  // [rows, inputs]
  float* score;          // [rows]
  bool* stop;            // [1]
  int64_t features_stride_row;
  MlpLayer layers[kMaxLayers];
  DType features_dtype;
  int32_t count, rows, inputs;
  float threshold;
};

}  // namespace specdec
