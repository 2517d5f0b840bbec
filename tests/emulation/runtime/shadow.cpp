// The checks of the checked build, after FastTrack (Flanagan and Freund, 2009) with barriers as the only way to
// synchronise: a shadow cell holds the last write and the last reads as moments, and an access conflicts with what is
// not ordered before it. Also the functions that -fsanitize=thread calls; libtsan is not linked.
#include "shadow.h"

#include <algorithm>
#include <cstring>
#if defined(__linux__)
#include <link.h>
#endif

namespace topgather::emulation {

Clock moments;

// --- time -----------------------------------------------------------------------------------------------------------

void start_moments_of_launch() { moments.launch_first = ++moments.now; }

void start_moments_of_block() { moments.block_first = moments.interval_first = ++moments.now; }

void order_block() {
  moments.interval_first = ++moments.now;
  for (unsigned w = 0; w < state.num_warps; ++w) state.warps[w].moment = moments.now;
}

void order_lanes(Warp& warp, uint32_t lanes) {
  if constexpr (!kIsChecked) return;
  warp.moment = ++moments.now;
  uint32_t (*known)[kLanes] = moments.known + warp.index * kLanes;
  uint32_t joined[kLanes] = {};
  for (uint32_t left = lanes; left != 0; left &= left - 1) {
    const uint32_t* own = known[std::countr_zero(left)];
    for (unsigned lane = 0; lane < kLanes; ++lane) joined[lane] = std::max(joined[lane], own[lane]);
  }
  for (uint32_t left = lanes; left != 0; left &= left - 1) joined[std::countr_zero(left)] = moments.now;
  for (uint32_t left = lanes; left != 0; left &= left - 1) {
    std::memcpy(known[std::countr_zero(left)], joined, sizeof joined);
  }
}

// --- one cell -------------------------------------------------------------------------------------------------------

namespace {

enum Flag : uint8_t {
  kAtomic = 1,                   // the last write was atomic
  kInFlight = 2,                 // the last write is an asynchronous copy not yet waited for
  kAtomicsFromOtherLanes = 4,    // and so were others of the warp since its last barrier,
  kAtomicsFromOtherWarps = 8,    // of other warps in the interval,
  kAtomicsFromOtherBlocks = 16,  // of other blocks in the launch
  kReadByOtherWarps = 32,        // in the interval
  kReadByOtherBlocks = 64        // in the launch
};

// A cell is put together in registers and written in two halves: reading it back right after six small stores would
// stall.
struct CellBits {
  uint64_t low, high;
};

inline ShadowCell make_cell(uint32_t write_moment, uint32_t read_moment, uint32_t read_lanes, uint32_t writer,
                            uint32_t read_warp, uint32_t flags) {
  static_assert(std::endian::native == std::endian::little);
  return std::bit_cast<ShadowCell>(CellBits{write_moment | uint64_t{read_moment} << 32,
                                            read_lanes | uint64_t{writer | read_warp << 16 | flags << 24} << 32});
}

inline uint64_t difference(const ShadowCell& a, const ShadowCell& b) {
  const auto x = std::bit_cast<CellBits>(a), y = std::bit_cast<CellBits>(b);
  return (x.low ^ y.low) | (x.high ^ y.high);
}

struct Place {  // for messages only
  uintptr_t address;
  bool is_shared;
  const void* caller;
};

std::string describe(const Place& place) {
  if (place.is_shared) {
    return "shared memory at byte " + std::to_string(place.address - reinterpret_cast<uintptr_t>(state.shared));
  }
  return "global memory" + describe_outside(place.address);
}

[[noreturn]] __attribute__((noinline)) void fail_race(const char* kind, const Place& place, const char* other) {
  fail(std::string("RACE: ") + kind + " by " + other + " on " + describe(place), place.caller);
}

[[noreturn]] __attribute__((noinline)) void fail_race(const char* kind, const Place& place, unsigned thread) {
  fail_race(kind, place, ("thread " + std::to_string(thread)).c_str());
}

[[noreturn]] __attribute__((noinline)) void fail_uninitialized(const Place& place) {
  fail("UNINITIALIZED read of " + describe(place), place.caller);
}

[[noreturn]] __attribute__((noinline)) void fail_in_flight(bool is_read, const Place& place) {
  fail(std::string(is_read ? "READ of" : "WRITE to") + " the destination of an asynchronous copy before its wait, " +
           describe(place),
       place.caller);
}

const char* const kOtherBlock = "another block";
const char* const kSeveralWarps = "several warps";
const char* const kSeveralLanes = "several lanes";

struct Accessor {
  unsigned thread, warp, lane;
  uint32_t moment;
  const uint32_t* known;
  uint32_t floor;  // accesses before this moment do not count: another block's shared memory, another launch
};

bool is_ordered(const Accessor& self, unsigned other, uint32_t moment) {
  if (other == self.thread || moment < moments.interval_first) return true;
  return other / kLanes == self.warp && self.known[other % kLanes] > moment;
}

// An access that must come after the last write, and after every atomic merged into it.
void require_after_write(const ShadowCell& cell, const Accessor& self, const char* kind, const Place& place) {
  if (cell.write_moment < self.floor) return;
  if (cell.write_moment < moments.block_first || (cell.flags & kAtomicsFromOtherBlocks) != 0) {
    fail_race(kind, place, kOtherBlock);
  }
  if (!is_ordered(self, cell.writer, cell.write_moment)) fail_race(kind, place, unsigned{cell.writer});
  if (cell.write_moment < moments.interval_first) return;
  if ((cell.flags & kAtomicsFromOtherWarps) != 0) fail_race(kind, place, kSeveralWarps);
  if ((cell.flags & kAtomicsFromOtherLanes) != 0 && self.known[self.lane] <= cell.write_moment) {
    fail_race(kind, place, kSeveralLanes);
  }
}

void require_after_reads(const ShadowCell& cell, const Accessor& self, const Place& place) {
  if (cell.read_moment < self.floor) return;
  const char* kind = "write after read";
  if (cell.read_moment < moments.block_first || (cell.flags & kReadByOtherBlocks) != 0) {
    fail_race(kind, place, kOtherBlock);
  }
  if (cell.read_moment < moments.interval_first) return;
  if ((cell.flags & kReadByOtherWarps) != 0) fail_race(kind, place, kSeveralWarps);
  for (uint32_t left = cell.read_lanes; left != 0; left &= left - 1) {
    const unsigned reader = cell.read_warp * kLanes + static_cast<unsigned>(std::countr_zero(left));
    if (!is_ordered(self, reader, cell.read_moment)) fail_race(kind, place, reader);
  }
}

ShadowCell after_read(const ShadowCell& cell, const Accessor& self) {
  uint32_t lanes = 1u << self.lane;
  uint32_t flags = cell.flags;
  if (cell.read_moment < moments.block_first) {
    flags &= ~uint32_t{kReadByOtherWarps | kReadByOtherBlocks};
    if (cell.read_moment >= self.floor) flags |= kReadByOtherBlocks;
  } else if (cell.read_moment < moments.interval_first) {
    flags &= ~uint32_t{kReadByOtherWarps};
  } else if (cell.read_warp != self.warp) {
    flags |= kReadByOtherWarps;
  } else if (cell.read_moment == self.moment) {
    lanes |= cell.read_lanes;
  } else {
    for (uint32_t left = cell.read_lanes; left != 0; left &= left - 1) {
      const auto lane = static_cast<unsigned>(std::countr_zero(left));
      if (self.known[lane] <= cell.read_moment) lanes |= 1u << lane;  // not ordered before this read: still counts
    }
  }
  return make_cell(cell.write_moment, self.moment, lanes, cell.writer, self.warp, flags);
}

uint32_t flags_after_atomic(const ShadowCell& cell, const Accessor& self) {
  if ((cell.flags & kAtomic) == 0 || cell.write_moment < self.floor) return kAtomic;
  uint32_t flags = kAtomic | (cell.flags & kAtomicsFromOtherBlocks);
  if (cell.write_moment < moments.block_first) return flags | kAtomicsFromOtherBlocks;
  if (cell.write_moment < moments.interval_first) return flags;
  flags |= cell.flags & kAtomicsFromOtherWarps;
  if (cell.writer / kLanes != self.warp) return flags | kAtomicsFromOtherWarps;
  if (cell.write_moment == self.moment) flags |= cell.flags & kAtomicsFromOtherLanes;
  if (!is_ordered(self, cell.writer, cell.write_moment)) flags |= kAtomicsFromOtherLanes;
  return flags;
}

// `count` cells in the same state. `written_from`: a write at or after this moment counts as initialisation; 0 where
// all is.
template <Access kAccess>
__attribute__((noinline)) void check_equal_cells(ShadowCell* cells, size_t count, const Accessor& self,
                                                 uint32_t written_from, const Place& place) {
  constexpr bool kReads = kAccess == Access::kRead || kAccess == Access::kAtomic;
  const ShadowCell cell = cells[0];
  ShadowCell next;
  if (kReads && cell.write_moment < written_from && options.check_uninitialized) fail_uninitialized(place);
  if (kAccess != Access::kCopyLanding && (cell.flags & kInFlight) != 0 && cell.write_moment >= self.floor) {
    fail_in_flight(kAccess == Access::kRead, place);
  }
  if constexpr (kAccess == Access::kCopyLanding) {
    next = make_cell(self.moment, cell.read_moment, cell.read_lanes, self.thread, cell.read_warp,
                     cell.flags & ~uint32_t{kInFlight});
  } else if constexpr (kAccess == Access::kRead) {
    if (options.check_races) require_after_write(cell, self, "read after write", place);
    next = after_read(cell, self);
  } else {
    const bool is_atomic_on_atomic = kAccess == Access::kAtomic && (cell.flags & kAtomic) != 0;
    if (options.check_races) {
      if (!is_atomic_on_atomic) require_after_write(cell, self, "write after write", place);
      require_after_reads(cell, self, place);
    }
    uint32_t flags = 0;
    if constexpr (kAccess == Access::kAtomic) flags = flags_after_atomic(cell, self);
    if constexpr (kAccess == Access::kCopyIssue) flags = kInFlight;
    next = make_cell(self.moment, 0, 0, self.thread, 0, flags);
  }
  for (size_t i = 0; i < count; ++i) cells[i] = next;
}

// What the accessor itself did in this moment, with nobody's access in between, needs no second look: whatever
// conflicts with this access conflicts with the recorded one.
template <Access kAccess>
inline bool is_repetition(const ShadowCell& cell, const Accessor& self) {
  if constexpr (kAccess != Access::kRead && kAccess != Access::kWrite) return false;
  const bool has_written = cell.write_moment == self.moment && cell.writer == self.thread && cell.flags == 0;
  if constexpr (kAccess == Access::kWrite) return has_written && cell.read_moment == 0;
  const bool has_read = cell.read_moment == self.moment && cell.read_warp == self.warp;
  return has_written || (has_read && (cell.read_lanes >> self.lane & 1) != 0);
}

// Most accesses find all their cells in one state and leave them so: one check then serves all.
template <Access kAccess>
__attribute__((always_inline)) inline void check_cells(ShadowCell* cells, size_t count, const Accessor& self,
                                                       uint32_t written_from, const Place& place) {
  uint64_t differences = 0;
  for (size_t i = 1; i < count; ++i) differences |= difference(cells[i], cells[0]);
  if (differences != 0) {
    for (size_t i = 0; i < count; ++i) {
      if (!is_repetition<kAccess>(cells[i], self)) {
        check_equal_cells<kAccess>(cells + i, 1, self, written_from, place);
      }
    }
    return;
  }
  if (is_repetition<kAccess>(cells[0], self)) return;
  check_equal_cells<kAccess>(cells, count, self, written_from, place);
}

inline size_t count_cells(uintptr_t address, size_t num_bytes) {
  return (address % kCellBytes + num_bytes + kCellBytes - 1) / kCellBytes;
}

// --- where an address lies ------------------------------------------------------------------------------------------

// The segments of the module this code is part of: constants that kernels read.
struct Segments {
  std::vector<std::pair<uintptr_t, uintptr_t>> ranges;

