// Block attention forward on CUDA, key-stationary: a block's keys and values stay on chip, the queries that chose it
// come.
//
//   partial_e = softmax over the visible keys of one choice e (row, slot) applied to their values      [entry, V]
//   max_e     = max of log2(e) * scale * dot(query, key), capped where there is a softcap, or up to 8 less  [entry]
//   sum_e     = sum of 2^(score - max_e)                                                                  [entry]
//   out_row   = sum_e 2^(max_e - max) sum_e partial_e / sum_e 2^(max_e - max) sum_e        (moba_merge_cuda.cuh)
//
// Who owns what: a thread block owns a work item, up to kEntriesPerItem entries of one block's list. Its warps take
// tiles of kRowsPerWarp entries in turn, each on its own: a tile's queries lie in the warp's part of shared memory, its
// scores and outputs in the warp's registers, so that warps meet only while keys arrive. Steps:
//   1. find the item's block and entries; copy its keys and values to shared memory;
//   per tile of a warp:
//   2. gather the entries' queries (started while the tile before was at step 5);
//   per kStepKeys keys:
//   3. scores, scaled to base 2; hidden keys to -inf;
//   4. base and sum per row (online softmax); a base moves only once a score is 2^8 times as heavy;
//   5. outputs += weights x values;
//   6. divide, round to the element type, write partial, maximum and sum.
// Where outputs would not fit the registers (float32, V > 128), the grid's third dimension takes kValueColumns columns
// of values each, and scores are computed for each of them. Blocks of more than kResidentKeys keys pass through shared
// memory once per round of tiles, all warps together.
// Numerics: scores, weights and sums in float32; weights are rounded to a 16-bit element type before they meet the
// values. A hidden key weighs 0, and 0 x inf is NaN: where a block's values are not all finite, steps that hide keys
// from some row of a tile take step 5 in plain arithmetic over visible pairs alone. Most tiles of a long sequence hide
// nothing, so that numbers that are not finite cost little. A choice whose scores are all -inf leaves its outputs
// undivided, with a sum of 0; the maximum passes NaN on, so that inf and NaN scores can be told apart. Ties do not arise.
// Determinism: an entry's arithmetic depends on its own row and block alone.
#pragma once

#include "../common/checks.h"
#include "../cuda/launch.cuh"
#include "../cuda/scores.cuh"
#include "moba_cuda.h"
#include "moba_merge_cuda.cuh"
#include "moba_stages_cuda.cuh"

namespace topgather {

struct ForwardArguments {
  MobaGeometry geometry;
  Wave wave;
  BlockListsOnDevice lists;
  int32_t head_dim;
  int32_t value_dim;
  int32_t partial_elements;    // of a row of partial_out
  float score_scale;           // scale * log2(e)
  float softcap;               // softcap * log2(e); 0: scores stay
  Array<const void, 4> query;  // [batch, query head, query, D] dtype
  Array<const void, 4> key;    // [batch, kv head, key, D] dtype
  Array<const void, 4> value;  // [batch, kv head, key, V] dtype
  void* partial_out;           // [unit, entry, partial_elements] dtype
  float2* terms;               // [unit, entry] maximum, base 2, and sum
  MergeArguments merge;        // rows of the wave before
};

template <typename Element, int kHeadDim>
struct ForwardSharedMemory {
  using Tiles = MobaForwardTiles<Element, kHeadDim>;
  static constexpr int kWarps = Tiles::kWarps;
  static constexpr int kThreads = kWarps * cuda::kLanes;
  static constexpr int kRowsPerWarp = Tiles::kRowBlocks * 16;
  static constexpr int kStepKeys = Tiles::kStepKeys;
  static constexpr int kValueColumns = Tiles::kValueColumns;
  static_assert(Tiles::kResidentKeys % kStepKeys == 0, "keys on chip are whole steps");
  static_assert(kRowsPerWarp <= cuda::kLanes, "a lane a row");

