// Weighted sums of rows of a table, and dot products with them, on CUDA.
//
//   lookup:  out_t  = sum_k weights_tk * values[indices_tk]      [T, W]
//   dot:     out_tk = dot(values[indices_tk], x_t)               [T, K]
//
// Who owns what: a group of 8, 16 or 32 lanes, as wide as a row needs, owns in lookup one slab of one token's out, in
// dot as many of a token's entries as it has lanes. Steps:
//   1. each lane reads one entry of the group's next ones, ahead of its turn, and passes it to the group by shuffles;
//   2. the rows of several entries are loaded at once, a slab of each;
//   3. lookup adds them, entries ascending; dot adds products, slabs ascending, then lanes.
// Memory: T K rows are read once (2 W bytes each of 16-bit types), which is nearly all; 12 bytes an entry, out and x
// are small beside them. Every access of a group is to neighbouring bytes. Warps of one token stand side by side, so
// that a row's slabs are loaded together.
// Numerics: float32 products and sums, lookup rounded once. No ties. Tokens without entries give zero rows. An index
// outside [0, num_rows) is not followed: lookup's out row, dot's own product become NaN.
// Ragged bags: lookup's groups run for as many steps as the longest bag of their warp, and offsets that descend or lead
// out of the entries make their token's row NaN. To dot an entry is a token whose row of x is told, 0 where there is none.
// Determinism: every sum has an order fixed by shapes and alignment.
#include "../cuda/dispatch.h"
#include "../cuda/lane_rows.cuh"
#include "memory_bags_cuda.cuh"
#include "memory_config_cuda.h"
#include "memory_cuda.h"

namespace topgather {

namespace {
constexpr int kThreads = MemoryLookupCudaConfig::kThreads;
constexpr int kWarps = kThreads / kLanes;
constexpr int kBlocksPerProcessor = MemoryLookupCudaConfig::kBlocksPerProcessor;
constexpr int kRowsInFlight = MemoryLookupCudaConfig::kRowsInFlight;
static_assert(kMinLanesPerRow % kRowsInFlight == 0, "a group's entries go by in whole steps");
static_assert(kRowsInFlight % 4 == 0, "lanes' sums are added four at a time");
}  // namespace

struct MemoryLookupArguments {
  RowShape shape;
  uint32_t num_warps;
  uint32_t parts_per_token;  // lookup: slabs of a row; dot: pieces of a token's entries
  int64_t num_rows;
  int64_t num_tokens;
  int32_t bag_size;     // not ragged
  int64_t num_entries;  // ragged
  const void* values;   // [num_rows, W] dtype
  int64_t values_stride;
  const int64_t* indices;  // [T, K] int64
  const float* weights;    // [T, K] float32; lookup only
  const int64_t* offsets;  // [T + 1] int64; lookup of ragged bags
  const void* x;           // [T, W] dtype; dot only
  int64_t x_stride;
  const int32_t* tokens;  // [T] int32, row of x or -1; dot of ragged bags, else null
  void* out;              // lookup: [T, W] dtype; dot: [T, K] float32
};

namespace {

struct Entry {
  int64_t index;
  float weight;
};

// Step 1 of lookup: both loads at once; what they bring is looked at when it is the entry's turn. What lies past the last
// entry adds nothing.
__device__ __forceinline__ Entry load_entry(const MemoryLookupArguments& args, const Task& task, const Bag& bag,
                                            int k) {
  if (!task.is_there || k >= bag.size) return {kNoRow, 0.0f};
  const int64_t place = bag.first + k;
  return {args.indices[place], args.weights[place]};
}

}  // namespace

template <typename Element, int kVector, bool kRagged>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor) memory_lookup(const MemoryLookupArguments args) {
  using Columns = LaneColumns<Element, kVector>;
  const uint32_t warp = blockIdx.x * kWarps + static_cast<uint32_t>(warp_id());
  if (warp >= args.num_warps) return;  // whole warps, and no block-wide barrier follows
  const Task task = task_of(args, warp);
  const Columns columns(args.shape, task.part, task.lane_in_row);
  const int lanes_per_row = args.shape.lanes_per_row;
  const Element* values = static_cast<const Element*>(args.values);
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
      typename Columns::Part parts[kRowsInFlight];
      // Step 2.
#pragma unroll
      for (int i = 0; i < kRowsInFlight; ++i) {
        const int32_t row = __shfl_sync(kAllLanes, my_row, e + i, lanes_per_row);
        columns.load(values + row * args.values_stride, row != kNoRow, parts[i]);
      }
      // Step 3.
#pragma unroll
      for (int i = 0; i < kRowsInFlight; ++i) {
        const float weight = __shfl_sync(kAllLanes, my_weight, e + i, lanes_per_row);
        float row_values[Columns::kCount];
        unpack(parts[i], row_values);
#pragma unroll
        for (int c = 0; c < Columns::kCount; ++c) sums[c] = fmaf(weight, row_values[c], sums[c]);
      }
    }
  }
  if constexpr (kRagged) {
    if (!bag.is_valid) {
#pragma unroll
      for (int c = 0; c < Columns::kCount; ++c) sums[c] = not_a_number();
    }
  }
  if (task.is_there) columns.store(static_cast<Element*>(args.out) + task.token * args.shape.row_dim, sums);
}

