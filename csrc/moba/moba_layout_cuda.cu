// From query-major choices to key-major lists, by counting; and packed sequences put in order.
//
// For each unit of a wave: list_starts[j] .. list_starts[j + 1] delimit in `entries` the choices (row * top_k + slot)
// of block j, ascending. A choice no key of which the query sees is left out, and so are all choices of a row that
// names a block its sequence does not have, or one block twice. Nothing is sorted and nothing waits for the host.
//
// Rows are cut into chunks of kRowsPerChunk. Steps, a kernel each:
//   1. moba_count_choices: a lane takes a choice, its row's lanes judge the row, and choices are counted per
//      (chunk, block); moba_count_few_blocks where blocks are few, moba_count_many_choices where a row has more choices
//      than a warp has lanes;
//   2. moba_scan_chunks: a lane takes a block, a warp a stretch of the chunks, and chunk counts become starts within the
//      block's list;
//   3. moba_scan_blocks: a thread block takes a unit and adds list lengths and work items up over its blocks,
//      and notes each item's block; moba_scan_few_blocks takes both steps where blocks are few;
//   4. moba_fill_lists: a warp takes a chunk and walks its rows in order, one row's slots side by side, with a cursor
//      per block. A valid row names no block twice, so the lanes of one step never meet, and the order of rows is the
//      order of entries. Choices are read and judged several rows at a time, and entries written once all have a place.
// Numerics: integers.
// Determinism: counts are sums of ones, everything else has a fixed order.
#include <algorithm>

#include "../common/checks.h"
#include "../cuda/launch.cuh"
#include "moba_cuda.h"
#include "moba_stages_cuda.cuh"

namespace topgather {

using cuda::kAllLanes;
using cuda::kLanes;
using cuda::lane_id;
using cuda::warp_id;

namespace {
constexpr int kThreads = MobaLayoutConfig::kThreads;
constexpr int kWarps = kThreads / kLanes;
constexpr int kRowsPerChunk = MobaLayoutConfig::kRowsPerChunk;
constexpr int kFillWarps = MobaLayoutConfig::kChunksPerThreadBlock;  // fewer where cursors are many
constexpr int kFillRounds = 4;                                       // steps whose choices are on their way at once
}  // namespace

// --- packed sequences -----------------------------------------------------------------------------------------------

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
  const auto clamped = [](int64_t value, int64_t limit) { return value < 0 ? 0 : (value > limit ? limit : value); };
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
  require(problem.query_len <= INT32_MAX && problem.key_len <= INT32_MAX, "at most 2^31 - 1 tokens on CUDA");
  require(problem.num_query_heads <= INT32_MAX && problem.block_size <= INT32_MAX && problem.top_k <= INT32_MAX,
          "heads, block_size and top_k must fit 31 bits on CUDA");
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
  geometry.by_top_k = cuda::Divisor(problem.top_k);
  geometry.by_heads_per_choice = cuda::Divisor(problem.heads_per_choice);
  geometry.is_causal = problem.is_causal;
  geometry.window = static_cast<int32_t>(problem.window);
  if (!is_packed(problem)) return geometry;
  int64_t* starts[4];
  for (int64_t*& start : starts) start = cutter.take<int64_t>(problem.batch_size + 1);
  geometry.query_starts = starts[0];
  geometry.key_starts = starts[1];
  geometry.block_starts = starts[2];
  geometry.tile_starts = starts[3];
  if (starts[0] == nullptr) return geometry;
  const SequenceArguments args{
      problem.cu_seqlens_q.data, problem.cu_seqlens_k.data, starts[0],       starts[1],          starts[2], starts[3],
      problem.batch_size,        problem.query_len,         problem.key_len, problem.block_size, query_tile};
  cuda::launch(moba_prepare_sequences, {dim3(1), dim3(kLanes), 0, stream}, args);
  return geometry;
}

// --- block lists ----------------------------------------------------------------------------------------------------

