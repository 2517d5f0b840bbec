// The indexer's choice of blocks, on the CPU.
//
//   t_ij     = dot(index_query_i, index_key_j)                       never written to memory as a matrix
//   score_ib = max or mean of t_ij over the visible keys j of block b, or the sum over them and over the choice's index
//              heads of weight_i * relu(t_ij)
//   choice_i = the forced blocks, and the best of those between them
//
// Who owns what: a task is one (batch entry, choice, kQueriesPerTask queries), cut into tiles of kTileQueries. It walks
// the blocks in ascending order; a block's keys, converted once, serve all of its tiles. Steps:
//   1. gather the queries, transposed: queries stand in vector lanes from here on;
//   2. products of a chunk of keys, by the dense micro-kernel, the keys read as they lie;
//   3. the products of a block become its score, down the keys, so that no operation crosses lanes;
//   4. offer the block to each lane's list of the best (top_lists.h);
//   5. forced blocks around the list's, in ascending order, -1 for the rest, written out.
// A block is a candidate of a query if the query sees some key of it and it is not forced. Candidates of a query are a
// run of blocks from force_first on, so lists fill in step.
// Numerics: sums in float32 (float64 for float64). Ties: the lower block number stays. A NaN among the products makes
// the score NaN, which ranks as +inf.
// Determinism: a query's choice depends on its own row and the keys alone.
#pragma once

#include <limits>

#include "../common/parallel.h"
#include "../cpu/convert.h"
#include "../cpu/scratch.h"
#include "../cpu/tile_gemm.h"
#include "../cpu/top_lists.h"
#include "indexer_config.h"
#include "indexer_params.h"

namespace topgather::TOPGATHER_CPU_TARGET {

template <typename Storage>
struct IndexRouteTask {
  using T = ComputeOf<Storage>;
  using Integer = typename VectorTraits<T>::IntegerElement;
  static constexpr int kVectors = IndexRouteConfig::kVectorsPerTile;
  static constexpr int64_t kTileQueries = kVectors * kLanes<T>;
  static constexpr int64_t kQueriesPerTask = IndexRouteConfig::kQueriesPerTask;
  static constexpr int64_t kTiles = kQueriesPerTask / kTileQueries;
  static constexpr int64_t kChunkKeys = IndexRouteConfig::kChunkKeys;
  static_assert(kQueriesPerTask % kTileQueries == 0);

  const IndexRouteParams& params;
  int64_t chunk_keys;

  // Scratch of one worker.
  T* query_tiles;  // [head of the choice, tile, D, kTileQueries]
  T* keys;         // [chunk_keys, D], where keys need converting
  T* products;     // [chunk_keys, kTileQueries]
  T* head_scores;  // [tile, kTileQueries] of one index head
  T* scores;       // [tile, kTileQueries]
  TopLists<T, kVectors> lists[kTiles];

  // Of the task at hand.
  int64_t batch_idx;
  int64_t choice_idx;
  int64_t first_query;
  int64_t num_queries;
  int64_t num_tiles;
  int64_t tile_ends[kTiles];                      // past the last block that a query of the tile has as a candidate
  int64_t tile_positions[kTiles];                 // lowest position of the tile's queries
  IntegerVector<T> positions[kTiles * kVectors];  // of each query, cut off below -1
  IntegerVector<T> candidate_ends[kTiles * kVectors];

  IndexRouteTask(const IndexRouteParams& p, ScratchCutter& scratch)
      : params(p), chunk_keys(min64(kChunkKeys, min64(p.block_size, max64(p.key_len, 1)))) {
    query_tiles = scratch.take<T>(p.heads_per_choice * kQueriesPerTask * p.head_dim);
    keys = scratch.take<T>(std::is_same_v<Storage, T> ? 0 : chunk_keys * p.head_dim);
    products = scratch.take<T>(chunk_keys * kTileQueries);
    head_scores = scratch.take<T>(kQueriesPerTask);
    scores = scratch.take<T>(kQueriesPerTask);
    for (auto& list : lists) list.take(p.list_length, scratch);
  }

  // Blocks of which query `row` sees some key.
  int64_t num_visible(int64_t row) const {
    if (!params.is_causal) return params.num_blocks;
    const int64_t position = row + params.key_len - params.query_len;
    return position < 0 ? 0 : position / params.block_size + 1;
  }

  void place(int64_t task_batch, int64_t task_choice, int64_t first) {
    batch_idx = task_batch;
    choice_idx = task_choice;
    first_query = first;
    num_queries = min64(kQueriesPerTask, params.query_len - first);
    num_tiles = ceil_div(num_queries, kTileQueries);
    for (int64_t tile = 0; tile < num_tiles; ++tile) {
      tile_ends[tile] = 0;
      for (int64_t i = 0; i < kTileQueries; ++i) {
        const int64_t row = first_query + min64(tile * kTileQueries + i, num_queries - 1);
        const int64_t visible = num_visible(row);
        // Where all that is visible is chosen there is nothing to score.
        const int64_t end = visible > params.top_k ? visible - params.force_last : 0;
        const int64_t position = params.is_causal ? max64(row + params.key_len - params.query_len, -1) : params.key_len;
        tile_ends[tile] = max64(tile_ends[tile], end);
        if (i == 0) tile_positions[tile] = position;
        positions[tile * kVectors + i / kLanes<T>][i % kLanes<T>] = static_cast<Integer>(position);
        candidate_ends[tile * kVectors + i / kLanes<T>][i % kLanes<T>] = static_cast<Integer>(end);
      }
    }
  }

