// The choice of blocks where there are many: one product of 16-bit numbers for most scores, float32 for the few that decide.
//
//   upper_ij = dot(query_i, high_j) + |query_i| bound_j        >= score_ij = dot(query_i, centroid_j)
//
// high_j is centroid_j rounded to the element type. Queries have that type already, so that by Cauchy and Schwarz
//   |score_ij - dot(query_i, high_j)| <= |query_i| |centroid_j - high_j|,
// and a float32 sum of D <= 128 terms behind one that starts from the bound, however it is ordered and whether it rounds
// or truncates, is off by less than 2^-14 |query_i| |centroid_j|. moba_split_centroids computes
//   bound_j = (1 + 2^-9) |centroid_j - high_j| + 2^-13 |centroid_j| + 2^-58,
// and the norm of a query is taken as (1 + 2^-9) |query_i| + 2^-58: what is beyond the two errors covers the rounding of
// norms, of the bound and of what is made of it, and squares that underflow.
//
// A row keeps the kListLength blocks of the greatest upper bounds, each as one float: the bound with the block's number
// in its lowest bits. Read with those bits all ones or all zeros it is the bound rounded up (top) or down (bottom), and
// bottom - 2 |query_i| bound_j is not above score_ij. Blocks left out have no upper bound above the last entry's top.
// When all blocks have been seen, of `length` to choose:
//   chosen      an entry whose lower bound is above the top of entry number `length`: fewer than `length` scores can be
//               above its own;
//   not chosen  an entry, or a block left out, whose top is below the second least lower bound of the first length + 1
//               entries: `length` scores are above its own (one entry's bound may be of little use);
//   open        the others. They get float32 scores, and the best of them, ties going to the lower block, fill up.
// Where blocks left out are open, the row fails. So it does where a number is not finite or so large that a sum may
// overflow. moba_route then does the rows that failed in full.
//
// Who owns what: as in moba_route_cuda.cuh, for 128 queries; lists stay in registers. Steps per tile of 32 centroids:
//   1. high parts and bounds arrive in one of two tiles of shared memory, while the tile before is at work;
//   2. each warp multiplies its 32 rows with them and leaves the upper bounds in shared memory;
//   3. a lane takes a row, marks the upper bounds above its last entry and enters them;
//   last:
//   4. open blocks of a warp stand in a queue; 8 lanes take one and compute its score; a lane chooses for its row and
//      writes; rows that failed are noted, a word a warp.
// Determinism: whether a row fails, and its choice, depend on its own row and the centroids alone.
#pragma once

#include "../cuda/tile_products.cuh"
#include "moba_route_rows_cuda.cuh"

namespace topgather {

template <typename Element, int kHeadDim>
struct RouteFilterSharedMemory {
  using Tiles = MobaRouteTiles<Element, kHeadDim>;
  static constexpr int kRowsPerWarp = 32;
  static constexpr int kQueries = Tiles::kWarps * kRowsPerWarp;
  static constexpr int kThreads = Tiles::kWarps * cuda::kLanes;
  static constexpr int kCentroids = 32;
  // Rows side by side differ by four banks: lanes that read 16 bytes of a row each meet in none.
  static constexpr int kScoreStride = kCentroids + 4;

