// Grid and window attention forward on the CPU: dense attention inside each group, tokens read where they lie.
//
//   out_i = sum_t softmax_t(scale * dot(query_i, key_t) + bias_it) value_t,   t over the tokens of i's group
//   lse_i = log sum_t exp(scale * dot(query_i, key_t) + bias_it)
//
// Who owns what: a task is a few groups of heads one after the other, or up to kQueriesPerTask queries of a large
// group, and owns their rows of out and lse. Tokens of the next group, and of what is written, are prefetched between
// the steps: rows lie scattered, and waiting for them would take longer than the arithmetic. Groups that fit one
// vector have a task of their own (grid_forward_small_cpu.h). Steps:
//   once a call:
//   0. the bias transposed, and in base 2;
//   per group:
//   1. keys and values of the group to dense scratch, from wherever they lie;
//   per tile of kTileQueries queries:
//   2. gather the queries, transposed and scaled: queries stand in vector lanes, keys are broadcast;
//   per tile of kTileKeys keys:
//   3. scores [keys, queries], plus bias;
//   4. running maximum and sum per query (online softmax, base 2), weights in place of the scores;
//   5. running outputs rescaled, plus weights^T x values;
//   last:
//   6. divide, convert, write out, lse and softmax terms.
// Numerics: scores, weights and sums in float32 (float64 for float64). A row all of whose scores are -inf: NaN, as
// plain softmax. There is no empty row: a token is in its own group.
// Determinism: a task's arithmetic depends on shapes alone, so any number of threads gives the same bits.
#pragma once

#include <cmath>
#include <limits>

#include "../common/parallel.h"
#include "../cpu/attention_tile.h"
#include "../cpu/math.h"
#include "../cpu/scratch.h"
#include "../cpu/tile_gemm.h"
#include "grid_bias_cpu.h"
#include "grid_cpu.h"
#include "grid_forward_small_cpu.h"
#include "grid_geometry_cpu.h"

namespace topgather::TOPGATHER_CPU_TARGET {

template <typename Storage>
struct GridForwardTask {
  using T = ComputeOf<Storage>;
  static constexpr int64_t kTileQueries = GridConfig::kTileQueries;
  static constexpr int64_t kTileKeys = GridConfig::kTileKeys;

  const GridForwardParams& params;
  const TransposedBias<T>& bias;
  int64_t padded_dim;

  T* keys;                             // [G, padded D]
  T* values;                           // [G, padded D]
  T* query_tile;                       // [D, kTileQueries]
  T* scores;                           // [kTileKeys, kTileQueries]
  T* out_tile;                         // [kTileQueries, padded D]
  int32_t* bias_indices;               // [G]
  TokensAhead<const Storage, 3> next;  // of the group that follows
  TokensAhead<Storage, 1> written;     // of this one
  int64_t num_prefetched = 0;          // tokens by each call of prefetch_tokens

  // Results go through the caches: in groups of more than a vector nothing was gained past them.
  GridForwardTask(const GridForwardParams& p, const TransposedBias<T>& b, bool, ScratchCutter& scratch)
      : params(p), bias(b), padded_dim(round_up(p.problem.head_dim, kLanes<T>)) {
    const int64_t max_tokens = p.problem.max_tokens();
    keys = scratch.take<T>(max_tokens * padded_dim);
    values = scratch.take<T>(max_tokens * padded_dim);
    query_tile = scratch.take<T>(p.problem.head_dim * kTileQueries);
    scores = scratch.take<T>(kTileKeys * kTileQueries);
    out_tile = scratch.take<T>(kTileQueries * padded_dim);
    bias_indices = scratch.take<int32_t>(max_tokens);
  }

  // Steps 2 to 6 for queries [first, first + count) of the group.
  void attend(const Group& group, int64_t first, int64_t count) {
    const GridProblem& problem = params.problem;
    const int64_t padded_count = round_up(count, kLanes<T>);
    gather_token_columns<Storage>(rows_in<const Storage>(problem, params.query, group), group, first, count,
                                  problem.head_dim, static_cast<T>(problem.scale * kLog2E), query_tile, kTileQueries);
    RunningSoftmax<T, kTileQueries> running;
    for (int64_t i = 0; i < padded_count; ++i) {
      running.largest[i] = -std::numeric_limits<T>::infinity();
      running.sum[i] = 0;
    }
    for (int64_t first_key = 0; first_key < group.num_tokens; first_key += kTileKeys) {
      const int64_t num_keys = min64(kTileKeys, group.num_tokens - first_key);
      const auto prefetch = [&] { prefetch_tokens(); };
      tile_gemm_prefetching<false>(GemmOperands<T>{keys + first_key * padded_dim, padded_dim, 1, query_tile,
                                                   kTileQueries, scores, kTileQueries, problem.head_dim},
                                   num_keys, padded_count, prefetch);
      if (bias.exists()) {
        add_bias(bias, group.head_idx, bias_indices + first, bias_indices + first_key, count, num_keys, scores,
                 kTileQueries);
      }
      online_softmax(scores, count, num_keys, running);
      const GemmOperands<T> product{scores,     1,        kTileQueries, values + first_key * padded_dim,
                                    padded_dim, out_tile, padded_dim,   num_keys};
      if (first_key == 0) {
        tile_gemm_prefetching<false>(product, count, padded_dim, prefetch);
      } else {
        for (int64_t i = 0; i < count; ++i) {
          T* row = out_tile + i * padded_dim;
          for (int64_t d = 0; d < padded_dim; d += kLanes<T>) store<T>(row + d, load<T>(row + d) * running.rescale[i]);
        }
        tile_gemm_prefetching<true>(product, count, padded_dim, prefetch);
      }
    }
    finish(group, first, count, running);
  }

