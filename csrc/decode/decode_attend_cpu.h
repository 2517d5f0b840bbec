// Attention of new tokens over a cache, on the CPU: few queries, each with blocks of its own, keys read in place.
//
//   out_i = sum_t softmax_t(scale * dot(query_i, key_t)) value_t,   t over the keys of the chosen blocks up to i's own
//   lse_i = log sum_t exp(scale * dot(query_i, key_t))
//
// Who owns what: a task is one (sequence, key head, rows, part of the slots). A row is a token and one of the query
// heads that share the key head: up to kRowsPerTask of them, so that a key that several chose is read (and converted)
// once. Where there are few tasks the slots are split, and partial results merged in the order of slots.
// Steps of a task:
//   1. queries, scaled and padded to whole vectors;
//   2. key-major lists of the rows' choices, joined with the window where there is one, by counting;
//   per block in ascending order, per kTileKeys of its keys, per row that chose it:
//   3. scores, keys in vector lanes: a vector of partial sums per key, transposed in registers;
//   4. running maximum and sum (online softmax, base 2), weights in place of the scores;
//   5. the row's running output, rescaled, plus weights x values.
//   last:
//   6. merge parts, divide, convert, write out and lse.
// Numerics: scores, weights and sums in float32 (float64 for float64). A row without visible keys: out 0, lse -inf. A
// row all of whose scores are -inf: NaN, as plain softmax. A hidden key is never multiplied with.
// Determinism: a row's arithmetic depends on its own choices and on shapes alone.
#pragma once

#include <limits>

#include "../common/parallel.h"
#include "../cpu/attention_tile.h"
#include "../cpu/convert.h"
#include "../cpu/math.h"
#include "../cpu/scratch.h"
#include "../cpu/tile_gemm.h"
#include "../moba/moba_cpu.h"
#include "../moba/moba_window_cpu.h"
#include "decode_pages_cpu.h"

namespace topgather::TOPGATHER_CPU_TARGET {

// Step 3: scores[i] = dot(query, row i) for i < count; up to the next whole vector they repeat the last. `depth` is a
// whole number of vectors.
template <typename T>
inline void dot_rows(const T* query, const RowBlock<T>& rows, int64_t count, int64_t depth, T* scores) {
  constexpr int kWidth = kLanes<T>;
  for (int64_t first = 0; first < count; first += kWidth) {
    const T* row[kWidth];
    for (int i = 0; i < kWidth; ++i) row[i] = rows.data + min64(first + i, count - 1) * rows.row_stride;
    Vector<T> sums[kWidth] = {};
    for (int64_t d = 0; d < depth; d += kWidth) {
      const Vector<T> query_vector = load<T>(query + d);
#pragma GCC unroll 16
      for (int i = 0; i < kWidth; ++i) sums[i] += query_vector * load<T>(row[i] + d);
    }
    transpose_in_registers<T>(sums);
#pragma GCC unroll 16
    for (int step = 1; step < kWidth; step *= 2) {
#pragma GCC unroll 16
      for (int i = 0; i < kWidth; i += 2 * step) sums[i] += sums[i + step];
    }
    store<T>(scores + first, sums[0]);
  }
}

// Step 5: out += sum_i weights[i] * row i, `depth` a whole number of vectors. Two sums, of even and of odd rows, hide
// the latency of an addition.
template <typename T, int kVectors>
inline void add_weighted_panel(const T* weights, const RowBlock<T>& rows, int64_t count, int64_t column, T* out) {
  Vector<T> even[kVectors];
  Vector<T> odd[kVectors] = {};
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) even[v] = load<T>(out + column + v * kLanes<T>);
  const T* row = rows.data + column;
  int64_t i = 0;
  for (; i + 2 <= count; i += 2, row += 2 * rows.row_stride) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      even[v] += weights[i] * load<T>(row + v * kLanes<T>);
      odd[v] += weights[i + 1] * load<T>(row + rows.row_stride + v * kLanes<T>);
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
    if (i < count) even[v] += weights[i] * load<T>(row + v * kLanes<T>);
    store<T>(out + column + v * kLanes<T>, even[v] + odd[v]);
  }
}

