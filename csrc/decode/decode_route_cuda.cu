// The choice of blocks while decoding, on CUDA.
//
//   score_ij = dot(query_i, centroid_j)                   j < own block of query i
//   choice_i = the newest force_last blocks up to the own, the first force_first, and the best of the others
//
// Two kernels. moba_decode_scores: a thread block owns up to kMaxRows queries of one key head and kBlocksPerItem
// centroids, so that a centroid is read from memory once for all heads of a group and a few tokens. Steps:
//   1. queries to shared memory as float32, and where each centroid lies;
//   2. a group of 8, 16 or 32 lanes holds a slab of kCentroidsInFlight centroids against kRowsAtOnce queries;
//   3. scores, as integers that order as they rank, go to the workspace: 4 bytes for every D * 4 that were read.
// moba_select_blocks: a thread block owns one query. A warp takes a range of neighbouring blocks, their ranks in
// registers as far as they go. Steps:
//   4. the rank of the last one chosen, bit by bit from the top, counting how many reach it;
//   5. what is above it is chosen, and of what equals it as many as are left, lower blocks first; counts of the warps
//      before say where each choice goes, so that they ascend without a sort. Forced blocks around them, then -1.
// Any top_k takes the same steps. A query that may choose all it sees is not scored.
// Numerics: float32 products and sums. NaN ranks as +inf, zeros of either sign alike. A block on a page that does not
// exist ranks above all, so that the query meets it and ends as NaN. A query without a place chooses nothing.
// Determinism: a query's choice depends on its own row and the centroids alone.
#include <algorithm>

#include "decode_config_cuda.h"
#include "decode_cuda.h"
#include "decode_pages_cuda.cuh"

