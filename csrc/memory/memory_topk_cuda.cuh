// The best pairs of product keys on CUDA: scores of token tiles against key tiles, kept on chip, the best of each half,
// and the best sums of two.
//
//   s1_i = dot(query[:D/2], keys[0, i])                                     never written to global memory
//   s2_j = dot(query[D/2:], keys[1, j])
//   scores, indices = the top_k largest s1_i + s2_j, descending, with i n + j
//
// Who owns what: a thread block owns kRows neighbouring tokens of one head, whose queries lie in shared memory, one
// half at a time. Keys pass by in chunks of kKeys, cut into slices of kSliceBytes of every row; num_stages slices lie
// in shared memory or are on their way. In products a warp owns kRowBlocks x 16 rows and kKeyBlocks x 8 keys of a
// chunk, in all else kRowsPerWarp rows. Steps per chunk:
//   1. slice by slice, each warp multiplies its rows with its keys and keeps the scores in registers;
//   2. the scores of kRoundKeys keys at a time go to shared memory;
//   3. a warp looks at its rows' scores, one a lane. Those better than the worst of the row's sorted list join the
//      row's pending entries; whenever 32 are pending, the warp sorts them and merges them into the list;
//   after both halves:
//   4. the sums of ranks a and b of the two lists, of those pairs alone that have (a + 1) (b + 1) <= top_k, the most
//      promising first, are selected in the same way and written out.
// Numerics: 16-bit products are exact; the matrix unit adds them in float32 and cuts off, where it does not round, what
// lies below the largest term's last bits, about 1e-6 of it: pairs that differ by less may rank otherwise than on the CPU.
// float32 takes plain multiply-adds. An entry is a 64-bit
// number: the score's bits, arranged to order as scores do, then the index, lower ones first, then a bit that says NaN.
// No two are equal, so results depend neither on the order in which entries come nor on the sort. A NaN half score
// ranks as +inf, a sum of opposite infinities as -inf; the score written is the true sum, -0 as 0. Every entry beats
// the zeros of an empty place.
// Rows with infinite or NaN half scores are found in what was written, and done again (memory_topk_infinite_cuda.cu).
// Determinism: a row's results depend on its own query and the keys alone.
// What bounds it: the path to shared memory, by selecting somewhat more than by multiplying (docs/performance.md). On
// processors with room for two thread blocks, one waits or selects while the other multiplies.
#pragma once

#include "../common/checks.h"
#include "../cuda/dispatch.h"
#include "../cuda/launch.cuh"
#include "../cuda/tile_math.cuh"
#include "memory_config_cuda.h"
#include "memory_cuda.h"

namespace topgather {

// Pairs of ranks a, b with (a + 1) (b + 1) <= top_k.
constexpr int count_rank_pairs(int top_k) {
  int count = 0;
  for (int a = 1; a <= top_k; ++a) count += top_k / a;
  return count;
}
constexpr int kMaxRankPairs = count_rank_pairs(kProductKeyMaxTopK);

struct ProductKeyArguments {
  uint32_t num_tiles;  // of a head
  int64_t num_tokens;
  int32_t num_heads;
  int32_t num_keys;
  int32_t half_dim;
  int32_t top_k;
  int32_t num_stages;
  Array<const void, 4> query;  // [T, H, 2, whole row] dtype
  Array<const void, 4> keys;   // [H, 2, n, whole row] dtype
  float* scores;               // [T, H, top_k] float32
  int64_t* indices;            // [T, H, top_k] int64
  int32_t num_pairs;
  uint16_t pairs[kMaxRankPairs];  // a + 256 b, the smallest (a + 1) (b + 1) first
};

// kPerLane: entries of a row's list that each lane of a warp holds, for top_k up to 32 kPerLane.
template <typename Element, int kPerLane>
struct alignas(128) ProductKeySharedMemory {
  using Tiles = ProductKeyTiles<Element, kPerLane>;
  static constexpr int kRows = Tiles::kRowGroups * Tiles::kRowBlocks * cuda::kBlockRows;
  static constexpr int kKeys = Tiles::kKeyGroups * Tiles::kKeyBlocks * cuda::kBlockColumns;
  static constexpr int kWarps = Tiles::kRowGroups * Tiles::kKeyGroups;
  static constexpr int kThreads = kWarps * kLanes;
  static constexpr int kRowsPerWarp = kRows / kWarps;
  static constexpr int kRoundKeys = kLanes;
  static constexpr int kListLength = kPerLane * kLanes;
  static constexpr int kSliceColumns = ProductKeyCudaConfig::kSliceBytes / static_cast<int>(sizeof(Element));
  static_assert(kRows % kWarps == 0 && kRowsPerWarp <= kLanes && kKeys % kRoundKeys == 0);
  static_assert(kRoundKeys % (Tiles::kKeyBlocks * cuda::kBlockColumns) == 0, "a warp's keys belong to one round");
  using KeyTile = cuda::SharedTile<Element, kKeys, kSliceColumns>;
  using QueryTile = cuda::SharedTile<Element, kRows, kSliceColumns>;