  void prefetch_tokens() {
    next.prefetch(num_prefetched);
    written.prefetch(num_prefetched);
  }

  // Step 6.
  void finish(const Group& group, int64_t first, int64_t count, const RunningSoftmax<T, kTileQueries>& running) {
    const GridProblem& problem = params.problem;
    rows_in<Storage>(problem, params.out, group)
        .for_each(group, first, first + count, [&](int64_t token, Storage* row) {
          const int64_t i = token - first;
          store_row(out_tile + i * padded_dim, problem.head_dim, 1 / running.sum[i], row);
        });
    numbers_in(problem, params.lse.at<T>(), group).for_each(group, first, first + count, [&](int64_t token, T* lse) {
      const int64_t i = token - first;
      *lse = (running.largest[i] + std::log2(running.sum[i])) * static_cast<T>(kLn2);
      write_softmax_terms(running.largest[i], running.sum[i],
                          params.softmax_terms.at<T>() + 2 * (lse - params.lse.at<T>()));
    });
  }

  // `following` is the group of the next call, or null.
  void run(const Group& group, int64_t first, int64_t last, const Group* following) {
    const GridProblem& problem = params.problem;
    if (first >= group.num_tokens) return;
    next = {};
    if (following != nullptr) next = {problem, *following, {&params.query, &params.key, &params.value}};
    written = {problem, group, {&params.out}};
    num_prefetched = tokens_per_prefetch<T>(problem.max_tokens(), padded_dim, 1, 1);
    gather_tokens<Storage>(rows_in<const Storage>(problem, params.key, group), group, 0, group.num_tokens,
                           problem.head_dim, padded_dim, keys);
    gather_tokens<Storage>(rows_in<const Storage>(problem, params.value, group), group, 0, group.num_tokens,
                           problem.head_dim, padded_dim, values);
    if (bias.exists()) write_bias_indices(problem, group, bias_indices);
    for (int64_t tile = first; tile < min64(last, group.num_tokens); tile += kTileQueries) {
      attend(group, tile, min64(kTileQueries, min64(last, group.num_tokens) - tile));
    }
  }
};

// By shapes alone.
inline int64_t groups_per_task(int64_t num_groups) {
  return max64(1, min64(GridConfig::kMaxGroupsPerTask, num_groups / GridConfig::kMinTasks));
}

template <template <typename> typename TaskOf, typename Storage>
void run_grid_forward(const GridForwardParams& params) {
  using T = ComputeOf<Storage>;
  using Task = TaskOf<Storage>;
  const GridProblem& problem = params.problem;
  const int64_t num_units = problem.batch_size * problem.num_groups() * problem.num_heads;
  if (num_units == 0) return;
  populate_image<Storage>(problem, params.out);
  const TransposedBias<T> bias(problem, params.bias.data);
  const MutableImage* const results[] = {&params.out};
  const bool streams = streams_results<Storage>(problem, 4, results, 1);
  const int64_t pieces = ceil_div(problem.max_tokens(), GridConfig::kQueriesPerTask);
  const double pairs = static_cast<double>(problem.max_tokens()) * static_cast<double>(problem.max_tokens());
  const int64_t units_per_task = groups_per_task(num_units * pieces);
  const int64_t num_tasks = ceil_div(num_units, units_per_task) * pieces;
  const int num_workers =
      useful_threads(problem.num_threads, num_tasks, 2.0 * static_cast<double>(num_units * problem.head_dim) * pairs);
  const WorkerScratch scratch(num_workers, [&](ScratchCutter& cutter) { Task(params, bias, streams, cutter); });
  for_each_task(num_workers, num_tasks, [&](int64_t task, int worker) {
    const int64_t first_query = task % pieces * GridConfig::kQueriesPerTask;
    const int64_t first_unit = task / pieces * units_per_task;
    ScratchCutter cutter = scratch.of(worker);
    Task forward(params, bias, streams, cutter);
    for_each_with_next(
        first_unit, min64(first_unit + units_per_task, num_units),
        [&](int64_t unit) { return unit_at(problem, params.query, unit); },
        [&](const Group& group, const Group* following) {
          forward.run(group, first_query, first_query + GridConfig::kQueriesPerTask, following);
        });
  });
}

template <typename Storage>
void grid_forward_storage(const GridForwardParams& params) {
  if (params.problem.max_tokens() <= kLanes<ComputeOf<Storage>>) {
    run_grid_forward<GridForwardSmallTask, Storage>(params);
  } else {
    run_grid_forward<GridForwardTask, Storage>(params);
  }
}

}  // namespace topgather::TOPGATHER_CPU_TARGET
