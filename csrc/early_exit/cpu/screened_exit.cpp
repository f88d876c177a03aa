// The screened head on the CPU: an int8 copy says which entries matter, and those alone are read in full precision.
//
// First pass: approximate logits of all entries from the copy, half the bytes of the head, kept in memory (4 bytes per
// entry and row). Second pass, per row: entries that may be among the best are rechecked, with the products in the very
// order of exit_confidence, so their logits are its logits bit for bit. The others enter the sum of exponentials as an
// interval. Where that leaves the decision open or max_prob vaguer than the tolerance, the heaviest of them are
// rechecked as well; where an eighth of the head would not do, the row falls back to the whole head.
//
// Why that is sound is derived in early_exit/screen_bounds.h. Here both kernels sum n = dim products in chains of at
// most n / 4 + 24 roundings, plus a handful of scales and the bias (an int8 sum is exact, but turned to float twice),
// which makes errors of at most (n / 4 + 64) 2^-24 |y| |W_v| each, |W_v| <= norms[v] + error_norms[v]; what the bias
// adds is covered by kScreenRounding. Numbers that a dot product of bfloat16 takes for zero are below 2^-126 and cost
// less than 2^-125 (sqrt(n) (|y| + |W_v|) + n). All of it is rounded outward.
//
// So reading ends where no entry that is left can change the decision. Without a copy (bounded_exit.cpp) it seldom ends
// early: all that is known of an unread logit then is |W_v| |y|, far above real logits.
#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>

#include "common/cpu/isa.h"
#include "early_exit/cpu/head_reader.h"
#include "early_exit/cpu/screen_kernels.h"
#include "early_exit/screen_bounds.h"

namespace specdec::cpu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int kLeastLimit = 64;           // entries that may always be rechecked
constexpr int kRecheckTile = 16;          // of which so many are rechecked at a time
constexpr float kCandidates = -1;         // a depth below the best, of what is rechecked: candidates alone
constexpr float kDeepest[] = {6.5f, 12};  // that are looked at: few rows need the second
constexpr float kFinest = 0.25f;          // difference of depths that is made

size_t whole_steps(size_t count) { return (count + kScreenStep - 1) / kScreenStep * kScreenStep; }

const ScreenKernels& screen_kernels() {
#ifdef SPECDEC_X86
  if (current_isa() >= Isa::kAvx512) return avx512::kScreenKernels;
  if (current_isa() >= Isa::kAvx2) return avx2::kScreenKernels;
#endif
  return generic::kScreenKernels;
}

void add(ScreenTail& tail, const ScreenTail& other) {
  tail.upper += other.upper;
  tail.lower += other.lower;
  tail.weight += other.weight;
  tail.squares += other.squares;
  tail.peak = std::max(tail.peak, other.peak);
  tail.error = std::max(tail.error, other.error);
  tail.noise = std::max(tail.noise, other.noise);
  tail.upper_fall += other.upper_fall;
  tail.lower_fall += other.lower_fall;
  tail.fall += other.fall;
  tail.turn_squares += other.turn_squares;
  tail.peak_fall = std::max(tail.peak_fall, other.peak_fall);
}

class Screen {
 public:
  Screen(const ScreenedParams& p, const ThreadPool& pool, int first_row, int rows)
      : s_(p),
        p_(p.exit),
        pool_(pool),
        full_(head_form(p_.head_type, true)),
        small_(head_form(HeadType::kInt8, true)),
        looks_(screen_kernels()),
        first_row_(first_row),
        rows_(rows),
        chunks_((int64_t(p_.vocab) + kExitChunk - 1) / kExitChunk),
        stride_(chunks_ * kExitChunk),
        small_packed_(small_, p_.dim, rows),
        lengths_(rows),
        bounds_(rows),
        approximate_(new float[stride_ * rows]),
        found_(chunks_ * rows) {
    full_packed_.reserve(rows);
    for (int row = 0; row < rows; row++) full_packed_.emplace_back(full_, p_.dim, 1);
    pool_.run(rows_, [&](int64_t row, int) { prepare(int(row)); });
  }

