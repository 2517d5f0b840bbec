// Products of tiles of 16-bit elements whose sizes are known when they are compiled: no branch between two products, and
// one register for all addresses that one exchange of bits and an offset make of it. tile_math.cuh has the layout of
// results, and products of sizes known only at run time.
#pragma once

#include "tile_math.cuh"

namespace topgather::cuda {

// lane_id for code inside a loop whose registers are scarce.
__device__ __forceinline__ int lane_here() { return thread_index_here() % kLanes; }

// Where a warp's matrix loads of a tile start, as the left operand A [16 rows.., depth] or the right one, of which the
// product takes B^T [8 columns.., depth] or B [depth, columns]; kIsTransposed: A is a tile's transpose. First rows are
// multiples of 16; first columns, of as many columns as the product takes.
template <typename Tile>
__device__ __forceinline__ SharedRow left_operand(Tile& tile, int first_row) {
  return shared_row(tile.chunk(first_row + lane_here() % 16, lane_here() / 16));
}
template <typename Tile>
__device__ __forceinline__ SharedRow left_transposed_operand(Tile& tile, int first_column) {
  const int lane = lane_here();
  return shared_row(tile.chunk(lane / 16 * 8 + lane % 8, first_column / 8 + lane / 8 % 2));
}
template <typename Tile>
__device__ __forceinline__ SharedRow right_operand_by_rows(Tile& tile, int first_row) {
  const int lane = lane_here();
  return shared_row(tile.chunk(first_row + lane / 16 * 8 + lane % 8, lane / 8 % 2));
}
template <typename Tile>
__device__ __forceinline__ SharedRow right_operand_by_columns(Tile& tile, int first_column) {
  return shared_row(tile.chunk(lane_here() % 16, first_column / 8 + lane_here() / 16));
}

// The operands of a step of 16 in depth.
template <int kM, int kN>
struct Operands {
  uint32_t left[kM][4];
  uint32_t right[kN / 2][4];
};

template <typename Element, int kM, int kN>
__device__ __forceinline__ void multiply_step(float (&c)[kM][kN][4], const Operands<kM, kN>& operands) {
#pragma unroll
  for (int n = 0; n < kN / 2; ++n) {
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      multiply_accumulate<Element>(c[m][2 * n], operands.left[m], operands.right[n][0], operands.right[n][1]);
      multiply_accumulate<Element>(c[m][2 * n + 1], operands.left[m], operands.right[n][2], operands.right[n][3]);
    }
  }
}

// c += the products of kSteps steps.
template <typename Element, int kSteps, int kM, int kN, typename Load>
__device__ __forceinline__ void multiply_steps(float (&c)[kM][kN][4], const Load& load) {
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {
    Operands<kM, kN> operands;
    load(k, operands);
    multiply_step<Element>(c, operands);
  }
}

// c += A B^T over all columns of the tiles. bytes_on: the operands' tiles lie so far behind the ones they were made of.
template <typename TileA, typename TileB, typename Element, int kM, int kN>
__device__ __forceinline__ void multiply_all_rows(float (&c)[kM][kN][4], SharedRow a, SharedRow b,
                                                  uint32_t a_bytes_on = 0, uint32_t b_bytes_on = 0) {
  multiply_steps<Element, TileA::kColumns / 16>(c, [&](int k, Operands<kM, kN>& operands) {
#pragma unroll
    for (int m = 0; m < kM; ++m) load_matrix_x4(operands.left[m], TileA::further_here(a, k * 2, m * 16, a_bytes_on));
#pragma unroll
    for (int n = 0; n < kN / 2; ++n) {
      load_matrix_x4(operands.right[n], TileB::further_here(b, k * 2, n * 16, b_bytes_on));
    }
  });
}

// c += A B over all columns of A's tile, or all rows where it is transposed.
template <bool kIsTransposed, typename TileA, typename TileB, typename Element, int kM, int kN>
__device__ __forceinline__ void multiply_all_columns(float (&c)[kM][kN][4], SharedRow a, SharedRow b,
                                                     uint32_t a_bytes_on = 0, uint32_t b_bytes_on = 0) {
  multiply_steps<Element, (kIsTransposed ? TileA::kRows : TileA::kColumns) / 16>(
      c, [&](int k, Operands<kM, kN>& operands) {
#pragma unroll
        for (int m = 0; m < kM; ++m) {
          if constexpr (kIsTransposed) {
            load_matrix_x4_transposed(operands.left[m], TileA::further_here(a, m * 2, k * 16, a_bytes_on));
          } else {
            load_matrix_x4(operands.left[m], TileA::further_here(a, k * 2, m * 16, a_bytes_on));
          }
        }
#pragma unroll
        for (int n = 0; n < kN / 2; ++n) {
          load_matrix_x4_transposed(operands.right[n], TileB::further_here(b, n * 2, k * 16, b_bytes_on));
        }
      });
}

}  // namespace topgather::cuda
