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
// bounds windows and grids of 49 or 64 tokens by far. Of several tiles of keys the next is fetched, and the one after it
// found, while one is attended to; groups of one tile leave it to the thread blocks of a multiprocessor to hide each
// other's waits.
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

template <typename Element, int kTokens, int kHeadDim>
struct GridKeyStage {
  cuda::SharedTile<Element, kTokens, kHeadDim> key;
  cuda::SharedTile<Element, kTokens, kHeadDim> value;
};

// Where the rows of a tile of keys and values lie.
template <int kTokens>
struct GridKeyPlaces {
  grid::RowOffsets<kTokens> key_rows;
  grid::RowOffsets<kTokens> value_rows;
  uint32_t there[kTokens / kLanes];  // a bit a key
};

template <typename Element, int kHeadDim>
struct GridForwardSharedMemory {
  using Tiles = GridTiles<Element, kHeadDim>;
  static constexpr int kTokens = Tiles::kTokens;
  static constexpr int kThreads = Tiles::kWarps * kLanes;
  using Stage = GridKeyStage<Element, kTokens, kHeadDim>;
  using Places = GridKeyPlaces<kTokens>;

  cuda::SharedTile<Element, kTokens, kHeadDim> query;
  // float32 multiplies weights from here; the 16-bit types multiply them from registers.
  cuda::SharedTile<float, Tiles::kIsFloat ? kTokens : 1, Tiles::kForwardStep> weights;
  grid::RowOffsets<kTokens> query_rows;
  grid::RowOffsets<kTokens> out_rows;
  int64_t numbers[kTokens];          // where a query's lse stands
  int64_t bias_rows[kTokens];        // where a query's row of the bias starts
  uint32_t there[kTokens / kLanes];  // a bit a query
  // Of the tile that is attended to, the one that is filled and the one whose keys are found.
  Places places[3];
  // One is attended to while the other is filled. Groups of one tile have the first alone.
  Stage stages[2];
  static constexpr size_t bytes(bool is_single) {
    return sizeof(GridForwardSharedMemory) - (is_single ? sizeof(Stage) : 0);
  }
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

// Step 3, from products to scores. `there` has a bit a key; first_number: the first key's in its group.
template <typename Shared, int kBlocks>
__device__ __forceinline__ void finish_scores(const GridForwardArguments& args, const Shared& shared, int first_row,
                                              uint32_t first_number, uint32_t there, float (&scores)[1][kBlocks][4]) {
  constexpr uint32_t kAll = 0xffffffffu >> (32 - kBlocks * 8);
  const int g = lane_id() / 4, t = lane_id() % 4;
  const uint32_t mine = there >> 2 * t;
#pragma unroll
  for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) scores[0][n][e] = cuda::scale_score(scores[0][n][e], args.score_scale);
  }
  if (args.bias != nullptr) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float* bias = args.bias + shared.bias_rows[first_row + h * 8 + g] + first_number + 2 * t;
#pragma unroll
      for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& score = scores[0][n][2 * h + e];
          if ((mine >> (n * 8 + e) & 1u) != 0) score = fmaf(bias[n * 8 + e], kLog2E, score);
        }
      }
    }
  }
  if (there == kAll) return;
#pragma unroll
  for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if ((mine >> (n * 8 + e % 2) & 1u) == 0) scores[0][n][e] = -INFINITY;
    }
  }
}

// Step 4: scores become weights. is_first: there are no outputs yet.
template <int kBlocks, int kColumns>
__device__ __forceinline__ void online_softmax(float (&scores)[1][kBlocks][4], Running<kColumns>& running,
                                               bool is_first) {
  float rescale[2];
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
    rescale[h] = cuda::exp2_approximate(running.maximum[h] - base);
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
    running.sum[h] = running.sum[h] * rescale[h] + sum;
  }
  if (is_first) return;
#pragma unroll
  for (int n = 0; n < kColumns / 8; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) running.out[0][n][e] *= rescale[e / 2];
  }
}

// Steps 3 to 5 of a warp for the keys in shared memory, as far as they belong to its slot. `there`: a bit a key.
template <typename Shared, typename Stage, int kColumns>
__device__ __forceinline__ void attend(const GridForwardArguments& args, Shared& shared, Stage& stage,
                                       const uint32_t* there_of_keys, uint32_t key_tile, int first_row,
                                       Running<kColumns>& running) {
  constexpr int kStep = Shared::Tiles::kForwardStep;
  const int slot_tokens = args.geometry.slot_tokens, head_dim = args.geometry.head_dim;
  const int first = first_row & -slot_tokens, end = first + slot_tokens;
#pragma unroll 1
  for (int key = first; key < end; key += kStep) {
    const uint32_t there = tokens_there<kStep>(there_of_keys, key, end);
    if (there == 0) continue;
    const int count = kLanes - __clz(static_cast<int>(there));
    float scores[1][kStep / 8][4];
    cuda::fill(scores, 0.0f);
    multiply_rows(scores, shared.query, first_row, stage.key, key, count, head_dim);
    const uint32_t first_number = key_tile * Shared::kTokens + static_cast<uint32_t>(key - first);
    finish_scores(args, shared, first_row, first_number, there, scores);
    online_softmax(scores, running, key_tile == 0 && key == first);
    add_weighted_rows(running.out, scores, stage.value, key, count, head_dim, shared.weights, first_row);
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
    if (t == 0 && is_token_there(shared.there, row)) {
      const int64_t offset = shared.numbers[row];
      args.lse[offset] = (running.maximum[h] + log2f(sum)) * kLn2;
      write_softmax_terms(running.maximum[h], sum, args.softmax_terms + 2 * offset);
    }
  }
  write_rows(running.out, factors, shared.query, first_row, args.out, args.is_out_aligned, shared.out_rows,
             args.geometry.head_dim);
}

}  // namespace grid

