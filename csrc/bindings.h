// One function an op; module.cpp calls each.
#pragma once

#include <pybind11/pybind11.h>

namespace topgather {

void bind_moba(pybind11::module_& module);
void bind_moba_cuda(pybind11::module_& module);  // called by bind_moba where CUDA is built

void bind_memory(pybind11::module_& module);

void bind_grid(pybind11::module_& module);
void bind_grid_cuda(pybind11::module_& module);  // called by bind_grid where CUDA is built

void bind_key_conv(pybind11::module_& module);

void bind_decode(pybind11::module_& module);
void bind_decode_cuda(pybind11::module_& module);  // called by bind_decode where CUDA is built

}  // namespace topgather
