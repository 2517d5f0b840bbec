// What the CUDA attention kernels share: scales and caps of scores, and sinks.
#pragma once

#include "../common/array.h"
#include "primitives.cuh"

namespace topgather::cuda {

// tanh(x), within a few units in the last place: near 0 the series' first terms, since the difference from 1 would lose
// what tells small numbers apart. NaN for NaN.
__device__ __forceinline__ float tanh_of(float x) {
  const float square = x * x;
  const float series = fmaf(fmaf(fmaf(-17.0f / 315.0f, square, 2.0f / 15.0f), square, -1.0f / 3.0f) * square, x, x);
  const float away = 1.0f - 2.0f * reciprocal_approximate(exp2_approximate(fabsf(x) * 2.8853900817779268f) + 1.0f);
  return square < 0.04f ? series : copysignf(away, x);
}

// Forward and backward see the same scores only if each is rounded before a maximum is subtracted from it: a multiply-add
// of both would be off by more than the difference where scores are large.
__device__ __forceinline__ float scale_score(float product, float scale) { return __fmul_rn(product, scale); }

// cap * tanh(score / cap).
__device__ __forceinline__ float cap_score(float score, float cap, float inverse_cap) {
  return __fmul_rn(cap, tanh_of(score * inverse_cap));
}

// The derivative of a capped score by the score.
__device__ __forceinline__ float slope_of_cap(float capped, float inverse_cap) {
  const float share = capped * inverse_cap;
  return 1.0f - share * share;
}

// What a row's weighted values are multiplied with beside the sum of its keys' weights: the share of the whole sum that
// the keys have, exp(lse) / (exp(lse) + exp(sink)). 1 without sinks.
__device__ __forceinline__ float share_beside_sink(float lse, const Array<const void, 1>& sinks, int64_t head_idx) {
  return sinks.data == nullptr ? 1.0f : 1.0f / (1.0f + expf(*sinks.at<float>(head_idx) - lse));
}

// Whether a sink gives a sum of weights something where keys, all at -inf, give it nothing.
__device__ __forceinline__ bool has_sink(const Array<const void, 1>& sinks, int64_t head_idx) {
  return sinks.data != nullptr && *sinks.at<float>(head_idx) > -INFINITY;
}

}  // namespace topgather::cuda
