// Grid and window attention backward on the CPU: each group alone, weights recomputed.
//
//   weight_it      = exp(scale * dot(query_i, key_t) + bias_it - lse_i), from the forward's softmax terms
//                    (softmax_terms.h)
//   delta_i        = dot(grad_out_i, out_i)
//   grad_value_t   = sum_i weight_it grad_out_i
//   grad_score_it  = weight_it (dot(grad_out_i, value_t) - delta_i)
//   grad_query_i   = scale * sum_t grad_score_it key_t
//   grad_key_t     = scale * sum_i grad_score_it query_i
//   grad_bias_it   = sum over batch and groups of grad_score_it
//
// Who owns what: a token is in one group, so a group of a head owns its rows of every gradient: nothing is shared but
// grad_bias. A task is a few groups of heads one after the other, or, with a grad_bias, an equal share of one head's
// groups; each task sums grad_bias on its own, and the tasks' sums are added in order at the end. Memory is
// prefetched as in the forward. Steps per group:
//   1. keys, values, queries and grad_out to dense scratch; delta and softmax terms;
//   per tile of queries, per tile of keys:
//   2. scores and products of values with grad_out, both [keys, queries]; weights and gradients of scores in their
//      place;
//   3. grad_value and grad_key of the tile's keys, grad_query of its queries, grad_bias;
//   last:
//   4. scale, convert, write.
// Numerics: as the forward.
// Determinism: a task's arithmetic depends on shapes alone.
#pragma once

#include "grid_forward_cpu.h"

namespace topgather::TOPGATHER_CPU_TARGET {

template <typename Storage>
struct GridBackwardTask {
  using T = ComputeOf<Storage>;
  static constexpr int64_t kTileQueries = GridConfig::kTileQueries;
  static constexpr int64_t kTileKeys = GridConfig::kTileKeys;

  const GridBackwardParams& params;
  const TransposedBias<T>& bias;
  int64_t padded_dim;
  bool streams;  // gradients, past the caches

  T* keys;                             // [G, padded D]
  T* values;                           // [G, padded D]
  T* grad_keys;                        // [G, padded D]
  T* grad_values;                      // [G, padded D]
  T* query_columns;                    // [D, kTileQueries], scaled
  T* grad_out_columns;                 // [D, kTileQueries]
  T* query_rows;                       // [kTileQueries, padded D]
  T* grad_out_rows;                    // [kTileQueries, padded D]
  T* grad_query_rows;                  // [kTileQueries, padded D]
  T* weights;                          // [kTileKeys, kTileQueries]
  T* grad_scores;                      // [kTileKeys, kTileQueries]
  BackwardRows<T, kTileQueries> rows;  // of a tile of queries
  int32_t* bias_indices;               // [G]
  TokensAhead<const Storage, 5> next;  // of the group that follows
  TokensAhead<Storage, 3> written;     // of this one
  int64_t num_prefetched = 0;          // tokens by each call of prefetch_tokens

  GridBackwardTask(const GridBackwardParams& p, const TransposedBias<T>& b, bool streams_gradients,
                   ScratchCutter& scratch)
      : params(p), bias(b), padded_dim(round_up(p.problem.head_dim, kLanes<T>)), streams(streams_gradients) {
    const int64_t max_tokens = p.problem.max_tokens();
    for (T** rows : {&keys, &values, &grad_keys, &grad_values}) *rows = scratch.take<T>(max_tokens * padded_dim);
    for (T** columns : {&query_columns, &grad_out_columns}) *columns = scratch.take<T>(padded_dim * kTileQueries);
    for (T** rows : {&query_rows, &grad_out_rows, &grad_query_rows}) *rows = scratch.take<T>(padded_dim * kTileQueries);
    for (T** tile : {&weights, &grad_scores}) *tile = scratch.take<T>(kTileKeys * kTileQueries);
    bias_indices = scratch.take<int32_t>(max_tokens);
  }

