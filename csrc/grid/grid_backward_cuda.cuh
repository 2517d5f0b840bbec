// Grid and window attention backward on CUDA: the kernels that differentiate. grid_backward_cuda.cu launches them.
//
//   weight_ij    = exp(scale * dot(query_i, key_j) + bias_ij - lse_i)    recomputed from softmax terms (softmax_terms.h)
//   shift_i      = dot(grad_out_i, out_i)
//   d_score_ij   = weight_ij * (dot(grad_out_i, value_j) - shift_i)
//   grad_value_j = sum_i weight_ij grad_out_i
//   grad_key_j   = scale * sum_i d_score_ij query_i
//   grad_query_i = scale * sum_j d_score_ij key_j
//   grad_bias_ij = sum over images and groups of d_score_ij
//
// Who owns what: a thread block owns a tile of tokens of one unit, or of several where groups are small
// (grid_geometry_cuda.cuh), and a warp 16 of them: the rows of its products, whose gradients it sums in registers while
// tiles of the same group come as columns. grid_token_gradients runs twice, once with keys as rows and once with
// queries; scores are computed for each. grid_bias_gradients has queries as rows and one tile of keys as columns, and
// goes through the images and groups of a head that its piece has. Steps:
//   1. place the tile's tokens, gather their two rows: key and value, or query and grad_out;
//   per tile of the other side:
//   2. gather its two rows; softmax terms and shift of the queries among them;
//   per kBackwardStep columns:
//   3. weights and d_scores;
//   4. gradients += weights or d_scores x columns' rows, or bias sums += d_scores;
//   last:
//   5. round and write.
// Operations a token: keys as rows 8 G D, queries 6 G D, a bias 4 G D. Bytes: each of the first two reads four rows a
// token and writes two or one, tiles of the other side from the second-level cache but for the first: 0.6 G operations
// a byte of 16-bit memory, so that bandwidth bounds small groups. Nothing is fetched ahead; the thread blocks of a
// multiprocessor hide each other's waits.
// Numerics: float32 sums; weights and d_scores are rounded to a 16-bit element type before they are multiplied. A scale
// above 1 is multiplied in before, so that float16 does not lose what it would magnify; a smaller one after. Tokens
// that are not there weigh 0, and their rows are zeros. NaN and inf spread as in plain softmax.
// Determinism: no atomics; every sum has an order fixed by shapes.
#pragma once

#include "../common/softmax_terms.h"
#include "../cuda/scores.cuh"
#include "grid_geometry_cuda.cuh"

namespace topgather {

struct GridBackwardArguments {
  GridGeometry geometry;
  float score_scale;     // scale * log2(e)
  float d_score_scale;   // on gradients of scores before they are rounded
  float gradient_scale;  // on gradients of rows' first tensor; the two make scale
  uint32_t num_pieces;   // of images and groups; a bias' gradient only
  bool is_first_aligned;
  bool is_second_aligned;
  bool is_query_aligned;
  grid::TokenSteps query_steps;
  grid::TokenSteps key_steps;
  grid::TokenSteps value_steps;
  grid::TokenSteps grad_out_steps;
  grid::TokenSteps grad_first_steps;
  grid::TokenSteps grad_second_steps;
  grid::TokenSteps grad_query_steps;
  grid::TokenSteps out_steps;
  ConstImage query;            // [batch, head, row, column, D] dtype
  ConstImage key;              // [batch, head, row, column, D] dtype
  ConstImage value;            // [batch, head, row, column, D] dtype
  ConstImage grad_out;         // [batch, head, row, column, D] dtype
  const float* bias;           // [head, G, G] float32, or null
  const float* lse;            // [batch, head, row, column] float32
  const float* softmax_terms;  // [batch, head, row, column, 2] float32, or null
  ConstImage out;              // [batch, head, row, column, D] dtype; or data null: shift is given
  float* shift;                // [batch, head, row, column] float32; written where out is given
  MutableImage grad_first;     // of query or key, dtype
  MutableImage grad_second;    // of value, dtype; where keys are rows
  MutableImage grad_query;     // dtype; of groups of one tile, which have keys as rows
  float* bias_sums;            // [num_pieces, head, G, G] float32
};

// Where the tokens of a tile lie, and their rows of the two tensors that are loaded and of their gradients.
template <int kTokens>
struct GridPlaces {
  grid::RowOffsets<kTokens> first;
  grid::RowOffsets<kTokens> second;
  int64_t numbers[kTokens];    // where a token's lse stands
  uint32_t bias_row[kTokens];  // of the token in its head's bias
  uint32_t head[kTokens];
  uint32_t there[kTokens / kLanes];  // a bit a token
};

template <typename Element, int kHeadDim>
struct GridBackwardSharedMemory {
  using Tiles = GridTiles<Element, kHeadDim>;
  static constexpr int kTokens = Tiles::kTokens;
  static constexpr int kThreads = Tiles::kWarps * kLanes;