  float scores[kRows][kRoundKeys + 8];  // 8 more: pairs of a half warp's rows lie in different banks
  uint64_t pending[kRows][kLanes];
  uint32_t list_ordinals[2][kRows][kListLength];
  uint16_t list_keys[2][kRows][kListLength];
  uint16_t pairs[count_rank_pairs(kListLength)];
  // Behind it: num_stages key tiles, then a query tile for every slice of half_dim.
  static constexpr int64_t num_slices(int64_t half_dim) { return (half_dim + kSliceColumns - 1) / kSliceColumns; }
  static constexpr int64_t bytes(int64_t half_dim, int64_t num_stages) {
    return static_cast<int64_t>(sizeof(ProductKeySharedMemory)) + num_stages * static_cast<int64_t>(sizeof(KeyTile)) +
           num_slices(half_dim) * static_cast<int64_t>(sizeof(QueryTile));
  }
  // As many as fit, two at least: one is multiplied while another arrives.
  static constexpr int64_t stages(int64_t half_dim) {
    int64_t num_stages = ProductKeyCudaConfig::kMaxStages;
    while (num_stages > 2 && bytes(half_dim, num_stages) > ProductKeyCudaConfig::kSharedBytes) --num_stages;
    return num_stages;
  }
  __device__ __forceinline__ KeyTile* key_tiles() { return reinterpret_cast<KeyTile*>(this + 1); }
  __device__ __forceinline__ QueryTile* query_tiles(int num_stages) {
    return reinterpret_cast<QueryTile*>(key_tiles() + num_stages);
  }
};

namespace product_key {

// --- entries --------------------------------------------------------------------------------------------------------

// An ordinal orders as scores do: 0 for an empty entry, then the scores from -inf to +inf, then NaN.
constexpr uint32_t kInfinityOrdinal = 0xff800000u;
constexpr uint32_t kNanOrdinal = 0xffffffffu;
// Indices are less than 2^31: their complements order lower indices first.
constexpr uint32_t kLastIndex = 0x7fffffffu;

__device__ __forceinline__ uint32_t ordinal_of(float score) {
  const uint32_t bits = __float_as_uint(score + 0.0f);  // -0 becomes 0
  const uint32_t ordinal = bits >> 31 != 0 ? ~bits : bits | 0x80000000u;
  return isnan(score) ? kNanOrdinal : ordinal;
}
__device__ __forceinline__ float score_of(uint32_t ordinal) {
  return __uint_as_float(ordinal >> 31 != 0 ? ordinal ^ 0x80000000u : ~ordinal);
}
// What the score counts as.
__device__ __forceinline__ float rank_of(uint32_t ordinal) { return score_of(min(ordinal, kInfinityOrdinal)); }

// Larger entries are better; ordinal: of a number.
__device__ __forceinline__ uint64_t make_entry(uint32_t ordinal, uint32_t index, bool is_nan) {
  return static_cast<uint64_t>(ordinal) << 32 | (kLastIndex - index) << 1 | (is_nan ? 1u : 0u);
}
__device__ __forceinline__ uint64_t half_entry(uint32_t ordinal, uint32_t key_idx) {
  return make_entry(min(ordinal, kInfinityOrdinal), key_idx, ordinal > kInfinityOrdinal);
}
__device__ __forceinline__ uint32_t ordinal_in(uint64_t entry) {
  return (entry & 1) != 0 ? kNanOrdinal : static_cast<uint32_t>(entry >> 32);
}
__device__ __forceinline__ uint32_t index_in(uint64_t entry) {
  return kLastIndex - (static_cast<uint32_t>(entry) >> 1);
}

// --- sorting and merging, by all lanes of a warp --------------------------------------------------------------------

__device__ __forceinline__ uint64_t exchange(uint64_t entry, int lane_mask) {
  const uint32_t low = __shfl_xor_sync(kAllLanes, static_cast<uint32_t>(entry), lane_mask);
  const uint32_t high = __shfl_xor_sync(kAllLanes, static_cast<uint32_t>(entry >> 32), lane_mask);
  return static_cast<uint64_t>(high) << 32 | low;
}
__device__ __forceinline__ uint64_t entry_of_lane(uint64_t entry, int lane) {
  const uint32_t low = __shfl_sync(kAllLanes, static_cast<uint32_t>(entry), lane);
  const uint32_t high = __shfl_sync(kAllLanes, static_cast<uint32_t>(entry >> 32), lane);
  return static_cast<uint64_t>(high) << 32 | low;
}
__device__ __forceinline__ uint64_t keep(uint64_t entry, uint64_t other, bool is_larger_kept) {
  return (other > entry) == is_larger_kept ? other : entry;
}

// Whether a lane keeps the larger of two in a step of a bitonic sort, ascending.
__device__ __forceinline__ bool keeps_larger(int size, int stride) {
  return ((lane_id() & stride) != 0) == ((lane_id() & size) == 0);
}

// An entry a lane, ascending afterwards. Sorts 27 bits of the scores first, with the lanes they come from in the other
// 5, at half the shuffles and a third of the instructions; the whole entries where these bits leave ties.
__device__ __forceinline__ uint64_t sort_ascending(uint64_t entry) {
  constexpr uint32_t kLaneBits = kLanes - 1;
  const int lane = lane_id();
  uint32_t key = (static_cast<uint32_t>(entry >> 32) & ~kLaneBits) | static_cast<uint32_t>(lane);
#pragma unroll
  for (int size = 2; size <= kLanes; size *= 2) {
#pragma unroll
    for (int stride = size / 2; stride > 0; stride /= 2) {
      const uint32_t other = __shfl_xor_sync(kAllLanes, key, stride);
      key = keeps_larger(size, stride) ? max(key, other) : min(key, other);
    }
  }
  const uint32_t before = __shfl_up_sync(kAllLanes, key, 1);
  // Empty entries may stand in any order.
  const bool is_tie = lane > 0 && (key ^ before) <= kLaneBits && key > kLaneBits;
  if (__any_sync(kAllLanes, is_tie) == 0) return entry_of_lane(entry, static_cast<int>(key & kLaneBits));
#pragma unroll 1
  for (int size = 2; size <= kLanes; size *= 2) {
#pragma unroll 1
    for (int stride = size / 2; stride > 0; stride /= 2) {
      entry = keep(entry, exchange(entry, stride), keeps_larger(size, stride));
    }
  }
  return entry;
}

// list: rank 32 j + lane in list[j], descending. Takes what belongs there of 32 candidates, an entry a lane.
template <int kPerLane>
__device__ __forceinline__ void enter_candidates(uint64_t (&list)[kPerLane], uint64_t candidate) {
  // The best 32 of the list's last and the candidates: the list then falls and rises again, and is merged as such.
  list[kPerLane - 1] = keep(list[kPerLane - 1], sort_ascending(candidate), true);
#pragma unroll
  for (int distance = kPerLane / 2; distance > 0; distance /= 2) {
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) {
      if ((j & distance) != 0) continue;
      const uint64_t first = list[j], second = list[j + distance];
      list[j] = keep(first, second, true);
      list[j + distance] = keep(first, second, false);
    }
  }
  const int lane = lane_id();
#pragma unroll
  for (int stride = kLanes / 2; stride > 0; stride /= 2) {
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) list[j] = keep(list[j], exchange(list[j], stride), (lane & stride) == 0);
  }
}

