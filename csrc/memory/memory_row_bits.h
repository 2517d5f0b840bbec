// The random bits that a row optimizer rounds by, in host and device code: the same on every backend.
#pragma once

#include <cstdint>

#include "../common/array.h"

namespace topgather {

// A 64-bit mixture (splitmix64), of what is the row's.
TOPGATHER_HOST_DEVICE uint64_t mix_bits(uint64_t bits) {
  bits = (bits ^ bits >> 30) * 0xbf58476d1ce4e5b9u;
  bits = (bits ^ bits >> 27) * 0x94d049bb133111ebu;
  return bits ^ bits >> 31;
}

// Of a step, whose rows are added to it and mixed once more.
TOPGATHER_HOST_DEVICE uint64_t bits_of_step(int64_t seed, int64_t step) {
  return mix_bits(mix_bits(static_cast<uint64_t>(seed)) + static_cast<uint64_t>(step));
}

// A 32-bit mixture, of each column.
TOPGATHER_HOST_DEVICE uint32_t column_bits(uint32_t row_bits, uint32_t column) {
  uint32_t bits = row_bits + column * 0x9e3779b9u;
  bits = (bits ^ bits >> 16) * 0x7feb352du;
  bits = (bits ^ bits >> 15) * 0x846ca68bu;
  return bits ^ bits >> 16;
}

// base^exponent by squaring.
TOPGATHER_HOST_DEVICE double whole_power(double base, int64_t exponent) {
  double power = 1;
  for (; exponent > 0; exponent >>= 1, base *= base) {
    if ((exponent & 1) != 0) power *= base;
  }
  return power;
}

}  // namespace topgather
