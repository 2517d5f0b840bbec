// Steps of an optimizer on the rows of a table that entries name, on the CPU: no gradient of a row outlives its step.
//
//   g = grad_scale * sum over the row's entries of weights_e * grad_out_token + weight_decay * row, t = ++steps[row]
//   SGD      b = t == 1 ? g : momentum * b + (1 - dampening) * g;  row -= lr * (nesterov ? g + momentum * b : b)
//   Adagrad  s += g^2;  row -= lr / (1 + (t - 1) * lr_decay) * g / (sqrt(s) + eps)
//   Adam     m += (1 - beta1) (g - m);  v = beta2 v + (1 - beta2) g^2
//            row -= lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
//
// with row *= exp(total_decay - decayed[row]) before it where rows decay. Steps of a row, whose entries are a run of
// sorted positions:
//   1. the run is summed into scratch as the gradient of a dense table is (memory_backward_cpu.h), hot rows by blocks;
//   2. one walk over row and states, read and written once; those of the next run are prefetched meanwhile.
// Or, where squares are asked for, 2. adds g^2 up, and nothing is written but their sum.
// Who owns what: a range of positions a task, cut at runs by shapes and rows alone.
// Numerics: float32 (float64 for float64), rounded to what is stored to nearest, or, what is stored in bfloat16, by random
// bits: up with the probability of what is cut off. The bits are a hash of seed, step, row, column and state.
// Determinism: a row depends on its own entries alone. Squares are added up by run, by task, then over tasks.
#pragma once

#include <cmath>

#include "memory_backward_cpu.h"
#include "memory_row_bits.h"

namespace topgather::TOPGATHER_CPU_TARGET {

// `bits`: 16 random ones, 0x8000 where rounding is not random.
template <typename Storage, bool kStochastic>
inline Storage round_to(ComputeOf<Storage> value, uint32_t bits) {
  if constexpr (kStochastic && std::is_same_v<Storage, BFloat16>) {
    const uint32_t whole = bit_cast<uint32_t>(value);
    const bool is_finite = (whole & 0x7f800000u) != 0x7f800000u;
    const uint32_t rounded = (whole + bits) >> 16;
    return is_finite ? BFloat16{static_cast<uint16_t>(rounded)} : from_compute<Storage>(value);
  } else {
    return from_compute<Storage>(value);
  }
}

template <typename T>
inline T root(T value) {
  if constexpr (std::is_same_v<T, double>) {
    return __builtin_sqrt(value);
  } else {
    return __builtin_sqrtf(value);
  }
}

template <typename Storage, typename State, RowAlgorithm kAlgorithm, bool kStochastic>
struct MemoryUpdate {
  using T = ComputeOf<Storage>;
  static constexpr int64_t kLine = MemoryBackward<Storage>::kLine;
  static constexpr bool kHasSecond = kAlgorithm == RowAlgorithm::kAdam;

  const MemoryUpdateParams& params;
  const MemoryBackward<Storage>& backward;

  // What a row's step multiplies with.
  struct Factors {
    T scale, decay, weight_decay, rate, first, new_first, second, new_second, root, eps;
    bool is_nesterov;
  };

  Factors factors_of(int64_t row, int64_t step) const {
    Factors factors{};
    factors.scale = static_cast<T>(params.grad_scale);
    factors.weight_decay = static_cast<T>(params.weight_decay);
    factors.eps = static_cast<T>(params.eps);
    factors.decay = 1;
    if (params.decayed.data != nullptr) {
      factors.decay = static_cast<T>(std::exp(params.total_decay - *params.decayed.at<double>(row)));
    }
    double rate = params.learning_rate;
    if constexpr (kAlgorithm == RowAlgorithm::kSgd) {
      factors.is_nesterov = params.nesterov != 0;
      factors.first = static_cast<T>(params.first_rate);
      factors.new_first = static_cast<T>(1 - params.second_rate);
    } else if constexpr (kAlgorithm == RowAlgorithm::kAdagrad) {
      rate /= 1 + static_cast<double>(step - 1) * params.second_rate;
    } else {
      rate /= 1 - whole_power(params.first_rate, step);
      factors.new_first = static_cast<T>(1 - params.first_rate);
      factors.second = static_cast<T>(params.second_rate);
      factors.new_second = static_cast<T>(1 - params.second_rate);
      factors.root = static_cast<T>(1 / root(1 - whole_power(params.second_rate, step)));
    }
    factors.rate = static_cast<T>(rate);
    return factors;
  }

