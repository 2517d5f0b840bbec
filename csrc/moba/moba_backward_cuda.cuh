// Block attention backward on CUDA, key-stationary: gradients of a key block stay in registers while the queries that
// chose it come.
//
//   weight_ij    = exp(scale * dot(query_i, key_j) - lse_i)    recomputed from softmax terms (softmax_terms.h)
//   d_weight_ij  = dot(grad_out_i, value_j)
//   d_score_ij   = weight_ij * (d_weight_ij - shift_i)
//   grad_value_j = sum_i weight_ij grad_out_i
//   grad_key_j   = scale * sum_i d_score_ij query_i
//   grad_query_i = scale * sum_j d_score_ij key_j
// with shift_i = dot(grad_out_i, out_i) - grad_lse_i (moba_row_terms) and j over the visible keys of i's blocks.
//
// Who owns what: a thread block owns a work item, up to entries_per_item entries of one block's list, and kKeys of the
// block's keys. Its warps share tiles of kQueries entries. Steps:
//   1. find the item; copy its keys and values to shared memory; place the first tile's rows and gather them;
//   per tile:
//   2. scores and d_weights; weights and d_scores to shared memory (the next tile's entries are read meanwhile);
//   3. grad_value += weights^T grad_out, grad_key += d_scores^T query (the next tile's rows are placed meanwhile);
//   4. start gathering the next tile's rows of query and grad_out;
//   5. grad_query = d_scores key, added to where it belongs;
//   last:
//   6. grad_key and grad_value written where the list has no other item, else added to where they belong.
// All query heads of the group stand in the same lists: nothing is expanded.
// Numerics: float32 sums; weights and d_scores are rounded to a 16-bit element type before they are multiplied. A scale
// above 1 is multiplied in before, so that float16 does not lose what it would magnify; a smaller one when gradients
// are written. Hidden pairs weigh 0, and 0 x inf is NaN: a tile that hides keys and holds numbers that are not finite takes
// steps 3 and 5 in plain arithmetic over visible pairs alone. Ties do not arise.
// Determinism: sums over thread blocks are atomic additions of float32, in any order; the deterministic way has one
// item a list, a place of its own for each entry's grad_query, and no atomics.
#pragma once

#include <array>
#include <span>

#include "../common/checks.h"
#include "../common/softmax_terms.h"
#include "../cuda/launch.cuh"
#include "../cuda/scores.cuh"
#include "../cuda/tile_products.cuh"
#include "moba_cuda.h"
#include "moba_stages_cuda.cuh"

namespace topgather {

struct BackwardArguments {
  MobaGeometry geometry;
  Wave wave;
  BlockListsOnDevice lists;
  int32_t num_chunks;   // of kKeys keys in a block, that this launch covers
  int32_t first_chunk;  // the first of them
  bool is_deterministic;
  bool writes_keys;  // gradients of the keys of a list that is one item go to where the caller wants them
  int32_t head_dim;
  int32_t value_dim;
  int32_t key_elements;    // of a row of grad_query_sums and grad_key_sums
  int32_t value_elements;  // of a row of grad_value_sums
  float score_scale;       // scale * log2(e)
  float softcap;           // softcap * log2(e); 0: scores stay
  float inverse_softcap;
  float d_score_scale;                 // on gradients of scores before they are rounded
  float gradient_scale;                // on grad_query and grad_key where they are written; the two make scale
  Array<const void, 4> query;          // [batch, query head, query, D] dtype
  Array<const void, 4> key;            // [batch, kv head, key, D] dtype
  Array<const void, 4> value;          // [batch, kv head, key, V] dtype
  Array<const void, 4> grad_out;       // [batch, query head, query, V] dtype
  Array<const void, 3> lse;            // [batch, query head, query] float32
  Array<const void, 4> softmax_terms;  // [batch, query head, query, 2] float32, or data null
  const float* row_shift;              // [unit, row] float32, times d_score_scale
  float* grad_query_sums;              // [unit, row, key_elements] float32; deterministic: [unit, entry, key_elements]
  float* grad_key_sums;                // [unit, key, key_elements] float32
  float* grad_value_sums;              // [unit, key, value_elements] float32
  Array<void, 4> grad_key;             // [batch, kv head, key, D] dtype
  Array<void, 4> grad_value;           // [batch, kv head, key, V] dtype
};

template <typename Element, int kHeadDim, bool kIsWide>
struct BackwardSharedMemory {
  using Tiles = MobaBackwardTiles<Element, kHeadDim, kIsWide>;
  static constexpr int kQueries = Tiles::kQueries;
  static constexpr int kKeys = Tiles::kKeys;
  static constexpr int kWarps = Tiles::kWarps;
  static constexpr int kThreads = kWarps * cuda::kLanes;
  // How warps share a tile: step 2 by entries, then by keys (some may stand by); step 3 by keys, then by columns; step 5
  // by entries, then by columns.
  static constexpr int kScoreWarps = kQueries / Tiles::kScoreRows;
  static constexpr int kKeyWarps = kKeys / Tiles::kGradKeys;
  static constexpr int kKeyColumns = kHeadDim * kKeyWarps / kWarps;
  static constexpr int kQueryWarps = kQueries / Tiles::kGradRows;
  static constexpr int kQueryColumns = kHeadDim * kQueryWarps / kWarps;
  static constexpr int kPanelColumns = kQueryColumns < Tiles::kPanelColumns ? kQueryColumns : Tiles::kPanelColumns;
  static constexpr int kPlacingThreads = kQueries < cuda::kLanes ? cuda::kLanes : kQueries;
  static_assert(kScoreWarps * (kKeys / Tiles::kScoreKeys) <= kWarps, "scores are shared by the warps there are");
  static_assert(kWarps % kKeyWarps == 0 && kWarps % kQueryWarps == 0, "every warp has as many columns");
  static_assert(kPlacingThreads <= kThreads, "a thread a row");

