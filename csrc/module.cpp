// The extension module: what was built, what runs, and every op's bindings.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings.h"
#include "common/cpu_target.h"
#include "common/native_call.h"
#include "cuda/device.h"

namespace py = pybind11;

PYBIND11_MODULE(_native, module) {
  using namespace topgather;
  module.doc() = "Compiled kernels of topgather. Takes addresses and strides; use the functions of topgather instead.";
  module.attr("compiler") = TOPGATHER_COMPILER;
  module.attr("build_type") = TOPGATHER_BUILD_TYPE;
#if defined(TOPGATHER_HAVE_CUDA)
  module.attr("has_cuda") = true;
#else
  module.attr("has_cuda") = false;
#endif
  module.def("cpu_target", [] { return name_of(cpu_target()); });
  module.def("set_cpu_target", &set_cpu_target);
  module.def("available_cpu_targets", [] {
    std::vector<std::string> names;
    for (const CpuTarget target : available_cpu_targets()) names.push_back(name_of(target));
    return names;
  });
  module.def("cuda_architectures", &cuda_architectures);
  module.def("cuda_toolkit", &cuda_toolkit);
  module.def("cuda_devices", &cuda_devices);
  add_native_calls(module.ptr());
  OpBindings::add_all(module.ptr());
}
