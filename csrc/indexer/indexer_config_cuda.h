// The tuning of the indexer on CUDA, in one place. Changing a number changes speed and the last bits of scores, nothing
// else.
#pragma once

#include <cstdint>

namespace topgather {

struct IndexRouteCudaConfig {
  static constexpr int kWarps = 4;
  static constexpr int kRowsPerWarp = 16;  // of queries
  static constexpr int kKeys = 32;         // of a tile; with float32 rows of 256 columns both tiles take 96 KB
  // Registers are bounded so that this many thread blocks share a multiprocessor; without a bound ptxas spills some.
  static constexpr int kBlocksPerProcessor = 3;
  static constexpr int64_t kMaxThreadBlocks = 2048;
  static constexpr int64_t kListBudget = int64_t{64} << 20;  // bytes of kept scores, of all thread blocks
};

}  // namespace topgather
