// Entry points of decoding, and what its kernels rely on. On the CPU, what tensors of lengths and pages hold is checked
// here, before any kernel follows it.
#include <stdexcept>
#include <string>

#include "../bindings.h"
#include "decode_cpu.h"
#include "decode_cuda.h"

namespace topgather {
namespace {

template <typename Tokens, typename Pages>
void complete_problem(DecodeProblem& problem, const Tokens& tokens, const Pages& pages, int64_t page_size) {
  problem.dtype = tokens.dtype;
  problem.batch_size = tokens.sizes[0];
  problem.num_query_heads = tokens.sizes[1];
  problem.query_len = tokens.sizes[2];
  problem.head_dim = tokens.sizes[3];
  problem.num_pages = pages.sizes[0];
  problem.num_kv_heads = pages.sizes[1];
  problem.page_size = page_size;
  problem.pages_per_sequence = problem.page_table.data == nullptr ? 1 : problem.page_table.sizes[1];
  problem.scale = 1.0;
  problem.top_k = 1;
  problem.heads_per_choice = 1;
  require(problem.head_dim >= 1, "head_dim must be at least 1");
  require(
      problem.num_kv_heads >= 1 && problem.num_query_heads >= 1 && problem.num_query_heads % problem.num_kv_heads == 0,
      "num_query_heads must be a multiple of num_kv_heads");
  require(problem.block_size >= 1 && problem.page_size >= 1, "block_size and page_size must be at least 1");
  // An empty table has no address.
  require(problem.batch_size == 0 || problem.page_table.data != nullptr || problem.page_table.sizes[0] != 0 ||
              problem.num_pages == problem.batch_size,
          "without a page table a sequence has one page");
  require(problem.page_table.data == nullptr || problem.page_size % problem.block_size == 0,
          "with a page table page_size must be a multiple of block_size");
  require(problem.num_threads >= 1, "num_threads must be at least 1");
}

// Every length is one a sequence can have, and every page of it is there. `num_appended` tokens are about to come: as
// many as a sequence's num_tokens, or none.
template <typename Params, bool appends>
void check_lengths(const Params& params) {
  const DecodeProblem& problem = params.problem;
  const int64_t capacity = problem.pages_per_sequence * problem.page_size;
  for (int64_t s = 0; s < problem.batch_size; ++s) {
    const std::string sequence = " for sequence " + std::to_string(s);
    const int64_t num_new = problem.num_tokens.data == nullptr ? problem.query_len : problem.num_tokens.data[s];
    if (num_new < 0 || num_new > problem.query_len) {
      throw std::invalid_argument("num_tokens must be between 0 and the number of new tokens, " +
                                  std::to_string(problem.query_len) + ", got " + std::to_string(num_new) + sequence);
    }
    const int64_t cached = problem.seq_lens.data[s];
    if (cached < 0 || cached > capacity) {
      throw std::invalid_argument("seq_lens must be between 0 and what a sequence has room for, " +
                                  std::to_string(capacity) + ", got " + std::to_string(cached) + sequence);
    }
    const int64_t end = cached + (appends ? num_new : 0);
    if (end > capacity) {
      throw std::invalid_argument("key has " + std::to_string(num_new) + " new tokens" + sequence + ", which holds " +
                                  std::to_string(cached) + " and has room for " + std::to_string(capacity));
    }
    if (problem.page_table.data == nullptr) continue;
    const int64_t first_page = appends ? cached / problem.page_size : 0;
    for (int64_t column = first_page; column * problem.page_size < end; ++column) {
      const int64_t page = problem.page_table.data[s * problem.pages_per_sequence + column];
      if (page >= 0 && page < problem.num_pages) continue;
      throw std::out_of_range("page_table holds " + std::to_string(page) + " at column " + std::to_string(column) +
                              sequence + "; allowed are the numbers of the " + std::to_string(problem.num_pages) +
                              " pages");
    }
  }
}

}  // namespace

void complete(CacheAppendParams& params) {
  complete_problem(params.problem, params.key, params.key_pages, params.key_pages.sizes[2]);
  params.problem.value_dim = params.value_pages.sizes[3];
}

void complete(DecodeRouteParams& params) {
  complete_problem(params.problem, params.query, params.centroids, params.page_size);
  params.problem.top_k = params.block_indices.sizes[3];
  require(params.force_first >= 0 && params.force_last >= 1,
          "force_first must be at least 0, and force_last at least 1");
  require(params.force_first <= params.problem.top_k - params.force_last, "no more blocks can be forced than top_k");
}

void complete(DecodeParams& params) {
  complete_problem(params.problem, params.query, params.key_pages, params.key_pages.sizes[2]);
  params.problem.value_dim = params.value_pages.sizes[3];
  params.problem.top_k = params.block_indices.sizes[3];
  params.problem.scale = params.scale;
  require(params.window >= 0, "window must be at least 0");
  const int64_t capacity = params.problem.pages_per_sequence * params.problem.page_size;
  params.problem.window = params.window < capacity ? params.window : capacity;
  const int64_t num_choice_heads = params.block_indices.sizes[1];
  require(num_choice_heads >= 1 && params.problem.num_query_heads % num_choice_heads == 0,
          "num_query_heads must be a multiple of the heads of block_indices");
  params.problem.heads_per_choice = params.problem.num_query_heads / num_choice_heads;
}

static void bind(PyObject* module) {
#if !defined(TOPGATHER_EMULATION)
  add_cpu_entry(module, "moba_cache_append", &DecodeCpuKernels::append, &check_lengths<CacheAppendParams, true>);
  add_cpu_entry(module, "moba_decode_route", &DecodeCpuKernels::route, &check_lengths<DecodeRouteParams, false>);
  add_cpu_entry(module, "moba_decode", &DecodeCpuKernels::decode, &check_lengths<DecodeParams, false>);
#endif
#if defined(TOPGATHER_HAVE_CUDA)
  add_cuda_entry<CacheAppendParams>(module, "moba_cache_append", {&moba_cache_append_cuda});
  add_cuda_entry<DecodeRouteParams>(module, "moba_decode_route",
                                    {&moba_decode_route_cuda, &moba_decode_route_workspace_bytes});
  add_cuda_entry<DecodeParams>(module, "moba_decode", {&moba_decode_cuda, &moba_decode_workspace_bytes});
#endif
}

static const OpBindings registered(&bind);

}  // namespace topgather