namespace {

// Rows side by side in a warp, a lane a choice: as many whole rows as fit. With more than 32 slots, a row takes the
// warp and its slots go by in rounds of 32.
struct LaneRows {
  int rows_per_warp;
  int row;         // of the lane, in the warp
  int first_slot;  // of the lane
  unsigned lanes;  // of the lane's row
  bool is_used;
};

__device__ __forceinline__ LaneRows lane_rows(const MobaGeometry& geometry) {
  const int lane = lane_id();
  const int32_t top_k = geometry.top_k;
  if (top_k > kLanes) return {1, 0, lane, kAllLanes, true};
  const int rows_per_warp = row_of_entry(geometry, kLanes);
  const int row = row_of_entry(geometry, lane);
  const unsigned slots = top_k == kLanes ? kAllLanes : (1u << top_k) - 1;
  return {rows_per_warp, row, lane - row * top_k, row < rows_per_warp ? slots << (row * top_k) : 0u,
          row < rows_per_warp};
}

// A row of the wave as the lanes that share it see it.
struct RowChoices {
  int64_t query;
  SequenceOnDevice sequence;
  const int32_t* choices;  // [top_k] int32
};

__device__ __forceinline__ RowChoices row_choices(const LayoutArguments& args, const Unit& unit, int64_t row) {
  const WaveRow place = wave_row(args.geometry, args.wave, unit, row);
  return {place.query, sequence_of_query(args.geometry, place.query),
          choices_of_query(args.geometry, args.block_indices, unit, place)};
}

}  // namespace

// Whether an earlier slot of the lane's row names the same block. The row's slots lie side by side, one a lane.
__device__ __forceinline__ bool is_named_before(const LaneRows& lanes, int32_t top_k, int32_t choice) {
  bool result = false;
#pragma unroll 4
  for (int distance = 1; distance < top_k; ++distance) {
    const int32_t other = __shfl_up_sync(kAllLanes, choice, distance);
    result = result || (distance <= lanes.first_slot && other == choice);
  }
  return result && choice >= 0;
}

__device__ __forceinline__ void count_choice(const LayoutArguments& args, const RowChoices& row, int32_t choice,
                                             int32_t* chunk_counts) {
  if (num_visible_keys(args.geometry, row.sequence, row.query, choice) > 0) {
    cuda::add_atomic(chunk_counts + row.sequence.first_block + choice, 1);
  }
}

// A warp's rows first_row .. end, at most kCountRounds rounds of them, whose choices are on their way at once. Judges the
// rows and calls add(row, block, is_seen), the warp as a whole.
template <typename Add>
__device__ __forceinline__ void count_rows(const LayoutArguments& args, const LaneRows& lanes, const Unit& unit,
                                           int64_t first_row, int64_t end, const Add& add) {
  constexpr int kRounds = MobaLayoutConfig::kCountRounds;
  const MobaGeometry& geometry = args.geometry;
  const BlockListsOnDevice& lists = args.lists;
  RowChoices rows[kRounds];
  int32_t choices[kRounds];
#pragma unroll
  for (int round = 0; round < kRounds; ++round) {
    const int64_t row = first_row + lanes.row + round * lanes.rows_per_warp;
    const bool is_there = lanes.is_used && row < end;
    rows[round] = row_choices(args, unit, is_there ? row : 0);
    choices[round] = rows[round].choices[is_there ? lanes.first_slot : 0];
  }
#pragma unroll
  for (int round = 0; round < kRounds; ++round) {
    const int64_t row = first_row + lanes.row + round * lanes.rows_per_warp;
    const bool is_there = lanes.is_used && row < end;
    const SequenceOnDevice& sequence = rows[round].sequence;
    const int32_t choice = choices[round];
    const bool is_repeated = is_named_before(lanes, geometry.top_k, choice);
    const bool is_faulty = !sequence.exists || choice < -1 || choice >= sequence.num_blocks || is_repeated;
    const bool is_valid = (__ballot_sync(kAllLanes, is_there && is_faulty) & lanes.lanes) == 0;
    if (is_there && lanes.first_slot == 0) {
      lists.is_row_valid[blockIdx.y * lists.num_rows + row] = is_valid ? 1 : 0;
    }
    const bool is_seen = is_there && is_valid && num_visible_keys(geometry, sequence, rows[round].query, choice) > 0;
    add(row, is_seen ? sequence.first_block + choice : 0, is_seen);
  }
}