  // Step 1 for a tile of queries.
  void gather_queries(const Group& group, int64_t first, int64_t count) {
    const GridProblem& problem = params.problem;
    const int64_t depth = problem.head_dim;
    const auto queries = rows_in<const Storage>(problem, params.query, group);
    const auto grad_outs = rows_in<const Storage>(problem, params.grad_out, group);
    gather_tokens<Storage>(queries, group, first, first + count, depth, padded_dim, query_rows);
    gather_tokens<Storage>(grad_outs, group, first, first + count, depth, padded_dim, grad_out_rows);
    gather_token_columns<Storage>(queries, group, first, count, depth, static_cast<T>(problem.scale * kLog2E),
                                  query_columns, kTileQueries);
    gather_token_columns<Storage>(grad_outs, group, first, count, depth, T(1), grad_out_columns, kTileQueries);
    rows_in<const Storage>(problem, params.out, group)
        .for_each(group, first, first + count, [&](int64_t token, const Storage* out) {
          const T* grad_out = grad_out_rows + (token - first) * padded_dim;
          Vector<T> sums{};
          int64_t d = 0;
          for (; d + kLanes<T> <= depth; d += kLanes<T>) sums += load_vector(out + d) * load<T>(grad_out + d);
          T sum = sum_of_lanes<T>(sums);
          for (; d < depth; ++d) sum += to_compute(out[d]) * grad_out[d];
          rows.delta[token - first] = sum;
        });
    numbers_in(problem, params.lse.at<T>(), group)
        .for_each(group, first, first + count, [&](int64_t token, const T* lse) {
          const T* all = params.softmax_terms.at<T>();
          const T* row_terms = all == nullptr ? nullptr : all + 2 * (lse - params.lse.at<T>());
          rows.set(token - first, read_softmax_terms(row_terms, *lse), rows.delta[token - first]);
        });
    for (int64_t i = count; i < round_up(count, kLanes<T>); ++i) rows.set(i, {0, 0}, 0);
  }

  void prefetch_tokens() {
    next.prefetch(num_prefetched);
    if (!streams) written.prefetch(num_prefetched);
  }

  // Gradients of [num_rows, padded D]; is_first: nothing is there yet.
  void add_product(const GemmOperands<T>& product, int64_t num_rows, bool is_first) {
    const auto prefetch = [&] { prefetch_tokens(); };
    if (is_first) {
      tile_gemm_prefetching<false>(product, num_rows, padded_dim, prefetch);
    } else {
      tile_gemm_prefetching<true>(product, num_rows, padded_dim, prefetch);
    }
  }

  // Steps 2 and 3 for one tile of keys.
  void add_tile(const Group& group, int64_t first, int64_t count, int64_t first_key, int64_t num_keys, T* grad_bias) {
    const int64_t depth = params.problem.head_dim;
    const int64_t padded_count = round_up(count, kLanes<T>);
    T* key_rows = keys + first_key * padded_dim;
    const auto prefetch = [&] { prefetch_tokens(); };
    tile_gemm_prefetching<false>(
        GemmOperands<T>{key_rows, padded_dim, 1, query_columns, kTileQueries, weights, kTileQueries, depth}, num_keys,
        padded_count, prefetch);
    tile_gemm_prefetching<false>(GemmOperands<T>{values + first_key * padded_dim, padded_dim, 1, grad_out_columns,
                                                 kTileQueries, grad_scores, kTileQueries, depth},
                                 num_keys, padded_count, prefetch);
    if (bias.exists()) {
      add_bias(bias, group.head_idx, bias_indices + first, bias_indices + first_key, count, num_keys, weights,
               kTileQueries);
    }
    weigh_with_terms(weights, grad_scores, num_keys, padded_count / kLanes<T>, rows, T(0));
    add_product(
        {weights, kTileQueries, 1, grad_out_rows, padded_dim, grad_values + first_key * padded_dim, padded_dim, count},
        num_keys, first == 0);
    add_product(
        {grad_scores, kTileQueries, 1, query_rows, padded_dim, grad_keys + first_key * padded_dim, padded_dim, count},
        num_keys, first == 0);
    add_product({grad_scores, 1, kTileQueries, key_rows, padded_dim, grad_query_rows, padded_dim, num_keys}, count,
                first_key == 0);
    if (grad_bias == nullptr) return;
    const int64_t max_tokens = params.problem.max_tokens();
    for (int64_t i = 0; i < count; ++i) {
      T* row = grad_bias + bias_indices[first + i] * max_tokens;
      for (int64_t key = 0; key < num_keys; ++key) {
        row[bias_indices[first_key + key]] += grad_scores[key * kTileQueries + i];
      }
    }
  }

