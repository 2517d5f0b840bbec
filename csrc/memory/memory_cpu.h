// The CPU kernels of memory layers, one table of entry points per instruction set.
#pragma once

#include "memory_params.h"

namespace topgather {

struct MemoryCpuKernels {
  void (*product_key_topk)(const ProductKeyParams& params);
  void (*lookup)(const MemoryLookupParams& params);
  void (*dot)(const MemoryDotParams& params);
  void (*backward)(const MemoryBackwardParams& params);
};

#define TOPGATHER_DECLARE_TARGET(target)           \
  namespace target {                               \
  extern const MemoryCpuKernels kMemoryCpuKernels; \
  }
TOPGATHER_DECLARE_TARGET(baseline)
TOPGATHER_DECLARE_TARGET(avx2)
TOPGATHER_DECLARE_TARGET(avx512)
#undef TOPGATHER_DECLARE_TARGET

}  // namespace topgather
