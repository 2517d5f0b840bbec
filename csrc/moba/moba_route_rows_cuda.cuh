// What the kernels that choose blocks share: arguments, where a tile of queries lies and what its rows may see, copies,
// and the writing of a row's choices. moba_route_cuda.cuh says what is computed.
#pragma once

#include "../cuda/launch.cuh"
#include "moba_cuda.h"
#include "moba_stages_cuda.cuh"

namespace topgather {

// Centroid cut into this many numbers of the element type.
template <typename Element>
inline constexpr int kCentroidParts = 1;
template <>
inline constexpr int kCentroidParts<BFloat16> = 3;
template <>
inline constexpr int kCentroidParts<Float16> = 2;

struct RouteArguments {
  MobaGeometry geometry;
  int64_t first_unit;
  uint32_t num_tiles;  // of a head; packed: a bound
  uint32_t num_work;   // num_tiles x query heads of the units
  int32_t list_length;
  int32_t force_first;
  int32_t force_last;   // 0 where not causal
  bool has_lane_lists;  // step 3 by a lane a row
  int32_t head_dim;
  int32_t row_elements;             // of a centroid row in memory, zeros past head_dim
  bool are_lists_shared;            // lists in shared memory, else in list_scores and list_blocks
  Array<const void, 4> query;       // [batch, query head, query, D] dtype
  const void* parts;                // [unit, block, part, row_elements] dtype; float32: the centroids themselves
  const float* centroids;           // [unit, block, row_elements] float32
  float* list_scores;               // [thread block, row, list_length] float32
  int32_t* list_blocks;             // [thread block, row, list_length] int32
  Array<int32_t, 4> block_indices;  // [batch, query head, query, K] int32
  // Of moba_route_filter; null without one.
  const float* bounds;  // [unit, block] float32
  uint32_t* failed;     // [work, warp] uint32: a bit a row
  uint32_t block_mask;  // the bits of an entry that hold the block's number
};

namespace route {

using cuda::kAllLanes;
using cuda::kLanes;
using cuda::lane_id;
using cuda::warp_id;

constexpr int32_t kNoBlock = INT32_MAX;

__device__ __forceinline__ bool beats(float score, int32_t block, float other_score, int32_t other_block) {
  return score > other_score || (score == other_score && block < other_block);
}

// Positions number less than 2^31. 64-bit division is a call, and calls spill.
__device__ __forceinline__ int32_t block_of_position(const MobaGeometry& geometry, int64_t position) {
  return static_cast<int32_t>(static_cast<uint32_t>(position) / static_cast<uint32_t>(geometry.block_size));
}

// A tile of queries of one head.
struct TileOfQueries {
  bool exists;  // packed: grids are bounds
  int64_t unit_in_step;
  int64_t batch_idx;
  int64_t head;
  SequenceOnDevice sequence;
  int64_t first_query;  // in the sequence
};

__device__ __forceinline__ TileOfQueries tile_of_queries(const RouteArguments& args, uint32_t work, int queries) {
  const MobaGeometry& geometry = args.geometry;
  const uint32_t head_of_units = work / args.num_tiles;
  const uint32_t unit_in_step = head_of_units / static_cast<uint32_t>(geometry.group);
  const Unit unit = unit_at(geometry, args.first_unit + unit_in_step);
  const int64_t head = unit.kv_head * geometry.group + head_of_units % static_cast<uint32_t>(geometry.group);
  int64_t tile = work % args.num_tiles;
  int64_t sequence_idx = 0;
  if (geometry.is_packed()) {
    sequence_idx = last_start_up_to(geometry.tile_starts, geometry.num_sequences + 1, tile);
    if (sequence_idx >= geometry.num_sequences) return {};  // past the last tile
    tile -= geometry.tile_starts[sequence_idx];
  }
  return {true, unit_in_step, unit.batch_idx, head, sequence_on_device(geometry, sequence_idx), tile * queries};
}

// Blocks that stand in a row's choice whatever their scores: the first num_first, and the num_last up to its own.
struct ForcedBlocks {
  int32_t num_first;
  int32_t num_last;
  int32_t own_block;  // -1: none
};

__device__ __forceinline__ ForcedBlocks forced_blocks(const RouteArguments& args, const SequenceOnDevice& sequence,
                                                      int32_t own_block) {
  const int32_t num_visible = args.geometry.is_causal ? own_block + 1 : static_cast<int32_t>(sequence.num_blocks);
  const int32_t num_first = min(args.force_first, num_visible);
  return {num_first, own_block < 0 ? 0 : min(args.force_last, num_visible - num_first), own_block};
}

// Of num_visible blocks, those that are not forced. They are numbered from 0 on wherever blocks are scored, and lie in
// order behind the first force_first.
__device__ __forceinline__ int64_t num_by_score(const RouteArguments& args, int64_t num_visible) {
  const int64_t count = num_visible - args.force_first - args.force_last;
  return count > 0 ? count : 0;
}

// How many blocks the rows of a tile of queries may choose by score; returns the most of any row.
template <typename Shared>
__device__ __forceinline__ int32_t place_rows(const RouteArguments& args, const SequenceOnDevice& sequence,
                                              int64_t first_query, Shared& shared) {
  const MobaGeometry& geometry = args.geometry;
  for (int row = threadIdx.x; row < Shared::kQueries; row += Shared::kThreads) {
    const int64_t query = first_query + row;
    int64_t own = -1, visible = -1;
    if (query < sequence.num_queries) {
      const int64_t position = query + sequence.position_offset;
      own = geometry.is_causal && position >= 0 ? block_of_position(geometry, position) : -1;
      visible = num_by_score(args, geometry.is_causal ? own + 1 : sequence.num_blocks);
    }
    shared.own_block[row] = static_cast<int32_t>(own);
    shared.num_visible[row] = static_cast<int32_t>(visible);
  }
  // Queries see the more the later they stand.
  const int64_t last = first_query + Shared::kQueries < sequence.num_queries ? first_query + Shared::kQueries - 1
                                                                             : sequence.num_queries - 1;
  if (!geometry.is_causal) return static_cast<int32_t>(num_by_score(args, sequence.num_blocks));
  const int64_t position = last + sequence.position_offset;
  return position < 0 ? 0 : static_cast<int32_t>(num_by_score(args, block_of_position(geometry, position) + 1));
}

// Copies `count` rows of `rows` to kRows consecutive rows of the tile from first_row on, zeros after them. A thread keeps
// to one column of chunks, so that no division is left.
template <int kRows, int kThreads, typename Tile, typename Element>
__device__ __forceinline__ void copy_rows(Tile& tile, int first_row, const Element* rows, int64_t row_stride,
                                          int64_t count, int used_chunks, int row_chunks) {
  constexpr int kRowsAtOnce = kThreads / Tile::kChunks;
  static_assert(kThreads % Tile::kChunks == 0 && kRows % kRowsAtOnce == 0, "whole rows at a time");
  const int chunk = static_cast<int>(threadIdx.x) % Tile::kChunks;
  if (chunk >= used_chunks) return;
#pragma unroll 8
  for (int i = 0; i < kRows / kRowsAtOnce; ++i) {
    const int row = i * kRowsAtOnce + static_cast<int>(threadIdx.x) / Tile::kChunks;
    cuda::copy_chunk_async(tile, first_row + row, chunk, rows + row * row_stride, row_chunks, row < count);
  }
}

// A row's choices: forced blocks around `blocks` in ascending order, of which kNoBlock are none, -1 for the rest.
template <int kKept>
__device__ __forceinline__ void write_blocks(const int32_t (&blocks)[kKept], const ForcedBlocks& forced, int32_t top_k,
                                             int32_t* choices) {
  for (int32_t block = 0; block < forced.num_first; ++block) choices[block] = block;
  int32_t num_kept = forced.num_first;
#pragma unroll
  for (int r = 0; r < kKept; ++r) num_kept += blocks[r] != kNoBlock ? 1 : 0;
#pragma unroll
  for (int r = 0; r < kKept; ++r) {
    int32_t position = forced.num_first;
#pragma unroll
    for (int other = 0; other < kKept; ++other) position += blocks[other] < blocks[r] ? 1 : 0;
    if (blocks[r] != kNoBlock) choices[position] = forced.num_first + blocks[r];
  }
  for (int32_t i = forced.num_last - 1; i >= 0; --i) choices[num_kept++] = forced.own_block - i;
  for (int slot = num_kept; slot < top_k; ++slot) choices[slot] = -1;
}

}  // namespace route

}  // namespace topgather
