// The tuning of memory layers on CUDA, in one place. Changing a number changes speed and the last bits of results,
// nothing else.
#pragma once

#include <cstdint>
#include <type_traits>

namespace topgather {

// Rows come from all over the table, so speed is bytes under way: a multiprocessor holds kBlocksPerProcessor thread
// blocks of kThreads lanes with kRowsInFlight loads of 16 bytes each, 80 KB; an H100 needs some 20 KB.
struct MemoryLookupCudaConfig {
  static constexpr int kThreads = 128;
  static constexpr int kBlocksPerProcessor = 5;
  static constexpr int kRowsInFlight = 8;
};

// Of rows of 8 bits a load brings 16 columns, so fewer of them, and of blocks, leave registers for their numbers: 32 KB
// under way.
struct MemoryQuantizedCudaConfig {
  static constexpr int kThreads = 128;
  static constexpr int kBlocksPerProcessor = 4;
  static constexpr int kRowsInFlight = 4;
};

struct MemoryBackwardCudaConfig {
  static constexpr int kThreads = 256;
  static constexpr int kBlocksPerProcessor = 2;
  // Sorted entries that one group of lanes walks in order. Longer pieces leave fewer sums to be put together, and
  // fewer pieces for the multiprocessors.
  static constexpr int kEntriesPerPiece = 128;
  static constexpr int kEntriesInFlight = 4;  // of each the row of grad_out and, where it is needed, of values
  // Sums of pieces that are added up beforehand where one run fills them all, and sums that a lane loads at once.
  static constexpr int kPiecesPerStretch = 64;
  static constexpr int kPiecesInFlight = 8;
};

struct ProductKeyCudaConfig {
  // What the smallest supported processors give a thread block, and what two can have each on those with more: one
  // selects while the other multiplies.
  static constexpr int64_t kSharedBytes = 99 * 1024;
  static constexpr int64_t kSharedBytesOfTwo = 112 * 1024;
  static constexpr int kBlocksPerProcessor = 2;
  static constexpr int kSliceBytes = 64;    // of every key's row that are copied and multiplied at a time
  static constexpr int64_t kMaxStages = 4;  // slices of keys in shared memory, of 2 at least
  static constexpr int kPending = 64;       // entries of a row that have passed and not yet been merged, at most
  static constexpr int kLeftPending = 24;   // so many may wait for the next chunk
  // A chunk is taken whole where kYoungLists / top_k of it have been seen before: fewer scores pass then than there is
  // room for.
  static constexpr int kYoungLists = 48;
};

// A warp multiplies kRowBlocks x 16 tokens with kKeyBlocks x 8 keys; kRowGroups x kKeyGroups warps.
template <typename Element, int kPerLane>
struct ProductKeyTiles {
  static constexpr bool kIsFloat = std::is_same_v<Element, float>;
  static constexpr int kKeyGroups = 4;
  static constexpr int kKeyBlocks = 4;
  // Lists and queries of all rows lie in shared memory: the longer and wider, the fewer rows.
  static constexpr int kRowGroups = kIsFloat || kPerLane > 1 ? 1 : 2;
  static constexpr int kRowBlocks = kIsFloat && kPerLane > 1 ? 1 : 2;
};

}  // namespace topgather
