// Path-invariant attention: a row's result depends on its query and on the keys and values of the positions that it
// sees, to the last bit, and on nothing else. So a node of a draft tree gets what plain decoding of its path gives.
//
// The unit is a chunk of positions (attention/cpu/path_task.h) and a task. The part of the chunk that is context is
// shared by all rows: blocks of rows and slots are multiplied together. The part behind the context each row takes from
// its own path, with the same arithmetic, and its sums go on where they were. Three things would break the promise and
// are avoided: sums over slots instead of positions (siblings lie between a node and its parent), a maximum that other
// rows raise, and products that add in another order when there are more rows (attention/cpu/path_arithmetic.h).
//
//   scores    of up to kSub slots at a time, for all rows and all tasks that go together: [row][position]
//   softmax   of each row by itself: its maximum in this chunk, weights, their sum by lanes
//   outputs   of up to kSub slots at a time, [row][dim], one multiply-add a position
//   merge     of chunks into the state of the row, in ascending order; a chunk in which it sees nothing is left out
//
// What a row sees of a chunk is one interval of positions, so there is no mask. Scores of slots that a row does not see
// are replaced before anyone looks at them. Values are never multiplied by the weight of a row that does not see them:
// at a window's edge, where rows differ, each takes its own. So unseen slots may hold NaN.
//
// Few rows take K and V as they lie, each byte once. More than kDirectRows have them packed, kSub slots at a time: made
// float32, or interleaved, once for all rows, and out of the way of caches' strides. Bytes: 2 * dim * sizeof(element) a
// slot and task; states of dim + 2 floats a row and chunk.
#pragma once

#include "attention/cpu/path_arithmetic.h"
#include "attention/cpu/path_task.h"
#include "common/cpu/simd_int.h"

namespace specdec::cpu::SPECDEC_ISA {

template <class Arithmetic>
class PathAttention {
  using Storage = typename Arithmetic::Storage;
  using Element = typename Arithmetic::Element;
  using Direct = typename Arithmetic::Direct;
  using PackedKeys = typename Arithmetic::PackedKeys;
  using PackedValues = typename Arithmetic::PackedValues;
  using PackedElement = typename PackedKeys::Element;
  static constexpr int kSub = Arithmetic::kPairs == 2 ? 128 : 64;  // slots that go through the products together
  static constexpr int kDirectRows = 8;                            // more have K and V packed
  static constexpr int kLeastLaneRows = 10;                        // of a vector
  static constexpr int kRoom = kWidth;  // entries of a list of keys that are read behind its end
  static constexpr int kStep = Direct::kPositions;
  static constexpr float kNoMaximum = -1e30f;  // finite, so that subtracting it from itself is 0

  // A task with its memory.
  struct Run {
    const PathTask* task;
    float *q, *q_lanes;      // packed queries [rows][query_depth], and [vectors of rows][query_depth][kWidth]
    float* s;                // scores, then weights: [rows][kScoreStride]
    float *out, *max, *sum;  // the state
    int64_t k_head, v_head;  // bytes from a slot to the task's head
  };

  // Where slots lie, in bytes from the start of a cache, without the head.
  struct Places {
    int64_t at[kSub + kRoom];
    int count = 0;
  };

 public:
  static size_t state_size(int rows, int dim) { return size_t(rows) * (Arithmetic::depth(dim) + 2); }

  static size_t scratch_size(int rows, int dim, int tasks) {
    const size_t own = size_t(rows) * (query_depth(dim) + kScoreStride) + lane_rows(rows) * query_depth(dim);
    return tasks * own + 2 * size_t(kSub) * Arithmetic::depth(dim);
  }