  cuda::SharedTile<Element, kQueries, kHeadDim> query;
  cuda::SharedTile<Element, kCentroids, kHeadDim> centroids[2];
  float scores[kQueries][kScoreStride];  // upper bounds of a tile; then each warp's queue
  float bounds[2][kCentroids];
  int32_t num_visible[kQueries];  // blocks the row may choose by score; -1: the row is not there
  int32_t own_block[kQueries];    // -1: none
};

namespace route {

// 16-bit queries are exact in one part; rows must be as long as the kernel's.
template <typename Element, int kHeadDim>
inline constexpr bool kHasFilter = !std::is_same_v<Element, float> && kHeadDim <= 128;

constexpr int kFilterList = MobaRouteFilterConfig::kListLength;
constexpr float kNormSlack = 1.0f + 0x1p-9f;
constexpr float kSumError = 0x1p-13f;
constexpr float kTinyNorm = 0x1p-58f;
constexpr float kLargeNorm = 0x1p60f;  // sums of products of two such are finite

// A block whose score is wanted; then the score.
struct OpenBlock {
  int32_t row;  // in the warp
  int32_t block;
};

__device__ __forceinline__ float with_block(float upper, int32_t block, uint32_t block_mask) {
  return __uint_as_float((__float_as_uint(upper) & ~block_mask) | static_cast<uint32_t>(block));
}
__device__ __forceinline__ int32_t block_of(float entry, uint32_t block_mask) {
  return static_cast<int32_t>(__float_as_uint(entry) & block_mask);
}
// The greatest and the least bound that an entry may stand for.
__device__ __forceinline__ float top_of(float entry, uint32_t block_mask) {
  const uint32_t bits = __float_as_uint(entry);
  return __uint_as_float(static_cast<int32_t>(bits) < 0 ? bits & ~block_mask : bits | block_mask);
}
__device__ __forceinline__ float bottom_of(float entry, uint32_t block_mask) {
  const uint32_t bits = __float_as_uint(entry);
  return __uint_as_float(static_cast<int32_t>(bits) < 0 ? bits | block_mask : bits & ~block_mask);
}

// The norm of the lane's row, as the proof takes it.
template <typename Element, typename Shared>
__device__ __forceinline__ float norm_of_row(Shared& shared, int row) {
  using Tile = decltype(shared.query);
  float sum = 0.0f;
#pragma unroll 4
  for (int chunk = 0; chunk < Tile::kChunks; ++chunk) {
    float values[Tile::kPerChunk];
    cuda::unpack_chunk<Element>(*reinterpret_cast<const uint4*>(shared.query.chunk(row, chunk)), values);
#pragma unroll
    for (int i = 0; i < Tile::kPerChunk; ++i) sum = fmaf(values[i], values[i], sum);
  }
  return fmaf(sqrtf(sum), kNormSlack, kTinyNorm);
}

template <typename Element, int kHeadDim>
struct HeldQueries {
  static constexpr int kSteps = MobaRouteTiles<Element, kHeadDim>::kHeldSteps;
  static constexpr int kSpace = kSteps > 0 ? kSteps : 1;
  uint32_t operands[kSpace][2][4];
};

// Step 2. held: the warp's rows as left operands of the first steps of 16 in depth, in registers while all centroids
// come by: every load of theirs is one the others need not wait for. query_rows, centroid_rows: where matrix loads of the
// warp's rows and of the first tile of centroids start. norms: of the rows the lane holds sums of.
template <typename Element, int kHeadDim>
__device__ __forceinline__ void bound_tile(RouteFilterSharedMemory<Element, kHeadDim>& shared, int buffer,
                                           cuda::SharedRow query_rows, cuda::SharedRow centroid_rows,
                                           const HeldQueries<Element, kHeadDim>& held, const float (&norms)[4]) {
  using Shared = RouteFilterSharedMemory<Element, kHeadDim>;
  using Tile = cuda::SharedTile<Element, Shared::kCentroids, kHeadDim>;
  const int first_row = warp_id() * Shared::kRowsPerWarp;
  const int g = lane_id() / 4, t = lane_id() % 4;
  float sums[2][Shared::kCentroids / 8][4];
#pragma unroll
  for (int n = 0; n < Shared::kCentroids / 8; ++n) {
    const float2 bound = *reinterpret_cast<const float2*>(&shared.bounds[buffer][n * 8 + 2 * t]);
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int e = 0; e < 4; ++e) sums[m][n][e] = norms[2 * m + e / 2] * (e % 2 == 0 ? bound.x : bound.y);
    }
  }
  const cuda::SharedRow first = cuda::moved(centroid_rows, 0, static_cast<uint32_t>(buffer) * sizeof(Tile));
#pragma unroll
  for (int k = 0; k < kHeadDim / 16; ++k) {
    uint32_t left[2][4];
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      if (k < held.kSteps) {
#pragma unroll
        for (int i = 0; i < 4; ++i) left[m][i] = held.operands[k % held.kSpace][m][i];
      } else {
        cuda::load_matrix_x4(left[m], decltype(shared.query)::further_here(query_rows, k * 2, m * 16, 0));
      }
    }
#pragma unroll
    for (int n = 0; n < Shared::kCentroids / 16; ++n) {
      uint32_t right[4];
      cuda::load_matrix_x4(right, Tile::further_here(first, k * 2, n * 16, 0));
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        cuda::multiply_accumulate<Element>(sums[m][2 * n], left[m], right[0], right[1]);
        cuda::multiply_accumulate<Element>(sums[m][2 * n + 1], left[m], right[2], right[3]);
      }
    }
  }
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int n = 0; n < Shared::kCentroids / 8; ++n) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        *reinterpret_cast<float2*>(&shared.scores[first_row + m * 16 + h * 8 + g][n * 8 + 2 * t]) =
            make_float2(sums[m][n][2 * h], sums[m][n][2 * h + 1]);
      }
    }
  }
}

