// What a hidden row knows of the logits it has seen, how that grows by a tile, and how parts of the vocabulary are
// merged. A warp does each of it for one row at a time.
//
// The greatest logits are keys of value and entry that are greater for the greater value and, among equal values, for
// the lower entry; lane i holds the i-th of them, 0 for none. Only a logit that beats the last of them goes in, which
// after the first tiles is rare.
#pragma once

#include "common/constants.h"
#include "common/cuda/block_team.cuh"
#include "early_exit/cuda/exit_launch.h"

namespace specdec::cuda {

constexpr float kLowestFall = -1e30f;  // 2 to the power of which is 0: -inf would make NaN of 0 * -inf

struct RowState {
  float max;
  float sum;                 // of exp((z - max) / T)
  float weighted_logit_sum;  // of the same times (z - max)
  uint32_t invalid;
};

__device__ __forceinline__ RowState empty_state() { return {negative_infinity(), 0.0f, 0.0f, 0}; }

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int bit = 1; bit < kWarpSize; bit *= 2) value += warp_shuffle_xor(value, bit);
  return value;
}
__device__ __forceinline__ float warp_max(float value) {
#pragma unroll
  for (int bit = 1; bit < kWarpSize; bit *= 2) value = fmaxf(value, warp_shuffle_xor(value, bit));
  return value;
}

__host__ __device__ __forceinline__ int32_t top_k_of(const ExitParams& p) { return p.top_k > 2 ? p.top_k : 2; }

// A logit as a key; 0 for NaN and -inf, which are never listed.
__device__ __forceinline__ uint64_t logit_key(float z, int32_t entry) {
  return z > negative_infinity() ? key_of(ordered(z), entry) : 0;
}
__device__ __forceinline__ float logit_of(uint64_t key) {
  return key == 0 ? negative_infinity() : from_ordered(uint32_t(key >> 32));
}

// The key of the same logit, whose entry is counted from `by` entries before.
__device__ __forceinline__ uint64_t key_further_on(uint64_t key, int32_t by) { return key != 0 ? key - by : 0; }

// Puts what the lanes offer (0 for nothing) among the `top_k` greatest keys. Whether any got in.
__device__ inline bool insert_keys(uint64_t& own, uint64_t offered, int32_t top_k, int lane) {
  uint64_t worst = warp_shuffle(own, top_k - 1);
  uint32_t waiting = warp_ballot(offered > worst);
  const bool any = waiting != 0;
  while (waiting != 0) {
    const uint64_t key = warp_shuffle(offered, lowest_bit(waiting));
    const int place = popcount(warp_ballot(lane < top_k && own > key));
    const uint64_t above = warp_shuffle(own, lane - 1);  // of any lane where there is none: not used
    if (lane < top_k && lane >= place) own = lane == place ? key : above;
    worst = warp_shuffle(own, top_k - 1);
    waiting &= waiting - 1;
    waiting &= warp_ballot(offered > worst);
  }
  return any;
}

// Offers a lane's numbers: z[i] of entry(i).
template <int kCount, class Entry>
__device__ __forceinline__ void list_keys(uint64_t& own, const float (&z)[kCount], Entry entry, int32_t top_k,
                                          int lane) {
  float peak = negative_infinity();
#pragma unroll
  for (int i = 0; i < kCount; ++i) peak = fmaxf(peak, z[i]);
  if (!(warp_max(peak) > logit_of(warp_shuffle(own, top_k - 1)))) return;
#pragma unroll 1
  for (int i = 0; i < kCount; ++i) {
    float offered = z[0];
#pragma unroll
    for (int k = 1; k < kCount; ++k) offered = i == k ? z[k] : offered;
    insert_keys(own, logit_key(offered, entry(i)), top_k, lane);
  }
}

