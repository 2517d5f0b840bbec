// Integers rounded up, on host and device.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace topgather {

__host__ __device__ constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
__host__ __device__ constexpr int64_t multiple_of(int64_t a, int64_t b) { return divide_up(a, b) * b; }

}  // namespace topgather
