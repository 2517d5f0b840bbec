// Steps 2 to 5 of the block-attention forward (moba_forward_cpu.h) for bfloat16 on the matrix unit, and the scores of
// the backward, which must be the forward's.
//
// Here queries stand in rows: scores [queries, keys] = query rows x key pairs, weights rounded to bfloat16, output tile
// [queries, V] = weights x value pairs. Keys and values of a block are packed into pairs once per range, then serve
// every tile of queries that chose the block.
// Numerics: products of bfloat16 with float32 sums; exponentials and the sum of weights in float32; the weights that
// meet the values are rounded to bfloat16. Infinities among hidden values never get here: the caller takes the
// general path for such tiles.
#pragma once

#include <limits>

#include "../cpu/intrinsics.h"
#include "../cpu/math.h"
#include "moba_geometry.h"

#if TOPGATHER_MATRIX_UNIT

namespace topgather::TOPGATHER_CPU_TARGET {

// Products of a tile of queries with a block's keys. Scores are score_factor times them, each rounded before anything is
// subtracted from it.
struct AmxScores {
  static constexpr int64_t kTileQueries = kAmxPanel;

  int64_t tile_keys;  // maximum of keys of a block packed at once, a multiple of 32
  int64_t head_dim;
  int64_t padded_head_dim;  // to 32
  float scale_base2;        // scale * log2(e), positive
  float softcap_base2;      // softcap * log2(e), or 0
  float score_factor;       // scale_base2, or 1 where the cap has scaled them

  BFloat16* query_rows;     // [kTileQueries, padded D]
  BFloat16Pair* key_pairs;  // [padded D / 2, tile_keys]
  float* scores;            // [kTileQueries, tile_keys]

  template <typename Cutter>
  AmxScores(const MobaProblem& problem, const ScoreOptions& options, int64_t max_keys, Cutter& scratch)
      : tile_keys(max_keys),
        head_dim(problem.head_dim),
        padded_head_dim(round_up(problem.head_dim, kAmxDepth)),
        scale_base2(static_cast<float>(options.scale * kLog2E)),
        softcap_base2(static_cast<float>(options.softcap * kLog2E)),
        score_factor(options.softcap > 0 ? 1.0f : scale_base2) {
    query_rows = scratch.template take<BFloat16>(kTileQueries * padded_head_dim);
    key_pairs = scratch.template take<BFloat16Pair>(padded_head_dim / 2 * tile_keys);
    scores = scratch.template take<float>(kTileQueries * tile_keys);
  }

  void pack_keys(const BFloat16* keys, int64_t key_stride, int64_t num_keys) {
    pack_transposed_pairs(keys, key_stride, num_keys, head_dim, padded_head_dim, round_up(num_keys, kAmxPanel),
                          key_pairs, tile_keys);
  }

  // Steps 2 and 3 for the packed keys before num_depth.
  void multiply(const BFloat16* query, int64_t query_stride, const int32_t* queries, int64_t count, int64_t num_depth) {
    for (int64_t i = 0; i < count; ++i) {
      BFloat16* row = query_rows + i * padded_head_dim;
      std::memcpy(row, query + queries[i] * query_stride, static_cast<size_t>(head_dim) * 2);
      for (int64_t d = head_dim; d < padded_head_dim; ++d) row[d].bits = 0;
    }
    for (int64_t key = 0; key < num_depth; key += kAmxPanel) {
      amx_panel_product(query_rows, padded_head_dim, key_pairs + key, tile_keys, scores + key, tile_keys,
                        padded_head_dim, count <= kAmxRows);
    }
    if (softcap_base2 == 0) return;
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t key = 0; key < num_depth; key += kAmxRows) {
        float* score = scores + i * tile_keys + key;
        store<float>(score, softcap_base2 * tanh_vector(load<float>(score) * (scale_base2 / softcap_base2)));
      }
    }
  }

  // The backward's scores [num_keys, tile_row], queries in lanes.
  void write_transposed(int64_t count, int64_t num_keys, float* target, int64_t tile_row) const {
    for (int64_t key = 0; key < num_keys; key += kAmxRows) {
      for (int64_t i = 0; i < count; i += kAmxRows) {
        Vector<float> block[kAmxRows];
        for (int64_t row = 0; row < kAmxRows; ++row) {
          block[row] = load<float>(scores + (i + row) * tile_keys + key) * score_factor;
        }
        transpose_in_registers<float>(block);
        for (int64_t row = 0; row < min64(kAmxRows, num_keys - key); ++row) {
          store<float>(target + (key + row) * tile_row + i, block[row]);
        }
      }
    }
  }
};

struct AmxForwardTile : AmxScores {
  static constexpr float kLowest = -std::numeric_limits<float>::infinity();

  int64_t value_dim;
  int64_t padded_value_dim;  // to 32

