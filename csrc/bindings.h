// One function an op; module.cpp calls each.
#pragma once

#include <pybind11/pybind11.h>

namespace topgather {

void bind_moba(pybind11::module_& module);

void bind_memory(pybind11::module_& module);

void bind_grid(pybind11::module_& module);

void bind_key_conv(pybind11::module_& module);

void bind_decode(pybind11::module_& module);

}  // namespace topgather
