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
//   2. scores better than the worst of their row's list are appended to the row's pending entries: warps count theirs
//      and tell each other, which gives every entry its place. If a row has no room for all of a chunk, it takes
//      kPending keys of it at a time; so do all rows where the lists are young and most scores pass;
//   3. a warp sorts the pending entries of its rows, where they have become many, and merges them into the lists;
//   after both halves:
//   4. the sums of ranks a and b of the two lists, of those pairs alone that have (a + 1) (b + 1) <= top_k, the most
//      promising first, are sorted and merged in the same way and written out.
// Lists of 32 entries are sorted by one word each, and by whole entries where words leave ties.
// Numerics: 16-bit products are exact; the matrix unit adds them in float32 and cuts off, where it does not round, what
// lies below the largest term's last bits, about 1e-6 of it: pairs that differ by less may rank otherwise than on the CPU.
// float32 takes plain multiply-adds. Ties go to the lower index; a NaN half score ranks as +inf, -inf as no key at all,
// a sum of opposite infinities as -inf; the score written is the true sum, -0 as 0.
// Rows with infinite or NaN half scores are found in what was written, and done again (memory_topk_infinite_cuda.cu).
// Determinism: a row's results depend on its own query and the keys alone.
// What bounds it: instructions, of selecting as many as of multiplying (docs/performance-cuda.md). On processors with room
// for two thread blocks, one waits or selects while the other multiplies.
#pragma once

#include "../common/checks.h"
#include "../cuda/dispatch.h"
#include "../cuda/launch.cuh"
#include "../cuda/tile_products.cuh"
#include "memory_config_cuda.h"
#include "memory_cuda.h"
#include "memory_topk_lists_cuda.cuh"

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
  static constexpr int kListLength = kPerLane * kLanes;
  static constexpr int kPending = ProductKeyCudaConfig::kPending;
  static constexpr int kSliceColumns = ProductKeyCudaConfig::kSliceBytes / static_cast<int>(sizeof(Element));
  // Groups of warps whose keys of a chunk a row has room for, whatever their scores are.
  static constexpr int kGroupKeys = Tiles::kKeyBlocks * cuda::kBlockColumns;
  static constexpr int kGroupsPerPart = kPending / kGroupKeys;
  static constexpr int kParts = Tiles::kKeyGroups / kGroupsPerPart;
  static_assert(kRows % kWarps == 0 && kRowsPerWarp <= kLanes);
  static_assert(kPending % kGroupKeys == 0 && Tiles::kKeyGroups % kGroupsPerPart == 0);
  static_assert(kPerLane > 1 || kListLength + kPending <= product_key::kSlots, "a word holds a slot");
  static_assert(kPerLane > 1 || count_rank_pairs(kListLength) <= product_key::kSlots, "and a pair");
  using KeyTile = cuda::SharedTile<Element, kKeys, kSliceColumns>;
  using QueryTile = cuda::SharedTile<Element, kRows, kSliceColumns>;
  struct alignas(8) GroupCounts {
    uint16_t of[Tiles::kKeyGroups];
  };

  // A row's list of the half at hand, descending, then its pending entries. 4 more: rows begin in different banks.
  float scores[kRows][kListLength + kPending + 4];
  uint16_t keys[kRows][kListLength + kPending];
  float first_scores[kRows][kListLength];  // the list of the first half
  uint16_t first_keys[kRows][kListLength];
  GroupCounts counts[kRows];  // entries that each group of warps appends
  float worst[kRows];         // of the list; -inf where it is not full
  int num_pending[kRows];     // kTakesNone: the row appends none
  uint16_t pairs[count_rank_pairs(kListLength)];
  // Behind it: num_stages key tiles, then a query tile for every slice of half_dim.
  static constexpr int64_t num_slices(int64_t half_dim) { return (half_dim + kSliceColumns - 1) / kSliceColumns; }
  static constexpr int64_t bytes(int64_t half_dim, int64_t num_stages) {
    return static_cast<int64_t>(sizeof(ProductKeySharedMemory)) + num_stages * static_cast<int64_t>(sizeof(KeyTile)) +
           num_slices(half_dim) * static_cast<int64_t>(sizeof(QueryTile));
  }
  // As many as fit, two at least: one is multiplied while another arrives.
  static constexpr int64_t stages(int64_t half_dim, int64_t shared_bytes) {
    int64_t num_stages = ProductKeyCudaConfig::kMaxStages;
    while (num_stages > 2 && bytes(half_dim, num_stages) > shared_bytes) --num_stages;
    return num_stages;
  }
  __device__ __forceinline__ KeyTile* key_tiles() { return reinterpret_cast<KeyTile*>(this + 1); }
  __device__ __forceinline__ QueryTile* query_tiles(int num_stages) {
    return reinterpret_cast<QueryTile*>(key_tiles() + num_stages);
  }
};

