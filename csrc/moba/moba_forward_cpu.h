// Block attention forward on the CPU: key-stationary, queries gathered into dense tiles.
//
//   out_i = sum_t softmax_t(scale * dot(query_i, key_t)) value_t,   t over the visible keys of the chosen blocks
//   lse_i = log sum_t exp(scale * dot(query_i, key_t))
//
// With a softcap c, scaled scores s become c * tanh(s / c). A sink joins the softmax's sum and no value: out_i is
// multiplied with exp(lse_i) / (exp(lse_i) + exp(sink)). With a window, blocks that it adds stand in the same lists, and
// blocks that a query sees from the window's start on, edges, in lists of their own.
//
// Who owns what: a task is one QueryRange of one head, or of all heads of a key head where these share a choice, so that a
// list serves them all and its tiles are as much taller. It owns its rows of out and lse. It visits key blocks in
// ascending order; each block stays in cache while the range's queries that chose it stream past in tiles of
// kTileQueries. Steps:
//   1. key-major lists of the range's choices, by counting;
//   per block, per kTileKeys of its keys, per tile of queries:
//   2. gather the queries, transposed and scaled: queries stand in vector lanes, keys are broadcast, so neither keys
//      nor values are ever packed;
//   3. scores [keys, queries]; causal mask where a query's own position falls inside the block;
//   4. running maximum and sum per query (online softmax, base 2), weights in place of the scores;
//   5. weights^T x values [queries, V] by the same micro-kernel;
//   6. rescale and add to the range's running outputs;
//   last:
//   7. divide, convert, write out, lse and softmax terms.
// Queries and rows of running outputs are scattered and lie in the third-level cache by the time they are needed:
// between the register tiles of step 3 this tile's running outputs are prefetched, of step 5 the next tile's queries
// and keys.
// Numerics: scores, weights and sums in float32 (float64 for float64); where bfloat16 is multiplied as such
// (moba_operands_cpu.h), weights are rounded to it for step 5 and values are interleaved. A row without visible keys:
// out 0, lse -inf. A row all of whose scores are -inf: NaN, as plain softmax.
// Determinism: a range's arithmetic depends on shapes and choices alone, so any number of threads gives the same bits.
#pragma once

#include <limits>

#include "../common/parallel.h"
#include "../common/softmax_terms.h"
#include "../cpu/attention_tile.h"
#include "../cpu/convert.h"
#include "../cpu/math.h"
#include "../cpu/scratch.h"
#include "../cpu/tile_gemm.h"
#include "moba_cpu.h"
#include "moba_forward_amx.h"
#include "moba_operands_cpu.h"
#include "moba_window_cpu.h"

