// Attention with the packed query rows as the vector dimension.
//
// A task's rows are cut into blocks of a few vectors. For a tile of slots the kernel forms S^T [slot][row], turns it
// into weights P^T [slot][row] and adds V^T P^T to O^T [dim][row]. Rows lie along the lanes of a vector, so the running
// maximum and sum are plain vector operations, a tree mask is one vector mask per slot, and K is never transposed: its
// elements are broadcast, or loaded as a matrix tile. Only Q is transposed, once per task and split.
//
// Per tile, K and V come from memory once for all row blocks: 2 * dim * sizeof(element) bytes a slot. Tiles of plain
// context carry no mask. Tiles that reach into the tree, past the window's edge or past the end are masked from the
// ancestor words, and a row block skips tree tiles in which none of its rows sees anything.
//
// What a row does not see may be NaN or Inf. Its score is replaced, whatever it is, but its V is multiplied with a
// weight of 0, and 0 * NaN is NaN. So V of the slots that some row may not see is looked at. A slot that is not finite
// throughout is set aside: the tile has zeros in its place, and it is added, row by row, to those that see it.
//
// An Engine (attention/cpu/engine.h) says how to multiply: it packs V, forms scores and weights, and accumulates
// outputs. The running maximum is raised only when a score exceeds it by 2^8, so most tiles rescale nothing; weights
// then reach at most 2^8.
#pragma once

#include <optional>

#include "attention/cpu/engine.h"
#include "attention/cpu/slots.h"
#include "attention/cpu/visibility.h"

namespace specdec::cpu::SPECDEC_ISA {

constexpr float kNoMaximum = -1e30f;  // finite, so that subtracting it from itself is 0
constexpr float kMaximumSlack = 8.0f;

// Floats of the scratch from the next cache line on; moves `scratch` past them.
static inline float* take(float*& scratch, size_t floats) {
  float* taken = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(scratch) + 63) & ~uintptr_t(63));
  scratch = taken + floats;
  return taken;
}

// The memory of the tile at hand. Lanes that go through a split together take turns with it.
template <class Engine>
struct TileBuffers {
  using Element = typename Engine::Element;
  static constexpr int kBlockRows = Engine::kMaxVecs * kWidth;

  TileBuffers(float*& scratch, int dim)
      : k_copy(reinterpret_cast<Element*>(take(scratch, size_t(Engine::kTile) * dim))),
        v_copy(reinterpret_cast<Element*>(take(scratch, size_t(Engine::kTile) * dim))),
        k_packed(take(scratch, Engine::key_floats(dim))),
        v_packed(take(scratch, Engine::value_floats(dim))),
        scores(take(scratch, size_t(Engine::kSpan) * kBlockRows)),
        weights(take(scratch, size_t(Engine::kTile) * kBlockRows * Engine::kWeightFloats)) {}

  Element *const k_copy, *const v_copy;    // [kTile, dim] of groups that can't be used as they lie
  float *const k_packed, *const v_packed;  // as the engine multiplies them
  float* const scores;                     // [kSpan, rows of a block]
  float* const weights;                    // of a tile and a block
  int asides, aside[Engine::kTile];        // slots that are set aside
  alignas(64) float top[kBlockRows];       // the greatest scores of a span, by row
};

// The state of a task in a split: its packed queries, and the partial result.
template <class Engine>
class AttentionKernel {
  static_assert(EngineCheck<Engine>::kHolds);
  using Buffers = TileBuffers<Engine>;
  using Storage = typename Engine::Storage;
  using Element = typename Storage::Element;
  static constexpr int kTile = Engine::kTile;
  static constexpr int kBlockRows = Engine::kMaxVecs * kWidth;

 public:
  static size_t partial_size(int rows, int dim) {
    return size_t(round_up(rows, kWidth)) * (Engine::Output::depth(dim) + 2);
  }

