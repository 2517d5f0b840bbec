// The CPU kernels of block attention, one table of entry points per instruction set.
#pragma once

#include "../common/cpu_kernels.h"
#include "moba_params.h"

namespace topgather {

struct MobaCpuKernels {
  void (*centroids)(const CentroidParams& params);
  void (*route)(const MobaRouteParams& params);
  void (*forward)(const MobaForwardParams& params);
  void (*backward)(const MobaBackwardParams& params);
};
TOPGATHER_CPU_KERNELS(MobaCpuKernels, avx512, avx512_bf16, amx)

// A routing that names a block outside the sequence, or one block twice for a query: std::out_of_range and
// std::invalid_argument, thrown after every thread has stopped.
[[noreturn]] void throw_routing_fault(bool is_duplicate, int64_t head_idx, int64_t query, int64_t block);

}  // namespace topgather
