// Steps 2 to 5 of the block-attention forward (moba_forward_cpu.h) for bfloat16 on the matrix unit.
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

struct AmxForwardTile {
  static constexpr int64_t kTileQueries = kAmxPanel;
  static constexpr float kLowest = -std::numeric_limits<float>::infinity();

  int64_t tile_keys;  // maximum of keys of a block packed at once, a multiple of 32
  int64_t head_dim;
  int64_t value_dim;
  int64_t padded_head_dim;   // to 32
  int64_t padded_value_dim;  // to 32
  float scale_base2;         // scale * log2(e), positive
  float softcap_base2;       // softcap * log2(e), or 0

  BFloat16* query_rows;   // [kTileQueries, padded D]
  uint32_t* key_pairs;    // [padded D / 2, tile_keys]
  uint32_t* value_pairs;  // [tile_keys / 2, padded V]
  float* scores;          // [kTileQueries, tile_keys]
  BFloat16* weights;      // [kTileQueries, tile_keys]
  float* out_tile;        // [kTileQueries, padded V]

  template <typename Cutter>
  AmxForwardTile(const MobaProblem& problem, double scale, double softcap, int64_t max_keys, Cutter& scratch)
      : tile_keys(max_keys),
        head_dim(problem.head_dim),
        value_dim(problem.value_dim),
        padded_head_dim(round_up(problem.head_dim, kAmxDepth)),
        padded_value_dim(round_up(problem.value_dim, kAmxPanel)),
        scale_base2(static_cast<float>(scale * kLog2E)),
        softcap_base2(static_cast<float>(softcap * kLog2E)) {
    query_rows = scratch.template take<BFloat16>(kTileQueries * padded_head_dim);
    key_pairs = scratch.template take<uint32_t>(padded_head_dim / 2 * tile_keys);
    value_pairs = scratch.template take<uint32_t>(tile_keys / 2 * padded_value_dim);
    scores = scratch.template take<float>(kTileQueries * tile_keys);
    weights = scratch.template take<BFloat16>(kTileQueries * tile_keys);
    out_tile = scratch.template take<float>(kTileQueries * padded_value_dim);
  }

  void pack(const BFloat16* keys, int64_t key_stride, const BFloat16* values, int64_t value_stride, int64_t num_keys) {
    const int64_t padded_keys = round_up(num_keys, kAmxPanel);
    pack_transposed_pairs(keys, key_stride, num_keys, head_dim, padded_head_dim, padded_keys, key_pairs, tile_keys);
    pack_row_pairs(values, value_stride, num_keys, padded_keys, value_dim, padded_value_dim, value_pairs,
                   padded_value_dim);
  }

  // The largest of a row's first num_visible scores, the rest of its last vector hidden.
  float largest_score(int64_t row, int64_t num_visible) {
    float* row_scores = scores + row * tile_keys;
    const int64_t end = round_up(num_visible, kAmxDepth);
    for (int64_t key = num_visible; key < end; ++key) row_scores[key] = kLowest;
    Vector<float> top = broadcast(kLowest);
    for (int64_t key = 0; key < end; key += kAmxRows) top = maximum(top, load<float>(row_scores + key));
    return largest_lane<float>(top);
  }

  // Weights of a row relative to `base`, up to num_depth; returns their sum.
  float weigh_row(int64_t row, int64_t num_visible, int64_t num_depth, float base) {
    const float* row_scores = scores + row * tile_keys;
    BFloat16* row_weights = weights + row * tile_keys;
    Vector<float> sum[2] = {};
    int64_t key = 0;
    for (; key < num_visible; key += kAmxDepth) {
      const Vector<float> low = exp2_vector(load<float>(row_scores + key) * scale_base2 - base);
      const Vector<float> high = exp2_vector(load<float>(row_scores + key + kAmxRows) * scale_base2 - base);
      sum[0] += low;
      sum[1] += high;
      store_bfloat16(row_weights + key, low, high);
    }
    for (; key < num_depth; key += kAmxDepth) store_bfloat16(row_weights + key, Vector<float>{}, Vector<float>{});
    return sum_of_lanes<float>(sum[0] + sum[1]);
  }

  // Scores so that scaled ones are capped.
  void cap_scores(int64_t count, int64_t num_depth) {
    const float factor = scale_base2 / softcap_base2;
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t key = 0; key < num_depth; key += kAmxRows) {
        float* score = scores + i * tile_keys + key;
        store<float>(score, tanh_vector(load<float>(score) * factor) / factor);
      }
    }
  }

  // Step 4.
  template <typename LimitOf>
  void online_softmax(const int32_t* queries, int64_t count, int64_t num_depth, const LimitOf& limit_of,
                      float* running_max, float* running_sum, float* rescale) {
    alignas(64) float old_max[kTileQueries] = {};
    alignas(64) float base[kTileQueries] = {};
    for (int64_t i = 0; i < count; ++i) {
      const float fresh = largest_score(i, limit_of(i)) * scale_base2;
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

  // Steps 2 to 5. limit_of(i): keys that query i of the tile sees. rescale [kTileQueries] and out_tile [count, padded
  // V] are results.
  template <typename LimitOf>
  void attend(const BFloat16* query, int64_t query_stride, const int32_t* queries, int64_t count, int64_t num_seen,
              const LimitOf& limit_of, float* running_max, float* running_sum, float* rescale) {
    for (int64_t i = 0; i < count; ++i) {
      BFloat16* row = query_rows + i * padded_head_dim;
      std::memcpy(row, query + queries[i] * query_stride, static_cast<size_t>(head_dim) * 2);
      for (int64_t d = head_dim; d < padded_head_dim; ++d) row[d].bits = 0;
    }
    const bool one_row_group = count <= kAmxRows;
    const int64_t num_depth = round_up(num_seen, kAmxDepth);
    for (int64_t key = 0; key < num_depth; key += kAmxPanel) {
      amx_panel_product(query_rows, padded_head_dim, key_pairs + key, tile_keys, scores + key, tile_keys,
                        padded_head_dim, one_row_group);
    }
    if (softcap_base2 > 0) cap_scores(count, num_depth);
    online_softmax(queries, count, num_depth, limit_of, running_max, running_sum, rescale);
    for (int64_t d = 0; d < padded_value_dim; d += kAmxPanel) {
      amx_panel_product(weights, tile_keys, value_pairs + d, padded_value_dim, out_tile + d, padded_value_dim,
                        num_depth, one_row_group);
    }
  }
};

}  // namespace topgather::TOPGATHER_CPU_TARGET

#endif
