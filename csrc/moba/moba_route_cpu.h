// Block centroids and the choice of blocks, on the CPU.
//
//   centroid_j  = mean of the keys of block j                       [num_blocks, D]
//   score_ij    = dot(query_i, centroid_j)                          never written to memory as a matrix
//   choice_i    = forced blocks and the best of the others: causal, the newest force_last up to the own block, and the
//                 first force_first; else the first alone
//
// Who owns what: a task is one (sequence, query head, kQueriesPerTask queries); it walks tiles of kTileQueries queries
// against chunks of kChunkBlocks centroids. Steps per tile:
//   1. gather the queries, transposed: queries stand in vector lanes from here on;
//   2. scores of a chunk, by the dense micro-kernel;
//   3. keep the best: one comparison with each lane's worst kept score; only where a lane beats it, an insertion into
//      the sorted lists of the whole vector;
//   4. add the forced blocks, sort each query's choices by block number, pad with -1, write them.
// Numerics: sums in float32 (float64 for float64). Ties: blocks come in ascending order and an insertion needs a
// strictly greater score, so the lower block number stays. A NaN score ranks as +inf. Lists are filled by position,
// never by score, while they are short, so no score whatever can lead out of bounds.
// Determinism: a query's choice depends on its own row alone.
#pragma once

#include <limits>
#include <vector>

#include "../common/parallel.h"
#include "../cpu/convert.h"
#include "../cpu/scratch.h"
#include "../cpu/tile_gemm.h"
#include "../cpu/top_lists.h"
#include "moba_cpu.h"
#include "moba_geometry.h"
#include "moba_route_filter_cpu.h"

namespace topgather::TOPGATHER_CPU_TARGET {

template <typename Storage>
void mean_of_rows(const Storage* rows, int64_t row_stride, int64_t count, int64_t depth, ComputeOf<Storage>* mean) {
  using T = ComputeOf<Storage>;
  for (int64_t d = 0; d < depth; ++d) mean[d] = 0;
  for (int64_t i = 0; i < count; ++i) {
    const Storage* row = rows + i * row_stride;
    for (int64_t d = 0; d < depth; ++d) mean[d] += to_compute(row[d]);
  }
  for (int64_t d = 0; d < depth; ++d) mean[d] /= static_cast<T>(count);
}

// Centroids of every block: centroid_of(sequence_idx, kv_head, block) says where each goes.
template <typename Storage, typename CentroidOf>
void compute_centroids(const MobaProblem& problem, const Array<const void, 4>& key, const CentroidOf& centroid_of) {
  constexpr int64_t kBlocksPerTask = MobaRouteConfig::kCentroidsPerTask;
  int64_t max_blocks = 0;
  for (int64_t s = 0; s < problem.batch_size; ++s) {
    max_blocks = max64(max_blocks, sequence_at(problem, s).num_blocks);
  }
  const int64_t chunks_per_head = ceil_div(max_blocks, kBlocksPerTask);
  const int64_t num_tasks = problem.batch_size * problem.num_kv_heads * chunks_per_head;
  const double num_operations = static_cast<double>(problem.batch_size * problem.num_kv_heads) *
                                static_cast<double>(problem.key_len * problem.head_dim);
  for_each_task(useful_threads(problem.num_threads, num_tasks, num_operations), num_tasks, [&](int64_t task, int) {
    const int64_t chunk = task % chunks_per_head;
    const int64_t head = task / chunks_per_head % problem.num_kv_heads;
    const int64_t sequence_idx = task / chunks_per_head / problem.num_kv_heads;
    const Sequence sequence = sequence_at(problem, sequence_idx);
    const int64_t last = min64((chunk + 1) * kBlocksPerTask, sequence.num_blocks);
    for (int64_t block = chunk * kBlocksPerTask; block < last; ++block) {
      const int64_t first_key = block * problem.block_size;
      const int64_t count = min64(problem.block_size, sequence.key_len - first_key);
      mean_of_rows(key.at<Storage>(sequence.batch_idx, head, sequence.key_start + first_key), key.strides[2], count,
                   problem.head_dim, centroid_of(sequence_idx, head, block));
    }
  });
}

// T: the compute type, of queries and centroids.
template <typename T>
struct RouteTask {
  static constexpr int kVectorsPerTile = MobaRouteConfig::kVectorsPerTile;
  static constexpr int64_t kTileQueries = kVectorsPerTile * kLanes<T>;
  static constexpr int64_t kChunkBlocks = MobaRouteConfig::kChunkBlocks;
  static constexpr int64_t kQueriesPerTask = MobaRouteConfig::kQueriesPerTask;

  const MobaRouteParams& params;
  int64_t list_length;  // blocks kept by score: top_k, less those forced, at most num_blocks