namespace topgather::TOPGATHER_CPU_TARGET {

// How many of a block's keys, from first_key on, each query of a tile may see; all of them where not causal.
struct TileVisibility {
  int64_t min_keys;
  int64_t max_keys;
};

template <typename T>
inline TileVisibility visible_keys(const MobaProblem& problem, const QueryRange& range, const int32_t* queries,
                                   int64_t count, int64_t first_key, int64_t num_keys, IntegerVector<T>* limits) {
  using Integer = typename VectorTraits<T>::IntegerElement;
  if (!problem.is_causal) return {num_keys, num_keys};
  const int64_t offset = range.first_query + range.sequence.position_offset + 1 - first_key;
  const auto limit_of = [&](int64_t i) { return max64(0, min64(num_keys, queries[i] + offset)); };
  // Queries ascend: the first query's visible range is the shortest, the last one's the longest.
  const TileVisibility visibility{limit_of(0), limit_of(count - 1)};
  if (visibility.min_keys < num_keys) {
    const int64_t padded = round_up(count, kLanes<T>);
    for (int64_t i = 0; i < padded; ++i) {
      limits[i / kLanes<T>][i % kLanes<T>] = static_cast<Integer>(limit_of(min64(i, count - 1)));
    }
  }
  return visibility;
}

// Step 3's mask: scores [num_keys, tile_row] below the diagonal stay, the rest become `hidden`.
template <typename T>
inline void hide_later_keys(T* scores, int64_t tile_row, int64_t num_vectors, int64_t first_masked, int64_t num_keys,
                            const IntegerVector<T>* limits, T hidden) {
  using Integer = typename VectorTraits<T>::IntegerElement;
  for (int64_t key = first_masked; key < num_keys; ++key) {
    for (int64_t v = 0; v < num_vectors; ++v) {
      T* score = scores + key * tile_row + v * kLanes<T>;
      const IntegerVector<T> seen = static_cast<Integer>(key) < limits[v];
      store<T>(score, seen ? load<T>(score) : broadcast(hidden));
    }
  }
}

#if TOPGATHER_MATRIX_UNIT
template <typename Storage>
inline constexpr bool kHasMatrixUnit = std::is_same_v<Storage, BFloat16>;
#else
template <typename Storage>
inline constexpr bool kHasMatrixUnit = false;
struct AmxGuard {};
#endif
template <typename Storage>
inline bool uses_matrix_unit(double scale) {
  // The unit's scores are scaled after the product, and the largest stays the largest only for a positive scale.
  return kHasMatrixUnit<Storage> && scale > 0;
}

// Some keys of a block, with their values: where they lie, and, once needed, as the micro-kernel takes them.
template <typename Storage>
struct KeyTile {
  int64_t first_key;  // within the sequence
  int64_t num_keys;
  const Storage* key_rows;
  const Storage* value_rows;
  RowBlock<OperandOf<Storage>> keys;    // as A; data null until needed
  RowBlock<OperandOf<Storage>> values;  // as B
  // The keys after these, and their values.
  RowPrefetch<const Storage> next_keys;
  RowPrefetch<const Storage> next_values;
};

// Step 3 without the mask: scores [num_keys, kTileQueries]. The backward's are the forward's, to the last bit.
template <int64_t kTileQueries, typename Params, typename Storage, typename T, typename Prefetch>
inline void make_scores(const Params& params, const Storage* query, int64_t query_stride, const int32_t* queries,
                        int64_t count, const RowBlock<OperandOf<Storage>>& keys, int64_t num_keys,
                        OperandOf<Storage>* query_tile, T* scores, const Prefetch& prefetch) {
  const int64_t head_dim = params.problem.head_dim;
  const int64_t padded_count = round_up(count, kLanes<T>);
  const T factor = static_cast<T>(params.scale * kLog2E);
  Operands<Storage>::gather_columns(query, query_stride, queries, count, head_dim, factor, query_tile, kTileQueries);
  tile_gemm_prefetching<false>(
      GemmOperands<T, OperandOf<Storage>>{keys.data, keys.row_stride, 1, query_tile, kTileQueries, scores, kTileQueries,
                                          Operands<Storage>::count(head_dim),
                                          Operands<Storage>::product_factor(factor)},
      num_keys, padded_count, prefetch);
  if (params.softcap > 0) {
    cap_scores(scores, kTileQueries, padded_count / kLanes<T>, num_keys, static_cast<T>(params.softcap * kLog2E));
  }
}

// Rows of a list, a query of one head each.
struct ListRows {
  const int32_t* queries;  // of the range, ascending
  const int32_t* rows;     // of the range's results
  const int32_t* places;   // times place_stride elements from the range's first query on
  int64_t place_stride;

  ListRows from(int64_t i) const { return {queries + i, rows + i, places + i, place_stride}; }
};

template <typename Storage>
struct ForwardTask {
  using T = ComputeOf<Storage>;
  using Operand = OperandOf<Storage>;
  static constexpr int64_t kTileQueries = MobaForwardConfig::kTileQueries;
  static constexpr int64_t kTileKeys = MobaForwardConfig::kTileKeys;
  static constexpr int64_t kHalfQueries = MobaForwardConfig::kHalfQueries;
  static constexpr int kMaxVectors = static_cast<int>(kTileQueries) / kLanes<T>;

  const MobaForwardParams& params;
  int64_t padded_value_dim;

