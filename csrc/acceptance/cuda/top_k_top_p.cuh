// Where top-k and top-p cut a row: the last token that is kept, in the order of descending logits and ascending ids.
//
// Both are one selection: the shortest leading part of that order whose measure reaches a goal. For top-k a token
// measures 1 and the goal is k; for top-p it measures its weight and the goal is that part of the sum. Weights are
// added up as integers, 2^40 for the weight of the greatest logit: sums of integers have no order, so shared memory
// atomics give the same sums in every run, and less than 2^-22 of the whole is lost in a row of 2^18 tokens.
//
// The first histogram has 24 bins for every halving of the weight below the greatest logit, in which the logits of a
// language model spread widely: the bits of a float would put most of a row into a few bins, and the atomics in line.
// The tokens of the bin where the goal is reached are then collected. If there are more than fit (many equal logits,
// say), histograms over ten bits at a time of the rank (the logit's bits and then the id) make them fewer first. A
// usual row is read twice.
#pragma once

#include "acceptance/cuda/row.cuh"
#include "acceptance/cuda/token_distribution.cuh"
#include "common/cuda/block_team.cuh"

namespace specdec::cuda {

constexpr int kCutBins = 1024, kCutBinBits = 10, kCutCandidates = 512;
constexpr int kRankIdBits = 20;  // ids fit: see kAcceptMaxVocab and kSampleMaxVocab
constexpr float kCutBinsPerHalving = 24.0f, kCutMassOfOne = 0x1p40f;

using Measure = unsigned long long;  // as atomics name it

struct CutScratch {
  Measure* bins;         // [kCutBins]
  Measure* measures;     // [kCutCandidates]
  uint64_t* ranks;       // [kCutCandidates]
  uint32_t* candidates;  // [1] how many there are, which may be more than fit
  uint64_t* found;       // [3] a bin or rank, and two measures

  __device__ explicit CutScratch(SharedMemory& memory) {
    bins = memory.take<Measure>(kCutBins);
    measures = memory.take<Measure>(kCutCandidates);
    ranks = memory.take<uint64_t>(kCutCandidates);
    candidates = memory.take<uint32_t>(1);
    found = memory.take<uint64_t>(3);
  }
  static size_t bytes() {
    return SharedMemory::bytes<Measure>(kCutBins) + SharedMemory::bytes<Measure>(kCutCandidates) +
           SharedMemory::bytes<uint64_t>(kCutCandidates) + SharedMemory::bytes<uint32_t>(1) +
           SharedMemory::bytes<uint64_t>(3);
  }
};

// Lower ranks come first.
__device__ __forceinline__ uint64_t rank_of(float logit, int32_t id) {
  return uint64_t(~ordered(logit)) << kRankIdBits | uint32_t(id);
}

struct Selection {
  Row row;
  const TokenDistribution* distribution;  // its cut holds already: what it drops measures nothing
  bool by_mass;

