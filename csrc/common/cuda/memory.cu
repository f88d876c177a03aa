// What outlives a call: memory, the driver's permissions, and the number of a stream.
#include "common/cuda/device.cuh"
#include "common/cuda/launch.h"
#include "common/cuda/shared_grants.h"

namespace specdec::cuda {

cudaError_t allow_shared_bytes(const void* kernel, int device, size_t bytes) {
  static auto& grants = *new SharedGrants;
  return grants.allow(kernel, device, bytes, [&] {
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes));
    if (error != cudaSuccess) cudaGetLastError();  // it is returned; the next launch must not find it
    return error;
  });
}

}  // namespace specdec::cuda

namespace specdec {

using namespace cuda;

// The legacy stream has the null handle, is never destroyed and can't be captured.
StreamState stream_state(cudaStream_t stream) {
  StreamState state{0, false};
  if (stream == nullptr) return state;
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  if (cudaStreamIsCapturing(stream, &status) != cudaSuccess) cudaGetLastError();  // the launch that follows tells why
  state.captured = status != cudaStreamCaptureStatusNone;
#if CUDART_VERSION >= 12000
  unsigned long long id = 0;
  if (cudaStreamGetId(stream, &id) == cudaSuccess) {
    state.id = id;
    return state;
  }
  cudaGetLastError();
#endif
  state.id = reinterpret_cast<uintptr_t>(stream);
  return state;
}

// A thread in relaxed mode may allocate whoever captures. The stream is of the fill alone, so waiting for it takes
// as long as the fill.
cudaError_t zeroed_memory(int device, size_t bytes, void** memory) {
  const DeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return guard.error();
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  cudaError_t error = cudaThreadExchangeStreamCaptureMode(&mode);
  if (error != cudaSuccess) return error;
  cudaStream_t stream = nullptr;
  error = cudaMalloc(memory, bytes);
  if (error == cudaSuccess) error = cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
  if (error == cudaSuccess) error = cudaMemsetAsync(*memory, 0, bytes, stream);
  if (error == cudaSuccess) error = cudaStreamSynchronize(stream);
  if (stream != nullptr) cudaStreamDestroy(stream);
  cudaThreadExchangeStreamCaptureMode(&mode);
  return error;
}

}  // namespace specdec
