// Tiles of an image's groups, for every CUDA stage: where tokens lie, copies of their rows in and out.
//
// A unit is one group of one head of one image. Tokens of a group are numbered as in a bias, token (i, j) is
// i * max_columns + j, also where the group is smaller: numbers that it lacks are tokens that are not there, rows of
// zeros with weight 0. A tile is kTokens successive numbers of one unit, or, where groups are small, of several units
// in slots of 16 or 32, a slot a unit.
#pragma once

#include <stdexcept>
#include <string>

#include "../common/checks.h"
#include "../cuda/dispatch.h"
#include "../cuda/launch.cuh"
#include "../cuda/rounding.h"
#include "../cuda/tile_math.cuh"
#include "grid_config_cuda.h"
#include "grid_cuda.h"

namespace topgather {

namespace grid {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

}  // namespace grid

// GroupAxis in 32 bits. A step longer than the axis is never taken.
struct GridAxisOnDevice {
  uint32_t size;
  uint32_t num_groups;
  uint32_t group_step;
  uint32_t token_step;
};

struct GridGeometry {
  GridAxisOnDevice rows;
  GridAxisOnDevice columns;
  uint32_t num_heads;
  uint32_t num_groups;
  uint32_t num_images;  // batch * num_groups: groups of one head in all images
  uint32_t max_tokens;  // of a group
  uint32_t max_columns;
  uint32_t num_tiles;  // of a unit
  int32_t slot_tokens;
  int32_t head_dim;