  // Scratch of one worker.
  T* query_tile;  // [D, kTileQueries]
  T* scores;      // [kChunkBlocks, kTileQueries]
  TopLists<T, kVectorsPerTile> kept;
  RouteFilter filter;

  RouteTask(const MobaRouteParams& p, int64_t length, ScratchCutter& scratch) : params(p), list_length(length) {
    query_tile = scratch.take<T>(p.problem.head_dim * kTileQueries);
    scores = scratch.take<T>(kChunkBlocks * kTileQueries);
    kept.take(list_length, scratch);
  }

  // For problems in which the filter serves: of so many blocks at most.
  void take_filter(int64_t max_blocks, ScratchCutter& scratch) {
    filter.take(max_blocks, list_length, params.problem.head_dim, scratch);
  }

  // Steps 2 and 3: the lists of a tile of queries, the i-th of which may choose by score of blocks force_first to before
  // end[i].
  // chunk_of(first, count) gives the centroids of so many blocks from `first` on, as a RowBlock.
  template <typename ChunkOf>
  void select(const ChunkOf& chunk_of, int64_t num_vectors, const IntegerVector<T>* end, int64_t max_end) {
    const int64_t head_dim = params.problem.head_dim;
    kept.clear();
    for (int64_t first = params.force_first; first < max_end; first += kChunkBlocks) {
      const int64_t count = min64(kChunkBlocks, max_end - first);
      const RowBlock<T> chunk = chunk_of(first, count);
      const GemmOperands<T> product{chunk.data, chunk.row_stride, 1,       query_tile, kTileQueries,
                                    scores,     kTileQueries,     head_dim};
      tile_gemm<false>(product, count, num_vectors * kLanes<T>);
      for (int v = 0; v < num_vectors; ++v) {
        for (int64_t j = 0; j < count; ++j) {
          const int64_t block = first + j;
          const IntegerVector<T> block_vector =
              static_cast<typename VectorTraits<T>::IntegerElement>(block) - IntegerVector<T>{};
          Vector<T> score = load<T>(scores + j * kTileQueries + v * kLanes<T>);
          score = score == score ? score : broadcast(std::numeric_limits<T>::infinity());
          const IntegerVector<T> active = block_vector < end[v];
          kept.offer(v, block - params.force_first, score, block_vector, active);
        }
      }
    }
  }

  // What a query may choose: blocks 0 to num_visible - 1, of which those before first_end and from last_start on are forced.
  struct Scope {
    int64_t num_visible;
    int64_t first_end;
    int64_t last_start;
  };

  // Of the query that stands in block `own`, -1 for none, or sees the first seen_by_all blocks.
  Scope scope_of(int64_t own, int64_t seen_by_all) const {
    const int64_t num_visible = max64(own + 1, seen_by_all);
    const int64_t first_end = min64(params.force_first, num_visible);
    const int64_t num_last = own < 0 ? 0 : params.force_last;
    return {num_visible, first_end, max64(num_visible - num_last, first_end)};
  }

  enum class ChosenBy { kNumber, kScore, kFilter };

  // Step 4 for one query: ascending block numbers, then -1. By number where there are no more blocks than may be
  // chosen, or none may by score: the first list_length of the others.
  void write_choices(int64_t lane, ChosenBy chosen_by, const Scope& scope, int32_t* choices) {
    int64_t count = 0;
    for (; count < scope.first_end; ++count) choices[count] = static_cast<int32_t>(count);
    if (chosen_by == ChosenBy::kScore) {
      count += kept.write_ascending(lane, choices + count);
    } else if (chosen_by == ChosenBy::kFilter) {
      const int32_t* chosen = filter.chosen(lane);
      for (int64_t i = 0; i < list_length; ++i) {
        choices[count++] = chosen[i] + static_cast<int32_t>(params.force_first);
      }
    } else {
      const int64_t num_chosen = min64(scope.last_start - scope.first_end, list_length);
      for (int64_t i = 0; i < num_chosen; ++i, ++count) choices[count] = static_cast<int32_t>(count);
    }
    for (int64_t block = scope.last_start; block < scope.num_visible; ++block) {
      choices[count++] = static_cast<int32_t>(block);
    }
    for (; count < params.problem.top_k; ++count) choices[count] = -1;
  }

