// The CPU kernels of the key convolution, one table of entry points per instruction set.
#pragma once

#include "key_conv_params.h"

namespace topgather {

struct KeyConvCpuKernels {
  void (*forward)(const KeyConvForwardParams& params);
  void (*backward)(const KeyConvBackwardParams& params);
};

#define TOPGATHER_DECLARE_TARGET(target)             \
  namespace target {                                 \
  extern const KeyConvCpuKernels kKeyConvCpuKernels; \
  }
TOPGATHER_DECLARE_TARGET(baseline)
TOPGATHER_DECLARE_TARGET(avx2)
TOPGATHER_DECLARE_TARGET(avx512)
#undef TOPGATHER_DECLARE_TARGET

}  // namespace topgather
