// How many units and queries a wave takes, and what bounds it. Plain host code.
#include "moba_waves_cuda.h"

#include <stdexcept>
#include <string>

#include "moba_cuda.h"
#include "moba_stages_cuda.cuh"

namespace topgather {

int64_t moba_cuda_set_budget(int64_t bytes) { return set_workspace_budget(bytes); }

void throw_rows_too_wide(int64_t num_elements) {
  throw std::invalid_argument("head_dim and value_dim must be at most 256 on CUDA, got " +
                              std::to_string(num_elements));
}

WavePlan plan_waves(const MobaProblem& problem, const WaveDemand& demand) {
  const int64_t group = heads_per_unit(problem);
  const int64_t num_units = count_units(problem);
  int64_t queries = (demand.budget - demand.unit_bytes) / (demand.row_bytes * group);
  const int64_t max_by_index = INT32_MAX / (group * problem.top_k);
  queries = queries < max_by_index ? queries : max_by_index;
  if (queries >= problem.query_len) {
    const int64_t unit_bytes = demand.unit_bytes + problem.query_len * group * demand.row_bytes;
    int64_t units = unit_bytes > 0 ? demand.budget / unit_bytes : num_units;
    units = units < 1 ? 1 : (units < num_units ? units : num_units);
    units = units < MobaWaveConfig::kMaxUnits ? units : MobaWaveConfig::kMaxUnits;
    return {units, problem.query_len, divide_up(num_units, units), 1};
  }
  queries = queries < 1 ? 1 : queries;
  const int64_t num_steps = divide_up(problem.query_len, queries);
  const int64_t even = multiple_of(divide_up(problem.query_len, num_steps), 64);
  queries = even < queries ? even : queries;
  return {1, queries, num_units, divide_up(problem.query_len, queries)};
}

std::vector<CudaKernelFacts> moba_cuda_kernel_facts() {
  std::vector<CudaKernelFacts> facts;
  add_route_kernel_facts(facts);
  add_forward_kernel_facts(facts);
  add_backward_kernel_facts(facts);
  return facts;
}

}  // namespace topgather
