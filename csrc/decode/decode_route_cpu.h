// The choice of blocks while decoding, on the CPU.
//
//   score_j  = dot(query, centroid_j)             blocks j wholly before the query's own, by the cache's centroids
//   choice   = own block and the top_k - 1 best before it
//
// Who owns what: a task is one (sequence, key head, tile of kRouteRows rows); a row is a token and one of the query
// heads that share the key head, so a centroid is read once for all of them. Steps:
//   1. gather the queries, transposed: rows stand in vector lanes;
//   2. score and keep the best, by moba_route's own RouteTask;
//   3. add the own block, sort, pad with -1, write. A row past its sequence's new tokens gets -1 alone.
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
  int64_t group;            // query heads of a key head
  int64_t tiles_per_head;   // of a key head
  int64_t list_length;      // top_k - 1, or 0 where there is never anything to choose from
  MobaRouteParams options;  // the fields RouteTask reads: head_dim and top_k
  unsigned char* scratch;
  int64_t task_bytes;    // of RouteTask
  int64_t worker_bytes;  // and gathered centroids

  void run(int64_t task_idx, int worker) const {
    constexpr int64_t kTileRows = Task::kTileQueries;
    const DecodeProblem& problem = params.problem;
    const int64_t tile = task_idx % tiles_per_head;
    const int64_t head = task_idx / tiles_per_head % problem.num_kv_heads;
    const int64_t sequence = task_idx / tiles_per_head / problem.num_kv_heads;
    const int64_t first_position = first_position_of(problem, sequence);
    const int64_t last_row = min64((tile + 1) * kRows, problem.query_len * group);
    unsigned char* own_scratch = scratch + worker * worker_bytes;
    Task task(options, list_length, own_scratch);
    T* gathered = reinterpret_cast<T*>(own_scratch + task_bytes);
    const auto chunk_of = [&](int64_t first, int64_t count) { return chunk(sequence, head, first, count, gathered); };
    for (int64_t first = tile * kRows; first < last_row; first += kTileRows) {
      const int64_t count = min64(kTileRows, last_row - first);
      const auto own_block = [&](int64_t row) -> int64_t {
        const int64_t position = first_position + row / group;
        return position < 0 || row / group >= new_tokens_of(problem, sequence) ? -1 : position / problem.block_size;
      };
      IntegerVector<T> visible[Task::kVectorsPerTile];
      int64_t max_visible = 0;
      for (int64_t i = 0; i < kTileRows; ++i) {
        const int64_t num_visible = max64(own_block(first + min64(i, count - 1)), 0);
        visible[i / kLanes<T>][i % kLanes<T>] = static_cast<typename VectorTraits<T>::IntegerElement>(num_visible);
        max_visible = max64(max_visible, num_visible);
      }
      const bool needs_scores = list_length > 0 && max_visible > list_length;
      if (needs_scores) {
        const auto row_of = [&](int64_t i) {
          const int64_t row = first + i;
          return params.query.at<Storage>(sequence, head * group + row % group, row / group);
        };
        gather_rows_transposed<Storage>(row_of, count, problem.head_dim, T(1), task.query_tile, kTileRows);
        task.select(chunk_of, ceil_div(count, kLanes<T>), visible, max_visible);
      }
      for (int64_t i = 0; i < count; ++i) {
        const int64_t row = first + i;
        const int64_t own = own_block(row);
        int32_t* choices = params.block_indices.at<int32_t>(sequence, head * group + row % group, row / group);
        if (needs_scores) {
          task.write_choices(i, own, choices);
        } else {
          task.write_all(min64(max64(own, 0), problem.top_k - 1), own, choices);
        }
      }
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
  const int64_t list_length = max_blocks > problem.top_k - 1 ? problem.top_k - 1 : 0;
  MobaRouteParams options{};
  options.problem.head_dim = problem.head_dim;
  options.problem.top_k = problem.top_k;
  const int64_t tiles_per_head = ceil_div(problem.query_len * group, Router::kRows);
  const int64_t num_tasks = problem.batch_size * problem.num_kv_heads * tiles_per_head;
  const double num_operations = static_cast<double>(problem.batch_size * problem.num_query_heads * problem.query_len) *
                                static_cast<double>(max_blocks * problem.head_dim + problem.top_k);
  const int num_workers = useful_threads(problem.num_threads, num_tasks, num_operations);
  const int64_t task_bytes =
      round_up(static_cast<int64_t>(Router::Task::scratch_bytes(problem.head_dim, list_length)), 64);
  const int64_t worker_bytes =
      round_up(task_bytes + Router::Task::kChunkBlocks * problem.head_dim * static_cast<int64_t>(sizeof(T)), 64);
  const AlignedBuffer scratch = allocate_aligned(static_cast<size_t>(worker_bytes * num_workers));
  const Router router{params, group, tiles_per_head, list_length, options, scratch.get(), task_bytes, worker_bytes};
  for_each_task(num_workers, num_tasks, [&](int64_t task, int worker) { router.run(task, worker); });
}

}  // namespace topgather::TOPGATHER_CPU_TARGET