  Segments() {
#if defined(__linux__)
    dl_iterate_phdr(
        [](dl_phdr_info* module, size_t, void* self) {
          std::vector<std::pair<uintptr_t, uintptr_t>> found;
          bool is_ours = false;
          for (int i = 0; i < module->dlpi_phnum; ++i) {
            if (module->dlpi_phdr[i].p_type != PT_LOAD) continue;
            const uintptr_t begin = module->dlpi_addr + module->dlpi_phdr[i].p_vaddr;
            found.emplace_back(begin, begin + module->dlpi_phdr[i].p_memsz);
            const auto here = reinterpret_cast<uintptr_t>(&moments);
            is_ours |= here >= found.back().first && here < found.back().second;
          }
          if (is_ours) static_cast<Segments*>(self)->ranges = found;
          return static_cast<int>(is_ours);
        },
        this);
#endif
  }

  bool contain(uintptr_t address, size_t num_bytes) const {
    for (const auto& [begin, end] : ranges) {
      if (address >= begin && address + num_bytes <= end) return true;
    }
    return false;
  }
};

[[noreturn]] __attribute__((noinline)) void fail_outside(uintptr_t address, size_t num_bytes, Access access,
                                                         const void* caller) {
  const char* name = access == Access::kRead ? "read" : access == Access::kAtomic ? "atomic" : "write";
  fail("OUT OF BOUNDS global access, a " + std::string(name) + " of " + std::to_string(num_bytes) + " bytes" +
           describe_outside(address),
       caller);
}

__attribute__((noinline)) void check_undeclared(uintptr_t address, size_t num_bytes, Access access,
                                                const void* caller) {
  static const Segments segments;
  if (access == Access::kRead && segments.contain(address, num_bytes)) return;
  fail_outside(address, num_bytes, access, caller);
}

// Out of line, to keep strings out of the hooks.
[[noreturn]] __attribute__((noinline)) void fail_outside_shared(uintptr_t offset, const char* operation,
                                                                const void* caller) {
  fail("OUT OF BOUNDS shared access" + std::string(operation) + " at byte " +
           std::to_string(static_cast<intptr_t>(offset)) + " of " + std::to_string(state.shared_bytes),
       caller);
}

[[noreturn]] __attribute__((noinline)) void fail_input(uintptr_t address, const void* caller) {
  fail("WRITE TO AN INPUT" + describe_outside(address), caller);
}

template <Access kAccess>
__attribute__((always_inline)) inline void check(uintptr_t address, size_t num_bytes, const void* caller) {
  if (!in_kernel()) return;
  const uintptr_t offset = address - arena.begin;
  const bool is_shared = offset < arena.shared_end;
  if (offset < arena.size && !is_shared) return;  // private to the thread
  ++statistics.checked_accesses;
  const Fiber& fiber = *state.current;
  Accessor self{fiber.thread, fiber.warp->index, fiber.lane, fiber.warp->moment, moments.known[fiber.thread], 0};
  const Place place{address, is_shared, caller};
  if (is_shared) {
    const uintptr_t begin = reinterpret_cast<uintptr_t>(state.shared);
    if (address < begin || address + num_bytes > begin + state.shared_bytes) {
      fail_outside_shared(address - begin, "", caller);
    }
    self.floor = moments.block_first;
    check_cells<kAccess>(shadow + (address - begin) / kCellBytes, count_cells(address, num_bytes), self,
                         moments.block_first, place);
    return;
  }
  const DeclaredRange* range = find_range(address, num_bytes);
  if (range == nullptr) return check_undeclared(address, num_bytes, kAccess, caller);
  if (!range->is_writable) {
    if constexpr (kAccess == Access::kRead) return;  // nobody can have written it
    fail_input(address, caller);
  }
  self.floor = moments.launch_first;
  check_cells<kAccess>(range->cell_of(address), count_cells(address, num_bytes), self,
                       range->is_initialized ? 0 : range->first_moment, place);
}

}  // namespace

void check_access(uintptr_t address, size_t num_bytes, Access access, const void* caller) {
  switch (access) {
    case Access::kRead: return check<Access::kRead>(address, num_bytes, caller);
    case Access::kWrite: return check<Access::kWrite>(address, num_bytes, caller);
    case Access::kAtomic: return check<Access::kAtomic>(address, num_bytes, caller);
    case Access::kCopyIssue: return check<Access::kCopyIssue>(address, num_bytes, caller);
    case Access::kCopyLanding: return check<Access::kCopyLanding>(address, num_bytes, caller);
  }
}

void require_shared(const void* address, size_t num_bytes, const char* operation, const void* caller) {
  const uintptr_t offset = reinterpret_cast<uintptr_t>(address) - reinterpret_cast<uintptr_t>(state.shared);
  if (offset + num_bytes > state.shared_bytes || offset > state.shared_bytes) {
    fail_outside_shared(offset, (" by " + std::string(operation)).c_str(), caller);
  }
  if (offset % num_bytes != 0) fail(std::string("MISALIGNED shared address: ") + operation, caller);
}

void require_global(const void* address, size_t, const char* operation, const void* caller) {
  if (reinterpret_cast<uintptr_t>(address) - arena.begin >= arena.size) return;
  fail(std::string(operation) + " needs a global address, this one is shared or private", caller);
}

}  // namespace topgather::emulation