namespace product_key {

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

// Slices of keys on their way through the stages, in the order of products. A thread copies the same chunk of the same
// rows of every slice.
template <typename Element, int kPerLane>
struct KeyStream {
  using Shared = ProductKeySharedMemory<Element, kPerLane>;
  using Tile = typename Shared::KeyTile;
  static constexpr int kRowsApart = Shared::kThreads / Tile::kChunks;
  static_assert(Shared::kThreads % Tile::kChunks == 0 && Tile::kRows % kRowsApart == 0 && kRowsApart % 16 == 0);

  const Element* source;  // of the thread's first row
  int64_t row_stride;
  int64_t next_keys;    // from a chunk's last slice to the next one's first
  int num_keys_left;    // from the chunk's first on
  int num_chunks_left;  // of the rows, from the thread's on
  int num_slices_left;
  int stage = 0;

  __device__ __forceinline__ KeyStream(const Element* keys, int64_t stride, int num_keys, int num_slices,
                                       int row_chunks)
      : row_stride(stride), num_slices_left(num_slices) {
    const int row = static_cast<int>(threadIdx.x) / Tile::kChunks,
              chunk = static_cast<int>(threadIdx.x) % Tile::kChunks;
    source = keys + row * stride + chunk * Tile::kPerChunk;
    next_keys = Tile::kRows * stride - static_cast<int64_t>(num_slices) * Shared::kSliceColumns;
    num_keys_left = num_keys;
    num_chunks_left = row_chunks - chunk;
  }

  // Starts the next slice's copy, none past the last, and closes its group either way.
  __device__ __forceinline__ void copy_next(Shared& shared, int num_stages, int num_slices) {
    if (num_keys_left > 0) {
      const int row = static_cast<int>(threadIdx.x) / Tile::kChunks;
      const int chunk = static_cast<int>(threadIdx.x) % Tile::kChunks;
      const int num_rows = num_chunks_left > 0 ? num_keys_left - row : 0;
      Element* target = shared.key_tiles()[stage].chunk(row, chunk);
#pragma unroll
      for (int r = 0; r < Tile::kRows; r += kRowsApart) {
        cuda::copy_async_16(target + r * Tile::kColumns, source + r * row_stride, r < num_rows);
      }
    }
    cuda::copy_async_commit();
    stage = stage + 1 == num_stages ? 0 : stage + 1;
    source += Shared::kSliceColumns;
    num_chunks_left -= Tile::kChunks;
    if (--num_slices_left == 0) {
      num_slices_left = num_slices;
      num_chunks_left += num_slices * Tile::kChunks;
      source += next_keys;
      num_keys_left -= Tile::kRows;
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

// Keys from num_keys on, which are not there, get scores that pass nowhere.
template <int kM, int kN>
__device__ __forceinline__ void hide_absent(float (&sums)[kM][kN][4], int num_keys) {
  const int t = lane_id() % 4;
#pragma unroll
  for (int n = 0; n < kN; ++n) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      if (n * cuda::kBlockColumns + 2 * t + e < num_keys) continue;
#pragma unroll
      for (int m = 0; m < kM; ++m) sums[m][n][e] = sums[m][n][2 + e] = -INFINITY;
    }
  }
}

constexpr int kTakesNone = -1;

// What becomes of a row's pending entries by those that the groups of warps append.
struct Appending {
  int num_pending;  // without those
  int num_new;

