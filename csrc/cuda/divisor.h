// Division by a number that a launch knows and the compiler does not: a multiplication and a shift, where hardware
// without an integer division takes some twenty instructions, each of which waits for the one before.
#pragma once

#include <cstdint>

#include "../common/array.h"

namespace topgather::cuda {

// quotient(n) is n / divisor for n below 2^31 (Granlund and Montgomery, "Division by invariant integers using
// multiplication", 1994): 2^32 + multiplier is 2^(32 + shift) / divisor, rounded up, and shift such that what rounding
// adds stays below one for every such n.
struct Divisor {
  uint32_t multiplier = 1;
  uint32_t shift = 0;

  Divisor() = default;
  // divisor: 1 .. 2^31 - 1; less counts as 1.
  constexpr explicit Divisor(int64_t divisor) {
    const uint64_t by = divisor < 1 ? 1 : static_cast<uint64_t>(divisor);
    while (uint64_t{1} << shift < by) ++shift;
    multiplier = static_cast<uint32_t>((uint64_t{1} << 32) * ((uint64_t{1} << shift) - by) / by + 1);
  }
  TOPGATHER_HOST_DEVICE constexpr uint32_t quotient(uint32_t n) const {
    const auto high = static_cast<uint32_t>(uint64_t{n} * multiplier >> 32);
    return (high + n) >> shift;
  }
};

static_assert(Divisor(1).quotient(INT32_MAX) == INT32_MAX && Divisor(2).quotient(INT32_MAX) == INT32_MAX / 2);
static_assert(Divisor(3).quotient(INT32_MAX) == INT32_MAX / 3 && Divisor(7).quotient(6) == 0);
static_assert(Divisor(641).quotient(641 * 3350208 - 1) == 3350207 && Divisor(641).quotient(641 * 3350208) == 3350208);
static_assert(Divisor(INT32_MAX).quotient(INT32_MAX) == 1 && Divisor(INT32_MAX).quotient(INT32_MAX - 1) == 0);

}  // namespace topgather::cuda
