// What every launcher needs: errors as exceptions, the caller's device and stream, kernel launches, profiler ranges.
//
// A kernel takes one argument, a struct by value, and is launched through `cuda::launch` alone. Under a host compiler
// the launch runs the kernel in the emulator (tests/emulation).
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <stdexcept>
#include <string>
#include <type_traits>

#if !defined(__CUDACC__)
#include "emulation.h"
#endif
#if __has_include(<nvtx3/nvToolsExt.h>)
#include <nvtx3/nvToolsExt.h>
#define TOPGATHER_HAVE_NVTX
#endif

namespace topgather {

inline void cuda_require(cudaError_t status, const char* doing) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string("CUDA error while ") + doing + ": " + cudaGetErrorString(status));
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
#if defined(TOPGATHER_HAVE_NVTX)
  explicit StageRange(const char* name) { nvtxRangePushA(name); }
  ~StageRange() { nvtxRangePop(); }
#else
  explicit StageRange(const char*) {}
  ~StageRange() {}
#endif
  StageRange(const StageRange&) = delete;
  StageRange& operator=(const StageRange&) = delete;
};

namespace cuda {

struct LaunchShape {
  dim3 grid;
  dim3 block;
  size_t shared_bytes;  // dynamic shared memory of a block
  cudaStream_t stream;
};

// Shared memory that a kernel may use without asking.
constexpr size_t kSharedBytesWithoutOptIn = 48 * 1024;

// Queues the kernel on the stream; throws std::runtime_error if it cannot be.
template <typename Arguments>
void launch(void (*kernel)(Arguments), const LaunchShape& shape, const std::type_identity_t<Arguments>& arguments) {
  static_assert(std::is_trivially_copyable_v<Arguments>, "kernel arguments are copied byte by byte");
  if (shape.shared_bytes > kSharedBytesWithoutOptIn) {
    cuda_require(
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(shape.shared_bytes)),
        "asking for more than 48 KB of shared memory");
  }
#if defined(__CUDACC__)
  kernel<<<shape.grid, shape.block, shape.shared_bytes, shape.stream>>>(arguments);
#else
  emulation::launch(kernel, shape.grid, shape.block, shape.shared_bytes, arguments);
#endif
  cuda_require(cudaGetLastError(), "launching a kernel");
}

}  // namespace cuda
}  // namespace topgather
