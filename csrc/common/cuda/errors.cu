// What a CUDA error means for someone who called an op, and whether a device can run the kernels at all.
#include <string>

#include "acceptance/cuda/launchers.h"
#include "topology/cuda/build_topology.cuh"

namespace specdec::cuda {

namespace {

// Whether this device has code for a kernel is asked of the runtime, which knows every rule of compatibility.
__global__ void any_kernel() {}

std::string compute_capability(int device) {
  int major = 0, minor = 0;
  if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess ||
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) != cudaSuccess) {
    cudaGetLastError();
    return "of unknown architecture";
  }
  return std::to_string(major) + "." + std::to_string(minor);
}

std::string not_built_for(int device) {
  const std::string capability = compute_capability(device);
  return "built for SM " SPECDEC_ARCHS ", this device is SM " + capability +
         "; rebuild with TORCH_CUDA_ARCH_LIST=" + capability;
}

}  // namespace

}  // namespace specdec::cuda

namespace specdec {

using namespace cuda;

std::string explain(cudaError_t error, int device) {
  switch (error) {
    case cudaErrorInsufficientDriver:
      return "no CUDA driver, or one that is older than CUDA " SPECDEC_CUDA;
    case cudaErrorNoDevice:
      return "the CUDA driver sees no device";
    case cudaErrorInvalidDevice:
      return "there is no CUDA device " + std::to_string(device);
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorInvalidDeviceFunction:
    case cudaErrorUnsupportedPtxVersion:
    case cudaErrorJitCompilationDisabled:
      return not_built_for(device);
    case cudaErrorInvalidValue:
      return "a size is beyond what the kernel takes (build_topology: " + std::to_string(kBuildTopologyMaxNodes) +
             " nodes; tree_attention: dims that are multiples of 16 up to 256, rows that start at multiples of 16 "
             "bytes; accept: a vocabulary of " +
             std::to_string(kAcceptMaxVocab) + "); use backend='triton' or 'torch'";
    default:
      return std::string(cudaGetErrorString(error)) + " (" + cudaGetErrorName(error) + "), on CUDA device " +
             std::to_string(device);
  }
}

std::string cuda_device_error(int device) {
  int count = 0;
  cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaSuccess && (device < 0 || device >= count)) error = cudaErrorInvalidDevice;
  if (error == cudaSuccess) {
    const DeviceGuard guard(device);
    cudaFuncAttributes attributes;
    error = guard.error() != cudaSuccess ? guard.error() : cudaFuncGetAttributes(&attributes, any_kernel);
  }
  if (error == cudaSuccess) return "";
  cudaGetLastError();  // the question was ours: leave no error behind for the caller's next launch
  return explain(error, device);
}

}  // namespace specdec
