// dtype conversion between storage types and the type a kernel computes in, and gathers of scattered rows into dense
// tiles.
#pragma once

#include "../common/dtype.h"
#include "intrinsics.h"

namespace topgather::TOPGATHER_CPU_TARGET {

// float64 computes in float64, everything else in float32.
template <typename Storage>
using ComputeOf = std::conditional_t<std::is_same_v<Storage, double>, double, float>;

inline float to_compute(float value) { return value; }
inline double to_compute(double value) { return value; }
inline float to_compute(BFloat16 value) { return bit_cast<float>(static_cast<uint32_t>(value.bits) << 16); }
inline float to_compute(Float16 value) {
#if defined(__aarch64__)
  return bit_cast<__fp16>(value);
#else
  const uint32_t magnitude = static_cast<uint32_t>(value.bits & 0x7fff) << 13;
  // Multiplying by 2^112 moves the exponent's bias and makes denormals normal in one step.
  const uint32_t finite = bit_cast<uint32_t>(bit_cast<float>(magnitude) * 0x1p112f);
  const uint32_t bits = (value.bits & 0x7c00) == 0x7c00 ? (magnitude | 0x7f800000u) : finite;
  return bit_cast<float>(bits | static_cast<uint32_t>(value.bits & 0x8000) << 16);
#endif
}

template <typename Storage>
inline Storage from_compute(ComputeOf<Storage> value) {
  if constexpr (std::is_same_v<Storage, BFloat16>) {
    const uint32_t bits = bit_cast<uint32_t>(value);
    const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;  // to nearest, ties to even
    const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
    return BFloat16{static_cast<uint16_t>(is_nan ? 0x7fc0u | bits >> 16 : rounded)};
  } else if constexpr (std::is_same_v<Storage, Float16>) {
#if defined(__aarch64__)
    return bit_cast<Float16>(static_cast<__fp16>(value));
#else
    const uint32_t bits = bit_cast<uint32_t>(value);
    const uint32_t magnitude = bits & 0x7fffffffu;
    const uint32_t normal = (magnitude + 0xfff + (magnitude >> 13 & 1) - (112u << 23)) >> 13;
    // Adding 1/2 puts a value below 2^-14 on float16's denormal grid, rounded to nearest even.
    const uint32_t denormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
    uint32_t result = magnitude < 0x38800000u ? denormal : normal;
    if (magnitude >= 0x47800000u) result = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
    return Float16{static_cast<uint16_t>(result | (bits >> 16 & 0x8000u))};
#endif
  } else {
    return value;
  }
}

template <typename Storage>
inline void load_row(const Storage* source, int64_t count, ComputeOf<Storage>* target) {
  for (int64_t i = 0; i < count; ++i) target[i] = to_compute(source[i]);
}

template <typename Storage>
inline void store_row(const ComputeOf<Storage>* source, int64_t count, ComputeOf<Storage> factor, Storage* target) {
  int64_t i = 0;
#if defined(__aarch64__)
  if constexpr (std::is_same_v<Storage, Float16>) {  // which gcc 12 does one by one
    for (; i + kLanes<float> <= count; i += kLanes<float>) {
      narrow_to_float16(load<float>(source + i) * factor, target + i);
    }
  }
#endif
  for (; i < count; ++i) target[i] = from_compute<Storage>(source[i] * factor);
}

// The same past the caches: a whole number of lines, and aligned to them. The caller calls finish_streaming().
template <typename T>
inline void stream_row(const T* source, int64_t count, T factor, T* target) {
  for (int64_t i = 0; i < count; i += kLanes<T>) stream<T>(target + i, load<T>(source + i) * factor);
}

template <typename Storage>
inline Vector<ComputeOf<Storage>> load_vector(const Storage* source) {
  using T = ComputeOf<Storage>;
  if constexpr (std::is_same_v<Storage, T>) {
    return load<T>(source);
#if defined(__aarch64__)
  } else if constexpr (std::is_same_v<Storage, Float16>) {
    return widen_float16(source);
#endif
  } else {
    T values[kLanes<T>];
    load_row(source, kLanes<T>, values);
    return load<T>(values);
  }
}

// tile[d * tile_row + i] = element d of row_of(i), for i < count and d < depth, as load_element(row, d) reads it, and
// load_vector_of(row, d) whole vectors of elements before readable_depth. Columns from count to the next whole vector
// repeat the last row, so that they hold nothing that was not in the input.
template <typename T, typename RowOf, typename LoadVector, typename LoadElement>
inline void transpose_rows(const RowOf& row_of, int64_t count, int64_t depth, int64_t readable_depth,
                           const LoadVector& load_vector_of, const LoadElement& load_element, T* tile,
                           int64_t tile_row) {
  constexpr int kWidth = kLanes<T>;
  for (int64_t first = 0; first < count; first += kWidth) {
    decltype(row_of(0)) rows[kWidth];
    for (int i = 0; i < kWidth; ++i) rows[i] = row_of(min64(first + i, count - 1));
    int64_t d = 0;
    for (; d + kWidth <= readable_depth; d += kWidth) {
      Vector<T> block[kWidth];
#pragma GCC unroll 16
      for (int i = 0; i < kWidth; ++i) block[i] = load_vector_of(rows[i], d);
      transpose_in_registers<T>(block);
#pragma GCC unroll 16
      for (int i = 0; i < kWidth; ++i) store<T>(tile + (d + i) * tile_row + first, block[i]);
    }
    for (; d < depth; ++d) {
      for (int i = 0; i < kWidth; ++i) tile[d * tile_row + first + i] = load_element(rows[i], d);
    }
  }
}

// tile[d * tile_row + i] = factor * row_of(i)[d], padded as above.
template <typename Storage, typename RowOf>
inline void gather_rows_transposed(const RowOf& row_of, int64_t count, int64_t depth, ComputeOf<Storage> factor,
                                   ComputeOf<Storage>* tile, int64_t tile_row) {
  transpose_rows(
      row_of, count, depth, depth, [&](const Storage* row, int64_t d) { return load_vector(row + d) * factor; },
      [&](const Storage* row, int64_t d) { return to_compute(row[d]) * factor; }, tile, tile_row);
}

// The same of source's rows row_idx[i].
template <typename Storage>
inline void gather_transposed(const Storage* source, int64_t row_stride, const int32_t* row_idx, int64_t count,
                              int64_t depth, ComputeOf<Storage> factor, ComputeOf<Storage>* tile, int64_t tile_row) {
  gather_rows_transposed<Storage>([&](int64_t i) { return source + row_idx[i] * row_stride; }, count, depth, factor,
                                  tile, tile_row);
}

// Scattered rows are too irregular for the hardware prefetcher.
template <typename Storage>
inline void prefetch_rows(const Storage* source, int64_t row_stride, const int32_t* row_idx, int64_t count,
                          int64_t depth) {
  constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(Storage));
  for (int64_t i = 0; i < count; ++i) {
    const Storage* row = source + row_idx[i] * row_stride;
    for (int64_t d = 0; d < depth; d += kLine) __builtin_prefetch(row + d);
  }
}