  template <typename Shared>
  __device__ __forceinline__ Appending(const Shared& shared, int row) : num_pending(shared.num_pending[row]) {
    const auto counts = shared.counts[row];
    num_new = 0;
#pragma unroll
    for (int group = 0; group < Shared::Tiles::kKeyGroups; ++group) num_new += counts.of[group];
  }
  __device__ __forceinline__ bool takes_none() const { return num_pending == kTakesNone; }
  template <typename Shared>
  __device__ __forceinline__ bool has_room() const {
    return num_pending + num_new <= Shared::kPending;
  }
};

// Step 2, of a warp's scores of rows from first_row on and keys from first_key on; a warp that does not take part has
// none to append. Keys come in ascending order: one that only equals the worst does not beat it. True where a row has
// no room: it then takes none.
template <typename Shared, int kM, int kN>
__device__ __forceinline__ bool append_scores(Shared& shared, const float (&sums)[kM][kN][4], int first_row,
                                              int first_key, int key_group, bool takes_part) {
  const int lane = lane_id(), g = lane / 4, t = lane % 4;
  static_assert(kM * kN * 4 <= 32, "a bit for each score");
  uint32_t passing = 0, num_passing = 0;  // which of this lane's scores; how many of each of its rows, 8 bits each
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float worst = shared.worst[first_row + m * cuda::kBlockRows + h * 8 + g];
      uint32_t of_row = 0;
#pragma unroll
      for (int i = 0; i < 2 * kN; ++i) of_row |= sums[m][i / 2][2 * h + i % 2] <= worst ? 0u : 1u << i;
      passing |= of_row << 2 * kN * (2 * m + h);
      num_passing |= static_cast<uint32_t>(__popc(of_row)) << 8 * (2 * m + h);
    }
  }
  if (!takes_part) passing = num_passing = 0;
  // Four lanes share rows. Lane t of them writes and reads the counts of row t.
  uint32_t through = num_passing;
#pragma unroll
  for (int distance = 1; distance < 4; distance *= 2) {
    const uint32_t before = __shfl_up_sync(kAllLanes, through, distance, 4);
    if (t >= distance) through += before;
  }
  const uint32_t all = __shfl_sync(kAllLanes, through, 3, 4);
  const bool has_row = t < 2 * kM;
  const int own_row = first_row + t / 2 * cuda::kBlockRows + t % 2 * 8 + g;
  if (has_row) shared.counts[own_row].of[key_group] = static_cast<uint16_t>(all >> 8 * t & 0xffu);
  // Publishes the counts to all warps.
  __syncthreads();
  int own_start = kTakesNone;
  bool is_full = false;
  if (has_row) {
    const Appending appending(shared, own_row);
    is_full = !appending.takes_none() && !appending.template has_room<Shared>();
    if (!appending.takes_none() && !is_full) {
      own_start = Shared::kListLength + appending.num_pending;
#pragma unroll
      for (int group = 0; group < Shared::Tiles::kKeyGroups; ++group) {
        if (group < key_group) own_start += shared.counts[own_row].of[group];
      }
    }
  }
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int start = __shfl_sync(kAllLanes, own_start, 2 * m + h, 4);
      const uint32_t of_row = passing >> 2 * kN * (2 * m + h) & ((1u << 2 * kN) - 1);
      if (of_row == 0 || start == kTakesNone) continue;
      const int row = first_row + m * cuda::kBlockRows + h * 8 + g;
      const int slot = start + static_cast<int>((through - num_passing) >> 8 * (2 * m + h) & 0xffu);
      float* scores = &shared.scores[row][slot];
      uint16_t* keys = &shared.keys[row][slot];
#pragma unroll
      for (int i = 0; i < 2 * kN; ++i) {
        if ((of_row >> i & 1) == 0) continue;
        *scores++ = sums[m][i / 2][2 * h + i % 2];
        *keys++ = static_cast<uint16_t>(first_key + i / 2 * cuda::kBlockColumns + 2 * t + i % 2);
      }
    }
  }
  // Publishes the pending entries to the warps that own their rows.
  return __syncthreads_or(is_full ? 1 : 0) != 0;
}

// What a score counts as among those of a half.
__device__ __forceinline__ float rank_of_score(float score) { return isnan(score) ? INFINITY : score; }

// Merges a row's pending entries into its list; returns what the score of last_rank counts as.
template <int kPerLane, typename Shared>
__device__ __forceinline__ float merge_pending(Shared& shared, int row, int num_pending, int last_rank) {
  constexpr int kListLength = Shared::kListLength;
  float* scores = shared.scores[row];
  uint16_t* keys = shared.keys[row];
  const int lane = lane_id();
  if constexpr (kPerLane == 1) {
    BestWords best(make_word(scores[lane], lane));
    static_assert(Shared::kPending == 2 * kLanes);
    const int slot1 = kListLength + lane, slot2 = slot1 + kLanes;
    best.enter(make_word(lane < num_pending ? scores[slot1] : -INFINITY, slot1));
    if (num_pending > kLanes) best.enter(make_word(kLanes + lane < num_pending ? scores[slot2] : -INFINITY, slot2));
    if (!best.is_open()) {
      const bool is_there = !is_empty(best.word);
      const int slot = slot_in(best.word);
      const float score = is_there ? scores[slot] : -INFINITY;
      const uint16_t key = is_there ? keys[slot] : uint16_t{0};
      // Tells the warp that the list has been read and may be overwritten.
      __syncwarp();
      scores[lane] = score;
      keys[lane] = key;
      return rank_of_score(__shfl_sync(kAllLanes, score, last_rank));
    }
  }
  uint64_t list[kPerLane];
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) {
    list[j] = half_entry(ordinal_of(scores[j * kLanes + lane]), keys[j * kLanes + lane]);
  }
