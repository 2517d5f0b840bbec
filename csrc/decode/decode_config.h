// The tuning of decoding on the CPU, as data.
#pragma once

#include <cstdint>

namespace topgather {

struct DecodeConfig {
  // Tokens that one task appends, in whole blocks.
  static constexpr int64_t kTokensPerAppend = 1024;
  // Queries of a tile stand in vector lanes while blocks are chosen.
  static constexpr int64_t kRouteRows = 64;
  // Up to so many rows of a key head, blocks are left out by bounds of their scores: a row's bounds cost a quarter of a
  // vector's scores.
  static constexpr int64_t kBoundedRows = 4;
  // How many centroids ahead are prefetched meanwhile: 8 KB of float32 at a head_dim of 64.
  static constexpr int64_t kRoutePrefetchRows = 32;
  // Where there are fewer tasks than this, such rows' blocks are split into parts of at least so many.
  static constexpr int64_t kMinRouteTasks = 32;
  static constexpr int64_t kMinBlocksPerPart = 512;
  // Rows (tokens times the query heads of a group) that one attending task takes; they share the keys it reads.
  static constexpr int64_t kRowsPerTask = 64;
  // Keys at a time: with their values 64 KB of float32 at a head_dim of 64.
  static constexpr int64_t kTileKeys = 128;
  // Where there are fewer tasks than this, a row's blocks are split into parts of at least so many keys.
  static constexpr int64_t kMinTasks = 32;
  static constexpr int64_t kMinKeysPerSplit = 2048;
};

}  // namespace topgather