  static void attend(const PathTask* const* tasks, int count, int chunk, float* scratch, float* const* states) {
    const PathTask& first = *tasks[0];
    const TreeAttentionParams& p = *first.params;
    const int dim = p.dim, depth = Arithmetic::depth(dim), base = chunk * kPathChunk;
    Run runs[kMaxPathTogether];
    for (int i = 0; i < count; i++) start(runs[i], *tasks[i], scratch, states[i]);
    float *k_packed = scratch, *v_packed = scratch + size_t(kSub) * depth;

    // Context slots [begin, end) of the chunk are seen by a row, whole steps from `all` to `whole` by every row.
    const int end = clamp(first.context_len - base), begin = min_of(clamp(first.first_seen - base), end);
    const int all = round_up(clamp(last_first_seen(first) - base), kStep), whole = end / kStep * kStep;
    Places here, next;
    if (begin < end) locate<false>(first, base + begin, min_of(kSub, end - begin), here);
    for (int i = begin; i < end; i += kSub) {
      const bool more = i + kSub < end;
      PathFetch fetch;
      if (more) locate<false>(first, base + i + kSub, min_of(kSub, end - i - kSub), next);
      if (!more && all < whole) locate<true>(first, base + all, min_of(kSub, whole - all), next);
      if (!more && all >= whole) next.count = 0;
      for (int n = 0; n < count; n++) {
        if (first.fetch_ahead) fetch = fetch_of(runs[n], next, !more);
        context_scores(runs[n], here, i, k_packed, fetch);
      }
      here = next;
    }
    for (int n = 0; n < count; n++) path_scores(runs[n], base, end);
    for (int n = 0; n < count; n++) soften_all(runs[n], base);
    for (int n = 0; n < count; n++) add_edges(runs[n], base, begin / kStep * kStep, min_of(all, whole));
    const int ahead = min_of(kSub, first.context_len - base - kPathChunk);  // of the next chunk, as a rule ours, too
    for (int i = all; i < whole; i += kSub) {
      const bool more = i + kSub < whole;
      PathFetch fetch;
      next.count = 0;
      if (more) locate<true>(first, base + i + kSub, min_of(kSub, whole - i - kSub), next);
      if (!more && ahead > 0) locate<false>(first, base + kPathChunk, ahead, next);
      for (int n = 0; n < count; n++) {
        if (first.fetch_ahead) fetch = fetch_of(runs[n], next, more);
        context_outputs(runs[n], here, i, v_packed, fetch);
      }
      here = next;
    }
    for (int n = 0; n < count; n++) add_paths(runs[n], base, max_of(whole, begin / kStep * kStep));
  }

  static __attribute__((noinline)) void merge(const PathTask& task, float* state, const float* later) {
    const int depth = Arithmetic::depth(task.params->dim), rows = task.rows;
    float *m = state + size_t(rows) * depth, *l = m + rows;
    const float *m2 = later + size_t(rows) * depth, *l2 = m2 + rows;
    for (int r = 0; r < rows; r++) {
      if (m2[r] == -__builtin_inff()) continue;  // saw nothing
      float* out = state + size_t(r) * depth;
      const float* more = later + size_t(r) * depth;
      if (m[r] == -__builtin_inff()) {
        std::memcpy(out, more, depth * sizeof(float));
        m[r] = m2[r], l[r] = l2[r];
        continue;
      }
      const Vec top = maximum(splat(m[r]), splat(m2[r]));
      const Vec a = exp2(splat(m[r]) - top), b = exp2(splat(m2[r]) - top);
      alignas(64) float lanes[2][kWidth];
      store(lanes[0], top);
      store(lanes[1], fma(splat(l[r]), a, splat(l2[r]) * b));
      m[r] = lanes[0][0], l[r] = lanes[1][0];
      for (int d = 0; d < depth; d += kWidth) store(out + d, fma(load(out + d), a, load(more + d) * b));
    }
  }

