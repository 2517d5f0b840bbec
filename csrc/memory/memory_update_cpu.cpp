// The row optimizers' entry point of one instruction set, apart from the lookups': both take long to compile.
#include "memory_update_cpu.h"

#include "../cpu/dispatch.h"
#include "memory_cpu.h"

namespace topgather::TOPGATHER_CPU_TARGET {
namespace {

void update(const MemoryUpdateParams& params) {
  with_storage(params.problem.dtype, [&](auto storage) { memory_update_storage<decltype(storage)>(params); });
}

}  // namespace

extern const MemoryUpdateCpuKernels kMemoryUpdateCpuKernels{&update};

}  // namespace topgather::TOPGATHER_CPU_TARGET
