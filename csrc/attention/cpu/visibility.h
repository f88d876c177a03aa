// Which slots the rows of a task see: the context, as far as the window reaches, and of the tree what the ancestor
// words say.
#pragma once

#include "attention/cpu/task.h"
#include "common/cpu/simd.h"

namespace specdec::cpu::SPECDEC_ISA {

class Visibility {
 public:
  Visibility(const Task& task, float* depth, int32_t* node)
      : task_(task), p_(*task.params), depth_(depth), node_(node) {
    const int64_t tree = p_.topology_batch == 1 ? 0 : int64_t(task.request) * p_.nodes;
    ancestors_ = p_.ancestors ? p_.ancestors + tree * p_.words : nullptr;
    depths_ = p_.depths ? p_.depths + tree : nullptr;
  }

  // Reads the nodes and depths of `padded` rows; those past the task's last one are like it.
  void fill(int padded) {
    const int group = p_.heads / p_.kv_heads;
    float lowest = 0, highest = 0;
    for (int r = 0; r < padded; r++) {
      node_[r] = task_.first_node + (task_.first_row + min_of(r, task_.rows - 1)) / group;
      depth_[r] = depths_ ? float(depths_[node_[r]]) : 0.0f;
      lowest = r == 0 ? depth_[0] : min_of(lowest, depth_[r]);
      highest = max_of(highest, depth_[r]);
    }
    first_seen_ = all_see_ = 0;
    if (p_.window == 0) return;
    first_seen_ = begin_of_window(lowest);
    all_see_ = begin_of_window(highest);
  }

  // Context slots before it are outside of every row's window.
  int first_seen() const { return first_seen_; }

  // Context slots from it on are inside of every row's window.
  int all_see() const { return all_see_; }

  // Depth-relative positions: context slots count backwards from the root's position, nodes by their depth.
  float position(int slot) const {
    const int node = slot - task_.context_len;
    return node < 0 ? float(node) : float(depths_[node]);
  }
  SPECDEC_INLINE Vec row_positions(int row) const { return load(depth_ + row); }

  bool sees(int row, int slot) const {
    const int node = slot - task_.context_len;
    if (p_.window > 0 && depth_[row] - position(slot) >= float(p_.window)) return false;
    return node < 0 || (ancestors_[int64_t(node_[row]) * p_.words + node / 64] >> (node % 64) & 1) != 0;
  }

  // Whether a row of [row, row + rows) has an ancestor among the `count` nodes from `slot` on.
  bool anyone_sees(int row, int rows, int slot, int count) const {
    const int first = slot - task_.context_len, last = first + count - 1;
    for (int w = first / 64; w <= last / 64; w++) {
      uint64_t range = ~uint64_t(0);
      if (w == first / 64) range &= ~uint64_t(0) << (first % 64);
      if (w == last / 64) range &= ~uint64_t(0) >> (63 - last % 64);
      for (int r = 0; r < rows; r++)
        if (ancestors_[int64_t(node_[row + r]) * p_.words + w] & range) return true;
    }
    return false;
  }

  // Scores [slots][rows] of `seen` slots from `slot` on, and of padding up to `slots`: -inf where a row does not see.
  template <int kVecs>
  void mask(float* scores, int row, int slot, int seen, int slots) const {
    alignas(64) uint64_t words[kVecs * kWidth];
    int loaded = -1;
    for (int i = 0; i < slots; i++, slot++) {
      float* at = scores + i * kVecs * kWidth;
      const int node = slot - task_.context_len;
      if (i >= seen) {
        for (int j = 0; j < kVecs; j++) store(at + j * kWidth, splat(-__builtin_inff()));
        continue;
      }
      if (p_.window > 0) {
        const Vec at_position = splat(position(slot)), window = splat(float(p_.window));
        for (int j = 0; j < kVecs; j++) {
          const Vec distance = load(depth_ + row + j * kWidth) - at_position;
          store(at + j * kWidth, keep_where_less(load(at + j * kWidth), distance, window));
        }
      }
      if (node < 0) continue;
      if (node / 64 != loaded) {
        loaded = node / 64;
        for (int r = 0; r < kVecs * kWidth; r++) words[r] = ancestors_[int64_t(node_[row + r]) * p_.words + loaded];
      }
      for (int j = 0; j < kVecs; j++)
        store(at + j * kWidth, keep_where_bit(load(at + j * kWidth), words + j * kWidth, node % 64));
    }
  }

 private:
  // The first context slot that a row of this depth sees. A depth may be any number.
  int begin_of_window(float depth) const {
    const double begin = double(task_.context_len) + depth - p_.window + 1;
    return int(begin < 0 ? 0 : min_of<double>(begin, task_.context_len));
  }

  const Task& task_;
  const TreeAttentionParams& p_;
  float* depth_;   // of each row
  int32_t* node_;  // of each row
  const uint64_t* ancestors_;
  const int32_t* depths_;
  int first_seen_, all_see_;
};

}  // namespace specdec::cpu::SPECDEC_ISA