  cuda::SharedTile<Element, kWarps * kRowsPerWarp, kHeadDim> query;
  cuda::SharedTile<Element, Tiles::kResidentKeys, kHeadDim> key;
  cuda::SharedTile<Element, Tiles::kResidentKeys, kValueColumns> value;
  // float32 multiplies weights from here; the 16-bit types multiply them from registers.
  cuda::SharedTile<float, Tiles::kIsFloat ? kWarps * kRowsPerWarp : 1, kStepKeys> weights;
  // What all threads know of the thread block's work, and of every warp's next tile: registers are scarce while a tile is
  // under way.
  Unit unit;
  WorkItem item;
  bool has_unusual_values;                          // keys may be hidden, and the block's values are not all finite
  const Element* query_row[kWarps * kRowsPerWarp];  // a row's query in global memory; null: the row is not there
  // Keys of the block that the row sees, from its first on; of a window's edge ~count, the keys before the window.
  int32_t num_visible[kWarps * kRowsPerWarp];
};

namespace forward {

using cuda::kAllLanes;
using cuda::kLanes;
using cuda::lane_id;
using cuda::warp_id;

// Keys that a row sees that is not there: more than any block has, so that it hides none.
constexpr int32_t kSeesAll = INT32_MAX;
// How far scores may be above what is subtracted from them, in powers of 2. No float16 weight gets near 65504.
constexpr float kBaseSlack = 8.0f;

// The columns of values and outputs that are this thread block's.
template <typename Shared>
__device__ __forceinline__ int first_value_column() {
  return static_cast<int>(blockIdx.z) * Shared::kValueColumns;
}
template <typename Shared>
__device__ __forceinline__ int num_value_columns(const ForwardArguments& args) {
  return min(Shared::kValueColumns, args.value_dim - first_value_column<Shared>());
}

// Copies keys first_key .. first_key + num_keys of the block, zeros up to the next whole step and to the tile's width.
template <typename Element, int kHeadDim>
__device__ __forceinline__ void copy_keys_async(const ForwardArguments& args, const Unit& unit, const KeyBlock& block,
                                                int first_key, int num_keys,
                                                ForwardSharedMemory<Element, kHeadDim>& shared) {
  using Shared = ForwardSharedMemory<Element, kHeadDim>;
  const int num_rows = (num_keys + Shared::kStepKeys - 1) / Shared::kStepKeys * Shared::kStepKeys;
  const auto copy = [&](auto& tile, const Array<const void, 4>& tensor, int first_column, int depth) {
    using Tile = std::remove_reference_t<decltype(tile)>;
    const Element* rows = tensor.at<Element>(unit.batch_idx, unit.kv_head, block.first_key + first_key) + first_column;
    const int row_chunks = (depth + Tile::kPerChunk - 1) / Tile::kPerChunk;
#pragma unroll 4
    for (int i = threadIdx.x; i < num_rows * Tile::kChunks; i += Shared::kThreads) {
      const int row = i / Tile::kChunks, chunk = i % Tile::kChunks;
      cuda::copy_chunk_async(tile, row, chunk, rows + row * tensor.strides[2], row_chunks, row < num_keys);
    }
  };
  copy(shared.key, args.key, 0, args.head_dim);
  copy(shared.value, args.value, first_value_column<Shared>(), num_value_columns<Shared>(args));
}

// Tells all threads whether any value of the block is NaN or inf. Called by all of them. Rows are whole chunks of 16
// bytes, with zeros behind their columns. is_resident: the block's values are in shared memory, those of the columns that this
// thread block has.
template <typename Element, int kHeadDim>
__device__ __forceinline__ void find_unusual_values(const ForwardArguments& args, const Unit& unit,
                                                    const KeyBlock& block, bool is_resident,
                                                    ForwardSharedMemory<Element, kHeadDim>& shared) {
  using Shared = ForwardSharedMemory<Element, kHeadDim>;
  constexpr int kPerChunk = 16 / static_cast<int>(sizeof(Element));
  bool found = false;
  if (is_resident) {
    // As they lie, in whatever order.
    const auto* chunks = reinterpret_cast<const uint4*>(shared.value.elements);
    const int num_rows = (block.num_keys + Shared::kStepKeys - 1) / Shared::kStepKeys * Shared::kStepKeys;
#pragma unroll 4
    for (int i = static_cast<int>(threadIdx.x); i < num_rows * decltype(shared.value)::kChunks; i += Shared::kThreads) {
      found = cuda::is_unusual_chunk<Element>(chunks[i]) || found;
    }
  } else {
    const Element* rows = args.value.at<Element>(unit.batch_idx, unit.kv_head, block.first_key);
    const int row_chunks = (args.value_dim + kPerChunk - 1) / kPerChunk;
#pragma unroll 1
    for (int key = static_cast<int>(threadIdx.x) / 8; key < block.num_keys; key += Shared::kThreads / 8) {
      const auto* row = reinterpret_cast<const uint4*>(rows + key * args.value.strides[2]);
#pragma unroll 4
      for (int chunk = static_cast<int>(threadIdx.x) % 8; chunk < row_chunks; chunk += 8) {
        found = cuda::is_unusual_chunk<Element>(row[chunk]) || found;
      }
    }
  }
  const bool is_found_by_any = __syncthreads_or(found ? 1 : 0) != 0;
  if (threadIdx.x == 0) shared.has_unusual_values = is_found_by_any;
  // Publishes it to all warps.
  __syncthreads();
}

// The lane's entry of a tile, -1 where there is none: lane r has row r.
__device__ __forceinline__ int32_t entry_of_lane(const WorkItem& item, int first_entry, int num_rows) {
  const int lane = lane_id();
  return lane < num_rows && first_entry + lane < item.num_entries ? item.entries[first_entry + lane] : -1;
}

// Finds a warp's rows, a lane each.
template <typename Element, int kHeadDim>
__device__ __forceinline__ void place_rows(const ForwardArguments& args, const Unit& unit, const KeyBlock& block,
                                           int32_t entry, ForwardSharedMemory<Element, kHeadDim>& shared) {
  using Shared = ForwardSharedMemory<Element, kHeadDim>;
  if (lane_id() >= Shared::kRowsPerWarp) return;  // the rest of the warp, and no barrier follows
  const int row = warp_id() * Shared::kRowsPerWarp + lane_id();
  shared.query_row[row] = nullptr;
  shared.num_visible[row] = kSeesAll;
  if (entry < 0) return;
  const int32_t row_of_wave = row_of_entry(args.geometry, entry);
  const WaveRow place = wave_row(args.geometry, args.wave, unit, row_of_wave);
  shared.query_row[row] = args.query.at<Element>(unit.batch_idx, place.head, place.query);
  shared.num_visible[row] = is_edge_entry(args.geometry, entry, row_of_wave)
                                ? ~keys_before_window(args.geometry, block, place.query)
                                : num_visible_keys(args.geometry, block, place.query);
}

// Step 2: the rows that were placed last, several lanes a row.
template <typename Element, int kHeadDim>
__device__ __forceinline__ void gather_queries_async(const ForwardArguments& args,
                                                     ForwardSharedMemory<Element, kHeadDim>& shared) {
  using Shared = ForwardSharedMemory<Element, kHeadDim>;
  using Tile = decltype(shared.query);
  constexpr unsigned kCopies = Shared::kRowsPerWarp * Tile::kChunks;
  static_assert(kCopies % kLanes == 0, "as many copies for every lane");
  const auto thread = static_cast<unsigned>(cuda::thread_index_here());
  const unsigned lane = thread % kLanes, first_row = thread / kLanes * Shared::kRowsPerWarp;
#pragma unroll 4
  for (unsigned first = 0; first < kCopies; first += kLanes) {
    const unsigned row = first_row + (first + lane) / Tile::kChunks, chunk = (first + lane) % Tile::kChunks;
    const Element* query = shared.query_row[row];
    const bool is_column = static_cast<int>(chunk) * Tile::kPerChunk < args.head_dim;
    cuda::copy_async_16(shared.query.chunk(static_cast<int>(row), static_cast<int>(chunk)),
                        query + chunk * Tile::kPerChunk, is_column && query != nullptr);
  }
}

__device__ __forceinline__ int32_t min_of_warp(int32_t value) {
  for (int distance = 16; distance > 0; distance /= 2) value = min(value, __shfl_xor_sync(kAllLanes, value, distance));
  return value;
}
__device__ __forceinline__ int32_t max_of_warp(int32_t value) {
  for (int distance = 16; distance > 0; distance /= 2) value = max(value, __shfl_xor_sync(kAllLanes, value, distance));
  return value;
}

// What a warp carries through a tile: outputs [rows, V], and per row what is subtracted from scores, a maximum of some of
// them, and the lane's part of the sum.
template <int kRowBlocks, int kColumns>
struct Running {
  float out[kRowBlocks][kColumns / 8][4];
  float base[kRowBlocks][2];
  float sum[kRowBlocks][2];

