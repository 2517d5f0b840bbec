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
//   1. find the item; copy its keys and values to shared memory;
//   per tile:
//   2. gather the entries' rows of query and grad_out;
//   3. a warp takes 16 rows by some keys: scores, d_weights; weights and d_scores to shared memory;
//   4. a warp takes 16 keys by some columns: grad_value += weights^T grad_out, grad_key += d_scores^T query;
//   5. a warp takes 16 rows by some columns: grad_query = d_scores key, added to where it belongs;
//   last:
//   6. grad_key and grad_value added to where they belong.
// All query heads of the group stand in the same lists: nothing is expanded.
// Numerics: float32 sums; weights and d_scores are rounded to a 16-bit element type before they are multiplied. A scale
// above 1 is multiplied in before, so that float16 does not lose what it would magnify; a smaller one after. Hidden
// pairs weigh 0, and 0 x inf is NaN: a tile that hides keys and holds numbers that are not finite takes steps 4 and 5
// in plain arithmetic over visible pairs alone, straight to memory. Ties do not arise.
// Determinism: sums over thread blocks are atomic additions of float32, in any order; the deterministic way has one
// item a list, a place of its own for each entry's grad_query, and no atomics.
#pragma once

#include "../common/checks.h"
#include "../common/softmax_terms.h"
#include "../cuda/launch.cuh"
#include "../cuda/scores.cuh"
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
  int32_t head_dim;
  int32_t value_dim;
  int32_t key_elements;    // of a row of grad_query and grad_key
  int32_t value_elements;  // of a row of grad_value
  float score_scale;       // scale * log2(e)
  float softcap;           // softcap * log2(e); 0: scores stay
  float inverse_softcap;
  float d_score_scale;                 // on gradients of scores before they are rounded
  float gradient_scale;                // on grad_query and grad_key; the two make scale
  Array<const void, 4> query;          // [batch, query head, query, D] dtype
  Array<const void, 4> key;            // [batch, kv head, key, D] dtype
  Array<const void, 4> value;          // [batch, kv head, key, V] dtype
  Array<const void, 4> grad_out;       // [batch, query head, query, V] dtype
  Array<const void, 3> lse;            // [batch, query head, query] float32
  Array<const void, 4> softmax_terms;  // [batch, query head, query, 2] float32, or data null
  const float* row_shift;              // [unit, row] float32
  float* grad_query;                   // [unit, row, key_elements] float32; deterministic: [unit, entry, key_elements]
  float* grad_key;                     // [unit, key, key_elements] float32
  float* grad_value;                   // [unit, key, value_elements] float32
};

template <typename Element, int kHeadDim>
struct BackwardSharedMemory {
  using Tiles = MobaBackwardTiles<Element, kHeadDim>;
  static constexpr int kQueries = Tiles::kQueries;
  static constexpr int kKeys = Tiles::kKeys;
  static constexpr int kWarps = Tiles::kWarps;
  static constexpr int kThreads = kWarps * cuda::kLanes;
  // Steps 3 and 5: warps by rows, then by keys (16 at least, so that some warps may stand by) or columns. Step 4: warps
  // by keys, then by columns.
  static constexpr int kRowWarps = kQueries / 16;
  static constexpr int kBesideRows = kWarps / kRowWarps;
  static constexpr int kBesideScores = kBesideRows < kKeys / 16 ? kBesideRows : kKeys / 16;
  static constexpr int kKeyWarps = kKeys / 16;
  static constexpr int kBesideKeys = kWarps / kKeyWarps;
  static constexpr int kKeysPerWarp = kKeys / kBesideScores;
  static constexpr int kQueryColumns = kHeadDim / kBesideRows;
  static constexpr int kKeyColumns = kHeadDim / kBesideKeys;
  static constexpr int kPanelColumns = kQueryColumns < Tiles::kPanelColumns ? kQueryColumns : Tiles::kPanelColumns;
  static_assert(kRowWarps * kBesideRows == kWarps && kKeyWarps * kBesideKeys == kWarps, "every warp has work");
  static_assert(kQueries <= kThreads, "a thread a row");

