// Weighted sums of rows of 8 bits, and dot products with them, on CUDA.
//
//   row:     row_i[d] = scales[i, d / group] * values[i, d]      values [rows, W] int8 or e4m3, scales [rows, groups]
//   lookup:  out_t  = sum_k weights_tk * row indices_tk           out [T, W] float32
//   dot:     out_tk = dot(row indices_tk, x_t)                    x [T, W] float32, out [T, K] float32
//
// Who owns what: as in memory_lookup_cuda.cu, a group of 8, 16 or 32 lanes one slab of a token's out, or as many of a
// token's entries as it has lanes. A lane holds 16 columns, all of one group of scales, or two columns apart. Steps:
//   1. each lane reads one entry of the group's next ones and passes it to the group by shuffles;
//   2. the rows of several entries, a slab of each, and their scales are loaded at once;
//   3. lookup adds them times weight times scale, entries ascending; dot adds products of a lane's columns times their
//      scale, slabs ascending, then lanes.
// Memory: W bytes and a scale a group of every row, which is nearly all.
// Numerics: float32; numbers of 8 bits are converted exactly, NaN of e4m3 included. An index outside [0, num_rows) is
// not followed: lookup's out row, dot's own product become NaN. Ragged bags and determinism: as in memory_lookup_cuda.cu.
#include "../cuda/lane_rows.cuh"
#include "memory_bags_cuda.cuh"
#include "memory_config_cuda.h"
#include "memory_cuda.h"

namespace topgather {

struct Int8 {
  int8_t bits;
};
struct Float8 {
  uint8_t bits;
};

namespace {
using Config = MemoryQuantizedCudaConfig;
constexpr int kThreads = Config::kThreads;
constexpr int kWarps = kThreads / kLanes;
constexpr int kBlocksPerProcessor = Config::kBlocksPerProcessor;
constexpr int kRowsInFlight = Config::kRowsInFlight;
static_assert(kMinLanesPerRow % kRowsInFlight == 0, "a group's entries go by in whole steps");
static_assert(kRowsInFlight % 4 == 0, "lanes' sums are added four at a time");

constexpr int kWideVector = kElementsPerVector<Int8>;
}  // namespace

struct QuantizedLookupArguments {
  RowShape shape;
  uint32_t num_warps;
  uint32_t parts_per_token;  // lookup: slabs of a row; dot: pieces of a token's entries
  int64_t num_rows;
  int64_t num_tokens;
  int32_t bag_size;      // not ragged
  int32_t group_size;    // columns of a scale
  int64_t num_entries;   // ragged
  const int8_t* values;  // [num_rows, W], the bits
  int64_t values_stride;
  const float* scales;  // [num_rows, groups]
  int64_t scales_stride;
  const int64_t* indices;  // [T, K]
  const float* weights;    // [T, K]; lookup only
  const int64_t* offsets;  // [T + 1]; lookup of ragged bags
  const float* x;          // [T, W]; dot only
  int64_t x_stride;
  const int32_t* tokens;  // [T], row of x or -1; dot of ragged bags, else null
  float* out;             // lookup: [T, W]; dot: [T, K]
};

namespace {

__device__ __forceinline__ float number_of(Int8 value) { return static_cast<float>(value.bits); }

// Sign, 4 bits of exponent with a bias of 7, 3 of mantissa; no infinity, NaN where all bits but the sign are set.
__device__ __forceinline__ float number_of(Float8 value) {
  const uint32_t magnitude = value.bits & 0x7fu;
  // Denormals of e4m3 become some of float32, and with the factor, of 2^120, normal numbers.
  const float number = magnitude == 0x7fu ? not_a_number() : __uint_as_float(magnitude << 20) * 0x1p120f;
  return (value.bits & 0x80u) != 0 ? -number : number;
}

template <typename Element, int kVector>
__device__ __forceinline__ void numbers_of(const LanePart<Element, kVector>& part,
                                           float (&values)[LanePart<Element, kVector>::kCount]) {
  if constexpr (kVector == 1) {
#pragma unroll
    for (int i = 0; i < kPiecesWithoutVectors; ++i) values[i] = number_of(part.elements[i]);
  } else {
    const uint32_t words[4] = {part.words.x, part.words.y, part.words.z, part.words.w};
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      values[i] = number_of(Element{static_cast<decltype(Element::bits)>(words[i / 4] >> (8 * (i % 4)) & 0xffu)});
    }
  }
}

// The scales of a lane's columns of one row: of all of them the same, or of each its own.
template <int kVector>
struct LaneScales {
  static constexpr int kCount = kVector == 1 ? kPiecesWithoutVectors : 1;
  float values[kCount];

