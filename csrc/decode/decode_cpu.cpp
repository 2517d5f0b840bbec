// One instruction set's entry points. Compiled once per target; see CMakeLists.txt for the flags of each.
#include "decode_cpu.h"

#include "../cpu/dispatch.h"
#include "decode_append_cpu.h"
#include "decode_attend_cpu.h"
#include "decode_route_cpu.h"

namespace topgather::TOPGATHER_CPU_TARGET {
namespace {

void append(const CacheAppendParams& params) {
  with_storage(params.problem.dtype, [&](auto storage) { append_storage<decltype(storage)>(params); });
}

void route(const DecodeRouteParams& params) {
  with_storage(params.problem.dtype, [&](auto storage) { decode_route_storage<decltype(storage)>(params); });
}

void decode(const DecodeParams& params) {
  with_storage(params.problem.dtype, [&](auto storage) {
    const RoutingFault fault = decode_storage<decltype(storage)>(params);
    if (fault.kind == RoutingFault::kNone) return;
    throw_routing_fault(fault.kind == RoutingFault::kDuplicate, fault.head_idx, fault.query, fault.block);
  });
}

}  // namespace

extern const DecodeCpuKernels kDecodeCpuKernels{&append, &route, &decode};

}  // namespace topgather::TOPGATHER_CPU_TARGET
