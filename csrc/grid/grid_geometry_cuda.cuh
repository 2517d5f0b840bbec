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
#include "../cuda/divisor.h"
#include "../cuda/launch.cuh"
#include "../cuda/rounding.h"
#include "../cuda/tile_products.cuh"
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
  uint32_t max_tokens;  // of a group
  cuda::Divisor by_token_step;
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
  cuda::Divisor by_heads;
  cuda::Divisor by_groups;
  cuda::Divisor by_column_groups;
  cuda::Divisor by_max_columns;
  int32_t slot_tokens;
  int32_t head_dim;

  __host__ __device__ uint32_t num_units() const { return num_images * num_heads; }
};

namespace grid {

// A token as the thread that finds its place knows it; one that is not there is the first of all.
struct Token {
  bool is_there;
  uint32_t batch;
  uint32_t head;
  uint32_t row;
  uint32_t column;
  uint32_t number;  // in its group
};

// Where the rows of a tile's tokens start in an image, in bytes; kNotThere for a token that is not there.
constexpr int64_t kNotThere = -1;
template <int kTokens>
using RowOffsets = int64_t[kTokens];

template <typename Image>
__device__ __forceinline__ int64_t row_offset(const Image& image, const Token& token, int element_bytes) {
  return token.is_there ? image.offset(token.batch, token.head, token.row, token.column) * element_bytes : kNotThere;
}

// The same of one number a token, laid out [batch, head, row, column]; 0 for one that is not there.
__device__ __forceinline__ int64_t number_offset(const GridGeometry& geometry, const Token& token) {
  const int64_t rows = static_cast<int64_t>(token.batch * geometry.num_heads + token.head) * geometry.rows.size;
  return (rows + token.row) * geometry.columns.size + token.column;
}

// Finds tokens first_number.. of the units unit_of(slot), a thread a token: sets a bit of `there` for each that is
// there, and calls on_token(token's place in the tile, token). A unit past the last is not there. Whether the thread's
// token is. Called by all threads; a barrier has to publish what was set and what on_token wrote.
template <int kTokens, typename UnitOf, typename OnToken>
__device__ __forceinline__ bool find_tokens(const GridGeometry& geometry, const UnitOf& unit_of, uint32_t first_number,
                                            uint32_t (&there)[kTokens / 32], const OnToken& on_token) {
  bool is_there = false;
  const int i = static_cast<int>(threadIdx.x);
  if (i < kTokens) {
    const uint32_t slot = static_cast<uint32_t>(i) / static_cast<uint32_t>(geometry.slot_tokens);
    const uint32_t number =
        first_number + static_cast<uint32_t>(i) - slot * static_cast<uint32_t>(geometry.slot_tokens);
    const uint32_t unit = unit_of(slot);
    const uint32_t image = geometry.by_heads.quotient(unit), head = unit - image * geometry.num_heads;
    const uint32_t batch = geometry.by_groups.quotient(image), group = image - batch * geometry.num_groups;
    const uint32_t row_group = geometry.by_column_groups.quotient(group);
    const uint32_t column_group = group - row_group * geometry.columns.num_groups;
    const uint32_t token_row = geometry.by_max_columns.quotient(number);
    const uint32_t token_column = number - token_row * geometry.max_columns;
    const uint32_t row = row_group * geometry.rows.group_step + token_row * geometry.rows.token_step;
    const uint32_t column = column_group * geometry.columns.group_step + token_column * geometry.columns.token_step;
    is_there = unit < geometry.num_units() && number < geometry.max_tokens && row < geometry.rows.size &&
               column < geometry.columns.size;
    on_token(i, is_there ? Token{true, batch, head, row, column, number} : Token{});
    const uint32_t of_warp = __ballot_sync(kAllLanes, is_there);
    if (lane_id() == 0) there[i / kLanes] = of_warp;
  }
  return is_there;
}

// The same and the barrier. False, to all threads, if no token is there.
template <int kTokens, typename UnitOf, typename OnToken>
__device__ __forceinline__ bool place_tokens(const GridGeometry& geometry, const UnitOf& unit_of, uint32_t first_number,
                                             uint32_t (&there)[kTokens / 32], const OnToken& on_token) {
  const bool is_there = find_tokens<kTokens>(geometry, unit_of, first_number, there, on_token);
  return __syncthreads_or(is_there ? 1 : 0) != 0;
}

template <int kWords>
__device__ __forceinline__ bool is_token_there(const uint32_t (&there)[kWords], int token) {
  return (there[token / kLanes] >> (token % kLanes) & 1u) != 0;
}

// A bit for each of the kCount tokens from `first` on, which is a multiple of kCount, as far as they lie below `end`.
template <int kCount>
__device__ __forceinline__ uint32_t tokens_there(const uint32_t* there, int first, int end) {
  static_assert(kCount == 16 || kCount == 32, "within a word");
  return there[first / kLanes] >> (first % kLanes) & (0xffffffffu >> (32 - min(kCount, end - first)));
}

// Starts the copies of a tile's rows, all columns of it; those past head_dim and those of tokens that are not there
// become zeros, whatever lies beside.
template <int kThreads, typename Tile, int kTokens>
__device__ __forceinline__ void gather_rows_async(Tile& tile, const ConstImage& image,
                                                  const RowOffsets<kTokens>& offsets, int head_dim) {
  static_assert(Tile::kRows == kTokens, "a row a token");
  constexpr int kRowsAtOnce = kThreads / Tile::kChunks;
  static_assert(kThreads % Tile::kChunks == 0 && kTokens % kRowsAtOnce == 0, "as many copies for every thread");
  const int chunk = static_cast<int>(threadIdx.x) % Tile::kChunks,
            first = static_cast<int>(threadIdx.x) / Tile::kChunks;
  const bool is_column = chunk * Tile::kPerChunk < head_dim;
  const char* data = static_cast<const char*>(image.data);
#pragma unroll
  for (int i = 0; i < kTokens / kRowsAtOnce; ++i) {
    const int row = first + i * kRowsAtOnce;
    const int64_t offset = offsets[row];
    const bool is_copied = is_column && offset >= 0;
    cuda::copy_async_16(tile.chunk(row, chunk), is_copied ? data + offset + chunk * 16 : data, is_copied);
  }
}

// A unit as kernels take it whose tiles lie in one: no token's place is kept, each is made of the token's number.
struct Unit {
  uint32_t batch;
  uint32_t head;
  uint32_t first_row;  // of its first token
  uint32_t first_column;
  uint32_t num_rows;  // of its tokens
  uint32_t num_columns;
};

__device__ __forceinline__ Unit find_unit(const GridGeometry& geometry, uint32_t number) {
  const uint32_t image = geometry.by_heads.quotient(number), batch = geometry.by_groups.quotient(image);
  const uint32_t group = image - batch * geometry.num_groups;
  const uint32_t row_group = geometry.by_column_groups.quotient(group);
  const uint32_t column_group = group - row_group * geometry.columns.num_groups;
  const auto tokens_from = [](const GridAxisOnDevice& axis, uint32_t first) {
    return min(axis.by_token_step.quotient(axis.size - 1 - first) + 1, axis.max_tokens);
  };
  const uint32_t row = row_group * geometry.rows.group_step, column = column_group * geometry.columns.group_step;
  return {batch,  number - image * geometry.num_heads, row,
          column, tokens_from(geometry.rows, row),     tokens_from(geometry.columns, column)};
}

// Where a token stands in its unit.
struct TokenOfUnit {
  uint32_t row;
  uint32_t column;
  bool is_there;
};

__device__ __forceinline__ TokenOfUnit token_of_unit(const GridGeometry& geometry, uint32_t num_rows,
                                                     uint32_t num_columns, uint32_t number) {
  const uint32_t row = geometry.by_max_columns.quotient(number), column = number - row * geometry.max_columns;
  return {row, column, row < num_rows && column < num_columns};
}

// A bit for each of the 32 or 64 tokens from `first` on. All lanes of the warp take part.
template <int kCount>
__device__ __forceinline__ auto tokens_there(const GridGeometry& geometry, uint32_t num_rows, uint32_t num_columns,
                                             uint32_t first) {
  static_assert(kCount == 32 || kCount == 64, "a word");
  std::conditional_t<kCount == 32, uint32_t, uint64_t> there = 0;
#pragma unroll
  for (int i = 0; i < kCount; i += kLanes) {
    const uint32_t number = first + static_cast<uint32_t>(i + lane_id());
    const bool is_there = token_of_unit(geometry, num_rows, num_columns, number).is_there;
    there |= static_cast<decltype(there)>(__ballot_sync(kAllLanes, is_there)) << i;
  }
  return there;
}

// Where the row of a unit's first token starts in an image, in bytes.
template <typename Image>
__device__ __forceinline__ int64_t first_offset_of(const Image& image, const Unit& unit, int element_bytes) {
  return image.offset(unit.batch, unit.head, unit.first_row, unit.first_column) * element_bytes;
}
__device__ __forceinline__ const char* first_row_of(const ConstImage& image, const Unit& unit, int element_bytes) {
  return static_cast<const char*>(image.data) + first_offset_of(image, unit, element_bytes);
}

// From one token of a unit to the next, in bytes.
struct TokenSteps {
  uint64_t row;
  uint64_t column;
  __device__ __forceinline__ uint64_t to(const TokenOfUnit& token) const {
    return token.row * row + token.column * column;
  }
};

// Starts the copies of the rows of tokens first_number.. of a unit, of one or two tensors, all columns of the tiles;
// those past head_dim and those of tokens that are not there become zeros.
template <int kThreads, int kTensors, typename Tile>
__device__ __forceinline__ void gather_unit_async(const GridGeometry& geometry, uint32_t num_rows, uint32_t num_columns,
                                                  uint32_t first_number, Tile* const (&tiles)[kTensors],
                                                  const char* const (&rows)[kTensors],
                                                  const TokenSteps (&steps)[kTensors]) {
  constexpr int kRowsAtOnce = kThreads / Tile::kChunks;
  static_assert(kThreads % Tile::kChunks == 0 && Tile::kRows % kRowsAtOnce == 0, "as many copies for every thread");
  const int chunk = static_cast<int>(threadIdx.x) % Tile::kChunks,
            first = static_cast<int>(threadIdx.x) / Tile::kChunks;
  if (chunk * Tile::kPerChunk >= geometry.head_dim) num_rows = 0;
#pragma unroll
  for (int i = 0; i < Tile::kRows / kRowsAtOnce; ++i) {
    const int row = first + i * kRowsAtOnce;
    const TokenOfUnit token = token_of_unit(geometry, num_rows, num_columns, first_number + static_cast<uint32_t>(row));
#pragma unroll
    for (int tensor = 0; tensor < kTensors; ++tensor) {
      cuda::copy_async_16(tiles[tensor]->chunk(row, chunk), rows[tensor] + steps[tensor].to(token) + chunk * 16,
                          token.is_there);
    }
  }
}

// What write_rows takes of a warp whose lanes know a row each. All lanes of the warp take part.
struct RowsOfLanes {
  int64_t mine;
  int first_row;

