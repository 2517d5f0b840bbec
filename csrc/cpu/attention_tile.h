// What the CPU's attention kernels share: a tile of scores [keys, tile_row], queries in vector lanes, scores in base 2.
//
//   forward:  cap_scores, then online_softmax: scores become weights, a row's largest score and sum run along
//   last:     end_of_row: what a row's weighted sum of values is multiplied with, and its lse, with sinks
//   backward: cap_scores, then weigh_with_terms: scores become weights, products with values gradients of scores
//
// Kernels whose keys stand in the lanes take the pieces: finite_base, weigh_columns, end_of_row.
#pragma once

#include <cmath>
#include <limits>

#include "../common/array.h"
#include "../common/softmax_terms.h"
#include "math.h"

namespace topgather::TOPGATHER_CPU_TARGET {

// cap * tanh(score / cap) of scores [num_keys, tile_row].
template <typename T>
inline void cap_scores(T* scores, int64_t tile_row, int64_t num_vectors, int64_t num_keys, T cap) {
  for (int64_t key = 0; key < num_keys; ++key) {
    for (int64_t v = 0; v < num_vectors; ++v) {
      T* score = scores + key * tile_row + v * kLanes<T>;
      store<T>(score, cap * tanh_vector(load<T>(score) / cap));
    }
  }
}

// What is subtracted from scores, a number or a vector. Where the largest so far is -inf, of hidden keys or of scores
// that are, any finite base keeps -inf - base from being NaN.
template <typename Number>
inline Number finite_base(const Number& largest) {
  return largest == -__builtin_inff() ? Number{} : largest;
}

// Raises `top` to the largest of its columns' scores.
template <typename T, int kVectors>
inline void raise_to_largest(const T* scores, int64_t tile_row, int64_t num_keys, Vector<T> (&top)[kVectors]) {
  for (int64_t key = 0; key < num_keys; ++key) {
    for (int v = 0; v < kVectors; ++v) top[v] = maximum(top[v], load<T>(scores + key * tile_row + v * kLanes<T>));
  }
}

// Scores become weights 2^(score - base), and are added to `sum`.
template <typename T, int kVectors>
inline void weigh_columns(T* scores, int64_t tile_row, int64_t num_keys, const Vector<T> (&base)[kVectors],
                          Vector<T> (&sum)[kVectors]) {
  for (int64_t key = 0; key < num_keys; ++key) {
    for (int v = 0; v < kVectors; ++v) {
      T* score = scores + key * tile_row + v * kLanes<T>;
      const Vector<T> weight = exp2_vector(load<T>(score) - base[v]);
      store<T>(score, weight);
      sum[v] += weight;
    }
  }
}

#if TOPGATHER_PAIR_PRODUCTS
// The same weights rounded to pairs of consecutive keys, [keys / 2, tile_row] in place of the scores; sums are of the
// weights before.
template <int kVectors>
inline void weigh_columns_in_pairs(float* scores, int64_t tile_row, int64_t num_keys,
                                   const Vector<float> (&base)[kVectors], Vector<float> (&sum)[kVectors]) {
  for (int64_t key = 0; key < num_keys; key += 2) {
    const bool has_second = key + 1 < num_keys;
    for (int v = 0; v < kVectors; ++v) {
      const float* score = scores + key * tile_row + v * kLanes<float>;
      const Vector<float> first = exp2_vector(load<float>(score) - base[v]);
      const Vector<float> second = has_second ? exp2_vector(load<float>(score + tile_row) - base[v]) : Vector<float>{};
      store<float>(scores + key / 2 * tile_row + v * kLanes<float>, round_to_pairs(first, second));
      sum[v] += first;
      sum[v] += second;
    }
  }
}
#endif

// A tile's rows so far, side by side.
template <typename T, int64_t kTileQueries>
struct RunningSoftmax {
  alignas(64) T largest[kTileQueries];  // base-2 exponent
  alignas(64) T sum[kTileQueries];      // of weights relative to it
  alignas(64) T rescale[kTileQueries];  // after a step: what the weighted sum of values must be multiplied with
};

template <bool kInPairs, int kVectors, typename T, int64_t kTileQueries>
inline void online_softmax_columns(T* scores, int64_t column, int64_t num_keys,
                                   RunningSoftmax<T, kTileQueries>& running) {
  Vector<T> top[kVectors], sum[kVectors], base[kVectors];
  for (int v = 0; v < kVectors; ++v) top[v] = load<T>(running.largest + column + v * kLanes<T>);
  raise_to_largest(scores + column, kTileQueries, num_keys, top);
  for (int v = 0; v < kVectors; ++v) {
    const int64_t at = column + v * kLanes<T>;
    base[v] = finite_base(top[v]);
    const Vector<T> factor = exp2_vector(load<T>(running.largest + at) - base[v]);
    store<T>(running.rescale + at, factor);
    sum[v] = load<T>(running.sum + at) * factor;
  }
#if TOPGATHER_PAIR_PRODUCTS
  if constexpr (kInPairs) {
    weigh_columns_in_pairs(scores + column, kTileQueries, num_keys, base, sum);
  } else
#endif
  {
    weigh_columns(scores + column, kTileQueries, num_keys, base, sum);
  }
  for (int v = 0; v < kVectors; ++v) {
    store<T>(running.largest + column + v * kLanes<T>, top[v]);
    store<T>(running.sum + column + v * kLanes<T>, sum[v]);
  }
}

// A step of the online softmax: more keys' scores [num_keys, kTileQueries] of `count` rows become weights.
// Four vectors at a time: enough independent chains to hide the latency of a maximum, few enough for registers.
template <bool kInPairs = false, typename T, int64_t kTileQueries>
inline void online_softmax(T* scores, int64_t count, int64_t num_keys, RunningSoftmax<T, kTileQueries>& running) {
  for (int64_t column = 0; column < count; column += 4 * kLanes<T>) {
    switch (min64(4, ceil_div(count - column, kLanes<T>))) {
      case 1: online_softmax_columns<kInPairs, 1>(scores, column, num_keys, running); break;
      case 2: online_softmax_columns<kInPairs, 2>(scores, column, num_keys, running); break;
      case 3: online_softmax_columns<kInPairs, 3>(scores, column, num_keys, running); break;
      default: online_softmax_columns<kInPairs, 4>(scores, column, num_keys, running);
    }
  }
}

// What a row's weighted sum of values is multiplied with in the end, and its lse.
template <typename T>
struct RowEnd {
  T factor;
  T lse;
};

// Where the sum of weights is not above 0, lse is lse_of_unusual_row(). A row without keys, !sees_a_key(), gives zeros;
// keys seen, all at -inf, are 0 / 0, unless a sink gives the sum something.
template <typename T, typename LseOfUnusualRow, typename SeesAKey>
inline RowEnd<T> end_of_row(T largest, T sum, const Array<const void, 1>& sinks, int64_t head_idx,
                            const LseOfUnusualRow& lse_of_unusual_row, const SeesAKey& sees_a_key) {
  constexpr T kLowest = -std::numeric_limits<T>::infinity();
  RowEnd<T> end{1 / sum, (largest + std::log2(sum)) * static_cast<T>(kLn2)};
  if (!(sum > 0)) {
    end.lse = lse_of_unusual_row();
    const bool has_sink = sinks.data != nullptr && *sinks.at<T>(head_idx) > kLowest;
    const bool is_empty = end.lse == kLowest && (has_sink || !sees_a_key());
    end.factor = is_empty ? T(0) : std::numeric_limits<T>::quiet_NaN();
  } else if (sinks.data != nullptr) {
    end.factor *= 1 / (1 + std::exp(*sinks.at<T>(head_idx) - end.lse));  // exp(lse) / (exp(lse) + exp(sink))
  }
  return end;
}

// What the backward knows of a tile's rows, side by side.
template <typename T, int64_t kTileQueries>
struct BackwardRows {
  alignas(64) T largest[kTileQueries];
  alignas(64) T factor[kTileQueries];
  alignas(64) T delta[kTileQueries];

