// Which blocks can be among a query's best, by products of bytes with a proven bound: the exact scores of a few, the
// choice of all. docs/routing-bounds.md has the proof.
//
//   With mu any vector, t_d > 0 and s > 0:     c_jd = mu_d + t_d (b_jd + r_jd)      b integers, at most 127
//                                              q_d t_d = s (a_d + u_d)              a integers, at most 127
//   dot(q, c_j) - dot(q, mu) = s (dot(a, b_j) + e_j),    |e_j| <= |u| |b_j| + |q t / s| |r_j|
//
// The first term of the right side is the same for all blocks, so a query's blocks rank as dot(a, b_j) + e_j do, in
// integers, up to the rounding of the score's own sum, which the bound includes: E_j. Of k blocks of which no dot(a,
// b_j) - E_j is below T, every one scores more than a block i with dot(a, b_i) + E_i < T, strictly, so i is not among
// the k best whatever ties there are. Blocks that remain are scored by sums in another order, F off at most from
// RouteTask's; only where these leave a doubt, in its order, to the last bit.
//
// Who owns what: a tile of 64 queries, in vector lanes, as RouteTask has it. Rows of bytes come in groups of kRows and
// stretches of kGroupsPerStretch groups; E of a stretch is the largest of its rows'. Steps:
//   1. queries to bytes, |u|, |q t / s| of each;
//   2. a group's largest product with every query, in registers: all that is written of a product;
//   3. T: the k-th best of stretches' largest products less E. Of as many stretches there is a block each;
//   4. groups with a product of at least T - E, a list a query;
//   5. of these the products once more, row by row: candidates;
//   6. scores of candidates, the best of them.
// What has no bound (a number that is not finite, or out of FilterRange) and what has too many candidates (equal
// scores) is refused, and RouteTask scores all blocks of the tile.
#pragma once

#include <cmath>
#include <limits>

#include "../common/cpu_target.h"
#include "../cpu/convert.h"
#include "../cpu/intrinsics.h"
#include "../cpu/scratch.h"
#include "moba_config.h"

namespace topgather::TOPGATHER_CPU_TARGET {

#if defined(__AVX512F__)
#define TOPGATHER_FILTERS_ROUTES 1
#else
#define TOPGATHER_FILTERS_ROUTES 0
#endif

// Of computations in float32 on numbers within these, nothing overflows, and what underflows is far below a unit of
// bytes.
struct FilterRange {
  static constexpr float kMax = 1e10f;
  static constexpr float kMinQuery = 1e-15f;
  static constexpr float kMinProduct = 1e-20f;  // q_d t_d
  static constexpr float kMinScale = 1e-30f;    // t_d
  static constexpr int64_t kMaxHeadDim = 4096;  // sums of products of bytes stay below 2^28
};

// A head's centroids as bytes, from the first that is chosen by score on.
struct ByteCentroids {
  static constexpr int64_t kRows = 6;
  static constexpr int64_t kGroupsPerStretch = 4;
  static constexpr int64_t kRowsPerStretch = kRows * kGroupsPerStretch;

  struct Norms {
    float bytes;      // max |b_j|
    float residuals;  // max |r_j|
    float rows;       // max |c_j|
  };

  uint8_t* rows = nullptr;  // [padded rows, row_stride], b + 128; 0 from head_dim on
  float* scales = nullptr;  // [D], t_d, 0 where all centroids are equal
  float* work = nullptr;    // [3, D]
  Norms* norms = nullptr;   // [stretches + 1], the last one those of all rows
  int64_t row_stride = 0;   // bytes, a multiple of 64
  bool* usable = nullptr;   // whether a bound holds