template <typename T>
inline void add_weighted_rows(const T* weights, const RowBlock<T>& rows, int64_t count, int64_t depth, T* out) {
  int64_t column = 0;
  for (; column + 4 * kLanes<T> <= depth; column += 4 * kLanes<T>) {
    add_weighted_panel<T, 4>(weights, rows, count, column, out);
  }
  for (; column < depth; column += kLanes<T>) add_weighted_panel<T, 1>(weights, rows, count, column, out);
}

// What a row has seen so far; its running output is relative to the maximum.
template <typename T>
struct RunningRow {
  T maximum;  // base-2 exponent
  T sum;
  bool sees_a_key;
  bool sees_nan;  // a score is NaN, which the maximum does not tell
};

// The rows of a task, and where they and their partial results lie.
template <typename Storage>
struct DecodeRows {
  using T = ComputeOf<Storage>;

  const DecodeParams& params;
  int64_t group;             // query heads of a key head
  int64_t padded_head_dim;   // whole vectors
  int64_t padded_value_dim;  // whole vectors
  int64_t rows_per_task;
  int64_t tiles_per_head;
  int64_t num_splits;

  int64_t num_tasks() const {
    return params.problem.batch_size * params.problem.num_kv_heads * tiles_per_head * num_splits;
  }
};

template <typename Storage>
struct AttendTask {
  using T = ComputeOf<Storage>;
  static constexpr int64_t kTileKeys = DecodeConfig::kTileKeys;

  const DecodeRows<Storage>& rows;
  const DecodeProblem& problem;
  int64_t num_slots;        // top_k and those of the window
  int64_t lists_per_block;  // 2 with a window: its edges have lists of their own
  int32_t* cursors;         // [lists_per_block * num_blocks]
  int32_t* joined;          // [rows, num_slots]; none without a window
  BlockLists lists;         // rows in place of queries
  T* queries;               // [rows, padded D]
  T* scores;                // [kTileKeys]
  T* key_scratch;           // [kTileKeys, padded D]
  T* value_scratch;         // [kTileKeys, padded V]

  AttendTask(const DecodeRows<Storage>& all, int64_t num_blocks, ScratchCutter& scratch)
      : rows(all),
        problem(all.params.problem),
        num_slots(problem.top_k + window_slots(problem.window, problem.block_size)),
        lists_per_block(problem.window > 0 ? 2 : 1) {
    cursors = scratch.take<int32_t>(lists_per_block * num_blocks);
    joined = scratch.take<int32_t>(problem.window > 0 ? rows.rows_per_task * num_slots : 0);
    lists.offsets = scratch.take<int32_t>(lists_per_block * num_blocks + 1);
    lists.queries = scratch.take<int32_t>(rows.rows_per_task * num_slots);
    queries = scratch.take<T>(rows.rows_per_task * rows.padded_head_dim);
    scores = scratch.take<T>(kTileKeys);
    key_scratch = scratch.take<T>(kTileKeys * rows.padded_head_dim);
    value_scratch = scratch.take<T>(kTileKeys * rows.padded_value_dim);
  }

  // Which rows a task has: num_rows of them from first_row on, token-major.
  int64_t sequence = 0;
  int64_t kv_head = 0;
  int64_t first_row = 0;
  int64_t num_rows = 0;
  int64_t first_position = 0;
  int64_t length = 0;

  void place_rows(int64_t task_idx) {
    const int64_t tile_idx = task_idx / rows.num_splits;
    kv_head = tile_idx / rows.tiles_per_head % problem.num_kv_heads;
    sequence = tile_idx / rows.tiles_per_head / problem.num_kv_heads;
    first_row = tile_idx % rows.tiles_per_head * rows.rows_per_task;
    num_rows = min64(rows.rows_per_task, problem.query_len * rows.group - first_row);
    first_position = first_position_of(problem, sequence);
    length = problem.seq_lens.data[sequence];
  }

  int64_t token_of(int64_t row) const { return (first_row + row) / rows.group; }
  int64_t head_of(int64_t row) const { return kv_head * rows.group + (first_row + row) % rows.group; }
  int64_t position_of(int64_t row) const { return first_position + token_of(row); }

