// The backward of grid and window attention on CUDA for groups of more than a tile, 16-bit types and head_dim up to 64:
// grid_token_gradients with 32 rows a warp and tiles of columns copied ahead. grid_backward_cuda.cuh has the plan.
//
// A thread block owns 128 tokens of one unit. What bounds the kernels is shared memory: a fragment of columns that is
// loaded meets two tiles of rows. No place is kept, addresses are made of tokens' numbers (grid_geometry_cuda.cuh).
#pragma once

#include "grid_backward_cuda.cuh"

namespace topgather {

template <typename Element, int kHeadDim>
struct GridLargeBackwardSharedMemory {
  using Tiles = GridLargeTiles<kHeadDim>;
  static constexpr int kTokens = Tiles::kTokens;
  static constexpr int kColumns = Tiles::kBackwardColumns;
  static constexpr int kThreads = Tiles::kWarps * kLanes;
  using RowTile = cuda::SharedTile<Element, kTokens, kHeadDim>;
  using ColumnTile = cuda::SharedTile<Element, kColumns, kHeadDim>;
  struct Stage {
    ColumnTile first;   // query or key
    ColumnTile second;  // grad_out or value
  };

  RowTile row_first;   // key or query
  RowTile row_second;  // value or grad_out
  Stage stages[2];
  // Of the side that is queries, the columns' by stage:
  float largest[2][kTokens];  // of softmax terms
  float factor[2][kTokens];   // of softmax terms
  float shift[2][kTokens];
  // Of the thread block's unit:
  const char* column_first;
  const char* column_second;
  int64_t first_number;  // where its first token's lse stands
  uint32_t num_rows;
  uint32_t num_columns;
  uint32_t head;
};

namespace grid {

// Softmax terms and shift of token `number` of the unit in shared memory.
template <typename Shared>
__device__ __forceinline__ TermsOfQuery terms_of_unit(const GridBackwardArguments& args, const Shared& shared,
                                                      uint32_t number) {
  const GridGeometry& geometry = args.geometry;
  const TokenOfUnit token = token_of_unit(geometry, shared.num_rows, shared.num_columns, number);
  const int64_t row = static_cast<int64_t>(token.row * geometry.rows.token_step) * geometry.columns.size;
  return terms_of(args, token.is_there, shared.first_number + row + token.column * geometry.columns.token_step);
}

// Steps 3 and 4 of a warp's 32 rows and the columns of a stage. first_row is counted in the tile, first_number in the
// unit, as first_column is.
template <bool kAreRowsKeys, typename Element, typename Shared, int kN, int kSecond>
__device__ __forceinline__ void differentiate_large(const GridBackwardArguments& args, Shared& shared, int stage_idx,
                                                    int first_row, uint32_t first_number, uint32_t first_column,
                                                    uint32_t rows_there, float (&grad_first)[2][kN][4],
                                                    float (&grad_second)[2][kSecond][4]) {
  using RowTile = typename Shared::RowTile;
  using ColumnTile = typename Shared::ColumnTile;
  constexpr int kStep = kAreRowsKeys ? Shared::Tiles::kKeyStep : Shared::Tiles::kQueryStep, kBlocks = kStep / 8;
  constexpr uint32_t kAll = 0xffffffffu >> (32 - kStep);
  const int g = lane_id() / 4, t = lane_id() % 4;
  auto& stage = shared.stages[stage_idx];
  const int terms = kAreRowsKeys ? stage_idx : 0;
#pragma unroll 1
  for (int column = 0; column < Shared::kColumns; column += kStep) {
    const uint32_t number = first_column + static_cast<uint32_t>(column);
    const uint32_t there = tokens_there<32>(args.geometry, shared.num_rows, shared.num_columns, number) & kAll;
    if (there == 0) continue;
    float weights[2][kBlocks][4], d_scores[2][kBlocks][4];
    cuda::fill(weights, 0.0f);
    cuda::multiply_all_rows<RowTile, ColumnTile, Element>(weights, cuda::left_operand(shared.row_first, first_row),
                                                          cuda::right_operand_by_rows(stage.first, column));
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) weights[m][n][e] = cuda::scale_score(weights[m][n][e], args.score_scale);
      }
    }
    const uint32_t mine = there >> 2 * t;
    if (args.bias != nullptr) {
      const int64_t group = args.geometry.max_tokens;
#pragma unroll
      for (int h = 0; h < 4; ++h) {
        const int64_t row = first_number + h * 8 + g;
        if ((rows_there >> (h * 8 + g) & 1u) == 0) continue;
        const float* bias = args.bias + shared.head * group * group + row * (kAreRowsKeys ? 1 : group);
#pragma unroll
        for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            float& score = weights[h / 2][n][h % 2 * 2 + e];
            const int64_t other = static_cast<int64_t>(number) + n * 8 + 2 * t + e;
            if ((mine >> (n * 8 + e) & 1u) != 0) score = fmaf(bias[other * (kAreRowsKeys ? group : 1)], kLog2E, score);
          }
        }
      }
    }
    cuda::fill(d_scores, 0.0f);
    cuda::multiply_all_rows<RowTile, ColumnTile, Element>(d_scores, cuda::left_operand(shared.row_second, first_row),
                                                          cuda::right_operand_by_rows(stage.second, column));
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int query = kAreRowsKeys ? column + n * 8 + 2 * t + e % 2 : first_row + m * 16 + e / 2 * 8 + g;
          float& weight = weights[m][n][e];
          weight = cuda::exp2_approximate(weight - shared.largest[terms][query]) * shared.factor[terms][query];
          d_scores[m][n][e] = weight * (d_scores[m][n][e] - shared.shift[terms][query]);
        }
      }
    }
    if (there != kAll || rows_there != 0xffffffffu) {
#pragma unroll
      for (int m = 0; m < 2; ++m) {
#pragma unroll
        for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const bool is_there =
                (mine >> (n * 8 + e % 2) & 1u) != 0 && (rows_there >> (m * 16 + e / 2 * 8 + g) & 1u) != 0;
            if (!is_there) weights[m][n][e] = d_scores[m][n][e] = 0.0f;
          }
        }
      }
    }
    if constexpr (kAreRowsKeys) {
      cuda::multiply_registers<Element>(grad_second, weights, stage.second, column, ColumnTile::kColumns, kStep);
    }
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) d_scores[m][n][e] *= args.d_score_scale;
      }
    }
    cuda::multiply_registers<Element>(grad_first, d_scores, stage.first, column, ColumnTile::kColumns, kStep);
  }
}

}  // namespace grid

