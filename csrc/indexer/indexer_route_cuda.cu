// The indexer's choice of blocks, on CUDA.
//
//   t_ij     = dot(index_query_i, index_key_j)                       never written to global memory
//   score_ib = max or mean of t_ij over the visible keys j of block b, or the sum over them and over the choice's index
//              heads of weight_i * relu(t_ij)
//   choice_i = the forced blocks, and the best of those between them
//
// Who owns what: a thread block owns kQueries neighbouring queries of one choice and walks the key blocks in ascending
// order, in tiles of kKeys keys; each of its warps owns 16 rows. Four lanes share a row, one of them its list. Steps per
// tile of keys:
//   1. the tile arrives in shared memory, and the queries before the first one;
//   2. each warp multiplies its rows with it, the products staying in registers;
//   3. a lane joins the products that it holds of a row, of the keys that the row sees;
//   last of a block:
//   4. the row's four lanes join theirs; the first one enters the block into the row's sorted list;
//   last:
//   5. the list in ascending order between the forced blocks, -1 for the rest. Its numbers stand in block_indices from
//      the start; only the scores need memory of their own.
// Numerics: products of 16-bit numbers are exact in the float32 they are summed in; float32 takes plain multiply-adds. A
// NaN among the products makes the score NaN, which ranks as +inf. Ties: blocks come in ascending order and an entry
// needs a strictly greater score. Lists are filled by position while they are short, so no score can lead out of bounds.
// Determinism: a row's choice depends on its own row and the keys alone.
#include <algorithm>

#include "../common/checks.h"
#include "../cuda/dispatch.h"
#include "../cuda/launch.cuh"
#include "../cuda/tile_math.cuh"
#include "../cuda/workspace.h"
#include "indexer_config_cuda.h"
#include "indexer_cuda.h"

namespace topgather {

namespace {
constexpr int kRowsPerWarp = IndexRouteCudaConfig::kRowsPerWarp;
constexpr int kQueries = IndexRouteCudaConfig::kWarps * kRowsPerWarp;
constexpr int kKeys = IndexRouteCudaConfig::kKeys;
constexpr int kThreads = IndexRouteCudaConfig::kWarps * cuda::kLanes;
}  // namespace

struct IndexRouteArguments {
  Array<const void, 4> index_query;  // [batch, index head, query, D] dtype
  Array<const void, 4> index_key;    // [batch, index key head, key, D] dtype
  Array<const void, 3> weights;      // [batch, index head, query] float32; or data null
  Array<int32_t, 4> block_indices;   // [batch, choice, query, K] int32
  float* list_scores;                // [thread block, row, list_length] float32, descending
  IndexReduction reduction;
  bool is_causal;
  uint32_t num_work;  // tiles of queries, of every choice and batch entry
  uint32_t num_tiles;
  uint32_t num_choices;
  int32_t heads_per_choice;
  int32_t heads_per_key_head;
  int32_t query_len;
  int32_t key_len;
  int32_t head_dim;
  int32_t block_size;
  int32_t num_blocks;
  int32_t top_k;
  int32_t force_first;
  int32_t force_last;
  int32_t list_length;
};

namespace {

template <typename Element, int kHeadDim>
struct SharedMemory {
  cuda::SharedTile<Element, kQueries, kHeadDim> query;
  cuda::SharedTile<Element, kKeys, kHeadDim> key;
};

// Position of a query among the keys; a block of which it sees a key starts there or before.
__device__ __forceinline__ int32_t position_of(const IndexRouteArguments& args, int32_t row) {
  return args.is_causal ? row + args.key_len - args.query_len : args.key_len - 1;
}
__device__ __forceinline__ int32_t num_visible(const IndexRouteArguments& args, int32_t row) {
  const int32_t position = position_of(args, row);
  return position < 0 ? 0 : position / args.block_size + 1;
}
// Past the last block that the query may choose by score; 0 where all that it sees is chosen.
__device__ __forceinline__ int32_t candidate_end(const IndexRouteArguments& args, int32_t row) {
  const int32_t visible = num_visible(args, row);
  return visible > args.top_k ? visible - args.force_last : 0;
}

// Starts the copy of `count` rows, `stride` elements apart; what is not there becomes zeros.
template <typename Tile, typename Element>
__device__ __forceinline__ void copy_rows(Tile& tile, const Element* rows, int64_t stride, int count, int head_dim) {
  const int row_chunks = (head_dim + Tile::kPerChunk - 1) / Tile::kPerChunk;
  for (int i = static_cast<int>(threadIdx.x); i < Tile::kRows * Tile::kChunks; i += kThreads) {
    const int row = i / Tile::kChunks, chunk = i % Tile::kChunks;
    const bool is_there = row < count;
    cuda::copy_chunk_async(tile, row, chunk, rows + (is_there ? row : 0) * stride, row_chunks, is_there);
  }
  cuda::copy_async_commit();
}

// Step 3: the products of keys from `first` on, of rows g and g + 8, into what the tiles before made.
__device__ __forceinline__ void join(const IndexRouteArguments& args, const float (&products)[1][kKeys / 8][4],
                                     int32_t first, int32_t end, const int32_t (&position)[2], float (&joined)[2]) {
  const int t = lane_id() % 4;
#pragma unroll
  for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int32_t key = first + n * 8 + 2 * t + e % 2;
      if (key >= end || key > position[e / 2]) continue;
      const float product = products[0][n][e];
      float& sum = joined[e / 2];
      if (args.reduction == IndexReduction::kMax) {
        sum = cuda::max_or_nan(sum, product);
      } else if (args.reduction == IndexReduction::kMean) {
        sum += product;
      } else {
        sum += product < 0.0f ? 0.0f : product;
      }
    }
  }
}