  // Rows that need the whole head are added to `fallen`.
  void run(std::vector<int>& fallen) {
    std::vector<float> longest(chunks_);
    pool_.deal(chunks_, [&](int64_t chunk) { longest[chunk] = approximate(chunk); });
    const float most = *std::max_element(longest.begin(), longest.end());
    std::vector<char> answered(rows_);
    const bool many = rows_ >= pool_.threads();
    (many ? pool_ : ThreadPool(1)).run(rows_, [&](int64_t row, int) {
      answered[row] = lengths_[row] * most < kGreatestProduct && answer(int(row), many ? ThreadPool(1) : pool_);
    });
    for (int row = 0; row < rows_; row++) {
      if (!answered[row]) fallen.push_back(first_row_ + row);
    }
  }

 private:
  struct Found {  // what a chunk says of a row
    bool sound;
    float lower[kMaxTopK];
  };
  struct Near {  // entries that are not far below the best, padded to whole steps of a scan, and the tail of the others
    std::vector<int32_t> entries;
    std::vector<float> approximate, error_norms, norms;
    KnownLogits guess;  // what is known if the approximations are true
    ScreenTail far{};
  };
  struct Part {  // a chunk's entries of that kind, and the tail of its others
    std::vector<int32_t> entries;
    ScreenTail far{};
  };
  struct Choice {  // what is rechecked of them, as ascending places there, and the tail of all others
    std::vector<int32_t> places;
    ScreenTail tail;
  };

  void prepare(int row) {
    std::vector<float> y(float_row(p_.dim));
    product_kernels().normalise(hidden_rows(p_), first_row_ + row, y.data());
    full_packed_[row].set(0, y.data());
    round_row(full_, y);
    small_packed_.set(row, y.data());
    const auto [length, rounding] = row_length(small_, y, p_.dim);
    const double sums = 2 * (p_.dim / 4.0 + 64) * 0x1p-24;
    const double vanishing = std::sqrt(double(p_.dim)) * 0x1p-125;
    lengths_[row] = length;  // NaN and infinity stay, and make the row fall back
    bounds_[row] = {float((length * (1 + sums) + vanishing) * kBoundOutward),
                    float((rounding + length * sums + vanishing) * kBoundOutward),
                    float((vanishing * length + p_.dim * 0x1p-125) * kBoundOutward)};
  }

  // kExitChunk of a vector [vocab], zeros where it ends.
  const float* part(const float* vector, int64_t chunk, float* padded) const {
    const int64_t first = chunk * kExitChunk, count = std::min<int64_t>(kExitChunk, p_.vocab - first);
    if (count == kExitChunk) return vector + first;
    std::copy_n(vector + first, count, padded);
    std::fill(padded + count, padded + kExitChunk, 0.0f);
    return padded;
  }

  // The approximate logits of a chunk, and their greatest lower bounds. The length that no entry of the head exceeds.
  float approximate(int64_t chunk) {
    alignas(64) float padded[2][kExitChunk];
    const int64_t begin = chunk * kExitChunk, end = std::min<int64_t>(begin + kExitChunk, p_.vocab);
    for (int64_t first = begin; first < end; first += kWeightTile) {
      const int count = int(std::min<int64_t>(kWeightTile, end - first));
      const WeightTile tile = WeightTile::of(WeightType::kInt8, s_.values, first, end, p_.dim);
      small_packed_.multiply(tile, [&](int row, const float* logits) {
        float* to = &approximate_[row * stride_ + first];
        const float* scales = s_.scales + first;
        for (int i = 0; i < count; i++) to[i] = logits[i] * scales[i];
        for (int i = 0; p_.bias && i < count; i++) to[i] += p_.bias[first + i];
      });
    }
    const float* error_norms = part(s_.error_norms, chunk, padded[0]);
    const float* norms = part(s_.norms, chunk, padded[1]);
    for (int row = 0; row < rows_; row++) {
      float* of_row = &approximate_[row * stride_];
      std::fill(of_row + end, of_row + begin + kExitChunk, -kInfinity);
      Found& found = found_[row * chunks_ + chunk];
      std::fill(found.lower, found.lower + kMaxTopK, -kInfinity);
      found.sound = looks_.note(of_row + begin, error_norms, norms, kExitChunk, bounds_[row], top_k(), found.lower);
    }
    return looks_.longest(error_norms, norms, kExitChunk);
  }

