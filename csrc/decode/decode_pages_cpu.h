// Where the tokens of a cache lie: plain arithmetic shared by the CPU kernels.
#pragma once

#include "../cpu/simd.h"
#include "decode_config.h"
#include "decode_params.h"

namespace topgather::TOPGATHER_CPU_TARGET {

inline int64_t new_tokens_of(const DecodeProblem& problem, int64_t sequence) {
  return problem.num_tokens.data == nullptr ? problem.query_len : problem.num_tokens.data[sequence];
}

// Position of the first new token of a sequence whose cached tokens include the new ones; may be negative.
inline int64_t first_position_of(const DecodeProblem& problem, int64_t sequence) {
  return problem.seq_lens.data[sequence] - new_tokens_of(problem, sequence);
}

inline int64_t longest_of(const DecodeProblem& problem) {
  int64_t longest = 0;
  for (int64_t s = 0; s < problem.batch_size; ++s) longest = max64(longest, problem.seq_lens.data[s]);
  return longest;
}

// The page of a sequence's token, and its row there.
struct Place {
  int64_t page;
  int64_t row;
};

inline Place place_of(const DecodeProblem& problem, int64_t sequence, int64_t token) {
  if (problem.page_table.data == nullptr) return {sequence, token};
  const int64_t column = token / problem.page_size;
  return {problem.page_table.data[sequence * problem.pages_per_sequence + column], token - column * problem.page_size};
}

// A row of keys, values or centroids.
template <typename T, typename Pages>
inline auto page_row(const Pages& pages, int64_t head, const Place& place) {
  return pages.template at<T>(place.page, head, place.row);
}

}  // namespace topgather::TOPGATHER_CPU_TARGET
