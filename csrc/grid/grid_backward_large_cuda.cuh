// The gradient of queries of grid and window attention on CUDA for groups of more than the tokens that
// grid_unit_gradients takes as a whole (grid_backward_units_cuda.cuh), 16-bit types and head_dim up to 64:
// grid_token_gradients with 32 queries a warp and tiles of keys copied ahead. grid_backward_cuda.cuh has the plan.
//
// A thread block owns 128 tokens of one unit. What bounds the kernel is shared memory: a fragment of keys that is
// loaded meets two tiles of queries. No place is kept, addresses are made of tokens' numbers (grid_geometry_cuda.cuh).
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
    ColumnTile key;
    ColumnTile value;
  };

  RowTile query;
  RowTile grad_out;
  Stage stages[2];
  // Of the queries:
  float largest[kTokens];  // of softmax terms
  float factor[kTokens];   // of softmax terms
  float shift[kTokens];
  // Of the thread block's unit:
  const char* key;
  const char* value;
  uint32_t num_rows;
  uint32_t num_columns;
  uint32_t head;
};

namespace grid {

// Steps 3 and 4 of a warp's 32 rows and the columns of a stage. first_row is counted in the tile, first_number in the
// unit, as first_column is.
template <typename Element, typename Shared, int kN>
__device__ __forceinline__ void differentiate_large(const GridBackwardArguments& args, Shared& shared, int stage_idx,
                                                    int first_row, uint32_t first_number, uint32_t first_column,
                                                    uint32_t rows_there, float (&grad_query)[2][kN][4]) {
  using RowTile = typename Shared::RowTile;
  using ColumnTile = typename Shared::ColumnTile;
  constexpr int kStep = Shared::Tiles::kQueryStep, kBlocks = kStep / 8;
  constexpr uint32_t kAll = 0xffffffffu >> (32 - kStep);
  const int g = lane_id() / 4, t = lane_id() % 4;
  auto& stage = shared.stages[stage_idx];
#pragma unroll 1
  for (int column = 0; column < Shared::kColumns; column += kStep) {
    const uint32_t number = first_column + static_cast<uint32_t>(column);
    const uint32_t there = tokens_there<32>(args.geometry, shared.num_rows, shared.num_columns, number) & kAll;
    if (there == 0) continue;
    float weights[2][kBlocks][4], d_scores[2][kBlocks][4];
    cuda::fill(weights, 0.0f);
    cuda::multiply_all_rows<RowTile, ColumnTile, Element>(weights, cuda::left_operand(shared.query, first_row),
                                                          cuda::right_operand_by_rows(stage.key, column));
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
        const float* bias = args.bias + shared.head * group * group + row * group;
#pragma unroll
        for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            float& score = weights[h / 2][n][h % 2 * 2 + e];
            const int64_t other = static_cast<int64_t>(number) + n * 8 + 2 * t + e;
            if ((mine >> (n * 8 + e) & 1u) != 0) score = fmaf(bias[other], kLog2E, score);
          }
        }
      }
    }
    cuda::fill(d_scores, 0.0f);
    cuda::multiply_all_rows<RowTile, ColumnTile, Element>(d_scores, cuda::left_operand(shared.grad_out, first_row),
                                                          cuda::right_operand_by_rows(stage.value, column));
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int query = first_row + m * 16 + e / 2 * 8 + g;
          float& weight = weights[m][n][e];
          weight = cuda::exp2_approximate(weight - shared.largest[query]) * shared.factor[query];
          d_scores[m][n][e] = weight * (d_scores[m][n][e] - shared.shift[query]);
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
            if (!is_there) d_scores[m][n][e] = 0.0f;
          }
        }
      }
    }
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) d_scores[m][n][e] *= args.d_score_scale;
      }
    }
    cuda::multiply_registers<Element>(grad_query, d_scores, stage.key, column, ColumnTile::kColumns, kStep);
  }
}

}  // namespace grid