template <typename Element, int kHeadDim>
__global__ void __launch_bounds__(GridForwardSharedMemory<Element, kHeadDim>::kThreads,
                                  GridTiles<Element, kHeadDim>::kForwardBlocksPerProcessor)
    grid_attend(const GridForwardArguments args) {
  using Shared = GridForwardSharedMemory<Element, kHeadDim>;
  constexpr uint32_t kTokens = Shared::kTokens;
  constexpr int kBytes = sizeof(Element);
  Shared& shared = *reinterpret_cast<Shared*>(cuda::dynamic_shared_memory());
  const GridGeometry& geometry = args.geometry;
  const uint32_t block = blockIdx.x / geometry.num_tiles, tile = blockIdx.x - block * geometry.num_tiles;
  const uint32_t first_unit = block * (kTokens / static_cast<uint32_t>(geometry.slot_tokens));
  const auto unit_of = [first_unit](uint32_t slot) { return first_unit + slot; };
  const bool is_single = geometry.num_tiles == 1;
  const auto place_key = [&](typename Shared::Places& places, int i, const grid::Token& token) {
    places.key_rows[i] = grid::row_offset(args.key, token, kBytes);
    places.value_rows[i] = grid::row_offset(args.value, token, kBytes);
  };
  const auto gather_keys = [&](typename Shared::Stage& stage, const typename Shared::Places& places) {
    grid::gather_rows_async<Shared::kThreads>(stage.key, args.key, places.key_rows, geometry.head_dim);
    grid::gather_rows_async<Shared::kThreads>(stage.value, args.value, places.value_rows, geometry.head_dim);
    cuda::copy_async_commit();
  };
  const auto find_keys = [&](uint32_t key_tile) {
    typename Shared::Places& places = shared.places[key_tile % 3];
    grid::find_tokens<kTokens>(geometry, unit_of, key_tile * kTokens, places.there,
                               [&](int i, const grid::Token& token) { place_key(places, i, token); });
  };
  // Step 1. Tiles of short groups may be empty: such thread blocks return as a whole.
  const auto place_query = [&](int i, const grid::Token& token) {
    shared.query_rows[i] = grid::row_offset(args.query, token, kBytes);
    shared.out_rows[i] = grid::row_offset(args.out, token, kBytes);
    shared.numbers[i] = grid::number_offset(geometry, token);
    const int64_t group = geometry.max_tokens;
    shared.bias_rows[i] = (token.head * group + token.number) * group;
    if (is_single) place_key(shared.places[0], i, token);
  };
  if (!grid::place_tokens<kTokens>(geometry, unit_of, tile * kTokens, shared.there, place_query)) return;
  grid::gather_rows_async<Shared::kThreads>(shared.query, args.query, shared.query_rows, geometry.head_dim);
  // Step 2. Keys of a tile are found two tiles ahead, and copied one ahead.
  if (!is_single) {
    find_keys(0);
    find_keys(1);
    // Publishes the places of both tiles to all threads.
    __syncthreads();
  }
  gather_keys(shared.stages[0], shared.places[0]);
  const int first_row = warp_id() * cuda::kBlockRows;
  const bool has_work = grid::tokens_there<16>(shared.there, first_row, Shared::kTokens) != 0;
  grid::Running<kHeadDim> running;
  running.reset();
#pragma unroll 1
  for (uint32_t key_tile = 0; key_tile < geometry.num_tiles; ++key_tile) {
    typename Shared::Stage& stage = shared.stages[key_tile % 2];
    cuda::copy_async_wait<0>();
    // Publishes keys and values, the next tile's places, and the first time queries, to all warps; tells all threads that
    // the tile before has been used and the next one may overwrite it.
    __syncthreads();
    if (key_tile + 1 < geometry.num_tiles) {
      gather_keys(shared.stages[(key_tile + 1) % 2], shared.places[(key_tile + 1) % 3]);
      if (key_tile + 2 < geometry.num_tiles) find_keys(key_tile + 2);
    }
    const uint32_t* there = is_single ? shared.there : shared.places[key_tile % 3].there;
    if (has_work) grid::attend(args, shared, stage, there, key_tile, first_row, running);
  }
  if (has_work) grid::write_outputs<Element, kHeadDim>(args, shared, first_row, running);
}

namespace {

struct GridForwardKernel {
  Dtype dtype;
  int64_t max_head_dim;
  int64_t tokens;
  int64_t threads;
  int64_t shared_bytes;         // of groups of more than one tile
  int64_t single_shared_bytes;  // of groups of one tile
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
          Shared::bytes(false),
          Shared::bytes(true),
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
  const int64_t shared_bytes = args.geometry.num_tiles == 1 ? kernel.single_shared_bytes : kernel.shared_bytes;
  kernel.launch(args, {grid::blocks_for(args.geometry, kernel.tokens), dim3(static_cast<unsigned>(kernel.threads)),
                       static_cast<size_t>(shared_bytes), static_cast<cudaStream_t>(place.stream)});
}

void grid::add_forward_kernel_facts(std::vector<CudaKernelFacts>& facts) {
  for (const GridForwardKernel& kernel : kForwardKernels) {
    facts.push_back(
        {"grid_attend, one tile", kernel.dtype, kernel.max_head_dim, kernel.threads, kernel.single_shared_bytes});
    facts.push_back({"grid_attend", kernel.dtype, kernel.max_head_dim, kernel.threads, kernel.shared_bytes});
  }
}

}  // namespace topgather
