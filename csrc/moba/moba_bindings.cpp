// Block attention as Python sees it: addresses, sizes and strides in, nothing out. The only file of the op that knows
// pybind11.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "../bindings.h"
#include "../common/checks.h"
#include "../common/cpu_target.h"
#include "moba_cpu.h"
#if defined(TOPGATHER_HAVE_CUDA)
#include "moba_cuda.h"
#endif

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

int64_t integer(py::handle item) {
  const long long value = PyLong_AsLongLong(item.ptr());
  if (value == -1 && PyErr_Occurred() != nullptr) throw py::error_already_set();
  return value;
}

// (address, batch stride, head stride, row stride)
template <typename Tensor>
Tensor tensor(const py::tuple& fields) {
  require(fields.size() == 4, "a tensor is (address, batch stride, head stride, row stride)");
  return {reinterpret_cast<void*>(integer(fields[0])), integer(fields[1]), integer(fields[2]), integer(fields[3])};
}

// In the order of MobaProblem's fields.
MobaProblem problem(const py::tuple& fields) {
  require(fields.size() == 15, "a problem has 15 fields");
  MobaProblem result{};
  result.dtype = static_cast<Dtype>(integer(fields[0]));
  result.batch_size = integer(fields[1]);
  result.num_query_heads = integer(fields[2]);
  result.num_kv_heads = integer(fields[3]);
  result.query_len = integer(fields[4]);
  result.key_len = integer(fields[5]);
  result.head_dim = integer(fields[6]);
  result.value_dim = integer(fields[7]);
  result.block_size = integer(fields[8]);
  result.top_k = integer(fields[9]);
  result.is_causal = integer(fields[10]) != 0;
  result.scale = PyFloat_AsDouble(py::object(fields[11]).ptr());
  if (PyErr_Occurred() != nullptr) throw py::error_already_set();
  result.cu_seqlens_q = reinterpret_cast<const int64_t*>(integer(fields[12]));
  result.cu_seqlens_k = reinterpret_cast<const int64_t*>(integer(fields[13]));
  result.num_threads = static_cast<int>(integer(fields[14]));
  require(result.batch_size >= 0 && result.query_len >= 0 && result.key_len >= 0 && result.head_dim >= 0 &&
              result.value_dim >= 0,
          "sizes must not be negative");
  require(result.num_kv_heads >= 1 && result.num_query_heads >= 1 && result.num_query_heads % result.num_kv_heads == 0,
          "num_query_heads must be a multiple of num_kv_heads");
  require(result.block_size >= 1, "block_size must be at least 1");
  require(result.top_k >= 1, "top_k must be at least 1");
  require((result.cu_seqlens_q == nullptr) == (result.cu_seqlens_k == nullptr), "cu_seqlens must come in pairs");
  require(result.num_threads >= 1, "num_threads must be at least 1");
  return result;
}

void bind_cpu(py::module_& module) {
  module.def("moba_centroids_cpu", [](const py::tuple& p, const py::tuple& key, const py::tuple& centroids) {
    const CentroidParams params{problem(p), tensor<ConstTensor>(key), tensor<MutableTensor>(centroids)};
    const py::gil_scoped_release release;
    cpu_kernels().centroids(params);
  });
  module.def("moba_route_cpu",
             [](const py::tuple& p, const py::tuple& query, const py::tuple& key, const py::tuple& block_indices) {
               const MobaRouteParams params{problem(p), tensor<ConstTensor>(query), tensor<ConstTensor>(key),
                                            tensor<MutableTensor>(block_indices)};
               const py::gil_scoped_release release;
               cpu_kernels().route(params);
             });
  module.def("moba_forward_cpu",
             [](const py::tuple& p, const py::tuple& query, const py::tuple& key, const py::tuple& value,
                const py::tuple& block_indices, const py::tuple& out, const py::tuple& lse) {
               const MobaForwardParams params{problem(p),
                                              tensor<ConstTensor>(query),
                                              tensor<ConstTensor>(key),
                                              tensor<ConstTensor>(value),
                                              tensor<ConstTensor>(block_indices),
                                              tensor<MutableTensor>(out),
                                              tensor<MutableTensor>(lse)};
               const py::gil_scoped_release release;
               cpu_kernels().forward(params);
             });
  module.def("moba_backward_cpu",
             [](const py::tuple& p, const py::tuple& query, const py::tuple& key, const py::tuple& value,
                const py::tuple& block_indices, const py::tuple& out, const py::tuple& lse, const py::tuple& grad_out,
                const py::tuple& grad_lse, const py::tuple& grad_query, const py::tuple& grad_key,
                const py::tuple& grad_value) {
               const MobaBackwardParams params{problem(p),
                                               tensor<ConstTensor>(query),
                                               tensor<ConstTensor>(key),
                                               tensor<ConstTensor>(value),
                                               tensor<ConstTensor>(block_indices),
                                               tensor<ConstTensor>(out),
                                               tensor<ConstTensor>(lse),
                                               tensor<ConstTensor>(grad_out),
                                               tensor<ConstTensor>(grad_lse),
                                               tensor<MutableTensor>(grad_query),
                                               tensor<MutableTensor>(grad_key),
                                               tensor<MutableTensor>(grad_value)};
               const py::gil_scoped_release release;
               cpu_kernels().backward(params);
             });
}

#if defined(TOPGATHER_HAVE_CUDA)
void bind_cuda(py::module_& module) {
  module.def("moba_centroids_cuda",
             [](const py::tuple& p, const py::tuple& key, const py::tuple& centroids, int device, int64_t stream) {
               const CentroidParams params{problem(p), tensor<ConstTensor>(key), tensor<MutableTensor>(centroids)};
               const py::gil_scoped_release release;
               moba_centroids_cuda(params, {device, reinterpret_cast<void*>(stream)});
             });
}
#endif

}  // namespace

void bind_moba(py::module_& module) {
  bind_cpu(module);
#if defined(TOPGATHER_HAVE_CUDA)
  bind_cuda(module);
#endif
}

}  // namespace topgather