  cuda::SharedTile<Element, kKeys, kHeadDim> key;
  cuda::SharedTile<Element, kKeys, kHeadDim> value;
  cuda::SharedTile<Element, kQueries, kHeadDim> query;
  cuda::SharedTile<Element, kQueries, kHeadDim> grad_out;
  cuda::SharedTile<Element, kQueries, kKeys> weights;
  cuda::SharedTile<Element, kQueries, kKeys> d_scores;
  int32_t entry[kQueries];        // -1: the row is not there
  int32_t num_visible[kQueries];  // of this thread block's keys
  float largest[kQueries];        // of softmax terms
  float factor[kQueries];         // of softmax terms
  float shift[kQueries];
  int64_t query_offset[kQueries];     // of the row, in elements
  int64_t grad_out_offset[kQueries];  // of the row, in elements
};

namespace backward {

using cuda::kLanes;
using cuda::lane_id;
using cuda::warp_id;

constexpr float kLog2E = 1.4426950408889634f;

template <typename Tile, typename Element>
__device__ __forceinline__ void copy_rows_async(Tile& tile, const Element* rows, int64_t row_stride, int count,
                                                int depth, int num_threads) {
  const int row_chunks = (depth + Tile::kPerChunk - 1) / Tile::kPerChunk;
  const int used_chunks = (depth + 15) / 16 * 16 / Tile::kPerChunk;
  for (int i = threadIdx.x; i < Tile::kRows * used_chunks; i += num_threads) {
    const int row = i / used_chunks, chunk = i % used_chunks;
    cuda::copy_chunk_async(tile, row, chunk, rows + row * row_stride, row_chunks, row < count);
  }
}

// Step 2, first part: a thread a row. True if the row hides keys.
template <typename Element, int kHeadDim>
__device__ __forceinline__ bool place_row(const BackwardArguments& args, const Unit& unit, int64_t unit_in_wave,
                                          const WorkItem& item, int first_entry, int first_key, int num_keys,
                                          BackwardSharedMemory<Element, kHeadDim>& shared) {
  const int i = static_cast<int>(threadIdx.x);
  if (i >= shared.kQueries) return false;
  const bool is_there = first_entry + i < item.num_entries;
  const int32_t entry = is_there ? item.entries[first_entry + i] : -1;
  shared.entry[i] = entry;
  if (!is_there) {
    shared.num_visible[i] = 0;
    shared.largest[i] = 0.0f;
    shared.factor[i] = 0.0f;
    shared.shift[i] = 0.0f;
    return false;
  }
  const int32_t row = entry / args.geometry.top_k;
  const WaveRow place = wave_row(args.geometry, args.wave, unit, row);
  const int32_t visible = num_visible_keys(args.geometry, item.block, place.query) - first_key;
  const int32_t num_visible = visible < 0 ? 0 : min(visible, num_keys);
  const float* given_terms = args.softmax_terms.data == nullptr
                                 ? nullptr
                                 : args.softmax_terms.at<float>(unit.batch_idx, place.head, place.query);
  const SoftmaxTerms<float> terms =
      read_softmax_terms(given_terms, *args.lse.at<float>(unit.batch_idx, place.head, place.query));
  shared.num_visible[i] = num_visible;
  shared.largest[i] = terms.largest;
  shared.factor[i] = terms.factor;
  shared.shift[i] = args.row_shift[unit_in_wave * args.lists.num_rows + row];
  shared.query_offset[i] = args.query.offset(unit.batch_idx, place.head, place.query);
  shared.grad_out_offset[i] = args.grad_out.offset(unit.batch_idx, place.head, place.query);
  return num_visible < num_keys;
}

// Step 2, second part.
template <typename Tile>
__device__ __forceinline__ void gather_rows_async(Tile& tile, const Array<const void, 4>& tensor,
                                                  const int64_t* offsets, const int32_t* entries, int depth,
                                                  int num_threads) {
  using Element = std::remove_reference_t<decltype(tile.elements[0])>;
  const int row_chunks = (depth + Tile::kPerChunk - 1) / Tile::kPerChunk;
  const int used_chunks = (depth + 15) / 16 * 16 / Tile::kPerChunk;
  for (int i = threadIdx.x; i < Tile::kRows * used_chunks; i += num_threads) {
    const int row = i / used_chunks, chunk = i % used_chunks;
    const bool is_there = entries[row] >= 0;
    const auto* base = tensor.at<Element>();
    cuda::copy_chunk_async(tile, row, chunk, is_there ? base + offsets[row] : base, row_chunks, is_there);
  }
}

template <typename Tile>
__device__ __forceinline__ bool has_unusual_numbers(Tile& tile, int num_rows, int depth, int num_threads) {
  bool is_unusual = false;
  for (int i = threadIdx.x; i < num_rows * depth; i += num_threads) {
    is_unusual = is_unusual || !(fabsf(cuda::to_float(tile.at(i / depth, i % depth))) < INFINITY);
  }
  return is_unusual;
}

// Step 3.
template <typename Element, int kHeadDim>
__device__ __forceinline__ void make_weights(const BackwardArguments& args, int num_keys,
                                             BackwardSharedMemory<Element, kHeadDim>& shared) {
  using Shared = BackwardSharedMemory<Element, kHeadDim>;
  const int first_row = warp_id() % Shared::kRowWarps * 16;
  const int first_key = warp_id() / Shared::kRowWarps * Shared::kKeysPerWarp;
  if (first_key >= Shared::kKeys) return;  // whole warps
  const int g = lane_id() / 4, t = lane_id() % 4;
#pragma unroll 1
  for (int key = first_key; key < first_key + Shared::kKeysPerWarp; key += 16) {
    float scores[1][2][4], d_weights[1][2][4];
    cuda::fill(scores, 0.0f);
    cuda::fill(d_weights, 0.0f);
    cuda::multiply_by_rows(scores, shared.query, first_row, shared.key, key, num_keys - key, args.head_dim);
#pragma unroll
    for (int i = 0; i < 8; ++i) scores[0][i / 4][i % 4] = cuda::scale_score(scores[0][i / 4][i % 4], args.score_scale);
    if (args.softcap > 0.0f) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        scores[0][i / 4][i % 4] = cuda::cap_score(scores[0][i / 4][i % 4], args.softcap, args.inverse_softcap);
      }
    }
    cuda::multiply_by_rows(d_weights, shared.grad_out, first_row, shared.value, key, num_keys - key, args.value_dim);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = first_row + h * 8 + g;
      const int num_visible = shared.num_visible[row];
      const float largest = shared.largest[row], factor = shared.factor[row], shift = shared.shift[row];
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        float weights[2], d_scores[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const bool is_visible = key + n * 8 + 2 * t + e < num_visible;
          float& score = scores[0][n][2 * h + e];
          const float weight = cuda::exp2_approximate(score - largest) * factor;
          weights[e] = is_visible ? weight : 0.0f;
          d_scores[e] = is_visible ? weight * (d_weights[0][n][2 * h + e] - shift) * args.d_score_scale : 0.0f;
          if (args.softcap > 0.0f) d_scores[e] *= cuda::slope_of_cap(score, args.inverse_softcap);
        }
        cuda::store_pair(shared.weights, row, key + n * 8 + 2 * t, weights[0], weights[1]);
        cuda::store_pair(shared.d_scores, row, key + n * 8 + 2 * t, d_scores[0], d_scores[1]);
      }
    }
  }
}

