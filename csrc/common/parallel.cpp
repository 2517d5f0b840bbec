#include "parallel.h"

#include <algorithm>
#include <atomic>
#include <new>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "worker_pool.h"

namespace topgather {

namespace {

struct Loop {
  std::atomic<int64_t> next_task{0};
  int64_t num_tasks;
  detail::TaskBody body;
  const void* context;
};

struct TaskCounts {
  bool is_counting = false;
  std::vector<int64_t> of_loops;
};
thread_local TaskCounts task_counts;

void run_tasks(void* pointer, int worker) {
  Loop& loop = *static_cast<Loop*>(pointer);
  for (int64_t task = loop.next_task.fetch_add(1); task < loop.num_tasks; task = loop.next_task.fetch_add(1)) {
    loop.body(loop.context, task, worker);
  }
}

void run_on_new_threads(int num_workers, Loop& loop) {
  std::vector<std::thread> helpers;
  helpers.reserve(static_cast<size_t>(num_workers) - 1);
  try {
    for (int worker = 1; worker < num_workers; ++worker) helpers.emplace_back(run_tasks, &loop, worker);
  } catch (const std::system_error&) {
    // The system refuses more threads: those that started, and the caller, do all of the tasks.
  }
  run_tasks(&loop, 0);
  for (std::thread& helper : helpers) helper.join();
}

}  // namespace

void detail::parallel_for(int num_threads, int64_t num_tasks, TaskBody body, const void* context) {
  if (task_counts.is_counting) task_counts.of_loops.push_back(num_tasks);
  if (num_tasks <= 0) return;
  const int num_workers = static_cast<int>(std::clamp<int64_t>(num_threads, 1, num_tasks));
  Loop loop{{0}, num_tasks, body, context};
  if (num_workers == 1) return run_tasks(&loop, 0);
  if (!run_on_torch_threads(num_workers, &run_tasks, &loop)) run_on_new_threads(num_workers, loop);
}

std::vector<int64_t> count_tasks(bool is_counting) {
  task_counts.is_counting = is_counting;
  return std::exchange(task_counts.of_loops, {});
}

int useful_threads(int num_threads, int64_t num_tasks, double num_operations) {
  constexpr double kOperationsPerThread = 200e3;
  const double by_work = num_operations / kOperationsPerThread + 1.0;
  const int64_t limit = std::min<int64_t>(std::max<int64_t>(num_tasks, 1), num_threads);
  return static_cast<int>(std::clamp<double>(by_work, 1.0, static_cast<double>(std::max<int64_t>(limit, 1))));
}

constexpr std::align_val_t kAlignment{64};

void AlignedDelete::operator()(void* pointer) const noexcept { ::operator delete(pointer, kAlignment); }

AlignedBuffer allocate_aligned(size_t num_bytes) {
  constexpr size_t kPiece = static_cast<size_t>(kAlignment);
  const size_t rounded = std::max((num_bytes + kPiece - 1) / kPiece * kPiece, kPiece);
  return AlignedBuffer(static_cast<unsigned char*>(::operator new(rounded, kAlignment)));
}

}  // namespace topgather