// Step 1, a lane a choice. The counts are cleared.
__global__ void __launch_bounds__(kThreads, 1) moba_count_choices(const LayoutArguments args) {
  const BlockListsOnDevice& lists = args.lists;
  const LaneRows lanes = lane_rows(args.geometry);
  const Unit unit = unit_at(args.geometry, args.wave.first_unit + blockIdx.y);
  int32_t* counts = lists.counts + blockIdx.y * lists.num_chunks * args.geometry.num_blocks;
  const int rows_of_warp = MobaLayoutConfig::kCountRounds * lanes.rows_per_warp;
  const int64_t first_row = (static_cast<int64_t>(blockIdx.x) * kWarps + warp_id()) * rows_of_warp;
  count_rows(args, lanes, unit, first_row, lists.num_rows, [&](int64_t row, int64_t block, bool is_seen) {
    if (is_seen) cuda::add_atomic(counts + row / kRowsPerChunk * args.geometry.num_blocks + block, 1);
  });
}

namespace {
struct CountSharedMemory {
  int32_t counts[kWarps][MobaLayoutConfig::kMaxBlocksOfOneScan];
};
}  // namespace

// Step 1 where blocks are few: a thread block takes a chunk, its warps count in places of their own and add them up, so
// that there is nothing to clear.
__global__ void __launch_bounds__(kThreads, 1) moba_count_few_blocks(const LayoutArguments args) {
  const BlockListsOnDevice& lists = args.lists;
  CountSharedMemory& shared = *reinterpret_cast<CountSharedMemory*>(cuda::dynamic_shared_memory());
  const LaneRows lanes = lane_rows(args.geometry);
  const Unit unit = unit_at(args.geometry, args.wave.first_unit + blockIdx.y);
  const auto num_blocks = static_cast<int>(args.geometry.num_blocks);
  int32_t* counts = shared.counts[warp_id()];
  for (int block = lane_id(); block < num_blocks; block += kLanes) counts[block] = 0;
  // Publishes the zeros to the warp's lanes.
  __syncwarp();
  const int rows_of_warp = MobaLayoutConfig::kCountRounds * lanes.rows_per_warp;
  const int64_t first_of_chunk = static_cast<int64_t>(blockIdx.x) * kRowsPerChunk;
  const int64_t end_of_chunk = first_of_chunk + kRowsPerChunk;
  const int64_t end = end_of_chunk < lists.num_rows ? end_of_chunk : lists.num_rows;
#pragma unroll 1
  for (int64_t row = first_of_chunk + warp_id() * rows_of_warp; row < end; row += kWarps * rows_of_warp) {
    count_rows(args, lanes, unit, row, end, [&](int64_t, int64_t block, bool is_seen) {
      // One row's lanes after the other's: those of one row have different blocks.
      for (int turn = 0; turn < lanes.rows_per_warp; ++turn) {
        if (is_seen && lanes.row == turn) ++counts[block];
        // Publishes the counts of this row's lanes to the next row's.
        __syncwarp();
      }
    });
  }
  // Publishes every warp's counts to all warps.
  __syncthreads();
  for (int block = static_cast<int>(threadIdx.x); block < num_blocks; block += kThreads) {
    int32_t total = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) total += shared.counts[w][block];
    lists.counts[(blockIdx.y * lists.num_chunks + blockIdx.x) * num_blocks + block] = total;
  }
}

// Step 1 where a row has more choices than a warp has lanes: the warp takes a row.
__global__ void __launch_bounds__(kThreads, 1) moba_count_many_choices(const LayoutArguments args) {
  const MobaGeometry& geometry = args.geometry;
  const BlockListsOnDevice& lists = args.lists;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + warp_id();
  if (row >= lists.num_rows) return;  // whole warps, and no barrier follows
  const RowChoices mine = row_choices(args, unit_at(geometry, args.wave.first_unit + blockIdx.y), row);
  bool is_faulty = !mine.sequence.exists;
  for (int slot = lane_id(); slot < geometry.top_k; slot += kLanes) {
    const int32_t choice = mine.choices[slot];
    is_faulty = is_faulty || choice < -1 || choice >= mine.sequence.num_blocks;
    for (int other = 0; other < slot; ++other) {
      is_faulty = is_faulty || (choice >= 0 && mine.choices[other] == choice);
    }
  }
  const bool is_valid = __ballot_sync(kAllLanes, is_faulty) == 0;
  if (lane_id() == 0) lists.is_row_valid[blockIdx.y * lists.num_rows + row] = is_valid ? 1 : 0;
  if (!is_valid) return;
  int32_t* counts = lists.counts + (blockIdx.y * lists.num_chunks + row / kRowsPerChunk) * geometry.num_blocks;
  for (int slot = lane_id(); slot < geometry.top_k; slot += kLanes) {
    count_choice(args, mine, mine.choices[slot], counts);
  }
}

