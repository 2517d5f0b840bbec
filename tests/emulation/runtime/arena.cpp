// One reservation of address space for everything that belongs to threads, so that a hook tells private, shared and
// global addresses apart with two comparisons:
//   guard | shared memory | guard | arguments | guard, stack 0 | guard, stack 1 | ...
// Stacks cost memory only where they are touched.
#include <sys/mman.h>

#include <new>

#include "state.h"

namespace topgather::emulation {

Arena arena;

namespace {

constexpr size_t kStackBytes = 256 * 1024;
constexpr size_t kSharedOffset = kPage;
constexpr size_t kArgumentOffset = kSharedOffset + kMaxSharedBytes + kPage;
constexpr size_t kStackOffset = kArgumentOffset + kMaxArgumentBytes;
constexpr size_t kStackStride = kPage + kStackBytes;
constexpr size_t kArenaBytes = kStackOffset + kMaxThreads * kStackStride;

unsigned char* at(size_t offset) { return reinterpret_cast<unsigned char*>(arena.begin + offset); }

void make_accessible(unsigned char* begin, size_t num_bytes) {
  if (num_bytes > 0 && mprotect(begin, num_bytes, PROT_READ | PROT_WRITE) != 0) throw std::bad_alloc();
}

}  // namespace

void create_arena() {
  if (arena.begin != 0) return;
  void* memory = mmap(nullptr, kArenaBytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  arena = {reinterpret_cast<uintptr_t>(memory), kArenaBytes, kSharedOffset + kMaxSharedBytes + kPage};
  make_accessible(at(kArgumentOffset), kMaxArgumentBytes);
  for (unsigned thread = 0; thread < kMaxThreads; ++thread) make_accessible(stack_bottom(thread), kStackBytes);
  state.shared = at(kSharedOffset);
}

void resize_shared_memory(size_t num_bytes) {
  if (num_bytes != state.shared_bytes) {
    mprotect(state.shared, kMaxSharedBytes, PROT_NONE);
    make_accessible(state.shared, (num_bytes + kPage - 1) / kPage * kPage);
  }
  state.shared_bytes = num_bytes;
}

unsigned char* shared_memory() { return state.shared; }
unsigned char* argument_copy() { return at(kArgumentOffset); }
unsigned char* stack_bottom(unsigned thread) { return at(kStackOffset + thread * kStackStride + kPage); }
unsigned char* stack_top(unsigned thread) { return at(kStackOffset + (thread + 1) * kStackStride); }

}  // namespace topgather::emulation
