// Between two parts of a head (bounded_exit.cuh): which rows need the next one. The last block to arrive finds out, a
// thread for a row, from what the row's states say and from a ceiling of its unread logits.
#pragma once

#include "early_exit/bound_verdict.h"
#include "early_exit/cuda/exit_state.cuh"

namespace specdec::cuda {

// The greatest bias behind a part: of these, or 0 if there are none; NaN if there is a NaN. By a block.
__device__ inline float greatest_of(TeamReducer& reduce, const float* numbers, int32_t count) {
  const auto greater = [](float a, float b) { return a != a || a > b ? a : b; };
  float greatest = negative_infinity();
  for (int32_t i = reduce.team.rank; i < count; i += reduce.team.size) greatest = greater(numbers[i], greatest);
  return reduce(greatest, greater);
}

// What is certain of a row that has left its state in the first slot.
__device__ inline ExitVerdict verdict_of(const ExitLaunch& launch, const StoredStates& stored, int32_t row,
                                         float bias) {
  const ExitParams& p = launch.call;
  const float *of = stored.of_row(row), temperature = temperature_of(p, row);
  const uint64_t* keys = stored.keys_of(row);
  const int32_t slots = stored.slots, last = p.top_k > 0 ? p.top_k - 1 : 0;
  const SeenPart seen = {of[slots],
                         -double(of[2 * slots]) / temperature,
                         of[0],
                         logit_of(keys[slots]),
                         logit_of(keys[int64_t(last) * slots]),
                         of[3 * slots] != 0.0f || setting_status(p, row) != 0};
  const RowReach reach = {launch.part.reach[2 * int64_t(row)], launch.part.reach[2 * int64_t(row) + 1]};
  const float limit = p.thresholds != nullptr ? p.thresholds[row] : p.threshold;
  return exit_verdict(seen, ceiling_of(reach, *launch.part.norm_after, bias), launch.part.left, temperature, p.measure,
                      limit);
}

// Lists those of the launch's `count` rows that go on, in their order. By a block. Returns how many.
__device__ inline int32_t list_open_rows(TeamReducer& reduce, const ExitLaunch& launch, const StoredStates& stored,
                                         int32_t count) {
  const ExitParams& p = launch.call;
  const float bias =
      launch.part.biases == nullptr ? 0.0f : greatest_of(reduce, launch.part.biases, launch.part.bias_count);
  int32_t open = 0;
  VerdictCounts counts = {};
  for (int32_t first = 0; first < count; first += reduce.team.size) {
    const int32_t place = first + reduce.team.rank;
    const bool exists = place < count;
    int32_t row = place;
    ExitVerdict verdict = {};
    if (exists) {
      if (launch.row_list != nullptr) row = launch.row_list[place];
      verdict = verdict_of(launch, stored, row, bias);
    }
    const bool goes_on = exists && (p.level != ExitLevel::kRow || !row_settled(verdict));
    // Four sums at once: a team has fewer than 2^16 threads.
    uint64_t before, total;
    reduce.scan(
        uint64_t(goes_on) | uint64_t(verdict.no) << 16 | uint64_t(verdict.yes) << 32 | uint64_t(verdict.known) << 48,
        before, total);
    if (goes_on) launch.part.open[open + int32_t(before & 0xffff)] = row;
    open += int32_t(total & 0xffff);
    counts.no += int32_t(total >> 16 & 0xffff);
    counts.yes += int32_t(total >> 32 & 0xffff);
    counts.known += int32_t(total >> 48);
  }
  if (p.level != ExitLevel::kRow && level_settled(counts, p.level, p.rows)) open = 0;
  if (reduce.team.rank == 0) launch.part.open[p.rows] = open;
  return open;
}

}  // namespace specdec::cuda