  // The warp's parts of steps 3 and 5.
  static __device__ __forceinline__ int first_grad_key() {
    return cuda::thread_index_here() / cuda::kLanes % kKeyWarps * Tiles::kGradKeys;
  }
  static __device__ __forceinline__ int first_key_column() {
    return cuda::thread_index_here() / cuda::kLanes / kKeyWarps * kKeyColumns;
  }
  static __device__ __forceinline__ int first_grad_row() {
    return cuda::thread_index_here() / cuda::kLanes % kQueryWarps * Tiles::kGradRows;
  }
  static __device__ __forceinline__ int first_query_column() {
    return cuda::thread_index_here() / cuda::kLanes / kQueryWarps * kQueryColumns;
  }

  // What a tile's entries are, by row.
  struct alignas(16) RowTerms {
    float largest;  // of softmax terms, or lse where there are none
    float factor;   // of softmax terms
    float shift;
    // Of this thread block's keys, the first that the row does not see; 0: the row is not there. In the upper half of
    // the bits, those of a window's edge that stand before the window.
    int32_t num_visible;
    __device__ __forceinline__ bool sees(int key) const {
      return key < (num_visible & 0xffff) && key >= num_visible >> 16;
    }
  };
  struct RowPlace {
    const Element* query;     // the row in global memory; null: the row is not there
    const Element* grad_out;  // likewise
    float* grad_query;        // where its gradient is added to; likewise
  };
  struct Rows {
    RowTerms terms[kQueries];
    RowPlace places[kQueries];
    // By warp of kPlacingThreads.
    int32_t is_masked[kPlacingThreads / cuda::kLanes];   // some pairs of the tile are none
    int32_t hides_keys[kPlacingThreads / cuda::kLanes];  // some row that is there does not see every key
  };

