// Early exit on the CPU: what the head says of each row, and which rows may stop.
//
// The head is cut into chunks of a fixed number of rows, which threads take in any order. A chunk is seen a tile at a
// time by all hidden rows and leaves a state for each of them; states are merged in the order of the chunks, so a
// result depends on its row alone, and not on the threads. Memory read: the head once (once for every 60 hidden rows,
// but then products are what takes the time). Scratch: the packed rows, and 150 bytes per row and chunk.
#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "common/constants.h"
#include "common/cpu/isa.h"
#include "early_exit/cpu/head_reader.h"

namespace specdec::cpu {
namespace {

constexpr int64_t kProductsPerThread = 1 << 18;  // below this many another thread does not pay
constexpr float kMinusInfinity = -INFINITY;

const ExitKernels& exit_kernels() {
#ifdef SPECDEC_X86
#ifdef SPECDEC_HAVE_AVX512_BF16
  if (current_isa() >= Isa::kAvx512Bf16) return avx512_bf16::kExitKernels;
#endif
  if (current_isa() >= Isa::kAvx512) return avx512::kExitKernels;
  if (current_isa() >= Isa::kAvx2) return avx2::kExitKernels;
#endif
  return generic::kExitKernels;
}

// kWeightTile numbers of a vector [vocab], padded where it ends.
const float* tile_of(const float* vector, int64_t first, int count, float* padded) {
  if (!vector || count == kWeightTile) return vector ? vector + first : nullptr;
  std::copy_n(vector + first, count, padded);
  std::fill(padded + count, padded + kWeightTile, 1.0f);
  return padded;
}

// Takes in what a later part of the vocabulary has left.
void merge(ExitState& state, const ExitState& later, int top_k, float temperature) {
  state.invalid |= later.invalid;
  if (later.sum > 0) {
    const float top = std::max(state.value[0], later.value[0]);
    double sum = 0, weighted_logit_sum = 0;
    for (const ExitState* part : {static_cast<const ExitState*>(&state), &later}) {
      if (!(part->sum > 0)) continue;
      const double fall = double(part->value[0]) - top, decay = fall < 0 ? std::exp(fall / temperature) : 1.0;
      sum += part->sum * decay;
      weighted_logit_sum += (part->weighted_logit_sum + part->sum * fall) * decay;
    }
    state.sum = float(sum);
    state.weighted_logit_sum = float(weighted_logit_sum);
  }
  if (!(later.value[0] > state.value[top_k - 1])) return;
  ExitState both = state;
  int mine = 0, theirs = 0;
  for (int i = 0; i < top_k; i++) {
    const bool take_mine = state.value[mine] >= later.value[theirs];  // equals: the lower entry
    const ExitState& from = take_mine ? state : later;
    int& at = take_mine ? mine : theirs;
    both.value[i] = from.value[at];
    both.entry[i] = from.entry[at];
    at++;
  }
  std::copy_n(both.value, top_k, state.value);
  std::copy_n(both.entry, top_k, state.entry);
}

bool passes(const ExitParams& p, int row) {
  if (p.status[row] & (kExitInvalid | kExitSettingInvalid)) return false;
  const float limit = p.thresholds ? p.thresholds[row] : p.threshold;
  switch (p.measure) {
    case ExitMeasure::kMaxProb:
      return p.max_prob[row] >= limit;
    case ExitMeasure::kMargin:
      return p.margin[row] >= limit;
    default:
      return p.entropy[row] <= limit;
  }
}

}  // namespace

void decide_exits(const ExitParams& p) {
  bool any = false, all = p.rows > 0;
  for (int row = 0; row < p.rows; row++) {
    p.exited[row] = passes(p, row);
    any |= p.exited[row];
    all &= p.exited[row];
  }
  int32_t active = 0;
  for (int row = 0; row < p.rows; row++) {
    if (p.level == ExitLevel::kAny) p.exited[row] = any;
    if (p.level == ExitLevel::kAll) p.exited[row] = all;
    p.inverse[row] = p.exited[row] ? -1 : active;
    if (!p.exited[row]) p.active_rows[active++] = row;
  }
  std::fill(p.active_rows + active, p.active_rows + p.rows, -1);
  *p.num_active = active;
}

InputRows hidden_rows(const ExitParams& p) {
  return {p.hidden, p.hidden_dtype, p.hidden_stride_row, p.norm_weight, p.norm_dtype, p.norm_eps, p.dim};
}

ExitState empty_exit_state() {
  ExitState state{0.0f, 0.0f, false, {}, {}};
  std::fill(state.value, state.value + kMaxTopK, kMinusInfinity);
  std::fill(state.entry, state.entry + kMaxTopK, -1);
  return state;
}

HeadReader::HeadReader(const ExitParams& p, const std::vector<int>& rows, const ThreadPool& pool)
    : p_(p),
      rows_(rows),
      pool_(pool),
      absorb_(exit_kernels().absorb),
      top_k_(std::max(2, p.top_k)),
      packed_(head_form(p.head_type, p.hidden_dtype != DType::kFloat32), p.dim, int(rows.size())) {
  const InputRows hidden = hidden_rows(p_);
  pool_.run(rows_.size(), [&](int64_t n, int) {
    std::vector<float> y(float_row(p_.dim));
    product_kernels().normalise(hidden, rows_[n], y.data());
    packed_.set(int(n), y.data());
  });
}

void HeadReader::read(int64_t begin, int64_t end, std::vector<ExitState>& states) {
  const int64_t chunks = (end - begin + kExitChunk - 1) / kExitChunk, count = int64_t(rows_.size());
  std::vector<ExitState> of_chunks(chunks * count);
  pool_.deal(chunks, [&](int64_t chunk) {
    const int64_t first = begin + chunk * kExitChunk;
    read_chunk(first, std::min<int64_t>(first + kExitChunk, end), &of_chunks[chunk * count]);
  });
  pool_.run(count, [&](int64_t n, int) {
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
      merge(states[rows_[n]], of_chunks[chunk * count + n], top_k_, temperature_of(p_, rows_[n]));
    }
  });
}

