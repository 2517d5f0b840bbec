// New keys and values into a cache, on the CPU.
//
//   key_pages[place(t)] = key_t,   value_pages[place(t)] = value_t,   t from seq_lens[s] on
//   centroid of a block = sum of its keys so far; their mean when the block is whole
//
// Who owns what: a task is one (sequence, key head, consecutive blocks of kTokensPerAppend tokens in all), so a
// centroid is one task's alone. Steps per token:
//   1. copy the key and the value to their place;
//   2. the first key of a block begins a new sum, whatever stood there; every key is added in order;
//   3. the last key of a block divides it by block_size.
// Numerics: sums in float32 (float64 for float64) of the keys as stored, in the order of tokens: the bits that
// block_centroids gives for the whole sequence, however it was split into appends.
// Determinism: a block's centroid depends on its own keys alone.
#pragma once

#include "../common/parallel.h"
#include "../cpu/convert.h"
#include "decode_pages_cpu.h"

namespace topgather::TOPGATHER_CPU_TARGET {

template <typename Storage>
void append_tokens(const CacheAppendParams& params, int64_t sequence, int64_t head, int64_t first, int64_t last) {
  using T = ComputeOf<Storage>;
  const DecodeProblem& problem = params.problem;
  const int64_t cached = problem.seq_lens.data[sequence];
  for (int64_t token = first; token < last; ++token) {
    const Place place = place_of(problem, sequence, token);
    const Storage* key = params.key.at<Storage>(sequence, head, token - cached);
    const Storage* value = params.value.at<Storage>(sequence, head, token - cached);
    Storage* key_row = page_row<Storage>(params.key_pages, head, place);
    Storage* value_row = page_row<Storage>(params.value_pages, head, place);
    const Place centroid_place{place.page, place.row / problem.block_size};
    const int64_t row_in_block = place.row - centroid_place.row * problem.block_size;
    T* centroid = page_row<T>(params.centroids, head, centroid_place);
    // Step 1.
    for (int64_t d = 0; d < problem.head_dim; ++d) key_row[d] = key[d];
    for (int64_t d = 0; d < problem.value_dim; ++d) value_row[d] = value[d];
    // Step 2.
    if (row_in_block == 0) {
      for (int64_t d = 0; d < problem.head_dim; ++d) centroid[d] = 0;
    }
    for (int64_t d = 0; d < problem.head_dim; ++d) centroid[d] += to_compute(key[d]);
    // Step 3.
    if (row_in_block == problem.block_size - 1) {
      for (int64_t d = 0; d < problem.head_dim; ++d) centroid[d] /= static_cast<T>(problem.block_size);
    }
  }
}

template <typename Storage>
void append_storage(const CacheAppendParams& params) {
  const DecodeProblem& problem = params.problem;
  const int64_t tokens_per_task = max64(DecodeConfig::kTokensPerAppend / problem.block_size, 1) * problem.block_size;
  // The first block may be begun already: one chunk more than the new tokens fill.
  const int64_t chunks_per_head = problem.query_len == 0 ? 0 : ceil_div(problem.query_len - 1, tokens_per_task) + 1;
  const int64_t num_tasks = problem.batch_size * problem.num_kv_heads * chunks_per_head;
  const double num_operations = static_cast<double>(problem.batch_size * problem.num_kv_heads) *
                                static_cast<double>(problem.query_len * (problem.head_dim + problem.value_dim));
  for_each_task(useful_threads(problem.num_threads, num_tasks, num_operations), num_tasks, [&](int64_t task, int) {
    const int64_t chunk = task % chunks_per_head;
    const int64_t head = task / chunks_per_head % problem.num_kv_heads;
    const int64_t sequence = task / chunks_per_head / problem.num_kv_heads;
    const int64_t cached = problem.seq_lens.data[sequence];
    const int64_t start = cached / problem.block_size * problem.block_size + chunk * tokens_per_task;
    append_tokens<Storage>(params, sequence, head, max64(start, cached),
                           min64(start + tokens_per_task, cached + new_tokens_of(problem, sequence)));
  });
}

}  // namespace topgather::TOPGATHER_CPU_TARGET
