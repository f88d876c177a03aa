// Whether what a call writes shares memory with anything else of the call. An op that is not told of it gives garbage.
//
// A call's own outputs are new and need no look; those that a caller hands in, caches among them, get one in each call.
// It takes well under a microsecond: addresses first, and of those tensors alone that may reach into an output their
// sizes. Tensors whose ranges cross may still be apart, as K and V that take turns in one cache, or q, k and v that are
// columns of one product. That is decided by remainders: where all strides of both that are at least P are multiples of
// P, an element's address modulo P says in which part of a period it lies. What this can't tell apart counts as shared.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <utility>
#include <vector>

#include "bindings/contract.h"

namespace specdec {

inline constexpr char kNbytes[] = "nbytes", kIsContiguous[] = "is_contiguous";

// Where a tensor lies, in bytes.
class Span {
 public:
  Span(PyObject* tensor, int field) : tensor_(tensor), field_(field), begin_(address_of(tensor)) {}

  int field() const { return field_; }
  PyObject* object() const { return tensor_; }
  uintptr_t begin() const { return begin_; }
  // Behind the last byte.
  uintptr_t end() {
    measure();
    return end_;
  }
  bool is_empty() { return end() == begin_; }

  // Whether an element may lie where another one of the same tensor does.
  bool overlaps_itself() {
    measure();
    if (dense_) return false;
    std::array<std::pair<int64_t, int64_t>, kMaxDims> order;  // (stride, size)
    for (int i = 0; i < dims_; ++i) order[i] = {strides_[i], sizes_[i]};
    std::sort(order.begin(), order.begin() + dims_);
    int64_t reach = item_;  // of an index of the dimensions so far
    for (int i = 0; i < dims_; ++i) {
      if (order[i].second == 1) continue;
      if (order[i].first < reach) return true;
      reach += order[i].first * (order[i].second - 1);
    }
    return false;
  }

  bool lies_as(Span& other) {
    if (tensor_ == other.tensor_) return true;
    describe(), other.describe();
    return begin_ == other.begin_ && item_ == other.item_ && sizes_ == other.sizes_ && strides_ == other.strides_;
  }

  bool meets(Span& other) {
    if (begin_ >= other.end() || other.begin_ >= end()) return false;
    if (is_empty() || other.is_empty()) return false;
    describe(), other.describe();
    for (int i = 0; i < dims_; ++i)
      if (take_turns(other, strides_[i])) return false;
    for (int i = 0; i < other.dims_; ++i)
      if (take_turns(other, other.strides_[i])) return false;
    return true;
  }

 private:
  static constexpr int kMaxDims = 16;

  static uintptr_t address_of(PyObject* tensor) { return reinterpret_cast<uintptr_t>(Tensor(tensor).address()); }

  // Sets end_ and dense_.
  void measure() {
    if (measured_) return;
    measured_ = true;
    const auto contiguous =
        py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(tensor_, interned<kIsContiguous>()));
    if (!contiguous) throw py::error_already_set();
    dense_ = contiguous.ptr() == Py_True;
    if (dense_) {
      const auto bytes = py::reinterpret_steal<py::object>(PyObject_GetAttr(tensor_, interned<kNbytes>()));
      if (!bytes) throw py::error_already_set();
      end_ = begin_ + uintptr_t(PyLong_AsLongLong(bytes.ptr()));
      return;
    }
    describe();
    end_ = begin_ + uintptr_t(extent_below(INT64_MAX));
  }

  // Sets item_, and sizes and strides of the dimensions that have more than one index, in bytes.
  void describe() {
    if (dims_ >= 0) return;
    Tensor tensor(tensor_);
    item_ = tensor.item_bytes();
    dims_ = 0;
    sizes_.fill(0), strides_.fill(0);
    for (int axis = 0; axis < tensor.dims(); ++axis) {
      empty_ = empty_ || tensor.size(axis) == 0;
      if (tensor.size(axis) < 2) continue;
      sizes_[dims_] = tensor.size(axis), strides_[dims_] = tensor.stride(axis) * item_;
      ++dims_;
    }
  }

