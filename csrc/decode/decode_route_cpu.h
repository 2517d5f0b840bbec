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
// With up to kBoundedRows rows a key head, step 2 would fill few lanes. There centroids stand in lanes first:
//   2a. a vector of centroids at a time, approximate scores, sums of products taken lane by lane;
//   2b. where one of them could be among a row's best, step 2's scores and lists, else nothing;
// and where there are few tasks, one takes a part of the blocks, and the parts' lists are joined in order at the end.
// Bounds: a sum of n products in any order is off by at most n u / (1 - n u) times the sum of their magnitudes
// (u = 2^-24 in float32), which is at most |query| |centroid|, and by n times the smallest number where products are
// subnormal. An approximate score and the score are two such sums: they differ by less than kSlack n u |query|
// |centroid| + n kTiny, where kSlack = 8, not 2, covers what computing that rounds. A list changes by scores above its
// last one alone, so blocks that the bound keeps at or below it change nothing. Where products might overflow, or
// something is not finite, nothing is left out.
// Numerics, ties, NaN: RouteTask's. Centroids being the same bits, so are scores, and so is the choice, whatever the
// parts.
#pragma once

#include <cmath>
#include <limits>

#include "../moba/moba_route_cpu.h"
#include "decode_pages_cpu.h"

namespace topgather::TOPGATHER_CPU_TARGET {

template <typename Storage>
struct DecodeRouter {
  using T = ComputeOf<Storage>;
  using Task = RouteTask<T>;
  static constexpr int64_t kRows = DecodeConfig::kRouteRows;
  static constexpr T kSlack = 8;
  static constexpr T kTiny = 8 * std::numeric_limits<T>::min();
  static constexpr T kHuge = std::numeric_limits<T>::max() / 32;

  const DecodeRouteParams& params;
  int64_t group;                   // query heads of a key head
  int64_t tiles_per_head;          // of a key head
  int64_t list_length;             // top_k less the forced, or as many as there are blocks
  MobaRouteParams options;         // the fields RouteTask reads: head_dim, top_k and forced blocks
  int64_t num_parts = 1;           // of the blocks of a tile
  int64_t blocks_per_part = 0;     // where there are several
  unsigned char* parts = nullptr;  // a part's lists each
  const WorkerScratch* scratch = nullptr;

  // Scratch of one worker.
  struct Worker {
    Task task;
    T* gathered;  // [kChunkBlocks, D] centroids
    T* queries;   // [kBoundedRows, D]

    Worker(const MobaRouteParams& options, int64_t list_length, ScratchCutter& cutter)
        : task(options, list_length, cutter),
          gathered(cutter.take<T>(Task::kChunkBlocks * options.problem.head_dim)),
          queries(cutter.take<T>(DecodeConfig::kBoundedRows * options.problem.head_dim)) {}
  };

  // Some rows of a key head.
  struct Tile {
    int64_t sequence;
    int64_t head;
    int64_t first;
    int64_t count;
  };

  const Storage* row_of(const Tile& tile, int64_t i) const {
    const int64_t row = tile.first + i;
    return params.query.at<Storage>(tile.sequence, tile.head * group + row % group, row / group);
  }
  int32_t* choices_of(const Tile& tile, int64_t i) const {
    const int64_t row = tile.first + i;
    return params.block_indices.at<int32_t>(tile.sequence, tile.head * group + row % group, row / group);
  }
  int64_t own_block_of(const Tile& tile, int64_t i) const {
    const DecodeProblem& problem = params.problem;
    const int64_t token = (tile.first + i) / group;
    const bool is_there = token < new_tokens_of(problem, tile.sequence);
    return is_there ? block_of(first_position_of(problem, tile.sequence) + token, problem.block_size) : int64_t{-1};
  }

  bool is_bounded() const {
    return params.problem.query_len * group <= DecodeConfig::kBoundedRows && params.problem.head_dim % kLanes<T> == 0;
  }

