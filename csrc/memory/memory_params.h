// What crosses from Python into the kernels of memory layers, on every backend.
//
// T = tokens (bags of a lookup), H = heads, n = keys of a half, D = head_dim of a query (two halves), K = entries of a
// token, W = width of a row. The sum type is float32, and float64 for float64. The last dimension of every tensor is
// contiguous; tables, x and grad_out may have any stride of rows, every other tensor of T and K is contiguous.
#pragma once

#include "../common/array.h"
#include "../common/fields.h"

namespace topgather {

struct ProductKeyParams {
  int64_t top_k;
  int num_threads;
  Array<const void, 4> query;  // [T, H, 2, D / 2] dtype
  Array<const void, 4> keys;   // [H, 2, n, D / 2] dtype
  Array<void, 3> scores;       // [T, H, top_k] sum type, contiguous
  Array<int64_t, 3> indices;   // [T, H, top_k] int64, contiguous
  // Derived from the tensors.
  Dtype dtype;  // of query and keys
  int64_t num_tokens;
  int64_t num_heads;
  int64_t num_keys;  // of a half
  int64_t half_dim;

  static constexpr const char* kAlignedOnCuda[] = {"query", "keys"};
};
TOPGATHER_FIELDS(ProductKeyParams, top_k, num_threads, query, keys, scores, indices)

// A table of rows and what each token takes from it.
//
// Bags are as long as each other, or ragged: the entries of all tokens then stand one after the other, E of them, token
// t's from offsets[t] up to offsets[t + 1]. Entries outside of all offsets are nobody's.
struct MemoryProblem {
  int num_threads;
  // Derived from the tensors.
  Dtype dtype;         // of the table, and of what is returned in its likeness
  int64_t num_rows;    // at most 2^31 - 2
  int64_t row_dim;     // W
  int64_t num_tokens;  // T
  int64_t bag_size;    // K; entry t * K + k is the k-th of token t. Ragged bags: E / T rounded up
  int64_t num_entries;
};
TOPGATHER_FIELDS(MemoryProblem, num_threads)

// out_t = sum_k weights_tk * values[indices_tk]; ragged bags come with T = 1 and K = E
struct MemoryLookupParams {
  MemoryProblem problem;
  Array<const void, 2> values;      // [num_rows, W] dtype
  Array<const int64_t, 2> indices;  // [T, K] int64
  Array<const void, 2> weights;     // [T, K] sum type
  Array<const int64_t, 1> offsets;  // [T + 1] int64; data null where bags are not ragged
  Array<void, 2> out;               // [T, W] dtype
};
TOPGATHER_FIELDS(MemoryLookupParams, problem, values, indices, weights, offsets, out)

// out_tk = dot(values[indices_tk], x_t); ragged bags come with T = E and K = 1
struct MemoryDotParams {
  MemoryProblem problem;
  Array<const void, 2> values;      // [num_rows, W] dtype
  Array<const int64_t, 2> indices;  // [T, K] int64
  Array<const void, 2> x;           // [T, W] dtype; [num_x, W] where there are tokens
  Array<const int32_t, 1> tokens;   // [E] int32, row of x of each entry, -1: nobody's; data null: not ragged
  Array<void, 2> out;               // [T, K] sum type; 0 for nobody's entries
};
TOPGATHER_FIELDS(MemoryDotParams, problem, values, indices, x, tokens, out)

// For every run of entries with the same row, in sorted order:
//   grad_rows[target] = sum over the run of weights_tk * grad_out_t
//   grad_weights_tk = dot(values[row], grad_out_t)                          where it is asked for
// Ragged bags come with T = 1 and K = E.
struct MemoryBackwardParams {
  MemoryProblem problem;
  Array<const void, 2> grad_out;        // [T, W] dtype; [num_tokens, W] where there are tokens
  Array<const void, 2> values;          // [num_rows, W] dtype; read where grad_weights is asked for
  Array<const void, 2> weights;         // [T, K] sum type
  Array<const int64_t, 1> order;        // [T * K] int64, entries sorted by row, those of a row ascending
  Array<const int32_t, 1> sorted_rows;  // [T * K] int32, row of each of them; num_rows: of no row
  Array<const int32_t, 1>
      targets;                     // [T * K] int32, row of grad_rows of each of them; ascending, equal where the row is
  Array<const int32_t, 1> tokens;  // [E] int32, row of grad_out of each entry, -1: nobody's; data null: not ragged
  Array<void, 2> grad_rows;        // [num_targets, W] dtype, rows that are no entry's target are zero
  Array<void, 2> grad_weights;     // [T, K] sum type, 0 for nobody's entries; data null where it is not asked for
  // Derived from the tensors.
  int64_t num_targets;
};
TOPGATHER_FIELDS(MemoryBackwardParams, problem, grad_out, values, weights, order, sorted_rows, targets, tokens,
                 grad_rows, grad_weights)

// Rows of 8 bits, signed integers or e4m3, each group of columns with a scale: a row is scales[row, d / group] *
// values[row, d]. The columns divide into the groups evenly.
struct QuantizedRows {
  Array<const int8_t, 2> values;  // [num_rows, W] the bits
  Array<const float, 2> scales;   // [num_rows, groups] float32
  bool is_float8;                 // e4m3, not integers
  // Derived from the tensors.
  int64_t group_size;
};
TOPGATHER_FIELDS(QuantizedRows, values, scales, is_float8)

// out_t = sum_k weights_tk * row indices_tk; ragged bags come with T = 1 and K = E
struct QuantizedLookupParams {
  MemoryProblem problem;
  QuantizedRows rows;
  Array<const int64_t, 2> indices;  // [T, K] int64
  Array<const float, 2> weights;    // [T, K] float32
  Array<const int64_t, 1> offsets;  // [T + 1] int64; data null where bags are not ragged
  Array<float, 2> out;              // [T, W] float32
};
TOPGATHER_FIELDS(QuantizedLookupParams, problem, rows, indices, weights, offsets, out)

// out_tk = dot(row indices_tk, x_t); ragged bags come with T = E and K = 1
struct QuantizedDotParams {
  MemoryProblem problem;
  QuantizedRows rows;
  Array<const int64_t, 2> indices;  // [T, K] int64
  Array<const float, 2> x;          // [T, W] float32; [num_x, W] where there are tokens
  Array<const int32_t, 1> tokens;   // [E] int32, row of x of each entry, -1: nobody's; data null: not ragged
  Array<float, 2> out;              // [T, K] float32; 0 for nobody's entries
};
TOPGATHER_FIELDS(QuantizedDotParams, problem, rows, indices, x, tokens, out)
enum class RowAlgorithm : int32_t { kSgd = 0, kAdagrad = 1, kAdam = 2 };

// For every run of entries with the same row, in sorted order, with g = grad_scale * sum over the run of
// weights_e * grad_out_token: a step of the optimizer on the row and its states (memory_update_cpu.h has the formulas).
// Where there are `squares`, they get the sum over all rows of |sum over the run|^2, and nothing else is written.
// Entries stand one after the other, E of them, each with its token.
struct MemoryUpdateParams {
  MemoryProblem problem;
  Array<const void, 2> grad_out;        // [num_tokens, W] dtype
  Array<const void, 2> weights;         // [E] sum type
  Array<const int64_t, 1> order;        // [E] int64, entries sorted by row, those of a row ascending
  Array<const int32_t, 1> sorted_rows;  // [E] int32, row of each of them; num_rows: of no row
  Array<const int32_t, 1> targets;      // [E] int32, number of the run of each of them
  Array<const int32_t, 1> tokens;       // [E] int32, row of grad_out of each entry
  InOutArray<void, 2> values;           // [num_rows, W] dtype
  InOutArray<int32_t, 2> steps;         // [num_rows, 1] int32, that the row has taken
  InOutArray<void, 2> first;            // [num_rows, W] sum type or bfloat16: momentum, sum of squares, first moment
  InOutArray<void, 2> second;           // the same: second moment. Data null where the algorithm has no such state
  InOutArray<double, 2> decayed;  // [num_rows, 1] float64, total_decay at the row's last step; data null: no decay
  Array<double, 1> squares;       // [1] float64; data null: rows are updated
  int64_t algorithm_code;         // a RowAlgorithm
  double learning_rate;
  double first_rate;    // momentum of SGD, first beta of Adam
  double second_rate;   // dampening of SGD, lr_decay of Adagrad, second beta of Adam
  double eps;           // of Adagrad and Adam
  double weight_decay;  // added to the gradient, times the row
  double total_decay;   // log of what the steps so far, with this one, have left of a row that they only decayed
  double grad_scale;
  int64_t nesterov;
  int64_t seed;  // of the random bits of stochastic rounding, and the number of the step
  int64_t step;
  int64_t stochastic_rounding;  // of what is stored in bfloat16
};
TOPGATHER_FIELDS(MemoryUpdateParams, problem, grad_out, weights, order, sorted_rows, targets, tokens, values, steps,
                 first, second, decayed, squares, algorithm_code, learning_rate, first_rate, second_rate, eps,
                 weight_decay, total_decay, grad_scale, nesterov, seed, step, stochastic_rounding)

}  // namespace topgather
