// Decoding on CUDA as Python sees it. Also compiled into the emulated module of the tests, which checks every access of
// every kernel against the memory that is declared here.
#include "../bindings.h"
#include "../cuda/emulation_hooks.h"
#include "decode_arguments.h"
#include "decode_cuda.h"

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

CudaWorkspace workspace_from(const py::tuple& fields) {
  require(fields.size() == 2, "a workspace is (address, bytes)");
  return {address_from<void*>(fields[0]), integer_from(fields[1])};
}

// What the memory of each tensor reaches over.
class Extents {
 public:
  Extents(const DecodeProblem& problem, DeclaredMemory& memory) : problem_(problem), memory_(memory) {
    numbers(problem.seq_lens, problem.batch_size);
    numbers(problem.num_tokens, problem.batch_size);
    numbers(problem.page_table, problem.batch_size * problem.pages_per_sequence);
  }

  template <typename Tokens>
  void tokens(const Tokens& tensor, int64_t num_heads, int64_t dim, int64_t element_bytes, MemoryKind kind) const {
    add(tensor, tensor.batch_stride, problem_.batch_size, num_heads, problem_.query_len, dim, element_bytes, kind);
  }
  template <typename Pages>
  void pages(const Pages& tensor, int64_t num_rows, int64_t dim, int64_t element_bytes, MemoryKind kind) const {
    add(tensor, tensor.page_stride, problem_.num_pages, problem_.num_kv_heads, num_rows, dim, element_bytes, kind);
  }
  int64_t blocks_per_page() const { return (problem_.page_size + problem_.block_size - 1) / problem_.block_size; }

 private:
  void numbers(const int32_t* data, int64_t count) const {
    if (data != nullptr) memory_.add(data, static_cast<size_t>(count) * sizeof(int32_t), MemoryKind::kInput);
  }
  template <typename Tensor>
  void add(const Tensor& tensor, int64_t first_stride, int64_t first_size, int64_t num_heads, int64_t num_rows,
           int64_t dim, int64_t element_bytes, MemoryKind kind) const {
    if (first_size == 0 || num_heads == 0 || num_rows == 0 || dim == 0) return;
    const int64_t last =
        (first_size - 1) * first_stride + (num_heads - 1) * tensor.head_stride + (num_rows - 1) * tensor.row_stride;
    memory_.add(tensor.data, static_cast<size_t>((last + dim) * element_bytes), kind);
  }

  const DecodeProblem& problem_;
  DeclaredMemory& memory_;
};

template <int64_t (*count)(const DecodeProblem&)>
int64_t workspace_bytes(const py::tuple& fields) {
  const DecodeProblem problem = decode_problem_from(fields);
  require_cuda_dtype(problem.dtype);
  const py::gil_scoped_release release;
  DeclaredMemory memory;  // nothing is touched, but another thread's emulated kernel must not be under way
  memory.add(nullptr, 0, MemoryKind::kInput);
  return count(problem);
}

}  // namespace

void bind_decode_cuda(py::module_& module) {
  module.def("moba_cache_append_cuda", [](const py::tuple& problem, const py::tuple& key, const py::tuple& value,
                                          const py::tuple& key_pages, const py::tuple& value_pages,
                                          const py::tuple& centroids, int device, int64_t stream) {
    const CacheAppendParams params = append_params_from(problem, key, value, key_pages, value_pages, centroids);
    const DecodeProblem& p = params.problem;
    require_cuda_dtype(p.dtype);
    const py::gil_scoped_release release;
    DeclaredMemory memory;
    const Extents extents(p, memory);
    extents.tokens(params.key, p.num_kv_heads, p.head_dim, bytes_of(p.dtype), MemoryKind::kInput);
    extents.tokens(params.value, p.num_kv_heads, p.value_dim, bytes_of(p.dtype), MemoryKind::kInput);
    extents.pages(params.key_pages, p.page_size, p.head_dim, bytes_of(p.dtype), MemoryKind::kInOut);
    extents.pages(params.value_pages, p.page_size, p.value_dim, bytes_of(p.dtype), MemoryKind::kInOut);
    extents.pages(params.centroids, extents.blocks_per_page(), p.head_dim, sizeof(float), MemoryKind::kInOut);
    moba_cache_append_cuda(params, place_from(device, stream));
  });
  module.def("moba_decode_route_workspace_bytes", &workspace_bytes<moba_decode_route_workspace_bytes>);
  module.def("moba_decode_route_cuda", [](const py::tuple& problem, const py::tuple& query, const py::tuple& centroids,
                                          const py::tuple& block_indices, const py::tuple& workspace, int device,
                                          int64_t stream) {
    const DecodeRouteParams params = decode_route_params_from(problem, query, centroids, block_indices);
    const DecodeProblem& p = params.problem;
    require_cuda_dtype(p.dtype);
    const CudaWorkspace space = workspace_from(workspace);
    const py::gil_scoped_release release;
    DeclaredMemory memory;
    const Extents extents(p, memory);
    extents.tokens(params.query, p.num_query_heads, p.head_dim, bytes_of(p.dtype), MemoryKind::kInput);
    extents.pages(params.centroids, extents.blocks_per_page(), p.head_dim, sizeof(float), MemoryKind::kInput);
    extents.tokens(params.block_indices, p.num_query_heads, p.top_k, sizeof(int32_t), MemoryKind::kOutput);
    memory.add(space.data, static_cast<size_t>(space.bytes), MemoryKind::kWorkspace);
    moba_decode_route_cuda(params, space, place_from(device, stream));
  });
  module.def("moba_decode_workspace_bytes", &workspace_bytes<moba_decode_workspace_bytes>);
  module.def("moba_decode_cuda", [](const py::tuple& problem, const py::tuple& query, const py::tuple& key_pages,
                                    const py::tuple& value_pages, const py::tuple& block_indices, const py::tuple& out,
                                    const py::tuple& lse, const py::tuple& workspace, int device, int64_t stream) {
    const DecodeParams params = decode_params_from(problem, query, key_pages, value_pages, block_indices, out, lse);
    const DecodeProblem& p = params.problem;
    require_cuda_dtype(p.dtype);
    const CudaWorkspace space = workspace_from(workspace);
    const py::gil_scoped_release release;
    DeclaredMemory memory;
    const Extents extents(p, memory);
    extents.tokens(params.query, p.num_query_heads, p.head_dim, bytes_of(p.dtype), MemoryKind::kInput);
    extents.pages(params.key_pages, p.page_size, p.head_dim, bytes_of(p.dtype), MemoryKind::kInput);
    extents.pages(params.value_pages, p.page_size, p.value_dim, bytes_of(p.dtype), MemoryKind::kInput);
    extents.tokens(params.block_indices, p.num_query_heads, p.top_k, sizeof(int32_t), MemoryKind::kInput);
    extents.tokens(params.out, p.num_query_heads, p.value_dim, bytes_of(p.dtype), MemoryKind::kOutput);
    extents.tokens(params.lse, p.num_query_heads, 1, sizeof(float), MemoryKind::kOutput);
    memory.add(space.data, static_cast<size_t>(space.bytes), MemoryKind::kWorkspace);
    moba_decode_cuda(params, space, place_from(device, stream));
  });
}

}  // namespace topgather
