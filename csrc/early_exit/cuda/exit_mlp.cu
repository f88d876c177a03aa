// The launcher of exit_mlp: how rows and units are cut into blocks, and how many rows a launch takes.
#include "early_exit/cuda/exit_mlp.cuh"

#include "early_exit/cuda/launchers.h"

namespace specdec::cuda {

extern template cudaError_t launch_exit_mlp<4>(const MlpLaunch&, int32_t, int, cudaStream_t);
extern template cudaError_t launch_exit_mlp<8>(const MlpLaunch&, int32_t, int, cudaStream_t);

namespace {

// Below this many weights the first layer is not worth many blocks.
constexpr int64_t kSmallLayer = 32768;
// A launch takes as many rows as this holds the parts of: 512 rows of 2048-1024-512-1.
constexpr int64_t kMlpScratchBytes = 64 << 20;

int32_t blocks_of(int64_t count, int64_t size) { return int32_t((count + size - 1) / size); }

// Fills in what the shapes decide. Returns how many blocks of rows a launch takes.
int32_t lay_out(MlpLaunch& launch) {
  const MlpParams& p = launch.call;
  const int32_t first_outputs = p.layers[0].outputs;
  launch.row_block = p.rows <= 16 ? 4 : 8;
  launch.row_blocks = blocks_of(p.rows, launch.row_block);
  launch.units = int64_t(p.inputs) * first_outputs <= kSmallLayer ? kMlpMaxUnits : kMlpUnits;
  launch.splits = p.count == 1 ? 1 : blocks_of(first_outputs, launch.units);
  launch.fan = 1;
  while (int64_t(launch.fan) * launch.fan < launch.splits) ++launch.fan;
  launch.wide = 1;
  for (int32_t at = 1; at < p.count; ++at) launch.wide = max(launch.wide, p.layers[at].outputs);
  const int64_t most = kMlpScratchBytes / (mlp_floats(launch) * int64_t(sizeof(float)));
  return int32_t(max(int64_t(1), min(most, int64_t(launch.row_blocks))));
}

}  // namespace

}  // namespace specdec::cuda

namespace specdec {

using namespace cuda;

CallScratch exit_mlp_scratch(const MlpLaunch& arguments) {
  MlpLaunch launch = arguments;
  const int64_t at_once = lay_out(launch);
  return {at_once * mlp_floats(launch) * int64_t(sizeof(float)), 1 + at_once * (mlp_groups(launch) + 1)};
}

cudaError_t exit_mlp_cuda(const MlpLaunch& arguments, int device, cudaStream_t stream) {
  if (arguments.call.rows == 0) return cudaSuccess;
  MlpLaunch launch = arguments;
  const int32_t at_once = lay_out(launch);
  for (launch.first_block = 0; launch.first_block < launch.row_blocks; launch.first_block += at_once) {
    const int64_t blocks = int64_t(min(at_once, launch.row_blocks - launch.first_block)) * launch.splits;
    if (blocks > 0x7fffffff) return cudaErrorInvalidConfiguration;
    const auto start = launch.row_block == 4 ? launch_exit_mlp<4> : launch_exit_mlp<8>;
    const cudaError_t error = start(launch, int32_t(blocks), device, stream);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace specdec