  __device__ __forceinline__ Measure measure(float logit, int32_t id) const {
    if (logit == negative_infinity() || !keeps(*distribution, logit, id)) return 0;
    return by_mass ? Measure(weight_of(*distribution, logit) * kCutMassOfOne) : Measure(1);
  }
  __device__ __forceinline__ int first_bin(float logit) const {
    return int(fminf((distribution->max - logit) * distribution->scale * kCutBinsPerHalving, float(kCutBins - 1)));
  }
};

// The tokens that are still in question: those of a first bin, whose rank starts with a prefix.
struct Narrowed {
  int first_bin;    // -1: every token
  int shift;        // of the prefix
  uint64_t prefix;  // 0 with shift 63: none yet
  uint64_t before;  // the measure of everything that comes before them
};

__device__ inline bool in_question(const Selection& selection, const Narrowed& narrowed, float logit, int32_t id) {
  if (narrowed.first_bin < 0) return true;
  return selection.first_bin(logit) == narrowed.first_bin && rank_of(logit, id) >> narrowed.shift == narrowed.prefix;
}

// Fills the bins with what is in question: by the first bins, or else by the ten bits of the rank from `digit` on.
__device__ inline void fill_bins(const BlockTeam& team, const CutScratch& scratch, const Selection& selection,
                                 const Narrowed& narrowed, int digit) {
  for (int bin = team.rank; bin < kCutBins; bin += team.size) scratch.bins[bin] = 0;
  team.sync();
  Measure last = 0;  // of the last bin, which may hold most of a row
  for_each_chunk(team, selection.row, whole(selection.row), [&](int32_t first, const float (&logit)[kChunk]) {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      const Measure measure = selection.measure(logit[i], first + i);
      if (measure == 0 || !in_question(selection, narrowed, logit[i], first + i)) continue;
      const int bin = narrowed.first_bin < 0 ? selection.first_bin(logit[i])
                                             : int(rank_of(logit[i], first + i) >> digit) & (kCutBins - 1);
      if (bin == kCutBins - 1) {
        last += measure;
      } else {
        atomic_add(&scratch.bins[bin], measure);
      }
    }
  });
  if (last != 0) atomic_add(&scratch.bins[kCutBins - 1], last);
  team.sync();
}

// The bin where `before` and the bins up to it reach the goal. Adds the bins that come before it to `before`. -1: none.
__device__ inline int bin_of_goal(TeamReducer& reduce, const CutScratch& scratch, uint64_t goal, uint64_t& before) {
  const int own = (kCutBins + reduce.team.size - 1) / reduce.team.size;
  const int start = own * reduce.team.rank, end = min(start + own, kCutBins);
  uint64_t sum = 0, earlier, total;
  for (int bin = start; bin < end; ++bin) sum += scratch.bins[bin];
  reduce.scan(sum, earlier, total);
  if (before + total < goal) return -1;
  earlier += before;
  if (earlier < goal && earlier + sum >= goal) {
    int bin = start;
    while (earlier + scratch.bins[bin] < goal) earlier += scratch.bins[bin++];
    scratch.found[0] = uint64_t(bin);
    scratch.found[1] = earlier;
  }
  reduce.team.sync();
  before = scratch.found[1];
  return int(scratch.found[0]);
}

__device__ inline uint64_t sum_of_bins(TeamReducer& reduce, const CutScratch& scratch) {
  uint64_t sum = 0, before, total;
  for (int bin = reduce.team.rank; bin < kCutBins; bin += reduce.team.size) sum += scratch.bins[bin];
  reduce.scan(sum, before, total);
  return total;
}

// Whether all tokens in question fit.
__device__ inline bool collect(const BlockTeam& team, const CutScratch& scratch, const Selection& selection,
                               const Narrowed& narrowed) {
  if (team.rank == 0) *scratch.candidates = 0;
  team.sync();
  for_each_chunk(team, selection.row, whole(selection.row), [&](int32_t first, const float (&logit)[kChunk]) {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      const Measure measure = selection.measure(logit[i], first + i);
      if (measure == 0 || !in_question(selection, narrowed, logit[i], first + i)) continue;
      const uint32_t place = atomic_add(scratch.candidates, 1u);
      if (place >= uint32_t(kCutCandidates)) continue;
      scratch.ranks[place] = rank_of(logit[i], first + i);
      scratch.measures[place] = measure;
    }
  });
  team.sync();
  return *scratch.candidates <= uint32_t(kCutCandidates);
}

