// exit_confidence with a screen on a GPU, in three launches: an int8 copy of the head says which entries matter, those
// alone are read in full precision, and rows that stay open are read from the whole head.
//
// First launch, the screen: blocks stream the copy as exit_confidence does a head, and leave each row's approximate
// logits (4 bytes an entry) with the greatest lower bounds of logits and the sums of a softmax. From them the last
// block plans how deep below the best a row's entries must be rechecked for its statistics to be known well enough.
//
// Second launch: block s of a row has its groups s, s + spans, ..., 16 groups of 128 entries. It adds up what the entries
// that are not rechecked may add (screen_stats.cuh), gathers the others into tiles of the head, and multiplies them
// as exit_confidence does: their logits are its logits bit for bit. The row's last block forms the statistics with their
// bounds. If they are settled it writes them, else the row goes onto the list of those that fell back; the last block
// of all puts the list in order and, if it is empty, decides who exits.
//
// Third launch: exit_confidence for the rows of the list; without any its blocks end at once.
//
// The bound is that of early_exit/screen_bounds.h; what differs is how sums round. Both products sum two (int8 rows in
// two parts: four) matrix instructions of 17 numbers each by themselves, of which one may cut off 17 last bits of the
// greatest number, and dim / 32 or fewer such sums; float32 heads sum 32 products and dim / 32 sums. 1 / rms comes from
// two orders of the same squares, chains of dim / 8 and dim / 32. All of it is below (256 + dim / 8) * 2^-23 of the
// lengths' product. Rows become float16 numbers times a power of two for the copy: exactly, but for what is below 2^-24
// of the power, if the head has 16 bits, in two parts to 2^-20 if it has 32.
//
// Bytes: the copy once (of up to 32 rows), vocab * 4 per row written and read, and dim * 2 for each rechecked entry.
#pragma once

#include "early_exit/cuda/exit_confidence.cuh"
#include "early_exit/cuda/screen_stats.cuh"

