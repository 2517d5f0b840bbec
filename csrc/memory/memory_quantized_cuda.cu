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
#include "memory_config_cuda.h"
#include "memory_walks_cuda.cuh"

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
constexpr int kBlocksPerProcessor = Config::kBlocksPerProcessor;
constexpr int kWideVector = kElementsPerVector<Int8>;
}  // namespace

struct QuantizedLookupArguments : MemoryWalkArguments {
  int32_t group_size;    // columns of a scale
  const int8_t* values;  // [num_rows, W], the bits
  const float* scales;   // [num_rows, groups]
  int64_t scales_stride;
  const float* x;  // [T, W]; dot only
  float* out;      // lookup: [T, W]; dot: [T, K]
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

// Rows of 8 bits, with x and out in float32: as memory_walks_cuda.cuh asks for.
template <typename Element, int kVector>
struct ScaledRows {
  using Config = MemoryQuantizedCudaConfig;
  using Columns = LaneColumns<Element, kVector>;
  using Numbers = float[Columns::kCount];
  struct Row {
    typename Columns::Part part;
    LaneScales<kVector> scales;
  };
  struct X {
    Numbers numbers = {};
  };
  const QuantizedLookupArguments& args;

  __device__ __forceinline__ void load(const Columns& columns, int32_t row, Row& into) const {
    columns.load(reinterpret_cast<const Element*>(args.values) + row * args.values_stride, row != kNoRow, into.part);
    into.scales.load(args, columns, row);
  }
  __device__ __forceinline__ void add(const Row& row, float weight, Numbers& sums) const {
    Numbers numbers;
    numbers_of(row.part, numbers);
#pragma unroll
    for (int c = 0; c < Columns::kCount; ++c) sums[c] = fmaf(weight * row.scales.of(c), numbers[c], sums[c]);
  }
  __device__ __forceinline__ void load_x(const Columns& columns, int64_t row_of_x, bool has_x, X& into) const {
    const float* x = args.x + row_of_x * args.x_stride;
#pragma unroll
    for (int c = 0; c < Columns::kCount; c += kVector == 1 ? 1 : 4) {
      if constexpr (kVector == 1) {
        const int column = columns.first + c * columns.step;
        if (has_x && column < columns.row_dim) into.numbers[c] = x[column];
      } else if (has_x && columns.first < columns.row_dim) {
        const float4 four = *reinterpret_cast<const float4*>(x + columns.first + c);
        into.numbers[c] = four.x, into.numbers[c + 1] = four.y;
        into.numbers[c + 2] = four.z, into.numbers[c + 3] = four.w;
      }
    }
  }
  __device__ __forceinline__ void numbers_of_x(const X& x, Numbers& numbers) const {
#pragma unroll
    for (int c = 0; c < Columns::kCount; ++c) numbers[c] = x.numbers[c];
  }
  __device__ __forceinline__ float sum_of_products(float sum, const Row& row, const Numbers& x) const {
    Numbers numbers;
    numbers_of(row.part, numbers);
    if constexpr (kVector == 1) {
#pragma unroll
      for (int c = 0; c < Columns::kCount; ++c) sum = fmaf(row.scales.of(c), numbers[c] * x[c], sum);
      return sum;
    } else {
      float of_lane = 0.0f;
#pragma unroll
      for (int c = 0; c < Columns::kCount; ++c) of_lane = fmaf(numbers[c], x[c], of_lane);
      return fmaf(row.scales.of(0), of_lane, sum);
    }
  }
  __device__ __forceinline__ void store(const Columns& columns, int64_t token, const Numbers& sums) const {
    columns.store_float32(args.out + token * args.shape.row_dim, sums);
  }
};

}  // namespace

template <typename Element, int kVector, bool kRagged>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor)
    memory_lookup_quantized(const QuantizedLookupArguments args) {
  walk_lookup<kRagged>(args, ScaledRows<Element, kVector>{args});
}

template <typename Element, int kVector>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor)
    memory_dot_quantized(const QuantizedLookupArguments args) {
  walk_dot(args, ScaledRows<Element, kVector>{args}, args.out);
}

namespace {

template <typename Params>
QuantizedLookupArguments arguments_of(const Params& params, const MemoryWalkArguments& walk) {
  QuantizedLookupArguments args{walk};
  args.values_stride = params.rows.values.strides[0];
  args.group_size = static_cast<int32_t>(params.rows.group_size > 0 ? params.rows.group_size : 1);
  args.values = params.rows.values.data;
  args.scales = params.rows.scales.data;
  args.scales_stride = params.rows.scales.strides[0];
  args.out = params.out.data;
  return args;
}

// Whether a lane may take 16 columns at once, of the rows and of what stands beside them in float32.
template <typename T>
bool has_vectors(const QuantizedRows& rows, const Array<T, 2>& wide) {
  return rows.group_size % kWideVector == 0 && rows.values.has_aligned_rows(16) && wide.has_aligned_rows(16);
}

template <typename Element, int kVector>
void launch_lookup(const QuantizedLookupParams& params, cudaStream_t stream) {
  const auto args = arguments_of(params, lookup_walk_of(params, row_shape<kVector>(params.problem.row_dim)));
  const cuda::LaunchShape shape = walk_shape<Config>(args, stream);
  if (args.offsets == nullptr) {
    cuda::launch(memory_lookup_quantized<Element, kVector, false>, shape, args);
  } else {
    cuda::launch(memory_lookup_quantized<Element, kVector, true>, shape, args);
  }
}

template <typename Element>
void lookup_of(const QuantizedLookupParams& params, cudaStream_t stream) {
  if (has_vectors(params.rows, params.out)) return launch_lookup<Element, kWideVector>(params, stream);
  launch_lookup<Element, 1>(params, stream);
}

template <typename Element, int kVector>
void launch_dot(const QuantizedDotParams& params, cudaStream_t stream) {
  auto args = arguments_of(params, dot_walk_of(params, row_shape<kVector>(params.problem.row_dim)));
  args.x = params.x.data;
  cuda::launch(memory_dot_quantized<Element, kVector>, walk_shape<Config>(args, stream), args);
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
