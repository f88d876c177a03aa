// Reads a call: two NamedTuples of Python, an op's arguments and its outputs, by the names of their fields.
//
// The tuples' types are those of specdec_ops/ops/*/contract.py. Tensors are whatever has PyTorch's data_ptr(), shape,
// stride() and dtype: this module is compiled against no framework. Nothing is checked here, the public ops have done
// so; a field that is missing, or that is no number where a number is read, is an error all the same.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include "acceptance/params.h"
#include "common/types.h"
#include "early_exit/params.h"
#include "linear/params.h"

namespace specdec {

namespace py = pybind11;

// What C++ knows of a dtype's name. The first three are those of DType, the first four those of HeadType.
enum class Element { kFloat32, kBFloat16, kFloat16, kInt8, kFloat8, kFloat8E5m2, kOther };

inline Element element_named(std::string_view name) {
  constexpr std::pair<std::string_view, Element> kNames[] = {
      {"float32", Element::kFloat32}, {"bfloat16", Element::kBFloat16},    {"float16", Element::kFloat16},
      {"int8", Element::kInt8},       {"float8_e4m3fn", Element::kFloat8}, {"float8_e5m2", Element::kFloat8E5m2}};
  for (const auto& [known, element] : kNames) {
    if (name == known) return element;
  }
  return Element::kOther;
}

// A dtype prints as torch.float32. Dtypes are few and live as long as the process: each is looked up once.
inline Element element_of(PyObject* dtype) {
  static auto& known = *new std::vector<std::pair<PyObject*, Element>>;
  for (const auto& [object, element] : known) {
    if (object == dtype) return element;
  }
  const std::string name = py::str(py::handle(dtype));
  known.emplace_back(py::handle(dtype).inc_ref().ptr(),
                     element_named(std::string_view(name).substr(name.rfind('.') + 1)));
  return known.back().second;
}

template <const char* kName>
PyObject* interned() {
  static PyObject* name = PyUnicode_InternFromString(kName);
  return name;
}

inline constexpr char kDataPtr[] = "data_ptr", kShape[] = "shape", kStride[] = "stride", kDtype[] = "dtype",
                      kItemSize[] = "itemsize";

// A tensor of a call, or None. It asks Python for each thing when that is first needed.
class Tensor {
 public:
  explicit Tensor(PyObject* object) : object_(object) {}

  explicit operator bool() const { return object_ != Py_None; }

  // nullptr for None, and where the tensor has no memory.
  void* address() const {
    if (object_ == Py_None) return nullptr;
    const auto address = py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(object_, interned<kDataPtr>()));
    if (!address) throw py::error_already_set();
    void* const pointer = PyLong_AsVoidPtr(address.ptr());
    if (pointer == nullptr && PyErr_Occurred()) throw py::error_already_set();
    return pointer;
  }

  int dims() { return shape().count; }
  // Of an axis; -1 is the last one.
  int64_t size(int axis) { return shape().at(axis); }
  // In elements.
  int64_t stride(int axis) { return strides().at(axis); }
  // The same, 0 where there is no tensor or only one along this axis, which then serves all.
  int64_t broadcast_stride(int axis) { return object_ == Py_None || size(axis) == 1 ? 0 : stride(axis); }

  int64_t elements() {
    int64_t product = 1;
    for (int axis = 0; axis < dims(); ++axis) product *= size(axis);
    return product;
  }

  Element element() const {
    const auto dtype = py::reinterpret_steal<py::object>(PyObject_GetAttr(object_, interned<kDtype>()));
    if (!dtype) throw py::error_already_set();
    return element_of(dtype.ptr());
  }
  // Bytes of an element, whatever its dtype.
  int64_t item_bytes() const {
    const auto size = py::reinterpret_steal<py::object>(PyObject_GetAttr(object_, interned<kItemSize>()));
    if (!size) throw py::error_already_set();
    return PyLong_AsLongLong(size.ptr());
  }
  DType dtype() const { return coded<DType>(Element::kFloat16); }
  HeadType head_type() const { return coded<HeadType>(Element::kInt8); }

 private:
  static constexpr int kMaxDims = 16;

  struct Extents {
    int count = -1;  // -1: not asked for yet
    std::array<int64_t, kMaxDims> values;

    void fill(py::object tuple) {
      if (!tuple) throw py::error_already_set();
      if (!PyTuple_Check(tuple.ptr()) || PyTuple_GET_SIZE(tuple.ptr()) > kMaxDims) {
        throw py::type_error("a tensor's shape and strides must be tuples of at most 16 integers");
      }
      count = int(PyTuple_GET_SIZE(tuple.ptr()));
      for (int axis = 0; axis < count; ++axis) {
        values[axis] = PyLong_AsLongLong(PyTuple_GET_ITEM(tuple.ptr(), axis));
        if (values[axis] == -1 && PyErr_Occurred()) throw py::error_already_set();
      }
    }
    int64_t at(int axis) const {
      const int from_start = axis < 0 ? axis + count : axis;
      if (from_start < 0 || from_start >= count) throw py::index_error("a tensor of a call has too few dimensions");
      return values[from_start];
    }
  };