template <typename Element, int kVector>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor) memory_dot(const MemoryLookupArguments args) {
  using Columns = LaneColumns<Element, kVector>;
  const uint32_t warp = blockIdx.x * kWarps + static_cast<uint32_t>(warp_id());
  if (warp >= args.num_warps) return;  // whole warps, and no block-wide barrier follows
  const Task task = task_of(args, warp);
  const int lanes_per_row = args.shape.lanes_per_row;
  const Element* values = static_cast<const Element*>(args.values);
  int64_t row_of_x = task.token;
  if (args.tokens != nullptr && task.is_there) row_of_x = args.tokens[task.token];
  const bool has_x = task.is_there && row_of_x >= 0;
  const Element* x = static_cast<const Element*>(args.x) + row_of_x * args.x_stride;
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
    int32_t rows[kRowsInFlight];
#pragma unroll
    for (int i = 0; i < kRowsInFlight; ++i) rows[i] = __shfl_sync(kAllLanes, my_row, e + i, lanes_per_row);
    float sums[kRowsInFlight] = {};
#pragma unroll 1
    for (int slab = 0; slab < args.shape.num_slabs; ++slab) {
      const Columns columns(args.shape, slab, task.lane_in_row);
      typename Columns::Part x_part, parts[kRowsInFlight];
      columns.load(x, has_x, x_part);
      // Step 2.
#pragma unroll
      for (int i = 0; i < kRowsInFlight; ++i) {
        columns.load(values + rows[i] * args.values_stride, rows[i] != kNoRow, parts[i]);
      }
      // Step 3.
      float x_values[Columns::kCount];
      unpack(x_part, x_values);
#pragma unroll
      for (int i = 0; i < kRowsInFlight; ++i) {
        float row_values[Columns::kCount];
        unpack(parts[i], row_values);
#pragma unroll
        for (int c = 0; c < Columns::kCount; ++c) sums[i] = fmaf(row_values[c], x_values[c], sums[i]);
      }
    }
#pragma unroll
    for (int i = 0; i < kRowsInFlight; i += 4) {
      const float four[4] = {sums[i], sums[i + 1], sums[i + 2], sums[i + 3]};
      const float dot = sum_over_lanes(four, lanes_per_row);
      if (task.lane_in_row / 4 == (e + i) / 4) my_dot = dot;
    }
  }
  if (!is_mine_there) return;  // nothing is done by the warp from here on
  static_cast<float*>(args.out)[place] = !has_x ? 0.0f : my_row == kNoRow ? not_a_number() : my_dot;
}

