// The merging of a query's choices in block attention's forward on CUDA: the part of moba_attend_blocks that writes
// results.
//
//   out_row = sum_e 2^(max_e - max) sum_e partial_e / sum_e 2^(max_e - max) sum_e      over the row's choices e
//
// Merging moves bytes and attending multiplies, so a launch does both: every other thread block attends to its work item
// of one wave, having merged its share of the rows of the wave before. Two waves' partial outputs are there at a time. A
// launch reads nothing that it writes, so thread blocks do not wait for each other. The last wave's rows have a launch of
// their own, without work items.
//
// Who owns what: 8, 16 or 32 lanes own a row, a lane kChunks chunks of 16 bytes, a group's width apart. Steps, for the
// rows that a warp has under way at a time:
//   1. terms of kGroup choices, a lane each (of the next rows while this one's outputs arrive); the largest base;
//   2. outputs of 8 choices, all on their way at once; weighed and summed in slot order;
//   3. divide, round, write out, lse and softmax terms.
// Numerics: float32. A row without a visible key: out 0, lse -inf. One all of whose scores are -inf: NaN, as plain
// softmax. One whose choices are not valid: NaN.
// Determinism: slot order.
#pragma once

#include "../common/checks.h"
#include "../common/softmax_terms.h"
#include "../cuda/launch.cuh"
#include "../cuda/scores.cuh"
#include "moba_stages_cuda.cuh"

