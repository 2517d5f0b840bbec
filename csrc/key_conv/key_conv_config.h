// Sizes of what the key convolution works on at a time on the CPU: the op's tuning, as data.
#pragma once

#include <cstdint>

namespace topgather {

struct KeyConvConfig {
  // Neighbouring heads whose rows follow one another in memory are walked as one row of up to so many channels: with
  // the taps' weights and the last rows they stay in the first-level cache.
  static constexpr int64_t kPanelChannels = 512;
  // Rows that are copied or converted go through a tile of about so many numbers, 16 KB of float32.
  static constexpr int64_t kTileNumbers = 4096;
  static constexpr int64_t kMinTileTokens = 16;
  // What a task takes at least, 256 KB of float32: short enough for many threads, long beside its first tokens.
  // Forward, where no result depends on the cut, a task takes more as long as every thread has so many: memory is
  // fastest in long walks.
  static constexpr int64_t kTaskNumbers = int64_t{1} << 16;
  static constexpr int64_t kMinTaskTokens = 64;
  static constexpr int64_t kForwardTasksPerThread = 4;
  // A task whose results are at least this large checks whether their memory was ever touched.
  static constexpr int64_t kMinFreshBytes = int64_t{1} << 17;
  // A weight's gradient is summed in so many pieces at most: enough for many threads, little memory.
  static constexpr int64_t kMaxPieces = 128;
};

}  // namespace topgather