// The candidate at which the goal is reached: found[0] is its rank, found[2] the measure up to it. Candidates lie in
// the order of their arrival, so each is compared with all.
__device__ inline void candidate_of_goal(const BlockTeam& team, const CutScratch& scratch, uint64_t before,
                                         uint64_t goal) {
  const int count = int(*scratch.candidates);
  for (int i = team.rank; i < count; i += team.size) {
    const uint64_t rank = scratch.ranks[i];
    uint64_t up_to_here = before;
    for (int other = 0; other < count; ++other) {
      if (scratch.ranks[other] <= rank) up_to_here += scratch.measures[other];
    }
    if (up_to_here >= goal && up_to_here - scratch.measures[i] < goal) {
      scratch.found[0] = rank;
      scratch.found[2] = up_to_here;
    }
  }
  team.sync();
}

__device__ inline uint64_t part_of(float top_p, uint64_t total) {
  const double part = ceil(double(top_p) * double(total));
  return part < 1 ? uint64_t(1) : uint64_t(part);
}

// Cuts the row where the k greatest, or that part of the mass, are reached. Returns the measure of what is kept.
__device__ inline uint64_t cut_row(TeamReducer& reduce, const CutScratch& scratch, const Row& row, bool by_mass,
                                   int32_t top_k, float top_p, TokenDistribution& distribution) {
  const BlockTeam& team = reduce.team;
  const Selection selection{row, &distribution, by_mass};
  Narrowed narrowed{-1, 63, 0, 0};
  uint64_t goal = 0;
  int digit = 32 + kRankIdBits;
  do {
    fill_bins(team, scratch, selection, narrowed, digit);
    if (narrowed.first_bin < 0) {
      const uint64_t total = sum_of_bins(reduce, scratch);
      goal = by_mass ? part_of(top_p, total) : uint64_t(top_k);
      narrowed.first_bin = bin_of_goal(reduce, scratch, goal, narrowed.before);
      if (narrowed.first_bin < 0) return total;
    } else {
      narrowed.prefix = narrowed.prefix << kCutBinBits | uint32_t(bin_of_goal(reduce, scratch, goal, narrowed.before));
      narrowed.shift = digit;
    }
    digit -= kCutBinBits;
  } while (!collect(team, scratch, selection, narrowed));
  candidate_of_goal(team, scratch, narrowed.before, goal);
  const uint64_t rank = scratch.found[0], kept = scratch.found[2];
  distribution.cut = from_ordered(~uint32_t(rank >> kRankIdBits));
  distribution.cut_id = int32_t(rank & ((1u << kRankIdBits) - 1));
  team.sync();  // everyone has read `found`
  return kept;
}

struct Sampling {
  float temperature;
  int32_t top_k;
  float top_p;
};

__device__ inline Sampling sampling_of(const SamplingParams& p, int32_t request) {
  return {temperature_of(p, request), value_of(p.top_k, request), value_of(p.top_p, request)};
}

__device__ __forceinline__ bool cuts(const Sampling& sampling, int32_t vocab) {
  return sampling.temperature > 0 && ((sampling.top_k > 0 && sampling.top_k < vocab) || sampling.top_p < 1.0f);
}

// What one team has to do to a merged part of a row: top-k, then top-p, and the entropy if it is wanted.
__device__ inline TokenDistribution finished_distribution(TeamReducer& reduce, const CutScratch& scratch,
                                                          const Row& row, const DistributionPart& part,
                                                          const Sampling& sampling, bool with_entropy) {
  TokenDistribution distribution = distribution_of(part, sampling.temperature);
  if (distribution.one_hot) return distribution;
  const bool by_count = sampling.top_k > 0 && sampling.top_k < row.vocab, by_mass = sampling.top_p < 1.0f;
#pragma unroll 1
  for (int filter = by_count ? 0 : 1; filter < (by_mass ? 2 : 1); ++filter) {
    const uint64_t kept = cut_row(reduce, scratch, row, filter == 1, sampling.top_k, sampling.top_p, distribution);
    if (filter == 1) distribution.inverse_sum = kCutMassOfOne / float(kept);
  }
  if (with_entropy || (by_count && !by_mass)) add_up(reduce, row, distribution);
  return distribution;
}

}  // namespace specdec::cuda
