// Passes over whole rows: chunks on a pool of threads, results merged in the order of the chunks.
#include "acceptance/cpu/row_reader.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "common/cpu/isa.h"

namespace specdec::cpu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

int64_t chunks_of(int64_t size) { return (size + kChunk - 1) / kChunk; }

// No uniform is below 2^-33. So a token whose weight is no normal number, and which float32 holds badly or not at all,
// has a score below this one, and scores above it are right and complete.
constexpr float kLeastScore = 0x1p-92f;

// A bound just below a score: w / v is at least the score, but both are rounded.
float just_below(float score) { return score * (1.0f - 0x1p-20f); }

float score_of(float weight, float uniform, bool noisy) { return noisy ? weight / draw_exponential(uniform) : weight; }

// The winner of a draw.
struct Winner : DrawSink {
  float score = 0.0f;
  int32_t token = -1;
  bool noisy;

  explicit Winner(bool noisy) : noisy(noisy) {
    bound = 0.0f;
    offer = [](DrawSink* sink, float weight, float uniform, int32_t token) {
      Winner& self = *static_cast<Winner*>(sink);
      self.take(score_of(weight, uniform, self.noisy), token);
    };
  }
  void take(float other, int32_t other_token) {
    if (!(other > score || (other == score && other_token < token))) return;
    score = other;
    token = other_token;
    bound = just_below(score);
  }
};

// The best `count`, as a heap whose first is the worst of them.
struct Best : DrawSink {
  struct Entry {
    float score;
    int32_t token;
    bool operator<(const Entry& other) const {  // the better one
      return score > other.score || (score == other.score && token < other.token);
    }
  };
  std::vector<Entry> entries;
  size_t count;
  float least;
  bool noisy, values;

  // `values`: of logits, which may be negative; else of scores above 0 and from `least` on.
  Best(size_t count, bool noisy, bool values, float least = 0.0f)
      : count(count), least(least), noisy(noisy), values(values) {
    bound = values ? -kInfinity : just_below(least);
    offer = [](DrawSink* sink, float weight, float uniform, int32_t token) {
      Best& self = *static_cast<Best*>(sink);
      self.take({score_of(weight, uniform, self.noisy), token});
    };
  }
  void take(const Entry& entry) {
    if (!values && !(entry.score > 0 && entry.score >= least)) return;
    if (entries.size() == count) {
      if (!(entry < entries.front())) return;
      std::pop_heap(entries.begin(), entries.end());
      entries.pop_back();
    }
    entries.push_back(entry);
    std::push_heap(entries.begin(), entries.end());
    if (entries.size() == count) bound = values ? entries.front().score : just_below(entries.front().score);
  }
};

bool keeps(const TokenDistribution& distribution, float value, int64_t id) {
  return value > distribution.cut || (value == distribution.cut && id <= distribution.cut_id);
}

// The greatest value of a row among what is kept and not excluded.
struct GreatestLeft : DrawSink {
  const TokenDistribution* distribution;
  const uint64_t* excluded;

  GreatestLeft(const TokenDistribution& distribution, const uint64_t* excluded)
      : distribution(&distribution), excluded(excluded) {
    bound = -kInfinity;
    offer = [](DrawSink* sink, float value, float, int32_t token) {
      GreatestLeft& self = *static_cast<GreatestLeft*>(sink);
      self.meet(value, token, token);
    };
  }
  void meet(float value, int32_t id, int64_t token) {
    if (value > bound && keeps(*distribution, value, id) && !(excluded[token / 64] >> (token % 64) & 1)) bound = value;
  }
};

int write_best(std::vector<Best>& parts, int count, int32_t* out) {
  std::vector<Best::Entry> all;
  for (const Best& part : parts) all.insert(all.end(), part.entries.begin(), part.entries.end());
  std::sort(all.begin(), all.end());
  const int found = int(std::min(all.size(), size_t(count)));
  for (int i = 0; i < count; i++) out[i] = i < found ? all[i].token : -1;
  return found;
}

}  // namespace

const RowKernels& row_kernels() {
#ifdef SPECDEC_X86
  if (current_isa() >= Isa::kAvx512) return avx512::kRowKernels;
  if (current_isa() >= Isa::kAvx2) return avx2::kRowKernels;
#endif
  return generic::kRowKernels;
}

RowSettings settings_of(const SamplingParams& params, int32_t request) {
  return {temperature_of(params, request), value_of(params.top_k, request), value_of(params.top_p, request)};
}

const void* row_at(const void* base, DType dtype, int64_t element) {
  return static_cast<const char*>(base) + element * element_bytes(dtype);
}

float logit_at(const void* row, DType dtype, int64_t place) {
  float value;
  if (dtype == DType::kFloat32) {
    std::memcpy(&value, static_cast<const char*>(row) + place * 4, 4);
    return value;
  }
  uint16_t half;
  std::memcpy(&half, static_cast<const char*>(row) + place * 2, 2);
  if (dtype == DType::kBFloat16) {
    const uint32_t bits = uint32_t(half) << 16;
    std::memcpy(&value, &bits, 4);
    return value;
  }
  const uint32_t magnitude = half & 0x7fff;
  const uint32_t bits =
      (magnitude << 13) + (magnitude >= 0x7c00 ? 0x70000000u : 0x38000000u);  // inf and NaN keep theirs
  std::memcpy(&value, &bits, 4);
  if (magnitude < 0x0400) value = float(magnitude) * 0x1p-24f;  // subnormal
  return half & 0x8000 ? -value : value;
}