namespace {

template <typename Params>
MemoryLookupArguments arguments_of(const Params& params, const RowShape& shape, int64_t parts_per_token) {
  const MemoryProblem& problem = params.problem;
  require(problem.bag_size <= INT32_MAX - kLanes, "entries of a token must fit 31 bits on CUDA");
  const int64_t tokens_per_warp = kLanes / shape.lanes_per_row;
  const int64_t num_warps = (problem.num_tokens + tokens_per_warp - 1) / tokens_per_warp * parts_per_token;
  require(num_warps <= INT32_MAX, "too many tokens for one launch of a memory layer");
  MemoryLookupArguments args{};
  args.shape = shape;
  args.num_warps = static_cast<uint32_t>(num_warps);
  args.parts_per_token = static_cast<uint32_t>(parts_per_token);
  args.num_rows = problem.num_rows;
  args.num_tokens = problem.num_tokens;
  args.bag_size = static_cast<int32_t>(problem.bag_size);
  args.num_entries = problem.num_entries;
  args.values = params.values.data;
  args.values_stride = params.values.strides[0];
  args.indices = params.indices.data;
  args.out = params.out.data;
  return args;
}

cuda::LaunchShape launch_shape(const MemoryLookupArguments& args, cudaStream_t stream) {
  return {dim3((args.num_warps + kWarps - 1) / kWarps), dim3(kThreads), 0, stream};
}

template <typename Element, int kVector>
void launch_lookup(const MemoryLookupParams& params, cudaStream_t stream) {
  const RowShape shape = row_shape<kVector>(params.problem.row_dim);
  MemoryLookupArguments args = arguments_of(params, shape, shape.num_slabs);
  args.weights = params.weights.at<float>();
  args.offsets = params.offsets.data;
  if (args.offsets == nullptr) {
    cuda::launch(memory_lookup<Element, kVector, false>, launch_shape(args, stream), args);
  } else {
    require(args.num_entries <= INT32_MAX - kLanes, "entries of ragged bags must fit 31 bits on CUDA");
    cuda::launch(memory_lookup<Element, kVector, true>, launch_shape(args, stream), args);
  }
}

template <typename Element>
void lookup_for(const MemoryLookupParams& params, cudaStream_t stream) {
  if (has_vector_rows<Element>(params.values) && has_vector_rows<Element>(params.out)) {
    launch_lookup<Element, kElementsPerVector<Element>>(params, stream);
  } else {
    launch_lookup<Element, 1>(params, stream);
  }
}

template <typename Element, int kVector>
void launch_dot(const MemoryDotParams& params, cudaStream_t stream) {
  const RowShape shape = row_shape<kVector>(params.problem.row_dim);
  const int64_t parts = (params.problem.bag_size + shape.lanes_per_row - 1) / shape.lanes_per_row;
  MemoryLookupArguments args = arguments_of(params, shape, parts);
  args.x = params.x.data;
  args.x_stride = params.x.strides[0];
  args.tokens = params.tokens.data;
  cuda::launch(memory_dot<Element, kVector>, launch_shape(args, stream), args);
}

template <typename Element>
void dot_for(const MemoryDotParams& params, cudaStream_t stream) {
  if (has_vector_rows<Element>(params.values) && has_vector_rows<Element>(params.x)) {
    launch_dot<Element, kElementsPerVector<Element>>(params, stream);
  } else {
    launch_dot<Element, 1>(params, stream);
  }
}

}  // namespace

void memory_lookup_cuda(const MemoryLookupParams& params, const CudaWorkspace&, const CudaPlace& place) {
  if (params.problem.num_tokens == 0 || params.problem.row_dim == 0) return;
  const DeviceGuard guard(place.device);
  const StageRange range("memory.lookup");
  const auto stream = static_cast<cudaStream_t>(place.stream);
  with_element(params.problem.dtype, [&](auto element) { lookup_for<decltype(element)>(params, stream); });
}

void memory_dot_cuda(const MemoryDotParams& params, const CudaWorkspace&, const CudaPlace& place) {
  if (params.problem.num_entries == 0) return;
  const DeviceGuard guard(place.device);
  const StageRange range("memory.dot");
  const auto stream = static_cast<cudaStream_t>(place.stream);
  with_element(params.problem.dtype, [&](auto element) { dot_for<decltype(element)>(params, stream); });
}

}  // namespace topgather