  static size_t scratch_size(int rows, int dim, int tasks) {
    const size_t padded = round_up(rows, kWidth);
    return tasks * (padded * (Engine::query_depth(dim) + 3) + 64) + Engine::key_floats(dim) +
           Engine::value_floats(dim) + size_t(kTile) * (2 * dim + (1 + Engine::kWeightFloats) * kBlockRows) + 16 * 16;
  }

  static void attend(const Task* const* tasks, int count, int begin, int end, float* scratch, float* const* partials) {
    std::optional<AttentionKernel>
        runs[kMaxTogether];  // an optional of a type of this namespace is this namespace's own
    Engine::enter();
    for (int i = 0; i < count; i++) {
      runs[i].emplace(*tasks[i], scratch, partials[i]);
      runs[i]->start();
    }
    Buffers buffers(scratch, tasks[0]->params->dim);
    for (int slot = runs[0]->first_visible(begin); slot < end; slot += kTile)
      for (int i = 0; i < count; i++) runs[i]->tile(slot, end, buffers);
    Engine::leave();
  }

  static void merge(const Task& task, float* partial, const float* later) {
    const int dim = Engine::Output::depth(task.params->dim), rows = round_up(task.rows, kWidth);
    float *m = partial + size_t(rows) * dim, *l = m + rows;
    const float *m2 = later + size_t(rows) * dim, *l2 = m2 + rows;
    for (int row = 0, vecs; row < task.rows; row += vecs * kWidth) {
      vecs = block_vecs(task.rows - row);
      for (int j = 0; j < vecs; j++) {
        const int r = row + j * kWidth;
        const Vec top = maximum(load(m + r), load(m2 + r));
        const Vec a = exp2(load(m + r) - top), b = exp2(load(m2 + r) - top);
        store(m + r, top);
        store(l + r, fma(load(l + r), a, load(l2 + r) * b));
        const size_t block = size_t(row) * dim;
        Engine::Output::merge(partial + block, later + block, dim, vecs, j, a, b);
      }
    }
  }

  static void finish(const Task& task, float* partial, float* scratch) {
    AttentionKernel run(task, scratch, partial);
    for (int row = 0, vecs; row < task.rows; row += vecs * kWidth) {
      vecs = block_vecs(task.rows - row);
      run.write_block(row, vecs);
    }
  }

  // Takes what the task itself needs from the scratch, and moves `scratch` past it. `partial` may be new memory, which
  // start() makes a state of, or hold one.
  AttentionKernel(const Task& task, float*& scratch, float* partial)
      : task_(task),
        p_(*task.params),
        slots_(task),
        dim_(p_.dim),
        rows_(round_up(task.rows, kWidth)),
        group_(p_.heads / p_.kv_heads),
        depth_out_(Engine::Output::depth(dim_)),
        transform_(p_.softcap > 0 || p_.alibi_slopes || !(p_.scale > 0)),
        exponent_scale_(transform_ ? 1.0f : p_.scale * kLog2E),
        q_(take(scratch, size_t(rows_) * Engine::query_depth(dim_))),
        slope_(take(scratch, rows_)),
        rows_see_(task, take(scratch, rows_), reinterpret_cast<int32_t*>(take(scratch, rows_))),
        out_(partial),
        max_(out_ + size_t(rows_) * depth_out_),
        sum_(max_ + rows_) {}

 private:
  // Before the first tile of a split: nothing has been seen.
  void start() {
    pack_queries();
    std::memset(out_, 0, size_t(rows_) * (depth_out_ + 2) * sizeof(float));
    for (int r = 0; r < rows_; r++) max_[r] = kNoMaximum;
  }

  // The widest block of 2^n vectors that the remaining rows fill.
  static int block_vecs(int remaining) {
    const int need = (remaining + kWidth - 1) / kWidth;
    int vecs = Engine::kMaxVecs;
    while (vecs > need) vecs /= 2;
    return vecs;
  }

  const Element* query(int row) const {
    const int packed = task_.first_row + row;
    return static_cast<const Element*>(p_.q) + task_.request * p_.q_stride_batch +
           (task_.first_query + packed / group_) * p_.q_stride_row +
           (task_.kv_head * group_ + packed % group_) * p_.q_stride_head;
  }

