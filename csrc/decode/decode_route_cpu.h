// The choice of blocks while decoding, on the CPU.
//
//   score_j  = dot(query, centroid_j)             blocks j wholly before the query's own, by the cache's centroids
//   choice   = the newest force_last blocks up to the own, the first force_first, and the best of the others
//
// Who owns what: a task is one (sequence, key head, tile of kRouteRows rows); a row is a token and one of the query
// heads that share the key head, so a centroid is read once for all of them. Steps:
//   1. gather the queries, transposed: rows stand in vector lanes;
//   2. score and keep the best, by moba_route's own RouteTask;
//   3. add the forced blocks, sort, pad with -1, write. A row past its sequence's new tokens gets -1 alone.
// Centroids are read where they lie, or, where a page is short of a chunk, gathered a chunk at a time.
// Numerics, ties, NaN: RouteTask's. Centroids being the same bits, so are scores, and so is the choice.
#pragma once

#include "../moba/moba_route_cpu.h"
#include "decode_pages_cpu.h"

namespace topgather::TOPGATHER_CPU_TARGET {

template <typename Storage>
struct DecodeRouter {
  using T = ComputeOf<Storage>;
  using Task = RouteTask<T>;
  static constexpr int64_t kRows = DecodeConfig::kRouteRows;

  const DecodeRouteParams& params;
  int64_t group;                 // query heads of a key head
  int64_t tiles_per_head;        // of a key head
  int64_t list_length;           // top_k less the forced, or as many as there are blocks
  MobaRouteParams options;       // the fields RouteTask reads: head_dim, top_k and forced blocks
  const WorkerScratch& scratch;  // of RouteTask, and gathered centroids

  void run(int64_t task_idx, int worker) const {
    constexpr int64_t kTileRows = Task::kTileQueries;
    const DecodeProblem& problem = params.problem;
    const int64_t tile = task_idx % tiles_per_head;
    const int64_t head = task_idx / tiles_per_head % problem.num_kv_heads;
    const int64_t sequence = task_idx / tiles_per_head / problem.num_kv_heads;
    const int64_t first_position = first_position_of(problem, sequence);
    const int64_t last_row = min64((tile + 1) * kRows, problem.query_len * group);
    ScratchCutter cutter = scratch.of(worker);
    Task task(options, list_length, cutter);
    T* gathered = cutter.take<T>(Task::kChunkBlocks * problem.head_dim);
    for (int64_t first = tile * kRows; first < last_row; first += kTileRows) {
      task.template route_tile<Storage>(
          min64(kTileRows, last_row - first), 0,
          [&](int64_t i) {
            return params.query.at<Storage>(sequence, head * group + (first + i) % group, (first + i) / group);
          },
          [&](int64_t i) {
            const int64_t token = (first + i) / group;
            const bool is_there = token < new_tokens_of(problem, sequence);
            return is_there ? block_of(first_position + token, problem.block_size) : int64_t{-1};
          },
          [&](int64_t block, int64_t count) { return chunk(sequence, head, block, count, gathered); },
          [&](int64_t i) {
            return params.block_indices.at<int32_t>(sequence, head * group + (first + i) % group, (first + i) / group);
          });
    }
  }

  // Centroids first to first + count of a sequence: in place where they are neighbours, else gathered.
  RowBlock<T> chunk(int64_t sequence, int64_t head, int64_t first, int64_t count, T* gathered) const {
    const DecodeProblem& problem = params.problem;
    const int64_t blocks_per_page = ceil_div(problem.page_size, problem.block_size);
    const auto centroid = [&](int64_t block) {
      const Place place = place_of(problem, sequence, block * problem.block_size);
      return page_row<T>(params.centroids, head, Place{place.page, place.row / problem.block_size});
    };
    if (first % blocks_per_page + count <= blocks_per_page) return {centroid(first), params.centroids.strides[2]};
    for (int64_t i = 0; i < count; ++i)
      load_row(centroid(first + i), problem.head_dim, gathered + i * problem.head_dim);
    return {gathered, problem.head_dim};
  }
};

template <typename Storage>
void decode_route_storage(const DecodeRouteParams& params) {
  using Router = DecodeRouter<Storage>;
  using T = ComputeOf<Storage>;
  const DecodeProblem& problem = params.problem;
  const int64_t group = problem.num_query_heads / problem.num_kv_heads;
  const int64_t max_blocks = ceil_div(longest_of(problem), problem.block_size);
  const int64_t list_length = min64(problem.top_k - params.force_first - params.force_last, max_blocks);
  MobaRouteParams options{};
  options.problem.head_dim = problem.head_dim;
  options.problem.top_k = problem.top_k;
  static_cast<RouteOptions&>(options) = params;
  const int64_t tiles_per_head = ceil_div(problem.query_len * group, Router::kRows);
  const int64_t num_tasks = problem.batch_size * problem.num_kv_heads * tiles_per_head;
  const double num_operations = static_cast<double>(problem.batch_size * problem.num_query_heads * problem.query_len) *
                                static_cast<double>(max_blocks * problem.head_dim + problem.top_k);
  const int num_workers = useful_threads(problem.num_threads, num_tasks, num_operations);
  const WorkerScratch scratch(num_workers, [&](ScratchCutter& cutter) {
    typename Router::Task(options, list_length, cutter);
    cutter.take<T>(Router::Task::kChunkBlocks * problem.head_dim);
  });
  const Router router{params, group, tiles_per_head, list_length, options, scratch};
  for_each_task(num_workers, num_tasks, [&](int64_t task, int worker) { router.run(task, worker); });
}

}  // namespace topgather::TOPGATHER_CPU_TARGET