namespace {

constexpr int kMaxScanWarps = MobaLayoutConfig::kMaxScanThreads / kLanes;

struct ScanSharedMemory {
  int32_t chunk_sums[kWarps][kLanes];  // of each warp's chunks, by block
  int32_t warp_entries[kMaxScanWarps];
  int32_t warp_items[kMaxScanWarps];
};

// Step 2 for 32 blocks, a lane each; every warp takes a stretch of the chunks. Leaves each list's length in list_starts.
// Called by all threads of kWarps warps; a barrier.
__device__ __forceinline__ void scan_chunks(const LayoutArguments& args, int64_t unit_in_wave, int32_t first_block,
                                            ScanSharedMemory& shared) {
  constexpr int kUnroll = MobaLayoutConfig::kScanUnroll;
  const BlockListsOnDevice& lists = args.lists;
  const int64_t num_blocks = args.geometry.num_blocks;
  const auto num_chunks = static_cast<int32_t>(lists.num_chunks);
  const int32_t stretch = (num_chunks + kWarps - 1) / kWarps;
  const int32_t first_chunk = warp_id() * stretch, end_chunk = min(first_chunk + stretch, num_chunks);
  const int32_t block = first_block + lane_id();
  const int32_t end = block < num_blocks ? end_chunk : 0;  // a block that is not there has no chunks
  int32_t* counts = lists.counts + unit_in_wave * num_chunks * num_blocks + block;
  int32_t total = 0;
#pragma unroll 1
  for (int32_t first = first_chunk; first < end; first += kUnroll) {
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) total += first + i < end ? counts[(first + i) * num_blocks] : 0;
  }
  shared.chunk_sums[warp_id()][lane_id()] = total;
  // Publishes every warp's sums to all warps.
  __syncthreads();
  int32_t start = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) start += w < warp_id() ? shared.chunk_sums[w][lane_id()] : 0;
#pragma unroll 1
  for (int32_t first = first_chunk; first < end; first += kUnroll) {
    int32_t count[kUnroll];
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) count[i] = first + i < end ? counts[(first + i) * num_blocks] : 0;
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      if (first + i < end) counts[(first + i) * num_blocks] = start;
      start += count[i];
    }
  }
  if (warp_id() == kWarps - 1 && block < num_blocks) lists.list_starts[unit_in_wave * (num_blocks + 1) + block] = start;
  // Publishes the lengths to all threads, and tells all warps that the sums have been read.
  __syncthreads();
}

__device__ __forceinline__ int32_t sum_up_to_lane(int32_t value) {
  const int lane = lane_id();
  for (int distance = 1; distance < kLanes; distance *= 2) {
    const int32_t earlier = __shfl_up_sync(kAllLanes, value, distance);
    value += lane >= distance ? earlier : 0;
  }
  return value;
}