  // kWidth words of a query from word d on: floats, or pairs of bfloat16 as they lie. Words past the end are 0.
  SPECDEC_INLINE Vec query_words(int row, int d, int used) const {
    const Element* source = query(row) + d * Engine::kPairs;
    if constexpr (Engine::kPairs == 1) return Storage::load_vec(source);
    if (d + kWidth <= used) return load(reinterpret_cast<const Word*>(source));
    float words[kWidth] = {};
    std::memcpy(words, source, (used - d) * sizeof(float));
    return load(words);
  }

  // Block by block, Q^T [depth][rows of the block], where a depth is one float or a pair of bfloat16.
  void pack_queries() {
    const int depth = Engine::query_depth(dim_);
    const int used = dim_ / Engine::kPairs;
    if constexpr (Engine::kQueriesByRow) {
      std::memset(q_, 0, size_t(rows_) * depth * sizeof(float));
      for (int r = 0; r < task_.rows; r++) {
        for (int d = 0; d < used; d += kWidth) store(q_ + r * depth + d, query_words(r, d, used));
      }
    }
    for (int row = 0, vecs; !Engine::kQueriesByRow && row < task_.rows; row += vecs * kWidth) {
      vecs = block_vecs(task_.rows - row);
      const int width = vecs * kWidth;
      float* block = q_ + size_t(row) * depth;
      if (depth > used) std::memset(block + size_t(used) * width, 0, size_t(depth - used) * width * sizeof(float));
      for (int first = 0; first < width; first += kWidth)
        for (int d = 0; d < used; d += kWidth) {
          Vec lines[kWidth];
          for (int r = 0; r < kWidth; r++)
            lines[r] = row + first + r < task_.rows ? query_words(row + first + r, d, used) : splat(0.0f);
          transpose(lines);
          for (int i = 0; i < kWidth && d + i < used; i++) store(block + size_t(d + i) * width + first, lines[i]);
        }
    }
    rows_see_.fill(rows_);
    for (int r = 0; r < rows_ && p_.alibi_slopes; r++)
      slope_[r] = p_.alibi_slopes[task_.kv_head * group_ + (task_.first_row + min_of(r, task_.rows - 1)) % group_];
  }

  // With a window, context slots before every row's window are never read. The result keeps the tiles' alignment.
  int first_visible(int begin) const {
    const int first = rows_see_.first_seen();
    return first <= begin ? begin : begin + (first - begin) / kTile * kTile;
  }

  void tile(int begin, int end, Buffers& buffers) {
    Tile<Element, kTile> t;
    t.begin = begin;
    t.count = min_of(kTile, end - begin);
    t.padded = round_up(t.count, Engine::kStep);
    t.rows = task_.rows;
    const bool all_seen = begin >= rows_see_.all_see() && begin + t.count <= task_.context_len;
    t.masked = !all_seen || t.padded > t.count;
    for (int g = 0; g * kGroupSlots < round_up(t.padded, kGroupSlots); g++)
      slots_.template gather<Engine::kPairs>(begin + g * kGroupSlots, end, t.k[g], t.v[g],
                                             buffers.k_copy + size_t(g) * kGroupSlots * dim_, v_copy_of(buffers, g));
    buffers.asides = 0;
    if (!all_seen) set_aside(t, buffers);
    t.fetched_ahead = task_.fetch_ahead;
    t.ahead = task_.fetch_ahead ? slots_.ahead(begin + kTile, kTile) : Ahead{};
    Engine::pack_keys(t, dim_, buffers.k_packed);
    Engine::pack_values(t, dim_, buffers.v_packed);
    for (int row = 0, vecs; row < task_.rows; row += vecs * kWidth) {
      vecs = block_vecs(task_.rows - row);
      const int rows = min_of(vecs * kWidth, task_.rows - row);
      if (begin >= task_.context_len && !rows_see_.anyone_sees(row, rows, begin, t.count)) continue;
      if (vecs == 1) block<1>(row, t, buffers);
      if constexpr (Engine::kMaxVecs >= 2)
        if (vecs == 2) block<2>(row, t, buffers);
      if constexpr (Engine::kMaxVecs >= 4)
        if (vecs == 4) block<4>(row, t, buffers);
      t.ahead.slots = 0;  // the first row block has fetched the next tile
    }
  }

