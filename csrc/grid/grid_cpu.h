// The CPU kernels of grid and window attention, one table of entry points per instruction set.
#pragma once

#include "grid_params.h"

namespace topgather {

struct GridCpuKernels {
  void (*forward)(const GridForwardParams& params);
  void (*backward)(const GridBackwardParams& params);
};

#define TOPGATHER_DECLARE_TARGET(target)       \
  namespace target {                           \
  extern const GridCpuKernels kGridCpuKernels; \
  }
TOPGATHER_DECLARE_TARGET(baseline)
TOPGATHER_DECLARE_TARGET(avx2)
TOPGATHER_DECLARE_TARGET(avx512)
#undef TOPGATHER_DECLARE_TARGET

}  // namespace topgather
