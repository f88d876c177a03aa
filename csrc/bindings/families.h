// The families of ops that the module binds, each in a file of its own.
#pragma once

#include <pybind11/pybind11.h>

namespace specdec {

void bind_topology(pybind11::module_& m);
void bind_attention(pybind11::module_& m);
void bind_acceptance(pybind11::module_& m);
void bind_early_exit(pybind11::module_& m);
void bind_kv(pybind11::module_& m);

}  // namespace specdec
