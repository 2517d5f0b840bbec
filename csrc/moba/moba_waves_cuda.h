// How a problem is cut into waves, and what each wave finds where in the workspace. Decided on the host, from shapes
// alone: no kernel's result is ever waited for.
//
// A wave is either all queries of some units, or some queries of one unit. Its rows are numbered through the unit's
// query heads: row = head_in_group * num_queries + query. An entry is one choice: entry = row * top_k + slot.
#pragma once

#include <cstddef>
#include <cstdint>

#include "moba_config_cuda.h"
#include "moba_geometry_cuda.cuh"
#include "moba_params.h"

namespace topgather {

constexpr int64_t multiple_of(int64_t a, int64_t b) { return divide_up(a, b) * b; }

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

// What waves may take of the workspace, if not what MobaWaveConfig says; 0: as it says. For tests of many small waves
// and for devices with little memory.
int64_t workspace_budget(int64_t configured);

struct Wave {
  int64_t first_unit;
  int64_t num_units;
  int64_t first_query;
  int64_t num_queries;
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
    return {first_unit, units_left < units_per_wave ? units_left : units_per_wave, first_query,
            queries_left < queries_per_wave ? queries_left : queries_per_wave};
  }
};

WavePlan plan_waves(const MobaProblem& problem, const WaveDemand& demand);

// Hands out 256-byte aligned pieces of the workspace; without memory behind it, it only counts.
class WorkspaceCutter {
 public:
  explicit WorkspaceCutter(void* base) : base_(static_cast<unsigned char*>(base)) {}
  template <typename T>
  T* take(int64_t count) {
    unsigned char* piece = base_ == nullptr ? nullptr : base_ + used_;
    used_ += multiple_of(count * static_cast<int64_t>(sizeof(T)), 256);
    return reinterpret_cast<T*>(piece);
  }
  int64_t used() const { return used_; }

 private:
  unsigned char* base_;
  int64_t used_ = 0;
};

}  // namespace topgather