  __device__ __forceinline__ void reset() {
    cuda::fill(out, 0.0f);
#pragma unroll
    for (int m = 0; m < kRowBlocks; ++m) {
      base[m][0] = base[m][1] = -INFINITY;
      sum[m][0] = sum[m][1] = 0.0f;
    }
  }
};

template <typename Element, int kHeadDim>
using RunningOf =
    Running<MobaForwardTiles<Element, kHeadDim>::kRowBlocks, MobaForwardTiles<Element, kHeadDim>::kValueColumns>;

// Step 3's cap.
template <int kRowBlocks, int kStepBlocks>
__device__ __forceinline__ void cap_scores(float (&scores)[kRowBlocks][kStepBlocks][4], float cap) {
  const float inverse_cap = 1.0f / cap;
#pragma unroll
  for (int m = 0; m < kRowBlocks; ++m) {
#pragma unroll
    for (int n = 0; n < kStepBlocks; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) scores[m][n][e] = cuda::cap_score(scores[m][n][e], cap, inverse_cap);
    }
  }
}

// The keys that a row sees, counted from its block's start.
struct VisibleKeys {
  int32_t start;
  uint32_t count;

  __device__ __forceinline__ bool has(int key) const { return static_cast<uint32_t>(key - start) < count; }
};

// Of one of a warp's rows: keys up to num_visible, of an edge those inside the window and the block. All lanes take part.
__device__ __forceinline__ VisibleKeys visible_keys_of(int row, int32_t num_visible_of_lane, int32_t window,
                                                       int32_t num_keys) {
  const int32_t num_visible = __shfl_sync(kAllLanes, num_visible_of_lane, row);
  const int32_t start = num_visible < 0 ? ~num_visible : 0;
  return {start, static_cast<uint32_t>(num_visible < 0 ? min(window, num_keys - start) : num_visible)};
}

// Step 3's mask.
template <int kRowBlocks, int kStepBlocks>
__device__ __forceinline__ void hide_keys(float (&scores)[kRowBlocks][kStepBlocks][4], int first_key,
                                          int32_t num_visible_of_lane, int32_t window, int32_t num_keys) {
  const int g = lane_id() / 4, t = lane_id() % 4;
#pragma unroll
  for (int m = 0; m < kRowBlocks; ++m) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const VisibleKeys visible = visible_keys_of(m * 16 + h * 8 + g, num_visible_of_lane, window, num_keys);
#pragma unroll
      for (int n = 0; n < kStepBlocks; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          if (!visible.has(first_key + n * 8 + 2 * t + e)) scores[m][n][2 * h + e] = -INFINITY;
        }
      }
    }
  }
}

