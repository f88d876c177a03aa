// Work that several blocks share is finished by the one that arrives last: no block waits for another.
#pragma once

#include "common/cuda/block_team.cuh"
#include "common/cuda/device.cuh"

namespace specdec::cuda {

// Whether this block is the last of `blocks` to come here. What all of them wrote before is visible to the last one.
__device__ inline bool arrives_last(const BlockTeam& team, int32_t* counter, int32_t blocks) {
  SPECDEC_SHARED(int32_t, arrived, );
  device_fence();
  team.sync();
  if (team.rank == 0) arrived = atomic_add(counter, 1);
  team.sync();
  if (arrived != blocks - 1) return false;
  if (team.rank == 0) atomic_add(counter, -blocks);
  device_fence();
  return true;
}

}  // namespace specdec::cuda
