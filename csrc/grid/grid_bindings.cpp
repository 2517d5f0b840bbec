// Entry points of grid and window attention, and what their kernels rely on.
#include <algorithm>

#include "../bindings.h"
#include "grid_cpu.h"
#include "grid_cuda.h"

namespace topgather {
namespace {

GroupAxis axis_of(bool is_window, int64_t size, int64_t step) {
  const int64_t num_steps = (size + step - 1) / step;
  if (is_window) return {size, num_steps, step, 1, std::min(step, size)};
  return {size, std::min(step, size), 1, step, num_steps};
}

template <typename Params>
void complete_problem(Params& params) {
  GridProblem& problem = params.problem;
  require(problem.rows_step >= 1 && problem.columns_step >= 1, "steps must be at least 1");
  require(problem.num_threads >= 1, "num_threads must be at least 1");
  problem.dtype = params.query.dtype;
  problem.batch_size = params.query.sizes[0];
  problem.num_heads = params.query.sizes[1];
  problem.rows = axis_of(problem.is_window, params.query.sizes[2], problem.rows_step);
  problem.columns = axis_of(problem.is_window, params.query.sizes[3], problem.columns_step);
  problem.head_dim = params.query.sizes[4];
  require(problem.head_dim >= 1, "head_dim must be at least 1");
}

}  // namespace

void complete(GridForwardParams& params) { complete_problem(params); }
void complete(GridBackwardParams& params) { complete_problem(params); }

static void bind(PyObject* module) {
#if !defined(TOPGATHER_EMULATION)
  add_cpu_entry(module, "grid_attention", &GridCpuKernels::forward);
  add_cpu_entry(module, "grid_attention_backward", &GridCpuKernels::backward);
#endif
#if defined(TOPGATHER_HAVE_CUDA)
  add_cuda_entry<GridForwardParams>(module, "grid_attention", {&grid_forward_cuda});
  add_cuda_entry<GridBackwardParams>(module, "grid_attention_backward",
                                     {&grid_backward_cuda, &grid_backward_workspace_bytes});
  add_kernel_facts(module, "grid_cuda_kernel_facts", &grid_cuda_kernel_facts);
#endif
}

static const OpBindings registered(&bind);

}  // namespace topgather