  void take(int64_t num_rows, int64_t head_dim, ScratchCutter& cutter) {
    const int64_t num_stretches = ceil_div(num_rows, kRowsPerStretch);
    row_stride = round_up(head_dim, 64);
    rows = cutter.take<uint8_t>(num_stretches * kRowsPerStretch * row_stride);
    scales = cutter.take<float>(head_dim);
    work = cutter.take<float>(3 * head_dim);
    norms = cutter.take<Norms>(num_stretches + 1);
    num_stretches_ = num_stretches;
    usable = cutter.take<bool>(1);
  }

  void fill(const float* centroids, int64_t num_rows, int64_t head_dim) const {
    float* mean = work;
    float* largest = work + head_dim;
    float* inverse = work + 2 * head_dim;
    *usable = false;
    if (!all_finite(centroids, head_dim, num_rows, head_dim)) return;
    for (int64_t d = 0; d < head_dim; ++d) mean[d] = largest[d] = 0;
    float largest_number = 0;
    for (int64_t j = 0; j < num_rows; ++j) {
      for (int64_t d = 0; d < head_dim; ++d) mean[d] += centroids[j * head_dim + d];
    }
    for (int64_t d = 0; d < head_dim; ++d) mean[d] /= static_cast<float>(num_rows);
    for (int64_t j = 0; j < num_rows; ++j) {
      for (int64_t d = 0; d < head_dim; ++d) {
        const float number = centroids[j * head_dim + d];
        largest_number = std::fabs(number) > largest_number ? std::fabs(number) : largest_number;
        const float distance = std::fabs(number - mean[d]);
        largest[d] = distance > largest[d] ? distance : largest[d];
      }
      if (largest_number > FilterRange::kMax) return;
    }
    for (int64_t d = 0; d < head_dim; ++d) {
      scales[d] = largest[d] / 127;
      if (scales[d] != 0 && scales[d] < FilterRange::kMinScale) return;
      inverse[d] = scales[d] == 0 ? 0 : 1 / scales[d];
    }
    const float slack = 1 + static_cast<float>(head_dim) * 0x1p-22f;  // of sums in float32
    const float rounding = std::sqrt(static_cast<float>(head_dim)) * 3e-5f;
    Norms& of_all = norms[num_stretches_];
    of_all = {0, 0, 0};
    for (int64_t stretch = 0; stretch < num_stretches_; ++stretch) {
      float bytes = 0, residuals = 0, numbers = 0;
      for (int64_t j = stretch * kRowsPerStretch; j < (stretch + 1) * kRowsPerStretch; ++j) {
        uint8_t* row = rows + j * row_stride;
        for (int64_t d = 0; d < row_stride; ++d) row[d] = 0;
        if (j >= num_rows) continue;
        float row_bytes = 0, row_residuals = 0, row_numbers = 0;
        for (int64_t d = 0; d < head_dim; ++d) {
          const float number = centroids[j * head_dim + d];
          const float scaled = (number - mean[d]) * inverse[d];
          const float rounded = (scaled + 12582912.0f) - 12582912.0f;
          row[d] = static_cast<uint8_t>(static_cast<int32_t>(rounded) + 128);
          row_bytes += rounded * rounded;
          row_residuals += (scaled - rounded) * (scaled - rounded);
          row_numbers += number * number;
        }
        bytes = row_bytes > bytes ? row_bytes : bytes;
        residuals = row_residuals > residuals ? row_residuals : residuals;
        numbers = row_numbers > numbers ? row_numbers : numbers;
      }
      norms[stretch] = {std::sqrt(bytes) * slack, std::sqrt(residuals) * slack + rounding, std::sqrt(numbers) * slack};
      of_all.rows = norms[stretch].rows > of_all.rows ? norms[stretch].rows : of_all.rows;
    }
    *usable = true;
  }

  float largest_norm() const { return norms[num_stretches_].rows; }

