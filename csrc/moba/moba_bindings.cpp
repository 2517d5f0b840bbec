// The entry points of block attention, and what its kernels rely on.
#include <stdexcept>
#include <string>

#include "../bindings.h"
#include "moba_config.h"
#include "moba_cpu.h"
#include "moba_cuda.h"

namespace topgather {

namespace {

// Packed tensors of tokens come as [1, token, head, dim].
template <typename... Arrays>
void swap_packed(const MobaProblem& problem, Arrays&... tokens) {
  if (problem.cu_seqlens_q.data != nullptr) (tokens.swap_dims(1, 2), ...);
}

template <typename Params>
void complete_problem(Params& params) {
  MobaProblem& problem = params.problem;
  const bool is_packed = problem.cu_seqlens_q.data != nullptr;
  problem.dtype = params.query.dtype;
  problem.batch_size = is_packed ? problem.cu_seqlens_q.sizes[0] - 1 : params.query.sizes[0];
  problem.num_query_heads = params.query.sizes[1];
  problem.num_kv_heads = params.key.sizes[1];
  problem.query_len = params.query.sizes[2];
  problem.key_len = params.key.sizes[2];
  problem.head_dim = params.query.sizes[3];
  if constexpr (requires { params.value; }) problem.value_dim = params.value.sizes[3];
  problem.top_k = params.block_indices.sizes[3];
  const int64_t num_choice_heads = params.block_indices.sizes[1];
  require(
      problem.num_kv_heads >= 1 && problem.num_query_heads >= 1 && problem.num_query_heads % problem.num_kv_heads == 0,
      "num_query_heads must be a multiple of num_kv_heads");
  require(num_choice_heads >= 1 && problem.num_query_heads % num_choice_heads == 0,
          "num_query_heads must be a multiple of the heads of block_indices");
  problem.heads_per_choice = problem.num_query_heads / num_choice_heads;
  require(problem.block_size >= 1, "block_size must be at least 1");
  require(problem.top_k >= 1, "top_k must be at least 1");
  require(problem.cu_seqlens_q.sizes[0] == problem.cu_seqlens_k.sizes[0], "cu_seqlens must come in pairs");
  require(!is_packed || params.query.sizes[0] == 1, "packed tensors have a batch of 1");
  require(problem.num_threads >= 1, "num_threads must be at least 1");
  if constexpr (requires { params.window; }) {
    require(params.window >= 0 && (params.window == 0 || problem.is_causal),
            "window must be at least 0, and 0 unless causal");
    // Longer ones see nothing more, and need more slots.
    problem.window = params.window < problem.key_len ? params.window : problem.key_len;
  }
}

}  // namespace

void complete(CentroidParams& params) {
  MobaProblem& problem = params.problem;
  const bool is_packed = params.cu_seqlens.data != nullptr;
  if (is_packed) params.key.swap_dims(1, 2);
  problem.cu_seqlens_q = problem.cu_seqlens_k = params.cu_seqlens;
  problem.block_size = params.block_size;
  problem.num_threads = params.num_threads;
  problem.dtype = params.key.dtype;
  // A problem has at least one head; without any there is nothing to compute either.
  problem.num_kv_heads = params.key.sizes[1] > 0 ? params.key.sizes[1] : 1;
  problem.num_query_heads = problem.num_kv_heads;
  problem.batch_size = params.key.sizes[1] == 0 ? 0 : is_packed ? params.cu_seqlens.sizes[0] - 1 : params.key.sizes[0];
  problem.key_len = params.key.sizes[2];
  problem.query_len = is_packed ? problem.key_len : 0;
  problem.head_dim = params.key.sizes[3];
  problem.top_k = 1;
  problem.heads_per_choice = 1;
  require(problem.block_size >= 1, "block_size must be at least 1");
  require(problem.num_threads >= 1, "num_threads must be at least 1");
}

void complete(MobaRouteParams& params) {
  swap_packed(params.problem, params.query, params.key);
  complete_problem(params);
  if (!params.problem.is_causal) params.force_last = 0;
  require(params.force_first >= 0 && params.force_last >= (params.problem.is_causal ? 1 : 0),
          "force_first must be at least 0, and force_last at least 1 where causal");
  require(params.force_first <= params.problem.top_k - params.force_last, "no more blocks can be forced than top_k");
}

void complete(MobaForwardParams& params) {
  swap_packed(params.problem, params.query, params.key, params.value, params.out);
  complete_problem(params);
  params.problem.min_ranges = MobaRangeConfig::kMinRanges;
}

void complete(MobaBackwardParams& params) {
  swap_packed(params.problem, params.query, params.key, params.value, params.out, params.grad_out, params.grad_query,
              params.grad_key, params.grad_value);
  complete_problem(params);
}

#if !defined(TOPGATHER_EMULATION)
void throw_routing_fault(bool is_duplicate, int64_t head_idx, int64_t query, int64_t block) {
  const std::string place = " at query head " + std::to_string(head_idx) + ", query " + std::to_string(query);
  if (is_duplicate) {
    throw std::invalid_argument("block_indices names block " + std::to_string(block) + " more than once" + place +
                                "; each block may stand once per query");
  }
  throw std::out_of_range("block_indices holds " + std::to_string(block) + place +
                          "; allowed are -1 and the numbers of the sequence's key blocks");
}
#endif

static void bind(PyObject* module) {
#if !defined(TOPGATHER_EMULATION)
  add_cpu_entry(module, "block_centroids", &MobaCpuKernels::centroids);
  add_cpu_entry(module, "moba_route", &MobaCpuKernels::route);
  add_cpu_entry(module, "moba_attention", &MobaCpuKernels::forward);
  add_cpu_entry(module, "moba_attention_backward", &MobaCpuKernels::backward);
#endif
#if defined(TOPGATHER_HAVE_CUDA)
  add_cuda_entry<CentroidParams>(module, "block_centroids", {&moba_centroids_cuda, &moba_centroids_workspace_bytes});
  add_cuda_entry<MobaRouteParams>(module, "moba_route", {&moba_route_cuda, &moba_route_workspace_bytes});
  add_cuda_entry<MobaForwardParams>(module, "moba_attention", {&moba_forward_cuda, &moba_forward_workspace_bytes});
  add_cuda_entry<MobaBackwardParams>(module, "moba_attention_backward",
                                     {&moba_backward_cuda, &moba_backward_workspace_bytes});
  add_entry(module, "moba_cuda_set_budget", {"bytes"}, [](PyObject* const* arguments) {
    return PyLong_FromLongLong(moba_cuda_set_budget(read_integer(arguments[0], "bytes")));
  });
  add_kernel_facts(module, "moba_cuda_kernel_facts", &moba_cuda_kernel_facts);
#endif
}

static const OpBindings registered(&bind);

}  // namespace topgather