  Element* v_copy_of(const Buffers& buffers, int group) const {
    return buffers.v_copy + size_t(group) * kGroupSlots * dim_;
  }

  // 0, or NaN when the row holds something that is not finite.
  SPECDEC_INLINE Vec times_zero(const Group<Element>* groups, int i) const {
    const Element* row = groups[i / kGroupSlots].base + i % kGroupSlots * groups[i / kGroupSlots].stride;
    Vec sum = splat(0.0f);
    for (int d = 0; d < dim_; d += kWidth) sum = fma(Storage::load_vec(row + d), splat(0.0f), sum);
    return sum;
  }

  // Looks at the slots that some row may not see: those at the window's edge, and the tree's.
  void set_aside(Tile<Element, kTile>& t, Buffers& buffers) {
    const int edge = min_of(rows_see_.all_see() - t.begin, t.count), tree = max_of(task_.context_len - t.begin, 0);
    Vec sum = splat(0.0f);
    for (int i = 0; i < edge; i++) sum = sum + times_zero(t.v, i);
    for (int i = tree; i < t.count; i++) sum = sum + times_zero(t.v, i);
    if (!any_nan(sum)) return;
    for (int i = 0; i < t.count; i++) {
      if ((i >= edge && i < tree) || !any_nan(times_zero(t.v, i))) continue;
      Group<Element>& group = t.v[i / kGroupSlots];
      Element* copy = v_copy_of(buffers, i / kGroupSlots);
      for (int n = 0; n < kGroupSlots && group.base != copy; n++)
        std::memcpy(copy + n * dim_, group.base + n * group.stride, dim_ * sizeof(Element));
      group = {copy, dim_};
      std::memset(copy + i % kGroupSlots * dim_, 0, dim_ * sizeof(Element));
      buffers.aside[buffers.asides++] = i;
    }
  }

  // Adds the slots set aside in [from, to), whose scores are at hand, to the rows that see them.
  template <int kVecs>
  __attribute__((noinline)) void add_aside(int row, const Tile<Element, kTile>& t, int from, int to,
                                           const Buffers& buffers, float* out) {
    alignas(64) float weights[kVecs * kWidth], values[kWidth];
    for (int n = 0; n < buffers.asides; n++) {
      const int i = buffers.aside[n], slot = t.begin + i;
      if (i < from || i >= to) continue;
      for (int j = 0; j < kVecs; j++) {
        const Vec s = load(buffers.scores + ((i - from) * kVecs + j) * kWidth), top = load(max_ + row + j * kWidth);
        store(weights + j * kWidth, exp2(rounded_product(s, splat(exponent_scale_)) - top));
      }
      for (int r = 0; r < min_of(kVecs * kWidth, task_.rows - row); r++) {
        if (!rows_see_.sees(row + r, slot)) continue;
        for (int d = 0; d < dim_; d++) {
          if (d % kWidth == 0) store(values, Storage::load_vec(slots_.v_at(slot) + d));
          out[Engine::Output::place(dim_, kVecs, r, d)] += weights[r] * values[d % kWidth];
        }
      }
    }
  }

