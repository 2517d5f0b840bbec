// What the checked build knows of memory: declared ranges, what was written, who accessed what when.
//
// Time is counted in moments. Every barrier starts a new one: a block barrier for all warps of the block, __syncwarp
// for its warp. A later moment of the same block is ordered after an earlier interval (the time between two block
// barriers); within an interval only lanes of one warp can be ordered, by __syncwarp, which is kept in `known`.
#pragma once

#include "state.h"

namespace topgather::emulation {

#if defined(TOPGATHER_EMULATION_CHECKED)
constexpr bool kIsChecked = true;
#else
constexpr bool kIsChecked = false;
#endif

struct Clock {
  uint32_t now = 1;  // the latest moment
  uint32_t interval_first = 1, block_first = 1, launch_first = 1;
  // known[t][l]: what lane l of t's warp did before this moment happened before what thread t does now.
  uint32_t known[kMaxThreads][kLanes] = {};
};
extern Clock moments;

void start_moments_of_launch();
void start_moments_of_block();
void order_block();                            // a block barrier
void order_lanes(Warp& warp, uint32_t lanes);  // __syncwarp

// --- accesses -------------------------------------------------------------------------------------------------------

enum class Access { kRead, kWrite, kAtomic, kCopyIssue, kCopyLanding };

// Nothing outside the checked build. Fails on what a kernel must not do.
void check_access(uintptr_t address, size_t num_bytes, Access access, const void* caller);
inline void note_access(const void* address, size_t num_bytes, Access access, const void* caller) {
  if constexpr (kIsChecked) check_access(reinterpret_cast<uintptr_t>(address), num_bytes, access, caller);
}

void require_shared(const void* address, size_t alignment, const char* operation, const void* caller);
void require_global(const void* address, size_t num_bytes, const char* operation, const void* caller);

// --- declared memory (memory.cpp) -----------------------------------------------------------------------------------

// 2 bytes of memory, so that neighbouring 16-bit elements are told apart. A moment before the range's first is no
// access at all, so cells need no clearing.
struct ShadowCell {
  uint32_t write_moment;
  uint32_t read_moment;
  uint32_t read_lanes;  // of read_warp, at read_moment
  uint16_t writer;      // thread
  uint8_t read_warp;
  uint8_t flags;
};
static_assert(sizeof(ShadowCell) == 16);
constexpr size_t kCellBytes = 2;

struct DeclaredRange {
  uintptr_t begin, end;
  bool is_writable;
  bool is_initialized;    // all of it, by the caller
  uint32_t first_moment;  // writes before it belong to earlier calls
  ShadowCell* cells;      // null in the plain build and for inputs

  ShadowCell* cell_of(uintptr_t address) const { return cells + (address - (begin & ~uintptr_t{1})) / kCellBytes; }
};

extern ShadowCell* shadow;                 // shared memory's cells come first
extern std::vector<DeclaredRange> ranges;  // sorted, disjoint
extern const DeclaredRange* last_range;    // the last one found

void seal_memory();  // merges what was declared, poisons; before the first use by a launch or a host function
// Null where it does not lie in one.
const DeclaredRange* search_range(uintptr_t address, size_t num_bytes);
inline const DeclaredRange* find_range(uintptr_t address, size_t num_bytes) {
  if (last_range != nullptr && address >= last_range->begin && address + num_bytes <= last_range->end)
    return last_range;
  return search_range(address, num_bytes);
}
std::string describe_outside(uintptr_t address);  // how far beyond which range
bool owns_memory();                               // the calling thread declared some
void drop_memory();                               // after a failure
// Checks and marks a write by the host, such as cudaMemsetAsync.
void note_host_write(const void* address, size_t num_bytes);

}  // namespace topgather::emulation