  void run(int64_t task_idx, int worker) const {
    constexpr int64_t kTileRows = Task::kTileQueries;
    const int64_t unit = task_idx / num_parts;
    const int64_t tile_idx = unit % tiles_per_head;
    const int64_t head = unit / tiles_per_head % params.problem.num_kv_heads;
    const int64_t sequence = unit / tiles_per_head / params.problem.num_kv_heads;
    const int64_t last_row = min64((tile_idx + 1) * kRows, params.problem.query_len * group);
    ScratchCutter cutter = scratch->of(worker);
    Worker own(options, list_length, cutter);
    for (int64_t first = tile_idx * kRows; first < last_row; first += kTileRows) {
      const Tile tile{sequence, head, first, min64(kTileRows, last_row - first)};
      if (is_bounded()) {
        run_bounded(own, tile, task_idx);
        continue;
      }
      own.task.template route_tile<Storage>(
          tile.count, 0, [&](int64_t i) { return row_of(tile, i); }, [&](int64_t i) { return own_block_of(tile, i); },
          [&](int64_t block, int64_t count) { return chunk(sequence, head, block, count, own.gathered); },
          [&](int64_t i) { return choices_of(tile, i); });
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

  // --- Few rows ---------------------------------------------------------------------------------------------------

  // What the rows of a tile may choose.
  struct Scopes {
    typename Task::Scope of_row[DecodeConfig::kBoundedRows];
    IntegerVector<T> ends[(DecodeConfig::kBoundedRows + kLanes<T> - 1) / kLanes<T>];  // lanes past the last row: 0
    int64_t max_end = 0;
    bool needs_scores;
  };

  Scopes scopes_of(const Task& task, const Tile& tile) const {
    using Integer = typename VectorTraits<T>::IntegerElement;
    Scopes scopes{};
    for (int64_t i = 0; i < tile.count; ++i) {
      scopes.of_row[i] = task.scope_of(own_block_of(tile, i), 0);
      scopes.ends[i / kLanes<T>][i % kLanes<T>] = static_cast<Integer>(scopes.of_row[i].last_start);
      scopes.max_end = max64(scopes.max_end, scopes.of_row[i].last_start);
    }
    scopes.needs_scores = scopes.max_end - params.force_first > list_length && list_length > 0;
    return scopes;
  }

  void run_bounded(Worker& own, const Tile& tile, int64_t task_idx) const {
    const Scopes scopes = scopes_of(own.task, tile);
    if (scopes.needs_scores) {
      const int64_t head_dim = params.problem.head_dim;
      gather_rows_transposed<Storage>([&](int64_t i) { return row_of(tile, i); }, tile.count, head_dim, T(1),
                                      own.task.query_tile, Task::kTileQueries);
      T norms[DecodeConfig::kBoundedRows];
      for (int64_t i = 0; i < tile.count; ++i) {
        T* query = own.queries + i * head_dim;
        load_row(row_of(tile, i), head_dim, query);
        Vector<T> squares{};
        for (int64_t d = 0; d < head_dim; d += kLanes<T>) squares += load<T>(query + d) * load<T>(query + d);
        norms[i] = norm_of(squares);
      }
      const int64_t part = task_idx % num_parts;
      const int64_t first = num_parts > 1 ? part * blocks_per_part : 0;
      const int64_t last = num_parts > 1 ? first + blocks_per_part : scopes.max_end;
      select(own, tile, scopes, norms, max64(first, params.force_first), min64(last, scopes.max_end));
    }
    if (num_parts == 1) return write(own.task, tile, scopes);
    PartLists lists = part_lists(task_idx);
    const int64_t num_vectors = ceil_div(tile.count, kLanes<T>);
    for (int64_t i = 0; i < list_length * num_vectors && scopes.needs_scores; ++i) {
      const int64_t rank = i / num_vectors, v = i % num_vectors;
      store<T>(lists.scores + i * kLanes<T>, load<T>(own.task.kept.scores + rank * Task::kTileQueries + v * kLanes<T>));
      lists.numbers[i] = own.task.kept.numbers[rank * Task::kVectorsPerTile + v];
    }
  }

  T norm_of(const Vector<T>& squares) const {
    return std::sqrt(sum_of_lanes<T>(squares) + kTiny * static_cast<T>(kLanes<T> * params.problem.head_dim));
  }

  // Steps 2a and 2b for blocks [first, last), into the task's lists.
  void select(Worker& own, const Tile& tile, const Scopes& scopes, const T* norms, int64_t first, int64_t last) const {
    using Integer = typename VectorTraits<T>::IntegerElement;
    Task& task = own.task;
    task.kept.clear();
    for (int64_t chunk_start = first; chunk_start < last; chunk_start += Task::kChunkBlocks) {
      const int64_t in_chunk = min64(Task::kChunkBlocks, last - chunk_start);
      const RowBlock<T> rows = chunk(tile.sequence, tile.head, chunk_start, in_chunk, own.gathered);
      for (int64_t i = 0; i < in_chunk; i += kLanes<T>) {
        const int64_t start = chunk_start + i, count = min64(kLanes<T>, in_chunk - i);
        const RowBlock<T> centroids{rows.data + i * rows.row_stride, rows.row_stride};
        if (start - first >= list_length && !may_enter(own, tile, scopes, norms, start, centroids, count)) continue;
        tile_gemm<false>(GemmOperands<T>{centroids.data, centroids.row_stride, 1, task.query_tile, Task::kTileQueries,
                                         task.scores, Task::kTileQueries, params.problem.head_dim},
                         count, round_up(tile.count, kLanes<T>));
        for (int64_t j = 0; j < count; ++j) {
          for (int v = 0; v < static_cast<int>(ceil_div(tile.count, kLanes<T>)); ++v) {
            const IntegerVector<T> number = static_cast<Integer>(start + j) - IntegerVector<T>{};
            Vector<T> score = load<T>(task.scores + j * Task::kTileQueries + v * kLanes<T>);
            score = score == score ? score : broadcast(std::numeric_limits<T>::infinity());
            task.kept.offer(v, start + j - first, score, number, number < scopes.ends[v]);
          }
        }
      }
    }
  }

  // Step 2a: whether a row may choose one of `count` blocks from `start` on; all lists are full, but for rows that see
  // nothing that far on.
  bool may_enter(const Worker& own, const Tile& tile, const Scopes& scopes, const T* norms, int64_t start,
                 const RowBlock<T>& centroids, int64_t count) const {
    constexpr int kWidth = kLanes<T>;
    constexpr int kSums = 4;  // of squares, side by side
    const int64_t head_dim = params.problem.head_dim;
    const T* rows[kWidth];
    for (int i = 0; i < kWidth; ++i) rows[i] = centroids.data + min64(i, count - 1) * centroids.row_stride;
    const int64_t ahead = DecodeConfig::kRoutePrefetchRows * centroids.row_stride;
    Vector<T> squares[kSums] = {};
    for (int64_t r = 0; r < tile.count; ++r) {
      Vector<T> sums[kWidth] = {};
      const T* query = own.queries + r * head_dim;
      const auto add_products = [&](auto is_first) {
        for (int64_t d = 0; d < head_dim; d += kWidth) {
          const Vector<T> factor = load<T>(query + d);
#pragma GCC unroll 16
          for (int i = 0; i < kWidth; ++i) {
            const Vector<T> row = load<T>(rows[i] + d);
            sums[i] += factor * row;
            if constexpr (is_first) {
              squares[i % kSums] += row * row;
              __builtin_prefetch(rows[i] + d + ahead);
            }
          }
        }
      };
      if (r == 0) {
        add_products(std::true_type{});
      } else {
        add_products(std::false_type{});
      }
      if (scopes.of_row[r].last_start <= start) continue;
      const T magnitude = norms[r] * norm_of((squares[0] + squares[1]) + (squares[2] + squares[3]));
      if (!(magnitude < kHuge)) return true;
      const T num_products = static_cast<T>(head_dim);
      const T slack = num_products * (kSlack * std::numeric_limits<T>::epsilon() / 2 * magnitude + kTiny);
      const T worst = own.task.kept.scores[(list_length - 1) * Task::kTileQueries + r];
      // As a lane mask of what is not known to stay out, NaN among it.
      const IntegerVector<T> stays_out = sums_of_rows<T>(sums) + slack <= broadcast(worst);
      if (any_lane(~stays_out)) return true;
    }
    return false;
  }

  // Step 3.
  void write(Task& task, const Tile& tile, const Scopes& scopes) const {
    const auto chosen_by = scopes.needs_scores ? Task::ChosenBy::kScore : Task::ChosenBy::kNumber;
    for (int64_t i = 0; i < tile.count; ++i) {
      task.write_choices(i, chosen_by, scopes.of_row[i], choices_of(tile, i));
    }
  }

  // Lists of one part, a vector of rows at each rank.
  struct PartLists {
    T* scores;
    IntegerVector<T>* numbers;
  };
  int64_t part_vectors() const {
    return list_length * ceil_div(min64(params.problem.query_len * group, DecodeConfig::kBoundedRows), kLanes<T>);
  }
  int64_t part_bytes() const { return 2 * part_vectors() * kVectorBytes; }
  PartLists part_lists(int64_t task_idx) const {
    unsigned char* piece = parts + task_idx * part_bytes();
    return {reinterpret_cast<T*>(piece), reinterpret_cast<IntegerVector<T>*>(piece + part_vectors() * kVectorBytes)};
  }

  // What the parts of a tile kept, offered again in order: lists full of lower blocks come first, and of equal scores
  // the lower block.
  void join_parts(int64_t unit) const {
    ScratchCutter cutter = scratch->of(0);
    Worker own(options, list_length, cutter);
    Task& task = own.task;
    const Tile tile{unit / params.problem.num_kv_heads, unit % params.problem.num_kv_heads, 0,
                    params.problem.query_len * group};
    const Scopes scopes = scopes_of(task, tile);
    if (scopes.needs_scores) {
      const int num_vectors = static_cast<int>(ceil_div(tile.count, kLanes<T>));
      task.kept.clear();
      for (int64_t part = 0; part < num_parts && part * blocks_per_part < scopes.max_end; ++part) {
        const PartLists lists = part_lists(unit * num_parts + part);
        for (int64_t i = 0; i < list_length * num_vectors; ++i) {
          task.kept.offer(static_cast<int>(i % num_vectors), part * list_length + i / num_vectors,
                          load<T>(lists.scores + i * kLanes<T>), lists.numbers[i], lists.numbers[i] >= 0);
        }
      }
    }
    write(task, tile, scopes);
  }
};

template <typename Storage>
void decode_route_storage(const DecodeRouteParams& params) {
  using Router = DecodeRouter<Storage>;
  const DecodeProblem& problem = params.problem;
  const int64_t group = problem.num_query_heads / problem.num_kv_heads;
  const int64_t max_blocks = ceil_div(longest_of(problem), problem.block_size);
  const int64_t list_length = min64(problem.top_k - params.force_first - params.force_last, max_blocks);
  MobaRouteParams options{};
  options.problem.head_dim = problem.head_dim;
  options.problem.top_k = problem.top_k;
  static_cast<RouteOptions&>(options) = params;
  const int64_t tiles_per_head = ceil_div(problem.query_len * group, Router::kRows);
  const int64_t num_units = problem.batch_size * problem.num_kv_heads * tiles_per_head;
  Router router{params, group, tiles_per_head, list_length, options};
  if (router.is_bounded() && num_units > 0) {
    // A part has enough blocks to fill the first one's lists, which join_parts relies on.
    const int64_t wanted = ceil_div(max_blocks, ceil_div(DecodeConfig::kMinRouteTasks, num_units));
    router.blocks_per_part =
        round_up(max64(max64(wanted, DecodeConfig::kMinBlocksPerPart), 4 * list_length + params.force_first),
                 Router::Task::kChunkBlocks);
    router.num_parts = max64(1, ceil_div(max_blocks, router.blocks_per_part));
  }
  const int64_t num_tasks = num_units * router.num_parts;
  const double num_operations = static_cast<double>(problem.batch_size * problem.num_query_heads * problem.query_len) *
                                static_cast<double>(max_blocks * problem.head_dim + problem.top_k);
  const int num_workers = useful_threads(problem.num_threads, num_tasks, num_operations);
  const WorkerScratch scratch(num_workers,
                              [&](ScratchCutter& cutter) { typename Router::Worker(options, list_length, cutter); });
  router.scratch = &scratch;
  AlignedBuffer parts;
  if (router.num_parts > 1) {
    parts = allocate_aligned(static_cast<size_t>(num_tasks * router.part_bytes()));
    router.parts = parts.get();
  }
  for_each_task(num_workers, num_tasks, [&](int64_t task, int worker) { router.run(task, worker); });
  for (int64_t unit = 0; router.num_parts > 1 && unit < num_units; ++unit) router.join_parts(unit);
}

}  // namespace topgather::TOPGATHER_CPU_TARGET