namespace specdec::cuda {

constexpr int32_t kSpanGroups = 16, kGroup = 128, kSpan = kSpanGroups * kGroup;
constexpr int kSteps = 32;           // of counts
constexpr int32_t kMaxChosen = 512;  // entries of a span that may be rechecked

// What the first launch leaves of a row for the second one.
struct ScreenPlan {
  ScreenBound bound;
  float length;     // not below that of the row as it is multiplied
  float reference;  // the greatest lower bound
  float cut;        // the last one that is listed
  float deep;       // approximations above it are rechecked
  int32_t sound;
};

// What a span leaves of a row besides the state of its rechecked logits.
struct SpanTail {
  TailParts tail;
  float chosen;  // entries; above any limit: too many
};
constexpr int kTailNumbers = int(sizeof(SpanTail) / sizeof(float));

// The places of a call's scratch.
struct ScreenScratch {
  const ScreenLaunch& launch;
  __device__ __forceinline__ float* approximate(int32_t row) const {
    return reinterpret_cast<float*>(launch.scratch + launch.approximate) + row * launch.stride;
  }
  __device__ __forceinline__ int32_t* counts(int32_t row, int32_t block) const {  // [kSteps + 1]: and their top
    auto* all = reinterpret_cast<int32_t*>(launch.scratch + launch.counts);
    return all + (int64_t(row) * launch.blocks + block) * (kSteps + 1);
  }
  __device__ __forceinline__ ScreenPlan* plans() const {
    return reinterpret_cast<ScreenPlan*>(launch.scratch + launch.plans);
  }
  __device__ __forceinline__ float* tails(int32_t row) const {  // [spans, kTailNumbers]
    return reinterpret_cast<float*>(launch.scratch + launch.tails) + int64_t(row) * launch.spans * kTailNumbers;
  }
  __device__ __forceinline__ int32_t* fallen() const {  // [rows + 1]
    return reinterpret_cast<int32_t*>(launch.scratch + launch.fallen);
  }
};

// Factors of rows for the copy, and the bounds of their products. A warp has a row.
template <class Shape, class Full>
__device__ inline void find_screen_factors(const HiddenRows& rows, const RowFactors& factors, ScreenPlan* plans) {
  constexpr bool kNormFirst = std::is_same_v<Full, Float16>;  // as the whole head has it
  const ExitParams& p = rows.p;
  const int lane = int(threadIdx.x) % kWarpSize;
  const bool has_norm = p.norm_weight != nullptr;
  for (int n = int(threadIdx.x) / kWarpSize; n < Shape::kRows; n += Shape::kThreads / kWarpSize) {
    float squares = 0.0f, weighed = 0.0f, largest = 0.0f;
    const int32_t dims = n < rows.count ? p.dim : 0;
#pragma unroll 1
    for (int32_t dim = lane * 8; dim < dims; dim += kWarpSize * 8) {
      float x[8], weight[8];
      numbers_of(rows.hidden(n, dim), p.hidden_dtype, x);
      if (has_norm) numbers_of(rows.norm(dim), p.norm_dtype, weight);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float y = has_norm ? x[i] * weight[i] : x[i];
        squares = fmaf(x[i], x[i], squares);
        weighed += y * y;
        largest = fmaxf(largest, fabsf(y));
      }
    }
#pragma unroll
    for (int bit = 1; bit < kWarpSize; bit *= 2) {
      squares += warp_shuffle_xor(squares, bit);
      weighed += warp_shuffle_xor(weighed, bit);
      largest = fmaxf(largest, warp_shuffle_xor(largest, bit));
    }
    if (lane != 0) continue;
    const float norm = has_norm ? inverse_rms(p, squares) : 1.0f;
    const float scale = scale_to_16_bits(kNormFirst ? largest * norm : largest);
    factors.staged[n] = kNormFirst ? norm * scale : scale;
    factors.logit[n] = power_of_two_inverse(scale) * (kNormFirst ? 1.0f : norm);

    const float dims_root = sqrtf(float(p.dim)), lost = dims_root * 0x1p-24f * factors.logit[n];
    const float length = norm * sqrtf(weighed) * (1 + 0x1p-7f) + lost;
    const float sums = (256.0f + float(p.dim) / 8) * 0x1p-23f, rounded = Shape::kParts > 1 ? 0x1p-20f : 0.0f;
    const float vanishing = dims_root * 0x1p-120f;
    constexpr float kOutward = 1 + 1e-5f;
    plans[n].length = length;
    plans[n].bound = {(length * (1 + sums) + vanishing) * kOutward,
                      (length * (sums + rounded) + lost + vanishing) * kOutward,
                      (vanishing * length + float(p.dim) * 0x1p-120f) * kOutward};
  }
}

// Counts of approximations by their distance below the greatest, in steps of half the temperature: lane i of a row's
// warp has step i. `top` is the step of the greatest.
struct RowCounts {
  float* tops;      // [kRows]
  int32_t* counts;  // [kRows, kSteps]
};

__device__ __forceinline__ float step_of(float z, float inverse_temperature) {
  return floorf(2.0f * z * inverse_temperature);
}

// A warp's counts move with the greatest, and take in the lanes' numbers.
template <int kCount>
__device__ __forceinline__ void count_steps(const RowCounts& of, int n, const float (&z)[kCount], float greatest,
                                            float inverse_temperature, int lane) {
  const float top = step_of(greatest, inverse_temperature), rise = top - of.tops[n];
  int32_t* counts = of.counts + n * kSteps;
  if (!(rise <= 0.0f)) {
    const int32_t own = counts[lane], by = rise < float(kSteps) ? int32_t(rise) : kSteps;
    const int32_t moved = warp_shuffle(own, lane - by);  // of any lane where there is none: not used
    counts[lane] = lane >= by ? moved : 0;
  }
  warp_sync();
  if (lane == 0) of.tops[n] = top;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const float step = top - step_of(z[i], inverse_temperature);
    if (step >= 0.0f && step < float(kSteps)) atomic_add(counts + int32_t(step), 1);
  }
}

