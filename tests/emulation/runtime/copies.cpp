// Asynchronous copies and atomics.
#include <cmath>
#include <cstring>

#include "shadow.h"
#include "state.h"

namespace topgather::emulation {

// --- asynchronous copies --------------------------------------------------------------------------------------------

namespace {

void land(PendingCopy& copy) {
  if (!copy.has_landed) std::memcpy(copy.destination, copy.data, copy.num_bytes);
  copy.has_landed = true;
}

bool lands_at_issue() {
  return options.landing == Landing::kAtIssue || (options.landing == Landing::kMixed && random_below(2) != 0);
}

}  // namespace

void copy_async(void* shared, const void* global, size_t num_bytes, bool is_copied) {
  const void* caller = __builtin_return_address(0);
  require_shared(shared, num_bytes, "copy_async", caller);
  Fiber& self = *state.current;
  PendingCopy copy{static_cast<unsigned char*>(shared), {}, num_bytes, caller, self.num_groups, false};
  if (is_copied) {
    if (reinterpret_cast<uintptr_t>(global) % num_bytes != 0) fail("copy_async: MISALIGNED global address", caller);
    require_global(global, num_bytes, "copy_async", caller);
    note_access(global, num_bytes, Access::kRead, caller);
    std::memcpy(copy.data, global, num_bytes);
  }
  note_access(shared, num_bytes, Access::kCopyIssue, caller);
  ++statistics.async_copies;
  // A pipeline never runs empty, so what has been waited for is dropped from time to time.
  constexpr size_t kMaxFinished = 64;
  if (self.first_copy >= kMaxFinished) {
    self.copies.erase(self.copies.begin(), self.copies.begin() + static_cast<std::ptrdiff_t>(self.first_copy));
    self.first_copy = 0;
  }
  if (lands_at_issue()) land(copy);
  self.copies.push_back(copy);
}

void copy_async_commit() { ++state.current->num_groups; }

void copy_async_wait(int num_pending) {
  Fiber& self = *state.current;
  while (self.first_copy < self.copies.size()) {
    PendingCopy& copy = self.copies[self.first_copy];
    if (copy.group + static_cast<uint32_t>(num_pending) >= self.num_groups) return;
    land(copy);
    note_access(copy.destination, copy.num_bytes, Access::kCopyLanding, copy.caller);
    ++self.first_copy;
  }
  self.copies.clear();
  self.first_copy = 0;
}

// --- atomics --------------------------------------------------------------------------------------------------------

namespace {

template <typename Value, typename Combine>
void combine_atomic(Value* address, int count, const void* caller, Combine combine) {
  const size_t num_bytes = sizeof(Value) * static_cast<size_t>(count);
  if (reinterpret_cast<uintptr_t>(address) % num_bytes != 0) fail("MISALIGNED atomic", caller);
  require_global(address, num_bytes, "an atomic", caller);
  note_access(address, num_bytes, Access::kAtomic, caller);
  ++statistics.atomics;
  for (int i = 0; i < count; ++i) address[i] = combine(address[i], i);
  // The order in which atomics arrive must not matter.
  if (options.order == Order::kRandom && random_below(8) == 0) yield_current();
}

}  // namespace

// As red.add.f32 does in global memory: subnormal operands and sums are zeros of their sign.
void add_atomic(float* address, const float* values, int count) {
  const auto flushed = [](float value) {
    return std::fpclassify(value) == FP_SUBNORMAL ? std::copysign(0.0f, value) : value;
  };
  combine_atomic(address, count, __builtin_return_address(0),
                 [&](float old, int i) { return flushed(flushed(old) + flushed(values[i])); });
}

void add_atomic(int32_t* address, int32_t value) {
  combine_atomic(address, 1, __builtin_return_address(0), [value](int32_t old, int) {
    return static_cast<int32_t>(static_cast<uint32_t>(old) + static_cast<uint32_t>(value));
  });
}

void max_atomic(uint32_t* address, uint32_t value) {
  combine_atomic(address, 1, __builtin_return_address(0),
                 [value](uint32_t old, int) { return old < value ? value : old; });
}

}  // namespace topgather::emulation
