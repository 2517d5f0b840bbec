// Product-key search on the CPU: the best of n * n sums from two lists of n half scores.
//
//   first[i]  = dot(query[: D / 2], keys[h, 0, i])         [n] per token and head
//   second[j] = dot(query[D / 2 :], keys[h, 1, j])         [n]
//   out       = the top_k largest first[i] + second[j], descending, with i * n + j
//
// Of all sums only those of ranks (a, b), counted from 0 in the two sorted lists, with (a + 1) * (b + 1) <= top_k can
// be among the best: any other has top_k sums at least as large, at lower ranks. That is about top_k * ln(top_k) sums
// (119 for 32), and a table that depends on top_k alone.
//
// Who owns what: a task is one (head, kTileTokens tokens) and owns their rows of the result. Steps:
//   1. once per call, keys transposed into column panels of the compute type: [head, half, panel, D / 2, panel width];
//   per task:
//   2. half scores [tokens, n] by the dense micro-kernel, a panel at a time;
//   per token:
//   3. the min(top_k, n) best of each half:
//      a. a lower bound of the last one kept: the minimum of as many group maxima as entries are wanted;
//      b. the entries at or above it, appended to a list by position;
//      c. the bound raised by a few counts over the list until little more than what is wanted is left;
//      d. each survivor's rank by counting who is before it; by a merge sort where ties leave many;
//   4. the sums of the table's ranks, and their best by the same steps; equal sums are put in order of i * n + j;
//   5. scores and indices written;
//   6. where the first or the last of them is not finite, pairs with infinite halves written anew. All their sums are
//      equal and the lower index i * n + j comes first, which ranks of halves say nothing about: with a +inf in either
//      half, the lowest partner of a key need not be the best one. Sums of numbers stay as step 4 ordered them: only
//      top_k - P of them are wanted beside P pairs that rank as +inf, and (a + 1) * (b + 1) counts both.
// Numerics: half scores and sums in float32 (float64 for float64). A NaN half score ranks as +inf, a sum of opposite
// infinities as -inf; the score written is the true sum. Bounds only ever discard what is strictly below them, and each
// leaves at least as many entries as are wanted, so exactness does not depend on how good they are.
// Determinism: a result depends on its own query row and the keys alone.
#pragma once

#include <limits>

#include "../common/parallel.h"
#include "../cpu/convert.h"
#include "../cpu/intrinsics.h"
#include "../cpu/scratch.h"
#include "../cpu/tile_gemm.h"
#include "memory_config.h"
#include "memory_cpu.h"

namespace topgather::TOPGATHER_CPU_TARGET {

// As wide as a score, so that both fill the same lanes.
template <typename T>
using Position = typename VectorTraits<T>::IntegerElement;

// Room for a vector more than `count` can reach: appending writes whole vectors.
template <typename T>
struct ScoreList {
  T* scores;
  Position<T>* positions;
  int64_t count = 0;
};

template <typename T>
struct ScoreBounds {
  T lower;  // at least as many scores as wanted are not below it
  T upper;  // no score but NaN is above it
};

// Where the half scores of a tile come from: keys of one head and half, as step 1 leaves them.
template <typename T>
struct KeyPanels {
  static constexpr int64_t kWidth = kMaxVectorsPerTile * kLanes<T>;

  int64_t num_keys;
  int64_t padded_keys;  // whole vectors; the last panel may be narrower than the others
  int64_t half_dim;
  T* data;