  cuda::SharedTile<Element, kKeys, kHeadDim> key;
  cuda::SharedTile<Element, kKeys, kHeadDim> value;
  cuda::SharedTile<Element, kQueries, kHeadDim> query;
  cuda::SharedTile<Element, kQueries, kHeadDim> grad_out;
  cuda::SharedTile<Element, kQueries, kKeys> weights;
  cuda::SharedTile<Element, kQueries, kKeys> d_scores;
  Rows rows[2];  // of the tile under way and of the next
  // What all threads know of the thread block's work: registers are scarce while a tile is under way.
  Unit unit;
  WorkItem item;
  int32_t first_key;  // of the block's
  int32_t num_keys;
};

namespace backward {

using cuda::kAllLanes;
using cuda::kLanes;
using cuda::lane_id;
using cuda::warp_id;

// lane_id and warp_id for code inside the loop over tiles.
using cuda::lane_here;
__device__ __forceinline__ int warp_here() { return cuda::thread_index_here() / kLanes; }

constexpr float kLog2E = 1.4426950408889634f;

// Copies rows with all chunks of a tile's width, zeros behind `depth` and for rows that are not there, which row_at
// gives as null.
template <int kThreads, typename Tile, typename RowAt>
__device__ __forceinline__ void copy_rows_async(Tile& tile, int depth, const RowAt& row_at) {
  constexpr unsigned kChunks = Tile::kChunks, kRowsAtOnce = kThreads / kChunks;
  static_assert(kThreads % kChunks == 0 && Tile::kRows % kRowsAtOnce == 0, "every thread copies as many chunks");
  const auto thread = static_cast<unsigned>(cuda::thread_index_here());
  const unsigned chunk = thread % kChunks, first_row = thread / kChunks;
  const bool is_column = static_cast<int>(chunk) * Tile::kPerChunk < depth;
#pragma unroll 4
  for (unsigned i = 0; i < Tile::kRows / kRowsAtOnce; ++i) {
    const auto* row = row_at(static_cast<int>(first_row + i * kRowsAtOnce));
    cuda::copy_async_16(tile.chunk(static_cast<int>(first_row + i * kRowsAtOnce), static_cast<int>(chunk)),
                        row + chunk * Tile::kPerChunk, is_column && row != nullptr);
  }
}

template <typename Element, int kHeadDim, bool kIsWide>
__device__ __forceinline__ void gather_rows_async(const BackwardArguments& args,
                                                  BackwardSharedMemory<Element, kHeadDim, kIsWide>& shared,
                                                  int buffer) {
  const auto& rows = shared.rows[buffer];
  copy_rows_async<shared.kThreads>(shared.query, args.head_dim, [&](int row) { return rows.places[row].query; });
  copy_rows_async<shared.kThreads>(shared.grad_out, args.value_dim, [&](int row) { return rows.places[row].grad_out; });
}

// The thread's entry of a tile, -1 where there is none.
template <int kQueries>
__device__ __forceinline__ int32_t entry_of_thread(const WorkItem& item, int first_entry) {
  const int i = cuda::thread_index_here();
  return i < kQueries && first_entry + i < item.num_entries ? item.entries[first_entry + i] : -1;
}

// Writes where a row lies and what it sees, and starts copies of its terms.
template <typename Element, int kHeadDim, bool kIsWide>
__device__ __forceinline__ void place_row(const BackwardArguments& args, const Unit& unit, int64_t unit_in_wave,
                                          const KeyBlock& block, int first_key, int32_t entry,
                                          BackwardSharedMemory<Element, kHeadDim, kIsWide>& shared, int buffer) {
  using Shared = BackwardSharedMemory<Element, kHeadDim, kIsWide>;
  const int i = cuda::thread_index_here();
  auto& rows = shared.rows[buffer];
  const bool is_there = entry >= 0, are_terms_given = args.softmax_terms.data != nullptr;
  bool is_masked = i < Shared::kQueries, hides_keys = false;
  typename Shared::RowPlace place{nullptr, nullptr, nullptr};
  const float *terms = nullptr, *shift = nullptr;
  int32_t num_visible = 0;
  if (is_there) {
    const int32_t row = row_of_entry(args.geometry, entry);
    const WaveRow at = wave_row(args.geometry, args.wave, unit, row);
    const int64_t unit_rows = unit_in_wave * args.lists.num_rows;
    num_visible = num_visible_keys(args.geometry, block, at.query) - first_key;
    num_visible = num_visible < 0 ? 0 : min(num_visible, Shared::kKeys);
    is_masked = num_visible < Shared::kKeys;
    hides_keys = num_visible < min(block.num_keys - first_key, Shared::kKeys);
    if (is_edge_entry(args.geometry, entry, row)) {
      const int32_t start = keys_before_window(args.geometry, block, at.query) - first_key;
      num_visible |= max(0, min(start, Shared::kKeys)) << 16;
      is_masked = is_masked || start > 0;
      hides_keys = hides_keys || start > 0;
    }
    const int64_t place_of_sums = args.is_deterministic ? unit_rows * args.geometry.top_k + entry : unit_rows + row;
    place = {args.query.at<Element>(unit.batch_idx, at.head, at.query),
             args.grad_out.at<Element>(unit.batch_idx, at.head, at.query),
             args.grad_query_sums + place_of_sums * args.key_elements};
    terms = are_terms_given ? args.softmax_terms.at<float>(unit.batch_idx, at.head, at.query)
                            : args.lse.at<float>(unit.batch_idx, at.head, at.query);
    shift = args.row_shift + unit_rows + row;
  }
  const bool is_warp_masked = __ballot_sync(kAllLanes, is_masked) != 0;
  const bool warp_hides_keys = __ballot_sync(kAllLanes, hides_keys) != 0;
  if (lane_id() == 0) {
    rows.is_masked[warp_id()] = is_warp_masked ? 1 : 0;
    rows.hides_keys[warp_id()] = warp_hides_keys ? 1 : 0;
  }
  if (i >= Shared::kQueries) return;
  rows.places[i] = place;
  rows.terms[i].num_visible = num_visible;
  cuda::copy_async_4(&rows.terms[i].largest, terms, is_there);
  cuda::copy_async_4(&rows.terms[i].factor, terms + 1, is_there && are_terms_given);
  cuda::copy_async_4(&rows.terms[i].shift, shift, is_there);
}

// Of what the warps of kPlacingThreads found, whether any did.
template <int kCount>
__device__ __forceinline__ bool any_of(const int32_t (&flags)[kCount]) {
  int32_t result = flags[0];
#pragma unroll
  for (int i = 1; i < kCount; ++i) result |= flags[i];
  return result != 0;
}

// Whether the thread's part of a tile has NaN or inf.
template <int kThreads, typename Tile>
__device__ __forceinline__ bool has_unusual_chunks(const Tile& tile) {
  using Element = std::remove_const_t<std::remove_reference_t<decltype(tile.elements[0])>>;
  const auto* chunks = reinterpret_cast<const uint4*>(tile.elements);
  bool is_unusual = false;
#pragma unroll 1
  for (int i = threadIdx.x; i < Tile::kRows * Tile::kChunks; i += kThreads) {
    is_unusual = cuda::is_unusual_chunk<Element>(chunks[i]) || is_unusual;
  }
  return is_unusual;
}

// Step 2's end: from scores and d_weights of the warp's rows and some keys to weights and d_scores in shared memory.
template <bool kIsCapped, typename Element, int kHeadDim, bool kIsWide, int kM, int kN>
__device__ __forceinline__ void weigh(const BackwardArguments& args, bool is_masked, int first_row, int first_key,
                                      const float (&scores)[kM][kN][4], const float (&d_weights)[kM][kN][4],
                                      BackwardSharedMemory<Element, kHeadDim, kIsWide>& shared, int buffer) {
  const int g = lane_here() / 4, t = lane_here() % 4;
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = first_row + m * 16 + h * 8 + g;
      auto terms = shared.rows[buffer].terms[row];
      if (args.softmax_terms.data == nullptr) {
        const auto of_lse = read_softmax_terms<float>(nullptr, terms.largest);
        terms.largest = of_lse.largest;
        terms.factor = of_lse.factor;
      }
      float weights[kN][2], d_scores[kN][2];
#pragma unroll
      for (int n = 0; n < kN; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float score = cuda::scale_score(scores[m][n][2 * h + e], args.score_scale);
          if (kIsCapped) score = cuda::cap_score(score, args.softcap, args.inverse_softcap);
          const float weight = cuda::exp2_approximate(score - terms.largest) * terms.factor;
          float d_score = weight * fmaf(d_weights[m][n][2 * h + e], args.d_score_scale, -terms.shift);
          if (kIsCapped) d_score *= cuda::slope_of_cap(score, args.inverse_softcap);
          weights[n][e] = weight;
          d_scores[n][e] = d_score;
        }
      }
      if (is_masked) {
#pragma unroll
        for (int n = 0; n < kN; ++n) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const bool is_visible = terms.sees(first_key + n * 8 + 2 * t + e);
            weights[n][e] = is_visible ? weights[n][e] : 0.0f;
            d_scores[n][e] = is_visible ? d_scores[n][e] : 0.0f;
          }
        }
      }
