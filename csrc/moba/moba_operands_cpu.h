// What the products of block attention are made of: numbers of the compute type, or, for bfloat16 on targets that
// multiply them in vector registers, pairs of bfloat16 numbers, each two consecutive terms of a sum. Such a target makes
// a product in half the steps, takes rows of queries, keys and values without converting them, and rounds weights and
// gradients of scores to bfloat16.
//
// In tile_gemm's words: rows as A have a sum's terms side by side, so that pairs are words of the rows themselves; rows
// as B have them below each other, so that two rows are interleaved, for keys and values once a block.
#pragma once

#include "../cpu/attention_tile.h"
#include "../cpu/convert.h"
#include "../cpu/intrinsics.h"
#include "../cpu/tile_gemm.h"

namespace topgather::TOPGATHER_CPU_TARGET {

template <typename Storage>
struct Operands {
  using T = ComputeOf<Storage>;
  using Type = T;
  static constexpr bool kArePairs = false;

  static int64_t count(int64_t num_terms) { return num_terms; }

  // Consecutive rows.
  static RowBlock<T> rows_as_a(const Storage* source, int64_t row_stride, int64_t num_rows, int64_t depth, T* scratch) {
    return dense_rows(source, row_stride, num_rows, depth, depth, scratch);
  }
  static RowBlock<T> rows_as_b(const Storage* source, int64_t row_stride, int64_t num_rows, int64_t depth,
                               int64_t padded_depth, T* scratch) {
    return dense_rows(source, row_stride, num_rows, depth, padded_depth, scratch);
  }
  // The same rows as A; rows_as_b have been made of them.
  static RowBlock<T> rows_as_a_too(const Storage*, int64_t, int64_t, int64_t, const RowBlock<T>& rows_as_b, T*) {
    return rows_as_b;
  }
  // Of rows as B, made of num_rows rows, those from `first` on for a sum of num_terms.
  static RowBlock<T> rows_of_b(const RowBlock<T>& rows, int64_t, const Storage*, int64_t, int64_t first, int64_t,
                               int64_t, T*) {
    return {rows.data + first * rows.row_stride, rows.row_stride};
  }

  // Scattered rows: as columns of B, [count(depth), tile_row], times a factor that products must not have again, and as
  // rows of B, [count(num_rows), padded_depth].
  static void gather_columns(const Storage* source, int64_t row_stride, const int32_t* row_idx, int64_t num_rows,
                             int64_t depth, T factor, T* tile, int64_t tile_row) {
    gather_transposed(source, row_stride, row_idx, num_rows, depth, factor, tile, tile_row);
  }
  static void gather_as_b(const Storage* source, int64_t row_stride, const int32_t* row_idx, int64_t num_rows,
                          int64_t depth, int64_t padded_depth, T* tile) {
    gather_rows(source, row_stride, row_idx, num_rows, depth, padded_depth, tile, padded_depth);
  }
  static constexpr T product_factor(T) { return 1; }

  // A tile of numbers [num_rows, tile_row] as A, sums along its rows or down its columns.
  static const T* along_rows(const T* tile, int64_t, int64_t, int64_t, T*) { return tile; }
  static const T* down_columns(const T* tile, int64_t, int64_t, int64_t, T*) { return tile; }
};

#if TOPGATHER_PAIR_PRODUCTS

template <>
struct Operands<BFloat16> {
  using Type = BFloat16Pair;
  static constexpr bool kArePairs = true;

  static int64_t count(int64_t num_terms) { return ceil_div(num_terms, 2); }

  // As they lie where pairs fill them, else a copy with a zero behind.
  static RowBlock<BFloat16Pair> rows_as_a(const BFloat16* source, int64_t row_stride, int64_t num_rows, int64_t depth,
                                          BFloat16Pair* scratch) {
    if (depth % 2 == 0 && row_stride % 2 == 0) return {reinterpret_cast<const BFloat16Pair*>(source), row_stride / 2};
    for (int64_t i = 0; i < num_rows; ++i) {
      for (int64_t p = 0; p < count(depth); ++p)
        scratch[i * count(depth) + p] = pair_of(source + i * row_stride, p, depth);
    }
    return {scratch, count(depth)};
  }
  static RowBlock<BFloat16Pair> rows_as_b(const BFloat16* source, int64_t row_stride, int64_t num_rows, int64_t depth,
                                          int64_t padded_depth, BFloat16Pair* scratch) {
    pack_row_pairs(source, row_stride, num_rows, round_up(num_rows, 2), depth, padded_depth, scratch, padded_depth);
    return {scratch, padded_depth};
  }
  static RowBlock<BFloat16Pair> rows_as_a_too(const BFloat16* source, int64_t row_stride, int64_t num_rows,
                                              int64_t depth, const RowBlock<BFloat16Pair>&, BFloat16Pair* scratch) {
    return rows_as_a(source, row_stride, num_rows, depth, scratch);
  }
  // Interleaved anew where one row of a pair is outside: times a weight of 0 it might make NaN.
  static RowBlock<BFloat16Pair> rows_of_b(const RowBlock<BFloat16Pair>& rows, int64_t num_rows, const BFloat16* source,
                                          int64_t row_stride, int64_t first, int64_t num_terms, int64_t depth,
                                          BFloat16Pair* scratch) {
    if (first % 2 == 0 && (num_terms % 2 == 0 || first + num_terms == num_rows)) {
      return {rows.data + first / 2 * rows.row_stride, rows.row_stride};
    }
    return rows_as_b(source + first * row_stride, row_stride, num_terms, depth, rows.row_stride, scratch);
  }