 private:
  int64_t num_stretches_ = 0;
};

#if TOPGATHER_FILTERS_ROUTES

// A worker's tile. Filters where there are enough blocks for the lists to be short beside them.
class RouteFilter {
 public:
  using Integers = IntegerVector<float>;
  static constexpr int64_t kLanesPerVector = kLanes<float>;
  static constexpr int kVectors = MobaRouteConfig::kVectorsPerTile;
  static constexpr int64_t kTileQueries = kVectors * kLanesPerVector;
  static constexpr int64_t kRows = ByteCentroids::kRows;
  static constexpr int64_t kGroupsPerStretch = ByteCentroids::kGroupsPerStretch;
  static constexpr int64_t kMaxGroups = MobaRouteConfig::kMaxFilteredGroups;  // a query's
  static constexpr int64_t kMaxCandidates = MobaRouteConfig::kMaxCandidates;

  static bool serves(int64_t num_rows, int64_t list_length, int64_t head_dim) {
    return multiplies_bytes() && list_length > 0 && head_dim <= FilterRange::kMaxHeadDim &&
           list_length <= MobaRouteConfig::kMaxFilteredList && num_rows >= min_rows(list_length);
  }
  // Stretches enough that the k-th best of them is near to the k-th best block.
  static int64_t min_rows(int64_t list_length) {
    return max64(MobaRouteConfig::kMinFilteredBlocks, 2 * list_length * ByteCentroids::kRowsPerStretch);
  }

  void take(int64_t max_rows, int64_t num_best, int64_t depth, ScratchCutter& cutter) {
    list_length_ = num_best;
    head_dim_ = depth;
    const int64_t num_stretches = ceil_div(max_rows, ByteCentroids::kRowsPerStretch);
    column_bytes_ = round_up(depth, 64);
    quads_ = cutter.take<int8_t>(kTileQueries * column_bytes_);
    columns_ = cutter.take<int8_t>(kTileQueries * column_bytes_);
    maxima_ = cutter.take<int32_t>(num_stretches * kGroupsPerStretch * kTileQueries);
    errors_ = cutter.take<int32_t>(num_stretches * kTileQueries);
    bounds_ = cutter.take<int32_t>(num_stretches * kTileQueries);
    best_ = cutter.take<Integers>(num_best * kVectors);
    passed_ = cutter.take<int32_t>((kMaxGroups + kGroupsPerStretch + 1) * kLanesPerVector);
    groups_ = cutter.take<int32_t>(kTileQueries * kMaxGroups);
    padded_depth_ = round_up(depth, kLanesPerVector);
    query_rows_ = cutter.take<float>(kTileQueries * padded_depth_);
    rescored_ = cutter.take<float>(depth * kLanesPerVector);
  }

  // The best list_length rows of each of `count` queries, the i-th of which may choose of the first end[i]; query_tile
  // [D, kTileQueries]. False where there is no bound, or too little of it; nothing is to be used then.
  bool select(const ByteCentroids& bytes, const float* centroids, const float* query_tile, int64_t count,
              const int64_t* end) {
    int64_t min_end = std::numeric_limits<int64_t>::max(), max_end = 0;
    for (int64_t i = 0; i < count; ++i) {
      min_end = min64(min_end, end[i]);
      max_end = max64(max_end, end[i]);
    }
    if (min_end < min_rows(list_length_) || !*bytes.usable || !queries_to_bytes(bytes, query_tile)) return false;
    const int64_t full_groups = min_end / kRows;
    group_maxima_of_byte_products<kRows, kVectors>(bytes.rows, bytes.row_stride, full_groups, quads_,
                                                   ceil_div(head_dim_, 4), maxima_);
    bound_stretches(bytes, full_groups, ceil_div(max_end, ByteCentroids::kRowsPerStretch));
    if (!list_groups(full_groups, ceil_div(max_end, kRows))) return false;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t num_candidates = list_candidates(bytes, i, end[i]);
      if (num_candidates < 0) return false;
      choose(centroids, query_tile + i, i, num_candidates);
    }
    return true;
  }

  const int32_t* chosen(int64_t lane) const { return chosen_[lane]; }  // [list_length] rows, ascending