  Extents& shape() {
    if (shape_.count < 0) {
      shape_.fill(py::reinterpret_steal<py::object>(PyObject_GetAttr(object_, interned<kShape>())));
    }
    return shape_;
  }
  Extents& strides() {
    if (strides_.count < 0) {
      strides_.fill(py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(object_, interned<kStride>())));
    }
    return strides_;
  }

  // The kernels' number for the dtype, the same as Element's. That of no tensor is 0.
  template <class Code>
  Code coded(Element last) const {
    if (object_ == Py_None) return Code{};
    const Element found = element();
    if (found > last) throw py::type_error("a tensor of a call has a dtype that its kernels don't take");
    return static_cast<Code>(found);
  }

  PyObject* object_;
  Extents shape_, strides_;
};

// A list of a call.
class List {
 public:
  explicit List(PyObject* object) : list_(py::reinterpret_steal<py::object>(PySequence_Fast(object, "not a list"))) {
    if (!list_) throw py::error_already_set();
  }
  int size() const { return int(PySequence_Fast_GET_SIZE(list_.ptr())); }
  PyObject* operator[](int index) const { return PySequence_Fast_GET_ITEM(list_.ptr(), index); }

 private:
  py::object list_;
};

// The name of a field in up to three parts. They are string literals: a part is told from another by its address.
struct Name {
  const char *stem, *prefix = "", *suffix = "";

  bool operator==(const Name& other) const {
    return stem == other.stem && prefix == other.prefix && suffix == other.suffix;
  }
  std::string text() const { return std::string(prefix) + stem + suffix; }
};

// Where the fields of a pair of tuple types are. Each name is looked up in them once.
class Layout {
 public:
  // Arguments come first, then outputs.
  void be_of(PyObject* arguments, PyObject* outputs) {
    if (Py_TYPE(arguments) == arguments_ && Py_TYPE(outputs) == outputs_) return;
    arguments_ = outputs_ = nullptr;
    names_.clear();
    known_.fill({});
    add_names(arguments);
    add_names(outputs);
    Py_XINCREF(Py_TYPE(arguments));  // kept for good, or another type might be made at the same address
    Py_XINCREF(Py_TYPE(outputs));
    arguments_ = Py_TYPE(arguments), outputs_ = Py_TYPE(outputs);
  }

  // The field's place, or -1.
  int find(Name name) {
    size_t place = (hash(name.stem) ^ hash(name.prefix) * 3 ^ hash(name.suffix) * 5) % known_.size();
    while (known_[place].name.stem != nullptr) {
      if (known_[place].name == name) return known_[place].index;
      place = (place + 1) % known_.size();
    }
    const int index = search(name.text());
    if (++count_ < known_.size()) known_[place] = {name, index};
    return index;
  }

  const std::vector<std::string>& names() const { return names_; }

 private:
  struct Known {
    Name name{nullptr};
    int index = -1;
  };

  void add_names(PyObject* tuple) {
    for (const py::handle name : py::handle(tuple).attr("_fields")) {
      const std::string text = py::cast<std::string>(name);
      if (search(text) >= 0) throw std::invalid_argument("a contract has two fields `" + text + "`");
      names_.push_back(text);
    }
    count_ = 0;
  }
  int search(const std::string& text) const {
    for (size_t index = 0; index < names_.size(); ++index) {
      if (names_[index] == text) return int(index);
    }
    return -1;
  }
  static size_t hash(const char* part) { return reinterpret_cast<uintptr_t>(part) * 0x9E3779B97F4A7C15u >> 32; }

  PyTypeObject *arguments_ = nullptr, *outputs_ = nullptr;
  std::vector<std::string> names_;
  std::array<Known, 256> known_;  // by hash, the next free place after it
  size_t count_ = 0;
};

// A call's arguments and outputs as one record.
class Call {
 public:
  Call(PyObject* arguments, PyObject* outputs, Layout& layout)
      : arguments_(arguments), outputs_(outputs), layout_(layout) {
    if (!PyTuple_Check(arguments) || !PyTuple_Check(outputs)) {
      throw py::type_error("a call takes two named tuples, its arguments and its outputs");
    }
    layout_.be_of(arguments, outputs);
    inputs_ = int(PyTuple_GET_SIZE(arguments));
  }

