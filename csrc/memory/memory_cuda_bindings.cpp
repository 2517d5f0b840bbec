// Memory layers on CUDA as Python sees them. Also compiled into the emulated module of the tests, which checks every
// access of every kernel against the memory that is declared here.
#include "../bindings.h"
#include "../cuda/emulation_hooks.h"
#include "memory_arguments.h"
#include "memory_cuda.h"

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

// [count, width] rows of `stride` elements each.
void declare_rows(DeclaredMemory& memory, const void* data, int64_t count, int64_t width, int64_t stride,
                  int64_t element_bytes, MemoryKind kind) {
  if (data == nullptr || count == 0 || width == 0) return;
  memory.add(data, static_cast<size_t>(((count - 1) * stride + width) * element_bytes), kind);
}

void declare(DeclaredMemory& memory, const void* data, int64_t count, int64_t element_bytes, MemoryKind kind) {
  declare_rows(memory, data, 1, count, 0, element_bytes, kind);
}

// What product keys' rows may be read over: whole multiples of 16 bytes.
int64_t whole_row(const ProductKeyParams& params) {
  const int64_t per_chunk = 16 / bytes_of(params.dtype);
  return (params.half_dim + per_chunk - 1) / per_chunk * per_chunk;
}

void require_aligned(const ProductKeyParams& params) {
  const int64_t per_chunk = 16 / bytes_of(params.dtype);
  const auto is_aligned = [&](const void* data, int64_t stride) {
    return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride % per_chunk == 0;
  };
  require(is_aligned(params.query, params.query_token_stride) && is_aligned(params.query, params.query_head_stride) &&
              is_aligned(params.keys, params.keys_head_stride) && is_aligned(params.keys, params.keys_half_stride) &&
              is_aligned(params.keys, params.keys_row_stride),
          "query and keys must have rows on 16-byte boundaries");
}

}  // namespace