 private:
  // Step 1.
  bool queries_to_bytes(const ByteCentroids& bytes, const float* query_tile) {
    const int64_t padded = round_up(head_dim_, 4);
    for (int v = 0; v < kVectors; ++v) {
      Vector<float> largest{}, largest_query{}, sum{};
      for (int64_t d = 0; d < head_dim_; ++d) {
        const Vector<float> number = load<float>(query_tile + d * kTileQueries + v * kLanesPerVector);
        const Vector<float> magnitude = maximum(number, -number);
        sum += magnitude;
        largest_query = maximum(largest_query, magnitude);
        largest = maximum(largest, magnitude * bytes.scales[d]);
      }
      const Integers is_usable = (sum <= broadcast(FilterRange::kMax)) & (largest_query >= FilterRange::kMinQuery) &
                                 (largest >= FilterRange::kMinProduct);
      if (any_lane(~is_usable)) return false;
      const Vector<float> inverse = 127.0f / largest;  // 1 / s
      Vector<float> residuals{}, products{}, numbers{};
      for (int64_t first = 0; first < padded; first += 4) {
        Integers quad{};
        for (int64_t i = 0; i < min64(4, head_dim_ - first); ++i) {
          const int64_t d = first + i;
          const Vector<float> number = load<float>(query_tile + d * kTileQueries + v * kLanesPerVector);
          const Vector<float> scaled = number * bytes.scales[d] * inverse;
          const Vector<float> shifted = scaled + 12582912.0f;
          const Vector<float> residual = scaled - (shifted - 12582912.0f);
          residuals += residual * residual;
          products += scaled * scaled;
          numbers += number * number;
          quad |= (bit_cast<Integers>(shifted) & 0xff) << static_cast<int>(8 * i);
        }
        store(quads_ + (first / 4 * kVectors + v) * 64, quad);
        for (int lane = 0; lane < kLanesPerVector; ++lane) {
          const int32_t word = quad[lane];
          std::memcpy(columns_ + (v * kLanesPerVector + lane) * column_bytes_ + first, &word, sizeof(word));
        }
      }
      for (int64_t d = padded; d < column_bytes_; d += 4) {
        for (int lane = 0; lane < kLanesPerVector; ++lane) {
          std::memset(columns_ + (v * kLanesPerVector + lane) * column_bytes_ + d, 0, 4);
        }
      }
      for (int64_t d = 0; d < padded_depth_; d += kLanesPerVector) {
        Vector<float> square[kLanesPerVector];
        for (int64_t i = 0; i < kLanesPerVector; ++i) {
          square[i] = d + i < head_dim_ ? load<float>(query_tile + (d + i) * kTileQueries + v * kLanesPerVector)
                                        : Vector<float>{};
        }
        transpose_in_registers<float>(square);
        for (int64_t i = 0; i < kLanesPerVector; ++i) {
          store<float>(query_rows_ + (v * kLanesPerVector + i) * padded_depth_ + d, square[i]);
        }
      }
      const float depth = static_cast<float>(head_dim_), slack = 1 + depth * 0x1p-22f;
      for (int lane = 0; lane < kLanesPerVector; ++lane) {
        residual_norms_[v][lane] = std::sqrt(residuals[lane]) * slack + std::sqrt(depth) * 3e-5f;
        product_norms_[v][lane] = std::sqrt(products[lane]) * slack;
        // The score's own sum is off by at most D * 2^-24 of |q| |c|, and a little.
        const float norm = std::sqrt(numbers[lane]) * slack;
        query_norms_[v][lane] = norm * inverse[lane] * depth * 0x1p-23f;
        // And a sum in another order by as much, of which what is below the normal numbers may be lost.
        score_errors_[v * kLanesPerVector + lane] =
            norm * bytes.largest_norm() * (depth + 8) * 0x1p-22f + depth * 4e-38f;
      }
    }
    return true;
  }

