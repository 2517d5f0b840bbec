// Block centroids on CUDA.
//
//   centroid_j = (1 / n_j) sum over the n_j keys of block j                       [num_blocks, D]
//
// Who owns what: a thread block owns one key block of one unit. A thread owns kVector neighbouring columns and every
// num_groups-th row; threads of one row stand side by side, so that reads coalesce. Steps, per panel of columns:
//   1. each thread sums its rows in registers;
//   2. the row groups' sums meet in shared memory;
//   3. the first group adds them in order, divides and writes; for the router it also writes the largest magnitude of a
//      unit.
// Packed, the op's centroids are written by sequence; blocks that its tensor has no room for are left out.
// Numerics: float32 sums of float32, bfloat16 or float16 keys. Ties do not arise. An empty key tensor has no blocks and
// launches nothing; the last block of a sequence may be short and is divided by the keys it has.
// Determinism: every sum is taken in an order fixed by shapes and alignment.
#include "../common/checks.h"
#include "../cuda/launch.cuh"
#include "moba_cuda.h"
#include "moba_stages_cuda.cuh"

namespace topgather {

namespace {

constexpr int kCentroidThreads = MobaCentroidConfig::kThreads;
constexpr int kMaxVector = 8;

struct SharedMemory {
  float sums[kCentroidThreads][kMaxVector];
};

// Step 1. Rows that are 16-byte aligned come in whole vectors.
template <typename Element, int kVector>
__device__ __forceinline__ void add_row(const Element* row, float (&sums)[kVector]) {
  if constexpr (kVector == 1) {
    sums[0] += cuda::to_float(row[0]);
  } else {
    const uint4 words = *reinterpret_cast<const uint4*>(row);
    if constexpr (sizeof(Element) == 4) {
      sums[0] += __uint_as_float(words.x);
      sums[1] += __uint_as_float(words.y);
      sums[2] += __uint_as_float(words.z);
      sums[3] += __uint_as_float(words.w);
    } else {
      const uint32_t pairs[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 pair = cuda::unpack2<Element>(pairs[i]);
        sums[2 * i] += pair.x;
        sums[2 * i + 1] += pair.y;
      }
    }
  }
}

}  // namespace

template <typename Element, int kVector>
__global__ void __launch_bounds__(kCentroidThreads) moba_block_centroids(const CentroidArguments args) {
  SharedMemory& shared = *reinterpret_cast<SharedMemory*>(cuda::dynamic_shared_memory());
  const MobaGeometry& geometry = args.geometry;
  const int64_t block = blockIdx.x;
  const int64_t unit_idx = args.first_unit + blockIdx.y;
  if (block >= existing_blocks(geometry)) return;  // the whole thread block: the grid is a bound taken from shapes
  const KeyBlock key_block = key_block_on_device(geometry, block);
  const Unit unit = unit_at(geometry, unit_idx);
  const Element* keys = args.key.at<Element>(unit.batch_idx, unit.kv_head, key_block.first_key);
  float* centroid = nullptr;
  if (args.is_by_unit) {
    centroid = args.centroids.at<float>(0, blockIdx.y, block);
  } else if (geometry.is_packed()) {
    const int64_t sequence_idx = sequence_of_block(geometry, block);
    const int64_t block_of_sequence = block - geometry.block_starts[sequence_idx];
    if (block_of_sequence >= args.centroids.sizes[2]) return;  // the whole thread block
    centroid = args.centroids.at<float>(sequence_idx, unit.kv_head, block_of_sequence);
  } else {
    centroid = args.centroids.at<float>(unit.batch_idx, unit.kv_head, block);
  }

  const int num_vectors = static_cast<int>((args.row_elements + kVector - 1) / kVector);
  const int panel = num_vectors < kCentroidThreads ? num_vectors : kCentroidThreads;
  const int num_groups = kCentroidThreads / panel;
  const int group = static_cast<int>(threadIdx.x) / panel;
  const int place = static_cast<int>(threadIdx.x) % panel;
  float largest = 0.0f;
  for (int first = 0; first < num_vectors; first += panel) {
    const int column = (first + place) * kVector;
    const bool is_in_row = column < args.head_dim;
    float sums[kVector] = {};
    if (group < num_groups && is_in_row) {
      for (int row = group; row < key_block.num_keys; row += num_groups) {
        add_row<Element, kVector>(keys + row * args.key.strides[2] + column, sums);
      }
    }
#pragma unroll
    for (int i = 0; i < kVector; ++i) shared.sums[threadIdx.x][i] = sums[i];
    // Step 2: publishes every group's sums to the first group.
    __syncthreads();
    if (group == 0 && first + place < num_vectors) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        float sum = 0.0f;
        for (int g = 0; g < num_groups; ++g) sum += shared.sums[g * panel + place][i];
        const float mean = is_in_row ? sum / static_cast<float>(key_block.num_keys) : 0.0f;
        centroid[column + i] = mean;
        if (fabsf(mean) < INFINITY) largest = fmaxf(largest, fabsf(mean));
      }
    }
    // Several panels mean a single group, whose threads read their own sums alone: the next panel may overwrite them.
  }
  // Bits of non-negative floats order as the floats do.
  if (args.largest != nullptr && group == 0) cuda::max_atomic(args.largest + blockIdx.y, __float_as_uint(largest));
}