void bind_memory_cuda(py::module_& module) {
  module.def("product_key_topk_cuda", [](const py::tuple& fields, int device, int64_t stream) {
    const ProductKeyParams params = product_key_params_from(fields);
    require_cuda_dtype(params.dtype);
    require_aligned(params);
    const py::gil_scoped_release release;
    DeclaredMemory memory;
    const int64_t element = bytes_of(params.dtype), row = whole_row(params);
    if (params.num_tokens > 0 && params.num_heads > 0) {
      // The second half of a query stands one whole row behind the first.
      declare(memory, params.query,
              (params.num_tokens - 1) * params.query_token_stride + (params.num_heads - 1) * params.query_head_stride +
                  2 * row,
              element, MemoryKind::kInput);
      declare(memory, params.keys,
              (params.num_heads - 1) * params.keys_head_stride + params.keys_half_stride +
                  (params.num_keys - 1) * params.keys_row_stride + row,
              element, MemoryKind::kInput);
    }
    const int64_t num_results = params.num_tokens * params.num_heads * params.top_k;
    declare(memory, params.scores, num_results, 4, MemoryKind::kOutput);
    declare(memory, params.indices, num_results, 8, MemoryKind::kOutput);
    product_key_topk_cuda(params, place_from(device, stream));
  });
  module.def("memory_lookup_cuda", [](const py::tuple& p, const py::tuple& values, int64_t indices, int64_t weights,
                                      int64_t out, int device, int64_t stream) {
    const MemoryLookupParams params = lookup_params_from(p, values, indices, weights, out);
    const MemoryProblem& problem = params.problem;
    require_cuda_dtype(problem.dtype);
    const py::gil_scoped_release release;
    DeclaredMemory memory;
    const int64_t element = bytes_of(problem.dtype);
    declare_rows(memory, params.values, problem.num_rows, problem.row_dim, params.values_stride, element,
                 MemoryKind::kInput);
    declare(memory, params.indices, problem.num_entries(), 8, MemoryKind::kInput);
    declare(memory, params.weights, problem.num_entries(), 4, MemoryKind::kInput);
    declare(memory, params.out, problem.num_tokens * problem.row_dim, element, MemoryKind::kOutput);
    memory_lookup_cuda(params, place_from(device, stream));
  });
  module.def("memory_dot_cuda", [](const py::tuple& p, const py::tuple& values, int64_t indices, const py::tuple& x,
                                   int64_t out, int device, int64_t stream) {
    const MemoryDotParams params = dot_params_from(p, values, indices, x, out);
    const MemoryProblem& problem = params.problem;
    require_cuda_dtype(problem.dtype);
    const py::gil_scoped_release release;
    DeclaredMemory memory;
    const int64_t element = bytes_of(problem.dtype);
    declare_rows(memory, params.values, problem.num_rows, problem.row_dim, params.values_stride, element,
                 MemoryKind::kInput);
    declare(memory, params.indices, problem.num_entries(), 8, MemoryKind::kInput);
    declare_rows(memory, params.x, problem.num_tokens, problem.row_dim, params.x_stride, element, MemoryKind::kInput);
    declare(memory, params.out, problem.num_entries(), 4, MemoryKind::kOutput);
    memory_dot_cuda(params, place_from(device, stream));
  });
  module.def("memory_backward_workspace_bytes", [](const py::tuple& p) {
    const MemoryProblem problem = memory_problem_from(p);
    require_cuda_dtype(problem.dtype);
    const py::gil_scoped_release release;
    DeclaredMemory memory;  // nothing is touched, but another thread's emulated kernel must not be under way
    memory.add(nullptr, 0, MemoryKind::kInput);
    return memory_backward_workspace_bytes(problem);
  });
  module.def("memory_backward_cuda",
             [](const py::tuple& p, const py::tuple& values, const py::tuple& sorted, int64_t weights,
                const py::tuple& grad_out, int64_t num_targets, int64_t grad_rows, int64_t grad_weights,
                const py::tuple& workspace, int device, int64_t stream) {
               const MemoryBackwardParams params =
                   backward_params_from(p, values, sorted, weights, grad_out, num_targets, grad_rows, grad_weights);
               const MemoryProblem& problem = params.problem;
               require_cuda_dtype(problem.dtype);
               const RowsArgument space = rows_from(workspace);
               const py::gil_scoped_release release;
               DeclaredMemory memory;
               const int64_t element = bytes_of(problem.dtype);
               declare_rows(memory, params.values, problem.num_rows, problem.row_dim, params.values_stride, element,
                            MemoryKind::kInput);
               declare(memory, params.order, problem.num_entries(), 8, MemoryKind::kInput);
               declare(memory, params.sorted_rows, problem.num_entries(), 4, MemoryKind::kInput);
               if (params.targets != params.sorted_rows) {
                 declare(memory, params.targets, problem.num_entries(), 4, MemoryKind::kInput);
               }
               declare(memory, params.weights, problem.num_entries(), 4, MemoryKind::kInput);
               declare_rows(memory, params.grad_out, problem.num_tokens, problem.row_dim, params.grad_out_stride,
                            element, MemoryKind::kInput);
               declare(memory, params.grad_rows, num_targets * problem.row_dim, element, MemoryKind::kOutput);
               declare(memory, params.grad_weights, problem.num_entries(), 4, MemoryKind::kOutput);
               declare(memory, space.data, space.stride, 1, MemoryKind::kWorkspace);
               memory_backward_cuda(params, {space.data, space.stride}, place_from(device, stream));
             });
  module.def("memory_cuda_kernel_facts", [] {
    py::list rows;
    for (const CudaKernelFacts& facts : memory_cuda_kernel_facts()) {
      rows.append(py::make_tuple(facts.name, static_cast<int>(facts.dtype), facts.most_head_dim, facts.threads,
                                 facts.shared_bytes));
    }
    return rows;
  });
}

}  // namespace topgather
