// Channels of one key in vector registers, converted on the way in and out without going through memory.
#pragma once

#include "../cpu/convert.h"
#include "../cpu/intrinsics.h"

namespace topgather::TOPGATHER_CPU_TARGET {

inline constexpr int32_t kUpperHalf = -0x10000;

// The number whose 16 bits are the upper half of each word, where the lower half is 0.
template <typename Storage>
inline Vector<float> float_of_upper_half(const IntegerVector<float>& words) {
  if constexpr (std::is_same_v<Storage, BFloat16>) {
    return bit_cast<Vector<float>>(words);
  } else {
    const IntegerVector<float> magnitude = (words & 0x7fff0000) >> 3;
    // Multiplying by 2^112 moves the exponent's bias and makes denormals normal in one step.
    const auto finite = bit_cast<IntegerVector<float>>(bit_cast<Vector<float>>(magnitude) * 0x1p112f);
    const IntegerVector<float> number = (words & 0x7c000000) == 0x7c000000 ? (magnitude | 0x7f800000) : finite;
    return bit_cast<Vector<float>>(number | (words & ~0x7fffffff));
  }
}

// Words whose upper half is the 16-bit number nearest to a lane; the lower half is undefined. float16 ties round to
// even, bfloat16 ties away from zero: they are rare (one float32 in 65,536), and exact ties-to-even costs a sixth of
// the time.
template <typename Storage>
inline IntegerVector<float> upper_half_of_float(const Vector<float>& vector) {
  const auto bits = bit_cast<IntegerVector<float>>(vector);
  if constexpr (std::is_same_v<Storage, BFloat16>) {
    // A NaN stays a NaN, since its lower half is 0 here (load_taps makes it so).
    return bits + 0x8000;
  } else {
    const IntegerVector<float> magnitude = bits & 0x7fffffff;
    const IntegerVector<float> normal = (magnitude + 0xfff + (magnitude >> 13 & 1) - (112 << 23)) >> 13;
    // Adding 1/2 puts a value below 2^-14 on float16's denormal grid, rounded to nearest even.
    const auto denormal = bit_cast<IntegerVector<float>>(bit_cast<Vector<float>>(magnitude) + 0.5f) - 0x3f000000;
    const IntegerVector<float> finite = magnitude < 0x38800000 ? denormal : normal;
    const IntegerVector<float> overflow =
        magnitude > 0x7f800000 ? IntegerVector<float>{} + 0x7e00 : IntegerVector<float>{} + 0x7c00;
    return (magnitude >= 0x47800000 ? overflow : finite) << 16 | (bits & ~0x7fffffff);
  }
}

// Whether one instruction converts 16-bit numbers in order.
template <typename Storage>
inline constexpr bool kHasConversion = false;

#if defined(__AVX512F__) || defined(__aarch64__)
template <>
inline constexpr bool kHasConversion<Float16> = true;
#endif

// Consecutive numbers of one vector, in order.
template <typename Storage>
inline Vector<ComputeOf<Storage>> widen(const Storage* source) {
  if constexpr (kHasConversion<Storage>) {
    return widen_float16(source);
  } else if constexpr (sizeof(Storage) == 2) {
#if defined(__AVX512F__)
    const IntegerVector<float> bits = widen_integers(source);
#else
    typedef uint16_t HalfVector __attribute__((vector_size(kVectorBytes / 2)));
    HalfVector halves;
    std::memcpy(&halves, source, sizeof(halves));
    const IntegerVector<float> bits = __builtin_convertvector(halves, IntegerVector<float>);
#endif
    return float_of_upper_half<Storage>(bits << 16);
  } else {
    return load<Storage>(source);
  }
}

// A vector register's worth of stored numbers: one vector, or, of 16-bit numbers, the even ones and the odd ones, since
// taking the halves of words apart, and putting them together again, is cheaper than keeping their order; or, where an
// instruction does that, the first half and the second.
template <typename Storage>
struct Channels {
  using T = ComputeOf<Storage>;
  static constexpr int kNumParts = sizeof(T) / sizeof(Storage);
  static constexpr int64_t kCount = kNumParts * kLanes<T>;

  Vector<T> parts[kNumParts];

  static Vector<T> load_part(const Storage* source, int part) {
    if constexpr (kHasConversion<Storage>) {
      return widen(source + part * kLanes<T>);
    } else if constexpr (kNumParts == 2) {
      IntegerVector<float> words;
      std::memcpy(&words, source, sizeof(words));
      return float_of_upper_half<Storage>(part == 0 ? words << 16 : words & kUpperHalf);
    } else {
      return load<T>(source);
    }
  }

  // Where a row's number stands in the order of parts.
  static int64_t place_of(int64_t channel) {
    if constexpr (kHasConversion<Storage>) return channel;
    const int64_t within = channel % kCount;
    return channel - within + within % kNumParts * kLanes<T> + within / kNumParts;
  }

  void store_to(Storage* target) const {
    if constexpr (kHasConversion<Storage>) {
      for (int part = 0; part < kNumParts; ++part) narrow_to_float16(parts[part], target + part * kLanes<T>);
    } else if constexpr (kNumParts == 2) {
      using Unsigned = uint32_t __attribute__((vector_size(kVectorBytes)));
      const auto even =
          bit_cast<IntegerVector<float>>(bit_cast<Unsigned>(upper_half_of_float<Storage>(parts[0])) >> 16);
      const IntegerVector<float> words = even | (upper_half_of_float<Storage>(parts[1]) & kUpperHalf);
      std::memcpy(target, &words, sizeof(words));
    } else {
      store<T>(target, parts[0]);
    }
  }
};

}  // namespace topgather::TOPGATHER_CPU_TARGET
