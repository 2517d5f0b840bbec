// What crosses from Python into the kernels of memory layers, on every backend.
//
// T = tokens (bags of a lookup), H = heads, n = keys of a half, D = head_dim of a query (two halves), K = entries of a
// token, W = width of a row. The sum type is float32, and float64 for float64. Strides count elements; the last
// dimension of every tensor is contiguous, and tensors without a stride are contiguous altogether.
#pragma once

#include <cstdint>

#include "../common/dtype.h"

namespace topgather {

struct ProductKeyParams {
  Dtype dtype;  // of query and keys
  int64_t num_tokens;
  int64_t num_heads;
  int64_t num_keys;  // of a half
  int64_t half_dim;
  int64_t top_k;
  int num_threads;
  const void* query;  // [T, H, D] dtype
  int64_t query_token_stride;
  int64_t query_head_stride;
  const void* keys;  // [H, 2, n, D / 2] dtype
  int64_t keys_head_stride;
  int64_t keys_half_stride;
  int64_t keys_row_stride;
  void* scores;      // [T, H, top_k] sum type
  int64_t* indices;  // [T, H, top_k] int64
};

// A table of rows and what each token takes from it.
struct MemoryProblem {
  Dtype dtype;         // of the table, and of what is returned in its likeness
  int64_t num_rows;    // at most 2^31 - 2
  int64_t row_dim;     // W
  int64_t num_tokens;  // T
  int64_t bag_size;    // K; entry t * K + k is the k-th of token t
  int num_threads;

  constexpr int64_t num_entries() const { return num_tokens * bag_size; }
};

// out_t = sum_k weights_tk * values[indices_tk]
struct MemoryLookupParams {
  MemoryProblem problem;
  const void* values;  // [num_rows, W] dtype
  int64_t values_stride;
  const int64_t* indices;  // [T, K] int64
  const void* weights;     // [T, K] sum type
  void* out;               // [T, W] dtype
};

// out_tk = dot(values[indices_tk], x_t)
struct MemoryDotParams {
  MemoryProblem problem;
  const void* values;  // [num_rows, W] dtype
  int64_t values_stride;
  const int64_t* indices;  // [T, K] int64
  const void* x;           // [T, W] dtype
  int64_t x_stride;
  void* out;  // [T, K] sum type
};

// For every run of entries with the same row, in sorted order:
//   grad_rows[target] = sum over the run of weights_tk * grad_out_t
//   grad_weights_tk = dot(values[row], grad_out_t)                          where it is asked for
struct MemoryBackwardParams {
  MemoryProblem problem;
  const void* values;  // [num_rows, W] dtype; null where grad_weights is
  int64_t values_stride;
  const int64_t* order;        // [T * K] int64, entries sorted by row, those of a row ascending
  const int32_t* sorted_rows;  // [T * K] int32, row of each of them; num_rows: of no row, only on CUDA
  const int32_t* targets;      // [T * K] int32, row of grad_rows of each of them; ascending, equal where the row is
  const void* weights;         // [T, K] sum type
  const void* grad_out;        // [T, W] dtype
  int64_t grad_out_stride;
  int64_t num_targets;
  void* grad_rows;     // [num_targets, W] dtype, rows that are no entry's target are zero
  void* grad_weights;  // [T, K] sum type, or null
};

}  // namespace topgather