  // All steps for `count` queries: row_of(i) is the i-th, choices_of(i) where its choices go. It sees the blocks up to
  // own_block_of(i), -1 for none, or the first seen_by_all where those are more. `bytes`: the centroids that chunk_of
  // reads in place, null where none were made.
  template <typename Storage, typename RowOf, typename OwnBlockOf, typename ChunkOf, typename ChoicesOf>
  void route_tile(int64_t count, int64_t seen_by_all, const RowOf& row_of, const OwnBlockOf& own_block_of,
                  const ChunkOf& chunk_of, const ChoicesOf& choices_of, const ByteCentroids* bytes = nullptr) {
    Scope scopes[kTileQueries];
    int64_t max_end = 0;
    for (int64_t i = 0; i < count; ++i) {
      scopes[i] = scope_of(own_block_of(i), seen_by_all);
      max_end = max64(max_end, scopes[i].last_start);
    }
    ChosenBy chosen_by = ChosenBy::kNumber;
    if (max_end - params.force_first > list_length && list_length > 0) {
      gather_rows_transposed<Storage>(row_of, count, params.problem.head_dim, T(1), query_tile, kTileQueries);
      chosen_by = ChosenBy::kScore;
      if constexpr (std::is_same_v<T, float>) {
        if (bytes != nullptr && selects_by_filter(*bytes, chunk_of(params.force_first, 1).data, count, scopes)) {
          chosen_by = ChosenBy::kFilter;
        }
      }
      if (chosen_by == ChosenBy::kScore) {
        IntegerVector<T> end[kVectorsPerTile];
        for (int64_t i = 0; i < kTileQueries; ++i) {
          end[i / kLanes<T>][i % kLanes<T>] =
              static_cast<typename VectorTraits<T>::IntegerElement>(scopes[min64(i, count - 1)].last_start);
        }
        select(chunk_of, ceil_div(count, kLanes<T>), end, max_end);
      }
    }
    for (int64_t i = 0; i < count; ++i) write_choices(i, chosen_by, scopes[i], choices_of(i));
  }

  bool selects_by_filter(const ByteCentroids& bytes, const T* centroids, int64_t count, const Scope* scopes) {
    int64_t ends[kTileQueries];
    for (int64_t i = 0; i < count; ++i) ends[i] = scopes[i].last_start - params.force_first;
    return filter.select(bytes, centroids, query_tile, count, ends);
  }

  template <typename Storage>
  void run(const Sequence& sequence, int64_t head, int64_t first_query, const T* centroids,
           const ByteCentroids* bytes) {
    const MobaProblem& problem = params.problem;
    const int64_t last = min64(first_query + kQueriesPerTask, sequence.query_len);
    const auto chunk_of = [&](int64_t first, int64_t) -> RowBlock<T> {
      return {centroids + first * problem.head_dim, problem.head_dim};
    };
    for (int64_t tile = first_query; tile < last; tile += kTileQueries) {
      const int64_t first_row = sequence.query_start + tile;
      route_tile<Storage>(
          min64(kTileQueries, last - tile), problem.is_causal ? 0 : sequence.num_blocks,
          [&](int64_t i) { return params.query.at<Storage>(sequence.batch_idx, head, first_row + i); },
          [&](int64_t i) {
            return problem.is_causal ? block_of(tile + i + sequence.position_offset, problem.block_size) : int64_t{-1};
          },
          chunk_of,
          [&](int64_t i) { return params.block_indices.at<int32_t>(sequence.batch_idx, head, first_row + i); }, bytes);
    }
  }
};

// Bytes of the centroids of every head that has enough of them for the filter.
template <typename T>
class AllByteCentroids {
 public:
  // centroid_of(sequence_idx, kv_head, block): as compute_centroids has it.
  template <typename CentroidOf>
  AllByteCentroids(const MobaRouteParams& params, int64_t list_length, const CentroidOf& centroid_of) {
    if constexpr (std::is_same_v<T, float>) {
      const MobaProblem& problem = params.problem;
      const auto num_rows_of = [&](int64_t s) { return sequence_at(problem, s).num_blocks - params.force_first; };
      for (int64_t s = 0; s < problem.batch_size; ++s) {
        if (RouteFilter::serves(num_rows_of(s), list_length, problem.head_dim)) {
          max_rows_ = max64(max_rows_, num_rows_of(s));
        }
      }
      if (max_rows_ == 0) return;
      num_heads_ = problem.num_kv_heads;
      heads_.resize(static_cast<size_t>(problem.batch_size * num_heads_));
      const auto cut = [&](ScratchCutter& cutter) {
        for (int64_t s = 0; s < problem.batch_size; ++s) {
          if (!RouteFilter::serves(num_rows_of(s), list_length, problem.head_dim)) continue;
          for (int64_t head = 0; head < num_heads_; ++head) {
            heads_[static_cast<size_t>(s * num_heads_ + head)].take(num_rows_of(s), problem.head_dim, cutter);
          }
        }
      };
      ScratchCutter measure(nullptr);
      cut(measure);
      buffer_ = allocate_aligned(static_cast<size_t>(measure.used()));
      ScratchCutter cutter(buffer_.get());
      cut(cutter);
      const int64_t num_tasks = problem.batch_size * num_heads_;
      const double num_operations = static_cast<double>(num_tasks * max_rows_ * problem.head_dim);
      for_each_task(useful_threads(problem.num_threads, num_tasks, num_operations), num_tasks, [&](int64_t task, int) {
        const ByteCentroids& bytes = heads_[static_cast<size_t>(task)];
        if (bytes.rows == nullptr) return;
        const int64_t s = task / num_heads_;
        bytes.fill(centroid_of(s, task % num_heads_, params.force_first), num_rows_of(s), problem.head_dim);
      });
    }
  }