  int top_k() const { return std::max(2, p_.top_k); }

  // The entries that may be rechecked, ascending, and what all others may add.
  Near look(int row, const ScreenScan& scan, const ThreadPool& pool) {
    std::vector<Part> parts(chunks_);
    pool.run(chunks_, [&](int64_t chunk, int) {
      alignas(64) float padded[2][kExitChunk];
      int32_t entries[kExitChunk];
      const int64_t first = chunk * kExitChunk;
      const int count =
          looks_.scan(&approximate_[row * stride_ + first], part(s_.error_norms, chunk, padded[0]),
                      part(s_.norms, chunk, padded[1]), kExitChunk, scan, int32_t(first), entries, parts[chunk].far);
      parts[chunk].entries.assign(entries, entries + count);
    });
    Near near;
    for (const Part& of_chunk : parts) {
      near.entries.insert(near.entries.end(), of_chunk.entries.begin(), of_chunk.entries.end());
      add(near.far, of_chunk.far);
    }
    const size_t count = near.entries.size(), whole = whole_steps(count);
    near.approximate.resize(whole, -kInfinity);
    near.error_norms.resize(whole);
    near.norms.resize(whole);
    for (size_t i = 0; i < count; i++) {
      near.approximate[i] = approximate_[row * stride_ + near.entries[i]];
      near.error_norms[i] = s_.error_norms[near.entries[i]];
      near.norms[i] = s_.norms[near.entries[i]];
    }
    float first = -kInfinity, second = -kInfinity;
    for (float value : near.approximate) {
      second = std::max(second, std::min(first, value));
      first = std::max(first, value);
    }
    near.guess = known(near.approximate, first, second, scan.temperature);
    return near;
  }

  Choice choose(const Near& near, ScreenScan scan, float depth) const {
    scan.deep = depth == kCandidates ? kInfinity : scan.reference - depth * scan.temperature;
    Choice choice = {std::vector<int32_t>(near.entries.size()), near.far};
    choice.places.resize(looks_.scan(near.approximate.data(), near.error_norms.data(), near.norms.data(),
                                     int(near.approximate.size()), scan, 0, choice.places.data(), choice.tail));
    return choice;
  }

  // What logits say that are known, padded to whole steps, and of which these are the greatest two.
  KnownLogits known(const std::vector<float>& z, float first, float second, float temperature) const {
    KnownLogits of{first, second, 0, 0};
    looks_.weigh(z.data(), int(z.size()), first, temperature, of.sum, of.fall);
    return of;
  }

  // The statistics that come of what is known of a choice's logits.
  BoundedStats stats_of(int row, const KnownLogits& known, const ScreenTail& tail, const ScreenScan& scan) const {
    const double spread = lengths_[row] * *s_.error_gain / scan.temperature * kBoundOutward;
    return bounded_stats(known, tail, scan.reference, scan.temperature, spread);
  }

  // Whether a recheck should settle the row: judged by the approximations, before it is paid for. The greatest of them
  // are always chosen; what is not goes over to the tail.
  bool promises(int row, const Near& near, const ScreenScan& scan, float depth) const {
    const ScreenTail tail = choose(near, scan, depth).tail;
    const double gap = (double(near.guess.first) - scan.reference) / scan.temperature, scale = std::exp(-gap);
    const double weight = (tail.weight - near.far.weight) * scale, fall = (tail.fall - near.far.fall) * scale;
    KnownLogits guess = near.guess;
    guess.sum = std::max(1.0, guess.sum - weight);
    guess.fall = std::max(0.0, guess.fall - fall - gap * weight);
    return settled(first_row_ + row, stats_of(row, guess, tail, scan));
  }

