// A loop over independent tasks, shared by the CPU kernels.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

namespace topgather {

namespace detail {
using TaskBody = void (*)(const void* context, int64_t task, int worker);
void parallel_for(int num_threads, int64_t num_tasks, TaskBody body, const void* context);
}  // namespace detail

// Calls run_task(task, worker) for every task in [0, num_tasks), on at most num_threads threads, the caller's among
// them; worker is in [0, num_threads) and no two tasks with the same worker overlap. Which worker gets which task
// varies from run to run, so a result must depend on the task alone.
//
// The threads are torch's own (worker_pool.h). Where those cannot be had, as in a forked child (data loaders), threads
// are started for the call and joined before it returns. run_task must not throw.
//
// run_task is a lambda: its type carries the namespace it is written in, so each instruction set has an instantiation
// of its own. A type that several instruction sets share would let the linker keep the code of any of them.
template <typename RunTask>
void for_each_task(int num_threads, int64_t num_tasks, const RunTask& run_task) {
  const auto body = [](const void* context, int64_t task, int worker) {
    (*static_cast<const RunTask*>(context))(task, worker);
  };
  detail::parallel_for(num_threads, num_tasks, body, &run_task);
}

// For tests of how calls are cut: starts or stops counting the tasks of every loop that this thread begins; returns
// those counted since it was last called.
std::vector<int64_t> count_tasks(bool is_counting);

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
