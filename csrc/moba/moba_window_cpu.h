// Choices joined with a sliding window (moba_window.h), on the CPU.
//
// Lists are built of numbers that tell an edge from a whole block: 2 * block, and 2 * block + 1 for a block that is seen
// from the window's start on. Of a problem without a window they are the blocks' own.
#pragma once

#include "../cpu/simd.h"
#include "moba_layout.h"

namespace topgather::TOPGATHER_CPU_TARGET {

// What a query at `position` sees: num_slots numbers into `joined`, -1 for none. Blocks after its own are left out here.
template <typename FaultAt>
inline RoutingFault join_window(const int32_t* choices, int64_t top_k, int64_t num_blocks, int64_t block_size,
                                int64_t window, int64_t position, const FaultAt& fault_at, int32_t* joined) {
  const int64_t own = block_of(position, block_size);
  for (int64_t slot = 0; slot < top_k; ++slot) {
    const int64_t block = choices[slot];
    if (block < -1 || block >= num_blocks) return fault_at(RoutingFault::kOutOfRange, block);
    for (int64_t other = 0; block >= 0 && other < slot; ++other) {
      if (choices[other] == block) return fault_at(RoutingFault::kDuplicate, block);
    }
    joined[slot] = block < 0 || block > own ? -1 : static_cast<int32_t>(2 * block);
  }
  const int64_t first = max64(position + 1 - window, 0);
  const int64_t num_slots = top_k + window_slots(window, block_size);
  int64_t count = top_k;
  for (int64_t block = own < 0 ? 0 : first / block_size; block <= own; ++block) {
    bool is_chosen = false;
    for (int64_t slot = 0; slot < top_k; ++slot) is_chosen = is_chosen || choices[slot] == block;
    if (is_chosen) continue;
    joined[count++] = static_cast<int32_t>(2 * block + (block * block_size < first ? 1 : 0));
  }
  for (; count < num_slots; ++count) joined[count] = -1;
  return {};
}

// All choices of a range, lists_per_block lists a block. joined: [range queries, num_slots], with a window filled in.
inline RoutingFault build_range_lists(const MobaProblem& problem, const QueryRange& range, const int32_t* choices,
                                      int64_t choices_row_stride, int32_t* joined, int32_t* cursors,
                                      const BlockLists& lists) {
  const Sequence& sequence = range.sequence;
  const auto fault_at = [&](RoutingFault::Kind kind, int64_t query, int64_t block) {
    return RoutingFault{kind, range.head_idx, sequence.query_start + range.first_query + query, block};
  };
  const auto position_of = [&](int64_t query) { return range.first_query + query + sequence.position_offset; };
  if (problem.window == 0) {
    return build_block_lists(
        range.num_queries, sequence.num_blocks, 0, problem.top_k,
        [&](int64_t query) { return choices + query * choices_row_stride; },
        [&](int64_t query) {
          return problem.is_causal ? block_of(position_of(query), problem.block_size) : sequence.num_blocks;
        },
        fault_at, cursors, lists);
  }
  const int64_t slots = num_slots(problem), num_lists = lists_per_block(problem) * sequence.num_blocks;
  for (int64_t query = 0; query < range.num_queries; ++query) {
    const RoutingFault fault = join_window(
        choices + query * choices_row_stride, problem.top_k, sequence.num_blocks, problem.block_size, problem.window,
        position_of(query), [&](RoutingFault::Kind kind, int64_t block) { return fault_at(kind, query, block); },
        joined + query * slots);
    if (fault.kind != RoutingFault::kNone) return fault;
  }
  return build_block_lists(
      range.num_queries, num_lists, 0, slots, [&](int64_t query) { return joined + query * slots; },
      [&](int64_t) { return num_lists; }, fault_at, cursors, lists);
}

// Keys from first_key on, of num_keys, that stand before a query's window.
inline int64_t keys_before_window(const MobaProblem& problem, const QueryRange& range, int64_t query, int64_t first_key,
                                  int64_t num_keys) {
  const int64_t position = range.first_query + query + range.sequence.position_offset;
  return max64(0, min64(num_keys, position + 1 - problem.window - first_key));
}

// The same for ascending queries; returns the last one's, which is the most, and fills `starts` unless that is 0.
template <typename T>
inline int64_t window_starts(const MobaProblem& problem, const QueryRange& range, const int32_t* queries, int64_t count,
                             int64_t first_key, int64_t num_keys, IntegerVector<T>* starts) {
  using Integer = typename VectorTraits<T>::IntegerElement;
  const int64_t most = keys_before_window(problem, range, queries[count - 1], first_key, num_keys);
  for (int64_t i = 0; most > 0 && i < round_up(count, kLanes<T>); ++i) {
    const int64_t query = queries[min64(i, count - 1)];
    starts[i / kLanes<T>][i % kLanes<T>] =
        static_cast<Integer>(keys_before_window(problem, range, query, first_key, num_keys));
  }
  return most;
}

// Scores [num_keys, tile_row] of keys before a query's start become `hidden`; starts are at most num_keys.
template <typename T>
inline void hide_earlier_keys(T* scores, int64_t tile_row, int64_t num_vectors, int64_t num_keys,
                              const IntegerVector<T>* starts, T hidden) {
  using Integer = typename VectorTraits<T>::IntegerElement;
  for (int64_t key = 0; key < num_keys; ++key) {
    for (int64_t v = 0; v < num_vectors; ++v) {
      T* score = scores + key * tile_row + v * kLanes<T>;
      const IntegerVector<T> is_hidden = static_cast<Integer>(key) < starts[v];
      store<T>(score, is_hidden ? broadcast(hidden) : load<T>(score));
    }
  }
}

}  // namespace topgather::TOPGATHER_CPU_TARGET
