// Memory layers as Python sees them: addresses, sizes and strides in, nothing out.
#include "../bindings.h"
#include "../common/cpu_target.h"
#include "memory_arguments.h"
#include "memory_cpu.h"

namespace py = pybind11;

namespace topgather {
namespace {

const MemoryCpuKernels& cpu_kernels() {
  switch (cpu_target()) {
#if defined(TOPGATHER_HAVE_X86_TARGETS)
    case CpuTarget::kAvx2: return avx2::kMemoryCpuKernels;
    case CpuTarget::kAmx:  // nothing here multiplies on the matrix unit
    case CpuTarget::kAvx512: return avx512::kMemoryCpuKernels;
#endif
    default: return baseline::kMemoryCpuKernels;
  }
}

void bind_cpu(py::module_& module) {
  module.def("product_key_topk_cpu", [](const py::tuple& fields) {
    const ProductKeyParams params = product_key_params_from(fields);
    const py::gil_scoped_release release;
    cpu_kernels().product_key_topk(params);
  });
  module.def("memory_lookup_cpu",
             [](const py::tuple& problem, const py::tuple& values, int64_t indices, int64_t weights, int64_t out) {
               const MemoryLookupParams params = lookup_params_from(problem, values, indices, weights, out);
               const py::gil_scoped_release release;
               cpu_kernels().lookup(params);
             });
  module.def("memory_dot_cpu",
             [](const py::tuple& problem, const py::tuple& values, int64_t indices, const py::tuple& x, int64_t out) {
               const MemoryDotParams params = dot_params_from(problem, values, indices, x, out);
               const py::gil_scoped_release release;
               cpu_kernels().dot(params);
             });
  module.def("memory_backward_cpu", [](const py::tuple& problem, const py::tuple& values, const py::tuple& sorted,
                                       int64_t weights, const py::tuple& grad_out, int64_t num_targets,
                                       int64_t grad_rows, int64_t grad_weights) {
    const MemoryBackwardParams params =
        backward_params_from(problem, values, sorted, weights, grad_out, num_targets, grad_rows, grad_weights);
    const py::gil_scoped_release release;
    cpu_kernels().backward(params);
  });
}

}  // namespace

void bind_memory(py::module_& module) {
  bind_cpu(module);
#if defined(TOPGATHER_HAVE_CUDA)
  bind_memory_cuda(module);
#endif
}

}  // namespace topgather