// Step 3 for a unit, by the kNumWarps warps of the thread block.
template <int kNumWarps>
__device__ __forceinline__ void scan_blocks(const LayoutArguments& args, int64_t unit_in_wave,
                                            ScanSharedMemory& shared) {
  constexpr int kNumThreads = kNumWarps * kLanes;
  const auto num_blocks = static_cast<int32_t>(args.geometry.num_blocks);
  int32_t* list_starts = args.lists.list_starts + unit_in_wave * (num_blocks + 1);
  int32_t* item_starts = args.lists.item_starts + unit_in_wave * (num_blocks + 1);
  int32_t* item_blocks = args.lists.item_blocks + unit_in_wave * args.lists.max_items;
  int32_t entries_before = 0, items_before = 0;
  for (int32_t first = 0; first < num_blocks; first += kNumThreads) {
    const int32_t block = first + static_cast<int32_t>(threadIdx.x);
    const int32_t entries = block < num_blocks ? list_starts[block] : 0;
    const int32_t items = divide_up(entries, args.lists.entries_per_item);
    const int32_t entries_through = sum_up_to_lane(entries);
    const int32_t items_through = sum_up_to_lane(items);
    if (lane_id() == kLanes - 1) {
      shared.warp_entries[warp_id()] = entries_through;
      shared.warp_items[warp_id()] = items_through;
    }
    // Publishes every warp's totals to all warps.
    __syncthreads();
    // A lane a warp: what the warps up to it have, then what those before this one have, and all.
    const bool is_warp = lane_id() < kNumWarps;
    const int32_t warp_entries = sum_up_to_lane(is_warp ? shared.warp_entries[lane_id()] : 0);
    const int32_t warp_items = sum_up_to_lane(is_warp ? shared.warp_items[lane_id()] : 0);
    const int before = warp_id() > 0 ? warp_id() - 1 : 0;
    const int32_t entries_of_before = __shfl_sync(kAllLanes, warp_entries, before);
    const int32_t items_of_before = __shfl_sync(kAllLanes, warp_items, before);
    if (block < num_blocks) {
      const bool is_first = warp_id() == 0;
      list_starts[block] = entries_before + (is_first ? 0 : entries_of_before) + entries_through - entries;
      const int32_t first_item = items_before + (is_first ? 0 : items_of_before) + items_through - items;
      item_starts[block] = first_item;
      for (int32_t i = 0; i < items; ++i) item_blocks[first_item + i] = block;
    }
    entries_before += __shfl_sync(kAllLanes, warp_entries, kLanes - 1);
    items_before += __shfl_sync(kAllLanes, warp_items, kLanes - 1);
    // Tells all warps that the totals have been read and the next blocks may overwrite them.
    __syncthreads();
  }
  if (threadIdx.x == 0) {
    list_starts[num_blocks] = entries_before;
    item_starts[num_blocks] = items_before;
  }
}

}  // namespace

// Step 2, 32 blocks of a unit.
__global__ void __launch_bounds__(kThreads, 1) moba_scan_chunks(const LayoutArguments args) {
  ScanSharedMemory& shared = *reinterpret_cast<ScanSharedMemory*>(cuda::dynamic_shared_memory());
  scan_chunks(args, blockIdx.y, static_cast<int32_t>(blockIdx.x) * kLanes, shared);
}

// Step 3.
__global__ void __launch_bounds__(kMaxScanWarps* kLanes, 1) moba_scan_blocks(const LayoutArguments args) {
  scan_blocks<kMaxScanWarps>(args, blockIdx.x, *reinterpret_cast<ScanSharedMemory*>(cuda::dynamic_shared_memory()));
}

// Steps 2 and 3 where blocks are few.
__global__ void __launch_bounds__(kThreads, 1) moba_scan_few_blocks(const LayoutArguments args) {
  ScanSharedMemory& shared = *reinterpret_cast<ScanSharedMemory*>(cuda::dynamic_shared_memory());
#pragma unroll 1
  for (int32_t first = 0; first < static_cast<int32_t>(args.geometry.num_blocks); first += kLanes) {
    scan_chunks(args, blockIdx.x, first, shared);
  }
  scan_blocks<kWarps>(args, blockIdx.x, shared);
}

