// The emulator's state: options, threads, warps, the block being run. One launch runs at a time (launch.cpp holds the
// lock).
#pragma once

#include <cuda_runtime_api.h>

#include <bit>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

// May also be defined on x86-64, to test it.
#if !defined(__x86_64__) && !defined(TOPGATHER_EMULATION_UCONTEXT)
#define TOPGATHER_EMULATION_UCONTEXT
#endif
#if defined(TOPGATHER_EMULATION_UCONTEXT)
#include <ucontext.h>
#endif

namespace topgather::emulation {

constexpr unsigned kLanes = 32;
constexpr unsigned kMaxThreads = 1024;
constexpr unsigned kMaxWarps = kMaxThreads / kLanes;
constexpr uint32_t kAllLanes = 0xffffffffu;

// --- options and counters -------------------------------------------------------------------------------------------

enum class Order { kAscending, kDescending, kRandom };  // which runnable thread, and which block, comes next
enum class Landing { kAtWait, kAtIssue, kMixed };       // when an asynchronous copy arrives; mixed: a coin each

struct Options {
  Order order = Order::kAscending;
  Landing landing = Landing::kAtWait;
  uint64_t seed = 1;
  size_t shared_limit = 227 * 1024;
  int num_multiprocessors = 4;
  int compute_capability = 80;  // major * 10 + minor
  int driver_version = 13000;   // the newest CUDA it supports, major * 1000 + minor * 10; 0: no driver
  bool check_races = true;      // the three checks act in the checked build only
  bool check_uninitialized = true;
  bool poison = true;  // fill outputs, workspace and shared memory with 0xFF
};

struct Statistics {
  uint64_t launches = 0, blocks = 0, threads = 0, switches = 0, block_barriers = 0, warp_barriers = 0, shuffles = 0,
           ballots = 0, matrix_products = 0, matrix_loads = 0, bank_conflicts = 0, async_copies = 0, atomics = 0,
           checked_accesses = 0, attributes_read = 0;
};

extern Options options;
extern Statistics statistics;

// --- threads --------------------------------------------------------------------------------------------------------

struct PendingCopy {
  unsigned char* destination;
  unsigned char data[16];
  size_t num_bytes;
  const void* caller;
  uint32_t group;
  bool has_landed;
};

struct Warp;

struct Fiber {
#if defined(TOPGATHER_EMULATION_UCONTEXT)
  ucontext_t context;
#else
  void* stack_pointer;
#endif
  uint3 thread_idx;
  uint16_t thread;  // linear index in the block
  uint16_t lane;
  Warp* warp;
  const char* waiting_in;  // for the report of a deadlock
  const void* waiting_at;
  std::vector<PendingCopy> copies;  // oldest first, from first_copy on
  size_t first_copy;
  uint32_t num_groups;  // committed so far
};

// Lanes that have arrived at one warp-wide operation. Operations of different lanes may be under way together; a lane
// waits in one at a time, so there are never more open meetings than lanes.
struct Meeting {
  uint32_t mask;
  uint32_t arrived;
  int operation;
  void* operands[kLanes];
};

struct Warp {
  uint16_t index;
  uint32_t runnable, alive, full;
  uint32_t moment;  // of the last barrier any of its lanes took part in, see shadow.h
  uint32_t open_meetings;
  Meeting meetings[kLanes];
};

// --- the block being run --------------------------------------------------------------------------------------------

struct State {
  Fiber fibers[kMaxThreads];
  Warp warps[kMaxWarps];
  Fiber host;  // the caller of the launch
  Fiber* current = nullptr;
  unsigned num_threads = 0, num_warps = 0, num_alive = 0;
  uint32_t runnable_warps = 0;
  unsigned num_at_barrier = 0;  // threads
  uint32_t warps_at_barrier = 0;
  bool barrier_predicate = false, barrier_result = false;
  unsigned char* shared = nullptr;
  size_t shared_bytes = 0;
  const Launch* launch = nullptr;
  const void* arguments = nullptr;  // the launch's own copy
  uint64_t random = 1;
  std::string error;
};
extern State state;

// The built-in indices, as the runtime sees them; kernels see constants of the same names (device_builtins.h).
extern uint3 current_thread_idx asm("topgather_emulation_thread_idx");
extern uint3 current_block_idx asm("topgather_emulation_block_idx");
extern dim3 current_block_dim asm("topgather_emulation_block_dim");
extern dim3 current_grid_dim asm("topgather_emulation_grid_dim");

inline bool in_kernel() { return state.current != nullptr && state.current != &state.host; }

inline uint64_t next_random() {
  state.random ^= state.random << 13;
  state.random ^= state.random >> 7;
  state.random ^= state.random << 17;
  return state.random;
}
inline unsigned random_below(unsigned count) { return static_cast<unsigned>((next_random() >> 32) * count >> 32); }

// --- the arena: shared memory, the arguments' copy and every stack in one piece of address space (arena.cpp) --------

struct Arena {
  uintptr_t begin = 0, size = 0;
  uintptr_t shared_end = 0;  // what lies beyond is private to a thread
};
extern Arena arena;

constexpr size_t kPage = 4096;
constexpr size_t kMaxSharedBytes = 256 * 1024;
constexpr size_t kMaxArgumentBytes = 4096;

void create_arena();                          // once
void resize_shared_memory(size_t num_bytes);  // unmaps what lies beyond
unsigned char* argument_copy();
unsigned char* stack_bottom(unsigned thread);
unsigned char* stack_top(unsigned thread);

// --- errors (errors.cpp) --------------------------------------------------------------------------------------------

// Ends the launch with an Error: what, which thread, where in the source. From kernel code or from the host.
[[noreturn]] void fail(const std::string& what, const void* caller);
std::string current_place();                   // " [block (x, y, z) thread (x, y, z)]"
std::string source_place(const void* caller);  // " at file:line < inlined into file:line"

// --- fibers (fibers.cpp) --------------------------------------------------------------------------------------------

void prepare_fiber(Fiber* fiber);  // to start the kernel when it is first switched to
void start_block();                // runs until every thread has exited or one has failed
void switch_to(Fiber* fiber);
void block_current(const char* operation, const void* caller);  // until someone makes it runnable
void yield_current();
inline void yield_if_random() {
  if (options.order == Order::kRandom) yield_current();
}
inline void make_runnable(Warp& warp, uint32_t lanes) {
  warp.runnable |= lanes & warp.alive;
  if (warp.runnable != 0) state.runnable_warps |= 1u << warp.index;
}
void leave_barriers_of_exited_thread();  // collectives.cpp

// --- crashes: SIGSEGV and SIGBUS in kernel code become an Error (crash.cpp) -----------------------------------------

class CrashGuard {
 public:
  CrashGuard();
  ~CrashGuard();
};

}  // namespace topgather::emulation
