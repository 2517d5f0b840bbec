// The threads that torch keeps between its own ops, borrowed for one call.
#pragma once

namespace topgather {

// Runs work(context, worker) once on each of up to num_workers threads, the caller's among them, and returns when all
// are done; worker is in [0, num_workers) and differs between threads. Fewer threads may come: the work must not count
// on a number.
//
// Returns false, with nothing run, where torch's threads cannot be had: without torch, with an OpenMP library that
// lacks GOMP_parallel (macOS), and in a forked child, whose parent's threads are gone. Work must not throw.
using WorkerBody = void (*)(void* context, int worker);
bool run_on_torch_threads(int num_workers, WorkerBody work, void* context);

}  // namespace topgather