  int64_t num_panels() const { return ceil_div(padded_keys, kWidth); }
  int64_t width_of(int64_t panel) const { return min64(kWidth, padded_keys - panel * kWidth); }
  int64_t elements_of_half() const { return padded_keys * half_dim; }
  T* panel_at(int64_t head, int64_t half, int64_t panel) const {
    return data + (head * 2 + half) * elements_of_half() + panel * kWidth * half_dim;
  }
};

// Step 1.
template <typename Storage>
void pack_keys(const ProductKeyParams& params, const KeyPanels<ComputeOf<Storage>>& panels) {
  using T = ComputeOf<Storage>;
  constexpr int64_t kWidth = KeyPanels<T>::kWidth;
  const int64_t num_tasks = params.num_heads * 2 * panels.num_panels();
  const double num_operations = static_cast<double>(num_tasks * kWidth * params.half_dim);
  for_each_task(useful_threads(params.num_threads, num_tasks, num_operations), num_tasks, [&](int64_t task, int) {
    const int64_t panel = task % panels.num_panels();
    const int64_t half = task / panels.num_panels() % 2;
    const int64_t head = task / panels.num_panels() / 2;
    const Storage* source = params.keys.at<Storage>(head, half, panel * kWidth);
    gather_rows_transposed<Storage>([&](int64_t i) { return source + i * params.keys.strides[2]; },
                                    min64(kWidth, params.num_keys - panel * kWidth), params.half_dim, T(1),
                                    panels.panel_at(head, half, panel), panels.width_of(panel));
  });
}

// Step 3a. Disjoint groups of scores, no fewer than are wanted: a group is one lane of some consecutive vectors.
template <typename T>
inline ScoreBounds<T> bounds_of_best(const T* scores, int64_t num_vectors, int64_t num_wanted) {
  const Vector<T> lowest = broadcast(-std::numeric_limits<T>::infinity());
  const int64_t num_groups = ceil_div(num_wanted, kLanes<T>);
  const int64_t vectors_per_group = num_vectors / num_groups;
  // Groups of one or two find hardly anything to discard.
  if (vectors_per_group < 3) return {lowest[0], lowest[0]};
  Vector<T> upper = lowest;
  Vector<T> lower = -lowest;
  for (int64_t group = 0; group < num_groups; ++group) {
    const T* first = scores + group * vectors_per_group * kLanes<T>;
    const int64_t count = group + 1 == num_groups ? num_vectors - group * vectors_per_group : vectors_per_group;
    Vector<T> even = lowest;
    Vector<T> odd = lowest;
    for (int64_t v = 0; v + 1 < count; v += 2) {
      even = maximum(load<T>(first + v * kLanes<T>), even);
      odd = maximum(load<T>(first + (v + 1) * kLanes<T>), odd);
    }
    if (count % 2 == 1) even = maximum(load<T>(first + (count - 1) * kLanes<T>), even);
    const Vector<T> top = maximum(even, odd);
    upper = maximum(top, upper);
    lower = minimum(top, lower);
  }
  return {reduce_lanes<T>(lower, [](const Vector<T>& a, const Vector<T>& b) { return minimum(a, b); }),
          largest_lane<T>(upper)};
}

template <typename T>
inline IntegerVector<T> lane_numbers() {
  return [&]<int... kLane>(std::integer_sequence<int, kLane...>) {
    return IntegerVector<T>{kLane...};
  }(std::make_integer_sequence<int, kLanes<T>>{});
}

// Step 3b. Scores past `count` are padding, -inf.
template <typename T>
inline void keep_best(const T* scores, int64_t count, T bound, ScoreList<T>& list) {
  const int64_t padded = round_up(count, kLanes<T>);
  IntegerVector<T> positions = lane_numbers<T>();
  list.count = 0;
  for (int64_t i = 0; i < padded; i += kLanes<T>) {
    list.count +=
        append_not_below(load<T>(scores + i), bound, positions, list.scores + list.count, list.positions + list.count);
    positions += kLanes<T>;
  }
  if (bound == -std::numeric_limits<T>::infinity()) list.count -= padded - count;
}

template <typename T>
inline void pad_list(const ScoreList<T>& list) {
  store<T>(list.scores + list.count, broadcast(-std::numeric_limits<T>::infinity()));
}

// Close enough to place a guess: the exponent, and the mantissa as if it were the logarithm's fraction.
inline float rough_log2(int64_t count) {
  return static_cast<float>(bit_cast<int32_t>(static_cast<float>(count))) * 0x1p-23f;
}

// Step 3c. Scores of a tail thin out about exponentially, so the guess is where a straight line through the logarithms
// of two counts reaches the one aimed at; every third is the middle, whatever the scores are like.
template <typename T>
inline void tighten(ScoreList<T>& list, int64_t num_wanted, ScoreBounds<T> bounds) {
  const int64_t acceptable = round_up(num_wanted + num_wanted / 8, kLanes<T>);
  if (list.count <= acceptable) return;
  pad_list(list);
  const float aim = rough_log2((num_wanted + acceptable) / 2);
  float min_log = rough_log2(list.count);
  float max_log = rough_log2(1);
  int64_t num_left = list.count;
  for (int pass = 0; pass < ProductKeyConfig::kMaxGuesses && num_left > acceptable; ++pass) {
    const float share = pass % 3 == 2 ? 0.5f : (min_log - aim) / (min_log - max_log);
    const T guess = bounds.lower + (bounds.upper - bounds.lower) * static_cast<T>(share);
    if (!(guess > bounds.lower && guess < bounds.upper)) break;
    IntegerVector<T> counts{};
    for (int64_t i = 0; i < list.count; i += kLanes<T>) {
      counts = load<T>(list.scores + i) >= broadcast(guess) ? counts + 1 : counts;
    }
    int64_t count = 0;
    for (int lane = 0; lane < kLanes<T>; ++lane) count += counts[lane];
    if (count >= num_wanted) {
      bounds.lower = guess;
      num_left = count;
      min_log = rough_log2(count);
    } else {
      bounds.upper = guess;
      max_log = rough_log2(max64(count, 1));
    }
  }
  if (num_left == list.count) return;
  // In place: what is written never passes what was read.
  ScoreList<T> kept{list.scores, list.positions};
  for (int64_t i = 0; i < list.count; i += kLanes<T>) {
    kept.count += append_not_below(load<T>(list.scores + i), bounds.lower, load<Position<T>>(list.positions + i),
                                   list.scores + kept.count, list.positions + kept.count);
  }
  list.count = kept.count;
}

// Step 3d, few entries. Among equals the earlier in the list comes first.
template <typename T>
inline void sort_by_counting(const ScoreList<T>& list, ScoreList<T>& sorted) {
  const IntegerVector<T> lanes = lane_numbers<T>();
  pad_list(list);
  for (int64_t first = 0; first < list.count; first += kLanes<T>) {
    const Vector<T> scores = load<T>(list.scores + first);
    const int64_t last = min64(first + kLanes<T>, list.count);
    IntegerVector<T> ranks{};
    int64_t i = 0;
    for (; i < first; ++i) ranks = broadcast(list.scores[i]) >= scores ? ranks + 1 : ranks;
    for (; i < last; ++i) {
      const Vector<T> other = broadcast(list.scores[i]);
      const IntegerVector<T> earlier = static_cast<Position<T>>(i - first) < lanes;
      ranks = ((other > scores) | ((other == scores) & earlier)) ? ranks + 1 : ranks;
    }
    for (; i < list.count; ++i) ranks = broadcast(list.scores[i]) > scores ? ranks + 1 : ranks;
    alignas(kVectorBytes) Position<T> rank_of[kLanes<T>];
    store<Position<T>>(rank_of, ranks);
    for (int64_t j = first; j < last; ++j) {
      const Position<T> rank = rank_of[j - first];
      sorted.scores[rank] = list.scores[j];
      sorted.positions[rank] = list.positions[j];
    }
  }
  sorted.count = list.count;
}

// Step 3d, many entries, and whenever order depends on more than the score: equals ascend by order_of(position).
// Runs that are in order already are left alone, so a list of nothing but equals costs little.
template <typename T, typename OrderOf>
void sort_by_merging(const ScoreList<T>& list, const ScoreList<T>& scratch, const OrderOf& order_of) {
  const auto is_after = [&](T score, Position<T> position, T other, Position<T> other_position) {
    return score < other || (score == other && order_of(position) > order_of(other_position));
  };
  for (int64_t width = 1; width < list.count; width *= 2) {
    for (int64_t start = 0; start + width < list.count; start += 2 * width) {
      const int64_t middle = start + width;
      const int64_t end = min64(middle + width, list.count);
      if (!is_after(list.scores[middle - 1], list.positions[middle - 1], list.scores[middle], list.positions[middle])) {
        continue;
      }
      for (int64_t i = 0; i < width; ++i) {
        scratch.scores[i] = list.scores[start + i];
        scratch.positions[i] = list.positions[start + i];
      }
      int64_t left = 0;
      int64_t right = middle;
      for (int64_t target = start; left < width; ++target) {
        const bool takes_right = right < end && is_after(scratch.scores[left], scratch.positions[left],
                                                         list.scores[right], list.positions[right]);
        const ScoreList<T>& source = takes_right ? list : scratch;
        int64_t& next = takes_right ? right : left;
        list.scores[target] = source.scores[next];
        list.positions[target] = source.positions[next];
        ++next;
      }
    }
  }
}

// Steps 3b to 3d: at least the num_wanted best of `count` scores, sorted. `list` is scratch.
template <typename T, typename OrderOf>
inline void sorted_best(const T* scores, int64_t count, int64_t num_wanted, const ScoreBounds<T>& bounds,
                        const OrderOf& order_of, ScoreList<T>& list, ScoreList<T>& sorted) {
  keep_best(scores, count, bounds.lower, list);
  for (int64_t i = 0; i < list.count; i += kLanes<T>) {
    const Vector<T> score = load<T>(list.scores + i);
    store<T>(list.scores + i, score == score ? score : broadcast(std::numeric_limits<T>::infinity()));
  }
  tighten(list, num_wanted, bounds);
  if (list.count <= ProductKeyConfig::kMaxCounted) {
    sort_by_counting(list, sorted);
  } else {
    sort_by_merging(list, sorted, order_of);
    for (int64_t i = 0; i < num_wanted; ++i) {
      sorted.scores[i] = list.scores[i];
      sorted.positions[i] = list.positions[i];
    }
    sorted.count = num_wanted;
  }
}

// What a half score ranks as: -1 for -inf, 0 for a number, 1 for +inf and NaN.
template <typename T>
inline int kind_of(T score) {
  return score - score == 0 ? 0 : score < 0 ? -1 : 1;
}
inline int kind_of_pair(int first, int second) {
  return first < 0 || second < 0 ? -1 : first > second ? first : second;
}

// The pairs of ranks that can win, those of a first rank together, second ranks ascending.
struct RankPairs {
  int64_t list_length;  // ranks of a half
  int64_t num_pairs;
  int32_t* starts;  // [list_length + 1] the first pair of each first rank
  int32_t* first;   // [num_pairs]
  int32_t* second;  // [num_pairs]

