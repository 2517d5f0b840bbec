// The choice of blocks on CUDA: scores of query tiles against centroid tiles, kept on chip, and the best top_k of each
// row.
//
//   score_ij = dot(query_i, centroid_j)                              never written to global memory
//   choice_i = the first force_first blocks, where causal the newest force_last up to the own, and the best of the others
//
// Who owns what: a thread block owns kQueries neighbouring queries of one head and walks the centroids in tiles of
// kCentroids; each of its warps owns kRowsPerWarp rows, their scores and their lists. Steps per tile of centroids:
//   1. the tile arrives in shared memory, the first one before the loop, others while step 3 selects;
//   2. each warp multiplies its rows with it and leaves the scores in shared memory, in the rows' order;
//   3. a lane takes a row and marks the scores that beat the worst one kept, then enters what it marked, from the lowest
//      block on, into the row's sorted list, which it holds in registers meanwhile. Lists longer than kMaxLaneList: a
//      group of 32 lanes takes a row, a score each, and enters the scores that beat the worst, one at a time;
//   last:
//   4. forced blocks, which are never scored, ascending order, -1 for the rest, written out.
// Numerics: scores must rank as float32 does. A 16-bit query times a centroid cut into kParts 16-bit numbers (three of
// bfloat16, two of float16) sums products that are exact in float32; float32 takes plain multiply-adds. A score that
// comes out NaN is computed once more in float32 from the uncut centroid, since inf times a part may be NaN where inf
// times the whole is inf; what is NaN then ranks as +inf. Ties: scores rank by value, then by lower block number. Lanes
// with rows of their own see blocks in ascending order, so that only a greater score beats one that is kept; there an
// empty entry's score is NaN, which is no score's better. Groups compare both, a total order, so that the order of
// insertion does not matter; there empty entries are (-inf, no block), which every block beats.
// Determinism: a row's choice depends on its own row and the centroids alone.
#pragma once

#include "../common/checks.h"
#include "../cuda/limits.h"
#include "moba_route_filter_cuda.cuh"

namespace topgather {

template <typename Element, int kHeadDim>
struct RouteSharedMemory {
  using Tiles = MobaRouteTiles<Element, kHeadDim>;
  static constexpr int kRowsPerWarp = Tiles::kRowBlocks * 16;
  static constexpr int kQueries = Tiles::kWarps * kRowsPerWarp;
  static constexpr int kThreads = Tiles::kWarps * cuda::kLanes;
  static constexpr int kCentroids = Tiles::kCentroids;

