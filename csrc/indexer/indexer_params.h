// What crosses from Python into the indexer's kernels, on every backend.
//
// D = dimension of an index head, K = top_k (slots per query). The sum type is float32, and float64 for float64. The
// last dimension of every tensor is contiguous.
#pragma once

#include "../common/array.h"
#include "../common/fields.h"

namespace topgather {

// How the products of a query with a block's visible keys become the block's score.
enum class IndexReduction : int64_t { kMax = 0, kMean = 1, kReluSum = 2 };

struct IndexRouteParams {
  Array<const void, 4> index_query;  // [batch, index head, query, D] dtype
  Array<const void, 4> index_key;    // [batch, index key head, key, D] dtype
  Array<const void, 3> weights;      // [batch, index head, query] sum type, of kReluSum alone; or data null
  int64_t block_size;
  int64_t reduction_code;  // an IndexReduction
  bool is_causal;
  int64_t force_first;  // blocks that are always chosen, from the first on
  int64_t force_last;   // and from the newest that a query sees backwards; both together at most K
  int num_threads;
  Array<int32_t, 4> block_indices;  // [batch, choice, query, K] int32, contiguous
  // Derived from the tensors.
  Dtype dtype;  // of index_query and index_key
  int64_t batch_size;
  int64_t num_index_heads;
  int64_t num_key_heads;
  int64_t num_choices;
  int64_t heads_per_choice;  // index heads whose scores a choice adds up; 1 but for kReluSum
  int64_t query_len;
  int64_t key_len;
  int64_t head_dim;
  int64_t top_k;
  int64_t num_blocks;
  int64_t list_length;  // blocks of a query kept by score
  static constexpr const char* kAlignedOnCuda[] = {"index_query", "index_key"};
};
TOPGATHER_FIELDS(IndexRouteParams, index_query, index_key, weights, block_size, reduction_code, is_causal, force_first,
                 force_last, num_threads, block_indices)

}  // namespace topgather
