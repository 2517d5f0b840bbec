// The indexer's choice of blocks, on CUDA.
//
//   t_ij     = dot(index_query_i, index_key_j)                       never written to global memory
//   score_ib = max or mean of t_ij over the visible keys j of block b, or the sum over them and over the choice's index
//              heads of weight_i * relu(t_ij)
//   choice_i = the forced blocks, and the best of those between them
//
// Who owns what: a thread block owns neighbouring queries of one choice and walks the key blocks in ascending order, in
// groups of kColumns blocks, a group's keys in tiles; each of its warps owns kRowsPerWarp rows and their scores. Steps:
//   1. a tile arrives in one of two places in shared memory while the one before is at work; with a head's first tile the
//      head's queries and weights;
//   2. each warp multiplies its rows with the tile, the products staying in registers;
//   3. a lane joins the products that it holds of a row; only where a tile has keys that some row does not see, or fewer
//      keys than it has room for, it asks each product before whether it counts;
//   last of a block:
//   4. the row's four lanes join theirs; the first one adds the head's score to the row's in shared memory;
//   last of a group, which all heads of the choice have gone through:
//   5. a lane takes a row, marks the scores that beat the worst one kept and enters them, from the lowest block on, into
//      the row's sorted list, which is in registers meanwhile and in the workspace otherwise. Lists longer than kLaneList
//      stay in global memory, their numbers in block_indices;
//   last:
//   6. the list in ascending order between the forced blocks, -1 for the rest.
// Numerics: products of 16-bit numbers are exact in the float32 they are summed in; float32 takes plain multiply-adds. A
// NaN among the products makes the score NaN, which ranks as +inf. Ties: blocks come in ascending order and an entry
// needs a strictly greater score; an empty entry's score is NaN, which is no score's better. Long lists are filled by
// position while they are short, so no score can lead out of bounds.
// Determinism: a row's choice depends on its own row and the keys alone.
#include <algorithm>

#include "../common/checks.h"
#include "../cuda/dispatch.h"
#include "../cuda/launch.cuh"
#include "../cuda/tile_products.cuh"
#include "../cuda/workspace.h"
#include "indexer_config_cuda.h"
#include "indexer_cuda.h"

namespace topgather {

struct IndexRouteArguments {
  Array<const void, 4> index_query;  // [batch, index head, query, D] dtype
  Array<const void, 4> index_key;    // [batch, index key head, key, D] dtype
  Array<const void, 3> weights;      // [batch, index head, query] float32; or data null
  Array<int32_t, 4> block_indices;   // [batch, choice, query, K] int32
  // A row's list, descending: [thread block, list_length, row] up to kLaneList, else scores [thread block, row,
  // list_length], and blocks in block_indices.
  float* list_scores;    // float32
  int32_t* list_blocks;  // int32; or null
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

using Config = IndexRouteCudaConfig;
constexpr int kThreads = Config::kWarps * cuda::kLanes;
constexpr int kLaneList = Config::kLaneList;
constexpr int32_t kNoBlock = INT32_MAX;

template <typename Element, int kHeadDim>
struct SharedMemory {
  using Tiles = IndexRouteTiles<sizeof(Element), kHeadDim>;
  static constexpr int kRowsPerWarp = Tiles::kRowBlocks * 16;
  static constexpr int kQueries = Config::kWarps * kRowsPerWarp;
  static constexpr int kKeys = Tiles::kKeys;
  static constexpr int kColumns = Tiles::kColumns;

