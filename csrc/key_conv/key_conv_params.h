// What crosses from Python into the kernels of the key convolution, on every backend.
//
// D = head_dim, W = kernel_width, the number of taps. A dense problem has batch_size sequences of num_tokens tokens. A
// packed one has cu_seqlens set, a batch_size of 1 and num_tokens tokens in total. The sum type is float32, and float64
// for float64. Strides count elements; the last dimension of every tensor is contiguous.
#pragma once

#include <cstdint>

#include "../common/dtype.h"

namespace topgather {

struct ConstKeys {
  const void* data;
  int64_t batch_stride;
  int64_t head_stride;
  int64_t row_stride;
};

struct MutableKeys {
  void* data;
  int64_t batch_stride;
  int64_t head_stride;
  int64_t row_stride;
};

struct KeyConvProblem {
  Dtype dtype;         // of key and what is returned in its likeness
  Dtype weight_dtype;  // dtype or the sum type; on CUDA the sum type
  int64_t batch_size;
  int64_t num_heads;
  int64_t num_tokens;  // of a sequence; of all of them where packed
  int64_t head_dim;
  int64_t kernel_width;
  const int64_t* cu_seqlens;  // [num_sequences + 1] int64, or null for a dense problem
  int64_t num_sequences;      // packed problems only
  int num_threads;
};

struct KeyConvForwardParams {
  KeyConvProblem problem;
  ConstKeys key;       // [batch, head, token, D] dtype
  ConstKeys state;     // [batch, head, W - 1, D] dtype, the keys before the first token; data null for zeros
  const void* weight;  // [head, D, W] weight_dtype, contiguous; tap W - 1 is the current token's
  MutableKeys out;     // [batch, head, token, D] dtype
};

struct KeyConvBackwardParams {
  KeyConvProblem problem;
  ConstKeys grad_out;      // [batch, head, token, D] dtype
  ConstKeys key;           // [batch, head, token, D] dtype
  ConstKeys state;         // [batch, head, W - 1, D] dtype, or data null
  const void* weight;      // [head, D, W] weight_dtype, contiguous
  MutableKeys grad_key;    // [batch, head, token, D] dtype
  MutableKeys grad_state;  // [batch, head, W - 1, D] dtype; data null where state is
  void* grad_weight;       // [head, D, W] sum type, contiguous; or null
};

}  // namespace topgather