  int32_t* cursors;  // [lists_per_block * num_blocks]
  int32_t* joined;   // [range queries, num_slots]; none without a window
  BlockLists lists;
  int32_t* heads_of_lists[3];  // [range rows] each: a block's ListRows, where a range has several heads
  T* running_out;              // [range rows, padded V], sum of weights x values relative to the running maximum
  T* running_max;              // [range rows], base-2 exponent
  T* running_sum;              // [range rows]
  Operand* query_tile;         // [D, kTileQueries]
  T* scores;                   // [kTileKeys, kTileQueries]
  T* out_tile;                 // [kTileQueries, padded V]
  Operand* key_scratch;        // [kTileKeys, D]
  Operand* value_scratch;      // [kTileKeys, padded V]
  Operand* some_values;        // the same, of pairs
#if TOPGATHER_MATRIX_UNIT
  AmxForwardTile amx;
#endif

  ForwardTask(const MobaForwardParams& p, int64_t num_heads, int64_t range_queries, int64_t num_blocks,
              ScratchCutter& scratch)
      : params(p),
        padded_value_dim(round_up(p.problem.value_dim, kLanes<T>))
#if TOPGATHER_MATRIX_UNIT
        ,
        amx(p.problem, p, kTileKeys, scratch)
#endif
  {
    const int64_t num_lists = lists_per_block(p.problem) * num_blocks, slots = num_slots(p.problem);
    cursors = scratch.take<int32_t>(num_lists);
    joined = scratch.take<int32_t>(p.problem.window > 0 ? range_queries * slots : 0);
    lists.offsets = scratch.take<int32_t>(num_lists + 1);
    lists.queries = scratch.take<int32_t>(range_queries * slots);
    const int64_t range_rows = range_queries * num_heads;
    for (int32_t*& numbers : heads_of_lists) numbers = scratch.take<int32_t>(num_heads > 1 ? range_rows : 0);
    running_out = scratch.take<T>(range_rows * padded_value_dim);
    running_max = scratch.take<T>(range_rows);
    running_sum = scratch.take<T>(range_rows);
    query_tile = scratch.take<Operand>(Operands<Storage>::count(p.problem.head_dim) * kTileQueries);
    scores = scratch.take<T>(kTileKeys * kTileQueries);
    out_tile = scratch.take<T>(kTileQueries * padded_value_dim);
    const int64_t value_elements = Operands<Storage>::count(kTileKeys) * padded_value_dim;
    key_scratch = scratch.take<Operand>(kTileKeys * Operands<Storage>::count(p.problem.head_dim));
    value_scratch = scratch.take<Operand>(value_elements);
    some_values = scratch.take<Operand>(Operands<Storage>::kArePairs ? value_elements : 0);
  }

  // Step 4. `running` receives, per query of the tile, what its running output must be multiplied with.
  void softmax(int64_t num_keys, const int32_t* rows, int64_t count, RunningSoftmax<T, kTileQueries>& running) {
    for (int64_t i = 0; i < round_up(count, kLanes<T>); ++i) {
      const int32_t row = rows[min64(i, count - 1)];
      running.largest[i] = running_max[row];
      running.sum[i] = running_sum[row];
    }
    online_softmax<Operands<Storage>::kArePairs>(scores, count, num_keys, running);
    for (int64_t i = 0; i < count; ++i) {
      running_max[rows[i]] = running.largest[i];
      running_sum[rows[i]] = running.sum[i];
    }
  }

