// Block attention backward on the CPU: scores recomputed, one pass, five products per tile.
//
//   delta_i      = sum_v grad_out_iv * out_iv - grad_lse_i
//   p_it         = exp(scale * dot(query_i, key_t) - lse_i), from the forward's softmax terms (softmax_terms.h)
//   ds_it        = p_it * (dot(grad_out_i, value_t) - delta_i), times 1 - (s_it / c)^2 where scores s are capped at c
//   grad_value_t = sum_i p_it grad_out_i
//   grad_key_t   = scale * sum_i ds_it query_i
//   grad_query_i = scale * sum_t ds_it key_t
//
// Who owns what: every (query range r, chunk of key blocks c) of a key head's group is one task; it adds to the rows
// of grad_query of r and to the rows of grad_key and grad_value of c. Tasks run in rounds, task (r, c) in round
// (r + c) mod num_rounds, so that two tasks of a round share neither r nor c: no atomics, and each sum is taken in an
// order fixed by shapes alone, whatever the number of threads. Where a sequence has few ranges, chunks are cut in halves,
// and a range's tasks with first and with second halves run in the same round: grad_query then has two sums, which are
// added up at the end. Steps:
//   1. key-major lists of every range, delta of every row;
//   per round, per task, per block of c, per kTileKeys keys, per tile of queries of r:
//   2. gather queries and grad_out, transposed (for the scores) and as rows (for the sums over queries);
//   3. weights p [keys, queries] and ds from two products;
//   4. add p x grad_out and ds x query to the block's grad_value and grad_key tiles;
//   5. ds^T x keys, added to grad_query;
//   6. after the last tile, the block's tiles are added to grad_key and grad_value;
//   last:
//   7. the second sum of grad_query is added to the first, and where gradients are 16 bits wide, the float32 sums are
//      converted.
// Numerics: float32 sums (float64 for float64). Where bfloat16 is multiplied as such (moba_operands_cpu.h), p and ds are
// rounded to it for steps 4 and 5. 16-bit gradients are summed in a float32 workspace, of as many key
// heads at a time as keep the threads busy. Rows without visible keys are in no list: their gradients are 0.
// With a window, blocks seen from its start on, edges, have lists of their own beside their blocks', as in the forward.
// Determinism: as above, bitwise, by default.
#pragma once

#include "moba_forward_cpu.h"

namespace topgather::TOPGATHER_CPU_TARGET {

// A gradient while it is being summed: the result itself, or a workspace of the compute type.
template <typename T>
struct GradientSum {
  T* data;  // first row of the head
  int64_t row_stride;
};

template <typename T>
inline void add_rows(const T* tile, int64_t tile_row, const int32_t* rows, int64_t count, int64_t depth, T factor,
                     const GradientSum<T>& target) {
  for (int64_t i = 0; i < count; ++i) {
    T* row = target.data + (rows == nullptr ? i : rows[i]) * target.row_stride;
    for (int64_t d = 0; d < depth; ++d) row[d] += factor * tile[i * tile_row + d];
  }
}

template <typename Storage>
struct BackwardTask {
  using T = ComputeOf<Storage>;
  using Operand = OperandOf<Storage>;
  using Ops = Operands<Storage>;
  static constexpr int64_t kTileQueries = MobaBackwardConfig::kTileQueries;
  static constexpr int64_t kTileKeys = MobaBackwardConfig::kTileKeys;
  static constexpr int kMaxVectors = static_cast<int>(kTileQueries) / kLanes<T>;

  const MobaBackwardParams& params;
  int64_t padded_head_dim;
  int64_t padded_value_dim;

#if TOPGATHER_MATRIX_UNIT
  AmxScores amx;
#endif
  // Of pairs half as many in the first dimension.
  Operand* query_columns;     // [D, kTileQueries], of floats times scale * log2(e)
  Operand* grad_out_columns;  // [V, kTileQueries]
  Operand* query_rows;        // [kTileQueries, padded D]
  Operand* grad_out_rows;     // [kTileQueries, padded V]
  T* weights;                 // [kTileKeys, kTileQueries]
  T* grad_scores;             // [kTileKeys, kTileQueries]
  T* grad_query_tile;         // [kTileQueries, padded D]
  T* grad_key_tile;           // [kTileKeys, padded D]
  T* grad_value_tile;         // [kTileKeys, padded V]
  Operand* key_scratch;       // [kTileKeys, padded D]
  Operand* value_scratch;     // [kTileKeys, padded V]
  Operand* key_pairs;         // the same keys as B
  Operand* some_key_pairs;
  Operand* weight_pairs;        // [kTileKeys, kTileQueries]
  Operand* grad_score_pairs;    // [kTileKeys, kTileQueries], of consecutive queries
  Operand* grad_score_columns;  // [kTileKeys, kTileQueries], of consecutive keys

