// The tuning of the indexer on the CPU, in one place. Changing a number changes speed and the last bits of scores,
// nothing else.
#pragma once

#include <cstdint>

namespace topgather {

struct IndexRouteConfig {
  static constexpr int kVectorsPerTile = 4;  // of queries
  // Queries of a task: a block's keys, read (and converted) once, serve all of them, and their transposed rows stay in
  // the second-level cache beside the keys.
  static constexpr int64_t kQueriesPerTask = 128;
  static constexpr int64_t kChunkKeys = 128;  // scored at once
};

}  // namespace topgather