#pragma unroll
      for (int n = 0; n < kN; ++n) {
        cuda::store_pair(shared.weights, row, first_key + n * 8 + 2 * t, weights[n][0], weights[n][1]);
        cuda::store_pair(shared.d_scores, row, first_key + n * 8 + 2 * t, d_scores[n][0], d_scores[n][1]);
      }
    }
  }
}

// Step 2.
template <typename Element, int kHeadDim, bool kIsWide>
__device__ __forceinline__ void make_weights(const BackwardArguments& args, bool is_masked, int num_keys,
                                             BackwardSharedMemory<Element, kHeadDim, kIsWide>& shared, int buffer) {
  using Shared = BackwardSharedMemory<Element, kHeadDim, kIsWide>;
  using Tiles = typename Shared::Tiles;
  constexpr int kM = Tiles::kScoreRows / 16, kN = Tiles::kStepKeys / 8;
  const int first_row = warp_here() % Shared::kScoreWarps * Tiles::kScoreRows;
  const int first_key = warp_here() / Shared::kScoreWarps * Tiles::kScoreKeys;
  constexpr bool kSomeStandBy = Shared::kScoreWarps * (Shared::kKeys / Tiles::kScoreKeys) < Shared::kWarps;
  if (kSomeStandBy && first_key >= Shared::kKeys) return;  // whole warps
#pragma unroll 1
  for (int key = first_key; key < first_key + Tiles::kScoreKeys; key += Tiles::kStepKeys) {
    float scores[kM][kN][4], d_weights[kM][kN][4];
    cuda::fill(scores, 0.0f);
    cuda::fill(d_weights, 0.0f);
    if constexpr (Tiles::kIsFloat) {
      cuda::multiply_by_rows(scores, shared.query, first_row, shared.key, key, num_keys - key, args.head_dim);
      cuda::multiply_by_rows(d_weights, shared.grad_out, first_row, shared.value, key, num_keys - key, args.value_dim);
    } else {
      using Queries = decltype(shared.query);
      using Keys = decltype(shared.key);
      const auto queries = cuda::left_operand(shared.query, first_row);
      const auto keys = cuda::right_operand_by_rows(shared.key, key);
      cuda::multiply_all_rows<Queries, Keys, Element>(scores, queries, keys);
      cuda::multiply_all_rows<Queries, Keys, Element>(d_weights, queries, keys, sizeof(Queries), sizeof(Keys));
    }
    if (args.softcap > 0.0f) {
      weigh<true>(args, is_masked, first_row, key, scores, d_weights, shared, buffer);
    } else {
      weigh<false>(args, is_masked, first_row, key, scores, d_weights, shared, buffer);
    }
  }
}

