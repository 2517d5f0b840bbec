// Barriers, shuffles and votes.
#include "rendezvous.h"
#include "shadow.h"

namespace topgather::emulation {

const char* name_of_operation(int operation) {
  switch (operation & kOperationMask) {
    case kShuffle: return "a shuffle";
    case kBallot: return "a vote";
    case kSyncWarp: return "__syncwarp";
    case kMatrixLoad: return "load_matrix_x4";
    case kMatrixProduct: return "multiply_accumulate";
    default: return "__syncthreads";
  }
}

void fail_divergent(const Meeting& meeting, const char* mine, bool masks_differ, const void* caller) {
  std::string message = "DIVERGENT warp: lane " + std::to_string(state.current->lane) + " is in " + mine;
  message += std::string(" while others wait in ") + name_of_operation(meeting.operation);
  if (masks_differ) message += " with another mask";
  const unsigned other = std::countr_zero(meeting.arrived);
  message += source_place(state.fibers[state.current->warp->index * kLanes + other].waiting_at) + ";";
  fail(message, caller);
}

// --- warps ----------------------------------------------------------------------------------------------------------

namespace {

struct ShuffleOperand {
  uint32_t input;
  int source;
  uint32_t output;
};

struct BallotOperand {
  bool predicate;
  uint32_t votes;
};

int source_lane(ShuffleKind kind, int lane, int operand, int width) {
  const int segment = lane & ~(width - 1);
  int source = lane;
  switch (kind) {
    case ShuffleKind::kIndex: return segment + (operand & (width - 1));
    case ShuffleKind::kUp: source = lane - operand; break;
    case ShuffleKind::kDown: source = lane + operand; break;
    case ShuffleKind::kXor: source = lane ^ operand; return source >= segment + width ? lane : source;
  }
  return source < segment || source >= segment + width ? lane : source;
}

}  // namespace

uint32_t shuffle(ShuffleKind kind, uint32_t mask, uint32_t value, int operand, int width) {
  ShuffleOperand self{value, source_lane(kind, state.current->lane, operand, width), 0};
  rendezvous(mask, kShuffle | static_cast<int>(kind) << kOperationBits, &self, __builtin_return_address(0),
             [](void** operands, uint32_t lanes) {
               ++statistics.shuffles;
               for (uint32_t left = lanes; left != 0; left &= left - 1) {
                 auto* lane = static_cast<ShuffleOperand*>(operands[std::countr_zero(left)]);
                 // From a lane that takes no part, a device hands out anything: here, NaN.
                 const bool is_present = (lanes >> lane->source & 1) != 0;
                 lane->output = is_present ? static_cast<ShuffleOperand*>(operands[lane->source])->input : kAllLanes;
               }
             });
  return self.output;
}

uint32_t ballot(uint32_t mask, bool predicate) {
  BallotOperand self{predicate, 0};
  rendezvous(mask, kBallot, &self, __builtin_return_address(0), [](void** operands, uint32_t lanes) {
    ++statistics.ballots;
    uint32_t votes = 0;
    for (uint32_t left = lanes; left != 0; left &= left - 1) {
      const int lane = std::countr_zero(left);
      votes |= static_cast<uint32_t>(static_cast<BallotOperand*>(operands[lane])->predicate) << lane;
    }
    for (uint32_t left = lanes; left != 0; left &= left - 1) {
      static_cast<BallotOperand*>(operands[std::countr_zero(left)])->votes = votes;
    }
  });
  return self.votes;
}

void sync_warp(uint32_t mask) {
  rendezvous(mask, kSyncWarp, nullptr, __builtin_return_address(0), [](void**, uint32_t lanes) {
    ++statistics.warp_barriers;
    order_lanes(*state.current->warp, lanes);
  });
}

// --- blocks ---------------------------------------------------------------------------------------------------------
// A warp arrives as a whole, as the hardware's aligned barrier has it: its lanes meet, then count together. Threads
// that have exited are not waited for, but a warp may not lose some of its lanes before a barrier.

namespace {

void release_barrier() {
  ++statistics.block_barriers;
  state.barrier_result = state.barrier_predicate;
  state.barrier_predicate = false;
  state.num_at_barrier = 0;
  order_block();
  for (uint32_t left = state.warps_at_barrier; left != 0; left &= left - 1) {
    make_runnable(state.warps[std::countr_zero(left)], kAllLanes);
  }
  state.warps_at_barrier = 0;
}

}  // namespace

bool sync_threads(bool predicate) {
  const void* caller = __builtin_return_address(0);
  Warp& warp = *state.current->warp;
  if (warp.alive != warp.full) fail("DIVERGENT warp: __syncthreads after some of its lanes have exited", caller);
  state.barrier_predicate |= predicate;
  if (arrive(warp, warp.alive, kBlockBarrier, nullptr, caller) != nullptr) {
    state.num_at_barrier += static_cast<unsigned>(std::popcount(warp.alive));
    state.warps_at_barrier |= 1u << warp.index;
    if (state.num_at_barrier == state.num_alive) {
      release_barrier();
      const bool result = state.barrier_result;
      yield_if_random();
      return result;
    }
  }
  block_current("__syncthreads", caller);
  return state.barrier_result;
}

void leave_barriers_of_exited_thread() {
  const Fiber& self = *state.current;
  for (uint32_t left = self.warp->open_meetings; left != 0; left &= left - 1) {
    const Meeting& meeting = self.warp->meetings[std::countr_zero(left)];
    if ((meeting.mask >> self.lane & 1) != 0) fail_divergent(meeting, "its exit", false, nullptr);
  }
  // Those who wait for everyone alive need not wait for this thread.
  if (state.num_at_barrier != 0 && state.num_at_barrier == state.num_alive - 1) release_barrier();
}

}  // namespace topgather::emulation
