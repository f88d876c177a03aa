// What exit_confidence asks of each instruction set: rows in the form that is multiplied, logits of a tile of the
// head, and what a row makes of them.
#pragma once

#include <cstddef>
#include <cstdint>

#include "early_exit/params.h"

namespace specdec::cpu {

constexpr int kExitTile = 64;      // rows of the head whose logits are made at once
constexpr int kExitRowBlock = 60;  // hidden rows that are multiplied with a tile before the next ones
constexpr int kExitTogether = 4;   // packed rows have room for a multiple of so many
constexpr int kHiddenStep = 64;    // hidden rows in float32 go on with zeros to a multiple of so many dims

// What a row knows of the part of the vocabulary that it has seen. Values are logits before the temperature.
struct ExitState {
  float sum;                 // of exp((z - value[0]) / T)
  float weighted_logit_sum;  // of the same times (z - value[0])
  bool invalid;
  // As many as are listed of the greatest logits, descending, the lowest entry first among equals, -inf where there are
  // no more; and their places in the vocabulary.
  float value[kMaxTopK];
  int32_t entry[kMaxTopK];
};

struct ExitTile {
  const void* head;  // of its first row
  int count;         // rows, at most kExitTile
  int dim;
  const int32_t* entries;  // [count], which rows of the head, or nullptr: the first ones
};

struct ExitKernels {
  // y = hidden, or its RMSNorm; float32, with the zeros behind it, like every y here.
  void (*normalise)(const ExitParams& p, int row, float* y);
  // Bytes of a packed row.
  size_t (*packed_bytes)(HeadType type, int dim);
  // Puts y among `rows` packed rows. They may be multiplied together, or cut into pieces of kExitRowBlock. The rows
  // of the whole call decide their order there, and the order of the sums in multiply.
  void (*pack)(HeadType type, const float* y, int dim, char* packed, int row, int rows, int call_rows);
  // Rounds y to what a packed row holds.
  void (*round)(HeadType type, float* y, int dim);
  // logits [rows][kExitTile] of packed rows, as far as `count`.
  void (*multiply)(HeadType type, const ExitTile& tile, const char* packed, int rows, int call_rows, float* logits);
  // Takes one row's logits in, which are -inf where a tile has no more. scales and bias are [kExitTile] or nullptr; the
  // logits are changed by them.
  void (*absorb)(float* logits, const float* scales, const float* bias, int32_t first_entry, float factor, int top_k,
                 ExitState& state);
};

namespace generic {
extern const ExitKernels kExitKernels;
}
namespace avx2 {
extern const ExitKernels kExitKernels;
}
namespace avx512 {
extern const ExitKernels kExitKernels;
}
namespace avx512_bf16 {
extern const ExitKernels kExitKernels;
}

// Int8 heads by integer products (linear/cpu/isa/int8_tile_avx512_vnni.cpp), in place of the functions of the same names above.
namespace avx512_vnni {
size_t packed_bytes(HeadType type, int dim);
void pack(HeadType type, const float* y, int dim, char* packed, int row, int rows, int call_rows);
void multiply(HeadType type, const ExitTile& tile, const char* packed, int rows, int call_rows, float* logits);
double rounding_error(const float* y, int dim);  // the length of y - what `pack` makes of it
}  // namespace avx512_vnni

}  // namespace specdec::cpu

namespace specdec {

void exit_confidence_cpu(const ExitParams& params, int threads);

}  // namespace specdec
