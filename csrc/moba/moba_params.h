// What crosses from Python into the block-attention kernels, on every backend.
//
// D = head_dim, V = value_dim, K = top_k (slots per query). A dense problem has batch_size sequences of query_len and
// key_len tokens. A packed one has cu_seqlens set, a batch of 1 in every tensor, and query_len / key_len tokens in
// total. The sum type is float32, and float64 for float64. The last dimension of every tensor is contiguous.
#pragma once

#include "../common/array.h"
#include "../common/fields.h"
#include "../common/route_options.h"
#include "../common/score_options.h"

namespace topgather {

struct MobaProblem {
  int64_t block_size;
  bool is_causal;
  Array<const int64_t, 1> cu_seqlens_q;  // [batch_size + 1] int64; data null for a dense problem
  Array<const int64_t, 1> cu_seqlens_k;  // [batch_size + 1] int64; data null for a dense problem
  int num_threads;
  // Derived from the tensors.
  Dtype dtype;         // of query, key, value and what is returned in their likeness
  int64_t batch_size;  // packed: sequences
  int64_t num_query_heads;
  int64_t num_kv_heads;
  int64_t query_len;
  int64_t key_len;
  int64_t head_dim;
  int64_t value_dim;  // 0 where there are no values
  int64_t top_k;
  int64_t heads_per_choice;  // query heads that share a choice: head h goes by row h / heads_per_choice
  int64_t window;            // positions that a query sees whatever it chose, at most key_len; 0: none
  int64_t min_ranges;  // on the CPU: ranges of queries wanted of a sequence, over its heads; 0: as large as they like
};
TOPGATHER_FIELDS(MobaProblem, block_size, is_causal, cu_seqlens_q, cu_seqlens_k, num_threads)

// Packed, a batch entry of centroids is a sequence; of one, blocks past the sequence's last are left as they are.
struct CentroidParams {
  Array<const void, 4> key;  // [batch, kv head, key, D] dtype; packed: [key, head, D]
  int64_t block_size;
  Array<const int64_t, 1> cu_seqlens;  // [num_sequences + 1] int64; data null for a dense problem
  int num_threads;
  InOutArray<void, 4> centroids;  // [batch, kv head, block, D] sum type
  MobaProblem problem;            // derived: without queries, or, packed, with as many as keys
};
TOPGATHER_FIELDS(CentroidParams, key, block_size, cu_seqlens, num_threads, centroids)

// Shapes are those of dense problems. Packed ones: query, key, value, out and their gradients are [token, head, dim],
// block_indices [head, token, K], lse and grad_lse [head, token]. A choice head is a query head, a key head or all heads.
struct MobaRouteParams : RouteOptions {
  using Shared = RouteOptions;
  MobaProblem problem;
  Array<const void, 4> query;       // [batch, query head, query, D] dtype
  Array<const void, 4> key;         // [batch, kv head, key, D] dtype
  Array<int32_t, 4> block_indices;  // [batch, query head, query, K] int32, contiguous
  static constexpr const char* kAlignedOnCuda[] = {"query", "key"};
};
TOPGATHER_FIELDS(MobaRouteParams, problem, query, key, block_indices)

struct MobaForwardParams : BlockScoreOptions {
  using Shared = BlockScoreOptions;
  MobaProblem problem;
  Array<const void, 4> query;             // [batch, query head, query, D] dtype
  Array<const void, 4> key;               // [batch, kv head, key, D] dtype
  Array<const void, 4> value;             // [batch, kv head, key, V] dtype
  Array<const int32_t, 4> block_indices;  // [batch, choice head, query, K] int32
  Array<const void, 1> sinks;             // [query head] sum type, logits that join a row's sum; or data null
  Array<void, 4> out;                     // [batch, query head, query, V] dtype
  Array<void, 3> lse;                     // [batch, query head, query] sum type
  Array<void, 4> softmax_terms;           // [batch, query head, query, 2] sum type, see softmax_terms.h
  static constexpr const char* kAlignedOnCuda[] = {"query", "key", "value"};
};
TOPGATHER_FIELDS(MobaForwardParams, problem, query, key, value, block_indices, sinks, out, lse, softmax_terms)

struct MobaBackwardParams : BlockScoreOptions {
  using Shared = BlockScoreOptions;
  MobaProblem problem;
  bool deterministic;                     // on CUDA: the same bits every time; the CPU's always are
  Array<const void, 4> query;             // [batch, query head, query, D] dtype
  Array<const void, 4> key;               // [batch, kv head, key, D] dtype
  Array<const void, 4> value;             // [batch, kv head, key, V] dtype
  Array<const int32_t, 4> block_indices;  // [batch, choice head, query, K] int32
  Array<const void, 4> out;               // [batch, query head, query, V] dtype
  Array<const void, 3> lse;               // [batch, query head, query] sum type
  Array<const void, 4> grad_out;          // [batch, query head, query, V] dtype
  Array<const void, 3> grad_lse;          // [batch, query head, query] sum type; data null where there is none
  Array<const void, 4> softmax_terms;     // [batch, query head, query, 2] sum type, of the forward; or data null
  // Zeros where the CPU's kernel starts, which adds to them.
  Array<void, 4> grad_query;  // [batch, query head, query, D] dtype
  Array<void, 4> grad_key;    // [batch, kv head, key, D] dtype
  Array<void, 4> grad_value;  // [batch, kv head, key, V] dtype
  static constexpr const char* kAlignedOnCuda[] = {"query", "key", "value", "grad_out"};
};
TOPGATHER_FIELDS(MobaBackwardParams, problem, deterministic, query, key, value, block_indices, out, lse, grad_out,
                 grad_lse, softmax_terms, grad_query, grad_key, grad_value)

}  // namespace topgather
