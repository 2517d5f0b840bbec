// What the CPU's attention kernels share: caps of scores, sinks, and rows whose softmax is none.
#pragma once

#include <cmath>
#include <limits>

#include "../common/array.h"
#include "math.h"

namespace topgather::TOPGATHER_CPU_TARGET {

// cap * tanh(score / cap) of scores [num_keys, tile_row].
template <typename T>
inline void cap_scores(T* scores, int64_t tile_row, int64_t num_vectors, int64_t num_keys, T cap) {
  for (int64_t key = 0; key < num_keys; ++key) {
    for (int64_t v = 0; v < num_vectors; ++v) {
      T* score = scores + key * tile_row + v * kLanes<T>;
      store<T>(score, cap * tanh_vector(load<T>(score) / cap));
    }
  }
}

// The share of a row's sum that its keys have beside the head's sink, exp(lse) / (exp(lse) + exp(sink)).
template <typename T>
inline T share_beside_sink(T lse, const Array<const void, 1>& sinks, int64_t head_idx) {
  return 1 / (1 + std::exp(*sinks.at<T>(head_idx) - lse));
}

// What the weighted sum of a row's values is multiplied with where the sum of its weights is not above 0: a row that
// sees no key gives zeros. Keys seen, all at -inf, are 0 / 0, unless a sink gives the sum something.
template <typename T>
inline T factor_of_unusual_row(T lse, bool sees_a_key, const Array<const void, 1>& sinks, int64_t head_idx) {
  constexpr T kLowest = -std::numeric_limits<T>::infinity();
  const bool has_sink = sinks.data != nullptr && *sinks.at<T>(head_idx) > kLowest;
  return lse == kLowest && (has_sink || !sees_a_key) ? T(0) : std::numeric_limits<T>::quiet_NaN();
}

}  // namespace topgather::TOPGATHER_CPU_TARGET
