// Decoding as Python sees it: addresses, sizes and strides in, nothing out. On the CPU, what tensors of lengths and
// pages hold is checked here, before any kernel follows it.
#include <stdexcept>
#include <string>

#include "../bindings.h"
#include "../common/cpu_target.h"
#include "decode_arguments.h"
#include "decode_cpu.h"

namespace py = pybind11;

namespace topgather {
namespace {

const DecodeCpuKernels& cpu_kernels() {
  switch (cpu_target()) {
#if defined(TOPGATHER_HAVE_X86_TARGETS)
    case CpuTarget::kAvx2: return avx2::kDecodeCpuKernels;
    case CpuTarget::kAmx:  // nothing here multiplies on the matrix unit
    case CpuTarget::kAvx512: return avx512::kDecodeCpuKernels;
#endif
    default: return baseline::kDecodeCpuKernels;
  }
}

// Every length is one a sequence can have, and every page of it is there. `num_appended` tokens are about to come: as
// many as a sequence's num_tokens, or none.
void check_lengths(const DecodeProblem& problem, bool appends) {
  const int64_t capacity = problem.pages_per_sequence * problem.page_size;
  for (int64_t s = 0; s < problem.batch_size; ++s) {
    const std::string sequence = " for sequence " + std::to_string(s);
    const int64_t num_new = problem.num_tokens == nullptr ? problem.query_len : problem.num_tokens[s];
    if (num_new < 0 || num_new > problem.query_len) {
      throw std::invalid_argument("num_tokens must be between 0 and the number of new tokens, " +
                                  std::to_string(problem.query_len) + ", got " + std::to_string(num_new) + sequence);
    }
    const int64_t cached = problem.seq_lens[s];
    if (cached < 0 || cached > capacity) {
      throw std::invalid_argument("seq_lens must be between 0 and what a sequence has room for, " +
                                  std::to_string(capacity) + ", got " + std::to_string(cached) + sequence);
    }
    const int64_t end = cached + (appends ? num_new : 0);
    if (end > capacity) {
      throw std::invalid_argument("key has " + std::to_string(num_new) + " new tokens" + sequence + ", which holds " +
                                  std::to_string(cached) + " and has room for " + std::to_string(capacity));
    }
    if (problem.page_table == nullptr) continue;
    const int64_t first_page = appends ? cached / problem.page_size : 0;
    for (int64_t column = first_page; column * problem.page_size < end; ++column) {
      const int64_t page = problem.page_table[s * problem.pages_per_sequence + column];
      if (page >= 0 && page < problem.num_pages) continue;
      throw std::out_of_range("page_table holds " + std::to_string(page) + " at column " + std::to_string(column) +
                              sequence + "; allowed are the numbers of the " + std::to_string(problem.num_pages) +
                              " pages");
    }
  }
}

void bind_cpu(py::module_& module) {
  module.def("moba_cache_append_cpu", [](const py::tuple& problem, const py::tuple& key, const py::tuple& value,
                                         const py::tuple& key_pages, const py::tuple& value_pages,
                                         const py::tuple& centroids) {
    const CacheAppendParams params = append_params_from(problem, key, value, key_pages, value_pages, centroids);
    check_lengths(params.problem, true);
    const py::gil_scoped_release release;
    cpu_kernels().append(params);
  });
  module.def("moba_decode_route_cpu", [](const py::tuple& problem, const py::tuple& query, const py::tuple& centroids,
                                         const py::tuple& block_indices) {
    const DecodeRouteParams params = decode_route_params_from(problem, query, centroids, block_indices);
    check_lengths(params.problem, false);
    const py::gil_scoped_release release;
    cpu_kernels().route(params);
  });
  module.def("moba_decode_cpu", [](const py::tuple& problem, const py::tuple& query, const py::tuple& key_pages,
                                   const py::tuple& value_pages, const py::tuple& block_indices, const py::tuple& out,
                                   const py::tuple& lse) {
    const DecodeParams params = decode_params_from(problem, query, key_pages, value_pages, block_indices, out, lse);
    check_lengths(params.problem, false);
    const py::gil_scoped_release release;
    cpu_kernels().decode(params);
  });
}

}  // namespace

void bind_decode(py::module_& module) {
  bind_cpu(module);
#if defined(TOPGATHER_HAVE_CUDA)
  bind_decode_cuda(module);
#endif
}

}  // namespace topgather
