// From query-major choices to key-major lists, by counting.
//
// For one range of queries: offsets[j] .. offsets[j + 1] delimit in `queries` the queries (numbered from the start of
// the range, ascending) that attend to block j. A choice no key of which the query may see is left out: blocks after
// the query's own. No sort; two passes over the range's choices.
#pragma once

#include "moba_geometry.h"

namespace topgather::TOPGATHER_CPU_TARGET {

// What is wrong with a routing, or nothing. Kernels report the first fault they find and never use a faulty index.
struct RoutingFault {
  enum Kind : int32_t { kNone = 0, kOutOfRange = 1, kDuplicate = 2 };
  int32_t kind = kNone;
  int64_t head_idx = 0;
  int64_t query = 0;  // row in the tensor's query dimension
  int64_t block = 0;
};

struct BlockLists {
  int32_t* offsets;  // [num_blocks + 1]
  int32_t* queries;  // [num_queries * top_k]
};

// cursors: scratch, [num_blocks].
inline RoutingFault build_block_lists(const MobaProblem& problem, const QueryRange& range, const int32_t* choices,
                                      int64_t choices_row_stride, int32_t* cursors, const BlockLists& lists) {
  const Sequence& sequence = range.sequence;
  const int64_t num_blocks = sequence.num_blocks;
  const auto own_block = [&](int64_t query) -> int64_t {
    if (!problem.is_causal) return num_blocks;
    const int64_t position = range.first_query + query + sequence.position_offset;
    return position < 0 ? -1 : position / problem.block_size;
  };
  for (int64_t j = 0; j < num_blocks; ++j) cursors[j] = 0;
  for (int64_t i = 0; i < range.num_queries; ++i) {
    const int64_t last_visible = own_block(i);
    const int32_t* row = choices + i * choices_row_stride;
    for (int64_t slot = 0; slot < problem.top_k; ++slot) {
      const int64_t block = row[slot];
      if (block < -1 || block >= num_blocks) {
        return {RoutingFault::kOutOfRange, range.head_idx, sequence.query_start + range.first_query + i, block};
      }
      if (block >= 0 && block <= last_visible) ++cursors[block];
      // A block that is left out never reaches the lists, where the second pass looks for duplicates.
      for (int64_t other = 0; block > last_visible && other < slot; ++other) {
        if (row[other] == block) {
          return {RoutingFault::kDuplicate, range.head_idx, sequence.query_start + range.first_query + i, block};
        }
      }
    }
  }
  int32_t total = 0;
  for (int64_t j = 0; j < num_blocks; ++j) {
    lists.offsets[j] = total;
    total += cursors[j];
    cursors[j] = lists.offsets[j];
  }
  lists.offsets[num_blocks] = total;
  for (int64_t i = 0; i < range.num_queries; ++i) {
    const int64_t last_visible = own_block(i);
    const int32_t* row = choices + i * choices_row_stride;
    for (int64_t slot = 0; slot < problem.top_k; ++slot) {
      const int64_t block = row[slot];
      if (block < 0 || block > last_visible) continue;
      int32_t& cursor = cursors[block];
      if (cursor > lists.offsets[block] && lists.queries[cursor - 1] == i) {
        return {RoutingFault::kDuplicate, range.head_idx, sequence.query_start + range.first_query + i, block};
      }
      lists.queries[cursor++] = static_cast<int32_t>(i);
    }
  }
  return {};
}

}  // namespace topgather::TOPGATHER_CPU_TARGET
