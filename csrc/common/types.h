// What the plain structs of all families share. Each family has its own in params.h, for the CPU kernels, the CUDA
// launchers and the bindings.
//
// Everything here is framework-free: pointers, sizes, strides. Shapes are written with the same words as in the Python
// docstrings: batch, queries, nodes, heads, kv_heads, slots, pages, dim. Strides count elements, not bytes. The last
// dimension of every tensor is contiguous. Offsets are 64-bit, so that a view with more than 2^31 elements is safe.
#pragma once

#include <cstdint>

namespace specdec {

enum class DType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

constexpr int32_t kMaxEos = 8;  // ids of tokens that end a text, of one call

// A number that another thread may be writing while a call runs, against the rules. It is read once: what was checked
// is what is used, so that such a caller gets nonsense and no wild read.
template <class T>
#ifdef __CUDACC__
__host__ __device__ __forceinline__
#else
inline
#endif
    T read_once(const T* at) {
#ifdef __CUDA_ARCH__
  return *at;  // compilers for devices keep what they have read in a register
#else
  return *static_cast<const volatile T*>(at);
#endif
}

inline int64_t element_bytes(DType type) { return type == DType::kFloat32 ? 4 : 2; }

// What a call of a CUDA kernel needs of the caller.
struct CallScratch {
  int64_t bytes, counters;  // counters of 4 bytes
};

}  // namespace specdec