// --- what -fsanitize=thread and alignment call ----------------------------------------------------------------------

#if defined(TOPGATHER_EMULATION_CHECKED)

extern "C" {
#define TOPGATHER_HOOKS(bytes)                                                                       \
  void __tsan_read##bytes(void* address) {                                                           \
    using namespace topgather::emulation;                                                            \
    check<Access::kRead>(reinterpret_cast<uintptr_t>(address), bytes, __builtin_return_address(0));  \
  }                                                                                                  \
  void __tsan_write##bytes(void* address) {                                                          \
    using namespace topgather::emulation;                                                            \
    check<Access::kWrite>(reinterpret_cast<uintptr_t>(address), bytes, __builtin_return_address(0)); \
  }                                                                                                  \
  void __tsan_unaligned_read##bytes(void* address) {                                                 \
    using namespace topgather::emulation;                                                            \
    check<Access::kRead>(reinterpret_cast<uintptr_t>(address), bytes, __builtin_return_address(0));  \
  }                                                                                                  \
  void __tsan_unaligned_write##bytes(void* address) {                                                \
    using namespace topgather::emulation;                                                            \
    check<Access::kWrite>(reinterpret_cast<uintptr_t>(address), bytes, __builtin_return_address(0)); \
  }
TOPGATHER_HOOKS(1)
TOPGATHER_HOOKS(2)
TOPGATHER_HOOKS(4)
TOPGATHER_HOOKS(8)
TOPGATHER_HOOKS(16)
#undef TOPGATHER_HOOKS

void __tsan_read_range(void* address, size_t num_bytes) {
  using namespace topgather::emulation;
  check<Access::kRead>(reinterpret_cast<uintptr_t>(address), num_bytes, __builtin_return_address(0));
}
void __tsan_write_range(void* address, size_t num_bytes) {
  using namespace topgather::emulation;
  check<Access::kWrite>(reinterpret_cast<uintptr_t>(address), num_bytes, __builtin_return_address(0));
}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}

// What -fsanitize=alignment calls for a pointer that is not aligned as its type demands: a fault on a device.
void __ubsan_handle_type_mismatch_v1(void*, uintptr_t address) {
  topgather::emulation::fail("MISALIGNED pointer, " + std::to_string(address % 16) + " bytes beyond a multiple of 16",
                             __builtin_return_address(0));
}
}

#endif
