// Grid and window attention forward on CUDA: dense attention inside each group, tokens read where they lie.
//
//   out_i = sum_t softmax_t(scale * dot(query_i, key_t) + bias_it) value_t,   t over the tokens of i's group
//   lse_i = log sum_t exp(scale * dot(query_i, key_t) + bias_it)
//
// Who owns what: a thread block owns a tile of queries of one unit, or of several where groups have 32 tokens or fewer
// (grid_geometry_cuda.cuh); a warp owns 16 of them, with scores and outputs in its registers. Steps:
//   1. place the tile's queries and gather their rows;
//   per tile of keys of the same units:
//   2. gather keys and values;
//   per kForwardStep keys:
//   3. scores in base 2, plus bias; keys that are not there to -inf;
//   4. running maximum and sum per query (online softmax);
//   5. outputs += weights x values;
//   last:
//   6. divide, round, write out, lse and softmax terms.
// Bytes: query and out once, keys and values once per tile of queries, from the second-level cache but for the first; a
// bias is read by every group, from there too. Operations: 4 G D a token, G / 2 a byte of 16-bit memory: bandwidth
// bounds windows and grids of 49 or 64 tokens by far. Tiles of keys are not fetched ahead; the thread blocks of a
// multiprocessor hide each other's waits.
// Numerics: scores, weights and sums in float32; weights are rounded to a 16-bit element type before they meet the
// values. A row all of whose scores are -inf, or with one of +inf or NaN: NaN, as plain softmax. There is no empty row:
// a token is in its own group.
// Determinism: a row's arithmetic depends on its own group and shapes alone.
#include "../common/softmax_terms.h"
#include "../cuda/scores.cuh"
#include "grid_geometry_cuda.cuh"

namespace topgather {

struct GridForwardArguments {
  GridGeometry geometry;
  float score_scale;  // scale * log2(e)
  bool is_out_aligned;
  ConstImage query;      // [batch, head, row, column, D] dtype
  ConstImage key;        // [batch, head, row, column, D] dtype
  ConstImage value;      // [batch, head, row, column, D] dtype
  const float* bias;     // [head, G, G] float32, or null
  MutableImage out;      // [batch, head, row, column, D] dtype
  float* lse;            // [batch, head, row, column] float32
  float* softmax_terms;  // [batch, head, row, column, 2] float32
};

template <typename Element, int kHeadDim>
struct GridForwardSharedMemory {
  using Tiles = GridTiles<Element, kHeadDim>;
  static constexpr int kTokens = Tiles::kTokens;
  static constexpr int kThreads = Tiles::kWarps * kLanes;

  cuda::SharedTile<Element, kTokens, kHeadDim> query;
  cuda::SharedTile<Element, kTokens, kHeadDim> key;
  cuda::SharedTile<Element, kTokens, kHeadDim> value;
  // float32 multiplies weights from here; the 16-bit types multiply them from registers.
  cuda::SharedTile<float, Tiles::kIsFloat ? kTokens : 1, Tiles::kForwardStep> weights;
  TilePlaces<kTokens> query_places;
  TilePlaces<kTokens> key_places;
};

namespace grid {

// What a warp carries through the keys: outputs, and per row the running maximum and the lane's part of the sum.
template <int kColumns>
struct Running {
  float out[1][kColumns / 8][4];
  float maximum[2];
  float sum[2];

  __device__ __forceinline__ void reset() {
    cuda::fill(out, 0.0f);
    maximum[0] = maximum[1] = -INFINITY;
    sum[0] = sum[1] = 0.0f;
  }
};

// Step 3, from products to scores. `there` has a bit a key.
template <typename Shared, int kBlocks>
__device__ __forceinline__ void finish_scores(const GridForwardArguments& args, const Shared& shared, int first_row,
                                              int first_key, uint32_t there, float (&scores)[1][kBlocks][4]) {
  const int g = lane_id() / 4, t = lane_id() % 4;
  const int64_t group = args.geometry.max_tokens;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int row = first_row + h * 8 + g;
    const float* bias = args.bias;
    if (bias != nullptr) {
      bias += (shared.query_places.head[row] * group + shared.query_places.number[row]) * group;
    }
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int key = n * 8 + 2 * t + e;
        float& score = scores[0][n][2 * h + e];
        score = cuda::scale_score(score, args.score_scale);
        if (bias != nullptr && (there >> key & 1u) != 0) {
          score = fmaf(bias[shared.key_places.number[first_key + key]], kLog2E, score);
        }
        if ((there >> key & 1u) == 0) score = -INFINITY;
      }
    }
  }
}

