// The tuples that Python hands over, turned into parameter structs. Shared by the CPU and the CUDA bindings.
#pragma once

#include "../common/checks.h"
#include "../common/python_arguments.h"
#include "memory_params.h"

namespace topgather {

// (address, stride of rows)
struct RowsArgument {
  void* data;
  int64_t stride;
};

inline RowsArgument rows_from(const pybind11::tuple& fields) {
  require(fields.size() == 2, "rows are (address, stride)");
  return {address_from<void*>(fields[0]), integer_from(fields[1])};
}

// In the order of the struct's fields.
inline ProductKeyParams product_key_params_from(const pybind11::tuple& fields) {
  require(fields.size() == 16, "product keys have 16 fields");
  ProductKeyParams params{};
  params.dtype = static_cast<Dtype>(integer_from(fields[0]));
  params.num_tokens = integer_from(fields[1]);
  params.num_heads = integer_from(fields[2]);
  params.num_keys = integer_from(fields[3]);
  params.half_dim = integer_from(fields[4]);
  params.top_k = integer_from(fields[5]);
  params.num_threads = static_cast<int>(integer_from(fields[6]));
  params.query = address_from<const void*>(fields[7]);
  params.query_token_stride = integer_from(fields[8]);
  params.query_head_stride = integer_from(fields[9]);
  params.keys = address_from<const void*>(fields[10]);
  params.keys_head_stride = integer_from(fields[11]);
  params.keys_half_stride = integer_from(fields[12]);
  params.keys_row_stride = integer_from(fields[13]);
  params.scores = address_from<void*>(fields[14]);
  params.indices = address_from<int64_t*>(fields[15]);
  require(params.num_tokens >= 0 && params.num_heads >= 0, "sizes must not be negative");
  require(params.num_keys >= 1 && params.num_keys <= 46340, "num_keys must be between 1 and 46340");
  require(params.half_dim >= 1, "half_dim must be at least 1");
  require(params.top_k >= 1 && params.top_k <= params.num_keys * params.num_keys,
          "top_k must be between 1 and num_keys^2");
  require(params.num_threads >= 1, "num_threads must be at least 1");
  return params;
}

// In the order of the struct's fields.
inline MemoryProblem memory_problem_from(const pybind11::tuple& fields) {
  require(fields.size() == 6, "a problem has 6 fields");
  MemoryProblem problem{};
  problem.dtype = static_cast<Dtype>(integer_from(fields[0]));
  problem.num_rows = integer_from(fields[1]);
  problem.row_dim = integer_from(fields[2]);
  problem.num_tokens = integer_from(fields[3]);
  problem.bag_size = integer_from(fields[4]);
  problem.num_threads = static_cast<int>(integer_from(fields[5]));
  require(problem.num_rows >= 0 && problem.num_rows <= INT32_MAX - 1 && problem.row_dim >= 0 &&
              problem.num_tokens >= 0 && problem.bag_size >= 0,
          "sizes must not be negative, and rows at most 2^31 - 2");
  require(problem.num_threads >= 1, "num_threads must be at least 1");
  return problem;
}

inline MemoryLookupParams lookup_params_from(const pybind11::tuple& problem, const pybind11::tuple& values,
                                             int64_t indices, int64_t weights, int64_t out) {
  const RowsArgument rows = rows_from(values);
  return {memory_problem_from(problem),
          rows.data,
          rows.stride,
          reinterpret_cast<const int64_t*>(indices),
          reinterpret_cast<const void*>(weights),
          reinterpret_cast<void*>(out)};
}

inline MemoryDotParams dot_params_from(const pybind11::tuple& problem, const pybind11::tuple& values, int64_t indices,
                                       const pybind11::tuple& x, int64_t out) {
  const RowsArgument rows = rows_from(values), x_rows = rows_from(x);
  return {memory_problem_from(problem),
          rows.data,
          rows.stride,
          reinterpret_cast<const int64_t*>(indices),
          x_rows.data,
          x_rows.stride,
          reinterpret_cast<void*>(out)};
}

inline MemoryBackwardParams backward_params_from(const pybind11::tuple& problem, const pybind11::tuple& values,
                                                 const pybind11::tuple& sorted, int64_t weights,
                                                 const pybind11::tuple& grad_out, int64_t num_targets,
                                                 int64_t grad_rows, int64_t grad_weights) {
  require(sorted.size() == 3, "sorted entries are (order, sorted_rows, targets)");
  const RowsArgument rows = rows_from(values), grad = rows_from(grad_out);
  MemoryBackwardParams params{};
  params.problem = memory_problem_from(problem);
  params.values = rows.data;
  params.values_stride = rows.stride;
  params.order = address_from<const int64_t*>(sorted[0]);
  params.sorted_rows = address_from<const int32_t*>(sorted[1]);
  params.targets = address_from<const int32_t*>(sorted[2]);
  params.weights = reinterpret_cast<const void*>(weights);
  params.grad_out = grad.data;
  params.grad_out_stride = grad.stride;
  params.num_targets = num_targets;
  params.grad_rows = reinterpret_cast<void*>(grad_rows);
  params.grad_weights = reinterpret_cast<void*>(grad_weights);
  require(num_targets >= 0 && num_targets <= INT32_MAX, "num_targets must fit 31 bits");
  const bool is_table_empty = params.problem.num_rows == 0 || params.problem.row_dim == 0;
  require(params.grad_weights == nullptr || params.values != nullptr || is_table_empty, "grad_weights needs values");
  return params;
}

}  // namespace topgather