  __device__ __forceinline__ int64_t operator[](int row) const {
    const auto of_lane = [&](int64_t bits) {
      return static_cast<int64_t>(__shfl_sync(kAllLanes, static_cast<uint32_t>(bits), row - first_row));
    };
    return of_lane(mine >> 32) << 32 | of_lane(mine);
  }
};

// Writes a warp's 16 or 32 results of head_dim columns, by way of its own rows of a tile that it needs no more.
template <typename Tile, typename Offsets, int kM, int kN>
__device__ __forceinline__ void write_rows(const float (&sums)[kM][kN][4], const float (&factors)[2 * kM], Tile& tile,
                                           int first_row, const MutableImage& image, bool is_aligned,
                                           const Offsets& offsets, int head_dim) {
  using Element = std::remove_reference_t<decltype(tile.elements[0])>;
  const int g = lane_id() / 4, t = lane_id() % 4;
  // Tells the warp's lanes that the rows have been used and may be overwritten.
  __syncwarp();
#pragma unroll
  for (int n = 0; n < kN; ++n) {
#pragma unroll
    for (int h = 0; h < 2 * kM; ++h) {
      const float* pair = &sums[h / 2][n][h % 2 * 2];
      cuda::store_pair(tile, first_row + h * 8 + g, n * 8 + 2 * t, pair[0] * factors[h], pair[1] * factors[h]);
    }
  }
  // Publishes the warp's results to its lanes.
  __syncwarp();
  char* data = static_cast<char*>(image.data);
  if (is_aligned) {
    constexpr int kRowsAtOnce = kLanes / Tile::kChunks;
    const int chunk = lane_id() % Tile::kChunks;
    constexpr int kCount = kM * cuda::kBlockRows / kRowsAtOnce, kTogether = kCount < 4 ? kCount : 4;
#pragma unroll
    for (int first = 0; first < kCount; first += kTogether) {
      int64_t offset[kTogether];
      uint4 chunks[kTogether];
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        const int row = first_row + lane_id() / Tile::kChunks + (first + i) * kRowsAtOnce;
        offset[i] = offsets[row];
        chunks[i] = *reinterpret_cast<const uint4*>(tile.chunk(row, chunk));
      }
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        if (offset[i] == kNotThere || chunk * Tile::kPerChunk >= head_dim) continue;
        *reinterpret_cast<uint4*>(data + offset[i] + chunk * 16) = chunks[i];
      }
    }
    return;
  }