  BFloat16Pair* value_pairs;  // [tile_keys / 2, padded V]
  BFloat16* weights;          // [kTileQueries, tile_keys]
  float* out_tile;            // [kTileQueries, padded V]

  template <typename Cutter>
  AmxForwardTile(const MobaProblem& problem, const ScoreOptions& options, int64_t max_keys, Cutter& scratch)
      : AmxScores(problem, options, max_keys, scratch),
        value_dim(problem.value_dim),
        padded_value_dim(round_up(problem.value_dim, kAmxPanel)) {
    value_pairs = scratch.template take<BFloat16Pair>(tile_keys / 2 * padded_value_dim);
    weights = scratch.template take<BFloat16>(kTileQueries * tile_keys);
    out_tile = scratch.template take<float>(kTileQueries * padded_value_dim);
  }

  void pack(const BFloat16* keys, int64_t key_stride, const BFloat16* values, int64_t value_stride, int64_t num_keys) {
    pack_keys(keys, key_stride, num_keys);
    pack_row_pairs(values, value_stride, num_keys, round_up(num_keys, kAmxPanel), value_dim, padded_value_dim,
                   value_pairs, padded_value_dim);
  }

  // Scales a row's first num_visible products, hides the rest of its last vector, and returns the largest score.
  float largest_score(int64_t row, int64_t num_visible) {
    float* row_scores = scores + row * tile_keys;
    const int64_t end = round_up(num_visible, kAmxDepth);
    for (int64_t key = num_visible; key < end; ++key) row_scores[key] = kLowest;
    Vector<float> top = broadcast(kLowest);
    for (int64_t key = 0; key < end; key += kAmxRows) {
      const Vector<float> score = load<float>(row_scores + key) * score_factor;
      store<float>(row_scores + key, score);
      top = maximum(top, score);
    }
    return largest_lane<float>(top);
  }

  // Weights of a row relative to `base`, up to num_depth; returns their sum.
  float weigh_row(int64_t row, int64_t num_visible, int64_t num_depth, float base) {
    const float* row_scores = scores + row * tile_keys;
    BFloat16* row_weights = weights + row * tile_keys;
    Vector<float> sum[2] = {};
    int64_t key = 0;
    for (; key < num_visible; key += kAmxDepth) {
      const Vector<float> low = exp2_vector(load<float>(row_scores + key) - base);
      const Vector<float> high = exp2_vector(load<float>(row_scores + key + kAmxRows) - base);
      sum[0] += low;
      sum[1] += high;
      store_bfloat16(row_weights + key, low, high);
    }
    for (; key < num_depth; key += kAmxDepth) store_bfloat16(row_weights + key, Vector<float>{}, Vector<float>{});
    return sum_of_lanes<float>(sum[0] + sum[1]);
  }

  // Step 4.
  template <typename LimitOf>
  void online_softmax(const int32_t* queries, int64_t count, int64_t num_depth, const LimitOf& limit_of,
                      float* running_max, float* running_sum, float* rescale) {
    alignas(64) float old_max[kTileQueries] = {};
    alignas(64) float base[kTileQueries] = {};
    for (int64_t i = 0; i < count; ++i) {
      const float fresh = largest_score(i, limit_of(i));
      old_max[i] = running_max[queries[i]];
      const float new_max = fresh > old_max[i] ? fresh : old_max[i];
      running_max[queries[i]] = new_max;
      base[i] = new_max == kLowest ? 0.0f : new_max;
    }
    for (int64_t i = 0; i < kTileQueries; i += kAmxRows) {
      store<float>(rescale + i, exp2_vector(load<float>(old_max + i) - load<float>(base + i)));
    }
    for (int64_t i = 0; i < count; ++i) {
      float& sum = running_sum[queries[i]];
      sum = sum * rescale[i] + weigh_row(i, limit_of(i), num_depth, base[i]);
    }
  }

  // Steps 2 to 5. Query i of the tile lies at query + places[i] * query_stride, what it has seen so far at rows[i].
  // limit_of(i): keys that it sees. rescale [kTileQueries] and out_tile [count, padded V] are results.
  template <typename LimitOf>
  void attend(const BFloat16* query, int64_t query_stride, const int32_t* places, const int32_t* rows, int64_t count,
              int64_t num_seen, const LimitOf& limit_of, float* running_max, float* running_sum, float* rescale) {
    const int64_t num_depth = round_up(num_seen, kAmxDepth);
    multiply(query, query_stride, places, count, num_depth);
    online_softmax(rows, count, num_depth, limit_of, running_max, running_sum, rescale);
    for (int64_t d = 0; d < padded_value_dim; d += kAmxPanel) {
      amx_panel_product(weights, tile_keys, value_pairs + d, padded_value_dim, out_tile + d, padded_value_dim,
                        num_depth, count <= kAmxRows);
    }
  }
};

}  // namespace topgather::TOPGATHER_CPU_TARGET

#endif