  cuda::SharedTile<Element, kQueries, kHeadDim> query;
  cuda::SharedTile<Element, kCentroidParts<Element> * kCentroids, kHeadDim> centroids;
  float scores[kQueries][kCentroids + 1];
  int32_t num_visible[kQueries];  // blocks the row may choose by score; -1: the row is not there
  int32_t own_block[kQueries];    // -1: none
  // Behind it: list scores [kQueries, list_length] float32, list blocks likewise int32.
  static constexpr size_t bytes_with_lists(int64_t list_length) {
    return sizeof(RouteSharedMemory) + static_cast<size_t>(kQueries * list_length) * 8;
  }
};

namespace route {

constexpr int32_t kMaxLaneList = 16;
constexpr uint32_t kTilesPerRerun = MobaRouteFilterConfig::kTilesPerRerun;
// Lanes that share a row while they write its choices.
constexpr int kWriters = 8;

struct Lists {
  float* scores;    // [row, length] float32, descending
  int32_t* blocks;  // [row, length] int32
  int32_t length;
};

// Of lanes with rows of their own: in shared memory, neighbouring rows side by side.
struct LaneLists {
  float* scores;    // [length, row] float32, descending
  int32_t* blocks;  // [length, row] int32
  int32_t length;
};

// Step 2.
template <typename Element, int kHeadDim>
__device__ __forceinline__ void score_tile(RouteSharedMemory<Element, kHeadDim>& shared, int head_dim) {
  using Shared = RouteSharedMemory<Element, kHeadDim>;
  using Tiles = typename Shared::Tiles;
  const int first_row = warp_id() * Shared::kRowsPerWarp;
  float scores[Tiles::kRowBlocks][Shared::kCentroids / 8][4];
  cuda::fill(scores, 0.0f);
  // Centroids that are not there are zeros. Where the depth is the tile's, the product has no branches.
  if (head_dim == kHeadDim) {
    cuda::multiply_by_rows<kCentroidParts<Element>>(scores, shared.query, first_row, shared.centroids, 0,
                                                    Shared::kCentroids, kHeadDim, Shared::kCentroids);
  } else {
    cuda::multiply_by_rows<kCentroidParts<Element>>(scores, shared.query, first_row, shared.centroids, 0,
                                                    Shared::kCentroids, head_dim, Shared::kCentroids);
  }
  const int g = lane_id() / 4, t = lane_id() % 4;
#pragma unroll
  for (int m = 0; m < Tiles::kRowBlocks; ++m) {
#pragma unroll
    for (int n = 0; n < Shared::kCentroids / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        shared.scores[first_row + m * 16 + (e / 2) * 8 + g][n * 8 + 2 * t + e % 2] = scores[m][n][e];
      }
    }
  }
}

// Step 3's insertion by the warp's lanes together. From the list's end to its start: an entry the candidate beats makes
// room by moving down one.
__device__ __forceinline__ void insert(const Lists& lists, int row, float score, int32_t block) {
  float* row_scores = lists.scores + static_cast<int64_t>(row) * lists.length;
  int32_t* row_blocks = lists.blocks + static_cast<int64_t>(row) * lists.length;
  for (int first = (lists.length - 1) / kLanes * kLanes; first >= 0; first -= kLanes) {
    const int rank = first + lane_id();
    float new_score = score;
    int32_t new_block = block;
    bool moves = false;
    if (rank < lists.length) {
      moves = beats(score, block, row_scores[rank], row_blocks[rank]);
      if (moves && rank > 0 && beats(score, block, row_scores[rank - 1], row_blocks[rank - 1])) {
        new_score = row_scores[rank - 1];
        new_block = row_blocks[rank - 1];
      }
    }
    // All lanes have read before any of them writes.
    __syncwarp();
    if (moves) {
      row_scores[rank] = new_score;
      row_blocks[rank] = new_block;
    }
    // Publishes the moved entries to the warp.
    __syncwarp();
  }
}

// The float32 score, for where cut products do not tell inf from NaN: in order, over the columns that tiles have, behind
// whose rows there are zeros. A query that is not finite may need it of every block, so that it takes 16 bytes at a time.
template <typename Shared>
__device__ __forceinline__ float plain_score(Shared& shared, int row, const float* centroid, int num_chunks) {
  using Tile = decltype(shared.query);
  using Element = std::remove_reference_t<decltype(shared.query.elements[0])>;
  float sum = 0.0f;
#pragma unroll 1
  for (int chunk = 0; chunk < num_chunks; ++chunk) {
    float values[Tile::kPerChunk];
    cuda::unpack_chunk<Element>(*reinterpret_cast<const uint4*>(shared.query.chunk(row, chunk)), values);
    const auto* others = reinterpret_cast<const float4*>(centroid + chunk * Tile::kPerChunk);
#pragma unroll
    for (int i = 0; i < Tile::kPerChunk / 4; ++i) {
      const float4 other = others[i];
      sum = fmaf(values[4 * i], other.x, sum);
      sum = fmaf(values[4 * i + 1], other.y, sum);
      sum = fmaf(values[4 * i + 2], other.z, sum);
      sum = fmaf(values[4 * i + 3], other.w, sum);
    }
  }
  return sum;
}

// What a score is that came out NaN.
template <typename Shared>
__device__ __forceinline__ float repaired_score(const RouteArguments& args, Shared& shared, const float* centroids,
                                                int row, int column, int num_chunks) {
  const float score = plain_score(shared, row, centroids + column * args.row_elements, num_chunks);
  return isnan(score) ? INFINITY : score;
}

// Step 3 by a lane a row, for lists of up to kKept entries. They stand at the end of the registers; those before them
// hold +inf, which nothing beats. num_chunks: of a row.
template <int kKept, typename Shared>
__device__ __forceinline__ void select_by_lane(const RouteArguments& args, Shared& shared, const LaneLists& lists,
                                               const float* centroids, int32_t first_block, int count, int num_chunks) {
  static_assert(Shared::kCentroids == 32, "a bit a centroid");
  if (lane_id() >= Shared::kRowsPerWarp) return;  // no barrier follows for the warp
  const int row = warp_id() * Shared::kRowsPerWarp + lane_id();
  const int num_visible = min(count, shared.num_visible[row] - first_block);
  if (num_visible <= 0) return;
  const int padding = kKept - lists.length;
  float* kept_scores = lists.scores + row - padding * Shared::kQueries;
  int32_t* kept_blocks = lists.blocks + row - padding * Shared::kQueries;
  float scores[kKept];
  int32_t blocks[kKept];
#pragma unroll
  for (int r = 0; r < kKept; ++r) {
    scores[r] = r < padding ? INFINITY : kept_scores[r * Shared::kQueries];
    blocks[r] = r < padding ? kNoBlock : kept_blocks[r * Shared::kQueries];
  }
  // NaN, of a score or of an empty entry, is not less or equal.
  uint32_t marked = 0;
#pragma unroll
  for (int column = 0; column < Shared::kCentroids; ++column) {
    marked |= shared.scores[row][column] <= scores[kKept - 1] ? 0u : 1u << column;
  }
  marked &= ~0u >> (Shared::kCentroids - num_visible);
  if (marked == 0) return;
#pragma unroll 1
  while (marked != 0) {
    const int column = __ffs(static_cast<int>(marked)) - 1;
    marked &= marked - 1;
    float score = shared.scores[row][column];
    if (isnan(score)) {
      // Of no use where the list is full of what ranks as +inf: a query of NaN alone takes the first blocks it sees.
      if (scores[kKept - 1] == INFINITY) break;
      score = repaired_score(args, shared, centroids, row, column, num_chunks);
    }
    const int32_t block = first_block + column;
#pragma unroll
    for (int r = kKept - 1; r > 0; --r) {
      const bool beats_this = !(score <= scores[r]), beats_one_before = !(score <= scores[r - 1]);
      scores[r] = beats_one_before ? scores[r - 1] : (beats_this ? score : scores[r]);
      blocks[r] = beats_one_before ? blocks[r - 1] : (beats_this ? block : blocks[r]);
    }
    const bool beats_all = !(score <= scores[0]);
    scores[0] = beats_all ? score : scores[0];
    blocks[0] = beats_all ? block : blocks[0];
  }
#pragma unroll
  for (int r = 0; r < kKept; ++r) {
    if (r < padding) continue;
    kept_scores[r * Shared::kQueries] = scores[r];
    kept_blocks[r * Shared::kQueries] = blocks[r];
  }
}

// Step 3 by the warp's lanes together, row by row.
template <typename Shared>
__device__ __forceinline__ void select_by_warp(const RouteArguments& args, Shared& shared, const Lists& lists,
                                               const float* centroids, int32_t first_block, int count, int num_chunks) {
  static_assert(Shared::kCentroids == kLanes, "a lane a centroid");
  const int column = lane_id();
  const int32_t block = first_block + column;
#pragma unroll 1
  for (int i = 0; i < Shared::kRowsPerWarp; ++i) {
    const int row = warp_id() * Shared::kRowsPerWarp + i;
    const float* last_score = lists.scores + static_cast<int64_t>(row + 1) * lists.length - 1;
    // Later blocks beat no list that is full of +inf.
    const bool is_candidate = column < count && block < shared.num_visible[row] && *last_score < INFINITY;
    const int32_t* last_block = lists.blocks + static_cast<int64_t>(row + 1) * lists.length - 1;
    float score = shared.scores[row][column];
    if (is_candidate && isnan(score)) score = repaired_score(args, shared, centroids, row, column, num_chunks);
    bool passes = is_candidate && beats(score, block, *last_score, *last_block);
    unsigned passing = __ballot_sync(kAllLanes, passes);
    while (passing != 0) {
      const int source = __ffs(static_cast<int>(passing)) - 1;
      const float candidate_score = __shfl_sync(kAllLanes, score, source);
      insert(lists, row, candidate_score, first_block + source);
      passes = passes && source != column && beats(score, block, *last_score, *last_block);
      passing = __ballot_sync(kAllLanes, passes);
    }
  }
}

// Step 4 for one row: members place entries by how many stand before them.
__device__ __forceinline__ void write_choices(const Lists& lists, int row, int member, const ForcedBlocks& forced,
                                              int32_t top_k, int32_t* choices) {
  const int32_t* blocks = lists.blocks + static_cast<int64_t>(row) * lists.length;
  int32_t num_kept = forced.num_first;
  for (int i = 0; i < lists.length; ++i) num_kept += blocks[i] != kNoBlock ? 1 : 0;
  for (int i = member; i < lists.length; i += kWriters) {
    const int32_t block = blocks[i];
    if (block == kNoBlock) continue;
    int32_t position = forced.num_first;
    for (int other = 0; other < lists.length; ++other) position += blocks[other] < block ? 1 : 0;
    choices[position] = forced.num_first + block;
  }
  for (int slot = member; slot < forced.num_first; slot += kWriters) choices[slot] = slot;
  const int32_t num_chosen = num_kept + forced.num_last;
  for (int slot = num_kept + member; slot < num_chosen; slot += kWriters) {
    choices[slot] = forced.own_block + 1 - (num_chosen - slot);
  }
  for (int slot = num_chosen + member; slot < top_k; slot += kWriters) choices[slot] = -1;
}

// Step 4 for the lane's row.
template <int kKept, typename Shared>
__device__ __forceinline__ void write_choices_by_lane(const LaneLists& lists, int row, const ForcedBlocks& forced,
                                                      int32_t top_k, int32_t* choices) {
  int32_t blocks[kKept];
#pragma unroll
  for (int r = 0; r < kKept; ++r) {
    blocks[r] = r < lists.length ? lists.blocks[r * Shared::kQueries + row] : kNoBlock;
  }
  write_blocks(blocks, forced, top_k, choices);
}

// Whether a row of a tile failed before moba_route_filter.
__device__ __forceinline__ bool has_failed(const uint32_t* words, int num_words) {
  uint32_t all = 0;
  for (int i = 0; i < num_words; ++i) all |= words[i];
  return all != 0;
}

// Rows that did not fail have been done.
template <typename Shared>
__device__ __forceinline__ void hide_rows_but(const uint32_t* failed, Shared& shared) {
  for (int row = threadIdx.x; row < Shared::kQueries; row += Shared::kThreads) {  // as place_rows goes
    if ((failed[row / kLanes] >> (row % kLanes) & 1) == 0) shared.num_visible[row] = -1;
  }
}

// Step 4 where there is nothing to score: `count` blocks behind the first ones are chosen, all that there are, or none.
__device__ __forceinline__ void write_all(int32_t count, int member, const ForcedBlocks& forced, int32_t top_k,
                                          int32_t* choices) {
  const int32_t first_last = forced.num_first + count, num_chosen = first_last + forced.num_last;
  for (int slot = member; slot < top_k; slot += kWriters) {
    choices[slot] = slot < first_last ? slot : (slot < num_chosen ? forced.own_block + 1 - (num_chosen - slot) : -1);
  }
}

}  // namespace route