// A warp chooses how many steps are rechecked, from the counts of its row (lane i has step i): the fewest with which
// the entries that are left can't move the statistics by more than they may, as far as can be told. Only a guess: the
// second launch proves it or gives the row up.
__device__ inline int32_t steps_to_recheck(const ScreenedParams& s, const RowState& state, float lead, float error,
                                           float spread, int32_t count, int32_t row, int lane) {
  const ExitParams& p = s.exit;
  const float inverse_temperature = 1.0f / temperature_of(p, row), sum = fmaxf(state.sum, 1.0f);
  const float max_prob = 1.0f / sum, margin = max_prob * (1.0f - expf(lead * inverse_temperature));
  const float entropy = fmaxf(logf(sum) - state.weighted_logit_sum * inverse_temperature * max_prob, 0.0f);
  const float limit = p.thresholds != nullptr ? p.thresholds[row] : p.threshold;
  float allowed = s.tolerance * sum;  // of the sum, relative
  if (p.measure == ExitMeasure::kMaxProb) allowed = fminf(allowed, fabsf(max_prob - limit) * sum);
  if (p.measure == ExitMeasure::kMargin) allowed = fminf(allowed, fabsf(margin - limit) * sum);
  if (p.measure == ExitMeasure::kEntropy) allowed = fminf(allowed, fabsf(entropy - limit) / (6.0f + entropy));

  // What is left if this lane's step is the first one that is not rechecked.
  const float weight = fast_exp2(-0.5f * kLog2E * float(lane));
  float left = float(count) * weight, squares = left * weight;
#pragma unroll
  for (int lanes = 1; lanes < kWarpSize; lanes *= 2) {
    const float further = warp_shuffle(left, lane + lanes), more = warp_shuffle(squares, lane + lanes);
    if (lane + lanes < kWarpSize) {
      left += further;
      squares += more;
    }
  }
  const float each = left * (expf(fminf(error, 20.0f)) - 1.0f);
  const float together = sqrtf(squares) * spread + 0.6f * weight * spread * spread;
  const uint32_t enough = warp_ballot(fminf(each, together) <= 0.7f * allowed * sum);
  return enough != 0 ? lowest_bit(enough) : kSteps;
}

template <class Shape, class Full>
__device__ __forceinline__ void screen_head(const ScreenLaunch& launch, const ExitShared<Shape>& shared,
                                            const RowCounts& counts, const HiddenRows& rows, const ScreenPlan* plans,
                                            int32_t block) {
  const ExitParams& p = launch.call.exit;
  const int lane = int(threadIdx.x) % kWarpSize;
  const int32_t top_k = top_k_of(p);
  const ScreenScratch scratch = {launch};
  const HeadRows head = {launch.call.values, nullptr, p.vocab, p.dim, launch.values_aligned};
  RowStager<Shape, Full> stager(rows, shared.factors);
  stream_head<Shape>(head, stager, shared.stages, block, launch.blocks, [&](int32_t tile, const auto& sums) {
    const int32_t first = tile * Shape::kVocab + lane;
    const TileTerms<Shape> terms(launch.call.scales, p.bias, p.vocab, first);
    hand_over<Shape>(shared, sums, rows.count, [&](int n, float (&z)[TileTerms<Shape>::kCount]) {
      terms.apply(z);
      float low[TileTerms<Shape>::kCount];
      bool sound = true;
#pragma unroll
      for (int i = 0; i < TileTerms<Shape>::kCount; ++i) {
        const int32_t entry = first + kWarpSize * i;
        low[i] = negative_infinity();
        if (entry >= p.vocab) continue;
        const float error_norm = launch.call.error_norms[entry], norm = launch.call.norms[entry];
        scratch.approximate(rows.row(n))[entry] = z[i];
        low[i] = z[i] - screen_error(plans[n].bound, fmaxf(z[i], kLowestLogit), error_norm, norm).all;
        sound = sound && plans[n].length * (error_norm + norm) < kGreatestProduct;
      }
      RowState state = shared.states[n];
      uint64_t own = lane < top_k ? shared.keys[n * top_k + lane] : 0;
      list_keys(own, low, [&](int i) { return first + kWarpSize * i; }, top_k, lane);
      const float inverse_temperature = 1.0f / temperature_of(p, rows.row(n));
      absorb(state, z, kLog2E * inverse_temperature);
      if (warp_ballot(!sound) != 0) state.invalid = 1;
      count_steps(counts, n, z, state.max, inverse_temperature, lane);
      warp_sync();  // all lanes have read the state
      if (lane == 0) shared.states[n] = state;
      if (lane < top_k) shared.keys[n * top_k + lane] = own;
    });
  });
}