  cuda::SharedTile<Element, kQueries, kHeadDim> query;
  cuda::SharedTile<Element, kKeys, kHeadDim> key[2];
  float scores[kQueries][kColumns + 1];
  float weights[kQueries];
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

template <int kRowsAtOnce, typename Tile, typename Element>
__device__ __forceinline__ void copy_some_rows(Tile& tile, const Element* rows, int64_t stride, int count,
                                               int row_chunks) {
  const int chunk = static_cast<int>(threadIdx.x) % Tile::kChunks;
#pragma unroll 1
  for (int row = static_cast<int>(threadIdx.x) / Tile::kChunks; row < Tile::kRows; row += kRowsAtOnce) {
    const bool is_there = row < count;
    cuda::copy_chunk_async(tile, row, chunk, rows + (is_there ? row : 0) * stride, row_chunks, is_there);
  }
}

// Of the r-th row that the lane has products of, g + 8 r of the warp's, whose first one is at warp_position.
__device__ __forceinline__ int32_t position_of_sums(const IndexRouteArguments& args, int32_t warp_position, int r) {
  return args.is_causal ? warp_position + cuda::lane_here() / 4 + r * 8 : warp_position;
}

// Step 1: starts the copy of `count` rows, `stride` elements apart; what is not there becomes zeros. A thread keeps to one
// column of chunks.
template <typename Tile, typename Element>
__device__ __forceinline__ void copy_rows(Tile& tile, const Element* rows, int64_t stride, int count, int head_dim) {
  constexpr int kChunks = Tile::kChunks;
  constexpr int kRowsAtOnce = kThreads / kChunks < Tile::kRows ? kThreads / kChunks : Tile::kRows;
  static_assert(Tile::kRows % kRowsAtOnce == 0, "whole rows at a time");
  const int chunk = static_cast<int>(threadIdx.x) % kChunks, first_row = static_cast<int>(threadIdx.x) / kChunks;
  if (kRowsAtOnce < kThreads / kChunks && first_row >= kRowsAtOnce) return;
  const int row_chunks = (head_dim + Tile::kPerChunk - 1) / Tile::kPerChunk;
  if (count == Tile::kRows && row_chunks == kChunks) {
    const Element* from = rows + first_row * stride + chunk * Tile::kPerChunk;
#pragma unroll
    for (int row = 0; row < Tile::kRows; row += kRowsAtOnce) {
      cuda::copy_async_16(tile.chunk(first_row + row, chunk), from, true);
      from += kRowsAtOnce * stride;
    }
  } else {
    copy_some_rows<kRowsAtOnce>(tile, rows, stride, count, row_chunks);
  }
}

// Step 2 of a tile that is not full, or of narrower rows: steps past what counts are left out.
template <typename QueryTile, typename KeyTile, int kM, int kN>
__device__ __forceinline__ void multiply_some_rows(float (&products)[kM][kN][4], QueryTile& query, int first_row,
                                                   KeyTile& key, int count, int head_dim) {
  cuda::multiply_by_rows(products, query, first_row, key, 0, count, head_dim);
}

// What a product adds to a block's score of a head.
template <IndexReduction kReduction>
__device__ __forceinline__ float joined_with(float joined, float product) {
  if constexpr (kReduction == IndexReduction::kMax) return cuda::max_or_nan(joined, product);
  if constexpr (kReduction == IndexReduction::kMean) return joined + product;
  return joined + cuda::max_or_nan(product, 0.0f);
}

// Step 3 of a tile with keys from `first` up to `end`, where some row of the warp does not see all of it: what a row does
// not see becomes `empty`, which changes nothing. A row sees the keys up to its position.
template <int kM, int kN>
__device__ __forceinline__ void hide_keys(const IndexRouteArguments& args, int32_t first, int32_t end,
                                          int32_t warp_position, float empty, float (&products)[kM][kN][4]) {
  int32_t position[2 * kM];
#pragma unroll
  for (int r = 0; r < 2 * kM; ++r) position[r] = position_of_sums(args, warp_position, r);
#pragma unroll
  for (int n = 0; n < kN; ++n) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int32_t key = first + n * 8 + 2 * (lane_id() % 4) + e;
#pragma unroll
      for (int r = 0; r < 2 * kM; ++r) {
        if (key >= end || key > position[r]) products[r / 2][n][r % 2 * 2 + e] = empty;
      }
    }
  }
}

// Step 3.
template <IndexReduction kReduction, int kM, int kN>
__device__ __forceinline__ void join(const float (&products)[kM][kN][4], float (&joined)[2 * kM]) {
#pragma unroll
  for (int n = 0; n < kN; ++n) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
#pragma unroll
      for (int r = 0; r < 2 * kM; ++r) {
        joined[r] = joined_with<kReduction>(joined[r], products[r / 2][n][r % 2 * 2 + e]);
      }
    }
  }
}

