// Where the tokens of a cache lie and which queries there are, for every CUDA kernel of decoding.
//
// A unit is one key head of one sequence, with the query heads of its group. Its rows are its queries, a token's heads
// together: row = token * group + head in the group. A wave is all rows of some units, or the rows of some tokens of
// one, as the workspace allows.
#pragma once

#include "../common/checks.h"
#include "../cuda/dispatch.h"
#include "../cuda/lane_rows.cuh"
#include "../cuda/launch.cuh"
#include "../cuda/workspace.h"
#include "decode_params.h"

namespace topgather {

struct DecodeGeometry {
  int32_t num_units;
  int32_t num_kv_heads;
  int32_t group;  // query heads of one key head
  int32_t query_len;
  int32_t head_dim;
  int32_t value_dim;
  int32_t block_size;
  int32_t page_size;
  int32_t num_pages;
  int32_t pages_per_sequence;
  int32_t top_k;
  int32_t heads_per_choice;   // query heads that share a choice
  int32_t window;             // positions that a query sees whatever it chose; 0: none
  int64_t capacity;           // tokens that a sequence has room for
  const int32_t* seq_lens;    // [batch] int32
  const int32_t* num_tokens;  // [batch] int32, or null
  const int32_t* page_table;  // [batch, pages_per_sequence] int32, or null
};

inline DecodeGeometry decode_geometry(const DecodeProblem& problem) {
  for (const int64_t size :
       {problem.batch_size * problem.num_query_heads, problem.num_query_heads * problem.query_len, problem.query_len,
        problem.head_dim, problem.value_dim, problem.block_size, problem.page_size, problem.num_pages,
        problem.pages_per_sequence, problem.top_k, problem.window}) {
    require(size < INT32_MAX, "decoding on CUDA: sizes must fit 31 bits");
  }
  const auto small = [](int64_t size) { return static_cast<int32_t>(size); };
  return {small(problem.batch_size * problem.num_kv_heads),
          small(problem.num_kv_heads),
          small(problem.num_query_heads / problem.num_kv_heads),
          small(problem.query_len),
          small(problem.head_dim),
          small(problem.value_dim),
          small(problem.block_size),
          small(problem.page_size),
          small(problem.num_pages),
          small(problem.pages_per_sequence),
          small(problem.top_k),
          small(problem.heads_per_choice),
          small(problem.window),
          problem.pages_per_sequence * problem.page_size,
          problem.seq_lens.data,
          problem.num_tokens.data,
          problem.page_table.data};
}

struct DecodeWave {
  int32_t first_unit;
  int32_t num_units;
  int32_t first_token;
  int32_t num_rows;  // of a unit
};

// The waves of a problem whose rows need row_bytes of workspace each.
struct DecodeWaves {
  int64_t units_per_wave;
  int64_t tokens_per_wave;
  int64_t num_unit_steps;
  int64_t num_token_steps;

