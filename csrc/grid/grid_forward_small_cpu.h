// Grid and window attention forward on the CPU for groups that fit one vector: 16 tokens of float32 with AVX-512.
//
// The formula, who owns what, numerics and determinism are those of grid_forward_cpu.h; in such groups copying and
// looping would cost more than the arithmetic, so rows are read and written where they lie. Steps:
//   1. where the group's rows lie; rows that are not of the compute type and whole vectors are converted to scratch;
//   2. queries transposed and scaled: they stand in vector lanes, keys are broadcast. What is past the last token
//      repeats it, and is dropped at the end;
//   3. scores [keys, queries], plus bias;
//   4. softmax, base 2, in registers; lse and softmax terms. Weights are divided by their sum before, not after,
//   5. weights^T x values, straight to out.
#pragma once

#include <limits>

#include "../cpu/attention_tile.h"
#include "../cpu/math.h"
#include "../cpu/scratch.h"
#include "grid_bias_cpu.h"
#include "grid_geometry_cpu.h"

namespace topgather::TOPGATHER_CPU_TARGET {

// Step 3 for kCount keys: scores[i * kLanes] = dot(queries, row i). Out of line, as is step 5's product: both
// need all registers. Between multiplications it prefetches other rows, [kLanes][depth], one cache line of each: no
// more at once than a processor has outstanding loads.
template <typename T, int kCount, typename Storage>
__attribute__((noinline)) void score_rows(const T* const* key_rows, const T* query_tile, int64_t depth, T* scores,
                                          const Storage* const* wanted, const Storage* const* wanted_too) {
  const T* rows[kCount];
  Vector<T> sums[kCount] = {};
  for (int i = 0; i < kCount; ++i) rows[i] = key_rows[i];
  for (int64_t d = 0; d < depth; ++d) {
    const Vector<T> queries = load<T>(query_tile + d * kLanes<T>);
    const int64_t token = d % kLanes<T>;
    prefetch_second_level(wanted[token] + (d - token));
    prefetch_second_level(wanted_too[token] + (d - token));
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) sums[i] += queries * rows[i][d];
  }
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i) store<T>(scores + i * kLanes<T>, sums[i]);
}

// Step 5 for kVectors vectors of columns: out_rows[i][column..] = sum over keys of weights[key, i] * value_rows[key].
template <bool kStreams, int kVectors, typename T>
__attribute__((noinline)) void weigh_rows(const T* const* value_rows, const T* weights, int64_t num_tokens,
                                          int64_t column, T* const* out_rows) {
  constexpr int kQueries = kLanes<T> < 4 ? kLanes<T> : 4;
  for (int64_t first = 0; first < num_tokens; first += kQueries) {
    Vector<T> sums[kQueries][kVectors] = {};
    for (int64_t key = 0; key < num_tokens; ++key) {
      const T* row = value_rows[key] + column;
      Vector<T> values[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) values[v] = load<T>(row + v * kLanes<T>);
#pragma GCC unroll 4
      for (int i = 0; i < kQueries; ++i) {
        const Vector<T> weight = broadcast<T>(weights[key * kLanes<T> + first + i]);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) sums[i][v] += weight * values[v];
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < kQueries; ++i) {
      if (first + i < num_tokens) {
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
          T* target = out_rows[first + i] + column + v * kLanes<T>;
          if constexpr (kStreams) {
            stream<T>(target, sums[i][v]);
          } else {
            store<T>(target, sums[i][v]);
          }
        }
      }
    }
  }
}

// Elements from a group's first row of query, key, value and out to its others; past the last it repeats. Groups of one
// size, mostly all, share them.
template <int kTokens>
struct SmallGroupOffsets {
  int64_t num_columns = 0;
  int64_t num_tokens = 0;
  int64_t of_image[4][kTokens];