// Step 4: scores become weights.
template <int kBlocks, int kColumns>
__device__ __forceinline__ void online_softmax(float (&scores)[1][kBlocks][4], Running<kColumns>& running) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float maximum = scores[0][0][2 * h];
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
      maximum = cuda::max_or_nan(maximum, cuda::max_or_nan(scores[0][n][2 * h], scores[0][n][2 * h + 1]));
    }
    maximum = cuda::max_or_nan(running.maximum[h], cuda::max_of_row(maximum));
    // Only scores of -inf so far: any finite base keeps -inf - base from being NaN.
    const float base = maximum == -INFINITY ? 0.0f : maximum;
    const float rescale = cuda::exp2_approximate(running.maximum[h] - base);
    running.maximum[h] = maximum;
    float sum = 0.0f;
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& score = scores[0][n][2 * h + e];
        score = cuda::exp2_approximate(score - base);
        sum += score;
      }
    }
    running.sum[h] = running.sum[h] * rescale + sum;
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n) {
      running.out[0][n][2 * h] *= rescale;
      running.out[0][n][2 * h + 1] *= rescale;
    }
  }
}

// Steps 3 to 5 of a warp for the keys in shared memory, as far as they belong to its slot.
template <typename Element, int kHeadDim>
__device__ __forceinline__ void attend(const GridForwardArguments& args,
                                       GridForwardSharedMemory<Element, kHeadDim>& shared, int first_row,
                                       Running<kHeadDim>& running) {
  constexpr int kStep = GridTiles<Element, kHeadDim>::kForwardStep;
  const int slot_tokens = args.geometry.slot_tokens, head_dim = args.geometry.head_dim;
  const int first = first_row / slot_tokens * slot_tokens, end = first + slot_tokens;
#pragma unroll 1
  for (int key = first; key < end; key += kStep) {
    const uint32_t there = tokens_there<kStep>(shared.key_places, key, end);
    if (there == 0) continue;
    const int count = kLanes - __clz(static_cast<int>(there));
    float scores[1][kStep / 8][4];
    cuda::fill(scores, 0.0f);
    cuda::multiply_by_rows(scores, shared.query, first_row, shared.key, key, count, head_dim);
    finish_scores(args, shared, first_row, key, there, scores);
    online_softmax(scores, running);
    add_weighted_rows(running.out, scores, shared.value, key, count, head_dim, shared.weights, first_row);
  }
}

// Step 6.
template <typename Element, int kHeadDim>
__device__ __forceinline__ void write_outputs(const GridForwardArguments& args,
                                              GridForwardSharedMemory<Element, kHeadDim>& shared, int first_row,
                                              const Running<kHeadDim>& running) {
  const int g = lane_id() / 4, t = lane_id() % 4;
  float factors[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int row = first_row + h * 8 + g;
    const float sum = cuda::sum_of_row(running.sum[h]);
    factors[h] = 1.0f / sum;
    if (t == 0 && is_token_there(shared.query_places, row)) {
      const int64_t offset = number_offset(args.geometry, shared.query_places, row);
      args.lse[offset] = (running.maximum[h] + log2f(sum)) * kLn2;
      write_softmax_terms(running.maximum[h], sum, args.softmax_terms + 2 * offset);
    }
  }
  write_rows(running.out, factors, shared.query, first_row, args.out, args.is_out_aligned, shared.query_places,
             args.geometry.head_dim);
}

}  // namespace grid