// Step 3 for the lane's row. kept: descending, -inf where there is none yet. False if a bound is of no use.
__device__ __forceinline__ bool enter_bounds(const float* uppers, float (&kept)[kFilterList], int32_t first_block,
                                             int num_visible, uint32_t block_mask) {
  if (num_visible <= 0) return true;
  uint32_t marked = 0;
#pragma unroll
  for (int column = 0; column < 32; column += 4) {
    const float4 upper = *reinterpret_cast<const float4*>(uppers + column);
    // NaN is not less or equal.
    marked |= upper.x <= kept[kFilterList - 1] ? 0u : 1u << column;
    marked |= upper.y <= kept[kFilterList - 1] ? 0u : 2u << column;
    marked |= upper.z <= kept[kFilterList - 1] ? 0u : 4u << column;
    marked |= upper.w <= kept[kFilterList - 1] ? 0u : 8u << column;
  }
  marked &= ~0u >> (32 - (num_visible < 32 ? num_visible : 32));
  if (marked == 0) return true;
  bool is_finite = true, is_last = false;
  int column = __ffs(static_cast<int>(marked)) - 1;
  float upper = uppers[column];
#pragma unroll 1
  do {
    const float entry = with_block(upper, first_block + column, block_mask);
    is_finite = is_finite && fabsf(upper) < INFINITY;
    // The next one is on its way meanwhile; after the last, the last.
    marked &= marked - 1;
    is_last = marked == 0;
    column = is_last ? column : __ffs(static_cast<int>(marked)) - 1;
    upper = uppers[column];
#pragma unroll
    for (int r = kFilterList - 1; r > 0; --r) kept[r] = fmaxf(kept[r], fminf(kept[r - 1], entry));
    kept[0] = fmaxf(kept[0], entry);
  } while (!is_last);
  return is_finite;
}

// Step 4's scores: 8 lanes a block. In the queue's place: the score's bits in `block`.
template <typename Element, typename Shared>
__device__ __forceinline__ void score_open(Shared& shared, OpenBlock* queue, int num_open, const float* centroids,
                                           int32_t row_elements) {
  using Tile = decltype(shared.query);
  constexpr int kMembers = 8;
  const int member = lane_id() % kMembers;
#pragma unroll 1
  for (int first = 0; first < num_open; first += kLanes / kMembers) {
    const int place = first + lane_id() / kMembers;
    float sum = 0.0f;
    if (place < num_open) {
      const OpenBlock open = queue[place];
      const float* centroid = centroids + static_cast<int64_t>(open.block) * row_elements;
#pragma unroll
      for (int chunk = 0; chunk < Tile::kChunks; chunk += kMembers) {
        float values[Tile::kPerChunk];
        const int row = warp_id() * Shared::kRowsPerWarp + open.row;
        cuda::unpack_chunk<Element>(*reinterpret_cast<const uint4*>(shared.query.chunk(row, chunk + member)), values);
        const auto* others = reinterpret_cast<const float4*>(centroid + (chunk + member) * Tile::kPerChunk);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float4 other = others[i];
          sum = fmaf(values[4 * i], other.x, sum);
          sum = fmaf(values[4 * i + 1], other.y, sum);
          sum = fmaf(values[4 * i + 2], other.z, sum);
          sum = fmaf(values[4 * i + 3], other.w, sum);
        }
      }
    }
    sum = cuda::sum_over_lanes<kMembers>(sum);
    // All lanes have read their blocks; the next ones stand elsewhere.
    __syncwarp();
    if (place < num_open && member == 0) queue[place].row = static_cast<int32_t>(__float_as_uint(sum));
  }
}