  __host__ __device__ uint32_t num_units() const { return num_images * num_heads; }
};

// Where the tokens of a tile lie.
template <int kTokens>
struct TilePlaces {
  uint32_t batch[kTokens];
  uint32_t head[kTokens];
  uint32_t row[kTokens];
  uint32_t column[kTokens];
  uint32_t number[kTokens];      // of the token in its group; 0 where it is not there
  uint32_t there[kTokens / 32];  // a bit a token
};

namespace grid {

// Fills places with tokens first_number.. of the units unit_of(slot); a unit past the last is not there. False, to all
// threads, if no token is. Called by all threads; a barrier that publishes the places to all of them.
template <int kTokens, typename UnitOf>
__device__ __forceinline__ bool place_tokens(const GridGeometry& geometry, const UnitOf& unit_of, uint32_t first_number,
                                             TilePlaces<kTokens>& places) {
  bool is_there = false;
  const int i = static_cast<int>(threadIdx.x);
  if (i < kTokens) {
    const uint32_t slot = static_cast<uint32_t>(i) / static_cast<uint32_t>(geometry.slot_tokens);
    const uint32_t number =
        first_number + static_cast<uint32_t>(i) - slot * static_cast<uint32_t>(geometry.slot_tokens);
    const uint32_t unit = unit_of(slot);
    const uint32_t image = unit / geometry.num_heads, head = unit - image * geometry.num_heads;
    const uint32_t batch = image / geometry.num_groups, group = image - batch * geometry.num_groups;
    const uint32_t row_group = group / geometry.columns.num_groups;
    const uint32_t column_group = group - row_group * geometry.columns.num_groups;
    const uint32_t token_row = number / geometry.max_columns, token_column = number - token_row * geometry.max_columns;
    const uint32_t row = row_group * geometry.rows.group_step + token_row * geometry.rows.token_step;
    const uint32_t column = column_group * geometry.columns.group_step + token_column * geometry.columns.token_step;
    is_there = unit < geometry.num_units() && number < geometry.max_tokens && row < geometry.rows.size &&
               column < geometry.columns.size;
    places.batch[i] = is_there ? batch : 0;
    places.head[i] = is_there ? head : 0;
    places.row[i] = is_there ? row : 0;
    places.column[i] = is_there ? column : 0;
    places.number[i] = is_there ? number : 0;
    const uint32_t there = __ballot_sync(kAllLanes, is_there);
    if (lane_id() == 0) places.there[i / kLanes] = there;
  }
  return __syncthreads_or(is_there ? 1 : 0) != 0;
}

template <int kTokens>
__device__ __forceinline__ bool is_token_there(const TilePlaces<kTokens>& places, int token) {
  return (places.there[token / kLanes] >> (token % kLanes) & 1u) != 0;
}

// A bit for each of the kCount tokens from `first` on, which is a multiple of kCount, as far as they lie below `end`.
template <int kCount, int kTokens>
__device__ __forceinline__ uint32_t tokens_there(const TilePlaces<kTokens>& places, int first, int end) {
  static_assert(kCount == 16 || kCount == 32, "within a word");
  return places.there[first / kLanes] >> (first % kLanes) & (0xffffffffu >> (32 - min(kCount, end - first)));
}

template <typename Image, int kTokens>
__device__ __forceinline__ int64_t offset_in(const Image& image, const TilePlaces<kTokens>& places, int token) {
  return image.offset(places.batch[token], places.head[token], places.row[token], places.column[token]);
}

// The same for one number a token, laid out [batch, head, row, column].
template <int kTokens>
__device__ __forceinline__ int64_t number_offset(const GridGeometry& geometry, const TilePlaces<kTokens>& places,
                                                 int token) {
  const int64_t rows =
      static_cast<int64_t>(places.batch[token] * geometry.num_heads + places.head[token]) * geometry.rows.size +
      places.row[token];
  return rows * geometry.columns.size + places.column[token];
}

// Starts the copies of a tile's rows; those of tokens that are not there become zeros, whatever lies beside.
template <typename Tile, int kTokens>
__device__ __forceinline__ void gather_rows_async(Tile& tile, const ConstImage& image,
                                                  const TilePlaces<kTokens>& places, int head_dim) {
  using Element = std::remove_reference_t<decltype(tile.elements[0])>;
  static_assert(Tile::kRows == kTokens, "a row a token");
  const auto* data = static_cast<const Element*>(image.data);
  const int row_chunks = (head_dim + Tile::kPerChunk - 1) / Tile::kPerChunk;
  const int used_chunks = (head_dim + 15) / 16 * 16 / Tile::kPerChunk;
  for (int i = threadIdx.x; i < kTokens * used_chunks; i += static_cast<int>(blockDim.x)) {
    const int row = i / used_chunks, chunk = i % used_chunks;
    const bool is_there = is_token_there(places, row);
    cuda::copy_chunk_async(tile, row, chunk, is_there ? data + offset_in(image, places, row) : data, row_chunks,
                           is_there);
  }
}

// Writes a warp's 16 results of head_dim columns, by way of its own rows of a tile that it needs no more.
template <typename Tile, int kTokens, int kN>
__device__ __forceinline__ void write_rows(const float (&sums)[1][kN][4], const float (&factors)[2], Tile& tile,
                                           int first_row, const MutableImage& image, bool is_aligned,
                                           const TilePlaces<kTokens>& places, int head_dim) {
  using Element = std::remove_reference_t<decltype(tile.elements[0])>;
  const int g = lane_id() / 4, t = lane_id() % 4;
  // Tells the warp's lanes that the rows have been used and may be overwritten.
  __syncwarp();
#pragma unroll
  for (int n = 0; n < kN; ++n) {
    if (n * 8 >= head_dim) continue;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      cuda::store_pair(tile, first_row + h * 8 + g, n * 8 + 2 * t, sums[0][n][2 * h] * factors[h],
                       sums[0][n][2 * h + 1] * factors[h]);
    }
  }
  // Publishes the warp's results to its lanes.
  __syncwarp();
  auto* data = static_cast<Element*>(image.data);
  const int per_piece = is_aligned ? Tile::kPerChunk : 1;
  const int pieces = head_dim / per_piece;
#pragma unroll 1
  for (int i = lane_id(); i < cuda::kBlockRows * pieces; i += kLanes) {
    const int row = first_row + i / pieces, column = i % pieces * per_piece;
    if (!is_token_there(places, row)) continue;
    Element* target = data + offset_in(image, places, row) + column;
    if (is_aligned) {
      *reinterpret_cast<uint4*>(target) = *reinterpret_cast<const uint4*>(&tile.at(row, column));
    } else {
      *target = tile.at(row, column);
    }
  }
}

// Rows of a tile from `first` on, as the right side of a product.
template <typename Tile>
struct RowsFrom {
  Tile& tile;
  int first;
  __device__ __forceinline__ auto& at(int row, int column) { return tile.at(first + row, column); }
};

// sums += weights x rows first.. of `rows`, `count` of which count. Weights are rounded to a 16-bit element type;
// float32 multiplies them from the warp's own rows of `staging`.
template <typename Tile, typename Staging, int kWeightBlocks, int kN>
__device__ __forceinline__ void add_weighted_rows(float (&sums)[1][kN][4], const float (&weights)[1][kWeightBlocks][4],
                                                  Tile& rows, int first, int count, int head_dim, Staging& staging,
                                                  int first_row) {
  using Element = std::remove_reference_t<decltype(rows.elements[0])>;
  if constexpr (std::is_same_v<Element, float>) {
    const int g = lane_id() / 4, t = lane_id() % 4;
#pragma unroll
    for (int n = 0; n < kWeightBlocks; ++n) {
      cuda::store_pair(staging, first_row + g, n * 8 + 2 * t, weights[0][n][0], weights[0][n][1]);
      cuda::store_pair(staging, first_row + g + 8, n * 8 + 2 * t, weights[0][n][2], weights[0][n][3]);
    }
    // Publishes the warp's weights to its lanes.
    __syncwarp();
    RowsFrom<Tile> right{rows, first};
    cuda::multiply_by_columns<false>(sums, staging, first_row, right, 0, head_dim, count);
    // Tells the lanes that the weights have been used and may be overwritten.
    __syncwarp();
  } else {
    cuda::multiply_registers<Element>(sums, weights, rows, first, head_dim, count);
  }
}

// --- host -----------------------------------------------------------------------------------------------------------

// For tiles of `tile_tokens`.
inline GridGeometry geometry_of(const GridProblem& problem, int64_t tile_tokens) {
  const auto narrow = [](int64_t value) { return static_cast<uint32_t>(value < INT32_MAX ? value : INT32_MAX); };
  const auto axis = [&](const GroupAxis& from) {
    return GridAxisOnDevice{narrow(from.size), narrow(from.num_groups), narrow(from.group_step),
                            narrow(from.token_step)};
  };
  require(problem.rows.size <= INT32_MAX / 2 && problem.columns.size <= INT32_MAX / 2 &&
              problem.max_tokens() <= INT32_MAX / 2,
          "grid attention on CUDA takes rows, columns and groups of at most 2^30 tokens");
  require(static_cast<double>(problem.batch_size) * static_cast<double>(problem.num_heads) *
                  static_cast<double>(problem.num_groups()) <=
              INT32_MAX / 2,
          "grid attention on CUDA takes at most 2^30 groups of all heads and images");
  const int64_t max_tokens = problem.max_tokens();
  GridGeometry geometry{};
  geometry.rows = axis(problem.rows);
  geometry.columns = axis(problem.columns);
  geometry.num_heads = narrow(problem.num_heads);
  geometry.num_groups = narrow(problem.num_groups());
  geometry.num_images = narrow(problem.batch_size * problem.num_groups());
  geometry.max_tokens = narrow(max_tokens);
  geometry.max_columns = narrow(problem.columns.max_tokens);
  geometry.num_tiles = narrow(divide_up(max_tokens, tile_tokens));
  const int64_t slot_tokens = max_tokens <= 16 ? 16 : (max_tokens <= 32 ? 32 : tile_tokens);
  geometry.slot_tokens = static_cast<int32_t>(slot_tokens);
  geometry.head_dim = static_cast<int32_t>(problem.head_dim);
  return geometry;
}

// Thread blocks that take `units` units' tiles.
inline dim3 blocks_for(const GridGeometry& geometry, int64_t tile_tokens) {
  const int64_t slots = tile_tokens / geometry.slot_tokens;
  const int64_t blocks = divide_up(geometry.num_units(), slots) * geometry.num_tiles;
  require(blocks <= INT32_MAX, "grid attention on CUDA takes at most 2^31 - 1 tiles of tokens");
  return dim3(static_cast<unsigned>(blocks));
}

inline bool is_empty(const GridProblem& problem) {
  return problem.batch_size == 0 || problem.num_heads == 0 || problem.rows.size == 0 || problem.columns.size == 0;
}

// Whether rows start on 16-byte boundaries and end there.
inline bool has_whole_chunks(const MutableImage& image) {
  return image.has_aligned_rows(16) && image.sizes[4] * element_bytes(image.dtype) % 16 == 0;
}

// The first kernel of a table, ascending in head_dim, that takes the problem.
template <typename Kernel, size_t kCount>
const Kernel& kernel_for(const Kernel (&table)[kCount], const GridProblem& problem) {
  for (const Kernel& kernel : table) {
    if (kernel.dtype == problem.dtype && problem.head_dim <= kernel.max_head_dim) return kernel;
  }
  throw std::invalid_argument("grid attention on CUDA takes float32, bfloat16 and float16 and head_dim up to " +
                              std::to_string(kGridMaxHeadDim) + ", got dtype code " +
                              std::to_string(static_cast<int>(problem.dtype)) + " and head_dim " +
                              std::to_string(problem.head_dim));
}

// Each kernel file's part of grid_cuda_kernel_facts.
void add_forward_kernel_facts(std::vector<CudaKernelFacts>& facts);
void add_backward_kernel_facts(std::vector<CudaKernelFacts>& facts);

}  // namespace grid
}  // namespace topgather
