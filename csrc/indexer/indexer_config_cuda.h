// The tuning of the indexer on CUDA, in one place. Changing a number changes speed and the last bits of scores, nothing
// else.
#pragma once

#include <cstdint>

namespace topgather {

struct IndexRouteCudaConfig {
  static constexpr int kWarps = 4;
  static constexpr int kMaxKeys = 64;   // of a tile
  static constexpr int kLaneList = 16;  // longest list that a lane holds in registers
  static constexpr int64_t kMaxThreadBlocks = 2048;
  static constexpr int64_t kListBudget = int64_t{64} << 20;  // bytes of lists, of all thread blocks
  // Queries of a warp, in blocks of 16. Rows of 16-bit elements leave room for two.
  static constexpr int row_blocks(int element_bytes, int64_t head_dim) {
    return element_bytes == 2 && head_dim <= 128 ? 2 : 1;
  }
};

template <int kElementBytes, int kHeadDim>
struct IndexRouteTiles {
  static constexpr int kRowBytes = kElementBytes * kHeadDim;
  static constexpr int kRowBlocks = IndexRouteCudaConfig::row_blocks(kElementBytes, kHeadDim);
  static constexpr int kKeys = kRowBlocks == 2 ? IndexRouteCudaConfig::kMaxKeys : (kRowBytes > 512 ? 16 : 32);
  // Blocks whose scores are kept until they are selected from; with float32 rows of 256 columns all takes 99 KB.
  static constexpr int kColumns = kRowBytes > 512 ? 8 : 16;
  // Registers are bounded so that this many thread blocks share a multiprocessor.
  static constexpr int kBlocksPerProcessor = kRowBytes > 512 ? 2 : 3;
};

}  // namespace topgather
