// The tuning of the key convolution on CUDA, in one place. Changing a number changes speed and the last bits of a
// weight's gradient, nothing else.
#pragma once

#include <cstdint>

namespace topgather {

struct KeyConvCudaConfig {
  static constexpr int kThreads = 128;
  // Bounds registers: enough thread blocks to keep many rows in flight. kNumTaps: of all a thread's channels, in
  // registers.
  template <int kNumTaps>
  static constexpr int kForwardBlocksPerProcessor = kNumTaps > 48 ? 2 : 3;
  static constexpr int kBackwardBlocksPerProcessor = 2;
  static constexpr int kSumThreads = 128;
  // Tokens whose rows a thread loads at once.
  static constexpr int kStep = 4;
  static constexpr int kBackwardStep = 4;
  // Tokens that a thread walks. Forward: as many as leave kForwardThreads threads, the W - 1 rows before them are read
  // again. Backward: more where there would be more than kBackwardThreads, which bounds the sums for the weight.
  static constexpr int64_t kMaxForwardTokens = 64;
  static constexpr int64_t kMinForwardTokens = 2 * kStep;
  static constexpr int64_t kForwardThreads = int64_t{1} << 17;
  static constexpr int64_t kMinBackwardTokens = 16;
  static constexpr int64_t kBackwardThreads = int64_t{1} << 18;
};

}  // namespace topgather