  BackwardTask(const MobaBackwardParams& p, ScratchCutter& scratch)
      : params(p),
        padded_head_dim(round_up(p.problem.head_dim, kLanes<T>)),
        padded_value_dim(round_up(p.problem.value_dim, kLanes<T>))
#if TOPGATHER_MATRIX_UNIT
        ,
        amx(p.problem, p, kTileKeys, scratch)
#endif
  {
    query_columns = scratch.take<Operand>(Ops::count(p.problem.head_dim) * kTileQueries);
    grad_out_columns = scratch.take<Operand>(Ops::count(p.problem.value_dim) * kTileQueries);
    query_rows = scratch.take<Operand>(padded_head_dim * Ops::count(kTileQueries));
    grad_out_rows = scratch.take<Operand>(padded_value_dim * Ops::count(kTileQueries));
    weights = scratch.take<T>(kTileKeys * kTileQueries);
    grad_scores = scratch.take<T>(kTileKeys * kTileQueries);
    grad_query_tile = scratch.take<T>(padded_head_dim * kTileQueries);
    grad_key_tile = scratch.take<T>(padded_head_dim * kTileKeys);
    grad_value_tile = scratch.take<T>(padded_value_dim * kTileKeys);
    key_scratch = scratch.take<Operand>(padded_head_dim * kTileKeys);
    value_scratch = scratch.take<Operand>(padded_value_dim * kTileKeys);
    for (Operand** pairs : {&key_pairs, &some_key_pairs}) {
      *pairs = scratch.take<Operand>(Ops::kArePairs ? padded_head_dim * Ops::count(kTileKeys) : 0);
    }
    for (Operand** pairs : {&weight_pairs, &grad_score_pairs, &grad_score_columns}) {
      *pairs = scratch.take<Operand>(Ops::kArePairs ? kTileKeys * kTileQueries : 0);
    }
  }

  // Per-row inputs of a range, by row of the range.
  struct RangeRows {
    const Storage* query;
    const Storage* grad_out;
    const T* lse;
    const T* softmax_terms;  // or null
    const T* delta;
    GradientSum<T> grad_query;
  };

  // Scores of step 3, into `weights`: to the last bit the forward's.
  void make_tile_scores(const Storage* query, const int32_t* queries, int64_t count, const RowBlock<Operand>& keys,
                        int64_t num_keys, [[maybe_unused]] bool is_edge) {
#if TOPGATHER_MATRIX_UNIT
    if constexpr (kHasMatrixUnit<Storage>) {
      if (uses_matrix_unit<Storage>(params.scale) && !is_edge) {
        amx.multiply(query, params.query.strides[2], queries, count, round_up(num_keys, kAmxDepth));
        return amx.write_transposed(count, num_keys, weights, kTileQueries);
      }
    }
#endif
    make_scores<kTileQueries>(params, query, params.query.strides[2], queries, count, keys, num_keys, query_columns,
                              weights, [] {});
  }

  // Keys first_key .. of the block, and where their gradients are added up.
  struct Keys {
    int64_t first_key;
    int64_t num_keys;
    const Storage* key_rows;
    const Storage* value_rows;
    RowBlock<Operand> keys;  // as A
    RowBlock<Operand> values;
    RowBlock<Operand> keys_as_b;
    T* grad_key;    // [num_keys, padded D]
    T* grad_value;  // [num_keys, padded V]
  };

