// Block attention as Python sees it: addresses, sizes and strides in, nothing out. The CPU side; moba_cuda_bindings.cpp
// is the other.
#include <stdexcept>
#include <string>

#include "../bindings.h"
#include "../common/cpu_target.h"
#include "moba_arguments.h"
#include "moba_cpu.h"

namespace py = pybind11;

namespace topgather {

void throw_routing_fault(bool is_duplicate, int64_t head_idx, int64_t query, int64_t block) {
  const std::string place = " at query head " + std::to_string(head_idx) + ", query " + std::to_string(query);
  if (is_duplicate) {
    throw std::invalid_argument("block_indices names block " + std::to_string(block) + " more than once" + place +
                                "; each block may stand once per query");
  }
  throw std::out_of_range("block_indices holds " + std::to_string(block) + place +
                          "; allowed are -1 and the numbers of the sequence's key blocks");
}

namespace {

const MobaCpuKernels& cpu_kernels() {
  switch (cpu_target()) {
#if defined(TOPGATHER_HAVE_X86_TARGETS)
    case CpuTarget::kAvx2: return avx2::kMobaCpuKernels;
    case CpuTarget::kAvx512: return avx512::kMobaCpuKernels;
#if defined(TOPGATHER_HAVE_AMX)
    case CpuTarget::kAmx: return amx::kMobaCpuKernels;
#endif
#endif
    default: return baseline::kMobaCpuKernels;
  }
}

void bind_cpu(py::module_& module) {
  module.def("moba_centroids_cpu", [](const py::tuple& p, const py::tuple& key, const py::tuple& centroids) {
    const CentroidParams params{problem_from(p), tensor_from<ConstTensor>(key), tensor_from<MutableTensor>(centroids)};
    const py::gil_scoped_release release;
    cpu_kernels().centroids(params);
  });
  module.def("moba_route_cpu",
             [](const py::tuple& p, const py::tuple& query, const py::tuple& key, const py::tuple& block_indices) {
               const MobaRouteParams params{problem_from(p), tensor_from<ConstTensor>(query),
                                            tensor_from<ConstTensor>(key), tensor_from<MutableTensor>(block_indices)};
               const py::gil_scoped_release release;
               cpu_kernels().route(params);
             });
  module.def("moba_forward_cpu",
             [](const py::tuple& p, const py::tuple& query, const py::tuple& key, const py::tuple& value,
                const py::tuple& block_indices, const py::tuple& out, const py::tuple& lse) {
               const MobaForwardParams params = forward_params_from(p, query, key, value, block_indices, out, lse);
               const py::gil_scoped_release release;
               cpu_kernels().forward(params);
             });
  module.def("moba_backward_cpu",
             [](const py::tuple& p, const py::tuple& query, const py::tuple& key, const py::tuple& value,
                const py::tuple& block_indices, const py::tuple& out, const py::tuple& lse, const py::tuple& grad_out,
                const py::tuple& grad_lse, const py::tuple& grad_query, const py::tuple& grad_key,
                const py::tuple& grad_value) {
               const MobaBackwardParams params = backward_params_from(
                   p, query, key, value, block_indices, out, lse, grad_out, grad_lse, grad_query, grad_key, grad_value);
               const py::gil_scoped_release release;
               cpu_kernels().backward(params);
             });
}

}  // namespace

void bind_moba(py::module_& module) {
  bind_cpu(module);
#if defined(TOPGATHER_HAVE_CUDA)
  bind_moba_cuda(module);
#endif
}

}  // namespace topgather