// Step 4 by one lane: the order-th candidate of the row.
__device__ __forceinline__ void enter(float* scores, int32_t* blocks, int32_t length, int32_t order, float score,
                                      int32_t block) {
  int32_t rank = order < length ? order : length;
  if (rank == length) {
    --rank;
    if (!(score > scores[rank])) return;
  }
  for (; rank > 0 && score > scores[rank - 1]; --rank) {
    scores[rank] = scores[rank - 1];
    blocks[rank] = blocks[rank - 1];
  }
  scores[rank] = score;
  blocks[rank] = block;
}

// Step 5 by one lane.
__device__ __forceinline__ void write_row(const IndexRouteArguments& args, int32_t* choices, int32_t row) {
  const int32_t visible = num_visible(args, row);
  int32_t count = 0;
  if (visible <= args.top_k) {
    for (; count < visible; ++count) choices[count] = count;
  } else {
    for (; count < args.force_first; ++count) choices[count] = count;
    int32_t* list = choices + count;
    for (int32_t i = 1; i < args.list_length; ++i) {
      const int32_t block = list[i];
      int32_t slot = i;
      for (; slot > 0 && list[slot - 1] > block; --slot) list[slot] = list[slot - 1];
      list[slot] = block;
    }
    count += args.list_length;
    for (int32_t block = visible - args.force_last; block < visible; ++block) choices[count++] = block;
  }
  for (; count < args.top_k; ++count) choices[count] = -1;
}

}  // namespace

