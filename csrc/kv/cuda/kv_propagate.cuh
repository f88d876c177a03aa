// Keys and values of skipped layers on a GPU, in one launch for up to 32 layers: norm, product, rotation, store.
//
// A block has 32 rows of one projection (of K or of V), the same ones in every layer of its group of layers, and up to
// 64 hidden rows: 8, 32 or 64, whichever holds all. It goes through the columns 256 bytes at a time. Rows of the
// weight come by asynchronous copies of 16 bytes, three or four tiles ahead, also across the end of a layer; hidden
// rows go through registers two tiles ahead, where they are normalised and rounded to their dtype, as an engine feeds
// its matrix product. Two halves of the 32 rows and four quarters of a tile's columns make the eight warps. Weights in
// 16 bits are the first operand of the tensor cores' product, hidden rows the second; float32 is multiplied by FMA from
// the same tiles. At the end of a layer the four quarters are summed one after the other, keys are rotated in float32,
// and rows that have a place are stored.
//
// Bytes: the weights once, 2 * layers * kv_heads * head_dim * dim elements, which is the roof. Through the L2 cache
// besides: hidden once per block for the norm's statistics, while the first tiles are under way, and then once per
// block and layer, which is rows / 32 times the weights. More than 64 rows are blocks of their own, and read the
// weights from the L2 cache again. With Llama-3-8B's 1,024 rows of K and of V a layer is 64 blocks, which keep half of
// a large GPU's multiprocessors busy, with 24 to 32 KB under way in each; of several layers about 256 blocks are made,
// all of which run at once, and each goes on to its next layer without a gap.
//
// Pairs that are rotated together must be in one block, so K's rows are taken in an order in which they are neighbours.
// A block has whole heads, or a part of one that is larger than 32. Positions count in that order, within a head.
//
// How a row's sums are made depends on dim alone, not on how many rows there are.
#pragma once

#include "common/cuda/device.cuh"
#include "kv/params.h"
#include "linear/cuda/row_tiles.cuh"

namespace specdec::cuda {

constexpr int kKvThreads = 256;
constexpr int kKvChannels = 32;  // rows of a weight, in a block
constexpr int kKvParts = 4;      // of a tile's columns
constexpr int kKvPieces = 16;    // of 16 bytes, in a row of a tile
constexpr int kKvMaxRows = 64;   // of hidden, in a block
constexpr int kKvBlocks = 256;   // layers are cut into groups until there are so many

// T: of hidden, the weights and the caches. kRows: hidden rows of a block.
template <class T_, int kRows_>
struct KvShape {
  using T = T_;
  static constexpr int kThreads = kKvThreads, kRows = kRows_, kParts = kKvParts, kPieces = kKvPieces;
  static constexpr bool kMatrix = sizeof(T) == 2;
  static constexpr int kPiece = 16 / int(sizeof(T));
  static constexpr int kColumns = kPieces * kPiece;
  static constexpr int kPitch = kColumns + kPiece;  // eight rows of an ldmatrix lie in different banks
  static constexpr int kRowPitch = kPitch;
  static constexpr int kGroups = kRows / 8;  // of a thread's sums, four in each
  static constexpr int kStages = kRows > 32 ? 4 : 5;
  static constexpr int kRowPieces = (kRows * kKvPieces + kKvThreads - 1) / kKvThreads;  // of a thread
  static constexpr int kOutPitch = kRows + 1;
  static constexpr int kBlocks = kRows > (kMatrix ? 32 : 8) ? 1 : 2;  // on a multiprocessor, at least
};

// A launch: the call and what the host derives from it.
struct KvLaunch {
  KvPropagateParams call;
  int32_t row_blocks, tiles, parts, groups;  // tiles of a projection; parts of a head, 0: a tile has whole heads
  bool weights_aligned, hidden_aligned;      // rows start and end at multiples of 16 bytes
};

// What a block works on.
struct KvBlock {
  int32_t first_row, rows;
  int32_t head, position;  // of its first row in its projection
  int32_t first_layer;
  bool is_v;
};

template <class Shape>
__device__ __forceinline__ KvBlock kv_block(const KvLaunch& launch) {
  const KvPropagateParams& p = launch.call;
  KvBlock block;
  int32_t rest = int32_t(blockIdx.x);
  block.first_row = rest % launch.row_blocks * Shape::kRows;  // blocks that share weights are neighbours
  block.rows = min(Shape::kRows, p.rows - block.first_row);
  rest /= launch.row_blocks;
  const int32_t tile = rest % (2 * launch.tiles) % launch.tiles;
  block.is_v = rest % (2 * launch.tiles) >= launch.tiles;
  block.first_layer = rest / (2 * launch.tiles);
  block.head = launch.parts == 0 ? tile * (kKvChannels / p.head_dim) : tile / launch.parts;
  block.position = launch.parts == 0 ? 0 : tile % launch.parts * kKvChannels;
  return block;
}

// One of the 32 rows of a block. head -1: there is none.
struct KvChannel {
  int32_t head, position;