// NaN ranks as +inf.
__device__ __forceinline__ float ranked(float score) { return isnan(score) ? INFINITY : score; }

// Step 5 for the lane's row: scores of `count` blocks from first_block on. scores, blocks: its list, kQueries apart.
// The list stands at the end of the registers; entries before it hold +inf, which nothing beats.
template <int kQueries, int kColumns>
__device__ __forceinline__ void select(const float* row_scores, int32_t first_block, int count, bool is_first,
                                       int32_t length, float* list_scores, int32_t* list_blocks) {
  if (count <= 0) return;
  const int padding = kLaneList - length;
  list_scores -= padding * kQueries;
  list_blocks -= padding * kQueries;
  float scores[kLaneList];
  int32_t blocks[kLaneList];
#pragma unroll
  for (int r = 0; r < kLaneList; ++r) {
    scores[r] = r < padding ? INFINITY : NAN;
    blocks[r] = kNoBlock;
    if (r >= padding && !is_first) {
      scores[r] = list_scores[r * kQueries];
      blocks[r] = list_blocks[r * kQueries];
    }
  }
  // NaN, of a score or of an empty entry, is not less or equal.
  uint32_t marked = 0;
#pragma unroll
  for (int column = 0; column < kColumns; ++column) {
    if (column < count) marked |= row_scores[column] <= scores[kLaneList - 1] ? 0u : 1u << column;
  }
  if (marked == 0) return;
#pragma unroll 1
  while (marked != 0) {
    const int column = __ffs(static_cast<int>(marked)) - 1;
    marked &= marked - 1;
    const float score = ranked(row_scores[column]);
    const int32_t block = first_block + column;
#pragma unroll
    for (int r = kLaneList - 1; r > 0; --r) {
      const bool beats_this = !(score <= scores[r]), beats_one_before = !(score <= scores[r - 1]);
      scores[r] = beats_one_before ? scores[r - 1] : (beats_this ? score : scores[r]);
      blocks[r] = beats_one_before ? blocks[r - 1] : (beats_this ? block : blocks[r]);
    }
    const bool beats_all = !(score <= scores[0]);
    scores[0] = beats_all ? score : scores[0];
    blocks[0] = beats_all ? block : blocks[0];
  }
#pragma unroll
  for (int r = 0; r < kLaneList; ++r) {
    if (r < padding) continue;
    list_scores[r * kQueries] = scores[r];
    list_blocks[r * kQueries] = blocks[r];
  }
}

