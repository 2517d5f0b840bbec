// What crosses from Python into the kernels of grid and window attention, on every backend.
//
// An image has rows x columns tokens, cut into groups; each axis is cut on its own, and a group is a pair of an axis
// group of rows and one of columns. G = largest number of tokens of a group, D = head_dim. The sum type is float32, and
// float64 for float64. The last dimension of every tensor is contiguous.
#pragma once

#include "../common/array.h"
#include "../common/fields.h"

namespace topgather {

// How an axis is cut: token i of group g stands at g * group_step + i * token_step. Grid attention has group_step 1 and
// token_step the stride, window attention group_step the window and token_step 1.
struct GroupAxis {
  int64_t size;  // tokens of the axis
  int64_t num_groups;
  int64_t group_step;
  int64_t token_step;
  int64_t max_tokens;  // of a group

  constexpr int64_t tokens_of(int64_t group) const {
    const int64_t left = (size - group * group_step + token_step - 1) / token_step;
    return left < max_tokens ? left : max_tokens;
  }
};

struct GridProblem {
  bool is_window;
  int64_t rows_step;  // stride of a grid's tokens, or side of a window
  int64_t columns_step;
  double scale;
  int num_threads;
  // Derived from these and the tensors.
  Dtype dtype;
  int64_t batch_size;
  int64_t num_heads;
  int64_t head_dim;
  GroupAxis rows;
  GroupAxis columns;

  constexpr int64_t num_groups() const { return rows.num_groups * columns.num_groups; }
  constexpr int64_t max_tokens() const { return rows.max_tokens * columns.max_tokens; }
};
TOPGATHER_FIELDS(GridProblem, is_window, rows_step, columns_step, scale, num_threads)

using ConstImage = Array<const void, 5>;  // [batch, head, row, column, D] dtype
using MutableImage = Array<void, 5>;      // [batch, head, row, column, D] dtype

struct GridForwardParams {
  static constexpr const char* kAlignedOnCuda[] = {"query", "key", "value"};
  GridProblem problem;
  ConstImage query;
  ConstImage key;
  ConstImage value;
  Array<const void, 3> bias;  // [head, G, G] sum type, query first, contiguous; or data null
  MutableImage out;
  Array<void, 4> lse;            // [batch, head, row, column] sum type, contiguous
  Array<void, 5> softmax_terms;  // [batch, head, row, column, 2] sum type, contiguous, see softmax_terms.h
};
TOPGATHER_FIELDS(GridForwardParams, problem, query, key, value, bias, out, lse, softmax_terms)

struct GridBackwardParams {
  static constexpr const char* kAlignedOnCuda[] = {"query", "key", "value", "out", "grad_out"};
  GridProblem problem;
  ConstImage query;
  ConstImage key;
  ConstImage value;
  Array<const void, 3> bias;  // [head, G, G] sum type, query first, contiguous; or data null
  ConstImage out;
  Array<const void, 4> lse;  // [batch, head, row, column] sum type, contiguous
  ConstImage grad_out;
  Array<const void, 5> softmax_terms;  // [batch, head, row, column, 2] sum type, contiguous, or data null
  MutableImage grad_query;
  MutableImage grad_key;
  MutableImage grad_value;
  Array<void, 3> grad_bias;  // [head, G, G] sum type, contiguous; or data null
};
TOPGATHER_FIELDS(GridBackwardParams, problem, query, key, value, bias, out, lse, grad_out, softmax_terms, grad_query,
                 grad_key, grad_value, grad_bias)

}  // namespace topgather
