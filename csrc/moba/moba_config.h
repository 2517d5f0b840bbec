// The tuning of block attention on the CPU, in one place. Changing a number changes speed and the last bits of results,
// nothing else; docs/performance.md says what was tried.
#pragma once

#include <cstdint>

namespace topgather {

struct MobaRangeConfig {
  // Enough queries that an average key block is chosen by this many of them, so that a block read (and converted) once
  // serves two full query tiles, and no more, so that the running outputs of a range stay in cache.
  static constexpr int64_t kQueriesPerBlock = 128;
  static constexpr int64_t kMinQueries = 1024;
  // Where a sequence's heads have fewer ranges than this, the forward's are down to half as large, and have at least so
  // many queries. Not the backward's: of lists half as long its tiles would be less full (MobaBackwardConfig).
  static constexpr int64_t kMinRanges = 64;
  static constexpr int64_t kFewestQueries = 512;
};

struct MobaRouteConfig {
  static constexpr int kVectorsPerTile = 4;  // of queries
  static constexpr int64_t kChunkBlocks = 32;
  static constexpr int64_t kQueriesPerTask = 512;
  static constexpr int64_t kCentroidsPerTask = 4;
  // Where products of bytes decide first. Below so many blocks their bounds cost what they save.
  static constexpr int64_t kMinFilteredBlocks = 384;
  static constexpr int64_t kMaxFilteredList = 16;     // blocks kept by score
  static constexpr int64_t kMaxFilteredGroups = 128;  // of six blocks, a query's, before all blocks are scored instead
  static constexpr int64_t kMaxCandidates = 128;
};

struct MobaForwardConfig {
  static constexpr int64_t kTileQueries = 64;
  static constexpr int64_t kTileKeys = 128;
  // Half-size tiles on the diagonal, where the part of a tile above it is computed for nothing, and on the matrix unit.
  static constexpr int64_t kHalfQueries = 32;
};

struct MobaBackwardConfig {
  static constexpr int64_t kTileQueries = 32;
  static constexpr int64_t kTileKeys = 128;
  // Where a sequence's heads have fewer than MobaRangeConfig::kMinRanges ranges, two tasks of a round take a range, each
  // with a sum of grad_query of its own. Only of up to so many queries, since a longer sequence would pay for it in memory
  // and, with few threads, a percent or two of its time; and of at least so many keys a query, since of fewer adding up
  // would show.
  static constexpr int64_t kMostQueriesForTwoSums = 8192;
  static constexpr int64_t kFewestKeysForTwoSums = 512;
  // Tasks into which clearing, and converting, what a key head's gradients are summed in is cut.
  static constexpr int64_t kUnitPieces = 16;
  // Tasks of a round that are worth a workspace of second sums alone, whatever the number of threads.
  static constexpr int64_t kTasksPerRound = 64;
};

// Gathers fill whole vectors, up to 16 lanes wide, and the matrix unit works on panels of 32.
static_assert(MobaForwardConfig::kTileQueries % 32 == 0 && MobaForwardConfig::kHalfQueries == 32);
static_assert(MobaForwardConfig::kTileKeys % 32 == 0 && MobaBackwardConfig::kTileQueries % 16 == 0);

}  // namespace topgather
