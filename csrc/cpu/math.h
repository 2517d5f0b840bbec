// Exponentials on whole vectors.
#pragma once

#include <cmath>

#include "intrinsics.h"
#include "simd.h"

namespace topgather::TOPGATHER_CPU_TARGET {

inline constexpr double kLog2E = 1.4426950408889634074;
inline constexpr double kLn2 = 0.69314718055994530942;

// Coefficients of 2^r, least-maximum fits with a relative error of 2e-9 before rounding.
inline Vector<float> polynomial(const Vector<float>& r, const float (&coefficients)[7]) {
  Vector<float> sum = broadcast(coefficients[6]);
#pragma GCC unroll 6
  for (int degree = 5; degree >= 0; --degree) sum = sum * r + coefficients[degree];
  return sum;
}

// 2^x to about one unit in the last place; 0 for -inf, NaN for NaN. Results below 2^-126 may be flushed to 0.
inline Vector<float> exp2_vector(const Vector<float>& x) {
#if defined(__AVX512F__)
  // r in [0, 1)
  constexpr float kCoefficients[7] = {1.0f,         0x1.62e42ap-1f,  0x1.ebfd9ep-3f, 0x1.c685p-5f,
                                      0x1.3d28p-7f, 0x1.461956p-10f, 0x1.c72118p-13f};
  return scale_by_floor_power(polynomial(fraction_above_floor(x), kCoefficients), x);
#else
  // r in [-1/2, 1/2]
  constexpr float kCoefficients[7] = {1.0f,           0x1.62e430p-1f,  0x1.ebfbdap-3f, 0x1.c6aed4p-5f,
                                      0x1.3b2dbcp-7f, 0x1.5f456ap-10f, 0x1.41d334p-13f};
  const Vector<float> finite = minimum(broadcast(128.0f), maximum(broadcast(-127.0f), x));
  // Adding 1.5 * 2^23 rounds to an integer, which then stands in the low mantissa bits.
  const Vector<float> shifted = finite + 12582912.0f;
  const Vector<float> power = polynomial(finite - (shifted - 12582912.0f), kCoefficients);
  // Multiplied in, not added to the exponent bits: that is what keeps a NaN a NaN.
  const IntegerVector<float> exponent = (bit_cast<IntegerVector<float> >(shifted) << 23) + 0x3f800000;
  return power * bit_cast<Vector<float> >(exponent);
#endif
}

inline Vector<double> exp2_vector(Vector<double> x) {
  for (int lane = 0; lane < kLanes<double>; ++lane) x[lane] = std::exp2(x[lane]);
  return x;
}

}  // namespace topgather::TOPGATHER_CPU_TARGET