  // Columns [begin, end) of a row and its states.
  template <bool kIsFirstStep, bool kHasFirst>
  void update_columns(const Factors& factors, const T* grads, int64_t begin, int64_t end, uint32_t bits_of_states,
                      uint32_t bits_of_values, Storage* values, State* first, State* second) const {
    TOPGATHER_INDEPENDENT_ITERATIONS
    for (int64_t d = begin; d < end; ++d) {
      const uint32_t bits = kStochastic ? column_bits(bits_of_states, static_cast<uint32_t>(d)) : 0;
      T value = to_compute(values[d]) * factors.decay;
      const T grad = grads[d] * factors.scale + value * factors.weight_decay;
      if constexpr (kAlgorithm == RowAlgorithm::kSgd) {
        T direction = grad;
        if constexpr (kHasFirst) {
          const T momentum =
              kIsFirstStep ? grad : static_cast<T>(to_compute(first[d])) * factors.first + grad * factors.new_first;
          first[d] = round_to<State, kStochastic>(momentum, bits & 0xffff);
          direction = factors.is_nesterov ? grad + momentum * factors.first : momentum;
        }
        value -= factors.rate * direction;
      } else if constexpr (kAlgorithm == RowAlgorithm::kAdagrad) {
        const T sum = static_cast<T>(to_compute(first[d])) + grad * grad;
        first[d] = round_to<State, kStochastic>(sum, bits & 0xffff);
        value -= factors.rate * grad / (root(sum) + factors.eps);
      } else {
        const T old = to_compute(first[d]);
        const T mean = old + (grad - old) * factors.new_first;
        const T square = static_cast<T>(to_compute(second[d])) * factors.second + grad * grad * factors.new_second;
        first[d] = round_to<State, kStochastic>(mean, bits & 0xffff);
        second[d] = round_to<State, kStochastic>(square, bits >> 16);
        value -= factors.rate * mean / (root(square) * factors.root + factors.eps);
      }
      const uint32_t more = kStochastic ? column_bits(bits_of_values, static_cast<uint32_t>(d)) & 0xffff : 0;
      values[d] = round_to<Storage, kStochastic>(value, more);
    }
  }

  // Step 2. `next_row`: prefetched.
  template <bool kIsFirstStep, bool kHasFirst>
  void update_row(int64_t row, int64_t next_row, int64_t step, const T* grads) const {
    const Factors factors = factors_of(row, step);
    const uint64_t bits = mix_bits(bits_of_step(params.seed, params.step) + static_cast<uint64_t>(row));
    const auto bits_of_states = static_cast<uint32_t>(bits), bits_of_values = static_cast<uint32_t>(bits >> 32);
    Storage* values = params.values.template at<Storage>(row);
    const Storage* next_values = params.values.template at<Storage>(next_row);
    State* first = nullptr;
    State* second = nullptr;
    const State* next_first = nullptr;
    const State* next_second = nullptr;
    if constexpr (kHasFirst) {
      first = params.first.template at<State>(row);
      next_first = params.first.template at<State>(next_row);
    }
    if constexpr (kHasSecond) {
      second = params.second.template at<State>(row);
      next_second = params.second.template at<State>(next_row);
    }
    const int64_t row_dim = backward.row_dim();
    // Lines of 64 bytes of the smallest type; a line of wider ones takes more prefetches.
    constexpr int64_t kColumns = 64;
    constexpr int64_t kValueLine = 64 / static_cast<int64_t>(sizeof(Storage));
    constexpr int64_t kStateLine = 64 / static_cast<int64_t>(sizeof(State));
    int64_t d = 0;
    for (; d + kColumns <= row_dim; d += kColumns) {
      for (int64_t c = 0; c < kColumns; c += kValueLine) __builtin_prefetch(next_values + d + c, 1);
      for (int64_t c = 0; kHasFirst && c < kColumns; c += kStateLine) __builtin_prefetch(next_first + d + c, 1);
      for (int64_t c = 0; kHasSecond && c < kColumns; c += kStateLine) __builtin_prefetch(next_second + d + c, 1);
      update_columns<kIsFirstStep, kHasFirst>(factors, grads, d, d + kColumns, bits_of_states, bits_of_values, values,
                                              first, second);
    }
    update_columns<kIsFirstStep, kHasFirst>(factors, grads, d, row_dim, bits_of_states, bits_of_values, values, first,
                                            second);
  }

  void update_row(int64_t row, int64_t next_row, const T* grads) const {
    int32_t* steps = params.steps.at<int32_t>(row);
    const int64_t step = static_cast<int64_t>(*steps) + 1;
    if constexpr (kAlgorithm == RowAlgorithm::kSgd) {
      if (params.first.data == nullptr) {
        update_row<false, false>(row, next_row, step, grads);
      } else if (step == 1) {
        update_row<true, true>(row, next_row, step, grads);
      } else {
        update_row<false, true>(row, next_row, step, grads);
      }
    } else {
      update_row<false, true>(row, next_row, step, grads);
    }
    *steps = static_cast<int32_t>(step < INT32_MAX ? step : INT32_MAX);
    if (params.decayed.data != nullptr) *params.decayed.at<double>(row) = params.total_decay;
  }

