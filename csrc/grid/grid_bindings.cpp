// Grid and window attention as Python sees them: addresses, sizes and strides in, nothing out.
#include "../bindings.h"
#include "../common/cpu_target.h"
#include "grid_arguments.h"
#include "grid_cpu.h"

namespace py = pybind11;

namespace topgather {
namespace {

const GridCpuKernels& cpu_kernels() {
  switch (cpu_target()) {
#if defined(TOPGATHER_HAVE_X86_TARGETS)
    case CpuTarget::kAvx2: return avx2::kGridCpuKernels;
    case CpuTarget::kAmx:  // nothing here multiplies on the matrix unit
    case CpuTarget::kAvx512: return avx512::kGridCpuKernels;
#endif
    default: return baseline::kGridCpuKernels;
  }
}

}  // namespace

void bind_grid(py::module_& module) {
  module.def("grid_forward_cpu", [](const py::tuple& problem, const py::tuple& query, const py::tuple& key,
                                    const py::tuple& value, int64_t bias, const py::tuple& out, int64_t lse) {
    const GridForwardParams params = grid_forward_params_from(problem, query, key, value, bias, out, lse);
    const py::gil_scoped_release release;
    cpu_kernels().forward(params);
  });
  module.def("grid_backward_cpu", [](const py::tuple& problem, const py::tuple& inputs, int64_t bias, int64_t lse,
                                     const py::tuple& gradients, int64_t grad_bias) {
    const GridBackwardParams params = grid_backward_params_from(problem, inputs, bias, lse, gradients, grad_bias);
    const py::gil_scoped_release release;
    cpu_kernels().backward(params);
  });
#if defined(TOPGATHER_HAVE_CUDA)
  bind_grid_cuda(module);
#endif
}

}  // namespace topgather
