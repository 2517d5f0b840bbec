// torch's CPU ops run on the threads of an OpenMP library, which wait busily for some milliseconds after each op. Other
// threads started in that time share a core with them and take up to twice as long; the waiting threads themselves
// start within microseconds. So work goes to them, through the entry point that compilers emit for
// `#pragma omp parallel`: linking an OpenMP library of our own would bring a second set of threads.

#include "worker_pool.h"

#if defined(__linux__)
#include <dlfcn.h>
#include <pthread.h>
#endif

#include <atomic>

namespace topgather {

#if defined(__linux__)

namespace {

// GCC's interface (libgomp), which LLVM's libomp exports too.
using ParallelEntry = void (*)(void (*body)(void*), void* context, unsigned num_threads, unsigned flags);
using ThreadIndex = int (*)();

// Set in a child of fork, and in its children: OpenMP would wait there for threads that only the parent has. The
// handler is registered as the module is loaded, since a parent may fork before its first call of ours.
std::atomic<bool> is_forked_child{false};
const bool is_fork_seen = pthread_atfork(nullptr, nullptr, [] { is_forked_child.store(true); }) == 0;

struct TorchThreads {
  ParallelEntry parallel = nullptr;
  ThreadIndex thread_idx = nullptr;

  TorchThreads() {
    if (!is_fork_seen) return;
    // A process may hold several OpenMP libraries. A symbol is looked up in torch's library and then in those that it
    // was linked with, so this finds the one that torch runs on. The handle is kept: torch is never unloaded.
    void* torch = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
    if (torch == nullptr) return;
    thread_idx = reinterpret_cast<ThreadIndex>(dlsym(torch, "omp_get_thread_num"));
    if (thread_idx != nullptr) parallel = reinterpret_cast<ParallelEntry>(dlsym(torch, "GOMP_parallel"));
  }
};

struct Region {
  int num_workers;
  WorkerBody work;
  void* context;
  ThreadIndex thread_idx;
};

void run_worker(void* pointer) {
  const Region& region = *static_cast<const Region*>(pointer);
  const int worker = region.thread_idx();
  if (worker < region.num_workers) region.work(region.context, worker);
}

}  // namespace

bool run_on_torch_threads(int num_workers, WorkerBody work, void* context) {
  static const TorchThreads threads;
  if (threads.parallel == nullptr || is_forked_child.load(std::memory_order_relaxed)) return false;
  Region region{num_workers, work, context, threads.thread_idx};
  // As many as torch takes, whatever the work needs: libgomp ends the threads that a smaller team leaves over, and
  // starts them anew for torch's next op.
  constexpr unsigned kAsManyAsTorch = 0;
  threads.parallel(&run_worker, &region, kAsManyAsTorch, 0);
  return true;
}

#else

bool run_on_torch_threads(int, WorkerBody, void*) { return false; }

#endif

}  // namespace topgather
