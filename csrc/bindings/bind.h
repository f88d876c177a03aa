// What the files that bind kernels to Python share.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#ifdef SPECDEC_WITH_CUDA
#include "common/cuda/launch.h"
#endif

namespace specdec {

using Address = uintptr_t;

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

template <class MakeParams>
struct Bind;

// Binds `name_cpu(<the arguments of make>, threads)`, and, where CUDA is built, `name_cuda(<...>, device, stream)`.
template <class Params, class... Args>
struct Bind<Params (*)(Args...)> {
  static void cpu(pybind11::module_& m, const char* name, Params (*make)(Args...), void (*kernel)(const Params&, int)) {
    m.def(name, [make, kernel](Args... args, int threads) {
      const Params params = make(args...);
      pybind11::gil_scoped_release unlocked;
      kernel(params, threads);
    });
  }
#ifdef SPECDEC_WITH_CUDA
  static void cuda(pybind11::module_& m, const char* name, Params (*make)(Args...),
                   cudaError_t (*launch)(const Params&, int, cudaStream_t)) {
    m.def(name, [make, launch, name](Args... args, int device, Address stream) {
      const cudaError_t error = launch(make(args...), device, pointer<CUstream_st>(stream));
      if (error != cudaSuccess) throw std::runtime_error(std::string(name) + ": " + explain(error, device));
    });
  }
#endif
};

void bind_accept(pybind11::module_& m);  // bindings/acceptance.cpp
void bind_exit(pybind11::module_& m);    // bindings/early_exit.cpp
void bind_kv(pybind11::module_& m);      // bindings/kv.cpp

}  // namespace specdec
