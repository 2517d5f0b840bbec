// Gradients of lookups and of dot products with rows of a table, on the CPU.
//
//   grad_rows[target] = sum over the entries tk of a row of weights_tk * grad_out_t     [num_targets, W]
//   grad_weights_tk   = dot(values[row], grad_out_t)                                    [T, K], where wanted
//
// Entries come sorted by row, so the entries of a row are a run of sorted positions. The table is read, and its
// gradient written, once and in order; only the rows of grad_out are scattered, and those T rows mostly lie in cache.
//
// Who owns what, in two phases of independent tasks:
//   1. A block of kBlockEntries sorted positions, at multiples of that number, which lies within one run: its sum goes
//      to a place of its own in the workspace. Only rows that very many tokens chose have such blocks: they are spread
//      over threads here.
//   2. A range of targets, cut so that its rows and entries together are as many as any other range's. Per target:
//      a. no entry: zeros;
//      b. else the sum of the run: entries before its first whole block, sums of its whole blocks in order, entries
//         after the last of them.
// Entries of no row, which ragged bags may have, are the last ones in the order, and are left out of all of it.
// Both add up to kEntriesPerPass entries per walk over the row, and prefetch the rows of entries kPrefetchEntries on.
// Numerics: products and sums in float32 (float64 for float64), gradients rounded once; a dot product sums lanes over
// the row, then the lanes, then what is left of the row.
// Determinism: what is added in which order depends on the sorted entries alone.
#pragma once

#include "../common/parallel.h"
#include "../cpu/convert.h"
#include "../cpu/fresh_pages.h"
#include "memory_config.h"
#include "memory_cpu.h"
#include "memory_lookup_cpu.h"

namespace topgather::TOPGATHER_CPU_TARGET {

template <typename Storage>
struct MemoryBackward {
  using T = ComputeOf<Storage>;
  static constexpr int64_t kBlockEntries = MemoryLookupConfig::kBlockEntries;
  static constexpr int kEntriesPerPass = MemoryLookupConfig::kEntriesPerPass;
  static constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(Storage));

  const MemoryBackwardParams& params;
  T* block_sums;  // [num_blocks, W]; defined for whole blocks alone
  int64_t task_positions;
  int64_t num_entries;  // that have a row

  int64_t row_dim() const { return params.problem.row_dim; }

  bool is_whole_block(int64_t first) const {
    const int64_t last = first + kBlockEntries - 1;
    return last < num_entries && params.targets.data[first] == params.targets.data[last];
  }

  const Storage* value_row(int64_t position) const {
    return params.values.at<Storage>(params.sorted_rows.data[position]);
  }

  const Storage* grad_row(int64_t entry) const {
    if (params.tokens.data != nullptr) return params.grad_out.at<Storage>(params.tokens.data[entry]);
    const int64_t bag_size = params.problem.bag_size;
    // Division of 64 bits is several times as slow on older processors.
    const int64_t token =
        num_entries <= UINT32_MAX ? static_cast<uint32_t>(entry) / static_cast<uint32_t>(bag_size) : entry / bag_size;
    return params.grad_out.at<Storage>(token);
  }

  // sums (+)= the weighted gradients of kEntries entries of one row; their dot products are written.
  template <int kEntries, bool kFirst, bool kDots>
  void add_pass(int64_t position, T* sums) const {
    const Storage* grads[kEntries];
    const Storage* grads_ahead[kEntries];
    const Storage* values_ahead[kEntries];
    T weights[kEntries];
    Vector<T> dots[kEntries];
    const Storage* values = kDots ? value_row(position) : nullptr;
    for (int i = 0; i < kEntries; ++i) {
      const int64_t entry = params.order.data[position + i];
      const int64_t ahead = min64(position + i + MemoryLookupConfig::kPrefetchEntries, num_entries - 1);
      grads[i] = grad_row(entry);
      grads_ahead[i] = grad_row(params.order.data[ahead]);
      if (kDots) values_ahead[i] = value_row(ahead);
      weights[i] = params.weights.at<T>()[entry];
      dots[i] = Vector<T>{};
    }
    const auto add_vector = [&](int64_t d) {
      Vector<T> sum = kFirst ? Vector<T>{} : load<T>(sums + d);
      const Vector<T> value = kDots ? load_vector(values + d) : Vector<T>{};
#pragma GCC unroll 8
      for (int i = 0; i < kEntries; ++i) {
        const Vector<T> grad = load_vector(grads[i] + d);
        sum += grad * weights[i];
        if (kDots) dots[i] += grad * value;
      }
      store<T>(sums + d, sum);
    };
    int64_t d = 0;
    for (; d + kLine <= row_dim(); d += kLine) {
#pragma GCC unroll 8
      for (int i = 0; i < kEntries; ++i) {
        __builtin_prefetch(grads_ahead[i] + d);
        if (kDots) __builtin_prefetch(values_ahead[i] + d);
      }
#pragma GCC unroll 16
      for (int64_t lane = 0; lane < kLine; lane += kLanes<T>) add_vector(d + lane);
    }
    for (; d + kLanes<T> <= row_dim(); d += kLanes<T>) add_vector(d);
    T rest[kEntries] = {};
    for (; d < row_dim(); ++d) {
      T sum = kFirst ? 0 : sums[d];
      for (int i = 0; i < kEntries; ++i) {
        const T grad = to_compute(grads[i][d]);
        sum += grad * weights[i];
        if (kDots) rest[i] += grad * to_compute(values[d]);
      }
      sums[d] = sum;
    }
    if constexpr (kDots) {
      for (int i = 0; i < kEntries; ++i) {
        params.grad_weights.at<T>()[params.order.data[position + i]] = sum_of_lanes<T>(dots[i]) + rest[i];
      }
    }
  }