  cuda::SharedTile<Element, kTokens, kHeadDim> row_first;      // key or query
  cuda::SharedTile<Element, kTokens, kHeadDim> row_second;     // value or grad_out
  cuda::SharedTile<Element, kTokens, kHeadDim> column_first;   // query or key
  cuda::SharedTile<Element, kTokens, kHeadDim> column_second;  // grad_out or value
  // float32 multiplies weights from here; the 16-bit types multiply them from registers.
  cuda::SharedTile<float, Tiles::kIsFloat ? kTokens : 1, Tiles::kBackwardStep> weights;
  GridPlaces<kTokens> row_places;
  GridPlaces<kTokens> column_places;
  __device__ __forceinline__ const GridPlaces<kTokens>& rows() const { return row_places; }
  __device__ __forceinline__ const GridPlaces<kTokens>& columns() const { return column_places; }
  grid::RowOffsets<kTokens> grad_first;
  grid::RowOffsets<kTokens> grad_second;
  // Of the side that is queries:
  float largest[kTokens];  // of softmax terms
  float factor[kTokens];   // of softmax terms
  float shift[kTokens];
};

namespace grid {

// What a thread notes of a token whose rows of two tensors will be gathered.
template <int kTokens>
__device__ __forceinline__ void note_token(const GridGeometry& geometry, GridPlaces<kTokens>& places, int i,
                                           const Token& token, const ConstImage& first, const ConstImage& second,
                                           int element_bytes) {
  places.first[i] = row_offset(first, token, element_bytes);
  places.second[i] = row_offset(second, token, element_bytes);
  places.numbers[i] = number_offset(geometry, token);
  places.bias_row[i] = token.number;
  places.head[i] = token.head;
}

// Softmax terms of a token, which is weighed with 0 where it is not there, and its shift where that is given.
__device__ __forceinline__ SoftmaxTerms<float> softmax_terms_of(const GridBackwardArguments& args, bool is_there,
                                                                int64_t offset) {
  if (!is_there) return {0.0f, 0.0f};
  const float* given_terms = args.softmax_terms == nullptr ? nullptr : args.softmax_terms + 2 * offset;
  return read_softmax_terms(given_terms, args.lse[offset]);
}
__device__ __forceinline__ float given_shift_of(const GridBackwardArguments& args, bool is_there, int64_t offset) {
  return is_there ? args.shift[offset] : 0.0f;
}

// What 16 bytes of out and of grad_out add to the shift of their token.
template <typename Element>
__device__ __forceinline__ float part_of_shift(const uint4& out, const uint4& grad_out) {
  constexpr int kCount = 16 / static_cast<int>(sizeof(Element));
  float left[kCount], right[kCount], sum = 0.0f;
  cuda::unpack_chunk<Element>(out, left);
  cuda::unpack_chunk<Element>(grad_out, right);
#pragma unroll
  for (int i = 0; i < kCount; ++i) sum = fmaf(left[i], right[i], sum);
  return sum;
}

// The same by the thread that has the token.
template <typename Shared>
__device__ __forceinline__ void load_terms_of(const GridBackwardArguments& args, bool is_there, int64_t offset,
                                              Shared& shared, int i) {
  const SoftmaxTerms<float> terms = softmax_terms_of(args, is_there, offset);
  shared.largest[i] = terms.largest;
  shared.factor[i] = terms.factor;
  if (args.out.data == nullptr) shared.shift[i] = given_shift_of(args, is_there, offset);
}

// Step 2's numbers, a thread a token.
template <typename Shared>
__device__ __forceinline__ void load_query_terms(const GridBackwardArguments& args,
                                                 const GridPlaces<Shared::kTokens>& places, Shared& shared) {
  const int i = static_cast<int>(threadIdx.x);
  if (i >= Shared::kTokens) return;
  load_terms_of(args, is_token_there(places.there, i), places.numbers[i], shared, i);
}

// Step 3's part that a bias has: scores in base 2 of the tokens that are there, plus bias.
template <bool kAreRowsKeys, typename Shared, int kBlocks>
__device__ __forceinline__ void add_bias(const GridBackwardArguments& args, const Shared& shared, int first_row,
                                         int first_column, uint32_t there, float (&scores)[1][kBlocks][4]) {
  const int g = lane_id() / 4, t = lane_id() % 4;
  const int64_t group = args.geometry.max_tokens;
  const auto& rows = shared.rows();
  const auto& columns = shared.columns();
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int row = first_row + h * 8 + g;
    const uint32_t mine = is_token_there(rows.there, row) ? there >> 2 * t : 0u;
    const float* bias = args.bias + rows.head[row] * group * group + rows.bias_row[row] * (kAreRowsKeys ? 1 : group);
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& score = scores[0][n][2 * h + e];
        if ((mine >> (n * 8 + e) & 1u) != 0) {
          const int64_t number = columns.bias_row[first_column + n * 8 + 2 * t + e];
          score = fmaf(bias[number * (kAreRowsKeys ? group : 1)], kLog2E, score);
        }
      }
    }
  }
}