  // Step 4.
  void write(const Group& group, const MutableImage& image, const T* rows, int64_t first, int64_t last, T factor) {
    const GridProblem& problem = params.problem;
    rows_in<Storage>(problem, image, group).for_each(group, first, last, [&](int64_t token, Storage* target) {
      const T* row = rows + (token - first) * padded_dim;
      if constexpr (std::is_same_v<Storage, T>) {
        if (streams) return stream_row(row, problem.head_dim, factor, target);
      }
      store_row(row, problem.head_dim, factor, target);
    });
  }

  // `following` is the group of the next call, or null.
  void run(const Group& group, const Group* following, T* grad_bias) {
    const GridProblem& problem = params.problem;
    const int64_t num_tokens = group.num_tokens;
    next = {};
    if (following != nullptr) {
      next = {problem, *following, {&params.key, &params.value, &params.query, &params.grad_out, &params.out}};
    }
    written = {problem, group, {&params.grad_query, &params.grad_key, &params.grad_value}};
    num_prefetched = tokens_per_prefetch<T>(problem.max_tokens(), padded_dim, 2, 3);
    gather_tokens<Storage>(rows_in<const Storage>(problem, params.key, group), group, 0, num_tokens, problem.head_dim,
                           padded_dim, keys);
    gather_tokens<Storage>(rows_in<const Storage>(problem, params.value, group), group, 0, num_tokens, problem.head_dim,
                           padded_dim, values);
    if (bias.exists()) write_bias_indices(problem, group, bias_indices);
    const T scale = static_cast<T>(problem.scale);
    for (int64_t first = 0; first < num_tokens; first += kTileQueries) {
      const int64_t count = min64(kTileQueries, num_tokens - first);
      gather_queries(group, first, count);
      for (int64_t first_key = 0; first_key < num_tokens; first_key += kTileKeys) {
        add_tile(group, first, count, first_key, min64(kTileKeys, num_tokens - first_key), grad_bias);
      }
      write(group, params.grad_query, grad_query_rows, first, first + count, scale);
    }
    write(group, params.grad_key, grad_keys, 0, num_tokens, scale);
    write(group, params.grad_value, grad_values, 0, num_tokens, T(1));
    if (streams && following == nullptr) finish_streaming();
  }
};

// In how many pieces a head's groups are summed to grad_bias; by shapes alone.
inline int64_t bias_pieces(const GridProblem& problem, int64_t bytes_per_head) {
  const int64_t by_memory = GridConfig::kMaxBiasBytes / max64(bytes_per_head * problem.num_heads, 1);
  return max64(1, min64(problem.batch_size * problem.num_groups(), min64(by_memory, GridConfig::kMaxBiasPieces)));
}

// What every task of a backward shares.
template <typename Storage>
struct GridBackwardContext {
  using T = ComputeOf<Storage>;

  const GridBackwardParams& params;
  const TransposedBias<T>& bias;
  bool streams;  // gradients, past the caches
  const WorkerScratch* scratch;
  int64_t groups_per_task;  // where there is no grad_bias
  int64_t num_pieces;       // of a head's groups, where there is
  T* partials;              // [piece, head, G, G]

  int64_t num_units() const {
    return params.problem.batch_size * params.problem.num_groups() * params.problem.num_heads;
  }
  int64_t bias_size() const { return params.problem.max_tokens() * params.problem.max_tokens(); }

  GridBackwardTask<Storage> task_of(int worker) const {
    ScratchCutter cutter = scratch->of(worker);
    return GridBackwardTask<Storage>(params, bias, streams, cutter);
  }