  // Step 1.
  void gather_queries() {
    for (int64_t h = 0; h < params.heads_per_choice; ++h) {
      const int64_t head = choice_idx * params.heads_per_choice + h;
      for (int64_t tile = 0; tile < num_tiles; ++tile) {
        const int64_t first = first_query + tile * kTileQueries;
        const int64_t count = min64(kTileQueries, params.query_len - first);
        gather_rows_transposed<Storage>(
            [&](int64_t i) { return params.index_query.at<Storage>(batch_idx, head, first + i); }, count,
            params.head_dim, T(1), tile_of(h, tile), kTileQueries);
      }
    }
  }

  T* tile_of(int64_t head_of_choice, int64_t tile) {
    return query_tiles + (head_of_choice * kTiles + tile) * params.head_dim * kTileQueries;
  }

  // Step 3 for one vector of queries and the keys of a chunk, the first `count`, of which a lane sees those up to
  // `limit`: into what the chunks before made.
  template <IndexReduction kReduction, bool kIsPartial>
  Vector<T> reduce(Vector<T> sum, const T* column, int64_t count, const IntegerVector<T>& limit) const {
    for (int64_t j = 0; j < count; ++j) {
      const Vector<T> product = load<T>(column + j * kTileQueries);
      IntegerVector<T> taken;
      Vector<T> joined;
      if constexpr (kReduction == IndexReduction::kMax) {
        // A NaN wins, and nothing is greater than it.
        taken = (product > sum) | (product != product);
        joined = product;
      } else {
        // A NaN is not below 0.
        const Vector<T> term = kReduction == IndexReduction::kMean ? product : (product < 0 ? Vector<T>{} : product);
        joined = sum + term;
      }
      if constexpr (kIsPartial) {
        const IntegerVector<T> is_visible = (static_cast<Integer>(j) - IntegerVector<T>{}) <= limit;
        if constexpr (kReduction == IndexReduction::kMax) {
          taken &= is_visible;
        } else {
          taken = is_visible;
        }
        sum = taken ? joined : sum;
      } else if constexpr (kReduction == IndexReduction::kMax) {
        sum = taken ? joined : sum;
      } else {
        sum = joined;
      }
    }
    return sum;
  }

  // Steps 2 and 3 of one index head for all tiles that have the block as a candidate.
  template <IndexReduction kReduction>
  void score_head(int64_t head_of_choice, int64_t block) {
    const int64_t head = choice_idx * params.heads_per_choice + head_of_choice;
    const int64_t key_head = head / (params.num_index_heads / params.num_key_heads);
    const int64_t first_key = block * params.block_size;
    const int64_t end_key = min64(first_key + params.block_size, params.key_len);
    const T empty = kReduction == IndexReduction::kMax ? -std::numeric_limits<T>::infinity() : T(0);
    for (int64_t i = 0; i < kQueriesPerTask; ++i) head_scores[i] = empty;
    for (int64_t first = first_key; first < end_key; first += chunk_keys) {
      const int64_t count = min64(chunk_keys, end_key - first);
      const RowBlock<T> chunk = dense_rows(params.index_key.at<Storage>(batch_idx, key_head, first),
                                           params.index_key.strides[2], count, params.head_dim, params.head_dim, keys);
      for (int64_t tile = 0; tile < num_tiles; ++tile) {
        if (block >= tile_ends[tile]) continue;
        const int64_t rows = min64(kTileQueries, num_queries - tile * kTileQueries);
        const int64_t num_vectors = ceil_div(rows, kLanes<T>);
        const GemmOperands<T> product{
            chunk.data,   chunk.row_stride, 1, tile_of(head_of_choice, tile), kTileQueries, products,
            kTileQueries, params.head_dim};
        tile_gemm<false>(product, count, num_vectors * kLanes<T>);
        const bool is_partial = first + count - 1 > tile_positions[tile];
        for (int64_t v = 0; v < num_vectors; ++v) {
          T* target = head_scores + tile * kTileQueries + v * kLanes<T>;
          const IntegerVector<T> limit = positions[tile * kVectors + v] - static_cast<Integer>(first);
          const T* column = products + v * kLanes<T>;
          store<T>(target, is_partial ? reduce<kReduction, true>(load<T>(target), column, count, limit)
                                      : reduce<kReduction, false>(load<T>(target), column, count, limit));
        }
      }
    }
  }

