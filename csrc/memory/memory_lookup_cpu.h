// Weighted sums of scattered rows of a table, and dot products with them, on the CPU.
//
//   lookup:  out_t  = sum_k weights_tk * values[indices_tk]     values [rows, W], indices, weights [T, K], out [T, W]
//   dot:     out_tk = dot(values[indices_tk], x_t)              x [T, W], out [T, K]
//
// Who owns what: a task is a few consecutive tokens, cut by shapes alone. Steps per token:
//   1. take kRowsPerPass entries; walk their rows a cache line at a time, side by side;
//   2. at every line, prefetch the same line of the entries kPrefetchEntries further on, in the tokens that follow too:
//      rows are too scattered for the hardware prefetcher, and prefetches in one burst would wait for each other;
//   3. lookup adds the lines to the token's sums, dot to a vector of its own for every entry.
// Numerics: products and sums in float32 (float64 for float64), rounded once. The sums of a lookup run over k in
// ascending order; a dot product sums lanes over the row, then the lanes, then what is left of the row.
// Ragged bags: a lookup's token has its entries from offsets; a dot product's entry names its row of x.
// Empty: a token without entries, or a row without elements, sums to zero.
// Determinism: a token depends on its own rows alone.
#pragma once

#include "../common/parallel.h"
#include "../cpu/convert.h"
#include "memory_config.h"
#include "memory_cpu.h"

namespace topgather::TOPGATHER_CPU_TARGET {

// Elements of a cache line: always whole vectors of the compute type.
template <typename Storage>
inline constexpr int64_t kLineElements = 64 / static_cast<int64_t>(sizeof(Storage));

// Rows of a table, and where each of some consecutive entries finds its own.
template <typename Storage>
struct EntryRows {
  const Storage* values;
  int64_t stride;
  const int64_t* indices;
  int64_t last_entry;  // nothing past it is prefetched

  const Storage* of(int64_t entry) const { return values + indices[entry] * stride; }
  const Storage* ahead_of(int64_t entry) const {
    return of(min64(entry + MemoryLookupConfig::kPrefetchEntries, last_entry));
  }
};

// Step 3 of a lookup: sums (+)= the weighted rows of entries [entry, entry + kRows).
template <bool kFirst, int kRows, typename Storage>
inline void add_weighted_rows(const EntryRows<Storage>& table, const ComputeOf<Storage>* weights, int64_t entry,
                              int64_t row_dim, ComputeOf<Storage>* sums) {
  using T = ComputeOf<Storage>;
  const Storage* rows[kRows];
  const Storage* ahead[kRows];
  T weight[kRows];
  for (int i = 0; i < kRows; ++i) {
    rows[i] = table.of(entry + i);
    ahead[i] = table.ahead_of(entry + i);
    weight[i] = weights[entry + i];
  }
  const auto add_vector = [&](int64_t d) {
    Vector<T> sum = kFirst ? Vector<T>{} : load<T>(sums + d);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) sum += load_vector(rows[i] + d) * weight[i];
    store<T>(sums + d, sum);
  };
  int64_t d = 0;
  for (; d + kLineElements<Storage> <= row_dim; d += kLineElements<Storage>) {
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) __builtin_prefetch(ahead[i] + d);
#pragma GCC unroll 16
    for (int64_t lane = 0; lane < kLineElements<Storage>; lane += kLanes<T>) add_vector(d + lane);
  }
  for (; d + kLanes<T> <= row_dim; d += kLanes<T>) add_vector(d);
  for (; d < row_dim; ++d) {
    T sum = kFirst ? 0 : sums[d];
    for (int i = 0; i < kRows; ++i) sum += to_compute(rows[i][d]) * weight[i];
    sums[d] = sum;
  }
}

// Step 3 of the dot products: out[entry + i] for i < kRows.
template <int kRows, typename Storage>
inline void dot_rows(const EntryRows<Storage>& table, const ComputeOf<Storage>* x, int64_t entry, int64_t row_dim,
                     ComputeOf<Storage>* out) {
  using T = ComputeOf<Storage>;
  const Storage* rows[kRows];
  const Storage* ahead[kRows];
  Vector<T> sums[kRows];
  for (int i = 0; i < kRows; ++i) {
    rows[i] = table.of(entry + i);
    ahead[i] = table.ahead_of(entry + i);
    sums[i] = Vector<T>{};
  }
  const auto add_vector = [&](int64_t d) {
    const Vector<T> x_vector = load<T>(x + d);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) sums[i] += load_vector(rows[i] + d) * x_vector;
  };
  int64_t d = 0;
  for (; d + kLineElements<Storage> <= row_dim; d += kLineElements<Storage>) {
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) __builtin_prefetch(ahead[i] + d);
#pragma GCC unroll 16
    for (int64_t lane = 0; lane < kLineElements<Storage>; lane += kLanes<T>) add_vector(d + lane);
  }
  for (; d + kLanes<T> <= row_dim; d += kLanes<T>) add_vector(d);
  for (int i = 0; i < kRows; ++i) {
    T rest = 0;
    for (int64_t j = d; j < row_dim; ++j) rest += to_compute(rows[i][j]) * x[j];
    out[entry + i] = sum_of_lanes<T>(sums[i]) + rest;
  }
}

