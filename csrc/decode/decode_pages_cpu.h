// Where the tokens of a cache lie: plain arithmetic shared by the CPU kernels.
#pragma once

#include "../cpu/simd.h"
#include "decode_config.h"
#include "decode_params.h"

namespace topgather::TOPGATHER_CPU_TARGET {

inline int64_t new_tokens_of(const DecodeProblem& problem, int64_t sequence) {
  return problem.num_tokens == nullptr ? problem.query_len : problem.num_tokens[sequence];
}

// Position of the first new token of a sequence whose cached tokens include the new ones; may be negative.
inline int64_t first_position_of(const DecodeProblem& problem, int64_t sequence) {
  return problem.seq_lens[sequence] - new_tokens_of(problem, sequence);
}

inline int64_t longest_of(const DecodeProblem& problem) {
  int64_t longest = 0;
  for (int64_t s = 0; s < problem.batch_size; ++s) longest = max64(longest, problem.seq_lens[s]);
  return longest;
}

// The page of a sequence's token, and its row there.
struct Place {
  int64_t page;
  int64_t row;
};

inline Place place_of(const DecodeProblem& problem, int64_t sequence, int64_t token) {
  if (problem.page_table == nullptr) return {sequence, token};
  const int64_t column = token / problem.page_size;
  return {problem.page_table[sequence * problem.pages_per_sequence + column], token - column * problem.page_size};
}

// A row of pages or of new tokens, by their three strides.
template <typename T>
inline const T* row_in(const ConstPages& pages, int64_t head, const Place& place) {
  return static_cast<const T*>(pages.data) + place.page * pages.page_stride + head * pages.head_stride +
         place.row * pages.row_stride;
}

template <typename T>
inline T* row_in(const MutablePages& pages, int64_t head, const Place& place) {
  return static_cast<T*>(pages.data) + place.page * pages.page_stride + head * pages.head_stride +
         place.row * pages.row_stride;
}

template <typename T>
inline const T* row_in(const ConstTokens& tokens, int64_t sequence, int64_t head, int64_t token) {
  return static_cast<const T*>(tokens.data) + sequence * tokens.batch_stride + head * tokens.head_stride +
         token * tokens.row_stride;
}

template <typename T>
inline T* row_in(const MutableTokens& tokens, int64_t sequence, int64_t head, int64_t token) {
  return static_cast<T*>(tokens.data) + sequence * tokens.batch_stride + head * tokens.head_stride +
         token * tokens.row_stride;
}

}  // namespace topgather::TOPGATHER_CPU_TARGET