// The entry of that rank, for all lanes. Not by j == rank / kLanes: the compiler would make an address of it, and keep
// the list in local memory.
template <int kPerLane>
__device__ __forceinline__ uint64_t entry_at(const uint64_t (&list)[kPerLane], int rank) {
  uint64_t entry = list[0];
#pragma unroll
  for (int j = 1; j < kPerLane; ++j) entry = rank >= j * kLanes ? list[j] : entry;
  return entry_of_lane(entry, rank % kLanes);
}

// A row's list of one half, in shared memory. Lanes touch the ranks that are their own alone.
template <int kPerLane>
struct HalfList {
  uint32_t* ordinals;
  uint16_t* keys;
  int last_rank;
  float worst;  // score of the last rank; NaN where there is none yet, so that no score is at most that

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) {
      ordinals[j * kLanes + lane_id()] = 0;
      keys[j * kLanes + lane_id()] = 0;
    }
  }
  __device__ __forceinline__ void enter(uint64_t candidate) {
    uint64_t list[kPerLane];
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) {
      list[j] = half_entry(ordinals[j * kLanes + lane_id()], keys[j * kLanes + lane_id()]);
    }
    enter_candidates(list, candidate);
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) {
      ordinals[j * kLanes + lane_id()] = ordinal_in(list[j]);
      keys[j * kLanes + lane_id()] = static_cast<uint16_t>(index_in(list[j]));
    }
    const uint32_t ordinal = ordinal_in(entry_at(list, last_rank));
    worst = ordinal == 0 ? NAN : rank_of(ordinal);
  }
};