// Takes a lane's logits into the sums of its warp's row.
template <int kCount>
__device__ __forceinline__ void absorb(RowState& state, const float (&z)[kCount], float scale) {
  float peak = negative_infinity();
  bool finite = true;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    finite = finite && z[i] < -negative_infinity();
    peak = fmaxf(peak, z[i]);
  }
  if (warp_ballot(!finite) != 0) state.invalid = 1;
  peak = warp_max(peak);
  if (!(peak > negative_infinity())) return;
  if (peak > state.max) {
    if (state.sum > 0.0f) {
      const float fall = fmaxf(state.max - peak, kLowestFall), decay = fast_exp2(fall * scale);
      state.weighted_logit_sum = (state.weighted_logit_sum + state.sum * fall) * decay;
      state.sum *= decay;
    }
    state.max = peak;
  }
  float sum = 0.0f, weighted_logit_sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const float fall = fmaxf(z[i] - state.max, kLowestFall), weight = fast_exp2(fall * scale);
    sum += weight;
    weighted_logit_sum += weight * fall;
  }
  state.sum += warp_sum(sum);
  state.weighted_logit_sum += warp_sum(weighted_logit_sum);
}

// States of all rows in scratch: of each row [max, sum, weighted_logit_sum, invalid][slots], and its keys [top_k][slots].
struct StoredStates {
  float* numbers;
  uint64_t* keys;
  int32_t slots, top_k;

  __device__ StoredStates(uint8_t* numbers, uint8_t* keys, int32_t slots, int32_t top_k)
      : numbers(reinterpret_cast<float*>(numbers)),
        keys(reinterpret_cast<uint64_t*>(keys)),
        slots(slots),
        top_k(top_k) {}

  __device__ __forceinline__ float* of_row(int32_t row) const { return numbers + int64_t(row) * 4 * slots; }
  __device__ __forceinline__ uint64_t* keys_of(int32_t row) const { return keys + int64_t(row) * top_k * slots; }

  // A warp leaves its row.
  __device__ __forceinline__ void leave(int32_t row, int32_t slot, const RowState& state, uint64_t own,
                                        int lane) const {
    const float number = lane == 0 ? state.max : lane == 1 ? state.sum : lane == 2 ? state.weighted_logit_sum : 0.0f;
    if (lane < 4) of_row(row)[lane * slots + slot] = lane == 3 ? float(state.invalid) : number;
    if (lane < top_k) keys_of(row)[int64_t(lane) * slots + slot] = own;
  }

  // A warp merges what is in the first `count` slots, in their order.
  __device__ inline RowState merged(int32_t row, int32_t count, float scale, uint64_t& own, int lane) const {
    const float* of = of_row(row);
    RowState state = empty_state();
    float invalid = 0.0f;
    for (int32_t slot = lane; slot < count; slot += kWarpSize) {
      state.max = fmaxf(state.max, of[slot]);
      invalid = fmaxf(invalid, of[3 * slots + slot]);
    }
    state.max = warp_max(state.max);
    state.invalid = warp_max(invalid) > 0.0f ? 1 : 0;
    for (int32_t slot = lane; slot < count; slot += kWarpSize) {
      const float sum = of[slots + slot];
      if (!(sum > 0.0f)) continue;
      const float fall = fmaxf(of[slot] - state.max, kLowestFall), decay = fast_exp2(fall * scale);
      state.sum += sum * decay;
      state.weighted_logit_sum += (of[2 * slots + slot] + sum * fall) * decay;
    }
    state.sum = warp_sum(state.sum);
    state.weighted_logit_sum = warp_sum(state.weighted_logit_sum);
    own = 0;
    // The second keys of the slots can't get in where none of the first did. Those of a rank are loaded before the
    // first is inserted: a warp waits for memory once for every kAtOnce * 32 slots.
    constexpr int kAtOnce = 9;  // of a Hopper GPU, which has two slots for each of 132 multiprocessors
    bool any = true;
#pragma unroll 1
    for (int32_t rank = 0; rank < top_k && any; ++rank) {
      any = false;
      const uint64_t* at = keys_of(row) + int64_t(rank) * slots;
#pragma unroll 1
      for (int32_t first = lane; first - lane < count; first += kAtOnce * kWarpSize) {
        uint64_t offered[kAtOnce];
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          const int32_t slot = first + i * kWarpSize;
          offered[i] = slot < count ? at[slot] : 0;
        }
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          if (first - lane + i * kWarpSize < count) any = insert_keys(own, offered[i], top_k, lane) || any;
        }
      }
    }
    return state;
  }
};

