// Grid and window attention on CUDA as Python sees them. Also compiled into the emulated module of the tests, which
// checks every access of every kernel against the memory that is declared here.
#include "../bindings.h"
#include "../cuda/emulation_hooks.h"
#include "grid_arguments.h"
#include "grid_cuda.h"

namespace py = pybind11;

namespace topgather {
namespace {

using cuda::DeclaredMemory;
using cuda::MemoryKind;

int64_t bytes_of(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : 2; }

void require_cuda_dtype(Dtype dtype) {
  require(dtype != Dtype::kFloat64, "CUDA kernels take float32, bfloat16 and float16, not float64");
}

CudaPlace place_from(int device, int64_t stream) { return {device, reinterpret_cast<void*>(stream)}; }

// What the memory of each tensor reaches over.
class Extents {
 public:
  Extents(const GridProblem& problem, DeclaredMemory& memory) : problem_(problem), memory_(memory) {}

  // Rows start on 16-byte boundaries and are read in whole multiples of 16 bytes, which asynchronous copies need.
  void input(const ConstImage& image) const {
    const int64_t per_chunk = 16 / bytes_of(problem_.dtype);
    require(reinterpret_cast<uintptr_t>(image.data) % 16 == 0 && image.batch_stride % per_chunk == 0 &&
                image.head_stride % per_chunk == 0 && image.row_stride % per_chunk == 0 &&
                image.column_stride % per_chunk == 0,
            "query, key, value, out and grad_out must have rows on 16-byte boundaries");
    add(image, (problem_.head_dim + per_chunk - 1) / per_chunk * per_chunk, MemoryKind::kInput);
  }
  void output(const MutableImage& image) const { add(image, problem_.head_dim, MemoryKind::kOutput); }
  void per_token(const void* data, MemoryKind kind) const { numbers(data, num_tokens(), kind); }
  void per_pair(const void* data, MemoryKind kind) const {
    numbers(data, problem_.num_heads * problem_.most_tokens() * problem_.most_tokens(), kind);
  }

 private:
  int64_t num_tokens() const {
    return problem_.batch_size * problem_.num_heads * problem_.rows.size * problem_.columns.size;
  }
  void numbers(const void* data, int64_t count, MemoryKind kind) const {
    if (data != nullptr) memory_.add(data, static_cast<size_t>(count) * sizeof(float), kind);
  }
  template <typename Image>
  void add(const Image& image, int64_t row_elements, MemoryKind kind) const {
    if (num_tokens() == 0) return;
    const int64_t last = (problem_.batch_size - 1) * image.batch_stride + (problem_.num_heads - 1) * image.head_stride +
                         (problem_.rows.size - 1) * image.row_stride +
                         (problem_.columns.size - 1) * image.column_stride;
    memory_.add(image.data, static_cast<size_t>((last + row_elements) * bytes_of(problem_.dtype)), kind);
  }

  const GridProblem& problem_;
  DeclaredMemory& memory_;
};

}  // namespace

void bind_grid_cuda(py::module_& module) {
  module.def("grid_forward_cuda",
             [](const py::tuple& problem, const py::tuple& query, const py::tuple& key, const py::tuple& value,
                int64_t bias, const py::tuple& out, int64_t lse, int device, int64_t stream) {
               const GridForwardParams params = grid_forward_params_from(problem, query, key, value, bias, out, lse);
               require_cuda_dtype(params.problem.dtype);
               const py::gil_scoped_release release;
               DeclaredMemory memory;
               const Extents extents(params.problem, memory);
               for (const ConstImage& image : {params.query, params.key, params.value}) extents.input(image);
               extents.per_pair(params.bias, MemoryKind::kInput);
               extents.output(params.out);
               extents.per_token(params.lse, MemoryKind::kOutput);
               grid_forward_cuda(params, place_from(device, stream));
             });
  module.def("grid_backward_workspace_bytes", [](const py::tuple& fields, bool needs_grad_bias) {
    const GridProblem problem = grid_problem_from(fields);
    require_cuda_dtype(problem.dtype);
    const py::gil_scoped_release release;
    DeclaredMemory memory;  // nothing is touched, but another thread's emulated kernel must not be under way
    memory.add(nullptr, 0, MemoryKind::kInput);
    return grid_backward_workspace_bytes(problem, needs_grad_bias);
  });
  module.def("grid_backward_cuda", [](const py::tuple& problem, const py::tuple& inputs, int64_t bias, int64_t lse,
                                      const py::tuple& gradients, int64_t grad_bias, const py::tuple& workspace,
                                      int device, int64_t stream) {
    const GridBackwardParams params = grid_backward_params_from(problem, inputs, bias, lse, gradients, grad_bias);
    require_cuda_dtype(params.problem.dtype);
    require(workspace.size() == 2, "a workspace is (address, bytes)");
    const CudaWorkspace space{address_from<void*>(workspace[0]), integer_from(workspace[1])};
    const py::gil_scoped_release release;
    DeclaredMemory memory;
    const Extents extents(params.problem, memory);
    for (const ConstImage& image : {params.query, params.key, params.value, params.out, params.grad_out}) {
      extents.input(image);
    }
    extents.per_pair(params.bias, MemoryKind::kInput);
    extents.per_token(params.lse, MemoryKind::kInput);
    for (const MutableImage& image : {params.grad_query, params.grad_key, params.grad_value}) extents.output(image);
    extents.per_pair(params.grad_bias, MemoryKind::kOutput);
    memory.add(space.data, static_cast<size_t>(space.bytes), MemoryKind::kWorkspace);
    grid_backward_cuda(params, space, place_from(device, stream));
  });
  module.def("grid_cuda_kernel_facts", [] {
    py::list rows;
    for (const CudaKernelFacts& facts : grid_cuda_kernel_facts()) {
      rows.append(py::make_tuple(facts.name, static_cast<int>(facts.dtype), facts.most_head_dim, facts.threads,
                                 facts.shared_bytes));
    }
    return rows;
  });
}

}  // namespace topgather