  static __attribute__((noinline)) void finish(const PathTask& task, const float* state) {
    const TreeAttentionParams& p = *task.params;
    const int depth = Arithmetic::depth(p.dim), group = p.heads / p.kv_heads;
    const float *max = state + size_t(task.rows) * depth, *sum = max + task.rows;
    for (int r = 0; r < task.rows; r++) {
      const int packed = task.first_row + r, head = task.kv_head * group + packed % group;
      const int64_t query = task.first_query + packed / group;
      float m = max_of(max[r], kNoMaximum), l = sum[r], keep = 1.0f;
      if (p.sinks) {
        const float sink = p.sinks[head] * kLog2E, top = max_of(m, sink);
        keep = __builtin_exp2f(m - top);
        l = l * keep + __builtin_exp2f(sink - top);
        m = top;
      }
      const float factor = l > 0 ? keep * p.out_scale / l : (l == 0 ? 0.0f : l);
      Element* out = static_cast<Element*>(p.out) + task.request * p.out_stride_batch + query * p.out_stride_row +
                     head * p.out_stride_head;
      for (int d = 0; d < p.dim; d += kWidth)
        Storage::store_vec(out + d, Arithmetic::read(state + size_t(r) * depth, d) * splat(factor));
      if (!p.lse) continue;
      const int64_t row = p.offsets ? query : int64_t(task.request) * p.queries + query;
      p.lse[row * p.heads + head] = l > 0 ? (m + __builtin_log2f(l)) * kLn2 : (l == 0 ? -__builtin_inff() : l);
    }
  }

 private:
  static SPECDEC_INLINE int clamp(int place) { return max_of(0, min_of(place, kPathChunk)); }

  static SPECDEC_INLINE int group_of(const PathTask& task) { return task.params->heads / task.params->kv_heads; }
  static SPECDEC_INLINE int query_of(const PathTask& task, int row) { return (task.first_row + row) / group_of(task); }
  static SPECDEC_INLINE const RowPath& path_of(const PathTask& task, int row) {
    return task.paths[query_of(task, row)];
  }

  // The highest first position of a row.
  static int last_first_seen(const PathTask& task) {
    int last = 0;
    if (task.params->window > 0)
      for (int r = 0; r < task.rows; r++) last = max_of(last, path_of(task, r).first_seen);
    return last;
  }

  static void start(Run& run, const PathTask& task, float*& scratch, float* state) {
    const TreeAttentionParams& p = *task.params;
    const int depth = Arithmetic::depth(p.dim), words = query_depth(p.dim), group = group_of(task);
    run.task = &task;
    run.q = take(scratch, size_t(task.rows) * words);
    run.q_lanes = take(scratch, lane_rows(task.rows) * words);
    run.s = take(scratch, size_t(task.rows) * kScoreStride);
    run.out = state;
    run.max = state + size_t(task.rows) * depth;
    run.sum = run.max + task.rows;
    run.k_head = int64_t(task.kv_head * p.k_stride_head * sizeof(Element));
    run.v_head = int64_t(task.kv_head * p.v_stride_head * sizeof(Element));
    std::memset(run.out, 0, size_t(task.rows) * depth * sizeof(float));
    for (int r = 0; r < task.rows; r++) {
      const int packed = task.first_row + r;
      const Element* query = static_cast<const Element*>(p.q) + task.request * p.q_stride_batch +
                             (task.first_query + packed / group) * p.q_stride_row +
                             (task.kv_head * group + packed % group) * p.q_stride_head;
      Arithmetic::pack_query(query, p.dim, run.q + r * words);
    }
    for (int row = 0; row < int(lane_rows(task.rows)); row += kWidth)
      for (int d = 0; d < words; d += kWidth) {
        Vec lines[kWidth];
        for (int r = 0; r < kWidth; r++)
          lines[r] = row + r < task.rows ? load(run.q + (row + r) * words + d) : splat(0.0f);
        transpose(lines);
        for (int i = 0; i < kWidth; i++) store(run.q_lanes + row * words + (d + i) * kWidth, lines[i]);
      }
  }

