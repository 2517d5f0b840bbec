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

// The open meeting of these lanes for this operation, or a fresh one. Fails where the current lane and another wait for
// each other: the other in a different meeting that this lane belongs to, and it to the one sought.
inline Meeting& find_meeting(Warp& warp, uint32_t mask, int operation, const void* caller) {
  const unsigned lane = state.current->lane;
  Meeting* found = nullptr;
  for (uint32_t left = warp.open_meetings; left != 0; left &= left - 1) {
    Meeting& meeting = warp.meetings[std::countr_zero(left)];
    if (meeting.mask == mask && meeting.operation == operation) {
      found = &meeting;
    } else if ((meeting.mask >> lane & 1) != 0 && (meeting.arrived & mask) != 0) {
      fail_divergent(meeting, name_of_operation(operation), meeting.mask != mask, caller);
    }
  }
  if (found != nullptr) return *found;
  const int free_slot = std::countr_one(warp.open_meetings);
  warp.open_meetings |= 1u << free_slot;
  Meeting& meeting = warp.meetings[free_slot];
  meeting.mask = mask;
  meeting.operation = operation;
  meeting.arrived = 0;
  return meeting;
}

// Lets the current lane join. The meeting for the lane that completes it, null for the others.
inline Meeting* arrive(Warp& warp, uint32_t mask, int operation, void* operand, const void* caller) {
  const unsigned lane = state.current->lane;
  Meeting& meeting = find_meeting(warp, mask, operation, caller);
  meeting.operands[lane] = operand;
  meeting.arrived |= 1u << lane;
  if (meeting.arrived != mask) return nullptr;
  warp.open_meetings &= ~(1u << (&meeting - warp.meetings));
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