namespace topgather {

struct MergeArguments {
  Wave wave;             // whose rows these are
  int64_t rows_of_unit;  // 0: nothing to merge
  // A share is up to rows_of_share rows of a unit. Thread blocks 0, every, 2 * every, ... take one after the other.
  uint32_t rows_of_share;
  uint32_t shares_of_unit;
  uint32_t num_shares;
  uint32_t every;
  const void* partial_out;       // [unit, row, slot, partial_elements] dtype
  const float2* terms;           // [unit, row, slot] base 2 maximum, sum; or what moba_fill_lists says of the unseen
  Array<const void, 1> sinks;    // [query head] float32, or data null
  Array<void, 4> out;            // [batch, query head, query, V] dtype
  Array<void, 3> lse;            // [batch, query head, query] float32
  Array<void, 4> softmax_terms;  // [batch, query head, query, 2] float32
  bool has_vector_rows;          // whether rows of out are whole chunks of 16 bytes, on their boundaries
};

template <typename Element, int kHeadDim>
struct MergeShape {
  static constexpr int kPerChunk = 16 / static_cast<int>(sizeof(Element));
  static constexpr int kRowChunks = kHeadDim / kPerChunk;
  static constexpr int kGroup = kRowChunks < cuda::kLanes ? kRowChunks : cuda::kLanes;
  static constexpr int kChunks = kRowChunks / kGroup;
  static constexpr int kRowsPerWarp = cuda::kLanes / kGroup;
  static constexpr int kSets = kChunks > 1 ? 1 : 2;  // of kRowsPerWarp rows that a warp has under way
  static constexpr int kRowsAtOnce = kSets * kRowsPerWarp;
  static constexpr int kSlotsInFlight = 8;
};

namespace merge {

// Step 1's terms of a choice that is not there.
__device__ __forceinline__ float2 no_terms() { return make_float2(-INFINITY, kSumOfUnseen); }

template <int kGroup>
__device__ __forceinline__ unsigned of_group(unsigned lanes) {
  if constexpr (kGroup == cuda::kLanes) return lanes;
  return lanes >> (cuda::lane_id() / kGroup * kGroup) & ((1u << (kGroup % cuda::kLanes)) - 1);
}

// The unit's row `row`, summed up: step 3.
template <typename Element, int kHeadDim>
__device__ __forceinline__ void write_row(
    const MobaGeometry& geometry, const MergeArguments& args, int32_t value_dim, const Unit& unit, int32_t row,
    float maximum, float sum, bool sees_any, bool is_valid,
    float (&result)[MergeShape<Element, kHeadDim>::kChunks][MergeShape<Element, kHeadDim>::kPerChunk]) {
  using Shape = MergeShape<Element, kHeadDim>;
  constexpr float kLn2 = 0.6931471805599453f;
  const WaveRow place = wave_row(geometry, args.wave, unit, row);
  float lse = fabsf(maximum) < INFINITY ? (maximum + log2f(sum)) * kLn2 : maximum;
  if (!sees_any) lse = is_valid ? -INFINITY : NAN;
  // Seen, but all at -inf: 0 / 0, unless a sink gives the sum something. Not seen: 0.
  const float share = cuda::share_beside_sink(lse, args.sinks, place.head);
  const bool is_zero = is_valid && (!sees_any || (lse == -INFINITY && cuda::has_sink(args.sinks, place.head)));
  const float factor = is_valid ? share / sum : NAN;
  const int lane = cuda::lane_id() % Shape::kGroup;
  Element* out = args.out.at<Element>(unit.batch_idx, place.head, place.query);
#pragma unroll
  for (int c = 0; c < Shape::kChunks; ++c) {
    const int column = (c * Shape::kGroup + lane) * Shape::kPerChunk;
    if (column >= value_dim) continue;
#pragma unroll
    for (int e = 0; e < Shape::kPerChunk; ++e) result[c][e] = is_zero ? 0.0f : result[c][e] * factor;
    if (args.has_vector_rows) {
      *reinterpret_cast<uint4*>(out + column) = cuda::pack_chunk<Element>(result[c]);
    } else {
#pragma unroll
      for (int e = 0; e < Shape::kPerChunk; ++e) {
        if (column + e < value_dim) out[column + e] = cuda::from_float<Element>(result[c][e]);
      }
    }
  }
  if (lane == 0) {
    *args.lse.at<float>(unit.batch_idx, place.head, place.query) = lse;
    write_softmax_terms(maximum, is_valid ? sum : NAN,
                        args.softmax_terms.at<float>(unit.batch_idx, place.head, place.query));
  }
}

// Rows first_row .. end of a unit, by warps that do not wait for each other.
template <typename Element, int kHeadDim>
__device__ __forceinline__ void merge_share(const MobaGeometry& geometry, const MergeArguments& args, int32_t value_dim,
                                            int32_t partial_elements, int num_warps, uint32_t unit_in_wave,
                                            int32_t first_row, int32_t end) {
  using Shape = MergeShape<Element, kHeadDim>;
  constexpr int kSets = Shape::kSets, kGroup = Shape::kGroup, kChunks = Shape::kChunks;
  constexpr int kSlots = Shape::kSlotsInFlight, kPerChunk = Shape::kPerChunk;
  static_assert(kGroup % kSlots == 0, "a lane of the group for every choice under way");
  const int lane = cuda::lane_id() % kGroup;
  const int32_t top_k = geometry.top_k;
  const Unit unit = unit_at(geometry, args.wave.first_unit + unit_in_wave);
  const int64_t first_of_unit = static_cast<int64_t>(unit_in_wave) * args.rows_of_unit * top_k;
  const float2* terms = args.terms + first_of_unit;
  const int32_t slot_bytes = partial_elements * static_cast<int32_t>(sizeof(Element));
  const auto* partials = static_cast<const unsigned char*>(args.partial_out) + first_of_unit * slot_bytes + lane * 16;
  const auto terms_at = [&](int32_t row, int slot) {
    return row < end && slot < top_k ? terms[static_cast<uint32_t>(row * top_k + slot)] : no_terms();
  };
  // Chunks of a row from the lane's first on.
  const int32_t chunks_left = (value_dim + kPerChunk - 1) / kPerChunk - lane;
  const int stride = num_warps * Shape::kRowsAtOnce;
  int32_t row = first_row + cuda::warp_id() * Shape::kRowsAtOnce;  // of the warp; a group has its own behind it
  const int group = cuda::lane_id() / kGroup;
  float2 next[kSets];
#pragma unroll
  for (int s = 0; s < kSets; ++s) next[s] = terms_at(row + s * Shape::kRowsPerWarp + group, lane);
#pragma unroll 1
  for (; row < end; row += stride) {
    float2 mine[kSets];
    float maximum[kSets], base[kSets], sum[kSets], result[kSets][kChunks][kPerChunk];
    bool sees_any[kSets], is_valid[kSets];
    const unsigned char* of_set[kSets];
#pragma unroll
    for (int s = 0; s < kSets; ++s) {
      const int32_t own = row + s * Shape::kRowsPerWarp + group;
      of_set[s] = partials + static_cast<int64_t>(own) * top_k * slot_bytes;
      mine[s] = next[s];
      maximum[s] = mine[s].x;
      sees_any[s] = !(mine[s].y < 0.0f);
      is_valid[s] = __shfl_sync(cuda::kAllLanes, mine[s].y, 0, kGroup) != kSumOfInvalid;
      for (int slot = lane + kGroup; slot < top_k; slot += kGroup) {
        const float2 other = terms_at(own, slot);
        maximum[s] = cuda::max_or_nan(maximum[s], other.x);
        sees_any[s] = sees_any[s] || !(other.y < 0.0f);
      }
#pragma unroll
      for (int distance = kGroup / 2; distance > 0; distance /= 2) {
        maximum[s] = cuda::max_or_nan(maximum[s], __shfl_xor_sync(cuda::kAllLanes, maximum[s], distance));
      }
      sees_any[s] = of_group<kGroup>(__ballot_sync(cuda::kAllLanes, sees_any[s])) != 0;
      // Only scores of -inf: any finite base keeps -inf - base from being NaN.
      base[s] = maximum[s] == -INFINITY ? 0.0f : maximum[s];
      sum[s] = 0.0f;
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
#pragma unroll
        for (int e = 0; e < kPerChunk; ++e) result[s][c][e] = 0.0f;
      }
    }
    // kSlots choices at a time, of kGroup whose terms the lanes have.
#pragma unroll 1
    for (int first = 0; first < top_k; first += kSlots) {
      float weight_of_lane[kSets];
      unsigned seen[kSets];
      const int in_group = first % kGroup;
      bool sees_all = true;
      if (first > 0 && in_group == 0) {
#pragma unroll
        for (int s = 0; s < kSets; ++s) mine[s] = terms_at(row + s * Shape::kRowsPerWarp + group, first + lane);
      }
#pragma unroll
      for (int s = 0; s < kSets; ++s) {
        const bool is_seen = !(mine[s].y < 0.0f);
        weight_of_lane[s] = is_seen ? mine[s].y * exp2f(mine[s].x - base[s]) : 0.0f;
        seen[s] = of_group<kGroup>(__ballot_sync(cuda::kAllLanes, is_seen)) >> in_group & ((1u << kSlots) - 1);
        sees_all = sees_all && seen[s] == (1u << kSlots) - 1;
      }
      sees_all = __all_sync(cuda::kAllLanes, sees_all && chunks_left > (kChunks - 1) * kGroup);
      uint4 words[kSets][kSlots][kChunks];
      const auto load = [&](bool all) {
#pragma unroll
        for (int s = 0; s < kSets; ++s) {
          const unsigned char* of_slot = of_set[s];
#pragma unroll
          for (int j = 0; j < kSlots; ++j) {
#pragma unroll
            for (int c = 0; c < kChunks; ++c) {
              if (all || ((seen[s] >> j & 1) != 0 && chunks_left > c * kGroup)) {
                words[s][j][c] = *reinterpret_cast<const uint4*>(of_slot + c * kGroup * 16);
              } else {
                words[s][j][c] = make_uint4(0, 0, 0, 0);
              }
            }
            of_slot += slot_bytes;
          }
          of_set[s] = of_slot;
        }
      };
      if (sees_all) {
        load(true);
      } else {
        load(false);
      }
      if (first == 0) {
#pragma unroll
        for (int s = 0; s < kSets; ++s) next[s] = terms_at(row + stride + s * Shape::kRowsPerWarp + group, lane);
      }
#pragma unroll
      for (int s = 0; s < kSets; ++s) {
#pragma unroll
        for (int j = 0; j < kSlots; ++j) {
          const float weight = __shfl_sync(cuda::kAllLanes, weight_of_lane[s], in_group + j, kGroup);
          sum[s] += weight;
#pragma unroll
          for (int c = 0; c < kChunks; ++c) {
            float values[kPerChunk];
            cuda::unpack_chunk<Element>(words[s][j][c], values);
#pragma unroll
            for (int e = 0; e < kPerChunk; ++e) result[s][c][e] = fmaf(weight, values[e], result[s][c][e]);
          }
        }
      }
    }
#pragma unroll
    for (int s = 0; s < kSets; ++s) {
      const int32_t own = row + s * Shape::kRowsPerWarp + group;
      if (own < end) {
        write_row<Element, kHeadDim>(geometry, args, value_dim, unit, own, maximum[s], sum[s], sees_any[s], is_valid[s],
                                     result[s]);
      }
    }
  }
}

}  // namespace merge