  void set(const GridForwardParams& params, const Group& group) {
    if (group.num_columns == num_columns && group.num_tokens == num_tokens) return;
    num_columns = group.num_columns;
    num_tokens = group.num_tokens;
    const auto set_image = [&](const auto& image, int64_t (&offsets)[kTokens]) {
      const int64_t row_step = params.problem.rows.token_step * image.strides[2];
      const int64_t column_step = params.problem.columns.token_step * image.strides[3];
      int64_t row = 0, column = 0;
      for (int64_t i = 0; i < kTokens; ++i) {
        offsets[i] = row * row_step + column * column_step;
        if (i + 1 >= num_tokens || ++column < num_columns) continue;
        column = 0;
        ++row;
      }
    };
    set_image(params.query, of_image[0]);
    set_image(params.key, of_image[1]);
    set_image(params.value, of_image[2]);
    set_image(params.out, of_image[3]);
  }
};

// Where the rows of a group lie.
template <typename Storage, int kTokens>
struct SmallGroupRows {
  const Storage* query[kTokens];
  const Storage* key[kTokens];
  const Storage* value[kTokens];
  Storage* out[kTokens];

  void place(const GridForwardParams& params, const Group& group, SmallGroupOffsets<kTokens>& offsets) {
    offsets.set(params, group);
    const auto place_in = [&](auto* first, int image, auto& pointers) {
      for (int i = 0; i < kTokens; ++i) pointers[i] = first + offsets.of_image[image][i];
    };
    place_in(rows_in<const Storage>(params.problem, params.query, group).first, 0, query);
    place_in(rows_in<const Storage>(params.problem, params.key, group).first, 1, key);
    place_in(rows_in<const Storage>(params.problem, params.value, group).first, 2, value);
    place_in(rows_in<Storage>(params.problem, params.out, group).first, 3, out);
  }
};

template <typename Storage>
struct GridForwardSmallTask {
  using T = ComputeOf<Storage>;
  static constexpr int kTokens = kLanes<T>;
  static constexpr int kKeysAtOnce = kTokens < 8 ? kTokens : 8;  // sums of step 3

  const GridForwardParams& params;
  const TransposedBias<T>& bias;
  int64_t padded_dim;
  bool streams;  // results, past the caches

  T* converted_keys;              // [kTokens, padded D], where rows cannot be read in place
  T* converted_values;            // [kTokens, padded D]
  T* converted_out;               // [kTokens, padded D]
  T* query_tile;                  // [D, kTokens]
  T* scores;                      // [kTokens, kTokens]
  int32_t bias_indices[kTokens];  // of the group's tokens
  SmallGroupOffsets<kTokens> offsets;
  SmallGroupRows<Storage, kTokens> places[2];
  int which = 0;           // of the two is this group's, the other that of the group that follows
  bool is_placed = false;  // this group's, while the one before was worked on

  GridForwardSmallTask(const GridForwardParams& p, const TransposedBias<T>& b, bool streams_out, ScratchCutter& scratch)
      : params(p), bias(b), padded_dim(round_up(p.problem.head_dim, kTokens)), streams(streams_out) {
    for (T** rows : {&converted_keys, &converted_values, &converted_out}) {
      *rows = scratch.take<T>(kTokens * padded_dim);
    }
    query_tile = scratch.take<T>(p.problem.head_dim * kTokens);
    scores = scratch.take<T>(kTokens * kTokens);
  }

  // Step 1, where rows are not read in place.
  void convert(const Group& group, const ConstImage& image, T* converted, const T* (&rows)[kTokens]) const {
    gather_tokens<Storage>(rows_in<const Storage>(params.problem, image, group), group, 0, group.num_tokens,
                           params.problem.head_dim, padded_dim, converted);
    for (int64_t i = 0; i < kTokens; ++i) rows[i] = converted + min64(i, group.num_tokens - 1) * padded_dim;
  }

