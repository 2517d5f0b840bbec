// The CPU kernels of grid and window attention, one table of entry points per instruction set.
#pragma once

#include "../common/cpu_kernels.h"
#include "grid_params.h"

namespace topgather {

struct GridCpuKernels {
  void (*forward)(const GridForwardParams& params);
  void (*backward)(const GridBackwardParams& params);
};
TOPGATHER_CPU_KERNELS(GridCpuKernels, avx512, avx512, avx512)

}  // namespace topgather