// A row's list of sums.
template <int kPerLane>
struct SumList {
  uint64_t list[kPerLane];
  int last_rank;
  uint64_t worst = 0;

  __device__ __forceinline__ explicit SumList(int num_wanted) : last_rank(num_wanted - 1) {
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) list[j] = 0;
  }
  __device__ __forceinline__ void enter(uint64_t candidate) {
    enter_candidates(list, candidate);
    worst = entry_at(list, last_rank);
  }
};

// Collects the entries that pass; whenever 32 are pending, they enter the list.
template <typename List>
__device__ __forceinline__ void offer(List& list, uint64_t* pending, int& num_pending, uint64_t entry, bool passes) {
  const unsigned passing = __ballot_sync(kAllLanes, passes);
  const int position = num_pending + __popc(passing & ((1u << lane_id()) - 1));
  if (passes && position < kLanes) pending[position] = entry;
  num_pending += __popc(passing);
  if (num_pending < kLanes) return;
  // Publishes the pending entries to the warp.
  __syncwarp();
  list.enter(pending[lane_id()]);
  // Tells the warp that they have been read and may be overwritten.
  __syncwarp();
  if (passes && position >= kLanes) pending[position - kLanes] = entry;
  num_pending -= kLanes;
}

template <typename List>
__device__ __forceinline__ void enter_pending(List& list, const uint64_t* pending, int num_pending) {
  // Publishes the pending entries to the warp.
  __syncwarp();
  list.enter(lane_id() < num_pending ? pending[lane_id()] : 0);
  // Tells the warp that they have been read and may be overwritten.
  __syncwarp();
}

// --- steps ----------------------------------------------------------------------------------------------------------

// Starts the copy of one slice of the rows of a half. What is not there becomes zeros.
template <int kThreads, typename Tile, typename Element>
__device__ __forceinline__ void copy_slice(Tile& tile, const Element* rows, int64_t row_stride, int64_t count,
                                           int slice, int row_chunks) {
  const int first_chunk = slice * Tile::kChunks;
  constexpr int kNumChunks = Tile::kRows * Tile::kChunks;
#pragma unroll
  for (int first = 0; first < kNumChunks; first += kThreads) {  // as many times for every thread
    const int idx = first + static_cast<int>(threadIdx.x);
    if (kNumChunks % kThreads != 0 && idx >= kNumChunks) break;
    const int row = idx / Tile::kChunks, chunk = idx % Tile::kChunks;
    cuda::copy_chunk_async(tile, row, chunk, rows + row * row_stride + first_chunk * Tile::kPerChunk,
                           row_chunks - first_chunk, row < count);
  }
}

// Slices of keys on their way through the stages, in the order of products.
template <typename Element, int kPerLane>
struct KeyStream {
  using Shared = ProductKeySharedMemory<Element, kPerLane>;
  const Element* keys;
  int first_key = 0;
  int slice = 0;
  int stage = 0;

