// A call of the CUDA kernel of linear: the parameters that all backends share, where scratch lies, and how the product
// is cut into blocks.
#pragma once

#include "linear/params.h"

namespace specdec {

constexpr int kLinearChannels = 32;       // rows of the weight, in a block
constexpr int kLinearFewRows = 16;        // of x, in a block; with float32 always
constexpr int kLinearMoreRows = 64;       // the same where there are more
constexpr int kLinearQuantisedRows = 32;  // and the weight is quantised
constexpr int kLinearMaxSplitBlocks = 256,
              kLinearMinTiles = 4;  // columns are cut up to so many blocks; tiles of a part

struct LinearLaunch {
  LinearParams call;
  uint8_t* scratch;   // may hold anything
  int32_t* counters;  // zero before the first call; every call leaves zeros

  // Filled in by the launcher.
  int64_t row_bytes;              // of the weight
  int32_t row_block, row_blocks;  // rows of x in a block, and blocks of them
  int32_t block_outputs;          // of a block
  int32_t splits;                 // parts of the columns
  int32_t block_bytes;            // of 32 columns of the weight
  int32_t unit;    // bytes that are copied at once: 16, 4 or 1, a divisor of where every weight row begins
  bool x_aligned;  // rows start and end at multiples of 16 bytes
};

constexpr bool is_quantised(const LinearParams& p) { return p.weight_type >= WeightType::kInt8; }

// Columns of a tile: so many that every type's is a multiple of 16 bytes.
constexpr int32_t linear_tile_columns(bool quantised) { return quantised ? 256 : 128; }

// With an activation half of a block's weight rows are of the gate.
constexpr int32_t linear_outputs_of_block(const LinearParams& p) {
  return p.activation == Activation::kNone ? kLinearChannels : kLinearChannels / 2;
}

constexpr int32_t linear_output_blocks(const LinearParams& p) {
  const int32_t outputs = linear_outputs_of_block(p);
  return (p.outputs + outputs - 1) / outputs;
}

// How rows and columns are cut. The columns' parts depend on the weight alone.
constexpr void lay_out(LinearLaunch& launch) {
  const LinearParams& p = launch.call;
  const bool is_few = p.rows <= kLinearFewRows || p.dtype == DType::kFloat32;
  launch.row_block = is_few ? kLinearFewRows : is_quantised(p) ? kLinearQuantisedRows : kLinearMoreRows;
  launch.row_blocks = (p.rows + launch.row_block - 1) / launch.row_block;
  launch.block_outputs = linear_outputs_of_block(p);
  const int32_t columns = linear_tile_columns(is_quantised(p)), tiles = (p.dim + columns - 1) / columns;
  const int32_t for_blocks = kLinearMaxSplitBlocks / (p.outputs > 0 ? linear_output_blocks(p) : 1);
  const int32_t for_tiles = tiles / kLinearMinTiles, splits = for_blocks < for_tiles ? for_blocks : for_tiles;
  launch.splits = splits > 1 ? splits : 1;
}

}  // namespace specdec