#pragma unroll 1
  for (int first = lane; first - lane < num_pending; first += kLanes) {
    const int slot = kListLength + first;
    enter_candidates(list, first < num_pending ? half_entry(ordinal_of(scores[slot]), keys[slot]) : 0);
  }
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) {
    const uint32_t ordinal = ordinal_in(list[j]);
    scores[j * kLanes + lane] = ordinal == kNanOrdinal ? NAN : score_of(ordinal);
    keys[j * kLanes + lane] = static_cast<uint16_t>(index_in(list[j]));
  }
  return rank_of(ordinal_in(entry_at(list, last_rank)));
}

// What step 3 does with rows.
enum class Merging {
  kMany,   // those with many pending entries
  kAll,    // all; all take part in the next chunk
  kParts,  // all; those that had room for the chunk, if it was tried whole, take none of its parts
};

// Step 3. num_rows: of the warp; is_whole: the chunk was appended whole.
template <int kPerLane, typename Shared>
__device__ __forceinline__ void merge_rows(Shared& shared, int num_rows, int last_rank, Merging merging,
                                           bool is_whole) {
  const int lane = lane_id(), first_row = warp_id() * Shared::kRowsPerWarp;
  int num_pending = 0;
  if (lane < num_rows) {
    const Appending appending(shared, first_row + lane);
    const bool has_room = appending.template has_room<Shared>();
    if (!appending.takes_none()) num_pending = appending.num_pending + (has_room ? appending.num_new : 0);
    const bool is_left = merging == Merging::kMany && num_pending <= ProductKeyCudaConfig::kLeftPending;
    const bool is_done = merging == Merging::kParts && (is_whole ? has_room : appending.takes_none());
    shared.num_pending[first_row + lane] = is_done ? kTakesNone : (is_left ? num_pending : 0);
    if (is_left) num_pending = 0;
  }
#pragma unroll 1
  for (unsigned rows = __ballot_sync(kAllLanes, num_pending > 0); rows != 0; rows &= rows - 1) {
    const int r = __ffs(static_cast<int>(rows)) - 1;
    const float worst =
        merge_pending<kPerLane>(shared, first_row + r, __shfl_sync(kAllLanes, num_pending, r), last_rank);
    if (lane == r) shared.worst[first_row + r] = worst;
  }
}

// The lists of the warp's rows before a half: empty.
template <int kPerLane, typename Shared>
__device__ __forceinline__ void clear_lists(Shared& shared, int half, int num_rows) {
  const int lane = lane_id(), first_row = warp_id() * Shared::kRowsPerWarp;
#pragma unroll 1
  for (int r = 0; r < Shared::kRowsPerWarp; ++r) {
    const int row = first_row + r;
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) {
      const int rank = j * kLanes + lane;
      if (half == 1) {
        shared.first_scores[row][rank] = shared.scores[row][rank];
        shared.first_keys[row][rank] = shared.keys[row][rank];
      }
      shared.scores[row][rank] = -INFINITY;
      shared.keys[row][rank] = 0;
    }
  }
  if (lane < Shared::kRowsPerWarp) {
    shared.worst[first_row + lane] = -INFINITY;
    shared.num_pending[first_row + lane] = lane < num_rows ? 0 : kTakesNone;
  }
}

// A pair of ranks of a row's two lists.
struct RankPair {
  float first;
  float second;
  uint32_t index;

  template <typename Shared>
  __device__ __forceinline__ RankPair(const Shared& shared, int row, int slot, int num_keys) {
    const int a = shared.pairs[slot] % 256, b = shared.pairs[slot] / 256;
    first = shared.first_scores[row][a];
    second = shared.scores[row][b];
    index = static_cast<uint32_t>(shared.first_keys[row][a]) * static_cast<uint32_t>(num_keys) + shared.keys[row][b];
  }
};