// How far below a base scores are of which a maximum is `maximum`, whether it is to be moved there. NaN moves it.
__device__ __forceinline__ bool leaves_base(float maximum, float base) { return !(maximum <= base + kBaseSlack); }

// Step 4's rare part: moves bases, and with them what rows have so far. has_outputs: there is something.
template <int kRowBlocks, int kColumns>
__device__ __forceinline__ void move_bases(Running<kRowBlocks, kColumns>& running,
                                           const float (&maximum)[kRowBlocks][2], bool has_outputs) {
#pragma unroll
  for (int m = 0; m < kRowBlocks; ++m) {
    float rescale[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float before = running.base[m][h];
      const float base = leaves_base(maximum[m][h], before) ? cuda::max_or_nan(before, maximum[m][h]) : before;
      rescale[h] = cuda::exp2_approximate(before - (base == -INFINITY ? 0.0f : base));
      running.base[m][h] = base;
      running.sum[m][h] *= rescale[h];
    }
    if (!has_outputs) continue;
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) running.out[m][n][e] *= rescale[e / 2];
    }
  }
}

// Step 4: scores become weights. A row's base stays where it is until a score is kBaseSlack above it: weights are then at
// most 2^kBaseSlack, with the same relative error, and there is nothing to rescale.
template <int kRowBlocks, int kStepBlocks, int kColumns>
__device__ __forceinline__ void online_softmax(float (&scores)[kRowBlocks][kStepBlocks][4],
                                               Running<kRowBlocks, kColumns>& running, bool is_first) {
  float maximum[kRowBlocks][2];
  bool moves_any = false;
#pragma unroll
  for (int m = 0; m < kRowBlocks; ++m) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float of_lane = scores[m][0][2 * h];
#pragma unroll
      for (int n = 0; n < kStepBlocks; ++n) {
        of_lane = cuda::max_or_nan(of_lane, cuda::max_or_nan(scores[m][n][2 * h], scores[m][n][2 * h + 1]));
      }
      maximum[m][h] = cuda::max_of_row(of_lane);
      moves_any = moves_any || leaves_base(maximum[m][h], running.base[m][h]);
    }
  }
  if (__any_sync(kAllLanes, moves_any)) move_bases(running, maximum, !is_first);