  // Step 2, for slots first_slot to last_slot of every row. The lists hold what a row sees a key of.
  RoutingFault build_lists(int64_t first_slot, int64_t last_slot) {
    const int64_t num_blocks = ceil_div(length, problem.block_size);
    const int64_t num_listed = min64(num_rows, max64(new_tokens_of(problem, sequence) * rows.group - first_row, 0));
    const auto fault = [&](RoutingFault::Kind kind, int64_t row, int64_t block) {
      return RoutingFault{kind, head_of(row), token_of(row), block};
    };
    const auto choices_of = [&](int64_t row) {
      return choices_of_query(rows.params, sequence, head_of(row), token_of(row));
    };
    if (problem.window == 0) {
      return build_block_lists(
          num_listed, num_blocks, first_slot, last_slot, choices_of,
          [&](int64_t row) { return block_of(position_of(row), problem.block_size); }, fault, cursors, lists);
    }
    for (int64_t row = 0; row < num_listed; ++row) {
      const RoutingFault found = join_window(
          choices_of(row), problem.top_k, num_blocks, problem.block_size, problem.window, position_of(row),
          [&](RoutingFault::Kind kind, int64_t block) { return fault(kind, row, block); }, joined + row * num_slots);
      if (found.kind != RoutingFault::kNone) return found;
    }
    const int64_t num_lists = lists_per_block * num_blocks;
    return build_block_lists(
        num_listed, num_lists, first_slot, last_slot, [&](int64_t row) { return joined + row * num_slots; },
        [&](int64_t) { return num_lists; }, fault, cursors, lists);
  }

  // Steps 3 to 5 for the first num_keys of some keys.
  void attend(int64_t row, const RowBlock<T>& keys, const RowBlock<T>& values, int64_t num_keys, RunningRow<T>& running,
              T* running_out) {
    constexpr T kLowest = -std::numeric_limits<T>::infinity();
    dot_rows(queries + row * rows.padded_head_dim, keys, num_keys, rows.padded_head_dim, scores);
    // What follows the last score repeats it: it must weigh nothing.
    const int64_t padded = round_up(num_keys, kLanes<T>);
    if (rows.params.softcap > 0) {
      cap_scores(scores, 0, padded / kLanes<T>, 1, static_cast<T>(rows.params.softcap * kLog2E));
    }
    for (int64_t i = num_keys; i < padded; ++i) scores[i] = kLowest;
    Vector<T> top = broadcast(kLowest);
    IntegerVector<T> is_nan{};
    for (int64_t i = 0; i < padded; i += kLanes<T>) {
      const Vector<T> score = load<T>(scores + i);
      top = maximum(top, score);
      is_nan |= score != score;
    }
    const T old = running.maximum;
    const T largest = largest_lane<T>(top);
    running.maximum = largest > old ? largest : old;
    running.sees_a_key = true;
    running.sees_nan = running.sees_nan || any_lane(is_nan);
    const T base = finite_base(running.maximum);
    const Vector<T> bases[1] = {broadcast(base)};
    Vector<T> sum[1] = {};
    weigh_columns(scores, kLanes<T>, padded / kLanes<T>, bases, sum);
    const T rescale = exp2_vector(broadcast(old - base))[0];
    running.sum = running.sum * rescale + sum_of_lanes<T>(sum[0]);
    for (int64_t d = 0; d < rows.padded_value_dim; d += kLanes<T>) {
      store<T>(running_out + d, load<T>(running_out + d) * rescale);
    }
    add_weighted_rows(scores, values, num_keys, rows.padded_value_dim, running_out);
  }