  // Step 3. Stretches past the full groups have an E too.
  void bound_stretches(const ByteCentroids& bytes, int64_t full_groups, int64_t num_stretches) {
    constexpr int32_t kLowest = -(1 << 30);
    for (int64_t i = 0; i < list_length_ * kVectors; ++i) best_[i] = Integers{} + kLowest;
    for (int64_t stretch = 0; stretch < num_stretches; ++stretch) {
      const ByteCentroids::Norms norms = bytes.norms[stretch];
      const int64_t first = stretch * kGroupsPerStretch;
      const int64_t last = min64(first + kGroupsPerStretch, full_groups);
      for (int v = 0; v < kVectors; ++v) {
        const Vector<float> error =
            residual_norms_[v] * norms.bytes + product_norms_[v] * norms.residuals + query_norms_[v] * norms.rows;
        const Integers whole = __builtin_convertvector(minimum(error * 1.0001f + 2.0f, broadcast(0x1p29f)), Integers);
        store(errors_ + (stretch * kVectors + v) * kLanesPerVector, whole);
        if (first >= last) continue;
        Integers largest = load_integers(maxima_, first * kVectors + v);
        for (int64_t group = first + 1; group < last; ++group) {
          largest = maximum(largest, load_integers(maxima_, group * kVectors + v));
        }
        Integers rest = largest - whole;
        for (int64_t rank = 0; rank < list_length_; ++rank) {
          Integers& here = best_[rank * kVectors + v];
          const Integers larger = maximum(here, rest);
          rest = minimum(here, rest);
          here = larger;
        }
      }
    }
    for (int64_t stretch = 0; stretch < num_stretches; ++stretch) {
      for (int v = 0; v < kVectors; ++v) {
        const Integers bound =
            best_[(list_length_ - 1) * kVectors + v] - load_integers(errors_, stretch * kVectors + v);
        store(bounds_ + (stretch * kVectors + v) * kLanesPerVector, bound);
      }
    }
  }

  // Step 4. Groups that not every query may choose from wholly are candidates of all. What passes is first written in
  // the order of groups, whether something does or not, for a branch would be mispredicted, and then given to its
  // query.
  bool list_groups(int64_t full_groups, int64_t num_groups) {
    for (int64_t lane = 0; lane < kTileQueries; ++lane) num_groups_[lane] = 0;
    Integers lane_numbers;
    for (int lane = 0; lane < kLanesPerVector; ++lane) lane_numbers[lane] = lane;
    for (int v = 0; v < kVectors; ++v) {
      int64_t count = 0;
      for (int64_t first = 0; first < full_groups; first += kGroupsPerStretch) {
        const Integers bounds = load_integers(bounds_, first / kGroupsPerStretch * kVectors + v);
        for (int64_t group = first; group < min64(first + kGroupsPerStretch, full_groups); ++group) {
          const uint32_t passing = lanes_not_below(load_integers(maxima_, group * kVectors + v), bounds);
          store_lanes(passed_ + count, passing, lane_numbers + static_cast<int32_t>(group * kLanesPerVector));
          count += __builtin_popcount(passing);
        }
        if (count > kMaxGroups * kLanesPerVector) return false;
      }
      for (int64_t i = 0; i < count; ++i) {
        const int64_t lane = v * kLanesPerVector + passed_[i] % kLanesPerVector;
        const int64_t place = num_groups_[lane]++;
        groups_[lane * kMaxGroups + min64(place, kMaxGroups - 1)] = passed_[i] / static_cast<int>(kLanesPerVector);
      }
    }
    for (int64_t lane = 0; lane < kTileQueries; ++lane) {
      if (num_groups_[lane] + num_groups - full_groups > kMaxGroups) return false;
      for (int64_t group = full_groups; group < num_groups; ++group) {
        groups_[lane * kMaxGroups + num_groups_[lane]++] = static_cast<int32_t>(group);
      }
    }
    return true;
  }