// Where grad_query of an entry goes, in elements.
__device__ __forceinline__ int64_t grad_query_row(const BackwardArguments& args, int64_t unit_in_wave, int32_t entry) {
  const int64_t rows_before = unit_in_wave * args.lists.num_rows;
  const int64_t row =
      args.is_deterministic ? rows_before * args.geometry.top_k + entry : rows_before + entry / args.geometry.top_k;
  return row * args.key_elements;
}

// One sum to memory: atomically, or by the one thread that owns it.
__device__ __forceinline__ void add_one(float* address, float value, bool is_deterministic) {
  if (is_deterministic) {
    *address += value;
  } else {
    cuda::add_atomic(address, value);
  }
}

// Steps 4 and 5 over visible pairs alone, straight to memory. Rare and slow: a thread takes an element of a gradient at
// a time and sums over the tile.
template <typename Element, int kHeadDim>
__device__ __forceinline__ void add_seen_pairs(const BackwardArguments& args, int64_t unit_in_wave, int64_t unit_key,
                                               int num_rows, int num_keys, int chunk,
                                               BackwardSharedMemory<Element, kHeadDim>& shared) {
  using Shared = BackwardSharedMemory<Element, kHeadDim>;
  const auto add_to_keys = [&](auto& left, auto& right, int num_columns, float* sums, int64_t row_elements,
                               float factor) {
#pragma unroll 1
    for (int i = threadIdx.x; i < num_keys * num_columns; i += Shared::kThreads) {
      const int key = i / num_columns, column = i % num_columns;
      float sum = 0.0f;
#pragma unroll 1
      for (int row = 0; row < num_rows; ++row) {
        if (key >= shared.num_visible[row]) continue;
        sum = fmaf(cuda::to_float(left.at(row, key)), cuda::to_float(right.at(row, column)), sum);
      }
      add_one(sums + (unit_key + key) * row_elements + column, sum * factor, args.is_deterministic);
    }
  };
  add_to_keys(shared.weights, shared.grad_out, args.value_dim, args.grad_value, args.value_elements, 1.0f);
  add_to_keys(shared.d_scores, shared.query, args.head_dim, args.grad_key, args.key_elements, args.gradient_scale);
#pragma unroll 1
  for (int i = threadIdx.x; i < num_rows * args.head_dim; i += Shared::kThreads) {
    const int row = i / args.head_dim, column = i % args.head_dim;
    float sum = 0.0f;
#pragma unroll 1
    for (int key = 0; key < shared.num_visible[row]; ++key) {
      sum = fmaf(cuda::to_float(shared.d_scores.at(row, key)), cuda::to_float(shared.key.at(key, column)), sum);
    }
    float* grad = args.grad_query + grad_query_row(args, unit_in_wave, shared.entry[row]) + column;
    if (args.is_deterministic && chunk == 0) {
      *grad = sum * args.gradient_scale;
    } else {
      add_one(grad, sum * args.gradient_scale, args.is_deterministic);
    }
  }
}

