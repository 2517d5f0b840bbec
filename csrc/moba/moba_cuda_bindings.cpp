// Block attention on CUDA as Python sees it: addresses, sizes and strides in, nothing out. Also compiled into the
// emulated module of the tests, which checks every access of every kernel against the memory that is declared here.
#include <string>

#include "../bindings.h"
#include "../cuda/emulation_hooks.h"
#include "moba_arguments.h"
#include "moba_cuda.h"

namespace py = pybind11;

namespace topgather {
namespace {

using cuda::DeclaredMemory;
using cuda::MemoryKind;

bool is_packed_problem(const MobaProblem& problem) { return problem.cu_seqlens_q != nullptr; }

int64_t bytes_of(Dtype dtype) { return dtype == Dtype::kFloat64 ? 8 : (dtype == Dtype::kFloat32 ? 4 : 2); }

CudaWorkspace workspace_from(const py::tuple& fields) {
  require(fields.size() == 2, "a workspace is (address, bytes)");
  return {reinterpret_cast<void*>(integer_from(fields[0])), integer_from(fields[1])};
}

// What the memory of each tensor reaches over, from its sizes and strides.
class Extents {
 public:
  Extents(const MobaProblem& problem, DeclaredMemory& memory) : problem_(problem), memory_(memory) {
    if (!is_packed_problem(problem)) return;
    const auto bytes = static_cast<size_t>(problem.batch_size + 1) * sizeof(int64_t);
    memory.add(problem.cu_seqlens_q, bytes, MemoryKind::kInput);
    memory.add(problem.cu_seqlens_k, bytes, MemoryKind::kInput);
  }

  // Rows of `row_bytes` bytes; what a kernel reads of a row is whole multiples of `granularity` bytes.
  template <typename Tensor>
  void add(const Tensor& tensor, int64_t heads, int64_t length, int64_t row_bytes, int64_t element_bytes,
           MemoryKind kind, int64_t granularity = 1) const {
    const int64_t batch = is_packed_problem(problem_) ? 1 : problem_.batch_size;
    if (tensor.data == nullptr || batch == 0 || heads == 0 || length == 0 || row_bytes == 0) return;
    const int64_t last =
        (batch - 1) * tensor.batch_stride + (heads - 1) * tensor.head_stride + (length - 1) * tensor.row_stride;
    const int64_t whole_row = (row_bytes + granularity - 1) / granularity * granularity;
    memory_.add(tensor.data, static_cast<size_t>(last * element_bytes + whole_row), kind);
  }
  void input(const ConstTensor& tensor, int64_t heads, int64_t length, int64_t dim) const {
    const int64_t bytes = bytes_of(problem_.dtype);
    add(tensor, heads, length, dim * bytes, bytes, MemoryKind::kInput, 16);
  }
  void output(const MutableTensor& tensor, int64_t heads, int64_t length, int64_t dim) const {
    const int64_t bytes = bytes_of(problem_.dtype);
    add(tensor, heads, length, dim * bytes, bytes, MemoryKind::kOutput);
  }
  void per_query(const ConstTensor& tensor, int64_t count) const {
    add(tensor, problem_.num_query_heads, problem_.query_len, count * 4, 4, MemoryKind::kInput);
  }
  void per_query(const MutableTensor& tensor, int64_t count) const {
    add(tensor, problem_.num_query_heads, problem_.query_len, count * 4, 4, MemoryKind::kOutput);
  }