  // In float64. Additions of one chain would wait for each other four cycles long.
  double sum_of_squares(const T* sums) const {
    constexpr int kChains = 8;
    double chains[kChains] = {};
    int64_t d = 0;
    for (; d + kChains <= backward.row_dim(); d += kChains) {
#pragma GCC unroll 8
      for (int i = 0; i < kChains; ++i)
        chains[i] += static_cast<double>(sums[d + i]) * static_cast<double>(sums[d + i]);
    }
    double sum = 0;
    for (; d < backward.row_dim(); ++d) sum += static_cast<double>(sums[d]) * static_cast<double>(sums[d]);
    for (const double chain : chains) sum += chain;
    return sum;
  }

  // Runs whose first entry is among `task`'s positions; returns the sum of their squares where that is asked for.
  double update_runs(int64_t task, T* sums) const {
    const int64_t end = min64((task + 1) * backward.task_positions, backward.num_entries);
    int64_t position = task * backward.task_positions;
    const int32_t* rows = params.sorted_rows.data;
    if (position > 0 && position < end && rows[position] == rows[position - 1]) {
      position = backward.end_of_run(position);
    }
    double squares = 0;
    while (position < end) {
      const int64_t last = backward.end_of_run(position);
      backward.sum_run(position, last, sums);
      if (params.squares.data != nullptr) {
        squares += sum_of_squares(sums);
      } else {
        update_row(rows[position], rows[last < backward.num_entries ? last : position], sums);
      }
      position = last;
    }
    return squares;
  }
};

template <typename Storage, typename State, RowAlgorithm kAlgorithm, bool kStochastic>
void memory_update_rows(const MemoryUpdateParams& params) {
  using T = ComputeOf<Storage>;
  using Config = MemoryLookupConfig;
  const MemoryProblem& problem = params.problem;
  const int64_t row_dim = problem.row_dim;
  double* squares = params.squares.at<double>();
  if (squares != nullptr) *squares = 0;
  int64_t num_entries = problem.num_entries;
  while (num_entries > 0 && params.sorted_rows.data[num_entries - 1] == problem.num_rows) --num_entries;
  if (num_entries == 0) return;

  // What sums of runs ask for.
  MemoryBackwardParams sums{};
  sums.problem = problem;
  sums.grad_out = params.grad_out;
  sums.weights = params.weights;
  sums.order = params.order;
  sums.sorted_rows = params.sorted_rows;
  sums.targets = params.targets;
  sums.tokens = params.tokens;
  MemoryBackward<Storage> backward{sums, nullptr, 0, num_entries};
  const double cost_of_row = static_cast<double>(row_dim) * Config::kOperationsPerElement;
  const AlignedBuffer block_sums = backward.sum_blocks();
  backward.task_positions = positions_per_task(num_entries, row_dim);

  const MemoryUpdate<Storage, State, kAlgorithm, kStochastic> update{params, backward};
  const int64_t num_tasks = ceil_div(num_entries, backward.task_positions);
  const int64_t scratch_row = round_up(max64(row_dim, 1), 64);
  const int num_threads =
      useful_threads(problem.num_threads, num_tasks, static_cast<double>(num_entries) * cost_of_row);
  const AlignedBuffer scratch = allocate_aligned(static_cast<size_t>(num_threads * scratch_row) * sizeof(T));
  const AlignedBuffer parts = allocate_aligned(static_cast<size_t>(num_tasks) * sizeof(double));
  double* squares_of_tasks = reinterpret_cast<double*>(parts.get());
  for_each_task(num_threads, num_tasks, [&](int64_t task, int worker) {
    squares_of_tasks[task] = update.update_runs(task, reinterpret_cast<T*>(scratch.get()) + worker * scratch_row);
  });
  for (int64_t task = 0; squares != nullptr && task < num_tasks; ++task) *squares += squares_of_tasks[task];
}

template <typename Storage, typename State, bool kStochastic>
void memory_update_states(const MemoryUpdateParams& params) {
  switch (static_cast<RowAlgorithm>(params.algorithm_code)) {
    case RowAlgorithm::kSgd: return memory_update_rows<Storage, State, RowAlgorithm::kSgd, kStochastic>(params);
    case RowAlgorithm::kAdagrad: return memory_update_rows<Storage, State, RowAlgorithm::kAdagrad, kStochastic>(params);
    case RowAlgorithm::kAdam: return memory_update_rows<Storage, State, RowAlgorithm::kAdam, kStochastic>(params);
  }
}

template <typename Storage>
void memory_update_storage(const MemoryUpdateParams& params) {
  using T = ComputeOf<Storage>;
  const bool is_stochastic = params.stochastic_rounding != 0;
  if constexpr (!std::is_same_v<T, double>) {
    if (params.first.data != nullptr && params.first.dtype == Dtype::kBFloat16) {
      return is_stochastic ? memory_update_states<Storage, BFloat16, true>(params)
                           : memory_update_states<Storage, BFloat16, false>(params);
    }
  }
  // Only bfloat16 is rounded by random bits.
  if constexpr (std::is_same_v<Storage, BFloat16>) {
    if (is_stochastic) return memory_update_states<Storage, T, true>(params);
  }
  memory_update_states<Storage, T, false>(params);
}

}  // namespace topgather::TOPGATHER_CPU_TARGET