// Step 3.
template <typename Element, int kHeadDim, bool kIsWide, int kM, int kN>
__device__ __forceinline__ void add_to_keys(const BackwardArguments& args, float (&grad_key)[kM][kN][4],
                                            float (&grad_value)[kM][kN][4],
                                            BackwardSharedMemory<Element, kHeadDim, kIsWide>& shared) {
  using Shared = BackwardSharedMemory<Element, kHeadDim, kIsWide>;
  const int first_key = Shared::first_grad_key(), first_column = Shared::first_key_column();
  if constexpr (Shared::Tiles::kIsFloat) {
    cuda::multiply_by_columns<true>(grad_value, shared.weights, first_key, shared.grad_out, first_column,
                                    args.value_dim - first_column, Shared::kQueries);
    cuda::multiply_by_columns<true>(grad_key, shared.d_scores, first_key, shared.query, first_column,
                                    args.head_dim - first_column, Shared::kQueries);
  } else {
    using Scores = decltype(shared.weights);
    using Queries = decltype(shared.query);
    const auto weights = cuda::left_transposed_operand(shared.weights, first_key);
    const auto queries = cuda::right_operand_by_columns(shared.query, first_column);
    cuda::multiply_all_columns<true, Scores, Queries, Element>(grad_value, weights, queries, 0, sizeof(Queries));
    cuda::multiply_all_columns<true, Scores, Queries, Element>(grad_key, weights, queries, sizeof(Scores), 0);
  }
}

// Step 5.
template <typename Element, int kHeadDim, bool kIsWide, int kM, int kN>
__device__ __forceinline__ void add_to_queries(const BackwardArguments& args, float (&grad_query)[kM][kN][4],
                                               int first_column, int num_keys,
                                               BackwardSharedMemory<Element, kHeadDim, kIsWide>& shared) {
  using Shared = BackwardSharedMemory<Element, kHeadDim, kIsWide>;
  const int first_row = Shared::first_grad_row();
  if constexpr (Shared::Tiles::kIsFloat) {
    cuda::multiply_by_columns<false>(grad_query, shared.d_scores, first_row, shared.key, first_column,
                                     args.head_dim - first_column, num_keys);
  } else {
    const auto scores = cuda::left_operand(shared.d_scores, first_row);
    const auto keys = cuda::right_operand_by_columns(shared.key, first_column);
    cuda::multiply_all_columns<false, decltype(shared.d_scores), decltype(shared.key), Element>(grad_query, scores,
                                                                                                keys);
  }
}

// c += A B or A^T B as multiply_by_columns does, over visible pairs alone; A has a tile's entries as rows and keys as
// columns. Rare and slow.
template <bool kIsTransposed, typename TileA, typename TileB, typename RowTerms, int kM, int kN>
__device__ __forceinline__ void multiply_visible(float (&c)[kM][kN][4], TileA& a, int first_a, TileB& b,
                                                 int first_column, int depth, const RowTerms* terms) {
  const int g = lane_here() / 4, t = lane_here() % 4;
#pragma unroll 1
  for (int k = 0; k < depth; ++k) {
    float left[kM][2];
    bool is_visible[kM][2];
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int i = first_a + m * 16 + h * 8 + g;
        const int row = kIsTransposed ? k : i, key = kIsTransposed ? i : k;
        is_visible[m][h] = terms[row].sees(key);
        left[m][h] = cuda::to_float(a.at(row, key));
      }
    }
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      const float2 right = cuda::load_pair(&b.at(k, first_column + n * 8 + 2 * t));
#pragma unroll
      for (int m = 0; m < kM; ++m) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          if (!is_visible[m][h]) continue;
          c[m][n][2 * h] = fmaf(left[m][h], right.x, c[m][n][2 * h]);
          c[m][n][2 * h + 1] = fmaf(left[m][h], right.y, c[m][n][2 * h + 1]);
        }
      }
    }
  }
}