namespace topgather {

namespace {
using Config = DecodeRouteCudaConfig;
constexpr int kScoreThreads = Config::kScoreThreads;
constexpr int kBlocksPerItem = Config::kBlocksPerItem;
constexpr int kCentroidsInFlight = Config::kCentroidsInFlight;
constexpr int kRowsAtOnce = Config::kRowsAtOnce;
static_assert(kCentroidsInFlight == 4, "lanes' sums are added four at a time");
static_assert(kBlocksPerItem <= kScoreThreads, "a thread finds one centroid");
constexpr int kSelectThreads = Config::kSelectThreads;
constexpr int kSelectWarps = kSelectThreads / kLanes;
constexpr int kScoresHeld = Config::kScoresHeld;
}  // namespace

struct DecodeScoreArguments {
  DecodeGeometry geometry;
  DecodeWave wave;
  RowShape shape;  // of a centroid
  uint32_t chunks_per_row;
  uint32_t tiles_per_unit;
  int32_t rows_per_tile;
  int32_t row_elements;            // of a query in shared memory
  int32_t max_blocks;              // of a sequence
  Array<const void, 4> query;      // [batch, query head, M, D] dtype
  Array<const void, 4> centroids;  // [page, kv head, blocks of a page, D] float32
  uint32_t* ranks;                 // [unit of the wave, row, max_blocks] uint32
};

namespace {

struct ScoreSharedMemory {
  CachePlace places[kBlocksPerItem];  // of centroids
  // Behind it: queries [rows_per_tile, row_elements] float32.
};
static_assert(sizeof(ScoreSharedMemory) % 16 == 0, "queries are read 16 bytes at a time");

constexpr uint32_t kRankOfNoPage = 0xffffffffu;

// Orders as scores rank; never 0.
__device__ __forceinline__ uint32_t rank_of(float score) {
  if (isnan(score)) score = INFINITY;
  const uint32_t bits = score == 0.0f ? 0u : __float_as_uint(score);
  return (bits >> 31) != 0 ? ~bits : bits | 0x80000000u;
}

// A lane's columns of a query, zeros past the end.
template <int kVector>
__device__ __forceinline__ void load_columns(const float* row, const LaneColumns<float, kVector>& columns,
                                             float (&values)[LaneColumns<float, kVector>::kCount]) {
  if constexpr (kVector > 1) {
    const bool is_there = columns.first < columns.row_dim;
    const float4 four =
        is_there ? *reinterpret_cast<const float4*>(row + columns.first) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    values[0] = four.x;
    values[1] = four.y;
    values[2] = four.z;
    values[3] = four.w;
  } else {
#pragma unroll
    for (int i = 0; i < LaneColumns<float, kVector>::kCount; ++i) {
      const int column = columns.first + i * columns.step;
      values[i] = column < columns.row_dim ? row[column] : 0.0f;
    }
  }
}

}  // namespace

template <typename Element, int kVector>
__global__ void __launch_bounds__(kScoreThreads, 4) moba_decode_scores(const DecodeScoreArguments args) {
  using Columns = LaneColumns<float, kVector>;
  ScoreSharedMemory& shared = *reinterpret_cast<ScoreSharedMemory*>(cuda::dynamic_shared_memory());
  float* queries = reinterpret_cast<float*>(&shared + 1);
  const DecodeGeometry& geometry = args.geometry;
  const uint32_t tile_of_wave = blockIdx.x / args.chunks_per_row;
  const int first_block = static_cast<int>(blockIdx.x - tile_of_wave * args.chunks_per_row) * kBlocksPerItem;
  const uint32_t unit_in_wave = tile_of_wave / args.tiles_per_unit;
  const int first_row = static_cast<int>(tile_of_wave - unit_in_wave * args.tiles_per_unit) * args.rows_per_tile;
  const int num_rows = min(args.rows_per_tile, args.wave.num_rows - first_row);
  const DecodeUnit unit = decode_unit(geometry, static_cast<uint32_t>(args.wave.first_unit) + unit_in_wave);
  // What the last of the queries sees, the others see at most.
  const NewTokens tokens = new_tokens(geometry, unit.sequence);
  const int last_token = min(args.wave.first_token + (first_row + num_rows - 1) / geometry.group, tokens.count - 1);
  const int last_position = tokens.first_position + last_token;
  if (tokens.is_faulty || last_token < args.wave.first_token + first_row / geometry.group || last_position < 0) return;
  const int visible =
      static_cast<int>(static_cast<uint32_t>(last_position) / static_cast<uint32_t>(geometry.block_size));
  if (visible < geometry.top_k || first_block >= visible) return;  // the whole thread block, as above
  const int num_blocks = min(kBlocksPerItem, visible - first_block);

  // Step 1.
  for (int i = threadIdx.x; i < num_rows * args.row_elements; i += kScoreThreads) {
    const int row = i / args.row_elements, column = i - row * args.row_elements;
    const int token = (first_row + row) / geometry.group;
    const int head = unit.kv_head * geometry.group + first_row + row - token * geometry.group;
    queries[i] =
        column < geometry.head_dim
            ? cuda::to_float(args.query.at<Element>(unit.sequence, head, args.wave.first_token + token)[column])
            : 0.0f;
  }
  if (static_cast<int>(threadIdx.x) < num_blocks) {
    CachePlace place =
        cache_place(geometry, unit.sequence, (first_block + static_cast<int>(threadIdx.x)) * geometry.block_size);
    place.row = static_cast<int32_t>(static_cast<uint32_t>(place.row) / static_cast<uint32_t>(geometry.block_size));
    shared.places[threadIdx.x] = place;
  }
  // Publishes queries and places to all warps.
  __syncthreads();

  const int lanes_per_row = args.shape.lanes_per_row;
  const int lane_in_row = lane_id() % lanes_per_row;
  const int group = static_cast<int>(threadIdx.x) / lanes_per_row;
  const int blocks_per_step = kScoreThreads / lanes_per_row * kCentroidsInFlight;
  uint32_t* ranks = args.ranks +
                    (static_cast<int64_t>(unit_in_wave) * args.wave.num_rows + first_row) * args.max_blocks +
                    first_block;
#pragma unroll 1
  for (int step = 0; step < num_blocks; step += blocks_per_step) {
    const int mine = step + group * kCentroidsInFlight;
    const float* centroids[kCentroidsInFlight];
#pragma unroll
    for (int c = 0; c < kCentroidsInFlight; ++c) {
      const CachePlace place = mine + c < num_blocks ? shared.places[mine + c] : CachePlace{kNotSeen, 0};
      centroids[c] = place.page >= 0 ? page_row<float>(args.centroids, unit.kv_head, place) : nullptr;
    }
#pragma unroll 1
    for (int row = 0; row < num_rows; row += kRowsAtOnce) {
      float sums[kRowsAtOnce][kCentroidsInFlight] = {};
      // Step 2.
#pragma unroll 1
      for (int slab = 0; slab < args.shape.num_slabs; ++slab) {
        const Columns columns(args.shape, slab, lane_in_row);
        typename Columns::Part parts[kCentroidsInFlight];
#pragma unroll
        for (int c = 0; c < kCentroidsInFlight; ++c) columns.load(centroids[c], centroids[c] != nullptr, parts[c]);
        float values[kCentroidsInFlight][Columns::kCount];
#pragma unroll
        for (int c = 0; c < kCentroidsInFlight; ++c) unpack(parts[c], values[c]);
#pragma unroll
        for (int r = 0; r < kRowsAtOnce; ++r) {
          if (row + r >= num_rows) continue;
          float query[Columns::kCount];
          load_columns<kVector>(queries + (row + r) * args.row_elements, columns, query);
#pragma unroll
          for (int c = 0; c < kCentroidsInFlight; ++c) {
#pragma unroll
            for (int i = 0; i < Columns::kCount; ++i) sums[r][c] = fmaf(query[i], values[c][i], sums[r][c]);
          }
        }
      }
      // Step 3.
#pragma unroll
      for (int r = 0; r < kRowsAtOnce; ++r) {
        if (row + r >= num_rows) continue;
        const float score = sum_over_lanes(sums[r], lanes_per_row);
        const int block = mine + lane_in_row;
        if (lane_in_row < kCentroidsInFlight && block < num_blocks) {
          ranks[static_cast<int64_t>(row + r) * args.max_blocks + block] =
              shared.places[block].page >= 0 ? rank_of(score) : kRankOfNoPage;
        }
      }
    }
  }
}

struct SelectBlocksArguments {
  DecodeGeometry geometry;
  DecodeWave wave;
  int32_t max_blocks;  // of a sequence
  int32_t force_first;
  int32_t force_last;
  const uint32_t* ranks;            // [unit of the wave, row, max_blocks] uint32
  Array<int32_t, 4> block_indices;  // [batch, query head, M, K]
};

namespace {

struct SelectSharedMemory {
  int32_t counts[2][kSelectWarps];
  int32_t above[kSelectWarps];
  int32_t equal[kSelectWarps];
};

// The ranks of a warp's range of blocks: lane l has blocks first + 32 j + l.
struct WarpRanks {
  const uint32_t* ranks;  // [max_blocks] uint32
  int first;
  int end;
  uint32_t held[kScoresHeld];