  // Steps 2 to 5. The num_following queries after them come next. is_edge: queries see the keys from their windows' starts on.
  void add_tile(const QueryRange& range, const RangeRows& rows, const int32_t* queries, int64_t count,
                int64_t num_following, const Keys& all, bool is_edge) {
    const MobaProblem& problem = params.problem;
    IntegerVector<T> limits[kMaxVectors], starts[kMaxVectors];
    // What no query sees is left out. The first one's window begins first.
    const int64_t skipped = is_edge ? keys_before_window(problem, range, queries[0], all.first_key, all.num_keys) : 0;
    const int64_t first_key = all.first_key + skipped;
    const RowBlock<Operand> keys{all.keys.data + skipped * all.keys.row_stride, all.keys.row_stride};
    const RowBlock<Operand> values{all.values.data + skipped * all.values.row_stride, all.values.row_stride};
    const TileVisibility visibility =
        visible_keys<T>(problem, range, queries, count, first_key, all.num_keys - skipped, limits);
    if (visibility.max_keys == 0) return;
    const int64_t last_start =
        is_edge ? window_starts<T>(problem, range, queries, count, first_key, visibility.max_keys, starts) : 0;
    const int64_t padded_count = round_up(count, kLanes<T>);
    const int64_t num_vectors = padded_count / kLanes<T>;
    const int64_t query_stride = params.query.strides[2], grad_out_stride = params.grad_out.strides[2];
    const int64_t key_stride = params.key.strides[2], value_stride = params.value.strides[2];
    const int64_t seen = visibility.max_keys;
    const bool hides_keys = visibility.min_keys < seen || last_start > 0;
    if (hides_keys && count > 1 &&
        !(all_finite(all.key_rows + skipped * key_stride, key_stride, seen, problem.head_dim) &&
          all_finite(all.value_rows + skipped * value_stride, value_stride, seen, problem.value_dim) &&
          all_finite_of(rows.query, query_stride, queries, count, problem.head_dim) &&
          all_finite_of(rows.grad_out, grad_out_stride, queries, count, problem.value_dim))) {
      // A hidden key weighs 0, but 0 x inf is NaN: one query at a time there is nothing hidden to multiply with.
      for (int64_t i = 0; i < count; ++i) add_tile(range, rows, queries + i, 1, 0, all, is_edge);
      return;
    }
    // Rows that are needed next, while products are made: where grad_query is summed, then the next tile's.
    const int64_t key_steps = ceil_div(seen, rows_at_once<T>(padded_count));
    RowPrefetch<T> sums(rows.grad_query.data, rows.grad_query.row_stride, queries, count, problem.head_dim, key_steps);
    RowPrefetch<const Storage> next_query(rows.query, query_stride, queries + count, num_following, problem.head_dim,
                                          ceil_div(seen, rows_at_once<T>(padded_value_dim)));
    RowPrefetch<const Storage> next_grad_out(rows.grad_out, grad_out_stride, queries + count, num_following,
                                             problem.value_dim, ceil_div(seen, rows_at_once<T>(padded_head_dim)));
    Ops::gather_as_b(rows.query, query_stride, queries, count, problem.head_dim, padded_head_dim, query_rows);
    Ops::gather_as_b(rows.grad_out, grad_out_stride, queries, count, problem.value_dim, padded_value_dim,
                     grad_out_rows);
    Ops::gather_columns(rows.grad_out, grad_out_stride, queries, count, problem.value_dim, T(1), grad_out_columns,
                        kTileQueries);
    BackwardRows<T, kTileQueries> tile_rows;
    for (int64_t i = 0; i < padded_count; ++i) {
      const int32_t row = queries[min64(i, count - 1)];
      const T* row_terms = rows.softmax_terms == nullptr ? nullptr : rows.softmax_terms + 2 * row;
      tile_rows.set(i, read_softmax_terms(row_terms, rows.lse[row]), rows.delta[row]);
    }

    make_tile_scores(rows.query, queries, count, keys, seen, is_edge);
    multiply<false>({values.data, values.row_stride, 1, grad_out_columns, kTileQueries, grad_scores, kTileQueries,
                     Ops::count(problem.value_dim)},
                    seen, padded_count, sums);
    weigh_with_terms(weights, grad_scores, seen, num_vectors, tile_rows, static_cast<T>(params.softcap * kLog2E));
    if (hides_keys) {
      // After the exponential, so that a hidden key adds exactly nothing even where its value is inf or NaN.
      hide_later_keys(weights, kTileQueries, num_vectors, visibility.min_keys, seen, limits, T(0));
      hide_later_keys(grad_scores, kTileQueries, num_vectors, visibility.min_keys, seen, limits, T(0));
      hide_earlier_keys(weights, kTileQueries, num_vectors, last_start, starts, T(0));
      hide_earlier_keys(grad_scores, kTileQueries, num_vectors, last_start, starts, T(0));
    }
    const int64_t num_terms = Ops::count(count);
    multiply<true>({Ops::along_rows(weights, kTileQueries, seen, count, weight_pairs), kTileQueries, 1, grad_out_rows,
                    padded_value_dim, all.grad_value + skipped * padded_value_dim, padded_value_dim, num_terms},
                   seen, padded_value_dim, next_query);
    multiply<true>({Ops::along_rows(grad_scores, kTileQueries, seen, count, grad_score_pairs), kTileQueries, 1,
                    query_rows, padded_head_dim, all.grad_key + skipped * padded_head_dim, padded_head_dim, num_terms},
                   seen, padded_head_dim, next_grad_out);
    const RowBlock<Operand> keys_as_b = Ops::rows_of_b(all.keys_as_b, all.num_keys, all.key_rows, key_stride, skipped,
                                                       seen, problem.head_dim, some_key_pairs);
    tile_gemm<false>(
        GemmOperands<T, Operand>{Ops::down_columns(grad_scores, kTileQueries, seen, padded_count, grad_score_columns),
                                 1, kTileQueries, keys_as_b.data, keys_as_b.row_stride, grad_query_tile,
                                 padded_head_dim, Ops::count(seen)},
        count, padded_head_dim);
    add_rows(grad_query_tile, padded_head_dim, queries, count, problem.head_dim, static_cast<T>(params.scale),
             rows.grad_query);
  }

