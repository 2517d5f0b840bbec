// The key convolution on CUDA as Python sees it. Also compiled into the emulated module of the tests, which checks
// every access of every kernel against the memory that is declared here.
#include "../bindings.h"
#include "../cuda/emulation_hooks.h"
#include "key_conv_arguments.h"
#include "key_conv_cuda.h"

namespace py = pybind11;

namespace topgather {
namespace {

using cuda::DeclaredMemory;
using cuda::MemoryKind;

void require_cuda_dtype(Dtype dtype) {
  require(dtype != Dtype::kFloat64, "CUDA kernels take float32, bfloat16 and float16, not float64");
}

CudaPlace place_from(int device, int64_t stream) { return {device, reinterpret_cast<void*>(stream)}; }

// What the memory of each tensor reaches over.
class Extents {
 public:
  Extents(const KeyConvProblem& problem, DeclaredMemory& memory) : problem_(problem), memory_(memory) {
    if (problem.cu_seqlens == nullptr) return;
    memory.add(problem.cu_seqlens, static_cast<size_t>(problem.num_sequences + 1) * sizeof(int64_t),
               MemoryKind::kInput);
  }
  template <typename Keys>
  void tokens(const Keys& keys, MemoryKind kind) const {
    rows(keys, problem_.num_tokens, kind);
  }
  // In and out: where there are no tokens, no kernel writes what the caller has set to 0.
  void state(const ConstKeys& keys) const { rows(keys, problem_.kernel_width - 1, MemoryKind::kInput); }
  void state(const MutableKeys& keys) const { rows(keys, problem_.kernel_width - 1, MemoryKind::kInOut); }
  void weight(const void* data, MemoryKind kind) const {
    if (data == nullptr) return;
    require(problem_.weight_dtype == Dtype::kFloat32, "key_conv: on CUDA weights are float32");
    memory_.add(data,
                static_cast<size_t>(problem_.num_heads * problem_.head_dim * problem_.kernel_width) * sizeof(float),
                kind);
  }

 private:
  template <typename Keys>
  void rows(const Keys& keys, int64_t count, MemoryKind kind) const {
    if (keys.data == nullptr || problem_.batch_size == 0 || problem_.num_heads == 0 || count == 0) return;
    const int64_t last = (problem_.batch_size - 1) * keys.batch_stride + (problem_.num_heads - 1) * keys.head_stride +
                         (count - 1) * keys.row_stride;
    const int64_t element_bytes = problem_.dtype == Dtype::kFloat32 ? 4 : 2;
    memory_.add(keys.data, static_cast<size_t>((last + problem_.head_dim) * element_bytes), kind);
  }

  const KeyConvProblem& problem_;
  DeclaredMemory& memory_;
};

}  // namespace

void bind_key_conv_cuda(py::module_& module) {
  module.def("key_conv_forward_cuda", [](const py::tuple& problem, const py::tuple& key, const py::tuple& state,
                                         int64_t weight, const py::tuple& out, int device, int64_t stream) {
    const KeyConvForwardParams params = key_conv_forward_params_from(problem, key, state, weight, out);
    require_cuda_dtype(params.problem.dtype);
    const py::gil_scoped_release release;
    DeclaredMemory memory;
    const Extents extents(params.problem, memory);
    extents.tokens(params.key, MemoryKind::kInput);
    extents.state(params.state);
    extents.weight(params.weight, MemoryKind::kInput);
    extents.tokens(params.out, MemoryKind::kOutput);
    key_conv_forward_cuda(params, place_from(device, stream));
  });
  module.def("key_conv_backward_workspace_bytes", [](const py::tuple& fields, bool needs_grad_weight) {
    const KeyConvProblem problem = key_conv_problem_from(fields);
    require_cuda_dtype(problem.dtype);
    const py::gil_scoped_release release;
    DeclaredMemory memory;  // nothing is touched, but another thread's emulated kernel must not be under way
    memory.add(nullptr, 0, MemoryKind::kInput);
    return key_conv_backward_workspace_bytes(problem, needs_grad_weight);
  });
  module.def("key_conv_backward_cuda", [](const py::tuple& problem, const py::tuple& inputs, int64_t weight,
                                          const py::tuple& gradients, int64_t grad_weight, const py::tuple& workspace,
                                          int device, int64_t stream) {
    const KeyConvBackwardParams params = key_conv_backward_params_from(problem, inputs, weight, gradients, grad_weight);
    require_cuda_dtype(params.problem.dtype);
    require(workspace.size() == 2, "a workspace is (address, bytes)");
    const CudaWorkspace space{address_from<void*>(workspace[0]), integer_from(workspace[1])};
    const py::gil_scoped_release release;
    DeclaredMemory memory;
    const Extents extents(params.problem, memory);
    extents.tokens(params.grad_out, MemoryKind::kInput);
    extents.tokens(params.key, MemoryKind::kInput);
    extents.state(params.state);
    extents.weight(params.weight, MemoryKind::kInput);
    extents.tokens(params.grad_key, MemoryKind::kOutput);
    extents.state(params.grad_state);
    extents.weight(params.grad_weight, MemoryKind::kOutput);
    memory.add(space.data, static_cast<size_t>(space.bytes), MemoryKind::kWorkspace);
    key_conv_backward_cuda(params, space, place_from(device, stream));
  });
}

}  // namespace topgather
