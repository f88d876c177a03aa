// The Python module specdec_ops._C: the arguments and outputs of a call in, nothing out.
//
// The public ops have checked every argument. See bindings/bind.h for what the functions of an op take. CPU calls
// release the interpreter lock.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "attention/cpu/entry_points.h"
#include "bindings/shared_memory.h"
#include "common/cpu/benchmark_probes.h"
#include "common/cpu/build_info.h"
#include "common/cpu/isa.h"
#include "common/cpu/team_limit.h"
#ifdef SPECDEC_WITH_CUDA
#include "common/cuda/launch.h"
#endif

namespace py = pybind11;
using namespace specdec;

// One for each family of ops, in the file of that name.
namespace specdec {
void bind_topology(py::module_& m);
void bind_attention(py::module_& m);
void bind_acceptance(py::module_& m);
void bind_early_exit(py::module_& m);
void bind_kv(py::module_& m);
void bind_linear(py::module_& m);
}  // namespace specdec

namespace {

using Address = uintptr_t;

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of specdec_ops. Call them through the public ops.";
  m.def("build_info", [] {
    py::dict info;
    const BuildInfo built = build_info();
    info["version"] = built.version;
    info["compiler"] = built.compiler;
    info["cuda"] = built.cuda;
    info["archs"] = built.archs;
    info["left_out"] = built.left_out;
    return info;
  });
  m.def(
      "cpu_isa", [] { return cpu::isa_name(cpu::current_isa()); },
      "The instruction set that CPU kernels run with here.");
  m.def("cpu_vnni", &cpu::may_use_vnni, "Whether CPU kernels use AVX-512's dot products of bytes here.");
  m.def("allow_cpu_vnni", &cpu::allow_vnni, "Withholds them, or gives them back.");
  m.def("set_cpu_isa", &cpu::limit_isa, "Limits the instruction set; an empty name removes the limit.");
  py::class_<cpu::TeamLimit>(m, "TeamLimit", "How many threads calls get, after what was told of their teams.")
      .def(py::init<>())
      .def("threads", &cpu::TeamLimit::threads, py::arg("asked"), py::arg("now"))
      .def("note", &cpu::TeamLimit::note, py::arg("threads"), py::arg("waited"), py::arg("worked"), py::arg("now"));
  m.def(
      "read_bytes",
      [](Address address, size_t bytes, int threads, int streams, int ahead, bool nearest) {
        if (threads < 1 || streams < 1 || streams > kMaxReadStreams || ahead < 0)
          throw std::invalid_argument("read_bytes needs a thread, 1 to 16 streams and no negative distance");
        py::gil_scoped_release unlocked;
        return read_bytes(pointer<void>(address), bytes, {threads, streams, ahead, nearest});
      },
      "Reads a buffer once: the plain read that memory-bound kernels are judged against.", py::arg("address"),
      py::arg("bytes"), py::arg("threads"), py::arg("streams") = 1, py::arg("ahead") = 0, py::arg("nearest") = false);
  m.def(
      "multiply_adds",
      [](const std::string& isa, int64_t rounds, int threads) {
        py::gil_scoped_release unlocked;
        return multiply_adds(isa, rounds, std::max(threads, 1));
      },
      "Multiply-adds in registers; how many floating-point operations that was, 0 without that instruction set.");
  m.def(
      "evict_from_cache", [](Address address, size_t bytes) { return evict_from_cache(pointer<void>(address), bytes); },
      "Flushes a buffer from every cache; False where the processor can't.");

  m.def(
      "exp2_cpu",
      [](Address x, Address y, int64_t count, bool weights) {
        exp2_cpu(pointer<float>(x), pointer<float>(y), count, weights);
      },
      "The attention kernels' exponential, for the tests.");

  m.def("shared_memory", &shared_memory, "Two fields of a call that share memory, the first of which is written.");

  bind_topology(m);
  bind_attention(m);
  bind_acceptance(m);
  bind_early_exit(m);
  bind_kv(m);
  bind_linear(m);
#ifdef SPECDEC_WITH_CUDA
  m.def("cuda_device_error", &cuda_device_error, "Why this device can't run the compiled kernels, or an empty string.");
  m.def(
      "zeroed_memory",
      [](int device, size_t bytes) {
        void* memory = nullptr;
        const cudaError_t error = zeroed_memory(device, bytes, &memory);
        if (error != cudaSuccess) throw std::runtime_error("counters: " + explain(error, device));
        return reinterpret_cast<Address>(memory);
      },
      "The address of so many bytes of zeros on a device, which are never freed.");
#endif
}
