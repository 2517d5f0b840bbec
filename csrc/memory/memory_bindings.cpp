// The entry points of memory layers, and what their kernels rely on.
#include "../bindings.h"
#include "memory_cpu.h"
#include "memory_cuda.h"

namespace topgather {

namespace {

template <typename Params, typename PerEntry>
void complete_problem(Params& params, const PerEntry& per_entry) {
  MemoryProblem& problem = params.problem;
  problem.dtype = params.values.dtype;
  problem.num_rows = params.values.sizes[0];
  problem.row_dim = params.values.sizes[1];
  problem.num_tokens = per_entry.sizes[0];
  problem.bag_size = per_entry.sizes[1];
  problem.num_entries = problem.num_tokens * problem.bag_size;
  require(problem.num_rows <= INT32_MAX - 1, "a table has at most 2^31 - 2 rows");
  require(problem.num_threads >= 1, "num_threads must be at least 1");
}

}  // namespace

void complete(ProductKeyParams& params) {
  params.dtype = params.query.dtype;
  params.num_tokens = params.query.sizes[0];
  params.num_heads = params.query.sizes[1];
  params.num_keys = params.keys.sizes[2];
  params.half_dim = params.keys.sizes[3];
  require(params.num_keys >= 1 && params.num_keys <= 46340, "num_keys must be between 1 and 46340");
  require(params.half_dim >= 1, "half_dim must be at least 1");
  require(params.top_k >= 1 && params.top_k <= params.num_keys * params.num_keys,
          "top_k must be between 1 and num_keys^2");
  require(params.num_threads >= 1, "num_threads must be at least 1");
}

void complete(MemoryLookupParams& params) {
  MemoryProblem& problem = params.problem;
  complete_problem(params, params.indices);
  if (params.offsets.data == nullptr) return;
  problem.num_tokens = params.offsets.sizes[0] - 1;
  problem.bag_size = problem.num_tokens == 0 ? 0 : (problem.num_entries + problem.num_tokens - 1) / problem.num_tokens;
}

void complete(MemoryDotParams& params) { complete_problem(params, params.indices); }

void complete(MemoryBackwardParams& params) {
  complete_problem(params, params.weights);
  params.num_targets = params.grad_rows.sizes[0];
  require(params.num_targets <= INT32_MAX, "num_targets must fit 31 bits");
}

namespace {

template <typename Params>
void complete_quantized(Params& params) {
  MemoryProblem& problem = params.problem;
  QuantizedRows& rows = params.rows;
  problem.dtype = Dtype::kFloat32;
  problem.num_rows = rows.values.sizes[0];
  problem.row_dim = rows.values.sizes[1];
  problem.num_tokens = params.indices.sizes[0];
  problem.bag_size = params.indices.sizes[1];
  problem.num_entries = problem.num_tokens * problem.bag_size;
  require(problem.num_rows <= INT32_MAX - 1, "a table has at most 2^31 - 2 rows");
  require(problem.num_threads >= 1, "num_threads must be at least 1");
  const int64_t num_groups = rows.scales.sizes[1];
  require(num_groups >= 1 && problem.row_dim % num_groups == 0, "columns must divide into the groups of scales");
  rows.group_size = problem.row_dim / num_groups;
}

}  // namespace

void complete(QuantizedLookupParams& params) {
  MemoryProblem& problem = params.problem;
  complete_quantized(params);
  if (params.offsets.data == nullptr) return;
  problem.num_tokens = params.offsets.sizes[0] - 1;
  problem.bag_size = problem.num_tokens == 0 ? 0 : (problem.num_entries + problem.num_tokens - 1) / problem.num_tokens;
}

void complete(QuantizedDotParams& params) { complete_quantized(params); }

void complete(MemoryUpdateParams& params) {
  complete_problem(params, params.weights);
  require(params.squares.data != nullptr || (params.steps.data != nullptr || params.problem.num_rows == 0),
          "rows are updated with their steps");
}

static void bind(PyObject* module) {
#if !defined(TOPGATHER_EMULATION)
  add_cpu_entry(module, "product_key_topk", &MemoryCpuKernels::product_key_topk);
  add_cpu_entry(module, "memory_lookup", &MemoryCpuKernels::lookup);
  add_cpu_entry(module, "memory_dot", &MemoryCpuKernels::dot);
  add_cpu_entry(module, "memory_backward", &MemoryCpuKernels::backward);
  add_cpu_entry(module, "memory_lookup_quantized", &MemoryCpuKernels::lookup_quantized);
  add_cpu_entry(module, "memory_dot_quantized", &MemoryCpuKernels::dot_quantized);
  add_cpu_entry(module, "memory_update", &MemoryUpdateCpuKernels::update);
#endif
#if defined(TOPGATHER_HAVE_CUDA)
  add_cuda_entry<ProductKeyParams>(module, "product_key_topk", {&product_key_topk_cuda});
  add_cuda_entry<MemoryLookupParams>(module, "memory_lookup", {&memory_lookup_cuda});
  add_cuda_entry<MemoryDotParams>(module, "memory_dot", {&memory_dot_cuda});
  add_cuda_entry<MemoryBackwardParams>(module, "memory_backward",
                                       {&memory_backward_cuda, &memory_backward_workspace_bytes});
  add_cuda_entry<QuantizedLookupParams>(module, "memory_lookup_quantized", {&memory_lookup_quantized_cuda});
  add_cuda_entry<QuantizedDotParams>(module, "memory_dot_quantized", {&memory_dot_quantized_cuda});
  add_cuda_entry<MemoryUpdateParams>(module, "memory_update",
                                     {&memory_update_cuda, &memory_update_workspace_bytes});
  add_kernel_facts(module, "memory_cuda_kernel_facts", &memory_cuda_kernel_facts);
#endif
}

static const OpBindings registered(&bind);

}  // namespace topgather