// Step 4 for one row.
template <int kPerLane, typename Shared>
__device__ __forceinline__ void select_pairs(const ProductKeyArguments& args, Shared& shared, int row, float* scores,
                                             int64_t* indices) {
  const int lane = lane_id();
  if constexpr (kPerLane == 1) {
    BestWords best(0);
#pragma unroll 1
    for (int slot = lane; slot - lane < args.num_pairs; slot += kLanes) {
      float sum = -INFINITY;
      if (slot < args.num_pairs) {
        const RankPair pair(shared, row, slot, args.num_keys);
        sum = pair.first + pair.second;
      }
      best.enter(make_word(sum, slot));
    }
    if (!best.is_open()) {
      if (lane < args.top_k) {
        const RankPair pair(shared, row, is_empty(best.word) ? 0 : slot_in(best.word), args.num_keys);
        scores[lane] = is_empty(best.word) ? -INFINITY : pair.first + pair.second + 0.0f;  // -0 becomes 0
        indices[lane] = pair.index;
      }
      return;
    }
  }
  static_assert(sizeof(uint64_t) * kLanes <= sizeof(float) * Shared::kPending);
  auto* pending = reinterpret_cast<uint64_t*>(&shared.scores[row][Shared::kListLength]);
  SumList<kPerLane> sums(args.top_k);
  int num_pending = 0;
#pragma unroll 1
  for (int first = 0; first < args.num_pairs; first += kLanes) {
    uint64_t entry = 0;
    if (first + lane < args.num_pairs) {
      const RankPair pair(shared, row, first + lane, args.num_keys);
      const float sum = rank_of_score(pair.first) + rank_of_score(pair.second);
      const bool is_nan = isnan(pair.first) || isnan(pair.second) || isnan(sum);
      entry = make_entry(ordinal_of(isnan(sum) ? -INFINITY : sum), pair.index, is_nan);
    }
    offer(sums, pending, num_pending, entry, entry > sums.worst);
  }
  if (num_pending > 0) enter_pending(sums, pending, num_pending);
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
  const int product_key = key_group * Shared::kGroupKeys;

  const auto query_operand = cuda::left_operand(query_tiles[0], product_row);
  const auto key_operand = cuda::right_operand_by_rows(shared.key_tiles()[0], product_key);

  for (int i = threadIdx.x; i < args.num_pairs; i += Shared::kThreads) shared.pairs[i] = args.pairs[i];

#pragma unroll 1
  for (int half = 0; half < 2; ++half) {
    product_key::clear_lists<kPerLane>(shared, half, num_rows);
    // The barriers of the last appended entries saw the last products of the half before.
    for (int slice = 0; slice < num_slices; ++slice) {
      product_key::copy_slice<Shared::kThreads>(query_tiles[slice], query + half * args.query.strides[2],
                                                args.query.strides[0], tokens_left, slice, row_chunks);
    }
    product_key::KeyStream<Element, kPerLane> stream(keys + half * args.keys.strides[1], args.keys.strides[2],
                                                     args.num_keys, num_slices, row_chunks);
    for (int i = 0; i < args.num_stages - 1; ++i) stream.copy_next(shared, args.num_stages, num_slices);
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
        stream.copy_next(shared, args.num_stages, num_slices);
        if constexpr (std::is_same_v<Element, float>) {
          const int depth = min(args.half_dim - slice * Shared::kSliceColumns, Shared::kSliceColumns);
          cuda::multiply_by_rows(sums, query_tiles[slice], product_row, shared.key_tiles()[stage], product_key,
                                 count - product_key, depth);
        } else {
          cuda::multiply_all_rows<typename Shared::QueryTile, typename Shared::KeyTile, Element>(
              sums, query_operand, key_operand, static_cast<uint32_t>(slice * sizeof(typename Shared::QueryTile)),
              static_cast<uint32_t>(stage * sizeof(typename Shared::KeyTile)));
        }
        stage = stage + 1 == args.num_stages ? 0 : stage + 1;
      }
      if (count < Shared::kKeys) product_key::hide_absent(sums, count - product_key);
      // Step 0 appends the whole chunk, those that follow a part of it each.
      const int first_step = first_key * ProductKeyCudaConfig::kYoungLists >= args.top_k * Shared::kKeys ? 0 : 1;
      bool is_last = false;
#pragma unroll 1
      for (int step = first_step; !is_last; ++step) {
        // Publishes to all warps what the merging before made of the rows.
        if (step > first_step) __syncthreads();
        const bool takes_part = step == 0 || key_group / Shared::kGroupsPerPart == step - 1;
        const bool is_any_full =
            product_key::append_scores(shared, sums, product_row, first_key + product_key, key_group, takes_part);
        is_last = step == (is_any_full || step > 0 ? Shared::kParts : 0);
        product_key::Merging merging = product_key::Merging::kAll;
        if (!is_last) {
          merging = product_key::Merging::kParts;
        } else if (step == 0 && first_key + Shared::kKeys < args.num_keys) {
          merging = product_key::Merging::kMany;
        }
        product_key::merge_rows<kPerLane>(shared, num_rows, last_rank, merging, step == 0);
      }
    }
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
  int64_t (*stages)(int64_t half_dim, int64_t shared_bytes);
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