  template <bool kAccumulate, typename Prefetched>
  static void multiply(const GemmOperands<T, Operand>& op, int64_t num_rows, int64_t num_columns,
                       Prefetched& prefetched) {
    tile_gemm_prefetching<kAccumulate>(op, num_rows, num_columns, [&] { prefetched.advance(); });
  }

  // Steps 2 to 6 for one block, whose lists `offsets` delimit among the num_queries of the task.
  void add_block(const QueryRange& range, const RangeRows& rows, const int32_t* all_queries, int64_t num_queries,
                 const int32_t* offsets, int64_t block, const GradientSum<T>& grad_key,
                 const GradientSum<T>& grad_value) {
    const MobaProblem& problem = params.problem;
    const Sequence& sequence = range.sequence;
    const int64_t kv_head = range.head_idx / (problem.num_query_heads / problem.num_kv_heads);
    const int64_t block_end = min64((block + 1) * problem.block_size, sequence.key_len);
    for (int64_t first_key = block * problem.block_size; first_key < block_end; first_key += kTileKeys) {
      const int64_t num_keys = min64(kTileKeys, block_end - first_key);
      const int64_t key_row = sequence.key_start + first_key;
      const Storage* key_rows = params.key.at<Storage>(sequence.batch_idx, kv_head, key_row);
      const Storage* value_rows = params.value.at<Storage>(sequence.batch_idx, kv_head, key_row);
      const RowBlock<Operand> keys_as_b = Ops::rows_as_b(key_rows, params.key.strides[2], num_keys, problem.head_dim,
                                                         padded_head_dim, Ops::kArePairs ? key_pairs : key_scratch);
      const RowBlock<Operand> keys =
          Ops::rows_as_a_too(key_rows, params.key.strides[2], num_keys, problem.head_dim, keys_as_b, key_scratch);
      const RowBlock<Operand> values =
          Ops::rows_as_a(value_rows, params.value.strides[2], num_keys, problem.value_dim, value_scratch);
#if TOPGATHER_MATRIX_UNIT
      if constexpr (kHasMatrixUnit<Storage>) {
        amx.pack_keys(key_rows, params.key.strides[2], num_keys);
      }
#endif
      for (int64_t i = 0; i < num_keys * padded_head_dim; ++i) grad_key_tile[i] = 0;
      for (int64_t i = 0; i < num_keys * padded_value_dim; ++i) grad_value_tile[i] = 0;
      const Keys all{first_key, num_keys,  key_rows,      value_rows,     keys,
                     values,    keys_as_b, grad_key_tile, grad_value_tile};
      for (int64_t list = 0; list < lists_per_block(problem); ++list) {
        for (int64_t i = offsets[list]; i < offsets[list + 1]; i += kTileQueries) {
          const int64_t count = min64(kTileQueries, offsets[list + 1] - i);
          const int64_t num_following = min64(kTileQueries, num_queries - i - count);
          add_tile(range, rows, all_queries + i, count, num_following, all, list > 0);
        }
      }
      add_rows<T>(grad_key_tile, padded_head_dim, nullptr, num_keys, problem.head_dim, static_cast<T>(params.scale),
                  {grad_key.data + first_key * grad_key.row_stride, grad_key.row_stride});
      add_rows<T>(grad_value_tile, padded_value_dim, nullptr, num_keys, problem.value_dim, T(1),
                  {grad_value.data + first_key * grad_value.row_stride, grad_value.row_stride});
    }
  }
};

// Of grad_query, by a sequence's shape alone.
inline int64_t sums_per_range(const MobaProblem& problem, const Sequence& sequence) {
  const int64_t num_ranges = ranges_in(problem, sequence) * problem.num_query_heads;
  const int64_t keys_per_query = min64(num_slots(problem), sequence.num_blocks) * problem.block_size;
  const bool is_cut = num_ranges < MobaRangeConfig::kMinRanges &&
                      sequence.query_len <= MobaBackwardConfig::kMostQueriesForTwoSums &&
                      keys_per_query >= MobaBackwardConfig::kFewestKeysForTwoSums;
  return is_cut ? 2 : 1;
}

// Step 1 of a range: delta.
template <typename Storage>
void make_delta(const MobaBackwardParams& params, const QueryRange& range, ComputeOf<Storage>* delta) {
  using T = ComputeOf<Storage>;
  const Sequence& sequence = range.sequence;
  const int64_t first_row = sequence.query_start + range.first_query;
  const int64_t head = range.head_idx;
  for (int64_t i = 0; i < range.num_queries; ++i) {
    const Storage* out = params.out.at<Storage>(sequence.batch_idx, head, first_row + i);
    const Storage* grad_out = params.grad_out.at<Storage>(sequence.batch_idx, head, first_row + i);
    T sum = 0;
    for (int64_t d = 0; d < params.problem.value_dim; ++d) sum += to_compute(out[d]) * to_compute(grad_out[d]);
    if (params.grad_lse.data != nullptr) {
      sum -= *params.grad_lse.at<T>(sequence.batch_idx, head, first_row + i);
    }
    delta[i] = sum;
  }
}

// The rounds of a whole problem. A unit is one sequence's key head with its group of query heads; a unit takes part in
// as many rounds as its group has query ranges.
template <typename Storage>
class Backward {
  using T = ComputeOf<Storage>;
  static constexpr bool kSumsInPlace = std::is_same_v<Storage, T>;