  int64_t max_rows(const DecodeGeometry& geometry) const { return units_per_wave * tokens_per_wave * geometry.group; }
  int64_t count() const { return num_unit_steps * num_token_steps; }
  DecodeWave wave(const DecodeGeometry& geometry, int64_t wave_idx) const {
    const int64_t unit = wave_idx / num_token_steps * units_per_wave;
    const int64_t token = wave_idx % num_token_steps * tokens_per_wave;
    const int64_t units_left = geometry.num_units - unit, tokens_left = geometry.query_len - token;
    const int64_t num_units = units_left < units_per_wave ? units_left : units_per_wave;
    const int64_t num_tokens = tokens_left < tokens_per_wave ? tokens_left : tokens_per_wave;
    return {static_cast<int32_t>(unit), static_cast<int32_t>(num_units), static_cast<int32_t>(token),
            static_cast<int32_t>(num_tokens * geometry.group)};
  }
};

inline DecodeWaves plan_decode_waves(const DecodeGeometry& geometry, int64_t row_bytes, int64_t configured_budget) {
  const auto within = [](int64_t count, int64_t limit) { return count < 1 ? 1 : (count < limit ? count : limit); };
  const int64_t budget = workspace_budget(configured_budget);
  const int64_t token_bytes = row_bytes * geometry.group;
  DecodeWaves waves{};
  waves.units_per_wave = within(budget / (token_bytes * geometry.query_len), geometry.num_units);
  waves.tokens_per_wave =
      waves.units_per_wave > 1 ? geometry.query_len : within(budget / token_bytes, geometry.query_len);
  waves.num_unit_steps = divide_up(geometry.num_units, waves.units_per_wave);
  waves.num_token_steps = divide_up(geometry.query_len, waves.tokens_per_wave);
  return waves;
}

inline bool is_empty(const DecodeProblem& problem) {
  return problem.batch_size == 0 || problem.num_query_heads == 0 || problem.query_len == 0;
}

// --- on the device --------------------------------------------------------------------------------------------------

struct DecodeUnit {
  int32_t sequence;
  int32_t kv_head;
};

__device__ __forceinline__ DecodeUnit decode_unit(const DecodeGeometry& geometry, uint32_t unit) {
  const uint32_t sequence = unit / static_cast<uint32_t>(geometry.num_kv_heads);
  return {static_cast<int32_t>(sequence),
          static_cast<int32_t>(unit - sequence * static_cast<uint32_t>(geometry.num_kv_heads))};
}

// The new tokens of a sequence whose length includes them.
struct NewTokens {
  int32_t count;
  int32_t first_position;  // may be negative
  int32_t num_blocks;      // of the sequence
  bool is_faulty;          // the lengths cannot be
};

__device__ __forceinline__ NewTokens new_tokens(const DecodeGeometry& geometry, int32_t sequence) {
  const int32_t length = geometry.seq_lens[sequence];
  const int32_t count = geometry.num_tokens == nullptr ? geometry.query_len : geometry.num_tokens[sequence];
  if (length < 0 || length > geometry.capacity || count < 0 || count > geometry.query_len) return {0, 0, 0, true};
  const uint32_t block_size = static_cast<uint32_t>(geometry.block_size);
  return {count, length - count, static_cast<int32_t>((static_cast<uint32_t>(length) + block_size - 1) / block_size),
          false};
}

// One query.
struct DecodeRow {
  int32_t sequence;
  int32_t kv_head;
  int32_t head;
  int32_t token;
  int32_t position;   // in its sequence; -1: it sees nothing
  int32_t own_block;  // meaningless without a position
  int32_t num_blocks;
  bool is_faulty;
};

__device__ __forceinline__ DecodeRow decode_row(const DecodeGeometry& geometry, const DecodeWave& wave,
                                                uint32_t row_of_wave) {
  const uint32_t unit_in_wave = row_of_wave / static_cast<uint32_t>(wave.num_rows);
  const uint32_t row = row_of_wave - unit_in_wave * static_cast<uint32_t>(wave.num_rows);
  const DecodeUnit unit = decode_unit(geometry, static_cast<uint32_t>(wave.first_unit) + unit_in_wave);
  const uint32_t token = row / static_cast<uint32_t>(geometry.group);
  const NewTokens tokens = new_tokens(geometry, unit.sequence);
  DecodeRow result;
  result.sequence = unit.sequence;
  result.kv_head = unit.kv_head;
  result.head =
      unit.kv_head * geometry.group + static_cast<int32_t>(row - token * static_cast<uint32_t>(geometry.group));
  result.token = wave.first_token + static_cast<int32_t>(token);
  const int32_t position = tokens.first_position + result.token;
  result.position = !tokens.is_faulty && result.token < tokens.count && position >= 0 ? position : -1;
  result.own_block = static_cast<int32_t>(static_cast<uint32_t>(position) / static_cast<uint32_t>(geometry.block_size));
  result.num_blocks = tokens.num_blocks;
  result.is_faulty = tokens.is_faulty;
  return result;
}

// What a query attends to: [top_k] int32.
__device__ __forceinline__ const int32_t* choices_of_query(const DecodeGeometry& geometry,
                                                           const Array<const int32_t, 4>& block_indices,
                                                           const DecodeRow& row) {
  const uint32_t choice_head = static_cast<uint32_t>(row.head) / static_cast<uint32_t>(geometry.heads_per_choice);
  return block_indices.at<int32_t>(row.sequence, choice_head, row.token);
}

// The page of a token, and its row there.
struct CachePlace {
  int32_t page;
  int32_t row;
};

constexpr int32_t kNotSeen = -1;     // no token
constexpr int32_t kNoSuchPage = -2;  // a token on a page that does not exist

// 0 <= position < capacity.
__device__ __forceinline__ CachePlace cache_place(const DecodeGeometry& geometry, int32_t sequence, int32_t position) {
  if (geometry.page_table == nullptr) return {sequence, position};
  const uint32_t column = static_cast<uint32_t>(position) / static_cast<uint32_t>(geometry.page_size);
  const int32_t page = geometry.page_table[static_cast<int64_t>(sequence) * geometry.pages_per_sequence + column];
  return {page >= 0 && page < geometry.num_pages ? page : kNoSuchPage,
          position - static_cast<int32_t>(column) * geometry.page_size};
}

template <typename T, typename Pages>
__device__ __forceinline__ auto page_row(const Pages& pages, int32_t head, const CachePlace& place) {
  return pages.template at<T>(place.page, head, place.row);
}

// Whether every row of a tensor starts on a 16-byte boundary and is whole pieces of 16 bytes.
template <typename Tensor>
bool has_whole_pieces(const Tensor& tensor) {
  return tensor.has_aligned_rows(16) && tensor.sizes[3] * element_bytes(tensor.dtype) % 16 == 0;
}

}  // namespace topgather
