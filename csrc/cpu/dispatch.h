// From the dtype code that crosses the Python boundary to a storage type: the CPU ops' dispatch table.
#pragma once

#include "../common/dtype.h"

namespace topgather::TOPGATHER_CPU_TARGET {

// Calls visit with a value of the storage type that `dtype` stands for.
template <typename Visit>
void with_storage(Dtype dtype, const Visit& visit) {
  switch (dtype) {
    case Dtype::kFloat32: return visit(float{});
    case Dtype::kFloat64: return visit(double{});
    case Dtype::kBFloat16: return visit(BFloat16{});
    case Dtype::kFloat16: return visit(Float16{});
    default: return;  // no entry point lets another through
  }
}

}  // namespace topgather::TOPGATHER_CPU_TARGET