  template <bool kDots, int kEntries>
  void add_pass(int64_t position, bool is_first, T* sums) const {
    if (is_first) {
      add_pass<kEntries, true, kDots>(position, sums);
    } else {
      add_pass<kEntries, false, kDots>(position, sums);
    }
  }

  // Entries [first, last) of one row; is_first: sums holds nothing yet.
  template <bool kDots>
  void add_entries(int64_t first, int64_t last, bool is_first, T* sums) const {
    for (; first + kEntriesPerPass <= last; first += kEntriesPerPass) {
      add_pass<kDots, kEntriesPerPass>(first, is_first, sums);
      is_first = false;
    }
    static_assert(kEntriesPerPass == 4);
    switch (last - first) {
      case 3:
        add_pass<kDots, 2>(first, is_first, sums);
        add_pass<kDots, 1>(first + 2, false, sums);
        break;
      case 2: add_pass<kDots, 2>(first, is_first, sums); break;
      case 1: add_pass<kDots, 1>(first, is_first, sums); break;
      default: break;
    }
  }

  void add_entries(int64_t first, int64_t last, bool is_first, T* sums) const {
    if (params.grad_weights.data != nullptr) {
      add_entries<true>(first, last, is_first, sums);
    } else {
      add_entries<false>(first, last, is_first, sums);
    }
  }

  // Phase 1.
  void sum_block(int64_t block) const {
    const int64_t first = block * kBlockEntries;
    if (is_whole_block(first)) add_entries(first, first + kBlockEntries, true, block_sums + block * row_dim());
  }

  // The sums of all whole blocks, which `block_sums` is set to.
  AlignedBuffer sum_blocks() {
    const int64_t num_blocks = num_entries / kBlockEntries;
    int64_t num_whole_blocks = 0;
    for (int64_t block = 0; block < num_blocks; ++block) {
      num_whole_blocks += is_whole_block(block * kBlockEntries) ? 1 : 0;
    }
    AlignedBuffer buffer;
    if (num_whole_blocks == 0) return buffer;
    buffer = allocate_aligned(static_cast<size_t>(num_blocks * row_dim()) * sizeof(T));
    block_sums = reinterpret_cast<T*>(buffer.get());
    const double num_operations = static_cast<double>(num_whole_blocks * kBlockEntries) *
                                  static_cast<double>(row_dim()) * MemoryLookupConfig::kOperationsPerElement;
    for_each_task(useful_threads(params.problem.num_threads, num_whole_blocks, num_operations), num_blocks,
                  [&](int64_t block, int) { sum_block(block); });
    return buffer;
  }

  int64_t end_of_run(int64_t first) const {
    int64_t position = first + 1;
    while (position < num_entries && params.targets.data[position] == params.targets.data[first]) {
      position += position % kBlockEntries == 0 && is_whole_block(position) ? kBlockEntries : 1;
    }
    return position;
  }