// Step 4. Dynamic shared memory, where there is any: cursors [chunk of the thread block, block] int32.
__global__ void __launch_bounds__(kFillWarps* kLanes, 1) moba_fill_lists(const LayoutArguments args) {
  const MobaGeometry& geometry = args.geometry;
  const BlockListsOnDevice& lists = args.lists;
  constexpr int kRounds = kFillRounds;
  const int64_t chunk = static_cast<int64_t>(blockIdx.x) * (blockDim.x / kLanes) + warp_id();
  if (chunk >= lists.num_chunks) return;  // whole warps, and no block-wide barrier follows
  const Unit unit = unit_at(geometry, args.wave.first_unit + blockIdx.y);
  const int32_t* list_starts = lists.list_starts + blockIdx.y * (geometry.num_blocks + 1);
  int32_t* counts = lists.counts + (blockIdx.y * lists.num_chunks + chunk) * geometry.num_blocks;
  int32_t* cursors = args.are_cursors_shared
                         ? reinterpret_cast<int32_t*>(cuda::dynamic_shared_memory()) + warp_id() * geometry.num_blocks
                         : counts;
#pragma unroll 8
  for (int32_t block = lane_id(); block < static_cast<int32_t>(geometry.num_blocks); block += kLanes) {
    cursors[block] = counts[block] + list_starts[block];
  }
  // Publishes the cursors to the warp's lanes.
  __syncwarp();
  int32_t* entries = lists.entries + blockIdx.y * lists.num_rows * geometry.top_k;
  const uint16_t* is_row_valid = lists.is_row_valid + blockIdx.y * lists.num_rows;
  const LaneRows lanes = lane_rows(geometry);
  const int64_t end_of_chunk = (chunk + 1) * kRowsPerChunk;
  const int64_t end = end_of_chunk < lists.num_rows ? end_of_chunk : lists.num_rows;
  // A step is as many rows as the warp's lanes have choices of, or 32 choices of a row with more. What several steps read
  // is on its way at once, whether their rows are valid or not.
  int64_t step_row = chunk * kRowsPerChunk;
  int32_t step_slot = 0;
  while (step_row < end) {
    RowChoices rows[kRounds];
    int32_t choices[kRounds], entry[kRounds], place[kRounds], row_of_round[kRounds];
    uint16_t is_valid[kRounds];
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
      const int64_t row = step_row + lanes.row;
      const int32_t slot = step_slot + lanes.first_slot;
      const bool is_there = lanes.is_used && row < end && slot < geometry.top_k;
      rows[round] = row_choices(args, unit, is_there ? row : 0);
      rows[round].choices += is_there ? slot : 0;
      row_of_round[round] = static_cast<int32_t>(is_there ? row : 0);
      entry[round] = is_there ? static_cast<int32_t>(row * geometry.top_k + slot) : -1;
      step_slot += kLanes;
      if (step_slot >= geometry.top_k) {
        step_slot = 0;
        step_row += lanes.rows_per_warp;
      }
    }
    // No branch lies between these loads, so that none waits for another.
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
      choices[round] = *rows[round].choices;
      is_valid[round] = is_row_valid[row_of_round[round]];
    }
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
      // The choice first: what is asked for only if another load says so is loaded behind it.
      const bool is_seen = num_visible_keys(geometry, rows[round].sequence, rows[round].query, choices[round]) > 0 &&
                           is_valid[round] != 0 && entry[round] >= 0;
      if (args.terms != nullptr && entry[round] >= 0 && !is_seen) {
        args.terms[blockIdx.y * lists.num_rows * geometry.top_k + entry[round]] =
            make_float2(-INFINITY, is_valid[round] != 0 ? kSumOfUnseen : kSumOfInvalid);
      }
      int32_t* cursor = cursors + (is_seen ? rows[round].sequence.first_block + choices[round] : 0);
      place[round] = -1;
      for (int turn = 0; turn < lanes.rows_per_warp; ++turn) {
        if (is_seen && lanes.row == turn) {
          place[round] = *cursor;
          *cursor = place[round] + 1;
        }
        // Publishes the cursors moved by this row's lanes to the next row's.
        __syncwarp();
      }
    }
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
      if (place[round] >= 0) entries[place[round]] = entry[round];
    }
  }
}

int64_t list_row_bytes(const MobaProblem& problem) {
  // Entries and the items they fill, validity, the row's share of its chunk's counts.
  return 2 * problem.top_k * static_cast<int64_t>(sizeof(int32_t)) + 2 +
         divide_up(blocks_per_unit(problem) * static_cast<int64_t>(sizeof(int32_t)), kRowsPerChunk);
}

int64_t list_unit_bytes(const MobaProblem& problem) {
  return (4 * blocks_per_unit(problem) + 2) * static_cast<int64_t>(sizeof(int32_t));
}

