// From the dtype code that crosses the Python boundary to an element type: the CUDA ops' dispatch table, for host code.
#pragma once

#include "../common/checks.h"
#include "../common/dtype.h"

namespace topgather {

// What there are kernels for.
constexpr Dtype kCudaDtypes[] = {Dtype::kBFloat16, Dtype::kFloat16, Dtype::kFloat32};

template <typename Element>
inline constexpr Dtype kDtypeOf = Dtype::kFloat32;
template <>
inline constexpr Dtype kDtypeOf<BFloat16> = Dtype::kBFloat16;
template <>
inline constexpr Dtype kDtypeOf<Float16> = Dtype::kFloat16;

// Calls visit with a value of the element type that `dtype` stands for, and returns what it returns.
// std::invalid_argument for the other dtypes.
template <typename Visit>
auto with_element(Dtype dtype, const Visit& visit) -> decltype(visit(float{})) {
  switch (dtype) {
    case Dtype::kFloat32: return visit(float{});
    case Dtype::kBFloat16: return visit(BFloat16{});
    case Dtype::kFloat16: return visit(Float16{});
    default: throw_invalid_argument("CUDA kernels take float32, bfloat16 and float16");
  }
}

}  // namespace topgather