template <typename Element, int kHeadDim>
__global__ void __launch_bounds__(RouteSharedMemory<Element, kHeadDim>::kThreads,
                                  MobaRouteTiles<Element, kHeadDim>::kBlocksPerProcessor)
    moba_route(const RouteArguments args) {
  using Shared = RouteSharedMemory<Element, kHeadDim>;
  Shared& shared = *reinterpret_cast<Shared*>(cuda::dynamic_shared_memory());
  const MobaGeometry& geometry = args.geometry;
  constexpr int kParts = kCentroidParts<Element>;
  const int64_t num_list_entries = static_cast<int64_t>(Shared::kQueries) * args.list_length;
  float* shared_lists = reinterpret_cast<float*>(&shared + 1);
  int32_t* shared_blocks = reinterpret_cast<int32_t*>(shared_lists + num_list_entries);
  const route::LaneLists lane_lists{shared_lists, shared_blocks, args.list_length};
  const route::Lists lists{args.are_lists_shared ? shared_lists : args.list_scores + blockIdx.x * num_list_entries,
                           args.are_lists_shared ? shared_blocks : args.list_blocks + blockIdx.x * num_list_entries,
                           args.list_length};
  constexpr int kPerChunk = 16 / static_cast<int>(sizeof(Element));
  const int row_chunks = static_cast<int>(divide_up(args.head_dim, kPerChunk));
  const int used_chunks = static_cast<int>(divide_up(args.head_dim, 16)) * 16 / kPerChunk;

  // A rerun looks through kTilesPerRerun neighbouring tiles for rows that failed, most often in vain.
  const bool is_rerun = args.failed != nullptr;
  const uint32_t first_work = is_rerun ? blockIdx.x * route::kTilesPerRerun : blockIdx.x;
  const uint32_t end_work = is_rerun ? min(args.num_work, first_work + route::kTilesPerRerun) : args.num_work;
  if (is_rerun) {
    const uint32_t* words = args.failed + first_work * Shared::Tiles::kWarps;
    const int num_words = static_cast<int>(end_work - first_work) * Shared::Tiles::kWarps;
    bool found = false;
    for (int i = static_cast<int>(threadIdx.x); i < num_words; i += Shared::kThreads) found = found || words[i] != 0;
    if (__syncthreads_or(found ? 1 : 0) == 0) return;  // the whole thread block
  }
  for (uint32_t work = first_work; work < end_work; work += is_rerun ? 1 : gridDim.x) {
    if (is_rerun && !route::has_failed(args.failed + work * Shared::Tiles::kWarps, Shared::Tiles::kWarps)) continue;
    const route::TileOfQueries tile = route::tile_of_queries(args, work, Shared::kQueries);
    if (!tile.exists) continue;
    const SequenceOnDevice& sequence = tile.sequence;
    const int64_t first_query = tile.first_query, head = tile.head;
    const Element* query_rows = args.query.at<Element>(tile.batch_idx, head, sequence.first_query + first_query);

    const int32_t max_visible = route::place_rows(args, sequence, first_query, shared);
    if (is_rerun) route::hide_rows_but(args.failed + work * Shared::Tiles::kWarps, shared);
    const bool needs_scores = args.list_length > 0 && max_visible > args.list_length;
    if (needs_scores) {
      const int64_t unit_block = tile.unit_in_step * geometry.num_blocks + sequence.first_block + args.force_first;
      // Step 1: part by part, each part's rows together.
      const auto copy_centroids = [&](int32_t first_block) {
        const Element* parts =
            static_cast<const Element*>(args.parts) + (unit_block + first_block) * kParts * args.row_elements;
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
          route::copy_rows<Shared::kCentroids, Shared::kThreads>(
              shared.centroids, part * Shared::kCentroids, parts + static_cast<int64_t>(part) * args.row_elements,
              static_cast<int64_t>(kParts) * args.row_elements, max_visible - first_block, used_chunks, used_chunks);
        }
        cuda::copy_async_commit();
      };
      route::copy_rows<Shared::kQueries, Shared::kThreads>(shared.query, 0, query_rows, args.query.strides[2],
                                                           sequence.num_queries - first_query, used_chunks, row_chunks);
      copy_centroids(0);
      for (int64_t i = threadIdx.x; i < num_list_entries; i += Shared::kThreads) {
        lists.scores[i] = args.has_lane_lists ? NAN : -INFINITY;
        lists.blocks[i] = route::kNoBlock;
      }
      for (int32_t first_block = 0; first_block < max_visible; first_block += Shared::kCentroids) {
        const int count =
            max_visible - first_block < Shared::kCentroids ? max_visible - first_block : Shared::kCentroids;
        cuda::copy_async_wait<0>();
        // Publishes centroids, and the first time queries, lists and what rows see, to all warps.
        __syncthreads();
        route::score_tile<Element, kHeadDim>(shared, args.head_dim);
        // Tells all warps that the centroids have been used and may be overwritten, and publishes each warp's scores to
        // its lanes.
        __syncthreads();
        if (first_block + Shared::kCentroids < max_visible) copy_centroids(first_block + Shared::kCentroids);
        const float* centroids = args.centroids + (unit_block + first_block) * args.row_elements;
        if (!args.has_lane_lists) {
          route::select_by_warp(args, shared, lists, centroids, first_block, count, used_chunks);
        } else if (args.list_length <= 8) {
          route::select_by_lane<8>(args, shared, lane_lists, centroids, first_block, count, used_chunks);
        } else {
          route::select_by_lane<route::kMaxLaneList>(args, shared, lane_lists, centroids, first_block, count,
                                                     used_chunks);
        }
      }
    } else {
      // Publishes what the rows see to all warps.
      __syncthreads();
    }
    const bool are_written_by_lanes = needs_scores && args.has_lane_lists;
    const int member = cuda::lane_id() % route::kWriters;
    for (int first = 0; !are_written_by_lanes && first < Shared::kRowsPerWarp;
         first += cuda::kLanes / route::kWriters) {
      const int row = cuda::warp_id() * Shared::kRowsPerWarp + first + cuda::lane_id() / route::kWriters;
      const int32_t visible = shared.num_visible[row];
      if (visible < 0) continue;
      int32_t* choices = args.block_indices.at<int32_t>(tile.batch_idx, head, sequence.first_query + first_query + row);
      const route::ForcedBlocks forced = route::forced_blocks(args, sequence, shared.own_block[row]);
      if (needs_scores) {
        route::write_choices(lists, row, member, forced, geometry.top_k, choices);
      } else {
        route::write_all(min(visible, args.list_length), member, forced, geometry.top_k, choices);
      }
    }
    if (are_written_by_lanes && cuda::lane_id() < Shared::kRowsPerWarp) {
      const int row = cuda::warp_id() * Shared::kRowsPerWarp + cuda::lane_id();
      if (shared.num_visible[row] >= 0) {
        int32_t* choices =
            args.block_indices.at<int32_t>(tile.batch_idx, head, sequence.first_query + first_query + row);
        const route::ForcedBlocks forced = route::forced_blocks(args, sequence, shared.own_block[row]);
        if (args.list_length <= 8) {
          route::write_choices_by_lane<8, Shared>(lane_lists, row, forced, geometry.top_k, choices);
        } else {
          route::write_choices_by_lane<route::kMaxLaneList, Shared>(lane_lists, row, forced, geometry.top_k, choices);
        }
      }
    }
    // Tells all warps that lists and rows have been used and may be overwritten by the next tile's.
    __syncthreads();
  }
}