  // Rows whose scores are made with the rows in the lanes: whole vectors of them, if they are well filled.
  static SPECDEC_INLINE size_t lane_rows(int rows) {
    if (kWidth < 16 || rows < kLeastLaneRows) return 0;
    return rows % kWidth >= kLeastLaneRows ? round_up(rows, kWidth) : rows / kWidth * kWidth;
  }

  static float* take(float*& scratch, size_t floats) {
    float* taken = scratch;
    scratch += floats;
    return taken;
  }

  static SPECDEC_INLINE int query_depth(int dim) { return Arithmetic::depth(dim) / Arithmetic::kPairs; }

  // Slots of the context, which exist: whoever made the task has seen to it.
  template <bool kValues>
  static void locate(const PathTask& task, int slot, int count, Places& places) {
    const TreeAttentionParams& p = *task.params;
    const int64_t batch_stride = int64_t((kValues ? p.v_stride_batch : p.k_stride_batch) * sizeof(Element));
    const int64_t slot_stride = int64_t((kValues ? p.v_stride_slot : p.k_stride_slot) * sizeof(Element));
    places.count = count;
    if (!p.page_table) {
      for (int i = 0; i < count; i++) places.at[i] = task.request * batch_stride + (slot + i) * slot_stride;
    } else {
      const int32_t* table = p.page_table + task.request * p.page_table_stride;
      for (int i = 0; i < count;) {
        const int page = (slot + i) / p.page_size, in_page = (slot + i) % p.page_size;
        const int run = min_of(count - i, p.page_size - in_page);
        const int found = read_once(table + page);  // all these have been looked at: another one is a racing writer's
        const int64_t first = found >= 0 && found < p.pages ? found : 0;
        for (int n = 0; n < run; n++, i++) places.at[i] = first * batch_stride + (in_page + n) * slot_stride;
      }
    }
  }

  static constexpr Element kZeros[256] = {};  // a row of K or V

  // The place of any position that the row sees. A page that does not exist stands for zeros: where a topology's depths
  // contradict its ancestors, nobody has checked it.
  template <bool kValues>
  static SPECDEC_INLINE const Element* row_at(const Run& run, const RowPath& path, int position) {
    const PathTask& task = *run.task;
    const TreeAttentionParams& p = *task.params;
    int64_t slot = position < task.context_len ? position : path.slots[position - task.context_len];
    int64_t first = task.request;
    if (p.page_table) {
      first = read_once(p.page_table + task.request * p.page_table_stride + slot / p.page_size);
      slot %= p.page_size;
      if (first < 0 || first >= p.pages) return kZeros;
    }
    if constexpr (kValues)
      return static_cast<const Element*>(p.v_cache) + first * p.v_stride_batch + slot * p.v_stride_slot +
             task.kv_head * p.v_stride_head;
    else
      return static_cast<const Element*>(p.k_cache) + first * p.k_stride_batch + slot * p.k_stride_slot +
             task.kv_head * p.k_stride_head;
  }

  static PathFetch fetch_of(const Run& run, const Places& places, bool values) {
    const TreeAttentionParams& p = *run.task->params;
    PathFetch fetch;
    fetch.base = static_cast<const char*>(values ? p.v_cache : p.k_cache) + (values ? run.v_head : run.k_head);
    fetch.offsets = places.at;
    fetch.count = places.count;
    fetch.bytes = int(p.dim * sizeof(Element));
    return fetch;
  }

  static void rows_at(const void* cache, int64_t head, const Places& places, const Element** rows) {
    const char* base = static_cast<const char*>(cache) + head;
    for (int i = 0; i < places.count; i++) rows[i] = reinterpret_cast<const Element*>(base + places.at[i]);
    for (int i = 0; i < kRoom; i++) rows[places.count + i] = rows[places.count - 1];
  }