// Step 5 for a long list: the order-th candidate of the row.
__device__ __forceinline__ void enter_long(float* scores, int32_t* blocks, int32_t length, int32_t order, float score,
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

// The same for a long list.
__device__ __forceinline__ void select_long(const IndexRouteArguments& args, const float* row_scores,
                                            int32_t first_block, int count, float* list_scores, int32_t* list_blocks) {
#pragma unroll 1
  for (int column = 0; column < count; ++column) {
    const float score = ranked(row_scores[column]);
    const int32_t block = first_block + column;
    enter_long(list_scores, list_blocks, args.list_length, block - args.force_first, score, block);
  }
}

// Step 6 for the lane's row, of a short list: blocks are placed by how many stand before them.
template <int kQueries>
__device__ __forceinline__ void write_list(int32_t length, const int32_t* list_blocks, int32_t* choices) {
  int32_t blocks[kLaneList];
#pragma unroll
  for (int r = 0; r < kLaneList; ++r) blocks[r] = r < length ? list_blocks[r * kQueries] : kNoBlock;
#pragma unroll
  for (int r = 0; r < kLaneList; ++r) {
    int32_t position = 0;
#pragma unroll
    for (int other = 0; other < kLaneList; ++other) position += blocks[other] < blocks[r] ? 1 : 0;
    if (r < length) choices[position] = blocks[r];
  }
}

// The same of a long one, which stands in `list` already.
__device__ __forceinline__ void sort_list(int32_t length, int32_t* list) {
#pragma unroll 1
  for (int32_t i = 1; i < length; ++i) {
    const int32_t block = list[i];
    int32_t slot = i;
    for (; slot > 0 && list[slot - 1] > block; --slot) list[slot] = list[slot - 1];
    list[slot] = block;
  }
}

// The row, of the tile's `num_rows`, whose list is the lane's; -1: none. Made anew wherever it stands.
template <typename Shared>
__device__ __forceinline__ int own_row_of(int num_rows) {
  const int thread = cuda::thread_index_here(), lane = thread % cuda::kLanes;
  const int row = thread / cuda::kLanes * Shared::kRowsPerWarp + lane;
  return lane < Shared::kRowsPerWarp && row < num_rows ? row : -1;
}
// Where the thread block's lists begin.
template <int kQueries>
__device__ __forceinline__ int64_t first_list(const IndexRouteArguments& args) {
  return static_cast<int64_t>(blockIdx.x) * kQueries * args.list_length;
}

template <int kQueries>
__device__ __forceinline__ void write_row(const IndexRouteArguments& args, const int32_t* list_blocks, int32_t* choices,
                                          int32_t row) {
  const int32_t visible = num_visible(args, row);
  int32_t count = 0;
  if (visible <= args.top_k) {
    for (; count < visible; ++count) choices[count] = count;
  } else {
    for (; count < args.force_first; ++count) choices[count] = count;
    if (args.list_length <= kLaneList) {
      write_list<kQueries>(args.list_length, list_blocks, choices + count);
    } else {
      sort_list(args.list_length, choices + count);
    }
    count += args.list_length;
    for (int32_t block = visible - args.force_last; block < visible; ++block) choices[count++] = block;
  }
  for (; count < args.top_k; ++count) choices[count] = -1;
}

}  // namespace

