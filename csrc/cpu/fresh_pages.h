// Populating many pages by one system call. A gradient as large as a table is written once, into memory that was never
// touched: one page fault per page costs more than everything else (docs/performance.md).
#pragma once

#include "../common/parallel.h"
#include "simd.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace topgather::TOPGATHER_CPU_TARGET {

inline constexpr int64_t kSmallPageBytes = 4096;  // where pages are larger, a start within one is refused

// Whether the page that holds the byte at `data` is not resident; then its neighbours most likely are not either. The
// system call takes half a microsecond.
inline bool is_fresh([[maybe_unused]] const void* data) {
#if defined(__linux__)
  unsigned char residency = 1;
  mincore(bit_cast<void*>(bit_cast<int64_t>(data) / kSmallPageBytes * kSmallPageBytes), 1, &residency);
  return (residency & 1) == 0;
#else
  return false;
#endif
}

// For memory that is about to be written. Contents are kept. Where the system cannot (Linux before 5.14), pages are
// populated by page faults.
inline void populate_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t num_bytes) {
#if defined(__linux__)
  constexpr int kPopulateWrite = 23;  // MADV_POPULATE_WRITE; not every C library's headers name it
  const int64_t address = bit_cast<int64_t>(data);
  const int64_t first = round_up(address, kSmallPageBytes);
  const int64_t last = (address + num_bytes) / kSmallPageBytes * kSmallPageBytes;
  if (first < last) madvise(bit_cast<void*>(first), static_cast<size_t>(last - first), kPopulateWrite);
#endif
}

// Of a result that tasks are about to write in rows scattered all over it, where most of it is fresh.
inline void populate_if_fresh(void* data, int64_t num_bytes, int num_threads) {
  constexpr int64_t kPieceBytes = int64_t{1} << 20;
  unsigned char* bytes = static_cast<unsigned char*>(data);
  if (num_bytes < 4 * kPieceBytes || !is_fresh(bytes + num_bytes / 2)) return;
  for_each_task(num_threads, ceil_div(num_bytes, kPieceBytes), [&](int64_t piece, int) {
    const int64_t first = piece * kPieceBytes;
    populate_pages(bytes + first, min64(kPieceBytes, num_bytes - first));
  });
}

}  // namespace topgather::TOPGATHER_CPU_TARGET
