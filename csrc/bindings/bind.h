// Binds an op's kernels to Python: a struct of parameters is filled from a contract's fields of the same names.
//
// An op has a struct OpParams of plain fields (its params.h) and a contract of named tuples (its contract.py).
// `bind_call` sets every field that both have: a pointer gets the tensor's address, or nullptr for None; a number its
// value; an enum the value of that name; an array what is in the list; a PerRequest `x` the number `x` and the tensor
// `xs`. What the contract does not say in so many words, such as sizes, strides and dtypes, the op's own function
// `derive(params, call)` sets afterwards. So an option that a kernel reads is one field in each of the two.
//
// `derive` must not read what it has not set: see `left_over`.
//
// A family's file includes struct_fields/FAMILY.h too, which setup.py makes: it visits the fields of the structs.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <string_view>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "bindings/contract.h"
#include "common/cpu/float_state.h"
#include "common/cpu/interruption.h"

#ifdef SPECDEC_WITH_CUDA
#include "common/cuda/launch.h"
#endif

namespace specdec {

// Whether a field's name means something else in the contract: then `derive` sets it. An op may overload this.
template <class Params>
constexpr bool is_derived(const Params&, std::string_view) {
  return false;
}

// Sets the fields that the contract has too, by names that begin with `prefix` there.
template <class Params>
void bind_fields(Params& params, Call& call, const char* prefix = "") {
  for_each_field(params, [&](const char* name, auto& field) {
    using Field = std::remove_reference_t<decltype(field)>;
    if constexpr (kIsBound<Field>) {
      if (is_derived(params, name)) return;
      PyObject* const value = call.find({name, prefix});
      if (value == nullptr) return;
      if constexpr (IsPerRequest<Field>::value) {
        set_field(field.value, value);
        if (PyObject* const values = call.find({name, prefix, "s"})) set_field(field.values, values);
      } else {
        set_field(field, value);
      }
    }
  });
}

template <class Params>
Layout& layout_of() {
  static auto& layout = *new Layout;
  return layout;
}

template <class Params>
void bind_call(Params& params, Call& call) {
  bind_fields(params, call);
  derive(params, call);
}

// The parameters of a call, zero where neither the contract nor `derive` says anything.
template <class Params>
Params params_of(py::handle arguments, py::handle outputs) {
  Params params{};
  Call call(arguments.ptr(), outputs.ptr(), layout_of<Params>());
  bind_call(params, call);
  return params;
}

// A field of a struct, also of one in it: its name, where it is, how many bytes it has, and whether it is a pointer.
using FieldPlace = std::tuple<std::string, size_t, size_t, bool>;

template <class T>
void add_places(std::vector<FieldPlace>& places, const std::string& name, const char* begin, T& field) {
  if constexpr (std::is_array_v<T> && !std::is_arithmetic_v<std::remove_extent_t<T>>) {
    for (size_t i = 0; i < std::extent_v<T>; ++i) add_places(places, name + "." + std::to_string(i), begin, field[i]);
  } else if constexpr (IsPerRequest<T>::value) {
    add_places(places, name, begin, field.value);
    add_places(places, name + "s", begin, field.values);
  } else if constexpr (std::is_class_v<T>) {
    for_each_field(field, [&](const char* of, auto& inner) { add_places(places, name + "." + of, begin, inner); });
  } else {
    const size_t offset = size_t(reinterpret_cast<const char*>(&field) - begin);
    places.emplace_back(name, offset, sizeof(T), std::is_pointer_v<T>);
  }
}

template <class Params>
std::vector<FieldPlace> places_of() {
  std::vector<FieldPlace> places;
  Params params{};
  const char* const begin = reinterpret_cast<const char*>(&params);
  for_each_field(params, [&](const char* name, auto& field) { add_places(places, name, begin, field); });
  return places;
}

// What a call leaves unused: fields of the contract that nothing reads, and fields of the struct that nothing sets.
// The struct is filled twice over different bytes; a field that is set has the same ones both times.
template <class Params>
std::pair<std::vector<std::string>, std::vector<std::string>> left_over(py::handle arguments, py::handle outputs) {
  static_assert(std::is_trivially_copyable_v<Params>);
  const auto filled = [&](int byte, std::vector<std::string>* unread) {
    auto params = std::make_unique<Params>();
    std::memset(static_cast<void*>(params.get()), byte, sizeof(Params));
    Call call(arguments.ptr(), outputs.ptr(), layout_of<Params>());
    bind_call(*params, call);
    if (unread != nullptr) *unread = call.unread();
    return params;
  };
  std::vector<std::string> unread, unset;
  const auto zeros = filled(0, &unread), ones = filled(0xFF, nullptr);
  for (const auto& [name, offset, bytes, pointer] : places_of<Params>()) {
    const auto *a = reinterpret_cast<const char*>(zeros.get()), *b = reinterpret_cast<const char*>(ones.get());
    if (std::memcmp(a + offset, b + offset, bytes) != 0) unset.push_back(name);
  }
  return {unread, unset};
}

// Runs the program's signal handlers. One that raises, as that of Ctrl-C does, ends the call with what it has raised.
inline bool signal_has_raised() {
  const py::gil_scoped_acquire locked;
  return PyErr_CheckSignals() != 0;
}

// Binds an op's CPU kernel, and what tests ask of its parameters:
//   OP_cpu(arguments, outputs, threads)
//   OP_params(arguments, outputs) -> the struct's bytes
//   OP_fields() -> [FieldPlace]
//   OP_left_over(arguments, outputs) -> (unread fields of the contract, unset fields of the struct)
template <class Params>
void bind_op(py::module_& m, const std::string& op, void (*kernel)(const Params&, int)) {
  m.def((op + "_cpu").c_str(), [kernel, op](py::handle arguments, py::handle outputs, int threads) {
    const Params params = params_of<Params>(arguments, outputs);
    try {
      const py::gil_scoped_release unlocked;
      const cpu::IeeeArithmetic arithmetic;
      const cpu::Interruption interruption(&signal_has_raised);
      kernel(params, threads);
    } catch (const cpu::Interrupted&) {
      throw py::error_already_set();
    } catch (const std::bad_alloc&) {
      PyErr_SetString(PyExc_MemoryError, ("specdec_ops." + op + ": there is too little memory for this call").c_str());
      throw py::error_already_set();
    }
  });
  m.def((op + "_params").c_str(), [](py::handle arguments, py::handle outputs) {
    const Params params = params_of<Params>(arguments, outputs);
    return py::bytes(reinterpret_cast<const char*>(&params), sizeof(Params));
  });
  m.def((op + "_fields").c_str(), &places_of<Params>);
  m.def((op + "_left_over").c_str(), &left_over<Params>);
}

#ifdef SPECDEC_WITH_CUDA
// 1 where the device can't say: the launch that follows tells why.
inline int32_t multiprocessors_of(int device) {
  int count = 1;
  if (cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) == cudaSuccess) return count;
  cudaGetLastError();
  return 1;
}

