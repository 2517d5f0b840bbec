// The lanes of a warp: which one this is, and sums and maxima over them.
#pragma once

#include "primitives.cuh"

namespace topgather::cuda {

constexpr int kLanes = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

__device__ __forceinline__ int lane_id() { return static_cast<int>(threadIdx.x) % kLanes; }
__device__ __forceinline__ int warp_id() { return static_cast<int>(threadIdx.x) / kLanes; }

// Over groups of kGroupLanes neighbouring lanes, the same result to all of a group. All lanes of the warp take part.
template <int kGroupLanes = kLanes, typename Number>
__device__ __forceinline__ Number sum_over_lanes(Number value) {
#pragma unroll
  for (int distance = kGroupLanes / 2; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, distance);
  }
  return value;
}
__device__ __forceinline__ float max_over_lanes(float value) {
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2) {
    value = max_or_nan(value, __shfl_xor_sync(kAllLanes, value, distance));
  }
  return value;
}

}  // namespace topgather::cuda

namespace topgather {

// Kernels say these often.
using cuda::kAllLanes;
using cuda::kLanes;
using cuda::lane_id;
using cuda::warp_id;

}  // namespace topgather