// Of `count` positions with so many elements each, those of a task.
inline int64_t positions_per_task(int64_t count, int64_t elements) {
  using Config = MemoryLookupConfig;
  return max64(min64(Config::kElementsPerTask / max64(elements, 1), count / Config::kMinTasks), 1);
}

// Calls body(first, last, scratch) for ranges of tokens; scratch is row_dim elements of the compute type. Every token
// is handed out exactly once, whatever the number of threads.
template <typename T, typename Body>
void for_each_token_range(const MemoryProblem& problem, const Body& body) {
  using Config = MemoryLookupConfig;
  const int64_t elements_per_token = max64(problem.bag_size, 1) * max64(problem.row_dim, 1);
  const int64_t tokens_per_task = positions_per_task(problem.num_tokens, elements_per_token);
  const int64_t num_tasks = ceil_div(problem.num_tokens, tokens_per_task);
  const double num_operations = static_cast<double>(problem.num_tokens) * static_cast<double>(elements_per_token);
  const int num_threads =
      useful_threads(problem.num_threads, num_tasks, num_operations * Config::kOperationsPerElement);
  const int64_t scratch_row = round_up(problem.row_dim, 64);
  const AlignedBuffer scratch = allocate_aligned(static_cast<size_t>(num_threads * scratch_row) * sizeof(T));
  for_each_task(num_threads, num_tasks, [&](int64_t task, int worker) {
    const int64_t first = task * tokens_per_task;
    body(first, min64(first + tokens_per_task, problem.num_tokens),
         reinterpret_cast<T*>(scratch.get()) + worker * scratch_row);
  });
}

template <typename Storage>
void memory_lookup_storage(const MemoryLookupParams& params) {
  using T = ComputeOf<Storage>;
  constexpr int kRowsPerPass = MemoryLookupConfig::kRowsPerPass;
  const MemoryProblem& problem = params.problem;
  const int64_t row_dim = problem.row_dim, bag_size = problem.bag_size;
  const int64_t* offsets = params.offsets.data;
  const T* weights = params.weights.at<T>();
  if (row_dim == 0) return;
  const auto first_entry = [&](int64_t token) { return offsets == nullptr ? token * bag_size : offsets[token]; };
  for_each_token_range<T>(problem, [&](int64_t first_token, int64_t last_token, T* scratch) {
    const EntryRows<Storage> table{params.values.at<Storage>(), params.values.strides[0], params.indices.data,
                                   first_entry(last_token) - 1};
    for (int64_t token = first_token; token < last_token; ++token) {
      Storage* out = params.out.at<Storage>(token);
      T* sums = scratch;
      if constexpr (std::is_same_v<Storage, T>) sums = out;
      const int64_t last = first_entry(token + 1);
      int64_t entry = first_entry(token);
      if (last - entry >= kRowsPerPass) {
        add_weighted_rows<true, kRowsPerPass>(table, weights, entry, row_dim, sums);
        entry += kRowsPerPass;
      } else {
        for (int64_t d = 0; d < row_dim; ++d) sums[d] = 0;
      }
      for (; entry + kRowsPerPass <= last; entry += kRowsPerPass) {
        add_weighted_rows<false, kRowsPerPass>(table, weights, entry, row_dim, sums);
      }
      for (; entry < last; ++entry) add_weighted_rows<false, 1>(table, weights, entry, row_dim, sums);
      if constexpr (!std::is_same_v<Storage, T>) {
        for (int64_t d = 0; d < row_dim; ++d) out[d] = from_compute<Storage>(sums[d]);
      }
    }
  });
}

template <typename Storage>
void memory_dot_storage(const MemoryDotParams& params) {
  using T = ComputeOf<Storage>;
  constexpr int kRowsPerPass = MemoryLookupConfig::kRowsPerPass;
  const MemoryProblem& problem = params.problem;
  const int64_t row_dim = problem.row_dim, bag_size = problem.bag_size;
  T* out = params.out.at<T>();
  if (row_dim == 0) {  // there may be no memory behind rows
    for (int64_t entry = 0; entry < problem.num_entries; ++entry) out[entry] = 0;
    return;
  }
  const int32_t* tokens = params.tokens.data;
  for_each_token_range<T>(problem, [&](int64_t first_token, int64_t last_token, T* scratch) {
    const int64_t last_entry = last_token * bag_size;
    const EntryRows<Storage> table{params.values.at<Storage>(), params.values.strides[0], params.indices.data,
                                   last_entry - 1};
    for (int64_t entry = first_token * bag_size, last = entry; entry < last_entry; entry = last) {
      int64_t row_of_x = 0;
      if (tokens == nullptr) {
        row_of_x = entry / bag_size;
        last += bag_size;
      } else {
        row_of_x = tokens[entry];
        while (last < last_entry && tokens[last] == row_of_x) ++last;
      }
      if (row_of_x < 0) {
        for (; entry < last; ++entry) out[entry] = 0;
        continue;
      }
      const T* x = dense_rows(params.x.at<Storage>(row_of_x), 0, 1, row_dim, row_dim, scratch).data;
      for (; entry + kRowsPerPass <= last; entry += kRowsPerPass) {
        dot_rows<kRowsPerPass>(table, x, entry, row_dim, out);
      }
      for (; entry < last; ++entry) dot_rows<1>(table, x, entry, row_dim, out);
    }
  });
}

}  // namespace topgather::TOPGATHER_CPU_TARGET
