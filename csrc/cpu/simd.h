// Vectors as wide as the target's registers, written with the compilers' vector extensions.
//
// One source serves every instruction set: a kernel file is compiled once per target, each time with that
// target's flags and with TOPGATHER_CPU_TARGET naming the namespace its code lands in. Nothing here is an
// intrinsic; they are all in intrinsics.h.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#ifndef TOPGATHER_CPU_TARGET
#error "compile CPU kernels with -DTOPGATHER_CPU_TARGET=<namespace>"
#endif

// Whether this target multiplies bfloat16 tiles in hardware; what that takes is in intrinsics.h.
#if defined(__AMX_BF16__) && defined(__AVX512BF16__)
#define TOPGATHER_MATRIX_UNIT 1
#else
#define TOPGATHER_MATRIX_UNIT 0
#endif
// Whether it has products of bfloat16 in vector registers instead.
#if defined(__AVX512BF16__) && !TOPGATHER_MATRIX_UNIT
#define TOPGATHER_PAIR_PRODUCTS 1
#else
#define TOPGATHER_PAIR_PRODUCTS 0
#endif

// Before a loop whose iterations touch nothing of each other's: it may become vectors without a check of that.
#if defined(__clang__)
#define TOPGATHER_INDEPENDENT_ITERATIONS _Pragma("clang loop vectorize(assume_safety)")
#else
#define TOPGATHER_INDEPENDENT_ITERATIONS _Pragma("GCC ivdep")
#endif

namespace topgather::TOPGATHER_CPU_TARGET {

#if defined(__AVX512F__)
inline constexpr int kVectorBytes = 64;
inline constexpr int kNumVectorRegisters = 32;
#elif defined(__AVX__)
inline constexpr int kVectorBytes = 32;
inline constexpr int kNumVectorRegisters = 16;
#elif defined(__aarch64__)
inline constexpr int kVectorBytes = 16;
inline constexpr int kNumVectorRegisters = 32;
#else
inline constexpr int kVectorBytes = 16;
inline constexpr int kNumVectorRegisters = 16;
#endif

template <typename T>
struct VectorTraits {
  using IntegerElement = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;
  typedef T Vector __attribute__((vector_size(kVectorBytes)));
  typedef IntegerElement Integer __attribute__((vector_size(kVectorBytes)));
};

template <typename T>
using Vector = typename VectorTraits<T>::Vector;

// Lane masks and integers as wide as T: comparisons of Vector<T> yield 0 or -1 per lane in this type.
template <typename T>
using IntegerVector = typename VectorTraits<T>::Integer;

template <typename T>
inline constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

template <typename T>
inline Vector<T> load(const T* source) {
  Vector<T> result;
  std::memcpy(&result, source, sizeof(result));
  return result;
}

template <typename T, typename V>
inline void store(T* target, const V& vector) {
  static_assert(sizeof(V) == kVectorBytes);
  std::memcpy(target, &vector, sizeof(vector));
}

template <typename T>
inline Vector<T> broadcast(T value) {
  return value - Vector<T>{};
}

template <typename To, typename From>
inline To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  std::memcpy(&result, &from, sizeof(result));
  return result;
}

// A NaN in `a` is dropped, one in `b` is kept. Written so that it becomes the one instruction that does the same.
template <typename V>
inline V maximum(const V& a, const V& b) {
  return a > b ? a : b;
}

template <typename V>
inline V minimum(const V& a, const V& b) {
  return a < b ? a : b;
}

// Prefetches the cache line at `pointer` (for writing where the element may be written), into the second-level cache,
// since the first has no room for what is used now and next. May lie past the end of what is there.
template <typename Element>
inline void prefetch_second_level(Element* pointer) {
  __builtin_prefetch(pointer, std::is_const_v<Element> ? 0 : 1, 2);
}

// Combines all lanes pairwise: lane l with l ^ 1, then l ^ 2, and so on.
template <typename T, int kBit = kLanes<T> / 2, typename Join>
inline T reduce_lanes(const Vector<T>& vector, const Join& join) {
  if constexpr (kBit == 0) {
    return vector[0];
  } else {
    const Vector<T> swapped = [&]<int... kLane>(std::integer_sequence<int, kLane...>) {
#if defined(__clang__)
      return __builtin_shufflevector(vector, vector, (kLane ^ kBit)...);
#else
      return __builtin_shuffle(vector, IntegerVector<T>{(kLane ^ kBit)...});
#endif
    }(std::make_integer_sequence<int, kLanes<T>>{});
    return reduce_lanes<T, kBit / 2>(join(vector, swapped), join);
  }
}

template <typename T>
inline T largest_lane(const Vector<T>& vector) {
  return reduce_lanes<T>(vector, [](const Vector<T>& a, const Vector<T>& b) { return maximum(a, b); });
}

template <typename T>
inline T sum_of_lanes(const Vector<T>& vector) {
  return reduce_lanes<T>(vector, [](const Vector<T>& a, const Vector<T>& b) { return a + b; });
}

inline int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }
inline int64_t ceil_div(int64_t value, int64_t divisor) { return (value + divisor - 1) / divisor; }
inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

// Lanes of `low` and `high` where bit kBit of the lane number decides: one step of a butterfly transpose.
template <typename T, int kBit, bool kUpper>
inline Vector<T> butterfly(const Vector<T>& low, const Vector<T>& high) {
  constexpr int kWidth = kLanes<T>;
  constexpr auto source_lane = [](int lane) {
    const bool set = (lane & kBit) != 0;
    if constexpr (kUpper) return set ? kWidth + lane : lane + kBit;
    return set ? kWidth + lane - kBit : lane;
  };
  return [&]<int... kLane>(std::integer_sequence<int, kLane...>) {
#if defined(__clang__)
    return __builtin_shufflevector(low, high, source_lane(kLane)...);
#else
    return __builtin_shuffle(low, high, IntegerVector<T>{source_lane(kLane)...});
#endif
  }(std::make_integer_sequence<int, kWidth>{});
}

template <typename T, int kBit = 1>
inline void transpose_in_registers(Vector<T> (&rows)[kLanes<T>]) {
  if constexpr (kBit < kLanes<T>) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes<T>; ++i) {
      if ((i & kBit) == 0) {
        const Vector<T> low = rows[i];
        const Vector<T> high = rows[i + kBit];
        rows[i] = butterfly<T, kBit, false>(low, high);
        rows[i + kBit] = butterfly<T, kBit, true>(low, high);
      }
    }
    transpose_in_registers<T, kBit * 2>(rows);
  }
}

// Lane l of the result is the sum of the lanes of rows[l]: a transpose that adds on its way. Overwrites rows.
template <typename T, int kBit = 1>
inline Vector<T> sums_of_rows(Vector<T> (&rows)[kLanes<T>]) {
  if constexpr (kBit < kLanes<T>) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes<T>; i += 2 * kBit) {
      rows[i] = butterfly<T, kBit, false>(rows[i], rows[i + kBit]) + butterfly<T, kBit, true>(rows[i], rows[i + kBit]);
    }
    return sums_of_rows<T, kBit * 2>(rows);
  } else {
    return rows[0];
  }
}

}  // namespace topgather::TOPGATHER_CPU_TARGET
