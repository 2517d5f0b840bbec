// What the bindings of an op stand on, and one function an op; module.cpp calls each.
#pragma once

#include <pybind11/pybind11.h>

#include "common/checks.h"
#include "common/native_call.h"
#if defined(TOPGATHER_HAVE_CUDA)
#include "cuda/native_call_cuda.h"
#endif

namespace topgather {

void bind_moba(pybind11::module_& module);
void bind_memory(pybind11::module_& module);
void bind_grid(pybind11::module_& module);
void bind_key_conv(pybind11::module_& module);
void bind_decode(pybind11::module_& module);

}  // namespace topgather
