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
// The threads are torch's own (worker_pool.h). Where those cannot be had, as in a forked child (data loaders), threads
// are started for the call and joined before it returns. A body must not throw.
using TaskBody = void (*)(void* context, int64_t task, int worker);
void parallel_for(int num_threads, int64_t num_tasks, TaskBody body, void* context);

// Workers worth having for a job of this many tasks and multiply-adds: to wake one and to wait for it costs some
// microseconds, and more where the waiting threads sleep (OMP_WAIT_POLICY=passive).
int useful_threads(int num_threads, int64_t num_tasks, double num_operations);

// Cache-line aligned memory, not initialised. Throws std::bad_alloc.
struct AlignedDelete {
  void operator()(void* pointer) const noexcept;
};
using AlignedBuffer = std::unique_ptr<unsigned char, AlignedDelete>;
AlignedBuffer allocate_aligned(size_t num_bytes);

}  // namespace topgather