 public:
  explicit Backward(const MobaBackwardParams& params)
      : params_(params),
        problem_(params.problem),
        extent_(range_extent(params.problem)),
        group_size_(params.problem.num_query_heads / params.problem.num_kv_heads) {}

  void run() {
    const int64_t num_units = problem_.batch_size * problem_.num_kv_heads;
    if (num_units == 0 || extent_.num_ranges == 0) return;
    max_rounds_ = group_size_ * extent_.max_ranges;
    for (int64_t s = 0; s < problem_.batch_size; ++s) {
      max_sums_ = max64(max_sums_, sums_per_range(problem_, sequence_at(problem_, s)));
    }
    const int64_t tasks_per_unit = max_rounds_ * max_sums_;
    const int num_workers =
        useful_threads(problem_.num_threads, num_units * tasks_per_unit, 5 * pair_operations(problem_, extent_));
    const WorkerScratch scratch(num_workers, [&](ScratchCutter& cutter) {
      BackwardTask<Storage>(params_, cutter);
      cutter.take<int32_t>(num_cursors() + num_joined());
    });
    scratch_ = &scratch;
    const AlignedBuffer starts = allocate_aligned(static_cast<size_t>(problem_.batch_size) * sizeof(int64_t));
    prepared_starts_ = reinterpret_cast<int64_t*>(starts.get());
    const AlignedBuffer prepared = allocate_aligned(static_cast<size_t>(lay_out_prepared_ranges()));
    prepared_ = prepared.get();

    for_each_part(problem_, 1, 2, num_workers,
                  [&](const QueryRange& range, int64_t sequence_idx, int64_t range_idx, int worker, int64_t part) {
                    const PreparedRange at = prepared_range(range.sequence, sequence_idx, range.head_idx, range_idx);
                    if (part == 1) {
                      make_delta<Storage>(params_, range, at.delta);
                      return RoutingFault{};
                    }
                    return build_lists(range, at.lists, worker);
                  });

    // In place, all units run together; with a workspace, so many that each round has tasks for every thread, but no
    // more: the next units' then lies in cache, and takes no new memory.
    const bool has_workspace = !kSumsInPlace || max_sums_ > 1;
    const int64_t wanted = max64(4 * num_workers, kSumsInPlace ? MobaBackwardConfig::kTasksPerRound : 0);
    const int64_t wave = has_workspace ? min64(num_units, ceil_div(wanted, tasks_per_unit)) : num_units;
    AlignedBuffer workspace;
    if (has_workspace) {
      workspace_bytes_ = round_up(unit_elements(extent_.longest, max_sums_) * static_cast<int64_t>(sizeof(T)), 64);
      workspace = allocate_aligned(static_cast<size_t>(workspace_bytes_ * wave));
      workspace_ = workspace.get();
    }
    for (first_unit_ = 0; first_unit_ < num_units; first_unit_ += wave) {
      const int64_t wave_units = min64(wave, num_units - first_unit_);
      const int64_t num_pieces = wave_units * MobaBackwardConfig::kUnitPieces;
      if (has_workspace) for_each_task(num_workers, num_pieces, [&](int64_t piece, int) { clear_piece(piece); });
      for (round_ = 0; round_ < max_rounds_; ++round_) {
        for_each_task(num_workers, wave_units * tasks_per_unit,
                      [&](int64_t task, int worker) { run_task(task, worker); });
      }
      if (has_workspace) for_each_task(num_workers, num_pieces, [&](int64_t piece, int) { finish_piece(piece); });
    }
  }