 private:
  const MobaProblem& problem_;
  DeclaredMemory& memory_;
};

// Rows start on 16-byte boundaries, which asynchronous copies need.
void require_aligned(const ConstTensor& tensor, const MobaProblem& problem, const char* message) {
  const int64_t per_row = 16 / bytes_of(problem.dtype);
  require(reinterpret_cast<uintptr_t>(tensor.data) % 16 == 0 && tensor.row_stride % per_row == 0 &&
              tensor.head_stride % per_row == 0 && tensor.batch_stride % per_row == 0,
          message);
}

void require_cuda_problem(const MobaProblem& problem) {
  require(problem.dtype != Dtype::kFloat64, "CUDA kernels take float32, bfloat16 and float16, not float64");
  require(problem.query_len <= INT32_MAX && problem.key_len <= INT32_MAX, "at most 2^31 - 1 tokens on CUDA");
  require(problem.num_query_heads <= INT32_MAX && problem.block_size <= INT32_MAX && problem.top_k <= INT32_MAX,
          "heads, block_size and top_k must fit 31 bits on CUDA");
}

CudaPlace place_from(int device, int64_t stream) { return {device, reinterpret_cast<void*>(stream)}; }

}  // namespace

void bind_moba_cuda(py::module_& module) {
  module.def("moba_centroids_cuda", [](const py::tuple& p, const py::tuple& key, const py::tuple& centroids, int device,
                                       int64_t stream) {
    const CentroidParams params{problem_from(p), tensor_from<ConstTensor>(key), tensor_from<MutableTensor>(centroids)};
    const MobaProblem& problem = params.problem;
    require_cuda_problem(problem);
    const py::gil_scoped_release release;
    DeclaredMemory memory;
    const Extents extents(problem, memory);
    const int64_t element = bytes_of(problem.dtype), row = problem.head_dim;
    const int64_t num_blocks = (problem.key_len + problem.block_size - 1) / problem.block_size;
    extents.add(params.key, problem.num_kv_heads, problem.key_len, row * element, element, MemoryKind::kInput);
    extents.add(params.centroids, problem.num_kv_heads, num_blocks, row * 4, 4, MemoryKind::kOutput);
    moba_centroids_cuda(params, place_from(device, stream));
  });
  module.def("moba_cuda_workspace_bytes", [](const std::string& kind, const py::tuple& p, int device) -> int64_t {
    const MobaProblem problem = problem_from(p);
    require_cuda_problem(problem);
    const py::gil_scoped_release release;
    DeclaredMemory memory;  // nothing is touched, but another thread's emulated kernel must not be under way
    memory.add(nullptr, 0, MemoryKind::kInput);
    if (kind == "route") return moba_route_workspace_bytes(problem, place_from(device, 0));
    if (kind == "forward") return moba_forward_workspace_bytes(problem);
    if (kind == "backward") return moba_backward_workspace_bytes(problem, false);
    require(kind == "backward_deterministic", "unknown kind of workspace");
    return moba_backward_workspace_bytes(problem, true);
  });
  module.def("moba_cuda_set_budget", &moba_cuda_set_budget);
  module.def("moba_cuda_kernel_facts", [] {
    py::list rows;
    for (const CudaKernelFacts& facts : moba_cuda_kernel_facts()) {
      rows.append(py::make_tuple(facts.name, static_cast<int>(facts.dtype), facts.most_head_dim, facts.threads,
                                 facts.shared_bytes));
    }
    return rows;
  });
  module.def("moba_route_cuda",
             [](const py::tuple& p, const py::tuple& query, const py::tuple& key, const py::tuple& block_indices,
                const py::tuple& workspace, int device, int64_t stream) {
               const MobaRouteParams params{problem_from(p), tensor_from<ConstTensor>(query),
                                            tensor_from<ConstTensor>(key), tensor_from<MutableTensor>(block_indices)};
               const MobaProblem& problem = params.problem;
               const CudaWorkspace space = workspace_from(workspace);
               require_cuda_problem(problem);
               require_aligned(params.query, problem, "query must have rows on 16-byte boundaries");
               require_aligned(params.key, problem, "key must have rows on 16-byte boundaries");
               const py::gil_scoped_release release;
               DeclaredMemory memory;
               const Extents extents(problem, memory);
               extents.input(params.query, problem.num_query_heads, problem.query_len, problem.head_dim);
               extents.input(params.key, problem.num_kv_heads, problem.key_len, problem.head_dim);
               extents.per_query(params.block_indices, problem.top_k);
               memory.add(space.data, static_cast<size_t>(space.bytes), MemoryKind::kWorkspace);
               moba_route_cuda(params, space, place_from(device, stream));
             });
  module.def("moba_forward_cuda", [](const py::tuple& p, const py::tuple& query, const py::tuple& key,
                                     const py::tuple& value, const py::tuple& block_indices, const py::tuple& out,
                                     const py::tuple& lse, const py::tuple& workspace, int device, int64_t stream) {
    const MobaForwardParams params = forward_params_from(p, query, key, value, block_indices, out, lse);
    const MobaProblem& problem = params.problem;
    const CudaWorkspace space = workspace_from(workspace);
    require_cuda_problem(problem);
    require_aligned(params.query, problem, "query must have rows on 16-byte boundaries");
    require_aligned(params.key, problem, "key must have rows on 16-byte boundaries");
    require_aligned(params.value, problem, "value must have rows on 16-byte boundaries");
    const py::gil_scoped_release release;
    DeclaredMemory memory;
    const Extents extents(problem, memory);
    extents.input(params.query, problem.num_query_heads, problem.query_len, problem.head_dim);
    extents.input(params.key, problem.num_kv_heads, problem.key_len, problem.head_dim);
    extents.input(params.value, problem.num_kv_heads, problem.key_len, problem.value_dim);
    extents.per_query(params.block_indices, problem.top_k);
    extents.output(params.out, problem.num_query_heads, problem.query_len, problem.value_dim);
    extents.per_query(params.lse, 1);
    memory.add(space.data, static_cast<size_t>(space.bytes), MemoryKind::kWorkspace);
    moba_forward_cuda(params, space, place_from(device, stream));
  });
  module.def(
      "moba_backward_cuda",
      [](const py::tuple& p, const py::tuple& query, const py::tuple& key, const py::tuple& value,
         const py::tuple& block_indices, const py::tuple& out, const py::tuple& lse, const py::tuple& grad_out,
         const py::tuple& grad_lse, const py::tuple& grad_query, const py::tuple& grad_key, const py::tuple& grad_value,
         const py::tuple& workspace, bool is_deterministic, int device, int64_t stream) {
        const MobaBackwardParams params = backward_params_from(p, query, key, value, block_indices, out, lse, grad_out,
                                                               grad_lse, grad_query, grad_key, grad_value);
        const MobaProblem& problem = params.problem;
        const CudaWorkspace space = workspace_from(workspace);
        require_cuda_problem(problem);
        require_aligned(params.query, problem, "query must have rows on 16-byte boundaries");
        require_aligned(params.key, problem, "key must have rows on 16-byte boundaries");
        require_aligned(params.value, problem, "value must have rows on 16-byte boundaries");
        require_aligned(params.grad_out, problem, "grad_out must have rows on 16-byte boundaries");
        const py::gil_scoped_release release;
        DeclaredMemory memory;
        const Extents extents(problem, memory);
        const int64_t element = bytes_of(problem.dtype);
        extents.input(params.query, problem.num_query_heads, problem.query_len, problem.head_dim);
        extents.input(params.key, problem.num_kv_heads, problem.key_len, problem.head_dim);
        extents.input(params.value, problem.num_kv_heads, problem.key_len, problem.value_dim);
        extents.per_query(params.block_indices, problem.top_k);
        extents.add(params.out, problem.num_query_heads, problem.query_len, problem.value_dim * element, element,
                    MemoryKind::kInput);
        extents.per_query(params.lse, 1);
        extents.input(params.grad_out, problem.num_query_heads, problem.query_len, problem.value_dim);
        extents.per_query(params.grad_lse, 1);
        extents.output(params.grad_query, problem.num_query_heads, problem.query_len, problem.head_dim);
        extents.output(params.grad_key, problem.num_kv_heads, problem.key_len, problem.head_dim);
        extents.output(params.grad_value, problem.num_kv_heads, problem.key_len, problem.value_dim);
        memory.add(space.data, static_cast<size_t>(space.bytes), MemoryKind::kWorkspace);
        moba_backward_cuda(params, space, is_deterministic, place_from(device, stream));
      });
}

}  // namespace topgather