  template <class Operand>
  static void score_blocks(const typename Operand::Element* const* keys, int count, int rows, int dim, const float* q,
                           float* s, PathFetch fetch) {
    const int depth = query_depth(dim);
    int r = 0;
    for (; r + 4 <= rows; r += 4, fetch.count = 0)
      score_rows<Operand, 4>(keys, count, dim, q + r * depth, depth, s + r * kScoreStride, fetch);
    q += r * depth, s += r * kScoreStride;
    if (rows - r == 3) score_rows<Operand, 3>(keys, count, dim, q, depth, s, fetch);
    if (rows - r == 2) score_rows<Operand, 2>(keys, count, dim, q, depth, s, fetch);
    if (rows - r == 1) score_rows<Operand, 1>(keys, count, dim, q, depth, s, fetch);
  }

  template <class Operand>
  static void add_blocks(const typename Operand::Element* const* v, int count, int rows, int dim, const float* w,
                         float* out, PathFetch fetch) {
    const int depth = Arithmetic::depth(dim);
    int r = 0;
    for (; r + 4 <= rows; r += 4, fetch.count = 0)
      add_positions<Operand, 4>(v, count, dim, w + r * kScoreStride, out + r * depth, depth, fetch);
    w += r * kScoreStride, out += r * depth;
    if (rows - r == 3) add_positions<Operand, 3>(v, count, dim, w, out, depth, fetch);
    if (rows - r == 2) add_positions<Operand, 2>(v, count, dim, w, out, depth, fetch);
    if (rows - r == 1) add_positions<Operand, 1>(v, count, dim, w, out, depth, fetch);
  }

  static void context_scores(const Run& run, const Places& places, int place, float* packed_to, PathFetch fetch) {
    const PathTask& task = *run.task;
    const int dim = task.params->dim;
    const Element* rows[kSub + kRoom];
    rows_at(task.params->k_cache, run.k_head, places, rows);
    if (task.rows <= kDirectRows)
      return score_blocks<Direct>(rows, places.count, task.rows, dim, run.q, run.s + place, fetch);
    const PackedElement* packed[kSub + kRoom];
    Arithmetic::pack_keys(rows, places.count, dim, packed_to, packed);
    for (int i = 0; i < kRoom; i++) packed[places.count + i] = packed[places.count - 1];
    int row = 0;
#if defined(__AVX512F__)
    const int words = query_depth(dim), in_lanes = int(lane_rows(task.rows));
    const auto* keys = reinterpret_cast<const Word*>(packed_to);
    for (int vecs; row < in_lanes; row += vecs * kWidth, fetch.count = 0) {
      vecs = row + 2 * kWidth <= in_lanes ? 2 : 1;
      const int rows_here = min_of(vecs * kWidth, task.rows - row);
      const float* q = run.q_lanes + row * words;
      float* s = run.s + row * kScoreStride + place;
      if (vecs == 2) score_lane_rows<PackedKeys, 2>(keys, words, places.count, rows_here, q, words, s, fetch);
      if (vecs == 1) score_lane_rows<PackedKeys, 1>(keys, words, places.count, rows_here, q, words, s, fetch);
    }
#endif
    if (row < task.rows)
      score_blocks<PackedKeys>(packed, places.count, task.rows - row, dim, run.q + row * query_depth(dim),
                               run.s + row * kScoreStride + place, fetch);
  }

  static SPECDEC_INLINE float* weights(const Run& run, int row, int place) {
    return run.s + row * kScoreStride + place / Arithmetic::kPairs;
  }

  static void context_outputs(const Run& run, const Places& places, int place, float* packed_to,
                              const PathFetch& fetch) {
    const PathTask& task = *run.task;
    const int dim = task.params->dim;
    const Element* rows[kSub + kRoom];
    rows_at(task.params->v_cache, run.v_head, places, rows);
    if (task.rows <= kDirectRows)
      return add_blocks<Direct>(rows, places.count, task.rows, dim, weights(run, 0, place), run.out, fetch);
    const PackedElement* packed[kSub + kRoom];
    Arithmetic::pack_values(rows, places.count, dim, packed_to, packed);
    add_blocks<PackedValues>(packed, places.count, task.rows, dim, weights(run, 0, place), run.out, fetch);
  }