  // Steps 2 and 3: `scores` of a block.
  template <IndexReduction kReduction>
  void score_block(int64_t block) {
    if constexpr (kReduction != IndexReduction::kReluSum) {
      score_head<kReduction>(0, block);
      const int64_t first_key = block * params.block_size;
      const int64_t num_keys = min64(params.block_size, params.key_len - first_key);
      for (int64_t i = 0; i < num_queries; ++i) {
        const int64_t seen = static_cast<int64_t>(positions[i / kLanes<T>][i % kLanes<T>]) - first_key + 1;
        scores[i] = kReduction == IndexReduction::kMax
                        ? head_scores[i]
                        : head_scores[i] / static_cast<T>(max64(min64(seen, num_keys), 1));
      }
    } else {
      for (int64_t i = 0; i < num_queries; ++i) scores[i] = 0;
      for (int64_t h = 0; h < params.heads_per_choice; ++h) {
        score_head<kReduction>(h, block);
        if (params.weights.data == nullptr) {
          for (int64_t i = 0; i < num_queries; ++i) scores[i] += head_scores[i];
        } else {
          const int64_t head = choice_idx * params.heads_per_choice + h;
          const T* weight = params.weights.at<T>(batch_idx, head, first_query);
          for (int64_t i = 0; i < num_queries; ++i) scores[i] += weight[i] * head_scores[i];
        }
      }
    }
  }

  // Step 4.
  void offer_block(int64_t block) {
    const IntegerVector<T> number = static_cast<Integer>(block) - IntegerVector<T>{};
    for (int64_t tile = 0; tile < num_tiles; ++tile) {
      if (block >= tile_ends[tile]) continue;
      for (int v = 0; v < kVectors; ++v) {
        Vector<T> score = load<T>(scores + tile * kTileQueries + v * kLanes<T>);
        score = score == score ? score : broadcast(std::numeric_limits<T>::infinity());
        const IntegerVector<T> active = number < candidate_ends[tile * kVectors + v];
        lists[tile].offer(v, block - params.force_first, score, number, active);
      }
    }
  }

  // Step 5.
  void write() {
    for (int64_t i = 0; i < num_queries; ++i) {
      const int64_t row = first_query + i;
      const int64_t visible = num_visible(row);
      int32_t* choices = params.block_indices.at<int32_t>(batch_idx, choice_idx, row);
      int64_t count = 0;
      if (visible <= params.top_k) {
        for (; count < visible; ++count) choices[count] = static_cast<int32_t>(count);
      } else {
        for (; count < params.force_first; ++count) choices[count] = static_cast<int32_t>(count);
        count += lists[i / kTileQueries].write_ascending(i % kTileQueries, choices + count);
        for (int64_t block = visible - params.force_last; block < visible; ++block) {
          choices[count++] = static_cast<int32_t>(block);
        }
      }
      for (; count < params.top_k; ++count) choices[count] = -1;
    }
  }

  template <IndexReduction kReduction>
  void select() {
    int64_t end = 0;
    for (int64_t tile = 0; tile < num_tiles; ++tile) end = max64(end, tile_ends[tile]);
    if (params.list_length > 0 && end > params.force_first) {
      gather_queries();
      for (int64_t tile = 0; tile < num_tiles; ++tile) lists[tile].clear();
      for (int64_t i = 0; i < kQueriesPerTask; ++i) scores[i] = 0;
      for (int64_t block = params.force_first; block < end; ++block) {
        score_block<kReduction>(block);
        offer_block(block);
      }
    }
    write();
  }

  void run(int64_t task_batch, int64_t task_choice, int64_t first) {
    place(task_batch, task_choice, first);
    switch (static_cast<IndexReduction>(params.reduction_code)) {
      case IndexReduction::kMax: return select<IndexReduction::kMax>();
      case IndexReduction::kMean: return select<IndexReduction::kMean>();
      default: return select<IndexReduction::kReluSum>();
    }
  }
};

template <typename Storage>
void index_route_storage(const IndexRouteParams& params) {
  using Task = IndexRouteTask<Storage>;
  const int64_t chunks = ceil_div(params.query_len, Task::kQueriesPerTask);
  const int64_t num_tasks = params.batch_size * params.num_choices * chunks;
  const double num_operations = static_cast<double>(params.batch_size * params.num_index_heads * params.query_len) *
                                static_cast<double>(params.key_len) * static_cast<double>(params.head_dim) /
                                (params.is_causal ? 2 : 1);
  const int num_workers = useful_threads(params.num_threads, num_tasks, num_operations);
  const WorkerScratch scratch(num_workers, [&](ScratchCutter& cutter) { Task(params, cutter); });
  for_each_task(num_workers, num_tasks, [&](int64_t task, int worker) {
    // The last queries first: they see most, and no thread should be left with such a task at the end.
    const int64_t chunk = chunks - 1 - task / (params.batch_size * params.num_choices);
    const int64_t choice = task % params.num_choices;
    const int64_t batch_idx = task / params.num_choices % params.batch_size;
    ScratchCutter cutter = scratch.of(worker);
    Task(params, cutter).run(batch_idx, choice, chunk * Task::kQueriesPerTask);
  });
}

}  // namespace topgather::TOPGATHER_CPU_TARGET