// A warp writes what its row has seen of the whole vocabulary.
__device__ inline void write_stats(const ExitParams& p, int32_t row, const RowState& state, uint64_t own,
                                   int32_t status, int lane) {
  const uint64_t second = warp_shuffle(own, 1);
  const bool sound = state.invalid == 0 && state.sum > 0.0f;
  const int32_t bits = setting_status(p, row) | (sound ? 0 : kExitInvalid);
  const bool valid = bits == 0;
  const float inverse_temperature = 1.0f / temperature_of(p, row), sum = valid ? state.sum : 1.0f,
              weighted_logit_sum = logf(sum);
  const float z = logit_of(own);
  const int32_t entry = own != 0 ? id_of(own) : 0;
  const int32_t token = p.token_map != nullptr ? p.token_map[entry] : entry;
  if (lane == 0) {
    const float first = expf((z - state.max) * inverse_temperature) / sum;
    const float next = second != 0 ? expf((logit_of(second) - state.max) * inverse_temperature) / sum : 0.0f;
    p.token[row] = token;
    p.status[row] = status | bits;
    p.max_prob[row] = valid ? first : 0.0f;
    p.margin[row] = valid ? first - next : 0.0f;
    p.entropy[row] =
        valid ? fmaxf(weighted_logit_sum - state.weighted_logit_sum * inverse_temperature / sum, 0.0f) : 0.0f;
    p.logsumexp[row] = valid ? state.max * inverse_temperature + weighted_logit_sum : negative_infinity();
  }
  if (lane < p.top_k) {
    const int64_t at = int64_t(row) * p.top_k + lane;
    const bool exists = valid && own != 0;
    p.top_tokens[at] = exists ? token : -1;
    p.top_logprobs[at] = exists ? (z - state.max) * inverse_temperature - weighted_logit_sum : negative_infinity();
  }
}

__device__ __forceinline__ bool passes(const ExitParams& p, int32_t row) {
  if ((p.status[row] & (kExitInvalid | kExitSettingInvalid)) != 0) return false;
  const float limit = p.thresholds != nullptr ? p.thresholds[row] : p.threshold;
  if (p.measure == ExitMeasure::kMaxProb) return p.max_prob[row] >= limit;
  return p.measure == ExitMeasure::kMargin ? p.margin[row] >= limit : p.entropy[row] <= limit;
}

// A block decides from the statistics of all rows, and lists those that go on in their order.
__device__ inline void decide(TeamReducer& reduce, const ExitParams& p) {
  bool together = p.level == ExitLevel::kAll;
  if (p.level != ExitLevel::kRow) {
    bool any = false, all = true;
    for (int32_t row = reduce.team.rank; row < p.rows; row += reduce.team.size) {
      const bool passed = passes(p, row);
      any = any || passed;
      all = all && passed;
    }
    together = p.level == ExitLevel::kAny ? reduce.any(any) : !reduce.any(!all);
  }
  int32_t active = 0;
  for (int32_t first = 0; first < p.rows; first += reduce.team.size) {
    const int32_t row = first + reduce.team.rank;
    const bool exists = row < p.rows;
    const bool exits = exists && (p.level == ExitLevel::kRow ? passes(p, row) : together);
    uint64_t before, total;
    reduce.scan(exists && !exits ? 1 : 0, before, total);
    if (exists) {
      p.exited[row] = exits;
      p.inverse[row] = exits ? -1 : active + int32_t(before);
      if (!exits) p.active_rows[active + int32_t(before)] = row;
    }
    active += int32_t(total);
  }
  for (int32_t place = active + reduce.team.rank; place < p.rows; place += reduce.team.size) p.active_rows[place] = -1;
  if (reduce.team.rank == 0) *p.num_active = active;
}

}  // namespace specdec::cuda