template <typename Element, int kHeadDim>
__global__ void __launch_bounds__(GridLargeBackwardSharedMemory<Element, kHeadDim>::kThreads, 2)
    grid_large_gradients(const GridBackwardArguments args) {
  using Shared = GridLargeBackwardSharedMemory<Element, kHeadDim>;
  constexpr uint32_t kTokens = Shared::kTokens, kColumns = Shared::kColumns;
  constexpr int kBytes = sizeof(Element);
  Shared& shared = *reinterpret_cast<Shared*>(cuda::dynamic_shared_memory());
  const GridGeometry& geometry = args.geometry;
  const uint32_t unit_number = blockIdx.x / geometry.num_tiles;
  const uint32_t first_token = (blockIdx.x - unit_number * geometry.num_tiles) * kTokens;
  // Step 1.
  {
    const grid::Unit unit = grid::find_unit(geometry, unit_number);
    if (threadIdx.x == 0) {
      shared.key = grid::first_row_of(args.key, unit, kBytes);
      shared.value = grid::first_row_of(args.value, unit, kBytes);
      shared.num_rows = unit.num_rows;
      shared.num_columns = unit.num_columns;
      shared.head = unit.head;
    }
    grid::gather_unit_async<Shared::kThreads, 2>(
        geometry, unit.num_rows, unit.num_columns, first_token, {&shared.query, &shared.grad_out},
        {grid::first_row_of(args.query, unit, kBytes), grid::first_row_of(args.grad_out, unit, kBytes)},
        {args.query_steps, args.grad_out_steps});
    const int mine = static_cast<int>(threadIdx.x);
    const uint32_t number = first_token + static_cast<uint32_t>(mine);
    const grid::TokenOfUnit token = grid::token_of_unit(geometry, unit.num_rows, unit.num_columns, number);
    const grid::Token in_image{token.is_there,
                               unit.batch,
                               unit.head,
                               unit.first_row + token.row * geometry.rows.token_step,
                               unit.first_column + token.column * geometry.columns.token_step,
                               number};
    grid::load_terms_of(args, token.is_there, grid::number_offset(geometry, in_image), shared, mine);
  }
  // Publishes the unit to all threads, which leave it there: registers are scarce.
  __syncthreads();
  const auto gather_keys = [&](uint32_t key) {
    auto& stage = shared.stages[key / kColumns % 2];
    grid::gather_unit_async<Shared::kThreads, 2>(geometry, shared.num_rows, shared.num_columns, key,
                                                 {&stage.key, &stage.value}, {shared.key, shared.value},
                                                 {args.key_steps, args.value_steps});
    cuda::copy_async_commit();
  };
  // Step 2. Keys are copied one stage ahead.
  gather_keys(0);
  const int first_row = warp_id() * 2 * cuda::kBlockRows;
  const uint32_t first_number = first_token + static_cast<uint32_t>(first_row);
  const uint32_t rows_there = grid::tokens_there<32>(geometry, shared.num_rows, shared.num_columns, first_number);
  float grad_query[2][kHeadDim / 8][4];
  cuda::fill(grad_query, 0.0f);
#pragma unroll 1
  for (uint32_t first_column = 0; first_column < geometry.max_tokens; first_column += kColumns) {
    cuda::copy_async_wait<0>();
    // Publishes the keys' rows, and the first time rows and terms of the queries, to all warps; tells all threads that
    // the stage before has been used and may be overwritten.
    __syncthreads();
    if (first_column + kColumns < geometry.max_tokens) gather_keys(first_column + kColumns);
    if (rows_there == 0) continue;
    grid::differentiate_large<Element>(args, shared, static_cast<int>(first_column / kColumns % 2), first_row,
                                       first_number, first_column, rows_there, grad_query);
  }
  // Step 5.
  if (rows_there == 0) return;
  const grid::Unit unit = grid::find_unit(geometry, unit_number);
  const grid::TokenOfUnit token =
      grid::token_of_unit(geometry, unit.num_rows, unit.num_columns, first_number + static_cast<uint32_t>(lane_id()));
  const int64_t first = grid::first_offset_of(args.grad_query, unit, kBytes);
  const grid::RowsOfLanes rows{
      token.is_there ? first + static_cast<int64_t>(args.grad_query_steps.to(token)) : grid::kNotThere, first_row};
  const float factors[4] = {args.gradient_scale, args.gradient_scale, args.gradient_scale, args.gradient_scale};
  grid::write_rows(grad_query, factors, shared.query, first_row, args.grad_query, args.is_query_aligned, rows,
                   geometry.head_dim);
}

}  // namespace topgather