  // Step 5: rows whose own product passes, ascending; there are list_length at least. Returns how many, -1 where they
  // are too many.
  TOPGATHER_MULTIPLIES_BYTES int64_t list_candidates(const ByteCentroids& bytes, int64_t lane, int64_t end) {
    int64_t count = 0;
    for (int64_t i = 0; i < num_groups_[lane]; ++i) {
      const int64_t group = groups_[lane * kMaxGroups + i];
      const int64_t first = group * kRows;
      const int64_t place = group / kGroupsPerStretch * kTileQueries + lane;
      const Integers products = bit_cast<Integers>(byte_products_of_six(
          bytes.rows + first * bytes.row_stride, bytes.row_stride, columns_ + lane * column_bytes_, column_bytes_));
      const Integers rows = kSixRows + static_cast<int32_t>(first);
      const Integers last = Integers{} + static_cast<int32_t>(end - 1);
      const uint32_t passing =
          lanes_not_below(products, Integers{} + bounds_[place]) & lanes_not_below(last, rows) & kSixLanes;
      store_lanes(candidates_ + count, passing, rows);
      count += __builtin_popcount(passing);
      if (count > kMaxCandidates) return -1;
    }
    return count;
  }

  // Step 6.
  void choose(const float* centroids, const float* query, int64_t lane, int64_t count) {
    constexpr float kLowest = -std::numeric_limits<float>::infinity();
    const int64_t num_vectors = ceil_div(count, kLanesPerVector);
    for (int64_t v = 0; v < num_vectors; ++v)
      store<float>(scores_ + v * kLanesPerVector, score(centroids, lane, v, count));
    for (int64_t i = count; i < num_vectors * kLanesPerVector; ++i) scores_[i] = kLowest;
    const Integers length = Integers{} + static_cast<int32_t>(list_length_);
    Vector<float> least_in = broadcast(-kLowest), most_out = broadcast(kLowest);
    int64_t num_in = 0;
    for (int64_t v = 0; v < num_vectors; ++v) {
      const Vector<float> here = load<float>(scores_ + v * kLanesPerVector);
      Integers num_above{};
      for (int64_t j = 0; j < count; ++j) num_above -= broadcast(scores_[j]) > here;
      const Integers is_in = num_above < length;
      least_in = minimum(least_in, is_in ? here : broadcast(-kLowest));
      most_out = maximum(most_out, is_in ? broadcast(kLowest) : here);
      const uint32_t lanes = lanes_not_below(length - 1, num_above);
      if (num_in + __builtin_popcount(lanes) > list_length_) {
        num_in = list_length_ + 1;  // equals
        break;
      }
      store_lanes(chosen_[lane] + num_in, lanes, load_integers(candidates_, v));
      num_in += __builtin_popcount(lanes);
    }
    const float doubt = 2 * score_errors_[lane];
    if (num_in > list_length_ || !(-largest_lane<float>(-least_in) - largest_lane<float>(most_out) > doubt)) {
      choose_exactly(centroids, query, lane, count);
    }
  }

  // Scores of 16 candidates, those from `count` on anything. Sums of sixteen columns of each row, then of these.
  Vector<float> score(const float* centroids, int64_t lane, int64_t v, int64_t count) const {
    const float* query = query_rows_ + lane * padded_depth_;
    const int64_t whole = head_dim_ / kLanesPerVector * kLanesPerVector;
    Vector<float> sums[kLanesPerVector];
    const int64_t first = v * kLanesPerVector;
    for (int64_t i = min64(kLanesPerVector, count - first); i < kLanesPerVector; ++i) sums[i] = Vector<float>{};
    for (int64_t i = 0; i < min64(kLanesPerVector, count - first); ++i) {
      const float* row = centroids + candidates_[first + i] * head_dim_;
      Vector<float> sum{};
      for (int64_t d = 0; d < whole; d += kLanesPerVector) sum += load<float>(row + d) * load<float>(query + d);
      if (whole < head_dim_) {
        Vector<float> tail{};
        std::memcpy(&tail, row + whole, static_cast<size_t>(head_dim_ - whole) * sizeof(float));
        sum += tail * load<float>(query + whole);
      }
      sums[i] = sum;
    }
    return sums_of_rows<float>(sums);
  }