#pragma unroll
  for (int m = 0; m < kRowBlocks; ++m) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float base = running.base[m][h] == -INFINITY ? 0.0f : running.base[m][h];
#pragma unroll
      for (int n = 0; n < kStepBlocks; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& score = scores[m][n][2 * h + e];
          score = cuda::exp2_approximate(score - base);
          running.sum[m][h] += score;
        }
      }
    }
  }
}

// Step 5 for float32: out += weights x values step .. step + count.
template <typename Shared, int kN>
__device__ __forceinline__ void multiply_step_values(float (&out)[1][kN][4], Shared& shared, int first_row, int step,
                                                     int count, int value_dim) {
  const int g = lane_id() / 4, t = lane_id() % 4;
#pragma unroll 1
  for (int k = 0; k < count; ++k) {
    const float left[2] = {shared.weights.at(first_row + g, k), shared.weights.at(first_row + g + 8, k)};
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      if (n * 8 >= value_dim) continue;
      const float2 right = *reinterpret_cast<const float2*>(&shared.value.at(step + k, n * 8 + 2 * t));
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        out[0][n][2 * h] = fmaf(left[h], right.x, out[0][n][2 * h]);
        out[0][n][2 * h + 1] = fmaf(left[h], right.y, out[0][n][2 * h + 1]);
      }
    }
  }
}

// Step 5 over visible pairs alone: out += weights x values of `count` keys, which lie from row `step` of the tile on and
// are keys first_key .. of the block. Uses weights up. Rare and slow.
template <typename Element, typename Tile, int kRowBlocks, int kStepBlocks, int kN>
__device__ __forceinline__ void multiply_visible(float (&out)[kRowBlocks][kN][4],
                                                 cuda::Pair<Element> (&weights)[kRowBlocks][kStepBlocks][2],
                                                 Tile& values, int step, int count, int first_key,
                                                 int32_t num_visible_of_lane, int32_t window, int32_t num_keys) {
  const int g = lane_id() / 4, t = lane_id() % 4;
#pragma unroll 1
  for (int k = 0; k < count; ++k) {
    float of_row[kRowBlocks][2];
    bool is_visible[kRowBlocks][2];
#pragma unroll
    for (int m = 0; m < kRowBlocks; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        // One of the row's four lanes has the key's weight.
        const float2 pair = cuda::unpack_pair<Element>(weights[m][0][h]);
        of_row[m][h] = __shfl_sync(kAllLanes, k % 2 == 0 ? pair.x : pair.y, g * 4 + k % 8 / 2);
        const int row = m * 16 + h * 8 + g;
        is_visible[m][h] = visible_keys_of(row, num_visible_of_lane, window, num_keys).has(first_key + k);
      }
    }
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      // Values loaded all at once would take registers that the other steps need.
      if (n % 4 == 0) __syncwarp();
      const float2 right = cuda::load_pair(&values.at(step + k, n * 8 + 2 * t));
#pragma unroll
      for (int m = 0; m < kRowBlocks; ++m) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          if (!is_visible[m][h]) continue;
          out[m][n][2 * h] = fmaf(of_row[m][h], right.x, out[m][n][2 * h]);
          out[m][n][2 * h + 1] = fmaf(of_row[m][h], right.y, out[m][n][2 * h + 1]);
        }
      }
    }
    if (k % 8 != 7) continue;
    // The next eight keys' weights take the place of the first: registers are not found by a number at run time.
#pragma unroll
    for (int m = 0; m < kRowBlocks; ++m) {
#pragma unroll
      for (int n = 0; n + 1 < kStepBlocks; ++n) {
#pragma unroll
        for (int h = 0; h < 2; ++h) weights[m][n][h] = weights[m][n + 1][h];
      }
    }
  }
}