// Two neighbouring sums to memory: atomically, or by the one thread that owns them.
__device__ __forceinline__ void add_pair(float* address, float first, float second, bool is_deterministic) {
  if (is_deterministic) {
    float2& pair = *reinterpret_cast<float2*>(address);
    pair = make_float2(pair.x + first, pair.y + second);
  } else {
    cuda::add_atomic_pair(address, make_float2(first, second));
  }
}

// Step 5's end: four neighbouring sums of a row at a time. The first chunk of keys of the deterministic way finds
// nothing to add to.
template <typename Element, int kHeadDim, int kN>
__device__ __forceinline__ void add_grad_query(const BackwardArguments& args, int64_t unit_in_wave,
                                               const BackwardSharedMemory<Element, kHeadDim>& shared, int first_row,
                                               int first_column, int chunk, const float (&sums)[1][kN][4]) {
  const int g = lane_id() / 4;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int32_t entry = shared.entry[first_row + h * 8 + g];
    float* grad = args.grad_query + grad_query_row(args, unit_in_wave, entry < 0 ? 0 : entry) + first_column +
                  cuda::four_columns_start();
#pragma unroll
    for (int n = 0; n < kN; n += 2) {
      if (first_column + n * 8 >= args.head_dim) continue;
      const auto pairs = cuda::trade_pairs(make_float2(sums[0][n][2 * h], sums[0][n][2 * h + 1]),
                                           make_float2(sums[0][n + 1][2 * h], sums[0][n + 1][2 * h + 1]));
      if (entry < 0) continue;  // after the trade, which needs the whole warp
      const float scale = args.gradient_scale;
      float4 four = make_float4(pairs.low.x * scale, pairs.low.y * scale, pairs.high.x * scale, pairs.high.y * scale);
      if (!args.is_deterministic) {
        cuda::add_atomic_quad(grad + n * 8, four);
        continue;
      }
      float4& place = *reinterpret_cast<float4*>(grad + n * 8);
      if (chunk > 0) four = make_float4(place.x + four.x, place.y + four.y, place.z + four.z, place.w + four.w);
      place = four;
    }
  }
}

