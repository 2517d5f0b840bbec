// The tuples that Python hands over, turned into parameter structs. Shared by the CPU and the CUDA bindings.
#pragma once

#include "../common/checks.h"
#include "../common/python_arguments.h"
#include "key_conv_params.h"

namespace topgather {

// (address, batch stride, head stride, row stride)
template <typename Keys>
Keys keys_from(const pybind11::tuple& fields) {
  require(fields.size() == 4, "keys are (address, batch stride, head stride, row stride)");
  return {address_from<void*>(fields[0]), integer_from(fields[1]), integer_from(fields[2]), integer_from(fields[3])};
}

// In the order of KeyConvProblem's fields.
inline KeyConvProblem key_conv_problem_from(const pybind11::tuple& fields) {
  require(fields.size() == 10, "a problem has 10 fields");
  KeyConvProblem problem{};
  problem.dtype = static_cast<Dtype>(integer_from(fields[0]));
  problem.weight_dtype = static_cast<Dtype>(integer_from(fields[1]));
  problem.batch_size = integer_from(fields[2]);
  problem.num_heads = integer_from(fields[3]);
  problem.num_tokens = integer_from(fields[4]);
  problem.head_dim = integer_from(fields[5]);
  problem.kernel_width = integer_from(fields[6]);
  problem.cu_seqlens = address_from<const int64_t*>(fields[7]);
  problem.num_sequences = integer_from(fields[8]);
  problem.num_threads = static_cast<int>(integer_from(fields[9]));
  require(problem.batch_size >= 0 && problem.num_heads >= 0 && problem.num_tokens >= 0 && problem.head_dim >= 1 &&
              problem.num_sequences >= 0,
          "sizes must not be negative, and head_dim at least 1");
  require(problem.kernel_width >= 2 && problem.kernel_width <= 8, "kernel_width must be between 2 and 8");
  require(problem.cu_seqlens == nullptr || problem.batch_size == 1, "a packed problem has a batch_size of 1");
  require(problem.num_threads >= 1, "num_threads must be at least 1");
  return problem;
}

inline KeyConvForwardParams key_conv_forward_params_from(const pybind11::tuple& problem, const pybind11::tuple& key,
                                                         const pybind11::tuple& state, int64_t weight,
                                                         const pybind11::tuple& out) {
  return {key_conv_problem_from(problem), keys_from<ConstKeys>(key), keys_from<ConstKeys>(state),
          reinterpret_cast<const void*>(weight), keys_from<MutableKeys>(out)};
}

// `inputs` are grad_out, key and state, `gradients` those of key and state.
inline KeyConvBackwardParams key_conv_backward_params_from(const pybind11::tuple& problem,
                                                           const pybind11::tuple& inputs, int64_t weight,
                                                           const pybind11::tuple& gradients, int64_t grad_weight) {
  require(inputs.size() == 3 && gradients.size() == 2, "three inputs and two gradients");
  const auto input = [&](size_t i) { return keys_from<ConstKeys>(inputs[i].cast<pybind11::tuple>()); };
  const auto gradient = [&](size_t i) { return keys_from<MutableKeys>(gradients[i].cast<pybind11::tuple>()); };
  return {key_conv_problem_from(problem),        input(0),    input(1),    input(2),
          reinterpret_cast<const void*>(weight), gradient(0), gradient(1), reinterpret_cast<void*>(grad_weight)};
}

}  // namespace topgather
