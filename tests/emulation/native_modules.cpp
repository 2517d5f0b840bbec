// The emulated stand-ins for topgather._native: the CUDA entry points, and the emulator's controls. One object serves
// both modules; they differ in what they are linked with.
#include "bindings.h"
#include "common/native_call.h"
#include "runtime/bindings.h"

namespace {

void fill(pybind11::module_& module, bool is_checked) {
  topgather::emulation::bind_emulation(module, is_checked);
  topgather::add_native_calls(module.ptr());
  topgather::OpBindings::add_all(module.ptr());
}

}  // namespace

PYBIND11_MODULE(_native_emulated, module) { fill(module, false); }
PYBIND11_MODULE(_native_emulated_checked, module) { fill(module, true); }
