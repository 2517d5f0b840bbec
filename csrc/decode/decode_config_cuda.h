// The tuning of decoding on CUDA, in one place. Changing a number changes speed and the last bits of results, nothing
// else.
#pragma once

#include <cstdint>

namespace topgather {

struct DecodeAppendCudaConfig {
  static constexpr int kThreads = 128;
  static constexpr int kPiecesInFlight = 4;  // of rows that a thread copies
  static constexpr int kKeysInFlight = 8;    // of a column that is summed
};

struct DecodeRouteCudaConfig {
  static constexpr int64_t kBudget = int64_t{256} << 20;  // of scores
  static constexpr int kScoreThreads = 128;
  // Centroids that one thread block scores: 1024 of them, 128K tokens in blocks of 128, make 32 thread blocks a key
  // head, so that a single sequence of 8 key heads fills a device.
  static constexpr int kBlocksPerItem = 32;
  static constexpr int kCentroidsInFlight = 4;  // of a group of lanes
  static constexpr int kRowsAtOnce = 4;         // queries that share the centroids a lane holds
  static constexpr int kMaxRows = 16;           // queries of one thread block, fewer where rows are long
  static constexpr int64_t kMaxRowBytes = int64_t{32} << 10;
  static constexpr int kSelectThreads = 256;
  static constexpr int kScoresHeld = 8;  // by a thread of the selection, in registers: 2048 blocks in all
};

struct DecodeAttendCudaConfig {
  static constexpr int64_t kBudget = int64_t{256} << 20;  // of partial outputs
  static constexpr int kThreads = 128;
  static constexpr int kBlocksPerProcessor = 8;
  static constexpr int kRowsInFlight = 4;  // of a group of lanes
  // Keys of one query that one thread block attends to. With 8 slots of 128 keys, 64 keys make 16 thread blocks a
  // query: one token of 8 query heads fills a device. Where a query sees many blocks, more keys, so that merging stays
  // small.
  static constexpr int64_t kMinKeys = 64;
  static constexpr int64_t kMaxKeys = 1024;
  static constexpr int64_t kMaxSplits = 128;
  static constexpr int kMergeThreads = 128;
  static constexpr int kSplitsInFlight = 8;  // whose outputs a thread that merges loads together
};

}  // namespace topgather
