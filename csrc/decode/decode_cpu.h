// The CPU kernels of decoding, one table of entry points per instruction set.
#pragma once

#include "decode_params.h"

namespace topgather {

// Lengths and the pages that they lead to must have been checked: decode_bindings.cpp does. `decode` throws as
// throw_routing_fault of block attention does for a choice that names a block that does not exist, or one twice.
struct DecodeCpuKernels {
  void (*append)(const CacheAppendParams& params);
  void (*route)(const DecodeRouteParams& params);
  void (*decode)(const DecodeParams& params);
};

#define TOPGATHER_DECLARE_TARGET(target)           \
  namespace target {                               \
  extern const DecodeCpuKernels kDecodeCpuKernels; \
  }
TOPGATHER_DECLARE_TARGET(baseline)
TOPGATHER_DECLARE_TARGET(avx2)
TOPGATHER_DECLARE_TARGET(avx512)
#undef TOPGATHER_DECLARE_TARGET

}  // namespace topgather
