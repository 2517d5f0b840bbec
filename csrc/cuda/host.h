// What host code around kernels needs: errors as exceptions, the caller's device, shared memory, profiler ranges.
//
// The standard library's strings and the profiler's header stay in host_cuda.cpp: nvcc would read them anew for every
// architecture of every file.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

namespace topgather {

// std::runtime_error: "CUDA error while <doing>: <what the runtime says>", and what to do about a driver that is too old.
[[noreturn]] void throw_cuda_error(cudaError_t status, const char* doing);

inline void cuda_require(cudaError_t status, const char* doing) {
  if (status != cudaSuccess) throw_cuda_error(status, doing);
}

// Lets the kernel use as much shared memory as a thread block of the current device may have, and asks for all of a
// multiprocessor's, so that as many blocks run side by side as were counted on. The same whatever `bytes` a launch takes,
// so threads do not undo each other's; done, and the device asked, once for each kernel and device. Throws where `bytes`
// are more.
void allow_shared_memory(const void* kernel, size_t bytes);

// Makes `device` current for the lifetime of the guard. Going back to a device that the program has not used would create
// a context there: calls from Python come with the device current already, by torch's own guard, which knows.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    cuda_require(cudaGetDevice(&previous_), "reading the current device");
    is_changed_ = device != previous_;
    if (is_changed_) cuda_require(cudaSetDevice(device), "choosing the tensors' device");
  }
  ~DeviceGuard() {
    if (is_changed_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
  bool is_changed_ = false;
};

// Names what is queued during its lifetime, as <op>.<stage>, in profilers' timelines, where TOPGATHER_NVTX=1 asks for it.
class StageRange {
 public:
  explicit StageRange(const char* name);
  ~StageRange();
  StageRange(const StageRange&) = delete;
  StageRange& operator=(const StageRange&) = delete;
};

}  // namespace topgather