  // Calls work(row, rows, shared): rows that are alike or nearly so. Up to four of one query; where a kv head has one
  // head, four queries, of whose paths the first `shared` slots are the same.
  template <class Work>
  static SPECDEC_INLINE void for_each_bundle(const PathTask& task, const Work& work) {
    const int group = group_of(task);
    for (int r = 0, rows; r < task.rows; r += rows) {
      if (group == 1 && task.params->window == 0 && r + 4 <= task.rows) {
        rows = 4;
        const RowPath& path = path_of(task, r);
        int shared = path.length;
        for (int n = 1; n < 4; n++) {
          const RowPath& other = path_of(task, r + n);
          shared = min_of(shared, other.length);
          for (int i = 0; i < shared; i++)
            if (path.slots[i] != other.slots[i]) shared = i;
        }
        work(r, rows, task.context_len + shared);
      } else {
        rows = min_of(min_of(4, task.rows - r), group - (task.first_row + r) % group);
        work(r, rows, task.context_len + path_of(task, r).length);
      }
    }
  }

  // Scores of what lies behind the context, from place `begin` of the chunk on.
  static void path_scores(const Run& run, int base, int begin) {
    const PathTask& task = *run.task;
    if (begin >= kPathChunk || base + begin >= task.end_seen) return;
    const auto score = [&](int row, int rows, int from, int to) {
      from = max_of(from, base + begin), to = min_of(to, base + kPathChunk);
      from = max_of(from, path_of(task, row).first_seen);
      if (from >= to) return;
      const Element* keys[kPathChunk + kRoom];
      for (int i = from; i < to; i++) keys[i - from] = row_at<false>(run, path_of(task, row), i);
      for (int i = 0; i < kRoom; i++) keys[to - from + i] = keys[to - from - 1];
      score_blocks<Direct>(keys, to - from, rows, task.params->dim, run.q + row * query_depth(task.params->dim),
                           run.s + row * kScoreStride + from - base, PathFetch{});
    };
    for_each_bundle(task, [&](int row, int rows, int shared) {
      score(row, rows, base, shared);
      for (int r = row; r < row + rows; r++) {
        const int last = task.context_len + path_of(task, r).length;
        if (shared < last) score(r, 1, shared, last);
      }
    });
  }

  static void soften_all(const Run& run, int base) {
    const PathTask& task = *run.task;
    for (int r = 0; r < task.rows; r++) {
      const RowPath& path = path_of(task, r);
      const int begin = clamp(path.first_seen - base), end = clamp(task.context_len + path.length - base);
      run.sum[r] = 0;
      run.max[r] = -__builtin_inff();
      if (begin < end) soften(run, r, path, base, begin, end);
    }
  }