  void run_groups(int64_t task, int worker) const {
    const int64_t first = task * groups_per_task;
    const int64_t last = min64(first + groups_per_task, num_units());
    GridBackwardTask<Storage> backward = task_of(worker);
    for_each_with_next(
        first, last, [&](int64_t unit) { return unit_at(params.problem, params.query, unit); },
        [&](const Group& group, const Group* following) { backward.run(group, following, nullptr); });
  }

  // A piece of one head's groups, with a sum of grad_bias of its own.
  void run_piece(int64_t task, int worker) const {
    const GridProblem& problem = params.problem;
    const int64_t piece = task / problem.num_heads, head = task % problem.num_heads;
    const int64_t per_head = problem.batch_size * problem.num_groups();
    GridBackwardTask<Storage> backward = task_of(worker);
    T* partial = partials + task * bias_size();
    for (int64_t i = 0; i < bias_size(); ++i) partial[i] = 0;
    for_each_with_next(
        piece * per_head / num_pieces, (piece + 1) * per_head / num_pieces,
        [&](int64_t i) { return group_at(problem, i / problem.num_groups(), head, i % problem.num_groups()); },
        [&](const Group& group, const Group* following) { backward.run(group, following, partial); });
  }

  void add_pieces(int64_t head) const {
    T* sum = params.grad_bias.at<T>() + head * bias_size();
    for (int64_t piece = 0; piece < num_pieces; ++piece) {
      const T* partial = partials + (piece * params.problem.num_heads + head) * bias_size();
      for (int64_t i = 0; i < bias_size(); ++i) sum[i] += partial[i];
    }
  }
};

template <typename Storage>
void grid_backward_storage(const GridBackwardParams& params) {
  using T = ComputeOf<Storage>;
  const GridProblem& problem = params.problem;
  const bool has_grad_bias = params.grad_bias.data != nullptr;
  const TransposedBias<T> bias(problem, params.bias.data);
  const MutableImage* const results[] = {&params.grad_query, &params.grad_key, &params.grad_value};
  const bool streams = streams_results<Storage>(problem, 8, results, 3);
  GridBackwardContext<Storage> context{params, bias, streams, nullptr, 1, 1, nullptr};
  const int64_t bias_size = context.bias_size(), num_units = context.num_units();
  if (has_grad_bias) {
    for (int64_t i = 0; i < problem.num_heads * bias_size; ++i) params.grad_bias.at<T>()[i] = 0;
  }
  if (num_units == 0) return;
  for (const MutableImage* image : results) populate_image<Storage>(problem, *image);
  context.groups_per_task = groups_per_task(num_units);
  if (has_grad_bias) context.num_pieces = bias_pieces(problem, bias_size * static_cast<int64_t>(sizeof(T)));
  const int64_t num_tasks =
      has_grad_bias ? context.num_pieces * problem.num_heads : ceil_div(num_units, context.groups_per_task);
  const double operations = 5.0 * static_cast<double>(num_units * problem.head_dim) * static_cast<double>(bias_size);
  const int num_workers = useful_threads(problem.num_threads, num_tasks, operations);
  const WorkerScratch scratch(num_workers,
                              [&](ScratchCutter& cutter) { GridBackwardTask<Storage>(params, bias, streams, cutter); });
  context.scratch = &scratch;
  if (!has_grad_bias) {
    for_each_task(num_workers, num_tasks, [&](int64_t task, int worker) { context.run_groups(task, worker); });
    return;
  }
  const AlignedBuffer partials = allocate_aligned(static_cast<size_t>(num_tasks * bias_size) * sizeof(T));
  context.partials = reinterpret_cast<T*>(partials.get());
  for_each_task(num_workers, num_tasks, [&](int64_t task, int worker) { context.run_piece(task, worker); });
  const double additions = static_cast<double>(num_tasks) * static_cast<double>(bias_size);
  for_each_task(useful_threads(problem.num_threads, problem.num_heads, additions), problem.num_heads,
                [&](int64_t head, int) { context.add_pieces(head); });
}

}  // namespace topgather::TOPGATHER_CPU_TARGET
