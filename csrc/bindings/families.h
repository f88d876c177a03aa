// The families of ops that the module binds, each in a file of its own.
#pragma once

#include <pybind11/pybind11.h>

namespace specdec {

void bind_accept(pybind11::module_& m);  // bindings/acceptance.cpp
void bind_exit(pybind11::module_& m);    // bindings/early_exit.cpp
void bind_kv(pybind11::module_& m);      // bindings/kv.cpp

}  // namespace specdec
