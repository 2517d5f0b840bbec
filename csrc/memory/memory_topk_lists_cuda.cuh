// The entries of product-key searches on CUDA, a pair or the key of a half each: how they are ordered, and how a warp
// sorts them and keeps the best. For memory_topk_cuda.cuh and memory_topk_infinite_cuda.cu.
//
// An entry is a 64-bit number: the score's bits, arranged to order as scores do, then the index, lower ones first, then
// a bit that says NaN. No two are equal, so results depend neither on the order in which entries come nor on the sort.
// Where the first bits of the scores tell all that matter apart, words of 32 bits do: those bits, and where the entry
// stands.
#pragma once

#include "../cuda/warp.cuh"

namespace topgather {

namespace product_key {

// --- entries --------------------------------------------------------------------------------------------------------

// An ordinal orders as scores do: 0 for an empty entry, then the scores from -inf to +inf, then NaN.
constexpr uint32_t kInfinityOrdinal = 0xff800000u;
constexpr uint32_t kNanOrdinal = 0xffffffffu;
constexpr uint32_t kMinusInfinityOrdinal = 0x007fffffu;
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

// --- words for entries ----------------------------------------------------------------------------------------------

// The first bits of a score, as far as it counts, then the slot where its entry stands.
constexpr int kSlots = 128;
__device__ __forceinline__ uint32_t make_word(float score, int slot) {
  const uint32_t rank = min(ordinal_of(score), kInfinityOrdinal);
  return (rank & ~static_cast<uint32_t>(kSlots - 1)) | static_cast<uint32_t>(slot);
}
__device__ __forceinline__ int slot_in(uint32_t word) { return static_cast<int>(word % kSlots); }
// Whether the score is -inf, or there is none.
__device__ __forceinline__ bool is_empty(uint32_t word) { return word <= kMinusInfinityOrdinal; }

// Of two words, lanes whose bit is set keep the larger, or all the others do.
template <int kBit, bool kIsLargerAtBit>
__device__ __forceinline__ uint32_t exchange_words(uint32_t word, int lane_mask) {
  const uint32_t other = __shfl_xor_sync(kAllLanes, word, lane_mask);
  return ((lane_id() & kBit) != 0) == kIsLargerAtBit ? max(word, other) : min(word, other);
}
// Words that fall and rise again, or the other way round, within every 2 kBit lanes.
template <int kBit, bool kIsAscending>
__device__ __forceinline__ uint32_t merge_words(uint32_t word) {
  word = exchange_words<kBit, kIsAscending>(word, kBit);
  if constexpr (kBit > 1) word = merge_words<kBit / 2, kIsAscending>(word);
  return word;
}
// A word a lane, ascending afterwards: halves of twice as many lanes are merged by exchanging the first with the last,
// so that all that a lane keeps depends on one bit of its number, and five predicates do.
template <int kBit = 1>
__device__ __forceinline__ uint32_t sort_words(uint32_t word) {
  word = exchange_words<kBit, true>(word, 2 * kBit - 1);
  if constexpr (kBit > 1) word = merge_words<kBit / 2, true>(word);
  if constexpr (2 * kBit < kLanes) word = sort_words<2 * kBit>(word);
  return word;
}

// The best 32 words of a row, one a lane, descending, and the largest that a lane has let go.
struct BestWords {
  uint32_t word;
  uint32_t left_out = 0;

  __device__ __forceinline__ explicit BestWords(uint32_t first) : word(first) {}

  // A word a lane, in any order.
  __device__ __forceinline__ void enter(uint32_t candidate) {
    candidate = sort_words(candidate);
    // The candidates ascend, the words descend: what is kept falls and rises again, and is merged as such.
    left_out = max(left_out, min(word, candidate));
    word = merge_words<kLanes / 2, false>(max(word, candidate));
  }

  // Whether the words leave open which entries are the best, or their order.
  __device__ __forceinline__ bool is_open() const {
    const uint32_t before = __shfl_up_sync(kAllLanes, word, 1), last = __shfl_sync(kAllLanes, word, kLanes - 1);
    const bool is_order_open = lane_id() > 0 && (word ^ before) < kSlots && !is_empty(word);
    const bool is_choice_open = (left_out ^ last) < kSlots && !is_empty(last);
    return __any_sync(kAllLanes, is_order_open || is_choice_open) != 0;
  }
};

}  // namespace product_key

}  // namespace topgather