// The thread block's shares of a wave's rows.
template <typename Element, int kHeadDim>
__device__ __forceinline__ void merge_rows(const MobaGeometry& geometry, const MergeArguments& args, int32_t value_dim,
                                           int32_t partial_elements, int num_warps) {
  const uint32_t thread_block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  if (thread_block % args.every != 0) return;  // the whole thread block
  const uint32_t num_merging = (gridDim.x * gridDim.y * gridDim.z + args.every - 1) / args.every;
#pragma unroll 1
  for (uint32_t share = thread_block / args.every; share < args.num_shares; share += num_merging) {
    const uint32_t unit_in_wave = share / args.shares_of_unit;
    const uint32_t first_row = (share - unit_in_wave * args.shares_of_unit) * args.rows_of_share;
    const auto end = min(first_row + args.rows_of_share, static_cast<uint32_t>(args.rows_of_unit));
    merge::merge_share<Element, kHeadDim>(geometry, args, value_dim, partial_elements, num_warps, unit_in_wave,
                                          static_cast<int32_t>(first_row), static_cast<int32_t>(end));
  }
}

// Cuts rows into shares. Beside attention (`grid` of moba_attend_blocks with work items) every second thread block
// merges, so that the other one of its multiprocessor multiplies meanwhile. rows_at_once: of a thread block.
inline dim3 cut_merge(MergeArguments& args, const dim3& grid, bool has_items, int64_t rows_at_once) {
  constexpr int64_t kRoundsAlone = 4;
  const int64_t thread_blocks = int64_t{grid.x} * grid.y * grid.z;
  args.every = has_items ? 2 : 1;
  int64_t rows = kRoundsAlone * rows_at_once;
  if (has_items) {
    const int64_t num_rows = args.wave.num_units * args.rows_of_unit;
    rows = multiple_of(divide_up(num_rows, divide_up(thread_blocks, 2)), rows_at_once);
  }
  args.rows_of_share = static_cast<uint32_t>(rows);
  args.shares_of_unit = static_cast<uint32_t>(divide_up(args.rows_of_unit, rows));
  args.num_shares = args.shares_of_unit * static_cast<uint32_t>(args.wave.num_units);
  return has_items ? grid : dim3(args.num_shares);
}

}  // namespace topgather