template <typename Element, int kHeadDim>
__global__ void __launch_bounds__(kThreads, IndexRouteCudaConfig::kBlocksPerProcessor)
    index_route_kernel(const IndexRouteArguments args) {
  auto& shared = *reinterpret_cast<SharedMemory<Element, kHeadDim>*>(cuda::dynamic_shared_memory());
  const int g = lane_id() / 4, t = lane_id() % 4;
  const int first_of_warp = warp_id() * kRowsPerWarp;
  const float empty = args.reduction == IndexReduction::kMax ? -INFINITY : 0.0f;
#pragma unroll 1
  for (uint32_t work = blockIdx.x; work < args.num_work; work += gridDim.x) {
    // The last queries first: they see most.
    const uint32_t units = args.num_work / args.num_tiles;
    const int32_t first_row = static_cast<int32_t>((args.num_tiles - 1 - work / units) * kQueries);
    const uint32_t choice = work % units % args.num_choices, batch_idx = work % units / args.num_choices;
    const int32_t num_rows = min(kQueries, args.query_len - first_row);
    const int32_t block_end = args.list_length == 0 ? 0 : candidate_end(args, first_row + num_rows - 1);
    int32_t position[2], end[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = first_of_warp + r * 8 + g;
      position[r] = row < num_rows ? position_of(args, first_row + row) : -1;
      end[r] = row < num_rows ? candidate_end(args, first_row + row) : 0;
    }
#pragma unroll 1
    for (int32_t block = args.force_first; block < block_end; ++block) {
      const int32_t first_key = block * args.block_size;
      const int32_t end_key = first_key + min(args.block_size, args.key_len - first_key);
      float score[2] = {0.0f, 0.0f};
#pragma unroll 1
      for (int32_t h = 0; h < args.heads_per_choice; ++h) {
        const int32_t head = static_cast<int32_t>(choice) * args.heads_per_choice + h;
        float joined[2] = {empty, empty};
#pragma unroll 1
        for (int32_t first = first_key; first < end_key; first += kKeys) {
          // Every warp is done with the tiles before they are overwritten.
          __syncthreads();
          // Step 1. The queries of a single head stay.
          if (first == first_key && (args.heads_per_choice > 1 || block == args.force_first)) {
            copy_rows(shared.query, args.index_query.at<Element>(batch_idx, head, first_row),
                      args.index_query.strides[2], num_rows, args.head_dim);
          }
          copy_rows(shared.key, args.index_key.at<Element>(batch_idx, head / args.heads_per_key_head, first),
                    args.index_key.strides[2], min(kKeys, end_key - first), args.head_dim);
          cuda::copy_async_wait<0>();
          // Publishes the tiles to every warp.
          __syncthreads();
          // Step 2.
          float products[1][kKeys / 8][4];
          cuda::fill(products, 0.0f);
          cuda::multiply_by_rows(products, shared.query, first_of_warp, shared.key, 0, kKeys, args.head_dim);
          join(args, products, first, end_key, position, joined);
        }
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const int row = first_of_warp + r * 8 + g;
          if (args.reduction == IndexReduction::kMax) {
            score[r] = cuda::max_of_row(joined[r]);
          } else {
            const float sum = cuda::sum_of_row(joined[r]);
            if (args.reduction == IndexReduction::kMean) {
              score[r] = sum / static_cast<float>(max(min(position[r] + 1, end_key) - first_key, 1));
            } else {
              const bool is_weighted = args.weights.data != nullptr && row < num_rows;
              score[r] += is_weighted ? *args.weights.at<float>(batch_idx, head, first_row + row) * sum : sum;
            }
          }
        }
      }
      // Step 4.
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int row = first_of_warp + r * 8 + g;
        if (t != 0 || block >= end[r]) continue;
        float* scores = args.list_scores + (static_cast<int64_t>(blockIdx.x) * kQueries + row) * args.list_length;
        int32_t* blocks = args.block_indices.at<int32_t>(batch_idx, choice, first_row + row) + args.force_first;
        enter(scores, blocks, args.list_length, block - args.force_first, isnan(score[r]) ? INFINITY : score[r], block);
      }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = first_of_warp + r * 8 + g;
      if (t != 0 || row >= num_rows) continue;
      write_row(args, args.block_indices.at<int32_t>(batch_idx, choice, first_row + row), first_row + row);
    }
  }
}