template <class Shape, class Full>
__global__ void __launch_bounds__(Shape::kThreads, 2) screen_kernel(ScreenLaunch launch) {
  const ExitParams& p = launch.call.exit;
  const int lane = int(threadIdx.x) % kWarpSize, warp = int(threadIdx.x) / kWarpSize;
  const int32_t row_block = int32_t(blockIdx.x) % launch.row_blocks, block = int32_t(blockIdx.x) / launch.row_blocks;
  const int32_t first_row = row_block * Shape::kRows, top_k = top_k_of(p);
  SPECDEC_SHARED(int32_t, ids, [Shape::kRows]);
  const HiddenRows rows = {p, ids, min(Shape::kRows, p.rows - first_row), launch.hidden_aligned, launch.norm_aligned};
  if (int(threadIdx.x) < rows.count) ids[threadIdx.x] = first_row + int(threadIdx.x);
  block_sync();
  SPECDEC_SHARED(ScreenPlan, plans, [Shape::kRows]);
  SPECDEC_SHARED(float, tops, [Shape::kRows]);
  SPECDEC_SHARED(int32_t, step_counts, [Shape::kRows * kSteps]);
  const RowCounts counts = {tops, step_counts};
  const ExitShared<Shape> shared(top_k);
  for (int n = int(threadIdx.x); n < Shape::kRows; n += Shape::kThreads) tops[n] = negative_infinity();
  for (int i = int(threadIdx.x); i < Shape::kRows * kSteps; i += Shape::kThreads) step_counts[i] = 0;
  for (int n = int(threadIdx.x); n < Shape::kRows; n += Shape::kThreads) shared.states[n] = empty_state();
  for (int i = int(threadIdx.x); i < Shape::kRows * top_k; i += Shape::kThreads) shared.keys[i] = 0;
  find_screen_factors<Shape, Full>(rows, shared.factors, plans);
  block_sync();
  screen_head<Shape, Full>(launch, shared, counts, rows, plans, block);
  block_sync();

  const ScreenScratch scratch = {launch};
  const StoredStates stored(launch.scratch, launch.scratch + launch.keys, launch.blocks, top_k);
  for (int n = warp; n < rows.count; n += Shape::kThreads / kWarpSize) {
    stored.leave(rows.row(n), block, shared.states[n], lane < top_k ? shared.keys[n * top_k + lane] : 0, lane);
    int32_t* left = scratch.counts(rows.row(n), block);
    left[lane] = step_counts[n * kSteps + lane];
    if (lane == 0) left[kSteps] = int32_t(bits_of(tops[n]));
  }
  const BlockTeam team = {int32_t(threadIdx.x), Shape::kThreads};
  if (!arrives_last(team, launch.counters + row_block, launch.blocks)) return;
  for (int n = warp; n < rows.count; n += Shape::kThreads / kWarpSize) {
    const int32_t row = rows.row(n);
    uint64_t own;
    const RowState state = stored.merged(row, launch.blocks, kLog2E / temperature_of(p, row), own, lane);
    const float best = logit_of(warp_shuffle(own, 0)), second = logit_of(warp_shuffle(own, 1));
    const float last = logit_of(warp_shuffle(own, top_k - 1)), temperature = temperature_of(p, row);
    const float top = step_of(state.max, 1.0f / temperature);
    int32_t count = 0;
    for (int32_t of = 0; of < launch.blocks; ++of) {
      const int32_t* left = scratch.counts(row, of);
      const float step = float(lane) - (top - float_of(uint32_t(left[kSteps])));
      if (step >= 0.0f && step < float(kSteps)) count += left[int32_t(step)];
    }
    const float spread = plans[n].length * *launch.call.error_gain / temperature;
    const float error = (state.max - best) / temperature;
    const int32_t steps = steps_to_recheck(launch.call, state, second - best, error, spread, count, row, lane);
    if (lane != 0) continue;
    ScreenPlan plan = plans[n];
    plan.reference = best;
    plan.cut = last;
    plan.deep = steps == 0 ? -negative_infinity() : (top - float(steps - 1)) * 0.5f * temperature;
    plan.sound = state.invalid == 0 && best > negative_infinity() && setting_status(p, row) == 0 ? 1 : 0;
    scratch.plans()[row] = plan;
  }
}