  // Step 4.
  void softmax(const Group& group, int64_t num_keys) {
    constexpr T kLowest = -std::numeric_limits<T>::infinity();
    Vector<T> top[1] = {broadcast(kLowest)}, sum[1] = {};
    raise_to_largest(scores, kTokens, num_keys, top);
    const Vector<T> base[1] = {finite_base(top[0])};
    weigh_columns(scores, kTokens, num_keys, base, sum);
    const Vector<T> factor = T(1) / sum[0];
    for (int64_t key = 0; key < num_keys; ++key) {
      store<T>(scores + key * kTokens, load<T>(scores + key * kTokens) * factor);
    }
    const Vector<T> lse = (top[0] + log2_vector(sum[0])) * static_cast<T>(kLn2);
    numbers_in(params.problem, params.lse.at<T>(), group)
        .for_each(group, 0, group.num_tokens, [&](int64_t token, T* target) {
          *target = lse[token];
          write_softmax_terms<T>(top[0][token], sum[0][token],
                                 params.softmax_terms.at<T>() + 2 * (target - params.lse.at<T>()));
        });
  }

  // Steps 2 to 5, with rows of whole vectors of the compute type.
  void attend(const Group& group, const T* const* keys, const T* const* values, T* const* out) {
    const GridProblem& problem = params.problem;
    const int64_t num_tokens = group.num_tokens;
    const SmallGroupRows<Storage, kTokens>& own = places[which];
    const SmallGroupRows<Storage, kTokens>& ahead = places[1 - which];
    gather_rows_transposed<Storage>([&](int64_t i) { return own.query[i]; }, num_tokens, problem.head_dim,
                                    static_cast<T>(problem.scale * kLog2E), query_tile, kTokens);
    for (int64_t key = 0; key < num_tokens; key += kKeysAtOnce) {
      score_rows<T, kKeysAtOnce, Storage>(keys + key, query_tile, problem.head_dim, scores + key * kTokens,
                                          key == 0 ? ahead.query : ahead.key,
                                          key == 0 && !streams ? own.out : ahead.value);
    }
    if (bias.exists()) {
      write_bias_indices(problem, group, bias_indices);
      add_bias(bias, group.head_idx, bias_indices, bias_indices, num_tokens, num_tokens, scores, kTokens);
    }
    softmax(group, num_tokens);
    if (streams) {
      weigh<true>(values, num_tokens, out);
    } else {
      weigh<false>(values, num_tokens, out);
    }
  }

  template <bool kStreams>
  void weigh(const T* const* values, int64_t num_tokens, T* const* out) const {
    int64_t column = 0;
    for (; column + 4 * kTokens <= padded_dim; column += 4 * kTokens) {
      weigh_rows<kStreams, 4>(values, scores, num_tokens, column, out);
    }
    for (; column < padded_dim; column += kTokens) {
      weigh_rows<kStreams, 1>(values, scores, num_tokens, column, out);
    }
  }

  void attend_converted(const Group& group) {
    const T* keys[kTokens];
    const T* values[kTokens];
    T* out[kTokens];
    convert(group, params.key, converted_keys, keys);
    convert(group, params.value, converted_values, values);
    for (int64_t i = 0; i < kTokens; ++i) out[i] = converted_out + i * padded_dim;
    attend(group, keys, values, out);
    for (int64_t i = 0; i < group.num_tokens; ++i) {
      store_row(out[i], params.problem.head_dim, T(1), places[which].out[i]);
    }
  }

  void attend_in_place_or_converted(const Group& group) {
    if constexpr (std::is_same_v<Storage, T>) {
      const SmallGroupRows<Storage, kTokens>& own = places[which];
      if (params.problem.head_dim == padded_dim) return attend(group, own.key, own.value, own.out);
    }
    attend_converted(group);
  }

  // A group is one piece: all of its queries. `following` is the group of the next call, or null.
  void run(const Group& group, int64_t, int64_t, const Group* following) {
    if (!is_placed) places[which].place(params, group, offsets);
    places[1 - which].place(params, following != nullptr ? *following : group, offsets);
    attend_in_place_or_converted(group);
    which = 1 - which;
    is_placed = following != nullptr;
    if (streams && !is_placed) finish_streaming();
  }
};

}  // namespace topgather::TOPGATHER_CPU_TARGET