  int64_t max_rows() const { return max_rows_; }  // 0 where none were made
  const ByteCentroids* of(int64_t sequence_idx, int64_t kv_head) const {
    if (max_rows_ == 0) return nullptr;
    const ByteCentroids& bytes = heads_[static_cast<size_t>(sequence_idx * num_heads_ + kv_head)];
    return bytes.rows == nullptr ? nullptr : &bytes;
  }

 private:
  int64_t max_rows_ = 0;
  int64_t num_heads_ = 0;
  std::vector<ByteCentroids> heads_;
  AlignedBuffer buffer_;
};

template <typename Storage>
void route_storage(const MobaRouteParams& params) {
  using T = ComputeOf<Storage>;
  using Task = RouteTask<T>;
  const MobaProblem& problem = params.problem;
  int64_t total_blocks = 0;
  int64_t max_blocks = 0;
  int64_t max_queries = 0;
  const AlignedBuffer starts_buffer = allocate_aligned(static_cast<size_t>(problem.batch_size + 1) * sizeof(int64_t));
  int64_t* block_starts = reinterpret_cast<int64_t*>(starts_buffer.get());
  for (int64_t s = 0; s < problem.batch_size; ++s) {
    const Sequence sequence = sequence_at(problem, s);
    block_starts[s] = total_blocks;
    total_blocks += sequence.num_blocks;
    max_blocks = max64(max_blocks, sequence.num_blocks);
    max_queries = max64(max_queries, sequence.query_len);
  }
  const int64_t list_length = min64(problem.top_k - params.force_first - params.force_last, max_blocks);
  const AlignedBuffer centroid_buffer =
      allocate_aligned(static_cast<size_t>(total_blocks * problem.num_kv_heads * problem.head_dim) * sizeof(T));
  T* centroids = reinterpret_cast<T*>(centroid_buffer.get());
  const auto centroid_of = [&](int64_t sequence_idx, int64_t head, int64_t block) {
    const int64_t num_blocks = sequence_at(problem, sequence_idx).num_blocks;
    return centroids +
           (block_starts[sequence_idx] * problem.num_kv_heads + head * num_blocks + block) * problem.head_dim;
  };
  if (list_length > 0) compute_centroids<Storage>(problem, params.key, centroid_of);
  const AllByteCentroids<T> bytes(params, list_length, centroid_of);

  const int64_t chunks_per_head = ceil_div(max_queries, Task::kQueriesPerTask);
  const int64_t num_tasks = problem.batch_size * problem.num_query_heads * chunks_per_head;
  const double num_operations = static_cast<double>(problem.num_query_heads * problem.query_len) *
                                static_cast<double>(max_blocks * problem.head_dim + problem.top_k);
  const int num_workers = useful_threads(problem.num_threads, num_tasks, num_operations);
  const auto task_with = [&](ScratchCutter& cutter) {
    Task task(params, list_length, cutter);
    if (bytes.max_rows() > 0) task.take_filter(bytes.max_rows(), cutter);
    return task;
  };
  const WorkerScratch scratch(num_workers, [&](ScratchCutter& cutter) { task_with(cutter); });

  for_each_task(num_workers, num_tasks, [&](int64_t task, int worker) {
    const int64_t chunk = task % chunks_per_head;
    const int64_t head = task / chunks_per_head % problem.num_query_heads;
    const int64_t sequence_idx = task / chunks_per_head / problem.num_query_heads;
    const Sequence sequence = sequence_at(problem, sequence_idx);
    const int64_t kv_head = head / (problem.num_query_heads / problem.num_kv_heads);
    ScratchCutter cutter = scratch.of(worker);
    task_with(cutter).template run<Storage>(sequence, head, chunk * Task::kQueriesPerTask,
                                            centroid_of(sequence_idx, kv_head, 0), bytes.of(sequence_idx, kv_head));
  });
}

}  // namespace topgather::TOPGATHER_CPU_TARGET