template <typename Element, int kHeadDim>
__global__ void __launch_bounds__(GridForwardSharedMemory<Element, kHeadDim>::kThreads,
                                  GridTiles<Element, kHeadDim>::kForwardBlocksPerProcessor)
    grid_attend(const GridForwardArguments args) {
  using Shared = GridForwardSharedMemory<Element, kHeadDim>;
  constexpr uint32_t kTokens = Shared::kTokens;
  Shared& shared = *reinterpret_cast<Shared*>(cuda::dynamic_shared_memory());
  const GridGeometry& geometry = args.geometry;
  const uint32_t block = blockIdx.x / geometry.num_tiles, tile = blockIdx.x - block * geometry.num_tiles;
  const uint32_t first_unit = block * (kTokens / static_cast<uint32_t>(geometry.slot_tokens));
  const auto unit_of = [first_unit](uint32_t slot) { return first_unit + slot; };
  // Step 1. Tiles of short groups may be empty: such thread blocks return as a whole.
  if (!grid::place_tokens(geometry, unit_of, tile * kTokens, shared.query_places)) return;
  grid::gather_rows_async(shared.query, args.query, shared.query_places, geometry.head_dim);
  cuda::copy_async_commit();
  const int first_row = warp_id() * cuda::kBlockRows;
  const bool has_work = grid::tokens_there<16>(shared.query_places, first_row, Shared::kTokens) != 0;
  grid::Running<kHeadDim> running;
  running.reset();
#pragma unroll 1
  for (uint32_t key_tile = 0; key_tile < geometry.num_tiles; ++key_tile) {
    // Step 2.
    if (!grid::place_tokens(geometry, unit_of, key_tile * kTokens, shared.key_places)) continue;
    grid::gather_rows_async(shared.key, args.key, shared.key_places, geometry.head_dim);
    grid::gather_rows_async(shared.value, args.value, shared.key_places, geometry.head_dim);
    cuda::copy_async_commit();
    cuda::copy_async_wait<0>();
    // Publishes keys and values, and the first time queries, to all warps.
    __syncthreads();
    if (has_work) grid::attend<Element, kHeadDim>(args, shared, first_row, running);
    // Tells all threads that the tile has been used and the next one may overwrite it.
    __syncthreads();
  }
  if (has_work) grid::write_outputs<Element, kHeadDim>(args, shared, first_row, running);
}

namespace {

struct GridForwardKernel {
  Dtype dtype;
  int64_t max_head_dim;
  int64_t tokens;
  int64_t threads;
  int64_t shared_bytes;
  void (*launch)(const GridForwardArguments& args, const cuda::LaunchShape& shape);
};

template <typename Element, int kHeadDim>
constexpr GridForwardKernel forward_kernel() {
  using Shared = GridForwardSharedMemory<Element, kHeadDim>;
  static_assert(sizeof(Shared) <= 99 * 1024, "one table for all architectures");
  return {kDtypeOf<Element>,
          kHeadDim,
          Shared::kTokens,
          Shared::kThreads,
          sizeof(Shared),
          [](const GridForwardArguments& args, const cuda::LaunchShape& shape) {
            cuda::launch(grid_attend<Element, kHeadDim>, shape, args);
          }};
}

constexpr GridForwardKernel kForwardKernels[] = {forward_kernel<BFloat16, 64>(), forward_kernel<BFloat16, 128>(),
                                                 forward_kernel<Float16, 64>(),  forward_kernel<Float16, 128>(),
                                                 forward_kernel<float, 64>(),    forward_kernel<float, 128>()};

}  // namespace

void grid_forward_cuda(const GridForwardParams& params, const CudaWorkspace&, const CudaPlace& place) {
  const GridProblem& problem = params.problem;
  const GridForwardKernel& kernel = grid::kernel_for(kForwardKernels, problem);
  if (grid::is_empty(problem)) return;
  const DeviceGuard guard(place.device);
  const StageRange range("grid: forward");
  GridForwardArguments args{};
  args.geometry = grid::geometry_of(problem, kernel.tokens);
  args.score_scale = static_cast<float>(problem.scale) * grid::kLog2E;
  args.is_out_aligned = grid::has_whole_chunks(params.out);
  args.query = params.query;
  args.key = params.key;
  args.value = params.value;
  args.bias = params.bias.at<float>();
  args.out = params.out;
  args.lse = params.lse.at<float>();
  args.softmax_terms = params.softmax_terms.at<float>();
  kernel.launch(args, {grid::blocks_for(args.geometry, kernel.tokens), dim3(static_cast<unsigned>(kernel.threads)),
                       static_cast<size_t>(kernel.shared_bytes), static_cast<cudaStream_t>(place.stream)});
}

void grid::add_forward_kernel_facts(std::vector<CudaKernelFacts>& facts) {
  for (const GridForwardKernel& kernel : kForwardKernels) {
    facts.push_back({"grid_attend", kernel.dtype, kernel.max_head_dim, kernel.threads, kernel.shared_bytes});
  }
}

}  // namespace topgather
