// Warp-wide operations: lanes arrive one by one, the last one carries the operation out for all.
#pragma once

#include <utility>

#include "state.h"

namespace topgather::emulation {

enum Operation { kShuffle = 1, kBallot, kSyncWarp, kMatrixLoad, kMatrixProduct, kBlockBarrier };
constexpr int kOperationBits = 4;  // what is above them tells variants apart
constexpr int kOperationMask = (1 << kOperationBits) - 1;

const char* name_of_operation(int operation);
[[noreturn]] void fail_divergent(const Meeting& meeting, const char* mine, bool masks_differ, const void* caller);

// Lets the current lane join. The meeting for the lane that completes it, null for the others.
inline Meeting* arrive(Warp& warp, uint32_t mask, int operation, void* operand, const void* caller) {
  const unsigned lane = state.current->lane;
  const auto lowest = static_cast<unsigned>(std::countr_zero(mask));
  Meeting& meeting = warp.meetings[lowest];
  if (meeting.arrived == 0) {
    meeting.mask = mask;
    meeting.operation = operation;
    warp.open_meetings |= 1u << lowest;
  } else if (meeting.operation != operation || meeting.mask != mask) {
    fail_divergent(meeting, name_of_operation(operation), meeting.mask != mask, caller);
  }
  meeting.operands[lane] = operand;
  meeting.arrived |= 1u << lane;
  if (meeting.arrived != mask) return nullptr;
  meeting.arrived = 0;
  warp.open_meetings &= ~(1u << lowest);
  return &meeting;
}

// execute(operands, mask): operands[lane] is what the lane brought.
template <typename Execute>
inline void rendezvous(uint32_t mask, int operation, void* operand, const void* caller, Execute&& execute) {
  const Fiber& self = *state.current;
  Warp& warp = *self.warp;
  if ((mask >> self.lane & 1) == 0) fail("the calling lane is not in its own mask", caller);
  const bool needs_all = (operation & kOperationMask) == kMatrixLoad || (operation & kOperationMask) == kMatrixProduct;
  if ((mask & warp.full) != mask && (mask != kAllLanes || needs_all)) {
    fail("the mask names lanes that do not exist", caller);
  }
  mask &= warp.full;
  if ((mask & warp.alive) != mask) fail("DIVERGENT warp: the mask names lanes that have exited", caller);
  Meeting* meeting = arrive(warp, mask, operation, operand, caller);
  if (meeting == nullptr) {
    block_current(name_of_operation(operation), caller);
    return;
  }
  std::forward<Execute>(execute)(meeting->operands, mask);
  make_runnable(warp, mask);
  yield_if_random();
}

}  // namespace topgather::emulation
