// What crosses from Python into the kernels of grid and window attention, on every backend.
//
// An image has rows x columns tokens, cut into groups; each axis is cut on its own, and a group is a pair of an axis
// group of rows and one of columns. G = most tokens of a group, D = head_dim. The sum type is float32, and float64 for
// float64. Strides count elements; the last dimension of every tensor is contiguous.
#pragma once

#include <cstdint>

#include "../common/dtype.h"

namespace topgather {

// How an axis is cut: token i of group g stands at g * group_step + i * token_step. Grid attention has group_step 1 and
// token_step the stride, window attention group_step the window and token_step 1.
struct GroupAxis {
  int64_t size;  // tokens of the axis
  int64_t num_groups;
  int64_t group_step;
  int64_t token_step;
  int64_t most_tokens;  // of a group

  constexpr int64_t tokens_of(int64_t group) const {
    const int64_t left = (size - group * group_step + token_step - 1) / token_step;
    return left < most_tokens ? left : most_tokens;
  }
};

struct ConstImage {
  const void* data;
  int64_t batch_stride;
  int64_t head_stride;
  int64_t row_stride;
  int64_t column_stride;
};

struct MutableImage {
  void* data;
  int64_t batch_stride;
  int64_t head_stride;
  int64_t row_stride;
  int64_t column_stride;
};

struct GridProblem {
  Dtype dtype;
  int64_t batch_size;
  int64_t num_heads;
  int64_t head_dim;
  GroupAxis rows;
  GroupAxis columns;
  double scale;
  int num_threads;

  constexpr int64_t num_groups() const { return rows.num_groups * columns.num_groups; }
  constexpr int64_t most_tokens() const { return rows.most_tokens * columns.most_tokens; }
};

struct GridForwardParams {
  GridProblem problem;
  ConstImage query;  // [batch, head, row, column, D] dtype
  ConstImage key;    // [batch, head, row, column, D] dtype
  ConstImage value;  // [batch, head, row, column, D] dtype
  const void* bias;  // [head, G, G] sum type, query first; or null
  MutableImage out;  // [batch, head, row, column, D] dtype
  void* lse;         // [batch, head, row, column] sum type, contiguous
};

struct GridBackwardParams {
  GridProblem problem;
  ConstImage query;         // [batch, head, row, column, D] dtype
  ConstImage key;           // [batch, head, row, column, D] dtype
  ConstImage value;         // [batch, head, row, column, D] dtype
  const void* bias;         // [head, G, G] sum type, query first; or null
  ConstImage out;           // [batch, head, row, column, D] dtype
  const void* lse;          // [batch, head, row, column] sum type, contiguous
  ConstImage grad_out;      // [batch, head, row, column, D] dtype
  MutableImage grad_query;  // [batch, head, row, column, D] dtype
  MutableImage grad_key;    // [batch, head, row, column, D] dtype
  MutableImage grad_value;  // [batch, head, row, column, D] dtype
  void* grad_bias;          // [head, G, G] sum type; or null
};

}  // namespace topgather