  // Steps 2 to 6 for `count` rows. The num_following rows after them are what the next call will gather.
  // is_edge: they see the tile's keys from their windows' starts on.
  void attend(const QueryRange& range, const Storage* range_query, const ListRows& all, int64_t count,
              int64_t num_following, KeyTile<Storage>& tile, bool is_edge) {
    const MobaProblem& problem = params.problem;
    const int32_t *queries = all.queries, *rows = all.rows;
    IntegerVector<T> limits[kMaxVectors], starts[kMaxVectors];
    // What no query sees is left out. The first one's window begins first.
    const int64_t skipped = is_edge ? keys_before_window(problem, range, queries[0], tile.first_key, tile.num_keys) : 0;
    const int64_t first_key = tile.first_key + skipped;
    const TileVisibility visibility =
        visible_keys<T>(problem, range, queries, count, first_key, tile.num_keys - skipped, limits);
    if (visibility.max_keys == 0) return;
    const int64_t last_start =
        is_edge ? window_starts<T>(problem, range, queries, count, first_key, visibility.max_keys, starts) : 0;
    const bool hides_keys = visibility.min_keys < visibility.max_keys || last_start > 0;
    // On the unit a query's keys begin with the tile's.
    const bool is_on_unit = uses_matrix_unit<Storage>(params.scale) && !is_edge;
    // The matrix unit multiplies whole steps of 32 keys.
    const int64_t num_multiplied =
        is_on_unit ? min64(tile.num_keys, round_up(visibility.max_keys, 32)) : visibility.max_keys;
    const int64_t first_hidden = last_start > 0 ? 0 : visibility.min_keys;
    const bool hides_only_finite =
        all_finite(tile.value_rows + (skipped + first_hidden) * params.value.strides[2], params.value.strides[2],
                   num_multiplied - first_hidden, problem.value_dim);
    RunningSoftmax<T, kTileQueries> running;
#if TOPGATHER_MATRIX_UNIT
    if constexpr (kHasMatrixUnit<Storage>) {
      if (is_on_unit && hides_only_finite) {
        prefetch_rows(running_out, padded_value_dim, rows, count, padded_value_dim);
        prefetch_rows(range_query, all.place_stride, all.places + count, num_following, problem.head_dim);
        const auto limit_of = [&](int64_t i) {
          return hides_keys ? static_cast<int64_t>(limits[i / kLanes<T>][i % kLanes<T>]) : visibility.max_keys;
        };
        amx.attend(range_query, all.place_stride, all.places, rows, count, visibility.max_keys, limit_of, running_max,
                   running_sum, running.rescale);
        add_to_running(rows, count, running.rescale, amx.out_tile, amx.padded_value_dim);
        return;
      }
    }
#endif
    if (hides_keys && !hides_only_finite) {
      // A hidden key weighs 0, but 0 x inf is NaN: one query at a time there is nothing hidden to multiply with.
      for (int64_t i = 0; i < count; ++i) attend(range, range_query, all.from(i), 1, 0, tile, is_edge);
      return;
    }
    if (tile.keys.data == nullptr) prepare(tile);
    const RowBlock<Operand> keys{tile.keys.data + skipped * tile.keys.row_stride, tile.keys.row_stride};
    const RowBlock<Operand> values =
        Operands<Storage>::rows_of_b(tile.values, tile.num_keys, tile.value_rows, params.value.strides[2], skipped,
                                     visibility.max_keys, problem.value_dim, some_values);
    const int64_t key_steps = ceil_div(visibility.max_keys, rows_at_once<T>(round_up(count, kLanes<T>)));
    RowPrefetch<T> sums(running_out, padded_value_dim, rows, count, padded_value_dim, key_steps);
    RowPrefetch<const Storage> following(range_query, all.place_stride, all.places + count, num_following,
                                         problem.head_dim, ceil_div(count, rows_at_once<T>(padded_value_dim)));
    make_scores<kTileQueries>(params, range_query, all.place_stride, all.places, count, keys, visibility.max_keys,
                              query_tile, scores, [&] { sums.advance(); });
    if (hides_keys) {
      constexpr T kLowest = -std::numeric_limits<T>::infinity();
      const int64_t num_vectors = ceil_div(count, kLanes<T>);
      hide_later_keys(scores, kTileQueries, num_vectors, visibility.min_keys, visibility.max_keys, limits, kLowest);
      hide_earlier_keys(scores, kTileQueries, num_vectors, last_start, starts, kLowest);
    }
    softmax(visibility.max_keys, rows, count, running);
    tile_gemm_prefetching<false>(GemmOperands<T, Operand>{reinterpret_cast<const Operand*>(scores), 1, kTileQueries,
                                                          values.data, values.row_stride, out_tile, padded_value_dim,
                                                          Operands<Storage>::count(visibility.max_keys)},
                                 count, padded_value_dim, [&] {
                                   following.advance();
                                   tile.next_keys.advance();
                                   tile.next_values.advance();
                                 });
    add_to_running(rows, count, running.rescale, out_tile, padded_value_dim);
  }

