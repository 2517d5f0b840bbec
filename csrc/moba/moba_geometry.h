// Where sequences, blocks and positions lie: plain arithmetic shared by every CPU stage.
#pragma once

#include "../cpu/simd.h"
#include "moba_config.h"
#include "moba_params.h"
#include "moba_window.h"

namespace topgather::TOPGATHER_CPU_TARGET {

// One sequence of a dense or packed problem.
struct Sequence {
  int64_t batch_idx;    // what batch strides multiply: 0 for a packed problem
  int64_t query_start;  // first row in the tensors
  int64_t query_len;
  int64_t key_start;
  int64_t key_len;
  int64_t num_blocks;
  int64_t position_offset;  // query i stands at position i + position_offset (bottom-right alignment)
};

inline Sequence sequence_at(const MobaProblem& problem, int64_t sequence_idx) {
  Sequence sequence{};
  if (problem.cu_seqlens_q.data == nullptr) {
    sequence = {sequence_idx, 0, problem.query_len, 0, problem.key_len, 0, 0};
  } else {
    const int64_t* q = problem.cu_seqlens_q.data + sequence_idx;
    const int64_t* k = problem.cu_seqlens_k.data + sequence_idx;
    sequence = {0, q[0], q[1] - q[0], k[0], k[1] - k[0], 0, 0};
  }
  sequence.num_blocks = ceil_div(sequence.key_len, problem.block_size);
  sequence.position_offset = sequence.key_len - sequence.query_len;
  return sequence;
}

// The block that a position lies in, -1 before the first.
inline int64_t block_of(int64_t position, int64_t block_size) { return position < 0 ? -1 : position / block_size; }

// What a query attends to: top_k numbers of blocks.
template <typename Params>
inline const int32_t* choices_of_query(const Params& params, int64_t batch_idx, int64_t head_idx, int64_t row) {
  return params.block_indices.template at<int32_t>(batch_idx, head_idx / params.problem.heads_per_choice, row);
}

// Slots of a query with those that a window adds, and lists of a block: of queries that see it up to their positions,
// and, with a window, of those that see it from the window's start on.
inline int64_t num_slots(const MobaProblem& problem) {
  return problem.top_k + window_slots(problem.window, problem.block_size);
}
inline int64_t lists_per_block(const MobaProblem& problem) { return problem.window > 0 ? 2 : 1; }

// A consecutive piece of one head's queries: the unit of work of the forward, and what owns a gradient of query. Where
// heads share a choice the forward takes all heads of a key head at once.
struct QueryRange {
  Sequence sequence;
  int64_t head_idx;     // query head
  int64_t first_query;  // within the sequence
  int64_t num_queries;
  int64_t num_heads = 1;  // query heads from head_idx on, of one choice
};

// Fixed from a sequence's shape alone, never from the number of threads or the rest of the batch: results must not
// depend on those.
inline int64_t queries_per_range(const MobaProblem& problem, const Sequence& sequence, int64_t num_heads = 1) {
  const int64_t chosen = max64(1, min64(num_slots(problem), sequence.num_blocks));
  const int64_t wanted =
      round_up(ceil_div(sequence.num_blocks * MobaRangeConfig::kQueriesPerBlock, chosen * num_heads), 64);
  const int64_t least = round_up(ceil_div(MobaRangeConfig::kMinQueries, num_heads), 64);
  int64_t size = max64(wanted, least);
  if (problem.min_ranges > 0) {
    const int64_t num_rows = sequence.query_len * (problem.num_query_heads / num_heads);
    const int64_t half = max64(wanted / 2, ceil_div(MobaRangeConfig::kFewestQueries, num_heads));
    size = min64(size, round_up(max64(ceil_div(num_rows, problem.min_ranges), half), 64));
  }
  return min64(size, round_up(max64(sequence.query_len, 1), 64));
}

inline int64_t ranges_in(const MobaProblem& problem, const Sequence& sequence, int64_t num_heads = 1) {
  return ceil_div(sequence.query_len, queries_per_range(problem, sequence, num_heads));
}

}  // namespace topgather::TOPGATHER_CPU_TARGET