  __device__ __forceinline__ KvChannel(const KvLaunch& launch, const KvBlock& block, int channel) {
    const KvPropagateParams& p = launch.call;
    const int32_t heads = launch.parts == 0 ? channel / p.head_dim : 0;
    head = block.head + heads;
    position = block.position + channel - heads * p.head_dim;
    const bool whole = launch.parts != 0 || heads < kKvChannels / p.head_dim;
    if (!whole || head >= p.kv_heads || position >= p.head_dim) head = -1;
  }

  // The element of the head that has this position.
  __device__ __forceinline__ int32_t element(const KvPropagateParams& p, bool is_v) const {
    if (is_v || p.interleaved != 0 || position >= 2 * p.pairs) return position;
    return position / 2 + position % 2 * p.pairs;
  }
};

// Where a hidden row goes. first -1: nowhere.
struct KvPlace {
  int32_t first, slot;
};

__device__ __forceinline__ KvPlace kv_place(const KvPropagateParams& p, int32_t row) {
  const int32_t request = p.requests != nullptr ? p.requests[row] : 0, slot = p.slots[row];
  if (request < 0 || request >= p.batch || slot < 0 || slot >= p.slots_each) return {-1, 0};
  if (p.page_table == nullptr) return {request, slot};
  const int32_t page = p.page_table[request * (p.slots_each / p.page_size) + slot / p.page_size];
  if (page < 0 || page >= p.pages) return {-1, 0};
  return {page, int32_t(slot % p.page_size)};
}

template <class Shape>
struct KvShared {
  typename Shape::T* stages;  // [kStages, kKvChannels, kPitch]
  typename Shape::T* y;       // [2, kRows, kPitch]
  float* out;                 // [kKvChannels, kOutPitch]
  float* inverse_norms;       // [kRows]
  KvPlace* places;            // [kRows]

  __device__ KvShared() {
    SharedMemory memory;
    stages = memory.take<typename Shape::T>(Shape::kStages * kKvChannels * Shape::kPitch);
    y = memory.take<typename Shape::T>(2 * Shape::kRows * Shape::kPitch);
    out = memory.take<float>(kKvChannels * Shape::kOutPitch);
    inverse_norms = memory.take<float>(Shape::kRows);
    places = memory.take<KvPlace>(Shape::kRows);
  }
  static constexpr uint32_t bytes() {
    using T = typename Shape::T;
    return SharedMemory::bytes<T>(Shape::kStages * kKvChannels * Shape::kPitch) +
           SharedMemory::bytes<T>(2 * Shape::kRows * Shape::kPitch) +
           SharedMemory::bytes<float>(kKvChannels * Shape::kOutPitch) + SharedMemory::bytes<float>(Shape::kRows) +
           SharedMemory::bytes<KvPlace>(Shape::kRows);
  }
};

// Which tile of which layer: a block goes through the tiles of a layer, and then through those of its next one.
struct KvStep {
  int32_t layer, begin;  // its first column

