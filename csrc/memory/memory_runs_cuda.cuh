// What the gradient of a table and a step of its optimizer have in common on CUDA: sorted entries, runs of a row, and the
// sums of runs that go through several pieces. memory_backward_cuda.cu says how pieces, heads, tails and stretches work.
#pragma once

#include "../cuda/lane_rows.cuh"
#include "memory_config_cuda.h"

namespace topgather {

constexpr int kThreads = MemoryBackwardCudaConfig::kThreads;
constexpr int kMaxWarps = kThreads / kLanes;
constexpr int kBlocksPerProcessor = MemoryBackwardCudaConfig::kBlocksPerProcessor;
constexpr int kEntriesPerPiece = MemoryBackwardCudaConfig::kEntriesPerPiece;
constexpr int kEntriesInFlight = MemoryBackwardCudaConfig::kEntriesInFlight;
constexpr int kPiecesPerStretch = MemoryBackwardCudaConfig::kPiecesPerStretch;
constexpr int kPiecesInFlight = MemoryBackwardCudaConfig::kPiecesInFlight;
constexpr int kMaxGroups = kLanes / kMinLanesPerRow;
static_assert(kEntriesPerPiece % kLanes == 0, "pieces are read in whole rounds of any group");
static_assert(kEntriesInFlight == 4, "lanes' sums are added four at a time");

constexpr int32_t kNoRow = -1;

// What a walk needs of an entry, in sorted order: one load of 16 bytes.
struct alignas(16) SortedEntry {
  int32_t row;  // kNoRow: of no row
  int32_t target;
  int32_t token;
  float weight;
};

// Entries sorted by row, and where their sums go.
struct MemoryRunArguments {
  RowShape shape;
  uint32_t bag_size;
  int32_t num_rows;
  int32_t num_entries;
  int32_t num_pieces;
  int32_t warps_per_piece;     // that the slabs of a piece go round
  const int64_t* order;        // [T * K] int64
  const int32_t* sorted_rows;  // [T * K] int32
  const int32_t* targets;      // [T * K] int32
  const int32_t* tokens;       // [E] int32, -1: of none; null where bags are not ragged
  const float* weights;        // [T, K] float32
  const void* grad_out;        // [T, W] dtype
  int64_t grad_out_stride;
  int64_t num_padded_entries;
  SortedEntry* entries;  // [num_padded_entries], those past T * K of no row
  float* sums;           // [num_pieces, 2, W] float32: head and tail of each piece
};

// The row of sorted entry `position`, kNoRow where there is no such entry or it has none.
__device__ __forceinline__ int32_t row_at(const MemoryRunArguments& args, int64_t position) {
  if (position < 0 || position >= args.num_entries) return kNoRow;
  const int32_t row = args.sorted_rows[position];
  return row >= 0 && row < args.num_rows ? row : kNoRow;
}

__device__ __forceinline__ float* head_sum(const MemoryRunArguments& args, int64_t piece) {
  return args.sums + 2 * piece * args.shape.row_dim;
}
__device__ __forceinline__ float* tail_sum(const MemoryRunArguments& args, int64_t piece) {
  return args.sums + (2 * piece + 1) * args.shape.row_dim;
}

__device__ __forceinline__ SortedEntry load_entry(const SortedEntry* entry) {
  const int4 words = *reinterpret_cast<const int4*>(entry);
  return {words.x, words.y, words.z, __int_as_float(words.w)};
}

// Sorted entry `position` with its token and weight.
__device__ __forceinline__ SortedEntry gather_entry(const MemoryRunArguments& args, int64_t position) {
  SortedEntry entry = {row_at(args, position), 0, 0, 0.0f};
  if (entry.row != kNoRow) {
    const int64_t place = args.order[position];
    int32_t token = static_cast<int32_t>(static_cast<uint32_t>(place) / args.bag_size);
    if (args.tokens != nullptr) token = args.tokens[place];
    entry = {entry.row, args.targets[position], token, args.weights[place]};
  }
  return entry;
}

__device__ __forceinline__ void store_entry(SortedEntry* place, const SortedEntry& entry) {
  *reinterpret_cast<int4*>(place) = {entry.row, entry.target, entry.token, __float_as_int(entry.weight)};
}

// A piece as the group that walks it sees it.
struct Piece {
  int32_t idx;
  int64_t first;       // sorted position
  int32_t row_before;  // of the entry before the piece, of the entry after it
  int32_t row_after;
};

// A warp's columns of rows of sums.
constexpr int kSumColumns = 4;  // of a lane, a warp's width apart
constexpr int kSumSlab = kSumColumns * kLanes;

struct SumTask {
  int32_t idx;  // of a piece or stretch
  int first_column;
};

__device__ __forceinline__ SumTask sum_task(const MemoryRunArguments& args, uint32_t warp) {
  const uint32_t num_slabs = (static_cast<uint32_t>(args.shape.row_dim) + kSumSlab - 1) / kSumSlab;
  const uint32_t idx = warp / num_slabs;
  return {static_cast<int32_t>(idx), static_cast<int>(warp - idx * num_slabs) * kSumSlab + lane_id()};
}

// Adds the rows sums[first], sums[first + step], .. in order, several under way at once.
__device__ __forceinline__ void add_sums(const float* sums, int64_t step, int count, int first_column, int row_dim,
                                         float (&totals)[kSumColumns]) {
#pragma unroll 1
  for (int first = 0; first < count; first += kPiecesInFlight) {
    float terms[kPiecesInFlight][kSumColumns];
#pragma unroll
    for (int i = 0; i < kPiecesInFlight; ++i) {
#pragma unroll
      for (int c = 0; c < kSumColumns; ++c) {
        const int column = first_column + c * kLanes;
        terms[i][c] = first + i < count && column < row_dim ? sums[(first + i) * step + column] : 0.0f;
      }
    }
#pragma unroll
    for (int i = 0; i < kPiecesInFlight; ++i) {
#pragma unroll
      for (int c = 0; c < kSumColumns; ++c) totals[c] += terms[i][c];
    }
  }
}

// How many of max_count positions first, first + step, .. lie in the run of `row`, one after the other.
__device__ __forceinline__ int count_in_run(const MemoryRunArguments& args, int64_t first, int64_t step, int max_count,
                                            int32_t row) {
  int count = 0;
  while (count < max_count) {
    const int mine = count + lane_id();
    const bool is_in_run = mine < max_count && row_at(args, first + mine * step) == row;
    const unsigned outside = ~__ballot_sync(kAllLanes, is_in_run);
    if (outside != 0) return count + __ffs(static_cast<int>(outside)) - 1;
    count += kLanes;
  }
  return count;
}

// Adds up runs that fill a stretch. Stretches are counted from the second: no run reaches into the first from before.
template <typename Arguments>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor) memory_backward_stretches(const Arguments args) {
  const SumTask task = sum_task(args, blockIdx.x * kMaxWarps + static_cast<uint32_t>(warp_id()));
  const int64_t first_piece = (static_cast<int64_t>(task.idx) + 1) * kPiecesPerStretch;
  if (first_piece + kPiecesPerStretch > args.num_pieces) return;  // whole warps, and nothing is done by the block
  const int32_t row = row_at(args, first_piece * kEntriesPerPiece - 1);
  if (row == kNoRow || row_at(args, (first_piece + kPiecesPerStretch) * kEntriesPerPiece - 1) != row) return;
  const int row_dim = args.shape.row_dim;
  float totals[kSumColumns] = {};
  add_sums(head_sum(args, first_piece), 2 * static_cast<int64_t>(row_dim), kPiecesPerStretch, task.first_column,
           row_dim, totals);
  float* sum = tail_sum(args, first_piece);
#pragma unroll
  for (int c = 0; c < kSumColumns; ++c) {
    const int column = task.first_column + c * kLanes;
    if (column < row_dim) sum[column] = totals[c];
  }
}

