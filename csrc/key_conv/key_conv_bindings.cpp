// The key convolution as Python sees it: addresses, sizes and strides in, nothing out.
#include "../bindings.h"
#include "../common/cpu_target.h"
#include "key_conv_arguments.h"
#include "key_conv_cpu.h"

namespace py = pybind11;

namespace topgather {
namespace {

const KeyConvCpuKernels& cpu_kernels() {
  switch (cpu_target()) {
#if defined(TOPGATHER_HAVE_X86_TARGETS)
    case CpuTarget::kAvx2: return avx2::kKeyConvCpuKernels;
    case CpuTarget::kAmx:  // nothing here multiplies on the matrix unit
    case CpuTarget::kAvx512: return avx512::kKeyConvCpuKernels;
#endif
    default: return baseline::kKeyConvCpuKernels;
  }
}

}  // namespace

void bind_key_conv(py::module_& module) {
  module.def("key_conv_forward_cpu", [](const py::tuple& problem, const py::tuple& key, const py::tuple& state,
                                        int64_t weight, const py::tuple& out) {
    const KeyConvForwardParams params = key_conv_forward_params_from(problem, key, state, weight, out);
    const py::gil_scoped_release release;
    cpu_kernels().forward(params);
  });
  module.def("key_conv_backward_cpu", [](const py::tuple& problem, const py::tuple& inputs, int64_t weight,
                                         const py::tuple& gradients, int64_t grad_weight) {
    const KeyConvBackwardParams params = key_conv_backward_params_from(problem, inputs, weight, gradients, grad_weight);
    const py::gil_scoped_release release;
    cpu_kernels().backward(params);
  });
#if defined(TOPGATHER_HAVE_CUDA)
  bind_key_conv_cuda(module);
#endif
}

}  // namespace topgather