#pragma unroll 1
  for (int i = lane_id(); i < cuda::kBlockRows * head_dim * kM; i += kLanes) {
    const int row = first_row + i / head_dim, column = i % head_dim;
    const int64_t offset = offsets[row];
    if (offset == kNotThere) continue;
    reinterpret_cast<Element*>(data + offset)[column] = tile.at(row, column);
  }
}

// sums += left x right^T of 16 rows and rows first.. of `right`, `count` of which count. 16-bit types take the left rows
// to registers, and then sixteen of the right ones at a time, over all columns of the tiles.
template <typename TileA, typename TileB, int kN>
__device__ __forceinline__ void multiply_rows(float (&sums)[1][kN][4], TileA& left, int first_row, TileB& right,
                                              int first, int count, int head_dim) {
  using Element = std::remove_reference_t<decltype(left.elements[0])>;
  if constexpr (std::is_same_v<Element, float>) {
    cuda::multiply_by_rows(sums, left, first_row, right, first, count, head_dim);
  } else {
    constexpr int kSteps = TileA::kColumns / 16;
    const cuda::SharedRow first_left = cuda::left_operand(left, first_row);
    const cuda::SharedRow first_right = cuda::right_operand_by_rows(right, first);
    uint32_t operands[kSteps][4];
#pragma unroll
    for (int k = 0; k < kSteps; ++k) cuda::load_matrix_x4(operands[k], TileA::further(first_left, k * 2, 0));
#pragma unroll
    for (int n = 0; n < kN / 2; ++n) {
      if (n * 16 >= count) break;
#pragma unroll
      for (int k = 0; k < kSteps; ++k) {
        uint32_t of_right[4];
        cuda::load_matrix_x4(of_right, TileB::further(first_right, k * 2, n * 16));
        cuda::multiply_accumulate<Element>(sums[0][2 * n], operands[k], of_right[0], of_right[1]);
        cuda::multiply_accumulate<Element>(sums[0][2 * n + 1], operands[k], of_right[2], of_right[3]);
      }
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
    cuda::multiply_registers<Element>(sums, weights, rows, first, Tile::kColumns, count);
  }
}

// Sixteen rows of a tile, all columns, as the right operand of a product.
template <typename Tile, int kPairs>
__device__ __forceinline__ void load_columns(uint32_t (&columns)[kPairs][4], cuda::SharedRow first, int num_rows,
                                             uint32_t bytes_on = 0) {
#pragma unroll
  for (int n = 0; n < kPairs; ++n) {
    cuda::load_matrix_x4_transposed(columns[n], Tile::further_here(first, n * 2, num_rows, bytes_on));
  }
}

// Two blocks of a result as the left operand of a step of another product, rounded.
template <typename Element, int kM, int kBlocks>
__device__ __forceinline__ void pack_left(uint32_t (&left)[kM][4], const float (&from)[kM][kBlocks][4], int first) {
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      left[m][i] = cuda::pack2<Element>(from[m][first + i / 2][i % 2 * 2], from[m][first + i / 2][i % 2 * 2 + 1]);
    }
  }
}

