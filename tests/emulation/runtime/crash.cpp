// A crash of kernel code becomes an Error. The handlers stand only while a launch runs, so that the interpreter keeps
// its own; they touch nothing unless a kernel's thread is running.
#include <csignal>
#include <cstdio>

#include "state.h"

namespace topgather::emulation {

namespace {

alignas(64) unsigned char signal_stack[64 * 1024];
alignas(64) unsigned char landing_stack[256 * 1024];  // the crashed stack may be full
struct sigaction previous_segv, previous_bus;
stack_t previous_stack;
uintptr_t crash_address;
const void* crash_instruction;

[[noreturn]] void land() {
  char message[96];
  std::snprintf(message, sizeof message, "CRASH at address 0x%zx", static_cast<size_t>(crash_address));
  fail(message, static_cast<const char*>(crash_instruction) + 1);
}

void on_crash(int signal, siginfo_t* info, void* context) {
#if defined(__x86_64__) && defined(__linux__)
  if (in_kernel()) {
    // Goes on in land() once the handler has returned.
    auto& registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
    crash_address = reinterpret_cast<uintptr_t>(info->si_addr);
    crash_instruction = reinterpret_cast<const void*>(registers[REG_RIP]);
    registers[REG_RIP] = static_cast<greg_t>(reinterpret_cast<uintptr_t>(land));
    registers[REG_RSP] = static_cast<greg_t>(reinterpret_cast<uintptr_t>(landing_stack + sizeof landing_stack) - 8);
    return;
  }
#endif
  (void)info;
  (void)context;
  // Not ours: the previous handler sees the fault when the instruction is tried again.
  sigaction(signal, signal == SIGSEGV ? &previous_segv : &previous_bus, nullptr);
}

}  // namespace

CrashGuard::CrashGuard() {
  stack_t stack{};
  stack.ss_sp = signal_stack;
  stack.ss_size = sizeof signal_stack;
  sigaltstack(&stack, &previous_stack);
  struct sigaction action{};
  action.sa_sigaction = on_crash;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  sigaction(SIGSEGV, &action, &previous_segv);
  sigaction(SIGBUS, &action, &previous_bus);
}

CrashGuard::~CrashGuard() {
  sigaction(SIGSEGV, &previous_segv, nullptr);
  sigaction(SIGBUS, &previous_bus, nullptr);
  sigaltstack(&previous_stack, nullptr);
}

}  // namespace topgather::emulation
