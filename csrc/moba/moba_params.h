// What crosses from Python into the block-attention kernels, on every backend.
//
// D = head_dim, V = value_dim, K = top_k (slots per query). A dense problem has batch_size sequences of query_len and
// key_len tokens. A packed one has cu_seqlens set, batch strides of zero, and query_len / key_len tokens in total.
// Strides count elements; the last dimension of every tensor is contiguous.
#pragma once

#include <cstdint>

#include "../common/dtype.h"

namespace topgather {

struct ConstTensor {
  const void* data;
  int64_t batch_stride;
  int64_t head_stride;
  int64_t row_stride;
};

struct MutableTensor {
  void* data;
  int64_t batch_stride;
  int64_t head_stride;
  int64_t row_stride;
};

struct MobaProblem {
  Dtype dtype;  // of query, key, value and what is returned in their likeness
  int64_t batch_size;
  int64_t num_query_heads;
  int64_t num_kv_heads;
  int64_t query_len;
  int64_t key_len;
  int64_t head_dim;
  int64_t value_dim;
  int64_t block_size;
  int64_t top_k;
  bool is_causal;
  double scale;
  const int64_t* cu_seqlens_q;  // [batch_size + 1] int64, or null for a dense problem
  const int64_t* cu_seqlens_k;  // [batch_size + 1] int64, or null for a dense problem
  int num_threads;
};

struct CentroidParams {
  MobaProblem problem;
  ConstTensor key;          // [batch, kv head, key, D] dtype
  MutableTensor centroids;  // [batch, kv head, block, D] float32, float64 for float64
};

struct MobaRouteParams {
  MobaProblem problem;
  ConstTensor query;            // [batch, query head, query, D] dtype
  ConstTensor key;              // [batch, kv head, key, D] dtype
  MutableTensor block_indices;  // [batch, query head, query, K] int32
};

struct MobaForwardParams {
  MobaProblem problem;
  ConstTensor query;          // [batch, query head, query, D] dtype
  ConstTensor key;            // [batch, kv head, key, D] dtype
  ConstTensor value;          // [batch, kv head, key, V] dtype
  ConstTensor block_indices;  // [batch, query head, query, K] int32
  MutableTensor out;          // [batch, query head, query, V] dtype
  MutableTensor lse;          // [batch, query head, query] float32, float64 for float64; row_stride 1
};

struct MobaBackwardParams {
  MobaProblem problem;
  ConstTensor query;          // [batch, query head, query, D] dtype
  ConstTensor key;            // [batch, kv head, key, D] dtype
  ConstTensor value;          // [batch, kv head, key, V] dtype
  ConstTensor block_indices;  // [batch, query head, query, K] int32
  ConstTensor out;            // [batch, query head, query, V] dtype
  ConstTensor lse;            // [batch, query head, query] float32, float64 for float64
  ConstTensor grad_out;       // [batch, query head, query, V] dtype
  ConstTensor grad_lse;       // [batch, query head, query] float32, float64 for float64; data null when absent
  MutableTensor grad_query;   // [batch, query head, query, D] dtype
  MutableTensor grad_key;     // [batch, kv head, key, D] dtype
  MutableTensor grad_value;   // [batch, kv head, key, V] dtype
};

}  // namespace topgather