  // Starts the next slice's copy, none past the last, and closes its group either way.
  __device__ __forceinline__ void copy_next(const ProductKeyArguments& args, Shared& shared, int num_slices,
                                            int row_chunks) {
    if (first_key < args.num_keys) {
      const int64_t row_stride = args.keys.strides[2];
      copy_slice<Shared::kThreads>(shared.key_tiles()[stage], keys + first_key * row_stride, row_stride,
                                   args.num_keys - first_key, slice, row_chunks);
    }
    cuda::copy_async_commit();
    stage = stage + 1 == args.num_stages ? 0 : stage + 1;
    if (++slice == num_slices) {
      slice = 0;
      first_key += Shared::kKeys;
    }
  }
};

// Waits for this thread's copies but those of the last num_stages - 2 groups.
__device__ __forceinline__ void wait_for_slice(int num_stages) {
  if (num_stages == 2) {
    cuda::copy_async_wait<0>();
  } else if (num_stages == 3) {
    cuda::copy_async_wait<1>();
  } else {
    cuda::copy_async_wait<2>();
  }
}

// Step 2.
template <typename Shared, int kM, int kN>
__device__ __forceinline__ void store_scores(Shared& shared, const float (&sums)[kM][kN][4], int first_row,
                                             int first_column) {
  const int g = lane_id() / 4, t = lane_id() % 4;
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float* scores = &shared.scores[first_row + m * cuda::kBlockRows + h * 8 + g][first_column + n * 8 + 2 * t];
        *reinterpret_cast<float2*>(scores) = make_float2(sums[m][n][2 * h], sums[m][n][2 * h + 1]);
      }
    }
  }
}

// A warp's state of its rows: lane r holds row r's.
struct RowState {
  float worst;
  int num_pending;
};

template <int kPerLane, typename Shared>
__device__ __forceinline__ HalfList<kPerLane> list_of(Shared& shared, int half, int row, int last_rank, float worst) {
  return {shared.list_ordinals[half][row], shared.list_keys[half][row], last_rank, worst};
}

// Step 3, of `count` keys from first_key on; num_rows: of the warp.
template <int kPerLane, typename Shared>
__device__ __forceinline__ void select_keys(Shared& shared, RowState& state, int half, int num_rows, int last_rank,
                                            int first_key, int count) {
  const int lane = lane_id(), first_row = warp_id() * Shared::kRowsPerWarp;
  // Keys come in ascending order: one that only equals the worst does not beat it.
  unsigned rows = 0;
#pragma unroll
  for (int r = 0; r < Shared::kRowsPerWarp; ++r) {
    const float score = shared.scores[first_row + r][lane], worst = __shfl_sync(kAllLanes, state.worst, r);
    const bool passes = lane < count && !(score <= worst);
    rows |= (__any_sync(kAllLanes, passes) != 0 ? 1u : 0u) << r;
  }
  rows &= (1u << num_rows) - 1;
#pragma unroll 1
  for (; rows != 0; rows &= rows - 1) {
    const int r = __ffs(static_cast<int>(rows)) - 1, row = first_row + r;
    const float score = shared.scores[row][lane];
    HalfList<kPerLane> list = list_of<kPerLane>(shared, half, row, last_rank, __shfl_sync(kAllLanes, state.worst, r));
    int num_pending = __shfl_sync(kAllLanes, state.num_pending, r);
    const bool passes = lane < count && !(score <= list.worst);
    offer(list, shared.pending[row], num_pending,
          half_entry(ordinal_of(score), static_cast<uint32_t>(first_key + lane)), passes);
    if (lane == r) state = {list.worst, num_pending};
  }
}

// The end of step 3: what is still pending.
template <int kPerLane, typename Shared>
__device__ __forceinline__ void finish_half(Shared& shared, const RowState& state, int half, int num_rows,
                                            int last_rank) {
#pragma unroll 1
  for (int r = 0; r < num_rows; ++r) {
    const int row = warp_id() * Shared::kRowsPerWarp + r;
    const int num_pending = __shfl_sync(kAllLanes, state.num_pending, r);
    if (num_pending == 0) continue;
    HalfList<kPerLane> list = list_of<kPerLane>(shared, half, row, last_rank, 0.0f);
    enter_pending(list, shared.pending[row], num_pending);
  }
}

