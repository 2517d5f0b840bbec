// The dense micro-kernel's register tiles. Compiled once per target; see tile_gemm.h.
#include "tile_gemm.h"

#include "intrinsics.h"

namespace topgather::TOPGATHER_CPU_TARGET {
namespace {

// Vectors of operands, and their products added to a vector of sums.
inline Vector<float> load_operands(const float* source) { return load<float>(source); }
inline Vector<float> broadcast_operand(const float* source) { return broadcast<float>(*source); }
// Not on targets of bfloat16 alone, which compute in float32.
[[maybe_unused]] inline Vector<double> load_operands(const double* source) { return load<double>(source); }
[[maybe_unused]] inline Vector<double> broadcast_operand(const double* source) { return broadcast<double>(*source); }

template <typename V>
inline V add_product(const V& sum, const V& a, const V& b) {
  return sum + a * b;
}

#if TOPGATHER_PAIR_PRODUCTS
inline PairVector load_operands(const BFloat16Pair* source) { return load_pairs(source); }
inline PairVector broadcast_operand(const BFloat16Pair* source) { return broadcast_pair(source); }
inline Vector<float> add_product(const Vector<float>& sum, const PairVector& a, const PairVector& b) {
  return add_pair_products(sum, a, b);
}
#endif

template <bool kAccumulate, bool kUnitColumn, int kRows, int kVectors, typename T, typename Operand>
inline void gemm_register_tile(const GemmOperands<T, Operand>& op, int64_t row, int64_t column) {
  constexpr bool kHasFactor = !std::is_same_v<T, Operand>;
  Vector<T> sum[kRows][kVectors];
  T* c = op.c + row * op.c_row + column;
  const int64_t a_row = op.a_row;
  const int64_t a_col = kUnitColumn ? 1 : op.a_col;
  const Operand* a = op.a + row * a_row;
  const Operand* b = op.b + column;
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      sum[i][v] = kAccumulate && !kHasFactor ? load<T>(c + i * op.c_row + v * kLanes<T>) : Vector<T>{};
    }
  }
  for (int64_t k = 0; k < op.depth; ++k) {
    decltype(load_operands(b)) b_vector[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) b_vector[v] = load_operands(b + v * kLanes<T>);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const auto a_vector = broadcast_operand(a + i * a_row);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[i][v] = add_product(sum[i][v], a_vector, b_vector[v]);
    }
    a += a_col;
    b += op.b_row;
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      T* target = c + i * op.c_row + v * kLanes<T>;
      if constexpr (kHasFactor) sum[i][v] *= op.factor;
      if constexpr (kHasFactor && kAccumulate) sum[i][v] += load<T>(target);
      store<T>(target, sum[i][v]);
    }
  }
}

template <bool kAccumulate, bool kUnitColumn, int kVectors, typename T, typename Operand>
inline void gemm_column_panel(const GemmOperands<T, Operand>& op, int64_t num_rows, int64_t column) {
  constexpr int kRows = rows_per_tile(kVectors);
  int64_t row = 0;
  for (; row + kRows <= num_rows; row += kRows) {
    gemm_register_tile<kAccumulate, kUnitColumn, kRows, kVectors>(op, row, column);
  }
  for (; row + 4 <= num_rows; row += 4) gemm_register_tile<kAccumulate, kUnitColumn, 4, kVectors>(op, row, column);
  for (; row + 2 <= num_rows; row += 2) gemm_register_tile<kAccumulate, kUnitColumn, 2, kVectors>(op, row, column);
  for (; row < num_rows; ++row) gemm_register_tile<kAccumulate, kUnitColumn, 1, kVectors>(op, row, column);
}

template <bool kAccumulate, bool kUnitColumn, typename T, typename Operand>
inline void gemm_all_panels(const GemmOperands<T, Operand>& op, int64_t num_rows, int64_t num_columns) {
  int64_t num_vectors = num_columns / kLanes<T>;
  int64_t column = 0;
  while (num_vectors > 0) {
    // Five columns go as 3 + 2, not 4 + 1: a one-vector panel spends a load per multiplication.
    const int64_t width = num_vectors == kMaxVectorsPerTile + 1 ? num_vectors - 2
                          : num_vectors < kMaxVectorsPerTile    ? num_vectors
                                                                : kMaxVectorsPerTile;
    switch (width) {
      case 1: gemm_column_panel<kAccumulate, kUnitColumn, 1>(op, num_rows, column); break;
      case 2: gemm_column_panel<kAccumulate, kUnitColumn, 2>(op, num_rows, column); break;
      case 3: gemm_column_panel<kAccumulate, kUnitColumn, 3>(op, num_rows, column); break;
      default:
        if constexpr (kMaxVectorsPerTile >= 4) {
          gemm_column_panel<kAccumulate, kUnitColumn, 4>(op, num_rows, column);
        }
    }
    column += width * kLanes<T>;
    num_vectors -= width;
  }
}

}  // namespace

template <bool kAccumulate, typename T, typename Operand>
void tile_gemm(const GemmOperands<T, Operand>& op, int64_t num_rows, int64_t num_columns) {
  if (op.a_col == 1) {
    gemm_all_panels<kAccumulate, true>(op, num_rows, num_columns);
  } else {
    gemm_all_panels<kAccumulate, false>(op, num_rows, num_columns);
  }
}

template void tile_gemm<false>(const GemmOperands<float>&, int64_t, int64_t);
template void tile_gemm<true>(const GemmOperands<float>&, int64_t, int64_t);
#if TOPGATHER_PAIR_PRODUCTS
template void tile_gemm<false>(const GemmOperands<float, BFloat16Pair>&, int64_t, int64_t);
template void tile_gemm<true>(const GemmOperands<float, BFloat16Pair>&, int64_t, int64_t);
#elif !TOPGATHER_MATRIX_UNIT  // targets of bfloat16 alone compute in float32
template void tile_gemm<false>(const GemmOperands<double>&, int64_t, int64_t);
template void tile_gemm<true>(const GemmOperands<double>&, int64_t, int64_t);
#endif

}  // namespace topgather::TOPGATHER_CPU_TARGET