// Steps 3 to 5 for the keys in shared memory, which are keys first_key .. of the block. `after_scores` runs once the
// queries are not needed any more.
template <typename Element, int kHeadDim, typename AfterScores>
__device__ __forceinline__ void attend(const ForwardArguments& args, ForwardSharedMemory<Element, kHeadDim>& shared,
                                       int32_t num_visible, int first_key, int num_keys,
                                       RunningOf<Element, kHeadDim>& running, const AfterScores& after_scores) {
  using Shared = ForwardSharedMemory<Element, kHeadDim>;
  using Tiles = typename Shared::Tiles;
  constexpr int kStepKeys = Tiles::kStepKeys;
  const int first_row = warp_id() * Tiles::kRowBlocks * 16;
  const int32_t min_visible = min_of_warp(num_visible);
  // Of an edge, more keys than any block has.
  const int32_t max_visible = max_of_warp(num_visible == kSeesAll ? 0 : num_visible & INT32_MAX);
  const int end = min(num_keys, max_visible - first_key);
#pragma unroll 1
  for (int step = 0; step < end; step += kStepKeys) {
    float scores[Tiles::kRowBlocks][kStepKeys / 8][4];
    cuda::fill(scores, 0.0f);
    // Whole steps of the tile's width, behind whose rows and columns there are zeros; what is no key is hidden below.
    cuda::multiply_by_rows(scores, shared.query, first_row, shared.key, step, kStepKeys,
                           Tiles::kIsFloat ? args.head_dim : kHeadDim);
    if (step + kStepKeys >= end) after_scores();
#pragma unroll
    for (int m = 0; m < Tiles::kRowBlocks; ++m) {
#pragma unroll
      for (int n = 0; n < kStepKeys / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) scores[m][n][e] = cuda::scale_score(scores[m][n][e], args.score_scale);
      }
    }
    if (args.softcap > 0.0f) cap_scores(scores, args.softcap);
    const bool hides_keys = first_key + step + kStepKeys > min_visible;
    if (hides_keys) {
      hide_keys(scores, first_key + step, num_visible, args.geometry.window, shared.item.block.num_keys);
    }
    online_softmax(scores, running, first_key + step == 0);
    cuda::Pair<Element> weights[Tiles::kRowBlocks][kStepKeys / 8][2];
    cuda::pack_pairs<Element>(scores, weights);
    if (hides_keys && shared.has_unusual_values) {
      multiply_visible<Element>(running.out, weights, shared.value, step, min(kStepKeys, end - step), first_key + step,
                                num_visible, args.geometry.window, shared.item.block.num_keys);
    } else if constexpr (Tiles::kIsFloat) {
      const int g = lane_id() / 4, t = lane_id() % 4;
#pragma unroll
      for (int n = 0; n < kStepKeys / 8; ++n) {
        cuda::store_pair(shared.weights, first_row + g, n * 8 + 2 * t, scores[0][n][0], scores[0][n][1]);
        cuda::store_pair(shared.weights, first_row + g + 8, n * 8 + 2 * t, scores[0][n][2], scores[0][n][3]);
      }
      // Publishes the warp's weights to its lanes.
      __syncwarp();
      multiply_step_values(running.out, shared, first_row, step, min(kStepKeys, end - step),
                           num_value_columns<Shared>(args));
      // Tells the lanes that the weights have been used and may be overwritten.
      __syncwarp();
    } else {
      cuda::multiply_pairs<Element>(running.out, weights, shared.value, step, Tiles::kValueColumns, kStepKeys);
    }
  }
  if (end <= 0) after_scores();
}

// Of a sum of weights; to the last bits where outputs are float32.
template <typename Element>
__device__ __forceinline__ float reciprocal_of(float sum) {
  return std::is_same_v<Element, float> ? 1.0f / sum : cuda::reciprocal_approximate(sum);
}

