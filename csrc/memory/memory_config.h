// The tuning of memory layers on the CPU, in one place. Changing a number changes speed and the last bits of results,
// nothing else.
#pragma once

#include <cstdint>

namespace topgather {

struct ProductKeyConfig {
  // A multiple of every register tile's rows. Enough that a panel read from the second-level cache serves several
  // register tiles, and no more, so that the scores of both halves stay in it.
  static constexpr int64_t kTileTokens = 48;
  // A bound is seldom guessed more than three times; what no guess separates are ties.
  static constexpr int kMaxGuesses = 8;
  // Counting compares everything with everything, a vector at a time; longer lists are merged.
  static constexpr int64_t kMaxCounted = 256;
};

// Lookups, dot products and their gradients wait for memory, not for arithmetic.
struct MemoryLookupConfig {
  // As many rows side by side as have registers for their weights; with fewer, too few lines are under way at once.
  static constexpr int kRowsPerPass = 8;
  // One pass further on: nearer rows come too late, farther ones push out of the first-level cache what is next.
  static constexpr int64_t kPrefetchEntries = 8;
  // Of a task: enough that starting it, and its first rows, which were not prefetched, do not count.
  static constexpr int64_t kElementsPerTask = 1 << 18;
  // Small problems are cut finer, so that a few tokens still keep many threads busy.
  static constexpr int64_t kMinTasks = 64;
  // What reading an element costs, in multiply-adds of a kernel whose operands are in cache.
  static constexpr double kOperationsPerElement = 8;
  // Gradients. Entries of a row summed per walk over it: few rows have more.
  static constexpr int kEntriesPerPass = 4;
  // Sorted positions of a block summed on its own. A row's own task never does more than about two blocks' entries.
  static constexpr int64_t kBlockEntries = 256;
  // Of a gradient: from here on allocators hand out memory that nobody touched yet.
  static constexpr int64_t kFreshBytes = int64_t{32} << 20;
};

}  // namespace topgather