void HeadReader::read_chunk(int64_t begin, int64_t end, ExitState* states) {
  alignas(64) float scales[kWeightTile], bias[kWeightTile];
  std::fill_n(states, rows_.size(), empty_exit_state());
  for (int64_t first = begin; first < end; first += kWeightTile) {
    const int count = int(std::min<int64_t>(kWeightTile, end - first));
    const WeightTile tile = WeightTile::of(WeightType(p_.head_type), p_.head, first, end, p_.dim);
    const float* tile_scales = tile_of(p_.scales, first, count, scales);
    const float* tile_bias = tile_of(p_.bias, first, count, bias);
    packed_.multiply(tile, [&](int n, float* logits) {
      std::fill(logits + count, logits + kWeightTile, kMinusInfinity);
      const float factor = float(kLog2EDouble / temperature_of(p_, rows_[n]));
      absorb_(logits, tile_scales, tile_bias, int32_t(first), factor, top_k_, states[n]);
    });
  }
}

void write_stats(const ExitParams& p, int row, const ExitState& state) {
  const float temperature = temperature_of(p, row);
  const bool sound = !state.invalid && state.sum > 0;
  const auto token_of = [&](int32_t entry) { return p.token_map ? p.token_map[entry] : entry; };
  p.token[row] = token_of(std::max(state.entry[0], 0));
  p.status[row] = setting_status(p, row) | (sound ? 0 : kExitInvalid);
  const bool valid = p.status[row] == 0;
  const double sum = valid ? state.sum : 1.0, weighted_logit_sum = std::log(sum), scale = 1.0 / temperature;
  const auto probability = [&](float value) {
    return value > kMinusInfinity ? std::exp((double(value) - state.value[0]) * scale) / sum : 0.0;
  };
  p.max_prob[row] = valid ? float(probability(state.value[0])) : 0.0f;
  p.margin[row] = valid ? float(probability(state.value[0]) - probability(state.value[1])) : 0.0f;
  p.entropy[row] = valid ? float(std::max(0.0, weighted_logit_sum - state.weighted_logit_sum * scale / sum)) : 0.0f;
  p.logsumexp[row] = valid ? float(state.value[0] * scale + weighted_logit_sum) : kMinusInfinity;
  for (int k = 0; k < p.top_k; k++) {
    const int64_t at = int64_t(row) * p.top_k + k;
    const bool exists = valid && state.value[k] > kMinusInfinity;
    p.top_tokens[at] = exists ? token_of(state.entry[k]) : -1;
    p.top_logprobs[at] =
        exists ? float((double(state.value[k]) - state.value[0]) * scale - weighted_logit_sum) : kMinusInfinity;
  }
}

void read_head(const ExitParams& p, const std::vector<int>& rows, const ThreadPool& pool) {
  std::vector<ExitState> states(p.rows, empty_exit_state());
  HeadReader(p, rows, pool).read(0, p.vocab, states);
  for (int row : rows) write_stats(p, row, states[row]);
}

ThreadPool exit_threads(const ExitParams& p, int threads) {
  const double products = double(p.vocab) * p.dim * p.rows;
  return ThreadPool(int(std::min<double>(std::max(threads, 1), products / kProductsPerThread + 1)));
}

}  // namespace specdec::cpu

namespace specdec {

using namespace cpu;

void exit_confidence_cpu(const ExitParams& p, int threads) {
  std::vector<int> rows(p.rows);
  std::iota(rows.begin(), rows.end(), 0);
  read_head(p, rows, exit_threads(p, threads));
  if (p.measure != ExitMeasure::kNone) decide_exits(p);
}

}  // namespace specdec
