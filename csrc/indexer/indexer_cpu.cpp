// One instruction set's entry points. Compiled once per target; see CMakeLists.txt for the flags of each.
#include "indexer_cpu.h"

#include "../cpu/dispatch.h"
#include "indexer_route_cpu.h"

namespace topgather::TOPGATHER_CPU_TARGET {
namespace {

void route(const IndexRouteParams& params) {
  with_storage(params.dtype, [&](auto storage) { index_route_storage<decltype(storage)>(params); });
}

}  // namespace

extern const IndexerCpuKernels kIndexerCpuKernels{&route};

}  // namespace topgather::TOPGATHER_CPU_TARGET
