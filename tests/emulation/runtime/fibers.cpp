// Threads as fibers: switching, scheduling, deadlocks.
#include <map>

#include "state.h"

namespace topgather::emulation {

Options options;
Statistics statistics;
State state;

uint3 current_thread_idx, current_block_idx;
dim3 current_block_dim, current_grid_dim;

// --- switching ------------------------------------------------------------------------------------------------------

#if !defined(TOPGATHER_EMULATION_UCONTEXT)
// Saves the callee-saved registers on the current stack and the stack pointer in *save, then continues at `load`. About
// 20 times as fast as swapcontext, which also asks the kernel for the signal mask.
extern "C" __attribute__((visibility("hidden"))) void topgather_emulation_switch(void** save, void* load);
asm(R"(
.text
.globl topgather_emulation_switch
.hidden topgather_emulation_switch
.type topgather_emulation_switch,@function
topgather_emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp,(%rdi)
  movq %rsi,%rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size topgather_emulation_switch,.-topgather_emulation_switch
)");
#endif

void switch_to(Fiber* fiber) {
  Fiber* from = state.current;
  if (fiber == from) return;
  state.current = fiber;
  current_thread_idx = fiber->thread_idx;
  ++statistics.switches;
#if defined(TOPGATHER_EMULATION_UCONTEXT)
  swapcontext(&from->context, &fiber->context);
#else
  topgather_emulation_switch(&from->stack_pointer, fiber->stack_pointer);
#endif
}

// --- scheduling -----------------------------------------------------------------------------------------------------

namespace {

// The next set bit after (ascending) or before (descending) `previous`, going round.
unsigned next_bit(uint32_t bits, unsigned previous) {
  switch (options.order) {
    case Order::kRandom: {
      const auto count = static_cast<unsigned>(std::popcount(bits));
      for (unsigned skipped = random_below(count); skipped > 0; --skipped) bits &= bits - 1;
      return std::countr_zero(bits);
    }
    case Order::kDescending: {
      const uint32_t below = bits & ((1u << previous) - 1);
      return 31 - std::countl_zero(below != 0 ? below : bits);
    }
    default: {
      const uint32_t above = previous >= 31 ? 0 : bits & ~((2u << previous) - 1);
      return std::countr_zero(above != 0 ? above : bits);
    }
  }
}

unsigned first_bit(uint32_t bits) { return next_bit(bits, options.order == Order::kDescending ? 0 : 31); }

Fiber* fiber_of(const Warp& warp, unsigned lane) { return &state.fibers[warp.index * kLanes + lane]; }

// Stays in the warp while it can, so that a warp's meeting fills before the next warp is touched. At random, it leaves
// one time in four.
Fiber* next_runnable() {
  const Warp& warp = *state.current->warp;
  if (warp.runnable != 0 && (options.order != Order::kRandom || random_below(4) != 0)) {
    return fiber_of(warp, next_bit(warp.runnable, state.current->lane));
  }
  if (state.runnable_warps == 0) return nullptr;
  const Warp& next = state.warps[next_bit(state.runnable_warps, warp.index)];
  return fiber_of(next, first_bit(next.runnable));
}

[[noreturn]] void report_deadlock() {
  std::map<std::string, std::vector<unsigned>> waiting;
  for (unsigned thread = 0; thread < state.num_threads; ++thread) {
    const Fiber& fiber = state.fibers[thread];
    if ((fiber.warp->alive >> fiber.lane & 1) == 0) continue;
    waiting[fiber.waiting_in + source_place(fiber.waiting_at)].push_back(thread);
  }
  std::string message = "DEADLOCK:";
  for (const auto& [operation, threads] : waiting) {
    message += " " + std::to_string(threads.size()) + " threads (first " + std::to_string(threads[0]) + ") wait in " +
               operation + ";";
  }
  message += " " + std::to_string(state.num_threads - state.num_alive) + " exited";
  fail(message, nullptr);
}

void forget_runnable(Fiber* fiber) {
  Warp& warp = *fiber->warp;
  warp.runnable &= ~(1u << fiber->lane);
  if (warp.runnable == 0) state.runnable_warps &= ~(1u << warp.index);
}

void switch_to_next() {
  Fiber* next = next_runnable();
  if (next == nullptr) report_deadlock();
  switch_to(next);
}

void run_thread() {
  state.launch->call(state.launch->kernel, state.arguments);
  Fiber* self = state.current;
  if (self->first_copy < self->copies.size()) {
    fail("a thread exits with asynchronous copies it did not wait for", self->copies[self->first_copy].caller);
  }
  leave_barriers_of_exited_thread();
  self->warp->alive &= ~(1u << self->lane);
  forget_runnable(self);
  --state.num_alive;
  if (state.num_alive == 0) switch_to(&state.host);
  switch_to_next();
  __builtin_unreachable();
}

}  // namespace

void block_current(const char* operation, const void* caller) {
  state.current->waiting_in = operation;
  state.current->waiting_at = caller;
  forget_runnable(state.current);
  switch_to_next();
}

void yield_current() { switch_to(next_runnable()); }

void prepare_fiber(Fiber* fiber) {
  fiber->copies.clear();
  fiber->first_copy = 0;
  fiber->num_groups = 0;
#if defined(TOPGATHER_EMULATION_UCONTEXT)
  getcontext(&fiber->context);
  unsigned char* bottom = stack_bottom(fiber->thread);
  fiber->context.uc_stack.ss_sp = bottom;
  fiber->context.uc_stack.ss_size = static_cast<size_t>(stack_top(fiber->thread) - bottom);
  fiber->context.uc_link = nullptr;
  makecontext(&fiber->context, run_thread, 0);
#else
  // Every stack starts at another offset: at the same one, the hot lines of all stacks would share a few cache sets.
  const uintptr_t top = reinterpret_cast<uintptr_t>(stack_top(fiber->thread)) - 64 - fiber->thread % 61 * 64 * 5;
  void** stack = reinterpret_cast<void**>(top & ~uintptr_t{63});
  *--stack = nullptr;  // a return address that is never used; leaves the alignment a function expects
  *--stack = reinterpret_cast<void*>(run_thread);
  for (int i = 0; i < 6; ++i) *--stack = nullptr;  // the registers topgather_emulation_switch restores
  fiber->stack_pointer = stack;
#endif
}

void start_block() {
  state.host.thread_idx = {0, 0, 0};
  state.current = &state.host;
  const Warp& warp = state.warps[first_bit(state.runnable_warps)];
  switch_to(fiber_of(warp, first_bit(warp.runnable)));
  state.current = nullptr;
}

}  // namespace topgather::emulation