  int64_t pairs_of(int64_t top_k, int64_t first_rank) const { return min64(list_length, top_k / (first_rank + 1)); }
  size_t num_integers() const { return static_cast<size_t>(list_length + 1 + 2 * num_pairs); }

  void fill(int64_t top_k, int32_t* memory) {
    starts = memory;
    first = starts + list_length + 1;
    second = first + num_pairs;
    starts[0] = 0;
    for (int64_t a = 0; a < list_length; ++a) {
      const int64_t count = pairs_of(top_k, a);
      for (int64_t b = 0; b < count; ++b) {
        first[starts[a] + b] = static_cast<int32_t>(a);
        second[starts[a] + b] = static_cast<int32_t>(b);
      }
      starts[a + 1] = starts[a] + static_cast<int32_t>(count);
    }
  }
};

template <typename Storage>
struct ProductKeyTask {
  using T = ComputeOf<Storage>;
  static constexpr int64_t kTileTokens = ProductKeyConfig::kTileTokens;

  const ProductKeyParams& params;
  const KeyPanels<T>& panels;
  const RankPairs& pairs;

  // Scratch of one worker.
  T* query_tile;         // [kTileTokens, D / 2] of 16-bit queries
  T* half_scores[2];     // [kTileTokens, padded keys]
  T* sums;               // [num_pairs]
  ScoreList<T> best[2];  // of the halves
  ScoreList<T> list;     // of either
  ScoreList<T> sorted;   // of the sums