// c += W B with W in registers, as a product left it, and B rows of a tile, all of its columns: what a step loads is on
// its way before it multiplies.
template <typename TileB, typename Element, int kM, int kDepthBlocks, int kN>
__device__ __forceinline__ void multiply_all_registers(float (&c)[kM][kN][4], const float (&w)[kM][kDepthBlocks][4],
                                                       cuda::SharedRow b) {
#pragma unroll
  for (int k = 0; k < kDepthBlocks / 2; ++k) {
    uint32_t columns[kN / 2][4];
    load_columns<TileB>(columns, b, k * 16);
    uint32_t left[kM][4];
    pack_left<Element>(left, w, 2 * k);
#pragma unroll
    for (int n = 0; n < kN / 2; ++n) {
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        cuda::multiply_accumulate<Element>(c[m][2 * n], left[m], columns[n][0], columns[n][1]);
        cuda::multiply_accumulate<Element>(c[m][2 * n + 1], left[m], columns[n][2], columns[n][3]);
      }
    }
  }
}

// --- host -----------------------------------------------------------------------------------------------------------

// For tiles of `tile_tokens`.
inline GridGeometry geometry_of(const GridProblem& problem, int64_t tile_tokens) {
  const auto narrow = [](int64_t value) { return static_cast<uint32_t>(value < INT32_MAX ? value : INT32_MAX); };
  const auto axis = [&](const GroupAxis& from) {
    return GridAxisOnDevice{narrow(from.size),       narrow(from.num_groups), narrow(from.group_step),
                            narrow(from.token_step), narrow(from.max_tokens), cuda::Divisor(narrow(from.token_step))};
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
  geometry.by_heads = cuda::Divisor(problem.num_heads);
  geometry.by_groups = cuda::Divisor(problem.num_groups());
  geometry.by_column_groups = cuda::Divisor(problem.columns.num_groups);
  geometry.by_max_columns = cuda::Divisor(problem.columns.max_tokens);
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

template <typename Image>
TokenSteps token_steps(const GridProblem& problem, const Image& image) {
  // Unsigned: a step longer than the axis, which is never taken, may overflow.
  const auto bytes = [&](int64_t stride, int64_t step) {
    return static_cast<uint64_t>(stride) * static_cast<uint64_t>(step) *
           static_cast<uint64_t>(element_bytes(problem.dtype));
  };
  return {bytes(image.strides[2], problem.rows.token_step), bytes(image.strides[3], problem.columns.token_step)};
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
