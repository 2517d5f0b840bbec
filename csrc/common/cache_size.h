// How much the processor's last-level cache holds.
#pragma once

#include <cstdint>

namespace topgather {

// Of one cache, not of all that a machine has: what Linux says of the first processor's third level (in sysfs; sysconf
// tells some virtual machines ten times as much), else kUnknownCacheBytes.
int64_t last_level_cache_bytes();

inline constexpr int64_t kUnknownCacheBytes = int64_t{32} << 20;

// For tests: what last_level_cache_bytes() returns from now on; of 0, what the machine has.
void assume_last_level_cache(int64_t num_bytes);

}  // namespace topgather
