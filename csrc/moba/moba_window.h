// A sliding window of tokens beside a choice of blocks: how it becomes blocks, for every backend.
//
// The query at position p sees keys p - window + 1 to p as well as those of its chosen blocks, each once. Blocks of the
// window that it did not choose follow its choice in slots of their own; all are seen up to p, and one of them, the
// edge, from the window's start on: the block that the window begins in, unless it has all of it.
#pragma once

#include <cstdint>

#include "../common/array.h"

namespace topgather {

// Slots that a window adds to a choice: whole blocks first, the edge last.
TOPGATHER_HOST_DEVICE constexpr int64_t window_slots(int64_t window, int64_t block_size) {
  return window == 0 ? 0 : (window - 1) / block_size + 2;
}

}  // namespace topgather