  // The field's value, or nullptr where the contract has no such field.
  PyObject* find(Name name) {
    const int index = layout_.find(name);
    if (index < 0) return nullptr;
    read_[size_t(index) / 64] |= uint64_t(1) << index % 64;
    return index < inputs_ ? PyTuple_GET_ITEM(arguments_, index) : PyTuple_GET_ITEM(outputs_, index - inputs_);
  }
  PyObject* operator[](const char* name) {
    PyObject* const value = find({name});
    if (value == nullptr) throw py::key_error(std::string("the contract has no field `") + name + "`");
    return value;
  }
  Tensor tensor(const char* name) { return Tensor((*this)[name]); }
  List list(const char* name) { return List((*this)[name]); }

  // The fields that nothing has read so far.
  std::vector<std::string> unread() const {
    std::vector<std::string> names;
    for (size_t index = 0; index < layout_.names().size(); ++index) {
      if ((read_[index / 64] >> index % 64 & 1) == 0) names.push_back(layout_.names()[index]);
    }
    return names;
  }

 private:
  PyObject *arguments_, *outputs_;
  Layout& layout_;
  int inputs_;
  std::array<uint64_t, 2> read_{};
};

// What a contract calls the values of an enum, in the order of their numbers. An enum without names is derived.
template <class Enum>
struct EnumNames {};
template <>
struct EnumNames<AcceptRule> {
  static constexpr std::string_view kAll[] = {"greedy",      "match", "recursive", "traversal",
                                              "target_only", "kseq",  "typical",   "longest"};
};
template <>
struct EnumNames<SampleDomain> {
  static constexpr std::string_view kAll[] = {"sample", "draft"};
};
template <>
struct EnumNames<ExitMeasure> {
  static constexpr std::string_view kAll[] = {"", "max_prob", "margin", "entropy"};
};
template <>
struct EnumNames<ExitLevel> {
  static constexpr std::string_view kAll[] = {"row", "any", "all"};
};
template <>
struct EnumNames<WeightType> {
  static constexpr std::string_view kAll[] = {"float32", "bfloat16", "float16", "int8", "q8_0", "q4_0", "q4_1"};
};
template <>
struct EnumNames<Activation> {
  static constexpr std::string_view kAll[] = {"none", "swiglu", "geglu"};
};

// What follows sets a field of a struct to a value of the contract.

template <class T, class = void>
struct HasNames : std::false_type {};
template <class T>
struct HasNames<T, std::void_t<decltype(EnumNames<T>::kAll)>> : std::true_type {};

template <class T>
struct IsPerRequest : std::false_type {};
template <class T>
struct IsPerRequest<PerRequest<T>> : std::true_type {};

template <class T>
T number_of(PyObject* value) {
  if (!PyLong_Check(value) && !(std::is_floating_point_v<T> && PyFloat_Check(value))) {  // nor a tensor of one element
    throw py::type_error(std::string("a kernel takes a number, not a ") + Py_TYPE(value)->tp_name);
  }
  if constexpr (std::is_floating_point_v<T>) {
    const double number = PyFloat_AsDouble(value);
    if (number == -1 && PyErr_Occurred()) throw py::error_already_set();
    return T(number);
  } else {
    const long long number = PyLong_AsLongLong(value);
    if (number == -1 && PyErr_Occurred()) throw py::error_already_set();
    return T(number);
  }
}

template <class Enum>
Enum enum_of(PyObject* value) {
  Py_ssize_t size = 0;
  const char* const text = PyUnicode_AsUTF8AndSize(value, &size);
  if (text == nullptr) throw py::error_already_set();
  int32_t number = 0;
  for (const std::string_view name : EnumNames<Enum>::kAll) {
    if (name == std::string_view(text, size_t(size))) return static_cast<Enum>(number);
    ++number;
  }
  throw py::value_error("no kernel knows `" + std::string(text) + "`");
}

// Structs in a struct, arrays of them and enums without names are for `derive`.
template <class T>
constexpr bool kIsBound = std::is_pointer_v<T> || std::is_arithmetic_v<std::remove_extent_t<T>> || HasNames<T>::value ||
                          IsPerRequest<T>::value;

template <class T>
void set_field(T& field, PyObject* value) {
  if constexpr (std::is_pointer_v<T>) {
    field = static_cast<T>(Tensor(value).address());
  } else if constexpr (std::is_array_v<T>) {  // zeros behind the end of the list
    const List list(value);
    for (int i = 0; i < int(std::extent_v<T>); ++i) {
      field[i] = i < list.size() ? number_of<std::remove_extent_t<T>>(list[i]) : std::remove_extent_t<T>{};
    }
  } else if constexpr (std::is_enum_v<T>) {
    field = enum_of<T>(value);
  } else {
    field = number_of<T>(value);
  }
}

}  // namespace specdec
