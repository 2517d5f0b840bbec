// The CPU kernels of memory layers, one table of entry points per instruction set.
#pragma once

#include "../common/cpu_kernels.h"
#include "memory_params.h"

namespace topgather {

struct MemoryCpuKernels {
  void (*product_key_topk)(const ProductKeyParams& params);
  void (*lookup)(const MemoryLookupParams& params);
  void (*dot)(const MemoryDotParams& params);
  void (*backward)(const MemoryBackwardParams& params);
  void (*lookup_quantized)(const QuantizedLookupParams& params);
  void (*dot_quantized)(const QuantizedDotParams& params);
};
TOPGATHER_CPU_KERNELS(MemoryCpuKernels, avx512, avx512, avx512)

struct MemoryUpdateCpuKernels {
  void (*update)(const MemoryUpdateParams& params);
};
TOPGATHER_CPU_KERNELS(MemoryUpdateCpuKernels, avx2, avx2, avx2)

}  // namespace topgather
