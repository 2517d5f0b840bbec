// One instruction set's entry points. Compiled once per target; see CMakeLists.txt for the flags of each.
#include "key_conv_cpu.h"

#include "../cpu/dispatch.h"
#include "key_conv_backward_cpu.h"
#include "key_conv_forward_cpu.h"

namespace topgather::TOPGATHER_CPU_TARGET {
namespace {

void forward(const KeyConvForwardParams& params) {
  with_storage(params.problem.dtype, [&](auto storage) { key_conv_forward_storage<decltype(storage)>(params); });
}

void backward(const KeyConvBackwardParams& params) {
  with_storage(params.problem.dtype, [&](auto storage) { key_conv_backward_storage<decltype(storage)>(params); });
}

}  // namespace

extern const KeyConvCpuKernels kKeyConvCpuKernels{&forward, &backward};

}  // namespace topgather::TOPGATHER_CPU_TARGET