 private:
  // What step 1 leaves for a range.
  struct PreparedRange {
    BlockLists lists;
    T* delta;  // [range queries]
  };

  // Scratch of step 1.
  int64_t num_cursors() const { return lists_per_block(problem_) * extent_.max_blocks; }
  int64_t num_joined() const { return problem_.window > 0 ? extent_.max_queries * num_slots(problem_) : 0; }

  // Step 1 of a range: its key-major lists.
  RoutingFault build_lists(const QueryRange& range, const BlockLists& lists, int worker) const {
    int32_t* cursors = scratch_->of(worker).template take<int32_t>(num_cursors() + num_joined());
    const int64_t row = range.sequence.query_start + range.first_query;
    const int32_t* choices = choices_of_query(params_, range.sequence.batch_idx, range.head_idx, row);
    return build_range_lists(problem_, range, choices, params_.block_indices.strides[2], cursors + num_cursors(),
                             cursors, lists);
  }

  int64_t lists_in(const Sequence& sequence) const { return lists_per_block(problem_) * sequence.num_blocks; }

  int64_t prepared_bytes(const Sequence& sequence) const {
    const int64_t num_queries = queries_per_range(problem_, sequence);
    return round_up((lists_in(sequence) + 1 + num_queries * num_slots(problem_)) * 4, 64) +
           round_up(num_queries * static_cast<int64_t>(sizeof(T)), 64);
  }

  // Ranges of a sequence are alike in size, sequences are not. Returns the bytes needed.
  int64_t lay_out_prepared_ranges() {
    int64_t total = 0;
    for (int64_t s = 0; s < problem_.batch_size; ++s) {
      const Sequence sequence = sequence_at(problem_, s);
      prepared_starts_[s] = total;
      total += prepared_bytes(sequence) * ranges_in(problem_, sequence) * problem_.num_query_heads;
    }
    return total;
  }

  PreparedRange prepared_range(const Sequence& sequence, int64_t sequence_idx, int64_t head, int64_t range_idx) const {
    const int64_t slot = head * ranges_in(problem_, sequence) + range_idx;
    unsigned char* piece = prepared_ + prepared_starts_[sequence_idx] + slot * prepared_bytes(sequence);
    int32_t* offsets = reinterpret_cast<int32_t*>(piece);
    const int64_t num_choices = queries_per_range(problem_, sequence) * num_slots(problem_);
    const int64_t list_bytes = round_up((lists_in(sequence) + 1 + num_choices) * 4, 64);
    return {{offsets, offsets + lists_in(sequence) + 1}, reinterpret_cast<T*>(piece + list_bytes)};
  }

  // A gradient of a unit's query heads while it is being summed, from the first row of the sequence on.
  struct QuerySum {
    GradientSum<T> first_head;
    int64_t head_stride;

    GradientSum<T> at(int64_t head, int64_t row) const {
      return {first_head.data + head * head_stride + row * first_head.row_stride, first_head.row_stride};
    }
  };

  struct UnitSums {
    QuerySum grad_query[2];  // the second only where sums_per_range() says so
    GradientSum<T> grad_key;
    GradientSum<T> grad_value;
  };

