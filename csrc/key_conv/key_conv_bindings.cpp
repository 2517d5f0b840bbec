// The key convolution's entry points, and what its kernels rely on.
#include "../bindings.h"
#include "key_conv_cpu.h"
#include "key_conv_cuda.h"

namespace topgather {

namespace {

template <typename Params>
void complete_problem(Params& params, std::initializer_list<Array<const void, 4>*> read, Array<void, 4>& written) {
  KeyConvProblem& problem = params.problem;
  if (problem.cu_seqlens.data != nullptr) {
    for (Array<const void, 4>* tokens : read) tokens->swap_dims(1, 2);
    written.swap_dims(1, 2);
  }
  problem.dtype = params.key.dtype;
  problem.weight_dtype = params.weight.dtype;
  problem.batch_size = params.key.sizes[0];
  problem.num_heads = params.key.sizes[1];
  problem.num_tokens = params.key.sizes[2];
  problem.head_dim = params.key.sizes[3];
  problem.kernel_width = params.weight.sizes[2];
  problem.num_sequences = problem.cu_seqlens.data == nullptr ? 0 : problem.cu_seqlens.sizes[0] - 1;
  problem.has_options = params.bias.data != nullptr || !problem.has_silu;
  require(problem.head_dim >= 1, "head_dim must be at least 1");
  require(problem.kernel_width >= 2 && problem.kernel_width <= 8, "kernel_width must be between 2 and 8");
  require(problem.cu_seqlens.data == nullptr || problem.batch_size == 1, "a packed problem has a batch_size of 1");
  require(problem.num_threads >= 1, "num_threads must be at least 1");
}

}  // namespace

void complete(KeyConvForwardParams& params) { complete_problem(params, {&params.key}, params.out); }

void complete(KeyConvBackwardParams& params) {
  complete_problem(params, {&params.key, &params.grad_out}, params.grad_key);
}

static void bind(PyObject* module) {
#if !defined(TOPGATHER_EMULATION)
  add_cpu_entry(module, "key_conv", &KeyConvCpuKernels::forward);
  add_cpu_entry(module, "key_conv_backward", &KeyConvCpuKernels::backward);
#endif
#if defined(TOPGATHER_HAVE_CUDA)
  add_cuda_entry<KeyConvForwardParams>(module, "key_conv", {&key_conv_forward_cuda});
  add_cuda_entry<KeyConvBackwardParams>(module, "key_conv_backward",
                                        {&key_conv_backward_cuda, &key_conv_backward_workspace_bytes});
#endif
}

static const OpBindings registered(&bind);

}  // namespace topgather