// Step 4 for one row.
template <int kPerLane, typename Shared>
__device__ __forceinline__ void select_pairs(const ProductKeyArguments& args, Shared& shared, int row, float* scores,
                                             int64_t* indices) {
  const int lane = lane_id();
  SumList<kPerLane> sums(args.top_k);
  int num_pending = 0;
#pragma unroll 1
  for (int first = 0; first < args.num_pairs; first += kLanes) {
    uint64_t entry = 0;
    if (first + lane < args.num_pairs) {
      const int pair = shared.pairs[first + lane];
      const int a = pair % 256, b = pair / 256;
      const uint32_t ordinal1 = shared.list_ordinals[0][row][a], ordinal2 = shared.list_ordinals[1][row][b];
      const uint32_t index = static_cast<uint32_t>(shared.list_keys[0][row][a]) * static_cast<uint32_t>(args.num_keys) +
                             shared.list_keys[1][row][b];
      const float sum = rank_of(ordinal1) + rank_of(ordinal2);
      const bool is_nan = max(ordinal1, ordinal2) > kInfinityOrdinal || isnan(sum);
      entry = make_entry(ordinal_of(isnan(sum) ? -INFINITY : sum), index, is_nan);
    }
    offer(sums, shared.pending[row], num_pending, entry, entry > sums.worst);
  }
  if (num_pending > 0) enter_pending(sums, shared.pending[row], num_pending);
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) {
    const int rank = j * kLanes + lane;
    if (rank >= args.top_k) continue;
    const uint32_t ordinal = ordinal_in(sums.list[j]);
    scores[rank] = ordinal == kNanOrdinal ? NAN : score_of(ordinal);
    indices[rank] = index_in(sums.list[j]);
  }
}

}  // namespace product_key

template <typename Element, int kPerLane>
__global__ void __launch_bounds__(ProductKeySharedMemory<Element, kPerLane>::kThreads,
                                  ProductKeyCudaConfig::kBlocksPerProcessor)
    product_key_topk(const ProductKeyArguments args) {
  using Shared = ProductKeySharedMemory<Element, kPerLane>;
  using Tiles = typename Shared::Tiles;
  Shared& shared = *reinterpret_cast<Shared*>(cuda::dynamic_shared_memory());
  const int64_t head = blockIdx.x / args.num_tiles;
  const int64_t first_token = static_cast<int64_t>(blockIdx.x % args.num_tiles) * Shared::kRows;
  const int64_t tokens_left = args.num_tokens - first_token;
  const Element* query = args.query.at<Element>(first_token, head);
  const Element* keys = args.keys.at<Element>(head);

  constexpr int kPerChunk = Shared::KeyTile::kPerChunk;
  const int row_chunks = (args.half_dim + kPerChunk - 1) / kPerChunk;
  const int num_slices = (args.half_dim + Shared::kSliceColumns - 1) / Shared::kSliceColumns;
  typename Shared::QueryTile* query_tiles = shared.query_tiles(args.num_stages);
  const int last_rank = min(args.top_k, args.num_keys) - 1;

  const int first_row = warp_id() * Shared::kRowsPerWarp;
  const int num_rows = static_cast<int>(min(max(tokens_left - first_row, int64_t{0}), int64_t{Shared::kRowsPerWarp}));
  const int key_group = warp_id() % Tiles::kKeyGroups;
  const int product_row = warp_id() / Tiles::kKeyGroups * Tiles::kRowBlocks * cuda::kBlockRows;
  constexpr int kGroupKeys = Tiles::kKeyBlocks * cuda::kBlockColumns;
  const int product_key = key_group * kGroupKeys;

  for (int i = threadIdx.x; i < args.num_pairs; i += Shared::kThreads) shared.pairs[i] = args.pairs[i];

#pragma unroll 1
  for (int half = 0; half < 2; ++half) {
    for (int r = 0; r < Shared::kRowsPerWarp; ++r) {
      product_key::list_of<kPerLane>(shared, half, first_row + r, last_rank, 0.0f).clear();
    }
    product_key::RowState state{NAN, 0};
    // The barrier after the last scores went to shared memory saw the last products of the half before.
    for (int slice = 0; slice < num_slices; ++slice) {
      product_key::copy_slice<Shared::kThreads>(query_tiles[slice], query + half * args.query.strides[2],
                                                args.query.strides[0], tokens_left, slice, row_chunks);
    }
    product_key::KeyStream<Element, kPerLane> stream{keys + half * args.keys.strides[1]};
    for (int i = 0; i < args.num_stages - 1; ++i) stream.copy_next(args, shared, num_slices, row_chunks);
    int stage = 0;

#pragma unroll 1
    for (int first_key = 0; first_key < args.num_keys; first_key += Shared::kKeys) {
      const int count = min(args.num_keys - first_key, Shared::kKeys);
      float sums[Tiles::kRowBlocks][Tiles::kKeyBlocks][4];
      cuda::fill(sums, 0.0f);
#pragma unroll 1
      for (int slice = 0; slice < num_slices; ++slice) {
        product_key::wait_for_slice(args.num_stages);
        // Publishes the slice of keys, and the first time queries, to all warps; tells that the slice before has been
        // used and its stage may be overwritten.
        __syncthreads();
        stream.copy_next(args, shared, num_slices, row_chunks);
        const int depth = min(args.half_dim - slice * Shared::kSliceColumns, Shared::kSliceColumns);
        cuda::multiply_by_rows(sums, query_tiles[slice], product_row, shared.key_tiles()[stage], product_key,
                               count - product_key, depth);
        stage = stage + 1 == args.num_stages ? 0 : stage + 1;
      }
#pragma unroll 1
      for (int round_key = 0; round_key < count; round_key += Shared::kRoundKeys) {
        if (round_key > 0) {
          // Tells all warps that the scores of the round before have been used and may be overwritten. Those of the
          // chunk before have: every slice has a barrier.
          __syncthreads();
        }
        if (product_key / Shared::kRoundKeys == round_key / Shared::kRoundKeys) {
          product_key::store_scores(shared, sums, product_row, product_key % Shared::kRoundKeys);
        }
        // Publishes the scores to all warps.
        __syncthreads();
        product_key::select_keys<kPerLane>(shared, state, half, num_rows, last_rank, first_key + round_key,
                                           count - round_key);
      }
    }
    product_key::finish_half<kPerLane>(shared, state, half, num_rows, last_rank);
  }

  // Publishes the lists of the warp's rows to its lanes; pairs were published to all by the barriers above.
  __syncwarp();
#pragma unroll 1
  for (int r = 0; r < num_rows; ++r) {
    const int64_t first = ((first_token + first_row + r) * args.num_heads + head) * args.top_k;
    product_key::select_pairs<kPerLane>(args, shared, first_row + r, args.scores + first, args.indices + first);
  }
}