  // Scores and weights are formed for kSpan slots at a time, which keeps them in the first-level cache; outputs are
  // added for the whole tile, which loads and stores them once. Only when the maximum rises in between are they added
  // earlier.
  template <int kVecs>
  void block(int row, const Tile<Element, kTile>& t, Buffers& buffers) {
    const float* q = q_ + size_t(row) * Engine::query_depth(dim_);
    float* out = out_ + size_t(row) * depth_out_;
    int added = 0;
    for (int from = 0; from < t.padded; from += Engine::kSpan) {
      const int to = min_of(from + Engine::kSpan, t.padded);
      Engine::template scores<kVecs>(t, from, to, dim_, q, buffers.k_packed, buffers.scores);
      if (transform_) transform<kVecs>(row, t, from, to, buffers.scores);
      if (t.masked) rows_see_.template mask<kVecs>(buffers.scores, row, t.begin + from, t.count - from, to - from);
      if (rises<kVecs>(row, to - from, buffers)) {
        if (from > added)
          Engine::template accumulate<kVecs>(t, added, from, buffers.v_packed, dim_, buffers.weights, out);
        added = from;
        raise_maximum<kVecs>(row, buffers.top);
      }
      weigh<kVecs>(row, to - from, buffers.scores, buffers.weights + Engine::weights_offset(from, kVecs));
      if (buffers.asides > 0) add_aside<kVecs>(row, t, from, to, buffers, out);
    }
    Engine::template accumulate<kVecs>(t, added, t.padded, buffers.v_packed, dim_, buffers.weights, out);
  }

  template <int kVecs>
  SPECDEC_INLINE void weigh(int row, int slots, const float* scores, float* weights) {
    Vec minus_max[kVecs], sum[kVecs];
    SPECDEC_UNROLL
    for (int j = 0; j < kVecs; j++) {
      minus_max[j] = splat(0.0f) - load(max_ + row + j * kWidth);
      sum[j] = splat(0.0f);  // of this span, added at the end: one long sum would lose more to rounding
    }
    Engine::template weigh<kVecs>(scores, slots, splat(exponent_scale_), minus_max, weights, sum);
    SPECDEC_UNROLL
    for (int j = 0; j < kVecs; j++) {
      float* at = sum_ + row + j * kWidth;
      store(at, load(at) + sum[j]);
    }
  }

  template <int kVecs>
  void transform(int row, const Tile<Element, kTile>& t, int from, int to, float* scores) {
    const Vec scale = splat(p_.scale);
    for (int i = from; i < min_of(to, t.count); i++) {
      const Vec position = splat(p_.alibi_slopes ? rows_see_.position(t.begin + i) : 0.0f);
      for (int j = 0; j < kVecs; j++) {
        float* at = scores + ((i - from) * kVecs + j) * kWidth;
        Vec s = load(at) * scale;
        if (p_.softcap > 0) s = soft_cap(s, p_.softcap);
        if (p_.alibi_slopes) {
          const int r = row + j * kWidth;
          s = s - load(slope_ + r) * (rows_see_.row_positions(r) - position);
        }
        store(at, s * splat(kLog2E));
      }
    }
  }

  // Finds the largest score of each row (in buffers.top) and tells whether one is far enough above the maximum in use.
  template <int kVecs>
  bool rises(int row, int slots, Buffers& buffers) {
    // Several maxima side by side, or each would wait for the one before.
    constexpr int kChains = 4 / kVecs;
    const Vec scale = splat(exponent_scale_);
    Vec tops[kChains][kVecs], top[kVecs];
    SPECDEC_UNROLL
    for (int j = 0; j < kVecs; j++) {
      SPECDEC_UNROLL
      for (int c = 0; c < kChains; c++) tops[c][j] = load(buffers.scores + (c * kVecs + j) * kWidth);
    }
    for (int i = kChains; i < slots; i += kChains) {  // a span's slots are a multiple of four
      SPECDEC_UNROLL
      for (int c = 0; c < kChains; c++) {
        SPECDEC_UNROLL
        for (int j = 0; j < kVecs; j++)
          tops[c][j] = maximum(load(buffers.scores + ((i + c) * kVecs + j) * kWidth), tops[c][j]);
      }
    }
    SPECDEC_UNROLL
    for (int j = 0; j < kVecs; j++) {
      top[j] = tops[0][j];
      SPECDEC_UNROLL
      for (int c = 1; c < kChains; c++) top[j] = maximum(tops[c][j], top[j]);
    }
    bool raise = false;
    SPECDEC_UNROLL
    for (int j = 0; j < kVecs; j++) {
      top[j] = top[j] * scale;
      raise |= any_above(top[j], load(max_ + row + j * kWidth) + splat(kMaximumSlack));
      store(buffers.top + j * kWidth, top[j]);
    }
    return raise;
  }