namespace {

struct Plan {
  uint32_t num_tiles;
  uint32_t num_work;
  int64_t thread_blocks;
};

Plan plan_of(const IndexRouteParams& params) {
  const int64_t tiles = divide_up(params.query_len, kQueries);
  const int64_t work = tiles * params.batch_size * params.num_choices;
  require(work <= INT32_MAX, "index_route: more than 2^31 - 1 tiles of queries");
  const int64_t list_bytes = std::max<int64_t>(kQueries * params.list_length * 4, 1);
  const int64_t most = std::clamp<int64_t>(workspace_budget(IndexRouteCudaConfig::kListBudget) / list_bytes, 1,
                                           IndexRouteCudaConfig::kMaxThreadBlocks);
  return {static_cast<uint32_t>(tiles), static_cast<uint32_t>(work), std::min(work, most)};
}

template <typename Element, int kHeadDim>
void launch_kernel(const IndexRouteArguments& args, int64_t thread_blocks, cudaStream_t stream) {
  cuda::launch(
      index_route_kernel<Element, kHeadDim>,
      {dim3(static_cast<unsigned>(thread_blocks)), dim3(kThreads), sizeof(SharedMemory<Element, kHeadDim>), stream},
      args);
}

template <typename Element>
void launch_for(const IndexRouteArguments& args, int64_t thread_blocks, cudaStream_t stream) {
  if (args.head_dim <= 64) {
    launch_kernel<Element, 64>(args, thread_blocks, stream);
  } else if (args.head_dim <= 128) {
    launch_kernel<Element, 128>(args, thread_blocks, stream);
  } else {
    require(args.head_dim <= 256, "index_route: an index head has at most 256 columns");
    launch_kernel<Element, 256>(args, thread_blocks, stream);
  }
}

}  // namespace

int64_t index_route_workspace_bytes(const IndexRouteParams& params, const CudaPlace&) {
  WorkspaceCutter cutter(nullptr);
  cutter.take<float>(plan_of(params).thread_blocks * kQueries * params.list_length);
  return cutter.used();
}

void index_route_cuda(const IndexRouteParams& params, const CudaWorkspace& workspace, const CudaPlace& place) {
  const Plan plan = plan_of(params);
  if (plan.num_work == 0) return;
  require(workspace.bytes >= index_route_workspace_bytes(params, place),
          "index_route: the workspace is smaller than index_route_workspace_bytes says");
  require(params.key_len <= INT32_MAX - kKeys && params.query_len <= INT32_MAX && params.top_k <= INT32_MAX &&
              params.num_index_heads <= INT32_MAX,
          "index_route: more than 2^31 - 1 tokens or heads");
  const DeviceGuard guard(place.device);
  const StageRange range("indexer: route");
  WorkspaceCutter cutter(workspace.data);
  IndexRouteArguments args{};
  args.index_query = params.index_query;
  args.index_key = params.index_key;
  args.weights = params.weights;
  args.block_indices = params.block_indices;
  args.list_scores = cutter.take<float>(plan.thread_blocks * kQueries * params.list_length);
  args.reduction = static_cast<IndexReduction>(params.reduction_code);
  args.is_causal = params.is_causal;
  args.num_work = plan.num_work;
  args.num_tiles = plan.num_tiles;
  args.num_choices = static_cast<uint32_t>(params.num_choices);
  args.heads_per_choice = static_cast<int32_t>(params.heads_per_choice);
  args.heads_per_key_head = static_cast<int32_t>(params.num_index_heads / params.num_key_heads);
  args.query_len = static_cast<int32_t>(params.query_len);
  args.key_len = static_cast<int32_t>(params.key_len);
  args.head_dim = static_cast<int32_t>(params.head_dim);
  // No block is larger than all keys.
  args.block_size = static_cast<int32_t>(std::min(params.block_size, std::max<int64_t>(params.key_len, 1)));
  args.num_blocks = static_cast<int32_t>(params.num_blocks);
  args.top_k = static_cast<int32_t>(params.top_k);
  args.force_first = static_cast<int32_t>(params.force_first);
  args.force_last = static_cast<int32_t>(params.force_last);
  args.list_length = static_cast<int32_t>(params.list_length);
  with_element(params.dtype, [&](auto element) {
    launch_for<decltype(element)>(args, plan.thread_blocks, static_cast<cudaStream_t>(place.stream));
  });
}

}  // namespace topgather