BlockListsOnDevice take_lists(const MobaProblem& problem, int64_t num_units, int64_t num_queries,
                              int64_t entries_per_item, WorkspaceCutter& cutter) {
  const int64_t num_blocks = blocks_per_unit(problem);
  BlockListsOnDevice lists{};
  lists.num_rows = num_queries * heads_per_unit(problem);
  lists.num_chunks = divide_up(lists.num_rows, kRowsPerChunk);
  lists.entries_per_item = static_cast<int32_t>(entries_per_item);
  // Every item but a list's last is full, and there are no more lists than blocks or choices.
  const int64_t num_entries = lists.num_rows * problem.top_k;
  lists.max_items = num_blocks > 0 ? num_entries / entries_per_item + std::min(num_blocks, num_entries) : 0;
  lists.counts = cutter.take<int32_t>(num_units * lists.num_chunks * num_blocks);
  lists.list_starts = cutter.take<int32_t>(num_units * (num_blocks + 1));
  lists.item_starts = cutter.take<int32_t>(num_units * (num_blocks + 1));
  lists.item_blocks = cutter.take<int32_t>(num_units * lists.max_items);
  lists.entries = cutter.take<int32_t>(num_units * num_entries);
  lists.is_row_valid = cutter.take<uint16_t>(num_units * lists.num_rows);
  return lists;
}

void build_block_lists(const LayoutArguments& args, cudaStream_t stream) {
  const StageRange range("moba.layout");
  const BlockListsOnDevice& lists = args.lists;
  const auto num_units = static_cast<unsigned>(args.wave.num_units);
  const int64_t num_blocks = args.geometry.num_blocks;
  const auto grid = [](int64_t count, int64_t per_block) { return static_cast<unsigned>(divide_up(count, per_block)); };
  const bool has_many_choices = args.geometry.top_k > kLanes;
  const bool has_few_blocks = num_blocks <= MobaLayoutConfig::kMaxBlocksOfOneScan;
  if (has_few_blocks && !has_many_choices) {
    cuda::launch(
        moba_count_few_blocks,
        {dim3(static_cast<unsigned>(lists.num_chunks), num_units), dim3(kThreads), sizeof(CountSharedMemory), stream},
        args);
  } else {
    const size_t count_bytes =
        static_cast<size_t>(args.wave.num_units * lists.num_chunks * num_blocks) * sizeof(int32_t);
    cuda_require(cudaMemsetAsync(lists.counts, 0, count_bytes, stream), "clearing the counts of block lists");
    const int64_t rows_per_warp =
        has_many_choices ? 1 : MobaLayoutConfig::kCountRounds * (kLanes / std::max<int64_t>(args.geometry.top_k, 1));
    cuda::launch(has_many_choices ? moba_count_many_choices : moba_count_choices,
                 {dim3(grid(lists.num_rows, kWarps * rows_per_warp), num_units), dim3(kThreads), 0, stream}, args);
  }
  constexpr size_t kScanBytes = sizeof(ScanSharedMemory);
  if (has_few_blocks) {
    cuda::launch(moba_scan_few_blocks, {dim3(num_units), dim3(kThreads), kScanBytes, stream}, args);
  } else {
    cuda::launch(moba_scan_chunks, {dim3(grid(num_blocks, kLanes), num_units), dim3(kThreads), kScanBytes, stream},
                 args);
    cuda::launch(moba_scan_blocks, {dim3(num_units), dim3(MobaLayoutConfig::kMaxScanThreads), kScanBytes, stream},
                 args);
  }
  // The more blocks, the fewer warps whose cursors shared memory holds.
  LayoutArguments fill = args;
  const int64_t warp_bytes = num_blocks * static_cast<int64_t>(sizeof(int32_t));
  int64_t warps = kFillWarps;
  while (warps > 1 && warps * warp_bytes > MobaLayoutConfig::kMaxCursorBytes) warps /= 2;
  fill.are_cursors_shared = warps * warp_bytes <= MobaLayoutConfig::kMaxCursorBytes;
  if (!fill.are_cursors_shared) warps = kFillWarps;
  cuda::launch(moba_fill_lists,
               {dim3(grid(lists.num_chunks, warps), num_units), dim3(static_cast<unsigned>(warps * kLanes)),
                fill.are_cursors_shared ? static_cast<size_t>(warps * warp_bytes) : 0, stream},
               fill);
}

}  // namespace topgather
