// Exponentials and logarithms on whole vectors.
#pragma once

#include <cmath>

#include "intrinsics.h"
#include "simd.h"

namespace topgather::TOPGATHER_CPU_TARGET {

inline constexpr double kLog2E = 1.4426950408889634074;
inline constexpr double kLn2 = 0.69314718055994530942;

// sum over i of coefficients[i] * r^i.
template <int kCount>
inline Vector<float> polynomial(const Vector<float>& r, const float (&coefficients)[kCount]) {
  Vector<float> sum = broadcast(coefficients[kCount - 1]);
#pragma GCC unroll 8
  for (int degree = kCount - 2; degree >= 0; --degree) sum = sum * r + coefficients[degree];
  return sum;
}

// 2^x to about one unit in the last place; 0 for -inf, NaN for NaN. Results below 2^-126 may be flushed to 0.
// Always inlined: it stands in inner loops, and a call would clear all vector registers.
__attribute__((always_inline)) inline Vector<float> exp2_vector(const Vector<float>& x) {
  // Minimax fits of 2^r with a relative error of 2e-9 before rounding.
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
  const IntegerVector<float> exponent = (bit_cast<IntegerVector<float>>(shifted) << 23) + 0x3f800000;
  return power * bit_cast<Vector<float>>(exponent);
#endif
}

#if defined(__AVX512F__)
// factor * 2^x to a relative error of 2^-13 or less, for results of few bits.
__attribute__((always_inline)) inline Vector<float> exp2_estimate(const Vector<float>& x, float factor) {
  const float coefficients[4] = {factor * 0x1.fff632p-1f, factor * 0x1.64444cp-1f, factor * 0x1.cefc4cp-3f,
                                 factor * 0x1.3f96a4p-4f};
  return scale_by_floor_power(polynomial(fraction_above_floor(x), coefficients), x);
}
#endif

// log2(x) to about one unit in the last place, for normal numbers above 0; -inf for 0, inf for inf, NaN for NaN.
inline Vector<float> log2_vector(const Vector<float>& x) {
  // log2(1 + f) / f for f from sqrt(1/2) - 1 to sqrt(2) - 1, a minimax fit with a relative error of 3e-8.
  constexpr float kCoefficients[9] = {0x1.715476p+0f,  -0x1.71547p-1f, 0x1.ec73d6p-2f,  -0x1.715c4ep-2f, 0x1.26d384p-2f,
                                      -0x1.e95be8p-3f, 0x1.b9c91cp-3f, -0x1.a87d02p-3f, 0x1.01b6c6p-3f};
  constexpr int32_t kRootOfHalf = 0x3f3504f3;
  const auto bits = bit_cast<IntegerVector<float>>(x);
  const IntegerVector<float> exponent = (bits - kRootOfHalf) >> 23;
  const Vector<float> fraction = bit_cast<Vector<float>>(bits - (exponent << 23)) - 1.0f;
  const Vector<float> finite =
      polynomial(fraction, kCoefficients) * fraction + __builtin_convertvector(exponent, Vector<float>);
  const Vector<float> special = x == 0.0f ? broadcast(-__builtin_inff()) : x;
  const IntegerVector<float> is_finite = (x > 0.0f) & (x < __builtin_inff());
  return is_finite ? finite : special;
}

inline Vector<double> log2_vector(Vector<double> x) {
  for (int lane = 0; lane < kLanes<double>; ++lane) x[lane] = std::log2(x[lane]);
  return x;
}

inline Vector<double> exp2_vector(Vector<double> x) {
  for (int lane = 0; lane < kLanes<double>; ++lane) x[lane] = std::exp2(x[lane]);
  return x;
}

// tanh(x) to about two units in the last place; NaN for NaN.
inline Vector<float> tanh_vector(const Vector<float>& x) {
  // Near 0 the difference from 1 would lose what tells small numbers apart: there the series' first terms.
  const Vector<float> square = x * x;
  constexpr float kCoefficients[6] = {
      1.0f, -1.0f / 3.0f, 2.0f / 15.0f, -17.0f / 315.0f, 62.0f / 2835.0f, -1382.0f / 155925.0f};
  const Vector<float> series = x * polynomial(square, kCoefficients);
  const Vector<float> away = 1.0f - 2.0f / (exp2_vector(maximum(x, -x) * static_cast<float>(2.0 * kLog2E)) + 1.0f);
  return square < 0.1f ? series : (x < 0.0f ? -away : away);
}

inline Vector<double> tanh_vector(Vector<double> x) {
  for (int lane = 0; lane < kLanes<double>; ++lane) x[lane] = std::tanh(x[lane]);
  return x;
}

}  // namespace topgather::TOPGATHER_CPU_TARGET
