// Declared memory: which addresses the kernels of an entry point may touch.
//
// Overlapping declarations merge, so views of one tensor may be declared one by one. What only overlaps inputs is an
// input. Where outputs and inputs overlap, the merged range is writable and the inputs' bytes count as written.
#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <mutex>
#include <new>
#include <thread>

#include "launch_lock.h"
#include "shadow.h"

namespace topgather::emulation {

ShadowCell* shadow = nullptr;
std::vector<DeclaredRange> ranges;
const DeclaredRange* last_range = nullptr;

namespace {

struct Declaration {
  uintptr_t begin, end;
  MemoryKind kind;
};

std::vector<Declaration> declarations;
bool is_sealed = false;

bool is_given(MemoryKind kind) { return kind == MemoryKind::kInput || kind == MemoryKind::kInOut; }

// --- shadow memory: reserved once, used from the start by every entry point's ranges --------------------------------

constexpr size_t kReservedCells = (size_t{4} << 30) / sizeof(ShadowCell);  // for 512 MB of declared memory
size_t num_used_cells = 0;

ShadowCell* take_cells(size_t num_bytes) {
  if constexpr (!kIsChecked) return nullptr;
  const size_t count = num_bytes / kCellBytes + 2;
  if (num_used_cells + count > kReservedCells) throw Error("more memory declared than the checked emulation can watch");
  ShadowCell* cells = shadow + num_used_cells;
  num_used_cells += count;
  return cells;
}

void reserve_shadow() {
  if (!kIsChecked || shadow != nullptr) return;
  void* memory = mmap(nullptr, kReservedCells * sizeof(ShadowCell), PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  shadow = static_cast<ShadowCell*>(memory);
  num_used_cells = kMaxSharedBytes / kCellBytes;  // the first belong to shared memory
}

void clear() {
  // Keeps what small problems use; a cell given back reads as never accessed.
  constexpr size_t kKeptCells = (size_t{128} << 20) / sizeof(ShadowCell);
  if (num_used_cells > kKeptCells) {
    madvise(shadow + kKeptCells, (num_used_cells - kKeptCells) * sizeof(ShadowCell), MADV_DONTNEED);
  }
  declarations.clear();
  ranges.clear();
  last_range = nullptr;
  is_sealed = false;
  num_used_cells = kMaxSharedBytes / kCellBytes;
}

void mark_written(const DeclaredRange& range, uintptr_t begin, uintptr_t end) {
  if (range.cells == nullptr || begin >= end) return;
  for (ShadowCell* cell = range.cell_of(begin); cell <= range.cell_of(end - 1); ++cell) {
    *cell = {range.first_moment, 0, 0, 0, 0, 0};
  }
}

// Fills [begin, end) but for the bytes that some input covers. `given` is sorted.
void poison(uintptr_t begin, uintptr_t end, const std::vector<Declaration>& given) {
  for (const Declaration& input : given) {
    if (input.end <= begin || input.begin >= end) continue;
    if (input.begin > begin) std::memset(reinterpret_cast<void*>(begin), 0xff, input.begin - begin);
    begin = std::max(begin, input.end);
    if (begin >= end) return;
  }
  std::memset(reinterpret_cast<void*>(begin), 0xff, end - begin);
}

}  // namespace

// --- the lock: one entry point, or one launch outside any, at a time ------------------------------------------------

namespace {
std::recursive_mutex launch_mutex;
thread_local bool is_owner = false;  // holds the mutex for the memory it declared
}  // namespace

LaunchLock::LaunchLock() { launch_mutex.lock(); }
LaunchLock::~LaunchLock() { launch_mutex.unlock(); }

bool owns_memory() { return is_owner; }

void declare_memory(const void* address, size_t num_bytes, MemoryKind kind) {
  if (!is_owner) {
    launch_mutex.lock();
    is_owner = true;
    clear();
  }
  if (is_sealed) throw Error("memory is declared before the entry point's first launch, not after it");
  if (num_bytes == 0) return;
  const auto begin = reinterpret_cast<uintptr_t>(address);
  declarations.push_back({begin, begin + num_bytes, kind});
}

void forget_memory() {
  if (!is_owner) return;
  clear();
  is_owner = false;
  launch_mutex.unlock();
}

void drop_memory() { forget_memory(); }

// --- ranges ---------------------------------------------------------------------------------------------------------

void seal_memory() {
  if (is_sealed) return;
  is_sealed = true;
  reserve_shadow();
  const auto by_begin = [](const Declaration& a, const Declaration& b) { return a.begin < b.begin; };
  std::sort(declarations.begin(), declarations.end(), by_begin);
  std::vector<Declaration> given;
  for (const Declaration& declared : declarations) {
    if (is_given(declared.kind)) given.push_back(declared);
  }
  if (options.poison) {
    for (const Declaration& declared : declarations) {
      if (!is_given(declared.kind)) poison(declared.begin, declared.end, given);
    }
  }
  const uint32_t first_moment = ++moments.now;
  for (const Declaration& declared : declarations) {
    const bool is_writable = declared.kind != MemoryKind::kInput;
    DeclaredRange* last = ranges.empty() ? nullptr : &ranges.back();
    const bool overlaps = last != nullptr && declared.begin < last->end;
    const bool continues = last != nullptr && declared.begin == last->end && last->is_writable == is_writable &&
                           last->is_initialized == is_given(declared.kind);
    if (overlaps || continues) {
      last->end = std::max(last->end, declared.end);
      last->is_writable |= is_writable;
      last->is_initialized &= is_given(declared.kind);
    } else {
      ranges.push_back({declared.begin, declared.end, is_writable, is_given(declared.kind), first_moment, nullptr});
    }
  }
  for (DeclaredRange& range : ranges) {
    if (!range.is_writable) continue;  // its reads need no watching
    range.cells = take_cells(range.end - range.begin);
    if (range.is_initialized) continue;
    for (const Declaration& input : given) {
      mark_written(range, std::max(range.begin, input.begin), std::min(range.end, input.end));
    }
  }
}

const DeclaredRange* search_range(uintptr_t address, size_t num_bytes) {
  size_t low = 0, high = ranges.size();  // the last range that begins at or before the address
  while (low < high) {
    const size_t middle = (low + high) / 2;
    if (ranges[middle].begin <= address) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  if (low == 0 || address + num_bytes > ranges[low - 1].end) return nullptr;
  last_range = &ranges[low - 1];
  return last_range;
}

std::string describe_outside(uintptr_t address) {
  const DeclaredRange* nearest = nullptr;
  uintptr_t distance = UINTPTR_MAX;
  for (const DeclaredRange& range : ranges) {
    const uintptr_t gap = address < range.begin ? range.begin - address : address < range.end ? 0 : address - range.end;
    if (gap < distance) {
      distance = gap;
      nearest = &range;
    }
  }
  if (nearest == nullptr) return ": no memory is declared";
  const std::string size = " of " + std::to_string(nearest->end - nearest->begin) + " declared bytes";
  if (address < nearest->begin) return ": " + std::to_string(distance) + " bytes before a range" + size;
  return ": at byte " + std::to_string(address - nearest->begin) + size;
}

void note_host_write(const void* address, size_t num_bytes) {
  if (!is_owner || num_bytes == 0) return;
  seal_memory();
  const auto begin = reinterpret_cast<uintptr_t>(address);
  const DeclaredRange* range = find_range(begin, num_bytes);
  if (range == nullptr) throw Error("OUT OF BOUNDS host write" + describe_outside(begin + num_bytes - 1));
  if (!range->is_writable) throw Error("host WRITE TO AN INPUT" + describe_outside(begin));
  mark_written(*range, begin, begin + num_bytes);
}

}  // namespace topgather::emulation