// Step 6.
template <typename Element, int kHeadDim>
__device__ __forceinline__ void write_partials(const ForwardArguments& args, int64_t unit_in_wave,
                                               int32_t entry_of_lane, const RunningOf<Element, kHeadDim>& running) {
  using Shared = ForwardSharedMemory<Element, kHeadDim>;
  const int g = lane_id() / 4, t = lane_id() % 4;
  const int64_t first_entry = unit_in_wave * args.lists.num_rows * args.geometry.top_k;
#pragma unroll
  for (int m = 0; m < Shared::Tiles::kRowBlocks; ++m) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int32_t entry = __shfl_sync(kAllLanes, entry_of_lane, m * 16 + h * 8 + g);
      const float sum = cuda::sum_of_row(running.sum[m][h]);
      const float base = running.base[m][h];
      const bool is_there = entry >= 0;
      const float factor = base == -INFINITY ? 1.0f : reciprocal_of<Element>(sum);
      Element* out = static_cast<Element*>(args.partial_out) +
                     (first_entry + (is_there ? entry : 0)) * args.partial_elements + first_value_column<Shared>();
      // The whole warp trades, whatever rows are there and however wide they are. Rows are written in whole pairs of
      // blocks.
      const int num_columns = is_there ? num_value_columns<Shared>(args) : 0;
#pragma unroll
      for (int n = 0; n < Shared::kValueColumns / 8; n += 2) {
        float scaled[4];
#pragma unroll
        for (int e = 0; e < 4; ++e) scaled[e] = running.out[m][n + e / 2][2 * h + e % 2] * factor;
        Element* four = out + n * 8 + cuda::four_columns_start();
        if constexpr (sizeof(Element) == 4) {
          const auto pairs = cuda::trade_pairs(make_float2(scaled[0], scaled[1]), make_float2(scaled[2], scaled[3]));
          if (n * 8 < num_columns) {
            *reinterpret_cast<float4*>(four) = make_float4(pairs.low.x, pairs.low.y, pairs.high.x, pairs.high.y);
          }
        } else {
          const auto pairs =
              cuda::trade_pairs(cuda::pack2<Element>(scaled[0], scaled[1]), cuda::pack2<Element>(scaled[2], scaled[3]));
          if (n * 8 < num_columns) *reinterpret_cast<uint2*>(four) = make_uint2(pairs.low, pairs.high);
        }
      }
      if (is_there && t == 0 && blockIdx.z == 0) {
        args.terms[first_entry + entry] = make_float2(base, sum);
      }
    }
  }
}

}  // namespace forward

template <typename Element, int kHeadDim>
__global__ void __launch_bounds__(ForwardSharedMemory<Element, kHeadDim>::kThreads, 1)
    moba_attend_blocks(const ForwardArguments args) {
  using Shared = ForwardSharedMemory<Element, kHeadDim>;
  using Tiles = typename Shared::Tiles;
  Shared& shared = *reinterpret_cast<Shared*>(cuda::dynamic_shared_memory());
  const int64_t unit_in_wave = blockIdx.y;
  const bool has_items = args.lists.max_items > 0;
  WorkItem own_item;
  const int warp = cuda::warp_id();
  int32_t first_entry = -1;  // of the lane, in its warp's first tile
  // Step 1. The grid is a bound taken from shapes: there are thread blocks past the last item.
  const bool has_item =
      has_items && find_work_item(args.geometry, args.lists, unit_in_wave, static_cast<int32_t>(blockIdx.x), own_item);
  if (has_item) {
    if (threadIdx.x == 0) {
      shared.unit = unit_at(args.geometry, args.wave.first_unit + unit_in_wave);
      shared.item = own_item;
      shared.has_unusual_values = false;
    }
    first_entry = forward::entry_of_lane(own_item, warp * Shared::kRowsPerWarp, Shared::kRowsPerWarp);
    // Publishes the work to all threads.
    __syncthreads();
    if (shared.item.block.num_keys <= Tiles::kResidentKeys) {
      forward::copy_keys_async<Element, kHeadDim>(args, shared.unit, shared.item.block, 0, shared.item.block.num_keys,
                                                  shared);
    }
  }
  cuda::copy_async_commit();
  if (args.merge.rows_of_unit > 0) {
    merge_rows<Element, kHeadDim>(args.geometry, args.merge, args.value_dim, args.partial_elements, Shared::kWarps);
  }
  if (!has_item) return;  // the whole thread block
  const Unit& unit = shared.unit;
  const WorkItem& item = shared.item;
  const bool is_resident = item.block.num_keys <= Tiles::kResidentKeys;
  const auto start_tile = [&](int32_t entry) {
    forward::place_rows<Element, kHeadDim>(args, unit, item.block, entry, shared);
    // Publishes the warp's rows to its lanes.
    __syncwarp();
    forward::gather_queries_async<Element, kHeadDim>(args, shared);
    cuda::copy_async_commit();
  };
  start_tile(first_entry);
  cuda::copy_async_wait<0>();
  // Publishes keys and values, where all of them are on chip, to all warps.
  __syncthreads();
  if (args.geometry.is_causal) {
    forward::find_unusual_values<Element, kHeadDim>(args, unit, item.block, is_resident, shared);
  }
  const int num_tiles = (item.num_entries + Shared::kRowsPerWarp - 1) / Shared::kRowsPerWarp;
  const auto entry_of_round = [&](int round) {
    const int tile = round * Shared::kWarps + warp;
    return forward::entry_of_lane(item, tile * Shared::kRowsPerWarp, Shared::kRowsPerWarp);
  };
  for (int round = 0; round * Shared::kWarps < num_tiles; ++round) {
    const bool is_row = cuda::lane_id() < Shared::kRowsPerWarp;
    const int32_t num_visible =
        is_row ? shared.num_visible[warp * Shared::kRowsPerWarp + cuda::lane_id()] : forward::kSeesAll;
    // Tells the warp's lanes that its rows have been read, by the gather too, and the next tile's may overwrite them.
    __syncwarp();
    forward::place_rows<Element, kHeadDim>(args, unit, item.block, entry_of_round(round + 1), shared);
    const auto gather_next = [&] {
      // Tells the warp's lanes that the queries have been used and the next tile's may overwrite them; publishes where
      // those lie.
      __syncwarp();
      forward::gather_queries_async<Element, kHeadDim>(args, shared);
      cuda::copy_async_commit();
    };
    forward::RunningOf<Element, kHeadDim> running;
    running.reset();
    const int num_keys = item.block.num_keys;
    for (int first_key = 0; first_key < num_keys; first_key += Tiles::kResidentKeys) {
      const int count = min(Tiles::kResidentKeys, num_keys - first_key);
      if (!is_resident) {
        // Tells all warps that the keys before have been used and may be overwritten.
        __syncthreads();
        forward::copy_keys_async<Element, kHeadDim>(args, unit, item.block, first_key, count, shared);
        cuda::copy_async_commit();
      }
      cuda::copy_async_wait<0>();
      if (is_resident) {
        // Publishes the warp's queries to its lanes.
        __syncwarp();
      } else {
        // Publishes keys and values to all warps, and each warp's queries to its lanes.
        __syncthreads();
      }
      forward::attend<Element, kHeadDim>(args, shared, num_visible, first_key, count, running, [&] {
        if (first_key + Tiles::kResidentKeys >= num_keys) gather_next();
      });
    }
    // Entries are read again: they would take registers all the while.
    forward::write_partials<Element, kHeadDim>(args, unit_in_wave, entry_of_round(round), running);
  }
  // The last round's gather of a tile that is not there copied nothing but zeros; it ends before the warp does.
  cuda::copy_async_wait<0>();
}