  void set(int64_t i, const SoftmaxTerms<T>& terms, T row_delta) {
    largest[i] = terms.largest;
    factor[i] = terms.factor;
    delta[i] = row_delta;
  }
};

template <bool kIsCapped, typename T, int64_t kTileQueries>
inline void weigh_capped_or_not(T* scores, T* grad_scores, int64_t num_keys, int64_t num_vectors,
                                const BackwardRows<T, kTileQueries>& rows, T cap) {
  for (int64_t key = 0; key < num_keys; ++key) {
    for (int64_t v = 0; v < num_vectors; ++v) {
      const int64_t column = v * kLanes<T>, at = key * kTileQueries + column;
      const Vector<T> score = load<T>(scores + at);
      const Vector<T> weight = exp2_vector(score - load<T>(rows.largest + column)) * load<T>(rows.factor + column);
      store<T>(scores + at, weight);
      Vector<T> gradient = weight * (load<T>(grad_scores + at) - load<T>(rows.delta + column));
      if constexpr (kIsCapped) gradient *= T(1) - score / cap * (score / cap);
      store<T>(grad_scores + at, gradient);
    }
  }
}

// Scores [num_keys, kTileQueries], capped where cap > 0, become weights; grad_scores, products of values with the rows'
// grad_out, become gradients of scores.
template <typename T, int64_t kTileQueries>
inline void weigh_with_terms(T* scores, T* grad_scores, int64_t num_keys, int64_t num_vectors,
                             const BackwardRows<T, kTileQueries>& rows, T cap) {
  if (cap > 0) {
    weigh_capped_or_not<true>(scores, grad_scores, num_keys, num_vectors, rows, cap);
  } else {
    weigh_capped_or_not<false>(scores, grad_scores, num_keys, num_vectors, rows, cap);
  }
}

}  // namespace topgather::TOPGATHER_CPU_TARGET
