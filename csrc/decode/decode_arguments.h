// The tuples that Python hands over, turned into parameter structs. Shared by the CPU and the CUDA bindings.
#pragma once

#include "../common/checks.h"
#include "../common/python_arguments.h"
#include "decode_params.h"

namespace topgather {

// (address, page or batch stride, head stride, row stride)
template <typename Tensor>
Tensor decode_tensor_from(const pybind11::tuple& fields) {
  require(fields.size() == 4, "a tensor is (address, page or batch stride, head stride, row stride)");
  return {address_from<void*>(fields[0]), integer_from(fields[1]), integer_from(fields[2]), integer_from(fields[3])};
}

// In the order of DecodeProblem's fields.
inline DecodeProblem decode_problem_from(const pybind11::tuple& fields) {
  require(fields.size() == 17, "a problem has 17 fields");
  DecodeProblem problem{};
  problem.dtype = static_cast<Dtype>(integer_from(fields[0]));
  problem.batch_size = integer_from(fields[1]);
  problem.num_query_heads = integer_from(fields[2]);
  problem.num_kv_heads = integer_from(fields[3]);
  problem.query_len = integer_from(fields[4]);
  problem.head_dim = integer_from(fields[5]);
  problem.value_dim = integer_from(fields[6]);
  problem.block_size = integer_from(fields[7]);
  problem.page_size = integer_from(fields[8]);
  problem.num_pages = integer_from(fields[9]);
  problem.pages_per_sequence = integer_from(fields[10]);
  problem.top_k = integer_from(fields[11]);
  problem.scale = PyFloat_AsDouble(pybind11::object(fields[12]).ptr());
  if (PyErr_Occurred() != nullptr) throw pybind11::error_already_set();
  problem.seq_lens = address_from<const int32_t*>(fields[13]);
  problem.num_tokens = address_from<const int32_t*>(fields[14]);
  problem.page_table = address_from<const int32_t*>(fields[15]);
  problem.num_threads = static_cast<int>(integer_from(fields[16]));
  require(problem.batch_size >= 0 && problem.query_len >= 0 && problem.head_dim >= 1 && problem.value_dim >= 0,
          "sizes must not be negative, and head_dim at least 1");
  require(
      problem.num_kv_heads >= 1 && problem.num_query_heads >= 1 && problem.num_query_heads % problem.num_kv_heads == 0,
      "num_query_heads must be a multiple of num_kv_heads");
  require(problem.block_size >= 1 && problem.page_size >= 1, "block_size and page_size must be at least 1");
  require(problem.num_pages >= 0 && problem.pages_per_sequence >= 0, "numbers of pages must not be negative");
  // An empty table has no address.
  require(problem.batch_size == 0 || problem.page_table != nullptr ||
              (problem.num_pages == problem.batch_size && problem.pages_per_sequence == 1),
          "without a page table a sequence has one page");
  require(problem.page_table == nullptr || problem.page_size % problem.block_size == 0,
          "with a page table page_size must be a multiple of block_size");
  require(problem.top_k >= 1, "top_k must be at least 1");
  require(problem.num_threads >= 1, "num_threads must be at least 1");
  return problem;
}

// In the order of the structs' fields.
inline CacheAppendParams append_params_from(const pybind11::tuple& problem, const pybind11::tuple& key,
                                            const pybind11::tuple& value, const pybind11::tuple& key_pages,
                                            const pybind11::tuple& value_pages, const pybind11::tuple& centroids) {
  return {decode_problem_from(problem),
          decode_tensor_from<ConstTokens>(key),
          decode_tensor_from<ConstTokens>(value),
          decode_tensor_from<MutablePages>(key_pages),
          decode_tensor_from<MutablePages>(value_pages),
          decode_tensor_from<MutablePages>(centroids)};
}

inline DecodeRouteParams decode_route_params_from(const pybind11::tuple& problem, const pybind11::tuple& query,
                                                  const pybind11::tuple& centroids,
                                                  const pybind11::tuple& block_indices) {
  return {decode_problem_from(problem), decode_tensor_from<ConstTokens>(query),
          decode_tensor_from<ConstPages>(centroids), decode_tensor_from<MutableTokens>(block_indices)};
}

inline DecodeParams decode_params_from(const pybind11::tuple& problem, const pybind11::tuple& query,
                                       const pybind11::tuple& key_pages, const pybind11::tuple& value_pages,
                                       const pybind11::tuple& block_indices, const pybind11::tuple& out,
                                       const pybind11::tuple& lse) {
  return {decode_problem_from(problem),
          decode_tensor_from<ConstTokens>(query),
          decode_tensor_from<ConstPages>(key_pages),
          decode_tensor_from<ConstPages>(value_pages),
          decode_tensor_from<ConstTokens>(block_indices),
          decode_tensor_from<MutableTokens>(out),
          decode_tensor_from<MutableTokens>(lse)};
}

}  // namespace topgather