// The same a few rows at a time, num_steps times, and into the second-level cache: between the pieces of a product.
// Rows follow each other where row_idx is null.
template <typename Element>
class RowPrefetch {
 public:
  RowPrefetch(Element* source, int64_t row_stride, const int32_t* row_idx, int64_t count, int64_t depth,
              int64_t num_steps)
      : source_(source),
        row_stride_(row_stride),
        row_idx_(row_idx),
        count_(count),
        depth_(depth),
        rows_per_step_(ceil_div(count, num_steps)) {}

  void advance() {
    constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(Element));
    const int64_t num_rows = min64(count_ - done_, rows_per_step_);
    for (int64_t i = 0; i < num_rows; ++i) {
      Element* row = source_ + (row_idx_ == nullptr ? done_ + i : row_idx_[done_ + i]) * row_stride_;
      for (int64_t d = 0; d < depth_; d += kLine) prefetch_second_level(row + d);
    }
    done_ += num_rows;
  }

 private:
  Element* source_;
  int64_t row_stride_;
  const int32_t* row_idx_;
  int64_t count_;
  int64_t depth_;
  int64_t rows_per_step_;
  int64_t done_ = 0;
};

// tile[i * tile_row + d] = source[row_idx[i] * row_stride + d] for d < depth, zero from depth to padded_depth.
template <typename Storage>
inline void gather_rows(const Storage* source, int64_t row_stride, const int32_t* row_idx, int64_t count, int64_t depth,
                        int64_t padded_depth, ComputeOf<Storage>* tile, int64_t tile_row) {
  for (int64_t i = 0; i < count; ++i) {
    load_row(source + row_idx[i] * row_stride, depth, tile + i * tile_row);
    for (int64_t d = depth; d < padded_depth; ++d) tile[i * tile_row + d] = 0;
  }
}

// Whether rows [0, num_rows) hold neither inf nor NaN: x - x is 0 exactly then.
template <typename Storage>
inline bool all_finite(const Storage* rows, int64_t row_stride, int64_t num_rows, int64_t depth) {
  using T = ComputeOf<Storage>;
  typename VectorTraits<T>::IntegerElement num_others = 0;
  for (int64_t i = 0; i < num_rows; ++i) {
    const Storage* row = rows + i * row_stride;
    for (int64_t d = 0; d < depth; ++d) {
      const T element = to_compute(row[d]);
      num_others += element - element == 0 ? 0 : 1;
    }
  }
  return num_others == 0;
}

// The same of rows row_idx[i].
template <typename Storage>
inline bool all_finite_of(const Storage* source, int64_t row_stride, const int32_t* row_idx, int64_t count,
                          int64_t depth) {
  bool are_finite = true;
  for (int64_t i = 0; i < count; ++i) {
    are_finite = are_finite && all_finite(source + row_idx[i] * row_stride, row_stride, 1, depth);
  }
  return are_finite;
}

// A block of consecutive rows as the micro-kernel takes it: the rows themselves where they already are of the compute
// type and a whole number of vectors wide (or the reader does not care for the width), else a converted, padded copy.
template <typename T>
struct RowBlock {
  const T* data;
  int64_t row_stride;
};

template <typename Storage>
inline RowBlock<ComputeOf<Storage>> dense_rows(const Storage* source, int64_t row_stride, int64_t count, int64_t depth,
                                               int64_t padded_depth, ComputeOf<Storage>* scratch) {
  using T = ComputeOf<Storage>;
  if constexpr (std::is_same_v<Storage, T>) {
    if (depth == padded_depth) return {source, row_stride};
  }
  for (int64_t i = 0; i < count; ++i) {
    load_row(source + i * row_stride, depth, scratch + i * padded_depth);
    for (int64_t d = depth; d < padded_depth; ++d) scratch[i * padded_depth + d] = 0;
  }
  return {scratch, padded_depth};
}

}  // namespace topgather::TOPGATHER_CPU_TARGET