  int64_t query_elements(const Sequence& sequence) const {
    return group_size_ * sequence.query_len * problem_.head_dim;
  }

  // Of a unit in the workspace: what is not summed in place, then second sums.
  int64_t unit_elements(const Sequence& sequence, int64_t num_sums) const {
    const int64_t key_elements = sequence.key_len * (problem_.head_dim + problem_.value_dim);
    return (kSumsInPlace ? 0 : key_elements) + (num_sums - (kSumsInPlace ? 1 : 0)) * query_elements(sequence);
  }

  UnitSums sums_of(int64_t unit, const Sequence& sequence) const {
    T* data = reinterpret_cast<T*>(workspace_ + (unit - first_unit_) * workspace_bytes_);
    const auto query_sum = [&](T* sum) {
      return QuerySum{{sum, problem_.head_dim}, sequence.query_len * problem_.head_dim};
    };
    if constexpr (kSumsInPlace) {
      const int64_t kv_head = unit % problem_.num_kv_heads;
      const int64_t batch = sequence.batch_idx;
      const QuerySum result{
          {params_.grad_query.at<T>(batch, kv_head * group_size_, sequence.query_start), params_.grad_query.strides[2]},
          params_.grad_query.strides[1]};
      return {{result, query_sum(data)},
              {params_.grad_key.at<T>(batch, kv_head, sequence.key_start), params_.grad_key.strides[2]},
              {params_.grad_value.at<T>(batch, kv_head, sequence.key_start), params_.grad_value.strides[2]}};
    } else {
      T* key_sums = data + query_elements(sequence);
      T* value_sums = key_sums + sequence.key_len * problem_.head_dim;
      return {{query_sum(data), query_sum(value_sums + sequence.key_len * problem_.value_dim)},
              {key_sums, problem_.head_dim},
              {value_sums, problem_.value_dim}};
    }
  }

  void run_task(int64_t task, int worker) const {
    const int64_t unit = first_unit_ + task / (max_rounds_ * max_sums_);
    const int64_t sum_idx = task / max_rounds_ % max_sums_;
    const int64_t row_idx = task % max_rounds_;
    const int64_t sequence_idx = unit / problem_.num_kv_heads;
    const Sequence sequence = sequence_at(problem_, sequence_idx);
    const int64_t num_ranges = ranges_in(problem_, sequence);
    const int64_t num_rounds = num_ranges * group_size_;
    const int64_t num_sums = sums_per_range(problem_, sequence);
    if (round_ >= num_rounds || row_idx >= num_rounds || sum_idx >= num_sums) return;
    const int64_t num_chunks = num_rounds * num_sums;
    const int64_t chunk = (round_ - row_idx + num_rounds) % num_rounds * num_sums + sum_idx;
    const int64_t head_in_group = row_idx / num_ranges;
    const int64_t head = unit % problem_.num_kv_heads * group_size_ + head_in_group;
    const int64_t range_idx = row_idx % num_ranges;
    const int64_t range_size = queries_per_range(problem_, sequence);
    const int64_t first_query = range_idx * range_size;
    const int64_t first_block = chunk * sequence.num_blocks / num_chunks;
    const int64_t last_block = (chunk + 1) * sequence.num_blocks / num_chunks;
    const QueryRange range{sequence, head, first_query, min64(range_size, sequence.query_len - first_query)};

    const PreparedRange prepared = prepared_range(sequence, sequence_idx, head, range_idx);
    const BlockLists& lists = prepared.lists;
    const int64_t lists_of_block = lists_per_block(problem_);
    if (lists.offsets[first_block * lists_of_block] == lists.offsets[last_block * lists_of_block]) return;
    const int64_t row = sequence.query_start + first_query;
    const UnitSums sums = sums_of(unit, sequence);
    const typename BackwardTask<Storage>::RangeRows rows{
        params_.query.at<Storage>(sequence.batch_idx, head, row),
        params_.grad_out.at<Storage>(sequence.batch_idx, head, row),
        params_.lse.at<T>(sequence.batch_idx, head, row),
        params_.softmax_terms.data == nullptr ? nullptr : params_.softmax_terms.at<T>(sequence.batch_idx, head, row),
        prepared.delta,
        sums.grad_query[sum_idx].at(head_in_group, first_query)};
    ScratchCutter cutter = scratch_->of(worker);
    [[maybe_unused]] const std::conditional_t<kHasMatrixUnit<Storage>, AmxGuard, int> guard{};
    BackwardTask<Storage> backward(params_, cutter);
    for (int64_t block = first_block; block < last_block; ++block) {
      const int32_t* offsets = lists.offsets + block * lists_of_block;
      if (offsets[0] == offsets[lists_of_block]) continue;
      backward.add_block(range, rows, lists.queries, lists.offsets[last_block * lists_of_block], offsets, block,
                         sums.grad_key, sums.grad_value);
    }
  }

