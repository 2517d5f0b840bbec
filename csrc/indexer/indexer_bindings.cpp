// The indexer's entry points, and what its kernels rely on.
#include <algorithm>

#include "../bindings.h"
#include "indexer_cpu.h"
#include "indexer_cuda.h"

namespace topgather {

void complete(IndexRouteParams& params) {
  params.dtype = params.index_query.dtype;
  params.batch_size = params.index_query.sizes[0];
  params.num_index_heads = params.index_query.sizes[1];
  params.num_key_heads = params.index_key.sizes[1];
  params.num_choices = params.block_indices.sizes[1];
  params.query_len = params.index_query.sizes[2];
  params.key_len = params.index_key.sizes[2];
  params.head_dim = params.index_query.sizes[3];
  params.top_k = params.block_indices.sizes[3];
  require(
      params.num_key_heads >= 1 && params.num_index_heads >= 1 && params.num_index_heads % params.num_key_heads == 0,
      "the heads of index_query must be a multiple of those of index_key");
  require(params.num_choices >= 1 && params.num_index_heads % params.num_choices == 0,
          "the heads of index_query must be a multiple of the choices");
  params.heads_per_choice = params.num_index_heads / params.num_choices;
  require(params.reduction_code >= 0 && params.reduction_code <= 2, "reduction_code must be between 0 and 2");
  const bool is_sum = params.reduction_code == static_cast<int64_t>(IndexReduction::kReluSum);
  require(is_sum || (params.heads_per_choice == 1 && params.weights.data == nullptr),
          "several heads a choice and weights are for sums");
  require(params.weights.data == nullptr || params.weights.num_elements() == 0 || params.query_len <= 1 ||
              params.weights.strides[2] == 1,
          "weights must be contiguous");
  require(params.block_size >= 1, "block_size must be at least 1");
  require(params.top_k >= 1, "top_k must be at least 1");
  require(params.force_first >= 0 && params.force_last >= 0 && params.force_first + params.force_last <= params.top_k,
          "at most top_k blocks can be forced");
  require(params.num_threads >= 1, "num_threads must be at least 1");
  params.num_blocks = (params.key_len + params.block_size - 1) / params.block_size;
  const int64_t forced = params.force_first + params.force_last;
  params.list_length = std::min(params.top_k - forced, std::max<int64_t>(params.num_blocks - forced, 0));
}

static void bind(PyObject* module) {
#if !defined(TOPGATHER_EMULATION)
  add_cpu_entry(module, "index_route", &IndexerCpuKernels::route);
#endif
#if defined(TOPGATHER_HAVE_CUDA)
  add_cuda_entry<IndexRouteParams>(module, "index_route", {&index_route_cuda, &index_route_workspace_bytes});
#endif
}

static const OpBindings registered(&bind);

}  // namespace topgather