  // Step 6.
  void add_to_running(const int32_t* rows, int64_t count, const T* rescale, const T* added, int64_t added_row) {
    for (int64_t i = 0; i < count; ++i) {
      T* running = running_out + rows[i] * padded_value_dim;
      const T* row = added + i * added_row;
      for (int64_t d = 0; d < padded_value_dim; d += kLanes<T>) {
        store<T>(running + d, load<T>(running + d) * rescale[i] + load<T>(row + d));
      }
    }
  }

  void prepare(KeyTile<Storage>& tile) {
    const MobaProblem& problem = params.problem;
    tile.keys = Operands<Storage>::rows_as_a(tile.key_rows, params.key.strides[2], tile.num_keys, problem.head_dim,
                                             key_scratch);
    tile.values = Operands<Storage>::rows_as_b(tile.value_rows, params.value.strides[2], tile.num_keys,
                                               problem.value_dim, padded_value_dim, value_scratch);
  }

  // Step 7.
  void finish(const QueryRange& range) {
    const Sequence& sequence = range.sequence;
    for (int64_t i = 0; i < range.num_queries * range.num_heads; ++i) {
      const int64_t query = i / range.num_heads, head = range.head_idx + i % range.num_heads;
      const int64_t row = sequence.query_start + range.first_query + query;
      const RowEnd<T> end = end_of_row(
          running_max[i], running_sum[i], params.sinks, head, [&] { return lse_of_unusual_row(range, head, query); },
          [&] { return sees_a_key(range, query); });
      store_row(running_out + i * padded_value_dim, params.problem.value_dim, end.factor,
                params.out.at<Storage>(sequence.batch_idx, head, row));
      *params.lse.at<T>(sequence.batch_idx, head, row) = end.lse;
      write_softmax_terms(running_max[i], running_sum[i], params.softmax_terms.at<T>(sequence.batch_idx, head, row));
    }
  }

  // Calls visit(first_key, end) for the keys that the query sees, block by block.
  template <typename Visit>
  void for_each_block_of(const QueryRange& range, int64_t query, const Visit& visit) const {
    const MobaProblem& problem = params.problem;
    const Sequence& sequence = range.sequence;
    const int64_t row = sequence.query_start + range.first_query + query;
    const int32_t* choices = problem.window > 0 ? joined + query * num_slots(problem)
                                                : choices_of_query(params, sequence.batch_idx, range.head_idx, row);
    const int64_t position = range.first_query + query + sequence.position_offset;
    const int64_t end = problem.is_causal ? min64(position + 1, sequence.key_len) : sequence.key_len;
    const int64_t lists = lists_per_block(problem);
    for (int64_t slot = 0; slot < num_slots(problem); ++slot) {
      if (choices[slot] < 0) continue;
      const int64_t first_key = choices[slot] / lists * problem.block_size;
      const int64_t seen_from = choices[slot] % lists == 0 ? first_key : position + 1 - problem.window;
      if (first_key < end) visit(seen_from, min64(first_key + problem.block_size, end));
    }
  }

  bool sees_a_key(const QueryRange& range, int64_t query) const {
    bool sees = false;
    for_each_block_of(range, query, [&](int64_t, int64_t) { sees = true; });
    return sees;
  }

