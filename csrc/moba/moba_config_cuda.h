// The tuning of block attention on CUDA, in one place: tile shapes by element type and head dimension, and how work and
// memory are cut. Changing a number changes speed and the last bits of results, nothing else.
//
// Every tile but the wide ones of the backward fits the 99 KB of shared memory that the smallest supported processors
// (sm_86, sm_89, sm_120) give a thread block; docs/architecture.md counts the bytes.
#pragma once

#include <cstdint>
#include <type_traits>

namespace topgather {

struct MobaWaveConfig {
  // Partial outputs and lists of one wave. Large enough that waves follow each other without idling the device.
  static constexpr int64_t kForwardBudget = int64_t{512} << 20;      // of all, if one wave does
  static constexpr int64_t kForwardPairBudget = int64_t{768} << 20;  // else of two waves' outputs and one's lists
  static constexpr int64_t kBackwardBudget = int64_t{1} << 30;
  static constexpr int64_t kRouteBudget = int64_t{512} << 20;
  static constexpr int64_t kMaxUnits = 32768;  // a grid's second dimension
};

struct MobaLayoutConfig {
  static constexpr int kThreads = 256;
  static constexpr int kRowsPerChunk = 256;  // counted together, then filled by one warp in order
  static constexpr int kChunksPerThreadBlock = 4;
  static constexpr int kCountRounds = 4;  // of rows that a warp counts, their choices on their way at once
  static constexpr int kScanUnroll = 16;  // chunks whose counts are on their way at once
  static constexpr int kMaxScanThreads = 512;
  static constexpr int kMaxBlocksOfOneScan = 128;  // a launch less outweighs that one thread block scans all chunks
  // Cursors of a thread block's chunks lie in shared memory up to this size, else in global memory.
  static constexpr int kMaxCursorBytes = 64 * 1024;
};

struct MobaCentroidConfig {
  static constexpr int kThreads = 256;
};

template <typename Element, int kHeadDim>
struct MobaRouteTiles {
  // Registers are bounded so that this many thread blocks share a multiprocessor.
  static constexpr int kBlocksPerProcessor = !std::is_same_v<Element, float> && kHeadDim <= 64 ? 4 : 1;
  static constexpr int kFilterBlocksPerProcessor = kHeadDim <= 64 ? 4 : 3;
  static constexpr int kHeldSteps = kHeadDim <= 64 ? 0 : 3;  // of queries' depth, kept in the filter's registers
  static constexpr bool kIsFloat = std::is_same_v<Element, float>;
  static constexpr int kWarps = kIsFloat && kHeadDim > 128 ? 2 : 4;
  static constexpr int kRowBlocks = kIsFloat || kHeadDim > 128 ? 1 : 2;  // of 16 queries, a warp
  static constexpr int kCentroids = 32;
};

// The choice by upper bounds, where there are many blocks.
struct MobaRouteFilterConfig {
  static constexpr int kListLength = 16;          // entries a row keeps
  static constexpr int kMaxChosen = 9;            // of them; the others tell apart what bounds leave open
  static constexpr int64_t kMinBlocks = 256;      // of a sequence, on average
  static constexpr int64_t kMaxBlocks = 1 << 14;  // more take bits of the bounds that tell blocks apart
  static constexpr uint32_t kTilesPerRerun = 32;  // of queries, that a thread block looks through for failed rows
};

template <typename Element, int kHeadDim>
struct MobaForwardTiles {
  static constexpr bool kIsFloat = std::is_same_v<Element, float>;
  static constexpr int kWarps = kIsFloat && kHeadDim > 64 ? 2 : 4;
  static constexpr int kRowBlocks = kIsFloat || kHeadDim > 128 ? 1 : 2;  // of 16 queries, a warp
  // Keys and values on chip. Blocks up to this size are read once; larger ones once per round of query tiles.
  static constexpr int kResidentKeys = kIsFloat ? (kHeadDim > 128  ? 16
                                                   : kHeadDim > 64 ? 64
                                                                   : 128)
                                                : (kHeadDim > 128 ? 64 : 128);
  static constexpr int kValueColumns = kIsFloat && kHeadDim > 128 ? 128 : kHeadDim;
  static constexpr int kStepKeys =
      kIsFloat || kHeadDim > 128 ? 16 : (kHeadDim > 64 ? 32 : 64);  // scores held in registers at a time
  static constexpr int kEntriesPerItem = 512;  // choices of one block that one thread block attends to
};

// Of a tile of kQueries entries by kKeys keys, a warp takes kScoreRows by kScoreKeys scores, kStepKeys of them at a time;
// then kGradKeys keys' gradients in some columns, and kGradRows entries' gradients in some columns, kPanelColumns of them
// at a time. Large parts read less of shared memory, and take more registers. Wide tiles hold a block of 128 keys whole:
// entries are gathered, and grad_query is added to, once instead of twice. They need more shared memory than the
// smallest processors have.
template <typename Element, int kHeadDim, bool kIsWide>
struct MobaBackwardTiles {
  static constexpr bool kIsFloat = std::is_same_v<Element, float>;
  static constexpr int kTier = kHeadDim * (kIsFloat ? 2 : 1);  // by bytes of a row
  static constexpr bool kHasLargeParts = !kIsFloat && kHeadDim <= 128;
  static_assert(!kIsWide || kHasLargeParts, "wide tiles are for 16-bit types and up to 128 columns");
  static constexpr int kQueries = kHasLargeParts ? 64 : (kTier <= 256 ? 32 : 16);
  static constexpr int kKeys = kIsWide ? 128 : (kTier <= 128 ? 64 : kQueries);
  static constexpr int kWarps = kTier <= 256 ? 8 : 4;
  static constexpr int kScoreRows = kHasLargeParts && !(kIsWide && kHeadDim == 64) ? 32 : 16;
  static constexpr int kScoreKeys = kIsWide ? (kHeadDim == 64 ? 64 : 32) : 16;
  static constexpr int kStepKeys = kIsWide && kHeadDim == 128 ? 32 : 16;
  static constexpr int kGradKeys = kHasLargeParts ? 32 : 16;
  static constexpr int kGradRows = kHasLargeParts ? 32 : 16;
  static constexpr int kPanelColumns = 32;
  // Registers are bounded so that this many thread blocks share a multiprocessor and hide each other's waits.
  static constexpr int kBlocksPerProcessor = kIsWide && kHeadDim == 128 ? 1 : 2;
};
constexpr int64_t kMobaBackwardEntriesPerItem = 4096;

}  // namespace topgather
