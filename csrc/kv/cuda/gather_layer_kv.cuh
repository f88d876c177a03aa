// Gathers K and V of all layers into rows on a GPU, in one launch for up to 32 layers.
//
// A block has a tile of eight rows and 256 units of 16 bytes of one layer. Eight threads find where the rows' slots lie,
// then every thread reads its unit of all eight rows before it writes the first, so that eight reads are under way in
// each thread. Llama-3-8B's row of a layer is 4 KB, just one block's units; reads are pieces of 256 bytes, a head of K or
// V, and writes are whole rows of a layer.
//
// Bytes: every slot is read once and every row written once, 131 KB a token and direction with Llama-3-8B: memory's
// bandwidth is the roof. cat and stack move all of it twice.
#pragma once

#include "kv/cuda/cache_columns.cuh"

namespace specdec::cuda {

constexpr int kGatherThreads = 256;
constexpr int kGatherRows = 8;

// A launch: the call, and how many blocks the units of a row of a layer take.
struct GatherLayerKvLaunch {
  GatherLayerKvParams call;
  int64_t blocks;
};

// Grid: (unit blocks of each tile of rows, layers).
template <int kBytes>
__global__ void __launch_bounds__(kGatherThreads) gather_layer_kv_kernel(GatherLayerKvLaunch launch) {
  using Unit = CacheUnit<kBytes>;
  const GatherLayerKvParams& p = launch.call;
  const KvCacheLayer& layer = p.layers[blockIdx.y];
  SPECDEC_SHARED(KvCachePlace, places, [kGatherRows]);
  const int64_t first = blockIdx.x / launch.blocks * kGatherRows;
  if (threadIdx.x < kGatherRows) {
    const int64_t row = first + threadIdx.x;
    KvCachePlace place = {-1, 0};
    if (row < p.rows) {
      const int32_t request = p.requests != nullptr ? p.requests[row] : 0;
      if (request >= 0 && request < p.batch) place = cache_place(layer, request, p.slots[row]);
    }
    places[threadIdx.x] = place;
  }
  block_sync();

  const int64_t unit = blockIdx.x % launch.blocks * kGatherThreads + threadIdx.x;
  const int32_t k_units = layer.k_bytes / kBytes, units = k_units + layer.v_bytes / kBytes;  // of a head
  const int64_t width = int64_t(layer.kv_heads) * units;
  if (unit < width) {
    const int32_t within = int32_t(unit % units);
    const CachePlane plane(layer, within >= k_units);
    const int64_t column = unit / units * plane.stride_head + (within < k_units ? within : within - k_units) * kBytes;
    char* const out = static_cast<char*>(p.out) + first * p.out_stride_row + (blockIdx.y * width + unit) * kBytes;
    typename Unit::Bits bits[kGatherRows];
#pragma unroll
    for (int i = 0; i < kGatherRows; ++i) {
      bits[i] = {};
      if (places[i].first >= 0) bits[i] = Unit::load(plane.at(places[i]) + column);
    }
#pragma unroll
    for (int i = 0; i < kGatherRows; ++i) {
      if (first + i < p.rows) Unit::store(out + i * p.out_stride_row, bits[i]);
    }
  }
}

template <int kBytes>
cudaError_t gather_layer_kv(GatherLayerKvLaunch& launched, int device, cudaStream_t stream) {
  const GatherLayerKvParams& p = launched.call;
  const KvCacheLayer& l = p.layers[0];
  const int64_t units = int64_t(l.kv_heads) * (int64_t(l.k_bytes) + l.v_bytes) / kBytes;
  launched.blocks = (units + kGatherThreads - 1) / kGatherThreads;
  const int64_t blocks = launched.blocks * ((int64_t(p.rows) + kGatherRows - 1) / kGatherRows);
  if (blocks == 0) return cudaSuccess;
  if (blocks > 0x7fffffff) return cudaErrorInvalidConfiguration;
  return launch(gather_layer_kv_kernel<kBytes>, dim3(unsigned(blocks), p.count), dim3(kGatherThreads), 0, device,
                stream, launched);
}

}  // namespace specdec::cuda
