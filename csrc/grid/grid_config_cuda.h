// The tuning of grid and window attention on CUDA, in one place. Changing a number changes speed and the last bits of
// results, nothing else.
#pragma once

#include <cstdint>
#include <type_traits>

namespace topgather {

struct GridCudaConfig {
  static constexpr int kRowThreads = 256;  // of the kernels that take a token or a sum at a time
  // A bias' gradient is summed in pieces until there are this many thread blocks, four for each multiprocessor of an
  // H100, in at most so much memory.
  static constexpr int64_t kBiasBlocks = 528;
  static constexpr int64_t kMaxBiasBytes = int64_t{64} << 20;
};

// A warp takes 16 tokens of a tile, with all of their head_dim in registers where it sums.
template <typename Element, int kHeadDim>
struct GridTiles {
  static constexpr bool kIsFloat = std::is_same_v<Element, float>;
  static constexpr int kTokens = kIsFloat && kHeadDim > 64 ? 32 : 64;
  static constexpr int kWarps = kTokens / 16;
  // Tokens of the other side whose scores a warp holds at a time.
  static constexpr int kForwardStep = kIsFloat ? 16 : 32;
  static constexpr int kBackwardStep = kIsFloat || kHeadDim > 64 ? 16 : 32;
  // Bounds registers, so that thread blocks hide each other's waits.
  static constexpr int kForwardBlocksPerProcessor = kIsFloat ? 3 : (kHeadDim > 64 ? 2 : 4);
  static constexpr int kBackwardBlocksPerProcessor = kHeadDim > 64 || kIsFloat ? 2 : 3;
};

// The forward of groups of more than 64 tokens of a 16-bit type: a warp takes 32 queries.
template <int kHeadDim>
struct GridLargeTiles {
  static constexpr int kTokens = 128;
  static constexpr int kWarps = kTokens / 32;
  static constexpr int kKeys = kHeadDim > 64 ? 32 : 64;  // that are copied, and whose scores a warp holds, at a time
  static constexpr int kBlocksPerProcessor = 2;
  // The backward with queries as rows: keys that are copied at a time, and those whose scores a warp holds.
  static constexpr int kBackwardColumns = 64;
  static constexpr int kQueryStep = 32;
  // The backward with keys as rows: keys of a thread block, and queries that come at a time.
  static constexpr int kUnitTokens = 256;
  static constexpr int kUnitQueries = 64;
};

// Sums of a bias' gradient are as many whatever head_dim is: one kernel for all.
constexpr int kGridBiasHeadDim = 128;

}  // namespace topgather