  template <class Shape>
  __device__ __forceinline__ void advance(const KvLaunch& launch) {
    begin += Shape::kColumns;
    if (begin < launch.call.dim) return;
    begin = 0;
    layer += launch.groups;
  }
};

// Copies tiles of the weight. Rows that don't exist and columns beyond dim become zeros.
template <class Shape>
struct KvFetcher {
  static constexpr int kPieces = kKvChannels * kKvPieces / kKvThreads;
  using T = typename Shape::T;
  int64_t row[kPieces];  // where the thread's rows start, or -1
  KvStep next;
  int32_t stage = 0;

  __device__ __forceinline__ KvFetcher(const KvLaunch& launch, const KvBlock& block) : next{block.first_layer, 0} {
    const KvPropagateParams& p = launch.call;
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const KvChannel at(launch, block, (int(threadIdx.x) + i * kKvThreads) / kKvPieces);
      row[i] = at.head < 0 ? -1 : (int64_t(at.head) * p.head_dim + at.element(p, block.is_v)) * p.dim;
    }
  }

  // The next tile, if there is one.
  __device__ __forceinline__ void fetch(const KvShared<Shape>& shared, const KvLaunch& launch, bool is_v) {
    const KvPropagateParams& p = launch.call;
    if (next.layer < p.count) {
      const KvLayer& layer = p.layers[next.layer];
      const T* weight = static_cast<const T*>(is_v ? layer.v_weight : layer.k_weight);
      const int32_t column = int(threadIdx.x) % kKvPieces * Shape::kPiece, begin = next.begin + column;
#pragma unroll
      for (int i = 0; i < kPieces; ++i) {
        const int channel = (int(threadIdx.x) + i * kKvThreads) / kKvPieces;
        const int32_t count = row[i] < 0 ? 0 : max(0, min(Shape::kPiece, p.dim - begin));
        const T* from = count > 0 ? weight + row[i] + begin : weight;
        T* to = shared.stages + (stage * kKvChannels + channel) * Shape::kPitch + column;
        if (launch.weights_aligned) {
          cp_async_16(to, from, uint32_t(count * sizeof(T)));
        } else {
#pragma unroll 1
          for (int e = 0; e < Shape::kPiece; ++e) to[e] = e < count ? from[e] : from_float<T>(0.0f);
        }
      }
      next.template advance<Shape>(launch);
      stage = stage + 1 == Shape::kStages ? 0 : stage + 1;
    }
    cp_async_commit();
  }
};

// Tiles of the hidden rows, layer after layer. What a thread has of them is under way while the tile two before is
// multiplied.
template <class Shape>
struct KvRows {
  RowTile<Shape> tile;
  BlockRows rows;
  KvStep next;

  __device__ __forceinline__ KvRows(const KvLaunch& launch, const KvBlock& block) : next{block.first_layer, 0} {
    const KvPropagateParams& p = launch.call;
    const auto* hidden = static_cast<const typename Shape::T*>(p.hidden) + block.first_row * p.hidden_stride_row;
    rows = {hidden, p.hidden_stride_row, block.rows, p.dim, launch.hidden_aligned};
  }

  // The next tile. Whether there was one.
  __device__ __forceinline__ bool load(const KvLaunch& launch) {
    if (next.layer >= launch.call.count) return false;
    const KvLayer& layer = launch.call.layers[next.layer];
    tile.load(rows, {layer.norm_weight, layer.norm_dtype}, next.begin);
    next.template advance<Shape>(launch);
    return true;
  }

  __device__ __forceinline__ void store(typename Shape::T* y, const KvShared<Shape>& shared) {
    tile.store(y, shared.inverse_norms, rows);
  }
};

// Where the block's rows go.
template <class Shape>
__device__ __forceinline__ void find_places(const KvShared<Shape>& shared, const KvLaunch& launch,
                                            const KvBlock& block) {
  for (int row = threadIdx.x; row < Shape::kRows; row += kKvThreads) {
    shared.places[row] = row < block.rows ? kv_place(launch.call, block.first_row + row) : KvPlace{-1, 0};
  }
}