// Step 4's choice for the lane's row: a bit an entry. Sets fails where the entries do not tell. All lanes take part.
template <typename Element, typename Shared>
__device__ __forceinline__ uint32_t choose_entries(const RouteArguments& args, Shared& shared,
                                                   const float (&kept)[kFilterList], int32_t num_visible, float norm,
                                                   const float* bounds, const float* centroids, bool& fails) {
  const uint32_t block_mask = args.block_mask;
  const int length = args.list_length;
  const bool is_asked = !fails && num_visible > length;
  float least = INFINITY, second_least = INFINITY;  // of the first length + 1 lower bounds
  float next_top = -INFINITY;
  float lower[kFilterList];
#pragma unroll
  for (int r = 0; r < kFilterList; ++r) {
    lower[r] = -INFINITY;
    if (is_asked && r < num_visible) {
      lower[r] = bottom_of(kept[r], block_mask) - 2.0f * norm * bounds[block_of(kept[r], block_mask)];
    }
    if (r <= length) {
      second_least = fminf(second_least, fmaxf(least, lower[r]));
      least = fminf(least, lower[r]);
    }
    if (r == length) next_top = top_of(kept[r], block_mask);
  }
  uint32_t chosen = 0, open = 0;
#pragma unroll
  for (int r = 0; r < kFilterList; ++r) {
    if (!is_asked || r >= num_visible) continue;
    if (r < length) {
      (lower[r] > next_top ? chosen : open) |= 1u << r;
    } else if (top_of(kept[r], block_mask) >= second_least) {
      open |= 1u << r;
    }
  }
  fails = fails || (num_visible > kFilterList && (open >> (kFilterList - 1) & 1) != 0);
  if (fails) open = 0;
  const int num_open = __popc(open);
  int through = num_open;
#pragma unroll
  for (int distance = 1; distance < kLanes; distance *= 2) {
    const int earlier = __shfl_up_sync(kAllLanes, through, distance);
    through += lane_id() >= distance ? earlier : 0;
  }
  const int total = __shfl_sync(kAllLanes, through, kLanes - 1);
  if (total == 0) return chosen;
  auto* queue = reinterpret_cast<OpenBlock*>(shared.scores[warp_id() * Shared::kRowsPerWarp]);
  static_assert(sizeof(OpenBlock) * kLanes * kFilterList <= sizeof(float) * kLanes * Shared::kScoreStride);
  OpenBlock* mine = queue + (through - num_open);
  int place = 0;
#pragma unroll
  for (int r = 0; r < kFilterList; ++r) {
    if ((open >> r & 1) != 0) mine[place++] = {lane_id(), block_of(kept[r], block_mask)};
  }
  // Publishes the queue to the warp.
  __syncwarp();
  score_open<Element>(shared, queue, total, centroids, args.row_elements);
  // Publishes the scores to the rows' lanes.
  __syncwarp();
  const int num_missing = length - __popc(chosen);
  uint32_t rest = open;
#pragma unroll 1
  for (int i = 0; i < num_open; ++i) {
    const uint32_t bit = rest & (~rest + 1);
    rest &= rest - 1;
    const float score = __uint_as_float(static_cast<uint32_t>(mine[i].row));
    const int32_t block = mine[i].block;
    int num_better = 0;
#pragma unroll 1
    for (int other = 0; other < num_open; ++other) {
      const float other_score = __uint_as_float(static_cast<uint32_t>(mine[other].row));
      num_better += beats(other_score, mine[other].block, score, block) ? 1 : 0;
    }
    if (num_better < num_missing) chosen |= bit;
  }
  return chosen;
}

}  // namespace route