  template <typename Columns>
  __device__ __forceinline__ void load(const QuantizedLookupArguments& args, const Columns& columns, int32_t row) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int column = columns.first + i * columns.step;
      const bool is_there = row != kNoRow && column < columns.row_dim;
      values[i] = is_there ? args.scales[row * args.scales_stride + column / args.group_size] : 0.0f;
    }
  }

  __device__ __forceinline__ float of(int piece) const { return values[kVector == 1 ? piece : 0]; }
};

struct Entry {
  int64_t index;
  float weight;
};

// Step 1 of lookup. What lies past the last entry adds nothing.
__device__ __forceinline__ Entry load_entry(const QuantizedLookupArguments& args, const Task& task, const Bag& bag,
                                            int k) {
  if (!task.is_there || k >= bag.size) return {kNoRow, 0.0f};
  const int64_t place = bag.first + k;
  return {args.indices[place], args.weights[place]};
}

}  // namespace

template <typename Element, int kVector, bool kRagged>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor)
    memory_lookup_quantized(const QuantizedLookupArguments args) {
  using Columns = LaneColumns<Element, kVector>;
  const uint32_t warp = blockIdx.x * kWarps + static_cast<uint32_t>(warp_id());
  if (warp >= args.num_warps) return;  // whole warps, and no block-wide barrier follows
  const Task task = task_of(args, warp);
  const Columns columns(args.shape, task.part, task.lane_in_row);
  const int lanes_per_row = args.shape.lanes_per_row;
  const Element* values = reinterpret_cast<const Element*>(args.values);
  float sums[Columns::kCount] = {};
  const Bag bag = bag_of<kRagged>(args, task);
  Entry next = load_entry(args, task, bag, task.lane_in_row);
  for (int first = 0; first < bag.longest; first += lanes_per_row) {
    const bool is_row = next.index >= 0 && next.index < args.num_rows;
    const int32_t my_row = is_row ? static_cast<int32_t>(next.index) : kNoRow;
    const bool is_entry = task.is_there && first + task.lane_in_row < bag.size;
    const float my_weight = is_row || !is_entry ? next.weight : not_a_number();
    next = load_entry(args, task, bag, first + lanes_per_row + task.lane_in_row);
    const int left = bag.longest - first;
    const int count = left < lanes_per_row ? left : lanes_per_row;
#pragma unroll 1
    for (int e = 0; e < count; e += kRowsInFlight) {
      typename Columns::Part parts[kRowsInFlight];
      LaneScales<kVector> scales[kRowsInFlight];
      // Step 2.
#pragma unroll
      for (int i = 0; i < kRowsInFlight; ++i) {
        const int32_t row = __shfl_sync(kAllLanes, my_row, e + i, lanes_per_row);
        columns.load(values + row * args.values_stride, row != kNoRow, parts[i]);
        scales[i].load(args, columns, row);
      }
      // Step 3.
#pragma unroll
      for (int i = 0; i < kRowsInFlight; ++i) {
        const float weight = __shfl_sync(kAllLanes, my_weight, e + i, lanes_per_row);
        float numbers[Columns::kCount];
        numbers_of(parts[i], numbers);
#pragma unroll
        for (int c = 0; c < Columns::kCount; ++c) sums[c] = fmaf(weight * scales[i].of(c), numbers[c], sums[c]);
      }
    }
  }
  if constexpr (kRagged) {
    if (!bag.is_valid) {
#pragma unroll
      for (int c = 0; c < Columns::kCount; ++c) sums[c] = not_a_number();
    }
  }
  if (task.is_there) columns.store_float32(args.out + task.token * args.shape.row_dim, sums);
}

