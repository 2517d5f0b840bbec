// Where sequences, units, blocks and positions lie, for every CUDA stage.
//
// A unit is what shares keys: one key head of one batch entry, or of all packed sequences together. A unit has
// `query_len` query tokens for each of its `group` query heads, and `num_blocks` key blocks; in a packed problem blocks
// are numbered through all sequences, and `num_blocks` is a bound taken from shapes alone. The boundaries of packed
// sequences are read on the device only: prepare_sequences brings them into order, so that no content of cu_seqlens
// can lead out of bounds.
#pragma once

#include "../cuda/divisor.h"
#include "../cuda/rounding.h"
#include "../cuda/tile_math.cuh"
#include "moba_params.h"

namespace topgather {

struct MobaGeometry {
  int64_t query_len;  // tokens of a sequence; of all of them where packed
  int64_t key_len;
  int64_t num_blocks;     // of a unit
  int64_t num_sequences;  // packed problems only
  int32_t num_query_heads;
  int32_t num_kv_heads;
  int32_t group;  // query heads of one key head
  int32_t block_size;
  int32_t top_k;
  cuda::Divisor by_top_k;
  cuda::Divisor by_heads_per_choice;  // a query head's quotient is its head in block_indices
  bool is_causal;
  int32_t window;  // positions that a query sees whatever it chose; 0: none. Choices are joined with it, edges last
  const int64_t* query_starts;  // [num_sequences + 1] int64, ascending; null for a dense problem
  const int64_t* key_starts;    // [num_sequences + 1] int64, ascending; null for a dense problem
  const int64_t* block_starts;  // [num_sequences + 1] int64: number of blocks before each sequence
  const int64_t* tile_starts;   // [num_sequences + 1] int64: number of the router's query tiles before each sequence