// Step 6 for one of the two.
template <int kN>
__device__ __forceinline__ void add_key_gradient(float* rows, int64_t row_elements, const float (&sums)[1][kN][4],
                                                 float factor, int first_key, int num_keys, int first_column,
                                                 int num_columns, bool is_deterministic) {
  const int g = lane_id() / 4, t = lane_id() % 4;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int key = first_key + h * 8 + g;
    if (key >= num_keys) continue;
    float* row = rows + key * row_elements + first_column;
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      const int column = n * 8 + 2 * t;
      if (first_column + column >= num_columns) continue;
      add_pair(row + column, sums[0][n][2 * h] * factor, sums[0][n][2 * h + 1] * factor, is_deterministic);
    }
  }
}

}  // namespace backward

template <typename Element, int kHeadDim>
__global__ void __launch_bounds__(BackwardSharedMemory<Element, kHeadDim>::kThreads,
                                  BackwardSharedMemory<Element, kHeadDim>::Tiles::kBlocksPerProcessor)
    moba_attend_blocks_backward(const BackwardArguments args) {
  using Shared = BackwardSharedMemory<Element, kHeadDim>;
  Shared& shared = *reinterpret_cast<Shared*>(cuda::dynamic_shared_memory());
  const int64_t unit_in_wave = blockIdx.y;
  const Unit unit = unit_at(args.geometry, args.wave.first_unit + unit_in_wave);
  const int chunk = args.first_chunk + static_cast<int>(blockIdx.x % static_cast<unsigned>(args.num_chunks));
  WorkItem item;
  // Step 1. The grid is a bound taken from shapes: whole thread blocks past the last item return, and so do those whose
  // part of a short block is empty.
  const auto item_idx = static_cast<int32_t>(blockIdx.x / static_cast<unsigned>(args.num_chunks));
  if (!find_work_item(args.geometry, args.lists, unit_in_wave, item_idx, item)) return;
  const int first_key = chunk * Shared::kKeys;
  const int num_keys = min(Shared::kKeys, item.block.num_keys - first_key);
  if (num_keys <= 0) return;
  const int64_t key_row = item.block.first_key + first_key;
  const int64_t unit_key = unit_in_wave * args.geometry.key_len + key_row;
  backward::copy_rows_async(shared.key, args.key.at<Element>(unit.batch_idx, unit.kv_head, key_row),
                            args.key.strides[2], num_keys, args.head_dim, Shared::kThreads);
  backward::copy_rows_async(shared.value, args.value.at<Element>(unit.batch_idx, unit.kv_head, key_row),
                            args.value.strides[2], num_keys, args.value_dim, Shared::kThreads);
  cuda::copy_async_commit();

  const int warp = cuda::warp_id();
  const int first_row = warp % Shared::kRowWarps * 16;
  const int query_column = warp / Shared::kRowWarps * Shared::kQueryColumns;
  const int warp_key = warp % Shared::kKeyWarps * 16;
  const int key_column = warp / Shared::kKeyWarps * Shared::kKeyColumns;
  float grad_key[1][Shared::kKeyColumns / 8][4], grad_value[1][Shared::kKeyColumns / 8][4];
  cuda::fill(grad_key, 0.0f);
  cuda::fill(grad_value, 0.0f);
#pragma unroll 1
  for (int first_entry = 0; first_entry < item.num_entries; first_entry += Shared::kQueries) {
    const int num_rows = min(Shared::kQueries, item.num_entries - first_entry);
    const bool row_hides_keys = backward::place_row<Element, kHeadDim>(args, unit, unit_in_wave, item, first_entry,
                                                                       first_key, num_keys, shared);
    // Publishes every row's place to all threads, and whether any hides keys.
    const bool hides_keys = __syncthreads_or(row_hides_keys ? 1 : 0) != 0;
    backward::gather_rows_async(shared.query, args.query, shared.query_offset, shared.entry, args.head_dim,
                                Shared::kThreads);
    backward::gather_rows_async(shared.grad_out, args.grad_out, shared.grad_out_offset, shared.entry, args.value_dim,
                                Shared::kThreads);
    cuda::copy_async_commit();
    cuda::copy_async_wait<0>();
    // Publishes queries and gradients of outputs, and the first time keys and values, to all warps.
    __syncthreads();
    backward::make_weights<Element, kHeadDim>(args, num_keys, shared);
    bool is_unusual = false;
    if (hides_keys) {
      is_unusual = backward::has_unusual_numbers(shared.query, num_rows, args.head_dim, Shared::kThreads) ||
                   backward::has_unusual_numbers(shared.grad_out, num_rows, args.value_dim, Shared::kThreads) ||
                   backward::has_unusual_numbers(shared.key, num_keys, args.head_dim, Shared::kThreads) ||
                   backward::has_unusual_numbers(shared.value, num_keys, args.value_dim, Shared::kThreads);
    }
    // Publishes weights and gradients of scores to all warps, and whether the tile needs care.
    is_unusual = __syncthreads_or(is_unusual ? 1 : 0) != 0;
    if (is_unusual) {
      backward::add_seen_pairs<Element, kHeadDim>(args, unit_in_wave, unit_key, num_rows, num_keys, chunk, shared);
    } else {
      cuda::multiply_by_columns<true>(grad_value, shared.weights, warp_key, shared.grad_out, key_column,
                                      args.value_dim - key_column, num_rows);
      cuda::multiply_by_columns<true>(grad_key, shared.d_scores, warp_key, shared.query, key_column,
                                      args.head_dim - key_column, num_rows);
#pragma unroll 1
      for (int panel = 0; panel < Shared::kQueryColumns; panel += Shared::kPanelColumns) {
        const int column = query_column + panel;
        float grad_query[1][Shared::kPanelColumns / 8][4];
        cuda::fill(grad_query, 0.0f);
        cuda::multiply_by_columns<false>(grad_query, shared.d_scores, first_row, shared.key, column,
                                         args.head_dim - column, num_keys);
        backward::add_grad_query<Element, kHeadDim>(args, unit_in_wave, shared, first_row, column, chunk, grad_query);
      }
    }
    // Tells all threads that the tile has been used and the next one may overwrite it.
    __syncthreads();
  }
  backward::add_key_gradient(args.grad_key + unit_key * args.key_elements, args.key_elements, grad_key,
                             args.gradient_scale, warp_key, num_keys, key_column, args.head_dim, args.is_deterministic);
  backward::add_key_gradient(args.grad_value + unit_key * args.value_elements, args.value_elements, grad_value, 1.0f,
                             warp_key, num_keys, key_column, args.value_dim, args.is_deterministic);
}