// One look at a span: its entries that are to be rechecked, ascending, and what the others may add. Returns how many.
__device__ inline int32_t look_at_span(TeamReducer& reduce, const ScreenLaunch& launch, const ScreenPlan& plan,
                                       int32_t row, int32_t span, int32_t* entries, TailParts& tail) {
  const ExitParams& p = launch.call.exit;
  const float* approximate = ScreenScratch{launch}.approximate(row);
  const float inverse_temperature = 1.0f / temperature_of(p, row);
  int32_t found = 0;
  tail = {};
#pragma unroll 1
  for (int32_t at = reduce.team.rank; at < kSpan; at += reduce.team.size) {
    const int32_t entry = (at / kGroup * launch.spans + span) * kGroup + at % kGroup;
    const float a = entry < p.vocab ? approximate[entry] : negative_infinity();
    bool chosen = false;
    if (a > negative_infinity()) {
      const float clamped = fmaxf(a, kLowestLogit);
      const ScreenError error =
          screen_error(plan.bound, clamped, launch.call.error_norms[entry], launch.call.norms[entry]);
      chosen = !(plan.cut > clamped + error.all) || clamped > plan.deep;
      if (!chosen) add_to_tail(tail, clamped - plan.reference, error, inverse_temperature);
    }
    uint64_t before, total;
    reduce.scan(chosen ? 1 : 0, before, total);
    if (chosen && found + int32_t(before) < kMaxChosen) entries[found + int32_t(before)] = entry;
    found += int32_t(total);
  }
  tail.sums = reduce(tail.sums, [](const TailSums& a, const TailSums& b) { return sum_of(a, b); });
  tail.most = reduce(tail.most, [](const TailMost& a, const TailMost& b) { return most_of(a, b); });
  return found;
}

// The logits of these entries, into the state of the block's one row.
template <class Shape>
__device__ __forceinline__ void recheck(const ScreenLaunch& launch, const ExitShared<Shape>& shared,
                                        const HiddenRows& rows, const int32_t* entries, int32_t count) {
  const ExitParams& p = launch.call.exit;
  const int lane = int(threadIdx.x) % kWarpSize;
  const int32_t top_k = top_k_of(p);
  find_factors<Shape>(rows, shared.factors);
  block_sync();  // the factors and the list are there
  const HeadRows head = {p.head, entries, count, p.dim, launch.head_aligned};
  RowStager<Shape> stager(rows, shared.factors);
  stream_head<Shape>(head, stager, shared.stages, 0, 1, [&](int32_t tile, const auto& sums) {
    hand_over<Shape>(shared, sums, 1, [&](int, float (&z)[TileTerms<Shape>::kCount]) {
      int32_t entry[TileTerms<Shape>::kCount];
#pragma unroll
      for (int i = 0; i < TileTerms<Shape>::kCount; ++i) {
        const int32_t place = tile * Shape::kVocab + lane + kWarpSize * i;
        entry[i] = place < count ? entries[place] : -1;
        z[i] = place < count ? z[i] + (p.bias != nullptr ? p.bias[entry[i]] : 0.0f) : negative_infinity();
      }
      RowState state = shared.states[0];
      uint64_t own = lane < top_k ? shared.keys[lane] : 0;
      list_keys(
          own, z,
          [&](int i) {
            int32_t chosen = entry[0];
#pragma unroll
            for (int k = 1; k < TileTerms<Shape>::kCount; ++k) chosen = i == k ? entry[k] : chosen;
            return chosen;
          },
          top_k, lane);
      absorb(state, z, kLog2E / temperature_of(p, rows.row(0)));
      warp_sync();  // all lanes have read the state
      if (lane == 0) shared.states[0] = state;
      if (lane < top_k) shared.keys[lane] = own;
    });
  });
}

