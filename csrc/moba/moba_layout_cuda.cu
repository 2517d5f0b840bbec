// From query-major choices to key-major lists, by counting; and packed sequences put in order.
//
// For each unit of a wave: list_starts[j] .. list_starts[j + 1] delimit in `entries` the choices (row * top_k + slot) of
// block j, ascending. A choice no key of which the query sees is left out, and so are all choices of a row that names a
// block its sequence does not have, or one block twice. Nothing is sorted and nothing waits for the host.
//
// Rows are cut into chunks of kRowsPerChunk. Steps, a kernel each:
//   1. moba_count_choices: a warp takes a row, judges it, and counts its choices per (chunk, block);
//   2. moba_scan_chunks: a thread takes a block and turns its chunk counts into starts within the block's list;
//   3. moba_scan_blocks: a thread block takes a unit and adds list lengths and work items up over its blocks;
//   4. moba_fill_lists: a warp takes a chunk and walks its rows in order, one row's slots side by side. A valid row names
//      no block twice, so the lanes of one step never meet, and the order of rows is the order of entries.
// Numerics: integers. Determinism: counts are sums of ones, everything else has a fixed order.
#include "../common/checks.h"
#include "../cuda/launch.cuh"
#include "moba_cuda.h"
#include "moba_stages_cuda.h"

