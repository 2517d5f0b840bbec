// The dense micro-kernel every CPU op stands on.
//
//   C[i][j] (+)= sum_k A(i, k) * B[k][j],   A(i, k) = a[i * a_row + k * a_col]
//
// A is read one element at a time and broadcast, so it may be row-major or transposed at no cost and needs no
// packing; B and C are row-major and as wide as a whole number of vectors. A register tile of kRows x kVectors
// vectors of C stays in registers over the whole of k. The sum over k runs in ascending order, whatever the tile
// shape, so a result does not depend on how rows were grouped. Defined in tile_gemm.cpp, once for all ops of a target.
#pragma once

#include "simd.h"

namespace topgather::TOPGATHER_CPU_TARGET {

// Rows of C per register tile of `num_vectors` columns: as many as leave registers for B's vectors and a broadcast.
constexpr int rows_per_tile(int num_vectors) {
  if (kNumVectorRegisters == 32) return num_vectors == 4 ? 6 : num_vectors == 3 ? 8 : 12;
  return num_vectors == 3 ? 4 : num_vectors == 2 ? 6 : 8;
}
inline constexpr int kMaxVectorsPerTile = kNumVectorRegisters == 32 ? 4 : 3;

template <typename T, typename Operand = T>
struct GemmOperands {
  const Operand* a;  // [rows, depth] by strides
  int64_t a_row;     // elements between rows of A
  int64_t a_col;     // elements between columns of A
  const Operand* b;  // [depth, columns]
  int64_t b_row;
  T* c;  // [rows, columns]
  int64_t c_row;
  int64_t depth;
  T factor = 1;  // of pairs: what sums are multiplied with
};

// num_columns must be a multiple of kLanes<T>; C is overwritten, or added to where kAccumulate. T is float or double,
// and Operand the same or, for T = float where the target multiplies them, BFloat16Pair: then depth counts pairs.
template <bool kAccumulate, typename T, typename Operand>
void tile_gemm(const GemmOperands<T, Operand>& op, int64_t num_rows, int64_t num_columns);

// Rows that tile_gemm takes at once for so many columns.
template <typename T>
constexpr int64_t rows_at_once(int64_t num_columns) {
  return rows_per_tile(static_cast<int>(min64(num_columns / kLanes<T>, kMaxVectorsPerTile)));
}

// tile_gemm, with prefetch() called each time some rows are done: of hundreds of prefetches in a row the processor
// would stall.
template <bool kAccumulate, typename T, typename Operand, typename Prefetch>
inline void tile_gemm_prefetching(const GemmOperands<T, Operand>& op, int64_t num_rows, int64_t num_columns,
                                  const Prefetch& prefetch) {
  const int64_t step = rows_at_once<T>(num_columns);
  for (int64_t row = 0; row < num_rows; row += step) {
    GemmOperands<T, Operand> part = op;
    part.a += row * op.a_row;
    part.c += row * op.c_row;
    tile_gemm<kAccumulate>(part, min64(step, num_rows - row), num_columns);
    prefetch();
  }
}

}  // namespace topgather::TOPGATHER_CPU_TARGET