// Binds an op's CUDA launcher: OP_cuda(arguments, outputs, memory, device, stream, path=0).
//
// What the call needs besides its tensors only the launcher knows: `memory(bytes, counters, stream_id, captured)` gets
// it from the caller, and returns the addresses of so many bytes, which may hold anything, and of so many int32
// counters, which are zero. `stream_id` is a number that no other stream of the process has or had, `captured` whether
// the call becomes a part of a graph. It is not called where nothing is needed. `path` is for tests: which of several
// ways a launcher takes.
template <class Params, class Launch>
void bind_cuda(py::module_& m, const std::string& op, CallScratch (*scratch)(const Launch&),
               cudaError_t (*launch)(const Launch&, int, cudaStream_t)) {
  const std::string name = op + "_cuda";
  m.def(
      name.c_str(),
      [scratch, launch, name](py::handle arguments, py::handle outputs, py::handle memory, int device, uintptr_t stream,
                              int path) {
        CallMemory given{};
        given.multiprocessors = multiprocessors_of(device);
        given.path = path;
        const Params params = params_of<Params>(arguments, outputs);
        const CallScratch needed = scratch == nullptr ? CallScratch{} : scratch(launch_of(params, given));
        if (needed.bytes > 0 || needed.counters > 0) {
          const StreamState state = stream_state(reinterpret_cast<cudaStream_t>(stream));
          const auto [bytes, counters] = py::cast<std::pair<uintptr_t, uintptr_t>>(
              memory(needed.bytes, needed.counters, state.id, state.captured));
          given.scratch = reinterpret_cast<uint8_t*>(bytes);
          given.counters = reinterpret_cast<int32_t*>(counters);
        }
        const cudaError_t error = launch(launch_of(params, given), device, reinterpret_cast<cudaStream_t>(stream));
        if (error != cudaSuccess) throw std::runtime_error(name + ": " + explain(error, device));
      },
      py::arg("arguments"), py::arg("outputs"), py::arg("memory"), py::arg("device"), py::arg("stream"),
      py::arg("path") = 0);
}
#endif

}  // namespace specdec