Pass RowReader::weigh(WeightPass& pass, int64_t vocab, bool draw) {
  const int64_t chunks = chunks_of(vocab);
  sums_.resize(chunks);
  pass.noisy = true;
  std::vector<Winner> winners(draw ? pool_.threads() : 0, Winner(true));
  const auto run = [&] {
    pool_.run(chunks, [&](int64_t chunk, int worker) {
      DrawSink* sink = draw ? &winners[worker] : nullptr;
      sums_[chunk] = kernels_.weigh(pass, chunk * kChunk, std::min((chunk + 1) * kChunk, vocab), sink);
    });
  };
  run();
  double sum = 0;
  for (const float part : sums_) sum += part;
  Pass result{float(sum), -1};
  if (!draw || !(sum > 0)) return result;
  for (const bool noisy : {true, false}) {
    if (!noisy) {  // every score is 0, which takes a single token and a uniform that rounded to 1
      pass.noisy = false;
      std::fill(winners.begin(), winners.end(), Winner(false));
      run();
    }
    Winner winner(noisy);
    for (const Winner& other : winners)
      if (other.token >= 0) winner.take(other.score, other.token);
    result.winner = winner.token;
    if (winner.token >= 0) break;
  }
  return result;
}

void RowReader::fold(const WeightPass& pass, int64_t vocab, float* left) {
  pool_.deal(chunks_of(vocab),
             [&](int64_t chunk) { kernels_.fold(pass, chunk * kChunk, std::min((chunk + 1) * kChunk, vocab), left); });
}

// The best `count` with a score of at least that; then -1.
int RowReader::best_of_draw(const WeightPass& pass, int64_t vocab, int count, float least, int32_t* out) {
  std::vector<Best> parts(pool_.threads(), Best(size_t(count), pass.noisy, false, least));
  pool_.run(chunks_of(vocab), [&](int64_t chunk, int worker) {
    kernels_.weigh(pass, chunk * kChunk, std::min((chunk + 1) * kChunk, vocab), &parts[worker]);
  });
  return write_best(parts, count, out);
}

int RowReader::draw_top(WeightPass& pass, int64_t vocab, int count, int32_t* out) {
  const bool alone = pass.terms == 0;
  pass.noisy = true;
  int found = best_of_draw(pass, vocab, count, alone ? kLeastScore : 0.0f, out);
  if (!alone) {
    pass.noisy = false;
    return found ? found : best_of_draw(pass, vocab, count, 0.0f, out);
  }
  if (found == count) return found;
  // The rest of the same draw, with weights relative to the greatest of those left: that is one factor for all scores.
  const int64_t words = (vocab + 63) / 64;
  drawn_.assign(words, 0);
  if (pass.excluded) std::copy_n(pass.excluded, words, drawn_.begin());
  pass.excluded = drawn_.data();
  pass.target.weights = pass.target.scales = nullptr;
  for (int marked = 0; found < count;) {
    for (; marked < found; marked++) drawn_[out[marked] / 64] |= uint64_t(1) << (out[marked] % 64);
    const float max = greatest_left(pass.target, vocab, pass.excluded);
    if (!(max > -kInfinity)) break;
    pass.target.distribution.max = max;
    pass.target.distribution.inverse_sum = 1.0f;
    pass.noisy = true;
    int more = best_of_draw(pass, vocab, count - found, kLeastScore, out + found);
    if (!more) {  // it takes a single token and a uniform that rounded to 1
      pass.noisy = false;
      more = best_of_draw(pass, vocab, 1, 0.0f, out + found);
    }
    found += more;
  }
  std::fill(out + found, out + count, -1);
  return found;
}

float RowReader::greatest_left(const DistributionRow& row, int64_t vocab, const uint64_t* excluded) {
  if (row.distribution.one_hot)
    return excluded[row.distribution.argmax / 64] >> (row.distribution.argmax % 64) & 1 ? -kInfinity : 0.0f;
  std::vector<GreatestLeft> parts(pool_.threads(), GreatestLeft(row.distribution, excluded));
  pool_.run(chunks_of(vocab), [&](int64_t chunk, int worker) {
    const int64_t begin = chunk * kChunk, end = std::min(begin + kChunk, vocab);
    if (!row.map) return kernels_.top({row.row, row.dtype, begin, end}, &parts[worker]);
    for (int64_t token = begin; token < end; token++) {
      const int32_t id = row.map[token];
      if (id >= 0) parts[worker].meet(logit_at(row.row, row.dtype, id), id, token);
    }
  });
  float greatest = -kInfinity;
  for (const GreatestLeft& part : parts) greatest = std::max(greatest, part.bound);
  return greatest;
}

int RowReader::top_logits(const void* row, DType dtype, int64_t size, int count, int32_t* out) {
  std::vector<Best> parts(pool_.threads(), Best(size_t(count), false, true));
  pool_.run(chunks_of(size), [&](int64_t chunk, int worker) {
    kernels_.top({row, dtype, chunk * kChunk, std::min((chunk + 1) * kChunk, size)}, &parts[worker]);
  });
  return write_best(parts, count, out);
}

RhoSums RowReader::rho_sums(const DistributionRow& target, const DistributionRow& draft, float from, float step,
                            int64_t vocab) {
  const int64_t chunks = chunks_of(vocab);
  sums_.resize(chunks * kRhoPoints);
  pool_.run(chunks, [&](int64_t chunk, int) {
    kernels_.rho_sums(target, draft, from, step, chunk * kChunk, std::min((chunk + 1) * kChunk, vocab),
                      &sums_[chunk * kRhoPoints]);
  });
  double total[kRhoPoints] = {};
  for (int64_t i = 0; i < chunks * kRhoPoints; i++) total[i % kRhoPoints] += sums_[i];
  RhoSums sums;
  for (int i = 0; i < kRhoPoints; i++) sums.sum[i] = float(total[i]);
  return sums;
}

}  // namespace specdec::cpu