template <typename Element, int kHeadDim>
__global__ void __launch_bounds__(kThreads, (IndexRouteTiles<sizeof(Element), kHeadDim>::kBlocksPerProcessor))
    index_route_kernel(const IndexRouteArguments args) {
  using Shared = SharedMemory<Element, kHeadDim>;
  using QueryTile = decltype(Shared::query);
  using KeyTile = cuda::SharedTile<Element, Shared::kKeys, kHeadDim>;
  constexpr int kM = Shared::Tiles::kRowBlocks, kKeys = Shared::kKeys, kQueries = Shared::kQueries;
  auto& shared = *reinterpret_cast<Shared*>(cuda::dynamic_shared_memory());
  const int g = lane_id() / 4, t = lane_id() % 4;
  const int first_of_warp = warp_id() * Shared::kRowsPerWarp;
  const float empty = args.reduction == IndexReduction::kMax ? -INFINITY : 0.0f;
  const bool is_short = args.list_length <= kLaneList;
#pragma unroll 1
  for (uint32_t work = blockIdx.x; work < args.num_work; work += gridDim.x) {
    // The last queries first: they see most.
    const uint32_t units = args.num_work / args.num_tiles;
    const int32_t first_row = static_cast<int32_t>((args.num_tiles - 1 - work / units) * kQueries);
    const uint32_t choice = work % units % args.num_choices, batch_idx = work % units / args.num_choices;
    const int32_t num_rows = min(kQueries, args.query_len - first_row);
    const int32_t block_end = args.list_length == 0 ? 0 : candidate_end(args, first_row + num_rows - 1);
    // Of the warp's first row; rows that are not there may be anywhere.
    const int32_t warp_position = position_of(args, first_row + first_of_warp);
#pragma unroll 1
    for (int32_t group = args.force_first; group < block_end; group += Shared::kColumns) {
      const int32_t group_end = min(group + Shared::kColumns, block_end);
      const int32_t end_of_keys = static_cast<int32_t>(
          min(static_cast<int64_t>(group_end) * args.block_size, static_cast<int64_t>(args.key_len)));
#pragma unroll 1
      for (int32_t h = 0; h < args.heads_per_choice; ++h) {
        const int32_t head = static_cast<int32_t>(choice) * args.heads_per_choice + h;
        const Element* keys = args.index_key.at<Element>(batch_idx, head / args.heads_per_key_head, 0);
        const int64_t key_stride = args.index_key.strides[2];
        // Every warp is done with the tiles before they are overwritten.
        __syncthreads();
        // The queries of a single head stay.
        if (args.heads_per_choice > 1 || group == args.force_first) {
          copy_rows(shared.query, args.index_query.at<Element>(batch_idx, head, first_row), args.index_query.strides[2],
                    num_rows, args.head_dim);
          for (int row = static_cast<int>(threadIdx.x); row < kQueries; row += kThreads) {
            const bool is_weighted = args.weights.data != nullptr && row < num_rows;
            shared.weights[row] = is_weighted ? *args.weights.at<float>(batch_idx, head, first_row + row) : 1.0f;
          }
        }
        int32_t first = group * args.block_size, buffer = 0;
        copy_rows(shared.key[0], keys + first * key_stride, key_stride,
                  min(kKeys, min(args.block_size, end_of_keys - first)), args.head_dim);
        cuda::copy_async_commit();
#pragma unroll 1
        for (int32_t column = 0; column < group_end - group; ++column) {
          const int32_t first_of_block = first;
          const int32_t end_key = first + min(args.block_size, end_of_keys - first);
          float joined[2 * kM];
#pragma unroll
          for (int r = 0; r < 2 * kM; ++r) joined[r] = empty;
#pragma unroll 1
          while (first < end_key) {
            cuda::copy_async_wait<0>();
            // Publishes the tile to every warp, and says that every warp is done with the other one.
            __syncthreads();
            const int32_t count = min(kKeys, end_key - first), next = first + count;
            if (next < end_of_keys) {
              const int32_t next_of_block = next < end_key ? end_key - next : args.block_size;
              copy_rows(shared.key[buffer ^ 1], keys + next * key_stride, key_stride,
                        min(kKeys, min(next_of_block, end_of_keys - next)), args.head_dim);
            }
            cuda::copy_async_commit();
            // Step 2.
            float products[kM][kKeys / 8][4];
            cuda::fill(products, 0.0f);
            if constexpr (std::is_same_v<Element, float>) {
              cuda::multiply_by_rows(products, shared.query, first_of_warp, shared.key[buffer], 0, count,
                                     args.head_dim);
            } else {
              if (count == kKeys && args.head_dim == kHeadDim) {
                cuda::multiply_all_rows<QueryTile, KeyTile, Element>(
                    products, cuda::left_operand(shared.query, first_of_warp),
                    cuda::right_operand_by_rows(shared.key[0], 0), 0,
                    static_cast<uint32_t>(buffer) * static_cast<uint32_t>(sizeof(KeyTile)));
              } else {
                multiply_some_rows(products, shared.query, first_of_warp, shared.key[buffer], count, args.head_dim);
              }
            }
            const bool is_open = count == kKeys && next - 1 <= warp_position;
            if (!is_open) hide_keys(args, first, end_key, warp_position, empty, products);
            if (args.reduction == IndexReduction::kMax) {
              join<IndexReduction::kMax>(products, joined);
            } else if (args.reduction == IndexReduction::kMean) {
              join<IndexReduction::kMean>(products, joined);
            } else {
              join<IndexReduction::kReluSum>(products, joined);
            }
            first = next;
            buffer ^= 1;
          }
          // Step 4.
#pragma unroll
          for (int r = 0; r < 2 * kM; ++r) {
            const int row = first_of_warp + r * 8 + g;
            float score;
            if (args.reduction == IndexReduction::kMax) {
              score = cuda::max_of_row(joined[r]);
            } else {
              score = cuda::sum_of_row(joined[r]);
              if (args.reduction == IndexReduction::kMean) {
                const int32_t seen = min(position_of_sums(args, warp_position, r) + 1, end_key) - first_of_block;
                score /= static_cast<float>(max(seen, 1));
              } else {
                score *= shared.weights[row];
              }
            }
            if (t == 0) shared.scores[row][column] = h > 0 ? score + shared.scores[row][column] : score;
          }
        }
      }
      // Publishes the scores to their rows' lanes.
      __syncwarp();
      // Step 5.
      const int own_row = own_row_of<Shared>(num_rows);
      if (own_row >= 0) {
        const int32_t row = first_row + own_row;
        const int32_t count = min(group_end, candidate_end(args, row)) - group;
        if (is_short) {
          const int64_t list = first_list<kQueries>(args) + own_row;
          select<kQueries, Shared::kColumns>(shared.scores[own_row], group, count, group == args.force_first,
                                             args.list_length, args.list_scores + list, args.list_blocks + list);
        } else {
          select_long(args, shared.scores[own_row], group, count,
                      args.list_scores + first_list<kQueries>(args) + own_row * args.list_length,
                      args.block_indices.at<int32_t>(batch_idx, choice, row) + args.force_first);
        }
      }
      // The scores have been read before the next group's are written.
      __syncwarp();
    }
    // Step 6.
    const int own_row = own_row_of<Shared>(num_rows);
    if (own_row >= 0) {
      write_row<kQueries>(args, args.list_blocks + (is_short ? first_list<kQueries>(args) + own_row : 0),
                          args.block_indices.at<int32_t>(batch_idx, choice, first_row + own_row), first_row + own_row);
    }
  }
}