// Step 5's end: four neighbouring sums of a row at a time. The first chunk of keys of the deterministic way finds
// nothing to add to.
template <typename Rows, int kM, int kN>
__device__ __forceinline__ void add_grad_query(const BackwardArguments& args, const Rows& rows, int first_row,
                                               int first_column, bool is_first_chunk, const float (&sums)[kM][kN][4]) {
  const int g = lane_here() / 4;
  const int lane_column = first_column + cuda::four_columns_start(lane_here());
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float* row = rows.places[first_row + m * 16 + h * 8 + g].grad_query;
      const int num_columns = row == nullptr ? 0 : args.head_dim - lane_column;
      float4 four[kN / 2];  // the whole warp trades, whatever rows are there
#pragma unroll
      for (int n = 0; n < kN / 2; ++n) {
        const auto pairs = cuda::trade_pairs(make_float2(sums[m][2 * n][2 * h], sums[m][2 * n][2 * h + 1]),
                                             make_float2(sums[m][2 * n + 1][2 * h], sums[m][2 * n + 1][2 * h + 1]));
        four[n] = make_float4(pairs.low.x, pairs.low.y, pairs.high.x, pairs.high.y);
      }
      float* grad = row + lane_column;
      if (!args.is_deterministic) {
#pragma unroll
        for (int n = 0; n < kN / 2; ++n) {
          if (n * 16 < num_columns) cuda::add_atomic_quad(grad + n * 16, four[n]);
        }
      } else {
#pragma unroll
        for (int n = 0; n < kN / 2; ++n) {
          if (n * 16 >= num_columns) continue;
          float4& place = *reinterpret_cast<float4*>(grad + n * 16);
          const float4 before = is_first_chunk ? make_float4(0.0f, 0.0f, 0.0f, 0.0f) : place;
          place = make_float4(before.x + four[n].x, before.y + four[n].y, before.z + four[n].z, before.w + four[n].w);
        }
      }
    }
  }
}

// Step 6 for one of the two, into sums.
template <int kM, int kN>
__device__ __forceinline__ void add_key_gradient(float* rows, int64_t row_elements, const float (&sums)[kM][kN][4],
                                                 int first_key, int num_keys, int first_column, int num_columns,
                                                 bool is_deterministic) {
  const int g = lane_id() / 4, t = lane_id() % 4;
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int key = first_key + m * 16 + h * 8 + g;
      if (key >= num_keys) continue;
      float* row = rows + key * row_elements + first_column;
#pragma unroll
      for (int n = 0; n < kN; ++n) {
        const int column = n * 8 + 2 * t;
        if (first_column + column >= num_columns) continue;
        const float2 pair = make_float2(sums[m][n][2 * h], sums[m][n][2 * h + 1]);
        if (is_deterministic) {
          float2& place = *reinterpret_cast<float2*>(row + column);
          place = make_float2(place.x + pair.x, place.y + pair.y);
        } else {
          cuda::add_atomic_pair(row + column, pair);
        }
      }
    }
  }
}

// Step 6 for one of the two, where nobody else has a part: four neighbours of a row at a time.
template <typename Element, int kM, int kN>
__device__ __forceinline__ void write_key_gradient(Element* rows, int64_t row_stride, const float (&sums)[kM][kN][4],
                                                   float factor, int first_key, int num_keys, int first_column,
                                                   int num_columns) {
  const int g = lane_id() / 4;
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int key = first_key + m * 16 + h * 8 + g;
      Element* row = rows + key * row_stride;
#pragma unroll
      for (int n = 0; n < kN; n += 2) {
        const int column = first_column + n * 8 + cuda::four_columns_start();
        const auto pairs = cuda::trade_pairs(make_float2(sums[m][n][2 * h], sums[m][n][2 * h + 1]),
                                             make_float2(sums[m][n + 1][2 * h], sums[m][n + 1][2 * h + 1]));
        if (key >= num_keys || column >= num_columns) continue;  // after the trade, which needs the whole warp
        cuda::store_four(row + column, make_float4(pairs.low.x * factor, pairs.low.y * factor, pairs.high.x * factor,
                                                   pairs.high.y * factor));
      }
    }
  }
}

}  // namespace backward

