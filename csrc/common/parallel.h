// A loop over independent tasks, shared by the CPU kernels.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

namespace topgather {

// Runs body(context, task, worker) for every task in [0, num_tasks), on at most num_threads threads, the caller's
// among them; worker is in [0, num_threads) and no two tasks with the same worker overlap. Which worker gets which
// task varies from run to run, so a result must depend on the task alone.
//
// Threads are started per call and joined before it returns: nothing outlives the call, which keeps the module safe
// to fork (data loaders) and leaves no pool to contend with torch's own.
using TaskBody = void (*)(void* context, int64_t task, int worker);
void parallel_for(int num_threads, int64_t num_tasks, TaskBody body, void* context);

// Workers worth starting for a job of this many tasks and multiply-adds: a thread costs about 20 microseconds.
int useful_threads(int num_threads, int64_t num_tasks, double num_operations);

// Cache-line aligned memory, not initialised. Throws std::bad_alloc.
struct AlignedDelete {
  void operator()(void* pointer) const noexcept;
};
using AlignedBuffer = std::unique_ptr<unsigned char, AlignedDelete>;
AlignedBuffer allocate_aligned(size_t num_bytes);

}  // namespace topgather