  // Where sums in another order leave a doubt: RouteTask's scores, products summed in ascending order of d. Candidates
  // ascend, so of equals the earlier is better.
  __attribute__((noinline)) void choose_exactly(const float* centroids, const float* query, int64_t lane,
                                                int64_t count) {
    for (int64_t first = 0; first < count; first += kLanesPerVector) {
      gather_rows_transposed<float>([&](int64_t i) { return centroids + candidates_[first + i] * head_dim_; },
                                    min64(kLanesPerVector, count - first), head_dim_, 1.0f, rescored_, kLanesPerVector);
      Vector<float> sum{};
      for (int64_t d = 0; d < head_dim_; ++d) {
        sum += load<float>(rescored_ + d * kLanesPerVector) * broadcast(query[d * kTileQueries]);
      }
      store<float>(scores_ + first, sum);
    }
    int64_t place = 0;
    for (int64_t i = 0; i < count; ++i) {
      int64_t num_better = 0;
      for (int64_t j = 0; j < count; ++j) {
        num_better += scores_[j] > scores_[i] || (scores_[j] == scores_[i] && j < i);
      }
      if (num_better < list_length_) chosen_[lane][place++] = candidates_[i];
    }
  }

  static Integers load_integers(const int32_t* source, int64_t vector_idx) {
    Integers result;
    std::memcpy(&result, source + vector_idx * kLanesPerVector, sizeof(result));
    return result;
  }

  int64_t list_length_ = 0;
  int64_t head_dim_ = 0;
  int64_t column_bytes_ = 0;
  int64_t padded_depth_ = 0;
  int8_t* quads_ = nullptr;                 // [ceil(D / 4), kTileQueries, 4], a
  int8_t* columns_ = nullptr;               // [kTileQueries, column_bytes], the same by query
  int32_t* maxima_ = nullptr;               // [groups, kTileQueries]
  int32_t* errors_ = nullptr;               // [stretches, kTileQueries], E
  int32_t* bounds_ = nullptr;               // [stretches, kTileQueries], T - E
  Integers* best_ = nullptr;                // [list_length, kVectors], descending
  int32_t* passed_ = nullptr;               // group * kLanesPerVector + lane
  int32_t* groups_ = nullptr;               // [kTileQueries, kMaxGroups], ascending
  float* query_rows_ = nullptr;             // [kTileQueries, padded_depth], 0 from D on
  float* rescored_ = nullptr;               // [D, kLanesPerVector]
  Vector<float> residual_norms_[kVectors];  // |u|
  Vector<float> product_norms_[kVectors];   // |q t / s|
  Vector<float> query_norms_[kVectors];     // what the rounding of a score is at most, over |c|
  int64_t num_groups_[kTileQueries];
  float score_errors_[kTileQueries];  // F
  int32_t candidates_[kMaxCandidates + 2 * kLanesPerVector];
  float scores_[kMaxCandidates + kLanesPerVector];
  int32_t chosen_[kTileQueries][MobaRouteConfig::kMaxFilteredList + kLanesPerVector];
};

#else

class RouteFilter {  // which no processor of this instruction set runs
 public:
  static bool serves(int64_t, int64_t, int64_t) { return false; }
  void take(int64_t, int64_t, int64_t, ScratchCutter&) {}
  bool select(const ByteCentroids&, const float*, const float*, int64_t, const int64_t*) { return false; }
  const int32_t* chosen(int64_t) const { return nullptr; }
};

#endif

}  // namespace topgather::TOPGATHER_CPU_TARGET