  __host__ __device__ bool is_packed() const { return query_starts != nullptr; }
};

// One sequence of a unit.
struct SequenceOnDevice {
  int64_t first_query;  // row in the tensors
  int64_t num_queries;
  int64_t first_key;
  int64_t num_keys;
  int64_t first_block;  // number within the unit
  int64_t num_blocks;
  int64_t position_offset;  // query i of the sequence stands at position i + position_offset
  bool exists;
};

// One key block of a unit.
struct KeyBlock {
  int64_t first_key;  // row in the tensors
  int32_t num_keys;
  // Query row i sees keys up to and including number i + visible_offset of the block.
  int64_t visible_offset;
};

// Blocks of a unit that exist: in a packed problem only the device knows.
__device__ __forceinline__ int64_t existing_blocks(const MobaGeometry& geometry) {
  return geometry.is_packed() ? geometry.block_starts[geometry.num_sequences] : geometry.num_blocks;
}

// The last index i in [0, count) with starts[i] <= value; -1 if there is none.
template <typename Integer>
__device__ __forceinline__ int64_t last_start_up_to(const Integer* starts, int64_t count, int64_t value) {
  int64_t low = 0, high = count;  // starts[low - 1] <= value < starts[high]
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (starts[middle] <= value) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low - 1;
}

__device__ __forceinline__ SequenceOnDevice sequence_on_device(const MobaGeometry& geometry, int64_t sequence_idx) {
  SequenceOnDevice sequence{};
  if (geometry.is_packed()) {
    sequence.exists = sequence_idx >= 0 && sequence_idx < geometry.num_sequences;
    if (!sequence.exists) return sequence;
    sequence.first_query = geometry.query_starts[sequence_idx];
    sequence.num_queries = geometry.query_starts[sequence_idx + 1] - sequence.first_query;
    sequence.first_key = geometry.key_starts[sequence_idx];
    sequence.num_keys = geometry.key_starts[sequence_idx + 1] - sequence.first_key;
    sequence.first_block = geometry.block_starts[sequence_idx];
    sequence.num_blocks = geometry.block_starts[sequence_idx + 1] - sequence.first_block;
  } else {
    sequence = {0, geometry.query_len, 0, geometry.key_len, 0, geometry.num_blocks, 0, true};
  }
  sequence.position_offset = sequence.num_keys - sequence.num_queries;
  return sequence;
}

// The sequence that query row `query` of a unit belongs to; one that does not exist for a row past all boundaries.
__device__ __forceinline__ SequenceOnDevice sequence_of_query(const MobaGeometry& geometry, int64_t query) {
  if (!geometry.is_packed()) return sequence_on_device(geometry, 0);
  return sequence_on_device(geometry, last_start_up_to(geometry.query_starts, geometry.num_sequences + 1, query));
}

__device__ __forceinline__ KeyBlock key_block_of(const MobaGeometry& geometry, const SequenceOnDevice& sequence,
                                                 int64_t block_in_sequence) {
  const int64_t first = block_in_sequence * geometry.block_size;
  const int64_t left = sequence.num_keys - first;
  const int64_t num_keys = left < geometry.block_size ? left : geometry.block_size;
  return {sequence.first_key + first, static_cast<int32_t>(num_keys),
          sequence.position_offset - sequence.first_query - first};
}

// The sequence of block number `block` of a unit.
__device__ __forceinline__ int64_t sequence_of_block(const MobaGeometry& geometry, int64_t block) {
  return geometry.is_packed() ? last_start_up_to(geometry.block_starts, geometry.num_sequences + 1, block) : 0;
}

// Block number `block` of a unit. The caller knows that it exists.
__device__ __forceinline__ KeyBlock key_block_on_device(const MobaGeometry& geometry, int64_t block) {
  const int64_t sequence_idx = sequence_of_block(geometry, block);
  const SequenceOnDevice sequence = sequence_on_device(geometry, sequence_idx);
  return key_block_of(geometry, sequence, block - sequence.first_block);
}

// How many of the block's keys, from its first on, the query row sees.
__device__ __forceinline__ int32_t num_visible_keys(const MobaGeometry& geometry, const KeyBlock& block,
                                                    int64_t query) {
  if (!geometry.is_causal) return block.num_keys;
  const int64_t visible = query + block.visible_offset + 1;
  if (visible <= 0) return 0;
  return visible < block.num_keys ? static_cast<int32_t>(visible) : block.num_keys;
}

// The same for a choice as it stands in block_indices, counted from the sequence's first block; 0 for -1.
__device__ __forceinline__ int32_t num_visible_keys(const MobaGeometry& geometry, const SequenceOnDevice& sequence,
                                                    int64_t query, int32_t choice) {
  if (choice < 0 || choice >= sequence.num_blocks) return 0;
  return num_visible_keys(geometry, key_block_of(geometry, sequence, choice), query);
}

// Whether an entry, of the row that it is of, is of the window's edge: a block that is seen from the window's start on.
__device__ __forceinline__ bool is_edge_entry(const MobaGeometry& geometry, int32_t entry, int32_t row) {
  return geometry.window > 0 && entry - row * geometry.top_k == geometry.top_k - 1;
}

// How many of an edge's keys, from its first on, stand before the query's window.
__device__ __forceinline__ int32_t keys_before_window(const MobaGeometry& geometry, const KeyBlock& block,
                                                      int64_t query) {
  const int64_t count = query + block.visible_offset + 1 - geometry.window;
  return count <= 0 ? 0 : (count < block.num_keys ? static_cast<int32_t>(count) : block.num_keys);
}

struct Unit {
  int64_t batch_idx;
  int64_t kv_head;
};
__device__ __forceinline__ Unit unit_at(const MobaGeometry& geometry, int64_t unit_idx) {
  // Units number less than 2^31. 64-bit division is a call, and calls spill.
  const auto unit = static_cast<uint32_t>(unit_idx), num_kv_heads = static_cast<uint32_t>(geometry.num_kv_heads);
  return {unit / num_kv_heads, unit % num_kv_heads};
}

}  // namespace topgather