// A warp forms a row's statistics from what its spans have left, and writes them if they are settled.
__device__ inline bool settle(const ScreenLaunch& launch, const StoredStates& known, const ScreenPlan& plan,
                              int32_t row, int lane) {
  const ExitParams& p = launch.call.exit;
  const float* parts = ScreenScratch{launch}.tails(row);
  float numbers[kTailNumbers];
#pragma unroll
  for (int i = 0; i < kTailNumbers; ++i) {
    const bool most = i >= kTailSums && i < kTailSums + kTailMax;
    numbers[i] = 0.0f;
    for (int32_t span = lane; span < launch.spans; span += kWarpSize) {
      const float number = parts[span * kTailNumbers + i];
      numbers[i] = most ? fmaxf(numbers[i], number) : numbers[i] + number;
    }
    numbers[i] = most ? warp_max(numbers[i]) : warp_sum(numbers[i]);
  }
  SpanTail all;
  memcpy(&all, numbers, sizeof all);
  uint64_t own;
  const float temperature = temperature_of(p, row);
  const RowState state = known.merged(row, launch.spans, kLog2E / temperature, own, lane);
  const uint64_t second = warp_shuffle(own, 1);
  const float limit = fmaxf(64.0f, float(p.vocab / 8));
  if (state.invalid != 0 || !(state.sum > 0.0f) || !(all.chosen <= limit)) return false;

  BoundedStats stats;
  bool settled = false;
  if (lane == 0) {
    const double spread = double(plan.length) * *launch.call.error_gain / temperature * 1.00001;
    const KnownLogits rechecked = {state.max, logit_of(second), state.sum,
                                   -(double(state.weighted_logit_sum) / temperature)};
    stats = bounded_stats(rechecked, tail_of(all.tail), plan.reference, temperature, spread);
    const float threshold = p.thresholds != nullptr ? p.thresholds[row] : p.threshold;
    settled = is_settled(stats, p.measure, threshold, launch.call.tolerance);
    if (settled) {
      p.max_prob[row] = float(stats.max_prob.value);
      p.margin[row] = float(stats.margin.value);
      p.entropy[row] = float(stats.entropy.value);
      p.logsumexp[row] = state.max / temperature - float(log(stats.max_prob.value));
      p.status[row] = 0;
      launch.call.rechecked[row] = int32_t(all.chosen);
    }
  }
  if (warp_ballot(settled) == 0) return false;
  const float log_max_prob = warp_shuffle(lane == 0 ? float(log(stats.max_prob.value)) : 0.0f, 0);
  const int32_t entry = own != 0 ? id_of(own) : 0, token = p.token_map != nullptr ? p.token_map[entry] : entry;
  if (lane == 0) p.token[row] = token;
  if (lane < p.top_k) {
    const int64_t at = int64_t(row) * p.top_k + lane;
    p.top_tokens[at] = own != 0 ? token : -1;
    p.top_logprobs[at] = own != 0 ? (logit_of(own) - state.max) / temperature + log_max_prob : negative_infinity();
  }
  return true;
}

// The rows that fell back, in their order, and their number behind the last place. By a block. Returns the number.
__device__ inline int32_t list_fallen(TeamReducer& reduce, int32_t* fallen, int32_t rows) {
  int32_t count = 0;
  for (int32_t first = 0; first < rows; first += reduce.team.size) {
    const int32_t row = first + reduce.team.rank;
    const bool fell = row < rows && fallen[row] != 0;
    uint64_t before, total;
    reduce.scan(fell ? 1 : 0, before, total);
    if (fell) fallen[count + int32_t(before)] = row;  // not behind what is read: everyone has passed the scan
    count += int32_t(total);
  }
  if (reduce.team.rank == 0) fallen[rows] = count;
  return count;
}