// A thread's sums: of a quarter of the columns, for 32 * kRows results that 64 threads share.
template <class Shape>
struct KvSums {
  float sum[Shape::kGroups][4] = {};

  // The results that sum[j][e] belongs to.
  __device__ __forceinline__ static int channel_of(int e) {
    const int lane = threadIdx.x % kWarpSize, half = threadIdx.x / kWarpSize % 2;
    return Shape::kMatrix ? half * 16 + lane / 4 + e / 2 * 8 : lane;
  }
  __device__ __forceinline__ static int row_of(int j, int e) {
    const int lane = threadIdx.x % kWarpSize, half = threadIdx.x / kWarpSize % 2;
    return Shape::kMatrix ? j * 8 + lane % 4 * 2 + e % 2 : (j * 4 + e) * 2 + half;
  }

  __device__ __forceinline__ void multiply(const typename Shape::T* weights, const typename Shape::T* y) {
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    const int first = warp / 2 * (Shape::kColumns / kKvParts);
    if constexpr (Shape::kMatrix) {
      uint32_t a[2][4];
#pragma unroll
      for (int step = 0; step < 2; ++step) {
        ldmatrix_x4(a[step], weights + (warp % 2 * 16 + lane % 16) * Shape::kPitch + first + step * 16 + lane / 16 * 8);
      }
#pragma unroll
      for (int j = 0; j < Shape::kGroups; ++j) {
        uint32_t b[4];
        ldmatrix_x4(b, y + (j * 8 + lane % 8) * Shape::kPitch + first + lane / 8 * 8);
        mma_m16n8k16<typename Shape::T>(sum[j], a[0], b[0], b[1]);
        mma_m16n8k16<typename Shape::T>(sum[j], a[1], b[2], b[3]);
      }
    } else {
#pragma unroll
      for (int column = 0; column < Shape::kColumns / kKvParts; column += 4) {
        const auto w = *reinterpret_cast<const Pack<float, 4>*>(weights + lane * Shape::kPitch + first + column);
#pragma unroll
        for (int i = 0; i < Shape::kRows / 2; ++i) {
          const auto x =
              *reinterpret_cast<const Pack<float, 4>*>(y + (i * 2 + warp % 2) * Shape::kPitch + first + column);
#pragma unroll
          for (int e = 0; e < 4; ++e) sum[i / 4][i % 4] += w.element[e] * x.element[e];
        }
      }
    }
  }

  // out = the sums of all four parts, in their order. All threads of the block. Starts from zero again.
  __device__ __forceinline__ void join(const KvShared<Shape>& shared) {
    sum_parts<Shape>(shared.out, *this, true);
#pragma unroll
    for (int j = 0; j < Shape::kGroups; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) sum[j][e] = 0.0f;
    }
  }
};

// Rotates keys, and stores what has a place.
template <class Shape>
__device__ __forceinline__ void store_results(const KvShared<Shape>& shared, const KvLaunch& launch,
                                              const KvBlock& block, const KvLayer& layer) {
  using T = typename Shape::T;
  const KvPropagateParams& p = launch.call;
  T* cache = static_cast<T*>(block.is_v ? layer.v_cache : layer.k_cache);
  const int64_t stride_batch = block.is_v ? layer.v_stride_batch : layer.k_stride_batch;
  const int64_t stride_slot = block.is_v ? layer.v_stride_slot : layer.k_stride_slot;
  const int64_t stride_head = block.is_v ? layer.v_stride_head : layer.k_stride_head;
  const int channel = threadIdx.x % kKvChannels;
  const KvChannel at(launch, block, channel);
  if (at.head < 0) return;
  const int64_t own = at.head * stride_head + at.element(p, block.is_v);
  const bool rotates = !block.is_v && at.position < 2 * p.pairs, second = at.position % 2 != 0;
  for (int row = threadIdx.x / kKvChannels; row < block.rows; row += kKvThreads / kKvChannels) {
    const KvPlace place = shared.places[row];
    if (place.first < 0) continue;
    const float* out = shared.out + row;
    float value = out[channel * Shape::kOutPitch];
    if (rotates) {
      const float other = out[(second ? channel - 1 : channel + 1) * Shape::kOutPitch];
      const int64_t angle = int64_t(block.first_row + row) * p.pairs + at.position / 2;
      value = value * p.cosines[angle] + (second ? other : -other) * p.sines[angle];
    }
    const T rounded = from_float<T>(value);
    cache[place.first * stride_batch + place.slot * stride_slot + own] = rounded;
  }
}