namespace {

template <typename Element>
void launch_for(const CentroidArguments& args, int64_t num_units, cudaStream_t stream) {
  const int64_t num_blocks = args.geometry.num_blocks;
  require(num_blocks <= INT32_MAX, "block_centroids: more than 2^31 - 1 key blocks");
  constexpr int kVector = 16 / static_cast<int>(sizeof(Element));
  const bool is_vector =
      args.key.has_aligned_rows(16) && args.row_elements % kVector == 0 && args.head_dim % kVector == 0;
  for (int64_t done = 0; done < num_units; done += MobaWaveConfig::kMaxUnits) {
    const int64_t count = num_units - done < MobaWaveConfig::kMaxUnits ? num_units - done : MobaWaveConfig::kMaxUnits;
    CentroidArguments part = args;
    part.first_unit += done;
    if (args.is_by_unit)
      part.centroids.data = static_cast<float*>(args.centroids.data) + done * args.centroids.strides[1];
    if (args.largest != nullptr) part.largest += done;
    const cuda::LaunchShape shape{dim3(static_cast<unsigned>(num_blocks), static_cast<unsigned>(count)),
                                  dim3(kCentroidThreads), sizeof(SharedMemory), stream};
    if (is_vector) {
      cuda::launch(moba_block_centroids<Element, kVector>, shape, part);
    } else {
      cuda::launch(moba_block_centroids<Element, 1>, shape, part);
    }
  }
}

}  // namespace

void launch_centroids(Dtype dtype, const CentroidArguments& args, int64_t num_units, cudaStream_t stream) {
  if (num_units == 0 || args.geometry.num_blocks == 0 || args.row_elements == 0) return;
  const StageRange range("moba.centroids");
  with_element(dtype, [&](auto element) { launch_for<decltype(element)>(args, num_units, stream); });
}

int64_t moba_centroids_workspace_bytes(const CentroidParams& params, const CudaPlace&) {
  WorkspaceCutter cutter(nullptr);
  prepare_geometry(params.problem, 1, cutter, nullptr);
  return cutter.used();
}

void moba_centroids_cuda(const CentroidParams& params, const CudaWorkspace& workspace, const CudaPlace& place) {
  const MobaProblem& problem = params.problem;
  if (problem.batch_size == 0) return;
  require(workspace.bytes >= moba_centroids_workspace_bytes(params, place),
          "block_centroids: the workspace is smaller than block_centroids_workspace_bytes says");
  const DeviceGuard guard(place.device);
  const auto stream = static_cast<cudaStream_t>(place.stream);
  WorkspaceCutter cutter(workspace.data);
  CentroidArguments args{};
  args.geometry = prepare_geometry(problem, 1, cutter, stream);
  args.head_dim = problem.head_dim;
  args.row_elements = problem.head_dim;
  args.key = params.key;
  args.centroids = params.centroids;
  launch_centroids(problem.dtype, args, count_units(problem), stream);
}

}  // namespace topgather
