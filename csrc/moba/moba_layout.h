// From query-major choices to key-major lists, by counting.
//
// For some rows, such as the queries of a range: offsets[j] .. offsets[j + 1] delimit in `queries` the rows (numbered
// from the first of them, ascending) that attend to block j. A choice no key of which the row may see is left out: blocks
// after the row's own. No sort; two passes over the choices.
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

// Of rows 0 to num_rows - 1 and their choices [first_slot, last_slot), those of blocks up to last_visible(row), -1 for
// none. choices_of(row) gives a row's choices, fault_at(kind, row, block) what to report. cursors: scratch, [num_blocks].
template <typename ChoicesOf, typename LastVisible, typename FaultAt>
inline RoutingFault build_block_lists(int64_t num_rows, int64_t num_blocks, int64_t first_slot, int64_t last_slot,
                                      const ChoicesOf& choices_of, const LastVisible& last_visible,
                                      const FaultAt& fault_at, int32_t* cursors, const BlockLists& lists) {
  for (int64_t j = 0; j < num_blocks; ++j) cursors[j] = 0;
  for (int64_t row = 0; row < num_rows; ++row) {
    const int32_t* choices = choices_of(row);
    const int64_t last = last_visible(row);
    for (int64_t slot = first_slot; slot < last_slot; ++slot) {
      const int64_t block = choices[slot];
      if (block < -1 || block >= num_blocks) return fault_at(RoutingFault::kOutOfRange, row, block);
      if (block >= 0 && block <= last) ++cursors[block];
      // A block that is left out never reaches the lists, where the second pass looks for duplicates.
      for (int64_t other = 0; block > last && other < slot; ++other) {
        if (choices[other] == block) return fault_at(RoutingFault::kDuplicate, row, block);
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
  for (int64_t row = 0; row < num_rows; ++row) {
    const int32_t* choices = choices_of(row);
    const int64_t last = last_visible(row);
    for (int64_t slot = first_slot; slot < last_slot; ++slot) {
      const int64_t block = choices[slot];
      if (block < 0 || block > last) continue;
      int32_t& cursor = cursors[block];
      if (cursor > lists.offsets[block] && lists.queries[cursor - 1] == row) {
        return fault_at(RoutingFault::kDuplicate, row, block);
      }
      lists.queries[cursor++] = static_cast<int32_t>(row);
    }
  }
  return {};
}

}  // namespace topgather::TOPGATHER_CPU_TARGET