  // The rows' results so far into `running` [rows_per_task] and `running_out` [rows_per_task, padded V].
  RoutingFault run(int64_t task_idx, RunningRow<T>* running, T* running_out) {
    const DecodeParams& params = rows.params;
    const int64_t split = task_idx % rows.num_splits;
    place_rows(task_idx);
    // Step 1.
    for (int64_t row = 0; row < num_rows; ++row) {
      const Storage* query = params.query.at<Storage>(sequence, head_of(row), token_of(row));
      T* target = queries + row * rows.padded_head_dim;
      load_row(query, problem.head_dim, target);
      for (int64_t d = 0; d < problem.head_dim; ++d) target[d] *= static_cast<T>(problem.scale * kLog2E);
      for (int64_t d = problem.head_dim; d < rows.padded_head_dim; ++d) target[d] = 0;
      running[row] = {-std::numeric_limits<T>::infinity(), 0, false, false};
      for (int64_t d = 0; d < rows.padded_value_dim; ++d) running_out[row * rows.padded_value_dim + d] = 0;
    }
    // Step 2. Blocks named twice may lie in different parts: the first looks at all of them.
    if (split == 0 && rows.num_splits > 1) {
      const RoutingFault fault = build_lists(0, num_slots);
      if (fault.kind != RoutingFault::kNone) return fault;
    }
    const int64_t slots_per_split = ceil_div(num_slots, rows.num_splits);
    const RoutingFault fault =
        build_lists(min64(split * slots_per_split, num_slots), min64((split + 1) * slots_per_split, num_slots));
    if (fault.kind != RoutingFault::kNone) return fault;

    const int64_t num_blocks = ceil_div(length, problem.block_size);
    for (int64_t block = 0; block < num_blocks; ++block) {
      const int32_t* offsets = lists.offsets + block * lists_per_block;
      const int64_t first_key = block * problem.block_size;
      // Rows of a list ascend by token: the last row's visible range bounds the others'.
      int64_t max_keys = 0;
      for (int64_t list = 0; list < lists_per_block; ++list) {
        if (offsets[list] == offsets[list + 1]) continue;
        const int64_t last = position_of(lists.queries[offsets[list + 1] - 1]);
        max_keys = max64(max_keys, min64(problem.block_size, last + 1 - first_key));
      }
      if (max_keys == 0) continue;
      const Place place = place_of(problem, sequence, first_key);
      const Storage* key_rows = page_row<Storage>(params.key_pages, kv_head, place);
      const Storage* value_rows = page_row<Storage>(params.value_pages, kv_head, place);
      for (int64_t first = 0; first < max_keys; first += kTileKeys) {
        const int64_t count = min64(kTileKeys, max_keys - first);
        const RowBlock<T> keys = dense_rows(key_rows + first * params.key_pages.strides[2], params.key_pages.strides[2],
                                            count, problem.head_dim, rows.padded_head_dim, key_scratch);
        const RowBlock<T> values =
            dense_rows(value_rows + first * params.value_pages.strides[2], params.value_pages.strides[2], count,
                       problem.value_dim, rows.padded_value_dim, value_scratch);
        for (int64_t list = 0; list < lists_per_block; ++list) {
          for (int64_t i = offsets[list]; i < offsets[list + 1]; ++i) {
            const int64_t row = lists.queries[i], end = position_of(row) + 1 - first_key - first;
            const int64_t start = list > 0 ? max64(0, end - problem.window) : 0;
            const int64_t num_keys = min64(count, end) - start;
            if (num_keys <= 0) continue;
            attend(row, {keys.data + start * keys.row_stride, keys.row_stride},
                   {values.data + start * values.row_stride, values.row_stride}, num_keys, running[row],
                   running_out + row * rows.padded_value_dim);
          }
        }
      }
    }
    return {};
  }

  // Step 6, for the rows that are placed; their parts lie one after the other.
  void finish(const RunningRow<T>* running, T* running_out) {
    const DecodeParams& params = rows.params;
    const int64_t out_size = rows.rows_per_task * rows.padded_value_dim;
    for (int64_t row = 0; row < num_rows; ++row) {
      RunningRow<T> total = running[row];
      T* out = running_out + row * rows.padded_value_dim;
      for (int64_t split = 1; split < rows.num_splits; ++split) {
        merge(running[split * rows.rows_per_task + row], out + split * out_size, total, out);
      }
      const RowEnd<T> end = end_of_row(
          total.maximum, total.sum, params.sinks, head_of(row),
          [&] { return total.sees_nan ? std::numeric_limits<T>::quiet_NaN() : total.maximum; },
          [&] { return total.sees_a_key; });
      store_row(out, problem.value_dim, end.factor, params.out.at<Storage>(sequence, head_of(row), token_of(row)));
      *params.lse.at<T>(sequence, head_of(row), token_of(row)) = end.lse;
    }
  }

  void merge(const RunningRow<T>& part, const T* part_out, RunningRow<T>& total, T* out) const {
    if (!part.sees_a_key) return;
    const T largest = part.maximum > total.maximum ? part.maximum : total.maximum;
    const T base = finite_base(largest);
    const T rescale = exp2_vector(broadcast(total.maximum - base))[0];
    const T part_rescale = exp2_vector(broadcast(part.maximum - base))[0];
    total = {largest, total.sum * rescale + part.sum * part_rescale, true, total.sees_nan || part.sees_nan};
    for (int64_t d = 0; d < rows.padded_value_dim; ++d) out[d] = out[d] * rescale + part_out[d] * part_rescale;
  }
};

