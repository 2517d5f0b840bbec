// What both kinds of emulated modules share.
#pragma once

#include <pybind11/pybind11.h>

namespace topgather::emulation {

// set_options, options, statistics, recording.
void bind_emulation(pybind11::module_& module, bool is_checked);

}  // namespace topgather::emulation