  // 0, which no block has, past the end.
  __device__ __forceinline__ uint32_t read(int j) const {
    const int block = first + j * kLanes + lane_id();
    return block < end ? ranks[block] : 0u;
  }
  __device__ __forceinline__ int num_steps() const { return (end - first + kLanes - 1) / kLanes; }

  __device__ __forceinline__ int32_t count_from(uint32_t threshold) const {
    int32_t count = 0;
#pragma unroll
    for (int j = 0; j < kScoresHeld; ++j) count += held[j] >= threshold ? 1 : 0;
#pragma unroll 1
    for (int j = kScoresHeld; j < num_steps(); ++j) count += read(j) >= threshold ? 1 : 0;
    return cuda::sum_over_lanes(count);
  }
};

// Step 5 for 32 blocks of a warp.
struct WarpChoices {
  uint32_t last_rank;
  int32_t equal_left;  // that may still be chosen
  int32_t slot;

  __device__ __forceinline__ void write(uint32_t rank, int block, int32_t* choices) {
    const unsigned before = (1u << lane_id()) - 1;
    const unsigned equal = __ballot_sync(kAllLanes, rank == last_rank);
    const bool is_chosen = rank > last_rank || (rank == last_rank && __popc(equal & before) < equal_left);
    const unsigned chosen = __ballot_sync(kAllLanes, is_chosen);
    if (is_chosen) choices[slot + __popc(chosen & before)] = block;
    slot += __popc(chosen);
    equal_left = max(equal_left - __popc(equal), 0);
  }
};

}  // namespace

__global__ void __launch_bounds__(kSelectThreads, 4) moba_select_blocks(const SelectBlocksArguments args) {
  SelectSharedMemory& shared = *reinterpret_cast<SelectSharedMemory*>(cuda::dynamic_shared_memory());
  const DecodeGeometry& geometry = args.geometry;
  const DecodeRow row = decode_row(geometry, args.wave, blockIdx.x);
  int32_t* choices = args.block_indices.at<int32_t>(row.sequence, row.head, row.token);
  const int num_chosen = geometry.top_k - args.force_first - args.force_last;  // by score
  const int num_visible = row.position < 0 ? 0 : row.own_block + 1;
  if (num_visible <= geometry.top_k || num_chosen == 0) {
    // All it sees, or nothing but forced blocks: not scored.
    const int num_slots = min(num_visible, geometry.top_k);
    const int first_last = num_visible <= geometry.top_k ? num_slots : args.force_first;
    for (int slot = threadIdx.x; slot < geometry.top_k; slot += kSelectThreads) {
      choices[slot] = slot < first_last ? slot : (slot < num_slots ? num_visible - (num_slots - slot) : -1);
    }
    return;  // the whole thread block
  }

  const int end = num_visible - args.force_last;
  const int per_warp = (end - args.force_first + kSelectThreads - 1) / kSelectThreads * kLanes;
  WarpRanks mine;
  mine.ranks = args.ranks + static_cast<int64_t>(blockIdx.x) * args.max_blocks;
  mine.first = min(args.force_first + warp_id() * per_warp, end);
  mine.end = min(mine.first + per_warp, end);
#pragma unroll
  for (int j = 0; j < kScoresHeld; ++j) mine.held[j] = mine.read(j);

  // Step 4.
  uint32_t last_rank = 0;
#pragma unroll 1
  for (int bit = 31; bit >= 0; --bit) {
    const uint32_t threshold = last_rank | 1u << bit;
    int32_t (&counts)[kSelectWarps] = shared.counts[bit & 1];
    const int32_t count = mine.count_from(threshold);
    if (lane_id() == 0) counts[warp_id()] = count;
    // Publishes the warps' counts to all; what they overwrite was read before the barrier of the last bit.
    __syncthreads();
    int32_t total = 0;
#pragma unroll
    for (int w = 0; w < kSelectWarps; ++w) total += counts[w];
    if (total >= num_chosen) last_rank = threshold;
    if (total == num_chosen) break;
  }

  // Step 5.
  const int32_t from_last = mine.count_from(last_rank);
  const int32_t above = last_rank == 0xffffffffu ? 0 : mine.count_from(last_rank + 1);
  if (lane_id() == 0) {
    shared.above[warp_id()] = above;
    shared.equal[warp_id()] = from_last - above;
  }
  // Publishes them to all warps.
  __syncthreads();
  int32_t above_in_all = 0, above_before = 0, equal_before = 0;
#pragma unroll
  for (int w = 0; w < kSelectWarps; ++w) {
    above_in_all += shared.above[w];
    above_before += w < warp_id() ? shared.above[w] : 0;
    equal_before += w < warp_id() ? shared.equal[w] : 0;
  }
  const int32_t equal_in_all = num_chosen - above_in_all;  // to be chosen
  const int32_t equal_taken = min(equal_before, equal_in_all);
  WarpChoices writer{last_rank, equal_in_all - equal_taken, args.force_first + above_before + equal_taken};
#pragma unroll
  for (int j = 0; j < kScoresHeld; ++j) {
    if (j < mine.num_steps()) writer.write(mine.held[j], mine.first + j * kLanes + lane_id(), choices);
  }
#pragma unroll 1
  for (int j = kScoresHeld; j < mine.num_steps(); ++j) {
    writer.write(mine.read(j), mine.first + j * kLanes + lane_id(), choices);
  }
  for (int slot = threadIdx.x; slot < args.force_first; slot += kSelectThreads) choices[slot] = slot;
  for (int i = threadIdx.x; i < args.force_last; i += kSelectThreads)
    choices[geometry.top_k - 1 - i] = row.own_block - i;
}

namespace {

struct DecodeRoutePlan {
  DecodeGeometry geometry;
  int64_t max_blocks;
  bool is_scored;  // any query can be
  DecodeWaves waves;
};

DecodeRoutePlan plan_route(const DecodeRouteParams& params) {
  const DecodeProblem& problem = params.problem;
  DecodeRoutePlan plan{};
  plan.geometry = decode_geometry(problem);
  plan.max_blocks = divide_up(plan.geometry.capacity, problem.block_size);
  require(plan.max_blocks < INT32_MAX - kSelectThreads, "moba_decode_route: a cache has at most 2^31 blocks");
  plan.is_scored = problem.top_k > params.force_first + params.force_last && plan.max_blocks > problem.top_k;
  plan.waves = plan_decode_waves(plan.geometry, plan.is_scored ? plan.max_blocks * 4 : 1, Config::kBudget);
  return plan;
}

int64_t take_ranks(const DecodeRoutePlan& plan, WorkspaceCutter& cutter, uint32_t** ranks) {
  *ranks = plan.is_scored ? cutter.take<uint32_t>(plan.waves.max_rows(plan.geometry) * plan.max_blocks) : nullptr;
  return cutter.used();
}

template <typename Element, int kVector>
void launch_scores(DecodeScoreArguments args, cudaStream_t stream) {
  args.shape = row_shape<kVector>(args.geometry.head_dim);
  args.row_elements = static_cast<int32_t>(multiple_of(args.geometry.head_dim, 4));
  const int64_t row_bytes = int64_t{args.row_elements} * 4;
  const int64_t max_rows = std::min<int64_t>(Config::kMaxRows, args.wave.num_rows);
  const int64_t rows = std::clamp<int64_t>(Config::kMaxRowBytes / row_bytes, 1, max_rows);
  const int64_t tiles = divide_up(args.wave.num_rows, rows), chunks = divide_up(args.max_blocks, kBlocksPerItem);
  require(tiles * chunks * args.wave.num_units < INT32_MAX, "moba_decode_route: too many queries and blocks at once");
  args.rows_per_tile = static_cast<int32_t>(rows);
  args.tiles_per_unit = static_cast<uint32_t>(tiles);
  args.chunks_per_row = static_cast<uint32_t>(chunks);
  const size_t shared_bytes = sizeof(ScoreSharedMemory) + static_cast<size_t>(rows * row_bytes);
  cuda::launch(
      moba_decode_scores<Element, kVector>,
      {dim3(static_cast<unsigned>(tiles * chunks * args.wave.num_units)), dim3(kScoreThreads), shared_bytes, stream},
      args);
}

template <typename Element>
void scores_for(const DecodeScoreArguments& args, cudaStream_t stream) {
  if (has_whole_pieces(args.centroids)) {
    launch_scores<Element, kElementsPerVector<float>>(args, stream);
  } else {
    launch_scores<Element, 1>(args, stream);
  }
}

}  // namespace

int64_t moba_decode_route_workspace_bytes(const DecodeRouteParams& params, const CudaPlace&) {
  const DecodeProblem& problem = params.problem;
  if (is_empty(problem)) return 0;
  WorkspaceCutter cutter(nullptr);
  uint32_t* ranks = nullptr;
  return take_ranks(plan_route(params), cutter, &ranks);
}

void moba_decode_route_cuda(const DecodeRouteParams& params, const CudaWorkspace& workspace, const CudaPlace& place) {
  const DecodeProblem& problem = params.problem;
  if (is_empty(problem)) return;
  const DeviceGuard guard(place.device);
  const StageRange range("decode.route");
  const auto stream = static_cast<cudaStream_t>(place.stream);
  const DecodeRoutePlan plan = plan_route(params);
  WorkspaceCutter cutter(workspace.data);
  uint32_t* ranks = nullptr;
  require(take_ranks(plan, cutter, &ranks) <= workspace.bytes,
          "moba_decode_route: the workspace is smaller than moba_decode_route_workspace_bytes says");
  for (int64_t wave_idx = 0; wave_idx < plan.waves.count(); ++wave_idx) {
    const DecodeWave wave = plan.waves.wave(plan.geometry, wave_idx);
    const auto max_blocks = static_cast<int32_t>(plan.max_blocks);
    if (plan.is_scored) {
      DecodeScoreArguments args{};
      args.geometry = plan.geometry;
      args.wave = wave;
      args.max_blocks = max_blocks;
      args.query = params.query;
      args.centroids = params.centroids;
      args.ranks = ranks;
      with_element(problem.dtype, [&](auto element) { scores_for<decltype(element)>(args, stream); });
    }
    const int64_t num_rows = int64_t{wave.num_units} * wave.num_rows;
    require(num_rows < INT32_MAX, "moba_decode_route: more than 2^31 - 1 queries at once");
    cuda::launch(moba_select_blocks,
                 {dim3(static_cast<unsigned>(num_rows)), dim3(kSelectThreads), sizeof(SelectSharedMemory), stream},
                 {plan.geometry, wave, max_blocks, static_cast<int32_t>(params.force_first),
                  static_cast<int32_t>(params.force_last), ranks, params.block_indices});
  }
}

}  // namespace topgather
