// Picks gather_layer_kv's instantiation by how many bytes move at once.
#include "kv/cuda/gather_layer_kv.cuh"

#include "kv/cuda/launchers.h"

namespace specdec {

using namespace cuda;

cudaError_t gather_layer_kv_cuda(const GatherLayerKvParams& p, int device, cudaStream_t stream) {
  GatherLayerKvLaunch launched{p, 0};
  const uintptr_t out = reinterpret_cast<uintptr_t>(p.out) | uintptr_t(p.out_stride_row);
  switch (unit_bytes(bits_in_use(p.layers, p.count) | out)) {
    case 16:
      return gather_layer_kv<16>(launched, device, stream);
    case 4:
      return gather_layer_kv<4>(launched, device, stream);
    case 2:
      return gather_layer_kv<2>(launched, device, stream);
    default:
      return gather_layer_kv<1>(launched, device, stream);
  }
}

}  // namespace specdec