  static void gather_columns(const BFloat16* source, int64_t row_stride, const int32_t* row_idx, int64_t num_rows,
                             int64_t depth, float, BFloat16Pair* tile, int64_t tile_row) {
    // Floats only carry the bits here; nothing computes with them.
    transpose_rows([&](int64_t i) { return source + row_idx[i] * row_stride; }, num_rows, count(depth), depth / 2,
                   [](const BFloat16* row, int64_t p) {
                     Vector<float> pairs;
                     std::memcpy(&pairs, row + 2 * p, sizeof(pairs));
                     return pairs;
                   },
                   [&](const BFloat16* row, int64_t p) { return bit_cast<float>(pair_of(row, p, depth)); },
                   reinterpret_cast<float*>(tile), tile_row);
  }
  static void gather_as_b(const BFloat16* source, int64_t row_stride, const int32_t* row_idx, int64_t num_rows,
                          int64_t depth, int64_t padded_depth, BFloat16Pair* tile) {
    for (int64_t i = 0; i < num_rows; i += 2) {
      const BFloat16* rows = source + row_idx[i] * row_stride;
      const int64_t to_odd = i + 1 < num_rows ? (row_idx[i + 1] - row_idx[i]) * row_stride : 0;
      pack_row_pairs(rows, to_odd, min64(2, num_rows - i), 2, depth, padded_depth, tile + i / 2 * padded_depth,
                     padded_depth);
    }
  }
  static constexpr float product_factor(float factor) { return factor; }

  // Rounded, into `target`, [num_rows, tile_row] and [count(num_rows), tile_row]; tile_row is a multiple of 32. Columns
  // are read up to a whole vector.
  static const BFloat16Pair* along_rows(const float* tile, int64_t tile_row, int64_t num_rows, int64_t num_columns,
                                        BFloat16Pair* target) {
    const bool is_last_alone = num_columns % 2 != 0;
    for (int64_t i = 0; i < num_rows; ++i) {
      for (int64_t column = 0; column < num_columns; column += 2 * kLanes<float>) {
        const float* source = tile + i * tile_row + column;
        const bool has_second = column + kLanes<float> < num_columns;
        store_bfloat16(reinterpret_cast<BFloat16*>(target + i * tile_row + column / 2), load<float>(source),
                       has_second ? load<float>(source + kLanes<float>) : Vector<float>{});
      }
      // What stands beside the last column may be infinite, and meets a row of zeros.
      if (is_last_alone) target[i * tile_row + num_columns / 2].second = {0};
    }
    return target;
  }
  static const BFloat16Pair* down_columns(const float* tile, int64_t tile_row, int64_t num_rows, int64_t num_columns,
                                          BFloat16Pair* target) {
    for (int64_t i = 0; i < num_rows; i += 2) {
      for (int64_t column = 0; column < num_columns; column += kLanes<float>) {
        const float* source = tile + i * tile_row + column;
        store<BFloat16Pair>(
            target + i / 2 * tile_row + column,
            round_to_pairs(load<float>(source), i + 1 < num_rows ? load<float>(source + tile_row) : Vector<float>{}));
      }
    }
    return target;
  }

 private:
  static BFloat16Pair pair_of(const BFloat16* row, int64_t p, int64_t depth) {
    return {row[2 * p], 2 * p + 1 < depth ? row[2 * p + 1] : BFloat16{0}};
  }
};

#endif

template <typename Storage>
using OperandOf = typename Operands<Storage>::Type;

}  // namespace topgather::TOPGATHER_CPU_TARGET