// What a launch of the kernel for one element type and head dimension needs to know of it.
struct RouteKernel {
  Dtype dtype;
  int64_t max_head_dim;
  int64_t threads;
  int64_t queries_per_tile;
  size_t (*shared_bytes)(int64_t list_length);
  void (*launch)(const RouteArguments& args, int64_t num_thread_blocks, size_t shared_bytes, cudaStream_t stream);
  void (*launch_filter)(const RouteArguments& args, cudaStream_t stream);  // null: there is none
  int64_t filter_shared_bytes;
};

template <typename Element, int kHeadDim>
constexpr void (*filter_launcher())(const RouteArguments& args, cudaStream_t stream) {
  if constexpr (route::kHasFilter<Element, kHeadDim>) {
    return [](const RouteArguments& args, cudaStream_t stream) {
      using Shared = RouteFilterSharedMemory<Element, kHeadDim>;
      cuda::launch(moba_route_filter<Element, kHeadDim>,
                   {dim3(args.num_work), dim3(Shared::kThreads), sizeof(Shared), stream}, args);
    };
  } else {
    return nullptr;
  }
}

template <typename Element, int kHeadDim>
constexpr RouteKernel route_kernel() {
  using Shared = RouteSharedMemory<Element, kHeadDim>;
  return {kDtypeOf<Element>,
          kHeadDim,
          Shared::kThreads,
          Shared::kQueries,
          &Shared::bytes_with_lists,
          [](const RouteArguments& args, int64_t num_thread_blocks, size_t shared_bytes, cudaStream_t stream) {
            cuda::launch(moba_route<Element, kHeadDim>,
                         {dim3(static_cast<unsigned>(num_thread_blocks)), dim3(Shared::kThreads), shared_bytes, stream},
                         args);
          },
          filter_launcher<Element, kHeadDim>(),
          route::kHasFilter<Element, kHeadDim> ? int64_t{sizeof(RouteFilterSharedMemory<Element, kHeadDim>)} : 0};
}

using RouteKernels = RouteKernel[3];
template <typename Element>
inline constexpr RouteKernels kRouteKernels = {route_kernel<Element, 64>(), route_kernel<Element, 128>(),
                                               route_kernel<Element, 256>()};

// An element type's kernels, ascending in head_dim. Each of the three is compiled in a file of its own, which the build
// writes (tools/cuda_instances.cmake).
const RouteKernels& route_kernels(float);
const RouteKernels& route_kernels(BFloat16);
const RouteKernels& route_kernels(Float16);

}  // namespace topgather