// A run that goes on in the next piece, as the warp of the piece in which it begins sees it.
struct LongRun {
  int32_t row;         // kNoRow: there is none
  int64_t last_entry;  // of the piece
};

__device__ __forceinline__ LongRun long_run_of(const MemoryRunArguments& args, const SumTask& task) {
  LongRun run = {kNoRow, 0};
  if (task.idx >= args.num_pieces - 1) return run;
  const int64_t begin = task.idx;
  run.last_entry = (begin + 1) * kEntriesPerPiece - 1;
  const int32_t row = row_at(args, run.last_entry);
  if (row == kNoRow || row_at(args, run.last_entry + 1) != row) return run;  // no run goes on in the next piece
  if (row_at(args, begin * kEntriesPerPiece - 1) == row) return run;         // it began in an earlier one
  run.row = row;
  return run;
}

// Adds its tail, heads and stretches up, in order.
__device__ __forceinline__ void sum_long_run(const MemoryRunArguments& args, const SumTask& task, int32_t row,
                                             float (&totals)[kSumColumns]) {
  const int64_t begin = task.idx;
  const int row_dim = args.shape.row_dim;
  const int64_t sum_step = 2 * static_cast<int64_t>(row_dim);
  add_sums(tail_sum(args, begin), sum_step, 1, task.first_column, row_dim, totals);

  const auto add_heads = [&](int64_t first_piece, int64_t end_piece) {
    const int num_heads = static_cast<int>(end_piece - first_piece);
    const int count = count_in_run(args, first_piece * kEntriesPerPiece, kEntriesPerPiece, num_heads, row);
    add_sums(head_sum(args, first_piece), sum_step, count, task.first_column, row_dim, totals);
    return count == num_heads;
  };
  // Heads up to the next stretch.
  const int64_t num_pieces = args.num_pieces;
  int64_t piece = begin + 1;
  const int64_t next_stretch = (piece + kPiecesPerStretch - 1) / kPiecesPerStretch * kPiecesPerStretch;
  bool goes_on = add_heads(piece, next_stretch < num_pieces ? next_stretch : num_pieces);
  piece = next_stretch;
  if (goes_on && piece < num_pieces) {
    // Stretches that the run fills: their last entries are the run's.
    const int whole_stretches = static_cast<int>((num_pieces - piece) / kPiecesPerStretch);
    const int count = count_in_run(args, (piece + kPiecesPerStretch) * kEntriesPerPiece - 1,
                                   kPiecesPerStretch * kEntriesPerPiece, whole_stretches, row);
    add_sums(tail_sum(args, piece), kPiecesPerStretch * sum_step, count, task.first_column, row_dim, totals);
    piece += static_cast<int64_t>(count) * kPiecesPerStretch;
    // Heads of the stretch in which it ends.
    const int64_t end = piece + kPiecesPerStretch < num_pieces ? piece + kPiecesPerStretch : num_pieces;
    if (piece < end) add_heads(piece, end);
  }
}

