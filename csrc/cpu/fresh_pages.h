// Asking the system for many pages at once. A gradient as large as a table is written once, into memory that was never
// touched: one fault a page costs more than all else.
//
// Larger pages would make fewer faults, and were tried: on a virtual machine that had been idle, calls took seconds.
#pragma once

#include "simd.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace topgather::TOPGATHER_CPU_TARGET {

inline constexpr int64_t kSmallPageBytes = 4096;  // where pages are larger, a start within one is refused

// Whether the page that holds the byte at `data` was never written, as far as the system tells: then most likely its
// neighbours were not either. A call of half a microsecond.
inline bool is_fresh([[maybe_unused]] const void* data) {
#if defined(__linux__)
  unsigned char residency = 1;
  mincore(bit_cast<void*>(bit_cast<int64_t>(data) / kSmallPageBytes * kSmallPageBytes), 1, &residency);
  return (residency & 1) == 0;
#else
  return false;
#endif
}

// For memory that is about to be written. Contents are kept; a system that cannot do it (Linux before 5.14) refuses,
// and the pages come by faults.
inline void populate_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t num_bytes) {
#if defined(__linux__)
  constexpr int kPopulateWrite = 23;  // MADV_POPULATE_WRITE; not every C library's headers name it
  const int64_t address = bit_cast<int64_t>(data);
  const int64_t first = round_up(address, kSmallPageBytes);
  const int64_t last = (address + num_bytes) / kSmallPageBytes * kSmallPageBytes;
  if (first < last) madvise(bit_cast<void*>(first), static_cast<size_t>(last - first), kPopulateWrite);
#endif
}

}  // namespace topgather::TOPGATHER_CPU_TARGET
