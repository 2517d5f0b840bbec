// Tile sizes of grid and window attention on the CPU: the op's tuning, as data.
#pragma once

#include <cstdint>

namespace topgather {

struct GridConfig {
  // Queries stand in vector lanes: four vectors of AVX-512, enough to hide latencies.
  static constexpr int64_t kTileQueries = 64;
  // Scores of a tile, 32 KB of float32, stay in the first-level cache.
  static constexpr int64_t kTileKeys = 128;
  // Queries of a large group that one forward task takes, so that few large groups still occupy many threads.
  static constexpr int64_t kQueriesPerTask = 256;
  // Small groups are handed out several at a time, as long as there are this many tasks left.
  static constexpr int64_t kMaxGroupsPerTask = 16;
  static constexpr int64_t kMinTasks = 64;
  // Pieces in which the gradient of a bias is summed: enough for many threads, in at most so much memory.
  static constexpr int64_t kMaxBiasPieces = 64;
  static constexpr int64_t kMaxBiasBytes = int64_t{64} << 20;
};

}  // namespace topgather
