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
#include "memory_config_cuda.h"
#include "memory_walks_cuda.cuh"

namespace topgather {

namespace {
constexpr int kThreads = MemoryLookupCudaConfig::kThreads;
constexpr int kBlocksPerProcessor = MemoryLookupCudaConfig::kBlocksPerProcessor;
}  // namespace

struct MemoryLookupArguments : MemoryWalkArguments {
  const void* values;  // [num_rows, W] dtype
  const void* x;       // [T, W] dtype; dot only
  void* out;           // lookup: [T, W] dtype; dot: [T, K] float32
};

namespace {

// Rows of the element type, which x and out have too: as memory_walks_cuda.cuh asks for.
template <typename Element, int kVector>
struct PlainRows {
  using Config = MemoryLookupCudaConfig;
  using Columns = LaneColumns<Element, kVector>;
  using Row = typename Columns::Part;
  using X = Row;
  using Numbers = float[Columns::kCount];
  const MemoryLookupArguments& args;

  __device__ __forceinline__ void load(const Columns& columns, int32_t row, Row& into) const {
    columns.load(static_cast<const Element*>(args.values) + row * args.values_stride, row != kNoRow, into);
  }
  __device__ __forceinline__ void add(const Row& row, float weight, Numbers& sums) const {
    Numbers numbers;
    unpack(row, numbers);
#pragma unroll
    for (int c = 0; c < Columns::kCount; ++c) sums[c] = fmaf(weight, numbers[c], sums[c]);
  }
  __device__ __forceinline__ void load_x(const Columns& columns, int64_t row_of_x, bool has_x, X& into) const {
    columns.load(static_cast<const Element*>(args.x) + row_of_x * args.x_stride, has_x, into);
  }
  __device__ __forceinline__ void numbers_of_x(const X& x, Numbers& numbers) const { unpack(x, numbers); }
  __device__ __forceinline__ float sum_of_products(float sum, const Row& row, const Numbers& x) const {
    Numbers numbers;
    unpack(row, numbers);
#pragma unroll
    for (int c = 0; c < Columns::kCount; ++c) sum = fmaf(numbers[c], x[c], sum);
    return sum;
  }
  __device__ __forceinline__ void store(const Columns& columns, int64_t token, const Numbers& sums) const {
    columns.store(static_cast<Element*>(args.out) + token * args.shape.row_dim, sums);
  }
};

}  // namespace

template <typename Element, int kVector, bool kRagged>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor) memory_lookup(const MemoryLookupArguments args) {
  walk_lookup<kRagged>(args, PlainRows<Element, kVector>{args});
}

template <typename Element, int kVector>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor) memory_dot(const MemoryLookupArguments args) {
  walk_dot(args, PlainRows<Element, kVector>{args}, static_cast<float*>(args.out));
}

namespace {

template <typename Params>
MemoryLookupArguments arguments_of(const Params& params, const MemoryWalkArguments& walk) {
  MemoryLookupArguments args{walk, params.values.data, nullptr, params.out.data};
  args.values_stride = params.values.strides[0];
  return args;
}

template <typename Element, int kVector>
void launch_lookup(const MemoryLookupParams& params, cudaStream_t stream) {
  const auto args = arguments_of(params, lookup_walk_of(params, row_shape<kVector>(params.problem.row_dim)));
  const cuda::LaunchShape shape = walk_shape<MemoryLookupCudaConfig>(args, stream);
  if (args.offsets == nullptr) {
    cuda::launch(memory_lookup<Element, kVector, false>, shape, args);
  } else {
    cuda::launch(memory_lookup<Element, kVector, true>, shape, args);
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
  auto args = arguments_of(params, dot_walk_of(params, row_shape<kVector>(params.problem.row_dim)));
  args.x = params.x.data;
  cuda::launch(memory_dot<Element, kVector>, walk_shape<MemoryLookupCudaConfig>(args, stream), args);
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
