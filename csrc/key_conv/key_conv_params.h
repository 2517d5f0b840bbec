// What crosses from Python into the kernels of the key convolution, on every backend.
//
// D = head_dim, W = kernel_width, the number of taps. A dense problem has batch_size sequences of num_tokens tokens. A
// packed one has cu_seqlens set, a batch_size of 1 and num_tokens tokens in total. The sum type is float32, and float64
// for float64. The last dimension of every tensor is contiguous.
#pragma once

#include "../common/array.h"
#include "../common/fields.h"

namespace topgather {

struct KeyConvProblem {
  Array<const int64_t, 1> cu_seqlens;  // [num_sequences + 1] int64; data null for a dense problem
  int num_threads;
  bool has_silu;  // else the sums are added to the keys as they are
  // Derived from the tensors.
  Dtype dtype;         // of key and what is returned in its likeness
  Dtype weight_dtype;  // dtype or the sum type; on CUDA the sum type
  int64_t batch_size;
  int64_t num_heads;
  int64_t num_tokens;  // of a sequence; of all of them where packed
  int64_t head_dim;
  int64_t kernel_width;
  int64_t num_sequences;  // packed problems only
  bool has_options;       // a bias, or no SiLU
};
TOPGATHER_FIELDS(KeyConvProblem, cu_seqlens, num_threads, has_silu)

struct KeyConvForwardParams {
  KeyConvProblem problem;
  Array<const void, 4> key;     // [batch, head, token, D] dtype; packed: [token, head, D]
  Array<const void, 4> state;   // [batch, head, W - 1, D] dtype, the keys before the first token; data null for zeros
  Array<const void, 3> weight;  // [head, D, W] weight_dtype, contiguous; tap W - 1 is the current token's
  Array<const void, 2> bias;    // [head, D] sum type, contiguous; data null for zeros
  Array<void, 4> out;           // [batch, head, token, D] dtype; packed: [token, head, D]
};
TOPGATHER_FIELDS(KeyConvForwardParams, problem, key, state, weight, bias, out)

struct KeyConvBackwardParams {
  KeyConvProblem problem;
  Array<const void, 4> grad_out;  // [batch, head, token, D] dtype; packed: [token, head, D]
  Array<const void, 4> key;       // [batch, head, token, D] dtype; packed: [token, head, D]
  Array<const void, 4> state;     // [batch, head, W - 1, D] dtype, or data null
  Array<const void, 3> weight;    // [head, D, W] weight_dtype, contiguous
  Array<const void, 2> bias;      // [head, D] sum type, contiguous; data null for zeros
  Array<void, 4> grad_key;        // [batch, head, token, D] dtype; packed: [token, head, D]
  InOutArray<void, 4>
      grad_state;              // [batch, head, W - 1, D] dtype, zeros where no token writes; data null where state is
  Array<void, 3> grad_weight;  // [head, D, W] sum type, contiguous; or data null
  Array<void, 2> grad_bias;    // [head, D] sum type, contiguous; or data null, as it is where bias is
};
TOPGATHER_FIELDS(KeyConvBackwardParams, problem, grad_out, key, state, weight, bias, grad_key, grad_state, grad_weight,
                 grad_bias)

}  // namespace topgather
