// Moves accepted rows on a GPU, in one launch for K and V of up to 32 layers, and copies pages in one before it.
//
// A block has 128 columns of one layer's K or V and one request; a thread walks that request's path for its column, and
// makes the moves in their order: why that is right in place, without a barrier, is told in kv/places.h. It reads up to
// four moves before it writes the first of them, so that the way to memory is gone four at a time. All threads of a
// block walk the same path and read the same nodes and page table entries, which come from the first-level cache.
//
// Pages are copied column by column too, a thread making all copies of its column in their order, because a copy may
// read what an earlier one has written. They come in a launch of their own: a request's path may start in a page that
// is copied by other blocks.
//
// Bytes: a row that moves is read once and written once, 131 KB a token and direction with Llama-3-8B, so this is bound
// by the launch; rows that stay, and the rest of the cache, cost nothing.
#pragma once

#include "kv/cuda/cache_columns.cuh"

namespace specdec::cuda {

constexpr int kCommitThreads = 128;
constexpr int kMovesAtOnce = 4;

// A launch: the call, and how many blocks a row (or a page) of a request takes.
struct KvCommitLaunch {
  KvCommitParams call;
  int64_t blocks;
};

// Grid: (blocks of a page, K and V of each layer).
template <int kBytes>
__global__ void __launch_bounds__(kCommitThreads) kv_copy_pages_kernel(KvCommitLaunch launch) {
  using Unit = CacheUnit<kBytes>;
  const KvCommitParams& p = launch.call;
  const KvCacheLayer& layer = p.layers[blockIdx.y / 2];
  const CachePlane plane(layer, blockIdx.y % 2 != 0);
  const int64_t row = int64_t(layer.kv_heads) * (plane.head_bytes / kBytes);
  const int64_t unit = int64_t(blockIdx.x) * kCommitThreads + threadIdx.x;
  if (layer.max_pages < 0 || unit >= row * layer.page_size) return;
  char* const column = plane.cache + unit / row * plane.stride_slot + plane.offset<kBytes>(unit % row);
  for (int32_t i = 0; i < p.copy_count; ++i) {
    const int32_t source = p.copies[2 * i], target = p.copies[2 * i + 1];
    if (source < 0 || source >= layer.first || target < 0 || target >= layer.first) continue;
    Unit::store(column + target * plane.stride_first, Unit::load(column + source * plane.stride_first));
  }
}

// Grid: (blocks of a row of each request, K and V of each layer).
template <int kBytes>
__global__ void __launch_bounds__(kCommitThreads) kv_commit_kernel(KvCommitLaunch launch) {
  using Unit = CacheUnit<kBytes>;
  const KvCommitParams& p = launch.call;
  const KvCacheLayer& layer = p.layers[blockIdx.y / 2];
  const CachePlane plane(layer, blockIdx.y % 2 != 0);
  const int32_t request = int32_t(blockIdx.x / launch.blocks);
  const int64_t unit = blockIdx.x % launch.blocks * kCommitThreads + threadIdx.x;
  if (unit >= int64_t(layer.kv_heads) * (plane.head_bytes / kBytes)) return;
  const int64_t column = plane.offset<kBytes>(unit);
  KvPath path(p, layer, request);
  bool more = true;
  while (more) {
    char* to[kMovesAtOnce];
    typename Unit::Bits bits[kMovesAtOnce];
    int count = 0;
#pragma unroll
    for (int i = 0; i < kMovesAtOnce; ++i) {
      KvMove move;
      more = more && path.next(move);
      if (!more) continue;
      bits[i] = Unit::load(plane.at(move.from) + column);
      to[i] = plane.at(move.to) + column;
      count = i + 1;
    }
#pragma unroll
    for (int i = 0; i < kMovesAtOnce; ++i) {
      if (i < count) Unit::store(to[i], bits[i]);
    }
  }
}

template <int kBytes>
cudaError_t kv_commit(KvCommitLaunch& launched, int device, cudaStream_t stream) {
  const KvCommitParams& p = launched.call;
  const int64_t row = longest_row(p.layers, p.count) / kBytes;
  const auto blocks_of = [](int64_t units) { return (units + kCommitThreads - 1) / kCommitThreads; };
  const dim3 block(kCommitThreads);
  if (p.copy_count > 0) {
    int64_t slots = 0;
    for (int32_t i = 0; i < p.count; ++i) slots = slots > p.layers[i].page_size ? slots : p.layers[i].page_size;
    const int64_t blocks = blocks_of(row * slots);
    if (blocks > 0x7fffffff) return cudaErrorInvalidConfiguration;
    if (blocks > 0) {
      const cudaError_t error =
          launch(kv_copy_pages_kernel<kBytes>, dim3(unsigned(blocks), 2 * p.count), block, 0, device, stream, launched);
      if (error != cudaSuccess) return error;
    }
  }
  if (p.batch == 0 || p.steps == 0) return cudaSuccess;
  launched.blocks = blocks_of(row);
  if (launched.blocks * p.batch > 0x7fffffff) return cudaErrorInvalidConfiguration;
  return launch(kv_commit_kernel<kBytes>, dim3(unsigned(launched.blocks * p.batch), 2 * p.count), block, 0, device,
                stream, launched);
}

}  // namespace specdec::cuda
