// The walks of lookups and dot products over entries, whatever a table's rows are made of. memory_lookup_cuda.cu says who
// owns what, and what the steps are.
//
// A kernel's arguments are MemoryWalkArguments and what its reader of rows needs. A reader has
//   Config, Columns    its tuning, and a lane's columns of a slab
//   Row, X             what a lane holds of a row of the table and of x
//   load(columns, row, into)            step 2; nothing for kNoRow
//   add(row, weight, sums)              step 3 of lookup
//   load_x(columns, row_of_x, has_x, into), numbers_of_x(x, numbers)
//   sum_of_products(sum, row, numbers)  step 3 of dot
//   store(columns, token, sums)
#pragma once

#include "../cuda/lane_rows.cuh"
#include "memory_bags_cuda.cuh"
#include "memory_cuda.h"

namespace topgather {

struct MemoryWalkArguments {
  RowShape shape;
  uint32_t num_warps;
  uint32_t parts_per_token;  // lookup: slabs of a row; dot: pieces of a token's entries
  int64_t num_rows;
  int64_t num_tokens;
  int32_t bag_size;     // not ragged
  int64_t num_entries;  // ragged
  int64_t values_stride;
  int64_t x_stride;
  const int64_t* indices;  // [T, K] int64
  const float* weights;    // [T, K] float32; lookup only
  const int64_t* offsets;  // [T + 1] int64; lookup of ragged bags
  const int32_t* tokens;   // [T] int32, row of x or -1; dot of ragged bags, else null
};

struct Entry {
  int64_t index;
  float weight;
};

// Step 1 of lookup: both loads at once; what they bring is looked at when it is the entry's turn. What lies past the last
// entry adds nothing.
__device__ __forceinline__ Entry load_entry(const MemoryWalkArguments& args, const Task& task, const Bag& bag, int k) {
  if (!task.is_there || k >= bag.size) return {kNoRow, 0.0f};
  const int64_t place = bag.first + k;
  return {args.indices[place], args.weights[place]};
}

template <bool kRagged, typename Rows>
__device__ __forceinline__ void walk_lookup(const MemoryWalkArguments& args, const Rows& rows) {
  using Columns = typename Rows::Columns;
  constexpr int kRowsInFlight = Rows::Config::kRowsInFlight;
  static_assert(kMinLanesPerRow % kRowsInFlight == 0, "a group's entries go by in whole steps");
  const uint32_t warp = blockIdx.x * (Rows::Config::kThreads / kLanes) + static_cast<uint32_t>(warp_id());
  if (warp >= args.num_warps) return;  // whole warps, and no block-wide barrier follows
  const Task task = task_of(args, warp);
  const Columns columns(args.shape, task.part, task.lane_in_row);
  const int lanes_per_row = args.shape.lanes_per_row;
  float sums[Columns::kCount] = {};
  const Bag bag = bag_of<kRagged>(args, task);
  Entry next = load_entry(args, task, bag, task.lane_in_row);
  for (int first = 0; first < bag.longest; first += lanes_per_row) {
    const bool is_row = next.index >= 0 && next.index < args.num_rows;
    const int32_t my_row = is_row ? static_cast<int32_t>(next.index) : kNoRow;
    const bool is_entry = task.is_there && first + task.lane_in_row < bag.size;
    // An index outside the table makes the sum NaN.
    const float my_weight = is_row || !is_entry ? next.weight : not_a_number();
    next = load_entry(args, task, bag, first + lanes_per_row + task.lane_in_row);
    const int left = bag.longest - first;
    const int count = left < lanes_per_row ? left : lanes_per_row;
#pragma unroll 1
    for (int e = 0; e < count; e += kRowsInFlight) {
      typename Rows::Row in_flight[kRowsInFlight];
      // Step 2.
#pragma unroll
      for (int i = 0; i < kRowsInFlight; ++i) {
        rows.load(columns, __shfl_sync(kAllLanes, my_row, e + i, lanes_per_row), in_flight[i]);
      }
      // Step 3.
#pragma unroll
      for (int i = 0; i < kRowsInFlight; ++i) {
        rows.add(in_flight[i], __shfl_sync(kAllLanes, my_weight, e + i, lanes_per_row), sums);
      }
    }
  }
  if constexpr (kRagged) {
    if (!bag.is_valid) {
#pragma unroll
      for (int c = 0; c < Columns::kCount; ++c) sums[c] = not_a_number();
    }
  }
  if (task.is_there) rows.store(columns, task.token, sums);
}

template <typename Rows>
__device__ __forceinline__ void walk_dot(const MemoryWalkArguments& args, const Rows& rows, float* out) {
  using Columns = typename Rows::Columns;
  constexpr int kRowsInFlight = Rows::Config::kRowsInFlight;
  static_assert(kRowsInFlight % 4 == 0, "lanes' sums are added four at a time");
  const uint32_t warp = blockIdx.x * (Rows::Config::kThreads / kLanes) + static_cast<uint32_t>(warp_id());
  if (warp >= args.num_warps) return;  // whole warps, and no block-wide barrier follows
  const Task task = task_of(args, warp);
  const int lanes_per_row = args.shape.lanes_per_row;
  int64_t row_of_x = task.token;
  if (args.tokens != nullptr && task.is_there) row_of_x = args.tokens[task.token];
  const bool has_x = task.is_there && row_of_x >= 0;
  // Step 1.
  const int first = task.part * lanes_per_row;
  const int k = first + task.lane_in_row;
  const bool is_mine_there = task.is_there && k < args.bag_size;
  const int64_t place = task.token * args.bag_size + k;
  const int64_t index = is_mine_there ? args.indices[place] : kNoRow;
  const int32_t my_row = index >= 0 && index < args.num_rows ? static_cast<int32_t>(index) : kNoRow;
  const int left = args.bag_size - first;
  const int count = left < lanes_per_row ? left : lanes_per_row;
  float my_dot = 0.0f;
#pragma unroll 1
  for (int e = 0; e < count; e += kRowsInFlight) {
    int32_t row_numbers[kRowsInFlight];
#pragma unroll
    for (int i = 0; i < kRowsInFlight; ++i) row_numbers[i] = __shfl_sync(kAllLanes, my_row, e + i, lanes_per_row);
    float sums[kRowsInFlight] = {};
#pragma unroll 1
    for (int slab = 0; slab < args.shape.num_slabs; ++slab) {
      const Columns columns(args.shape, slab, task.lane_in_row);
      typename Rows::X x;
      typename Rows::Row in_flight[kRowsInFlight];
      rows.load_x(columns, row_of_x, has_x, x);
      // Step 2.
#pragma unroll
      for (int i = 0; i < kRowsInFlight; ++i) rows.load(columns, row_numbers[i], in_flight[i]);
      // Step 3.
      float numbers[Columns::kCount];
      rows.numbers_of_x(x, numbers);
#pragma unroll
      for (int i = 0; i < kRowsInFlight; ++i) sums[i] = rows.sum_of_products(sums[i], in_flight[i], numbers);
    }
#pragma unroll
    for (int i = 0; i < kRowsInFlight; i += 4) {
      const float four[4] = {sums[i], sums[i + 1], sums[i + 2], sums[i + 3]};
      const float dot = sum_over_lanes(four, lanes_per_row);
      if (task.lane_in_row / 4 == (e + i) / 4) my_dot = dot;
    }
  }
  if (!is_mine_there) return;  // nothing is done by the warp from here on
  out[place] = !has_x ? 0.0f : my_row == kNoRow ? not_a_number() : my_dot;
}

// The walk over a call's entries; parts_per_token: of a row's shape.
template <typename Params>
MemoryWalkArguments walk_of(const Params& params, const RowShape& shape, int64_t parts_per_token) {
  const MemoryProblem& problem = params.problem;
  require(problem.bag_size <= INT32_MAX - kLanes, "entries of a token must fit 31 bits on CUDA");
  const int64_t tokens_per_warp = kLanes / shape.lanes_per_row;
  const int64_t num_warps = (problem.num_tokens + tokens_per_warp - 1) / tokens_per_warp * parts_per_token;
  require(num_warps <= INT32_MAX, "too many tokens for one launch of a memory layer");
  MemoryWalkArguments args{};
  args.shape = shape;
  args.num_warps = static_cast<uint32_t>(num_warps);
  args.parts_per_token = static_cast<uint32_t>(parts_per_token);
  args.num_rows = problem.num_rows;
  args.num_tokens = problem.num_tokens;
  args.bag_size = static_cast<int32_t>(problem.bag_size);
  args.num_entries = problem.num_entries;
  args.indices = params.indices.data;
  return args;
}

// Of a lookup: a token's slabs side by side.
template <typename Params>
MemoryWalkArguments lookup_walk_of(const Params& params, const RowShape& shape) {
  MemoryWalkArguments args = walk_of(params, shape, shape.num_slabs);
  args.weights = params.weights.template at<float>();
  args.offsets = params.offsets.data;
  require(args.offsets == nullptr || args.num_entries <= INT32_MAX - kLanes,
          "entries of ragged bags must fit 31 bits on CUDA");
  return args;
}

// Of a dot product: as many of a token's entries as a row has lanes side by side.
template <typename Params>
MemoryWalkArguments dot_walk_of(const Params& params, const RowShape& shape) {
  const int64_t parts = (params.problem.bag_size + shape.lanes_per_row - 1) / shape.lanes_per_row;
  MemoryWalkArguments args = walk_of(params, shape, parts);
  args.x_stride = params.x.strides[0];
  args.tokens = params.tokens.data;
  return args;
}

template <typename Config>
cuda::LaunchShape walk_shape(const MemoryWalkArguments& args, cudaStream_t stream) {
  constexpr unsigned kWarps = Config::kThreads / kLanes;
  return {dim3((args.num_warps + kWarps - 1) / kWarps), dim3(Config::kThreads), 0, stream};
}

}  // namespace topgather