  // Scores of one row in places [begin, end) of the chunk become weights, in whole vectors: those around them are 0.
  static __attribute__((noinline)) void soften(const Run& run, int row, const RowPath& path, int base, int begin,
                                               int end) {
    const PathTask& task = *run.task;
    const TreeAttentionParams& p = *task.params;
    const bool transform = p.softcap > 0 || p.alibi_slopes || !(p.scale > 0);
    const Vec scale = splat(transform ? 1.0f : p.scale * kLog2E), nothing = splat(-__builtin_inff());
    float* s = run.s + row * kScoreStride;
    const int first = begin / (2 * kWidth) * (2 * kWidth), last = round_up(end, 2 * kWidth);
    if (transform) {
      const int group = group_of(task);
      const float slope = p.alibi_slopes ? p.alibi_slopes[task.kv_head * group + (task.first_row + row) % group] : 0.0f;
      // A row of a tree stands at its last position, one without a tree behind the context.
      const int own = task.context_len + max_of(path.length - 1, 0);
      alignas(64) float steps[kWidth];
      for (int i = 0; i < kWidth; i++) steps[i] = float(i);
      for (int i = first; i < last; i += kWidth) {
        Vec v = load(s + i) * splat(p.scale);
        if (p.softcap > 0) v = soft_cap(v, p.softcap);
        if (p.alibi_slopes) v = fma(splat(-slope), splat(float(own - base - i)) - load(steps), v);
        store(s + i, v * splat(kLog2E));
      }
    }
    for (int i = first; i < begin; i++) s[i] = -__builtin_inff();
    for (int i = end; i < last; i++) s[i] = -__builtin_inff();
    Vec top = nothing;
    for (int i = first; i < last; i += kWidth) top = maximum(load(s + i), top);
    const float most = max_of(greatest(rounded_product(top, scale)), kNoMaximum);
    const Vec minus_most = splat(-most);
    Vec sum[2] = {splat(0.0f), splat(0.0f)};
    for (int i = first; i < last; i += 2 * kWidth) {
      const Vec a = Arithmetic::weigh(rounded_product(load(s + i), scale) + minus_most);
      const Vec b = Arithmetic::weigh(rounded_product(load(s + i + kWidth), scale) + minus_most);
      sum[0] = sum[0] + a;
      sum[1] = sum[1] + b;
      Arithmetic::store_weights(s, i, s, a, b);
    }
    run.max[row] = most;
    run.sum[row] = total(sum[0] + sum[1]);
  }

  // Adds the values of positions in places [from, to) of the chunk, `from` a whole step, to rows of one path.
  static void add_own(const Run& run, int row, int rows, int base, int from, int to) {
    const PathTask& task = *run.task;
    const RowPath& path = path_of(task, row);
    const int begin = path.first_seen - base, end = min_of(to, task.context_len + path.length - base);
    from = max_of(from, begin / kStep * kStep);
    if (from >= end) return;
    const int dim = task.params->dim;
    const Element* v[kPathChunk];  // with zeros for a step's position that the row doesn't see
    for (int i = from; i < round_up(end, kStep); i++)
      v[i - from] = i >= begin && i < end ? row_at<true>(run, path, base + i) : kZeros;
    add_blocks<Direct>(v, round_up(end, kStep) - from, rows, dim, weights(run, row, from),
                       run.out + row * Arithmetic::depth(dim), PathFetch{});
  }

  // Context slots that some row does not see, which lie before those that all see.
  static void add_edges(const Run& run, int base, int from, int to) {
    if (from >= to) return;
    for_each_bundle(*run.task, [&](int row, int rows, int) {
      const bool alike = group_of(*run.task) > 1 || rows == 1;
      for (int r = row; r < row + rows; r += alike ? rows : 1) add_own(run, r, alike ? rows : 1, base, from, to);
    });
  }

  // What lies behind the context, from place `from` of the chunk on, a whole step.
  static void add_paths(const Run& run, int base, int from) {
    const PathTask& task = *run.task;
    if (from >= kPathChunk || base + from >= task.end_seen) return;
    for_each_bundle(task, [&](int row, int rows, int shared) {
      const int together = group_of(task) > 1 ? kPathChunk : clamp(shared - base) / kStep * kStep;
      if (together > from) add_own(run, row, rows, base, from, together);
      for (int r = row; r < row + rows && together < kPathChunk; r++)
        add_own(run, r, 1, base, max_of(from, together), kPathChunk);
    });
  }
};

template <class Arithmetic>
const PathKernel kPathAttention = {PathAttention<Arithmetic>::state_size, PathAttention<Arithmetic>::scratch_size,
                                   PathAttention<Arithmetic>::attend, PathAttention<Arithmetic>::merge,
                                   PathAttention<Arithmetic>::finish};

}  // namespace specdec::cpu::SPECDEC_ISA
