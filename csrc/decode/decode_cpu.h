// The CPU kernels of decoding, one table of entry points per instruction set.
#pragma once

#include "../common/cpu_kernels.h"
#include "decode_params.h"

namespace topgather {

// Lengths and the pages that they lead to must have been checked: decode_bindings.cpp does. `decode` throws as
// throw_routing_fault of block attention does for a choice that names a block that does not exist, or one twice.
struct DecodeCpuKernels {
  void (*append)(const CacheAppendParams& params);
  void (*route)(const DecodeRouteParams& params);
  void (*decode)(const DecodeParams& params);
};
TOPGATHER_CPU_KERNELS(DecodeCpuKernels, avx512, avx512, avx512)

}  // namespace topgather