namespace {

struct Plan {
  uint32_t num_tiles;
  uint32_t num_work;
  int64_t thread_blocks;
  int64_t list_entries;  // of all thread blocks
};

Plan plan_of(const IndexRouteParams& params) {
  const bool is_float32 = params.dtype == Dtype::kFloat32;
  const int64_t queries = Config::kWarps * 16 * Config::row_blocks(is_float32 ? 4 : 2, params.head_dim);
  const int64_t tiles = divide_up(params.query_len, queries);
  const int64_t work = tiles * params.batch_size * params.num_choices;
  require(work <= INT32_MAX, "index_route: more than 2^31 - 1 tiles of queries");
  const int64_t entries = queries * params.list_length;
  const int64_t most = std::clamp<int64_t>(workspace_budget(Config::kListBudget) / std::max<int64_t>(entries * 8, 1), 1,
                                           Config::kMaxThreadBlocks);
  const int64_t thread_blocks = std::min(work, most);
  return {static_cast<uint32_t>(tiles), static_cast<uint32_t>(work), thread_blocks, thread_blocks * entries};
}

void cut_lists(const IndexRouteParams& params, const Plan& plan, WorkspaceCutter& cutter, IndexRouteArguments& args) {
  args.list_scores = cutter.take<float>(plan.list_entries);
  args.list_blocks = params.list_length <= kLaneList ? cutter.take<int32_t>(plan.list_entries) : nullptr;
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
  IndexRouteArguments args{};
  cut_lists(params, plan_of(params), cutter, args);
  return cutter.used();
}

void index_route_cuda(const IndexRouteParams& params, const CudaWorkspace& workspace, const CudaPlace& place) {
  const Plan plan = plan_of(params);
  if (plan.num_work == 0) return;
  require(workspace.bytes >= index_route_workspace_bytes(params, place),
          "index_route: the workspace is smaller than index_route_workspace_bytes says");
  require(params.key_len <= INT32_MAX - Config::kMaxKeys && params.query_len <= INT32_MAX &&
              params.top_k <= INT32_MAX && params.num_index_heads <= INT32_MAX,
          "index_route: more than 2^31 - 1 tokens or heads");
  const DeviceGuard guard(place.device);
  const StageRange range("indexer.route");
  WorkspaceCutter cutter(workspace.data);
  IndexRouteArguments args{};
  args.index_query = params.index_query;
  args.index_key = params.index_key;
  args.weights = params.weights;
  args.block_indices = params.block_indices;
  cut_lists(params, plan, cutter, args);
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