template <typename Element, int kVector>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor)
    memory_dot_quantized(const QuantizedLookupArguments args) {
  using Columns = LaneColumns<Element, kVector>;
  const uint32_t warp = blockIdx.x * kWarps + static_cast<uint32_t>(warp_id());
  if (warp >= args.num_warps) return;  // whole warps, and no block-wide barrier follows
  const Task task = task_of(args, warp);
  const int lanes_per_row = args.shape.lanes_per_row;
  const Element* values = reinterpret_cast<const Element*>(args.values);
  int64_t row_of_x = task.token;
  if (args.tokens != nullptr && task.is_there) row_of_x = args.tokens[task.token];
  const bool has_x = task.is_there && row_of_x >= 0;
  const float* x = args.x + row_of_x * args.x_stride;
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
      typename Columns::Part parts[kRowsInFlight];
      LaneScales<kVector> scales[kRowsInFlight];
      // Step 2.
#pragma unroll
      for (int i = 0; i < kRowsInFlight; ++i) {
        columns.load(values + rows[i] * args.values_stride, rows[i] != kNoRow, parts[i]);
        scales[i].load(args, columns, rows[i]);
      }
      // Step 3.
      float x_values[Columns::kCount] = {};
#pragma unroll
      for (int c = 0; c < Columns::kCount; c += kVector == 1 ? 1 : 4) {
        if constexpr (kVector == 1) {
          const int column = columns.first + c * columns.step;
          if (has_x && column < columns.row_dim) x_values[c] = x[column];
        } else if (has_x && columns.first < columns.row_dim) {
          const float4 four = *reinterpret_cast<const float4*>(x + columns.first + c);
          x_values[c] = four.x, x_values[c + 1] = four.y, x_values[c + 2] = four.z, x_values[c + 3] = four.w;
        }
      }
#pragma unroll
      for (int i = 0; i < kRowsInFlight; ++i) {
        float numbers[Columns::kCount];
        numbers_of(parts[i], numbers);
        if constexpr (kVector == 1) {
#pragma unroll
          for (int c = 0; c < Columns::kCount; ++c) sums[i] = fmaf(scales[i].of(c), numbers[c] * x_values[c], sums[i]);
        } else {
          float of_lane = 0.0f;
#pragma unroll
          for (int c = 0; c < Columns::kCount; ++c) of_lane = fmaf(numbers[c], x_values[c], of_lane);
          sums[i] = fmaf(scales[i].of(0), of_lane, sums[i]);
        }
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
  args.out[place] = !has_x ? 0.0f : my_row == kNoRow ? not_a_number() : my_dot;
}

namespace {

template <typename Params>
QuantizedLookupArguments arguments_of(const Params& params, const RowShape& shape, int64_t parts_per_token) {
  const MemoryProblem& problem = params.problem;
  require(problem.bag_size <= INT32_MAX - kLanes, "entries of a token must fit 31 bits on CUDA");
  const int64_t tokens_per_warp = kLanes / shape.lanes_per_row;
  const int64_t num_warps = (problem.num_tokens + tokens_per_warp - 1) / tokens_per_warp * parts_per_token;
  require(num_warps <= INT32_MAX, "too many tokens for one launch of a memory layer");
  QuantizedLookupArguments args{};
  args.shape = shape;
  args.num_warps = static_cast<uint32_t>(num_warps);
  args.parts_per_token = static_cast<uint32_t>(parts_per_token);
  args.num_rows = problem.num_rows;
  args.num_tokens = problem.num_tokens;
  args.bag_size = static_cast<int32_t>(problem.bag_size);
  args.group_size = static_cast<int32_t>(params.rows.group_size > 0 ? params.rows.group_size : 1);
  args.num_entries = problem.num_entries;
  args.values = params.rows.values.data;
  args.values_stride = params.rows.values.strides[0];
  args.scales = params.rows.scales.data;
  args.scales_stride = params.rows.scales.strides[0];
  args.indices = params.indices.data;
  args.out = params.out.data;
  return args;
}

cuda::LaunchShape launch_shape(const QuantizedLookupArguments& args, cudaStream_t stream) {
  return {dim3((args.num_warps + kWarps - 1) / kWarps), dim3(kThreads), 0, stream};
}

// Whether a lane may take 16 columns at once, of the rows and of what stands beside them in float32.
template <typename T>
bool has_vectors(const QuantizedRows& rows, const Array<T, 2>& wide) {
  return rows.group_size % kWideVector == 0 && rows.values.has_aligned_rows(16) && wide.has_aligned_rows(16);
}

template <typename Element, int kVector>
void launch_lookup(const QuantizedLookupParams& params, cudaStream_t stream) {
  const RowShape shape = row_shape<kVector>(params.problem.row_dim);
  QuantizedLookupArguments args = arguments_of(params, shape, shape.num_slabs);
  args.weights = params.weights.data;
  args.offsets = params.offsets.data;
  if (args.offsets == nullptr) {
    cuda::launch(memory_lookup_quantized<Element, kVector, false>, launch_shape(args, stream), args);
  } else {
    require(args.num_entries <= INT32_MAX - kLanes, "entries of ragged bags must fit 31 bits on CUDA");
    cuda::launch(memory_lookup_quantized<Element, kVector, true>, launch_shape(args, stream), args);
  }
}

template <typename Element>
void lookup_of(const QuantizedLookupParams& params, cudaStream_t stream) {
  if (has_vectors(params.rows, params.out)) return launch_lookup<Element, kWideVector>(params, stream);
  launch_lookup<Element, 1>(params, stream);
}

template <typename Element, int kVector>
void launch_dot(const QuantizedDotParams& params, cudaStream_t stream) {
  const RowShape shape = row_shape<kVector>(params.problem.row_dim);
  const int64_t parts = (params.problem.bag_size + shape.lanes_per_row - 1) / shape.lanes_per_row;
  QuantizedLookupArguments args = arguments_of(params, shape, parts);
  args.x = params.x.data;
  args.x_stride = params.x.strides[0];
  args.tokens = params.tokens.data;
  cuda::launch(memory_dot_quantized<Element, kVector>, launch_shape(args, stream), args);
}

template <typename Element>
void dot_of(const QuantizedDotParams& params, cudaStream_t stream) {
  if (has_vectors(params.rows, params.x)) return launch_dot<Element, kWideVector>(params, stream);
  launch_dot<Element, 1>(params, stream);
}

}  // namespace

void memory_lookup_quantized_cuda(const QuantizedLookupParams& params, const CudaWorkspace&, const CudaPlace& place) {
  if (params.problem.num_tokens == 0 || params.problem.row_dim == 0) return;
  const DeviceGuard guard(place.device);
  const StageRange range("memory.lookup_8bit");
  const auto stream = static_cast<cudaStream_t>(place.stream);
  params.rows.is_float8 ? lookup_of<Float8>(params, stream) : lookup_of<Int8>(params, stream);
}

void memory_dot_quantized_cuda(const QuantizedDotParams& params, const CudaWorkspace&, const CudaPlace& place) {
  if (params.problem.num_entries == 0) return;
  const DeviceGuard guard(place.device);
  const StageRange range("memory.dot_8bit");
  const auto stream = static_cast<cudaStream_t>(place.stream);
  params.rows.is_float8 ? dot_of<Float8>(params, stream) : dot_of<Int8>(params, stream);
}

}  // namespace topgather
