// What crosses from Python into the kernels that decode with a cache, on every backend.
//
// D = head_dim, V = value_dim, K = top_k (slots per query), M = query_len (new tokens of a sequence).
//
// A cache is pages: page p holds page_size tokens of every key head, and the centroids of their blocks. Token t of
// sequence s lies in page page_table[s, t / page_size], row t % page_size. Without a table sequence s is page s, and
// that one page is all it can have: the contiguous cache. With one, page_size is a multiple of block_size, so that no
// block is cut. Strides count elements; the last dimension of every tensor is contiguous.
//
// A centroid's place holds the running sum of a block's keys, added in order, while the block is short of block_size
// keys, and their mean from the last on: only whole blocks are ever chosen by their centroid.
#pragma once

#include <cstdint>

#include "../common/dtype.h"

namespace topgather {

struct ConstPages {
  const void* data;
  int64_t page_stride;
  int64_t head_stride;
  int64_t row_stride;
};

struct MutablePages {
  void* data;
  int64_t page_stride;
  int64_t head_stride;
  int64_t row_stride;
};

// The same for tensors of new tokens, [batch, head, token, dim].
struct ConstTokens {
  const void* data;
  int64_t batch_stride;
  int64_t head_stride;
  int64_t row_stride;
};

struct MutableTokens {
  void* data;
  int64_t batch_stride;
  int64_t head_stride;
  int64_t row_stride;
};

struct DecodeProblem {
  Dtype dtype;  // of query, key, value and what is returned in their likeness
  int64_t batch_size;
  int64_t num_query_heads;
  int64_t num_kv_heads;
  int64_t query_len;
  int64_t head_dim;
  int64_t value_dim;
  int64_t block_size;
  int64_t page_size;
  int64_t num_pages;
  int64_t pages_per_sequence;  // columns of page_table, 1 without one
  int64_t top_k;
  double scale;
  const int32_t* seq_lens;    // [batch_size] int32, tokens cached: before an append, and for a query its own included
  const int32_t* num_tokens;  // [batch_size] int32, how many of the M new tokens a sequence has, or null for all M
  const int32_t* page_table;  // [batch_size, pages_per_sequence] int32, contiguous, or null
  int num_threads;
};

struct CacheAppendParams {
  DecodeProblem problem;
  ConstTokens key;           // [batch, kv head, M, D] dtype
  ConstTokens value;         // [batch, kv head, M, V] dtype
  MutablePages key_pages;    // [page, kv head, page_size, D] dtype
  MutablePages value_pages;  // [page, kv head, page_size, V] dtype
  MutablePages centroids;    // [page, kv head, ceil(page_size / block_size), D] float32, float64 for float64
};

struct DecodeRouteParams {
  DecodeProblem problem;
  ConstTokens query;            // [batch, query head, M, D] dtype
  ConstPages centroids;         // [page, kv head, ceil(page_size / block_size), D] float32, float64 for float64
  MutableTokens block_indices;  // [batch, query head, M, K] int32
};

struct DecodeParams {
  DecodeProblem problem;
  ConstTokens query;          // [batch, query head, M, D] dtype
  ConstPages key_pages;       // [page, kv head, page_size, D] dtype
  ConstPages value_pages;     // [page, kv head, page_size, V] dtype
  ConstTokens block_indices;  // [batch, query head, M, K] int32
  MutableTokens out;          // [batch, query head, M, V] dtype
  MutableTokens lse;          // [batch, query head, M] float32, float64 for float64; row_stride 1
};

}  // namespace topgather
