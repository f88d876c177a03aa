// Picks kv_commit's instantiation by how many bytes move at once.
#include "kv/cuda/kv_commit.cuh"

#include "kv/cuda/launchers.h"

namespace specdec {

using namespace cuda;

cudaError_t kv_commit_cuda(const KvCommitParams& p, int device, cudaStream_t stream) {
  KvCommitLaunch launched{p, 0};
  switch (unit_bytes(bits_in_use(p.layers, p.count))) {
    case 16:
      return kv_commit<16>(launched, device, stream);
    case 4:
      return kv_commit<4>(launched, device, stream);
    case 2:
      return kv_commit<2>(launched, device, stream);
    default:
      return kv_commit<1>(launched, device, stream);
  }
}

}  // namespace specdec