  // The piece-th of kUnitPieces parts of `size` things.
  static int64_t first_of_piece(int64_t piece, int64_t size) { return piece * size / MobaBackwardConfig::kUnitPieces; }

  void clear_piece(int64_t task) const {
    const int64_t index = task / MobaBackwardConfig::kUnitPieces, piece = task % MobaBackwardConfig::kUnitPieces;
    const Sequence sequence = sequence_at(problem_, (first_unit_ + index) / problem_.num_kv_heads);
    const int64_t num_lines = ceil_div(unit_elements(sequence, sums_per_range(problem_, sequence)), kLineElements);
    T* data = reinterpret_cast<T*>(workspace_ + index * workspace_bytes_);
    const int64_t last = first_of_piece(piece + 1, num_lines) * kLineElements;
    for (int64_t i = first_of_piece(piece, num_lines) * kLineElements; i < last; ++i) data[i] = 0;
  }

  // Step 7 for some rows of one unit.
  void finish_piece(int64_t task) const {
    const int64_t piece = task % MobaBackwardConfig::kUnitPieces;
    const int64_t unit = first_unit_ + task / MobaBackwardConfig::kUnitPieces;
    const int64_t kv_head = unit % problem_.num_kv_heads;
    const Sequence sequence = sequence_at(problem_, unit / problem_.num_kv_heads);
    const UnitSums sums = sums_of(unit, sequence);
    const int64_t first_query = first_of_piece(piece, sequence.query_len);
    const int64_t last_query = first_of_piece(piece + 1, sequence.query_len);
    if (sums_per_range(problem_, sequence) > 1) {
      for (int64_t h = 0; h < group_size_; ++h) {
        const GradientSum<T> second = sums.grad_query[1].at(h, first_query);
        add_rows<T>(second.data, second.row_stride, nullptr, last_query - first_query, problem_.head_dim, T(1),
                    sums.grad_query[0].at(h, first_query));
      }
    }
    if constexpr (!kSumsInPlace) {
      const auto convert = [&](const GradientSum<T>& sum, const Array<void, 4>& grad, int64_t head, int64_t start,
                               int64_t first, int64_t last, int64_t depth) {
        for (int64_t i = first; i < last; ++i) {
          store_row(sum.data + i * sum.row_stride, depth, T(1), grad.at<Storage>(sequence.batch_idx, head, start + i));
        }
      };
      for (int64_t h = 0; h < group_size_; ++h) {
        convert(sums.grad_query[0].at(h, 0), params_.grad_query, kv_head * group_size_ + h, sequence.query_start,
                first_query, last_query, problem_.head_dim);
      }
      const int64_t first_key = first_of_piece(piece, sequence.key_len);
      const int64_t last_key = first_of_piece(piece + 1, sequence.key_len);
      convert(sums.grad_key, params_.grad_key, kv_head, sequence.key_start, first_key, last_key, problem_.head_dim);
      convert(sums.grad_value, params_.grad_value, kv_head, sequence.key_start, first_key, last_key,
              problem_.value_dim);
    }
  }

  static constexpr int64_t kLineElements = 64 / static_cast<int64_t>(sizeof(T));

  const MobaBackwardParams& params_;
  const MobaProblem& problem_;
  RangeExtent extent_;
  int64_t group_size_;
  int64_t max_rounds_ = 0;       // of any unit
  int64_t max_sums_ = 1;         // of grad_query, of any sequence
  int64_t workspace_bytes_ = 0;  // sums of one unit
  int64_t first_unit_ = 0;       // of the wave
  int64_t round_ = 0;
  const WorkerScratch* scratch_ = nullptr;
  int64_t* prepared_starts_ = nullptr;  // [batch_size] bytes before a sequence's first prepared range
  unsigned char* prepared_ = nullptr;
  unsigned char* workspace_ = nullptr;
};

template <typename Storage>
void backward_storage(const MobaBackwardParams& params) {
  Backward<Storage>(params).run();
}

}  // namespace topgather::TOPGATHER_CPU_TARGET