template <class Shape>
__global__ void __launch_bounds__(Shape::kThreads, 2) recheck_kernel(ScreenLaunch launch) {
  const ExitParams& p = launch.call.exit;
  const int lane = int(threadIdx.x) % kWarpSize;
  const int32_t row = int32_t(blockIdx.x) / launch.spans, span = int32_t(blockIdx.x) % launch.spans;
  const int32_t top_k = top_k_of(p);
  const ScreenScratch scratch = {launch};
  const ScreenPlan plan = scratch.plans()[row];
  SPECDEC_SHARED(int32_t, entries, [kMaxChosen]);
  SPECDEC_SHARED(int32_t, own_row, );
  if (threadIdx.x == 0) own_row = row;
  block_sync();
  const ExitShared<Shape> shared(top_k);
  TeamReducer reduce({int32_t(threadIdx.x), Shape::kThreads}, shared.slots);
  for (int n = int(threadIdx.x); n < Shape::kRows; n += Shape::kThreads) shared.states[n] = empty_state();
  for (int i = int(threadIdx.x); i < Shape::kRows * top_k; i += Shape::kThreads) shared.keys[i] = 0;
  SpanTail left = {};
  int32_t count = 0;
  if (plan.sound != 0) count = look_at_span(reduce, launch, plan, row, span, entries, left.tail);
  left.chosen = count <= kMaxChosen ? float(count) : 1e9f;
  if (count > 0 && count <= kMaxChosen) {
    const HiddenRows rows = {p, &own_row, 1, launch.hidden_aligned, launch.norm_aligned};
    recheck<Shape>(launch, shared, rows, entries, count);
    block_sync();
  }
  const StoredStates known(launch.scratch + launch.known, launch.scratch + launch.known_keys, launch.spans, top_k);
  if (int(threadIdx.x) < kWarpSize) {
    known.leave(row, span, shared.states[0], lane < top_k ? shared.keys[lane] : 0, lane);
    if (lane == 0) memcpy(scratch.tails(row) + int64_t(span) * kTailNumbers, &left, sizeof left);
  }
  int32_t* counters = launch.counters + launch.first_counter;
  if (!arrives_last(reduce.team, counters + row, launch.spans)) return;
  if (int(threadIdx.x) < kWarpSize) {
    const bool settled = plan.sound != 0 && settle(launch, known, plan, row, lane);
    if (lane == 0) scratch.fallen()[row] = settled ? 0 : 1;
  }
  if (!arrives_last(reduce.team, counters + p.rows, p.rows)) return;
  const int32_t fallen = list_fallen(reduce, scratch.fallen(), p.rows);
  if (fallen == 0 && p.measure != ExitMeasure::kNone) decide(reduce, p);
}

template <class Shape, class Full>
cudaError_t launch_screen(const ScreenLaunch& arguments, int device, cudaStream_t stream) {
  constexpr size_t kPlans = Shape::kRows * (sizeof(ScreenPlan) + sizeof(float) * (1 + kSteps));
  static_assert(ExitShared<Shape>::bytes(kMaxTopK) + kPlans <= kExitSharedBytes, "every device can run it");
  ScreenLaunch launch = arguments;
  const ExitParams& p = launch.call.exit;
  launch.row_blocks = (p.rows + Shape::kRows - 1) / Shape::kRows;
  const int64_t blocks = int64_t(launch.row_blocks) * launch.blocks;
  if (blocks > 0x7fffffff) return cudaErrorInvalidConfiguration;
  return cuda::launch(screen_kernel<Shape, Full>, dim3(unsigned(blocks)), dim3(Shape::kThreads),
                      ExitShared<Shape>::bytes(top_k_of(p)), device, stream, launch);
}

// The first two launches for a head of a type. Instantiated in early_exit/cuda/instantiations.
template <class Full>
cudaError_t screen_of(const ScreenLaunch& launch, int device, cudaStream_t stream) {
  constexpr int kParts = std::is_same_v<Full, float> ? 2 : 1, kMany = kParts == 1 ? 32 : 16;
  const ExitParams& p = launch.call.exit;
  const cudaError_t error =
      p.rows <= 8 ? launch_screen<HeadShape<int8_t, Float16, 8, kParts>, Full>(launch, device, stream)
                  : launch_screen<HeadShape<int8_t, Float16, kMany, kParts>, Full>(launch, device, stream);
  if (error != cudaSuccess) return error;
  using Shape = HeadShape<Full, Full, 8, 1>;
  const int64_t blocks = int64_t(p.rows) * launch.spans;
  if (blocks > 0x7fffffff) return cudaErrorInvalidConfiguration;
  return cuda::launch(recheck_kernel<Shape>, dim3(unsigned(blocks)), dim3(Shape::kThreads),
                      ExitShared<Shape>::bytes(top_k_of(p)), device, stream, launch);
}

}  // namespace specdec::cuda