inline int64_t num_pieces_of(const MemoryProblem& problem) {
  return (problem.num_entries + kEntriesPerPiece - 1) / kEntriesPerPiece;
}

// Pieces of a whole thread block, and `ahead` entries that are loaded ahead.
inline int64_t num_padded_entries_of(const MemoryProblem& problem, int64_t ahead) {
  constexpr int64_t kEntriesPerBlock = int64_t{kMaxWarps} * kMaxGroups * kEntriesPerPiece;
  return (problem.num_entries + kEntriesPerBlock - 1) / kEntriesPerBlock * kEntriesPerBlock + ahead;
}

inline int64_t sum_bytes_of(const MemoryProblem& problem) {
  const int64_t num_pieces = num_pieces_of(problem);
  return num_pieces < 2 ? 0 : num_pieces * 2 * problem.row_dim * static_cast<int64_t>(sizeof(float));
}

// Of kernels whose warps take slabs of sums of `count` pieces or stretches.
inline cuda::LaunchShape shape_of_sums(int64_t count, int64_t row_dim, cudaStream_t stream) {
  const int64_t warps = count * ((row_dim + kSumSlab - 1) / kSumSlab);
  require(warps <= INT32_MAX, "too many entries for one launch");
  return {dim3(static_cast<unsigned>((warps + kMaxWarps - 1) / kMaxWarps)), dim3(kThreads), 0, stream};
}

}  // namespace topgather
