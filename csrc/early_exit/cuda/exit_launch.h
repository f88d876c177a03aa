// Calls of the CUDA early exit kernels: the parameters that all backends share, and where scratch lies.
#pragma once

#include "early_exit/params.h"

namespace specdec {

// Of the form with bounds: a launch has a part of the head, and lists the rows that need the next one.
struct PartParams {
  const double* reach;      // [rows, 2], see RowReach; nullptr: this is the last part
  const float* biases;      // [bias_count]: the greatest of all behind the part are among them; nullptr: no bias
  const float* norm_after;  // [1]: not below the length of any row of the head behind the part
  int32_t* open;            // [rows + 1]: receives the rows that go on, with their number behind the last place
  int32_t* seen;            // [rows]; nullptr: the launch has all of the head
  int32_t bias_count;
  int32_t begin, left;  // entries before the part, and behind it
  int32_t slots;        // as below, the first one for what the parts have seen together; 0: there are no parts
};

struct ExitLaunch {
  ExitParams call;          // of a part: the head, its scales, bias and vocab begin and end with it
  uint8_t* scratch;         // may hold anything
  int32_t* counters;        // zero before the first call; every call leaves zeros
  int32_t multiprocessors;  // of the device

  const int32_t* row_list;  // [rows + 1]: which, ascending, and how many in the last place; nullptr: all of them
  int32_t* rechecked;       // [rows] of the screened form, whose rows fell back, else nullptr
  PartParams part;

  // Filled in by the launcher.
  int32_t blocks;                                   // that share the vocabulary
  int32_t row_blocks;                               // of hidden rows
  int32_t slots;                                    // of a row's states in the scratch
  int64_t keys;                                     // where the lists begin in the scratch
  bool hidden_aligned, norm_aligned, head_aligned;  // whether their rows start at multiples of 16 bytes
};

struct ScreenLaunch {
  ScreenedParams call;
  uint8_t* scratch;         // as above
  int32_t* counters;        // as above
  int32_t multiprocessors;  // as above

  // Filled in by the launcher. Where each part begins in the scratch, whose first one is an ExitLaunch's:
  int64_t keys, approximate, counts, plans, known, known_keys, tails, fallen;
  int64_t stride;         // approximations from one row to the next
  int32_t blocks, spans;  // that share the vocabulary: of the first launch, and for each row of the second
  int32_t row_blocks;     // of the first launch
  int32_t first_counter;  // of the second launch
  bool hidden_aligned, norm_aligned, head_aligned, values_aligned;
};

struct BoundedLaunch {
  BoundedParams call;
  uint8_t* scratch;         // as above
  int32_t* counters;        // as above
  int32_t multiprocessors;  // as above

  // Filled in by the launcher. Where each thing begins in the scratch, whose first one is an ExitLaunch's.
  int64_t keys, reach, biases, lists;
  int32_t slots;                      // as above
  bool hidden_aligned, norm_aligned;  // as above
};

constexpr int32_t kExitVocabTile = 128;    // rows of the head that a block multiplies at once
constexpr int32_t kExitMaxDims = 1 << 28;  // so that bytes of a row fit into 32 bits

// Blocks that share a head: two for each multiprocessor, or one for each tile if there are fewer.
inline int32_t exit_blocks(int32_t vocab, int32_t multiprocessors) {
  const int32_t tiles = vocab / kExitVocabTile + (vocab % kExitVocabTile != 0);
  return tiles < 2 * multiprocessors ? tiles : 2 * multiprocessors;
}

// Whether rows of so many bytes start at multiples of 16 bytes.
inline bool is_aligned(const void* address, int64_t row_bytes) {
  return reinterpret_cast<uintptr_t>(address) % 16 == 0 && row_bytes % 16 == 0;
}

}  // namespace specdec