template <typename Element, int kHeadDim, bool kIsWide>
__global__ void __launch_bounds__(BackwardSharedMemory<Element, kHeadDim, kIsWide>::kThreads,
                                  MobaBackwardTiles<Element, kHeadDim, kIsWide>::kBlocksPerProcessor)
    moba_attend_blocks_backward(const BackwardArguments args) {
  using Shared = BackwardSharedMemory<Element, kHeadDim, kIsWide>;
  using Tiles = typename Shared::Tiles;
  Shared& shared = *reinterpret_cast<Shared*>(cuda::dynamic_shared_memory());
  const int64_t unit_in_wave = blockIdx.y;
  const Unit own_unit = unit_at(args.geometry, args.wave.first_unit + unit_in_wave);
  WorkItem own_item;
  // Step 1. The grid is a bound taken from shapes: whole thread blocks past the last item return, and so do those whose
  // part of a short block is empty.
  const auto item_idx = static_cast<int32_t>(blockIdx.x / static_cast<unsigned>(args.num_chunks));
  if (!find_work_item(args.geometry, args.lists, unit_in_wave, item_idx, own_item)) return;
  const auto chunk = static_cast<int>(blockIdx.x % static_cast<unsigned>(args.num_chunks));
  const int own_first_key = (args.first_chunk + chunk) * Shared::kKeys;
  const int own_num_keys = min(Shared::kKeys, own_item.block.num_keys - own_first_key);
  if (own_num_keys <= 0) return;
  if (threadIdx.x == 0) {
    shared.unit = own_unit;
    shared.item = own_item;
    shared.first_key = own_first_key;
    shared.num_keys = own_num_keys;
  }
  // Publishes the work to all threads.
  __syncthreads();
  const Unit& unit = shared.unit;
  const WorkItem& item = shared.item;
  const int32_t &first_key = shared.first_key, &num_keys = shared.num_keys;
  const auto copy_keys = [&](auto& tile, const Array<const void, 4>& tensor, int depth) {
    const Element* rows = tensor.at<Element>(unit.batch_idx, unit.kv_head, item.block.first_key + first_key);
    backward::copy_rows_async<Shared::kThreads>(
        tile, depth, [&](int row) { return row < num_keys ? rows + row * tensor.strides[2] : nullptr; });
  };
  copy_keys(shared.key, args.key, args.head_dim);
  copy_keys(shared.value, args.value, args.value_dim);
  const auto is_placing = [] { return cuda::thread_index_here() < Shared::kPlacingThreads; };  // whole warps
  if (is_placing()) {
    const int32_t entry = backward::entry_of_thread<Shared::kQueries>(item, 0);
    backward::place_row(args, unit, unit_in_wave, item.block, first_key, entry, shared, 0);
  }
  // Publishes the first tile's rows to all threads.
  __syncthreads();
  backward::gather_rows_async(args, shared, 0);
  cuda::copy_async_commit();

  float grad_key[Tiles::kGradKeys / 16][Shared::kKeyColumns / 8][4];
  float grad_value[Tiles::kGradKeys / 16][Shared::kKeyColumns / 8][4];
  cuda::fill(grad_key, 0.0f);
  cuda::fill(grad_value, 0.0f);
#pragma unroll 1
  for (int first_entry = 0; first_entry < item.num_entries; first_entry += Shared::kQueries) {
    const int buffer = first_entry / Shared::kQueries % 2;
    const auto& rows = shared.rows[buffer];
    cuda::copy_async_wait<0>();
    // Publishes queries and gradients of outputs, and the first time keys and values, to all warps; tells them that
    // weights and d_scores of the tile before have been used and may be overwritten.
    __syncthreads();
    const bool is_last = first_entry + Shared::kQueries >= item.num_entries;
    int32_t next_entry = -1;
    if (is_placing()) next_entry = backward::entry_of_thread<Shared::kQueries>(item, first_entry + Shared::kQueries);
    backward::make_weights(args, backward::any_of(rows.is_masked), num_keys, shared, buffer);
    bool is_unusual = false;
    if (backward::any_of(rows.hides_keys)) {
      is_unusual = backward::has_unusual_chunks<Shared::kThreads>(shared.query) ||
                   backward::has_unusual_chunks<Shared::kThreads>(shared.grad_out) ||
                   backward::has_unusual_chunks<Shared::kThreads>(shared.key) ||
                   backward::has_unusual_chunks<Shared::kThreads>(shared.value);
      // Tells all threads whether the tile needs care.
      is_unusual = __syncthreads_or(is_unusual ? 1 : 0) != 0;
    }
    // Publishes weights and d_scores to all warps.
    __syncthreads();
    if (is_placing() && !is_last) {
      backward::place_row(args, unit, unit_in_wave, item.block, first_key, next_entry, shared, buffer ^ 1);
    }
    if (is_unusual) {
      const int warp_key = Shared::first_grad_key(), key_column = Shared::first_key_column();
      backward::multiply_visible<true>(grad_value, shared.weights, warp_key, shared.grad_out, key_column,
                                       Shared::kQueries, rows.terms);
      backward::multiply_visible<true>(grad_key, shared.d_scores, warp_key, shared.query, key_column, Shared::kQueries,
                                       rows.terms);
    } else {
      backward::add_to_keys<Element, kHeadDim, kIsWide>(args, grad_key, grad_value, shared);
    }
    // Tells all threads that queries and gradients of outputs have been used and the next ones may overwrite them;
    // publishes where those lie.
    __syncthreads();
    if (!is_last) {
      backward::gather_rows_async(args, shared, buffer ^ 1);
      cuda::copy_async_commit();
    }
#pragma unroll 1
    for (int panel = 0; panel < Shared::kQueryColumns; panel += Shared::kPanelColumns) {
      const int column = Shared::first_query_column() + panel;
      const int first_row = Shared::first_grad_row();
      float grad_query[Tiles::kGradRows / 16][Shared::kPanelColumns / 8][4];
      cuda::fill(grad_query, 0.0f);
      if (is_unusual) {
        backward::multiply_visible<false>(grad_query, shared.d_scores, first_row, shared.key, column, num_keys,
                                          rows.terms);
      } else {
        backward::add_to_queries<Element, kHeadDim, kIsWide>(args, grad_query, column, num_keys, shared);
      }
      backward::add_grad_query(args, rows, first_row, column, first_key == 0, grad_query);
    }
  }
  const int warp_key = Shared::first_grad_key(), key_column = Shared::first_key_column();
  const int64_t key_row = item.block.first_key + first_key;
  if (args.writes_keys && item.is_whole_list) {
    backward::write_key_gradient(args.grad_key.at<Element>(unit.batch_idx, unit.kv_head, key_row),
                                 args.grad_key.strides[2], grad_key, args.gradient_scale, warp_key, num_keys,
                                 key_column, args.head_dim);
    backward::write_key_gradient(args.grad_value.at<Element>(unit.batch_idx, unit.kv_head, key_row),
                                 args.grad_value.strides[2], grad_value, 1.0f, warp_key, num_keys, key_column,
                                 args.value_dim);
    return;
  }
  const int64_t unit_key = unit_in_wave * args.geometry.key_len + key_row;
  backward::add_key_gradient(args.grad_key_sums + unit_key * args.key_elements, args.key_elements, grad_key, warp_key,
                             num_keys, key_column, args.head_dim, args.is_deterministic);
  backward::add_key_gradient(args.grad_value_sums + unit_key * args.value_elements, args.value_elements, grad_value,
                             warp_key, num_keys, key_column, args.value_dim, args.is_deterministic);
}