  // Phase 2, step b.
  void sum_run(int64_t first, int64_t last, T* sums) const {
    const int64_t first_block = ceil_div(first, kBlockEntries), last_block = last / kBlockEntries;
    if (first_block >= last_block) return add_entries(first, last, true, sums);
    add_entries(first, first_block * kBlockEntries, true, sums);
    int64_t block = first_block;
    if (first == first_block * kBlockEntries) {
      const T* other = block_sums + block++ * row_dim();
      for (int64_t d = 0; d < row_dim(); ++d) sums[d] = other[d];
    }
    for (; block < last_block; ++block) {
      const T* other = block_sums + block * row_dim();
      for (int64_t d = 0; d < row_dim(); ++d) sums[d] += other[d];
    }
    add_entries(last_block * kBlockEntries, last, false, sums);
  }

  // The first sorted position p for which targets[p] + weight * p is at least `bound`; num_entries where none is.
  int64_t first_position(int64_t bound, int64_t weight) const {
    int64_t low = 0, high = num_entries;
    while (low < high) {
      const int64_t middle = low + (high - low) / 2;
      if (params.targets.data[middle] + weight * middle >= bound) {
        high = middle;
      } else {
        low = middle + 1;
      }
    }
    return low;
  }

  // The first target with at least `bound` targets and entries before it. Up to `position` they are fewer; from there
  // on, targets have no entries up to the next one's.
  int64_t target_after(int64_t bound) const {
    const int64_t position = first_position(bound, 1);
    const int64_t next = position > 0 ? params.targets.data[position - 1] + int64_t{1} : 0;
    return min64(max64(bound - position, next), params.num_targets);
  }

  // Phase 2.
  void sum_targets(int64_t task, T* sums_of_worker) const {
    const int64_t first_target = target_after(task * task_positions);
    const int64_t last_target = target_after((task + 1) * task_positions);
    int64_t position = first_position(first_target, 0);
    const int64_t row_bytes = row_dim() * static_cast<int64_t>(sizeof(Storage));
    if (params.num_targets * row_bytes >= MemoryLookupConfig::kFreshBytes) {
      populate_pages(params.grad_rows.at<Storage>(first_target), (last_target - first_target) * row_bytes);
    }
    for (int64_t target = first_target; target < last_target; ++target) {
      Storage* grad_values = params.grad_rows.at<Storage>(target);
      if (position == num_entries || params.targets.data[position] != target) {
        for (int64_t d = 0; d < row_dim(); ++d) grad_values[d] = Storage{};
        continue;
      }
      const int64_t last = end_of_run(position);
      if constexpr (std::is_same_v<Storage, T>) {
        sum_run(position, last, grad_values);
      } else {
        sum_run(position, last, sums_of_worker);
        for (int64_t d = 0; d < row_dim(); ++d) grad_values[d] = from_compute<Storage>(sums_of_worker[d]);
      }
      position = last;
    }
  }
};

template <typename Storage>
void memory_backward_storage(const MemoryBackwardParams& params) {
  using T = ComputeOf<Storage>;
  using Config = MemoryLookupConfig;
  const MemoryProblem& problem = params.problem;
  const int64_t row_dim = problem.row_dim;
  T* grad_weights = params.grad_weights.at<T>();
  if (row_dim == 0) {  // there may be no memory behind rows
    for (int64_t entry = 0; grad_weights != nullptr && entry < problem.num_entries; ++entry) grad_weights[entry] = 0;
    return;
  }
  int64_t num_entries = problem.num_entries;
  while (num_entries > 0 && params.sorted_rows.data[num_entries - 1] == problem.num_rows) {
    --num_entries;
    if (grad_weights != nullptr) grad_weights[params.order.data[num_entries]] = 0;
  }
  const double cost_of_row = static_cast<double>(row_dim) * Config::kOperationsPerElement;

  MemoryBackward<Storage> backward{params, nullptr, 0, num_entries};
  const int64_t scratch_row = round_up(row_dim, 64);
  const int64_t num_positions = params.num_targets + num_entries;
  backward.task_positions = positions_per_task(num_positions, row_dim);

  const AlignedBuffer block_sums = backward.sum_blocks();

  const int64_t num_tasks = ceil_div(num_positions, backward.task_positions);
  const int num_threads =
      useful_threads(problem.num_threads, num_tasks, static_cast<double>(num_positions) * cost_of_row);
  const AlignedBuffer scratch = allocate_aligned(static_cast<size_t>(num_threads * scratch_row) * sizeof(T));
  for_each_task(num_threads, num_tasks, [&](int64_t task, int worker) {
    backward.sum_targets(task, reinterpret_cast<T*>(scratch.get()) + worker * scratch_row);
  });
}

}  // namespace topgather::TOPGATHER_CPU_TARGET