  // Bytes from the first element to behind the last one of those that the dimensions of strides below `period` reach.
  int64_t extent_below(int64_t period) const {
    if (empty_) return 0;
    int64_t bytes = item_;
    for (int i = 0; i < dims_; ++i)
      if (strides_[i] < period) bytes += strides_[i] * (sizes_[i] - 1);
    return bytes;
  }
  bool repeats_by(int64_t period) const {
    for (int i = 0; i < dims_; ++i)
      if (strides_[i] >= period && strides_[i] % period != 0) return false;
    return true;
  }
  bool take_turns(const Span& other, int64_t period) const {
    if (period <= 0 || !repeats_by(period) || !other.repeats_by(period)) return false;
    const int64_t own = extent_below(period), others = other.extent_below(period);
    const int64_t behind = int64_t((other.begin_ % uintptr_t(period) + uintptr_t(period) - begin_ % uintptr_t(period)) %
                                   uintptr_t(period));  // from this one's bytes to the other's, within a period
    return own <= behind && behind + others <= period;
  }

  PyObject* tensor_;
  int field_;
  uintptr_t begin_, end_ = 0;
  bool measured_ = false, dense_ = false, empty_ = false;
  int dims_ = -1;
  int64_t item_ = 0;
  std::array<int64_t, kMaxDims> sizes_, strides_;
};

// The tensors among a call's fields, numbered from `field` on; those of a list have its number.
inline void add_spans(std::vector<Span>& spans, PyObject* tuple, int field) {
  const auto add = [&](PyObject* value, int number) {
    if (value == Py_None || PyLong_Check(value) || PyFloat_Check(value) || PyUnicode_Check(value)) return;
    spans.emplace_back(value, number);
  };
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(tuple); ++i, ++field) {
    PyObject* const value = PyTuple_GET_ITEM(tuple, i);
    if (PyList_Check(value)) {
      for (Py_ssize_t j = 0; j < PyList_GET_SIZE(value); ++j) add(PyList_GET_ITEM(value, j), field);
    } else if (PyTuple_Check(value)) {
      for (Py_ssize_t j = 0; j < PyTuple_GET_SIZE(value); ++j) add(PyTuple_GET_ITEM(value, j), field);
    } else {
      add(value, field);
    }
  }
}

// The first two fields of a call that share memory, of which the first is written; both are the same where a tensor
// overlaps itself; None if there are none. Fields count from the first argument to the last output. `may_be` is a tuple
// with kOutput * output + argument for an output and an argument that may be one and the same tensor.
inline py::object shared_memory(py::handle arguments, py::handle outputs, py::handle may_be) {
  constexpr int kOutput = 1000;
  if (!PyTuple_Check(arguments.ptr()) || !PyTuple_Check(outputs.ptr()) || !PyTuple_Check(may_be.ptr())) {
    throw py::type_error("a call takes two named tuples, its arguments and its outputs");
  }
  std::vector<Span> read, written;
  read.reserve(32), written.reserve(16);
  add_spans(read, arguments.ptr(), 0);
  add_spans(written, outputs.ptr(), int(PyTuple_GET_SIZE(arguments.ptr())));
  const auto may_be_one = [&](const Span& output, const Span& input) {
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(may_be.ptr()); ++i)
      if (PyLong_AsLong(PyTuple_GET_ITEM(may_be.ptr(), i)) == kOutput * output.field() + input.field()) return true;
    return false;
  };
  uintptr_t high = 0;
  for (Span& output : written) {
    if (output.overlaps_itself()) return py::make_tuple(output.field(), output.field());
    high = std::max(high, output.end());
  }
  std::sort(written.begin(), written.end(), [](const Span& a, const Span& b) { return a.begin() < b.begin(); });
  for (size_t i = 0; i < written.size(); ++i) {
    for (size_t j = i + 1; j < written.size() && written[j].begin() < written[i].end(); ++j) {
      if (written[i].meets(written[j])) return py::make_tuple(written[i].field(), written[j].field());
    }
  }
  for (Span& input : read) {
    if (written.empty() || input.begin() >= high) continue;
    if (input.begin() < written.front().begin() && input.end() <= written.front().begin()) continue;
    for (Span& output : written) {
      if (input.begin() >= output.end() || output.begin() >= input.end()) continue;
      if (may_be_one(output, input) && output.lies_as(input)) continue;
      if (output.meets(input)) return py::make_tuple(output.field(), input.field());
    }
  }
  return py::none();
}

}  // namespace specdec