template <typename Element, int kHeadDim, bool kAreRowsKeys>
__global__ void __launch_bounds__(GridLargeBackwardSharedMemory<Element, kHeadDim>::kThreads, 2)
    grid_large_gradients(const GridBackwardArguments args) {
  using Shared = GridLargeBackwardSharedMemory<Element, kHeadDim>;
  constexpr uint32_t kTokens = Shared::kTokens, kColumns = Shared::kColumns;
  constexpr int kBytes = sizeof(Element);
  Shared& shared = *reinterpret_cast<Shared*>(cuda::dynamic_shared_memory());
  const GridGeometry& geometry = args.geometry;
  const uint32_t unit_number = blockIdx.x / geometry.num_tiles;
  const uint32_t first_token = (blockIdx.x - unit_number * geometry.num_tiles) * kTokens;
  const ConstImage& row_first = kAreRowsKeys ? args.key : args.query;
  const ConstImage& row_second = kAreRowsKeys ? args.value : args.grad_out;
  const ConstImage& column_first = kAreRowsKeys ? args.query : args.key;
  const ConstImage& column_second = kAreRowsKeys ? args.grad_out : args.value;
  // Step 1.
  {
    const grid::Unit unit = grid::find_unit(geometry, unit_number);
    if (threadIdx.x == 0) {
      shared.column_first = grid::first_row_of(column_first, unit, kBytes);
      shared.column_second = grid::first_row_of(column_second, unit, kBytes);
      shared.num_rows = unit.num_rows;
      shared.num_columns = unit.num_columns;
      shared.head = unit.head;
      shared.first_number =
          grid::number_offset(geometry, grid::Token{true, unit.batch, unit.head, unit.first_row, unit.first_column, 0});
    }
    grid::gather_unit_async<Shared::kThreads, 2>(
        geometry, unit.num_rows, unit.num_columns, first_token, {&shared.row_first, &shared.row_second},
        {grid::first_row_of(row_first, unit, kBytes), grid::first_row_of(row_second, unit, kBytes)},
        {kAreRowsKeys ? args.key_steps : args.query_steps, kAreRowsKeys ? args.value_steps : args.grad_out_steps});
  }
  // Publishes the unit to all threads, which leave it there: registers are scarce.
  __syncthreads();
  const int mine = static_cast<int>(threadIdx.x);
  const auto gather_columns = [&](uint32_t column) {
    auto& stage = shared.stages[column / kColumns % 2];
    grid::gather_unit_async<Shared::kThreads, 2>(
        geometry, shared.num_rows, shared.num_columns, column, {&stage.first, &stage.second},
        {shared.column_first, shared.column_second},
        {kAreRowsKeys ? args.query_steps : args.key_steps, kAreRowsKeys ? args.grad_out_steps : args.value_steps});
    cuda::copy_async_commit();
  };
  const auto store_terms = [&](int stage, const grid::TermsOfQuery& terms) {
    shared.largest[stage][mine] = terms.softmax.largest;
    shared.factor[stage][mine] = terms.softmax.factor;
    shared.shift[stage][mine] = terms.shift;
  };
  const bool has_column = kAreRowsKeys && mine < static_cast<int>(kColumns);
  // Step 2. Columns are copied one stage ahead.
  gather_columns(0);
  if (has_column || !kAreRowsKeys) {
    store_terms(0, grid::terms_of_unit(args, shared, (kAreRowsKeys ? 0 : first_token) + static_cast<uint32_t>(mine)));
  }
  const int first_row = warp_id() * 2 * cuda::kBlockRows;
  const uint32_t first_number = first_token + static_cast<uint32_t>(first_row);
  const uint32_t rows_there = grid::tokens_there<32>(geometry, shared.num_rows, shared.num_columns, first_number);
  float grad_first[2][kHeadDim / 8][4];
  float grad_second[2][kAreRowsKeys ? kHeadDim / 8 : 1][4];
  cuda::fill(grad_first, 0.0f);
  cuda::fill(grad_second, 0.0f);
#pragma unroll 1
  for (uint32_t first_column = 0; first_column < geometry.max_tokens; first_column += kColumns) {
    cuda::copy_async_wait<0>();
    // Publishes the columns' rows and terms, and the first time those of the rows, to all warps; tells all threads that
    // the stage before has been used and may be overwritten.
    __syncthreads();
    const bool has_next = first_column + kColumns < geometry.max_tokens;
    grid::TermsOfQuery terms{};
    if (has_next) {
      gather_columns(first_column + kColumns);
      if (has_column) terms = grid::terms_of_unit(args, shared, first_column + kColumns + static_cast<uint32_t>(mine));
    }
    const int stage = static_cast<int>(first_column / kColumns % 2);
    if (rows_there != 0) {
      grid::differentiate_large<kAreRowsKeys, Element>(args, shared, stage, first_row, first_number, first_column,
                                                       rows_there, grad_first, grad_second);
    }
    if (has_next && has_column) store_terms(1 - stage, terms);
  }
  // Step 5.
  if (rows_there == 0) return;
  const grid::Unit unit = grid::find_unit(geometry, unit_number);
  const grid::TokenOfUnit token =
      grid::token_of_unit(geometry, unit.num_rows, unit.num_columns, first_number + static_cast<uint32_t>(lane_id()));
  const auto rows_of = [&](const MutableImage& image, const grid::TokenSteps& steps) {
    const int64_t first = grid::first_offset_of(image, unit, kBytes);
    return grid::RowsOfLanes{token.is_there ? first + static_cast<int64_t>(steps.to(token)) : grid::kNotThere,
                             first_row};
  };
  const float factors[4] = {args.gradient_scale, args.gradient_scale, args.gradient_scale, args.gradient_scale};
  grid::write_rows(grad_first, factors, shared.row_first, first_row, args.grad_first, args.is_first_aligned,
                   rows_of(args.grad_first, args.grad_first_steps), geometry.head_dim);
  if constexpr (kAreRowsKeys) {
    const float ones[4] = {1.0f, 1.0f, 1.0f, 1.0f};
    grid::write_rows(grad_second, ones, shared.row_second, first_row, args.grad_second, args.is_second_aligned,
                     rows_of(args.grad_second, args.grad_second_steps), geometry.head_dim);
  }
}

}  // namespace topgather
