// The CPU kernels of the indexer, one table of entry points per instruction set.
#pragma once

#include "../common/cpu_kernels.h"
#include "indexer_params.h"

namespace topgather {

struct IndexerCpuKernels {
  void (*route)(const IndexRouteParams& params);
};
// Nothing multiplies on the matrix unit: scores must rank as sums in float32 do.
TOPGATHER_CPU_KERNELS(IndexerCpuKernels, avx512, avx512, avx512)

}  // namespace topgather