// Step 3 for the warp's rows and columns first_column.., `there` a bit a column. d_scores come without any scale.
template <bool kAreRowsKeys, typename Shared, int kBlocks>
__device__ __forceinline__ void differentiate(const GridBackwardArguments& args, Shared& shared, int first_row,
                                              int first_column, uint32_t there, float (&weights)[1][kBlocks][4],
                                              float (&d_scores)[1][kBlocks][4]) {
  constexpr uint32_t kAll = 0xffffffffu >> (32 - kBlocks * 8);
  const int g = lane_id() / 4, t = lane_id() % 4;
  const int count = kLanes - __clz(static_cast<int>(there)), head_dim = args.geometry.head_dim;
  cuda::fill(weights, 0.0f);
  cuda::fill(d_scores, 0.0f);
  multiply_rows(weights, shared.row_first, first_row, shared.column_first, first_column, count, head_dim);
  multiply_rows(d_scores, shared.row_second, first_row, shared.column_second, first_column, count, head_dim);
#pragma unroll
  for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) weights[0][n][e] = cuda::scale_score(weights[0][n][e], args.score_scale);
  }
  if (args.bias != nullptr) add_bias<kAreRowsKeys>(args, shared, first_row, first_column, there, weights);
#pragma unroll
  for (int n = 0; n < kBlocks; ++n) {
    if (n % 2 == 0 && n * 8 >= count) break;  // zeros, maybe past the tile
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int query = kAreRowsKeys ? first_column + n * 8 + 2 * t + e % 2 : first_row + e / 2 * 8 + g;
      float& weight = weights[0][n][e];
      weight = cuda::exp2_approximate(weight - shared.largest[query]) * shared.factor[query];
      d_scores[0][n][e] = weight * (d_scores[0][n][e] - shared.shift[query]);
    }
  }
  const uint32_t rows_there = tokens_there<16>(shared.rows().there, first_row, Shared::kTokens);
  if (there == kAll && rows_there == 0xffffu) return;
  const uint32_t mine = there >> 2 * t;
