// Stages that several CUDA ops of block attention share: geometry of packed sequences, block lists.
#pragma once

#include "../cuda/dispatch.h"
#include "moba_cuda.h"
#include "moba_geometry_cuda.cuh"
#include "moba_waves_cuda.h"

namespace topgather {

// The geometry of a problem; packed boundaries are put in order by a small kernel on `stream`. `query_tile` is the
// number of queries that tile_starts counts by. With no memory behind the cutter nothing is launched.
MobaGeometry prepare_geometry(const MobaProblem& problem, int64_t query_tile, WorkspaceCutter& cutter,
                              cudaStream_t stream);

// A problem whose slots are those of its choices joined with its window; the same where there is none.
MobaProblem problem_with_window(const MobaProblem& problem);
// Its choices, in the workspace where there is a window. geometry: of problem_with_window(problem).
Array<const int32_t, 4> join_window(const MobaProblem& problem, const MobaGeometry& geometry,
                                    const Array<const int32_t, 4>& block_indices, WorkspaceCutter& cutter,
                                    cudaStream_t stream);

// Key-major lists of a wave's choices.
struct BlockListsOnDevice {
  int32_t* counts;         // [unit, chunk, block] int32: choices of each chunk of rows; then where the chunk's begin
  int32_t* list_starts;    // [unit, block + 1] int32: first entry of each block's list
  int32_t* item_starts;    // [unit, block + 1] int32: work items before each block's
  int32_t* item_blocks;    // [unit, item] int32: the block of each work item
  int32_t* entries;        // [unit, row * top_k] int32: the lists, ascending within a block
  uint16_t* is_row_valid;  // [unit, row] uint16: the row's choices exist and differ
  int64_t num_chunks;      // of a unit
  int64_t num_rows;        // of a unit
  int64_t max_items;       // of a unit: a bound taken from shapes
  int32_t entries_per_item;
};

// Bytes per row and per unit that take_lists will need.
int64_t list_row_bytes(const MobaProblem& problem);
int64_t list_unit_bytes(const MobaProblem& problem);
// Every list is cut into work items of entries_per_item entries.
BlockListsOnDevice take_lists(const MobaProblem& problem, int64_t num_units, int64_t num_queries,
                              int64_t entries_per_item, WorkspaceCutter& cutter);

struct LayoutArguments {
  MobaGeometry geometry;
  Wave wave;
  Array<const int32_t, 4> block_indices;  // [batch, choice head, query, K] int32
  BlockListsOnDevice lists;
  float2* terms = nullptr;          // [unit, row * top_k], written where a choice is in no list; null: not at all
  bool are_cursors_shared = false;  // decided by build_block_lists
};
// What the second of an entry's terms, a sum of weights, says where there is none: the choice shows its row no key; its
// row's choices are not valid. The first is -inf then.
constexpr float kSumOfUnseen = -1.0f, kSumOfInvalid = -2.0f;
void build_block_lists(const LayoutArguments& arguments, cudaStream_t stream);

// One work item: up to lists.entries_per_item entries of one block's list.
struct WorkItem {
  const int32_t* entries;  // [num_entries] int32: row * top_k + slot
  int32_t num_entries;
  KeyBlock block;
  bool is_whole_list;  // the block's list has no other item
};

// False past the last item: grids are bounds taken from shapes.
__device__ __forceinline__ bool find_work_item(const MobaGeometry& geometry, const BlockListsOnDevice& lists,
                                               int64_t unit_in_wave, int32_t item_idx, WorkItem& item) {
  const int64_t num_blocks = geometry.num_blocks;
  const int32_t* item_starts = lists.item_starts + unit_in_wave * (num_blocks + 1);
  const int32_t* list_starts = lists.list_starts + unit_in_wave * (num_blocks + 1);
  if (item_idx >= item_starts[num_blocks]) return false;
  const int64_t block = lists.item_blocks[unit_in_wave * lists.max_items + item_idx];
  const int32_t first = list_starts[block] + (item_idx - item_starts[block]) * lists.entries_per_item;
  const int32_t left = list_starts[block + 1] - first;
  item.entries = lists.entries + unit_in_wave * lists.num_rows * geometry.top_k + first;
  item.num_entries = left < lists.entries_per_item ? left : lists.entries_per_item;
  item.block = key_block_on_device(geometry, block);
  item.is_whole_list = item.num_entries == list_starts[block + 1] - list_starts[block];
  return true;
}

// Mean keys of every block of the units first_unit .. first_unit + num_units, for the router.
struct CentroidArguments {
  MobaGeometry geometry;
  int64_t first_unit;
  int64_t head_dim;
  int64_t row_elements;      // of a centroid row that are written, those past head_dim as zeros
  Array<const void, 4> key;  // [batch, kv head, key, D] dtype
  Array<void, 4> centroids;  // [batch or sequence, kv head, block, row_elements] float32; for the router [0, unit, ..]
  uint32_t* largest;         // [unit] bits of the largest finite magnitude; null when not asked for
  bool is_by_unit;           // centroids are addressed by unit, not by batch entry and head
};
void launch_centroids(Dtype dtype, const CentroidArguments& arguments, int64_t num_units, cudaStream_t stream);

// The query that row `row` of a unit of a wave is.
struct WaveRow {
  int64_t query;  // row in the tensors
  int64_t head;   // query head
};
__device__ __forceinline__ WaveRow wave_row(const MobaGeometry& geometry, const Wave& wave, const Unit& unit,
                                            int64_t row) {
  // Rows of a wave number less than 2^31.
  const uint32_t head_in_group = wave.by_num_queries.quotient(static_cast<uint32_t>(row));
  const uint32_t query = static_cast<uint32_t>(row) - head_in_group * static_cast<uint32_t>(wave.num_queries);
  return {wave.first_query + query, unit.kv_head * geometry.group + head_in_group};
}

// What a query attends to: [top_k] int32.
__device__ __forceinline__ const int32_t* choices_of_query(const MobaGeometry& geometry,
                                                           const Array<const int32_t, 4>& block_indices,
                                                           const Unit& unit, const WaveRow& place) {
  const uint32_t choice_head = geometry.by_heads_per_choice.quotient(static_cast<uint32_t>(place.head));
  return block_indices.at<int32_t>(unit.batch_idx, choice_head, place.query);
}

// The row that an entry of a list is of.
__device__ __forceinline__ int32_t row_of_entry(const MobaGeometry& geometry, int32_t entry) {
  return static_cast<int32_t>(geometry.by_top_k.quotient(static_cast<uint32_t>(entry)));
}

// The first of an element type's kernels, ascending in head_dim, that takes rows of so many elements.
template <typename Kernel>
const Kernel& narrowest_kernel(const Kernel (&kernels)[3], int64_t num_elements) {
  for (const Kernel& kernel : kernels) {
    if (num_elements <= kernel.max_head_dim) return kernel;
  }
  throw_rows_too_wide(num_elements);
}

// Each op's part of moba_cuda_kernel_facts.
void add_route_kernel_facts(std::vector<CudaKernelFacts>& facts);
void add_forward_kernel_facts(std::vector<CudaKernelFacts>& facts);
void add_backward_kernel_facts(std::vector<CudaKernelFacts>& facts);

}  // namespace topgather