struct BackwardKernel {
  Dtype dtype;
  int64_t max_head_dim;  // and value_dim
  int64_t threads;
  int64_t shared_bytes;
  int64_t entries_per_item;
  int64_t keys_per_chunk;
  void (*launch)(const BackwardArguments& args, cudaStream_t stream);
};

template <typename Element, int kHeadDim>
constexpr BackwardKernel backward_kernel() {
  using Shared = BackwardSharedMemory<Element, kHeadDim>;
  static_assert(sizeof(Shared) <= 99 * 1024, "one table for all architectures");
  return {kDtypeOf<Element>,
          kHeadDim,
          Shared::kThreads,
          sizeof(Shared),
          Shared::Tiles::kEntriesPerItem,
          Shared::kKeys,
          [](const BackwardArguments& args, cudaStream_t stream) {
            const dim3 grid(static_cast<unsigned>(args.lists.max_items * args.num_chunks),
                            static_cast<unsigned>(args.wave.num_units));
            cuda::launch(moba_attend_blocks_backward<Element, kHeadDim>,
                         {grid, dim3(Shared::kThreads), sizeof(Shared), stream}, args);
          }};
}

using BackwardKernels = BackwardKernel[3];
template <typename Element>
inline constexpr BackwardKernels kBackwardKernels = {backward_kernel<Element, 64>(), backward_kernel<Element, 128>(),
                                                     backward_kernel<Element, 256>()};

// An element type's kernels, ascending in head_dim. Each of the three is compiled in a file of its own, which the build
// writes (tools/cuda_instances.cmake).
const BackwardKernels& backward_kernels(float);
const BackwardKernels& backward_kernels(BFloat16);
const BackwardKernels& backward_kernels(Float16);

}  // namespace topgather