#pragma unroll
  for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const bool is_there = (mine >> (n * 8 + e % 2) & 1u) != 0 && (rows_there >> (g + e / 2 * 8) & 1u) != 0;
      if (!is_there) weights[0][n][e] = d_scores[0][n][e] = 0.0f;
    }
  }
}

// The columns of a warp: those of its slot.
struct Columns {
  int first;
  int end;
};
__device__ __forceinline__ Columns columns_of(const GridGeometry& geometry, int first_row) {
  const int first = first_row / geometry.slot_tokens * geometry.slot_tokens;
  return {first, first + geometry.slot_tokens};
}

}  // namespace grid

template <typename Element, int kHeadDim, bool kAreRowsKeys>
__global__ void __launch_bounds__(GridBackwardSharedMemory<Element, kHeadDim>::kThreads,
                                  GridTiles<Element, kHeadDim>::kBackwardBlocksPerProcessor)
    grid_token_gradients(const GridBackwardArguments args) {
  using Shared = GridBackwardSharedMemory<Element, kHeadDim>;
  constexpr uint32_t kTokens = Shared::kTokens;
  constexpr int kStep = Shared::Tiles::kBackwardStep;
  constexpr int kBytes = sizeof(Element);
  Shared& shared = *reinterpret_cast<Shared*>(cuda::dynamic_shared_memory());
  const GridGeometry& geometry = args.geometry;
  const int head_dim = geometry.head_dim;
  const uint32_t block = blockIdx.x / geometry.num_tiles, tile = blockIdx.x - block * geometry.num_tiles;
  const uint32_t first_unit = block * (kTokens / static_cast<uint32_t>(geometry.slot_tokens));
  const auto unit_of = [first_unit](uint32_t slot) { return first_unit + slot; };
  const ConstImage& row_first = kAreRowsKeys ? args.key : args.query;
  const ConstImage& row_second = kAreRowsKeys ? args.value : args.grad_out;
  const ConstImage& column_first = kAreRowsKeys ? args.query : args.key;
  const ConstImage& column_second = kAreRowsKeys ? args.grad_out : args.value;
  // Step 1. Tiles of short groups may be empty: such thread blocks return as a whole.
  const auto note_row = [&](int i, const grid::Token& token) {
    grid::note_token(geometry, shared.row_places, i, token, row_first, row_second, kBytes);
    shared.grad_first[i] = grid::row_offset(args.grad_first, token, kBytes);
    if constexpr (kAreRowsKeys) shared.grad_second[i] = grid::row_offset(args.grad_second, token, kBytes);
  };
  if (!grid::place_tokens<kTokens>(geometry, unit_of, tile * kTokens, shared.row_places.there, note_row)) return;
  grid::gather_rows_async<Shared::kThreads>(shared.row_first, row_first, shared.row_places.first, head_dim);
  grid::gather_rows_async<Shared::kThreads>(shared.row_second, row_second, shared.row_places.second, head_dim);
  cuda::copy_async_commit();
  if constexpr (!kAreRowsKeys) grid::load_query_terms(args, shared.row_places, shared);

  const int first_row = warp_id() * cuda::kBlockRows;
  const grid::Columns columns = grid::columns_of(geometry, first_row);
  const bool has_work = grid::tokens_there<16>(shared.row_places.there, first_row, Shared::kTokens) != 0;
  float grad_first[1][kHeadDim / 8][4];
  float grad_second[1][kAreRowsKeys ? kHeadDim / 8 : 1][4];
  cuda::fill(grad_first, 0.0f);
  cuda::fill(grad_second, 0.0f);
#pragma unroll 1
  for (uint32_t column_tile = 0; column_tile < geometry.num_tiles; ++column_tile) {
    // Step 2.
    const auto note_column = [&](int i, const grid::Token& token) {
      grid::note_token(geometry, shared.column_places, i, token, column_first, column_second, kBytes);
    };
    if (!grid::place_tokens<kTokens>(geometry, unit_of, column_tile * kTokens, shared.column_places.there,
                                     note_column)) {
      continue;
    }
    grid::gather_rows_async<Shared::kThreads>(shared.column_first, column_first, shared.column_places.first, head_dim);
    grid::gather_rows_async<Shared::kThreads>(shared.column_second, column_second, shared.column_places.second,
                                              head_dim);
    cuda::copy_async_commit();
    if constexpr (kAreRowsKeys) grid::load_query_terms(args, shared.column_places, shared);
    cuda::copy_async_wait<0>();
    // Publishes the columns' rows and numbers, and the first time those of the rows, to all warps.
    __syncthreads();
#pragma unroll 1
    for (int column = columns.first; has_work && column < columns.end; column += kStep) {
      const uint32_t there = grid::tokens_there<kStep>(shared.column_places.there, column, columns.end);
      if (there == 0) continue;
      const int count = kLanes - __clz(static_cast<int>(there));
      float weights[1][kStep / 8][4], d_scores[1][kStep / 8][4];
      grid::differentiate<kAreRowsKeys>(args, shared, first_row, column, there, weights, d_scores);
      if constexpr (kAreRowsKeys) {
        grid::add_weighted_rows(grad_second, weights, shared.column_second, column, count, head_dim, shared.weights,
                                first_row);
      }
#pragma unroll
      for (int n = 0; n < kStep / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) d_scores[0][n][e] *= args.d_score_scale;
      }
      grid::add_weighted_rows(grad_first, d_scores, shared.column_first, column, count, head_dim, shared.weights,
                              first_row);
    }
    // Tells all threads that the tile has been used and the next one may overwrite it.
    __syncthreads();
  }
  // Step 5.
  if (!has_work) return;
  const float factors[2] = {args.gradient_scale, args.gradient_scale};
  grid::write_rows(grad_first, factors, shared.row_first, first_row, args.grad_first, args.is_first_aligned,
                   shared.grad_first, head_dim);
  if constexpr (kAreRowsKeys) {
    const float ones[2] = {1.0f, 1.0f};
    grid::write_rows(grad_second, ones, shared.row_second, first_row, args.grad_second, args.is_second_aligned,
                     shared.grad_second, head_dim);
  }
}