  // Every list ends in room for the vector that appending and padding may write past it.
  ProductKeyTask(const ProductKeyParams& p, const KeyPanels<T>& key_panels, const RankPairs& rank_pairs,
                 ScratchCutter& scratch)
      : params(p), panels(key_panels), pairs(rank_pairs) {
    const auto take_list = [&](int64_t count) {
      T* scores = scratch.take<T>(count + kLanes<T>);
      return ScoreList<T>{scores, scratch.take<Position<T>>(count + kLanes<T>)};
    };
    query_tile = scratch.take<T>(kTileTokens * p.half_dim);
    for (T*& tile : half_scores) tile = scratch.take<T>(kTileTokens * panels.padded_keys);
    sums = scratch.take<T>(pairs.num_pairs + kLanes<T>);
    for (ScoreList<T>& half : best) half = take_list(panels.padded_keys);
    const int64_t max_listed = max64(panels.padded_keys, round_up(pairs.num_pairs, kLanes<T>));
    list = take_list(max_listed);
    sorted = take_list(max_listed);
  }

  // Step 2 for `count` tokens of a head.
  void score(int64_t head, int64_t half, int64_t first_token, int64_t count) {
    const int64_t half_dim = params.half_dim;
    const Storage* query = params.query.at<Storage>(first_token, head, half);
    const RowBlock<T> queries = dense_rows(query, params.query.strides[0], count, half_dim, half_dim, query_tile);
    T* scores = half_scores[half];
    for (int64_t panel = 0; panel < panels.num_panels(); ++panel) {
      const int64_t width = panels.width_of(panel);
      const GemmOperands<T> product{queries.data,
                                    queries.row_stride,
                                    1,
                                    panels.panel_at(head, half, panel),
                                    width,
                                    scores + panel * KeyPanels<T>::kWidth,
                                    panels.padded_keys,
                                    half_dim};
      tile_gemm<false>(product, count, width);
    }
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t key = params.num_keys; key < panels.padded_keys; ++key) {
        scores[i * panels.padded_keys + key] = -std::numeric_limits<T>::infinity();
      }
    }
  }

  // Step 4, the sums. Each rank's are written in whole vectors, and what is too much the next rank writes over.
  ScoreBounds<T> add_pairs() {
    const T lowest = -std::numeric_limits<T>::infinity();
    const T* first = best[0].scores;
    const T* second = best[1].scores;
    for (int64_t a = 0; a < pairs.list_length; ++a) {
      const int64_t count = pairs.starts[a + 1] - pairs.starts[a];
      for (int64_t b = 0; b < count; b += kLanes<T>) {
        const Vector<T> sum = first[a] + load<T>(second + b);
        store<T>(sums + pairs.starts[a] + b, sum == sum ? sum : broadcast(lowest));
      }
    }
    store<T>(sums + pairs.num_pairs, broadcast(lowest));
    // All pairs of the first A and first B ranks have at least the sum of the last of both: top_k where A * B is that.
    T bound = lowest;
    int64_t num_first = 1;
    for (int shift = 0; num_first <= pairs.list_length; ++shift, num_first *= 2) {
      const int64_t num_second = (params.top_k + num_first - 1) >> shift;
      if (num_second > pairs.list_length) continue;
      const T sum = first[num_first - 1] + second[num_second - 1];
      bound = sum > bound ? sum : bound;
    }
    return {bound, sums[0]};
  }

  // Equal sums of the sorted list stand in the order of their ranks; returns whether there are any.
  bool has_equals() const {
    const int64_t last = sorted.count - 1;
    IntegerVector<T> equal{};
    int64_t i = 0;
    for (; i + kLanes<T> <= last; i += kLanes<T>) {
      equal |= load<T>(sorted.scores + i) == load<T>(sorted.scores + i + 1);
    }
    bool found = any_lane(equal);
    for (; i < last; ++i) found |= sorted.scores[i] == sorted.scores[i + 1];
    return found;
  }

  // The lowest pairs whose sum ranks as +inf (kind 1) or -inf (kind -1), from the `count`-th place of the result on.
  void append_infinite(int kind, const T* const (&rows)[2], T* scores, int64_t* indices, int64_t& count) const {
    bool is_found[3] = {};  // a second half of kind k at k + 1
    for (int64_t j = 0; j < params.num_keys; ++j) is_found[kind_of(rows[1][j]) + 1] = true;
    for (int64_t i = 0; i < params.num_keys && count < params.top_k; ++i) {
      const int first = kind_of(rows[0][i]);
      bool has_partner = false;
      for (int second = -1; second <= 1; ++second) {
        has_partner |= is_found[second + 1] && kind_of_pair(first, second) == kind;
      }
      if (!has_partner) continue;
      for (int64_t j = 0; j < params.num_keys && count < params.top_k; ++j) {
        if (kind_of_pair(first, kind_of(rows[1][j])) != kind) continue;
        scores[count] = rows[0][i] + rows[1][j];
        indices[count] = i * params.num_keys + j;
        ++count;
      }
    }
  }

  // Step 6.
  void write_infinite(const T* const (&rows)[2], T* scores, int64_t* indices) const {
    int64_t count = 0;
    append_infinite(1, rows, scores, indices, count);
    for (int64_t rank = 0; rank < params.top_k && count < params.top_k; ++rank) {
      const int64_t pair = sorted.positions[rank];
      const int64_t first = best[0].positions[pairs.first[pair]];
      const int64_t second = best[1].positions[pairs.second[pair]];
      if (kind_of(rows[0][first]) != 0 || kind_of(rows[1][second]) != 0) continue;
      scores[count] = rows[0][first] + rows[1][second];
      indices[count] = first * params.num_keys + second;
      ++count;
    }
    append_infinite(-1, rows, scores, indices, count);
  }

  // Steps 3 to 6 for one token: the i-th of a tile.
  void search(int64_t i, T* scores, int64_t* indices) {
    const int64_t num_keys = params.num_keys;
    const T* rows[2];
    for (int half = 0; half < 2; ++half) {
      rows[half] = half_scores[half] + i * panels.padded_keys;
      const ScoreBounds<T> bounds = bounds_of_best(rows[half], panels.padded_keys / kLanes<T>, pairs.list_length);
      sorted_best(rows[half], num_keys, pairs.list_length, bounds, [](int64_t key) { return key; }, list, best[half]);
    }
    const auto index_of = [&](int64_t pair) {
      return static_cast<int64_t>(best[0].positions[pairs.first[pair]]) * num_keys +
             best[1].positions[pairs.second[pair]];
    };
    const ScoreBounds<T> bounds = add_pairs();
    sorted_best(sums, pairs.num_pairs, params.top_k, bounds, index_of, list, sorted);
    if (has_equals()) sort_by_merging(sorted, list, index_of);
    for (int64_t rank = 0; rank < params.top_k; ++rank) {
      const int64_t pair = sorted.positions[rank];
      const int64_t first = best[0].positions[pairs.first[pair]];
      const int64_t second = best[1].positions[pairs.second[pair]];
      const T sum = sorted.scores[rank];
      scores[rank] = sum - sum == 0 ? sum : rows[0][first] + rows[1][second];
      indices[rank] = first * num_keys + second;
    }
    if (kind_of(scores[0]) != 0 || kind_of(scores[params.top_k - 1]) != 0) write_infinite(rows, scores, indices);
  }

  void run(int64_t head, int64_t first_token) {
    const int64_t count = min64(kTileTokens, params.num_tokens - first_token);
    score(head, 0, first_token, count);
    score(head, 1, first_token, count);
    for (int64_t i = 0; i < count; ++i) {
      search(i, params.scores.at<T>(first_token + i, head), params.indices.at<int64_t>(first_token + i, head));
    }
  }
};

