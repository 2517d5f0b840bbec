// What the current device allows.
#pragma once

#include "launch.cuh"

namespace topgather::cuda {

// Maximum of shared memory of one thread block.
inline size_t max_shared_bytes() {
  int device = 0, bytes = 0;
  cuda_require(cudaGetDevice(&device), "reading the current device");
  cuda_require(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
               "reading the device's shared memory");
  return static_cast<size_t>(bytes);
}

}  // namespace topgather::cuda