namespace topgather {

using cuda::kAllLanes;
using cuda::kLanes;
using cuda::lane_id;
using cuda::warp_id;

namespace {
constexpr int kThreads = MobaLayoutConfig::kThreads;
constexpr int kWarps = kThreads / kLanes;
constexpr int kRowsPerChunk = MobaLayoutConfig::kRowsPerChunk;
constexpr int kFillWarps = MobaLayoutConfig::kChunksPerThreadBlock;
}  // namespace

// --- packed sequences --------------------------------------------------------------------------------------------------

struct SequenceArguments {
  const int64_t* cu_seqlens_q;  // [num_sequences + 1] int64, as the user gave them
  const int64_t* cu_seqlens_k;  // [num_sequences + 1] int64
  int64_t* query_starts;        // [num_sequences + 1] int64
  int64_t* key_starts;          // [num_sequences + 1] int64
  int64_t* block_starts;        // [num_sequences + 1] int64
  int64_t* tile_starts;         // [num_sequences + 1] int64
  int64_t num_sequences;
  int64_t query_len;
  int64_t key_len;
  int64_t block_size;
  int64_t query_tile;
};

// One warp, 32 boundaries at a time: the running maximum, clamped to what there is, is ascending whatever came in; then
// running sums of blocks and tiles.
__global__ void __launch_bounds__(kLanes) moba_prepare_sequences(const SequenceArguments args) {
  const int lane = lane_id();
  int64_t last_query = 0, last_key = 0, num_blocks = 0, num_tiles = 0;  // the state after the boundaries seen so far
  const auto from_lane = [](int64_t value, int source) {
    const uint32_t low = __shfl_sync(kAllLanes, static_cast<uint32_t>(value), source);
    const uint32_t high = __shfl_sync(kAllLanes, static_cast<uint32_t>(static_cast<uint64_t>(value) >> 32), source);
    return static_cast<int64_t>(static_cast<uint64_t>(high) << 32 | low);
  };
  const auto clamped = [](int64_t value, int64_t most) { return value < 0 ? 0 : (value > most ? most : value); };
  for (int64_t first = 0; first <= args.num_sequences; first += kLanes) {
    const int64_t i = first + lane;
    const bool is_there = i <= args.num_sequences;
    int64_t query = is_there ? clamped(args.cu_seqlens_q[i], args.query_len) : 0;
    int64_t key = is_there ? clamped(args.cu_seqlens_k[i], args.key_len) : 0;
    query = query > last_query ? query : last_query;
    key = key > last_key ? key : last_key;
    for (int distance = 1; distance < kLanes; distance *= 2) {
      const int source = lane >= distance ? lane - distance : lane;
      const int64_t earlier_query = from_lane(query, source);
      const int64_t earlier_key = from_lane(key, source);
      query = query > earlier_query ? query : earlier_query;
      key = key > earlier_key ? key : earlier_key;
    }
    // What the sequence that ends at this boundary adds. The first boundary ends none.
    const int64_t left_query = from_lane(query, lane > 0 ? lane - 1 : 0);
    const int64_t left_key = from_lane(key, lane > 0 ? lane - 1 : 0);
    const int64_t before_query = lane > 0 ? left_query : last_query;
    const int64_t before_key = lane > 0 ? left_key : last_key;
    int64_t blocks = i > 0 && is_there ? divide_up(key - before_key, args.block_size) : 0;
    int64_t tiles = i > 0 && is_there ? divide_up(query - before_query, args.query_tile) : 0;
    for (int distance = 1; distance < kLanes; distance *= 2) {
      const int source = lane >= distance ? lane - distance : lane;
      const int64_t earlier_blocks = from_lane(blocks, source);
      const int64_t earlier_tiles = from_lane(tiles, source);
      blocks += lane >= distance ? earlier_blocks : 0;
      tiles += lane >= distance ? earlier_tiles : 0;
    }
    if (is_there) {
      args.query_starts[i] = query;
      args.key_starts[i] = key;
      args.block_starts[i] = num_blocks + blocks;
      args.tile_starts[i] = num_tiles + tiles;
    }
    last_query = from_lane(query, kLanes - 1);
    last_key = from_lane(key, kLanes - 1);
    num_blocks += from_lane(blocks, kLanes - 1);
    num_tiles += from_lane(tiles, kLanes - 1);
  }
}

MobaGeometry prepare_geometry(const MobaProblem& problem, int64_t query_tile, WorkspaceCutter& cutter,
                              cudaStream_t stream) {
  MobaGeometry geometry{};
  geometry.query_len = problem.query_len;
  geometry.key_len = problem.key_len;
  geometry.num_blocks = blocks_per_unit(problem);
  geometry.num_sequences = problem.batch_size;
  geometry.num_query_heads = static_cast<int32_t>(problem.num_query_heads);
  geometry.num_kv_heads = static_cast<int32_t>(problem.num_kv_heads);
  geometry.group = static_cast<int32_t>(heads_per_unit(problem));
  geometry.block_size = static_cast<int32_t>(problem.block_size);
  geometry.top_k = static_cast<int32_t>(problem.top_k);
  geometry.is_causal = problem.is_causal;
  if (!is_packed(problem)) return geometry;
  int64_t* starts[4];
  for (int64_t*& start : starts) start = cutter.take<int64_t>(problem.batch_size + 1);
  geometry.query_starts = starts[0];
  geometry.key_starts = starts[1];
  geometry.block_starts = starts[2];
  geometry.tile_starts = starts[3];
  if (starts[0] == nullptr) return geometry;
  const SequenceArguments args{problem.cu_seqlens_q, problem.cu_seqlens_k, starts[0],          starts[1],
                               starts[2],            starts[3],            problem.batch_size, problem.query_len,
                               problem.key_len,      problem.block_size,   query_tile};
  cuda::launch(moba_prepare_sequences, {dim3(1), dim3(kLanes), 0, stream}, args);
  return geometry;
}

// --- block lists -------------------------------------------------------------------------------------------------------

namespace {

__device__ __forceinline__ const int32_t* choices_of(const LayoutArguments& args, const Unit& unit,
                                                     const WaveRow& place) {
  return row_of<int32_t>(args.block_indices, unit.batch_idx, place.head, place.query);
}

}  // namespace

// Step 1.
__global__ void __launch_bounds__(kThreads) moba_count_choices(const LayoutArguments args) {
  const MobaGeometry& geometry = args.geometry;
  const BlockListsOnDevice& lists = args.lists;
  const int lane = lane_id();
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + warp_id();
  if (row >= lists.num_rows) return;  // whole warps, and no barrier follows
  const Unit unit = unit_at(geometry, args.wave.first_unit + blockIdx.y);
  const WaveRow place = wave_row(geometry, args.wave, unit, row);
  const SequenceOnDevice sequence = sequence_of_query(geometry, place.query);
  const int32_t* choices = choices_of(args, unit, place);
  bool is_faulty = !sequence.exists;
  for (int slot = lane; slot < geometry.top_k; slot += kLanes) {
    const int32_t choice = choices[slot];
    is_faulty = is_faulty || choice < -1 || choice >= sequence.num_blocks;
    for (int other = 0; other < slot; ++other) is_faulty = is_faulty || (choice >= 0 && choices[other] == choice);
  }
  const bool is_valid = !__any_sync(kAllLanes, is_faulty);
  if (lane == 0) lists.is_row_valid[blockIdx.y * lists.num_rows + row] = is_valid ? 1 : 0;
  if (!is_valid) return;
  int32_t* counts = lists.counts + (blockIdx.y * lists.num_chunks + row / kRowsPerChunk) * geometry.num_blocks;
  for (int slot = lane; slot < geometry.top_k; slot += kLanes) {
    const int32_t choice = choices[slot];
    if (num_visible_keys(geometry, sequence, place.query, choice) > 0) {
      cuda::add_atomic(counts + sequence.first_block + choice, 1);
    }
  }
}

// Step 2. Leaves each list's length in list_starts.
__global__ void __launch_bounds__(kThreads) moba_scan_chunks(const LayoutArguments args) {
  const BlockListsOnDevice& lists = args.lists;
  const int64_t num_blocks = args.geometry.num_blocks;
  const int64_t block = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (block >= num_blocks) return;
  int32_t* counts = lists.counts + blockIdx.y * lists.num_chunks * num_blocks + block;
  int32_t total = 0;
  for (int64_t chunk = 0; chunk < lists.num_chunks; ++chunk) {
    const int32_t count = counts[chunk * num_blocks];
    counts[chunk * num_blocks] = total;
    total += count;
  }
  lists.list_starts[blockIdx.y * (num_blocks + 1) + block] = total;
}

namespace {

struct ScanSharedMemory {
  int32_t warp_entries[kWarps];
  int32_t warp_items[kWarps];
};

__device__ __forceinline__ int32_t sum_up_to_lane(int32_t value) {
  const int lane = lane_id();
  for (int distance = 1; distance < kLanes; distance *= 2) {
    const int32_t earlier = __shfl_up_sync(kAllLanes, value, distance);
    value += lane >= distance ? earlier : 0;
  }
  return value;
}

}  // namespace

// Step 3.
__global__ void __launch_bounds__(kThreads) moba_scan_blocks(const LayoutArguments args) {
  ScanSharedMemory& shared = *reinterpret_cast<ScanSharedMemory*>(cuda::dynamic_shared_memory());
  const int64_t num_blocks = args.geometry.num_blocks;
  int32_t* list_starts = args.lists.list_starts + blockIdx.x * (num_blocks + 1);
  int32_t* item_starts = args.lists.item_starts + blockIdx.x * (num_blocks + 1);
  int32_t entries_before = 0, items_before = 0;
  for (int64_t first = 0; first < num_blocks; first += kThreads) {
    const int64_t block = first + threadIdx.x;
    const int32_t entries = block < num_blocks ? list_starts[block] : 0;
    const int32_t items = static_cast<int32_t>(divide_up(entries, args.entries_per_item));
    const int32_t entries_through = sum_up_to_lane(entries);
    const int32_t items_through = sum_up_to_lane(items);
    if (lane_id() == kLanes - 1) {
      shared.warp_entries[warp_id()] = entries_through;
      shared.warp_items[warp_id()] = items_through;
    }
    // Publishes every warp's totals to all warps.
    __syncthreads();
    int32_t warp_entries = 0, warp_items = 0;  // of the warps before this one, then of all
    for (int w = 0; w < warp_id(); ++w) {
      warp_entries += shared.warp_entries[w];
      warp_items += shared.warp_items[w];
    }
    if (block < num_blocks) {
      list_starts[block] = entries_before + warp_entries + entries_through - entries;
      item_starts[block] = items_before + warp_items + items_through - items;
    }
    for (int w = warp_id(); w < kWarps; ++w) {
      warp_entries += shared.warp_entries[w];
      warp_items += shared.warp_items[w];
    }
    entries_before += warp_entries;
    items_before += warp_items;
    // Tells all warps that the totals have been read and the next blocks may overwrite them.
    __syncthreads();
  }
  if (threadIdx.x == 0) {
    list_starts[num_blocks] = entries_before;
    item_starts[num_blocks] = items_before;
  }
}

// Step 4.
__global__ void __launch_bounds__(kFillWarps* kLanes) moba_fill_lists(const LayoutArguments args) {
  const MobaGeometry& geometry = args.geometry;
  const BlockListsOnDevice& lists = args.lists;
  const int64_t chunk = static_cast<int64_t>(blockIdx.x) * kFillWarps + warp_id();
  if (chunk >= lists.num_chunks) return;  // whole warps, and no block-wide barrier follows
  const Unit unit = unit_at(geometry, args.wave.first_unit + blockIdx.y);
  int32_t* cursors = lists.counts + (blockIdx.y * lists.num_chunks + chunk) * geometry.num_blocks;
  const int32_t* list_starts = lists.list_starts + blockIdx.y * (geometry.num_blocks + 1);
  int32_t* entries = lists.entries + blockIdx.y * lists.num_rows * geometry.top_k;
  const uint16_t* is_row_valid = lists.is_row_valid + blockIdx.y * lists.num_rows;
  const int64_t first_row = chunk * kRowsPerChunk;
  const int64_t last_row = first_row + kRowsPerChunk < lists.num_rows ? first_row + kRowsPerChunk : lists.num_rows;
  for (int64_t row = first_row; row < last_row; ++row) {
    if (is_row_valid[row] == 0) continue;
    const WaveRow place = wave_row(geometry, args.wave, unit, row);
    const SequenceOnDevice sequence = sequence_of_query(geometry, place.query);
    const int32_t* choices = choices_of(args, unit, place);
    for (int slot = lane_id(); slot < geometry.top_k; slot += kLanes) {
      const int32_t choice = choices[slot];
      if (num_visible_keys(geometry, sequence, place.query, choice) == 0) continue;
      const int64_t block = sequence.first_block + choice;
      const int32_t position = list_starts[block] + cursors[block]++;
      entries[position] = static_cast<int32_t>(row * geometry.top_k + slot);
    }
    // Publishes the cursors moved by this row's lanes to the next row's.
    __syncwarp();
  }
}

int64_t list_row_bytes(const MobaProblem& problem) {
  return problem.top_k * static_cast<int64_t>(sizeof(int32_t)) + 2 +
         divide_up(blocks_per_unit(problem) * static_cast<int64_t>(sizeof(int32_t)), kRowsPerChunk);
}

int64_t list_unit_bytes(const MobaProblem& problem) {
  return (3 * blocks_per_unit(problem) + 2) * static_cast<int64_t>(sizeof(int32_t));
}

BlockListsOnDevice take_lists(const MobaProblem& problem, int64_t num_units, int64_t num_queries,
                              WorkspaceCutter& cutter) {
  const int64_t num_blocks = blocks_per_unit(problem);
  BlockListsOnDevice lists{};
  lists.num_rows = num_queries * heads_per_unit(problem);
  lists.num_chunks = divide_up(lists.num_rows, kRowsPerChunk);
  lists.counts = cutter.take<int32_t>(num_units * lists.num_chunks * num_blocks);
  lists.list_starts = cutter.take<int32_t>(num_units * (num_blocks + 1));
  lists.item_starts = cutter.take<int32_t>(num_units * (num_blocks + 1));
  lists.entries = cutter.take<int32_t>(num_units * lists.num_rows * problem.top_k);
  lists.is_row_valid = cutter.take<uint16_t>(num_units * lists.num_rows);
  return lists;
}

int64_t most_items(const MobaProblem& problem, int64_t num_queries, int64_t entries_per_item) {
  const int64_t num_entries = num_queries * heads_per_unit(problem) * problem.top_k;
  const int64_t num_blocks = blocks_per_unit(problem);
  // Every item but a list's last is full, and there are no more lists than blocks or choices.
  return num_entries / entries_per_item + (num_blocks < num_entries ? num_blocks : num_entries);
}

void build_block_lists(const LayoutArguments& args, cudaStream_t stream) {
  const StageRange range("moba: layout");
  const BlockListsOnDevice& lists = args.lists;
  const auto num_units = static_cast<unsigned>(args.wave.num_units);
  const int64_t num_blocks = args.geometry.num_blocks;
  const auto grid = [](int64_t count, int64_t per_block) {
    return static_cast<unsigned>(divide_up(count, per_block));
  };
  const size_t count_bytes =
      static_cast<size_t>(args.wave.num_units * lists.num_chunks * num_blocks) * sizeof(int32_t);
  cuda_require(cudaMemsetAsync(lists.counts, 0, count_bytes, stream), "clearing the counts of block lists");
  cuda::launch(moba_count_choices, {dim3(grid(lists.num_rows, kWarps), num_units), dim3(kThreads), 0, stream}, args);
  if (num_blocks > 0) {
    cuda::launch(moba_scan_chunks, {dim3(grid(num_blocks, kThreads), num_units), dim3(kThreads), 0, stream}, args);
  }
  cuda::launch(moba_scan_blocks, {dim3(num_units), dim3(kThreads), sizeof(ScanSharedMemory), stream}, args);
  cuda::launch(moba_fill_lists, {dim3(grid(lists.num_chunks, kFillWarps), num_units), dim3(kFillWarps * kLanes), 0,
                                 stream}, args);
}

}  // namespace topgather