  // The log-sum-exp of scores that are infinite or NaN: the largest of them, NaN if any is. The running maximum does
  // not tell an infinite score from a NaN one, so the row's scores are computed once more.
  T lse_of_unusual_row(const QueryRange& range, int64_t head, int64_t query) const {
    const MobaProblem& problem = params.problem;
    const Sequence& sequence = range.sequence;
    const int64_t row = sequence.query_start + range.first_query + query;
    const int64_t kv_head = range.head_idx / (problem.num_query_heads / problem.num_kv_heads);
    const Storage* query_row = params.query.at<Storage>(sequence.batch_idx, head, row);
    T largest = -std::numeric_limits<T>::infinity();
    for_each_block_of(range, query, [&](int64_t first_key, int64_t end) {
      for (int64_t key = first_key; key < end; ++key) {
        const Storage* key_row = params.key.at<Storage>(sequence.batch_idx, kv_head, sequence.key_start + key);
        T score = 0;
        for (int64_t d = 0; d < problem.head_dim; ++d) score += to_compute(query_row[d]) * to_compute(key_row[d]);
        score *= static_cast<T>(params.scale);
        if (params.softcap > 0)
          score = static_cast<T>(params.softcap) * std::tanh(score / static_cast<T>(params.softcap));
        if (score > largest || std::isnan(score)) largest = score;
        if (std::isnan(largest)) return;
      }
    });
    return largest;
  }

  // The rows of a block's lists [begin, end): the range's heads of a query one after the other.
  ListRows rows_of_lists(const QueryRange& range, int64_t begin, int64_t end) const {
    const int32_t* queries = lists.queries + begin;
    if (range.num_heads == 1) return {queries, queries, queries, params.query.strides[2]};
    int64_t at = 0;
    for (int64_t i = 0; i < end - begin; ++i) {
      for (int64_t head = 0; head < range.num_heads; ++head, ++at) {
        heads_of_lists[0][at] = queries[i];
        heads_of_lists[1][at] = static_cast<int32_t>(queries[i] * range.num_heads + head);
        heads_of_lists[2][at] =
            static_cast<int32_t>(queries[i] * params.query.strides[2] + head * params.query.strides[1]);
      }
    }
    return {heads_of_lists[0], heads_of_lists[1], heads_of_lists[2], 1};
  }

