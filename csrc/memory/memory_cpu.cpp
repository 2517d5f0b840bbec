// One instruction set's entry points. Compiled once per target; see CMakeLists.txt for the flags of each.
#include "memory_cpu.h"

#include "../cpu/dispatch.h"
#include "memory_backward_cpu.h"
#include "memory_lookup_cpu.h"
#include "memory_quantized_cpu.h"
#include "memory_topk_cpu.h"

namespace topgather::TOPGATHER_CPU_TARGET {
namespace {

void product_key_topk(const ProductKeyParams& params) {
  with_storage(params.dtype, [&](auto storage) { product_key_topk_storage<decltype(storage)>(params); });
}

void lookup(const MemoryLookupParams& params) {
  with_storage(params.problem.dtype, [&](auto storage) { memory_lookup_storage<decltype(storage)>(params); });
}

void dot(const MemoryDotParams& params) {
  with_storage(params.problem.dtype, [&](auto storage) { memory_dot_storage<decltype(storage)>(params); });
}

void backward(const MemoryBackwardParams& params) {
  with_storage(params.problem.dtype, [&](auto storage) { memory_backward_storage<decltype(storage)>(params); });
}

void lookup_quantized(const QuantizedLookupParams& params) {
  if (params.rows.is_float8) return memory_lookup_quantized<Float8>(params);
  memory_lookup_quantized<Int8>(params);
}

void dot_quantized(const QuantizedDotParams& params) {
  if (params.rows.is_float8) return memory_dot_quantized<Float8>(params);
  memory_dot_quantized<Int8>(params);
}

}  // namespace

extern const MemoryCpuKernels kMemoryCpuKernels{&product_key_topk, &lookup,           &dot,
                                                &backward,         &lookup_quantized, &dot_quantized};

}  // namespace topgather::TOPGATHER_CPU_TARGET
