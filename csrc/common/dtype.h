// Element types that cross the Python boundary, by code.
#pragma once

#include <cstdint>

namespace topgather {

enum class Dtype : int32_t {
  kFloat32 = 0,
  kFloat64 = 1,
  kBFloat16 = 2,
  kFloat16 = 3,
  kInt32 = 4,
  kInt64 = 5,
  kInt8 = 6
};

constexpr int64_t element_bytes(Dtype dtype) {
  switch (dtype) {
    case Dtype::kFloat64:
    case Dtype::kInt64: return 8;
    case Dtype::kBFloat16:
    case Dtype::kFloat16: return 2;
    case Dtype::kInt8: return 1;
    default: return 4;
  }
}

// The dtype of scores and sums.
constexpr Dtype sum_dtype(Dtype dtype) { return dtype == Dtype::kFloat64 ? Dtype::kFloat64 : Dtype::kFloat32; }

// The 16-bit types are storage only: every sum runs in float32.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

}  // namespace topgather
