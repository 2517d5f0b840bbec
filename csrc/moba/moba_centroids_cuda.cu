// Block centroids on CUDA.
//
//   centroid_j = (1 / n_j) sum over the n_j keys of block j                       [num_blocks, D]
//
// Who owns what: a thread block owns one key block of one (batch, key head). Its warps take the rows in turn
// (warp w: rows w, w + kWarps, ...), the lanes of a warp stand side by side along D so that reads coalesce. Steps:
//   1. each thread sums its rows in a register, one dimension at a time;
//   2. the warps' sums meet in shared memory;
//   3. one warp adds them in warp order, divides and writes.
// Numerics: float32 sums of float32, bfloat16 or float16 keys. Ties do not arise. An empty key tensor has no blocks and
// launches nothing; the last block may be short and is divided by the keys it has.
// Determinism: every sum is taken in an order fixed by the block's size.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "../common/checks.h"
#include "../cuda/launch.cuh"
#include "moba_cuda.h"

namespace topgather {
namespace {

struct CentroidConfig {
  static constexpr int kWarps = 8;
  static constexpr int kLanes = 32;
  static constexpr int kThreads = kWarps * kLanes;
};
static_assert(CentroidConfig::kThreads <= 1024, "one thread block per key block");

struct CentroidArguments {
  const void* key;   // [batch, kv head, key, D] dtype
  float* centroids;  // [batch, kv head, block, D] float32
  int64_t key_batch_stride, key_head_stride, key_row_stride;
  int64_t centroid_batch_stride, centroid_head_stride, centroid_row_stride;
  int64_t key_len;
  int64_t num_blocks;
  int num_kv_heads;
  int head_dim;
  int64_t block_size;
};

struct SharedMemory {
  float warp_sums[CentroidConfig::kWarps][CentroidConfig::kLanes];
};

__device__ inline float to_float(float value) { return value; }
__device__ inline float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ inline float to_float(__half value) { return __half2float(value); }

template <typename Element>
__device__ inline float sum_rows(const Element* first_row, int64_t row_stride, int64_t num_rows, int warp) {
  float sum = 0.0f;
  for (int64_t row = warp; row < num_rows; row += CentroidConfig::kWarps) sum += to_float(first_row[row * row_stride]);
  return sum;
}

template <typename Element>
__global__ void __launch_bounds__(CentroidConfig::kThreads) moba_block_centroids(CentroidArguments args) {
  __shared__ SharedMemory shared;
  const int lane = threadIdx.x % CentroidConfig::kLanes;
  const int warp = threadIdx.x / CentroidConfig::kLanes;
  const int64_t block = blockIdx.x % args.num_blocks;
  const int64_t head = blockIdx.x / args.num_blocks % args.num_kv_heads;
  const int64_t batch = blockIdx.x / args.num_blocks / args.num_kv_heads;
  const int64_t first_key = block * args.block_size;
  const int64_t keys_left = args.key_len - first_key;
  const int64_t num_rows = keys_left < args.block_size ? keys_left : args.block_size;
  const Element* key = static_cast<const Element*>(args.key) + batch * args.key_batch_stride +
                       head * args.key_head_stride + first_key * args.key_row_stride;
  float* centroid = args.centroids + batch * args.centroid_batch_stride + head * args.centroid_head_stride +
                    block * args.centroid_row_stride;

  for (int first_dim = 0; first_dim < args.head_dim; first_dim += CentroidConfig::kLanes) {
    const int dim = first_dim + lane;
    const bool in_row = dim < args.head_dim;
    // Step 1.
    shared.warp_sums[warp][lane] = in_row ? sum_rows(key + dim, args.key_row_stride, num_rows, warp) : 0.0f;
    // Step 2: publishes every warp's sums to warp 0.
    __syncthreads();
    // Step 3.
    if (warp == 0 && in_row) {
      float sum = 0.0f;
      for (int w = 0; w < CentroidConfig::kWarps; ++w) sum += shared.warp_sums[w][lane];
      centroid[dim] = sum / static_cast<float>(num_rows);
    }
    // Tells the other warps that warp 0 has read their sums and the next dimensions may overwrite them.
    __syncthreads();
  }
}

}  // namespace

void moba_centroids_cuda(const CentroidParams& params, const CudaPlace& place) {
  const MobaProblem& problem = params.problem;
  require(problem.cu_seqlens_k == nullptr, "block_centroids: packed keys have no centroid kernel on CUDA yet");
  require(problem.dtype != Dtype::kFloat64, "block_centroids: float64 runs on the CPU only");
  const int64_t num_blocks = (problem.key_len + problem.block_size - 1) / problem.block_size;
  const int64_t grid = problem.batch_size * problem.num_kv_heads * num_blocks;
  if (grid == 0 || problem.head_dim == 0) return;
  require(grid <= INT32_MAX, "block_centroids: more than 2^31 - 1 blocks in one call");
  const DeviceGuard guard(place.device);
  const CentroidArguments args{params.key.data,
                               static_cast<float*>(params.centroids.data),
                               params.key.batch_stride,
                               params.key.head_stride,
                               params.key.row_stride,
                               params.centroids.batch_stride,
                               params.centroids.head_stride,
                               params.centroids.row_stride,
                               problem.key_len,
                               num_blocks,
                               static_cast<int>(problem.num_kv_heads),
                               static_cast<int>(problem.head_dim),
                               problem.block_size};
  const auto stream = static_cast<cudaStream_t>(place.stream);
  const auto blocks = static_cast<unsigned int>(grid);
  switch (problem.dtype) {
    case Dtype::kFloat32: moba_block_centroids<float><<<blocks, CentroidConfig::kThreads, 0, stream>>>(args); break;
    case Dtype::kBFloat16:
      moba_block_centroids<__nv_bfloat16><<<blocks, CentroidConfig::kThreads, 0, stream>>>(args);
      break;
    default: moba_block_centroids<__half><<<blocks, CentroidConfig::kThreads, 0, stream>>>(args);
  }
  cuda_require(cudaGetLastError(), "launching moba_block_centroids");
}

}  // namespace topgather
