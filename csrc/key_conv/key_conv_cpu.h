// The CPU kernels of the key convolution, one table of entry points per instruction set.
#pragma once

#include "../common/cpu_kernels.h"
#include "key_conv_params.h"

namespace topgather {

struct KeyConvCpuKernels {
  void (*forward)(const KeyConvForwardParams& params);
  void (*backward)(const KeyConvBackwardParams& params);
};
TOPGATHER_CPU_KERNELS(KeyConvCpuKernels, avx512, avx512, avx512)

}  // namespace topgather