template <typename Storage>
void product_key_topk_storage(const ProductKeyParams& params) {
  using T = ComputeOf<Storage>;
  using Task = ProductKeyTask<Storage>;
  if (params.num_tokens == 0 || params.num_heads == 0) return;

  KeyPanels<T> panels{params.num_keys, round_up(params.num_keys, kLanes<T>), params.half_dim, nullptr};
  const AlignedBuffer panel_buffer =
      allocate_aligned(static_cast<size_t>(params.num_heads * 2 * panels.elements_of_half()) * sizeof(T));
  panels.data = reinterpret_cast<T*>(panel_buffer.get());
  pack_keys<Storage>(params, panels);

  RankPairs pairs{min64(params.top_k, params.num_keys), 0, nullptr, nullptr, nullptr};
  for (int64_t a = 0; a < pairs.list_length; ++a) pairs.num_pairs += pairs.pairs_of(params.top_k, a);
  const AlignedBuffer pair_buffer = allocate_aligned(pairs.num_integers() * sizeof(int32_t));
  pairs.fill(params.top_k, reinterpret_cast<int32_t*>(pair_buffer.get()));

  const int64_t tiles_per_head = ceil_div(params.num_tokens, Task::kTileTokens);
  const int64_t num_tasks = params.num_heads * tiles_per_head;
  const double operations_per_row = 2.0 * static_cast<double>(params.num_keys) * static_cast<double>(params.half_dim) +
                                    8.0 * static_cast<double>(pairs.num_pairs);
  const int num_workers = useful_threads(
      params.num_threads, num_tasks, static_cast<double>(params.num_tokens * params.num_heads) * operations_per_row);
  const WorkerScratch scratch(num_workers, [&](ScratchCutter& cutter) { Task(params, panels, pairs, cutter); });

  // Tiles of a head follow each other, so that its panels stay in cache.
  for_each_task(num_workers, num_tasks, [&](int64_t task, int worker) {
    ScratchCutter cutter = scratch.of(worker);
    Task search(params, panels, pairs, cutter);
    search.run(task / tiles_per_head, task % tiles_per_head * Task::kTileTokens);
  });
}

}  // namespace topgather::TOPGATHER_CPU_TARGET