// A thread block: one tile of queries by one tile of keys (blockIdx.x), one head (blockIdx.y), and as many pieces as
// the tile has slots (blockIdx.z): each slot has images and groups, and so sums, of its own.
template <typename Element>
__global__ void __launch_bounds__(GridBackwardSharedMemory<Element, kGridBiasHeadDim>::kThreads, 2)
    grid_bias_gradients(const GridBackwardArguments args) {
  using Shared = GridBackwardSharedMemory<Element, kGridBiasHeadDim>;
  constexpr uint32_t kTokens = Shared::kTokens;
  constexpr int kStep = Shared::Tiles::kBackwardStep;
  constexpr int kSteps = Shared::kTokens / kStep;
  Shared& shared = *reinterpret_cast<Shared*>(cuda::dynamic_shared_memory());
  const GridGeometry& geometry = args.geometry;
  const int head_dim = geometry.head_dim;
  const uint32_t row_tile = blockIdx.x / geometry.num_tiles, column_tile = blockIdx.x - row_tile * geometry.num_tiles;
  const uint32_t num_slots = kTokens / static_cast<uint32_t>(geometry.slot_tokens);
  const uint32_t first_piece = blockIdx.z * num_slots;
  const int first_row = warp_id() * cuda::kBlockRows;
  const grid::Columns columns = grid::columns_of(geometry, first_row);
  float sums[kSteps][kStep / 8][4];
  cuda::fill(sums, 0.0f);
#pragma unroll 1
  for (uint32_t first_image = first_piece; first_image < geometry.num_images; first_image += args.num_pieces) {
    const auto unit_of = [&](uint32_t slot) {
      const uint32_t image = first_image + slot;
      return image < geometry.num_images ? image * geometry.num_heads + blockIdx.y : geometry.num_units();
    };
    // Steps 1 and 2. Where a short group has nothing for the tiles, there is nothing to add.
    const auto note_row = [&](int i, const grid::Token& token) {
      grid::note_token(geometry, shared.row_places, i, token, args.query, args.grad_out, sizeof(Element));
    };
    const auto note_column = [&](int i, const grid::Token& token) {
      grid::note_token(geometry, shared.column_places, i, token, args.key, args.value, sizeof(Element));
    };
    const bool has_rows =
        grid::place_tokens<kTokens>(geometry, unit_of, row_tile * kTokens, shared.row_places.there, note_row);
    const bool has_columns =
        grid::place_tokens<kTokens>(geometry, unit_of, column_tile * kTokens, shared.column_places.there, note_column);
    if (!has_rows || !has_columns) continue;
    constexpr int kThreads = Shared::kThreads;
    grid::gather_rows_async<kThreads>(shared.row_first, args.query, shared.row_places.first, head_dim);
    grid::gather_rows_async<kThreads>(shared.row_second, args.grad_out, shared.row_places.second, head_dim);
    grid::gather_rows_async<kThreads>(shared.column_first, args.key, shared.column_places.first, head_dim);
    grid::gather_rows_async<kThreads>(shared.column_second, args.value, shared.column_places.second, head_dim);
    cuda::copy_async_commit();
    grid::load_query_terms(args, shared.row_places, shared);
    cuda::copy_async_wait<0>();
    // Publishes rows and numbers to all warps.
    __syncthreads();
    const bool has_work = grid::tokens_there<16>(shared.row_places.there, first_row, Shared::kTokens) != 0;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int column = columns.first + step * kStep;
      if (!has_work || column >= columns.end) continue;
      const uint32_t there = grid::tokens_there<kStep>(shared.column_places.there, column, columns.end);
      if (there == 0) continue;
      float weights[1][kStep / 8][4], d_scores[1][kStep / 8][4];
      grid::differentiate<false>(args, shared, first_row, column, there, weights, d_scores);
#pragma unroll
      for (int n = 0; n < kStep / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) sums[step][n][e] += d_scores[0][n][e];
      }
    }
    // Tells all threads that the tiles have been used and the next ones may overwrite them.
    __syncthreads();
  }
  // Step 5.
  const int g = lane_id() / 4, t = lane_id() % 4;
  const uint32_t group = geometry.max_tokens;
  const uint32_t piece = first_piece + static_cast<uint32_t>(columns.first / geometry.slot_tokens);
  float* piece_sums = args.bias_sums + (static_cast<int64_t>(piece) * geometry.num_heads + blockIdx.y) * group *
                                           static_cast<int64_t>(group);
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
#pragma unroll
    for (int n = 0; n < kStep / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int column = step * kStep + n * 8 + 2 * t + e % 2;
        const uint32_t query = row_tile * kTokens + static_cast<uint32_t>(first_row - columns.first + e / 2 * 8 + g);
        const uint32_t key = column_tile * kTokens + static_cast<uint32_t>(column);
        if (column < geometry.slot_tokens && query < group && key < group) {
          piece_sums[static_cast<int64_t>(query) * group + key] = sums[step][n][e];
        }
      }
    }
  }
}

}  // namespace topgather
