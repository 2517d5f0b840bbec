// The tuples that Python hands over, turned into parameter structs. Shared by the CPU and the CUDA bindings.
#pragma once

#include "../common/checks.h"
#include "../common/python_arguments.h"
#include "grid_params.h"

namespace topgather {

// (address, batch stride, head stride, row stride, column stride)
template <typename Image>
Image image_from(const pybind11::tuple& fields) {
  require(fields.size() == 5, "an image is (address, batch stride, head stride, row stride, column stride)");
  return {address_from<void*>(fields[0]), integer_from(fields[1]), integer_from(fields[2]), integer_from(fields[3]),
          integer_from(fields[4])};
}

inline GroupAxis axis_from(const pybind11::tuple& fields) {
  require(fields.size() == 5, "an axis has 5 fields");
  const GroupAxis axis{integer_from(fields[0]), integer_from(fields[1]), integer_from(fields[2]),
                       integer_from(fields[3]), integer_from(fields[4])};
  require(
      axis.size >= 0 && axis.num_groups >= 0 && axis.group_step >= 1 && axis.token_step >= 1 && axis.most_tokens >= 0,
      "an axis must have steps of at least 1 and sizes that are not negative");
  return axis;
}

// In the order of GridProblem's fields.
inline GridProblem grid_problem_from(const pybind11::tuple& fields) {
  require(fields.size() == 8, "a problem has 8 fields");
  GridProblem problem{};
  problem.dtype = static_cast<Dtype>(integer_from(fields[0]));
  problem.batch_size = integer_from(fields[1]);
  problem.num_heads = integer_from(fields[2]);
  problem.head_dim = integer_from(fields[3]);
  problem.rows = axis_from(fields[4].cast<pybind11::tuple>());
  problem.columns = axis_from(fields[5].cast<pybind11::tuple>());
  problem.scale = PyFloat_AsDouble(pybind11::object(fields[6]).ptr());
  if (PyErr_Occurred() != nullptr) throw pybind11::error_already_set();
  problem.num_threads = static_cast<int>(integer_from(fields[7]));
  require(problem.batch_size >= 0 && problem.num_heads >= 0 && problem.head_dim >= 1,
          "sizes must not be negative, and head_dim at least 1");
  require(problem.num_threads >= 1, "num_threads must be at least 1");
  return problem;
}

inline GridForwardParams grid_forward_params_from(const pybind11::tuple& problem, const pybind11::tuple& query,
                                                  const pybind11::tuple& key, const pybind11::tuple& value,
                                                  int64_t bias, const pybind11::tuple& out, int64_t lse) {
  return {grid_problem_from(problem),    image_from<ConstImage>(query),       image_from<ConstImage>(key),
          image_from<ConstImage>(value), reinterpret_cast<const void*>(bias), image_from<MutableImage>(out),
          reinterpret_cast<void*>(lse)};
}

// `inputs` are query, key, value, out and grad_out, `gradients` those of query, key and value.
inline GridBackwardParams grid_backward_params_from(const pybind11::tuple& problem, const pybind11::tuple& inputs,
                                                    int64_t bias, int64_t lse, const pybind11::tuple& gradients,
                                                    int64_t grad_bias) {
  require(inputs.size() == 5 && gradients.size() == 3, "five inputs and three gradients");
  const auto input = [&](size_t i) { return image_from<ConstImage>(inputs[i].cast<pybind11::tuple>()); };
  const auto gradient = [&](size_t i) { return image_from<MutableImage>(gradients[i].cast<pybind11::tuple>()); };
  return {grid_problem_from(problem),
          input(0),
          input(1),
          input(2),
          reinterpret_cast<const void*>(bias),
          input(3),
          reinterpret_cast<const void*>(lse),
          input(4),
          gradient(0),
          gradient(1),
          gradient(2),
          reinterpret_cast<void*>(grad_bias)};
}

}  // namespace topgather