struct ForwardKernel {
  Dtype dtype;
  int64_t max_head_dim;  // and value_dim
  int64_t threads;
  int64_t shared_bytes;
  int64_t entries_per_item;
  void (*launch)(const ForwardArguments& args, cudaStream_t stream);
};

template <typename Element, int kHeadDim>
constexpr ForwardKernel forward_kernel() {
  using Shared = ForwardSharedMemory<Element, kHeadDim>;
  static_assert(sizeof(Shared) <= 99 * 1024, "one table for all architectures");
  return {kDtypeOf<Element>,
          kHeadDim,
          Shared::kThreads,
          sizeof(Shared),
          Shared::Tiles::kEntriesPerItem,
          [](const ForwardArguments& args, cudaStream_t stream) {
            const int64_t num_panels = divide_up(args.value_dim, Shared::kValueColumns);
            dim3 grid(static_cast<unsigned>(args.lists.max_items), static_cast<unsigned>(args.wave.num_units),
                      static_cast<unsigned>(num_panels > 0 ? num_panels : 1));
            ForwardArguments cut = args;
            if (args.merge.rows_of_unit > 0) {
              grid = cut_merge(cut.merge, grid, args.lists.max_items > 0,
                               Shared::kWarps * MergeShape<Element, kHeadDim>::kRowsAtOnce);
            }
            cuda::launch(moba_attend_blocks<Element, kHeadDim>, {grid, dim3(Shared::kThreads), sizeof(Shared), stream},
                         cut);
          }};
}

using ForwardKernels = ForwardKernel[3];
template <typename Element>
inline constexpr ForwardKernels kForwardKernels = {forward_kernel<Element, 64>(), forward_kernel<Element, 128>(),
                                                   forward_kernel<Element, 256>()};

// An element type's kernels, ascending in head_dim. Each of the three is compiled in a file of its own, which the build
// writes (tools/cuda_instances.cmake).
const ForwardKernels& forward_kernels(float);
const ForwardKernels& forward_kernels(BFloat16);
const ForwardKernels& forward_kernels(Float16);

}  // namespace topgather
