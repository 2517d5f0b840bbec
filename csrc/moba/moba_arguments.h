// The tuples that Python hands over, turned into parameter structs. Shared by the CPU and the CUDA bindings.
#pragma once

#include <pybind11/pybind11.h>

#include "../common/checks.h"
#include "../common/python_arguments.h"
#include "moba_params.h"

namespace topgather {

// (address, batch stride, head stride, row stride)
template <typename Tensor>
Tensor tensor_from(const pybind11::tuple& fields) {
  require(fields.size() == 4, "a tensor is (address, batch stride, head stride, row stride)");
  return {reinterpret_cast<void*>(integer_from(fields[0])), integer_from(fields[1]), integer_from(fields[2]),
          integer_from(fields[3])};
}

// In the order of MobaProblem's fields.
inline MobaProblem problem_from(const pybind11::tuple& fields) {
  require(fields.size() == 15, "a problem has 15 fields");
  MobaProblem result{};
  result.dtype = static_cast<Dtype>(integer_from(fields[0]));
  result.batch_size = integer_from(fields[1]);
  result.num_query_heads = integer_from(fields[2]);
  result.num_kv_heads = integer_from(fields[3]);
  result.query_len = integer_from(fields[4]);
  result.key_len = integer_from(fields[5]);
  result.head_dim = integer_from(fields[6]);
  result.value_dim = integer_from(fields[7]);
  result.block_size = integer_from(fields[8]);
  result.top_k = integer_from(fields[9]);
  result.is_causal = integer_from(fields[10]) != 0;
  result.scale = PyFloat_AsDouble(pybind11::object(fields[11]).ptr());
  if (PyErr_Occurred() != nullptr) throw pybind11::error_already_set();
  result.cu_seqlens_q = reinterpret_cast<const int64_t*>(integer_from(fields[12]));
  result.cu_seqlens_k = reinterpret_cast<const int64_t*>(integer_from(fields[13]));
  result.num_threads = static_cast<int>(integer_from(fields[14]));
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

// In the order of the structs' fields.
inline MobaForwardParams forward_params_from(const pybind11::tuple& problem, const pybind11::tuple& query,
                                             const pybind11::tuple& key, const pybind11::tuple& value,
                                             const pybind11::tuple& block_indices, const pybind11::tuple& out,
                                             const pybind11::tuple& lse) {
  return {problem_from(problem),           tensor_from<ConstTensor>(query),         tensor_from<ConstTensor>(key),
          tensor_from<ConstTensor>(value), tensor_from<ConstTensor>(block_indices), tensor_from<MutableTensor>(out),
          tensor_from<MutableTensor>(lse)};
}

inline MobaBackwardParams backward_params_from(const pybind11::tuple& problem, const pybind11::tuple& query,
                                               const pybind11::tuple& key, const pybind11::tuple& value,
                                               const pybind11::tuple& block_indices, const pybind11::tuple& out,
                                               const pybind11::tuple& lse, const pybind11::tuple& grad_out,
                                               const pybind11::tuple& grad_lse, const pybind11::tuple& grad_query,
                                               const pybind11::tuple& grad_key, const pybind11::tuple& grad_value) {
  return {problem_from(problem),
          tensor_from<ConstTensor>(query),
          tensor_from<ConstTensor>(key),
          tensor_from<ConstTensor>(value),
          tensor_from<ConstTensor>(block_indices),
          tensor_from<ConstTensor>(out),
          tensor_from<ConstTensor>(lse),
          tensor_from<ConstTensor>(grad_out),
          tensor_from<ConstTensor>(grad_lse),
          tensor_from<MutableTensor>(grad_query),
          tensor_from<MutableTensor>(grad_key),
          tensor_from<MutableTensor>(grad_value)};
}

}  // namespace topgather
