// What every launcher needs: errors as exceptions, the caller's device, the caller's stream.
#pragma once

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

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

}  // namespace topgather