  // The least depth that promises to settle the row, or the deepest.
  float promising_depth(int row, const Near& near, const ScreenScan& scan, float deepest) const {
    if (promises(row, near, scan, kCandidates)) return kCandidates;
    float low = 0, high = deepest;
    for (float depth = deepest; high - low > kFinest; depth = (low + high) / 2) {
      const bool enough = promises(row, near, scan, depth);
      if (depth == deepest && !enough) break;
      (enough ? high : low) = depth;
    }
    return high;
  }

  // The logits of these entries as exit_confidence has them.
  std::vector<float> logits_of(int row, const std::vector<int32_t>& entries, const ThreadPool& pool) {
    std::vector<float> z(entries.size());
    const int64_t tiles = (int64_t(entries.size()) + kRecheckTile - 1) / kRecheckTile;
    pool.deal(tiles, [&](int64_t at) {
      const int64_t first = at * kRecheckTile;
      const int count = int(std::min<int64_t>(kRecheckTile, int64_t(entries.size()) - first));
      const WeightTile tile = WeightTile::of_entries(WeightType(p_.head_type), p_.head, &entries[first], count, p_.dim);
      full_packed_[row].multiply(tile, [&](int, const float* logits) {
        for (int i = 0; i < count; i++) {
          z[first + i] = p_.bias ? logits[i] + p_.bias[entries[first + i]] : logits[i];
        }
      });
    });
    return z;
  }

  bool settled(int row, const BoundedStats& stats) const {
    return is_settled(stats, p_.measure, p_.thresholds ? p_.thresholds[row] : p_.threshold, s_.tolerance);
  }

  // Lower bounds of as many of the greatest logits as are listed. False where they cannot be trusted.
  bool lower_bounds(int row, float* lower) const {
    std::fill(lower, lower + kMaxTopK, -kInfinity);
    for (int64_t chunk = 0; chunk < chunks_; chunk++) {
      const Found& found = found_[row * chunks_ + chunk];
      if (!found.sound) return false;
      for (int i = 0; i < top_k(); i++) {
        if (!(found.lower[i] > lower[top_k() - 1])) break;
        insert(found.lower[i], lower);
      }
    }
    return lower[0] > -kInfinity;
  }

  // Puts the logits of a choice, padded to whole steps, in place of those of the last one, which is part of it. Returns
  // how many were read.
  int recheck(int row, const Near& near, const Choice& choice, Choice& last, std::vector<float>& z,
              const ThreadPool& pool) {
    std::vector<int32_t> entries;
    std::vector<size_t> unread;
    const size_t count = choice.places.size();
    std::vector<float> all(whole_steps(count), -kInfinity);
    for (size_t i = 0, known = 0; i < count; i++) {
      if (known < last.places.size() && last.places[known] == choice.places[i]) {
        all[i] = z[known++];
      } else {
        entries.push_back(near.entries[choice.places[i]]);
        unread.push_back(i);
      }
    }
    const std::vector<float> read = logits_of(row, entries, pool);
    for (size_t i = 0; i < read.size(); i++) all[unread[i]] = read[i];
    last = choice;
    z = all;
    return int(read.size());
  }

  // Writes a row, or gives it up.
  bool answer(int row, const ThreadPool& pool) {
    float lower[kMaxTopK];
    if (setting_status(p_, first_row_ + row) || !lower_bounds(row, lower)) return false;
    const float temperature = temperature_of(p_, first_row_ + row);
    const size_t limit = std::max<size_t>(kLeastLimit, p_.vocab / 8);
    int32_t reads = 0;
    for (float deepest : kDeepest) {
      const ScreenScan scan = {bounds_[row], lower[0], lower[top_k() - 1], lower[0] - deepest * temperature,
                               temperature};
      const Near near = look(row, scan, pool);
      Choice last;
      std::vector<float> z;
      for (float depth = promising_depth(row, near, scan, deepest); depth <= deepest; depth += 2 * kFinest) {
        const Choice choice = choose(near, scan, depth);
        if (choice.places.empty() || choice.places.size() > limit) return false;
        reads += recheck(row, near, choice, last, z, pool);
        const ExitState best = best_of(z, near, choice);
        const KnownLogits of_best = known(z, best.value[0], best.value[1], temperature);
        const BoundedStats stats = stats_of(row, of_best, choice.tail, scan);
        if (!settled(first_row_ + row, stats)) continue;
        write(first_row_ + row, best, stats, temperature);
        s_.rechecked[first_row_ + row] = reads;
        return true;
      }
    }
    return false;
  }