// Parts that a row's slots are split into, from shapes alone.
inline int64_t splits_of(const DecodeProblem& problem, int64_t tasks_without) {
  const int64_t num_slots = problem.top_k + window_slots(problem.window, problem.block_size);
  const int64_t keys = min64(num_slots * problem.block_size, problem.pages_per_sequence * problem.page_size);
  const int64_t by_keys = keys / DecodeConfig::kMinKeysPerSplit;
  const int64_t wanted = ceil_div(DecodeConfig::kMinTasks, max64(tasks_without, 1));
  return max64(1, min64(min64(by_keys, wanted), num_slots));
}

// Returns the first fault of any task, in the order of tasks.
template <typename Storage>
RoutingFault decode_storage(const DecodeParams& params) {
  using T = ComputeOf<Storage>;
  const DecodeProblem& problem = params.problem;
  const int64_t group = problem.num_query_heads / problem.num_kv_heads;
  DecodeRows<Storage> rows{params,
                           group,
                           round_up(problem.head_dim, kLanes<T>),
                           round_up(problem.value_dim, kLanes<T>),
                           min64(max64(DecodeConfig::kRowsPerTask / group, 1), max64(problem.query_len, 1)) * group,
                           0,
                           1};
  rows.tiles_per_head = ceil_div(problem.query_len * group, rows.rows_per_task);
  rows.num_splits = splits_of(problem, rows.num_tasks());

  const int64_t longest = longest_of(problem);
  const int64_t num_blocks = ceil_div(longest, problem.block_size);
  const int64_t keys_per_row = min64(problem.top_k * problem.block_size + problem.window, longest);
  const double num_operations = static_cast<double>(problem.batch_size * problem.num_query_heads * problem.query_len) *
                                static_cast<double>(keys_per_row * (problem.head_dim + problem.value_dim));
  const int num_workers = useful_threads(problem.num_threads, rows.num_tasks(), num_operations);
  const WorkerScratch scratch(num_workers,
                              [&](ScratchCutter& cutter) { AttendTask<Storage>(rows, num_blocks, cutter); });

  // Partial results of a task's parts lie side by side; with one part, a worker's are used again and again.
  const int64_t num_partial = rows.num_splits > 1 ? rows.num_tasks() : num_workers;
  ScratchCutter partial_size(nullptr);
  partial_size.take<RunningRow<T>>(num_partial * rows.rows_per_task);
  partial_size.take<T>(num_partial * rows.rows_per_task * rows.padded_value_dim);
  partial_size.take<RoutingFault>(rows.num_tasks());
  const AlignedBuffer partial_buffer = allocate_aligned(static_cast<size_t>(partial_size.used()));
  ScratchCutter partial(partial_buffer.get());

  RunningRow<T>* running = partial.take<RunningRow<T>>(num_partial * rows.rows_per_task);
  T* running_out = partial.take<T>(num_partial * rows.rows_per_task * rows.padded_value_dim);
  RoutingFault* faults = partial.take<RoutingFault>(rows.num_tasks());
  for_each_task(num_workers, rows.num_tasks(), [&](int64_t task, int worker) {
    ScratchCutter own = scratch.of(worker);
    AttendTask<Storage> attend(rows, num_blocks, own);
    const int64_t first = (rows.num_splits > 1 ? task : worker) * rows.rows_per_task;
    T* task_out = running_out + first * rows.padded_value_dim;
    faults[task] = attend.run(task, running + first, task_out);
    if (rows.num_splits == 1 && faults[task].kind == RoutingFault::kNone) attend.finish(running + first, task_out);
  });
  for (int64_t task = 0; task < rows.num_tasks(); ++task) {
    if (faults[task].kind != RoutingFault::kNone) return faults[task];
  }
  // Few tasks were split, so few rows are left to merge.
  for (int64_t task = 0; rows.num_splits > 1 && task < rows.num_tasks(); task += rows.num_splits) {
    ScratchCutter own = scratch.of(0);
    AttendTask<Storage> attend(rows, num_blocks, own);
    attend.place_rows(task);
    attend.finish(running + task * rows.rows_per_task, running_out + task * rows.rows_per_task * rows.padded_value_dim);
  }
  return {};
}

}  // namespace topgather::TOPGATHER_CPU_TARGET
