// How a problem is cut into waves, and what each wave finds where in the workspace. Decided on the host, from shapes
// alone: no kernel's result is ever waited for.
//
// A wave is either all queries of some units, or some queries of one unit. Its rows are numbered through the unit's
// query heads: row = head_in_group * num_queries + query. An entry is one choice: entry = row * top_k + slot.
#pragma once

#include <cstdint>

#include "../cuda/divisor.h"
#include "../cuda/workspace.h"
#include "moba_config_cuda.h"
#include "moba_geometry_cuda.cuh"
#include "moba_params.h"

namespace topgather {

inline bool is_packed(const MobaProblem& problem) { return problem.cu_seqlens_q.data != nullptr; }

// Key blocks of a unit. Packed: a bound, since every sequence may end in a short block.
inline int64_t blocks_per_unit(const MobaProblem& problem) {
  if (!is_packed(problem)) return divide_up(problem.key_len, problem.block_size);
  const int64_t sequences = problem.batch_size < problem.key_len ? problem.batch_size : problem.key_len;
  return problem.key_len / problem.block_size + sequences;
}
inline int64_t count_units(const MobaProblem& problem) {
  return (is_packed(problem) ? 1 : problem.batch_size) * problem.num_kv_heads;
}
inline int64_t heads_per_unit(const MobaProblem& problem) { return problem.num_query_heads / problem.num_kv_heads; }

// std::invalid_argument, for rows of more elements than there are kernels for.
[[noreturn]] void throw_rows_too_wide(int64_t num_elements);

struct Wave {
  int64_t first_unit;
  int64_t num_units;
  int64_t first_query;
  int64_t num_queries;
  cuda::Divisor by_num_queries;
};

// Bytes that a wave needs for each row, for each unit whatever its rows, and in all.
struct WaveDemand {
  int64_t row_bytes;
  int64_t unit_bytes;
  int64_t budget;
};

struct WavePlan {
  int64_t units_per_wave;
  int64_t queries_per_wave;
  int64_t num_unit_steps;
  int64_t num_query_steps;

  int64_t num_waves() const { return num_unit_steps * num_query_steps; }
  Wave wave(const MobaProblem& problem, int64_t wave_idx) const {
    const int64_t first_unit = wave_idx / num_query_steps * units_per_wave;
    const int64_t first_query = wave_idx % num_query_steps * queries_per_wave;
    const int64_t units_left = count_units(problem) - first_unit;
    const int64_t queries_left = problem.query_len - first_query;
    const int64_t num_queries = queries_left < queries_per_wave ? queries_left : queries_per_wave;
    return {first_unit, units_left < units_per_wave ? units_left : units_per_wave, first_query, num_queries,
            cuda::Divisor(num_queries)};
  }
};

WavePlan plan_waves(const MobaProblem& problem, const WaveDemand& demand);

}  // namespace topgather