// Does rows again whose best or worst score, already written, is not finite.
void rewrite_infinite_rows(const ProductKeyArguments& args, Dtype dtype, cudaStream_t stream);
void add_infinite_rows_kernel_facts(std::vector<CudaKernelFacts>& facts);

// What a launch of the kernel for one element type and length of lists needs to know of it.
struct ProductKeyKernel {
  Dtype dtype;
  int64_t max_top_k;
  int64_t threads;
  int64_t rows;
  int64_t (*stages)(int64_t half_dim);
  int64_t (*shared_bytes)(int64_t half_dim, int64_t num_stages);
  void (*launch)(const ProductKeyArguments& args, int64_t num_thread_blocks, int64_t shared_bytes, cudaStream_t stream);
};

template <typename Element, int kPerLane>
constexpr ProductKeyKernel product_key_kernel() {
  using Shared = ProductKeySharedMemory<Element, kPerLane>;
  static_assert(Shared::bytes(kProductKeyMaxHalfDim, 2) <= ProductKeyCudaConfig::kSharedBytes);
  static_assert(Shared::kListLength <= kProductKeyMaxTopK);
  return {kDtypeOf<Element>,
          Shared::kListLength,
          Shared::kThreads,
          Shared::kRows,
          &Shared::stages,
          &Shared::bytes,
          [](const ProductKeyArguments& args, int64_t num_thread_blocks, int64_t shared_bytes, cudaStream_t stream) {
            cuda::launch(product_key_topk<Element, kPerLane>,
                         {dim3(static_cast<unsigned>(num_thread_blocks)), dim3(Shared::kThreads),
                          static_cast<size_t>(shared_bytes), stream},
                         args);
          }};
}

}  // namespace topgather