template <class Shape>
__global__ void __launch_bounds__(kKvThreads, Shape::kBlocks) kv_propagate_kernel(KvLaunch launch) {
  const KvBlock block = kv_block<Shape>(launch);
  const KvShared<Shape> shared;
  constexpr int kTile = kKvChannels * Shape::kPitch, kRowTile = Shape::kRows * Shape::kPitch;
  KvFetcher<Shape> weights(launch, block);
#pragma unroll 1
  for (int i = 0; i < Shape::kStages - 1; ++i) weights.fetch(shared, launch, block.is_v);
  KvRows<Shape> rows(launch, block);
  rows.load(launch);
  find_places(shared, launch, block);
  find_inverse_norms<Shape>(shared.inverse_norms, rows.rows, launch.call.layers[0].norm_weight != nullptr,
                            launch.call.norm_eps);
  block_sync();
  rows.store(shared.y, shared);
  bool more = rows.load(launch);
  KvSums<Shape> sums;
  KvStep at = {block.first_layer, 0};
  int32_t stage = 0, half = 0;  // of y
#pragma unroll 1
  while (at.layer < launch.call.count) {
    cp_async_wait<Shape::kStages - 2>();
    block_sync();  // the tile and y are complete, and nobody is still at those before them
    weights.fetch(shared, launch, block.is_v);
    if (more) rows.store(shared.y + (half ^ 1) * kRowTile, shared);
    more = rows.load(launch);
    sums.multiply(shared.stages + stage * kTile, shared.y + half * kRowTile);
    half ^= 1;
    stage = stage + 1 == Shape::kStages ? 0 : stage + 1;
    const int32_t layer = at.layer;
    at.advance<Shape>(launch);
    if (at.layer == layer) continue;
    sums.join(shared);
    store_results(shared, launch, block, launch.call.layers[layer]);
  }
}

template <class T, int kRows>
cudaError_t launch_kv_propagate(KvLaunch& kv, int device, cudaStream_t stream) {
  using Shape = KvShape<T, kRows>;
  static_assert(KvShared<Shape>::bytes() <= 98 * 1024, "what every device since 8.0 grants a block that asks");
  const KvPropagateParams& p = kv.call;
  kv.row_blocks = (p.rows + kRows - 1) / kRows;
  const int64_t blocks_of_layer = int64_t(2) * kv.tiles * kv.row_blocks;
  kv.groups = int32_t(max(int64_t(1), min(int64_t(p.count), (kKvBlocks + blocks_of_layer - 1) / blocks_of_layer)));
  if (blocks_of_layer * kv.groups > 0x7fffffff) return cudaErrorInvalidConfiguration;
  return launch(kv_propagate_kernel<Shape>, dim3(unsigned(blocks_of_layer * kv.groups)), dim3(kKvThreads),
                KvShared<Shape>::bytes(), device, stream, kv);
}

// The fewest rows of a block that hold all. Instantiated in kv/cuda/instantiations.
template <class T>
cudaError_t kv_propagate(KvLaunch& kv, int device, cudaStream_t stream) {
  if (kv.call.rows <= 8) return launch_kv_propagate<T, 8>(kv, device, stream);
  if (kv.call.rows <= 32) return launch_kv_propagate<T, 32>(kv, device, stream);
  return launch_kv_propagate<T, kKvMaxRows>(kv, device, stream);
}

}  // namespace specdec::cuda