  void insert(float value, float* lower) const {
    int at = top_k() - 1;
    for (; at > 0 && value > lower[at - 1]; at--) lower[at] = lower[at - 1];
    lower[at] = value;
  }

  // The greatest of what was chosen; equals stay in their order.
  ExitState best_of(const std::vector<float>& z, const Near& near, const Choice& choice) const {
    ExitState best{};
    std::fill(best.value, best.value + kMaxTopK, -kInfinity);
    std::fill(best.entry, best.entry + kMaxTopK, -1);
    const int last = top_k() - 1;
    for (size_t i = 0; i < choice.places.size(); i++) {
      if (!(z[i] > best.value[last])) continue;
      int at = last;
      for (; at > 0 && z[i] > best.value[at - 1]; at--) {
        best.value[at] = best.value[at - 1];
        best.entry[at] = best.entry[at - 1];
      }
      best.value[at] = z[i];
      best.entry[at] = near.entries[choice.places[i]];
    }
    return best;
  }

  void write(int row, const ExitState& best, const BoundedStats& stats, double temperature) const {
    const auto token_of = [&](int32_t entry) { return p_.token_map ? p_.token_map[entry] : entry; };
    const double max_prob = stats.max_prob.value;
    p_.token[row] = token_of(best.entry[0]);
    p_.max_prob[row] = float(max_prob);
    p_.margin[row] = float(stats.margin.value);
    p_.entropy[row] = float(stats.entropy.value);
    p_.logsumexp[row] = float(best.value[0] / temperature - std::log(max_prob));
    p_.status[row] = 0;
    for (int k = 0; k < p_.top_k; k++) {
      const int64_t at = int64_t(row) * p_.top_k + k;
      const bool exists = best.value[k] > -kInfinity;
      p_.top_tokens[at] = exists ? token_of(best.entry[k]) : -1;
      p_.top_logprobs[at] =
          exists ? float((double(best.value[k]) - best.value[0]) / temperature + std::log(max_prob)) : -kInfinity;
    }
  }

  const ScreenedParams& s_;
  const ExitParams& p_;
  const ThreadPool& pool_;
  const ProductForm full_, small_;
  const ScreenKernels& looks_;
  const int first_row_, rows_;
  const int64_t chunks_, stride_;
  std::vector<PackedRows> full_packed_;  // of one row each
  PackedRows small_packed_;
  std::vector<double> lengths_;
  std::vector<ScreenBound> bounds_;
  const std::unique_ptr<float[]> approximate_;  // [rows, stride]
  std::vector<Found> found_;
};

}  // namespace

}  // namespace specdec::cpu

namespace specdec {

using namespace cpu;

void screened_exit_cpu(const ScreenedParams& s, int threads) {
  const ExitParams& p = s.exit;
  const ThreadPool pool = exit_threads(p, threads);
  std::vector<int> fallen;
  for (int row = 0; row < p.rows; row += kRowBlock) {
    Screen(s, pool, row, std::min(kRowBlock, p.rows - row)).run(fallen);
  }
  if (!fallen.empty()) read_head(p, fallen, pool);
  for (int row : fallen) {
    p.status[row] |= kExitFellBack;
    s.rechecked[row] = p.vocab;
  }
  if (p.measure != ExitMeasure::kNone) decide_exits(p);
}

}  // namespace specdec
