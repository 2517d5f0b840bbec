// What crosses from Python into the kernels that decode with a cache, on every backend.
//
// D = head_dim, V = value_dim, K = top_k (slots per query), M = query_len (new tokens of a sequence).
//
// A cache is pages: page p holds page_size tokens of every key head, and the centroids of their blocks. Token t of
// sequence s lies in page page_table[s, t / page_size], row t % page_size. Without a table sequence s is page s, and
// that one page is all it can have: the contiguous cache. With one, page_size is a multiple of block_size, so that no
// block is cut. The last dimension of every tensor is contiguous.
//
// A centroid's place holds the running sum of a block's keys, added in order, while the block is short of block_size
// keys, and their mean from the last on: only whole blocks are ever chosen by their centroid.
#pragma once

#include "../common/array.h"
#include "../common/fields.h"
#include "../common/route_options.h"
#include "../common/score_options.h"

namespace topgather {

struct DecodeProblem {
  Array<const int32_t, 1> seq_lens;    // [batch_size] tokens cached: before an append, and for a query its own included
  Array<const int32_t, 1> num_tokens;  // [batch_size] how many of the M new tokens a sequence has, or data null for all
  Array<const int32_t, 2> page_table;  // [batch_size, pages_per_sequence], contiguous, or data null
  int64_t block_size;
  int num_threads;
  // Derived from the tensors and from an entry point's own fields.
  Dtype dtype;  // of query, key, value and what is returned in their likeness
  int64_t batch_size;
  int64_t num_query_heads;
  int64_t num_kv_heads;
  int64_t query_len;
  int64_t head_dim;
  int64_t value_dim;
  int64_t page_size;
  int64_t num_pages;
  int64_t pages_per_sequence;  // columns of page_table, 1 without one
  int64_t top_k;
  int64_t heads_per_choice;  // query heads that share a choice
  int64_t window;  // positions that a query sees whatever it chose, at most what a sequence has room for; 0: none
  double scale;
};
TOPGATHER_FIELDS(DecodeProblem, seq_lens, num_tokens, page_table, block_size, num_threads)

struct CacheAppendParams {
  DecodeProblem problem;
  Array<const void, 4> key;         // [batch, kv head, M, D] dtype
  Array<const void, 4> value;       // [batch, kv head, M, V] dtype
  InOutArray<void, 4> key_pages;    // [page, kv head, page_size, D] dtype
  InOutArray<void, 4> value_pages;  // [page, kv head, page_size, V] dtype
  InOutArray<void, 4> centroids;    // [page, kv head, ceil(page_size / block_size), D] float32, float64 for float64
};
TOPGATHER_FIELDS(CacheAppendParams, problem, key, value, key_pages, value_pages, centroids)

struct DecodeRouteParams : RouteOptions {
  using Shared = RouteOptions;
  DecodeProblem problem;
  Array<const void, 4> query;      // [batch, query head, M, D] dtype
  Array<const void, 4> centroids;  // [page, kv head, ceil(page_size / block_size), D] float32, float64 for float64
  int64_t page_size;
  Array<int32_t, 4> block_indices;  // [batch, query head, M, K]
};
TOPGATHER_FIELDS(DecodeRouteParams, problem, query, centroids, page_size, block_indices)

struct DecodeParams : BlockScoreOptions {
  using Shared = BlockScoreOptions;
  static constexpr const char* kAlignedOnCuda[] = {"query"};
  DecodeProblem problem;
  Array<const void, 4> query;             // [batch, query head, M, D] dtype
  Array<const void, 4> key_pages;         // [page, kv head, page_size, D] dtype
  Array<const void, 4> value_pages;       // [page, kv head, page_size, V] dtype
  Array<const int32_t, 4> block_indices;  // [batch, choice head, M, K]: of a query head, a key head or all heads
  Array<const void, 1> sinks;  // [query head] float32, float64 for float64, logits that join a row's sum; or data null
  Array<void, 4> out;          // [batch, query head, M, V] dtype
  Array<void, 3> lse;          // [batch, query head, M] float32, float64 for float64, contiguous
};
TOPGATHER_FIELDS(DecodeParams, problem, query, key_pages, value_pages, block_indices, sinks, out, lse)

}  // namespace topgather
