// One instruction set's entry points. Compiled once per target; see CMakeLists.txt for the flags of each.
#include "grid_cpu.h"

#include "../cpu/dispatch.h"
#include "grid_backward_cpu.h"
#include "grid_forward_cpu.h"

namespace topgather::TOPGATHER_CPU_TARGET {
namespace {

void forward(const GridForwardParams& params) {
  with_storage(params.problem.dtype, [&](auto storage) { grid_forward_storage<decltype(storage)>(params); });
}

void backward(const GridBackwardParams& params) {
  with_storage(params.problem.dtype, [&](auto storage) { grid_backward_storage<decltype(storage)>(params); });
}

}  // namespace

extern const GridCpuKernels kGridCpuKernels{&forward, &backward};

}  // namespace topgather::TOPGATHER_CPU_TARGET