  RoutingFault run(const QueryRange& range) {
    [[maybe_unused]] const std::conditional_t<kHasMatrixUnit<Storage>, AmxGuard, int> guard{};
    const MobaProblem& problem = params.problem;
    const Sequence& sequence = range.sequence;
    const int64_t first_row = sequence.query_start + range.first_query;
    const int64_t kv_head = range.head_idx / (problem.num_query_heads / problem.num_kv_heads);
    const int32_t* choices = choices_of_query(params, sequence.batch_idx, range.head_idx, first_row);
    const RoutingFault fault =
        build_range_lists(problem, range, choices, params.block_indices.strides[2], joined, cursors, lists);
    if (fault.kind != RoutingFault::kNone) return fault;
    const int64_t num_rows = range.num_queries * range.num_heads;
    for (int64_t i = 0; i < num_rows * padded_value_dim; ++i) running_out[i] = 0;
    for (int64_t i = 0; i < num_rows; ++i) {
      running_max[i] = -std::numeric_limits<T>::infinity();
      running_sum[i] = 0;
    }
    const Storage* range_query = params.query.at<Storage>(sequence.batch_idx, range.head_idx, first_row);
    const int64_t lists_of_block = lists_per_block(problem);
    for (int64_t block = 0; block < sequence.num_blocks; ++block) {
      const int32_t* offsets = lists.offsets + block * lists_of_block;
      if (offsets[0] == offsets[lists_of_block]) continue;
      const int64_t block_end = min64((block + 1) * problem.block_size, sequence.key_len);
      const ListRows rows = rows_of_lists(range, offsets[0], offsets[lists_of_block]);
      // Rows that stand in a row: of one head the next block's lists follow.
      const int64_t num_known = range.num_heads == 1 ? lists.offsets[sequence.num_blocks * lists_of_block] - offsets[0]
                                                     : (offsets[lists_of_block] - offsets[0]) * range.num_heads;
      const int64_t num_rows_of_block = (offsets[lists_of_block] - offsets[0]) * range.num_heads;
      const int64_t last_position_in = block_end - range.first_query - sequence.position_offset;
      for (int64_t first_key = block * problem.block_size; first_key < block_end; first_key += kTileKeys) {
        const int64_t num_keys = min64(kTileKeys, block_end - first_key);
        const int64_t key_row = sequence.key_start + first_key;
        // What comes next is prefetched in the steps of all the block's products with values.
        const int64_t num_next = min64(min64(kTileKeys, problem.block_size), sequence.key_len - first_key - num_keys);
        const int64_t num_steps = ceil_div(num_rows_of_block, rows_at_once<T>(padded_value_dim));
        const auto prefetch_after = [&](const Storage* rows, int64_t row_stride, int64_t depth) {
          return RowPrefetch<const Storage>(rows + num_keys * row_stride, row_stride, nullptr, num_next, depth,
                                            num_steps);
        };
        const Storage* key_rows = params.key.at<Storage>(sequence.batch_idx, kv_head, key_row);
        const Storage* value_rows = params.value.at<Storage>(sequence.batch_idx, kv_head, key_row);
        KeyTile<Storage> tile{first_key,
                              num_keys,
                              key_rows,
                              value_rows,
                              {nullptr, 0},
                              {nullptr, 0},
                              prefetch_after(key_rows, params.key.strides[2], problem.head_dim),
                              prefetch_after(value_rows, params.value.strides[2], problem.value_dim)};
#if TOPGATHER_MATRIX_UNIT
        if constexpr (kHasMatrixUnit<Storage>) {
          amx.pack(tile.key_rows, params.key.strides[2], tile.value_rows, params.value.strides[2], num_keys);
        }
#endif
        for (int64_t list = 0; list < lists_of_block; ++list) {
          const bool is_edge = list > 0;
          const int64_t end = (offsets[list + 1] - offsets[0]) * range.num_heads;
          for (int64_t i = (offsets[list] - offsets[0]) * range.num_heads; i < end;) {
            const bool half = uses_matrix_unit<Storage>(params.scale) || is_edge ||
                              (problem.is_causal && rows.queries[i] < last_position_in);
            const int64_t count = min64(half ? kHalfQueries : kTileQueries, end - i);
            const int64_t num_following = min64(kTileQueries, num_known - i - count);
            attend(range, range_query, rows.from(i), count, num_following, tile, is_edge);
            i += count;
          }
        }
      }
    }
    finish(range);
    return {};
  }
};

struct RangeExtent {
  int64_t max_queries = 0;  // in one range
  int64_t max_blocks = 0;   // in one sequence
  int64_t max_ranges = 0;   // in one head of a sequence
  int64_t num_ranges = 0;   // over all sequences and heads
  Sequence longest{};       // no sequence's own: the maximum of queries and the maximum of keys over all sequences
};

// Of ranges of so many heads.
inline RangeExtent range_extent(const MobaProblem& problem, int64_t num_heads = 1) {
  RangeExtent extent;
  for (int64_t s = 0; s < problem.batch_size; ++s) {
    const Sequence sequence = sequence_at(problem, s);
    extent.max_queries = max64(extent.max_queries, queries_per_range(problem, sequence, num_heads));
    extent.max_blocks = max64(extent.max_blocks, sequence.num_blocks);
    extent.max_ranges = max64(extent.max_ranges, ranges_in(problem, sequence, num_heads));
    extent.num_ranges += ranges_in(problem, sequence, num_heads) * (problem.num_query_heads / num_heads);
    extent.longest.query_len = max64(extent.longest.query_len, sequence.query_len);
    extent.longest.key_len = max64(extent.longest.key_len, sequence.key_len);
  }
  return extent;
}

// Calls run_part(range, sequence_idx, range_idx, worker, part) for num_parts parts of every range of the problem; the
// first fault any of them reports is thrown once all are done.
template <typename RunPart>
void for_each_part(const MobaProblem& problem, int64_t heads_of_range, int64_t num_parts, int num_workers,
                   const RunPart& run_part) {
  const int64_t max_ranges = range_extent(problem, heads_of_range).max_ranges;
  const int64_t num_heads = problem.num_query_heads / heads_of_range;
  RoutingFault first_fault{};
  int32_t has_fault = 0;
  const int64_t num_tasks = problem.batch_size * num_heads * max_ranges * num_parts;
  for_each_task(num_workers, num_tasks, [&](int64_t task_idx, int worker) {
    const int64_t part = task_idx % num_parts, task = task_idx / num_parts;
    const int64_t range_idx = task % max_ranges;
    const int64_t head = task / max_ranges % num_heads * heads_of_range;
    const int64_t sequence_idx = task / max_ranges / num_heads;
    const Sequence sequence = sequence_at(problem, sequence_idx);
    const int64_t size = queries_per_range(problem, sequence, heads_of_range);
    const int64_t first_query = range_idx * size;
    if (first_query >= sequence.query_len) return;
    const QueryRange range{sequence, head, first_query, min64(size, sequence.query_len - first_query), heads_of_range};
    const RoutingFault fault = run_part(range, sequence_idx, range_idx, worker, part);
    if (fault.kind != RoutingFault::kNone && __atomic_exchange_n(&has_fault, 1, __ATOMIC_RELAXED) == 0) {
      first_fault = fault;
    }
  });
  if (has_fault != 0) {
    throw_routing_fault(first_fault.kind == RoutingFault::kDuplicate, first_fault.head_idx, first_fault.query,
                        first_fault.block);
  }
}

template <typename RunRange>
void for_each_range(const MobaProblem& problem, int64_t heads_of_range, int num_workers, const RunRange& run_range) {
  for_each_part(problem, heads_of_range, 1, num_workers,
                [&](const QueryRange& range, int64_t sequence_idx, int64_t range_idx, int worker, int64_t) {
                  return run_range(range, sequence_idx, range_idx, worker);
                });
}

// Multiply-adds of one product of chosen queries with keys: what the number of threads is judged by.
inline double pair_operations(const MobaProblem& problem, const RangeExtent& extent) {
  const double keys_per_query =
      static_cast<double>(min64(num_slots(problem), extent.max_blocks)) * static_cast<double>(problem.block_size);
  const double num_rows = static_cast<double>(problem.num_query_heads) * static_cast<double>(problem.query_len) *
                          (problem.cu_seqlens_q.data == nullptr ? static_cast<double>(problem.batch_size) : 1.0);
  return num_rows * keys_per_query * static_cast<double>(problem.head_dim + problem.value_dim);
}

// The query heads of a key head where they share a choice, as far as 31 bits tell where a range's queries lie; else one.
inline int64_t heads_of_range(const MobaForwardParams& params) {
  const MobaProblem& problem = params.problem;
  const int64_t group = problem.num_query_heads / problem.num_kv_heads;
  if (problem.heads_per_choice % group != 0) return 1;
  const int64_t num_queries = range_extent(problem, group).max_queries;
  const int64_t farthest = num_queries * params.query.strides[2] + group * params.query.strides[1];
  return farthest < std::numeric_limits<int32_t>::max() ? group : 1;
}

template <typename Storage>
void forward_storage(const MobaForwardParams& params) {
  const MobaProblem& problem = params.problem;
  const int64_t num_heads = heads_of_range(params);
  const RangeExtent extent = range_extent(problem, num_heads);
  if (extent.num_ranges == 0) return;
  const int num_workers = useful_threads(problem.num_threads, extent.num_ranges, pair_operations(problem, extent));
  const WorkerScratch scratch(num_workers, [&](ScratchCutter& cutter) {
    ForwardTask<Storage>(params, num_heads, extent.max_queries, extent.max_blocks, cutter);
  });
  for_each_range(problem, num_heads, num_workers, [&](const QueryRange& range, int64_t, int64_t, int worker) {
    ScratchCutter cutter = scratch.of(worker);
    return ForwardTask<Storage>(params, num_heads, extent.max_queries, extent.max_blocks, cutter).run(range);
  });
}

}  // namespace topgather::TOPGATHER_CPU_TARGET
