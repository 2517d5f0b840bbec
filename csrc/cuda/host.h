// What host code around kernels needs: errors as exceptions, the caller's device, profiler ranges.
//
// The standard library's strings and the profiler's header stay in host_cuda.cpp: nvcc would read them anew for every
// architecture of every file.
#pragma once

#include <cuda_runtime_api.h>

namespace topgather {

// std::runtime_error: "CUDA error while <doing>: <what the runtime says>".
[[noreturn]] void throw_cuda_error(cudaError_t status, const char* doing);

inline void cuda_require(cudaError_t status, const char* doing) {
  if (status != cudaSuccess) throw_cuda_error(status, doing);
}

// Makes `device` current for the lifetime of the guard.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    cuda_require(cudaGetDevice(&previous_), "reading the current device");
    if (device != previous_) cuda_require(cudaSetDevice(device), "choosing the tensors' device");
  }
  ~DeviceGuard() { cudaSetDevice(previous_); }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
};

// Names what is queued during its lifetime in profilers' timelines. Costs a few nanoseconds where none is attached.
class StageRange {
 public:
  explicit StageRange(const char* name);
  ~StageRange();
  StageRange(const StageRange&) = delete;
  StageRange& operator=(const StageRange&) = delete;
};

}  // namespace topgather