template <typename Element, int kHeadDim>
__global__ void __launch_bounds__(RouteFilterSharedMemory<Element, kHeadDim>::kThreads,
                                  MobaRouteTiles<Element, kHeadDim>::kFilterBlocksPerProcessor)
    moba_route_filter(const RouteArguments args) {
  using Shared = RouteFilterSharedMemory<Element, kHeadDim>;
  Shared& shared = *reinterpret_cast<Shared*>(cuda::dynamic_shared_memory());
  const MobaGeometry& geometry = args.geometry;
  constexpr int kParts = kCentroidParts<Element>;
  constexpr int kChunks = decltype(shared.query)::kChunks;
  const route::TileOfQueries tile = route::tile_of_queries(args, blockIdx.x, Shared::kQueries);
  uint32_t* failed = args.failed + blockIdx.x * Shared::Tiles::kWarps + warp_id();
  if (!tile.exists) {
    if (lane_id() == 0) *failed = 0;
    return;  // the whole thread block
  }
  const SequenceOnDevice& sequence = tile.sequence;
  const Element* query_rows =
      args.query.at<Element>(tile.batch_idx, tile.head, sequence.first_query + tile.first_query);
  const int32_t max_visible = route::place_rows(args, sequence, tile.first_query, shared);
  const int64_t unit_block = tile.unit_in_step * geometry.num_blocks + sequence.first_block + args.force_first;
  const float* bounds = args.bounds + unit_block;
  // Step 1. A thread copies one column of chunks; rows follow each other at compile-time distances.
  using Tile = cuda::SharedTile<Element, Shared::kCentroids, kHeadDim>;
  constexpr int kRowsAtOnce = Shared::kThreads / kChunks;
  static_assert(Shared::kCentroids % kRowsAtOnce == 0 && kRowsAtOnce % 8 == 0, "a thread's rows exchange chunks alike");
  const int own_row = static_cast<int>(threadIdx.x) / kChunks;
  const Element* own_chunk = static_cast<const Element*>(args.parts) + (unit_block + own_row) * (kParts * kHeadDim) +
                             static_cast<int>(threadIdx.x) % kChunks * Tile::kPerChunk;
  const float* own_bound = bounds + threadIdx.x;
  Element* own_place = shared.centroids[0].chunk(own_row, static_cast<int>(threadIdx.x) % kChunks);
  const auto copy_next_centroids = [&](int32_t num_left, int buffer) {
#pragma unroll
    for (int i = 0; i < Shared::kCentroids; i += kRowsAtOnce) {
      cuda::copy_async_16(own_place + buffer * (Shared::kCentroids * kHeadDim) + i * kHeadDim,
                          own_chunk + i * (kParts * kHeadDim), own_row + i < num_left);
    }
    if (warp_id() == 0) {
      cuda::copy_async_4(&shared.bounds[buffer][lane_id()], own_bound, lane_id() < num_left);
    }
    cuda::copy_async_commit();
    own_chunk += Shared::kCentroids * kParts * kHeadDim;
    own_bound += Shared::kCentroids;
  };
  const bool needs_scores = max_visible > args.list_length;
  if (needs_scores) {
    route::copy_rows<Shared::kQueries, Shared::kThreads>(shared.query, 0, query_rows, args.query.strides[2],
                                                         sequence.num_queries - tile.first_query, kChunks, kChunks);
    copy_next_centroids(max_visible, 0);
    cuda::copy_async_wait<0>();
  }
  // Publishes queries, and what rows see, to all warps.
  __syncthreads();
  const int row = warp_id() * Shared::kRowsPerWarp + lane_id();
  const int32_t num_visible = shared.num_visible[row];
  float kept[route::kFilterList];
#pragma unroll
  for (int r = 0; r < route::kFilterList; ++r) kept[r] = -INFINITY;
  float norm = 0.0f;
  bool fails = false;
  if (needs_scores) {
    norm = route::norm_of_row<Element>(shared, row);
    fails = !(norm < route::kLargeNorm);
    float norms[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) norms[i] = __shfl_sync(kAllLanes, norm, i * 8 + lane_id() / 4);
    const cuda::SharedRow first_rows = cuda::left_operand(shared.query, warp_id() * Shared::kRowsPerWarp);
    route::HeldQueries<Element, kHeadDim> held;
#pragma unroll
    for (int k = 0; k < held.kSteps; ++k) {
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        cuda::load_matrix_x4(held.operands[k][m], decltype(shared.query)::further(first_rows, k * 2, m * 16));
      }
    }
    const cuda::SharedRow centroid_rows = cuda::right_operand_by_rows(shared.centroids[0], 0);
    int buffer = 0;
    for (int32_t first_block = 0; first_block < max_visible; first_block += Shared::kCentroids, buffer ^= 1) {
      cuda::copy_async_wait<0>();
      // Publishes centroids to all warps, and tells that all have used the tile before.
      __syncthreads();
      const int32_t num_left = max_visible - first_block - Shared::kCentroids;
      if (num_left > 0) copy_next_centroids(num_left, buffer ^ 1);
      route::bound_tile<Element, kHeadDim>(shared, buffer, first_rows, centroid_rows, held, norms);
      // Publishes the warp's upper bounds to its lanes.
      __syncwarp();
      const int visible_here = fails ? 0 : num_visible - first_block;
      if (!route::enter_bounds(shared.scores[row], kept, first_block, visible_here, args.block_mask)) fails = true;
      // Tells the warp that the upper bounds have been read.
      __syncwarp();
    }
    fails = fails && num_visible > args.list_length;
  }
  uint32_t chosen = 0;
  if (needs_scores) {
    chosen = route::choose_entries<Element>(args, shared, kept, num_visible, norm, bounds,
                                            args.centroids + unit_block * args.row_elements, fails);
  }
  const unsigned failing = __ballot_sync(kAllLanes, fails);
  if (lane_id() == 0) *failed = failing;
  if (num_visible < 0 || fails) return;  // no barrier follows
  int32_t blocks[route::kFilterList];
#pragma unroll
  for (int r = 0; r < route::kFilterList; ++r) {
    if (num_visible <= args.list_length) {
      blocks[r] = r < num_visible ? r : route::kNoBlock;
    } else {
      blocks[r] = (chosen >> r & 1) != 0 ? route::block_of(kept[r], args.block_mask) : route::kNoBlock;
    }
  }
  route::write_blocks(
      blocks, route::forced_blocks(args, sequence, shared.own_block[row]), geometry.top_k,
      args.block_indices.at<int32_t>(tile.batch_idx, tile.head, sequence.first_query + tile.first_query + row));
}

}  // namespace topgather