  template <int kVecs>
  void raise_maximum(int row, const float* top) {
    Vec factor[kVecs];
    bool fresh = true;
    SPECDEC_UNROLL
    for (int j = 0; j < kVecs; j++) {
      const int r = row + j * kWidth;
      const Vec old = load(max_ + r), now = maximum(load(top + j * kWidth), old);
      fresh &= !any_above(old, splat(kNoMaximum));
      factor[j] = exp2(old - now);
      store(max_ + r, now);
      store(sum_ + r, load(sum_ + r) * factor[j]);
    }
    if (!fresh) Engine::Output::template scale<kVecs>(out_ + size_t(row) * depth_out_, depth_out_, factor);
  }

  // Normalises a block, adds its sinks to the denominator and writes its rows.
  void write_block(int row, int vecs) {
    const int width = vecs * kWidth;
    alignas(64) float factor[kBlockRows], log_sum[kBlockRows];
    for (int r = 0; r < width && row + r < task_.rows; r++) {
      float m = max_[row + r], l = sum_[row + r], keep = 1.0f;
      const int packed = task_.first_row + row + r;
      if (p_.sinks) {
        const float sink = p_.sinks[task_.kv_head * group_ + packed % group_] * kLog2E;
        const float top = max_of(m, sink);
        keep = __builtin_exp2f(m - top);
        l = l * keep + __builtin_exp2f(sink - top);
        m = top;
      }
      factor[r] = l > 0 ? keep * p_.out_scale / l : (l == 0 ? 0.0f : l);
      log_sum[r] = l > 0 ? (m + __builtin_log2f(l)) * kLn2 : (l == 0 ? -__builtin_inff() : l);
    }
    const float* block = out_ + size_t(row) * depth_out_;
    for (int first = 0; first < width && row + first < task_.rows; first += kWidth) {
      const int count = min_of(kWidth, task_.rows - row - first);
      Element* to[kWidth];
      for (int r = 0; r < count; r++) {
        const int packed = task_.first_row + row + first + r, head = task_.kv_head * group_ + packed % group_;
        const int64_t query = task_.first_query + packed / group_;
        to[r] = static_cast<Element*>(p_.out) + task_.request * p_.out_stride_batch + query * p_.out_stride_row +
                head * p_.out_stride_head;
        if (p_.lse) p_.lse[lse_row(query) * p_.heads + head] = log_sum[first + r];
      }
      for (int d = 0; d < dim_; d += kWidth) {
        Vec lines[kWidth];
        Engine::Output::read(block, dim_, width, first, d, lines);
        for (int r = 0; r < count; r++) Storage::store_vec(to[r] + d, lines[r] * splat(factor[first + r]));
      }
    }
  }

  int64_t lse_row(int64_t query) const { return p_.offsets ? query : int64_t(task_.request) * p_.queries + query; }

  const Task& task_;
  const TreeAttentionParams& p_;
  const TaskSlots<Element> slots_;
  const int dim_, rows_, group_, depth_out_;
  // Scores are transformed (scaled, capped, biased) in a pass of their own only when a feature asks for it; else the
  // scale rides on the exponential's multiply-add, which needs it positive.
  const bool transform_;
  const float exponent_scale_;
  float *const q_, *const slope_;
  Visibility rows_see_;
  float *const out_, *const max_, *const sum_;  // the partial result: outputs, and each row's maximum and sum
};

template <class Engine>
const TaskKernel kAttentionKernel = {AttentionKernel<Engine>::partial_size, AttentionKernel<Engine>::scratch_size,
                                     AttentionKernel<Engine>::attend, AttentionKernel<Engine>::merge,
                                     AttentionKernel<Engine>::finish};

}  // namespace specdec::cpu::SPECDEC_ISA