struct BackwardKernel {
  Dtype dtype;
  int64_t max_head_dim;  // and value_dim
  int64_t threads;
  int64_t shared_bytes;
  int64_t keys_per_chunk;
  int64_t min_block_size;  // smaller blocks would leave half of its tiles empty
  void (*launch)(const BackwardArguments& args, cudaStream_t stream);
};

template <typename Element, int kHeadDim, bool kIsWide>
constexpr BackwardKernel backward_kernel() {
  using Shared = BackwardSharedMemory<Element, kHeadDim, kIsWide>;
  static_assert(kIsWide || sizeof(Shared) <= 99 * 1024, "every architecture has a kernel");
  static_assert(sizeof(Shared) <= 160 * 1024, "what sm_80 gives a thread block");
  return {kDtypeOf<Element>,
          kHeadDim,
          Shared::kThreads,
          sizeof(Shared),
          Shared::kKeys,
          kIsWide ? Shared::kKeys / 2 + 1 : 0,
          [](const BackwardArguments& args, cudaStream_t stream) {
            const dim3 grid(static_cast<unsigned>(args.lists.max_items * args.num_chunks),
                            static_cast<unsigned>(args.wave.num_units));
            cuda::launch(moba_attend_blocks_backward<Element, kHeadDim, kIsWide>,
                         {grid, dim3(Shared::kThreads), sizeof(Shared), stream}, args);
          }};
}

// Ascending in head_dim; the wide kernel of a head_dim, where there is one, first.
template <typename Element>
constexpr auto make_backward_kernels() {
  if constexpr (std::is_same_v<Element, float>) {
    return std::array{backward_kernel<Element, 64, false>(), backward_kernel<Element, 128, false>(),
                      backward_kernel<Element, 256, false>()};
  } else {
    return std::array{backward_kernel<Element, 64, true>(), backward_kernel<Element, 64, false>(),
                      backward_kernel<Element, 128, true>(), backward_kernel<Element, 128, false>(),
                      backward_kernel<Element, 256, false>()};
  }
}
template <typename Element>
inline constexpr auto kBackwardKernels = make_backward_kernels<Element>();

// An element type's kernels. Each of the three lists is compiled in a file of its own, which the build writes
// (tools/cuda_instances.cmake).
using BackwardKernels = std::span<const BackwardKernel>;
BackwardKernels backward_kernels(float);
BackwardKernels backward_kernels(BFloat16);
BackwardKernels backward_kernels(Float16);

}  // namespace topgather
